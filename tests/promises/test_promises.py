"""The promises under concurrency: writers and readers in separate processes compare what they saw."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from conftest import SOON, Daemon, daemon
from dsmq.client import connect

pytestmark = pytest.mark.slow

WRITERS = READERS = 8
MESSAGES = 400
TOPICS = ("one", "two")

# What a reader received: by topic, the ids, numbers and bodies in order.
Seen = dict[str, list[tuple[int, int, str]]]


def write(port: int, writer: int, many: bool) -> None:
    """Put numbered messages into each topic and check that the returned ids increase."""
    with connect(port=port) as mq:
        last_id = 0
        for number in range(MESSAGES):
            for topic in TOPICS:
                body = f"{writer} {number}"
                message_id = mq.put_many(topic, [body])[0] if many else mq.put(topic, body)
                assert message_id > last_id
                last_id = message_id


def read(port: int, reader: int) -> Seen:
    """Read each topic to its last message: by waiting, polling, or in batches, depending on the reader."""
    with connect(port=port) as mq:
        mq.put("ready", str(reader))
        got: Seen = {}
        written = ""
        for topic in TOPICS if reader % 2 else reversed(TOPICS):
            got[topic] = []
            while len(got[topic]) < WRITERS * MESSAGES:
                messages = mq.read(topic, 1 + reader * 7, timeout=0 if reader == 0 else SOON)
                got[topic] += [(message.id, message.number, message.text) for message in messages]
                if not messages:
                    # Writers may be slow, but once they have finished, every message must be there.
                    assert not written
                    written = mq.get("written")
            assert mq.get(topic) == ""
        assert mq.missed == 0
        return got


@pytest.fixture(params=["1", "2"], ids=["one worker", "two workers"])
def server(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with daemon("--io-threads", request.param) as process:
        yield process


@pytest.mark.slow
def test_no_message_is_lost_duplicated_or_reordered(server: Daemon) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(READERS + WRITERS, spawn) as pool, connect(port=server.port) as mq:
        readers = [pool.submit(read, server.port, number) for number in range(READERS)]
        ready = 0
        while ready < READERS:
            assert not any(reader.done() for reader in readers)
            ready += bool(mq.get_wait("ready", timeout=SOON))
        for writer in [pool.submit(write, server.port, number, number % 2 == 0) for number in range(WRITERS)]:
            writer.result()
        mq.put("written", "all")
        results = [reader.result() for reader in readers]
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
    # Each reader has put one message before all others.
    assert sorted(ids) == list(range(READERS + 1, READERS + WRITERS * MESSAGES * len(TOPICS) + 1))
    assert server.stop() == 0
