"""The metrics: exposition, numbers for known traffic, and documentation."""

from __future__ import annotations

import platform
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import pytest
from http_clients import Answer, server
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from conftest import ROOT, SOON, UNIT, Wire, daemon, scrape, serving, wait_until, wire_to
from dsmq import __version__
from dsmq.broker.counters import Histogram
from dsmq.ops import metrics
from dsmq.server import Server
from dsmq.wire.resp import BUILD, encode_request

# Fixtures.
__all__ = ["server"]

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

# The prefix of prometheus_client's own metrics.
PROCESS = "process_"
# Only with metrics_topics.
OF_TOPICS_AND_GROUPS = ("dsmq_topic_", "dsmq_group_")
# Only with a store in an engine: see test_engine.
OF_ENGINE = ("dsmq_engine_", "dsmq_mirror_")


def shown_in_readme(*, topics: bool = False) -> dict[str, str]:
    """Return the metrics in the table of deploy/README.md with their types; those by topic and group only on request.

    Metrics of an engine are omitted.
    """
    rows = re.findall(
        r"^\| `(dsmq_\w+)`.*? \| (counter|gauge|histogram) \|", (ROOT / "deploy/README.md").read_text(), re.MULTILINE
    )
    return {
        name.removesuffix("_total") if kind == "counter" else name: kind
        for name, kind in rows
        if not name.startswith(OF_ENGINE) and (topics or not name.startswith(OF_TOPICS_AND_GROUPS))
    }


def types(families: Iterable[Metric]) -> dict[str, str]:
    """Return the types of dsmq's metrics, by name."""
    return {family.name: family.type for family in families if not family.name.startswith(PROCESS)}


# Metrics


@pytest.fixture
def server_with_topics() -> Iterator[Server]:
    with serving(http_port=0, metrics_topics=2) as server, wire_to(server) as wire:
        for topic, count in (("a", 1), ("b", 3), ("c", 2)):
            for _ in range(count):
                wire.call("PUT", topic, "12")
        yield server


def test_readme_lists_every_metric(server_with_topics: Server) -> None:
    answer = Answer(server_with_topics.http_port, "/metrics")
    assert types(text_string_to_metric_families(answer.text)) == shown_in_readme(topics=True)


def test_groups_of_workers_have_metrics() -> None:
    with serving(http_port=0, metrics_topics=2) as server, wire_to(server) as wire, wire_to(server) as waiting:
        wire.call("PUT", "a", "x")
        wire.call("PUT", "a", "x")
        for key, group in (("a", "one"), ("*", "two"), ("a", "three")):
            wire.call("TAKE", key, group, "60000")
        wire.call("DONE", "a", "one", "1", "1")
        wire.call("TAKE", "*", "two", "60000")
        waiting.send(encode_request(*b"TAKE * two 60000 WAIT 60000".split()))
        wait_until(lambda: scrape(server)["dsmq_waiting_workers"] == 1)
        shown = scrape(server)
    by_group = {name: value for name, value in shown.items() if name.startswith("dsmq_group_jobs") and value}
    assert by_group == {"dsmq_group_jobs{one}{waiting}{a}": 1, "dsmq_group_jobs{two}{held}{*}": 2}
    by_group = {name: value for name, value in shown.items() if name.startswith("dsmq_group_job_events") and value}
    assert by_group == {
        "dsmq_group_job_events_total{taken}{one}{a}": 1,
        "dsmq_group_job_events_total{done}{one}{a}": 1,
        "dsmq_group_job_events_total{taken}{two}{*}": 2,
    }
    assert shown["dsmq_group_waiting_workers{two}{*}"] == 1
    assert shown["dsmq_group_waiting_workers{one}{a}"] == 0
    assert SOON > shown["dsmq_oldest_job_age_seconds"] >= shown["dsmq_group_oldest_job_age_seconds{one}{a}"] > 0
    assert [shown[f"dsmq_jobs{{{state}}}"] for state in ("waiting", "held", "again")] == [2, 3, 0]
    assert shown["dsmq_job_events_total{taken}"] == 4
    assert shown["dsmq_groups"] == 3
    assert 0 < shown["dsmq_groups_bytes"] < shown["dsmq_groups_bytes_limit"] == 16_777_216


