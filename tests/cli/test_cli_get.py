"""`dsmq get`: several topics, going back to earlier messages, and formats."""

from __future__ import annotations

import json
import os
import re
import stat
import time
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
    waiting,
)

from conftest import UNIT, Daemon, wait_until
from dsmq.client import DSMQClientSideConnection

# Fixtures.
__all__ = ["address", "mq", "server", "topic"]

# Several topics


def put_mixed(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic + "/a", "1")
    mq.put(topic + "/b", "2")
    mq.put(topic, "other")
    mq.put(topic + "/a", "3")


def test_topics_and_patterns_are_read_in_order(topic: str, mq: DSMQClientSideConnection) -> None:
    put_mixed(topic, mq)
    assert result("get", topic + "/*", "--after", "0", "-n", "9") == (0, b"1\n2\n3\n", b"")
    assert result("get", topic, topic + "/b", "--after", "0", "-n", "9") == (0, b"2\nother\n", b"")
    assert result("get", topic + "/*", "--after", "0", "--count", "2", "-v") == (
        0,
        f"{topic}/a 1\n{topic}/b 2\n".encode(),
        b"",
    )


def test_follow_prints_new_topics_of_a_pattern(topic: str, server: Daemon, mq: DSMQClientSideConnection) -> None:
    with waiting(server.port, "get", topic + "/*", topic, "--follow", "-v") as process:
        for name in (topic + "/new", topic, topic + "/newer"):
            mq.put(name, "x")
            assert line_of(process) == f"{name} x\n".encode()


def test_latest_of_a_pattern_is_one_of_each_topic(topic: str, mq: DSMQClientSideConnection) -> None:
    put_mixed(topic, mq)
    assert result("get", topic + "/*", "--after", "0", "--latest") == (0, b"2\n3\n", b"")
    assert result("get", topic + "/*", "--after", "0", "--latest", "-n", "1") == (0, b"3\n", b"")


def test_json_position_of_several_topics_resumes_there(topic: str, mq: DSMQClientSideConnection) -> None:
    put_mixed(topic, mq)
    words = ["get", topic + "/*", topic]
    lines = [json.loads(line) for line in result(*words, "--after", "0", "-n", "3", "--json")[1].splitlines()]
    assert [(line["topic"], line["message"]) for line in lines] == [
        (topic + "/a", "1"),
        (topic + "/b", "2"),
        (topic, "other"),
    ]
    assert result(*words, "--after", lines[1]["position"], "-n", "9") == (0, b"other\n3\n", b"")


