#!/usr/bin/python3
"""Tests the examples with two other client libraries, Python's websockets and Tornado, and with raw sockets.

    /usr/bin/python3 tests/interop/interop_test.py --echo BIN --chat BIN --rooms BIN [--zlib]

Starts the programs itself, each on a port that the system selects. --zlib: they are built with compression. Prints one
line per check, then "N passed, N failed", and ends with status 1 if a check failed. Written for Debian's
python3-websockets and python3-tornado.
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import os
import re
import signal
import sys
import tempfile

sys.dont_write_bytecode = True
from expectations import TIMEOUT, expect, expect_in  # noqa: E402

try:
    import tornado.httpclient
    import tornado.websocket
    import websockets
    import websockets.client
    from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
except ImportError as missing:
    sys.exit(f"{missing}: needs Debian's python3-websockets and python3-tornado for /usr/bin/python3")

TOTAL_TIMEOUT = 540  # seconds for all checks

# ---- checks -------------------------------------------------------------------------------------------------------

CHECKS = []


def check(title):
    """Registers a coroutine function that takes the servers. The checks run in the order of this file."""
    def register(function):
        CHECKS.append((title, function))

    return register


def check_each_library(title):
    """The same for a function that takes the servers and a client class. It runs once per library."""
    def register(function):
        for library in LIBRARIES:
            CHECKS.append((f"{library.name}: {title}", functools.partial(function, library=library)))

    return register


# ---- programs: child processes, stopped by their process ids ------------------------------------------------------

PROGRAMS = []  # all started programs


class Program:
    """A running example, on its own port."""

    async def start(self, path):
        self.log = tempfile.TemporaryFile()  # a full pipe would block the program
        # A shell ignores SIGINT for a program that it starts in the background, and a child inherits that.
        self.process = await asyncio.create_subprocess_exec(
            os.path.abspath(path), "0", stdout=asyncio.subprocess.PIPE, stderr=self.log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        PROGRAMS.append(self)
        async with timeout(f"{path} to print its address"):
            ready = (await self.process.stdout.readline()).decode()
        address = re.search(r"http://(127\.0\.0\.1):(\d+)/", ready)
        if not address:
            raise RuntimeError(f"{path} printed {ready!r} instead of its address; its log: {self.log_text()}")
        self.host, self.port = address[1], int(address[2])
        return self

    def ws(self, path="/"):
        return f"ws://{self.host}:{self.port}{path}"

    async def stop(self, signal_number=signal.SIGTERM):
        """Sends a signal and returns the exit status."""
        if self.process.returncode is None:
            self.process.send_signal(signal_number)
        async with timeout("the program to end after a signal"):
            return await self.process.wait()

    def log_text(self):
        # seek() would move the program's write position.
        return os.pread(self.log.fileno(), 1024 * 1024, 0).decode(errors="replace")


class Servers:
    """The three programs that all checks share, and clients that stay silent during the other checks."""

    echo = chat = rooms = None
    echo_path = ""
    zlib = False  # the programs are built with compression
    silent_clients = ()


@contextlib.asynccontextmanager
async def timeout(name):
    try:
        async with asyncio.timeout(TIMEOUT):
            yield
    except TimeoutError:
        raise TimeoutError(f"waited {TIMEOUT} s for {name}") from None


# ---- clients: the same methods for each library -------------------------------------------------------------------

OPEN_CLIENTS = []  # the clients of a check; they are dropped after it


class Rejected(Exception):
    """The response to the handshake has a status other than 101."""


class WebsocketsClient:
    name = "websockets"

    class Protocol(websockets.client.WebSocketClientProtocol):
        async def pong(self, data=b""):  # the library calls it for each received ping
            await super().pong(data)
            if not self.first_ping.done():
                self.first_ping.set_result(data)

    async def connect(self, url, **options):
        options = {"compression": None, "max_size": None, "ping_interval": None, "open_timeout": TIMEOUT,
                   "close_timeout": TIMEOUT, "create_protocol": self.Protocol, **options}
        try:
            self.connection = await websockets.connect(url, **options)
        except websockets.InvalidStatusCode as rejection:
            raise Rejected(rejection.status_code) from None
        self.connection.first_ping = asyncio.get_running_loop().create_future()
        OPEN_CLIENTS.append(self)
        return self

    async def send(self, message):
        await self.connection.send(message)

    async def receive(self):
        return await self.connection.recv()

    async def ping(self, payload):
        await (await self.connection.ping(payload))  # waits for the pong with this payload

    async def wait_for_ping(self):
        return await self.connection.first_ping

    async def close(self, code, reason):
        await self.connection.close(code, reason)
        return self.connection.close_code

    async def closed(self):
        """The code and the reason of the server's Close frame."""
        await self.connection.wait_closed()
        return self.connection.close_code, self.connection.close_reason

    def extensions(self):
        return self.connection.response_headers.get("Sec-WebSocket-Extensions")

    def subprotocol(self):
        return self.connection.response_headers.get("Sec-WebSocket-Protocol")

    offering_compression = {"compression": "deflate"}

    def drop(self):
        self.connection.transport.abort()


