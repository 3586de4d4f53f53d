"""Clients that put and get numbers while a test changes something, and a check that each arrives exactly once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dsmq.client import DSMQClientSideConnection, connect
from helpers import SOON, wait_until

# Enough to take a while, so that puts are in progress when something happens.
PROGRESS = 200
TOPIC = "numbers"


class Traffic:
    """A client that puts numbers, and one that gets them, until the end."""

    def __init__(self, servers: Sequence[str], **options: Any) -> None:
        self._servers, self._options = servers, options
        # The writer ends first, so that the reader knows what is still missing.
        self._over = [threading.Event(), threading.Event()]
        self.put = 0
        self.got: list[int] = []
        self.states: list[str] = []
        self._threads = [threading.Thread(target=work) for work in (self._write, self._read)]

    def _connect(self, servers: Sequence[str]) -> DSMQClientSideConnection:
        return connect(servers, timeout=2, on_state_change=self.states.append, **self._options)

    def _write(self) -> None:
        with self._connect(self._servers) as mq:
            while not self._over[0].is_set():
                mq.put(TOPIC, str(self.put))
                self.put += 1

    def _read(self) -> None:
        with self._connect(self._servers) as mq:
            mq.seek(TOPIC, 0)
            while not (self._over[1].is_set() and len(self.got) >= self.put):
                if message := mq.get_wait(TOPIC, timeout=1):
                    self.got.append(int(message))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run both; check what has arrived, and what each server stores."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            for thread, is_over in zip(self._threads, self._over, strict=True):
                is_over.set()
                thread.join(2 * SOON)
        assert self.got == list(range(self.put))
        for server in self._servers:
            with self._connect([server]) as mq:
                mq.seek(TOPIC, 0)
                assert [int(one) for one in mq.get_many(TOPIC, 2 * self.put)] == self.got

    def await_progress(self) -> None:
        """Wait until more has been put and got."""
        put, got = self.put, len(self.got)
        wait_until(lambda: self.put > put + PROGRESS and len(self.got) > got + PROGRESS, 2 * SOON)
