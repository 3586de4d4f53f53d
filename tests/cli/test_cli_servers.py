"""`dsmq serve`: failed starts, interrupts, closed pipes, other systems, and stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import closing
from pathlib import Path

import pytest
from commands import (
    address,
    assert_one_line,
    ended,
    line_of,
    mq,
    result,
    server,
    started,
    topic,
    type_in,
    waiters,
    waiting,
)

from conftest import ROOT, SOON, Daemon, Wire, daemon, run_dsmq, serving, wait_until, without_privileges
from dsmq import __version__
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.wire.resp import BUILD, encode_request

# Fixtures.
__all__ = ["address", "mq", "server", "topic"]

# Servers that can't start


def test_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = result("serve", "--port", port, "--http-port", "0")
        assert_one_line(done, 1, f"127.0.0.1:{port}: the address is in use")
        done = result("serve", "--port", "0", "--http-port", port)
        assert_one_line(done, 1, f"127.0.0.1:{port}: the address is in use")


def test_address_of_another_machine_is_reported() -> None:
    done = result("serve", "--host", "192.0.2.1", "--port", "0", "--http-port", "off")
    assert_one_line(done, 1, "192.0.2.1:0: Cannot assign requested address")
    done = result("serve", "--http-host", "192.0.2.1", "--port", "0", "--http-port", "0")
    assert_one_line(done, 1, "192.0.2.1:0: Cannot assign requested address")


def test_privileged_port_is_reported() -> None:
    done = run_dsmq("serve", "--port", "1", "--http-port", "off", prefix=without_privileges())
    assert_one_line((done.returncode, done.stdout, done.stderr), 1, "127.0.0.1:1: Permission denied")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("missing/socket", "No such file"), ("file", "not a socket"), ("x" * 200, "too long")],
)
def test_invalid_unix_path_is_reported(name: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a socket")
    host = f"unix:{tmp_path / name}"
    done = result("serve", "--host", host, "--http-port", "off")
    assert_one_line(done, 1, host)
    assert expected in done[2].decode()
    assert (tmp_path / "file").read_text() == "not a socket"


@pytest.mark.parametrize("options", ["--host unix:", "--http-host unix:", "--http-host unix:{folder}/metrics"])
def test_unix_socket_needs_a_path_and_serves_no_metrics(options: str, tmp_path: Path) -> None:
    words = options.format(folder=tmp_path).split()
    with started("serve", "--port", "0", "--http-port", "0", *words) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert b"listening on" not in first
        status, out, rest = ended(process)
        assert status in (1, 2)
        assert_one_line((status, out, first + rest), status, words[-1])


# Interrupted


@pytest.mark.parametrize(
    "run",
    ["runpy.run_module('dsmq', run_name='__main__')", "sys.exit(getattr(importlib.import_module(where), what)())"],
)
def test_ctrl_c_during_import_is_quiet(run: str) -> None:
    where, _, what = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["dsmq"].partition(":")
    code = f"""
import importlib, runpy, signal, sys
class CtrlC:
    def find_spec(self, name, path, target=None):
        if name == "dsmq.errors":
            signal.raise_signal(signal.SIGINT)
where, what = {where!r}, {what!r}
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, CtrlC())
{run}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=SOON, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("options", [["--follow"], ["--wait", "60"]], ids=" ".join)
def test_ctrl_c_ends_get_without_traceback(options: list[str], topic: str, server: Daemon) -> None:
    with waiting(server.port, "get", topic, *options) as process:
        process.send_signal(signal.SIGINT)
        assert ended(process) == (130, b"", b"")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("command", ["put t x", "put t", "get t --follow", "topics", "ping", "ping --tls", "bench"])
