"""Restarts from a snapshot, after a graceful stop or a kill: ages, ids, runs, and lost messages."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from snapshotting import (
    MAX_AGE,
    SAVED_AT,
    act,
    bodies,
    file,
    hello,
    restored,
    save,
    serving_store,
    snapshotting,
    store,
)
from stores import Clock, ClockedStore, put

from conftest import UNIT, Wire, as_map, blocked, daemon, serving, wait_until, wire_to
from dsmq.store import snapshot_file
from dsmq.store.snapshots import RESTORE_GAP, Snapshotter
from dsmq.store.sqlite import SQLiteStore

# Fixtures.
__all__ = ["file", "store"]

# Clocks


@pytest.mark.parametrize(
    ("passed", "age_ms"), [(0, 1_000), (5, 6_000), (-3_600, 1_000), (99, 100_000), (99.001, None), (10**9, None)]
)
def test_ages_follow_wall_clock_across_restart(
    store: ClockedStore, file: Path, passed: float, age_ms: int | None
) -> None:
    put(store, b"t", b"x", b"y")
    act(store, 1_000)
    save(store, file)
    with restored(file, SAVED_AT + passed) as other:
        found = other.read(b"t", 0, 10, 100)
        assert [message.age_ms for message in found] == ([] if age_ms is None else [age_ms] * 2)
        assert other.totals().messages == len(found)
        assert put(other, b"t", b"z") == [3]
        assert other.last_number(b"t") == 3
        assert other.read(b"t", 2, 1, 100)[0].age_ms == 0


def test_ages_include_time_spent_on_slow_disk(store: ClockedStore, file: Path) -> None:
    now = [SAVED_AT]
    put(store, b"t", b"x")

    def take_time() -> None:
        act(store, 1_600)
        now[0] += 1.6

    store.between_batches = take_time
    snapshotter = Snapshotter(store, str(file), clock=lambda: now[0])
    assert snapshotter.save()
    with restored(file, now[0]) as other:
        assert other.read(b"t", 0, 1, 100)[0].age_ms == round((now[0] - SAVED_AT) * 1000) >= 1_600


def test_ages_include_time_spent_on_restore(store: ClockedStore, file: Path) -> None:
    put(store, b"t", b"x")
    save(store, file)
    other = ClockedStore(MAX_AGE, Clock(5_000))
    with snapshot_file.opened(file) as connection:
        # With each statement.
        connection.set_trace_callback(lambda _: act(other, 1_000))
        other.load(connection, SAVED_AT)
    assert other.read(b"t", 0, 1, 100)[0].age_ms >= 2_000
    other.close()


def test_messages_expired_before_restore_are_logged(
    store: ClockedStore, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    put(store, b"t", b"1", b"2", b"3")
    save(store, file)
    with restored(file, SAVED_AT + 101):
        pass
    [line] = [record for record in caplog.records if getattr(record, "event", "") == "restored"]
    assert "restored 0 messages" in line.getMessage()
    assert "3 more had expired" in line.getMessage()
    assert line.fields["expired"] == 3  # type: ignore[attr-defined]


def test_ages_continue_during_suspend(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.clock_gettime_ns
    slept_ns = 0

    def clock(which: int) -> int:
        return real(which) + (slept_ns if which == time.CLOCK_BOOTTIME else 0)

    monkeypatch.setattr(time, "clock_gettime_ns", clock)
    with serving(max_age_seconds=7200) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        slept_ns = 3_600 * 10**9
        assert wire.call("READ", "t", 0)[2] // 1000 == 3_600  # type: ignore[index,operator]
        slept_ns = 7_201 * 10**9
        assert wire.call("READ", "t", 0) == []


# Clean shutdowns and kills


def test_clean_shutdown_is_valid_once_and_ids_are_never_reused(store: ClockedStore, file: Path) -> None:
    put(store, b"t", b"1")
    save(store, file)
    runs, ids = {store.run}, [1]
    # All but the first one are killed: they write no snapshot.
    for gaps in range(4):
        with restored(file) as other:
            assert other.epoch == store.epoch
            assert (other.run == store.run) == (gaps == 0)
            assert other.last_id() == 1 + gaps * RESTORE_GAP
            runs.add(other.run)
            ids += put(other, b"t", b"2", b"3")
            assert [message.number for message in other.read(b"t", 0, 10, 100)] == [1, 2, 3]
    assert len(runs) == 4
    assert ids == sorted(set(ids))


def test_ids_skip_ahead_after_unclean_shutdown(store: ClockedStore, file: Path) -> None:
    put(store, b"t", b"1")
    save(store, file, is_last=False)
    for gaps in (1, 2):
        with restored(file) as other:
            assert other.epoch == store.epoch
            assert other.run != store.run
            assert put(other, b"t", b"2") == [2 + gaps * RESTORE_GAP]
            assert bodies(other, b"t") == [b"1", b"2"]


def test_kill_is_distinguished_from_graceful_stop(file: Path) -> None:
    options = ("--snapshot-file", str(file))
    with daemon(*options) as first, wire_to(first) as wire:  # type: ignore[arg-type]
        wire.call("PUT", "t", "kept")
        greeting = hello(wire)
        assert first.stop() == 0
    with daemon(*options) as second, wire_to(second) as wire:  # type: ignore[arg-type]
        assert any("INFO" in line and "restored 1 messages of 1 topics" in line for line in second.log().splitlines())
        assert hello(wire)[b"run"] == greeting[b"run"]
        assert wire.call("PUT", "t", "lost") == 2
        second.process.kill()
        second.process.wait()
    with daemon(*options) as third, wire_to(third) as wire:  # type: ignore[arg-type]
        again = hello(wire)
        assert (again[b"epoch"], again[b"last_id"]) == (greeting[b"epoch"], 1 + RESTORE_GAP)
        assert again[b"run"] != greeting[b"run"]
        assert wire.call("READ", "t", 0)[3] == b"kept"
        assert any("WARNING" in line and "are lost" in line for line in third.log().splitlines())


def test_surviving_thread_prevents_clean_shutdown_mark(file: Path) -> None:
    store = SQLiteStore(0)
    settings = {"snapshot_file": str(file), "stop_timeout_seconds": UNIT}
    with serving_store(store, **settings) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        with blocked(server):
            assert server.stop() == ["dsmq-io-0"]
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "dsmq-io-0"])
    with restored(file, time.time()) as other:
        assert (other.epoch, other.run == store.run) == (store.epoch, False)
        assert bodies(other, b"t") == [b"x"]


# Kills


def grow(file: Path, report: int) -> None:
    """Put numbered messages and write a snapshot after every few, forever; report how many are saved."""
    store = ClockedStore(MAX_AGE)
    with snapshotting(store, file) as snapshotter:
        count = len(bodies(store, b"t"))
        while True:
            put(store, b"t", *[b"%d" % number for number in range(count, count + 7)])
            put(store, b"other %d" % count, os.urandom(2000))
            store.write()
            count += 7
            assert snapshotter.save(at_once=bool(count % 2), is_last=count % 3 == 0)
            os.write(report, b"%d\n" % count)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kill_at_any_time_leaves_one_complete_snapshot(file: Path) -> None:
    chance = random.Random(8)
    kept = 0
    for _ in range(40):
        kept = kill_one(file, kept, chance.uniform(0, 0.03))
        with restored(file) as store:
            found = store.read(b"t", 0, 100_000, 10**9)
            assert [message.body for message in found] == [b"%d" % number for number in range(len(found))]
            assert [message.number for message in found] == list(range(1, len(found) + 1))
            ids = [message.id for message in found]
            assert ids == sorted(set(ids))
            # The last one may have been completed without a report.
            assert len(found) in (kept, kept + 7)
            kept = len(found)
    assert kept >= 7 * 40
    assert not list(file.parent.glob("*.damaged*"))


def kill_one(file: Path, kept: int, after: float) -> int:
    """Run a process that writes snapshots and kill it `after` seconds after the first; return its last report."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            grow(file, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    with open(read_end) as reports:
        first = int(reports.readline())
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return max(kept, first, *(int(line) for line in reports))


