"""The HTTP endpoint over real HTTP: health checks, the page's data, host names, and clients that hang."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import logging
import random
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from http_clients import Answer, server

from conftest import (
    SOON,
    UNIT,
    LethalStore,
    Wire,
    blocked,
    daemon,
    no_new_threads,
    scrape,
    serving,
    wait_until,
    wire_to,
)
from dsmq import settings as config
from dsmq.broker import event_loop
from dsmq.ops import http as endpoint
from dsmq.server import Server
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.resp import encode_request

# Fixtures.
__all__ = ["server"]


def hang(server: Server) -> socket.socket:
    """Connect to the HTTP endpoint and send nothing."""
    assert server.http_port
    return socket.create_connection(("127.0.0.1", server.http_port), SOON)


def hung_up(sock: socket.socket) -> bool:
    """Return whether the HTTP endpoint closes the connection."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def served(server: Server) -> bool:
    """Return whether a scrape gets a reply and is not cut off."""
    try:
        return Answer(server.http_port, "/metrics").status == 200
    except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
        return False


# Health


def test_healthz_is_ok_while_all_threads_work(server: Server) -> None:
    answer = Answer(server.http_port, "/healthz")
    assert (answer.status, answer.type) == (200, "application/json")
    assert json.loads(answer.text) == {"status": "ok", "stuck_threads": []}
    assert answer.text.count("\n") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_healthz_fails_if_a_thread_died() -> None:
    with serving(LethalStore(0), http_port=0, expiry_interval_seconds=UNIT) as server:
        wait_until(lambda: Answer(server.http_port, "/healthz").status == 503)
        answer = Answer(server.http_port, "/healthz")
        assert (answer.status, answer.type) == (503, "application/json")
        assert json.loads(answer.text) == {"status": "failing", "stuck_threads": ["dsmq-expiry"]}
        assert Answer(server.http_port, "/metrics").status == 200


@pytest.mark.slow
def test_healthz_fails_if_a_worker_stalls() -> None:
    with serving(http_port=0, health_timeout_seconds=2 * UNIT + event_loop.PULSE_SECONDS) as server:
        assert Answer(server.http_port, "/healthz").status == 200
        with blocked(server):
            wait_until(lambda: Answer(server.http_port, "/healthz").status == 503)
            assert json.loads(Answer(server.http_port, "/healthz").text)["stuck_threads"] == ["dsmq-io-0"]
            assert scrape(server)["dsmq_healthy"] == 0
        wait_until(lambda: Answer(server.http_port, "/healthz").status == 200)


class StallingStore(SQLiteStore):
    """Makes the expiry thread wait for an event."""

    def __init__(self) -> None:
        super().__init__(0)
        self.go_on = threading.Event()

    def expire(self) -> int:
        self.go_on.wait(SOON)
        return super().expire()


def test_healthz_fails_if_expiry_stalls() -> None:
    store = StallingStore()
    with serving(store, http_port=0, health_timeout_seconds=2 * UNIT, expiry_interval_seconds=UNIT) as server:
        try:
            wait_until(lambda: "dsmq-expiry" in Answer(server.http_port, "/healthz").text)
        finally:
            store.go_on.set()
        wait_until(lambda: "dsmq-expiry" not in Answer(server.http_port, "/healthz").text)


@pytest.mark.slow
def test_idle_server_stays_healthy() -> None:
    patience = event_loop.PULSE_SECONDS + 20 * UNIT
    with serving(http_port=0, health_timeout_seconds=patience, expiry_interval_seconds=3600) as server:
        before = time.monotonic()
        while time.monotonic() - before < 2 * patience:
            assert Answer(server.http_port, "/healthz").status == 200


def test_readyz_reports_full_if_next_message_would_not_fit() -> None:
    with serving(http_port=0, max_stored_bytes=1_000_000) as server, wire_to(server) as wire:
        while isinstance(wire.call("PUT", "t", "x" * 900), int):
            pass
        assert reasons(server) == ["full"]


