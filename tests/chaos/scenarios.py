"""Faults in connections, servers and clients, while four writers and four readers work."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from chaos import tasks
from chaos.clients import Job
from chaos.history import INTERRUPTED, Broken, Put
from chaos.proxy import Fault, Proxy, Side
from chaos.servers import HOST, Lives, faulty
from chaos.stage import NotHere, Stage, shared_reader

# After waiting this long for a reply, a client considers the connection lost.
BRIEF = Job("", 0, options={"timeout": 0.5})
FAST = Job("", 0, pause=0.002)
# A little more than the bytes of HELLO with a put or read and of their replies.
OFFSETS: tuple[tuple[Side, int], ...] = (("request", 170), ("reply", 560))
SMALL_FILE_BYTES = 16_384
FAILED_SNAPSHOT = re.compile(r'^dsmq_snapshots_total{result="failed"} [1-9]', re.MULTILINE)


def calm(stage: Stage) -> None:
    """No faults, for comparison."""
    lives = stage.lives()
    with stage.crowd(lives.port):
        stage.pause(2, 0.3)


# Connections


def every_byte(stage: Stage) -> None:
    """Connections are reset one after another, each at the next byte sent, then of the bytes received."""
    lives = stage.lives()
    step = stage.size(1, 29)
    offsets = [Fault("reset", side, at) for side, most in OFFSETS for at in range(stage.seed % step, most, step)]
    proxies = [stage.proxy(lives.port) for _ in range(2)]
    with stage.crowd(proxies[0].port, proxies[1].port, job=FAST):
        left = [reset_in_turn(stage, proxy, offsets) for proxy in proxies]
        stage.wait_until(lambda: not any(left))
        for proxy in proxies:
            proxy.disarm()


def reset_in_turn(stage: Stage, proxy: Proxy, offsets: list[Fault]) -> list[Fault]:
    """Give every other connection the next fault, so that those in between make progress. Return the faults left."""
    left = offsets[::-1]

    def plan(number: int) -> list[Fault]:
        if number % 2 and left:
            return [left.pop()]
        return [Fault("reset", "request", stage.random.randint(1_000, 3_000))]

    proxy.plan = plan
    proxy.reset_all()
    return left


def resets(stage: Stage) -> None:
    """Connections are reset at random offsets."""
    lives = stage.lives()
    proxy = stage.proxy(lives.port)
    with stage.crowd(proxy.port, job=FAST):
        reset_at_random(stage, proxy, stage.size(100, 20))


def reset_at_random(stage: Stage, proxy: Proxy, count: int) -> None:
    before = proxy.faults["reset"]

    def plan(_: int) -> list[Fault]:
        # Some are far enough away that slow readers catch up.
        mean = stage.random.choice((200, 2_000, 20_000))
        return [Fault("reset", stage.random.choice(("request", "reply")), int(stage.random.expovariate(1 / mean)))]

    proxy.plan = plan
    proxy.reset_all()
    stage.wait_until(lambda: proxy.faults["reset"] >= before + count)
    proxy.disarm()


def holes(stage: Stage) -> None:
    """Connections go silent: single ones in the middle of a stream, and all at once."""
    lives = stage.lives()
    proxy = stage.proxy(lives.port)
    with stage.crowd(proxy.port, job=BRIEF):
        proxy.plan = lambda _: [Fault("hole", stage.random.choice(("request", "reply")), stage.random.randint(1, 3000))]
        proxy.reset_all()
        stage.pause(6, 1)
        proxy.disarm()
        proxy.hole(True)
        stage.pause(2, 0.6)
        proxy.hole(False)
        stage.pause(1, 0.1)


def delays(stage: Stage) -> None:
    """Data is delayed, sometimes for longer than clients wait; and connections are closed in one direction."""
    lives = stage.lives()
    proxy = stage.proxy(lives.port)
    with stage.crowd(proxy.port, job=BRIEF):
        proxy.delay = lambda: stage.random.choice((0, 0, 0, 0.001, 0.01, 0.05, 0.7 * (stage.random.random() < 0.2)))
        stage.pause(4, 0.7)
        proxy.plan = lambda _: [
            Fault(
                stage.random.choice(("end", "close")),
                stage.random.choice(("request", "reply")),
                stage.random.randint(1, 3000),
            )
        ]
        proxy.reset_all()
        stage.pause(4, 0.7)
        proxy.disarm()


def given_up(stage: Stage) -> None:
    """Clients with a short timeout give up repeatedly; their errors are correct about whether puts were stored."""
    lives = stage.lives()
    proxy = stage.proxy(lives.port)
    stage.may_raise, stage.reads_may_raise = lambda _: True, True
    job = replace(BRIEF, options={"timeout": 0.3, "reconnect_timeout": 0.2}, pause=0.005)
    with stage.crowd(proxy.port, job=job, redis=False):
        for _ in range(stage.size(8, 2)):
            stage.pause(0.3, 0.1)
            reset_at_random(stage, proxy, 10)
            proxy.refuse(True)
            proxy.reset_all()
            time.sleep(0.4)
            proxy.refuse(False)
            proxy.hole(True)
            time.sleep(0.5)
            proxy.hole(False)
        stage.pause(0.5, 0.1)


# Servers


def restarts(stage: Stage) -> None:
    """The server is restarted and keeps its messages in a snapshot."""
    _restart_often(stage, stage.lives(snapshot=True))


def restarts_behind_socket(stage: Stage) -> None:
    """The same with listening sockets that outlive the server, as under systemd."""
    if importlib.util.find_spec("dsmq.ops.systemd") is None:
        raise NotHere("this dsmq takes no sockets from systemd")
    with socket.create_server((HOST, 0)) as queue, socket.create_server((HOST, 0)) as metrics:
        _restart_often(stage, stage.lives(snapshot=True, passed=(queue, metrics)))


def _restart_often(stage: Stage, lives: Lives) -> None:
    with stage.crowd(lives.port, job=FAST):
        for _ in range(stage.size(4, 1)):
            stage.pause(1, 0.4)
            stage.fault("restart")
            lives.restart()
        stage.pause(0.5, 0.2)


def kills(stage: Stage) -> None:
    """The server is killed without a snapshot: only its messages are lost."""
    _kill(stage, stage.lives())


def kills_with_snapshot(stage: Stage) -> None:
    """The server writes snapshots at intervals and is killed: only puts after the last one are lost."""
    _kill(stage, stage.lives(snapshot=True, interval=1))


def _kill(stage: Stage, lives: Lives) -> None:
    # The server's memory of puts in flight is lost with it.
    stage.may_raise = lambda put: put.may_be_stored
    proxy = stage.proxy(lives.port)
    with stage.crowd(proxy.port, redis=False):
        for number in range(stage.size(5, 1)):
            if lives.has_snapshot and not number:
                await_snapshots(stage, lives, 1)
            time.sleep(stage.random.uniform(0.1, stage.size(2.5, 0.5)))
            kill_once(stage, lives, proxy)
        stage.pause(0.5, 0.2)


def kill_once(stage: Stage, lives: Lives, proxy: Proxy) -> None:
    stage.fault("kill")
    # The state of the next life must be recorded before the first put.
    proxy.refuse(True)
    lives.kill()
    lives.start()
    proxy.refuse(False)


def stopped_server(stage: Stage) -> None:
    """The server is suspended for longer than clients wait for a reply."""
    lives = stage.lives()
    with stage.crowd(lives.port, job=BRIEF):
        for _ in range(stage.size(3, 1)):
            stage.pause(0.5, 0.3)
            stage.fault("stop")
            with stopped(lives.daemon.process):
                stage.pause(3, 1.2)
        stage.pause(0.5, 0.3)


@contextlib.contextmanager
def stopped(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def full_disk(stage: Stage) -> None:
    """Snapshots fail: clients don't notice, the previous one is kept, and later ones are written."""
    lives = stage.lives(snapshot=True, interval=1)
    # The last snapshot, at the stop, fails, so the stop is like a kill.
    stage.may_raise = lambda put: put.may_be_stored
    proxy = stage.proxy(lives.port)
    with stage.crowd(proxy.port, redis=False, job=Job("", 0, pause=0.005, size=200)):
        _fill_disk(stage, lives)
        _empty_disk(lives)
        await_snapshots(stage, lives, stage.size(2, 1))
        _fill_disk(stage, lives)
        proxy.refuse(True)
        lives.stop(keeps=False)
        lives.start()
        proxy.refuse(False)
        stage.pause(1.5, 0.2)


