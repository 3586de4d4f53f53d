"""The proxy of tests/chaos breaks connections at the given bytes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from chaos.proxy import HOST, Fault, Proxy
from conftest import SOON, UNIT


class Peer:
    """A server that records its input and replies in capitals."""

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.got = b""
        self.end = ""
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # Closed before anybody connected.
        with connection:
            try:
                while data := connection.recv(100):
                    self.got += data
                    connection.sendall(data.upper())
                self.end = "end"
            except ConnectionResetError:
                self.end = "reset"
        self.ended.set()

    def close(self) -> None:
        # Closing it does not wake a thread blocked in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def proxy(peer: Peer) -> Iterator[Proxy]:
    with Proxy(peer.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection((HOST, proxy.port), SOON) as client:
        yield client


def receive(client: socket.socket) -> tuple[bytes, str]:
    """Return all data received and how the connection ended."""
    got = b""
    try:
        while data := client.recv(100):
            got += data
    except ConnectionResetError:
        return got, "reset"
    except TimeoutError:
        return got, "nothing"
    return got, "end"


def test_proxy_forwards_data_and_end(peer: Peer, client: socket.socket) -> None:
    client.sendall(b"abc")
    client.shutdown(socket.SHUT_WR)
    assert receive(client) == (b"ABC", "end")
    assert peer.ended.wait(SOON)
    assert (peer.got, peer.end) == (b"abc", "end")


@pytest.mark.parametrize("offset", range(4))
def test_proxy_resets_at_request_byte(offset: int, peer: Peer) -> None:
    with ExitStack() as stack:
        proxy = Proxy(peer.port)
        proxy.plan = lambda number: [Fault("reset", "request", offset)]
        stack.enter_context(proxy)
        client = stack.enter_context(socket.create_connection((HOST, proxy.port), SOON))
        client.sendall(b"abc")
        assert receive(client)[1] == "reset"
        assert peer.ended.wait(SOON)
        assert peer.got == b"abc"[:offset]
        assert proxy.faults == {"reset": 1}


@pytest.mark.parametrize("offset", range(4))
def test_proxy_resets_at_reply_byte(offset: int, proxy: Proxy, peer: Peer, client: socket.socket) -> None:
    client.sendall(b"x")
    assert client.recv(1) == b"X"
    proxy.strike(Fault("reset", "reply", offset))
    client.sendall(b"abc")
    assert receive(client) == (b"ABC"[:offset], "reset")
    assert peer.ended.wait(SOON)
    assert (peer.got, peer.end) == (b"xabc", "reset")


@pytest.mark.parametrize(("kind", "end"), [("close", "end"), ("end", "end"), ("hole", "nothing")])
def test_proxy_injects_other_faults(kind: str, end: str, proxy: Proxy, peer: Peer, client: socket.socket) -> None:
    client.settimeout(UNIT if kind == "hole" else SOON)
    client.sendall(b"x")
    assert client.recv(1) == b"X"
    proxy.strike(Fault(kind, "reply", 2))  # type: ignore[arg-type]
    client.sendall(b"abc")
    assert receive(client) == (b"AB", end)
    client.close()
    proxy.reset_all()
    assert peer.ended.wait(SOON)
    assert peer.got == b"xabc"


def test_proxy_black_hole_forwards_nothing_until_it_ends(proxy: Proxy, client: socket.socket) -> None:
    proxy.hole(True)
    client.sendall(b"abc")
    client.settimeout(UNIT)
    assert receive(client) == (b"", "nothing")
    client.settimeout(SOON)
    proxy.hole(False)
    assert client.recv(3) == b"ABC"


def test_proxy_delays_data(proxy: Proxy, client: socket.socket) -> None:
    proxy.delay = lambda: 2 * UNIT
    client.sendall(b"abc")
    client.settimeout(UNIT)
    assert receive(client) == (b"", "nothing")
    client.settimeout(SOON)
    assert client.recv(3) == b"ABC"


def test_proxy_refuses_then_accepts_connections(proxy: Proxy, client: socket.socket) -> None:
    # The existing connection continues, even if the proxy had no time for it yet.
    proxy.refuse(True)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, proxy.port), SOON)
    client.sendall(b"abc")
    assert client.recv(3) == b"ABC"
    proxy.refuse(False)
    socket.create_connection((HOST, proxy.port), SOON).close()


def test_proxy_resets_connection_without_server() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        with Proxy(taken.getsockname()[1]) as proxy, socket.socket() as client:
            client.settimeout(SOON)
            assert ends_at_once(client, proxy.port)


def ends_at_once(client: socket.socket, port: int) -> bool:
    try:
        client.connect((HOST, port))
        return client.recv(1) == b"x"
    except ConnectionResetError:
        return True
