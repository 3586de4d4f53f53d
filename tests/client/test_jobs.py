"""Jobs, in both clients: taking, finishing and giving back; interrupts, forks, and lost connections."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import test_signals
from scenarios import mq, run
from test_requests import request
from test_requests import requests as parsed
from test_session import a_session
from test_signals import Interrupted, Steps, interrupt

import dsmq
from conftest import SOON, UNIT, blocked, serving
from dsmq import aio
from dsmq.aio import AsyncClient
from dsmq.client import DSMQClientSideConnection, connect, jobs
from dsmq.client.jobs import Job, Settle, Work
from dsmq.client.requests import Producer
from dsmq.errors import BadRequest, ClientClosed, ConnectionLost, Full, JobLost, ProtocolError
from dsmq.server import Server
from dsmq.wire.resp import Reply

# Fixtures.
__all__ = ["mq"]

Client = DSMQClientSideConnection
PRODUCER = Producer(b"run")
BROKEN = ConnectionResetError("broken")


@pytest.fixture
def other(server: Server) -> Iterator[Client]:
    with connect(port=server.port, retry=False) as other:
        yield other


def texts(mq: Client, topic: str = "t") -> list[tuple[str, int]]:
    """Take and finish all jobs; return their texts and attempts."""
    return [(job.text, job.attempt) for job in mq.work(topic, timeout=0)]


# Without a server


class Stub:
    """A client that makes no calls."""

    def __init__(self) -> None:
        self._session = a_session()


def replies(*found: tuple[str, int, bytes, int]) -> Reply:
    """Return a reply to TAKE: topic, id, body and attempt."""
    return [
        value
        for topic, message_id, body, attempt in found
        for value in (topic.encode(), message_id, message_id, 1000, body, 9000, attempt)
    ]


def answer(work: Work, *answers: Reply) -> list[list[bytes]]:
    """Answer the calls of a loop; return the requests."""
    work.begin()
    left, requests = list(answers), []
    for call in work.calls():
        requests += parsed(call.request(PRODUCER))
        for _ in range(call.replies):
            call.take_reply(left.pop(0))
    assert not left
    return requests


def test_take_names_its_lease_count_and_token() -> None:
    work = Work(Stub(), "camera/*", "w", 0.0, 1.5, 3)
    [[*words, token]] = answer(work, replies(("camera/1", 7, b"x", 2)))
    assert words == [b"TAKE", b"camera/*", b"w", b"1500", b"COUNT", b"3", b"TOKEN"]
    assert 1 <= len(token) <= 64
    job = work.hand_out()
    assert job is not None
    assert (job.topic, job.id, job.number, job.text, job.attempt) == ("camera/1", 7, 7, "x", 2)
    assert job.receipt == ("camera/*", "w", 7, 2, "")
    assert abs(time.time() - 1 - job.put_at) < SOON


def test_long_wait_is_split_into_takes_under_one_token() -> None:
    work = Work(Stub(), "t", "w", math.inf, 60.0)
    requests = answer(work, [], [], replies(("t", 1, b"x", 1)))
    assert len({words[-1] for words in requests}) == 1
    assert [words[words.index(b"WAIT") + 1] for words in requests] == [b"15000"] * 3


def test_wait_continues_while_server_refuses_more_jobs(caplog: pytest.LogCaptureFixture) -> None:
    full = Full("max_jobs_in_flight = 1 reached")
    work = Work(Stub(), "t", "w", math.inf, 60.0)
    requests = answer(work, full, full, replies(("t", 1, b"x", 1)))
    assert len({words[-1] for words in requests}) == 1
    assert work.hand_out().id == 1
    assert [record.getMessage() for record in caplog.records] == [f"waiting for a job of 't': {full}"]
    with pytest.raises(Full):
        answer(Work(Stub(), "t", "w", 0.0, 60.0), full)


@pytest.mark.parametrize("lease", [Decimal(60), Fraction(60), 60])
def test_lease_may_be_any_real_number(lease: Any) -> None:
    work = Work(Stub(), "t", "w", 0.0, lease, 2)
    [take] = answer(work, replies(("t", 1, b"x", 1), ("t", 2, b"y", 1)))
    assert take[3] == b"60000"
    work.hand_out()
    assert answer(work, b"OK") == [[b"DONE", b"t", b"w", b"1", b"1"]]
    assert work.hand_out().id == 2


def test_loop_finishes_each_job_when_next_is_requested() -> None:
    work = Work(Stub(), "t", "w", 0.0, 60.0, 2)
    answer(work, replies(("t", 1, b"x", 1), ("t", 2, b"y", 1)))
    assert work.hand_out().id == 1
    assert answer(work, b"OK") == [[b"DONE", b"t", b"w", b"1", b"1"]]
    assert work.hand_out().id == 2
    # DONE is sent together with the next TAKE, in one packet.
    assert [words[0] for words in answer(work, b"OK", [])] == [b"DONE", b"TAKE"]
    assert work.hand_out() is None


def test_job_taken_in_advance_is_extended_or_dropped_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(jobs, "boot_time", lambda: now)
    work = Work(Stub(), "t", "w", 0.0, 10.0, 4)
    answer(work, replies(*(("t", number, b"x", 1) for number in (1, 2, 3, 4))))
    assert work.hand_out().id == 1
    now += 0.5
    assert [words[0] for words in answer(work, b"OK")] == [b"DONE"]
    assert work.hand_out().id == 2
    now += 8
    requests = answer(work, b"OK", JobLost("lost"), b"OK")
    assert requests[1:] == [[b"EXTEND", b"t", b"w", number, b"1", b"10000"] for number in (b"3", b"4")]
    assert work.hand_out().id == 4
    assert answer(work, b"OK", [])[1][0] == b"TAKE"


def test_only_take_is_resent_once_previous_job_is_done() -> None:
    work = Work(Stub(), "t", "w", math.inf, 60.0)
    answer(work, replies(("t", 1, b"x", 1)))
    work.hand_out()
    work.begin()
    [call] = itertools.islice(work.calls(), 1)
    done, take = parsed(call.request(PRODUCER))
    assert (done[0], take[0], call.replies) == (b"DONE", b"TAKE", 2)
    assert call.on_connection_lost(BROKEN) is False
    assert [words[0] for words in parsed(call.request(PRODUCER))] == [b"DONE", b"TAKE"]
    call.take_reply("OK")
    assert parsed(call.request(PRODUCER))[0][-1] == take[-1]
    assert call.replies == 1


def test_job_taken_while_previous_one_is_refused_is_given_next() -> None:
    """The previous job stays unfinished, and its DONE is sent again."""
    work = Work(Stub(), "t", "w", 0.0, 60.0)
    answer(work, replies(("t", 1, b"x", 1)))
    work.hand_out()
    with pytest.raises(BadRequest):
        answer(work, BadRequest("no"), replies(("t", 2, b"y", 1)))
    work.interrupted()
    done, take = answer(work, "OK", replies(("t", 2, b"y", 1)))
    assert done == [b"DONE", b"t", b"w", b"1", b"1"]
    assert take[-1].endswith(b"2")
    assert work.hand_out().id == 2


@pytest.mark.parametrize("step", ["before the reply", "after the reply", "handed out"])
def test_interrupted_take_leaves_its_token_to_the_next(step: str) -> None:
    stub = Stub()
    work = Work(stub, "t", "w", 0.0, 60.0)
    if step == "before the reply":
        [token] = [request(call.request(PRODUCER))[-1] for call in itertools.islice(work.calls(), 1)]
    else:
        token = answer(work, replies(("t", 1, b"x", 1)))[0][-1]
        if step == "handed out":
            work.hand_out()
    work.interrupted(is_over=True)
    # For the same topic and group.
    assert answer(Work(stub, "t", "other", 0.0, 60.0), [])[0][-1] != token
    # Two takes at the same time have different tokens.
    two = [Work(stub, "t", "w", 0.0, 60.0) for _ in range(2)]
    calls = [work.calls() for work in two]
    assert [request(next(call).request(PRODUCER))[-1] == token for call in calls] == [True, False]


def test_take_after_an_interrupted_one_returns_jobs_beyond_its_count() -> None:
    stub = Stub()
    work = Work(stub, "t", "w", 0.0, 60.0, 3)
    [token] = [request(call.request(PRODUCER))[-1] for call in itertools.islice(work.calls(), 1)]
    work.interrupted()
    found = replies(("t", 1, b"x", 1), ("t", 2, b"y", 1), ("t", 3, b"z", 1))
    take, *returned = answer(work := Work(stub, "t", "w", 0.0, 60.0), found, "OK", JobLost("lost"))
    assert take[-1] == token
    assert returned == [[b"RETURN", b"t", b"w", number, b"1", b"0"] for number in (b"2", b"3")]
    assert work.hand_out().id == 1
    assert [receipt[2] for receipt in jobs.jobs_of(stub._session).leases] == [1]


def test_tokens_of_interrupted_takes_do_not_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_MANY_JOBS", 3)
    stub = Stub()
    kept = jobs.jobs_of(stub._session).tokens
    for number in range(5):
        work = Work(stub, f"t{number}", "w", 0.0, 60.0)
        answer(work, [])
        work.interrupted(is_over=True)
    assert [topic for topic, *_ in kept] == ["t2", "t3", "t4"]
    answer(Work(stub, "t3", "w", 0.0, 60.0), [])
    assert [topic for topic, *_ in kept] == ["t2", "t4"]


def test_interrupted_loop_hands_out_the_same_job_again() -> None:
    work = Work(Stub(), "t", "w", 0.0, 60.0)
    answer(work, replies(("t", 1, b"x", 1)))
    work.hand_out()
    work.interrupted()
    # The job was not handed out, so it is not finished.
    assert answer(work) == []
    assert work.hand_out().id == 1
    work.begin()
    work.interrupted()
    # Now it is finished, although DONE was interrupted.
    assert answer(work, b"OK", [])[0][0] == b"DONE"


@pytest.mark.parametrize(
    ("verb", "is_lost", "expected"),
    [(b"RETURN", True, True), (b"RETURN", False, False), (b"DONE", True, False), (b"EXTEND", True, False)],
)
def test_return_sent_again_may_find_job_returned(verb: bytes, is_lost: bool, expected: bool) -> None:
    job = Job("t", 1, 1, 0.0, b"x")
    job.attempt, job.key = 1, ("t", "w")
    call, leases = Settle(verb, job.receipt), {job.receipt: 0.0}
    if is_lost:
        assert call.on_connection_lost(BROKEN) is False
    call.reply = JobLost("not current")
    try:
        call.accept(leases)
    except JobLost:
        assert not expected
    else:
        assert expected
    assert not leases


def test_refused_done_leaves_job_with_client() -> None:
    job = Job("t", 1, 1, 0.0, b"x")
    job.attempt, job.key = 1, ("t", "w")
    call, leases = Settle(b"DONE", job.receipt), {job.receipt: 0.0}
    call.reply = BadRequest("no")
    with pytest.raises(BadRequest):
        call.accept(leases)
    assert leases


@pytest.mark.parametrize(
    "reply", [5, b"OK", [1], [b"t", 1, 1, 0, "x", 0, 1], [b"t", b"1", 1, 0, b"x", 0, 1], [b"\xff", 1, 1, 0, b"", 0, 1]]
)
def test_invalid_reply_to_take_raises_protocol_error(reply: Any) -> None:
    work = Work(Stub(), "t", "w", 0.0, 60.0)
    with pytest.raises(ProtocolError):
        answer(work, reply)


def test_jobs_left_to_their_leases_are_finally_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(jobs, "boot_time", lambda: now)
    monkeypatch.setattr(jobs, "_MANY_JOBS", 10)
    stub = Stub()
    for number in range(100):
        answer(Work(stub, "t", "w", 0.0, 5.0), replies(("t", number, b"x", 1)))
        now += 1
    assert len(jobs.jobs_of(stub._session).leases) <= 20


def test_extended_job_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(jobs, "boot_time", lambda: now)
    monkeypatch.setattr(jobs, "_MANY_JOBS", 10)
    stub = Stub()
    work = Work(stub, "t", "w", 0.0, 5.0)
    answer(work, replies(("t", 1, b"x", 1)))
    call = jobs.extend(work.hand_out(), 1000.0)
    call.reply = "OK"
    call.accept(jobs.jobs_of(stub._session).leases)
    for number in range(2, 100):
        answer(Work(stub, "t", "w", 0.0, 5.0), replies(("t", number, b"x", 1)))
        now += 1
    assert answer(work, "OK", [])[0] == [b"DONE", b"t", b"w", b"1", b"1"]


INVALID: list[tuple[type[Exception], Callable[[Any], object]]] = [
    (TypeError, lambda mq: mq.work(5)),
    (ValueError, lambda mq: mq.work("")),
    (TypeError, lambda mq: mq.work("t", None)),
    (ValueError, lambda mq: mq.work("t", "")),
    (ValueError, lambda mq: mq.work("t", "two words")),
    (ValueError, lambda mq: mq.work("t", lease=0)),
    (ValueError, lambda mq: mq.work("t", lease=math.nan)),
    (ValueError, lambda mq: mq.work("t", lease=86_401)),
    (TypeError, lambda mq: mq.work("t", lease="60")),
    (ValueError, lambda mq: mq.work("t", timeout=-1)),
    (ValueError, lambda mq: mq.work("t", prefetch=0)),
    (TypeError, lambda mq: mq.work("t", prefetch=1.5)),
    (ValueError, lambda mq: mq.take("t", lease=0)),
    (ValueError, lambda mq: mq.take("t", timeout=-1)),
    (TypeError, lambda mq: mq.take("t", "w", 5)),
    (TypeError, lambda mq: mq.done("t")),
    (TypeError, lambda mq: mq.done(dsmq.Message("t", 1, 1, 0.0, b""))),
    (ValueError, lambda mq: mq.give_back(a_job(), delay=-1)),
    (ValueError, lambda mq: mq.give_back(a_job(), delay=math.inf)),
    (ValueError, lambda mq: mq.extend(a_job(), 0)),
]


def a_job() -> Job:
    job = Job("t", 1, 1, 0.0, b"x")
    job.attempt, job.key = 1, ("t", "w")
    return job


@pytest.mark.parametrize(("error", "call"), INVALID)
def test_invalid_argument_is_refused_at_once(
    mq: Client, server: Server, error: type[Exception], call: Callable[[Any], Any]
) -> None:
    async def scenario(mq: AsyncClient) -> None:
        with pytest.raises(error):
            await call(mq)

    with pytest.raises(error):
        call(mq)
    run(server, scenario)
    assert mq.stats("t")["messages"] == 0


# With a server


def test_each_job_goes_to_one_worker_of_a_group(mq: Client, other: Client) -> None:
    mq.put_many("t", ["1", "2", "3"])
    first, second = mq.take("t", timeout=0), other.take("t", timeout=0)
    assert first is not None
    assert second is not None
    assert isinstance(first, dsmq.Message)
    assert (first.topic, first.text, first.number, first.attempt) == ("t", "1", 1, 1)
    assert second.text == "2"
    assert other.take("t", "another", timeout=0).text == "1"
    mq.done(first)
    other.give_back(second)
    assert texts(mq) == [("2", 2), ("3", 1)]
    assert mq.take("t", timeout=UNIT) is None


def test_take_waits_for_put(mq: Client, other: Client) -> None:
    timer = threading.Timer(UNIT, other.put, ("camera/1", "x"))
    timer.start()
    job = mq.take("camera/*", timeout=SOON)
    timer.join()
    assert job is not None
    assert (job.topic, job.key) == ("camera/1", ("camera/*", "workers"))
    mq.done(job)


def test_job_of_lost_messages_is_lost_even_if_its_id_is_reused() -> None:
    with ExitStack() as clients:
        with serving() as server:
            mq = clients.enter_context(connect(port=server.port))
            mq.put("t", "old")
            lost = mq.take("t", timeout=0)
        with serving(port=server.port):
            other = clients.enter_context(connect(port=server.port))
            other.put("t", "new")
            job = other.take("t", timeout=0)
            assert (job.id, job.attempt) == (lost.id, lost.attempt)
            for settle in (lambda: mq.extend(lost, 1), lambda: mq.give_back(lost), lambda: mq.done(lost)):
                with pytest.raises(JobLost):
                    settle()
            other.done(job)


def test_job_is_lost_when_its_lease_has_ended_and_another_has_it(mq: Client, other: Client) -> None:
    mq.put("t", "x")
    job = mq.take("t", lease=UNIT)
    again = other.take("t", timeout=SOON)
    assert (job.attempt, again.attempt) == (1, 2)
    for call in (lambda: mq.done(job), lambda: mq.give_back(job), lambda: mq.extend(job, 1)):
        with pytest.raises(JobLost):
            call()
    other.done(again)
    assert texts(mq) == []


def test_extended_job_is_kept(mq: Client, other: Client) -> None:
    mq.put("t", "x")
    job = mq.take("t", lease=SOON)
    mq.extend(job, UNIT)
    assert other.take("t", timeout=SOON).attempt == 2
    mq.put("t", "y")
    job = mq.take("t", lease=10 * UNIT)
    mq.extend(job, 100 * SOON)
    assert other.take("t", timeout=12 * UNIT) is None
    mq.done(job)


def test_job_is_given_back_after_delay(mq: Client) -> None:
    mq.put("t", "x")
    began = time.monotonic()
    mq.give_back(mq.take("t"), delay=3 * UNIT)
    assert mq.take("t", timeout=SOON).attempt == 2
    assert time.monotonic() - began >= 3 * UNIT


def test_loop_left_by_break_or_exception_gives_its_job_back(mq: Client, other: Client) -> None:
    mq.put_many("t", ["1", "2", "3", "4"])
    for job in mq.work("t", prefetch=3):
        if job.text == "2":
            break
    # 4 was never taken.
    assert [(job.text, job.attempt) for job in itertools.islice(other.work("t"), 3)] == [("2", 2), ("3", 2), ("4", 1)]
    with suppress(ZeroDivisionError):
        for _ in mq.work("t"):
            1 / 0  # noqa: B018
    assert texts(other) == [("4", 3)]


def test_kept_loop_gives_its_job_back_when_closed(mq: Client, other: Client) -> None:
    mq.put_many("t", ["1", "2"])
    loop = mq.work("t", prefetch=2)
    for _ in loop:
        break
    assert texts(other) == []
    with closing(loop):  # type: ignore[type-var]
        pass
    assert texts(other) == [("1", 2), ("2", 2)]


def test_closed_client_gives_back_what_it_holds(mq: Client, server: Server) -> None:
    mq.put_many("t", ["1", "2", "3"])
    one = connect(port=server.port)
    loop = one.work("t", prefetch=2)
    next(loop)
    third = one.take("t")
    one.close()
    one.close()
    assert texts(mq) == [("1", 2), ("2", 2), ("3", 2)]
    with pytest.raises(ClientClosed):
        one.done(third)
    with pytest.raises(ClientClosed):
        next(loop)


def test_loop_ends_after_timeout(mq: Client) -> None:
    mq.put("t", "x")
    assert [job.text for job in mq.work("t", timeout=UNIT)] == ["x"]


def test_with_settles_job_at_once(mq: Client, other: Client) -> None:
    mq.put_many("t", ["1", "2", "3"])
    for job in mq.work("t", timeout=0, prefetch=2):
        with suppress(ZeroDivisionError), job:
            if job.text == "1":
                1 / 0  # noqa: B018
            if job.text == "2":
                mq.give_back(job, delay=100 * SOON)
        if job.text == "1":
            assert other.take("t", timeout=SOON, lease=100 * SOON).text == "1"
    assert mq.stats("t")["messages"] == 3
    assert texts(other) == []


def lose_a_job(mq: Client, other: Client) -> tuple[Any, Any, Any]:
    """Return a loop, its job, and that job as another worker got it after the lease; another message is next."""
    mq.put("t", "x")
    loop = mq.work("t", lease=UNIT, timeout=SOON)
    job, again = next(loop), other.take("t", timeout=SOON)
    mq.put("t", "y")
    return loop, job, again


def test_loop_warns_of_a_job_lost_before_it_was_finished_and_continues(
    mq: Client, other: Client, caplog: pytest.LogCaptureFixture
) -> None:
    loop, job, again = lose_a_job(mq, other)
    assert (again.id, again.attempt) == (job.id, 2)
    assert next(loop).text == "y"
    [warning] = caplog.records
    assert warning.levelname == "WARNING"
    assert f"job {job.id} of 't' was lost" in warning.message
    other.done(again)


def test_loop_does_not_warn_of_a_lost_job_that_its_caller_has_finished(
    mq: Client, other: Client, caplog: pytest.LogCaptureFixture
) -> None:
    loop, job, _ = lose_a_job(mq, other)
    with pytest.raises(JobLost), job:
        pass
    assert next(loop).text == "y"
    assert not caplog.records


def test_unpickled_job_can_be_finished_by_any_client(mq: Client, other: Client) -> None:
    mq.put("t", "x")
    job = pickle.loads(pickle.dumps(mq.take("t")))
    assert (job.text, job.attempt, job.key) == ("x", 1, ("t", "workers"))
    with pytest.raises(TypeError, match="unpickled"), job:
        pass
    other.done(job)
    other.done(job)
    assert texts(mq) == []


def test_forked_child_leaves_its_parents_jobs_alone(mq: Client, other: Client) -> None:
    mq.put_many("t", ["1", "2", "3"])
    loop = mq.work("t", prefetch=2)
    job = next(loop)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with job:
                pass
            assert next(loop).text == "3"
            loop.close()
            mq.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert next(loop).text == "2"
    assert texts(other) == [("3", 2)]


def test_threads_share_jobs_of_one_client(mq: Client) -> None:
    count = 200
    mq.put_many("t", map(str, range(count)))
    got: list[str] = []

    def work(prefetch: int) -> None:
        got.extend(job.text for job in mq.work("t", timeout=0, prefetch=prefetch))

    threads = [threading.Thread(target=work, args=(prefetch,)) for prefetch in (1, 1, 3, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got, key=int) == [str(number) for number in range(count)]
    assert texts(mq) == []


def test_take_continues_after_server_is_back(mq: Client, server: Server) -> None:
    mq.put("t", "x")
    job = mq.take("t")
    for connection in mq._pool.idle:
        connection.interrupt()
    mq.extend(job, 60)
    for connection in mq._pool.idle:
        connection.interrupt()
    mq.done(job)
    assert texts(mq) == []


def test_close_is_quick_after_server_is_gone() -> None:
    with serving() as server:
        mq = connect(port=server.port, reconnect_timeout=100 * SOON)
        mq.put("t", "x")
        loop = mq.work("t")
        next(loop)
    began = time.monotonic()
    del loop
    gc.collect()
    mq.close()
    assert time.monotonic() - began < SOON


def test_close_waits_at_most_for_the_timeout(server: Server) -> None:
    mq = connect(port=server.port, timeout=20 * UNIT, reconnect_timeout=100 * SOON)
    mq.put_many("t", ["x", "y"])
    mq.take("t")
    mq.take("t")
    with blocked(server):
        mq.close()
        # The server, which has not answered yet, still counts both jobs as held.
        assert next(server.context.store.groups.stats()).held == 2


@pytest.mark.embedded("a server that is not shared")
def test_job_of_another_server_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as first, serving() as second, connect(port=second.port) as other:
        other.put("t", "y")
        with connect([f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}"]) as mq:
            mq.put("t", "x")
            loop = mq.work("t")
            assert next(loop).text == "x"
            first.stop()
            assert next(loop).text == "y"
    assert "the server has lost the job's message" in caplog.text


def test_connection_lost_in_take_keeps_its_token(server: Server, other: Client) -> None:
    """The server has given a job, but the reply is lost."""
    with connect(port=server.port, reconnect_timeout=0) as mq:
        other.put("t", "x")
        receive, lost = mq._pool.idle[-1].receive, []

        def lose() -> None:
            lost.append(receive())
            raise ConnectionResetError("broken")

        mq._pool.idle[-1].receive = lose  # type: ignore[method-assign]
        with pytest.raises(ConnectionLost):
            mq.take("t")
        assert lost
        assert other.take("t", timeout=0) is None
        assert mq.take("t").attempt == 1


MODULES = {"dsmq.client.jobs", "dsmq.client.worker"}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_signals, "MODULES", test_signals.MODULES | MODULES)


CALLS: dict[str, Callable[[Client, Any], Job | None]] = {
    "take": lambda mq, _: mq.take("t", timeout=0),
    "waiting": lambda mq, _: mq.take("t", timeout=SOON),
    "next": lambda _, loop: next(loop),
}


@pytest.mark.slow
@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
@pytest.mark.parametrize("call", CALLS)
def test_job_of_call_interrupted_at_any_line_is_given_at_once(
    mq: Client, other: Client, traced: None, call: str, opcodes: bool
) -> None:
    steps, step, interrupted = Steps(interrupt, opcodes=opcodes), 0, 0
    loop = mq.work("t", timeout=0, lease=100 * SOON)
    while not step or not steps.ended_before:
        step += 7 if opcodes else 1
        other.put("t", str(step))
        try:
            job = steps.run(lambda: CALLS[call](mq, loop), step)
        except Interrupted:
            interrupted += 1
            # It gets the same job, because of the token or the loop.
            job = CALLS[call](mq, loop)
        assert (job.text, job.attempt) == (str(step), 1), step
        if call != "next":
            mq.done(job)
    assert interrupted > 10
    assert not any(mq._session.jobs.popitem()[1].tokens.values())


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_signal_handler_may_take_jobs_at_any_line(mq: Client, other: Client, traced: None, call: str) -> None:
    handled: list[str] = []

    def handle() -> None:
        if (job := mq.take("t", timeout=0)) is not None:
            handled.append(job.text)
            mq.done(job)

    loop = mq.work("t", timeout=0)
    steps, step = Steps(handle, opcodes=False), 0
    while not step or not steps.ended_before:
        step += 1
        handled.clear()
        sent = [f"{step} {number}" for number in range(3)]
        other.put_many("t", sent)
        job = steps.run(lambda: CALLS[call](mq, loop), step)
        got = [job.text]
        if call != "next":
            mq.done(job)
        got += [text for text, _ in texts(other)]
        assert sorted(got + handled) == sent, step
    assert step > 10


def test_closed_client_returns_jobs_whose_reply_it_did_not_get(
    mq: Client, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mq._run

    def interrupt_after(call: Any, *options: Any) -> None:
        run(call, *options)
        raise Interrupted

    other.put_many("t", ["1", "2", "3"])
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(mq, "_run", interrupt_after)
            with pytest.raises(Interrupted):
                next(mq.work("t", timeout=0, prefetch=3))
    mq.close()
    assert texts(other) == [("1", 2), ("2", 2), ("3", 2)]


def test_closed_asyncio_client_returns_jobs_whose_reply_it_did_not_get(
    server: Server, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(mq: AsyncClient) -> None:
        run = mq._run

        async def interrupt_after(call: Any) -> None:
            await run(call)
            raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(mq, "_run", interrupt_after)
            with pytest.raises(Interrupted):
                await anext(mq.work("t", timeout=0, prefetch=3))

    other.put_many("t", ["1", "2", "3"])
    run(server, scenario)
    assert texts(other) == [("1", 2), ("2", 2), ("3", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [1, 3])
def test_loop_interrupted_at_any_line_loses_no_job(
    server: Server, other: Client, traced: None, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker gets its jobs as soon as the loop and the client have been closed."""
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    step, ended, kept = 0, False, 0
    while not ended:
        step += 1
        other.put_many("t", [f"{step} {number}" for number in range(4)])
        got: list[str] = []
        with connect(port=server.port, retry=False) as mq:
            steps = Steps(interrupt, opcodes=False)

            def work(mq: Client = mq, got: list[str] = got) -> None:
                for job in mq.work("t", timeout=0, lease=100 * SOON, prefetch=prefetch):
                    got.append(job.text)  # noqa: PERF401

            with suppress(Interrupted):
                steps.run(work, step)
            ended = steps.ended_before
        left = [text for text, _ in texts(other)]
        # At least once each, in order.
        expected = [f"{step} {number}" for number in range(4)]
        assert list(dict.fromkeys(got + left)) == expected, (step, got, left)
        kept += bool(left)
    assert step > 50
    assert kept > 20


