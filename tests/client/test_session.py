"""Positions, read-ahead, missed messages and requests of a client, without I/O."""

from __future__ import annotations

import logging
from typing import get_args

import pytest

from conftest import ClientClock
from dsmq.client import arguments, replies
from dsmq.client import session as wire
from dsmq.client.core import Core
from dsmq.client.message import Message
from dsmq.client.reader import Claim, TopicReader
from dsmq.client.requests import Producer, list_topics
from dsmq.client.session import Session
from dsmq.client.stretch import Entry, Era
from dsmq.errors import (
    BadRequest,
    Busy,
    Full,
    InternalError,
    MessageNotText,
    NotPermitted,
    ProtocolError,
    ReplyError,
    ShuttingDown,
    StoreFailed,
    TimedOut,
)
from dsmq.wire.request_parser import RequestParser
from dsmq.wire.resp import Reply

MAX_AGE = 600.0
NEVER = float("inf")


def hello(epoch: str = "one", last_id: int = 0, **others: Reply) -> Reply:
    facts = {"epoch": epoch.encode(), "last_id": last_id}
    facts |= {
        "run": b"first",
        "max_message_bytes": 1000,
        "server": b"dsmq",
        "modules": [],
        **others,
    }
    return [value for name, fact in facts.items() for value in (name.encode(), fact)]


def a_session(epoch: str = "one", **facts: Reply) -> Session:
    session = Session()
    session.handle_hello(hello(epoch, **facts))  # type: ignore[arg-type]
    return session


def a_reader(position: int = 0, last_number: int | None = None) -> TopicReader:
    return TopicReader("t", Era("one", b"first", position, last_number))


def entry(message_id: int, number: int | None = None, expires: float = NEVER) -> Entry:
    return Entry(message_id, message_id if number is None else number, expires, b"%d" % message_id)


def entries(*ids: int) -> list[Entry]:
    return [entry(message_id) for message_id in ids]


def accept(reader: TopicReader, found: list[Entry]) -> bool:
    """Answer the next request of a reader."""
    return reader.accept(reader.asked(), found)


def take(reader: TopicReader, n: int = 100, claim: Claim | None = None) -> list[int]:
    """Take up to n messages from the read-ahead and return their ids."""
    return reader.take([] if claim is None else claim, n, lambda _, found: found.id)


def request(data: bytes) -> list[bytes]:
    """Parse a single request."""
    parser = RequestParser(1_000_000)
    parser.feed(data)
    found = parser.next()
    assert found is not None
    assert len(parser) == 0
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return caplog.messages


# Requests


def test_requests_without_position_are_encoded() -> None:
    assert request(Session("", b"me").hello) == [b"HELLO", b"2", b"NOTICES", b"SETNAME", b"me"]
    assert request(wire.PING) == [b"PING"]
    assert request(wire.SHUTDOWN) == [b"SHUTDOWN"]
    calls = list_topics([("a", 1, 1), ("café", 1, 1)])
    assert request(next(calls).request(Producer(b"run"))) == [b"TOPICS", b"AFTER", "café".encode()]


@pytest.mark.parametrize("body", ["café", "café".encode(), bytearray("café".encode()), memoryview("café".encode())])
def test_message_may_be_text_or_bytes(body: str | bytes) -> None:
    assert arguments.message(body) == "café".encode()


@pytest.mark.parametrize("body", ["", b""])
def test_message_may_be_empty(body: str | bytes) -> None:
    assert arguments.message(body) == b""


@pytest.mark.parametrize("body", [None, 7, ["x"], {"x": 1}])
def test_message_of_other_type_raises_type_error(body: object) -> None:
    with pytest.raises(TypeError, match=f"not {type(body).__name__}"):
        arguments.message(body)


def test_message_with_lone_surrogate_raises_value_error() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        arguments.message("\ud800")


@pytest.mark.parametrize("topic", [b"t", None, 7])
def test_topic_of_other_type_raises_type_error(topic: object) -> None:
    session = a_session()
    for use in (session.reader, arguments.topic_name):
        with pytest.raises(TypeError, match=f"not {type(topic).__name__}"):
            use(topic)  # type: ignore[arg-type]


def test_empty_topic_raises_value_error() -> None:
    session = a_session()
    for use in (session.reader, arguments.topic_name):
        with pytest.raises(ValueError, match="empty"):
            use("")


