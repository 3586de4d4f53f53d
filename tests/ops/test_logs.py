"""The log: as text, as JSON, for the journal; floods; and logs that nothing reads."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import pytest

from conftest import SOON, Wire, daemon, serving, wait_until, wire_to
from dsmq import logs
from dsmq.client import connect


def record(message: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("dsmq").makeRecord("dsmq", level, "file.py", 1, message, (), None, extra=extra or None)
    made.created = datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC).timestamp()
    return made


def test_event_is_logged_as_json() -> None:
    line = logs.JSONFormatter().format(record("client 7: wrong token", **logs.event("wrong_token", client=7)))
    assert json.loads(line) == {
        "time": "2026-01-02T03:04:05.678+00:00",
        "level": "info",
        "event": "wrong_token",
        "message": "client 7: wrong token",
        "client": 7,
    }


def test_exception_as_json_is_one_line() -> None:
    made = record("failed", logging.ERROR)
    try:
        raise ValueError("why\nnot")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = logs.JSONFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: why" in json.loads(line)["exception"]


@pytest.mark.parametrize(
    ("level", "priority"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3), ("CRITICAL", 2)]
)
def test_journal_line_begins_with_priority(level: str, priority: int) -> None:
    formatter = logs.JournalFormatter("%(message)s")
    line = record("a\nb", getattr(logging, level))
    assert formatter.format(line) == f"<{priority}>a\\nb"
    line.exc_info = (ValueError, ValueError("c\x1b"), None)
    assert formatter.format(line) == f"<{priority}>a\\nb\n<{priority}>ValueError: c\\x1b"


NASTY = "\x1b[2J\x9b\x7f\r\n2026-01-01 INFO forged\t\u2028\u202e\ud800"


def test_client_cannot_forge_log_lines_or_control_terminal() -> None:
    line = logging.getLogger("dsmq").makeRecord("dsmq", logging.INFO, "file.py", 1, "user %s", (NASTY,), None)
    for form in ("text", "journal"):
        shown = logs.formatter(form, sys.stderr).format(line)
        assert shown.endswith("user \\x1b[2J\\x9b\\x7f\\r\\n2026-01-01 INFO forged\\t\\u2028\\u202e\\ud800")
        assert shown.isprintable()


def test_client_cannot_control_terminal_through_json_log() -> None:
    shown = logs.JSONFormatter().format(record(NASTY, **logs.event("wrong_token", user=NASTY)))
    assert shown.isprintable()
    assert json.loads(shown)["message"] == json.loads(shown)["user"] == NASTY


def test_unicode_letters_are_logged_unchanged() -> None:
    text = "żółw 亀 👩\u200d🔬 a\u00a0b"
    assert logs.formatter("text", sys.stderr).format(record(text)).endswith(" INFO " + text)
    assert text in logs.JSONFormatter().format(record(text))


def test_every_json_log_line_is_json() -> None:
    with daemon("--log-format", "json", "--log-level", "debug") as process:
        wire = Wire(("127.0.0.1", process.port))
        wire.call("PUT", "t", "x")
        wire.send(b"\x00\n")
        wire.receive()
        wire.close()
        process.stop()
    events = [json.loads(line) for line in process.log().splitlines()]
    by_name = {event["event"]: event for event in events}
    assert {"started", "configured", "http_endpoint", "rejected", "stopping", "stopped"} <= set(by_name)
    assert by_name["rejected"]["code"] == "PROTOCOL"
    assert by_name["configured"]["limits"]["connections"] > 0
    assert by_name["stopping"]["reason"] == "SIGTERM"


def test_suppressed_lines_are_reported_before_stop() -> None:
    with daemon("--log-format", "json", "--max-log-lines-per-second", "1") as process:
        for _ in range(5):
            wire = Wire(("127.0.0.1", process.port))
            wire.send(b"\x00\n")
            wire.receive()
            wire.close()
        process.stop()
    events = [json.loads(line) for line in process.log().splitlines() if line.startswith("{")]
    names = [event["event"] for event in events]
    assert names.count("rejected") + sum(event["lines"] for event in events if event["event"] == "flood") == 5
    assert names[-1] == "stopped"


def test_reason_of_broken_connection_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dsmq")
    with serving() as server:
        with wire_to(server) as wire:
            assert wire.call("PING") == "PONG"
            # It resets the connection.
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: server.status.connections() == 0)
    assert "closed: Connection reset by peer" in caplog.text
    assert "Errno" not in caplog.text


def test_journal_gets_priorities_and_no_timestamps(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        stat = os.fstat(stream.fileno())
        code = "import logging; from dsmq import logs; logs.start();logging.getLogger('dsmq').warning('hello')"
        for device in (stat.st_dev, stat.st_dev + 1):
            env = {**os.environ, "JOURNAL_STREAM": f"{device}:{stat.st_ino}"}
            subprocess.run([sys.executable, "-c", code], env=env, stderr=stream, check=True, timeout=SOON)
    journal, other = log.read_text().splitlines()
    assert journal == "<4>hello"
    assert other.endswith(" WARNING hello")


def test_log_can_go_to_stdout() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dsmq", "serve", "--port", "0", "--http-port", "off", "--log-stream", "stdout"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert " INFO " in process.stdout.readline()
    process.terminate()
    _, errors = process.communicate(timeout=SOON)
    assert (process.returncode, errors) == (0, "")


def test_puts_and_gets_are_logged_at_debug_only(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server, wire_to(server) as wire:
        caplog.clear()
        caplog.set_level(logging.INFO, "dsmq")
        wire.call("PUT", "t", "x")
        wire.call("GET", "t")
        wire.error("FROBNICATE")
        assert caplog.records == []


def test_embedding_program_keeps_its_logging() -> None:
    code = """
