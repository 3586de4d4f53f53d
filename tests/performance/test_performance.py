"""Runs the measurements on a small scale and checks that they detect failures. Figures are not checked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SOON, run_dsmq, serving, tool
from dsmq import bench
from dsmq.errors import DSMQError
from dsmq.server import Server

pytestmark = pytest.mark.slow

OPERATIONS = [
    "first short write",
    "short write (12 characters)",
    "long write (100,000 characters)",
    "empty read",
    "short read",
    "long read",
]


def run_script(name: str, *arguments: str) -> str:
    """Run a script; return its output."""
    command = [sys.executable, str(ROOT / "tests" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SOON * 6, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_measures_each_operation_on_a_running_server(server: Server) -> None:
    done = run_dsmq("bench", "--port", str(server.port), "-n", "20")
    assert done.returncode == 0
    assert done.stderr == b""
    lines = re.findall(r"(.*?) {2,}([\d,.]+) µs(?: +([\d,.]+) µs per 1,000 characters)?\n", done.stdout.decode())
    assert [name for name, *_ in lines] == OPERATIONS
    assert all(float(figure.replace(",", "")) > 0 for _, figure, _ in lines)
    assert [bool(per_1000) for *_, per_1000 in lines] == [False, False, True, False, False, True]
    assert server.status.counters().delivered == 20 + 1 + 1
    assert server.status.counters().gets_empty == 20


def test_bench_reports_lost_messages() -> None:
    class Forgetful:
        def put(self, topic: str, msg: str, /) -> None:
            pass

        def get(self, topic: str, /) -> str:
            return ""

    with pytest.raises(DSMQError, match="was not returned"):
        list(bench.measure(Forgetful(), 2, lambda _: None))


def test_bench_reports_too_long_messages_in_one_line() -> None:
    with serving(max_message_bytes=1000) as server:
        done = run_dsmq("bench", "--port", str(server.port), "-n", "2")
    assert done.returncode == 1
    assert done.stderr == b"dsmq: a message may have at most 1000 bytes, not 100000\n"


def test_suite_measures_a_system() -> None:
    first, *lines = run_script("performance/suite.py", "--count", "20").splitlines()
    assert first.startswith("dsmq ")
    assert [line.split("  ")[0] for line in lines] == OPERATIONS


def test_comparison_gives_ratios_to_redis(tmp_path: Path) -> None:
    tool("redis-server", "redis-server")
    figures = tmp_path / "figures.json"
    arguments = ["--systems", "dsmq", "redis", "--rounds", "1", "--requests", "0", "--jobs", "0"]
    arguments += ["--operations", "put", "get", "task_puts"]
    shown = run_script("performance/compare.py", *arguments, "--json", str(figures))
    assert "| µs, lower is better | dsmq | redis |" in shown
    by_row = json.loads(figures.read_text())["figures"]["µs"]
    assert set(by_row) == {"put", "get with a backlog", "put by 100 asyncio tasks"}
    ratio = by_row["put"]["dsmq"][0] / by_row["put"]["redis"][0]
    assert re.search(rf"\| put \| [\d.]+ \| {ratio:.2f} \|", shown)


def test_workers_are_compared() -> None:
    tool("redis-server", "redis-server")
    arguments = ["--systems", "dsmq", "redis", "--rounds", "1", "--requests", "0", "--jobs", "2000"]
    operations = ["work", "work_loop", "empty_work", "hand_over"]
    shown = run_script("performance/compare.py", *arguments, "--operations", *operations)
    assert re.search(r"\| take a job with a backlog, and finish it \| [\d.,]+ \| [\d.]+ \|", shown)
    for row in (
        "the same in a loop, as workers do",
        "from a put to the job at a waiting worker p99",
        "16 workers, jobs",
    ):
        assert re.search(rf"\| {row} \| [\d.,]+ \| [\d.]+ \|", shown)
    assert "| memory for a job in flight |" in shown


def test_readers_of_patterns_are_compared() -> None:
    tool("redis-server", "redis-server")
    systems = ["--systems", "dsmq", "redis streams"]
    small = ["--rounds", "1", "--scale", "0.02", "--readers", "1", "3"]
    figures = json.loads(run_script("performance/patterns.py", *small, "--json", *systems))
    assert len(figures) == 4
    assert all(set(by_system) == set(systems[1:]) for by_system in figures.values())


def test_costs_are_measured_at_each_level(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    run_script(
        "performance/scale.py", "--rounds", "1", "--most", "10", "--only", "topics", "waiting", "--json", str(figures)
    )
    costs = json.loads(figures.read_text())["costs"]
    assert {name: list(by_level) for name, by_level in costs.items()} == {"topics": ["1", "10"], "waiting": ["1", "10"]}
    assert all(result["put"] > 0 for by_level in costs.values() for result in by_level.values())
