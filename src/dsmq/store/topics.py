"""The index of topics and the write buffer, both in memory, outside SQLite."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, TypeAlias

from dsmq.store.api import (
    MESSAGE_OVERHEAD_BYTES,
    Message,
    Outcome,
    Put,
    TopicStats,
    accounted_bytes,
    accounted_topic_bytes,
)
from dsmq.store.schema import ExpiredRow, Row, StoredMessage, pack

if TYPE_CHECKING:
    from dsmq.store.dedup import Deduplicator, Producer
    from dsmq.store.rules import Rules, TopicLimits

# Max topics without messages whose last numbers are remembered; the numbers of others restart at 1.
MAX_EMPTY_TOPICS = 100_000
# Max topics whose dropped messages are counted.
MAX_DROPPING_TOPICS = 100_000
# This many bytes of pages don't count towards the limit, so that small limits are exact.
FREE_PAGE_BYTES = 1_048_576
# Count the pages again after the stored bytes have changed by this much; counting takes as long as an INSERT.
COUNT_PAGES_BYTES = 65_536


class Topic:
    """A topic with messages."""

    __slots__ = (
        *("name", "row", "last_number", "last_id", "bytes", "deleted"),
        *("read_number", "read_id", "buffered", "written_id"),
        *("dropped_id", "dead_bytes", "limits"),
    )

    def __init__(self, name: bytes, row: int, last_number: int = 0, last_id: int = 0) -> None:
        self.name = name
        self.row = row
        self.last_number, self.last_id = last_number, last_id
        # Total size of the bodies.
        self.bytes = 0
        # The number of messages deleted; they are always the oldest.
        self.deleted = last_number
        # The newest message that any client has read.
        self.read_number = self.read_id = 0
        # The messages in the write buffer and the topic's last id in the database, or 0.
        self.buffered: list[StoredMessage] = []
        self.written_id = 0
        # The last dropped id. Dropped messages may still be in the database: in the row of the oldest remaining
        # message, where they take `dead_bytes`, and, while a snapshot is being written, in others.
        self.dropped_id = self.dead_bytes = 0
        self.limits: TopicLimits | None = None

    @property
    def messages(self) -> int:
        return self.last_number - self.deleted

    @property
    def accounted_bytes(self) -> int:
        return accounted_bytes(self.messages, self.bytes)

    def mark_read(self, after: int, first: Message, last: Message) -> int:
        """Mark messages as read; return the number of older ones that expired unread.

        If the reader continues from a message that was read before, messages missing in between have expired.
        Otherwise, the reader has skipped them, and they count as read.
        """
        if last.number <= self.read_number:
            return 0
        missed = first.number - 1 - max(self.read_number, self.deleted) if after <= self.read_id else 0
        self.read_number, self.read_id = last.number, last.id
        return max(0, missed)

    def renumber(self, shift: int) -> None:
        """Shift the numbers of all messages."""
        self.last_number += shift
        self.deleted += shift
        self.read_number += shift if self.read_number else 0

    def delete_first(self, count: int, size: int) -> int:
        """Subtract deleted messages and the bytes of their bodies; return the number of unread ones."""
        first_unread = max(self.deleted, self.read_number)
        self.deleted += count
        self.bytes -= size
        return max(0, self.deleted - first_unread)

    def stats(self) -> TopicStats:
        return TopicStats(self.name, self.messages, self.bytes, self.last_number, self.last_id)


Counts: TypeAlias = dict[Topic, tuple[int, int]]
"""Number of messages and bytes of their bodies by topic, ordered by last put."""


class TopicTable:
    """All topics and the sums over them."""

    def __init__(self, rules: Rules) -> None:
        self.set_rules(rules)
        self.by_name: dict[bytes, Topic] = {}
        self.by_row: dict[int, Topic] = {}
        # Last number and id of topics without messages, ordered by last put.
        self.empty: dict[bytes, tuple[int, int]] = {}
        # The highest last id of a topic that is no longer in `empty`.
        self.forgotten_id = 0
        self.last_row = 0
        # Messages since the start. `stored` includes `restored`, and `deleted` includes `dropped`.
        self.stored = self.restored = self.deleted = self.deleted_unread = self.dropped = 0
        # Dropped messages by topic, including topics without messages.
        self.dropped_by_name: dict[bytes, int] = {}
        # Rows of topics to check because the topics or the rules are new. None: no check is needed.
        self.unchecked: list[int] | None = None
        # For each topic with messages, the number and id of its last dropped message.
        self.dropped_ids: dict[bytes, tuple[int, int]] = {}
        # Bytes of bodies, of topics with overhead, and of pages beyond the messages with overhead.
        self.bytes = self.topic_bytes = self.padding_bytes = 0
        self._counted_bytes = 0

    @property
    def messages(self) -> int:
        return self.stored - self.deleted

    @property
    def accounted_bytes(self) -> int:
        return self.topic_bytes + self.padding_bytes + accounted_bytes(self.messages, self.bytes)

    def count_pages(self, page_bytes: Callable[[], int], long_bytes: int) -> None:
        """Apply the limit on bytes to pages, too, because pages may be half empty. Long bodies are not in pages."""
        counted = accounted_bytes(self.messages, self.bytes)
        if abs(counted - self._counted_bytes) >= COUNT_PAGES_BYTES:
            self._counted_bytes = counted
            self.padding_bytes = max(0, (page_bytes() - FREE_PAGE_BYTES) * 5 // 6 + long_bytes - counted)

    def set_rules(self, rules: Rules) -> None:
        self.rules = rules
        self.safe_messages, self.safe_bytes = rules.safe_messages, rules.safe_bytes

    def find(self, name: bytes) -> Topic:
        """Return a topic, possibly one without messages."""
        return self.by_name.get(name) or Topic(name, 0, *self.empty.get(name, ()))

    def add(self, names: Iterable[bytes]) -> None:
        """Add topics in the order of their rows, which are never reused; snapshots rely on both."""
        for name in names:
            self.last_row += 1
            topic = Topic(name, self.last_row, *self.empty.pop(name, ()))
            self.by_name[name] = self.by_row[topic.row] = topic
            self.topic_bytes += accounted_topic_bytes([name])
            if self.unchecked is not None:
                self.unchecked.append(topic.row)

    def after(self, puts: Sequence[Put]) -> tuple[int, int, set[bytes], bool]:
        """Return the messages and accounted bytes after these puts, the new topics, and whether a put has a key."""
        by_name, names, is_keyed = self.by_name, set(), False
        messages = self.stored - self.deleted + len(puts)
        size = self.topic_bytes + self.padding_bytes + self.bytes + messages * MESSAGE_OVERHEAD_BYTES
        for name, body, key in puts:
            size += len(body)
            if name not in by_name:
                names.add(name)
            if key is not None:
                is_keyed = True
        return messages, size + accounted_topic_bytes(names) if names else size, names, is_keyed

    def append(
        self, puts: Sequence[Put], last_id: int, now: int, buffer: WriteBuffer, deduplicator: Deduplicator
    ) -> tuple[list[Outcome], int]:
        """Add messages to their topics, which must exist, and to the write buffer; return all ids and the last one."""
        ids: list[Outcome] = []
        touched: dict[bytes, Producer] = {}
        by_name, first_id, size = self.by_name, last_id, 0
        for name, body, key in puts:
            if key is not None and (known_id := deduplicator.remember(key, last_id + 1, now, touched)):
                ids.append(known_id)
                continue
            topic = by_name[name]
            if not topic.buffered:
                buffer.dirty_topics.append(topic)
            last_id += 1
            topic.last_number += 1
            topic.buffered.append((last_id, topic.last_number, now, body))
            length = len(body)
            topic.bytes += length
            topic.last_id = last_id
            size += length
            ids.append(last_id)
        if touched:
            deduplicator.forget(touched, now)
        self.stored += last_id - first_id
        buffer.messages += last_id - first_id
        buffer.bytes += size
        self.bytes += size
        return ids, last_id

    def sum_rows(self, rows: Iterable[ExpiredRow]) -> Counts:
        """Sum up rows returned by `Database.expired`, without dropped messages."""
        found: Counts = {}
        for _, row, _, last_number, count, size in rows:
            topic = self.by_row[row]
            # Remove and add it again, so that topics stay ordered by their last messages.
            messages, total = found.pop(topic, (0, 0))
            live = min(count, last_number - topic.deleted)
            if live == count:
                found[topic] = messages + count, total + size
            elif live > 0:
                found[topic] = messages + live, total + size - topic.dead_bytes
        return found

    def drop_first(self, topic: Topic, count: int, size: int) -> None:
        """Subtract dropped messages. The topic keeps its newest one."""
        topic.delete_first(count, size)
        self.dropped_ids[topic.name] = topic.deleted, topic.dropped_id
        self.bytes -= size
        self.deleted += count
        self.dropped += count
        # Add it at the end, so that the least recent one is forgotten.
        self.dropped_by_name[topic.name] = self.dropped_by_name.pop(topic.name, 0) + count
        if len(self.dropped_by_name) > MAX_DROPPING_TOPICS:
            del self.dropped_by_name[next(iter(self.dropped_by_name))]
        # Make `count_pages` count again: the sum does not change while messages of the same size come and go.
        self._counted_bytes -= size

    def delete_first(self, deleted: Counts) -> int:
        """Subtract deleted messages; return their number."""
        for topic, (count, size) in deleted.items():
            self.deleted_unread += topic.delete_first(count, size)
            self.deleted += count
            self.bytes -= size
            if not topic.messages:
                del self.by_name[topic.name], self.by_row[topic.row]
                self.dropped_ids.pop(topic.name, None)
                self.empty[topic.name] = topic.last_number, topic.last_id
                self.topic_bytes -= accounted_topic_bytes([topic.name])
        while len(self.empty) > MAX_EMPTY_TOPICS:
            _, last_id = self.empty.pop(next(iter(self.empty)))
            self.forgotten_id = max(self.forgotten_id, last_id)
        return sum(count for count, _ in deleted.values())

    def restore(self, rows: Iterable[tuple[int, bytes, int, int, int, int]]) -> None:
        """Add topics returned by `Database.load`. Their messages count as read."""
        for row, name, last_number, last_id, count, size in rows:
            topic = self.by_name[name] = self.by_row[row] = Topic(name, row, last_number, last_id)
            topic.written_id, topic.deleted, topic.bytes = last_id, last_number - count, size
            topic.read_number, topic.read_id = last_number, last_id
            self.restored += count
            self.bytes += size
        self.stored = self.restored
        self.topic_bytes = accounted_topic_bytes(self.by_name)

    def subtract_restored(self, topic: Topic, count: int, size: int) -> None:
        """Subtract messages that are in a snapshot but were dropped before it."""
        topic.delete_first(count, size)
        self.bytes -= size
        self.restored -= count
        self.stored -= count

    def largest(self, count: int) -> list[bytes]:
        return [topic.name for topic in heapq.nlargest(count, list(self.by_name.values()), attrgetter("messages"))]

    def last_numbers(self) -> dict[bytes, int]:
        # Copying the values is atomic, so this needs no lock.
        topics = list(self.by_name.values())
        return dict(zip(map(attrgetter("name"), topics), map(attrgetter("last_number"), topics), strict=True))


class WriteBuffer:
    """The topics with messages that are not in SQLite yet; the messages are in each topic's `buffered`."""

    def __init__(self) -> None:
        self.dirty_topics: list[Topic] = []
        self.messages = self.bytes = 0
        # The last id and topic row in the database.
        self.written_id = self.written_row = 0

    def after(self, message_id: int) -> list[Topic]:
        """Return the topics with messages above an id."""
        return [topic for topic in self.dirty_topics if topic.last_id > message_id]

    def new_topics(self) -> list[tuple[int, bytes]]:
        """Return the rows and names of topics that are not in the database yet."""
        return [(topic.row, topic.name) for topic in self.dirty_topics if topic.row > self.written_row]

    def rows(self) -> list[Row]:
        return pack((topic.row, topic.buffered) for topic in self.dirty_topics)

    def clear(self, last_id: int, last_row: int) -> None:
        """Discard messages up to this id and topic row, because they have been written."""
        self.written_id, self.written_row = last_id, last_row
        for topic in self.dirty_topics:
            topic.written_id = topic.last_id
            topic.buffered = []
        self.dirty_topics = []
        self.messages = self.bytes = 0

    def find_older(self, oldest: int) -> Counts:
        """Sum up the messages that were put before `oldest`."""
        found = {}
        for topic in sorted(self.dirty_topics, key=attrgetter("last_id")):
            if count := bisect_left(topic.buffered, oldest, key=itemgetter(2)):
                found[topic] = count, sum(len(message[3]) for message in topic.buffered[:count])
        return found

    def drop_first(self, topic: Topic, count: int) -> int:
        """Discard the first messages of a topic, but not all; return the size of their bodies."""
        size = sum(len(message[3]) for message in topic.buffered[:count])
        del topic.buffered[:count]
        self.messages -= count
        self.bytes -= size
        return size

    def delete_first(self, deleted: Counts) -> None:
        for topic, (count, size) in deleted.items():
            del topic.buffered[:count]
            self.messages -= count
            self.bytes -= size
        self.dirty_topics = [topic for topic in self.dirty_topics if topic.buffered]
