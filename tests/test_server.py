"""The server over real sockets: commands, errors, waiting, the handshake, and notices."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import (
    SOON,
    UNIT,
    Wire,
    as_map,
    blocked,
    loop_of,
    no_new_threads,
    serving,
    wait_for_stored,
    wait_until,
    wire_to,
)
from dsmq import settings as config
from dsmq.broker import commands, reads
from dsmq.broker.usage import FREE_BYTES
from dsmq.errors import StartupError, StoreFailed, WrongEpoch
from dsmq.server import Server
from dsmq.store.api import Message
from dsmq.store.expiry import Expiry
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.resp import encode_request

# Messages


def test_ids_count_across_all_topics_and_numbers_per_topic(server: Server, wire: Wire) -> None:
    assert [wire.call("PUT", "a", "1"), wire.call("PUT", "b", "2"), wire.call("PUT", "a", "3")] == [1, 2, 3]
    wait_for_stored(server, 3)
    assert [wire.call("READ", "a", 0)[i] for i in (0, 1, 3, 5, 6, 8)] == [1, 1, b"1", 3, 2, b"3"]


def test_commands_and_options_are_case_insensitive(wire: Wire) -> None:
    assert wire.call("put", "t", "x") == 1
    assert wire.call("ReaD", "t", 0, "count", 1)[0] == 1


def test_get_reads_messages_put_after_connect(server: Server, wire: Wire) -> None:
    wire.call("PUT", "t", "before")
    with wire_to(server) as late:
        assert late.call("GET", "t") is None
        wire.call("PUT", "t", "after 1")
        wire.call("PUT", "t", "after 2")
        assert [late.call("GET", "t") for _ in range(3)] == [b"after 1", b"after 2", None]
    assert [wire.call("GET", "t") for _ in range(4)] == [b"before", b"after 1", b"after 2", None]


def test_getlatest_skips_older_messages(wire: Wire) -> None:
    for body in ("1", "2", "3"):
        wire.call("PUT", "t", body)
    assert [wire.call("GETLATEST", "t"), wire.call("GETLATEST", "t"), wire.call("GET", "t")] == [b"3", None, None]
    wire.call("PUT", "t", "4")
    assert wire.call("GET", "t") == b"4"


def test_read_stops_at_count_and_size(server: Server, wire: Wire) -> None:
    for body in ("aaaa", "bbbb", "cccc"):
        wire.call("PUT", "t", body)
    wait_for_stored(server, 3)
    assert len(wire.call("READ", "t", 0, "COUNT", 2)) == 10
    assert len(wire.call("READ", "t", 0, "BYTES", 5)) == 10
    assert len(wire.call("READ", "t", 0, "BYTES", 1)) == 5
    assert wire.call("READ", "t", 0, "LATEST")[3] == b"cccc"
    assert wire.call("READ", "t", 3) == []
    assert wire.error("READ", "t", 4) == wire.error("READ", "t", 2**63 - 1) == "BADREQUEST"


def test_put_retried_with_key_is_stored_once(wire: Wire) -> None:
    assert wire.call("PUT", "t", "x", "KEY", "me", 7) == 1
    assert wire.call("PUT", "t", "x", "KEY", "me", 7) == 1
    assert wire.call("PUT", "t", "y", "KEY", "me", 8) == 2
    assert wire.call("PUT", "t", "z", "KEY", "you", 7) == 3


def test_empty_and_binary_messages_are_stored(wire: Wire) -> None:
    for body in (b"", b"\r\n", bytes(range(256))):
        wire.call("PUT", "t", body)
    assert [wire.call("GET", "t") for _ in range(3)] == [b"", b"\r\n", bytes(range(256))]


def test_topics_are_listed_by_page(server: Server, wire: Wire) -> None:
    for topic in ("b", "a", "c", "a"):
        wire.call("PUT", topic, "xy")
    wait_for_stored(server, 4)
    assert wire.call("TOPICS") == [b"a", 2, 4, b"b", 1, 2, b"c", 1, 2]
    assert wire.call("TOPICS", "COUNT", 1, "AFTER", "a") == [b"b", 1, 2]
    assert wire.call("TOPICS", "AFTER", "c") == []


def test_stats_report_topic(server: Server, wire: Wire) -> None:
    wire.call("PUT", "other", "x")
    wire.call("PUT", "t", "abc")
    wait_for_stored(server, 2)
    stats = as_map(wire.call("STATS", "t"))
    assert stats.pop(b"oldest_age_ms") < SOON * 1000  # type: ignore[operator]
    assert stats == {
        b"messages": 1,
        b"bytes": 3,
        b"last_number": 1,
        b"last_id": 2,
        b"first_id": 2,
        b"restored_number": 0,
        b"dropped": 0,
    }
    assert as_map(wire.call("STATS", "nothing"))[b"messages"] == 0


def test_expired_messages_are_not_delivered_before_deletion() -> None:
    with serving(max_age_seconds=2 * UNIT, expiry_interval_seconds=3600) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "old")
        wait_until(lambda: wire.call("READ", "t", 0) == [])
        assert wire.call("GET", "t") is None
        assert wire.call("GETLATEST", "t") is None
        assert server.status.totals().messages == 1


def test_expiry_thread_deletes_messages() -> None:
    with serving(max_age_seconds=UNIT, expiry_interval_seconds=UNIT) as server, wire_to(server) as wire:
        for number in range(3):
            wire.call("PUT", "t", number)
        wait_until(lambda: server.status.totals().expired == 3)
        assert server.status.totals().messages == 0
        assert wire.call("PUT", "t", "new") == 4


class FailingExpiry(SQLiteStore):
    """Fails to expire messages twice."""

    def __init__(self) -> None:
        super().__init__(0)
        self.failures = [StoreFailed("SQLite: disk I/O error"), ZeroDivisionError()]

    def expire(self) -> int:
        if self.failures:
            raise self.failures.pop()
        return super().expire()


def test_failed_expiry_is_retried(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"max_age_seconds": UNIT, "expiry_interval_seconds": UNIT / 5}
    with serving(FailingExpiry(), **settings) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        wait_until(lambda: server.status.totals().expired == 1)
    assert caplog.text.count("expiry failed") == 2


# Waiting


def test_put_wakes_waiters_of_its_topic(server: Server, wire: Wire) -> None:
    with wire_to(server) as getter, wire_to(server) as reader, wire_to(server) as other:
        getter.send(encode_request(b"GETWAIT", b"t", b"60000"))
        reader.send(encode_request(b"READ", b"t", b"0", b"WAIT", b"60000"))
        other.send(encode_request(b"GETWAIT", b"u", b"60000"))
        wait_until(lambda: server.status.waiting() == 3)
        wire.call("PUT", "t", "x")
        assert getter.receive() == b"x"
        assert reader.receive()[3] == b"x"  # type: ignore[index]
        assert server.status.waiting() == 1


def test_wait_returns_nothing_at_timeout(wire: Wire) -> None:
    before = time.monotonic()
    assert wire.call("GETWAIT", "t", round(UNIT * 1000)) is None
    assert wire.call("READ", "t", 0, "WAIT", round(UNIT * 1000)) == []
    assert 2 * UNIT * 0.9 <= time.monotonic() - before < SOON


def test_requests_pipelined_after_wait_run_when_it_ends(server: Server, wire: Wire) -> None:
    with wire_to(server) as waiter:
        waiter.send(encode_request(b"GETWAIT", b"t", b"60000") + encode_request(b"PING") + encode_request(b"GET", b"t"))
        wait_until(lambda: server.status.waiting() == 1)
        wire.call("PUT", "t", "1")
        assert [waiter.receive() for _ in range(3)] == [b"1", "PONG", None]


def test_disconnected_waiter_is_removed(server: Server) -> None:
    with wire_to(server) as waiter:
        waiter.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.status.waiting() == 1)
    wait_until(lambda: server.status.waiting() == 0 and server.status.connections() == 0)


def test_chains_of_waiters_do_not_recurse(server: Server, wire: Wire) -> None:
    # Each waiter that is woken puts, which wakes the next; recursion would exceed the limit.
    waiters = [Wire(("127.0.0.1", server.port)) for _ in range(200)]
    for waiter in waiters:
        waiter.send(
            encode_request(b"READ", b"t", b"0", b"WAIT", b"60000", b"COUNT", b"1")
            + encode_request(b"PUT", b"t", b"x")
            + encode_request(b"PING")
        )
    wait_until(lambda: server.status.waiting() == len(waiters))
    wire.call("PUT", "t", "go")
    for waiter in waiters:
        assert isinstance(waiter.receive(), list)
        assert isinstance(waiter.receive(), int)
        assert waiter.receive() == "PONG"
        waiter.close()
    assert server.status.counters().failures == 0


# Pipelining and order


def test_replies_keep_request_order(wire: Wire) -> None:
    requests, expected = [], []
    for number in range(300):
        requests += [encode_request(b"PUT", b"t", b"%d" % number), encode_request(b"ECHO", b"%d" % number)]
        expected += [number + 1, b"%d" % number]
    requests.insert(100, encode_request(b"PUT", b"", b"x"))
    wire.send(b"".join(requests))
    replies = [wire.receive() for _ in requests]
    assert replies.pop(100).code == "BADREQUEST"  # type: ignore[union-attr]
    assert replies == expected


def test_get_sees_earlier_put_of_same_packet(wire: Wire) -> None:
    wire.send(encode_request(b"PUT", b"t", b"x") + encode_request(b"GET", b"t"))
    assert [wire.receive(), wire.receive()] == [1, b"x"]


def test_replies_are_sent_after_half_close(wire: Wire) -> None:
    wire.send(encode_request(b"PUT", b"t", b"x") * 5000 + encode_request(b"PING"))
    wire.socket.shutdown(socket.SHUT_WR)
    assert [wire.receive() for _ in range(5001)] == [*range(1, 5001), "PONG"]
    assert wire.ended()


@pytest.mark.parametrize("io_threads", [1, 3])
def test_workers_wake_readers_of_other_workers(io_threads: int) -> None:
    with serving(io_threads=io_threads) as server:
        wires = [Wire(("127.0.0.1", server.port)) for _ in range(7)]
        for wire in wires[1:]:
            wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.status.waiting() == 6)
        wires[0].call("PUT", "t", "x")
        assert [wire.receive() for wire in wires[1:]] == [b"x"] * 6
        for wire in wires:
            wire.close()


# Errors


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (["NOSUCH"], "UNKNOWN"),
        (["PUT", "t"], "BADREQUEST"),
        (["PUT", "t", "x", "y"], "BADREQUEST"),
        (["PUT", "t", "x", "KEY", "p"], "BADREQUEST"),
        (["PUT", "t", "x", "KEY", "", "1"], "BADREQUEST"),
        (["PUT", "t", "x", "KEY", "p", "-1"], "BADREQUEST"),
        (["PUT", "t", "x", "WHAT", "p", "1"], "BADREQUEST"),
        (["PUT", "", "x"], "BADREQUEST"),
        (["PUT", b"\xff", "x"], "BADREQUEST"),
        (["PUT", "t" * 513, "x"], "TOOBIG"),
        (["GET"], "BADREQUEST"),
        (["GET", "t", "u"], "BADREQUEST"),
        (["GETWAIT", "t", "soon"], "BADREQUEST"),
        (["GETWAIT", "t", "86400001"], "BADREQUEST"),
        (["READ", "t", "-1"], "BADREQUEST"),
        (["READ", "t", "9223372036854775808"], "BADREQUEST"),
        (["READ", "t", "0", "COUNT", "0"], "BADREQUEST"),
        (["READ", "t", "0", "COUNT", "1001"], "BADREQUEST"),
        (["READ", "t", "0", "COUNT", "1", "COUNT", "1"], "BADREQUEST"),
        (["READ", "t", "0", "WAIT"], "BADREQUEST"),
        (["READ", "t", "0", "WAIT", "86400001"], "BADREQUEST"),
        (["TOPICS", "COUNT", "x"], "BADREQUEST"),
        (["HELLO", "4"], "NOPROTO"),
        (["HELLO", "2", "AUTH", "u", "p"], "BADREQUEST"),
        (["HELLO", "2", "SETNAME", "with blank"], "BADREQUEST"),
        (["AUTH", "token"], "BADREQUEST"),
        (["SELECT", "1"], "BADREQUEST"),
        (["CLIENT", "KILL"], "BADREQUEST"),
        (["CLIENT", "SETNAME", "a" * 65], "BADREQUEST"),
        (["COMMAND", "LIST"], "BADREQUEST"),
        (["CONFIG", "SET", "a"], "BADREQUEST"),
    ],
)
def test_invalid_requests_get_error_and_keep_connection(wire: Wire, request_: list[str], code: str) -> None:
    assert wire.error(*request_) == code
    assert wire.call("PING") == "PONG"
    assert wire.call("TOPICS") == []


def test_topic_and_message_limits_are_exact() -> None:
    with serving(max_topic_bytes=10, max_message_bytes=2000) as server, wire_to(server) as wire:
        assert wire.call("PUT", "t" * 10, "m" * 2000) == 1
        assert wire.error("PUT", "t" * 11, "m") == "TOOBIG"
        wire.send(b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$2001\r\n")
        assert wire.receive().code == "TOOBIG"  # type: ignore[union-attr]
        assert wire.ended()
    with serving(max_message_bytes=10) as server, wire_to(server) as wire:
        assert wire.error("PUT", "t", "m" * 11) == "TOOBIG"
        assert wire.call("PUT", "t", "m" * 10) == 1


def test_errors_are_counted_by_code(server: Server, wire: Wire) -> None:
    wire.error("NOSUCH")
    wire.error("PUT", "", "")
    wire.error("PUT", "", "")
    assert server.status.counters().errors == {"UNKNOWN": 1, "BADREQUEST": 2}


class DefectiveStore(SQLiteStore):
    """Fails to read messages."""

    def read(self, topic: bytes, after: int, count: int, max_bytes: int, wait_ms: int = 0) -> list[Message]:
        return super().read(topic, after, count, max_bytes) and 1 / 0  # type: ignore[return-value]


def test_defect_in_command_closes_that_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    with serving(DefectiveStore(600_000)) as server, wire_to(server) as wire, wire_to(server) as victim:
        # Earlier replies are sent first.
        victim.send(encode_request(b"PUT", b"t", b"x") + encode_request(b"READ", b"t", b"0") + encode_request(b"PING"))
        assert victim.receive() == 1
        assert victim.receive().code == "INTERNAL"  # type: ignore[union-attr]
        assert victim.ended()
        assert wire.call("PUT", "t", "x") == 2
        assert server.status.counters().failures == 1
    assert "ZeroDivisionError" in caplog.text


class GreedyStore(SQLiteStore):
    """Runs out of memory when it reads messages."""

    def read(self, topic: bytes, after: int, count: int, max_bytes: int, wait_ms: int = 0) -> list[Message]:
        raise MemoryError


def test_request_without_memory_gets_full_and_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    with serving(GreedyStore(600_000)) as server, wire_to(server) as wire, wire_to(server) as victim:
        assert victim.error("READ", "t", "0") == "FULL"
        assert victim.ended()
        assert wire.call("PUT", "t", "x") == 1
        assert server.status.counters().failures == 0
    assert "dropped: out of memory" in caplog.text


class ScarceSocket:
    """A socket of a process that has no memory left for more than a few KiB."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv(self, size: int) -> bytes:
        if size > FREE_BYTES:
            raise MemoryError
        return self._socket.recv(size)  # type: ignore[no-any-return]


