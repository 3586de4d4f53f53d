"""What the server asks of a store of messages, and what it gets from it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

# What a message is counted with, for the limit on bytes, beside its body: about what it takes in a row of its own.
MESSAGE_OVERHEAD_BYTES = 100
# The same for a topic that holds messages, beside its name.
TOPIC_OVERHEAD_BYTES = 500

T = TypeVar("T")
Answer: TypeAlias = T | Future[T]
"""What a store replies: the value, or a future where the value comes later."""


class Message(NamedTuple):
    """A stored message as READ sends it. Times are in milliseconds."""

    id: int
    number: int
    age_ms: int
    body: bytes
    left_ms: int
    """How much longer it may be delivered, by the rules now in force."""


Put: TypeAlias = tuple[bytes, bytes, tuple[bytes, int] | None]
"""A message to store: topic, body, and where the put is idempotent its key, a producer and its sequence number."""


class TopicStats(NamedTuple):
    """What a topic holds."""

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
    def cost(self) -> int:
        """Bytes held, as `Limits` counts them."""
        return cost(self.messages, self.bytes)


class Totals(NamedTuple):
    """Sums over all topics: held now, and stored and expired since the start."""

    messages: int
    bytes: int
    topics: int
    stored: int
    expired: int
    expired_unread: int = 0
    """Those of the expired that nobody had read, nor passed over by asking for the latest."""
    oldest_age_ms: int = 0
    cost: int = 0
    """Bytes held, as `Limits` counts them."""


class Timing(NamedTuple):
    """How often something was done, and how many seconds it took in all."""

    times: int = 0
    seconds: float = 0.0


class Limits(NamedTuple):
    """How much a store holds. A put beyond it raises Full."""

    topics: int = sys.maxsize
    messages: int = sys.maxsize
    bytes: int = sys.maxsize
    """Of bodies, and MESSAGE_OVERHEAD_BYTES for each; of the names of topics, and TOPIC_OVERHEAD_BYTES for each."""
    messages_per_topic: int = sys.maxsize
    bytes_per_topic: int = sys.maxsize


SETTINGS = {
    "topics": "max_topics",
    "messages": "max_stored_messages",
    "bytes": "max_stored_bytes",
    "messages_per_topic": "max_stored_messages_per_topic",
    "bytes_per_topic": "max_stored_bytes_per_topic",
}
"""The settings that hold the values of `Limits`."""
MEMORY = "memory"
"""What a store is full by, beside those, if the system has no more."""


class Store(Protocol):
    """What the server asks of a store. One elsewhere than in this process answers with futures."""

    epoch: str
    """Names the ids: those of different epochs have nothing to do with each other."""
    run: str
    """Names the time over which puts are remembered without a gap."""
    max_age_ms: int
    limits: Limits

    def append(self, puts: Sequence[Put]) -> Answer[list[int]]:
        """Store all or nothing and return their ids, increasing. Raises Full, Forgotten or StoreFailed."""

    def check_producer(self, producer: bytes) -> None:
        """Raise Forgotten where a put of this producer may have been stored and forgotten lately."""

    def flush(self) -> None:
        """Do what was put off, if it is much: nobody waits. Raises what `append` would when it has to be done."""

    def read(self, topic: bytes, after: int, count: int, max_bytes: int) -> Answer[list[Message]]:
        """Return the messages with ids above `after`, oldest first, none of them expired."""

    def latest(self, topic: bytes, after: int, below: int = sys.maxsize) -> Answer[list[Message]]:
        """Return the newest message with an id above `after`, and lower than `below`; or nothing."""

    def last_id(self) -> int:
        """Return the id given last, 0 at first."""

    def expire(self) -> int:
        """Delete some messages that are too old; return how many, 0 when there are none left."""

    def topics(self, after: bytes, count: int) -> Answer[list[TopicStats]]:
        """Return topics that hold messages, in byte order, from behind the name `after`."""

    @property
    def lost_ids(self) -> list[int]:
        """The ranges of ids of this epoch that were lost by kills: of each, the id before it and its last."""

    def stats(self, topic: bytes, after: int = 0) -> Answer[TopicStats]:
        """Return what one topic holds, also where it holds nothing, for a reader that has read up to this id."""

    def totals(self) -> Totals:
        """Return the sums over all topics."""

    def full(self) -> set[str]:
        """Return what refuses puts at present: settings, or MEMORY. To be called once a second or so.

        A limit stays in it while it refuses puts between two calls, or has no room for the last one that it refused.
        """

    def timings(self) -> dict[str, Timing]:
        """Return how often and how long the database was used, by operation: write, read, expire."""

    def last_numbers(self) -> dict[bytes, int]:
        """Return the number of the last message of each topic that holds some."""

    def last_number(self, topic: bytes) -> int:
        """Return the number of the last message put into a topic, 0 where there is none."""

    def deepest(self, count: int) -> list[bytes]:
        """Return the topics that hold the most messages."""

    def close(self) -> None:
        """Give everything up. Idempotent."""


def cost(messages: int, size: int) -> int:
    """Return what messages are counted as, for the limits on bytes."""
    return size + messages * MESSAGE_OVERHEAD_BYTES


def topics_cost(names: Iterable[bytes]) -> int:
    """Return what topics are counted as, for the limit on all bytes."""
    return sum([len(name) + TOPIC_OVERHEAD_BYTES for name in names])