import logging
from dsmq.settings import EmbeddedSettings
from dsmq.server import Server
with Server(EmbeddedSettings(port=0)):
    pass
assert not logging.getLogger().handlers and not logging.getLogger("dsmq").handlers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=SOON)
    assert (done.returncode, done.stderr) == (0, b"")


# A log that nobody reads


def fill(descriptor: int) -> int:
    """Fill a pipe; return how many bytes it took."""
    # Open it again, so that only this descriptor is non-blocking.
    end = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    filled = 0
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                filled += os.write(end, b"\n" * size)
    os.close(end)
    return filled


class Unread:
    """`dsmq serve` logging to a pipe that is full as soon as the server serves."""

    def __init__(self, log_stream: str, *options: str) -> None:
        self.reader, writer = os.pipe()
        command = [
            sys.executable,
            "-m",
            "dsmq",
            "serve",
            "--port",
            "0",
            "--http-port",
            "off",
            "--log-stream",
            log_stream,
        ]
        self.process = subprocess.Popen([*command, "--log-stream", log_stream, *options], **{log_stream: writer})  # type: ignore[call-overload]
        text = b""
        while b"tokens" not in text:
            text += os.read(self.reader, 65536)
        self.port = int(text.split(b"listening on 127.0.0.1:")[1].split()[0])
        fill(writer)
        os.close(writer)

    def be_noisy(self, times: int) -> None:
        """Make the server log lines, one per connection."""
        for _ in range(times):
            wire = Wire(("127.0.0.1", self.port))
            wire.send(b"\x00\n")
            wire.receive()
            wire.close()

    def read_all(self) -> str:
        with open(self.reader, closefd=False) as stream:
            return stream.read()


@contextmanager
def unread(log_stream: str = "stderr", *options: str) -> Iterator[Unread]:
    server = Unread(log_stream, *options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        os.close(server.reader)


@pytest.mark.slow
@pytest.mark.parametrize("log_stream", ["stderr", "stdout"])
def test_unread_log_blocks_neither_puts_nor_stop(tmp_path: Path, log_stream: str) -> None:
    file = tmp_path / "snapshot"
    with unread(log_stream, "--snapshot-file", str(file), "--max-log-lines-per-second", "1000") as server:
        server.be_noisy(20)
        with connect(port=server.port) as mq:
            mq.put("t", "stored")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SOON) == 0
    with serving(snapshot_file=str(file)) as restored, wire_to(restored) as wire:
        assert wire.call("GETLATEST", "t") is None
        assert wire.call("READ", "t", 0)[3] == b"stored"


def test_last_lines_reach_a_late_reader() -> None:
    with unread() as server:
        server.be_noisy(5)
        server.process.send_signal(signal.SIGTERM)
        lines = server.read_all()
        assert server.process.wait(SOON) == 0
    assert lines.count("PROTOCOL") == 5
    assert lines.rstrip().endswith("stopped")