def test_readyz_reports_whether_clients_and_puts_are_accepted() -> None:
    with serving(http_port=0, max_stored_messages=1, max_connections=2) as server, wire_to(server) as wire:
        answer = Answer(server.http_port, "/readyz")
        assert (answer.status, answer.type) == (200, "application/json")
        assert json.loads(answer.text) == {"status": "ready", "reasons": []}
        with wire_to(server) as other:
            assert other.call("PUT", "t", "x") == 1
            assert reasons(server) == ["full", "too many connections"]
        wait_until(lambda: reasons(server) == ["full"])
        server.status.stopping = True
        assert reasons(server) == ["stopping", "full"]
        server.status.stopping = server.status.serving = False
        assert reasons(server) == ["starting", "full"]
        assert wire.call("PING") == "PONG"


def reasons(server: Server) -> list[str]:
    """Return why the server is not ready."""
    answer = Answer(server.http_port, "/readyz")
    assert answer.status == 503
    found: list[str] = json.loads(answer.text)["reasons"]
    return found


def test_readyz_fails_while_stop_waits_for_client() -> None:
    with daemon() as process:
        wire = Wire(("127.0.0.1", process.port))
        wire.call("PUT", "t", "x" * 8_000_000)
        wire.send(encode_request(b"READ", b"t", b"0"))
        process.process.terminate()
        process.wait_for_line("stopping")
        wait_until(lambda: Answer(process.http_port, "/readyz").status == 503)
        assert json.loads(Answer(process.http_port, "/readyz").text)["reasons"] == ["stopping"]
        wire.close()


# The page's data


def test_status_reports_topics_clients_and_errors(server: Server, wire: Wire) -> None:
    wire.call("HELLO", 2, "SETNAME", "me")
    for body in ("secret body", "x", "y"):
        wire.call("PUT", "t", body)
    wire.call("READ", "t", 0, "COUNT", 1)
    wire.error("FROBNICATE", "secret argument")
    text = Answer(server.http_port, "/status.json").text
    status = json.loads(text)
    assert "secret" not in text
    assert status["counters"]["puts"] == 3
    assert status["gauges"]["messages"] == 3
    topic = status["topics"][0]
    assert (topic["name"], topic["messages"], topic["bytes"]) == ("t", 3, 313)
    assert (status["host"], status["port"], status["tokens"], status["tls"]) == ("127.0.0.1", server.port, False, False)
    client = status["clients"][0]
    assert (client["name"], client["topic"], client["lag"], client["waiting"]) == ("me", "t", 2, False)
    assert client["role"] == "admin"
    assert status["errors"][0]["code"] == "UNKNOWN"
    assert (status["ready"], status["healthy"], status["reasons"]) == (True, True, [])


@pytest.mark.parametrize(
    "fail",
    [
        lambda connection: connection.set_authorizer(lambda *_: sqlite3.SQLITE_DENY),
        # SQLite is out of memory for every statement.
        lambda connection: connection.setlimit(sqlite3.SQLITE_LIMIT_VDBE_OP, 1),
    ],
)
def test_failing_store_breaks_neither_metrics_nor_page(fail: Callable[[sqlite3.Connection], object]) -> None:
    with serving(http_port=0, metrics_topics=1) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        fail(server.context.store._database.connection)  # type: ignore[attr-defined]
        assert scrape(server)["dsmq_messages"] == 1
        assert json.loads(Answer(server.http_port, "/status.json").text)["gauges"]["messages"] == 1


def test_topics_are_filtered_by_text_and_pattern(server: Server, wire: Wire) -> None:
    for topic in ("b", "a/1", "a/2", "a+b c", "ä"):
        wire.call("PUT", topic, "x")

    def found(query: str) -> list[str]:
        answer = json.loads(Answer(server.http_port, f"/topics.json?{query}").text)
        assert (answer["matches"], answer["is_last"]) == (len(answer["topics"]), True) or "after" in query
        return [topic["name"] for topic in answer["topics"]]

    assert found("filter=a") == ["a+b c", "a/1", "a/2"]
    assert found("filter=a&after=a/1") == ["a/2"]
    assert found("filter=a/*") == ["a/1", "a/2"]
    assert found("filter=a%2Bb+c") == ["a+b c"]
    assert found("filter=%C3%A4") == ["ä"]
    assert found("filter=%FF%00") == []
    assert len(found("")) == len(found("filter=*")) == 5
    assert found("filter=b&filter=%2F1") == ["a/1"]


