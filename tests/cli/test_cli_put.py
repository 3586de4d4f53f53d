"""`dsmq put`: files, ids, and progress on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from commands import address, assert_one_line, mq, result, server, started, topic, type_in

from conftest import SOON, daemon, wait_until
from dsmq.client import DSMQClientSideConnection

# Fixtures.
__all__ = ["address", "mq", "server", "topic"]


def test_file_is_one_message(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    body = bytes(range(256)) * 1000 + b"\n"
    (tmp_path / "file").write_bytes(body)
    assert result("put", topic, "--file", str(tmp_path / "file")) == (0, b"", b"")
    assert result("put", topic, "--file", "-", stdin=body) == (0, b"", b"")
    assert result("put", topic, "--file", "-") == (0, b"", b"")
    assert mq.get_many(topic, 9, raw=True) == [body, body, b""]


@pytest.mark.parametrize(("name", "expected"), [("missing", "No such file"), ("", "Is a directory")])
def test_unusable_file_is_reported(name: str, expected: str, topic: str, tmp_path: Path) -> None:
    file = tmp_path / name
    assert_one_line(result("put", topic, "--file", str(file)), 2, f"{file}: {expected}")


def test_too_long_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 11)
    with daemon("--max-message-bytes", "10") as server:
        words = ["put", "t", "--port", str(server.port), "--file"]
        assert_one_line(result(*words, str(tmp_path / "file")), 1, f"{tmp_path}/file: a message may have at most 10 ")
        assert_one_line(result(*words, "/dev/zero"), 1, f"/dev/zero: longer than {2**26} bytes")


def test_ids_are_printed(topic: str, mq: DSMQClientSideConnection) -> None:
    before = mq.put(topic, "before")
    assert result("put", topic, "x", "--print-id") == (0, b"%d\n" % (before + 1), b"")
    assert result("put", topic, "--print-id", stdin=b"y\nz\n") == (0, b"%d\n%d\n" % (before + 2, before + 3), b"")
    assert result("put", topic, "--print-id", "--file", "-", stdin=b"y\nz\n") == (0, b"%d\n" % (before + 4), b"")


def test_ids_are_printed_as_lines_arrive(topic: str, mq: DSMQClientSideConnection) -> None:
    with started("put", topic, "--print-id") as process:
        assert process.stdout is not None
        for line in (b"1\n", b"2\n"):
            type_in(process, line)
            assert int(process.stdout.readline())
        # It ends when nothing reads the ids.
        process.stdout.close()
        type_in(process, b"3\n")
        assert process.wait(SOON) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert mq.get_many(topic, 9) == ["1", "2", "3"]


def test_progress_of_lines_is_on_the_terminal_only(topic: str, mq: DSMQClientSideConnection) -> None:
    master, slave = os.openpty()
    command = [sys.executable, "-m", "dsmq", "put", topic]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    shown = b""
    os.set_blocking(master, False)

    def is_shown() -> bool:
        nonlocal shown
        type_in(process, b"line\n" * 100)
        with suppress(BlockingIOError):
            shown += os.read(master, 65_536)
        return b" MB put" in shown

    try:
        wait_until(is_shown)
        process.communicate(timeout=SOON)
        with suppress(OSError):
            while data := os.read(master, 65_536):
                shown += data
    finally:
        os.close(master)
        process.kill()
    assert process.returncode == 0
    assert shown.endswith(b"\r\x1b[K")
    assert shown.count(b"\n") == 0
