"""The messages: one SQLite database in memory, one connection, one lock, one place that owns transactions.

Ids are assigned here, not taken from SQLite, which would give the id of a deleted newest row to the next message.
Beside the database stands what must be known without asking it: the last id and number of each topic, so that
a reader who has read everything costs no statement; and each topic's tail, its newest messages.

A statement costs as much as all the rest of a put. So the tails are written together, when they have grown long
enough, and the messages of one topic and millisecond as one row, a chunk: they expire together too.
"""

from __future__ import annotations

import heapq
import secrets
import sqlite3
import sys
import threading
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter, itemgetter

from dsmq.errors import CannotStart, Full, ReplyError, StoreFailed
from dsmq.store import image
from dsmq.store.api import (
    MEMORY,
    MESSAGE_OVERHEAD_BYTES,
    SETTINGS,
    Limits,
    Message,
    Put,
    Timing,
    TopicStats,
    Totals,
    cost,
    topics_cost,
)
from dsmq.store.dedup import Producers, Puts
from dsmq.store.image import INSERT_CHUNK, Image, Instant, Lost, Part, Place, Producer, State
from dsmq.store.packed_rows import Row, Stored, pack, portions, unpack
from dsmq.system import BOOT_CLOCK

# Topics that hold nothing but whose numbering goes on; a forgotten one starts again at 1.
MAX_EMPTY_TOPICS = 100_000
# Ranges of lost ids that are remembered, and numbers of topics with them; of the last range always all.
_MAX_LOST, _MAX_LOST_NUMBERS = 100, 100_000
# Of a topic, runs of messages that are remembered as not read by anybody; older ones pass for read.
MAX_GAPS = 64
# Chunks, and bytes of messages, deleted while the lock is held once: less than 0.1 ms of work.
EXPIRY_SLICE = 100
EXPIRY_SLICE_BYTES = 131_072
# How long the tails get, together, before they are written: where there is nothing else to do, and at most.
TAIL_MESSAGES, MAX_TAIL_MESSAGES = 32, 512
TAIL_BYTES, MAX_TAIL_BYTES = 32_768, 262_144
# From here on a message is read apart from its row.
LONG_BYTES = 65_536
# Rows, and bytes of messages, copied while the lock is held once, for a snapshot.
COPY_TOPICS, COPY_CHUNKS, COPY_BYTES = 500, 64, 16_384
# Pages of 4,096 bytes, copied at once where nobody else uses the database.
_COPY_PAGES = 4096
# After the tails could not be written, it is not tried again for so long, unless something expires.
RETRY_MS = 100
# Topics at their limit that are remembered at a time, to log when they have room again.
MAX_FULL = 1_000

SCHEMA = """
CREATE TABLE topics (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE);
CREATE TABLE chunks (
    last_id INTEGER PRIMARY KEY,
    topic INTEGER NOT NULL,
    put_at INTEGER NOT NULL,
    last_number INTEGER NOT NULL,
    ids_and_sizes BLOB NOT NULL,
    bodies BLOB NOT NULL
);
"""
INDEX = "CREATE INDEX chunks_by_topic ON chunks (topic)"
_INSERT = INSERT_CHUNK
_INSERT_TOPIC = "INSERT INTO topics (id, name) VALUES (?, ?)"
_DELETE_TOPIC = "DELETE FROM topics WHERE id = ?"
_READ = """SELECT put_at, last_number, ids_and_sizes, bodies FROM chunks
    WHERE topic = ? AND last_id > ? AND put_at >= ? ORDER BY last_id"""
# The same for topics that hold long messages: those are left out, to be read by the id.
_SHORT = f"CASE WHEN length(bodies) < {LONG_BYTES} THEN bodies END, last_id"
_READ_SHORT = _READ.replace("bodies", _SHORT)
_LATEST = f"""SELECT put_at, last_number, ids_and_sizes, {_SHORT} FROM chunks
    WHERE topic = ? ORDER BY last_id DESC"""  # noqa: S608 - a constant
