#!/usr/bin/env python3
"""loops.py SERVER LOAD [--threads N] [--rounds R] [--seconds S]: what a second loop costs, and what it brings.

SERVER is bench/server.cpp, LOAD is bench/load.cpp. Each workload runs with one loop and with N (2), in turns. Prints a
table with the medians of the rounds:

  CPU          CPU time of the whole server for each item
  busiest      CPU time of the busiest loop for each item: with a core for each loop, it limits the throughput
  speed        CPU of one loop, divided by the busiest loop: how many times more items N cores can serve
  per second   what this machine has done; the load generator needs CPUs too

Ends with status 1 if the CPU is more than 1.05 times that of one loop, or the speed less than 0.9 N.
"""
import argparse
import json
import re
import signal
import statistics
import subprocess
import sys

WORK = [
    # name, mode of the server, arguments of the load
    ("fan-out to 200, 64 B", "room", ["--mode", "fanout", "--members", "200", "--size", "64"]),
    ("fan-out to 2,000, 64 B", "room", ["--mode", "fanout", "--members", "2000", "--size", "64"]),
    ("fan-out to 200, 1 KiB", "room", ["--mode", "fanout", "--members", "200", "--size", "1024"]),
    ("echo, 200 clients, 64 B", "echo", ["--mode", "echo", "--members", "200", "--size", "64"]),
    ("echo, 50 clients, 16 KiB", "echo", ["--mode", "echo", "--members", "50", "--size", "16384"]),
]


def run(options, mode, threads, arguments):
    server = subprocess.Popen([options.server, "0", mode, str(threads)], stdout=subprocess.PIPE, text=True)
    try:
        port = re.search(r":(\d+)/?$", server.stdout.readline().strip()).group(1)
        load = subprocess.run([options.load, "--port", port, "--pid", str(server.pid), *arguments,
                               "--seconds", str(options.seconds)], capture_output=True, text=True, timeout=300)
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

    def median(name, threads, field):
        return statistics.median(result[field] for result in results[name, threads])

    print(f"| | CPU, 1 loop | CPU, {n} loops | ratio | busiest of {n} | speed | per second, 1 | per second, {n} |")
    print("|---|---|---|---|---|---|---|---|")
    failed = False
    for name, _, _ in WORK:
        one, all_loops = median(name, 1, "server_cpu_us"), median(name, n, "server_cpu_us")
        busiest = median(name, n, "busiest_thread_us")
        ratio, speed = all_loops / one, one / busiest
        failed = failed or ratio > 1.05 or speed < 0.9 * n
        print(f"| {name} | {one:.2f} us | {all_loops:.2f} us | {ratio:.2f} | {busiest:.2f} us | {speed:.2f} | "
              f"{median(name, 1, 'per_second'):,.0f} | {median(name, n, 'per_second'):,.0f} |")
    sys.exit(failed)


main()
