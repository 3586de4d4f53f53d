"""Keeps reads from being stale: they wait until the mirror has everything that the engine had when they arrived."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, NamedTuple

from dsmq.errors import StoreFailed
from dsmq.store.api import Put
from dsmq.store.nats_api import FULL, WRONG_SEQUENCE, EngineError
from dsmq.store.nats_connection import NATSConnection, encode_publish
from dsmq.store.nats_requests import Ack, Requests
from dsmq.system import boot_time

if TYPE_CHECKING:
    from dsmq.store.nats_mirror import Mirror
    from dsmq.store.nats_stream import Stream

# How long a read may wait for the engine: longer than an election takes, shorter than a client's reply timeout.
READ_SECONDS = 9.5
# If the engine's last message does not arrive within this time, ask again: it may never be stored.
INDEX_SECONDS = 0.1
# After this long without an answer, a client that connects is sent to another server. A busy engine may be slow.
START_SECONDS = 3.0
_NO_RESPONSE = "the engine does not answer"
# Higher than any id, so that the message is refused; the error contains the last id.
_ASK_LAST_ID = ((b"Nats-Expected-Last-Sequence", b"9223372036854775806"),)
# Each message replaces the previous one, so that the stream does not grow.
_REPLACE = ((b"Nats-Rollup", b"sub"),)
# A node without a majority is abandoned after this time. Most elections are shorter.
LEAVE_SECONDS, WATCH_SECONDS = 6.0, 1.0
# The leader contacts each node once a second. Answers in flight arrive within the first of these times; the second
# bounds the wait for proof.
UNDER_WAY_SECONDS, PROOF_SECONDS = 1.0, 5.0

_logger = logging.getLogger(__name__)


class _Reader(NamedTuple):
    """A call that waits for the mirror."""

    call: Callable[[Exception | None], None]
    until: float
    """When to give up, by the monotonic clock."""
    last_id: int | None
    """The id that the mirror must have; None: all that the engine has."""


class ReadIndex:
    """Delays reads until the mirror has everything that the engine had when they arrived (Raft, section 6.4).

    A leader that is cut off from the others does not know what they store. If the stream's information does not prove
    that there is no other leader, an empty message is published, which a majority has to acknowledge.
    """

    def __init__(self, mirror: Mirror, connection: NATSConnection, requests: Requests, stream: Stream) -> None:
        self._mirror, self._connection, self._requests, self._stream = mirror, connection, requests, stream
        self._subject = stream.facts_prefix + b"index"
        self._readers: list[_Reader] = []
        self._wanted = asyncio.Event()
        self._left_at = boot_time()

    def add(self, call: Callable[[Exception | None], None], last_id: int | None = None) -> None:
        """Call a function with None once the mirror is up to date, or has `last_id`, if given; or with an error."""
        self._readers.append(_Reader(call, time.monotonic() + READ_SECONDS, last_id))
        self._wanted.set()

    @property
    def epoch(self) -> str:
        """The mirror's epoch."""
        return self._mirror.epoch

    def mirrored(self, puts: Sequence[Put]) -> list[int | None]:
        """Return the ids of puts that the mirror has."""
        return self._mirror.store.find(puts)

    async def stored(self, puts: Sequence[Put]) -> list[int | None]:
        """Return the ids of puts that are stored. Raises StoreFailed if the engine does not answer."""
        answer: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.add(lambda error: None if answer.done() else answer.set_result(error))
        if (error := await answer) is not None:
            raise error
        return self.mirrored(puts)

    async def run(self) -> None:
        """Serve reads until cancelled."""
        while True:
            await self._wanted.wait()
            readers, self._readers = self._readers, []
            self._wanted.clear()
            # One request serves all reads that arrived before it.
            ids = [reader.last_id for reader in readers if reader.last_id is not None]
            last_id = max(ids) if len(ids) == len(readers) else await self._newest()
            if last_id is not None and await self._reached(last_id):
                for reader in readers:
                    reader.call(None)
            else:
                self._put_back(readers)
                if last_id is None:
                    await asyncio.sleep(INDEX_SECONDS)

    def _put_back(self, readers: list[_Reader]) -> None:
        now = time.monotonic()
        for reader in readers:
            if reader.until <= now:
                reader.call(StoreFailed(_NO_RESPONSE))
        self._readers = [reader for reader in readers if reader.until > now] + self._readers
        if self._readers:
            self._wanted.set()

    async def _newest(self) -> int | None:
        """Return the id of the engine's last message; None if it is not certain."""
        mirrored = self._mirror.store.last_id()
        last_id = await self._ask()
        # A lower id comes from a leader that does not know its last id yet or from a new stream.
        return last_id if last_id is not None and last_id >= mirrored else None

    async def _ask(self) -> int | None:
        """Return the id of the engine's last message; None if it does not answer or is not certain."""
        asked = boot_time()
        if asked >= self._stream.sole_leader_until:
            proof = await self._publish()
            return await self._last_id_if_full(asked) if proof.code in FULL else proof.id or None
        ack = await self._requests.ask(lambda reply: encode_publish(self._subject, b"", reply, _ASK_LAST_ID), 1.0)
        if ack is None or ack.code != WRONG_SEQUENCE:
            return None
        digits = ack.text.rpartition(" ")[2]
        return int(digits) if digits.isdigit() else None

    async def _publish(self) -> Ack:
        """Publish a message. Once a majority has stored it, it follows all messages stored before."""
        ack = await self._requests.ask(lambda reply: encode_publish(self._subject, b"", reply, _REPLACE), 1.0)
        return ack or Ack()

    async def _last_id_if_full(self, asked: float) -> int | None:
        """Return the id of the engine's last message, once a majority has followed its leader for a while.

        The stream has no room for a message that would prove this immediately. Messages in flight between the nodes
        when the read arrived prove nothing, hence the wait.
        """
        while boot_time() < asked + PROOF_SECONDS:
            await asyncio.sleep(INDEX_SECONDS)
            with suppress(EngineError):
                last_id = await self._stream.last_id()
                if self._stream.heard_at > asked + UNDER_WAY_SECONDS:
                    return last_id
        return None

    async def start_id(self) -> int:
        """Return the id for a client to start after. Raises EngineError."""
        until = boot_time() + START_SECONDS
        while True:
            with suppress(EngineError) if boot_time() < until else nullcontext():
                epoch, last_id = self._mirror.epoch, await self.last_stored_id()
                if epoch == self._mirror.epoch:
                    return last_id
                raise EngineError("a new epoch has begun")
            await asyncio.sleep(INDEX_SECONDS)

    async def last_stored_id(self) -> int:
        """Return an id that is not below that of any stored message. Raises EngineError."""
        # `_ask` is of no use here: it counts messages that may never be stored.
        asked = boot_time()
        last_id = await self._stream.last_id()
        if asked < self._stream.sole_leader_until:
            return last_id
        if not (ack := await self._publish()).id:
            raise EngineError(ack.text or _NO_RESPONSE)
        return ack.id

    async def watch(self) -> None:
        """Leave nodes that can't reach a majority, until cancelled."""
        majority_at = boot_time()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if boot_time() < self._stream.sole_leader_until:
                majority_at = boot_time()
                continue
            with suppress(EngineError):
                await self._stream.last_id()
            ack = await self._publish()
            # A full stream refuses the message.
            if ack.id or ack.code in FULL or not self._connection.connected:
                majority_at = boot_time()
            elif boot_time() - majority_at > LEAVE_SECONDS:
                _logger.warning("NATS server %s can't reach a majority: trying another one", self._connection.server)
                self._connection.leave()
                majority_at = boot_time()
            if boot_time() - max(self._stream.majority_at, self._left_at) > LEAVE_SECONDS:
                await self._stream.leave_node()
                self._left_at = boot_time()

    async def _reached(self, last_id: int) -> bool:
        """Wait until the mirror has this message; return False if it takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(INDEX_SECONDS):
                await self._mirror.wait_for(last_id)
                return True
        return False
