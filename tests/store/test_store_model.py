"""The store against a model in plain Python: random puts, reads, expiry and flushes."""

from __future__ import annotations

import copy
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from stores import (
    BIG,
    MAX_AGE,
    Clock,
    ClockedStore,
    a_put,
    read,
    refuse_inserts,
    stop_growing,
)

from dsmq.errors import Full, StoreFailed
from dsmq.store import database, snapshot_file
from dsmq.store import sqlite as store_module
from dsmq.store import topics as topics_module
from dsmq.store.api import (
    DROP_OLDEST,
    MESSAGE_OVERHEAD_BYTES,
    TOPIC_OVERHEAD_BYTES,
    Limits,
    Message,
    Put,
    TopicRule,
    TopicStats,
    Totals,
)
from dsmq.store.schema import Batch
from dsmq.store.selection import Selection


class Row(NamedTuple):
    """A message in the model."""

    id: int
    topic: bytes
    number: int
    put_at: int
    body: bytes


class Model:
    """A simple, slow store in plain Python."""

    empty_topics = 1

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.limits = Limits()
        self.last_id = 0
        self.held: list[Row] = []
        # Last number and id of each topic that is not forgotten.
        self.last: dict[bytes, tuple[int, int]] = {}
        self.keys: dict[tuple[bytes, int], int] = {}
        self.put = self.expired = 0
        self.dropped: Counter[bytes] = Counter()

    def rule(self, topic: bytes) -> TopicRule:
        limits = self.limits
        return next(
            (rule for rule in limits.topic if Selection([rule.pattern]).matches(topic)),
            TopicRule(b"*", limits.max_stored_messages_per_topic, limits.max_stored_bytes_per_topic, None, None),
        )

    def max_age(self, topic: bytes) -> int:
        return self.rule(topic).max_age_ms or MAX_AGE

    def drops(self, topic: bytes) -> bool:
        return (self.rule(topic).when_full or self.limits.when_full) == DROP_OLDEST

    def is_full(self, topic: bytes) -> bool:
        rule, rows = self.rule(topic), self.rows(topic)
        return len(rows) > (rule.max_messages or 1000) or cost(rows) > (rule.max_bytes or 10**9)

    def rows(self, topic: bytes) -> list[Row]:
        return [row for row in self.held if row.topic == topic]

    def append(self, puts: list[Put]) -> list[int]:
        """Raise Full if a topic without drop_oldest would be too full, or all topics together and no more can be
        dropped.
        """
        before = self.last_id, self.held[:], self.last.copy(), self.keys.copy(), self.put, self.dropped.copy()
        ids, new = [], []
        for topic, body, key in puts:
            if key is not None and key in self.keys:
                ids.append(self.keys[key])
                continue
            self.last_id += 1
            self.put += 1
            number = self.last.get(topic, (0, 0))[0] + 1
            self.last[topic] = number, self.last_id
            new.append(Row(self.last_id, topic, number, self.clock.now, body))
            self.held.append(new[-1])
            if key is not None:
                self.keys[key] = self.last_id
            ids.append(self.last_id)
        if not self.make_room(new):
            self.last_id, self.held, self.last, self.keys, self.put, self.dropped = before
            raise Full("full")
        return ids

    def make_room(self, new: list[Row]) -> bool:
        names = list(dict.fromkeys(row.topic for row in new))
        for name in names:
            if self.drops(name):
                if any(cost([row]) > (self.rule(name).max_bytes or 10**9) for row in new if row.topic == name):
                    return False
                self.trim(name)
            elif self.is_full(name):
                return False
        for name in names:
            while len(self.held) > self.limits.max_stored_messages and self.drops(name) and len(self.rows(name)) > 1:
                self.drop(name)
        return not new or len(self.held) <= self.limits.max_stored_messages

    def trim(self, topic: bytes) -> None:
        while self.is_full(topic) and len(self.rows(topic)) > 1:
            self.drop(topic)

    def drop(self, topic: bytes) -> None:
        self.held.remove(self.rows(topic)[0])
        self.dropped[topic] += 1

    def eligible(self, topic: bytes, after: int) -> list[Message]:
        now, max_age = self.clock.now, self.max_age(topic)
        return [
            Message(row.id, row.number, now - row.put_at, row.body, max_age - (now - row.put_at))
            for row in self.rows(topic)
            if row.id > after and now - row.put_at <= max_age
        ]

    def read(self, topic: bytes, after: int, count: int, max_bytes: int) -> list[Message]:
        found: list[Message] = []
        for message in self.eligible(topic, after)[:count]:
            if sum(len(other.body) for other in found) >= max_bytes:
                break
            found.append(message)
        return found

    def expire(self) -> int:
        dropped = self.dropped.total()
        for name in self.names():
            if self.drops(name):
                self.trim(name)
        old = [row for row in self.held if self.clock.now - row.put_at > self.max_age(row.topic)]
        self.held = [row for row in self.held if row not in old]
        self.expired += len(old)
        return len(old) + self.dropped.total() - dropped

    def names(self) -> set[bytes]:
        return {row.topic for row in self.held}

    def stats(self, topic: bytes) -> TopicStats:
        rows = self.rows(topic)
        first_id, oldest = (rows[0].id, self.clock.now - rows[0].put_at) if rows else (0, 0)
        size = sum(len(row.body) for row in rows)
        last = self.last.get(topic, (0, 0))
        return TopicStats(topic, len(rows), size, *last, first_id, oldest, 0, self.dropped[topic])

    def totals(self) -> Totals:
        size = sum(len(row.body) for row in self.held)
        oldest = max((self.clock.now - row.put_at for row in self.held), default=0)
        total = cost(self.held) + sum(len(name) + TOPIC_OVERHEAD_BYTES for name in self.names())
        counts = len(self.held), size, len(self.names()), self.put, self.expired
        return Totals(*counts, 0, oldest, total, self.dropped.total())


