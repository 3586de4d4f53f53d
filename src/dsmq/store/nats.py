"""A store shared by several servers: a NATS JetStream stream, which each server mirrors in SQLite.

A put is published to the stream and acknowledged once a majority of the engine's nodes has stored it; its id is its
sequence number in the stream. Each server has its own consumer and answers reads from its mirror. Each mirror numbers
the messages of topics and detects repeated puts by itself; all mirrors agree, because they apply the same messages in
the same order.

A mirror may lag. So before a read returns nothing, and before every read of the latest message, the server asks the
engine for the id of its last message and waits until the mirror has it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import selectors
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from dsmq import threads
from dsmq.errors import ReplyError, StartupError, StoreFailed, TooBig
from dsmq.store.api import Answer, EngineStats, Outcome, Put, Timing, Watched
from dsmq.store.nats_api import EngineError
from dsmq.store.nats_connection import Credentials, NATSConnection, Server
from dsmq.store.nats_groups import NATSGroups
from dsmq.store.nats_index import ReadIndex
from dsmq.store.nats_leader import LeaderFollower
from dsmq.store.nats_mirror import Mirror
from dsmq.store.nats_puts import Publisher
from dsmq.store.nats_reads import FreshReads
from dsmq.store.nats_requests import Requests
from dsmq.store.nats_rules import SharedLimits, StreamRules
from dsmq.store.nats_stream import HEADER_BYTES, Stream
from dsmq.store.sqlite import MirrorStore

if TYPE_CHECKING:
    from ssl import SSLContext

# After this long without a connection, clients are sent to other servers.
DISCONNECT_SECONDS = 2.0
WATCH_SECONDS, CANCEL_SECONDS = 0.5, 0.1
# The engine closes the connection if a request line exceeds 4,096 bytes, and encoding can triple a topic's length.
MAX_TOPIC_BYTES = 1300
_STOP_SECONDS = 5.0

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class NATSStore(SharedLimits, FreshReads):
    """A store in a NATS JetStream stream. Thread-safe; its event loop runs in its own thread."""

    is_shared = True

    def __init__(
        self,
        servers: Sequence[Server],
        stream: str = "dsmq",
        replicas: int = 3,
        credentials: Credentials | None = None,
        tls: SSLContext | None = None,
    ) -> None:
        self.thread = threading.Thread(target=self._run, name="dsmq-nats", daemon=True)
        self._servers, self._credentials, self._tls = servers, credentials or Credentials(), tls
        self.rules, self._max_age_ms = StreamRules(), 600_000
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._ready = threading.Event()
        self._startup_error: StartupError | None = None
        self._main_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._work: list[asyncio.Task[None]] = []
        self._is_closing = False
        self.due_at = math.inf
        self._is_lost = False
        self._on_unusable: Callable[[str], None]
        # These are used only in the loop's thread, which has not started yet.
        self.connection = NATSConnection(servers, self._credentials, tls, f"dsmq {stream}")
        self.requests = Requests(self.connection)
        self.stream = Stream(stream, replicas)
        self.groups = NATSGroups(self)
        self.mirror = Mirror(self.connection, self.stream, self.rules, self.groups, self._new_mirror)
        self._index = ReadIndex(self.mirror, self.connection, self.requests, self.stream)
        self.publisher = Publisher(self.requests, self.stream, self._index)
        self._leader = LeaderFollower(self.connection, self.stream)

    def _new_mirror(self) -> MirrorStore:
        return MirrorStore(self._max_age_ms, self.rules.limits())

    # Lifecycle

    def start(self, on_messages: Callable[[set[bytes]], None], on_unusable: Callable[[str], None]) -> None:
        self.mirror.on_ready = self._on_ready
        self.mirror.on_messages = on_messages
        self.mirror.on_replaced = self._on_replaced
        self.connection.on_lost = self.requests.on_lost
        self._on_unusable = on_unusable
        threads.start([self.thread.start])

    def wait(self, seconds: float) -> bool:
        """Wait until the store is ready; return whether it is. Raises StartupError if it can't become ready."""
        ready = self._ready.wait(seconds)
        if self._startup_error is not None:
            raise self._startup_error
        return ready

    def _on_ready(self) -> None:
        _logger.info("the mirror of the stream is complete, up to id %s", self.mirror.store.last_id())
        self._start_task(self._finish_start())

    async def _finish_start(self) -> None:
        if self.rules.to_write() is None:
            self.rules.report()
        await self._write_rules()
        self._ready.set()

    def _on_replaced(self) -> None:
        self.publisher.last_id = 0
        self._on_unusable("the stream has lost its messages")

    @property
    def _is_disconnected(self) -> bool:
        # A silent connection counts as connected until it is dropped, because a new one may follow immediately.
        return not self.connection.connected and self.connection.silent_seconds > DISCONNECT_SECONDS

    @property
    def unready_reason(self) -> str:
        connection, mirror = self.connection, self.mirror
        if self._is_disconnected:
            return f"no connection to the engine: {connection.error or 'not connected yet'}"
        if mirror.ready:
            return ""
        if mirror.error is not None:
            return f"not following the stream: {mirror.error}"
        return (
            f"mirroring the stream: {mirror.lag.messages} messages to go"
            if mirror.lag.messages
            else "opening the stream"
        )

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main_task = self._loop.create_task(self._main())
        try:
            self._loop.run_until_complete(self._main_task)
        except asyncio.CancelledError:
            _logger.debug("the store is closed")
        except StartupError as error:
            self._startup_error = error
            if self._ready.is_set():
                _logger.error("the store has failed: %s", error)
        finally:
            self.publisher.close()
            self._ready.set()
            # The official client leaves tasks behind if one of its connections was being replaced.
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.close()

    async def _main(self) -> None:
        connecting = asyncio.create_task(self.connection.run())
        connecting.add_done_callback(self._on_connecting_done)
        try:
            await self._connect()
            async with asyncio.TaskGroup() as tasks:
                works = [self.publisher.run(), self._index.run(), self._index.watch(), self.mirror.run()]
                for work in (*works, self._leader.run(), self._watch_connection()):
                    self._work.append(tasks.create_task(work))
                if self._is_closing:
                    raise asyncio.CancelledError
        except* StartupError as errors:
            raise errors.exceptions[0] from None
        finally:
            connecting.cancel()
            await asyncio.gather(connecting, *self._tasks, return_exceptions=True)
            await self.stream.close()
            # The transports close in the loop's next iteration.
            await asyncio.sleep(0)

    def _on_connecting_done(self, task: asyncio.Task[None]) -> None:
        """Stop the thread if the task fails because of a bug."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("the connection to the engine failed because of a bug", exc_info=error)
            self._cancel()

    async def _connect(self) -> None:
        """Wait for the engine, which may still be starting. Raises StartupError if it refuses the credentials."""
        while not self.connection.connected:
            if refusal := self.connection.refusal:
                raise StartupError(f"the NATS servers refuse the connection: {refusal}")
            await asyncio.sleep(0.05)
        await self.stream.connect(self._servers, self._credentials, self._tls)
        # Do this before the mirror has a consumer, which a move would interrupt. Without a stream, there is no leader
        # yet.
        with suppress(EngineError):
            await self.stream.last_id()
            await self._leader.follow()

    async def _watch_connection(self) -> None:
        """Send clients to other servers when the connection is lost."""
        while True:
            self.due_at = time.monotonic() + WATCH_SECONDS
            await asyncio.sleep(WATCH_SECONDS)
            is_lost = self._is_disconnected
            if is_lost and not self._is_lost:
                self._on_unusable("there is no connection to the engine")
            self._is_lost = is_lost

    def close(self) -> None:
        """Idempotent. Other methods raise StoreFailed afterwards."""
        if self.thread.is_alive():
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel)
            self.thread.join(_STOP_SECONDS)
        elif not self.thread.ident:
            self._loop.close()
        self.mirror.close()

    def close_inherited(self) -> None:
        # Replace the descriptors rather than close them, because the objects that own them still close them at exit.
        null = os.open(os.devnull, os.O_RDWR)
        for watched in (self._selector.get_map() or {}).values():
            os.dup2(null, watched.fd, inheritable=False)
        os.close(null)

    def _cancel(self) -> None:
        if not self._is_closing and self._main_task is not None:
            self._main_task.cancel()
        self._is_closing = True
        for task in self._work:
            task.cancel()
        # Cancel again: before Python 3.12, `asyncio.wait_for` loses a cancellation that arrives along with its result.
        self._loop.call_later(CANCEL_SECONDS, self._cancel)

    def post(self, call: Callable[[], None]) -> None:
        """Run a function in the loop's thread. Raises StoreFailed if the loop has stopped."""
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            raise StoreFailed("the store is closed") from None

    # Puts

    @property
    def max_message_bytes(self) -> int:
        """The length of the longest message that the engine accepts."""
        return max(0, self.connection.max_payload - HEADER_BYTES)

    def append(self, puts: Sequence[Put]) -> Answer[list[Outcome]]:
        return self._append(puts, together=False)

    def publish_job_fact(self, fact: bytes, answer: Future[list[Outcome]], leaves: float) -> None:
        """Publish a change to a group of workers that leaves this share of the room for facts. Raises StoreFailed."""
        self.post(partial(self.publisher.put_fact, self.mirror.jobs_subject, fact, answer, leaves))

    def append_together(self, puts: Sequence[Put], _: Watched | None = None) -> Answer[list[Outcome]]:
        return self._append(puts, together=True)

    def _append(self, puts: Sequence[Put], *, together: bool) -> Answer[list[Outcome]]:
        for topic, body, _ in puts:
            if len(topic) > MAX_TOPIC_BYTES:
                raise TooBig(f"a topic may have at most {MAX_TOPIC_BYTES} bytes with this store, not {len(topic)}")
            if len(body) > self.max_message_bytes:
                raise TooBig(f"the engine accepts at most {self.max_message_bytes} bytes (max_payload)")
        known = self.mirror.store.check(puts)
        new = [put for put, message_id in zip(puts, known, strict=True) if message_id is None]
        if len(new) < len(puts):
            self.post(partial(self.publisher.count_repeated, len(puts) - len(new)))
        if not new:
            return [message_id for message_id in known if message_id is not None]
        answer: Future[list[Outcome]] = Future()
        published = answer
        if len(new) < len(puts):
            published = Future()
            published.add_done_callback(partial(_merge, known, answer))
        self.post(partial(self.publisher.put, new, published, together=together))
        return answer

    # New clients

    def start_id(self) -> Future[int]:
        answer: Future[int] = Future()
        try:
            if reason := self.unready_reason:
                raise StoreFailed(reason)
            self.post(lambda: self._start_task(self._answer_last_id(answer)))
        except StoreFailed as error:
            answer.set_exception(error)
        return answer

    def _start_task(self, work: Coroutine[None, None, None]) -> None:
        self._tasks = {task for task in self._tasks if not task.done()}
        self._tasks.add(self._loop.create_task(work))

    async def _answer_last_id(self, answer: Future[int]) -> None:
        try:
            last_id = await self._index.start_id()
            answer.set_result(max(self.publisher.last_id, last_id))
        except EngineError as error:
            answer.set_exception(StoreFailed(str(error)))

    # Statistics

    def timings(self) -> dict[str, Timing]:
        times = Timing(self.publisher.published, self.publisher.seconds)
        return self.mirror.store.timings() | {"publish": times}

    def engine(self) -> EngineStats:
        connection, publisher, mirror, lag = self.connection, self.publisher, self.mirror, self.mirror.lag
        is_connected = connection.connected and connection.silent_seconds <= DISCONNECT_SECONDS
        return EngineStats(
            name=f"NATS stream {self.stream.name}",
            node=connection.server if is_connected else "",
            ready=mirror.ready,
            lag_messages=lag.messages,
            lag_seconds=lag.seconds(is_followed=mirror.is_following),
            retries=publisher.retries,
            split_batches=publisher.split,
            repeated_puts=publisher.repeated,
            consumers=mirror.consumers,
            skipped_messages=mirror.skipped,
        )


def _merge(known: list[int | None], answer: Future[list[Outcome]], published: Future[list[Outcome]]) -> None:
    """Answer with the outcomes of new puts and the ids of those that were already stored."""
    error = published.exception()
    if error is not None:
        answer.set_exception(error)
        return
    new: list[int | ReplyError] = published.result()
    outcomes = iter(new)
    answer.set_result([next(outcomes) if message_id is None else message_id for message_id in known])
