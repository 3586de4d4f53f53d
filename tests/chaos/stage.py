"""Runs a scenario: servers, proxies, and clients that work while faults are injected."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from chaos import others
from chaos.checker import Violation, check
from chaos.clients import SOON, Client, Job, Orders, Reading, StopFile, Writer, as_words
from chaos.cluster import Cluster
from chaos.history import INTERRUPTED, Broken, Died, Empty, Got, History, Put, Taken
from chaos.job_checker import check_jobs
from chaos.proxy import Proxy
from chaos.servers import Lives
from dsmq.client import DSMQClientSideConnection
from helpers import wait_until

TESTS = Path(__file__).parent.parent
MUTANTS = Path(__file__).with_name("mutants.py")


class NotHere(Exception):
    """A scenario can't run on this machine or with this dsmq; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """The result of a scenario."""

    scenario: str
    seed: int
    faults: int
    returned: int
    maybe_stored: int
    not_stored: int
    read: int
    pause: float
    """Max seconds that a client was blocked beyond its own timeout."""
    seconds: float
    """Seconds from the first put to the last."""
    violations: tuple[Violation, ...]
    kept: str = ""
    """Path of the history, if it was kept."""

    @property
    def rate(self) -> float:
        """Puts per second."""
        return self.returned / max(self.seconds, 1e-9)