def test_topic_is_described_with_its_last_messages(server: Server, wire: Wire) -> None:
    assert Answer(server.http_port, "/topic.json").status == 400
    wire.call("PUT", "t", "x")
    wire.call("PUT", "t", b"\xff")
    topic = json.loads(Answer(server.http_port, "/topic.json?name=t").text)
    assert (topic["messages"], topic["last_number"], topic["last_id"], topic["reader_count"]) == (2, 2, 2, 0)
    assert [message.get("text", message.get("hex")) for message in topic["last"]] == ["ff", "x"]
    assert topic["writers"][0]["writes"] == "t"
    none = json.loads(Answer(server.http_port, "/topic.json?name=%FF").text)
    assert (none["messages"], none["last"], none["readers"]) == (0, [], [])


def test_page_data_does_not_count_as_read(wire: Wire, server: Server) -> None:
    wire.call("PUT", "t", "x")
    before = server.status.counters()
    for path in ("/topic.json?name=t", "/topics.json?filter=t", "/status.json"):
        assert Answer(server.http_port, path).status == 200
    after = server.status.counters()
    assert (after.delivered, after.gets_message, after.gets_empty, after.requests) == (0, 0, 0, before.requests)
    server.context.store.max_age_ms = 0
    wait_until(lambda: scrape(server)["dsmq_messages_expired_unread_total"] == 1)


@pytest.mark.parametrize(
    ("settings", "is_shown"),
    [
        ({}, True),
        ({"http_host": "::1"}, True),
        ({"http_host": "0.0.0.0"}, False),
        ({"http_host": "0.0.0.0", "http_token": "let-me-see-it-please"}, True),
        ({"auth_token": "let-me-put-it-please"}, False),
        ({"auth_token": "let-me-put-it-please", "http_token": "let-me-see-it-please"}, True),
        # The permissions of the file may restrict readers.
        ({"host": "unix:{}/s"}, False),
    ],
    ids=["loopback", "loopback 6", "all addresses", "token everywhere", "client token", "both tokens", "unix"],
)
def test_messages_are_shown_only_with_permission(tmp_path: Path, settings: dict[str, str], is_shown: bool) -> None:
    fitted = {name: value.format(tmp_path) for name, value in settings.items()}
    with serving(http_port=0, **fitted) as server:
        server.context.store.append([(b"t", b"secret body", None)])
        wait_until(lambda: server.status.totals().messages == 1)
        token = {"Authorization": "Bearer let-me-see-it-please"} if "http_token" in settings else {}
        host = "::1" if settings.get("http_host") == "::1" else "127.0.0.1"
        answer = Answer(server.http_port, "/topic.json?name=t", host=host, **token)
        assert answer.status == 200
        assert ("secret body" in answer.text) is is_shown
        assert "secret body" not in Answer(server.http_port, "/topics.json", host=host, **token).text
        assert "secret body" not in Answer(server.http_port, "/status.json", host=host, **token).text


def test_content_security_policy_allows_only_own_script(server: Server) -> None:
    answer = Answer(server.http_port, "/")
    assert (answer.status, answer.type) == (200, "text/html; charset=utf-8")
    assert re.fullmatch(r"dsmq/[0-9.]+", answer.headers["Server"])
    policy = answer.headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http_\w+", "", answer.text)


def test_token_protects_all_routes_but_health() -> None:
    with serving(http_port=0, http_token="let-me-see-it-please") as server:
        for path, status in (
            ("/", 200),
            ("/healthz", 200),
            ("/readyz", 200),
            ("/metrics", 401),
            ("/status.json", 401),
            ("/topics.json", 401),
            ("/topic.json?name=t", 401),
        ):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic let-me-see-it-please"}):
                answer = Answer(server.http_port, path, **headers)
                assert answer.status == status
                assert (answer.headers["WWW-Authenticate"] == "Bearer") == (status == 401)
            assert Answer(server.http_port, path, Authorization="Bearer let-me-see-it-please").status == 200


def test_http_token_may_come_from_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("let-me-see-it-please\n")
    with serving(http_port=0, http_token_file=str(file)) as server:
        assert Answer(server.http_port, "/metrics").status == 401
        assert Answer(server.http_port, "/metrics", Authorization="bearer let-me-see-it-please").status == 200


