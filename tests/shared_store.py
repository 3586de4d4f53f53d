"""`pytest --store nats`: servers started by tests keep their messages in a NATS cluster, each in its own stream."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import nats

import dsmq.store.nats
from dsmq.errors import ReplyError
from dsmq.store.api import Answer, Found, ManyTopics, Message, Outcome, Put, TopicStats
from dsmq.store.nats import NATSStore
from dsmq.store.nats_stream import Stream
from dsmq.store.selection import Selection
from engine import LocalEngine
from helpers import HOST, UNIT

REPLICAS = 3
# The id of the message with the epoch, which is the first of a stream.
FIRST = 1
# How long mirrors lag at least, so that a test that needs them to be complete fails each time.
LAG_SECONDS = UNIT / 10

T = TypeVar("T")
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
    """Gives each server a stream of its own, and removes them."""

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
    """Assigns ids from 1, like the store in memory, so that tests can rely on ids; that of the epoch is 0."""

    def start(self, on_messages: Callable[[set[bytes]], None], on_unusable: Callable[[str], None]) -> None:
        def apply_later() -> None:
            self._loop.call_later(LAG_SECONDS, self.mirror.apply)

        self.connection.on_received = apply_later
        super().start(on_messages, on_unusable)

    def append(self, puts: Sequence[Put]) -> Answer[list[Outcome]]:
        return _then(super().append(puts), _outcomes)

    def append_together(self, puts: Sequence[Put]) -> Answer[list[Outcome]]:
        return _then(super().append_together(puts), _outcomes)

    def read(self, topic: bytes, after: int, count: int, max_bytes: int, wait_ms: int = 0) -> Answer[list[Message]]:
        return _then(super().read(topic, after + FIRST, count, max_bytes, wait_ms), _messages)

    def latest(self, topic: bytes, after: int, below: int = sys.maxsize) -> Answer[list[Message]]:
        return _then(super().latest(topic, after + FIRST, min(below, sys.maxsize - FIRST) + FIRST), _messages)

    def read_many(self, wanted: ManyTopics, wait_ms: int = 0) -> Answer[Found]:
        below = min(wanted.below, sys.maxsize - FIRST) + FIRST
        return _then(super().read_many(wanted._replace(after=wanted.after + FIRST, below=below), wait_ms), _found)

    def go_back(self, selection: Selection, count: int, below: int = sys.maxsize) -> Answer[tuple[int, int]]:
        return _then(super().go_back(selection, count, below if below == sys.maxsize else below + FIRST), _reached)

    def id_before(self, milliseconds: int) -> int:
        return max(0, super().id_before(milliseconds) - FIRST)

    def peek(self, topic: bytes, below: int = sys.maxsize) -> Message | None:
        message = super().peek(topic, min(below, sys.maxsize - FIRST) + FIRST)
        return message and _messages([message])[0]

    def start_id(self) -> Future[int]:
        return _later(super().start_id(), lambda message_id: message_id - FIRST)

    def last_id(self) -> int:
        return super().last_id() - FIRST

    def stats(self, topic: bytes, after: int = 0) -> TopicStats:
        return _stats(super().stats(topic, after + FIRST))

    def topics(self, after: bytes, count: int) -> list[TopicStats]:
        return [_stats(stats) for stats in super().topics(after, count)]


def number_from_one() -> None:
    """Make the servers in this process assign ids from 1, without gaps."""
    dsmq.store.nats.NATSStore = CountingStore  # type: ignore[misc]
    # No node is cut off, so servers need no message of their own as proof.
    Stream.sole_leader_until = property(lambda _: math.inf, lambda *_: None)  # type: ignore[assignment]


def _outcomes(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome if isinstance(outcome, ReplyError) else outcome - FIRST for outcome in outcomes]


def _messages(messages: list[Message]) -> list[Message]:
    return [message._replace(id=message.id - FIRST) for message in messages]


def _found(found: Found) -> Found:
    messages = [message._replace(id=message.id - FIRST) for message in found.messages]
    return found._replace(position=found.position - FIRST, messages=messages)


def _reached(reached: tuple[int, int]) -> tuple[int, int]:
    left, reached_id = reached
    return left, reached_id if reached_id == sys.maxsize else max(0, reached_id - FIRST)


def _stats(stats: TopicStats) -> TopicStats:
    return stats._replace(first_id=max(0, stats.first_id - FIRST), last_id=max(0, stats.last_id - FIRST))


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
