#!/usr/bin/python3
"""Tests examples/wss with other TLS clients: Python's ssl, websockets, Tornado and openssl s_client.

    /usr/bin/python3 tests/interop/tls_test.py --wss BIN

Prints one line per check, then "N passed, N failed", and ends with status 1 if a check failed.
"""

import argparse
import asyncio
import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time

import tornado.httpclient
import tornado.websocket
import websockets

sys.dont_write_bytecode = True
from expectations import TIMEOUT, Results, expect, expect_in  # noqa: E402

CHECKS = []


def check(title):
    def register(function):
        CHECKS.append((title, function))

    return register


class Program:
    """The example in its own folder, on a port that the system selects."""

    def __init__(self, path, *arguments):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([os.path.abspath(path), *arguments], cwd=FOLDER, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=self.log, text=True)

    def ready(self):
        line = self.process.stdout.readline()
        address = re.fullmatch(r"wss: open https://127\.0\.0\.1:(\d+)/ in two windows\n", line)
        if not address:
            raise RuntimeError(f"wss printed {line!r}; its log: {self.log_text()}")
        self.port = int(address[1])
        return self

    def log_text(self):
        return os.pread(self.log.fileno(), 1024 * 1024, 0).decode(errors="replace")

    def wait_for_log(self, text):
        end = time.monotonic() + TIMEOUT
        while text not in self.log_text():
            if time.monotonic() > end:
                raise TimeoutError(f"{text!r} in the log {self.log_text()!r}")
            time.sleep(0.02)

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(TIMEOUT)


def in_folder(name):
    return os.path.join(FOLDER, name)


def verifying_context(authorities=None, **versions):
    """A context that verifies certificates, as contexts do by default."""
    context = ssl.create_default_context(cafile=authorities or in_folder("wss-cert.pem"))
    for name, version in versions.items():
        setattr(context, name, version)
    return context


def connect(context, host="localhost", **more):
    raw = socket.create_connection(("127.0.0.1", WSS.port), timeout=TIMEOUT)
    return context.wrap_socket(raw, server_hostname=host, **more)


def s_client(*arguments, send=""):
    """Returns the output of openssl s_client."""
    done = subprocess.run(["openssl", "s_client", "-connect", f"127.0.0.1:{WSS.port}", *arguments], input=send,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT)
    return done.stdout


@check("the first start makes a certificate and a private key that only the owner can read, and logs it")
def _():
    expect_in("wss: made wss-cert.pem and wss-key.pem for localhost", WSS.log_text())
    expect(os.stat(in_folder("wss-key.pem")).st_mode & 0o777, 0o600, "the mode of the key")
    text = subprocess.run(["openssl", "x509", "-in", in_folder("wss-cert.pem"), "-noout", "-text"], check=True,
                          capture_output=True, text=True).stdout
    expect_in("DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1", text)
    expect_in("NIST CURVE: P-256", text)
    again = Program(OPTIONS.wss, "0").ready()
    expect(again.log_text(), "", "the log of the second start")
    expect(again.stop(), 0, "the status")


@check("Python's http.client gets the page over TLS 1.2 and 1.3 and verifies the certificate")
def _():
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = verifying_context(minimum_version=version, maximum_version=version)
        connection = http.client.HTTPSConnection("localhost", WSS.port, timeout=TIMEOUT, context=context)
        connection.request("GET", "/")
        response = connection.getresponse()
        expect((response.status, b"<title>" in response.read()), (200, True))
        expect(connection.sock.version(), version.name.replace("TLSv1_", "TLSv1."))


@check("a client without the certificate, or for another name, rejects the connection")
def _():
    for context, host in ((ssl.create_default_context(), "localhost"), (verifying_context(), "evil.example")):
        try:
            connect(context, host)
        except ssl.SSLCertVerificationError:
            continue
        raise AssertionError(f"{host} was accepted")


@check("openssl s_client: ALPN and the host name are right, old versions and ciphers are rejected")
def _():
    good = s_client("-alpn", "h2,http/1.1", "-CAfile", in_folder("wss-cert.pem"), "-verify_hostname", "localhost")
    expect_in("ALPN protocol: http/1.1", good)
    expect_in("Verification: OK", good)
    expect_in("Secure Renegotiation IS supported", s_client("-tls1_2"))
    expect_in("alert protocol version", s_client("-tls1_1", "-cipher", "DEFAULT:@SECLEVEL=0"))
    expect_in("alert no application protocol", s_client("-alpn", "h2"))
    expect_in("alert handshake failure", s_client("-tls1_2", "-cipher", "AES128-SHA:@SECLEVEL=0"))


