"""The messages of one topic at a client, without a server: order, what was missed, what is given back, restarts."""

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
from test_session import Time, accept, an_inbox, clock, entries, entry, request, take, warnings

from dsmq.client import reader as inbox_module
from dsmq.client.reader import Claim, Entry, Era, Inbox, Returned, read_request, take_back
from dsmq.client.session import text
from dsmq.errors import MessageNotText
from dsmq.system import boot_time

__all__ = ["clock"]


def take_latest(inbox: Inbox, found: list[Entry], claim: Claim | None = None) -> list[int] | None:
    claim = [] if claim is None else claim
    return inbox.take_latest(claim, inbox.asked_for_latest(), found, lambda _, found: found.id)


def give_back(claim: Claim) -> None:
    take_back([(claim, [])])


def follow(inbox: Inbox, epoch: str, run: bytes, restored_id: int = 0) -> Era:
    """Have an inbox find out that the server was started anew."""
    era = inbox.asked()[0].era
    same = epoch == era.epoch
    era.next[0] = Era(epoch, run, era.start if same else 0, era.number if same else 0, [(restored_id, 2**31)])
    return era.next[0]


def renumber(inbox: Inbox, restored: int) -> None:
    if doubt := inbox.doubt:
        inbox.renumber(doubt, restored)


def test_read_request_has_given_options() -> None:
    assert request(read_request("café", 12)) == [b"READ", "café".encode(), b"12"]
    assert request(read_request("t", 0, inbox_module.LATEST, 1)) == [b"READ", b"t", b"0", b"LATEST"]


# What comes


def test_messages_are_returned_in_order_received() -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2))
    accept(inbox, entries(3))
    assert take(inbox) == [1, 2, 3]
    assert take(inbox) == []


def test_take_stops_at_n_and_at_end() -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2, 3))
    assert [take(inbox, 2), take(inbox, 2), take(inbox, 2)] == [[1, 2], [3], []]


def test_unconvertible_message_stays() -> None:
    inbox = an_inbox()
    accept(inbox, [entry(1), entry(2)._replace(body=b"\xff"), entry(3)])
    assert inbox.take([], 3, text) == ["1"]
    for n in (1, 2):
        with pytest.raises(MessageNotText):
            inbox.take([], n, text)
    assert take(inbox) == [2, 3]


def test_unconvertible_latest_stays_and_skips_nothing() -> None:
    inbox = an_inbox()
    bad = entry(3)._replace(body=b"\xff")
    with pytest.raises(MessageNotText):
        inbox.take_latest([], inbox.asked_for_latest(), [bad], text)
    accept(inbox, [entry(1), entry(2), bad])
    assert take(inbox) == [1, 2, 3]


def test_more_is_expected_until_an_empty_reply() -> None:
    inbox = an_inbox()
    assert accept(inbox, entries(1))
    # Another call may have fetched it.
    assert accept(inbox, [])
    take(inbox)
    assert not accept(inbox, [])


def test_position_is_last_returned_id_and_request_starts_after_last_fetched() -> None:
    inbox = an_inbox(position=4)
    accept(inbox, [entry(7, 2), entry(9, 3)])
    assert (inbox.position[1], inbox.asked()[1], inbox.asked_for_latest()[1]) == (4, 9, 4)
    assert take(inbox, 1) == [7]
    assert (inbox.position[1], inbox.asked()[1], inbox.asked_for_latest()[1]) == (7, 9, 7)
    assert take(inbox, 1) == [9]
    assert (inbox.position[1], inbox.asked()[1], inbox.asked_for_latest()[1]) == (9, 9, 9)


def test_messages_fetched_by_two_threads_are_returned_once() -> None:
    inbox = an_inbox(position=1)
    asked = inbox.asked()
    inbox.accept(asked, entries(2, 3))
    inbox.accept(asked, entries(2, 3, 4))
    inbox.accept(asked, entries(2))
    assert take(inbox) == [2, 3, 4]
    inbox.accept(asked, entries(3, 4))
    assert take(inbox) == []
    assert (inbox.position[1], inbox.missed) == (4, 0)