# HTTP


@pytest.mark.parametrize("path", ["/index.html", "/metrics/", "/metricsx", "/healthz/x", "/METRICS", "/%6detrics"])
def test_unknown_path_is_not_found(server: Server, path: str) -> None:
    assert Answer(server.http_port, path).status == 404


def test_query_string_is_ignored(server: Server) -> None:
    assert Answer(server.http_port, "/metrics?name=x").status == 200
    assert Answer(server.http_port, "/healthz?").status == 200


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/", "/nothing"])
def test_head_returns_headers_without_body(server: Server, path: str) -> None:
    get = Answer(server.http_port, path)
    with hang(server) as sock, sock.makefile("rb") as stream:
        sock.sendall(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
        lines = stream.read().decode().split("\r\n")
    assert lines[0].split()[1] == str(get.status)
    assert f"Content-Type: {get.type}" in lines
    assert "Content-Length: " in "".join(lines)
    # The end of the headers and nothing after it.
    assert lines[-2:] == ["", ""]
    assert int(get.headers["Content-Length"]) == len(get.body) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "FROBNICATE"])
def test_other_methods_are_not_allowed(server: Server, method: str) -> None:
    answer = Answer(server.http_port, "/metrics", method)
    assert (answer.status, answer.headers["Allow"]) == ((501, None) if method == "FROBNICATE" else (405, "GET, HEAD"))
    assert answer.type.startswith("text/plain")
    assert "dsmq_puts" not in answer.text


def test_query_string_is_not_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dsmq")
    for method in ("GET", "POST", "FROBNICATE"):
        Answer(server.http_port, "/metrics?token=secret", method)
    with hang(server) as sock:
        sock.sendall(b"GET /metrics?token=secret HTTP/9.9\r\n\r\n")
        assert b" 505 " in sock.recv(1000)
    wait_until(lambda: caplog.text.count("HTTP: ") >= 4)
    assert "GET '/metrics': 200" in caplog.text
    assert "secret" not in caplog.text


def test_invalid_http_affects_no_one(server: Server, wire: Wire) -> None:
    for noise in (b"\xff\x00\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", b"x" * 100_000):
        # The server may close the connection before everything has been sent.
        with hang(server) as sock, suppress(ConnectionError):
            sock.sendall(noise)
    assert wire.call("PING") == "PONG"
    assert served(server)


def raw(server: Server, request: bytes) -> bytes:
    """Send these bytes and return the reply until the connection is closed."""
    with hang(server) as sock, sock.makefile("rb") as stream:
        sock.sendall(request)
        return stream.read()


