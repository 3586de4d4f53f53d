"""The deadlines of connections and the timers of an event loop."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from dsmq.broker.states import FINISHING, LINGERING, OPEN, WAITING
from dsmq.errors import TimedOut

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.listener import Listener

TimerTarget: TypeAlias = "Connection | Listener"

# Max timers handled in one turn.
MAX_TIMERS = 100

_logger = logging.getLogger(__name__)


def deadlines(connection: Connection) -> Iterator[tuple[float, Callable[[], None]]]:
    """Yield the time and action of each deadline, in order of precedence."""
    settings, state, transport = connection.context.settings, connection.state, connection.transport
    if state is LINGERING:
        yield transport.active_at + transport.linger_seconds, partial(connection.close, "closed by the server")
    # A client may send a long pipeline before it reads the first reply.
    unread_since = max(transport.unread_since, transport.active_at)
    yield unread_since + settings.reply_timeout_seconds, partial(_drop_unread, connection)
    if state >= FINISHING:
        return
    yield connection.login.deadline, partial(_end_login, connection)
    if state is WAITING and connection.reads.pending is not None:
        yield connection.reads.pending.deadline, connection.reads.stop_waiting
        yield connection.reads.pending.retry_at, connection.reads.wake
    if state is OPEN:
        error = TimedOut("the request did not arrive in time")
        yield connection.requests.deadline(), partial(connection.reject, error)
    if settings.idle_timeout_seconds:
        is_idle = state is OPEN and not transport.data
        idle_since = transport.active_at if is_idle else connection.loop.now
        yield idle_since + settings.idle_timeout_seconds, partial(_end_idle, connection)


def _drop_unread(connection: Connection) -> None:
    about = "did not read its replies"
    _logger.info("%r: dropped: %s", connection, about, extra=connection.event("dropped"))
    connection.close(about)


def _end_login(connection: Connection) -> None:
    error = TimedOut("authentication or TLS handshake timed out")
    if connection.login.gave_wrong_token:
        connection.finish()
    elif len(connection.requests.parser):
        connection.reject(error)
    else:
        connection.close_with_error(error)


def _end_idle(connection: Connection) -> None:
    error = TimedOut("idle for too long")
    connection.log_rejected(error)
    connection.end(error)


class Timers:
    """Calls each target's `on_timer` at its scheduled time; a new time replaces the previous one."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, TimerTarget]] = []
        self._numbers = itertools.count()
        self.next_at = math.inf

    def schedule(self, target: TimerTarget, when: float, targets: int) -> None:
        """`targets` is the expected number of targets."""
        target.scheduled = when
        heapq.heappush(self._heap, (when, next(self._numbers), target))
        if len(self._heap) > 2 * targets + 64:
            # Most timers belong to closed connections or were replaced by earlier ones.
            self._heap = [timer for timer in self._heap if _is_valid(*timer)]
            heapq.heapify(self._heap)
        self.next_at = self._heap[0][0] if self._heap else math.inf

    def run(self, now: float) -> None:
        # Remove them first: timers that the actions schedule belong to the next turn.
        due: list[tuple[float, int, TimerTarget]] = []
        while self._heap and self._heap[0][0] <= now and len(due) < MAX_TIMERS:
            due.append(heapq.heappop(self._heap))
        self.next_at = self._heap[0][0] if self._heap else math.inf
        for timer in due:
            if _is_valid(*timer):
                target = timer[2]
                target.scheduled = math.inf
                try:
                    target.on_timer(now)
                except Exception:  # noqa: BLE001
                    target.on_failure()


def _is_valid(when: float, _: int, target: TimerTarget) -> bool:
    return not target.closed and when == target.scheduled
