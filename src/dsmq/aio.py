"""The client for asyncio: the verbs of `dsmq.client`, to be awaited.

    from dsmq.aio import connect

    async with await connect() as mq:
        await mq.put("greetings", "hello")
        async for message in mq.messages("greetings"):
            ...

One connection carries the calls of all tasks, pipelined in the order in which they were made. A call that is cancelled
keeps its place there: its reply is read and dropped. A read that waits has a connection of its own.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Generic, Literal, Self, TypeVar, Unpack, overload

from dsmq import client as blocking
from dsmq.client import arguments
from dsmq.client import session as wire
from dsmq.client.async_connection import Connection
from dsmq.client.async_pool import Pool
from dsmq.client.core import Client, Options
from dsmq.client.reader import Claim
from dsmq.client.replies import check, stored_id
from dsmq.client.requests import Call, Convert, NonIdempotent, Put, PutMany, list_topics, take
from dsmq.client.session import Message
from dsmq.errors import ClientClosed
from dsmq.system import process

__all__ = ["AsyncClient", "Message", "connect"]

C = TypeVar("C", bound=Call)
D = TypeVar("D")
T = TypeVar("T")


async def connect(
    host: str = "127.0.0.1", port: int = 30008, *, retry: bool = True, **options: Unpack[Options]
) -> AsyncClient:
    """Connect to a server; see `dsmq.client.connect`."""
    mq = AsyncClient(host, port, options)
    await mq._connect_at_start(retry=retry)  # noqa: SLF001 - one module
    return mq


class AsyncClient(Client):
    """A client for the tasks of one event loop. Made by `connect`; the methods are those of the blocking client."""

    def __init__(self, host: str, port: int, options: Options) -> None:
        super().__init__(host, port, options)
        self._lock = threading.Lock()
        self._pool: Pool | None = None

    async def put(self, topic: str, msg: str | bytes) -> int:
        """Put a message; when this returns it is stored. Returns its id."""
        return stored_id(await self._run(Put(self._session, topic, msg), Connection.ask))

    async def put_many(self, topic: str, messages: Iterable[str | bytes]) -> list[int]:
        """Put several messages in order; returns their ids. Errors say how many are stored, as in the other client."""
        with PutMany(self._session, topic, messages) as puts:
            await self._run(puts, Connection.ask_all)
            puts.raise_if_failed()
        return puts.ids

    @overload
    async def get(self, topic: str, *, default: str = "", raw: Literal[False] = False) -> str: ...
    @overload
    async def get(self, topic: str, *, default: D, raw: Literal[False] = False) -> str | D: ...
    @overload
    async def get(self, topic: str, *, raw: Literal[True]) -> bytes: ...
    @overload
    async def get(self, topic: str, *, default: D, raw: Literal[True]) -> bytes | D: ...
    async def get(self, topic: str, *, default: object = "", raw: bool = False) -> object:
        """Return the oldest message that this client has not read, or `default`."""
        return await self._one(topic, 0.0, default, raw=raw)

    @overload
    async def get_wait(
        self, topic: str, *, default: str = "", timeout: float | None = None, raw: Literal[False] = False
    ) -> str: ...
    @overload
    async def get_wait(
        self, topic: str, *, default: D, timeout: float | None = None, raw: Literal[False] = False
    ) -> str | D: ...
    @overload
    async def get_wait(self, topic: str, *, timeout: float | None = None, raw: Literal[True]) -> bytes: ...
    @overload
    async def get_wait(
        self, topic: str, *, default: D, timeout: float | None = None, raw: Literal[True]
    ) -> bytes | D: ...
    async def get_wait(
        self, topic: str, *, default: object = "", timeout: float | None = None, raw: bool = False
    ) -> object:
        """Like `get`, but wait for a message for so many seconds; without a timeout, about ten."""
        seconds = blocking.default_wait() if timeout is None else arguments.seconds("timeout", timeout)
        return await self._one(topic, seconds, default, raw=raw)

    @overload
    async def get_latest(self, topic: str, *, default: str = "", raw: Literal[False] = False) -> str: ...
    @overload
    async def get_latest(self, topic: str, *, default: D, raw: Literal[False] = False) -> str | D: ...
    @overload
    async def get_latest(self, topic: str, *, raw: Literal[True]) -> bytes: ...
    @overload
    async def get_latest(self, topic: str, *, default: D, raw: Literal[True]) -> bytes | D: ...
    async def get_latest(self, topic: str, *, default: object = "", raw: bool = False) -> object:
        """Return the newest message that this client has not read, or `default`; pass over the older ones."""
        return await self._one(topic, 0.0, default, raw=raw, latest=True)

    @overload
    async def get_many(
        self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[False] = False
    ) -> list[str]: ...
    @overload
    async def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[True]) -> list[bytes]: ...
    async def get_many(
        self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: bool = False
    ) -> list[str] | list[bytes]:
        """Return up to `n` messages, oldest first: those that are there, or else wait for one."""
        if raw:
            return await self._many(topic, n, timeout, wire.body)
        return await self._many(topic, n, timeout, wire.text)

    async def read(self, topic: str, n: int = 1, *, timeout: float = 0.0, latest: bool = False) -> list[Message]:
        """Return up to `n` messages with their ids, numbers and put times; latest=True returns the newest only."""
        return await self._many(topic, n, timeout, self._session.message, latest=latest)

    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[False] = False) -> AsyncIterator[str]: ...
    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[True]) -> AsyncIterator[bytes]: ...
    def messages(
        self, topic: str, *, timeout: float = math.inf, raw: bool = False
    ) -> AsyncIterator[str] | AsyncIterator[bytes]:
        """Iterate over the messages of a topic as they come; end when none has come for `timeout` seconds."""
        seconds = arguments.seconds("timeout", timeout)
        self._session.reader(topic)
        if raw:
            return _Messages(self, topic, seconds, wire.body)
        return _Messages(self, topic, seconds, wire.text)

    async def ping(self) -> None:
        """Check that the server answers."""
        check(await self._run(Call(wire.PING), Connection.ask))

    async def topics(self) -> list[tuple[str, int, int]]:
        """Return the topics that hold messages: name, number of messages, and bytes."""
        found: list[tuple[str, int, int]] = []
        for call in list_topics(found):
            call.reply = await self._run(call, Connection.ask)
        return found

    async def shutdown_server(self) -> None:
        """Stop the server gracefully; return when it has closed the connection."""
        await self._run(NonIdempotent(wire.SHUTDOWN), _shut_down)

    async def close(self) -> None:
        """Close the client. Calls of other tasks raise ClientClosed. Idempotent."""
        self._core.is_closed = True
        if self._pool is not None:
            self._pool.close(ClientClosed("the client was closed during the call"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _one(self, topic: str, seconds: float, default: object, *, raw: bool, latest: bool = False) -> object:
        claim: Claim = []
        try:
            taken = await self._take(claim, topic, 1, seconds, wire.body if raw else wire.text, latest=latest)
            if taken:
                return taken[0]
            return b"" if raw and default == "" else default
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    async def _many(self, topic: str, n: int, timeout: float, convert: Convert[T], *, latest: bool = False) -> list[T]:
        claim: Claim = []
        try:
            n, seconds = arguments.count("n", n), arguments.seconds("timeout", timeout)
            return await self._take(claim, topic, n, seconds, convert, latest=latest)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    async def _take(  # noqa: PLR0913 - what a read consists of
        self, claim: Claim, topic: str, n: int, seconds: float, convert: Convert[T], *, latest: bool = False
    ) -> list[T]:
        taken, reading = take(self._session, claim, topic, n, seconds, convert, latest=latest)
        for call in reading:
            call.reply = await (self._here().wait(call) if call.waits else self._run(call, Connection.ask))
        return taken

    # Connections

    def _run(self, call: C, attempt: Callable[[Connection, C], Awaitable[T]]) -> Awaitable[T]:
        return self._here().shared.run(call, attempt)

    def _here(self) -> Pool:
        """Return the connections of this event loop, in this process."""
        self._core.raise_if_closed("the client is closed")
        pool = self._pool
        if pool is None or pool.loop is not asyncio.get_running_loop() or pool.process is not process():
            return self._enter()
        return pool

    def _enter(self) -> Pool:
        """Go on in another event loop, or in a child process, with connections of its own."""
        if self._pool and self._pool.process is not process():
            if self._pool.loop is asyncio.get_running_loop():
                raise RuntimeError("this event loop is the parent process's: a child process has to run one of its own")
            # Another thread that had the lock does not exist in a child process.
            self._lock = threading.Lock()
        with self._lock:
            if self._pool and self._pool.is_in_use:
                raise RuntimeError("the client is in use in another event loop: connect in each of them")
            if self._pool:
                self._pool.close(RuntimeError("the client has gone on in another event loop"))
            self._pool = Pool(self._core)
            return self._pool

    async def _connect_at_start(self, *, retry: bool) -> None:
        began, delays = time.monotonic(), iter(blocking.retry_delays())
        while True:
            try:
                await self._here().shared.connected()
            except blocking.NOT_STARTED as error:
                if not retry:
                    raise
                await asyncio.sleep(blocking.next_delay(error, began, delays))
            else:
                return


async def _shut_down(connection: Connection, call: NonIdempotent) -> None:
    check(await connection.ask(call))
    await connection.await_end()


class _Messages(Generic[T]):
    """Iterates over the messages of a topic. Not a generator, which a cancelled `anext` would end."""

    def __init__(self, client: AsyncClient, topic: str, seconds: float, convert: Convert[T]) -> None:
        self._client, self._topic, self._seconds, self._convert = client, topic, seconds, convert
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        claim: Claim = []
        try:
            taken = (
                []
                if self._is_over
                else await self._client._take(  # noqa: SLF001 - one module
                    claim, self._topic, 1, self._seconds, self._convert
                )
            )
            self._is_over = not taken
            if taken:
                return taken[0]
        except BaseException:
            self._client._session.returned.append((claim, []))  # noqa: SLF001
            raise
        raise StopAsyncIteration
