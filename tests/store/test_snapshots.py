"""Snapshots: what is restored, what is refused, and that no moment to be killed at leaves half a file."""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import (
    SOON,
    UNIT,
    Daemon,
    Wire,
    as_map,
    daemon,
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
from dsmq.store import database, snapshot_contents
from dsmq.store import dedup as producers
from dsmq.store import snapshot_file as snapshot
from dsmq.store import snapshots as keeper_module
from dsmq.store.api import Put
from dsmq.store.dedup import Producer
from dsmq.store.schema import INDEX, SCHEMA, SNAPSHOT_SCHEMA, unpack
from dsmq.store.snapshots import RESTORE_GAP, Snapshotter
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.resp import encode_request

MAX_AGE = 100_000
KEPT_AT = 1_700_000_000.0


class Clock:
    """Milliseconds that pass when the test says so."""

    def __init__(self, now: int = 1_000_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def new_store(now: int = 1_000_000) -> SQLiteStore:
    return SQLiteStore(MAX_AGE, Clock(now))


@pytest.fixture
def store() -> Iterator[SQLiteStore]:
    store = new_store()
    yield store
    store.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "snapshot"


@contextmanager
def keeping(store: SQLiteStore, file: Path, at: float = KEPT_AT) -> Iterator[Snapshotter]:
    """A keeper of the file that has restored what there was."""
    keeper = Snapshotter(store, str(file), clock=lambda: at, pause_seconds=0)
    try:
        keeper.open()
        yield keeper
    finally:
        keeper.close()


@contextmanager
def restored(file: Path, at: float = KEPT_AT) -> Iterator[SQLiteStore]:
    # Another process has another clock.
    store = new_store(5_000)
    try:
        with keeping(store, file, at):
            yield store
    finally:
        store.close()


def save(store: SQLiteStore, file: Path, *, is_last: bool = True) -> None:
    with keeping(store, file) as keeper:
        assert keeper.save_last(is_last=is_last)


def put(store: SQLiteStore, topic: bytes, *bodies: bytes) -> list[int]:
    return store.append([(topic, body, None) for body in bodies])


def bodies(store: SQLiteStore, topic: bytes) -> list[bytes]:
    return [message.body for message in store.read(topic, 0, 100_000, 10**9)]


NAMES = [b"a", b"b", b"c", "\N{SNOWMAN}".encode()]


def producers_of(store: SQLiteStore) -> dict[bytes, Producer]:
    return store._deduplicator.copy(store._deduplicator.names(), store.last_id())


def seen(store: SQLiteStore) -> object:
    """All that clients can see but what they put."""
    return (
        store.last_id(),
        store.epoch,
        [(store.stats(name), store.read(name, 0, 1000, 10**9), store.latest(name, 0)) for name in NAMES],
        store.topics(b"", 100),
        list(producers_of(store).items()),
        store.totals().accounted_bytes,
        len(store._deduplicator),
        list(store._topics.empty.items()),
    )


# What is done to a store: puts, time that passes, expiry, writing.
a_key = st.none() | st.tuples(st.sampled_from([b"p", b"q"]), st.integers(0, 5))
puts = st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=20), a_key), min_size=1, max_size=6)
actions = st.one_of(puts, st.integers(1, 120_000), st.sampled_from(["expire", "write"]))


def act(store: SQLiteStore, action: list[Put] | int | str) -> None:
    if isinstance(action, list):
        store.append(action)
    elif isinstance(action, int):
        assert isinstance(store._clock, Clock)
        store._clock.now += action
    elif action == "expire":
        store.expire()
    else:
        store._flush()


# What is restored


@settings(max_examples=60, deadline=None)
@given(st.lists(actions, max_size=25), st.booleans(), puts)
def test_restored_store_equals_saved_store(before: list[list[Put] | int | str], slowly: bool, later: list[Put]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, file = new_store(), Path(folder) / "snapshot"
        for action in before:
            act(store, action)
        # What has expired is deleted at the start.
        while store.expire():
            pass
        with keeping(store, file) as keeper:
            assert keeper.save(at_once=not slowly, is_last=True)
        with restored(file) as other:
            assert seen(other) == seen(store)
            assert other.run == store.run
            assert (other.totals().stored, other.totals().expired) == (0, 0)
            assert other.append(later) == store.append(later)
            assert seen(other) == seen(store)
        store.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(actions, max_size=15), st.lists(st.lists(actions, max_size=4), max_size=12))