# With asyncio


def test_asyncio_client_takes_and_settles_jobs(server: Server, mq: Client) -> None:
    async def scenario(one: AsyncClient) -> None:
        await one.put_many("t", ["1", "2", "3", "4"])
        job = await one.take("t", timeout=0)
        assert isinstance(job, aio.Job)
        await one.extend(job, 60)
        await one.give_back(job, delay=100 * SOON)
        got = []
        async for job in one.work("t", timeout=0, prefetch=2):
            got.append(job.text)
            with pytest.raises(TypeError, match="async with"), job:
                pass
            with suppress(ZeroDivisionError):
                async with job:
                    if job.text == "3":
                        await one.extend(job, 30)
                    if job.text == "4":
                        assert await one.take("t", timeout=0) is None
                    if job.attempt == 1 and job.text == "2":
                        1 / 0  # noqa: B018
        assert got in (["2", "2", "3", "4"], ["2", "3", "2", "4"])
        with pytest.raises(JobLost):
            await one.done(job := a_job())
        assert await one.take("t", timeout=UNIT) is None

    run(server, scenario)
    assert texts(mq) == []


@pytest.mark.parametrize("way", ["break", "exception", "cancel", "aclose", "close"])
def test_asyncio_loop_that_is_left_gives_its_jobs_back(server: Server, mq: Client, way: str) -> None:
    mq.put_many("t", ["1", "2"])

    async def loop(one: AsyncClient) -> None:
        async for _ in one.work("t", prefetch=2):
            if way == "exception":
                1 / 0  # noqa: B018
            if way == "break":
                break
            await asyncio.sleep(100 * SOON)

    async def scenario(one: AsyncClient) -> None:
        jobs_kept = one.work("t", prefetch=2)
        if way in ("aclose", "close"):
            await anext(jobs_kept)
            await (jobs_kept.aclose() if way == "aclose" else one.close())  # type: ignore[attr-defined]
        else:
            task = asyncio.create_task(loop(one))
            while way == "cancel" and not jobs.jobs_of(one._session).leases:
                await asyncio.sleep(0)
            if way == "cancel":
                task.cancel()
            await asyncio.wait([task])
            with suppress(ZeroDivisionError, asyncio.CancelledError):
                await task
        # Use a thread, because the event loop may still have to give them back.
        got = await asyncio.to_thread(lambda: [mq.take("t", timeout=SOON) for _ in range(2)])
        assert [(job.text, job.attempt) for job in got] == [("1", 2), ("2", 2)]

    run(server, scenario)


