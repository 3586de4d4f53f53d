"""The figures of groups of workers, for operators."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from dsmq.store.group import Group, GroupCounts, HeldJob

if TYPE_CHECKING:
    from dsmq.store.sqlite import SQLiteStore

# Max groups described for a client at once and max seconds spent on that.
MAX_FIRST, _FIRST_SECONDS = 20, 0.002
# Max jobs tried to find the oldest one whose message has not expired.
_MAX_PEEKS = 10
# How many jobs to list before other threads may run.
_JOBS_AT_ONCE = 1_000


class GroupStats(NamedTuple):
    key: bytes
    """The topic or pattern."""
    name: bytes
    held: int
    """Jobs that workers hold and may still finish."""
    again: int
    """Jobs that wait to be given again."""
    counts: GroupCounts
    waiting: int
    """Messages not given yet; if a pattern matches more than 1,000 topics, all messages after the last one given."""
    oldest_age_ms: int
    """Age of the oldest message that is not done; 0 if there is none."""

    @property
    def states(self) -> dict[str, int]:
        """Return the number of messages in each state."""
        return {"waiting": self.waiting, "held": self.held, "again": self.again}

    @property
    def figures(self) -> dict[str, int]:
        return {**self.states, **asdict(self.counts), "oldest_age_ms": self.oldest_age_ms}


class GroupFigures:
    """Reports on all groups; part of `Groups`. No method holds a lock for long."""

    lock: Lock
    _source: SQLiteStore
    _groups: dict[tuple[bytes, bytes], Group]
    _memory: int
    _base: GroupCounts

    @property
    def count(self) -> int:
        return len(self._groups)

    @property
    def memory(self) -> int:
        return self._memory

    def counts(self) -> GroupCounts:
        """Return the sums over all groups since the start, including forgotten ones."""
        found = GroupCounts()
        for counts in (self._base, *[group.counts for group in list(self._groups.values())]):
            found.add(counts)
        return found

    def stats(
        self, is_wanted: Callable[[Group], bool] = lambda _: True, seconds: float = 0.001
    ) -> Iterator[GroupStats]:
        """Iterate over groups in the order in which they began; match the topics of each for up to `seconds`."""
        for group in list(self._groups.values()):
            if is_wanted(group):
                yield self._describe(group, time.monotonic() + seconds)

    def first_stats(self, is_wanted: Callable[[Group], bool] = lambda _: True) -> Iterator[GroupStats]:
        """Iterate over the first groups: at least one, and as many as fit without delaying other clients."""
        until = time.monotonic() + _FIRST_SECONDS
        for stats in islice(self.stats(is_wanted, 0.0), MAX_FIRST):
            yield stats
            if time.monotonic() >= until:
                return

    def _describe(self, group: Group, until: float) -> GroupStats:
        with self.lock:
            held, again = group.in_flight, len(group.jobs) - group.in_flight
            # Jobs are in the order in which they were first given, which is the order of their ids.
            oldest = list(islice(group.jobs.values(), _MAX_PEEKS))
            position, counts = group.position, replace(group.counts)
            given = {topic: number for topic, (number, _) in group.numbers.items()}
        waiting, age_ms = self._source.backlog(group.selection, position, given, until)
        for job in oldest:
            message = self._source.peek(job.topic, job.id + 1)
            if message is not None and message.id == job.id:
                age_ms = message.age_ms
                break
        return GroupStats(group.key, group.name, held, again, counts, waiting, age_ms)

    def held(self, topic: bytes, count: int) -> list[tuple[Group, HeldJob, int]]:
        """Return the jobs of a topic that workers hold, longest first, each with its group and milliseconds held."""
        found = heapq.nsmallest(count, self._in_flight(topic), key=lambda one: one[1].since)
        now = self._source.now()
        return [(*one, now - one[1].since) for one in found]

    def _in_flight(self, topic: bytes) -> Iterator[tuple[Group, HeldJob]]:
        for group in list(self._groups.values()):
            if group.selection.matches(topic):
                with self.lock:
                    jobs = list(group.jobs.values())
                for number, job in enumerate(jobs):
                    if not number % _JOBS_AT_ONCE:
                        # Let other threads run.
                        time.sleep(0)
                    if job.is_in_flight and job.topic == topic:
                        yield group, job
