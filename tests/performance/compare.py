"""Compare the speed of dsmq with that of its alternatives, as ratios: `python tests/performance/compare.py`.

Starts every installed server on a free port and runs the same work on each through its usual Python client, in
interleaved rounds. A figure is the median of the rounds' ratios, followed by their quartiles. Servers that are not
installed are skipped and named. README.md has the results.

Absolute times mean little on a shared machine; ratios measured in the same minute are stable. Placement matters too:
`--apart` gives the servers one core and the clients the others, as on two machines.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import brokers
import plots
from brokers import Broker, progress, say, spread

HERE = Path(__file__).parent
# Operation: repetitions per round and label in the table.
OPERATIONS = {
    "put": (2000, "put"),
    "get": (2000, "get with a backlog"),
    "empty_get": (1000, "get with nothing there"),
    "large_put": (100, "put 100,000 characters"),
    "large_get": (100, "get 100,000 characters"),
    "put_many": (20000, "put_many, a message"),
    "task_puts": (20000, "put by 100 asyncio tasks"),
    "ping_pong": (1000, "ping-pong between two processes"),
    "work": (1000, "take a job with a backlog, and finish it"),
    "work_loop": (1000, "the same in a loop, as workers do"),
    "empty_work": (1000, "take a job with nothing there"),
    "hand_over": (200, "from a put to the job at a waiting worker"),
}
SYSTEMS = ("dsmq", "redis", "redis-lists", "beanstalkd", "rabbitmq", "nats", brokers.OLD)
FAN_OUT = 200
WORKERS = (1, 4, 16)
# Fraction of the repetitions for systems that are slow.
FEWER = {"nats": 0.2, brokers.OLD: 0.2}
BENCHMARKS = [["-c", "1"], ["-c", "10"], ["-c", "50"], ["-c", "50", "-P", "16"]]
PUT = {name: ["PUT", "t", "m"] for name in brokers.BUILDS} | {"redis": ["XADD", "t", "*", "m", "m"]}
MESSAGES_HELD = 1_000_000

# By row and system, one figure per round.
Figures = dict[str, dict[str, list[float]]]


class Table(NamedTuple):
    """Figures with the same unit."""

    unit: str
    better: str
    figures: Figures


class System:
    """A broker and the client process that drives it."""

    def __init__(self, broker: Broker, stack: ExitStack) -> None:
        self.name, self.port, self.broker = broker.name, broker.port, broker
        client = "dsmq" if self.name in brokers.BUILDS else self.name
        driver = [broker.python, str(HERE / "drivers.py"), client, str(self.port)]
        self.driver = stack.enter_context(
            subprocess.Popen(driver, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=broker.folder)
        )
        stack.callback(self.driver.kill)
        self.ask("")

    def ask(self, line: str) -> Any:
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        if line:
            self.driver.stdin.write(line + "\n")
            self.driver.stdin.flush()
        answer = self.driver.stdout.readline()
        if not answer:
            raise RuntimeError(f"the client of {self.name} has ended")
        return None if answer == "ready\n" else json.loads(answer)

    def measure(self, operation: str, count: int) -> Any:
        return self.ask(f"{operation} {max(1, round(count * FEWER.get(self.name, 1)))}")


def add(figures: Figures, row: str, system: str, value: float) -> None:
    figures.setdefault(row, {}).setdefault(system, []).append(value)


def run_operations(systems: list[System], rounds: int, operations: list[str]) -> Figures:
    """Return microseconds per operation."""
    figures: Figures = {}
    for number in range(rounds + 1):
        for operation in operations:
            count, label = OPERATIONS[operation]
            # In turn, because what ran before has an effect, such as an idle processor.
            for system in systems[number % len(systems) :] + systems[: number % len(systems)]:
                progress(f"round {number} of {rounds}: {label}, {system.name}")
                answer = system.measure(operation, count)
                # The first round warms up.
                if number and answer is not None:
                    for name, value in answer.items() if isinstance(answer, dict) else [("", answer)]:
                        add(figures, f"{label} {name}".strip(), system.name, value)
    return figures


def run_rates(systems: list[System], rounds: int, requests: int) -> Figures:
    """Return requests per second of redis-benchmark and deliveries per second to waiting readers."""
    figures: Figures = {}
    benchmarks = BENCHMARKS if shutil.which("redis-benchmark") else []
    if not benchmarks:
        say("skipped: redis-benchmark is not installed")
    systems = [system for system in systems if system.name in PUT]
    for number in range(rounds):
        for options in benchmarks:
            row = f"redis-benchmark {' '.join(options)}, PUT / XADD"
            count = requests if options != ["-c", "1"] else requests // 5
            for system in systems:
                progress(f"round {number + 1} of {rounds}: {row}, {system.name}")
                words = ["redis-benchmark", "-p", str(system.port), "-n", str(count), "--csv", *options]
                done = subprocess.run([*words, *PUT[system.name]], capture_output=True, text=True, check=True)
                add(figures, row, system.name, float(list(csv.reader(done.stdout.splitlines()))[-1][1]))
        for system in systems:
            row = "deliveries to 100 waiting readers"
            progress(f"round {number + 1} of {rounds}: {row}, {system.name}")
            add(figures, row, system.name, system.measure("fan_out", FAN_OUT))
    return figures


def run_workers(systems: list[System], rounds: int, jobs: int) -> Figures:
    """Return jobs per second done by several workers together."""
    figures: Figures = {}
    for number in range(rounds):
        for workers in WORKERS:
            for system in systems:
                row = f"{workers} worker{'s' if workers > 1 else ''}, jobs"
                progress(f"round {number + 1} of {rounds}: {row}, {system.name}")
                if (rate := system.ask(f"drain {jobs} {workers}")) is not None:
                    add(figures, row, system.name, rate)
    return figures


def run_jobs_in_flight(systems: list[System], jobs: int) -> Figures:
    """Return the bytes of memory that a job takes in addition when a worker holds it."""
    figures: Figures = {}
    for name, python in [(system.name, system.broker.python) for system in systems if system.name != brokers.OLD]:
        progress(f"{jobs} jobs in flight, {name}")
        with ExitStack() as stack:
            limits = ["--max-jobs-in-flight", str(jobs), "--max-group-bytes", str(1 << 30)]
            options = limits if name in brokers.BUILDS else []
            system = System(Broker(name, stack, *options, python=python), stack)
            system.ask(f"fill_to_hold {jobs}")
            before = system.broker.memory
            system.ask(f"hold {jobs}")
            taken = system.broker.memory - before
        if taken > 0:
            add(figures, "memory for a job in flight", name, taken / jobs)
    return figures


def run_memory(systems: list[System]) -> Figures:
    """Return the bytes of memory per message of 100 bytes, with a million stored."""
    figures: Figures = {}
    for name, python in [(system.name, system.broker.python) for system in systems]:
        if name in PUT:
            progress(f"a million messages, {name}")
            with ExitStack() as stack:
                system = System(Broker(name, stack, python=python), stack)
                before = system.broker.memory
                system.ask(f"fill {MESSAGES_HELD}")
                add(
                    figures,
                    "memory for a message of 100 bytes",
                    name,
                    (system.broker.memory - before) / MESSAGES_HELD,
                )
    return figures


def ratios(figures: Figures) -> Figures:
    """Return, by row and peer, dsmq's figure divided by the peer's, one for each round."""
    return {
        row: {name: brokers.ratios(by_system["dsmq"], values) for name, values in by_system.items() if name != "dsmq"}
        for row, by_system in figures.items()
        if "dsmq" in by_system
    }


def lines(table: Table) -> list[str]:
    """Return the lines of a Markdown table."""
    peers = list(dict.fromkeys(name for by_system in table.figures.values() for name in by_system if name != "dsmq"))
    result = [f"| {table.unit}, {table.better} is better | dsmq | {' | '.join(peers)} |"]
    result.append("| --- |" + " ---: |" * (len(peers) + 1))
    for row, by_peer in ratios(table.figures).items():
        ours = table.figures[row]["dsmq"]
        cells = [spread(by_peer[peer]) if peer in by_peer else "" for peer in peers]
        result.append(f"| {row} | {spread(ours, 1 if max(ours) < 1000 else 0)} | {' | '.join(cells)} |")
    return result


def plot(tables: list[Table], title: str, path: Path) -> None:
    """Draw how many times faster or smaller dsmq is than each peer."""
    advantages: dict[str, dict[str, float]] = {}
    for table in tables:
        for row, by_peer in ratios(table.figures).items():
            medians = {peer: statistics.median(values) for peer, values in by_peer.items()}
            advantages[row] = {peer: r if table.better == "higher" else 1 / r for peer, r in medians.items()}
    rows = list(reversed(advantages))
    peers = list(dict.fromkeys(peer for by_peer in advantages.values() for peer in by_peer))
    figure, axes = plots.pyplot().subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    for number, peer in enumerate(peers):
        offset = 0.8 / len(peers) * ((len(peers) - 1) / 2 - number)
        points = [(advantages[row][peer], at + offset) for at, row in enumerate(rows) if peer in advantages[row]]
        axes.scatter(*zip(*points, strict=True), label=peer, s=28)
    axes.axvline(1, color="black", linewidth=0.8)
    for at in range(len(rows) + 1):
        axes.axhline(at - 0.5, color="black", linewidth=0.3, alpha=0.3)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.set_xlabel("slower or larger than the peer   ←   1   →   faster or smaller")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=100_000, help="requests per run of redis-benchmark; 0: skip it")
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs for several workers; 0: skip them")
    parser.add_argument("--apart", action="store_true", help="run servers on one core, clients on the others")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios to this SVG or PNG file; needs matplotlib")
    parser.add_argument(
        "--systems", nargs="*", default=list(SYSTEMS), metavar="SYSTEM", help=f"{' '.join(SYSTEMS)}; default: all"
    )
    for name, build in ((brokers.BEFORE, "another commit"), (brokers.COMPILED, "the compiled build")):
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"Python of a virtual environment with {build} of dsmq")
    parser.add_argument("--operations", nargs="*", default=list(OPERATIONS), help=" ".join(OPERATIONS))
    options = parser.parse_args()
    builds = {brokers.BEFORE: options.before, brokers.COMPILED: options.compiled}
    cores = sorted(os.sched_getaffinity(0))
    if options.apart and len(cores) < 2:
        parser.error("--apart needs two cores")
    with ExitStack() as stack:
        with brokers.on_cores({cores[0]} if options.apart else None):
            found = brokers.find(stack, options.systems, {name: path for name, path in builds.items() if path})
        stack.enter_context(brokers.on_cores(set(cores[1:]) if options.apart else None))
        systems = [System(broker, stack) for broker in found]
        times = run_operations(systems, options.rounds, options.operations)
        rates = run_rates(systems, max(1, options.rounds // 2), options.requests) if options.requests else {}
        if options.jobs:
            rates |= run_workers(systems, max(1, options.rounds // 4), options.jobs)
    names = [system.name for system in systems]
    memory = run_memory(systems) if options.requests else {}
    if options.jobs:
        memory |= run_jobs_in_flight(systems, options.jobs)
    progress("")
    tables = [
        Table("µs", "lower", times),
        Table("a second", "higher", rates),
        Table("bytes", "lower", memory),
    ]
    tables = [table for table in tables if table.figures]
    where = "servers on one core, clients on the other" if options.apart else "placed by the kernel"
    about = (
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {len(cores)} cores,\n{where}, "
        f"medians of {options.rounds} rounds"
    )
    versions = brokers.versions(names)
    print(f"{about}\n" + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print("A ratio is dsmq's figure divided by the peer's. Quartiles are in parentheses.\n")
    print("\n\n".join("\n".join(lines(table)) for table in tables))
    if options.json:
        facts = {"about": about, "versions": versions, "figures": {table.unit: table.figures for table in tables}}
        options.json.write_text(json.dumps(facts, indent=1))
    if options.plot:
        plot(tables, about, options.plot)


if __name__ == "__main__":
    main()
