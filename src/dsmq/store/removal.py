"""Deletes messages that have expired, that are purged, or that a topic drops to make room for newer ones.

If no rule sets an age, expired rows come first. Otherwise, a queue orders topics by the time at which their oldest
message expires, or by an earlier time if that message has been dropped since.

A dropped message may share a row with others or may still have to be copied for a snapshot. So a topic remembers its
last dropped id, readers skip messages up to that id, and a row is deleted once all of its messages are dropped.
"""

from __future__ import annotations

import heapq
import logging
import sqlite3
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from dsmq import logs
from dsmq.errors import ReplyError, StoreFailed
from dsmq.store.api import Limits
from dsmq.store.database import SLICE_SECONDS, Database
from dsmq.store.rules import Rules
from dsmq.store.schema import ExpiredRow, unpack_ids_and_sizes
from dsmq.store.selection import Selection
from dsmq.store.topics import Counts, Topic, TopicTable, WriteBuffer
from dsmq.terminal import quoted

if TYPE_CHECKING:
    from dsmq.store.limits import LimitChecker

# Seconds to pause after a slice that deletes nothing.
PAUSE_SECONDS = 0.0002
# Max topics checked against new rules in one slice.
MAX_CHECKED = 200
# Earlier than any put time.
_EVER = -sys.maxsize

_logger = logging.getLogger(__name__)


class _Written(NamedTuple):
    """Messages to be dropped that are in the database."""

    messages: int = 0
    size: int = 0
    last_id: int = 0
    dead_bytes: int = 0
    """The size of messages that share a row with remaining ones."""
    rows: tuple[int, ...] = ()
    """The last ids of rows without other messages."""