def test_empty_reply_to_older_request_is_ignored(clock: Time) -> None:
    inbox = an_inbox(position=1, last_number=1)
    asked = inbox.asked()
    accept(inbox, entries(2, 3))
    inbox.accept(asked, [])
    assert (take(inbox), inbox.missed) == ([2, 3], 0)


def test_reply_to_request_after_given_back_messages_is_dropped() -> None:
    inbox, claim = an_inbox(), []
    accept(inbox, entries(1, 2))
    take(inbox, 2, claim)
    asked = inbox.asked()
    give_back(claim)
    inbox.accept(asked, entries(3))
    assert take(inbox) == [1, 2]
    accept(inbox, entries(3))
    assert take(inbox) == [3]


def test_take_stops_at_unconvertible_message_after_given_back_ones() -> None:
    inbox, claim = an_inbox(), []
    accept(inbox, [entry(1), entry(2), entry(3)._replace(body=b"\xff")])
    take(inbox, 1, claim)
    give_back(claim)
    assert inbox.take([], 9, text) == ["1", "2"]
    assert take(inbox) == [3]


# The latest


def test_get_latest_skips_read_ahead() -> None:
    inbox = an_inbox(1)
    accept(inbox, entries(2, 3))
    assert take_latest(inbox, entries(5)) == [5]
    assert take(inbox) == []
    accept(inbox, entries(6, 7))
    assert take(inbox) == [6, 7]
    assert inbox.missed == 0


def test_latest_is_returned_once() -> None:
    inbox = an_inbox()
    asked = inbox.asked_for_latest()
    accept(inbox, entries(1, 2))
    assert take(inbox) == [1, 2]
    # Another thread took it meanwhile.
    assert inbox.take_latest([], asked, entries(2), lambda _, found: found.id) == []


def test_messages_skipped_by_get_latest_are_not_returned() -> None:
    inbox = an_inbox()
    asked = inbox.asked()
    take_latest(inbox, entries(5))
    inbox.accept(asked, entries(3, 4, 5, 6))
    assert take(inbox) == [6]


def test_given_back_latest_is_returned_again_with_all_before_it() -> None:
    inbox, claim = an_inbox(1, 1), []
    accept(inbox, entries(2, 3))
    assert take_latest(inbox, entries(5), claim) == [5]
    give_back(claim)
    assert inbox.position[1] == inbox.asked()[1] == 1
    accept(inbox, entries(2, 3, 4, 5, 6))
    assert take(inbox, 100) == [2, 3, 4, 5]
    accept(inbox, entries(6))
    assert (take(inbox), inbox.missed) == ([6], 0)


# A seek


def test_seek_moves_and_drops_read_ahead() -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2, 3))
    inbox.seek(1)
    assert take(inbox) == []
    accept(inbox, entries(2, 3))
    assert (take(inbox), inbox.missed) == ([2, 3], 0)


def test_reply_to_request_before_seek_is_dropped() -> None:
    inbox = an_inbox(position=100, last_number=7)
    asked, latest = inbox.asked(), inbox.asked_for_latest()
    inbox.seek(0)
    assert inbox.accept(asked, [entry(103, 10)])
    assert inbox.take_latest([], latest, [entry(103, 10)], lambda _, found: found.id) is None
    accept(inbox, entries(1))
    assert (take(inbox), inbox.missed) == ([1], 0)


def test_nothing_is_given_back_after_a_seek() -> None:
    inbox, claim = an_inbox(), []
    accept(inbox, entries(1, 2))
    take(inbox, 2, claim)
    inbox.seek(1)
    give_back(claim)
    assert inbox.position[1] == 1


# What expires


