"""The store: messages in an in-memory SQLite database, behind a write buffer.

A new message is not written to SQLite immediately. It waits in the write buffer, also in memory, until the buffer is
large enough to be flushed; readers see both. Writing one row per message would add 2 to 10 µs to each put and halve the
throughput of pipelined puts. When the buffer is flushed, messages of one topic and millisecond share a row.

Each topic's last id and number are kept outside SQLite, too, so that a reader that is up to date needs no statement.
Ids are assigned here, because SQLite would reuse the id of the newest row after it is deleted.
"""

from __future__ import annotations

import math
import secrets
import sqlite3
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Self
from weakref import WeakKeyDictionary

from dsmq.errors import Aborted, BadRequest, Full, ReplyError
from dsmq.store.api import (
    MEMORY,
    Limits,
    Message,
    Mirrored,
    Outcome,
    Put,
    RetriedKey,
    Timing,
    TopicStats,
    Totals,
    Watched,
)
from dsmq.store.database import Database, to_reply_error
from dsmq.store.dedup import Deduplicator
from dsmq.store.groups import Groups
from dsmq.store.limits import LimitChecker
from dsmq.store.removal import Removals
from dsmq.store.rules import Rules
from dsmq.store.scan import SelectionReads
from dsmq.store.schema import INSERT_ROW, INSERT_TOPIC, Batch, StoredMessage
from dsmq.store.snapshot_contents import Lost, LostRanges, SnapshotState, copy_state, read_producers, read_state
from dsmq.store.topics import Topic, TopicTable, WriteBuffer
from dsmq.system import BOOT_CLOCK

# Flush the write buffer at the first size when idle, at the second in any case.
FLUSH_MESSAGES, MAX_BUFFERED_MESSAGES = 32, 512
FLUSH_BYTES, MAX_BUFFERED_BYTES = 32_768, 262_144
# After a failed flush, retry after this time or once messages have expired.
RETRY_MS = 100


def monotonic_ms() -> int:
    """Return milliseconds on a clock that runs while the machine sleeps and ignores changes of the wall clock."""
    return (time.monotonic_ns() if BOOT_CLOCK is None else time.clock_gettime_ns(BOOT_CLOCK)) // 1_000_000