class TornadoClient:
    name = "tornado"

    async def connect(self, url, origin=None, **options):
        headers = {"Origin": origin} if origin else {}
        request = tornado.httpclient.HTTPRequest(url, headers=headers, connect_timeout=TIMEOUT)
        options = {"max_message_size": 64 * 1024 * 1024, **options}
        try:
            self.connection = await tornado.websocket.websocket_connect(request, **options)
        except tornado.httpclient.HTTPClientError as rejection:
            raise Rejected(rejection.code) from None
        self.pongs = asyncio.Queue()
        self.pings = asyncio.Queue()
        self.connection.on_pong = self.pongs.put_nowait
        self.connection.on_ping = self.pings.put_nowait
        OPEN_CLIENTS.append(self)
        return self

    async def send(self, message):
        await self.connection.write_message(message, binary=isinstance(message, bytes))

    async def receive(self):
        message = await self.connection.read_message()
        if message is None:
            raise ConnectionError(f"closed with {self.connection.close_code}")
        return message

    async def ping(self, payload):
        self.connection.ping(payload)
        expect(await self.pongs.get(), payload, "the payload of the pong")

    async def wait_for_ping(self):
        return await self.pings.get()

    async def close(self, code, reason):
        self.connection.close(code, reason)
        return (await self.closed())[0]

    async def closed(self):
        while await self.connection.read_message() is not None:
            pass
        return self.connection.close_code, self.connection.close_reason

    def extensions(self):
        return self.connection.headers.get("Sec-WebSocket-Extensions")

    def subprotocol(self):
        return self.connection.headers.get("Sec-WebSocket-Protocol")

    offering_compression = {"compression_options": {}}

    def drop(self):
        if self.connection.protocol:  # the library drops the protocol when it has closed
            self.connection.protocol.stream.close()


LIBRARIES = (WebsocketsClient, TornadoClient)

# ---- the raw client: frames that no library sends -----------------------------------------------------------------

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # the example of RFC 6455 1.3
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def wire(hexadecimal):
    return bytes.fromhex(hexadecimal)


