#!/usr/bin/env python3
"""Makes and packs the inputs of the harnesses.

seeds.py make FOLDER        writes FOLDER/NAME/ for each harness: seeds from the strings in tests/*.cpp, and saved inputs
seeds.py pack NAME FOLDER   writes tests/fuzz/corpus/NAME.hex: the inputs of FOLDER as lines of hex, shortest first
"""
import hashlib
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
SAVED = HERE / "corpus"
NAMES = ("http", "body", "fields", "text", "connection", "server", "tls", "client", "chat", "store")
PACKED = 80_000  # largest size of a packed file in bytes

# ---- the strings of the tests -------------------------------------------------------------------------------------

TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|R"(\w*)\((.*?)\)\1"|"((?:[^"\\\n]|\\.)*)"|\'(?:[^\'\\\n]|\\.)+\'', re.S)
ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)", re.S)
PLAIN = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}


def unescaped(literal):
    def one(match):
        escape = match[1]
        if escape[:1] == b"x":
            return bytes([int(escape[1:], 16)])
        if escape[:1] in b"01234567":
            return bytes([int(escape, 8) & 255])
        return PLAIN.get(escape, escape)

    return ESCAPE.sub(one, literal.encode())


def strings_of(suite):
    """The string literals of tests/SUITE_test.cpp. Literals with only commas between them form a row."""
    source = (HERE.parent / f"{suite}_test.cpp").read_text()
    rows, end = [[]], 0
    for token in TOKEN.finditer(source):
        between = source[end:token.start()].strip()
        if token[0].startswith(("//", "/*")):
            continue
        end = token.end()
        if token[2] is None and token[3] is None:
            rows.append([])
            continue
        text = token[2].encode() if token[2] is not None else unescaped(token[3])
        if between == "" and rows[-1]:
            rows[-1][-1] += text  # adjacent literals are one string
        elif re.fullmatch(r"s?v?\s*,", between):
            rows[-1].append(text)
        else:
            rows.append([text])
    return [row for row in rows if row]


def all_of(*suites):
    return [row for suite in suites for row in strings_of(suite)]


def from_hex(text):
    """The bytes of a text such as "81 05 48 65", or None."""
    if not re.fullmatch(rb"([0-9a-fA-F]{2} )*[0-9a-fA-F]{2}", text) or len(text) < 2:
        return None
    return bytes.fromhex(text.decode())


# ---- seeds --------------------------------------------------------------------------------------------------------