def test_ctrl_c_while_connecting_is_quiet(command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        with started(*command.split(), "--port", port) as process, silent.accept()[0] as connection:
            # Its first request gets no reply.
            assert connection.recv(1)
            process.send_signal(signal.SIGINT)
            assert ended(process) == (130, b"", b"")


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_put_without_losing_lines(topic: str, mq: DSMQClientSideConnection) -> None:
    with started("put", topic) as process:
        type_in(process, b"line\n")
        assert mq.get_wait(topic, timeout=SOON) == "line"
        process.send_signal(signal.SIGINT)
        # It must not wait for the end of stdin, which is still open.
        assert process.wait(SOON) == 130
        assert ended(process) == (130, b"", b"")


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_server_without_traceback() -> None:
    with daemon() as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(SOON) == 0
        assert "Traceback" not in server.log()
        assert "stopping: SIGINT" in server.log()


# Closed pipes and files


def test_closed_output_pipe_is_not_an_error(topic: str, mq: DSMQClientSideConnection) -> None:
    # More than a pipe can buffer.
    mq.put_many(topic, ["x" * 10_000] * 100)
    with started("get", topic, "--after", "0", "-n", "100") as process:
        assert line_of(process) == b"x" * 10_000 + b"\n"
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(SOON) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_follow_ends_at_next_message_if_output_is_closed(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic, "1")
    with started("get", topic, "--after", "0", "--follow") as process:
        assert line_of(process) == b"1\n"
        assert process.stdout is not None
        process.stdout.close()
        mq.put(topic, "2")
        assert process.wait(SOON) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""


@pytest.mark.parametrize("arguments", ["--help", "serve --help", "config", "topics"])
def test_unread_output_is_quiet(arguments: str, address: None) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "dsmq", *arguments.split()], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert process.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_full_disk_is_reported(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic, "x")
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "dsmq", "get", topic, "--after", "0"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (process.returncode, process.stderr) == (1, b"dsmq: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["--help", "get --help", "--version"])
def test_full_disk_is_reported_by_help(arguments: str, unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        command, env = [sys.executable, "-m", "dsmq", *arguments.split()], os.environ | {"PYTHONUNBUFFERED": unbuffered}
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env, check=False)
    assert (process.returncode, process.stderr) == (1, b"dsmq: No space left on device\n")


@pytest.mark.parametrize("redirection", ["put {topic} <&-", "get {topic} --after 0 >&-", "topics >&-", "ping >&-"])
def test_closed_standard_files_cause_no_traceback(
    redirection: str, address: None, server: Daemon, mq: DSMQClientSideConnection
) -> None:
    mq.put("closed", "x")
    command = f'"{sys.executable}" -m dsmq {redirection.format(topic="closed")}'
    process = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, check=False)
    assert process.stderr.count(b"\n") <= 1


def test_message_does_not_count_as_read_if_stdout_is_closed(
    topic: str, mq: DSMQClientSideConnection, tmp_path: Path
) -> None:
    mq.put(topic, "x")
    command = f'"{sys.executable}" -m dsmq get {topic} --last 1 --position-file "{tmp_path}/at" >&-'
    process = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, check=False)
    assert (process.returncode, process.stderr) == (1, b"dsmq: Bad file descriptor\n")
    assert not (tmp_path / "at").exists()


# Other systems

# Names that Windows lacks; macOS lacks some of them.
WITHOUT = """
import os, signal, socket, sys, time
for module, names in (
    (socket, ["AF_UNIX"]),
    (signal, ["SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "pthread_sigmask"]),
    (os, ["fork", "register_at_fork", "sched_yield", "geteuid", "getuid"]),
    (time, [name for name in dir(time) if name.lower().startswith("clock_")]),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
from dsmq.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def elsewhere(*words: str) -> tuple[int, bytes, bytes]:
    done = subprocess.run([sys.executable, "-c", WITHOUT, *words], capture_output=True, timeout=SOON * 3, check=False)
    return done.returncode, done.stdout, done.stderr


def test_client_commands_run_without_unix_only_modules(topic: str, tmp_path: Path) -> None:
    assert elsewhere("put", topic, "hello") == (0, b"", b"")
    file = tmp_path / "position"
    assert elsewhere("get", topic, "--after", "0", "--position-file", str(file)) == (0, b"hello\n", b"")
    assert file.exists()
    assert elsewhere("ping")[::2] == elsewhere("topics")[::2] == (0, b"")
    assert_one_line(elsewhere("ping", "--host", "unix:/socket"), 1, "this system has no Unix sockets")


# Stopping a server


def test_sigterm_stops_server_and_answers_waiting_readers() -> None:
    with daemon() as server, closing(Wire(("127.0.0.1", server.port))) as wire:
        wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: waiters(server.port) == 1)
        assert server.stop() == 0
        assert wire.receive() is None
        assert wire.ended()
        assert "stopping: SIGTERM" in server.log()
        assert "Traceback" not in server.log()


def test_server_can_be_stopped_as_soon_as_it_reports_serving() -> None:
    script = """
