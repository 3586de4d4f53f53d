"""Listening, accepting, and forked processes."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from conftest import SOON, UNIT, Resolve, Wire, loop_of, serving, wait_until, wire_to
from dsmq.broker import listener
from dsmq.broker.listener import Listener
from dsmq.client import connect
from dsmq.errors import StartupError
from dsmq.server import Server
from helpers import forked, open_sockets

# Names with several addresses


def test_host_name_listens_on_each_usable_address(resolve: Resolve) -> None:
    # The first is not an address of this machine, as ::1 would not be without IPv6.
    resolve("several", "192.0.2.1", "127.0.0.1", "127.0.0.2")
    with serving(host="several", http_host="several", http_port=0) as server:
        assert server.addresses == [f"127.0.0.1:{server.port}", f"127.0.0.2:{server.port}"]
        for host in ("127.0.0.1", "127.0.0.2"):
            with connect(host, server.port) as mq:
                mq.put("t", host)
            with urllib.request.urlopen(f"http://{host}:{server.http_port}/healthz") as answer:
                assert answer.status == 200


def test_host_name_without_usable_address_does_not_start(resolve: Resolve) -> None:
    resolve("several", "192.0.2.1", "198.51.100.1")
    with pytest.raises(StartupError, match=r"several:0: .*assign"), serving(host="several"):
        pass


def test_port_in_use_on_one_address_does_not_start(resolve: Resolve) -> None:
    resolve("several", "127.0.0.1", "127.0.0.2")
    with serving(host="127.0.0.2") as other:
        with pytest.raises(StartupError, match="in use"), serving(host="several", port=other.port):
            pass
        with serving(host="127.0.0.1", port=other.port):
            pass


Refuse = Callable[[Callable[..., int]], None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """A function that makes listening fail with the error number that a given function returns for an address."""

    def refuse(find_error: Callable[..., int]) -> None:
        real = socket.create_server

        def create_server(address: tuple[str, int], *, family: int, **options: int) -> socket.socket:
            if error := find_error(family, *address):
                raise OSError(error, os.strerror(error))
            return real(address, family=family, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "create_server", create_server)

    return refuse


def test_machine_without_ipv6_listens_on_ipv4(resolve: Resolve, refuse: Refuse) -> None:
    resolve("localhost", "::1", "127.0.0.1")
    refuse(lambda family, *_: errno.EAFNOSUPPORT if family == socket.AF_INET6 else 0)
    with serving(host="localhost", http_host="localhost", http_port=0) as server:
        assert server.addresses == [f"127.0.0.1:{server.port}"]


def test_chosen_port_is_the_same_on_all_addresses(resolve: Resolve, refuse: Refuse) -> None:
    resolve("several", "127.0.0.1", "127.0.0.2")
    taken: list[int] = []

    def find_error(_: int, host: str, port: int) -> int:
        if host != "127.0.0.2" or len(taken) == 3:
            return 0
        taken.append(port)
        return errno.EADDRINUSE

    refuse(find_error)
    with serving(host="several") as server:
        assert server.addresses == [f"127.0.0.1:{server.port}", f"127.0.0.2:{server.port}"]
    assert len(taken) == 3


def test_port_in_use_error_names_the_setting(server: Server) -> None:
    with pytest.raises(StartupError, match=r"in use.*--http-port"), serving(http_port=server.port):
        pass
    with pytest.raises(StartupError, match=r"in use.*--port"), serving(port=server.port):
        pass


def test_unix_socket_is_removed_before_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Afterwards, another server may have put its own socket there.
    was_open: list[bool] = []
    [sock] = listener.listen(f"unix:{tmp_path}/socket", 0, 1)
    monkeypatch.setattr(os, "unlink", lambda _: was_open.append(sock.fileno() >= 0))
    listener.close(sock)
    assert was_open == [True]
    assert sock.fileno() < 0


# Accepting


def test_connections_use_nodelay_and_keepalive() -> None:
    accepted: list[socket.socket] = []
    [sock] = listener.listen("127.0.0.1", 0, 1)
    listening = Listener(sock, lambda sock, *_: accepted.append(sock))
    with sock, socket.create_connection(sock.getsockname()):
        wait_until(lambda: bool((listening.on_ready(0), accepted)[1]))
    with accepted[0] as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 15
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 4
        assert connection.getsockopt(socket.IPPROTO_TCP, 25) == 32_768, "TCP_NOTSENT_LOWAT"


class Exhausted(socket.socket):
    """A listening socket of a process without file descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 0
        self.exhausted = True

    def accept(self) -> tuple[socket.socket, object]:
        self.attempts += 1
        if self.exhausted:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_accept_pauses_without_file_descriptors_and_resumes(server: Server) -> None:
    loop, accepted = loop_of(server), threading.Event()
    with Exhausted() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        listening = Listener(sock, lambda sock, *_: (sock.close(), accepted.set())[1])
        loop.post(lambda: loop.listen([listening]))
        with socket.create_connection(sock.getsockname()):
            wait_until(lambda: sock.attempts >= 2)
            assert sock.attempts < 20
            sock.exhausted = False
            assert accepted.wait(SOON)
        loop.post(listening.stop_accepting)
        assert server.stop() == []


