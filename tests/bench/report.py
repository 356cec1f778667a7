#!/usr/bin/python3
"""Computes the figures of tests/bench/run.sh.

report.py table DIR       reads DIR/raw.jsonl; writes DIR/bench.txt (also printed), DIR/bench.svg and DIR/bench.json
report.py cpu COMMAND...  runs the command and prints its CPU seconds
report.py rate FILE       prints half of the floor's maximum rate for this row, in messages per second
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from html import escape

# Prefix of a workload's name, its figure, and the figure's title. Smaller is better for all of them.
FIGURES = [
    ("fanout", "server_cpu_us", "server CPU, µs per delivery"),
    ("rate", "p99_us", "p99 latency, µs, from the intended send time"),
    ("stalled", "p99_us", "p99 latency of the others, µs; 5% of the members never read"),
    ("echo", "server_cpu_us", "server CPU, µs per message"),
    ("idle", "rss_bytes_each", "server memory, bytes per idle connection (without the kernel's)"),
    ("deflate", "server_cpu_us", "server CPU, µs per delivery of a compressed broadcast"),
    ("active", "p50_us", "median round trip, µs, of the active connection"),
    ("connect", "server_cpu_us", "server CPU, µs per opening and closing handshake"),
    ("compile", "cpu_seconds", "CPU seconds; the floor is an empty file"),
]
TITLES = {
    "fanout-200-64": "Fan-out of 64 B to 200",
    "fanout-2000-64": "Fan-out of 64 B to 2,000",
    "fanout-8000-64": "Fan-out of 64 B to 8,000",
    "echo-200-64": "Echo of 64 B, 200 connections",
    "echo-50-16k": "Echo of 16 KiB, 50 connections",
    "echo-4-1m": "Echo of 1 MiB text, 4 connections",
    "idle-10000": "10,000 idle connections",
    "connect": "Connect and close",
}


def figure(work):
    return next((key, unit) for start, key, unit in FIGURES if work.startswith(start))


# A ratio is meaningless for these, because the floor is close to zero.
ABSOLUTE = ("idle", "compile")


def number(value):
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class Cell:
    """All rounds of one server on one workload."""

    def __init__(self, work, rows):
        self.rows = [r for r in rows if "error" not in r]
        self.errors = [r["error"] for r in rows if "error" in r]
        values = [r[figure(work)[0]] for r in self.rows if figure(work)[0] in r]
        self.median = statistics.median(values) if values else None
        self.best = min(values) if values else None

    def median_of(self, key):
        values = [r[key] for r in self.rows if key in r]
        return statistics.median(values) if values else None

    def notes(self):
        notes = []
        if self.errors:
            notes.append(f"failed {len(self.errors)} of {len(self.errors) + len(self.rows)}: {self.errors[0]}")
        if not self.rows:
            return "; ".join(notes)
        mode = self.rows[0]["mode"]
        limits = [r.get("limited_by") for r in self.rows]
        if mode in ("fanout", "echo", "connect", "deflate"):
            if limits.count("load") * 2 > len(limits):
                notes.append("the load generator was the limit")
            disturbed = sum(max(r["server_share"], r["load_share"]) < 0.85 for r in self.rows)
            if disturbed:
                notes.append(f"{disturbed} of {len(self.rows)} rounds disturbed by other processes")
        if mode == "fanout-rate" and limits.count("rate") * 2 <= len(limits):
            notes.append("cannot keep up with the rate")
        if mode == "fanout" and self.median_of("messages_per_read"):
            notes.append(f"{number(self.median_of('messages_per_read'))} messages per read")
        if mode == "deflate":
            notes.append(f"{number(self.median_of('compressed_size'))} bytes per message")
        if mode == "echo" and self.rows[0]["size"] >= 16384:
            notes.append(f"{number(self.median_of('mb_per_second'))} MB/s")
        if self.median_of("undelivered"):
            notes.append(f"{self.median_of('undelivered'):,.0f} deliveries missing")
        if self.median_of("stalled"):
            notes.append(f"server {number(self.median_of('server_rss_kib') / 1024)} MiB, "
                         f"closed {self.median_of('stalled_closed'):.0f} of {self.median_of('stalled'):.0f} stalled")
        return "; ".join(notes)


def load_cells(path):
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    cells = {}
    for row in rows:
        cells.setdefault(row["work"], {}).setdefault(row["server"], []).append(row)
    return rows, {w: {s: Cell(w, r) for s, r in by.items()} for w, by in cells.items()}


def ratio(cell, floor, which, work):
    if work.startswith(ABSOLUTE):
        return None
    mine, its = getattr(cell, which), getattr(floor, which) if floor else None
    return mine / its if mine is not None and its else None


def table(cells):
    """A line per workload: the floor's median, then for each server the ratios of the medians and of the best."""
    servers = list(dict.fromkeys(s for by in cells.values() for s in by if s != "floor"))
    lines = ["The floor: median of the rounds. Servers: ratio of the medians to the floor / ratio of the best.", ""]
    lines.append(f"{'work':18}{'floor':>10}" + "".join(f"{s:>18}" for s in servers))
    for work, by in cells.items():
        floor = by.get("floor")
        line = f"{work:18}{number(floor.median) if floor and floor.median is not None else '-':>10}"
        for s in servers:
            cell = by.get(s)
            if cell is None:
                text = ""
            elif cell.median is None:
                text = "failed"
            elif (r := ratio(cell, floor, "median", work)) is None:
                text = number(cell.median)
            else:
                text = f"{r:.2f} / {ratio(cell, floor, 'best', work):.2f}" + ("!" if cell.errors else "")
            line += f"{text:>18}"
        lines.append(line)
    return lines


