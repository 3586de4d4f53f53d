"""The connections of the asyncio client: requests of many tasks in order over one, which is replaced when it breaks."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from copy import copy
from functools import partial
from itertools import repeat
from operator import itemgetter
from typing import Any, Literal, cast

from dsmq.client import IDLE_SECONDS
from dsmq.client import session as wire
from dsmq.client.connection import ENDED, LONG_PAUSE_SECONDS, closed_silently, raise_if_known
from dsmq.client.dial import REST_SECONDS, STAGGER_SECONDS, Address, Target, addresses, failure, unix_address
from dsmq.client.requests import BYTES_AT_ONCE, PUTS_AT_ONCE, Plain, Producer, PutMany, Request, Retries
from dsmq.client.session import Session, State
from dsmq.errors import ClientClosed, ConnectionLost, DSMQError, ProtocolError, ReplyError
from dsmq.system import expect_long_messages, process, unsent_bytes
from dsmq.wire.resp import Reply, ReplyParser

# How many requests may be unanswered on a connection: as many puts as a server surely remembers of one producer.
_MAX_UNANSWERED = 2 * PUTS_AT_ONCE
# What is longer may take longer to send than a reply may take.
_LONG_BYTES = 16_384


class Connector:
    """What the connections of a client share: where to connect, the session, and how they fare."""

    def __init__(
        self,
        target: Target,
        timeout: float,
        reconnect_timeout: float,
        on_state_change: Callable[[State], None] | None,
    ) -> None:
        self.target = target
        self.session = Session(target.token)
        self.timeout = timeout
        self.reconnect_timeout = reconnect_timeout
        self.on_state_change = on_state_change
        # Whether there is no connection, as far as is known, and whether a call still tries.
        self.down: Literal["", "lost", "given up"] = ""

    async def connect(self) -> Link:
        """Return a new connection that the server has greeted."""
        try:
            async with asyncio.timeout(self.timeout):
                link = await _open(self.target, self.timeout)
                try:
                    state, era = self.session.meet(await self._greet(link))
                except BaseException as error:
                    link.fail(error)
                    raise
        except TimeoutError as error:
            raise TimeoutError(str(error) or f"{self.target}: no answer within {self.timeout:g} s") from None
        except ConnectionResetError:
            if self.session.epoch:
                raise
            # In a thread: it may connect, to find out what answers there.
            raise await asyncio.get_running_loop().run_in_executor(None, closed_silently, self.target) from None
        link.producer, link.batch_producer = Producer(era.run, era), Producer(era.run, era)
        self.announce(state)
        return link

    async def _greet(self, link: Link) -> Reply:
        try:
            reply = await link.ask(self.session.hello)
            if link.end is not None:
                raise link.end
        except (ProtocolError, ConnectionResetError):
            raise_if_known(self.target, link.heard)
            raise
        return reply

    def announce(self, state: State, error: Exception | None = None) -> None:
        """Report a new state: each loss once, and each end of it."""
        if not wire.is_news(state, self.down):
            return
        self.down = state if state in ("lost", "given up") else ""
        if state != "lost" or self.reconnect_timeout:
            wire.log_state(state, self.target, error)
        if self.on_state_change is not None:
            self.on_state_change(state)


class Pool:
    """The connections of a client that belong to one event loop, in one process."""

    def __init__(self, connector: Connector) -> None:
        self.loop = asyncio.get_running_loop()
        self.process = process()
        self._connector = connector
        self._channels: set[Channel] = set()
        # Those that were used to wait; the one used last stands last.
        self._idle: deque[Channel] = deque()
        self._sweeper: asyncio.TimerHandle | None = None
        self.shared = self._channel()
        """The connection for all calls that do not wait."""
        self._guard = _closing(self._channels)
        with suppress(StopIteration):
            self._guard.__anext__().send(None)

    @property
    def is_in_use(self) -> bool:
        """Whether its event loop is running, in another thread."""
        return self.process is process() and self.loop.is_running()

    async def wait(self, call: Request) -> Reply:
        """Make a call that waits on a connection of its own: what stands behind it would wait too."""
        channel = self._idle.pop() if self._idle else self._channel()
        try:
            reply = await channel.ask(call)
        except BaseException as error:
            # The server may still be waiting there.
            self._drop(channel, error)
            raise
        channel.idle_since = self.loop.time()
        self._idle.append(channel)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(IDLE_SECONDS, self._sweep)
        return reply

    def _channel(self) -> Channel:
        channel = Channel(self._connector)
        self._channels.add(channel)
        return channel

    def _drop(self, channel: Channel, error: BaseException) -> None:
        self._channels.discard(channel)
        if self.process is not process() or self.loop.is_closed():
            channel.abandon()
        else:
            channel.close(error)

    def _sweep(self) -> None:
        """Close the connections that have been idle for too long."""
        since = self.loop.time() - IDLE_SECONDS
        while self._idle and self._idle[0].idle_since <= since:
            self._drop(self._idle.popleft(), ClientClosed("idle"))
        left = self._idle[0].idle_since - since if self._idle else 0.0
        self._sweeper = self.loop.call_later(left, self._sweep) if left else None

    def close(self, error: Exception) -> None:
        """Close all connections; calls that are being made raise this error. Idempotent."""
        if self.is_in_use and self.loop is not asyncio.get_running_loop():
            self.loop.call_soon_threadsafe(self.close, error)
        else:
            for channel in list(self._channels):
                self._drop(channel, error)


async def _closing(channels: set[Channel]) -> AsyncGenerator[None, None]:
    """Close connections when `asyncio.run` ends the asynchronous generators of its loop, or when the pool is gone."""
    try:
        yield
    finally:
        for channel in channels:
            channel.close(ClientClosed("the event loop has ended"))


class Place:
    """The place of a call in the order of calls. A call that is cancelled keeps it: its reply is dropped."""

    __slots__ = ("_retries", "call", "count", "future")

    def __init__(self, call: Request) -> None:
        self.call = call
        self.count = 1
        """How many requests it is."""
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._retries: Retries | None = None

    @property
    def seconds(self) -> float:
        """How long the server may wait before it replies."""
        return self.call.seconds

    def request(self, link: Link) -> bytes:
        """Return the requests for a connection, the first or another."""
        return self.call.request(link.producer)

    def answer(self, reply: Reply) -> None:
        if not self.future.done():
            self.future.set_result(reply)

    def fail(self, error: BaseException) -> None:
        if self.future.done():
            return
        if isinstance(error, asyncio.CancelledError):
            self.future.cancel()
        else:
            self.future.set_exception(error)

    def lost(self, error: Exception, *, achieved: bool) -> None:
        """Note that the connection broke before the reply came, and whether others came on it."""
        try:
            if self.call.lost(error) or achieved:
                self._retries = None
        except ConnectionLost as lost:
            self.fail(lost)

    def pause(self, error: Exception, seconds: float) -> float | None:
        """Return how long to wait before the next attempt; None if `seconds` are over, and the call has failed."""
        self._retries = self._retries or Retries(seconds)
        pause = self._retries.pause()
        if pause is None:
            lost = self.call.given_up(error)
            lost.__cause__ = error
            self.fail(lost)
        return pause


class Batch(Place):
    """A place for the next puts of a `put_many`: several requests with a reply to each."""

    __slots__ = ("_batches", "_left", "_producer", "_puts", "_request")
    seconds = 0.0

    def __init__(self, puts: PutMany) -> None:
        super().__init__(cast("Request", puts))
        self._puts = puts
        self._producer: Producer | None = None

    def make(self, producer: Producer) -> bool:
        """Make the requests; return whether there are any."""
        self.future = asyncio.get_running_loop().create_future()
        return self._next(producer)

    def _next(self, producer: Producer) -> bool:
        if producer is not self._producer:
            self._producer, self._batches = producer, self._puts.batches(producer)
        # Without a count, it has taken so long that the connection is to be looked at: the channel does that itself.
        self.count, self._request = next(filter(itemgetter(0), self._batches), (0, b""))
        self._left = self.count
        return self.count > 0

    def request(self, link: Link) -> bytes:
        if link.batch_producer is not self._producer:
            # Another connection: the same puts, but for those that have their answers.
            self._next(link.batch_producer)
        return self._request

    def answer(self, reply: Reply) -> None:
        try:
            self._puts.answered(reply)
        except DSMQError as error:
            self.fail(error)
        self._left -= 1
        if not self._left:
            super().answer(None)


class Channel:
    """Calls in order, over a connection that is replaced when it breaks.

    Those that were sent and have no reply then are sent again, in their order, before any that have not been sent yet.
    """

    def __init__(self, connector: Connector) -> None:
        self.idle_since = 0.0
        self._connector = connector
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        # Calls to be sent, for the first time or again.
        self._waiting: deque[Place] = deque()
        self._is_scheduled = False
        self._reviving: asyncio.Task[None] | None = None
        # What the last connection ended with, and how long to wait before the next.
        self._error: Exception | None = None
        self._delay = 0.0

    @property
    def batch_producer(self) -> Producer:
        return self._link.batch_producer if self._link else Producer(b"")

    async def open(self) -> None:
        """Connect; raises what hinders it."""
        self._adopt(await self._connector.connect())

    def ask(self, call: Request) -> asyncio.Future[Reply]:
        """Make a call; return the future of its reply."""
        return self.add(Place(call))

    def add(self, place: Place) -> asyncio.Future[Reply]:
        """Send what a place holds, behind all others."""
        self._waiting.append(place)
        link = self._link
        if self._is_reviving:
            return place.future
        if link is None or link.is_stale:
            self._revive()
        elif not link.due:
            self._pump()
        elif not self._is_scheduled:
            # Calls that are made in the same round of the event loop are sent together.
            self._is_scheduled = True
            self._loop.call_soon(self._pump)
        return place.future

    def _pump(self) -> None:
        """Send the calls that wait, as far as there is room."""
        self._is_scheduled = False
        link = self._link
        if link is None or self._is_reviving:
            return
        try:
            while self._waiting and link.has_room(self._waiting[0].count):
                self._send_batch(link)
        except OSError as error:
            # Another connection has found that the server was started anew.
            link.fail(error)
        except BaseException:
            link.fail(ConnectionResetError("interrupted"))
            raise

    def _send_batch(self, link: Link) -> None:
        requests, size, seconds = [], 0, 0.0
        while self._waiting and size < BYTES_AT_ONCE and link.has_room(self._waiting[0].count):
            place = self._waiting[0]
            if not place.future.done():
                try:
                    request = place.request(link)
                except DSMQError as error:
                    place.fail(error)
                else:
                    requests.append(request)
                    size += len(request)
                    seconds = place.seconds
                    link.expect(place)
            self._waiting.popleft()
        if requests:
            link.write(b"".join(requests), seconds)

    def _adopt(self, link: Link) -> None:
        self._link, self._error = link, None
        link.has_answered = False
        link.on_end, link.on_room = self._lost, self._pump

    def _lost(self, places: list[Place], error: Exception) -> None:
        """Take the places of a connection that has ended; the error may be the reply to the first."""
        achieved = self._link is not None and self._link.has_answered
        self._link = None
        if not wire.is_lost(error, connecting=False):
            if places:
                places.pop(0).fail(error)
            error = ConnectionResetError(wire.reason(error))
        self._error = error
        for place in places:
            place.lost(error, achieved=achieved)
        self._waiting = deque(dict.fromkeys([*places, *self._waiting]))
        if self._drop_done():
            try:
                self._retry(places, error)
            finally:
                self._revive()

    def _drop_done(self) -> bool:
        """Forget the calls that were cancelled or have failed; return whether others wait."""
        self._waiting = deque(place for place in self._waiting if not place.future.done())
        return bool(self._waiting)

    def _retry(self, places: Iterable[Place], error: Exception) -> None:
        """Note when calls are to be tried again; those whose time is over fail."""
        self._connector.announce("lost", error)
        pauses = [place.pause(error, self._connector.reconnect_timeout) for place in places if not place.future.done()]
        if None in pauses:
            self._connector.announce("given up", error)
        self._delay = min((pause for pause in pauses if pause is not None), default=0.0)

    @property
    def _is_reviving(self) -> bool:
        return self._reviving is not None and not self._reviving.done()

    def _revive(self) -> None:
        """See that the connection stands, or make another, and then send the calls that wait."""
        if not self._is_reviving:
            # A task of its own: the call that needs the connection may be cancelled, and others need it too.
            self._reviving = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            if self._link is not None:
                await self._link.look()
            while self._link is None and self._drop_done():
                await self._reconnect()
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise
        self._loop.call_soon(self._pump)

    async def _reconnect(self) -> None:
        if self._error is not None:
            self._connector.announce("lost", self._error)
            await asyncio.sleep(self._delay)
            self._delay = 0.0
        if not self._drop_done():
            return
        try:
            self._adopt(await self._connector.connect())
        except Exception as error:
            if not wire.is_lost(error, connecting=True):
                if self._connector.down and isinstance(error, ReplyError):
                    self._connector.announce("given up", error)
                raise
            self._error = error
            self._retry(self._waiting, error)

    async def await_end(self) -> None:
        """Wait until the server closes the connection."""
        if self._link is not None:
            seconds = self._connector.timeout
            try:
                async with asyncio.timeout(seconds):
                    await self._link.gone
            except TimeoutError:
                raise TimeoutError(f"the server has not closed the connection within {seconds:g} s") from None

    def close(self, error: BaseException) -> None:
        """Close the connection; the calls get this error. Idempotent."""
        if self._reviving is not None:
            self._reviving.cancel()
        link, self._link = self._link, None
        if link is not None:
            link.on_end = _fail
            link.fail(error)
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        places, self._waiting = list(self._waiting), deque()
        _fail(places, error)

    def abandon(self) -> None:
        """Close the descriptor alone: the event loop is closed, or that of the parent process."""
        if self._link is not None:
            self._link.sock.close()


def _fail(places: list[Place], error: BaseException) -> None:
    for place in places:
        # Each gets its own: `put_many` notes on it how many messages are stored.
        place.fail(copy(error) if isinstance(error, DSMQError) else error)


class Link(asyncio.Protocol):
    """One connection to the server: requests out, and replies in the same order."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.sock = sock
        # Batches are numbered when they are made, and other puts when they are sent; a producer's numbers only rise.
        self.producer = self.batch_producer = Producer(b"")
        self.due: deque[Place] = deque()
        """The places whose replies are due: one entry for each reply."""
        self.has_answered = False
        self.heard = b""
        """What was received first."""
        self.end: BaseException | None = None
        """What the connection has ended with."""
        self.on_end: Callable[[list[Place], Any], None] = _fail
        self.on_room: Callable[[], None] = _nothing
        self._loop = asyncio.get_running_loop()
        self.gone = self._loop.create_future()
        self._parser = ReplyParser()
        self._transport: asyncio.Transport
        self._is_full = False
        self._timeout = self._patience = timeout
        # When something was last received, or taken by the socket; and how much it had not taken yet.
        self._moved_at = self._loop.time()
        self._unsent = 0
        self._watch: asyncio.TimerHandle | None = None

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._moved_at = self._loop.time()
        self.heard = self.heard or data[:1000]
        due, parser = self.due, self._parser
        try:
            parser.feed(data)
            while (reply := parser.next()) is not None:
                value = wire.unless_last(reply[0])
                if not due:
                    raise ProtocolError(f"unexpected: {value!r}")
                # Removed behind it: whatever interrupts this, the reply is not lost.
                due[0].answer(value)
                due.popleft()
                self.has_answered = True
        except DSMQError as error:
            self.fail(error)
        except BaseException:
            # A reply may have gone to nobody: the next ones must not go to the wrong calls.
            self.fail(ConnectionResetError("interrupted"))
            raise
        self.on_room()

    def eof_received(self) -> None:
        self.fail(ConnectionResetError(ENDED))

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(exc or ConnectionResetError(ENDED))

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._moved_at = self._loop.time()
        self.on_room()

    # Called by a channel

    def ask(self, request: bytes) -> asyncio.Future[Reply]:
        """Send a request; return the future of its reply."""
        place = Place(Plain(request))
        self.expect(place)
        self.write(request)
        return place.future

    def expect(self, place: Place) -> None:
        """Note that a reply to each request of a place will come."""
        if not self.due:
            self._moved_at = self._loop.time()
        self.due.extend(repeat(place, place.count))

    def has_room(self, count: int) -> bool:
        """Whether so many requests may be sent now."""
        return not self._is_full and (not self.due or len(self.due) + count <= _MAX_UNANSWERED)

    def write(self, data: bytes, seconds: float = 0.0) -> None:
        """Send requests whose replies are due; the server may wait so long before it replies."""
        self._patience = seconds + self._timeout
        self._transport.write(data)
        if len(data) > _LONG_BYTES:
            self._unsent = self._count_unsent()
        if self._watch is None or self._watch.when() > self._moved_at + self._patience:
            self._watch_until(self._moved_at + self._patience)

    def _watch_until(self, when: float) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._loop.call_at(when, self._check_progress)

    def _check_progress(self) -> None:
        """End the connection if replies are due, and for too long nothing has moved in either direction."""
        self._watch = None
        if not self.due or self.end is not None:
            return
        unsent = self._count_unsent()
        if unsent < self._unsent:
            self._moved_at = self._loop.time()
        self._unsent = unsent
        if self._loop.time() < self._moved_at + self._patience:
            self._watch_until(self._moved_at + self._patience)
        else:
            self.fail(TimeoutError(f"no reply within {self._patience:g} s"))

    def _count_unsent(self) -> int:
        """Return how many bytes the server has not taken, as far as the system tells."""
        return self._transport.get_write_buffer_size() + unsent_bytes(self.sock)

    @property
    def is_stale(self) -> bool:
        """Whether it has not been used lately: it may have ended, and the event loop not have noticed yet."""
        return not self.due and self._loop.time() - self._moved_at > LONG_PAUSE_SECONDS

    async def look(self) -> None:
        """Let the event loop notice what has come: the first round looks, the next reads, the third reports errors."""
        for _ in range(3):
            await asyncio.sleep(0)

    def fail(self, error: BaseException) -> None:
        """End the connection at once. Idempotent."""
        if self.end is not None:
            return
        self.end = error
        # At once, also when the event loop does not run now.
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._transport.abort()
        if self._watch is not None:
            self._watch.cancel()
        if not self.gone.done():
            self.gone.set_result(None)
        places = list(dict.fromkeys(self.due))
        self.due.clear()
        self.on_end(places, error)


