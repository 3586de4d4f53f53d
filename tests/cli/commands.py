"""Shared by the tests of the command line: a server and commands that finish or wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from conftest import SOON, Daemon, Wire, run_dsmq, wait_until
from dsmq.client import DSMQClientSideConnection, connect

Process = subprocess.Popen[bytes]


@pytest.fixture
def server(shared_daemon: Daemon) -> Daemon:
    return shared_daemon


@pytest.fixture
def address(server: Daemon) -> None:
    """Make the commands use the server."""
    os.environ["DSMQ_PORT"] = str(server.port)


@pytest.fixture
def topic(request: pytest.FixtureRequest, address: None) -> str:
    return str(request.node.name)


@pytest.fixture
def mq(server: Daemon) -> Iterator[DSMQClientSideConnection]:
    with connect(port=server.port, retry=False) as mq:
        yield mq


@contextmanager
def started(*arguments: str) -> Iterator[Process]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dsmq", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def waiting(port: int, *arguments: str) -> Iterator[Process]:
    """Start a command and wait until it is waiting for a message."""
    wait_until(lambda: waiters(port) == 0)
    with started(*arguments) as process:
        wait_until(lambda: waiters(port) == 1)
        yield process


def waiters(port: int) -> int:
    with closing(Wire(("127.0.0.1", port))) as wire:
        info = wire.call("INFO", "clients")
    assert isinstance(info, bytes)
    return int(info.split(b"blocked_clients:")[1].split()[0])


def line_of(process: Process) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def type_in(process: Process, data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.flush()


def ended(process: Process) -> tuple[int, bytes, bytes]:
    """Return a command's exit status and the rest of its stdout and stderr."""
    out, err = process.communicate(timeout=SOON)
    return process.returncode, out, err


def result(*arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> tuple[int, bytes, bytes]:
    done = run_dsmq(*arguments, stdin=stdin, env=env)
    return done.returncode, done.stdout, done.stderr


def assert_one_line(done: tuple[int, bytes, bytes], status: int, expected: str) -> None:
    """Check that a command printed a one-line error and nothing else."""
    returned, out, err = done
    text = err.decode()
    assert text.startswith("dsmq"), text
    assert text.count("\n") == 1, text
    assert text.endswith("\n"), text
    assert expected in text
    assert (returned, out) == (status, b"")


NASTY = "\x1b[2J\x9b\x7f\r\n\t\u202e\u2028"
ESCAPED = r"\x1b[2J\x9b\x7f\r\n\t\u202e\u2028"


def on_terminal(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command on a terminal; return its exit status and output."""
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dsmq", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env={**os.environ, **(env or {})},
    )
    os.close(slave)
    shown = b""
    with suppress(OSError):  # The end of a terminal on Linux.
        while data := os.read(master, 65_536):
            shown += data
    os.close(master)
    return process.wait(SOON), shown.decode()
