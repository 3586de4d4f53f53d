"""Counters: plain integers, separate for each event loop, and summed on demand."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

RECENT_ERRORS = 50

_FROM_5_MICROSECONDS = (
    *(5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3),
    *(2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
)
_FROM_1_MILLISECOND = (1e-3, 2e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0)


class Histogram:
    """Counts values by bucket."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        """The upper bounds of all buckets but the last."""
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def merge(self, other: Histogram) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def buckets(self) -> list[tuple[str, float]]:
        """Return the upper bounds, each with the number of values up to it, as Prometheus requires."""
        total, found = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


@dataclass(slots=True)
class Counters:
    """The counters of one event loop since the start. No other thread changes them."""

    gets_message: int = 0
    gets_empty: int = 0
    delivered: int = 0
    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    opened: int = 0
    failures: int = 0
    wrong_tokens: int = 0
    commands: dict[str, int] = field(default_factory=dict)
    """Requests by command. All commands are present from the start; unknown commands are counted in `errors`."""
    errors: Counter[str] = field(default_factory=Counter)
    """Error replies by code."""
    puts_refused: Counter[str] = field(default_factory=Counter)
    """Error replies to PUT by code."""
    refused: Counter[str] = field(default_factory=Counter)
    """Refused connections by reason."""
    recent: deque[tuple[float, str, str, str]] = field(default_factory=lambda: deque(maxlen=RECENT_ERRORS))
    """The last error replies: Unix time, code, client, message."""
    request_seconds: Histogram = field(default_factory=lambda: Histogram(_FROM_5_MICROSECONDS))
    """Seconds from the start of the turn that received a request to its end, when the reply was sent."""
    delivery_seconds: Histogram = field(default_factory=lambda: Histogram(_FROM_1_MILLISECOND))
    """Seconds from put to delivery."""
    lag_seconds: Histogram = field(default_factory=lambda: Histogram(_FROM_5_MICROSECONDS))
    """Delay of the event loop's timers in seconds, measured once a second."""


def total(counters: Iterable[Counters]) -> Counters:
    """Return the sums over several event loops."""
    result = Counters()
    for one in counters:
        for name in Counters.__slots__:
            value, mine = getattr(one, name), getattr(result, name)
            if isinstance(value, Histogram):
                mine.merge(value)
            elif isinstance(value, deque):
                mine.extend(value.copy())
            elif isinstance(value, dict):
                # Copying is atomic; the worker may be adding a new key.
                for key, count in value.copy().items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(result, name, mine + value)
    return result
