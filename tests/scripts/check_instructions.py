#!/usr/bin/env python3
"""check_instructions.py PROGRAM SERVER LOAD: counts instructions with callgrind, and compares them with records.

PROGRAM is bench/instructions.cpp: the protocol alone. SERVER and LOAD are bench/server.cpp and bench/load.cpp: what the
server needs for a message, a delivery and a whole connection, without the kernel.
"""
import json
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

# Measured with g++ 12 -O2 on x86-64, with all features and with assertions. A change that needs more must be explained.
RECORDED = {"receive": 363, "echo": 487, "broadcast": 64}
SERVED = {
    # mode of the load: (mode of the server, members, recorded instructions for each item)
    "echo": ("echo", 32, 909),
    "fanout": ("room", 200, 215),
    "connect": ("echo", 4, 13610),
}
ALLOWED_FACTOR = 1.05  # for other neighbours in the binary
SERVED_FACTOR = 1.25  # on a busy machine a turn has fewer messages: 1.15 was seen

PROGRAM, SERVER, LOAD = sys.argv[1:4]


def callgrind(folder):
    return ["valgrind", "--tool=callgrind", f"--callgrind-out-file={pathlib.Path(folder) / 'out'}"]


def collected(stderr):
    found = re.search(r"Collected : (\d+)", stderr)
    return int(found.group(1)) if found else sys.exit(f"callgrind failed: {stderr[-500:]}")


def instructions(mode, count):
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*callgrind(folder), PROGRAM, mode, str(count)], capture_output=True, text=True)
        return collected(done.stderr)


def served(mode, seconds):
    """The instructions of a server, and the number of items that it served."""
    server_mode, members, _ = SERVED[mode]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([*callgrind(folder), SERVER, "0", server_mode], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
        try:
            port = re.search(r":(\d+)/?$", server.stdout.readline().strip()).group(1)
            load = subprocess.run([LOAD, "--port", port, "--pid", str(server.pid), "--mode", mode, "--warmup", "0",
                                   "--members", str(members), "--seconds", str(seconds), "--timeout", "200"],
                                  capture_output=True, text=True)
        finally:
            server.send_signal(signal.SIGTERM)
            stderr = server.communicate()[1]
    if load.returncode != 0:
        sys.exit(f"bench_load failed: {load.stderr}")
    return collected(stderr), json.loads(load.stdout)["count"]


problems = []


def compare(name, each, recorded, factor):
    print(f"{name}: {each:.0f} instructions, recorded {recorded}")
    if each > recorded * factor:
        problems.append(f"{name}: {each:.0f} instructions, more than {factor} times the recorded {recorded}")


# The difference of two runs excludes the instructions at the start of the program.
for mode, recorded in RECORDED.items():
    compare(mode, (instructions(mode, 21000) - instructions(mode, 1000)) / 20000, recorded, ALLOWED_FACTOR)
for mode, (_, _, recorded) in SERVED.items():
    (less, few), (more, many) = served(mode, 0.5), served(mode, 4)
    if many - few < 1000:
        print(f"served {mode}: the machine is too busy, only {many} items")
        continue
    compare(f"served {mode}", (more - less) / (many - few), recorded, SERVED_FACTOR)
sys.exit("\n".join(problems) or 0)
