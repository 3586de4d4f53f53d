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
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Generic, Literal, Self, TypeAlias, TypeVar, Unpack, overload

from dsmq import client as blocking
from dsmq.client import arguments
from dsmq.client import requests as calls
from dsmq.client import session as wire
from dsmq.client.channel import Batch, Connector, Pool
from dsmq.client.connection import ClosedSilently, Security, target
from dsmq.client.dial import Target
from dsmq.client.reader import Claim, Entry, Inbox
from dsmq.client.requests import Once, Plain, Put, PutMany, Reading, Request
from dsmq.client.session import Message, State
from dsmq.errors import ClientClosed
from dsmq.system import process
from dsmq.wire.resp import Reply

__all__ = ["AsyncClient", "Message", "connect"]

D = TypeVar("D")
T = TypeVar("T")
Convert: TypeAlias = Callable[[Inbox, Entry], T]


async def connect(  # noqa: PLR0913 - each may be wanted
    host: str = "127.0.0.1",
    port: int = 30008,
    *,
    timeout: float = 10.0,
    retry: bool = True,
    reconnect_timeout: float = 30.0,
    on_state_change: Callable[[State], None] | None = None,
    **security: Unpack[Security],
) -> AsyncClient:
    """Connect to a server; see `dsmq.client.connect`."""
    mq = AsyncClient(target(host, port, **security), timeout, reconnect_timeout, on_state_change)
    await mq._open(retry=retry)  # noqa: SLF001 - one module
    return mq