_OLDEST = "SELECT put_at, ids_and_sizes FROM chunks WHERE topic = ? ORDER BY last_id LIMIT 1"
# A pair of 64-bit integers, an id and a size, is 16 bytes.
_EXPIRY = """SELECT last_id, topic, put_at, length(ids_and_sizes) / 16, length(bodies)
    FROM chunks ORDER BY last_id LIMIT ?"""
_DELETE = "DELETE FROM chunks WHERE last_id <= ?"
_OLDEST_OF_ALL = "SELECT put_at FROM chunks ORDER BY last_id LIMIT 1"
_TOPICS = "SELECT id FROM topics WHERE name > ? ORDER BY name LIMIT ?"
_COPY_TOPICS = "SELECT id, name FROM topics WHERE id > ? ORDER BY id LIMIT ?"
_COPY_CHUNKS = """SELECT last_id, topic, put_at, last_number, ids_and_sizes, bodies
    FROM chunks WHERE last_id > ? ORDER BY last_id LIMIT ?"""
_FIRST_CHUNK = "SELECT min(last_id) FROM chunks"
_HELD = """SELECT id, name, max(last_number), max(last_id), sum(length(ids_and_sizes)) / 16, sum(length(bodies)),
    max(length(bodies))
    FROM chunks JOIN topics ON id = topic GROUP BY topic"""


class _Topic:
    __slots__ = (
        "bytes",
        "expired",
        "gaps",
        "has_long",
        "last_id",
        "last_number",
        "name",
        "read_number",
        "row",
        "tail",
        "written_id",
    )

    def __init__(self, name: bytes, row: int, last_number: int = 0, last_id: int = 0) -> None:
        self.name = name
        self.row = row
        self.last_number, self.last_id = last_number, last_id
        self.bytes = 0
        # How many of its messages have been deleted: the first ones.
        self.expired = last_number
        # The highest number that somebody has read, and what nobody has below it: first and last numbers.
        self.read_number = 0
        self.gaps: list[tuple[int, int]] = []
        self.tail: list[Stored] = []
        # Whether there are, or were, rows of LONG_BYTES or more.
        self.has_long = False
        # The last id before the tail; 0 where nothing stands there.
        self.written_id = 0

    @property
    def messages(self) -> int:
        return self.last_number - self.expired

    def note_read(self, first: int, last: int) -> None:
        """Note that somebody has read these numbers."""
        behind = max(self.read_number, self.expired) + 1
        if first > behind:
            self.gaps = [*self.gaps[1 - MAX_GAPS :], (behind, first - 1)]
        elif self.gaps:
            parts = [
                part for low, high in self.gaps for part in ((low, min(high, first - 1)), (max(low, last + 1), high))
            ]
            self.gaps = [(low, high) for low, high in parts if low <= high][-MAX_GAPS:]
        self.read_number = max(self.read_number, last)

    def expire(self, count: int) -> int:
        """Take that many first messages out; return how many of them nobody has read."""
        end = self.expired + count
        unread = max(0, end - max(self.expired, self.read_number))
        unread += sum(min(high, end) - low + 1 for low, high in self.gaps if low <= end)
        self.gaps = [(max(low, end + 1), high) for low, high in self.gaps if high > end]
        self.expired = end
        return unread


def monotonic_ms() -> int:
    """Return milliseconds on a clock that goes on while the machine sleeps, and ignores steps of the wall clock."""
    return (time.monotonic_ns() if BOOT_CLOCK is None else time.clock_gettime_ns(BOOT_CLOCK)) // 1_000_000


