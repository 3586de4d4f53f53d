"""The client for asyncio: the same methods as in `dsmq.client`, awaited.

    from dsmq.aio import connect

    async with connect() as mq:
        await mq.put("greetings", "hello")
        async for message in mq.messages("greetings"):
            ...

Without `async with`, `mq = await connect()` connects, and `await mq.close()` closes.

One connection carries the calls of all tasks, pipelined in the order in which they were made. If a call is cancelled
after it was sent, its reply is read and discarded. A waiting read has its own connection.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, TypeVar, Unpack, overload

from dsmq import client as blocking
from dsmq.client import arguments, jobs, replies, requests
from dsmq.client.arguments import Names
from dsmq.client.async_pool import Pool, retrieve_error
from dsmq.client.core import NOT_STARTED, Client, Options, Retries
from dsmq.client.jobs import Job, Settle, jobs_of
from dsmq.client.message import Message
from dsmq.client.reader import Claim
from dsmq.client.replies import check, stored_id
from dsmq.client.requests import ALL, Call, NonIdempotent, Put, PutMany, list_topics, read
from dsmq.client.session import PING, SHUTDOWN, State
from dsmq.errors import ClientClosed, DSMQError
from dsmq.system import process

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["AsyncClient", "Job", "Message", "connect"]

D = TypeVar("D")
T = TypeVar("T")


def connect(  # noqa: PLR0913 - listed one by one for help() and editors
    host: str | Sequence[str] = arguments.DEFAULT_HOST,
    port: int = 30008,
    *,
    retry: bool = True,
    timeout: float = 10.0,
    reconnect_timeout: float = 30.0,
    on_state_change: Callable[[State], None] | None = None,
    name: str | None = None,
    start: str | int | None = None,
    token: str | None = None,
    tls: bool | SSLContext = False,
    ca_file: str | None = None,
    cert_file: str | None = None,
    key_file: str | None = None,
) -> Connecting:
    """Connect to a server: `async with connect() as mq`, or `mq = await connect()`; see `dsmq.client.connect`."""
    return Connecting(_connect(**locals()))


async def _connect(host: str | Sequence[str], port: int, *, retry: bool, **options: Unpack[Options]) -> AsyncClient:
    mq = AsyncClient(host, port, options)
    await mq._connect_at_start(Retries(blocking.default_wait() if arguments.flag("retry", retry) else 0.0))  # noqa: SLF001 - one module
    return mq


class Connecting(Coroutine[Any, Any, "AsyncClient"]):
    """What `connect` returns: a coroutine that returns the client and a context manager that closes it."""

    def __init__(self, coroutine: Coroutine[Any, Any, AsyncClient]) -> None:
        self._coroutine = coroutine
        self._client: AsyncClient

    def __await__(self) -> Generator[Any, Any, AsyncClient]:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    async def __aenter__(self) -> AsyncClient:
        self._client = await self._coroutine
        return self._client

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()


class AsyncClient(Client):
    """A client for the tasks of one event loop, with the methods of the blocking client. Made by `connect`.

    If that loop has stopped, or in a forked child, a call in another loop continues at the same positions, with new
    connections. While the loop is running, calls in another one raise RuntimeError.
    """

    def __init__(self, host: str | Sequence[str], port: int, options: Options) -> None:
        super().__init__(host, port, options)
        self._lock = threading.Lock()
        self._pool: Pool | None = None

    async def put(self, topic: str, msg: str | bytes) -> int:
        """Put a message; it is stored when this returns. Returns its id."""
        await self._run(put := Put(arguments.topic_name(topic), arguments.message(msg)))
        return stored_id(put.reply)

    async def put_many(self, topic: str, messages: Iterable[str | bytes]) -> list[int]:
        """Put several messages in order; returns their ids. An error counts those stored: see DSMQError."""
        pending: deque[asyncio.Future[None]] = deque()
        with PutMany(arguments.topic_name(topic), messages) as puts:
            try:
                # Send each batch while the replies to the previous one arrive.
                for batch in puts.batches:
                    if batch:
                        pending.append(self._run(batch))
                        pending[-1].add_done_callback(retrieve_error)
                    while len(pending) > (1 if batch else 0):
                        await pending.popleft()
                    if not batch:
                        await self._here().shared.settle()
                while pending:
                    await pending.popleft()
            finally:
                for left in pending:
                    left.cancel()
        return puts.ids

    @overload
    async def get(self, topic: str, *, default: D = ..., raw: Literal[False] = False) -> str | D: ...
    @overload
    async def get(self, topic: str, *, default: D = ..., raw: Literal[True]) -> bytes | D: ...
    async def get(self, topic: str, *, default: str | D = "", raw: bool = False) -> str | bytes | D:
        """Return the oldest message that this client has not read, or `default`."""
        return await self._read(topic, 1, 0.0, raw, default)  # type: ignore[no-any-return]

    @overload
    async def get_wait(
        self, topic: str, *, default: D = ..., timeout: float | None = None, raw: Literal[False] = False
    ) -> str | D: ...
    @overload
    async def get_wait(
        self, topic: str, *, default: D = ..., timeout: float | None = None, raw: Literal[True]
    ) -> bytes | D: ...
    async def get_wait(
        self, topic: str, *, default: str | D = "", timeout: float | None = None, raw: bool = False
    ) -> str | bytes | D:
        """Like `get`, but wait up to `timeout` seconds for a message; by default, about ten."""
        seconds = blocking.wait_seconds(timeout)
        return await self._read(topic, 1, seconds, raw, default)  # type: ignore[no-any-return]

    @overload
    async def get_latest(self, topic: str, *, default: D = ..., raw: Literal[False] = False) -> str | D: ...
    @overload
    async def get_latest(self, topic: str, *, default: D = ..., raw: Literal[True]) -> bytes | D: ...
    async def get_latest(self, topic: str, *, default: str | D = "", raw: bool = False) -> str | bytes | D:
        """Return the newest message that this client has not read, or `default`; skip the older ones."""
        return await self._read(topic, 1, 0.0, raw, default, latest=True)  # type: ignore[no-any-return]

    @overload
    async def get_many(
        self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[False] = False
    ) -> list[str]: ...
    @overload
    async def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[True]) -> list[bytes]: ...
    async def get_many(
        self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: bool = False
    ) -> list[str] | list[bytes]:
        """Return up to `n` messages, oldest first. If there are none, wait up to `timeout` seconds for one."""
        n, seconds = arguments.count("n", n), arguments.seconds("timeout", timeout)
        return await self._read(topic, n, seconds, raw)  # type: ignore[no-any-return]

    async def read(
        self, topic: str | Sequence[str], n: int = 1, *, timeout: float = 0.0, latest: bool = False
    ) -> list[Message]:
        """Return up to `n` messages of a topic, or of topics and patterns; latest=True returns the newest only."""
        n, seconds = arguments.count("n", n), arguments.seconds("timeout", timeout)
        return await self._read(arguments.names(topic), n, seconds, None, latest=latest)  # type: ignore[no-any-return]

    @overload
    def messages(self, *topics: str | Sequence[str], timeout: float = ...) -> AsyncIterator[Message]: ...
    @overload
    def messages(
        self, *topics: str | Sequence[str], timeout: float = ..., text: Literal[True]
    ) -> AsyncIterator[str]: ...
    @overload
    def messages(
        self, *topics: str | Sequence[str], timeout: float = ..., raw: Literal[True]
    ) -> AsyncIterator[bytes]: ...
    def messages(
        self, *topics: str | Sequence[str], timeout: float = math.inf, text: bool = False, raw: bool = False
    ) -> AsyncIterator[Any]:
        """Iterate over messages of one or more topics as they arrive; end when none arrives for `timeout` seconds."""
        seconds, key = arguments.seconds("timeout", timeout), arguments.names(*topics)
        self._session.reader(key)
        return _Messages(self, key, seconds, arguments.form(text=text, raw=raw))

    async def take(
        self, topic: str, group: str = "workers", *, timeout: float | None = None, lease: float = 60.0
    ) -> Job | None:
        """Take the oldest job of a topic or pattern. If this is cancelled, the next call gets the same job."""
        seconds = blocking.wait_seconds(timeout)
        work = jobs.Work(self, topic, group, seconds, lease)
        try:
            await self._advance(work)
            return work.hand_out()
        except BaseException:
            work.interrupted(is_over=True)
            raise

    def work(
        self, topic: str, group: str = "workers", *, timeout: float = math.inf, lease: float = 60.0, prefetch: int = 1
    ) -> AsyncIterator[Job]:
        """Iterate over jobs. If a variable keeps the iterator, `await` its `aclose()` after leaving the loop."""
        return _Work(self, topic, group, timeout, lease, prefetch)

    async def done(self, job: Job) -> None:
        """Finish a job. Raises JobLost if its lease has ended."""
        await self._settle(jobs.done(job))

    async def give_back(self, job: Job, *, delay: float = 0.0) -> None:
        """Return a job to its group, after `delay` seconds. Raises JobLost if its lease has ended."""
        await self._settle(jobs.give_back(job, delay))

    async def extend(self, job: Job, seconds: float) -> None:
        """Make a job's lease end in `seconds`. Raises JobLost if it has already ended."""
        await self._settle(jobs.extend(job, seconds))

    async def ping(self) -> None:
        """Check that the server answers."""
        await self._run(ping := Call(PING))
        check(ping.reply)

    async def topics(self) -> list[tuple[str, int, int]]:
        """Return the topics with messages: name, number of messages, and bytes."""
        found: list[tuple[str, int, int]] = []
        for call in list_topics(found):
            await self._run(call)
        return found

    async def stats(self, topic: str | None = None) -> dict[str, int | str]:
        """Return statistics of a topic or of the server."""
        await self._run(call := requests.stats(topic))
        return replies.stats(call.reply)

    async def purge(self, topic: str) -> int:
        """Expire all messages of a topic or of all topics that match a pattern; return how many."""
        await self._run(call := requests.purge(topic))
        return replies.as_number(check(call.reply))

    async def shutdown_server(self) -> None:
        """Stop the server gracefully; return when it has closed the connection."""
        shared = self._here().shared
        await shared.ask(call := NonIdempotent(SHUTDOWN))
        check(call.reply)
        await shared.await_end()

    async def close(self) -> None:
        """Close the client. Calls in progress in other tasks raise ClientClosed. Idempotent.

        Its jobs are given back first, if the server answers within the client's timeout.
        """
        try:
            await self._leave(jobs.leave_all(self))
        finally:
            self._core.is_closed = True
            if self._pool is not None:
                self._pool.close(ClientClosed("the client was closed during the call"))

    def __reduce__(self) -> NoReturn:
        raise TypeError("an asyncio client can't be pickled: connect in the other process")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _read(  # noqa: PLR0913 - what a read consists of
        self,
        topic: str | Names,
        n: int,
        seconds: float,
        raw: bool | None,  # noqa: FBT001 - as in the blocking client
        default: object = ALL,
        *,
        latest: bool = False,
    ) -> Any:
        """Return up to `n` messages in a list, or the first, or the default; with metadata if `raw` is None."""
        claim: Claim = []
        try:
            taken = await self._take(claim, topic, n, seconds, raw, latest=latest)
            if default is ALL:
                return taken
            return taken[0] if taken else b"" if raw and default == "" else default
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    async def _take(  # noqa: PLR0913 - what a read consists of
        self,
        claim: Claim,
        topic: str | Names,
        n: int,
        seconds: float,
        raw: bool | None,  # noqa: FBT001 - as in `_read`
        *,
        latest: bool = False,
    ) -> list[Any]:
        reader, convert = self._session.reader(topic), self._session.converter(raw)
        taken = reader.take(claim, n, convert) if n and not latest else []
        if len(taken) < n:
            for call in read(self._session, reader, claim, taken, n, seconds, convert, latest):
                await (self._here().wait(call) if call.waits else self._run(call))
        return taken

    async def _settle(self, call: Settle) -> None:
        await self._run(call)
        call.accept(jobs_of(self._session).leases)

    async def _leave(self, calls: Iterator[Call]) -> None:
        """Give back jobs, if the server answers now. Otherwise, their leases will end."""
        with suppress(DSMQError, OSError, RuntimeError):
            async with asyncio.timeout(self._core.timeout):
                for call in calls:
                    await self._here().shared.ask_once(call)

    def _leave_soon(self, calls: Iterator[Call]) -> None:
        """Do the same in the client's event loop, if that is running. Thread-safe."""

        def begin() -> None:
            with suppress(DSMQError, RuntimeError):
                for call in calls:
                    self._run(call).add_done_callback(retrieve_error)

        if self._pool is not None:
            with suppress(RuntimeError):
                self._pool.loop.call_soon_threadsafe(begin)

    async def _advance(self, work: jobs.Work) -> None:
        for call in work.calls():
            await (self._here().wait(call) if call.waits else self._run(call))

    # Connections

    def _run(self, call: Call) -> asyncio.Future[None]:
        """Make a call on the shared connection."""
        return self._here().shared.ask(call)

    def _here(self) -> Pool:
        """Return the connections of this event loop, in this process."""
        self._core.raise_if_closed("the client is closed")
        pool = self._pool
        if pool is None or pool.loop is not asyncio.get_running_loop() or pool.process is not process():
            return self._enter()
        return pool

    def _enter(self) -> Pool:
        """Continue in another event loop, or in a forked child, with new connections."""
        if self._pool and self._pool.process is not process():
            if self._pool.loop is asyncio.get_running_loop():
                raise RuntimeError("this event loop belongs to the parent process: run another one in the child")
            # A thread that held the lock does not exist in the child.
            self._lock = threading.Lock()
        with self._lock:
            if self._pool and self._pool.is_in_use:
                raise RuntimeError("the client is in use in another event loop: connect in each of them")
            if self._pool:
                self._pool.close(RuntimeError("the client has continued in another event loop"))
            self._pool = Pool(self._core)
            return self._pool

    async def _connect_at_start(self, retries: Retries) -> None:
        while True:
            try:
                return await self._here().shared.connect()
            except NOT_STARTED as error:
                delay = retries.delay_at_start(error)
            except BaseException:  # If on_state_change has raised, there is a connection.
                await self.close()
                raise
            await asyncio.sleep(delay)


