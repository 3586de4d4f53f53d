"""Writers and readers that record what they see, in threads or in processes: `python -m chaos.clients JOB`."""

from __future__ import annotations

import itertools
import json
import linecache
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from chaos.history import INTERRUPTED, Broken, Died, Empty, Got, History, Put, Reader
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import DSMQError, Full, StoreFailed, TooBig

HOST = "127.0.0.1"
# Pause of a polling reader after an empty read.
IDLE_SECONDS = 0.002
# Once the faults have ended, every client must finish within this many seconds.
SOON = 60.0
TURNS_BEFORE_FORK = 20
# How many messages an interrupted `get_latest` may skip.
ALL = 1_000_000
# How often a writer uses put_many.
MANY_RATIO = 0.1

T = TypeVar("T")


class Stop(Protocol):
    """A stop event for threads or processes."""

    def is_set(self) -> bool: ...
    def wait(self, timeout: float) -> bool: ...


class StopFile:
    """A stop event for processes: the existence of a file, which works however they are interrupted."""

    def __init__(self, path: str) -> None:
        self._path = path

    def is_set(self) -> bool:
        return os.path.exists(self._path)

    def wait(self, timeout: float) -> bool:
        time.sleep(timeout)
        return self.is_set()

    def set(self) -> None:
        Path(self._path).touch()


@dataclass(frozen=True)
class Job:
    """The job of a client."""

    name: str
    port: int
    topics: tuple[str, ...] = ("t0", "t1")
    seed: int = 0
    pause: float = 0.01
    """Pause between puts, in seconds."""
    catches_up: bool = False
    """Whether to catch up on delayed puts, so that the pause holds on average."""
    size: int = 20
    """Message size in bytes, without the part that makes the message unique."""
    verbs: tuple[str, ...] = ("read", "get", "get_wait", "get_many", "read_wait")
    step: int = 1
    """Distance between the lines at which a call is interrupted."""
    options: dict[str, Any] = field(default_factory=dict)
    others: tuple[int, ...] = ()
    """The ports of other servers that share a store."""

    def connect(self) -> DSMQClientSideConnection:
        hosts = HOST if not self.others else [f"{HOST}:{port}" for port in (self.port, *self.others)]
        return connect(hosts, self.port, **self.options)

    @property
    def random(self) -> random.Random:
        return random.Random(f"{self.seed} {self.name}")


class Calls:
    """Timed calls to a client; SIGINT interrupts only these calls."""

    def __init__(self) -> None:
        self.interruptible = False

    def catch_interrupts(self) -> None:
        signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        if self.interruptible:
            self.interruptible = False
            raise KeyboardInterrupt

    def run(self, call: Callable[[], T]) -> tuple[float, float, T | None, BaseException | None]:
        """Return the start and end of a call, and what it returned or raised."""
        result: T | None = None
        raised: BaseException | None = None
        began = time.monotonic()
        try:
            self.interruptible = True
            result = call()
            self.interruptible = False
        except (DSMQError, OSError, KeyboardInterrupt) as error:
            self.interruptible = False
            result, raised = None, error
        return began, time.monotonic(), result, raised


class TracedCalls(Calls):
    """Calls that are interrupted before a given line of dsmq's code."""

    def __init__(self) -> None:
        super().__init__()
        self.line = 0
        """The line; 0: none."""
        self.left = 0

    def run(self, call: Callable[[], T]) -> tuple[float, float, T | None, BaseException | None]:
        return super().run(lambda: self._traced(call)) if self.line else super().run(call)

    def _traced(self, call: Callable[[], T]) -> T:
        self.left = self.line
        sys.settrace(self._trace)
        try:
            return call()
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and frame.f_globals.get("__name__", "").startswith("dsmq."):
            # A `with` statement reaches its line again before it releases the lock; Python never interrupts there.
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            self.left -= not line.lstrip().startswith("with ")
            if not self.left:
                self.left = -1
                raise KeyboardInterrupt
        return self._trace


def error_fields(error: BaseException) -> dict[str, Any]:
    """Return the fields of a put that an error determines."""
    if isinstance(error, KeyboardInterrupt):
        return {"error": INTERRUPTED}
    surely_not = isinstance(error, Full | StoreFailed | TooBig) or not getattr(error, "may_be_stored", True)
    return {"error": f"{type(error).__name__}: {error}", "may_be_stored": not surely_not}


