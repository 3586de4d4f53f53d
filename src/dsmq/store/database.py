"""The in-memory SQLite database: one connection, one lock, and all statements."""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dsmq.errors import Full, ReplyError, StartupError, StoreFailed
from dsmq.store.api import Timing
from dsmq.store.schema import (
    BLOCK_IDS,
    INDEX,
    INSERT_ROW,
    INSERT_TOPIC,
    LONG_BYTES,
    SCHEMA,
    UPDATE_BODIES,
    Batch,
    ExpiredRow,
    Header,
    Row,
    StoredMessage,
    unpack,
    unpack_ids_and_sizes,
)

# How long a slice of expiry or of a purge may take before its last step.
SLICE_SECONDS = 0.0004
# Max rows and bytes deleted while holding the lock: less than 0.1 ms of work.
EXPIRY_ROWS, EXPIRY_BYTES = 100, 131_072
# Max topics, rows and bytes copied for a snapshot while holding the lock.
COPY_TOPICS, COPY_ROWS, COPY_BYTES = 500, 64, 16_384
PAGE_BYTES = 4096
# If more pages than this, and more than 1/16 of all, are free, expiry releases them, so that long bodies can use their
# memory. Releasing 80 at a time holds the lock for 0.4 ms and is faster than pages become free.
FREE_PAGES, FREE_PAGES_PART, VACUUM_PAGES = 256, 16, 80
# Instructions of SQLite's virtual machine between calls of the progress handler.
PROGRESS_INSTRUCTIONS = 1000

READ = "SELECT * FROM chunks WHERE topic = ? AND last_id > ? AND put_at >= ? ORDER BY last_id"
LATEST = "SELECT * FROM chunks WHERE topic = ? AND last_id <= ? ORDER BY last_id DESC"
_HEADERS = "SELECT last_id, topic, put_at, last_number, messages, ids_and_sizes FROM chunks"
HEADERS = f"{_HEADERS} WHERE last_id > ? AND put_at >= ? ORDER BY last_id"
TOPIC_HEADERS = f"{_HEADERS} WHERE last_id > ? AND put_at >= ? AND topic = ? ORDER BY last_id"
HEADERS_BACK = f"{_HEADERS} WHERE last_id <= ? AND put_at >= ? ORDER BY last_id DESC"
ROW_AT = "SELECT min(last_id) FROM chunks WHERE topic = ? AND last_id >= ?"
TOPIC_HEADERS_BACK = f"{_HEADERS} WHERE last_id <= ? AND put_at >= ? AND topic = ? ORDER BY last_id DESC"
PUT_TIMES = "SELECT last_id, put_at FROM chunks WHERE last_id >= ? ORDER BY last_id"
BODIES = "SELECT last_id, bodies FROM chunks WHERE last_id BETWEEN ? AND ?"
OLDEST = f"{_HEADERS} WHERE topic = ? AND last_id > ? ORDER BY last_id LIMIT 1"
_SIZES = "SELECT last_id, topic, put_at, last_number, messages, length(bodies) FROM chunks"
EXPIRY = f"{_SIZES} WHERE last_id <= ? ORDER BY last_id LIMIT ?"
TOPIC_EXPIRY = f"{_SIZES} WHERE last_id <= ? AND topic = ? ORDER BY last_id LIMIT ?"
DELETE_FIRST = "DELETE FROM chunks WHERE last_id <= ?"
TOPICS = "SELECT name FROM topics WHERE name > ? ORDER BY name LIMIT ?"
COPY = {
    INSERT_TOPIC: "SELECT id, name FROM topics WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
    INSERT_ROW: "SELECT * FROM chunks WHERE last_id > ? AND last_id <= ? ORDER BY last_id LIMIT ?",
}
LOAD = """INSERT INTO chunks SELECT last_id, topic, put_at, last_number, {messages}, ids_and_sizes,
    CASE WHEN length(bodies) < ? THEN bodies ELSE x'' END FROM snapshot.chunks ORDER BY last_id"""
LOAD_LONG = "SELECT last_id, bodies FROM snapshot.chunks WHERE length(bodies) >= ? ORDER BY last_id"
# Without the index, rows are read in file order.
_HELD = """SELECT id, name, max(last_number), max(last_id), sum({messages}), sum(length(bodies))
    FROM chunks NOT INDEXED JOIN topics ON id = topic GROUP BY topic"""


