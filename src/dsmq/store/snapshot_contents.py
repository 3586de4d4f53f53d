"""The tables of a snapshot besides those of messages: the store's state and remembered puts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from dsmq.store.dedup import Deduplicator, Producer
from dsmq.store.schema import Batch

# Max remembered ranges of lost ids and max last numbers in all of them. The last range is always kept in full.
MAX_LOST, MAX_LOST_NUMBERS = 100, 100_000
# Max producers copied while the lock is held.
COPY_PRODUCERS = 20


class Lost(NamedTuple):
    """A range of ids that were lost when the server was killed and restarted from an older snapshot."""

    after: int
    """The last id in that snapshot."""
    last: int
    """The last id of the range. The next run continues from here."""
    numbers: dict[bytes, int]
    """Each topic's last number in that snapshot. The next run continues from these."""


class LostRanges:
    """The ranges of ids of an epoch that were lost, oldest first. If there are many, the oldest are dropped."""

    def __init__(self, ranges: Iterable[Lost] = ()) -> None:
        self.ranges = list(ranges)

    def add(self, lost: Lost) -> None:
        ranges = self.ranges
        while len(ranges) >= MAX_LOST or sum(len(one.numbers) for one in ranges) > MAX_LOST_NUMBERS:
            del ranges[0]
        ranges.append(lost)

    def restored_number(self, topic: bytes, after: int) -> int:
        """Return `TopicStats.restored_number` for a reader that has read up to `after`."""
        ranges = [one for one in self.ranges if one.after < after <= one.last] or self.ranges
        return ranges[-1].numbers.get(topic, 0) if ranges else 0


class SnapshotState(NamedTuple):
    """The state of a store at one instant."""

    epoch: str
    run: str
    clock: int
    """In milliseconds, on the same clock as put times."""
    last_id: int
    last_row: int
    """The id of the newest topic."""
    forgot_at: int | None
    """As in `Deduplicator`."""
    written_at: float
    """Unix time of that instant."""
    is_last: bool
    """Whether it was written on a clean shutdown, so that no message was put after it."""
    empty_topics: dict[bytes, tuple[int, int]]
    """For each topic without messages, its last number and id; for others, those of the last dropped message."""
    lost: list[Lost]


def copy_state(lock: AbstractContextManager[None], state: SnapshotState, puts: Deduplicator) -> Iterator[Batch]:
    """Iterate over the rows of the tables in `SNAPSHOT_SCHEMA`. Takes the store's lock for one batch at a time."""
    with lock:
        names = puts.names()
    for first in range(0, len(names), COPY_PRODUCERS):
        with lock:
            producers = puts.copy(names[first : first + COPY_PRODUCERS], state.last_id)
        yield from _producer_batches(producers, first)
    # Write this last, because a producer may be forgotten before it is copied.
    yield "INSERT INTO state VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [state._replace(forgot_at=puts.forgot_at)[:8]]
    empty = [(name, *last) for name, last in state.empty_topics.items()]
    yield "INSERT INTO empty_topics VALUES (?, ?, ?)", empty
    for after, last, numbers in state.lost:
        yield "INSERT INTO lost VALUES (?, ?)", [(None, after), (None, last), *numbers.items()]


def _producer_batches(producers: dict[bytes, Producer], first_row: int) -> Iterator[Batch]:
    rows = [(row, name, producer) for row, (name, producer) in enumerate(producers.items(), first_row)]
    found = [(row, name, producer.forgotten, producer.last_at) for row, name, producer in rows]
    yield "INSERT INTO producers VALUES (?, ?, ?, ?)", found
    puts = [(row, *put) for row, _, producer in rows for put in producer.puts.items()]
    yield "INSERT INTO puts VALUES (?, ?, ?)", puts


def read_state(source: sqlite3.Connection) -> SnapshotState:
    *values, is_last = source.execute("SELECT * FROM state").fetchone()
    empty = {name: (number, last_id) for name, number, last_id in source.execute("SELECT * FROM empty_topics")}
    return SnapshotState._make([*values, bool(is_last), empty, _read_lost(source)])


def _read_lost(source: sqlite3.Connection) -> list[Lost]:
    lost: list[Lost] = []
    rows = source.execute("SELECT name, number FROM lost ORDER BY rowid")
    for name, number in rows:
        if name is None:
            lost.append(Lost(number, next(rows)[1], {}))
        else:
            lost[-1].numbers[name] = number
    return lost


def read_producers(source: sqlite3.Connection) -> dict[bytes, Producer]:
    rows = source.execute("SELECT producer, seq, message FROM puts ORDER BY rowid")
    puts = {producer: {seq: message for _, seq, message in of} for producer, of in groupby(rows, itemgetter(0))}
    producers = source.execute("SELECT id, name, forgotten, last_at FROM producers ORDER BY id")
    return {name: Producer(puts.get(row, {}), forgotten, last_at) for row, name, forgotten, last_at in producers}
