#!/usr/bin/python3
"""Runs the proxies of examples/deploy/ with the files that stand there, in front of a server that says what it sees.

    /usr/bin/python3 tests/interop/deploy_test.py --server BIN --rooms BIN [--only TEXT]

BIN is tests/interop/deploy_server.cpp and examples/rooms.cpp. Replaces paths, ports and certificates in copies of the
files, and starts nginx, HAProxy, Apache and Caddy in the foreground. Prints one line per check, then "N passed,
N failed", and ends with status 1 if a check failed. Needs Debian's nginx-light, haproxy, apache2-bin, caddy, systemd,
openssl, python3-h2 and python3-websockets.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time

import h2.config
import h2.connection
import h2.events
import websockets

sys.dont_write_bytecode = True
from expectations import TIMEOUT, Results, expect, expect_in  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEPLOY = os.path.join(ROOT, "examples", "deploy")
PING_INTERVAL = 20  # seconds: Limits::ping_interval
TOTAL_TIMEOUT = 540  # seconds for all checks
CLIENT = "127.0.0.2"  # the address of the clients; the server trusts only 127.0.0.1

# ---- checks -------------------------------------------------------------------------------------------------------

CHECKS = []
PROXY_CHECKS = []


def check(title):
    """Registers a function without arguments."""
    return lambda function: CHECKS.append((title, function))


def check_each_proxy(title, kind=object):
    """Registers a function that takes a running proxy. It runs once per proxy of this class."""
    return lambda function: PROXY_CHECKS.append((title, kind, function))


# ---- programs: child processes, stopped by their process ids ------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Program:
    """A child process with its output in a file."""

    running = []

    def __init__(self, *command, **more):
        self.output = tempfile.NamedTemporaryFile(dir=FOLDER, delete=False)
        # A session of its own: Apache sends signals to its whole group.
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT,
                                        start_new_session=True, **more)
        Program.running.append(self)

    def text(self):
        return os.pread(self.output.fileno(), 1024 * 1024, 0).decode(errors="replace")

    def wait_for(self, condition, what):
        end = time.monotonic() + TIMEOUT
        while not (result := condition()):
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"{what} did not happen; the output of {self.process.args[0]}: {self.text()}")
            time.sleep(0.02)
        return result

    def wait_for_text(self, pattern):
        return self.wait_for(lambda: re.search(pattern, self.text(), re.M), f"the output {pattern!r}")

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        if self in Program.running:
            Program.running.remove(self)
        try:
            return self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Server(Program):
    """deploy_server at these addresses."""

    def __init__(self, *addresses):
        super().__init__(os.path.abspath(OPTIONS.server), *addresses)
        self.port = int(self.wait_for_text(r"^ready (\d+)$")[1])


def in_folder(name):
    return os.path.join(FOLDER, name)


def write(name, text):
    with open(in_folder(name), "w", encoding="utf-8") as file:
        file.write(text)
    return in_folder(name)


def deployed(name, *replacements):
    """The text of a file in examples/deploy/. Each text to replace must be there."""
    with open(os.path.join(DEPLOY, name), encoding="utf-8") as file:
        text = file.read()
    for old, new in replacements:
        expect_in(old, text, name)
        text = text.replace(old, new)
    return text


def accepts(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ---- proxies ------------------------------------------------------------------------------------------------------


class Proxy:
    """A proxy on free ports, and the server behind it."""

    redirects = True  # from http to https
    unix = False
    program = server = None

    def start(self):
        address = "unix:" + in_folder("chat.sock") if self.unix else "127.0.0.1:0"
        self.server = Server(address)
        self.address = address if self.unix else f"127.0.0.1:{self.server.port}"
        self.https, self.http = free_port(), free_port()
        self.program = self.run()
        self.program.wait_for(lambda: accepts(self.https), "the start")
        self.wait_for_page()

    def wait_for_page(self):
        self.program.wait_for(lambda: self.get("/")[0] == 200, "an answer of the chat")

    def restart_server(self):
        self.server = Server(self.address)

    def stop(self):
        for program in (self.program, self.server):
            if program is not None:
                program.stop()

    @property
    def origin(self):
        return f"https://chat.example:{self.https}"

    def get(self, path):
        """The status, the headers and the body of a page."""
        connection = http.client.HTTPSConnection("chat.example", self.https, timeout=TIMEOUT, context=trusting())
        raw = socket.create_connection(("127.0.0.1", self.https), TIMEOUT, (CLIENT, 0))
        connection.sock = trusting().wrap_socket(raw, server_hostname="chat.example")
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()

    def connect(self, path="/chat", **more):
        more.setdefault("origin", self.origin)
        return websockets.connect(
            f"wss://chat.example:{self.https}{path}", host="127.0.0.1", port=self.https, local_addr=(CLIENT, 0),
            ssl=trusting(), server_hostname="chat.example", max_size=None, open_timeout=TIMEOUT, ping_interval=None,
            close_timeout=TIMEOUT, **more)


class Nginx(Proxy):
    name = "nginx"

    def run(self):
        upstream = [("    # server unix:/run/wschat/chat.sock;", f"    server {self.address};"),
                    ("    server 127.0.0.1:8888;\n", "")] if self.unix else [("127.0.0.1:8888", self.address)]
        site = write("nginx-chat.conf", deployed(
            "nginx.conf", ("    listen [::]:443 ssl http2;\n", ""), ("    listen [::]:80;\n", ""),
            ("listen 443", f"listen 127.0.0.1:{self.https}"), ("listen 80", f"listen 127.0.0.1:{self.http}"),
            ("/etc/letsencrypt/live/chat.example/fullchain.pem", in_folder("cert.pem")),
            ("/etc/letsencrypt/live/chat.example/privkey.pem", in_folder("key.pem")), *upstream))
        temporary = " ".join(f"{name}_temp_path {in_folder('nginx-' + name)};"
                             for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        main = write("nginx.conf", f"""
            daemon off;
            user root;
            worker_processes 1;
            pid {in_folder('nginx.pid')};
            error_log stderr;
            events {{ worker_connections 256; }}
            http {{ access_log off; {temporary} include {site}; }}""")
        return Program("nginx", "-e", "stderr", "-p", FOLDER, "-c", main)


class NginxUnix(Nginx):
    name = "nginx with a Unix socket"
    unix = True


class HAProxy(Proxy):
    name = "HAProxy"

    def run(self):
        config = write("haproxy.cfg", deployed(
            "haproxy.cfg", ("bind :443", f"bind 127.0.0.1:{self.https}"), ("bind :80", f"bind 127.0.0.1:{self.http}"),
            ("/etc/haproxy/certs/chat.example.pem", in_folder("both.pem")), ("127.0.0.1:8888", self.address),
            ("maxconn 20000", "maxconn 200"), ("inter 2s", "inter 100ms")))
        return Program("haproxy", "-db", "-f", config)


class Apache(Proxy):
    name = "Apache"
    redirects = False  # it has no host for port 80

    def run(self):
        site = write("apache-chat.conf", deployed(
            "apache.conf", ("*:443", f"127.0.0.1:{self.https}"), ("127.0.0.1:8888", self.address),
            ("/etc/letsencrypt/live/chat.example/fullchain.pem", in_folder("cert.pem")),
            ("/etc/letsencrypt/live/chat.example/privkey.pem", in_folder("key.pem"))))
        modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in (
            "mpm_event", "authz_core", "headers", "proxy", "proxy_http", "ssl"))
        main = write("apache.conf", f"""
