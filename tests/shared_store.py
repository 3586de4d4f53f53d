"""`pytest --store nats`: servers started by tests keep their messages in a NATS cluster, each in its own stream."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import nats

import dsmq.store.nats
from dsmq.errors import ReplyError
from dsmq.store.api import Answer, Found, ManyTopics, Message, Outcome, Put, TopicStats, Watched
from dsmq.store.group import Receipt
from dsmq.store.groups import Job, Take
from dsmq.store.nats import NATSStore
from dsmq.store.nats_groups import NATSGroups
from dsmq.store.nats_stream import Stream
from dsmq.store.selection import Selection
from dsmq.store.sqlite import MirrorStore
from engine import LocalEngine
from helpers import HOST, UNIT

REPLICAS = 3
# The ids of the messages with the epoch and its mark, which are the first of a stream.
FIRST = 1, 2
# The min lag of mirrors, so that a test that requires complete mirrors always fails.
LAG_SECONDS = UNIT / 10

T = TypeVar("T")
M = TypeVar("M", Message, Job)
U = TypeVar("U")


class Nodes:
    """The cluster of a test run, which all its processes use."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dsmq-nats-")
        self._engine = LocalEngine(Path(self._folder.name), REPLICAS)

    @property
    def ports(self) -> list[int]:
        return [node.port for node in self._engine.nodes]

    def close(self) -> None:
        self._engine.kill()
        self._folder.cleanup()


class Streams:
    """Gives each server a stream of its own and removes them."""

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = list(ports)
        self._servers = [f"nats://{HOST}:{port}" for port in ports]
        self._store = "nats://" + ",".join(f"{HOST}:{port}" for port in ports)
        self._numbers = itertools.count(1)
        self._names: list[str] = []

    def settings(self) -> dict[str, object]:
        """Return the settings of a new server."""
        self._names.append(name := f"s{os.getpid()}-{next(self._numbers)}")
        return {"store": self._store, "store_stream": name, "store_replicas": REPLICAS}

    def remove(self) -> None:
        if self._names:
            asyncio.run(self._remove())
            self._names.clear()

    async def _remove(self) -> None:
        client = await nats.connect(self._servers)
        try:
            for name in self._names:
                await client.request(f"$JS.API.STREAM.DELETE.{name}", timeout=10)
        finally:
            await client.close()


