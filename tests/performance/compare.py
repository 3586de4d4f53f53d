"""How fast dsmq is beside what people would pick instead, as ratios: `python tests/performance/compare.py`.

Starts every server it finds on this machine, each on a free port, and runs the same work on each through its usual
Python client, one after the other in rounds; a figure is the median of the rounds' ratios. What is missing is skipped,
by name.
Absolute times mean little on a shared machine; ratios of the same minute do.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Operation, how often a round does it, and what it is called in the table.
OPERATIONS = {
    "put": (2000, "put"),
    "get": (2000, "get with a backlog"),
    "empty_get": (1000, "get with nothing there"),
    "large_put": (100, "put 100,000 characters"),
    "large_get": (100, "get 100,000 characters"),
    "put_many": (20000, "put_many, a message"),
    "ping_pong": (1000, "ping-pong between two processes"),
}
# These are slow enough to be measured by fewer.
FEWER = {"nats": 0.2, "dsmq14": 0.2}
BENCHMARKS = [["-c", "1"], ["-c", "10"], ["-c", "50"], ["-c", "50", "-P", "16"]]
PUT = {"dsmq": ["PUT", "t", "m"], "redis": ["XADD", "t", "*", "m", "m"]}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class System:
    """A broker and a client process that drives it."""

    def __init__(self, name: str, stack: ExitStack, python: str = sys.executable) -> None:
        self.name, self.python = name, python
        self.port = free_port()
        self.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dsmq-compare-"))
        self.start(self.command(), stack)
        wait_for_port(self.port)
        driver = [python, str(HERE / "drivers.py"), name, str(self.port)]
        self.driver = stack.enter_context(
            subprocess.Popen(driver, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.folder)
        )
        stack.callback(self.driver.kill)
        self.ask("")

    def command(self) -> list[str]:
        port = str(self.port)
        if self.name == "dsmq":
            return [self.python, "-m", "dsmq", "serve", "--port", port, "--metrics-port", "0", "--log-level", "error"]
        if self.name == "dsmq14":
            return [self.python, "-c", f"from dsmq.server import serve; serve('127.0.0.1', {port})"]
        if self.name == "redis":
            return ["redis-server", "--port", port, "--save", "", "--appendonly", "no"]
        if self.name == "beanstalkd":
            return ["beanstalkd", "-l", "127.0.0.1", "-p", port, "-z", "1000000"]
        return ["nats-server", "-a", "127.0.0.1", "-p", port, "-js", "-sd", self.folder]

    def start(self, command: list[str], stack: ExitStack) -> None:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, cwd=self.folder
        )
        stack.callback(process.wait)
        stack.callback(process.kill)

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


def wait_for_port(port: int) -> None:
    until = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def find_systems(stack: ExitStack, wanted: list[str]) -> list[System]:
    """Start what is here, and say what is not."""
    systems = []
    for name, program, module in (
        ("dsmq", sys.executable, "dsmq"),
        ("redis", "redis-server", "redis"),
        ("beanstalkd", "beanstalkd", "greenstalk"),
        ("nats", "nats-server", "nats"),
    ):
        if wanted and name not in wanted:
            continue
        if shutil.which(program) is None:
            say(f"skipped: {name}, {program} is not installed")
        elif subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode:
            say(f"skipped: {name}, Python's {module} is not installed")
        else:
            systems.append(System(name, stack))
    if not wanted or "dsmq14" in wanted:
        python = old_dsmq(stack)
        if python:
            systems.append(System("dsmq14", stack, python))
    return systems


def old_dsmq(stack: ExitStack) -> str | None:
    """Python of a virtual environment with dsmq 1.4.1, another project's, which bears the same name."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dsmq-compare-"))
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = f"{folder}/bin/python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", "dsmq==1.4.1"], capture_output=True, check=False)
    if done.returncode:
        say("skipped: dsmq 1.4.1, it could not be installed")
        return None
    return python


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def flatten(operation: str, figure: Any) -> dict[str, float]:
    if isinstance(figure, dict):
        return {f"{operation} {name}": value for name, value in figure.items()}
    return {} if figure is None else {operation: figure}


