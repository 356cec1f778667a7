#!/usr/bin/python3
"""Tests the client with servers of other authors: Python's websockets, Tornado, npm's ws, libwebsockets, Boost.Beast and
Apache Tomcat; through the proxy tinyproxy; and the bot and the bridge.

    /usr/bin/python3 tests/interop/client_test.py --client BIN --bot BIN --bridge BIN --chat BIN --rooms BIN
        [--node NODE --modules DIR] [--libwebsockets BIN] [--beast BIN] [--java JAVA] [--tinyproxy BIN --wss BIN]
        [--zlib] [--only TEXT]

Prints one line per check, then "N passed, N failed", and ends with status 1 if a check failed. --zlib: the client is
built with compression. The servers without their option are left out. BIN of libwebsockets and Beast is
client_server_lws.c and client_server_beast.cpp; JAVA runs ClientServer.java with Debian's libtomcat9-java. Written for
Debian's python3-websockets and python3-tornado.
"""

import argparse
import asyncio
import contextlib
import http
import json
import os
import re
import socket
import sys
import tempfile

sys.dont_write_bytecode = True
from expectations import TIMEOUT, expect, expect_in  # noqa: E402

try:
    import tornado.httpserver
    import tornado.netutil
    import tornado.web
    import tornado.websocket
    import websockets
except ImportError as missing:
    sys.exit(f"{missing}: needs Debian's python3-websockets and python3-tornado for /usr/bin/python3")

TOTAL_TIMEOUT = 540  # seconds for all checks
HERE = os.path.dirname(os.path.abspath(__file__))
PROCESSES = []
OPTIONS = None


async def start(*command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL):
    process = await asyncio.create_subprocess_exec(*command, stdin=stdin, stdout=asyncio.subprocess.PIPE, stderr=stderr,
                                                   limit=1 << 26)
    PROCESSES.append(process)
    return process


async def stop(process):
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    return await asyncio.wait_for(process.wait(), TIMEOUT)


# ---- echo servers of other authors --------------------------------------------------------------------------------

# Each answers "close CODE REASON", "ping" and "extensions" as client_servers.mjs describes, and echoes all else.

@contextlib.asynccontextmanager
async def websockets_server(deflate):
    async def serve(socket):
        async for message in socket:
            if isinstance(message, str) and message.startswith("close "):
                _, code, reason = message.split(" ")
                await socket.close(int(code), reason)
            elif message == "ping":
                await (await socket.ping(b"payload"))
                await socket.send("pong payload")
            elif message == "extensions":
                await socket.send(f"extensions: {[e.name for e in socket.extensions]} protocol: {socket.subprotocol}")
            else:
                await socket.send(message)
    async with websockets.serve(serve, "127.0.0.1", 0, compression="deflate" if deflate else None, max_size=1 << 26,
                                subprotocols=["two"]) as server:
        yield server.sockets[0].getsockname()[1]


class TornadoEcho(tornado.websocket.WebSocketHandler):
    deflate = False

    def get_compression_options(self):
        return {} if self.deflate else None

    def select_subprotocol(self, offered):
        return "two" if "two" in offered else None

    async def on_message(self, message):
        if isinstance(message, str) and message.startswith("close "):
            _, code, reason = message.split(" ")
            self.close(int(code), reason)
        elif message == "ping":
            self.ping(b"payload")
        elif message == "extensions":
            extensions = ["permessage-deflate"] if self.deflate else []
            await self.write_message(f"extensions: {extensions} protocol: {self.selected_subprotocol}")
        else:
            await self.write_message(message, binary=isinstance(message, bytes))

    def on_pong(self, data):
        self.write_message("pong " + data.decode())


@contextlib.asynccontextmanager
async def tornado_server(deflate):
    handler = type("Handler", (TornadoEcho,), {"deflate": deflate})
    application = tornado.web.Application([(".*", handler)], websocket_max_message_size=1 << 26)
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    server = tornado.httpserver.HTTPServer(application)
    server.add_sockets(sockets)
    yield sockets[0].getsockname()[1]
    server.stop()
    await server.close_all_connections()


def program_server(*command):
    """A server that is a program: it prints its port."""
    @contextlib.asynccontextmanager
    async def run_server(deflate):
        process = await start(*command, "deflate" if deflate else "plain")
        yield int(await asyncio.wait_for(process.stdout.readline(), TIMEOUT))
        await stop(process)
    # libwebsockets 4.1.6 fails an assertion of its own when it should compress an empty message.
    run_server.compresses_no_empty_message = command[0] == OPTIONS.libwebsockets
    return run_server


