"""Limits on the memory that requests and replies take, and on slow clients."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from limiting import patient, wait_for_connections

from conftest import SOON, UNIT, Wire, daemon, loop_of, serving, wait_for_stored, wait_until, wire_to
from dsmq.broker import event_loop as worker
from dsmq.broker.connection import Connection
from dsmq.broker.transport import MAX_HELD_BYTES
from dsmq.broker.usage import FREE_BYTES, RECEIVE_BYTES, Budget
from dsmq.errors import ReplyError
from dsmq.server import Server
from dsmq.wire.resp import encode_request

# Fixtures.
__all__ = ["patient"]


# Totals over all event loops


def test_waiting_readers_are_bounded_across_all_workers() -> None:
    with serving(io_threads=4, max_waiting_readers=8) as server, ExitStack() as stack:
        waiting = [stack.enter_context(wire_to(server)) for _ in range(8)]
        for wire in waiting:
            wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.status.waiting() == 8)
        late = [stack.enter_context(wire_to(server)) for _ in range(4)]
        assert [wire.error("GETWAIT", "t", 60_000) for wire in late] == ["BUSY"] * 4
        assert late[0].call("PUT", "t", "x") == 1
        assert [wire.receive() for wire in waiting] == [b"x"] * 8
        wait_until(lambda: server.status.waiting() == 0)


def test_unauthenticated_connections_are_bounded_across_all_workers() -> None:
    limits = {"auth_token": "x" * 20, "max_unauthenticated_connections": 8}
    with serving(io_threads=4, **limits) as server, ExitStack() as stack:
        wires = [stack.enter_context(wire_to(server)) for _ in range(8)]
        assert [wire.call("PING") for wire in wires] == ["PONG"] * 8
        late = stack.enter_context(wire_to(server))
        assert late.call("PING") == "PONG"
        # Only the oldest was disconnected.
        wait_until(lambda: server.status.connections() == 8)
        assert [wire.call("PING") for wire in wires[1:]] == ["PONG"] * 7
        with contextlib.suppress(EOFError, ConnectionError):
            assert isinstance(wires[0].receive(), ReplyError)
        assert wires[0].ended()


# Replies


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pipeline_written_before_reading_runs_once() -> None:
    count = 1_000_000
    # On a slow machine, sending takes longer than the default timeouts.
    with daemon("--reply-timeout-seconds", "3600", "--request-timeout-seconds", "3600") as process:
        wire = Wire(("127.0.0.1", process.port))
        wire.socket.settimeout(20 * SOON)
        # No reply is read before everything has been sent.
        for _ in range(100):
            wire.send(encode_request(b"PUT", b"t", b"x") * (count // 100))
        for expected in range(1, count + 1):
            assert wire.receive() == expected
        assert wire.call("STATS", "t")[1] == count  # type: ignore[index]
        wire.close()


def test_reading_resumes_when_replies_drop_below_limit() -> None:
    with serving(max_unread_reply_bytes=1_000_000) as server, wire_to(server) as wire:
        (served,) = wait_for_connections(server, 1)
        wire.send(encode_request(b"PUT", b"t", b"x" * 100_000))
        assert wire.receive() == 1
        wire.send(encode_request(b"READ", b"t", b"0") * 1000)
        wait_until(lambda: len(served.transport.data) >= 1_000_000 and served.transport.unread_since < math.inf)
        run = server.status.counters().commands["READ"]
        while server.status.counters().commands["READ"] == run:
            assert len(wire.receive()[3]) == 100_000  # type: ignore[index,arg-type]
        # The server runs more requests before all replies have been sent.
        assert len(served.transport.data) > 100_000
        for _ in range(1000 - run):
            wire.receive()


@pytest.mark.usefixtures("patient")
def test_reply_over_total_limit_waits_for_others_to_read() -> None:
    with serving() as server, wire_to(server) as reader, wire_to(server) as waiter, wire_to(server) as writer:
        writer.call("PUT", "t", "x" * 900_000)
        wait_for_stored(server, 1)
        replies, somebody = server.context.usage.replies, Mock(Connection)
        replies.add(somebody, replies.limit - 500_000)
        reader.send(encode_request(b"READ", b"t", b"0"))
        waiter.send(encode_request(b"READ", b"t", b"0", b"WAIT", b"1"))
        wait_until(lambda: len(replies.queue) == 2)
        writer.send(encode_request(b"TOPICS") * 10)
        # Short replies pass, long ones wait.
        assert isinstance(writer.receive(), list)
        with wire_to(server) as other:
            assert other.call("PUT", "short", "y") == 2
            assert other.call("READ", "short", 0)[3] == b"y"  # type: ignore[index]
        assert len(replies.queue) >= 2
        replies.drop(somebody)
        # The time of the wait is over, but there were messages all along.
        assert [len(wire.receive()[3]) for wire in (reader, waiter)] == [900_000] * 2  # type: ignore[index,arg-type]
        assert all(isinstance(writer.receive(), list) for _ in range(9))
        wait_until(lambda: replies.total == 0 and not replies.queue)


@contextmanager
def little_room(server: Server) -> Iterator[None]:
    """Within the block, one request may be sent, whose reply waits for room until the end of the block."""
    replies, somebody = server.context.usage.replies, Mock(Connection)
    replies.add(somebody, replies.limit - 500_000)
    yield
    wait_until(lambda: len(replies.queue) == 1)
    replies.drop(somebody)


@pytest.mark.usefixtures("patient")
def test_messages_of_several_topics_are_not_lost_while_the_reply_waits_for_memory() -> None:
    with serving() as server, wire_to(server) as reader, wire_to(server) as writer:
        writer.call("PUT", "t", "x" * 900_000)
        wait_for_stored(server, 1)
        with little_room(server):
            reader.send(encode_request(b"MREAD", b"0", b"TOPICS", b"t*"))
        reply = reader.receive()
        assert isinstance(reply, list)
        assert (reply[0], len(reply[5])) == (1, 900_000)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("lease_ms", "attempt"), [("60000", 1), ("1", 2)])
def test_job_is_taken_once_while_the_reply_waits_for_memory(lease_ms: str, attempt: int) -> None:
    """Unless its lease ends first."""
    with serving() as server, wire_to(server) as worker, wire_to(server) as writer:
        for _ in range(2):
            writer.call("PUT", "t", "x" * 900_000)
        with little_room(server):
            worker.send(encode_request(b"TAKE", b"t", b"w", lease_ms.encode()))
            wait_until(lambda: len(server.context.usage.replies.queue) == 1)
            # Longer than the short lease.
            time.sleep(0.002)
        reply = worker.receive()
        assert isinstance(reply, list)
        assert (reply[1], len(reply[4]), reply[6]) == (1, 900_000, attempt)


@pytest.mark.slow
def test_largest_nonreading_client_is_dropped_to_make_room(tmp_path: Path) -> None:
    # The kernel buffers little for a Unix socket.
    limits = {"max_total_unread_reply_bytes": 2_500_000, "max_message_bytes": 1_000_000}
    with serving(host=f"unix:{tmp_path}/socket", **limits) as server, ExitStack() as stack:
        reader, modest, greedy = (stack.enter_context(closing(Wire(f"{tmp_path}/socket"))) for _ in range(3))
        reader.call("PUT", "t", "x" * 900_000)
        reader.call("PUT", "modest", "x" * 500_000)
        replies = server.context.usage.replies
        modest.send(encode_request(b"READ", b"modest", b"0"))
        wait_until(lambda: replies.total > 100_000)
        greedy.send(encode_request(b"READ", b"t", b"0") * 2)
        wait_until(lambda: replies.total > 1_700_000)
        held = {connection.id: size for connection, size in replies.largest()}
        assert len(reader.call("READ", "t", 0)[3]) == 900_000  # type: ignore[index,arg-type]
        # Whether it is enough to drop one depends on how soon the reader reads; the largest is dropped first.
        largest = max(held, key=lambda number: held[number])
        wait_until(lambda: largest not in {connection.id for connection in loop_of(server).connections})


@pytest.mark.usefixtures("patient")
def test_transaction_replies_count_towards_total(tmp_path: Path) -> None:
    # The kernel buffers little for a Unix socket, so most readers wait until others read.
    bounds = {"max_total_unread_reply_bytes": 3_000_000, "max_message_bytes": 1_000_000}
    with serving(host=f"unix:{tmp_path}/socket", **bounds) as server, ExitStack() as stack:
        writer, *readers = (stack.enter_context(closing(Wire(f"{tmp_path}/socket"))) for _ in range(13))
        writer.call("PUT", "t", "x" * 1_000_000)
        wait_for_stored(server, 1)
        requests = [encode_request(*words.split()) for words in (b"MULTI", b"READ t 0", b"EXEC")]
        for reader in readers:
            reader.send(b"".join(requests))
        replies = server.context.usage.replies
        wait_until(lambda: len(replies.queue) >= 8)
        assert 1_000_000 < replies.total <= 3_000_000
        # Read from all at once, because the others may be waiting for any of them.
        with ThreadPoolExecutor(len(readers)) as pool:
            for ok, queued, results in pool.map(lambda reader: [reader.receive() for _ in range(3)], readers):
                assert (ok, queued, len(results[0][3])) == ("OK", "QUEUED", 1_000_000)  # type: ignore[arg-type, index]


# Requests


@pytest.mark.usefixtures("patient")
def test_partial_request_reserves_its_length_and_others_wait() -> None:
    limits = {"max_total_request_bytes": 1_500_000, "max_message_bytes": 1_000_000}
    with serving(**limits) as server, ExitStack() as stack:
        first, second, third, short = (stack.enter_context(wire_to(server)) for _ in range(4))
        budget = server.context.usage.requests
        long = encode_request(b"PUT", b"t", b"x" * 900_000)
        first.send(long[:100])
        wait_until(lambda: budget.total > 900_000)
        for number, wire in enumerate((second, third), 1):
            wire.send(long[:100])
            wait_until(lambda number=number: len(budget.queue) == number)
        # Short requests pass.
        assert short.call("PUT", "t", "x" * 3000) == 1
        senders = [threading.Thread(target=wire.send, args=(long[100:],)) for wire in (third, second, first)]
        for sender in senders:
            sender.start()
        assert sorted([wire.receive() for wire in (first, second, third)]) == [2, 3, 4]
        for sender in senders:
            sender.join()
        wait_until(lambda: budget.total == 0 and not budget.queue)


def test_large_requests_queue_while_small_ones_pass() -> None:
    budget = Budget()
    budget.set_limit(10_000_000, 1_000_000)
    holder, first, second, third = (Mock(Connection) for _ in range(4))
    budget.add(holder, 9_500_000)
    assert not budget.claim_in_turn(first, 600_000, 1.0)
    assert not budget.claim_in_turn(second, 400_000, 2.0)
    assert budget.first_that_fits() is None
    assert budget.claim_in_turn(third, 200_000, 3.0)
    assert (budget.missing(0.9), budget.missing(1.0), budget.missing(2.0)) == (-300_000, 300_000, 700_000)
    budget.drop(third)
    budget.add(holder, -100_000)
    assert budget.first_that_fits() is first
    assert budget.claim_in_turn(first, 600_000, 4.0)
    assert not budget.claim_in_turn(second, 400_000, 4.0)
    budget.drop(holder)
    assert budget.first_that_fits() is second
    assert budget.claim_in_turn(second, 400_000, 5.0)
    assert budget.total == 1_000_000


def test_little_is_received_while_request_memory_is_used_up() -> None:
    with (
        serving(max_total_request_bytes=1_500_000, max_message_bytes=1_000_000) as server,
        wire_to(server) as first,
        wire_to(server) as second,
    ):
        budget = server.context.usage.requests
        long = encode_request(b"PUT", b"t", b"x" * 900_000)
        first.send(long[:100])
        wait_until(lambda: budget.total > 900_000)
        second.send(long[:100_000])
        wait_until(lambda: len(budget.queue) == 1)
        (waiting,) = budget.queue
        assert 0 < waiting.requests.parser.buffered <= FREE_BYTES


def test_little_is_received_while_others_wait_for_memory() -> None:
    budget = Budget()
    budget.set_limit(10_000_000, 1_000_000)
    assert not budget.is_crowded
    holder, waiter = Mock(Connection), Mock(Connection)
    budget.add(holder, 9_500_000)
    assert not budget.claim_in_turn(waiter, 600_000, 1.0)
    budget.add(holder, -9_500_000)
    assert budget.is_crowded
    budget.leave(waiter)
    assert not budget.is_crowded


def test_largest_partial_requests_are_dropped_to_unblock_the_first() -> None:
    budget = Budget()
    budget.set_limit(1_000_000, 600_000)
    assert budget.blockers() == []
    first, small, large = (Mock(Connection) for _ in range(3))
    for holder, amount in ((first, 100_000), (small, 150_000), (large, 250_000)):
        budget.add(holder, amount)
    other = Mock(Connection)
    budget.add(other, 500_000)
    for holder in (first, small, large):
        assert not budget.claim_in_turn(holder, 500_000, 1.0)
    # Connections that do not wait will finish.
    assert budget.blockers() == []
    budget.add(small, 1)
    assert budget.blockers() == [large]
    budget.add(large, -100_000)
    assert budget.blockers() == []
    # The first one alone holds and claims too much.
    budget.add(first, 400_001)
    assert budget.blockers() == [first]


def test_partial_requests_do_not_deadlock_on_memory() -> None:
    limits = {"max_total_request_bytes": 1_500_000, "max_message_bytes": 1_000_000, "max_age_seconds": 3600}
    with serving(**limits) as server, ExitStack() as stack:
        budget = server.context.usage.requests
        holders = [stack.enter_context(wire_to(server)) for _ in range(10)]
        for holder in holders:
            holder.call("PING")
        writer = stack.enter_context(wire_to(server))
        for number in range(100):
            writer.call("PUT", f"{number:0500}", "x")
        # The positions of GET take memory.
        for holder in holders:
            for number in range(100):
                holder.call("GET", f"{number:0500}")
        assert budget.total > 600_000
        long = encode_request(b"PUT", b"t", b"x" * 900_000)
        for holder in holders:
            holder.send(long[:5000])
        # All of them wait, so one is dropped, and another gets room.
        wait_until(lambda: budget.total > 900_000)


def test_reading_client_is_not_dropped_to_make_room() -> None:
    with serving(max_unread_reply_bytes=1024) as server, wire_to(server) as wire:
        # Pretend that other connections use up the rest.
        server.context.usage.requests.limit = 20_000
        wire.send(encode_request(b"ECHO", b"x" * 1100) * 100)
        assert [wire.receive() for _ in range(100)] == [b"x" * 1100] * 100


def test_parsed_requests_count_by_memory_used() -> None:
    with serving() as server, wire_to(server) as wire:
        wire.send(encode_request(b"GETWAIT", b"t", b"60000") + encode_request(b"PING") * 140)
        wait_until(lambda: server.status.waiting() == 1 and server.context.usage.requests.total > 0)
        # They are 1,960 bytes on the wire.
        assert server.context.usage.requests.total > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True])
def test_stalled_request_is_dropped_to_make_room(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(budget: Budget) -> list[tuple[Connection, int]]:
        # Sorting thousands of them would take longer than the event loop may spend in one turn on closing them.
        time.sleep(4 * worker.MOST_SLICE_SECONDS)
        return sort(budget)

    sort = Budget.largest
    if many:
        monkeypatch.setattr(Budget, "largest", largest)
    limits = {"max_total_request_bytes": 1_500_000, "max_message_bytes": 1_000_000}
    with serving(**limits) as server, wire_to(server) as stalled, wire_to(server) as honest:
        stalled.send(encode_request(b"PUT", b"t", b"x" * 900_000)[:-1])
        wait_until(lambda: server.context.usage.requests.total > 900_000)
        assert honest.call("PUT", "t", "y" * 900_000) == 1
        assert stalled.receive().code == "TIMEOUT"  # type: ignore[union-attr]
        assert stalled.ended()


def test_positions_count_until_disconnect() -> None:
    with serving() as server:
        with wire_to(server) as wire:
            wire.call("PING")
            with wire_to(server) as writer:
                for number in range(100):
                    writer.call("PUT", f"{number:0500}", "x")
            for number in range(100):
                assert wire.call("GET", f"{number:0500}") == b"x"
            assert server.context.usage.requests.total > 100 * 500
        wait_until(lambda: server.context.usage.requests.total == 0)


def test_buffered_requests_after_a_wait_are_bounded() -> None:
    with serving() as server, wire_to(server) as wire:
        (served,) = wait_for_connections(server, 1)
        wire.send(b"GETWAIT t 60000\r\n")
        wait_until(lambda: server.status.waiting() == 1)
        wire.socket.settimeout(UNIT)
        with pytest.raises(TimeoutError):
            wire.send(b"PING\r\n" * 10_000_000)
        # One receive may exceed the limit.
        wait_until(lambda: len(served.requests.parser) >= MAX_HELD_BYTES)
        assert len(served.requests.parser) <= MAX_HELD_BYTES + RECEIVE_BYTES


@pytest.mark.parametrize(("milliseconds", "reply"), [(86_400_000, None), (86_400_001, "BADREQUEST")])
def test_wait_is_at_most_a_day(wire: Wire, milliseconds: int, reply: str | None) -> None:
    for words in (("GETWAIT", "t", milliseconds), ("READ", "t", 0, "WAIT", milliseconds)):
        wire.send(encode_request(*(str(word).encode() for word in words)))
        if reply is None:
            wire.socket.settimeout(UNIT)
            with pytest.raises(TimeoutError):
                wire.receive()
            break
        assert wire.receive().code == reply  # type: ignore[union-attr]


# Deadlines


def test_request_timeout_grows_with_length() -> None:
    # At 16 KiB/s, 50,000 bytes get 3 s more.
    with serving(request_timeout_seconds=0.1) as server, wire_to(server) as long, wire_to(server) as short:
        request = encode_request(b"PUT", b"t", b"x" * 50_000)
        long.send(request[:100])
        short.send(encode_request(b"PUT", b"t", b"x" * 50)[:-10])
        assert short.receive().code == "TIMEOUT"  # type: ignore[union-attr]
        long.send(request[100:])
        assert long.receive() == 1


def test_trickling_request_times_out() -> None:
    with serving(request_timeout_seconds=5 * UNIT) as server, wire_to(server) as wire:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in encode_request(b"PUT", b"t", b"x" * 1000):
                wire.send(bytes([byte]))
                time.sleep(UNIT / 10)
                if server.status.counters().errors["TIMEOUT"]:
                    break
        assert "did not arrive in time" in str(wire.receive())
        assert time.monotonic() - began >= 5 * UNIT


def limit_receive_buffer(wire: Wire, server: Server) -> None:
    """Reconnect with a small receive buffer."""
    wire.socket.close()
    wire.socket = socket.socket()
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    wire.socket.settimeout(SOON)
    wire.socket.connect(("127.0.0.1", server.port))


def test_client_that_is_still_sending_need_not_read() -> None:
    body = b"x" * 8_000_000
    with serving(reply_timeout_seconds=15 * UNIT) as server, wire_to(server) as wire:
        limit_receive_buffer(wire, server)
        wire.send(encode_request(b"ECHO", body))
        wait_until(lambda: 0 < server.context.usage.replies.total < len(body))
        began, pings = time.monotonic(), 0
        # In total, this takes longer than reply_timeout_seconds.
        while time.monotonic() < began + 25 * UNIT:
            wire.send(b"PING\r\n")
            pings += 1
            time.sleep(UNIT)
        assert wire.receive() == body
        assert [wire.receive() for _ in range(pings)] == ["PONG"] * pings


def test_slow_steady_reader_is_not_dropped() -> None:
    with serving(reply_timeout_seconds=15 * UNIT) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x" * 6_000_000)
        limit_receive_buffer(wire, server)
        wire.send(encode_request(b"READ", b"t", b"0"))
        got, began = 0, time.monotonic()
        while got < 6_000_000:
            data = wire.socket.recv(16_384)
            assert data, f"dropped after {got} bytes"
            got += len(data)
            # In total, this takes longer than reply_timeout_seconds.
            time.sleep(max(0.0, began + 25 * UNIT * got / 6_000_000 - time.monotonic()))
