"""The promises under concurrency: writers and readers in processes of their own, all that they saw compared."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue

import pytest

from conftest import SOON, Daemon, daemon
from dsmq.client import connect

WRITERS = READERS = 8
MESSAGES = 400
TOPICS = ("one", "two")

spawn = multiprocessing.get_context("spawn")

# What a reader saw: its name, and for each topic the ids, numbers and bodies in the order in which they came.
Seen = tuple[int, dict[str, list[tuple[int, int, str]]]]


def write(port: int, writer: int, many: bool) -> None:
    """Put messages that name the writer and count, to each topic, and check the ids that come back."""
    with connect(port=port) as mq:
        last_id = 0
        for number in range(MESSAGES):
            for topic in TOPICS:
                body = f"{writer} {number}"
                message_id = mq.put_many(topic, [body])[0] if many else mq.put(topic, body)
                assert message_id > last_id
                last_id = message_id


def read(port: int, reader: int, ready: SimpleQueue[int], seen: SimpleQueue[Seen]) -> None:
    """Read each topic to its last message: some readers wait, some poll, some take many at a time."""
    with connect(port=port) as mq:
        ready.put(reader)
        got: dict[str, list[tuple[int, int, str]]] = {}
        for topic in TOPICS if reader % 2 else reversed(TOPICS):
            got[topic] = []
            while len(got[topic]) < WRITERS * MESSAGES:
                messages = mq.read(topic, 1 + reader * 7, timeout=0 if reader == 0 else SOON)
                assert messages or reader == 0
                got[topic] += [(message.id, message.number, message.text) for message in messages]
            assert mq.get(topic) == ""
        assert mq.missed == 0
        seen.put((reader, got))


@pytest.fixture(params=["1", "2"], ids=["one worker", "two workers"])
def server(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with daemon("--io-threads", request.param) as process:
        yield process


def test_no_message_is_lost_doubled_or_out_of_order_and_all_see_the_same(server: Daemon) -> None:
    ready: SimpleQueue[int] = spawn.SimpleQueue()
    seen: SimpleQueue[Seen] = spawn.SimpleQueue()
    readers = [spawn.Process(target=read, args=(server.port, number, ready, seen)) for number in range(READERS)]
    writers = [spawn.Process(target=write, args=(server.port, number, number % 2 == 0)) for number in range(WRITERS)]
    for reader in readers:
        reader.start()
    for _ in readers:
        ready.get()
    for writer in writers:
        writer.start()
    results = dict(seen.get() for _ in readers)
    for process in (*writers, *readers):
        process.join(SOON)
        assert process.exitcode == 0
    ids = []
    for topic in TOPICS:
        first = results[0][topic]
        assert all(results[reader][topic] == first for reader in range(READERS))
        assert [number for _, number, _ in first] == list(range(1, WRITERS * MESSAGES + 1))
        assert [message_id for message_id, _, _ in first] == sorted(message_id for message_id, _, _ in first)
        for writer in range(WRITERS):
            own = [body for _, _, body in first if body.startswith(f"{writer} ")]
            assert own == [f"{writer} {number}" for number in range(MESSAGES)]
        ids += [message_id for message_id, _, _ in first]
    assert sorted(ids) == list(range(1, WRITERS * MESSAGES * len(TOPICS) + 1))
    assert server.stop() == 0
