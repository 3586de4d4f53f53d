"""Changes to groups of workers: a server plans them, and all mirrors make them as they arrive from the stream.

A planned change is written to the stream as a fact, in JSON. It contains the result and the state that it was planned
for: the group's position and the version of each job that it changes. A mirror makes a change only if both still
match, so if two servers plan to give the same job, the fact that comes first in the stream wins on all mirrors. This
depends neither on clocks nor on message bodies.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsmq.store.group import FAILED, READY, Group, HeldJob, Receipt

if TYPE_CHECKING:
    from dsmq.store.groups import Take
    from dsmq.store.sqlite import MirrorStore

# The bytes that a job takes in a fact, without its topic; each byte of a name may take several.
_JOB_BYTES, _NAME_FACTOR = 80, 6
# Max jobs in a fact, even if the engine accepts more: planning or applying it takes up to 2 ms, holding the lock.
_MAX_JOBS = 100

Version = tuple[int, int]
"""The id of a job and its version."""


class Refused(Exception):
    """A fact no longer applies."""


def as_text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def as_bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def encode_fact(*values: object) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


@dataclass(slots=True)
class SharedGroup(Group):
    """A group as described by facts. Only the ends of leases depend on this server's clock."""

    changed_by: int = 0
    """The id of the last fact about the group."""
    searched: int = 0
    """There are no messages to give after `position`, up to this id."""

    def pop_ready(self) -> HeldJob | None:
        """Return the oldest job to be given again, if there is one, and hide it until `push_ready`."""
        job = self.next_ready()
        if job is not None:
            heapq.heappop(self._ready)
        return job

    def push_ready(self, jobs: Iterable[HeldJob]) -> None:
        for job in jobs:
            if self.jobs.get(job.id) is job and job.until == READY:
                heapq.heappush(self._ready, job.id)

    def _fail(self, job: HeldJob) -> None:
        # Its worker may finish it until all servers know that it failed.
        job.until = FAILED
        self.failed.append(job)

    def unfit(self, versions: Iterable[Version]) -> bool:
        """Return whether any of these jobs is done or has changed."""
        return any((job := self.jobs.get(one)) is None or job.version != version for one, version in versions)