class Database:
    """The database. Its methods require the lock, which `with` takes.

    `with` raises StoreFailed if the database is closed, and converts SQLite's errors to StoreFailed, or Full if memory
    is exhausted.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.closed = False
        self.restored_id = 0
        """The last id restored from a snapshot."""
        self.deletable_id = sys.maxsize
        """While a snapshot is being written, rows above this id must not be deleted: they are not copied yet."""
        self.long_bytes = 0
        """The total size of long bodies."""
        self.deleted_bodies: list[bytes] = []
        """Long bodies of deleted rows."""
        # By the last id of the body's row.
        self._long_bodies: dict[int, bytes] = {}
        self._is_shrinking = False
        self.timings = {"write": Timing(), "read": Timing(), "expire": Timing()}
        self.connection = _open_in_memory()
        try:
            self.connection.executescript(SCHEMA)
            self.connection.execute(INDEX)
        except sqlite3.Error as error:
            self.connection.close()
            raise StartupError(f"SQLite {sqlite3.sqlite_version} is too old, or lacks a feature: {error}") from error

    def __enter__(self) -> None:
        self.lock.acquire()
        if self.closed:
            self.lock.release()
            raise StoreFailed("the store is closed")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.lock.release()
        if isinstance(error, sqlite3.Error | MemoryError):
            raise to_reply_error(error) from error

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.connection.close()
            self._long_bodies.clear()

    @property
    def is_being_copied(self) -> bool:
        """Whether a snapshot is being written."""
        return self.deletable_id < sys.maxsize

    @contextmanager
    def transaction(self, operation: str) -> Iterator[None]:
        began = time.monotonic()
        # The rollback of an earlier transaction may have failed.
        self.connection.rollback()
        try:
            with self.connection:
                yield
        finally:
            self.count_time(operation, began)

    def count_time(self, operation: str, began: float) -> None:
        times, seconds = self.timings[operation]
        self.timings[operation] = Timing(times + 1, seconds + time.monotonic() - began)

    # Writing

    def insert(self, topics: list[tuple[int, bytes]], rows: list[Row]) -> None:
        long_bodies = {row[0]: row[-1] for row in rows if len(row[-1]) >= LONG_BYTES}
        with self.transaction("write"):
            if topics:
                self.connection.executemany(INSERT_TOPIC, topics)
            if long_bodies:
                rows = [(*row[:-1], b"") if row[0] in long_bodies else row for row in rows]
            self.connection.executemany(INSERT_ROW, rows)
        self._add_long_bodies(long_bodies)

    def delete(self, rows: list[int], empty_topics: list[int], *, are_first: bool = False) -> None:
        """Delete rows by their last ids, and topics without messages. `are_first`: no other rows have lower ids."""
        with self.transaction("expire"):
            if are_first and rows:
                self.connection.execute(DELETE_FIRST, (rows[-1],))
            else:
                self.connection.executemany("DELETE FROM chunks WHERE last_id = ?", [(row,) for row in rows])
            self.connection.executemany("DELETE FROM topics WHERE id = ?", [(topic,) for topic in empty_topics])
        bodies = [self._long_bodies.pop(row) for row in rows if row in self._long_bodies]
        self.long_bytes -= sum(map(len, bodies))
        self.deleted_bodies += bodies

    def shrink(self) -> bool:
        """Release some free pages if there are many; return whether more should be released."""
        pages, free = self._count_pages()
        self._is_shrinking = free > (0 if self._is_shrinking else max(FREE_PAGES, pages // FREE_PAGES_PART))
        if self._is_shrinking:
            # `execute` would stop after the first page.
            self.connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
        return self._is_shrinking

    def _add_long_bodies(self, bodies: dict[int, bytes]) -> None:
        self._long_bodies |= bodies
        self.long_bytes += sum(map(len, bodies.values()))

    def renumber(self, shifts: list[tuple[int, int]]) -> None:
        """Shift the numbers of all messages of topics. `shifts`: pairs of a shift and a topic's id."""
        with self.transaction("write"):
            self.connection.executemany("UPDATE chunks SET last_number = last_number + ? WHERE topic = ?", shifts)

    # Reading

    def read(self, topic: int, after: int, since: int) -> Iterator[StoredMessage]:
        """Iterate over the messages with ids above `after`, put at or after `since`."""
        for row in self.connection.execute(READ, (topic, after, since)):
            yield from self._unpack(row, after)

    def newest_below(self, topic: int, after: int, below: int) -> StoredMessage | None:
        """Return the newest message with an id above `after` and below `below`."""
        # Reads one row, or two if the first starts at or above `below`.
        for row in self.connection.execute(LATEST, (topic, self._row_at(topic, below))):
            if found := [message for message in self._unpack(row, after) if message[0] < below]:
                return found[-1]
        return None

    def _unpack(self, row: Row, after: int) -> Iterator[StoredMessage]:
        return unpack(row if row[-1] else (*row[:-1], self._long_bodies.get(row[0], b"")), after)

    def headers(self, after: int, since: int, topic: int | None = None) -> Iterator[Header]:
        """Iterate over the rows, of one topic or all, with last ids above `after`, put at or after `since`."""
        if topic is None:
            return self.connection.execute(HEADERS, (after, since))
        return self.connection.execute(TOPIC_HEADERS, (after, since, topic))

    def headers_back(self, below: int, since: int, topic: int | None = None) -> Iterator[Header]:
        """Iterate back over the rows, of one topic or all, that may have ids below `below`, put at or after `since`."""
        if topic is not None:
            return self.connection.execute(TOPIC_HEADERS_BACK, (self._row_at(topic, below), since, topic))
        end, block = below, None
        for last_id, put_at in self.connection.execute(PUT_TIMES, (below,)):
            if (found := self.block(last_id, put_at)) != (block := block or found):
                break
            end = last_id
        return self.connection.execute(HEADERS_BACK, (end, since))

    def _row_at(self, topic: int, below: int) -> int:
        """Return the last id of a topic's first row that ends at or above an id, or the id if there is none."""
        if below == sys.maxsize:
            return below
        [(end,)] = self.connection.execute(ROW_AT, (topic, below))
        return end or below

    def block(self, last_id: int, put_at: int) -> tuple[int, int]:
        """Return a key that is equal for rows whose ids may be interleaved."""
        # In snapshots of earlier versions, the ids of all rows of a millisecond may be interleaved.
        return put_at, last_id // BLOCK_IDS if last_id > self.restored_id else 0

    def bodies(self, first: int, last: int) -> dict[int, bytes]:
        """Return the bodies of the rows with last ids from `first` to `last`, by last id."""
        rows = self.connection.execute(BODIES, (first, last))
        return {row: bodies or self._long_bodies.get(row, b"") for row, bodies in rows}

    def id_before(self, since: int) -> int:
        """Return the id of the last message put before `since`, or 0."""
        low, high, found = 0, sys.maxsize, 0
        while low < high:
            # Put times increase with ids.
            middle = (low + high) // 2
            row = self.connection.execute(PUT_TIMES, (middle,)).fetchone()
            if row is not None and row[1] < since:
                found, low = row[0], row[0] + 1
            else:
                high = middle
        return found

    def put_time(self, message_id: int) -> int | None:
        """Return when the first message with this id or a higher one was put."""
        row = self.connection.execute(PUT_TIMES, (message_id,)).fetchone()
        return row and int(row[1])

    def oldest(self, topic: int, after: int) -> tuple[int, int] | None:
        """Return the id and put time of the topic's oldest message with an id above `after`."""
        row = self.connection.execute(OLDEST, (topic, after)).fetchone()
        if row is None:
            return None
        last_id, _, put_at, _, count, packed = row
        ids, _ = unpack_ids_and_sizes(last_id, count, packed)
        return ids[bisect_right(ids, after)], put_at

    def put_times(self) -> Iterator[tuple[int, int, int]]:
        """Iterate over the rows, oldest first: last id, topic, put time."""
        return self.connection.execute("SELECT last_id, topic, put_at FROM chunks ORDER BY last_id")

    def expired(self, oldest: int, topic: int | None = None, last_id: int = sys.maxsize) -> list[ExpiredRow]:
        """Return the first rows, of one topic or all, that were put before `oldest` and may be deleted."""
        found, size, last_id = [], 0, min(last_id, self.deletable_id)
        one = () if topic is None else (topic,)
        for row in self.connection.execute(TOPIC_EXPIRY if one else EXPIRY, (last_id, *one, EXPIRY_ROWS)):
            # Put times increase with ids, so expired rows come first.
            if row[2] >= oldest or size >= EXPIRY_BYTES:
                break
            found.append(row if row[5] else (*row[:5], len(self._long_bodies.get(row[0], b""))))
            size += found[-1][5]
        return found

    def page_bytes(self) -> int:
        """Return the size of all pages in use."""
        pages, free = self._count_pages()
        return (pages - free) * PAGE_BYTES

    def _count_pages(self) -> tuple[int, int]:
        """Return the number of pages and how many of them are free."""
        [(pages,)] = self.connection.execute("PRAGMA page_count")
        [(free,)] = self.connection.execute("PRAGMA freelist_count")
        return pages, free

    def topics(self, after: bytes, count: int) -> list[bytes]:
        """Return the names of topics above `after`, in byte order."""
        return [name for (name,) in self.connection.execute(TOPICS, (after, count))]

    # Snapshots

    def copy_rows(self, last_id: int, last_topic: int) -> Iterator[Batch]:
        """Iterate over topics and rows up to these ids. Takes the lock itself, batch by batch."""
        for insert, last in ((INSERT_TOPIC, last_topic), (INSERT_ROW, last_id)):
            after = 0
            while batch := self._copy(insert, after, last):
                after = batch[-1][0]
                if insert == INSERT_ROW:
                    self.deletable_id = after
                yield insert, batch

    def _copy(self, insert: str, after: int, last: int) -> list[tuple[Any, ...]]:
        found, size, count = [], 0, COPY_ROWS if insert == INSERT_ROW else COPY_TOPICS
        with self:
            for row in self.connection.execute(COPY[insert], (after, last, count)):
                found.append(row if row[-1] else (*row[:-1], self._long_bodies.get(row[0], b"")))
                size += len(found[-1][-1])
                if size >= COPY_BYTES:
                    break
        return found

    def copy_to(self, file: Path, on_progress: Callable[[], None]) -> list[Batch]:
        """Copy all tables to an empty file, which is faster than row by row and leaves no traces of deleted messages.

        on_progress is called periodically; its exceptions end the copy. Returns batches that add the long bodies.
        """
        self.connection.set_progress_handler(on_progress, PROGRESS_INSTRUCTIONS)
        try:
            self.connection.execute("VACUUM INTO ?", (str(file),))
        except sqlite3.OperationalError:
            # SQLite swallows the handler's exceptions, so call it again to raise them.
            on_progress()
            raise
        finally:
            self.connection.set_progress_handler(None, 0)
        return [(UPDATE_BODIES, [(body, row)]) for row, body in self._long_bodies.items()]

    def load(self, source: sqlite3.Connection) -> list[tuple[int, bytes, int, int, int, int]]:
        """Replace the empty database with that of a snapshot; if that fails, nothing changes.

        Returns for each topic: id, name, last number, last id, messages, bytes.
        """
        connection = _open_in_memory()
        try:
            [(_, _, file)] = source.execute("PRAGMA database_list")
            connection.execute("ATTACH ? AS snapshot", (f"file:{quote(file)}?mode=ro&immutable=1",))
            connection.executescript(SCHEMA)
            connection.execute("INSERT INTO topics SELECT id, name FROM snapshot.topics")
            columns = [column[1] for column in source.execute("PRAGMA table_info(chunks)")]
            # Snapshots of earlier versions have an id and a size of each message.
            messages = "messages" if "messages" in columns else "length(ids_and_sizes) / 16"
            connection.execute(LOAD.format(messages=messages), (LONG_BYTES,))
            long_bodies = dict(connection.execute(LOAD_LONG, (LONG_BYTES,)))
            connection.execute(INDEX)
            connection.commit()
            connection.execute("DETACH snapshot")
            held: list[Any] = source.execute(_HELD.format(messages=messages)).fetchall()
        except BaseException:
            connection.close()
            raise
        self.connection.close()
        self.connection = connection
        self._add_long_bodies(long_bodies)
        self.restored_id = max((topic[3] for topic in held), default=0)
        return held


def _open_in_memory() -> sqlite3.Connection:
    connection = sqlite3.connect("file::memory:", uri=True, check_same_thread=False)
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    # Otherwise, SQLite would use a temporary folder, which may not be writable, for large sorts.
    connection.execute("PRAGMA temp_store = MEMORY")
    # On some systems, SQLite overwrites deleted data by default, which would take longer than the rest of expiry.
    connection.execute("PRAGMA secure_delete = OFF")
    return connection


def to_reply_error(error: sqlite3.Error | MemoryError) -> ReplyError:
    """Return the error that clients get."""
    if isinstance(error, MemoryError) or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
        return Full("the server is full: out of memory")
    return StoreFailed(f"SQLite: {error}")
