"""The command line, run as users run it, against a real server."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
import tomllib
from datetime import datetime
from pathlib import Path

import pytest
from commands import (
    ESCAPED,
    NASTY,
    address,
    assert_one_line,
    ended,
    line_of,
    mq,
    on_terminal,
    result,
    server,
    started,
    topic,
    type_in,
    waiting,
)

from conftest import SOON, UNIT, Daemon, daemon, run_dsmq, wait_until, without_privileges
from dsmq.client import DSMQClientSideConnection, connect

# Fixtures.
__all__ = ["address", "mq", "server", "topic"]

# Put and get


def test_put_message_can_be_read(topic: str) -> None:
    assert result("put", topic, "hello wörld") == (0, b"", b"")
    assert result("get", topic, "--after", "0") == (0, "hello wörld\n".encode(), b"")


def test_get_reads_only_new_messages_and_explains_it(topic: str, mq: DSMQClientSideConnection) -> None:
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
def test_get_without_messages_exits_with_3(words: str, topic: str) -> None:
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
    assert err.decode() == f"dsmq: topic {topic!r}: the position is from another epoch, whose messages are lost\n"


def test_id_above_last_id_is_an_error(topic: str, mq: DSMQClientSideConnection) -> None:
    last = mq.put(topic, "1")
    assert result("get", topic, "--after", str(last)) == (3, b"", b"")
    assert_one_line(result("get", topic, "--after", str(last + 1_000_000)), 1, "no message has an id above")


def test_position_file_resumes_next_run(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    file = tmp_path / "position"
    words = ["get", topic, "--position-file", str(file), "-n", "2"]
    mq.put(topic, "before the first run")
    # The first run starts after the newest message.
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
    assert_one_line(result("get", topic, "--position-file", str(file)), 2, f"{file}: does not contain a position")
    assert file.read_bytes() == content


def test_position_file_may_contain_an_id(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
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
        ("{topic} -price", "-price"),
        ("{topic} -Hello", "-Hello"),
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
    assert_one_line(result("put", *words.split()), 2, "quote a message with spaces: dsmq put a 'b c'")


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
        assert_one_line(done, 1, "line 2 of stdin: a message may have at most 10 bytes, not 11 (lines stored: 1 before")
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


def test_lines_stored_after_failed_line_are_reported() -> None:
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


def test_ping_reports_reply(address: None, server: Daemon) -> None:
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
    assert status == 2
    assert ESCAPED in shown
    assert shown.removesuffix("\r\n").isprintable()


def test_config_escapes_control_characters_and_stays_toml() -> None:
    options = ["config", "--snapshot-file", "é" + NASTY]
    assert r"é\u001b[2J\x9b" in on_terminal(*options)[1]
    for env in ({}, ASCII):
        assert tomllib.loads(result(*options, env=env)[1].decode())["snapshot_file"] == "é" + NASTY