@dataclass
class Writer:
    """Puts messages, sometimes several at once, and records the results."""

    job: Job
    history: History
    mq: DSMQClientSideConnection
    calls: Calls = field(default_factory=Calls)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def run(self, stop: Stop) -> None:
        chance, due = self.job.random, time.monotonic()
        while not stop.is_set():
            topic = chance.choice(self.job.topics)
            count = chance.randint(2, 10) if chance.random() < MANY_RATIO else 1
            self.put(topic, count)
            due = (due + count * self.job.pause) if self.job.catches_up else time.monotonic() + self.job.pause
            if (left := due - time.monotonic()) > 0:
                stop.wait(left)

    def put(self, topic: str, count: int = 1) -> None:
        bodies = [f"{self.job.name} {next(self.numbers)} ".ljust(self.job.size, "x") for _ in range(count)]
        mq = self.mq
        if count == 1:
            began, ended, ids, error = self.calls.run(lambda: [mq.put(topic, bodies[0])])
        else:
            began, ended, ids, error = self.calls.run(lambda: mq.put_many(topic, bodies))
        fields = [{"id": one} for one in ids] if ids is not None else [error_fields(error)] * count if error else []
        if count > 1 and error:
            # This is about the put that failed; those before it are stored.
            fields = [{**one, "may_be_stored": True} for one in fields]
        puts = [Put(self.job.name, topic, body, began, ended) for body in bodies]
        self.history.add(*(replace(put, **one) for put, one in zip(puts, fields, strict=True)))


@dataclass
class Reading:
    """Reads topics with all methods and records the messages."""

    job: Job
    history: History
    mq: DSMQClientSideConnection
    calls: Calls = field(default_factory=Calls)
    thread: str = ""
    name: str = ""
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.name = self.name or self.job.name
        # The last id at connect; it has no public accessor.
        session = self.mq._session
        self.reader = Reader(self.name, self.job.topics, session.epoch, session.era.start, self.began)

    def run(self, stop: Stop) -> None:
        chance = self.job.random
        while not stop.is_set():
            found = self.read(chance.choice(self.job.topics), chance.choice(self.job.verbs), chance)
            if not found:
                stop.wait(IDLE_SECONDS)

    def finish(self) -> None:
        """Read everything left. Called once the faults have ended."""
        began = time.monotonic()
        for topic in self.job.topics:
            while (found := self.read(topic, "read", None)) is not False:
                if time.monotonic() > began + SOON:
                    # A server with a defect may fail or return messages forever.
                    self.history.add(Died(self.name, f"still reading after {SOON:g} s"))
                    return
                if found is None:
                    time.sleep(IDLE_SECONDS)
        self.history.add(replace(self.reader, finished=began))

    def read(self, topic: str, verb: str, chance: random.Random | None) -> bool | None:
        """Return whether a message was read; None if the call failed."""
        count = chance.choice((1, 1, 5, 50)) if chance else 100
        timeout = chance.choice((0.01, 0.05, 0.2)) if chance and verb in {"get_wait", "read_wait", "get_many"} else 0.0
        verbs: dict[str, Callable[[], list[Any]]] = {
            "read": lambda: self.mq.read(topic, count),
            "read_wait": lambda: self.mq.read(topic, count, timeout=timeout),
            "get": lambda: _some(self.mq.get(topic)),
            "get_wait": lambda: _some(self.mq.get_wait(topic, timeout=timeout)),
            "get_many": lambda: self.mq.get_many(topic, count, timeout=timeout),
            "get_latest": lambda: self.mq.read(topic, latest=True),
        }
        began, ended, found, error = self.calls.run(verbs[verb])
        if error is not None or found is None:
            # A message that is on its way from the client to its caller can't be given back.
            at_most = {"get": 1, "get_wait": 1, "get_latest": ALL}.get(verb, count)
            interrupted = isinstance(error, KeyboardInterrupt)
            about = INTERRUPTED if interrupted else f"{type(error).__name__}: {error}"
            self.history.add(Broken(self.name, topic, began, ended, about, at_most if interrupted else 0))
            return None
        if not found:
            self.history.add(Empty(self.name, topic, began, ended, timeout))
        shape = Got(self.name, topic, "", began, ended, None, None, verb == "get_latest", self.thread, timeout)
        self.history.add(*(replace(shape, **_facts(message)) for message in found))
        return bool(found)


def _some(message: str) -> list[str]:
    return [message] if message else []


def _facts(message: Any) -> dict[str, Any]:
    if isinstance(message, str):
        return {"body": message}
    return {"body": message.text, "id": message.id, "number": message.number}


# Threads


class Client(threading.Thread):
    """A writer or reader in its own thread."""

    def __init__(self, name: str, history: History, run: Callable[[], None]) -> None:
        super().__init__(name=f"client {name}")
        self._history = history
        self._run = run

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - recorded, not raised
            self._history.add(Died(self.name, repr(error)))


# Processes


@dataclass(frozen=True)
class Orders:
    """The job of a process: writing, reading, and where to store its history."""

    role: str
    job: Job
    stop_writing: str
    stop_reading: str
    result: str


