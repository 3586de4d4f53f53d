"""Groups of workers over NATS: each change is a fact in the stream, which all mirrors apply in the same order.

A server publishes a fact and answers once its own mirror has it, because only then is it known whether the fact still
applied: see `nats_group_plan`. If not, it plans again. For each group, a server has at most one fact with jobs to give
in flight; requests that arrive meanwhile share the next.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from dsmq.errors import ReplyError, StoreFailed
from dsmq.store.api import Answer, Message, Outcome
from dsmq.store.group import FAILED, Group, HeldJob, Receipt
from dsmq.store.groups import MAX_MOVED, MOVE_AGAIN_MS, Groups, Job, Take, count_unmoved, failed_put
from dsmq.store.nats_group_facts import GroupFacts, Key
from dsmq.store.nats_group_plan import Plan, Refused, SharedGroup, is_known

if TYPE_CHECKING:
    from dsmq.store.nats import NATSStore
    from dsmq.store.sqlite import MirrorStore

# While a group is used without changing, facts keep it from being forgotten, this many per max_age.
_USES_PER_MAX_AGE = 4


@dataclass(slots=True, eq=False)
class _Asked:
    """A request for jobs."""

    request: Take
    answer: Future[list[Job] | None] = field(default_factory=Future)
    is_later: bool = False
    """Whether it is answered later."""
    is_fresh: bool = False
    """Whether the mirror has everything that the engine had when the request arrived."""
    jobs: list[Job] = field(default_factory=list)


@dataclass(slots=True)
class _Lane:
    """The requests for jobs of a group."""

    queue: deque[_Asked] = field(default_factory=deque)
    is_busy: bool = False
    """Whether a fact is in flight."""


class NATSGroups(GroupFacts, Groups):
    """The groups of workers of a stream. Thread-safe."""

    _groups: dict[Key, SharedGroup]  # type: ignore[assignment]
    _source: MirrorStore
    _done, _give_back, _extend = Groups.done, Groups.give_back, Groups.extend

    def __init__(self, engine: NATSStore) -> None:
        """There is no source until `begin`."""
        GroupFacts.__init__(self, engine)
        Groups.__init__(self, None)  # type: ignore[arg-type]
        self.lock = threading.RLock()  # type: ignore[assignment]
        self._lanes: dict[Key, _Lane] = {}
        # The failed jobs, by id, and unused groups (id 0) about which a fact is in flight.
        self._ending: set[tuple[Key, int]] = set()

    # Requests

    def take(self, request: Take) -> Answer[list[Job] | None]:
        asked, key = _Asked(request), (request.key, request.group)
        with self.lock:
            self._add(key, asked)
            asked.is_later = True
        return asked.answer.result() if asked.answer.done() else asked.answer

    def done(self, key: bytes, name: bytes, receipts: Sequence[Receipt]) -> Answer[None]:
        return self._settle((key, name), receipts, "done", [list(one) for one in dict.fromkeys(receipts)])

    def give_back(self, key: bytes, name: bytes, receipt: Receipt, delay_ms: int) -> Answer[None]:
        return self._settle((key, name), [receipt], "return", *receipt, delay_ms)

    def extend(self, key: bytes, name: bytes, receipt: Receipt, lease_ms: int) -> Answer[None]:
        return self._settle((key, name), [receipt], "extend", *receipt, lease_ms)

    def _settle(self, key: Key, receipts: Sequence[Receipt], what: str, *values: object) -> Answer[None]:
        answer: Future[None] = Future()
        try_now = partial(self._try_to_settle, answer, key, receipts, what, *values)
        if not try_now():
            # The mirror may lag.
            self._engine.when_fresh(partial(self._settle_fresh, answer, try_now, receipts))
        return answer.result() if answer.done() else answer

    def _try_to_settle(
        self, answer: Future[None], key: Key, receipts: Sequence[Receipt], what: str, *values: object
    ) -> bool:
        """Publish a change to jobs that a worker holds; return False if it no longer holds one of them."""
        with self.lock:
            group = self._groups.get(key)
            is_repeated = what == "done" and all(is_known(group, one) for one in receipts)
            if not (is_repeated or all(self._is_current(group, one, what) for one in receipts)):
                return False
        if is_repeated:
            answer.set_result(None)
        else:
            self._publish(partial(_answer, answer), what, key, *values)
        return True

    def _is_current(self, group: SharedGroup | None, receipt: Receipt, what: str) -> bool:
        return group is not None and (group.is_current(receipt) or (what == "done" and is_known(group, receipt)))

    def _settle_fresh(
        self, answer: Future[None], try_now: Callable[[], bool], receipts: Sequence[Receipt], error: Exception | None
    ) -> None:
        try:
            if error is None and not try_now():
                error = receipts[0].not_current()
        except ReplyError as failed:
            error = failed
        if error is not None:
            answer.set_exception(error)

    def expire(self) -> bool:
        is_done = True
        # While the mirror catches up, it may delete messages before it knows that they were taken.
        for key, group in list(self._groups.items()) if self._engine.mirror.ready else ():
            with self.lock:
                now = self._source.now()
                group.end_leases(now, self.limits.max_attempts)
                due = group.next_due
                is_done = is_done and (due is None or due > now)
                failed = self._failed(key, group)
                is_unused = self._is_unused(group, now, is_waiting=self._count_deleted(group))
            if is_unused:
                self._end(key, 0, "forget", group.changed_by)
            for job in failed:
                if job.is_held:
                    self._end(key, job.id, "end", job.id, job.version)
                elif job.id <= self._source.last_id():
                    self._move(key, group, job)
        return not is_done

    # Giving jobs

    def _read(self, group: Group, job: HeldJob) -> Message | None:
        if job.id > self._source.last_id():
            # Otherwise, the job would count as expired.
            raise StoreFailed("the mirror does not have the message of a job yet")
        return super()._read(group, job)

    def _add(self, key: Key, asked: _Asked) -> None:
        lane = self._lanes.setdefault(key, _Lane())
        lane.queue.append(asked)
        if not lane.is_busy:
            self._plan_next(key, lane)

    def _plan_next(self, key: Key, lane: _Lane) -> None:
        """Plan jobs for the requests of a group and publish the plan. Requires the lock."""
        plan: Plan | None = None
        given: list[_Asked] = []
        while lane.queue and (plan is None or self._has_room(plan, lane.queue[0].request)):
            asked = lane.queue.popleft()
            try:
                plan = plan or self._new_plan(asked.request)
                if self._fill(plan, asked):
                    given.append(asked)
            except ReplyError as error:
                self._refuse(key, asked, error)
        if plan is not None and plan.has_changes:
            lane.is_busy = True
            self._publish(partial(self._on_given, key, plan, given), "take", key, *plan.fact())
            return
        if plan is not None:
            plan.release()
            plan.group.searched = max(plan.group.searched, plan.position)
        self._plan_rest(key, lane)

    def _plan_rest(self, key: Key, lane: _Lane) -> None:
        """Plan jobs for the requests that are left, if any, in another time slice."""
        if lane.queue:
            with suppress(StoreFailed):
                self._engine.post(partial(self._resume, key))
        else:
            del self._lanes[key]

    def _has_room(self, plan: Plan, request: Take) -> bool:
        # Two requests with the same token get the same jobs, once all servers know them.
        return plan.room > 0 and not (request.token and request.token in plan.tokens)

    def _new_plan(self, request: Take) -> Plan:
        """Raises Full."""
        now = self._source.now()
        group: SharedGroup = self._find(request, now)  # type: ignore[assignment]
        group.end_leases(now, self.limits.max_attempts)
        plan = Plan.of(group, self._engine.max_message_bytes, self.limits.max_topic_bytes)
        is_new = (group.key, group.name) not in self._groups
        if is_new:
            self._begin_counting(plan)
        plan.is_use = is_new or now - group.used_at > self._source.max_age_ms / _USES_PER_MAX_AGE
        return plan

    def _make_room(self, group: Group, now: int) -> bool:  # noqa: ARG002
        # All servers have to remember the same.
        return self._room(group) > 0

    def _begin(self, request: Take, now: int) -> SharedGroup:
        # The plan creates the group on all servers.
        return SharedGroup(request.key, request.group, request.selection, now)

    def _fill(self, plan: Plan, asked: _Asked) -> bool:
        """Plan jobs for a request; return False if the request is answered in another way. Raises ReplyError."""
        request, now = plan.begin(asked.request), self._source.now()
        found = self._repeat(plan, request, now) or self._take(plan, request, now)
        asked.jobs = found or []
        if found or plan.is_use:
            return True
        if found is None and asked.is_later:
            # Continue in another time slice.
            self._go_on_soon((request.key, request.group), asked)
        elif found is None:
            asked.answer.set_result(None)
        else:
            self._refuse((request.key, request.group), asked, None)
        return False

    def _refuse(self, key: Key, asked: _Asked, error: ReplyError | None) -> None:
        """Answer without jobs or with an error. First try again with a fresh mirror, unless a stale answer will do."""
        may_be_stale = asked.request.is_waiting and not isinstance(error, StoreFailed)
        if not (asked.is_fresh or may_be_stale):
            asked.is_fresh = True
            self._engine.when_fresh(partial(self._go_on, key, asked))
        elif error is None:
            asked.answer.set_result([])
        else:
            asked.answer.set_exception(error)

    def _go_on_soon(self, key: Key, asked: _Asked) -> None:
        try:
            self._engine.post(partial(self._go_on, key, asked, None))
        except StoreFailed as error:
            asked.answer.set_exception(error)

    def _go_on(self, key: Key, asked: _Asked, error: Exception | None) -> None:
        if error is not None:
            asked.answer.set_exception(error)
            return
        with self.lock:
            self._add(key, asked)

    def _on_given(self, key: Key, plan: Plan, given: list[_Asked], error: Exception | None) -> None:
        with self.lock:
            plan.release()
            lane = self._lanes[key]
            lane.is_busy = False
            if isinstance(error, Refused):
                # Another server was first.
                lane.queue.extendleft(reversed(given))
            else:
                for asked in given:
                    self._answer(lane, asked, error)
            self._plan_rest(key, lane)

    def _answer(self, lane: _Lane, asked: _Asked, error: Exception | None) -> None:
        if error is None and not (asked.jobs or asked.is_fresh or asked.request.is_waiting):
            # The fact follows all messages that the engine had when the request arrived.
            asked.is_fresh = True
            lane.queue.append(asked)
        else:
            _answer(asked.answer, error, asked.jobs)

    def _resume(self, key: Key) -> None:
        with self.lock:
            lane = self._lanes.get(key)
            if lane is not None and not lane.is_busy:
                self._plan_next(key, lane)

    # Failed jobs

    def _failed(self, key: Key, group: SharedGroup) -> list[HeldJob]:
        """Return some failed jobs. Requires the lock."""
        failed = {job.id: job for job in group.failed if job.until == FAILED and group.jobs.get(job.id) is job}
        group.failed = list(failed.values())
        return [job for job in group.failed if (key, job.id) not in self._ending][:MAX_MOVED]

    def _end(self, key: Key, job_id: int, what: str, *values: object) -> None:
        """Publish a fact about a failed job or about an unused group (0), unless one is in flight."""
        ending = key, job_id
        if ending not in self._ending:
            self._ending.add(ending)
            self._publish(lambda _: self._ending.discard(ending), what, key, *values)

    def _move(self, key: Key, group: SharedGroup, job: HeldJob) -> None:
        """Move a failed job to its topic, once, even if several servers try."""
        message = self._message(job)
        if message is None:
            self._end(key, job.id, "remove", job.id, job.version, "expired")
            return
        names = hashlib.sha256(b"%d:%b%b" % (len(key[0]), *key)).hexdigest()[:24]
        self._ending.add((key, job.id))
        answer: Answer[list[Outcome]]
        try:
            put = failed_put(job, message.body, self.limits, (b"failed-%b-%d" % (names.encode(), job.id), 1))
            answer = self._engine.append([put])
        except ReplyError as error:
            answer = [error]
        finish = partial(self._on_moved, key, group, job)
        if isinstance(answer, Future):
            answer.add_done_callback(lambda stored: finish(stored.exception() or stored.result()[0]))
        else:
            finish(answer[0])

    def _on_moved(self, key: Key, group: SharedGroup, job: HeldJob, outcome: object) -> None:
        self._ending.discard((key, job.id))
        if not isinstance(outcome, Exception):
            self._end(key, job.id, "remove", job.id, job.version, "failed")
            return
        with self.lock:
            count_unmoved(group, job, outcome)
            group.extend(job, self._source.now() + MOVE_AGAIN_MS)


def _answer(answer: Future[Any], error: Exception | None, result: object = None) -> None:
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)
