"""asyncio clients whose calls are cancelled at random points."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from chaos.clients import HOST, IDLE_SECONDS, Client, Job, error_fields
from chaos.history import INTERRUPTED, Broken, Empty, Got, History, Put, Reader
from dsmq.aio import AsyncClient, connect
from dsmq.errors import DSMQError

if TYPE_CHECKING:
    from chaos.stage import Stage

WRITERS = READERS = 2
# Fraction of calls that are cancelled, and when, in seconds after they begin.
CANCELLED_RATIO = 0.3
CANCEL_WITHIN = 0.003

T = TypeVar("T")


class Tasks:
    """Two writing tasks and two reading clients."""

    def __init__(self, stage: Stage, port: int) -> None:
        self._stage = stage
        self._history: History = stage.history
        self._jobs = [Job(f"task-{number}", port, seed=stage.seed) for number in range(WRITERS + READERS)]
        self.stop, self.end = threading.Event(), threading.Event()
        self.ready, self.written = threading.Event(), threading.Event()

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        clients = [await connect(HOST, job.port) for job in self._jobs]
        try:
            async with asyncio.TaskGroup() as group:
                reading = [self._read(*one) for one in zip(self._jobs[WRITERS:], clients[WRITERS:], strict=True)]
                writing = [self._write(*one) for one in zip(self._jobs[:WRITERS], clients[:WRITERS], strict=True)]
                readers = [group.create_task(one) for one in reading]
                self.ready.set()
                for one in [group.create_task(one) for one in writing]:
                    await one
                self.written.set()
                for one in readers:
                    await one
        finally:
            self.written.set()
            for client in clients:
                await client.close()

    async def _call(self, call: Coroutine[Any, Any, T], job: Job, chance: Any) -> tuple[T | None, BaseException | None]:
        """Return a call's result or exception; it may be cancelled."""
        task = asyncio.create_task(call)
        if chance is not None and chance.random() < CANCELLED_RATIO:
            await asyncio.sleep(chance.uniform(0, CANCEL_WITHIN))
            if task.cancel():
                self._stage.fault("cancel")
        try:
            return await task, None
        except asyncio.CancelledError:
            return None, KeyboardInterrupt()
        except (DSMQError, OSError) as error:
            return None, error

    async def _write(self, job: Job, mq: AsyncClient) -> None:
        chance = job.random
        for number in itertools.count(1):
            if self.stop.is_set():
                return
            topic = chance.choice(job.topics)
            put = Put(job.name, topic, f"{job.name} {number}", time.monotonic(), 0.0)
            message_id, error = await self._call(mq.put(topic, put.body), job, chance)
            about = error_fields(error) if error else {"id": message_id}
            self._history.add(replace(put, ended=time.monotonic(), **about))
            await asyncio.sleep(job.pause / 4)

    async def _read(self, job: Job, mq: AsyncClient) -> None:
        chance = job.random
        session = mq._session
        reader = Reader(job.name, job.topics, session.epoch, session.era.start, time.monotonic())
        while not self.end.is_set():
            if not await self._read_once(job, mq, chance.choice(job.topics), chance):
                await asyncio.sleep(IDLE_SECONDS)
        began = time.monotonic()
        for topic in job.topics:
            while await self._read_once(job, mq, topic, None):
                pass
        self._history.add(replace(reader, finished=began))

    async def _read_once(self, job: Job, mq: AsyncClient, topic: str, chance: Any) -> int:
        timeout = chance.choice((0.0, 0.0, 0.05)) if chance else 0.0
        count = chance.choice((1, 5, 50)) if chance else 100
        began = time.monotonic()
        found, error = await self._call(mq.read(topic, count, timeout=timeout), job, chance)
        ended = time.monotonic()
        if error is not None or found is None:
            # A cancelled task has consumed nothing, because nothing can arrive between its last wait and its return.
            about = INTERRUPTED if isinstance(error, KeyboardInterrupt) else repr(error)
            self._history.add(Broken(job.name, topic, began, ended, about))
            return 0
        if not found:
            self._history.add(Empty(job.name, topic, began, ended, timeout))
        shape = Got(job.name, topic, "", began, ended, timeout=timeout)
        self._history.add(*(replace(shape, body=one.text, id=one.id, number=one.number) for one in found))
        return len(found)


@contextmanager
def crowd(stage: Stage, port: int) -> Iterator[None]:
    """Run these clients alongside the others."""
    tasks = Tasks(stage, port)
    client = Client("tasks", stage.history, tasks.run)
    client.start()
    tasks.ready.wait(20)
    try:
        yield
    finally:
        tasks.stop.set()
        tasks.written.wait(60)
        tasks.end.set()
        client.join(60)
