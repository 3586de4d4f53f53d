"""The store in a NATS stream prefers the node that leads it."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import ExitStack
from pathlib import Path

import nats
import pytest

from dsmq.store import nats_leader
from dsmq.store.api import Limits, RetriedKey
from dsmq.store.nats import NATSStore
from dsmq.system import boot_time
from engine import Engine, Node, engine
from helpers import SOON, wait_until


def step_down(running: Engine) -> Node:
    """Make another node the leader; return it."""

    async def ask() -> None:
        client = await nats.connect([f"nats://{host}:{port}" for host, port in running.servers])
        await client.request("$JS.API.STREAM.LEADER.STEPDOWN.dsmq", b"", timeout=SOON)
        await client.close()

    before = running.leader()
    asyncio.run(ask())
    wait_until(lambda: running.leader() is not before)
    return running.leader()


def test_store_moves_to_the_leader_and_stores_puts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_leader, "PAUSE_SECONDS", 0.1)
    with engine(tmp_path) as running, ExitStack() as stack:
        reasons: list[str] = []
        store = NATSStore(running.servers)
        stack.callback(store.close)
        store.start(lambda _: None, reasons.append)
        assert store.wait(SOON)
        ids: list[object] = []

        def put_until_at(leader: Node) -> None:
            def put() -> bool:
                ids.extend(store.append([(b"t", b"x", None)]).result(SOON))  # type: ignore[union-attr]
                return store.connection.server == leader.name

            wait_until(put)

        put_until_at(running.leader())
        put_until_at(step_down(running))
        put_until_at(step_down(running))
        messages = store.read(b"t", 0, len(ids) + 1, 1_000_000)
        wait_until(lambda: store.in_memory.totals().messages >= len(ids))
        messages = store.read(b"t", 0, len(ids) + 1, 1_000_000)
        assert isinstance(messages, list)
        assert [message.id for message in messages] == ids
        assert reasons == []


def test_read_of_a_full_stream_is_fresh_while_a_node_is_down(tmp_path: Path) -> None:
    with engine(tmp_path) as running, ExitStack() as stack:
        store = NATSStore(running.servers)
        stack.callback(store.close)
        store.limits = Limits(max_stored_bytes=100_000)
        store.start(lambda _: None, lambda _: None)
        assert store.wait(SOON)

        def put(number: int, size: int) -> object:
            # As a retry, so that the engine is asked even if the mirror is full.
            return store.append([(b"t", b"x" * size, RetriedKey(b"p", number))]).result(SOON)[0]  # type: ignore[union-attr]

        numbers = itertools.count()
        for size in (20_000, 100, 1):
            while isinstance(put(next(numbers), size), int):
                pass
        next(node for node in running.nodes if node is not running.leader()).kill()
        wait_until(lambda: store.stream.sole_leader_until < boot_time())
        assert store.read(b"empty", 0, 1, 1).result(SOON) == []  # type: ignore[union-attr]
