"""READ and GET, which may have to wait for a message, for memory, or for the store's answer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from dsmq.broker.arguments import MAX_NAME_BYTES, parse_integer, parse_number, parse_options, parse_topic
from dsmq.broker.states import OPEN, WAITING
from dsmq.broker.usage import FREE_BYTES
from dsmq.errors import BadRequest, ReplyError, WrongEpoch
from dsmq.store.api import MESSAGE_OVERHEAD_BYTES, Answer, Message, Store, TopicMessage
from dsmq.store.selection import Selection
from dsmq.wire.limits import DEFAULT_COUNT, MAX_COUNT, MAX_READ_BYTES
from dsmq.wire.resp import Encoded, encode_bulk, encode_messages, encode_null, quoted

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.waiters import Waiters

# Max size of a reply to READ while earlier replies are unread: a client that doesn't read would never get most of a
# longer one.
SHORT_READ_BYTES = 65_536
MAX_WAIT_MS = 86_400_000
# Max memory for one connection's GET positions, and the bytes that each one takes in addition to its topic.
MAX_POSITION_BYTES = 2_097_152
POSITION_OVERHEAD_BYTES = 200


@dataclass(slots=True, eq=False)
class PendingRead:
    """A request for messages that has no reply yet."""

    topic: bytes
    after: int
    count: int
    """Max messages; 0: only the newest."""
    max_bytes: int
    wait_ms: int
    """How long to wait for a message if there is none."""
    encode: Callable[[Connection, Any, list[Message]], Encoded]
    epoch: bytes | None = None
    """The epoch that `after` belongs to."""
    below: int = 0
    """If not 0, return only messages with lower ids, because the transaction's later puts are already stored."""
    deadline: float = math.inf
    registered: bool = False
    """Whether a put into the topic wakes the connection."""
    start: Start | None = None
    """LAST or SINCE, from which `after` is determined; None once it is."""
    retry_in: float = math.inf
    """Seconds after which to try again, unless something wakes it earlier."""
    retry_at: float = math.inf

    def fetch(self, store: Store) -> Answer[Any]:
        """Return the argument for `take`."""
        if self.start is not None:
            return self.start.find(store, self.below)
        if self.count:
            return store.read(self.topic, self.after, self.count, self.max_bytes, self.wait_ms)
        if self.below:
            return store.latest(self.topic, self.after, self.below)
        return store.latest(self.topic, self.after)

    def fetch_once(self, store: Store, found: dict[Hashable, Any] | None) -> Answer[Any]:
        """Like `fetch`, but if `found` has what was just fetched for another waiter at this position, return that."""
        if found is None or type(self) is not PendingRead or not self.registered or not self.count:
            return self.fetch(store)
        position = self.topic, self.after, self.count, self.max_bytes
        answer = found.get(position)
        if answer is None:
            answer = found[position] = self.fetch(store)
        return answer

    def take(self, found: Any) -> list[Message] | None:
        """Return the messages, or None to fetch again."""
        if type(found) is tuple:
            # This is the answer for `start`. A store that answers later may give it twice.
            if self.start is not None and self.start.take(found):
                self.after, self.start = self.start.after, None
            return None
        if self.below:
            return [message for message in found if message.id < self.below]
        return found  # type: ignore[no-any-return]

    def refuse(self, error: ReplyError) -> Any:
        """Return the argument for `take` after an error of a store that answers later, or raise the error."""
        raise error

    def wait(self, waiters: Waiters, connection: Connection) -> None:
        waiters.add((self.topic,), (), connection)

    def end_wait(self, waiters: Waiters, connection: Connection) -> None:
        waiters.remove((self.topic,), (), connection)

    def covers(self, topic: bytes) -> bool:
        return topic == self.topic

    @property
    def about(self) -> bytes:
        """The topics to read, as text."""
        return self.topic

    def memory(self, messages: list[Message]) -> int:
        """Return how much memory the reply takes."""
        return sum([len(message.body) + MESSAGE_OVERHEAD_BYTES for message in messages])


@dataclass(slots=True, eq=False)
class PendingSlices(PendingRead):
    """A change that waits like a read, because it is made in slices, or by a store that answers later."""

    slices: Iterator[Answer[int]] = field(default_factory=lambda: iter(()))
    """Numbers to add to the total, now or later. A future is yielded until it is done, because a stale wake-up may come
    before its result.
    """
    total: int = 0

    def fetch(self, _store: Store) -> Answer[int] | None:
        return next(self.slices, None)

    def take(self, found: Any) -> list[Message] | None:
        if found is None:
            return []
        self.total += found
        return None


