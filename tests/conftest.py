"""What the tests share: servers, in this process or in one of their own, and raw connections to them."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from dsmq import aio
from dsmq import settings as config
from dsmq.broker.event_loop import EventLoop
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.server import Server
from dsmq.store.api import Store
from dsmq.store.sqlite import SQLiteStore
from helpers import HOST, ROOT, SOON, UNIT, Daemon, Wire, as_map, daemon, reached, scrape, wait_until
from security import ADMIN, TOKENS, Files

__all__ = ["HOST", "ROOT", "SOON", "UNIT", "Daemon", "Wire", "as_map", "daemon", "reached", "scrape", "wait_until"]


# Tests that share what they install, build or start run in one process.
GROUPS = ("browser", "clients", "deploy")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in GROUPS:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore dsmq's settings in the caller's environment."""
    for name in list(os.environ):
        if name.startswith("DSMQ_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """Every test must end its own threads, except the log's, which lives as long as the process.

    Removes log handlers left by a command, which would go on writing to their test's standard error.
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
    """Handle SIGINT: in a background job it is ignored, also by the processes that tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def serving(store: Store | None = None, **settings: object) -> Iterator[Server]:
    """Run a server in this process, on a free port."""
    effective = config.load(kind=config.EmbeddedSettings, **{"port": 0, **settings})
    with Server(effective, store) as server:
        yield server


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Callable[[], DSMQClientSideConnection]]:
    """Return a function that connects clients; they are closed after the test."""
    clients: list[DSMQClientSideConnection] = []

    def make() -> DSMQClientSideConnection:
        clients.append(connect(port=server.port, retry=False))
        return clients[-1]

    yield make
    for one in clients:
        one.close()


class LethalStore(SQLiteStore):
    """Ends the expiry thread."""

    def expire(self) -> int:
        raise SystemExit


def loop_of(server: Server) -> EventLoop:
    """The server's first event loop."""
    return server._workers[0]


@contextmanager
def blocked(server: Server) -> Iterator[threading.Event]:
    """Block a server's event loop until the event is set."""
    release, begun = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        release.wait(SOON)

    loop_of(server).post(block)
    assert begun.wait(SOON)
    try:
        yield release
    finally:
        release.set()


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


# Tests of `connect`, in both clients

Connect = Callable[..., Any]


def connect_aio(*arguments: Any, **options: Any) -> None:
    async def scenario() -> None:
        await (await aio.connect(*arguments, **options)).close()

    asyncio.run(scenario())


CONNECTS = pytest.mark.parametrize("connect", [connect, connect_aio])


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(TOKENS)
    return file


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> Files:
    return Files(tmp_path, authority)


@pytest.fixture
def tls_server(files: Files) -> Iterator[Server]:
    with serving(tls_cert_file=files.server, auth_token=ADMIN) as server:
        yield server
