"""Listening, connection limits, and stopping, on real sockets."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import SOON, UNIT, LethalStore, Wire, blocked, loop_of, reload, serving, wait_until, wire_to
from dsmq import settings as config
from dsmq.broker.admission import MAX_REFUSED
from dsmq.client import connect
from dsmq.errors import ServerFailed, ShuttingDown, StartupError
from dsmq.server import Server
from dsmq.wire.resp import encode_request
from engine import Engine
from helpers import HOST


def send_for_ever(sock: socket.socket, data: bytes) -> None:
    while True:
        sock.send(data)


# Listening


def test_server_listens_on_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with serving(host="::1") as server, connect("::1", server.port) as mq:
        assert mq.put("t", "x") == 1
        assert server.addresses == [f"[::1]:{server.port}"]


def test_unix_socket_is_removed_on_stop_and_replaced_after_kill(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(host=f"unix:{path}") as server, connect(f"unix:{path}") as mq:
        assert mq.put("t", "x") == 1
        with pytest.raises(StartupError, match="in use"), serving(host=f"unix:{path}"):
            pass
        assert mq.put("t", "x") == 2
        assert server.addresses == [f"unix:{path}"]
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with serving(host=f"unix:{path}"), connect(f"unix:{path}") as mq:
        assert mq.put("t", "x") == 1


def test_unix_socket_does_not_replace_file(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(StartupError), serving(host=f"unix:{path}"):
        pass
    assert path.read_text() == "data"


def test_port_in_use_leaves_nothing_behind(server: Server) -> None:
    before = threading.active_count()
    with pytest.raises(StartupError, match=f"127.0.0.1:{server.port}: the address is in use"):
        Server(config.load(port=server.port)).start()
    with pytest.raises(StartupError, match="in use"):
        Server(config.load(port=0, http_port=server.port)).start()
    assert threading.active_count() == before


# Connection limits


def test_connections_over_limit_are_refused_until_one_closes() -> None:
    with serving(max_connections=2) as server, wire_to(server) as one:
        with wire_to(server) as two:
            assert one.call("PING") == two.call("PING") == "PONG"
            with wire_to(server) as three:
                assert three.receive().code == "BUSY"  # type: ignore[union-attr]
                assert three.ended()
        wait_until(lambda: server.status.connections() == 1)
        with wire_to(server) as four:
            assert four.call("PING") == "PONG"
        assert server.status.counters().refused == {"connections": 1}


def is_closed(wire: Wire) -> bool:
    """Return whether the server has closed the connection, and not just finished sending."""
    try:
        wire.send(encode_request(b"CLIENT", b"SETINFO", b"LIB-NAME", b"x"))
    except OSError:
        return True
    return False


@pytest.mark.usefixtures("long_linger")
def test_refused_client_can_finish_its_handshake_unless_too_many_are_refused() -> None:
    # Otherwise, it would get an error when sending, before it reads -BUSY.
    with serving(max_connections=1) as server, wire_to(server) as one, ExitStack() as stack:
        assert one.call("PING") == "PONG"
        refused = [stack.enter_context(wire_to(server)) for _ in range(2 * MAX_REFUSED)]
        assert [wire.receive().code for wire in refused] == ["BUSY"] * len(refused)  # type: ignore[union-attr]
        for wire in refused[:MAX_REFUSED]:
            wait_until(lambda wire=wire: is_closed(wire))  # type: ignore[misc]
        for wire in refused[MAX_REFUSED:]:
            assert not is_closed(wire)
            assert wire.ended()
            assert not is_closed(wire)


def test_refused_connections_are_closed_after_a_while() -> None:
    with serving(max_connections=1) as server, wire_to(server) as one, wire_to(server) as refused:
        runner = threading.Thread(target=server.run)
        runner.start()
        assert one.call("PING") == "PONG"
        assert refused.receive().code == "BUSY"  # type: ignore[union-attr]
        wait_until(lambda: is_closed(refused))
        server.request_stop("the test ends")
        runner.join(SOON)


def test_incomplete_request_times_out() -> None:
    with serving(request_timeout_seconds=2 * UNIT) as server, wire_to(server) as slow, wire_to(server) as idle:
        slow.send(b"*2\r\n$4\r\nPING\r\n$10\r\nx")
        assert slow.receive().code == "TIMEOUT"  # type: ignore[union-attr]
        assert slow.ended()
        assert idle.call("PING") == "PONG"


def test_many_slow_complete_requests_are_served() -> None:
    with serving() as server, wire_to(server) as slow:
        request, deadlines = encode_request(b"PING"), []
        slow.send(request[:5])
        for _ in range(4):
            wait_until(lambda: any(len(connection.requests.parser) == 5 for connection in loop_of(server).connections))
            (connection,) = loop_of(server).connections
            deadlines.append(connection.requests.deadline())
            slow.send(request[5:])
            assert slow.receive() == "PONG"
            slow.send(request[:5])
        # Each request has its own deadline.
        assert deadlines == sorted(set(deadlines))


def test_idle_connection_is_closed_but_waiting_one_is_not() -> None:
    with serving() as server, wire_to(server) as idle, wire_to(server) as waiter:
        waiter.send(encode_request(b"GETWAIT", b"t", b"%d" % round(UNIT * 5000)))
        wait_until(lambda: server.status.waiting() == 1)
        reload(server, idle_timeout_seconds=2 * UNIT)
        # There is no request, so there is no reply.
        assert idle.ended()
        assert waiter.receive() is None


def test_nonreading_client_is_dropped_and_affects_no_one() -> None:
    with serving(reply_timeout_seconds=3 * UNIT, max_unread_reply_bytes=65536) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x" * 200_000)
        with wire_to(server) as deaf:
            deaf.socket.setblocking(False)
            # More replies than the kernel buffers, then more requests than the server buffers.
            request = encode_request(b"READ", b"t", b"0") * 1000
            with pytest.raises(BlockingIOError):
                send_for_ever(deaf.socket, request)
            assert wire.call("PING") == "PONG"
            wait_until(lambda: server.status.connections() == 1)


def test_unread_replies_pause_reading_without_loss() -> None:
    with serving(max_unread_reply_bytes=1024) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x" * 100_000)
        request = encode_request(b"READ", b"t", b"0")
        sender = threading.Thread(target=wire.send, args=(request * 500,))
        sender.start()
        for _ in range(500):
            assert len(wire.receive()[3]) == 100_000  # type: ignore[index,arg-type]
        sender.join()


# Stopping


def test_stop_answers_waiting_readers_then_closes(server: Server) -> None:
    with wire_to(server) as waiter, wire_to(server) as half:
        waiter.send(encode_request(b"GETWAIT", b"t", b"60000"))
        half.send(b"*3\r\n$3\r\nPUT")
        port = server.port
        wait_until(lambda: server.status.waiting() == 1 and server.status.counters().bytes_in > 40)
        assert server.stop() == []
        assert waiter.receive() is None
        assert waiter.ended()
        assert half.receive().code == "CLOSING"  # type: ignore[union-attr]
    with pytest.raises(ConnectionRefusedError):
        connect(port=port, retry=False)
    assert server.stop() == []


def test_stop_with_a_shared_store_answers_waiting_readers_then_closes(shared_node: Engine) -> None:
    with ExitStack() as stack:
        settings = config.load(
            kind=config.EmbeddedSettings,
            port=0,
            store=f"nats://{HOST}:{shared_node.nodes[0].port}",
            store_stream="stop",
            store_replicas=1,
        )
        server = stack.enter_context(Server(settings))
        waiter, noticed, half = [stack.enter_context(wire_to(server)) for _ in range(3)]
        noticed.ask_for_notices()
        for wire in (waiter, noticed):
            wire.send(encode_request(b"READ", b"t", b"0", b"WAIT", b"60000"))
        half.send(b"*3\r\n$3\r\nPUT")
        wait_until(lambda: server.status.waiting() == 2 and server.status.counters().bytes_in > 100)
        assert server.stop() == []
        assert (waiter.receive(), noticed.receive()) == ([], [])
        assert [wire.receive().code for wire in (noticed, half)] == ["CLOSING"] * 2  # type: ignore[union-attr]
        assert waiter.ended()


def test_stop_reports_threads_that_survive(caplog: pytest.LogCaptureFixture) -> None:
    with serving(stop_timeout_seconds=2 * UNIT) as server:
        with blocked(server):
            assert server.stop() == ["dsmq-io-0"]
            assert "still running" in caplog.text
        wait_until(lambda: "dsmq-io-0" not in [thread.name for thread in threading.enumerate()])
        # A store that a surviving thread may use is left open.
        server.context.store.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_run_detects_dead_thread() -> None:
    with serving(LethalStore(0), expiry_interval_seconds=UNIT) as server, ThreadPoolExecutor(1) as pool:
        run = pool.submit(server.run)
        try:
            with pytest.raises(ServerFailed, match="dsmq-expiry"):
                run.result(SOON)
        finally:
            server.request_stop("the test ends")


def test_shutdown_stops_run_in_any_thread(server: Server, wire: Wire) -> None:
    runner = threading.Thread(target=server.run)
    runner.start()
    wire.ask_for_notices()
    assert wire.call("SHUTDOWN") == "OK"
    runner.join(SOON)
    assert not runner.is_alive()
    assert isinstance(wire.receive(), ShuttingDown)
    assert wire.ended()


def test_shutdown_stops_a_server_that_nothing_runs() -> None:
    with serving() as server, wire_to(server) as wire, wire_to(server) as other:
        wire.ask_for_notices()
        assert wire.call("SHUTDOWN") == "OK"
        assert other.ended()
        wait_until(lambda: not any(part.thread.is_alive() for part in server._parts()))


def test_server_starts_only_once() -> None:
    with serving() as server:
        port = server.port
        with pytest.raises(RuntimeError, match="only once"):
            server.start()
        with wire_to(server) as wire:
            assert wire.call("PING") == "PONG"
        assert server.port == port
    with pytest.raises(RuntimeError, match="only once"):
        server.start()


def test_shutdown_can_be_forbidden() -> None:
    with serving(allow_shutdown=False) as server, wire_to(server) as wire:
        assert wire.error("SHUTDOWN") == "NOPERM"
        assert wire.call("PING") == "PONG"


EARLY = """
class Early(logging.Handler):
    def emit(self, record):
        if record.getMessage() == "stopping: SIGTERM":
            signal.raise_signal(signal.SIGINT)
logging.getLogger("dsmq").addHandler(Early())
"""


@pytest.mark.slow
@pytest.mark.parametrize("early", ["", EARLY], ids=["while it stops", "before it has begun to"])
def test_second_signal_stops_at_once(early: str) -> None:
    script = f"""
import logging
import signal
import threading
from dsmq.broker import commands
from dsmq.server import serve
{early}
def stuck(*_):
    print("stuck", flush=True)
    threading.Event().wait()
commands.COMMANDS_BY_ROLE[commands.Role.ADMIN][b"ECHO"] = commands.Command("ECHO", stuck, "message")
serve(port=0, verbose=True, stop_timeout_seconds=600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    port = int(process.stderr.readline().split("127.0.0.1:")[1].split(" ")[0])
    try:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(encode_request(b"ECHO", b"x"))
            assert process.stdout.readline() == "stuck\n"
            process.send_signal(signal.SIGTERM)
            if not early:
                assert any("stopping: SIGTERM" in line for line in process.stderr)
                process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=SOON)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in rest
