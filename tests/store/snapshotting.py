"""Shared by the tests of snapshots: a store, a file and a disk, and how to save and restore."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from stores import Clock, ClockedStore

from conftest import SOON, Wire, as_map
from dsmq import settings as config
from dsmq.server import Server
from dsmq.store import snapshot_file
from dsmq.store.api import Put
from dsmq.store.snapshots import Snapshotter
from dsmq.store.sqlite import SQLiteStore

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
    """A snapshotter that has restored the file, if it exists."""
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


class Disk:
    """Makes snapshots fail with `error` at the very end, or wait for the disk while `hangs` is set."""

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


def act(store: ClockedStore, action: list[Put] | int | str) -> None:
    """Put messages, advance the clock by milliseconds, expire, or flush the buffer."""
    if isinstance(action, list):
        store.append(action)
    elif isinstance(action, int):
        store.clock.now += action
    elif action == "expire":
        store.expire()
    else:
        store.write()
