"""What a snapshot contains: the store's tables, and its state in a few tables beside them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

from dsmq.store.dedup import Producer
from dsmq.store.schema import INSERT_ROW, StoredMessage, pack

TABLES = """
CREATE TABLE state (
    epoch TEXT NOT NULL,
    run TEXT NOT NULL,
    clock INTEGER NOT NULL,
    last_id INTEGER NOT NULL,
    last_row INTEGER NOT NULL,
    forgot_at INTEGER,
    written_at REAL NOT NULL,
    is_last INTEGER NOT NULL
);
CREATE TABLE empty_topics (name BLOB NOT NULL, last_number INTEGER NOT NULL, last_id INTEGER NOT NULL);
CREATE TABLE producers (
    id INTEGER PRIMARY KEY,
    name BLOB NOT NULL,
    forgotten INTEGER NOT NULL,
    last_at INTEGER NOT NULL
);
CREATE TABLE puts (producer INTEGER NOT NULL, seq INTEGER NOT NULL, message INTEGER NOT NULL);
"""
# Only if ids were lost. Each range has two rows without a name, the id before it and its last, followed by its numbers.
_LOST = "CREATE TABLE lost (name BLOB, number INTEGER NOT NULL)"
_DROP = """
DROP TABLE state; DROP TABLE empty_topics; DROP TABLE producers; DROP TABLE puts; DROP TABLE IF EXISTS lost;
"""
_SELECT_STATE = "SELECT epoch, run, clock, last_id, last_row, forgot_at, written_at, is_last FROM state"


class Lost(NamedTuple):
    """A range of ids that were lost, because the server was killed and started again from an older snapshot."""

    after: int
    """The last id in that snapshot."""
    last: int
    """The last of the range. The next run goes on from here."""
    numbers: dict[bytes, int]
    """The last number of each topic in that snapshot, which the next run goes on from."""


class StoreState(NamedTuple):
    """What a store knew at one instant, besides the rows in its database."""

    epoch: str
    run: str
    clock: int
    """Milliseconds, on the clock of the put times."""
    last_id: int
    last_row: int
    """The id of the topic that was created last."""
    empty_topics: dict[bytes, tuple[int, int]]
    """The last number and id of each topic without messages."""
    lost: list[Lost]
    written_id: int
    """The last id when the write buffer was last flushed."""
    buffered: list[tuple[int, list[StoredMessage]]]
    """The messages in the write buffer, by topic id."""


class SnapshotContents(NamedTuple):
    """What is read from a snapshot, besides the rows."""

    state: StoreState
    producers: list[Producer]
    forgot_at: int | None
    """As in `Deduplicator`."""
    written_at: float
    """Unix time of the instant."""
    is_last: bool
    """Whether it was written on a clean shutdown: nothing was put after it."""


def write_state(
    target: sqlite3.Connection, state: StoreState, written_at: float, forgot_at: int | None, *, is_last: bool
) -> None:
    target.executemany(INSERT_ROW, pack(state.buffered))
    values = (*state[:5], forgot_at, written_at, is_last)
    target.execute("INSERT INTO state VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    empty = ((name, *last) for name, last in state.empty_topics.items())
    target.executemany("INSERT INTO empty_topics VALUES (?, ?, ?)", empty)
    if state.lost:
        target.execute(_LOST)
        for after, last, numbers in state.lost:
            rows = chain([(None, after), (None, last)], numbers.items())
            target.executemany("INSERT INTO lost VALUES (?, ?)", rows)


def write_producers(target: sqlite3.Connection, producers: Iterable[Producer]) -> None:
    for name, puts, *last in producers:
        row = target.execute("INSERT INTO producers (name, forgotten, last_at) VALUES (?, ?, ?)", (name, *last))
        target.executemany("INSERT INTO puts VALUES (?, ?, ?)", ((row.lastrowid, *put) for put in puts.items()))


def read(source: sqlite3.Connection) -> SnapshotContents:
    *state, forgot_at, written_at, is_last = source.execute(_SELECT_STATE).fetchone()
    empty = {name: (number, last_id) for name, number, last_id in source.execute("SELECT * FROM empty_topics")}
    store_state = StoreState._make([*state, empty, _read_lost(source), 0, []])
    return SnapshotContents(store_state, list(_read_producers(source)), forgot_at, written_at, bool(is_last))


def _read_lost(source: sqlite3.Connection) -> list[Lost]:
    lost: list[Lost] = []
    if source.execute("SELECT 1 FROM sqlite_master WHERE name = 'lost'").fetchone():
        rows = source.execute("SELECT name, number FROM lost ORDER BY rowid")
        for name, number in rows:
            if name is None:
                lost.append(Lost(number, next(rows)[1], {}))
            else:
                lost[-1].numbers[name] = number
    return lost


def _read_producers(source: sqlite3.Connection) -> Iterator[Producer]:
    rows = source.execute("SELECT producer, seq, message FROM puts ORDER BY rowid")
    puts = {producer: {seq: message for _, seq, message in of} for producer, of in groupby(rows, itemgetter(0))}
    producers = source.execute("SELECT id, name, forgotten, last_at FROM producers ORDER BY id")
    for row, name, forgotten, last_at in producers:
        yield Producer(name, puts.get(row, {}), forgotten, last_at)


def drop_extra_tables(database: sqlite3.Connection) -> None:
    """Keep the store's own tables only."""
    database.executescript(_DROP)
