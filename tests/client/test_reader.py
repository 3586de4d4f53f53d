"""A client's reader of one topic, without a server: order, missed and given back messages, restarts."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_session import a_reader, accept, entries, entry, take, warnings

from conftest import ClientClock
from dsmq.client import reader as reader_module
from dsmq.client.reader import Claim, Returned, TopicReader, take_back
from dsmq.client.session import text
from dsmq.client.stretch import Entry, Era
from dsmq.errors import MessageNotText
from dsmq.system import boot_time


def take_latest(reader: TopicReader, found: list[Entry], claim: Claim | None = None) -> list[int] | None:
    claim = [] if claim is None else claim
    return reader.take_latest(claim, reader.asked_for_latest(), found, lambda _, found: found.id)


def give_back(claim: Claim) -> None:
    take_back([(claim, [])])


def follow(reader: TopicReader, epoch: str, run: bytes, restored_id: int = 0) -> Era:
    """Tell a reader that the server was restarted."""
    era = reader.asked()[0].era
    same = epoch == era.epoch
    era.next[0] = Era(epoch, run, era.start if same else 0, era.number if same else 0, [(restored_id, 2**31)])
    return era.next[0]


def renumber(reader: TopicReader, restored: int) -> None:
    if doubt := reader.doubt:
        reader.renumber(doubt, restored)


# Order and positions


def test_messages_are_returned_in_order_received() -> None:
    reader = a_reader()
    accept(reader, entries(1, 2))
    accept(reader, entries(3))
    assert take(reader) == [1, 2, 3]
    assert take(reader) == []


def test_take_stops_at_n_and_at_end() -> None:
    reader = a_reader()
    accept(reader, entries(1, 2, 3))
    assert [take(reader, 2), take(reader, 2), take(reader, 2)] == [[1, 2], [3], []]


def test_unconvertible_message_stays() -> None:
    reader = a_reader()
    accept(reader, [entry(1), entry(2)._replace(body=b"\xff"), entry(3)])
    assert reader.take([], 3, text) == ["1"]
    for n in (1, 2):
        with pytest.raises(MessageNotText):
            reader.take([], n, text)
    assert take(reader) == [2, 3]


def test_unconvertible_latest_stays_and_skips_nothing() -> None:
    reader = a_reader()
    bad = entry(3)._replace(body=b"\xff")
    with pytest.raises(MessageNotText):
        reader.take_latest([], reader.asked_for_latest(), [bad], text)
    accept(reader, [entry(1), entry(2), bad])
    assert take(reader) == [1, 2, 3]


def test_reader_expects_more_until_an_empty_reply() -> None:
    reader = a_reader()
    assert accept(reader, entries(1))
    # Another call may have fetched it.
    assert accept(reader, [])
    take(reader)
    assert not accept(reader, [])


def test_position_is_last_returned_id_and_request_starts_after_last_fetched() -> None:
    reader = a_reader(position=4)
    accept(reader, [entry(7, 2), entry(9, 3)])
    assert (reader.position[1], reader.asked()[1], reader.asked_for_latest()[1]) == (4, 9, 4)
    assert take(reader, 1) == [7]
    assert (reader.position[1], reader.asked()[1], reader.asked_for_latest()[1]) == (7, 9, 7)
    assert take(reader, 1) == [9]
    assert (reader.position[1], reader.asked()[1], reader.asked_for_latest()[1]) == (9, 9, 9)


def test_messages_fetched_by_two_threads_are_returned_once() -> None:
    reader = a_reader(position=1)
    asked = reader.asked()
    reader.accept(asked, entries(2, 3))
    reader.accept(asked, entries(2, 3, 4))
    reader.accept(asked, entries(2))
    assert take(reader) == [2, 3, 4]
    reader.accept(asked, entries(3, 4))
    assert take(reader) == []
    assert (reader.position[1], reader.missed) == (4, 0)


def test_empty_reply_to_older_request_is_ignored(client_clock: ClientClock) -> None:
    reader = a_reader(position=1, last_number=1)
    asked = reader.asked()
    accept(reader, entries(2, 3))
    reader.accept(asked, [])
    assert (take(reader), reader.missed) == ([2, 3], 0)


def test_reply_to_request_after_given_back_messages_is_dropped() -> None:
    reader, claim = a_reader(), []
    accept(reader, entries(1, 2))
    take(reader, 2, claim)
    asked = reader.asked()
    give_back(claim)
    reader.accept(asked, entries(3))
    assert take(reader) == [1, 2]
    accept(reader, entries(3))
    assert take(reader) == [3]


def test_take_stops_at_unconvertible_message_after_given_back_ones() -> None:
    reader, claim = a_reader(), []
    accept(reader, [entry(1), entry(2), entry(3)._replace(body=b"\xff")])
    take(reader, 1, claim)
    give_back(claim)
    assert reader.take([], 9, text) == ["1", "2"]
    assert take(reader) == [3]


# The latest


def test_get_latest_skips_read_ahead() -> None:
    reader = a_reader(1)
    accept(reader, entries(2, 3))
    assert take_latest(reader, entries(5)) == [5]
    assert take(reader) == []
    accept(reader, entries(6, 7))
    assert take(reader) == [6, 7]
    assert reader.missed == 0


def test_latest_is_returned_once() -> None:
    reader = a_reader()
    asked = reader.asked_for_latest()
    accept(reader, entries(1, 2))
    assert take(reader) == [1, 2]
    # Another thread has taken it.
    assert reader.take_latest([], asked, entries(2), lambda _, found: found.id) == []


def test_messages_skipped_by_get_latest_are_not_returned() -> None:
    reader = a_reader()
    asked = reader.asked()
    take_latest(reader, entries(5))
    reader.accept(asked, entries(3, 4, 5, 6))
    assert take(reader) == [6]


def test_given_back_latest_is_returned_again_with_all_before_it() -> None:
    reader, claim = a_reader(1, 1), []
    accept(reader, entries(2, 3))
    assert take_latest(reader, entries(5), claim) == [5]
    give_back(claim)
    assert reader.position[1] == reader.asked()[1] == 1
    accept(reader, entries(2, 3, 4, 5, 6))
    assert take(reader, 100) == [2, 3, 4, 5]
    accept(reader, entries(6))
    assert (take(reader), reader.missed) == ([6], 0)


# Seek


def test_seek_moves_and_drops_read_ahead() -> None:
    reader = a_reader()
    accept(reader, entries(1, 2, 3))
    reader.seek(1)
    assert take(reader) == []
    accept(reader, entries(2, 3))
    assert (take(reader), reader.missed) == ([2, 3], 0)


def test_reply_to_request_before_seek_is_dropped() -> None:
    reader = a_reader(position=100, last_number=7)
    asked, latest = reader.asked(), reader.asked_for_latest()
    reader.seek(0)
    assert reader.accept(asked, [entry(103, 10)])
    assert reader.take_latest([], latest, [entry(103, 10)], lambda _, found: found.id) is None
    accept(reader, entries(1))
    assert (take(reader), reader.missed) == ([1], 0)


def test_nothing_is_given_back_after_a_seek() -> None:
    reader, claim = a_reader(), []
    accept(reader, entries(1, 2))
    take(reader, 2, claim)
    reader.seek(1)
    give_back(claim)
    assert reader.position[1] == 1


# Expiry


def test_expired_read_ahead_is_refetched_and_counted(
    client_clock: ClientClock, caplog: pytest.LogCaptureFixture
) -> None:
    reader = a_reader()
    accept(reader, [entry(1), entry(2, expires=5000.5), entry(3, expires=5000.5), entry(4)])
    assert take(reader, 1) == [1]
    client_clock.passed = 0.5
    assert take(reader) == []
    assert reader.asked()[1] == 1
    accept(reader, entries(4))
    assert (take(reader), reader.missed) == ([4], 2)
    assert warnings(caplog) == ["topic 't': 2 messages expired before they were read"]


def test_expired_last_message_is_counted_without_successor(
    client_clock: ClientClock, caplog: pytest.LogCaptureFixture
) -> None:
    reader = a_reader()
    accept(reader, [entry(1, 1), *(entry(number, number, 5000.5) for number in (2, 3, 5))])
    assert take(reader, 1) == [1]
    client_clock.passed = 0.5
    assert take(reader) == []
    assert not accept(reader, [])
    assert reader.missed == 4
    assert warnings(caplog)[-1] == "topic 't': 4 messages expired before they were read"
    accept(reader, [entry(9, 7)])
    assert (take(reader), reader.missed) == ([9], 5)


def test_old_reply_does_not_bring_back_expired_messages(client_clock: ClientClock) -> None:
    reader = a_reader(last_number=0)
    asked = reader.asked()
    accept(reader, entries(1, 2, 3))
    client_clock.passed = 1.5
    assert take(reader) == []
    accept(reader, [])
    assert reader.missed == 3
    assert reader.accept(asked, entries(1, 2, 3))
    assert (take(reader), reader.missed) == ([], 3)


def test_expected_messages_are_counted_after_smaller_request(client_clock: ClientClock) -> None:
    reader = a_reader(last_number=0)
    accept(reader, entries(1, 2, 3))
    for found in (entries(1), []):
        client_clock.passed += 1.5
        assert take(reader) == []
        accept(reader, found)
    client_clock.passed += 1.5
    assert take(reader) == []
    accept(reader, [])
    assert reader.missed == 3


def test_read_ahead_is_fresh_for_a_second(client_clock: ClientClock) -> None:
    reader = a_reader()
    accept(reader, entries(1, 2, 3))
    client_clock.passed = 1.0
    assert take(reader, 1) == [1]
    client_clock.passed = 1.001
    assert take(reader) == []
    assert reader.asked()[1] == 1
    # Under another rule, they may live longer or shorter.
    accept(reader, entries(3))
    assert (take(reader), reader.missed) == ([3], 1)


def test_new_read_ahead_does_not_refresh_older(client_clock: ClientClock) -> None:
    reader = a_reader()
    accept(reader, entries(1, 2))
    client_clock.passed = 0.6
    accept(reader, entries(3))
    client_clock.passed = 1.2
    assert take(reader) == []


def test_read_ahead_size_adapts_to_reader_speed(client_clock: ClientClock) -> None:
    reader, counts = a_reader(), []
    accept(reader, entries(*range(1, 101)))
    take(reader, 20)
    for number in range(21, 150):
        client_clock.passed += 1.5 if number < 23 else 0.0
        while not take(reader, 1):
            accept(reader, entries(*range(number, number + (reader.count or 100))))
        counts.append(reader.count)
    assert counts[:3] == [20, 1, 2]
    assert counts[2:] == sorted(counts[2:], key=lambda count: count or 1000)
    assert {2, 4, 8, 16, 32, 64, 0} < {*counts}


def test_gap_in_numbers_counts_as_missed(caplog: pytest.LogCaptureFixture) -> None:
    reader = a_reader()
    accept(reader, [entry(10, 3), entry(20, 4), entry(30, 9)])
    assert reader.missed == 0
    assert (take(reader), reader.missed) == ([10, 20, 30], 4)
    accept(reader, [entry(40, 11)])
    assert (take(reader), reader.missed) == ([40], 5)
    assert warnings(caplog) == [
        "topic 't': 4 messages expired before they were read",
        "topic 't': 1 messages expired before they were read",
    ]


def test_nothing_is_missed_before_first_message() -> None:
    reader = a_reader(position=50)
    accept(reader, [entry(60, 7)])
    assert (take(reader), reader.missed) == ([60], 0)


def test_gap_before_first_message_is_missed_if_number_is_known() -> None:
    reader = a_reader(last_number=0)
    accept(reader, [entry(60, 7)])
    assert (take(reader), reader.missed) == ([60], 6)


def test_messages_skipped_by_get_latest_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    reader = a_reader()
    accept(reader, [entry(1, 1)])
    assert take_latest(reader, [entry(9, 9)]) == [9]
    assert reader.missed == 0
    accept(reader, [entry(12, 12)])
    assert (take(reader), reader.missed) == ([12], 2)
    assert len(warnings(caplog)) == 1


def test_topic_with_forgotten_numbering_starts_again() -> None:
    reader = a_reader()
    accept(reader, [entry(1, 5)])
    assert take(reader) == [1]
    accept(reader, [entry(2, 2), entry(3, 3), entry(4, 5)])
    # Numbers 1 and 4 were missed.
    assert (take(reader), reader.missed) == ([2, 3, 4], 2)


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="a clock of Linux")
def test_ages_continue_during_suspend() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= boot_time() <= time.clock_gettime(time.CLOCK_BOOTTIME)


# Giving back


def test_taken_but_unreturned_messages_are_returned_again_in_order() -> None:
    reader, claim = a_reader(last_number=0), []
    accept(reader, [entry(1), entry(3), entry(4)])
    assert take(reader, 2, claim) == [1, 3]
    accept(reader, entries(5))
    assert take(reader, 2, claim) == [4, 5]
    assert reader.missed == 1
    give_back(claim)
    assert (reader.position[1], reader.missed) == (0, 0)
    assert [take(reader) for _ in range(2)] == [[1, 3, 4, 5], []]
    assert (reader.position[1], reader.missed) == (5, 1)


def test_two_calls_may_give_back_in_any_order() -> None:
    for first in (0, 1):
        reader, claims = a_reader(last_number=0), ([], [])
        accept(reader, entries(1, 2, 4, 5))
        for claim in claims:
            take(reader, 2, claim)
        give_back(claims[first])
        give_back(claims[1 - first])
        assert (reader.position[1], reader.missed) == (0, 0)
        assert [take(reader), take(reader)] == [[1, 2, 4, 5], []]
        assert (reader.position[1], reader.missed) == (5, 1)


def test_messages_taken_by_others_are_not_returned_again(client_clock: ClientClock) -> None:
    for stale in (False, True):
        client_clock.passed = 0
        reader, claim = a_reader(last_number=0), []
        accept(reader, entries(1, 2, 3, 4))
        take(reader, 1, claim)
        assert take(reader, 2) == [2, 3]
        give_back(claim)
        assert reader.position[1] == 0
        if stale:
            client_clock.passed = 2.0
            assert take(reader) == []
            assert reader.asked()[1] == 0
            accept(reader, entries(1, 2, 3, 4))
        assert take(reader) == ([1] if stale else [1, 4])
        if stale:
            assert take(reader) == []
            assert reader.asked()[1] == 3
            accept(reader, entries(4))
            assert take(reader) == [4]
        assert (reader.position[1], reader.missed) == (4, 0)


@pytest.mark.parametrize("reply", [[], [5], [2, 3, 5]])
def test_given_back_messages_that_expire_are_missed(client_clock: ClientClock, reply: list[int]) -> None:
    reader, claim = a_reader(), []
    accept(reader, entries(1, 2, 3))
    take(reader, 1, claim)
    assert take(reader, 2) == [2, 3]
    give_back(claim)
    client_clock.passed = 2.0
    assert take(reader) == []
    assert accept(reader, entries(*reply))
    assert (take(reader), reader.missed, reader.asked()[1]) == ([], 1, 3)
    accept(reader, entries(5))
    assert (take(reader), reader.missed) == ([5], 2)


def at_step(limit: int, opcodes: bool, act: Callable[[], object]) -> Callable[..., Any]:
    """Return a trace function that acts at a certain step within the reader."""
    steps = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        if frame.f_code.co_filename != reader_module.__file__:
            return None
        frame.f_trace_opcodes = opcodes
        if event == ("opcode" if opcodes else "line"):
            steps += 1
            if steps == limit:
                act()
        return trace

    return trace


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("opcodes", [False, True])
@pytest.mark.parametrize("verb", ["take 1", "take 2", "latest"])
def test_interrupt_at_any_line_neither_loses_nor_repeats_messages(verb: str, opcodes: bool) -> None:
    # The first round is not interrupted: Python 3.12.1 traces no opcodes before the second.
    interrupted, limit = 0, -1
    while interrupted == max(0, limit):
        limit += 1
        reader, claim, got = a_reader(), [], []
        accept(reader, entries(1, 2))
        sys.settrace(at_step(limit, opcodes, interrupt))
        try:
            accept(reader, entries(3, 4))
            if verb == "latest":
                got += take_latest(reader, entries(4), claim) or []
            else:
                got += take(reader, int(verb[-1]), claim)
        except KeyboardInterrupt:
            interrupted += 1
            sys.settrace(None)
            give_back(claim)
        finally:
            sys.settrace(None)
        rest: list[int] = []
        while reader.position[1] < 6:
            accept(reader, entries(*range(reader.asked()[1] + 1, 7)))
            rest += take(reader)
        passed = 4 if verb == "latest" and got else 0
        assert got + rest == [number for number in range(1, 7) if number >= passed], limit
    assert interrupted > 10


@pytest.mark.parametrize("opcodes", [False, True])
@pytest.mark.parametrize("verb", ["take", "latest"])
def test_interrupt_while_giving_messages_back_loses_none(verb: str, opcodes: bool) -> None:
    interrupted, limit = 0, -1
    while interrupted == max(0, limit):
        limit += 1
        reader, claims = a_reader(last_number=0), ([], [])
        accept(reader, [entry(1), entry(3), entry(4)])
        taken = take(reader, 2, claims[0])
        # Messages given back second come before those given back first.
        taken += take_latest(reader, entries(6), claims[1]) or [] if verb == "latest" else take(reader, 1, claims[1])
        assert len(taken) == 3
        returned: Returned = [(claims[1], []), (claims[0], [])]
        sys.settrace(at_step(limit, opcodes, interrupt))
        try:
            take_back(returned)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        take_back(returned)
        assert (reader.position[1], reader.missed) == (0, 0)
        rest: list[int] = []
        while reader.position[1] < 6:
            accept(reader, entries(*(one for one in (1, 3, 4, 5, 6) if one > reader.asked()[1])))
            rest += take(reader)
        assert (rest, reader.missed) == ([1, 3, 4, 5, 6], 1), limit
    assert interrupted > 10


@pytest.mark.parametrize("opcodes", [False, True])
def test_messages_given_back_twice_by_a_handler_are_returned_once(opcodes: bool) -> None:
    limit, is_handled = 0, True

    def handle() -> None:
        nonlocal is_handled
        is_handled = True
        take_back(returned)
        got.extend(take(reader, 1))

    while is_handled:
        limit += 1
        reader, claim, is_handled = a_reader(), [], False
        got: list[int] = []
        accept(reader, entries(1, 2, 3))
        take(reader, 2, claim)
        returned: Returned = [(claim, [])]
        sys.settrace(at_step(limit, opcodes, handle))
        try:
            take_back(returned)
        finally:
            sys.settrace(None)
        assert got + take(reader) + take(reader) == [1, 2, 3], limit
    assert limit > 10


@pytest.mark.parametrize("opcodes", [False, True])
def test_reentrant_call_at_any_line_gets_each_message_once(opcodes: bool) -> None:
    """The handler runs in the middle of a call."""

    def handle() -> None:
        nonlocal is_handled
        is_handled = True
        accept(reader, entries(*range(reader.asked()[1] + 1, 6)))
        handled.extend(take(reader, 2))

    limit, is_handled = 0, True
    while is_handled:
        limit += 1
        is_handled, handled, got = False, [], []
        reader, claim = a_reader(), []
        accept(reader, entries(1, 2))
        asked = reader.asked()
        sys.settrace(at_step(limit, opcodes, handle))
        try:
            reader.accept(asked, entries(3, 4))
            got += take(reader, 2, claim)
            if limit % 2:
                got.clear()
                give_back(claim)
        finally:
            sys.settrace(None)
        while reader.position[1] < 6:
            accept(reader, entries(*range(reader.asked()[1] + 1, 7)))
            got += take(reader)
        assert sorted(got + handled) == [1, 2, 3, 4, 5, 6], limit
        assert handled == sorted(handled)


# Restarts


def test_read_ahead_of_old_epoch_is_returned_until_expiry(client_clock: ClientClock) -> None:
    reader = a_reader(10)
    accept(reader, [entry(11, 1, 5005.0), entry(12, 2, 5010.0), entry(13, 3, 5010.0)])
    take(reader, 1)
    follow(reader, "two", b"second")
    # The server can't confirm it.
    client_clock.passed = 7.0
    assert (reader.position[1], take(reader, 1)) == (0, [12])
    client_clock.passed = 12.0
    assert take(reader) == []
    assert (reader.position[1], reader.asked()[1], reader.missed) == (0, 0, 1)
    accept(reader, [entry(2, 2)])
    assert (take(reader), reader.missed) == ([2], 2)


def test_new_epoch_is_not_read_after_an_old_id(client_clock: ClientClock) -> None:
    reader = a_reader(10)
    accept(reader, entries(11, 12, 13))
    take(reader, 1)
    follow(reader, "one", b"second", 12)
    # Not taken, because the server may have 12.
    assert take(reader) == []
    follow(reader, "two", b"third")
    assert reader.asked()[1] == reader.asked_for_latest()[1] == 0
    # The request of a call that was in progress.
    assert accept(reader, entries(1, 2))
    assert [take(reader), take(reader)] == [[13], []]
    accept(reader, entries(1, 2))
    assert take(reader) == [1, 2]


def test_new_epoch_drops_given_back_messages(client_clock: ClientClock) -> None:
    reader, claim = a_reader(10), []
    accept(reader, entries(11, 12))
    take(reader, 1, claim)
    follow(reader, "two", b"second")
    give_back(claim)
    assert [take(reader) for _ in range(2)] == [[11, 12], []]
    assert reader.asked()[1] == 0


@pytest.mark.parametrize(
    ("read", "restored_id", "restored_number", "number", "missed"),
    [
        # Everything that was read is in the snapshot: numbers continue.
        ([(1, 1), (2, 2), (3, 3)], 3, 3, 5, 1),
        # So are more messages, which others read, and which expired.
        ([(1, 1), (2, 2), (3, 3)], 5, 5, 7, 3),
        # The messages read last were lost, so their numbers are used again.
        ([(1, 1), (2, 2), (3, 3)], 2, 2, 4, 1),
        ([(1, 1), (2, 2), (3, 3)], 2, 2, 3, 0),
        # The topic is unknown although the snapshot is newer, because its numbers were forgotten.
        ([(1, 1), (2, 2), (3, 3)], 5, 0, 5, 4),
        # The topic was forgotten after the snapshot, which remembers it.
        ([(8, 1)], 5, 4, 6, 1),
        # Nothing was read before.
        ([], 5, 5, 7, 0),
    ],
)
def test_after_kill_expired_messages_are_missed_but_lost_ones_are_not(
    read: list[tuple[int, int]], restored_id: int, restored_number: int, number: int, missed: int
) -> None:
    reader = a_reader()
    accept(reader, [entry(*one) for one in read])
    assert take(reader) == [one[0] for one in read]
    era = follow(reader, "one", b"second", restored_id)
    assert bool(reader.doubt) == bool(read)
    renumber(reader, restored_number)
    assert not reader.doubt
    accept(reader, [entry(2**32 + 9, number)])
    assert (take(reader), reader.missed, reader.asked()[0].era) == ([2**32 + 9], missed, era)


def test_replies_are_held_until_numbering_is_known() -> None:
    reader = a_reader()
    accept(reader, entries(1, 2))
    take(reader)
    follow(reader, "one", b"second", 1)
    assert accept(reader, [entry(2**32, 2)])
    assert take(reader) == []
    renumber(reader, 1)
    accept(reader, [entry(2**32, 2)])
    assert (take(reader), reader.missed) == ([2**32], 0)


def test_read_ahead_lost_by_server_kill_is_returned(client_clock: ClientClock) -> None:
    reader = a_reader(last_number=0)
    accept(reader, entries(1, 2, 3, 4))
    take(reader, 1)
    follow(reader, "one", b"second", 2)
    assert take(reader) == []
    assert reader.doubt == (reader.asked()[0].era, "", 1)
    renumber(reader, 2)
    accept(reader, entries(2))
    assert take(reader, 1) == [2]
    client_clock.passed = 3.0
    assert take(reader) == [3, 4]
    assert reader.doubt == (reader.asked()[0].era, "", 4)
    renumber(reader, 2)
    accept(reader, [entry(2**32, 3)])
    assert (take(reader), reader.missed) == ([2**32], 0)


# Random order


class Model:
    """A server and several calls, in random order; the returned messages are checked in the end."""

    def __init__(self, clock: ClientClock, seed: int) -> None:
        self.chance, self.clock = random.Random(seed), clock
        self.stored: dict[int, int] = {}
        self.expired: set[int] = set()
        self.last = 0
        self.reader = a_reader(last_number=0)
        self.got: list[int] = []
        self.passed: set[int] = set()
        self.pending: list[tuple[Any, list[Entry]]] = []
        self.claims: list[tuple[Claim, list[int], set[int]]] = []

    def put(self) -> None:
        self.last += self.chance.choice((1, 1, 3))
        self.stored[self.last] = len(self.stored) + 1

    def expire(self) -> None:
        alive = [one for one in self.stored if one not in self.expired]
        self.expired.update(alive[: self.chance.randint(0, 2)])
        # Messages that have expired in the model must not be returned.
        self.clock.passed += 1.5

    def reply(self, after: int, count: int = 3) -> list[Entry]:
        alive = [one for one in self.stored if one > after and one not in self.expired]
        return [entry(one, self.stored[one]) for one in alive[:count]]

    def ask(self) -> None:
        asked = self.reader.asked()
        self.pending.append((asked, self.reply(asked[1], self.chance.randint(1, 4))))

    def answer(self) -> None:
        if self.pending:
            asked, found = self.pending.pop(self.chance.randrange(len(self.pending)))
            self.reader.accept(asked, found)

    def take(self) -> None:
        claim: Claim = []
        self.claims.append((claim, take(self.reader, self.chance.choice((1, 1, 2, 5)), claim), set()))

    def settle(self) -> None:
        if self.claims:
            claim, taken, passed = self.claims.pop(self.chance.randrange(len(self.claims)))
            if self.chance.random() < 0.5:
                give_back(claim)
            else:
                self.got += taken
                self.passed |= passed

    def finish(self) -> None:
        while self.claims:
            self.settle()
        self.clock.passed += 1.5
        for _ in range(200):
            taken = take(self.reader, 3)
            self.got += taken
            if not taken and not self.reader.accept(self.reader.asked(), self.reply(self.reader.asked()[1])):
                return
        raise AssertionError("no end")


@given(seed=st.integers(0, 2**32), steps=st.integers(5, 60))
@settings(deadline=None, max_examples=200)
def test_each_message_is_returned_once_or_missed(seed: int, steps: int) -> None:
    clock, before = ClientClock(), reader_module.boot_time
    reader_module.boot_time = clock.monotonic  # type: ignore[assignment]
    try:
        model = Model(clock, seed)
        verbs = [model.put, model.put, model.expire, model.ask, model.ask, model.answer, model.answer]
        verbs += [model.take, model.take, model.settle]
        for _ in range(steps):
            model.chance.choice(verbs)()
        model.finish()
    finally:
        reader_module.boot_time = before
    assert len(set(model.got)) == len(model.got)
    last = max(model.stored.values(), default=0)
    alive = set(model.stored) - model.expired
    assert alive <= set(model.got)
    # The client can't know yet about messages that expired last.
    known = model.stored[max(model.got)] if model.got else 0
    assert known - len(model.got) <= model.reader.missed <= last - len(model.got)
