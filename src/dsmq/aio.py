"""The client for asyncio: the verbs of `dsmq.client`, to be awaited.

    from dsmq.aio import connect

    async with await connect() as mq:
        await mq.put("greetings", "hello")
        async for message in mq.messages("greetings"):
            ...

A call that is cancelled leaves nothing behind: its connection is dropped, and the next call has another.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Literal, Self, TypeGuard, TypeVar, Unpack, cast, overload

from dsmq import arguments, calls
from dsmq import client as blocking
from dsmq import session as wire
from dsmq.calls import Call, Once, Plain, Producer, Put, PutMany, Reading, Request, Retries
from dsmq.dial import Target
from dsmq.errors import ClientClosed, DSMQError, ReplyError
from dsmq.inbox import Claim, Entry, Inbox, give_back
from dsmq.link import ENDED, LONG_PAUSE_SECONDS, Security, target
from dsmq.protocol import Reply, ReplyParser
from dsmq.session import Message, Session, State

__all__ = ["AsyncClient", "Message", "connect"]

C = TypeVar("C", bound=Call)
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
        timeout, reconnect_timeout = arguments.options(timeout, reconnect_timeout, on_state_change)
        self.host = target.host
        self.port = target.port
        self._target = target
        self._timeout = timeout
        self._reconnect_timeout = reconnect_timeout
        self._on_state_change = on_state_change
        self._down: Literal["", "lost", "given up"] = ""
        self._session = Session(target.token)
        self._closed = False
        self._idle: list[_Link] = []
        self._links: set[_Link] = set()

    async def put(self, topic: str, msg: str | bytes) -> int:
        """Put a message; when this returns it is stored. Returns its id."""
        return wire.stored_id(await self._exchange(Put(self._session, topic, msg)))

    async def put_many(self, topic: str, messages: Iterable[str | bytes]) -> list[int]:
        """Put several messages in order; returns their ids."""
        puts = PutMany(self._session, topic, arguments.messages(messages))
        await self._run(puts, self._put_all)
        puts.check()
        return puts.ids

    async def _put_all(self, link: _Link, puts: PutMany) -> None:
        for count, requests in puts.batches(link.producer):
            async with asyncio.timeout(self._timeout):
                if count:
                    link.send(requests)
                for _ in range(count):
                    puts.answered(await link.receive())
            if not count:
                await self._stands(link)

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
        seconds = blocking.patience() if timeout is None else arguments.seconds("timeout", timeout)
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
        n, seconds = arguments.count("n", n), arguments.seconds("timeout", timeout)
        if raw:
            return await self._some(topic, n, seconds, wire.body)
        return await self._some(topic, n, seconds, wire.text)

    async def read(self, topic: str, n: int = 1, *, timeout: float = 0.0, latest: bool = False) -> list[Message]:
        """Return up to `n` messages with their ids, numbers and put times; latest=True returns the newest only."""
        if latest:
            return await self._latest(topic, self._session.message)
        n, seconds = arguments.count("n", n), arguments.seconds("timeout", timeout)
        return await self._some(topic, n, seconds, self._session.message)

    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[False] = False) -> AsyncIterator[str]: ...
    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[True]) -> AsyncIterator[bytes]: ...
    async def messages(self, topic: str, *, timeout: float = math.inf, raw: bool = False) -> AsyncIterator[str | bytes]:
        """Iterate over the messages of a topic as they come; end when none has come for `timeout` seconds."""
        seconds = arguments.seconds("timeout", timeout)
        while taken := await self._some(topic, 1, seconds, wire.converter(raw=raw)):
            yield taken[0]

    def position(self, topic: str) -> str:
        """Return where this client has read a topic to: behind the last message that was handed out."""
        return self._session.position(topic)

    def seek(self, topic: str, position: str | int) -> None:
        """Read a topic on from a position, or behind the message with an id; 0 is before all that the server has."""
        if not self._session.seek(topic, position) and self._on_state_change is not None:
            self._on_state_change("replaced")

    def forget(self, topic: str) -> None:
        """Forget how far a topic was read, to save memory."""
        self._session.forget(topic)

    @property
    def missed(self) -> int:
        """How many messages expired before this client came to them, over all topics it reads.

        In each they are counted from the first one that it got.
        """
        return self._session.missed

    async def ping(self) -> None:
        """Ask the server for a sign of life; raises where there is none."""
        wire.check(await self._exchange(Plain(wire.PING)))

    async def topics(self) -> list[tuple[str, int, int]]:
        """Return the topics that hold messages: name, messages and bytes held."""
        found: list[tuple[str, int, int]] = []
        while page := wire.topics(await self._exchange(Plain(wire.topics_request(found)))):
            found += page
        return found

    async def shutdown_server(self) -> None:
        """Stop the server gracefully; return when it has closed the connection."""
        await self._run(Once(wire.SHUTDOWN), self._shut_down)
        self._drop(None, others=True)

    async def _shut_down(self, link: _Link, call: Once) -> None:
        await self._stands(link)
        wire.check(await self._ask(link, call))
        async with asyncio.timeout(self._timeout):
            await link.await_end()

    async def close(self) -> None:
        """Close the client. Calls of other tasks raise ClientClosed. Idempotent."""
        self._closed = True
        for link in self._links:
            link.close()
        self._idle.clear()
        self._links.clear()

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
        claim: Claim = []
        try:
            inbox = self._session.inbox(topic)
            taken = inbox.take(claim, n, convert) if n else []
            await self._read(calls.some(self._session, inbox, claim, taken, n, seconds, convert))
        except BaseException:
            give_back(claim)
            raise
        return taken

    async def _latest(self, topic: str, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        claim: Claim = []
        taken: list[T] = []
        try:
            await self._read(calls.latest(self._session, claim, taken, topic, convert))
        except BaseException:
            give_back(claim)
            raise
        return taken

    async def _read(self, reading: Reading) -> None:
        while (call := next(reading, None)) is not None:
            call.reply = await self._exchange(call)

    # Connections

    async def _exchange(self, call: Request) -> Reply:
        return await self._run(call, self._ask)

    async def _ask(self, link: _Link, call: Request) -> Reply:
        request = call.request(link.producer)
        async with asyncio.timeout(call.seconds + self._timeout):
            link.send(request)
            return await link.receive()

    async def _run(self, call: C, attempt: Callable[[_Link, C], Awaitable[T]]) -> T:
        retries = None
        while True:
            link = None
            try:
                link = await self._borrow()
                result = await attempt(link, call)
            except BaseException as error:
                if not self._is_lost(error, link):
                    if self._down and isinstance(error, ReplyError):
                        self._announce("resumed" if link else "given up", error)
                    raise
                retries = retries or Retries(self._reconnect_timeout)
                if link is not None and call.lost(error):
                    retries.reset()
                await self._pause(call, retries, error)
            else:
                await self._give_back(link)
                if self._down:
                    self._announce("resumed")
                return result

    async def _borrow(self) -> _Link:
        if self._idle:
            await self._idle[-1].look()
        # Other tasks take and give back meanwhile.
        if not self._idle:
            return await self._link()
        link = self._idle.pop()
        why = link.ended()
        if why is None:
            return link
        self._drop(link, others=True)
        self._announce("lost", ConnectionResetError(why))
        return await self._link()

    async def _stands(self, link: _Link) -> None:
        """Raise ConnectionResetError where a connection in use has ended. No reply may be outstanding."""
        await link.look()
        if (why := link.ended()) is not None:
            raise ConnectionResetError(why)

    async def _give_back(self, link: _Link) -> None:
        self._idle.append(link)
        if self._closed:
            await self.close()

    def _is_lost(self, error: BaseException, link: _Link | None) -> TypeGuard[Exception]:
        """Give up a connection whose call has failed, or was cancelled; return whether it had broken."""
        lost = wire.is_lost(error, connecting=link is None)
        self._drop(link, others=lost)
        if lost and self._closed:
            raise ClientClosed("the client was closed during the call") from error
        return lost

    def _drop(self, link: _Link | None, *, others: bool) -> None:
        useless = [link] if link else []
        if others:
            useless += self._idle
            self._idle.clear()
        self._links.difference_update(useless)
        for one in useless:
            one.close()

    async def _pause(self, call: Call, retries: Retries, error: Exception) -> None:
        self._announce("lost", error)
        pause = retries.pause()
        if pause is None:
            self._announce("given up", error)
            raise call.given_up(error) from error
        await asyncio.sleep(pause)

    def _announce(self, state: State, error: Exception | None = None) -> None:
        if not wire.is_news(state, self._down):
            return
        self._down = state if state in ("lost", "given up") else ""
        if state != "lost" or self._reconnect_timeout:
            wire.log_state(state, self._target, error)
        if self._on_state_change is not None:
            self._on_state_change(state)

    async def _link(self) -> _Link:
        if self._closed:
            raise ClientClosed("the client is closed")
        async with asyncio.timeout(self._timeout):
            link = await _open(self._target)
            try:
                link.send(self._session.hello)
                reply = await link.receive()
                if self._closed:
                    raise ClientClosed("the client was closed during the call")
                state, era = self._session.meet(reply)
            except BaseException:
                link.close()
                raise
        link.producer = Producer(era.run, era)
        self._links.add(link)
        self._announce(state)
        return link

    async def _open(self, *, retry: bool) -> None:
        for pause in blocking.pauses() if retry else ():
            try:
                self._idle.append(await self._link())
            except (ConnectionRefusedError, FileNotFoundError):
                await asyncio.sleep(pause)
            else:
                return
        self._idle.append(await self._link())


class _Link(asyncio.Protocol):
    """One connection to the server."""

    def __init__(self) -> None:
        self.producer = Producer(b"")
        self._parser = ReplyParser()
        self._transport: asyncio.Transport
        self._used_at = 0.0
        # What it has ended with.
        self._end: Exception | None = None
        # A call that waits for a reply, or for the end.
        self._waiter: asyncio.Future[None] | None = None

    # What the event loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        self._wake()

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end = self._end or exc or ConnectionResetError(ENDED)
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    # What a call does

    def send(self, data: bytes) -> None:
        """Send requests, as the socket takes them."""
        self._used_at = time.monotonic()
        self._transport.write(data)

    async def receive(self) -> Reply:
        """Return the next reply. Raises OSError when the connection breaks."""
        while (reply := self._parser.next()) is None:
            await self._more()
        return wire.unless_last(reply[0])

    async def _more(self) -> None:
        if self._end is not None:
            raise ConnectionResetError(wire.reason(self._end)) from self._end
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    async def look(self) -> None:
        """Let the event loop look what has come, unless it has done so lately."""
        if time.monotonic() - self._used_at > LONG_PAUSE_SECONDS:
            # The first looks, the second reads, and the third tells of an error.
            for _ in range(3):
                await asyncio.sleep(0)

    def ended(self) -> str | None:
        """Return why the connection has ended, if it has while nobody used it. No reply may be outstanding."""
        try:
            if reply := self._parser.next():
                # Nobody has asked for it: it is what the server says when it hangs up.
                return f"unexpected: {wire.unless_last(reply[0])!r}"
        except DSMQError as error:
            return wire.reason(error)
        return wire.reason(self._end) if self._end else None

    async def await_end(self) -> None:
        """Wait until the server closes the connection."""
        while self._end is None:
            await self._more()

    def close(self) -> None:
        """Close it at once: what a cancelled call has not sent yet is not sent any more. Idempotent."""
        self._transport.abort()


async def _open(target: Target) -> _Link:
    loop = asyncio.get_running_loop()
    options: dict[str, Any] = {"ssl": target.tls, "server_hostname": target.name} if target.tls else {}
    if target.is_unix:
        return (await loop.create_unix_connection(_Link, target.path, **options))[1]
    return (await loop.create_connection(_Link, target.host.strip("[]"), target.port, **options))[1]