def test_failing_server_does_not_wait_for_log_reader_forever(tmp_path: Path) -> None:
    file = tmp_path / "snapshot"
    with unread("stderr", "--snapshot-file", str(file)) as server:
        file.mkdir()
        (file / "full").touch()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SOON) == 1


def test_lines_dropped_from_a_full_log_are_counted_and_logged() -> None:
    reader, writer = os.pipe()
    filled, written = fill(writer), logs.MAX_QUEUED_LINES + 20
    data = b""
    with open(writer, "w") as stream, log_to(stream, rate=written) as logger:
        for _ in range(written):
            logger.warning("a line")
        # While the queue is full, a line about dropped lines would be dropped, too.
        while len(data) < filled + 1000:
            data += os.read(reader, 65536)
        logs.summarise()
        logger.warning("the next line")
        while not data.endswith(b"the next line\n"):
            data += os.read(reader, 65536)
    os.close(reader)
    lines = [line.partition(" WARNING ")[2] for line in data[filled:].decode().splitlines()]
    assert lines[-1] == "the next line"
    kept = lines[:-2]
    assert kept == ["a line"] * len(kept)
    # The thread may already have taken one line from the queue.
    assert len(kept) - logs.MAX_QUEUED_LINES in (0, 1)
    assert lines[-2] == f"{written - len(kept)} log lines dropped"


@contextmanager
def log_to(stream: TextIO, rate: int) -> Iterator[logging.Logger]:
    """Log to a stream in place of stderr; yield a logger."""
    logger = logging.getLogger("dsmq")
    before, level = list(logger.handlers), logger.level
    with redirect_stderr(stream):
        logs.start("info", "text", "stderr", rate)
    try:
        yield logging.getLogger("dsmq.test")
    finally:
        logger.handlers, logger.level = before, level


def test_lines_above_the_limit_per_second_are_counted_in_next_summary(tmp_path: Path) -> None:
    log, now = tmp_path / "log", 0.0
    with log.open("w") as stream:
        output = logs.BackgroundStream(stream)
        handler = logs.Handler(output, 3, lambda: now)

        def repeat(times: int) -> None:
            for number in range(times):
                handler.handle(record(f"repeated {number}"))

        def written() -> list[str]:
            """Return what has been written since the last call."""
            output.drain()
            shown = log.read_text().splitlines()[len(lines) :]
            lines.extend(shown)
            return shown

        lines: list[str] = []
        repeat(6)
        handler.handle(record("another call", logging.WARNING))
        assert written() == ["repeated 0", "repeated 1", "repeated 2", "another call"]
        # The limit is per second, no matter how often a summary is written.
        handler.summarise()
        assert written() == ["3 more lines like: repeated 5"]
        handler.summarise()
        repeat(1)
        assert written() == []
        now = 1.0
        repeat(5)
        assert written() == ["repeated 0", "repeated 1", "repeated 2"]
        now = 2.0
        repeat(4)
        assert written() == ["repeated 0", "repeated 1", "repeated 2"]
        # Suppressed in three seconds: 1, 2 and 1.
        handler.summarise()
        assert written() == ["4 more lines like: repeated 3"]


def test_second_server_in_process_logs_no_line_twice() -> None:
    code = """
import threading
from dsmq import server
start = server.Server.start
def start_and_stop(self):
    start(self)
    self.request_stop("the test")
server.Server.start = start_and_stop
for _ in range(3):
    server.serve(port=0, verbose=True)
assert [thread.name for thread in threading.enumerate()].count("dsmq-log") == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=SOON)
    assert done.stderr.count(" stopped\n") == 3


def test_log_after_a_fork_is_written_by_the_child(tmp_path: Path) -> None:
    code = """
import os
from dsmq import logs
logs.start()
import logging
logging.getLogger("dsmq").warning("parent")
logs.drain()
if not os.fork():
    logging.getLogger("dsmq").warning("child")
    logs.drain()
    os._exit(0)
os.wait()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=SOON,
    )
    assert [line.split()[-1] for line in done.stderr.splitlines()] == ["parent", "child"]


def test_unwritable_log_does_not_end_its_thread() -> None:
    code = """
import logging, threading
from dsmq import logs
logs.start()
for _ in range(2):
    logging.getLogger("dsmq").warning("a line")
    logs.drain()
    logs.summarise()
print([thread.name for thread in threading.enumerate()].count("dsmq-log"))
"""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=broken, text=True, check=False, timeout=SOON
        )
    assert done.stdout == "1\n"
