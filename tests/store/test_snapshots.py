"""The contents of a snapshot, written and restored, whatever happens in between."""

from __future__ import annotations

import itertools
import sqlite3
import stat
import tempfile
import threading
import time
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshotting import (
    MAX_AGE,
    SAVED_AT,
    Disk,
    act,
    bodies,
    disk,
    file,
    hello,
    restored,
    save,
    serving_store,
    snapshotting,
    store,
)
from stores import Clock, ClockedStore, expire_all, put, put_as

from conftest import SOON, UNIT, Wire, daemon, scrape, serving, wait_until, wire_to
from dsmq import settings as config
from dsmq.errors import ConfigError, Forgotten, ServerFailed
from dsmq.server import Server
from dsmq.store import database, scan, schema, snapshot_contents, snapshot_file, snapshots
from dsmq.store import dedup as producers
from dsmq.store.api import ManyTopics, Put, TopicMessage
from dsmq.store.schema import LONG_BYTES, unpack, unpack_ids_and_sizes
from dsmq.store.selection import Selection
from dsmq.store.snapshots import Snapshotter
from dsmq.store.sqlite import SQLiteStore

# Fixtures.
__all__ = ["disk", "file", "store"]

NAMES = [b"a", b"b", b"c", "\N{SNOWMAN}".encode()]


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


@settings(max_examples=40, deadline=None)
@given(st.lists(actions, max_size=25), st.booleans(), puts)
def test_restored_store_equals_saved_store(before: list[list[Put] | int | str], slowly: bool, later: list[Put]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "LONG_BYTES", 10)
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


@settings(max_examples=40, deadline=None)
@given(st.lists(actions, max_size=15), st.lists(st.lists(actions, max_size=4), max_size=12))
def test_snapshot_is_consistent_despite_changes_between_batches(
    before: list[list[Put] | int | str], meanwhile: list[list[list[Put] | int | str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "COPY_ROWS", 1)
        patch.setattr(database, "LONG_BYTES", 10)
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
        # Each is a separate batch.
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
    with restored(file) as other, pytest.raises(Forgotten, match="too many other producers"):
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
        # With pauses, because a lock that is almost never free may not go to the thread that has waited longest.
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
    """Every id up to one between the two is present once, and each topic's numbers are in order."""
    found: list[int] = []
    numbers: dict[int, int] = {}
    for chunk in connection.execute("SELECT * FROM chunks ORDER BY last_id"):
        row = chunk[1]
        for message_id, number, *_ in unpack(chunk):
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
def test_put_retried_after_restart_is_stored_once_or_refused(store: ClockedStore, file: Path, at_once: bool) -> None:
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
    with within as other, pytest.raises(Forgotten, match="too many other producers"):
        other.check_producer(b"forgotten")
    with restored(file, SAVED_AT + producers.REMEMBER_MS / 1000) as other:
        other.check_producer(b"forgotten")


def test_producer_is_remembered_just_as_long_across_restart(store: ClockedStore, file: Path) -> None:
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
def test_snapshot_contains_long_bodies(store: ClockedStore, file: Path, at_once: bool) -> None:
    """They are in rows, like other bodies."""
    held = [b"x", b"y" * LONG_BYTES, b"", b"z" * 1_000_000, b"buffered" * 20_000]
    put(store, b"t", *held[:4])
    store.write()
    put(store, b"t", held[4])
    with snapshotting(store, file) as snapshotter:
        assert snapshotter.save(at_once=at_once)
    with snapshot_file.opened(file) as connection:
        rows = connection.execute("SELECT * FROM chunks ORDER BY last_id")
        assert [message[3] for row in rows for message in unpack(row)] == held
    with restored(file) as other:
        assert bodies(other, b"t") == held
        assert other.connection.execute("SELECT max(length(bodies)) FROM chunks").fetchone()[0] < LONG_BYTES


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("size", [100, 20_000])
def test_snapshot_contains_no_expired_body(store: ClockedStore, file: Path, at_once: bool, size: int) -> None:
    secret = b"secret" * size
    put(store, b"t", *[secret] * 50)
    store.write()
    act(store, MAX_AGE // 2)
    put(store, b"t", b"other" * size)
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
        assert "final snapshot abandoned" in caplog.text
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
    """Every put that got an id is in the snapshot, and no put that was refused."""
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


def test_snapshot_of_an_earlier_version_is_loaded(store: ClockedStore, file: Path) -> None:
    sent = [b"%d" % at * (at % 3) for at in range(300)]
    for body in sent:
        put(store, b"t", body)
        put(store, b"other", body)
    put(store, b"t", b"x" * LONG_BYTES)
    save(store, file)
    with snapshot_file.opened(file) as saved:
        script, rows = "\n".join(saved.iterdump()), saved.execute("SELECT * FROM chunks").fetchall()

    def fill(database: sqlite3.Connection) -> None:
        database.executescript(script)
        database.execute("DELETE FROM chunks")
        database.execute("ALTER TABLE chunks DROP COLUMN messages")
        for *columns, count, packed, body in rows:
            pairs = zip(*unpack_ids_and_sizes(columns[0], count, packed), strict=True)
            old = array("q", [value for pair in pairs for value in pair]).tobytes()
            database.execute("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)", (*columns, old, body))

    snapshot_file.write(file, fill, lambda: None)
    with restored(file) as other:
        assert bodies(other, b"t") == [*sent, b"x" * LONG_BYTES]
        assert bodies(other, b"other") == sent
        put(other, b"t", b"new")
        assert [message.number for message in other.read(b"t", 0, 1000, 10**6)] == list(range(1, 303))


@pytest.mark.parametrize("saved_in_blocks_of", [1 << 40, 512])
def test_restored_messages_are_read_by_patterns_in_order(
    store: ClockedStore, file: Path, monkeypatch: pytest.MonkeyPatch, saved_in_blocks_of: int
) -> None:
    # Earlier versions did not limit the ids of a row, and accepted topics with `*`.
    monkeypatch.setattr(schema, "BLOCK_IDS", saved_in_blocks_of)
    names = [b"a*b", b"a1", b"b"]
    ids = store.append([(names[at % 3], b"x", None) for at in range(300)])
    store.write()
    save(store, file)
    for module in (schema, database):
        monkeypatch.setattr(module, "BLOCK_IDS", 8)
    monkeypatch.setattr(scan, "MAX_MERGED_TOPICS", 0)
    monkeypatch.setattr(scan, "SCAN_SECONDS", 0)
    with restored(file) as after:
        ids += after.append([(names[at % 3], b"y", None) for at in range(300)])
        after.write()
        wanted, found = ManyTopics(Selection([b"a*"]), 0, 7, 1_000_000), list[TopicMessage]()
        while True:
            part = after.read_many(wanted)
            found += part.messages
            if part.is_complete and not part.messages:
                break
            wanted = wanted._replace(after=part.position)
        assert [(one.topic, one.id) for one in found] == [
            (names[at % 3], message_id) for at, message_id in enumerate(ids) if at % 3 < 2
        ]
