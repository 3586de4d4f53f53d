"""The servers that are compared: how to start each, which are installed, and progress on the terminal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path

from dsmq.demo_cluster import free_ports

# Name, program, option that prints its version, Python package of its usual client.
KNOWN = (
    ("dsmq", sys.executable, "", "dsmq"),
    ("redis", "redis-server", "--version", "redis"),
    ("redis-lists", "redis-server", "--version", "redis"),
    ("beanstalkd", "beanstalkd", "-v", "greenstalk"),
    ("rabbitmq", "rabbitmq-server", "", "pika"),
    ("nats", "nats-server", "--version", "nats-py"),
    ("mosquitto", "mosquitto", "-h", "paho-mqtt"),
)
OLD = "dsmq14"
OLD_VERSION = "1.4.1"
# Other builds of this project, each in its own virtual environment: of another commit, and compiled.
BEFORE, COMPILED = "before", "compiled"
BUILDS = ("dsmq", BEFORE, COMPILED)
# Another program may take a free port before it is used; then try another one.
PORTS_TRIED = 5


class Broker:
    """A running server, on a free port of 127.0.0.1."""

    def __init__(self, name: str, stack: ExitStack, *options: str, python: str = sys.executable) -> None:
        self.name, self.python = name, python
        self.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dsmq-performance-"))
        self._epmd: dict[str, str] = {}
        self._said = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115 - by the stack
        for _attempt in range(PORTS_TRIED):
            (self.port,) = free_ports(1)
            self.process = self._start(options)
            stack.callback(self.stop)
            if self._answers():
                return
        self._said.seek(0)
        raise RuntimeError(f"{name} does not start: {self._said.read()[-2000:]}")

    def _start(self, options: tuple[str, ...]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self._command(), *options],
            stdout=self._said,
            stderr=self._said,
            stdin=subprocess.DEVNULL,
            cwd=self.folder,
            env=os.environ | (self._rabbitmq() if self.name == "rabbitmq" else {}),
            start_new_session=True,
        )

    def _rabbitmq(self) -> dict[str, str]:
        """Return the environment of a node of RabbitMQ that shares nothing with others."""
        epmd, dist = free_ports(2)
        values = {
            "NODENAME": f"dsmq{self.port}@localhost",
            "NODE_IP_ADDRESS": "127.0.0.1",
            "NODE_PORT": f"{self.port}",
            "DIST_PORT": f"{dist}",
            "MNESIA_BASE": f"{self.folder}/mnesia",
            "LOG_BASE": f"{self.folder}/log",
            "ENABLED_PLUGINS_FILE": f"{self.folder}/plugins",
            "CONF_ENV_FILE": "/dev/null",
        }
        self._epmd = {"ERL_EPMD_PORT": f"{epmd}", "ERL_EPMD_RELAXED_COMMAND_CHECK": "1"}
        return {f"RABBITMQ_{name}": value for name, value in values.items()} | {"HOME": self.folder} | self._epmd

    def _command(self) -> list[str]:
        port = str(self.port)
        serve = [self.python, "-m", "dsmq", "serve", "--port", port, "--http-port", "0", "--log-level", "error"]
        redis = ["redis-server", "--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no"]
        return {
            **dict.fromkeys(BUILDS, serve),
            OLD: [self.python, "-c", f"from dsmq.server import serve; serve('127.0.0.1', {port})"],
            "redis": redis,
            "redis-lists": redis,
            "mosquitto": ["mosquitto", "-p", port],
            "beanstalkd": ["beanstalkd", "-l", "127.0.0.1", "-p", port, "-z", "10000000"],
            # Without the wrapper, which changes the user.
            "rabbitmq": ["/usr/lib/rabbitmq/bin/rabbitmq-server"],
            "nats": ["nats-server", "-a", "127.0.0.1", "-p", port, "-js", "-sd", self.folder],
        }[self.name]

    def _answers(self) -> bool:
        """Wait until it accepts connections; False if it has ended. Raises ConnectionRefusedError after 60 s."""
        until = time.monotonic() + 60
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except ConnectionRefusedError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
            else:
                return True
        return False

    @property
    def memory(self) -> int:
        """Resident memory of its processes in bytes."""
        found = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):
                if os.getpgid(int(status.parent.name)) == self.process.pid:
                    found += int((re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) or (0, 0))[1])
        return found * 1024

    def stop(self) -> None:
        """Kill it. Idempotent."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self._epmd:
            # A daemon that the node has started.
            subprocess.run(["epmd", "-kill"], env=os.environ | self._epmd, capture_output=True, check=False)
            self._epmd = {}


def find(stack: ExitStack, wanted: Collection[str], builds: dict[str, str] | None = None) -> list[Broker]:
    """Start the wanted servers and report those that are not installed.

    `builds` are other builds of dsmq to start too: the Python of each one's virtual environment.
    """
    brokers = []
    for name, program, _, package in KNOWN:
        if name not in wanted:
            continue
        if shutil.which(program) is None:
            say(f"skipped: {name}, {program} is not installed")
        elif not _has(package):
            say(f"skipped: {name}, Python's {package} is not installed")
        else:
            brokers.append(Broker(name, stack))
    brokers += [Broker(name, stack, python=python) for name, python in (builds or {}).items()]
    if OLD in wanted and (python := _old_python(stack)):
        brokers.append(Broker(OLD, stack, python=python))
    return brokers


def _has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _old_python(stack: ExitStack) -> str | None:
    """Return the Python of a virtual environment with dsmq 1.4.1 from PyPI, a different project."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dsmq-performance-"))
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = f"{folder}/bin/python"
    wanted = [python, "-m", "pip", "install", "-q", f"dsmq=={OLD_VERSION}"]
    if subprocess.run(wanted, capture_output=True, check=False).returncode:
        say(f"skipped: dsmq {OLD_VERSION}, it could not be installed")
        return None
    return python


def versions(names: list[str]) -> dict[str, str]:
    """Return the versions of server and client by name."""
    found = {}
    for name, program, option, package in KNOWN:
        if name in names:
            client = metadata.version(package)
            found[name] = f"{_version_of([program, option])} with {package} {client}" if option else client
    if OLD in names:
        found[OLD] = OLD_VERSION
    return found


def _version_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else "of unknown version"


@contextmanager
def on_cores(cores: set[int] | None) -> Iterator[None]:
    """Run processes started here on these cores; None: any cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ratios(ours: Iterable[float], theirs: Iterable[float]) -> list[float]:
    """Return our figure divided by theirs, for each round."""
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def median_ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    return statistics.median(ratios(ours, theirs))


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median and, if there are several values, the first and the third quartile."""
    if len(values) < 2:
        return f"{values[0]:,.{digits}f}"
    first, median, third = (f"{value:,.{digits}f}" for value in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{median} ({first} to {third})"


def say(line: str) -> None:
    """Print to stderr, over the progress line."""
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{clear}{line}", file=sys.stderr, flush=True)


def progress(line: str) -> None:
    """Show the current step, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
