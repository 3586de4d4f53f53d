"""Stores that answer later or fail."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from conftest import SOON, UNIT, daemon, loop_of, serving, wait_until, wire_to
from dsmq import settings as config
from dsmq.broker import event_loop as worker
from dsmq.broker.reads import PendingRead
from dsmq.broker.states import WAITING
from dsmq.client import connect
from dsmq.errors import Full, ShuttingDown, StoreFailed, Unsure
from dsmq.server import Server
from dsmq.store.api import Found, ManyTopics, Message, Outcome, Put, Watched
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.resp import encode_request

# An asynchronous store and a failing one


class LaterStore(SQLiteStore):
    """Answers each call later, from another thread."""

    def __init__(self) -> None:
        super().__init__(600_000)
        self.threads = ThreadPoolExecutor(4)

    def start(self, on_messages: Callable[[set[bytes]], None], on_unusable: Callable[[str], None]) -> None:
        self.on_messages = on_messages

    def append(self, puts: Sequence[Put]) -> Future[list[Outcome]]:  # type: ignore[override]
        return self.threads.submit(self._append, puts)

    def append_together(self, puts: Sequence[Put], watched: Watched | None = None) -> Future[list[Outcome]]:  # type: ignore[override]
        return self.threads.submit(self._append, puts, watched)

    def _append(self, puts: Sequence[Put], watched: Watched | None = None) -> list[Outcome]:
        outcomes = super().append(puts, watched)
        self.on_messages({put[0] for put in puts})
        return outcomes

    def read(self, topic: bytes, after: int, count: int, max_bytes: int, wait_ms: int = 0) -> Future[list[Message]]:  # type: ignore[override]
        return self.threads.submit(super().read, topic, after, count, max_bytes)

    def latest(self, topic: bytes, after: int) -> Future[list[Message]]:  # type: ignore[override]
        return self.threads.submit(super().latest, topic, after)

    def close(self) -> None:
        self.threads.shutdown()
        super().close()


def test_asynchronous_store_blocks_connection_until_answer() -> None:
    settings = config.load(kind=config.EmbeddedSettings, port=0)
    with Server(settings, LaterStore()) as server, wire_to(server) as wire, wire_to(server) as waiter:  # type: ignore[arg-type]
        waiter.send(encode_request(b"GETWAIT", b"t", b"60000") + encode_request(b"GET", b"t"))
        wait_until(lambda: server.status.waiting() == 1)
        requests = [encode_request(b"PUT", b"t", b"%d" % number) for number in range(50)]
        requests += [
            encode_request(b"PUT", b"", b"x"),
            encode_request(b"GET", b"t"),
            encode_request(b"GETLATEST", b"t"),
        ]
        wire.send(b"".join(requests))
        assert [wire.receive() for _ in range(50)] == list(range(1, 51))
        assert wire.receive().code == "BADREQUEST"  # type: ignore[union-attr]
        assert [wire.receive(), wire.receive()] == [b"0", b"49"]
        assert [waiter.receive(), waiter.receive()] == [b"0", b"1"]
        # Requests that waited for an earlier put were run twice, but count once.
        counts = server.status.counters().commands
        assert [counts[name] for name in ("PUT", "GET", "GETLATEST", "GETWAIT")] == [51, 2, 1, 1]


@pytest.mark.parametrize("outcome", [None, StoreFailed("the store has failed")], ids=["done", "failed"])
def test_stale_wake_up_does_not_answer_for_the_store(outcome: StoreFailed | None) -> None:
    store, answer = SQLiteStore(600_000), Future[None]()
    store.groups.done = lambda *_: answer  # type: ignore[method-assign]
    with serving(store) as server, wire_to(server) as wire:
        wire.call("PING")
        wire.send(encode_request(b"DONE", b"t", b"workers", b"1", b"1"))
        (connection,) = loop_of(server).connections
        wait_until(lambda: connection.state is WAITING)
        # As if a put had woken an earlier read of this connection just before its end.
        loop_of(server).post(connection.reads.wake)
        served = threading.Event()
        loop_of(server).post(served.set)
        assert served.wait(SOON)
        assert connection.state is WAITING
        if outcome is None:
            answer.set_result(None)
            assert wire.receive() == "OK"
        else:
            answer.set_exception(outcome)
            assert wire.receive().code == "STORE"  # type: ignore[union-attr]


class SlowStore(SQLiteStore):
    """Answers reads when the test sets their results."""

    def __init__(self) -> None:
        super().__init__(600_000)
        self.reads: list[Future[list[Message]]] = []

    def read(self, topic: bytes, after: int, count: int, max_bytes: int, wait_ms: int = 0) -> Future[list[Message]]:  # type: ignore[override]
        self.reads.append(Future())
        return self.reads[-1]


def test_unanswered_read_gets_error_at_stop() -> None:
    store = SlowStore()
    with serving(store) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.send(encode_request(b"GET", b"t"))
        wait_until(lambda: bool(store.reads))
        assert server.stop() == []
        # An empty reply would mean that there is no message.
        assert isinstance(wire.receive(), ShuttingDown)
        assert wire.ended()


class SlowStart(SQLiteStore):
    """Finds the last messages when the test tells it to and answers reads afterwards."""

    def __init__(self) -> None:
        super().__init__(600_000)
        self.starts: list[Future[tuple[int, int]]] = []
        self.fetched: list[Callable[[], None]] = []

    def go_back(self, *arguments: Any) -> Future[tuple[int, int]]:  # type: ignore[override]
        self.starts.append(Future())
        return self.starts[-1]

    def read_many(self, wanted: ManyTopics, wait_ms: int = 0) -> Future[Found]:  # type: ignore[override]
        answer: Future[Found] = Future()
        self.fetched.append(lambda: answer.set_result(super(SlowStart, self).read_many(wanted, wait_ms)))
        return answer


def test_start_found_twice_begins_only_one_read() -> None:
    store = SlowStart()
    with serving(store) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        assert wire.call("PUT", "t", "x") == 1
        wire.send(encode_request(*b"MREAD LAST 1 WAIT 1 TOPICS t*".split()))
        # It is asked once at first and again at the end of the wait.
        wait_until(lambda: len(store.starts) == 2)
        store.starts[0].set_result((0, 0))
        wait_until(lambda: len(store.fetched) == 1)
        store.starts[1].set_result((0, 0))
        store.fetched[0]()
        reply = wire.receive()
        assert isinstance(reply, list)
        assert reply[5] == b"x"


def test_asynchronous_store_answers_transaction() -> None:
    with serving(LaterStore()) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        requests = ("PUT t 1", "MULTI", "PUT t 2", "GET t", "PUT t 3", "GET t", "GET t", "EXEC", "PUT t 4")
        wire.send("".join(f"{request}\r\n" for request in requests).encode())
        replies = [wire.receive() for _ in requests]
        assert replies == [1, "OK", *["QUEUED"] * 5, [2, b"1", 3, b"2", b"3"], 4]


class PickyStore(SQLiteStore):
    """Refuses a message immediately and answers other puts when the test sets their results."""

    def __init__(self) -> None:
        super().__init__(600_000)
        self.answers: list[Future[list[Outcome]]] = []

    def append(self, puts: Sequence[Put]) -> Future[list[Outcome]]:  # type: ignore[override]
        if any(body == b"refused" for _, body, _ in puts):
            raise Full("no room")
        self.answers.append(Future())
        return self.answers[-1]


def test_refusal_does_not_overtake_reply_to_an_earlier_put() -> None:
    store = PickyStore()
    with serving(store) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.send(b"".join([encode_request(b"PUT", b"t", body) for body in (b"1", b"refused", b"2")]))
        wait_until(lambda: len(store.answers) == 2)
        store.answers[1].set_result([2])
        store.answers[0].set_result([1])
        assert wire.receive() == 1
        assert isinstance(wire.receive(), Full)
        assert wire.receive() == 2
        assert wire.call("PING") == "PONG"


def test_requests_after_put_with_unknown_outcome_are_not_run() -> None:
    store = PickyStore()
    with serving(store) as server, wire_to(server) as wire, wire_to(server) as other:  # type: ignore[arg-type]
        wire.send(encode_request(b"PUT", b"t", b"1"))
        wait_until(lambda: len(store.answers) == 1)
        wire.send(encode_request(b"PUT", b"t", b"2"))
        store.answers[0].set_result([Unsure("no answer")])
        assert isinstance(wire.receive(), Unsure)
        assert wire.ended()
        assert other.call("PING") == "PONG"
        assert len(store.answers) == 1


class LimitedStore(SQLiteStore):
    """Refuses several puts together and answers single ones when the test sets their results."""

    def __init__(self) -> None:
        super().__init__(600_000)
        self.answers: list[Future[list[int]]] = []

    def append(self, puts: Sequence[Put]) -> Future[list[int]]:  # type: ignore[override]
        if len(puts) > 1:
            raise Full("no room")
        self.answers.append(Future())
        return self.answers[-1]


def test_puts_retried_one_by_one_are_answered_later() -> None:
    store = LimitedStore()
    with serving(store) as server, wire_to(server) as wire, wire_to(server) as other:  # type: ignore[arg-type]
        wire.send(encode_request(b"PUT", b"t", b"x") * 3 + encode_request(b"PING"))
        wait_until(lambda: len(store.answers) == 3)
        for number, answer in enumerate(store.answers, 1):
            answer.set_result([number])
            assert wire.receive() == number
            assert other.call("PING") == "PONG"
        assert wire.receive() == "PONG"


def test_late_store_answer_gives_no_second_reply() -> None:
    store = SlowStore()
    with Server(config.load(kind=config.EmbeddedSettings, port=0), store) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        for late in (StoreFailed("late"), [Message(1, 1, 0, b"late", 1)]):
            store.reads.clear()
            wire.send(encode_request(b"GETWAIT", b"t", b"%d" % round(UNIT * 1000)))
            # At the end of the wait, the store is asked once more.
            wait_until(lambda: len(store.reads) == 2)
            store.reads[1].set_result([])
            assert wire.receive() is None
            if isinstance(late, list):
                store.reads[0].set_result(late)
            else:
                store.reads[0].set_exception(late)
            assert [wire.call("ECHO", "1"), wire.call("ECHO", "2")] == [b"1", b"2"]


def test_wait_ends_with_message_found_by_late_store() -> None:
    store = SlowStore()
    with serving(store) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.send(encode_request(b"GETWAIT", b"t", b"%d" % round(UNIT * 1000)))
        wait_until(lambda: len(store.reads) == 1)
        store.reads[0].set_result([])
        # It is asked once after the reader has registered for new messages and again at the end of the wait.
        wait_until(lambda: len(store.reads) == 2)
        store.reads[1].set_result([])
        wait_until(lambda: len(store.reads) == 3)
        store.reads[2].set_result([Message(1, 1, 0, b"x", 1)])
        assert wire.receive() == b"x"


def test_half_closed_reader_ends_before_the_store_answers() -> None:
    store = SlowStore()
    with serving(store) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: bool(store.reads))
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.ended()
        store.reads[0].set_result([])
        wait_until(lambda: server.status.connections() == 0)


class LateStart(SQLiteStore):
    """Knows its last id when the test tells it."""

    def __init__(self) -> None:
        super().__init__(600_000)
        self.starts: list[Future[int]] = []

    def start_id(self) -> Future[int]:  # type: ignore[override]
        self.starts.append(Future())
        return self.starts[-1]


def test_wait_that_begins_after_a_half_close_ends_at_once() -> None:
    store = LateStart()
    with serving(store) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wire.socket.shutdown(socket.SHUT_WR)
        wait_until(lambda: bool(store.starts))
        wait_until(lambda: all(one.transport.eof_received for one in loop_of(server).connections))
        store.starts[0].set_result(0)
        assert wire.ended()


def test_read_that_does_not_wait_gets_no_answer_from_a_mirror_that_may_lag() -> None:
    read = PendingRead(b"t", 0, 1, 1, 0, cast("Any", None))
    store = cast("Any", SimpleNamespace(read=lambda *_: ["fresh"]))
    assert read.fetch_once(store, {(b"t", 0, 1, 1): ["of a waiting reader"]}) == ["fresh"]
    read.registered = True
    assert read.fetch_once(store, {(b"t", 0, 1, 1): ["of a waiting reader"]}) == ["of a waiting reader"]


def test_failed_store_answer_is_reported() -> None:
    store = SlowStore()
    with Server(config.load(kind=config.EmbeddedSettings, port=0), store) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.send(encode_request(b"GET", b"t") + encode_request(b"PING"))
        wait_until(lambda: bool(store.reads))
        store.reads[0].set_exception(OSError("the disk is gone"))
        assert str(wire.receive()) == "the disk is gone"
        assert wire.receive() == "PONG"


def test_invalid_line_after_pending_put_is_refused() -> None:
    settings = config.load(kind=config.EmbeddedSettings, port=0)
    with Server(settings, LaterStore()) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.send(encode_request(b"PUT", b"t", b"x") + b"GET / HTTP/1.1\r\nPUT t evil\r\n")
        assert wire.receive() == 1
        assert wire.receive().code == "PROTOCOL"  # type: ignore[union-attr]
        assert wire.ended()
        assert server.status.totals().messages == 1


class FailingStore(SQLiteStore):
    """Fails to store messages with certain bodies."""

    def append(self, puts: Sequence[Put]) -> list[int]:
        for put in puts:
            if put[1] == b"full":
                raise Full("no room")
            if put[1] == b"defect":
                raise ZeroDivisionError
            if put[1] == b"broken":
                raise StoreFailed("SQLite: disk I/O error")
        return super().append(puts)


def test_unstorable_message_fails_alone() -> None:
    settings = config.load(kind=config.EmbeddedSettings, port=0)
    with Server(settings, FailingStore(600_000)) as server, wire_to(server) as wire:
        wire.send(b"".join(encode_request(b"PUT", b"t", body) for body in (b"1", b"full", b"2", b"broken", b"3")))
        replies = [wire.receive() for _ in range(5)]
        assert [getattr(reply, "code", reply) for reply in replies] == [1, "FULL", 2, "STORE", 3]
        assert [wire.call("GET", "t") for _ in range(4)] == [b"1", b"2", b"3", None]
        assert wire.error("PUT", "t", "full") == "FULL"
        assert wire.error("PUT", "t", "defect") == "STORE"
        assert wire.call("PUT", "t", "4") == 4
        assert server.status.counters().failures == 1


class FailingFlush(SQLiteStore):
    """Fails to write its buffer while there is an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(600_000)
        self.error: Exception | None = error
        self.failed = threading.Event()

    def flush(self) -> None:
        if self.error:
            self.failed.set()
            raise self.error
        super().flush()