class AsyncClient:
    """A client for the tasks of one event loop. Made by `connect`; the methods are those of the blocking client."""

    def __init__(
        self,
        target: Target,
        timeout: float = 10.0,
        reconnect_timeout: float = 30.0,
        on_state_change: Callable[[State], None] | None = None,
    ) -> None:
        self.host = target.host
        self.port = target.port
        timeout, reconnect_timeout = arguments.options(timeout, reconnect_timeout, on_state_change)
        self._connector = Connector(target, timeout, reconnect_timeout, on_state_change)
        self._session = self._connector.session
        self._closed = False
        self._lock = threading.Lock()
        self._pool: Pool | None = None

    def __repr__(self) -> str:
        return f"<dsmq client of {self._connector.target}{', closed' if self._closed else ''}>"

    async def put(self, topic: str, msg: str | bytes) -> int:
        """Put a message; when this returns it is stored. Returns its id."""
        return wire.stored_id(await self._ask(Put(self._session, topic, msg)))

    async def put_many(self, topic: str, messages: Iterable[str | bytes]) -> list[int]:
        """Put several messages in order; returns their ids. Errors say how many are stored, as in the other client."""
        with PutMany(self._session, topic, arguments.messages(messages)) as puts:
            batch = Batch(puts)
            # Made here and not when there is room to send it, because the messages may come from a generator.
            while batch.make(self._here().shared.batch_producer):
                await self._here().shared.add(batch)
            puts.check()
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
        claim: Claim = []
        try:
            return blocking.first(await self._some(claim, topic, 1, 0.0, wire.converter(raw=raw)), default, raw=raw)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

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
        seconds = blocking.patience() if timeout is None else arguments.seconds("timeout", timeout)
        claim: Claim = []
        try:
            return blocking.first(await self._some(claim, topic, 1, seconds, wire.converter(raw=raw)), default, raw=raw)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

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
        claim: Claim = []
        try:
            convert = wire.converter(raw=raw)
            return blocking.first(await self._latest(claim, topic, convert), default, raw=raw)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

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
        claim: Claim = []
        try:
            if raw:
                return await self._many(claim, topic, n, timeout, wire.body)
            return await self._many(claim, topic, n, timeout, wire.text)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    async def read(self, topic: str, n: int = 1, *, timeout: float = 0.0, latest: bool = False) -> list[Message]:
        """Return up to `n` messages with their ids, numbers and put times; latest=True returns the newest only."""
        claim: Claim = []
        try:
            if latest and arguments.count("n", n):
                arguments.seconds("timeout", timeout)
                return await self._latest(claim, topic, self._session.message)
            return await self._many(claim, topic, n, timeout, self._session.message)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[False] = False) -> AsyncIterator[str]: ...
    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[True]) -> AsyncIterator[bytes]: ...
    def messages(
        self, topic: str, *, timeout: float = math.inf, raw: bool = False
    ) -> AsyncIterator[str] | AsyncIterator[bytes]:
        """Iterate over the messages of a topic as they come; end when none has come for `timeout` seconds."""
        seconds = arguments.seconds("timeout", timeout)
        self._session.inbox(topic)
        if raw:
            return _Messages(self, topic, seconds, wire.body)
        return _Messages(self, topic, seconds, wire.text)

    def position(self, topic: str) -> str:
        """Return where this client has read a topic to: behind the last message that was handed out."""
        return self._session.position(topic)

    def seek(self, topic: str, position: str | int) -> None:
        """Read a topic on from a position, or behind the message with an id; 0 is before all that the server has."""
        if not self._session.seek(topic, position) and self._connector.on_state_change is not None:
            self._connector.on_state_change("replaced")

    def forget(self, topic: str) -> None:
        """Forget how far a topic was read, to save memory."""
        self._session.forget(topic)

    @property
    def max_message_bytes(self) -> int:
        """The longest message that the server took when this client connected."""
        return self._session.max_message_bytes

    @property
    def missed(self) -> int:
        """How many messages expired before this client came to them, over all topics it reads.

        In each they are counted from the first one that it got.
        """
        return self._session.missed

    async def ping(self) -> None:
        """Ask the server for a sign of life; raises where there is none."""
        wire.check(await self._ask(Plain(wire.PING)))

    async def topics(self) -> list[tuple[str, int, int]]:
        """Return the topics that hold messages: name, messages and bytes held."""
        found: list[tuple[str, int, int]] = []
        while page := wire.topics(await self._ask(Plain(wire.topics_request(found)))):
            found += page
        return found

    async def shutdown_server(self) -> None:
        """Stop the server gracefully; return when it has closed the connection."""
        wire.check(await self._ask(Once(wire.SHUTDOWN)))
        await self._here().shared.await_end()

    async def close(self) -> None:
        """Close the client. Calls of other tasks raise ClientClosed. Idempotent."""
        self._closed = True
        if self._pool is not None:
            self._pool.close(ClientClosed("the client was closed during the call"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _some(self, claim: Claim, topic: str, n: int, seconds: float, convert: Convert[T]) -> list[T]:
        """Take up to `n` messages; if there is none, wait for the first. What is taken is noted in `claim`."""
        inbox = self._session.inbox(topic)
        taken = inbox.take(claim, n, convert) if n else []
        if len(taken) < n:
            await self._read(calls.some(self._session, inbox, claim, taken, n, seconds, convert))
        return taken

    async def _many(self, claim: Claim, topic: str, n: int, timeout: float, convert: Convert[T]) -> list[T]:
        return await self._some(claim, topic, arguments.count("n", n), arguments.seconds("timeout", timeout), convert)

    async def _latest(self, claim: Claim, topic: str, convert: Convert[T]) -> list[T]:
        taken: list[T] = []
        await self._read(calls.latest(self._session, claim, taken, topic, convert))
        return taken

    async def _read(self, reading: Reading) -> None:
        """Make the calls that reading takes."""
        while (call := next(reading, None)) is not None:
            call.reply = await (self._here().wait(call) if call.waits else self._ask(call))

    # Connections

    def _ask(self, call: Request) -> asyncio.Future[Reply]:
        return self._here().shared.ask(call)

    def _here(self) -> Pool:
        """Return the connections of this event loop, in this process."""
        if self._closed:
            raise ClientClosed("the client is closed")
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
            self._pool = Pool(self._connector)
            return self._pool

    async def _open(self, *, retry: bool) -> None:
        until = time.monotonic() + blocking.patience()
        for pause in blocking.pauses() if retry else ():
            try:
                return await self._here().shared.open()
            except (ConnectionRefusedError, FileNotFoundError, ClosedSilently):
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(pause)
        return await self._here().shared.open()


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
            return await self._next(claim)
        except BaseException:
            self._client._session.returned.append((claim, []))  # noqa: SLF001
            raise

    async def _next(self, claim: Claim) -> T:
        if not self._is_over:
            for message in await self._client._some(claim, self._topic, 1, self._seconds, self._convert):  # noqa: SLF001
                return message
        self._is_over = True
        raise StopAsyncIteration
