"""A redis-server for a test: on a free port of 127.0.0.1, with a folder of its own."""

import shutil
import signal
import socket
import subprocess
import tempfile


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RedisServer:
    """launch() starts the process, and answers() tells when it is ready."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="wschat-redis-")
        self.port = free_port()
        self.process = None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def launch(self, *options, before=()):
        """`before`: a command that starts the process, such as setpriv."""
        self.process = subprocess.Popen(
            [*before, "redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--dir", self.folder, "--loglevel", "warning", *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers(self):
        return "PONG" in self.cli("ping")

    def cli(self, *words, timeout=60):
        return subprocess.run(["redis-cli", "-p", str(self.port), *words], capture_output=True, text=True,
                              timeout=timeout).stdout

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def remove(self):
        self.kill()
        shutil.rmtree(self.folder)
