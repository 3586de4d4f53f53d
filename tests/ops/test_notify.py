"""Socket passing and notifications; the tests play the role of systemd."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import SOON, UNIT, Wire, daemon, loop_of, wait_until
from dsmq import settings as config
from dsmq.ops import systemd
from dsmq.ops.systemd import Systemd
from dsmq.server import Server

# Passes its sockets to a Python process as systemd does: from descriptor 3 on.
LAUNCH = """
import os, sys
numbers, names, *words = sys.argv[1:]
for number, source in enumerate(numbers.split(",")):
    os.dup2(int(source), 3 + number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(number + 1), "LISTEN_FDNAMES": names}
os.execv(sys.executable, [sys.executable, *words])
"""


class Manager:
    """The receiving end of the notification socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(SOON)

    def next(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))

    def wait_for(self, *names: str) -> dict[str, str]:
        """Return the next notification that contains one of these names."""
        while not set(names) & set(states := self.next()):
            pass
        return states

    def receives(self, name: str) -> bool:
        """Return whether one of the remaining notifications contains this name."""
        try:
            return bool(self.wait_for(name))
        except TimeoutError:
            return False


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.socket.close()


@contextmanager
def running(manager: Manager, watchdog_seconds: float = 60, **settings: object) -> Iterator[Server]:
    """A server in this process that notifies this manager."""
    effective = config.load(kind=config.EmbeddedSettings, **{"port": 0, **settings})
    notifier = Systemd(manager.address, watchdog_seconds)
    server = Server(effective, load=lambda: effective, systemd=notifier)
    server.start()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.request_stop("the test ends")
        thread.join()
        assert notifier._socket
        notifier._socket.close()


@contextmanager
def launched(
    sockets: Sequence[socket.socket], names: str, *options: str, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`dsmq serve`, with these sockets passed to it."""
    # Above the descriptors that they will be moved to.
    numbers = [fcntl.fcntl(sock, fcntl.F_DUPFD, 10) for sock in sockets]
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", LAUNCH, ",".join(map(str, numbers)), names),
            *("-m", "dsmq", "serve", *options),
        ],
        pass_fds=numbers,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    for number in numbers:
        os.close(number)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=SOON)


def lines_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Return the log up to a matching line."""
    assert process.stderr
    log = ""
    for line in process.stderr:
        log += line
        if re.search(pattern, line):
            return log
    raise AssertionError(f"no line like {pattern!r} in:\n{log}")


def failure(sockets: Sequence[socket.socket], names: str) -> str:
    """Return the error of `dsmq serve` for sockets that it can't use."""
    with launched(sockets, names) as process:
        assert process.wait(SOON) == 1
        assert process.stderr
        return process.stderr.read()


def listening(family: int = socket.AF_INET, address: object = ("127.0.0.1", 0)) -> socket.socket:
    sock = socket.socket(family)
    sock.bind(address)  # type: ignore[arg-type]
    sock.listen()
    return sock


# Notifications


@pytest.mark.parametrize("address", ["{path}/notify", "@dsmq-test-{pid}"])
def test_systemd_is_notified_ready_once_accepting(tmp_path: Path, address: str) -> None:
    manager = Manager(address.format(path=tmp_path, pid=os.getpid()))
    where = f"{tmp_path}/queue"
    command = [sys.executable, "-m", "dsmq", "serve", "--host", f"unix:{where}", "--http-port", "off"]
    with (
        manager.socket,
        subprocess.Popen(
            command, stderr=subprocess.DEVNULL, env={**os.environ, "NOTIFY_SOCKET": manager.address}
        ) as process,
    ):
        try:
            assert manager.next() == {"READY": "1"}
            wire = Wire(where)
            assert wire.call("PING") == "PONG"
            wire.close()
        finally:
            process.terminate()
        assert manager.wait_for("STOPPING")["STOPPING"] == "1"


def test_failed_listen_never_notifies_ready(manager: Manager) -> None:
    with listening() as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "dsmq", "serve", "--port", port, "--http-port", "off"]
        done = subprocess.run(
            command, stderr=subprocess.PIPE, env={**os.environ, "NOTIFY_SOCKET": manager.address}, check=False
        )
    assert b"in use" in done.stderr
    manager.socket.setblocking(False)
    notifications = []
    while True:
        try:
            notifications.append(manager.next())
        except BlockingIOError:
            break
    assert not [states for states in notifications if "READY" in states]


