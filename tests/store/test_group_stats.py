"""The figures of groups of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from snapshotting import restored, snapshotting
from stores import Clock, ClockedStore, expire_all, put
from working import AGE, LEASE, W, clock, stats, store, take

from dsmq.store import group_figures
from dsmq.store.group import Receipt
from dsmq.store.scan import MATCH_STEP, MAX_MATCHES, MAX_MERGED_TOPICS
from dsmq.store.selection import Selection

# Fixtures.
__all__ = ["clock", "store"]


def states(store: ClockedStore) -> tuple[int, int, int]:
    """Return how many messages wait, are held, and are to be given again."""
    return (found := stats(store)).waiting, found.held, found.again


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("key", [b"t", b"t*", b"*"])
def test_each_message_is_in_one_state(store: ClockedStore, clock: Clock, key: bytes, flushed: bool) -> None:
    put(store, b"t", *[b"x"] * 40)
    if flushed:
        store.flush()
    one, two, *_ = take(store, key, 10)
    assert states(store) == (30, 10, 0)
    store.groups.done(key, W, [Receipt(one.id, 1)])
    store.groups.give_back(key, W, Receipt(two.id, 1), 500)
    assert states(store) == (30, 8, 1)
    clock.now += LEASE
    store.groups.expire()
    assert states(store) == (30, 0, 9)
    take(store, key, 39)
    assert states(store) == (0, 39, 0)
    put(store, b"t", b"y")
    assert states(store) == (1, 39, 0)


@pytest.mark.parametrize("topics", [1, MAX_MERGED_TOPICS, MAX_MERGED_TOPICS + 1, MATCH_STEP + 100])
def test_messages_of_matching_topics_are_counted(store: ClockedStore, topics: int) -> None:
    for number in range(topics):
        put(store, b"other/%d" % number, b"x")
        put(store, b"t/%d" % number, b"x", b"x")
    taken = len(take(store, b"t/*", topics))
    assert states(store) == (2 * topics - taken, taken, 0)
    while take(store, b"t/*", topics):
        pass
    assert states(store) == (0, 2 * topics, 0)
    put(store, b"other/0", *[b"x"] * 200)
    put(store, b"t/new", b"x")
    assert states(store) == (1, 2 * topics, 0)


def test_waiting_count_of_pattern_with_too_many_topics_is_at_most_all_later_messages(store: ClockedStore) -> None:
    for number in range(MAX_MATCHES + 100):
        put(store, b"t/%d" % number, b"x")
    taken = len(take(store, b"t/*", 100))
    assert stats(store).waiting == MAX_MATCHES + 100 - taken
    put(store, b"other", b"x")
    assert stats(store).waiting == MAX_MATCHES + 101 - taken


@pytest.mark.parametrize("key", [b"t", b"t*"])
def test_oldest_message_not_done_gives_the_age(store: ClockedStore, clock: Clock, key: bytes) -> None:
    put(store, b"a", b"x")
    for _ in range(3):
        clock.now += 1_000
        put(store, b"t", b"x")
        store.flush()
    clock.now += 1_000
    jobs = take(store, key, 2, lease_ms=10 * AGE)
    assert stats(store).oldest_age_ms == 3_000
    store.groups.done(key, W, [Receipt(jobs[0].id, 1)])
    assert stats(store).oldest_age_ms == 2_000
    store.groups.done(key, W, [Receipt(jobs[1].id, 1)])
    assert stats(store).oldest_age_ms == 1_000
    [job] = take(store, key, lease_ms=10 * AGE)
    # A message that has expired during its lease has no age.
    clock.now += AGE
    expire_all(store)
    assert stats(store).oldest_age_ms == 0
    put(store, b"t", b"x")
    clock.now += 500
    assert stats(store).oldest_age_ms == 500
    store.groups.done(key, W, [Receipt(job.id, 1)])


def test_age_is_of_the_topics_taken_from(store: ClockedStore, clock: Clock) -> None:
    take(store, b"t/*")
    put(store, b"other", b"x")
    clock.now += 1_000
    assert (states(store), stats(store).oldest_age_ms) == ((0, 0, 0), 0)
    put(store, b"t/1", b"x")
    clock.now += 1_000
    assert (states(store), stats(store).oldest_age_ms) == ((1, 0, 0), 1_000)


def test_held_jobs_of_a_topic_are_listed_longest_first(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"x", b"x", b"x")
    put(store, b"other", b"x")
    take(store, lease_ms=100)
    clock.now += 1_000
    take(store, b"*", 4, group=b"all")
    clock.now += 10
    store.groups.expire()
    take(store)
    held = [(group.key, group.name, job.id, job.attempt, ms) for group, job, ms in store.groups.held(b"t", 3)]
    assert held == [(b"*", b"all", 1, 1, 10), (b"*", b"all", 2, 1, 10), (b"*", b"all", 3, 1, 10)]
    assert [(job.id, job.attempt, ms) for _, job, ms in store.groups.held(b"t", 9)][3:] == [(1, 2, 0)]


def test_sums_over_all_groups_never_fall(store: ClockedStore, clock: Clock, tmp_path: Path) -> None:
    put(store, b"t", b"x", b"x")
    for group in (b"one", b"two"):
        for job in take(store, count=2, group=group):
            store.groups.done(b"t", group, [Receipt(job.id, 1)])
    assert (store.groups.counts().taken, store.groups.counts().done) == (4, 4)
    file = tmp_path / "snapshot"
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=True)
    clock.now += AGE + 1
    store.groups.expire()
    assert store.groups.count == 0
    assert (store.groups.counts().taken, store.groups.counts().done) == (4, 4)
    with restored(file) as other:
        # They are counted by this server, since its start.
        assert (other.groups.count, other.groups.counts().taken) == (2, 0)
        put(other, b"t", b"x")
        take(other, group=b"one")
        assert other.groups.counts().taken == 1
        assert [one.counts.taken for one in other.groups.stats()] == [3, 2]


def test_figures_of_many_groups_take_locks_for_a_short_time(
    store: ClockedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the time is over at the first check, few topics are matched for each group."""
    matches, matched = Selection.matches, 0

    def count(selection: Selection, name: bytes) -> bool:
        nonlocal matched
        matched += 1
        return matches(selection, name)

    for number in range(0, 20_000, 1_000):
        store.append([(b"%d/%d" % (one % 20, one), b"x", None) for one in range(number, number + 1_000)])
    for number in range(20):
        for key in (b"%d/*" % (number % 20), b"*%d" % (number % 100), b"%d/%d" % (number % 20, number)):
            take(store, key, group=b"%d" % number)
    for number in range(20):
        store.append([(b"%d/new %d" % (number, one), b"x", None) for one in range(50)])
    store.write()
    monkeypatch.setattr(Selection, "matches", count)
    most = 0
    for _ in range(3):
        for _ in store.groups.stats(seconds=0):
            most, matched = max(most, matched), 0
    assert most == MATCH_STEP


def test_one_group_is_described_even_if_the_time_is_over(store: ClockedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_figures, "_FIRST_SECONDS", 0)
    assert list(store.groups.first_stats()) == []
    for group in (b"1", b"2"):
        take(store, group=group)
    assert [one.name for one in store.groups.first_stats()] == [b"1"]