class SQLiteStore:
    """The store in this process. Safe to use from several threads."""

    def __init__(self, max_age_ms: int, clock: Callable[[], int] = monotonic_ms, limits: Limits | None = None) -> None:
        self.max_age_ms = max_age_ms
        self.limits = limits or Limits()
        self.epoch, self.run = secrets.token_hex(8), secrets.token_hex(8)
        self.lost: list[Lost] = []
        """The ranges of ids of this epoch that were lost, in order; of many or large ones the last."""
        self._clock = clock
        self._guard = _Guard()
        self._database = _in_memory()
        try:
            self._database.executescript(SCHEMA)
            self._database.execute(INDEX)
        except sqlite3.Error as error:
            self._database.close()
            raise CannotStart(f"SQLite {sqlite3.sqlite_version} is too old, or lacks a feature: {error}") from error
        self._last_id = 0
        self._last_row = 0
        # Those that hold messages, as the table does; and the last number and id of the others, in the order in which
        # they were put to last.
        self._topics: dict[bytes, _Topic] = {}
        self._by_row: dict[int, _Topic] = {}
        self._empty: dict[bytes, tuple[int, int]] = {}
        # Those that have a tail.
        self._unwritten: list[_Topic] = []
        self._tail_messages = self._tail_bytes = 0
        self._failure: ReplyError | None = None
        self._retry_at = 0
        # The limits that have refused puts, with the topic for those of one topic: how much more the last put needed,
        # and whether that was since the last call of `full`.
        self._full: dict[tuple[str, bytes | None], tuple[int, bool]] = {}
        self._producers = Producers()
        # What was stored includes what was restored.
        self._stored = self._restored = self._bytes = self._expired = self._expired_unread = 0
        # What the topics are counted as.
        self._topic_bytes = 0
        self._timings = {"write": Timing(), "read": Timing(), "expire": Timing()}

    @contextmanager
    def _transaction(self, operation: str) -> Iterator[None]:
        """Do everything or nothing. The caller holds the lock."""
        began = time.monotonic()
        if self._database.in_transaction:
            # That of a transaction before could not be rolled back.
            self._database.execute("ROLLBACK")
        self._database.execute("BEGIN")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors, such as being out of memory.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        finally:
            self._count_time(operation, began)

    def _count_time(self, operation: str, began: float) -> None:
        times, seconds = self._timings[operation]
        self._timings[operation] = Timing(times + 1, seconds + time.monotonic() - began)

    def append(self, puts: Sequence[Put]) -> list[int]:
        with self._guard:
            # Whatever can fail is done before a message is taken.
            self._producers.check(puts)
            names = set()
            held = self._stored - self._expired + len(puts)
            size = self._topic_bytes + self._bytes + held * MESSAGE_OVERHEAD_BYTES
            for name, body, _ in puts:
                size += len(body)
                if name not in self._topics:
                    names.add(name)
            if names:
                size += topics_cost(names)
            if held > self._fewest_messages or size > self._fewest_bytes:
                self._check_limits(puts)
            if self._tail_messages >= MAX_TAIL_MESSAGES or self._tail_bytes >= MAX_TAIL_BYTES:
                self._make_room(puts)
            if names:
                self._begin(names.intersection(put[0] for put in self._needed(puts)))
            return self._add(puts, self._clock())

    @property
    def limits(self) -> Limits:
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        # With less than this in all topics together, no limit is passed.
        self._fewest_messages = min(limits.messages, limits.messages_per_topic)
        self._fewest_bytes = min(limits.bytes, limits.bytes_per_topic)

    def _check_limits(self, puts: Sequence[Put]) -> None:
        counts: Counter[bytes] = Counter()
        sizes: Counter[bytes] = Counter()
        for name, body, _ in self._needed(puts):
            counts[name] += 1
            sizes[name] += len(body)
        for name, count in counts.items():
            self._check_limit("messages_per_topic", count, name)
            self._check_limit("bytes_per_topic", cost(count, sizes[name]), name)
        if counts:
            self._check_limit("messages", counts.total())
            topics = topics_cost(counts.keys() - self._topics.keys())
            self._check_limit("bytes", topics + cost(counts.total(), sizes.total()))

    def _check_limit(self, limit: str, more: int, topic: bytes | None = None) -> None:
        """Raise Full if so much more would exceed a limit; `topic` is for those of one topic."""
        most = getattr(self._limits, limit)
        if self._held(limit, topic) + more > most:
            self._note_full(limit, topic, more)
            what = "server" if topic is None else "topic"
            raise Full(f"the {what} is full: {SETTINGS[limit]} = {most} reached")

    def _held(self, limit: str, topic: bytes | None) -> int:
        """Return how much is held of what a limit bounds."""
        if topic is not None:
            known = self._topics.get(topic) or _Topic(topic, 0)
            return known.messages if limit == "messages_per_topic" else cost(known.messages, known.bytes)
        held = self._stored - self._expired
        if limit == "bytes":
            return self._topic_bytes + cost(held, self._bytes)
        return held if limit == "messages" else len(self._topics)

    def _note_full(self, limit: str, topic: bytes | None = None, more: int = 0) -> None:
        self._full[limit, topic] = more, True
        if len(self._full) > MAX_FULL:
            del self._full[next(iter(self._full))]

    def full(self) -> set[str]:
        with self._guard:
            for (limit, topic), (more, is_new) in list(self._full.items()):
                self._full[limit, topic] = more, False
                most = getattr(self._limits, limit, sys.maxsize)
                # What is larger than the limit would never find room.
                if not is_new and self._held(limit, topic) + min(more, most) <= most:
                    del self._full[limit, topic]
            return {SETTINGS.get(limit, limit) for limit, _ in self._full}

    def check_producer(self, producer: bytes) -> None:
        with self._guard:
            self._producers.check_unknown(producer, self._clock())

    def _make_room(self, puts: Sequence[Put]) -> None:
        if any(self._needed(puts)):
            self._write_tails()

    def _add(self, puts: Sequence[Put], now: int) -> list[int]:
        ids = []
        heard: dict[bytes, Puts] = {}
        topics, producers, last_id, size = self._topics, self._producers, self._last_id, 0
        for name, body, key in puts:
            if key is not None and (first_id := producers.note(key, last_id + 1, now, heard)):
                ids.append(first_id)
                continue
            topic = topics[name]
            if not topic.tail:
                self._unwritten.append(topic)
            last_id += 1
            topic.last_number += 1
            topic.tail.append((last_id, topic.last_number, now, body))
            length = len(body)
            topic.bytes += length
            topic.last_id = last_id
            size += length
            ids.append(last_id)
        if heard:
            producers.forget(heard, now)
        self._stored += last_id - self._last_id
        self._tail_messages += last_id - self._last_id
        self._tail_bytes += size
        self._bytes += size
        self._last_id = last_id
        return ids

    def _needed(self, puts: Sequence[Put]) -> Iterator[Put]:
        """Iterate over the puts that will be stored: not those that were done before."""
        keys = set()
        for put in puts:
            key = put[2]
            if key is None or (key not in keys and self._producers.find(key) is None):
                keys.add(key)
                yield put

    def _begin(self, names: set[bytes]) -> None:
        """Have topics that hold nothing ready to hold something."""
        if names:
            self._check_limit("topics", len(names))
        # No row is used again: what is copied slice by slice goes by them.
        topics = [_Topic(name, row, *self._empty.get(name, ())) for row, name in enumerate(names, self._last_row + 1)]
        with self._transaction("write"):
            self._database.executemany(_INSERT_TOPIC, [(topic.row, topic.name) for topic in topics])
        for topic in topics:
            self._topics[topic.name] = self._by_row[topic.row] = topic
            self._empty.pop(topic.name, None)
        self._topic_bytes += topics_cost(names)
        self._last_row += len(topics)

    def flush(self) -> None:
        if self._tail_messages >= TAIL_MESSAGES or self._tail_bytes >= TAIL_BYTES:
            with self._guard:
                self._write_tails()

    def _write_tails(self) -> None:
        if self._failure and self._clock() < self._retry_at:
            raise self._failure.with_traceback(None)
        chunks = [pack(topic.row, messages) for topic in self._unwritten for messages in portions(topic.tail)]
        chunks.sort()
        try:
            with self._transaction("write"):
                self._database.executemany(_INSERT, chunks)
        except (sqlite3.Error, MemoryError) as error:
            self._failure, self._retry_at = _told(error), self._clock() + RETRY_MS
            if isinstance(self._failure, Full):
                self._note_full(MEMORY)
            raise
        for chunk in chunks:
            if len(chunk[5]) >= LONG_BYTES:
                self._by_row[chunk[1]].has_long = True
        for topic in self._unwritten:
            topic.written_id = topic.last_id
            topic.tail = []
        self._unwritten = []
        self._tail_messages = self._tail_bytes = 0

    def read(self, topic: bytes, after: int, count: int, max_bytes: int) -> list[Message]:
        known = self._topics.get(topic)
        if known is None or after >= known.last_id:
            return []
        messages = []
        with self._guard:
            now = self._clock()
            began = time.monotonic() if after < known.written_id else 0.0
            since = now - self.max_age_ms
            for message_id, number, put_at, body in self._behind(known, after, since):
                messages.append(Message(message_id, number, now - put_at, body, put_at - since))
                max_bytes -= len(body)
                if len(messages) == count or max_bytes <= 0:
                    break
            if began:
                self._count_time("read", began)
            if messages:
                known.note_read(messages[0].number, messages[-1].number)
        return messages

    def _behind(self, topic: _Topic, after: int, since: int) -> Iterator[Stored]:
        """Iterate over the messages with ids above `after`, put at or after `since`."""
        if after < topic.written_id:
            values = topic.row, after, since
            rows = self._long_rows(_READ_SHORT, *values) if topic.has_long else self._database.execute(_READ, values)
            for row in rows:
                yield from unpack(row, after)
        for message in topic.tail[bisect_left(topic.tail, (after + 1,)) :]:
            if message[2] >= since:
                yield message

    def _long_rows(self, query: str, *values: int) -> Iterator[Row]:
        """Iterate over rows, long messages among them. Those are read as blobs: copied once, and not twice."""
        for put_at, number, ids_and_sizes, bodies, row_id in self._database.execute(query, values):
            if bodies is not None:
                yield put_at, number, ids_and_sizes, bodies
                continue
            with self._database.blobopen("chunks", "bodies", row_id, readonly=True) as blob:
                yield put_at, number, ids_and_sizes, blob.read()

    def latest(self, topic: bytes, after: int, below: int = sys.maxsize) -> list[Message]:
        known = self._topics.get(topic)
        if known is None or after >= known.last_id:
            return []
        with self._guard:
            now = self._clock()
            since = now - self.max_age_ms
            found = known.tail[-1] if known.tail and below > known.last_id else self._newest_below(known, below)
            if found is None or found[0] <= after or found[2] < since:
                return []
            message_id, number, put_at, body = found
            # What it passes over is not wanted any more.
            known.note_read(1, number)
            return [Message(message_id, number, now - put_at, body, put_at - since)]

    def _newest_below(self, topic: _Topic, below: int) -> Stored | None:
        if at := bisect_left(topic.tail, (below,)):
            return topic.tail[at - 1]
        after = topic.last_id - 1 if below > topic.last_id else 0
        # More than one chunk is looked at only if the last ones begin at or above it.
        for row in self._long_rows(_LATEST, topic.row):
            if found := [message for message in unpack(row, after) if message[0] < below]:
                return found[-1]
        return None

    def last_id(self) -> int:
        return self._last_id

    def expire(self) -> int:
        with self._guard:
            oldest = self._clock() - self.max_age_ms
            chunks = self._expired_chunks(oldest)
            # The tails are not written first: that needs room, which there may be none of.
            expired = self._delete_chunks(chunks) if chunks else self._cut_tails(oldest)
            if expired:
                self._failure = None
        return expired

    def _expired_chunks(self, oldest: int) -> list[tuple[int, int, int, int, int]]:
        expired, size = [], 0
        for chunk in self._database.execute(_EXPIRY, (EXPIRY_SLICE,)):
            # Put times increase with the ids, so what is too old stands in front.
            if chunk[2] >= oldest or size >= EXPIRY_SLICE_BYTES:
                break
            expired.append(chunk)
            size += chunk[4]
        return expired

    def _delete_chunks(self, chunks: list[tuple[int, int, int, int, int]]) -> int:
        counts: dict[_Topic, int] = {}
        sizes: dict[_Topic, int] = {}
        for _, row, _, count, size in chunks:
            topic = self._by_row[row]
            # Taken out and put back, so that they stand in the order of their last messages.
            counts[topic] = counts.pop(topic, 0) + count
            sizes[topic] = sizes.get(topic, 0) + size
        with self._transaction("expire"):
            self._database.execute(_DELETE, (chunks[-1][0],))
            self._end(counts)
        return self._count_out(counts, sizes)

    def _cut_tails(self, oldest: int) -> int:
        """Delete what has expired in the tails, once nothing older is written."""
        counts: dict[_Topic, int] = {}
        sizes: dict[_Topic, int] = {}
        for topic in sorted(self._unwritten, key=attrgetter("last_id")):
            if topic.tail[0][2] < oldest:
                counts[topic] = bisect_left(topic.tail, oldest, key=itemgetter(2))
                sizes[topic] = sum(len(message[3]) for message in topic.tail[: counts[topic]])
        if not counts:
            return 0
        with self._transaction("expire"):
            self._end(counts)
        for topic, count in counts.items():
            del topic.tail[:count]
        self._unwritten = [topic for topic in self._unwritten if topic.tail]
        self._tail_messages -= sum(counts.values())
        self._tail_bytes -= sum(sizes.values())
        return self._count_out(counts, sizes)

    def _end(self, counts: dict[_Topic, int]) -> None:
        """Take topics out of the table that will hold nothing any more without so many messages."""
        rows = [(topic.row,) for topic, count in counts.items() if topic.messages == count]
        self._database.executemany(_DELETE_TOPIC, rows)

    def _count_out(self, counts: dict[_Topic, int], sizes: dict[_Topic, int]) -> int:
        for topic, count in counts.items():
            self._expired_unread += topic.expire(count)
            topic.bytes -= sizes[topic]
            if not topic.messages:
                del self._topics[topic.name], self._by_row[topic.row]
                self._empty[topic.name] = topic.last_number, topic.last_id
                self._topic_bytes -= topics_cost([topic.name])
        while len(self._empty) > MAX_EMPTY_TOPICS:
            del self._empty[next(iter(self._empty))]
        expired = sum(counts.values())
        self._bytes -= sum(sizes.values())
        self._expired += expired
        return expired

    def topics(self, after: bytes, count: int) -> list[TopicStats]:
        with self._guard:
            rows = self._database.execute(_TOPICS, (after, count)).fetchall()
            return [_stats(self._by_row[row]) for (row,) in rows]

    @property
    def lost_ids(self) -> list[int]:
        return [end for lost in self.lost for end in lost[:2]]

    def stats(self, topic: bytes, after: int = 0) -> TopicStats:
        with self._guard:
            known = self._topics.get(topic)
            lost = [one for one in self.lost if one.after < after <= one.last] or self.lost
            restored_number = lost[-1].numbers.get(topic, 0) if lost else 0
            if known is None:
                empty = _Topic(topic, 0, *self._empty.get(topic, ()))
                return _stats(empty)._replace(restored_number=restored_number)
            first_id, put_at = self._oldest(known)
            age = self._clock() - put_at
            return _stats(known)._replace(first_id=first_id, oldest_age_ms=age, restored_number=restored_number)

    def _oldest(self, topic: _Topic) -> tuple[int, int]:
        """Return the id and the put time of the first message."""
        chunk = self._database.execute(_OLDEST, (topic.row,)).fetchone()
        if chunk is None:
            return topic.tail[0][0], topic.tail[0][2]
        return array("q", chunk[1][:8])[0], chunk[0]

    def totals(self) -> Totals:
        held = self._stored - self._expired
        return Totals(
            held,
            self._bytes,
            len(self._topics),
            self._stored - self._restored,
            self._expired,
            self._expired_unread,
            self._oldest_age() if held else 0,
            self._topic_bytes + cost(held, self._bytes),
        )

    def _oldest_age(self) -> int:
        with self._guard.lock, suppress(sqlite3.Error, MemoryError):
            oldest = None if self._guard.closed else self._database.execute(_OLDEST_OF_ALL).fetchone()
            # All that is written is older than what stands in a tail.
            put_times = oldest or [topic.tail[0][2] for topic in self._unwritten]
            return max(0, self._clock() - min(put_times)) if put_times else 0
        return 0

    def timings(self) -> dict[str, Timing]:
        return dict(self._timings)

    def last_numbers(self) -> dict[bytes, int]:
        # A copy of the table is atomic, so the lock need not be held as long as this takes.
        topics = list(self._topics.values())
        return dict(zip(map(attrgetter("name"), topics), map(attrgetter("last_number"), topics), strict=True))

    def last_number(self, topic: bytes) -> int:
        if known := self._topics.get(topic):
            return known.last_number
        return self._empty.get(topic, (0, 0))[0]

    def deepest(self, count: int) -> list[bytes]:
        return [topic.name for topic in heapq.nlargest(count, list(self._topics.values()), attrgetter("messages"))]

    # Snapshots

    def copy(self, place: Place, slices: int = 1) -> tuple[Part, Instant | None]:
        """Return some of the rows behind a place; with the last of them, what stood beside them in that instant.

        One slice is so little that no client notices.

        Rows are added behind all others, and deleted in front: so what is copied slice by slice, while clients put and
        messages expire, comes to what was held in the instant of the last slice.
        """
        with self._guard:
            topics = self._database.execute(_COPY_TOPICS, (place.topic, COPY_TOPICS)).fetchall()
            chunks: list[image.Row] = []
            # No chunk is copied before its topic.
            done = len(topics) < COPY_TOPICS and self._copy_chunks(place.chunk, chunks, slices)
            return Part(topics, chunks), self._instant() if done else None

    def _copy_chunks(self, after: int, chunks: list[image.Row], slices: int) -> bool:
        """Add some of the chunks behind an id; return whether they are the last."""
        size = 0
        for chunk in self._database.execute(_COPY_CHUNKS, (after, slices * COPY_CHUNKS)):
            chunks.append(chunk)
            size += len(chunk[5])
            if size >= slices * COPY_BYTES:
                return False
        return len(chunks) < slices * COPY_CHUNKS

    def copy_all(self, target: sqlite3.Connection, alive: Callable[[], None] = lambda: None) -> Instant:
        """Copy the database at once. Nobody else can use it meanwhile.

        alive is called every now and then; what it raises ends it.
        """
        # Not with the guard, which would take the target's errors for the store's.
        with self._guard.lock:
            self._database.backup(target, pages=_COPY_PAGES, progress=lambda *_: alive())
            return self._instant()

    def _instant(self) -> Instant:
        # Cheap copies: a client may be waiting.
        first_chunk = self._database.execute(_FIRST_CHUNK).fetchone()[0]
        state = State(
            self.epoch,
            self.run,
            self._clock(),
            self._last_id,
            self._last_row,
            sys.maxsize if first_chunk is None else first_chunk,
            self._producers.forgot_at,
        )
        tails = [(topic.row, topic.tail[:]) for topic in self._unwritten]
        return Instant(state, tails, self._empty.copy(), self._producers.names())

    def remembered(self, producers: Sequence[bytes], last_id: int) -> list[Producer]:
        """Return what is remembered of these producers, but for puts with ids above `last_id`."""
        with self._guard:
            found = self._producers.copy(producers)
        return [one._replace(puts={seq: at for seq, at in one.puts.items() if at <= last_id}) for one in found]

    def elapsed_ms(self, instant: Instant) -> int:
        """Return the time since the instant of a snapshot."""
        return self._clock() - instant.state.clock

    def load(self, source: sqlite3.Connection, kept: Image, passed_ms: int) -> None:
        """Take over what another store held, so many milliseconds ago. Nobody has used this one yet.

        What is restored passes for read: it is not known who has read it.
        """
        # Before the copy, which takes its time: passed_ms is as of now.
        ahead_ms = kept.state.clock + passed_ms - self._clock()
        database = _in_memory()
        try:
            source.backup(database)
            image.drop(database)
            held = database.execute(_HELD).fetchall()
        except BaseException:
            database.close()
            raise
        self._database.close()
        self._database = database
        self.epoch, self.run = kept.state.epoch, kept.state.run
        self._last_id = kept.state.last_id
        self.lost = kept.lost
        self._last_row = kept.state.last_row
        self._clock = _shifted(self._clock, ahead_ms)
        for row, name, last_number, last_id, count, size, longest in held:
            topic = self._topics[name] = self._by_row[row] = _Topic(name, row, last_number, last_id)
            topic.written_id, topic.expired, topic.bytes = last_id, last_number - count, size
            topic.read_number, topic.has_long = last_number, longest >= LONG_BYTES
            self._restored += count
            self._bytes += size
        self._stored = self._restored
        self._topic_bytes = topics_cost(self._topics)
        self._empty = kept.empty
        self._producers.restore(kept.producers, kept.state.forgot_at)

    def begin_run(self, last_id: int) -> None:
        """Go on as one that may have forgotten what was put last; ids go on from this one.

        Numbers go on from those of the snapshot. A reader that knows higher ones takes the snapshot's.
        """
        numbers = {name: number for name, (number, _) in self._empty.items()} | self.last_numbers()
        while len(self.lost) >= _MAX_LOST or sum(len(one.numbers) for one in self.lost) > _MAX_LOST_NUMBERS:
            del self.lost[0]
        self.lost.append(Lost(self._last_id, last_id, numbers))
        self.run, self._last_id = secrets.token_hex(8), last_id

    def close(self) -> None:
        with self._guard.lock:
            self._guard.closed = True
            self._database.close()


