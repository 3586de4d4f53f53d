"""Shared by the tests of the store: stores with a clock that the test controls, and operations on them."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dsmq.store.api import Limits, Message, Put
from dsmq.store.schema import Batch
from dsmq.store.sqlite import SQLiteStore

MAX_AGE = 100
BIG = b"x" * 1_000_000


class Clock:
    """Milliseconds that pass only when the test advances them."""

    def __init__(self, now: int = 1_000_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


class ClockedStore(SQLiteStore):
    """A store with its own clock."""

    def __init__(self, max_age_ms: int, clock: Clock | None = None, limits: Limits | None = None) -> None:
        self.clock = clock or Clock()
        super().__init__(max_age_ms, self.clock, limits)
        # The number of jobs that a TAKE gets must not depend on the load of the machine.
        self.groups.slice_seconds = math.inf
        self.between_batches: Callable[[], object] = bool
        """Called after each batch of a snapshot."""
        self.during_copy: Callable[[], object] = bool
        """Called when a copy of all tables reports progress, with the lock held."""

    @property
    def connection(self) -> sqlite3.Connection:
        return self._database.connection

    def remembered(self) -> object:
        """Return the store's state besides messages: producers and their puts, and topics without messages."""
        producers = self._deduplicator.copy(self._deduplicator.names(), self.last_id())
        return list(producers.items()), len(self._deduplicator), list(self._topics.empty.items())

    def write(self) -> None:
        """Flush the write buffer, even if it is nearly empty."""
        self._flush()

    @contextmanager
    def snapshot(self, *args: Any, on_progress: Callable[[], None], **kwargs: Any) -> Iterator[Iterator[Batch]]:
        def between() -> None:
            self.during_copy()
            on_progress()

        with super().snapshot(*args, on_progress=between, **kwargs) as batches:
            yield self._interrupt(batches)

    def _interrupt(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            self.between_batches()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def store_fixture(max_age_ms: int) -> Any:
    """Return the fixture `store`: a new store whose clock is the fixture `clock`."""

    @pytest.fixture(name="store")
    def new_store(clock: Clock) -> Iterator[ClockedStore]:
        store = ClockedStore(max_age_ms, clock)
        yield store
        store.close()

    return new_store


def refuse_inserts(store: ClockedStore) -> None:
    """Make every INSERT fail, until `connection.set_authorizer(None)`."""

    def authorize(action: int, *_: object) -> int:
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_INSERT else sqlite3.SQLITE_OK

    store.connection.set_authorizer(authorize)


def put(store: SQLiteStore, topic: bytes, *bodies: bytes) -> list[int]:
    puts: list[Put] = [(topic, body, None) for body in bodies]
    return store.append(puts)


def put_as(store: SQLiteStore, producer: bytes, *seqs: int) -> list[int]:
    return store.append([(b"t", b"x", (producer, seq)) for seq in seqs])


def expire_all(store: SQLiteStore) -> None:
    while store.expire():
        pass


def a_put(topic: bytes, body: bytes, key: tuple[bytes, int] | None = None) -> Put:
    return topic, body, key


def a_message(message_id: int, number: int, age_ms: int, body: bytes) -> Message:
    return Message(message_id, number, age_ms, body, MAX_AGE - age_ms)


def read(store: ClockedStore, topic: bytes, after: int = 0) -> list[Message]:
    return store.read(topic, after, 1000, 1_000_000)


def stop_growing(store: ClockedStore) -> None:
    """Make SQLite fail as if there were no memory for more pages."""
    store.connection.execute("PRAGMA max_page_count = 1")
