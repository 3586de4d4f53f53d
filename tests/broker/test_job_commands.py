"""TAKE, DONE, RETURN and EXTEND on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from conftest import SOON, Wire, serving, wait_for_stored, wait_until, wire_to
from dsmq.broker.connection import Connection
from dsmq.broker.jobs import PendingTake, TakeQueues
from dsmq.errors import ReplyError, StoreFailed
from dsmq.server import Server
from dsmq.store.group_figures import MAX_FIRST
from dsmq.store.groups import Job
from dsmq.wire.resp import encode_request
from security import READER, WRITER, wire_as


@pytest.fixture(autouse=True)
def all_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Describe all groups, however long that takes on a busy machine."""
    monkeypatch.setattr("dsmq.store.group_figures._FIRST_SECONDS", SOON)


def send(wire: Wire, text: str) -> None:
    wire.send(encode_request(*text.encode().split()))


def call(wire: Wire, text: str) -> object:
    send(wire, text)
    return wire.receive()


def ids(reply: object) -> list[object]:
    assert isinstance(reply, list), reply
    return reply[1::7]


def pairs(reply: object) -> dict[str, object]:
    assert isinstance(reply, list), reply
    return {name.decode(): value for name, value in zip(reply[::2], reply[1::2], strict=True)}


def code(reply: object) -> str:
    return reply.code if isinstance(reply, ReplyError) else str(reply)


