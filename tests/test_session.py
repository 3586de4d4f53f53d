"""What a client knows, without input or output: positions, what was read ahead, what was missed, what it asks for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmq import session as wire
from dsmq.errors import (
    BadRequest,
    Busy,
    Closing,
    Full,
    InternalError,
    MessageNotText,
    NotPermitted,
    ProtocolError,
    ReplyError,
    StoreFailed,
    TimedOut,
    TooBig,
)
from dsmq.protocol import Reply, RequestParser
from dsmq.session import Entry, Inbox, Message, Session

MAX_AGE = 600.0
NEVER = float("inf")


class Time:
    """Stands for the module `time`; it passes when the test says so."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return 5000.0 + self.passed

    def time(self) -> float:
        return 1_700_000_000.0 + self.passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(wire, "time", clock)
    return clock


def hello(epoch: str = "one", last_id: int = 0, **others: Reply) -> Reply:
    facts = {"epoch": epoch.encode(), "last_id": last_id}
    facts |= {
        "run": b"first",
        "max_message_bytes": 1000,
        "max_topic_bytes": 20,
        "server": b"dsmq",
        "modules": [],
        **others,
    }
    return [value for name, fact in facts.items() for value in (name.encode(), fact)]


def a_session(**facts: Reply) -> Session:
    session = Session()
    session.greet(hello(**facts))  # type: ignore[arg-type]
    return session


def an_inbox(position: int = 0, last_number: int | None = None) -> Inbox:
    return Inbox("t", b"t", position, last_number)


def entry(message_id: int, number: int | None = None, expires: float = NEVER) -> Entry:
    return Entry(message_id, message_id if number is None else number, expires, b"%d" % message_id)


def entries(*ids: int) -> list[Entry]:
    return [entry(message_id) for message_id in ids]


def accept(inbox: Inbox, found: list[Entry], latest: bool = False) -> None:
    """Give an inbox what it has asked for now."""
    inbox.accept(found, generation=inbox.generation, latest=latest)


def take(inbox: Inbox, n: int = 100) -> list[int]:
    """Take up to n of the messages that were read ahead, and return the ids."""
    return inbox.take(n, lambda _, found: found.id)


def request(data: bytes) -> list[bytes]:
    """Return the one request that these bytes are."""
    parser = RequestParser(1_000_000)
    parser.feed(data)
    found = parser.next()
    assert found is not None
    assert len(parser) == 0
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return caplog.messages


# What is asked for


def test_read_asks_for_what_is_behind_the_position() -> None:
    inbox = Inbox("café", "café".encode(), 12, None)
    assert request(inbox.request()) == [b"READ", "café".encode(), b"12"]
    assert request(inbox.request(1500)) == [b"READ", "café".encode(), b"12", b"WAIT", b"1500"]
    assert request(inbox.request(latest=True)) == [b"READ", "café".encode(), b"12", b"LATEST"]
    accept(inbox, entries(13, 1_000_000))
    assert request(inbox.request()) == [b"READ", "café".encode(), b"1000000"]


def test_the_other_requests() -> None:
    assert request(Session().hello) == [b"HELLO", b"2", b"NOTICES"]
    assert request(wire.PING) == [b"PING"]
    assert request(wire.SHUTDOWN) == [b"SHUTDOWN"]
    assert request(wire.topics_request([])) == [b"TOPICS"]
    assert request(wire.topics_request([("a", 1, 1), ("café", 1, 1)])) == [b"TOPICS", b"AFTER", "café".encode()]


@pytest.mark.parametrize("body", ["café", "café".encode(), bytearray("café".encode()), memoryview("café".encode())])
def test_a_message_is_text_or_bytes(body: str | bytes) -> None:
    assert a_session().put("t", body) == (b"t", "café".encode())


@pytest.mark.parametrize("body", ["", b""])
def test_a_message_may_be_empty(body: str | bytes) -> None:
    assert a_session().put("t", body) == (b"t", b"")


@pytest.mark.parametrize("body", [None, 7, ["x"], {"x": 1}])
def test_a_message_of_another_type_is_a_type_error(body: object) -> None:
    with pytest.raises(TypeError, match=f"not {type(body).__name__}"):
        a_session().put("t", body)  # type: ignore[arg-type]


def test_a_message_over_the_limit_is_too_big() -> None:
    session = a_session(max_message_bytes=4)
    assert session.put("t", "éé")[1] == "éé".encode()
    for body in ("ééx", b"xxxxx"):
        with pytest.raises(TooBig, match="at most 4 bytes, not 5"):
            session.put("t", body)


