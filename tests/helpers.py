"""Helpers that don't need pytest: servers in their own processes, raw connections, waiting."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import ReplyError
from dsmq.server import Server
from dsmq.wire.resp import Reply, ReplyParser, encode_request

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
# The unit of all times in the tests, in seconds; long enough for a busy machine.
UNIT = float(os.environ.get("DSMQ_TEST_UNIT", "0.1"))
# The timeout for anything that must happen.
SOON = 300 * UNIT


def store_settings() -> dict[str, object]:
    """Return the settings of a new server's store; `pytest --store` replaces this function."""
    return {}


def reached(condition: Callable[[], bool], seconds: float = SOON) -> bool:
    """Poll until the condition holds; return whether it did in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(UNIT / 20)
    return True


def wait_until(condition: Callable[[], bool], seconds: float = SOON) -> None:
    """Poll until the condition holds; fail if it does not in time."""
    assert reached(condition, seconds), f"not within {seconds:g} s"


@contextmanager
def black_hole() -> Iterator[tuple[str, int]]:
    """An address that neither answers nor refuses, because its listen queue is full."""

    def is_full() -> bool:
        with socket.socket() as probe:
            probe.settimeout(UNIT)
            try:
                probe.connect(listener.getsockname())
            except TimeoutError:
                return True
            return False

    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind((HOST, 0))
        listener.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        wait_until(is_full)
        yield listener.getsockname()


@contextmanager
def refusing_address() -> Iterator[tuple[str, int]]:
    """An address without a listener. While it is bound, no other process gets it."""
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        yield bound.getsockname()


class Wire:
    """A raw connection to a server."""

    def __init__(self, address: tuple[str, int] | str, source: str | None = None) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(SOON)
        if source:
            self.socket.bind((source, 0))
        self.socket.connect(address)
        self._parser = ReplyParser()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> Reply:
        while (reply := self._parser.next()) is None:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self._parser.feed(data)
        return reply[0]

    def call(self, *arguments: bytes | str | int) -> Reply:
        """Send a request and return its reply; an error is returned, not raised."""
        words = [word if isinstance(word, bytes) else str(word).encode() for word in arguments]
        self.send(encode_request(*words))
        return self.receive()

    def error(self, *arguments: bytes | str | int) -> str:
        """Send a request and return the code of the error that answers it."""
        reply = self.call(*arguments)
        assert isinstance(reply, ReplyError), reply
        return reply.code

    def ask_for_notices(self) -> None:
        """Request notices, as dsmq's own clients do."""
        assert isinstance(self.call("HELLO", 2, "NOTICES"), list)

    def ended(self) -> bool:
        """Return whether the server closes the connection."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()


def as_map(reply: object) -> dict[bytes, object]:
    assert isinstance(reply, list)
    return dict(zip(reply[::2], reply[1::2], strict=True))


def scrape(server: Server) -> dict[str, float]:
    """Return all samples by name; those with a label as `name{value of the label}`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=SOON) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


class Process:
    """A running process, measured through /proc."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def _status(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found is not None, name
        return int(found[1])

    @property
    def memory(self) -> int:
        """Resident memory in bytes."""
        return self._status("VmRSS") * 1024

    @property
    def peak_memory(self) -> int:
        """Peak resident memory since `forget_peak`, in bytes."""
        return self._status("VmHWM") * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    @property
    def threads(self) -> int:
        return self._status("Threads")

    @property
    def files(self) -> int:
        """Number of open file descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def state(self) -> str:
        """The state as in /proc: R, S, D, T (stopped) or Z."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Daemon(Process):
    """`dsmq serve` in its own process, on free ports, logging to a file."""

    def __init__(
        self,
        *options: str,
        command: Sequence[str] = (sys.executable, "-m", "dsmq", "serve"),
        prefix: Sequence[str] = (),
        env: dict[str, str] | None = None,
        popen: dict[str, Any] | None = None,
        ca_file: str = "",
        **settings: object,
    ) -> None:
        """Settings are passed through the environment; clients trust ca_file."""
        self._file = tempfile.NamedTemporaryFile("w")  # noqa: SIM115 - closed by stop()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DSMQ_")}
        environment |= {"DSMQ_PORT": "0", "DSMQ_HTTP_PORT": "0"}
        settings = store_settings() | settings
        environment |= {f"DSMQ_{name.upper()}": str(value) for name, value in settings.items()}
        # If this were a pipe that nothing reads, it would block the process once it is full.
        self.process = subprocess.Popen(
            [*prefix, *command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._file,
            env={**environment, **(env or {})},
            **(popen or {}),
        )
        super().__init__(self.process.pid)
        token = str(settings.get("auth_token", ""))
        self.security = {name: value for name, value in (("token", token), ("ca_file", ca_file)) if value}
        # A certificate is valid for a name.
        self.host = "localhost" if ca_file else HOST
        self._lines_read = 0
        try:
            port = re.search(r":(\d+)(?: |,)", self.wait_for_line(r"listening on (.*)")[1] + " ")
            self.port = int(port[1]) if port else 0
            self.http_port = int(self.wait_for_line(r"metrics on http://.*?:(\d+)/")[1])
        except BaseException:
            self.close()
            raise

    def log(self) -> str:
        """Return its log, even after it has stopped."""
        if self._file.closed:
            return self._last_log
        # Seeking in the process's own file would move its write position.
        return Path(self._file.name).read_text(errors="replace")

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        """Return the match in the next matching line of the log."""
        found: list[re.Match[str]] = []

        def matched() -> bool:
            ended = self.process.poll() is not None
            for line in self.log().splitlines(keepends=True)[self._lines_read :]:
                if not line.endswith("\n"):
                    break
                self._lines_read += 1
                if match := re.search(pattern, line):
                    found.append(match)
                    return True
            return ended

        wait_until(matched)
        assert found, f"no line like {pattern!r} in:\n{self.log()}"
        return found[0]

    def client(self, **options: Any) -> DSMQClientSideConnection:
        return connect(self.host, self.port, **self.security, **options)

    def fetch(self, path: str = "/metrics", timeout: float = 5.0) -> str:
        """Return a page of the HTTP endpoint. Raises OSError."""
        with urllib.request.urlopen(f"http://{HOST}:{self.http_port}{path}", timeout=timeout) as page:
            return str(page.read().decode())

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels; 0 if it has no samples."""
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.fetch(), re.MULTILINE))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Stop it as systemd would; return its exit status. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(SOON)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if not self._file.closed:
            self._last_log = self.log()
            self._file.close()
        return self.process.returncode

    def close(self) -> None:
        self.stop()


@contextmanager
def daemon(*options: str, **others: Any) -> Iterator[Daemon]:
    """Run a Daemon; its log can still be read after it has stopped."""
    daemon = Daemon(*options, **others)
    try:
        yield daemon
    finally:
        daemon.stop()


@contextmanager
def forked(run: Callable[[], object] = str) -> Iterator[str]:
    """Fork a child process that lives until the end of the block; return the result of `run` in it, as text."""
    result, output = os.pipe()
    wait, end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(end)
            os.write(output, str(run()).encode() or b" ")
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(output)
    os.close(wait)
    try:
        yield os.read(result, 65536).decode()
    finally:
        os.close(end)
        os.waitpid(child, 0)
        os.close(result)


def open_sockets() -> set[str]:
    """Return the open sockets of this process, by inode."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {link for link in links if link.startswith("socket:")}
