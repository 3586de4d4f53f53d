"""Refuses puts that would exceed a limit and remembers which limits have refused puts recently."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from dsmq.errors import Full
from dsmq.store.api import Limits, Put, accounted_bytes, accounted_topic_bytes
from dsmq.store.rules import TopicLimits
from dsmq.store.topics import Topic, TopicTable

# If a topic exceeds lowered limits, a put drops at most this many messages in addition to those that make room for it;
# expiry drops the rest.
MAX_MORE_DROPPED = 512


class _Drops:
    """The messages that a topic has to drop to make room for new ones."""

    def __init__(self, topic: Topic, new: list[int], held: Iterable[int]) -> None:
        """`new` and `held` are sizes of bodies; `held` has those of stored messages, oldest first, read as needed."""
        self.count = self.bytes = 0
        # The newest message is never dropped.
        self.left = max(0, topic.messages + len(new) - 1)
        self._sizes: Iterator[int] = chain(held, new)
        self._counted = 0

    def drop(self, count: int) -> None:
        self.count += count
        self.left -= count

    def freed_bytes(self) -> int:
        """Return the bytes of the dropped messages, with overhead."""
        new = self.count - self._counted
        self.bytes += accounted_bytes(new, sum(islice(self._sizes, new)))
        self._counted = self.count
        return self.bytes


class LimitChecker:
    """Checks puts against the limits. Every method requires the store's lock."""

    def __init__(self, topics: TopicTable, sizes: Callable[[Topic], Iterable[int]]) -> None:
        """`sizes` returns the sizes of a topic's messages, oldest first."""
        self._topics = topics
        self._sizes = sizes
        self.drops_for_all = True
        """Whether a topic drops messages if all topics together reach a limit."""
        # For each limit, the last refused put: its topic if the limit is per topic, the room it needed, and whether it
        # was refused since the last call of `full`.
        self._full: dict[str, tuple[bytes | None, int, bool]] = {}

    @property
    def limits(self) -> Limits:
        return self._topics.rules.limits

    def check(self, puts: Iterable[Put]) -> dict[bytes, int]:
        """Raise Full if these puts would exceed a limit on messages or bytes.

        Returns how many of its oldest messages each topic has to drop to stay within the limits.
        """
        new: dict[bytes, list[int]] = {}
        for name, body, _ in puts:
            new.setdefault(name, []).append(len(body))
        found: dict[bytes, _Drops] = {}
        rules = self._topics.rules
        for name, sizes in new.items():
            topic = self._topics.find(name)
            bounds = rules.of(topic)
            if bounds.drops:
                if accounted_bytes(1, max(sizes)) > bounds.max_bytes:
                    raise Full(
                        f"the message exceeds the limit of its topic: {bounds.limit_name('bytes')} = {bounds.max_bytes}"
                    )
                found[name] = drops = self._drops(topic, bounds, sizes)
                if not self.drops_for_all:
                    drops.left = 0
            else:
                self._check_topic(topic, bounds, len(sizes), sum(sizes))
        if new:
            self._check_sum(new, found)
        return {name: drops.count for name, drops in found.items() if drops.count}

    def excess(self, topic: Topic) -> int:
        """Return the number of messages that a topic has to drop because its limits were lowered."""
        bounds = self._topics.rules.of(topic)
        return self._drops(topic, bounds, []).count if bounds.drops else 0

    def _drops(self, topic: Topic, bounds: TopicLimits, new: list[int]) -> _Drops:
        drops = _Drops(topic, new, self._sizes(topic))
        more = topic.messages + len(new) - bounds.max_messages
        drops.drop(max(0, min(more, len(new) + MAX_MORE_DROPPED, drops.left)))
        added = accounted_bytes(len(new), sum(new))
        excess = topic.accounted_bytes + added - bounds.max_bytes
        if excess > 0:
            more = 0
            while drops.left and (freed := drops.freed_bytes()) < excess and (freed < added or more < MAX_MORE_DROPPED):
                drops.drop(1)
                more += 1
        return drops

    def _check_sum(self, new: dict[bytes, list[int]], found: dict[bytes, _Drops]) -> None:
        """Check the limits on all topics together; make the topics of the puts drop more messages if they may."""
        limits, topics = self.limits, self._topics
        count = sum(map(len, new.values())) - sum(drops.count for drops in found.values())
        size = accounted_topic_bytes(new.keys() - topics.by_name.keys())
        size += sum(accounted_bytes(len(sizes), sum(sizes)) for sizes in new.values())
        if topics.messages + count > limits.max_stored_messages:
            for drops in found.values():
                more = max(0, min(topics.messages + count - limits.max_stored_messages, drops.left))
                drops.drop(more)
                count -= more
        self.check_limit("max_stored_messages", count)
        if topics.accounted_bytes + size > limits.max_stored_bytes:
            for drops in found.values():
                size -= drops.freed_bytes()
                while drops.left and topics.accounted_bytes + size > limits.max_stored_bytes:
                    before = drops.bytes
                    drops.drop(1)
                    size -= drops.freed_bytes() - before
        self.check_limit("max_stored_bytes", size)

    def _check_topic(self, topic: Topic, bounds: TopicLimits, count: int, size: int) -> None:
        """Raise Full if `count` more messages with bodies of this size would exceed a limit of the topic."""
        for what, most, held, more in (
            ("messages", bounds.max_messages, topic.messages, count),
            ("bytes", bounds.max_bytes, topic.accounted_bytes, accounted_bytes(count, size)),
        ):
            if held + more > most:
                name = bounds.limit_name(what)
                self.record_full(name, topic.name, more)
                raise Full(f"the topic is full: {name} = {most} reached")

    def check_limit(self, limit: str, more: int) -> None:
        """Raise Full if `more` would exceed a limit on all topics together."""
        held, most = self._held(limit)
        if held + more > most:
            self.record_full(limit, None, more)
            raise Full(f"the server is full: {limit} = {most} reached")

    def _held(self, limit: str, name: bytes | None = None) -> tuple[int, int]:
        """Return the current value that a limit applies to and the limit."""
        if name is not None:
            topic = self._topics.find(name)
            bounds = self._topics.rules.of(topic)
            if limit == bounds.limit_name("messages"):
                return topic.messages, bounds.max_messages
            # Limits of former rules no longer count as reached.
            return topic.accounted_bytes, bounds.max_bytes if limit == bounds.limit_name("bytes") else sys.maxsize
        most = getattr(self.limits, limit, sys.maxsize)
        if limit == "max_topics":
            return len(self._topics.by_name), most
        return self._topics.messages if limit == "max_stored_messages" else self._topics.accounted_bytes, most

    def record_full(self, limit: str, topic: bytes | None = None, more: int = 0) -> None:
        """Record the refusal of a put that needed `more` room."""
        self._full[limit] = topic, more, True

    def full(self) -> set[str]:
        """See `Store.full`."""
        for limit, (topic, more, is_new) in list(self._full.items()):
            self._full[limit] = topic, more, False
            held, most = self._held(limit, topic)
            # A put that is larger than the limit itself never fits.
            if not is_new and held + min(more, most) <= most:
                del self._full[limit]
        return set(self._full)
