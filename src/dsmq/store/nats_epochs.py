"""The epoch of a stream, and how to store a message only if the stream still has it.

The first message of a stream names its epoch. If a stream is deleted and created again, it gets another epoch, and
servers learn of that only later. So a stream also contains a mark, a message with the epoch in its subject. Puts that
may already be stored are repeated on condition that the mark is there.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from dsmq.store.nats_api import NEVER_EXPIRES, EngineError

if TYPE_CHECKING:
    from dsmq.store.nats_stream import Stream

# The id of the last message with the subject, or with that in <header>-Subject; 0 if there is none.
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_FIRST = {_EXPECTED: "0", **NEVER_EXPIRES}


class Epochs:
    """The epochs of a stream that this server knows. Its methods raise EngineError."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        # The ids of the marks, by epoch.
        self._marks: dict[str, int] = {}

    @property
    def _genesis(self) -> str:
        return f"{self._stream.name}.genesis"

    def _mark(self, epoch: str) -> str:
        return f"{self._stream.name}.facts.epoch-{epoch}"

    async def current(self) -> str:
        """Return the stream's epoch. Begins one if it has none."""
        epoch = (await self._stream.last_of(self._genesis) or await self._begin()).decode()
        if epoch not in self._marks:
            # A full stream of an earlier version gets no mark until it has room.
            with suppress(EngineError):
                await self._stream.publish(self._mark(epoch), b"", _FIRST)
            if (mark := await self._stream.find(last_by_subj=self._mark(epoch))) is not None:
                self._marks[epoch] = mark.id
        return epoch

    async def _begin(self) -> bytes:
        # If several servers try, the first one wins.
        with suppress(EngineError):
            await self._stream.publish(self._genesis, secrets.token_hex(8).encode(), _FIRST)
        genesis = await self._stream.last_of(self._genesis)
        if genesis is None:
            raise EngineError("the stream has no epoch")
        return genesis

    async def end(self, epoch: str) -> None:
        """Begin a new epoch, unless another server has begun one."""
        if await self._stream.last_of(self._genesis) == epoch.encode():
            await self._stream.purge(self._mark(epoch))
            await self._stream.purge(self._genesis)

    def only_in(self, epoch: str) -> list[tuple[bytes, bytes]]:
        """Return headers with which the engine refuses a message (WRONG_SEQUENCE) if the stream has another epoch."""
        # A stream with another epoch has no such mark, so any other id will do.
        mark = self._marks.get(epoch) or max(self._marks.values(), default=0)
        headers = {_EXPECTED: str(mark), f"{_EXPECTED}-Subject": self._mark(epoch)} if mark else {}
        return [(name.encode(), value.encode()) for name, value in headers.items()]
