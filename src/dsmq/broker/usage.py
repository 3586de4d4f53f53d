"""Totals over the connections of all event loops: their number and their memory."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Hashable, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Generic, TypeVar

from dsmq.broker.states import BEHIND
from dsmq.errors import TimedOut
from dsmq.wire.limits import REQUEST_OVERHEAD_BYTES

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.settings import Settings

# Max uncounted bytes of each kind per connection, so that short requests and replies still get through when the total
# is used up. With 10,000 connections, these bytes add up to 40 MB of each kind.
FREE_BYTES = 4096
# Claims up to this size may overtake larger ones, so that a few long messages do not delay everything else.
SHORT_BYTES = 262_144

# The time limit for long requests assumes this speed. If memory is short, clients that have been slower for a while are
# dropped first.
SLOW_BYTES_PER_SECOND = 16_384
SLOW_SECONDS = 1.0

# Max bytes received at once.
RECEIVE_BYTES = 131_072

# How often to close slow clients while a connection waits for room.
CLOSE_SECONDS = 0.05

# The memory overhead of a parsed request and of each of its arguments.
REQUEST_OBJECT_BYTES = 100
ARGUMENT_OBJECT_BYTES = 40

H = TypeVar("H", bound=Hashable)

_logger = logging.getLogger(__name__)


def slow_after(slow_from: float, size: int, now: float) -> float:
    """Return when a client that has sent or read `size` more bytes will count as slow."""
    return min(slow_from + size / SLOW_BYTES_PER_SECOND, now + 2 * SLOW_SECONDS)


def request_memory(request: Sequence[bytes]) -> int:
    """Return the approximate bytes of memory that a parsed request takes."""
    return REQUEST_OBJECT_BYTES + ARGUMENT_OBJECT_BYTES * len(request) + sum(map(len, request))


class Count(Generic[H]):
    """The amounts that holders have, and their sum. Thread-safe."""

    def __init__(self) -> None:
        self.total = 0
        self.limit = sys.maxsize
        self._held: dict[H, int] = {}
        self._lock = threading.Lock()

    def of(self, holder: H) -> int:
        return self._held.get(holder, 0)

    def add(self, holder: H, amount: int) -> None:
        """Add to a holder's amount, regardless of the limit."""
        with self._lock:
            self._add(holder, amount)

    def claim(self, holder: H, amount: int) -> bool:
        """Add to a holder's amount unless the sum would exceed the limit; return whether it was added."""
        with self._lock:
            if self.total + amount > self.limit:
                return False
            self._add(holder, amount)
            return True

    def drop(self, holder: H) -> None:
        with self._lock:
            self.total -= self._held.pop(holder, 0)

    def take_excess(self) -> H | None:
        """If the sum exceeds the limit, remove and return the oldest holder."""
        with self._lock:
            if self.total <= self.limit:
                return None
            oldest = next(iter(self._held))
            self.total -= self._held.pop(oldest)
            return oldest

    def _add(self, holder: H, amount: int) -> None:
        self.total += amount
        left = self._held.get(holder, 0) + amount
        if left:
            self._held[holder] = left
        else:
            self._held.pop(holder, None)


class Budget(Count["Connection"]):
    """Bytes held for connections. Connections without room wait in a queue: first come, first served."""

    def __init__(self) -> None:
        super().__init__()
        self._longest = 0
        self.is_tight = False
        """Whether the largest possible claim would not fit."""
        self.is_crowded = False
        """Whether a connection waits, or would have to wait with the largest possible claim."""
        # The waiting connections: when each began to wait, and for how many bytes; and those with a short claim.
        self.queue: dict[Connection, tuple[float, int]] = {}
        self._short: dict[Connection, None] = {}

    def set_limit(self, limit: int, longest: int) -> None:
        """Set the limit, but to no less than `longest`, the largest possible claim."""
        with self._lock:
            self.limit, self._longest = max(limit, longest), longest
            self._update_flags()

    @property
    def is_full(self) -> bool:
        """Whether no claim would fit."""
        return self.total >= self.limit

    def _add(self, holder: Connection, amount: int) -> None:
        super()._add(holder, amount)
        self._update_flags()

    def _update_flags(self) -> None:
        self.is_tight = self.total + self._longest > self.limit
        self.is_crowded = self.is_tight or bool(self.queue)

    def claim_in_turn(self, holder: Connection, amount: int, now: float) -> bool:
        """Like `claim`, but a large claim has to wait its turn. If it fails, the holder joins the queue."""
        with self._lock:
            in_turn = amount <= SHORT_BYTES or next(iter(self.queue), holder) is holder
            if not in_turn or self.total + amount > self.limit:
                since = self.queue.get(holder, (now, 0))[0]
                self.queue[holder] = since, amount
                self.is_crowded = True
                if amount <= SHORT_BYTES:
                    self._short[holder] = None
                else:
                    self._short.pop(holder, None)
                return False
            self._leave(holder)
            self._add(holder, amount)
            return True

    def first_that_fits(self) -> Connection | None:
        """Return the connection that has waited longest, or the first one with a short claim, if its claim fits."""
        with self._lock:
            for queue in (self.queue, self._short):
                first = next(iter(queue), None)
                if first is not None and self.total + self.queue[first][1] <= self.limit:
                    return first
            return None

    def missing(self, since: float) -> int:
        """Return how many bytes to free for the connections that have waited since then or longer; 0 or less: none."""
        with self._lock:
            wanted = [amount for began, amount in self.queue.values() if began <= since]
            return self.total + sum(wanted) - self.limit

    def largest(self) -> list[tuple[Connection, int]]:
        """Return the holders and their amounts, largest first."""
        with self._lock:
            return sorted(self._held.items(), key=itemgetter(1), reverse=True)

    def blockers(self) -> list[Connection]:
        """If the waiting connections are deadlocked, return those to drop so that the others can continue.

        A connection in the queue may hold part of the memory it needs while it waits for the rest. There is a deadlock
        if the first one in the queue would have no room even if all connections outside the queue released theirs. Then
        the largest of the others in the queue are dropped until there is room for the first, which is itself dropped
        only if it needs more than the limit.
        """
        with self._lock:
            if not self.queue:
                return []
            first, (_, amount) = next(iter(self.queue.items()))
            room = self.limit - amount - self._held.get(first, 0)
            if room < 0:
                return [first]
            others = sorted((one for one in self.queue if one is not first), key=self.of, reverse=True)
            excess = sum(map(self.of, others)) - room
            blockers = []
            for one in others:
                if excess <= 0:
                    break
                blockers.append(one)
                excess -= self.of(one)
            return blockers

    def leave(self, holder: Connection) -> None:
        """Remove a connection from the queue."""
        with self._lock:
            self._leave(holder)
            self._update_flags()

    def _leave(self, holder: Connection) -> None:
        self.queue.pop(holder, None)
        self._short.pop(holder, None)

    def drop(self, holder: Connection) -> None:
        super().drop(holder)
        with self._lock:
            self._leave(holder)
            self._update_flags()