def frame(first_byte, payload=b"", mask=b"\x37\xfa\x21\x3d"):
    """A frame of a client (RFC 6455 5.2). First byte: 0x81 for text, 0x89 for ping, 0x88 for close."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else (
        b"\xfe" + size.to_bytes(2, "big") if size < 65536 else b"\xff" + size.to_bytes(8, "big"))
    return bytes([first_byte]) + length + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))


def close_frame(code, reason=b""):
    return frame(0x88, code.to_bytes(2, "big") + reason)


class RawClient:
    async def open(self, program):
        self.reader, self.writer = await asyncio.open_connection(program.host, program.port)
        OPEN_CLIENTS.append(self)
        return self

    async def connect(self, program, path="/"):
        await self.open(program)
        await self.send(self.request(program, path))
        await self.read_response()
        return self

    @staticmethod
    def request(program, path="/"):
        return (f"GET {path} HTTP/1.1\r\nHost: {program.host}:{program.port}\r\nUpgrade: websocket\r\n"
                f"Connection: Upgrade\r\nSec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n").encode()

    async def read_response(self):
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        accept = base64.b64encode(hashlib.sha1((KEY + GUID).encode()).digest()).decode()
        expect_in("HTTP/1.1 101 ", head, "the response to the handshake")
        expect_in(f"Sec-WebSocket-Accept: {accept}\r\n", head, "the response to the handshake")

    async def send(self, data):
        self.writer.write(data)
        await self.writer.drain()

    async def read_frame(self):
        """Returns (first byte, payload), or None at the end of the stream."""
        start = await self.reader.read(1)
        if not start:
            return None
        (size,) = await self.reader.readexactly(1)
        if size > 127:
            raise AssertionError("a frame from the server is masked")
        if size > 125:
            size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
        return start[0], await self.reader.readexactly(size)

    async def read_to_end(self):
        """Returns all frames up to the end of the stream. A reset raises ConnectionResetError."""
        frames = []
        while (received := await self.read_frame()) is not None:
            frames.append(received)
        return frames

    async def expect_close(self, code):
        """Expects exactly one Close frame with the code, then the end of the stream."""
        frames = await self.read_to_end()
        expect([first for first, _ in frames], [0x88], "the frames before the end of the stream")
        payload = frames[0][1]
        expect(int.from_bytes(payload[:2], "big"), code, f"the code of the Close frame with the reason {payload[2:]}")

    def drop(self):
        self.writer.transport.abort()


async def send_in_pieces(data, size, client):
    """Sends the data in pieces of the given size, usually one packet each."""
    for at in range(0, len(data), size):
        await client.send(data[at:at + size])
        await asyncio.sleep(0)


# ---- echo: messages -----------------------------------------------------------------------------------------------

SIZES = (0, 1, 125, 126, 127, 65535, 65536, 1024 * 1024, 16 * 1024 * 1024)


def text_of(size):
    """A text of the given size in UTF-8, with characters of one to four bytes."""
    return "aé€😀" * (size // 10) + "x" * (size % 10)


def bytes_of(size):
    return (bytes(range(256)) * (size // 256 + 1))[:size]


for LENGTH in SIZES:
    @check_each_library(f"a text and a binary message of {LENGTH:,} bytes come back unchanged")
    async def _(servers, library, length=LENGTH):
        client = await library().connect(servers.echo.ws())
        for message in (text_of(length), bytes_of(length)):
            sending = asyncio.ensure_future(client.send(message))
            expect(await client.receive(), message, "the echo")
            await sending


@check_each_library("characters of all lengths, up to the last of Unicode, come back unchanged")
async def _(servers, library):
    client = await library().connect(servers.echo.ws("/any/path?and=query"))
    for text in ("\x00\x7f", "\x80\u07ff", "\u0800\ud7ff\ue000\ufffe\uffff", "\U00010000\U0010fffd\U0010ffff",
                 "κόσμε", "👩‍👩‍👧‍👦 e\u0301 \u202e\ufeff"):
        await client.send(text)
        expect(await client.receive(), text, "the echo")


@check_each_library("10,000 small messages, sent without a pause, come back in order")
async def _(servers, library):
    client = await library().connect(servers.echo.ws())

    async def send_all():
        for number in range(10_000):
            await client.send(f"message {number}")

    sending = asyncio.ensure_future(send_all())
    for number in range(10_000):
        expect(await client.receive(), f"message {number}", "the echo")
    await sending


@check_each_library("200 concurrent connections each get their own echo")
async def _(servers, library):
    async def converse(number):
        client = await library().connect(servers.echo.ws())
        await all_connected.wait()
        await client.send(f"I am {number}")
        expect(await client.receive(), f"I am {number}", "the echo")
        expect(await client.close(1000, ""), 1000, "the close code")

    all_connected = asyncio.Barrier(200)
    await asyncio.gather(*(converse(number) for number in range(200)))


@check("websockets: fragments, including empty ones, come back as one message")
async def _(servers):
    client = await WebsocketsClient().connect(servers.echo.ws())
    await client.send(["one ", "", "two ", "😀", ""])
    expect(await client.receive(), "one two 😀", "the echo")
    await client.send([b"\x00", b"\xff" * 70_000, b"", b"\x01"])
    expect(await client.receive(), b"\x00" + b"\xff" * 70_000 + b"\x01", "the echo")


@check("websockets: pings between the fragments of a message are answered before the message is complete")
async def _(servers):
    client = await WebsocketsClient().connect(servers.echo.ws())

    async def fragments():
        for number in range(5):
            yield f"part {number} "
            await client.ping(f"ping {number}".encode())  # waits for the pong while the message is incomplete

    await client.send(fragments())
    expect(await client.receive(), "part 0 part 1 part 2 part 3 part 4 ", "the echo")


# ---- echo: control frames -----------------------------------------------------------------------------------------


@check_each_library("the pong has the payload of the ping, of 0 to 125 bytes")
async def _(servers, library):
    client = await library().connect(servers.echo.ws())
    for payload in (b"", b"\x00\xff", "ping 😀".encode(), bytes_of(125)):
        await client.ping(payload)


@check("websockets: an unsolicited pong has no effect")
async def _(servers):
    client = await WebsocketsClient().connect(servers.echo.ws())
    await client.connection.pong(b"unasked")
    await client.send("still here")
    expect(await client.receive(), "still here", "the echo")


@check_each_library("the reply to a close with a code and a reason has the same code")
async def _(servers, library):
    for code, reason in ((1000, ""), (1000, "done"), (1001, "leaving"), (3000, "x" * 123), (4999, "до свидания 😀")):
        client = await library().connect(servers.echo.ws())
        expect(await client.close(code, reason), code, "the code of the reply")


@check("tornado: the reply to a close without a code has no code")
async def _(servers):
    client = await TornadoClient().connect(servers.echo.ws())
    expect(await client.close(None, None), None, "the code of the reply")


@check_each_library("a stopping server closes with 1001 and ends with status 0")
async def _(servers, library):
    program = await Program().start(servers.echo_path)
    clients = [await library().connect(program.ws()) for _ in range(3)]
    await clients[0].send("hello")
    expect(await clients[0].receive(), "hello", "the echo")
    stopping = asyncio.ensure_future(program.stop())
    for client in clients:
        code, reason = await client.closed()
        expect((code, bool(reason)), (1001, True), "the close code, and whether there is a reason")
    expect(await stopping, 0, "the status of the server")


# ---- the handshake ------------------------------------------------------------------------------------------------


@check_each_library("an offer of permessage-deflate is accepted with zlib and declined without it")
async def _(servers, library):
    client = await library().connect(servers.echo.ws(), **library.offering_compression)
    expect(client.extensions(), "permessage-deflate" if servers.zlib else None, "Sec-WebSocket-Extensions")
    await client.send("a" * 1000)
    expect(await client.receive(), "a" * 1000, "the echo")


# ---- compression --------------------------------------------------------------------------------------------------


async def check_compressed_echoes(client):
    """Messages that compress well, badly and not at all, small and large, each twice, with pings between them."""
    for message in 2 * ["", "x", "hello hello hello", "κόσμε 😀 " * 5000, b"", bytes_of(1000), os.urandom(70_000),
                        bytes(3_000_000), "y" * 1_000_000]:
        await client.send(message)
        expect(await client.receive(), message, "the echo")
        await client.ping(b"still there")


@check("websockets: messages work with all parameters of permessage-deflate")
async def _(servers):
    if not servers.zlib:
        return
    for no_server, no_client, server_bits, client_bits in itertools.product(
            (False, True), (False, True), (None, 9, 12, 15), (None, True, 9, 13)):
        offer = ClientPerMessageDeflateFactory(no_server, no_client, server_bits, client_bits)
        client = await WebsocketsClient().connect(servers.echo.ws(), extensions=[offer])
        expect(client.extensions(), "permessage-deflate"
               + "; server_no_context_takeover" * no_server + "; client_no_context_takeover" * no_client
               + (f"; server_max_window_bits={server_bits}" if server_bits else "")
               + (f"; client_max_window_bits={client_bits}" if client_bits in (9, 13) else ""), "the accepted parameters")
        for message in 2 * ["", "x", "hello hello hello", "κόσμε 😀 " * 500, os.urandom(5000), bytes(100_000)]:
            await client.send(message)
            expect(await client.receive(), message, "the echo")
        expect(await client.close(1000, ""), 1000, "the close code")


@check_each_library("compressed messages of all kinds come back unchanged")
async def _(servers, library):
    if servers.zlib:
        await check_compressed_echoes(await library().connect(servers.echo.ws(), **library.offering_compression))


@check("websockets: a compressed message in 1,000 fragments comes back as one message")
async def _(servers):
    if not servers.zlib:
        return
    client = await WebsocketsClient().connect(servers.echo.ws(), **WebsocketsClient.offering_compression)
    await client.send([f"part {number} " for number in range(1000)])
    expect(await client.receive(), "".join(f"part {number} " for number in range(1000)), "the echo")


@check("tornado: members with and without compression receive the same messages in the chat")
async def _(servers):
    chat = servers.chat.ws("/chat")
    plain = await TornadoClient().connect(chat)
    offering = await TornadoClient().connect(chat, **TornadoClient.offering_compression)
    expect(offering.extensions() is not None, servers.zlib, "whether compression was accepted")
    for text in ("short", "long " * 10_000):
        await offering.send(text)
        for client in (plain, offering):
            expect(await client.receive(), text, "the message")


@check_each_library("the server selects no subprotocol")
async def _(servers, library):
    client = await library().connect(servers.echo.ws(), subprotocols=["chat.v2", "chat"])
    expect(client.subprotocol(), None, "Sec-WebSocket-Protocol")
    await client.send("hello")
    expect(await client.receive(), "hello", "the echo")


@check_each_library("a page of the same host may connect")
async def _(servers, library):
    client = await library().connect(servers.chat.ws("/chat"), origin=f"HTTP://{servers.chat.host}:{servers.chat.port}")
    await client.send("hello")
    expect(await client.receive(), "hello", "the message")


@check_each_library("a page of another origin gets 403")
async def _(servers, library):
    try:
        await library().connect(servers.chat.ws("/chat"), origin="http://evil.example")
    except Rejected as rejection:
        expect(rejection.args, (403,), "the status")
    else:
        raise AssertionError("the connection was accepted")


UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": KEY, "Sec-WebSocket-Version": "13"}


async def request_all(program, *requests):
    """Sends (method, path, headers) in order on one connection of http.client. Returns the responses with .text."""
    def work():
        connection = http.client.HTTPConnection(program.host, program.port, timeout=TIMEOUT)
        responses = []
        for method, path, headers in requests:
            connection.request(method, path, headers=headers)
            responses.append(connection.getresponse())
            responses[-1].text = responses[-1].read().decode()
        connection.close()
        return responses

    return await asyncio.get_running_loop().run_in_executor(None, work)


REJECTIONS = (
    # name, method, path, changed headers of a valid upgrade, status, a part of the text, a response header
    ("an origin of another host", "GET", "/chat", {"Origin": "http://evil.example"}, 403, "http://evil.example", None),
    ("the origin null", "GET", "/chat", {"Origin": "null"}, 403, "null", None),
    ("an origin of another port", "GET", "/chat", {"Origin": "http://127.0.0.1:1"}, 403, "http://127.0.0.1:1", None),
    ("version 8", "GET", "/chat", {"Sec-WebSocket-Version": "8"}, 426, "13", ("Sec-WebSocket-Version", "13")),
    ("no version", "GET", "/chat", {"Sec-WebSocket-Version": None}, 426, "13", ("Sec-WebSocket-Version", "13")),
    ("a key of 8 bytes", "GET", "/chat", {"Sec-WebSocket-Key": "c2hvcnQga2V5"}, 400, "Sec-WebSocket-Key", None),
    ("an unknown path", "GET", "/nowhere", {}, 404, "path", None),
    ("POST", "POST", "/chat", {}, 405, "GET", ("Allow", "GET")),
)
for NAME, *REJECTION in REJECTIONS:
    @check(f"handshake: {NAME} is rejected with {REJECTION[3]} and an error text")
    async def _(servers, rejection=tuple(REJECTION)):
        method, path, headers, status, text, header = rejection
        headers = {name: value for name, value in {**UPGRADE, **headers}.items() if value is not None}
        (response,) = await request_all(servers.chat, (method, path, headers))
        expect(response.status, status, "the status")
        expect_in(text, response.text, "the body")
        expect(response.text[-2:], ".\n", "the end of the body")
        if header:
            expect(response.getheader(header[0]), header[1], header[0])


@check("handshake: a request in single bytes, followed at once by frames, is accepted")
async def _(servers):
    client = await RawClient().open(servers.echo)
    await send_in_pieces(RawClient.request(servers.echo) + frame(0x81, b"early"), 1, client)
    await client.read_response()
    expect(await client.read_frame(), (0x81, b"early"), "the echo")
    client = await RawClient().open(servers.echo)
    await client.send(RawClient.request(servers.echo) + frame(0x81, b"early") + frame(0x88))
    await client.read_response()
    expect(await client.read_to_end(), [(0x81, b"early"), (0x88, b"")], "the frames")


# ---- pages --------------------------------------------------------------------------------------------------------


@check("pages: the page of the chat is complete and has its type, an ETag and a length")
async def _(servers):
    (page,) = await request_all(servers.chat, ("GET", "/", {}))
    expect(page.status, 200, "the status")
    expect(page.getheader("Content-Type"), "text/html; charset=utf-8", "Content-Type")
    expect(page.getheader("Content-Length"), str(len(page.text.encode())), "Content-Length")
    expect(page.getheader("X-Content-Type-Options"), "nosniff", "X-Content-Type-Options")
    expect_in("</html>", page.text, "the page")


@check("pages: HEAD is like GET without the body, and the connection stays open")
async def _(servers):
    head, page, again = await request_all(servers.chat, ("HEAD", "/", {}), ("GET", "/", {}), ("HEAD", "/", {}))
    without_date = [[h for h in response.getheaders() if h[0] != "Date"] for response in (head, page, again)]
    expect(head.status, 200, "the status")
    expect(head.text, "", "the body")
    expect(without_date[0], without_date[1], "the headers")
    expect(without_date[2], without_date[1], "the headers")


@check("pages: a conditional request for a current page gets 304, by ETag and by date")
async def _(servers):
    (page,) = await request_all(servers.chat, ("GET", "/", {}))
    etag, modified = page.getheader("ETag"), page.getheader("Last-Modified")
    for headers, status in (({"If-None-Match": etag}, 304), ({"If-None-Match": f'"other", W/{etag}'}, 304),
                            ({"If-None-Match": '"other"'}, 200), ({"If-Modified-Since": modified}, 304),
                            ({"If-None-Match": '"other"', "If-Modified-Since": modified}, 200)):
        first, after = await request_all(servers.chat, ("GET", "/", headers), ("GET", "/", {}))
        expect((first.status, len(first.text)), (status, len(page.text) if status == 200 else 0), f"with {headers}")
        expect(first.getheader("ETag"), etag, "ETag")
        expect(after.text, page.text, "the next page")


@check("pages: an unknown path gets 404, another method 405, a WebSocket path without an upgrade 426")
async def _(servers):
    unknown, post, plain, traversal = await request_all(
        servers.chat, ("GET", "/nothing", {}), ("POST", "/", {}), ("GET", "/chat", {}), ("GET", "/../chat.cpp", {}))
    expect([a.status for a in (unknown, post, plain, traversal)], [404, 405, 426, 404], "the statuses")
    expect(post.getheader("Allow"), "GET, HEAD, OPTIONS", "Allow")
    expect(plain.getheader("Upgrade"), "websocket", "Upgrade")
    for response in (unknown, post, plain):
        expect(response.text[-2:], ".\n", "the end of the body")


@check("pages: pipelined requests get their responses, also after the client shuts down its sending side")
async def _(servers):
    client = await RawClient().open(servers.chat)
    get = f"GET /nothing HTTP/1.1\r\nHost: {servers.chat.host}\r\n\r\n".encode()
    await client.send(3 * get)
    client.writer.write_eof()
    expect((await client.reader.read()).count(b"HTTP/1.1 404 "), 3, "the responses")


# ---- chat ---------------------------------------------------------------------------------------------------------

STAYING_CLIENT = """
import asyncio, sys, websockets
async def main():
    async with websockets.connect(sys.argv[1]):
        print("connected", flush=True)
        await asyncio.Future()
