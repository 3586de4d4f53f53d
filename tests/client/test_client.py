"""The blocking client against a real server: its API and its errors."""

from __future__ import annotations

import inspect
import math
import multiprocessing
import os
import pickle
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from test_resume import hang_up

import dsmq.client
import dsmq.client.connection
from conftest import SOON, UNIT, blocked, serving, wait_for_stored, wait_until
from dsmq import errors
from dsmq.client import DSMQClientSideConnection, Message, connect, default_wait
from dsmq.client.requests import _LONG_BATCH_SECONDS
from dsmq.errors import ClientClosed, ConnectionLost, MessageNotText, NotPermitted, ProtocolError, TooBig
from dsmq.server import Server, serve

MakeClient = Callable[[], DSMQClientSideConnection]


# The API of dsmq 1.4


def test_signatures_match_dsmq_1_4() -> None:
    assert str(inspect.signature(serve)).startswith(
        "(host: 'str' = '127.0.0.1', port: 'int' = 30008, name: 'str' = 'mqdb', verbose: 'bool' = False"
    )
    # A list of hosts is new.
    assert str(inspect.signature(connect)).startswith(
        "(host: 'str | Sequence[str]' = '127.0.0.1', port: 'int' = 30008, verbose: 'bool' = False"
    )


def test_put_and_get(client: MakeClient) -> None:
    writer, reader = client(), client()
    assert reader.get("test") == ""
    writer.put("test", "test_msg")
    assert reader.get("test") == "test_msg"
    assert reader.get("test") == ""


def test_every_client_gets_every_message_put_after_it_connected(client: MakeClient) -> None:
    first = client()
    first.put("t", "1")
    second = client()
    first.put("t", "2")
    assert [first.get("t") for _ in range(3)] == ["1", "2", ""]
    assert [second.get("t") for _ in range(2)] == ["2", ""]


def test_get_latest_skips_older_messages(client: MakeClient) -> None:
    mq = client()
    for number in range(300):
        mq.put("t", str(number))
    assert mq.get("t") == "0"
    assert mq.get_latest("t") == "299"
    assert mq.get_latest("t") == ""
    assert mq.get("t") == ""
    mq.put("t", "new")
    assert mq.get("t") == "new"
    assert mq.missed == 0


def test_get_latest_finds_newest_in_read_ahead(client: MakeClient) -> None:
    mq = client()
    for number in range(3):
        mq.put("t", str(number))
    assert mq.get("t") == "0"
    assert mq.get_latest("t") == "2"


def test_get_wait_returns_when_message_arrives(server: Server, client: MakeClient) -> None:
    reader, writer = client(), client()
    got: list[str] = []
    thread = threading.Thread(target=lambda: got.append(reader.get_wait("t")))
    thread.start()
    wait_until(lambda: server.status.waiting() == 1)
    writer.put("t", "x")
    thread.join(SOON)
    assert got == ["x"]


def test_get_wait_sends_one_request(server: Server, client: MakeClient) -> None:
    mq = client()
    before = server.status.counters().requests
    assert mq.get_wait("t", timeout=3 * UNIT) == ""
    assert server.status.counters().requests == before + 1


def test_get_wait_follows_retry_schedule(client: MakeClient, retry_schedule: Callable[..., None]) -> None:
    retry_schedule(4, UNIT / 5)
    before = time.monotonic()
    assert client().get_wait("t") == ""
    assert 3 * UNIT * 0.99 <= time.monotonic() - before < SOON


def test_waiting_uses_no_processor(client: MakeClient) -> None:
    mq = client()

    def is_idle() -> bool:
        before = time.thread_time()
        assert mq.get_wait("nothing", timeout=UNIT * 3) == ""
        return time.thread_time() - before < UNIT * 3 / 4

    # A garbage collection may take this long.
    wait_until(is_idle)


@pytest.mark.parametrize(("took", "pause"), [(0.0001, 0), (0.0005, math.inf), (0.002, 0.1)])
def test_busy_polling_adapts_to_reply_time(
    client: MakeClient, monkeypatch: pytest.MonkeyPatch, took: float, pause: float
) -> None:
    mq = client()
    mq.ping()
    link = mq._pool.idle[0]
    monkeypatch.setattr(dsmq.client.connection, "time", SimpleNamespace(monotonic=lambda: 1000 + took))
    link._adapt_polling(1000)
    assert link._poll_not_before == pytest.approx(1000 + took + pause if pause else 0)