def test_metrics_topics_enables_per_topic_metrics(server: Server, server_with_topics: Server) -> None:
    shown = {name: value for name, value in scrape(server_with_topics).items() if name.startswith("dsmq_topic_")}
    assert {name for name in shown if "messages{" in name} == {
        f"dsmq_topic_messages{{{t}}}" for t in ("b", "c", "other")
    }
    assert shown["dsmq_topic_messages{b}"] == 3
    assert (shown["dsmq_topic_messages{other}"], shown["dsmq_topic_stored_bytes{other}"]) == (1, 102)
    assert shown["dsmq_topic_puts_per_second{b}"] > shown["dsmq_topic_puts_per_second{c}"] > 0
    assert not [name for name in scrape(server) if name.startswith(OF_TOPICS_AND_GROUPS)]


def test_topic_named_other_counts_as_other() -> None:
    with serving(http_port=0, metrics_topics=2) as server, wire_to(server) as wire:
        for topic in ("other", "other", "a"):
            wire.call("PUT", topic, "x")
        shown = scrape(server)
        assert (shown["dsmq_topic_messages{other}"], shown["dsmq_topic_messages{a}"]) == (2, 1)
        assert shown["dsmq_topic_puts_per_second{other}"] > shown["dsmq_topic_puts_per_second{a}"]


def test_topics_with_most_recent_puts_are_shown() -> None:
    rates = metrics.Rates(0.0)
    rates.top(2, {b"a": 100, b"b": 50, b"c": 1}, 100.0)
    rates.top(2, {b"a": 100, b"b": 50, b"c": 1}, 110.0)
    top, rest = rates.top(2, {b"a": 101, b"b": 60, b"c": 21, b"d": 4}, 110.0)
    assert top == [(b"c", 2.0), (b"b", 1.0)]
    assert rest == pytest.approx(0.5)


def test_rates_do_not_depend_on_the_number_of_scrapers() -> None:
    rates = metrics.Rates(0.0)
    for second in range(1, 100):
        rates.top(1, {b"a": 1, b"b": second}, float(second))
    for _ in range(3):
        [(name, rate)], rest = rates.top(1, {b"a": 400, b"b": 99}, 100.0)
        assert name == b"a"
        assert 399 / 20 <= rate <= 399 / 10
        assert 0.4 <= rest <= 1.0


@pytest.mark.slow
def test_scrape_with_100000_topics_is_fast() -> None:
    with serving(http_port=0, metrics_topics=10) as server:
        for first in range(0, 100_000, 1000):
            server.context.store.append([(b"topic %d" % number, b"x", None) for number in range(first, first + 1000)])
        seconds = []
        for _ in range(5):
            # Measure the processor time of this process, because other programs may be running.
            before = time.process_time()
            answer = Answer(server.http_port, "/metrics")
            seconds.append(time.process_time() - before)
            assert len(answer.body) < 200_000
        # On an idle machine it takes a sixth of that.
        assert min(seconds) < 0.3


def test_metrics_are_served_as_text(server: Server) -> None:
    answer = Answer(server.http_port, "/metrics")
    assert answer.status == 200
    assert answer.type.startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert types(families.values()) == shown_in_readme()
    assert all(family.documentation for family in families.values())


def test_metrics_are_served_as_openmetrics(server: Server, wire: Wire) -> None:
    assert wire.call("PUT", "t", "x") == 1
    answer = Answer(server.http_port, "/metrics", Accept=OPENMETRICS)
    assert answer.status == 200
    assert answer.type.startswith("application/openmetrics-text; version=")
    assert answer.text.endswith("# EOF\n")
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(answer.text)}
    assert types(families.values()) == shown_in_readme()
    assert [(sample.name, sample.value) for sample in families["dsmq_puts"].samples] == [("dsmq_puts_total", 1)]