def tomcat_server():
    jars = ":".join(f"/usr/share/java/tomcat9-{name}.jar" for name in (
        "annotations-api", "api", "catalina", "coyote", "el-api", "jaspic-api", "jni", "juli", "servlet-api", "util",
        "util-scan", "websocket", "websocket-api"))
    return program_server(OPTIONS.java, "-cp", jars, os.path.join(HERE, "ClientServer.java"))


# ---- the client with each of them ---------------------------------------------------------------------------------

async def converse(port, lines, *arguments):
    """Passes the lines to the client, and returns the lines that it prints, its errors and its status."""
    return await talk(f"ws://127.0.0.1:{port}/", lines, *arguments)


async def talk(url, lines, *arguments):
    """Waits for as many lines as it passes, or for the end, because the client ends a second after its input."""
    process = await start(OPTIONS.client, url, *arguments, stdin=asyncio.subprocess.PIPE,
                          stderr=asyncio.subprocess.PIPE)
    errors = asyncio.ensure_future(process.stderr.read())
    output = []
    with contextlib.suppress(ConnectionError):
        process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        await process.stdin.drain()
    while len(output) < len(lines) and (line := await asyncio.wait_for(process.stdout.readline(), TIMEOUT)):
        output.append(line.decode().removesuffix("\n"))
    process.stdin.close()
    output += (await asyncio.wait_for(process.stdout.read(), TIMEOUT)).decode().splitlines()
    return output, (await asyncio.wait_for(errors, TIMEOUT)).decode(), await asyncio.wait_for(process.wait(), TIMEOUT)


async def check_echo(server, deflate):
    lines = ["hello", "", "ünï 😀", "x" * 126, "y" * 65536, "abc " * 100000]
    if deflate and getattr(server, "compresses_no_empty_message", False):
        lines.remove("")
    async with server(deflate) as port:
        output, errors, status = await converse(port, lines)
        expect(output, lines, "what comes back")
        expect_in("closed: 1000", errors, "the client's log")
        expect(status, 0, "the status")


async def check_agreement(server, deflate):
    async with server(deflate) as port:
        output, _, _ = await converse(port, ["extensions"], "--subprotocol", "one", "--subprotocol", "two")
        expect("permessage-deflate" in output[0], deflate and OPTIONS.zlib, "whether it compresses")
        expect_in("protocol: two", output[0], "the agreement")


async def check_control(server, deflate):
    async with server(deflate) as port:
        # The client ends only when the server closes, so that the pong is in time.
        process = await start(OPTIONS.client, f"ws://127.0.0.1:{port}/", stdin=asyncio.subprocess.PIPE,
                              stderr=asyncio.subprocess.PIPE)
        process.stdin.write(b"ping\n")
        expect(await asyncio.wait_for(process.stdout.readline(), TIMEOUT), b"pong payload\n", "the answer to a ping")
        process.stdin.write(b"close 4001 enough\n")
        errors = (await asyncio.wait_for(process.stderr.read(), TIMEOUT)).decode()
        expect_in("closed: 4001 enough (peer)", errors, "the client's log")


async def check_refusal(_server, _deflate):
    async def refuse(path, headers):
        return http.HTTPStatus.FORBIDDEN, [], b"not you\n"
    async with websockets.serve(lambda socket: None, "127.0.0.1", 0, process_request=refuse) as server:
        _, errors, status = await converse(server.sockets[0].getsockname()[1], [])
        expect_in("The server answered 403 Forbidden instead of 101.", errors, "the client's log")
        expect_in("not you", errors, "the client's log")
        expect(status, 1, "the status")


# ---- through a proxy ----------------------------------------------------------------------------------------------

