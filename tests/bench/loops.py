#!/usr/bin/env python3
"""loops.py SERVER LOAD [--threads N] [--rounds R] [--seconds S]: what a second loop costs, and what it brings.

SERVER is bench/server.cpp, LOAD is bench/load.cpp. Each workload runs with one loop and with N (2), in turns. All loops
share CPU 0, and the load generator has CPU 1, so that both cases have the same caches and the load generator is outside
of the measure. Prints a table with the best of the rounds:

  CPU          CPU time of the whole server for each item
  busiest      CPU time of the busiest loop for each item: with a core for each loop, it limits the throughput
  speed        CPU of one loop, divided by the busiest loop: how many times more items N cores can serve

Ends with status 1 if the CPU is more than 1.05 times that of one loop, or the speed less than 0.9 N, but for the last
row.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys

FOUR = "fan-out to 200, 64 B, four senders"
# With one sender, each delivery is a write of its own. With four, one loop gathers the four messages of a turn in one write
# to each member; several loops read them in turns of their own, and gather less.
WORK = [
    # name, mode of the server, arguments of the load
    ("fan-out to 200, 64 B", "room", ["--mode", "fanout", "--senders", "1", "--members", "200", "--size", "64"]),
    ("fan-out to 2,000, 64 B", "room", ["--mode", "fanout", "--senders", "1", "--members", "2000", "--size", "64"]),
    ("fan-out to 200, 1 KiB", "room", ["--mode", "fanout", "--senders", "1", "--members", "200", "--size", "1024"]),
    ("echo, 200 clients, 64 B", "echo", ["--mode", "echo", "--members", "200", "--size", "64"]),
    ("echo, 50 clients, 16 KiB", "echo", ["--mode", "echo", "--members", "50", "--size", "16384"]),
    (FOUR, "room", ["--mode", "fanout", "--senders", "4", "--members", "200", "--size", "64"]),
]


def pinned(cpu):
    return lambda: os.sched_setaffinity(0, {cpu})


def run(options, mode, threads, arguments):
    server = subprocess.Popen([options.server, "0", mode, str(threads)], stdout=subprocess.PIPE, text=True,
                              preexec_fn=pinned(0))
    try:
        port = re.search(r":(\d+)/?$", server.stdout.readline().strip()).group(1)
        load = subprocess.run([options.load, "--port", port, "--pid", str(server.pid), *arguments,
                               "--seconds", str(options.seconds)], capture_output=True, text=True, timeout=300,
                              preexec_fn=pinned(1))
        if load.returncode != 0:
            sys.exit(f"bench_load failed: {load.stderr}")
        return json.loads(load.stdout)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("load")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5)
    options = parser.parse_args()
    n = options.threads
    results = {}
    for _ in range(options.rounds):
        for name, mode, arguments in WORK:
            for threads in (1, n):
                results.setdefault((name, threads), []).append(run(options, mode, threads, arguments))

    def best(name, threads):
        """Other programs can only add time, so the best round is the most reliable one."""
        return min(results[name, threads], key=lambda result: result["server_cpu_us"])

    print(f"| | CPU, 1 loop | CPU, {n} loops | ratio | busiest of {n} | speed |")
    print("|---|---|---|---|---|---|")
    failed = False
    for name, _, _ in WORK:
        one, all_loops = best(name, 1)["server_cpu_us"], best(name, n)["server_cpu_us"]
        busiest = best(name, n)["busiest_thread_us"]
        ratio, speed = all_loops / one, one / busiest
        failed = failed or (name != FOUR and (ratio > 1.05 or speed < 0.9 * n))
        print(f"| {name} | {one:.2f} µs | {all_loops:.2f} µs | {ratio:.2f} | {busiest:.2f} µs | {speed:.2f} |")
    sys.exit(failed)


main()
