"""Reads of several topics at once, in the order of ids: of a selection, for which the store may have no index.

A scan takes a bounded time, so that other clients are served in between: it may end before it has found anything, and
goes on from the position that it has reached.
"""

from __future__ import annotations

import sys
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from heapq import merge
from operator import itemgetter
from typing import TypeAlias

from dsmq.store.api import Found, ManyTopics, Message, TopicMessage
from dsmq.store.database import Database, Header
from dsmq.store.selection import Selection
from dsmq.store.topics import Topic, TopicTable, WriteBuffer

# How long a scan may take before it returns what it has, in seconds.
SCAN_SECONDS = 0.0005
# If no more topics than this have something to read, each is read by the index, instead of all rows.
MAX_MERGED_TOPICS = 16

_Candidate: TypeAlias = tuple[int, int, int, int, Topic, int, int, bytes | None]
"""Id, number, put time and size of a message; its topic; key of its row and offset in that; body, if it is buffered."""
_Part: TypeAlias = tuple[int, list[_Candidate]]
"""All that a scan has found up to an id, or down to it."""


class SelectionReads:
    """Reads of a selection, as part of a store."""

    max_age_ms: int
    _clock: Callable[[], int]
    _last_id: int
    _database: Database
    _topics: TopicTable
    _buffer: WriteBuffer

    def read_many(self, wanted: ManyTopics, wait_ms: int = 0) -> Found:  # noqa: ARG002 - it is always up to date
        after, left = wanted.after, wanted.max_bytes
        with self._database:
            end = max(after, min(self._last_id, wanted.below - 1))
            now, until = self._clock(), time.monotonic() + SCAN_SECONDS
            position, chosen = after, list[_Candidate]()
            for up_to, candidates in self._forwards(wanted, now):
                for candidate in candidates:
                    chosen.append(candidate)
                    left -= candidate[3] + len(candidate[4].name)
                    if len(chosen) == wanted.max_count or left <= 0:
                        return Found(candidate[0], self._fetch(chosen, wanted, now), is_complete=True)
                position = min(up_to, end)
                if position > after and time.monotonic() >= until:
                    break
            else:
                position = end
            return Found(position, self._fetch(chosen, wanted, now) if chosen else [], position == end)

    def _fetch(self, chosen: list[_Candidate], wanted: ManyTopics, now: int) -> list[TopicMessage]:
        """Return the chosen messages with their bodies."""
        began = time.monotonic() if chosen[0][7] is None else 0.0
        found, put_at, rows = [], 0, dict[int, bytes]()
        ends: dict[Topic, tuple[Message, Message]] = {}
        for message_id, number, at, size, topic, row, start, buffered in chosen:
            body = buffered
            if body is None:
                if at != put_at:
                    # Only rows of the same millisecond are mixed.
                    rows, put_at = {}, at
                if row not in rows:
                    rows[row] = self._database.bodies(row)
                body = rows[row][start : start + size]
            age_ms = now - at
            left_ms = self._age_ms(topic) - age_ms
            found.append(TopicMessage(topic.name, message_id, number, age_ms, body, left_ms))
            last = Message(message_id, number, age_ms, b"", left_ms)
            ends[topic] = ends[topic][0] if topic in ends else last, last
        for topic, (first, last) in ends.items():
            # The messages that `latest` skips count as read.
            after = last.id if wanted.latest else wanted.after
            self._topics.deleted_unread += topic.mark_read(after, first, last)
        if began:
            self._database.count_time("read", began)
        return found

    def _age_ms(self, topic: Topic) -> int:
        """Return the age at which the topic's messages expire."""
        if not self._topics.rules.ages:
            return self.max_age_ms
        age_ms = self._topics.rules.of(topic).max_age_ms
        return self.max_age_ms if age_ms is None else age_ms

    def _longest_age_ms(self) -> int:
        return max([self.max_age_ms, *self._topics.rules.ages])

    # Forwards

    def _forwards(self, wanted: ManyTopics, now: int) -> Iterator[_Part]:
        """Iterate over the messages that are wanted."""
        selection, after, written_id = wanted.selection, wanted.after, self._buffer.written_id
        behind = self._behind(selection, after)
        if behind is not None and not behind:
            return
        if after < written_id:
            written = [topic for topic in behind or () if after < topic.written_id]
            is_scanned = behind is None or len(written) > MAX_MERGED_TOPICS
            parts = self._scan(selection, after, now) if is_scanned else self._merged(written, after, now)
            for up_to, candidates in parts:
                yield up_to, [candidate for candidate in candidates if _is_wanted(candidate, wanted, self._database)]
            yield written_id, []
        buffered = self._buffered(selection, behind, after, now)
        yield self._last_id, [candidate for candidate in buffered if _is_wanted(candidate, wanted, self._database)]

    def _behind(self, selection: Selection, after: int) -> list[Topic] | None:
        """Return the topics with messages above an id, or None if that takes a scan."""
        if selection.patterns:
            return [] if after >= self._last_id else None
        by_name = self._topics.by_name
        found = [by_name[name] for name in selection.names if name in by_name]
        return [topic for topic in found if topic.last_id > after]

    def _scan(self, selection: Selection, after: int, now: int) -> Iterator[_Part]:
        """Scan all rows. Those of one millisecond may be mixed, and are sorted; puts of later ones have higher ids."""
        matching: dict[int, Topic | None] = {}
        put_at, up_to, candidates = 0, after, list[_Candidate]()
        for header in self._database.headers(after, now - self._longest_age_ms()):
            if header[2] != put_at:
                if put_at:
                    candidates.sort()
                    yield up_to, candidates
                    candidates = []
                put_at = header[2]
            up_to = header[0]
            topic = self._match(selection, header[1], matching)
            if topic is not None and now - header[2] <= self._age_ms(topic):
                candidates += _unpack(header, topic, after)
        candidates.sort()
        yield up_to, candidates

    def _match(self, selection: Selection, row: int, known: dict[int, Topic | None]) -> Topic | None:
        """Return the topic of a row if the selection has it."""
        if row not in known:
            topic = self._topics.by_row[row]
            known[row] = topic if selection.matches(topic.name) else None
        return known[row]

    def _merged(self, topics: list[Topic], after: int, now: int) -> Iterator[_Part]:
        """Merge the rows of these topics."""
        rows = [
            _messages(self._database.headers(after, now - self._age_ms(topic), topic.row), topic, after)
            for topic in topics
        ]
        for candidate in merge(*rows):
            yield candidate[0], [candidate]

    def _buffered(self, selection: Selection, behind: list[Topic] | None, after: int, now: int) -> list[_Candidate]:
        """Return the messages in the write buffer with ids above `after`."""
        if behind is None:
            behind = [topic for topic in self._buffer.after(after) if selection.matches(topic.name)]
        found: list[_Candidate] = []
        for topic in behind:
            buffered, since = topic.buffered, now - self._age_ms(topic)
            for message_id, number, put_at, body in buffered[bisect_left(buffered, (after + 1,)) :]:
                if put_at >= since:
                    found.append((message_id, number, put_at, len(body), topic, 0, 0, body))
        found.sort()
        return found

    # Backwards

    def go_back(self, selection: Selection, count: int, below: int = sys.maxsize) -> tuple[int, int]:
        """Go back over `count` unexpired messages with ids below `below`.

        Returns how many are left to go back, and an id: if any are left, go on below it; otherwise the messages come
        after it.
        """
        with self._database:
            until = time.monotonic() + SCAN_SECONDS
            for down_to, ids in self._backwards(selection, below, self._clock()):
                for message_id in ids:
                    if message_id < below:
                        count -= 1
                        if not count:
                            return 0, message_id - 1
                if time.monotonic() >= until and 0 < down_to < below - 1:
                    return count, down_to + 1
            return 0, 0

    def _backwards(self, selection: Selection, below: int, now: int) -> Iterator[tuple[int, list[int]]]:
        """Iterate over ids, the highest first, and with them over one above which there are no others."""
        behind, written_id = self._behind(selection, 0), self._buffer.written_id
        if below > written_id + 1:
            buffered = self._buffered(selection, behind, written_id, now)
            yield written_id, [candidate[0] for candidate in reversed(buffered)]
        written = [topic for topic in behind or () if topic.written_id]
        if behind is None or len(written) > MAX_MERGED_TOPICS:
            yield from self._scan_back(selection, below, now)
            return
        rows = [
            _messages_back(self._database.headers_back(below, now - self._age_ms(topic), topic.row), topic)
            for topic in written
        ]
        for candidate in merge(*rows, reverse=True):
            yield candidate[0] - 1, [candidate[0]]

    def _scan_back(self, selection: Selection, below: int, now: int) -> Iterator[tuple[int, list[int]]]:
        matching: dict[int, Topic | None] = {}
        put_at, ids = 0, list[int]()
        for header in self._database.headers_back(below, now - self._longest_age_ms()):
            if header[2] != put_at:
                if put_at:
                    yield header[0], sorted(ids, reverse=True)
                    ids = []
                put_at = header[2]
            topic = self._match(selection, header[1], matching)
            if topic is not None and now - header[2] <= self._age_ms(topic):
                ids += [candidate[0] for candidate in _unpack(header, topic, 0)]
        yield 0, sorted(ids, reverse=True)

    def id_before(self, milliseconds: int) -> int:
        """Return the id of the last message that was put longer ago than this, or 0."""
        with self._database:
            since = self._clock() - milliseconds
            found = self._database.id_before(since)
            for topic in self._buffer.dirty_topics:
                if at := bisect_left(topic.buffered, since, key=itemgetter(2)):
                    found = max(found, topic.buffered[at - 1][0])
            return found