def test_expired_read_ahead_is_refetched_and_counted(clock: Time, caplog: pytest.LogCaptureFixture) -> None:
    inbox = an_inbox()
    accept(inbox, [entry(1), entry(2, expires=5000.5), entry(3, expires=5000.5), entry(4)])
    assert take(inbox, 1) == [1]
    clock.passed = 0.5
    assert take(inbox) == []
    assert inbox.asked()[1] == 1
    accept(inbox, entries(4))
    assert (take(inbox), inbox.missed) == ([4], 2)
    assert warnings(caplog) == ["topic 't': 2 messages expired before they were read"]


def test_expired_last_message_is_counted_without_successor(clock: Time, caplog: pytest.LogCaptureFixture) -> None:
    inbox = an_inbox()
    accept(inbox, [entry(1, 1), *(entry(number, number, 5000.5) for number in (2, 3, 5))])
    assert take(inbox, 1) == [1]
    clock.passed = 0.5
    assert take(inbox) == []
    assert not accept(inbox, [])
    assert inbox.missed == 4
    assert warnings(caplog)[-1] == "topic 't': 4 messages expired before they were read"
    accept(inbox, [entry(9, 7)])
    assert (take(inbox), inbox.missed) == ([9], 5)


def test_old_reply_does_not_bring_back_expired_messages(clock: Time) -> None:
    inbox = an_inbox(last_number=0)
    asked = inbox.asked()
    accept(inbox, entries(1, 2, 3))
    clock.passed = 1.5
    assert take(inbox) == []
    accept(inbox, [])
    assert inbox.missed == 3
    assert inbox.accept(asked, entries(1, 2, 3))
    assert (take(inbox), inbox.missed) == ([], 3)


def test_expected_messages_are_counted_after_smaller_request(clock: Time) -> None:
    inbox = an_inbox(last_number=0)
    accept(inbox, entries(1, 2, 3))
    for found in (entries(1), []):
        clock.passed += 1.5
        assert take(inbox) == []
        accept(inbox, found)
    clock.passed += 1.5
    assert take(inbox) == []
    accept(inbox, [])
    assert inbox.missed == 3


def test_read_ahead_is_fresh_for_a_second(clock: Time) -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2, 3))
    clock.passed = 1.0
    assert take(inbox, 1) == [1]
    clock.passed = 1.001
    assert take(inbox) == []
    assert inbox.asked()[1] == 1
    # By another rule more live, or fewer.
    accept(inbox, entries(3))
    assert (take(inbox), inbox.missed) == ([3], 1)


def test_new_read_ahead_does_not_refresh_older(clock: Time) -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2))
    clock.passed = 0.6
    accept(inbox, entries(3))
    clock.passed = 1.2
    assert take(inbox) == []


def test_read_ahead_size_adapts_to_reader_speed(clock: Time) -> None:
    inbox, counts = an_inbox(), []
    accept(inbox, entries(*range(1, 101)))
    take(inbox, 20)
    for number in range(21, 150):
        clock.passed += 1.5 if number < 23 else 0.0
        while not take(inbox, 1):
            accept(inbox, entries(*range(number, number + (inbox.count or 100))))
        counts.append(inbox.count)
    assert counts[:3] == [20, 1, 2]
    assert counts[2:] == sorted(counts[2:], key=lambda count: count or 1000)
    assert {2, 4, 8, 16, 32, 64, 0} < {*counts}


def test_gap_in_numbers_counts_as_missed(caplog: pytest.LogCaptureFixture) -> None:
    inbox = an_inbox()
    accept(inbox, [entry(10, 3), entry(20, 4), entry(30, 9)])
    assert inbox.missed == 0
    assert (take(inbox), inbox.missed) == ([10, 20, 30], 4)
    accept(inbox, [entry(40, 11)])
    assert (take(inbox), inbox.missed) == ([40], 5)
    assert warnings(caplog) == [
        "topic 't': 4 messages expired before they were read",
        "topic 't': 1 messages expired before they were read",
    ]


