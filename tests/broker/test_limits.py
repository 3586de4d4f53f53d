"""Limits on stored messages, waiting readers and pipelines, each at its boundary, on real sockets."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest
from limiting import patient, wait_for_connections

from conftest import UNIT, Wire, blocked, daemon, loop_of, serving, wait_for_stored, wait_until, watch_waits, wire_to
from dsmq.broker import event_loop as worker
from dsmq.broker import reads
from dsmq.broker.event_loop import EventLoop
from dsmq.broker.requests import MAX_DISCARDED_BYTES
from dsmq.client import connect
from dsmq.errors import Full, ReplyError
from dsmq.server import Server
from dsmq.store.api import MESSAGE_OVERHEAD_BYTES, TOPIC_OVERHEAD_BYTES, Limits, Message
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.limits import MAX_READ_BYTES
from dsmq.wire.resp import Encoded, encode_messages, encode_request

# Fixtures.
__all__ = ["patient"]

# Stored messages


def test_puts_over_message_limit_are_refused_and_stored_messages_are_kept() -> None:
    with serving(max_stored_messages=3) as server, wire_to(server) as wire:
        assert [wire.call("PUT", topic, "x") for topic in ("a", "b", "b")] == [1, 2, 3]
        wait_for_stored(server, 3)
        assert wire.error("PUT", "a", "x") == "FULL"
        assert wire.call("READ", "b", 0)[::5] == [2, 3]  # type: ignore[index]
        assert server.status.totals().messages == 3


@pytest.mark.embedded("puts sent together are checked before any of them is stored, so limits hold only approximately")
def test_pipelined_puts_are_accepted_up_to_limit() -> None:
    with serving(max_stored_messages=3) as server, wire_to(server) as wire:
        wire.send(encode_request(b"PUT", b"t", b"x") * 5)
        replies = [wire.receive() for _ in range(5)]
        assert replies[:3] == [1, 2, 3]
        assert [reply.code for reply in replies[3:]] == ["FULL", "FULL"]  # type: ignore[union-attr]


def test_smaller_message_is_accepted_after_larger_one_was_refused() -> None:
    cost = MESSAGE_OVERHEAD_BYTES
    topic = TOPIC_OVERHEAD_BYTES + len("t")
    with serving(max_stored_bytes=topic + 2 * cost + 100) as server, wire_to(server) as wire:
        assert wire.call("PUT", "t", "x" * 80) == 1
        wait_for_stored(server, 1)
        wire.send(encode_request(b"PUT", b"t", b"x" * 21) + encode_request(b"PUT", b"t", b"x" * 20))
        assert wire.receive().code == "FULL"  # type: ignore[union-attr]
        assert wire.receive() == 2
        wait_for_stored(server, 2)
        assert wire.error("PUT", "t", "") == "FULL"


@pytest.mark.parametrize(
    ("setting", "puts"),
    [
        ("max_topics", [("a", "x"), ("b", "x"), ("c", "x")]),
        ("max_stored_messages", [("a", "x"), ("b", "x"), ("c", "x")]),
        ("max_stored_messages_per_topic", [("a", "x"), ("a", "x"), ("a", "x")]),
        ("max_stored_bytes", [("a", "x" * 400), ("b", "x" * 400)]),
        ("max_stored_bytes_per_topic", [("a", "x" * 400), ("a", "x" * 400)]),
    ],
)
def test_full_error_names_the_setting(setting: str, puts: list[tuple[str, str]]) -> None:
    limit = 1_200 if setting == "max_stored_bytes" else 800 if "bytes" in setting else 2
    with serving(**{setting: limit}) as server, wire_to(server) as wire:
        for number, (topic, body) in enumerate(puts[:-1], 1):
            assert wire.call("PUT", topic, body) == number
        wait_for_stored(server, len(puts) - 1)
        last = wire.call("PUT", *puts[-1])
        assert isinstance(last, Full)
        assert str(last).endswith(f"full: {setting} = {limit} reached")
        assert server.context.store.full() == {setting}


def test_full_is_logged_once_at_beginning_and_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "dsmq.server")
    with serving(max_stored_messages=2, expiry_interval_seconds=3600) as server, wire_to(server) as wire:
        caplog.clear()
        for _ in range(3):
            while not isinstance(wire.call("PUT", "t", "x"), Full):
                pass
            # The main thread does this every second.
            server._watch()
            expire_all(server)
        for _ in range(3):
            server._watch()
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
            ("WARNING", "full: max_stored_messages = 2 reached; puts are refused until messages expire"),
            ("INFO", "no longer full: max_stored_messages"),
        ]


def expire_all(server: Server) -> None:
    store = server.context.store
    before, store.max_age_ms = store.max_age_ms, -1
    while store.in_memory.expire():
        pass
    store.max_age_ms = before


@pytest.mark.slow
def test_server_detects_that_limit_no_longer_applies_without_puts() -> None:
    with daemon("--max-stored-messages", "1", "--max-age-seconds", "1") as server:
        wire = Wire(("127.0.0.1", server.port))
        while not isinstance(wire.call("PUT", "t", "x"), Full):
            pass
        wire.close()
        server.wait_for_line(r"WARNING full: max_stored_messages = 1 reached; puts are refused")
        server.wait_for_line(r"INFO no longer full: max_stored_messages$")


def test_limit_stays_full_until_refused_size_fits() -> None:
    now = 0
    store = SQLiteStore(1_000, lambda: now, Limits(max_stored_bytes_per_topic=1_000))
    store.append([(b"t", b"x" * 300, None)])
    now = 500
    store.append([(b"t", b"x" * 300, None)])
    for size in (2_000, 300):
        with pytest.raises(Full):
            store.append([(b"t", b"x" * size, None)])
    assert [store.full() for _ in range(3)] == [{"max_stored_bytes_per_topic"}] * 3
    now = 1_001
    while store.expire():
        pass
    assert store.full() == set()
    # After a message that can never be stored was refused, the topic counts as full until it is empty.
    with pytest.raises(Full):
        store.append([(b"t", b"x" * 2_000, None)])
    assert [store.full() for _ in range(3)] == [{"max_stored_bytes_per_topic"}] * 3
    now = 2_000
    while store.expire():
        pass
    assert store.full() == set()
    store.close()


def test_limit_per_topic_stays_full_while_any_topic_refuses_puts() -> None:
    store = SQLiteStore(1_000, limits=Limits(max_stored_messages_per_topic=1))
    for name in (b"a", b"b"):
        store.append([(name, b"x", None)])
    for name in (b"a", b"b", b"a"):
        with pytest.raises(Full):
            store.append([(name, b"x", None)])
        assert store.full() == {"max_stored_messages_per_topic"}
    store.close()


def test_topics_count_towards_stored_bytes() -> None:
    cost = MESSAGE_OVERHEAD_BYTES + TOPIC_OVERHEAD_BYTES + 3
    store = SQLiteStore(60_000, limits=Limits(max_stored_bytes=3 * cost))
    store.append([(b"aaa", b"", None), (b"bbb", b"", None)])
    assert store.totals().accounted_bytes == 2 * cost
    with pytest.raises(Full):
        store.append([(b"ccc", b"", None), (b"ccc", b"", None)])
    assert store.append([(b"ccc", b"", None)]) == [3]
    store.max_age_ms = -1
    while store.expire():
        pass
    assert store.totals().accounted_bytes == 0
    store.close()


@pytest.mark.parametrize(
    "limits", [{"max_stored_messages_per_topic": 2}, {"max_stored_bytes_per_topic": 2 * MESSAGE_OVERHEAD_BYTES + 20}]
)
def test_full_topic_does_not_affect_others(limits: dict[str, int]) -> None:
    with serving(**limits) as server, wire_to(server) as wire:
        for stored, topic in ((2, "a"), (4, "b")):
            for _ in range(2):
                assert isinstance(wire.call("PUT", topic, "x" * 10), int)
            wait_for_stored(server, stored)
            assert wire.error("PUT", topic, "x" * 10) == "FULL"


@pytest.mark.embedded("puts sent together are checked before any of them is stored, so limits hold only approximately")
def test_new_topics_over_limit_are_refused_but_existing_accept_puts() -> None:
    with serving(max_topics=2) as server, wire_to(server) as wire:
        wire.send(b"PUT a x\r\nPUT b x\r\nPUT c x\r\nPUT a x\r\n")
        replies = [wire.receive() for _ in range(4)]
        assert [replies[0], replies[1], replies[3]] == [1, 2, 3]
        assert replies[2].code == "FULL"  # type: ignore[union-attr]


def test_puts_resume_after_expiry() -> None:
    with (
        serving(max_stored_messages=10, max_age_seconds=0.2, expiry_interval_seconds=0.01, port=0) as server,
        wire_to(server) as wire,
    ):
        wait_until(lambda: isinstance(wire.call("PUT", "t", "x"), Full))
        wait_until(lambda: isinstance(wire.call("PUT", "t", "y"), int))


def test_retried_put_gets_its_id_even_if_full() -> None:
    with serving(max_stored_messages=1, max_topics=1) as server, wire_to(server) as wire:
        assert wire.call("PUT", "t", "x", "KEY", "me", 1) == 1
        wait_for_stored(server, 1)
        assert wire.call("PUT", "t", "x", "KEY", "me", 1) == 1
        assert wire.error("PUT", "t", "x", "KEY", "me", 2) == "FULL"
        assert server.status.totals().messages == 1


@pytest.mark.embedded("puts sent together are checked before any of them is stored, so limits hold only approximately")
def test_client_raises_full() -> None:
    with serving(max_stored_messages=2) as server, connect(port=server.port) as mq:
        mq.put("t", "a")
        with pytest.raises(Full):
            mq.put_many("t", ["b", "c", "d"])
        assert mq.get_many("t") == ["a", "b"]


def test_limits_can_be_lowered_below_current_use() -> None:
    store = SQLiteStore(60_000)
    store.append([(b"t", b"x", None)] * 5)
    store.limits = Limits(max_stored_messages=2)
    with pytest.raises(Full):
        store.append([(b"t", b"x", None)])
    assert len(store.read(b"t", 0, 10, 100)) == 5
    store.limits = Limits()
    store.append([(b"t", b"x", (b"me", 1))])
    store.limits = Limits(
        max_stored_messages=2, max_stored_messages_per_topic=2, max_stored_bytes=10, max_stored_bytes_per_topic=10
    )
    assert store.append([(b"t", b"x", (b"me", 1))]) == [6]
    store.close()


# Waiting readers


def test_waiting_readers_over_limit_get_an_error() -> None:
    with serving(max_waiting_readers=2) as server, ExitStack() as stack:
        waiting = [stack.enter_context(wire_to(server)) for _ in range(2)]
        for wire in waiting:
            wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.status.waiting() == 2)
        late = stack.enter_context(wire_to(server))
        assert late.call("PUT", "other", "y") == 1
        wait_for_stored(server, 1)
        assert late.call("GETWAIT", "other", 60_000) == b"y"
        assert late.error("GETWAIT", "t", 60_000) == "BUSY"
        # It gets an error, but may make other requests.
        assert late.call("PUT", "t", "x") == 2
        assert [wire.receive() for wire in waiting] == [b"x", b"x"]
        assert late.call("GET", "t") == b"x"
        assert server.status.waiting() == 0
        assert late.call("GETWAIT", "t", 1) is None


# Pipelines


def around_turns(loop: EventLoop, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Run each turn of an event loop inside a context manager."""
    turn = ExitStack()
    watch_waits(loop, before=turn.close, after=lambda _: turn.enter_context(context()))


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection runs one request per turn."""
    for name in ("TURN_SECONDS", "MOST_SLICE_SECONDS", "LEAST_SLICE_SECONDS"):
        monkeypatch.setattr(worker, name, 0.0)


@pytest.mark.usefixtures("short_turns")
def test_greedy_client_does_not_starve_others() -> None:
    with serving() as server, wire_to(server) as greedy, wire_to(server) as modest:
        with blocked(server):
            greedy.send(encode_request(b"PUT", b"t", b"x") * 1000)
            modest.send(encode_request(b"PUT", b"t", b"y"))
        place = modest.receive()
        assert isinstance(place, int)
        # Puts that are parsed together run together.
        assert place <= 100
        ids = [greedy.receive() for _ in range(1000)]
        assert ids == [number for number in range(1, 1002) if number != place]


def test_many_clients_get_one_reply_each_before_any_gets_two() -> None:
    with serving() as server, wire_to(server) as modest, ExitStack() as stack:
        crowd = [stack.enter_context(wire_to(server)) for _ in range(worker.CROWD + 10)]
        wait_until(lambda: server.status.connections() == len(crowd) + 1)
        with blocked(server):
            for greedy in crowd:
                greedy.send(encode_request(b"PUT", b"t", b"x") * 100)
            modest.send(encode_request(b"PUT", b"t", b"y"))
        place = modest.receive()
        assert isinstance(place, int)
        assert place <= len(crowd) + 1
        for greedy in crowd:
            assert all(isinstance(greedy.receive(), int) for _ in range(100))


@pytest.mark.usefixtures("short_turns")
def test_new_request_overtakes_pipelines_of_others() -> None:
    with serving() as server, wire_to(server) as modest, ExitStack() as stack:
        crowd = [stack.enter_context(wire_to(server)) for _ in range(20)]
        wait_until(lambda: server.status.connections() == 21)
        loop, before = loop_of(server), []

        def arrive() -> None:
            before.append(server.status.totals().stored)
            modest.send(encode_request(b"PUT", b"t", b"y"))

        @contextmanager
        def arrive_later() -> Iterator[None]:
            yield
            if loop._to_run and not before:
                # In the next turn, before connections with requests left continue.
                loop.post(arrive)

        with blocked(server):
            for greedy in crowd:
                greedy.send(encode_request(b"PUT", b"t", b"x") * 1000)
            around_turns(loop, arrive_later)
        place = modest.receive()
        assert isinstance(place, int)
        # Another connection runs a batch or one request in between.
        assert before[0] < place <= before[0] + 100


@pytest.mark.usefixtures("short_turns")
@pytest.mark.parametrize("requests", [1, 2, 100])
def test_pipeline_is_answered_with_minimal_time_slices(requests: int) -> None:
    with serving() as server, wire_to(server) as wire:
        for request, reply in ((b"PING\r\n", "PONG"), (encode_request(b"GET", b"t"), None)):
            wire.send(request * requests)
            assert [wire.receive() for _ in range(requests)] == [reply] * requests
        wire.send(b"PING\r\n" * requests + b"QUIT\r\n")
        assert [wire.receive() for _ in range(requests + 1)] == ["PONG"] * requests + ["OK"]
        assert wire.ended()


@pytest.mark.usefixtures("short_turns")
def test_hangup_while_waiting_is_noticed_with_minimal_time_slices() -> None:
    with serving() as server:
        with wire_to(server) as wire:
            wire.send(b"GETWAIT t 60000\r\nPING\r\n")
            wait_until(lambda: server.status.waiting() == 1)
        wait_until(lambda: server.status.waiting() == server.status.connections() == 0)


@pytest.mark.parametrize(
    ("request_", "reply"),
    [(b"PING\r\n", "PONG"), (b"FROBNICATE\r\n", "UNKNOWN"), (b"PUT t x\r\n", "NOAUTH"), (b"AUTH\r\n", "BADREQUEST")],
)
def test_unauthenticated_request_count_is_limited(request_: bytes, reply: str) -> None:
    with serving(auth_token="x" * 20) as server, wire_to(server) as wire:
        wire.send(request_ * 400)
        answers = [wire.receive() for _ in range(17)]
        codes = [answer.code if isinstance(answer, ReplyError) else answer for answer in answers]
        assert codes == [reply] * 16 + ["NOAUTH"]
        assert wire.ended()
        # The requests after them have not even been parsed.
        assert server.status.counters().requests == 17


@pytest.mark.parametrize("last", [b"AUTH wrong-token-0123456789\r\n", b"QUIT\r\n", b"PING\r\n" * 17])
@pytest.mark.usefixtures("long_linger")
def test_rejected_client_may_send_only_a_little_more(last: bytes) -> None:
    with (
        serving(auth_token="x" * 20, auth_timeout_seconds=600) as server,
        wire_to(server) as wire,
        wire_to(server) as other,
    ):
        wire.send(last)
        while wire.socket.recv(1000):
            pass
        # If the server closed immediately, the connection would be reset, and the client might lose the reply.
        for _ in range(2):
            wire.send(b"x" * (MAX_DISCARDED_BYTES // 2))
            assert other.call("PING") == "PONG"
        assert server.status.connections() == 2
        wire.send(b"x" * 1000)
        wait_until(lambda: server.status.connections() == 1)


def test_requests_after_auth_in_same_packet_run_in_batches() -> None:
    with serving(auth_token="x" * 20) as server, wire_to(server) as wire:
        wire.send(b"AUTH " + b"x" * 20 + b"\r\n" + b"PING\r\n" * 500)
        assert [wire.receive() for _ in range(501)] == ["OK"] + ["PONG"] * 500


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_total_unread_replies_are_bounded() -> None:
    bounds = {
        "max_total_unread_reply_bytes": 1_000_000,
        "max_unread_reply_bytes": 200_000,
        "max_message_bytes": 110_000,
    }
    with serving(**bounds, io_threads=3) as server, ExitStack() as stack:
        with wire_to(server) as wire:
            for _ in range(10):
                wire.call("PUT", "t", "x" * 100_000)
        replies = server.context.usage.replies
        most = 0
        lazy = [stack.enter_context(wire_to(server)) for _ in range(20)]
        for one in lazy:
            one.send(encode_request(b"READ", b"t", b"0") * 100)
        wait_until(lambda: replies.is_tight)
        # Clients that read make room for others, so no one waits long enough for another to be dropped.
        with ThreadPoolExecutor(20) as readers:
            for done in [readers.submit(lambda one=one: [one.receive() for _ in range(100)]) for one in lazy]:
                while not done.done():
                    most = max(most, replies.total)
                    # Without a pause, this loop would hold the GIL for most of the time.
                    time.sleep(UNIT / 100)
                assert all(isinstance(reply, list) for reply in done.result())
        # Between two checks of the total, each event loop may exceed it by the limit of one connection plus one reply.
        assert most < 1_000_000 + 3 * (200_000 + MAX_READ_BYTES)
        wait_until(lambda: replies.total == 0)
        lazy[0].send(encode_request(b"READ", b"t", b"0") * 100)
        wait_until(lambda: replies.total > 0)
        lazy[0].close()
        wait_until(lambda: replies.total == 0)


def test_reads_are_shortened_while_replies_are_unread() -> None:
    def read(wire: Wire) -> int:
        reply = wire.call("READ", "t", 0, "COUNT", 1000)
        assert isinstance(reply, list)
        return len(reply) // 5

    with serving() as server, wire_to(server) as wire, wire_to(server) as lazy:
        for _ in range(100):
            wire.call("PUT", "t", "x" * 10_000)
        assert read(wire) == 27
        lazy.send(encode_request(b"READ", b"t", b"0") * 1000)
        replies = server.context.usage.replies
        # Wait until more is unread than is being sent.
        wait_until(lambda: replies.total > 1_000_000)
        assert read(wire) == 7
        lazy.close()
        wait_until(lambda: replies.total == 0)
        assert read(wire) == 27


@pytest.mark.parametrize("io_threads", [1, 4])
def test_connections_count_from_accept(io_threads: int) -> None:
    with serving(max_connections=10, io_threads=io_threads) as server, ExitStack() as stack:
        wires = [stack.enter_context(wire_to(server)) for _ in range(40)]
        replies = []
        for wire in wires:
            with contextlib.suppress(ConnectionError):
                wire.send(b"PING\r\n")
            replies.append(wire.receive())
        assert replies.count("PONG") == 10


@pytest.mark.usefixtures("short_turns")
def test_end_of_input_loses_no_buffered_requests() -> None:
    with serving() as server, wire_to(server) as wire:
        wire.send(encode_request(b"PUT", b"t", b"x") * 100)
        wire.socket.shutdown(socket.SHUT_WR)
        assert [wire.receive() for _ in range(100)] == list(range(1, 101))
        assert wire.ended()


# Log


@pytest.mark.slow
def test_log_of_flood_is_short_and_reports_suppressed_lines() -> None:
    with daemon("--max-log-lines-per-second", "2") as process:
        for _ in range(20):
            wire = Wire(("127.0.0.1", process.port))
            wire.send(b"\x00\r\n")
            wire.receive()
            wire.close()
        assert int(process.wait_for_line(r"(\d+) more lines like: client \d+ .*PROTOCOL")[1]) > 0
        process.stop()
    assert sum("PROTOCOL" in line for line in process.log().splitlines()) < 20


# Turns


@pytest.mark.usefixtures("short_turns")
def test_many_waiters_are_woken_over_several_turns() -> None:
    with serving() as server, wire_to(server) as writer, ExitStack() as stack:
        waiting = [stack.enter_context(wire_to(server)) for _ in range(30)]
        for wire in waiting:
            wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.status.waiting() == 30)
        woken = []

        @contextmanager
        def counted() -> Iterator[None]:
            before = server.status.waiting()
            yield
            woken.append(before - server.status.waiting())

        around_turns(loop_of(server), counted)
        assert writer.call("PUT", "t", "x") == 1
        assert [wire.receive() for wire in waiting] == [b"x"] * 30
        assert max(woken) <= 4, woken


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_readers_at_the_same_position_share_a_reply(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    made: list[list[Message]] = []
    monkeypatch.setattr(reads, "encode_messages", lambda found: made.append(found) or encode_messages(found))
    with serving() as server, wire_to(server) as writer, ExitStack() as stack:
        readers = [stack.enter_context(wire_to(server)) for _ in range(6)]
        for number in (1, 2):
            assert writer.call("PUT", "u" if number == 2 else "t", b"a" * size) == number
        after = [0, 2, 2, 2, 2, 2]
        options = [[], [], [], [], ["COUNT", 1], ["LATEST"]]
        for topic, reader, at, words in zip("uuttuu", readers, after, options, strict=True):
            reader.send(encode_request(*[str(word).encode() for word in ("READ", topic, at, "WAIT", 60_000, *words)]))
        # The first reader has its message immediately.
        assert readers[0].receive()[3] == b"a" * size
        wait_until(lambda: server.status.waiting() == 5)
        made.clear()
        with blocked(server):
            for topic in "ut":
                writer.send(encode_request(b"PUT", topic.encode(), topic.encode() * size))
        assert [writer.receive(), writer.receive()] == [3, 4]
        got = [reader.receive() for reader in readers[1:]]
        assert [(reply[0], reply[3]) for reply in got] == [
            *((3, b"u" * size), (4, b"t" * size), (4, b"t" * size), (3, b"u" * size), (3, b"u" * size)),
        ]
        assert len(made) == (4 if size == 1 else 5)
        # Their transports share nothing.
        for number, reader in enumerate(readers[2:4], 5):
            assert reader.call("PUT", "v", "x") == number


def test_long_reply_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Encoded] = []

    def encode(messages: list[Message]) -> Encoded:
        made.append(encode_messages(messages))
        return made[-1]

    monkeypatch.setattr(reads, "encode_messages", encode)
    with serving() as server, wire_to(server) as wire:
        (one,) = wait_for_connections(server, 1)
        body = b"x" * (1 << 20)
        assert wire.call("PUT", "t", body) == 1
        assert wire.call("READ", "t", 0)[3] == body  # type: ignore[index]
        assert one.transport.data is made[0]


# A request, and how many times it is pipelined. In a single turn, all of them would take 40 ms or more.
HEAVY = {
    "CONFIG GET": (encode_request(b"CONFIG", b"GET", *[b"*a*e*i*o*%d" % number for number in range(62)]), 200),
    "inline PING": (b"PING\r\n", 100_000),
}


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Turn off garbage collection, which takes longer than a turn because of everything that the tests import."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("name", HEAVY)
def test_event_loop_turn_is_bounded_by_time(name: str) -> None:
    with serving() as server, wire_to(server) as greedy:
        greedy.send(b"".join(encode_request(b"PUT", b"topic%d" % number, b"x") for number in range(1000)))
        for _ in range(1000):
            greedy.receive()
        seconds: list[float] = []

        @contextmanager
        def timed() -> Iterator[None]:
            began = time.thread_time()
            yield
            seconds.append(time.thread_time() - began)

        around_turns(loop_of(server), timed)
        # A single turn may be long because other processes used the processor.
        assert statistics.median(longest_turn(server, greedy, *HEAVY[name], seconds) for _ in range(5)) < 0.02


def longest_turn(server: Server, wire: Wire, request: bytes, count: int, seconds: list[float]) -> float:
    """Return the duration of the longest turn while the loop answers a pipeline; add all durations to `seconds`."""
    seconds.clear()
    wire.send(request * count)
    for _ in range(count):
        wire.receive()
    # By now, the turn that sent the last reply has ended.
    with blocked(server):
        return max(seconds)
