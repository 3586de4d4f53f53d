"""Workers of a group, which record their jobs, in threads or in processes: `python -m chaos.workers JOB`."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from bisect import bisect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import redis

from chaos.clients import Calls, Stop, StopFile
from chaos.history import Died, Event, NoJob, Sent, Settled, Taken, as_line
from chaos.others import Peer

TAKE_FIELDS = 7
LEASES = (0.3, 0.6, 2.0)
WAITS = (0.0, 0.0, 0.05, 1.6)
SHORT_WAITS = (0.0, 0.0, 0.05, 0.2)
COUNTS = (1, 1, 1, 3)
# How often a worker gives a job back, extends its lease, works beyond its lease, and forgets it; else it is done.
RATIOS = {"return": 0.06, "extend": 0.05, "late": 0.04, "forget": 0.01}


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is to do."""

    name: str
    key: str
    group: str
    port: int = 0
    seed: int = 0
    timeout: float = 5.0
    """How long it waits for a reply, in seconds."""
    waits: tuple[float, ...] = WAITS
    work_seconds: float = 0.002
    ratios: dict[str, float] = field(default_factory=lambda: dict(RATIOS))


class Wire(Peer):
    """A connection that records when TAKE is sent, and continues with another run of the server."""

    on_send: Callable[[float], object] = staticmethod(lambda _: None)

    def _greet(self) -> None:
        self.facts = {}
        super()._greet()

    def _ask(self, *words: object) -> Any:
        if words[0] != "HELLO":
            self.on_send(time.monotonic())
        return super()._ask(*words)


class Worker:
    """Takes jobs, and ends them in all possible ways."""

    def __init__(self, job: WorkerJob, log: Callable[[Event], object], calls: Calls | None = None) -> None:
        self.job, self._log, self._calls = job, log, calls or Calls()
        self.peer = Wire((job.port,), job.timeout)
        self._chance = random.Random(f"{job.seed} {job.name}")
        self._numbers = itertools.count(1)
        self._request: Sent | None = None
        """A TAKE that was interrupted; it is sent again."""
        self._sends: list[float] = []

    def run(self, stop: Stop) -> None:
        while not stop.is_set():
            for taken in self.take():
                self._work(taken)

    def take(self, wait: float | None = None) -> list[Taken]:
        chance = self._chance
        if self._request is None:
            token, lease = f"{self.job.name} {next(self._numbers)}".replace(" ", "-"), chance.choice(LEASES)
            wait = chance.choice(self.job.waits) if wait is None else wait
            count = chance.choice(COUNTS)
            self._request = Sent(self.job.name, self.job.key, self.job.group, token, 0.0, lease, wait, count)
            self._sends = []
        request = self._request
        words = ["TAKE", request.key, request.group, round(request.lease * 1000), "COUNT", request.count]
        words += ["WAIT", round(request.wait * 1000)] if request.wait else []
        began, ended, reply = self._call(
            lambda at: self._log(replace(request, began=at)), *words, "TOKEN", request.token
        )
        if reply is None:
            return []
        self._request = None
        about = request.worker, request.key, request.group, request.token
        if not reply:
            self._log(NoJob(*about, self._sends[0], began, ended, request.wait))
        taken = [
            Taken(*about, topic.decode(), number, attempt, body.decode(), self._sends[0], began, ended, request.lease)
            for topic, number, _, _, body, _, attempt in zip(*[iter(reply)] * TAKE_FIELDS, strict=True)
        ]
        for one in taken:
            self._log(one)
        return taken

    def _work(self, taken: Taken) -> None:
        chance = self._chance
        verb = [*self.job.ratios, "done"][bisect([*itertools.accumulate(self.job.ratios.values())], chance.random())]
        time.sleep(chance.uniform(0, self.job.work_seconds))
        match verb:
            case "return":
                self.settle(taken, "return", chance.choice((0, 0, 0.05, 0.3)))
            case "extend":
                self.settle(taken, "extend", chance.choice((0.1, 1.0)))
                time.sleep(0.15)
                self.settle(taken, "done")
            case "late":
                time.sleep(min(LEASES) + 0.1)
                self.settle(taken, chance.choice(("done", "done", "return", "extend")), 0.3)
            case "done":
                self.settle(taken, "done")

    def settle(self, taken: Taken, verb: str, seconds: float = 0.0) -> None:
        event = Settled(
            *(taken.worker, taken.key, taken.group, verb, taken.id, taken.attempt, taken.body, time.monotonic()),
            seconds=seconds,
        )
        self._log(event)
        words = [verb.upper(), event.key, event.group, event.id, event.attempt]
        words += [] if verb == "done" else [round(seconds * 1000)]
        sends: list[float] = []
        reply = None
        while reply is None:
            _, ended, reply = self._call(sends.append, *words)
            if reply is None and self._chance.random() < 0.5:
                # The result is unknown.
                return
        self._log(replace(event, ended=ended, reply=reply, sends=len(sends)))

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
            if not isinstance(error, KeyboardInterrupt):
                raise error
        return self._sends[-1] if self._sends else 0.0, ended, reply

    def close(self) -> None:
        self.peer.close()


# Processes


@dataclass(frozen=True)
class WorkerOrders:
    job: WorkerJob
    stop: str
    log: str


def main() -> int:
    values = json.loads(sys.argv[1])
    orders = WorkerOrders(WorkerJob(**values.pop("job")), **values)
    # Written at once, because the process may be killed.
    file = os.open(orders.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    calls = Calls()
    calls.catch_interrupts()

    def log(event: Event) -> None:
        os.write(file, (as_line(event) + "\n").encode())

    try:
        worker = Worker(orders.job, log, calls)
        print("ready", flush=True)
        worker.run(StopFile(orders.stop))
    except BaseException as error:  # noqa: BLE001 - recorded, not raised
        log(Died(orders.job.name, repr(error)))
    return 0


def as_words(orders: WorkerOrders) -> str:
    """Return orders as an argument for `main`."""
    return json.dumps(asdict(orders))


if __name__ == "__main__":
    sys.exit(main())
