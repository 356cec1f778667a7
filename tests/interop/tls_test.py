#!/usr/bin/python3
"""Clients of TLS that we did not write, Python's ssl, websockets, Tornado and openssl s_client, against examples/wss.

    /usr/bin/python3 tests/interop/tls_test.py --wss BIN

Prints one line for each check, then "N passed, N failed", and ends with status 1 if one of them failed.
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

PATIENCE = 20  # seconds for one check; a machine under load is slow, not broken
CHECKS = []


def check(sentence):
    def register(function):
        CHECKS.append((sentence, function))

    return register


def expect(actual, wanted, what="the result"):
    if actual != wanted:
        raise AssertionError(f"{what}: expected {wanted!r}, got {actual!r}")


def expect_in(part, whole, what="the result"):
    if part not in whole:
        raise AssertionError(f"{what}: expected {part!r} in {whole[-2000:]!r}")


class Program:
    """The example in a folder of its own, on a port that the system picks."""

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

    def log_has(self, text):
        end = time.monotonic() + PATIENCE
        while text not in self.log_text():
            if time.monotonic() > end:
                raise TimeoutError(f"{text!r} in the log {self.log_text()!r}")
            time.sleep(0.02)

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def in_folder(name):
    return os.path.join(FOLDER, name)


def trusting(authorities=None, **versions):
    """A context that verifies, as they all do by default."""
    context = ssl.create_default_context(cafile=authorities or in_folder("wss-cert.pem"))
    for name, version in versions.items():
        setattr(context, name, version)
    return context


def connect(context, host="localhost", **more):
    raw = socket.create_connection(("127.0.0.1", WSS.port), timeout=PATIENCE)
    return context.wrap_socket(raw, server_hostname=host, **more)


def s_client(*arguments, send=""):
    """What openssl says of a connection."""
    done = subprocess.run(["openssl", "s_client", "-connect", f"127.0.0.1:{WSS.port}", *arguments], input=send,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE)
    return done.stdout


@check("it makes a certificate and a key once, says so, and keeps the key to its owner")
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


@check("Python's http.client gets the page over TLS 1.2 and 1.3 from a certificate that it verifies")
def _():
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = trusting(minimum_version=version, maximum_version=version)
        connection = http.client.HTTPSConnection("localhost", WSS.port, timeout=PATIENCE, context=context)
        connection.request("GET", "/")
        answer = connection.getresponse()
        expect((answer.status, b"<title>" in answer.read()), (200, True))
        expect(connection.sock.version(), version.name.replace("TLSv1_", "TLSv1."))


@check("a client that does not know the certificate, or wants another name, refuses it")
def _():
    for context, host in ((ssl.create_default_context(), "localhost"), (trusting(), "evil.example")):
        try:
            connect(context, host)
        except ssl.SSLCertVerificationError:
            continue
        raise AssertionError(f"{host} was accepted")


@check("openssl s_client: ALPN, the verified name, what is refused")
def _():
    good = s_client("-alpn", "h2,http/1.1", "-CAfile", in_folder("wss-cert.pem"), "-verify_hostname", "localhost")
    expect_in("ALPN protocol: http/1.1", good)
    expect_in("Verification: OK", good)
    expect_in("Secure Renegotiation IS supported", s_client("-tls1_2"))
    expect_in("alert protocol version", s_client("-tls1_1", "-cipher", "DEFAULT:@SECLEVEL=0"))
    expect_in("alert no application protocol", s_client("-alpn", "h2"))
    expect_in("alert handshake failure", s_client("-tls1_2", "-cipher", "AES128-SHA:@SECLEVEL=0"))


@check("openssl s_client: a renegotiation is refused, a change of keys is not")
def _():
    expect_in("no renegotiation", s_client("-tls1_2", send="R\n"))
    page = s_client("-tls1_3", "-ign_eof", "-quiet", send="GET / HTTP/1.0\r\n\r\n")
    expect_in("<title>", page)


@check("a session is resumed by its ticket")
def _():
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = trusting(minimum_version=version, maximum_version=version)
        first = connect(context)
        first.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        expect_in(b"404", first.recv(4096))
        second = connect(context, session=first.session)
        expect(second.session_reused, True)


@check("close_notify comes after the last answer, so that nobody can cut it off unseen")
def _():
    client = connect(trusting(), suppress_ragged_eofs=False)
    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    while client.recv(65536):  # a missing close_notify is an SSLEOFError
        pass


@check("websockets: chat, large messages and closing")
def _():
    async def talk():
        url = f"wss://localhost:{WSS.port}/chat"
        async with websockets.connect(url, ssl=trusting(), max_size=None) as one, \
                websockets.connect(url, ssl=trusting(), max_size=None) as two:
            for message in ("hello", "x" * 1_000_000, b"\x00" * 300_000):
                await one.send(message)
                expect(await one.recv() == message and await two.recv() == message, True)
        expect((one.close_code, two.close_code), (1000, 1000))

    asyncio.run(asyncio.wait_for(talk(), PATIENCE))


@check("Tornado: chat")
def _():
    async def talk():
        request = tornado.httpclient.HTTPRequest(f"wss://localhost:{WSS.port}/chat",
                                                 ca_certs=in_folder("wss-cert.pem"))
        client = await tornado.websocket.websocket_connect(request)
        await client.write_message("hello")
        expect(await client.read_message(), "hello")
        client.close(4001, "bye")
        expect(await client.read_message(), None)

    asyncio.run(asyncio.wait_for(talk(), PATIENCE))


@check("plain HTTP gets a sentence, and so does no one else")
def _():
    connection = http.client.HTTPConnection("127.0.0.1", WSS.port, timeout=PATIENCE)
    connection.request("GET", "/")
    answer = connection.getresponse()
    expect(answer.status, 400)
    expect_in("use https:// or wss://", answer.read().decode())
    WSS.log_has('info tls_failed peer="127.0.0.1" cause="the peer speaks plain text"')


@check("SIGHUP reads the certificate anew; one that is not right changes nothing")
def _():
    staying = connect(trusting())
    before = connect(trusting()).getpeercert(True)
    renewed = in_folder("renewed.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost", "-keyout", in_folder("wss-key.pem"), "-out", renewed]
    subprocess.run(make, check=True, capture_output=True)
    WSS.process.send_signal(signal.SIGHUP)
    WSS.log_has("TLS key")
    expect(connect(trusting()).getpeercert(True), before, "the certificate, while key and certificate differ")
    os.replace(renewed, in_folder("wss-cert.pem"))
    WSS.process.send_signal(signal.SIGHUP)
    WSS.log_has("the certificate was read anew")
    after = connect(trusting()).getpeercert(True)
    expect(after == before, False, "the certificate is the old one")
    staying.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
    expect_in(b"404", staying.recv(4096))


@check("a port that is taken and a file that is not there are errors with status 1")
def _():
    taken = Program(OPTIONS.wss, str(WSS.port))
    expect(taken.stop(0), 1, "the status")
    expect_in("wss: listen 127.0.0.1:", taken.log_text())
    missing = Program(OPTIONS.wss, "0", "--cert", "/nowhere/cert.pem", "--key", in_folder("wss-key.pem"))
    expect(missing.stop(0), 1, "the status")
    expect(missing.log_text(), 'wss: TLS certificate "/nowhere/cert.pem": No such file or directory\n')


@check("SIGTERM closes with 1001, and the status is 0")
def _():
    async def end():
        url = f"wss://localhost:{WSS.port}/chat"
        async with websockets.connect(url, ssl=trusting()) as client:
            WSS.process.send_signal(signal.SIGTERM)
            await client.wait_closed()
            expect(client.close_code, 1001)

    asyncio.run(asyncio.wait_for(end(), PATIENCE))
    expect(WSS.stop(0), 0, "the status")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--wss", required=True)
    OPTIONS = parser.parse_args()
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="wschat-tls-") as FOLDER:
        WSS = Program(OPTIONS.wss, "0").ready()
        for sentence, function in CHECKS:
            try:
                function()
                passed += 1
                print(f"ok - {sentence}", flush=True)
            except Exception as error:  # each failure is told, and the checks go on
                failed += 1
                print(f"not ok - {sentence}\n  # {type(error).__name__}: {error}", flush=True)
        if WSS.process.poll() is None:
            WSS.process.kill()
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed != 0)