def http_seeds():
    head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    upgrade = (b"GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
               b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
    streams = [head, upgrade, head + upgrade + head]
    for row in all_of("http", "server", "handler"):
        for text in row:
            if b" HTTP/" in text and b"\r\n" in text:
                streams.append(text)
            elif b" HTTP/" in text:
                streams.append(text + b"\r\nHost: a\r\n\r\n")
            elif re.match(rb"[\w-]+:", text):
                streams.append(b"GET / HTTP/1.1\r\nHost: a\r\n" + text.rstrip(b"\r\n") + b"\r\n\r\n")
                streams.append(upgrade[:-2] + text.rstrip(b"\r\n") + b"\r\n\r\n")
            elif text[:1] == b"/" or b"://" in text:
                streams.append(b"GET " + text + b" HTTP/1.1\r\nHost: " + text[:40] + b"\r\n\r\n")
    return [bytes([limits, 7]) + stream for stream in streams for limits in (0, 2)]


def body_seeds():
    chunked = [b"5\r\nhello\r\n0\r\n\r\n", b"1;a=b\r\nx\r\n0\r\nName: value\r\n\r\n", b"F\r\na=1&b+c=2&a=%41\r\n0\r\n\r\n"]
    form = (b'--a\r\nContent-Disposition: form-data; name="a"; filename="f"\r\nContent-Type: image/png\r\n\r\n1\r\n'
            b'--a\r\nContent-Disposition: form-data; name=""\r\n\r\n\r\n--a--')
    chunked.append(b"%x\r\n%s\r\n0\r\n\r\n" % (len(form), form))
    plain = [b"a=1&b+c=2&a=%41&=", form + b" " * (253 - len(form))]
    return ([bytes([0, limits, kind, 7]) + stream for stream in chunked for limits in (0, 1, 2, 5) for kind in range(4)]
            + [bytes([1, limits, len(stream), 7]) + stream for stream in plain for limits in (0, 2)])


def fields_seeds():
    seeds = [b"10.0.0.0/8\n10.2.3.4", b"/chat/{room}/{rest...}\n/chat/tea%20room/a//b", b"https://a.example:443\na.example"]
    for row in all_of("http", "handler", "sockets", "server", "server_pages", "server_policies"):
        seeds += [b"\n".join(row[i:i + 3]) for i in range(len(row))]
    return seeds


def client_seeds():
    good = (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: two\r\n\r\n\x81\x02hi")
    refusals = [b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone", b"HTTP/1.0 200\r\n\r\nx",
                b"HTTP/1.1 302 x\r\nTransfer-Encoding: chunked\r\n\r\n2;a\r\nab\r\n0\r\n\r\n"]
    urls = [b"ws://h", b"wss://a:b@h.example:81/c?d=e", b"http://[::1]:8/", b"ws://[fe80::1%25eth0]/", b"//h/x", b"?a",
            b"../b#c"]
    return [bytes([limits, len(url)]) + url + stream for limits in (0, 1) for url in urls for stream in [good, *refusals]]


def text_seeds():
    texts = []
    for row in all_of("bytes", "vocabulary", "protocol", "frames"):
        for text in row:
            texts += [text, from_hex(text) or b""]
    texts += [bytes([3, 232]), bytes([3, 239]) + b"gr\xc3\xbc\xc3\x9fe", bytes([15, 160]) + b"\xff", b"\x9a\x99\x99\x99\x99\x99\xb9\x3f"]
    return [bytes(before) + text for text in texts for before in ((0, 0, 0, 0), (2, 61, 5, 7), (128, 33, 31, 9))]


CALLS = ("send_text send_binary send_encoded send_offered ping pong close fail abort hang_up wait tick alive drain block "
         "unblock pause resume").split()
WITH_TEXT = ("ping", "pong", "close", "fail")


def call(name, amount=0, text=b"", later=False):
    step = bytes([6 if later else 3, CALLS.index(name), amount])
    return step + (bytes([len(text)]) + text if name in WITH_TEXT else b"")


def frames_of(data):
    """Unmasked frames as steps of the harness, which masks them. Other bytes become a raw step."""
    steps = b""
    while len(data) >= 2 and data[1] < 126 and len(data) >= 2 + data[1]:
        steps += bytes([1, data[0], len(steps) & 255, data[1]]) + data[2:2 + data[1]]
        data = data[2 + data[1]:]
    return steps + (bytes([0, len(data)]) + data if data else b"")


def connection_seeds():
    vectors = [v for row in all_of("protocol", "frames") for v in map(from_hex, row) if v and len(v) < 256]
    ping, text, close = b"\x89\x02hi", b"\x81\x05Hello", b"\x88\x02\x03\xe8"
    seeds = []
    for set_up in (0, 1, 2, 3, 4, 5, 8, 9, 12, 13):  # the role and the limits
        head = bytes([set_up, 5])
        for vector in vectors if set_up < 2 else vectors[::5]:
            seeds += [head + bytes([0, len(vector)]) + vector, head + frames_of(vector) + call("tick", 100)]
        large = b"".join(bytes([2, first, size, 1]) for first, size in ((0x82, 249), (0x01, 252), (0x89, 9), (0x80, 254)))
        seeds += [head + large, head + large + call("drain", 255)]
        for name in CALLS:
            for amount in (0, 4, 100, 251, 255):
                now = call(name, amount, b"why")
                seeds += [head + frames_of(text) + now + frames_of(ping + text) + call("drain", 255) + frames_of(close),
                          head + call(name, amount, b"why", later=True) + frames_of(text + ping + text) + call("resume"),
                          head + call("send_text", 200) + call("block") + now + frames_of(ping + ping) + call("unblock") +
                          call("drain", 255) + call("tick", 200) + call("tick", 200)]
    return seeds


def server_seeds():
    seeds = []

    def request(target=0, flags=0, more=0, wishes=b"", address=0):
        return bytes([2, address, target, flags, more, len(wishes)]) + wishes

    for options in (0, 1, 2, 4, 5, 8, 9, 12, 13, 32, 64, 100):
        head = bytes([options])
        for target in range(16):
            seeds.append(head + request(target) + b"\0" + bytes([3, 0, target, 0, 0, 0]))
            seeds.append(head + request(0, 0, target) + b"\0")
            seeds.append(head + bytes([1, 0, 3, 0, target, 200 + target, 0, 0]) + b"\0" + bytes([4, 0, 0, 0, 0, 0]))
        for action in range(26):
            letter = bytes([97 + action])
            room = request() + b"\0" + request(9) + b"\0" + request(wishes=b"aaa" + letter) + b"\0"
            message = bytes([17, 0, action, 0])
            seeds += [head + room + message + b"\0", head + room + bytes([9, 1, 1]) + message + b"\0" + message + bytes([9, 1, 255]),
                      head + request(wishes=letter * 7) + b"\0" + bytes([6, 0, 0x89, 1, 65]) + bytes([6, 0, 0x8A, 1, 65]) + b"\0",
                      head + room + message + bytes([8, 1]) + b"\0" + bytes([7, 0]) + b"\0"]
        for call_ in range(7):
            for error in range(9):
                seeds.append(head + bytes([12, call_, error]) + request() + b"\0" + bytes([12, call_, error, 17, 0, 1, 9]) + b"\0")
        for count in (1, 2, 3, 5, 8, 13, 21, 34):
            seeds.append(head + request() + b"\0" + bytes([14, count]) + request() + b"\0" + bytes([14, count, 17, 0, 1, 9]) + b"\0")
        for vector in [v for row in all_of("protocol") for v in map(from_hex, row) if v and 2 <= len(v) < 200][::6]:
            seeds.append(head + request() + bytes([6, 0, vector[0], len(vector) - 2]) + vector[2:] + b"\0")
        seeds.append(head + request() + bytes([13, 0]) + request() + b"\0" + bytes([11, 3]) + bytes([13, 1]) + b"\0")
        for how in (0, 1, 50):
            seeds.append(head + request() + b"\0" + request(1) + bytes([15, how]) + b"\0" + bytes([15, how, 11, 5]))
    # Connections of the client, step 16: it connects, gives up, is disturbed.
    for options in (0, 1, 4, 12):
        for path in range(6):
            link = bytes([options, 16, 200, path + 30, 255])
            for disturbed in (b"", bytes([16, 231, 0]), bytes([16, 236, 0]), bytes([16, 241, 0]), bytes([16, 246, 0]),
                              bytes([16, 251, 7])):
                seeds += [link + disturbed + b"\0" + bytes([11, 3]), link + b"\0\0" + disturbed + bytes([11, 5])]
        for fault in range(4):
            seeds.append(bytes([options, 16, 200, 1, fault, 16, 201, 7, 255, 0, 11, 3]))
    return seeds


def store_seeds():
    """Entries of all kinds in three rooms, then a fault at each of many calls, then reads and another opening."""
    some = b"".join(bytes([0, choice, more]) for choice in (0, 1, 9, 63) for more in (0, 9, 18, 200))
    changed = b"".join(bytes([1, 0, kind, target]) for kind in (4, 5, 6, 7) for target in (0, 2))
    reads = b"".join(bytes([kind, choice]) for kind in (3, 4, 5) for choice in (0, 1, 3, 61, 80)) + bytes([7])
    facts = b"".join(bytes([6, choice]) for choice in (0, 7, 50, 150, 151))
    seeds = [some + changed + facts + reads, some + bytes([9]) + changed + bytes([9]) + reads + bytes([8])]
    for after in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144):
        for error in (0, 1, 2, 3, 4, 24):
            seeds.append(some + bytes([10, error, after, 2, 0, 1, 9]) + changed + facts + reads)
        seeds.append(some + bytes([10, 25, after, 9, 9]) + some + reads)
        seeds.append(some + bytes([11, after]) + changed + bytes([11, after]) + facts + bytes([11, after]) + reads)
        seeds.append(bytes([11, after, 9, 11, after, 9]) + some + reads)
    return seeds


def tls_seeds():
    seeds = server_seeds()[::8]
    for options in (0, 4, 8, 14):
        for address in (0, 6):  # TLS 1.3 and 1.2
            for actions in (b"aaa", b"gfr"):
                room = bytes([options, 2, address, 0, 0, 0, len(actions)]) + actions + b"\0"
                message = bytes([17, 0, 6, 200])
                for kind in range(19, 26):
                    for amount in (0, 5, 255):
                        step = bytes([kind, 0, amount])
                        seeds += [room + step + message + b"\0" + step + message, bytes([options, 1, address]) + step + room[1:] + message,
                                  room + message + step + b"\0" + bytes([8, 0]),
                                  room + bytes([9, 0, 3]) + step + message + message + b"\0" + bytes([9, 0, 255]) + b"\0" + message]
    return seeds


def chat_seeds():
    """Each command of the protocol among three users, with each behaviour of the store."""
    def connect(who, how=0, more=0):
        return bytes([0, who, how, more]) + (b"\1\2\3\4\5" if more // 4 % 4 == 1 else b"")

    def line(user, kind, amount):
        return bytes([1, user, kind, amount])

    seeds = []
    for options in (b"\0\0", b"\1\0", b"\2\1", b"\4\1", b"\x08\2", b"\x10\0", b"\x20\0", b"\x40\1"):
        users = options + connect(24) + connect(49, 4) + connect(2) + line(0, 0, 2) + line(1, 0, 6)
        for kind in range(36):
            for amount in (2, 6, 9, 18, 35, 70):
                seeds.append(users + line(0, kind, amount) + line(1, kind, amount) + line(0, 64 + kind, amount))
        for store in (1, 2, 3, 5, 7, 9, 201, 203):
            late = users + bytes([4, store])
            for kind in (0, 3, 5, 7, 8, 9, 10, 12, 14, 15, 23):
                seeds.append(late + line(0, kind, 6) + connect(26, 64, 1) + line(2, kind, 10) + bytes([5, 0, 5, 150]) * 3 + line(1, kind, 6))
        for how in range(3):
            seeds.append(users + bytes([3, 0, how]) + connect(24, 0, 16 + 64) + bytes([6, 2]) + bytes([3, 1, how, 6, 3]))
        for action in range(10):
            seeds.append(users + bytes([0, 72, 0, 4, action, 0, 0, 0, 0]) + bytes([0, 73, 0, 4, 0, action, action, action, action]) + line(3, 0, 2))
        for call_ in range(30):
            seeds += [users + bytes([8, call_, amount]) + line(0, 0, 2) for amount in (0, 1, 7, 9)]
        seeds.append(users + bytes([7, 0, 1]) + line(1, 0, 2) * 9 + bytes([7, 0, 0]) + bytes([9, 2, 63]) + connect(24, 16) + bytes([5, 200]))
    return seeds


# ---- files --------------------------------------------------------------------------------------------------------


def lines_of(path):
    lines = path.read_text().split("\n") if path.exists() else []
    return [bytes.fromhex(line) for line in lines if line and not line.startswith("#")]


def make(folder):
    for name in NAMES:
        target = pathlib.Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        seeds = {seed for seed in globals()[f"{name}_seeds"]() if len(seed) <= 1000}
        saved = lines_of(SAVED / f"{name}.hex") + lines_of(SAVED / f"{name}.found.hex")
        for seed in seeds | set(saved):
            (target / hashlib.sha1(seed).hexdigest()).write_bytes(seed)


def pack(name, folder):
    inputs = sorted((path.read_bytes() for path in pathlib.Path(folder).iterdir()), key=lambda data: (len(data), data))
    lines, size = [], 0
    for data in inputs:
        size += 2 * len(data) + 1
        if data and size <= PACKED:
            lines.append(data.hex() + "\n")
    SAVED.mkdir(exist_ok=True)
    (SAVED / f"{name}.hex").write_text("".join(lines))
    print(f"{name}: {len(lines)} of {len(inputs)} inputs")


if len(sys.argv) == 3 and sys.argv[1] == "make":
    make(sys.argv[2])
elif len(sys.argv) == 4 and sys.argv[1] == "pack" and sys.argv[2] in NAMES:
    pack(sys.argv[2], sys.argv[3])
else:
    sys.exit(__doc__)
