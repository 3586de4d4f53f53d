"""`dsmq work`: running a command for each job."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from commands import assert_one_line, ended, line_of, mq, result, server, started, waiting

from conftest import SOON, UNIT, Daemon, daemon
from dsmq.client import DSMQClientSideConnection

__all__ = ["mq", "server"]

Client = DSMQClientSideConnection


@pytest.fixture
def topic(request: pytest.FixtureRequest, server: Daemon) -> str:
    os.environ["DSMQ_PORT"] = str(server.port)
    return str(request.node.name)


def program(code: str) -> tuple[str, ...]:
    """Return a command that runs a Python program."""
    return "--", sys.executable, "-c", f"import os, sys, time\n{code}"


def attempts(mq: Client, topic: str, **options: float) -> list[int]:
    """Finish the remaining jobs; return their attempts."""
    return [job.attempt for job in mq.work(topic, **{"timeout": 0, **options})]


def test_command_gets_message_and_its_metadata(mq: Client, topic: str) -> None:
    first = mq.put_many(topic, [b"\xff\0" * 100_000, b"", b"y"])[0]
    code = "print(len(sys.stdin.buffer.read()), *map(os.environ.get, sys.argv[1:]), flush=True)"
    names = "DSMQ_TOPIC_NAME", "DSMQ_JOB_ID", "DSMQ_ATTEMPT"
    status, out, err = result("work", topic[:-1] + "*", "--timeout", "0s", *program(code), *names)
    assert out.decode().splitlines() == [
        f"{size} {topic} {first + index} 1" for index, size in enumerate((200_000, 0, 1))
    ]
    assert (status, err) == (0, b"")
    assert attempts(mq, topic[:-1] + "*") == []


def test_command_may_use_dsmq_and_leave_its_input_unread(mq: Client, topic: str) -> None:
    mq.put(topic, b"x" * 1_000_000)
    command = "--", sys.executable, "-m", "dsmq", "put", topic + "/results", "done"
    assert result("work", topic, "--timeout", "0s", *command) == (0, b"", b"")
    mq.seek(topic + "/results", 0)
    assert mq.get(topic + "/results") == "done"
    assert attempts(mq, topic) == []


def test_message_of_failed_command_is_given_again_after_the_delay(mq: Client, topic: str) -> None:
    message_id = mq.put(topic, "x")
    options = "--delay", f"{UNIT}s", "--timeout", f"{SOON}s"
    code = "if os.environ['DSMQ_ATTEMPT'] == '1': sys.exit(3)\nprint('done', flush=True)"
    with started("work", topic, *options, *program(code)) as process:
        assert process.stderr is not None
        line = process.stderr.readline().decode()
        assert line == f"dsmq: job {message_id} of {topic!r} given back: exit status 3\n"
        assert line_of(process) == b"done\n"
    assert attempts(mq, topic, timeout=UNIT) in ([], [3])


@pytest.mark.parametrize(
    ("code", "about"), [("sys.exit(1)", "exit status 1"), ("os.kill(os.getpid(), 9)", "killed by signal 9")]
)
def test_failure_is_reported_on_one_line(mq: Client, topic: str, code: str, about: str) -> None:
    mq.put(topic, "x")
    status, out, err = result("work", topic, "--delay", "1h", "--timeout", "0s", *program(code))
    assert (status, out) == (0, b"")
    assert err.decode().endswith(f"given back: {about}\n")
    assert err.count(b"\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_waiting_ends_worker(server: Daemon, topic: str, number: int, interruptible: None) -> None:
    with waiting(server.port, "work", topic, *program("")) as process:
        process.send_signal(number)
        assert ended(process) == (130 if number == signal.SIGINT else 0, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("finishes", [False, True])
def test_signal_is_passed_on_and_job_given_back(
    mq: Client, topic: str, number: int, finishes: bool, interruptible: None
) -> None:
    mq.put_many(topic, ["x", "y"])
    # Processes started by the command get it, too.
    code = "import subprocess\nsubprocess.Popen(['sleep', '1000'])\nprint('started', flush=True)\n"
    if finishes:
        code = f"import signal\nsignal.signal({number}, lambda *_: sys.exit(0))\n{code}"
    # A signal that arrives just before a long sleep would be handled only after it.
    code += f"while True: time.sleep({UNIT / 10})"
    with started("work", topic, "--delay", "1h", *program(code)) as process:
        assert line_of(process) == b"started\n"
        process.send_signal(number)
        status, out, err = ended(process)
    assert (status, out) == (130 if number == signal.SIGINT else 0, b"")
    assert err.decode().endswith("" if finishes else f"given back: killed by signal {number:d}\n")
    assert attempts(mq, topic) == ([1] if finishes else [2, 1])


def test_lease_is_extended_while_command_runs(mq: Client, topic: str, tmp_path: Path) -> None:
    mq.put(topic, "x")
    end = tmp_path / "end"
    code = f"print('started', flush=True)\nwhile not os.path.exists({str(end)!r}): time.sleep({UNIT / 10})"
    with started("work", topic, "--lease", f"{20 * UNIT}s", "--timeout", "0s", *program(code)) as process:
        assert line_of(process) == b"started\n"
        assert mq.take(topic, timeout=30 * UNIT) is None
        end.touch()
        assert ended(process) == (0, b"", b"")
    assert attempts(mq, topic) == []


def test_command_of_lost_job_is_terminated(mq: Client, topic: str) -> None:
    mq.put(topic, "x")
    code = "print('started', flush=True)\ntime.sleep(1000)"
    with started("work", topic, "--lease", f"{5 * UNIT}s", "--timeout", "0s", *program(code)) as process:
        assert line_of(process) == b"started\n"
        process.send_signal(signal.SIGSTOP)
        job = mq.take(topic, timeout=SOON)
        assert job is not None
        assert job.attempt == 2
        process.send_signal(signal.SIGCONT)
        status, out, err = ended(process)
    assert (status, out) == (0, b"")
    assert " lost: " in err.decode()
    assert err.count(b"\n") == 1
    mq.done(job)


@pytest.mark.slow
def test_command_of_lost_job_that_ignores_sigterm_is_killed(mq: Client, topic: str) -> None:
    mq.put(topic, "x")
    code = (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid(), flush=True)\ntime.sleep(1000)"
    )
    with started("work", topic, "--lease", f"{5 * UNIT}s", "--timeout", "0s", *program(code)) as process:
        pid = int(line_of(process))
        process.send_signal(signal.SIGSTOP)
        job = mq.take(topic, timeout=SOON)
        assert job is not None
        process.send_signal(signal.SIGCONT)
        status, _, err = ended(process)
    assert status == 0
    assert b" lost: " in err
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    mq.done(job)


def test_job_is_done_when_its_command_ends_whatever_it_leaves_running(mq: Client, topic: str) -> None:
    # The message does not fit into a pipe, and the background process inherits the input without reading it.
    mq.put(topic, b"x" * 1_000_000)
    code = "import subprocess\nprint(subprocess.Popen(['sleep', '1000'], stdout=2).pid, flush=True)"
    with started("work", topic, "--timeout", "0s", *program(code)) as process:
        pid = int(line_of(process))
        assert process.wait(SOON) == 0
        os.kill(pid, signal.SIGKILL)
    assert attempts(mq, topic) == []


def test_worker_that_is_killed_loses_its_job_when_the_lease_ends(mq: Client, topic: str) -> None:
    mq.put(topic, "x")
    code = "print(os.getpid(), flush=True)\ntime.sleep(1000)"
    with started("work", topic, "--lease", f"{5 * UNIT}s", *program(code)) as process:
        pid = int(line_of(process))
        process.kill()
        job = mq.take(topic, timeout=SOON)
        os.kill(pid, signal.SIGKILL)
    assert job is not None
    assert job.attempt == 2
    mq.done(job)


def test_lost_server_ends_worker_and_its_command(topic: str) -> None:
    code = "print(os.getpid(), flush=True)\ntime.sleep(1000)"
    with daemon() as server:
        with server.client() as mq:
            mq.put(topic, "x")
        options = "-p", str(server.port), "--lease", f"{20 * UNIT}s", "--reconnect", "0"
        with started("work", topic, *options, *program(code)) as process:
            pid = int(line_of(process))
            server.stop()
            status, out, err = ended(process)
    assert (status, out) == (1, b"")
    assert err.decode().startswith("dsmq: ")
    assert err.count(b"\n") == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("--", "no-such-command"), 2, "'no-such-command': command not found"),
        ((), 2, "TOPIC -- COMMAND"),
        (("command",), 2, "TOPIC -- COMMAND"),
        (("--lease", "0s", "--", "true"), 2, "is not a time from 0.001s to 1d"),
        (("--lease", "2d", "--", "true"), 2, "is not a time from 0.001s to 1d"),
        (("--group", "two words", "--", "true"), 2, "is not 1 to 64 printable ASCII"),
        (("--delay", "soon", "--", "true"), 2, "is not a time such as"),
        (("--delay", "2d", "--", "true"), 2, "is not a time from 0s to 1d"),
        (("other", "--", "true"), 2, "too many arguments"),
    ],
)
def test_wrong_usage_is_reported_on_one_line(
    topic: str, arguments: tuple[str, ...], status: int, expected: str
) -> None:
    assert_one_line(result("work", "t", *arguments), status, expected)


def test_unusable_program_is_reported_and_job_given_back(mq: Client, topic: str, tmp_path: Path) -> None:
    mq.put(topic, "x")
    file = tmp_path / "program"
    file.write_text("no program")
    file.chmod(0o755)
    assert_one_line(result("work", topic, "--", str(file)), 1, "Exec format error")
    assert attempts(mq, topic) == [2]


def test_help_names_command_after_options() -> None:
    status, out, _ = result("work", "--help")
    assert status == 0
    assert b"usage: dsmq work TOPIC [OPTION ...] -- COMMAND ...\n" in out
