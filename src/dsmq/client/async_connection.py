"""One connection of the asyncio client: requests of many tasks out, in the order of calls, and replies in."""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
from bisect import insort
from collections import deque
from contextlib import suppress
from copy import copy
from functools import partial
from operator import attrgetter
from typing import Any, cast

from dsmq.client.connection import CLOSED_BY_SERVER, LONG_PAUSE_SECONDS
from dsmq.client.core import Core
from dsmq.client.dial import Race, addresses, certified_name, explain_failure, explain_greeting
from dsmq.client.replies import is_lost, raise_if_fatal, reason
from dsmq.client.requests import BYTES_AT_ONCE, PUTS_AT_ONCE, Call, Producer, PutMany
from dsmq.errors import DSMQError, ProtocolError, ReplyError
from dsmq.system import raise_malloc_threshold, unsent_bytes
from dsmq.wire.addresses import Endpoint
from dsmq.wire.resp import Reply, ReplyParser

# How many requests may be unanswered on a connection: as many puts as a server surely remembers of one producer.
_MAX_UNANSWERED = 2 * PUTS_AT_ONCE
# Sending more than this may take longer than a reply may.
_LONG_BYTES = 16_384
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.001, 0.02

next_ticket = itertools.count(1).__next__


class Place:
    """A call's place in the order of calls. Once sent, a cancelled call keeps it: its reply is dropped."""

    __slots__ = ("_left", "_requests", "call", "count", "future", "is_sent")

    def __init__(self, call: Call, count: int = 1, requests: bytes = b"") -> None:
        self.call = call
        self.count = self._left = count
        """How many requests it is, and thus replies."""
        self._requests = requests
        self.is_sent = False
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def ticket(self) -> int:
        return self.call.ticket

    def request(self, producer: Producer) -> bytes:
        return self._requests or self.call.request(producer)

    def answer(self, reply: Reply) -> None:
        if isinstance(self.call, PutMany):
            try:
                self.call.take_reply(reply)
            except DSMQError as error:
                self.fail(error)
        self._left -= 1
        if not self._left and not self.future.done():
            self.future.set_result(reply)

    def fail(self, error: BaseException) -> None:
        if self.future.done():
            return
        if isinstance(error, asyncio.CancelledError):
            self.future.cancel()
        else:
            self.future.set_exception(error)