def cost(rows: list[Row]) -> int:
    return sum(len(row.body) + MESSAGE_OVERHEAD_BYTES for row in rows)


TOPICS = (b"a", b"b", b"\xc3\xa9", b"ab")
topics = st.sampled_from(TOPICS)
keys = st.none() | st.tuples(st.sampled_from([b"me", b"you"]), st.integers(0, 3))
puts = st.lists(st.builds(a_put, topics, st.binary(max_size=5), keys), max_size=6)
positions = st.integers(0, 40)
LIMITS = (
    Limits(),
    Limits(max_stored_messages_per_topic=4, when_full=DROP_OLDEST),
    Limits(max_stored_messages=9, when_full=DROP_OLDEST, topic=(TopicRule(b"b", when_full="refuse"),)),
    Limits(topic=(TopicRule(b"a", 3, when_full=DROP_OLDEST), TopicRule(b"a*", max_age_ms=2 * MAX_AGE))),
    Limits(topic=(TopicRule(b"a", 5, 2 * MESSAGE_OVERHEAD_BYTES + 7, MAX_AGE // 2, DROP_OLDEST), TopicRule(b"b", 3))),
)


class StoreAndModel(RuleBasedStateMachine):
    """Runs the same operations on both and compares the results."""

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
        # A snapshot that is being copied, and the model of its instant.
        self.copying: tuple[ExitStack, Iterator[Batch], sqlite3.Connection, Model] | None = None

    def teardown(self) -> None:
        if self.copying:
            self.copying[0].close()
            self.copying[2].close()
        self.store.close()
        self.patch.undo()

    @rule(puts=puts)
    def append(self, puts: list[Put]) -> None:
        try:
            ids = self.model.append(puts)
        except Full:
            with pytest.raises(Full):
                self.store.append(puts)
        else:
            assert self.store.append(puts) == ids

    @rule(limits=st.sampled_from(LIMITS))
    def change(self, limits: Limits) -> None:
        self.store.limits = self.model.limits = limits

    def append_or_raise(self, error: type[Exception], puts: list[Put]) -> None:
        try:
            ids = self.store.append(puts)
        except (error, Full):
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

    @precondition(lambda self: not self.copying)
    @rule()
    def expire(self) -> None:
        deleted = 0
        while slice_ := self.store.expire():
            deleted += slice_
        assert deleted == self.model.expire()
        # The order in which topics were emptied determines which are remembered.
        assert len(self.store._topics.empty) <= Model.empty_topics
        for name in set(self.model.last) - self.model.names() - set(self.store._topics.empty):
            del self.model.last[name]

    @precondition(lambda self: not self.copying)
    @rule()
    def begin_snapshot(self) -> None:
        stack = ExitStack()
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        target = sqlite3.connect(Path(folder, "snapshot"))
        target.execute("PRAGMA synchronous = OFF")
        snapshot_file.create_tables(target)
        batches = stack.enter_context(self.store.snapshot(0, is_last=True, file=None, on_progress=bool))
        model = copy.copy(self.model)
        model.held, model.last, model.keys = self.model.held[:], self.model.last.copy(), self.model.keys.copy()
        self.copying = stack, batches, target, model

    @precondition(lambda self: self.copying)
    @rule()
    def copy_some(self) -> None:
        assert self.copying
        _, batches, target, _ = self.copying
        for insert, rows in islice(batches, 1):
            target.executemany(insert, rows)

    @precondition(lambda self: self.copying)
    @rule()
    def restore(self) -> None:
        """Complete and restore the snapshot."""
        assert self.copying
        stack, batches, target, model = self.copying
        self.copying = None
        with stack, closing(target):
            for insert, rows in batches:
                target.executemany(insert, rows)
            target.commit()
            self.store.close()
            self.model, self.store = model, ClockedStore(MAX_AGE, self.clock, model.limits)
            then = self.clock.now
            # Messages age by the time that has passed since that instant.
            at = target.execute("SELECT clock FROM state").fetchone()[0]
            self.store.load(target, (then - at) / 1000)
        model.put, model.expired, model.dropped = 0, 0, Counter()

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
        expected, found = self.model.totals(), self.store.totals()._replace(expired_unread=0, overdue_ms=0)
        if self.model.dropped:
            # Pages of dropped messages may still be in use, because a snapshot has to copy them.
            assert found.accounted_bytes >= expected.accounted_bytes
            found = found._replace(accounted_bytes=expected.accounted_bytes)
        assert found == expected
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
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
)
