"""What is logged: for people, for programs, and for the journal."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from conftest import SOON, Wire, daemon, serving, wait_until, wire_to
from dsmq import logs


def record(message: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("dsmq").makeRecord("dsmq", level, "file.py", 1, message, (), None, extra=extra or None)
    made.created = datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC).timestamp()
    return made


def test_an_event_as_json() -> None:
    line = logs.JSONFormatter().format(record("client 7: wrong token", **logs.event("wrong_token", client=7)))
    assert json.loads(line) == {
        "time": "2026-01-02T03:04:05.678+00:00",
        "level": "info",
        "event": "wrong_token",
        "message": "client 7: wrong token",
        "client": 7,
    }


def test_an_exception_as_json_is_one_line() -> None:
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
def test_a_line_for_the_journal_begins_with_its_priority(level: str, priority: int) -> None:
    formatter = logs.JournalFormatter("%(message)s")
    line = record("a\nb", getattr(logging, level))
    assert formatter.format(line) == f"<{priority}>a\\nb"
    line.exc_info = (ValueError, ValueError("c\x1b"), None)
    assert formatter.format(line) == f"<{priority}>a\\nb\n<{priority}>ValueError: c\\x1b"


NASTY = "\x1b[2J\x9b\x7f\r\n2026-01-01 INFO forged\t\u2028\u202e\ud800"


def test_a_client_can_neither_forge_lines_of_the_log_nor_control_a_terminal() -> None:
    line = logging.getLogger("dsmq").makeRecord("dsmq", logging.INFO, "file.py", 1, "user %s", (NASTY,), None)
    for form in ("text", "journal"):
        shown = logs._formatter(form, sys.stderr).format(line)
        assert shown.endswith("user \\x1b[2J\\x9b\\x7f\\r\\n2026-01-01 INFO forged\\t\\u2028\\u202e\\ud800")
        assert shown.isprintable()


def test_a_client_can_not_control_a_terminal_through_the_log_as_json() -> None:
    shown = logs.JSONFormatter().format(record(NASTY, **logs.event("wrong_token", user=NASTY)))
    assert shown.isprintable()
    assert json.loads(shown)["message"] == json.loads(shown)["user"] == NASTY


def test_letters_of_all_scripts_stay_as_they_are_in_the_log() -> None:
    text = "żółw 亀 👩\u200d🔬 a\u00a0b"
    assert logs._formatter("text", sys.stderr).format(record(text)).endswith(" INFO " + text)
    assert text in logs.JSONFormatter().format(record(text))


def test_the_log_as_json_is_json_throughout() -> None:
    with daemon("--log-format", "json", "--log-level", "debug") as process:
        wire = Wire(("127.0.0.1", process.port))
        wire.call("PUT", "t", "x")
        wire.send(b"\x00\n")
        wire.receive()
        wire.close()
        process.stop()
    events = [json.loads(line) for line in "".join(process.log).splitlines()]
    by_name = {event["event"]: event for event in events}
    assert {"started", "configured", "side_port", "rejected", "stopping", "stopped"} <= set(by_name)
    assert by_name["rejected"]["code"] == "PROTOCOL"
    assert by_name["configured"]["limits"]["connections"] > 0
    assert by_name["stopping"]["reason"] == "SIGTERM"


def test_what_was_held_back_of_a_flood_is_told_before_the_server_has_stopped() -> None:
    with daemon("--log-format", "json", "--max-log-lines-per-second", "1") as process:
        for _ in range(5):
            wire = Wire(("127.0.0.1", process.port))
            wire.send(b"\x00\n")
            wire.receive()
            wire.close()
        process.stop()
    events = [json.loads(line) for line in "".join(process.log).splitlines() if line.startswith("{")]
    names = [event["event"] for event in events]
    assert names.count("rejected") + sum(event["lines"] for event in events if event["event"] == "flood") == 5
    assert names[-1] == "stopped"


def test_the_reason_why_a_connection_broke_is_told_plainly(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dsmq")
    with serving() as server:
        with wire_to(server) as wire:
            assert wire.call("PING") == "PONG"
            # It resets the connection.
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: server.connections() == 0)
    assert "closed: Connection reset by peer" in caplog.text
    assert "Errno" not in caplog.text


def test_under_systemd_the_journal_gets_priorities_and_no_times(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        stat = os.fstat(stream.fileno())
        code = (
            "import logging; from dsmq import config, logs; logs.start(config.load());"
            "logging.getLogger('dsmq').warning('hello')"
        )
        for device in (stat.st_dev, stat.st_dev + 1):
            env = {**os.environ, "JOURNAL_STREAM": f"{device}:{stat.st_ino}"}
            subprocess.run([sys.executable, "-c", code], env=env, stderr=stream, check=True, timeout=SOON)
    journal, other = log.read_text().splitlines()
    assert journal == "<4>hello"
    assert other.endswith(" WARNING hello")


def test_the_log_can_go_to_stdout() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dsmq", "serve", "--port", "0", "--metrics-port", "off", "--log-to", "stdout"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert " INFO " in process.stdout.readline()
    process.terminate()
    _, errors = process.communicate(timeout=SOON)
    assert (process.returncode, errors) == (0, "")


def test_nothing_is_logged_for_a_message_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server, wire_to(server) as wire:
        caplog.clear()
        caplog.set_level(logging.INFO, "dsmq")
        wire.call("PUT", "t", "x")
        wire.call("GET", "t")
        wire.error("FROBNICATE")
        assert caplog.records == []


def test_a_program_that_embeds_a_server_keeps_its_logging() -> None:
    code = """
import logging
from dsmq.config import EmbeddedSettings
from dsmq.server import Server
with Server(EmbeddedSettings(port=0)):
    pass
assert not logging.getLogger().handlers and not logging.getLogger("dsmq").handlers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=SOON)
    assert (done.returncode, done.stderr) == (0, b"")