@pytest.fixture(params=[1, 2], ids=["one I/O thread", "two I/O threads"])
def threaded(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving(io_threads=request.param) as server:
        yield server


def wait_in_turn(server: Server, stack: ExitStack, most: int, request: str) -> list[Wire]:
    """Return connections that wait for jobs, in order of arrival."""
    workers = []
    for number in range(1, most + 1):
        workers.append(stack.enter_context(wire_to(server)))
        send(workers[-1], request)
        wait_until(lambda number=number: server.status.waiting() == number)
    return workers


def assert_second_attempt(reply: object) -> None:
    """Assert that the reply to a TAKE is job 1, given for the second time."""
    assert isinstance(reply, list)
    assert (reply[1], reply[6]) == (1, 2)


def is_silent(wire: Wire) -> bool:
    """Return whether a wire has no reply yet although its connection has run everything that was sent before."""
    wire.socket.setblocking(False)
    try:
        wire.socket.recv(1)
    except BlockingIOError:
        return True
    finally:
        wire.socket.settimeout(SOON)
    return False


def test_job_has_seven_values(wire: Wire) -> None:
    wire.call("PUT", "t", "x")
    reply = call(wire, "TAKE t w 1000")
    assert isinstance(reply, list)
    assert (reply[:3], reply[4], reply[6]) == ([b"t", 1, 1], b"x", 1)
    assert 0 <= reply[3] < 600_000
    assert reply[3] + reply[5] == 600_000
    assert call(wire, "TAKE t w 1000") == []
    assert call(wire, "DONE t w 1 1") == "OK"


def test_long_bodies_arrive_whole(wire: Wire) -> None:
    body = "x" * 1_000_000
    wire.call("PUT", "t", body)
    wire.call("PUT", "t", "y")
    reply = call(wire, "TAKE t w 1000 COUNT 2")
    # The reply ends once its bodies add up to 256 KiB.
    assert isinstance(reply, list)
    assert reply[4::7] == [body.encode()]


@pytest.mark.parametrize(
    ("request_", "about"),
    [
        ("TAKE t w 0", "lease-ms"),
        ("TAKE t w 86400001", "lease-ms"),
        ("TAKE t w x", "lease-ms"),
        ("TAKE t w 1000 COUNT 0", "COUNT"),
        ("TAKE t w 1000 COUNT 1001", "COUNT"),
        ("TAKE t w 1000 WAIT 86400001", "WAIT"),
        ("TAKE t w 1000 TOKEN " + 65 * "x", "token"),
        ("TAKE t " + 65 * "w" + " 1000", "name"),
        ("DONE t w 1", "wrong number"),
        ("DONE t w 1 1 2", "attempt"),
        ("DONE t w 0 1", "id"),
        ("DONE t w 1 0", "attempt"),
        ("RETURN t w 1 1 x", "delay-ms"),
        ("EXTEND t w 1 1 0", "ms"),
        ("TAKE t w 1000 TOKEN", "TOKEN"),
        ("TAKE t w 1000 TOKEN x TOKEN y", "TOKEN"),
        ("TAKE t w 1000 COUNT TOKEN x", "COUNT"),
        ("TAKE t w 1000 token x TOKEN y", "TOKEN"),
        ("DONE t w EPOCH x", "EPOCH"),
        ("RETURN t w EPOCH x", "EPOCH"),
        ("EXTEND t w 1 1 EPOCH x", "ms"),
        ("DONE t w 1 1 EPOCH " + 65 * "x", "EPOCH"),
    ],
)
def test_invalid_request_is_refused(wire: Wire, request_: str, about: str) -> None:
    reply = call(wire, request_)
    assert code(reply) == "BADREQUEST"
    assert about in str(reply)


@pytest.mark.parametrize("request_", ["DONE t w 1 1", "RETURN t w 1 1", "RETURN t w 1 1 5", "EXTEND t w 1 1 1000"])
def test_job_of_another_epoch_is_refused(wire: Wire, server: Server, request_: str) -> None:
    store = server.context.store
    wire.call("PUT", "t", "x")
    call(wire, "TAKE t w 60000")
    reply = call(wire, f"{request_} EPOCH another")
    assert (code(reply), str(reply).split()[:2]) == ("EPOCH", [store.epoch, store.run])
    assert call(wire, f"{request_} epoch {store.epoch}") == "OK"
    assert call(wire, "MULTI") == "OK"
    assert call(wire, f"{request_} EPOCH another") == "QUEUED"
    assert [code(one) for one in cast("list[object]", call(wire, "EXEC"))] == ["EPOCH"]


def test_options_of_take_may_come_in_any_order(wire: Wire, server: Server) -> None:
    for body in "ab":
        wire.call("PUT", "t", body)
    wait_for_stored(server, 2)
    assert ids(call(wire, "TAKE t w 60000 token x COUNT 2 wait 10")) == [1, 2]
    assert ids(call(wire, "TAKE t w 60000 COUNT 2 TOKEN x")) == [1, 2]
    assert ids(call(wire, "TAKE t w 60000 COUNT 0 TOKEN x")) == [1, 2]
    assert ids(call(wire, "TAKE t w 60000 WAIT 1 COUNT 0 TOKEN y")) == []


@pytest.mark.parametrize("request_", ["DONE t w 1 1", "RETURN t w 1 1", "EXTEND t w 1 1 1000"])
def test_unknown_job_is_lost(wire: Wire, request_: str) -> None:
    assert code(call(wire, request_)) == "JOBLOST"


def test_workers_require_the_role_write(token_file: Path) -> None:
    with serving(auth_token_file=str(token_file)) as server, wire_as(server, READER) as wire:
        for request in ("TAKE t w 1000", "DONE t w 1 1", "RETURN t w 1 1", "EXTEND t w 1 1 1"):
            assert code(call(wire, request)) == "NOPERM"
    with serving(auth_token_file=str(token_file)) as server, wire_as(server, WRITER) as wire:
        assert call(wire, "TAKE t w 1000") == []


def test_put_wakes_one_worker_in_order_of_arrival(threaded: Server) -> None:
    with ExitStack() as stack:
        wire = stack.enter_context(wire_to(threaded))
        workers = wait_in_turn(threaded, stack, 4, "TAKE t* w 60000 WAIT 60000")
        for number, worker in enumerate(workers, 1):
            wire.call("PUT", f"t{number}", "x")
            assert ids(worker.receive()) == [number]
            wait_until(lambda number=number: threaded.status.waiting() == 4 - number)
            assert all(is_silent(other) for other in workers[number:])


def test_several_jobs_wake_as_many_workers(threaded: Server) -> None:
    with ExitStack() as stack:
        wire = stack.enter_context(wire_to(threaded))
        workers = wait_in_turn(threaded, stack, 3, "TAKE t w 60000 WAIT 60000")
        wire.send(encode_request(b"PUT", b"t", b"x") * 2)
        assert [ids(worker.receive()) for worker in workers[:2]] == [[1], [2]]
        assert is_silent(workers[2])


def test_turn_passes_on_when_a_waiting_worker_disconnects(threaded: Server) -> None:
    with ExitStack() as stack:
        wire = stack.enter_context(wire_to(threaded))
        workers = wait_in_turn(threaded, stack, 3, "TAKE t w 60000 WAIT 60000")
        workers[0].close()
        wait_until(lambda: threaded.status.waiting() == 2)
        wire.call("PUT", "t", "x")
        assert ids(workers[1].receive()) == [1]
        workers[2].close()
        wait_until(lambda: threaded.status.waiting() == 0)
        assert call(wire, "TAKE t w 60000") == []


def test_turn_skips_worker_that_ends_before_it_is_notified() -> None:
    posted: list[object] = []
    connection = cast("Any", SimpleNamespace(loop=SimpleNamespace(post=lambda call: posted.append(call.func.__self__))))
    queues = TakeQueues()
    takes = [PendingTake(b"t", 0, 1, 1, 1, cast("Any", None)) for _ in range(3)]
    for one in takes:
        one.is_first = queues.add(one, connection)
    for one in takes[:2]:
        queues.remove(one)
    assert posted == takes[1:]


def test_worker_that_does_not_wait_takes_no_job_from_waiting_worker(server: Server, wire: Wire) -> None:
    with ExitStack() as stack:
        [first] = wait_in_turn(server, stack, 1, "TAKE t w 60000 WAIT 60000")
        wire.send(encode_request(b"PUT", b"t", b"x") + encode_request(b"TAKE", b"t", b"w", b"1000"))
        assert wire.receive() == 1
        assert wire.receive() == []
        assert ids(first.receive()) == [1]


def test_repeated_take_gets_its_jobs_before_waiting_workers(threaded: Server) -> None:
    with ExitStack() as stack:
        wire = stack.enter_context(wire_to(threaded))
        call(wire, "PUT t x")
        first = call(wire, "TAKE t w 60000 TOKEN mine")
        [waiting] = wait_in_turn(threaded, stack, 1, "TAKE t w 60000 WAIT 60000 TOKEN other")
        for options in ("", "WAIT 60000 "):
            assert ids(call(wire, f"TAKE t w 60000 {options}TOKEN mine")) == ids(first)
        # It gets no others.
        call(wire, "DONE t w 1 1")
        assert call(wire, "TAKE t w 60000 TOKEN mine") == []
        call(wire, "PUT t y")
        assert ids(waiting.receive()) == [2]


def test_waiting_worker_waits_for_room_for_its_job() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(max_jobs_in_flight=1))
        wire = stack.enter_context(wire_to(server))
        workers = wait_in_turn(server, stack, 3, "TAKE t w 60000 WAIT 60000")
        wire.send(encode_request(b"PUT", b"t", b"x") * 2)
        assert ids(workers[0].receive()) == [1]
        assert all(is_silent(worker) for worker in workers[1:])
        assert call(workers[0], "DONE t w 1 1") == "OK"
        assert ids(workers[1].receive()) == [2]


