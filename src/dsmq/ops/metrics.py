"""The metrics exported to Prometheus."""

from __future__ import annotations

import heapq
import operator
import platform
import sqlite3
import time
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import TYPE_CHECKING, TypeAlias

from dsmq import __version__
from dsmq.store.api import TopicStats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

    from dsmq.broker.counters import Counters
    from dsmq.ops.status import Status

# The rates of topics are averages over at least this long, however often they are scraped.
RATE_SECONDS = 10.0
# The name under which all topics without metrics of their own are summed up.
OTHER = b"other"

_Row: TypeAlias = "tuple[str, str, float | Mapping[str, float]]"
"""A metric: name{label}, help text, and value; with a label, the values by label."""


class Collector:
    """Collects the metrics of a server when they are scraped."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._rates = Rates(time.monotonic())

    def collect(self) -> Iterator[Metric]:
        # Imported here, because a server without an HTTP endpoint does not need it.
        from prometheus_client import core  # noqa: PLC0415

        status, counters = self._status, self._status.counters()
        for row in (*_traffic(status, counters), *_background(status)):
            yield _family(core.CounterMetricFamily, *row)
        for row in (*_usage(status), *_limits(status), *_topics(self._top_topics())):
            yield _family(core.GaugeMetricFamily, *row)
        for name, about, histogram in (
            ("request_duration", "Time from reading requests to sending their replies.", counters.request_seconds),
            ("delivery_latency", "Time from a message's put to its delivery.", counters.delivery_seconds),
            ("event_loop_lag", "Delay of an event loop's timer, measured once a second.", counters.lag_seconds),
        ):
            yield core.HistogramMetricFamily(f"dsmq_{name}_seconds", about, histogram.buckets(), histogram.sum)
        yield core.GaugeMetricFamily("dsmq_start_time_seconds", "Unix time of the start.", status.started_at)
        labels = ("version", "python_version", "sqlite_version")
        build = core.GaugeMetricFamily("dsmq_build_info", "Versions in use; always 1.", labels=labels)
        build.add_metric((__version__, platform.python_version(), sqlite3.sqlite_version), 1)
        yield build

    def _top_topics(self) -> list[tuple[TopicStats, float]]:
        """Return the topics with the most puts lately and their puts per second, and last OTHER, the rest."""
        status, store = self._status, self._status.store
        count = status.settings.metrics_topics
        if not count:
            return []
        top, rest = self._rates.top(count, store.last_numbers(), time.monotonic())
        shown: list[tuple[TopicStats, float]] = []
        for name, rate in top:
            if name == OTHER:
                rest += rate
            elif stats := status.topic_stats(name):
                shown.append((stats, rate))
        totals = store.totals()
        messages = max(0, totals.messages - sum(stats.messages for stats, _ in shown))
        size = max(0, totals.bytes - sum(stats.bytes for stats, _ in shown))
        return [*shown, (TopicStats(OTHER, messages, size, 0, 0), max(0.0, rest))]


def _family(kind: type[Metric], name: str, about: str, value: float | Mapping[str, float]) -> Metric:
    name, _, label = name.removesuffix("}").partition("{")
    if not isinstance(value, Mapping):
        return kind(f"dsmq_{name}", about, value=value)  # type: ignore[call-arg]
    family = kind(f"dsmq_{name}", about, labels=(label,))  # type: ignore[call-arg]
    for key in sorted(value):
        family.add_metric((key,), value[key])  # type: ignore[attr-defined]
    return family


def _traffic(status: Status, counters: Counters) -> Iterator[_Row]:
    totals = status.totals()
    yield "puts", "Messages stored since the start.", totals.stored
    # Labels that are likely to be queried start at 0: a rate does not see a series that first appears as 1.
    refused = {"full": 0, "store": 0} | {code.lower(): count for code, count in counters.puts_refused.items()}
    yield "puts_refused{reason}", "Puts refused, by error code.", refused
    gets = {"message": counters.gets_message, "empty": counters.gets_empty}
    yield "gets{result}", "Reads answered, by result.", gets
    yield "deliveries", "Messages sent to readers.", counters.delivered
    yield "messages_expired", "Messages deleted because of their age.", totals.expired
    yield "messages_expired_unread", "Expired messages that no client had read.", totals.expired_unread
    yield "connections_opened", "Connections accepted.", counters.opened
    connections_refused = {"connections": 0, "address": 0} | counters.refused
    yield "connections_refused{reason}", "Connections refused, by reason.", connections_refused
    yield "requests{command}", "Requests, by command.", counters.commands
    yield "received_bytes", "Bytes received from clients.", counters.bytes_in
    yield "sent_bytes", "Bytes sent to clients.", counters.bytes_out
    yield "errors{code}", "Error replies, by code.", counters.errors
    yield "failures", "Connections closed and HTTP requests failed because of a bug in the server.", counters.failures
    yield "auth_failures", "Authentication attempts with an invalid token.", counters.wrong_tokens


def _background(status: Status) -> Iterator[_Row]:
    store, expiry, snapshots = status.store.timings(), status.expiry_timing(), status.snapshots()
    counts = {operation: timing.times for operation, timing in store.items()}
    yield "store_operations{operation}", "Database operations, by kind.", counts
    seconds = {operation: timing.seconds for operation, timing in store.items()}
    yield "store_seconds{operation}", "Time spent in database operations, by kind.", seconds
    yield "expiry_runs", "Runs of the expiry thread.", expiry.times
    yield "expiry_seconds", "Time spent in runs of the expiry thread, including pauses.", expiry.seconds
    results = {"written": snapshots.written, "failed": snapshots.failed}
    yield "snapshots{result}", "Snapshots, by result.", results
    yield "snapshot_seconds", "Time spent on snapshots that were written.", snapshots.seconds


def _usage(status: Status) -> Iterator[_Row]:
    yield "ready", "Whether the server accepts clients and puts: 1 or 0.", not status.not_ready_reasons()
    yield "healthy", "Whether all threads are responsive: 1 or 0.", not status.stuck_threads()
    totals, snapshots = status.totals(), status.snapshots()
    yield "messages", "Messages stored now.", totals.messages
    yield "message_bytes", "Bytes of the message bodies stored now.", totals.bytes
    yield "stored_bytes", "Bytes stored now, as counted against the limit.", totals.accounted_bytes
    yield "topics", "Topics that have messages.", totals.topics
    yield "oldest_message_age_seconds", "Age of the oldest message.", totals.oldest_age_ms / 1000
    lag = max(0.0, totals.oldest_age_ms / 1000 - status.settings.max_age_seconds)
    yield "expiry_lag_seconds", "By how much the oldest message exceeds max_age_seconds.", lag
    yield "connections", "Open connections.", status.connections()
    yield "unauthenticated_connections", "Open connections that are not authenticated yet.", status.unauthenticated()
    yield "waiting_readers", "Readers waiting for a message.", status.waiting()
    yield "snapshot_time_seconds", "Unix time of the last snapshot written or restored; 0: none.", snapshots.last_at
    yield "snapshot_size_bytes", "Size of the last snapshot written.", snapshots.last_bytes
    yield "restored_messages", "Messages restored from a snapshot at the start.", snapshots.restored


def _limits(status: Status) -> Iterator[_Row]:
    limits, settings = status.store.limits, status.settings
    yield "messages_limit", "Max messages stored.", limits.messages
    yield "messages_per_topic_limit", "Max messages stored per topic.", limits.messages_per_topic
    yield "stored_bytes_limit", "Max bytes stored.", limits.bytes
    yield "stored_bytes_per_topic_limit", "Max bytes stored per topic.", limits.bytes_per_topic
    yield "topics_limit", "Max topics that have messages.", limits.topics
    yield "message_size_limit_bytes", "Max size of a message.", settings.max_message_bytes
    yield "max_age_seconds", "Age at which messages expire.", settings.max_age_seconds
    yield "connections_limit", "Max open connections.", status.max_connections
    per_address = settings.max_connections_per_address
    yield "connections_per_address_limit", "Max open connections per client address.", per_address
    unauthenticated = settings.max_unauthenticated_connections
    yield "unauthenticated_connections_limit", "Max unauthenticated connections.", unauthenticated
    yield "waiting_readers_limit", "Max waiting readers.", settings.max_waiting_readers
    interval = status.snapshot_interval()
    yield "snapshot_interval_seconds", "Time between snapshots; 0: no periodic snapshots.", interval


def _topics(topics: list[tuple[TopicStats, float]]) -> Iterator[_Row]:
    if not topics:
        return
    named = [(stats.name.decode(errors="replace"), stats, rate) for stats, rate in topics]
    yield "topic_messages{topic}", "Messages stored now, by topic.", {name: stats.messages for name, stats, _ in named}
    about = "Bytes stored now, as counted against the limit, by topic."
    yield "topic_stored_bytes{topic}", about, {name: stats.accounted_bytes for name, stats, _ in named}
    ages = {name: stats.oldest_age_ms / 1000 for name, stats, _ in named}
    yield "topic_oldest_message_age_seconds{topic}", "Age of the oldest message, by topic.", ages
    about = "Puts per second over the last 10 to 20 seconds, by topic."
    yield "topic_puts_per_second{topic}", about, {name: rate for name, _, rate in named}


class Rates:
    """Finds the topics with the most puts lately. A call takes time proportional to the number of topics."""

    def __init__(self, now: float) -> None:
        # The last two samples: time in seconds, and last numbers. Rates are relative to the older one.
        self._samples: deque[tuple[float, dict[bytes, int]]] = deque([(now, {})], maxlen=2)

    def top(self, count: int, last_numbers: dict[bytes, int], now: float) -> tuple[list[tuple[bytes, float]], float]:
        """Return `count` topics with their puts per second, highest first, and the puts per second of all others.

        last_numbers maps each topic that has messages to the number of its last message; now is in seconds.
        """
        began, before = self._samples[0]
        seconds = max(now - began, 1e-9)
        # All in C, because there may be 100,000 topics.
        puts = list(map(operator.sub, last_numbers.values(), map(before.get, last_numbers, repeat(0))))
        chosen = heapq.nlargest(count, zip(puts, last_numbers, strict=True))
        if now - self._samples[-1][0] >= RATE_SECONDS:
            self._samples.append((now, last_numbers))
        rest = sum(puts) - sum(number for number, _ in chosen)
        return [(name, number / seconds) for number, name in chosen], rest / seconds


def registry(status: Status) -> CollectorRegistry:
    """Return a registry of this server's own: several servers may run in one process."""
    # Imported here, because a server without an HTTP endpoint does not need it.
    from prometheus_client import CollectorRegistry, ProcessCollector  # noqa: PLC0415

    class Process(ProcessCollector):
        def _boot_time(self) -> float:
            try:
                return float(super()._boot_time())  # type: ignore[no-untyped-call]
            except FileNotFoundError:
                # systemd's ProcSubset=pid hides /proc/stat. Without a boot time there would be no process metrics.
                if not hasattr(time, "CLOCK_BOOTTIME"):
                    raise
                return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    registry = CollectorRegistry()
    registry.register(Collector(status))
    Process(registry=registry)
    return registry
