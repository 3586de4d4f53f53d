"""Puts to a store in a NATS stream that is deleted while their outcome is unknown."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dsmq.errors import Unsure
from dsmq.store import nats_stream
from dsmq.store.api import Answer, Limits, Outcome, Put, RetriedKey, TopicRule
from dsmq.store.nats import NATSStore
from dsmq.store.nats_api import EngineError
from dsmq.store.nats_requests import Ack
from engine import engine
from helpers import SOON, wait_until
from store.test_nats import Stores, bodies, in_engine, keyed, put, read, stores, value

__all__ = ["stores"]

Call = Callable[[Ack | None], None]


class Held:
    """Holds the engine's answers to a store's requests."""

    def __init__(self, store: NATSStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = store
        self.answered: list[Call] = []
        self._send = store.requests.send
        monkeypatch.setattr(store.requests, "send", self._hold)

    def _hold(self, encode: Callable[[bytes], bytes], seconds: float, call: Call) -> None:
        self._send(encode, seconds, lambda _: self.answered.append(call))

    def lose(self) -> None:
        """Lose the answers held so far, and hold no more."""
        self.store.post(self._lose)

    def _lose(self) -> None:
        self.store.requests.send = self._send  # type: ignore[method-assign]
        for call in self.answered:
            call(None)


def stay(store: NATSStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a store from noticing new messages and new epochs."""

    async def fail() -> None:
        raise EngineError("busy")

    monkeypatch.setattr(store.stream, "state", fail)
    monkeypatch.setattr(store.connection, "on_received", lambda: None)


def delete_stream(stores: Stores, known: NATSStore) -> None:
    """Delete the stream and wait until this server uses a new one."""
    before = known.epoch
    in_engine(stores.servers, lambda stream: stream.delete_stream(stores.stream))
    wait_until(lambda: known.epoch != before and not known.unready_reason)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_put_stored_in_the_deleted_stream_is_not_stored_again(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, together: bool, count: int
) -> None:
    one, other = stores(), stores()
    held = Held(one, monkeypatch)
    append = one.append_together if together else one.append
    answer: Answer[list[Outcome]] = append([keyed(b"t", b"%d" % number, number) for number in range(count)])
    wait_until(lambda: len(held.answered) == 1)
    # Clients of the other server may have read it.
    assert len(read(other, b"t")) == count
    delete_stream(stores, other)
    held.lose()
    assert [type(outcome) for outcome in value(answer)] == [Unsure] * count
    assert read(other, b"t") == []
    wait_until(lambda: one.epoch == other.epoch and not one.unready_reason)
    put(one, b"t", b"later")
    assert bodies(read(other, b"t")) == [b"later"]


@pytest.mark.parametrize("together", [False, True])
def test_repeated_put_is_not_stored_in_a_stream_that_its_server_does_not_know(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    one, other = stores(), stores()
    stay(other, monkeypatch)
    run = other.run
    value(one.append([keyed(b"t", b"x", 1)]))
    delete_stream(stores, one)
    assert other.run == run
    again: list[Put] = [(b"t", b"x", RetriedKey(b"p", 1, run))]
    append = other.append_together if together else other.append
    assert [type(outcome) for outcome in value(append(again))] == [Unsure]
    assert read(one, b"t") == []


def test_repeated_put_is_not_stored_if_its_server_has_just_begun_the_new_epoch(stores: Stores) -> None:
    store = stores()
    run = store.run
    value(store.append([keyed(b"t", b"x", 1)]))
    delete_stream(stores, store)
    # The server compared the runs before it began the new one.
    again: Put = b"t", b"x", RetriedKey(b"p", 1, run)
    assert [type(outcome) for outcome in value(store.append([again, keyed(b"t", b"y", 2)]))] == [Unsure, int]
    assert bodies(read(store, b"t")) == [b"y"]


def test_repeated_puts_of_several_servers_are_stored(stores: Stores) -> None:
    made = [stores() for _ in range(3)]
    sent = [
        (b"%d %d" % (at, number), RetriedKey(b"p%d" % at, number, store.run), store)
        for number in range(50)
        for at, store in enumerate(made)
    ]
    answers = [store.append([(b"t", body, key)]) for body, key, store in sent]
    assert all(isinstance(value(answer)[0], int) for answer in answers)
    assert sorted(bodies(read(made[0], b"t"))) == sorted(body for body, _, _ in sent)


@pytest.mark.slow
def test_stream_keeps_its_epoch_and_rules_when_an_old_node_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that starts deletes all messages older than max_age, even those that never expire."""
    monkeypatch.setattr(nats_stream, "_MIN_MARGIN_SECONDS", 1)
    with engine(tmp_path, 1) as running, ExitStack() as stack:
        [node], began = running.nodes, time.monotonic()
        made = Stores(running.servers, stack)
        store = made(6_000, Limits(topic=(TopicRule(b"t", max_messages=3),)))
        epoch, limits = store.epoch, store.limits
        put(store, b"t", b"1")
        wait_until(lambda: time.monotonic() - began > 8)
        node.stop()
        node.start()
        [outcome] = value(store.append([(b"t", b"2", RetriedKey(b"p", 1, store.run))]))
        assert isinstance(outcome, int)
        late = made(6_000)
        assert (store.epoch, late.epoch) == (epoch, epoch)
        assert late.limits.topic == limits.topic
        assert not made.reasons


def test_messages_that_the_stream_needs_are_renewed(stores: Stores) -> None:
    servers = stores(100, Limits(topic=(TopicRule(b"t", max_messages=3),))), stores(100)
    subjects = [f"{stores.stream}.{part}" for part in ("genesis", "facts.rules")]

    async def last_ids(stream: Any) -> list[int]:
        return [(await stream.get_last_msg(stores.stream, subject)).seq for subject in subjects]

    before = in_engine(stores.servers, last_ids)
    wait_until(lambda: all(map(operator.gt, in_engine(stores.servers, last_ids), before)))
    again: Put = b"t", b"x", RetriedKey(b"p", 1, servers[0].run)
    assert [isinstance(value(one.append([again]))[0], int) for one in servers] == [True, True]
    assert servers[0].epoch == servers[1].epoch


def test_epoch_that_has_lost_its_messages_has_no_mark(stores: Stores) -> None:
    store = stores()
    run = store.run
    asyncio.run_coroutine_threadsafe(store.stream.epochs.end(run), store._loop).result(SOON)
    wait_until(lambda: store.run != run and not store.unready_reason)
    # The stream may have lost it.
    again: Put = b"t", b"x", RetriedKey(b"p", 1, run)
    assert [type(outcome) for outcome in value(store.append([again]))] == [Unsure]