def test_notify_status_reports_connections_and_messages(manager: Manager) -> None:
    with running(manager, 0.3) as server:
        assert manager.wait_for("STATUS")["STATUS"] == "0 connections, 0 messages"
        wire = Wire(("127.0.0.1", server.port))
        wire.call("PUT", "greetings", "hello")
        while manager.wait_for("STATUS")["STATUS"] != "1 connections, 1 messages":
            pass
        wire.close()


def test_stop_extends_systemd_timeout(manager: Manager) -> None:
    with running(manager, stop_timeout_seconds=123):
        assert manager.next() == {"READY": "1"}
    stopping = manager.wait_for("STOPPING")
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) > 123e6


def test_reload_is_notified(manager: Manager) -> None:
    with running(manager) as server:
        assert manager.next() == {"READY": "1"}
        before = time.monotonic_ns() // 1000
        server.request_reload()
        reloading = manager.wait_for("RELOADING")
        assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert manager.wait_for("READY") == {"READY": "1"}


def test_failed_reload_is_notified(manager: Manager, tmp_path: Path) -> None:
    file = tmp_path / "dsmq.toml"
    file.write_text("max_age_seconds = 60")
    with daemon("--config", str(file), env={"NOTIFY_SOCKET": manager.address}) as server:
        file.write_text("max_age_seconds = no")
        server.process.send_signal(signal.SIGHUP)
        manager.wait_for("RELOADING")
        assert manager.wait_for("READY") == {"READY": "1"}
        server.wait_for_line("reload failed: .*dsmq.toml")


@pytest.mark.slow
def test_watchdog_is_reset_only_while_all_threads_respond(manager: Manager) -> None:
    go_on = threading.Event()
    with running(manager, watchdog_seconds=0.3, health_timeout_seconds=UNIT) as server:
        for _ in range(3):
            assert manager.wait_for("WATCHDOG")["WATCHDOG"] == "1"
        loop_of(server).post(go_on.wait)
        wait_until(lambda: bool(server.status.stuck_threads()))
        # Those sent before, and possibly one that was about to be sent.
        manager.socket.settimeout(1.0)
        while manager.receives("WATCHDOG"):
            pass
        manager.socket.settimeout(SOON)
        go_on.set()
        manager.wait_for("WATCHDOG")


def test_watchdog_is_not_reset_if_unset(manager: Manager) -> None:
    with running(manager, float("inf")) as server:
        assert manager.wait_for("STATUS").keys() == {"STATUS"}
        server.request_reload()
        assert manager.wait_for("RELOADING", "WATCHDOG").keys() == {"RELOADING", "MONOTONIC_USEC"}


