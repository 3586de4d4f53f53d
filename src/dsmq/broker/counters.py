"""What the event loops count: plain integers, each worker its own; they are summed on demand."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

RECENT_ERRORS = 50

_FROM_5_MICROSECONDS = (
    5e-6,
    1e-5,
    2.5e-5,
    5e-5,
    1e-4,
    2.5e-4,
    5e-4,
    1e-3,
    2.5e-3,
    5e-3,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    1.0,
)
_FROM_1_MILLISECOND = (1e-3, 2e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0)


class Histogram:
    """How often values fell between bounds. To add to it costs no more than a few additions."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        """The upper bounds of the buckets but the last, which has none."""
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def merge(self, other: Histogram) -> None:
        """Count what another has counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def buckets(self) -> list[tuple[str, float]]:
        """Return upper bounds and how many values are not above them, as Prometheus wants them."""
        total, found = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


@dataclass(slots=True)
class Counters:
    """What one worker has counted since the start. Only that worker writes them."""

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
    """Requests, by command, all of which are there from the start; those of no known one are in `errors`."""
    errors: Counter[str] = field(default_factory=Counter)
    """Error replies, by code."""
    puts_refused: Counter[str] = field(default_factory=Counter)
    """Those of them that answered a PUT."""
    refused: Counter[str] = field(default_factory=Counter)
    """Connections not taken, by reason."""
    recent: deque[tuple[float, str, str, str]] = field(default_factory=lambda: deque(maxlen=RECENT_ERRORS))
    """The last error replies: when, since 1970; code; client; sentence."""
    request_seconds: Histogram = field(default_factory=lambda: Histogram(_FROM_5_MICROSECONDS))
    """From the begin of the turn in which requests are read to its end, when the replies have been sent."""
    delivery_seconds: Histogram = field(default_factory=lambda: Histogram(_FROM_1_MILLISECOND))
    """From put to delivery."""
    lag_seconds: Histogram = field(default_factory=lambda: Histogram(_FROM_5_MICROSECONDS))
    """How late the event loop looks at its timers, once a second."""


def total(counters: Iterable[Counters]) -> Counters:
    """Return the sums of what several workers have counted."""
    result = Counters()
    for one in counters:
        for name in Counters.__slots__:
            value, mine = getattr(one, name), getattr(result, name)
            if isinstance(value, Histogram):
                mine.merge(value)
            elif isinstance(value, deque):
                mine.extend(value.copy())
            elif isinstance(value, dict):
                # A copy, which is atomic: the worker may be adding a new key.
                for key, count in value.copy().items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(result, name, mine + value)
    return result
