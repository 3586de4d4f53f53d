"""Facts in a NATS stream, such as purges, which all servers apply at their position among the messages."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from dsmq.errors import Full
from dsmq.store.nats import NATSStore
from dsmq.store.selection import Selection
from dsmq.store.sqlite import MirrorStore
from helpers import wait_until
from store.test_nats import Stores, bodies, in_engine, put, read, stores, value
from store.test_purge import limit_slices

__all__ = ["stores"]


def purge(store: NATSStore, *words: bytes) -> int:
    """Purge like the broker, which may request a slice twice."""
    count = 0
    slices = store.purge(Selection(words))
    for found in slices:
        count += value(found)
        if isinstance(found, Future) and found.done():
            count += value(found)
    return count


def test_all_servers_apply_purge_even_if_started_later(stores: Stores) -> None:
    one, other = stores(), stores()
    topics = b"a/1", b"a/*.\xff", b"b"
    for topic in topics:
        put(one, topic, *[b"x"] * 700)
    assert purge(one, b"a/*", b"c") == 1400
    put(one, topics[0], b"new")
    assert purge(other, b"b") == 700
    assert purge(other, b"b") == 0
    # Like a restarted server.
    late = stores()
    for store in one, other, late:
        assert [bodies(read(store, topic)) for topic in topics] == [[b"new"], [], []]
        # Readers count the others as missed.
        assert read(store, topics[0])[0].number == 701
        assert (store.in_memory.totals().messages, store.in_memory.totals().expired) == (1, 2100)
    put(late, b"b", b"y")
    assert read(one, b"b")[0].number == 701


def test_read_that_waits_for_the_mirror_waits_for_a_purge(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = stores(), stores()
    put(one, b"t", *[b"x"] * 5_000)
    begun, slices = MirrorStore.purge, []

    def count(store: MirrorStore, selection: Selection) -> Any:
        for found in begun(store, selection):
            slices.append(found)
            yield found

    monkeypatch.setattr(MirrorStore, "purge", count)
    limit_slices(monkeypatch)
    assert purge(one, b"*") == 5_000
    # The other server may still be applying it. This read waits until that server has everything that the engine has.
    assert value(other.latest(b"t", 0)) == []
    assert read(other, b"t") == []
    assert other.in_memory.totals().messages == 0
    # At least two at each server.
    assert len(slices) >= 4


def test_messages_arriving_during_purge_are_applied_after_it(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    store, resume = stores(), []

    def wait(_: MirrorStore, __: Selection) -> Any:
        while not resume:
            yield 0

    monkeypatch.setattr(MirrorStore, "purge", wait)
    slices = store.purge(Selection([b"t"]))
    first = next(slices)
    wait_until(lambda: store.mirror._change is not None)
    [message_id] = put(store, b"t", b"x")
    later = store.read(b"t", 0, 9, 99)
    assert store.mirror.store.last_id() < message_id
    resume.append(True)
    assert value(first) == 0
    assert bodies(value(later)) == [b"x"]


def test_purge_that_fails_is_logged_and_does_not_stop_the_mirror(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = stores()

    def fail(_: MirrorStore, __: Selection) -> Any:
        yield 0
        raise MemoryError

    monkeypatch.setattr(MirrorStore, "purge", fail)
    assert purge(store, b"t") == 0
    put(store, b"t", b"x")
    assert bodies(read(store, b"t")) == [b"x"]
    assert store.engine().skipped_messages == 1
    assert "can't be applied" in caplog.text


def test_purge_of_a_full_stream_is_refused(stores: Stores) -> None:
    store = stores()
    name = stores.stream

    async def fill(stream: Any) -> None:
        config = (await stream.stream_info(name)).config
        config.max_bytes = (await stream.stream_info(name)).state.bytes
        await stream.update_stream(config)

    in_engine(stores.servers, fill)
    with pytest.raises(Full):
        purge(store, b"t")
