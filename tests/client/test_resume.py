"""Real connections that break, and servers that restart, while a client works."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import pytest
import trustme
from pydantic import SecretStr

from conftest import SOON, UNIT, Wire, blocked, reload, serving, wait_for_stored, wait_until, wire_to
from dsmq import aio
from dsmq import settings as config
from dsmq.client import DSMQClientSideConnection, async_connection, connect
from dsmq.client import requests as calls
from dsmq.client.connection import LONG_PAUSE_SECONDS, Connection
from dsmq.errors import Busy, ClientClosed, ConnectionLost, Forgotten, Full, ReplyError, ShuttingDown, WrongToken
from dsmq.server import Server
from dsmq.store.api import Put
from dsmq.store.dedup import MAX_PRODUCERS
from dsmq.wire.addresses import Endpoint
from dsmq.wire.resp import encode_bulk


@pytest.fixture
def mq(server: Server, states: list[str]) -> Iterator[DSMQClientSideConnection]:
    with connect(port=server.port, on_state_change=states.append) as mq:
        yield mq


@pytest.fixture
def lose_reply(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that makes the connection break at a reply, after letting some pass, and calls `then`."""
    left, calls = math.inf, []

    def receive(link: Connection) -> object:
        nonlocal left
        reply = original(link)
        left -= 1
        if left < 0:
            left = math.inf
            for call in calls:
                call()
            raise ConnectionResetError("a test has lost it")
        return reply

    def arm(count: int = 0, then: Callable[[], object] = bool) -> None:
        nonlocal left
        left, calls[:] = count, [then]

    original = Connection.receive
    monkeypatch.setattr(Connection, "receive", receive)
    return arm


def test_put_with_lost_reply_is_stored_once(
    mq: DSMQClientSideConnection, lose_reply: Callable[..., None], states: list[str]
) -> None:
    assert mq.put("t", "1") == 1
    lose_reply()
    assert mq.put("t", "2") == 2
    assert mq.put("t", "3") == 3
    assert mq.get_many("t") == ["1", "2", "3"]
    assert states == ["lost", "resumed"]


@pytest.mark.parametrize("after", [0, 1, 499, 500, 700, 1499])
def test_put_many_resumes(
    server: Server, mq: DSMQClientSideConnection, lose_reply: Callable[..., None], after: int
) -> None:
    messages = [str(number) for number in range(1500)]
    lose_reply(after)
    assert mq.put_many("t", iter(messages)) == list(range(1, 1501))
    assert mq.get_many("t", 2000) == messages
    assert server.status.totals().stored == 1500


def test_reads_are_retried(
    server: Server, mq: DSMQClientSideConnection, lose_reply: Callable[..., None], states: list[str]
) -> None:
    mq.put_many("t", ["1", "2"])
    wait_for_stored(server, 2)
    got = []
    for call in (lambda: mq.get("t"), lambda: mq.get_wait("t"), lambda: mq.get_latest("t"), mq.topics, mq.ping):
        lose_reply()
        got.append(call())
    assert got[:3] == ["1", "2", ""]
    assert got[3] == [("t", 2, 2)]
    # The second message had been read ahead, so the lost reply was the one for the third.
    assert states == ["lost", "resumed"] * 4


def test_read_of_several_topics_is_retried(
    mq: DSMQClientSideConnection, lose_reply: Callable[..., None], states: list[str]
) -> None:
    mq.put_many("a", ["1", "2"])
    mq.seek(["a", "b*"], last=2)
    lose_reply()
    assert [message.text for message in mq.read(["a", "b*"], 9)] == ["1", "2"]
    mq.put("bb", "3")
    lose_reply()
    assert [message.text for message in mq.read(["a", "b*"], 9)] == ["3"]
    assert states == ["lost", "resumed"] * 2