def await_snapshots(stage: Stage, lives: Lives, count: int) -> None:
    at = lives.snapshots.written if lives.snapshots else 0
    stage.wait_until(lambda: lives.snapshots is not None and lives.snapshots.written >= at + count)


def _fill_disk(stage: Stage, lives: Lives) -> None:
    """Limit the size of the server's files, as if the disk were full."""
    stage.fault("full disk")
    resource.prlimit(lives.daemon.pid, resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, resource.RLIM_INFINITY))
    stage.wait_until(lambda: FAILED_SNAPSHOT.search(lives.daemon.fetch()) is not None)
    stage.pause(1, 0.2)


def _empty_disk(lives: Lives) -> None:
    resource.prlimit(lives.daemon.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def clock(stage: Stage) -> None:
    """The wall clock jumps by a day, forward and back, while messages are stored and a snapshot is written."""
    lives = stage.lives(snapshot=True, interval=1, words=faulty("clock"))
    with stage.crowd(lives.port):
        for step in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR2, signal.SIGUSR1):
            stage.pause(0.7, 0.1)
            stage.fault("clock")
            lives.daemon.signal(step)
        # It is a day ahead when the snapshot is written and correct when it is loaded.
        lives.daemon.signal(signal.SIGUSR1)
        stage.pause(0.5, 0.2)
        lives.restart()
        stage.pause(0.5, 0.2)


# Clients


def stopped_clients(stage: Stage) -> None:
    """Clients are suspended for longer than they wait for a reply."""
    lives = stage.lives()
    roles = stage.size(["write", "write", "read", "read", "both"], ["write", "read", "both"])
    with stage.processes(roles, at(lives, BRIEF)) as children:
        for _ in range(stage.size(4, 1)):
            stage.pause(0.5, 0.3)
            _stop_some(stage, children)
        stage.pause(0.3, 0.2)