def test_nothing_is_missed_before_first_message() -> None:
    inbox = an_inbox(position=50)
    accept(inbox, [entry(60, 7)])
    assert (take(inbox), inbox.missed) == ([60], 0)


def test_first_message_shows_gap_if_number_is_known() -> None:
    inbox = an_inbox(last_number=0)
    accept(inbox, [entry(60, 7)])
    assert (take(inbox), inbox.missed) == ([60], 6)


def test_messages_skipped_by_get_latest_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    inbox = an_inbox()
    accept(inbox, [entry(1, 1)])
    assert take_latest(inbox, [entry(9, 9)]) == [9]
    assert inbox.missed == 0
    accept(inbox, [entry(12, 12)])
    assert (take(inbox), inbox.missed) == ([12], 2)
    assert len(warnings(caplog)) == 1


def test_topic_with_forgotten_numbering_starts_again() -> None:
    inbox = an_inbox()
    accept(inbox, [entry(1, 5)])
    assert take(inbox) == [1]
    accept(inbox, [entry(2, 2), entry(3, 3), entry(4, 5)])
    # Number 1 before them, and 4.
    assert (take(inbox), inbox.missed) == ([2, 3, 4], 2)


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="a clock of Linux")
def test_ages_continue_during_suspend() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= boot_time() <= time.clock_gettime(time.CLOCK_BOOTTIME)


# What is given back


def test_taken_but_unreturned_messages_are_returned_again_in_order() -> None:
    inbox, claim = an_inbox(last_number=0), []
    accept(inbox, [entry(1), entry(3), entry(4)])
    assert take(inbox, 2, claim) == [1, 3]
    accept(inbox, entries(5))
    assert take(inbox, 2, claim) == [4, 5]
    assert inbox.missed == 1
    give_back(claim)
    assert (inbox.position[1], inbox.missed) == (0, 0)
    assert [take(inbox) for _ in range(2)] == [[1, 3, 4, 5], []]
    assert (inbox.position[1], inbox.missed) == (5, 1)


def test_two_calls_may_give_back_in_any_order() -> None:
    for first in (0, 1):
        inbox, claims = an_inbox(last_number=0), ([], [])
        accept(inbox, entries(1, 2, 4, 5))
        for claim in claims:
            take(inbox, 2, claim)
        give_back(claims[first])
        give_back(claims[1 - first])
        assert (inbox.position[1], inbox.missed) == (0, 0)
        assert [take(inbox), take(inbox)] == [[1, 2, 4, 5], []]
        assert (inbox.position[1], inbox.missed) == (5, 1)


def test_messages_taken_by_others_are_not_returned_again(clock: Time) -> None:
    for stale in (False, True):
        clock.passed = 0
        inbox, claim = an_inbox(last_number=0), []
        accept(inbox, entries(1, 2, 3, 4))
        take(inbox, 1, claim)
        assert take(inbox, 2) == [2, 3]
        give_back(claim)
        assert inbox.position[1] == 0
        if stale:
            clock.passed = 2.0
            assert take(inbox) == []
            assert inbox.asked()[1] == 0
            accept(inbox, entries(1, 2, 3, 4))
        assert take(inbox) == ([1] if stale else [1, 4])
        if stale:
            assert take(inbox) == []
            assert inbox.asked()[1] == 3
            accept(inbox, entries(4))
            assert take(inbox) == [4]
        assert (inbox.position[1], inbox.missed) == (4, 0)


@pytest.mark.parametrize("reply", [[], [5], [2, 3, 5]])
def test_given_back_messages_that_expire_are_missed(clock: Time, reply: list[int]) -> None:
    inbox, claim = an_inbox(), []
    accept(inbox, entries(1, 2, 3))
    take(inbox, 1, claim)
    assert take(inbox, 2) == [2, 3]
    give_back(claim)
    clock.passed = 2.0
    assert take(inbox) == []
    assert accept(inbox, entries(*reply))
    assert (take(inbox), inbox.missed, inbox.asked()[1]) == ([], 1, 3)
    accept(inbox, entries(5))
    assert (take(inbox), inbox.missed) == ([5], 2)