def test_snapshot_is_consistent_despite_changes_between_slices(
    before: list[list[Put] | int | str], meanwhile: list[list[list[Put] | int | str]]
) -> None:
    """Whatever is put or expires while it is copied in batches."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "COPY_ROWS", 1)
        patch.setattr(snapshot_contents, "COPY_PRODUCERS", 1)
        store, file = new_store(), Path(folder) / "snapshot"
        for action in before:
            act(store, action)
            store._flush()
        # What has expired is deleted first.
        while store.expire():
            pass
        rest = iter(meanwhile)

        def go_on(_: float = 0) -> None:
            for action in next(rest, []):
                act(store, action)

        at_start, remembered, clock = seen(store)[:4], producers_of(store), store._clock  # type: ignore[index]
        start = clock()
        with keeping(store, file) as keeper:
            # The time of day goes on with the store's clock.
            patch.setattr(keeper, "_clock", lambda: KEPT_AT + (clock() - start) / 1000)
            patch.setattr(keeper, "_checkpoint", go_on)
            assert keeper.save()
        patch.setattr(SQLiteStore, "expire", lambda _: 0)
        patch.setattr(SQLiteStore, "begin_run", lambda *_: None)
        with restored(file) as other:
            assert seen(other)[:4] == at_start  # type: ignore[index]
            # But for producers that are forgotten after so long.
            assert {name: one.puts for name, one in producers_of(other).items()} == {
                name: one.puts for name, one in remembered.items() if name in producers_of(store)
            }
            assert dict(other._database.connection.execute("SELECT name, id FROM topics")) == {
                topic.name: topic.row for topic in other._topics.by_name.values()
            }
        store.close()


def test_topic_emptied_and_recreated_between_slices_appears_once(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic whose only message expires meanwhile keeps its numbers."""
    monkeypatch.setattr(database, "COPY_ROWS", 1)
    for name in NAMES[:3]:
        put(store, name, b"old")
    store._flush()
    put(store, NAMES[3], b"buffered")
    expired: list[int] = []

    def go_on(_: float = 0) -> None:
        act(store, MAX_AGE + 1)
        expired.append(store.expire())
        put(store, b"a", b"new")
        store._flush()

    with keeping(store, file) as keeper:
        monkeypatch.setattr(keeper, "_checkpoint", go_on)
        assert keeper.save()
        # What has been copied is deleted meanwhile.
        assert sum(expired) > 0
        assert expired[0] == 0
    with snapshot.opened(file) as connection:
        assert connection.execute("SELECT count(*) FROM topics").fetchone() == (4,)
        assert connection.execute("SELECT count(*), max(last_number) FROM chunks").fetchone() == (4, 1)
    # Expiry goes on behind it.
    act(store, MAX_AGE + 1)
    while store.expire():
        pass
    assert store.totals().messages == 0


def test_a_snapshot_that_is_abandoned_lets_expiry_go_on(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, b"t", b"x")
    store._flush()

    def abandon(_: float = 0) -> None:
        raise snapshot.Abandoned

    with keeping(store, file) as keeper:
        monkeypatch.setattr(keeper, "_checkpoint", abandon)
        assert not keeper.save()
    act(store, MAX_AGE + 1)
    assert store.expire() == 1