def run_operations(systems: list[System], rounds: int, operations: list[str]) -> dict[str, dict[str, list[float]]]:
    """Return, by row and system, a figure in microseconds for each round."""
    figures: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        for operation in operations:
            for system in systems:
                progress(f"round {number} of {rounds}: {operation} on {system.name}")
                for row, value in flatten(operation, system.measure(operation, OPERATIONS[operation][0])).items():
                    # The first round is to warm up.
                    if number:
                        figures.setdefault(row, {}).setdefault(system.name, []).append(value)
    return figures


def run_redis_benchmark(systems: list[System], rounds: int, requests: int) -> dict[str, dict[str, list[float]]]:
    """Return, by row and system, requests per second for each round."""
    figures: dict[str, dict[str, list[float]]] = {}
    if shutil.which("redis-benchmark") is None:
        say("skipped: redis-benchmark is not installed")
        return figures
    for number in range(rounds):
        for options in BENCHMARKS:
            for system in systems:
                if system.name in PUT:
                    row = f"redis-benchmark {' '.join(options)}"
                    progress(f"round {number + 1} of {rounds}: {row} on {system.name}")
                    count = requests if options != ["-c", "1"] else requests // 5
                    words = ["redis-benchmark", "-p", str(system.port), "-n", str(count), "--csv", *options]
                    done = subprocess.run([*words, *PUT[system.name]], capture_output=True, text=True, check=True)
                    rate = float(list(csv.reader(done.stdout.splitlines()))[-1][1])
                    figures.setdefault(row, {}).setdefault(system.name, []).append(rate)
    return figures


def ratios(figures: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return, by row and peer, the median over the rounds of dsmq's figure divided by the peer's."""
    return {
        row: {
            name: statistics.median(ours / theirs for ours, theirs in zip(by_system["dsmq"], values, strict=True))
            for name, values in by_system.items()
            if name != "dsmq"
        }
        for row, by_system in figures.items()
        if "dsmq" in by_system
    }


def table(figures: dict[str, dict[str, list[float]]], unit: str) -> list[str]:
    """Return the lines of a Markdown table."""
    peers = list(dict.fromkeys(name for by_system in figures.values() for name in by_system if name != "dsmq"))
    lines = [f"| {unit} | dsmq | {' | '.join(peers)} |", "| --- |" + " ---: |" * (len(peers) + 1)]
    for row, by_peer in ratios(figures).items():
        ours = statistics.median(figures[row]["dsmq"])
        cells = [f"{by_peer[peer]:.2f}" if peer in by_peer else "" for peer in peers]
        lines.append(f"| {label(row)} | {ours:,.1f} | {' | '.join(cells)} |")
    return lines


def label(row: str) -> str:
    operation, _, rest = row.partition(" ")
    return f"{OPERATIONS[operation][1]} {rest}".strip() if operation in OPERATIONS else row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=100_000, help="of redis-benchmark, each time")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--systems", nargs="*", default=[], help="dsmq redis beanstalkd nats dsmq14; default: all")
    parser.add_argument("--operations", nargs="*", default=list(OPERATIONS), help=" ".join(OPERATIONS))
    options = parser.parse_args()
    with ExitStack() as stack:
        systems = find_systems(stack, options.systems)
        times = run_operations(systems, options.rounds, options.operations)
        rates = run_redis_benchmark(systems, max(1, options.rounds // 2), options.requests) if options.requests else {}
    progress("")
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, medians of {options.rounds} interleaved rounds."
    )
    print("A ratio is dsmq's figure divided by the peer's.\n")
    if times:
        print("\n".join(table(times, "µs, lower is better")) + "\n")
    if rates:
        print("\n".join(table(rates, "PUT against XADD, requests/s, higher is better")))
    if options.json:
        options.json.write_text(json.dumps({"microseconds": times, "requests_per_second": rates}, indent=1))


if __name__ == "__main__":
    main()
