"""Requests that can be repeated, without sockets."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from test_session import a_reader, a_session, accept, entries, hello, take

from conftest import ClientClock
from dsmq.client.core import Retries
from dsmq.client.requests import Call, NonIdempotent, Producer, Put, PutMany, Read
from dsmq.errors import AuthRequired, ConnectionLost, Full, ProtocolError, ShuttingDown, TimedOut
from dsmq.wire.request_parser import RequestParser
from dsmq.wire.resp import Reply

BROKEN = ConnectionResetError("broken")
CLOSING = ShuttingDown("the server is stopping")


def requests(data: bytes) -> list[list[bytes]]:
    parser = RequestParser(1_000_000)
    parser.feed(data)
    found = []
    while request := parser.next():
        found.append(request)
    assert len(parser) == 0
    return found


def request(data: bytes) -> list[bytes]:
    [found] = requests(data)
    return found


# Puts


def test_puts_are_numbered_on_each_connection() -> None:
    one, two = Producer(b"run"), Producer(b"run")
    first, second, other = (request(Put(b"t", b"x").request(producer))[3:] for producer in (one, one, two))
    assert (first[0], first[2], second[2], other[2]) == (b"KEY", b"1", b"2", b"1")
    assert first[1] == second[1] != other[1]


@pytest.mark.parametrize("error", [BROKEN, TimeoutError("no reply"), OSError()])
def test_unanswered_put_is_retried_with_its_key(error: Exception) -> None:
    put, producer = Put(b"t", b"x"), Producer(b"run")
    first = request(put.request(producer))
    assert first[:3] == [b"PUT", b"t", b"x"]
    assert put.on_connection_lost(error) is False
    for _ in range(2):
        assert request(put.request(Producer(b"run"))) == [*first, b"AGAIN"]
    assert put.to_error(error).may_be_stored


def test_unanswered_put_is_not_sent_to_another_server() -> None:
    put = Put(b"t", b"x")
    put.request(Producer(b"one"))
    put.on_connection_lost(BROKEN)
    with pytest.raises(ConnectionLost, match="restarted") as told:
        put.request(Producer(b"two"))
    assert told.value.may_be_stored


def test_put_is_not_retried_after_server_may_have_forgotten_it(client_clock: ClientClock) -> None:
    put, many = Put(b"t", b"x"), PutMany(b"t", [*"ab"])
    put.request(Producer(b"run"))
    in_batches(many)
    put.on_connection_lost(BROKEN)
    many.on_connection_lost(BROKEN)
    # Most of the time, the machine was suspended.
    client_clock.asleep += 300
    assert request(put.request(Producer(b"run")))[-1] == b"AGAIN"
    assert in_batches(many) == [[b"a", b"b"]]
    client_clock.passed += 1
    with pytest.raises(ConnectionLost, match="no reply for 300 s") as told:
        put.request(Producer(b"run"))
    assert told.value.may_be_stored
    with pytest.raises(ConnectionLost, match="no reply for 300 s"):
        in_batches(many)


@pytest.mark.parametrize("error", [CLOSING, TimedOut("idle for too long"), AuthRequired("by other rules")])
def test_refused_put_may_go_to_any_server(error: Exception) -> None:
    put = Put(b"t", b"x")
    put.request(Producer(b"one"))
    put.on_connection_lost(error)
    assert request(put.request(Producer(b"two")))[-1] == b"1"
    assert not put.to_error(error).may_be_stored
    # That the server closes now does not show whether the earlier attempt was stored.
    put.on_connection_lost(BROKEN)
    put.request(Producer(b"two"))
    put.on_connection_lost(CLOSING)
    assert put.to_error(CLOSING).may_be_stored


# Many puts


def send_all(puts: PutMany, producer: Producer | None = None) -> list[list[list[bytes]]]:
    """Send all batches on a connection, those without an answer first; return their requests."""
    sent = []
    for batch in [*puts.unanswered, *puts.batches]:
        if batch and batch not in puts.unanswered:
            puts.unanswered.append(batch)
        sent.append(requests(batch.request(producer or Producer(b"run"))) if batch else [])
        assert len(sent[-1]) == (batch.replies if batch else 0)
    return sent


def in_batches(puts: PutMany, producer: Producer | None = None) -> list[list[bytes]]:
    """Send all batches; return the messages put in each."""
    return [[request[2] for request in batch] for batch in send_all(puts, producer)]


def answer(puts: PutMany, *replies: Reply) -> None:
    """Answer the oldest puts."""
    for reply in replies:
        batch = puts.unanswered[0]
        batch.take_reply(reply)
        if not batch.replies:
            puts.unanswered.popleft()


def test_batches_are_bounded_by_puts_and_bytes() -> None:
    long = b"x" * 300_000
    puts = PutMany(b"t", [*["1"] * 501, b"3", long, "5", long, "7"])
    assert in_batches(puts) == [[b"1"] * 500, [b"1", b"3", long], [b"5", long], [b"7"]]


def test_empty_put_many_sends_no_batch() -> None:
    with PutMany(b"t", []) as puts:
        assert in_batches(puts) == []


def test_messages_before_invalid_one_are_put() -> None:
    puts = PutMany(b"t", ["1", "2", "3", 4, "5"])  # type: ignore[list-item]
    assert in_batches(puts) == [[b"1", b"2", b"3"]]
    with pytest.raises(TypeError), puts:
        pass


def test_messages_before_failed_generator_are_put() -> None:
    def messages() -> Iterator[str]:
        yield "1"
        raise ZeroDivisionError

    puts = PutMany(b"t", messages())
    assert in_batches(puts) == [[b"1"]]
    with pytest.raises(ZeroDivisionError), puts:
        pass


def test_put_many_resumes_after_last_answer() -> None:
    puts, first, second = PutMany(b"t", ["x"] * 600), Producer(b"run"), Producer(b"run")
    sent = [request for batch in send_all(puts, first) for request in batch]
    answer(puts, 7)
    assert puts.on_connection_lost(BROKEN)
    assert not puts.on_connection_lost(BROKEN)
    again = [request for batch in send_all(puts, second) for request in batch]
    assert again == [[*request, b"AGAIN"] for request in sent[1:]]
    answer(puts, *range(8, 607))
    assert puts.ids == [*range(7, 607)]
    assert puts.on_connection_lost(BROKEN)
    assert not puts.to_error(BROKEN).may_be_stored


def test_unanswered_put_many_is_not_sent_to_another_server() -> None:
    puts = PutMany(b"t", [*"ab"])
    in_batches(puts, Producer(b"one"))
    puts.on_connection_lost(BROKEN)
    with pytest.raises(ConnectionLost, match="restarted") as told:
        in_batches(puts, Producer(b"two"))
    assert told.value.may_be_stored


def test_refused_put_many_may_go_to_any_server() -> None:
    puts = PutMany(b"t", [*"ab"])
    in_batches(puts, Producer(b"one"))
    puts.on_connection_lost(CLOSING)
    assert in_batches(puts, Producer(b"two")) == [[b"a", b"b"]]
    assert not puts.to_error(CLOSING).may_be_stored


def test_only_possibly_stored_puts_are_retried_with_again() -> None:
    puts, producer = PutMany(b"t", [*["a"] * 499, "b", "c", "d"]), Producer(b"one")
    batches = [batch for batch in puts.batches if batch]
    puts.unanswered.extend(batches)
    batches[0].request(producer)
    puts.on_connection_lost(BROKEN)
    for batch in batches:
        batch.request(producer)
    answer(puts, *range(1, 500))
    puts.on_connection_lost(CLOSING)
    # The first attempt to put "b" had no answer; "c" and "d" were not run.
    sent = [(request[2], request[-1] == b"AGAIN") for batch in send_all(puts, producer) for request in batch]
    assert sent == [(b"b", True), (b"c", False), (b"d", False)]
    answer(puts, 500)
    puts.on_connection_lost(CLOSING)
    assert not puts.to_error(CLOSING).may_be_stored
    assert in_batches(puts, Producer(b"two")) == [[b"c", b"d"]]


def test_slow_messages_are_not_delayed(client_clock: ClientClock) -> None:
    def messages() -> Iterator[str]:
        for message in "abcd":
            client_clock.passed += 0.06
            yield message

    # All replies are read before each.
    assert in_batches(PutMany(b"t", messages())) == [[], [b"a", b"b"], [], [b"c", b"d"]]


def test_unsent_puts_are_neither_retried_late_nor_unsure(client_clock: ClientClock) -> None:
    def messages() -> Iterator[str]:
        yield "a"
        client_clock.passed += 1000.0
        yield "b"

    puts = PutMany(b"t", messages())
    # Here the client finds that the connection has ended.
    assert next(puts.batches) is None
    puts.on_connection_lost(BROKEN)
    assert not puts.to_error(BROKEN).may_be_stored
    assert in_batches(puts, Producer(b"two")) == [[b"a", b"b"]]
    puts.on_connection_lost(BROKEN)
    assert puts.to_error(BROKEN).may_be_stored
    assert in_batches(puts, Producer(b"two")) == [[b"a", b"b"]]


def test_error_in_put_many_reports_what_is_stored() -> None:
    puts = PutMany(b"t", iter("ab" + "c" * 1000))
    batch = next(puts.batches)
    assert batch
    count = len(requests(batch.request(Producer(b"one"))))
    for reply in (1, Full("no room"), Full("still no room"), *range(2, count - 1)):
        batch.take_reply(reply)
    # Nothing more is sent.
    assert list(puts.batches) == []
    with pytest.raises(Full, match=r"^no room$") as caught, puts:
        pass
    assert (caught.value.stored_before, caught.value.stored_after) == (1, count - 3)
    assert len(puts.ids) == count - 2


def test_puts_after_error_are_resent_on_next_connection() -> None:
    puts = PutMany(b"t", [*"abc"])
    in_batches(puts)
    answer(puts, 1, Full("no room"))
    puts.on_connection_lost(CLOSING)
    assert in_batches(puts, Producer(b"two")) == [[b"c"]]


def test_invalid_put_reply_is_not_a_refusal() -> None:
    puts = PutMany(b"t", [*"ab"])
    in_batches(puts)
    with pytest.raises(ProtocolError):
        answer(puts, b"no number")


# Reads and other calls


def test_retried_read_has_remaining_time(client_clock: ClientClock) -> None:
    reader = a_reader()
    read, producer = Read(a_session(), reader, client_clock.monotonic() + 10), Producer(b"run")
    assert request(read.request(producer)) == [b"READ", b"t", b"0", b"WAIT", b"10000"]
    assert read.seconds == 10
    client_clock.passed += 7.5
    accept(reader, entries(3))
    # Don't wait if another call has read messages ahead.
    assert request(read.request(producer)) == [b"READ", b"t", b"3"]
    take(reader)
    assert request(read.request(producer)) == [b"READ", b"t", b"3", b"WAIT", b"2500"]
    client_clock.passed += 3.5
    assert request(read.request(producer)) == [b"READ", b"t", b"3"]
    assert read.seconds == 0
    assert not read.to_error(BROKEN).may_be_stored


def test_long_wait_is_split_into_requests() -> None:
    read = Read(a_session(), a_reader(), math.inf)
    assert request(read.request(Producer(b"run")))[-1] == b"15000"
    assert request(Read(a_session(), a_reader(), latest=True).request(Producer(b"run"))) == [
        b"READ",
        b"t",
        b"0",
        b"LATEST",
    ]


def test_read_size_adapts_to_connection_speed() -> None:
    session, reader = a_session(), a_reader(7)
    reader.count, session.read_bytes = 5, 4096
    words = request(Read(session, reader, math.inf).request(Producer(b"run")))
    assert words == [b"READ", b"t", b"7", b"COUNT", b"5", b"BYTES", b"4096", b"WAIT", b"15000"]


def test_replaced_server_is_not_read_from() -> None:
    session = a_session()
    reader, old = session.reader("t"), Producer(session.era.run, session.era)
    session.handle_hello(hello("two"))
    for latest in (False, True):
        with pytest.raises(ConnectionResetError, match="restarted"):
            Read(session, reader, latest=latest).request(old)
        assert Read(session, reader, latest=latest).request(Producer(session.era.run, session.era))


def test_non_idempotent_request_is_retried_only_if_not_run() -> None:
    shutdown = NonIdempotent(b"*1\r\n$8\r\nSHUTDOWN\r\n")
    assert shutdown.on_connection_lost(CLOSING) is False
    assert request(shutdown.request(Producer(b"a"))) == [b"SHUTDOWN"]
    with pytest.raises(ConnectionLost, match="broken"):
        shutdown.on_connection_lost(BROKEN)
    # Nothing was sent.
    assert NonIdempotent(b"").on_connection_lost(BROKEN) is False


@pytest.mark.parametrize(
    ("waited", "error", "achieved"), [(1.5, BROKEN, True), (0.5, BROKEN, False), (1.5, TimeoutError("no reply"), False)]
)
def test_connection_lost_after_long_wait_counts_as_progress(
    client_clock: ClientClock, waited: float, error: Exception, achieved: bool
) -> None:
    read = Read(a_session(), a_reader(), client_clock.monotonic() + 1)
    assert read.on_connection_lost(error) is False
    read.request(Producer(b"run"))
    client_clock.passed += waited
    assert read.on_connection_lost(error) is achieved
    # Once its time is over, it no longer waits.
    client_clock.passed += 2
    read.request(Producer(b"run"))
    client_clock.passed += waited
    assert read.on_connection_lost(error) is False


def test_idempotent_request_is_resent_unchanged() -> None:
    ping = Call(b"*1\r\n$4\r\nPING\r\n")
    assert ping.request(Producer(b"a")) == ping.request(Producer(b"b"))
    assert ping.on_connection_lost(BROKEN) is False
    assert str(ping.to_error(BROKEN)) == "broken"


# Retries


def test_first_retry_is_immediate_then_backs_off(client_clock: ClientClock) -> None:
    retries, taken = Retries(30.0), []
    while (pause := retries.next_delay()) is not None:
        taken.append(pause)
        client_clock.passed += pause
    assert taken[0] == 0
    for attempt, pause in enumerate(taken[1:-1]):
        longest = min(1.0, 0.01 * 2**attempt)
        assert longest / 2 <= pause <= longest
    # The last attempt is made when the time is over.
    assert (client_clock.passed, taken[-1] <= 1.0) == (pytest.approx(30.0), True)
    client_clock.passed = 30.0
    assert retries.next_delay() is None
    retries.reset()
    assert retries.next_delay() == 0


def test_retry_time_of_zero_means_no_retry() -> None:
    assert Retries(0.0).next_delay() is None


def test_retry_pauses_are_randomised() -> None:
    retries = [Retries(math.inf) for _ in range(20)]
    assert len({tuple(one.next_delay() for _ in range(5)) for one in retries}) == 20
