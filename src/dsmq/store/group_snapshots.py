"""The groups of workers in a snapshot."""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from dsmq.store.group import Group, GroupCounts, HeldJob
from dsmq.store.schema import Batch
from dsmq.store.selection import JobSelection

if TYPE_CHECKING:
    from dsmq.store.sqlite import SQLiteStore

# After a restart, workers have at least this long to finish the jobs that they held before it.
LEASE_AFTER_RESTART_MS = 30_000
# Max rows made while holding the lock: about 0.1 ms of work.
COPY_ROWS = 500
_INSERT_GROUP = "INSERT INTO worker_groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_JOB = "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)"
_INSERT_NUMBER = "INSERT INTO job_numbers VALUES (?, ?, ?, ?)"


class _Copy(NamedTuple):
    """A group at the instant of a snapshot. Only its jobs may change, but none is lost."""

    row: tuple[object, ...]
    jobs: list[HeldJob]
    done: dict[int, int]
    numbers: dict[bytes, tuple[int, int]]


class GroupSnapshots:
    """Copies all groups to a snapshot and restores them; part of `Groups`."""

    lock: threading.Lock
    _source: SQLiteStore
    _groups: dict[tuple[bytes, bytes], Group]
    _base: GroupCounts
    _count_memory: Callable[[Group], None]

    def __init__(self) -> None:
        # While a snapshot is being written: the groups that are not copied yet, with their rows, and unwritten copies.
        # A group is copied before it changes.
        self._uncopied: dict[tuple[bytes, bytes], tuple[int, Group]] = {}
        self._copies: deque[_Copy] = deque()

    def begin_copy(self) -> Iterator[Batch]:
        """Return the rows of a snapshot of this instant. Requires the lock, which iterating takes for a short time.

        A job that was given again, returned or extended since then has its new state.
        """
        self._uncopied = dict(zip(self._groups, enumerate(self._groups.values()), strict=True))
        return self._rows()

    def end_copy(self) -> None:
        with self.lock:
            self._uncopied.clear()
            self._copies.clear()

    def _copy(self, key: tuple[bytes, bytes]) -> None:
        """Copy a group that is about to change, unless it is new or has been copied."""
        if key in self._uncopied:
            row, group = self._uncopied.pop(key)
            head = row, group.key, group.name, group.used_at, group.position, *astuple(group.counts)
            # The next server counts dropped messages from 0.
            numbers = {topic: (last, was - self._source.dropped(topic)) for topic, (last, was) in group.numbers.items()}
            self._copies.append(_Copy(head, list(group.jobs.values()), group.done.copy(), numbers))

    def _next_copy(self) -> _Copy | None:
        with self.lock:
            if not self._copies and self._uncopied:
                self._copy(next(iter(self._uncopied)))
            return self._copies.popleft() if self._copies else None

    def _rows(self) -> Iterator[Batch]:
        while copy := self._next_copy():
            yield _INSERT_GROUP, [copy.row]
            row = copy.row[0]
            for first in range(0, len(copy.jobs), COPY_ROWS):
                with self.lock:
                    jobs = [
                        (row, job.id, job.topic, job.attempt, job.until, job.is_held, job.token)
                        for job in copy.jobs[first : first + COPY_ROWS]
                    ]
                yield _INSERT_JOB, jobs
            done = iter(copy.done.items())
            while finished := list(islice(done, COPY_ROWS)):
                yield _INSERT_JOB, [(row, message_id, None, attempt, 0, False, b"") for message_id, attempt in finished]
            if copy.numbers:
                yield _INSERT_NUMBER, [(row, topic, *last) for topic, last in copy.numbers.items()]

    def load(self, source: sqlite3.Connection, now: int) -> None:
        """Restore the groups of a snapshot."""
        by_row: dict[int, Group] = {}
        if not source.execute("SELECT 1 FROM sqlite_master WHERE name = 'worker_groups'").fetchone():
            # The snapshot is from an earlier version.
            return
        for row, key, name, used_at, position, *counts in source.execute("SELECT * FROM worker_groups ORDER BY id"):
            group = by_row[row] = Group(key, name, JobSelection(key), used_at, position, counts=GroupCounts(*counts))
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
