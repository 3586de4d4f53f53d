"""The store against a model in plain Python: random puts, reads, expiry and flushes."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from stores import (
    BIG,
    MAX_AGE,
    Clock,
    ClockedStore,
    a_message,
    a_put,
    read,
    refuse_inserts,
    stop_growing,
)

from dsmq.errors import Full, StoreFailed
from dsmq.store import database
from dsmq.store import sqlite as store_module
from dsmq.store import topics as topics_module
from dsmq.store.api import MESSAGE_OVERHEAD_BYTES, TOPIC_OVERHEAD_BYTES, Message, Put, TopicStats, Totals


class Row(NamedTuple):
    """A message in the model."""

    id: int
    topic: bytes
    number: int
    put_at: int
    body: bytes


class Model:
    """A store in plain Python, without regard to speed."""

    empty_topics = 1

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.last_id = 0
        self.held: list[Row] = []
        # Last number and id of each topic that is not forgotten.
        self.last: dict[bytes, tuple[int, int]] = {}
        self.keys: dict[tuple[bytes, int], int] = {}
        self.expired = 0

    def append(self, puts: list[Put]) -> list[int]:
        ids = []
        for topic, body, key in puts:
            if key is not None and key in self.keys:
                ids.append(self.keys[key])
                continue
            self.last_id += 1
            number = self.last.get(topic, (0, 0))[0] + 1
            self.last[topic] = number, self.last_id
            self.held.append(Row(self.last_id, topic, number, self.clock.now, body))
            if key is not None:
                self.keys[key] = self.last_id
            ids.append(self.last_id)
        return ids

    def eligible(self, topic: bytes, after: int) -> list[Message]:
        return [
            a_message(row.id, row.number, self.clock.now - row.put_at, row.body)
            for row in self.held
            if row.topic == topic and row.id > after and self.clock.now - row.put_at <= MAX_AGE
        ]

    def read(self, topic: bytes, after: int, count: int, max_bytes: int) -> list[Message]:
        found: list[Message] = []
        for message in self.eligible(topic, after)[:count]:
            if sum(len(other.body) for other in found) >= max_bytes:
                break
            found.append(message)
        return found

    def expire(self) -> int:
        old = [row for row in self.held if self.clock.now - row.put_at > MAX_AGE]
        self.held = [row for row in self.held if row not in old]
        self.expired += len(old)
        empty = sorted(set(self.last) - self.names(), key=lambda topic: self.last[topic][1])
        if old:
            for topic in empty[: max(0, len(empty) - self.empty_topics)]:
                del self.last[topic]
        return len(old)

    def names(self) -> set[bytes]:
        return {row.topic for row in self.held}

    def stats(self, topic: bytes) -> TopicStats:
        rows = [row for row in self.held if row.topic == topic]
        first_id, oldest = (rows[0].id, self.clock.now - rows[0].put_at) if rows else (0, 0)
        size = sum(len(row.body) for row in rows)
        return TopicStats(topic, len(rows), size, *self.last.get(topic, (0, 0)), first_id, oldest)

    def totals(self) -> Totals:
        size = sum(len(row.body) for row in self.held)
        oldest = max((self.clock.now - row.put_at for row in self.held), default=0)
        cost = size + len(self.held) * MESSAGE_OVERHEAD_BYTES
        cost += sum(len(name) + TOPIC_OVERHEAD_BYTES for name in self.names())
        stored = len(self.held) + self.expired
        return Totals(len(self.held), size, len(self.names()), stored, self.expired, 0, oldest, cost)


TOPICS = (b"a", b"b", b"\xc3\xa9", b"ab")
topics = st.sampled_from(TOPICS)
keys = st.none() | st.tuples(st.sampled_from([b"me", b"you"]), st.integers(0, 3))
puts = st.lists(st.builds(a_put, topics, st.binary(max_size=5), keys), max_size=6)
positions = st.integers(0, 40)


class StoreAndModel(RuleBasedStateMachine):
    """Does the same to both, and compares their results."""

    # By default, all bodies are in SQLite, which has no memory for BIG in `overflow`.
    long_bytes = sys.maxsize

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(database, "EXPIRY_ROWS", 3)
        self.patch.setattr(database, "LONG_BYTES", self.long_bytes)
        self.patch.setattr(store_module, "MAX_BUFFERED_MESSAGES", 7)
        self.patch.setattr(store_module, "FLUSH_MESSAGES", 3)
        self.patch.setattr(topics_module, "MAX_EMPTY_TOPICS", Model.empty_topics)
        self.clock = Clock()
        self.model = Model(self.clock)
        self.store = ClockedStore(MAX_AGE, self.clock)

    def teardown(self) -> None:
        self.store.close()
        self.patch.undo()

    @rule(puts=puts)
    def append(self, puts: list[Put]) -> None:
        assert self.store.append(puts) == self.model.append(puts)

    def append_or_raise(self, error: type[Exception], puts: list[Put]) -> None:
        try:
            ids = self.store.append(puts)
        except error:
            return
        assert ids == self.model.append(puts)

    @rule(puts=puts)
    def fail(self, puts: list[Put]) -> None:
        refuse_inserts(self.store)
        self.append_or_raise(StoreFailed, puts)
        self.store.connection.set_authorizer(None)
        self.clock.now += store_module.RETRY_MS

    @rule(puts=puts, topic=topics)
    def overflow(self, puts: list[Put], topic: bytes) -> None:
        stop_growing(self.store)
        self.append_or_raise(Full, [*puts, a_put(topic, BIG)])
        self.append_or_raise(Full, [a_put(topic, BIG)])
        self.clock.now += store_module.RETRY_MS
        self.store.connection.execute("PRAGMA max_page_count = 1000000")

    @rule(milliseconds=st.sampled_from([1, MAX_AGE // 2, MAX_AGE, MAX_AGE + 1]))
    def wait(self, milliseconds: int) -> None:
        self.clock.now += milliseconds

    @rule()
    def flush(self) -> None:
        self.store.flush()

    @rule()
    def expire(self) -> None:
        deleted = 0
        while slice_ := self.store.expire():
            deleted += slice_
        assert deleted == self.model.expire()

    @rule(topic=topics, after=positions, count=st.integers(1, 5), size=st.integers(1, 12))
    def read(self, topic: bytes, after: int, count: int, size: int) -> None:
        assert self.store.read(topic, after, count, size) == self.model.read(topic, after, count, size)

    @rule(topic=topics, after=positions)
    def latest(self, topic: bytes, after: int) -> None:
        assert self.store.latest(topic, after) == self.model.eligible(topic, after)[-1:]

    @rule(after=topics | st.just(b""), count=st.integers(1, 5))
    def page(self, after: bytes, count: int) -> None:
        names = sorted(name for name in self.model.names() if name > after)[:count]
        assert [topic[:3] for topic in self.store.topics(after, count)] == [
            self.model.stats(name)[:3] for name in names
        ]

    @invariant()
    def agree(self) -> None:
        assert self.store.last_id() == self.model.last_id
        # The model does not count unread messages; they have tests of their own.
        assert self.store.totals()._replace(expired_unread=0) == self.model.totals()
        for topic in TOPICS:
            assert self.store.stats(topic) == self.model.stats(topic)
            assert read(self.store, topic) == self.model.read(topic, 0, 1000, 1_000_000)


class StoreWithLongBodiesAndModel(StoreAndModel):
    long_bytes = 4


TestStoreAndModel = StoreAndModel.TestCase
TestStoreWithLongBodiesAndModel = StoreWithLongBodiesAndModel.TestCase
TestStoreAndModel.settings = TestStoreWithLongBodiesAndModel.settings = settings(
    # Explaining a failure would take a minute.
    phases=[phase for phase in Phase if phase is not Phase.explain],
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
)
