"""The event loop of one I/O worker: a thread that serves its share of the connections and never blocks.

In each turn, it receives and runs the requests of all ready sockets, stores the messages that they put in one call,
wakes the readers that wait for these messages, and sends the replies.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ
from typing import TYPE_CHECKING, Any, TypeVar

from dsmq import logs
from dsmq.broker.connection import Connection
from dsmq.broker.counters import Counters
from dsmq.broker.deadlines import Timers, TimerTarget
from dsmq.broker.poller import Poller
from dsmq.broker.puts import PutBatch
from dsmq.broker.usage import MemoryQueue
from dsmq.broker.waiters import Waiters
from dsmq.errors import Busy, ReplyError, StoreFailed
from dsmq.system import LONG_YIELD_PAUSE_SECONDS, LONG_YIELD_SECONDS, yield_processor

if TYPE_CHECKING:
    from dsmq.broker.context import ServerContext
    from dsmq.broker.listener import Listener
    from dsmq.broker.login import Peer
    from dsmq.broker.transport import Stream, Transport

# How often an event loop reports that it is alive and measures the delay of its timers.
PULSE_SECONDS = 1.0
# A turn that takes longer than this stores puts and sends replies along the way. Each connection may run requests for a
# slice of this time, which is shorter if more connections are ready. If there are many, each runs a single request at
# first.
TURN_SECONDS = 0.004
MOST_SLICE_SECONDS = TURN_SECONDS / 4
LEAST_SLICE_SECONDS = 0.0001
CROWD = 200
# How often to check for room while a connection waits for it.
ROOM_SECONDS = 0.005

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class EventLoop:
    """One I/O worker. Other threads may call only the methods that are documented as thread-safe."""

    def __init__(self, name: str, context: ServerContext, workers: Sequence[EventLoop]) -> None:
        """`workers` are all event loops that share the store, including this one."""
        self.context = context
        self.counters = Counters(commands=dict.fromkeys((command.name for command in context.commands.all.values()), 0))
        self.now = time.monotonic()
        self.connections: dict[Connection, None] = {}
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.slice_seconds = TURN_SECONDS
        """How long one connection may run requests at a time; 0: for a single request."""
        self.memory = MemoryQueue(context.usage)
        self.waiters = Waiters(self, context.usage, MOST_SLICE_SECONDS)
        self.batch = PutBatch(self, workers)
        self._poller = Poller()
        self.to_flush: list[Transport] = []
        """Transports with replies to send at the end of the turn."""
        # Connections with requests left after their slice of a turn, in the order in which they continue.
        self._to_run: OrderedDict[Connection, None] = OrderedDict()
        self._timers = Timers()
        self._posted: deque[Callable[[], None]] = deque()
        self._busy_poll_seconds = context.settings.busy_poll_microseconds / 1e6
        self._poll_not_before = self._poll_until = 0.0
        self._answered_at = self._pulse_at = self.now
        self._stop_at = math.inf
        self._waker = _Waker(self._run_posted)
        self._poller.watch(self._waker.fileno(), self._waker, EVENT_READ)

    @property
    def due_at(self) -> float:
        """If the loop has not begun another turn by this time, it is stuck."""
        return self.now + PULSE_SECONDS

    # From other threads

    def post(self, call: Callable[[], None]) -> None:
        """Run this in the loop's thread. Thread-safe."""
        self._posted.append(call)
        self._waker.ring()

    def start(self) -> None:
        self.thread.start()

    def stop(self, seconds: float) -> None:
        """Reply to waiting readers, close all connections, and end, within this time. Thread-safe."""
        # The time counts from now, because the current turn may take long.
        self.post(partial(self._drain, time.monotonic() + seconds))

    def abandon(self) -> None:
        """Close a forked process's copies of the sockets."""
        for connection in self.connections:
            connection.transport.socket.close()
        self._close_poller()

    # Listeners and connections

    def listen(self, listeners: Sequence[Listener]) -> None:
        """Accept connections from these listeners. Must be called before `start`, or posted."""
        for listener in listeners:
            listener.loop = self
            self._poller.watch(listener.fileno(), listener, EVENT_READ)

    def unlisten(self, listener: Listener) -> None:
        """Stop accepting from this listener, for now."""
        self._poller.watch(listener.fileno(), listener, 0)

    def add_connection(self, sock: Stream, peer: Peer) -> None:
        connection = Connection(self, sock, peer)
        self.connections[connection] = None
        self.counters.opened += 1
        if connection.unauthenticated:
            unauthenticated = self.context.usage.unauthenticated
            unauthenticated.add(connection, 1)
            while (oldest := unauthenticated.take_excess()) is not None:
                limit = f"max_unauthenticated_connections = {unauthenticated.limit}"
                error = Busy(f"too many unauthenticated connections ({limit})")
                oldest.loop.post(partial(oldest.close_with_error, error))
        connection.open()

    def remove_connection(self, connection: Connection) -> None:
        del self.connections[connection]
        self.memory.drop(connection)
        self.context.usage.connections.add(connection.peer.client_key, -1)
        self.context.usage.unauthenticated.drop(connection)

    def apply_settings(self) -> None:
        """Apply reloaded settings to all connections. Must be posted."""
        self._for_all(lambda connection: connection.apply_settings())

    def close_connections(self, reason: str) -> None:
        """Close all connections immediately. Must be posted."""
        self._for_all(lambda connection: connection.close(reason))

    def _drain(self, until: float) -> None:
        self._stop_at = until
        self._for_all(lambda connection: connection.drain())

    def _for_all(self, call: Callable[[Connection], None]) -> None:
        for connection in list(self.connections):
            try:
                call(connection)
            except Exception:  # noqa: BLE001
                connection.on_failure()

    def watch(self, connection: Connection, events: int) -> None:
        """Call `on_ready` for these events of the socket from now on, instead of the previous ones."""
        connection.transport.events = events
        self._poller.watch(connection.transport.fileno(), connection.requests, events)

    def run_soon(self, connection: Connection) -> None:
        self._to_run[connection] = None

    def schedule(self, target: TimerTarget, when: float) -> None:
        self._timers.schedule(target, when, len(self.connections))

    # The loop

    def _run(self) -> None:
        try:
            while self._answered_at < self._stop_at and (self.connections or self._stop_at == math.inf):
                self._turn()
        finally:
            self.close()

    def close(self) -> None:
        """Close everything. Called in the loop's thread, or in another one if that thread never started."""
        for connection in list(self.connections):
            connection.close("the server has stopped")
        self._close_poller()

    def _close_poller(self) -> None:
        self._poller.close()
        self._waker.close()

    def _turn(self) -> None:
        before = self.counters.requests
        # Timers run only after the sockets have been read once more, so that what arrived in time does not count as
        # late, even if the process was stopped (SIGSTOP).
        due = self.now
        ready = self._wait()
        self.now = self._answered_at = time.monotonic()
        if ready:
            self._poll_until = self.now + self._busy_poll_seconds
        many = len(ready) + len(self._to_run) > 4
        self.slice_seconds = _slice_seconds(len(ready)) if many else MOST_SLICE_SECONDS
        # An exception closes only its connection; on_failure logs and counts it.
        for target, events in ready:
            try:
                target.on_ready(events)
            except Exception:  # noqa: BLE001
                target.on_failure()
            if many and time.monotonic() > self._answered_at + TURN_SECONDS and self._is_over():
                return
        if self._to_run and self._go_on(many=many):
            return
        if self.now >= self._pulse_at:
            self.counters.lag_seconds.add(self.now - self._pulse_at)
            self._pulse_at = self.now + PULSE_SECONDS
        if self._timers.next_at <= due:
            self._timers.run(due)
        if self.waiters.to_wake or self.waiters.unmatched:
            self.waiters.serve()
        if self.memory.is_short:
            self.memory.serve(self.now, MOST_SLICE_SECONDS)
        self._answer()
        if requests := self.counters.requests - before:
            self.counters.request_seconds.add(self._answered_at - self.now, requests)

    def _go_on(self, *, many: bool) -> bool:
        """Run requests left over from earlier turns, for as long as the ready connections took in this one.

        So a client that sends an occasional request does not wait for clients that send many at once. Return whether
        the server must stop now.
        """
        self.slice_seconds = max(LEAST_SLICE_SECONDS, _slice_seconds(len(self._to_run)))
        now = time.monotonic()
        until = now + max(TURN_SECONDS, now - self.now)
        # Serve each connection once: if it still has requests, it moves to the end of the queue.
        for _ in range(len(self._to_run)):
            connection, _ = self._to_run.popitem(last=False)
            try:
                connection.requests.run()
            except Exception:  # noqa: BLE001
                connection.on_failure()
            now = time.monotonic()
            if many and now > self._answered_at + TURN_SECONDS and self._is_over():
                return True
            if now >= until:
                break
        return False

    def _is_over(self) -> bool:
        """In a long turn, reply to the first requests now; return whether the server must stop now."""
        self._answer()
        return self._answered_at >= self._stop_at

    def _answer(self) -> None:
        """Store the puts of the batch and send the replies."""
        while self.batch.puts:
            self.batch.commit()
        to_flush, self.to_flush = self.to_flush, []
        for transport in to_flush:
            try:
                transport.flush()
            except Exception:  # noqa: BLE001
                transport.connection.on_failure()
        self._answered_at = time.monotonic()

    def _wait(self) -> list[tuple[Any, int]]:
        """Wait until sockets are ready and return them.

        Poll for a moment before sleeping: waking a processor takes longer than most requests, especially in a virtual
        machine.
        """
        if self._to_run or self.waiters.to_wake or self.waiters.unmatched:
            return self._poller.wait(0)
        now = self._answered_at
        while self._poll_not_before <= now < self._poll_until:
            if ready := self._poller.wait(0):
                return ready
            self._flush_store()
            # A client may be waiting for this processor.
            yield_processor()
            before, now = now, time.monotonic()
            if now - before > LONG_YIELD_SECONDS:
                self._poll_not_before = now + LONG_YIELD_PAUSE_SECONDS
        self._flush_store()
        until = min(self._timers.next_at, self._pulse_at, self._stop_at)
        if self.memory.is_short:
            until = min(until, self.now + ROOM_SECONDS)
        return self._poller.wait(until - time.monotonic())

    def _flush_store(self) -> None:
        try:
            self.context.store.flush()
        except ReplyError as error:
            # The next put that needs a flush will fail, and its client gets the error.
            _logger.debug("the write buffer could not be flushed: %s", error)
        except Exception:  # noqa: BLE001
            self._log_defect("writing failed because of a bug")

    def _run_posted(self) -> None:
        while self._posted:
            try:
                self._posted.popleft()()
            except Exception:  # noqa: BLE001
                self._log_defect("a posted call failed")

    def _log_defect(self, message: str) -> None:
        _logger.exception(message, extra=logs.event("defect"))
        self.counters.failures += 1

    def when_done(self, answer: Future[T], call: Callable[[T | ReplyError], None]) -> None:
        """When the store answers, call this in the loop's thread with the answer or with the error to reply."""

        def pass_on(done: Future[T]) -> None:
            result = _result(done)
            self.post(partial(call, result))

        answer.add_done_callback(pass_on)