def _is_wanted(candidate: _Candidate, wanted: ManyTopics, database: Database) -> bool:
    message_id, topic, below = candidate[0], candidate[4], wanted.below
    if not wanted.latest or message_id >= below:
        return message_id < below
    if topic.last_id < below:
        return message_id == topic.last_id
    if at := bisect_left(topic.buffered, (below,)):
        return message_id == topic.buffered[at - 1][0]
    newest = database.newest_below(topic.row, 0, below)
    return newest is not None and message_id == newest[0]


def _unpack(header: Header, topic: Topic, after: int) -> list[_Candidate]:
    """Return the messages of a row with ids above `after`, except dropped ones."""
    key, _, put_at, number, packed = header
    after = max(after, topic.dropped_id)
    ids_and_sizes = array("q", packed)
    if len(ids_and_sizes) == 2:
        return [(key, number, put_at, ids_and_sizes[1], topic, key, 0, None)] if key > after else []
    ids, sizes = ids_and_sizes[::2], ids_and_sizes[1::2]
    number -= len(ids)
    found: list[_Candidate] = []
    start = 0
    for message_id, size in zip(ids, sizes, strict=True):
        number += 1
        if message_id > after:
            found.append((message_id, number, put_at, size, topic, key, start, None))
        start += size
    return found


def _messages(headers: Iterator[Header], topic: Topic, after: int) -> Iterator[_Candidate]:
    for header in headers:
        yield from _unpack(header, topic, after)


def _messages_back(headers: Iterator[Header], topic: Topic) -> Iterator[_Candidate]:
    for header in headers:
        yield from reversed(_unpack(header, topic, 0))
