"""Measures restarts, resets, the pause during a restart, and the cost of keys and snapshots."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

from attacks.rig import progress
from chaos.checker import summary
from chaos.clients import HOST, Job
from chaos.scenarios import FAST, reset_at_random
from chaos.stage import Stage
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.client.replies import stored_id
from dsmq.client.requests import Call
from helpers import Daemon

RESTARTS = 20
RESETS = 1_000
# Stored messages when a restart is measured.
HELD = 100_000
PUTS_PER_SECOND = 500
# Min speed of puts and gets with keys and snapshots, relative to without.
SPEED_RATIO = 0.95
ROUNDS, CALLS = 25, 1_000
SNAPSHOT_SECONDS = 5


@dataclass(frozen=True)
class Figure:
    """A row of the table."""

    what: str
    wanted: str
    measured: str
    ok: bool


def restarts(stage: Stage) -> None:
    """Restart the server gracefully under load."""
    lives = stage.lives(snapshot=True, interval=5)
    with stage.crowd(lives.port, redis=False, job=Job("", 0, pause=1 / PUTS_PER_SECOND, catches_up=True)):
        for _ in range(RESTARTS):
            time.sleep(1)
            stage.fault("restart")
            lives.restart()
        time.sleep(1)


def resets(stage: Stage) -> None:
    """Reset connections one after another at random offsets."""
    lives = stage.lives()
    proxy = stage.proxy(lives.port)
    with stage.crowd(proxy.port, job=FAST):
        reset_at_random(stage, proxy, RESETS)


def judged(name: str, play: Callable[[Stage], None], seed: int) -> Figure:
    """Run a scenario that must cause no violation."""
    with Stage(f"figure_{name}", seed, quick=False) as stage:
        play(stage)
    outcome = stage.outcome(None)
    measured = f"{outcome.returned:,} puts, {outcome.read:,} reads; violations: {summary(outcome.violations)}"
    kept = f", kept in {outcome.kept}" if outcome.kept else ""
    about = f"{outcome.faults:,} {name} under {outcome.rate:,.0f} puts/s"
    return Figure(about, "0 lost, duplicated or out of order; 0 errors", measured + kept, not outcome.violations)


def pause(seed: int) -> Figure:
    """Measure how long a client is blocked at most while a server with many messages restarts."""
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
    """Measure how long a server without messages takes to accept connections."""
    began = time.monotonic()
    with closing(Daemon()):
        return time.monotonic() - began


def speed(seed: int) -> list[Figure]:
    """Compare puts and gets with keys and snapshots to those without, alternating."""
    with Stage("speed", seed, quick=False) as stage, ExitStack() as stack:
        snapshot = {"snapshot_file": stage.folder / "snapshot", "snapshot_interval_seconds": SNAPSHOT_SECONDS}
        ports = [stack.enter_context(closing(Daemon(**settings))).port for settings in (snapshot, {})]
        kept, plain = (stack.enter_context(connect(HOST, port)) for port in ports)
        found = {
            "put, keys and snapshots": _ratio(lambda: kept.put("speed", "message"), lambda: _put_without_key(plain)),
            "put, keys only": _ratio(lambda: plain.put("speed", "message"), lambda: _put_without_key(plain)),
            "put, snapshots only": _ratio(lambda: kept.put("speed", "message"), lambda: plain.put("speed", "message")),
            # More messages have been put than are read.
            "get with a backlog": _ratio(lambda: kept.get("speed"), lambda: plain.get("speed")),
            "get without a backlog": _ratio(lambda: kept.get("empty"), lambda: plain.get("empty")),
        }
    return [
        Figure(f"speed of {name}, relative to without", f">= {SPEED_RATIO}", f"{ratio:.3f}", ratio >= SPEED_RATIO)
        for name, ratio in found.items()
    ]


def _put_without_key(mq: DSMQClientSideConnection) -> None:
    """Put without a key, as earlier versions did."""
    name, body = mq._session.put("speed", "message")
    request = b"*3\r\n$3\r\nPUT\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(body), body)
    stored_id(mq._run(Call(request)))


def _ratio(call: Callable[[], object], other: Callable[[], object]) -> float:
    """Return the speed of a call relative to another: the median of alternating rounds."""
    pairs = ((call, other), (other, call))
    ratios = []
    for number in range(ROUNDS):
        # The order must not matter.
        took = {one: _seconds(one) for one in pairs[number % 2]}
        ratios.append(took[other] / took[call])
    return statistics.median(ratios)


def _seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    for _ in range(CALLS):
        call()
    return time.monotonic() - began


def measure(seed: int) -> list[Figure]:
    measurements: list[Callable[[int], list[Figure]]] = [
        lambda seed: [judged("restarts", restarts, seed)],
        lambda seed: [judged("resets", resets, seed)],
        lambda seed: [pause(seed)],
        speed,
    ]
    found = []
    for measurement in measurements:
        found += measurement(seed)
        progress(found[-1].measured)
    return found


def table(figures: list[Figure]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| figure | target | measured | ok |", "| --- | --- | --- | --- |"]
    return lines + [
        f"| {one.what} | {one.wanted} | {one.measured} | {'yes' if one.ok else '**no**'} |" for one in figures
    ]
