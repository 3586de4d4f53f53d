"""The connections of the asyncio client: one for all calls and one for each waiting read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress

from dsmq.client.async_connection import Connection, Place, connect
from dsmq.client.core import IDLE_SECONDS, Core, Retries
from dsmq.client.requests import Call, Retryable
from dsmq.client.session import State
from dsmq.errors import ClientClosed, ConnectionLost, DSMQError
from dsmq.system import process

# Queued calls are sent in groups of this size, which is enough to make up for the cost of a send.
_CALLS_AT_ONCE = 16


class Channel(Retryable):
    """A connection that is replaced when it breaks, and the calls to make on it, in order.

    When it breaks, the unanswered calls are sent again first.
    """

    def __init__(self, core: Core) -> None:
        self.idle_since = 0.0
        self._core = core
        self._retries = Retries(core.reconnect_timeout)
        self._queue: deque[Place] = deque()
        self._connection: Connection | None = None
        # The task that checks or replaces the connection, if it is running.
        self._connecting: asyncio.Task[None] | None = None
        self._is_scheduled = False
        # Whether the connection had no calls when it ended.
        self._was_idle = False

    def ask(self, call: Call) -> asyncio.Future[None]:
        """Make a call after all earlier ones; return a future that completes when the reply arrives."""
        place = Place(call)
        self._queue.append(place)
        connection = self._connection
        if connection is None or connection.error is not None or connection.is_stale:
            self._connect_soon()
        elif (connection.due or self._is_scheduled) and len(self._queue) % _CALLS_AT_ONCE:
            # Calls made in the same iteration of the event loop are sent together. If there are many, the server starts
            # on the first ones while others are still being made.
            self._schedule()
        else:
            self._send()
        return place.future

    async def ask_once(self, call: Call) -> None:
        """Make a call. If there is no connection, try only once to connect, unless other calls are trying already."""
        await self.settle()
        # Nothing would close a connection that is made after the others were closed.
        self._core.raise_if_closed()
        if not self._is_connected:
            if self._connecting is None:
                self._connecting = asyncio.create_task(self._connect_once())
                self._connecting.add_done_callback(retrieve_error)
            await asyncio.wait([self._connecting])
            if not self._is_connected:
                raise ConnectionResetError("there is no connection")
        await self.ask(call)

    @property
    def _is_connected(self) -> bool:
        return self._connection is not None and self._connection.error is None

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._send_scheduled)

    def _send_scheduled(self) -> None:
        self._is_scheduled = False
        self._send()

    def _send(self) -> None:
        connection = self._connection
        if connection is None or self._connecting is not None:
            return
        try:
            while self._queue and connection.error is None and connection.has_room(self._queue[0].call):
                connection.send(self._queue)
        except OSError as error:
            # The call failed because another connection has found that the server was restarted.
            connection.due.append(self._queue[0])
            connection.fail(error)
        except BaseException:
            connection.fail(ConnectionResetError("interrupted"))
            raise

    async def connect(self) -> None:
        """Make a connection. Raises OSError or the server's error."""
        self._use(*await connect(self._core))

    def _use(self, connection: Connection, state: State) -> None:
        connection.on_room, connection.on_lost = self._send, self._on_lost
        self._connection = connection
        self._core.announce(state)

    def _on_lost(self, connection: Connection) -> None:
        """Queue the unanswered calls again."""
        self._was_idle = all(place.future.done() for place in connection.due)
        if not self._was_idle:
            self._core.move_on(connection.endpoint)
        if connection.has_answered or self._was_idle:
            self._retries.reset()
        # If sending was interrupted, a call may be in both queues.
        self._queue = deque(dict.fromkeys([*connection.due, *self._queue]))
        connection.due.clear()
        if self._has_calls():
            self._connect_soon()

    def _has_calls(self) -> bool:
        """Return whether any caller is waiting."""
        return any(not place.future.done() for place in self._queue)

    def _connect_soon(self) -> None:
        if self._connecting is None:
            # Use a separate task, because the call that needs the connection may be cancelled while others need it,
            # too.
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._on_connecting_done)

    def _on_connecting_done(self, task: asyncio.Task[None]) -> None:
        retrieve_error(task)
        if self._connecting is task:
            # It was cancelled before it began.
            self._connecting = None
            self._fail_calls(asyncio.CancelledError())

    async def _connect(self) -> None:
        """Check that the connection is still open, or make another; then send the queued calls."""
        failure: Exception | None = None
        try:
            await self.settle()
            if self._connection and self._connection.error is not None and self._was_idle:
                # No call has failed, so this does not count as another attempt.
                self._core.announce("lost", self._connection.error)
                self._connection = None
            while self._has_calls() and not self._is_connected:
                error = failure or (self._connection.error if self._connection else None)
                if error is not None:
                    delay = self._core.retry_delay(self, error, self._retries, connected=failure is None)
                    if delay is None:
                        raise error
                    await asyncio.sleep(delay)
                failure = await self._try_to_connect()
        except BaseException as error:
            # The next call connects again.
            self._was_idle = True
            self._fail_calls(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._connecting = None
        self._send()

    async def _connect_once(self) -> None:
        try:
            await self.connect()
        finally:
            self._connecting = None
            if self._has_calls():
                # They were made in the meantime.
                self._connect_soon()

    async def _try_to_connect(self) -> Exception | None:
        try:
            connection, state = await connect(self._core)
        except Exception as error:  # noqa: BLE001 - for `retry_delay`
            return error
        self._use(connection, state)
        return None

    async def settle(self) -> None:
        """Let the event loop notice if the connection has ended."""
        # The loop's first iteration selects, the second reads, and the third reports errors.
        for _ in range(3):
            await asyncio.sleep(0)

    def on_connection_lost(self, error: Exception) -> bool:
        progress = False
        for place in self._queue:
            if not place.future.done():
                try:
                    progress |= place.call.on_connection_lost(error)
                except DSMQError as lost:
                    place.fail(lost)
        return progress

    def to_error(self, error: Exception) -> ConnectionLost:
        """Fail each call with its own error."""
        for place in self._queue:
            place.fail(place.call.to_error(error))
        self._retries.reset()
        return super().to_error(error)

    def _fail_calls(self, error: BaseException) -> None:
        places, self._queue = self._queue, deque()
        for place in places:
            place.fail(error)

    async def await_end(self) -> None:
        """Wait until the server closes the connection."""
        if self._connection is not None:
            await self._connection.await_end()

    def close(self, error: BaseException) -> None:
        """Close the connection; the calls raise this error. Idempotent."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._queue.extendleft(reversed(self._connection.due))
            self._connection.due.clear()
            self._fail_calls(error)
            self._connection.fail(ConnectionResetError("the client has closed it"))
        self._fail_calls(error)

    def abandon(self) -> None:
        """Close only the file descriptor, because the event loop is closed or belongs to the parent process."""
        if self._connection is not None:
            self._connection.sock.close()


def retrieve_error(future: asyncio.Future[None]) -> None:
    """Keep asyncio from logging the error of a future that is no longer awaited."""
    if not future.cancelled():
        future.exception()


class Pool:
    """The connections of a client that belong to one event loop, in one process."""

    def __init__(self, core: Core) -> None:
        self.loop = asyncio.get_running_loop()
        self.process = process()
        self._core = core
        self._channels: set[Channel] = set()
        # Connections for reads that wait, the last used at the end.
        self._idle: deque[Channel] = deque()
        self._sweeper: asyncio.TimerHandle | None = None
        self.shared = self._add_channel()
        """The connection for all calls that do not wait."""
        self._guard = _close_at_end(self._channels)
        with suppress(StopIteration):
            self._guard.__anext__().send(None)

    @property
    def is_in_use(self) -> bool:
        """Whether its event loop is running."""
        return self.process is process() and self.loop.is_running()

    async def wait(self, call: Call) -> None:
        """Make a waiting call on a separate connection, because later calls on the same one would wait, too."""
        channel = self._idle.pop() if self._idle else self._add_channel()
        try:
            await channel.ask(call)
        except BaseException as error:
            # On this connection, the server may still be waiting.
            self._remove_channel(channel, error)
            raise
        channel.idle_since = self.loop.time()
        self._idle.append(channel)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(IDLE_SECONDS, self._sweep)

    def _add_channel(self) -> Channel:
        channel = Channel(self._core)
        self._channels.add(channel)
        return channel

    def _remove_channel(self, channel: Channel, error: BaseException) -> None:
        self._channels.discard(channel)
        if self.process is not process() or self.loop.is_closed():
            channel.abandon()
        else:
            channel.close(error)

    def _sweep(self) -> None:
        """Close the connections that have been idle for too long."""
        since = self.loop.time() - IDLE_SECONDS
        while self._idle and self._idle[0].idle_since <= since:
            self._remove_channel(self._idle.popleft(), ClientClosed("idle"))
        left = self._idle[0].idle_since - since if self._idle else 0.0
        self._sweeper = self.loop.call_later(left, self._sweep) if left else None

    def close(self, error: Exception) -> None:
        """Close all connections; calls in progress raise this error. Idempotent."""
        if self.is_in_use and self.loop is not asyncio.get_running_loop():
            self.loop.call_soon_threadsafe(self.close, error)
        else:
            for channel in list(self._channels):
                self._remove_channel(channel, error)


async def _close_at_end(channels: set[Channel]) -> AsyncGenerator[None, None]:
    """Close connections when `asyncio.run` closes the async generators of its loop, or when the pool is deleted."""
    try:
        yield
    finally:
        for channel in channels:
            channel.close(ClientClosed("the event loop has ended"))
