"""The deadlines of one event loop."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.listener import Listener

TimerTarget: TypeAlias = "Connection | Listener"

# Max timers handled in one turn.
MAX_TIMERS = 100


class Timers:
    """Calls `on_timer` of a target at the time it was last scheduled for; `scheduled` of the target says when."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, TimerTarget]] = []
        self._numbers = itertools.count()

    @property
    def next_at(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def schedule(self, target: TimerTarget, when: float, targets: int) -> None:
        """`targets` is how many there are about."""
        target.scheduled = when
        heapq.heappush(self._heap, (when, next(self._numbers), target))
        if len(self._heap) > 2 * targets + 64:
            # Most are of closed connections, or have been replaced by earlier ones.
            self._heap = [timer for timer in self._heap if _is_valid(*timer)]
            heapq.heapify(self._heap)

    def run(self, now: float) -> None:
        # Taken out first: what is scheduled meanwhile belongs to the next turn.
        due: list[tuple[float, int, TimerTarget]] = []
        while self._heap and self._heap[0][0] <= now and len(due) < MAX_TIMERS:
            due.append(heapq.heappop(self._heap))
        for timer in due:
            if _is_valid(*timer):
                target = timer[2]
                target.scheduled = math.inf
                try:
                    target.on_timer()
                except Exception:  # noqa: BLE001
                    target.on_failure()


def _is_valid(when: float, _: int, target: TimerTarget) -> bool:
    return not target.closed and when == target.scheduled
