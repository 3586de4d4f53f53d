"""What a snapshot holds, and how it stands in tables: those of the store's database, and a few beside them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple, TypeAlias

from dsmq.store.packed_rows import Stored, pack, portions

TABLES = """
CREATE TABLE state (
    epoch TEXT NOT NULL,
    run TEXT NOT NULL,
    clock INTEGER NOT NULL,
    last_id INTEGER NOT NULL,
    last_row INTEGER NOT NULL,
    first_chunk INTEGER NOT NULL,
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
_DROP = "DROP TABLE state; DROP TABLE empty_topics; DROP TABLE producers; DROP TABLE puts;"
_INSERT_TOPIC = "INSERT OR REPLACE INTO topics (id, name) VALUES (?, ?)"
INSERT_CHUNK = (
    "INSERT INTO chunks (last_id, topic, put_at, last_number, ids_and_sizes, bodies) VALUES (?, ?, ?, ?, ?, ?)"
)
_DELETE_EXPIRED = "DELETE FROM chunks WHERE last_id < ?"
_DELETE_EMPTY = "DELETE FROM topics WHERE id NOT IN (SELECT topic FROM chunks)"
_INSERT_STATE = "INSERT INTO state VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_EMPTY = "INSERT INTO empty_topics VALUES (?, ?, ?)"
_INSERT_PRODUCER = "INSERT INTO producers (name, forgotten, last_at) VALUES (?, ?, ?)"
_INSERT_PUT = "INSERT INTO puts VALUES (?, ?, ?)"
# Only if ids were lost in this epoch: for each range, without a name, the id before it and its last, then the numbers.
_LOST = "CREATE TABLE lost (name BLOB, number INTEGER NOT NULL)"
_INSERT_LOST = "INSERT INTO lost VALUES (?, ?)"
_HAS_LOST = "SELECT 1 FROM sqlite_master WHERE name = 'lost'"
_DROP_LOST = "DROP TABLE IF EXISTS lost"
_PRODUCERS = "SELECT id, name, forgotten, last_at FROM producers ORDER BY id"
_PUTS = "SELECT producer, seq, message FROM puts ORDER BY rowid"

Row: TypeAlias = tuple[int, int, int, int, bytes, bytes]
"""A chunk as it stands in its table."""


class Place(NamedTuple):
    """How far a copy has come: the last row of topics, and the last id of chunks."""

    topic: int = 0
    chunk: int = 0


class Part(NamedTuple):
    """Rows behind a place."""

    topics: list[tuple[int, bytes]]
    chunks: list[Row]

    def end(self, place: Place) -> Place:
        """Return how far the copy comes with this, from that place."""
        return Place(
            self.topics[-1][0] if self.topics else place.topic, self.chunks[-1][0] if self.chunks else place.chunk
        )


class State(NamedTuple):
    """What a store knows of itself."""

    epoch: str
    run: str
    clock: int
    """Milliseconds, on the clock that put times are on."""
    last_id: int
    last_row: int
    """The row of the topic that was added last."""
    first_chunk: int
    """The key of the oldest chunk; those below it have expired."""
    forgot_at: int | None = None
    """When, on that clock, a producer was last forgotten that might still send a put again."""


class Instant(NamedTuple):
    """What stands beside the database at the instant of a snapshot."""

    state: State
    tails: list[tuple[int, list[Stored]]]
    """By topics' rows, the messages that are not written yet."""
    empty: dict[bytes, tuple[int, int]]
    """The last number and id of each topic that holds nothing."""
    producers: list[bytes]
    """The names of those of whom puts are remembered; the one heard last stands last."""


class Producer(NamedTuple):
    """What is remembered of a producer: ids by sequence numbers, in the order of the puts."""

    name: bytes
    puts: dict[int, int]
    forgotten: int = -1
    """The highest sequence number that has been forgotten."""
    last_at: int = 0
    """When it was heard last."""


class Image(NamedTuple):
    """What is read back from beside the tables of the store."""

    state: State
    written_at: float
    """Seconds since 1970, at the instant."""
    is_last: bool
    """Whether it was written when the store had taken its last message."""
    empty: dict[bytes, tuple[int, int]]
    producers: list[Producer]
    lost: list[Lost]


class Lost(NamedTuple):
    """A range of ids that were lost, because the server was killed and started again from an older snapshot."""

    after: int
    """The last id in that snapshot."""
    last: int
    """The last of the range. The next run goes on from here."""
    numbers: dict[bytes, int]
    """The last number of each topic in that snapshot, which the next run goes on from."""


def add(target: sqlite3.Connection, part: Part) -> None:
    """Copy rows. A topic that was emptied and came back meanwhile has two rows: the later one stays."""
    target.executemany(_INSERT_TOPIC, part.topics)
    target.executemany(INSERT_CHUNK, part.chunks)


def finish(target: sqlite3.Connection, instant: Instant, written_at: float, *, is_last: bool) -> None:
    """Make what was copied bit by bit what the store held at the instant, and add what stood beside it."""
    state = instant.state
    target.execute(_DELETE_EXPIRED, (state.first_chunk,))
    target.executemany(
        INSERT_CHUNK, [pack(row, messages) for row, tail in instant.tails for messages in portions(tail)]
    )
    target.execute(_DELETE_EMPTY)
    target.execute(_INSERT_STATE, (*state, written_at, is_last))
    target.executemany(_INSERT_EMPTY, ((name, *numbers) for name, numbers in instant.empty.items()))


def add_producers(target: sqlite3.Connection, producers: Iterable[Producer]) -> None:
    for name, puts, forgotten, last_at in producers:
        row = target.execute(_INSERT_PRODUCER, (name, forgotten, last_at)).lastrowid
        target.executemany(_INSERT_PUT, ((row, seq, message) for seq, message in puts.items()))


def add_lost(target: sqlite3.Connection, lost: Iterable[Lost]) -> None:
    target.execute(_LOST)
    for after, last, numbers in lost:
        target.executemany(_INSERT_LOST, chain([(None, after), (None, last)], numbers.items()))


def _read_lost(source: sqlite3.Connection) -> list[Lost]:
    lost: list[Lost] = []
    if source.execute(_HAS_LOST).fetchone():
        rows = source.execute("SELECT name, number FROM lost ORDER BY rowid")
        for name, number in rows:
            if name is None:
                lost.append(Lost(number, next(rows)[1], {}))
            else:
                lost[-1].numbers[name] = number
    return lost


def read(source: sqlite3.Connection) -> Image:
    *state, written_at, is_last = source.execute("SELECT * FROM state").fetchone()
    empty = {name: (number, last_id) for name, number, last_id in source.execute("SELECT * FROM empty_topics")}
    return Image(State(*state), written_at, bool(is_last), empty, list(_producers(source)), _read_lost(source))


def _producers(source: sqlite3.Connection) -> Iterator[Producer]:
    rows = source.execute(_PUTS)
    puts = {producer: {seq: message for _, seq, message in of} for producer, of in groupby(rows, itemgetter(0))}
    for row, name, forgotten, last_at in source.execute(_PRODUCERS):
        yield Producer(name, puts.get(row, {}), forgotten, last_at)


def drop(database: sqlite3.Connection) -> None:
    """Leave the store's own tables."""
    database.executescript(_DROP)
    database.execute(_DROP_LOST)