# Forked processes


@contextmanager
def forked_without_hooks() -> Iterator[None]:
    """Fork a child process as a C library does, until the end of the block.

    The child runs no Python, because other threads may have held locks of the interpreter.
    """
    libc = ctypes.PyDLL(None)
    # No other thread may be waiting for the GIL, because it would request the GIL in the child.
    time.sleep(UNIT / 20)
    child = libc.fork()
    if not child:
        libc.pause()
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("fork", [forked, forked_without_hooks])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_stop_closes_listener_despite_forked_child(
    tmp_path: Path, kind: str, fork: Callable[[], AbstractContextManager[object]]
) -> None:
    host = "127.0.0.1" if kind == "tcp" else f"unix:{tmp_path}/socket"
    with serving(host=host, http_port=0) as server:
        port, http_port = server.port if kind == "tcp" else 0, server.http_port
        address = ("127.0.0.1", port) if kind == "tcp" else f"{tmp_path}/socket"
        wire = Wire(address)
        assert wire.call("PING") == "PONG"
        with fork():
            server.stop()
            with socket.socket(socket.AF_INET if port else socket.AF_UNIX) as late:
                assert late.connect_ex(address) in (errno.ECONNREFUSED, errno.ENOENT)
            # Read to the end of the stream: a copy in the child would keep it open.
            with closing(wire):
                while wire.socket.recv(65536):
                    pass
            with serving(host=host, port=port, http_port=http_port), closing(Wire(address)) as again:
                assert again.call("PING") == "PONG"


def test_closed_connection_ends_despite_forked_child(server: Server, wire: Wire) -> None:
    wire.call("PING")
    (connection,) = loop_of(server).connections
    with forked_without_hooks():
        loop_of(server).post(lambda: connection.close("for the test"))
        assert wire.ended()


@pytest.mark.embedded("snapshots")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_holds_no_server_sockets(tmp_path: Path) -> None:
    before = open_sockets()
    with serving(http_port=0, snapshot_file=str(tmp_path / "it")) as server, wire_to(server) as wire:
        assert wire.call("PING") == "PONG"
        client_side = os.readlink(f"/proc/self/fd/{wire.socket.fileno()}")
        with forked(lambda: sorted(open_sockets() - before)) as left:
            assert left == str([client_side])
        assert wire.call("PING") == "PONG"


@pytest.mark.embedded("snapshots")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_leaving_with_block_does_not_stop_server(tmp_path: Path) -> None:
    file, path = tmp_path / "snapshot", tmp_path / "socket"
    with serving(host=f"unix:{path}", snapshot_file=str(file)) as server:
        wire = Wire(str(path))
        wire.call("PUT", "t", "x")
        with forked(lambda: server.__exit__(None, None, None)) as result:
            assert result == "None"
        assert path.exists()
        assert not file.exists()
        with pytest.raises(StartupError, match="another server"), serving(snapshot_file=str(file)):
            pass
        assert wire.call("READ", "t", 0)[3] == b"x"
        wire.close()
