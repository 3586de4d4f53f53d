"""Groups that change while a snapshot is being written."""

from __future__ import annotations

import random
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from snapshotting import SAVED_AT, snapshotting
from stores import Clock, ClockedStore, put
from working import AGE, W, clock, store, take

from dsmq.errors import JobLost
from dsmq.store import group_snapshots, snapshot_file
from dsmq.store.group import Receipt
from dsmq.store.groups import GroupLimits

# Fixtures.
__all__ = ["clock", "store"]

KEYS = b"t", b"*", b"t*"
LONG = 10 * AGE


def state(store: ClockedStore) -> dict[tuple[bytes, bytes], Any]:
    """Return what must not differ from the instant of a snapshot."""
    return {
        key: (
            group.position,
            list(group.jobs),
            list(group.done.items()),
            list(group.numbers.items()),
            group.counts.taken,
        )
        for key, group in store.groups._groups.items()
    }


def saved_state(file: Path) -> dict[tuple[bytes, bytes], Any]:
    store = ClockedStore(AGE, Clock(5_000))
    try:
        with snapshot_file.opened(file) as connection:
            store.load(connection, SAVED_AT)
        return state(store)
    finally:
        store.close()


class Workers:
    """Take and settle jobs at random."""

    def __init__(self, store: ClockedStore, seed: int) -> None:
        self.store, self.random = store, random.Random(seed)
        self.held: list[tuple[bytes, bytes, Receipt]] = []

    def act(self) -> None:
        groups, choice = self.store.groups, self.random.choice
        match self.random.randrange(8):
            case 0:
                put(self.store, choice([b"t", b"t/1", b"t/2"]), *[b"x"] * 5)
            case 1 | 2 | 3:
                key, name, count = choice(KEYS), b"%d" % self.random.randrange(3), choice([1, 3])
                jobs = take(self.store, key, count, group=name, lease_ms=choice([10, 1_000]))
                self.held += [(key, name, Receipt(job.id, job.attempt)) for job in jobs]
            case 4 | 5 | 6 if self.held:
                key, name, receipt = self.held.pop(self.random.randrange(len(self.held)))
                calls = [
                    lambda: groups.done(key, name, [receipt]),
                    lambda: groups.done(key, name, [receipt]),
                    lambda: groups.give_back(key, name, receipt, choice([0, 50])),
                    lambda: groups.extend(key, name, receipt, 1_000),
                ]
                with suppress(JobLost):
                    choice(calls)()
            case 7:
                self.store.clock.now += choice([1, 100, 1_000])
                groups.expire()


@pytest.mark.parametrize("seed", range(10))
def test_snapshot_is_consistent_despite_changes_between_batches(
    store: ClockedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(group_snapshots, "COPY_ROWS", 2)
    store.groups.limits = GroupLimits(max_attempts=2)
    workers = Workers(store, seed)
    for _ in range(100):
        workers.act()
    before, after = state(store), tmp_path / "snapshot"
    assert sum(len(jobs) for _, jobs, *_ in before.values()) > 5

    def go_on() -> None:
        for _ in range(3):
            workers.act()

    store.between_batches = go_on
    with snapshotting(store, after) as snapshotter:
        assert snapshotter.save()
    assert saved_state(after) == before != state(store)


def test_group_forgotten_during_snapshot_is_saved(store: ClockedStore, clock: Clock, tmp_path: Path) -> None:
    put(store, b"t", b"1")
    for name in (b"a", b"b"):
        [job] = take(store, group=name)
        store.groups.done(b"t", name, [Receipt(job.id, job.attempt)])
    before, file = state(store), tmp_path / "snapshot"

    def go_on() -> None:
        clock.now += 10 * AGE
        store.groups.expire()
        assert not state(store)
        put(store, b"t", b"2")
        take(store, group=b"b")
        take(store, group=b"new")
        store.between_batches = bool

    store.between_batches = go_on
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save()
    assert saved_state(file) == before


def test_job_that_fails_during_snapshot_is_not_lost(store: ClockedStore, clock: Clock, tmp_path: Path) -> None:
    store.groups.limits = GroupLimits(max_attempts=1)
    put(store, b"t", b"1")
    take(store, lease_ms=10)
    file = tmp_path / "snapshot"

    def fail() -> None:
        clock.now += 10
        while store.groups.expire():
            pass
        store.between_batches = bool

    store.between_batches = fail
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save()
    assert store.last_id() == 2
    other = ClockedStore(AGE, Clock(5_000))
    with snapshot_file.opened(file) as connection:
        other.load(connection, SAVED_AT)
    while other.groups.expire():
        pass
    # The message in the other topic is newer than the snapshot, so the job is moved again.
    assert [message.body for message in other.read(b"t/failed", 0, 9, 9)] == [b"1"]
    other.close()


class Recording:
    """A lock that records how many instructions of Python run while it is held."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.count, self.began, self.most = lock, 0, 0, 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.began = self.count

    def __exit__(self, *_: object) -> None:
        self.most = max(self.most, self.count - self.began)
        self.lock.release()

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        frame.f_trace_opcodes = True
        self.count += event == "opcode"
        return self.trace


@pytest.mark.parametrize("is_done", [False, True])
def test_lock_is_held_for_few_jobs_at_once(store: ClockedStore, monkeypatch: pytest.MonkeyPatch, is_done: bool) -> None:
    monkeypatch.setattr(group_snapshots, "COPY_ROWS", 20)
    put(store, b"t", *[b"x"] * 2_000)
    store.write()
    while jobs := take(store, count=100, lease_ms=LONG):
        if is_done:
            store.groups.done(b"t", W, [Receipt(job.id, job.attempt) for job in jobs])
    recording = store.groups.lock = Recording(store.groups.lock)  # type: ignore[assignment]
    before = sys.gettrace()
    sys.settrace(recording.trace)
    try:
        with store.snapshot(0, is_last=False, file=None, on_progress=bool) as batches:
            rows = sum(len(rows) for insert, rows in batches if " jobs " in insert)
    finally:
        sys.settrace(before)
    assert rows == 2_000
    assert recording.count > 10 * rows
    assert recording.most < 2_000


def test_abandoned_snapshot_leaves_no_copies(store: ClockedStore, tmp_path: Path) -> None:
    put(store, b"t", b"1")
    for name in (b"a", b"b", b"c"):
        take(store, group=name)
    with snapshotting(store, tmp_path / "snapshot") as snapshotter:
        store.between_batches = lambda: (take(store, group=b"c"), snapshotter.stop())
        assert not snapshotter.save()
    assert not store.groups._uncopied
    assert not store.groups._copies