def test_requests_arrive_even_if_there_is_no_memory_for_a_long_one(server: Server, wire: Wire) -> None:
    assert wire.call("PING") == "PONG"
    (connection,) = loop_of(server).connections
    connection.transport.socket = ScarceSocket(connection.transport.socket)  # type: ignore[assignment]
    assert wire.call("PUT", "t", "x" * 10_000) == 1


def test_defect_during_wait_gives_one_error_reply() -> None:
    with serving(DefectiveStore(600_000)) as server, wire_to(server) as wire, wire_to(server) as victim:
        victim.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.status.waiting() == 1)
        assert wire.call("PUT", "t", "x") == 1
        assert victim.receive().code == "INTERNAL"  # type: ignore[union-attr]
        assert victim.ended()
        assert (server.status.waiting(), server.status.counters().failures) == (0, 1)


@pytest.mark.parametrize("notices", [False, True])
def test_defect_after_reply_is_reported_with_notices_only(server: Server, wire: Wire, notices: bool) -> None:
    if notices:
        wire.ask_for_notices()
    assert wire.call("PING") == "PONG"
    loop = loop_of(server)
    (connection,) = loop.connections
    # Its timer fails.
    connection.login.deadline = None  # type: ignore[assignment]
    loop.post(lambda: loop.schedule(connection, 0.0))
    if notices:
        assert wire.receive().code == "INTERNAL"  # type: ignore[union-attr]
    assert wire.ended()