def test_busy_polling_stops_if_useless(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(dsmq.client.connection, "yield_processor", lambda: looks.append(1))
    monkeypatch.setattr(dsmq.client.connection, "BUSY_POLL_SECONDS", UNIT / 2)
    monkeypatch.setattr(dsmq.client.connection, "LONG_YIELD_PAUSE_SECONDS", SOON)
    with connect(port=server.port) as mq:
        mq.get_wait("nothing", timeout=UNIT)
        looks.clear()
        mq.get_wait("nothing", timeout=UNIT)
        assert not looks
        mq._pool.idle[0]._poll_not_before = 0
        mq.get_wait("nothing", timeout=UNIT)
        assert looks


def test_get_wait_with_timeout_0_does_not_wait(client: MakeClient) -> None:
    mq = client()
    assert mq.get_wait("t", timeout=0) == ""
    mq.put("t", "x")
    assert mq.get_wait("t", timeout=0) == "x"


def test_long_wait_is_split_into_requests(server: Server, client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmq.client.requests.MAX_WAIT_SECONDS", UNIT)
    mq, writer = client(), client()
    before = server.status.counters().requests
    got: list[str] = []
    thread = threading.Thread(target=lambda: got.append(mq.get_wait("t", timeout=math.inf)))
    thread.start()
    wait_until(lambda: server.status.counters().requests >= before + 3)
    writer.put("t", "x")
    thread.join(SOON)
    assert got == ["x"]


def test_connect_waits_for_starting_server() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))

    def start_late() -> None:
        time.sleep(2 * UNIT)
        listener.listen()
        sock, _ = listener.accept()
        sock.recv(1000)
        sock.sendall(b"-BUSY too many\r\n")
        sock.close()

    thread = threading.Thread(target=start_late)
    thread.start()
    with pytest.raises(errors.Busy):
        connect(port=listener.getsockname()[1])
    thread.join(SOON)
    listener.close()


