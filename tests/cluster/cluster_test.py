#!/usr/bin/python3
"""Checks a cluster while parts of it fail.

    /usr/bin/python3 tests/cluster/cluster_test.py --rooms BIN [--minutes M] [--seed N]

BIN is examples/rooms.cpp, built with WSCHAT_HIREDIS. Three nodes with two threads each and a real redis-server run on
free ports; each node reaches Redis through a proxy of this program. 60 clients in 6 rooms publish numbered messages,
lose their connections, and go to other nodes with their last position. Meanwhile Redis is killed, stopped, emptied,
filled up, slowed down, cut off from a node and failed over to a replica, and nodes are killed and stopped. Each fault
comes once before any of them comes again. A client repeats a message with the same tag until it is acknowledged.

At the end, a node is killed for good, and each tenth client leaves at the same moment. Then:

  - every client has each acknowledged message of its room exactly once, in one order for all clients;
  - where messages are missing, the client has been told "gap", and only there;
  - all nodes show the same users, which are those who are there, within ten seconds; and those who stay have seen each
    of those who left leave once; and nobody hears of a leave of a user who is there, unless something was in trouble.

Prints the faults and what was found, and ends with status 1 if a check fails. Needs Debian's python3-websockets.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import websockets

from redis_server import RedisServer, free_port

NODES, ROOMS, CLIENTS = 3, 6, 60
DIE_TOGETHER = ["setpriv", "--pdeathsig", "KILL"]  # when this program ends
PATIENCE = 60  # seconds for the end of a step on a busy machine


class Redis(RedisServer):
    async def start(self, *more):
        self.launch("--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync-delay", "0", *more,
                    before=DIE_TOGETHER)
        while not self.answers():
            await asyncio.sleep(0.05)

    async def wait_for_info(self, *lines):
        until = time.monotonic() + PATIENCE
        while not all(each in self.cli("info") for each in lines):
            if time.monotonic() > until:
                raise RuntimeError(f"Redis does not come to {lines}")
            await asyncio.sleep(0.1)

    async def fail_over(self, planned):
        """A replica takes the place of this Redis, with all that was acknowledged."""
        replica = Redis()
        await replica.start("--replicaof", "127.0.0.1", str(self.port))
        # Until its file is written, the replica would lose everything in a restart.
        await replica.wait_for_info("master_link_status:up", "aof_enabled:1", "aof_rewrite_in_progress:0",
                                    "aof_rewrite_scheduled:0")
        if planned:
            self.cli("failover")
            await replica.wait_for_info("role:master")
        else:
            # Redis answers before its replica has the entry. So all writing waits until the replica has caught up.
            self.cli("client", "pause", "60000", "write")
            until = time.monotonic() + PATIENCE
            while replica.offset("slave_repl_offset") < self.offset("master_repl_offset"):
                if time.monotonic() > until:
                    raise RuntimeError("the replica does not catch up")
                await asyncio.sleep(0.05)
            self.kill()
            replica.cli("replicaof", "no", "one")
        self.remove()
        self.folder, self.port, self.process = replica.folder, replica.port, replica.process

    def offset(self, field):
        """How many bytes of the replication stream it has."""
        return int(re.search(rf"^{field}:(\d+)", self.cli("info", "replication"), re.M).group(1))

    def erase(self):
        shutil.rmtree(self.folder)
        os.mkdir(self.folder)

    def epochs(self):
        return self.cli("hkeys", "wschat:openings").split()


class Proxy:
    """Between a node and Redis: adds a delay, or passes nothing on."""

    def __init__(self, redis):
        self.redis, self.port = redis, free_port()
        self.delay, self.cut = 0, False
        self.writers = set()

    async def start(self):
        await asyncio.start_server(self.serve, "127.0.0.1", self.port)

    async def serve(self, reader, writer):
        self.writers.add(writer)
        try:
            if self.cut:
                return
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self.redis.port)
            self.writers.add(other_writer)
            await asyncio.gather(self.copy(reader, other_writer), self.copy(other_reader, writer))
        except OSError:
            pass
        finally:
            writer.close()
            self.writers.discard(writer)

    async def copy(self, reader, writer):
        queue = asyncio.Queue()

        async def send():
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0, due - time.monotonic()))
                if not data:
                    break
                writer.write(data)
                await writer.drain()

        sender = asyncio.ensure_future(send())
        try:
            while data := await reader.read(65536):
                while self.cut:
                    await asyncio.sleep(0.1)
                queue.put_nowait((time.monotonic() + self.delay, data))
        except OSError:
            pass
        queue.put_nowait((0, b""))
        try:
            await sender
        except OSError:
            pass
        writer.close()
        self.writers.discard(writer)

    def reset(self):
        for writer in list(self.writers):
            writer.transport.abort()


class Node:
    def __init__(self, number, redis):
        self.number, self.proxy, self.port = number, Proxy(redis), free_port()
        self.process = None
        self.troubles = []  # [start, end] of each time when it was stopped, or cut off from Redis

    async def start(self):
        self.log = open(f"{OPTIONS.logs}/node{self.number}.log", "a", encoding="utf-8")
        self.process = subprocess.Popen(
            [*DIE_TOGETHER, OPTIONS.rooms, str(self.port), "--threads", "2",
             "--redis", f"redis://127.0.0.1:{self.proxy.port}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = await asyncio.get_running_loop().run_in_executor(None, self.process.stdout.readline)
        return "rooms: open" in line

    async def start_again(self):
        """A node does not start while Redis is away, so a supervisor starts it until it runs."""
        while not await self.start():
            self.process.wait()
            await asyncio.sleep(0.2)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def names_in(event):
    """The names of a join or a leave: of one user, or of several that come together."""
    return {each["name"] for each in event.get("users", [event])}


class Client:
    def __init__(self, number, nodes, seed):
        self.number, self.nodes, self.room = number, nodes, f"room{number % ROOMS}"
        self.random = random.Random(f"{seed}-{number}")
        self.name = f"User{number}"
        self.key = base64.urlsafe_b64encode(f"secret of user {number}".encode()).decode().rstrip("=")
        self.epoch, self.last = "", 0
        # Each segment begins with a history that resumes nothing: [epoch, id, why], then (epoch, id, text) entries.
        self.segments = []
        self.acked = {}  # text -> (id, epoch)
        self.counter, self.sending = 0, None
        self.connected, self.socket = asyncio.Event(), None
        self.errors, self.connections, self.port = [], 0, 0
        self.users, self.left = None, []  # the names, when the first list has come; who has left
        self.quit = False
        self.stays = []  # [start, end, node] of each connection, from its history on
        self.leaves = []  # (time, name, node) of each leave that it has seen

    # ---- what arrives ----

    def on_history(self, event):
        resumed = self.last_position != "" or self.joined
        if event["gap"] or not resumed:
            self.segments.append([(event.get("epoch", ""), event["last"], "gap" if event["gap"] else "new",
                                   self.last_position)])
            shown = event["entries"]
            if shown:
                first = shown[0]["id"] - 1
                self.segments[-1][0] = (event.get("epoch", ""), first, *self.segments[-1][0][2:])
        if not event.get("epoch"):
            self.unread = True  # the history could not be read: the position stays
            return
        self.epoch = event["epoch"]
        for entry in event["entries"]:
            self.on_entry(entry)
        self.last = event["last"]
        if not self.joined:
            self.stays.append([time.monotonic(), None, self.node])
        self.joined = True
        self.connected.set()

    def on_entry(self, entry):
        if entry["type"] != "said" or not entry.get("id"):
            return
        self.segments[-1].append((self.epoch, entry["id"], entry["text"]))
        self.last = entry["id"]
        self.acknowledge(entry.get("tag"), entry["id"])

    def acknowledge(self, tag, id_):
        if self.sending and tag == self.sending[0]:
            self.acked[self.sending[1]] = (id_, self.epoch)
            self.sending = None

    def on_event(self, event):
        kind = event["type"]
        if kind == "history" and event.get("room") == self.room:
            self.on_history(event)
        elif kind == "said" and event.get("room") == self.room:
            self.on_entry(event)
        elif kind == "ack":
            self.acknowledge(event.get("tag"), event.get("id"))
        elif kind == "users":
            self.users = {each["name"] for each in event["users"]}
        elif kind == "join" and self.users is not None:
            self.users |= names_in(event)
        elif kind == "leave" and self.users is not None:
            self.users -= names_in(event)
            self.left += sorted(names_in(event))
            self.leaves += [(time.monotonic(), name, self.node) for name in names_in(event)]
        elif kind == "nick" or kind == "hello" and event["name"] != self.name:
            self.errors.append(f"a name has changed: {event}")
        elif kind == "error" and event["code"] not in ("not_kept", "flood"):
            self.errors.append(event)

    # ---- life ----

    async def run(self, until):
        while not until.is_set() and not self.quit:
            node = self.random.choice(self.nodes)
            self.users, self.left, self.port, self.node = None, [], node.port, node
            self.last_position = f"{self.epoch}-{self.last}" if self.epoch else ""
            self.joined = self.unread = False
            address = f"ws://127.0.0.1:{node.port}/chat/{self.room}?name={self.name}"
            if self.last_position:
                address += f"&last={self.last_position}"
            try:
                await self.stay(address, until)
            except (OSError, asyncio.TimeoutError, websockets.WebSocketException):
                pass
            if self.joined:
                self.stays[-1][1] = time.monotonic()
            self.connected.clear()
            self.socket = None
            await asyncio.sleep(self.random.random())

    async def stay(self, address, until):
        async with websockets.connect(address, subprotocols=["wschat", f"wschat.key.{self.key}"], open_timeout=10,
                                      ping_interval=2, ping_timeout=6, close_timeout=2) as connection:
            self.socket, self.connections = connection, self.connections + 1
            leave_at = time.monotonic() + self.random.choice([0.5, 5, 20, 40])
            while not until.is_set() and not self.quit:
                now = time.monotonic()
                if (now > leave_at and not OPTIONS.calm) or self.unread:
                    return
                try:
                    self.on_event(json.loads(await asyncio.wait_for(connection.recv(), 0.5)))
                except asyncio.TimeoutError:
                    pass

    async def talk(self, until):
        while not until.is_set():
            await asyncio.sleep(self.random.uniform(0.5, 4))
            self.counter += 1
            text = f"{self.name} {self.counter}"
            self.sending = (f"t{self.counter}", text)
            while self.sending:
                await self.send(f"/tag {self.sending[0]} {text}")
                for _ in range(30):
                    if not self.sending:
                        break
                    await asyncio.sleep(0.1)

    async def send(self, line):
        try:
            await asyncio.wait_for(self.connected.wait(), 5)
            if self.socket:
                await self.socket.send(line)
        except (asyncio.TimeoutError, OSError, websockets.WebSocketException):
            pass


# ---- the nemesis -----------------------------------------------------------------------------------------------------


class Nemesis:
    def __init__(self, redis, nodes, seed):
        self.redis, self.nodes, self.random = redis, nodes, random.Random(seed)
        self.generations = {}  # epoch -> how often Redis had been emptied before
        self.emptied = 0
        self.faults, self.was_long = {}, {}
        self.troubles = []  # [start, end] of each fault of Redis

    def long(self, seconds):
        """Long for the first time, and then something up to that."""
        seconds = self.random.choice([1, 4, seconds]) if self.was_long.get(seconds) else seconds
        self.was_long[seconds] = True
        return seconds

    def note_epochs(self):
        for epoch in self.redis.epochs():
            self.generations.setdefault(epoch, self.emptied)

    async def redis_restart(self):
        self.note_epochs()
        self.redis.kill()
        await asyncio.sleep(self.random.uniform(0, 8))
        await self.redis.start()

    async def redis_empty(self):
        # The epochs are those of a Redis that lives; afterwards there are new ones.
        self.note_epochs()
        self.redis.kill()
        self.redis.erase()
        self.emptied += 1
        await self.redis.start()

    async def redis_stop(self):
        self.redis.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.long(30))
        self.redis.process.send_signal(signal.SIGCONT)

    async def redis_full(self):
        self.redis.cli("config", "set", "maxmemory", "1")
        await asyncio.sleep(self.random.choice([1, 8]))
        self.redis.cli("config", "set", "maxmemory", "0")

    async def redis_fail_over(self):
        self.note_epochs()
        await self.redis.fail_over(planned=self.random.random() < 0.5)
        for node in self.nodes:
            node.proxy.reset()

    async def redis_drop(self):
        for kind in ("pubsub", "normal"):
            self.redis.cli("client", "kill", "type", kind)
            await asyncio.sleep(self.random.random())

    async def node_kill(self):
        node = self.random.choice(self.nodes)
        node.kill()
        await asyncio.sleep(self.random.uniform(0, 3))
        await node.start_again()

    async def node_stop(self):
        node = self.random.choice(self.nodes)
        node.troubles.append([time.monotonic(), None])
        node.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.random.choice([1, 4, 12]))
        node.process.send_signal(signal.SIGCONT)
        node.troubles[-1][1] = time.monotonic()

    async def partition(self):
        node = self.random.choice(self.nodes)
        proxy = node.proxy
        node.troubles.append([time.monotonic(), None])
        proxy.cut = True
        await asyncio.sleep(self.random.choice([4, 12]))
        proxy.cut = False
        node.troubles[-1][1] = time.monotonic()
        if self.random.random() < 0.5:
            proxy.reset()

    async def slow(self):
        proxy = self.random.choice(self.nodes).proxy
        proxy.delay = 0.5
        await asyncio.sleep(5)
        proxy.delay = 0

    async def run(self, seconds):
        faults = [self.redis_restart, self.redis_stop, self.redis_drop, self.redis_full, self.redis_fail_over,
                  self.redis_empty, self.node_kill, self.node_stop, self.partition, self.slow]
        left, end = [], time.monotonic() + seconds
        while time.monotonic() < end or len(self.faults) < len(faults):
            await asyncio.sleep(self.random.uniform(1, 5))
            left = left or self.random.sample(faults, len(faults))
            fault = left.pop()
            self.faults[fault.__name__] = self.faults.get(fault.__name__, 0) + 1
            print(f"{time.monotonic() - START:6.1f} s  {fault.__name__}", flush=True)
            start = time.monotonic()
            await fault()
            if fault.__name__.startswith("redis"):
                self.troubles.append([start, time.monotonic()])
            self.note_epochs()


# ---- the checks ------------------------------------------------------------------------------------------------------


def check_gap(client, number, nemesis):
    """A gap is right if Redis was emptied after the position, or if it could not be read. Then the position stays."""
    epoch, start, _, position = client.segments[number][0]
    before = client.segments[number - 1] if number else []
    old = before[-1][0] if len(before) > 1 else before[0][0] if before else position.split("-")[0]
    if nemesis.generations.get(old) != nemesis.generations.get(epoch) or f"{epoch}-{start}" == position:
        return []
    return [f"{client.name}: a gap after {position}, but nothing was lost: {client.segments[number][0]}"]


def check(clients, nemesis):
    problems, generation = [], nemesis.generations
    order = {}  # (room, generation, id) -> text, as any client has seen it
    acked = {}  # (room, generation) -> {id: text}
    for client in clients:
        for text, (id_, epoch) in client.acked.items():
            acked.setdefault((client.room, generation.get(epoch)), {})[id_] = text
        problems += [f"{client.name}: {error}" for error in client.errors]
    last_of = {}
    for client in clients:
        for segment in client.segments:
            for epoch, id_, _ in segment[1:]:
                key = (client.room, generation.get(epoch))
                last_of[key] = max(last_of.get(key, 0), id_)
    gaps = 0
    for client in clients:
        for number, segment in enumerate(client.segments):
            epoch, start, why, position = segment[0]
            gen = generation.get(epoch)
            if gen is None:
                problems.append(f"{client.name}: the epoch {epoch!r} is unknown")
                continue
            if why == "gap":
                gaps += 1
                problems += check_gap(client, number, nemesis)
            if f"{epoch}-{start}" == position and len(segment) > 1:
                start = segment[1][1] - 1  # the history could not be read: the client goes on with what comes next
            seen, previous = {}, start
            for entry_epoch, id_, text in segment[1:]:
                if generation.get(entry_epoch) != gen:
                    problems.append(f"{client.name}: no gap between generations: {segment[0]} {text}")
                    break
                if id_ <= previous:
                    problems.append(f"{client.name}: {text} with id {id_} came after {previous}")
                previous = max(previous, id_)
                seen[id_] = text
                known = order.setdefault((client.room, gen, id_), text)
                if known != text:
                    problems.append(f"{client.room}: id {id_} is {known!r} and {text!r}")
            texts = [text for _, _, text in segment[1:]]
            problems += [f"{client.name}: {text} came twice" for text in set(texts) if texts.count(text) > 1]
            # The last segment of the last generation has everything up to the end.
            is_last = number == len(client.segments) - 1 and gen == nemesis.emptied and not client.quit
            end = last_of.get((client.room, gen), 0) if is_last else previous
            for id_, text in acked.get((client.room, gen), {}).items():
                if start < id_ <= end and id_ not in seen:
                    problems.append(f"{client.name}: acknowledged {text!r} with id {id_} is missing after {segment[0]}")
    messages = sum(len(each.acked) for each in clients)
    print(f"{messages} messages acknowledged, {len(order)} seen, {gaps} gaps, "
          f"{sum(each.connections for each in clients)} connections, faults: {nemesis.faults}")
    if not messages:
        problems.append("no message was acknowledged")
    return problems


def check_leaves(clients, nemesis):
    """Nobody hears that a user has left who was there for seconds before and after, if nothing was in trouble."""
    by_name = {each.name: each for each in clients}
    problems = []
    for client in clients:
        for when, name, node in client.leaves:
            if name not in by_name:
                problems.append(f"{client.name} heard that {name} left, whose name is none of ours")
                continue
            for start, end, at in by_name[name].stays:
                if not start + 4 < when < (end or time.monotonic()) - 4:
                    continue
                troubles = at.troubles + node.troubles + nemesis.troubles
                if not any(begin < when < (stop or when) + 30 for begin, stop in troubles):
                    problems.append(f"{client.name} heard at {when - START:.1f} s that {name} left, who was at "
                                    f"{at.port} from {start - START:.1f} s on")
    return problems


async def check_presence(all_clients):
    """The clients with `quit` leave now, and all others stay."""
    clients = [each for each in all_clients if not each.quit]
    expected, gone = {}, {}
    for client in all_clients:
        (gone if client.quit else expected).setdefault(client.room, set()).add(client.name)
        client.left = []
    staying = {each: each.connections for each in clients}
    start = time.monotonic()
    while True:
        wrong = [each for each in clients if each.users != expected[each.room]]
        waited = time.monotonic() - start
        if not wrong or waited > OPTIONS.presence:
            print(f"{len(clients) - len(wrong)} clients know who is there, {waited:.1f} s after a node died")
            problems = [f"{each.name} at {each.port} sees {sorted(each.users or [])} instead of "
                        f"{sorted(expected[each.room])}" for each in wrong]
            for each, connections in staying.items():
                times = [each.left.count(name) for name in gone.get(each.room, [])]
                if each.connections == connections and not wrong and times != [1] * len(times):
                    problems.append(f"{each.name} has seen leave {each.left}, but these have left: {gone[each.room]}")
            return problems
        await asyncio.sleep(0.1)


async def main():
    redis = Redis()
    await redis.start()
    nodes = [Node(number, redis) for number in range(NODES)]
    for node in nodes:
        await node.proxy.start()
        await node.start_again()
    clients = [Client(number, nodes, OPTIONS.seed) for number in range(CLIENTS)]
    nemesis = Nemesis(redis, nodes, OPTIONS.seed)
    stop_talking, stop = asyncio.Event(), asyncio.Event()
    lives = [asyncio.ensure_future(client.run(stop)) for client in clients]
    talks = [asyncio.ensure_future(client.talk(stop_talking)) for client in clients]
    try:
        await nemesis.run(OPTIONS.minutes * 60)
        print(f"{time.monotonic() - START:6.1f} s  the faults end", flush=True)
        stop_talking.set()
        _, late = await asyncio.wait(talks, timeout=PATIENCE)
        unanswered = [f"{each.name}: {each.sending} has no answer" for each in clients if late and each.sending]
        OPTIONS.calm = True
        for client in clients:
            await asyncio.wait_for(client.connected.wait(), PATIENCE)
        print(f"{time.monotonic() - START:6.1f} s  a node dies for good, and some clients leave", flush=True)
        for client in clients[::10]:
            client.quit = True
        nodes.pop().kill()
        presence = await check_presence(clients)
        await asyncio.sleep(3)
        nemesis.note_epochs()
        stop.set()
        await asyncio.wait_for(asyncio.gather(*lives), PATIENCE)
        problems = check(clients, nemesis) + unanswered + presence + check_leaves(clients, nemesis)
    finally:
        for node in nodes:
            node.kill()
        redis.remove()
    for problem in problems[:OPTIONS.show]:
        print("WRONG", problem)
    print(f"seed {OPTIONS.seed}: {len(problems)} problems")
    return 1 if problems else 0


parser = argparse.ArgumentParser()
parser.add_argument("--rooms", required=True)
parser.add_argument("--minutes", type=float, default=2)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--presence", type=float, default=10, help="seconds until all nodes show the same users")
parser.add_argument("--show", type=int, default=50, help="problems")
parser.add_argument("--logs", default=None, help="a folder for the logs of the nodes")
OPTIONS = parser.parse_args()
OPTIONS.calm = False
OPTIONS.logs = OPTIONS.logs or tempfile.mkdtemp(prefix="wschat-cluster-logs-")
OPTIONS.rooms = os.path.abspath(OPTIONS.rooms)
if not os.access(OPTIONS.rooms, os.X_OK):
    parser.error(f"--rooms {OPTIONS.rooms}: there is no such program")
START = time.monotonic()
sys.exit(asyncio.run(main()))
