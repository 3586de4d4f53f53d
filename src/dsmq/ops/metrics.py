"""The numbers dsmq shows to Prometheus.

The hot path adds to plain integers, each worker to its own; they are summed when Prometheus asks.
"""

from __future__ import annotations

import heapq
import operator
import platform
import sqlite3
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Protocol

from dsmq import __version__

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

    from dsmq.store.api import Limits, Timing, TopicStats, Totals
    from dsmq.store.snapshots import Tally

RECENT_ERRORS = 50
# Over how long at least the rates of topics are taken, however often they are looked at, and by how many.
RATE_SECONDS = 10.0

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


class Source(Protocol):
    """Where the numbers are read at scrape time: the server."""

    started_at: float
    """Seconds since 1970."""

    def counters(self) -> Counters:
        """Return what has been counted since the start."""

    def totals(self) -> Totals:
        """Return what the store holds."""

    def limits(self) -> Limits:
        """Return what it may hold."""

    def timings(self) -> Mapping[str, Timing]:
        """Return how often and how long the database was used, by operation."""

    def expiry(self) -> Timing:
        """Return how often and how long what is too old was deleted."""

    def snapshots(self) -> Tally:
        """Return what is known of snapshots."""

    def gauges(self) -> Mapping[str, tuple[str, float]]:
        """Return further gauges: by name, what they tell and their value."""

    def top_topics(self) -> list[tuple[TopicStats, float]]:
        """Return the topics to be shown one by one, with the puts a second into each; "other" sums up the rest."""


