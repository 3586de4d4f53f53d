"""Shared by the attacks: server processes, their resources, other clients, the table."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dsmq.errors import DSMQError
from helpers import SOON, Daemon

HERE = Path(__file__).parent
MIB = 1 << 20
SCRAPE_SECONDS = 0.2
LONGEST_SCRAPE_SECONDS = 1.0
# Max seconds until a client is served after an attack.
AT_ONCE_SECONDS = 1.0
# Attacks stop if the machine has less free memory than this.
LEAST_MEMORY_LEFT = 3 << 30


class NotHere(Exception):
    """An attack can't run on this machine; the message says why."""


@dataclass(frozen=True)
class Row:
    """A row of the table; ok is None if the figure was not checked."""

    attack: str
    wanted: str
    measured: str
    ok: bool | None


@dataclass
class Trial:
    """A run of one attack and its results."""

    name: str
    quick: bool
    rows: list[Row] = field(default_factory=list)

    def size(self, full: float, quick: float) -> Any:
        """Return the size of something in a full or in a quick run."""
        return quick if self.quick else full

    def must(self, wanted: str, measured: str, ok: bool) -> None:
        self._note(wanted, measured, bool(ok))

    def timing(self, wanted: str, measured: str, ok: bool) -> None:
        """Record a figure that depends on the machine's load, so that only a full run checks it."""
        self._note(wanted, measured, None if self.quick else bool(ok))

    def at_once(self, wanted: str, measured: str, seconds: float) -> None:
        """Record how long a client had to wait; a quick run allows longer waits."""
        self._note(wanted, measured, seconds < (SOON if self.quick else AT_ONCE_SECONDS))

    def state(self, about: str, measured: str) -> None:
        """Record a figure without a limit."""
        self._note(about, measured, None)

    def _note(self, wanted: str, measured: str, ok: bool | None) -> None:
        self.rows.append(Row(self.name, wanted, measured, ok))
        progress(f"{self.name}: {wanted}: {measured}")

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.ok is False]


def table(rows: list[Row]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| attack | expected | measured | ok |", "| --- | --- | --- | --- |"]
    shown = {True: "yes", False: "**no**", None: "-"}
    return lines + [f"| `{row.attack}` | {row.wanted} | {row.measured} | {shown[row.ok]} |" for row in rows]


def progress(line: str) -> None:
    """Print the current step; on a terminal, over the previous one."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:150]}", end="", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def memory_left() -> int:
    """Return the machine's available memory in bytes."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else sys.maxsize


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{2 if seconds < 0.1 else 0}f} ms"


class Scraper:
    """Requests /metrics continuously, in its own thread."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._ended = threading.Event()
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._idle = threading.Event()
        self.taken: list[float] = []
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run, name="scraper")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._may_go_on.set()
        self._thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause scraping while the HTTP endpoint can't reply, because its process is stopped or can't start threads."""
        self._may_go_on.clear()
        self._idle.wait(SOON)
        try:
            yield
        finally:
            self._idle.clear()
            self._may_go_on.set()

    def _run(self) -> None:
        while not self._ended.wait(SCRAPE_SECONDS):
            if not self._may_go_on.is_set():
                self._idle.set()
                self._may_go_on.wait()
                continue
            began = time.monotonic()
            try:
                self._daemon.fetch()
            except OSError as error:
                self.failures.append(str(error))
            self.taken.append(time.monotonic() - began)


@dataclass
class Victim:
    """A server under attack."""

    daemon: Daemon
    scraper: Scraper


@contextmanager
def victim(
    trial: Trial, *words: str, popen: dict[str, Any] | None = None, ca_file: str = "", **settings: object
) -> Iterator[Victim]:
    """Run a server that is scraped continuously. After the attack, it must serve without errors, and stop."""
    progress(f"{trial.name}: starting")
    with ExitStack() as stack:
        daemon = Daemon(**({"command": words} if words else {}), popen=popen, ca_file=ca_file, **settings)
        stack.callback(daemon.close)
        with Scraper(daemon) as scraper:
            yield Victim(daemon, scraper)
            served = serve_time(daemon)
            failures = daemon.metric("dsmq_failures_total")
        scrapes, slowest = len(scraper.taken), max(scraper.taken, default=0.0)
        status = daemon.stop()
        # If SQLite fails, a failing expiry is not a defect.
        errors = re.findall(r"^.* ERROR (?!expiry failed).*", daemon.log(), re.MULTILINE)
        trial.must(
            "afterwards: served at once, no defect, every scrape answered within 1 s, stops with status 0",
            f"{milliseconds(served)}; failures {failures:.0f}, errors logged {len(errors)}; {scrapes} scrapes, "
            f"{len(scraper.failures)} failed, slowest {milliseconds(slowest)}; status {status}",
            served < (SOON if trial.quick else AT_ONCE_SECONDS)
            and not failures
            and not errors
            and not scraper.failures
            and (trial.quick or slowest < LONGEST_SCRAPE_SECONDS)
            and status == 0,
        )


