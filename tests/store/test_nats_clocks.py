"""Ages of messages if the wall clock of a server or of a node is wrong."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import nats
import pytest

import wrong_clock
from conftest import tool
from dsmq.store import nats_stream
from dsmq.store.api import Limits, Message
from dsmq.store.nats import NATSStore
from engine import Engine, engine
from helpers import HOST, SOON, Daemon, Wire, wait_until
from store.test_nats import value

pytestmark = pytest.mark.slow

# Long enough for a busy machine and much less than the clocks' error.
MAX_AGE, MARGIN = 30, 10
SETTINGS = {"store_replicas": 1, "max_age_seconds": MAX_AGE, "expiry_interval_seconds": 0.1}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with engine(tmp_path_factory.mktemp("nats"), 1) as running:
        yield running


@pytest.mark.parametrize("shift", ["+1h", "-1h"])
def test_wrong_clock_of_a_server_changes_no_age(node: Engine, shift: str) -> None:
    # Don't run the server through the program, which would be stopped instead of the server.
    tool("faketime", "faketime")
    [library] = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    env = {"LD_PRELOAD": str(library), "FAKETIME": shift}
    stream = "ahead" if shift[0] == "+" else "behind"
    settings = {**SETTINGS, "store": f"nats://{HOST}:{node.nodes[0].port}", "store_stream": stream}
    with ExitStack() as stack:
        right, wrong = Daemon(**settings), Daemon(env=env, **settings)
        stack.callback(right.close)
        stack.callback(wrong.close)
        assert clock(wrong) != clock(right)
        for server in (right, wrong):
            wire(stack, server).call("PUT", "t", "x")
        late = Daemon(env=env, **settings)
        stack.callback(late.close)
        readers = [wire(stack, server) for server in (right, wrong, late)]
        # Both messages were just put, on a server that followed the stream, and on one that copied it.
        for reader in readers:
            assert [age < MARGIN * 1000 for age in ages(reader)] == [True, True]
        for reader in readers:
            wait_until(lambda reader=reader: not ages(reader), MAX_AGE + MARGIN)  # type: ignore[misc]


def wire(stack: ExitStack, server: Daemon) -> Wire:
    made = Wire((server.host, server.port))
    stack.callback(made.close)
    return made


def ages(reader: Wire) -> list[int]:
    """Return the ages of all messages, in milliseconds."""
    reply = reader.call("READ", "t", 0)
    assert isinstance(reply, list), reply
    return [int(age) for age in reply[2::5]]  # type: ignore[call-overload]


def clock(server: Daemon) -> str:
    """Return the hour at which a server logged its start."""
    return server.log()[:13]


# A node that is ahead, and one that is behind; the third is right.
SHIFTS = {0: 3600, 1: -3600}
# Longer than a busy machine takes to start a server and to read from it.
SHORT_AGE_MS, MARGIN_SECONDS = 5_000, 1


@pytest.fixture
def wrong_nodes(tmp_path: Path) -> Iterator[Engine]:
    if not wrong_clock.works():
        pytest.skip("changing the clock of a process is not allowed here")
    with engine(tmp_path, prefixes={at: wrong_clock.prefix(seconds) for at, seconds in SHIFTS.items()}) as running:
        yield running


def test_wrong_clocks_of_nodes_change_nothing_while_the_leader_stays(
    wrong_nodes: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nats_stream, "_MIN_MARGIN_SECONDS", MARGIN_SECONDS)
    with ExitStack() as stack:
        new = partial(new_store, wrong_nodes, stack)
        # Each node leads one stream and has a copy of the others.
        streams = [node.name for node in wrong_nodes.nodes]
        for stream in streams:
            new(stream)
            asyncio.run(make_leader(wrong_nodes, stream))
        early = {stream: new(stream) for stream in streams}
        stack.enter_context(putting(list(early.values())))
        # The nodes have then deleted messages by their own clocks.
        time.sleep(SHORT_AGE_MS / 1000 + 3 * MARGIN_SECONDS)
        for stream, first in early.items():
            for _ in range(4):
                seen = messages(new(stream))
                known = messages(first)
                assert max(one.age_ms for one in seen + known) < SHORT_AGE_MS + 1000 * MARGIN_SECONDS
                # Count only messages that are not about to expire.
                young = [one.id for one in known if one.age_ms < SHORT_AGE_MS / 2 and one.id <= seen[-1].id]
                assert young
                assert [one[:2] for one in seen if one.id >= young[0]] == [one[:2] for one in known if one.id in young]
        assert [wrong_nodes.leader(stream).name for stream in streams] == streams
        for said in ("n0 is 3600 s ahead of this machine's", "n1 is 3600 s behind this machine's"):
            assert f"the clock of NATS server {said}" in caplog.text


def new_store(running: Engine, stack: ExitStack, stream: str) -> NATSStore:
    store = NATSStore(running.servers, stream=stream)
    store.max_age_ms, store.limits = SHORT_AGE_MS, Limits()
    store.start(lambda _: None, lambda _: None)
    stack.callback(store.close)
    assert store.wait(SOON)
    return store


async def make_leader(running: Engine, name: str) -> None:
    """Make a node the leader of the stream with the same name."""
    client = await nats.connect([f"nats://{host}:{port}" for host, port in running.servers])
    try:
        while running.leader(name).name != name:
            wanted = json.dumps({"placement": {"preferred": name}}).encode()
            await client.request(f"$JS.API.STREAM.LEADER.STEPDOWN.{name}", wanted, timeout=SOON)
            await asyncio.sleep(0.2)
    finally:
        await client.close()


@contextmanager
def putting(stores: list[NATSStore]) -> Iterator[None]:
    """Put a message into each of the stores ten times a second."""
    is_over = threading.Event()

    def work() -> None:
        while not is_over.wait(0.1):
            for store in stores:
                value(store.append([(b"t", b"x", None)]))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(SOON)


def messages(store: NATSStore) -> list[Message]:
    store.in_memory.expire()
    return value(store.read(b"t", 0, 1000, 1_000_000))