def at_step(limit: int, opcodes: bool, act: Callable[[], object]) -> Callable[..., Any]:
    """Return a trace function that acts at a certain step within the inbox."""
    steps = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        if frame.f_code.co_filename != inbox_module.__file__:
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
        inbox, claim, got = an_inbox(), [], []
        accept(inbox, entries(1, 2))
        sys.settrace(at_step(limit, opcodes, interrupt))
        try:
            accept(inbox, entries(3, 4))
            if verb == "latest":
                got += take_latest(inbox, entries(4), claim) or []
            else:
                got += take(inbox, int(verb[-1]), claim)
        except KeyboardInterrupt:
            interrupted += 1
            sys.settrace(None)
            give_back(claim)
        finally:
            sys.settrace(None)
        rest: list[int] = []
        while inbox.position[1] < 6:
            accept(inbox, entries(*range(inbox.asked()[1] + 1, 7)))
            rest += take(inbox)
        passed = 4 if verb == "latest" and got else 0
        assert got + rest == [number for number in range(1, 7) if number >= passed], limit
    assert interrupted > 10


@pytest.mark.parametrize("opcodes", [False, True])
@pytest.mark.parametrize("verb", ["take", "latest"])
def test_an_interrupt_anywhere_while_messages_are_given_back_loses_none(verb: str, opcodes: bool) -> None:
    interrupted, limit = 0, -1
    while interrupted == max(0, limit):
        limit += 1
        inbox, claims = an_inbox(last_number=0), ([], [])
        accept(inbox, [entry(1), entry(3), entry(4)])
        taken = take(inbox, 2, claims[0])
        # What is given back second stands before what was given back first.
        taken += take_latest(inbox, entries(6), claims[1]) or [] if verb == "latest" else take(inbox, 1, claims[1])
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
        assert (inbox.position[1], inbox.missed) == (0, 0)
        rest: list[int] = []
        while inbox.position[1] < 6:
            accept(inbox, entries(*(one for one in (1, 3, 4, 5, 6) if one > inbox.asked()[1])))
            rest += take(inbox)
        assert (rest, inbox.missed) == ([1, 3, 4, 5, 6], 1), limit
    assert interrupted > 10


@pytest.mark.parametrize("opcodes", [False, True])
def test_what_a_handler_gives_back_while_it_is_being_given_back_comes_once(opcodes: bool) -> None:
    limit, is_handled = 0, True

    def handle() -> None:
        nonlocal is_handled
        is_handled = True
        take_back(returned)
        got.extend(take(inbox, 1))

    while is_handled:
        limit += 1
        inbox, claim, is_handled = an_inbox(), [], False
        got: list[int] = []
        accept(inbox, entries(1, 2, 3))
        take(inbox, 2, claim)
        returned: Returned = [(claim, [])]
        sys.settrace(at_step(limit, opcodes, handle))
        try:
            take_back(returned)
        finally:
            sys.settrace(None)
        assert got + take(inbox) + take(inbox) == [1, 2, 3], limit
    assert limit > 10