def serve_time(daemon: Daemon) -> float:
    """Return how long a new client takes to put and get a message; if it fails, a very long time."""
    began = time.monotonic()
    try:
        with daemon.client(retry=False, timeout=SOON) as mq:
            mq.seek("a", mq.put("a", "hello world!") - 1)
            while not mq.get("a"):
                # If max_age_seconds is short and the machine is busy, the message may expire before it is read.
                assert time.monotonic() < began + SOON
                mq.seek("a", mq.put("a", "hello world!") - 1)
    except (OSError, DSMQError, AssertionError) as error:
        progress(f"not served: {error!r}")
        return 1e9
    return time.monotonic() - began


# Other clients


class Bystander:
    """A client in its own process that puts and gets continuously and measures the latency."""

    def __init__(self, stack: ExitStack, daemon: Daemon) -> None:
        self._process = stack.enter_context(
            subprocess.Popen(
                [
                    sys.executable,
                    str(HERE / "bystander.py"),
                    daemon.host,
                    str(daemon.port),
                    json.dumps(daemon.security),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(self._process.kill)
        self._ask("")

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the bystander has ended")
        return dict(json.loads(answer))

    def take(self) -> dict[str, Any]:
        """Return results since the last call: count, median, p99, longest (seconds), errors."""
        return self._ask("take")

    def during(self, call: Callable[[], object]) -> dict[str, Any]:
        """Return the results during a call."""
        self.take()
        call()
        return self.take()


@contextmanager
def sink() -> Iterator[int]:
    """Run a process that accepts, reads and discards, as a control; return its port."""
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen([sys.executable, str(HERE / "sink.py")], stdout=subprocess.PIPE, text=True)
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        yield int(process.stdout.readline())


def compare_latency(
    trial: Trial,
    daemon: Daemon,
    attack: Callable[[int], object],
    *,
    most: float = 2.0,
    calm_seconds: float = 3.0,
    in_quick: bool = False,
) -> None:
    """Run an attack on the server and, as a control, on a sink; record the ratio of other clients' p99.

    With few cores, the attacker alone slows others down, so the baseline is the control, during which the server is
    idle.
    """
    if trial.quick and not in_quick:
        return
    met: dict[str, list[dict[str, Any]]] = {"calm": [], "control": [], "attack": []}
    rounds = trial.size(3, 1)
    with ExitStack() as stack:
        looker_on = Bystander(stack, daemon)
        calm_seconds = trial.size(calm_seconds, 0.1)
        # A client's first calls are slower.
        looker_on.during(lambda: time.sleep(calm_seconds / 3))
        for number in range(rounds):
            progress(f"{trial.name}: round {number + 1} of {rounds}")
            met["calm"].append(looker_on.during(lambda: time.sleep(calm_seconds)))
            if not trial.quick:
                with sink() as port:
                    met["control"].append(looker_on.during(lambda: attack(port)))
            met["attack"].append(looker_on.during(lambda: attack(daemon.port)))
    errors = sum(one["errors"] for ones in met.values() for one in ones)
    trial.must("others are served meanwhile", f"{errors} of their calls failed", not errors)
    if not trial.quick:
        _note_ratios(trial, met, most)


def _note_ratios(trial: Trial, met: dict[str, list[dict[str, Any]]], most: float) -> None:
    p99 = {name: [one["p99"] for one in ones] for name, ones in met.items()}
    as_is = [ours / theirs for ours, theirs in zip(p99["attack"], p99["calm"], strict=True)]
    controlled = [ours / theirs for ours, theirs in zip(p99["attack"], p99["control"], strict=True)]
    figures = ", ".join(
        f"{milliseconds(statistics.median(p99[name]))} {name}" for name in ("calm", "control", "attack")
    )
    trial.timing(
        f"p99 of others at most {most:g} times that beside the same attacker on a sink",
        f"{_spread(controlled)} ({figures}; to calm {_spread(as_is)}; "
        f"longest {milliseconds(max(one['longest'] for one in met['attack']))})",
        statistics.median(controlled) <= most,
    )


def _spread(values: list[float]) -> str:
    """Return a median with its values."""
    return f"{statistics.median(values):.2f} of {' '.join(f'{value:.2f}' for value in sorted(values))}"