asyncio.run(main())
"""


async def connect_and_be_killed(url):
    """Connects in a separate process and kills it."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", STAYING_CLIENT, url,
                                                   stdout=asyncio.subprocess.PIPE)
    try:
        expect(await process.stdout.readline(), b"connected\n", "the line of the client")
    finally:
        process.kill()
        await process.wait()


@check("chat: clients of two libraries receive all messages of the room in the same order")
async def _(servers):
    anna = await WebsocketsClient().connect(servers.chat.ws("/chat"))
    bert = await TornadoClient().connect(servers.chat.ws("/chat"))
    received = []
    for speaker, line in ((anna, "hello, Bert 😀"), (bert, "hello, Anna"), (anna, b"\x00\x01\x02"), (bert, "")):
        await speaker.send(line)
        received.append((await anna.receive(), await bert.receive()))
        expect(received[-1], (line, line), "what both receive")


@check("chat: a killed client and a reset connection do not disturb the others")
async def _(servers):
    anna = await WebsocketsClient().connect(servers.chat.ws("/chat"))
    bert = await TornadoClient().connect(servers.chat.ws("/chat"))
    await connect_and_be_killed(servers.chat.ws("/chat"))
    for number in range(10):
        gone = await RawClient().connect(servers.chat, "/chat")
        await anna.send(f"line {number}")  # stays unread in the dropped socket, which causes a reset
        expect(await bert.receive(), f"line {number}", "what Bert receives")
        gone.drop()
        expect(await anna.receive(), f"line {number}", "what Anna receives")