class CountingStore(NATSStore):
    """Assigns ids from 1, like the store in memory, so that tests can rely on ids; those of the epoch are 0.

    Facts about groups of workers do not count either.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.numbers = Numbers()
        super().__init__(*arguments, **options)

    def _new_mirror(self) -> MirrorStore:
        self.numbers = Numbers()
        return super()._new_mirror()

    def start(self, on_messages: Callable[[set[bytes]], None], on_unusable: Callable[[str], None]) -> None:
        def apply_later() -> None:
            self._loop.call_later(LAG_SECONDS, self.mirror.apply)

        self.connection.on_received = apply_later
        super().start(on_messages, on_unusable)

    def append(self, puts: Sequence[Put]) -> Answer[list[Outcome]]:
        return _then(super().append(puts), self._outcomes)

    def append_together(self, puts: Sequence[Put], _: Watched | None = None) -> Answer[list[Outcome]]:
        return _then(super().append_together(puts), self._outcomes)

    def publish_job_fact(self, fact: bytes, answer: Future[list[Outcome]], leaves: float) -> None:
        stored: Future[list[Outcome]] = Future()

        def finish(done: Future[list[Outcome]]) -> None:
            # Must precede the outcomes of later puts.
            if not done.exception() and isinstance(fact_id := done.result()[0], int):
                self.numbers.skip(fact_id)
            _pass_on(done, answer)

        stored.add_done_callback(finish)
        super().publish_job_fact(fact, stored, leaves)

    def read(self, topic: bytes, after: int, count: int, max_bytes: int, wait_ms: int = 0) -> Answer[list[Message]]:
        return _then(super().read(topic, self._id(after), count, max_bytes, wait_ms), self._messages)

    def latest(self, topic: bytes, after: int, below: int = sys.maxsize) -> Answer[list[Message]]:
        return _then(super().latest(topic, self._id(after), self._id(below)), self._messages)

    def read_many(self, wanted: ManyTopics, wait_ms: int = 0) -> Answer[Found]:
        wanted = wanted._replace(after=self._id(wanted.after), below=self._id(wanted.below))
        return _then(super().read_many(wanted, wait_ms), self._found)

    def go_back(self, selection: Selection, count: int, below: int = sys.maxsize) -> Answer[tuple[int, int]]:
        return _then(super().go_back(selection, count, self._id(below)), self._reached)

    @property
    def in_memory(self) -> CountingMirror:  # type: ignore[override]
        return CountingMirror(self, super().in_memory)

    def start_id(self) -> Future[int]:
        return _later(super().start_id(), self.numbers.of)

    def last_id(self) -> int:
        return self.numbers.of(super().last_id())

    def _id(self, number: int) -> int:
        return number if number == sys.maxsize else self.numbers.id(number)

    def _outcomes(self, outcomes: list[Outcome]) -> list[Outcome]:
        return [outcome if isinstance(outcome, ReplyError) else self.numbers.of(outcome) for outcome in outcomes]

    def _messages(self, messages: list[M]) -> list[M]:
        return [message._replace(id=self.numbers.of(message.id)) for message in messages]

    def _found(self, found: Found) -> Found:
        messages = [message._replace(id=self.numbers.of(message.id)) for message in found.messages]
        return found._replace(position=self.numbers.of(found.position), messages=messages)

    def _reached(self, reached: tuple[int, int]) -> tuple[int, int]:
        left, reached_id = reached
        return left, reached_id if reached_id == sys.maxsize else self.numbers.of(reached_id)


class CountingMirror:
    """A mirror with these ids."""

    def __init__(self, counting: CountingStore, store: MirrorStore) -> None:
        self._counting, self._store = counting, store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def id_before(self, milliseconds: int) -> int:
        return self._counting.numbers.of(self._store.id_before(milliseconds))

    def peek(self, topic: bytes, below: int = sys.maxsize) -> Message | None:
        message = self._store.peek(topic, self._counting._id(below))
        return message and self._counting._messages([message])[0]

    def stats(self, topic: bytes, after: int = 0) -> TopicStats:
        return self._stats(self._store.stats(topic, self._counting._id(after)))

    def topics(self, after: bytes, count: int) -> list[TopicStats]:
        return [self._stats(stats) for stats in self._store.topics(after, count)]

    def _stats(self, stats: TopicStats) -> TopicStats:
        of = self._counting.numbers.of
        return stats._replace(first_id=of(stats.first_id), last_id=of(stats.last_id))


class Numbers:
    """Numbers the messages of a stream, skipping those that do not count."""

    def __init__(self) -> None:
        self._skipped = [*FIRST]

    def skip(self, message_id: int) -> None:
        if message_id not in self._skipped:
            bisect.insort(self._skipped, message_id)

    def of(self, message_id: int) -> int:
        return message_id - bisect.bisect_right(self._skipped, message_id)

    def id(self, number: int) -> int:
        """Return the id of the message with this number, which is the last one before the next message."""
        before = [message_id - at for at, message_id in enumerate(self._skipped)]
        return number + bisect.bisect_right(before, number) if number else FIRST[-1]


class CountingGroups(NATSGroups):
    """Does the same with the ids of jobs."""

    _engine: CountingStore

    def take(self, request: Take) -> Answer[list[Job] | None]:
        return _then(super().take(request), lambda jobs: jobs and self._engine._messages(jobs))

    def done(self, key: bytes, name: bytes, receipts: Sequence[Receipt]) -> Answer[None]:
        return super().done(key, name, [self._receipt(one) for one in receipts])

    def give_back(self, key: bytes, name: bytes, receipt: Receipt, delay_ms: int) -> Answer[None]:
        return super().give_back(key, name, self._receipt(receipt), delay_ms)

    def extend(self, key: bytes, name: bytes, receipt: Receipt, lease_ms: int) -> Answer[None]:
        return super().extend(key, name, self._receipt(receipt), lease_ms)

    def apply(self, body: bytes, message_id: int, age_ms: int) -> None:
        self._engine.numbers.skip(message_id)
        super().apply(body, message_id, age_ms)

    def _receipt(self, receipt: Receipt) -> Receipt:
        return receipt._replace(id=self._engine.numbers.id(receipt.id))


def number_from_one() -> None:
    """Make the servers in this process assign ids from 1, without gaps."""
    dsmq.store.nats.NATSStore = CountingStore  # type: ignore[misc]
    dsmq.store.nats.NATSGroups = CountingGroups  # type: ignore[misc]
    # No node is cut off, so servers need not publish a message as proof.
    Stream.sole_leader_until = property(lambda _: math.inf, lambda *_: None)  # type: ignore[assignment]


def _then(answer: Answer[T], change: Callable[[T], U]) -> Answer[U]:
    return _later(answer, change) if isinstance(answer, Future) else change(answer)


def _later(answer: Future[T], change: Callable[[T], U]) -> Future[U]:
    changed: Future[U] = Future()

    def finish(done: Future[T]) -> None:
        if error := done.exception():
            changed.set_exception(error)
        else:
            changed.set_result(change(done.result()))

    answer.add_done_callback(finish)
    return changed


def _pass_on(done: Future[T], answer: Future[T]) -> None:
    if error := done.exception():
        answer.set_exception(error)
    else:
        answer.set_result(done.result())