class Collector:
    """Prometheus's view of a server."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        counted, held, limits = self._source.counters(), self._source.totals(), self._source.limits()
        yield from _traffic(counted, held)
        yield from _held(held, limits)
        yield from _gauges(self._source.gauges())
        yield from _timings(self._source.timings(), self._source.expiry())
        yield from _snapshots(self._source.snapshots())
        yield from _histograms(counted)
        yield from _topics(self._source.top_topics())
        info = {
            "version": __version__,
            "python_version": platform.python_version(),
            "sqlite_version": sqlite3.sqlite_version,
        }
        yield _family("gauge", "build_info", "What runs here; always 1.", {tuple(info.values()): 1}, tuple(info))
        yield _family("gauge", "start_time_seconds", "When it was started, since 1970.", self._source.started_at)


def _family(
    kind: str, name: str, about: str, value: float | Mapping[tuple[str, ...], float], labels: tuple[str, ...] = ()
) -> Metric:
    # Imported here, because a server without a side port needs none of it.
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

    make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    if not isinstance(value, Mapping):
        return make(f"dsmq_{name}", about, value=value)
    family = make(f"dsmq_{name}", about, labels=labels)
    for key in sorted(value):
        family.add_metric(key, value[key])
    return family


def _traffic(counted: Counters, held: Totals) -> Iterator[Metric]:
    def counter(name: str, about: str, value: float) -> Metric:
        return _family("counter", name, about, value)

    def by(label: str, name: str, about: str, values: Mapping[str, float]) -> Metric:
        return _family("counter", name, about, {(key,): value for key, value in values.items()}, (label,))

    yield counter("puts", "Messages stored.", held.stored)
    # What is likely to be asked for begins at 0: a rate does not see a number that appears as 1.
    refused = {"full": 0, "store": 0} | {code.lower(): count for code, count in counted.puts_refused.items()}
    yield by("reason", "puts_refused", "Puts answered with an error, by its code.", refused)
    gets = {"message": counted.gets_message, "empty": counted.gets_empty}
    yield by("result", "gets", "Reads answered, by what they found.", gets)
    yield counter("deliveries", "Messages sent to readers.", counted.delivered)
    yield counter("messages_expired", "Messages deleted because of their age.", held.expired)
    yield counter("messages_expired_unread", "Those of them that nobody had read.", held.expired_unread)
    yield counter("connections_opened", "Connections accepted.", counted.opened)
    not_taken = {"connections": 0, "address": 0} | counted.refused
    yield by("reason", "connections_refused", "Connections not taken, by reason.", not_taken)
    yield by("command", "requests", "Requests of known commands.", counted.commands)
    yield counter("received_bytes", "Bytes received from clients.", counted.bytes_in)
    yield counter("sent_bytes", "Bytes sent to clients.", counted.bytes_out)
    yield by("code", "errors", "Error replies, by code.", counted.errors)
    yield counter("failures", "Connections lost to a defect of the server.", counted.failures)
    yield counter("auth_failures", "Wrong tokens shown.", counted.wrong_tokens)


def _held(held: Totals, limits: Limits) -> Iterator[Metric]:
    def gauge(name: str, about: str, value: float) -> Metric:
        return _family("gauge", name, about, value)

    yield gauge("messages", "Messages held.", held.messages)
    yield gauge("messages_limit", "Most messages held.", limits.messages)
    yield gauge("messages_per_topic_limit", "Most messages held in one topic.", limits.messages_per_topic)
    yield gauge("message_bytes", "Bytes of message bodies held.", held.bytes)
    yield gauge("stored_bytes", "Bytes held, as the limit counts them.", held.cost)
    yield gauge("stored_bytes_limit", "Most bytes held.", limits.bytes)
    yield gauge("stored_bytes_per_topic_limit", "Most bytes held in one topic.", limits.bytes_per_topic)
    yield gauge("topics", "Topics that hold messages.", held.topics)
    yield gauge("topics_limit", "Most topics that hold messages.", limits.topics)
    yield gauge("oldest_message_age_seconds", "Age of the oldest message held.", held.oldest_age_ms / 1000)


def _gauges(values: Mapping[str, tuple[str, float]]) -> Iterator[Metric]:
    for name, (about, value) in values.items():
        yield _family("gauge", name, about, value)


def _timings(store: Mapping[str, Timing], expiry: Timing) -> Iterator[Metric]:
    yield _family(
        "counter",
        "store_operations",
        "Uses of the database, by what for.",
        {(k,): v.times for k, v in store.items()},
        ("operation",),
    )
    yield _family(
        "counter", "store_seconds", "Time they took.", {(k,): v.seconds for k, v in store.items()}, ("operation",)
    )
    yield _family("counter", "expiry_runs", "Times that what is too old was deleted.", expiry.times)
    yield _family("counter", "expiry_seconds", "Time that took, with its pauses.", expiry.seconds)


def _snapshots(tally: Tally) -> Iterator[Metric]:
    results: dict[tuple[str, ...], float] = {("written",): tally.written, ("failed",): tally.failed}
    yield _family("counter", "snapshots", "Snapshots, by what came of them.", results, ("result",))
    yield _family("counter", "snapshot_seconds", "Time that those took which were written.", tally.seconds)
    about = "When the last one was written, or the one restored, since 1970; 0: none."
    yield _family("gauge", "snapshot_time_seconds", about, tally.last_at)
    yield _family("gauge", "snapshot_size_bytes", "Size of the last one written.", tally.last_bytes)
    yield _family("gauge", "restored_messages", "Messages restored from a snapshot at the start.", tally.restored)


def _histograms(counted: Counters) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily  # noqa: PLC0415 - see _family

    for name, about, histogram in (
        ("request_duration", "From when requests are read to when the replies are sent.", counted.request_seconds),
        ("delivery_latency", "From a message's put to its delivery.", counted.delivery_seconds),
        ("event_loop_lag", "How late an event loop looks at its timers.", counted.lag_seconds),
    ):
        yield HistogramMetricFamily(f"dsmq_{name}_seconds", about, histogram.buckets(), histogram.sum)


def _topics(topics: list[tuple[TopicStats, float]]) -> Iterator[Metric]:
    if not topics:
        return
    for name, about, values in (
        ("messages", "Messages held, by topic.", [float(stats.messages) for stats, _ in topics]),
        ("stored_bytes", "Bytes held, as the limit counts them, by topic.", [float(stats.cost) for stats, _ in topics]),
        ("oldest_message_age_seconds", "Age of the oldest, by topic.", [s.oldest_age_ms / 1000 for s, _ in topics]),
        ("puts_per_second", "Puts, over the last 10 to 20 seconds, by topic.", [rate for _, rate in topics]),
    ):
        names = [(stats.name.decode(errors="replace"),) for stats, _ in topics]
        yield _family("gauge", f"topic_{name}", about, dict(zip(names, values, strict=True)), ("topic",))


class Rates:
    """Which topics are put to most lately. Each look costs as much as there are topics."""

    def __init__(self, now: float) -> None:
        # When it was looked, in seconds, and what the last numbers were; the older one is compared with.
        self._looks: deque[tuple[float, dict[bytes, int]]] = deque([(now, {})], maxlen=2)

    def top(self, count: int, last_numbers: dict[bytes, int], now: float) -> tuple[list[tuple[bytes, float]], float]:
        """Return the names of so many topics with their rates, and the rate of the rest.

        last_numbers has the number of the last message of each topic that holds some; now is in seconds.
        """
        began, before = self._looks[0]
        seconds = max(now - began, 1e-9)
        # All of it in C: there may be 100,000.
        puts = list(map(operator.sub, last_numbers.values(), map(before.get, last_numbers, repeat(0))))
        chosen = heapq.nlargest(count, zip(puts, last_numbers, strict=True))
        if now - self._looks[-1][0] >= RATE_SECONDS:
            self._looks.append((now, last_numbers))
        rest = sum(puts) - sum(number for number, _ in chosen)
        return [(name, number / seconds) for number, name in chosen], rest / seconds


def registry(source: Source) -> CollectorRegistry:
    """Return a registry of this server's own, so that several servers fit in one process."""
    # Imported here, because a server without a side port needs none of it.
    from prometheus_client import CollectorRegistry, ProcessCollector  # noqa: PLC0415

    class Process(ProcessCollector):
        def _boot_time(self) -> float:
            try:
                return float(super()._boot_time())  # type: ignore[no-untyped-call]
            except FileNotFoundError:
                # Where /proc shows processes alone (ProcSubset=pid). Without this time it would tell nothing at all.
                if not hasattr(time, "CLOCK_BOOTTIME"):
                    raise
                return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    registry = CollectorRegistry()
    registry.register(Collector(source))
    Process(registry=registry)
    return registry
