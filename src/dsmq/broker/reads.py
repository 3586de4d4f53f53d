"""Reads, which may have to wait for a message, for memory, or for a store that answers later."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from dsmq.broker.states import OPEN, WAITING
from dsmq.broker.usage import FREE_BYTES, Count
from dsmq.errors import BadRequest, Busy, ReplyError
from dsmq.store.api import MESSAGE_OVERHEAD_BYTES, Answer, Message, Put
from dsmq.wire.resp import Encoded

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.messages import PendingRead

# Max memory for the positions of GET of one connection, and what each takes besides its topic.
MAX_POSITION_BYTES = 2_097_152
POSITION_OVERHEAD_BYTES = 200


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

    def _try(self, read: PendingRead, found: list[Message] | ReplyError | None = None) -> None:
        """Reply if that is possible now; `found` is what a store has answered later."""
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
            connection.transport.count_if_long()
        except ReplyError as error:
            self.end()
            connection.fail(error)
        except Exception:  # noqa: BLE001
            connection.on_failure(in_request=True)
            return
        connection.resume()

    def stop_waiting(self) -> None:
        """Reply to a waiting read that there are no messages."""
        read = self.pending
        if read is not None and read.wait_ms:
            read.wait_ms = 0
            self._try(read, [])

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

    def __init__(self, count: Count[Connection]) -> None:
        """`count` counts the connections of all event loops together, and limits them."""
        self.to_wake: dict[Connection, None] = {}
        """Woken by a put, but not served yet, because they may be many."""
        self._count = count
        self.by_topic: dict[bytes, dict[Connection, None]] = {}

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

    def topics_of(self, puts: Iterable[Put]) -> set[bytes]:
        """Return the topics of these puts that a connection waits for. Thread-safe."""
        return {put[0] for put in puts if put[0] in self.by_topic}

    def wake(self, topics: Iterable[bytes]) -> None:
        for topic in topics:
            self.to_wake.update(self.by_topic.get(topic, ()))

    def serve(self, seconds: float) -> None:
        """Answer woken connections for this time."""
        until = time.monotonic() + seconds
        while self.to_wake:
            connection = next(iter(self.to_wake))
            del self.to_wake[connection]
            try:
                connection.reads.wake()
            except Exception:  # noqa: BLE001
                connection.on_failure()
            if time.monotonic() >= until:
                return
