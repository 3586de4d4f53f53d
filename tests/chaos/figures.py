"""The figures that were asked for: restarts, resets, the pause over a restart, and what all of it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from dsmq.client import DSMQClientSideConnection, connect

from chaos import scenarios
from chaos.checker import summary
from chaos.clients import HOST, Job
from chaos.stage import Outcome, Stage
from faults.rig import Daemon

RESTARTS = 20
RESETS = 1_000
# A restart is measured with so many messages held.
HELD = 100_000
PUTS_PER_SECOND = 500
# Of a put or a get, with all of it against without.
SPEED_RATIO = 0.95
ROUNDS, CALLS = 15, 2_000


@dataclass(frozen=True)
class Figure:
    """A line of the table."""

    what: str
    wanted: str
    measured: str
    ok: bool


def restarts(stage: Stage) -> None:
    """Graceful restarts under a load."""
    lives = stage.lives(snapshot=True, interval=5)
    with stage.crowd(lives.port, redis=False, job=Job("", 0, pause=1 / PUTS_PER_SECOND)):
        for _ in range(RESTARTS):
            time.sleep(1)
            stage.fault("restart")
            lives.restart()
        time.sleep(1)


def resets(stage: Stage) -> None:
    """Connections are reset, one after the other, at random offsets."""
    lives = stage.lives()
    proxy = stage.proxy(lives.port)
    with stage.crowd(proxy.port, job=scenarios.FAST):
        scenarios.reset_at_random(stage, proxy, RESETS)


def judged(name: str, play: Callable[[Stage], None], seed: int) -> tuple[Figure, Outcome]:
    """Run what has to come to nothing at all."""
    with Stage(f"figure_{name}", seed, quick=False) as stage:
        play(stage)
    outcome = stage.outcome(None)
    measured = f"{outcome.faults:,} faults, {outcome.returned:,} puts, {outcome.read:,} reads: {summary(outcome.violations)}"
    return Figure(name, "0 lost, doubled, out of order; 0 errors", measured, not outcome.violations), outcome


def pause(seed: int) -> Figure:
    """How long a client waits at most while a server that holds much is restarted."""
    with Stage("pause", seed, quick=False) as stage:
        start = statistics.median(_start_seconds() for _ in range(5))
        lives = stage.lives(snapshot=True)
        with connect(HOST, lives.port) as mq:
            for first in range(0, HELD, 10_000):
                mq.put_many("held", (f"message {number}" for number in range(first, first + 10_000)))
        with stage.crowd(lives.port, redis=False):
            time.sleep(1)
            lives.restart()
            time.sleep(1)
    outcome = stage.outcome(None)
    wanted = 2 * start + 1
    return Figure(
        f"longest pause over a restart with {HELD:,} messages held",
        f"<= 2 x {start:.2f} s + 1 s = {wanted:.2f} s",
        f"{outcome.pause:.2f} s; {summary(outcome.violations)}",
        outcome.pause <= wanted and not outcome.violations,
    )


def _start_seconds() -> float:
    """From the start of a server without messages to its taking connections."""
    began = time.monotonic()
    with closing(Daemon()):
        return time.monotonic() - began


def speed(seed: int) -> list[Figure]:
    """Puts and gets with keys and snapshots against those without, by turns."""
    with Stage("speed", seed, quick=False) as stage, ExitStack() as stack:
        snapshot_file = stage.folder / "snapshot"
        ports = [
            stack.enter_context(closing(Daemon(snapshot_file=snapshot_file, snapshot_interval_seconds=1))).port,
            stack.enter_context(closing(Daemon())).port,
        ]
        clients = [stack.enter_context(connect(HOST, port)) for port in ports]
        _leave_out_keys(clients[1])
        return [_compared(name, call, clients) for name, call in (("put", _put), ("get", _get))]


def _leave_out_keys(mq: Any) -> None:
    """Have a client put as it did when puts had no keys."""
    session = mq._session
    put = session.put

    def without_key(topic: str, message: str | bytes) -> bytes:
        return bytes(put(topic, message))

    session.put = without_key


def _put(mq: DSMQClientSideConnection) -> None:
    for _ in range(CALLS):
        mq.put("speed", "message")


def _get(mq: DSMQClientSideConnection) -> None:
    for _ in range(CALLS):
        mq.get("speed")


def _compared(
    name: str, call: Callable[[DSMQClientSideConnection], None], clients: list[DSMQClientSideConnection]
) -> Figure:
    ratios = []
    for _ in range(ROUNDS):
        took = []
        for mq in clients:
            began = time.monotonic()
            call(mq)
            took.append(time.monotonic() - began)
        ratios.append(took[1] / took[0])
    ratio = statistics.median(ratios)
    return Figure(f"speed of {name}, with all this against without", f">= {SPEED_RATIO}", f"{ratio:.3f}", ratio >= 0.95)
