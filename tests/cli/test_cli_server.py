"""Commands about the server: stats, watch and stop; and completion, which requests its topics."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import NASTY, address, assert_one_line, mq, on_terminal, result, started, topic

from conftest import SOON, UNIT, Daemon, daemon, wait_until
from dsmq import aio
from dsmq.client import DSMQClientSideConnection
from dsmq.wire.resp import BUILD
from helpers import refusing_address

# Fixtures.
__all__ = ["address", "mq", "topic"]


@pytest.fixture(scope="module")
def server() -> Iterator[Daemon]:
    """A server with few topics, so that they fit on a screen."""
    with daemon() as process:
        yield process


def values(out: bytes) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in out.decode().splitlines())


def test_stats_describes_a_topic(topic: str, mq: DSMQClientSideConnection) -> None:
    ids = mq.put_many(topic, ["1", "22"])
    status, out, err = result("stats", topic)
    assert (status, err) == (0, b"")
    expected = {"messages": 2, "bytes": 3, "last_number": 2, "first_id": ids[0], "last_id": ids[1]}
    assert values(out).items() >= {name: str(value) for name, value in expected.items()}.items()
    assert json.loads(result("stats", topic, "--json")[1]).items() >= expected.items()
    assert mq.stats(topic).items() >= expected.items()
    assert mq.stats(topic + "none")["messages"] == 0
    with pytest.raises(ValueError, match="pattern"):
        mq.stats("*")


def test_stats_describes_the_server(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic, "x")
    found = values(result("stats")[1])
    assert (found["dsmq_version"], found["dsmq_build"]) == ("2.0.0", BUILD)
    assert int(found["connected_clients"]) >= 2
    assert int(found["messages"]) >= 1
    assert mq.stats()["epoch"] == found["epoch"] == mq.position(topic).partition(":")[0]


def test_stats_describe_groups_of_workers(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put_many(topic, ["1", "2", "3"])
    job = mq.take(topic, timeout=0)
    assert job
    shown = {"workers:waiting": "2", "workers:held": "1"}
    # A busy server describes fewer groups.
    wait_until(lambda: values(result("stats", topic)[1]).items() >= shown.items())
    mq.done(job)
    expected = {"workers:waiting": 2, "workers:held": 0, "workers:taken": 1, "workers:done": 1}
    wait_until(lambda: mq.stats(topic).items() >= expected.items())
    wait_until(lambda: json.loads(result("stats", topic, "--json")[1]).items() >= expected.items())
    assert int(values(result("stats")[1])["jobs_done"]) >= 1
    wait_until(lambda: f"name=workers,topic={topic}" in " ".join(values(result("stats")[1]).values()))


def test_stats_of_asyncio_client(topic: str, server: Daemon) -> None:
    async def main() -> None:
        async with aio.connect(port=server.port) as mq:
            await mq.put(topic, "x")
            assert (await mq.stats(topic))["messages"] == 1
            assert (await mq.stats())["dsmq_version"] == "2.0.0"

    asyncio.run(main())


def test_stop_stops_the_server() -> None:
    with daemon() as server:
        assert result("stop", "-p", str(server.port)) == (0, b"", b"")
        assert server.process.wait(SOON) == 0
        assert "stopping: SHUTDOWN from client" in server.log()


def test_stop_reports_missing_permission() -> None:
    with daemon("--allow-shutdown", "false") as server:
        assert_one_line(result("stop", "-p", str(server.port)), 1, "SHUTDOWN is not allowed (allow_shutdown = false)")


# Purge


def test_purge_expires_messages_of_a_topic_or_pattern(topic: str, mq: DSMQClientSideConnection) -> None:
    for name in ("/a", "/a", "/b"):
        mq.put(topic + name, "x")
    assert result("purge", topic + "/a") == (0, b"2 messages purged\n", b"")
    assert result("purge", topic + "/*") == (0, b"1 message purged\n", b"")
    assert result("get", topic + "/*", "--after", "0") == (3, b"", b"")


# Watch


def test_watch_prints_once_if_output_is_not_a_terminal(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic + "\x1b[2J", "x")
    status, out, err = result("watch", "--interval", str(UNIT))
    assert (status, err) == (0, b"")
    lines = out.decode().splitlines()
    assert lines[0].startswith("dsmq 2.0.0 at 127.0.0.1:")
    assert " puts/s, " in lines[2]
    assert [line for line in lines if re.fullmatch(rf" +0\.0 +1 +0\.00 MB  {topic}\\x1b\[2J", line)]


def test_watch_counts_one_in_the_singular() -> None:
    with daemon() as own, own.client() as mq:
        for topics, messages in (("1 topic", "1 message"), ("2 topics", "2 messages")):
            mq.put(topics, "x")
            out = result("watch", "--interval", str(UNIT), "--port", str(own.port))[1].decode()
            assert out.splitlines()[1] == f"{topics}, {messages}, 0.00 MB"


def test_watch_measures_rates(topic: str, mq: DSMQClientSideConnection) -> None:
    with started("watch", "--interval", "1") as process:
        assert process.stdout is not None
        while process.poll() is None:
            mq.put(topic, "x")
        lines = process.stdout.read().decode().splitlines()
    (line,) = [line for line in lines if line.endswith(f"  {topic}")]
    assert float(line.split()[0].replace(",", "")) > 0


@contextmanager
def screen(rows: int, columns: int, *arguments: str, **env: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a command in a terminal of this size; yield its process and the other end of the terminal."""
    master, slave = os.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    # A process gets signals only from its controlling terminal.
    control = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", control, sys.executable, "-m", "dsmq", *arguments]
    # These would override the terminal's size.
    others = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS")}
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**others, "TERM": "xterm", **env},
        start_new_session=True,
    )
    os.close(slave)
    os.set_blocking(master, False)
    try:
        yield process, master
    finally:
        process.kill()
        process.wait()
        os.close(master)


