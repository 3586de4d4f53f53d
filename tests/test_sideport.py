"""The side port over real HTTP: its metrics, its health check, and clients that hang."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from conftest import SOON, UNIT, Wire, daemon, serving, wait_until, wire_to
from dsmq import sideport
from dsmq.protocol import encode_request
from dsmq.server import Server

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

# All that is shown, and what it is.
METRICS = {
    "dsmq_puts": "counter",
    "dsmq_gets": "counter",
    "dsmq_deliveries": "counter",
    "dsmq_messages_expired": "counter",
    "dsmq_messages": "gauge",
    "dsmq_message_bytes": "gauge",
    "dsmq_topics": "gauge",
    "dsmq_connections": "gauge",
    "dsmq_waiting_readers": "gauge",
    "dsmq_connections_opened": "counter",
    "dsmq_connections_refused": "counter",
    "dsmq_requests": "counter",
    "dsmq_received_bytes": "counter",
    "dsmq_sent_bytes": "counter",
    "dsmq_errors": "counter",
    "dsmq_failures": "counter",
}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(metrics_port=0) as server:
        yield server


class Answer:
    """What the side port answers to one request."""

    def __init__(self, port: int | None, path: str, method: str = "GET", **headers: str) -> None:
        assert port
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=SOON)) as connection:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            self.status = response.status
            self.headers = response.headers
            self.type = response.headers["Content-Type"]
            self.body = response.read()
            self.text = self.body.decode()


def scrape(server: Server) -> dict[str, float]:
    """All samples by name; those with a label as `name{value of the label}`."""
    families = text_string_to_metric_families(Answer(server.metrics_port, "/metrics").text)
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def hang(server: Server) -> socket.socket:
    """A client that connects to the side port and says nothing."""
    assert server.metrics_port
    return socket.create_connection(("127.0.0.1", server.metrics_port), SOON)


def hung_up(sock: socket.socket) -> bool:
    """Whether the side port hangs up, now or soon."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def served(server: Server) -> bool:
    """Whether a scrape is answered; one that finds no place is cut off at once."""
    try:
        return Answer(server.metrics_port, "/metrics").status == 200
    except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
        return False


# Metrics


def test_metrics_as_text(server: Server) -> None:
    answer = Answer(server.metrics_port, "/metrics")
    assert answer.status == 200
    assert answer.type.startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name: family.type for name, family in families.items()} == METRICS
    assert all(family.documentation for family in families.values())


def test_metrics_as_openmetrics(server: Server, wire: Wire) -> None:
    assert wire.call("PUT", "t", "x") == 1
    answer = Answer(server.metrics_port, "/metrics", Accept=OPENMETRICS)
    assert answer.status == 200
    assert answer.type.startswith("application/openmetrics-text; version=")
    assert answer.text.endswith("# EOF\n")
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(answer.text)}
    assert {name: family.type for name, family in families.items()} == METRICS
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
    assert scrape(server) == {
        "dsmq_puts_total": 3,
        "dsmq_gets_total{message}": 2,
        "dsmq_gets_total{empty}": 2,
        "dsmq_deliveries_total": 3,
        "dsmq_messages_expired_total": 0,
        "dsmq_messages": 3,
        "dsmq_message_bytes": 8,
        "dsmq_topics": 2,
        "dsmq_connections": 1,
        "dsmq_waiting_readers": 0,
        "dsmq_connections_opened_total": 1,
        "dsmq_connections_refused_total": 0,
        "dsmq_requests_total": len(requests),
        "dsmq_received_bytes_total": sum(map(len, requests)),
        "dsmq_sent_bytes_total": received,
        "dsmq_errors_total{BADREQUEST}": 2,
        "dsmq_errors_total{UNKNOWN}": 1,
        "dsmq_failures_total": 0,
    }


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


def test_counters_are_summed_over_all_workers() -> None:
    with serving(metrics_port=0, io_threads=3) as server, ExitStack() as stack:
        for _ in range(3):
            wire = stack.enter_context(wire_to(server))
            wire.call("PUT", "t", "x")
        assert scrape(server)["dsmq_puts_total"] == 3
        assert scrape(server)["dsmq_connections"] == 3


def test_waiting_readers_are_shown_while_they_wait(server: Server, wire: Wire) -> None:
    with wire_to(server) as waiter:
        waiter.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: scrape(server)["dsmq_waiting_readers"] == 1)
        wire.call("PUT", "t", "x")
        assert waiter.receive() == b"x"
        assert scrape(server)["dsmq_waiting_readers"] == 0


def test_expired_messages_are_counted_and_no_longer_held() -> None:
    settings = {"max_age_seconds": UNIT, "expiry_interval_seconds": UNIT / 2}
    with serving(metrics_port=0, **settings) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "123")
        wire.call("PUT", "t", "456")
        wait_until(lambda: scrape(server)["dsmq_messages_expired_total"] == 2)
        shown = scrape(server)
        assert [shown[f"dsmq_{name}"] for name in ("messages", "message_bytes", "topics")] == [0, 0, 0]
        assert shown["dsmq_puts_total"] == 2


def test_refused_connections_are_counted() -> None:
    with serving(metrics_port=0, max_connections=1) as server, wire_to(server) as one:
        one.call("PING")
        with wire_to(server) as two:
            assert two.receive().code == "BUSY"  # type: ignore[union-attr]
        shown = scrape(server)
        assert shown["dsmq_connections_refused_total"] == 1
        assert shown["dsmq_errors_total{BUSY}"] == 1
        assert shown["dsmq_connections_opened_total"] == 1