@dataclass(slots=True)
class Start:
    """LAST or SINCE: a position that has yet to be found."""

    selection: Selection
    last: int
    since_ms: int
    """Used if `last` is 0."""
    below: int = sys.maxsize
    after: int = 0

    def find(self, store: Store, below: int) -> Answer[tuple[int, int]]:
        if not self.last:
            return 0, store.in_memory.id_before(self.since_ms)
        return store.go_back(self.selection, self.last, min(self.below, below or sys.maxsize))

    def take(self, found: tuple[int, int]) -> bool:
        """Return whether the position has been found."""
        self.last, reached = found
        self.below = self.after = reached
        return not self.last


def read(client: Connection, request: list[bytes]) -> Encoded | None:
    pending = parse_read(client, request)
    if pending.epoch is not None or pending.after > client.context.store.last_id():
        check_position(client, pending)
    return client.reads.start(pending)


def check_position(client: Connection, pending: PendingRead) -> None:
    """Raise an error if `after` belongs to another epoch."""
    store = client.context.store
    if pending.epoch is not None:
        check_epoch(store, pending.epoch)
    if pending.after > store.last_id():
        store.check_id(pending.after)


def parse_read(client: Connection, request: list[bytes]) -> PendingRead:
    topic = parse_topic(client, request)
    if not request[2].isdigit():
        pending = parse_read(client, [*request[:2], b"0", *request[4:]])
        pending.start = parse_start(Selection([topic]), request[2:4])
        return pending
    after = parse_integer(request[2], "after")
    count, max_bytes, wait_ms, epoch, is_latest = read_options(*request[3:])
    if client.transport.budget.total:
        max_bytes = min(max_bytes, SHORT_READ_BYTES)
    return PendingRead(topic, after, 0 if is_latest else count, max_bytes, wait_ms, _encode_read, epoch)


def parse_start(selection: Selection, words: list[bytes]) -> Start:
    """Parse LAST n or SINCE ms, given in place of `after`."""
    match words[0].upper(), words[1:]:
        case b"LAST", [number]:
            return Start(selection, parse_integer(number, "LAST", 1), 0)
        case b"SINCE", [number]:
            return Start(selection, 0, parse_integer(number, "SINCE"))
    raise BadRequest(f"`after` should be an id, LAST n or SINCE ms, not {quoted(words[0])}")


@lru_cache
def read_options(*words: bytes) -> tuple[int, int, int, bytes | None, bool]:
    """Parse COUNT, BYTES, WAIT, EPOCH and LATEST."""
    options = parse_options(words, {b"COUNT": 1, b"BYTES": 1, b"WAIT": 1, b"LATEST": 0, b"EPOCH": 1})
    count = parse_number(options, b"COUNT", DEFAULT_COUNT, 1, MAX_COUNT)
    max_bytes = parse_number(options, b"BYTES", MAX_READ_BYTES, 1, MAX_READ_BYTES)
    wait_ms = parse_number(options, b"WAIT", 0, 0, MAX_WAIT_MS)
    epoch = options.get(b"EPOCH", [None])[0]
    if epoch is not None and len(epoch) > MAX_NAME_BYTES:
        # A longer one would stay in the cache.
        raise BadRequest(f"an epoch may have at most {MAX_NAME_BYTES} bytes")
    return count, max_bytes, wait_ms, epoch, b"LATEST" in options


def _encode_read(client: Connection, read: PendingRead, messages: list[Message]) -> Encoded:
    if read.epoch is not None:
        # Checked again, because a store on another machine may have begun another epoch during the wait.
        check_epoch(client.context.store, read.epoch)
    count_delivery(client, read.topic, messages)
    waiters = client.loop.waiters
    if waiters.found is None:
        return encode_messages(messages)
    if messages is not waiters.encoded[0]:
        reply = encode_messages(messages)
        if type(reply) is not bytes:
            # A long reply can't be shared: the reader's transport keeps it and appends to it.
            return reply
        waiters.encoded = messages, reply
    return waiters.encoded[1]


def check_epoch(store: Store, epoch: bytes) -> None:
    if epoch != store.epoch.encode():
        raise WrongEpoch(f"{store.epoch} {store.run} this is another epoch")


def count_delivery(client: Connection, topic: bytes, messages: Sequence[Message | TopicMessage]) -> None:
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
    count_delivery(client, read.topic, messages)
    if not messages:
        return encode_null(client.version)
    client.reads.set_position(read.topic, messages[0].id)
    return encode_bulk(messages[0].body)