async def check_tunnel():
    """ws and wss through tinyproxy with a password, which allows one port only."""
    chat, chat_port = await start_server(OPTIONS.chat, "0")
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(os.path.abspath(OPTIONS.wss), "0", "--page", __file__,
                                                       stdout=asyncio.subprocess.PIPE, cwd=folder,
                                                       stderr=asyncio.subprocess.DEVNULL)
        PROCESSES.append(process)
        line = (await asyncio.wait_for(process.stdout.readline(), TIMEOUT)).decode()
        wss_port = int(re.search(r"https://127\.0\.0\.1:(\d+)/", line)[1])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        configuration = os.path.join(folder, "tinyproxy.conf")
        with open(configuration, "w") as file:
            file.write(f"Port {port}\nListen 127.0.0.1\nTimeout 60\nMaxClients 20\nBasicAuth anna tea\n"
                       f"ConnectPort {chat_port}\nConnectPort {wss_port}\n")
        proxy = await start(OPTIONS.tinyproxy, "-d", "-c", configuration)
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            await asyncio.sleep(0.05)

        good = ("--insecure", "--proxy", f"http://anna:tea@127.0.0.1:{port}")
        for url in (f"ws://127.0.0.1:{chat_port}/chat", f"wss://localhost:{wss_port}/chat"):
            expect((await talk(url, ["hello"], *good))[0], ["hello"], f"what comes back from {url}")
            _, errors, _ = await talk(url, ["hello"], "--proxy", f"http://anna:x@127.0.0.1:{port}")
            expect_in("proxy: The proxy answered 401", errors, "the log with a wrong password")
        _, errors, _ = await talk(f"ws://127.0.0.1:{port}/", ["hello"], *good)
        expect_in("proxy: The proxy answered 403", errors, "the log with a port that the proxy does not allow")
        await stop(proxy)
        await stop(process)
    await stop(chat)


# ---- the bot and the bridge ---------------------------------------------------------------------------------------

async def start_server(program, *arguments):
    process = await start(program, *arguments)
    line = (await asyncio.wait_for(process.stdout.readline(), TIMEOUT)).decode()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    if not found:
        raise AssertionError(f"{program} printed {line!r}")
    return process, int(found[1])


async def next_said(socket, text=None):
    """The next message of the chat that begins with the text."""
    while True:
        event = json.loads(await asyncio.wait_for(socket.recv(), TIMEOUT))
        if event["type"] == "said" and (text is None or event["text"].startswith(text)):
            return event


async def check_bot():
    """Questions while the server or the bot is away are answered once."""
    with tempfile.TemporaryDirectory() as folder:
        state = os.path.join(folder, "state")
        server, port = await start_server(OPTIONS.rooms, "0")
        url = f"ws://127.0.0.1:{port}/chat/tea"
        bot_command = (OPTIONS.bot, url + "?name=clock", "--key", "a-secret-of-the-bot", "--state", state)
        bot = await start(*bot_command, stderr=asyncio.subprocess.PIPE)
        expect(await asyncio.wait_for(bot.stderr.readline(), TIMEOUT), b"bot: connected\n", "the bot's log")
        async with websockets.connect(url + "?name=anna", ping_interval=None) as anna:
            await anna.send("!time")
            await next_said(anna, "It is ")
            for _ in range(3):
                await stop(bot)
                await anna.send("!time")
                await next_said(anna, "!time")
                bot = await start(*bot_command, stderr=asyncio.subprocess.PIPE)
                await next_said(anna, "It is ")
            # More questions than the chat takes answers at once.
            await stop(bot)
            async with websockets.connect(url + "?name=carl", ping_interval=None) as carl:
                for asker in (anna, carl):
                    for _ in range(12):
                        await asker.send("!time")
                for _ in range(24):
                    await next_said(anna, "!time")
            bot = await start(*bot_command, stderr=asyncio.subprocess.PIPE)
            for _ in range(24):
                await next_said(anna, "It is ")
            # A bot that has forgotten its state asks for all again; the chat knows the tags of its answers.
            await stop(bot)
            with open(state) as file:
                epoch = file.read().split()[0]
            with open(state, "w") as file:
                file.write(f"{epoch} 0\n")
            bot = await start(*bot_command, stderr=asyncio.subprocess.PIPE)
            await anna.send("!time")
            await next_said(anna, "It is ")
            await anna.send("the end")
            expect((await next_said(anna))["text"], "the end", "after the last answer")
        async with websockets.connect(url + f"?name=bert&last={epoch}-0", ping_interval=None) as bert:
            while True:
                event = json.loads(await asyncio.wait_for(bert.recv(), TIMEOUT))
                if event["type"] == "history":
                    break
        said = [entry["text"] for entry in event["entries"]]
        expect(sum(text == "!time" for text in said), 29, "the questions")
        expect(sum(text.startswith("It is ") for text in said), 29, "the answers")
        await stop(server)
        server, _ = await start_server(OPTIONS.rooms, str(port))
        async with websockets.connect(url + "?name=anna", ping_interval=None) as anna:
            await anna.send("!time")
            await next_said(anna, "It is ")
        await stop(server)
        expect(await stop(bot), 0, "the status of the bot")