# The handshake


def test_hello_reports_server_facts(wire: Wire) -> None:
    wire.call("PUT", "t", "x")
    hello = as_map(wire.call("HELLO", 2, "SETNAME", "me"))
    assert hello[b"server"] == b"dsmq"
    assert (hello[b"proto"], hello[b"last_id"], hello[b"max_age_ms"]) == (2, 1, 600_000)
    assert (hello[b"max_message_bytes"], hello[b"max_topic_bytes"]) == (8_388_608, 512)
    assert len(hello[b"epoch"]) == 16  # type: ignore[arg-type]
    assert wire.call("CLIENT", "GETNAME") == b"me"


def test_hello_3_changes_nulls_and_maps(wire: Wire) -> None:
    wire.send(encode_request(b"HELLO", b"3"))
    assert wire.socket.recv(4) == b"%16\r"
    wire.socket.recv(65536)
    wire.send(encode_request(b"GET", b"t"))
    assert wire.socket.recv(65536) == b"_\r\n"
    wire.send(encode_request(b"CLIENT", b"GETNAME"))
    assert wire.socket.recv(65536) == b"_\r\n"


def test_housekeeping_commands_reply(wire: Wire) -> None:
    assert wire.call("PING", "hi") == b"hi"
    assert wire.call("ECHO", "hi") == b"hi"
    assert wire.call("SELECT", "0") == "OK"
    assert wire.call("CLIENT", "SETINFO", "LIB-NAME", "x") == "OK"
    assert isinstance(wire.call("CLIENT", "ID"), int)
    assert wire.call("COMMAND", "COUNT") == len(commands.COMMANDS)
    assert len(wire.call("COMMAND", "DOCS", "STATS", "ECHO", "NOSUCH")) == 4  # type: ignore[arg-type]
    assert wire.call("CONFIG", "GET", "max_age*") == [b"max_age_seconds", b"600.0"]
    assert b"# Stats\r\n" in wire.call("INFO")  # type: ignore[operator]
    assert wire.call("INFO", "store").startswith(b"# Store\r\nmessages:0\r\n")  # type: ignore[union-attr]
    assert wire.call("QUIT") == "OK"
    assert wire.ended()