class SQLiteStore(SelectionReads, Removals):
    """A store in this process. Thread-safe."""

    is_shared = False
    max_message_bytes = sys.maxsize
    thread: Thread | None = None
    due_at = math.inf
    unready_reason = ""

    def __init__(self, max_age_ms: int, clock: Callable[[], int] = monotonic_ms, limits: Limits | None = None) -> None:
        self.max_age_ms = max_age_ms
        self.epoch, self.run = secrets.token_hex(8), secrets.token_hex(8)
        self._lost = LostRanges()
        self._clock, self._last_id, self._last_put_at = clock, 0, 0
        self._database, self._topics, self._buffer = Database(), TopicTable(Rules(limits or Limits())), WriteBuffer()
        self._flush_error: ReplyError | None = None
        self._retry_at = 0
        self._limits = LimitChecker(self._topics, self._sizes)
        self._begin_removals()
        self._deduplicator, self._matches = Deduplicator(), WeakKeyDictionary()
        self.groups = Groups(self)

    @property
    def in_memory(self) -> Self:
        return self

    # Puts

    def append(self, puts: Sequence[Put], watched: Watched | None = None) -> list[Outcome]:
        with self._database:
            if watched:
                self._check_unchanged(watched)
            # Do everything that can fail before adding the first message.
            topics, buffer, limits = self._topics, self._buffer, self._limits
            drops: dict[bytes, int] | None = None
            messages, size, names, is_keyed = topics.after(puts)
            if is_keyed:
                self._deduplicator.check(puts)
            if messages > topics.safe_messages or size > topics.safe_bytes:
                drops = limits.check(self._new_puts(puts))
            is_full = buffer.messages >= MAX_BUFFERED_MESSAGES or buffer.bytes >= MAX_BUFFERED_BYTES
            if is_full and any(self._new_puts(puts)):
                self._flush()
            if drops:
                written = [self._find_written(name, count) for name, count in drops.items()]
            if names and (names := names.intersection(put[0] for put in self._new_puts(puts))):
                limits.check_limit("max_topics", len(names))
                topics.add(names)
            ids = self._add(puts, self._clock())
            if drops:
                self._drop(drops, written)
            return ids

    append_together = append

    def _check_unchanged(self, watched: Watched) -> None:
        for topic, last_id in watched.items():
            # An unknown topic may be one that was forgotten.
            if (self._topics.find(topic).last_id or self._topics.forgotten_id) > last_id:
                raise Aborted("a watched topic has a newer message")

    def _new_puts(self, puts: Sequence[Put]) -> Iterator[Put]:
        """Iterate over the puts that were not stored before."""
        keys = set()
        for put in puts:
            key = put[2]
            if key is None or (key not in keys and self._deduplicator.find(key) is None):
                keys.add(key)
                yield put

    def _add(self, puts: Sequence[Put], now: int) -> list[Outcome]:
        ids, self._last_id = self._topics.append(puts, self._last_id, now, self._buffer, self._deduplicator)
        return ids

    def check_producer(self, producer: bytes) -> None:
        """Raise Forgotten if the store may have forgotten recent puts of this producer."""
        with self._database:
            self._deduplicator.check_unknown(producer, self._clock())

    def flush(self) -> None:
        if self._buffer.messages >= FLUSH_MESSAGES or self._buffer.bytes >= FLUSH_BYTES:
            with self._database:
                self._flush()

    def _flush(self) -> None:
        if self._flush_error and self._clock() < self._retry_at:
            raise self._flush_error.with_traceback(None)
        try:
            self._database.insert(self._buffer.new_topics(), self._buffer.rows())
        except (sqlite3.Error, MemoryError) as error:
            self._flush_error, self._retry_at = to_reply_error(error), self._clock() + RETRY_MS
            if isinstance(self._flush_error, Full):
                self._limits.record_full(MEMORY)
            raise
        self._buffer.clear(self._last_id, self._topics.last_row)
        self._topics.count_pages(self._database.page_bytes, self._database.long_bytes)

    # Reads

    def read(self, topic: bytes, after: int, count: int, max_bytes: int, wait_ms: int = 0) -> list[Message]:  # noqa: ARG002 - it is always up to date
        known = self._topics.by_name.get(topic)
        if known is None or after >= known.last_id:
            return []
        messages = []
        with self._database:
            now = self._clock()
            began = time.monotonic() if after < known.written_id else 0.0
            since = now - self._age_ms(known)
            for message_id, number, put_at, body in self._messages_after(known, max(after, known.dropped_id), since):
                messages.append(Message(message_id, number, now - put_at, body, put_at - since))
                max_bytes -= len(body)
                if len(messages) == count or max_bytes <= 0:
                    break
            if began:
                self._database.count_time("read", began)
            if messages:
                self._topics.deleted_unread += known.mark_read(after, messages[0], messages[-1])
        return messages

    def _messages_after(self, topic: Topic, after: int, since: int) -> Iterator[StoredMessage]:
        """Iterate over the messages with ids above `after`, put at or after `since`."""
        if after < topic.written_id:
            yield from self._database.read(topic.row, after, since)
        for message in topic.buffered[bisect_left(topic.buffered, (after + 1,)) :]:
            if message[2] >= since:
                yield message

    def latest(self, topic: bytes, after: int, below: int = sys.maxsize) -> list[Message]:
        known = self._topics.by_name.get(topic)
        if known is None or after >= known.last_id:
            return []
        with self._database:
            message = self._newest_below(known, below)
            if message is None or message.id <= after:
                return []
            # Skipped messages count as read.
            known.mark_read(message.id, message, message)
            return [message]

    def last_id(self) -> int:
        return self._last_id

    def start_id(self) -> int:
        return self._last_id

    def check_id(self, after: int) -> None:
        if after > self._last_id:
            raise BadRequest(f"no message has an id above {self._last_id} yet; was the server restarted since?")

    # Statistics

    def topics(self, after: bytes, count: int) -> list[TopicStats]:
        """Return the topics with messages and with names above `after`, in byte order."""
        with self._database:
            unwritten = [name for _, name in self._buffer.new_topics() if name > after]
            names = sorted(self._database.topics(after, count) + unwritten)
            return [self._topics.by_name[name].stats() for name in names[:count]]

    @property
    def lost_ids(self) -> list[int]:
        return [end for lost in self._lost.ranges for end in lost[:2]]

    def stats(self, topic: bytes, after: int = 0) -> TopicStats:
        """Return a topic's statistics for a reader that has read up to `after`; zeros if the topic is empty."""
        with self._database:
            known = self._topics.find(topic)
            stats = known.stats()._replace(restored_number=self._lost.restored_number(topic, after))
            if known.messages:
                written = self._database.oldest(known.row, known.dropped_id)
                first_id, put_at = written or (known.buffered[0][0], known.buffered[0][2])
                stats = stats._replace(first_id=first_id, oldest_age_ms=self._clock() - put_at)
            return stats._replace(dropped=self.dropped(topic))

    def totals(self) -> Totals:
        topics = self._topics
        oldest_age_ms = self._oldest_age() if topics.messages else 0
        return Totals(
            topics.messages,
            topics.bytes,
            len(topics.by_name),
            topics.stored - topics.restored,
            topics.deleted - topics.dropped,
            topics.deleted_unread,
            oldest_age_ms,
            topics.accounted_bytes,
            topics.dropped,
            self._overdue_ms(oldest_age_ms),
        )

    def _oldest_age(self) -> int:
        with suppress(ReplyError), self._database:
            now = self._clock()
            for last_id, topic, put_at in self._database.put_times():
                if last_id > self._topics.by_row[topic].dropped_id:
                    return max(0, now - put_at)
            # Rows are older than the messages in the buffer.
            return max(0, now - min([topic.buffered[0][2] for topic in self._buffer.dirty_topics], default=now))
        return 0

    def full(self) -> set[str]:
        with self._database:
            return self._limits.full()

    def timings(self) -> dict[str, Timing]:
        return self._database.timings.copy()

    def engine(self) -> None:
        return None

    def last_numbers(self) -> dict[bytes, int]:
        """Return the number of the last message of each topic with messages."""
        return self._topics.last_numbers()

    def last_number(self, topic: bytes) -> int:
        """Return the number of the last message put into a topic, or 0."""
        return self._topics.find(topic).last_number

    def largest_topics(self, count: int) -> list[bytes]:
        """Return the topics with the most messages."""
        return self._topics.largest(count)

    # Snapshots

    @contextmanager
    def snapshot(
        self, unix_time: float, *, is_last: bool, file: Path | None, on_progress: Callable[[], None]
    ) -> Iterator[Iterator[Batch]]:
        """Take a snapshot of this instant: yield its rows in batches too short to delay clients.

        Later puts are not part of it, and nothing is deleted before it is copied. If `file`, an empty database file, is
        given, all tables are first copied to it, which is faster than row by row but blocks the store. on_progress is
        called periodically, and its exceptions end the copy.
        """
        database, topics, buffer = self._database, self._topics, self._buffer
        try:
            # `with database` would convert errors of the file to errors of the store.
            with self.groups.lock, database.lock:
                groups = self.groups.begin_copy()
                state = SnapshotState(
                    *(self.epoch, self.run, self._clock(), self._last_id, topics.last_row, None, unix_time, is_last),
                    *(topics.empty | topics.dropped_ids, self._lost.ranges),
                )
                database.deletable_id = 0
                buffered: list[Batch] = [(INSERT_TOPIC, buffer.new_topics()), (INSERT_ROW, buffer.rows())]
                written = buffer.written_id, buffer.written_row
                copied = database.copy_to(file, on_progress) if file else database.copy_rows(*written)
            yield chain(groups, copied, buffered, copy_state(database, state, self._deduplicator))
        finally:
            database.deletable_id = sys.maxsize
            self.groups.end_copy()

    def load(self, source: sqlite3.Connection, unix_time: float) -> SnapshotState:
        """Load a snapshot into a new store and return its state. Restored messages count as read."""
        # Read the clock first, because the rest takes time.
        clock, now = self._clock, self._clock()
        state, producers = read_state(source), read_producers(source)
        ahead_ms = state.clock + round(max(0.0, unix_time - state.written_at) * 1000) - now
        with self._database.lock:
            self._topics.restore(self._database.load(source))
            self._restore_dropped(state.empty_topics)
            self._topics.count_pages(self._database.page_bytes, self._database.long_bytes)
        self._clock = lambda: clock() + ahead_ms
        self.epoch, self.run, self._lost = state.epoch, state.run, LostRanges(state.lost)
        self._last_id, self._topics.last_row, self._topics.empty = state.last_id, state.last_row, state.empty_topics
        self._buffer.clear(state.last_id, state.last_row)
        self._deduplicator.restore(producers, state.forgot_at)
        self.groups.load(source, self._clock())
        return state

    def begin_run(self, last_id: int) -> None:
        """Begin a new run, because the last messages put before a kill are lost. Ids continue from `last_id`.

        Numbers continue from the snapshot. A reader that has seen higher ones falls back to the snapshot's.
        """
        numbers = {name: number for name, (number, _) in self._topics.empty.items()} | self.last_numbers()
        self._lost.add(Lost(self._last_id, last_id, numbers))
        self.run, self._last_id = secrets.token_hex(8), last_id

    # Lifecycle

    def start(self, on_messages: Callable[[set[bytes]], None], on_unusable: Callable[[str], None]) -> None:  # noqa: ARG002
        self.groups.on_messages = on_messages

    def wait(self, _seconds: float) -> bool:
        return True

    def close(self) -> None:
        self._database.close()

    def close_inherited(self) -> None: ...


