"""`dsmq serve` with a deliberate defect that the scenarios must find: `mutants.py NAME...`."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from chaos.job_mutants import JOB_MUTANTS, SHARED_JOB_MUTANTS, Mutant, leases_end_soon
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
    def read(store: SQLiteStore, topic: bytes, after: int, *limits: int) -> list[Message]:
        found = _read(store, topic, after, *limits)
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


# Servers that share a store, which is imported only when it is used.


def forgets_soon() -> None:
    """Not a defect: the engine recognises repeated puts only so briefly that the mirrors have to do it."""
    from dsmq.store import nats_stream

    nats_stream.DEDUPLICATION_SECONDS = 1


def mirrors_forget_keys() -> None:
    """Mirrors store messages that the engine has stored twice."""
    from dsmq.store import nats_fold

    forgets_soon()
    nats_fold._key = lambda _: None


def renames_retries() -> None:
    """A put that is sent to the engine again gets another message id."""
    from dsmq.store import nats_puts

    encode = nats_puts._Publish.encode

    def encode_anew(message: Any, *others: Any, is_sent: bool) -> bytes:
        another = message._replace(message_id=b"%b-%d" % (message.message_id, random.getrandbits(60)))
        return encode(another, *others, is_sent=is_sent)

    nats_puts._Publish.encode = encode_anew  # type: ignore[method-assign,assignment]


def reads_stale_mirrors() -> None:
    """A read that finds nothing does not ask the engine."""
    from dsmq.store import nats_index

    nats_index.ReadIndex.add = lambda _, call, __=None: call(None)  # type: ignore[method-assign,misc]


def trusts_any_leader() -> None:
    """A read trusts a leader that may be cut off from the others."""
    from dsmq.store import nats_index

    nats_index.boot_time = lambda: -float("inf")  # type: ignore[assignment]


def answers_early() -> None:
    """A put is acknowledged before the engine has answered."""
    from dsmq.store import nats_puts

    outcomes = nats_puts.Publisher._outcomes

    def guess(publisher: Any, batch: Any, ack: Any, *, is_sent: bool) -> list[Any]:
        guessed = range(publisher.last_id + 1, publisher.last_id + 1 + len(batch.messages))
        return list(guessed) if ack is None else outcomes(publisher, batch, ack, is_sent=is_sent)

    nats_puts.Publisher._outcomes = guess  # type: ignore[method-assign,assignment]


# Defects, the scenario that must find each, and the kind of violation that it causes.
SHARED_MUTANTS: dict[Mutant, tuple[str, str]] = {
    renames_retries: ("moves", "stored twice"),
    mirrors_forget_keys: ("forgetful_engine", "stored twice"),
    reads_stale_mirrors: ("stale_leader", "wrong empty"),
    trusts_any_leader: ("stale_leader", "wrong empty"),
    answers_early: ("leader_killed", "lost"),
    **SHARED_JOB_MUTANTS,
}
MUTANTS: dict[Mutant, tuple[str, str]] = {
    forgets_keys: ("resets", "stored twice"),
    loses_puts: ("calm", "unread"),
    reuses_ids: ("kills_with_snapshot", "id reused"),
    skips: ("calm", "unread"),
    swaps: ("calm", "order of reads"),
    repeats: ("calm", "read twice"),
    renames: ("calm", "id reused"),
    **JOB_MUTANTS,
}

if __name__ == "__main__":
    known = {change.__name__: change for change in (*MUTANTS, *SHARED_MUTANTS, forgets_soon, leases_end_soon)}
    for name in sys.argv[1:]:
        known[name]()
    sys.argv[1:] = ["serve"]
    sys.exit(main())