def test_a_message_of_half_a_character_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        a_session().put("t", "\ud800")


@pytest.mark.parametrize("topic", [b"t", None, 7])
def test_a_topic_that_is_no_str_is_a_type_error(topic: object) -> None:
    session = a_session()
    for use in (session.inbox, lambda topic: session.put(topic, "x")):
        with pytest.raises(TypeError, match=f"not {type(topic).__name__}"):
            use(topic)  # type: ignore[arg-type]


def test_an_empty_topic_is_a_value_error() -> None:
    session = a_session()
    for use in (session.inbox, lambda topic: session.put(topic, "x")):
        with pytest.raises(ValueError, match="empty"):
            use("")


def test_a_topic_over_the_limit_in_bytes_is_too_big() -> None:
    session = a_session(max_topic_bytes=4)
    for use in (session.inbox, lambda topic: session.put(topic, "x")):
        use("éé")
        with pytest.raises(TooBig, match="at most 4 bytes, not 5"):
            use("ééx")


# What comes


def test_messages_come_out_in_the_order_in_which_they_came() -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2))
    accept(inbox, entries(3))
    assert take(inbox) == [1, 2, 3]
    assert take(inbox) == []


def test_take_stops_at_n_and_at_what_is_there() -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2, 3))
    assert [take(inbox, 0), take(inbox, 2), take(inbox, 2), take(inbox, 2)] == [[], [1, 2], [3], []]


def test_what_cannot_be_converted_stays() -> None:
    inbox = an_inbox()
    accept(inbox, [entry(1), entry(2)._replace(body=b"\xff"), entry(3)])
    assert inbox.take(3, wire.text) == ["1"]
    for n in (1, 2):
        with pytest.raises(MessageNotText):
            inbox.take(n, wire.text)
    assert take(inbox) == [2, 3]


def test_too_few_are_not_taken() -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2, 3))
    assert inbox.take(5, lambda _, found: found.id, 4) == []
    assert inbox.take(1, lambda _, found: found.id, 1) == [1]
    assert inbox.take(5, lambda _, found: found.id, 2) == [2, 3]
    assert inbox.take(1, lambda _, found: found.id) == []