def test_server_continues_if_systemd_is_gone(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    with running(manager, 0.3) as server:
        manager.wait_for("WATCHDOG")
        os.unlink(manager.address)
        wait_until(lambda: "cannot notify systemd" in caplog.text)
        assert not server.status.stuck_threads()


# Passed sockets


@pytest.mark.parametrize(
    ("process", "seconds"),
    [("", 3 / 3), (str(os.getpid()), 3 / 3), (str(os.getppid()), float("inf"))],
    ids=["any", "this", "parent"],
)
def test_watchdog_of_another_process_is_ignored(process: str, seconds: float) -> None:
    assert systemd.take({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": process}).watchdog_interval == seconds


def test_child_processes_do_not_inherit_passed_sockets() -> None:
    environment = dict.fromkeys(
        ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "OTHER"), "0"
    )
    assert not systemd.take(environment).queue
    assert environment == {"OTHER": "0"}


def test_sockets_for_another_process_are_ignored() -> None:
    assert not systemd.take({"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1"}).queue


def test_passed_sockets_are_used_for_listening(tmp_path: Path) -> None:
    path = str(tmp_path / "queue")
    with (
        listening() as ipv4,
        listening(socket.AF_INET6, ("::1", 0)) as ipv6,
        listening(socket.AF_UNIX, path) as unix,
        listening() as side,
    ):
        # Takes precedence over the settings.
        with launched(
            (ipv4, side, ipv6, unix), "dsmq:metrics:dsmq:dsmq", "--port", "1", "--http-port", "off"
        ) as process:
            port, port6, http_port = (sock.getsockname()[1] for sock in (ipv4, ipv6, side))
            log = lines_until(process, "metrics on")
            assert f"listening on 127.0.0.1:{port}, [::1]:{port6}, unix:{path} " in log
            assert f"metrics on http://127.0.0.1:{http_port}/metrics" in log
            with socket.create_connection(("::1", port6)) as wire6:
                wire6.sendall(b"PING\r\n")
                assert wire6.recv(100) == b"+PONG\r\n"
            for address in (("127.0.0.1", port), path):
                wire = Wire(address)
                assert wire.call("PING") == "PONG"
                wire.close()
            with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/healthz") as page:
                assert page.status == 200
        # In systemd, they stay open for the next server.
        assert os.path.exists(path)
        for family, address in ((socket.AF_INET, ("127.0.0.1", port)), (socket.AF_UNIX, path)):
            with socket.socket(family) as late:
                late.connect(address)


def test_http_endpoint_may_be_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "side")
    with (
        listening() as queue,
        listening(socket.AF_UNIX, path) as side,
        launched((queue, side), "dsmq:metrics", "--log-level", "debug") as process,
    ):
        lines_until(process, f"metrics on http://unix:{path}/")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.0 200")


def test_abstract_unix_socket_is_shown_as_in_systemd() -> None:
    with (
        listening(socket.AF_UNIX, f"\0dsmq-queue-{os.getpid()}") as queue,
        launched((queue,), "dsmq") as process,
    ):
        lines_until(process, f"listening on unix:@dsmq-queue-{os.getpid()} ")


def test_http_endpoint_requires_its_own_passed_socket() -> None:
    with listening() as queue, launched((queue,), "dsmq") as process:
        log = lines_until(process, "tokens:")
        wire = Wire(queue.getsockname())
        assert wire.call("PING") == "PONG"
        wire.close()
        process.terminate()
        assert process.stderr
        assert "metrics on" not in log + process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dsmq.socket", "unknown", ""])
def test_unnamed_passed_socket_is_for_clients(name: str) -> None:
    with listening() as queue, listening() as side, launched((queue, side), f"{name}:metrics") as process:
        lines_until(process, f"listening on 127.0.0.1:{queue.getsockname()[1]} ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            "dsmq.socket:dsmq.socket",
            "sockets named dsmq.socket, dsmq.socket: set FileDescriptorName= of each to dsmq or metrics",
        ),
        ("dsmq:other", "sockets named dsmq, other: set FileDescriptorName= of each"),
        ("", "sockets named unknown, unknown: set FileDescriptorName= of each"),
        ("metrics:metrics", "0 sockets named dsmq and 2 named metrics"),
    ],
)
def test_ambiguous_passed_sockets_are_refused(names: str, complaint: str) -> None:
    with listening() as one, listening() as other:
        assert complaint in failure((one, other), names)


def test_passed_socket_that_does_not_listen_is_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert "the dsmq socket passed by systemd does not listen" in failure((sock,), "dsmq")
    with listening() as queue, socket.create_connection(queue.getsockname()) as connection:
        assert "the dsmq socket passed by systemd does not listen" in failure((connection,), "dsmq")


def test_embedded_server_ignores_passed_sockets(manager: Manager) -> None:
    script = "from dsmq.server import serve; serve(port=0, verbose=True)"
    with listening() as queue:
        numbers = [fcntl.fcntl(queue, fcntl.F_DUPFD, 10)]
        with subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(numbers[0]), "dsmq", "-c", script],
            pass_fds=numbers,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NOTIFY_SOCKET": manager.address},
        ) as process:
            os.close(numbers[0])
            log = lines_until(process, "tokens:")
            process.terminate()
        assert f":{queue.getsockname()[1]} " not in log
    manager.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.next()
