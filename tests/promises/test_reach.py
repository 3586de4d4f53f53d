"""How clients reach a server: several addresses per name, starting servers, slow links, other programs."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Self

import pytest

from conftest import (
    CONNECTS,
    SOON,
    UNIT,
    Connect,
    Resolve,
    black_hole,
    blocked,
    daemon,
    no_new_threads,
    refusing_address,
    serving,
    wait_until,
)
from dsmq.client import connect
from dsmq.client import connection as link
from dsmq.client.dial import Race, addresses
from dsmq.errors import ConnectionLost, ProtocolError
from dsmq.server import Server
from dsmq.wire.addresses import Endpoint, parse_endpoint
from dsmq.wire.limits import MAX_READ_BYTES
from security import Files

TLS = pytest.mark.parametrize("tls", [False, True])

# Names with several addresses


def test_address_families_alternate(resolve: Resolve) -> None:
    resolve("name", ("::1", 1), ("::2", 1), ("::3", 1), ("10.0.0.1", 1), ("10.0.0.2", 1))
    found = [address[3][0] for address in addresses(Endpoint("name", 1))]
    assert found == ["::1", "10.0.0.1", "::2", "10.0.0.2", "::3"]


def test_silent_address_does_not_use_up_timeout(server: Server, resolve: Resolve) -> None:
    with black_hole() as hole:
        resolve("name", hole, ("127.0.0.1", server.port))
        before = time.monotonic()
        with connect("name", timeout=SOON, retry=False) as mq:
            mq.ping()
        assert 0.2 < time.monotonic() - before < SOON / 2


def test_refusing_address_is_skipped(server: Server, resolve: Resolve) -> None:
    with refusing_address() as (_, port):
        resolve("name", ("::1", port), ("127.0.0.1", port), ("127.0.0.1", server.port))
        with connect("name", timeout=SOON, retry=False) as mq:
            mq.ping()


@pytest.mark.slow
def test_error_names_reason_per_address(resolve: Resolve) -> None:
    with refusing_address() as (_, port), black_hole() as hole:
        resolve("name", hole, ("127.0.0.1", port))
        before = time.monotonic()
        with pytest.raises(ConnectionRefusedError) as told:
            connect("name", timeout=SOON * 10, retry=False)
        # One address refused, so a server may be starting there: it is tried again soon.
        assert time.monotonic() - before < SOON
        assert "127.0.0.1: Connection refused; 127.0.0.1: timed out" in str(told.value)
        resolve("name", hole)
        with pytest.raises(TimeoutError, match="name:30008 can't be reached: timed out"):
            connect("name", timeout=UNIT, retry=False)


@CONNECTS
def test_refusing_address_counts_even_if_another_uses_up_timeout(connect: Connect, resolve: Resolve) -> None:
    with refusing_address() as refusing, black_hole() as hole:
        resolve("name", refusing, hole)
        with pytest.raises(ConnectionRefusedError, match="no server answers at name"):
            connect("name", timeout=UNIT, retry=False)


def test_starting_server_is_waited_for_at_all_addresses(resolve: Resolve) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    resolve("name", ("::1", port), ("127.0.0.1", port))
    with ExitStack() as stack:
        thread = threading.Timer(UNIT, lambda: stack.enter_context(serving(port=port)))
        thread.start()
        with connect("name", port) as mq:
            mq.ping()
        thread.join(SOON)


@CONNECTS
@pytest.mark.parametrize("swapped", [False, True])
def test_starting_server_is_waited_for_whatever_happens_at_other_servers(
    connect: Connect, retry_schedule: Callable[..., None], swapped: bool
) -> None:
    retry_schedule(4)
    with refusing_address() as (host, port), black_hole() as silent:
        for other in (f"{silent[0]}:{silent[1]}", "name.invalid"):
            servers = [f"{host}:{port}", other]
            with pytest.raises(ConnectionRefusedError, match=r"no server answers at .* \(tried for"):
                connect(servers[::-1] if swapped else servers, timeout=UNIT)


# Proxies and other programs


@contextmanager
def front(*replies: bytes) -> Iterator[tuple[int, list[int]]]:
    """A listener that replies to the first data on each connection and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    accepted: list[int] = []

    def run() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            accepted.append(1)
            with sock:
                if replies:
                    sock.recv(65_536)
                    sock.sendall(replies[min(len(accepted), len(replies)) - 1])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1], accepted
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SOON)
        listener.close()