@pytest.mark.parametrize("opcodes", [False, True])
def test_reentrant_call_at_any_line_gets_each_message_once(opcodes: bool) -> None:
    """It runs in the middle of a call, and all of it before that goes on."""

    def handle() -> None:
        nonlocal is_handled
        is_handled = True
        accept(inbox, entries(*range(inbox.asked()[1] + 1, 6)))
        handled.extend(take(inbox, 2))

    limit, is_handled = 0, True
    while is_handled:
        limit += 1
        is_handled, handled, got = False, [], []
        inbox, claim = an_inbox(), []
        accept(inbox, entries(1, 2))
        asked = inbox.asked()
        sys.settrace(at_step(limit, opcodes, handle))
        try:
            inbox.accept(asked, entries(3, 4))
            got += take(inbox, 2, claim)
            if limit % 2:
                got.clear()
                give_back(claim)
        finally:
            sys.settrace(None)
        while inbox.position[1] < 6:
            accept(inbox, entries(*range(inbox.asked()[1] + 1, 7)))
            got += take(inbox)
        assert sorted(got + handled) == [1, 2, 3, 4, 5, 6], limit
        assert handled == sorted(handled)


# Restarts


def test_read_ahead_of_old_epoch_is_returned_until_expiry(clock: Time) -> None:
    inbox = an_inbox(10)
    accept(inbox, [entry(11, 1, 5005.0), entry(12, 2, 5010.0), entry(13, 3, 5010.0)])
    take(inbox, 1)
    follow(inbox, "two", b"second")
    # The server can't confirm it.
    clock.passed = 7.0
    assert (inbox.position[1], take(inbox, 1)) == (0, [12])
    clock.passed = 12.0
    assert take(inbox) == []
    assert (inbox.position[1], inbox.asked()[1], inbox.missed) == (0, 0, 1)
    accept(inbox, [entry(2, 2)])
    assert (take(inbox), inbox.missed) == ([2], 2)


def test_a_new_epoch_is_not_asked_behind_an_id_of_the_one_before(clock: Time) -> None:
    inbox = an_inbox(10)
    accept(inbox, entries(11, 12, 13))
    take(inbox, 1)
    follow(inbox, "one", b"second", 12)
    # Not taken, because the server may have 12.
    assert take(inbox) == []
    follow(inbox, "two", b"third")
    assert inbox.asked()[1] == inbox.asked_for_latest()[1] == 0
    # A call that is under way has asked so.
    assert accept(inbox, entries(1, 2))
    assert [take(inbox), take(inbox)] == [[13], []]
    accept(inbox, entries(1, 2))
    assert take(inbox) == [1, 2]


def test_new_epoch_drops_given_back_messages(clock: Time) -> None:
    inbox, claim = an_inbox(10), []
    accept(inbox, entries(11, 12))
    take(inbox, 1, claim)
    follow(inbox, "two", b"second")
    give_back(claim)
    assert [take(inbox) for _ in range(2)] == [[11, 12], []]
    assert inbox.asked()[1] == 0


@pytest.mark.parametrize(
    ("read", "restored_id", "restored_number", "number", "missed"),
    [
        # All that was read is in the snapshot: numbers go on.
        ([(1, 1), (2, 2), (3, 3)], 3, 3, 5, 1),
        # And more, which was read by others and expired.
        ([(1, 1), (2, 2), (3, 3)], 5, 5, 7, 3),
        # What was read last was lost: numbers come a second time.
        ([(1, 1), (2, 2), (3, 3)], 2, 2, 4, 1),
        ([(1, 1), (2, 2), (3, 3)], 2, 2, 3, 0),
        # Nothing is known of the topic any more, though the snapshot is younger: its numbering was forgotten.
        ([(1, 1), (2, 2), (3, 3)], 5, 0, 5, 4),
        # It had been forgotten after the snapshot, which remembers it.
        ([(8, 1)], 5, 4, 6, 1),
        # Nothing was read before.
        ([], 5, 5, 7, 0),
    ],
)
def test_after_kill_expired_messages_are_missed_but_lost_ones_are_not(
    read: list[tuple[int, int]], restored_id: int, restored_number: int, number: int, missed: int
) -> None:
    inbox = an_inbox()
    accept(inbox, [entry(*one) for one in read])
    assert take(inbox) == [one[0] for one in read]
    era = follow(inbox, "one", b"second", restored_id)
    assert bool(inbox.doubt) == bool(read)
    renumber(inbox, restored_number)
    assert not inbox.doubt
    accept(inbox, [entry(2**32 + 9, number)])
    assert (take(inbox), inbox.missed, inbox.asked()[0].era) == ([2**32 + 9], missed, era)


