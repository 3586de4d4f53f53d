"""Workers of a group, which record their jobs, in threads or in processes: `python -m chaos.workers JOB`."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import sys
import threading
import time
from bisect import bisect
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar, cast

import redis

from chaos.clients import Calls, Stop, StopFile, TracedCalls
from chaos.history import Died, Event, NoJob, Sent, Settled, Taken, as_line
from chaos.others import Peer
from dsmq import aio
from dsmq.client import connect
from dsmq.client.jobs import Job, jobs_of
from dsmq.errors import DSMQError, JobLost, StoreFailed
from helpers import HOST

TAKE_FIELDS = 7
LEASES = (0.3, 0.6, 2.0)
WAITS = (0.0, 0.0, 0.05, 1.6)
SHORT_WAITS = (0.0, 0.0, 0.05, 0.2)
COUNTS = (1, 1, 1, 3)
# Those of a loop.
LOOP_SECONDS, LOOP_LEASE = 0.2, 0.6
# The calls that are interrupted at every line.
METHODS = ("take", "done", "return", "extend")
# How often calls of tasks are cancelled, and within how many seconds.
CANCELLED_RATIO, CANCEL_WITHIN = 0.3, 0.003
# How often a worker gives a job back, extends its lease, works beyond its lease, or forgets it; otherwise, it finishes
# the job.
RATIOS = {"return": 0.06, "extend": 0.05, "late": 0.04, "forget": 0.01}

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerJob:
    """What a worker has to do."""

    name: str
    key: str
    group: str
    port: int = 0
    others: tuple[int, ...] = ()
    """The ports of other servers that share a store."""
    seed: int = 0
    timeout: float = 5.0
    """How long it waits for a reply, in seconds."""
    leases: tuple[float, ...] = LEASES
    waits: tuple[float, ...] = WAITS
    kind: str = "wire"
    step: int = 0
    """Distance between the lines at which calls are interrupted; 0: none are."""
    may_be_refused: bool = False
    """Whether the store may fail; that counts as an interrupt."""
    work_seconds: float = 0.002
    ratios: dict[str, float] = field(default_factory=lambda: dict(RATIOS))


class Wire(Peer):
    """A connection that records when TAKE is sent and continues with another run of the server."""

    on_send: Callable[[float], object] = staticmethod(lambda _: None)

    def _greet(self) -> None:
        self.facts = {}
        super()._greet()

    def _ask(self, *words: object) -> Any:
        if words[0] != "HELLO":
            self.on_send(time.monotonic())
        return super()._ask(*words)


class Worker:
    """Takes jobs and ends them in all possible ways."""

    def __init__(self, job: WorkerJob, log: Callable[[Event], object], calls: Calls | None = None) -> None:
        self.job, self._log, self._calls = job, log, calls or Calls()
        self._connect()
        self._chance = random.Random(f"{job.seed} {job.name}")
        self._numbers = itertools.count(1)
        self.is_finished = False
        self._request: Sent | None = None
        """A TAKE that was interrupted; it is sent again."""
        self._sends: list[float] = []
        self._is_lost = False
        """Whether the last reply was that the job is lost."""

    def _connect(self) -> None:
        self.peer = Wire((self.job.port, *self.job.others), self.job.timeout)

    def run(self, stop: Stop) -> None:
        while not (stop.is_set() or self.is_finished):
            for taken in self.take():
                self._work(taken)

    def take(self, wait: float | None = None) -> list[Taken]:
        chance = self._chance
        if self._request is None:
            token, lease = f"{self.job.name} {next(self._numbers)}".replace(" ", "-"), chance.choice(self.job.leases)
            wait = chance.choice(self.job.waits) if wait is None else wait
            count = chance.choice(COUNTS)
            self._request = Sent(self.job.name, self.job.key, self.job.group, token, 0.0, lease, wait, count)
            self._sends = []
        request = self._request
        began, ended, jobs = self._take(request)
        if jobs is None:
            return []
        self._request = None
        about = request.worker, request.key, request.group, request.token
        if not jobs:
            self._log(NoJob(*about, self._sends[0], began, ended, request.wait))
        taken = [
            Taken(*about, *job, self._sends[0], began, ended, request.lease)  # type: ignore[call-arg]
            for job in jobs
        ]
        for one in taken:
            self._log(one)
        return taken

    def _take(self, request: Sent) -> tuple[float, float, list[tuple[str, int, int, str]] | None]:
        """Return when a request was last sent and answered, and the topic, id, attempt and body of each job."""
        words = ["TAKE", request.key, request.group, round(request.lease * 1000), "COUNT", request.count]
        words += ["WAIT", round(request.wait * 1000)] if request.wait else []
        began, ended, reply = self._call(
            lambda at: self._log(replace(request, began=at)), *words, "TOKEN", request.token
        )
        jobs = None if reply is None else zip(*[iter(reply)] * TAKE_FIELDS, strict=True)
        return began, ended, jobs and [(job[0].decode(), job[1], job[6], job[4].decode()) for job in jobs]

    def _work(self, taken: Taken) -> None:
        chance = self._chance
        verb = [*self.job.ratios, "done"][bisect([*itertools.accumulate(self.job.ratios.values())], chance.random())]
        time.sleep(chance.uniform(0, self.job.work_seconds))
        match verb:
            case "return":
                self.settle(taken, "return", chance.choice((0, 0, 0.05, 0.3)))
            case "extend":
                self.settle(taken, "extend", chance.choice((0.1, 1.0)))
                time.sleep(75 * self.job.work_seconds)
                self.settle(taken, "done")
            case "late":
                time.sleep(min(LEASES) + 0.1)
                self.settle(taken, chance.choice(("done", "done", "return", "extend")), 0.3)
            case "done":
                self.settle(taken, "done")

    def settle(self, taken: Taken, verb: str, seconds: float = 0.0) -> bool:
        """End a job or extend its lease; return whether there was a reply."""
        event = Settled(
            *(taken.worker, taken.key, taken.group, verb, taken.id, taken.attempt, taken.body, time.monotonic()),
            seconds=seconds,
        )
        self._log(event)
        sends: list[float] = []
        reply = None
        while reply is None:
            ended, reply = self._end(event, sends)
            if reply is None and self._chance.random() < 0.5:
                # The result is unknown.
                return False
        self._log(replace(event, ended=ended, reply=reply, sends=len(sends)))
        self._is_lost = reply == "JOBLOST"
        return True

    def _end(self, event: Settled, sends: list[float]) -> tuple[float, str | None]:
        """Return when a request was answered, and its reply; append when it was sent."""
        words = [event.verb.upper(), event.key, event.group, event.id, event.attempt]
        words += [] if event.verb == "done" else [round(event.seconds * 1000)]
        _, ended, reply = self._call(sends.append, *words)
        return ended, reply

    def _call(self, on_send: Callable[[float], object], *words: object) -> tuple[float, float, Any]:
        """Return when a request was last sent, when it was answered, and its reply; None if it was interrupted."""

        def note(at: float) -> None:
            self._sends.append(at)
            interruptible, self._calls.interruptible = self._calls.interruptible, False
            on_send(at)
            self._calls.interruptible = interruptible

        def call() -> Any:
            try:
                reply = self.peer.call(*words)
            except redis.ResponseError as error:
                if not str(error).startswith("JOBLOST"):
                    raise
                return "JOBLOST"
            return "OK" if reply == b"OK" else reply

        self.peer.on_send = note
        _, ended, reply, error = self._calls.run(call)
        if error is not None:
            self.peer.close()
            self._raise_unless_interrupted(error)
        return self._sends[-1] if self._sends else 0.0, ended, reply

    def _raise_unless_interrupted(self, error: BaseException | None) -> None:
        is_refused = isinstance(error, StoreFailed) or str(error).startswith(("STORE ", "UNSURE "))
        if error is not None and not (isinstance(error, KeyboardInterrupt) or (is_refused and self.job.may_be_refused)):
            raise error

    def close(self) -> None:
        self.peer.close()


class TakingWorker(Worker):
    """The same with the client's methods for workers. Each may be interrupted at one line of dsmq after another."""

    def _connect(self) -> None:
        hosts = [f"{HOST}:{port}" for port in (self.job.port, *self.job.others)]
        self._mq = connect(hosts, timeout=self.job.timeout)
        self._jobs: dict[tuple[int, int], Job] = {}
        # The line at which each method is interrupted next, and those that have been interrupted at all.
        self._lines: dict[str, int] = {}
        self._is_new = True

    def _run(self, verb: str, call: Callable[[], T]) -> tuple[float, float, T | None, BaseException | None]:
        calls, step = self._calls, self.job.step
        if not isinstance(calls, TracedCalls):
            return calls.run(call)
        # After an interrupt, once without.
        first = 1 + self.job.seed % step
        calls.line, calls.left = self._lines.setdefault(verb, first) if self._is_new else 0, 0
        result = calls.run(call)
        if calls.left > 0:
            # The call has fewer lines.
            self._lines[verb] = 0
            self.is_finished = len(self._lines) == len(METHODS) and not any(self._lines.values())
        elif calls.line:
            self._lines[verb] += step
        self._is_new = not calls.line
        return result

    def _take(self, request: Sent) -> tuple[float, float, list[tuple[str, int, int, str]] | None]:
        self._sends.append(time.monotonic())
        self._log(replace(request, began=self._sends[-1]))
        _, ended, jobs, error = self._run("take", lambda: self._next(request))
        if jobs is None:
            self._raise_unless_interrupted(error)
            return self._sends[-1], ended, None
        self._jobs |= {(job.id, job.attempt): job for job in jobs}
        return self._sends[-1], ended, [(job.topic, job.id, job.attempt, job.text) for job in jobs]

    def _next(self, request: Sent) -> list[Job]:
        job = self._mq.take(request.key, request.group, timeout=request.wait, lease=request.lease)
        return [] if job is None else [job]

    def _end(self, event: Settled, sends: list[float]) -> tuple[float, str | None]:
        job, mq = self._jobs[event.id, event.attempt], self._mq
        calls: dict[str, Callable[[], None]] = {
            "done": lambda: mq.done(job),
            "return": lambda: mq.give_back(job, delay=event.seconds),
            "extend": lambda: mq.extend(job, event.seconds),
        }
        sends.append(time.monotonic())
        _, ended, _, error = self._run(event.verb, calls[event.verb])
        if error is None or isinstance(error, JobLost):
            return ended, "JOBLOST" if error else "OK"
        self._raise_unless_interrupted(error)
        return ended, None

    def close(self) -> None:
        # It gives back what it holds.
        for key, group, message_id, attempt, _ in jobs_of(self._mq._session).leases:
            body = self._jobs[message_id, attempt].text
            self._log(Settled(self.job.name, key, group, "return", message_id, attempt, body, time.monotonic()))
        self._close_client()

    def _close_client(self) -> None:
        self._mq.close()


