"""The command line, run as users run it, against a real server."""

from __future__ import annotations

import base64
import codecs
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from conftest import ROOT, SOON, UNIT, Daemon, Wire, daemon, run_dsmq, serving, wait_until, without_privileges
from dsmq import __version__
from dsmq.__main__ import main
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.settings import SUBJECTS
from dsmq.wire.resp import encode_request

Process = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def server() -> Iterator[Daemon]:
    """One server for all tests that don't stop it; each test has its own topic."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("DSMQ_")]:
            patch.delenv(name)
        with daemon() as process:
            yield process


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
    """Start a command with pipes."""
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
    """Start a command, and wait until it is waiting for a message."""
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
    """Check that a command printed a one-line error, and nothing else."""
    returned, out, err = done
    text = err.decode()
    assert text.startswith("dsmq"), text
    assert text.count("\n") == 1, text
    assert text.endswith("\n"), text
    assert expected in text
    assert (returned, out) == (status, b"")


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


# Put and get


def test_put_message_can_be_read(topic: str) -> None:
    assert result("put", topic, "hello wörld") == (0, b"", b"")
    assert result("get", topic, "--after", "0") == (0, "hello wörld\n".encode(), b"")


def test_get_reads_new_messages_only_and_says_so(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic, "before")
    assert_one_line(result("get", topic), 3, "--after 0")


def test_get_wait_is_quiet_at_timeout(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic, "before")
    assert result("get", topic, "--wait", str(UNIT)) == (3, b"", b"")


def test_get_wait_prints_message(topic: str, server: Daemon, mq: DSMQClientSideConnection) -> None:
    with waiting(server.port, "get", topic, "--wait", str(SOON)) as process:
        mq.put(topic, "late")
        assert ended(process) == (0, b"late\n", b"")


def test_get_prints_one_message_or_up_to_n(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, ["1", "2", "3"])
    assert result("get", topic, "--after", "0")[1] == b"1\n"
    assert result("get", topic, "--after", "0", "-n", "2")[1] == b"1\n2\n"
    assert result("get", topic, "--after", "0", "-n", "9") == (0, b"1\n2\n3\n", b"")


def test_get_n_spans_several_reads(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, [str(number) for number in range(300)])
    lines = result("get", topic, "--after", "0", "-n", "250")[1].split()
    assert lines == [b"%d" % number for number in range(250)]


def test_after_reads_messages_after_id(topic: str, mq: DSMQClientSideConnection) -> None:
    first, second = mq.put_many(topic, ["1", "2"])
    assert result("get", topic, "--after", str(first)) == (0, b"2\n", b"")
    assert result("get", topic, "--after", str(second)) == (3, b"", b"")


def test_latest_skips_older_messages(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, ["1", "2", "3"])
    assert result("get", topic, "--after", "0", "--latest") == (0, b"3\n", b"")
    assert result("get", topic, "--after", "0", "--latest", "-n", "9") == (0, b"3\n", b"")


def test_latest_follow_starts_with_newest(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, ["1", "2"])
    with started("get", topic, "--after", "0", "--latest", "--follow", "-n", "2") as process:
        assert line_of(process) == b"2\n"
        mq.put(topic, "3")
        assert ended(process) == (0, b"3\n", b"")


def test_follow_prints_messages_as_they_arrive(topic: str, server: Daemon, mq: DSMQClientSideConnection) -> None:
    with waiting(server.port, "get", topic, "--follow", "-n", "3") as process:
        for number in range(3):
            mq.put(topic, str(number))
            assert line_of(process) == b"%d\n" % number
        assert ended(process) == (0, b"", b"")


def test_follow_ends_at_timeout(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic, "1")
    assert result("get", topic, "--after", "0", "--follow", "--wait", str(3 * UNIT)) == (0, b"1\n", b"")


@pytest.mark.parametrize("words", ["--wait 0.1", "--follow --wait 0.1", "--follow --wait 0.1 -n 2 --json"])
def test_get_that_printed_nothing_exits_with_3(words: str, topic: str) -> None:
    assert result("get", topic, *words.split()) == (3, b"", b"")


def test_json_includes_all_fields(topic: str, mq: DSMQClientSideConnection) -> None:
    before = time.time()
    message_id = mq.put_many(topic, ["one", 'tö "two"\n'])[1]
    shown = json.loads(result("get", topic, "--after", str(message_id - 1), "--json")[1])
    put_at = datetime.fromisoformat(shown.pop("put_at"))
    mq.get_latest(topic)
    assert shown.pop("position") == mq.position(topic)
    assert shown == {"topic": topic, "id": message_id, "number": 2, "message": 'tö "two"\n'}
    # Both clocks are read in milliseconds.
    assert before - 0.01 <= put_at.timestamp() <= time.time() + 0.01


def test_json_of_binary_message_is_base64(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic, b"\xff\x00")
    shown = json.loads(result("get", topic, "--after", "0", "--json")[1])
    assert base64.b64decode(shown["message_base64"]) == b"\xff\x00"
    assert "message" not in shown


# Positions


def lines_of(*arguments: str) -> list[dict[str, object]]:
    status, out, err = result("get", *arguments, "--json")
    assert (status, err) == (0, b"")
    return [json.loads(line) for line in out.splitlines()]


def test_get_resumes_from_printed_position(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, [str(number) for number in range(250)])
    shown = lines_of(topic, "--after", "0", "-n", "250")
    assert len(shown) == 250
    assert [line["message"] for line in lines_of(topic, "--after", "0", "-n", "2")] == ["0", "1"]
    mq.seek(topic, 0)
    for line in shown:
        assert mq.get(topic) == line["message"]
        assert mq.position(topic) == line["position"]
    for at in (0, 99, 100, 248):
        following = str(at + 1).encode() + b"\n"
        assert result("get", topic, "--after", str(shown[at]["position"])) == (0, following, b"")


def test_position_is_valid_for_any_topic(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic + "1", "before")
    mq.put(topic + "2", "between")
    position = str(lines_of(topic + "2", "--after", "0")[0]["position"])
    mq.put(topic + "1", "behind")
    assert result("get", topic + "1", "--after", position) == (0, b"behind\n", b"")


def test_position_of_another_epoch_reads_from_oldest_and_warns(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, ["1", "2"])
    status, out, err = result("get", topic, "--after", "0123456789abcdef:1000000", "-n", "9")
    assert (status, out) == (0, b"1\n2\n")
    assert err.startswith(b"dsmq: ")
    assert err.count(b"\n") == 1
    assert b"another epoch" in err


def test_id_above_last_id_is_an_error(topic: str, mq: DSMQClientSideConnection) -> None:
    last = mq.put(topic, "1")
    assert result("get", topic, "--after", str(last)) == (3, b"", b"")
    assert_one_line(result("get", topic, "--after", str(last + 1_000_000)), 1, "no message has an id above")


def test_position_file_resumes_next_run(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    file = tmp_path / "position"
    words = ["get", topic, "--position-file", str(file), "-n", "2"]
    mq.put(topic, "before the first run")
    # The first run starts after the last message.
    assert result(*words) == (3, b"", b"")
    mq.put_many(topic, ["1", "2", "3"])
    assert result(*words) == (0, b"1\n2\n", b"")
    mq.seek(topic, 0)
    mq.get_many(topic, 3)
    assert file.read_text() == mq.position(topic) + "\n"
    assert result(*words) == (0, b"3\n", b"")
    assert result(*words) == (3, b"", b"")
    assert list(tmp_path.iterdir()) == [file]


def test_after_sets_start_if_position_file_is_missing(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    words = ["get", topic, "--position-file", str(tmp_path / "position"), "--after", "0"]
    mq.put_many(topic, ["1", "2"])
    assert result(*words) == (0, b"1\n", b"")
    assert result(*words) == (0, b"2\n", b"")


def test_position_file_is_updated_while_following(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    file = tmp_path / "position"
    mq.put(topic, "1")
    with started("get", topic, "--after", "0", "--follow", "--position-file", str(file)) as process:
        for text in ("1", "2", "3"):
            assert line_of(process) == text.encode() + b"\n"
            assert mq.get_wait(topic) == text
            wait_until(lambda: file.read_text() == mq.position(topic) + "\n")
            if text != "3":
                mq.put(topic, str(int(text) + 1))
        process.kill()
        process.wait()
    mq.put(topic, "4")
    assert b"4\n" in result("get", topic, "--position-file", str(file))[1]


def test_unprinted_message_is_printed_by_next_run(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    file = tmp_path / "position"
    mq.put(topic, "1")
    words = ["get", topic, "--after", "0", "--position-file", str(file)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "dsmq", *words], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert file.exists()
    assert result(*words) == (0, b"1\n", b"")


def test_position_file_of_another_epoch_reads_from_oldest(tmp_path: Path) -> None:
    file = tmp_path / "position"
    for is_old in (False, True):
        with daemon() as server, connect(port=server.port) as mq:
            mq.put_many("t", ["1", "2"])
            words = ["get", "t", "--after", "0", "--position-file", str(file), "--port", str(server.port)]
            status, out, err = result(*words)
            assert (status, out) == (0, b"1\n")
            assert (b"another epoch" in err) == is_old
            assert result(*words) == (0, b"2\n", b"")


def test_position_file_symlink_is_preserved(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert result("get", topic, "--position-file", str(tmp_path / "link"))[0] == 3
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == mq.position(topic) + "\n"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"hello", b"-1", b"a:b", b"\xff\xfe1", b"1 2", b"1:2\n3:4", b"1" * 2000, b"\x1b[2J"]
)
def test_invalid_position_file_is_reported(content: bytes, topic: str, tmp_path: Path) -> None:
    file = tmp_path / "position"
    file.write_bytes(content)
    assert_one_line(result("get", topic, "--position-file", str(file)), 2, f"{file}: contains no position")
    assert file.read_bytes() == content


def test_position_file_may_hold_an_id(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    first, _ = mq.put_many(topic, ["1", "2"])
    (tmp_path / "position").write_text(f"{first}\n")
    assert result("get", topic, "--position-file", str(tmp_path / "position")) == (0, b"2\n", b"")


@pytest.mark.parametrize(
    ("name", "status", "expected"),
    [("folder", 2, "not a regular file"), ("secret", 2, "Permission denied"), ("missing/file", 1, "No such file")],
)
def test_unusable_position_file_is_reported(name: str, status: int, expected: str, topic: str, tmp_path: Path) -> None:
    assert result("put", topic, "x")[0] == 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").touch(0)
    words = ["get", topic, "--after", "0", "--position-file", str(tmp_path / name)]
    done = run_dsmq(*words, prefix=without_privileges())
    assert_one_line((done.returncode, done.stdout, done.stderr), status, f"{tmp_path / name}: {expected}")


def test_position_file_respects_umask_when_new_and_keeps_its_mode(topic: str, tmp_path: Path) -> None:
    file = tmp_path / "position"
    words = ["get", topic, "--position-file", str(file)]
    for mask, mode in (0o022, 0o644), (0o027, 0o640):
        before = os.umask(mask)
        try:
            result(*words)
        finally:
            os.umask(before)
        assert stat.S_IMODE(file.stat().st_mode) == mode
        file.unlink()
    file.write_text("0")
    file.chmod(0o664)
    assert result("put", topic, "x")[0] == 0
    assert result(*words)[0] == 0
    assert file.read_text() != "0"
    assert stat.S_IMODE(file.stat().st_mode) == 0o664
    assert os.listdir(tmp_path) == ["position"]


def test_device_is_refused_as_position_file(topic: str) -> None:
    assert_one_line(result("get", topic, "--position-file", "/dev/null"), 2, "/dev/null: not a regular file")
    assert not os.path.isfile("/dev/null")


# Messages that begin with a dash, and too many arguments


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{topic} -hello", "-hello"),
        ("{topic} -- -hello", "-hello"),
        ("{topic} -- --hello", "--hello"),
        ("{topic} -- --", "--"),
        ("{topic} -- -h", "-h"),
        ("{topic} -5", "-5"),
        ("{topic} -1e-5", "-1e-5"),
        ("{topic} -n", "-n"),
        ("{topic} --reconnect 1 hello", "hello"),
        ("{topic} --reconnect 1 -hello", "-hello"),
        ("{topic} --reconnect=1 -- -hello", "-hello"),
        ("--reconnect 1 {topic} hello", "hello"),
        ("-- {topic} hello", "hello"),
        ("{topic} -hello --reconnect 1", "-hello"),
    ],
)
def test_message_may_begin_with_dash(words: str, message: str, topic: str, mq: DSMQClientSideConnection) -> None:
    topic = topic.partition("[")[0]
    mq.seek(topic, 0)
    mq.get_latest(topic)
    assert result("put", *words.format(topic=topic).split()) == (0, b"", b"")
    assert mq.get(topic) == message


def test_empty_message_is_put(topic: str, mq: DSMQClientSideConnection) -> None:
    assert result("put", topic, "") == (0, b"", b"")
    assert mq.get(topic, default="nothing") == ""


def test_topic_may_begin_with_dash(address: None) -> None:
    assert result("put", "-weird", "x")[0] == 0
    assert result("put", "--", "--weird", "y")[0] == 0
    assert result("get", "-weird", "--after", "0", "-n1") == (0, b"x\n", b"")
    assert result("get", "--after", "0", "--", "--weird") == (0, b"y\n", b"")


@pytest.mark.parametrize("words", ["a b c", "a --reconnect 1 b c", "a b -- c", "-- a b c"])
def test_too_many_words_suggest_quoting(words: str, address: None) -> None:
    assert_one_line(result("put", *words.split()), 2, "quote a message with blanks: dsmq put a 'b c'")


# Lines of stdin


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        (b"1\n2\n", [b"1", b"2"]),
        (b"1\n2", [b"1", b"2"]),
        (b"\n1\n\n", [b"", b"1", b""]),
        (b"\n", [b""]),
        (b"", []),
        (b"\x00\xff\r\n\x85\x0b\xe2\x80\xa8x\n", [b"\x00\xff\r", b"\x85\x0b\xe2\x80\xa8x"]),
        (b"x" * 200_000 + b"\n1\n", [b"x" * 200_000, b"1"]),
    ],
    ids=["lines", "no end", "empty lines", "an empty line", "nothing", "binary", "long"],
)
def test_each_line_is_a_message(typed: bytes, messages: list[bytes], topic: str, mq: DSMQClientSideConnection) -> None:
    assert result("put", topic, stdin=typed) == (0, b"", b"")
    mq.seek(topic, 0)
    assert mq.get_many(topic, raw=True) == messages


def test_bytes_round_trip_unchanged(topic: str) -> None:
    data = bytes(range(256)) + b"\n"
    result("put", topic, "-", stdin=data)
    assert result("get", topic, "--after", "0", "-n", "2")[1] == data


def test_lines_are_put_as_they_arrive(topic: str, mq: DSMQClientSideConnection) -> None:
    with started("put", topic) as process:
        for line in (b"first", b"second"):
            type_in(process, line + b"\nand a ")
            assert mq.get_wait(topic, raw=True, timeout=SOON).endswith(line)
        assert ended(process) == (0, b"", b"")
    assert mq.get(topic) == "and a "


def put_lines(server: Daemon, lines: bytes) -> tuple[int, bytes, bytes]:
    return result("put", "t", "--port", str(server.port), stdin=lines)


def stored(server: Daemon) -> list[str]:
    with connect(port=server.port) as mq:
        mq.seek("t", 0)
        return mq.get_many("t", 10_000)


def test_too_long_line_is_reported_and_earlier_lines_are_put() -> None:
    with daemon("--max-message-bytes", "10") as server:
        assert_one_line(put_lines(server, b"x" * 500_000), 1, "line 1 of stdin: ")
        assert stored(server) == []
        done = put_lines(server, b"short\n" + b"x" * 11 + b"\nnext\n")
        assert_one_line(done, 1, "line 2 of stdin: a message has at most 10 bytes, not 11 (lines stored: 1 before it")
        counts = re.search(rb"lines stored: 1 before it(?:, (\d+) after it)?\)", done[2])
        assert counts is not None
        assert stored(server) == ["short", *["next"] * int(counts[1] or 0)]


@pytest.mark.slow
@pytest.mark.parametrize("full", [1, 999, 1000, 1999])
def test_full_server_error_reports_stored_lines(full: int) -> None:
    lines = [str(number) for number in range(2000)]
    with daemon("--max-stored-messages", str(full)) as server:
        done = put_lines(server, "\n".join(lines).encode())
        assert_one_line(done, 1, f"line {full + 1} of stdin: ")
        assert f"(lines stored: {full} before it)" in done[2].decode()
        assert stored(server) == lines[:full]


def test_lines_stored_after_a_failed_one_are_reported() -> None:
    with daemon("--max-stored-bytes-per-topic", "1000") as server:
        done = put_lines(server, b"1\n" + b"x" * 900 + b"\n2\n3\n")
        assert_one_line(done, 1, "line 2 of stdin: ")
        assert "(lines stored: 1 before it, 2 after it)" in done[2].decode()
        assert stored(server) == ["1", "2", "3"]


def test_lost_connection_error_reports_stored_lines() -> None:
    with daemon() as server, started("put", "t", "--reconnect", "0", "--port", str(server.port)) as process:
        type_in(process, b"1\n2\n")
        wait_until(lambda: stored(server) == ["1", "2"])
        server.stop()
        type_in(process, b"3\n")
        done = ended(process)
    assert_one_line(done, 1, "line 3 of stdin: ")
    assert "(lines stored: 2 before it)" in done[2].decode()


def test_endless_line_is_refused_before_it_fills_memory(server: Daemon) -> None:
    with open("/dev/zero", "rb") as endless:
        command = [sys.executable, "-m", "dsmq", "put", "endless", "--port", str(server.port)]
        done = subprocess.run(command, stdin=endless, capture_output=True, timeout=3 * SOON, check=False)
    expected = f"line 1 of stdin: longer than {2**26} bytes (lines stored: 0 before it)"
    assert_one_line((done.returncode, done.stdout, done.stderr), 1, expected)


# Topics and ping


def test_topics_shows_messages_bytes_and_names(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, ["12", "345"])
    status, out, err = result("topics")
    assert (status, err) == (0, b"")
    assert f"2\t5\t{topic}" in out.decode().splitlines()


def test_topics_escapes_control_characters(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic + "\x1b[2J\nnext\t\x9b", "x")
    out = result("topics")[1].decode()
    assert f"1\t1\t{topic}\\x1b[2J\\nnext\\t\\x9b" in out.splitlines()
    assert "\x1b" not in out


def test_topics_shows_unicode_letters(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic + " żółw 亀", "x")
    assert f"1\t1\t{topic} żółw 亀" in result("topics")[1].decode().splitlines()


def test_topics_prints_json(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic + "\x1b", "xyz")
    lines = [json.loads(line) for line in result("topics", "--json")[1].splitlines()]
    assert {"topic": topic + "\x1b", "messages": 1, "bytes": 3} in lines


def test_ping_reports_that_server_answers(address: None, server: Daemon) -> None:
    status, out, err = result("ping")
    assert (status, err) == (0, b"")
    assert out.startswith(b"PONG from 127.0.0.1:%d in " % server.port)
    assert out.count(b"\n") == 1


def test_ping_times_out_on_silent_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        assert_one_line(result("ping", "--port", port, "--timeout", str(UNIT)), 1, "no reply within")


@pytest.mark.parametrize("timeout", ["inf", "1e300"])
def test_ping_accepts_long_timeout_or_refuses_it(timeout: str, address: None) -> None:
    status, out, err = result("ping", "--timeout", timeout)
    if status == 0:
        assert out.startswith(b"PONG")
    else:
        assert_one_line((status, out, err), 2, "--timeout")


# Terminals

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


def test_terminal_output_escapes_control_characters(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, [f"żółw {NASTY}", b"\xff\x80 raw"])
    assert on_terminal("get", topic, "--after", "0", "-n", "2") == (0, f"żółw {ESCAPED}\r\n\\xff\\x80 raw\r\n")


def test_terminal_output_escapes_topics(mq: DSMQClientSideConnection, address: None) -> None:
    mq.put("terminal" + NASTY, "x")
    assert f"1\t1\tterminal{ESCAPED}" in on_terminal("topics")[1].split("\r\n")


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}


def test_terminal_without_unicode_gets_escapes(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic + " żółw 😀", "zażółć é 亀")
    assert on_terminal("get", topic + " żółw 😀", "--after", "0", env=ASCII) == (
        0,
        "za\\u017c\\xf3\\u0142\\u0107 \\xe9 \\u4e80\r\n",
    )
    status, shown = on_terminal("topics", env=ASCII)
    assert status == 0
    assert topic + r" \u017c\xf3\u0142w \U0001f600" in shown


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, ASCII, {"PYTHONIOENCODING": "latin-1"}], ids=["UTF-8", "ASCII", "Latin-1"])
@pytest.mark.parametrize("text", [NASTY, "żółw é 😀", "\x7f"], ids=["controls", "letters", "DEL"])
def test_json_is_valid_and_safe_on_every_terminal(
    text: str, env: dict[str, str], topic: str, mq: DSMQClientSideConnection
) -> None:
    mq.put(topic + text, text)
    _, got = on_terminal("get", topic + text, "--after", "0", "--json", env=env)
    _, listed = on_terminal("topics", "--json", env=env)
    line = next(line for line in listed.split("\r\n") if topic in line)
    for shown in (got.removesuffix("\r\n"), line):
        assert shown.isprintable()
        assert shown.isascii() or not env
        assert json.loads(shown)["topic"] == topic + text
    assert json.loads(got)["message"] == text


def test_errors_escape_control_characters() -> None:
    status, shown = on_terminal("ping", "--host", "x" + NASTY)
    assert status == 1
    assert ESCAPED in shown
    assert shown.removesuffix("\r\n").isprintable()


def test_config_escapes_control_characters_and_stays_toml() -> None:
    options = ["config", "--snapshot-file", "é" + NASTY]
    assert r"é\u001b[2J\x9b" in on_terminal(*options)[1]
    for env in ({}, ASCII):
        assert tomllib.loads(result(*options, env=env)[1].decode())["snapshot_file"] == "é" + NASTY


# The server's address


def test_host_and_port_come_from_the_environment(server: Daemon) -> None:
    env = {"DSMQ_HOST": "localhost", "DSMQ_PORT": str(server.port)}
    assert result("ping", env=env)[1].startswith(b"PONG from localhost:%d " % server.port)


def test_host_may_include_port(server: Daemon) -> None:
    host = f"127.0.0.1:{server.port}"
    assert result("ping", "--host", host, "--port", str(server.port))[0] == 0
    assert result("ping", "--host", host, env={"DSMQ_PORT": "1"})[0] == 0
    assert_one_line(result("ping", "--host", "[::1]:1"), 1, "no server answers at [::1]:1")


def test_options_win_over_environment(server: Daemon) -> None:
    env = {"DSMQ_HOST": "nowhere.invalid", "DSMQ_PORT": "1"}
    assert result("ping", "--host", "127.0.0.1", "--port", str(server.port), env=env)[0] == 0


def test_empty_variables_are_ignored(server: Daemon) -> None:
    assert result("ping", "--port", str(server.port), env={"DSMQ_HOST": "", "DSMQ_PORT": ""})[0] == 0


def test_unix_socket_is_removed_on_stop(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    host = f"unix:{path}"
    with started("serve", "--host", host, "--http-port", "off") as server:
        assert server.stderr is not None
        assert f"serves on {host} ".encode() in server.stderr.readline()
        assert result("put", "t", "hello", "--host", host) == (0, b"", b"")
        assert result("get", "t", "--after", "0", env={"DSMQ_HOST": host}) == (0, b"hello\n", b"")
        server.terminate()
        assert ended(server)[0] == 0
    assert not path.exists()


# Errors are one line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "COMMAND"),
        ("frobnicate", "frobnicate"),
        ("get", "TOPIC"),
        ("put t x y", "y"),
        ("get t --frobnicate", "--frobnicate"),
        ("get t -n 0", "-n"),
        ("get t --after -1", "--after"),
        ("get t --after 9223372036854775808", "--after"),
        ("get t u", "quote a topic with blanks: dsmq get 't u'"),
        ("get t -f", "unknown argument '-f'"),
        (
            "put t --hello",
            "did you mean --help?; to begin a message with --, write -- before it",
        ),
        ("put t --prot 1", "did you mean --port?"),
        ("--verison", "unknown argument '--verison'; did you mean --version?"),
        ("serv", "unknown command 'serv'; did you mean serve?"),
        ("get t -- --json", "unknown argument '--json'; after --, there are no options"),
        ("put", "TOPIC"),
        ("topics t", "'t'"),
        ("topics -t", "'-t'"),
        ("-t", "'-t'"),
        ("get t --wait nan", "--wait"),
        ("put t x --reconnect nan", "--reconnect"),
        ("ping --timeout nan", "--timeout"),
        ("ping --timeout 0", "--timeout"),
        ("bench -n 0", "-n"),
        ("bench -n inf", "-n"),
        ("get t --after nan", "--after"),
        ("get t --after 1:", "--after"),
        ("get t --after :1", "--after"),
        ("get t --after e:1:2", "--after"),
        ("get t --after e:" + "9" * 20, "--after"),
        ("get t --after " + "9" * 5000, "--after"),
        ("ping --port " + "9" * 5000, "--port"),
        ("serve --port " + "9" * 5000, "--port"),
        ("put t x --prot=" + "9" * 5000, "--prot"),
        ("ping --port=", "--port"),
        ("ping --host=", "--host: '' is not an address"),
        ("ping --host unix:", "'unix:' is not an address"),
        ("ping --token-file=", "--token-file: the name of the file is empty"),
        ("ping --ca-file=", "--ca-file: the name of the file is empty"),
        ("ping --cert-file=", "--cert-file: the name of the file is empty"),
        ("ping --cert-file /nowhere --key-file=", "--key-file: the name of the file is empty"),
        ("get t --position-file=", "--position-file: the name of the file is empty"),
        ("ping --key-file /nowhere", "--key-file without --cert-file"),
        ("get t --wait -1", "--wait"),
        ("ping --port 0", "--port"),
        ("ping --port 65536", "--port"),
        ("ping --host [::1", "'[::1' is not an address"),
        ("ping --host 127.0.0.1:1 --port 2", "--host names port 1, but --port is 2"),
        ("ping --host 127.0.0.1:0", "--host: '0' is not a port number"),
        ("ping --host 127.0.0.1:", "'127.0.0.1:' is not an address"),
        ("serve --host 127.0.0.1:1", "--host: should be an address or a name, without a port"),
        ("ping --timeout soon", "--timeout"),
        ("serve --frobnicate 1", "--frobnicate"),
        ("serve --port", "--port"),
        ("serve --port x", "--port: "),
        ("config --log-level loud", "--log-level: "),
        ("serve --config /nowhere/dsmq.toml", "/nowhere/dsmq.toml: No such file"),
    ],
)
def test_invalid_usage_is_reported(arguments: str, expected: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    words = arguments.split()
    if words[:1] == ["serve"]:
        # In a separate process, because it handles signals.
        done = result(*words)
    else:
        try:
            status = main(words)
        except SystemExit as error:
            status = int(str(error))
        done = status, *capfdbinary.readouterr()
    assert_one_line(done, 2, expected)
    assert len(done[2]) < 400


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DSMQ_PORT", "abc"),
        ("DSMQ_PORT", "0"),
        ("DSMQ_PORT", "nan"),
        ("dsmq_port", "abc"),
        ("DSMQ_HOST", "[::1"),
        ("DSMQ_HOST", "127.0.0.1:1"),
        ("DSMQ_HOST", "unix:"),
        ("DSMQ_AUTH_TOKEN", "two words"),
        ("DSMQ_AUTH_TOKEN", "żółw"),
        ("DSMQ_AUTH_TOKEN", os.fsdecode(b"\xff")),
        ("DSMQ_AUTH_TOKEN_FILE", "/nowhere"),
        ("DSMQ_CONFIG", "/nowhere"),
    ],
)
def test_invalid_variable_is_reported(variable: str, value: str) -> None:
    done = result("ping", env={variable: value})
    assert_one_line(done, 2, "/nowhere: No such file" if value == "/nowhere" else f"{variable}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"port = 0", "port: '0' is not a port"),
        (b"max_topics = 1\nprot = 1", "prot: unknown setting; did you mean port?"),
        (b"host = 'unix:'", "host: 'unix:' is not an address"),
        (b'host = "unix:/a\\u0000b"', "host: 'unix:/a\\x00b' is not an address"),
        (b'host = "a\\u0000b"', "host: 'a\\x00b' is not an address"),
        (b'auth_token = "a\\u0000 b"', "auth_token: should be a token"),
        (b'auth_token_file = "a\\u0000b"', "embedded null"),
        (b'tls_cert_file = "a\\u0000b"', "embedded null"),
        ("port = 1".encode("utf-16"), "should be UTF-8; this looks like UTF-16"),
        (b"host = " + b"[" * 5000, "nested too deeply"),
        (b"port = " + b"9" * 5000, "too many digits"),
    ],
)
def test_invalid_server_config_is_reported(text: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "dsmq.toml"
    file.write_bytes(text)
    done = result("ping", env={"DSMQ_CONFIG": str(file)})
    assert_one_line(done, 2, expected)
    assert "\0" not in done[2].decode()


def test_server_config_may_begin_with_byte_order_mark(server: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "dsmq.toml"
    file.write_bytes(codecs.BOM_UTF8 + b"port = %d" % server.port)
    assert result("ping", env={"DSMQ_CONFIG": str(file)})[0] == 0


def test_service_links_are_not_server_address(server: Daemon) -> None:
    links = {"DSMQ_PORT": "tcp://10.96.3.7:30008", "DSMQ_SERVICE_HOST": "10.96.3.7", "DSMQ_SERVICE_PORT": "30008"}
    assert result("ping", "--port", str(server.port), env=links)[::2] == (0, b"")
    assert_one_line(result("ping", env={**links, "DSMQ_HOST": "[::1"}), 2, "DSMQ_HOST")
    assert_one_line(result("ping", env={"DSMQ_PORT": "http://10.96.3.7:30008"}), 2, "DSMQ_PORT")


@pytest.mark.parametrize("command", ["put t x", "get t", "topics", "ping --host localhost", "bench"])
def test_client_commands_reject_unknown_variables(command: str) -> None:
    expected = "DSMQ_HOSTT: unknown setting; did you mean DSMQ_HOST?"
    assert_one_line(result(*command.split(), env={"DSMQ_HOSTT": "elsewhere"}), 2, expected)


def test_client_commands_accept_server_settings(server: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "dsmq.toml"
    file.write_text("max_topics = 5")
    env = {"DSMQ_CONFIG": str(file), "DSMQ_LOG_LEVEL": "error", "dsmq_max_topics": "5"}
    assert result("ping", "--port", str(server.port), env=env)[::2] == (0, b"")


def test_lower_case_variables_set_server_address(server: Daemon) -> None:
    assert result("ping", env={"dsmq_host": "localhost", "dsmq_port": str(server.port)})[::2] == (0, b"")


def test_token_file_wins_over_token_variable(tmp_path: Path) -> None:
    right, wrong = "the-token-of-the-server", "the-token-of-another-one"
    (tmp_path / "right").write_text(right)
    with daemon(env={"DSMQ_AUTH_TOKEN": right}) as server:
        words = ["ping", "--port", str(server.port)]
        assert result(*words, env={"DSMQ_AUTH_TOKEN": right})[0] == 0
        assert result(*words, env={"DSMQ_AUTH_TOKEN": wrong})[0] == 1
        assert result(*words, "--token-file", str(tmp_path / "right"), env={"DSMQ_AUTH_TOKEN": wrong})[0] == 0
        assert result(*words, env={"DSMQ_AUTH_TOKEN_FILE": str(tmp_path / "right")})[0] == 0


# Files of certificates and keys


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate, its key, encrypted copies of the key, and invalid files."""
    folder = tmp_path_factory.mktemp("pem")
    issued = trustme.CA().issue_cert("localhost")
    for name, blobs in (("cert", issued.cert_chain_pems), ("key", [issued.private_key_pem])):
        for blob in blobs:
            blob.write_to_path(folder / name, append=True)
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(folder / "other")
    key = load_pem_private_key((folder / "key").read_bytes(), None)
    for name, kind in (("locked", PrivateFormat.PKCS8), ("locked_too", PrivateFormat.TraditionalOpenSSL)):
        (folder / name).write_bytes(key.private_bytes(Encoding.PEM, kind, BestAvailableEncryption(b"secret")))
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "secret").touch(0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cert", "key", "expected"),
    [
        ("cert", "locked", "{key}: {folder}/locked: the private key is encrypted"),
        ("cert", "locked_too", "{key}: {folder}/locked_too: the private key is encrypted"),
        ("key", "cert", "{key}: {folder}/cert: no private key in PEM format found; are key and certificate swapped?"),
        ("cert", "cert", "{key}: {folder}/cert: no private key in PEM format found"),
        ("key", "key", "{cert}: {folder}/key: no certificate in PEM format found"),
        ("cert", "other", "{key}: {folder}/other: the key does not match the certificate"),
        ("empty", "key", "{cert}: {folder}/empty: no certificate in PEM format found"),
        ("cert", "empty", "{key}: {folder}/empty: no private key in PEM format found"),
        ("folder", "key", "{cert}: {folder}/folder: Is a directory"),
        ("cert", "folder", "{key}: {folder}/folder: Is a directory"),
        ("cert", "missing", "{key}: {folder}/missing: No such file or directory"),
        ("secret", "key", "{cert}: {folder}/secret: Permission denied"),
        ("cert", "secret", "{key}: {folder}/secret: Permission denied"),
    ],
)
def test_invalid_certificate_or_key_is_reported(cert: str, key: str, expected: str, pem: Path) -> None:
    files = {"cert-file": str(pem / cert), "key-file": str(pem / key)}
    client = ["ping", *(word for name, file in files.items() for word in (f"--{name}", file))]
    server = ["serve", "--port=0", "--http-port=off", *(f"--tls-{name}={file}" for name, file in files.items())]
    for words, name in ((client, "--{}-file"), (server, "tls_{}_file")):
        done = run_dsmq(*words, prefix=without_privileges())
        about = expected.format(folder=pem, cert=name.format("cert"), key=name.format("key"))
        assert_one_line((done.returncode, done.stdout, done.stderr), 2, f"dsmq: {about}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["empty", "key", "folder", "missing", "secret"])
def test_invalid_ca_file_is_reported(name: str, pem: Path) -> None:
    server = f"serve --port 0 --http-port off --tls-cert-file {pem}/cert --tls-key-file {pem}/key --tls-client-ca-file"
    for words, option in (("ping --ca-file", "--ca-file"), (server, "tls_client_ca_file")):
        done = run_dsmq(*words.split(), str(pem / name), prefix=without_privileges())
        assert_one_line((done.returncode, done.stdout, done.stderr), 2, f"dsmq: {option}: {pem}/{name}: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auth-token-file", "http-token-file", "snapshot-file", "config"])