@check("openssl s_client: renegotiation is rejected, a key update is accepted")
def _():
    expect_in("no renegotiation", s_client("-tls1_2", send="R\n"))
    page = s_client("-tls1_3", "-ign_eof", "-quiet", send="GET / HTTP/1.0\r\n\r\n")
    expect_in("<title>", page)


@check("a ticket resumes a session")
def _():
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = verifying_context(minimum_version=version, maximum_version=version)
        first = connect(context)
        first.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        expect_in(b"404", first.recv(4096))
        second = connect(context, session=first.session)
        expect(second.session_reused, True)


@check("close_notify follows the last response, so a truncation is detected")
def _():
    client = connect(verifying_context(), suppress_ragged_eofs=False)
    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    while client.recv(65536):  # a missing close_notify is an SSLEOFError
        pass


@check("websockets: chat, large messages and closing")
def _():
    async def run_chat():
        url = f"wss://localhost:{WSS.port}/chat"
        async with websockets.connect(url, ssl=verifying_context(), max_size=None) as one, \
                websockets.connect(url, ssl=verifying_context(), max_size=None) as two:
            for message in ("hello", "x" * 1_000_000, b"\x00" * 300_000):
                await one.send(message)
                expect(await one.recv() == message and await two.recv() == message, True)
        expect((one.close_code, two.close_code), (1000, 1000))

    asyncio.run(asyncio.wait_for(run_chat(), TIMEOUT))


@check("Tornado: chat")
def _():
    async def run_chat():
        request = tornado.httpclient.HTTPRequest(f"wss://localhost:{WSS.port}/chat",
                                                 ca_certs=in_folder("wss-cert.pem"))
        client = await tornado.websocket.websocket_connect(request)
        await client.write_message("hello")
        expect(await client.read_message(), "hello")
        client.close(4001, "bye")
        expect(await client.read_message(), None)

    asyncio.run(asyncio.wait_for(run_chat(), TIMEOUT))


@check("plain HTTP gets an error text")
def _():
    connection = http.client.HTTPConnection("127.0.0.1", WSS.port, timeout=TIMEOUT)
    connection.request("GET", "/")
    response = connection.getresponse()
    expect(response.status, 400)
    expect_in("use https:// or wss://", response.read().decode())


@check("SIGHUP reloads the certificate, and an invalid one changes nothing")
def _():
    kept_open = connect(verifying_context())
    before = connect(verifying_context()).getpeercert(True)
    renewed = in_folder("renewed.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost", "-keyout", in_folder("wss-key.pem"), "-out", renewed]
    subprocess.run(make, check=True, capture_output=True)
    WSS.process.send_signal(signal.SIGHUP)
    WSS.wait_for_log("TLS key")
    expect(connect(verifying_context()).getpeercert(True), before, "the certificate, while key and certificate differ")
    os.replace(renewed, in_folder("wss-cert.pem"))
    WSS.process.send_signal(signal.SIGHUP)
    WSS.wait_for_log("wss: reloaded the certificate")
    after = connect(verifying_context()).getpeercert(True)
    expect(after == before, False, "whether the certificate is still the old one")
    kept_open.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
    expect_in(b"404", kept_open.recv(4096))


@check("a used port and a missing file are errors with status 1")
def _():
    taken = Program(OPTIONS.wss, str(WSS.port))
    expect(taken.stop(0), 1, "the status")
    expect_in("wss: listen 127.0.0.1:", taken.log_text())
    missing = Program(OPTIONS.wss, "0", "--cert", "/nowhere/cert.pem", "--key", in_folder("wss-key.pem"))
    expect(missing.stop(0), 1, "the status")
    expect_in('wss: TLS certificate "/nowhere/cert.pem": No such file or directory\n', missing.log_text())


@check("SIGTERM closes with 1001 and ends with status 0")
def _():
    async def end():
        url = f"wss://localhost:{WSS.port}/chat"
        async with websockets.connect(url, ssl=verifying_context()) as client:
            WSS.process.send_signal(signal.SIGTERM)
            await client.wait_closed()
            expect(client.close_code, 1001)

    asyncio.run(asyncio.wait_for(end(), TIMEOUT))
    expect(WSS.stop(0), 0, "the status")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--wss", required=True)
    OPTIONS = parser.parse_args()
    results = Results()
    with tempfile.TemporaryDirectory(prefix="wschat-tls-") as FOLDER:
        WSS = Program(OPTIONS.wss, "0").ready()
        for title, function in CHECKS:
            results.run(title, function)
        if WSS.process.poll() is None:
            WSS.process.kill()
    results.end()
