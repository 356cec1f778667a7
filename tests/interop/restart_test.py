#!/usr/bin/python3
"""Restarts a chat ten times under load: no connection is refused, and no message is lost or changes its place.

    /usr/bin/python3 tests/interop/restart_test.py --rooms BIN

BIN is examples/rooms.cpp, built with WSCHAT_SQLITE. The test holds the listening socket, as systemd does, and each
process inherits it as fd:3. At a restart the new process starts at once. It waits until the old process has left the
file of the history, and meanwhile clients wait in the backlog of the socket. Prints what happened, and ends with status
1 if a check failed. Needs Debian's python3-websockets.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile

import websockets

sys.dont_write_bytecode = True
from expectations import TIMEOUT, expect, expect_in  # noqa: E402

RESTARTS = 10
CLIENTS = 6
LINES_PER_RESTART = 12  # that all clients together have in the history before the next restart


class Rooms:
    """A process of the chat. Its descriptor 3 is the listening socket."""

    def __init__(self, listener, database):
        command = f'exec "$0" "$@" 3<&{listener.fileno()}'
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", command, os.path.abspath(OPTIONS.rooms), "fd:3", "--db", database],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=[listener.fileno()], text=True)

    async def wait(self, function):
        return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(None, function), TIMEOUT)

    async def wait_until_ready(self):
        expect_in("rooms: open", await self.wait(self.process.stdout.readline), "the first line")

    async def wait_until_ended(self):
        expect(await self.wait(self.process.wait), 0, "the status of the old process")

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)


class Client:
    """Says numbered lines, and connects again with its position after each restart."""

    def __init__(self, number, port):
        self.number, self.port = number, port
        self.epoch, self.last = "", 0
        self.seen = []  # (id, text) in the order of arrival
        self.accepted = {}  # tag: id
        self.waiting = {}  # tag: line, without an answer
        self.lines = self.connections = 0
        self.speaking = True
        self.finished = False  # the next close is the last one

    def connect(self):
        position = f"&last={self.epoch}-{self.last}" if self.epoch else ""
        uri = f"ws://127.0.0.1:{self.port}/chat/tea?name=user{self.number}&key=secret-of-user-{self.number}{position}"
        return websockets.connect(uri, open_timeout=TIMEOUT, local_addr=(f"127.0.1.{self.number + 1}", 0))

    async def run(self):
        while not self.finished:
            async with self.connect() as connection:
                self.connections += 1
                speaker = asyncio.create_task(self.speak(connection))
                try:
                    while True:
                        self.receive(json.loads(await asyncio.wait_for(connection.recv(), TIMEOUT)))
                except websockets.ConnectionClosed as closed:
                    expect(closed.code, 1001, "the close code at a restart")
                finally:
                    speaker.cancel()

    async def speak(self, connection):
        try:
            for line in list(self.waiting.values()):  # the server knows the tag if it has the line
                await connection.send(line)
            while self.speaking:
                tag = f"tag-{self.number}-{self.lines}"
                self.waiting[tag] = f"/tag {tag} line {self.lines} of {self.number}"
                self.lines += 1
                await connection.send(self.waiting[tag])
                await asyncio.sleep(0.3)  # below the limits for floods
        except websockets.ConnectionClosed:
            pass

    def receive(self, event):
        kind = event["type"]
        if kind == "history":
            expect(event["gap"], False, "gap")
            for entry in event["entries"]:
                if entry["type"] == "said":
                    self.see(entry)
            self.epoch, self.last = event["epoch"], max(self.last, event["last"])
        elif kind == "said":
            self.see(event)
        elif kind == "ack":
            self.accept(event)
        elif kind == "error":
            raise AssertionError(f"an error of the chat: {event}")

    def see(self, entry):
        if "id" in entry:
            self.seen.append((entry["id"], entry["text"]))
            self.last = max(self.last, entry["id"])
        self.accept(entry)

    def accept(self, event):
        if event.get("tag") in self.waiting:
            del self.waiting[event["tag"]]
            self.accepted[event["tag"]] = event["id"]


async def visit(port, opened, ended):
    """Opens one new connection after the other. Each must get the page."""
    while not ended.is_set():
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.2.1", 0)), TIMEOUT)
        writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), TIMEOUT)
        writer.close()
        expect(answer[:15], b"HTTP/1.1 200 OK", f"the answer to visit {len(opened)}")
        opened.append(len(answer))
        await asyncio.sleep(0.02)


async def open_silent(port):
    """A client that never answers a Close frame. The old process waits for it until its deadline."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.4.1", 0))
    writer.write(b"GET /chat/quiet?name=silent HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
                 b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                 b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
    expect_in(b"101", await asyncio.wait_for(reader.readline(), TIMEOUT), "the answer to the silent client")
    return writer


async def restart_often(listener, database, clients):
    rooms = Rooms(listener, database)
    try:
        await rooms.wait_until_ready()
        silent = await open_silent(listener.getsockname()[1])
        for restart in range(RESTARTS + 1):
            wanted = sum(len(client.accepted) for client in clients) + LINES_PER_RESTART
            while sum(len(client.accepted) for client in clients) < wanted:
                await asyncio.sleep(0.02)
            if restart == RESTARTS:
                break
            old, rooms = rooms, Rooms(listener, database)
            old.terminate()
            await old.wait_until_ended()
            await rooms.wait_until_ready()
        silent.close()
        for client in clients:
            client.speaking = False
        while any(client.waiting for client in clients):
            await asyncio.sleep(0.02)
        return rooms
    except BaseException:
        rooms.process.kill()
        raise


async def read_all(port):
    """What a late client finds in the history, page by page."""
    entries = []
    uri = f"ws://127.0.0.1:{port}/chat/tea?name=late"
    async with websockets.connect(uri, local_addr=("127.0.3.1", 0)) as connection:
        while True:
            event = json.loads(await asyncio.wait_for(connection.recv(), TIMEOUT))
            if event["type"] != "history":
                continue
            page = [(entry["id"], entry["text"]) for entry in event["entries"] if entry["type"] == "said"]
            entries = page + entries
            if not event["more"]:
                return entries
            await connection.send(f"/before {entries[0][0]}")


def compare(clients, history):
    ids = [id_ for id_, _ in history]
    expect(ids, sorted(set(ids)), "the ids of the history")
    texts = sorted(text for _, text in history)
    spoken = sorted(f"line {line} of {client.number}" for client in clients for line in range(client.lines))
    expect(texts, spoken, "the lines in the history")
    for client in clients:
        expect(client.seen, history, f"what client {client.number} saw")
        own = [id_ for id_, text in history if text.endswith(f" of {client.number}")]
        expect(list(client.accepted.values()), own, f"the ids that client {client.number} was told")


async def main():
    with tempfile.TemporaryDirectory(prefix="wschat-restart-") as folder, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        clients = [Client(number, port) for number in range(CLIENTS)]
        opened, ended = [], asyncio.Event()
        loads = [asyncio.create_task(client.run()) for client in clients]
        visits = asyncio.create_task(visit(port, opened, ended))
        restarts = asyncio.create_task(restart_often(listener, os.path.join(folder, "chat.db"), clients))
        tasks = [*loads, visits]
        # The first failure ends the test.
        pending = {restarts, *tasks}
        while not restarts.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            failures = [task.exception() for task in done if task.exception()]
            if failures:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
                raise failures[0]
        rooms = restarts.result()
        try:
            ended.set()
            await visits
            history = await read_all(port)
            for client in clients:
                client.finished = True
            rooms.terminate()
            await rooms.wait_until_ended()
            await asyncio.gather(*loads)
        finally:
            if rooms.process.poll() is None:
                rooms.process.kill()
        compare(clients, history)
        expect(all(client.connections > RESTARTS for client in clients), True, "each client was there at each restart")
        print(f"{RESTARTS} restarts, {len(opened)} visits, {len(history)} lines: none refused, none lost")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rooms", required=True)
    OPTIONS = parser.parse_args()
    asyncio.run(asyncio.wait_for(main(), 2 * TIMEOUT))
