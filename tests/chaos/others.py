"""A writer and a reader with redis-py that use KEY and READ as PROTOCOL.md recommends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection
from redis.retry import Retry

from chaos.clients import IDLE_SECONDS, Job, Stop
from chaos.history import Empty, Got, History, Put, Reader

# How long they try to reach the server, in seconds.
PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 0.01


class Peer:
    """A redis-py connection that reconnects and then repeats the request."""

    def __init__(self, ports: Sequence[int], timeout: float) -> None:
        self._ports = itertools.cycle(ports)
        # redis-py would retry silently.
        self._connection = Connection(
            host="127.0.0.1", port=next(self._ports), socket_timeout=timeout, retry=Retry(NoBackoff(), 0), protocol=2
        )
        self._is_new = True
        self.facts: dict[str, Any] = {}
        self.call("PING")

    def call(self, *words: object) -> Any:
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if self._is_new:
                    self._greet()
                return self._ask(*words)
            except (redis.ConnectionError, redis.TimeoutError, OSError, redis.ResponseError) as error:
                if isinstance(error, redis.ResponseError) and not str(error).startswith(("CLOSING", "UNSURE")):
                    raise
                self.close()
                if time.monotonic() > until:
                    raise
                time.sleep(PAUSE_SECONDS)

    def _greet(self) -> None:
        self._connection.connect()
        values = iter(self._ask("HELLO"))
        facts = {name.decode(): value for name, value in zip(values, values, strict=True)}
        known = {name: facts.get(name) for name in ("epoch", "run")}
        if self.facts and known != {name: self.facts.get(name) for name in known}:
            raise RuntimeError("another server answers, for which positions and keys mean nothing")
        self.facts = self.facts or facts
        self._is_new = False

    def _ask(self, *words: object) -> Any:
        self._connection.send_command(*words)
        return self._connection.read_response()

    def close(self) -> None:
        self._connection.disconnect()
        # If several servers share a store, try the next one.
        self._connection.port = next(self._ports)
        self._is_new = True


def write(job: Job, history: History, stop: Stop, peer: Peer) -> None:
    chance = job.random
    for seq in itertools.count(1):
        if stop.is_set():
            break
        put = Put(job.name, chance.choice(job.topics), f"{job.name} {seq}", time.monotonic(), 0.0)
        message_id = peer.call("PUT", put.topic, put.body, "KEY", job.name, seq)
        history.add(replace(put, ended=time.monotonic(), id=message_id))
        stop.wait(job.pause)


class Reading:
    def __init__(self, job: Job, history: History, peer: Peer) -> None:
        self.job, self.history, self._peer = job, history, peer
        start_id = peer.facts["last_id"]
        self._positions = dict.fromkeys(job.topics, start_id)
        self._reader = Reader(job.name, job.topics, peer.facts["epoch"].decode(), start_id, time.monotonic())

    def run(self, stop: Stop) -> None:
        chance = self.job.random
        while not stop.is_set():
            if not self._read(chance.choice(self.job.topics), chance.choice((0, 0, 20, 100))):
                stop.wait(IDLE_SECONDS)

    def finish(self) -> None:
        began = time.monotonic()
        for topic in self.job.topics:
            while self._read(topic, 0):
                pass
        self.history.add(replace(self._reader, finished=began))

    def _read(self, topic: str, wait_ms: int) -> int:
        began = time.monotonic()
        wait = ("WAIT", wait_ms) if wait_ms else ()
        reply = iter(self._peer.call("READ", topic, self._positions[topic], "COUNT", 50, *wait))
        ended = time.monotonic()
        shape = Got(self.job.name, topic, "", began, ended, timeout=wait_ms / 1000)
        found = [
            replace(shape, id=message_id, number=number, body=body.decode())
            for message_id, number, _, body, _ in zip(*[reply] * 5, strict=True)
        ]
        if found:
            self._positions[topic] = found[-1].id or 0
        else:
            # The wait may have been interrupted and repeated.
            self.history.add(Empty(self.job.name, topic, began, ended))
        self.history.add(*found)
        return len(found)


def pair(job: Job, timeout: float, history: History) -> tuple[Callable[[Stop], None], Reading, list[Peer]]:
    """Return a connected writer and reader, and the connections to close."""
    peers = [Peer((job.port, *job.others), timeout) for _ in range(2)]
    reading = Reading(replace(job, name="redis-reader"), history, peers[1])
    writer = replace(job, name="redis-writer")
    return lambda stop: write(writer, history, stop, peers[0]), reading, peers