def test_an_interrupt_leaves_no_message_twice_and_none_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: after each line that is run in the inbox, one is raised."""
    steps = 0

    def interrupt_at(limit: int) -> Callable[..., Any]:
        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal steps
            if frame.f_code.co_filename == wire.__file__ and event == "line":
                steps += 1
                if steps == limit:
                    raise KeyboardInterrupt
            return trace

        return trace

    interrupted = 0
    for limit in range(1, 200):
        inbox, steps = an_inbox(), 0
        accept(inbox, entries(1, 2))
        sys.settrace(interrupt_at(limit))
        got: list[int] = []
        try:
            accept(inbox, entries(3, 4))
            got += inbox.take(2, lambda _, found: found.id)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        accept(inbox, entries(*range(inbox.position + 1, 7)))
        rest = take(inbox)
        # What was about to be handed out may be gone.
        assert got + rest == [1, 2, 3, 4, 5, 6] or (not got and rest == [3, 4, 5, 6]), limit
        if interrupted < limit:
            break
    assert interrupted > 10


def test_the_position_is_the_last_id_that_came_not_the_last_taken() -> None:
    inbox = an_inbox(position=4)
    accept(inbox, [])
    assert (inbox.position, inbox._place.last_number) == (4, None)
    accept(inbox, [entry(7, 2), entry(9, 3)])
    assert (inbox.position, inbox._place.last_number) == (9, 3)
    assert take(inbox) == [7, 9]
    assert inbox.position == 9


def test_what_two_threads_have_fetched_comes_once() -> None:
    inbox = an_inbox(position=1)
    accept(inbox, entries(2, 3))
    accept(inbox, entries(2, 3, 4))
    accept(inbox, entries(2))
    assert take(inbox) == [2, 3, 4]
    accept(inbox, entries(3, 4))
    assert take(inbox) == []
    assert (inbox.position, inbox._place.last_number, inbox.missed) == (4, 4, 0)


def test_what_was_fetched_before_get_latest_passed_over_it_does_not_come() -> None:
    inbox = an_inbox()
    accept(inbox, entries(5), latest=True)
    accept(inbox, entries(3, 4, 5, 6))
    assert take(inbox) == [5, 6]


def test_what_was_read_ahead_is_passed_over_with_the_rest() -> None:
    inbox = an_inbox(1)
    accept(inbox, entries(2, 3))
    accept(inbox, entries(5), latest=True)
    # Another thread that takes now must not find a hole.
    assert take(inbox) == [5]
    accept(inbox, entries(6, 7))
    accept(inbox, [], latest=True)
    assert take(inbox) == [6, 7]


@pytest.mark.parametrize("down", ["", "lost", "given up"])
def test_each_loss_is_told_once_and_so_is_its_end(down: str) -> None:
    told = [state for state in get_args(wire.State) if wire.is_news(state, down)]
    always = ["restarted", "replaced"]
    assert set(told) == {"": {"lost"}, "lost": {"resumed", "given up"}, "given up": {"resumed"}}[down] | set(always)


def test_get_latest_forgets_all_that_was_read_ahead_but_the_newest() -> None:
    inbox = an_inbox()
    inbox.skip_to_latest()
    accept(inbox, entries(1, 2, 3))
    inbox.skip_to_latest()
    assert take(inbox) == [3]
    assert inbox.missed == 0


def test_a_seek_moves_and_may_drop_what_was_read_ahead() -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2, 3))
    inbox.seek(1, None, drop=True)
    assert take(inbox) == []
    accept(inbox, entries(2, 3))
    assert take(inbox) == [2, 3]
    assert inbox.missed == 0


def test_what_was_asked_for_before_a_seek_is_not_taken() -> None:
    inbox = an_inbox(position=100, last_number=7)
    accept(inbox, [entry(101, 8), entry(102, 9)])
    inbox.seek(0, 0)
    inbox.accept([entry(103, 10)], generation=0)
    assert (inbox.position, inbox._place.last_number, inbox.missed) == (0, 0, 0)
    accept(inbox, entries(1))
    assert take(inbox) == [101, 102, 1]
    assert inbox.missed == 0


# What expires


def test_what_passes_its_age_in_the_read_ahead_does_not_come(clock: Time) -> None:
    session = a_session()
    inbox = session.inbox("t")
    accept(inbox, session.entries([1, 1, 595_000, b"1", 5_000, 2, 2, 590_000, b"2", 10_000]))
    clock.passed = 5.0
    assert take(inbox) == [2]
    assert inbox.missed == 1


def test_what_expires_later_comes_until_then(clock: Time) -> None:
    inbox = an_inbox()
    accept(inbox, [entry(1, expires=5010.0), entry(2, expires=5020.0), entry(3, expires=5020.0)])
    clock.passed = 15.0
    assert take(inbox, 1) == [2]
    clock.passed = 25.0
    assert take(inbox, 1) == []
    assert inbox.missed == 2


def test_a_hole_in_the_numbers_is_what_was_missed(caplog: pytest.LogCaptureFixture) -> None:
    inbox = an_inbox()
    accept(inbox, [entry(10, 3), entry(20, 4), entry(30, 9)])
    assert inbox.missed == 4
    accept(inbox, [entry(40, 11)])
    assert inbox.missed == 5
    assert take(inbox) == [10, 20, 30, 40]
    assert warnings(caplog) == [
        "topic 't': 4 messages expired before they were read",
        "topic 't': 1 messages expired before they were read",
    ]


def test_before_the_first_message_no_number_is_known_so_nothing_was_missed() -> None:
    inbox = an_inbox(position=50)
    accept(inbox, [entry(60, 7)])
    assert inbox.missed == 0


def test_where_the_number_is_known_the_first_message_may_show_a_hole() -> None:
    inbox = an_inbox(last_number=0)
    accept(inbox, [entry(60, 7)])
    assert inbox.missed == 6


def test_what_get_latest_passes_over_was_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    inbox = an_inbox()
    accept(inbox, [entry(1, 1)])
    accept(inbox, [entry(9, 9)], latest=True)
    assert (inbox.missed, inbox._place.last_number) == (0, 9)
    accept(inbox, [entry(12, 12)])
    assert inbox.missed == 2
    assert len(warnings(caplog)) == 1


def test_a_topic_whose_numbering_was_forgotten_starts_again() -> None:
    inbox = an_inbox()
    accept(inbox, [entry(1, 5), entry(2, 1), entry(3, 2), entry(4, 4)])
    assert inbox.missed == 1
    assert take(inbox) == [1, 2, 3, 4]


def test_what_expires_together_in_the_read_ahead_is_logged_once(clock: Time, caplog: pytest.LogCaptureFixture) -> None:
    inbox = an_inbox()
    accept(inbox, [entry(number, expires=5010.0) for number in (1, 2, 3)])
    accept(inbox, entries(4))
    clock.passed = 15.0
    assert take(inbox) == [4]
    assert inbox.missed == 3
    assert warnings(caplog) == ["topic 't': 3 messages expired before they were read"]


@given(
    survivors=st.sets(st.integers(1, 40), min_size=1).map(sorted),
    batches=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=10),
)
@settings(deadline=None)
def test_taken_and_missed_add_up_however_fetches_overlap(survivors: list[int], batches: list[tuple[int, int]]) -> None:
    inbox = an_inbox(last_number=0)
    for start, count in batches:
        # What some thread has asked for behind the position, or before it, but never with a hole.
        after = min(start, inbox.position)
        accept(inbox, [entry(number) for number in survivors if number > after][:count])
    accept(inbox, [entry(number) for number in survivors if number > inbox.position])
    assert take(inbox) == survivors
    assert inbox.missed == survivors[-1] - len(survivors)


def test_missed_is_the_sum_over_all_topics() -> None:
    session = a_session()
    assert session.missed == 0
    for topic in ("a", "b"):
        accept(session.inbox(topic), [entry(1, 1), entry(2, 4)])
    assert session.missed == 4


# The handshake


def test_a_client_reads_what_was_put_after_it_connected() -> None:
    session = a_session(last_id=41)
    assert session.inbox("t").position == 41
    assert session.inbox("t") is session.inbox("t")
    assert session.inbox("t") is not session.inbox("u")


def test_greet_returns_the_epoch_and_takes_the_limits() -> None:
    session = Session()
    session.greet(hello("one", max_message_bytes=7, max_topic_bytes=3))
    assert session.epoch == "one"
    assert (session.max_message_bytes, session.max_topic_bytes) == (7, 3)
    session.greet(hello("two", max_message_bytes=8, max_topic_bytes=4))
    assert session.epoch == "two"
    assert (session.max_message_bytes, session.max_topic_bytes) == (8, 4)


def test_in_the_same_epoch_everything_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    session = a_session(last_id=10)
    inbox = session.inbox("t")
    accept(inbox, [entry(11, 4), entry(12, 5)])
    session.greet(hello(last_id=20))
    assert (inbox.position, inbox._place.last_number) == (12, 5)
    assert session.inbox("later").position == 10
    accept(inbox, [entry(15, 7)])
    assert (take(inbox), session.missed) == ([11, 12, 15], 1)
    assert len(warnings(caplog)) == 1


def test_a_new_epoch_is_read_from_its_start_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    session = a_session(last_id=10)
    known, other = session.inbox("known"), session.inbox("other")
    accept(known, [entry(11, 4)])
    session.greet(hello("two", last_id=3))
    session.greet(hello("two", last_id=5))
    assert warnings(caplog) == ["the server has been started anew: the messages it held are lost"]
    for inbox in (known, other, session.inbox("new")):
        assert (inbox.position, inbox._place.last_number) == (0, 0)
        accept(inbox, [entry(1, 1), entry(2, 2)])
    assert (take(known), take(other), session.missed) == ([11, 1, 2], [1, 2], 0)


def test_in_a_new_epoch_the_first_message_shows_what_was_missed() -> None:
    session = a_session(last_id=10)
    known = session.inbox("known")
    session.greet(hello("two", last_id=9))
    for inbox in (known, session.inbox("new")):
        accept(inbox, [entry(3, 3)])
        assert inbox.missed == 2


@pytest.mark.parametrize("error", [ReplyError("ERR unknown command"), NotPermitted("no")], ids=repr)
def test_an_error_for_a_greeting_is_raised(error: ReplyError) -> None:
    session = Session()
    with pytest.raises(type(error)) as caught:
        session.greet(error)
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
    "names that are none": [1, 2],
    **{f"no {name}": without(name) for name in ("epoch", "last_id", "max_message_bytes", "max_topic_bytes")},
    "last_id that is no integer": hello(last_id=b"x"),  # type: ignore[arg-type]
    "max_message_bytes that is no integer": hello(max_message_bytes=None),
    "max_topic_bytes that is no integer": hello(max_topic_bytes=b""),
    "a name that is not UTF-8": [b"\xff", 1, *hello()],  # type: ignore[misc]
    "an epoch that is not UTF-8": [*hello(), b"epoch", b"\xff"],  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", NO_GREETINGS)
def test_what_is_no_greeting_is_a_protocol_error(name: str) -> None:
    session = Session()
    with pytest.raises(ProtocolError):
        session.greet(NO_GREETINGS[name])
    assert session.epoch == ""


# Replies


def test_messages_expire_as_much_later_as_they_are_younger(clock: Time) -> None:
    found = a_session().entries([5, 1, 0, b"new", 600_000, 6, 2, 600_000, b"old", 0])
    assert found == [Entry(5, 1, 5600.0, b"new", 5000.0), Entry(6, 2, 5000.0, b"old", 4400.0)]


def test_no_messages_is_an_empty_array() -> None:
    assert a_session().entries([]) == []


def test_a_message_tells_when_it_was_put(clock: Time) -> None:
    session = a_session()
    inbox = session.inbox("t")
    [found] = session.entries([5, 2, 30_000, b"x", 570_000])
    clock.passed = 10.0
    message = session.message(inbox, found)
    assert message == Message("t", 5, 2, message.put_at, b"x")
    assert message.put_at == pytest.approx(1_700_000_000.0 - 30.0, abs=0.001)


def test_a_message_is_text_where_it_is_utf_8() -> None:
    inbox = an_inbox()
    good, bad = Entry(1, 1, NEVER, "café".encode()), Entry(2, 2, NEVER, b"\xff")
    assert (wire.text(inbox, good), wire.body(inbox, good)) == ("café", "café".encode())
    assert wire.body(inbox, bad) == b"\xff"
    with pytest.raises(MessageNotText, match="'t'"):
        wire.text(inbox, bad)
    assert (wire.converter(raw=False), wire.converter(raw=True)) == (wire.text, wire.body)
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
def test_what_holds_no_messages_is_a_protocol_error(reply: Reply) -> None:
    with pytest.raises(ProtocolError):
        a_session().entries(reply)


@pytest.mark.parametrize("reply", [None, "OK", b"1", [], [1]], ids=repr)
def test_what_is_no_id_is_a_protocol_error(reply: Reply) -> None:
    with pytest.raises(ProtocolError):
        wire.stored_id(reply)


def test_an_id_is_an_integer() -> None:
    assert wire.stored_id(7) == 7


@pytest.mark.parametrize("error", [Full("no room"), StoreFailed("no"), BadRequest("what"), ReplyError("ERR")], ids=repr)
def test_an_error_is_raised_as_it_is(error: ReplyError) -> None:
    for use in (a_session().entries, wire.stored_id, wire.topics, wire.check):
        with pytest.raises(type(error)) as caught:
            use(error)
        assert caught.value is error


@pytest.mark.parametrize("reply", [None, "OK", 1, b"x", []], ids=repr)
def test_any_other_reply_passes_the_check(reply: Reply) -> None:
    assert wire.check(reply) == reply


@pytest.mark.parametrize("kind", [ProtocolError, Busy, Closing, TimedOut, InternalError])
def test_an_error_behind_which_the_server_hangs_up_is_raised_at_once(kind: type[ReplyError]) -> None:
    with pytest.raises(kind):
        wire.unless_last(kind("bye"))


@pytest.mark.parametrize("reply", [None, "OK", 1, b"x", [], Full("no room"), BadRequest("what")], ids=repr)
def test_any_other_reply_is_not_the_last(reply: Reply) -> None:
    assert wire.unless_last(reply) is reply


def test_topics_come_in_threes() -> None:
    assert wire.topics([]) == []
    assert wire.topics([b"a", 1, 2, "é".encode(), 3, 4]) == [("a", 1, 2), ("é", 3, 4)]


@pytest.mark.parametrize(
    "reply",
    [None, "OK", 1, b"x", [b"a"], [b"a", 1, 2, b"b"], [b"a", 1, b"2"], [b"a", b"1", 2], [1, 2, 3], [b"\xff", 1, 2]],
    ids=repr,
)
def test_what_holds_no_topics_is_a_protocol_error(reply: Reply) -> None:
    with pytest.raises(ProtocolError):
        wire.topics(reply)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefusedError(111, "no server"), "no server"),
        (OSError("gone"), "gone"),
        (TimeoutError(), "no reply in time"),
    ],
)
def test_what_an_error_says(error: Exception, said: str) -> None:
    assert wire.reason(error) == said
