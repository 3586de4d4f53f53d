"""The groups of workers in a snapshot."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import astuple

from dsmq.store.group import Group, GroupCounts, HeldJob
from dsmq.store.schema import Batch
from dsmq.store.selection import Selection

# After a restart, workers have at least this long to finish the jobs that they held before it.
LEASE_AFTER_RESTART_MS = 30_000


class GroupSnapshots:
    """Copies all groups to a snapshot and restores them; part of `Groups`."""

    _groups: dict[tuple[bytes, bytes], Group]
    _base: GroupCounts
    _count_memory: Callable[[Group], None]

    def copy(self) -> Iterator[Batch]:
        """Return the rows of a snapshot of this instant. Requires the lock; iterating over the rows does not."""
        groups: list[tuple[object, ...]] = []
        jobs: list[tuple[object, ...]] = []
        parts: list[tuple[int, dict[int, int], dict[bytes, tuple[int, int]]]] = []
        for row, group in enumerate(self._groups.values()):
            groups.append((row, group.key, group.name, group.used_at, group.position, *astuple(group.counts)))
            jobs += [
                (row, job.id, job.topic, job.attempt, job.until, job.is_held, job.token) for job in group.jobs.values()
            ]
            parts.append((row, group.done.copy(), group.numbers.copy()))
        return _batches(groups, jobs, parts)

    def load(self, source: sqlite3.Connection, now: int) -> None:
        """Restore the groups of a snapshot."""
        by_row: dict[int, Group] = {}
        if not source.execute("SELECT 1 FROM sqlite_master WHERE name = 'worker_groups'").fetchone():
            # The snapshot is from an earlier version.
            return
        for row, key, name, used_at, position, *counts in source.execute("SELECT * FROM worker_groups ORDER BY id"):
            group = by_row[row] = Group(key, name, Selection([key]), used_at, position, counts=GroupCounts(*counts))
            self._groups[key, name] = group
            self._base.add(group.counts, -1)
        for row, message_id, topic, attempt, until, is_held, token in source.execute(
            "SELECT * FROM jobs ORDER BY rowid"
        ):
            if topic is None:
                by_row[row].done[message_id] = attempt
                continue
            end = max(until, now + LEASE_AFTER_RESTART_MS) if is_held else until
            by_row[row].restore(HeldJob(message_id, topic, attempt, end, bool(is_held), now, token))
        for row, topic, number, dropped in source.execute("SELECT * FROM job_numbers ORDER BY rowid"):
            by_row[row].count_until(topic, number, dropped)
        for group in by_row.values():
            self._count_memory(group)


def _batches(
    groups: list[tuple[object, ...]],
    jobs: list[tuple[object, ...]],
    parts: list[tuple[int, dict[int, int], dict[bytes, tuple[int, int]]]],
) -> Iterator[Batch]:
    yield "INSERT INTO worker_groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", groups
    insert = "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)"
    yield insert, jobs
    for row, done, numbers in parts:
        yield insert, [(row, message_id, None, attempt, 0, False, b"") for message_id, attempt in done.items()]
        yield "INSERT INTO job_numbers VALUES (?, ?, ?, ?)", [(row, topic, *last) for topic, last in numbers.items()]