ServerRoot {FOLDER}
ServerName localhost
DefaultRuntimeDir {FOLDER}
PidFile {in_folder('apache.pid')}
ErrorLog /dev/stderr
{modules}
User #{os.getuid() or 33}
Group #{os.getgid() or 33}
Listen 127.0.0.1:{self.https}
Include {site}
""")
        return Program("apache2", "-D", "FOREGROUND", "-f", main)


class Caddy(Proxy):
    name = "Caddy"
    redirects = False  # they are turned off here, because they need port 80

    def run(self):
        site = deployed("Caddyfile", (
            "\nchat.example {\n", f"\nhttps://chat.example:{self.https} {{\n\tbind 127.0.0.1\n"
            f"\ttls {in_folder('cert.pem')} {in_folder('key.pem')}\n"), ("127.0.0.1:8888", self.address))
        main = write("Caddyfile", "{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + site)
        home = {**os.environ, "HOME": FOLDER, "XDG_CONFIG_HOME": FOLDER, "XDG_DATA_HOME": FOLDER}
        return Program("caddy", "run", "--config", main, "--adapter", "caddyfile", env=home)


PROXIES = [Nginx, NginxUnix, HAProxy, Apache, Caddy]

# ---- clients ------------------------------------------------------------------------------------------------------


def make_certificate():
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-days", "2", "-subj", "/CN=chat.example", "-addext", "subjectAltName=DNS:chat.example",
                    "-keyout", in_folder("key.pem"), "-out", in_folder("cert.pem")], check=True, capture_output=True)
    with open(in_folder("both.pem"), "wb") as both:
        for name in ("cert.pem", "key.pem"):
            with open(in_folder(name), "rb") as file:
                both.write(file.read())


def trusting():
    return ssl.create_default_context(cafile=in_folder("cert.pem"))


def run_async(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT))


async def status_of(proxy, *path, **more):
    """The status of the answer to an upgrade."""
    try:
        async with proxy.connect(*path, **more):
            return 101
    except websockets.InvalidStatusCode as error:
        return error.status_code


# ---- each proxy ---------------------------------------------------------------------------------------------------


@check_each_proxy("a page arrives over https, and the server sees the client's address")
def _(proxy):
    status, _, body = proxy.get("/")
    expect((status, body), (200, f"a page over https for {CLIENT}\n"))
    expect(proxy.get("/nothing")[0], 404, "the status of another page")
    if proxy.redirects:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.http, timeout=TIMEOUT)
        connection.request("GET", "/x?y=z", headers={"Host": "chat.example"})
        response = connection.getresponse()
        expect((response.status, response.getheader("location")), (301, "https://chat.example/x?y=z"))
        connection.close()


@check_each_proxy("a page of the proxy's name connects; the server sees the client's address, https and the host")
def _(proxy):
    async def connect(**headers):
        async with proxy.connect("/chat?name=%C3%84nna", extra_headers=headers) as client:
            seen = json.loads(await client.recv())
            expect(seen, {"address": CLIENT, "scheme": "https", "host": f"chat.example:{proxy.https}", "forwarded": "",
                          "path": "/chat?name=%C3%84nna"}, "what the server sees")

    run_async(connect())
    # What a client writes itself changes nothing.
    run_async(connect(**{"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "http",
                         "Forwarded": "for=203.0.113.9"}))


@check_each_proxy("pages of other origins are refused")
def _(proxy):
    for origin in ("https://evil.example", f"http://chat.example:{proxy.https}", "https://chat.example", "null"):
        expect(run_async(status_of(proxy, origin=origin)), 403, f"the status for {origin}")
    expect(run_async(status_of(proxy, "/nothing")), 404, "the status of another path")


@check_each_proxy("texts, bytes and large messages arrive unchanged")
def _(proxy):
    async def echo():
        async with proxy.connect() as client:
            await client.recv()
            for message in ("", "hello 😀", b"\0\1\xff", "x" * 65536, b"y" * (1024 * 1024)):
                await client.send(message)
                expect(await client.recv(), message, "the echo")

    run_async(echo())


@check_each_proxy("a client speaks WebSocket over HTTP/2 (RFC 8441)", HAProxy)
def _(proxy):
    context = trusting()
    context.set_alpn_protocols(["h2"])
    raw = socket.create_connection(("127.0.0.1", proxy.https), TIMEOUT, (CLIENT, 0))
    with context.wrap_socket(raw, server_hostname="chat.example") as tls:
        expect(tls.selected_alpn_protocol(), "h2", "ALPN")
        client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        client.initiate_connection()
        answer, received = {}, b""

        def exchange(condition):
            nonlocal received
            while not condition():
                tls.sendall(client.data_to_send())
                data = tls.recv(65536)
                expect(data != b"", True, "the connection is open")
                for event in client.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived):
                        answer.update(event.headers)
                    elif isinstance(event, h2.events.DataReceived):
                        received += event.data
                        client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

        exchange(lambda: client.remote_settings.enable_connect_protocol == 1)
        client.send_headers(1, [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "https"),
                                (":path", "/chat"), (":authority", f"chat.example:{proxy.https}"),
                                ("origin", proxy.origin), ("sec-websocket-version", "13")])
        exchange(lambda: answer)
        expect(answer[":status"], "200", "the status")
        exchange(lambda: b'"scheme":"https"' in received)
        # RFC 6455 5.7: "Hello" in a masked frame, and the echo in an unmasked frame.
        client.send_data(1, bytes.fromhex("818537fa213d7f9f4d5158"))
        exchange(lambda: received.endswith(bytes.fromhex("810548656c6c6f")))


@check_each_proxy("pings and pongs pass in both directions")
def _(proxy):
    async def ping():
        async with proxy.connect() as client:
            await client.recv()
            await client.send("ping")
            expect(await client.recv(), "pong: are you there?", "the report of the server")
            await (await client.ping(b"and you?"))

    run_async(ping())


@check_each_proxy("close codes pass in both directions")
def _(proxy):
    async def close():
        async with proxy.connect() as client:
            await client.recv()
            await client.send("close 4001")
            await client.wait_closed()
            expect((client.close_code, client.close_reason), (4001, "as you wish"), "what the client got")
        async with proxy.connect() as client:
            await client.recv()
            await client.close(4002, "enough")

    run_async(close())
    proxy.server.wait_for_text("^closed 4002$")


@check_each_proxy("if the server restarts, clients get 1001 and can connect again")
def _(proxy):
    async def going_away():
        async with proxy.connect() as client:
            await client.recv()
            expect(await asyncio.to_thread(proxy.server.stop), 0, "the status of the server")
            await client.wait_closed()
            expect(client.close_code, 1001, "the close code")

    run_async(going_away())
    for _ in range(3):  # the first one may use a connection that was open
        expect(proxy.get("/")[0] in (502, 503), True, "whether the proxy says that the server is away")
    proxy.restart_server()
    proxy.wait_for_page()

    async def again():
        async with proxy.connect() as client:
            expect(json.loads(await client.recv())["address"], CLIENT, "the address")

    run_async(again())


# ---- the files ----------------------------------------------------------------------------------------------------


@check("the timeouts of the proxies are longer than the ping interval of the server")
def _():
    found = {
        "nginx.conf": re.findall(r"proxy_(?:read|send)_timeout (\d+)s;", deployed("nginx.conf")),
        "haproxy.cfg": re.findall(r"timeout (?:client|server|tunnel) (\d+)s", deployed("haproxy.cfg")),
        "haproxy-tcp.cfg": re.findall(r"timeout (?:client|server) (\d+)s", deployed("haproxy-tcp.cfg")),
        "apache.conf": re.findall(r"timeout=(\d+)", deployed("apache.conf")),
    }
    expect({name: len(numbers) for name, numbers in found.items()},
           {"nginx.conf": 2, "haproxy.cfg": 3, "haproxy-tcp.cfg": 2, "apache.conf": 1}, "the number of timeouts")
    for name, numbers in found.items():
        for number in numbers:
            expect(int(number) > 2 * PING_INTERVAL, True, f"{name}: whether {number} s is long enough")


@check("HAProxy in TCP mode sends the client's address in a PROXY header, and the server believes only that")
def _():
    server, port = Server("127.0.0.1:0", "--proxied"), free_port()
    config = write("haproxy-tcp.cfg", deployed(
        "haproxy-tcp.cfg", ("bind :443", f"bind 127.0.0.1:{port}"), ("maxconn 20000", "maxconn 200"),
        ("127.0.0.1:8443", f"127.0.0.1:{server.port}"), ("inter 2s", "inter 50ms")))
    proxy = Program("haproxy", "-db", "-f", config)

    def page(source):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT, source_address=(source, 0))
        with contextlib.closing(connection):
            connection.request("GET", "/", headers={"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"})
            return connection.getresponse().read().decode()

    async def talk():
        async with websockets.connect(f"ws://127.0.0.1:{port}/chat", local_addr=(CLIENT, 0)) as client:
            expect(json.loads(await client.recv())["address"], CLIENT, "the address")
            await client.send("close 4001")
            await client.wait_closed()
            expect(client.close_code, 4001, "the close code")

    try:
        proxy.wait_for(lambda: accepts(port), "the start")
        for source in (CLIENT, "127.0.0.3"):
            expect(page(source), f"a page over http for {source}\n", "the page")
        run_async(talk())
        time.sleep(0.2)  # some health checks
        expect(proxy.text().count("DOWN"), 0, "how often HAProxy thinks that the server is away")
    finally:
        proxy.stop()
        server.stop()


@check("the chat of examples/rooms.cpp works behind nginx, with --trust")
def _():
    proxy = Nginx()
    server = Program(os.path.abspath(OPTIONS.rooms), "0", "--trust", "127.0.0.1")
    try:
        port = server.wait_for_text(r"http://127\.0\.0\.1:(\d+)/")[1]
        proxy.address, proxy.https, proxy.http = f"127.0.0.1:{port}", free_port(), free_port()
        proxy.program = proxy.run()
        proxy.program.wait_for(lambda: accepts(proxy.https), "the start")
        expect_in("<title>", proxy.get("/")[2], "the page")

        async def talk():
            async with proxy.connect("/chat/tea?name=Anna") as anna, proxy.connect("/chat/tea?name=Bert") as bert:
                await anna.send("hello, Bert")
                while (event := json.loads(await bert.recv()))["type"] != "said":
                    pass
                expect((event["name"], event["text"]), ("Anna", "hello, Bert"), "the message")

        run_async(talk())
    finally:
        proxy.stop()
        server.stop()


@check("systemd accepts the units, and finds little that the service could do to the system")
def _():
    folder = in_folder("units")
    os.mkdir(folder)
    for name in ("wschat.socket", "wschat.service"):
        replacements = [("/usr/local/bin/rooms", os.path.abspath(OPTIONS.rooms))] if name == "wschat.service" else []
        write(os.path.join("units", name), deployed(name, *replacements))
    units = [os.path.join(folder, name) for name in ("wschat.socket", "wschat.service")]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT)
    complaints = [line for line in done.stdout.splitlines() if "wschat" in line]
    expect((done.returncode, complaints), (0, []), "the status and the complaints")
    done = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--threshold=20", units[1]],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT)
    expect(done.returncode, 0, "the status of systemd-analyze security, with " + done.stdout[-300:])


@check("with a socket that systemd holds, a client that connects during a restart is not refused")
def _():
    port = free_port()
    activation = Program("systemd-socket-activate", "-l", f"127.0.0.1:{port}", os.path.abspath(OPTIONS.server), "fd:3")
    try:
        activation.wait_for(lambda: accepts(port), "the start")  # it becomes the server when a client connects
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        connection.request("GET", "/")
        expect(connection.getresponse().status, 200, "the status of the page")
        connection.close()
    finally:
        activation.stop()

    with socket.create_server(("127.0.0.1", 0)) as listener:  # in the place of systemd
        def start():
            return Program(os.path.abspath(OPTIONS.server), "fd:3", preexec_fn=lambda: os.dup2(listener.fileno(), 3),
                           pass_fds=(3,))

        server = start()
        server.wait_for_text("^ready ")
        expect(server.stop(), 0, "the status of the first server")
        connection = http.client.HTTPConnection(*listener.getsockname(), timeout=TIMEOUT)
        connection.request("GET", "/")  # no server is running
        server = start()
        try:
            expect(connection.getresponse().status, 200, "the status of the page")
            connection.close()
        finally:
            server.stop()


@check("the Dockerfile copies files that exist, and its command compiles")
def _():
    text = deployed("Dockerfile")
    folder = in_folder("image")
    for line in re.findall(r"^COPY (?!--)(.*)$", text, re.M):
        *sources, target = line.split()
        os.makedirs(folder + target, exist_ok=True)
        for source in sources:
            shutil.copy(os.path.join(ROOT, source), folder + target)
    command = re.search(r"^RUN (g\+\+ .*)$", text, re.M)[1]
    command = command.replace("/src/", folder + "/src/").replace("-O2", "-fsyntax-only")
    subprocess.run(command.split(), check=True, timeout=10 * TIMEOUT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--rooms", required=True)
    parser.add_argument("--only", default="", help="run the checks whose titles contain this text")
    OPTIONS = parser.parse_args()
    results = Results()

    def run_check(title, function):
        if OPTIONS.only and OPTIONS.only not in title and not title.endswith(("starts with its file", ": ends")):
            return
        results.run(title, function)

    def run_checks(proxy):
        for title, kind, function in PROXY_CHECKS:
            if isinstance(proxy, kind):
                run_check(f"{proxy.name}: {title}", lambda function=function: function(proxy))

    def give_up(*_):
        for program in list(Program.running):
            program.stop()
        sys.exit(f"the checks took longer than {TOTAL_TIMEOUT} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TOTAL_TIMEOUT)
    os.environ["PATH"] += ":/usr/sbin"
    with tempfile.TemporaryDirectory(prefix="wschat-deploy-") as FOLDER:
        os.chmod(FOLDER, 0o755)  # Apache's workers are another user
        make_certificate()
        for proxy in [make() for make in PROXIES]:
            run_check(f"{proxy.name}: starts with its file", proxy.start)
            run_checks(proxy)
            run_check(f"{proxy.name}: ends", proxy.stop)
        for title, function in CHECKS:
            run_check(title, function)
        for program in list(Program.running):
            program.stop()
    results.end()
