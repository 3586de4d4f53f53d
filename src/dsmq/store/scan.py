"""Reads several topics (a selection) at once, in the order of ids, for which the store may have no index.

A scan takes a bounded time, so that other clients are served in between. It may end before it has found anything; then
it continues from the position that it has reached.
"""

from __future__ import annotations

import sys
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from heapq import merge
from itertools import accumulate, count, islice
from operator import itemgetter
from typing import TypeAlias
from weakref import WeakKeyDictionary

from dsmq.store.api import Found, ManyTopics, Message, TopicMessage
from dsmq.store.database import Database
from dsmq.store.schema import Header, StoredMessage, unpack_ids_and_sizes
from dsmq.store.selection import Selection
from dsmq.store.topics import Topic, TopicTable, WriteBuffer

# Seconds after which a scan returns what it has found so far.
SCAN_SECONDS = 0.0003
# If at most this many topics have messages to read, each is read through the index; otherwise, all rows are scanned.
MAX_MERGED_TOPICS = 16
# Max topics remembered as matching a selection.
MAX_MATCHES = 1_000
# Topics matched and messages merged between two checks of the time.
MATCH_STEP, MERGE_STEP = 128, 32

_Candidate: TypeAlias = tuple[int, int, int, int, Topic, int, int, bytes | None]
"""Id, number, put time and size of a message; its topic; key of its row and offset in the row; body, if buffered."""
_Part: TypeAlias = tuple[int, list[_Candidate]]
"""Everything that a scan has found, up or down to an id."""


class _Matches:
    """The topics, up to a topic's row, that are known to match a selection."""

    __slots__ = ("row", "topics")

    def __init__(self) -> None:
        self.row = 0
        self.topics: list[Topic] | None = []
        """None if there are too many."""


