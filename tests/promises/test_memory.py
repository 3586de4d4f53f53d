"""Whatever clients do, the server's memory stays within its limits, and the server continues to serve."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import SOON, Daemon, Wire, daemon, wait_until
from dsmq.client import connect
from dsmq.wire.resp import encode_request

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]

MIB = 1 << 20
STORED, REPLIES, REQUESTS = 40 * MIB, 64 * MIB, 64 * MIB
# For the program, its connections, and the bytes that arrive between two checks of a total.
MARGIN = 200_000_000
BOUND = 1.3 * STORED + REPLIES + REQUESTS + MARGIN
LONGEST = 8 * MIB


@pytest.fixture
def bounded() -> Iterator[Daemon]:
    limits = {"stored": STORED, "total-unread-reply": REPLIES, "total-request": REQUESTS}
    options = [word for name, value in limits.items() for word in (f"--max-{name}-bytes", str(value))]
    with daemon("--max-age-seconds", "3600", *options) as process:
        yield process
        assert peak_bytes(process) < BOUND


def peak_bytes(process: Daemon) -> int:
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def put_something_long(process: Daemon) -> None:
    with connect(port=process.port) as mq:
        mq.put("long", b"x" * (LONGEST - 1))


def opened(stack: ExitStack, process: Daemon, count: int) -> list[socket.socket]:
    """Open connections that do not block."""
    found = []
    for _ in range(count):
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", process.port), SOON))
        sock.setblocking(False)
        found.append(sock)
    return found


def push(socks: list[socket.socket], data: bytes, seconds: float) -> int:
    """Send data on all connections for some time; return how many accepted all of it or were closed."""
    selector = selectors.DefaultSelector()
    for sock in socks:
        selector.register(sock, selectors.EVENT_WRITE, [0])
    until = time.monotonic() + seconds
    while selector.get_map() and time.monotonic() < until:
        for key, _ in selector.select(0.1):
            sent: list[int] = key.data
            try:
                sent[0] += key.fileobj.send(memoryview(data)[sent[0] : sent[0] + MIB])  # type: ignore[union-attr]
            except ConnectionError:
                sent[0] = len(data)
            if sent[0] == len(data):
                selector.unregister(key.fileobj)
    return len(socks) - len(selector.get_map())


def serves(process: Daemon) -> None:
    """Check that short messages are served immediately, and a long one as soon as there is room."""
    with connect(port=process.port, timeout=SOON) as mq:
        mq.put("short", "x")
        assert mq.get("short") == "x"
        mq.put("longer", b"y" * 100_000)
        assert mq.get("longer", raw=True) == b"y" * 100_000


def test_memory_is_bounded_if_many_do_not_read_a_long_message(bounded: Daemon) -> None:
    put_something_long(bounded)
    with ExitStack() as stack:
        for sock in opened(stack, bounded, 120):
            sock.send(encode_request(b"READ", b"long", b"0"))
        serves(bounded)


def test_memory_is_bounded_if_many_waiters_do_not_read_a_long_message(bounded: Daemon) -> None:
    with ExitStack() as stack:
        for sock in opened(stack, bounded, 120):
            sock.send(encode_request(b"READ", b"long", b"0", b"WAIT", b"60000"))
        with connect(port=bounded.port) as mq:
            mq.put("before", "x")
        put_something_long(bounded)
        serves(bounded)


def test_memory_is_bounded_if_echoes_are_not_read(bounded: Daemon) -> None:
    with ExitStack() as stack:
        push(opened(stack, bounded, 60), encode_request(b"ECHO", b"x" * LONGEST), SOON)
        serves(bounded)


def test_memory_is_bounded_with_many_incomplete_messages(bounded: Daemon) -> None:
    with ExitStack() as stack:
        push(opened(stack, bounded, 100), encode_request(b"PUT", b"t", b"x" * LONGEST)[:-1], SOON / 2)
        serves(bounded)


def test_memory_is_bounded_with_requests_after_waits(bounded: Daemon) -> None:
    with ExitStack() as stack:
        request = encode_request(b"GETWAIT", b"t", b"60000") + b"PING\r\n" * 40_000
        push(opened(stack, bounded, 800), request, SOON / 2)
        serves(bounded)


def test_memory_is_bounded_with_many_positions(bounded: Daemon) -> None:
    names = [b"%0500d" % number for number in range(2000)]
    with connect(port=bounded.port) as mq, ExitStack() as stack:
        socks = opened(stack, bounded, 150)
        for sock in socks:
            sock.setblocking(True)
            sock.sendall(b"PING\r\n")
            assert sock.recv(100) == b"+PONG\r\n"
        for name in names:
            mq.put(name.decode(), "x")
        gets = b"".join(encode_request(b"GET", name) for name in names)
        for sock in socks:
            sock.setblocking(False)
        push(socks, gets, SOON)
        serves(bounded)


def test_memory_is_bounded_with_open_transactions(bounded: Daemon) -> None:
    with ExitStack() as stack:
        request = encode_request(b"MULTI") + encode_request(b"PUT", b"t", b"x" * 65_000) * 8
        push(opened(stack, bounded, 1000), request, SOON / 2)
        serves(bounded)


@pytest.mark.parametrize("cut", [1, 300])
def test_message_in_small_pieces_takes_only_its_length(bounded: Daemon, cut: int) -> None:
    wire = Wire(("127.0.0.1", bounded.port))
    wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = encode_request(b"PUT", b"t", b"x" * 200 * cut)
    for at in range(0, len(data), cut):
        wire.send(data[at : at + cut])
    assert wire.receive() == 1
    wire.close()


@pytest.mark.parametrize("size", [MIB // 2, LONGEST - 1])
def test_long_messages_reuse_memory_of_expired_short_ones(size: int) -> None:
    stored, short = 300 * MIB, b"x" * 9_000
    options = ("--max-stored-bytes", str(stored), "--max-age-seconds", "5", "--expiry-interval-seconds", "0.2")
    with daemon(*options) as process, connect(port=process.port) as mq:
        for _ in range(0, stored * 9 // 10, 100 * len(short)):
            mq.put_many("t", [short] * 100)
        wait_until(lambda: mq.topics() == [])
        for _ in range(0, stored * 9 // 10, size):
            mq.put("t", b"y" * size)
        # The last term is for the program and for gaps in the heap.
        assert peak_bytes(process) < 1.3 * stored + 150 * MIB