# Connection states


@pytest.mark.parametrize("down", ["", "lost", "given up"])
def test_lost_and_restored_connection_are_each_reported_once(down: str) -> None:
    always = ["restarted", "replaced"]
    expected = {"": ["lost"], "lost": ["resumed", "given up"], "given up": ["resumed"]}[down] + always
    for state in get_args(wire.State):
        reported: list[str] = []
        core = Core("localhost", 1, {"on_state_change": reported.append})
        if down:
            core.announce("lost")
        if down == "given up":
            core.announce("given up")
        reported.clear()
        core.announce(state)
        assert bool(reported) == (state in expected)


# The handshake


def test_reader_starts_at_last_id_of_hello() -> None:
    session = a_session(last_id=41)
    assert session.reader("t").position[1] == 41
    assert session.reader("t") is session.reader("t")
    assert session.reader("t") is not session.reader("u")


def test_hello_sets_epoch_and_limit() -> None:
    session = Session()
    session.handle_hello(hello("one", max_message_bytes=7))
    assert (session.epoch, session.max_message_bytes) == ("one", 7)
    session.handle_hello(hello("two", max_message_bytes=8))
    assert (session.epoch, session.max_message_bytes) == ("two", 8)


def test_same_epoch_keeps_positions(caplog: pytest.LogCaptureFixture) -> None:
    session = a_session(last_id=10)
    reader = session.reader("t")
    accept(reader, [entry(11, 4), entry(12, 5)])
    session.handle_hello(hello(last_id=20))
    assert session.reader("later").position[1] == 10
    accept(reader, [entry(15, 7)])
    assert (take(reader), reader.missed) == ([11, 12, 15], 1)
    assert len(warnings(caplog)) == 1


def test_new_epoch_is_read_from_start_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    session = a_session(last_id=10)
    known, other = session.reader("known"), session.reader("other")
    accept(known, [entry(11, 4)])
    session.handle_hello(hello("two", last_id=3))
    session.handle_hello(hello("two", last_id=5))
    assert warnings(caplog) == ["the server was restarted: its messages are lost"]
    # Messages read ahead are not lost.
    assert take(known) == [11]
    for reader in (known, other, session.reader("new")):
        assert reader.asked()[1] == reader.position[1] == 0
        accept(reader, [entry(1, 1), entry(2, 2)])
        assert take(reader) == [1, 2]
        assert reader.missed == 0


def test_first_message_of_new_epoch_shows_missed_count() -> None:
    session = a_session(last_id=10)
    known = session.reader("known")
    session.handle_hello(hello("two", last_id=9))
    for reader in (known, session.reader("new")):
        accept(reader, [entry(3, 3)])
        assert take(reader) == [3]
        assert reader.missed == 2


# Positions


def test_position_refers_to_last_returned_message() -> None:
    session = a_session("e:1", last_id=10)
    assert session.position("t") == "e:1:10"
    reader = session.keep(session.reader("t"))
    accept(reader, entries(11, 12))
    assert session.position("t") == "e:1:10"
    take(reader, 1)
    assert session.position("t") == "e:1:11"


def test_seek_accepts_position_or_id(caplog: pytest.LogCaptureFixture) -> None:
    session = a_session(last_id=10)
    for position, after in (("one:7", 7), (5, 5), ("one:0", 0)):
        assert session.seek("t", position)
        assert session.reader("t").asked()[1] == after
    assert not caplog.records
    assert not session.seek("t", "other:7")
    assert session.reader("t").asked()[1] == 0
    assert "another epoch" in caplog.text


@pytest.mark.parametrize(
    "position",
    ["", "x", "one", "one:", ":7", "one:-1", "one:1.0", "one:²", -1, 2**63, f"one:{2**63}", "one:" + "9" * 5000],
)
def test_malformed_position_raises_value_error(position: str | int) -> None:
    session = a_session(last_id=10)
    with pytest.raises(ValueError, match=r"is not a position|id should be"):
        session.seek("t", position)
    assert session.reader("t").asked()[1] == 10


@pytest.mark.parametrize("position", [None, True, 7.0, b"one:7"])
def test_position_of_other_type_raises_type_error(position: object) -> None:
    with pytest.raises(TypeError):
        a_session().seek("t", position)  # type: ignore[arg-type]


