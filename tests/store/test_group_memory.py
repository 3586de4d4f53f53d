"""The memory for the state of groups: it is counted as it is, and `max_group_bytes` bounds it."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from snapshotting import restored, snapshotting
from stores import Clock, ClockedStore, expire_all, put
from working import AGE, LEASE, W, clock, store, take

from dsmq.errors import Full, JobLost
from dsmq.store import groups as groups_module
from dsmq.store.group import DONE_BYTES, DUE_BYTES, GROUP_BYTES, JOB_BYTES, NUMBER_BYTES, Receipt
from dsmq.store.groups import GroupLimits, Job

# Fixtures.
__all__ = ["clock", "store"]

# The memory that is in use may differ from the counted memory by this factor.
FACTOR = 1.5


def done(store: ClockedStore, jobs: list[Job], key: bytes = b"t", group: bytes = W) -> None:
    store.groups.done(key, group, [Receipt(job.id, job.attempt) for job in jobs])


def put_into(store: ClockedStore, topics: int, name_bytes: int, count: int) -> None:
    """Put messages into topics with names of this size, one after the other."""
    names = [(b"%d/" % number).ljust(name_bytes, b"x") for number in range(topics)]
    for number in range(count):
        put(store, names[number % topics], b"x")


class Load(NamedTuple):
    """What workers do."""

    key: bytes = b"t"
    topics: int = 1
    groups: int = 1
    messages: int = 2_000
    token: bytes = b""
    is_done: Callable[[int], object] = lambda _: False
    """Whether a group's first, second, … job is finished at once."""

    def run(self, store: ClockedStore) -> None:
        for number in range(self.groups):
            for taken in itertools.count(1):
                token = self.token and b"%d" % taken + self.token
                if not (jobs := take(store, self.key, group=b"group %d" % number, token=token)):
                    break
                if self.is_done(taken):
                    done(store, jobs, self.key, b"group %d" % number)