@pytest.mark.embedded("a take that is answered within a few iterations of the event loop")
def test_cancelled_asyncio_take_leaves_its_job_to_the_next(server: Server, mq: Client) -> None:
    """The take is cancelled after any number of iterations of the event loop."""

    async def scenario(one: AsyncClient) -> None:
        got = 0
        for iterations in itertools.count():
            mq.put("t", str(iterations))
            task = asyncio.create_task(one.take("t", timeout=0 if iterations % 2 else SOON))
            for _ in range(iterations // 2):
                await asyncio.sleep(0)
            is_over = task.done()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            job = task.result() if not task.cancelled() else await one.take("t", timeout=SOON)
            assert (job.text, job.attempt) == (str(iterations), 1)
            await one.done(job)
            got += task.cancelled()
            if is_over and iterations % 2:
                break
        assert got > 2

    run(server, scenario)
    assert texts(mq) == []


def test_asyncio_loop_cancelled_after_any_number_of_iterations_loses_no_job(server: Server, mq: Client) -> None:
    """Each step finishes the previous job and takes the next one."""

    async def scenario(one: AsyncClient) -> None:
        loop, got = one.work("t", lease=100 * SOON), 0
        for iterations in itertools.count():
            mq.put("t", str(iterations))
            task = asyncio.create_task(anext(loop))
            for _ in range(iterations // 2):
                await asyncio.sleep(0)
            is_over = task.done()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            job = task.result() if not task.cancelled() else await anext(loop)
            assert (job.text, job.attempt) == (str(iterations), 1)
            got += task.cancelled()
            if is_over:
                break
        assert got > 2
        await one.done(job)
        await loop.aclose()  # type: ignore[attr-defined]

    run(server, scenario)
    assert texts(mq) == []
    assert mq.stats("t")["workers:done"] == mq.stats("t")["last_number"]


def test_asyncio_loop_survives_cancelled_anext(server: Server, mq: Client) -> None:
    async def scenario(one: AsyncClient) -> None:
        loop = one.work("t")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(UNIT):
                await anext(loop)
        mq.put("t", "x")
        job = await anext(loop)
        assert job.text == "x"
        await one.done(job)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(UNIT):
                await anext(loop)
        assert await one.take("t", timeout=0) is None

    run(server, scenario)
    assert texts(mq) == []


def test_asyncio_tasks_share_jobs(server: Server, mq: Client) -> None:
    count = 200
    mq.put_many("t", map(str, range(count)))

    async def scenario(one: AsyncClient) -> None:
        async def work(prefetch: int) -> list[str]:
            return [job.text async for job in one.work("t", timeout=UNIT, prefetch=prefetch)]

        got = await asyncio.gather(*map(work, (1, 1, 3, 20)))
        assert sorted(itertools.chain(*got), key=int) == [str(number) for number in range(count)]

    run(server, scenario)
    assert texts(mq) == []


def test_asyncio_close_is_quick_after_server_is_gone() -> None:
    async def main() -> None:
        with serving() as server:
            mq = await aio.connect(port=server.port, timeout=100 * SOON, reconnect_timeout=100 * SOON)
            await mq.put("t", "x")
            assert await mq.take("t") is not None
        async with asyncio.timeout(SOON):
            await mq.close()

    asyncio.run(main())


def test_asyncio_client_gives_jobs_back_after_its_connection_broke(server: Server, mq: Client) -> None:
    mq.put("t", "x")

    async def scenario(one: AsyncClient) -> None:
        await one.take("t")
        one._pool.shared._connection.sock.shutdown(2)  # type: ignore[union-attr]
        await one.close()

    run(server, scenario)
    assert texts(mq) == [("x", 2)]


def test_asyncio_loops_that_end_after_a_connection_broke_share_the_next_one(server: Server, mq: Client) -> None:
    mq.put_many("t", ["1", "2", "3"])

    async def scenario(one: AsyncClient) -> None:
        loops = [one.work("t") for _ in range(3)]
        for loop in loops:
            await anext(loop)
        one._pool.shared._connection.sock.shutdown(2)  # type: ignore[union-attr]
        await asyncio.gather(*(loop.aclose() for loop in loops))
        # One is the other client's. The server may not have noticed yet that the first one broke.
        while server.status.connections() > 2:
            await asyncio.sleep(0)

    run(server, scenario)
    assert texts(mq) == [("1", 2), ("2", 2), ("3", 2)]


def test_asyncio_client_gives_jobs_back_while_another_call_reconnects(server: Server, mq: Client) -> None:
    mq.put("t", "x")

    async def scenario(one: AsyncClient) -> None:
        await one.take("t")
        one._pool.shared._connection.sock.shutdown(2)  # type: ignore[union-attr]
        put = asyncio.create_task(one.put("u", "y"))
        while one._pool.shared._connecting is None:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        await one.close()
        with suppress(ClientClosed):
            await put

    run(server, scenario)
    assert texts(mq) == [("x", 2)]


@pytest.mark.parametrize("first", ["aclose", "cancelled aclose", "close"])
@pytest.mark.parametrize("is_lost", [False, True])
def test_asyncio_client_and_its_loop_may_be_closed_at_once(
    server: Server, mq: Client, is_lost: bool, first: str
) -> None:
    """One is closed any number of iterations of the event loop after the other."""

    async def main(iterations: int) -> bool:
        one = await aio.connect(port=server.port)
        loop: Any = one.work("t", lease=100 * SOON)
        await anext(loop)
        if is_lost:
            one._here().shared._connection.sock.shutdown(2)
        closing, then = (one.close(), loop.aclose()) if first == "close" else (loop.aclose(), one.close())
        task = asyncio.create_task(closing)
        for _ in range(iterations):
            await asyncio.sleep(0)
        is_over = task.done()
        if first == "cancelled aclose":
            task.cancel()
        await then
        with suppress(asyncio.CancelledError):
            await task
        # The end of the event loop would close connections that are left.
        while server.status.connections() > 1:
            await asyncio.sleep(0)
        return is_over

    for iterations in itertools.count():
        mq.put("t", str(iterations))
        is_over = asyncio.run(asyncio.wait_for(main(iterations), SOON))
        assert texts(mq) == [(str(iterations), 2)]
        if is_over:
            break
