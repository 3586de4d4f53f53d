"""Servers on other systems, with resource limits, in a terminal, under nohup, and in a child process."""

from __future__ import annotations

import errno
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import ROOT, SOON, wait_until
from dsmq.client import connect
from dsmq.server import Server
from dsmq.system import allow_more_files

# Systems other than Unix


WITHOUT_UNIX = """
import os, signal, socket, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del socket.AF_UNIX, os.register_at_fork, os.fork, os.O_NOCTTY, signal.SIGHUP
"""


def without_unix(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python without the modules that Windows lacks."""
    command = [sys.executable, "-c", WITHOUT_UNIX + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SOON)


def test_unsupported_platform_is_reported_in_one_line() -> None:
    done = without_unix("sys.argv = ['dsmq', 'serve', '--port', '0']; from dsmq.__main__ import main; sys.exit(main())")
    assert done.returncode == 1
    reason = "this system can't run a dsmq server: it has no fcntl, no resource, no Unix sockets"
    assert done.stderr == f"dsmq: {reason}\n"
    code = "from dsmq.server import serve\ntry: serve()\nexcept Exception as error: print(type(error).__name__, error)"
    done = without_unix(code)
    assert (done.stdout, done.stderr) == (f"StartupError {reason}\n", "")


WITH_LITTLE_MEMORY = """
import asyncio, resource, sys
from pathlib import Path
from dsmq import aio
from dsmq.client import connect

MESSAGE = "x" * 70_000

async def main():
    async with aio.connect(port=int(sys.argv[1])) as mq:
        await mq.put("t", MESSAGE)
        assert await mq.get("t") == MESSAGE

asyncio.run(asyncio.sleep(0))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 8_000_000,) * 2)
with connect(port=int(sys.argv[1])) as mq:
    mq.put("t", MESSAGE)
    assert mq.get("t") == MESSAGE
asyncio.run(main())
"""


def test_clients_run_with_little_memory(server: Server) -> None:
    command = [sys.executable, "-c", WITH_LITTLE_MEMORY, str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SOON)
    assert (done.returncode, done.stderr) == (0, "")


# Without a limit, macOS allows about 10,000; others may not allow any change.
@pytest.mark.parametrize(
    ("allowed", "hard", "error"),
    [
        (10_240, resource.RLIM_INFINITY, ValueError("current limit exceeds maximum limit")),
        (3_000, 8_192, ValueError("current limit exceeds maximum limit")),
        (256, resource.RLIM_INFINITY, OSError(errno.EPERM, "Operation not permitted")),
    ],
)
def test_open_file_limit_is_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, allowed: int, hard: int, error: Exception
) -> None:
    limits = [(256, hard)]

    def setrlimit(_: int, wanted: tuple[int, int]) -> None:
        if wanted[0] > allowed:
            raise error
        limits.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    allow_more_files()
    assert allowed / 2 < limits[-1][0] <= allowed
    assert limits[-1][1] == hard


# A terminal


class Terminal:
    """`dsmq serve` in its own session, with a pty as its controlling terminal."""

    def __init__(self, log: Path, *prefix: str) -> None:
        self.master, slave = pty.openpty()
        self._log = log
        command = [
            "setsid",
            "--ctty",
            *prefix,
            sys.executable,
            "-m",
            "dsmq",
            "serve",
            "--port",
            "0",
            "--http-port",
            "off",
        ]
        with log.open("w") as stream:
            self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=stream, cwd=log.parent)
        os.close(slave)
        wait_until(lambda: "tokens" in self.text)

    @property
    def text(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        """Close the terminal; the kernel sends SIGHUP to the session leader."""
        os.close(self.master)
        self.master = -1


@contextmanager
def in_terminal(log: Path, *prefix: str) -> Iterator[Terminal]:
    server = Terminal(log, *prefix)
    try:
        yield server
    finally:
        if server.master >= 0:
            os.close(server.master)
        server.process.kill()
        server.process.wait()


def test_closing_terminal_stops_server(tmp_path: Path) -> None:
    with in_terminal(tmp_path / "log") as server:
        server.close()
        assert server.process.wait(SOON) == 0
        assert "stopping: SIGHUP" in server.text
        assert server.text.endswith("stopped\n")


def test_sighup_with_open_terminal_reloads(tmp_path: Path) -> None:
    with in_terminal(tmp_path / "log") as server:
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "configuration reloaded" in server.text)
        assert "stopping" not in server.text
        server.close()
        assert server.process.wait(SOON) == 0


def test_server_under_nohup_outlives_its_terminal_and_reloads(tmp_path: Path) -> None:
    with in_terminal(tmp_path / "log", "nohup") as server:
        server.close()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "configuration reloaded" in server.text)
        port = int(re.search(r"listening on 127.0.0.1:(\d+)", server.text)[1])  # type: ignore[index]
        with connect(port=port) as mq:
            mq.put("t", "x")
        server.process.terminate()
        assert server.process.wait(SOON) == 0


# A parent process


FORKED = """
import asyncio, multiprocessing, os, signal, sys, time
from dsmq.client import connect
from dsmq.server import serve