class TaskWorker(TakingWorker):
    """The same with an asyncio client, whose calls are cancelled at random points."""

    def _connect(self) -> None:
        super()._connect()
        self._mq.close()
        self._loop = asyncio.new_event_loop()
        self._mq = self._complete(aio.connect(HOST, self.job.port, timeout=self.job.timeout))

    def _complete(self, call: Any) -> Any:
        return self._loop.run_until_complete(call)

    def _run(self, verb: str, call: Callable[[], Any]) -> tuple[float, float, Any, BaseException | None]:
        began, result, raised = time.monotonic(), None, None
        try:
            result = self._complete(self._cancel_at_random(call()))
        except asyncio.CancelledError:
            raised = KeyboardInterrupt()
        except (DSMQError, OSError) as error:
            raised = error
        return began, time.monotonic(), result, raised

    async def _cancel_at_random(self, call: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(call)
        if self._chance.random() < CANCELLED_RATIO:
            await asyncio.sleep(self._chance.uniform(0, CANCEL_WITHIN))
            task.cancel()
        return await task

    async def _next(self, request: Sent) -> list[Job]:  # type: ignore[override]
        job = await self._mq.take(request.key, request.group, timeout=request.wait, lease=request.lease)
        return [] if job is None else [job]

    def _close_client(self) -> None:
        self._complete(self._mq.close())
        self._loop.close()


class LostJobs(logging.Handler):
    """Records which job a loop has reported as lost."""

    def __init__(self) -> None:
        super().__init__()
        self.by_thread: dict[int, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.by_thread[threading.get_ident()] = cast("int", record.args[0])


LOST = LostJobs()
logging.getLogger("dsmq.client.jobs").addHandler(LOST)


class LoopingWorker(TakingWorker):
    """The same with `work`, which ends a job when the next one is requested."""

    _loop: Any = None
    _ending: Settled | None = None
    """The DONE that is part of the next call."""
    _is_returned = False

    def _work(self, taken: Taken) -> None:
        self._is_returned = False
        super()._work(taken)
        if not (self._ending or self._is_returned):
            self.settle(taken, "done")

    def settle(self, taken: Taken, verb: str, seconds: float = 0.0) -> bool:
        if verb != "done":
            replied = super().settle(taken, verb, seconds)
            # The loop does not try to finish a job that it knows to be lost.
            self._is_returned = replied and (verb == "return" or self._is_lost)
            if verb == "return" and not self._is_returned:
                # It is unknown whether it is done next.
                self._log(self._done(taken))
                self._is_returned = True
            return self._is_returned
        if not self._is_returned:
            self._ending = self._done(taken)
            self._log(self._ending)
        return True

    def _done(self, taken: Taken) -> Settled:
        about = taken.worker, taken.key, taken.group, "done", taken.id, taken.attempt, taken.body
        return Settled(*about, time.monotonic())

    def _take(self, request: Sent) -> tuple[float, float, list[tuple[str, int, int, str]] | None]:
        event, self._ending = self._ending, None
        self._loop = self._loop or self._mq.work(request.key, request.group, timeout=LOOP_SECONDS, lease=request.lease)
        LOST.by_thread.pop(threading.get_ident(), None)
        found = super()._take(request)
        if event and found[2] is not None:
            is_lost = LOST.by_thread.get(threading.get_ident()) == event.id
            self._log(replace(event, ended=found[1], reply="JOBLOST" if is_lost else "OK", sends=1))
        return found

    def _next(self, request: Sent) -> list[Job]:
        return [job for job in [next(self._loop, None)] if job]


def looping(job: WorkerJob) -> WorkerJob:
    return replace(job, kind="loop", leases=(LOOP_LEASE,), waits=(LOOP_SECONDS,))


KINDS = {"wire": Worker, "take": TakingWorker, "loop": LoopingWorker, "task": TaskWorker}


# Processes


@dataclass(frozen=True)
class WorkerOrders:
    job: WorkerJob
    stop: str
    log: str


def main() -> int:
    values = json.loads(sys.argv[1])
    orders = WorkerOrders(WorkerJob(**values.pop("job")), **values)
    # Write it immediately, because the process may be killed.
    file = os.open(orders.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    calls = TracedCalls() if orders.job.step else Calls()
    calls.catch_interrupts()

    def log(event: Event) -> None:
        os.write(file, (as_line(event) + "\n").encode())

    try:
        worker = KINDS[orders.job.kind](orders.job, log, calls)
        print("ready", flush=True)
        worker.run(StopFile(orders.stop))
        worker.close()
    except BaseException as error:  # noqa: BLE001 - recorded, not raised
        log(Died(orders.job.name, repr(error)))
    return 0


def as_words(orders: WorkerOrders) -> str:
    """Return orders as an argument for `main`."""
    return json.dumps(asdict(orders))


if __name__ == "__main__":
    sys.exit(main())