@dataclass(slots=True)
class _Given:
    """The jobs for one request."""

    request: Take
    new: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By topic: id and number in the topic."""
    again: list[Version] = field(default_factory=list)
    repeated: list[Version] = field(default_factory=list)
    """Jobs that were given for an earlier request with the same token."""

    def values(self) -> list[object]:
        request = self.request
        return [as_text(request.token), request.worker, request.lease_ms, self.new, self.again, self.repeated]


@dataclass(slots=True)
class Plan(Group):
    """A stand-in for a group: gives its jobs without changing it and records the changes."""

    group: SharedGroup = field(kw_only=True)
    max_jobs: int = field(kw_only=True)
    is_use: bool = False
    """Whether to publish it even if it changes nothing, because the group would be forgotten otherwise."""
    _given: list[_Given] = field(default_factory=list)
    _skipped: list[tuple[str, int]] = field(default_factory=list)
    _expired: list[Version] = field(default_factory=list)
    _popped: dict[int, HeldJob] = field(default_factory=dict)
    _planned: int = 0
    _repeated: int = 0
    """The number of jobs given again or given for repeated requests."""
    tokens: set[bytes] = field(default_factory=set)
    """The tokens of the requests in the plan."""

    @classmethod
    def of(cls, group: SharedGroup, max_fact_bytes: int, max_topic_bytes: int) -> Plan:
        job_bytes = _JOB_BYTES + (_NAME_FACTOR * max_topic_bytes if group.selection.patterns else 0)
        return cls(
            *(group.key, group.name, group.selection, group.used_at, max(group.position, group.searched)),
            group=group,
            jobs=group.jobs,
            max_jobs=max(1, min(_MAX_JOBS, max_fact_bytes // job_bytes)),
        )

    @property
    def size(self) -> int:
        return len(self.jobs) + self._planned

    @property
    def has_changes(self) -> bool:
        return bool(self.is_use or self._planned or self._skipped or self._expired or any(map(_is_any, self._given)))

    def begin(self, request: Take) -> Take:
        """Record jobs for this request from now on; return it with the number of jobs for which there is room."""
        self._given.append(_Given(request))
        self.tokens.add(request.token)
        return request._replace(max_jobs=min(request.max_jobs, self.room))

    @property
    def room(self) -> int:
        """How many more jobs the fact may contain."""
        return max(0, self.max_jobs - self._planned - self._repeated)

    def fact(self) -> tuple[object, ...]:
        given = [one.values() for one in self._given if _is_any(one)]
        return self.group.position, self.position, given, self._skipped, self._expired

    def release(self) -> None:
        """Make the jobs that `next_ready` took available again, unless they have been given."""
        self.group.push_ready(self._popped.values())

    # What `Groups` does with a group

    def repeat(self, token: bytes) -> list[HeldJob]:
        return list(map(_copy, self.group.repeat(token)))

    def next_ready(self) -> HeldJob | None:
        while (job := self.group.pop_ready()) is not None:
            # A job is queued twice if its lease was extended after its end.
            if job.id not in self._popped:
                self._popped[job.id] = job
                return _copy(job)
        return None

    def count_until(self, topic: bytes, number: int, dropped: int) -> None:  # noqa: ARG002
        self._skipped.append((as_text(topic), number))

    def add(self, message_id: int, topic: bytes) -> HeldJob:
        name, number = self._skipped.pop()
        self._given[-1].new.setdefault(name, []).append((message_id, number))
        self._planned += 1
        return HeldJob(message_id, topic)

    def give(self, job: HeldJob, until: int, now: int, token: bytes, worker: str) -> None:  # noqa: ARG002
        if job.attempt:
            self._given[-1].again.append((job.id, job.version))
            self._repeated += 1
        job.attempt += 1

    def extend(self, job: HeldJob, until: int) -> None:  # noqa: ARG002
        self._given[-1].repeated.append((job.id, job.version))
        self._repeated += 1

    def remove(self, job: HeldJob) -> None:
        self._expired.append((job.id, job.version))


def _is_any(given: _Given) -> bool:
    return bool(given.new or given.again or given.repeated)


def _copy(job: HeldJob) -> HeldJob:
    return HeldJob(job.id, job.topic, job.attempt, version=job.version)


def apply_plan(group: SharedGroup, fact: list[Any], message_id: int, age_ms: int, source: MirrorStore) -> None:
    """Make the changes of a plan. The id and the age are those of its fact. Raises Refused."""
    position, reached, given, skipped, expired = fact
    gone = {one for one, _ in expired}
    tokens = [as_bytes(token) for token, *_ in given if token]
    if (
        group.position != position
        or group.unfit(expired)
        or any(group.unfit(again) or group.unfit(repeated) for *_, again, repeated in given)
        or len(tokens) != len(set(tokens))
        or any(_conflicts(group, one, gone) for one in given)
    ):
        raise Refused
    for one in gone:
        group.remove(group.jobs[one])
    group.counts.expired += len(gone)
    for topic, number in skipped:
        _count_until(group, as_bytes(topic), number, source)
    for one in given:
        for job in _apply_given(group, one, age_ms, source):
            job.version = message_id
    group.position = reached


def _count_until(group: SharedGroup, topic: bytes, number: int, source: MirrorStore) -> None:
    """Count messages that were not taken, once, although another server may give some that this one has deleted."""
    _, deleted, dropped = source.numbers(topic)
    counted, _ = group.numbers.get(topic, (-1, 0))
    if number > min(counted, deleted):
        group.count_until(topic, number, dropped)


def _conflicts(group: SharedGroup, given: list[Any], gone: set[int]) -> bool:
    """Return whether an earlier request with the same token has jobs that this one does not repeat."""
    repeated = {one for one, _ in given[-1]} | gone
    return any(job.id not in repeated for job in group.repeat(as_bytes(given[0])))


def _apply_given(group: SharedGroup, given: list[Any], age_ms: int, source: MirrorStore) -> list[HeldJob]:
    token, worker, lease_ms, new, again, repeated = given
    now = source.now()
    until, since = now + max(0, lease_ms - age_ms), max(0, now - age_ms)
    jobs = []
    # Add jobs in the order of ids, like all jobs of a group.
    for message_id, number, topic in sorted((*one, topic) for topic, found in new.items() for one in found):
        name = as_bytes(topic)
        _count_until(group, name, number, source)
        jobs.append(group.add(message_id, name))
    group.counts.repeated += len(again)
    jobs += [group.jobs[one] for one, _ in again]
    # Give jobs in the order in which they are returned if the request is repeated.
    for job in sorted(jobs, key=lambda job: job.id):
        group.give(job, until, since, as_bytes(token), worker)
    for one, _ in repeated:
        group.extend(group.jobs[one], until)
        jobs.append(group.jobs[one])
    return jobs


def is_known(group: Group | None, receipt: Receipt) -> bool:
    """Return whether a worker with this receipt has done the job."""
    return group is not None and group.done.get(receipt.id) == receipt.attempt