def test_connect_finally_raises_connection_refused(
    retry_schedule: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert 10 < default_wait() < 11
    retry_schedule(4)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        before = time.monotonic()
        with pytest.raises(ConnectionRefusedError, match=f"no server answers at 127.0.0.1:{port}"):
            connect("127.0.0.1", port, True)
    assert 0.15 <= time.monotonic() - before < SOON
    # The first retry is immediate; whether there is time for others depends on the machine.
    assert "trying again" in capsys.readouterr().err


def test_shutdown_server_stops_it_and_close_may_follow() -> None:
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = context.Process(target=serve, args=("127.0.0.1", port, "mqdb", False))
    process.start()
    mq = connect("127.0.0.1", port)
    mq.put("t", "x")
    mq.shutdown_server()
    mq.close()
    mq.close()
    with pytest.raises(ConnectionRefusedError):
        connect("127.0.0.1", port, retry=False)
    process.join(SOON)
    assert process.exitcode == 0


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_serve_in_a_process_stops_gracefully_when_terminated(method: str, tmp_path: object) -> None:
    process = multiprocessing.get_context(method).Process(target=serve, args=(f"unix:{tmp_path}/socket",))
    process.start()
    with connect(f"unix:{tmp_path}/socket", reconnect_timeout=0) as mq:
        mq.put("t", "x")
        process.terminate()
        process.join(SOON)
        assert process.exitcode == 0
        with pytest.raises(ConnectionLost):
            mq.put("t", "y")


def test_shutdown_not_allowed_raises() -> None:
    with serving(allow_shutdown=False) as server, connect(port=server.port) as mq:
        with pytest.raises(NotPermitted):
            mq.shutdown_server()
        assert mq.put("t", "x") == 1


# Beyond that API


def test_messages_are_bytes_or_text(client: MakeClient) -> None:
    mq = client()
    for message in ("text ☃", b"bytes", bytearray(b"array"), b"\xff"):
        mq.put("t", message)  # type: ignore[arg-type]
    assert mq.get("t") == "text ☃"
    assert mq.get("t", raw=True) == b"bytes"
    assert mq.get("t") == "array"
    with pytest.raises(MessageNotText, match="raw=True"):
        mq.get("t")
    assert mq.get("t", raw=True) == b"\xff"
    assert mq.get("t", raw=True) == b""


def test_default_distinguishes_no_message_from_empty_one(client: MakeClient) -> None:
    mq = client()
    mq.put("t", "")
    assert mq.get("t", default=None) == ""
    assert mq.get("t", default=None) is None
    assert mq.get("t", default=0) == 0
    assert mq.get_latest("t", default=0) == 0
    assert mq.get_wait("t", default=0, timeout=0) == 0


def test_put_many_and_get_many(client: MakeClient) -> None:
    mq = client()
    assert mq.put_many("t", (str(number) for number in range(2500))) == list(range(1, 2501))
    assert mq.get_many("t", 3) == ["0", "1", "2"]
    assert mq.get_many("t", 5000) == [str(number) for number in range(3, 2500)]
    assert mq.get_many("t") == []
    assert mq.put_many("t", []) == []


def test_put_many_accepts_slow_generator(server: Server) -> None:
    def slowly(release: threading.Event) -> Iterator[str]:
        time.sleep(2 * _LONG_BATCH_SECONDS)
        # This message is sent immediately, but its reply arrives only after the timeout.
        yield "1"
        time.sleep(22 * UNIT)
        threading.Timer(UNIT, release.set).start()

    with connect(port=server.port, timeout=20 * UNIT, reconnect_timeout=0) as mq, blocked(server) as release:
        assert mq.put_many("t", slowly(release)) == [1]


def test_get_many_stops_before_undecodable_message(client: MakeClient) -> None:
    mq = client()
    mq.put_many("t", ["1", "2", b"\xff", "4"])
    assert mq.get_many("t") == ["1", "2"]
    with pytest.raises(MessageNotText):
        mq.get_many("t")
    assert mq.get_many("t", raw=True) == [b"\xff", b"4"]


def test_put_many_of_large_messages_does_not_deadlock(client: MakeClient) -> None:
    mq = client()
    mq.put_many("t", ["x" * 1_000_000] * 30)
    assert sum(len(message) for message in mq.get_many("t", 100)) == 30_000_000


def test_read_returns_ids_numbers_and_times(client: MakeClient) -> None:
    mq = client()
    mq.put("other", "x")
    before = time.time()
    mq.put("t", "1")
    mq.put("t", "2")
    messages = mq.read("t", 10)
    assert [(m.topic, m.id, m.number, m.body, m.text) for m in messages] == [
        ("t", 2, 1, b"1", "1"),
        ("t", 3, 2, b"2", "2"),
    ]
    assert before - 0.1 < messages[0].put_at < time.time() + 0.1
    assert mq.read("t", timeout=UNIT) == []
    mq.put_many("t", ["3", "4"])
    assert [message.text for message in mq.read("t", latest=True)] == ["4"]
    assert pickle.loads(pickle.dumps(messages[0])) == messages[0]


def test_messages_iterates_until_timeout(client: MakeClient) -> None:
    mq = client()
    mq.put_many("t", ["1", "2", ""])
    assert list(mq.messages("t", timeout=UNIT, text=True)) == ["1", "2", ""]
    mq.put("t", "3")
    assert next(mq.messages("t", raw=True)) == b"3"


def test_seek_reads_from_anywhere(client: MakeClient) -> None:
    client().put_many("t", ["1", "2", "3"])
    mq = client()
    mq.seek("t", 0)
    assert mq.get("t") == "1"
    mq.seek("t", 2)
    with pytest.raises(ValueError, match="not -1"):
        mq.seek("t", -1)
    assert mq.get_many("t") == ["3"]


def test_zero_messages_send_no_request(client: MakeClient) -> None:
    mq = client()
    assert mq.get_many("t", 0, timeout=math.inf) == []


def test_topics_lists_all_pages(client: MakeClient) -> None:
    mq = client()
    for number in range(1100):
        mq.put(f"topic {number:04}", "xy")
    # A mirror of a shared store may lag.
    wait_until(lambda: mq.topics() == [(f"topic {number:04}", 1, 2) for number in range(1100)])


@pytest.mark.parametrize(
    ("topic", "message", "error"),
    [
        ("", "x", ValueError),
        (b"t", "x", TypeError),
        ("t", 5, TypeError),
        ("t", None, TypeError),
        ("t" * 513, "x", TooBig),
        ("t", "x" * 8_388_609, TooBig),
        ("t", "\ud800", ValueError),
    ],
)
def test_invalid_arguments_raise_before_anything_is_sent(
    client: MakeClient, topic: str, message: str, error: type[Exception]
) -> None:
    mq = client()
    with pytest.raises(error):
        mq.put(topic, message)
    with pytest.raises(error):
        mq.put_many(topic, [message])
    assert mq.put("t", "x") == 1


def test_longest_message_round_trips(client: MakeClient) -> None:
    mq = client()
    mq.put("t", "x" * 8_388_608)
    assert len(mq.get("t")) == 8_388_608


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has this threshold")
def test_long_puts_reuse_memory(server: Server) -> None:
    script = f"""
import resource
from dsmq.client import connect
def put():
    for _ in range(50):
        mq.put("t", "x" * 100_000)
with connect(port={server.port}) as mq:
    put()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    put()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=SOON, check=True)
    # A message takes 25 pages.
    assert int(done.stdout) < 250


def test_message_expired_in_read_ahead_is_not_returned(caplog: pytest.LogCaptureFixture) -> None:
    with serving(max_age_seconds=20 * UNIT) as server, connect(port=server.port) as mq:
        mq.put_many("t", ["1", "2", "3"])
        wait_for_stored(server, 3)
        assert mq.get("t") == "1"
        time.sleep(21 * UNIT)
        assert mq.get("t") == ""
        assert mq.missed == 2
        assert "expired before they were read" in caplog.text


def test_messages_expired_before_reading_are_missed(caplog: pytest.LogCaptureFixture) -> None:
    with (
        serving(max_age_seconds=20 * UNIT) as server,
        connect(port=server.port) as mq,
        connect(port=server.port) as writer,
    ):
        writer.put("t", "1")
        assert mq.get("t") == "1"
        writer.put_many("t", ["2", "3", "4"])
        time.sleep(21 * UNIT)
        writer.put("t", "5")
        assert mq.get("t") == "5"
        assert mq.missed == 3


# Threads, processes, lost connections


def test_threads_share_a_client_and_get_each_message_once(client: MakeClient) -> None:
    mq, writer = client(), client()
    got: list[list[str]] = [[] for _ in range(6)]

    def read(into: list[str]) -> None:
        into.extend(mq.messages("t", timeout=10 * UNIT, text=True))

    threads = [threading.Thread(target=read, args=(into,)) for into in got]
    for thread in threads:
        thread.start()
    sent = [str(number) for number in range(3000)]
    for start in range(0, 3000, 50):
        writer.put_many("t", sent[start : start + 50])
    for thread in threads:
        thread.join(SOON)
    assert sorted(int(message) for into in got for message in into) == list(range(3000))
    assert all(into == sorted(into, key=int) for into in got)


def test_waiting_thread_does_not_block_others(server: Server, client: MakeClient) -> None:
    mq = client()
    thread = threading.Thread(target=mq.get_wait, args=("never",), kwargs={"timeout": math.inf, "default": None})
    failed: list[type[BaseException]] = []
    threading.excepthook, before = lambda args: failed.append(args.exc_type), threading.excepthook
    try:
        thread.start()
        wait_until(lambda: server.status.waiting() == 1)
        assert mq.put("t", "x") == 1
        assert mq.get("t") == "x"
        assert mq.get("never") == ""
        mq.close()
        thread.join(SOON)
        assert not thread.is_alive()
    finally:
        threading.excepthook = before
    assert failed == [ClientClosed]


def test_after_fork_both_processes_continue_from_same_position(client: MakeClient) -> None:
    mq = client()
    mq.put_many("t", ["1", "2", "3"])
    assert mq.get("t") == "1"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, " ".join([mq.get("t"), mq.get("t"), str(mq.put("u", "from the child"))]).encode())
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 100) == b"2 3 4"
    os.close(reading)
    os.close(writing)
    assert [mq.get("t"), mq.get("t"), mq.get("t")] == ["2", "3", ""]
    assert mq.get("u") == "from the child"


def test_closed_client_raises(client: MakeClient) -> None:
    with client() as mq:
        mq.put("t", "x")
    for call in (lambda: mq.put("t", "x"), lambda: mq.get("t"), lambda: mq.get_wait("t"), mq.ping, mq.shutdown_server):
        with pytest.raises(ClientClosed):
            call()


def test_unreachable_server_raises_instead_of_empty_message(client: MakeClient) -> None:
    with serving() as server:
        mq = connect(port=server.port, reconnect_timeout=0)
        mq.put("t", "x")
    for _ in range(2):
        with pytest.raises(ConnectionLost):
            mq.get("t")
    with pytest.raises(ConnectionLost) as told:
        mq.put("t", "x")
    assert not told.value.may_be_stored
    mq.close()


def test_client_resumes_at_its_position_after_lost_connection(server: Server, client: MakeClient) -> None:
    mq = client()
    mq.put_many("t", ["1", "2"])
    assert mq.get("t") == "1"
    hang_up(server)
    assert mq.put("t", "3") == 3
    assert [mq.get("t"), mq.get("t"), mq.get("t")] == ["2", "3", ""]


def test_new_epoch_is_read_from_start_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as first:
        port = first.port
        mq = connect(port=port)
        mq.put_many("t", ["1", "2"])
        wait_for_stored(first, 2)
        assert mq.get("t") == "1"
    with serving(port=port), connect(port=port) as other:
        other.put("t", "new 1")
        mq.ping()
        mq.put("t", "new 2")
        assert [mq.get("t") for _ in range(4)] == ["2", "new 1", "new 2", ""]
    mq.close()
    assert caplog.text.count("restarted") == 1


class Interrupted(Exception):
    """Raised by the signal handler below."""


def test_interrupted_call_leaves_no_reply_for_next_call(server: Server, client: MakeClient) -> None:
    mq, writer = client(), client()

    def interrupt(*_: object) -> None:
        raise Interrupted

    def interrupt_wait() -> None:
        wait_until(lambda: server.status.waiting() == 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)  # type: ignore[arg-type]

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(5):
            wait_until(lambda: server.status.waiting() == 0)
            thread = threading.Thread(target=interrupt_wait)
            thread.start()
            with pytest.raises(Interrupted):
                mq.get_wait("t", timeout=math.inf)
            thread.join(SOON)
    finally:
        signal.signal(signal.SIGALRM, before)
    writer.put("t", "x")
    assert writer.put("u", "y") == 2
    assert mq.put("u", "z") == 3
    assert mq.get("t") == "x"
    wait_until(lambda: server.status.connections() == 2)


def test_all_connections_are_renewed_after_restart() -> None:
    with serving() as first:
        port = first.port
        mq = connect(port=port)
        waiting = [threading.Thread(target=mq.get_wait, args=("t",), kwargs={"timeout": SOON}) for _ in range(4)]
        for thread in waiting:
            thread.start()
        wait_until(lambda: first.status.waiting() == 4)
        mq.put_many("t", ["x"] * 4)
        for thread in waiting:
            thread.join(SOON)
        assert first.status.connections() > 1
    with serving(port=port) as second:
        mq.ping()
        assert second.status.connections() == 1
        mq.close()


def test_seek_is_not_undone_by_pending_read(server: Server, client: MakeClient) -> None:
    client().put_many("t", ["1", "2", "3"])
    mq = client()
    got: list[str] = []
    thread = threading.Thread(target=lambda: got.append(mq.get_wait("t", timeout=SOON)))
    thread.start()
    wait_until(lambda: server.status.waiting() == 1)
    mq.seek("t", 0)
    client().put("t", "4")
    thread.join(SOON)
    assert got + mq.get_many("t") == ["1", "2", "3", "4"]


def test_first_call_after_restart_reads_from_start() -> None:
    with serving() as first:
        port = first.port
        mq = connect(port=port)
        mq.put_many("t", [str(number) for number in range(50)])
        assert len(mq.get_many("t")) == 50
    with serving(port=port), connect(port=port) as other:
        other.put("t", "new")
        assert mq.get("t") == "new"
        mq.close()


def test_close_during_a_connect_is_noticed() -> None:
    def reconnect() -> bytes:
        first, _ = listener.accept()
        with first:
            first.recv(65536)
            first.sendall(HELLO)
        second, _ = listener.accept()
        with second:
            second.settimeout(SOON)
            second.recv(65536)
            mq.close()
            second.sendall(HELLO)
            return second.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        ending = pool.submit(reconnect)
        mq = connect(port=listener.getsockname()[1])
        with pytest.raises(ClientClosed):
            mq.ping()
        assert ending.result(SOON) == b""


@pytest.mark.slow
@pytest.mark.parametrize("end", [b"\r\n", b""])
def test_trickling_reply_extends_timeout(end: bytes) -> None:
    def trickle() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(65536)
            sock.sendall(HELLO)
            sock.recv(65536)
            for data in (b":", *[b"1"] * 9, end):
                sock.sendall(data)
                time.sleep(3 * UNIT)
            # When no more bytes arrive, the client disconnects.
            assert sock.recv(1) == b""

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle)
        thread.start()
        before = time.monotonic()
        with connect(port=listener.getsockname()[1], timeout=20 * UNIT, reconnect_timeout=0) as mq:
            if end:
                assert mq.put("t", "x") == 111_111_111
            else:
                with pytest.raises(ConnectionLost, match=r"no reply within .* may have been stored"):
                    mq.put("t", "x")
                assert 45 * UNIT < time.monotonic() - before < SOON
        thread.join(SOON)


# Other servers


@contextmanager
def fake_server(*replies: bytes) -> Iterator[int]:
    """A listener that sends a reply after each receive and then closes the connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        sock, _ = listener.accept()
        with sock:
            for reply in replies:
                sock.recv(65536)
                sock.sendall(reply)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        thread.join(SOON)
        listener.close()


HELLO = (
    b"*12\r\n$3\r\nrun\r\n$1\r\nr\r\n$5\r\nepoch\r\n$1\r\ne\r\n$7\r\nlast_id\r\n:0\r\n$10\r\nmax_age_ms\r\n:600000\r\n"
    b"$17\r\nmax_message_bytes\r\n:1000\r\n$15\r\nmax_topic_bytes\r\n:100\r\n"
)


@pytest.mark.parametrize(
    "reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"*2\r\n$3\r\nfoo\r\n$3\r\nbar\r\n", b"+OK\r\n"]
)
def test_other_program_is_recognised_as_not_dsmq(reply: bytes) -> None:
    with fake_server(reply) as port, pytest.raises(ProtocolError):
        connect(port=port, retry=False)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", ConnectionLost),
        (b":1", ConnectionLost),
        (b"+OK\r\n", ProtocolError),
        (b"-FULL no room\r\n", errors.Full),
        (b"-STORE broken\r\n", errors.StoreFailed),
        (b"-WHATEVER new\r\n", errors.ReplyError),
        (b"?\r\n", ProtocolError),
    ],
)
def test_each_error_reply_to_put_raises_its_class(reply: bytes, error: type[Exception]) -> None:
    with (
        fake_server(HELLO, reply) as port,
        connect(port=port, reconnect_timeout=0) as mq,
        pytest.raises(error) as told,
    ):
        mq.put("t", "x")
    assert getattr(told.value, "may_be_stored", True)