class _Guard:
    """The store's lock, with SQLite's errors turned into those of the protocol."""

    __slots__ = ("closed", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.closed = False

    def __enter__(self) -> None:
        self.lock.acquire()
        if self.closed:
            self.lock.release()
            raise StoreFailed("the store is closed")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.lock.release()
        if isinstance(error, sqlite3.Error | MemoryError):
            raise _told(error) from error


def _in_memory() -> sqlite3.Connection:
    # isolation_level=None: sqlite3 starts no transactions of its own.
    database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    # Large sorts would go to files in a folder for temporary ones, which may not be writable.
    database.execute("PRAGMA temp_store = MEMORY")
    # Some systems' SQLite overwrites what it deletes, which takes longer than all the rest of expiry.
    database.execute("PRAGMA secure_delete = OFF")
    return database


def _shifted(clock: Callable[[], int], by: int) -> Callable[[], int]:
    """Return a clock that is so many milliseconds ahead."""
    return lambda: clock() + by


def _told(error: sqlite3.Error | MemoryError) -> ReplyError:
    """Return the error that clients are told."""
    if isinstance(error, MemoryError) or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
        return Full("the server is full: there is no more memory")
    return StoreFailed(f"SQLite: {error}")


def _stats(topic: _Topic) -> TopicStats:
    return TopicStats(topic.name, topic.messages, topic.bytes, topic.last_number, topic.last_id)
