"""What all connections take up together, over all workers: how many of a kind there are, and the bytes they hold."""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Generic, TypeVar

from dsmq.wire.limits import REQUEST_OVERHEAD_BYTES

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.settings import Settings

# What one connection may hold of each kind without being counted or made to wait: so that short requests and replies
# pass while others take up the total. With 10,000 connections it comes to 40 MB.
FREE_BYTES = 4096
# As little passes those that wait for more, so that a few long messages do not hold up all others.
SHORT_BYTES = 262_144

# A client that is slower than this has more time for a long request, but is dropped first if memory is short and it has
# been slower for more than a moment.
SLOW_BYTES_PER_SECOND = 16_384
SLOW_SECONDS = 1.0

# What a parsed request takes in memory, and each of its arguments, beside their bytes.
REQUEST_OBJECT_BYTES = 100
ARGUMENT_OBJECT_BYTES = 40

H = TypeVar("H", bound=Hashable)


def request_memory(request: Sequence[bytes]) -> int:
    """Return about how many bytes of memory a parsed request takes."""
    return REQUEST_OBJECT_BYTES + ARGUMENT_OBJECT_BYTES * len(request) + sum(map(len, request))


class Count(Generic[H]):
    """Amounts by holder, and their sum. Shared by all workers; thread-safe."""

    def __init__(self) -> None:
        self.total = 0
        self.limit = sys.maxsize
        self._held: dict[H, int] = {}
        self._lock = threading.Lock()

    def of(self, holder: H) -> int:
        """Return the amount of one holder."""
        return self._held.get(holder, 0)

    def add(self, holder: H, amount: int) -> None:
        """Add to the amount of a holder, whatever the limit."""
        with self._lock:
            self._add(holder, amount)

    def claim(self, holder: H, amount: int) -> bool:
        """Add to the amount of a holder unless the sum would exceed the limit; return whether it was added."""
        with self._lock:
            if self.total + amount > self.limit:
                return False
            self._add(holder, amount)
            return True

    def drop(self, holder: H) -> None:
        """Take out all that a holder has."""
        with self._lock:
            self.total -= self._held.pop(holder, 0)

    def take_excess(self) -> H | None:
        """Take out the holder that came first, if the sum exceeds the limit; return it."""
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
    """Bytes held for connections. Those that find no room wait in a queue, first come, first served."""

    def __init__(self) -> None:
        super().__init__()
        self._longest = 0
        self.is_tight = False
        """Whether the largest amount that is claimed at once would not fit."""
        self.is_crowded = False
        """Whether somebody waits, or will with the largest amount."""
        # When each began to wait, and for how much; and those among them that wait for a little.
        self._queue: dict[Connection, tuple[float, int]] = {}
        self._short: dict[Connection, None] = {}

    def set_limit(self, limit: int, longest: int) -> None:
        """Bound the sum; but not so low that the largest amount would never fit."""
        with self._lock:
            self.limit, self._longest = max(limit, longest), longest
            self._judge()

    @property
    def is_full(self) -> bool:
        """Whether nothing would fit."""
        return self.total >= self.limit

    def _add(self, holder: Connection, amount: int) -> None:
        super()._add(holder, amount)
        self._judge()

    def _judge(self) -> None:
        self.is_tight = self.total + self._longest > self.limit
        self.is_crowded = self.is_tight or bool(self._queue)

    def claim_in_turn(self, holder: Connection, amount: int, now: float) -> bool:
        """Claim as `claim` does, but much only behind those that wait. If it fails, the holder waits from now on."""
        with self._lock:
            in_turn = amount <= SHORT_BYTES or next(iter(self._queue), holder) is holder
            if not in_turn or self.total + amount > self.limit:
                since = self._queue.get(holder, (now, 0))[0]
                self._queue[holder] = since, amount
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
        """Return who waits longest, if there is room for it now; else who waits longest for a little that fits."""
        with self._lock:
            for queue in (self._queue, self._short):
                first = next(iter(queue), None)
                if first is not None and self.total + self._queue[first][1] <= self.limit:
                    return first
            return None

    def missing(self, since: float) -> int:
        """Return how many bytes too many are held for those that have waited since then; 0 or less if there is room."""
        with self._lock:
            wanted = [amount for began, amount in self._queue.values() if began <= since]
            return self.total + sum(wanted) - self.limit

    def largest(self) -> list[tuple[Connection, int]]:
        """Return the holders and what they hold, the largest first."""
        with self._lock:
            return sorted(self._held.items(), key=itemgetter(1), reverse=True)

    def blockers(self) -> list[Connection]:
        """Return those that hold a part, wait for the rest, and have to go: else none of them would ever get on.

        That is so if who waits longest would find no room even after all others were done that do not wait. The largest
        go, and not that one unless what it holds and wants is too much by itself.
        """
        with self._lock:
            if not self._queue:
                return []
            first, (_, amount) = next(iter(self._queue.items()))
            room = self.limit - amount - self._held.get(first, 0)
            if room < 0:
                return [first]
            others = sorted((one for one in self._queue if one is not first), key=self.of, reverse=True)
            excess = sum(map(self.of, others)) - room
            blockers = []
            for one in others:
                if excess <= 0:
                    break
                blockers.append(one)
                excess -= self.of(one)
            return blockers

    def is_waiting(self, holder: Connection) -> bool:
        return holder in self._queue

    def leave(self, holder: Connection) -> None:
        """Wait no more."""
        with self._lock:
            self._leave(holder)
            self._judge()

    def _leave(self, holder: Connection) -> None:
        self._queue.pop(holder, None)
        self._short.pop(holder, None)

    def drop(self, holder: Connection) -> None:
        super().drop(holder)
        with self._lock:
            self._leave(holder)
            self._judge()


class Usage:
    """All that is counted. Its limits are those of the settings in force."""

    def __init__(self) -> None:
        self.connections: Count[str] = Count()
        """By network, from the moment they are accepted."""
        self.unauthenticated: Count[Connection] = Count()
        self.waiting: Count[Connection] = Count()
        """Readers that wait for a message."""
        self.replies = Budget()
        """Bytes of replies that clients have not taken."""
        self.requests = Budget()
        """Bytes that requests take up, declared or received, until they run; and bytes of positions of GET."""

    def set_limits(self, settings: Settings) -> None:
        """Take over the limits of these settings."""
        longest = settings.max_message_bytes + REQUEST_OVERHEAD_BYTES
        self.unauthenticated.limit = settings.max_unauthenticated_connections
        self.waiting.limit = settings.max_waiting_readers
        self.replies.set_limit(settings.max_total_unread_reply_bytes, longest)
        self.requests.set_limit(settings.max_total_request_bytes, longest)
