"""Snapshots: what is restored, what is refused, and that a kill at any time leaves a complete file."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import resource
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import Clock, ClockedStore, expire_all, put, put_as

from conftest import (
    SOON,
    UNIT,
    Daemon,
    Wire,
    as_map,
    blocked,
    daemon,
    no_new_threads,
    run_dsmq,
    scrape,
    serving,
    wait_until,
    wire_to,
    without_privileges,
)
from dsmq import server as server_module
from dsmq import settings as config
from dsmq import threads
from dsmq.__main__ import INTERRUPTED
from dsmq.errors import ConfigError, Forgotten, ReplyError, ServerFailed, StartupError
from dsmq.server import Server
from dsmq.store import database, snapshot_contents, snapshot_file, snapshots
from dsmq.store import dedup as producers
from dsmq.store.api import Put
from dsmq.store.schema import INDEX, SCHEMA, SNAPSHOT_SCHEMA, unpack
from dsmq.store.snapshots import RESTORE_GAP, Snapshotter
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.resp import encode_request

MAX_AGE = 100_000
SAVED_AT = 1_700_000_000.0


@pytest.fixture
def store() -> Iterator[ClockedStore]:
    store = ClockedStore(MAX_AGE)
    yield store
    store.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "snapshot"


@contextmanager
def snapshotting(store: ClockedStore, file: Path, at: float = SAVED_AT) -> Iterator[Snapshotter]:
    """A snapshotter that has restored the file, if there was one."""
    snapshotter = Snapshotter(store, str(file), clock=lambda: at, pause_seconds=0)
    try:
        snapshotter.open()
        yield snapshotter
    finally:
        snapshotter.close()


@contextmanager
def restored(file: Path, at: float = SAVED_AT) -> Iterator[ClockedStore]:
    # Another process has another clock.
    store = ClockedStore(MAX_AGE, Clock(5_000))
    try:
        with snapshotting(store, file, at):
            yield store
    finally:
        store.close()


def save(store: ClockedStore, file: Path, *, is_last: bool = True) -> None:
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save_last(is_last=is_last)


def bodies(store: ClockedStore, topic: bytes) -> list[bytes]:
    return [message.body for message in store.read(topic, 0, 100_000, 10**9)]


NAMES = [b"a", b"b", b"c", "\N{SNOWMAN}".encode()]


class Disk:
    """Makes snapshots fail with `error`, or wait for the disk while `hangs` is set, at their very end."""

    def __init__(self, sync: Callable[[Path], None]) -> None:
        self.sync_folder = sync
        self.hangs = False
        self.error: OSError | None = None
        self.waiting, self.released = threading.Event(), threading.Event()

    def sync(self, folder: Path) -> None:
        if self.error:
            raise self.error
        if self.hangs:
            self.waiting.set()
            self.released.wait(SOON)
        self.sync_folder(folder)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(snapshot_file._sync_folder)
    monkeypatch.setattr(snapshot_file, "_sync_folder", disk.sync)
    return disk


@contextmanager
def serving_store(store: SQLiteStore, **settings: object) -> Iterator[Server]:
    """A server with this store, which is closed even if a thread survives the server."""
    effective = config.load(kind=config.EmbeddedSettings, **{"port": 0, **settings})
    with closing(store), Server(effective, store) as server:
        yield server


def hello(wire: Wire) -> dict[bytes, object]:
    return as_map(wire.call("HELLO"))


def state(store: ClockedStore) -> tuple[object, ...]:
    """Everything that a snapshot saves."""
    return (
        store.last_id(),
        store.epoch,
        [(store.stats(name), store.read(name, 0, 1000, 10**9), store.latest(name, 0)) for name in NAMES],
        store.topics(b"", 100),
        store.totals().accounted_bytes,
        store.remembered(),
    )


# Random actions: puts, milliseconds that pass, expiry, flushes.
a_key = st.none() | st.tuples(st.sampled_from([b"p", b"q"]), st.integers(0, 5))
puts = st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=20), a_key), min_size=1, max_size=6)
actions = st.one_of(puts, st.integers(1, 120_000), st.sampled_from(["expire", "write"]))


def act(store: ClockedStore, action: list[Put] | int | str) -> None:
    if isinstance(action, list):
        store.append(action)
    elif isinstance(action, int):
        store.clock.now += action
    elif action == "expire":
        store.expire()
    else:
        store.write()


# Contents


@settings(max_examples=60, deadline=None)
@given(st.lists(actions, max_size=25), st.booleans(), puts)
def test_restored_store_equals_saved_store(before: list[list[Put] | int | str], slowly: bool, later: list[Put]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, file = ClockedStore(MAX_AGE), Path(folder) / "snapshot"
        for action in before:
            act(store, action)
        # Restoring deletes expired messages.
        expire_all(store)
        with snapshotting(store, file) as snapshotter:
            assert snapshotter.save(at_once=not slowly, is_last=True)
        with restored(file) as other:
            assert state(other) == state(store)
            assert other.run == store.run
            assert (other.totals().stored, other.totals().expired) == (0, 0)
            assert other.append(later) == store.append(later)
            assert state(other) == state(store)
        store.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(actions, max_size=15), st.lists(st.lists(actions, max_size=4), max_size=12))
def test_snapshot_is_consistent_despite_changes_between_batches(
    before: list[list[Put] | int | str], meanwhile: list[list[list[Put] | int | str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "COPY_ROWS", 1)
        patch.setattr(snapshot_contents, "COPY_PRODUCERS", 1)
        store, file = ClockedStore(MAX_AGE), Path(folder) / "snapshot"
        for action in before:
            act(store, action)
            store.write()
        # Expired messages are deleted before the snapshot.
        expire_all(store)
        before_snapshot, rest = state(store)[:4], iter(meanwhile)

        def go_on() -> None:
            for action in next(rest, []):
                act(store, action)

        store.between_batches = go_on
        with snapshotting(store, file) as snapshotter:
            assert snapshotter.save()
        with snapshot_file.opened(file) as connection:
            other = ClockedStore(MAX_AGE, Clock(5_000))
            other.load(connection, SAVED_AT)
        assert state(other)[:4] == before_snapshot
        # No unreachable topics are left over.
        held = {topic.name for topic in other.topics(b"", 100)}
        assert {name for (name,) in other.connection.execute("SELECT name FROM topics")} == held
        other.close()
        store.close()


def test_topic_emptied_and_recreated_between_batches_appears_once(store: ClockedStore, file: Path) -> None:
    for name in NAMES[:3]:
        # Each is a batch of its own.
        put(store, name, b"x" * database.COPY_BYTES)
    store.write()
    put(store, NAMES[3], b"buffered")
    expired: list[int] = []

    def go_on() -> None:
        act(store, MAX_AGE + 1)
        expired.append(store.expire())
        put(store, b"a", b"new")
        store.write()

    store.between_batches = go_on
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save()
    # Meanwhile, only copied rows are deleted.
    assert sum(expired) > 0
    assert expired[0] == 0
    with snapshot_file.opened(file) as connection:
        assert connection.execute("SELECT count(*) FROM topics").fetchone() == (4,)
        assert connection.execute("SELECT count(*), max(last_number) FROM chunks").fetchone() == (4, 1)
    # Afterwards, expiry continues.
    act(store, MAX_AGE + 1)
    expire_all(store)
    assert store.totals().messages == 0


@pytest.mark.parametrize("at_once", [False, True])
def test_expiry_continues_after_abandoned_snapshot(store: ClockedStore, file: Path, at_once: bool) -> None:
    put(store, b"t", *[b"x" * 10_000] * 100)
    store.write()
    with snapshotting(store, file) as snapshotter:
        store.between_batches = store.during_copy = snapshotter.stop
        assert not snapshotter.save(at_once=at_once)
        assert not file.exists()
        assert not snapshot_file.temporary(file).exists()
    assert bodies(store, b"t") == [b"x" * 10_000] * 100
    act(store, MAX_AGE + 1)
    assert store.expire() > 0


@pytest.mark.parametrize("at_once", [False, True])
def test_producer_forgotten_during_snapshot_is_refused_after_restart(
    store: ClockedStore, file: Path, at_once: bool
) -> None:
    put_as(store, b"forgotten", 1)
    store.write()
    others = itertools.count()

    def put_as_others() -> None:
        if next(others) == 0:
            for number in range(producers.MAX_PRODUCERS):
                put_as(store, b"%d" % number, 1)

    with snapshotting(store, file) as snapshotter:
        store.between_batches = put_as_others
        assert snapshotter.save(at_once=at_once)
    with restored(file) as other, pytest.raises(Forgotten, match="too many others"):
        other.check_producer(b"forgotten")


def test_puts_during_snapshot_do_not_change_it(store: ClockedStore, file: Path) -> None:
    put(store, b"t", b"1", b"2")
    act(store, MAX_AGE + 1)
    expire_all(store)
    store.between_batches = lambda: put(store, b"t", b"x")
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(is_last=True)
    with restored(file) as other:
        assert other.stats(b"t")[1:5] == (0, 0, 2, 2)
        assert other.last_id() == 2


def test_messages_only_in_write_buffer_are_saved(store: ClockedStore, file: Path) -> None:
    for name in NAMES:
        put(store, name, b"x")
    save(store, file)
    with restored(file) as other:
        assert state(other) == state(store)


def test_snapshot_under_concurrent_puts_contains_exactly_a_prefix(store: ClockedStore, file: Path) -> None:
    put(store, b"t0", *[b"x" * 500] * 20_000)
    store.write()
    ended = threading.Event()
    returned = [0] * 4

    def write(number: int) -> None:
        # With pauses, because a lock that is never free is not given to the thread that has waited longest.
        while not ended.wait(UNIT / 1000):
            returned[number] = store.append([(b"t%d" % number, b"%d" % number, None)] * 20)[-1]
            store.flush()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    with snapshotting(store, file) as snapshotter:
        for writer in writers:
            writer.start()
        try:
            for _ in range(3):
                before = max(returned)
                assert snapshotter.save()
                after = store.last_id()
                with snapshot_file.opened(file) as connection:
                    check_prefix(connection, before, after)
        finally:
            ended.set()
            for writer in writers:
                writer.join()


def check_prefix(connection: sqlite3.Connection, before: int, after: int) -> None:
    """Every id up to one between the two is there once, and each topic's numbers are in order."""
    found: list[int] = []
    numbers: dict[int, int] = {}
    for row, *chunk in connection.execute(
        "SELECT topic, put_at, last_number, ids_and_sizes, bodies FROM chunks ORDER BY last_id"
    ):
        for message_id, number, *_ in unpack(tuple(chunk)):  # type: ignore[arg-type]
            found.append(message_id)
            assert number == numbers.get(row, 0) + 1
            numbers[row] = number
    (last_id,) = connection.execute("SELECT last_id FROM state").fetchone()
    assert sorted(found) == list(range(1, last_id + 1))
    assert before <= last_id <= after