def read_screen(master: int) -> str:
    """Return what was drawn since the last call."""
    found = b""
    while True:
        try:
            found += os.read(master, 65_536)
        except OSError:
            # There is no more output or the process has ended.
            return found.decode(errors="replace")


@pytest.mark.parametrize(("key", "status"), [(b"q", 0), (b"\x03", 130), (b"", -1)], ids=["q", "Ctrl-C", "SIGTERM"])
def test_watch_draws_a_screen_and_restores_the_terminal(
    key: bytes, status: int, topic: str, mq: DSMQClientSideConnection
) -> None:
    name = topic.partition("[")[0]
    mq.put("nasty" + NASTY, "x")
    mq.put_many(name, ["x"] * 9)
    shown = ""

    def is_shown(text: str) -> bool:
        nonlocal shown
        shown += read_screen(master)
        return text in shown

    with screen(30, 100, "watch", "--interval", str(UNIT)) as (process, master):
        wait_until(lambda: is_shown(name) and is_shown("nasty"))
        assert "\x9b" not in shown
        assert "\x1b[40m" not in shown
        shown = ""
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        # Everything is redrawn.
        wait_until(lambda: is_shown(name))
        if key:
            os.write(master, key)
        else:
            process.terminate()
        # It leaves the alternate screen.
        wait_until(lambda: is_shown("\x1b[?1049l"))
        assert process.wait(SOON) == (status if key else 128 + signal.SIGTERM)


@pytest.mark.parametrize("terminal", ["dumb", "unknown-terminal"])
def test_watch_prints_once_on_terminal_without_cursor_control(terminal: str, topic: str) -> None:
    with screen(30, 100, "watch", "--interval", str(UNIT), TERM=terminal) as (process, master):
        shown = ""

        def has_ended() -> bool:
            nonlocal shown
            shown += read_screen(master)
            return process.poll() is not None

        wait_until(has_ended)
        assert process.returncode == 0
        assert "PUTS/S" in shown + read_screen(master)