@check_each_library("chat: a message over the limit gets 1009, and the other members stay")
async def _(servers, library):
    other = await library().connect(servers.chat.ws("/chat"))
    # The server closes while most of the message is unsent. A reset must not overtake its Close frame.
    for size in (1024 * 1024 + 1, 2 * 1024 * 1024, *5 * (16 * 1024 * 1024,)):
        client = await library().connect(servers.chat.ws("/chat"))
        sending = asyncio.ensure_future(client.send(bytes_of(size)))
        sending.add_done_callback(asyncio.Task.exception)  # sending may fail
        expect((await client.closed())[0], 1009, f"the close code for {size:,} bytes")
    await other.send("still here")
    expect(await other.receive(), "still here", "the message")


# ---- rooms --------------------------------------------------------------------------------------------------------


async def event(client, **wanted):
    """Expects the next event to have exactly these fields. Some events also have a time and an id. A join may come at
    any time in the half second after another one."""
    got = json.loads(await client.receive())
    while got["type"] == "join" and wanted["type"] != "join":
        got = json.loads(await client.receive())
    if wanted["type"] in ("said", "join", "leave", "nick"):
        expect(type(got.pop("time", None)), int, "the time")
    if wanted["type"] == "said":
        expect(type(got.pop("id", None)), int, "the id")
    if wanted["type"] == "users":
        expect(got.pop("count"), len(wanted["users"]), "the count")
        got["users"] = [user["name"] for user in got["users"]]
    elif "name" in wanted:
        expect(len(got.pop("user")), 16, "the length of the user's id")
    expect(got, wanted, "the event")


