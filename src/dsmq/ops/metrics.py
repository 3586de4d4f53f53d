"""The metrics that dsmq exports to Prometheus."""

from __future__ import annotations

import heapq
import operator
import platform
import sqlite3
import time
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import TYPE_CHECKING

from dsmq import __version__

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

    from dsmq.broker.counters import Counters
    from dsmq.ops.status import Status
    from dsmq.store.api import Limits, Timing, TopicStats, Totals
    from dsmq.store.snapshots import SnapshotStats

# Over how long at least the rates of topics are taken, however often they are looked at, and by how many.
RATE_SECONDS = 10.0


class Collector:
    """Prometheus's view of a server."""

    def __init__(self, source: Status) -> None:
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
    yield counter("messages_expired_unread", "Those of them that nobody had read or skipped.", held.expired_unread)
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
    yield gauge("stored_bytes", "Bytes held, as the limit counts them.", held.accounted_bytes)
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


def _snapshots(tally: SnapshotStats) -> Iterator[Metric]:
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
        (
            "stored_bytes",
            "Bytes held, as the limit counts them, by topic.",
            [s.accounted_bytes for s, _ in topics],
        ),
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


def registry(source: Status) -> CollectorRegistry:
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
