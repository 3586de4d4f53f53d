"""`dsmq serve` with a deliberate defect that the scenarios must find: `mutants.py NAME`."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

from dsmq.__main__ import main
from dsmq.store.api import Message, Put
from dsmq.store.sqlite import SQLiteStore

# Probability of random defects.
RATIO = 0.02

_append, _read = SQLiteStore.append, SQLiteStore.read


def forgets_keys() -> None:
    """A repeated put is stored again."""

    def append(store: SQLiteStore, puts: Sequence[Put]) -> list[int]:
        return _append(store, [(topic, body, None) for topic, body, _ in puts])

    SQLiteStore.append = append  # type: ignore[method-assign,assignment]


def loses_puts() -> None:
    """A put is acknowledged but not stored."""

    def append(store: SQLiteStore, puts: Sequence[Put]) -> list[int]:
        ids = _append(store, puts)
        if random.random() < RATIO:
            for topic in store._topics.by_name.values():
                if topic.buffered:
                    topic.buffered.pop()
        return ids

    SQLiteStore.append = append  # type: ignore[method-assign]


def reuses_ids() -> None:
    """After a kill, ids continue from the snapshot."""

    def begin_run(store: SQLiteStore, last_id: int) -> None:
        store.run = f"another {random.random()}"

    SQLiteStore.begin_run = begin_run  # type: ignore[method-assign]


def _change_reads(change: Any) -> None:
    def read(store: SQLiteStore, topic: bytes, after: int, count: int, max_bytes: int) -> list[Message]:
        found = _read(store, topic, after, count, max_bytes)
        return list(change(store, topic, after, found)) if found and random.random() < RATIO else found

    SQLiteStore.read = read  # type: ignore[method-assign]


def skips() -> None:
    """A message is skipped."""
    _change_reads(lambda _store, _topic, _after, found: found[1:])


def swaps() -> None:
    """Two messages swap places."""
    _change_reads(lambda _store, _topic, _after, found: found[::-1])


def repeats() -> None:
    """A message is delivered again."""

    def change(store: SQLiteStore, topic: bytes, after: int, found: list[Message]) -> list[Message]:
        return _read(store, topic, max(0, after - 3), 100, 10_000) or found

    _change_reads(change)


def renames() -> None:
    """Each reader sees a different id for a message."""
    _change_reads(lambda _store, _topic, _after, found: [*found[:-1], found[-1]._replace(id=found[-1].id + 1)])


# Defects, and the scenario that must find each.
MUTANTS = {
    forgets_keys: "resets",
    loses_puts: "calm",
    reuses_ids: "kills_with_snapshot",
    skips: "calm",
    swaps: "calm",
    repeats: "calm",
    renames: "calm",
}

if __name__ == "__main__":
    {mutant.__name__: mutant for mutant in MUTANTS}[sys.argv[1]]()
    sys.argv[1:] = ["serve"]
    sys.exit(main())