def test_position_file_of_several_topics(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    words = ["get", topic + "/*", topic, "--position-file", str(tmp_path / "position"), "--after", "0", "-n"]
    put_mixed(topic, mq)
    assert result(*words, "1") == (0, b"1\n", b"")
    assert result(*words, "9") == (0, b"2\nother\n3\n", b"")
    assert result(*words, "9") == (3, b"", b"")
    mq.put(topic + "/new", "4")
    with started(*words, "1", "--follow") as process:
        assert ended(process) == (0, b"4\n", b"")


# Going back


def test_last_prints_the_last_messages_of_all_topics(topic: str, mq: DSMQClientSideConnection) -> None:
    put_mixed(topic, mq)
    assert result("get", topic + "*", "--last", "2") == (0, b"other\n3\n", b"")
    assert result("get", topic + "/a", "--last", "9") == (0, b"1\n3\n", b"")
    assert result("get", topic + "*", "--last", "3", "-n", "1") == (0, b"2\n", b"")
    assert result("get", topic + "/none", "--last", "3") == (3, b"", b"")


def test_last_follow_continues_with_new_messages(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, ["1", "2"])
    with started("get", topic, "--last", "1", "--follow") as process:
        assert line_of(process) == b"2\n"
        mq.put(topic, "3")
        assert line_of(process) == b"3\n"


def test_since_prints_all_messages_put_in_that_time(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, [str(number) for number in range(250)])
    assert len(result("get", topic, "--since", "1h")[1].split()) == 250
    assert result("get", topic, "--since", "60m", "-n", "2") == (0, b"0\n1\n", b"")
    before = time.monotonic()
    wait_until(lambda: time.monotonic() - before > 2 * UNIT)
    assert result("get", topic, "--since", "0") == (3, b"", b"")
    mq.put(topic, "new")
    # The command may take longer to start than this.
    assert result("get", topic, "--since", str(time.monotonic() - before - UNIT)[:9])[1] in (b"new\n", b"")


def test_position_file_takes_precedence_over_last(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    words = ["get", topic, "--last", "2", "--position-file", str(tmp_path / "position")]
    assert result(*words) == (3, b"", b"")
    mq.put_many(topic, ["1", "2", "3", "4"])
    assert result(*words, "-n", "1") == (0, b"3\n", b"")
    assert result(*words, "-n", "9") == (0, b"4\n", b"")


# Formats


def test_format_prints_parts_of_a_message(topic: str, mq: DSMQClientSideConnection) -> None:
    before = time.time()
    message_id = mq.put_many(topic, ["1", b"\xff2"])[1]
    line = result("get", topic, "--last", "1", "--format", r"%t,%i,%n,%l,%x,%p,100%%\t\\\n;%s;%d\0")[1]
    first, rest = line.split(b"\n", 1)
    assert first == f"{topic},{message_id},2,2,ff32,".encode() + b"\xff2,100%\t\\"
    _, seconds, date = rest.removesuffix(b"\0\n").decode().split(";")
    assert re.fullmatch(r"[0-9]+\.[0-9]{3}", seconds)
    assert abs(datetime.fromisoformat(date).timestamp() - float(seconds)) < 0.002
    assert abs(float(seconds) - before) < 60


def test_topic_in_format_stays_on_its_line(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic + "\n\x1b", "x\x1b")
    assert result("get", topic + "*", "--after", "0", "-v")[1] == f"{topic}\\n\\x1b x\x1b\n".encode()


@pytest.mark.parametrize("words", [["-v"], ["--format", "%t %p"]], ids=" ".join)
def test_terminal_gets_no_control_characters(words: list[str], topic: str, mq: DSMQClientSideConnection) -> None:
    name = topic.partition("[")[0] + "".join(words)
    mq.put(name + NASTY, NASTY)
    assert on_terminal("get", name + "*", "--after", "0", *words) == (0, f"{name}{ESCAPED} {ESCAPED}\r\n")


# To a file


def test_output_writes_message_unchanged(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    body = bytes(range(256)) * 10_000
    file = tmp_path / "frame"
    file.write_text("old")
    file.chmod(0o640)
    mq.put_many(topic, [b"before", body])
    assert result("get", topic, "--last", "1", "--output", str(file)) == (0, b"", b"")
    assert file.read_bytes() == body
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["frame"]
    assert result("get", topic, "--last", "1", "--output", "-") == (0, body, b"")


def test_output_keeps_file_without_a_message(topic: str, tmp_path: Path) -> None:
    (tmp_path / "frame").write_text("old")
    assert result("get", topic, "--last", "1", "--output", str(tmp_path / "frame")) == (3, b"", b"")
    assert (tmp_path / "frame").read_text() == "old"


def test_unusable_output_file_is_reported(topic: str, mq: DSMQClientSideConnection, tmp_path: Path) -> None:
    mq.put(topic, "x")
    for name, status, expected in (
        (str(tmp_path), 2, "not a regular file"),
        (str(tmp_path / "missing" / "file"), 1, "No such file"),
    ):
        assert_one_line(result("get", topic, "--last", "1", "--output", name), status, f"{name}: {expected}")
    # Even if there is no message to write.
    assert_one_line(result("get", topic, "--output", str(tmp_path)), 2, "not a regular file")
