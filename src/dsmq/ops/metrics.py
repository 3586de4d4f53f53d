"""The metrics exported to Prometheus."""

from __future__ import annotations

import heapq
import operator
import platform
import sqlite3
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain, repeat

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from dsmq import __version__
from dsmq.ops.inspector import topic_stats
from dsmq.ops.status import Fact, Status
from dsmq.store.api import TopicStats, Totals
from dsmq.system import boot_time
from dsmq.wire.resp import BUILD

# The rates of topics are averages over at least this time, however often they are scraped.
RATE_SECONDS = 10.0
# The label for the sum of all topics that have no metrics of their own.
OTHER = b"other"


class Collector:
    """Collects the metrics of a server when they are scraped."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._rates = Rates(time.monotonic())

    def collect(self) -> Iterator[Metric]:
        status = self._status
        counters, totals = status.counters(), status.totals()
        for fact in chain(status.counted(counters, totals), status.background()):
            yield _family(CounterMetricFamily, fact)
        for fact in chain(status.usage(totals), status.limits(), self._topics(totals)):
            yield _family(GaugeMetricFamily, fact)
        yield from self._groups()
        for name, about, histogram in (
            ("request_duration", "Time from reading requests to sending their replies.", counters.request_seconds),
            ("delivery_latency", "Time from a message's put to its delivery.", counters.delivery_seconds),
            ("event_loop_lag", "Delay of an event loop's timer, measured once a second.", counters.lag_seconds),
        ):
            yield HistogramMetricFamily(f"dsmq_{name}_seconds", about, histogram.buckets(), histogram.sum)
        yield GaugeMetricFamily("dsmq_start_time_seconds", "Unix time when the server started.", status.started_at)
        labels = ("version", "build", "python_version", "sqlite_version")
        build = GaugeMetricFamily("dsmq_build_info", "Versions and build in use; always 1.", labels=labels)
        build.add_metric((__version__, BUILD, platform.python_version(), sqlite3.sqlite_version), 1)
        yield build

    def _topics(self, totals: Totals) -> Iterator[Fact]:
        count = self._status.context.settings.metrics_topics
        if not count:
            return
        topics = [(stats.name.decode(errors="replace"), stats, rate) for stats, rate in self._top_topics(count, totals)]
        messages = {name: stats.messages for name, stats, _ in topics}
        yield Fact("topic_messages", "Messages stored now, by topic.", messages, "topic")
        stored = {name: stats.accounted_bytes for name, stats, _ in topics}
        yield Fact("topic_stored_bytes", "Bytes stored now, as counted against the limit, by topic.", stored, "topic")
        ages = {name: stats.oldest_age_ms / 1000 for name, stats, _ in topics}
        yield Fact("topic_oldest_message_age_seconds", "Age of the oldest message, by topic.", ages, "topic")
        rates = {name: rate for name, _, rate in topics}
        yield Fact("topic_puts_per_second", "Puts per second over the last 10 to 20 seconds, by topic.", rates, "topic")

    def _groups(self) -> Iterator[Metric]:
        """Return the sums over all groups of workers and the figures of the first groups."""
        found, gauge = self._status.groups(), GaugeMetricFamily
        states = {state: sum(group.states[state] for group, _ in found) for state in ("waiting", "held", "again")}
        yield _family(gauge, Fact("jobs", "Messages that are not done, over all groups, by state.", states, "state"))
        age = max((group.oldest_age_ms for group, _ in found), default=0) / 1000
        yield _family(gauge, Fact("oldest_job_age_seconds", "Age of the oldest message that is not done.", age))
        workers = sum(workers for _, workers in found)
        yield _family(gauge, Fact("waiting_workers", "Workers waiting for a job.", workers))
        if not (count := self._status.context.settings.metrics_topics):
            return
        shown = {(group.key.decode(), group.name.decode()): (group, workers) for group, workers in found[:count]}
        key, key_state = ("topic", "group"), ("topic", "group", "state")
        jobs = {(*one, state): n for one, (group, _) in shown.items() for state, n in group.states.items()}
        yield _family(gauge, Fact("group_jobs", "Messages that are not done, by group and state.", jobs, key_state))
        events = {(*one, name): n for one, (group, _) in shown.items() for name, n in asdict(group.counts).items()}
        about = "Job events, by group."
        yield _family(CounterMetricFamily, Fact("group_job_events", about, events, ("topic", "group", "event")))
        ages = {one: group.oldest_age_ms / 1000 for one, (group, _) in shown.items()}
        about = "Age of the oldest message that is not done, by group."
        yield _family(gauge, Fact("group_oldest_job_age_seconds", about, ages, key))
        waiting = {one: workers for one, (_, workers) in shown.items()}
        yield _family(gauge, Fact("group_waiting_workers", "Workers waiting for a job, by group.", waiting, key))

    def _top_topics(self, count: int, totals: Totals) -> list[tuple[TopicStats, float]]:
        """Return the topics with the highest put rates, and the rates; the last entry, OTHER, sums up the rest."""
        store = self._status.context.store
        top, rest = self._rates.top(count, store.in_memory.last_numbers(), time.monotonic())
        shown: list[tuple[TopicStats, float]] = []
        for name, rate in top:
            if name == OTHER:
                rest += rate
            elif stats := topic_stats(store, name):
                shown.append((stats, rate))
        messages = max(0, totals.messages - sum(stats.messages for stats, _ in shown))
        size = max(0, totals.bytes - sum(stats.bytes for stats, _ in shown))
        return [*shown, (TopicStats(OTHER, messages, size, 0, 0), max(0.0, rest))]


def _family(kind: type[CounterMetricFamily | GaugeMetricFamily], fact: Fact) -> Metric:
    name = f"dsmq_{fact.name}"
    if not isinstance(fact.value, Mapping):
        return kind(name, fact.about, value=fact.value)
    family = kind(name, fact.about, labels=(fact.label,) if isinstance(fact.label, str) else fact.label)
    for key, value in sorted(fact.value.items()):
        family.add_metric((key,) if isinstance(key, str) else key, value)
    return family


class Rates:
    """Finds the topics with the highest put rates. A call takes time proportional to the number of topics."""

    def __init__(self, now: float) -> None:
        # The last two samples: time in seconds and last numbers. Rates are computed from the older one.
        self._samples: deque[tuple[float, dict[bytes, int]]] = deque([(now, {})], maxlen=2)

    def top(self, count: int, last_numbers: dict[bytes, int], now: float) -> tuple[list[tuple[bytes, float]], float]:
        """Return `count` topics with their puts per second, highest first, and the puts per second of all others.

        last_numbers maps each topic that has messages to the number of its last message; now is in seconds.
        """
        began, before = self._samples[0]
        seconds = max(now - began, 1e-9)
        # Compute this in C, because there may be 100,000 topics.
        puts = list(map(operator.sub, last_numbers.values(), map(before.get, last_numbers, repeat(0))))
        chosen = heapq.nlargest(count, zip(puts, last_numbers, strict=True))
        if now - self._samples[-1][0] >= RATE_SECONDS:
            self._samples.append((now, last_numbers))
        rest = sum(puts) - sum(number for number, _ in chosen)
        return [(name, number / seconds) for number, name in chosen], rest / seconds


class _ProcessCollector(ProcessCollector):
    def _boot_time(self) -> float:
        try:
            return float(super()._boot_time())  # type: ignore[no-untyped-call]
        except FileNotFoundError:
            # systemd's ProcSubset=pid hides /proc/stat, and without a boot time there would be no process metrics.
            return time.time() - boot_time()


def registry(status: Status) -> CollectorRegistry:
    """Return a separate registry for this server, because several may run in one process."""
    registry = CollectorRegistry()
    registry.register(Collector(status))
    _ProcessCollector(registry=registry)
    return registry
