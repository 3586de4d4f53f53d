"""How much room a stream has. Puts leave the last of it to facts, so that workers can go on if it is full."""

from __future__ import annotations

import math
from collections import deque

# The part of a stream's room that is kept for facts.
KEPT_SHARE, MAX_KEPT_BYTES = 0.1, 67_108_864
# The share of that which puts, facts that give jobs, and other facts leave free, so that jobs already given can be
# finished.
PUTS_LEAVE, JOBS_LEAVE, FACTS_LEAVE = 1.0, 0.5, 0.0
# The size of a message in a batch without its subject, id and body: the engine's record, and the headers.
MESSAGE_BYTES = 130
_RECORD_BYTES = 34


class Room:
    """The bytes in a stream: those that the engine has reported, and those of later messages.

    Messages that other servers are publishing are not known yet.
    """

    def __init__(self) -> None:
        self._limit = math.inf
        self._bytes = self._last_id = 0
        # The last ids and the sizes of the batches that this server has published and not received yet.
        self._published: deque[tuple[int, int]] = deque()
        self.refused = 0
        """The size of the last puts that were refused."""

    def report(self, limit: int, size: int, last_id: int) -> None:
        """Record the engine's report: the stream's limit (-1: none), and its size, as of an id."""
        self.set_limit(limit)
        self._bytes, self._last_id = size, last_id
        # The report includes what was acknowledged before it was requested, even if the ids are those of a lost stream.
        self._published.clear()

    def set_limit(self, limit: int) -> None:
        self._limit = limit if limit >= 0 else math.inf

    def receive(self, message_id: int, size: int) -> None:
        if message_id > self._last_id:
            self._bytes += size + _RECORD_BYTES
            self._last_id = message_id

    def publish(self, last_id: int, size: int) -> None:
        while self._published and self._published[0][0] <= self._last_id:
            self._published.popleft()
        self._published.append((last_id, size))

    @property
    def is_full(self) -> bool:
        """Whether there is no room for the last puts that were refused."""
        return self.refused > 0 and self.is_short(self.refused, PUTS_LEAVE)

    def is_short(self, size: int, share: float) -> bool:
        """Return whether messages would not leave this share of the room that is kept for facts."""
        last_id, used = self._last_id, self._bytes + size
        used += sum(size for published, size in list(self._published) if published > last_id)
        return used > self._limit - share * min(self._limit * KEPT_SHARE, MAX_KEPT_BYTES)
