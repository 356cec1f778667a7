"""tornado_server.py PORT room|echo|deflate: the peer for Tornado, based on the chat of its documentation.

deflate: a room that compresses; the client chooses context takeover.
"""

import asyncio
import sys

import tornado.web
import tornado.websocket

room = set()


class Member(tornado.websocket.WebSocketHandler):
    def open(self):
        self.set_nodelay(True)
        room.add(self)

    def on_close(self):
        room.discard(self)


class Chat(Member):
    def on_message(self, message):
        binary = isinstance(message, bytes)
        data = message if binary else message.encode()  # once, not per member
        for member in room:
            member.write_message(data, binary=binary)


class Deflate(Chat):
    def get_compression_options(self):
        return {"compression_level": 6}


class Echo(Member):
    def on_message(self, message):
        self.write_message(message, binary=isinstance(message, bytes))


async def main():
    port, mode = int(sys.argv[1]), sys.argv[2]
    app = tornado.web.Application([("/.*", {"echo": Echo, "room": Chat, "deflate": Deflate}[mode])])
    app.listen(port, "127.0.0.1", backlog=4096)
    print(f"tornado: listening on 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
