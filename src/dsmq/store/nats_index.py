"""Keeps reads from being stale: they wait until the mirror has everything that the engine had when they arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from dsmq.errors import StoreFailed
from dsmq.store.nats_connection import encode_publish
from dsmq.store.nats_mirror import Mirror
from dsmq.store.nats_requests import Requests
from dsmq.store.nats_stream import WRONG_SEQUENCE, Stream

# How long a read may wait for the engine: longer than an election takes, shorter than a client's reply timeout.
READ_SECONDS = 9.5
# If the engine's last message does not arrive within this time, ask again: it may never be stored.
INDEX_SECONDS = 0.1
_NO_RESPONSE = "the engine does not answer"
# Higher than any id, so that the message is refused; the error contains the last id.
_ASK_LAST_ID = ((b"Nats-Expected-Last-Sequence", b"9223372036854775806"),)


class ReadIndex:
    """Delays reads until the mirror has everything that the engine had when they arrived (Raft, section 6.4)."""

    def __init__(self, mirror: Mirror, requests: Requests, stream: Stream) -> None:
        self._mirror, self._requests = mirror, requests
        self._subject = stream.facts_prefix + b"index"
        self._readers: list[tuple[Callable[[Exception | None], None], float]] = []
        self._wanted = asyncio.Event()

    def add(self, call: Callable[[Exception | None], None]) -> None:
        """Call a function with None once the mirror is up to date, or with an error."""
        self._readers.append((call, time.monotonic() + READ_SECONDS))
        self._wanted.set()

    async def run(self) -> None:
        """Serve reads until this is cancelled."""
        while True:
            await self._wanted.wait()
            readers, self._readers = self._readers, []
            self._wanted.clear()
            # One request serves all reads that arrived before it.
            mirrored = self._mirror.store.last_id()
            last_id = await self._ask()
            if last_id is not None and last_id < mirrored:
                # Either from a leader that does not know its last id yet, or from a new stream.
                last_id = None
            if last_id is not None and await self._reached(last_id):
                for call, _ in readers:
                    call(None)
            else:
                self._put_back(readers)
                if last_id is None:
                    await asyncio.sleep(INDEX_SECONDS)

    def _put_back(self, readers: list[tuple[Callable[[Exception | None], None], float]]) -> None:
        now = time.monotonic()
        for call, until in readers:
            if until <= now:
                call(StoreFailed(_NO_RESPONSE))
        self._readers = [reader for reader in readers if reader[1] > now] + self._readers
        if self._readers:
            self._wanted.set()

    async def _ask(self) -> int | None:
        """Return the id of the engine's last message; None if it does not answer."""
        ack = await self._requests.ask(lambda reply: encode_publish(self._subject, b"", reply, _ASK_LAST_ID), 1.0)
        if ack is None or ack.code != WRONG_SEQUENCE:
            return None
        digits = ack.text.rpartition(" ")[2]
        return int(digits) if digits.isdigit() else None

    async def _reached(self, last_id: int) -> bool:
        """Wait until the mirror has this message; return False if it takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(INDEX_SECONDS):
                while not (self._mirror.ready and self._mirror.store.last_id() >= last_id):
                    self._mirror.applied.clear()
                    await self._mirror.applied.wait()
                return True
        return False
