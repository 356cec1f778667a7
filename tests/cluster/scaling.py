#!/usr/bin/env python3
"""scaling.py [--check README] [--set NAME=VALUE]...: what a cluster of up to 1,000 nodes needs, computed and simulated.

Prints the tables of examples/README.md, section "Scaling". With --check it compares them with that file, and ends with
status 1 if a line is missing there. --list prints the figures that it computes with; --set replaces one of them by that
of your machine.

The model: members of a room are on random nodes. A message goes to Redis once, and from there once to each node with
members of the room. A node or a Redis is full at 70% of one core; with several loops, a node has that much for each
loop.
"""
import argparse
import heapq
import pathlib
import random
import sys

# Name: value, unit, what it is. tests/bench/cluster/run.py has measured all of them.
FIGURES = {
    "delivery": (2.35, "us", "CPU of a node for a delivery, 200 messages of 64 B a second to 100 members of the chat"),
    "sender": (44.8, "us", "CPU of a node for a message of the chat that it sends"),
    "relay": (34.2, "us", "CPU of a node for a message of the chat that it gets from Redis"),
    "redis_said": (34.8, "us", "CPU of Redis for a message of the chat, with two copies"),
    "redis_room": (7.4, "us", "CPU of Redis for a PUBLISH, with two copies"),
    "redis_copy": (0.81, "us", "CPU of Redis for each further copy"),
    "redis_join": (53, "us", "CPU of Redis for a user who joins a room of the chat"),
    "node_join": (91, "us", "CPU of the node for the same, with the handshake"),
    "message": (274, "B", "memory of Redis for a message of the chat of 64 B"),
    "user": (142, "B", "memory of Redis for a user who is present"),
}
FULL = 0.7  # of a core
PER_NODE = 10_000  # connections
PER_MINUTE = 1  # messages of a user
BACKLOG = 4096  # connections that wait for accept(), as Linux limits it (net.core.somaxconn)
HANDSHAKE = 10.0  # seconds, Limits::handshake_timeout
ANSWER = 5.0  # seconds, RedisOptions::answer_timeout


def figure(name):
    return FIGURES[name][0]


def seconds(name):
    return FIGURES[name][0] / 1e6


# ---- output ---------------------------------------------------------------------------------------------------------

LINES = []


def table(title, head, rows):
    LINES.append(f"**{title}**")
    LINES.append("| " + " | ".join(head) + " |")
    LINES.append("|---" * len(head) + "|")
    for row in rows:
        LINES.append("| " + " | ".join(str(cell) for cell in row) + " |")


