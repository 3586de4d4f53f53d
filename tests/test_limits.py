"""How much one client, one topic and all together may take: each limit at its edge, on real sockets."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from contextlib import ExitStack

import pytest

from conftest import SOON, Wire, daemon, serving, wait_until, wire_to
from dsmq import connection, logs, producers
from dsmq.client import connect
from dsmq.errors import Full, ReplyError
from dsmq.protocol import encode_request
from dsmq.sqlite_store import SQLiteStore
from dsmq.store import MESSAGE_OVERHEAD_BYTES, TOPIC_OVERHEAD_BYTES, Limits

# What is held


def test_messages_beyond_the_limit_are_refused_and_what_is_held_stays() -> None:
    with serving(max_stored_messages=3) as server, wire_to(server) as wire:
        assert [wire.call("PUT", topic, "x") for topic in ("a", "b", "b")] == [1, 2, 3]
        assert wire.error("PUT", "a", "x") == "FULL"
        assert wire.call("READ", "b", 0)[::4] == [2, 3]  # type: ignore[index]
        assert server.totals().messages == 3


def test_of_one_packet_as_many_are_taken_as_fit() -> None:
    with serving(max_stored_messages=3) as server, wire_to(server) as wire:
        wire.send(encode_request(b"PUT", b"t", b"x") * 5)
        replies = [wire.receive() for _ in range(5)]
        assert replies[:3] == [1, 2, 3]
        assert [reply.code for reply in replies[3:]] == ["FULL", "FULL"]  # type: ignore[union-attr]


def test_a_shorter_message_is_taken_where_a_longer_one_was_not() -> None:
    cost = MESSAGE_OVERHEAD_BYTES
    topic = TOPIC_OVERHEAD_BYTES + len("t")
    with serving(max_stored_bytes=topic + 2 * cost + 100) as server, wire_to(server) as wire:
        assert wire.call("PUT", "t", "x" * 80) == 1
        wire.send(encode_request(b"PUT", b"t", b"x" * 21) + encode_request(b"PUT", b"t", b"x" * 20))
        assert wire.receive().code == "FULL"  # type: ignore[union-attr]
        assert wire.receive() == 2
        assert wire.error("PUT", "t", "") == "FULL"


def test_topics_count_as_well() -> None:
    cost = MESSAGE_OVERHEAD_BYTES + TOPIC_OVERHEAD_BYTES + 3
    store = SQLiteStore(60_000, limits=Limits(bytes=3 * cost))
    store.append([(b"aaa", b"", None), (b"bbb", b"", None)])
    assert store.totals().cost == 2 * cost
    with pytest.raises(Full):
        store.append([(b"ccc", b"", None), (b"ccc", b"", None)])
    assert store.append([(b"ccc", b"", None)]) == [3]
    store.max_age_ms = -1
    while store.expire():
        pass
    assert store.totals().cost == 0
    store.close()


@pytest.mark.parametrize(
    "limits", [{"max_stored_messages_per_topic": 2}, {"max_stored_bytes_per_topic": 2 * MESSAGE_OVERHEAD_BYTES + 20}]
)
def test_a_full_topic_is_no_other_topics_concern(limits: dict[str, int]) -> None:
    with serving(**limits) as server, wire_to(server) as wire:
        for topic in ("a", "b"):
            assert isinstance(wire.call("PUT", topic, "x" * 10), int)
            wire.send(encode_request(b"PUT", topic.encode(), b"x" * 10) * 2)
            assert isinstance(wire.receive(), int)
            assert wire.receive().code == "FULL"  # type: ignore[union-attr]


def test_topics_beyond_the_limit_are_refused_but_not_messages_in_those_there_are() -> None:
    with serving(max_topics=2) as server, wire_to(server) as wire:
        wire.send(b"PUT a x\r\nPUT b x\r\nPUT c x\r\nPUT a x\r\n")
        replies = [wire.receive() for _ in range(4)]
        assert [replies[0], replies[1], replies[3]] == [1, 2, 3]
        assert replies[2].code == "FULL"  # type: ignore[union-attr]


def test_puts_go_on_when_something_has_expired() -> None:
    with (
        serving(max_stored_messages=10, max_age_seconds=0.2, expiry_interval_seconds=0.01, port=0) as server,
        wire_to(server) as wire,
    ):
        wire.send(encode_request(b"PUT", b"t", b"x") * 11)
        assert [wire.receive() for _ in range(10)] == list(range(1, 11))
        assert wire.receive().code == "FULL"  # type: ignore[union-attr]
        wait_until(lambda: isinstance(wire.call("PUT", "t", "y"), int))


def test_a_put_that_is_sent_again_finds_its_id_where_there_is_no_room() -> None:
    with serving(max_stored_messages=1, max_topics=1) as server, wire_to(server) as wire:
        assert wire.call("PUT", "t", "x", "KEY", "me", 1) == 1
        assert wire.call("PUT", "t", "x", "KEY", "me", 1) == 1
        assert wire.error("PUT", "t", "x", "KEY", "me", 2) == "FULL"
        assert server.totals().messages == 1


def test_the_client_raises_full() -> None:
    with serving(max_stored_messages=2) as server, connect(port=server.port) as mq:
        mq.put("t", "a")
        with pytest.raises(Full):
            mq.put_many("t", ["b", "c", "d"])
        assert mq.get_many("t") == ["a", "b"]


def test_limits_can_be_lowered_below_what_is_held() -> None:
    store = SQLiteStore(60_000)
    store.append([(b"t", b"x", None)] * 5)
    store.limits = Limits(messages=2)
    with pytest.raises(Full):
        store.append([(b"t", b"x", None)])
    assert len(store.read(b"t", 0, 10, 100)) == 5
    store.limits = Limits()
    store.append([(b"t", b"x", (b"me", 1))])
    store.limits = Limits(messages=2, messages_per_topic=2, bytes=10, bytes_per_topic=10)
    assert store.append([(b"t", b"x", (b"me", 1))]) == [6]
    store.close()


def test_what_is_remembered_of_puts_is_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producers, "MAX_REMEMBERED_PUTS", 5)
    store = SQLiteStore(60_000)
    for producer in (b"a", b"b", b"c"):
        store.append([(b"t", b"x", (producer, seq)) for seq in range(2)])
    # a, heard longest ago, is forgotten; the others are known.
    assert store.append([(b"t", b"x", (b"b", 1)), (b"t", b"x", (b"c", 1))]) == [4, 6]
    assert store.append([(b"t", b"x", (b"a", 1))]) == [7]
    store.close()


# Who waits


def test_waiting_readers_beyond_the_limit_get_an_error() -> None:
    with serving(max_waiting_readers=2) as server, ExitStack() as stack:
        waiting = [stack.enter_context(wire_to(server)) for _ in range(2)]
        for wire in waiting:
            wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.waiting() == 2)
        late = stack.enter_context(wire_to(server))
        assert late.call("PUT", "other", "y") == 1
        assert late.call("GETWAIT", "other", 60_000) == b"y"
        assert late.error("GETWAIT", "t", 60_000) == "BUSY"
        # It is told, and may do all else.
        assert late.call("PUT", "t", "x") == 2
        assert [wire.receive() for wire in waiting] == [b"x", b"x"]
        assert late.call("GET", "t") == b"x"
        assert server.waiting() == 0
        assert late.call("GETWAIT", "t", 1) is None


# Who pipelines


def test_a_greedy_client_does_not_starve_the_others() -> None:
    with serving(max_requests_per_turn=10) as server, wire_to(server) as greedy, wire_to(server) as modest:
        held, go = threading.Event(), threading.Event()
        server._workers[0].post(lambda: held.set() or go.wait())  # type: ignore[func-returns-value]
        assert held.wait(SOON)
        # Both have come when the next turn begins.
        greedy.send(encode_request(b"PUT", b"t", b"x") * 1000)
        modest.send(encode_request(b"PUT", b"t", b"y"))
        go.set()
        place = modest.receive()
        assert isinstance(place, int)
        assert place <= 11
        ids = [greedy.receive() for _ in range(1000)]
        assert ids == [number for number in range(1, 1002) if number != place]


@pytest.mark.parametrize("requests", [9, 10, 11, 100])
def test_all_that_is_pipelined_is_answered_however_little_runs_in_a_turn(requests: int) -> None:
    with serving(max_requests_per_turn=10) as server, wire_to(server) as wire:
        for request, reply in ((b"PING\r\n", "PONG"), (encode_request(b"GET", b"t"), None)):
            wire.send(request * requests)
            assert [wire.receive() for _ in range(requests)] == [reply] * requests
        wire.send(b"PING\r\n" * requests + b"QUIT\r\n")
        assert [wire.receive() for _ in range(requests + 1)] == ["PONG"] * requests + ["OK"]
        assert wire.ended()


def test_who_hangs_up_while_it_waits_is_noticed_however_little_runs_in_a_turn() -> None:
    with serving(max_requests_per_turn=1) as server:
        with wire_to(server) as wire:
            wire.send(b"GETWAIT t 60000\r\nPING\r\n")
            wait_until(lambda: server.waiting() == 1)
        wait_until(lambda: server.waiting() == server.connections() == 0)


@pytest.mark.parametrize(
    ("request_", "reply"),
    [(b"PING\r\n", "PONG"), (b"FROBNICATE\r\n", "UNKNOWN"), (b"PUT t x\r\n", "NOAUTH"), (b"AUTH\r\n", "BADREQUEST")],
)
def test_a_stranger_is_sent_away_after_some_requests_of_whatever_kind(request_: bytes, reply: str) -> None:
    with serving(auth_token="x" * 20) as server, wire_to(server) as wire:
        wire.send(request_ * 400)
        answers = [wire.receive() for _ in range(17)]
        codes = [answer.code if isinstance(answer, ReplyError) else answer for answer in answers]
        assert codes == [reply] * 16 + ["NOAUTH"]
        assert wire.ended()
        # Those behind them have not even been parsed.
        assert server.counters().requests == 17


@pytest.mark.parametrize("last", [b"AUTH wrong-token-0123456789\r\n", b"QUIT\r\n", b"PING\r\n" * 17])
def test_a_stranger_may_send_on_after_its_last_reply_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    monkeypatch.setattr(connection, "LINGER_SECONDS", 3600.0)
    with (
        serving(auth_token="x" * 20, auth_timeout_seconds=600) as server,
        wire_to(server) as wire,
        wire_to(server) as other,
    ):
        wire.send(last)
        while wire.socket.recv(1000):
            pass
        # To close at once would reset the connection, and the client might lose the reply.
        for _ in range(2):
            wire.send(b"x" * (connection.MAX_DISCARDED_BYTES_OF_STRANGERS // 2))
            assert other.call("PING") == "PONG"
        assert server.connections() == 2
        wire.send(b"x" * 1000)
        wait_until(lambda: server.connections() == 1)


def test_what_follows_a_token_in_the_same_packet_is_run_in_batches() -> None:
    with serving(auth_token="x" * 20) as server, wire_to(server) as wire:
        wire.send(b"AUTH " + b"x" * 20 + b"\r\n" + b"PING\r\n" * 500)
        assert [wire.receive() for _ in range(501)] == ["OK"] + ["PONG"] * 500


def test_replies_that_nobody_reads_are_bounded_for_all_together() -> None:
    bounds = {"max_total_unread_reply_bytes": 1_000_000, "max_unread_reply_bytes": 2_000_000}
    with serving(**bounds) as server, ExitStack() as stack:
        with wire_to(server) as wire:
            for _ in range(10):
                wire.call("PUT", "t", "x" * 100_000)
        lazy = [stack.enter_context(wire_to(server)) for _ in range(20)]
        worker = server._workers[0]
        for one in lazy:
            # One after the other: what one turn brings is counted behind it.
            before = server.counters().commands["READ"]
            one.send(encode_request(b"READ", b"t", b"0") * 100)
            wait_until(lambda before=before: server.counters().commands["READ"] > before)
        wait_until(lambda: worker.backlog > 1_000_000)
        # One passed the budget; the others have a reply or two, of the 100. Without it, each would have 2 MB.
        assert worker.backlog < 1_000_000 + 2_100_000 + 20 * 2 * 110_000
        # Who reads gets all.
        for one in lazy:
            for _ in range(100):
                reply = one.receive()
                assert isinstance(reply, list)
        wait_until(lambda: worker.backlog == 0)
        lazy[0].send(encode_request(b"READ", b"t", b"0") * 100)
        wait_until(lambda: worker.backlog > 0)
        lazy[0].close()
        wait_until(lambda: worker.backlog == 0)


def test_reads_are_short_while_somebody_does_not_take_replies() -> None:
    def read(wire: Wire) -> int:
        reply = wire.call("READ", "t", 0, "COUNT", 1000)
        assert isinstance(reply, list)
        return len(reply) // 4

    with serving() as server, wire_to(server) as wire, wire_to(server) as lazy:
        for _ in range(100):
            wire.call("PUT", "t", "x" * 10_000)
        assert read(wire) == 27
        lazy.send(encode_request(b"READ", b"t", b"0") * 1000)
        wait_until(lambda: server._workers[0].backlog > 0)
        assert read(wire) == 7
        lazy.close()
        wait_until(lambda: server._workers[0].backlog == 0)
        assert read(wire) == 27


def test_replies_behind_one_that_is_not_read_count_too() -> None:
    with serving(max_total_unread_reply_bytes=200_000, max_unread_reply_bytes=1_000_000) as server:
        with wire_to(server) as wire:
            wire.call("PUT", "t", "x" * 100_000)
            wire.send(encode_request(b"READ", b"t", b"0") * 80)
            worker = server._workers[0]
            wait_until(lambda: worker.crowded)
            connection = next(iter(worker.connections))
            wait_until(lambda: worker.backlog == len(connection._out))
        wait_until(lambda: worker.backlog == 0)


@pytest.mark.parametrize("io_threads", [1, 4])
def test_connections_are_counted_from_when_they_are_accepted(io_threads: int) -> None:
    with serving(max_connections=10, io_threads=io_threads) as server, ExitStack() as stack:
        wires = [stack.enter_context(wire_to(server)) for _ in range(40)]
        replies = []
        for wire in wires:
            with contextlib.suppress(ConnectionError):
                wire.send(b"PING\r\n")
            replies.append(wire.receive())
        assert replies.count("PONG") == 10


def test_an_end_of_input_behind_many_requests_loses_none_of_them() -> None:
    with serving(max_requests_per_turn=3) as server, wire_to(server) as wire:
        wire.send(encode_request(b"PUT", b"t", b"x") * 100)
        wire.socket.shutdown(socket.SHUT_WR)
        assert [wire.receive() for _ in range(100)] == list(range(1, 101))
        assert wire.ended()


# What is logged


def test_a_flood_of_one_cause_is_summarised(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    flood = logs.FloodFilter(3)

    def passes(line: int, message: str) -> bool:
        return flood.filter(logging.LogRecord("dsmq", logging.INFO, "file.py", line, "%s", (message,), None))

    assert [passes(1, str(number)) for number in range(6)] == [True] * 3 + [False] * 3
    # Another cause is not held back.
    assert passes(2, "other")
    assert [(cause.held, cause.last and cause.last.getMessage()) for cause in flood.take_held()] == [(3, "5")]
    assert flood.take_held() == []
    assert not passes(1, "6")
    now += 1
    assert passes(1, "7")


def test_the_log_of_a_flood_is_short_and_says_so() -> None:
    with daemon("--max-log-lines-per-second", "2") as process:
        for _ in range(20):
            wire = Wire(("127.0.0.1", process.port))
            wire.send(b"\x00\r\n")
            wire.receive()
            wire.close()
        assert int(process.wait_for_line(r"(\d+) more lines like: client \d+ .*PROTOCOL")[1]) > 0
        process.stop()
    assert sum("PROTOCOL" in line for line in process.log) < 20