class Usage:
    """All totals, with the limits in the current settings."""

    def __init__(self) -> None:
        self.connections: Count[str] = Count()
        """Connections by `Peer.client_key`, from the moment they are accepted."""
        self.unauthenticated: Count[Connection] = Count()
        self.waiting: Count[Connection] = Count()
        """Connections that wait for a message."""
        self.waiting_patterns: Count[Connection] = Count()
        """The patterns that they wait for."""
        self.replies = Budget()
        """Bytes of unsent replies."""
        self.requests = Budget()
        """Bytes of requests that have not run yet, as declared or received, of GET positions, and of the names that
        clients wait for.
        """

    def set_limits(self, settings: Settings) -> None:
        longest = settings.max_message_bytes + REQUEST_OVERHEAD_BYTES
        self.unauthenticated.limit = settings.max_unauthenticated_connections
        self.waiting.limit = settings.max_waiting_readers
        self.waiting_patterns.limit = settings.max_waiting_patterns
        self.replies.set_limit(settings.max_total_unread_reply_bytes, longest)
        self.requests.set_limit(settings.max_total_request_bytes, longest)


class MemoryQueue:
    """The connections of one event loop that wait for room in a budget."""

    def __init__(self, totals: Usage) -> None:
        self.is_short = False
        """Whether a connection waits or a budget is exceeded."""
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

    def drop(self, connection: Connection) -> None:
        """Remove a closed connection and the memory it held."""
        self._waiting.pop(connection, None)
        for budget in self._budgets:
            budget.drop(connection)

    def serve(self, now: float, seconds: float) -> None:
        """Continue connections for which there is room now; drop slow clients if others have waited too long."""
        self.is_short = False
        if closes := now >= self._close_at:
            self._close_at = now + CLOSE_SECONDS
        for budget in self._budgets:
            self._serve(budget, seconds)
            if closes and (missing := budget.missing(now - SLOW_SECONDS)) > 0:
                self.is_short = True
                _close_slow(budget, missing, seconds)
                if budget is self._budgets[1]:
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
    # The time is taken after sorting, which may take longer than `seconds` with thousands of connections.
    largest, now = budget.largest(), time.monotonic()
    for connection, held in largest:
        if missing <= 0 or time.monotonic() >= now + seconds:
            break
        if _is_slow(connection, budget, now):
            missing -= held
            connection.loop.post(partial(_make_way, connection, budget))


def _is_slow(connection: Connection, budget: Budget, now: float) -> bool:
    """Return whether a connection is too slow to keep memory that others need. Thread-safe."""
    requests, transport = connection.requests, connection.transport
    if budget is transport.budget:
        return now > transport.slow_from
    if connection in budget.queue:
        # It is waiting itself, which is not its fault, unless it holds a transaction, or more than what arrives before
        # a request's length is known: if all connections held some memory and waited for more, none would make
        # progress.
        return requests.reserved > 2 * RECEIVE_BYTES or requests.transaction is not None
    if requests.incomplete_since < now:
        return now > requests.slow_from
    # If the client must read replies before its requests can run, its reading speed counts.
    return connection.state is not BEHIND or now > transport.slow_from


def _make_way(connection: Connection, budget: Budget, *, is_blocker: bool = False) -> None:
    """Drop a client because others need its memory, unless it has since made progress."""
    goes = connection in budget.queue if is_blocker else _is_slow(connection, budget, time.monotonic())
    if connection.closed or not budget.of(connection) or not goes:
        return
    about = "too slow while memory is short"
    _logger.info("%r: dropped: %s", connection, about, extra=connection.event("dropped"))
    if budget is connection.transport.budget or not connection.requests.missing:
        connection.close(about)
        return
    connection.requests.clear()
    connection.reads.close()
    budget.drop(connection)
    connection.reject(TimedOut("the request arrives too slowly while memory is short"))