class Connection(asyncio.Protocol):
    """One connection to the server."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.sock = sock
        # Batches are numbered when they are made, and other puts when they are sent; a producer's numbers only rise.
        self.producer = self.batch_producer = Producer(b"")
        self.received = b""
        """What was received first."""
        self.error: BaseException | None = None
        """Why the connection has ended."""
        self.has_answered = False
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._parser = ReplyParser()
        self._transport: asyncio.Transport
        # Those whose replies are due, one entry for each reply; and those to be sent, in the order of calls.
        self._due: deque[Place] = deque()
        self._queue: deque[Place] = deque()
        self._is_held = self._is_scheduled = self._is_full = False
        # How long the reply may take, and any without waiting, from the last progress: something was received, or
        # taken by the server.
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
        due, parser = self._due, self._parser
        try:
            parser.feed(data)
            while (reply := parser.next()) is not None:
                value = raise_if_fatal(reply[0])
                if not due:
                    raise ProtocolError(f"unexpected: {value!r}")
                # Removed afterwards: if this is interrupted, the reply is not lost.
                due[0].answer(value)
                due.popleft()
                self.has_answered = True
        except DSMQError as error:
            self.fail(error)
        except BaseException:
            # A reply may have been lost: the next ones must not go to the wrong calls.
            self.fail(ConnectionResetError("interrupted"))
            raise
        self._send_queue()

    def eof_received(self) -> None:
        self.fail(ConnectionResetError(CLOSED_BY_SERVER))

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(exc or ConnectionResetError(CLOSED_BY_SERVER))

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._progress_at = self._loop.time()
        self._send_queue()

    # Called by the client

    def ask(self, call: Call) -> asyncio.Future[Reply]:
        """Make a call that is one request; return the future of its reply."""
        return self._add(Place(call))

    async def ask_all(self, puts: PutMany) -> None:
        """Send puts in batches, behind the calls made before, and take in the replies."""
        for count, requests in puts.batches(self.batch_producer):
            if not count:
                await self.probe()
                continue
            # Made here, and not when there is room to send it, because the messages may come from a generator.
            place = Place(puts, count, requests)
            puts.ticket = puts.ticket or next_ticket()
            try:
                await self._add(place)
            finally:
                puts.is_sent = place.is_sent
            # The next batch comes after the calls made meanwhile.
            puts.ticket = 0

    def _add(self, place: Place) -> asyncio.Future[Any]:
        if self.error is not None:
            place.fail(ConnectionResetError(reason(self.error)))
        elif not self._queue or self._queue[-1].ticket <= place.ticket:
            self._queue.append(place)
        else:
            # Made before others, on a connection that broke.
            insort(self._queue, place, key=attrgetter("ticket"))
        if not self._due and not self._is_scheduled:
            self._send_queue()
        else:
            # Calls that are made in the same round of the event loop are sent together.
            self._schedule()
        return place.future

    def hold(self, is_held: bool) -> None:  # noqa: FBT001 - says itself what it means
        """Send nothing as long as calls that were made before others have not been queued again."""
        self._is_held = is_held
        self._schedule()

    def _schedule(self) -> None:
        if self._queue and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._send_scheduled)

    def _send_scheduled(self) -> None:
        self._is_scheduled = False
        self._send_queue()

    def _send_queue(self) -> None:
        """Send the calls in the queue, as far as there is room."""
        try:
            while self._queue and self._has_room():
                self._send_batch()
        except OSError as error:
            # Another connection has found that the server was restarted.
            self.fail(error)
        except BaseException:
            self.fail(ConnectionResetError("interrupted"))
            raise

    def _has_room(self) -> bool:
        is_free = not self._due or len(self._due) + self._queue[0].count <= _MAX_UNANSWERED
        return is_free and not (self._is_full or self._is_held)

    def _send_batch(self) -> None:
        requests, size, seconds = [], 0, 0.0
        while self._queue and size < BYTES_AT_ONCE and self._has_room():
            place = self._queue[0]
            if not place.future.done():
                try:
                    request = place.request(self.producer)
                except DSMQError as error:
                    place.fail(error)
                else:
                    requests.append(request)
                    size += len(request)
                    seconds = place.call.seconds
                    if not self._due:
                        self._progress_at = self._loop.time()
                    place.is_sent = True
                    self._due.extend(itertools.repeat(place, place.count))
            self._queue.popleft()
        if requests:
            self._write(b"".join(requests), seconds)

    def _write(self, data: bytes, seconds: float) -> None:
        """Send requests; the server may wait for `seconds` before it replies."""
        self._timeout = seconds + self._base_timeout
        self._transport.write(data)
        if len(data) > _LONG_BYTES:
            self._unsent = self._count_unsent()
        if self._watch is None or self._watch.when() > self._progress_at + self._timeout:
            self._watch_progress()

    def _watch_progress(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._loop.call_at(self._progress_at + self._timeout, self._check_progress)

    def _check_progress(self) -> None:
        """End the connection if replies are due, and there was no progress for too long."""
        self._watch = None
        if not self._due or self.error is not None:
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
        """Return how many bytes the server has not received, as far as the system knows."""
        return self._transport.get_write_buffer_size() + unsent_bytes(self.sock)

    @property
    def is_stale(self) -> bool:
        """Whether it was not used for a while: it may have ended, and the event loop not have noticed yet."""
        return not self._due and self._loop.time() - self._progress_at > LONG_PAUSE_SECONDS

    async def probe(self) -> None:
        """Raise ConnectionResetError if the connection has ended."""
        # The first round of the event loop selects, the next one reads, the third reports errors.
        for _ in range(3):
            await asyncio.sleep(0)
        if self.error is not None:
            raise ConnectionResetError(reason(self.error))

    async def await_end(self) -> None:
        """Wait until the server closes the connection."""
        try:
            async with asyncio.timeout(self._base_timeout):
                await self._ended
        except TimeoutError:
            raise TimeoutError(f"the server has not closed the connection within {self._base_timeout:g} s") from None

    def fail(self, error: BaseException) -> None:
        """End the connection at once. Idempotent."""
        if self.error is not None:
            return
        self.error = error
        # At once, even if the event loop does not run now.
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._transport.abort()
        if self._watch is not None:
            self._watch.cancel()
        if not self._ended.done():
            self._ended.set_result(None)
        places = [*dict.fromkeys(self._due), *self._queue]
        # The error may be the reply to the first.
        is_reply = isinstance(error, ReplyError) and not is_lost(error, connecting=False)
        lost = ConnectionResetError(reason(error)) if is_reply else error
        self._due.clear()
        self._queue.clear()
        for place in places:
            # Each gets its own: `put_many` notes in it how many messages are stored.
            place.fail(copy(error) if isinstance(error, DSMQError) else error)
            error = lost


async def connect(core: Core) -> Connection:
    """Return a new connection. Raises OSError, or what the server answers, if there is none."""
    try:
        async with asyncio.timeout(core.timeout):
            connection = await _open(core)
            try:
                state, era = core.session.handle_hello(await connection.ask(Call(core.session.hello)))
            except BaseException as error:
                connection.fail(error)
                if isinstance(error, ReplyError | OSError):
                    raise explain_greeting(core.endpoint, connection.received, error) from None
                raise
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"{core.endpoint}: no answer within {core.timeout:g} s") from None
    connection.producer, connection.batch_producer = Producer(era.run, era), Producer(era.run, era)
    connection.has_answered = False
    core.announce(state)
    return connection


async def _open(core: Core) -> Connection:
    endpoint = core.endpoint
    with Race(endpoint, await _addresses(endpoint)) as race:
        for seconds in race.run(math.inf):
            await _select(race, seconds)
    # asyncio allocates 256 KiB each time it receives something.
    raise_malloc_threshold()
    options: dict[str, Any] = {"ssl": core.tls, "server_hostname": certified_name(endpoint)} if core.tls else {}
    try:
        make = partial(Connection, race.winner, core.timeout)
        return (await asyncio.get_running_loop().create_connection(make, sock=race.winner, **options))[1]
    except OSError as error:
        race.winner.close()
        raise explain_failure(endpoint, error) from None
    except BaseException:
        race.winner.close()
        raise


async def _select(race: Race, seconds: float) -> None:
    """Wait for a connection attempt. By polling, because not every event loop can wait for a socket to connect."""
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + seconds, _FIRST_POLL_SECONDS
    while not race.selector.select(0) and loop.time() < until:
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL_SECONDS)


async def _addresses(endpoint: Endpoint) -> list[tuple[int, int, int, Any]]:
    try:
        if endpoint.host:
            socket.getaddrinfo(endpoint.host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return await asyncio.get_running_loop().run_in_executor(None, addresses, endpoint)
    return addresses(endpoint)
