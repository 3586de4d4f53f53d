"""The jobs of one group of workers: the messages that they have taken and those to be given again.

A group gives out the messages of a topic, or of the topics that match a pattern, in the order of ids. It remembers the
last id given out and the jobs up to that id that are not done: those held by a worker, until its lease ends, and those
waiting to be given again.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from dsmq.errors import JobLost

if TYPE_CHECKING:
    from dsmq.store.selection import Selection

# The approximate memory for a group, an unfinished job, its lease or delay, the token of a request, and a finished job.
GROUP_BYTES, JOB_BYTES, DUE_BYTES, TOKEN_BYTES, DONE_BYTES = 1_300, 250, 100, 250, 90
# The approximate memory for a topic's last number, without the topic's name.
NUMBER_BYTES = 160
# Max jobs remembered as done, so that a worker can repeat DONE if it got no reply.
MAX_DONE = 10_000
# Max leases ended at once.
_MAX_ENDED = 200
# Max topics whose last numbers are remembered, to count messages that expired before they were taken.
MAX_NUMBERS = 200
# Values of `HeldJob.until` that are not times: the job can be given now or was given too often.
READY, FAILED = -1, -2


class Receipt(NamedTuple):
    """Identifies a job given to a worker."""

    id: int
    attempt: int

    def not_current(self) -> JobLost:
        """Return the error for a job that its worker no longer holds."""
        return JobLost(f"attempt {self.attempt} of job {self.id} is not the current one")


@dataclass(slots=True)
class GroupCounts:
    """Counts of jobs since the group began."""

    taken: int = 0
    """Given for the first time."""
    repeated: int = 0
    """Given again."""
    done: int = 0
    failed: int = 0
    """Moved to the topic for failed jobs."""
    unmoved: int = 0
    """Unsuccessful attempts to move a job there, for example because that topic is full."""
    expired: int = 0
    """Messages that expired before they were taken or given again."""
    dropped: int = 0
    """Messages that their topic dropped before they were taken."""

    def add(self, other: GroupCounts, times: int = 1) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


@dataclass(slots=True)
class HeldJob:
    """A job that is not done."""

    id: int
    topic: bytes
    attempt: int = 0
    until: int = READY
    """When its lease or delay ends."""
    is_held: bool = False
    """Whether a worker may still finish this attempt: even after its lease, until the job is given again."""
    since: int = 0
    """When the current worker got it."""
    token: bytes = b""
    worker: str = ""
    version: int = 0
    """The id of the fact that last changed it, with a shared store."""

    @property
    def is_in_flight(self) -> bool:
        """Whether a worker holds it and its lease is not over."""
        return self.is_held and self.until >= 0


@dataclass(slots=True)
class Group:
    """A group of workers. Times are in milliseconds on the store's clock."""

    key: bytes
    """The topic or pattern."""
    name: bytes
    selection: Selection
    used_at: int
    position: int = 0
    """All messages up to this id have been given."""
    counted_memory: int = 0
    """This group's share of the counted memory of all groups."""
    other_bytes: int = GROUP_BYTES
    """The approximate memory for the group itself, for `numbers`, and for the names of the jobs' topics."""
    jobs: dict[int, HeldJob] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    """The attempts that finished jobs, by the jobs' ids."""
    numbers: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """For each topic: the last number given or counted, and the number of messages that it had dropped by then."""
    counts: GroupCounts = field(default_factory=GroupCounts)
    in_flight: int = 0
    """The number of jobs that are in flight."""
    _tokens: dict[bytes, list[Receipt]] = field(default_factory=dict)
    _due: list[tuple[int, int]] = field(default_factory=list)
    # Like `_due`, may contain outdated entries.
    _ready: list[int] = field(default_factory=list)
    failed: list[HeldJob] = field(default_factory=list)
    """Jobs that were given too often."""

    @property
    def memory(self) -> int:
        jobs = JOB_BYTES * len(self.jobs) + DUE_BYTES * len(self._due) + TOKEN_BYTES * len(self._tokens)
        return self.other_bytes + jobs + DONE_BYTES * len(self.done)

    @property
    def size(self) -> int:
        """The number of jobs that are not done."""
        return len(self.jobs)

    @property
    def next_due(self) -> int | None:
        """When the next lease or delay ends, or an earlier time; None if there is none."""
        return self._due[0][0] if self._due else None

    def restore(self, job: HeldJob) -> None:
        """Add a job from a saved state."""
        job.topic = self._own(job.topic)
        self.jobs[job.id] = job
        self.in_flight += job.is_in_flight
        self._remember_token(job)
        if job.until == FAILED:
            self.failed.append(job)
        elif job.until == READY:
            heapq.heappush(self._ready, job.id)
        else:
            self._await(job, job.until)

    def repeat(self, token: bytes) -> list[HeldJob]:
        """Return the jobs given for a token that are still held."""
        receipts = self._tokens.get(token, ())
        return [self.jobs[receipt.id] for receipt in receipts if self.is_current(receipt)]

    def add(self, message_id: int, topic: bytes) -> HeldJob:
        """Add a job for a message that is given for the first time."""
        job = self.jobs[message_id] = HeldJob(message_id, self._own(topic))
        self.counts.taken += 1
        return job

    def _own(self, topic: bytes) -> bytes:
        """Return the name of a job's topic, after counting its memory."""
        if topic == self.key:
            # All jobs share one object.
            return self.key
        self.other_bytes += len(topic)
        return topic

    def next_ready(self) -> HeldJob | None:
        """Return the oldest job to be given again, if there is one. It stays available until it is given or removed."""
        while self._ready:
            job = self.jobs.get(self._ready[0])
            if job is not None and job.until == READY:
                return job
            heapq.heappop(self._ready)
        return None

    def give(self, job: HeldJob, until: int, now: int, token: bytes, worker: str) -> None:
        self._forget_token(job)
        job.attempt += 1
        job.is_held, job.since, job.worker, job.token = True, now, worker, token
        self._remember_token(job)
        self._await(job, until)

    def _await(self, job: HeldJob, until: int) -> None:
        if job.is_held and job.until < 0:
            self.in_flight += 1
        job.until = until
        heapq.heappush(self._due, (until, job.id))
        if len(self._due) > 2 * len(self.jobs) + 64:
            # Most entries belong to finished jobs.
            self._due = [(job.until, job.id) for job in self.jobs.values() if job.until >= 0]
            heapq.heapify(self._due)

    def end_leases(self, now: int, max_attempts: int) -> None:
        """Make some jobs whose lease or delay has ended available again, unless they were given too often."""
        if len(self._ready) > 2 * len(self.jobs) + 64:
            # Most of these leases were extended after they had ended.
            self._ready = [job.id for job in self.jobs.values() if job.until == READY]
            heapq.heapify(self._ready)
        for _ in range(_MAX_ENDED):
            if not self._due or self._due[0][0] > now:
                break
            until, message_id = heapq.heappop(self._due)
            job = self.jobs.get(message_id)
            if job is None or job.until != until:
                continue
            self.in_flight -= job.is_held
            if max_attempts and job.attempt >= max_attempts:
                self._fail(job)
            else:
                job.until = READY
                heapq.heappush(self._ready, message_id)

    def _fail(self, job: HeldJob) -> None:
        self._forget_token(job)
        job.is_held, job.until = False, FAILED
        self.failed.append(job)

    def is_current(self, receipt: Receipt) -> bool:
        """Return whether the worker with this receipt may still finish the job."""
        job = self.jobs.get(receipt.id)
        return job is not None and job.is_held and job.attempt == receipt.attempt

    def finish(self, receipt: Receipt, max_done: int) -> None:
        """Finish a current job and remember it as one of the last `max_done`."""
        self.counts.done += 1
        self.remove(self.jobs[receipt.id])
        self.done[receipt.id] = receipt.attempt
        if len(self.done) > max_done:
            # Delete many at once, because finding the first key of a dict after deleted ones takes time.
            for message_id in list(islice(self.done, 1 + max_done // 16)):
                del self.done[message_id]

    def extend(self, job: HeldJob, until: int) -> None:
        """Change when a job's lease or delay ends."""
        self._await(job, until)

    def put_back(self, job: HeldJob, until: int) -> None:
        """Take a job from its worker; it is given again at the time `until`."""
        self._forget_token(job)
        self.in_flight -= job.is_in_flight
        job.is_held, job.token, job.worker = False, b"", ""
        self._await(job, until)

    def remove(self, job: HeldJob) -> None:
        self._forget_token(job)
        self.in_flight -= job.is_in_flight
        if job.topic is not self.key:
            self.other_bytes -= len(job.topic)
        del self.jobs[job.id]

    def _remember_token(self, job: HeldJob) -> None:
        if job.token:
            self._tokens.setdefault(job.token, []).append(Receipt(job.id, job.attempt))

    def _forget_token(self, job: HeldJob) -> None:
        receipts = self._tokens.get(job.token)
        if receipts is not None:
            receipts[:] = [receipt for receipt in receipts if receipt.id != job.id]
            if not receipts:
                del self._tokens[job.token]

    def count_until(self, topic: bytes, number: int, dropped: int) -> None:
        """Count a topic's messages before this number that were not taken; the topic has dropped `dropped` so far.

        Counting starts with the first call. If the topic's numbers restart, nothing is missing.
        """
        last = self.numbers.pop(topic, None)
        if last is None:
            self.other_bytes += NUMBER_BYTES + len(topic)
        else:
            self._count_untaken(last, number - 1, dropped)
        self.numbers[topic] = number, dropped
        if len(self.numbers) > MAX_NUMBERS:
            self._forget_numbers(1)

    def count_deleted(self, topic: bytes, number: int, dropped: int) -> None:
        """Count a topic's messages up to this number that were deleted before they were taken."""
        last = self.numbers[topic]
        self._count_untaken(last, number, dropped)
        # If no more than the messages taken were deleted, later ones were not among those dropped so far.
        self.numbers[topic] = max(number, last[0]), dropped

    def _count_untaken(self, last: tuple[int, int], number: int, dropped: int) -> None:
        if (missing := number - last[0]) > 0:
            were_dropped = min(missing, max(0, dropped - last[1]))
            self.counts.dropped += were_dropped
            self.counts.expired += missing - were_dropped

    def _forget_numbers(self, count: int) -> None:
        """Forget the numbers of the topics from which no job was given for longest."""
        forgotten = list(islice(self.numbers, count))
        for topic in forgotten:
            del self.numbers[topic]
        self.other_bytes -= NUMBER_BYTES * count + sum(map(len, forgotten))

    def forget(self, least: int) -> None:
        """Forget all finished jobs and all numbers but the last `least`."""
        self._forget_numbers(max(0, len(self.numbers) - least))
        if len(self.done) > least:
            # Deleting keys of a dict would not free its memory.
            self.done = dict(islice(self.done.items(), len(self.done) - least, None))
