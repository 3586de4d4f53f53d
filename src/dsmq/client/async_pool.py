"""The connections of the asyncio client: one for all calls, and one for each read that waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from copy import copy
from typing import TypeVar

from dsmq.client.async_connection import Connection, connect, next_ticket
from dsmq.client.core import IDLE_SECONDS, Core, Retries
from dsmq.client.requests import Call
from dsmq.errors import ClientClosed, DSMQError
from dsmq.system import process
from dsmq.wire.resp import Reply

C = TypeVar("C", bound=Call)
T = TypeVar("T")


class Channel:
    """A connection that is replaced when it breaks.

    Calls that were sent and have no reply then are sent again, in the order in which they were made, before any others.
    """

    def __init__(self, core: Core) -> None:
        self.idle_since = 0.0
        self._core = core
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        # How many calls wait for it, and how long it waits before it connects.
        self._waiting = 0
        self._delay = 0.0

    async def run(self, call: C, attempt: Callable[[Connection, C], Awaitable[T]]) -> T:
        """Make a call on the connection, and as long as connections break on the next."""
        call.ticket = next_ticket()
        retries = None
        while True:
            connection = None
            try:
                connection = await self.connected()
                return await attempt(connection, call)
            except BaseException as error:
                retries = retries or Retries(self._core.reconnect_timeout)
                connected = connection is not None
                progress = connection is not None and connection.has_answered
                delay = self._core.retry_delay(call, error, retries, connected=connected, progress=progress)
                if delay is None:
                    raise
                self._delay = delay

    async def connected(self) -> Connection:
        """Return the connection, when it stands. Raises what hinders it."""
        connection = self._connection
        if self._connecting is None:
            if connection is not None and connection.error is None and not connection.is_stale:
                return connection
            # A task of its own: the call that needs the connection may be cancelled, and others need it too.
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(_retrieve_error)
        connecting = self._connecting
        self._waiting += 1
        try:
            return await asyncio.shield(connecting)
        except DSMQError as error:
            # Each call gets its own: `put_many` notes in it how many messages are stored.
            raise copy(error) from None
        except asyncio.CancelledError:
            if connecting.cancelled():
                self._core.raise_if_closed()
            raise
        finally:
            self._waiting -= 1
            if self._connection is not None:
                self._connection.hold(self._waiting > 0)

    async def _connect(self) -> Connection:
        """Check that the connection is still open, or make another."""
        try:
            connection = self._connection
            if connection is not None:
                with suppress(ConnectionResetError):
                    await connection.probe()
                    return connection
                self._core.announce("lost", connection.error)
                self._connection = None
            await asyncio.sleep(self._delay)
            self._delay = 0.0
            self._connection = await connect(self._core)
            self._connection.hold(self._waiting > 0)
            return self._connection
        finally:
            self._connecting = None

    def close(self, error: BaseException) -> None:
        """Close the connection; the calls raise this error. Idempotent."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.fail(error)

    def abandon(self) -> None:
        """Close the descriptor alone: the event loop is closed, or that of the parent process."""
        if self._connection is not None:
            self._connection.sock.close()


def _retrieve_error(task: asyncio.Task[Connection]) -> None:
    """Keep asyncio from logging the error of a task that no call waits for any more."""
    if not task.cancelled():
        task.exception()


class Pool:
    """The connections of a client that belong to one event loop, in one process."""

    def __init__(self, core: Core) -> None:
        self.loop = asyncio.get_running_loop()
        self.process = process()
        self._core = core
        self._channels: set[Channel] = set()
        # Those that were used to wait; the one used last stands last.
        self._idle: deque[Channel] = deque()
        self._sweeper: asyncio.TimerHandle | None = None
        self.shared = self._add_channel()
        """The connection for all calls that do not wait."""
        self._guard = _close_at_end(self._channels)
        with suppress(StopIteration):
            self._guard.__anext__().send(None)

    @property
    def is_in_use(self) -> bool:
        """Whether its event loop is running, in another thread."""
        return self.process is process() and self.loop.is_running()

    async def wait(self, call: Call) -> Reply:
        """Make a call that waits on a connection of its own: calls behind it would wait too."""
        channel = self._idle.pop() if self._idle else self._add_channel()
        try:
            reply = await channel.run(call, Connection.ask)
        except BaseException as error:
            # The server may still be waiting there.
            self._remove_channel(channel, error)
            raise
        channel.idle_since = self.loop.time()
        self._idle.append(channel)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(IDLE_SECONDS, self._sweep)
        return reply

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
    """Close connections when `asyncio.run` ends the asynchronous generators of its loop, or when the pool is gone."""
    try:
        yield
    finally:
        for channel in channels:
            channel.close(ClientClosed("the event loop has ended"))
