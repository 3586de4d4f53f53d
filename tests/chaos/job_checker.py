"""Checks the promises to workers against a history of their jobs. Does no input or output.

A killed server forgets what it did since its last snapshot, so what workers saw before the kill proves nothing
afterwards.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise

from chaos.checker import AGE_SLACK_SECONDS, Check, Violation
from chaos.history import History, JobFailed, NoJob, Put, Sent, Settled, Taken

# How much too early a lease may end, because times are rounded to milliseconds.
LEASE_SLACK_SECONDS = 0.01
# How long a job may be available while a worker waits for one.
IDLE_SLACK_SECONDS = 1.0

Key = tuple[str, str]


def check_jobs(history: History) -> list[Violation]:
    """Return the violations in a history of workers."""
    return list(_JobCheck(history).run())


def unfinished(history: History, key: Key) -> list[Put]:
    """Return the puts whose jobs a group still has to do."""
    return list(_JobCheck(history).unfinished(key))


def covers(key: str, topic: str) -> bool:
    """Return whether a topic or pattern, which may end in `*`, includes a topic."""
    return topic.startswith(key[:-1]) if key.endswith("*") else topic == key


class _JobCheck:
    def __init__(self, history: History) -> None:
        self.history, self.store = history, Check(history)
        lives = self.store.servers
        self.kills = [one for one, following in pairwise(lives) if one.run != following.run]
        self.sent: dict[Key, list[Sent]] = defaultdict(list)
        self.taken: dict[Key, dict[str, list[Taken]]] = defaultdict(lambda: defaultdict(list))
        self.empty: dict[Key, list[NoJob]] = defaultdict(list)
        self.settled: dict[Key, dict[str, list[Settled]]] = defaultdict(lambda: defaultdict(list))
        for sent in history.of(Sent):
            self.sent[sent.key, sent.group].append(sent)
        for taken in history.of(Taken):
            self.taken[taken.key, taken.group][taken.body].append(taken)
        for empty in history.of(NoJob):
            self.empty[empty.key, empty.group].append(empty)
        # The record with the reply replaces the one made before.
        for settled in {(one.worker, one.body, one.verb, one.began): one for one in history.of(Settled)}.values():
            self.settled[settled.key, settled.group][settled.body].append(settled)
        self.failed = {one.body: one for one in history.of(JobFailed)}

    def run(self) -> Iterator[Violation]:
        for key in self.sent:
            yield from self._never_done(key)
            yield from self._attempts(key)
            yield from self._order(key)
            yield from self._idle(key)
            for body, taken in self.taken[key].items():
                settled = self.settled[key][body]
                yield from self._strange(taken)
                yield from self._two_at_once(taken, settled)
                yield from self._after_done(taken, settled)
                yield from self._lost(taken, settled)
        yield from self._failures()

    # Each job is done

    def unfinished(self, key: Key) -> Iterator[Put]:
        for put in self.store.puts.values():
            if (
                put.id is not None
                and covers(key[0], put.topic)
                and put.body not in self.failed
                and not any(_may_be_done(one) for one in self.settled[key][put.body])
                and self.store.loss_of(put) is None
            ):
                yield put

    def _never_done(self, key: Key) -> Iterator[Violation]:
        end = max(one.began for one in self.sent[key])
        for put in self.unfinished(key):
            if end < put.began + self.history.max_age:
                yield Violation("not done", f"{key}: a job was never done", (put, *self.taken[key][put.body]))

    def _strange(self, taken: list[Taken]) -> Iterator[Violation]:
        for one in taken:
            put = self.store.puts.get(one.body)
            if put is None or put.topic != one.topic or not covers(one.key, one.topic) or one.ended < put.began:
                yield Violation("strange job", "nobody put this job", (one,))
            elif put.error and not put.may_be_stored:
                yield Violation("strange job", "its put was not stored", (put, one))
            elif put.id not in (None, one.id):
                yield Violation("strange job", "it has another id", (put, one))
            elif one.sent - put.ended > self.history.max_age + AGE_SLACK_SECONDS:
                yield Violation("strange job", "it has expired", (put, one))

    # Kills

    def _forgotten(self, event: Taken | Settled, later: float) -> bool:
        """Return whether the server may have forgotten an event by that time."""
        return any(event.began < kill.ended < later and event.ended > kill.kept_until for kill in self.kills)

    def _collides(self, one: Taken, taken: Iterable[Taken]) -> bool:
        """Return whether a worker had the same receipt before a kill, so that the server takes it for this worker."""
        others = (other for other in taken if other.attempt == one.attempt and other.worker != one.worker)
        return any(self._forgotten(other, one.ended) for other in others)

    # Leases

    def _held_until(self, taken: Taken, settled: list[Settled], at: float) -> float:
        """Return until when a worker holds a job, as far as it knows at a time, unless it ends the job itself."""
        until = taken.sent + taken.lease
        for one in settled:
            if one.verb == "extend" and one.began <= at and _is_of(one, taken):
                # JOBLOST may answer a repetition, if the first reply was lost, and the lease that the request shortened
                # has ended.
                is_sure = one.reply != "JOBLOST" and one.ended <= at and not self._forgotten(one, math.inf)
                until = one.began + one.seconds if is_sure else min(until, one.began + one.seconds)
        return until - LEASE_SLACK_SECONDS

    def _two_at_once(self, taken: list[Taken], settled: list[Settled]) -> Iterator[Violation]:
        for pair in combinations(taken, 2):
            one, two = sorted(pair, key=lambda one: (one.attempt, one.began))
            if self._forgotten(one, two.ended) or self._forgotten(two, one.ended) or self._collides(one, taken):
                continue
            until = min([self._held_until(one, settled, two.ended), *_ends(one, settled)])
            if two.attempt == one.attempt:
                yield Violation("two at once", "two workers have the same attempt", (one, two))
            elif two.ended < until:
                yield Violation("two at once", "a job is given again within its lease", (one, two))

    def _after_done(self, taken: list[Taken], settled: list[Settled]) -> Iterator[Violation]:
        """A job that is done is neither given nor done again, and is not done by a worker that has lost it."""
        if any(self._forgotten(one, math.inf) for one in taken):
            taken, forgotten = [one for one in taken if not self._collides(one, taken)], True
        else:
            forgotten = False
        done = [one for one in settled if one.verb == "done" and one.reply == "OK"]
        for one in done:
            for two in taken:
                if two.sent > one.ended and not self._forgotten(one, two.ended):
                    yield Violation("given after done", "a job is given again although it is done", (one, two))
                if (
                    two.attempt > one.attempt
                    and two.ended < one.began
                    and not (forgotten or self._forgotten(two, one.ended))
                ):
                    yield Violation("done late", "a job is done by a worker that has lost it", (two, one))
        for one, two in combinations(sorted(done, key=lambda one: one.ended), 2):
            if (one.worker, one.attempt) != (two.worker, two.attempt) and not (
                forgotten or self._forgotten(one, two.ended)
            ):
                yield Violation("done twice", "two workers have done a job", (one, two))

    def _lost(self, taken: list[Taken], settled: list[Settled]) -> Iterator[Violation]:
        """A worker loses a job only after its lease."""
        if any(self._forgotten(one, math.inf) for one in taken):
            return
        for one in taken:
            mine = [event for event in settled if _is_of(event, one)]
            for event in mine:
                # DONE may be sent again.
                ends = {"return"} if event.verb == "done" else {"return", "done"}
                is_ended = any(other.verb in ends and other.began < event.began for other in mine)
                is_first = not is_ended and (event.sends == 1 or event.verb != "return")
                is_held = event.ended < self._held_until(one, mine, event.began)
                if event.reply == "JOBLOST" and is_first and is_held:
                    yield Violation("lost early", "a worker has lost a job within its lease", (one, event))

    # Attempts

    def _attempts(self, key: Key) -> Iterator[Violation]:
        """Attempts increase by one. An attempt that nobody got belongs to a TAKE whose reply was lost."""
        if self.history.has_holes:
            # The server may give jobs to connections that are lost without its knowledge.
            return
        unanswered = [one for one in self.sent[key] if self._is_unanswered(one, key)]
        missing: list[Taken] = []
        for taken in self.taken[key].values():
            known = {one.attempt for one in taken}
            for one in taken:
                missing += [one] * (one.attempt > 1 and one.attempt - 1 not in known)
        for one in missing:
            if not any(sent.began < one.ended for sent in unanswered):
                yield Violation("attempt", f"{key}: nobody had the attempt before", (one,))
        capacity = sum(one.count for one in unanswered)
        if len(missing) > capacity:
            yield Violation("attempt", f"{key}: {len(missing)} attempts are unknown, not {capacity}", (missing[0],))

    def _is_unanswered(self, sent: Sent, key: Key) -> bool:
        """Return whether jobs may have been given to this request without anybody knowing."""
        answer = self._answers(key).get(sent.token)
        if answer is None:
            return True
        # The same token gets the same jobs, while they are held. The client may have sent it again, unseen by its
        # worker.
        return answer.ended > sent.began + sent.lease

    def _answers(self, key: Key) -> dict[str, Taken | NoJob]:
        known = self.__dict__.setdefault("_known_answers", {})
        if key not in known:
            known[key] = {one.token: one for one in self.empty[key]}
            known[key] |= {one.token: one for taken in self.taken[key].values() for one in taken}
        return known[key]  # type: ignore[no-any-return]

    # Queues

    def _order(self, key: Key) -> Iterator[Violation]:
        """Jobs are given for the first time in the order of their ids."""
        first = [one for taken in self.taken[key].values() for one in taken if one.attempt == 1]
        last: Taken | None = None
        ended = iter(sorted(first, key=lambda one: one.ended))
        following = next(ended, None)
        for one in sorted(first, key=lambda one: one.began):
            while following is not None and following.ended < one.began:
                last = following if last is None or following.id > last.id else last
                following = next(ended, None)
            if last is not None and one.id < last.id and not self._forgotten(last, one.ended):
                yield Violation("order of jobs", "a job is given after a later one", (last, one))
                return

    def _idle(self, key: Key) -> Iterator[Violation]:
        """While a worker waits, no available job is left waiting."""
        empties = [one for one in self.empty[key] if one.wait > IDLE_SLACK_SECONDS]
        if not empties or self.kills or self.history.has_holes:
            # Jobs may be waiting for a server or a node that does not answer.
            return
        for body, taken in self.taken[key].items():
            put, one = self.store.puts.get(body), min(taken, key=lambda one: one.attempt, default=None)
            if put is None or put.id is None or one is None or one.attempt > 1:
                # Nobody got it, or another worker had it before.
                continue
            for empty in empties:
                # It ends early if the server is stopped.
                until = min(empty.began + empty.wait, empty.ended) - IDLE_SLACK_SECONDS
                if max(put.ended, empty.began) < until and empty.ended < one.began:
                    yield Violation("left lying", "a worker waited in vain, though there was a job", (put, empty, one))
                    return

    # Failures

    def _failures(self) -> Iterator[Violation]:
        for key, jobs in self.taken.items():
            for body, taken in jobs.items():
                late = [one for one in taken if one.attempt > self.history.max_attempts]
                if late:
                    yield Violation("failed late", f"{key}: a job is given too often", tuple(late))
                done = [one for one in self.settled[key][body] if one.verb == "done" and one.reply == "OK"]
                if done and body in self.failed:
                    yield Violation("failed although done", f"{key}: a job has failed and is done", tuple(done))
        for failed, times in Counter(self.history.of(JobFailed)).items():
            if times > 1:
                yield Violation("failed twice", "a job failed twice", (failed,))


def _is_of(settled: Settled, taken: Taken) -> bool:
    return (settled.worker, settled.attempt) == (taken.worker, taken.attempt)


def _ends(taken: Taken, settled: list[Settled]) -> list[float]:
    """Return when the worker began to end its job."""
    return [one.began for one in settled if one.verb != "extend" and _is_of(one, taken)]


def _may_be_done(settled: Settled) -> bool:
    return settled.verb == "done" and (settled.reply != "JOBLOST" or settled.sends > 1)
