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
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SOON, UNIT, Daemon, Wire, daemon, run_dsmq, serving, wait_until, wire_to, without_privileges
from dsmq import server as server_module
from dsmq import settings as config
from dsmq import threads
from dsmq.cli import INTERRUPTED
from dsmq.errors import CannotStart, ConfigError, Forgotten, ReplyError, ServerFailed
from dsmq.server import Server
from dsmq.store import dedup as producers
from dsmq.store import snapshot_file as snapshot
from dsmq.store import snapshots as keeper_module
from dsmq.store import sqlite as store_module
from dsmq.store.api import Put
from dsmq.store.image import Instant, Part, Place
from dsmq.store.snapshots import RESTORE_GAP, Keeper
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.resp import encode_request
from test_server import as_map
from test_sideport import scrape

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
def keeping(store: SQLiteStore, file: Path, at: float = KEPT_AT) -> Iterator[Keeper]:
    """A keeper of the file that has restored what there was."""
    keeper = Keeper(store, str(file), clock=lambda: at)
    try:
        keeper.open()
        keeper._pause_seconds = 0
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


def recalled(store: SQLiteStore) -> dict[bytes, tuple[dict[int, int], int, int, int]]:
    """What is remembered of each producer's puts; the one heard last stands last."""
    return {
        name: ({**one.older, **one.newer}, one.highest, one.forgotten, one.last_at)
        for name, one in store._producers._known.items()
    }


