"""Shared by the tests of groups of workers: a store and a worker that takes jobs."""

from __future__ import annotations

from stores import ClockedStore, clock, store_fixture

from dsmq.store.group_figures import GroupStats
from dsmq.store.groups import Job, Take
from dsmq.store.selection import JobSelection

AGE, LEASE = 100_000, 1_000
W = b"workers"

store = store_fixture(AGE)
# Fixtures.
__all__ = ["clock", "store"]


def take(
    store: ClockedStore,
    key: bytes = b"t",
    count: int = 1,
    *,
    group: bytes = W,
    lease_ms: int = LEASE,
    token: bytes = b"",
    max_bytes: int = 100_000,
) -> list[Job]:
    request = Take(key, group, JobSelection(key), count, max_bytes, lease_ms, token, "worker")
    while True:
        if (found := store.groups.take(request)) is not None:
            return found


def stats(store: ClockedStore) -> GroupStats:
    [found] = store.groups.stats()
    return found