import logging, os, signal, sys
from dsmq.__main__ import main
class Stopper(logging.Handler):
    def emit(self, record):
        if "listening on" in record.getMessage():
            os.kill(os.getpid(), signal.SIGTERM)
logging.getLogger("dsmq").addHandler(Stopper())
sys.exit(main(["serve", "--port", "0", "--http-port", "off"]))
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, timeout=SOON, check=False)
    assert done.returncode == 0
    assert b"stopping: SIGTERM" in done.stderr


def test_stopped_server_is_not_an_empty_queue() -> None:
    with (
        daemon() as server,
        waiting(server.port, "get", "t", "--wait", "60", "--reconnect", "0", "--port", str(server.port)) as process,
    ):
        assert server.stop() == 0
        assert_one_line(ended(process), 1, "server")


def test_put_reports_stopped_server() -> None:
    with daemon() as server, started("put", "t", "--reconnect", "0", "--port", str(server.port)) as process:
        with connect(port=server.port) as mq:
            mq.seek("t", 0)
            type_in(process, b"1\n")
            assert mq.get_wait("t", timeout=SOON) == "1"
        assert server.stop() == 0
        type_in(process, b"2\n")
        assert_one_line(ended(process), 1, "server")


def test_put_resumes_after_server_restart() -> None:
    with serving() as first, started("put", "t", "--port", str(first.port)) as process:
        with connect(port=first.port) as mq:
            type_in(process, b"1\n")
            assert mq.get_wait("t", timeout=SOON) == "1"
        first.stop()
        type_in(process, b"2\n")
        with serving(port=mq.port), connect(port=mq.port) as mq:
            mq.seek("t", 0)
            assert mq.get_wait("t", timeout=SOON) == "2"
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
            status, out, err = ended(process)
    assert (status, out) == (0, b"")
    lost, anew = err.decode().splitlines()
    assert lost.startswith(f"dsmq: connection to 127.0.0.1:{mq.port} lost, trying again: ")
    assert anew == "dsmq: the server was restarted: its messages are lost"


# Others


def test_version_is_printed() -> None:
    assert result("--version") == (0, f"dsmq {__version__} ({BUILD})\n".encode(), b"")


def test_server_options_take_effect() -> None:
    with (
        daemon("--max-age-seconds", "7", env={"DSMQ_MAX_TOPIC_BYTES": "9"}) as server,
        closing(Wire(("127.0.0.1", server.port))) as wire,
    ):
        assert wire.call("CONFIG", "GET", "max_age_seconds") == [b"max_age_seconds", b"7.0"]
        assert wire.call("CONFIG", "GET", "max_topic_bytes") == [b"max_topic_bytes", b"9"]


def test_log_level_is_the_minimum_logged(tmp_path: Path) -> None:
    host = f"unix:{tmp_path}/socket"
    with started("serve", "--host", host, "--http-port", "off", "--log-level", "error") as server:
        wait_until(lambda: result("ping", "--host", host)[0] == 0)
        server.terminate()
        assert ended(server) == (0, b"", b"")


def test_server_can_be_stopped_before_it_serves() -> None:
    code = """
import signal, sys
from dsmq.__main__ import main
class Finder:
    def find_spec(self, name, *_):
        # It has begun to load its modules.
        if name == "pydantic":
            signal.raise_signal(signal.SIGTERM)
sys.meta_path.insert(0, Finder())
sys.exit(main(["serve", "--port", "0", "--http-port", "off"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=SOON, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