STRANGE = {
    "nothing": b"\r\n",
    "HTTP/0.9": b"GET /metrics\r\n",
    "HTTP/0.9, spelled out": b"GET /metrics HTTP/0.9\r\n\r\n",
    "Latin-1 blank": b"GET \xa0 HTTP/1.0\r\n\r\n",
    "invalid version": b"GET /metrics HTTP/x\r\n\r\n",
    "no colon": b"GET /metrics HTTP/1.0\r\nAccept\r\n\r\n",
    "folded": b"GET /metrics HTTP/1.0\r\nAccept: text/plain;\r\n version=1.0.0\r\n\r\n",
    "bytes": b"GET /metrics HTTP/1.0\r\nAuthorization: Bearer \xff\xfe\r\nAccept: \xff\r\nHost: \xff\r\n\r\n",
    "many headers": b"GET /metrics HTTP/1.0\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "long header": b"GET /metrics HTTP/1.0\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    "long line": b"GET /" + b"x" * 70_000 + b" HTTP/1.0\r\n\r\n",
    "a body": b"POST /metrics HTTP/1.0\r\nContent-Length: 500000\r\n\r\n" + b"x" * 500_000,
    "pipelined": b"GET /metrics HTTP/1.0\r\n\r\n" * 100,
    "another protocol": b"*1\r\n$4\r\nPING\r\n",
    **{
        f"Accept: {accept}": f"GET /metrics HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode("latin-1")
        for accept in (
            *("text/plain; version=abc", "text/plain;version=", "text/plain;version=1.a", "text/plain;version=\xb2"),
            *("application/openmetrics-text;version=x.y", "application/openmetrics-text;version=" + "9" * 5000),
            *("text/plain;escaping", ";;;,,,", "=", "application/openmetrics-text; version=1.0.0; escaping=abc"),
        )
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("request_", STRANGE.values(), ids=STRANGE.keys())
def test_every_request_gets_a_status(server: Server, request_: bytes) -> None:
    answer = raw(server, request_)
    assert re.match(rb"HTTP/1\.0 [2345]\d\d .*\r\n\r\n", answer, re.DOTALL)
    assert b" 500 " not in answer[:20]
    if b"Accept:" in request_ and b"Host" not in request_:
        assert answer.startswith(b"HTTP/1.0 200 ")
    assert server.status.counters().failures == 0


def test_requests_of_random_pieces_get_a_status(server: Server) -> None:
    chance = random.Random(13)
    pieces = [
        b"Host",
        b"Accept",
        b"Authorization",
        b": ",
        b":",
        b"\r\n",
        b" ",
        b"text/plain",
        b";",
        b"version=",
        b"1.0.0",
    ]
    pieces += [b"\xe9", b"\x00", b"[::1]", b"localhost", b",", b"Bearer", b"x" * 100, b"application/openmetrics-text"]
    for _ in range(300):
        line = (
            chance.choice([b"GET", b"HEAD", b"PUT"])
            + b" /"
            + chance.choice([b"", b"metrics", b"readyz", b"status.json"])
        )
        headers = b"".join(chance.choice(pieces) for _ in range(chance.randrange(12)))
        answer = raw(server, line + chance.choice([b" HTTP/1.0", b" HTTP/1.1", b""]) + b"\r\n" + headers + b"\r\n\r\n")
        assert re.match(rb"HTTP/1\.0 [234]\d\d ", answer), (line, headers, answer)
    assert server.status.counters().failures == 0


class PageStore(SQLiteStore):
    """Calls a function whenever the status page requests the largest topics."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(0)
        self.call = call

    def largest_topics(self, count: int) -> list[bytes]:
        self.call()
        return super().largest_topics(count)


def test_defect_in_request_gives_500_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    store = PageStore(lambda: {}["secret"])
    with serving(store, http_port=0) as server:
        answer = Answer(server.http_port, "/status.json")
        assert (answer.status, answer.type) == (500, "text/plain; charset=utf-8")
        assert "secret" not in answer.text
        assert "KeyError: 'secret'" in caplog.text
        assert scrape(server)["dsmq_failures_total"] == 1
        store.call = lambda: None
        assert Answer(server.http_port, "/status.json").status == 200


def test_request_without_thread_gets_a_status(server: Server) -> None:
    with no_new_threads():
        assert Answer(server.http_port, "/readyz").status == 503
    assert Answer(server.http_port, "/readyz").status == 200
    assert server.status.counters().failures == 0


# Host names: a web page's own name may resolve to this machine (DNS rebinding)


HERE = [
    *("127.0.0.1", "127.0.0.1:30009", "192.0.2.7:80", "[::1]", "[::1]:30009", "[2001:db8::7]", "[fe80::1%25eth0]:1"),
    *("localhost", "localhost:30009", "LOCALHOST", "localhost.", "dsmq.localhost", "ip6-localhost", " 127.0.0.1 "),
    "::1",
]
ELSEWHERE = [
    *("attacker.example", "attacker.example:30009", "dsmq", "localhost.attacker.example", "127.0.0.1.attacker.example"),
    *("notlocalhost", "127.0.0.1@attacker.example", "[::1].attacker.example", "attacker.example#[::1]", "2130706433"),
    *("0x7f.1", "[attacker.example]", "attacker.example:80:90", "1:2:3.localhost", "", "[::1", "::1]"),
    *("127.0.0.1, attacker.example", "::1.attacker.example"),
]


def asked_as(server: Server, host: str, path: str = "/metrics", version: str = "1.1") -> int:
    """Return the status of a request with this Host header."""
    return int(raw(server, f"GET {path} HTTP/{version}\r\nHost: {host}\r\n\r\n".encode()).split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("host", HERE)
def test_ip_addresses_and_loopback_names_are_accepted_hosts(server: Server, host: str) -> None:
    for path in ("/", "/metrics", "/status.json"):
        assert asked_as(server, host, path) == 200


@pytest.mark.slow
@pytest.mark.parametrize("host", ELSEWHERE)
def test_unknown_host_gets_health_only(server: Server, host: str) -> None:
    for version in ("1.0", "1.1"):
        for path in ("/", "/metrics", "/status.json", "/nothing"):
            assert asked_as(server, host, path, version) == 421
        for path in ("/healthz", "/readyz"):
            assert asked_as(server, host, path, version) == 200


def test_host_of_absolute_target_takes_precedence(server: Server) -> None:
    for target, status in [
        ("http://127.0.0.1:30009/metrics", b"200"),
        ("HTTP://localhost", b"200"),
        ("http://attacker.example/metrics", b"421"),
        ("http://attacker.example/healthz?x", b"200"),
    ]:
        for host in ("localhost", "attacker.example"):
            assert raw(server, f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).split()[1] == status


def test_unknown_host_error_names_the_setting(server: Server) -> None:
    answer = Answer(server.http_port, "/metrics", Host="mq.example.org")
    assert (answer.status, answer.headers["Content-Length"]) == (421, str(len(answer.body)))
    assert "http_allowed_hosts" in answer.text
    assert "mq.example.org" not in answer.text


def test_exactly_one_host_header_is_required(server: Server) -> None:
    one = b"Host: 127.0.0.1\r\n"
    for version, headers, status in [
        (b"1.0", b"", b"200"),
        (b"1.1", b"", b"400"),
        (b"1.1", one, b"200"),
        (b"1.1", one * 2, b"400"),
        (b"1.0", one + b"Host: attacker.example\r\n", b"400"),
    ]:
        assert raw(server, b"GET /metrics HTTP/%b\r\n%b\r\n" % (version, headers)).split()[1] == status


def test_reload_changes_allowed_hosts() -> None:
    settings = {"http_allowed_hosts": "dsmq, MQ.example.org."}
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, http_port=0, **settings)  # noqa: E731
    with Server(load(), load=load) as server:
        for host in ("dsmq", "dsmq:30009", "mq.example.org", "MQ.Example.org.:1", "127.0.0.1"):
            assert asked_as(server, host) == 200
        for host in ("example.org", "x.mq.example.org", "dsmq.example.org"):
            assert asked_as(server, host) == 421
        settings["http_allowed_hosts"] = ""
        server.reload()
        assert asked_as(server, "dsmq") == 421


def test_reload_changes_http_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "token"
    file.write_text("let-me-see-it-please")
    load = lambda: config.load(  # noqa: E731
        kind=config.EmbeddedSettings, port=0, http_port=0, http_token_file=str(file)
    )
    with Server(load(), load=load) as server:
        file.write_text("another-token-0123456789")
        server.reload()
        for token, status in [("let-me-see-it-please", 401), ("another-token-0123456789", 200)]:
            assert Answer(server.http_port, "/metrics", Authorization=f"Bearer {token}").status == status
        assert "restart" not in caplog.text


# Concurrent requests


def test_concurrent_requests_are_all_answered(server: Server) -> None:
    with ThreadPoolExecutor(4 * endpoint.MAX_CONCURRENT_REQUESTS) as threads:
        answers = list(threads.map(lambda _: Answer(server.http_port, "/readyz").status, range(300)))
    assert answers == [200] * 300


SetLimits = Callable[..., None]


@pytest.fixture
def set_limits(monkeypatch: pytest.MonkeyPatch) -> SetLimits:
    """A function that sets constants of the HTTP endpoint, given by their lower-case names."""

    def set_limits(**limits: float) -> None:
        for name, value in limits.items():
            monkeypatch.setattr(endpoint, name.upper(), value)

    return set_limits


def test_request_in_progress_is_not_evicted(set_limits: SetLimits) -> None:
    set_limits(max_concurrent_requests=1, grace_seconds=0.0)
    asked, go = threading.Event(), threading.Event()
    store = PageStore(lambda: (asked.set(), go.wait(SOON)))
    with serving(store, http_port=0) as server, ThreadPoolExecutor(2) as threads:
        slow = threads.submit(Answer, server.http_port, "/status.json")
        assert asked.wait(SOON)
        waits = threads.submit(Answer, server.http_port, "/status.json")
        with hang(server) as third:
            # The second one has not been accepted, so the third is not evicted.
            third.settimeout(UNIT)
            with pytest.raises(TimeoutError):
                third.recv(1)
            # From now on, an accepted request has time to arrive.
            set_limits(grace_seconds=SOON)
            go.set()
            assert (slow.result().status, waits.result().status) == (200, 200)


def test_stop_does_not_wait_for_request_slot(set_limits: SetLimits) -> None:
    set_limits(max_concurrent_requests=1, request_timeout_seconds=3600.0)
    asked, go = threading.Event(), threading.Event()
    store = PageStore(lambda: (asked.set(), go.wait(SOON)))
    with serving(store, http_port=0) as server, hang(server) as busy, ThreadPoolExecutor(1) as thread:
        busy.sendall(b"GET /status.json HTTP/1.0\r\n\r\n")
        assert asked.wait(SOON)
        with hang(server):
            try:
                assert thread.submit(server.stop).result(SOON) == []
            finally:
                go.set()


# Clients that hang


def test_hanging_clients_do_not_delay_scrape(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(endpoint.MAX_CONCURRENT_REQUESTS - 1):
            stack.enter_context(hang(server))
        assert served(server)


def test_oldest_hanging_client_is_evicted(server: Server, wire: Wire, set_limits: SetLimits) -> None:
    set_limits(request_timeout_seconds=SOON)
    with ExitStack() as stack:
        hanging = [stack.enter_context(hang(server)) for _ in range(20)]
        for sock in hanging[: -endpoint.MAX_CONCURRENT_REQUESTS]:
            assert hung_up(sock)
        assert served(server)
        assert hung_up(hanging[-endpoint.MAX_CONCURRENT_REQUESTS])
        assert wire.call("PING") == "PONG"


def test_hanging_clients_time_out(server: Server, set_limits: SetLimits) -> None:
    set_limits(request_timeout_seconds=2 * UNIT)
    with ExitStack() as stack:
        for sock in [stack.enter_context(hang(server)) for _ in range(endpoint.MAX_CONCURRENT_REQUESTS)]:
            assert hung_up(sock)
        wait_until(lambda: served(server))


def test_client_that_sends_byte_by_byte_times_out(server: Server, set_limits: SetLimits) -> None:
    set_limits(request_timeout_seconds=3 * UNIT)
    with hang(server) as slow:
        for part in (b"GET /metrics HTTP/1.0\r\nX: ", *[b"x"] * 1000):
            slow.sendall(part)
            with suppress(TimeoutError):
                slow.settimeout(UNIT)
                assert slow.recv(1000).startswith(b"HTTP/1.0 408 ")
                return
        pytest.fail("the connection is still open")


@pytest.mark.parametrize("part", [b"G", b"GET /metr", b"GET /healthz HTTP/1.1\r\n", b"GET / HTTP/1.0\r\nHost: x\r\n"])
def test_incomplete_request_gets_a_status(server: Server, set_limits: SetLimits, part: bytes) -> None:
    set_limits(request_timeout_seconds=2 * UNIT)
    assert raw(server, part).startswith(b"HTTP/1.0 408 ")


# Stopping


def test_port_is_closed_after_stop(server: Server) -> None:
    port = server.http_port
    assert port
    assert server.stop() == []
    with pytest.raises(ConnectionRefusedError):
        Answer(port, "/healthz")


def test_hanging_client_does_not_delay_stop(server: Server) -> None:
    with hang(server):
        assert server.stop() == []


def test_http_endpoint_is_off_by_default_if_embedded() -> None:
    with serving() as server:
        assert server.http_port is None
        assert not server.status.stuck_threads()


def test_http_host_may_be_a_name() -> None:
    with serving(http_port=0, http_host="localhost") as server:
        assert server.http_port
        with closing(http.client.HTTPConnection("localhost", server.http_port, timeout=SOON)) as connection:
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
