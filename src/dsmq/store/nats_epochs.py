"""The epoch of a stream, and how to store a message only if the stream still has it.

A message names the epoch of the stream. If a stream is deleted and created again, it gets another epoch, and servers
learn of that only later. So each server also adds a mark, a message with the epoch in its subject. Puts that may
already be stored are repeated on condition that the mark is there.

When a node starts, it deletes all messages that are older than the stream's max_age, even those that should never
expire. So the messages that a stream always needs are published again before they are that old.
"""

from __future__ import annotations

import math
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from dsmq.store.nats_api import EXPECTED_LAST_ID, NEVER_EXPIRES, RENEWALS_PER_MAX_AGE, EngineError
from dsmq.system import boot_time

if TYPE_CHECKING:
    from dsmq.store.nats_stream import StoredMessage, Stream


class _Mark(NamedTuple):
    epoch: str
    subject: str
    id: int
    renew_at: float
    """By `boot_time`. Puts may be repeated on condition of the old one for a while."""


class Epochs:
    """The epoch of a stream, as far as this server knows. Its methods raise EngineError."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._mark = _Mark("", "", 0, -math.inf)

    @property
    def _genesis(self) -> str:
        return f"{self._stream.name}.genesis"

    def _marks(self, epoch: str) -> str:
        """Return what the subjects of all marks of an epoch begin with."""
        return f"{self._stream.name}.facts.epoch-{epoch}"

    async def current(self, now_ms: int) -> str:
        """Return the stream's epoch. Begins one if it has none. `now_ms`: by the engine's clock."""
        genesis = await self._stream.find(last_by_subj=self._genesis) or await self._begin()
        epoch, interval_ms = genesis.body.decode(), self._stream.max_age_ms / RENEWALS_PER_MAX_AGE
        # A full stream refuses messages until it has room.
        with suppress(EngineError):
            if now_ms - genesis.put_ms > interval_ms:
                await self._stream.renew(self._genesis, {"Nats-Rollup": "sub", **NEVER_EXPIRES})
            elif self._mark.epoch != epoch or boot_time() > self._mark.renew_at:
                subject, renew_at = f"{self._marks(epoch)}-{secrets.token_hex(4)}", boot_time() + interval_ms / 1000
                mark_id = await self._stream.publish(subject, b"", _only_after(self._genesis, genesis.id))
                self._mark = _Mark(epoch, subject, mark_id, renew_at)
        return epoch

    async def _begin(self) -> StoredMessage:
        # If several servers try, the first one wins.
        with suppress(EngineError):
            headers = {EXPECTED_LAST_ID: "0", **NEVER_EXPIRES}
            await self._stream.publish(self._genesis, secrets.token_hex(8).encode(), headers)
        genesis = await self._stream.find(last_by_subj=self._genesis)
        if genesis is None:
            raise EngineError("the stream has no epoch")
        return genesis

    async def end(self, epoch: str) -> None:
        """Begin a new epoch, unless another server has begun one."""
        if await self._stream.last_of(self._genesis) == epoch.encode():
            for subject in await self._stream.subjects("facts.*"):
                if subject.startswith(self._marks(epoch)):
                    await self._stream.purge(subject)
            await self._stream.purge(self._genesis)

    def only_in(self, epoch: str) -> list[tuple[bytes, bytes]]:
        """Return headers with which the engine refuses a message (WRONG_SEQUENCE) if the stream has another epoch."""
        mark = self._mark
        if not mark.id:
            return []
        # There is no mark with just the epoch of another one, so any id will do.
        subject = mark.subject if epoch == mark.epoch else self._marks(epoch)
        return [(name.encode(), value.encode()) for name, value in _only_after(subject, mark.id).items()]


def _only_after(subject: str, message_id: int) -> dict[str, str]:
    """Return headers with which the engine refuses a message unless this one is the last with its subject."""
    return {EXPECTED_LAST_ID: str(message_id), f"{EXPECTED_LAST_ID}-Subject": subject}
