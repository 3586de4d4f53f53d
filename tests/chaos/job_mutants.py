"""Deliberate defects of a server that shares jobs among workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from dsmq.broker.jobs import PendingTake, TakeQueues
from dsmq.store import group_snapshots
from dsmq.store.api import Found
from dsmq.store.group import Group, HeldJob, Receipt
from dsmq.store.groups import Groups
from dsmq.store.nats_group_facts import GroupFacts
from dsmq.store.nats_group_plan import Refused, SharedGroup
from dsmq.store.schema import Batch

Mutant: TypeAlias = Callable[[], None]
# Probability of random defects.
RATIO = 0.05

_begin_copy, _finish, _next, _give = Groups.begin_copy, Group.finish, Groups._next, Group.give
_end_leases, _remove, _put_back = Group.end_leases, TakeQueues.remove, Group.put_back


def leases_end_soon() -> None:
    """Not a defect: after a restart, leases last only a second, so that the jobs of lost workers are given again."""
    group_snapshots.LEASE_AFTER_RESTART_MS = 1_000


def keeps_leases() -> None:
    """A lease never ends."""
    Group.end_leases = lambda *_: None  # type: ignore[method-assign]


def ends_leases_early() -> None:
    """A lease ends before its time."""

    def give(group: Group, job: HeldJob, until: int, now: int, *about: Any) -> None:
        _give(group, job, now + (until - now) // 3, now, *about)

    Group.give = give  # type: ignore[method-assign]


def loses_returned_jobs() -> None:
    """A job that is given back is forgotten."""

    def put_back(group: Group, job: HeldJob, until: int) -> None:
        _put_back(group, job, until)
        group.remove(job)

    Group.put_back = put_back  # type: ignore[method-assign]


def accepts_any_attempt() -> None:
    """A worker that has lost a job can end it."""
    Group.is_current = lambda group, receipt: receipt.id in group.jobs  # type: ignore[method-assign]


def repeats_attempts() -> None:
    """An attempt is not counted."""

    def give(group: Group, job: HeldJob, *about: Any) -> None:
        job.attempt -= job.attempt > 0
        _give(group, job, *about)

    Group.give = give  # type: ignore[method-assign]


def forgets_held_jobs() -> None:
    """Snapshots don't contain the jobs that workers hold."""

    def copy(self: Groups) -> Iterator[Batch]:
        return (
            (insert, [row for row in rows if " jobs " not in insert or not row[5]])
            for insert, rows in _begin_copy(self)
        )

    Groups.begin_copy = copy  # type: ignore[method-assign]


def forgets_positions() -> None:
    """After a restart, a group begins from the start."""

    def copy(self: Groups) -> Iterator[Batch]:
        return (
            (insert, [(*row[:4], 0, *row[5:]) if " worker_groups " in insert else row for row in rows])
            for insert, rows in _begin_copy(self)
        )

    Groups.begin_copy = copy  # type: ignore[method-assign]


def skips_jobs() -> None:
    """The position of a group skips a message."""

    def find(self: Groups, group: Group, *about: int) -> Found:
        found = _next(self, group, *about)
        return found._replace(messages=found.messages[random.random() < RATIO :])

    Groups._next = find  # type: ignore[method-assign]


def wakes_nobody() -> None:
    """After a waiting worker has got a job, no other worker's turn comes."""
    PendingTake.come_first = lambda *_: None  # type: ignore[method-assign]


def ignores_tokens() -> None:
    """A TAKE that is sent again gets other jobs."""
    Group.repeat = lambda *_: []  # type: ignore[method-assign]


def gives_done_jobs() -> None:
    """A job that is done is given again."""

    def finish(group: Group, receipt: Receipt, max_done: int) -> None:
        job = group.jobs[receipt.id]
        _finish(group, receipt, max_done)
        if random.random() < RATIO:
            group.jobs[receipt.id] = job
            _put_back(group, job, 0)

    Group.finish = finish  # type: ignore[method-assign]


def forgets_done_jobs() -> None:
    """A repeated DONE gets JOBLOST."""

    def finish(group: Group, receipt: Receipt, max_done: int) -> None:
        _finish(group, receipt, max_done)
        del group.done[receipt.id]

    Group.finish = finish  # type: ignore[method-assign]


def shares_groups() -> None:
    """Groups with the same key share their jobs."""
    find = Groups._find
    Groups._find = lambda self, request, now: find(self, request._replace(group=b"workers"), now)  # type: ignore[method-assign]
    done = Groups.done

    def done_in_one(self: Groups, key: bytes, _: bytes, receipts: Sequence[Receipt]) -> None:
        done(self, key, b"workers", receipts)

    Groups.done = done_in_one  # type: ignore[method-assign]


def never_fails() -> None:
    """A job is given more often than max_attempts."""
    Group.end_leases = lambda group, now, _: _end_leases(group, now, 0)  # type: ignore[method-assign]


def answers_refused_plans() -> None:
    """A server gives jobs although another server was first."""
    finish = GroupFacts._finish

    def accept(self: GroupFacts, name: str, error: Exception | None) -> None:
        finish(self, name, None if isinstance(error, Refused) else error)

    GroupFacts._finish = accept  # type: ignore[method-assign]


def ignores_versions() -> None:
    """A job is given again although another server has already given it."""
    unfit = SharedGroup.unfit

    def exists(group: SharedGroup, versions: Iterable[tuple[int, int]]) -> bool:
        return unfit(group, [(one, group.jobs[one].version if one in group.jobs else 0) for one, _ in versions])

    SharedGroup.unfit = exists  # type: ignore[method-assign]


SHARED_JOB_MUTANTS: dict[Mutant, tuple[str, str]] = {
    answers_refused_plans: ("shared_workers", "two at once"),
    ignores_versions: ("shared_workers", "two at once"),
    accepts_any_attempt: ("shared_workers", "done late"),
    loses_returned_jobs: ("shared_workers", "not done"),
    ends_leases_early: ("shared_workers", "two at once"),
    ignores_tokens: ("shared_workers_reset", "attempt"),
}
JOB_MUTANTS: dict[Mutant, tuple[str, str]] = {
    keeps_leases: ("workers", "not done"),
    ends_leases_early: ("workers", "two at once"),
    loses_returned_jobs: ("workers", "not done"),
    accepts_any_attempt: ("workers", "done late"),
    repeats_attempts: ("workers", "two at once"),
    skips_jobs: ("workers", "not done"),
    wakes_nobody: ("workers", "left lying"),
    gives_done_jobs: ("workers", "given after done"),
    shares_groups: ("workers", "not done"),
    ignores_tokens: ("workers_every_byte", "attempt"),
    forgets_done_jobs: ("workers_every_byte", "lost early"),
    forgets_held_jobs: ("workers_and_restarts", "not done"),
    forgets_positions: ("workers_and_restarts", "given after done"),
    never_fails: ("workers_that_fail", "failed late"),
}
