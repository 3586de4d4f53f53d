"""One connection of the asyncio client: sends the requests of many tasks and receives replies, with timeouts."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from functools import partial
from typing import Any, cast

from dsmq.client.connection import CLOSED_BY_SERVER, LONG_BYTES, LONG_PAUSE_SECONDS
from dsmq.client.core import Core, pop_failure
from dsmq.client.dial import Race, addresses, certified_name, explain_greeting, explain_handshake
from dsmq.client.replies import is_lost, raise_if_fatal, reason
from dsmq.client.requests import BYTES_AT_ONCE, PUTS_AT_ONCE, Call, Producer
from dsmq.client.session import State
from dsmq.errors import DSMQError, ProtocolError, ReplyError
from dsmq.system import raise_malloc_threshold, unsent_bytes
from dsmq.wire.addresses import Endpoint
from dsmq.wire.resp import Reply, ReplyParser

# Max unanswered requests on a connection, because a server remembers only this many puts of a producer.
_MAX_UNANSWERED = 2 * PUTS_AT_ONCE
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.001, 0.02


class Place:
    """A call and its caller's future. If the call is cancelled after it was sent, its reply is dropped."""

    __slots__ = ("_left", "call", "future")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = 0

    def request(self, producer: Producer) -> bytes:
        request = self.call.request(producer)
        self._left = self.call.replies
        return request

    def answer(self, reply: Reply) -> None:
        try:
            self.call.take_reply(reply)
        except DSMQError as error:
            self.fail(error)
        self._left -= 1
        if not self._left and not self.future.done():
            self.future.set_result(None)

    def fail(self, error: BaseException) -> None:
        if self.future.done():
            return
        if isinstance(error, asyncio.CancelledError):
            self.future.cancel()
        else:
            # Each caller gets its own copy of the error, because `put_many` records in it how many messages are stored.
            self.future.set_exception(copy(error) if isinstance(error, DSMQError) else error)


class Connection(asyncio.Protocol):
    """One connection to the server."""

    def __init__(self, endpoint: Endpoint, sock: socket.socket, timeout: float) -> None:
        self.endpoint, self.sock = endpoint, sock
        self.producer = Producer(b"")
        self.received = b""
        """The first data received."""
        self.error: Exception | None = None
        """Why the connection has ended."""
        self.has_answered = False
        self.due: deque[Place] = deque()
        """The calls with outstanding replies, one entry per reply."""
        self.on_room: Callable[[], None] = lambda: None
        """Called when more may be sent."""
        self.on_lost: Callable[[Connection], None] = _fail_calls
        """Called when the connection has ended."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._parser = ReplyParser()
        self._transport: asyncio.Transport
        self._is_full = False
        # The current timeout, counted from the last progress, and the timeout for requests that do not wait. Progress
        # means that this client or the server has received data.
        self._timeout, self._base_timeout = timeout, timeout
        self._progress_at = self._loop.time()
        self._unsent = 0
        self._watch: asyncio.TimerHandle | None = None

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._progress_at = self._loop.time()
        self.received = self.received or data[:1000]
        due, parser = self.due, self._parser
        try:
            parser.feed(data)
            while (reply := parser.next()) is not None:
                value = raise_if_fatal(reply[0])
                if not due:
                    raise ProtocolError(f"unexpected: {value!r}")
                # Remove the call only afterwards, so that it is made again if this is interrupted.
                due[0].answer(value)
                due.popleft()
                self.has_answered = True
        except DSMQError as error:
            self.fail(error)
        except BaseException:
            # A reply may have been lost, and later replies must not go to the wrong calls.
            self.fail(ConnectionResetError("interrupted"))
            raise
        self.on_room()

    def eof_received(self) -> None:
        self.fail(ConnectionResetError(CLOSED_BY_SERVER))

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(exc or ConnectionResetError(CLOSED_BY_SERVER))

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._progress_at = self._loop.time()
        self.on_room()

    # Called by the client

    def has_room(self, call: Call) -> bool:
        """Return whether the call may be sent now."""
        return not self._is_full and (not self.due or len(self.due) + call.replies <= _MAX_UNANSWERED)

    def send(self, queue: deque[Place]) -> None:
        """Send calls from the front of a queue, as many as there is room for."""
        requests, size, seconds = [], 0, 0.0
        while queue and size < BYTES_AT_ONCE and self.has_room(queue[0].call):
            place = queue[0]
            if not place.future.done():
                try:
                    request = place.request(self.producer)
                except DSMQError as error:
                    place.fail(error)
                else:
                    requests.append(request)
                    size += len(request)
                    seconds = place.call.seconds
                    if not self.due:
                        self._progress_at = self._loop.time()
                    self.due.extend(itertools.repeat(place, place.call.replies))
            queue.popleft()
        if requests:
            self._write(b"".join(requests), seconds)

    def _write(self, data: bytes, seconds: float) -> None:
        """Send requests; the server may wait for `seconds` before it replies."""
        self._timeout = seconds + self._base_timeout
        self._transport.write(data)
        if len(data) > LONG_BYTES:
            self._unsent = self._count_unsent()
        if self._watch is None or self._watch.when() > self._progress_at + self._timeout:
            self._watch_progress()

    def _watch_progress(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._loop.call_at(self._progress_at + self._timeout, self._check_progress)

    def _check_progress(self) -> None:
        """End the connection if replies are due and there has been no progress for too long."""
        self._watch = None
        if not self.due or self.error is not None:
            return
        unsent = self._count_unsent()
        if unsent < self._unsent:
            self._progress_at = self._loop.time()
        self._unsent = unsent
        if self._loop.time() < self._progress_at + self._timeout:
            self._watch_progress()
        else:
            self.fail(TimeoutError(f"no reply within {self._timeout:g} s"))

    def _count_unsent(self) -> int:
        """Return the number of sent bytes that the server is not known to have received."""
        return self._transport.get_write_buffer_size() + unsent_bytes(self.sock.fileno())

    @property
    def is_stale(self) -> bool:
        """Whether the connection has been idle for so long that it may have ended without the event loop noticing."""
        return not self.due and self._loop.time() - self._progress_at > LONG_PAUSE_SECONDS

    async def await_end(self) -> None:
        """Wait until the server closes the connection."""
        # Unlike `await`, this does not cancel the future, which others await, too.
        if not (await asyncio.wait([self._ended], timeout=self._base_timeout))[0]:
            raise TimeoutError(f"the server has not closed the connection within {self._base_timeout:g} s")

    def fail(self, error: Exception) -> None:
        """End the connection immediately. Idempotent."""
        if self.error is not None:
            return
        if isinstance(error, ReplyError) and not is_lost(error, connecting=False):
            # The error is the reply to the first call.
            if self.due:
                self.due[0].fail(error)
            error = ConnectionResetError(reason(error))
        self.error = error
        # Take effect immediately, even if the event loop is not running.
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._transport.abort()
        if self._watch is not None:
            self._watch.cancel()
        if not self._ended.done():
            self._ended.set_result(None)
        self.on_lost(self)


def _fail_calls(connection: Connection) -> None:
    for place in connection.due:
        place.fail(cast("Exception", connection.error))


async def connect(core: Core) -> tuple[Connection, State]:
    """Return a new connection to one of the servers, and the new state. Raises OSError or a server's error."""
    failures: list[Exception] = []
    for endpoint, is_last in core.attempts():
        try:
            connection, state = await _connect(core, endpoint)
        except Exception as error:
            if not is_lost(error, connecting=True):
                raise
            core.move_on(endpoint)
            failures.append(error)
            if is_last:
                raise pop_failure(failures) from None
        else:
            break
    if core.choose():
        connection.fail(ConnectionResetError("another server was chosen"))
        return await connect(core)
    return connection, state


