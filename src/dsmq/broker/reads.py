"""Reads: READ and GET, which may have to wait for a message, for memory, or for a store that answers later."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from dsmq.broker.arguments import parse_integer, parse_number, parse_options, parse_topic
from dsmq.broker.states import OPEN, WAITING
from dsmq.broker.usage import FREE_BYTES, Count
from dsmq.errors import BadRequest, Busy, ReplyError, WrongEpoch
from dsmq.store.api import MESSAGE_OVERHEAD_BYTES, Answer, Message, Store
from dsmq.wire.limits import DEFAULT_COUNT, MAX_READ_BYTES
from dsmq.wire.resp import Encoded, encode_bulk, encode_messages, encode_null

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.event_loop import EventLoop

MAX_COUNT = 1_000
# Max size of one reply to READ while others are unread: most of a longer one would never reach a client that doesn't
# read.
SHORT_READ_BYTES = 65_536
MAX_WAIT_MS = 86_400_000
# Max memory for one connection's positions of GET, and the bytes that each takes in addition to its topic.
MAX_POSITION_BYTES = 2_097_152
POSITION_OVERHEAD_BYTES = 200


@dataclass(slots=True, eq=False)
class PendingRead:
    """A request for messages, until it is answered."""

    topic: bytes
    after: int
    count: int
    """Max messages; 0 stands for the newest one only."""
    max_bytes: int
    wait_ms: int
    """How long to wait for a message if there is none."""
    encode: Callable[[Connection, PendingRead, list[Message]], Encoded]
    epoch: bytes | None = None
    """The epoch that `after` belongs to."""
    below: int = 0
    """If not 0, only messages with lower ids are returned: later ones of the same transaction are stored already."""
    deadline: float = math.inf
    registered: bool = False
    """Whether a put into the topic wakes the connection."""

    def fetch(self, store: Store) -> Answer[list[Message]]:
        if self.count:
            return store.read(self.topic, self.after, self.count, self.max_bytes, self.wait_ms)
        if self.below:
            return store.latest(self.topic, self.after, self.below)
        return store.latest(self.topic, self.after)


def read(client: Connection, request: list[bytes]) -> Encoded | None:
    pending = parse_read(client, request)
    store = client.context.store
    if pending.epoch is not None:
        _check_epoch(store, pending.epoch)
    if pending.after > store.last_id():
        store.check_id(pending.after)
    return client.reads.start(pending)


def parse_read(client: Connection, request: list[bytes]) -> PendingRead:
    topic = parse_topic(client, request)
    after = parse_integer(request[2], "after")
    count, max_bytes, wait_ms, epoch = _read_options(*request[3:])
    if client.transport.budget.total:
        max_bytes = min(max_bytes, SHORT_READ_BYTES)
    return PendingRead(topic, after, count, max_bytes, wait_ms, _encode_read, epoch)


@lru_cache
def _read_options(*words: bytes) -> tuple[int, int, int, bytes | None]:
    options = parse_options(words, {b"COUNT": 1, b"BYTES": 1, b"WAIT": 1, b"LATEST": 0, b"EPOCH": 1})
    count = parse_number(options, b"COUNT", DEFAULT_COUNT, 1, MAX_COUNT)
    max_bytes = parse_number(options, b"BYTES", MAX_READ_BYTES, 1, MAX_READ_BYTES)
    wait_ms = parse_number(options, b"WAIT", 0, 0, MAX_WAIT_MS)
    return 0 if b"LATEST" in options else count, max_bytes, wait_ms, options.get(b"EPOCH", [None])[0]


def _encode_read(client: Connection, read: PendingRead, messages: list[Message]) -> Encoded:
    if read.epoch is not None:
        # Checked again, because a store on another machine may have begun another epoch during the wait.
        _check_epoch(client.context.store, read.epoch)
    _count_delivery(client, read.topic, messages)
    return encode_messages(messages)


def _check_epoch(store: Store, epoch: bytes) -> None:
    if epoch != store.epoch.encode():
        raise WrongEpoch(f"{store.epoch} {store.run} this is another epoch")


def _count_delivery(client: Connection, topic: bytes, messages: list[Message]) -> None:
    counters = client.counters
    if not messages:
        counters.gets_empty += 1
        return
    counters.gets_message += 1
    counters.delivered += len(messages)
    client.last_read = topic, messages[-1].number
    if messages[0].age_ms == messages[-1].age_ms:
        counters.delivery_seconds.add(messages[0].age_ms / 1000, len(messages))
        return
    for message in messages:
        counters.delivery_seconds.add(message.age_ms / 1000)


def get(client: Connection, request: list[bytes]) -> Encoded | None:
    return _get_at_position(client, request, parse_topic(client, request), 1, 0)


def get_latest(client: Connection, request: list[bytes]) -> Encoded | None:
    return _get_at_position(client, request, parse_topic(client, request), 0, 0)


def get_wait(client: Connection, request: list[bytes]) -> Encoded | None:
    topic, wait_ms = parse_get_wait(client, request)
    return _get_at_position(client, request, topic, 1, wait_ms)


def parse_get_wait(client: Connection, request: list[bytes]) -> tuple[bytes, int]:
    return parse_topic(client, request), parse_integer(request[2], "milliseconds", most=MAX_WAIT_MS)


def _get_at_position(
    client: Connection, request: list[bytes], topic: bytes, count: int, wait_ms: int
) -> Encoded | None:
    position = client.reads.positions.get(topic, client.start_id)
    if position is None:
        client.await_start(request)
        return None
    return client.reads.start(PendingRead(topic, position, count, 1, wait_ms, _advance_position))


def _advance_position(client: Connection, read: PendingRead, messages: list[Message]) -> Encoded:
    _count_delivery(client, read.topic, messages)
    if not messages:
        return encode_null(client.version)
    client.reads.set_position(read.topic, messages[0].id)
    return encode_bulk(messages[0].body)


class Reads:
    """A connection's positions, and its pending read: until that is answered, no other request runs."""

    __slots__ = ("_connection", "below", "pending", "position_bytes", "positions")

    def __init__(self, connection: Connection) -> None:
        self.pending: PendingRead | None = None
        self.positions: dict[bytes, int] = {}
        """The ids after which GET continues, by topic."""
        self.position_bytes = 0
        self.below = 0
        """While a step of a transaction runs: `PendingRead.below`."""
        self._connection = connection

    def set_position(self, topic: bytes, message_id: int) -> None:
        """Let GET continue after this message. Raises BadRequest if the positions take too much memory."""
        if topic not in self.positions:
            size = self.position_bytes + POSITION_OVERHEAD_BYTES + len(topic)
            if size > MAX_POSITION_BYTES:
                raise BadRequest("too many topics for GET on one connection; READ has no such limit")
            self.position_bytes = size
            if size > FREE_BYTES:
                self._connection.requests.count()
        self.positions[topic] = message_id

    def start(self, read: PendingRead) -> Encoded | None:
        """Return the reply, or None if it comes later."""
        connection = self._connection
        if self.below:
            # A step of a transaction does not wait for messages.
            read.below, read.wait_ms = self.below, 0
        messages = read.fetch(connection.context.store)
        if not (read.wait_ms or read.below or connection.transport.budget.is_tight or isinstance(messages, Future)):
            return read.encode(connection, read, messages)
        self.pending = read
        reply = self._reply(read, messages)
        if reply is None:
            if connection.state is OPEN:
                connection.state = WAITING
            if read.wait_ms:
                read.deadline = connection.loop.now + read.wait_ms / 1000
                connection.schedule(read.deadline)
        return reply

    def _reply(self, read: PendingRead, messages: Answer[list[Message]]) -> Encoded | None:
        connection = self._connection
        if isinstance(messages, Future):
            connection.loop.when_done(messages, partial(self._try, read))
            return None
        if read.below:
            messages = [message for message in messages if message.id < read.below]
        if not messages and read.wait_ms:
            if read.registered:
                return None
            # Register first, then check again, so that a put in between is not missed.
            connection.loop.waiters.add(read.topic, connection)
            read.registered = True
            return self._reply(read, read.fetch(connection.context.store))
        transport = connection.transport
        if transport.budget.is_tight and not transport.reserve(
            sum([len(message.body) + MESSAGE_OVERHEAD_BYTES for message in messages])
        ):
            return None
        self.end()
        return read.encode(connection, read, messages)

    def wake(self) -> None:
        """Try again: there is a new message, or room for the reply."""
        if self.pending is not None:
            self._try(self.pending)

    def _try(self, read: PendingRead, found: Answer[list[Message]] | ReplyError | None = None) -> None:
        """Reply if that is possible now; `found` is the answer of a store that answers later."""
        connection = self._connection
        if self.pending is not read or connection.state is not WAITING:
            # It has been answered already, or waits for room.
            return
        try:
            if isinstance(found, ReplyError):
                raise found
            reply = self._reply(read, read.fetch(connection.context.store) if found is None else found)
            if reply is None:
                return
            connection.transport.send(reply)
        except ReplyError as error:
            self.end()
            connection.fail(error)
        except Exception:  # noqa: BLE001
            connection.on_failure(in_request=True)
            return
        connection.requests.resume()

    def stop_waiting(self, *, at_once: bool = False) -> None:
        """Reply to a waiting read, even if there are no messages; a store that may have some answers that later.

        `at_once`: the connection ends, and the client goes on waiting elsewhere.
        """
        read = self.pending
        if read is not None and read.wait_ms:
            found = read.fetch(self._connection.context.store) if at_once else None
            read.wait_ms, read.deadline = 0, math.inf
            self._try(read, found)

    def end(self) -> None:
        """Forget the pending read, because it is answered or never will be."""
        read, self.pending = self.pending, None
        if read is not None and read.registered:
            self._connection.loop.waiters.remove(read.topic, self._connection)

    def close(self) -> None:
        self.end()
        self.positions, self.position_bytes = {}, 0