async def join(library, servers, room, name, as_name, users):
    client = await library().connect(servers.rooms.ws(f"/chat{room}{name}"))
    hello, room_name = json.loads(await client.receive()), room[1:] or "lobby"
    expect([hello[key] for key in ("type", "version", "server", "room", "name")],
           ["hello", 3, "wschat", room_name, as_name], "the first event")
    await event(client, type="users", room=room_name, users=users)
    expect(json.loads(await client.receive())["type"], "history", "the third event")
    return client


@check("rooms: joining, messages, renaming, errors and leaving are JSON events")
async def _(servers):
    anna = await join(WebsocketsClient, servers, "/tea", "?name=Anna", "Anna", ["Anna"])
    bert = await join(TornadoClient, servers, "/tea", "?name=Anna", "Anna-2", ["Anna", "Anna-2"])
    await event(anna, type="join", room="tea", name="Anna-2")

    line = 'said "so" \\ </script> \u2028 😀'
    await anna.send(line)
    for client in (anna, bert):
        await event(client, type="said", room="tea", name="Anna", text=line)

    await bert.send("/nick Bert")
    for client in (anna, bert):
        await event(client, type="nick", room="tea", old="Anna-2", name="Bert")

    for line, code in (("/nick Anna", "name_taken"), ("/nick " + "x" * 41, "name_bad"), ("/dance", "unknown_command"),
                       ("\x01", "bad_text"), (b"\x00", "bad_line")):
        await bert.send(line)
        error = json.loads(await bert.receive())
        expect((error["type"], error["code"], error["text"][-1:] != ""), ("error", code, True), "the error")

    expect(await bert.close(1000, ""), 1000, "the close code")
    await event(anna, type="leave", room="tea", name="Bert")


@check("rooms: a room gets no messages of another room")
async def _(servers):
    anna = await join(WebsocketsClient, servers, "/one", "?name=Anna", "Anna", ["Anna"])
    bert = await join(TornadoClient, servers, "", "?name=Bert", "Bert", ["Bert"])
    carl = await join(TornadoClient, servers, "", "", "guest", ["Bert", "guest"])
    await event(bert, type="join", room="lobby", name="guest")
    for speaker, name in ((anna, "Anna"), (carl, "guest")):
        await speaker.send(f"I am {name}")
    await event(anna, type="said", room="one", name="Anna", text="I am Anna")
    await event(bert, type="said", room="lobby", name="guest", text="I am guest")
    await event(carl, type="said", room="lobby", name="guest", text="I am guest")


@check("rooms: a killed member leaves the list of users after the grace period")
async def _(servers):
    anna = await join(WebsocketsClient, servers, "/killed", "?name=Anna", "Anna", ["Anna"])
    await connect_and_be_killed(servers.rooms.ws("/chat/killed?name=Bert"))
    await event(anna, type="join", room="killed", name="Bert")
    await event(anna, type="leave", room="killed", name="Bert")


@check("rooms: the metrics count no connection after all have closed")
async def _(servers):
    while True:
        (page,) = await request_all(servers.rooms, ("GET", "/metrics", {}))
        expect((page.status, page.getheader("Content-Type")), (200, "text/plain; version=0.0.4"), "the response")
        expect_in("\nwschat_handler_exceptions_total 0\n", page.text, "the metrics")
        if "\nwschat_websockets_open 0\n" in page.text and "\nwschat_rooms 0\n" in page.text:
            return
        await asyncio.sleep(0.05)