def short(number):
    """Three digits, with a unit of thousands."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def cores(number):
    return f"{number:.2f}" if number < 10 else f"{number:,.0f}"


# ---- what grows ------------------------------------------------------------------------------------------------------

def nodes_of_room(nodes, members):
    """The expected number of nodes that have members of a room."""
    return nodes * (1 - (1 - 1 / nodes) ** members)


class Steady:
    """A cluster whose users talk evenly. `together`: a balancer sends all members of a room to the same node."""

    def __init__(self, nodes, members, per_minute=PER_MINUTE, per_node=PER_NODE, chat=True, together=False):
        self.connections = nodes * per_node
        self.rooms = max(1, self.connections / members)
        self.copies = 1 if together else nodes_of_room(nodes, members)
        self.messages = self.connections * per_minute / 60  # a second
        self.deliveries = self.messages * members / nodes  # of a node
        self.arrivals = self.messages * self.copies / nodes  # at a node, from Redis
        self.node = (self.deliveries * seconds("delivery") + self.arrivals * seconds("relay")
                     + self.messages / nodes * seconds("sender"))
        self.subscriptions = self.rooms * self.copies / nodes  # of a node
        base = seconds("redis_said" if chat else "redis_room") + (self.copies - 2) * seconds("redis_copy")
        beats = nodes * (1 / 1.25 + 1 / 2) * seconds("redis_room")  # of RedisLink and of ChatHub
        self.redis = self.messages * base + beats
        self.shards = max(1, -(-self.redis // FULL))
        self.history = self.rooms * min(10_000, per_minute * members * 60 * 24) * figure("message")
        self.presence = self.connections * figure("user")


def growth():
    rows = []
    for nodes in (1, 3, 10, 30, 100, 300, 1000):
        s = Steady(nodes, 50)
        rows.append([f"{nodes:,}", short(s.connections), short(s.messages), f"{s.copies:.1f}", short(s.deliveries),
                     f"{s.node:.2f}", short(s.subscriptions), cores(s.redis), f"{s.shards:.0f}",
                     short(s.presence) + "B", short(s.history) + "B"])
    table("A chat with 10,000 connections for each node, rooms of 50, one message a minute from each user",
          ["nodes", "connections", "messages/s", "copies", "deliveries/s of a node", "cores of a node",
           "rooms of a node", "cores of Redis", "Redis needed", "presence", "history"], rows)


def most_nodes(members, per_minute, chat, together=False):
    """The largest cluster for which one Redis is enough."""
    most = 0
    for nodes in range(1, 1001):
        if Steady(nodes, members, per_minute, chat=chat, together=together).redis <= FULL:
            most = nodes
    return most


def end_of_redis():
    rows = []
    for members in (2, 10, 50, 500, 5000):
        row = [f"{members:,}"]
        for per_minute, chat, together in ((1, True, False), (1, True, True), (0.1, True, False), (1, False, False),
                                           (1, False, True)):
            nodes = most_nodes(members, per_minute, chat, together)
            row.append("1,000 or more" if nodes == 1000 else f"{nodes:,}" if nodes else "less than one")
        rows.append(row)
    table("How many nodes of 10,000 connections one Redis can serve",
          ["members of a room", "chat, a message a minute", "the same, a room on one node", "chat, one in ten minutes",
           "plain rooms, a message a minute", "the same, a room on one node"], rows)


# ---- the storm -------------------------------------------------------------------------------------------------------

class Station:
    """Serves one client after the other."""

    def __init__(self, cost):
        self.cost, self.free_at = cost, 0.0

    def wait(self, now):
        return max(0.0, self.free_at - now)

    def serve(self, now):
        self.free_at = max(self.free_at, now) + self.cost
        return self.free_at


def full_jitter(first, longest):
    return lambda failures, dice: dice.uniform(0, min(longest, first * 2 ** failures))


def fixed(delay):
    """The first attempt is made at once."""
    return lambda failures, dice: delay if failures else 0.0


def storm(delay, shards=1, clients=100_000, others=9, seed=1):
    """A node with that many clients is lost. They come back to the others, which share one or more Redis."""
    dice = random.Random(seed)
    nodes = [Station(seconds("node_join")) for _ in range(others)]
    redis = [Station(seconds("redis_join")) for _ in range(shards)]
    events = [(delay(0, dice), i) for i in range(clients)]
    heapq.heapify(events)
    failures = [0] * clients
    refused, per_second, done, longest_redis, late = 0, {}, [], 0.0, 0
    while events:
        now, client = heapq.heappop(events)
        per_second[int(now)] = per_second.get(int(now), 0) + 1
        node = dice.choice(nodes)
        if node.wait(now) > min(HANDSHAKE, BACKLOG * node.cost):  # the kernel has no place for it
            refused += 1
            failures[client] += 1
            heapq.heappush(events, (now + 1 + delay(failures[client], dice), client))
            continue
        shard = redis[client % shards]
        at = node.serve(now)
        longest_redis = max(longest_redis, shard.wait(at))
        late += shard.wait(at) > ANSWER
        done.append(shard.serve(at))
    done.sort()
    return {"peak": max(per_second.values()), "refused": refused, "half": done[len(done) // 2],
            "all": done[-1], "redis": longest_redis, "late": late}


POLICIES = [
    ("at once, then each second", fixed(1.0)),
    ("full jitter, 0.5 s to 30 s (the default)", full_jitter(0.5, 30)),
    ("full jitter, 5 s to 30 s", full_jitter(5, 30)),
    ("full jitter, 30 s", full_jitter(30, 30)),
]


def storms():
    rows = []
    for others, shards in ((9, 1), (9, 4), (99, 1)):
        for name, delay in POLICIES:
            result = storm(delay, shards, others=others)
            rows.append([f"{others}", f"{shards}", name, short(result["peak"]), short(result["refused"]),
                         f"{result['half']:.1f} s", f"{result['all']:.1f} s", f"{result['redis']:.1f} s",
                         short(result["late"])])
    table("100,000 clients of a lost node come back",
          ["other nodes", "Redis", "a client waits", "attempts in the worst second", "refused", "half is back",
           "all are back", "Redis is behind by", "calls that Redis answers too late"], rows)


# ---- the room of a million -------------------------------------------------------------------------------------------

def million():
    rows = []
    members = 1_000_000
    for nodes in (10, 30, 100, 300, 1000):
        local = members / nodes
        node = seconds("relay") + local * seconds("delivery")
        redis = seconds("redis_said") + (nodes - 2) * seconds("redis_copy")
        join = seconds("redis_join") + nodes * seconds("redis_copy")
        rows.append([f"{nodes:,}", short(local), f"{node * 1e3:.1f} ms", f"{redis * 1e3:.2f} ms",
                     f"{min(FULL / node, FULL / redis):,.1f}", f"{FULL / join:,.0f}",
                     short(members * figure("user")) + "B", f"{members * join:,.0f} s"])
    table("One room of a million members",
          ["nodes", "members of a node", "CPU of a node for a message", "CPU of Redis for it", "messages/s at most",
           "joins/s at most", "presence in Redis", "CPU of Redis until all have joined"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    for each in options.set:
        name, _, value = each.partition("=")
        if name not in FIGURES:
            parser.error(f"--set {name}: not one of {', '.join(FIGURES)}")
        FIGURES[name] = (float(value), *FIGURES[name][1:])
    if options.list:
        for name, (value, unit, meaning) in FIGURES.items():
            print(f"{name:12} {value:8g} {unit:3} {meaning}")
        return
    growth()
    end_of_redis()
    storms()
    million()
    if options.check is None:
        print("\n".join(LINES))
        return
    known = set(options.check.read_text(encoding="utf-8").splitlines())
    missing = [line for line in LINES if line not in known]
    for line in missing:
        print(f"{options.check} lacks: {line}")
    sys.exit(1 if missing else 0)


main()
