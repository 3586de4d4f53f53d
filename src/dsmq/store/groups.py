"""Jobs shared among workers: each message goes to one worker of a group and to another if it is not done in time.

Groups keep only the state of jobs: see `group`. Messages are read from the store when they are given, so they expire
and count towards limits like all others.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dsmq import logs
from dsmq.errors import BadRequest, Full, ReplyError
from dsmq.store.api import Answer, Found, ManyTopics, Message, Put, TopicMessage
from dsmq.store.group import MAX_DONE, Group, GroupCounts, HeldJob, Receipt
from dsmq.store.group_figures import GroupFigures
from dsmq.store.group_snapshots import GroupSnapshots
from dsmq.store.read_ahead import ReadAhead
from dsmq.store.selection import FAILED_SUFFIX, Selection
from dsmq.terminal import quoted

if TYPE_CHECKING:
    from dsmq.store.sqlite import SQLiteStore

# The pause before the next attempt to move a job to the topic for failed jobs.
MOVE_AGAIN_MS = 1_000
# Max jobs of a group moved to that topic while holding the lock.
MAX_MOVED = 20
# Max new jobs given to a worker at once.
MAX_NEW = 100
# Max finished jobs remembered in all groups together, apart from the last few of each.
_MAX_DONE, LEAST_DONE = 30_000, 30
# If forgetting all but these did not free enough memory, the pause before it is tried again.
FORGET_AGAIN_MS = 100

_logger = logging.getLogger(__name__)


class GroupLimits(NamedTuple):
    """Limits on groups of workers. Beyond them, TAKE raises Full."""

    max_groups: int = sys.maxsize
    max_jobs_in_flight: int = sys.maxsize
    """In each group: jobs that workers hold and those to be given again."""
    max_group_bytes: int = sys.maxsize
    """Approximate memory for all groups together."""
    max_attempts: int = 0
    """A job given this many times but not done is moved to the topic for failed jobs. 0: never."""
    max_topic_bytes: int = sys.maxsize


class Take(NamedTuple):
    """A request for jobs."""

    key: bytes
    """A topic or a pattern."""
    group: bytes
    selection: Selection
    """The topics of the key."""
    max_jobs: int
    max_bytes: int
    lease_ms: int
    token: bytes
    """A request with the token of an earlier one gets the jobs of that one that are still held. Empty: no token."""
    worker: str
    """A name for status pages."""
    is_waiting: bool = False
    """Whether the request will be repeated when there may be jobs, so a shared store may miss some at first."""


class Job(NamedTuple):
    """A message given to a worker. Times are in milliseconds."""

    topic: bytes
    id: int
    number: int
    age_ms: int
    body: bytes
    left_ms: int
    attempt: int
    """How many times it has been given, including this time."""


class Groups(GroupFigures, GroupSnapshots):
    """The groups of workers of a store. Thread-safe."""

    def __init__(self, source: SQLiteStore) -> None:
        GroupSnapshots.__init__(self)
        self.lock = threading.Lock()
        """Acquired before the store's."""
        self.limits = GroupLimits()
        self.slice_seconds = 0.0005
        """How long to search for jobs or give them again while holding the lock."""
        self.on_messages: Callable[[set[bytes]], None] = lambda _: None
        """Called with the topics into which failed jobs were put."""
        self.on_available: Callable[[tuple[bytes, bytes]], None] = lambda _: None
        """Called with a topic or pattern and a group whose waiting workers should try again."""
        self._source = source
        self._groups: dict[tuple[bytes, bytes], Group] = {}
        self._ahead = ReadAhead(self._read_next)
        self._memory = 0
        # When finished jobs may be forgotten again, because memory is short.
        self._forget_at = 0
        # Added to the counts of the current groups to get the counts since the start: what forgotten groups have
        # counted, minus what restored groups had counted before.
        self._base = GroupCounts()

    # Jobs

    def take(self, request: Take) -> Answer[list[Job] | None]:
        """Give jobs to a worker; return an empty list if there are none now, None if the search has to be continued.

        Raises Full.
        """
        with self.lock:
            now = self._source.now()
            group = self._find(request, now)
            group.end_leases(now, self.limits.max_attempts)
            try:
                return self._repeat(group, request, now) or self._take(group, request, now)
            finally:
                group.used_at = now
                self._count_memory(group)

    def _find(self, request: Take, now: int) -> Group:
        group = self._changing((request.key, request.group))
        if group is None:
            if len(self._groups) >= self.limits.max_groups:
                raise Full(f"too many groups of workers (max_groups = {self.limits.max_groups})")
            group = self._begin(request, now)
        return group

    def _changing(self, key: tuple[bytes, bytes]) -> Group | None:
        """Return a group that is about to change."""
        if self._uncopied:
            self._copy(key)
        return self._groups.get(key)

    def _begin(self, request: Take, now: int) -> Group:
        group = Group(request.key, request.group, request.selection, now)
        self._begin_counting(group)
        self._groups[request.key, request.group] = group
        return group

    def _begin_counting(self, group: Group) -> None:
        """Count messages that expire from now on; with a pattern, those of a topic from the first one taken."""
        if not group.selection.patterns:
            last, _, dropped = self._source.numbers(group.key)
            # Messages that have expired may not be deleted yet.
            found = self._source.read(group.key, 0, 1, 1)
            group.count_until(group.key, found[0].number - 1 if found else last, dropped)

    def _is_unused(self, group: Group, now: int, *, is_waiting: bool) -> bool:
        """Return whether to forget a group, because all messages given have expired.

        While others wait, it is remembered for twice as long, to count those that expire.
        """
        longest = self._source.longest_age_ms() * (2 if is_waiting else 1)
        return group.next_due is None and now - group.used_at > longest

    def _count_deleted(self, group: Group) -> bool:
        """Count messages that were deleted before they were taken; return whether others are waiting."""
        is_waiting = False
        for topic, (taken, _) in group.numbers.items():
            last, deleted, dropped = self._source.numbers(topic)
            group.count_deleted(topic, deleted, dropped)
            is_waiting = is_waiting or last > max(taken, deleted)
        return is_waiting

    def _count_memory(self, group: Group) -> None:
        """Count a group's memory after it has grown. If it has shrunk, that can wait for `expire` or `_make_room`."""
        memory = group.memory
        self._memory += memory - group.counted_memory
        group.counted_memory = memory

    def _repeat(self, group: Group, request: Take, now: int) -> list[Job]:
        """Return the jobs given for an earlier request with the same token."""
        jobs = []
        for job in group.repeat(request.token):
            if message := self._read(group, job):
                group.extend(job, now + request.lease_ms)
                jobs.append(Job(job.topic, *message, job.attempt))
        if jobs:
            # Their leases may end earlier now.
            self.on_available((group.key, group.name))
        return jobs

    def _take(self, group: Group, request: Take, now: int) -> list[Job] | None:
        jobs, is_complete = self._give_again(group, request, now)
        left = request.max_jobs - len(jobs)
        size = sum([len(job.body) for job in jobs])
        if not is_complete:
            return jobs or None
        if left <= 0 or size >= request.max_bytes:
            return jobs
        try:
            return self._give_new(group, request, now, jobs, request.max_bytes - size)
        except ReplyError:
            if jobs:
                return jobs
            raise

    def _give_new(self, group: Group, request: Take, now: int, jobs: list[Job], max_bytes: int) -> list[Job] | None:
        """Add new jobs to the jobs given to a worker."""
        room = min(self._room(group), request.max_jobs - len(jobs), MAX_NEW)
        found = self._next(group, max(1, room), max_bytes if room > 0 else 1, now)
        if found.messages and room <= 0 and not self._make_room(group, now):
            raise self._full(group)
        for message in found.messages:
            group.count_until(message.topic, message.number, self._source.dropped(message.topic))
            job = group.add(message.id, message.topic)
            group.give(job, now + request.lease_ms, now, request.token, request.worker)
            jobs.append(Job(*message, job.attempt))
        group.position = found.position
        return jobs if jobs or (found.is_complete and not found.messages) else None

    def _room(self, group: Group) -> int:
        """Return how many new jobs the limits allow. Jobs given again are not limited."""
        return self.limits.max_jobs_in_flight - group.size if self._memory < self.limits.max_group_bytes else 0

    def _make_room(self, group: Group, now: int) -> bool:
        """Forget finished jobs, oldest groups first, if memory is short; return whether there is room for a new job."""
        limit = self.limits.max_group_bytes
        if self._memory >= limit and now >= self._forget_at:
            for one in self._groups.values():
                one.forget(LEAST_DONE)
                self._count_memory(one)
                if self._memory < limit - limit // 16:
                    break
            else:
                self._forget_at = now + FORGET_AGAIN_MS
        return self._room(group) > 0

    def _full(self, group: Group) -> Full:
        limits = self.limits
        if group.size >= limits.max_jobs_in_flight:
            return Full(f"too many jobs in flight (max_jobs_in_flight = {limits.max_jobs_in_flight})")
        return Full(f"groups of workers take too much memory (max_group_bytes = {limits.max_group_bytes})")

    def _next(self, group: Group, count: int, max_bytes: int, now: int) -> Found:
        """Return the next messages not given yet."""
        if count == 1:
            return self._ahead.next(group, now, self._source.stored_state)
        return self._read_next(group, count, max_bytes)

    def _read_next(self, group: Group, count: int, max_bytes: int) -> Found:
        if group.selection.patterns:
            return self._source.read_many(ManyTopics(group.selection, group.position, count, max_bytes))
        topic = group.key
        found = [TopicMessage(topic, *one) for one in self._source.read(topic, group.position, count, max_bytes)]
        return Found(found[-1].id if found else group.position, found, is_complete=True)

    def _give_again(self, group: Group, request: Take, now: int) -> tuple[list[Job], bool]:
        """Return jobs that were given before and whether these are all that are ready or requested."""
        jobs: list[Job] = []
        size, until = 0, time.monotonic() + self.slice_seconds
        while len(jobs) < request.max_jobs and size < request.max_bytes and (job := group.next_ready()):
            try:
                message = self._read(group, job)
            except ReplyError:
                if jobs:
                    return jobs, False
                raise
            if message is not None:
                group.give(job, now + request.lease_ms, now, request.token, request.worker)
                group.counts.repeated += 1
                jobs.append(Job(job.topic, *message, job.attempt))
                size += len(message.body)
            if time.monotonic() > until:
                return jobs, False
        return jobs, True

    def _read(self, group: Group, job: HeldJob) -> Message | None:
        """Return the message of a job; if it has expired, remove the job."""
        message = self._message(job)
        if message is None:
            group.remove(job)
            group.counts.expired += 1
        return message

    def _message(self, job: HeldJob) -> Message | None:
        """Return the message of a job, unless it has expired."""
        found = self._source.read(job.topic, job.id - 1, 1, 1)
        return found[0] if found and found[0].id == job.id else None

    def done(self, key: bytes, name: bytes, receipts: Sequence[Receipt]) -> Answer[None]:
        """Finish jobs, all or none. Raises JobLost if a receipt is no longer current."""
        with self.lock:
            group = self._changing((key, name))
            was_full = group is not None and self._room(group) <= 0
            known = group.done if group else {}
            current = [one for one in dict.fromkeys(receipts) if known.get(one.id) != one.attempt]
            for receipt in current:
                group = self._check(group, receipt)
            if group:
                max_done = min(MAX_DONE, LEAST_DONE + _MAX_DONE // len(self._groups))
                for receipt in current:
                    group.finish(receipt, max_done)
                group.used_at = self._source.now()
            if was_full and group:
                self._count_memory(group)
                self.on_available((key, name))
        return None

    def give_back(self, key: bytes, name: bytes, receipt: Receipt, delay_ms: int) -> Answer[None]:
        """Make a job available again, after a delay. Raises JobLost."""
        with self.lock:
            group, now = self._check(self._changing((key, name)), receipt), self._source.now()
            group.put_back(group.jobs[receipt.id], now + delay_ms)
            group.used_at = now
            self.on_available((key, name))
        return None

    def extend(self, key: bytes, name: bytes, receipt: Receipt, lease_ms: int) -> Answer[None]:
        """Make a lease end this long from now. Raises JobLost."""
        with self.lock:
            group, now = self._check(self._changing((key, name)), receipt), self._source.now()
            group.extend(group.jobs[receipt.id], now + lease_ms)
            group.used_at = now
            # The first waiting worker may have to wake earlier.
            self.on_available((key, name))
        return None

    def _check(self, group: Group | None, receipt: Receipt) -> Group:
        if group is None or not group.is_current(receipt):
            raise receipt.not_current()
        return group

    def due_in(self, key: bytes, name: bytes) -> int:
        """Return the milliseconds after which a waiting worker should try again even without a new message."""
        with self.lock:
            group, longest = self._groups.get((key, name)), max(1, self._source.max_age_ms // 3)
            if group and group.next_ready():
                return 1
            due = group.next_due if group else None
            return longest if due is None else max(1, min(longest, due - self._source.now()))

    # Leases and failures

    def expire(self) -> bool:
        """End leases, move failed jobs, and forget long unused groups; return whether there is more to do now."""
        moved, is_done = set[bytes](), True
        for key, group in list(self._groups.items()):
            with self.lock:
                now = self._source.now()
                self._changing(key)
                group.end_leases(now, self.limits.max_attempts)
                moved |= self._move_failed(group, now)
                self._count_memory(group)
                due = group.next_due
                is_done = is_done and not group.failed and (due is None or due > now)
                if self._is_unused(group, now, is_waiting=self._count_deleted(group)):
                    self._forget(key, group)
        if moved:
            self.on_messages(moved)
        return not is_done

    def _forget(self, key: tuple[bytes, bytes], group: Group) -> None:
        self._memory -= group.counted_memory
        # The messages of its jobs have expired before a worker took them again.
        group.counts.expired += group.size
        self._base.add(group.counts)
        self._ahead.forget(group)
        del self._groups[key]

    def _move_failed(self, group: Group, now: int) -> set[bytes]:
        """Move failed jobs to their topics or try again later; return the topics."""
        moved = set()
        for job in group.failed[:MAX_MOVED]:
            try:
                if message := self._read(group, job):
                    put = failed_put(job, message.body, self.limits)
                    self._source.append([put])
                    group.counts.failed += 1
                    group.remove(job)
                    moved.add(put[0])
            except ReplyError as error:
                count_unmoved(group, job, error)
                group.put_back(job, now + MOVE_AGAIN_MS)
        del group.failed[:MAX_MOVED]
        return moved


def failed_put(job: HeldJob, body: bytes, limits: GroupLimits, key: tuple[bytes, int] | None = None) -> Put:
    """Return the put into the topic for failed jobs. Raises BadRequest."""
    topic = job.topic + FAILED_SUFFIX
    if len(topic) > limits.max_topic_bytes:
        raise BadRequest(f"a topic may have at most {limits.max_topic_bytes} bytes, not {len(topic)}")
    return topic, body, key


def count_unmoved(group: Group, job: HeldJob, error: Exception) -> None:
    """Count an unsuccessful attempt to move a failed job to its topic and log the group's first."""
    if not group.counts.unmoved:
        topic = job.topic.decode()
        name, about = quoted(topic + FAILED_SUFFIX.decode()), logs.event("job_not_moved", topic=topic)
        _logger.warning("failed jobs can't be moved to topic %s: %s", name, error, extra=about)
    group.counts.unmoved += 1
