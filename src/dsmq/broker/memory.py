"""What is done when memory for connections is short."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from dsmq.broker import usage
from dsmq.broker.states import BEHIND
from dsmq.broker.transport import RECEIVE_BYTES
from dsmq.broker.usage import Budget, Usage
from dsmq.errors import TimedOut

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection

# How often to close slow clients while a connection waits for room.
CLOSE_SECONDS = 0.05

_logger = logging.getLogger(__name__)


class MemoryQueue:
    """The connections of one event loop that wait for room in a budget."""

    def __init__(self, totals: Usage) -> None:
        self.is_short = False
        """Whether somebody waits, or a budget is exceeded."""
        self._budgets = (totals.replies, totals.requests)
        self._waiting: dict[Connection, None] = {}
        self._close_at = 0.0

    def add(self, connection: Connection) -> None:
        self._waiting[connection] = None
        self.is_short = True

    def remove(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)
        for budget in self._budgets:
            budget.leave(connection)

    def serve(self, now: float, seconds: float) -> None:
        """Serve those for whom there is room now; close slow clients if others have waited too long for it."""
        self.is_short = False
        if closes := now >= self._close_at:
            self._close_at = now + CLOSE_SECONDS
        for budget in self._budgets:
            self._serve(budget, seconds)
            if closes and (missing := budget.missing(now - usage.SLOW_SECONDS)) > 0:
                self.is_short = True
                _close_slow(budget, missing, seconds)
                if budget is self._budgets[1]:
                    # Those that wait for room for a reply need no help: they hold nothing of that budget.
                    for connection in budget.blockers():
                        connection.loop.post(partial(_make_way, connection, budget, is_blocker=True))
        self.is_short = self.is_short or bool(self._waiting)

    def _serve(self, budget: Budget, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (first := budget.first_that_fits()) in self._waiting and time.monotonic() < until:
            del self._waiting[first]
            try:
                first.on_room(budget)
            except Exception:  # noqa: BLE001
                first.on_failure()
            if first not in self._waiting:
                budget.leave(first)


def _close_slow(budget: Budget, missing: int, seconds: float) -> None:
    now = time.monotonic()
    for connection, held in budget.largest():
        if missing <= 0 or time.monotonic() >= now + seconds:
            break
        if _is_slow(connection, budget, now):
            missing -= held
            connection.loop.post(partial(_make_way, connection, budget))


def _is_slow(connection: Connection, budget: Budget, now: float) -> bool:
    """Return whether a connection makes too little progress to keep memory that others need. Thread-safe."""
    requests, transport = connection.requests, connection.transport
    if budget is transport.budget:
        return now > transport.slow_from
    if budget.is_waiting(connection):
        # It waits itself, and not by its own fault, unless it holds more than comes before its length is known, or
        # a transaction: if all hold some of theirs and wait for the rest, none gets on.
        return requests.reserved > 2 * RECEIVE_BYTES or requests.transaction is not None
    if requests.incomplete_since < now:
        return now > requests.slow_from
    # A client that is reading its replies gets on.
    return connection.state is not BEHIND or now > transport.slow_from


def _make_way(connection: Connection, budget: Budget, *, is_blocker: bool = False) -> None:
    """Disconnect a client for the sake of others, unless it has got on meanwhile."""
    goes = budget.is_waiting(connection) if is_blocker else _is_slow(connection, budget, time.monotonic())
    if connection.closed or not budget.of(connection) or not goes:
        return
    about = "memory is short, and it is slow"
    _logger.info("%r: dropped, %s", connection, about, extra=connection.event("dropped"))
    if budget is connection.transport.budget or not connection.requests.missing:
        connection.close(about)
        return
    connection.requests.clear()
    connection.reject(TimedOut("the request arrives too slowly while memory is short"))