# Forgotten topics


def test_many_topics_without_messages_are_forgotten() -> None:
    session = a_session()
    first = session.reader("first")
    for number in range(2000):
        session.reader(f"topic {number}")
    assert session.reader("first") is not first


def test_topic_is_forgotten_once_all_its_messages_expired(client_clock: ClientClock) -> None:
    session = a_session(last_id=10)
    for topic in ("silent", "busy"):
        accept(session.keep(session.reader(topic)), [entry(11, 1), entry(13, 3)])
        assert take(session.reader(topic)) == [11, 13]
    silent = session.reader("silent")
    for seconds in (250, 500, 625, 627):
        client_clock.passed = seconds
        assert (session.reader("silent") is silent, session.missed) == (True, 2)
        session.keep(session.reader("busy"))
        for number in range(wire._MIN_READERS - 2):
            session.reader(f"{seconds} {number}")
        # This message shows that messages are now kept for 500 seconds.
        session.entries([20, 1, 100_000, b"x", 400_000])
    assert (session.reader("silent").position[1], session.reader("busy").position[1], session.missed) == (10, 13, 2)


def test_returned_messages_are_released_when_other_topics_are_read() -> None:
    session = a_session()
    readers = []
    for number in range(300):
        reader = session.keep(session.reader(f"topic {number}"))
        readers.append(reader)
        accept(reader, entries(number + 1, 1000))
        take(reader, 2 if number % 3 else 1)
    for number, reader in enumerate(readers):
        stretch, at = reader._current()
        assert bool(stretch.ahead) == (number >= 200 or not number % 3)
        assert (stretch.taken(at)[0], take(reader)) == ((1000, []) if number % 3 else (number + 1, [1000]))


def test_topic_is_forgotten_on_demand() -> None:
    session = a_session(last_id=10)
    accept(session.keep(session.reader("t")), [entry(11, 1), entry(13, 3)])
    take(session.reader("t"))
    session.forget("t")
    assert (session.reader("t").position[1], session.missed) == (10, 1)
    with pytest.raises(TypeError):
        session.forget(b"t")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [Full("no"), NotPermitted("no")], ids=repr)
def test_error_reply_to_hello_is_raised(error: ReplyError) -> None:
    session = Session()
    with pytest.raises(type(error)) as caught:
        session.handle_hello(error)
    assert caught.value is error
    assert session.epoch == ""


def without(name: str) -> Reply:
    facts = hello()
    assert isinstance(facts, list)
    at = facts.index(name.encode())
    return facts[:at] + facts[at + 2 :]