@dataclass
class Stage:
    """One round of a scenario."""

    name: str
    seed: int
    quick: bool
    may_raise: Callable[[Put], bool] = lambda _: False
    """Return whether a put may raise."""
    reads_may_raise: bool = False
    read_may_raise: Callable[[str], bool] = lambda _: False
    """Return whether a read may raise this error."""
    mutant: str = ""
    """The server's deliberate defect, if any."""
    faults: Counter[str] = field(default_factory=Counter)
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed} {self.name}")
        self._stack = ExitStack()
        self.servers: list[Lives | Cluster] = []
        self._proxies: list[Proxy] = []
        self._crowds = 0

    def __enter__(self) -> Self:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dsmq-chaos-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for proxy in self._proxies:
            self.faults.update(proxy.faults)

    def size(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    def lives(self, *, changes: tuple[str, ...] = (), **settings: Any) -> Lives:
        """Start a server; `changes` are functions of `mutants` that are not defects."""
        if changes or self.mutant:
            settings["words"] = (sys.executable, str(MUTANTS), *changes, *filter(None, [self.mutant]))
        lives = Lives(self.history, self.folder, **settings)
        self.servers.append(lives)
        self._stack.callback(lives.close)
        return lives

    def cluster(self, *, behind_proxies: bool = False, partitions: bool = False, **settings: Any) -> Cluster:
        """Start two servers that share a store."""
        if self.mutant:
            settings["words"] = (sys.executable, str(MUTANTS), self.mutant)
        proxy = self.proxy if behind_proxies else None
        made = Cluster(self.history, self.folder, proxy, partitions=partitions, **settings)
        self.servers.append(made)
        return self._stack.enter_context(made)

    def proxy(self, port: int) -> Proxy:
        proxy = self._stack.enter_context(Proxy(port, self.seed))
        self._proxies.append(proxy)
        return proxy

    def pause(self, full: float, quick: float) -> None:
        """Let the clients work for a number of seconds."""
        time.sleep(self.size(full, quick))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        wait_until(condition, SOON)

    def fault(self, name: str) -> None:
        self.faults[name] += 1

    def outcome(self, keep: Path | None) -> Outcome:
        """Check the history."""
        violations = (*check(self.history), *check_jobs(self.history), *self._errors())
        puts = list(self.history.of(Put))
        raised = [put for put in puts if put.error]
        return Outcome(
            self.name,
            self.seed,
            self.faults.total(),
            len(puts) - len(raised),
            sum(put.may_be_stored for put in raised),
            sum(not put.may_be_stored for put in raised),
            sum(isinstance(event, Got | Taken) for event in self.history.events),
            self._longest_pause(),
            max((put.ended for put in puts), default=0.0) - min((put.began for put in puts), default=0.0),
            violations,
            self._keep(keep) if violations else "",
        )

    def _errors(self) -> Iterator[Violation]:
        for put in self.history.of(Put):
            if put.error not in {"", INTERRUPTED} and not self.may_raise(put):
                yield Violation("error", "a put raised", (put,))
        for call in self.history.of(Broken):
            if call.error != INTERRUPTED and not (self.reads_may_raise or self.read_may_raise(call.error)):
                yield Violation("error", "a read raised", (call,))

    def _longest_pause(self) -> float:
        pauses = [0.0]
        for event in self.history.events:
            if isinstance(event, Put):
                pauses.append(event.ended - event.began)
            elif isinstance(event, Got | Empty):
                pauses.append(event.ended - event.began - event.timeout)
        return max(pauses)

    def _keep(self, folder: Path | None) -> str:
        folder = folder or Path(tempfile.mkdtemp(prefix="dsmq-chaos-kept-"))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{self.seed}.jsonl"
        self.history.save(path)
        return str(path)

    # Clients

    def client(self, job: Job) -> DSMQClientSideConnection:
        return self._stack.enter_context(job.connect())

    @contextmanager
    def crowd(
        self,
        write_to: int,
        read_from: int = 0,
        *,
        writers: int = 4,
        readers: int = 4,
        redis: bool = True,
        job: Job | None = None,
        ports: Sequence[int] = (),
    ) -> Iterator[None]:
        """Run writers and readers in threads. In the end, the writers stop, and the readers read the remaining
        messages.

        If several servers share a store, `ports` are theirs, and clients begin with different ones.
        """
        shape = replace(job or Job("", 0), seed=self.seed)
        write, read = replace(shape, port=write_to), replace(shape, port=read_from or write_to)
        stop, end = threading.Event(), threading.Event()
        self._crowds += 1
        suffix = f"-{self._crowds}" if self._crowds > 1 else ""
        jobs = [_spread(replace(read, name=f"reader-{number}{suffix}"), ports, number) for number in range(readers)]
        readings: list[Any] = [Reading(job, self.history, self.client(job)) for job in jobs]
        jobs = [_spread(replace(write, name=f"writer-{number}{suffix}"), ports, number) for number in range(writers)]
        writings = [Writer(job, self.history, self.client(job)).run for job in jobs]
        if redis:
            writing, reading, peers = others.pair(
                _spread(read, ports, self.seed), shape.options.get("timeout", 10.0), self.history
            )
            writings.append(writing)
            readings.append(reading)
            for peer in peers:
                self._stack.callback(peer.close)
        clients = [self.start(f"reader {one.job.name}", lambda one=one: _read(one, end)) for one in readings]
        putting = [self.start("writer", lambda run=run: run(stop)) for run in writings]
        try:
            yield
        finally:
            stop.set()
            self.join(putting)
            end.set()
            self.join(clients)

    def start(self, name: str, run: Callable[[], None]) -> Client:
        client = Client(name, self.history, run)
        client.daemon = True
        client.start()
        return client

    def join(self, clients: list[Client]) -> None:
        until = time.monotonic() + SOON
        for client in clients:
            client.join(max(0.0, until - time.monotonic()))
            if client.is_alive():
                self.history.add(Died(client.name, f"still running after {SOON:g} s"))

    @contextmanager
    def processes(self, roles: list[str], job: Job) -> Iterator[list[subprocess.Popen[str]]]:
        """Run clients in separate processes. In the end, the history includes what they saw."""
        stop, end = (StopFile(str(self.folder / name)) for name in ("stop", "end"))
        children: list[subprocess.Popen[str]] = []
        for number, role in enumerate(roles):
            one = replace(job, name=f"{role}-{number}", seed=self.seed)
            result = str(self.folder / f"{one.name}.result")
            words = as_words(Orders(role, one, str(self.folder / "stop"), str(self.folder / "end"), result))
            command = [sys.executable, "-m", "chaos.clients", words]
            children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS))
        try:
            for child in children:
                assert child.stdout is not None
                if child.stdout.readline() != "ready\n":
                    raise RuntimeError("a client has not started")
            yield children
        finally:
            stop.set()
            for child, role in zip(children, roles, strict=True):
                self._await_written(child, 2 if role == "fork" else 1)
            end.set()
            for child in children:
                self.reap(child)
            for path in self.folder.glob("*.result.*"):
                self.history.load(path)

    def _await_written(self, child: subprocess.Popen[str], count: int) -> None:
        """Wait until a process has finished its puts; readers can't finish before that."""
        child.send_signal(signal.SIGCONT)
        watchdog = threading.Timer(SOON, child.kill)
        watchdog.start()
        assert child.stdout is not None
        if not all(child.stdout.readline() for _ in range(count)):
            self.history.add(Died(f"process {child.pid}", f"puts not finished within {SOON:g} s"))
        watchdog.cancel()

    def reap(self, child: subprocess.Popen[str]) -> None:
        """Wait until a child has ended; kill it if that takes too long."""
        child.send_signal(signal.SIGCONT)
        try:
            child.wait(SOON)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            self.history.add(Died(f"process {child.pid}", f"killed, because it was still running after {SOON:g} s"))
        if child.stdout is not None:
            child.stdout.close()


@contextmanager
def shared_reader(stage: Stage, port: int, count: int) -> Iterator[None]:
    """Read through one client from several threads; each message must go to only one of them."""
    job = Job("shared", port, seed=stage.seed)
    mq = stage.client(job)
    end = threading.Event()
    readings = [Reading(job, stage.history, mq, thread=f"thread {number}") for number in range(count)]
    clients = [stage.start("shared", lambda one=one: one.run(end)) for one in readings]
    try:
        yield
    finally:
        end.set()
        stage.join(clients)
        readings[0].finish()


def _spread(job: Job, ports: Sequence[int], number: int) -> Job:
    """Make a client begin with one of several servers."""
    if not ports:
        return job
    at = number % len(ports)
    return replace(job, port=ports[at], others=(*ports[at + 1 :], *ports[:at]))


def _read(reading: Any, end: threading.Event) -> None:
    reading.run(end)
    reading.finish()
