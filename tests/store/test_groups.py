"""Jobs shared among workers: each message goes to one worker of a group, and to another if it is not done in time."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from snapshotting import MAX_AGE, SAVED_AT, restored, snapshotting
from stores import Clock, ClockedStore, expire_all, put
from working import AGE, LEASE, W, clock, stats, store, take

from dsmq.errors import Full, JobLost, StoreFailed
from dsmq.store import groups as groups_module
from dsmq.store.api import DROP_OLDEST, Limits, Message, TopicRule
from dsmq.store.group import DUE_BYTES, GROUP_BYTES, JOB_BYTES, NUMBER_BYTES, Receipt
from dsmq.store.group_snapshots import LEASE_AFTER_RESTART_MS
from dsmq.store.groups import MAX_NEW, GroupLimits, Groups, Job

# Fixtures.
__all__ = ["clock", "store"]


def ids(jobs: list[Job]) -> list[int]:
    return [job.id for job in jobs]


def done(store: ClockedStore, *jobs: Job, key: bytes = b"t", group: bytes = W) -> None:
    store.groups.done(key, group, [Receipt(job.id, job.attempt) for job in jobs])


def give_back(store: ClockedStore, job: Job, delay_ms: int = 0) -> None:
    store.groups.give_back(b"t", W, Receipt(job.id, job.attempt), delay_ms)


def extend(store: ClockedStore, job: Job, ms: int) -> None:
    store.groups.extend(b"t", W, Receipt(job.id, job.attempt), ms)


# Giving


def test_group_begins_with_the_oldest_message_and_gives_each_once(store: ClockedStore) -> None:
    put(store, b"t", b"1", b"2")
    first = take(store)
    put(store, b"t", b"3")
    assert [(job.topic, job.id, job.number, job.body, job.attempt) for job in first] == [(b"t", 1, 1, b"1", 1)]
    assert ids(take(store, count=9)) == [2, 3]
    assert take(store) == []


def test_each_group_gets_all_messages(store: ClockedStore) -> None:
    put(store, b"t", b"1", b"2")
    assert ids(take(store, count=9)) == ids(take(store, count=9, group=b"others")) == [1, 2]


def test_topic_and_pattern_are_different_groups(store: ClockedStore) -> None:
    put(store, b"t", b"1")
    assert ids(take(store)) == ids(take(store, b"t*")) == [1]


def test_pattern_gives_messages_of_new_topics_in_the_order_of_ids(store: ClockedStore) -> None:
    put(store, b"a/1", b"x")
    put(store, b"b", b"x")
    assert ids(take(store, b"a/*")) == [1]
    put(store, b"a/2", b"x")
    put(store, b"a/1", b"x")
    assert [(job.topic, job.id) for job in take(store, b"a/*", 9)] == [(b"a/2", 3), (b"a/1", 4)]


def test_jobs_given_together_stay_below_the_bytes(store: ClockedStore) -> None:
    put(store, b"t", *[b"x" * 60] * 4)
    assert ids(take(store, count=4, max_bytes=100)) == [1, 2]


def test_few_jobs_are_given_at_once(store: ClockedStore) -> None:
    """More would delay other clients."""
    put(store, b"t", *[b"x"] * (MAX_NEW + 2))
    assert ids(take(store, count=1_000)) == [*range(1, MAX_NEW + 1)]
    assert ids(take(store, count=1_000)) == [MAX_NEW + 1, MAX_NEW + 2]


def test_done_job_is_not_given_again(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1")
    done(store, *take(store))
    clock.now += LEASE
    assert take(store) == []
    assert stats(store).counts.done == 1


# Giving again


def test_job_is_given_again_when_its_lease_ends_before_newer_ones(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2", b"3")
    take(store, count=2)
    clock.now += LEASE - 1
    assert ids(take(store, lease_ms=9 * LEASE)) == [3]
    put(store, b"t", b"4")
    clock.now += 1
    assert [(job.id, job.attempt) for job in take(store, count=9)] == [(1, 2), (2, 2), (4, 1)]


def test_jobs_given_again_fill_only_a_slice_of_time(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2", b"3")
    take(store, count=2)
    clock.now += LEASE
    store.groups.slice_seconds = -1.0
    assert [ids(take(store, count=3)) for _ in range(3)] == [[1], [2], [3]]


def test_returned_job_is_given_again_after_its_delay(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2")
    one, two = take(store, count=2)
    give_back(store, two)
    give_back(store, one, 10)
    assert [(job.id, job.attempt) for job in take(store, count=9)] == [(2, 2)]
    clock.now += 10
    assert [(job.id, job.attempt) for job in take(store, count=9)] == [(1, 2)]


def test_extended_lease_ends_later(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1")
    [job] = take(store)
    clock.now += LEASE - 1
    extend(store, job, LEASE)
    clock.now += LEASE - 1
    assert take(store) == []
    clock.now += 1
    assert ids(take(store)) == [1]


def test_late_worker_may_finish_until_another_has_the_job(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2")
    one, two = take(store, count=2)
    clock.now += 2 * LEASE
    done(store, one)
    extend(store, two, LEASE)
    assert take(store) == []


@pytest.mark.parametrize("settle", [done, give_back, lambda store, job: extend(store, job, LEASE)])
def test_worker_that_lost_its_job_changes_nothing(store: ClockedStore, clock: Clock, settle: object) -> None:
    put(store, b"t", b"1")
    [late] = take(store)
    clock.now += LEASE
    [current] = take(store)
    with pytest.raises(JobLost):
        settle(store, late)  # type: ignore[operator]
    done(store, current)
    with pytest.raises(JobLost):
        settle(store, late)  # type: ignore[operator]
    assert stats(store).counts.done == 1


def test_returned_job_is_lost_to_its_worker(store: ClockedStore) -> None:
    put(store, b"t", b"1")
    [job] = take(store)
    give_back(store, job, LEASE)
    with pytest.raises(JobLost):
        done(store, job)


def test_done_twice_is_done(store: ClockedStore) -> None:
    put(store, b"t", b"1")
    [job] = take(store)
    done(store, job)
    done(store, job)
    assert stats(store).counts.done == 1


def test_done_is_all_or_none(store: ClockedStore) -> None:
    put(store, b"t", b"1", b"2")
    one, two = take(store, count=2)
    give_back(store, two)
    with pytest.raises(JobLost):
        done(store, one, two)
    assert stats(store).counts.done == 0
    done(store, one)


def test_unknown_group_has_no_jobs(store: ClockedStore) -> None:
    with pytest.raises(JobLost):
        store.groups.done(b"t", W, [Receipt(1, 1)])


def test_same_token_gets_the_same_jobs_while_they_are_held(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2", b"3", b"4")
    first = take(store, count=2, token=b"x")
    assert [(job.id, job.attempt) for job in take(store, count=2, token=b"x")] == [(1, 1), (2, 1)]
    assert ids(take(store, token=b"y")) == [3]
    done(store, first[0])
    assert ids(take(store, count=2, token=b"x")) == [2]
    give_back(store, first[1], LEASE)
    assert ids(take(store, token=b"x")) == [4]


# Failures


def allow(store: ClockedStore, **limits: int) -> None:
    store.groups.limits = GroupLimits(**limits)


def test_job_given_too_often_is_moved_to_another_topic(store: ClockedStore, clock: Clock) -> None:
    allow(store, max_attempts=2)
    moved: list[set[bytes]] = []
    store.start(moved.append, print)
    put(store, b"t", b"1")
    give_back(store, take(store)[0])
    [second] = take(store)
    clock.now += LEASE
    assert take(store) == []
    with pytest.raises(JobLost):
        done(store, second)
    store.groups.expire()
    assert [message.body for message in store.read(b"t/failed", 0, 9, 99)] == [b"1"]
    assert moved == [{b"t/failed"}]
    assert (stats(store).counts.failed, stats(store).held, stats(store).again) == (1, 0, 0)


@pytest.mark.parametrize("why", ["long", "full"])
def test_failed_job_that_cannot_be_moved_stays(
    store: ClockedStore, clock: Clock, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    if why == "full":
        store.limits = Limits(max_stored_messages=1)
    allow(store, max_attempts=1, max_topic_bytes=5 if why == "long" else 99)
    put(store, b"t", b"1")
    give_back(store, take(store)[0])
    for _ in range(2):
        store.groups.expire()
        clock.now += 1_000
    assert (stats(store).counts.unmoved, stats(store).counts.failed, stats(store).again) == (2, 0, 1)
    assert len(caplog.records) == 1
    store.limits = Limits()
    allow(store, max_attempts=1)
    store.groups.expire()
    assert [message.body for message in store.read(b"t/failed", 0, 9, 99)] == [b"1"]


# Expiry


def test_message_that_expires_in_its_lease_may_still_be_done(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2")
    one, _ = take(store, count=2, lease_ms=2 * AGE)
    clock.now += AGE + 1
    expire_all(store)
    done(store, one)
    clock.now += 2 * AGE
    assert take(store) == []
    assert (stats(store).counts.done, stats(store).counts.expired, stats(store).again) == (1, 1, 0)


def test_messages_that_expire_or_are_dropped_untaken_are_counted(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1")
    done(store, *take(store))
    put(store, b"t", b"2", b"3")
    clock.now += AGE + 1
    expire_all(store)
    put(store, b"t", b"4")
    assert ids(take(store)) == [4]
    assert (stats(store).counts.expired, stats(store).counts.dropped) == (2, 0)
    store.limits = Limits(topic=(TopicRule(b"t", max_messages=1, when_full=DROP_OLDEST),))
    put(store, b"t", b"5")
    put(store, b"t", b"6")
    assert ids(take(store)) == [6]
    assert (stats(store).counts.expired, stats(store).counts.dropped) == (2, 1)


@pytest.mark.parametrize("key", [b"t", b"*"])
def test_untaken_messages_are_counted_even_if_no_newer_one_is_taken(
    store: ClockedStore, clock: Clock, key: bytes
) -> None:
    store.limits = Limits(topic=(TopicRule(b"t", max_messages=2, when_full=DROP_OLDEST),))
    put(store, b"t", b"1")
    done(store, *take(store, key), key=key)
    for body in (b"2", b"3", b"4"):
        put(store, b"t", body)
    clock.now += AGE
    assert [job.body for job in take(store, key, lease_ms=AGE)] == [b"3"]
    assert (stats(store).counts.expired, stats(store).counts.dropped) == (0, 1)
    clock.now += 1
    expire_all(store)
    for _ in range(2):
        store.groups.expire()
        # The job that was taken may still be done.
        assert (stats(store).counts.expired, stats(store).counts.dropped) == (1, 1)


def test_messages_put_after_the_last_use_of_a_group_count_as_untaken(store: ClockedStore, clock: Clock) -> None:
    assert take(store) == []
    clock.now += 1_000
    put(store, b"t", b"1")
    clock.now += AGE
    store.groups.expire()
    assert store.groups.count == 1
    clock.now += 1
    expire_all(store)
    store.groups.expire()
    assert store.groups.count == 0
    assert store.groups.counts().expired == 1


def test_group_is_forgotten_though_messages_wait(store: ClockedStore, clock: Clock) -> None:
    assert take(store) == []
    for _ in range(4):
        put(store, b"t", b"1")
        clock.now += AGE // 2
        expire_all(store)
        store.groups.expire()
    assert store.groups.count == 1
    clock.now += 1
    store.groups.expire()
    assert store.groups.count == 0
    assert store.groups.counts().expired == 2


def test_messages_count_as_untaken_from_the_first_worker_on(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1")
    clock.now += AGE + 1
    expire_all(store)
    assert take(store) == []
    put(store, b"t", b"2", b"3")
    clock.now += AGE
    assert take(store, token=b"1", lease_ms=AGE)
    clock.now += 1
    expire_all(store)
    store.groups.expire()
    assert stats(store).counts.expired == 1


@pytest.mark.parametrize("is_newer", [True, False])
def test_messages_that_had_expired_before_the_first_take_do_not_count(
    store: ClockedStore, clock: Clock, is_newer: bool
) -> None:
    put(store, b"t", b"1", b"2")
    clock.now += AGE + 1
    if is_newer:
        put(store, b"t", b"3")
    # They have not been deleted yet.
    assert ids(take(store)) == [3] * is_newer
    expire_all(store)
    store.groups.expire()
    assert stats(store).counts.expired == 0


def test_messages_dropped_after_they_were_taken_do_not_count(store: ClockedStore, clock: Clock) -> None:
    store.limits = Limits(topic=(TopicRule(b"t", max_messages=2, when_full=DROP_OLDEST),))
    put(store, b"t", b"1")
    done(store, *take(store))
    put(store, b"t", b"2", b"3")
    clock.now += AGE + 1
    store.groups.expire()
    expire_all(store)
    store.groups.expire()
    assert (store.groups.counts().expired, store.groups.counts().dropped) == (2, 0)


def test_failed_jobs_are_not_untaken_jobs_of_a_pattern(store: ClockedStore, clock: Clock) -> None:
    allow(store, max_attempts=1)
    for _ in range(2):
        put(store, b"t", b"1")
        take(store, b"*")
        clock.now += LEASE
        store.groups.expire()
        assert take(store, b"*") == []
    put(store, b"t/failed", b"1")
    assert (stats(store).counts.failed, stats(store).waiting) == (2, 0)
    clock.now += AGE + 1
    expire_all(store)
    store.groups.expire()
    assert store.groups.counts().expired == 0


def test_job_that_expires_without_workers_is_counted(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2")
    done(store, *take(store))
    take(store)
    clock.now += AGE + 1
    expire_all(store)
    store.groups.expire()
    assert store.groups.count == 0
    assert store.groups.counts().expired == 1


def test_messages_that_expire_while_the_server_is_down_count_as_untaken(store: ClockedStore, tmp_path: Path) -> None:
    put(store, b"t", b"1", b"2", b"3")
    take(store)
    file = tmp_path / "snapshot"
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=True)
    with restored(file, SAVED_AT + MAX_AGE / 1000 + 1) as other:
        other.groups.expire()
        assert stats(other).counts.expired == 2


def test_unused_group_is_forgotten_unless_a_worker_has_a_job(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1")
    take(store, lease_ms=3 * AGE)
    take(store, b"empty")
    clock.now += AGE + 1
    store.groups.expire()
    assert stats(store).name == W
    clock.now += 2 * AGE
    store.groups.expire()
    assert list(store.groups.stats()) == []


def test_group_lasts_as_long_as_a_message_of_any_topic_can(store: ClockedStore, clock: Clock) -> None:
    store.limits = Limits(topic=(TopicRule(b"t", max_age_ms=10 * AGE),))
    put(store, b"t", b"1")
    done(store, *take(store))
    clock.now += 9 * AGE
    store.groups.expire()
    assert take(store) == []


def test_failed_jobs_do_not_come_back_to_a_pattern(store: ClockedStore) -> None:
    allow(store, max_attempts=1)
    put(store, b"a/1", b"x")
    [job] = take(store, b"a/*")
    store.groups.give_back(b"a/*", W, Receipt(job.id, job.attempt), 0)
    store.groups.expire()
    put(store, b"a/2", b"x")
    assert [job.topic for job in take(store, b"a/*", 9)] == [b"a/2"]
    assert [job.topic for job in take(store, b"*/failed", 9)] == [b"a/1/failed"]


def test_ready_job_is_due_at_once(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1")
    take(store)
    clock.now += LEASE
    store.groups.expire()
    assert store.groups.due_in(b"t", W) == 1


# Limits


def test_group_beyond_the_limit_is_refused(store: ClockedStore) -> None:
    allow(store, max_groups=1)
    take(store)
    with pytest.raises(Full, match="max_groups"):
        take(store, group=b"other")
    assert take(store) == []


def test_jobs_in_flight_are_limited(store: ClockedStore, clock: Clock) -> None:
    allow(store, max_jobs_in_flight=2)
    put(store, b"t", b"1", b"2", b"3")
    jobs = take(store, count=9)
    assert ids(jobs) == [1, 2]
    with pytest.raises(Full, match="max_jobs_in_flight"):
        take(store)
    clock.now += LEASE
    assert ids(take(store)) == [1]
    done(store, jobs[1])
    assert ids(take(store)) == [3]


def test_memory_of_groups_is_limited(store: ClockedStore) -> None:
    allow(store, max_group_bytes=GROUP_BYTES + 2 * JOB_BYTES + 3 * DUE_BYTES)
    put(store, b"t", b"1", b"2", b"3")
    assert ids(take(store)) == [1]
    jobs = take(store)
    with pytest.raises(Full, match="max_group_bytes"):
        take(store)
    done(store, *jobs)
    assert ids(take(store)) == [3]


def test_state_of_finished_jobs_is_bounded(store: ClockedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "MAX_DONE", 10)
    for _ in range(500):
        put(store, b"t", b"x")
        done(store, *take(store, token=b"x"))
    [group] = store.groups._groups.values()
    assert (len(group.jobs), len(group.done), len(group._tokens)) == (0, 10, 0)
    assert len(group._due) <= 65


def test_finished_jobs_of_many_groups_refuse_no_others(store: ClockedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "_MAX_DONE", 100)
    monkeypatch.setattr(groups_module, "LEAST_DONE", 5)
    allow(store, max_group_bytes=100_000)
    put(store, b"t", *[b"x"] * 100)
    for number in range(10):
        while jobs := take(store, group=b"%d" % number):
            done(store, *jobs, group=b"%d" % number)
    # The share of a group depends on how many groups there were when it was last used.
    assert sum(len(group.done) for group in store.groups._groups.values()) <= sum(5 + 100 // n for n in range(1, 11))


def test_memory_of_jobs_that_failed_is_given_back(store: ClockedStore, clock: Clock) -> None:
    allow(store, max_attempts=1, max_group_bytes=20 * JOB_BYTES)
    put(store, b"t", *[b"x"] * 30)
    take(store, count=30)
    clock.now += LEASE
    while store.groups.expire():
        pass
    assert store.groups.memory == GROUP_BYTES + NUMBER_BYTES + len(b"t")
    assert stats(store).counts.failed == 30


def test_extending_ended_leases_takes_no_memory(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", *[b"x"] * 100)
    jobs = take(store, count=100)
    for _ in range(20):
        clock.now += LEASE
        store.groups.expire()
        for job in jobs:
            extend(store, job, LEASE)
    [group] = store.groups._groups.values()
    assert len(group._ready) <= 2 * 100 + 64 + 100


# Errors


def test_job_that_cannot_be_read_now_is_given_later(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2", b"3")
    take(store, count=2)
    clock.now += LEASE
    read, reads = store.read, iter([False, True, False, True])

    def failing(*arguments: int) -> list[Message]:
        if next(reads, False):
            raise StoreFailed("SQLite: a test")
        return read(*arguments)  # type: ignore[arg-type]

    store.read = failing  # type: ignore[assignment, method-assign]
    assert ids(take(store, count=3)) == [1]
    # Not the second, because the third read fails.
    assert ids(take(store, count=3)) == [2]
    assert ids(take(store, count=3)) == [3]


def test_full_group_without_more_messages_is_only_empty(store: ClockedStore) -> None:
    allow(store, max_jobs_in_flight=1)
    put(store, b"t", b"1")
    assert ids(take(store)) == [1]
    assert take(store) == []
    assert take(store, b"t*") != []
    assert take(store, b"t*") == []


# Snapshots


def test_groups_continue_after_a_restart(store: ClockedStore, clock: Clock, tmp_path: Path) -> None:
    file = tmp_path / "snapshot"
    put(store, b"t", b"1", b"2", b"3", b"4", b"5")
    one, two, three, four = take(store, count=4)
    done(store, one)
    give_back(store, three, 5_000)
    give_back(store, four)
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=True)
    counts, ignored = stats(store), {"counts": None, "oldest_age_ms": 0}
    with restored(file) as other:
        assert [one._replace(**ignored) for one in other.groups.stats()] == [counts._replace(**ignored)]  # type: ignore[arg-type]
        done(other, one)
        assert [(job.id, job.attempt) for job in take(other, count=9)] == [(4, 2), (5, 1)]
        done(other, two)
        with pytest.raises(JobLost):
            done(other, three)


def test_same_token_gets_the_same_job_after_a_restart(store: ClockedStore, tmp_path: Path) -> None:
    file = tmp_path / "snapshot"
    put(store, b"t", b"1", b"2")
    take(store, token=b"x")
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=True)
    with restored(file) as other:
        assert [(job.id, job.attempt) for job in take(other, token=b"x")] == [(1, 1)]


def test_lease_lasts_a_while_after_a_restart(store: ClockedStore, clock: Clock, tmp_path: Path) -> None:
    file = tmp_path / "snapshot"
    put(store, b"t", b"1")
    take(store)
    clock.now += LEASE - 1
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=True)
    with restored(file) as other:
        due = other.groups.due_in(b"t", W)
        assert LEASE_AFTER_RESTART_MS - 1_000 < due <= LEASE_AFTER_RESTART_MS


def test_messages_dropped_before_and_after_a_restart_are_counted_as_dropped(
    store: ClockedStore, tmp_path: Path
) -> None:
    limits = Limits(topic=(TopicRule(b"t", max_messages=1, when_full=DROP_OLDEST),))
    file = tmp_path / "snapshot"
    store.limits = limits
    put(store, b"t", b"1")
    put(store, b"t", b"2")
    put(store, b"t", b"3")
    done(store, *take(store))
    put(store, b"t", b"4")
    put(store, b"t", b"5")
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=True)
    with restored(file) as other:
        other.limits = limits
        put(other, b"t", b"6")
        assert [job.body for job in take(other)] == [b"6"]
        assert (stats(other).counts.dropped, stats(other).counts.expired) == (2, 0)


def test_snapshot_without_groups_is_loaded(store: ClockedStore, tmp_path: Path) -> None:
    import sqlite3

    put(store, b"t", b"1")
    with closing(sqlite3.connect(":memory:")) as source:
        Groups(store).load(source, 0)
    assert ids(take(store)) == [1]


# Model


class GroupAndModel(RuleBasedStateMachine):
    """Takes and settles jobs and compares the results with a simple model of each message's history."""

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.store = ClockedStore(10_000, self.clock)
        self.put_at: dict[int, int] = {}
        self.attempts: dict[int, int] = {}
        self.until: dict[int, int] = {}
        self.holder: dict[int, int] = {}
        self.done: set[int] = set()
        self.receipts: list[Receipt] = []

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    def available(self) -> list[int]:
        """Return the ids of the jobs that can be given now, in the expected order."""
        now = self.clock.now
        live = [one for one, at in self.put_at.items() if now - at <= 10_000 and one not in self.done]
        again = [one for one in live if self.attempts.get(one) and self.until[one] <= now]
        return sorted(again) + sorted(one for one in live if not self.attempts.get(one))

    @rule(topic=st.sampled_from([b"a", b"b"]), count=st.integers(1, 3))
    def put(self, topic: bytes, count: int) -> None:
        for message_id in put(self.store, topic, *[b"x"] * count):
            self.put_at[message_id] = self.clock.now

    @rule(milliseconds=st.sampled_from([1, 10, 100, 1_000, 6_000]))
    def wait(self, milliseconds: int) -> None:
        self.clock.now += milliseconds

    @rule()
    def expire(self) -> None:
        self.store.groups.expire()
        expire_all(self.store)

    @rule(count=st.integers(1, 4), lease_ms=st.sampled_from([10, 100, 3_000]))
    def take(self, count: int, lease_ms: int) -> None:
        expected = self.available()[:count]
        jobs = take(self.store, b"*", count, lease_ms=lease_ms)
        assert ids(jobs) == expected
        for job in jobs:
            self.attempts[job.id] = self.attempts.get(job.id, 0) + 1
            assert job.attempt == self.attempts[job.id]
            self.until[job.id], self.holder[job.id] = self.clock.now + lease_ms, job.attempt
            self.receipts.append(Receipt(job.id, job.attempt))

    def settle(self, receipt: Receipt, call: object, *arguments: object) -> bool:
        """Return whether the worker still had the job."""
        is_current = self.holder.get(receipt.id) == receipt.attempt
        try:
            call(*arguments)  # type: ignore[operator]
        except JobLost:
            # A group that has not been used for long is forgotten, as are jobs that have expired.
            assert not is_current or self.clock.now - self.put_at[receipt.id] > 10_000
            return False
        assert is_current or receipt.id in self.done
        return is_current

    @precondition(lambda self: self.receipts)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        receipt = data.draw(st.sampled_from(self.receipts))
        if self.settle(receipt, self.store.groups.done, b"*", W, [receipt]):
            self.done.add(receipt.id)
            del self.holder[receipt.id]

    @precondition(lambda self: self.receipts)
    @rule(data=st.data(), delay_ms=st.sampled_from([0, 50]))
    def return_(self, data: st.DataObject, delay_ms: int) -> None:
        receipt = data.draw(st.sampled_from(self.receipts))
        if receipt.id in self.done:
            return
        if self.settle(receipt, self.store.groups.give_back, b"*", W, receipt, delay_ms):
            self.until[receipt.id] = self.clock.now + delay_ms
            del self.holder[receipt.id]

    @precondition(lambda self: self.receipts)
    @rule(data=st.data(), lease_ms=st.sampled_from([10, 500]))
    def extend(self, data: st.DataObject, lease_ms: int) -> None:
        receipt = data.draw(st.sampled_from(self.receipts))
        if receipt.id in self.done:
            return
        if self.settle(receipt, self.store.groups.extend, b"*", W, receipt, lease_ms):
            self.until[receipt.id] = self.clock.now + lease_ms

    @invariant()
    def memory_is_counted(self) -> None:
        if hasattr(self, "store"):
            groups = self.store.groups
            assert groups._memory == sum(group.counted_memory for group in groups._groups.values())
            for group in groups._groups.values():
                numbers, jobs = group.numbers, group.jobs.values()
                names = sum(map(len, numbers)) + sum(len(job.topic) for job in jobs)
                assert group.other_bytes == GROUP_BYTES + NUMBER_BYTES * len(numbers) + names

    @invariant()
    def jobs_in_flight_are_counted(self) -> None:
        for group in self.store.groups._groups.values() if hasattr(self, "store") else ():
            assert group.in_flight == sum(job.is_in_flight for job in group.jobs.values())


TestGroupAndModel = GroupAndModel.TestCase
TestGroupAndModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
