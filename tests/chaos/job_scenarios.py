"""Faults while workers share jobs: in their connections, in the server, and in the workers."""

from __future__ import annotations

import itertools
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from chaos.clients import Job, StopFile
from chaos.history import Event, History, JobFailed, Sent, Settled, Taken
from chaos.job_checker import unfinished
from chaos.proxy import Fault, Side
from chaos.scenarios import await_snapshots, kill_once, reset_at_random, reset_in_turn, stopped
from chaos.servers import Lives
from chaos.stage import TESTS, Stage
from chaos.workers import KINDS, SHORT_WAITS, Wire, Worker, WorkerJob, WorkerOrders, as_words, looping
from helpers import reached

WRITERS = Job("", 0, topics=("jobs/0", "jobs/1"), pause=0.02)
# A pattern twice, and a topic that it includes.
GROUPS = (("jobs/*", "workers"), ("jobs/*", "others"), ("jobs/0", "workers"))
SHAPES: list[Callable[[WorkerJob], WorkerJob]] = [
    lambda job: job,
    lambda job: replace(job, kind="take"),
    looping,
    lambda job: replace(job, kind="task"),
]
WORKERS = len(SHAPES)
# After waiting this long for a reply, a client considers the connection lost.
BRIEF_SECONDS = 0.6
# Once the faults have ended, workers stop if there was no job for this long, which is far more than the longest lease.
DRAIN_SECONDS = 8.0
# A little more than the bytes of HELLO with a worker's request and of their replies.
OFFSETS: tuple[tuple[Side, int], ...] = (("request", 260), ("reply", 600))
MAX_ATTEMPTS = 3
MAX_AGE_SECONDS = 2.0
READ_FIELDS = 5


@contextmanager
def working(stage: Stage, *ports: int, groups: Sequence[tuple[str, str]] = GROUPS, **about: object) -> Iterator[None]:
    """Put jobs and let workers in threads do them. In the end, all must be done.

    If several servers share a store, `ports` are theirs, and clients begin with different ones.
    """
    jobs = [
        replace(WorkerJob(f"worker-{key}-{group}-{number}", key, group, seed=stage.seed), **about)  # type: ignore[arg-type]
        for key, group in groups
        for number in range(WORKERS)
    ]
    jobs = [
        replace(job, port=ports[at], others=(*ports[at + 1 :], *ports[:at]))
        for job, at in zip(jobs, itertools.cycle(range(len(ports))), strict=False)
    ]
    stop = threading.Event()
    # In each group, one with each kind of client.
    jobs = [kind(job) for job, kind in zip(jobs, itertools.cycle(SHAPES), strict=False)]
    workers = [KINDS[job.kind](job, stage.history.add) for job in jobs]
    clients = [stage.start(one.job.name, lambda one=one: one.run(stop)) for one in workers]
    try:
        with putting(stage, *ports):
            yield
    finally:
        stop.set()
        stage.join(clients)
        for one in workers:
            one.close()
    drain(stage, ports[0], groups)


@contextmanager
def putting(stage: Stage, *ports: int) -> Iterator[None]:
    with stage.crowd(ports[0], writers=2, readers=0, redis=False, job=WRITERS, ports=ports):
        yield


def drain(stage: Stage, port: int, groups: Sequence[tuple[str, str]] = GROUPS) -> None:
    """Do the jobs that are left."""
    # The life of the running server shows which puts were lost with the previous one.
    history = History(stage.history.max_age, events=[*stage.history.events, *(lives.server for lives in stage.servers)])
    for key, group in groups:
        worker = Worker(WorkerJob(f"last-{key}-{group}", key, group, port, ratios={}), stage.history.add)
        puts = list(unfinished(history, (key, group)))
        expired_at = max([put.ended for put in puts], default=0.0) + history.max_age
        until, failed = time.monotonic() + DRAIN_SECONDS, list[JobFailed]()
        left = {put.body for put in puts}
        # Read once more after they have expired, to show that they have.
        began = 0.0
        while left and began < min(until, expired_at):
            began = time.monotonic()
            for taken in worker.take(0.2):
                until = time.monotonic() + DRAIN_SECONDS
                worker.settle(taken, "done")
                left.discard(taken.body)
            failed = _failed(worker.peer, key) if stage.history.max_attempts < math.inf else []
            left -= {one.body for one in failed}
        stage.history.add(*failed)
        worker.close()


def _failed(peer: Wire, topic: str) -> list[JobFailed]:
    """Return the jobs that have failed."""
    reply = iter(peer.call("READ", f"{topic}/failed", 0, "COUNT", 1_000))
    return [JobFailed(topic, body.decode()) for _, _, _, body, _ in zip(*[reply] * READ_FIELDS, strict=True)]


def workers(stage: Stage) -> None:
    """The only faults are workers that return jobs, forget them, or take longer than their lease."""
    with working(stage, stage.lives().port):
        stage.pause(2, 1)


# Connections


