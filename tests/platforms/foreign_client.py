#!/usr/bin/python3
"""Chats with a program that runs under Wine, ends it with Ctrl-C, and looks how it closes its clients.

    foreign_client.py PROGRAM...    PROGRAM prints "port N" and serves the chat at /chat/ROOM

The clients are those of Python's websockets. The last line is "passed: SENTENCE" or "FAILED: CAUSE".
"""
import asyncio
import json
import signal
import sys

import websockets

WAIT = 120  # seconds; Wine on a busy machine starts slowly


async def event(client, kind):
    while True:
        got = json.loads(await asyncio.wait_for(client.recv(), WAIT))
        if got["type"] == kind:
            return got


async def chat(program):
    line = await asyncio.wait_for(program.stdout.readline(), WAIT)
    while line and not line.startswith(b"port "):
        line = await asyncio.wait_for(program.stdout.readline(), WAIT)
    assert line, "the program prints no port"
    url = f"ws://127.0.0.1:{int(line.split()[1])}/chat/tea?name="
    users = [await websockets.connect(url + f"user{i}", compression=None, open_timeout=WAIT) for i in range(6)]
    for user in users:
        await event(user, "history")
    text = "Is there tea? \u8336"
    await users[0].send(text)
    for user in users:
        said = await event(user, "said")
        assert (said["text"], said["name"]) == (text, "user0"), said
    await users[1].close()
    assert (await event(users[2], "leave"))["name"] == "user1"
    program.send_signal(signal.SIGINT)  # Wine makes a console event of it
    for user in users[:1] + users[2:]:
        await asyncio.wait_for(user.wait_closed(), WAIT)
        assert user.close_code == 1001, f"a client is closed with {user.close_code}"
    rest = await asyncio.wait_for(program.stdout.read(), WAIT)
    assert b"run() returned" in rest, f"run() does not return: {rest}"
    assert await asyncio.wait_for(program.wait(), WAIT) == 0, "the exit status is not 0"


def stop_ignoring():
    """A shell ignores SIGINT for a program that it starts in the background, and a child inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


async def main():
    program = await asyncio.create_subprocess_exec(*sys.argv[1:], stdout=asyncio.subprocess.PIPE,
                                                   preexec_fn=stop_ignoring)
    try:
        await chat(program)
        print("passed: six clients of another author chat over two loops, and Ctrl-C closes them with 1001")
    except Exception as error:
        print(f"FAILED: a client of another author: {type(error).__name__} {error}")
    finally:
        if program.returncode is None:
            program.kill()


asyncio.run(main())