def test_replies_are_held_until_numbering_is_known() -> None:
    inbox = an_inbox()
    accept(inbox, entries(1, 2))
    take(inbox)
    follow(inbox, "one", b"second", 1)
    assert accept(inbox, [entry(2**32, 2)])
    assert take(inbox) == []
    renumber(inbox, 1)
    accept(inbox, [entry(2**32, 2)])
    assert (take(inbox), inbox.missed) == ([2**32], 0)


def test_read_ahead_lost_by_server_kill_is_returned(clock: Time) -> None:
    inbox = an_inbox(last_number=0)
    accept(inbox, entries(1, 2, 3, 4))
    take(inbox, 1)
    follow(inbox, "one", b"second", 2)
    assert take(inbox) == []
    assert inbox.doubt == (inbox.asked()[0].era, 1)
    renumber(inbox, 2)
    accept(inbox, entries(2))
    assert take(inbox, 1) == [2]
    clock.passed = 3.0
    assert take(inbox) == [3, 4]
    assert inbox.doubt == (inbox.asked()[0].era, 4)
    renumber(inbox, 2)
    accept(inbox, [entry(2**32, 3)])
    assert (take(inbox), inbox.missed) == ([2**32], 0)


# Anything in any order


class Model:
    """A server and several calls, in any order; what is handed out is checked in the end."""

    def __init__(self, clock: Time, seed: int) -> None:
        self.chance, self.clock = random.Random(seed), clock
        self.stored: dict[int, int] = {}
        self.expired: set[int] = set()
        self.last = 0
        self.inbox = an_inbox(last_number=0)
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
        # So that nothing is handed out that the model takes for expired.
        self.clock.passed += 1.5

    def reply(self, after: int, count: int = 3) -> list[Entry]:
        alive = [one for one in self.stored if one > after and one not in self.expired]
        return [entry(one, self.stored[one]) for one in alive[:count]]

    def ask(self) -> None:
        asked = self.inbox.asked()
        self.pending.append((asked, self.reply(asked[1], self.chance.randint(1, 4))))

    def answer(self) -> None:
        if self.pending:
            asked, found = self.pending.pop(self.chance.randrange(len(self.pending)))
            self.inbox.accept(asked, found)

    def take(self) -> None:
        claim: Claim = []
        self.claims.append((claim, take(self.inbox, self.chance.choice((1, 1, 2, 5)), claim), set()))

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
            taken = take(self.inbox, 3)
            self.got += taken
            if not taken and not self.inbox.accept(self.inbox.asked(), self.reply(self.inbox.asked()[1])):
                return
        raise AssertionError("no end")


@given(seed=st.integers(0, 2**32), steps=st.integers(5, 60))
@settings(deadline=None, max_examples=400)
def test_each_message_is_returned_once_or_missed(seed: int, steps: int) -> None:
    clock, before = Time(), inbox_module.boot_time
    inbox_module.boot_time = clock.monotonic  # type: ignore[assignment]
    try:
        model = Model(clock, seed)
        verbs = [model.put, model.put, model.expire, model.ask, model.ask, model.answer, model.answer]
        verbs += [model.take, model.take, model.settle]
        for _ in range(steps):
            model.chance.choice(verbs)()
        model.finish()
    finally:
        inbox_module.boot_time = before
    assert len(set(model.got)) == len(model.got)
    last = max(model.stored.values(), default=0)
    alive = set(model.stored) - model.expired
    assert alive <= set(model.got)
    # What expired last nobody can know of yet.
    known = model.stored[max(model.got)] if model.got else 0
    assert known - len(model.got) <= model.inbox.missed <= last - len(model.got)