def workers_every_byte(stage: Stage) -> None:
    """Connections of workers are reset one after another, each at the next byte sent, then of the bytes received."""
    lives = stage.lives()
    step = stage.size(7, 37)
    offsets = [Fault("reset", side, at) for side, most in OFFSETS for at in range(stage.seed % step, most, step)]
    proxy = stage.proxy(lives.port)
    with working(stage, proxy.port, waits=SHORT_WAITS):
        left = reset_in_turn(stage, proxy, offsets)
        stage.wait_until(lambda: not left)
        proxy.disarm()


def workers_in_holes(stage: Stage) -> None:
    """Connections of workers go silent, replies are delayed, and connections are reset."""
    lives = stage.lives()
    proxy = stage.proxy(lives.port)
    stage.history.has_holes = True
    with working(stage, proxy.port, timeout=BRIEF_SECONDS, waits=SHORT_WAITS):
        proxy.plan = lambda _: [Fault("hole", stage.random.choice(("request", "reply")), stage.random.randint(1, 3000))]
        proxy.reset_all()
        stage.pause(2, 0.7)
        proxy.disarm()
        proxy.delay = lambda: stage.random.choice((0, 0, 0.01, 0.05, 0.4 * (stage.random.random() < 0.1)))
        stage.pause(1, 0.4)
        proxy.disarm()
        reset_at_random(stage, proxy, stage.size(30, 10))


# Servers


def workers_and_restarts(stage: Stage) -> None:
    """The server is restarted and keeps its jobs in a snapshot."""
    lives = stage.lives(snapshot=True, changes=("leases_end_soon",))
    with working(stage, lives.port):
        for _ in range(stage.size(2, 1)):
            stage.pause(0.7, 0.4)
            stage.fault("restart")
            lives.restart()
        stage.pause(0.5, 0.2)


def workers_and_kills(stage: Stage) -> None:
    """The server writes snapshots at intervals and is killed: jobs done since the last one are given again."""
    lives = stage.lives(snapshot=True, interval=1, changes=("leases_end_soon",))
    stage.may_raise = lambda put: put.may_be_stored
    proxy = stage.proxy(lives.port)
    with working(stage, proxy.port):
        for _ in range(stage.size(2, 1)):
            await_snapshots(stage, lives, 1)
            time.sleep(stage.random.uniform(0.1, stage.size(0.9, 0.5)))
            kill_once(stage, lives, proxy)
        stage.pause(0.3, 0.2)


def workers_that_fail(stage: Stage) -> None:
    """Jobs that are given too often go to the topic for failed jobs."""
    lives = stage.lives(max_attempts=MAX_ATTEMPTS)
    stage.history.max_attempts = MAX_ATTEMPTS
    ratios = {"return": 0.5, "late": 0.02, "forget": 0.01}
    with working(stage, lives.port, groups=GROUPS[2:], ratios=ratios):
        stage.pause(2, 0.8)


def workers_and_expiry(stage: Stage) -> None:
    """Jobs expire before they are taken, while workers hold them, and before they are given again."""
    stage.history.max_age = MAX_AGE_SECONDS
    lives = stage.lives(max_age_seconds=MAX_AGE_SECONDS)
    ratios = {"return": 0.2, "late": 0.05, "forget": 0.1}
    with working(stage, lives.port, ratios=ratios, work_seconds=0.2):
        stage.pause(8, 4)


# Workers


def workers_killed(stage: Stage) -> None:
    """Workers are killed, and others take their place."""

    def kill(lives: Lives, children: list[subprocess.Popen[str]], start: Callable[[], None]) -> None:
        for _ in range(stage.size(3, 2)):
            stage.pause(0.4, 0.2)
            stage.fault("kill")
            stage.random.choice(children).kill()
            start()

    _in_processes(stage, kill)


def workers_frozen(stage: Stage) -> None:
    """Workers are suspended beyond their leases."""

    def freeze(lives: Lives, children: list[subprocess.Popen[str]], start: Callable[[], None]) -> None:
        for _ in range(stage.size(3, 1)):
            stage.fault("stop")
            with stopped(children[0]), stopped(stage.random.choice(children[1:])):
                stage.pause(0.7, 0.7)
            stage.pause(0.3, 0.2)

    _in_processes(stage, freeze)


def workers_interrupted(stage: Stage) -> None:
    """Ctrl-C at random points of a worker's calls."""

    def interrupt(lives: Lives, children: list[subprocess.Popen[str]], start: Callable[[], None]) -> None:
        until = time.monotonic() + stage.size(2, 1)
        while time.monotonic() < until:
            time.sleep(stage.random.uniform(0, 0.02))
            stage.fault("interrupt")
            stage.random.choice(children).send_signal(signal.SIGINT)

    _in_processes(stage, interrupt)