async def check_bridge():
    """A message of either server reaches the clients of both, once; also after a restart."""
    far, far_port = await start_server(OPTIONS.chat, "0")
    bridge, near_port = await start_server(OPTIONS.bridge, f"ws://127.0.0.1:{far_port}/chat", "0")
    async with websockets.connect(f"ws://127.0.0.1:{near_port}/chat", ping_interval=None) as near:
        for attempt in range(2):
            async with websockets.connect(f"ws://127.0.0.1:{far_port}/chat", ping_interval=None) as other:
                # Until the bridge has connected, the other server does not get what is said here.
                for number in range(TIMEOUT * 10):
                    await near.send(f"hello {attempt} {number}")
                    expect(await asyncio.wait_for(near.recv(), TIMEOUT), f"hello {attempt} {number}", "at the speaker")
                    with contextlib.suppress(asyncio.TimeoutError):
                        expect(await asyncio.wait_for(other.recv(), 0.1), f"hello {attempt} {number}", "at the other")
                        break
                await other.send("answer")
                expect(await asyncio.wait_for(near.recv(), TIMEOUT), "answer", "here")
                expect(await asyncio.wait_for(other.recv(), TIMEOUT), "answer", "at the speaker")
                await near.send("end")
                expect(await asyncio.wait_for(near.recv(), TIMEOUT), "end", "here")
                expect(await asyncio.wait_for(other.recv(), TIMEOUT), "end", "there")
            await stop(far)
            far, _ = await start_server(OPTIONS.chat, str(far_port))
    expect(await stop(bridge), 0, "the status of the bridge")
    await stop(far)


# ---- the main program ---------------------------------------------------------------------------------------------

async def run(title, function, *arguments):
    if OPTIONS.only not in title:
        return None
    try:
        await asyncio.wait_for(function(*arguments), 2 * TIMEOUT)
        print(f"ok - {title}", flush=True)
        return True
    except Exception as error:  # pylint: disable=broad-except
        print(f"not ok - {title}: {type(error).__name__}: {error}", flush=True)
        return False


async def main():
    global OPTIONS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("client", "bot", "bridge", "chat", "rooms"):
        parser.add_argument(f"--{name}", required=True, metavar="BIN", help=f"the program examples/{name}.cpp")
    parser.add_argument("--node", help="the program node")
    parser.add_argument("--modules", default="", help="the folder with npm's ws")
    parser.add_argument("--libwebsockets", metavar="BIN", help="the program client_server_lws.c")
    parser.add_argument("--beast", metavar="BIN", help="the program client_server_beast.cpp")
    parser.add_argument("--java", help="the program java")
    parser.add_argument("--tinyproxy", metavar="BIN", help="the program tinyproxy; needs --wss")
    parser.add_argument("--wss", metavar="BIN", help="the program examples/wss.cpp")
    parser.add_argument("--only", default="", metavar="TEXT", help="run only checks with this text in their title")
    parser.add_argument("--zlib", action="store_true", help="the client is built with compression")
    OPTIONS = parser.parse_args()
    asyncio.get_running_loop().call_later(TOTAL_TIMEOUT, asyncio.current_task().cancel)
    servers = {"websockets": websockets_server, "tornado": tornado_server}
    if OPTIONS.node:
        servers["ws"] = program_server(OPTIONS.node, os.path.join(HERE, "client_servers.mjs"), OPTIONS.modules)
    if OPTIONS.libwebsockets:
        servers["libwebsockets"] = program_server(OPTIONS.libwebsockets)
    if OPTIONS.beast:
        servers["beast"] = program_server(OPTIONS.beast)
    if OPTIONS.java:
        servers["tomcat"] = tomcat_server()
    results = []
    try:
        for name, server in servers.items():
            for deflate in (False, True):
                kind = f"{name}{' with compression' if deflate else ''}"
                results.append(await run(f"{kind}: text of all sizes comes back", check_echo, server, deflate))
                results.append(await run(f"{kind}: extension and subprotocol", check_agreement, server, deflate))
                results.append(await run(f"{kind}: ping and close of the server", check_control, server, deflate))
        results.append(await run("websockets: a refusal", check_refusal, None, None))
        if OPTIONS.tinyproxy:
            results.append(await run("tinyproxy: ws and wss go through its tunnel", check_tunnel))
        results.append(await run("bot: each question is answered once", check_bot))
        results.append(await run("bridge: each message arrives once", check_bridge))
    finally:
        for process in PROCESSES:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
    results = [result for result in results if result is not None]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) and results else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
