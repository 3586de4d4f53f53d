"""The numbers dsmq shows to Prometheus.

The hot path adds to plain integers, each worker to its own; they are summed when Prometheus asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

    from dsmq.store import Totals


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
    refused: int = 0
    failures: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def total(counters: Iterable[Counters]) -> Counters:
    """Return the sums of what several workers have counted."""
    result = Counters()
    for one in counters:
        for name in Counters.__slots__:
            if name != "errors":
                setattr(result, name, getattr(result, name) + getattr(one, name))
        # A copy, which is atomic: the worker may be adding a new code.
        result.errors.update(one.errors.copy())
    return result


class Source(Protocol):
    """Where the numbers are read at scrape time: the server."""

    def counters(self) -> Counters:
        """Return what has been counted since the start."""

    def totals(self) -> Totals:
        """Return what the store holds."""

    def connections(self) -> int:
        """Return the number of open connections."""

    def waiting(self) -> int:
        """Return the number of waiting readers."""


class Collector:
    """Prometheus's view of a server."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415 - see registry()

        def counter(name: str, about: str, value: float) -> Metric:
            return CounterMetricFamily(f"dsmq_{name}", about, value=value)

        def gauge(name: str, about: str, value: float) -> Metric:
            return GaugeMetricFamily(f"dsmq_{name}", about, value=value)

        counted, held = self._source.counters(), self._source.totals()
        yield counter("puts", "Messages stored.", held.stored)
        gets = CounterMetricFamily("dsmq_gets", "Reads answered, by what they found.", labels=["result"])
        gets.add_metric(["message"], counted.gets_message)
        gets.add_metric(["empty"], counted.gets_empty)
        yield gets
        yield counter("deliveries", "Messages sent to readers.", counted.delivered)
        yield counter("messages_expired", "Messages deleted because of their age.", held.expired)
        yield gauge("messages", "Messages held.", held.messages)
        yield gauge("message_bytes", "Bytes of message bodies held.", held.bytes)
        yield gauge("topics", "Topics that hold messages.", held.topics)
        yield gauge("connections", "Open connections.", self._source.connections())
        yield gauge("waiting_readers", "Readers waiting for a message.", self._source.waiting())
        yield counter("connections_opened", "Connections accepted.", counted.opened)
        yield counter("connections_refused", "Connections refused because there were too many.", counted.refused)
        yield counter("requests", "Requests of all kinds.", counted.requests)
        yield counter("received_bytes", "Bytes received from clients.", counted.bytes_in)
        yield counter("sent_bytes", "Bytes sent to clients.", counted.bytes_out)
        errors = CounterMetricFamily("dsmq_errors", "Error replies, by code.", labels=["code"])
        for code, count in sorted(counted.errors.items()):
            errors.add_metric([code], count)
        yield errors
        yield counter("failures", "Connections lost to a defect of the server.", counted.failures)


def registry(source: Source) -> CollectorRegistry:
    """Return a registry of this server's own, so that several servers fit in one process."""
    # Imported here, because a server without a side port needs none of it.
    from prometheus_client import CollectorRegistry  # noqa: PLC0415

    registry = CollectorRegistry()
    registry.register(Collector(source))
    return registry