class SelectionReads:
    """The part of a store that reads selections."""

    max_age_ms: int
    _clock: Callable[[], int]
    _last_id: int
    _database: Database
    _topics: TopicTable
    _buffer: WriteBuffer
    _matches: WeakKeyDictionary[Selection, _Matches]

    def read_many(self, wanted: ManyTopics, wait_ms: int = 0) -> Found:  # noqa: ARG002 - it is always up to date
        after, left = wanted.after, wanted.max_bytes
        if after >= self._last_id:
            return Found(after, [], is_complete=True)
        with self._database:
            end = max(after, min(self._last_id, wanted.below - 1))
            now, until = self._clock(), time.monotonic() + SCAN_SECONDS
            if not self._match(wanted.selection, self._last_id - after, until):
                return Found(after, [], is_complete=False)
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
        found, rows = [], dict[int, bytes]()
        ends: dict[Topic, tuple[Message, Message]] = {}
        last_row = max([candidate[5] for candidate in chosen])
        if last_row and chosen[-1][0] - chosen[0][0] == len(chosen) - 1:
            # The ids are consecutive, so all rows in between are needed.
            rows = self._database.bodies(chosen[0][0], last_row)
        for message_id, number, at, size, topic, row, start, buffered in chosen:
            body = buffered
            if body is None:
                if row not in rows:
                    rows |= self._database.bodies(row, row)
                body = rows[row][start : start + size]
            age_ms = now - at
            left_ms = self._age_ms(topic) - age_ms
            found.append(TopicMessage(topic.name, message_id, number, age_ms, body, left_ms))
            last = Message(message_id, number, age_ms, b"", left_ms)
            ends[topic] = ends[topic][0] if topic in ends else last, last
        for topic, (first, last) in ends.items():
            # Messages that `latest` skips count as read.
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

    def longest_age_ms(self) -> int:
        """Return the highest age at which messages expire."""
        return max([self.max_age_ms, *self._topics.rules.ages])

    def now(self) -> int:
        """Return the time on the store's clock, in milliseconds."""
        return self._clock()

    @property
    def stored_state(self) -> tuple[int, int, object]:
        """Equal to an earlier state if no message has been deleted since, and messages still expire at the same age."""
        return self._topics.deleted, self.max_age_ms, self._topics.rules

    def topic_names(self) -> list[bytes]:
        """Return the topics with messages, in any order."""
        return list(self._topics.by_name)

    def backlog(self, selection: Selection, after: int, given: Mapping[bytes, int], until: float) -> tuple[int, int]:
        """Return how many messages of a selection have ids above `after` and the age of the first in milliseconds.

        `given` has the topics' last numbers as of `after`. Both figures may be too high: the age if more than a few
        topics have such messages, and the number if more topics match than are remembered or can be matched in time.
        """
        with self._database:
            now, last_id = self._clock(), self._last_id
            self._match(selection, sys.maxsize if after < last_id else 0, until)
            behind = self._behind(selection, after)
            if behind is not None and len(behind) <= MAX_MERGED_TOPICS:
                found = [(first, topic) for topic in behind if (first := self._first(topic, after, now))]
                age_ms = max([now - first[2] for first, _ in found], default=0)
                return sum([topic.last_number - first[1] + 1 for first, topic in found]), age_ms
            if after >= self._buffer.written_id or (put_at := self._database.put_time(after + 1)) is None:
                buffered = self._buffered(selection, behind, after, now)
                put_at = buffered[0][2] if buffered else now
            if behind is None:
                return min(last_id - after, self._topics.messages), now - put_at
            counts = [min(topic.messages, topic.last_number - given.get(topic.name, 0)) for topic in behind]
            return sum(counts), now - put_at

    def _first(self, topic: Topic, after: int, now: int) -> _Candidate | None:
        """Return a topic's first message with an id above `after`."""
        found = self._forwards(ManyTopics(Selection([topic.name]), after, 1, 1), now)
        return next((one for _, candidates in found for one in candidates), None)

    # Forwards

    def _forwards(self, wanted: ManyTopics, now: int) -> Iterator[_Part]:
        """Iterate over the wanted messages."""
        selection, after, written_id = wanted.selection, wanted.after, self._buffer.written_id
        behind = self._behind(selection, after)
        if behind is not None and not behind:
            return
        if after < written_id:
            written = [topic for topic in behind or () if after < topic.written_id]
            is_scanned = behind is None or len(written) > MAX_MERGED_TOPICS
            parts = self._scan(selection, after, now) if is_scanned else self._merged(written, after, now)
            for up_to, candidates in parts:
                yield up_to, self._filter(candidates, wanted)
            yield written_id, []
        yield self._last_id, self._filter(self._buffered(selection, behind, after, now), wanted)

    def _filter(self, candidates: list[_Candidate], wanted: ManyTopics) -> list[_Candidate]:
        if not wanted.latest and wanted.below > self._last_id:
            return candidates
        return [candidate for candidate in candidates if _is_wanted(candidate, wanted, self._database)]

    def _match(self, selection: Selection, backlog: int, until: float) -> bool:
        """Match topics until a deadline; return whether a read over `backlog` ids can begin.

        It can if all topics have been matched or if scanning all rows is faster.
        """
        if not selection.patterns or not backlog:
            return True
        if (known := self._matches.get(selection)) is None:
            known = self._matches[selection] = _Matches()
        by_row = self._topics.by_row
        while known.topics is not None and known.row < (last_row := self._topics.last_row):
            if last_row - known.row > max(backlog, MATCH_STEP):
                return True
            row = known.row + 1
            known.row = min(known.row + MATCH_STEP, last_row)
            for topic in filter(None, map(by_row.get, range(row, known.row + 1))):
                if selection.matches(topic.name):
                    known.topics.append(topic)
            if len(known.topics) > MAX_MATCHES:
                left = [topic for topic in known.topics if by_row.get(topic.row) is topic]
                known.topics = left if len(left) <= MAX_MATCHES // 2 else None
            if time.monotonic() >= until:
                break
        return known.topics is None or known.row == last_row

    def _behind(self, selection: Selection, after: int) -> list[Topic] | None:
        """Return the selected topics with messages above an id, or None if that requires a scan."""
        if after >= self._last_id:
            return []
        known = self._matches[selection] if selection.patterns else None
        buffer = self._buffer
        if after >= buffer.written_id and len(buffer.dirty_topics) < len((known and known.topics) or selection.names):
            # Only topics in the write buffer have such messages.
            return [topic for topic in buffer.after(after) if selection.matches(topic.name)]
        if known is None:
            by_name = self._topics.by_name
            found = [by_name[name] for name in selection.names if name in by_name]
        elif known.topics is None or known.row < self._topics.last_row:
            return None
        else:
            found = known.topics
        return [topic for topic in found if topic.last_id > after]

    def _scan(self, selection: Selection, after: int, now: int) -> Iterator[_Part]:
        """Scan all rows. The ids of a block's rows may be interleaved, so its messages are sorted."""
        block, up_to, candidates = None, after, list[_Candidate]()
        by_row, block_of, matches = self._topics.by_row, self._database.block, selection.matches
        for header in self._database.headers(after, now - self.longest_age_ms()):
            if (found := block_of(header[0], header[2])) != block:
                if block:
                    candidates.sort()
                    yield up_to, candidates
                    candidates = []
                block = found
            up_to = header[0]
            if matches((topic := by_row[header[1]]).name) and now - header[2] <= self._age_ms(topic):
                candidates += _unpack(header, topic, after)
        candidates.sort()
        yield up_to, candidates

    def _merged(self, topics: list[Topic], after: int, now: int) -> Iterator[_Part]:
        """Merge the rows of these topics."""
        rows = [
            _messages(self._database.headers(after, now - self._age_ms(topic), topic.row), topic, after)
            for topic in topics
        ]
        merged = merge(*rows)
        while candidates := list(islice(merged, MERGE_STEP)):
            yield candidates[-1][0], candidates

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
        with self._database:
            until = time.monotonic() + SCAN_SECONDS
            if not self._match(selection, self._last_id, until):
                return count, below
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
        """Iterate over lists of ids, highest first, each with an id above which there are no others."""
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
        block, ids = None, list[int]()
        for header in self._database.headers_back(below, now - self.longest_age_ms()):
            if (found := self._database.block(header[0], header[2])) != block:
                if block:
                    yield header[0], sorted(ids, reverse=True)
                    ids = []
                block = found
            topic = self._topics.by_row[header[1]]
            if selection.matches(topic.name) and now - header[2] <= self._age_ms(topic):
                ids += [candidate[0] for candidate in _unpack(header, topic, 0)]
        yield 0, sorted(ids, reverse=True)

    def peek(self, topic: bytes, below: int = sys.maxsize) -> Message | None:
        """Return the newest unexpired message with an id below `below`, if known, without marking it as read."""
        known = self._topics.by_name.get(topic)
        if known is None:
            return None
        with self._database:
            return self._newest_below(known, below)

    def _newest_below(self, topic: Topic, below: int) -> Message | None:
        now = self._clock()
        since = now - self._age_ms(topic)
        if at := bisect_left(topic.buffered, (below,)):
            found: StoredMessage | None = topic.buffered[at - 1]
        else:
            # If it is the topic's last message, don't unpack the others in its row.
            after = topic.last_id - 1 if below > topic.last_id else topic.dropped_id
            found = self._database.newest_below(topic.row, after, below)
        if found is None or found[0] <= topic.dropped_id or found[2] < since:
            return None
        message_id, number, put_at, body = found
        return Message(message_id, number, now - put_at, body, put_at - since)

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
    key, _, put_at, number, messages, packed = header
    after = max(after, topic.dropped_id)
    if messages == 1:
        return [(key, number, put_at, array("q", packed)[-1], topic, key, 0, None)] if key > after else []
    ids, sizes = unpack_ids_and_sizes(key, messages, packed)
    first = bisect_right(ids, after)
    number += 1 - messages + first
    starts = accumulate(sizes[first:], initial=sum(sizes[:first]))
    return [
        (message_id, at, put_at, size, topic, key, start, None)
        for message_id, at, size, start in zip(ids[first:], count(number), sizes[first:], starts, strict=False)
    ]


def _messages(headers: Iterator[Header], topic: Topic, after: int) -> Iterator[_Candidate]:
    for header in headers:
        yield from _unpack(header, topic, after)


def _messages_back(headers: Iterator[Header], topic: Topic) -> Iterator[_Candidate]:
    for header in headers:
        yield from reversed(_unpack(header, topic, 0))
