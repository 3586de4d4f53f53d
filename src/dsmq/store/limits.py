"""Refuses puts that would exceed a limit, and remembers which limits have refused puts recently."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable

from dsmq.errors import Full
from dsmq.store.api import Limits, Put, accounted_bytes, accounted_topic_bytes
from dsmq.store.topics import TopicTable


class LimitChecker:
    """Checks puts against the limits. Every method requires the store's lock."""

    def __init__(self, topics: TopicTable, limits: Limits) -> None:
        self._topics = topics
        # For each limit, the last put that it refused: the topic if the limit is per topic, the room that the put
        # needed, and whether it was refused since the last call of `full`.
        self._full: dict[str, tuple[bytes | None, int, bool]] = {}
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        self.limits = limits
        # If all topics together are below these, no limit is exceeded.
        self.safe_messages = min(limits.max_stored_messages, limits.max_stored_messages_per_topic)
        self.safe_bytes = min(limits.max_stored_bytes, limits.max_stored_bytes_per_topic)

    def check(self, puts: Iterable[Put]) -> None:
        """Raise Full if these would exceed a limit on messages or bytes."""
        counts: Counter[bytes] = Counter()
        sizes: Counter[bytes] = Counter()
        for name, body, _ in puts:
            counts[name] += 1
            sizes[name] += len(body)
        for name, count in counts.items():
            self.check_limit("max_stored_messages_per_topic", count, name)
            self.check_limit("max_stored_bytes_per_topic", accounted_bytes(count, sizes[name]), name)
        if counts:
            self.check_limit("max_stored_messages", counts.total())
            new_topics = accounted_topic_bytes(counts.keys() - self._topics.by_name.keys())
            self.check_limit("max_stored_bytes", new_topics + accounted_bytes(counts.total(), sizes.total()))

    def check_limit(self, limit: str, more: int, topic: bytes | None = None) -> None:
        """Raise Full if `more` would exceed a limit."""
        most = getattr(self.limits, limit)
        if self._held(limit, topic) + more > most:
            self.record_full(limit, topic, more)
            what = "server" if topic is None else "topic"
            raise Full(f"the {what} is full: {limit} = {most} reached")

    def _held(self, limit: str, topic: bytes | None) -> int:
        """Return the current value for a limit."""
        if limit == "max_topics":
            return len(self._topics.by_name)
        held = self._topics if topic is None else self._topics.find(topic)
        return held.messages if limit.startswith("max_stored_messages") else held.accounted_bytes

    def record_full(self, limit: str, topic: bytes | None = None, more: int = 0) -> None:
        """Record the refusal of a put that needed this much `more` room."""
        self._full[limit] = topic, more, True

    def full(self) -> set[str]:
        """Return as `Store.full` does."""
        for limit, (topic, more, is_new) in list(self._full.items()):
            self._full[limit] = topic, more, False
            most = getattr(self.limits, limit, sys.maxsize)
            # There is never room for a put larger than the limit itself.
            if not is_new and self._held(limit, topic) + min(more, most) <= most:
                del self._full[limit]
        return set(self._full)
