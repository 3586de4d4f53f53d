"""Shared by the tests: servers in this process or their own, raw connections, and clocks."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from xdist.scheduler import LoadScopeScheduling

import dsmq.client
import helpers
from dsmq import aio
from dsmq import settings as config
from dsmq.broker.event_loop import EventLoop
from dsmq.broker.poller import SelectorPoller
from dsmq.client import DSMQClientSideConnection, connect, reader, requests, session
from dsmq.server import Server
from dsmq.store.api import Store
from dsmq.store.sqlite import SQLiteStore
from engine import Engine, engine
from helpers import (
    HOST,
    ROOT,
    SOON,
    UNIT,
    Daemon,
    Wire,
    as_map,
    black_hole,
    daemon,
    reached,
    refusing_address,
    scrape,
    wait_until,
)
from security import ADMIN, TOKENS, Files
from shared_store import Nodes, Streams, number_from_one

__all__ = [
    "HOST",
    "ROOT",
    "SOON",
    "UNIT",
    "Daemon",
    "Wire",
    "as_map",
    "black_hole",
    "daemon",
    "reached",
    "refusing_address",
    "scrape",
    "wait_until",
]


Resolve = Callable[..., None]

# Tests that share installations, builds or servers run in one process. They are grouped by file, because
# pytest-xdist's marker has no effect with pytest 9.2.
GROUPS = {
    "tests/clients/test_clients.py": "clients",
    "tests/deploy/": "deploy",
    "tests/ops/test_page.py": "browser",
    "tests/ops/test_prometheus.py": "deploy",
    "tests/store/test_nats_access.py": "nats access",
    "tests/test_rooms.py": "rooms",
}


class Scheduler(LoadScopeScheduling):
    """Sends each group of tests to one process and other tests to any."""

    def _split_scope(self, nodeid: str) -> str:
        return next((group for path, group in GROUPS.items() if nodeid.startswith(path)), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    return Scheduler(config, log)


# The tests that run over both stores: those of clients, protocol and promises.
OVER_BOTH_STORES = ("broker", "client", "clients", "promises", "wire", "test_server.py", "test_server_lifecycle.py")


def runs_over_both_stores(path: Path) -> bool:
    return path.relative_to(Path(__file__).parent).parts[0] in OVER_BOTH_STORES


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--store") != "sqlite":
        others = [item for item in items if item.get_closest_marker("embedded") or not runs_over_both_stores(item.path)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


STREAMS = pytest.StashKey[Streams]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store", choices=["sqlite", "nats"], default="sqlite", help="where the servers of the tests keep messages"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start the NATS cluster, once for all processes that run tests."""
    # Otherwise, each process that runs tests or is started by one compiles all modules again.
    sys.dont_write_bytecode = False
    if config.getoption("--store") == "sqlite":
        return
    worker = getattr(config, "workerinput", None)
    if worker is None:
        nodes = Nodes()
        config.add_cleanup(nodes.close)
    config.stash[STREAMS] = streams = Streams(worker["nodes"] if worker else nodes.ports)
    helpers.store_settings = streams.settings
    number_from_one()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the cluster's address to a process that runs tests."""
    if streams := node.config.stash.get(STREAMS, None):
        node.workerinput["nodes"] = streams.ports