async def main(host):
    loop = asyncio.get_running_loop()
    called = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, called.set)
    server = multiprocessing.get_context("fork").Process(target=serve, args=(host,))
    server.start()
    with connect(host, timeout=float(sys.argv[2])) as mq:
        mq.put("t", "x")
    server.terminate()
    while server.is_alive():
        await asyncio.sleep(0.01)
    # Any output of the child has arrived by now.
    await asyncio.sleep(0.1)
    print("exit status", server.exitcode, "handler called", called.is_set())

asyncio.run(main(sys.argv[1]))
"""


def test_terminating_forked_server_calls_no_parent_handler(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, f"unix:{tmp_path}/socket", str(SOON)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SOON)
    assert (done.stdout, done.stderr) == ("exit status 0 handler called False\n", "")


def test_signal_handlers_are_restored_after_stop() -> None:
    code = """
import signal, socket, sys, threading
from dsmq.server import run, Server
from dsmq.settings import EmbeddedSettings
from dsmq import server
ours, theirs = socket.socketpair()
ours.setblocking(False)
signal.set_wakeup_fd(ours.fileno())
signal.signal(signal.SIGTERM, handler := lambda *_: None)
start = Server.start
def stop_soon(self):
    start(self)
    self.request_stop("the test")
Server.start = stop_soon
run(EmbeddedSettings(port=0))
assert signal.set_wakeup_fd(-1) == ours.fileno()
assert signal.getsignal(signal.SIGTERM) is handler
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=SOON)
    assert (done.returncode, done.stderr) == (0, "")


# Start methods


def example() -> str:
    """The server embedded as in the README."""
    [block] = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "multiprocessing" in block
    ]
    return str(block)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_readme_example_runs_with_every_start_method(tmp_path: Path, method: str) -> None:
    used = f"""
        from dsmq.client import connect
        with connect("unix:{tmp_path}/socket", timeout={SOON}) as mq:
            mq.put("greetings", "hello")
"""
    code = example().replace('("127.0.0.1", 30008)', f'("unix:{tmp_path}/socket",)')
    [indent] = re.findall(r"^( *)\.\.\.$", code, re.MULTILINE)
    code = re.sub(r"^ *\.\.\.$", lambda _: used.replace("\n        ", f"\n{indent}"), code, flags=re.MULTILINE)
    code = code.replace(
        "if __name__", f"if __name__ == '__main__':\n    mp.set_start_method({method!r})\nif __name__", 1
    )
    program = tmp_path / "program.py"
    program.write_text(code + "    server.join()\n    print('exit status', server.exitcode)\n")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False, timeout=SOON)
    assert (done.stdout, done.stderr) == ("exit status 0\n", "")