class Waiters:
    """The connections of one event loop that wait for messages, by topic."""

    def __init__(self, loop: EventLoop, count: Count[Connection], slice_seconds: float) -> None:
        """`count` counts the connections of all event loops together, and limits them."""
        self.to_wake: dict[Connection, None] = {}
        """Woken by a put, but not served yet, because they may be many."""
        self.by_topic: dict[bytes, dict[Connection, None]] = {}
        self._loop = loop
        self._count = count
        self._slice_seconds = slice_seconds

    def add(self, topic: bytes, connection: Connection) -> None:
        """Raises Busy if there are too many."""
        if not self._count.claim(connection, 1):
            raise Busy(f"too many waiting readers (max_waiting_readers = {self._count.limit})")
        self.by_topic.setdefault(topic, {})[connection] = None

    def remove(self, topic: bytes, connection: Connection) -> None:
        self._count.drop(connection)
        waiters = self.by_topic[topic]
        del waiters[connection]
        if not waiters:
            del self.by_topic[topic]

    def wake(self, topics: Iterable[bytes]) -> None:
        """Wake the connections that wait for messages in these topics. Thread-safe."""
        if awaited := {topic for topic in topics if topic in self.by_topic}:
            if threading.get_ident() == self._loop.thread.ident:
                self._wake(awaited)
            else:
                self._loop.post(partial(self._wake, awaited))

    def _wake(self, topics: set[bytes]) -> None:
        for topic in topics:
            self.to_wake.update(self.by_topic.get(topic, ()))
        self.serve()

    def serve(self) -> None:
        """Answer woken connections, for a slice of the turn."""
        until = time.monotonic() + self._slice_seconds
        while self.to_wake:
            connection = next(iter(self.to_wake))
            del self.to_wake[connection]
            try:
                connection.reads.wake()
            except Exception:  # noqa: BLE001
                connection.on_failure()
            if time.monotonic() >= until:
                return