@pytest.mark.parametrize("error", [Full("no room"), ZeroDivisionError()])
def test_failed_flush_closes_no_connection(error: Exception) -> None:
    store = FailingFlush(error)
    with serving(store) as server, wire_to(server) as wire:
        assert wire.call("PUT", "t", "1") == 1
        assert store.failed.wait(SOON)
        assert wire.call("GET", "t") == b"1"
        store.error = None
        assert wire.call("PUT", "t", "2") == 2


def test_worker_stops_busy_polling_on_busy_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    yields = []

    def give_it_away() -> None:
        yields.append(1)
        time.sleep(UNIT / 50)

    monkeypatch.setattr(worker, "yield_processor", give_it_away)
    monkeypatch.setattr(worker, "LONG_YIELD_PAUSE_SECONDS", 100 * SOON)
    # With the default, 0.1 ms, polling may end before it yields.
    with serving(busy_poll_microseconds=100_000) as server, wire_to(server) as wire:
        wait_until(lambda: wire.call("PING") == "PONG" and bool(yields))
        assert [wire.call("ECHO", number) for number in range(20)] == [b"%d" % number for number in range(20)]
    assert len(yields) == 1


def test_idle_server_uses_no_processor() -> None:
    with daemon() as server, connect(port=server.port) as mq:
        mq.put("t", "hello")
        stat = Path(f"/proc/{server.process.pid}/stat")

        def ticks() -> int:
            """Return the processor time used, in hundredths of a second."""
            return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))

        def is_idle() -> bool:
            before = ticks()
            assert mq.get_wait("nothing", timeout=UNIT * 4) == ""
            return ticks() - before < UNIT * 4 * 100 / 4

        # On a busy machine, the rest of the start may take long.
        wait_until(is_idle)