class MirrorStore(SQLiteStore):
    """Stores the messages of a log, in the log's order and with its ids. Thread-safe.

    Which messages topics drop must depend on that order alone, not on expiry, which depends on clocks. So messages are
    dropped only because of the limits of their topic.
    """

    def __init__(self, max_age_ms: int, limits: Limits | None = None) -> None:
        super().__init__(max_age_ms, limits=limits)
        self._limits.drops_for_all = False

    def check(self, puts: Sequence[Put]) -> list[int | None]:
        """Return the ids of puts that are already stored. Raises Full or Forgotten as `append` does."""
        with self._database:
            self._deduplicator.check(puts)
            # Retries are not checked: Full would mean that the put is not stored, but an earlier attempt may be in the
            # part of the log that is not applied yet.
            new = [put for put in self._new_puts(puts) if not isinstance(put[2], RetriedKey)]
            self._limits.check(new)
            names = {put[0] for put in new if put[0] not in self._topics.by_name}
            if names:
                self._limits.check_limit("max_topics", len(names))
        return self.find(puts)

    def find(self, puts: Sequence[Put]) -> list[int | None]:
        """Return the ids of puts that are already stored."""
        with self._database:
            return [None if put[2] is None else self._deduplicator.find(put[2]) for put in puts]

    def limit_memory(self, milliseconds: int) -> None:
        """Record that the log may have lost puts that are older than this."""
        with self._database:
            self._deduplicator.forgot_at = self._clock() - milliseconds

    def apply(self, messages: Sequence[Mirrored], last_id: int) -> None:
        """Store the next messages of a log, except repetitions; `last_id` is the highest id so far."""
        with self._database:
            topics = self._topics
            if self._buffer.messages >= MAX_BUFFERED_MESSAGES or self._buffer.bytes >= MAX_BUFFERED_BYTES:
                # Follow the log even if there is no memory to flush the buffer.
                with suppress(ReplyError, sqlite3.Error, MemoryError):
                    self._flush()
            now = self._clock()
            for message_id, put, age_ms in messages:
                if self._deduplicator.is_forgotten(put[2]):
                    # All new puts have higher numbers, so this is a late repetition.
                    continue
                if put[0] not in topics.by_name:
                    topics.add([put[0]])
                # Expiry relies on times never decreasing.
                self._last_put_at = max(self._last_put_at, now - age_ms)
                self._last_id = message_id - 1
                self._add([put], self._last_put_at)
            self._last_id = last_id
            if topics.rules.drop:
                # Expiry, or the topic's next message, tries again.
                with suppress(sqlite3.Error, MemoryError):
                    for topic in {topics.by_name[put[0]] for _, put, _ in messages if put[0] in topics.by_name}:
                        while self._drop_excess(topic):
                            pass

    def expire_as_of(self, milliseconds: int) -> Iterator[int]:
        """Do in slices what `expire` would have done this long ago; yield the number of messages deleted in each."""
        now, is_done = self._clock() - milliseconds, False
        while not is_done:
            count, is_done = self._expire_slice(now)
            yield count

    def renumber(self, numbers: Mapping[bytes, int]) -> None:
        """Shift message numbers so that each topic ends with the given number. Raises StoreFailed or Full."""
        with self._database:
            self._flush()
            shifts = []
            for name, number in numbers.items():
                topic = self._topics.by_name.get(name)
                if topic is None:
                    self._topics.empty[name] = number, 0
                elif shift := number - topic.last_number:
                    topic.renumber(shift)
                    shifts.append((shift, topic.row))
            self._database.renumber(shifts)

    def all_numbers(self) -> tuple[int, dict[bytes, int]]:
        """Return the last id and the last number of each topic, including empty ones, as of that id."""
        with self._database:
            empty = {name: number for name, (number, _) in self._topics.empty.items()}
            return self._last_id, empty | self._topics.last_numbers()
