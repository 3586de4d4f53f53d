"""What the tests share: servers, in this process or in one of their own, and raw connections to them."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsmq import settings as config
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import ReplyError
from dsmq.server import Server
from dsmq.wire.resp import Reply, ReplyParser, encode_request

# All timing in the tests is in this unit, in seconds: long enough that a busy machine does not matter.
UNIT = float(os.environ.get("DSMQ_TEST_UNIT", "0.1"))
# What is to happen has to within this.
SOON = 300 * UNIT


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller has set for dsmq is nothing to the tests."""
    for name in list(os.environ):
        if name.startswith("DSMQ_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """Every test ends its own threads. That of the log lives as long as the process.

    A handler of the log that a command left would go on writing to what was standard error in its test.
    """
    before = set(threading.enumerate())
    logger = logging.getLogger("dsmq")
    handlers = logger.handlers[:]
    yield
    logger.handlers[:] = handlers
    names = [thread.name for thread in set(threading.enumerate()) - before]
    left = [name for name in names if name.startswith("dsmq-") and name != "dsmq-log"]
    assert not left


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Whoever runs the tests in the background ignores SIGINT, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def serving(**settings: object) -> Iterator[Server]:
    """A server in this process, on a free port, that serves in threads of its own."""
    effective = config.load(kind=config.EmbeddedSettings, **{"port": 0, **settings})
    with Server(effective) as server:
        yield server


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Callable[[], DSMQClientSideConnection]]:
    """A function that makes clients, which are closed in the end."""
    clients: list[DSMQClientSideConnection] = []

    def make() -> DSMQClientSideConnection:
        clients.append(connect(port=server.port, retry=False))
        return clients[-1]

    yield make
    for one in clients:
        one.close()


@contextmanager
def blocked(server: Server) -> Iterator[threading.Event]:
    """A server that does nothing until the event is set."""
    release, begun = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        release.wait(SOON)

    server._workers[0].post(block)
    assert begun.wait(SOON)
    try:
        yield release
    finally:
        release.set()


def wait_until(condition: Callable[[], bool]) -> None:
    """For what the server does without telling: look until it is so."""
    until = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < until
        time.sleep(UNIT / 20)


class Wire:
    """A connection on which a test says what it likes, byte by byte."""

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
        """Be told, as dsmq's own clients are, what was not asked for."""
        assert isinstance(self.call("HELLO", 2, "NOTICES"), list)

    def ended(self) -> bool:
        """Whether the server has closed, or does so soon."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()


@contextmanager
def wire_to(server: Server) -> Iterator[Wire]:
    wire = Wire(("127.0.0.1", server.port))
    try:
        yield wire
    finally:
        wire.close()


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with wire_to(server) as wire:
        yield wire


def as_map(reply: object) -> dict[bytes, object]:
    assert isinstance(reply, list)
    return dict(zip(reply[::2], reply[1::2], strict=True))


def scrape(server: Server) -> dict[str, float]:
    """All samples by name; those with a label as `name{value of the label}`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=SOON) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


class Daemon:
    """`dsmq serve` in a process of its own, on free ports."""

    def __init__(self, *options: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "dsmq", "serve", "--port", "0", "--http-port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.log: list[str] = []
        self.port = int(self.wait_for_line(r"serves on .*?:(\d+)(?: |,)")[1])
        self.http_port = int(self.wait_for_line(r"metrics on http://.*?:(\d+)/")[1])

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        """Return the match of the next line of the log that has one."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no line like {pattern!r} in:\n{''.join(self.log)}")

    def stop(self) -> int:
        """Stop it as systemd would; return its exit status."""
        self.process.terminate()
        _, rest = self.process.communicate(timeout=SOON)
        self.log.append(rest)
        return self.process.returncode


@contextmanager
def daemon(*options: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> Iterator[Daemon]:
    daemon = Daemon(*options, env=env, prefix=prefix)
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.stop()
        if daemon.process.stderr:
            daemon.process.stderr.close()


def run_dsmq(
    *arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line to its end; `prefix` is a command that runs it."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "dsmq", *arguments],
        input=stdin,
        capture_output=True,
        timeout=SOON * 3,
        env={**os.environ, **(env or {})},
        check=False,
    )


def tool(name: str, package: str) -> str:
    """The path of a program, or the reason to skip."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian's package {package})")
    return path


def without_privileges() -> list[str]:
    """The command that takes from root what makes it root; nothing, where it is not root that runs the tests."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root, and setpriv is not installed (Debian's package util-linux)")
    return ["setpriv", "--bounding-set=-net_bind_service,-dac_override,-dac_read_search"]


ROOT = Path(__file__).parent.parent
