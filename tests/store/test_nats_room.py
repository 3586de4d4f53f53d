"""A full stream: what it still has room for."""

from __future__ import annotations

import pytest

from dsmq.errors import Full, Unsure
from dsmq.store.api import Limits, Put, RetriedKey
from dsmq.store.nats_room import KEPT_SHARE, Room
from helpers import wait_until
from store.test_nats import Stores, bodies, fill, in_engine, put, read, stores, value
from store.test_nats_groups import done, take

__all__ = ["stores"]

LIMIT = 200_000
LIMITS = Limits(max_stored_bytes=LIMIT)


def stored_bytes(stores: Stores) -> int:
    size: int = in_engine(stores.servers, lambda stream: stream.stream_info(stores.stream)).state.bytes
    return size


def test_jobs_are_given_and_finished_although_puts_are_refused(stores: Stores) -> None:
    one, other = stores(limits=LIMITS), stores(limits=LIMITS)
    put(one, b"jobs", *[b"x"] * 100)
    held = take(one, b"jobs", 5)
    with pytest.raises(Full):
        fill(one)
    while isinstance(put(one, b"t", b"x" * 500)[0], int):
        pass
    finished = 0

    def work() -> None:
        nonlocal finished
        while jobs := take(other, b"jobs"):
            done(other, jobs, b"jobs")
            finished += 1

    with pytest.raises(Full):
        work()
    assert 5 < finished < 95
    # Jobs that are held can be finished when no more can be given.
    done(one, held, b"jobs")
    assert stored_bytes(stores) < LIMIT


def test_puts_of_all_servers_leave_room(stores: Stores) -> None:
    one, other = stores(limits=LIMITS), stores(limits=LIMITS)
    with pytest.raises(Full):
        fill(one)
    wait_until(lambda: bodies(read(other, b"t")) == bodies(read(one, b"t")))
    while isinstance(put(other, b"t", b"x" * 9_000)[0], int):
        pass
    assert LIMIT * 0.75 < stored_bytes(stores) <= LIMIT * (1 - KEPT_SHARE)
    again: Put = b"t", b"x" * 9_000, RetriedKey(b"p", 1)
    [outcome] = value(other.append([again]))
    assert isinstance(outcome, Unsure)


def test_puts_at_once_leave_room(stores: Stores) -> None:
    store = stores(limits=LIMITS)
    answers = [store.append([(b"t", b"x" * 9_000, None)]) for _ in range(20)]
    outcomes = [type(value(answer)[0]) for answer in answers]
    assert outcomes.count(Full) > 0
    assert outcomes == [int] * outcomes.count(int) + [Full] * outcomes.count(Full)
    assert stored_bytes(stores) <= LIMIT * (1 - KEPT_SHARE)


def test_full_stream_is_reported_until_it_has_room(stores: Stores) -> None:
    store = stores(limits=LIMITS)
    assert store.full() == set()
    # Short messages take up more room than the mirror counts.
    while not isinstance(put(store, b"t", *[b"x"] * 100)[-1], Full):
        pass
    assert store.full() == {"max_stored_bytes"}
    in_engine(stores.servers, lambda stream: stream.purge_stream(stores.stream, subject=f"{stores.stream}.t.t"))
    wait_until(lambda: store.full() == set())
    assert isinstance(put(store, b"u", b"x")[0], int)


def test_room_counts_messages_once() -> None:
    room = Room()
    room.report(1_000, 500, last_id=10)
    assert not room.is_short(400, 1.0)
    room.receive(10, 300)
    room.publish(12, 200)
    assert (room.is_short(200, 1.0), room.is_short(201, 1.0)) == (False, True)
    room.receive(11, 0)
    room.receive(12, 132)
    assert (room.is_short(200, 1.0), room.is_short(201, 1.0)) == (False, True)
    assert (room.is_short(300, 0.0), room.is_short(301, 0.0)) == (False, True)
    room.publish(14, 200)
    room.report(1_000, 100, last_id=3)
    assert (room.is_short(800, 1.0), room.is_short(801, 1.0)) == (False, True)
    room.report(-1, 10_000, last_id=12)
    assert not room.is_short(10_000, 1.0)