# Lost ids


def numbers(wire: Wire, topic: str, *after: str | int) -> tuple[object, object]:
    stats = as_map(wire.call("STATS", topic, *after))
    return stats[b"last_number"], stats[b"restored_number"]


def lost_ids(wire: Wire) -> object:
    return hello(wire)[b"lost_ids"]


def test_missed_count_is_exact_after_kill(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    gap = RESTORE_GAP
    store = SQLiteStore(0)
    with serving_store(store, snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert lost_ids(wire) == []
        wire.call("PUT", "empty", "x")
        store.max_age_ms = -1
        wait_until(lambda: server.status.totals().messages == 0)
        store.max_age_ms = 600_000
        for _ in range(2):
            wire.call("PUT", "full", "x")
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        # A graceful stop loses nothing.
        assert lost_ids(wire) == []
    # As after a kill: the snapshot is older than the last puts.
    copy = path.read_bytes()
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        wire.call("PUT", "full", "lost")
    path.write_bytes(copy)
    snapshot_file.record_restore(path, snapshot_file.verify(path))
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert lost_ids(wire) == [3, 3 + gap]
        assert wire.call("PUT", "full", "new") == 4 + gap
        assert [numbers(wire, topic) for topic in ("full", "empty", "none")] == [(3, 2), (1, 1), (0, 0)]
    # A graceful stop continues that run, even for a client that reconnects only now.
    store = SQLiteStore(0)
    with serving_store(store, snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert lost_ids(wire) == [3, 3 + gap]
        assert [numbers(wire, topic) for topic in ("full", "empty", "none")] == [(3, 2), (1, 1), (0, 0)]
        assert Snapshotter(store, str(path)).save()
        copy = path.read_bytes()
    path.write_bytes(copy)
    snapshot_file.record_restore(path, snapshot_file.verify(path))
    # It counts twice, because it was not a final snapshot. A client that was away gets both ranges.
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert lost_ids(wire) == [3, 3 + gap, 4 + gap, 4 + 3 * gap]
        assert [numbers(wire, topic) for topic in ("full", "empty", "none")] == [(3, 3), (1, 1), (0, 0)]
        ids = 3, 4, 3 + gap, 4 + gap, 5 + gap
        assert [numbers(wire, "full", "AFTER", one)[1] for one in ids] == [3, 2, 2, 3, 3]
        assert wire.error("STATS", "full", "AFTER", "x") == wire.error("STATS", "full", "AFTER") == "BADREQUEST"


def test_last_ranges_of_lost_ids_are_remembered(store: ClockedStore) -> None:
    for number in range(1, 300):
        store.begin_run(store.last_id() + number)
    assert len(store.lost_ids) == 200
    store.append([(b"%d" % number, b"", None) for number in range(60_000)])
    last = store.last_id()
    for number in range(3):
        store.begin_run(last + number + 1)
    # The last range is always remembered with all numbers.
    assert store.lost_ids == [last + 1, last + 2, last + 2, last + 3]
    assert store.stats(b"59999", last + 3).restored_number == 1