@pytest.mark.parametrize("replies", [(), (b"",)])
def test_proxy_that_closes_at_once_counts_as_starting(
    retry_schedule: Callable[..., None], replies: tuple[bytes, ...]
) -> None:
    retry_schedule(4)
    with (
        front(*replies) as (port, accepted),
        pytest.raises(ConnectionResetError, match=r"closes them immediately.*tried for") as told,
    ):
        connect(port=port)
    # In each attempt, the second connection asks whether it is an MQTT broker. The first retry is immediate; whether
    # there is time for others depends on the machine.
    assert len(accepted) >= 4
    assert "does it require TLS?" in str(told.value)


@CONNECTS
@TLS
@pytest.mark.parametrize("replies", [(), (b"",)])
def test_proxy_is_retried_until_server_answers(
    connect: Connect, files: Files, tls: bool, replies: tuple[bytes, ...]
) -> None:
    security, options = ({"tls_cert_file": files.server}, {"ca_file": files.ca}) if tls else ({}, {})
    with ThreadPoolExecutor(1) as pool:
        with front(*replies) as (port, accepted):
            connecting = pool.submit(connect, port=port, **options)
            wait_until(lambda: len(accepted) > 4)
        with serving(port=port, **security):
            mq = connecting.result(SOON)
            if mq is not None:
                mq.close()


@CONNECTS
@TLS
@pytest.mark.parametrize("replies", [(), (b"",)])
def test_address_behind_which_no_server_answers_is_tried_last(
    connect: Connect, resolve: Resolve, files: Files, tls: bool, replies: tuple[bytes, ...]
) -> None:
    security, options = ({"tls_cert_file": files.server}, {"ca_file": files.ca}) if tls else ({}, {})
    with serving(**security) as server, front(*replies) as (port, accepted):
        resolve("localhost", ("127.0.0.1", port), ("127.0.0.1", server.port))
        connect("localhost", timeout=SOON, **options)
        # One connection for HELLO, and without TLS one to ask whether it is an MQTT broker.
        assert len(accepted) == (1 if tls else 2)


@CONNECTS
def test_silent_tls_proxy_is_named_by_address(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TimeoutError, match=f"^127.0.0.1:{port}: no reply within {UNIT:g} s"):
            connect(port=port, tls=True, timeout=UNIT, retry=False)


# Unix sockets


@contextmanager
def full_queue(path: Path) -> Iterator[socket.socket]:
    """A listening Unix socket whose queue is full."""
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        code = 0
        while not code:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            code = sock.connect_ex(str(path))
        yield listener


@CONNECTS
def test_unix_socket_with_full_queue_times_out(connect: Connect, tmp_path: Path) -> None:
    with full_queue(tmp_path / "socket"), pytest.raises(TimeoutError, match="socket can't be reached: timed out"):
        connect(f"unix:{tmp_path}/socket", timeout=UNIT)


def test_unix_socket_with_full_queue_is_retried_until_there_is_room(tmp_path: Path) -> None:
    endpoint = parse_endpoint(f"unix:{tmp_path}/socket", 0)
    with full_queue(tmp_path / "socket") as listener, Race(endpoint, addresses(endpoint)) as race:
        attempts = race.run(SOON)
        next(attempts)
        listener.accept()[0].close()
        for seconds in attempts:
            race.selector.select(seconds)
        race.winner.close()


