"""Repeated puts (AGAIN) to a store in a NATS stream, together with defects and limits."""

from __future__ import annotations

import time

import pytest

from dsmq.errors import Forgotten, Full, Unsure
from dsmq.store import nats_stream
from dsmq.store.api import Limits, Outcome, Put, RetriedKey
from dsmq.store.nats import NATSStore
from helpers import wait_until
from store.test_nats import Stores, keyed, put, read, stores, value

__all__ = ["stores"]


def again(seq: int, body: bytes = b"x") -> Put:
    return b"t", body, RetriedKey(b"p", seq)


def test_retried_put_is_published_although_the_mirror_is_full(stores: Stores) -> None:
    store = stores(limits=Limits(max_stored_messages=1, max_topics=1))
    [first] = value(store.append([keyed(b"t", b"x", 1)]))
    wait_until(lambda: store.in_memory.totals().messages == 1)
    with pytest.raises(Full):
        store.append([keyed(b"t", b"x", 2)])
    assert value(store.append([again(1)])) == [first]
    # An earlier attempt may be on its way to the mirror.
    [second] = value(store.append([again(2)]))
    assert isinstance(second, int)
    assert value(store.append([again(2)])) == [second]
    assert [message.id for message in read(store, b"t")] == [first, second]


def test_retried_put_refused_by_full_engine_is_unsure(stores: Stores) -> None:
    store = stores(limits=Limits(max_stored_bytes=100_000))
    outcomes: list[Outcome] = []
    while not outcomes or isinstance(outcomes[-1], int):
        outcomes += value(store.append([again(len(outcomes), b"x" * 20_000)]))
    assert len(outcomes) > 3
    assert isinstance(outcomes[-1], Unsure)


def test_retried_put_stored_twice_by_engine_gets_first_id(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_stream, "DEDUPLICATION_SECONDS", 1)
    store = stores()
    [first] = value(store.append([keyed(b"t", b"x", 1)]))
    put(store, b"t", b"y")
    time.sleep(1.5)
    # Pretend that the mirror lags.
    monkeypatch.setattr(store.mirror.store, "check", lambda puts: [None] * len(puts))
    assert value(store.append([again(1), again(2)]))[0] == first
    # The engine answers with the id of the second copy.
    assert value(store.append([keyed(b"t", b"x", 1)])) == [first]
    assert len(read(store, b"t")) == 3


def test_new_mirror_of_stream_with_expired_puts_forgets_producers(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_stream, "_MIN_MARGIN_SECONDS", 0)
    one = stores(max_age_ms=1_000)
    value(one.append([keyed(b"t", b"x", 1)]))
    whole = stores(max_age_ms=1_000)
    time.sleep(1.5)
    late = stores(max_age_ms=1_000)
    for store in (one, whole):
        store.in_memory.check_producer(b"p")
        store.in_memory.check_producer(b"new")
    with pytest.raises(Forgotten):
        late.in_memory.check_producer(b"p")
    value(late.append([keyed(b"t", b"x", 1, b"new")]))
    wait_until(lambda: knows(late, b"new"))


def knows(store: NATSStore, producer: bytes) -> bool:
    try:
        store.in_memory.check_producer(producer)
    except Forgotten:
        return False
    return True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_defect_when_a_put_is_acknowledged_ends_the_thread(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stores()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(store.publisher, "_outcomes", fail)
    store.append([keyed(b"t", b"x", 1)])
    wait_until(lambda: not store.thread.is_alive())


def test_store_that_leaves_node_closes_without_pending_tasks(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    import asyncio
    import gc

    for pause in (0, 0.002, 0.005):
        store = stores()
        asyncio.run_coroutine_threadsafe(store.stream.leave_node(), store._loop)
        time.sleep(pause)
        store.close()
        gc.collect()
    assert "destroyed" not in caplog.text