def test_watch_ends_with_one_line_when_the_server_stops(topic: str) -> None:
    with daemon() as own, started("watch", "--interval", str(UNIT), "--port", str(own.port)) as process:
        own.stop()
        assert process.wait(SOON) in (0, 1)
        assert process.stderr is not None
        assert process.stderr.read().count(b"\n") <= 1
    with refusing_address() as (_, port):
        status, shown = on_terminal("watch", "--port", str(port))
    assert status == 1
    assert "no server answers" in shown


# Completion


def completed(line: str) -> list[str]:
    """Return the completions of a command line, requested as a shell does."""
    reader, writer = os.pipe()
    variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    # argcomplete writes to descriptor 8.
    code = f"import os, sys; os.dup2({writer}, 8); from dsmq.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **variables}, pass_fds=[writer], timeout=SOON, check=False)
    os.close(writer)
    with open(reader, "rb") as stream:
        assert done.returncode == 0
        return [word.strip() for word in stream.read().decode().split("\n")]


def test_commands_options_and_topics_are_completed(topic: str, mq: DSMQClientSideConnection) -> None:
    mq.put(topic + "/a", "x")
    mq.put(topic + "/b", "x")
    mq.put(topic + "/\x1b", "x")
    assert completed("dsmq st") == ["stats", "stop"]
    assert completed("dsmq get x --las") == ["--last"]
    assert completed(f"dsmq get {topic}/") == [topic + "/a", topic + "/b"]
    with refusing_address() as (_, port):
        assert completed(f"dsmq get --port {port} {topic}/") == [""]
    assert completed(f"dsmq put {topic} {topic}/") == [""]
    assert completed("dsmq completion ") == ["--help", "bash", "zsh", "fish"]


def test_values_of_settings_are_completed() -> None:
    assert completed("dsmq serve --log-level ") == ["debug", "info", "warning", "error"]
    assert completed("dsmq config --when-full d") == ["drop_oldest"]
    assert completed("dsmq serve --allow-shutdown ") == ["true", "false"]


@pytest.fixture
def shell_environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell on a simple terminal. It finds dsmq and keeps its files in a temporary folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "TERM": "dumb", "HOME": str(tmp_path)}


@pytest.mark.parametrize(
    ("shell", "begin"),
    [
        (["bash", "--norc"], 'eval "$(dsmq completion bash)"'),
        (["zsh", "-f"], 'autoload -U compinit; compinit -D; eval "$(dsmq completion zsh)"'),
    ],
    ids=["bash", "zsh"],
)
def test_shell_completes_command(shell_environment: dict[str, str], shell: list[str], begin: str) -> None:
    if not shutil.which(shell[0]):
        pytest.skip(f"needs {shell[0]}")
    master, slave = os.openpty()
    with subprocess.Popen(
        [*shell, "-i"], stdin=slave, stdout=slave, stderr=slave, env=shell_environment, start_new_session=True
    ) as process:
        os.close(slave)
        shown = b""
        try:
            # Quoted so that the input that the terminal echoes differs from the output.
            os.write(master, f"{begin}\necho rea''dy\n".encode())
            for text, then in ((b"ready", b"dsmq sto\t"), (b"dsmq stop ", b"")):
                while text not in shown:
                    assert select.select([master], [], [], SOON)[0], shown
                    shown += os.read(master, 4096)
                os.write(master, then)
        finally:
            process.kill()
            os.close(master)


def test_fish_completes_command(shell_environment: dict[str, str]) -> None:
    if not shutil.which("fish"):
        pytest.skip("needs fish")
    script = 'dsmq completion fish | source; complete --do-complete "dsmq sto"'
    command = ["fish", "--no-config", "-c", script]
    assert subprocess.check_output(command, env=shell_environment, timeout=SOON, text=True) == "stop\n"


def test_completion_without_its_library_is_reported(tmp_path: Path) -> None:
    (tmp_path / "argcomplete.py").write_text("raise ImportError")
    done = result("completion", "bash", env={"PYTHONPATH": str(tmp_path)})
    assert_one_line(done, 2, "completion needs argcomplete: pip install 'dsmq[completion]'")