# ---- protocol errors: the Close frame must arrive before the end of the stream ------------------------------------

# Bytes on the wire, in hexadecimal. A mask of 00 00 00 00 leaves the payload readable.
ERRORS = (
    # RFC 6455 5.1: "The server MUST close the connection upon receiving a frame that is not masked."
    (1002, "an unmasked frame", "81 05 48 65 6c 6c 6f"),
    (1002, "an unmasked empty frame", "81 00"),
    (1002, "an unmasked ping", "89 00"),
    # 5.2
    (1002, "RSV1 without an extension", "c1 80 00 00 00 00"),
    (1002, "RSV2", "a1 80 00 00 00 00"),
    (1002, "RSV3", "91 80 00 00 00 00"),
    (1002, "all reserved bits on a ping", "f9 80 00 00 00 00"),
    (1002, "RSV1 on a continuation", "01 80 00 00 00 00  c0 80 00 00 00 00"),
    *((1002, f"the reserved opcode {opcode:X}", f"8{opcode:x} 80 00 00 00 00") for opcode in (3, 4, 5, 6, 7)),
    *((1002, f"the reserved control opcode {opcode:X}", f"8{opcode:x} 80 00 00 00 00") for opcode in range(11, 16)),
    (1002, "a length of 125 in two bytes", "81 fe 00 7d 00 00 00 00"),
    (1002, "a length of 65,535 in eight bytes", "81 ff 00 00 00 00 00 00 ff ff 00 00 00 00"),
    (1002, "a length with its top bit set", "82 ff 80 00 00 00 00 00 00 00 00 00 00 00"),
    # 5.4
    (1002, "a continuation without a message", "80 80 00 00 00 00"),
    (1002, "a new message within a message", "01 81 00 00 00 00 61  81 81 00 00 00 00 62"),
    # 5.5: "All control frames MUST have a payload length of 125 bytes or less and MUST NOT be fragmented."
    (1002, "a ping of 126 bytes", "89 fe 00 7e 00 00 00 00" + " 61" * 126),
    (1002, "a fragmented ping", "09 80 00 00 00 00"),
    (1002, "a fragmented close", "08 82 00 00 00 00 03 e8"),
    (1002, "a close of 126 bytes", "88 fe 00 7e 00 00 00 00 03 e8" + " 61" * 124),
    # 5.5.1: "If there is a body, the first two bytes of the body MUST be a 2-byte unsigned integer"
    (1002, "a close with a body of one byte", "88 81 00 00 00 00 03"),
    (1007, "a close with a reason that is not UTF-8", "88 84 00 00 00 00 03 e8 c3 28"),
    # 8.1
    (1007, "a text that is not UTF-8", "81 82 00 00 00 00 c3 28"),
    (1007, "a text that ends within a character", "81 83 00 00 00 00 f0 9f 98"),
    (1007, "a surrogate in a text", "81 83 00 00 00 00 ed a0 80"),
    (1007, "an overlong slash in a text", "81 82 00 00 00 00 c0 af"),
    (1007, "a character over U+10FFFF", "81 84 00 00 00 00 f4 90 80 80"),
    (1007, "invalid UTF-8 in the first fragment, before the last one arrives", "01 82 00 00 00 00 c3 28"),
    (1007, "invalid UTF-8 in a frame of which most is missing", "81 fe 10 00 00 00 00 00 61 ff"),
    (1007, "a character that the fragments do not complete", "01 82 00 00 00 00 e2 82  80 81 00 00 00 00 61"),
    # 10.4
    (1009, "a length over the limit, before any payload", "82 ff 00 00 00 00 04 00 00 01 00 00 00 00"),
)
for CODE, NAME, BYTES in ERRORS:
    @check(f"protocol: {NAME} gets {CODE}")
    async def _(servers, code=CODE, data=wire(BYTES)):
        client = await RawClient().connect(servers.echo)
        await client.send(data)
        await client.expect_close(code)


@check("protocol: replies before an error arrive, and frames after it are ignored")
async def _(servers):
    client = await RawClient().connect(servers.echo)
    await client.send(frame(0x81, b"good") + wire("83 80 00 00 00 00") + frame(0x81, b"late") + frame(0x89, b"late"))
    first, *rest = await client.read_to_end()
    expect(first, (0x81, b"good"), "the first frame")
    expect([(first, payload[:2]) for first, payload in rest], [(0x88, wire("03 ea"))], "the frames after it")


@check("protocol: the Close frame after an error arrives while the client sends 8 MiB more")
async def _(servers):
    client = await RawClient().connect(servers.echo)
    client.writer.write(wire("81 05 48 65 6c 6c 6f") + bytes(8 * 1024 * 1024))
    await client.expect_close(1002)


@check("protocol: valid close codes of RFC 6455 7.4 are echoed in one frame")
async def _(servers):
    for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999):
        client = await RawClient().connect(servers.echo)
        await client.send(close_frame(code, b"why") + frame(0x81, b"too late"))
        await client.expect_close(code)


@check("protocol: invalid close codes of RFC 6455 7.4 get 1002")
async def _(servers):
    for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 1999, 2000, 2999, 5000, 65535):
        client = await RawClient().connect(servers.echo)
        await client.send(close_frame(code))
        await client.expect_close(1002)