def test_long_pattern_is_refused(wire: Wire) -> None:
    assert code(call(wire, "TAKE " + 600 * "*" + " w 1000")) == "TOOBIG"


def test_error_on_the_second_try_leaves_no_wait(server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second try follows registration, so that a put in between is not missed."""
    groups = server.context.store.groups
    assert groups is not None
    take, calls = groups.take, count()
    monkeypatch.setattr(groups, "take", lambda request: take(request) if next(calls) != 1 else fail())

    def fail() -> None:
        raise StoreFailed("a test")

    assert code(call(wire, "TAKE t w 60000 WAIT 60000")) == "STORE"
    assert server.status.waiting() == 0
    wire.call("PUT", "t", "x")
    assert ids(call(wire, "TAKE t w 60000 WAIT 60000")) == [1]


def test_put_while_the_store_has_yet_to_answer_is_not_missed(
    server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = server.context.store.groups
    assert groups is not None
    take, calls, answer = groups.take, count(), Future[list[Job] | None]()
    monkeypatch.setattr(groups, "take", lambda request: take(request) if next(calls) != 1 else answer)
    with ExitStack() as stack:
        worker = stack.enter_context(wire_to(server))
        send(worker, "TAKE t w 60000 WAIT 60000")
        wait_until(lambda: server.status.waiting() == 1)
        assert wire.call("PUT", "t", "x") == 1
        answer.set_result([])
        assert ids(worker.receive()) == [1]


def test_groups_wait_independently(server: Server, wire: Wire) -> None:
    with ExitStack() as stack:
        one = stack.enter_context(wire_to(server))
        other = stack.enter_context(wire_to(server))
        send(one, "TAKE t a 60000 WAIT 60000")
        send(other, "TAKE t b 60000 WAIT 60000")
        wait_until(lambda: server.status.waiting() == 2)
        wire.call("PUT", "t", "x")
        assert ids(one.receive()) == ids(other.receive()) == [1]


def test_returned_job_goes_to_a_waiting_worker(threaded: Server) -> None:
    with ExitStack() as stack:
        wire = stack.enter_context(wire_to(threaded))
        wire.call("PUT", "t", "x")
        assert ids(call(wire, "TAKE t w 60000")) == [1]
        workers = wait_in_turn(threaded, stack, 2, "TAKE t w 60000 WAIT 60000")
        assert call(wire, "RETURN t w 1 1 20") == "OK"
        assert_second_attempt(workers[0].receive())
        assert is_silent(workers[1])


def test_job_goes_to_a_waiting_worker_when_its_lease_ends(threaded: Server) -> None:
    with ExitStack() as stack:
        wire = stack.enter_context(wire_to(threaded))
        wire.call("PUT", "t", "x")
        assert ids(call(wire, "TAKE t w 60000")) == [1]
        [worker] = wait_in_turn(threaded, stack, 1, "TAKE t w 60000 WAIT 60000")
        assert call(wire, "EXTEND t w 1 1 50") == "OK"
        assert_second_attempt(worker.receive())


def test_job_goes_to_a_waiting_worker_when_a_repeated_take_has_shortened_its_lease(threaded: Server) -> None:
    with ExitStack() as stack:
        wire = stack.enter_context(wire_to(threaded))
        wire.call("PUT", "t", "x")
        assert ids(call(wire, "TAKE t w 600000 TOKEN mine")) == [1]
        [worker] = wait_in_turn(threaded, stack, 1, "TAKE t w 60000 WAIT 60000")
        assert ids(call(wire, "TAKE t w 50 TOKEN mine")) == [1]
        assert_second_attempt(worker.receive())


def test_wait_ends_with_an_empty_reply(wire: Wire) -> None:
    assert call(wire, "TAKE t w 1000 WAIT 1") == []
    assert call(wire, "TAKE t* w 1000 WAIT 1") == []


def test_waiting_workers_get_an_empty_reply_at_a_stop() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving())
        workers = wait_in_turn(server, stack, 2, "TAKE t w 60000 WAIT 60000")
        server.stop()
        assert [worker.receive() for worker in workers] == [[], []]


def test_failed_job_wakes_a_reader_of_its_topic() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(max_attempts=1, expiry_interval_seconds=0.05))
        wire, reader = stack.enter_context(wire_to(server)), stack.enter_context(wire_to(server))
        send(reader, "MREAD 0 WAIT 60000 TOPICS */failed")
        wait_until(lambda: server.status.waiting() == 1)
        wire.call("PUT", "t", "x")
        assert ids(call(wire, "TAKE t w 60000")) == [1]
        assert call(wire, "RETURN t w 1 1") == "OK"
        reply = reader.receive()
        assert isinstance(reply, list)
        assert (reply[1], reply[5]) == (b"t/failed", b"x")


def test_transaction_ends_a_job_with_its_result(wire: Wire) -> None:
    wire.call("PUT", "t", "x")
    assert ids(call(wire, "TAKE t w 60000")) == [1]
    assert call(wire, "MULTI") == "OK"
    assert call(wire, "PUT results y") == "QUEUED"
    assert call(wire, "DONE t w 1 1") == "QUEUED"
    assert call(wire, "EXEC") == [2, "OK"]


def test_take_is_refused_in_a_transaction(wire: Wire) -> None:
    assert call(wire, "MULTI") == "OK"
    assert code(call(wire, "TAKE t w 1000")) == "BADREQUEST"
    assert code(call(wire, "EXEC")) == "EXECABORT"


def test_too_many_waiting_workers_get_busy() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(max_waiting_readers=1, max_waiting_patterns=1))
        wire = stack.enter_context(wire_to(server))
        [first] = wait_in_turn(server, stack, 1, "TAKE t w 60000 WAIT 60000")
        assert code(call(wire, "TAKE t w 60000 WAIT 60000")) == "BUSY"
        wire.call("PUT", "t", "x")
        assert ids(first.receive()) == [1]


def test_worker_keeps_its_place_when_its_turn_comes() -> None:
    """Another client gets the place of the worker that has left, not the place of the next one."""
    with ExitStack() as stack:
        server = stack.enter_context(serving(max_waiting_readers=2))
        wire, reader = stack.enter_context(wire_to(server)), stack.enter_context(wire_to(server))
        first, second = wait_in_turn(server, stack, 2, "TAKE t w 60000 WAIT 60000")
        waiting = server.context.usage.waiting
        drop = waiting.drop

        def drop_and_claim(connection: Connection) -> None:
            drop(connection)
            # This is the earliest that another client can do so.
            waiting.claim(reader, 1)  # type: ignore[arg-type]

        waiting.drop = drop_and_claim  # type: ignore[method-assign]
        wire.call("PUT", "t", "x")
        assert ids(first.receive()) == [1]
        wire.call("PUT", "t", "y")
        assert ids(second.receive()) == [2]


# Figures


def test_stats_describe_groups_of_topic(wire: Wire, server: Server) -> None:
    assert not [name for name in pairs(wire.call("STATS", "t")) if ":" in name]
    for body in "abc":
        wire.call("PUT", "t", body)
    wait_for_stored(server, 3)
    call(wire, "TAKE t workers 60000 COUNT 2")
    call(wire, "TAKE t* workers 60000")
    call(wire, "DONE t workers 1 1")
    call(wire, "RETURN t workers 2 1 60000")
    with wire_to(server) as waiting:
        send(waiting, "TAKE t others:1 60000 COUNT 3")
        waiting.receive()
        send(waiting, "TAKE t others:1 60000 WAIT 60000")
        wait_until(lambda: pairs(wire.call("STATS", "t"))["others:1:waiting_workers"] == 1)
        found = pairs(wire.call("STATS", "t"))
    names = [name for name in found if name.startswith("workers:")]
    assert {name.removeprefix("workers:"): found[name] for name in names if found[name]} == {
        "waiting": 1,
        "again": 1,
        "taken": 2,
        "done": 1,
        "oldest_age_ms": found["workers:oldest_age_ms"],
    }
    assert (found["others:1:held"], found["others:1:waiting"]) == (3, 0)


def test_info_describes_groups(wire: Wire) -> None:
    hostile = "t\r\ngroup1:x\u2028*"
    wire.call("PUT", "t", "x")
    call(wire, "TAKE t workers 60000")
    wire.call("TAKE", hostile, "w", "60000")
    call(wire, "DONE t workers 1 1")
    reply = wire.call("INFO", "groups")
    assert isinstance(reply, bytes)
    head, *lines = reply.decode().splitlines()
    found = dict(line.partition(":")[::2] for line in lines if line)
    assert head == "# Groups"
    assert (found["groups"], found["jobs_taken"], found["jobs_done"]) == ("2", "1", "1")
    assert found["group0"] == (
        "waiting=0,held=0,again=0,taken=1,repeated=0,done=1,failed=0,unmoved=0,expired=0,dropped=0,oldest_age_ms=0,"
        "name=workers,topic=t"
    )
    assert found["group1"].endswith(r",name=w,topic=t\r\ngroup1:x\u2028*")
    assert len(found) == 10


def test_info_describes_a_few_groups(wire: Wire) -> None:
    for number in range(MAX_FIRST + 5):
        call(wire, f"TAKE t {number} 60000")
    lines = str(wire.call("INFO", "groups")).split(r"\r\n")
    assert sum(line.startswith("group") and line[5].isdigit() for line in lines) == MAX_FIRST
    assert len([name for name in pairs(wire.call("STATS", "t")) if name.endswith(":held")]) == MAX_FIRST