def _nothing() -> None:
    """Do nothing."""


async def _open(target: Target, timeout: float) -> Link:
    sock = await _dial(target)
    # asyncio fetches memory for 256 KiB each time it receives something.
    expect_long_messages()
    options: dict[str, Any] = {"ssl": target.tls, "server_hostname": target.name} if target.tls else {}
    try:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(partial(Link, sock, timeout), sock=sock, **options))[1]
    except BaseException:
        sock.close()
        raise


async def _dial(target: Target) -> socket.socket:
    """Connect to the first address that answers; the next one is tried when one fails, or is slow (RFC 8305)."""
    left = await _addresses(target)
    attempts: dict[asyncio.Task[socket.socket], Address] = {}
    errors: list[tuple[Address, OSError]] = []
    try:
        while left or attempts:
            if left:
                address = left.pop(0)
                attempts[asyncio.create_task(_connected(address))] = address
            patience = STAGGER_SECONDS if left else REST_SECONDS if _is_refused(errors) else None
            done, _ = await asyncio.wait(attempts, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done and not left:
                break
            for attempt in done:
                address = attempts.pop(attempt)
                try:
                    return attempt.result()
                except OSError as error:
                    errors.append((address, error))
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_socket)
    raise failure(target, [*errors, *((address, TimeoutError()) for address in attempts.values())])


def _is_refused(errors: list[tuple[Address, OSError]]) -> bool:
    return any(isinstance(error, ConnectionRefusedError) for _, error in errors)


def _close_socket(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and not attempt.exception():
        attempt.result().close()


async def _connected(address: Address) -> socket.socket:
    sock = socket.socket(*address[:3])
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address[3])
    except BaseException:
        sock.close()
        raise
    return sock


async def _addresses(target: Target) -> list[Address]:
    if target.is_unix:
        return [unix_address(target)]
    try:
        socket.getaddrinfo(target.name, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return await asyncio.get_running_loop().run_in_executor(None, addresses, target)
    return addresses(target)
