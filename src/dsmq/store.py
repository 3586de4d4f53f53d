"""The messages: one SQLite database in memory, one connection, one lock, one place that owns transactions.

Ids are assigned here, not taken from SQLite, which would give the id of a deleted newest row to the next message.
Beside the database stands what must be known without asking it: the last id and number of each topic, so that
a reader who has read everything costs no statement.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from dsmq.errors import Full, StoreFailed

# Topics that hold nothing but whose numbering goes on; a forgotten one starts again at 1.
MAX_EMPTY_TOPICS = 100_000
# What is remembered to recognise a put that is sent again.
MAX_PRODUCERS = 10_000
MAX_PUTS_OF_PRODUCER = 1_000
# Messages deleted while the lock is held once: about a millisecond's work.
EXPIRY_SLICE = 500

_SCHEMA = """
CREATE TABLE topics (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE) STRICT;
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    topic INTEGER NOT NULL,
    number INTEGER NOT NULL,
    put_at INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX messages_by_topic ON messages (topic);
"""
_INSERT = "INSERT INTO messages (id, topic, number, put_at, body) VALUES (?, ?, ?, ?, ?)"
_INSERT_TOPIC = "INSERT INTO topics (id, name) VALUES (?, ?)"
_DELETE_TOPIC = "DELETE FROM topics WHERE id = ?"
_READ = """SELECT id, number, put_at, body FROM messages
    WHERE topic = ? AND id > ? AND put_at >= ? ORDER BY id LIMIT ?"""
_LATEST = """SELECT id, number, put_at, body FROM messages
    WHERE topic = ? AND id > ? ORDER BY id DESC LIMIT 1"""
_OLDEST = "SELECT id, put_at FROM messages WHERE topic = ? ORDER BY id LIMIT 1"
_EXPIRY = "SELECT id, topic, put_at, length(body) FROM messages ORDER BY id LIMIT ?"
_DELETE = "DELETE FROM messages WHERE id <= ?"
_TOPICS = """SELECT id FROM topics
    WHERE name > ? AND EXISTS (SELECT 1 FROM messages WHERE topic = topics.id) ORDER BY name LIMIT ?"""

T = TypeVar("T")
Answer: TypeAlias = T | Future[T]
"""What a store replies: the value, or a future where the value comes later."""


class Message(NamedTuple):
    """A stored message as READ sends it; the age is in milliseconds."""

    id: int
    number: int
    age_ms: int
    body: bytes


Put: TypeAlias = tuple[bytes, bytes, tuple[bytes, int] | None]
"""A message to store: topic, body, and where the put is idempotent its key, a producer and its sequence number."""


class TopicStats(NamedTuple):
    """What a topic holds."""

    name: bytes
    messages: int
    bytes: int
    last_number: int
    last_id: int
    first_id: int = 0
    oldest_age_ms: int = 0


class Totals(NamedTuple):
    """Sums over all topics: held now, and stored and expired since the start."""

    messages: int
    bytes: int
    topics: int
    stored: int
    expired: int


class Store(Protocol):
    """What the server asks of a store. One elsewhere than in this process answers with futures."""

    epoch: str

    def append(self, puts: Sequence[Put]) -> Answer[list[int]]:
        """Store all or nothing and return their ids, increasing. Raises Full or StoreFailed."""

    def read(self, topic: bytes, after: int, count: int, max_bytes: int) -> Answer[list[Message]]:
        """Return the messages with ids above `after`, oldest first, none of them expired."""

    def latest(self, topic: bytes, after: int) -> Answer[list[Message]]:
        """Return the newest message with an id above `after`, or nothing."""

    def last_id(self) -> int:
        """Return the id given last, 0 at first."""

    def expire(self) -> int:
        """Delete some messages that are too old; return how many, 0 when there are none left."""

    def topics(self, after: bytes, count: int) -> Answer[list[TopicStats]]:
        """Return topics that hold messages, in byte order, from behind the name `after`."""

    def stats(self, topic: bytes) -> Answer[TopicStats]:
        """Return what one topic holds, also where it holds nothing."""

    def totals(self) -> Totals:
        """Return the sums over all topics."""

    def close(self) -> None:
        """Give everything up. Idempotent."""


class _Topic:
    __slots__ = ("bytes", "last_id", "last_number", "messages", "name", "row")

    def __init__(self, name: bytes, row: int) -> None:
        self.name = name
        self.row = row
        self.last_id = self.last_number = self.messages = self.bytes = 0


def monotonic_ms() -> int:
    """Return milliseconds that a step of the wall clock does not touch."""
    return time.monotonic_ns() // 1_000_000


class SQLiteStore:
    """The store in this process. Safe to use from several threads."""

    def __init__(self, max_age_ms: int, clock: Callable[[], int] = monotonic_ms) -> None:
        self.max_age_ms = max_age_ms
        self.epoch = secrets.token_hex(8)
        self._clock = clock
        self._guard = _Guard()
        # isolation_level=None: sqlite3 starts no transactions of its own.
        self._database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._database.executescript(_SCHEMA)
        self._last_id = 0
        self._last_row = 0
        self._topics: dict[bytes, _Topic] = {}
        self._by_row: dict[int, _Topic] = {}
        # In the order in which they were put to last: messages, and with them topics, expire in that order.
        self._empty: dict[bytes, None] = {}
        self._producers: OrderedDict[bytes, dict[int, int]] = OrderedDict()
        self._messages = self._bytes = self._expired = 0

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Do everything or nothing. The caller holds the lock."""
        self._database.execute("BEGIN")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors, such as being out of memory.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def append(self, puts: Sequence[Put]) -> list[int]:
        created: list[_Topic] = []
        with self._guard:
            try:
                ids, rows, keys = self._plan(puts, created)
                self._insert(created, rows)
            except BaseException:
                for topic in created:
                    del self._topics[topic.name], self._by_row[topic.row]
                raise
            self._count_in(rows)
            self._remember(keys)
        return ids

    def _insert(self, topics: list[_Topic], rows: list[tuple[int, int, int, int, bytes]]) -> None:
        if len(rows) == 1 and not topics:
            # One statement is a transaction by itself, and costs half of one that is spelled out.
            self._database.execute(_INSERT, rows[0])
            return
        with self._transaction():
            self._database.executemany(_INSERT_TOPIC, [(topic.row, topic.name) for topic in topics])
            self._database.executemany(_INSERT, rows)

    def _plan(
        self, puts: Sequence[Put], created: list[_Topic]
    ) -> tuple[list[int], list[tuple[int, int, int, int, bytes]], dict[tuple[bytes, int], int]]:
        """Give out ids and numbers, changing nothing yet but for the topics created."""
        ids, rows = [], []
        keys: dict[tuple[bytes, int], int] = {}
        numbers: dict[_Topic, int] = {}
        now = self._clock()
        last_id = self._last_id
        for name, body, key in puts:
            if key is not None:
                first_id = keys.get(key) or self._producers.get(key[0], {}).get(key[1])
                if first_id is not None:
                    if key[0] in self._producers:
                        self._producers.move_to_end(key[0])
                    ids.append(first_id)
                    continue
                keys[key] = last_id + 1
            topic = self._topics.get(name) or self._create(name, created)
            last_id += 1
            number = numbers[topic] = numbers.get(topic, topic.last_number) + 1
            rows.append((last_id, topic.row, number, now, body))
            ids.append(last_id)
        return ids, rows, keys

    def _create(self, name: bytes, created: list[_Topic]) -> _Topic:
        self._last_row += 1
        topic = self._topics[name] = self._by_row[self._last_row] = _Topic(name, self._last_row)
        created.append(topic)
        return topic

    def _count_in(self, rows: list[tuple[int, int, int, int, bytes]]) -> None:
        for message_id, row, number, _, body in rows:
            topic = self._by_row[row]
            if not topic.messages:
                self._empty.pop(topic.name, None)
            topic.messages += 1
            topic.bytes += len(body)
            topic.last_number = number
            topic.last_id = self._last_id = message_id
            self._bytes += len(body)
        self._messages += len(rows)

    def _remember(self, keys: dict[tuple[bytes, int], int]) -> None:
        for (producer, seq), message_id in keys.items():
            puts = self._producers.setdefault(producer, {})
            puts[seq] = message_id
            if len(puts) > MAX_PUTS_OF_PRODUCER:
                del puts[next(iter(puts))]
            self._producers.move_to_end(producer)
        while len(self._producers) > MAX_PRODUCERS:
            self._producers.popitem(last=False)

    def read(self, topic: bytes, after: int, count: int, max_bytes: int) -> list[Message]:
        known = self._topics.get(topic)
        if known is None or after >= known.last_id:
            return []
        messages = []
        with self._guard:
            now = self._clock()
            for message_id, number, put_at, body in self._database.execute(
                _READ, (known.row, after, now - self.max_age_ms, count)
            ):
                messages.append(Message(message_id, number, now - put_at, body))
                max_bytes -= len(body)
                if max_bytes <= 0:
                    break
        return messages

    def latest(self, topic: bytes, after: int) -> list[Message]:
        known = self._topics.get(topic)
        if known is None or after >= known.last_id:
            return []
        with self._guard:
            now = self._clock()
            newest = self._database.execute(_LATEST, (known.row, after)).fetchone()
        # Had the statement asked for the age, it would pass over all the expired ones to find nothing.
        if newest is None or now - newest[2] > self.max_age_ms:
            return []
        return [Message(newest[0], newest[1], now - newest[2], newest[3])]

    def last_id(self) -> int:
        return self._last_id

    def expire(self) -> int:
        with self._guard:
            oldest = self._clock() - self.max_age_ms
            rows = self._database.execute(_EXPIRY, (EXPIRY_SLICE,)).fetchall()
            # Put times increase with the ids, so what is too old stands in front.
            expired = [row for row in rows if row[2] < oldest]
            if not expired:
                return 0
            self._database.execute(_DELETE, (expired[-1][0],))
            self._count_out(expired)
            self._forget_topics()
        return len(expired)

    def _count_out(self, rows: list[tuple[int, int, int, int]]) -> None:
        for _, row, _, size in rows:
            topic = self._by_row[row]
            topic.messages -= 1
            topic.bytes -= size
            self._bytes -= size
            if not topic.messages:
                self._empty[topic.name] = None
        self._messages -= len(rows)
        self._expired += len(rows)

    def _forget_topics(self) -> None:
        while len(self._empty) > MAX_EMPTY_TOPICS:
            name = next(iter(self._empty))
            row = self._topics[name].row
            self._database.execute(_DELETE_TOPIC, (row,))
            del self._empty[name], self._topics[name], self._by_row[row]

    def topics(self, after: bytes, count: int) -> list[TopicStats]:
        with self._guard:
            rows = self._database.execute(_TOPICS, (after, count)).fetchall()
            return [_stats(self._by_row[row]) for (row,) in rows]

    def stats(self, topic: bytes) -> TopicStats:
        with self._guard:
            known = self._topics.get(topic) or _Topic(topic, 0)
            oldest = self._database.execute(_OLDEST, (known.row,)).fetchone()
            if oldest is None:
                return _stats(known)
            return _stats(known)._replace(first_id=oldest[0], oldest_age_ms=self._clock() - oldest[1])

    def totals(self) -> Totals:
        return Totals(
            self._messages,
            self._bytes,
            len(self._topics) - len(self._empty),
            self._messages + self._expired,
            self._expired,
        )

    def close(self) -> None:
        with self._guard:
            self._database.close()


class _Guard:
    """The store's lock, with SQLite's errors turned into those of the protocol."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._lock.release()
        if isinstance(error, MemoryError) or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
            raise Full("no room for more messages") from error
        if isinstance(error, sqlite3.Error):
            raise StoreFailed(f"SQLite: {error}") from error


def _stats(topic: _Topic) -> TopicStats:
    return TopicStats(topic.name, topic.messages, topic.bytes, topic.last_number, topic.last_id)