class Removals:
    """The part of a store that deletes messages."""

    max_age_ms: int
    _clock: Callable[[], int]
    _last_id: int
    _database: Database
    _topics: TopicTable
    _buffer: WriteBuffer
    _limits: LimitChecker
    _flush_error: ReplyError | None

    def _begin_removals(self) -> None:
        # For each topic: when its oldest message expires, and its row.
        self._queue: list[tuple[int, int]] = []
        # The ages that the queue was built for.
        self._queued_for: tuple[int, Rules | None] = 0, None
        # Topics that have rows whose messages are all dropped.
        self._undeleted: dict[Topic, None] = {}

    @property
    def limits(self) -> Limits:
        return self._topics.rules.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        if limits != self._topics.rules.limits:
            with self._database.lock:
                self._topics.set_rules(Rules(limits))

    def _age_ms(self, topic: Topic) -> int:
        raise NotImplementedError

    def _flush(self) -> None:
        raise NotImplementedError

    def dropped(self, topic: bytes) -> int:
        """Return the number of messages that a topic has dropped to make room for newer ones."""
        return self._topics.dropped_by_name.get(topic, 0)

    def numbers(self, topic: bytes) -> tuple[int, int, int]:
        """Return a topic's last number, the number of the last message deleted, and how many it has dropped."""
        with self._database.lock:
            found = self._topics.find(topic)
            return found.last_number, found.deleted, self.dropped(topic)

    # Drops

    def _sizes(self, topic: Topic) -> Iterator[int]:
        """Iterate over the sizes of a topic's messages, oldest first."""
        for _, sizes, dead in self._live_rows(topic):
            yield from sizes[dead:]
        for message in topic.buffered:
            yield len(message[3])

    def _live_rows(self, topic: Topic) -> Iterator[tuple[Sequence[int], Sequence[int], int]]:
        """Iterate over the rows with messages that are not dropped: ids, sizes, and the number of dropped ones."""
        if topic.dropped_id < topic.written_id:
            for header in self._database.headers(topic.dropped_id, _EVER, topic.row):
                ids, sizes = unpack_ids_and_sizes(header[0], *header[4:])
                yield ids, sizes, bisect_right(ids, topic.dropped_id)

    def _find_written(self, name: bytes, count: int) -> _Written:
        """Return which of a topic's first `count` messages are in the database. Raises SQLite's errors."""
        topic, found = self._topics.by_name.get(name), _Written()
        for ids, sizes, dead in self._live_rows(topic) if topic else ():
            dropped = sizes[dead : dead + count - found.messages]
            end = dead + len(dropped)
            is_whole = end == len(ids)
            found = _Written(
                found.messages + len(dropped),
                found.size + sum(dropped),
                ids[end - 1],
                0 if is_whole else sum(sizes[:end]),
                (*found.rows, ids[-1]) if is_whole else found.rows,
            )
            if found.messages == count:
                break
        return found

    def _drop(self, counts: dict[bytes, int], found: list[_Written]) -> None:
        """Drop the first messages of topics, but not the newest; `found` has those in the database. Never fails."""
        for (name, count), written in zip(counts.items(), found, strict=True):
            topic, size = self._topics.by_name[name], written.size
            if written.messages:
                topic.dropped_id, topic.dead_bytes = written.last_id, written.dead_bytes
            if buffered := count - written.messages:
                topic.dropped_id, topic.dead_bytes = topic.buffered[buffered - 1][0], 0
                size += self._buffer.drop_first(topic, buffered)
            self._log_first_drop(name)
            self._topics.drop_first(topic, count, size)
            if written.rows:
                self._undeleted[topic] = None
        rows = [row for written in found for row in written.rows]
        if rows and not self._database.is_being_copied:
            try:
                self._delete_rows(rows)
                self._database.deleted_bodies.clear()
            except (sqlite3.Error, MemoryError) as error:
                # Expiry tries again.
                _logger.debug("dropped messages could not be deleted: %s", error)
            else:
                for name in counts:
                    self._undeleted.pop(self._topics.by_name[name], None)

    def _drop_excess(self, topic: Topic) -> int:
        """Drop some messages beyond the limits of a topic; return their number. Raises SQLite's errors."""
        if count := self._limits.excess(topic):
            self._drop({topic.name: count}, [self._find_written(topic.name, count)])
        return count

    def _delete_rows(self, rows: list[int]) -> None:
        self._database.delete(rows, [])
        self._flush_error = None
        self._topics.count_pages(self._database.page_bytes, self._database.long_bytes)

    def _log_first_drop(self, name: bytes) -> None:
        if name not in self._topics.dropped_by_name:
            text = name.decode(errors="replace")
            about = logs.event("dropping", topic=text)
            _logger.info("topic %s is full: dropping its oldest messages for newer ones", quoted(text), extra=about)

    def _delete_dropped(self) -> bool:
        """Delete some rows whose messages are all dropped; return whether none are left that may be deleted."""
        rows: list[int] = []
        for topic in list(islice(self._undeleted, MAX_CHECKED)):
            rows += [row[0] for row in self._database.expired(sys.maxsize, topic.row, topic.dropped_id)]
            del self._undeleted[topic]
            # Move it to the end, to check it again.
            if rows or self._database.is_being_copied:
                self._undeleted[topic] = None
            if len(rows) >= MAX_CHECKED:
                break
        if rows:
            self._delete_rows(rows)
        return not rows

    def _restore_dropped(self, last: dict[bytes, tuple[int, int]]) -> None:
        """Drop restored messages up to the ids in `last` and remove the entries of their topics from it."""
        for name in [name for name in last if name in self._topics.by_name]:
            topic, (number, dropped_id) = self._topics.by_name[name], last.pop(name)
            count = size = 0
            for ids, sizes, _ in self._live_rows(topic):
                dead = bisect_right(ids, dropped_id)
                count += dead
                size += sum(sizes[:dead])
                if dead < len(ids):
                    topic.dead_bytes = sum(sizes[:dead])
                    break
            topic.dropped_id, self._topics.dropped_ids[name] = dropped_id, (number, dropped_id)
            self._undeleted[topic] = None
            self._topics.subtract_restored(topic, count, size)

    # Expiry

    def expire(self) -> int:
        """Delete some messages that have expired or exceed lowered limits; return how many, or 0 if none are left."""
        while True:
            count, is_done = self._expire_slice(self._clock())
            if count or is_done:
                return count
            time.sleep(PAUSE_SECONDS)

    def _expire_slice(self, now: int) -> tuple[int, bool]:
        """Return the number of messages deleted and whether there is nothing left to do."""
        with self._database:
            count, is_done = self._expire_some(now)
            is_shrinking = self._database.shrink()
            # Free them after the lock is released, because the C library may return much memory to the system.
            _bodies, self._database.deleted_bodies = self._database.deleted_bodies, []
        return count, is_done and not is_shrinking

    def _expire_some(self, now: int) -> tuple[int, bool]:
        """Return the number of messages deleted and whether none are left."""
        rules, topics = self._topics.rules, self._topics
        if self._undeleted and not self._delete_dropped():
            return 0, False
        if self._queued_for != (self.max_age_ms, rules):
            self._queued_for, self._queue = (self.max_age_ms, rules), []
            topics.unchecked = list(topics.by_row) if rules.drop or rules.ages else None
        if topics.unchecked:
            return self._check_some(topics.unchecked, is_queued=bool(rules.ages)), False
        if not rules.ages:
            topics.unchecked = None
            return self._expire_first(now - self.max_age_ms)
        return self._expire_queued(now)

    def _check_some(self, unchecked: list[int], *, is_queued: bool) -> int:
        """Make topics drop messages beyond lowered limits and queue them; return the number of messages dropped."""
        dropped, until = 0, time.monotonic() + SLICE_SECONDS
        for _ in range(min(MAX_CHECKED, len(unchecked))):
            row = unchecked.pop()
            topic = self._topics.by_row.get(row)
            if topic is None:
                continue
            if count := self._drop_excess(topic):
                dropped += count
                unchecked.append(row)
            elif is_queued:
                heapq.heappush(self._queue, (0, row))
            if time.monotonic() > until:
                break
        return dropped

    def _expire_first(self, oldest: int) -> tuple[int, bool]:
        """Delete messages put before `oldest`; return values as in `_expire_some`."""
        rows = self._database.expired(oldest)
        # Don't flush the buffer first: there may be no memory left.
        is_buffered = not rows and not self._database.is_being_copied
        deleted = self._buffer.find_older(oldest) if is_buffered else self._topics.sum_rows(rows)
        if not (deleted or rows):
            return 0, True
        emptied = self._emptied(deleted)
        self._database.delete([row[0] for row in rows], emptied, are_first=True)
        return self._subtract(deleted, is_buffered=is_buffered), False

    def _delete_first(self, rows: list[ExpiredRow]) -> int:
        """Delete rows, the first ones of their topics; return the number of messages in them."""
        deleted = self._topics.sum_rows(rows)
        self._database.delete([row[0] for row in rows], self._emptied(deleted))
        return self._subtract(deleted, is_buffered=False)

    def _emptied(self, deleted: Counts) -> list[int]:
        return [topic.row for topic, (count, _) in deleted.items() if topic.messages == count]

    def _subtract(self, deleted: Counts, *, is_buffered: bool) -> int:
        if is_buffered:
            self._buffer.delete_first(deleted)
        self._flush_error = None
        count = self._topics.delete_first(deleted)
        self._topics.count_pages(self._database.page_bytes, self._database.long_bytes)
        return count

    def _expire_queued(self, now: int) -> tuple[int, bool]:
        queue, until = self._queue, time.monotonic() + SLICE_SECONDS
        rows: list[ExpiredRow] = []
        buffered: Counts = {}
        again: list[tuple[int, int]] = []
        while queue and queue[0][0] <= now and len(rows) < MAX_CHECKED and time.monotonic() < until:
            _, row = heapq.heappop(queue)
            if (topic := self._topics.by_row.get(row)) is None:
                continue
            oldest = now - self._age_ms(topic)
            if found := self._database.expired(oldest, row):
                rows += found
                again.append((now, row))
            elif written := self._database.oldest(row, topic.dropped_id):
                # If this message has expired, it has yet to be copied for a snapshot.
                again.append((max(written[1] - oldest, 0) + now + 1, row))
            elif (at := bisect_left(topic.buffered, oldest, key=itemgetter(2))) and not self._database.is_being_copied:
                buffered[topic] = at, sum(len(message[3]) for message in topic.buffered[:at])
                again.append((now, row))
            else:
                again.append((max(topic.buffered[0][2] - oldest, 0) + now + 1, row))
        count = 0
        try:
            if rows:
                count = self._delete_first(rows)
            if buffered:
                self._database.delete([], self._emptied(buffered))
                count += self._subtract(buffered, is_buffered=True)
        finally:
            for entry in again:
                heapq.heappush(queue, entry)
        return count, not queue or queue[0][0] > now

    def _overdue_ms(self, oldest_age_ms: int) -> int:
        """Return the time since the oldest stored message expired."""
        if not self._topics.rules.ages:
            return max(0, oldest_age_ms - self.max_age_ms)
        queue = self._queue
        return max(0, self._clock() - queue[0][0]) if queue and queue[0][0] else 0

    # Purges

    def purge(self, selection: Selection) -> Iterator[int]:
        with self._database:
            # Flush the buffer, so that no row contains messages that are put later.
            self._flush()
            last_id, topics = self._last_id, list(self._topics.by_row)
        while topics:
            with self._database:
                count = self._purge_some(selection, topics, last_id)
            yield count

    def _purge_some(self, selection: Selection, topics: list[int], last_id: int) -> int:
        """Delete some messages and remove finished topics from the list; return the number of messages deleted."""
        if self._database.is_being_copied:
            raise StoreFailed("a snapshot is being written; purge again when it is done")
        count, until = 0, time.monotonic() + SLICE_SECONDS
        while topics and time.monotonic() < until:
            topic = self._topics.by_row.get(topics[-1])
            is_wanted = topic is not None and selection.matches(topic.name)
            rows = self._database.expired(sys.maxsize, topics[-1], last_id) if is_wanted else []
            if rows:
                count += self._delete_first(rows)
            else:
                topics.pop()
        return count