def test_servers_in_one_process_have_numbers_of_their_own(server: Server, wire: Wire) -> None:
    with serving(metrics_port=0) as other:
        wire.call("PUT", "t", "x")
        assert scrape(server)["dsmq_puts_total"] == 1
        assert scrape(other)["dsmq_puts_total"] == 0


def test_dsmq_serve_has_a_side_port() -> None:
    with daemon() as process:
        assert "dsmq_puts_total 0.0" in Answer(process.metrics_port, "/metrics").text.splitlines()
        assert Answer(process.metrics_port, "/healthz").status == 200


# Health


def test_healthz_is_ok_while_all_threads_live(server: Server) -> None:
    answer = Answer(server.metrics_port, "/healthz")
    assert (answer.status, answer.type) == (200, "application/json")
    assert json.loads(answer.text) == {"status": "ok", "dead_threads": []}


def test_healthz_tells_of_a_dead_thread(server: Server) -> None:
    server._expiry.stop()
    wait_until(lambda: not server._expiry.thread.is_alive())
    answer = Answer(server.metrics_port, "/healthz")
    assert (answer.status, answer.type) == (503, "application/json")
    assert json.loads(answer.text) == {"status": "failing", "dead_threads": ["dsmq-expiry"]}
    assert Answer(server.metrics_port, "/metrics").status == 200


# HTTP


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metricsx", "/healthz/x", "/METRICS", "/%6detrics"])
def test_there_is_nothing_else(server: Server, path: str) -> None:
    assert Answer(server.metrics_port, path).status == 404


def test_a_query_is_passed_over(server: Server) -> None:
    assert Answer(server.metrics_port, "/metrics?name=x").status == 200
    assert Answer(server.metrics_port, "/healthz?").status == 200


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/"])
def test_head_has_the_headers_of_get_and_no_body(server: Server, path: str) -> None:
    get = Answer(server.metrics_port, path)
    with hang(server) as sock, sock.makefile("rb") as stream:
        sock.sendall(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
        lines = stream.read().decode().split("\r\n")
    assert lines[0].split()[1] == str(get.status)
    assert f"Content-Type: {get.type}" in lines
    assert "Content-Length: " in "".join(lines)
    # The end of the headers, and nothing behind.
    assert lines[-2:] == ["", ""]
    assert int(get.headers["Content-Length"]) == len(get.body) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "FROBNICATE"])
def test_other_methods_are_refused(server: Server, method: str) -> None:
    answer = Answer(server.metrics_port, "/metrics", method)
    assert answer.status == 501
    assert "dsmq_puts" not in answer.text


def test_what_is_no_http_harms_nobody(server: Server, wire: Wire) -> None:
    for noise in (b"\xff\x00\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", b"x" * 100_000):
        # It may hang up before all of it has come.
        with hang(server) as sock, suppress(ConnectionError):
            sock.sendall(noise)
    assert wire.call("PING") == "PONG"
    assert served(server)


# Clients that hang


def test_fewer_hanging_clients_than_places_do_not_hold_up_a_scrape(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(sideport.MAX_REQUESTS_AT_A_TIME - 1):
            stack.enter_context(hang(server))
        assert served(server)


def test_the_oldest_of_hanging_clients_is_cut_off_for_the_next(
    server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sideport, "REQUEST_TIMEOUT_SECONDS", SOON)
    with ExitStack() as stack:
        hanging = [stack.enter_context(hang(server)) for _ in range(20)]
        for sock in hanging[: -sideport.MAX_REQUESTS_AT_A_TIME]:
            assert hung_up(sock)
        assert served(server)
        assert hung_up(hanging[-sideport.MAX_REQUESTS_AT_A_TIME])
        assert wire.call("PING") == "PONG"


def test_hanging_clients_that_have_all_places_are_cut_off_in_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sideport, "REQUEST_TIMEOUT_SECONDS", 2 * UNIT)
    with ExitStack() as stack:
        for sock in [stack.enter_context(hang(server)) for _ in range(sideport.MAX_REQUESTS_AT_A_TIME)]:
            assert hung_up(sock)
        wait_until(lambda: served(server))


def test_a_client_that_sends_byte_by_byte_is_cut_off_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sideport, "REQUEST_TIMEOUT_SECONDS", 3 * UNIT)
    with hang(server) as slow:
        slow.sendall(b"GET /metrics HTTP/1.0\r\nX: ")
        slow.settimeout(UNIT)
        for _ in range(20):
            try:
                slow.sendall(b"x")
                if slow.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
        pytest.fail("it still holds a place")


# The end


def test_the_port_is_closed_when_the_server_has_stopped(server: Server) -> None:
    port = server.metrics_port
    assert port
    assert server.stop() == []
    with pytest.raises(ConnectionRefusedError):
        Answer(port, "/healthz")


def test_a_hanging_client_does_not_hold_up_the_stop(server: Server) -> None:
    with hang(server):
        assert server.stop() == []


def test_there_is_no_side_port_unless_asked_for() -> None:
    with serving() as server:
        assert server.metrics_port is None
        assert server.health()[0]


def test_the_metrics_host_may_be_a_name() -> None:
    with serving(metrics_port=0, metrics_host="localhost") as server:
        assert server.metrics_port
        with closing(http.client.HTTPConnection("localhost", server.metrics_port, timeout=SOON)) as connection:
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
