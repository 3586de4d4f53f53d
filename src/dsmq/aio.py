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
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Literal, Self, TypeVar, Unpack, overload

from dsmq import client as blocking
from dsmq import session as wire
from dsmq.calls import Once, Plain, Put, PutMany, Read, Request
from dsmq.channel import Batch, Connector, Pool
from dsmq.errors import ClientClosed
from dsmq.link import Security, Target, target
from dsmq.protocol import Reply
from dsmq.session import Entry, Inbox, Message, State

__all__ = ["AsyncClient", "Message", "connect"]

D = TypeVar("D")
T = TypeVar("T")


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
        """Put several messages in order; returns their ids."""
        puts = PutMany(self._session, topic, messages)
        batch = Batch(puts)
        # Made here and not when there is room to send it, because the messages may come from a generator.
        while batch.make(self._here().shared.batch_producer):
            await self._here().shared.add(batch)
        puts.check()
        return puts.ids

    @overload
    async def get(self, topic: str, default: str = "", *, raw: Literal[False] = False) -> str: ...
    @overload
    async def get(self, topic: str, default: D, *, raw: Literal[False] = False) -> str | D: ...
    @overload
    async def get(self, topic: str, *, raw: Literal[True]) -> bytes: ...
    @overload
    async def get(self, topic: str, default: D, *, raw: Literal[True]) -> bytes | D: ...
    async def get(self, topic: str, default: object = "", *, raw: bool = False) -> object:
        """Return the oldest message that this client has not read, or `default`."""
        return await self._one(topic, 0.0, default, raw=raw)

    @overload
    async def get_wait(
        self, topic: str, default: str = "", *, timeout: float | None = None, raw: Literal[False] = False
    ) -> str: ...
    @overload
    async def get_wait(
        self, topic: str, default: D, *, timeout: float | None = None, raw: Literal[False] = False
    ) -> str | D: ...
    @overload
    async def get_wait(self, topic: str, *, timeout: float | None = None, raw: Literal[True]) -> bytes: ...
    @overload
    async def get_wait(
        self, topic: str, default: D, *, timeout: float | None = None, raw: Literal[True]
    ) -> bytes | D: ...
    async def get_wait(
        self, topic: str, default: object = "", *, timeout: float | None = None, raw: bool = False
    ) -> object:
        """Like `get`, but wait for a message for so many seconds; without a timeout, about ten."""
        return await self._one(topic, blocking.patience() if timeout is None else timeout, default, raw=raw)

    @overload
    async def get_latest(self, topic: str, default: str = "", *, raw: Literal[False] = False) -> str: ...
    @overload
    async def get_latest(self, topic: str, default: D, *, raw: Literal[False] = False) -> str | D: ...
    @overload
    async def get_latest(self, topic: str, *, raw: Literal[True]) -> bytes: ...
    @overload
    async def get_latest(self, topic: str, default: D, *, raw: Literal[True]) -> bytes | D: ...
    async def get_latest(self, topic: str, default: object = "", *, raw: bool = False) -> object:
        """Return the newest message that this client has not read, or `default`; pass over the older ones."""
        return blocking.first(await self._latest(topic, wire.converter(raw=raw)), default, raw=raw)

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
            return await self._some(topic, n, timeout, wire.body)
        return await self._some(topic, n, timeout, wire.text)

    async def read(self, topic: str, n: int = 1, *, timeout: float = 0.0, latest: bool = False) -> list[Message]:
        """Return up to `n` messages with their ids, numbers and put times; latest=True returns the newest only."""
        if latest:
            return await self._latest(topic, self._session.message)
        return await self._some(topic, n, timeout, self._session.message)

    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[False] = False) -> AsyncIterator[str]: ...
    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[True]) -> AsyncIterator[bytes]: ...
    async def messages(self, topic: str, *, timeout: float = math.inf, raw: bool = False) -> AsyncIterator[str | bytes]:
        """Iterate over the messages of a topic as they come; end when none has come for `timeout` seconds."""
        while taken := await self._some(topic, 1, timeout, wire.converter(raw=raw)):
            yield taken[0]

    def seek(self, topic: str, after: int) -> None:
        """Read a topic on behind the message with this id; 0 is before all that the server still holds."""
        inbox = self._session.inbox(topic)
        inbox.seek(after, None, drop=True)

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

    # What the verbs are made of: as in the blocking client, where each step is explained.

    async def _one(self, topic: str, seconds: float, default: object, *, raw: bool) -> object:
        return blocking.first(await self._some(topic, 1, seconds, wire.converter(raw=raw)), default, raw=raw)

    async def _some(self, topic: str, n: int, seconds: float, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        inbox = self._session.inbox(topic)
        until = time.monotonic() + seconds
        if n < 1:
            return []
        least, more = n, True
        while not (taken := inbox.take(n, convert, least)) and (more or time.monotonic() < until):
            more = bool(await self._fetch(inbox, 0.0 if len(inbox) else until))
            least = n if more else 1
        return taken

    async def _latest(self, topic: str, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        inbox = self._session.inbox(topic)
        await self._fetch(inbox, latest=True)
        inbox.skip_to_latest()
        return inbox.take(1, convert)

    async def _fetch(self, inbox: Inbox, until: float = 0.0, *, latest: bool = False) -> list[Entry]:
        waits = time.monotonic() < until
        read, reply = Read(inbox, until if waits else 0.0, latest=latest), None
        while read.generation != inbox.generation:
            reply = await (self._here().wait(read) if waits else self._ask(read))
        found = self._session.entries(reply)
        inbox.accept(found, generation=read.generation, latest=latest)
        return found

    # Connections

    def _ask(self, call: Request) -> asyncio.Future[Reply]:
        return self._here().shared.ask(call)

    def _here(self) -> Pool:
        """Return the connections of this event loop, in this process."""
        if self._closed:
            raise ClientClosed("the client is closed")
        pool = self._pool
        if pool is None or pool.loop is not asyncio.get_running_loop() or pool.pid != os.getpid():
            return self._enter()
        return pool

    def _enter(self) -> Pool:
        """Go on in another event loop, or in a child process, with connections of its own."""
        if self._pool and self._pool.pid != os.getpid():
            # In a child process, another thread that had the lock does not exist.
            self._lock = threading.Lock()
        with self._lock:
            if self._pool and self._pool.is_in_use:
                raise RuntimeError("the client is in use in another event loop: connect in each of them")
            if self._pool:
                self._pool.close(RuntimeError("the client has gone on in another event loop"))
            self._pool = Pool(self._connector)
            return self._pool

    async def _open(self, *, retry: bool) -> None:
        for pause in blocking.pauses() if retry else ():
            try:
                return await self._here().shared.open()
            except (ConnectionRefusedError, ConnectionResetError, ConnectionAbortedError, FileNotFoundError):
                # The last but one: a front that has accepted, and has no server behind it yet.
                await asyncio.sleep(pause)
        return await self._here().shared.open()