class _Messages:
    """Iterates over messages. Not a generator, which a cancelled `anext` would end."""

    def __init__(self, client: AsyncClient, topic: str | Names, seconds: float, raw: bool | None) -> None:  # noqa: FBT001
        self._client, self._topic, self._seconds, self._raw = client, topic, seconds, raw
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        client, taken = self._client, []
        claim: Claim = []
        try:
            if not self._is_over:
                taken = await client._take(claim, self._topic, 1, self._seconds, self._raw)  # noqa: SLF001 - one module
            self._is_over = not taken
            if taken:
                return taken[0]
        except BaseException:
            client._session.returned.append((claim, []))  # noqa: SLF001
            raise
        raise StopAsyncIteration


class _Work(jobs.Work):
    """Iterates over jobs. Not a generator, which a cancelled `anext` would end."""

    _mq: Any = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Job:
        self.begin()
        try:
            await self._mq._advance(self)  # noqa: SLF001 - one module
            if job := self.hand_out():
                return job
        except BaseException:
            self.interrupted()
            raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Give back the caller's job and those taken in advance."""
        await self._mq._leave(self.left())  # noqa: SLF001

    def __del__(self) -> None:
        # None if an argument was invalid.
        if self._mq is not None:
            self._mq._leave_soon(self.left())  # noqa: SLF001
