"""The event loop of one I/O worker: a thread that serves its share of the connections and never blocks.

A turn: see which sockets are ready, read and run their requests, store all messages put meanwhile at once, wake the
readers who wait for them, and send the replies.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from dsmq import logs
from dsmq.broker.commands import COMMANDS
from dsmq.broker.connection import SLOW_SECONDS, Connection, Peer, Stream
from dsmq.broker.context import ServerContext
from dsmq.broker.counters import Counters
from dsmq.broker.listener import Listener
from dsmq.broker.reads import T, outcome
from dsmq.broker.usage import Budget
from dsmq.errors import Busy, ReplyError, StoreFailed
from dsmq.store.api import Answer, Put
from dsmq.system import LONG_YIELD_PAUSE_SECONDS, LONG_YIELD_SECONDS, yield_processor

# How often a worker shows that it lives, and measures how late it looks at its timers.
PULSE_SECONDS = 1.0
# After so long the puts and replies of a turn are not held back any more; and how long one connection may run requests
# in it: the longest if few others do, the shortest if many do. In a crowd, each runs one of those that have just come.
TURN_SECONDS = 0.004
MOST_SLICE_SECONDS = TURN_SECONDS / 4
LEAST_SLICE_SECONDS = 0.0001
CROWD = 200
# Timers that are due and looked after in one turn.
MAX_TIMERS = 100
# While there is no room for somebody: how often to look for some, and to close those that are slow.
ROOM_SECONDS = 0.005
CLOSE_SECONDS = 0.05
# Put within one turn before they are stored, so that a turn's messages need not all fit in memory twice.
MAX_BATCH_BYTES = 1_048_576
# What each put counts there beside its message, so that no more than 500 are stored at once.
PUT_BYTES = MAX_BATCH_BYTES // 500

_logger = logging.getLogger(__name__)


class TimerTarget(Protocol):
    """What the timers know."""

    closed: bool
    scheduled: float

    def on_timer(self) -> None:
        """Do what is due."""

    def on_failure(self) -> None:
        """Deal with the exception that `on_timer` has just raised."""


class EventLoop:
    """One I/O worker. `post` and `wake` may be called from any thread, the rest is its own."""

    def __init__(self, name: str, context: ServerContext, workers: Sequence[EventLoop]) -> None:
        """`workers` are all that share the store, this one among them."""
        self.context = context
        self.counters = Counters(commands=dict.fromkeys((command.name for command in COMMANDS.values()), 0))
        self.now = time.monotonic()
        self.connections: dict[Connection, None] = {}
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._workers = workers
        self._selector = selectors.DefaultSelector()
        # What has been put in this turn, and by whom.
        self._puts: list[Put] = []
        self._putters: list[Connection] = []
        self._put_bytes = 0
        self._waiters: dict[bytes, dict[Connection, None]] = {}
        # Woken by a put, but not yet looked after: they may be many.
        self._to_wake: dict[Connection, None] = {}
        # Those that wait for room in a budget; and whether there are some, or a budget is exceeded.
        self._cramped: dict[Connection, None] = {}
        self._short_of_room = False
        self.slice_seconds = TURN_SECONDS
        """How long one connection may run requests before others have their turn; 0 stands for one request."""
        self._to_flush: list[Connection] = []
        # Those that have more requests than they could run in their time, in the order in which they go on.
        self._to_run: deque[Connection] = deque()
        self._timers: list[tuple[float, int, TimerTarget]] = []
        self._timer_number = itertools.count()
        self._posted: deque[Callable[[], None]] = deque()
        self._busy_poll_seconds = context.settings.busy_poll_microseconds / 1e6
        self._poll_not_before = self._poll_until = self._close_at = 0.0
        self._answered_at = self.now
        self._stop_at = math.inf
        self._waker = _Waker(self._run_posted)
        self._selector.register(self._waker, selectors.EVENT_READ, self._waker)

    @property
    def due_at(self) -> float:
        """When the loop should have begun another turn, at the latest."""
        return self.now + PULSE_SECONDS

    # From other threads

    def start(self) -> None:
        """Begin to serve."""
        self.thread.start()

    def post(self, call: Callable[[], None]) -> None:
        self._posted.append(call)
        self._waker.ring()

    def listen(self, listeners: Sequence[Listener]) -> None:
        """Accept connections from these listeners. To be called before `start`, or posted."""
        for listener in listeners:
            listener.loop = self
            self._selector.register(listener, selectors.EVENT_READ, listener)

    def unlisten(self, listener: Listener) -> None:
        """Accept no more from this listener, for now."""
        if listener in self._selector.get_map():
            self._selector.unregister(listener)

    def add_connection(self, sock: Stream, peer: Peer) -> None:
        """Serve this connection from now on."""
        connection = Connection(self, sock, peer)
        self.connections[connection] = None
        self.counters.opened += 1
        if connection.unauthenticated:
            unauthenticated = self.context.usage.unauthenticated
            unauthenticated.add(connection, 1)
            while (oldest := unauthenticated.take_excess()) is not None:
                oldest.post(partial(oldest.close_with_error, Busy("too many others have not shown their token yet")))
        connection.open()
        # The rules may have changed since it was accepted, in another thread.
        connection.apply_access()

    def admit(self, connection: Connection) -> None:
        self.context.usage.unauthenticated.drop(connection)

    def apply_settings(self) -> None:
        """Apply reloaded settings to all connections. To be posted."""
        self._for_all(Connection.apply_settings)

    def _for_all(self, call: Callable[[Connection], None]) -> None:
        for connection in list(self.connections):
            try:
                call(connection)
            except Exception:  # noqa: BLE001
                connection.on_failure()

    def stop(self, seconds: float) -> None:
        """Answer the waiting readers, close all connections, and end; give up on unsent replies after that time."""
        # Counted from now: the turn that is under way may take its time.
        self.post(partial(self._drain, time.monotonic() + seconds))

    # The loop

    def _run(self) -> None:
        _LagProbe(self).on_timer()
        try:
            while not (self._stop_at < math.inf and self._stopped()):
                self._turn()
        finally:
            self.close()

    def close(self) -> None:
        """Close everything. For its own thread, or where that never ran."""
        for connection in list(self.connections):
            connection.close("the server has stopped")
        self._selector.close()
        self._waker.close()

    def abandon(self) -> None:
        """Close the copies of the sockets that a forked process has."""
        for connection in self.connections:
            connection.abandon()
        self._selector.close()
        self._waker.close()

    def _turn(self) -> None:
        before = self.counters.requests
        ready = self._wait()
        self.now = time.monotonic()
        if ready:
            self._poll_until = self.now + self._busy_poll_seconds
        self._answered_at = self.now
        many = len(ready) + len(self._to_run) > 4
        self.slice_seconds = _slice_seconds(len(ready)) if many else MOST_SLICE_SECONDS
        # Whatever goes wrong with one connection costs that connection alone; on_failure logs and counts it.
        for key, events in ready:
            try:
                key.data.on_ready(events)
            except Exception:  # noqa: BLE001
                key.data.on_failure()
            if many and self._is_over():
                return
        if self._to_run and self._go_on(many=many):
            return
        if self._timers and self._timers[0][0] <= self.now:
            self._run_timers()
        if self._to_wake:
            self._wake_some()
        if self._short_of_room:
            self._make_room()
        self._answer()
        if requests := self.counters.requests - before:
            self.counters.request_seconds.add(self._answered_at - self.now, requests)

    def _go_on(self, *, many: bool) -> bool:
        """Let connections run the requests that they have left, for as long as it took to serve those that were ready.

        So who sends a request now and then does not wait for all who send many at once. Return whether it is too late.
        """
        self.slice_seconds = max(LEAST_SLICE_SECONDS, _slice_seconds(len(self._to_run)))
        now = time.monotonic()
        until = now + max(TURN_SECONDS, now - self.now)
        # Each once: who has still some left stands at the end of the queue again.
        for _ in range(len(self._to_run)):
            connection = self._to_run.popleft()
            try:
                connection.run()
            except Exception:  # noqa: BLE001
                connection.on_failure()
            if many and self._is_over():
                return True
            if time.monotonic() >= until:
                break
        return False

    def _is_over(self) -> bool:
        """In a long turn, answer those who came first; return whether it is too late for the others, in a stop."""
        now = time.monotonic()
        if now > self._answered_at + TURN_SECONDS:
            self._answer()
        return now >= self._stop_at

    def _answer(self) -> None:
        """Store what has been put, and send the replies. In a long turn, those who came first do not wait for all."""
        while self._puts:
            self.commit()
        to_flush, self._to_flush = self._to_flush, []
        for connection in to_flush:
            try:
                connection.flush()
            except Exception:  # noqa: BLE001
                connection.on_failure()
        self._answered_at = time.monotonic()

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Return the sockets that are ready, when there are some.

        For a moment after the last one it looks without going to sleep: to wake a processor that sleeps takes longer,
        in virtual machines above all, than most requests.
        """
        if self._to_run or self._to_wake:
            return self._selector.select(0)
        now = self._answered_at
        while self._poll_not_before <= now < self._poll_until:
            if ready := self._selector.select(0):
                return ready
            self._flush_store()
            # Where a client waits for this processor, it gets it.
            yield_processor()
            before, now = now, time.monotonic()
            if now - before > LONG_YIELD_SECONDS:
                self._poll_not_before = now + LONG_YIELD_PAUSE_SECONDS
        self._flush_store()
        # Where the process was stopped meanwhile (SIGSTOP) it returns nothing, whatever has come; then the timers would
        # find requests late that are there.
        return self._selector.select(self._timeout()) or self._selector.select(0)

    def _flush_store(self) -> None:
        try:
            self.context.store.flush()
        except ReplyError as error:
            # The put that needs it will fail, and tell its client.
            _logger.debug("nothing written: %s", error)
        except Exception:
            _logger.exception("writing failed by a defect", extra=logs.event("defect"))
            self.counters.failures += 1

    def _run_posted(self) -> None:
        while self._posted:
            try:
                self._posted.popleft()()
            except Exception:
                _logger.exception("a posted call failed", extra=logs.event("defect"))
                self.counters.failures += 1

    # Timers

    def _timeout(self) -> float | None:
        soonest = min(self._timers[0][0] if self._timers else math.inf, self._stop_at)
        if self._short_of_room:
            soonest = min(soonest, self.now + ROOM_SECONDS)
        if soonest == math.inf:
            return None
        return max(0.0, soonest - time.monotonic())

    def schedule(self, subject: TimerTarget, when: float) -> None:
        subject.scheduled = when
        heapq.heappush(self._timers, (when, next(self._timer_number), subject))
        if len(self._timers) > 2 * len(self.connections) + 64:
            # Most are of connections that are closed, or have been replaced by earlier ones.
            self._timers = [timer for timer in self._timers if _is_due(*timer)]
            heapq.heapify(self._timers)

    def _run_timers(self) -> None:
        due: list[tuple[float, int, TimerTarget]] = []
        while self._timers and self._timers[0][0] <= self.now and len(due) < MAX_TIMERS:
            due.append(heapq.heappop(self._timers))
        for timer in due:
            if _is_due(*timer):
                subject = timer[2]
                subject.scheduled = math.inf
                try:
                    subject.on_timer()
                except Exception:  # noqa: BLE001
                    subject.on_failure()

    # Messages

    def put(self, connection: Connection, put: Put) -> None:
        self._puts.append(put)
        self._putters.append(connection)
        self._put_bytes += len(put[1]) + PUT_BYTES
        if self._put_bytes >= MAX_BATCH_BYTES:
            self.commit()

    def commit(self) -> None:
        """Store and answer all puts of this turn."""
        puts, putters = self._puts, self._putters
        self._puts, self._putters, self._put_bytes = [], [], 0
        if puts:
            self._store(puts, putters)

    def _store(self, puts: list[Put], putters: list[Connection]) -> None:
        stored = self.append(puts)
        if isinstance(stored, Future):
            for connection in putters:
                connection.park()
            self.when_done(stored, partial(self._answer_later, putters))
        elif isinstance(stored, ReplyError) and len(puts) > 1:
            # One by one, so that a message that can't be stored fails alone.
            for put, connection in zip(puts, putters, strict=True):
                self._store([put], [connection])
        else:
            _answer_puts(putters, stored)

    def _answer_later(self, putters: list[Connection], stored: list[int] | ReplyError) -> None:
        _answer_puts(putters, stored)
        for connection in dict.fromkeys(putters):
            connection.resume()

    def append(self, puts: list[Put]) -> Answer[list[int]] | ReplyError:
        """Store all of these puts or none, and wake the readers that wait for them; return the ids or the error."""
        try:
            stored = self.context.store.append(puts)
        except ReplyError as error:
            return error
        except Exception:
            _logger.exception("storing failed by a defect", extra=logs.event("defect"))
            self.counters.failures += 1
            return StoreFailed("a defect; see the server's log")
        if isinstance(stored, Future):
            stored.add_done_callback(lambda done: None if done.exception() else self._wake_all(puts))
        else:
            self._wake_all(puts)
        return stored

    def when_done(self, answer: Future[T], call: Callable[[T | ReplyError], None]) -> None:
        """Call with what a store answers later, or with the error to reply with, in this thread."""

        def pass_on(done: Future[T]) -> None:
            result = outcome(done)
            self.post(partial(call, result))

        answer.add_done_callback(pass_on)

    def _wake_all(self, puts: Sequence[Put]) -> None:
        for worker in self._workers:
            worker.wake(puts)

    def wake(self, puts: Sequence[Put]) -> None:
        """Have its waiting readers look for what has been put. Safe to call from any thread."""
        if not self._waiters:
            return
        topics = {put[0] for put in puts if put[0] in self._waiters}
        if threading.get_ident() == self.thread.ident:
            self._wake(topics)
        elif topics:
            self.post(partial(self._wake, topics))

    def _wake(self, topics: Iterable[bytes]) -> None:
        for topic in topics:
            self._to_wake.update(self._waiters.get(topic, ()))
        self._wake_some()

    def _wake_some(self) -> None:
        """Wake those that wait for what has been put, as many as there is time for; the others in the next turn."""
        until = time.monotonic() + MOST_SLICE_SECONDS
        while self._to_wake:
            connection = next(iter(self._to_wake))
            del self._to_wake[connection]
            try:
                connection.wake()
            except Exception:  # noqa: BLE001
                connection.on_failure()
            if time.monotonic() >= until:
                return

    def add_waiter(self, topic: bytes, connection: Connection) -> None:
        if not self.context.usage.waiting.claim(connection, 1):
            raise Busy("as many clients wait for messages as may")
        self._waiters.setdefault(topic, {})[connection] = None

    def remove_waiter(self, topic: bytes, connection: Connection) -> None:
        self.context.usage.waiting.drop(connection)
        waiters = self._waiters[topic]
        del waiters[connection]
        if not waiters:
            del self._waiters[topic]

    # Connections

    def await_room(self, connection: Connection) -> None:
        self._cramped[connection] = None
        self._short_of_room = True

    def leave_queue(self, connection: Connection) -> None:
        self._cramped.pop(connection, None)
        for budget in (self.context.usage.replies, self.context.usage.requests):
            budget.leave(connection)

    def relieve(self) -> None:
        self._short_of_room = True

    def _make_room(self) -> None:
        """Serve those for whom there is room now; close slow ones if others have waited too long for it."""
        self._short_of_room = False
        if closes := self.now >= self._close_at:
            self._close_at = self.now + CLOSE_SECONDS
        for budget in (self.context.usage.replies, self.context.usage.requests):
            self._serve_queue(budget)
            if closes and (missing := budget.missing(self.now - SLOW_SECONDS)) > 0:
                self._close_slow(budget, missing)
        self._short_of_room = self._short_of_room or bool(self._cramped)

    def _serve_queue(self, budget: Budget) -> None:
        until = time.monotonic() + MOST_SLICE_SECONDS
        while (first := budget.first_that_fits()) in self._cramped and time.monotonic() < until:
            del self._cramped[first]
            try:
                first.on_room()
            except Exception:  # noqa: BLE001
                first.on_failure()
            if first not in self._cramped:
                budget.leave(first)

    def _close_slow(self, budget: Budget, missing: int) -> None:
        self._short_of_room = True
        now = time.monotonic()
        until = now + MOST_SLICE_SECONDS
        for connection, held in budget.largest():
            if missing <= 0 or time.monotonic() >= until:
                break
            if connection.may_go(budget, now):
                missing -= held
                connection.post(partial(connection.make_way, budget))
        if budget is self.context.usage.requests:
            # Of replies, those that wait get rid of what they hold by themselves.
            for connection in budget.blockers():
                connection.post(partial(connection.make_way, budget, waits=True))

    def watch(self, connection: Connection, events: int) -> None:
        known = connection in self._selector.get_map()
        if events and known:
            self._selector.modify(connection, events, connection)
        elif events:
            self._selector.register(connection, events, connection)
        elif known:
            self._selector.unregister(connection)

    def flush_soon(self, connection: Connection) -> None:
        self._to_flush.append(connection)

    def run_soon(self, connection: Connection) -> None:
        self._to_run.append(connection)

    def remove_connection(self, connection: Connection) -> None:
        self.watch(connection, 0)
        del self.connections[connection]
        self._cramped.pop(connection, None)
        usage = self.context.usage
        usage.connections.add(connection.peer.client_key, -1)
        for of_connections in (usage.unauthenticated, usage.replies, usage.requests):
            of_connections.drop(connection)

    # Stopping

    def _drain(self, until: float) -> None:
        self._stop_at = until
        self._for_all(Connection.drain)

    def _stopped(self) -> bool:
        return not self.connections or time.monotonic() >= self._stop_at