def details(cells):
    lines = []
    for work, by in cells.items():
        lines += ["", f"{work}: {figure(work)[1]}", f"  {'':18}{'median':>10}{'best':>10}{'ratio':>8}{'of best':>9}"]
        floor = by.get("floor")
        for server, cell in by.items():
            if cell.median is None:
                lines.append(f"  {server:18}{'-':>10}{'-':>10}{'-':>8}{'-':>9}  {cell.notes()}")
                continue
            ratios = [ratio(cell, floor, which, work) for which in ("median", "best")]
            shown = [f"{r:.2f}" if r is not None else "-" for r in ratios]
            lines.append(f"  {server:18}{number(cell.median):>10}{number(cell.best):>10}{shown[0]:>8}{shown[1]:>9}"
                         f"  {cell.notes()}".rstrip())
    for many, few in (("active-10000", "active-10"), ("stalled-200-16k", "rate-200-16k")):
        both = [s for s in cells.get(many, {}) if s in cells.get(few, {}) and cells[many][s].best and cells[few][s].best]
        if both:
            lines += ["", f"{many} to {few}", f"  {'':18}{'medians':>10}{'best':>10}"]
            lines += [f"  {s:18}{cells[many][s].median / cells[few][s].median:>10.2f}"
                      f"{cells[many][s].best / cells[few][s].best:>10.2f}" for s in both]
    return lines


STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px }
.unit, .value { fill: #59636e; font-size: 11px }
.floor { fill: #afb8c1 } .wschat { fill: #0969da } .peer { fill: #d1a54a }
.axis { stroke: #d1d9e0 }
.cut { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .unit, .value { fill: #9198a1 }
  .floor { fill: #656c76 } .wschat { fill: #4493f8 } .peer { fill: #a9803a }
  .axis { stroke: #3d444d } .cut { fill: #0d1117 }
}
"""
BAR, LEFT, WIDTH, PANEL, LONGEST = 19, 116, 190, 444, 6.0


def panel(work, by, x, y):
    """Horizontal bars from zero. A bar longer than LONGEST times the floor is drawn with a gap."""
    floor = by["floor"].median
    absolute = work.startswith(ABSOLUTE)
    order = sorted((s for s in by if by[s].median is not None), key=lambda s: (s != "floor", not s.startswith("wschat"), by[s].median))
    longest = max(by[s].median for s in order)
    if not absolute:
        longest = min(longest, floor * LONGEST)
    parts = [f'<text class="title" x="{x}" y="{y}">{escape(TITLES[work])}</text>',
             f'<text class="unit" x="{x}" y="{y + 16}">{escape(figure(work)[1])}</text>']
    top = y + 26
    for i, server in enumerate(order):
        value, bar_y = by[server].median, top + i * BAR
        cut = value > longest
        length = WIDTH * min(value, longest) / longest
        kind = "floor" if server == "floor" else "wschat" if server.startswith("wschat") else "peer"
        parts.append(f'<text x="{x + LEFT - 6}" y="{bar_y + 12}" text-anchor="end">{escape(server)}</text>')
        parts.append(f'<rect class="{kind}" x="{x + LEFT}" y="{bar_y + 2}" width="{max(length, 1):.1f}" height="13" rx="2"/>')
        if cut:
            at = x + LEFT + WIDTH - 16
            parts.append(f'<path class="cut" d="M{at} {bar_y + 17}l4 -17h4l-4 17z"/>')
        note = number(value) + (f"  ({value / floor:.2f}×)" if server != "floor" and not absolute else "")
        parts.append(f'<text class="value" x="{x + LEFT + length + 6:.1f}" y="{bar_y + 12}">{note}</text>')
    failed = [s for s in by if by[s].median is None]
    for i, server in enumerate(failed, len(order)):
        parts.append(f'<text x="{x + LEFT - 6}" y="{top + i * BAR + 12}" text-anchor="end">{escape(server)}</text>')
        parts.append(f'<text class="value" x="{x + LEFT + 6}" y="{top + i * BAR + 12}">fails</text>')
    bottom = top + len(by) * BAR
    parts.append(f'<path class="axis" d="M{x + LEFT} {top}V{bottom}"/>')
    return parts, bottom


def picture(cells):
    works = [w for w in TITLES if w in cells and "floor" in cells[w] and cells[w]["floor"].median]
    parts, y = [], 68
    for i in range(0, len(works), 2):
        drawn = [panel(w, cells[w], 16 + j * PANEL, y) for j, w in enumerate(works[i:i + 2])]
        parts += [line for lines, _ in drawn for line in lines]
        y = max(bottom for _, bottom in drawn) + 36
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * PANEL + 16} {y}" role="img" aria-label="wschat and its peers">',
        f"<style>{STYLE}</style>",
        '<text class="title" x="16" y="22">Cost for the server; shorter is better</text>',
        f'<text class="unit" x="16" y="38">One core. The floor is the cost of the kernel alone. Bars over '
        f'{LONGEST:.0f} times the floor are cut.</text>',
        *parts, "</svg>", ""])


def write_all(directory):
    rows, cells = load_cells(os.path.join(directory, "raw.jsonl"))
    text = "\n".join(table(cells) + details(cells)) + "\n"
    for name, content in (("bench.txt", text), ("bench.svg", picture(cells)), ("bench.json", json.dumps(rows, indent=1) + "\n")):
        with open(os.path.join(directory, name), "w", encoding="utf-8") as f:
            f.write(content)
    print(text, end="")


def main():
    command, *rest = sys.argv[1:] or [""]
    if command == "table" and len(rest) == 1:
        write_all(rest[0])
    elif command == "cpu" and rest:
        status = subprocess.call(rest, stdout=subprocess.DEVNULL)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{used.ru_utime + used.ru_stime:.3f}")
        return status
    elif command == "rate" and len(rest) == 1:
        row = json.load(open(rest[0], encoding="utf-8"))
        print(f"{0.5e6 / (row['server_cpu_us'] * row['members']):.1f}")
    else:
        sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