def write_and_read(orders: Orders, history: History, calls: Calls) -> History:
    """Write, read, or both in turn until stopped; then read the rest."""
    stop, end = StopFile(orders.stop_writing), StopFile(orders.stop_reading)
    job = orders.job
    with connect(HOST, job.port, **job.options) as mq:
        reading = Reading(job, history, mq, calls) if orders.role != "write" else None
        writer = Writer(job, history, mq, calls) if orders.role != "read" else None
        print("ready", flush=True)
        chance = job.random
        while not stop.is_set():
            _turn(writer, reading, chance)
        _await_the_others(end)
        if reading:
            reading.finish()
    return history


def _await_the_others(end: Stop) -> None:
    """Wait until all writers have finished."""
    print("written", flush=True)
    while not end.is_set():
        end.wait(IDLE_SECONDS)


def _turn(writer: Writer | None, reading: Reading | None, chance: random.Random) -> None:
    if writer:
        writer.put(chance.choice(writer.job.topics))
        time.sleep(writer.job.pause)
    if reading and not reading.read(chance.choice(reading.job.topics), chance.choice(reading.job.verbs), chance):
        time.sleep(IDLE_SECONDS)


def fork_in_the_middle(orders: Orders, history: History, calls: Calls) -> History:
    """Write and read; fork; both processes continue as separate clients with the same history."""
    stop, end = StopFile(orders.stop_writing), StopFile(orders.stop_reading)
    job, child = orders.job, -1
    with connect(HOST, job.port, **job.options) as mq:
        reading, writer = Reading(job, history, mq, calls), Writer(job, history, mq, calls)
        print("ready", flush=True)
        chance = job.random
        for turn in itertools.count():
            if turn == TURNS_BEFORE_FORK:
                child = os.fork()
                if not child:
                    reading, writer, chance = _as_child(reading, writer)
            _turn(writer, reading, chance)
            if turn > 2 * TURNS_BEFORE_FORK and stop.is_set():
                break
        _await_the_others(end)
        reading.finish()
        if child:
            os.waitpid(child, 0)
        return reading.history


def interrupted_at_every_line(orders: Orders, history: History, calls: Calls) -> History:
    """Interrupt each method at one line after another; after each interrupt, read the messages that follow."""
    end, job = StopFile(orders.stop_reading), orders.job
    with connect(HOST, job.port, **job.options) as mq, connect(HOST, job.port) as other:
        traced = TracedCalls()
        reading, writer = Reading(job, history, mq, traced), Writer(job, history, mq, traced)
        feeding = Writer(replace(job, name=f"{job.name}-feed"), history, other)
        print("ready", flush=True)
        verbs: list[Callable[[str], object]] = [writer.put, lambda topic: writer.put(topic, 3)]
        verbs += [lambda topic, verb=verb: reading.read(topic, verb, job.random) for verb in job.verbs]
        for verb, topic in itertools.product(verbs, job.topics[:1]):
            traced.left = 0
            for line in itertools.count(1 + job.seed % job.step, job.step):
                if traced.left > 0:
                    # The call has fewer lines.
                    break
                feeding.put(topic, 3)
                traced.line = line
                verb(topic)
                traced.line = 0
                while reading.read(topic, "read", None):
                    pass
        _await_the_others(end)
        reading.finish()
    return history


def _as_child(reading: Reading, writer: Writer) -> tuple[Reading, Writer, random.Random]:
    """Copy the parent's reads to the child, which will not read those messages again."""
    name = f"{reading.name}-child"
    history = History()
    history.add(*(replace(event, reader=name) for event in reading.history.events if isinstance(event, Got | Empty)))
    job = replace(reading.job, name=name)
    mine = replace(reading, job=job, history=history, name=name)
    mine.reader = replace(reading.reader, name=name)
    return mine, Writer(job, history, writer.mq, writer.calls), job.random


ROLES = {
    "write": write_and_read,
    "read": write_and_read,
    "both": write_and_read,
    "fork": fork_in_the_middle,
    "lines": interrupted_at_every_line,
}


def main() -> int:
    values = json.loads(sys.argv[1])
    job = Job(**{**values.pop("job"), "topics": tuple(values.pop("topics")), "verbs": tuple(values.pop("verbs"))})
    orders = Orders(job=job, **values)
    history, calls = History(), Calls()
    calls.catch_interrupts()
    try:
        history = ROLES[orders.role](orders, history, calls)
    except BaseException as error:  # noqa: BLE001 - recorded, not raised
        history.add(Died(job.name, repr(error)))
    history.save(Path(f"{orders.result}.{os.getpid()}"))
    return 0


def as_words(orders: Orders) -> str:
    """Return orders as an argument for `main`."""
    values = asdict(orders)
    return json.dumps({**values, "topics": values["job"].pop("topics"), "verbs": values["job"].pop("verbs")})


if __name__ == "__main__":
    sys.exit(main())