NO_GREETINGS: dict[str, Reply] = {
    "null": None,
    "a simple string": "OK",
    "an integer": 1,
    "a bulk string": b"dsmq",
    "an odd array": [b"epoch"],
    "an empty array": [],
    "another server": hello(server=b"redis"),
    "names that are not text": [1, 2],
    **{f"no {name}": without(name) for name in ("epoch", "last_id", "max_message_bytes")},
    "last_id is not an integer": hello(last_id=b"x"),  # type: ignore[arg-type]
    "max_message_bytes is not an integer": hello(max_message_bytes=None),
    "a name that is not UTF-8": [b"\xff", 1, *hello()],  # type: ignore[misc]
    "an epoch that is not UTF-8": [*hello(), b"epoch", b"\xff"],  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", NO_GREETINGS)
def test_invalid_hello_reply_raises_protocol_error(name: str) -> None:
    session = Session()
    with pytest.raises(ProtocolError):
        session.handle_hello(NO_GREETINGS[name])
    assert session.epoch == ""


# Replies


def test_read_ahead_messages_expire_by_their_own_age(client_clock: ClientClock) -> None:
    found = a_session().entries([5, 1, 0, b"new", 600_000, 6, 2, 600_000, b"old", 0])
    assert found == [Entry(5, 1, 5600.0, b"new", 5000.0), Entry(6, 2, 5000.0, b"old", 4400.0)]


def test_empty_array_parses_as_no_messages() -> None:
    assert a_session().entries([]) == []


def test_message_has_put_time(client_clock: ClientClock) -> None:
    session = a_session()
    reader = session.reader("t")
    [found] = session.entries([5, 2, 30_000, b"x", 570_000])
    client_clock.passed = 10.0
    message = session.message(reader, found)
    assert message == Message("t", 5, 2, message.put_at, b"x")
    assert message.put_at == pytest.approx(1_700_000_000.0 - 30.0, abs=0.001)


def test_utf8_message_is_text() -> None:
    reader = a_reader()
    good, bad = Entry(1, 1, NEVER, "café".encode()), Entry(2, 2, NEVER, b"\xff")
    assert (wire.text(reader, good), wire.body(reader, good)) == ("café", "café".encode())
    assert wire.body(reader, bad) == b"\xff"
    with pytest.raises(MessageNotText, match="'t'"):
        wire.text(reader, bad)
    assert Message("t", 1, 1, 0.0, good.body).text == "café"
    with pytest.raises(MessageNotText, match="'t'"):
        _ = Message("t", 2, 2, 0.0, bad.body).text


NO_MESSAGES: list[Reply] = [None, "OK", 1, b"x", [1], [1, 1, 0], [1, 1, 0, b"x"], [[1, 1, 0, b"x", 1]] * 5]
WRONG_MESSAGES: list[Reply] = [
    [b"1", 1, 0, b"x", 1],
    [1, b"1", 0, b"x", 1],
    [1, 1, b"0", b"x", 1],
    [1, 1, 0, "x", 1],
    [1, 1, 0, None, 1],
    [1, 1, 0, b"x", None],
    [1, 1, 0, b"x", 1, 2, 2, 0, 0, 1],
]


@pytest.mark.parametrize("reply", [*NO_MESSAGES, *WRONG_MESSAGES], ids=repr)
def test_invalid_messages_reply_raises_protocol_error(reply: Reply) -> None:
    with pytest.raises(ProtocolError):
        a_session().entries(reply)


@pytest.mark.parametrize("reply", [None, "OK", b"1", [], [1]], ids=repr)
def test_invalid_id_raises_protocol_error(reply: Reply) -> None:
    with pytest.raises(ProtocolError):
        replies.stored_id(reply)


def test_integer_reply_to_put_is_an_id() -> None:
    assert replies.stored_id(7) == 7


@pytest.mark.parametrize("error", [Full("no room"), StoreFailed("no"), BadRequest("what"), ReplyError("ERR")], ids=repr)
def test_error_reply_is_raised_unchanged(error: ReplyError) -> None:
    for use in (a_session().entries, replies.stored_id, replies.topics, replies.check):
        with pytest.raises(type(error)) as caught:
            use(error)
        assert caught.value is error


@pytest.mark.parametrize("reply", [None, "OK", 1, b"x", []], ids=repr)
def test_ordinary_reply_passes_check(reply: Reply) -> None:
    assert replies.check(reply) == reply


@pytest.mark.parametrize("kind", [ProtocolError, Busy, ShuttingDown, TimedOut, InternalError])
def test_fatal_error_reply_is_raised_at_once(kind: type[ReplyError]) -> None:
    with pytest.raises(kind):
        replies.raise_if_fatal(kind("bye"))


@pytest.mark.parametrize("reply", [None, "OK", 1, b"x", [], Full("no room"), BadRequest("what")], ids=repr)
def test_ordinary_reply_is_not_fatal(reply: Reply) -> None:
    assert replies.raise_if_fatal(reply) is reply


def test_topics_are_parsed_as_triples() -> None:
    assert replies.topics([]) == []
    assert replies.topics([b"a", 1, 2, "é".encode(), 3, 4]) == [("a", 1, 2), ("é", 3, 4)]


@pytest.mark.parametrize(
    "reply",
    [None, "OK", 1, b"x", [b"a"], [b"a", 1, 2, b"b"], [b"a", 1, b"2"], [b"a", b"1", 2], [1, 2, 3], [b"\xff", 1, 2]],
    ids=repr,
)
def test_invalid_topics_reply_raises_protocol_error(reply: Reply) -> None:
    with pytest.raises(ProtocolError):
        replies.topics(reply)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefusedError(111, "no server"), "no server"),
        (OSError("gone"), "gone"),
        (TimeoutError(), "no reply in time"),
    ],
)
def test_error_has_code_and_message(error: Exception, said: str) -> None:
    assert replies.reason(error) == said