LOADS = {
    "jobs with tokens": Load(token=b"x" * 20),
    "jobs without tokens": Load(),
    "jobs of several topics": Load(b"*", topics=50, token=b"x" * 20),
    "finished jobs": Load(messages=4_000, is_done=bool),
    "jobs finished out of order": Load(messages=4_000, token=b"x" * 20, is_done=lambda taken: taken % 2),
    "one job that takes long": Load(messages=4_000, is_done=lambda taken: taken > 1),
    "numbers": Load(b"*", topics=200, groups=10, messages=200, is_done=bool),
    "many groups": Load(groups=50, messages=60, token=b"x" * 20, is_done=bool),
    "empty groups": Load(groups=500, messages=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_memory_is_counted(store: ClockedStore, clock: Clock, load: Load) -> None:
    names = [b"%d" % number + b"x" * 40 for number in range(load.topics)] if load.key == b"*" else [load.key]
    for name in names:
        # Python keeps one object of each integer up to this one.
        put(store, name, *[b"x"] * 256)
    clock.now += AGE + 1
    expire_all(store)
    for name in names:
        put(store, name, *[b"x"] * (load.messages // load.topics))
    store.write()
    # Allocate now what does not belong to a group, and read no messages in advance.
    take(store, load.key, 0)
    store.groups._ahead.next = lambda group, *_: store.groups._read_next(group, 1, 1)  # type: ignore[method-assign]
    gc.collect()
    tracemalloc.start()
    try:
        used, counted = tracemalloc.get_traced_memory()[0], store.groups.memory
        load.run(store)
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - used
    finally:
        tracemalloc.stop()
    store.groups.expire()
    counted = store.groups.memory - counted
    assert counted / FACTOR < used < counted * FACTOR


def test_memory_for_topics_that_no_longer_exist_is_counted(store: ClockedStore, clock: Clock) -> None:
    put_into(store, 100, 500, 100)
    take(store, b"*", 100, lease_ms=10 * AGE)
    before = store.groups.memory
    clock.now += AGE + 1
    expire_all(store)
    assert not store.totals().topics
    names = 100 * 500
    assert store.groups.memory == before == GROUP_BYTES + 100 * (JOB_BYTES + DUE_BYTES + NUMBER_BYTES) + 2 * names


def test_memory_is_the_same_after_a_restart(store: ClockedStore, tmp_path: Path) -> None:
    file, long = tmp_path / "snapshot", b"t" * 500
    put(store, long, *[b"x"] * 100)
    take(store, long, 100)
    put_into(store, 10, 100, 10)
    done(store, take(store, b"*x", 10)[5:], b"*x")
    store.groups.expire()
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=True)
    with restored(file) as other:
        # Leases of finished jobs are no longer remembered.
        assert other.groups.memory == store.groups.memory - 5 * DUE_BYTES
        [group, _] = other.groups._groups.values()
        assert all(job.topic is group.key for job in group.jobs.values())


def test_jobs_are_settled_beyond_the_limit(store: ClockedStore) -> None:
    put_into(store, 4, 500, 4)
    jobs = take(store, b"*", 3)
    store.groups.limits = GroupLimits(max_group_bytes=store.groups.memory)
    with pytest.raises(Full, match="max_group_bytes"):
        take(store, b"*")
    store.groups.give_back(b"*", W, Receipt(jobs[0].id, 1), 0)
    store.groups.extend(b"*", W, Receipt(jobs[1].id, 1), LEASE)
    # A job given again needs no more memory.
    assert [(job.id, job.attempt) for job in take(store, b"*")] == [(jobs[0].id, 2)]
    with pytest.raises(Full, match="max_group_bytes"):
        take(store, b"*")
    done(store, jobs[1:], b"*")
    assert [job.id for job in take(store, b"*")] == [4]


def test_numbers_of_topics_count_towards_the_limit(store: ClockedStore) -> None:
    store.groups.limits = GroupLimits(max_group_bytes=GROUP_BYTES + 20 * (NUMBER_BYTES + 500))
    put_into(store, 30, 500, 30)
    take(store, b"*", 0)
    [group] = store.groups._groups.values()
    with pytest.raises(Full, match="max_group_bytes"):  # noqa: PT012 - each take may be the one
        while jobs := take(store, b"*"):
            done(store, jobs, b"*")
    assert 10 < len(group.numbers) <= 20


def test_finished_jobs_of_other_groups_are_forgotten_before_a_job_is_refused(store: ClockedStore) -> None:
    put(store, b"t", *[b"x"] * 300)
    store.groups.limits = GroupLimits(max_group_bytes=3 * (GROUP_BYTES + 200 * DONE_BYTES))
    finished = {}
    for number in range(6):
        group = b"%d" % number
        finished[group] = []
        while jobs := take(store, group=group):
            done(store, jobs, group=group)
            finished[group] += jobs
        assert len(finished[group]) == 300
    assert store.groups.memory < store.groups.limits.max_group_bytes
    for group, jobs in finished.items():
        # A worker that did not get the reply may repeat this.
        done(store, jobs[-groups_module.LEAST_DONE :], group=group)
    with pytest.raises(JobLost):
        done(store, finished[b"0"][:1], group=b"0")


def test_numbers_are_forgotten_before_a_job_is_refused(store: ClockedStore) -> None:
    least = groups_module.LEAST_DONE
    store.groups.limits = GroupLimits(max_group_bytes=GROUP_BYTES + 2 * least * (NUMBER_BYTES + DONE_BYTES + 500))
    put_into(store, 10 * least, 500, 10 * least)
    for _ in range(10 * least):
        done(store, take(store, b"*"), b"*")
    [group] = store.groups._groups.values()
    assert least <= len(group.numbers) < 2 * least
    assert group.other_bytes == GROUP_BYTES + len(group.numbers) * (NUMBER_BYTES + 500)


def test_nothing_is_forgotten_over_and_over_if_that_frees_too_little(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", *[b"x"] * 100)
    take(store, count=90)
    store.groups.limits = GroupLimits(max_group_bytes=store.groups.memory)
    [group] = store.groups._groups.values()
    counted = store.groups._count_memory
    calls = []
    store.groups._count_memory = lambda group: counted(calls.append(group) or group)  # type: ignore[func-returns-value, method-assign]
    for _ in range(10):
        with pytest.raises(Full):
            take(store, group=b"other")
    # Each request counts the memory of its own group, and the first one that of all groups.
    assert calls.count(group) == 1
    clock.now += groups_module.FORGET_AGAIN_MS
    with pytest.raises(Full):
        take(store, group=b"other")
    assert calls.count(group) == 2