def test_restart_with_snapshot_is_transparent_to_clients(file: Path) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "one", "KEY", "me", 1)
        wire.call("PUT", "u", "two")
        greeting = hello(wire)
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        again = hello(wire)
        assert [again[name] for name in (b"epoch", b"run", b"last_id")] == [greeting[b"epoch"], greeting[b"run"], 2]
        assert wire.call("READ", "t", 0)[:4:3] == [1, b"one"]
        assert wire.call("PUT", "t", "one", "KEY", "me", 1) == 1
        assert wire.call("PUT", "t", "three", "KEY", "me", 2) == 3
        assert [wire.call("READ", "t", 1)[at] for at in (0, 1, 3)] == [3, 2, b"three"]


def test_restored_messages_are_not_counted_as_put_or_unread(store: ClockedStore, file: Path) -> None:
    put(store, b"t", b"1", b"2")
    save(store, file)
    with restored(file) as other:
        put(other, b"t", b"3")
        other.read(b"t", 2, 1, 100)
        assert other.totals()[:5] == (3, 3, 1, 1, 0)
        act(other, MAX_AGE + 1)
        expire_all(other)
        assert other.totals()[:6] == (0, 0, 0, 1, 3, 0)


@pytest.mark.parametrize("at_once", [False, True])
def test_retried_put_over_restart_is_stored_once_or_refused(store: ClockedStore, file: Path, at_once: bool) -> None:
    count = 3 * producers.MAX_PUTS_OF_PRODUCER
    put_as(store, b"me", *range(count // 2))
    for seq in range(count // 2, count):
        assert put_as(store, b"me", seq) == [seq + 1]
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=at_once, is_last=True)
    with restored(file) as other:
        with pytest.raises(Forgotten):
            put_as(other, b"me", 0)
        for seq in range(count - producers.MAX_PUTS_OF_PRODUCER, count):
            assert put_as(other, b"me", seq) == [seq + 1]
        assert put_as(other, b"me", count) == [count + 1]
        assert other.totals().messages == count + 1


def test_forgotten_producer_is_refused_after_restart(store: ClockedStore, file: Path) -> None:
    put_as(store, b"forgotten", 1)
    for number in range(producers.MAX_PRODUCERS):
        put_as(store, b"%d" % number, 1)
    save(store, file)
    within = restored(file, SAVED_AT + (producers.REMEMBER_MS - 1) / 1000)
    with within as other, pytest.raises(Forgotten, match="too many others"):
        other.check_producer(b"forgotten")
    with restored(file, SAVED_AT + producers.REMEMBER_MS / 1000) as other:
        other.check_producer(b"forgotten")


def test_producer_is_remembered_equally_long_over_restart(store: ClockedStore, file: Path) -> None:
    store.append([(b"t", b"x", (b"me", 1))])
    act(store, producers.REMEMBER_MS - 10)
    save(store, file)
    for passed, found in ((0.009, True), (0.012, False)):
        with restored(file, SAVED_AT + passed) as other:
            # A put of another producer removes those that are too old.
            put_id = other.append([(b"u", b"x", (b"another", 1))])[0]
            assert (other.append([(b"t", b"x", (b"me", 1))]) == [1]) == found
            assert put_id > 1


@pytest.fixture
def nine_remembered_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stores remember nine puts of all producers together."""
    monkeypatch.setattr(producers, "MAX_REMEMBERED_PUTS", 9)


@pytest.mark.usefixtures("nine_remembered_puts")
def test_remembered_puts_are_bounded_in_total(store: ClockedStore) -> None:
    for producer in (b"a", b"b", b"c"):
        put_as(store, producer, *range(4))
    # Producer a, the least recent, is forgotten.
    assert [*put_as(store, b"b", 3), *put_as(store, b"c", 3)] == [8, 12]
    assert put_as(store, b"a", 3) == [13]


@pytest.mark.usefixtures("nine_remembered_puts")
def test_restored_puts_count_towards_dedup_bound(store: ClockedStore, file: Path) -> None:
    for number in range(3):
        store.append([(b"t", b"x", (b"producer %d" % number, seq)) for seq in range(3)])
    save(store, file)
    with restored(file) as other:
        put_as(other, b"one more", 1)
        with pytest.raises(Forgotten):
            other.check_producer(b"producer 0")


def test_snapshot_is_readable_by_owner_only_and_leaves_no_other_file(store: ClockedStore, file: Path) -> None:
    snapshot_file.temporary(file).write_text("left by one that was killed")
    put(store, b"t", b"a secret")
    save(store, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {path.name for path in file.parent.iterdir()} == {file.name, f"{file.name}.lock"}


def test_final_snapshot_works_without_vacuum_into(
    store: ClockedStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 26, 0))
    store.connection.set_authorizer(lambda action, *_: int(action == sqlite3.SQLITE_ATTACH))
    put(store, b"t", b"x")
    save(store, file)
    with restored(file) as other:
        assert bodies(other, b"t") == [b"x"]


@pytest.mark.parametrize("at_once", [False, True])
def test_snapshot_contains_no_expired_body(store: ClockedStore, file: Path, at_once: bool) -> None:
    secret = b"secret" * 100
    put(store, b"t", *[secret] * 50)
    store.write()
    act(store, MAX_AGE // 2)
    put(store, b"t", b"other" * 100)
    store.write()
    act(store, MAX_AGE // 2 + 1)
    # Deletes some of them.
    store.expire()
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=at_once)
    assert b"other" in file.read_bytes()
    assert b"secret" not in file.read_bytes()


def test_snapshot_of_graceful_stop_contains_no_expired_body(file: Path) -> None:
    options = ("--snapshot-file", str(file), "--max-age-seconds", "1", "--expiry-interval-seconds", "0.1")
    with daemon(*options) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        for _ in range(100):
            wire.call("PUT", "t", "secret" * 100)
        # Some may not be deleted yet.
        wait_until(lambda: wire.call("READ", "t", 0) == [])
        wire.call("PUT", "t", "other" * 100)
        assert server.stop() == 0
    assert b"other" in file.read_bytes()
    assert b"secret" not in file.read_bytes()


def test_snapshot_symlink_is_preserved(store: ClockedStore, file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    save(store, link)
    assert link.is_symlink()
    assert file.exists()


# Clocks


@pytest.mark.parametrize(
    ("passed", "age_ms"), [(0, 1_000), (5, 6_000), (-3_600, 1_000), (99, 100_000), (99.001, None), (10**9, None)]
)
def test_ages_continue_by_wall_clock_over_restart(
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


def test_slow_disk_does_not_rejuvenate_messages(store: ClockedStore, file: Path) -> None:
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


def test_slow_restore_does_not_rejuvenate_messages(store: ClockedStore, file: Path) -> None:
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


# Interrupts

# A server whose final snapshot waits in one of its steps, as for a disk, until a file exists. The rehearsal
# at the start does not wait.
SLOW = """
import os, sys, time
from dsmq import __main__
from dsmq.store import snapshot_file
step, released = sys.argv[1:3]
real = getattr(snapshot_file, step)
def slow(*arguments):
    setattr(snapshot_file, step, slower)
    return real(*arguments)
def slower(*arguments):
    print("writing", file=sys.stderr, flush=True)
    while not os.path.exists(released):
        arguments[-1]() if step == "_seal" else None
        time.sleep(0.01)
    return real(*arguments)
setattr(snapshot_file, step, slow)
sys.argv = sys.argv[5:]
sys.exit(__main__.main())
"""


def slow(step: str, released: Path) -> list[str]:
    return [sys.executable, "-c", SLOW, step, str(released)]


def ended(server: Daemon) -> str:
    """The log of an interrupted server."""
    assert server.process.wait(SOON) == INTERRUPTED
    assert "Traceback" not in server.log()
    return server.log()


@pytest.mark.usefixtures("interruptible")
def test_second_ctrl_c_stops_without_waiting_for_clients(file: Path) -> None:
    with (
        daemon("--snapshot-file", str(file), "--stop-timeout-seconds", "600") as server,
        wire_to(server) as wire,  # type: ignore[arg-type]
        wire_to(server) as slow,  # type: ignore[arg-type]
    ):
        wire.call("PUT", "t", b"x" * 4_000_000)
        # More than the kernel buffers for a client that does not read.
        slow.send(encode_request(b"READ", b"t", b"0") * 10)
        wait_until(lambda: bool(slow.socket.recv(1, socket.MSG_PEEK)))
        server.process.send_signal(signal.SIGINT)
        assert wire.ended()
        server.process.send_signal(signal.SIGINT)
        assert "messages put since the previous one are lost" in ended(server)
        assert not file.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", ["_seal", "create_tables"])
def test_second_ctrl_c_abandons_final_snapshot_with_a_message(file: Path, tmp_path: Path, step: str) -> None:
    options = ("--snapshot-file", str(file))
    with daemon(*options) as first, wire_to(first) as wire:  # type: ignore[arg-type]
        wire.call("PUT", "t", "kept")
        assert first.stop() == 0
    with (
        daemon(*options, prefix=slow(step, tmp_path / "never")) as second,
        wire_to(second) as wire,  # type: ignore[arg-type]
    ):
        run = hello(wire)[b"run"]
        wire.call("PUT", "t", "lost")
        before = file.read_bytes()
        second.process.send_signal(signal.SIGINT)
        second.wait_for_line("^writing")
        second.process.send_signal(signal.SIGINT)
        [error] = [line for line in ended(second).splitlines() if "ERROR" in line]
        assert "messages put since the previous one are lost" in error
        assert file.read_bytes() == before
        # A snapshot that hangs in a system call leaves its file, which the next start removes.
        assert snapshot_file.temporary(file).exists() == (step != "_seal")
    with daemon(*options) as third, wire_to(third) as wire:  # type: ignore[arg-type]
        assert not snapshot_file.temporary(file).exists()
        assert hello(wire)[b"run"] != run
        assert wire.call("READ", "t", 0)[3] == b"kept"
        assert wire.call("READ", "t", 1) == []


def test_ctrl_c_between_request_and_stop_abandons_and_reports_what_is_lost(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with suppress(KeyboardInterrupt), serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        server.request_stop("the first Ctrl-C")
        raise KeyboardInterrupt
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "last snapshot abandoned: messages put since the previous one are lost"
    ]
    assert not file.exists()
    # Another server may have the file at once.
    with serving(snapshot_file=str(file)):
        pass


def test_first_ctrl_c_of_embedding_program_writes_final_snapshot(file: Path) -> None:
    with suppress(KeyboardInterrupt), serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        raise KeyboardInterrupt
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        assert wire.call("READ", "t", 0)[3] == b"x"


SERVER_THREADS = ("dsmq-io-0", "dsmq-expiry", "dsmq-snapshot", "dsmq-metrics")


def interrupted_at(point: int, call: Callable[[], object]) -> bool:
    """Interrupt the call at a point where Python checks for signals; return False if there are fewer points."""
    files = {server_module.__file__, snapshots.__file__, threads.__file__}
    left = point

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename in files:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.slow
def test_interrupted_stop_ends_all_threads_from_any_line(tmp_path: Path) -> None:
    effective = config.load(kind=config.EmbeddedSettings, port=0, http_port=0, snapshot_file=str(tmp_path / "s"))
    for point in itertools.count():
        store = SQLiteStore(0)
        server = Server(effective, store)
        server.start()
        put(store, b"t", b"%d" % point)
        was_interrupted = interrupted_at(point, server.stop)
        # As the `with` statement around it does.
        server.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name in SERVER_THREADS])
        with pytest.raises(ReplyError):
            put(store, b"t", b"more")
        # The snapshot is complete or missing, and another server can use the file at once.
        saved = (tmp_path / "s").exists()
        assert saved or was_interrupted
        with restored(tmp_path / "s", time.time()) as other:
            assert bodies(other, b"t") == [b"%d" % point] * saved
        (tmp_path / "s").unlink(missing_ok=True)
        if not was_interrupted:
            break
    assert point > 20


def test_concurrent_stop_waits_for_first(file: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire, ThreadPoolExecutor(2) as pool:
        wire.call("PUT", "t", "x")
        disk.hangs = True
        first = pool.submit(server.stop)
        assert disk.waiting.wait(SOON)
        second = pool.submit(server.stop)
        with pytest.raises(TimeoutError):
            second.result(UNIT)
        disk.released.set()
        assert (first.result(SOON), second.result(SOON)) == ([], [])
    assert [record.message for record in caplog.records].count("stopped") == 1


# Kills


def grow(file: Path, report: int) -> None:
    """Put numbered messages, and write a snapshot after each few, for ever; report how many are saved."""
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
    """Have a process write snapshots, and kill it `after` seconds after the first; return its last report."""
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


# Damaged files


def flip(at: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        place = at % len(data)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return damage


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "empty"),
    "text": (lambda data: b"messages = 3\n" * 100, "not a snapshot"),
    "short text": (lambda data: b"hello", "not a snapshot"),
    "a database": (lambda data: data[:-80], "not a snapshot"),
    "the trailer alone": (lambda data: data[-80:], "damaged"),
    "one byte less": (lambda data: data[:-1], "truncated"),
    "half": (lambda data: data[: len(data) // 2], "truncated"),
    "a byte more in the middle": (lambda data: data[:5000] + b"x" + data[5000:], "damaged"),
    "of a later version": (lambda data: data[:-2] + b"02", "version 2"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_incomplete_snapshot_is_refused_and_kept(
    store: ClockedStore, file: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGES[kind]
    put(store, b"t", *[b"x" * 1000] * 10)
    save(store, file)
    file.write_bytes(damage(file.read_bytes()))
    check_refused(file, store.epoch, caplog, reason)


@pytest.mark.parametrize("at", [0, 20, 97, 4096, 9000, *range(-80, 0)])
def test_changed_byte_is_detected(store: ClockedStore, file: Path, at: int, caplog: pytest.LogCaptureFixture) -> None:
    put(store, b"t", *[b"x" * 1000] * 10)
    save(store, file)
    file.write_bytes(flip(at)(file.read_bytes()))
    check_refused(file, store.epoch, caplog, "")


def check_refused(file: Path, epoch: str, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    damaged = file.read_bytes()
    caplog.clear()
    with restored(file) as other:
        assert other.epoch != epoch
        assert (other.last_id(), other.totals().messages) == (0, 0)
        assert put(other, b"t", b"x") == [1]
    [aside] = file.parent.glob(f"{file.name}.damaged-*")
    assert aside.read_bytes() == damaged
    assert not file.exists()
    [line] = [record for record in caplog.records if record.name == "dsmq.store.snapshots"]
    assert line.levelno == logging.ERROR
    assert str(aside) in line.getMessage()
    assert reason in line.getMessage()


def test_schema_change_requires_new_version() -> None:
    """A change of the file's format requires another VERSION, and then another digest here."""
    import hashlib

    text = SCHEMA + INDEX + SNAPSHOT_SCHEMA
    assert (snapshot_file.VERSION, hashlib.sha256(text.encode()).hexdigest()[:8]) == (1, "d49eb1b4")


# Failures to write


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limit the size of files, to simulate a full disk; only the error code differs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Fails in the middle of the database, and within the trailer.
@pytest.mark.parametrize("missing", [100_000, 10])
def test_full_disk_keeps_previous_snapshot(file: Path, missing: int, caplog: pytest.LogCaptureFixture) -> None:
    store = SQLiteStore(MAX_AGE)
    with closing(store), snapshotting(store, file) as snapshotter:
        put(store, b"t", b"x" * 200_000)
        assert snapshotter.save()
        before = file.read_bytes()
        for at_once in (False, True):
            caplog.clear()
            with files_of_at_most(len(before) - missing):
                assert not snapshotter.save(at_once=at_once)
            [line] = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert f"can't write a snapshot to {file}" in line.getMessage()
            assert file.read_bytes() == before
            assert not snapshot_file.temporary(file).exists()
        assert put(store, b"t", b"y") == [2]
        assert (snapshotter.stats.written, snapshotter.stats.failed) == (1, 2)
        assert snapshotter.save()


def test_full_disk_is_reported_as_reason(store: ClockedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "dsmq-test", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    file = tmp_path / "it"
    try:
        with snapshotting(store, file) as snapshotter:
            put(store, b"t", b"x" * 300_000)
            assert snapshotter.save(at_once=True)
            before = file.read_bytes()
            put(store, b"t", b"x" * 900_000)
            for at_once in (True, False):
                caplog.clear()
                assert not snapshotter.save(at_once=at_once)
                assert "disk is full" in caplog.text
                assert file.read_bytes() == before
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_final_snapshot_is_written_if_no_thread_can_start(file: Path) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        with no_new_threads():
            assert server.stop() == []
    with restored(file, time.time()) as other:
        assert bodies(other, b"t") == [b"x"]


def test_failed_final_snapshot_sets_exit_status(file: Path) -> None:
    with daemon("--snapshot-file", str(file)) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.call("PUT", "t", "x")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        assert server.stop() == 1
        assert "can't write a snapshot" in server.log()
        assert "Traceback" not in server.log()
    assert not file.exists()


def test_unusable_snapshot_path_is_reported_at_start(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    for name, told in (("missing/it", "missing: No such"), ("a file/it", "Not a dir"), ("a folder", "Is a dir")):
        with pytest.raises(StartupError, match=f"snapshot_file: .*{told}"), serving(snapshot_file=str(tmp_path / name)):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["folder", "file"])
def test_missing_permission_is_reported_at_start(tmp_path: Path, mode: str) -> None:
    folder, file = tmp_path / "state", tmp_path / "state" / "it"
    folder.mkdir()
    prefix = without_privileges()
    with daemon("--snapshot-file", str(file), prefix=prefix) as server:
        assert server.stop() == 0
    kept = file.read_bytes()
    (folder if mode == "folder" else file).chmod(0o500 if mode == "folder" else 0)
    done = run_dsmq("serve", "--port", "0", "--http-port", "off", "--snapshot-file", str(file), prefix=prefix)
    assert done.returncode == 1
    assert b"snapshot_file" in done.stderr
    assert b"Permission denied" in done.stderr
    assert b"Traceback" not in done.stderr
    folder.chmod(0o700)
    file.chmod(0o600)
    assert file.read_bytes() == kept


def test_start_checks_that_snapshot_can_be_written(file: Path, disk: Disk) -> None:
    disk.error = OSError(errno.EINVAL, "Invalid argument")
    with pytest.raises(StartupError, match=r"snapshot_file: .*Invalid argument"), serving(snapshot_file=str(file)):
        pass
    assert {path.name for path in file.parent.iterdir()} == {f"{file.name}.lock"}


def test_sqlite_failure_at_start_is_one_line(file: Path) -> None:
    with (
        files_of_at_most(1000),
        pytest.raises(StartupError, match=r"^snapshot_file: .*disk I/O error$"),
        serving(snapshot_file=str(file)),
    ):
        pass


# Writes snapshots whose index is too large for the page cache.
READ_ONLY = """
import sys
from pathlib import Path
from dsmq.store import snapshot_file
from dsmq.store.snapshots import Snapshotter
from dsmq.store.sqlite import SQLiteStore

for folder in map(Path, ("/tmp", "/var/tmp", ".")):
    try:
        (folder / "x").touch()
        sys.exit(f"{folder} can be written to")
    except OSError:
        pass
snapshot_file._PRAGMAS = (*snapshot_file._PRAGMAS, "cache_size = -100")
store = SQLiteStore(600_000)
store.append([(b"t", b"x", None)])
rows = ((number, 1, 1, 1, bytes(16), b"x") for number in range(2, 200_000))
store._database.connection.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)", rows)
store._last_id = 200_000
store._buffer.clear(200_000, 1)
snapshotter = Snapshotter(store, sys.argv[1] + "/snapshot")
snapshotter.open()
sys.exit(not snapshotter.save() or not snapshotter.save_last())
"""


@pytest.mark.slow
def test_nothing_is_written_outside_snapshot_folder(tmp_path: Path) -> None:
    script = (
        "set -e; mount --make-rprivate /; mount --bind $0 /mnt; cd /proc; "
        "for folder in /tmp /var/tmp; do mount --bind $folder $folder; mount -o remount,bind,ro $folder; done; "
    )
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*unshare, script, str(tmp_path)], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    command = [*unshare, script + 'exec "$@"', str(tmp_path), sys.executable, "-c", READ_ONLY, "/mnt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3 * SOON)
    assert (done.returncode, done.stderr) == (0, "")


def test_two_servers_cannot_share_snapshot_file(file: Path) -> None:
    with (
        serving(snapshot_file=str(file)),
        pytest.raises(StartupError, match="another server has"),
        serving(snapshot_file=str(file)),
    ):
        pass
    with serving(snapshot_file=str(file)):
        pass


def test_child_process_does_not_keep_snapshot_file_locked(store: ClockedStore, file: Path) -> None:
    with snapshotting(store, file):
        # A child inherits copies of all descriptors, as a forked process does.
        child = subprocess.Popen(["sleep", str(SOON)], pass_fds=descriptors_of(f"{file}.lock"))
    try:
        with serving(snapshot_file=str(file)):
            pass
    finally:
        child.kill()
        child.wait()


def descriptors_of(path: str) -> list[int]:
    found = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
    return [number for number in found if os.readlink(f"/proc/self/fd/{number}") == path]


def test_failed_start_leaves_snapshot_unchanged(file: Path) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
    before = file.read_bytes()
    with (
        serving() as other,
        pytest.raises(StartupError),
        serving(port=other.port, snapshot_file=str(file)),
    ):
        pass
    assert file.read_bytes() == before


def test_failed_start_after_restore_loses_nothing(file: Path) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        run = hello(wire)[b"run"]
    with no_new_threads(), pytest.raises(StartupError, match="new thread"), serving(snapshot_file=str(file)):
        pass
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        assert (hello(wire)[b"run"], wire.call("READ", "t", 0)[3]) == (run, b"x")


def test_complete_but_unloadable_snapshot_is_refused(
    store: ClockedStore, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, b"t", b"x")
    save(store, file)

    def fill(database: sqlite3.Connection) -> None:
        database.execute("CREATE TABLE another (thing)")

    snapshot_file.write(file, fill, lambda: None)
    check_refused(file, store.epoch, caplog, "no such table")


# Periodic snapshots, slow disks


def test_periodic_snapshot_is_written_during_puts(file: Path) -> None:
    settings = {"snapshot_file": str(file), "snapshot_interval_seconds": 1, "http_port": 0}
    with serving(**settings) as server, wire_to(server) as wire:
        assert scrape(server)["dsmq_snapshot_time_seconds"] == 0
        wire.call("PUT", "t", "x")
        wait_until(file.exists)
        wait_until(lambda: scrape(server)["dsmq_snapshots_total{written}"] >= 1)
        shown = scrape(server)
        assert shown["dsmq_snapshot_size_bytes"] == file.stat().st_size
        assert abs(shown["dsmq_snapshot_time_seconds"] - time.time()) < SOON
        assert shown["dsmq_snapshot_seconds_total"] > 0
        assert shown["dsmq_snapshots_total{failed}"] == 0
        assert shown["dsmq_snapshot_interval_seconds"] == 1
        assert shown["dsmq_healthy"] == 1
        stolen = file.read_bytes()
        run = hello(wire)[b"run"]
    file.write_bytes(stolen)
    with serving(**settings) as server, wire_to(server) as wire:
        assert hello(wire)[b"run"] != run
        assert wire.call("READ", "t", 0)[3] == b"x"
        assert scrape(server)["dsmq_restored_messages"] == 1


def test_stop_does_not_wait_for_periodic_snapshot(store: ClockedStore, file: Path) -> None:
    snapshotter = Snapshotter(store, str(file), interval_seconds=0.01, clock=lambda: SAVED_AT, pause_seconds=SOON)
    snapshotter.open()
    put(store, b"t", b"1", b"2", b"3")
    snapshotter.start()
    wait_until(snapshot_file.temporary(file).exists)
    began = time.monotonic()
    snapshotter.stop()
    snapshotter.finish(began + SOON, is_last=True)
    assert snapshotter.abandon() == []
    assert time.monotonic() - began < SOON / 2
    with restored(file) as other:
        assert other.totals().messages == 3


@pytest.mark.slow
def test_stop_waits_for_slow_disk(file: Path, disk: Disk) -> None:
    settings = {"snapshot_file": str(file), "snapshot_interval_seconds": 1, "stop_timeout_seconds": 20 * UNIT}
    with serving(**settings) as server, wire_to(server) as wire:
        run = hello(wire)[b"run"]
        disk.hangs = True
        assert disk.waiting.wait(SOON)
        wire.call("PUT", "t", "x")
        threading.Timer(30 * UNIT, disk.released.set).start()
        assert server.stop() == []
    with restored(file, time.time()) as other:
        assert (other.run.encode(), bodies(other, b"t")) == (run, [b"x"])


def test_stop_waits_at_most_a_minute_for_hanging_disk(
    file: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(snapshots, "LAST_SNAPSHOT_SECONDS", UNIT)
    with serving_store(SQLiteStore(0), snapshot_file=str(file), stop_timeout_seconds=20 * UNIT) as server:
        disk.hangs = True
        assert server.stop() == ["dsmq-snapshot"]
        assert "last snapshot abandoned" in caplog.text
        disk.released.set()
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "dsmq-snapshot"])


def test_slow_disk_does_not_fail_health_check(file: Path, disk: Disk) -> None:
    settings = {"snapshot_file": str(file), "snapshot_interval_seconds": 1, "health_timeout_seconds": UNIT}
    with serving(**settings) as server:
        disk.hangs = True
        assert disk.waiting.wait(SOON)
        time.sleep(3 * UNIT)
        stuck = server.status.stuck_threads()
        disk.hangs = False
        disk.released.set()
        assert "dsmq-snapshot" not in stuck


def test_defect_in_snapshot_does_not_end_server(
    store: ClockedStore, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.between_batches = lambda: 1 / 0
    with snapshotting(store, file) as snapshotter:
        assert not snapshotter.save_last()
        assert snapshotter.stats.failed == 1
        assert "ZeroDivisionError" in caplog.text
        assert not file.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_snapshot_thread_is_detected(store: ClockedStore, file: Path) -> None:
    def end_thread() -> None:
        store.between_batches = bool
        raise SystemExit

    store.between_batches = end_thread
    with serving_store(store, snapshot_file=str(file), snapshot_interval_seconds=1) as server:
        wait_until(lambda: server.status.stuck_threads() == ["dsmq-snapshot"])
        with pytest.raises(ServerFailed, match="dsmq-snapshot"):
            server.run()
    assert file.exists()


def test_snapshot_interval_requires_file() -> None:
    with pytest.raises(ConfigError, match="without snapshot_file"):
        config.load(snapshot_interval_seconds=5)
    with pytest.raises(ConfigError, match="0, or at least 1"):
        config.load(snapshot_file="x", snapshot_interval_seconds=0.5)


def test_puts_before_stop_are_in_final_snapshot(file: Path) -> None:
    """Every put that got an id is there, and no refused one."""
    stored: list[int] = []

    def put_for_ever(wire: Wire, topic: str) -> None:
        while isinstance(reply := wire.call("PUT", topic, "x"), int):
            stored.append(reply)

    def client(server: Server, topic: str) -> None:
        try:
            with wire_to(server) as wire:
                put_for_ever(wire, topic)
        except (EOFError, OSError):
            pass

    with serving(snapshot_file=str(file)) as server:
        clients = [threading.Thread(target=client, args=(server, f"t{number}")) for number in range(4)]
        for one in clients:
            one.start()
        wait_until(lambda: len(stored) > 200)
        server.stop()
        for one in clients:
            one.join()
    with restored(file, time.time()) as other:
        found = [message.id for n in range(4) for message in other.read(b"t%d" % n, 0, 10**6, 10**9)]
        assert sorted(found) == list(range(1, other.last_id() + 1))
        assert set(stored) <= set(found)
        # Puts that were stored as the connection broke have no reply.
        assert len(found) - len(stored) <= len(clients)


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
    # A graceful stop continues that run, also for a client that reconnects only now.
    store = SQLiteStore(0)
    with serving_store(store, snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert lost_ids(wire) == [3, 3 + gap]
        assert [numbers(wire, topic) for topic in ("full", "empty", "none")] == [(3, 2), (1, 1), (0, 0)]
        assert Snapshotter(store, str(path)).save()
        copy = path.read_bytes()
    path.write_bytes(copy)
    snapshot_file.record_restore(path, snapshot_file.verify(path))
    # It counts twice, because it was not a final snapshot. A client that was away learns of both ranges.
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