@CONNECTS
@pytest.mark.parametrize(
    ("reply", "name"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n", " but an HTTP server"),
        (b"<!DOCTYPE HTML>\r\n", " but an HTTP server"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", " but an SSH server"),
        (b"INFO {}\r\n", " but a NATS server"),
        (b"-ERR unknown command 'HELLO'\r\n", " but Redis or a compatible server"),
        (b"-NOAUTH HELLO must be called with the client already authenticated, otherwise ...\r\n", " but Redis"),
        (b"*2\r\n$6\r\nserver\r\n$6\r\nvalkey\r\n", " but valkey"),
        (b"Good morning\r\n", ""),
        # Without the end of a line.
        (b"AMQP\x00\x00\x09\x01", " but an AMQP server"),
        (b"\x4a\x00\x00\x00\x098.0.36", ""),
    ],
)
def test_other_program_is_named_and_quoted_at_once(connect: Connect, reply: bytes, name: str) -> None:
    with front(reply) as (port, accepted), pytest.raises(ProtocolError) as told:
        connect(port=port)
    first_line = reply.partition(b"\r")[0].decode()
    assert f"127.0.0.1:{port} is not a dsmq server{name}" in str(told.value)
    assert f"(it answered {first_line!r})" in str(told.value)
    assert len(accepted) == 1


@CONNECTS
def test_silent_program_is_named_by_address(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TimeoutError, match=f"^127.0.0.1:{port}: no reply within {UNIT:g} s"):
            connect(port=port, timeout=UNIT, retry=False)


@CONNECTS
def test_closing_broker_is_probed_in_its_own_protocol(connect: Connect) -> None:
    # mosquitto closes connections that don't begin with CONNECT.
    with front(b"", b"\x20\x02\x00\x00") as (port, _), pytest.raises(ProtocolError, match="MQTT broker"):
        connect(port=port)


def test_tls_server_is_recognised_at_once() -> None:
    with (
        front(b"\x15\x03\x03\x00\x02\x02\x46") as (port, accepted),
        pytest.raises(ConnectionError, match="require TLS"),
    ):
        connect(port=port)
    assert len(accepted) == 1


def test_http_endpoint_and_redis_are_named_in_error(tmp_path: Path) -> None:
    with daemon() as server, pytest.raises(ProtocolError, match="but dsmq's HTTP endpoint"):
        connect(port=server.http_port)
    if (redis := shutil.which("redis-server")) is None:
        pytest.skip("redis-server is not installed")
    path = tmp_path / "socket"
    process = subprocess.Popen(
        [redis, "--port", "0", "--unixsocket", str(path), "--save", ""], stdout=subprocess.DEVNULL
    )
    try:
        wait_until(path.exists)
        for _ in range(2):
            with pytest.raises(ProtocolError, match="not a dsmq server but Redis"):
                connect(f"unix:{path}")
            subprocess.run(["redis-cli", "-s", str(path), "CONFIG", "SET", "requirepass", "x"], check=True)
    finally:
        process.terminate()
        process.wait(SOON)


# Slow links


class Slow:
    """A proxy that forwards a limited number of bytes per second each way."""

    def __init__(self, port: int, rate: int) -> None:
        self._port, self._rate = port, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = []
        self.bytes = 0

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in list(self._sockets):
            sock.close()
        for thread in self._threads:
            thread.join(SOON)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += here, there
            for source, sink in ((here, there), (there, here)):
                self._threads.append(threading.Thread(target=self._pass, args=(source, sink)))
                self._threads[-1].start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        piece = max(1, self._rate // 20)
        try:
            while data := source.recv(piece):
                sink.sendall(data)
                self.bytes += len(data)
                time.sleep(len(data) / self._rate)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


@pytest.mark.slow
def test_reading_continues_at_5_kb_per_second(server: Server) -> None:
    with (
        Slow(server.port, 5000) as slow,
        connect(port=server.port) as writer,
        connect(port=slow.port, timeout=25 * UNIT, reconnect_timeout=0) as mq,
    ):
        # One reply takes longer than the timeout.
        writer.put_many("t", ["x" * 1000] * 20)
        assert mq.get_many("t", 20) == ["x" * 1000] * 20


@pytest.mark.slow
def test_message_slower_than_timeout_round_trips(server: Server) -> None:
    message = "x" * 2_000_000
    with Slow(server.port, 600_000) as slow, connect(port=slow.port, timeout=20 * UNIT, reconnect_timeout=0) as mq:
        mq.put("t", message)
        assert mq.get("t") == message


def test_timeout_restarts_while_server_receives_more_of_a_message(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsent = itertools.count(10**9, -1)
    with connect(port=server.port, timeout=UNIT, reconnect_timeout=0) as mq, blocked(server) as release:

        def progress(_: int) -> int:
            left = next(unsent)
            if left == 10**9 - 5:
                release.set()
            return left

        monkeypatch.setattr(link, "unsent_bytes", progress)
        mq.put("t", "x" * 2 * link.LONG_BYTES)
    assert next(unsent) <= 10**9 - 5


def test_timeout_does_not_restart_while_server_receives_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "unsent_bytes", lambda _: 1000)
    mq = connect(port=server.port, timeout=UNIT, reconnect_timeout=0)
    with mq, blocked(server), pytest.raises(ConnectionLost, match="no reply within"):
        mq.put("t", "x" * 2 * link.LONG_BYTES)


def test_read_size_shrinks_after_timeout(server: Server) -> None:
    with connect(port=server.port, timeout=10 * UNIT) as mq, ThreadPoolExecutor(1) as pool:
        mq.put_many("t", ["x" * 3000] * 50)
        with blocked(server):
            first = pool.submit(mq.get, "t")
            wait_until(lambda: mq._session.read_bytes < MAX_READ_BYTES)
        assert first.result(SOON) == "x" * 3000
        assert mq._session.read_bytes == 65_536 + 4096
        assert mq.get_many("t", 49) == ["x" * 3000] * 49
        assert mq._session.read_bytes > 65_536 + 4096


def test_silent_server_times_out_for_every_call() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = link.Connection(Endpoint("127.0.0.1", listener.getsockname()[1]), None, UNIT)
        before = time.monotonic()
        one.send(b"x" * 16_384)
        with pytest.raises(TimeoutError):
            one.receive()
        # 16 KiB are allowed to take a second.
        assert 1.0 + UNIT <= time.monotonic() - before < SOON
        one.close()


# Error messages


@CONNECTS
@pytest.mark.parametrize("host", ["no.such.invalid", "é" * 60])
def test_unresolvable_host_is_named_in_error(connect: Connect, host: str) -> None:
    with pytest.raises(socket.gaierror, match=f"cannot resolve '{host}': .") as told:
        connect(host)
    assert told.value.errno == socket.EAI_NONAME


@CONNECTS
def test_connection_error_reports_how_long_it_tried(connect: Connect, retry_schedule: Callable[..., None]) -> None:
    retry_schedule(4)
    with refusing_address() as (_, port):
        with pytest.raises(ConnectionRefusedError) as told:
            connect(port=port)
        assert told.value.errno == errno.ECONNREFUSED
        found = re.search(rf"no server answers at 127.0.0.1:{port} \(tried for (.*) s\)$", str(told.value))
        assert found
        assert float(found[1]) >= 0.1
        with pytest.raises(ConnectionRefusedError, match=f":{port}$"):
            connect(port=port, retry=False)


# Processes


# In a separate process with a single thread: after a fork without Python's hooks, a child inherits any locks that other
# threads held.
CHILDREN = """
import ctypes, os, sys
from dsmq.client import connect
fork = os.fork if sys.argv[2] == "os.fork" else ctypes.PyDLL(None).fork
with connect(port=int(sys.argv[1])) as mq, connect(port=int(sys.argv[1])) as writer:
    writer.put_many("t", ["1", "2", "3"])
    assert mq.get("t") == "1"
    messages = mq.messages("t", timeout=30, text=True)
    reading, writing = os.pipe()
    children = []
    for number in range(4):
        child = fork()
        if child == 0:
            status = 1
            try:
                got = [next(messages), mq.get("t"), mq.get("t", default="none")]
                ids = mq.put_many("u", [f"{number} {count}" for count in range(200)])
                got.append(str(len(set(ids))))
                mq.close()
                os.write(writing, (" ".join(got) + "\\n").encode())
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    # The parent keeps using its connection.
    for count in range(200):
        mq.put("u", f"parent {count}")
        assert mq.get("u")
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 1000).decode().splitlines() == ["2 3 none 200"] * 4
    assert [next(messages), mq.get("t"), mq.get("t")] == ["2", "3", ""]
"""


@pytest.mark.parametrize("fork", ["os.fork", "without hooks"])
def test_forked_child_is_a_separate_client(server: Server, fork: str) -> None:
    subprocess.run([sys.executable, "-c", CHILDREN, str(server.port), fork], timeout=2 * SOON, check=True)
    assert server.status.totals().stored == 3 + 5 * 200


FORK_IN_PUT_MANY = """
import ctypes, os, sys
from dsmq.client import connect
child = -1
def messages():
    global child
    for number in range(1200):
        if number == 600:
            child = ctypes.PyDLL(None).fork()
        yield f"{child == 0} {number}"
with connect(port=int(sys.argv[1])) as mq:
    status = 1
    try:
        ids = mq.put_many("t", messages())
        status = 0
    finally:
        if child == 0:
            os._exit(0 if not status and len(set(ids)) == 1200 else 1)
    assert len(set(ids)) == 1200
    assert os.waitpid(child, 0)[1] == 0
"""


def test_child_forked_during_call_leaves_reply_to_parent(server: Server) -> None:
    script = f"""
import ctypes, os, signal, time
from dsmq.client import connect
child = -1
def fork(*_):
    global child
    child = ctypes.PyDLL(None).fork()
    if child:
        # The child would be first to see the reply.
        time.sleep({10 * UNIT})
signal.signal(signal.SIGALRM, fork)
states = []
with connect(port={server.port}, on_state_change=states.append) as mq, connect(port={server.port}) as writer:
    # Uses a kernel timer, because a fork without hooks requires a process with a single thread.
    signal.setitimer(signal.ITIMER_REAL, {3 * UNIT})
    if os.fork() == 0:
        time.sleep({8 * UNIT})
        writer.put("t", "x")
        os._exit(0)
    got = mq.get_wait("t", timeout={SOON})
    if child == 0:
        os._exit(got != "x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print(got, states)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=3 * SOON, check=False)
    assert done.stdout == "x []\n", done.stderr


@contextmanager
def running(script: str) -> Iterator[tuple[IO[str], IO[str]]]:
    """A program and its forked children, with their input and output."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            yield process.stdin, process.stdout
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_call_continues_in_child_forked_by_signal_handler_that_used_client(server: Server, fork: str) -> None:
    """The child must not wait on a descriptor that now belongs to another connection."""
    script = f"""
import ctypes, os, signal
from dsmq.client import connect
child = -1
def handle(*_):
    global child
    child = {fork}()
    if child == 0:
        mq.put("u", "from the child")
signal.signal(signal.SIGALRM, handle)
with connect(port={server.port}, timeout={10 * SOON}) as mq:
    signal.setitimer(signal.ITIMER_REAL, {3 * UNIT})
    got = mq.get_wait("t", timeout={10 * SOON})
    if child == 0:
        os._exit(got != "x")
    print(got, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    with running(script) as (_, output), connect(port=server.port) as writer:
        wait_until(lambda: server.status.totals().stored == 1)
        # Parent and child each wait for it.
        wait_until(lambda: server.status.waiting() == 2)
        writer.put("t", "x")
        assert output.readline() == "x 0\n"


def test_child_forked_during_send_leaves_connection_to_parent(server: Server) -> None:
    script = f"""
import contextlib, ctypes, fcntl, os, signal, sys, termios
from dsmq.client import connect
child = -1
def is_sending():
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if any(fcntl.ioctl(int(name), termios.TIOCOUTQ, bytes(4))):
                return True
def handle(*_):
    global child
    if not is_sending():
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    child = ctypes.PyDLL(None).fork()
    if child:
        print("forked", flush=True)
signal.signal(signal.SIGALRM, handle)
with connect(port={server.port}, timeout={SOON}) as mq:
    print("connected", flush=True)
    sys.stdin.readline()
    signal.setitimer(signal.ITIMER_REAL, {UNIT}, {UNIT})
    stored = mq.put("t", "x" * 8_000_000)
    if child == 0:
        os._exit(stored != 1)
    print(stored, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    with connect(port=server.port) as mq, running(script) as (begin, output):
        assert output.readline() == "connected\n"
        with blocked(server):
            begin.write("\n")
            begin.flush()
            assert output.readline() == "forked\n"
        assert output.readline() == "1 0\n"
        assert len(mq.get("t")) == 8_000_000
    assert server.status.totals().stored == 1


def test_fork_during_put_many_does_not_use_parent_connection(server: Server) -> None:
    with connect(port=server.port) as mq:
        subprocess.run([sys.executable, "-c", FORK_IN_PUT_MANY, str(server.port)], timeout=2 * SOON, check=True)
        got = mq.get_many("t", 3000)
    # Messages sent before the fork are stored once; those prepared but not sent are put by both.
    twice = [one for one, count in Counter(got).items() if count == 2]
    assert twice == [f"False {number}" for number in range(500, 600)]
    assert len(got) == 1200 + 600 + 100


# Other systems


def test_client_runs_without_unix_only_modules(server: Server) -> None:
    """Names that Windows or macOS lack are deleted before the import."""
    script = f"""
import os, select, socket, sys, time
for name in [name for name in dir(time) if name.startswith("CLOCK_")] + ["clock_gettime"]:
    delattr(time, name)
unix = (socket, ["AF_UNIX"]), (os, ["register_at_fork", "fork", "sched_yield"]), (select, ["poll", "epoll"])
for module, names in unix:
    for name in names:
        delattr(module, name)
for name in ("fcntl", "resource", "pwd", "grp", "mmap", "termios"):
    sys.modules[name] = None
from dsmq.client import connect
with connect(port={server.port}) as mq:
    mq.put_many("t", ["1", "2"])
    assert mq.get("t") == "1" and mq.get_wait("t") == "2" and mq.get_latest("t") == ""
    assert mq.position("t").endswith(":2")
    mq.seek("t", 0)
    assert len(mq.read("t", 5)) == 2
import dsmq.aio
try:
    connect("unix:/tmp/x", retry=False)
except OSError as error:
    assert "no Unix sockets" in str(error), error
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=SOON * 3, check=False)
    assert done.returncode == 0, done.stderr


# Resources of a client


def test_all_but_one_idle_connection_of_a_burst_are_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmq.client.pool.IDLE_SECONDS", 3 * UNIT)
    with connect(port=server.port) as mq:
        for _ in range(2):
            threads = [threading.Thread(target=mq.get_wait, args=("t",), kwargs={"timeout": SOON}) for _ in range(20)]
            for thread in threads:
                thread.start()
            wait_until(lambda: server.status.waiting() == 20)
            mq.put_many("t", ["x"] * 20)
            for thread in threads:
                thread.join(SOON)
            # No call is made in the meantime.
            wait_until(lambda: server.status.connections() == 1)


def test_call_succeeds_if_no_thread_can_start(server: Server) -> None:
    with connect(port=server.port) as mq, no_new_threads():
        # While one connection is in use, a second one is opened.
        assert len(mq.put_many("t", (str(mq.put("u", "x")) for _ in range(3)))) == 3
        assert mq.get_many("u") == ["x"] * 3
        wait_until(lambda: server.status.connections() == 1)


@pytest.mark.slow
def test_reply_topics_use_little_client_memory(server: Server) -> None:
    script = f"""
import tracemalloc
from dsmq.client import connect
with connect(port={server.port}) as mq:
    tracemalloc.start()
    for number in range(20_000):
        topic = f"reply {{number}}"
        if number % 2:
            mq.get(topic)
        else:
            mq.put(topic, "x")
            assert mq.get(topic) == "x"
    print(tracemalloc.get_traced_memory()[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=SOON * 9, check=True)
    assert int(done.stdout) < 10_000 * 700 + 500_000


def test_idle_reply_topics_are_forgotten() -> None:
    with serving(max_age_seconds=UNIT) as server, connect(port=server.port) as mq:
        mq.put("first", "x")
        assert mq.get("first") == "x"
        read = mq.position("first")
        until, number = time.monotonic() + SOON, 0
        while time.monotonic() < until and mq.position("first") == read:
            number += 1
            mq.put(f"reply {number}", "x")
            assert mq.get(f"reply {number}", default=None) in ("x", None)
        assert mq.position("first") != read
        assert mq.missed == 0


def test_connection_lost_names_server(server: Server) -> None:
    with connect(port=server.port, reconnect_timeout=0) as mq:
        server.stop()
        with pytest.raises(ConnectionLost):
            mq.ping()
