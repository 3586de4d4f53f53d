"""Malformed input on real sockets closes at most its own connection and leaks no memory."""

from __future__ import annotations

import random
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Daemon, Wire, daemon, serving, wire_to
from dsmq.server import Server
from dsmq.wire.resp import encode_request

FRAMING_ERRORS = {
    "count of 2147483647": b"*2147483647\r\n",
    "count of 2**63": b"*9223372036854775808\r\n",
    "negative count": b"*-1\r\n",
    "no arguments": b"*0\r\n",
    "65 arguments": b"*65\r\n$4\r\nPING\r\n",
    "1,065 arguments": b"*1065\r\n",
    "length of 2147483647": b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$2147483647\r\n",
    "negative length": b"*2\r\n$3\r\nGET\r\n$-1\r\n",
    "length with a sign": b"*2\r\n$3\r\nGET\r\n$+1\r\nt\r\n",
    "length with leading zeros": b"*1\r\n$0004\r\nPING\r\n",
    "length in words": b"*1\r\n$four\r\nPING\r\n",
    "length line without end": b"*1\r\n$" + b"1" * 100,
    "bulk longer than its length": b"*1\r\n$4\r\nPINGPONG\r\n",
    "no bulk in an array": b"*1\r\n:4\r\n",
    "nested array": b"*1\r\n*1\r\n$4\r\nPING\r\n",
    "line feed alone in a frame": b"*1\n$4\nPING\n" + b"x" * 20,
    "unbalanced quotes": b'PUT t "hello\r\n',
    "text behind a quote": b'PUT t "hello"you\r\n',
    "control characters": b"PUT t \x00\x01\r\n",
    "a line without end": b"PUT t " + b"x" * 70_000,
    "HTTP GET": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP POST": b"POST /t HTTP/1.1\r\nContent-Length: 9\r\n\r\nPUT t x\r\n",
    "TLS hello": bytes.fromhex("16030100c8010000c40303") + bytes(100),
    "SSH": b"\x00\x00\x01\x2c\x05\x14",
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "binary noise": random.Random(1).randbytes(1000),
}


@pytest.mark.parametrize("name", FRAMING_ERRORS)
def test_framing_error_gets_one_reply_then_close(server: Server, wire: Wire, name: str) -> None:
    with wire_to(server) as bad:
        bad.send(FRAMING_ERRORS[name])
        assert bad.receive().code in ("PROTOCOL", "TOOBIG")  # type: ignore[union-attr]
        assert bad.ended()
    assert wire.call("PING") == "PONG"
    assert wire.call("TOPICS") == []


def test_requests_before_framing_error_are_answered(wire: Wire) -> None:
    wire.send(encode_request(b"PUT", b"t", b"x") + b"*-1\r\n" + encode_request(b"PUT", b"t", b"y"))
    assert wire.receive() == 1
    assert wire.receive().code == "PROTOCOL"  # type: ignore[union-attr]
    assert wire.ended()


@given(noise=st.binary(max_size=300))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_do_not_harm_server(server: Server, noise: bytes) -> None:
    with wire_to(server) as bad:
        bad.send(noise)
        bad.socket.shutdown(socket.SHUT_WR)
        while bad.socket.recv(65536):
            pass
    assert server.status.counters().failures == 0


def test_reset_during_request_affects_no_one(server: Server, wire: Wire) -> None:
    request = encode_request(b"PUT", b"t", b"x" * 100)
    for cut in range(0, len(request), 7):
        with wire_to(server) as bad:
            bad.send(request[:cut])
            # With SO_LINGER and time 0, closing resets the connection.
            bad.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert wire.call("PING") == "PONG"
    assert server.status.counters().failures == 0


def test_stalled_request_times_out() -> None:
    with serving(request_timeout_seconds=0.2) as server, wire_to(server) as half, wire_to(server) as good:
        half.send(b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$5\r\nhel")
        assert half.receive().code == "TIMEOUT"  # type: ignore[union-attr]
        assert half.ended()
        assert good.call("READ", "t", 0) == []


def resident_kib(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_released_after_attacks() -> None:
    with daemon() as process:
        wire = Wire(("127.0.0.1", process.port))
        wire.call("PUT", "t", "x")
        before = resident_kib(process)
        for _ in range(20):
            for attack in FRAMING_ERRORS.values():
                bad = Wire(("127.0.0.1", process.port))
                bad.send(attack)
                bad.receive()
                bad.close()
        # 14 messages of 100 MB each, which the server refuses to buffer.
        for _ in range(14):
            bad = Wire(("127.0.0.1", process.port))
            try:
                bad.send(b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$100000000\r\n")
                for _ in range(100):
                    bad.send(bytes(1_000_000))
            except (BrokenPipeError, ConnectionResetError):
                pass  # The server has closed the connection, as it should.
            bad.close()
        assert wire.call("PING") == "PONG"
        assert resident_kib(process) - before < 10_000
        wire.close()