def test_known_traffic_gives_exact_numbers(server: Server, wire: Wire) -> None:
    requests = [
        encode_request(b"PUT", b"a", b"12345"),
        encode_request(b"PUT", b"a", b"678"),
        encode_request(b"PUT", b"b", b""),
        encode_request(b"GET", b"a"),
        encode_request(b"GET", b"nothing"),
        encode_request(b"READ", b"a", b"0"),
        encode_request(b"READ", b"b", b"3"),
        encode_request(b"PING"),
        encode_request(b"FROBNICATE"),
        encode_request(b"GET"),
        encode_request(b"PUT", b"", b"x"),
    ]
    received = 0
    for request in requests:
        wire.send(request)
        received += len(wire.socket.recv(65536))
    wait_until(lambda: scrape(server)["dsmq_sent_bytes_total"] == received)
    expected = {
        "dsmq_puts_total": 3,
        "dsmq_puts_refused_total{badrequest}": 1,
        "dsmq_puts_refused_total{full}": 0,
        "dsmq_puts_refused_total{store}": 0,
        "dsmq_gets_total{message}": 2,
        "dsmq_gets_total{empty}": 2,
        "dsmq_deliveries_total": 3,
        "dsmq_messages_expired_total": 0,
        "dsmq_messages_expired_unread_total": 0,
        "dsmq_messages": 3,
        "dsmq_message_bytes": 8,
        "dsmq_stored_bytes": 8 + 3 * 100 + 2 * 501,
        "dsmq_topics": 2,
        "dsmq_connections": 1,
        "dsmq_unauthenticated_connections": 0,
        "dsmq_waiting_readers": 0,
        "dsmq_waiting_patterns": 0,
        "dsmq_connections_opened_total": 1,
        "dsmq_requests_total{PUT}": 4,
        "dsmq_requests_total{GET}": 3,
        "dsmq_requests_total{READ}": 2,
        "dsmq_requests_total{PING}": 1,
        "dsmq_received_bytes_total": sum(map(len, requests)),
        "dsmq_sent_bytes_total": received,
        "dsmq_errors_total{BADREQUEST}": 2,
        "dsmq_errors_total{UNKNOWN}": 1,
        "dsmq_failures_total": 0,
        "dsmq_auth_failures_total": 0,
        "dsmq_request_duration_seconds_count": len(requests),
        "dsmq_delivery_latency_seconds_count": 3,
        "dsmq_ready": 1,
        "dsmq_healthy": 1,
        "dsmq_connections_limit": 10_000,
        "dsmq_stored_bytes_limit": 1_073_741_824,
        "dsmq_max_age_seconds": 600,
        f"dsmq_build_info{{{BUILD}}}{{{platform.python_version()}}}{{{sqlite3.sqlite_version}}}{{{__version__}}}": 1,
    }
    shown = scrape(server)
    assert {name: shown.get(name) for name in expected} == expected
    for name in ("puts_refused", "requests", "errors", "gets"):
        label = f"dsmq_{name}_total{{"
        assert {n for n in shown if n.startswith(label) and shown[n]} == {
            n for n in expected if n.startswith(label) and expected[n]
        }
    assert 0 < shown["dsmq_oldest_message_age_seconds"] + 0.001 < SOON
    assert shown["dsmq_start_time_seconds"] == pytest.approx(time.time(), abs=SOON)
    assert shown["process_open_fds"] > 0


def test_durations_are_counted_in_buckets() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 3), (9.0, 4)):
        histogram.add(value, times)
    other = Histogram((1.0, 2.0))
    other.add(2.0)
    histogram.merge(other)
    assert histogram.buckets() == [("1.0", 3), ("2.0", 7), ("+Inf", 11)]
    assert histogram.sum == 0.5 + 2.0 + 4.5 + 36.0 + 2.0


