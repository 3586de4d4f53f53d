"""Several topics and patterns, read by both clients from a real server; and going back."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from scenarios import writer
from test_signals import Interrupted, Steps, interrupt

from conftest import SOON, UNIT, serving
from dsmq import aio
from dsmq.client import DSMQClientSideConnection, Message, connect
from dsmq.errors import BadRequest
from dsmq.server import Server
from dsmq.store.sqlite import SQLiteStore
from helpers import daemon

# Fixtures.
__all__ = ["writer"]

Client = DSMQClientSideConnection


class Asynchronous:
    """The asyncio client, with the interface of the blocking one."""

    def __init__(self, port: int, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(self._connect(port, options))

    @staticmethod
    async def _connect(port: int, options: Any) -> aio.AsyncClient:
        return await aio.connect(port=port, **options)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if name in ("missed", "position", "seek", "missed_in"):
            return found
        if name == "messages":
            return lambda *topics, **options: self._iterate(found(*topics, **options))
        return lambda *arguments, **options: self._loop.run_until_complete(found(*arguments, **options))

    def _iterate(self, messages: Any) -> Iterator[Any]:
        while True:
            try:
                yield self._loop.run_until_complete(anext(messages))
            except StopAsyncIteration:
                return

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


@pytest.fixture(params=["blocking", "asyncio"])
def reader(request: pytest.FixtureRequest, server: Server) -> Iterator[Callable[..., Any]]:
    """Connects clients of both kinds."""
    clients: list[Any] = []

    def make(**options: Any) -> Any:
        kind = Asynchronous if request.param == "asyncio" else connect
        clients.append(kind(port=server.port, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def texts(messages: list[Message]) -> list[str]:
    return [f"{message.topic} {message}" for message in messages]


def put(writer: Client, *messages: str) -> None:
    """Put messages, each given as a topic and a text in one string."""
    for message in messages:
        writer.put(*message.split())


def test_topics_and_patterns_are_read_together_in_order_of_ids(reader: Callable[..., Any], writer: Client) -> None:
    mq = reader()
    put(writer, "a 1", "b/x 2", "other 3", "b/y 4", "a 5", "b 6", "b/ 7")
    assert texts(mq.read(["a", "b/*"], n=100)) == ["a 1", "b/x 2", "b/y 4", "a 5", "b/ 7"]
    assert mq.read(["b/*", "a"], n=100) == []
    put(writer, "a 8", "b/new 9")
    assert texts(mq.read(("b/*", "a", "a"), n=1)) == ["a 8"]
    assert texts(mq.read({"b/*", "a"}, n=9)) == ["b/new 9"]


def test_message_has_topic_id_number_and_time(reader: Callable[..., Any], writer: Client) -> None:
    mq = reader()
    put(writer, "a 1", "b 2", "b 3")
    first, _, last = mq.read("*", n=3)
    assert (first.topic, first.number, last.topic, last.number) == ("a", 1, "b", 2)
    assert last.id > first.id
    assert last.body == b"3"
    assert last.json() == 3


def test_each_set_of_topics_has_its_own_position(reader: Callable[..., Any], writer: Client) -> None:
    mq = reader()
    put(writer, "a 1", "b 2")
    assert mq.get("a") == "1"
    assert texts(mq.read("*", n=9)) == ["a 1", "b 2"]
    assert texts(mq.read(["a", "b"], n=9)) == ["a 1", "b 2"]
    assert texts(mq.read(["a"], n=9)) == []
    assert mq.get("b") == "2"


def test_put_to_new_topic_wakes_a_waiting_pattern(reader: Callable[..., Any], writer: Client) -> None:
    mq = reader()
    timer = threading.Timer(UNIT, put, (writer, "other 0", "sensors/1 hot"))
    timer.start()
    assert texts(mq.read("sensors/*", timeout=SOON)) == ["sensors/1 hot"]
    timer.join()
    assert mq.read("sensors/*", timeout=UNIT) == []


def test_messages_yields_messages_text_or_bytes(reader: Callable[..., Any], writer: Client) -> None:
    mq = reader()
    put(writer, "a 1", "b 2")
    assert texts(list(mq.messages("a", "b", timeout=0))) == ["a 1", "b 2"]
    assert list(mq.messages(["a", "b"], timeout=0)) == []
    assert list(mq.messages("a*", timeout=0, text=True)) == ["1"]
    assert list(mq.messages("b", timeout=0, raw=True)) == [b"2"]
    assert [type(one) for one in mq.messages("a", timeout=0)] == [Message]


def test_client_can_start_at_the_oldest_or_at_a_position(reader: Callable[..., Any], writer: Client) -> None:
    put(writer, "a 1", "b 2")
    mq = reader(start="oldest")
    assert mq.get("b") == "2"
    assert texts(mq.read("*", n=1)) == ["a 1"]
    position = mq.position("*")
    put(writer, "a 3")
    assert texts(reader(start=position).read("*", n=9)) == ["b 2", "a 3"]
    assert texts(reader(start=0).read("a", n=9)) == ["a 1", "a 3"]
    with pytest.raises(BadRequest):
        reader(start=2**62).get("a")


def test_start_position_of_another_epoch_is_logged(
    reader: Callable[..., Any], writer: Client, caplog: pytest.LogCaptureFixture
) -> None:
    put(writer, "a 1")
    states: list[str] = []
    mq = reader(start="0123456789abcdef:70", on_state_change=states.append)
    assert (mq.get("a"), states) == ("1", ["replaced"])
    assert "the start position is from another epoch, whose messages are lost" in caplog.text


@pytest.mark.parametrize("topic", ["a", "*", ("a", "b")])
def test_seek_goes_back_by_number_and_time(reader: Callable[..., Any], writer: Client, topic: Any) -> None:
    mq = reader()
    put(writer, *(f"a {number}" for number in range(5)))
    # The client estimates put times, and may be late by as much as a reply takes.
    time.sleep(UNIT)
    for options, expected in (
        ({"last": 2}, ["a 3", "a 4"]),
        ({"last": 9}, ["a 0", "a 1", "a 2", "a 3", "a 4"]),
        ({"since": 300.0}, ["a 0", "a 1", "a 2", "a 3", "a 4"]),
        ({"since": 0}, []),
        ({"since": float("inf")}, ["a 0", "a 1", "a 2", "a 3", "a 4"]),
        ({"position": 0}, ["a 0", "a 1", "a 2", "a 3", "a 4"]),
    ):
        mq.seek(topic, **options)
        assert texts(mq.read(topic, n=100)) == expected, options
    assert mq.missed == 0


def test_seek_back_in_empty_topic_misses_no_later_message(reader: Callable[..., Any], writer: Client) -> None:
    mq = reader()
    mq.seek("a", last=1)
    assert mq.get("a") == ""
    put(writer, "a 1", "a 2")
    assert [mq.get("a"), mq.get("a"), mq.get("a")] == ["1", "2", ""]


def test_seek_back_waits_for_the_first_message(reader: Callable[..., Any], writer: Client) -> None:
    mq = reader()
    mq.seek("a", last=5)
    timer = threading.Timer(UNIT, put, (writer, "a 1"))
    timer.start()
    assert mq.get_wait("a", timeout=SOON) == "1"
    timer.join()


def test_latest_is_the_newest_of_each_topic(reader: Callable[..., Any], writer: Client) -> None:
    mq = reader()
    put(writer, "a 1", "b 2", "a 3", "c 4")
    assert texts(mq.read(["a", "b"], latest=True)) == ["b 2", "a 3"]
    assert mq.read(["a", "b"], n=9) == []
    put(writer, "b 5")
    assert texts(mq.read(["a", "b"], n=9)) == ["b 5"]


def test_latest_of_more_topics_than_a_read_returns_by_default(reader: Callable[..., Any], writer: Client) -> None:
    mq = reader()
    for number in range(150):
        put(writer, f"t{number} old", f"t{number} new")
    assert texts(mq.read("t*", latest=True)) == [f"t{number} new" for number in range(150)]
    assert mq.read("t*", n=1000) == []


@pytest.mark.parametrize("place", [{"last": 10**30}, {"since": 1e9}, {"since": 1e300}, {"since": math.inf}])
def test_going_back_beyond_oldest_message_reads_all(
    reader: Callable[..., Any], writer: Client, place: dict[str, Any]
) -> None:
    mq = reader()
    put(writer, "a 1", "b 2")
    mq.seek(["a", "b"], **place)
    assert texts(mq.read(["b", "a"], n=9)) == ["a 1", "b 2"]


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ValueError, lambda mq: mq.get("a*")),
        (ValueError, lambda mq: mq.get_wait("a*", timeout=0)),
        (ValueError, lambda mq: mq.get_latest("*")),
        (ValueError, lambda mq: mq.get_many("*")),
        (ValueError, lambda mq: mq.put("a*", "x")),
        (ValueError, lambda mq: mq.put_many("a*", ["x"])),
        (ValueError, lambda mq: mq.read(["a", ""])),
        (ValueError, lambda mq: mq.seek("a", last=0)),
        (ValueError, lambda mq: mq.seek("a", since=-1)),
        (ValueError, lambda mq: mq.read([str(number) for number in range(2000)])),
        (TypeError, lambda mq: mq.get(["a"])),
        (TypeError, lambda mq: mq.read([])),
        (TypeError, lambda mq: mq.read(["a", 5])),
        (TypeError, lambda mq: list(mq.messages(timeout=0))),
        (TypeError, lambda mq: mq.seek("a")),
        (TypeError, lambda mq: mq.seek("a", 5, last=1)),
        (TypeError, lambda mq: mq.seek("a", last=True)),
    ],
)
def test_invalid_topics_and_positions_raise_at_once(
    reader: Callable[..., Any], error: type[Exception], call: Callable[[Any], object]
) -> None:
    mq = reader()
    # After reading several topics, `get` still checks its argument.
    mq.read(["a", "b"])
    with pytest.raises(error):
        call(mq)


@pytest.mark.parametrize("last", [0, -1])
def test_last_is_at_least_one(reader: Callable[..., Any], last: int) -> None:
    with pytest.raises(ValueError, match=f"last should be 1 or more, not {last}"):
        reader().seek("a", last=last)


def test_read_of_several_interrupted_anywhere_loses_nothing(server: Server) -> None:
    """An interrupt between any two lines of the call."""
    with connect(port=server.port) as mq, connect(port=server.port) as writer:
        steps, interrupted = Steps(interrupt, opcodes=False), 0
        for step in itertools.count(1):
            put(writer, *(f"{topic} {step}-{number}" for number in range(2) for topic in "ab"))
            got = mq.read(["a", "b"])
            with suppress(Interrupted):
                got += steps.run(lambda: mq.read(["a", "b"]), step)
            interrupted += not steps.ended_before
            while found := mq.read(["a", "b"], n=100):
                got += found
            assert texts(got) == [f"{topic} {step}-{number}" for number in range(2) for topic in "ab"]
            if steps.ended_before:
                break
        assert interrupted > 10
        assert mq.missed == 0


def test_threads_share_a_reader_of_several(server: Server) -> None:
    got: list[str] = []
    with connect(port=server.port) as mq, connect(port=server.port) as writer:

        def read() -> None:
            until = time.monotonic() + SOON
            while len(got) < 500 and time.monotonic() < until:
                got.extend(texts(mq.read("*", timeout=UNIT)))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(100):
            writer.put_many(f"t{number % 7}", [f"{number}-{part}" for part in range(5)])
        for thread in threads:
            thread.join()
    assert sorted(got) == sorted(f"t{number % 7} {number}-{part}" for number in range(100) for part in range(5))


@pytest.mark.embedded("a snapshot")
@pytest.mark.parametrize("kill", [False, True])
def test_reader_of_several_continues_after_a_restart(tmp_path: Path, kill: bool) -> None:
    settings = {"snapshot_file": tmp_path / "dsmq.snapshot", "snapshot_interval_seconds": 1, "log_level": "debug"}
    with ExitStack() as stack:
        first = stack.enter_context(daemon(**settings))
        mq, writer = stack.enter_context(first.client()), stack.enter_context(first.client())
        put(writer, "a 1", "b 2", "a 3")
        assert texts(mq.read("*", n=2)) == ["a 1", "b 2"]
        if kill:
            # The first may have begun before the messages were put.
            for _ in range(2):
                first.wait_for_line("snapshot of ")
            first.process.kill()
        first.stop()
        stack.enter_context(daemon(f"--port={first.port}", **settings))
        put(writer, "a 4", "c 5")
        found = mq.read("*", n=9)
        while more := mq.read("*", n=9):
            found += more
        assert texts(found) == ["a 3", "a 4", "c 5"]
        assert (mq.missed, mq.missed_in("a")) == (0, 0)


def test_missed_is_counted_for_each_topic() -> None:
    now = [0]
    with ExitStack() as stack:
        store = SQLiteStore(1000, lambda: now[0])
        server = stack.enter_context(serving(store, max_age_seconds=1))
        mq, writer = stack.enter_context(connect(port=server.port)), stack.enter_context(connect(port=server.port))
        put(writer, "a 1", "b 1")
        assert len(mq.read(["a", "b"], n=9)) == 2
        put(writer, "a 2", "a 3", "b 2")
        now[0] = 2000
        put(writer, "b 3", "a 4")
        assert texts(mq.read(["a", "b"], n=9)) == ["b 3", "a 4"]
        assert (mq.missed, mq.missed_in("a"), mq.missed_in("b"), mq.missed_in(["b", "a"])) == (3, 2, 1, 3)