def test_closing_reply_means_not_stored() -> None:
    with (
        fake_server(HELLO, b"-CLOSING bye\r\n") as port,
        connect(port=port, reconnect_timeout=0) as mq,
        pytest.raises(ConnectionLost, match=r"^bye$") as told,
    ):
        mq.put("t", "x")
    assert not told.value.may_be_stored


@pytest.mark.parametrize(
    "reply",
    [b"*1\r\n:1\r\n", b":1\r\n", b"*5\r\n" + b":1\r\n" * 5, b"*5\r\n$1\r\na\r\n:1\r\n:1\r\n$1\r\na\r\n:1\r\n"],
)
def test_invalid_read_reply_raises(reply: bytes) -> None:
    with fake_server(HELLO, reply) as port, connect(port=port) as mq, pytest.raises(ProtocolError):
        mq.get("t")


def test_unresponsive_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            connect(port=silent.getsockname()[1], timeout=2 * UNIT, retry=False)
        assert time.monotonic() - before < SOON


def test_frozen_server_does_not_hang_call(server: Server) -> None:
    with connect(port=server.port, timeout=20 * UNIT, reconnect_timeout=0) as mq:
        with blocked(server), pytest.raises(ConnectionLost, match="no reply within"):
            mq.get_wait("t", timeout=UNIT)
        assert mq.put("t", "x") == 1
        assert mq.get("t") == "x"


def test_every_error_is_a_dsmq_error() -> None:
    for code, error in errors.BY_CODE.items():
        assert issubclass(error, errors.DSMQError)
        assert type(errors.from_reply(f"{code} why")) is error
        assert str(errors.from_reply(f"{code} why")) == "why"
    assert issubclass(ConnectionLost, ConnectionError)
    assert issubclass(ClientClosed, ConnectionError)
    assert Message("t", 1, 1, 0.0, b"x").text == "x"
