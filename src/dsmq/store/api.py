"""The interface between the server and a store of messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, TypeAlias, TypeVar

from dsmq.errors import ReplyError

if TYPE_CHECKING:
    from dsmq.store.groups import Groups
    from dsmq.store.selection import Selection
    from dsmq.store.sqlite import SQLiteStore

# Overhead for the limits on bytes: added to the body of each message and to the name of each topic with messages.
MESSAGE_OVERHEAD_BYTES, TOPIC_OVERHEAD_BYTES = 100, 500

T = TypeVar("T")
Answer: TypeAlias = T | Future[T]
"""A store's answer: a value, or a future if the store answers later."""
Outcome: TypeAlias = int | ReplyError
"""The id of a stored message or the reason why it was not stored."""


class Message(NamedTuple):
    """A stored message as READ sends it. Times are in milliseconds."""

    id: int
    number: int
    age_ms: int
    body: bytes
    left_ms: int
    """Remaining lifetime."""


class TopicMessage(NamedTuple):
    """A stored message as MREAD sends it."""

    topic: bytes
    id: int
    number: int
    age_ms: int
    body: bytes
    left_ms: int


class ManyTopics(NamedTuple):
    """A read of several topics."""

    selection: Selection
    after: int
    max_count: int
    max_bytes: int
    """The read ends once topics and bodies add up to this."""
    latest: bool = False
    """Whether to read only the newest message of each topic."""
    below: int = sys.maxsize
    """Only messages with lower ids are read."""


class Found(NamedTuple):
    """The result of a read of several topics."""

    position: int
    """This result and earlier ones contain all matching messages up to this id, and none above it."""
    messages: list[TopicMessage]
    is_complete: bool
    """Whether the read is complete for now; if not, it can continue from the position."""


Put: TypeAlias = tuple[bytes, bytes, tuple[bytes, int] | None]
"""Topic, body and, if the put is idempotent, its key: producer and sequence number."""


Watched: TypeAlias = dict[bytes, int]
"""By topic, the last id, in any topic, when a client began to watch it."""


class RetriedKey(tuple[bytes, int]):
    """The key of a put that an earlier attempt, perhaps at another server, may have stored."""

    run: str
    """The run in which that attempt was made; empty if it is unknown."""

    def __new__(cls, producer: bytes, seq: int, run: str = "") -> Self:
        key = super().__new__(cls, (producer, seq))
        key.run = run
        return key


class Mirrored(NamedTuple):
    """A message of a log that a store mirrors."""

    id: int
    put: Put
    age_ms: int


class TopicStats(NamedTuple):
    name: bytes
    messages: int
    bytes: int
    last_number: int
    last_id: int
    first_id: int = 0
    oldest_age_ms: int = 0
    restored_number: int = 0
    """The topic's last number before the range of lost ids that contains the reader's id, or else before the last
    range; 0 if there is none.
    """
    dropped: int = 0
    """Messages that the topic has dropped since the start to make room for newer ones."""

    @property
    def accounted_bytes(self) -> int:
        """Bytes as `Limits.max_stored_bytes_per_topic` counts them."""
        return accounted_bytes(self.messages, self.bytes)


class Totals(NamedTuple):
    """Sums over all topics: messages stored now, and put and expired since the start."""

    messages: int
    bytes: int
    topics: int
    stored: int
    expired: int
    expired_unread: int = 0
    """Expired messages that no client had read or skipped."""
    oldest_age_ms: int = 0
    accounted_bytes: int = 0
    """Bytes as `Limits.max_stored_bytes` counts them."""
    dropped: int = 0
    """Messages deleted to make room for newer ones; not counted as expired."""
    overdue_ms: int = 0
    """Time since the oldest stored message expired."""


class Timing(NamedTuple):
    """The number of runs of an operation and their total time."""

    times: int = 0
    seconds: float = 0.0


class EngineStats(NamedTuple):
    """The engine that holds a store's messages and the store's mirror of them. Counts are since the start."""

    name: str
    node: str
    """The node that the store is connected to; empty if there is none."""
    ready: bool
    """Whether the mirror has everything that the engine had at the start."""
    lag_messages: int
    """Messages in the engine that the mirror does not have yet."""
    lag_seconds: float
    """Time since the mirror last had all messages of the engine; 0 if it has all now."""
    retries: int
    """Publish attempts with an unknown result."""
    split_batches: int
    """Batches that the engine rejected; their messages were then published one by one."""
    repeated_puts: int
    """Puts that were already stored."""
    consumers: int
    """Consumers created to fill the mirror, including the first."""
    skipped_messages: int
    """Messages that could not be mirrored."""

    @property
    def connected(self) -> bool:
        return self.node != ""


DROP_OLDEST = "drop_oldest"


class TopicRule(NamedTuple):
    """Limits for the topics that match a pattern. None: as for all topics."""

    pattern: bytes
    max_messages: int | None = None
    max_bytes: int | None = None
    max_age_ms: int | None = None
    when_full: str | None = None


class Limits(NamedTuple):
    """The limits of a store. A put that would exceed one raises Full, unless older messages can be dropped."""

    max_topics: int = sys.maxsize
    max_stored_messages: int = sys.maxsize
    max_stored_bytes: int = sys.maxsize
    """Bytes of bodies (or 5/6 of the database's pages, if that is more) and topic names, with overhead."""
    max_stored_messages_per_topic: int = sys.maxsize
    max_stored_bytes_per_topic: int = sys.maxsize
    when_full: str = "refuse"
    """With DROP_OLDEST, a put deletes the oldest messages of its topic until it fits."""
    topic: tuple[TopicRule, ...] = ()
    """Rules for some topics; the first one that matches applies."""