@pytest.mark.parametrize("what", ["folder", "secret"])
def test_unusable_server_file_is_reported(name: str, what: str, pem: Path) -> None:
    done = run_dsmq(*f"serve --port 0 --http-port 0 --{name} {pem}/{what}".split(), prefix=without_privileges())
    lines = done.stderr.decode().splitlines()
    assert done.returncode in (1, 2)
    assert lines[-1].startswith("dsmq: ")
    assert f"{pem}/{what}" in lines[-1]
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("name", ["auth-token-file", "http-token-file"])
def test_server_rejects_endless_token_file(name: str) -> None:
    done = run_dsmq("serve", "--port=0", "--http-port=0", f"--{name}=/dev/zero")
    assert done.returncode in (1, 2)
    assert done.stderr.decode().splitlines()[-1] == "dsmq: /dev/zero: longer than 1048576 bytes"


def test_client_command_rejects_endless_token_file() -> None:
    assert_one_line(result("ping", "--token-file", "/dev/zero"), 2, "/dev/zero: longer than 1048576 bytes")


@pytest.mark.parametrize("option", ["ca-file", "cert-file", "key-file"])
def test_too_long_certificate_file_is_reported(option: str, pem: Path, tmp_path: Path) -> None:
    file = tmp_path / "long"
    with file.open("wb") as stream:
        stream.truncate(2**24 + 1)
    words = ["ping", f"--{option}", str(file), *(["--cert-file", str(pem / "cert")] if option == "key-file" else [])]
    assert_one_line(result(*words), 2, f"{file}: longer than 16777216 bytes")