class _Waker:
    """Wakes an event loop from another thread."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._inside, self._outside = socket.socketpair()
        self._inside.setblocking(False)
        self._outside.setblocking(False)
        self._rung = False

    def fileno(self) -> int:
        return self._inside.fileno()

    def ring(self) -> None:
        if not self._rung:
            self._rung = True
            # Fails if the loop has ended.
            with suppress(OSError):
                self._outside.send(b"!")

    def on_ready(self, _: int) -> None:
        self._inside.recv(64)
        # Reset the waker before taking the calls, so that a call posted afterwards wakes the loop again.
        self._rung = False
        self._call()

    def on_failure(self) -> None:
        _logger.exception("the waker failed")

    def close(self) -> None:
        self._inside.close()
        self._outside.close()


def _result(answer: Future[T]) -> T | ReplyError:
    try:
        return answer.result()
    except ReplyError as error:
        return error
    except Exception as error:  # noqa: BLE001 - whatever went wrong in the store
        return StoreFailed(str(error))


def _slice_seconds(count: int) -> float:
    """Return how long each of `count` connections may run requests in one turn; 0: a single request."""
    if count > CROWD:
        return 0.0
    return max(LEAST_SLICE_SECONDS, TURN_SECONDS / max(4, count))


def wake_readers(workers: Sequence[EventLoop], topics: set[bytes]) -> None:
    for worker in workers:
        if worker.waiters.by_topic or worker.waiters.patterns.waiting:
            worker.waiters.wake(topics)


def disconnect_clients(workers: Sequence[EventLoop], reason: str) -> None:
    """Disconnect clients without a notice, which would mean that unanswered puts are not stored."""
    if connections := sum(len(worker.connections) for worker in workers):
        about = logs.event("disconnecting", connections=connections, reason=reason)
        _logger.info("disconnecting %d clients: %s", connections, reason, extra=about)
    for worker in workers:
        worker.post(partial(worker.close_connections, reason))