def workers_interrupted_at_every_line(stage: Stage) -> None:
    """The same, at one line of dsmq after another."""

    def wait(lives: Lives, children: list[subprocess.Popen[str]], start: Callable[[], None]) -> None:
        # On a slow machine, it may not get to the last line.
        reached(lambda: all(child.poll() is not None for child in children), stage.size(20.0, 10.0))

    shape = WorkerJob("", "", "", kind="take", ratios={"return": 0.3, "extend": 0.3}, leases=(2.0,), waits=(0.0, 0.05))
    _in_processes(stage, wait, [replace(shape, work_seconds=0.0, step=stage.size(3, 29))])
    sent = [one.token for one in stage.history.of(Sent)]
    # Omit those of calls other than `take`.
    stage.faults["interrupt"] += len(sent) - len(set(sent))


def workers_with_commands(stage: Stage) -> None:
    """`dsmq work` runs a command for each job. It is stopped or killed, and another one takes its place."""
    lives = stage.lives()
    [(key, group)] = GROUPS[:1]
    running: list[subprocess.Popen[str]] = []
    started: list[tuple[float, Path, Path]] = []

    def start() -> None:
        name = f"command-{len(started)}"
        now, log, said = time.monotonic(), stage.folder / f"{name}.log", stage.folder / f"{name}.err"
        started.append((now, log, said))
        # Any job may have been taken without any command knowing.
        stage.history.add(Sent(name, key, group, name, now, 0.0, count=10_000))
        words = ["work", "--port", str(lives.port), "--group", group, "--lease", "0.4s", "--delay", "0.1s", key, "--"]
        command = [sys.executable, str(TESTS / "chaos" / "commands.py"), name, key, group, str(log)]
        with said.open("w") as errors:
            program = [sys.executable, "-m", "dsmq", *words, *command]
            running.append(subprocess.Popen(program, stderr=errors, stdin=subprocess.DEVNULL, text=True))

    try:
        for _ in range(WORKERS):
            start()
        with putting(stage, lives.port):
            for _ in range(stage.size(12, 4)):
                stage.pause(0.4, 0.4)
                number = stage.random.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
                stage.fault(number.name)
                process = running.pop(stage.random.randrange(len(running)))
                process.send_signal(number)
                start()
                stage.reap(process)
            stage.pause(1, 1)
    finally:
        for process in running:
            process.terminate()
            stage.reap(process)
    for began, log, said in started:
        stage.history.add(*_with_replies(began, log, said.read_text()))
    drain(stage, lives.port, GROUPS[:1])


def _with_replies(began: float, log: Path, said: str) -> Iterator[Event]:
    """Return a command's jobs. Once it has the next one, the previous one is done, unless it has reported otherwise."""
    history = History()
    if log.exists():
        history.load(log)
    for one, following in pairwise([*history.events, None]):
        if isinstance(one, Taken):
            # It was requested after the previous one was done.
            yield replace(one, began=began, sent=began)
        elif isinstance(one, Settled):
            began = one.began
            is_lost = f"job {one.id} of " in said and "lost: " in said
            has_reply = following is not None
            yield replace(one, reply=has_reply * ("JOBLOST" if is_lost else "OK"), sends=1, ended=_began(following))


def _began(event: Event | None) -> float:
    return event.began if isinstance(event, Taken) else math.inf


def _in_processes(
    stage: Stage,
    run: Callable[[Lives, list[subprocess.Popen[str]], Callable[[], None]], None],
    shapes: Sequence[WorkerJob] = (),
) -> None:
    """Let workers in processes do jobs while `run` gets them, and a function that starts another one."""
    jobs = shapes or [shape(WorkerJob("", "", "")) for shape in SHAPES]
    lives = stage.lives()
    group = GROUPS[:1]
    stop = StopFile(str(stage.folder / "stop"))
    children: list[subprocess.Popen[str]] = []

    def start() -> None:
        name = f"process-{len(children)}"
        about = {"key": group[0][0], "group": group[0][1], "port": lives.port, "seed": stage.seed}
        job = replace(jobs[len(children) % len(jobs)], name=name, **about)  # type: ignore[arg-type]
        words = as_words(WorkerOrders(job, str(stage.folder / "stop"), str(stage.folder / f"{name}.log")))
        command = [sys.executable, "-m", "chaos.workers", words]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS))

    try:
        for _ in jobs:
            start()
        for child in children:
            assert child.stdout is not None
            if child.stdout.readline() != "ready\n":
                raise RuntimeError("a worker has not started")
        with putting(stage, lives.port):
            run(lives, children, start)
    finally:
        stop.set()
        for child in children:
            stage.reap(child)
        for path in sorted(stage.folder.glob("*.log")):
            stage.history.load(path)
    drain(stage, lives.port, group)


JOB_SCENARIOS: dict[str, Callable[[Stage], None]] = {
    run.__name__: run
    for run in (
        *(workers, workers_every_byte, workers_in_holes, workers_and_restarts, workers_and_kills, workers_that_fail),
        workers_and_expiry,
        *(workers_killed, workers_frozen, workers_interrupted, workers_interrupted_at_every_line),
        workers_with_commands,
    )
}