@check("protocol: the reply to a Close frame without a body has no body")
async def _(servers):
    client = await RawClient().connect(servers.echo)
    await client.send(wire("88 80 00 00 00 00"))
    expect(await client.read_to_end(), [(0x88, b"")], "the frames")


@check("protocol: a stream in pieces of 1, 2, 3, 5, 7 and 13 bytes gives the same replies")
async def _(servers):
    talk = b"".join((
        frame(0x81, "κόσμε".encode()), frame(0x89, b"are you there"), frame(0x8A, b"unasked"), frame(0x82),
        frame(0x01, "😀".encode()[:2]), frame(0x89), frame(0x00), frame(0x89, b"p" * 125),
        frame(0x80, "😀".encode()[2:]), frame(0x82, bytes_of(126)), frame(0x02, b"\xff"), frame(0x80, b"\xfe"),
        close_frame(4321, b"bye")))
    responses = [
        (0x81, "κόσμε".encode()), (0x8A, b"are you there"), (0x82, b""), (0x8A, b""), (0x8A, b"p" * 125),
        (0x81, "😀".encode()), (0x82, bytes_of(126)), (0x82, b"\xff\xfe"), (0x88, wire("10 e1"))]
    for size in (1, 2, 3, 5, 7, 13, len(talk)):
        client = await RawClient().connect(servers.echo)
        await send_in_pieces(talk, size, client)
        got = await client.read_to_end()
        got[-1] = (got[-1][0], got[-1][1][:2])  # the server may echo the reason or not
        expect(got, responses, f"the replies to pieces of {size} bytes")


@check("protocol: 100,000 fragments of one byte are one message")
async def _(servers):
    client = await RawClient().connect(servers.echo)
    await client.send(frame(0x02) + 100_000 * wire("00 81 00 00 00 00 61") + frame(0x80))
    expect(await client.read_frame(), (0x82, 100_000 * b"a"), "the echo")


@check("protocol: 16 MiB of echoes before a Close frame arrive before the reply to it")
async def _(servers):
    await check_close_after_large_echoes(await RawClient().connect(servers.echo))


@check("protocol: the same if the client shuts down its sending side after its Close frame")
async def _(servers):
    client = await RawClient().connect(servers.echo)
    await check_close_after_large_echoes(client, client.writer.write_eof)


async def check_close_after_large_echoes(client, and_then=lambda: None):
    size = 8 * 1024 * 1024
    message = b"\x82\xff" + size.to_bytes(8, "big") + bytes(4 + size)  # the mask is 00 00 00 00
    client.writer.write(2 * message + close_frame(1000))
    and_then()
    frames = [(first, len(payload)) for first, payload in await client.read_to_end()]
    expect(frames, [(0x82, size), (0x82, size), (0x88, 2)], "the frames and their lengths")


# ---- keepalive and shutdown ---------------------------------------------------------------------------------------


@check("keepalive: the server pings a silent client, and the connection stays open")
async def _(servers):
    for client in servers.silent_clients:
        expect(await client.wait_for_ping(), b"", "the payload of the ping")
        await client.send("still here")
        expect(await client.receive(), "still here", "the echo")
        expect(await client.close(1000, ""), 1000, "the close code")


@check("the three programs still run and end with status 0 on SIGINT")
async def _(servers):
    for program in (servers.echo, servers.chat, servers.rooms):
        expect(program.process.returncode, None, "the status before the signal")
        expect(await program.stop(signal.SIGINT), 0, "the status")


# ---- the run ------------------------------------------------------------------------------------------------------


async def run(title, function, servers):
    """Runs one check. Returns true if it passed."""
    try:
        async with timeout("this check to end"):
            await function(servers)
        print(f"ok - {title}", flush=True)
        return True
    except Exception as error:
        print(f"not ok - {title}: {type(error).__name__}: {error}", flush=True)
        return False
    finally:
        for client in OPEN_CLIENTS:
            client.drop()
        OPEN_CLIENTS.clear()


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("echo", "chat", "rooms"):
        parser.add_argument(f"--{name}", required=True, metavar="BIN", help=f"the program examples/{name}.cpp")
    parser.add_argument("--zlib", action="store_true", help="the programs are built with compression")
    parser.add_argument("--only", default="", metavar="TEXT", help="run only the checks with this text in their titles")
    options = parser.parse_args()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    asyncio.get_running_loop().call_later(TOTAL_TIMEOUT, asyncio.current_task().cancel)
    try:
        for name in ("echo", "chat", "rooms"):
            setattr(Servers, name, await Program().start(getattr(options, name)))
        Servers.echo_path = options.echo
        Servers.zlib = options.zlib
        Servers.silent_clients = [await library().connect(Servers.echo.ws()) for library in LIBRARIES]
        OPEN_CLIENTS.clear()  # silent clients stay open
        results = [await run(title, function, Servers) for title, function in CHECKS if options.only in title]
    finally:
        for program in PROGRAMS:
            await program.stop(signal.SIGKILL)
    if not all(results):
        for program in (Servers.echo, Servers.chat, Servers.rooms):
            print(f"# end of the log: {program.log_text()[-2000:]}")
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) and results else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
