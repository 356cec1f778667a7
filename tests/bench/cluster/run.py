#!/usr/bin/env python3
"""run.py [--out FOLDER] [--seconds S] [--rounds R]: what messages through Redis cost, beside Socket.IO.

Starts a redis-server and two nodes on free ports: the sender is at the first node, 100 members are at the second one,
which gets each message only through Redis. The same work for these systems:

  wschat, rooms               server.join_cluster(RedisCluster(...)): PUB/SUB
  Socket.IO, redis-adapter    the same with @socket.io/redis-adapter
  wschat, chat                RedisHistory: every message is kept, in one order
  Socket.IO, streams-adapter  @socket.io/redis-streams-adapter, with connectionStateRecovery
  io_uring                    both of wschat with WSCHAT_LIBURING: the sends of a turn are one system call
  floor                       the smallest relay of plain rooms, in place of the second node: see floor.cpp

Prints a table, and writes cluster.json. About eleven minutes. --systems chooses some of them. Needs g++, libhiredis-dev, liburing-dev, redis-server,
redis-tools, node and npm.
"""
import argparse
import json
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "cluster"))
from redis_server import RedisServer  # noqa: E402

PACKAGES = ["socket.io@4.8.1", "@socket.io/redis-adapter@8.3.0", "@socket.io/redis-streams-adapter@0.3.0",
            "redis@4.7.1"]
SYSTEMS = [("wschat, rooms", "room"), ("Socket.IO, redis-adapter", "redis"), ("wschat, chat", "chat"),
           ("Socket.IO, streams-adapter", "streams"), ("io_uring, rooms", "uring-room"), ("io_uring, chat", "uring-chat"),
           ("floor", "floor"), ("floor, io_uring", "uring-floor")]


def build(out, with_npm):
    out.mkdir(parents=True, exist_ok=True)
    header = HERE.parents[2] / "wschat.hpp"
    redis = ["-DWSCHAT_HIREDIS=1", "-lhiredis"]
    uring = ["-DWSCHAT_LIBURING=1", "-luring"]
    for name, libraries in (("node", redis), ("uring-node", [*redis, *uring]), ("load", []), ("floor", uring)):
        program, source = out / f"cluster_{name}", HERE / f"{name.split('-')[-1]}.cpp"
        newest = max(source.stat().st_mtime, header.stat().st_mtime)
        if not program.exists() or program.stat().st_mtime < newest:
            subprocess.run(["g++", "-std=c++17", "-O2", str(source), "-o", str(program), "-pthread", *libraries],
                           check=True)
    if with_npm and not (out / "npm" / "node_modules" / "socket.io").exists():
        environment = dict(os.environ)
        environment.setdefault("NODE_OPTIONS", "--use-openssl-ca")
        subprocess.run(["npm", "install", "--prefix", str(out / "npm"), "--no-save", "--no-package-lock", "--no-audit",
                        "--no-fund", *PACKAGES], check=True, env=environment, stdout=subprocess.DEVNULL)


class Redis(RedisServer):
    def __init__(self):
        super().__init__()
        self.launch()
        while not self.answers():
            time.sleep(0.05)

    def memory(self):
        """Without the buffers of connections, which come and go."""
        info = self.cli("info", "memory")
        number = lambda name: int(re.search(rf"^{name}:(\d+)", info, re.M).group(1))
        return number("used_memory_dataset")


