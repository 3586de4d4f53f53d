"""WATCH and UNWATCH: a transaction that runs only if topics got no message in the meantime."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from conftest import HOST, SOON, Wire, serving, wait_until, wire_to
from dsmq.errors import ReplyError
from dsmq.server import Server
from dsmq.wire.limits import MAX_NAMES
from dsmq.wire.resp import encode_request
from engine import Engine

pytestmark = pytest.mark.embedded("topics of a shared store can't be watched")


def transact(wire: Wire, *requests: str) -> object:
    wire.send(b"".join(encode_request(*request.encode().split()) for request in ("MULTI", *requests, "EXEC")))
    *replies, found = [wire.receive() for _ in range(len(requests) + 2)]
    assert replies == ["OK", *["QUEUED"] * len(requests)]
    return found


@pytest.fixture
def other(server: Server) -> Iterator[Wire]:
    with wire_to(server) as wire:
        yield wire


def test_transaction_runs_if_no_watched_topic_changed(wire: Wire, other: Wire) -> None:
    assert other.call("PUT", "t", "x") == 1
    assert wire.call("watch", "t", "u", "t") == "OK"
    assert other.call("PUT", "v", "x") == 2
    assert transact(wire, "PUT t y", "GET u") == [3, None]


@pytest.mark.parametrize("requests", [["PUT t y", "PUT v y"], ["READ t 0"], []], ids=repr)
@pytest.mark.parametrize("version", [2, 3])
def test_transaction_runs_nothing_if_a_watched_topic_changed(
    server: Server, wire: Wire, other: Wire, requests: list[str], version: int
) -> None:
    wire.send(b"HELLO %d\r\n" % version)
    wire.socket.recv(65536)
    assert wire.call("WATCH", "u", "t") == "OK"
    assert other.call("PUT", "t", "x") == 1
    wire.send(encode_request(b"MULTI") + b"".join(encode_request(*request.encode().split()) for request in requests))
    assert [wire.receive() for _ in range(len(requests) + 1)] == ["OK", *["QUEUED"] * len(requests)]
    wire.send(encode_request(b"EXEC"))
    null = b"_\r\n" if version == 3 else b"*-1\r\n"
    assert wire.socket.recv(100) == null
    assert server.status.totals().stored == 1
    assert server.status.counters().puts_refused == {}
    assert server.status.counters().errors == {}
    # EXEC has ended the watch.
    assert transact(wire, "PUT t y") == [2]


def test_watch_notices_own_puts_and_lasts_from_its_first_request(wire: Wire) -> None:
    assert wire.call("WATCH", "t") == "OK"
    assert wire.call("PUT", "t", "x") == 1
    assert wire.call("WATCH", "t", "u") == "OK"
    assert transact(wire, "PUT u y") is None


def test_put_pipelined_before_watch_precedes_it(wire: Wire) -> None:
    wire.send(b"PUT t x\r\nWATCH t\r\nMULTI\r\nPUT t y\r\nEXEC\r\n")
    assert [wire.receive() for _ in range(5)] == [1, "OK", "OK", "QUEUED", [2]]


def test_repeated_put_does_not_change_a_topic(wire: Wire, other: Wire) -> None:
    assert other.call("PUT", "t", "x", "KEY", "me", 1) == 1
    assert wire.call("WATCH", "t") == "OK"
    assert other.call("PUT", "t", "x", "KEY", "me", 1) == 1
    assert transact(wire, "PUT t y") == [2]


def test_refused_put_does_not_change_a_topic() -> None:
    with serving(max_stored_messages_per_topic=1) as server, wire_to(server) as wire, wire_to(server) as other:
        assert other.call("PUT", "t", "x") == 1
        assert wire.call("WATCH", "t") == "OK"
        assert other.error("PUT", "t", "y") == "FULL"
        assert transact(wire, "PUT u y") == [2]


@pytest.mark.parametrize("request_", ["UNWATCH", "DISCARD", "RESET", "aborted EXEC", "EXEC"])
def test_watch_ends(wire: Wire, other: Wire, request_: str) -> None:
    assert wire.call("WATCH", "t") == "OK"
    if request_ != "UNWATCH":
        assert wire.call("MULTI") == "OK"
    if request_ == "aborted EXEC":
        assert wire.error("NOSUCH") == "UNKNOWN"
        assert wire.error("EXEC") == "EXECABORT"
    else:
        assert not isinstance(wire.call(request_), ReplyError)
    assert other.call("PUT", "t", "x") == 1
    assert transact(wire, "PUT t y") == [2]


def test_watched_topic_that_only_expires_is_unchanged(wire: Wire, other: Wire) -> None:
    assert other.call("PUT", "t", "x") == 1
    assert wire.call("WATCH", "t") == "OK"
    assert other.call("PURGE", "t") == 1
    assert transact(wire, "PUT t y") == [2]


def test_unwatch_in_transaction_has_no_effect(wire: Wire, other: Wire) -> None:
    assert wire.call("WATCH", "t") == "OK"
    assert transact(wire, "UNWATCH", "PUT t y") == ["OK", 1]
    assert wire.call("WATCH", "t") == "OK"
    assert other.call("PUT", "t", "x") == 2
    assert transact(wire, "UNWATCH", "PUT t y") is None


def test_lowered_limit_runs_nothing_of_a_watching_transaction(server: Server, wire: Wire) -> None:
    assert wire.call("WATCH", "t") == "OK"
    assert wire.call("MULTI") == "OK"
    assert wire.call("PUT", "t", "xx") == "QUEUED"
    server.context.settings = server.context.settings.model_copy(update={"max_message_bytes": 1})
    assert wire.error("EXEC") == "TOOBIG"
    assert transact(wire, "PUT t y") == [1]


def test_invalid_watch_is_refused(wire: Wire) -> None:
    assert [wire.error("WATCH", *topics) for topics in ([], [""], ["t", "a*"], [b"\xff"])] == ["BADREQUEST"] * 4
    assert wire.error("WATCH", "x" * 600) == "TOOBIG"
    assert wire.call("MULTI") == "OK"
    assert wire.error("WATCH", "t") == "BADREQUEST"
    assert wire.error("EXEC") == "EXECABORT"


def test_watched_topics_are_limited_and_count_as_memory(server: Server, wire: Wire) -> None:
    memory = server.context.usage.requests
    topics = [f"{number:064}" for number in range(MAX_NAMES)]
    for at in range(0, MAX_NAMES, 50):
        assert wire.call("WATCH", *topics[at : at + 50]) == "OK"
    assert memory.total > 64 * MAX_NAMES
    assert wire.error("WATCH", "t") == wire.error("WATCH", topics[0], "t") == "TOOBIG"
    assert wire.call("WATCH", *topics[:50]) == "OK"
    assert wire.call("UNWATCH") == "OK"
    wait_until(lambda: memory.total == 0)
    for number in range(127):
        assert wire.call("WATCH", f"{number:0512}") == "OK"
    assert wire.call("WATCH", "x" * 512) == "OK"
    assert wire.error("WATCH", "t") == "TOOBIG"
    wire.close()
    wait_until(lambda: memory.total == 0)


def test_topics_of_a_shared_store_cannot_be_watched(shared_node: Engine) -> None:
    store = f"nats://{HOST}:{shared_node.nodes[0].port}"
    with Server(port=0, store=store, store_stream="watch", store_replicas=1) as server, wire_to(server) as wire:
        assert wire.error("WATCH", "t") == "BADREQUEST"
        assert wire.call("UNWATCH") == "OK"
        assert isinstance(transact(wire, "PUT t y"), list)


# Libraries

WRITERS, ROUNDS = 4, 25


def append_number(client: redis.Redis, topic: str) -> None:
    """Put the number that follows the last one."""

    def append(pipe: redis.client.Pipeline) -> None:
        found = pipe.execute_command("READ", topic, 0, "LATEST")
        pipe.multi()
        pipe.execute_command("PUT", topic, int(found[3]) + 1 if found else 1)

    client.transaction(append, topic)


@pytest.mark.parametrize("io_threads", [1, 3])
def test_redis_py_transaction_helper_loses_no_update(io_threads: int) -> None:
    def work(_: int) -> None:
        with redis.Redis(port=server.port) as client:
            for _ in range(ROUNDS):
                append_number(client, "t")

    with serving(io_threads=io_threads) as server, ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(work, range(WRITERS), timeout=SOON * 3))
        with wire_to(server) as wire:
            found = wire.call("READ", "t", 0, "COUNT", 1000)
            assert isinstance(found, list)
            assert found[3::5] == [b"%d" % number for number in range(1, WRITERS * ROUNDS + 1)]