def seen(store: SQLiteStore) -> object:
    """All that clients can see but what they put."""
    return (
        store.last_id(),
        store.epoch,
        [(store.stats(name), store.read(name, 0, 1000, 10**9), store.latest(name, 0)) for name in NAMES],
        store.topics(b"", 100),
        list(recalled(store).items()),
        store.totals().cost,
        len(store._producers),
        list(store._empty.items()),
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
        store._write_tails()


# What is restored


@settings(max_examples=60, deadline=None)
@given(st.lists(actions, max_size=25), st.booleans(), puts)
def test_what_is_restored_is_what_was_held(before: list[list[Put] | int | str], slowly: bool, later: list[Put]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, file = new_store(), Path(folder) / "snapshot"
        for action in before:
            act(store, action)
        # What has expired is deleted at the start.
        while store.expire():
            pass
        with keeping(store, file) as keeper:
            assert keeper.save(keeper._copy_slowly if slowly else store.copy_all, is_last=True)
        with restored(file) as other:
            assert seen(other) == seen(store)
            assert other.run == store.run
            assert (other.totals().stored, other.totals().expired) == (0, 0)
            assert other.append(later) == store.append(later)
            assert seen(other) == seen(store)
        store.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(actions, max_size=15), st.lists(st.lists(actions, max_size=4), max_size=12))
def test_what_is_done_between_the_slices_is_in_up_to_the_instant_and_no_further(
    before: list[list[Put] | int | str], meanwhile: list[list[list[Put] | int | str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "COPY_CHUNKS", 1)
        patch.setattr(store_module, "COPY_TOPICS", 2)
        patch.setattr(keeper_module, "_PRODUCERS", 1)
        store, file = new_store(), Path(folder) / "snapshot"
        for action in before:
            act(store, action)
            store._write_tails()
        rest = iter(meanwhile)

        def breathe(_: float = 0) -> None:
            for action in next(rest, []):
                act(store, action)

        at_the_instant: list[object] = []
        remembered: list[dict[bytes, tuple[dict[int, int], int, int, int]]] = []
        clock = store._clock
        instant_at = clock()
        copy = store.copy

        def copy_and_look(place: Place, slices: int) -> tuple[Part, Instant | None]:
            nonlocal instant_at
            part, instant = copy(place, slices)
            if instant:
                instant_at = clock()
                at_the_instant.append(seen(store)[:4])  # type: ignore[index]
                remembered.append(recalled(store))
            return part, instant

        patch.setattr(store, "copy", copy_and_look)
        with keeping(store, file) as keeper:
            # The time of day goes on with the store's clock.
            patch.setattr(keeper, "_clock", lambda: KEPT_AT + (clock() - instant_at) / 1000)
            patch.setattr(keeper, "_breathe", breathe)
            assert keeper.save(keeper._copy_slowly)
        patch.setattr(SQLiteStore, "expire", lambda _: 0)
        patch.setattr(SQLiteStore, "begin_run", lambda *_: None)
        with restored(file) as other:
            assert seen(other)[:4] == at_the_instant[0]  # type: ignore[index]
            # When it was heard last may be told of a later time.
            assert {n: one[:3] for n, one in recalled(other).items()} == {
                n: one[:3] for n, one in remembered[0].items()
            }
            assert dict(other._database.execute("SELECT name, id FROM topics")) == {
                topic.name: topic.row for topic in other._topics.values()
            }
        store.close()


def test_a_topic_that_was_emptied_and_came_back_between_the_slices_is_one(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "COPY_CHUNKS", 1)
    put(store, b"t", b"old")
    put(store, b"u", b"old")
    store._write_tails()
    assert isinstance(store._clock, Clock)

    breaths = iter([True])

    def breathe(_: float = 0) -> None:
        # When the first slice has been copied, with the first of them.
        if not next(breaths, False):
            return
        act(store, MAX_AGE + 1)
        while store.expire():
            pass
        put(store, b"t", b"new")

    with keeping(store, file) as keeper:
        monkeypatch.setattr(keeper, "_breathe", breathe)
        assert keeper.save(keeper._copy_slowly, is_last=True)
    with snapshot.opened(file) as database:
        assert database.execute("SELECT name FROM topics").fetchall() == [(b"t",)]
        assert database.execute("SELECT count(*) FROM chunks").fetchone() == (1,)
    with restored(file) as other:
        assert seen(other) == seen(store)
        assert (bodies(other, b"t"), other.last_number(b"t"), other.last_number(b"u")) == ([b"new"], 2, 1)


def test_what_comes_behind_the_instant_takes_no_numbers_from_what_was_empty(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, b"t", b"1", b"2")
    act(store, MAX_AGE + 1)
    store.expire()
    with keeping(store, file) as keeper:
        # With nothing to copy, the first time that it breathes is behind the instant.
        monkeypatch.setattr(keeper, "_breathe", lambda _=0: put(store, b"t", b"x"))
        assert keeper.save(keeper._copy_slowly, is_last=True)
    with restored(file) as other:
        assert other.stats(b"t")[1:5] == (0, 0, 2, 2)
        assert other.last_id() == 2


def test_all_topics_are_copied_though_nothing_of_them_is_written(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "COPY_TOPICS", 1)
    for name in NAMES:
        put(store, name, b"x")
    with keeping(store, file) as keeper:
        assert keeper.save(keeper._copy_slowly, is_last=True)
    with restored(file) as other:
        assert seen(other) == seen(store)


def test_while_writers_are_at_work_a_snapshot_holds_all_up_to_an_id_and_nothing_else(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "COPY_CHUNKS", 4)
    put(store, b"t0", *[b"x" * 500] * 2000)
    store._write_tails()
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
                assert keeper.save(keeper._copy_slowly)
                after = store.last_id()
                with snapshot.opened(file) as database:
                    check_prefix(database, before, after)
        finally:
            ended.set()
            for writer in writers:
                writer.join()


def check_prefix(database: sqlite3.Connection, before: int, after: int) -> None:
    """All ids up to one between the two are there, once, and each topic's numbers in their order."""
    found: list[int] = []
    numbers: dict[int, int] = {}
    for row, *chunk in database.execute(
        "SELECT topic, put_at, last_number, ids_and_sizes, bodies FROM chunks ORDER BY last_id"
    ):
        for message_id, number, *_ in store_module.unpack(tuple(chunk)):  # type: ignore[arg-type]
            found.append(message_id)
            assert number == numbers.get(row, 0) + 1
            numbers[row] = number
    (last_id,) = database.execute("SELECT last_id FROM state").fetchone()
    assert sorted(found) == list(range(1, last_id + 1))
    assert before <= last_id <= after


def test_a_restart_is_invisible_but_for_its_delay(file: Path) -> None:
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


def test_what_was_restored_is_not_counted_as_put_nor_as_unread(store: SQLiteStore, file: Path) -> None:
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
def test_a_put_is_stored_once_over_a_restart_or_refused_where_it_was_forgotten(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch, slowly: bool
) -> None:
    monkeypatch.setattr(producers, "MAX_PUTS_OF_PRODUCER", 2)
    for seq in range(7):
        assert store.append([(b"t", b"x", (b"me", seq))]) == [seq + 1]
    with keeping(store, file) as keeper:
        assert keeper.save(keeper._copy_slowly if slowly else store.copy_all, is_last=True)
    with restored(file) as other:
        # Too many, so the first half is forgotten; the others are remembered, whichever half they are in.
        for seq in (0, 1, 2):
            with pytest.raises(Forgotten):
                other.append([(b"t", b"again", (b"me", seq))])
        assert [other.append([(b"t", b"again", (b"me", seq))]) for seq in (3, 4, 5, 6)] == [[4], [5], [6], [7]]
        assert other.append([(b"t", b"new", (b"me", 7))]) == [8]
        assert bodies(other, b"t") == [b"x"] * 7 + [b"new"]


def test_a_producer_that_was_forgotten_is_refused_over_a_restart_for_as_long(
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


def test_a_producer_is_remembered_for_as_long_over_a_restart(store: SQLiteStore, file: Path) -> None:
    store.append([(b"t", b"x", (b"me", 1))])
    act(store, producers.REMEMBER_MS - 10)
    save(store, file)
    for passed, found in ((0.009, True), (0.012, False)):
        with restored(file, KEPT_AT + passed) as other:
            # The put of another forgets what is too old.
            put_id = other.append([(b"u", b"x", (b"another", 1))])[0]
            assert (other.append([(b"t", b"x", (b"me", 1))]) == [1]) == found
            assert put_id > 1


def test_remembered_puts_count_towards_their_bound_after_a_restart(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        store.append([(b"t", b"x", (b"producer %d" % number, seq)) for seq in range(3)])
    save(store, file)
    monkeypatch.setattr(producers, "MAX_REMEMBERED_PUTS", 9)
    with restored(file) as other:
        assert len(other._producers) == 9
        other.append([(b"t", b"x", (b"one more", 1))])
        with pytest.raises(Forgotten):
            other.check_producer(b"producer 0")


def test_only_the_owner_can_read_it_and_nothing_else_is_left(store: SQLiteStore, file: Path) -> None:
    snapshot.temporary(file).write_text("left by one that was killed")
    put(store, b"t", b"a secret")
    save(store, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {path.name for path in file.parent.iterdir()} == {file.name, f"{file.name}.lock"}


def test_a_name_that_is_a_link_stays_one(store: SQLiteStore, file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    save(store, link)
    assert link.is_symlink()
    assert file.exists()


# Clocks


@pytest.mark.parametrize(
    ("passed", "age_ms"), [(0, 1_000), (5, 6_000), (-3_600, 1_000), (99, 100_000), (99.001, None), (10**9, None)]
)
def test_ages_go_on_by_the_time_of_day(store: SQLiteStore, file: Path, passed: float, age_ms: int | None) -> None:
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


def test_time_that_index_and_commit_take_makes_messages_no_younger(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [KEPT_AT]
    put(store, b"t", b"x")
    create_index = snapshot.create_index

    def create_slowly(database: sqlite3.Connection) -> None:
        create_index(database)
        act(store, 1_600)
        now[0] += 1.6

    monkeypatch.setattr(snapshot, "create_index", create_slowly)
    keeper = Keeper(store, str(file), clock=lambda: now[0])
    assert keeper.save(keeper._copy_slowly)
    with restored(file, now[0]) as other:
        assert other.read(b"t", 0, 1, 100)[0].age_ms == 1_600


def test_time_that_a_restore_takes_makes_messages_no_younger(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, b"t", b"x")
    save(store, file)
    other, drop = new_store(5_000), store_module.image.drop

    def drop_slowly(database: sqlite3.Connection) -> None:
        drop(database)
        act(other, 2_000)

    monkeypatch.setattr(store_module.image, "drop", drop_slowly)
    with keeping(other, file):
        assert other.read(b"t", 0, 1, 100)[0].age_ms == 2_000
    other.close()


def test_messages_that_had_expired_before_the_restore_are_counted_in_the_log(
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


def test_ages_go_on_while_the_machine_sleeps(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_last_word_is_so_once_and_no_id_is_used_twice(store: SQLiteStore, file: Path) -> None:
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


def test_after_a_snapshot_that_is_not_the_last_word_ids_go_on_far_above(store: SQLiteStore, file: Path) -> None:
    put(store, b"t", b"1")
    save(store, file, is_last=False)
    for gaps in (1, 2):
        with restored(file) as other:
            assert other.epoch == store.epoch
            assert other.run != store.run
            assert put(other, b"t", b"2") == [2 + gaps * RESTORE_GAP]
            assert bodies(other, b"t") == [b"1", b"2"]


def test_a_server_that_is_killed_is_told_apart_from_one_that_was_stopped(file: Path) -> None:
    options = ("--snapshot-file", str(file))
    with daemon(*options) as first, wire_to(first) as wire:  # type: ignore[arg-type]
        wire.call("PUT", "t", "kept")
        hello = as_map(wire.call("HELLO"))
        assert first.stop() == 0
    with daemon(*options) as second, wire_to(second) as wire:  # type: ignore[arg-type]
        assert any("INFO" in line and "restored 1 messages of 1 topics" in line for line in second.log)
        assert as_map(wire.call("HELLO"))[b"run"] == hello[b"run"]
        assert wire.call("PUT", "t", "lost") == 2
        second.process.kill()
        second.process.wait()
    with daemon(*options) as third, wire_to(third) as wire:  # type: ignore[arg-type]
        again = as_map(wire.call("HELLO"))
        assert (again[b"epoch"], again[b"last_id"]) == (hello[b"epoch"], 1 + RESTORE_GAP)
        assert again[b"run"] != hello[b"run"]
        assert wire.call("READ", "t", 0)[3] == b"kept"
        assert any("WARNING" in line and "is lost" in line for line in third.log)


def test_where_a_thread_survives_the_stop_the_snapshot_is_not_the_last_word(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
setattr(snapshot, step, slow if step in ("_seal", "_make_durable") else slower)
sys.argv = sys.argv[5:]
sys.exit(__main__.main())
"""


def slow(step: str, released: Path) -> list[str]:
    return [sys.executable, "-c", SLOW, step, str(released)]


def ended(server: Daemon) -> str:
    """The rest of its log, once it has been interrupted to its end."""
    _, rest = server.process.communicate(timeout=SOON)
    assert server.process.returncode == INTERRUPTED
    assert "Traceback" not in rest
    return str(rest)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_twice_ends_what_is_slow_but_not_the_last_snapshot(file: Path) -> None:
    options = ("--snapshot-file", str(file))
    with (
        daemon(*options, "--stop-timeout-seconds", "600") as first,
        wire_to(first) as wire,  # type: ignore[arg-type]
        wire_to(first) as slow,  # type: ignore[arg-type]
    ):
        run = as_map(wire.call("HELLO"))[b"run"]
        wire.call("PUT", "t", b"x" * 4_000_000)
        # More than the kernel holds for one that does not read.
        slow.send(encode_request(b"READ", b"t", b"0") * 10)
        wait_until(lambda: bool(slow.socket.recv(1, socket.MSG_PEEK)))
        first.process.send_signal(signal.SIGINT)
        assert wire.ended()
        first.process.send_signal(signal.SIGINT)
        rest = ended(first)
        assert "interrupted" in rest
        assert "ERROR" not in rest
    with daemon(*options) as second, wire_to(second) as wire:  # type: ignore[arg-type]
        assert as_map(wire.call("HELLO"))[b"run"] == run
        assert wire.call("READ", "t", 0)[3] == b"x" * 4_000_000


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", ["_seal", "_make_durable"])
def test_ctrl_c_in_the_last_snapshot_does_not_end_it(file: Path, tmp_path: Path, step: str) -> None:
    released = tmp_path / "released"
    options = ("--snapshot-file", str(file))
    with daemon(*options, prefix=slow(step, released)) as first, wire_to(first) as wire:  # type: ignore[arg-type]
        run = as_map(wire.call("HELLO"))[b"run"]
        wire.call("PUT", "t", "x")
        first.process.send_signal(signal.SIGINT)
        first.wait_for_line("^writing")
        first.process.send_signal(signal.SIGINT)
        first.wait_for_line("WARNING.*interrupted")
        # As long as it would wait for what it does not wait for.
        with pytest.raises(subprocess.TimeoutExpired):
            first.process.wait(10 * UNIT)
        released.touch()
        assert "ERROR" not in ended(first)
    with daemon(*options) as second, wire_to(second) as wire:  # type: ignore[arg-type]
        assert as_map(wire.call("HELLO"))[b"run"] == run
        assert wire.call("READ", "t", 0)[3] == b"x"


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", ["_seal", "create_extra_tables"])
def test_ctrl_c_three_times_gives_the_last_snapshot_up_and_says_so(file: Path, tmp_path: Path, step: str) -> None:
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
        second.wait_for_line("WARNING.*interrupted")
        second.process.send_signal(signal.SIGINT)
        [error] = [line for line in ended(second).splitlines() if "ERROR" in line]
        assert "what was put since the one before is lost" in error
        assert file.read_bytes() == before
        # What can't be ended, as it hangs in a call of the system, leaves the rest of it for the next start to remove.
        assert snapshot.temporary(file).exists() == (step != "_seal")
    with daemon(*options) as third, wire_to(third) as wire:  # type: ignore[arg-type]
        assert not snapshot.temporary(file).exists()
        assert as_map(wire.call("HELLO"))[b"run"] != run
        assert wire.call("READ", "t", 0)[3] == b"kept"
        assert wire.call("READ", "t", 1) == []


def test_ctrl_c_again_ahead_of_the_last_snapshot_says_what_is_lost(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(snapshot_file=str(file)) as server:
        put(server._store, b"t", b"x")  # type: ignore[arg-type]
        end = server._end_threads

        def interrupt(deadline: float) -> list[str]:
            end(deadline)
            raise KeyboardInterrupt

        monkeypatch.setattr(server, "_end_threads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.stop()
        assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
            "the last snapshot is given up: what was put since the one before is lost"
        ]
        # Another server may have the file at once.
        with serving(snapshot_file=str(file)):
            pass
        server._store.close()


def test_a_last_snapshot_can_be_given_up_while_it_is_copied(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_COPY_PAGES", 1)
    looks: list[float] = []

    def breathe(seconds: float = 0) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise snapshot.Abandoned

    with keeping(store, file) as keeper:
        put(store, b"t", *[b"x" * 10_000] * 10)
        store._write_tails()
        monkeypatch.setattr(keeper, "_breathe", breathe)
        assert not keeper.save_last()
        assert len(looks) == 3
        assert not file.exists()
        assert not snapshot.temporary(file).exists()
        assert bodies(store, b"t") == [b"x" * 10_000] * 10


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


def test_wherever_a_stop_is_interrupted_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # There is to be little that differs from time to time.
    monkeypatch.setattr(threads, "_LOOK_SECONDS", UNIT / 10)
    effective = config.load(kind=config.EmbeddedSettings, port=0, http_port=0, snapshot_file=str(tmp_path / "s"))
    for point in itertools.count():
        server = Server(effective)
        server.start()
        [number] = server._store.append([(b"t", b"%d" % point, None)])  # type: ignore[misc]
        was_interrupted = interrupted_at(point, server.stop)
        # As what it is in does.
        assert server.stop(0) == []
        assert not [thread for thread in server._threads() if thread.is_alive()]
        with pytest.raises(ReplyError):
            server._store.append([(b"t", b"more", None)])
        with restored(tmp_path / "s", time.time()) as other:
            assert (other.last_id(), other.run) == (number, server._store.run)
            assert bodies(other, b"t")[-1] == b"%d" % point
        (tmp_path / "s").unlink()
        if not was_interrupted:
            break
    assert point > 20


def test_a_stop_waits_for_the_one_that_goes_on(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    writing, released = threading.Event(), threading.Event()

    def hang(_: Path) -> None:
        writing.set()
        released.wait(SOON)

    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire, ThreadPoolExecutor(2) as pool:
        wire.call("PUT", "t", "x")
        monkeypatch.setattr(snapshot, "_make_durable", hang)
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
            store._write_tails()
            count += 7
            assert keeper.save(store.copy_all if count % 2 else keeper._copy_slowly, is_last=count % 3 == 0)
            os.write(report, b"%d\n" % count)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_whenever_it_is_killed_there_is_one_whole_snapshot(file: Path) -> None:
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
    "text": (lambda data: b"messages = 3\n" * 100, "no snapshot"),
    "short text": (lambda data: b"hello", "no snapshot"),
    "a database": (lambda data: data[:-80], "no snapshot"),
    "the trailer alone": (lambda data: data[-80:], "damaged"),
    "one byte less": (lambda data: data[:-1], "cut off"),
    "half": (lambda data: data[: len(data) // 2], "cut off"),
    "a byte more in the middle": (lambda data: data[:5000] + b"x" + data[5000:], "damaged"),
    "of a later version": (lambda data: data[:-2] + b"02", "version 2"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_no_whole_snapshot_is_refused_and_kept(
    store: SQLiteStore, file: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGES[kind]
    put(store, b"t", *[b"x" * 1000] * 10)
    save(store, file)
    file.write_bytes(damage(file.read_bytes()))
    check_refused(file, store.epoch, caplog, reason)


@pytest.mark.parametrize("at", [0, 20, 97, 4096, 9000, *range(-80, 0)])
def test_a_byte_that_has_changed_is_found(
    store: SQLiteStore, file: Path, at: int, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_the_version_goes_up_with_the_tables() -> None:
    """Whoever changes what stands in the file gives it another version, and this its new digest."""
    import hashlib

    from dsmq.store import image

    text = store_module.SCHEMA + store_module.INDEX + image.TABLES
    assert (snapshot.VERSION, hashlib.sha256(text.encode()).hexdigest()[:8]) == (1, "d12a9b0e")


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
def test_where_the_disk_is_full_the_snapshot_before_stays_and_the_server_goes_on(
    file: Path, missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(snapshot_file=str(file), snapshot_interval_seconds=3600) as server, wire_to(server) as wire:
        keeper = server._keeper
        assert keeper
        wire.call("PUT", "t", "x" * 200_000)
        assert keeper.save(keeper._copy_slowly)
        before = file.read_bytes()
        for copy in (keeper._copy_slowly, server._store.copy_all):  # type: ignore[attr-defined]
            caplog.clear()
            with files_of_at_most(len(before) - missing):
                assert not keeper.save(copy)
            [line] = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert f"can be written to {file}" in line.getMessage()
            assert file.read_bytes() == before
            assert not snapshot.temporary(file).exists()
        assert wire.call("PUT", "t", "y") == 2
        assert (keeper.tally.written, keeper.tally.failed) == (1, 2)
        assert keeper.save(keeper._copy_slowly)


def test_a_disk_that_is_full_is_named_as_the_reason(
    store: SQLiteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "dsmq-test", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    file = tmp_path / "it"
    try:
        with keeping(store, file) as keeper:
            put(store, b"t", b"x" * 300_000)
            assert keeper.save(store.copy_all)
            before = file.read_bytes()
            put(store, b"t", b"x" * 900_000)
            for copy in (store.copy_all, keeper._copy_slowly):
                caplog.clear()
                assert not keeper.save(copy)
                assert "disk is full" in caplog.text
                assert file.read_bytes() == before
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_last_snapshot_that_fails_is_told_by_the_exit_status(file: Path) -> None:
    with daemon("--snapshot-file", str(file)) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.call("PUT", "t", "x")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        assert server.stop() == 1
        assert "no snapshot can be written" in server.log[-1]
        assert "Traceback" not in server.log[-1]
    assert not file.exists()


def test_a_file_or_folder_that_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    for name, told in (("missing/it", "missing: No such"), ("a file/it", "Not a dir"), ("a folder", "Is a dir")):
        with pytest.raises(CannotStart, match=f"snapshot_file: .*{told}"), serving(snapshot_file=str(tmp_path / name)):
            pass


@pytest.mark.parametrize("mode", ["folder", "file"])
def test_what_is_not_allowed_is_told_at_the_start(tmp_path: Path, mode: str) -> None:
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


def test_what_the_last_snapshot_will_need_is_tried_at_the_start(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(snapshot, "_make_durable", fail)
    with pytest.raises(CannotStart, match=r"snapshot_file: .*Invalid argument"), serving(snapshot_file=str(file)):
        pass
    assert {path.name for path in file.parent.iterdir()} == {f"{file.name}.lock"}


def test_a_failure_of_sqlite_at_the_start_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "create_tables", lambda database: database.execute("locked"))
    with pytest.raises(CannotStart, match=r"snapshot_file: .*syntax error"), serving(snapshot_file=str(file)):
        pass


# Writes snapshots of so many rows that their index does not fit in the cache.
READ_ONLY = """
import sys
from pathlib import Path
from dsmq.store import snapshot_file as snapshot
from dsmq.store.snapshots import Keeper
from dsmq.store.sqlite import SQLiteStore

for folder in map(Path, ("/tmp", "/var/tmp", ".")):
    try:
        (folder / "x").touch()
        sys.exit(f"{folder} can be written to")
    except OSError:
        pass
snapshot._CACHE = 100
store = SQLiteStore(600_000)
store.append([(b"t", b"x", None)])
rows = ((number, 1, 1, 1, bytes(16), b"x") for number in range(2, 200_000))
store._database.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)", rows)
store._last_id = 200_000
keeper = Keeper(store, sys.argv[1] + "/snapshot")
keeper.open()
sys.exit(not keeper.save(keeper._copy_slowly) or not keeper.save_last())
"""


def test_nothing_is_written_outside_the_folder_of_the_snapshot(tmp_path: Path) -> None:
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


def test_two_servers_can_not_have_one_file(file: Path) -> None:
    with serving(snapshot_file=str(file)) as server:
        with pytest.raises(CannotStart, match="another server has"), serving(snapshot_file=str(file)):
            pass
        assert server._keeper
        assert server._keeper._lock is not None
        # As a process that has been forked would have it.
        child = subprocess.Popen(["sleep", str(SOON)], pass_fds=[server._keeper._lock])
    try:
        with serving(snapshot_file=str(file)):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_start_that_fails_leaves_the_snapshot_as_it_is(file: Path) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
    before = file.read_bytes()
    with (
        serving() as other,
        pytest.raises(CannotStart),
        serving(port=other.port, snapshot_file=str(file)),
    ):
        pass
    assert file.read_bytes() == before


def test_a_start_that_fails_behind_the_restore_loses_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        run = server._store.run

    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(server._expiry.__class__, "start", fail)
        with pytest.raises(CannotStart), serving(snapshot_file=str(file)):
            pass
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        assert (server._store.run, wire.call("READ", "t", 0)[3]) == (run, b"x")


def test_a_file_that_does_not_load_though_it_is_whole_is_refused(
    store: SQLiteStore, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, b"t", b"x")
    save(store, file)

    def fill(database: sqlite3.Connection) -> None:
        database.execute("CREATE TABLE another (thing)")

    snapshot.write(file, fill, lambda: None)
    check_refused(file, store.epoch, caplog, "no such table")


# At an interval


def test_at_an_interval_it_is_written_while_clients_put(file: Path) -> None:
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


def test_a_stop_does_not_wait_for_a_snapshot_at_an_interval(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "PAUSE_SECONDS", SOON)
    monkeypatch.setattr(store_module, "COPY_CHUNKS", 1)
    with serving(snapshot_file=str(file), snapshot_interval_seconds=1) as server, wire_to(server) as wire:
        for body in ("1", "2", "3"):
            wire.call("PUT", body, body)
            server._store._write_tails()  # type: ignore[attr-defined]
        wait_until(snapshot.temporary(file).exists)
        began = time.monotonic()
    assert time.monotonic() - began < SOON / 2
    with restored(file, time.time()) as other:
        assert other.totals().messages == 3


def test_a_stop_waits_for_a_disk_that_is_slow(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, write = threading.Event(), snapshot._make_durable

    def slowly(folder: Path) -> None:
        if not began.is_set():
            began.set()
            time.sleep(30 * UNIT)
        write(folder)

    settings = {"snapshot_file": str(file), "snapshot_interval_seconds": 1, "stop_timeout_seconds": 20 * UNIT}
    with serving(**settings) as server, wire_to(server) as wire:
        monkeypatch.setattr(snapshot, "_make_durable", slowly)
        assert began.wait(SOON)
        wire.call("PUT", "t", "x")
        assert server.stop() == []
        assert server._keeper
        assert server._keeper.is_kept
    with restored(file, time.time()) as other:
        assert (other.run, bodies(other, b"t")) == (server._store.run, [b"x"])


def test_a_disk_that_hangs_is_waited_for_no_longer_than_a_minute(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(keeper_module, "LAST_SNAPSHOT_SECONDS", UNIT)
    with serving(snapshot_file=str(file), stop_timeout_seconds=20 * UNIT) as server:
        monkeypatch.setattr(snapshot, "_make_durable", lambda _: released.wait(SOON))
        assert server.stop() == ["dsmq-snapshot"]
        assert server._keeper
        assert not server._keeper.is_kept
    released.set()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "dsmq-snapshot"])
    # Left open for it.
    server._store.close()


def test_while_the_disk_is_written_to_the_thread_is_not_taken_for_stuck(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, released = threading.Event(), threading.Event()

    def hang(_: Path) -> None:
        writing.set()
        released.wait(SOON)

    settings = {"snapshot_file": str(file), "snapshot_interval_seconds": 1, "health_timeout_seconds": UNIT}
    with serving(**settings) as server, monkeypatch.context() as patch:
        patch.setattr(snapshot, "_make_durable", hang)
        assert writing.wait(SOON)
        time.sleep(3 * UNIT)
        stuck = server.status.stuck()
        released.set()
        assert "dsmq-snapshot" not in stuck


def test_a_defect_while_it_is_written_ends_nothing(
    store: SQLiteStore, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with keeping(store, file) as keeper:
        monkeypatch.setattr(store, "copy_all", lambda *_: 1 / 0)
        assert not keeper.save_last()
        assert keeper.tally.failed == 1
        assert "ZeroDivisionError" in caplog.text
        assert not file.exists()


def test_the_death_of_the_thread_is_noticed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeper, "_run", lambda _: None)
    settings = {"port": 0, "snapshot_file": str(file), "snapshot_interval_seconds": 1}
    with Server(config.load(kind=config.EmbeddedSettings, **settings)) as server:
        wait_until(lambda: not server._keeper.thread.is_alive())  # type: ignore[union-attr]
        assert server.status.stuck() == ["dsmq-snapshot"]
        with pytest.raises(ServerFailed, match="dsmq-snapshot"):
            server.run()
    assert file.exists()


def test_an_interval_needs_a_file() -> None:
    with pytest.raises(ConfigError, match="without snapshot_file"):
        config.load(snapshot_interval_seconds=5)
    with pytest.raises(ConfigError, match="0, or at least 1"):
        config.load(snapshot_file="x", snapshot_interval_seconds=0.5)


def test_what_clients_put_before_it_stops_is_in_the_last_snapshot(file: Path) -> None:
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


def numbers(wire: Wire, topic: str) -> tuple[object, object]:
    stats = as_map(wire.call("STATS", topic))
    return stats[b"last_number"], stats[b"restored_number"]


def test_after_a_kill_a_reader_is_told_the_numbers_that_count_goes_on_from(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert as_map(wire.call("HELLO"))[b"restored_id"] == 0
        wire.call("PUT", "empty", "x")
        server._store.max_age_ms = -1
        wait_until(lambda: server.totals().messages == 0)
        server._store.max_age_ms = 600_000
        for _ in range(2):
            wire.call("PUT", "full", "x")
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        # A graceful stop loses nothing: all that was put is as it was.
        assert as_map(wire.call("HELLO"))[b"restored_id"] == 3
    # As after a kill: the snapshot is older than what was put last.
    copy = path.read_bytes()
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        wire.call("PUT", "full", "lost")
    path.write_bytes(copy)
    snapshot.mark(path, snapshot.examine(path))
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert as_map(wire.call("HELLO"))[b"restored_id"] == 3
        assert wire.call("PUT", "full", "new") > 2**32  # type: ignore[operator]
        assert numbers(wire, "full") == (3, 2)
        assert numbers(wire, "empty") == (1, 1)
        assert numbers(wire, "none") == (0, 0)
    # A graceful stop goes on with that run, also for a client that comes back only now.
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        assert as_map(wire.call("HELLO"))[b"restored_id"] == 3
        assert [numbers(wire, topic) for topic in ("full", "empty", "none")] == [(3, 2), (1, 1), (0, 0)]
        server._keeper.save(server._keeper._copy_slowly)  # type: ignore[union-attr]
        copy = path.read_bytes()
    path.write_bytes(copy)
    snapshot.mark(path, snapshot.examine(path))
    with serving(snapshot_file=str(path)) as server, wire_to(server) as wire:
        hello = as_map(wire.call("HELLO"))
        assert hello[b"restored_id"] == server._store.restored_id > 2**32  # type: ignore[operator]
        assert [numbers(wire, topic) for topic in ("full", "empty", "none")] == [(3, 3), (1, 1), (0, 0)]