class Reads:
    """A connection's positions, and its pending read, which must be answered before any other request runs."""

    __slots__ = ("_connection", "below", "pending", "position_bytes", "positions", "waiting_bytes")

    def __init__(self, connection: Connection) -> None:
        self.pending: PendingRead | None = None
        self.positions: dict[bytes, int] = {}
        """By topic, the id after which GET continues."""
        self.position_bytes = 0
        self.waiting_bytes = 0
        """The memory for the names that the connection waits for."""
        self.below = 0
        """`PendingRead.below`, while a step of a transaction runs."""
        self._connection = connection

    def set_position(self, topic: bytes, message_id: int) -> None:
        """Make GET continue after this message. Raises BadRequest if the positions take too much memory."""
        if topic not in self.positions:
            size = self.position_bytes + POSITION_OVERHEAD_BYTES + len(topic)
            if size > MAX_POSITION_BYTES:
                raise BadRequest("too many topics for GET on one connection; READ has no such limit")
            self.position_bytes = size
            if size > FREE_BYTES:
                self._connection.requests.count()
        self.positions[topic] = message_id

    @property
    def memory(self) -> int:
        """The bytes that count towards the limit on requests."""
        return self.position_bytes + self.waiting_bytes

    def count_waiting(self, size: int) -> None:
        """Count the memory for the names that the connection waits for."""
        before, self.waiting_bytes = self.waiting_bytes, size
        if (size > FREE_BYTES or before > FREE_BYTES) and not self._connection.closed:
            self._connection.requests.count()

    def start(self, read: PendingRead) -> Encoded | None:
        """Return the reply, or None if it is sent later."""
        connection = self._connection
        if self.below:
            # A step of a transaction does not wait for messages.
            read.below, read.wait_ms = self.below, 0
        found = read.fetch(connection.context.store)
        is_tight = read.below or connection.transport.budget.is_tight
        if type(found) is list and (found or not read.wait_ms) and not is_tight:
            # Fast path for READ, GET and TAKE with a store that answers immediately.
            return read.encode(connection, read, found)
        self.pending = read
        reply = self._reply(read, found)
        if reply is None:
            if connection.state is OPEN:
                connection.state = WAITING
            if read.wait_ms:
                read.deadline = connection.loop.now + read.wait_ms / 1000
                connection.schedule(read.deadline)
                if connection.transport.eof_received:
                    # The client shut down its sending side while the request waited for something else.
                    self.end()
                    connection.finish()
        return reply

    def _reply(self, read: PendingRead, found: Answer[Any]) -> Encoded | None:
        connection = self._connection
        if isinstance(found, Future):
            connection.loop.when_done(found, partial(self._try, read))
            return None
        messages = read.take(found)
        if messages is None:
            # Continue in another time slice.
            connection.loop.waiters.to_wake[connection] = None
            return None
        if not messages and read.wait_ms:
            if not read.registered:
                # Register first, then check again, so that a put in between is not missed.
                read.wait(connection.loop.waiters, connection)
                read.registered = True
                found = read.fetch(connection.context.store)
                if found or type(found) is not list:
                    return self._reply(read, found)
            read.retry_at = connection.loop.now + read.retry_in
            if read.retry_in < math.inf:
                connection.schedule(read.retry_at)
            return None
        transport = connection.transport
        if transport.budget.is_tight and not transport.reserve(read.memory(messages)):
            return None
        self.end()
        return read.encode(connection, read, messages)

    def wake(self) -> None:
        """Try again: there is a new message or room for the reply."""
        if self.pending is not None:
            self._try(self.pending)

    def _try(self, read: PendingRead, found: Any = None) -> None:
        """Reply now if possible; `found` is the answer of a store that answers later."""
        connection = self._connection
        if self.pending is not read or connection.state is not WAITING:
            # It has already been answered or is waiting for room.
            return
        try:
            if isinstance(found, ReplyError):
                found = read.refuse(found)
            if found is None:
                found = read.fetch_once(connection.context.store, connection.loop.waiters.found)
            reply = self._reply(read, found)
            if reply is None:
                return
            connection.transport.send(reply)
        except ReplyError as error:
            self.fail(error)
            return
        except Exception:  # noqa: BLE001
            connection.on_failure(in_request=True)
            return
        connection.requests.resume()

    def fail(self, error: ReplyError) -> None:
        """Reply with an error to the pending read."""
        self.end()
        self._connection.fail(error)
        self._connection.requests.resume()

    def stop_waiting(self, *, at_once: bool = False) -> None:
        """Reply to a waiting read even if there are no messages; if the store may have some, reply when it answers.

        `at_once`: the connection ends, and the client will wait elsewhere.
        """
        read = self.pending
        if read is not None and read.wait_ms:
            found = read.fetch(self._connection.context.store) if at_once else None
            read.wait_ms, read.deadline = 0, math.inf
            self._try(read, found)

    def end(self) -> None:
        """Forget the pending read, because it has been answered, or never will be."""
        read, self.pending = self.pending, None
        if read is not None and read.registered:
            read.end_wait(self._connection.loop.waiters, self._connection)

    def close(self) -> None:
        self.end()
        self.positions, self.position_bytes = {}, 0