def test_request_and_delivery_durations_are_exposed(server: Server, wire: Wire) -> None:
    wire.call("PUT", "t", "x")
    before = time.monotonic()
    wait_until(lambda: time.monotonic() - before > 0.06)
    wire.call("GET", "t")
    shown = scrape(server)
    assert 0.05 < shown["dsmq_delivery_latency_seconds_sum"] < SOON
    assert shown["dsmq_delivery_latency_seconds_bucket{0.05}"] == 0
    assert 0 < shown["dsmq_request_duration_seconds_sum"] < SOON
    assert shown["dsmq_event_loop_lag_seconds_count"] >= 1


def test_counters_do_not_go_down_when_connections_close(server: Server) -> None:
    for number in range(1, 4):
        with wire_to(server) as wire:
            wire.call("PUT", "t", "x")
            wire.call("GET", "t")
            wire.error("FROBNICATE")
        wait_until(lambda: scrape(server)["dsmq_connections"] == 0)
        shown = scrape(server)
        assert [
            shown["dsmq_connections_opened_total"],
            shown["dsmq_puts_total"],
            shown["dsmq_gets_total{message}"],
            shown["dsmq_deliveries_total"],
            shown["dsmq_errors_total{UNKNOWN}"],
        ] == [number] * 5


def test_counters_are_summed_over_workers() -> None:
    with serving(http_port=0, io_threads=3) as server, ExitStack() as stack:
        for _ in range(3):
            wire = stack.enter_context(wire_to(server))
            wire.call("PUT", "t", "x")
        assert scrape(server)["dsmq_puts_total"] == 3
        assert scrape(server)["dsmq_connections"] == 3


def test_waiting_readers_are_counted_while_waiting(server: Server, wire: Wire) -> None:
    with wire_to(server) as waiter:
        waiter.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: scrape(server)["dsmq_waiting_readers"] == 1)
        wire.call("PUT", "t", "x")
        assert waiter.receive() == b"x"
        assert scrape(server)["dsmq_waiting_readers"] == 0


def test_patterns_are_counted_while_readers_wait_for_them(server: Server, wire: Wire) -> None:
    with wire_to(server) as waiter:
        waiter.send(encode_request(*b"MREAD 0 WAIT 60000 TOPICS a* b* c".split()))
        wait_until(lambda: scrape(server)["dsmq_waiting_patterns"] == 2)
        wire.call("PUT", "c", "x")
        waiter.receive()
        assert scrape(server)["dsmq_waiting_patterns"] == 0


def test_expired_messages_are_counted_and_no_longer_stored() -> None:
    settings = {"max_age_seconds": UNIT, "expiry_interval_seconds": UNIT / 2}
    with serving(http_port=0, **settings) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "123")
        wire.call("PUT", "t", "456")
        wait_until(lambda: scrape(server)["dsmq_messages_expired_total"] == 2)
        shown = scrape(server)
        assert [shown[f"dsmq_{name}"] for name in ("messages", "message_bytes", "topics")] == [0, 0, 0]
        assert shown["dsmq_puts_total"] == 2


def test_refused_connections_are_counted() -> None:
    with serving(http_port=0, max_connections=1) as server, wire_to(server) as one:
        one.call("PING")
        with wire_to(server) as two:
            assert two.receive().code == "BUSY"  # type: ignore[union-attr]
        shown = scrape(server)
        assert shown["dsmq_connections_refused_total{connections}"] == 1
        assert shown["dsmq_errors_total{BUSY}"] == 1
        assert shown["dsmq_connections_opened_total"] == 1


def test_servers_in_one_process_have_separate_metrics(server: Server, wire: Wire) -> None:
    with serving(http_port=0) as other:
        wire.call("PUT", "t", "x")
        assert scrape(server)["dsmq_puts_total"] == 1
        assert scrape(other)["dsmq_puts_total"] == 0


def test_dsmq_serve_starts_http_endpoint() -> None:
    with daemon() as process:
        assert "dsmq_puts_total 0.0" in Answer(process.http_port, "/metrics").text.splitlines()
        assert Answer(process.http_port, "/healthz").status == 200