MEMORY = "memory"
"""Reported by `Store.full` if the system is out of memory."""


class Store(Protocol):
    """The server's interface to a store. A remote store answers puts, in order, and reads with futures."""

    max_age_ms: int
    limits: Limits

    @property
    def in_memory(self) -> SQLiteStore:
        """The messages in this server's memory: the store itself, or its mirror, which may lag."""

    @property
    def groups(self) -> Groups:
        """The groups of workers."""

    @property
    def epoch(self) -> str:
        """Identifies the sequence of ids: ids of different epochs are unrelated."""

    @property
    def run(self) -> str:
        """Identifies a period in which puts are remembered without a gap."""

    @property
    def is_shared(self) -> bool:
        """Whether other servers use the same store."""

    @property
    def thread(self) -> Thread | None:
        """The store's own thread, if it has one."""

    @property
    def due_at(self) -> float:
        """When that thread is expected to respond next, on the monotonic clock."""

    @property
    def max_message_bytes(self) -> int:
        """The length of the longest message that the store accepts."""

    def append(self, puts: Sequence[Put]) -> Answer[list[Outcome]]:
        """Store messages in order; return an outcome for each. Raises Full, Forgotten or StoreFailed if none is stored.

        A store that answers immediately stores all or none, with increasing ids.
        """

    def append_together(self, puts: Sequence[Put], watched: Watched | None = None) -> Answer[list[Outcome]]:
        """Like `append`, but store all messages or none.

        Raises Aborted and stores nothing if a watched topic has a newer message; a shared store does not check that.
        """

    def flush(self) -> None:
        """Do deferred work if enough has accumulated. Called when the server is idle. Raises as `append` does."""

    def read(self, topic: bytes, after: int, count: int, max_bytes: int, wait_ms: int = 0) -> Answer[list[Message]]:
        """Return the unexpired messages with ids above `after`, oldest first.

        With `wait_ms`, the caller waits for a message if there is none; without it, an empty list means that no server
        has stored one. A store that answers later checks `after` as `check_id` does.
        """

    def latest(self, topic: bytes, after: int, below: int = sys.maxsize) -> Answer[list[Message]]:
        """Return the newest unexpired message with an id above `after` and below `below`, if there is one."""

    def read_many(self, wanted: ManyTopics, wait_ms: int = 0) -> Answer[Found]:
        """Like `read` or `latest`, but for several topics, in the order of ids.

        Takes a bounded time, so it may return before it has found anything.
        """

    def go_back(self, selection: Selection, count: int, below: int = sys.maxsize) -> Answer[tuple[int, int]]:
        """Find the last `count` unexpired messages with ids below `below`.

        Returns how many are left to find, and an id: if any are left, continue below it; otherwise, the messages are
        those after it.
        """

    def check_id(self, after: int) -> None:
        """Raise BadRequest if it is certain that this id has not been assigned yet."""

    def start_id(self) -> Answer[int]:
        """Return the id of the last stored message, for a client that connects now. Raises StoreFailed."""

    def last_id(self) -> int:
        """Return the id of the newest message, or 0."""

    def purge(self, selection: Selection, /) -> Iterator[Answer[int]]:
        """Delete the selected messages that are stored now, in short slices; yield the number deleted in each.

        Raises StoreFailed if that is not possible now.
        """

    @property
    def lost_ids(self) -> list[int]:
        """The ranges of ids of this epoch that were lost by kills: the id before each range and its last id."""

    def full(self) -> set[str]:
        """Return the limits that cause puts to be refused, or MEMORY. Should be called about once a second.

        A limit is reported until there is room for the last put that it refused, and none has been refused since
        the last call.
        """

    def timings(self) -> dict[str, Timing]:
        """Return the timing of operations on the database (write, read, expire) and on an engine (publish)."""

    def engine(self) -> EngineStats | None:
        """Return the state of the engine, if there is one."""

    def start(self, on_messages: Callable[[set[bytes]], None], on_unusable: Callable[[str], None]) -> None:
        """Start `thread`, if there is one. It calls these functions.

        `on_messages` is called with topics that have new messages, if `append` answers later. `on_unusable` is called
        with the reason why all clients must reconnect, perhaps to another server.
        """

    def wait(self, seconds: float, /) -> bool:
        """Wait until the store can be used; return whether it can. Raises StartupError if it never can."""

    @property
    def unready_reason(self) -> str:
        """Why clients should use another server now; empty if the store is ready."""

    def close(self) -> None:
        """Close the store; afterwards, other methods raise StoreFailed. Idempotent."""

    def close_inherited(self) -> None:
        """Close a forked process's copies of the sockets."""


def accounted_bytes(messages: int, size: int) -> int:
    """Return bytes with overhead; `size` is the total size of the bodies."""
    return size + messages * MESSAGE_OVERHEAD_BYTES


def accounted_topic_bytes(names: Iterable[bytes]) -> int:
    """Return the bytes of topic names with overhead."""
    return sum([len(name) + TOPIC_OVERHEAD_BYTES for name in names])
