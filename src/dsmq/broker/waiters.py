"""The connections of one event loop that wait for messages, and the puts that wake them."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dsmq.errors import Busy
from dsmq.store.selection import Pattern, PatternIndex

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.event_loop import EventLoop
    from dsmq.broker.usage import Usage
    from dsmq.store.api import Message
    from dsmq.wire.resp import Encoded

# Max topics for which the matching patterns are remembered.
MAX_KNOWN_TOPICS = 200_000
# Max remembered matches of all topics together.
MAX_KNOWN_MATCHES = 1_000_000
# A remembered topic is matched against newer patterns one by one, or by the index if there are more than this.
MAX_NEWER_PATTERNS = 64
# Max unused patterns that are kept, because their readers usually come back.
MAX_IDLE_PATTERNS = 256
# If more topics than this are to be matched, all readers with patterns are woken instead.
MAX_UNMATCHED_TOPICS = 1_000


class Waiters:
    """The connections of one event loop that wait for messages, by topic and by pattern."""

    def __init__(self, loop: EventLoop, usage: Usage, slice_seconds: float) -> None:
        """`usage` counts and limits the connections and patterns of all event loops together."""
        self.to_wake: dict[Connection, None] = {}
        """Connections that a put has woken, but that are not served yet, because there may be many."""
        self.by_topic: dict[bytes, dict[Connection, None]] = {}
        self.patterns = WaitingPatterns()
        self.unmatched = self.patterns.unmatched
        self.found: dict[Hashable, Any] | None = None
        """What was fetched for the readers served now, by position: all readers at one position get the same reply."""
        self.encoded: tuple[list[Message], Encoded] = [], b""
        """The last of these replies, with its messages."""
        self._loop = loop
        self._usage = usage
        self._slice_seconds = slice_seconds

    def add(self, topics: Iterable[bytes], patterns: Sequence[Pattern], connection: Connection) -> None:
        """Raises Busy if there are too many readers or patterns."""
        readers = self._usage.waiting
        if not readers.claim(connection, 1):
            raise Busy(f"too many waiting readers (max_waiting_readers = {readers.limit})")
        try:
            self.extend(topics, patterns, connection)
        except Busy:
            readers.drop(connection)
            raise

    def extend(self, topics: Iterable[bytes], patterns: Sequence[Pattern], connection: Connection) -> None:
        """Make a connection wait for these, too. Raises Busy if there are too many patterns."""
        if patterns:
            waiting_patterns = self._usage.waiting_patterns
            if not waiting_patterns.claim(connection, len(patterns)):
                raise Busy(f"too many waiting patterns (max_waiting_patterns = {waiting_patterns.limit})")
        for topic in topics:
            self.by_topic.setdefault(topic, {})[connection] = None
        for pattern in patterns:
            self.patterns.add(pattern, connection)

    def remove(self, topics: Iterable[bytes], patterns: Sequence[Pattern], connection: Connection) -> None:
        self._usage.waiting.drop(connection)
        for topic in topics:
            waiters = self.by_topic[topic]
            del waiters[connection]
            if not waiters:
                del self.by_topic[topic]
        if patterns:
            self._usage.waiting_patterns.drop(connection)
            for pattern in patterns:
                self.patterns.remove(pattern, connection)

    def wake(self, topics: Iterable[bytes]) -> None:
        """Wake the connections that wait for messages in these topics. Thread-safe."""
        by_topic, patterns = self.by_topic, self.patterns
        awaited = {topic for topic in topics if topic in by_topic or (patterns.waiting and patterns.may_match(topic))}
        if awaited:
            if threading.get_ident() == self._loop.thread.ident:
                self._wake(awaited)
            else:
                self._loop.post(partial(self._wake, awaited))

    def _wake(self, topics: set[bytes]) -> None:
        for topic in topics:
            self.to_wake.update(self.by_topic.get(topic, ()))
            if self.patterns.waiting:
                self.to_wake.update(dict.fromkeys(self.patterns.put(topic)))
        self.serve()

    def serve(self) -> None:
        """Match topics and reply to woken connections for a slice of the turn."""
        until = time.monotonic() + self._slice_seconds
        self.found = {}
        while self.to_wake or self.unmatched:
            if self.unmatched:
                self.to_wake.update(dict.fromkeys(self.patterns.match_some()))
            if self.to_wake:
                connection = next(iter(self.to_wake))
                del self.to_wake[connection]
                try:
                    connection.reads.wake()
                except Exception:  # noqa: BLE001
                    connection.on_failure()
            if time.monotonic() >= until:
                break
        self.found, self.encoded = None, ([], b"")


class _Awaited:
    """A pattern and the connections that wait for topics that match it."""

    __slots__ = ("connections", "pattern")

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.connections: dict[Connection, None] = {}


class WaitingPatterns:
    """The patterns of waiting connections. The patterns that match a topic are determined once and remembered.

    The cost of a put into a remembered topic does not depend on the number of patterns and topics. A new topic is
    matched in steps, because matching takes time proportional to the number of patterns.
    """

    def __init__(self) -> None:
        self.waiting = 0
        """The number of waiting connections, counted once for each of their patterns."""
        self.unmatched: dict[bytes, bool] = {}
        """The topics of new messages that still have to be matched, each with whether matching has yet to begin."""
        self._clear({})
        self._matching: Iterator[Iterable[Connection]] | None = None

    def _clear(self, awaited: dict[bytes, _Awaited]) -> None:
        # For each topic: the number of patterns when it was matched, and the patterns that match. Replaced before the
        # patterns: see `may_match`.
        self._known: dict[bytes, tuple[int, tuple[_Awaited, ...]]] = {}
        self._known_matches = 0
        self._awaited = awaited
        self._order = list(awaited.values())
        self._index = PatternIndex(one.pattern for one in self._order)
        self._none: tuple[int, tuple[_Awaited, ...]] = (len(self._order), ())

    def add(self, pattern: Pattern, connection: Connection) -> None:
        awaited = self._awaited.get(pattern.text)
        if awaited is None:
            awaited = self._awaited[pattern.text] = _Awaited(pattern)
            self._order.append(awaited)
            self._index.add(pattern)
            self._none = len(self._order), ()
        awaited.connections[connection] = None
        self.waiting += 1

    def remove(self, pattern: Pattern, connection: Connection) -> None:
        # Keep the pattern for a while: usually the reader waits for it again after the next message.
        del self._awaited[pattern.text].connections[connection]
        self.waiting -= 1
        if len(self._order) > 2 * self.waiting + MAX_IDLE_PATTERNS:
            self._clear({text: one for text, one in self._awaited.items() if one.connections})

    def may_match(self, topic: bytes) -> bool:
        """Return whether a put into a topic may wake a connection. Thread-safe."""
        # Read in this order, because the patterns may be replaced by fewer in between.
        count = len(self._order)
        seen, matching = self._known.get(topic, (-1, ()))
        return bool(matching) or seen != count

    def put(self, topic: bytes) -> Iterable[Connection]:
        """Return the connections to wake after a put into a topic, as far as they are known without matching."""
        seen, matching = self._known.get(topic, (-1, ()))
        newer = len(self._order) - seen
        if seen < 0 or newer > MAX_NEWER_PATTERNS:
            self.unmatched[topic] = True
            if len(self.unmatched) > MAX_UNMATCHED_TOPICS:
                self.unmatched.clear()
                self._matching = None
                return [connection for one in self._order for connection in one.connections]
            return ()
        if newer:
            matching += tuple(one for one in self._order[seen:] if one.pattern.matches(topic))
            self._remember(topic, len(self._order), matching)
        return [connection for one in matching for connection in one.connections]

    def match_some(self) -> Iterable[Connection]:
        """Match a topic against one more pattern; return the connections to wake."""
        if self._matching is None:
            self._matching = self._match(next(iter(self.unmatched)))
        for connections in self._matching:
            return connections
        self._matching = None
        return ()

    def _match(self, topic: bytes) -> Iterator[Iterable[Connection]]:
        self.unmatched[topic] = False
        order, seen, found = self._order, len(self._order), []
        for pattern in self._index.candidates(topic):
            awaited = self._awaited.get(pattern.text) if pattern.matches(topic) else None
            if awaited is None:
                yield ()
            else:
                found.append(awaited)
                yield tuple(awaited.connections)
        if order is self._order:
            self._remember(topic, seen, tuple(found))
        if not self.unmatched[topic]:
            # Otherwise, there has been another put into the topic.
            del self.unmatched[topic]

    def _remember(self, topic: bytes, seen: int, matching: tuple[_Awaited, ...]) -> None:
        self._known_matches += len(matching)
        if len(self._known) >= MAX_KNOWN_TOPICS or self._known_matches > MAX_KNOWN_MATCHES:
            self._known.clear()
            self._known_matches = len(matching)
        self._known[topic] = (seen, matching) if matching or seen != self._none[0] else self._none