class _LagProbe:
    """Measures how late the loop looks at its timers."""

    def __init__(self, worker: EventLoop) -> None:
        self.closed = False
        self.scheduled = worker.now
        self._worker = worker
        self._due = worker.now

    def on_timer(self) -> None:
        """Note how late it is called, and be called again."""
        self._worker.counters.lag_seconds.add(max(0.0, self._worker.now - self._due))
        self._due = self._worker.now + PULSE_SECONDS
        self._worker.schedule(self, self._due)

    def on_failure(self) -> None:
        """Nothing in it can fail but by a defect of the loop."""
        _logger.exception("the pulse failed")


class _Waker:
    """Wakes a selector from another thread."""

    def __init__(self, answer: Callable[[], None]) -> None:
        self._answer = answer
        self._inside, self._outside = socket.socketpair()
        self._inside.setblocking(False)
        self._outside.setblocking(False)
        self._rung = False

    def fileno(self) -> int:
        return self._inside.fileno()

    def ring(self) -> None:
        if not self._rung:
            self._rung = True
            try:
                self._outside.send(b"!")
            except OSError as error:
                # The loop has ended, or has been rung already.
                _logger.debug("bell: %s", error)

    def on_ready(self, _: int) -> None:
        self._inside.recv(64)
        # Silenced before the calls are taken: one posted from now on rings again.
        self._rung = False
        self._answer()

    def on_failure(self) -> None:
        _logger.exception("the bell failed")

    def close(self) -> None:
        self._inside.close()
        self._outside.close()


def _answer_puts(putters: list[Connection], stored: list[int] | ReplyError) -> None:
    if isinstance(stored, ReplyError):
        for connection in putters:
            connection.not_stored(stored)
        return
    for connection, message_id in zip(putters, stored, strict=True):
        connection.stored(message_id)


def _slice_seconds(count: int) -> float:
    """Return how long each of so many connections may run requests in one turn; 0 stands for one request."""
    if count > CROWD:
        return 0.0
    return max(LEAST_SLICE_SECONDS, TURN_SECONDS / max(4, count))


def _is_due(when: float, _: int, subject: TimerTarget) -> bool:
    return not subject.closed and when == subject.scheduled