class System:
    """Two nodes on an empty Redis."""

    def __init__(self, out, kind):
        self.out, self.kind = out, kind
        self.redis = Redis()
        self.nodes = [self.start_node(), self.start_node(relay=True)]

    def start_node(self, relay=False):
        if relay and self.kind.endswith("floor"):
            way = "uring" if self.kind.startswith("uring-") else "send"
            command = [str(self.out / "cluster_floor"), "0", self.redis.url, way]
        elif self.kind.endswith("floor"):
            command = [str(self.out / "cluster_node"), "0", self.redis.url, "room"]
        elif self.is_ours():
            name = "uring-node" if self.kind.startswith("uring-") else "node"
            command = [str(self.out / f"cluster_{name}"), "0", self.redis.url, self.kind.split("-")[-1]]
        else:
            command = ["node", str(HERE / "socketio.mjs"), "0", self.redis.url, self.kind, str(self.out / "npm")]
        node = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        node.port = re.search(r":(\d+)/?$", node.stdout.readline().strip()).group(1)
        return node

    def is_ours(self):
        return self.kind.endswith(("room", "chat", "floor"))

    def load(self, **options):
        kind = self.kind.split("-")[-1].replace("floor", "room") if self.is_ours() else "socketio"
        pids = ",".join(str(process.pid) for process in [*self.nodes, self.redis.process])
        words = [str(self.out / "cluster_load"), kind, self.nodes[0].port, self.nodes[1].port, "--pids", pids]
        for name, value in options.items():
            words += [f"--{name}", str(value)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=180)
        if done.returncode != 0:
            sys.exit(f"{self.kind}: {done.stderr}")
        return json.loads(done.stdout.replace("nan", "0"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            node.wait(30)
        self.redis.remove()


def measure(out, kind, seconds):
    """One round: figures by name, times in microseconds."""
    found = {}
    with System(out, kind) as system:
        # Little load: the latency, the sender's own node beside the other one.
        calm = system.load(members=10, rate=100, seconds=seconds)
        found["local p50"], found["remote p50"], found["remote p99"] = calm["local_p50"], calm["p50"], calm["p99"]
        found["local p99"] = calm["local_p99"]
        # The same work for all: 200 messages a second to 100 members.
        work = system.load(members=100, rate=200, seconds=seconds)
        found["relay per delivery, 200/s"] = work["cpu"][1] * 1e6 / max(1, work["deliveries"])
        found["missing"] = work["missing"]
        # The same members, as fast as it goes: the next message leaves when the relay has delivered one of 16.
        busy = system.load(members=100, rate=0, window=16, seconds=seconds)
        found["relay per delivery, busy"] = busy["cpu"][1] * 1e6 / max(1, busy["deliveries"])
        found["deliveries per second"] = busy["deliveries"] / busy["seconds"]
        # One member, as fast as it goes: what each process needs for a message.
        fast = system.load(members=1, rate=0, window=64, seconds=seconds)
        for name, cpu in zip(("sender", "relay", "redis"), fast["cpu"]):
            found[f"{name} per message"] = cpu * 1e6 / max(1, fast["deliveries"])
        found["messages per second"] = fast["deliveries"] / fast["seconds"]
    with System(out, kind) as system:
        system.load(members=1, rate=0, window=32, messages=1000)
        before = system.redis.memory()
        system.load(members=1, rate=0, window=32, messages=10000)
        found["bytes per message"] = (system.redis.memory() - before) / 10000
    return found


def cpu_of(process):
    """CPU time in microseconds, of all threads."""
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e3


def users_of_the_chat(out, users=2000, rooms=40):
    """What a user costs who connects: memory of Redis, and CPU time of Redis and of the node."""
    with System(out, "chat") as system:
        system.load(members=rooms, rooms=rooms, rate=10, seconds=0.1)  # the rooms exist
        time.sleep(4)  # and the users have left
        memory, redis, node = system.redis.memory(), cpu_of(system.redis.process), cpu_of(system.nodes[1])
        command = [str(out / "cluster_load"), "chat", system.nodes[0].port, system.nodes[1].port, "--members",
                   str(users), "--rooms", str(rooms), "--rate", "0.01", "--seconds", "100"]
        holder = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        present = 0
        for _ in range(100):
            present = sum(int(system.redis.cli("hlen", f"wschat:p:{room}") or 0) for room in range(rooms))
            if present > users:
                break
            time.sleep(0.2)
        found = {"present": present, "bytes per user": (system.redis.memory() - memory) / max(1, present),
                 "redis per join": (cpu_of(system.redis.process) - redis) / max(1, present),
                 "node per join": (cpu_of(system.nodes[1]) - node) / max(1, present)}
        holder.kill()
        holder.wait()
        return found


def copies_of_redis(messages=1000, payload=b"x" * 90):
    """CPU time of Redis for a PUBLISH to one subscriber, and for each further one."""
    redis = Redis()
    costs = {}
    for subscribers in (1, 51):
        sockets = [socket.create_connection(("127.0.0.1", redis.port)) for _ in range(subscribers)]
        for each in sockets:
            each.sendall(b"SUBSCRIBE bench\r\n")
            each.recv(4096)
        with socket.create_connection(("127.0.0.1", redis.port)) as sender:
            before = cpu_of(redis.process)
            for i in range(messages):
                sender.sendall(b"*3\r\n$7\r\nPUBLISH\r\n$5\r\nbench\r\n$90\r\n" + payload + b"\r\n")
                sender.recv(64)
                if i % 100 == 0:
                    for each in sockets:
                        each.recv(1 << 20)
            costs[subscribers] = (cpu_of(redis.process) - before) / messages
        for each in sockets:
            each.close()
        time.sleep(0.2)
    redis.remove()
    return {"publish": costs[1], "copy": (costs[51] - costs[1]) / 50}


ROWS = [
    # name, unit, digits
    ("local p50", "µs", 0), ("local p99", "µs", 0), ("remote p50", "µs", 0), ("remote p99", "µs", 0),
    ("relay per delivery, 200/s", "µs", 2), ("relay per delivery, busy", "µs", 2), ("deliveries per second", "", 0),
    ("relay per message", "µs", 1), ("sender per message", "µs", 1),
    ("redis per message", "µs", 1), ("messages per second", "", 0), ("bytes per message", "B", 0), ("missing", "", 0),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/bench"))
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", default=",".join(kind for _, kind in SYSTEMS), help="some of these, in this order")
    options = parser.parse_args()
    options.out = options.out.resolve()
    kinds = options.systems.split(",")
    systems = [each for kind in kinds for each in SYSTEMS if each[1] == kind]
    build(options.out, "redis" in kinds or "streams" in kinds)
    rounds = {name: [] for name, _ in systems}
    for _ in range(options.rounds):
        for name, kind in systems:
            rounds[name].append(measure(options.out, kind, options.seconds))
    table = {name: {row: statistics.median(each[row] for each in results) for row, _, _ in ROWS}
             for name, results in rounds.items()}
    if "chat" in kinds:
        table["users"] = users_of_the_chat(options.out)
        table["copies"] = copies_of_redis()
    (options.out / "cluster.json").write_text(json.dumps({"median": table, "rounds": rounds}, indent=1))
    names = [name for name, _ in systems]
    print("| | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for row, unit, digits in ROWS:
        cells = [f"{table[name][row]:,.{digits}f} {unit}".strip() for name in names]
        print(f"| {row} | " + " | ".join(cells) + " |")
    if "chat" not in kinds:
        return
    users, copies = table["users"], table["copies"]
    print(f"\nA user who joins the chat: {users['bytes per user']:,.0f} B in Redis, {users['redis per join']:.0f} µs of "
          f"Redis, {users['node per join']:.0f} µs of the node.")
    print(f"PUBLISH: {copies['publish']:.1f} µs of Redis with one subscriber, {copies['copy']:.2f} µs for each further one.")


main()