def test_iterator_resumes(server: Server, mq: DSMQClientSideConnection) -> None:
    got: list[str] = []

    def read() -> None:
        for message in mq.messages("t", timeout=SOON, text=True):
            got.append(message)
            if message == "9":
                return

    with connect(port=server.port) as writer:
        thread = threading.Thread(target=read)
        thread.start()
        for number in range(10):
            writer.put("t", str(number))
            wait_until(lambda number=number: len(got) == number + 1)
            if number % 3 == 0:
                close_connections(server)
        thread.join(SOON)
    assert got == [str(number) for number in range(10)]


def test_wait_keeps_its_deadline_across_reconnect(
    server: Server, mq: DSMQClientSideConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(link: Connection, data: bytes, seconds: float = 0.0) -> None:
        waits.extend(int(found) for found in re.findall(rb"WAIT\r\n\$\d+\r\n(\d+)", data))
        original(link, data, seconds)

    def interrupt() -> None:
        wait_until(lambda: server.status.waiting() == 1)
        time.sleep(UNIT)
        close_connections(server)
        wait_until(lambda: server.status.counters().opened == 2 and server.status.waiting() == 1)
        with connect(port=server.port) as writer:
            writer.put("t", "x")

    waits: list[int] = []
    original = Connection.send
    monkeypatch.setattr(Connection, "send", send)
    monkeypatch.setattr(calls, "MAX_WAIT_SECONDS", 10 * SOON)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert mq.get_wait("t", timeout=SOON) == "x"
    thread.join(SOON)
    first, *_, last = waits
    assert last <= first - UNIT * 1000


def test_lost_and_restored_connection_is_logged_once(
    mq: DSMQClientSideConnection, lose_reply: Callable[..., None], caplog: pytest.LogCaptureFixture, server: Server
) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    caplog.clear()
    lose_reply()
    mq.ping()
    where = f"connection to 127.0.0.1:{server.port}"
    found = [(record.levelname, record.message) for record in caplog.records if record.name == "dsmq.client.core"]
    assert found == [("WARNING", f"{where} lost, trying again: a test has lost it"), ("INFO", f"{where} resumed")]


def test_put_is_answered_while_next_message_is_slow(
    server: Server, mq: DSMQClientSideConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks when it is too late to send the first message again."""

    def messages() -> Iterator[str]:
        time.sleep(2 * calls._LONG_BATCH_SECONDS)
        yield "1"
        wait_until(lambda: server.status.totals().stored == 1)
        hang_up(server)
        time.sleep(2 * calls._LONG_BATCH_SECONDS)
        yield "2"

    monkeypatch.setattr(calls, "RESEND_SECONDS", UNIT)
    assert mq.put_many("t", messages()) == [1, 2]
    assert mq.get_many("t") == ["1", "2"]


def test_unsent_slow_messages_go_to_next_server(states: list[str]) -> None:
    def messages(other: ExitStack, first: Server) -> Iterator[str]:
        port = first.port
        # Without a notice that the server is stopping.
        close_connections(first)
        first.stop()
        other.enter_context(serving(port=port))
        time.sleep(2 * calls._LONG_BATCH_SECONDS)
        yield "x"

    async def scenario(other: ExitStack) -> None:
        with serving() as first:
            async with await aio.connect(port=first.port, on_state_change=states.append) as mq:
                await mq.put("t", "x")
                assert await mq.put_many("t", messages(other, first)) == [1]

    with ExitStack() as other, serving() as first, restarted(states, first.port) as mq:
        mq.put("t", "x")
        assert mq.put_many("t", messages(other, first)) == [1]
    with ExitStack() as other:
        asyncio.run(scenario(other))
    assert states == ["lost", "replaced"] * 2


def close_connections(server: Server) -> None:
    """Make the server close all connections."""
    for worker in server._workers:
        worker.post(lambda worker=worker: [one.close("a test closes it") for one in list(worker.connections)])


def hang_up(server: Server) -> None:
    """Make the server close all connections and wait until it has."""
    close_connections(server)
    wait_until(lambda: server.status.connections() == 0)


def test_buffered_reply_is_read_if_sending_fails(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        link = Connection(Endpoint("", 0, str(tmp_path / "socket")), None, SOON)
        with listener.accept()[0] as server:
            server.sendall(b":7\r\n")
    link.send(b"PING\r\n")
    assert link.receive() == 7
    with pytest.raises(ConnectionResetError):
        link.receive()
    link.close()


def test_refused_call_on_new_connection_reports_resumed(states: list[str]) -> None:
    with serving(max_stored_messages=1) as server, restarted(states, server.port) as mq:
        mq.put("t", "x")
        wait_for_stored(server, 1)
        mq._core.announce("lost", OSError("of another thread"))
        with pytest.raises(Full):
            mq.put("t", "y")
    assert states == ["lost", "resumed"]


def test_connection_of_interrupted_call_is_closed(server: Server, mq: DSMQClientSideConnection) -> None:
    mq._pool.borrow()
    wait_until(lambda: server.status.connections() == 0)
    mq.ping()
    assert server.status.connections() == 1


def test_ended_idle_connection_is_renewed_without_retry(states: list[str]) -> None:
    async def scenario() -> None:
        options: Any = {"reconnect_timeout": 0, "on_state_change": states.append}
        async with await aio.connect(port=server.port, **options) as mq:
            hang_up(server)
            await asyncio.sleep(2 * LONG_PAUSE_SECONDS)
            await mq.ping()

    with serving() as server:
        with restarted(states, server.port, reconnect_timeout=0) as mq:
            hang_up(server)
            time.sleep(2 * LONG_PAUSE_SECONDS)
            mq.ping()
        asyncio.run(scenario())
    assert states == ["lost", "resumed"] * 2


def test_call_after_another_thread_reconnected_reports_resumed(states: list[str]) -> None:
    with serving(max_connections=1) as server, restarted(states, server.port) as mq:
        thread = threading.Thread(target=lambda: mq.get_wait("t", timeout=UNIT * 3))
        thread.start()
        wait_until(lambda: server.status.waiting() == 1)
        mq.ping()
        thread.join(SOON)
        # An attempt that began before the other thread finished may be refused afterwards.
        assert states == ["lost", "resumed"] * max(1, len(states) // 2)


def test_concurrent_first_reads_get_each_message_once(mq: DSMQClientSideConnection) -> None:
    class Slow(str):
        """A topic that waits for another thread to come this far, up to a time limit."""

        __slots__ = ()

        def encode(self, *_: object) -> bytes:
            with suppress(threading.BrokenBarrierError):
                both.wait(UNIT)
            return str.encode(self)

    both = threading.Barrier(2)
    mq.put("t", "x")
    got: list[object] = []
    threads = [threading.Thread(target=lambda: got.append(mq.get(Slow("t"), default=None))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert sorted(map(str, got)) == ["None", "x"]


# Servers with changed tokens


def test_reload_is_transparent_to_admitted_client(states: list[str], tmp_path: Path) -> None:
    authority = trustme.CA()
    ca, cert = str(tmp_path / "ca.pem"), str(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(ca)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(cert)
    settings = config.load(kind=config.EmbeddedSettings, port=0, tls_cert_file=cert)
    other = settings.model_copy(update={"tls_client_ca_file": ca})
    shown = {"ca_file": ca, "cert_file": cert}
    with Server(settings, load=lambda: other) as server, restarted(states, server.port, **shown) as mq:
        mq.put("t", "1")
        server.reload()
        assert mq.put("t", "2") == 2
        server.reload()
        wait_until(lambda: server.status.counters().errors["NOAUTH"] == 1)
        assert mq.get_many("t") == ["1", "2"]
    assert states == ["lost", "resumed"]


def test_client_with_revoked_token_raises(states: list[str]) -> None:
    settings = config.load(kind=config.EmbeddedSettings, port=0, auth_token="old" * 8)
    other = settings.model_copy(update={"auth_token": SecretStr("new" * 8)})
    with Server(settings, load=lambda: other) as server, restarted(states, server.port, token="old" * 8) as mq:
        mq.put("t", "1")
        server.reload()
        wait_until(lambda: server.status.connections() == 0)
        with pytest.raises(WrongToken):
            mq.put("t", "2")
    assert states == ["lost", "given up"]


# Shutting down


def test_shutdown_works_on_ended_connection(server: Server, mq: DSMQClientSideConnection) -> None:
    thread = threading.Thread(target=server.run)
    thread.start()
    hang_up(server)
    time.sleep(2 * LONG_PAUSE_SECONDS)
    mq.shutdown_server()
    thread.join(SOON)
    assert not thread.is_alive()
    # At once.
    with serving(port=mq.port):
        assert mq.put("t", "x") == 1


def test_shutdown_is_not_retried_if_it_may_have_run(
    server: Server, mq: DSMQClientSideConnection, lose_reply: Callable[..., None], states: list[str]
) -> None:
    lose_reply()
    with pytest.raises(ConnectionLost, match="a test has lost it"):
        mq.shutdown_server()
    assert states == []


# Restarted servers


class Impostor:
    """A server that resets its first client's connection and has another run id for the next one."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._reset, self._gone = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def reset(self) -> None:
        self._reset.set()
        assert self._gone.wait(SOON)

    def _run(self) -> None:
        with self._greeted(b"one") as first:
            self._reset.wait(SOON)
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._gone.set()
        with suppress(OSError), self._greeted(b"two") as second:
            second.recv(1000)
            second.sendall(b":7\r\n")
            second.recv(1000)

    def _greeted(self, run: bytes) -> socket.socket:
        client, _ = self._listener.accept()
        client.recv(1000)
        facts = {b"epoch": b"e", b"run": run, b"last_id": 0}
        facts |= {b"max_message_bytes": 1000, b"max_topic_bytes": 100, b"max_age_ms": 600_000}
        words = [word for fact in facts.items() for word in fact]
        words = [b":%d\r\n" % word if isinstance(word, int) else encode_bulk(word) for word in words]
        client.sendall(b"*%d\r\n" % len(words) + b"".join(words))
        return client


def test_unsent_put_goes_to_any_server(states: list[str]) -> None:
    with Impostor() as server, restarted(states, server.port) as mq:
        server.reset()
        time.sleep(2 * LONG_PAUSE_SECONDS)
        assert mq.put("t", "x") == 7
    assert states == ["lost", "restarted"]


def test_asyncio_unsent_put_goes_to_any_server(states: list[str]) -> None:
    async def scenario() -> None:
        async with await aio.connect(port=server.port, on_state_change=states.append) as mq:
            server.reset()
            await asyncio.sleep(2 * LONG_PAUSE_SECONDS)
            assert await mq.put("t", "x") == 7

    with Impostor() as server:
        asyncio.run(scenario())
    assert states == ["lost", "restarted"]


def restarted(states: list[str], port: int, **options: Any) -> DSMQClientSideConnection:
    return connect(port=port, on_state_change=states.append, **options)


def test_client_waits_for_restarting_server(states: list[str]) -> None:
    with serving() as first:
        mq = restarted(states, first.port)
        mq.put("t", "1")
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(mq.put("t", "2")))
    thread.start()
    wait_until(lambda: states == ["lost"])
    with serving(port=mq.port):
        thread.join(SOON)
        assert got == [1]
        assert mq.get("t") == "2"
        assert states == ["lost", "replaced"]
        mq.close()


@pytest.mark.embedded("a server that is not shared")
def test_possibly_stored_put_is_not_sent_to_another_server(lose_reply: Callable[..., None], states: list[str]) -> None:
    with serving() as first, restarted(states, first.port) as mq:
        mq.put("t", "1")

        def replace() -> None:
            first.stop()
            servers.append(Server(first.context.settings.model_copy(update={"port": mq.port})))
            servers[0].start()

        servers: list[Server] = []
        lose_reply(then=replace)
        with pytest.raises(ConnectionLost, match="restarted") as told:
            mq.put("t", "2")
        assert told.value.may_be_stored
        assert mq.get("t", default=None) is None
        assert mq.put("t", "3") == 1
        assert mq.get("t") == "3"
        assert states == ["lost", "replaced"]
        servers[0].stop()


@pytest.mark.embedded("replaces the run of the store")
def test_retried_put_may_be_stored_in_earlier_run_of_same_epoch(
    server: Server,
    mq: DSMQClientSideConnection,
    lose_reply: Callable[..., None],
    states: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mq.put("t", "1")
    server._store.run = "another"
    hang_up(server)
    assert mq.get("t") == "1"
    assert states == ["lost", "restarted"]
    assert "the last messages put may be lost" in caplog.text
    lose_reply()
    assert mq.put("t", "2") == 2
    assert mq.get("t") == "2"
    assert states == ["lost", "restarted", "lost", "resumed"]


def test_client_gives_up_in_time(states: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    with serving() as server:
        mq = restarted(states, server.port, reconnect_timeout=UNIT * 3)
        mq.put("t", "x")
    before = time.monotonic()
    with pytest.raises(ConnectionLost, match=r"no server answers .* \(tried for \d+\.\d s\)") as told:
        mq.put("t", "y")
    assert not told.value.may_be_stored
    assert UNIT < time.monotonic() - before < SOON / 2
    assert states == ["lost", "given up"]
    assert "no connection to" in caplog.text
    with pytest.raises(ConnectionLost):
        mq.put("t", "y")
    assert states == ["lost", "given up"]
    with serving(port=mq.port):
        assert mq.put("t", "z") == 1
    assert states == ["lost", "given up", "replaced"]
    mq.close()


def test_unanswered_put_raises_maybe_stored(server: Server) -> None:
    with connect(port=server.port, timeout=UNIT, reconnect_timeout=UNIT) as mq:
        with blocked(server), pytest.raises(ConnectionLost, match="may have been stored") as told:
            mq.put("t", "x")
        assert told.value.may_be_stored


def test_frozen_server_is_waited_for(server: Server, states: list[str]) -> None:
    with restarted(states, server.port, timeout=UNIT * 2) as mq:
        got: list[object] = []
        thread = threading.Thread(target=lambda: got.append(mq.put("t", "x")))
        with blocked(server):
            thread.start()
            wait_until(lambda: states == ["lost"])
        thread.join(SOON)
        assert got == [1]
        assert mq.get_many("t") == ["x"]


def test_close_ends_waiting_for_server(states: list[str]) -> None:
    with serving() as server:
        mq = restarted(states, server.port, reconnect_timeout=SOON * 10)
    raised: list[type[BaseException]] = []

    def ping() -> None:
        try:
            mq.ping()
        except ClientClosed as error:
            raised.append(type(error))

    thread = threading.Thread(target=ping)
    thread.start()
    wait_until(lambda: states == ["lost"])
    mq.close()
    thread.join(SOON)
    assert raised == [ClientClosed]


def test_busy_server_is_retried() -> None:
    with serving(max_connections=1) as server, connect(port=server.port) as mq:
        # Before the first connection there is nothing to resume.
        with pytest.raises(Busy):
            connect(port=server.port, retry=False)
        hang_up(server)
        other = connect(port=server.port)
        thread = threading.Thread(target=mq.ping)
        thread.start()
        wait_until(lambda: server.status.counters().refused["connections"] > 1)
        other.close()
        thread.join(SOON)
        assert not thread.is_alive()
        mq.ping()


def test_client_idle_too_long_reconnects(states: list[str]) -> None:
    with serving() as server, restarted(states, server.port) as mq:
        mq.put("t", "1")
        reload(server, idle_timeout_seconds=UNIT)
        wait_until(lambda: server.status.connections() == 0)
        reload(server, idle_timeout_seconds=0)
        assert mq.put("t", "2") == 2
        assert states == ["lost", "resumed"]


# The server's part


def test_client_with_notices_is_notified_of_stop() -> None:
    with serving() as server, wire_to(server) as wire:
        wire.ask_for_notices()
        assert wire.call("PUT", "t", "x") == 1
        server.stop()
        wire.send(b"PUT t y\r\n")
        assert isinstance(wire.receive(), ShuttingDown)
        assert wire.ended()


def test_waiting_reader_is_answered_before_stop() -> None:
    with serving() as server, wire_to(server) as told, wire_to(server) as wire:
        told.ask_for_notices()
        for one in (told, wire):
            one.send(b"READ t 0 WAIT 60000\r\n")
        wait_until(lambda: server.status.waiting() == 2)
        server.stop()
        for one in (told, wire):
            assert one.receive() == []
        assert isinstance(told.receive(), ShuttingDown)
        for one in (told, wire):
            assert one.ended()


def test_stop_sends_nothing_unrequested_to_idle_client() -> None:
    with serving() as server, wire_to(server) as fresh, wire_to(server) as wire:
        assert wire.call("PUT", "t", "x") == 1
        server.stop()
        assert wire.ended()
        assert fresh.ended()


def test_first_request_not_run_before_stop_gets_closing_reply() -> None:
    with serving() as server, wire_to(server) as wire:
        wire.send(b"GETWAIT t 60000\r\nPUT t y\r\nPUT t z\r\n")
        wait_until(lambda: server.status.waiting() == 1)
        server.stop()
        assert wire.receive() is None
        assert isinstance(wire.receive(), ShuttingDown)
        assert wire.ended()
        assert server.status.totals().stored == 0


def test_puts_during_stop_go_to_next_server() -> None:
    """Each put is stored once: an answered one on this server, any other on the next."""
    with serving() as first:
        server, mq, port = first, connect(port=first.port), first.port
        ids: list[int] = []
        ended = threading.Event()

        def put() -> None:
            while not ended.is_set():
                ids.append(mq.put("t", "x"))

        thread = threading.Thread(target=put)
        thread.start()
        for _ in range(5):
            wait_until(lambda: len(ids) > 0)
            server.stop()
            # The reply may have been sent, but not read yet.
            last_id = server.context.store.last_id()
            wait_until(lambda last_id=last_id: last_id == max(ids))
            ids.clear()
            server = Server(server.context.settings.model_copy(update={"port": port}))
            server.start()
        ended.set()
        thread.join(SOON)
        assert not thread.is_alive()
        server.stop()
        mq.close()


def test_forgotten_producer_number_is_not_stored_again(wire: Wire) -> None:
    for seq in range(1, 2101):
        assert wire.call("PUT", "t", "x", "KEY", "me", seq) == seq
    assert wire.call("PUT", "t", "x", "KEY", "me", 1101, "AGAIN") == 1101
    assert wire.error("PUT", "t", "x", "KEY", "me", 1000, "AGAIN") == "FORGOTTEN"
    assert wire.error("PUT", "t", "x", "KEY", "me", 1) == "FORGOTTEN"
    assert wire.call("PUT", "t", "x", "KEY", "me", 2101) == 2101


def put_as_others(server: Server, producers: int) -> None:
    store, ids = server.context.store, []
    # A shared store accepts at most 1,000 at once.
    for first in range(0, producers, 500):
        puts: list[Put] = [
            (b"t", b"x", (b"other %d" % number, 1)) for number in range(first, min(first + 500, producers))
        ]
        stored = store.append(puts)
        ids += stored.result(SOON) if isinstance(stored, Future) else stored
    wait_until(lambda: (newest := store.in_memory.peek(b"t")) is not None and newest.id == ids[-1])


def test_retry_of_possibly_forgotten_producer_is_refused(server: Server, wire: Wire) -> None:
    assert wire.call("PUT", "t", "x", "KEY", "a", 1) == 1
    assert wire.call("PUT", "t", "x", "AGAIN", "KEY", "new", 1) == 2
    put_as_others(server, MAX_PRODUCERS - 1)
    assert wire.error("PUT", "t", "x", "KEY", "a", 1, "AGAIN") == "FORGOTTEN"
    assert wire.call("PUT", "t", "x", "KEY", "new", 1, "AGAIN") == 2
    assert wire.error("PUT", "t", "x", "AGAIN") == "BADREQUEST"
    assert wire.call("PUT", "t", "x", "KEY", "unheard", 1) == MAX_PRODUCERS + 2


def test_forgotten_put_raises(server: Server, mq: DSMQClientSideConnection, lose_reply: Callable[..., None]) -> None:
    lose_reply(then=lambda: put_as_others(server, MAX_PRODUCERS))
    with pytest.raises(Forgotten):
        mq.put("t", "x")
    assert issubclass(Forgotten, ReplyError)


# The same with asyncio


def test_asyncio_client_resumes(server: Server, states: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        original, lose = async_connection.Connection.data_received, [False]

        def data_received(link: async_connection.Connection, data: bytes) -> None:
            if lose[0]:
                lose[0] = False
                link.fail(ConnectionResetError("a test has lost it"))
            else:
                original(link, data)

        monkeypatch.setattr(async_connection.Connection, "data_received", data_received)
        async with await aio.connect(port=server.port, on_state_change=states.append) as mq:
            for call in (
                lambda: mq.put("t", "1"),
                lambda: mq.put_many("t", ["2", "3"]),
                lambda: mq.get("t"),
                lambda: mq.get_latest("t"),
                mq.ping,
            ):
                lose[0] = True
                got.append(await call())

    got: list[object] = []
    asyncio.run(scenario())
    assert got == [1, [2, 3], "1", "3", None]
    assert server.status.totals().stored == 3
    assert states == ["lost", "resumed"] * 5


@pytest.mark.parametrize("size", [1, 6_000_000])
def test_asyncio_client_detects_why_idle_connection_ended(tmp_path: Path, states: list[str], size: int) -> None:
    """Its event loop is blocked while the server stops, but it still knows that nothing was sent to that server."""

    async def scenario() -> None:
        with serving(host=host) as first:
            mq = await aio.connect(host, on_state_change=states.append)
            await mq.put("t", "x")
            first.stop()
        with serving(host=host):
            threading.Event().wait(2 * LONG_PAUSE_SECONDS)
            assert await mq.put("t", "x" * size) == 1
            await mq.close()

    host = f"unix:{tmp_path / 'socket'}"
    asyncio.run(scenario())
    assert states == ["lost", "replaced"]


def test_asyncio_client_gives_up_in_time(states: list[str]) -> None:
    async def scenario() -> None:
        with serving() as server:
            mq = await aio.connect(port=server.port, reconnect_timeout=UNIT * 3, on_state_change=states.append)
            await mq.put("t", "x")
        before = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"no server answers .* \(tried for \d+\.\d s\)") as told:
            await mq.put("t", "y")
        assert not told.value.may_be_stored
        assert UNIT < time.monotonic() - before < SOON / 2
        await mq.close()

    asyncio.run(scenario())
    assert states == ["lost", "given up"]


def test_asyncio_close_ends_waiting_for_server(states: list[str]) -> None:
    async def scenario() -> None:
        with serving() as server:
            mq = await aio.connect(port=server.port, on_state_change=states.append)
        call = asyncio.create_task(mq.ping())
        while states != ["lost"]:
            await asyncio.sleep(UNIT / 20)
        await mq.close()
        with pytest.raises(ClientClosed):
            await asyncio.wait_for(call, SOON)

    asyncio.run(scenario())


def test_first_refused_connection_is_raised_unchanged() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        connect(port=port, retry=False)
