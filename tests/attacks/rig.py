"""Shared by the attacks: server processes, their resources, other clients, the table."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import DSMQError

HERE = Path(__file__).parent
MIB = 1 << 20
HOST = "127.0.0.1"
# Max seconds to wait for an expected event.
SOON = 20.0
# Poll interval for events without a notification.
LOOK_SECONDS = 0.01
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
    """A row of the table; ok is None if it was measured but not checked."""

    attack: str
    wanted: str
    measured: str
    ok: bool | None


@dataclass
class Trial:
    """A run of one attack, and its results."""

    name: str
    quick: bool
    rows: list[Row] = field(default_factory=list)

    def size(self, full: float, quick: float) -> Any:
        """Return the size of something in a full or in a quick run."""
        return quick if self.quick else full

    def must(self, wanted: str, measured: str, ok: bool) -> None:
        self._note(wanted, measured, bool(ok))

    def timing(self, wanted: str, measured: str, ok: bool) -> None:
        """Record a figure that depends on the load of the machine: checked only in a full run."""
        self._note(wanted, measured, None if self.quick else bool(ok))

    def at_once(self, wanted: str, measured: str, seconds: float) -> None:
        """Record how long a client had to wait; a quick run allows more."""
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


def wait_until(condition: Callable[[], bool], seconds: float = SOON) -> bool:
    """Poll until the condition holds; return whether it did in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(LOOK_SECONDS)
    return True


# Processes


class Process:
    """A process, as seen in /proc."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def _status(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found is not None, name
        return int(found[1])

    @property
    def memory(self) -> int:
        """Resident, in bytes."""
        return self._status("VmRSS") * 1024

    @property
    def peak_memory(self) -> int:
        """Peak resident memory since `forget_peak`, in bytes."""
        return self._status("VmHWM") * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    @property
    def threads(self) -> int:
        return self._status("Threads")

    @property
    def files(self) -> int:
        """Number of open file descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_left() -> int:
    """Return the machine's available memory in bytes."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else sys.maxsize


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{2 if seconds < 0.1 else 0}f} ms"


# Servers


class Daemon(Process):
    """`dsmq serve` in a process of its own, on free ports."""

    def __init__(self, *words: str, popen: dict[str, Any] | None = None, ca_file: str = "", **settings: object) -> None:
        """`words` is what to run in place of `dsmq serve`; the settings go into its environment.

        ca_file is what its clients trust.
        """
        self._log = tempfile.NamedTemporaryFile("w")  # noqa: SIM115 - closed by close()
        # The attacks ignore the caller's settings for dsmq.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DSMQ_")}
        environment |= {"DSMQ_PORT": "0", "DSMQ_HTTP_PORT": "0"}
        environment |= {f"DSMQ_{name.upper()}": str(value) for name, value in settings.items()}
        # To a file, because a full pipe without a reader would block the writer.
        self.process = subprocess.Popen(
            words or (sys.executable, "-m", "dsmq", "serve"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env=environment,
            **(popen or {}),
        )
        super().__init__(self.process.pid)
        token = str(settings.get("auth_token", ""))
        self.security = {name: value for name, value in (("token", token), ("ca_file", ca_file)) if value}
        # A certificate is for a name.
        self.host = "localhost" if ca_file else HOST
        try:
            self.port = int(self._await_line(r"serves on .*?:(\d+)(?: |,)"))
            self.http_port = int(self._await_line(r"metrics on http://.*?:(\d+)/"))
        except BaseException:
            self.stop()
            raise

    def log(self) -> str:
        # Opened separately: seeking in the process's file would move its write position.
        return Path(self._log.name).read_text(errors="replace")

    def _await_line(self, pattern: str) -> str:
        found: list[str] = []
        wait_until(
            lambda: bool(found.extend(re.findall(pattern, self.log())) or found) or self.process.poll() is not None
        )
        if not found:
            raise RuntimeError(f"the server has not started:\n{self.log()}")
        return found[0]

    def client(self, **options: Any) -> DSMQClientSideConnection:
        return connect(self.host, self.port, **self.security, **options)

    def fetch(self, path: str = "/metrics", timeout: float = 5.0) -> str:
        """Return a page of the HTTP endpoint. Raises OSError."""
        with urllib.request.urlopen(f"http://{HOST}:{self.http_port}{path}", timeout=timeout) as page:
            return str(page.read().decode())

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels; 0 if it has no samples yet."""
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.fetch(), re.MULTILINE))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Stop it as systemd would; return its exit status. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(SOON)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode

    def close(self) -> None:
        self.stop()
        self._log.close()


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
        """Pause scraping while the HTTP endpoint can't answer: its process is stopped, or can't start threads."""
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
    """Run a server that is scraped continuously. After the attack it has to serve, without defects, and to stop."""
    progress(f"{trial.name}: starts")
    with ExitStack() as stack:
        daemon = Daemon(*words, popen=popen, ca_file=ca_file, **settings)
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
    """Return how long a new client takes to put a message and to have it; as good as for ever where it can't."""
    began = time.monotonic()
    try:
        with daemon.client(retry=False, timeout=SOON) as mq:
            mq.seek("a", mq.put("a", "hello world!") - 1)
            assert mq.get("a") == "hello world!"
    except (OSError, DSMQError, AssertionError) as error:
        progress(f"not served: {error!r}")
        return 1e9
    return time.monotonic() - began


# Other clients


class Bystander:
    """A client in its own process that puts and gets continuously, and measures the latency."""

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

    On few cores the attacker alone slows others down. So the control, during which the server is idle, is the baseline.
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
    trial.must("others are served all the while", f"{errors} of their calls failed", not errors)
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
