"""MREAD, LAST and SINCE on the wire."""

from __future__ import annotations

import threading
import tracemalloc
from contextlib import ExitStack
from itertools import count
from typing import Any
from unittest.mock import Mock

import pytest

from conftest import SOON, Wire, loop_of, serving, wait_until, wire_to
from dsmq.broker import waiters
from dsmq.broker.connection import Connection
from dsmq.errors import ReplyError
from dsmq.server import Server
from dsmq.store import scan
from dsmq.store.api import Found, ManyTopics
from dsmq.store.selection import NAME_OVERHEAD_BYTES, Pattern, PatternIndex, Selection
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.resp import encode_request
from security import ADMIN


def bodies(reply: object) -> list[object]:
    assert isinstance(reply, list)
    return reply[5::6]


def send(wire: Wire, text: str) -> None:
    wire.send(encode_request(*text.encode().split()))


@pytest.fixture(params=[0.0, 1.0], ids=["many slices", "one slice"])
def filled(request: pytest.FixtureRequest, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Wire:
    """Three messages in two topics and one in another."""
    monkeypatch.setattr(scan, "SCAN_SECONDS", request.param)
    for topic, body in (("a/1", "x"), ("b", "y"), ("a/2", "z"), ("c", "w")):
        wire.call("PUT", topic, body)
    # A store that copies messages with a delay now has the last one and thus all of them.
    assert wire.call("READ", "c", 0)
    return wire


def test_reply_has_position_and_six_values_per_message(filled: Wire) -> None:
    reply = filled.call("MREAD", 0, "TOPICS", "a/*", "b")
    assert isinstance(reply, list)
    assert reply[0] == 4
    assert [reply[at] for at in (1, 2, 3, 5)] == [b"a/1", 1, 1, b"x"]
    assert reply[1::6] == [b"a/1", b"b", b"a/2"]
    assert bodies(reply) == [b"x", b"y", b"z"]


@pytest.mark.parametrize(
    ("request_", "position", "expected"),
    [
        ("0 COUNT 1 TOPICS a/*", 1, [b"x"]),
        ("1 TOPICS a/*", 4, [b"z"]),
        ("3 TOPICS a/*", 4, []),
        ("0 BYTES 1 TOPICS *", 1, [b"x"]),
        ("0 LATEST TOPICS a/*", 4, [b"x", b"z"]),
        ("LAST 2 TOPICS *", 4, [b"z", b"w"]),
        ("LAST 2 COUNT 1 TOPICS a/* b", 2, [b"y"]),
        ("LAST 9 TOPICS b c", 4, [b"y", b"w"]),
        ("SINCE 100000 TOPICS b", 4, [b"y"]),
        ("last 1 topics b b b", 4, [b"y"]),
        ("0 TOPICS TOPICS", 4, []),
    ],
)
def test_options(filled: Wire, request_: str, position: int, expected: list[bytes]) -> None:
    reply = filled.call("MREAD", *request_.split())
    assert isinstance(reply, list)
    # The id of the reply's last message or the last id.
    assert reply[0] in (position, reply[-5] if expected else position)
    assert bodies(reply) == expected


def test_newest_of_each_topic_are_in_one_reply_even_if_search_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SCAN_SECONDS", 0.0)
    time = count(1)
    store = SQLiteStore(600_000, lambda: next(time))
    for at in range(2_000):
        store.append([(b"t%d" % (at % 20), b"%d" % at, None)])
    with serving(store) as server, wire_to(server) as wire:
        reply = wire.call("MREAD", 0, "LATEST", "TOPICS", "t*")
        assert bodies(reply) == [str(at).encode() for at in range(1980, 2000)]
        reply = wire.call("MREAD", 0, "LATEST", "COUNT", 5, "TOPICS", "t*")
        assert bodies(reply) == [str(at).encode() for at in range(1980, 1985)]


@pytest.mark.parametrize("words", ["LAST 1", "SINCE 100000", "since 100000 LATEST"])
def test_last_and_since_go_back(filled: Wire, words: str) -> None:
    reply = filled.call("READ", "b", *words.split())
    assert isinstance(reply, list)
    assert reply[3::5] == [b"y"]


@pytest.mark.parametrize(
    "request_",
    [
        *(f"READ t 0 EPOCH {'x' * 65}", f"MREAD 0 EPOCH {'x' * 65} TOPICS t"),
        *("READ t LAST", "READ t LAST 0", "READ t SINCE x", "READ t FIRST 1", "READ t* 0", "PUT t* x", "GET *"),
        *(
            "GETLATEST *",
            "GETWAIT * 1",
            "STATS *",
            "MREAD 0 COUNT 1",
            "MREAD TOPICS t",
            "MREAD 0 TOPICS",
            "MREAD 5 TOPICS t",
        ),
        *("MREAD LAST TOPICS t", "MREAD 0 COUNT TOPICS t", "MREAD x TOPICS t u"),
    ],
)
def test_invalid_requests_are_refused(wire: Wire, request_: str) -> None:
    assert wire.error(*request_.split()) == "BADREQUEST"
    assert wire.call("PING") == "PONG"


def test_mread_accepts_up_to_1000_names_within_64_kib(wire: Wire) -> None:
    wire.call("PUT", "t999", "x")
    names = [f"t{at}" for at in range(1000)]
    assert bodies(wire.call("MREAD", 0, "TOPICS", *names)) == [b"x"]
    assert wire.error("MREAD", 0, "TOPICS", *names, "t") == "TOOBIG"
    assert wire.error("MREAD", 0, "TOPICS", "x" * 65_536 + "*") == "TOOBIG"
    assert wire.call("MREAD", 0, "TOPICS", "x" * 65_535 + "*") == [1]
    assert wire.error("MREAD", 0, "TOPICS", "x" * 513) == "TOOBIG"
    wire.send(b"MREAD 0 TOPICS " + b" ".join(name.encode() for name in names) + b"\n")
    assert bodies(wire.receive()) == [b"x"]


def test_many_names_require_authentication() -> None:
    with serving(auth_token=ADMIN) as server, wire_to(server) as wire, wire_to(server) as other:
        assert wire.error("MREAD", 0, "TOPICS", *["t"] * 62) == "PROTOCOL"
        assert wire.ended()
        assert other.call("AUTH", ADMIN) == "OK"
        assert other.call("MREAD", 0, "TOPICS", *["t"] * 62) == [0]


@pytest.mark.parametrize("names", ["a b", "a* b", "*a* b", "*", "x* a*", "a"])
def test_put_wakes_waiting_reader(server: Server, wire: Wire, names: str) -> None:
    with wire_to(server) as reader:
        # The second time, the topic is already known.
        for _ in range(2):
            last = wire.call("PUT", "z" if "*" not in names.split() else "a", "nothing")
            send(reader, f"MREAD {last} WAIT 60000 TOPICS {names}")
            wait_until(lambda: server.status.waiting() == 1)
            message_id = wire.call("PUT", "a", "x")
            reply = reader.receive()
            assert bodies(reply) == [b"x"]
            assert reply[0] == message_id  # type: ignore[index]
        assert server.status.waiting() == 0
        assert not loop_of(server).context.usage.waiting_patterns.total


@pytest.mark.parametrize("request_", ["MREAD LAST 1 WAIT 60000 TOPICS a b*", "READ a SINCE 1000 WAIT 60000"])
def test_wait_for_last_gets_the_next_message(server: Server, wire: Wire, request_: str) -> None:
    with wire_to(server) as reader:
        wire.call("PUT", "other", "x")
        send(reader, request_)
        wait_until(lambda: server.status.waiting() == 1)
        wire.call("PUT", "a", "y")
        assert b"y" in reader.receive()  # type: ignore[operator]


def test_wait_without_messages_returns_position(wire: Wire) -> None:
    wire.call("PUT", "t", "x")
    assert wire.call("MREAD", 0, "WAIT", 1, "TOPICS", "none*") == [1]


def test_waiting_patterns_over_limit_get_an_error() -> None:
    with serving(max_waiting_patterns=3) as server, ExitStack() as stack:
        first, late = (stack.enter_context(wire_to(server)) for _ in range(2))
        send(first, "MREAD 0 WAIT 60000 TOPICS a* b* exact")
        wait_until(lambda: server.status.waiting() == 1)
        assert late.error("MREAD", 0, "WAIT", 1, "TOPICS", "c*", "d*") == "BUSY"
        assert late.call("MREAD", 0, "WAIT", 1, "TOPICS", "c*") == [0]
        assert late.call("PUT", "exact", "x") == 1
        assert bodies(first.receive()) == [b"x"]
        assert server.status.waiting() == 0


def test_transaction_reads_only_its_earlier_puts(wire: Wire) -> None:
    for request_ in ("MULTI", "PUT z 1", "MREAD 0 TOPICS z*", "PUT zz 2", "MREAD LAST 1 TOPICS z*"):
        assert wire.call(*request_.split()) in ("OK", "QUEUED")
    first, early, second, late = wire.call("EXEC")  # type: ignore[misc]
    assert (early[0], bodies(early)) == (1, [b"1"])  # type: ignore[index]
    assert (late[0], bodies(late)) == (2, [b"2"])  # type: ignore[index]
    assert (first, second) == (1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_UNMATCHED_TOPICS", 0), ("MAX_KNOWN_TOPICS", 1), ("MAX_KNOWN_MATCHES", 1), ("MAX_IDLE_PATTERNS", 0)],
)
def test_readers_of_patterns_miss_nothing(
    server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(waiters, name, value)
    with wire_to(server) as reader:
        position, found = 0, list[object]()
        for at in range(20):
            send(reader, f"MREAD {position} WAIT 60000 TOPICS t* u{at % 3}*")
            wait_until(lambda: server.status.waiting() == 1)
            wire.call("PUT", f"n{at}", "nothing")
            wire.call("PUT", f"t{at % 7}", str(at))
            reply = reader.receive()
            assert isinstance(reply, list)
            position = reply[0]
            found += bodies(reply)
        assert found == [str(at).encode() for at in range(20)]


def matched(patterns: waiters.WaitingPatterns, topic: bytes) -> None:
    patterns.put(topic)
    while patterns.unmatched:
        patterns.match_some()


def test_waiting_pattern_is_found_while_unused_ones_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns, reader, found = waiters.WaitingPatterns(), Mock(Connection), list[bool]()
    idle = [Pattern(b"idle %d*" % at) for at in range(3)]
    for pattern in idle:
        patterns.add(pattern, reader)
    matched(patterns, b"topic")
    for pattern in idle:
        patterns.remove(pattern, reader)
    for text in (b"t*", b"u*", b"v*"):
        patterns.add(Pattern(text), reader)

    class Index(PatternIndex):
        def __init__(self, *arguments: Any) -> None:
            # Other threads may call this at any time.
            found.append(patterns.may_match(b"topic"))
            super().__init__(*arguments)

    monkeypatch.setattr(waiters, "PatternIndex", Index)
    monkeypatch.setattr(waiters, "MAX_IDLE_PATTERNS", -4)
    patterns.add(idle[0], reader)
    patterns.remove(idle[0], reader)
    assert found == [True]


def test_remembered_matches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiters, "MAX_KNOWN_MATCHES", 100)
    patterns = waiters.WaitingPatterns()
    for count_ in range(1, 11):
        patterns.add(Pattern(b"t" + b"*" * count_), Mock(Connection))
    for at in range(100):
        matched(patterns, b"t%d" % at)
        assert len(patterns._known) <= 10
    assert len(list(patterns.put(b"t99"))) == 10


def test_other_epoch_is_refused(server: Server, wire: Wire) -> None:
    wire.call("PUT", "t", "x")
    assert wire.error("MREAD", 0, "EPOCH", "another", "TOPICS", "t*") == "EPOCH"
    epoch = server.context.store.epoch
    assert bodies(wire.call("MREAD", 0, "EPOCH", epoch, "TOPICS", "t*")) == [b"x"]


def test_puts_wake_readers_of_all_event_loops() -> None:
    with serving(io_threads=3) as server, ExitStack() as stack:
        writers, readers = ([stack.enter_context(wire_to(server)) for _ in range(3)] for _ in range(2))
        found: list[list[object]] = [[] for _ in readers]
        positions = [0 for _ in readers]
        for at in range(30):
            for reader, position in zip(readers, positions, strict=True):
                send(reader, f"MREAD {position} WAIT 60000 TOPICS t* x*")
            for number, writer in enumerate(writers):
                send(writer, f"PUT {'o' if (at + number) % 3 else 't'}{at} {at}.{number}")
            for number, reader in enumerate(readers):
                reply = reader.receive()
                positions[number] = reply[0]  # type: ignore[index]
                found[number] += bodies(reply)
            for writer in writers:
                writer.receive()
        assert found == [[f"{at}.{-at % 3}".encode() for at in range(30)]] * 3


def test_stop_ends_a_read_that_is_still_searching(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(SQLiteStore(60_000)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        began = threading.Event()

        def search(wanted: ManyTopics, _: int = 0) -> Found:
            began.set()
            return Found(wanted.after, [], is_complete=False)

        monkeypatch.setattr(server.context.store, "read_many", search)
        send(wire, "MREAD 0 WAIT 60000 TOPICS t*")
        assert began.wait(SOON)
        server.stop()
        reply = wire.receive()
        assert isinstance(reply, ReplyError)
        assert reply.code == "CLOSING"
        assert wire.ended()


def test_many_waiting_patterns_cost_little_memory_and_time() -> None:
    patterns, connections = waiters.WaitingPatterns(), [object() for _ in range(100)]
    selections = [Selection([b"prefix/%d/*/%d" % (at, at)]) for at in range(10_000)]
    tracemalloc.start()
    try:
        for at, selection in enumerate(selections):
            patterns.add(selection.patterns[0], connections[at % 100])  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[0] / len(selections) < 2 * NAME_OVERHEAD_BYTES
    finally:
        tracemalloc.stop()
    for at in range(300):
        topic, steps, woken = b"prefix/%d/new/%d" % (at, at), 0, list[object]()
        woken += patterns.put(topic)
        while patterns.unmatched:
            woken += patterns.match_some()
            steps += 1
        assert woken == [connections[at % 100]]
        # Only patterns that begin like the topic are tried.
        assert steps <= 3
