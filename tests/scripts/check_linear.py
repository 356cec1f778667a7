#!/usr/bin/env python3
"""check_linear.py PROGRAM [CASE]: holds the cost of twice the input under 2.5 times the cost, in instructions.

PROGRAM is bench/linear.cpp. It runs each case with n and with 2n under callgrind, which dumps one profile for each.
"""
import pathlib
import re
import subprocess
import sys
import tempfile

ALLOWED_RATIO = 2.5
# The difference between one route and 100 routes, not between n and 2n.
ALLOWED = {"routes": 2.0}
# A case that costs so little is not measured well.
MIN_INSTRUCTIONS = 20_000

with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "out"
    callgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}"]
    done = subprocess.run([*callgrind, *sys.argv[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"callgrind failed: {done.stderr[-1000:]}")
    costs = {}
    for part in pathlib.Path(folder).iterdir():
        text = part.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (\S+)/([12])$", text, re.M)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
        if name and total:
            costs.setdefault(name.group(1), {})[name.group(2)] = int(total.group(1))

problems = []
for name, cost in sorted(costs.items()):
    ratio = cost["2"] / max(cost["1"], 1)
    print(f"{name}: {cost['1']} and {cost['2']} instructions, ratio {ratio:.2f}")
    if ratio > ALLOWED.get(name, ALLOWED_RATIO):
        problems.append(f"{name}: {ratio:.2f} times the instructions for twice the input")
    if cost["1"] < MIN_INSTRUCTIONS and name not in ALLOWED:
        problems.append(f"{name}: only {cost['1']} instructions: too few to measure")
if not costs:
    problems.append("callgrind wrote no profile")
sys.exit("\n".join(problems) or 0)
