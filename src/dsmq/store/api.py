"""The interface between the server and a store of messages."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

# What a message counts towards the limits on bytes, besides its body: about what it takes in a row of its own.
MESSAGE_OVERHEAD_BYTES = 100
# The same for a topic that holds messages, besides its name.
TOPIC_OVERHEAD_BYTES = 500

T = TypeVar("T")
Answer: TypeAlias = T | Future[T]
"""A store's answer: the value, or a future if the value comes later."""


class Message(NamedTuple):
    """A stored message as READ sends it. Times are in milliseconds."""

    id: int
    number: int
    age_ms: int
    body: bytes
    left_ms: int
    """Remaining lifetime, by the max_age_ms in force."""


Put: TypeAlias = tuple[bytes, bytes, tuple[bytes, int] | None]
"""A message to store: topic, body and, if the put is idempotent, its key: a producer and a sequence number."""


class TopicStats(NamedTuple):
    name: bytes
    messages: int
    bytes: int
    last_number: int
    last_id: int
    first_id: int = 0
    oldest_age_ms: int = 0
    restored_number: int = 0
    """The topic's last number in the snapshot before the range of lost ids that the reader's id is in, or else before
    the last range; 0 if there was none.
    """

    @property
    def accounted_bytes(self) -> int:
        """Bytes stored, as `Limits` counts them."""
        return accounted_bytes(self.messages, self.bytes)


class Totals(NamedTuple):
    """Sums over all topics: stored now, and put and expired since the start."""

    messages: int
    bytes: int
    topics: int
    stored: int
    expired: int
    expired_unread: int = 0
    """Expired messages that nobody had read, or skipped by starting at a newer one."""
    oldest_age_ms: int = 0
    accounted_bytes: int = 0
    """Bytes stored, as `Limits` counts them."""


class Timing(NamedTuple):
    """How often something was done, and how many seconds it took in all."""

    times: int = 0
    seconds: float = 0.0


class Limits(NamedTuple):
    """How much a store may hold. A put beyond it raises Full."""

    topics: int = sys.maxsize
    messages: int = sys.maxsize
    bytes: int = sys.maxsize
    """Bodies plus MESSAGE_OVERHEAD_BYTES each, or 5/6 of the database if that is more; and topic names plus
    TOPIC_OVERHEAD_BYTES each.
    """
    messages_per_topic: int = sys.maxsize
    bytes_per_topic: int = sys.maxsize


SETTINGS = {
    "topics": "max_topics",
    "messages": "max_stored_messages",
    "bytes": "max_stored_bytes",
    "messages_per_topic": "max_stored_messages_per_topic",
    "bytes_per_topic": "max_stored_bytes_per_topic",
}
"""The setting for each of `Limits`."""
MEMORY = "memory"
"""Reported by `Store.full`, beside settings, if the system has no more memory."""


class Store(Protocol):
    """What the server requires of a store. A remote one answers puts and reads with futures."""

    epoch: str
    """Identifies the sequence of ids: ids of different epochs are unrelated."""
    run: str
    """Identifies the time over which puts are remembered without a gap."""
    max_age_ms: int
    limits: Limits

    def append(self, puts: Sequence[Put]) -> Answer[list[int]]:
        """Store all or nothing and return their ids, increasing. Raises Full, Forgotten or StoreFailed."""

    def check_producer(self, producer: bytes) -> None:
        """Raise Forgotten if a recent put of this producer may have been stored and forgotten."""

    def flush(self) -> None:
        """Do postponed work if there is much of it; called when nobody waits. Raises the same as `append`."""

    def read(self, topic: bytes, after: int, count: int, max_bytes: int) -> Answer[list[Message]]:
        """Return the unexpired messages with ids above `after`, oldest first."""

    def latest(self, topic: bytes, after: int, below: int = sys.maxsize) -> Answer[list[Message]]:
        """Return the newest unexpired message with an id above `after` and lower than `below`, if there is one."""

    def last_id(self) -> int:
        """Return the id given last, 0 at first."""

    def expire(self) -> int:
        """Delete some expired messages; return how many, 0 if there are none left."""

    def topics(self, after: bytes, count: int) -> list[TopicStats]:
        """Return topics that hold messages, in byte order, with names above `after`."""

    @property
    def lost_ids(self) -> list[int]:
        """The ranges of ids of this epoch that were lost by kills: of each, the id before it and its last."""

    def stats(self, topic: bytes, after: int = 0) -> TopicStats:
        """Return the topic's statistics, for a reader that has read up to this id; zeros if the topic is empty."""

    def totals(self) -> Totals: ...

    def full(self) -> set[str]:
        """Return what refuses puts at present: settings, or MEMORY. To be called about once a second.

        A limit is reported until no put was refused between two calls, and there is room for the last one refused.
        """

    def timings(self) -> dict[str, Timing]:
        """Return how often and how long the database was used, by operation: write, read, expire."""

    def last_numbers(self) -> dict[bytes, int]:
        """Return the number of the last message of each topic that holds messages."""

    def last_number(self, topic: bytes) -> int:
        """Return the number of the last message put into a topic, 0 if there is none."""

    def largest_topics(self, count: int) -> list[bytes]:
        """Return the topics that hold the most messages."""

    def close(self) -> None:
        """Idempotent. After it, other methods raise StoreFailed."""


def accounted_bytes(messages: int, size: int) -> int:
    """Return what messages with bodies of `size` bytes in all count towards the limits on bytes."""
    return size + messages * MESSAGE_OVERHEAD_BYTES


def accounted_topic_bytes(names: Iterable[bytes]) -> int:
    """Return what topics count towards the limit on all bytes."""
    return sum([len(name) + TOPIC_OVERHEAD_BYTES for name in names])