@pytest.fixture(autouse=True)
def clean_streams(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if streams := request.config.stash.get(STREAMS, None):
        streams.remove()


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """Ignore the caller's settings of dsmq and of Python; undo the changes that a test makes."""
    before = os.environ.copy()
    for name in before:
        if name.startswith("DSMQ_") or name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """Every test must end its own threads, except the log's, which lives as long as the process.

    Removes log handlers left by a command, which would continue to write to their test's standard error.
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
    """Handle SIGINT: in a background job, it is ignored, even by the processes that tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def serving(store: Store | None = None, **settings: object) -> Iterator[Server]:
    """Run a server in this process, on a free port."""
    if store is None:
        settings = helpers.store_settings() | settings
    effective = config.load(kind=config.EmbeddedSettings, **{"port": 0, **settings})
    with Server(effective, store) as server:
        yield server


def reload(server: Server, **settings: object) -> None:
    """Make a server apply changed settings, as on SIGHUP."""
    changed = server.context.settings.model_copy(update=settings)
    server._load = lambda: changed
    server.reload()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[Daemon]:
    """A server for all tests that neither stop nor change it; each test uses its own topic."""
    with daemon() as process:
        yield process


@pytest.fixture(scope="session")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A NATS server for all tests that neither stop nor change it; each test uses its own stream."""
    with engine(tmp_path_factory.mktemp("nats"), 1) as running:
        yield running


@pytest.fixture
def states() -> list[str]:
    """For `on_state_change`: the states of a client."""
    return []


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


def wait_for_stored(server: Server, messages: int) -> None:
    """Wait until a server counts this many messages; with a shared store, it may answer puts earlier."""
    wait_until(lambda: server.status.totals().stored == messages)


@pytest.fixture
def long_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give clients plenty of time to disconnect after the last reply, however busy the machine is."""
    for module in ("transport", "admission"):
        monkeypatch.setattr(f"dsmq.broker.{module}.LINGER_SECONDS", 10 * SOON)


@pytest.fixture
def replies_after_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep replying to clients for a long time after a wrong token, however busy the machine is."""
    monkeypatch.setattr("dsmq.broker.login.WRONG_TOKEN_SECONDS", 10 * SOON)


class LethalStore(SQLiteStore):
    """Ends the expiry thread."""

    def expire(self) -> int:
        raise SystemExit


@contextmanager
def no_new_threads() -> Iterator[None]:
    """Make every start of a thread fail, because its stack would need too much memory."""
    before = threading.stack_size(2**50)
    try:
        yield
    finally:
        threading.stack_size(before)


class ClientClock:
    """The clocks of a client without I/O; they advance only when the test sets them."""

    def __init__(self) -> None:
        self.passed = 0.0
        """Seconds since the start, awake."""
        self.asleep = 0.0

    def monotonic(self) -> float:
        return 5000.0 + self.passed

    def boot_time(self) -> float:
        return self.monotonic() + self.asleep

    def time(self) -> float:
        return 1_700_000_000.0 + self.passed + self.asleep


@pytest.fixture
def client_clock(monkeypatch: pytest.MonkeyPatch) -> ClientClock:
    clock = ClientClock()
    for module, name in (
        (time, "monotonic"),
        (time, "time"),
        *((one, "boot_time") for one in (reader, requests, session)),
    ):
        monkeypatch.setattr(module, name, getattr(clock, name))
    return clock


@pytest.fixture
def retry_schedule(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that sets the retry schedule of dsmq 1.4: a number of tries and the first delay."""

    def schedule(tries: int, first: float = 0.01, name: str = "_n_tries") -> None:
        monkeypatch.setattr(dsmq.client, name, tries)
        monkeypatch.setattr(dsmq.client, "_initial_retry", first)

    return schedule


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """A function that makes a name resolve to these addresses, each a host or a host and a port."""
    real, names = socket.getaddrinfo, {}

    def getaddrinfo(host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        if host not in names:
            return real(host, port, *arguments, **options)
        if options.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        targets = [(to, port) if isinstance(to, str) else to for to in names[host]]
        return [found for target in targets for found in real(*target, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return lambda name, *addresses: names.update({name: addresses})


def loop_of(server: Server) -> EventLoop:
    """The server's first event loop."""
    return server._workers[0]


def watch_waits(
    loop: EventLoop, after: Callable[[list[Any]], object], before: Callable[[], object] = lambda: None
) -> None:
    """Call `before` and `after` around each wait of an event loop; `after` gets the sockets that are ready.

    The object that waits is replaced, because methods of compiled classes can't be.
    """
    poller = loop._poller
    name = "_selector" if isinstance(poller, SelectorPoller) else "_epoll"
    real = getattr(poller, name)

    def wait(found: Callable[[float], list[Any]], seconds: float) -> list[Any]:
        before()
        ready = found(seconds)
        after(ready)
        return ready

    class Watched:
        def __getattr__(self, name: str) -> Any:
            found = getattr(real, name)
            return partial(wait, found) if name in ("poll", "select") else found

    setattr(poller, name, Watched())


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
    """Return the path of a program; skips if it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian's package {package})")
    return path


def without_privileges() -> list[str]:
    """Return a command that drops root's privileges; empty if the tests do not run as root."""
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