async def _connect(core: Core, endpoint: Endpoint) -> tuple[Connection, State]:
    connection: Connection | None = None
    try:
        async with asyncio.timeout(core.timeout) as limit:
            connection = await _open(core, endpoint, limit)
            hello = Place(Call(core.session.hello))
            connection.send(deque([hello]))
            await hello.future
            state, era = core.session.handle_hello(hello.call.reply)
    except BaseException as error:
        core.count_silence(error, b"" if connection is None else connection.received)
        if connection is not None:
            connection.fail(ConnectionResetError("not a usable connection"))
        if isinstance(error, TimeoutError) and not str(error):
            raise TimeoutError(f"{endpoint}: no reply within {core.timeout:g} s") from None
        if connection is not None and isinstance(error, ReplyError | OSError):
            explain = partial(explain_greeting, is_first=not core.session.epoch, with_tls=core.tls is not None)
            # Run it in a thread, because it may connect to find out which program answers.
            loop, received = asyncio.get_running_loop(), connection.received
            raise await loop.run_in_executor(None, explain, endpoint, received, error) from None
        raise
    connection.producer = Producer(era.run, era)
    connection.has_answered = False
    return connection, state


async def _open(core: Core, endpoint: Endpoint, limit: asyncio.Timeout) -> Connection:
    found = await _addresses(endpoint, core.silent_addresses)
    # These attempts have their own timeout, and errors that name the addresses.
    limit.reschedule(None)
    with Race(endpoint, found) as race:
        for seconds in race.run(core.timeout):
            await _select(race, seconds)
    limit.reschedule(asyncio.get_running_loop().time() + core.timeout)
    # asyncio allocates 256 KiB for each receive.
    raise_malloc_threshold()
    options: dict[str, Any] = {"ssl": core.tls, "server_hostname": certified_name(endpoint)} if core.tls else {}
    try:
        make = partial(Connection, endpoint, race.winner, core.timeout)
        return (await asyncio.get_running_loop().create_connection(make, sock=race.winner, **options))[1]
    except BaseException as error:
        race.winner.close()
        if isinstance(error, OSError):
            raise explain_handshake(endpoint, error, core.timeout) from None
        raise


async def _select(race: Race, seconds: float) -> None:
    """Wait for a connection attempt, by polling: not every event loop can wait for a socket to connect."""
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + seconds, _FIRST_POLL_SECONDS
    while not race.selector.select(0) and loop.time() < until:
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL_SECONDS)


async def _addresses(endpoint: Endpoint, skip: int) -> list[tuple[int, int, int, Any]]:
    try:
        if endpoint.host:
            socket.getaddrinfo(endpoint.host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return await asyncio.get_running_loop().run_in_executor(None, addresses, endpoint, skip)
    return addresses(endpoint, skip)