@pytest.mark.parametrize("at_once", [False, True])
def test_a_producer_forgotten_during_a_snapshot_is_refused_after_a_restart(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(producers, "MAX_PRODUCERS", 1)
    store.append([(b"t", b"x", (b"forgotten", 1))])
    store._flush()
    with keeping(store, file) as keeper:
        copy = store._deduplicator.copy

        def forget_first(names: list[bytes], last_id: int) -> dict[bytes, Producer]:
            store._deduplicator.remember((b"another", 1), 2, store._clock(), touched := {})
            store._deduplicator.forget(touched, store._clock())
            return copy(names, last_id)

        monkeypatch.setattr(store._deduplicator, "copy", forget_first)

        assert keeper.save(at_once=at_once)
    with restored(file) as other, pytest.raises(Forgotten, match="too many others"):
        other.check_producer(b"forgotten")


def test_puts_after_snapshot_instant_do_not_change_empty_topics(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, b"t", b"1", b"2")
    act(store, MAX_AGE + 1)
    store.expire()
    with keeping(store, file) as keeper:
        monkeypatch.setattr(keeper, "_checkpoint", lambda _=0: put(store, b"t", b"x"))
        assert keeper.save(is_last=True)
    with restored(file) as other:
        assert other.stats(b"t")[1:5] == (0, 0, 2, 2)
        assert other.last_id() == 2


def test_topics_only_in_write_buffer_are_copied(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        put(store, name, b"x")
    with keeping(store, file) as keeper:
        assert keeper.save(is_last=True)
    with restored(file) as other:
        assert seen(other) == seen(store)


def test_snapshot_under_concurrent_puts_holds_exactly_a_prefix(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "COPY_ROWS", 4)
    put(store, b"t0", *[b"x" * 500] * 2000)
    store._flush()
    ended = threading.Event()
    returned = [0] * 4

    def write(number: int) -> None:
        # With pauses: a lock that is never free is not given to whoever has waited longest.
        while not ended.wait(UNIT / 1000):
            returned[number] = store.append([(b"t%d" % number, b"%d" % number, None)] * 20)[-1]
            store.flush()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    with keeping(store, file) as keeper:
        for writer in writers:
            writer.start()
        try:
            for _ in range(3):
                before = max(returned)
                assert keeper.save()
                after = store.last_id()
                with snapshot.opened(file) as connection:
                    check_prefix(connection, before, after)
        finally:
            ended.set()
            for writer in writers:
                writer.join()


def check_prefix(connection: sqlite3.Connection, before: int, after: int) -> None:
    """All ids up to one between the two are there, once, and each topic's numbers in their order."""
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
        hello = as_map(wire.call("HELLO"))
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        again = as_map(wire.call("HELLO"))
        assert [again[name] for name in (b"epoch", b"run", b"last_id")] == [hello[b"epoch"], hello[b"run"], 2]
        assert wire.call("READ", "t", 0)[:4:3] == [1, b"one"]
        assert wire.call("PUT", "t", "one", "KEY", "me", 1) == 1
        assert wire.call("PUT", "t", "three", "KEY", "me", 2) == 3
        assert [wire.call("READ", "t", 1)[at] for at in (0, 1, 3)] == [3, 2, b"three"]


def test_restored_messages_are_not_counted_as_put_or_unread(store: SQLiteStore, file: Path) -> None:
    put(store, b"t", b"1", b"2")
    save(store, file)
    with restored(file) as other:
        put(other, b"t", b"3")
        other.read(b"t", 2, 1, 100)
        assert other.totals()[:5] == (3, 3, 1, 1, 0)
        other._clock = Clock(10**9)
        while other.expire():
            pass
        assert other.totals()[:6] == (0, 0, 0, 1, 3, 0)


@pytest.mark.parametrize("slowly", [True, False], ids=["at an interval", "the last"])
def test_retried_put_over_restart_is_stored_once_or_refused(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch, slowly: bool
) -> None:
    monkeypatch.setattr(producers, "MAX_PUTS_OF_PRODUCER", 2)
    for seq in range(7):
        assert store.append([(b"t", b"x", (b"me", seq))]) == [seq + 1]
    with keeping(store, file) as keeper:
        assert keeper.save(at_once=not slowly, is_last=True)
    with restored(file) as other:
        # Too many, so the first half is forgotten; the others are remembered, whichever half they are in.
        for seq in (0, 1, 2):
            with pytest.raises(Forgotten):
                other.append([(b"t", b"again", (b"me", seq))])
        assert [other.append([(b"t", b"again", (b"me", seq))]) for seq in (3, 4, 5, 6)] == [[4], [5], [6], [7]]
        assert other.append([(b"t", b"new", (b"me", 7))]) == [8]
        assert bodies(other, b"t") == [b"x"] * 7 + [b"new"]


def test_forgotten_producer_is_refused_after_restart(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producers, "MAX_PRODUCERS", 1)
    store.append([(b"t", b"x", (b"forgotten", 1))])
    store.append([(b"t", b"x", (b"another", 1))])
    save(store, file)
    within = restored(file, KEPT_AT + (producers.REMEMBER_MS - 1) / 1000)
    with within as other, pytest.raises(Forgotten, match="too many others"):
        other.check_producer(b"forgotten")
    with restored(file, KEPT_AT + producers.REMEMBER_MS / 1000) as other:
        other.check_producer(b"forgotten")


def test_producer_is_remembered_equally_long_over_restart(store: SQLiteStore, file: Path) -> None:
    store.append([(b"t", b"x", (b"me", 1))])
    act(store, producers.REMEMBER_MS - 10)
    save(store, file)
    for passed, found in ((0.009, True), (0.012, False)):
        with restored(file, KEPT_AT + passed) as other:
            # The put of another forgets what is too old.
            put_id = other.append([(b"u", b"x", (b"another", 1))])[0]
            assert (other.append([(b"t", b"x", (b"me", 1))]) == [1]) == found
            assert put_id > 1


def test_restored_puts_count_towards_dedup_bound(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        store.append([(b"t", b"x", (b"producer %d" % number, seq)) for seq in range(3)])
    save(store, file)
    monkeypatch.setattr(producers, "MAX_REMEMBERED_PUTS", 9)
    with restored(file) as other:
        assert len(other._deduplicator) == 9
        other.append([(b"t", b"x", (b"one more", 1))])
        with pytest.raises(Forgotten):
            other.check_producer(b"producer 0")


def test_snapshot_is_readable_by_owner_only_and_leaves_no_other_file(store: SQLiteStore, file: Path) -> None:
    snapshot.temporary(file).write_text("left by one that was killed")
    put(store, b"t", b"a secret")
    save(store, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {path.name for path in file.parent.iterdir()} == {file.name, f"{file.name}.lock"}


@pytest.mark.parametrize("at_once", [False, True])
def test_snapshot_contains_no_expired_body(store: SQLiteStore, file: Path, at_once: bool) -> None:
    secret = b"secret" * 100
    put(store, b"t", *[secret] * 50)
    store._flush()
    act(store, MAX_AGE // 2)
    put(store, b"t", b"other" * 100)
    store._flush()
    act(store, MAX_AGE // 2 + 1)
    # Deleted, or not yet.
    store.expire()
    with keeping(store, file) as keeper:
        assert keeper.save(at_once=at_once)
    assert b"other" in file.read_bytes()
    assert b"secret" not in file.read_bytes()


def test_snapshot_of_graceful_stop_contains_no_expired_body(file: Path) -> None:
    options = ("--snapshot-file", str(file), "--max-age-seconds", "1", "--expiry-interval-seconds", "0.1")
    with daemon(*options) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        for _ in range(100):
            wire.call("PUT", "t", "secret" * 100)
        # Whether they are deleted already, or not yet.
        wait_until(lambda: wire.call("READ", "t", 0) == [])
        wire.call("PUT", "t", "other" * 100)
        assert server.stop() == 0
    assert b"other" in file.read_bytes()
    assert b"secret" not in file.read_bytes()


def test_snapshot_symlink_is_preserved(store: SQLiteStore, file: Path, tmp_path: Path) -> None:
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
    store: SQLiteStore, file: Path, passed: float, age_ms: int | None
) -> None:
    put(store, b"t", b"x", b"y")
    assert isinstance(store._clock, Clock)
    store._clock.now += 1_000
    save(store, file)
    with restored(file, KEPT_AT + passed) as other:
        found = other.read(b"t", 0, 10, 100)
        assert [message.age_ms for message in found] == ([] if age_ms is None else [age_ms] * 2)
        assert other.totals().messages == len(found)
        assert put(other, b"t", b"z") == [3]
        assert other.last_number(b"t") == 3
        assert other.read(b"t", 2, 1, 100)[0].age_ms == 0


def test_slow_index_and_commit_do_not_rejuvenate_messages(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [KEPT_AT]
    put(store, b"t", b"x")

    def take_time() -> None:
        act(store, 1_600)
        now[0] += 1.6

    keeper = Snapshotter(store, str(file), clock=lambda: now[0])
    monkeypatch.setattr(keeper, "_allow_slow_disk", take_time)
    assert keeper.save()
    with restored(file, now[0]) as other:
        assert other.read(b"t", 0, 1, 100)[0].age_ms == round((now[0] - KEPT_AT) * 1000) >= 1_600


def test_slow_restore_does_not_rejuvenate_messages(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, b"t", b"x")
    save(store, file)
    other = new_store(5_000)
    load = other._database.load

    def load_slowly(source: sqlite3.Connection) -> object:
        act(other, 2_000)
        return load(source)

    monkeypatch.setattr(other._database, "load", load_slowly)
    with keeping(other, file):
        assert other.read(b"t", 0, 1, 100)[0].age_ms == 2_000
    other.close()


def test_messages_expired_before_restore_are_logged(
    store: SQLiteStore, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    put(store, b"t", b"1", b"2", b"3")
    save(store, file)
    with restored(file, KEPT_AT + 101):
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


# The last word, and what is not


def test_clean_shutdown_is_valid_once_and_ids_are_never_reused(store: SQLiteStore, file: Path) -> None:
    put(store, b"t", b"1")
    save(store, file)
    runs, ids = {store.run}, [1]
    # All but the first are killed, which writes nothing.
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


def test_ids_skip_ahead_after_unclean_shutdown(store: SQLiteStore, file: Path) -> None:
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
        hello = as_map(wire.call("HELLO"))
        assert first.stop() == 0
    with daemon(*options) as second, wire_to(second) as wire:  # type: ignore[arg-type]
        assert any("INFO" in line and "restored 1 messages of 1 topics" in line for line in second.log().splitlines())
        assert as_map(wire.call("HELLO"))[b"run"] == hello[b"run"]
        assert wire.call("PUT", "t", "lost") == 2
        second.process.kill()
        second.process.wait()
    with daemon(*options) as third, wire_to(third) as wire:  # type: ignore[arg-type]
        again = as_map(wire.call("HELLO"))
        assert (again[b"epoch"], again[b"last_id"]) == (hello[b"epoch"], 1 + RESTORE_GAP)
        assert again[b"run"] != hello[b"run"]
        assert wire.call("READ", "t", 0)[3] == b"kept"
        assert any("WARNING" in line and "are lost" in line for line in third.log().splitlines())


def test_surviving_thread_prevents_clean_shutdown_mark(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    with serving(snapshot_file=str(file), stop_timeout_seconds=UNIT) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        run, epoch = server._store.run, server._store.epoch
        server._workers[0].post(lambda: bool(released.wait(SOON)))
        assert server.stop() == [server._workers[0].thread.name]
    released.set()
    server._workers[0].thread.join()
    # Left open for it.
    server._store.close()
    with restored(file, time.time()) as other:
        assert (other.epoch, other.run == run) == (epoch, False)
        assert bodies(other, b"t") == [b"x"]


# Interrupted

# A server whose last snapshot waits in one of its steps, as for a disk, until there is a file. The rehearsal at the
# start does not wait.
SLOW = """
import os, sys, time
from dsmq import __main__
from dsmq.store import snapshot_file as snapshot
step, released = sys.argv[1:3]
real = getattr(snapshot, step)
def slow(*arguments):
    setattr(snapshot, step, slower)
    return real(*arguments)
def slower(*arguments):
    print("writing", file=sys.stderr, flush=True)
    while not os.path.exists(released):
        arguments[-1]() if step == "_seal" else None
        time.sleep(0.01)
    return real(*arguments)
setattr(snapshot, step, slow)
sys.argv = sys.argv[5:]
sys.exit(__main__.main())
"""


def slow(step: str, released: Path) -> list[str]:
    return [sys.executable, "-c", SLOW, step, str(released)]


def ended(server: Daemon) -> str:
    """The log of a server that an interrupt has ended."""
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
        run = as_map(wire.call("HELLO"))[b"run"]
        wire.call("PUT", "t", "lost")
        before = file.read_bytes()
        second.process.send_signal(signal.SIGINT)
        second.wait_for_line("^writing")
        second.process.send_signal(signal.SIGINT)
        [error] = [line for line in ended(second).splitlines() if "ERROR" in line]
        assert "messages put since the previous one are lost" in error
        assert file.read_bytes() == before
        # What can't be ended, as it hangs in a call of the system, leaves the rest of it for the next start to remove.
        assert snapshot.temporary(file).exists() == (step != "_seal")
    with daemon(*options) as third, wire_to(third) as wire:  # type: ignore[arg-type]
        assert not snapshot.temporary(file).exists()
        assert as_map(wire.call("HELLO"))[b"run"] != run
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


def test_final_snapshot_can_be_abandoned_while_copying(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PROGRESS_INSTRUCTIONS", 1)
    looks: list[float] = []

    def breathe(seconds: float = 0) -> None:
        looks.append(seconds)
        if len(looks) >= 3:
            raise snapshot.Abandoned

    with keeping(store, file) as keeper:
        put(store, b"t", *[b"x" * 10_000] * 10)
        store._flush()
        monkeypatch.setattr(keeper, "_checkpoint", breathe)
        assert not keeper.save_last()
        assert not file.exists()
        assert not snapshot.temporary(file).exists()
        assert bodies(store, b"t") == [b"x" * 10_000] * 10


SERVER_THREADS = ("dsmq-io-0", "dsmq-expiry", "dsmq-snapshot", "dsmq-metrics")


def interrupted_at(point: int, call: Callable[[], object]) -> bool:
    """Have Ctrl-C come at one of the points in what stops a server where Python looks for it; whether there is one."""
    files = {server_module.__file__, keeper_module.__file__, threads.__file__}
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
def test_interrupted_stop_ends_all_threads_from_any_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer steps that differ from time to time.
    monkeypatch.setattr(threads, "_POLL_SECONDS", UNIT / 10)
    effective = config.load(kind=config.EmbeddedSettings, port=0, http_port=0, snapshot_file=str(tmp_path / "s"))
    for point in itertools.count():
        server = Server(effective)
        server.start()
        server._store.append([(b"t", b"%d" % point, None)])
        was_interrupted = interrupted_at(point, server.stop)
        # As the `with` statement around it does.
        server.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name in SERVER_THREADS])
        with pytest.raises(ReplyError):
            server._store.append([(b"t", b"more", None)])
        # The snapshot is complete, or there is none; and another server may have the file at once.
        saved = (tmp_path / "s").exists()
        assert saved or was_interrupted
        with restored(tmp_path / "s", time.time()) as other:
            assert bodies(other, b"t") == [b"%d" % point] * saved
        (tmp_path / "s").unlink(missing_ok=True)
        if not was_interrupted:
            break
    assert point > 20


def test_concurrent_stop_waits_for_first(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    writing, released = threading.Event(), threading.Event()

    def hang(_: Path) -> None:
        writing.set()
        released.wait(SOON)

    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire, ThreadPoolExecutor(2) as pool:
        wire.call("PUT", "t", "x")
        monkeypatch.setattr(snapshot, "_sync_folder", hang)
        first = pool.submit(server.stop)
        assert writing.wait(SOON)
        second = pool.submit(server.stop)
        with pytest.raises(TimeoutError):
            second.result(UNIT)
        released.set()
        assert (first.result(SOON), second.result(SOON)) == ([], [])
    # Nor does it do anything again.
    assert [record.message for record in caplog.records].count("stopped") == 1


# Killed


def grow(file: Path, report: int) -> None:
    """Put messages that count on, and write a snapshot after each few, for ever; report how many are kept."""
    store = new_store()
    with keeping(store, file) as keeper:
        count = len(bodies(store, b"t"))
        while True:
            put(store, b"t", *[b"%d" % number for number in range(count, count + 7)])
            put(store, b"other %d" % count, os.urandom(2000))
            store._flush()
            count += 7
            assert keeper.save(at_once=bool(count % 2), is_last=count % 3 == 0)
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
            # The last may have been finished without a word.
            assert len(found) in (kept, kept + 7)
            kept = len(found)
    assert kept >= 7 * 40
    assert not list(file.parent.glob("*.damaged*"))


def kill_one(file: Path, kept: int, after: float) -> int:
    """Have a process write snapshots, and kill it so many seconds after the first; return what it reported last."""
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


# Refused


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
    store: SQLiteStore, file: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGES[kind]
    put(store, b"t", *[b"x" * 1000] * 10)
    save(store, file)
    file.write_bytes(damage(file.read_bytes()))
    check_refused(file, store.epoch, caplog, reason)


@pytest.mark.parametrize("at", [0, 20, 97, 4096, 9000, *range(-80, 0)])
def test_changed_byte_is_detected(store: SQLiteStore, file: Path, at: int, caplog: pytest.LogCaptureFixture) -> None:
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
    """Whoever changes what stands in the file gives it another version, and this its new digest."""
    import hashlib

    text = SCHEMA + INDEX + SNAPSHOT_SCHEMA
    assert (snapshot.VERSION, hashlib.sha256(text.encode()).hexdigest()[:8]) == (1, "d49eb1b4")


# It can't be written


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond this: as a disk that is full, but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# In the middle of the database, and within the trailer.
@pytest.mark.parametrize("missing", [100_000, 10])
def test_full_disk_keeps_previous_snapshot_and_server_running(
    file: Path, missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(snapshot_file=str(file), snapshot_interval_seconds=3600) as server, wire_to(server) as wire:
        keeper = server._snapshotter
        assert keeper
        wire.call("PUT", "t", "x" * 200_000)
        assert keeper.save()
        before = file.read_bytes()
        for at_once in (False, True):
            caplog.clear()
            with files_of_at_most(len(before) - missing):
                assert not keeper.save(at_once=at_once)
            [line] = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert f"can't write a snapshot to {file}" in line.getMessage()
            assert file.read_bytes() == before
            assert not snapshot.temporary(file).exists()
        assert wire.call("PUT", "t", "y") == 2
        assert (keeper.stats.written, keeper.stats.failed) == (1, 2)
        assert keeper.save()


def test_full_disk_is_reported_as_reason(store: SQLiteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "dsmq-test", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    file = tmp_path / "it"
    try:
        with keeping(store, file) as keeper:
            put(store, b"t", b"x" * 300_000)
            assert keeper.save(at_once=True)
            before = file.read_bytes()
            put(store, b"t", b"x" * 900_000)
            for at_once in (True, False):
                caplog.clear()
                assert not keeper.save(at_once=at_once)
                assert "disk is full" in caplog.text
                assert file.read_bytes() == before
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


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


def test_start_checks_that_snapshot_can_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(snapshot, "_sync_folder", fail)
    with pytest.raises(StartupError, match=r"snapshot_file: .*Invalid argument"), serving(snapshot_file=str(file)):
        pass
    assert {path.name for path in file.parent.iterdir()} == {f"{file.name}.lock"}


def test_sqlite_failure_at_start_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "create_tables", lambda database: database.execute("locked"))
    with pytest.raises(StartupError, match=r"snapshot_file: .*syntax error"), serving(snapshot_file=str(file)):
        pass


# Writes snapshots of so many rows that their index does not fit in the cache.
READ_ONLY = """
import sys
from pathlib import Path
from dsmq.store import snapshot_file as snapshot
from dsmq.store.snapshots import Snapshotter
from dsmq.store.sqlite import SQLiteStore

for folder in map(Path, ("/tmp", "/var/tmp", ".")):
    try:
        (folder / "x").touch()
        sys.exit(f"{folder} can be written to")
    except OSError:
        pass
snapshot._PRAGMAS = (*snapshot._PRAGMAS, "cache_size = -100")
store = SQLiteStore(600_000)
store.append([(b"t", b"x", None)])
rows = ((number, 1, 1, 1, bytes(16), b"x") for number in range(2, 200_000))
store._database.connection.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)", rows)
store._last_id = 200_000
store._buffer.clear(200_000, 1)
keeper = Snapshotter(store, sys.argv[1] + "/snapshot")
keeper.open()
sys.exit(not keeper.save() or not keeper.save_last())
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
    with serving(snapshot_file=str(file)) as server:
        with pytest.raises(StartupError, match="another server has"), serving(snapshot_file=str(file)):
            pass
        assert server._snapshotter
        assert server._snapshotter._lock is not None
        # As a process that has been forked would have it.
        child = subprocess.Popen(["sleep", str(SOON)], pass_fds=[server._snapshotter._lock])
    try:
        with serving(snapshot_file=str(file)):
            pass
    finally:
        child.kill()
        child.wait()


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


def test_failed_start_after_restore_loses_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        run = server._store.run

    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(server._expiry.__class__, "start", fail)
        with pytest.raises(StartupError), serving(snapshot_file=str(file)):
            pass
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        assert (server._store.run, wire.call("READ", "t", 0)[3]) == (run, b"x")


def test_complete_but_unloadable_snapshot_is_refused(
    store: SQLiteStore, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, b"t", b"x")
    save(store, file)

    def fill(database: sqlite3.Connection) -> None:
        database.execute("CREATE TABLE another (thing)")

    snapshot.write(file, fill, lambda: None)
    check_refused(file, store.epoch, caplog, "no such table")


# At an interval


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
        run = server._store.run
    file.write_bytes(stolen)
    with serving(**settings) as server, wire_to(server) as wire:
        assert server._store.run != run
        assert wire.call("READ", "t", 0)[3] == b"x"
        assert scrape(server)["dsmq_restored_messages"] == 1


def test_stop_does_not_wait_for_periodic_snapshot(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "PAUSE_SECONDS", SOON)
    monkeypatch.setattr(database, "COPY_ROWS", 1)
    with serving(snapshot_file=str(file), snapshot_interval_seconds=1) as server, wire_to(server) as wire:
        for body in ("1", "2", "3"):
            wire.call("PUT", body, body)
            server._store._flush()  # type: ignore[attr-defined]
        wait_until(snapshot.temporary(file).exists)
        began = time.monotonic()
    assert time.monotonic() - began < SOON / 2
    with restored(file, time.time()) as other:
        assert other.totals().messages == 3


@pytest.mark.slow
def test_stop_waits_for_slow_disk(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, write = threading.Event(), snapshot._sync_folder

    def slowly(folder: Path) -> None:
        if not began.is_set():
            began.set()
            time.sleep(30 * UNIT)
        write(folder)

    settings = {"snapshot_file": str(file), "snapshot_interval_seconds": 1, "stop_timeout_seconds": 20 * UNIT}
    with serving(**settings) as server, wire_to(server) as wire:
        monkeypatch.setattr(snapshot, "_sync_folder", slowly)
        assert began.wait(SOON)
        wire.call("PUT", "t", "x")
        assert server.stop() == []
        assert server._snapshotter
        assert server._snapshotter.saved
    with restored(file, time.time()) as other:
        assert (other.run, bodies(other, b"t")) == (server._store.run, [b"x"])


def test_stop_waits_at_most_a_minute_for_hanging_disk(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(keeper_module, "LAST_SNAPSHOT_SECONDS", UNIT)
    with serving(snapshot_file=str(file), stop_timeout_seconds=20 * UNIT) as server:
        monkeypatch.setattr(snapshot, "_sync_folder", lambda _: released.wait(SOON))
        assert server.stop() == ["dsmq-snapshot"]
        assert server._snapshotter
        assert not server._snapshotter.saved
    released.set()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "dsmq-snapshot"])
    # Left open for it.
    server._store.close()


def test_slow_disk_does_not_fail_health_check(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, released = threading.Event(), threading.Event()

    def hang(_: Path) -> None:
        writing.set()
        released.wait(SOON)

    settings = {"snapshot_file": str(file), "snapshot_interval_seconds": 1, "health_timeout_seconds": UNIT}
    with serving(**settings) as server, monkeypatch.context() as patch:
        patch.setattr(snapshot, "_sync_folder", hang)
        assert writing.wait(SOON)
        time.sleep(3 * UNIT)
        stuck = server.status.stuck_threads()
        released.set()
        assert "dsmq-snapshot" not in stuck


def test_defect_in_snapshot_does_not_end_server(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with keeping(store, file) as keeper:
        monkeypatch.setattr(store, "snapshot", lambda *_, **__: 1 / 0)
        assert not keeper.save_last()
        assert keeper.stats.failed == 1
        assert "ZeroDivisionError" in caplog.text
        assert not file.exists()


def test_dead_snapshot_thread_is_detected(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshotter, "_run", lambda _: None)
    settings = {"port": 0, "snapshot_file": str(file), "snapshot_interval_seconds": 1}
    with Server(config.load(kind=config.EmbeddedSettings, **settings)) as server:
        wait_until(lambda: not server._snapshotter.thread.is_alive())  # type: ignore[union-attr]
        assert server.status.stuck_threads() == ["dsmq-snapshot"]
        with pytest.raises(ServerFailed, match="dsmq-snapshot"):
            server.run()
    assert file.exists()


def test_snapshot_interval_requires_file() -> None:
    with pytest.raises(ConfigError, match="without snapshot_file"):
        config.load(snapshot_interval_seconds=5)
    with pytest.raises(ConfigError, match="0, or at least 1"):
        config.load(snapshot_file="x", snapshot_interval_seconds=0.5)


def test_puts_before_stop_are_in_final_snapshot(file: Path) -> None:
    """Whatever was answered with an id is there; nothing that was refused."""
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
        # What was stored as the connection broke has no reply.
        assert len(found) - len(stored) <= len(clients)


# Numbers that go back


def numbers(wire: Wire, topic: str, *after: str | int) -> tuple[object, object]:
    stats = as_map(wire.call("STATS", topic, *after))
    return stats[b"last_number"], stats[b"restored_number"]


def lost_ids(wire: Wire) -> object:
    return as_map(wire.call("HELLO"))[b"lost_ids"]


def test_missed_count_is_exact_after_kill(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    gap = RESTORE_GAP
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert lost_ids(wire) == []
        wire.call("PUT", "empty", "x")
        server._store.max_age_ms = -1
        wait_until(lambda: server.status.totals().messages == 0)
        server._store.max_age_ms = 600_000
        for _ in range(2):
            wire.call("PUT", "full", "x")
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        # A graceful stop loses nothing: all that was put is as it was.
        assert lost_ids(wire) == []
    # As after a kill: the snapshot is older than what was put last.
    copy = path.read_bytes()
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        wire.call("PUT", "full", "lost")
    path.write_bytes(copy)
    snapshot.record_restore(path, snapshot.verify(path))
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert lost_ids(wire) == [3, 3 + gap]
        assert wire.call("PUT", "full", "new") == 4 + gap
        assert [numbers(wire, topic) for topic in ("full", "empty", "none")] == [(3, 2), (1, 1), (0, 0)]
    # A graceful stop goes on with that run, also for a client that comes back only now.
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert lost_ids(wire) == [3, 3 + gap]
        assert [numbers(wire, topic) for topic in ("full", "empty", "none")] == [(3, 2), (1, 1), (0, 0)]
        server._snapshotter.save()  # type: ignore[union-attr]
        copy = path.read_bytes()
    path.write_bytes(copy)
    snapshot.record_restore(path, snapshot.verify(path))
    # It counts twice, because it was no last one. A client that was away meanwhile is told of both.
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert lost_ids(wire) == [3, 3 + gap, 4 + gap, 4 + 3 * gap]
        assert [numbers(wire, topic) for topic in ("full", "empty", "none")] == [(3, 3), (1, 1), (0, 0)]
        ids = 3, 4, 3 + gap, 4 + gap, 5 + gap
        assert [numbers(wire, "full", "AFTER", one)[1] for one in ids] == [3, 2, 2, 3, 3]
        assert wire.error("STATS", "full", "AFTER", "x") == wire.error("STATS", "full", "AFTER") == "BADREQUEST"


def test_of_many_kills_the_last_are_remembered(store: SQLiteStore) -> None:
    for number in range(1, 300):
        store.begin_run(store.last_id() + number)
    assert len(store.lost_ids) == 200
    store.append([(b"%d" % number, b"", None) for number in range(60_000)])
    last = store.last_id()
    for number in range(3):
        store.begin_run(last + number + 1)
    # One with all numbers is always there.
    assert store.lost_ids == [last + 1, last + 2, last + 2, last + 3]
    assert store.stats(b"59999", last + 3).restored_number == 1