def _stop_some(stage: Stage, children: list[subprocess.Popen[str]]) -> None:
    with contextlib.ExitStack() as stack:
        for child in stage.random.sample(children, 2):
            stage.fault("stop")
            stack.enter_context(stopped(child))
        stage.pause(2, 0.8)


def forks(stage: Stage) -> None:
    """Clients fork while working; parent and child continue."""
    lives, count = stage.lives(), stage.size(2, 1)
    with stage.crowd(lives.port, writers=1, readers=1, redis=False), stage.processes(["fork"] * count, at(lives)):
        stage.faults["fork"] += count
        stage.pause(2, 0.8)


def at(lives: Lives, job: Job = FAST) -> Job:
    return replace(job, port=lives.port)


def threads(stage: Stage) -> None:
    """Threads share a client, so each message goes to one of them, while connections are reset."""
    lives = stage.lives()
    proxy = stage.proxy(lives.port)
    with stage.crowd(proxy.port, readers=1, redis=False), shared_reader(stage, proxy.port, 4):
        stage.pause(1, 0.3)
        reset_at_random(stage, proxy, stage.size(40, 10))
        stage.pause(0.5, 0.2)


def interrupts(stage: Stage) -> None:
    """Ctrl-C at random points of calls: the results of interrupted calls are unknown, all others are correct."""
    lives = stage.lives()
    job = at(lives, replace(FAST, pause=0.0005))
    roles = stage.size(["write", "read", "both", "both"], ["write", "both"])
    with stage.processes(roles, job) as children:
        until = time.monotonic() + stage.size(4, 1)
        while time.monotonic() < until:
            time.sleep(stage.random.uniform(0, 0.02))
            stage.fault("interrupt")
            stage.random.choice(children).send_signal(signal.SIGINT)


def interrupts_at_every_line(stage: Stage) -> None:
    """The same at one line of dsmq after another."""
    lives = stage.lives()
    job = at(lives, replace(FAST, step=stage.size(1, 7), verbs=("read", "get", "get_wait", "get_many", "get_latest")))
    with stage.processes(["lines"], job):
        pass
    stage.faults["interrupt"] += sum(event.error == INTERRUPTED for event in stage.history.of(Broken))
    stage.faults["interrupt"] += sum(event.error == INTERRUPTED for event in stage.history.of(Put))


def cancelled(stage: Stage) -> None:
    """Tasks of the asyncio client are cancelled at random points, while connections are reset."""
    lives = stage.lives()
    proxy = stage.proxy(lives.port)
    with stage.crowd(proxy.port, writers=1, readers=1, redis=False), tasks.crowd(stage, proxy.port):
        stage.pause(2, 0.5)
        reset_at_random(stage, proxy, stage.size(40, 10))
        stage.pause(1, 0.3)


# Everything at once


def mixed(stage: Stage) -> None:
    """Random faults, determined by the seed; nothing may be lost."""
    lives = stage.lives(snapshot=True, interval=1)
    proxy = stage.proxy(lives.port)
    faults: list[Callable[[], None]] = [
        proxy.reset_all,
        lambda: reset_at_random(stage, proxy, 10),
        lambda: _hole(stage, proxy),
        lambda: _delay(stage, proxy),
        lambda: _stop_briefly(stage, lives),
        lambda: _restart(stage, lives),
        lambda: _refuse(stage, proxy),
    ]
    with stage.crowd(proxy.port, job=BRIEF):
        for _ in range(stage.size(12, 3)):
            stage.random.choice(faults)()
            time.sleep(stage.random.uniform(0, 0.3))


def _hole(stage: Stage, proxy: Proxy) -> None:
    proxy.hole(True)
    time.sleep(stage.random.uniform(0.1, 1))
    proxy.hole(False)


def _delay(stage: Stage, proxy: Proxy) -> None:
    stage.fault("delay")
    proxy.delay = lambda: stage.random.uniform(0, 0.1)
    time.sleep(0.3)
    proxy.disarm()


def _stop_briefly(stage: Stage, lives: Lives) -> None:
    stage.fault("stop")
    with stopped(lives.daemon.process):
        time.sleep(stage.random.uniform(0.1, 1))


def _restart(stage: Stage, lives: Lives) -> None:
    stage.fault("restart")
    lives.restart()


def _refuse(stage: Stage, proxy: Proxy) -> None:
    proxy.refuse(True)
    proxy.reset_all()
    time.sleep(stage.random.uniform(0, 0.3))
    proxy.refuse(False)


SCENARIOS: dict[str, Callable[[Stage], None]] = {
    run.__name__: run
    for run in (
        *(calm, every_byte, resets, holes, delays, given_up),
        *(restarts, restarts_behind_socket, kills, kills_with_snapshot, stopped_server, full_disk, clock),
        *(stopped_clients, forks, threads, interrupts, interrupts_at_every_line, cancelled, mixed),
    )
}