@pytest.mark.parametrize("command", ["put t x", "put t", "get t", "get t --follow", "topics", "ping"])
def test_missing_server_is_reported(command: str) -> None:
    port = unused_port()
    done = result(*command.split(), "--port", str(port), stdin=b"x\n")
    assert_one_line(done, 1, f"no server answers at 127.0.0.1:{port}")


def test_missing_unix_socket_server_is_reported_with_path(tmp_path: Path) -> None:
    host = f"unix:{tmp_path}/socket"
    assert_one_line(result("ping", "--host", host), 1, str(tmp_path))


@pytest.mark.parametrize("host", ["nowhere.invalid", "no..where"])
def test_unknown_host_is_reported_by_name(host: str) -> None:
    assert_one_line(result("ping", "--host", host), 1, host)
    assert_one_line(result("serve", "--port", "0", "--host", host, "--http-port", "off"), 1, host)


@pytest.mark.parametrize("command", ["ping", "get t", "put t x", "topics"])
def test_proxy_that_closes_connections_is_reported(command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as front:
        port = front.getsockname()[1]

        def close() -> None:
            with suppress(OSError):
                while True:
                    front.accept()[0].close()

        thread = threading.Thread(target=close)
        thread.start()
        done = result(*command.split(), "--port", str(port))
        front.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert_one_line(done, 1, f"dsmq: 127.0.0.1:{port} accepts connections and closes them at once")
    assert b"(--tls)" in done[2]


def test_other_server_is_reported_as_not_dsmq(server: Daemon) -> None:
    done = result("ping", "--port", str(server.http_port), "--timeout", str(SOON))
    assert_one_line(done, 1, f"127.0.0.1:{server.http_port} is not a dsmq server but dsmq's HTTP endpoint")


@pytest.mark.parametrize("arguments", [["put", "", "x"], ["get", ""]], ids=["put", "get"])
def test_empty_topic_is_reported(arguments: list[str], address: None) -> None:
    status, out, err = result(*arguments)
    assert status in (1, 2)
    assert_one_line((status, out, err), status, "name of the topic is empty")


def test_too_long_topic_is_reported(address: None) -> None:
    assert_one_line(result("put", "x" * 513, "x"), 1, "512 bytes")


def test_topic_that_is_not_utf8_is_reported(address: None) -> None:
    for arguments in (["put", os.fsdecode(b"t\xff"), "x"], ["get", os.fsdecode(b"t\xff")]):
        status, out, err = result(*arguments)
        assert status in (1, 2)
        assert_one_line((status, out, err), status, "UTF-8")


def test_message_argument_need_not_be_utf8(topic: str, mq: DSMQClientSideConnection) -> None:
    assert result("put", topic, os.fsdecode(b"\xff!")) == (0, b"", b"")
    assert mq.get(topic, raw=True) == b"\xff!"


@pytest.mark.parametrize("command", ["--help", "get --help", "serve --help"])
def test_help_ignores_invalid_environment(command: str) -> None:
    status, out, err = result(*command.split(), env={"DSMQ_HOST": "100%", "DSMQ_PORT": "%d"})
    assert (status, err) == (0, b"")
    assert b"Exit statuses: 0 done" in out


def test_serve_help_groups_options_by_subject() -> None:
    lines = result("serve", "--help")[1].decode().splitlines()
    sections = [line for line in lines if re.fullmatch(r"\S.*:", line)]
    assert sections == ["options:", *(f"{subject}:" for subject in SUBJECTS.values())]
    assert lines.index("Log:") < lines.index(next(line for line in lines if "--log-level" in line))


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
        assert b"serves on" not in first
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
            # What it sends first gets no reply.
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
    # More than a pipe holds.
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


@pytest.mark.parametrize("redirection", ["put {topic} <&-", "get {topic} --after 0 >&-", "topics >&-", "ping >&-"])
def test_closed_standard_files_cause_no_traceback(
    redirection: str, address: None, server: Daemon, mq: DSMQClientSideConnection
) -> None:
    mq.put("closed", "x")
    command = f'"{sys.executable}" -m dsmq {redirection.format(topic="closed")}'
    process = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, check=False)
    assert process.stderr.count(b"\n") <= 1


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
        if "serves on" in record.getMessage():
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
    assert anew == "dsmq: the server was restarted: the messages it held are lost"


# Others


def test_version_is_printed() -> None:
    assert result("--version") == (0, f"dsmq {__version__}\n".encode(), b"")


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
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "dsmq", "serve", "--port", "0", "--http-port", "off"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    # It has begun to load its modules.
    assert any("annotated_types" in line for line in process.stderr)
    process.terminate()
    process.communicate(timeout=SOON)
    assert process.returncode == 0
