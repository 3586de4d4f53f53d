"""MULTI and EXEC."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import UNIT, Wire, as_map, serving, wait_for_stored, wait_until, wire_to
from dsmq import settings as config
from dsmq.broker import transactions
from dsmq.client import connect
from dsmq.errors import ReplyError
from dsmq.server import Server
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.resp import encode_request
from security import ADMIN


def transact(wire: Wire, *requests: tuple[object, ...]) -> object:
    """Queue requests and return the reply to EXEC."""
    assert wire.call("MULTI") == "OK"
    for request in requests:
        assert wire.call(*request) == "QUEUED"  # type: ignore[arg-type]
    return wire.call("EXEC")


def codes(replies: object) -> list[object]:
    assert isinstance(replies, list)
    return [reply.code if isinstance(reply, ReplyError) else reply for reply in replies]


def test_exec_runs_queued_requests_in_order(server: Server, wire: Wire) -> None:
    assert wire.call("MULTI") == "OK"
    for words in (["PUT", "t", "a"], ["get", "t"], ["put", "t", "b"], ["GET", "t"], ["GET", "t"], ["PING"]):
        assert wire.call(*words) == "QUEUED"
    assert server.status.totals().stored == 0
    assert wire.call("EXEC") == [1, b"a", 2, b"b", None, "PONG"]
    assert wire.call("PUT", "t", "c") == 3
    assert server.status.counters().commands["EXEC"] == 1
    assert server.status.counters().commands["PUT"] == 3


def test_empty_transaction_replies_empty_array(wire: Wire) -> None:
    assert transact(wire) == []
    assert wire.call("PING") == "PONG"


def test_read_does_not_see_later_puts_of_its_transaction(wire: Wire) -> None:
    assert wire.call("PUT", "t", "before") == 1
    replies = transact(
        wire,
        ("READ", "t", 0, "LATEST"),
        ("GETLATEST", "t"),
        ("PUT", "t", "a"),
        ("READ", "t", 0),
        ("READ", "t", 0, "LATEST"),
        ("READ", "u", 0),
        ("PUT", "u", "x"),
        ("GETLATEST", "t"),
        ("PUT", "t", "b"),
        ("READ", "t", 0),
        ("READ", "u", 0),
        ("GETLATEST", "t"),
    )
    found = [reply[3::5] if isinstance(reply, list) else reply for reply in replies]  # type: ignore[attr-defined]
    before = [[b"before"], b"before"]
    assert found == [
        *before, 2, [b"before", b"a"], [b"a"], [], 3, b"a", 4, [b"before", b"a", b"b"], [b"x"], b"b"
    ]  # fmt: skip


def test_get_latest_below_id_finds_written_messages() -> None:
    store = SQLiteStore(600_000)
    store.append([(b"t", b"%d" % number, None) for number in range(1, 300)])
    for _ in range(2):
        for below in (2, 128, 129, 150, 299, 300):
            [found] = store.latest(b"t", 0, below)
            assert found.id == below - 1
        assert store.latest(b"t", 0, 1) == store.latest(b"t", 5, 6) == []
        store.flush()
    store.close()


def test_blocking_reads_do_not_wait_in_transaction(server: Server, wire: Wire) -> None:
    assert transact(wire, ("GETWAIT", "t", 86_400_000), ("READ", "t", 0, "WAIT", 86_400_000)) == [None, []]
    # After EXEC, they wait again.
    wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
    wait_until(lambda: server.status.waiting() == 1)
    with wire_to(server) as writer:
        assert writer.call("PUT", "t", "x") == 1
    assert wire.receive() == b"x"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["NOSUCH"], "UNKNOWN"),
        ([""], "UNKNOWN"),
        (["PUT", "t"], "BADREQUEST"),
        (["PUT", "", "x"], "BADREQUEST"),
        (["PUT", "t", "x", "KEY", "me", "one"], "BADREQUEST"),
        (["PUT", "t", "x" * 101], "TOOBIG"),
        (["PUT", "t", "x", "RUN", "another"], "EPOCH"),
        (["READ", "t", "x"], "BADREQUEST"),
        (["READ", "t", "0", "COUNT", "0"], "BADREQUEST"),
        (["GETWAIT", "t", "x"], "BADREQUEST"),
        (["GET", b"\xff"], "BADREQUEST"),
        (["multi"], "BADREQUEST"),
        (["HELLO", "3"], "BADREQUEST"),
        (["AUTH", "x"], "BADREQUEST"),
        (["QUIT"], "BADREQUEST"),
        (["SHUTDOWN"], "BADREQUEST"),
    ],
)
def test_invalid_request_aborts_transaction(words: list[str], code: str) -> None:
    with serving(max_message_bytes=100) as server, wire_to(server) as wire:
        assert wire.call("MULTI") == "OK"
        assert wire.call("PUT", "t", "x") == "QUEUED"
        assert wire.error(*words) == code
        assert wire.call("PUT", "t", "x") == "QUEUED"
        assert wire.error("EXEC") == "EXECABORT"
        assert server.status.totals().stored == 0
        assert wire.call("PUT", "t", "x") == 1
        assert transact(wire, ("PUT", "t", "x")) == [2]


def test_discard_drops_queued_requests(server: Server, wire: Wire) -> None:
    assert wire.call("MULTI") == "OK"
    assert wire.call("PUT", "t", "x") == "QUEUED"
    assert wire.call("DISCARD") == "OK"
    assert wire.error("EXEC") == wire.error("DISCARD") == "BADREQUEST"
    assert server.status.totals().stored == 0
    # Even after a refused request.
    assert wire.call("MULTI") == "OK"
    wire.error("NOSUCH")
    assert wire.call("DISCARD") == "OK"
    assert transact(wire, ("PUT", "t", "x")) == [1]


@pytest.mark.parametrize(
    ("count", "size"), [(transactions.MAX_QUEUED_REQUESTS, 1), (8, transactions.MAX_QUEUED_BYTES // 8 - 4)], ids=repr
)
def test_transaction_size_is_limited(server: Server, wire: Wire, count: int, size: int) -> None:
    body, memory = "x" * size, server.context.usage.requests
    assert transact(wire, *[("PUT", "t", body)] * count) == list(range(1, count + 1))
    assert wire.call("MULTI") == "OK"
    for _ in range(count):
        assert wire.call("PUT", "t", body) == "QUEUED"
    wait_until(lambda: memory.total >= count * size)
    assert wire.error("PUT", "t", "x") == "TOOBIG"
    wait_until(lambda: memory.total == 0)
    assert wire.call("PUT", "t", body) == "QUEUED"
    assert memory.total == 0
    assert wire.error("EXEC") == "EXECABORT"
    wait_until(lambda: server.status.totals().stored == count)


def test_transaction_over_storage_limit_stores_nothing() -> None:
    with serving(max_stored_messages=3) as server, wire_to(server) as wire:
        assert wire.call("PUT", "t", "x") == 1
        wait_for_stored(server, 1)
        replies = transact(wire, ("PUT", "t", "y"), ("GET", "t"), *[("PUT", "t", "z")] * 2)
        assert codes(replies) == ["FULL", b"x", "FULL", "FULL"]
        assert server.status.totals().stored == 1
        assert server.status.counters().puts_refused == {"FULL": 3}
        assert transact(wire, ("PUT", "t", "y"), ("PUT", "t", "y")) == [2, 3]


def test_duplicate_put_replies_first_id_and_forgotten_one_aborts(server: Server, wire: Wire) -> None:
    key = ("KEY", "me")
    assert wire.call("PUT", "t", "x", *key, 1) == 1
    assert wire.call("PUT", "other", "x") == 2
    replies = transact(
        wire, ("PUT", "t", "x", *key, 1), ("PUT", "t", "y", *key, 2), ("READ", "t", 0), ("PUT", "t", "y", *key, 2)
    )
    assert isinstance(replies, list)
    assert (replies[:2], replies[2][3::5], replies[3]) == ([1, 3], [b"x", b"y"], 3)
    # Put often enough to make the server forget this producer's first puts.
    for first in (1000, 2000, 3000):
        puts = [encode_request(b"PUT", b"t", b"x", b"KEY", b"me", b"%d" % seq) for seq in range(first, first + 1000)]
        wire.send(b"".join(puts))
        assert [wire.receive() for _ in puts] == list(range(first - 996, first + 4))
    wait_for_stored(server, 3003)
    assert codes(transact(wire, ("PUT", "t", "z"), ("PUT", "t", "z", *key, 0))) == ["FORGOTTEN"] * 2
    assert server.status.totals().stored == 3003


def test_limit_lowered_before_exec_refuses_all_puts(server: Server, wire: Wire) -> None:
    assert wire.call("MULTI") == "OK"
    for body in ("x", "xx"):
        assert wire.call("PUT", "t", body) == "QUEUED"
    server.context.settings = server.context.settings.model_copy(update={"max_message_bytes": 1})
    assert codes(wire.call("EXEC")) == ["TOOBIG"] * 2
    assert server.status.totals().stored == 0


def test_transaction_puts_wake_readers_of_all_workers() -> None:
    with serving(io_threads=2) as server, wire_to(server) as wire, wire_to(server) as one, wire_to(server) as two:
        for reader in (one, two):
            reader.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.status.waiting() == 2)
        assert transact(wire, ("PUT", "t", "x")) == [1]
        assert one.receive() == two.receive() == b"x"


def test_pipelined_transaction_keeps_order_with_other_puts(wire: Wire) -> None:
    requests = ("PUT t a", "MULTI", "PUT t b", "READ t 0", "EXEC", "PUT t c", "GET t")
    wire.send("".join(request + "\r\n" for request in requests).encode())
    replies = [wire.receive() for _ in requests]
    assert replies[:4] == [1, "OK", "QUEUED", "QUEUED"]
    found = replies[4]
    assert isinstance(found, list)
    assert found[0] == 2
    assert found[1][3::5] == [b"a", b"b"]  # type: ignore[index]
    assert replies[5:] == [3, b"a"]


@pytest.mark.slow
def test_long_exec_reply_does_not_block_other_clients() -> None:
    with serving(max_unread_reply_bytes=65_536) as server, wire_to(server) as wire, wire_to(server) as slow:
        assert wire.call("PUT", "t", "x" * 100_000) == 1
        read = encode_request(b"READ", b"t", b"0")
        slow.send(encode_request(b"MULTI") + read * 500 + encode_request(b"EXEC") + encode_request(b"PING"))
        sent = 0
        while not sent or sent != server.status.counters().bytes_out:
            sent = server.status.counters().bytes_out
            time.sleep(UNIT)
            assert wire.call("PING") == "PONG"
            assert server.context.usage.replies.total < 65_536 + 100_100
        # The kernel has buffered some of the 50 MB.
        assert sent < 20_000_000
        data = b""
        while not data.endswith(b"+PONG\r\n"):
            data += slow.socket.recv(10_000_000)
        assert data.startswith(b"+OK\r\n" + b"+QUEUED\r\n" * 500 + b"*500\r\n*5\r\n:1\r\n:1\r\n:")
        assert data.count(b"x" * 100_000) == 500


def test_stop_during_exec_ends_reply_with_closing() -> None:
    with serving(max_unread_reply_bytes=65_536) as server, wire_to(server) as wire, wire_to(server) as slow:
        assert wire.call("PUT", "t", "x" * 100_000) == 1
        slow.send(encode_request(b"MULTI") + encode_request(b"PUT", b"t", b"y"))
        slow.send(encode_request(b"READ", b"t", b"0", b"COUNT", b"1") * 490)
        assert [slow.receive() for _ in range(492)] == ["OK", *["QUEUED"] * 491]
        slow.send(encode_request(b"EXEC"))
        wait_until(lambda: server.context.usage.replies.total > 65_536)
        with ThreadPoolExecutor(1) as stopper:
            stopped = stopper.submit(server.stop)
            wait_until(lambda: server.status.stopping)
            data = b"".join(iter(lambda: slow.socket.recv(1_000_000), b""))
            stopped.result()
    # The put is stored, but the array is incomplete.
    assert data.startswith(b"*491\r\n:2\r\n*5\r\n")
    assert data.endswith(b"-CLOSING the server is stopping\r\n")
    assert 0 < data.count(b"x" * 100_000) < 490


def test_forbidden_command_aborts_transaction(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("one read reader-0123456789\n")
    with serving(auth_token_file=str(file)) as server, wire_to(server) as wire:
        assert wire.error("MULTI") == "NOAUTH"
        assert wire.call("AUTH", "reader-0123456789") == "OK"
        assert transact(wire, ("GET", "t")) == [None]
        assert wire.call("MULTI") == "OK"
        assert wire.error("PUT", "t", "x") == "NOPERM"
        assert wire.error("EXEC") == "EXECABORT"


def test_reload_that_requires_a_token_aborts_transaction() -> None:
    settings: dict[str, object] = {}
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, **settings)  # noqa: E731
    with Server(load(), load=load) as server, wire_to(server) as wire:
        assert wire.call("MULTI") == "OK"
        assert wire.call("PUT", "t", "x") == "QUEUED"
        settings["auth_token"] = ADMIN
        server.reload()
        assert wire.ended()
        assert server.status.totals().stored == 0


def test_disconnect_before_exec_stores_nothing(server: Server, wire: Wire) -> None:
    assert wire.call("MULTI") == "OK"
    assert wire.call("PUT", "t", "x") == "QUEUED"
    wire.close()
    with connect(port=server.port) as mq:
        assert mq.put("t", "y") == 1


def test_map_in_transaction_is_a_resp3_map(wire: Wire) -> None:
    assert as_map(wire.call("HELLO", 2))[b"proto"] == 2
    [stats] = transact(wire, ("STATS", "t"))  # type: ignore[misc]
    assert as_map(stats)[b"messages"] == 0