def test_client_sending_after_final_reply_is_not_reset(server: Server, wire: Wire) -> None:
    with wire_to(server) as other:
        assert wire.call("QUIT") == "OK"
        for _ in range(3):
            assert other.call("PING") == "PONG"
            wire.send(b"PING\r\n")
        assert wire.ended()


def test_inline_requests_are_answered(wire: Wire) -> None:
    wire.send(b'PUT greetings "hello, you"\r\n\nGET greetings\n')
    assert [wire.receive(), wire.receive()] == [1, b"hello, you"]


# Limits of one connection, its end, and failed starts


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("port", ["port"]),
        ("*_port", ["http_port"]),
        ("max_to*c_bytes", ["max_topic_bytes"]),
        ("m*x*age*es", ["max_message_bytes"]),
        ("port*port", []),
        ("por", []),
        ("[a-z]*", []),
    ],
)
def test_config_get_accepts_star(wire: Wire, pattern: str, found: list[str]) -> None:
    assert sorted(name.decode() for name in as_map(wire.call("CONFIG", "GET", pattern))) == found


def test_config_get_refuses_long_patterns(wire: Wire) -> None:
    assert wire.error("CONFIG", "GET", "[" * 4000) == "BADREQUEST"


def test_closed_connection_releases_buffers(server: Server) -> None:
    with wire_to(server) as wire:
        wire.send(encode_request(b"GETWAIT", b"t", b"86400000"))
        wait_until(lambda: server.status.waiting() == 1)
        (connection,) = loop_of(server).connections
        wire.send(b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$50000\r\n" + bytes(30_000))
        wait_until(lambda: len(connection.requests.parser) > 30_000)
    wait_until(lambda: server.status.connections() == 0)
    assert len(connection.requests.parser) == 0


def test_closed_connection_runs_no_more_requests(server: Server) -> None:
    with wire_to(server) as wire:
        wire.call("PING")
        (connection,) = loop_of(server).connections
        connection.requests.parser.feed(encode_request(b"GETWAIT", b"t", b"60000"))
        done = threading.Event()

        def close_and_run() -> None:
            parser = connection.requests.parser
            connection.close("for the test")
            connection.requests.parser = parser
            connection.requests.run()
            done.set()

        loop_of(server).post(close_and_run)
        assert done.wait(SOON)
        assert server.status.waiting() == 0


def test_half_close_during_wait_gets_earlier_replies(server: Server, tmp_path: Path) -> None:
    # A Unix socket buffers less than a reply of a megabyte.
    with serving(host=f"unix:{tmp_path}/socket") as unix:
        wire = Wire(f"{tmp_path}/socket")
        wire.send(encode_request(b"ECHO", b"x" * 1_000_000) + encode_request(b"GETWAIT", b"t", b"60000"))
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.receive() == b"x" * 1_000_000
        assert wire.ended()
        wire.close()
        assert unix.status.waiting() == 0


def test_client_reading_a_reply_is_not_idle(tmp_path: Path) -> None:
    settings = {"host": f"unix:{tmp_path}/socket", "idle_timeout_seconds": 3 * UNIT, "max_unread_reply_bytes": 1024}
    with serving(**settings):
        wire = Wire(f"{tmp_path}/socket")
        wire.call("PUT", "t", "x" * 1_000_000)
        wire.send(encode_request(b"READ", b"t", b"0") * 5 + encode_request(b"PUT", b"t", b"y"))
        for _ in range(5):
            time.sleep(2 * UNIT)
            assert len(wire.receive()[3]) == 1_000_000  # type: ignore[index,arg-type]
        assert wire.receive() == 2
        wire.close()


@pytest.mark.embedded("a put that is answered at once")
def test_close_notice_comes_after_earlier_replies(server: Server) -> None:
    with wire_to(server) as wire:
        wire.call("PING")
        loop = loop_of(server)
        (connection,) = loop.connections

        def put_and_drain() -> None:
            connection.requests.parser.feed(encode_request(b"PUT", b"t", b"stored") + b"*3\r\n$3\r\nPUT")
            connection.requests.run()
            connection.drain()

        loop.post(put_and_drain)
        assert wire.receive() == 1
        assert wire.receive().code == "CLOSING"  # type: ignore[union-attr]


def test_nonreading_client_leaves_no_thread_at_stop(tmp_path: Path) -> None:
    with serving(host=f"unix:{tmp_path}/socket", stop_timeout_seconds=20 * UNIT) as server:
        wire = Wire(f"{tmp_path}/socket")
        wire.send(encode_request(b"ECHO", b"x" * 5_000_000))
        wait_until(lambda: server.status.counters().requests == 1)
        assert server.stop() == []
        wire.close()


def test_stop_timeout_counts_from_request(tmp_path: Path) -> None:
    with serving(host=f"unix:{tmp_path}/socket") as server:
        wire = Wire(f"{tmp_path}/socket")
        wire.send(encode_request(b"ECHO", b"x" * 5_000_000))
        wait_until(lambda: server.status.counters().requests == 1)
        loop = loop_of(server)
        # A slow turn of the loop.
        with blocked(server):
            loop.stop(10 * SOON)
            latest = time.monotonic() + 10 * SOON
        wait_until(lambda: loop._stop_at < math.inf)
        assert loop._stop_at <= latest
        wire.close()


def test_unix_socket_with_full_backlog_is_in_use(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)
        with pytest.raises(StartupError, match="in use"), serving(host=f"unix:{path}"):
            pass


def test_failed_thread_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(expiry: Expiry) -> None:
        with no_new_threads():
            expiry.thread.start()

    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    with no_new_threads(), pytest.raises(StartupError, match="can't start new thread"):
        Server(config.load(kind=config.EmbeddedSettings, port=0)).start()
    # Now after the event loop has started.
    monkeypatch.setattr(Expiry, "start", start)
    with pytest.raises(StartupError, match="can't start new thread"):
        Server(config.load(kind=config.EmbeddedSettings, port=0)).start()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_retried_put_is_counted_once(server: Server, wire: Wire) -> None:
    for _ in range(3):
        wire.call("PUT", "t", "x", "KEY", "me", 1)
    wire.call("PUT", "t", "y")
    wait_for_stored(server, 2)


def test_positions_per_connection_are_bounded(wire: Wire) -> None:
    topics = [b"%0512d" % number for number in range(reads.MAX_POSITION_BYTES // (reads.POSITION_OVERHEAD_BYTES + 512))]
    wire.send(b"".join(encode_request(b"PUT", topic, b"1") for topic in [*topics, b"x" * 512, topics[0]]))
    wire.send(b"".join(encode_request(b"GET", topic) for topic in topics))
    replies = [wire.receive() for _ in range(2 * len(topics) + 2)]
    assert replies[-len(topics) :] == [b"1"] * len(topics)
    assert wire.error("GET", "x" * 512) == "BADREQUEST"
    assert wire.call("GET", topics[0]) == b"1"


def test_half_close_after_quit_gets_earlier_replies(tmp_path: Path) -> None:
    with serving(host=f"unix:{tmp_path}/socket", max_unread_reply_bytes=2_000_000) as server:
        wire = Wire(f"{tmp_path}/socket")
        wire.send(encode_request(b"ECHO", b"x" * 1_000_000) + encode_request(b"QUIT"))
        wire.socket.shutdown(socket.SHUT_WR)
        wait_until(lambda: all(connection.transport.eof_received for connection in loop_of(server).connections))
        assert [wire.receive(), wire.receive()] == [b"x" * 1_000_000, "OK"]
        assert wire.ended()
        wire.close()


def test_late_reader_of_long_reply_becomes_idle_again(tmp_path: Path) -> None:
    with serving(host=f"unix:{tmp_path}/socket", idle_timeout_seconds=2 * UNIT) as server:
        wire = Wire(f"{tmp_path}/socket")
        wire.send(encode_request(b"ECHO", b"x" * 5_000_000))
        time.sleep(4 * UNIT)
        assert server.status.connections() == 1
        assert wire.receive() == b"x" * 5_000_000
        assert wire.ended()
        wire.close()


# Epochs and runs


def facts_of(wire: Wire) -> dict[bytes, object]:
    return as_map(wire.call("HELLO"))


def test_read_in_wrong_epoch_reports_current_epoch(server: Server, wire: Wire) -> None:
    epoch, run = (str(facts_of(wire)[name], "ascii") for name in (b"epoch", b"run"))  # type: ignore[arg-type]
    assert wire.call("PUT", "t", "x") == 1
    assert wire.call("READ", "t", 0, "EPOCH", epoch)[3] == b"x"  # type: ignore[index]
    # The epoch is checked first: an id of another epoch is meaningless.
    for words in (["0"], ["7"], ["7", "WAIT", "60000"], ["0", "LATEST"]):
        reply = wire.call("READ", "t", *words, "EPOCH", "0123456789abcdef")
        assert isinstance(reply, WrongEpoch)
        assert str(reply).startswith(f"{epoch} {run} ")


@pytest.mark.embedded("replaces the epoch of the store")
def test_epoch_change_during_wait_is_reported_at_its_end(server: Server, wire: Wire) -> None:
    for end in (lambda: None, lambda: server.context.store.append([(b"t", b"x", None)])):
        epoch = str(facts_of(wire)[b"epoch"], "ascii")  # type: ignore[arg-type]
        wire.send(encode_request(b"READ", b"t", b"0", b"WAIT", b"%d" % (UNIT * 3000), b"EPOCH", epoch.encode()))
        wait_until(lambda: server.status.waiting() == 1)
        server.context.store.epoch = "another" + epoch
        end()
        assert isinstance(wire.receive(), WrongEpoch)
        assert wire.call("PING") == "PONG"


def test_put_for_another_run_is_not_stored(server: Server, wire: Wire) -> None:
    run = facts_of(wire)[b"run"]
    assert isinstance(run, bytes)
    assert wire.call("PUT", "t", "x", "RUN", run) == 1
    assert wire.call("PUT", "t", "x", "KEY", "me", 1, "RUN", run) == 2
    assert wire.call("PUT", "t", "x", "RUN", run, "KEY", "me", 1, "AGAIN") == 2
    # Even with a known key: it may have been another put.
    for words in (["KEY", "me", "1"], ["KEY", "me", "1", "AGAIN"], ["KEY", "me", "2"], []):
        assert wire.error("PUT", "t", "x", *words, "RUN", "0123456789abcdef") == "EPOCH"
    assert server.status.totals().messages == 2
    assert server.status.counters().puts_refused == {"EPOCH": 4}


def test_remaining_age_follows_current_max_age(server: Server, wire: Wire) -> None:
    wire.call("PUT", "t", "x")
    for max_age in (600_000, 100_000, 1_000_000):
        server.context.store.max_age_ms = max_age
        for words in ([], ["LATEST"]):
            _, _, age, _, left = wire.call("READ", "t", 0, *words)  # type: ignore[misc]
            assert age + left == max_age


# Notices


def test_shutdown_closes_connection_without_reply(server: Server, wire: Wire) -> None:
    wire.send(encode_request(b"SHUTDOWN") + encode_request(b"PING"))
    assert wire.ended()
    assert server.status.stopping


def test_shutdown_replies_ok_with_notices(server: Server, wire: Wire) -> None:
    assert as_map(wire.call("HELLO", 2, "NOTICES"))[b"server"] == b"dsmq"
    # It persists, like the name.
    wire.call("HELLO", 2)
    assert wire.call("SHUTDOWN") == "OK"
