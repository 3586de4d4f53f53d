"""Messages read in advance for groups of workers, and later changes in the store."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from stores import Clock, ClockedStore, expire_all, put
from working import AGE, W, clock, stats, store, take

from dsmq.store import read_ahead
from dsmq.store.api import DROP_OLDEST, Limits, TopicRule
from dsmq.store.group import Receipt
from dsmq.store.groups import Job
from dsmq.store.selection import Selection

# Fixtures.
__all__ = ["clock", "store"]


def bodies(jobs: list[Job]) -> list[bytes]:
    return [job.body for job in jobs]


def fill(store: ClockedStore, clock: Clock) -> None:
    """Put messages 0 to 7, one in each millisecond, and take some, so that others have been read in advance."""
    for number in range(8):
        put(store, b"t", b"%d" % number)
        clock.now += 1
    for number in range(3):
        assert bodies(take(store)) == [b"%d" % number]


def drop(store: ClockedStore, _: Clock) -> None:
    store.limits = Limits(topic=(TopicRule(b"t", max_messages=3, when_full=DROP_OLDEST),))
    put(store, b"t", b"8")


def purge(store: ClockedStore, _: Clock) -> None:
    list(store.purge(Selection([b"t"])))


def expire(store: ClockedStore, clock: Clock) -> None:
    """Messages that have expired may not be deleted yet."""
    clock.now += AGE - 3


def expire_and_delete(store: ClockedStore, clock: Clock) -> None:
    expire(store, clock)
    expire_all(store)


def shorten_ages(store: ClockedStore, _: Clock) -> None:
    store.max_age_ms = 3


def shorten_age_of_topic(store: ClockedStore, _: Clock) -> None:
    store.limits = Limits(topic=(TopicRule(b"t", max_age_ms=3),))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda *_: None, b"3"),
        (drop, b"6"),
        (purge, None),
        (expire, b"5"),
        (expire_and_delete, b"5"),
        (shorten_ages, b"5"),
        (shorten_age_of_topic, b"5"),
    ],
)
@pytest.mark.parametrize("is_flushed", [False, True])
def test_job_read_in_advance_is_given_only_if_its_message_is_still_stored(
    store: ClockedStore,
    clock: Clock,
    change: Callable[[ClockedStore, Clock], None],
    expected: bytes | None,
    is_flushed: bool,
) -> None:
    fill(store, clock)
    if is_flushed:
        store._flush()
    change(store, clock)
    assert bodies(take(store)) == ([] if expected is None else [expected])


def test_age_of_a_job_read_in_advance_counts_from_its_put(store: ClockedStore, clock: Clock) -> None:
    fill(store, clock)
    clock.now += 10
    [job] = take(store)
    assert (job.body, job.age_ms, job.left_ms) == (b"3", 15, AGE - 15)


def test_take_of_several_jobs_continues_after_those_taken_one_by_one(store: ClockedStore, clock: Clock) -> None:
    fill(store, clock)
    assert bodies(take(store, count=2)) == [b"3", b"4"]
    assert bodies(take(store)) == [b"5"]
    assert bodies(take(store, count=9)) == [b"6", b"7"]


def test_group_that_moves_back_gives_the_same_jobs(store: ClockedStore, clock: Clock) -> None:
    """As with a shared store, if another server has changed the group first."""
    fill(store, clock)
    [group] = store.groups._groups.values()
    state = store.stored_state
    for position in (3, 4, 5, 3, 5, 4):
        group.position = position
        [message] = store.groups._ahead.next(group, clock.now, state).messages
        assert message.id == position + 1


def test_forgotten_group_begins_again(store: ClockedStore, clock: Clock) -> None:
    fill(store, clock)
    store.groups.done(b"t", W, [Receipt(number, 1) for number in (1, 2, 3)])
    clock.now += 2 * AGE + 1
    store.groups.expire()
    assert list(store.groups.stats()) == []
    assert not store.groups._ahead._ahead


def test_long_messages_are_not_kept(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2", b"3" * read_ahead.MAX_BYTES, b"4")
    assert [len(take(store)[0].body) for _ in range(4)] == [1, 1, read_ahead.MAX_BYTES, 1]
    assert sum(len(ahead.messages) for ahead in store.groups._ahead._ahead.values()) <= 1


def test_messages_are_kept_for_a_few_groups(store: ClockedStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_MAX_GROUPS", 2)
    put(store, b"t", b"1", b"2", b"3", b"4")
    for expected in (b"1", b"2", b"3", b"4"):
        assert [bodies(take(store, group=b"%d" % group)) for group in range(3)] == [[expected]] * 3
    assert len(store.groups._ahead._ahead) == 2


def test_reading_in_advance_counts_no_job_as_taken(store: ClockedStore, clock: Clock) -> None:
    fill(store, clock)
    assert (stats(store).counts.taken, stats(store).waiting) == (3, 5)
    assert bodies(take(store, group=W + b"2")) == [b"0"]
