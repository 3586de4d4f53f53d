"""Purges: messages deleted on request."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace

import pytest

from dsmq.errors import StoreFailed
from dsmq.store import removal
from dsmq.store.api import Limits
from dsmq.store.database import EXPIRY_BYTES
from dsmq.store.schema import MAX_ROW_BYTES
from dsmq.store.selection import Selection
from dsmq.store.sqlite import SQLiteStore


@pytest.fixture
def store() -> Iterator[SQLiteStore]:
    with closing(SQLiteStore(600_000, limits=Limits())) as store:
        yield store


def bodies(store: SQLiteStore, topic: bytes) -> list[bytes]:
    return [message.body for message in store.read(topic, 0, 1_000, 2**20)]


def test_purge_deletes_written_and_buffered_messages_of_matching_topics(store: SQLiteStore) -> None:
    for number in range(50):
        store.append([(b"a/1", b"%d" % number, None), (b"a/2", b"x", None), (b"b", b"kept", None)])
    store.flush()
    store.append([(b"a/1", b"buffered", None)])
    assert sum(store.purge(Selection([b"a/*"]))) == 101
    assert (bodies(store, b"a/1"), bodies(store, b"a/2"), bodies(store, b"b")) == ([], [], [b"kept"] * 50)
    totals = store.totals()
    assert (totals.messages, totals.bytes, totals.topics, totals.expired) == (50, 200, 1, 101)
    # Numbers and ids go on.
    assert store.append([(b"a/1", b"new", None)]) == [152]
    assert [message.number for message in store.read(b"a/1", 0, 9, 99)] == [52]


def limit_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time for a slice be over at the second check, however fast the machine is."""
    clock = itertools.count(0, 0.6 * removal.SLICE_SECONDS)
    monkeypatch.setattr(removal, "time", SimpleNamespace(monotonic=lambda: next(clock)))


def test_purge_keeps_messages_put_meanwhile(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append([(b"t", b"%d" % number, None) for number in range(20_000)])
    limit_slices(monkeypatch)
    slices = store.purge(Selection([b"t"]))
    count = next(slices)
    assert 0 < count < 20_000
    store.append([(b"t", b"later", None), (b"new", b"later", None)])
    store.flush()
    assert count + sum(slices) == 20_000
    assert bodies(store, b"t") == bodies(store, b"new") == [b"later"]
    assert store.totals().messages == 2


def test_purge_locks_the_store_only_for_short_slices(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append([(b"t%d" % (number % 2), b"x" * 100, None) for number in range(20_000)])
    limit_slices(monkeypatch)
    counts = list(store.purge(Selection([b"*"])))
    assert sum(counts) == 20_000
    assert max(counts) * 100 <= EXPIRY_BYTES + MAX_ROW_BYTES


def test_purge_without_messages_returns_zero(store: SQLiteStore) -> None:
    assert sum(store.purge(Selection([b"t", b"*"]))) == 0


def test_purge_is_refused_while_a_snapshot_is_written(store: SQLiteStore) -> None:
    store.append([(b"t", b"x", None)])
    with store.snapshot(0.0, is_last=False, file=None, on_progress=lambda: None) as batches:
        with pytest.raises(StoreFailed, match="a snapshot is being written"):
            sum(store.purge(Selection([b"t"])))
        assert bodies(store, b"t") == [b"x"]
        list(batches)
    assert sum(store.purge(Selection([b"t"]))) == 1
