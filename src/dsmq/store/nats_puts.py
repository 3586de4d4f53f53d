"""Publishes puts to the stream, one batch at a time, so that they are stored in order."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from dsmq.errors import Full, ReplyError, StoreFailed, Unsure
from dsmq.store.api import Outcome, Put
from dsmq.store.nats_connection import encode_publish
from dsmq.store.nats_requests import Ack, Requests
from dsmq.store.nats_stream import FULL, encode_token

# A batch is stored atomically, with one acknowledgement. Puts that arrive meanwhile form the next one.
BATCH_MESSAGES, BATCH_BYTES = 500, 524_288
# How long to wait for an answer before the puts are sent again, under the same ids, and how long to keep trying.
ATTEMPT_SECONDS, PUT_SECONDS = 1.0, 20.0
_PAUSE_SECONDS = 0.1
# "The message id is in process": the outcome of an earlier attempt is not known yet.
_IN_PROCESS = 10158
# "The batch contains a message id that is known."
_REPEATED = 10201

_logger = logging.getLogger(__name__)


class _Publish(NamedTuple):
    subject: bytes
    body: bytes
    message_id: bytes

    def encode(self, reply: bytes, batch: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
        return encode_publish(self.subject, self.body, reply, [(b"Nats-Msg-Id", self.message_id), *batch])


class _Append(NamedTuple):
    """The puts of one call of `Store.append`."""

    messages: list[_Publish]
    answer: Future[list[Outcome]]
    together: bool
    """Whether to store all or none."""
    until: float
    """When to give up, by the monotonic clock."""


class Publisher:
    """Publishes puts. Used in one asyncio event loop."""

    def __init__(self, requests: Requests, topic_prefix: bytes) -> None:
        self._requests, self._topic_prefix = requests, topic_prefix
        self._queue: deque[_Append] = deque()
        self._ready = asyncio.Event()
        # The ids of puts without a key.
        self._own = f"s.{secrets.token_hex(8)}:".encode()
        self._numbers = itertools.count(1)
        self.last_id = 0
        """The highest id that the engine has acknowledged."""
        self.published = self.retries = self.split = self.repeated = 0
        """Batches published, attempts without an outcome, batches split into single messages, and messages that were
        already stored."""
        self.seconds = 0.0

    def put(self, puts: Sequence[Put], answer: Future[list[Outcome]], *, together: bool) -> None:
        """Queue puts; the answer will have an outcome for each. `together`: store all or none."""
        messages = []
        for topic, body, key in puts:
            if key is None:
                message_id = b"%b%d" % (self._own, next(self._numbers))
            else:
                message_id = b"p.%b:%d" % (encode_token(key[0]), key[1])
            messages.append(_Publish(self._topic_prefix + encode_token(topic), body, message_id))
        self._queue.append(_Append(messages, answer, together, time.monotonic() + PUT_SECONDS))
        self._ready.set()

    async def run(self) -> None:
        """Publish what is queued until this is cancelled."""
        while True:
            await self._ready.wait()
            if not self._queue:
                self._ready.clear()
                continue
            appends = self._take()
            messages = [message for append in appends for message in append.messages]
            began = time.monotonic()
            outcomes = await self._publish(messages, appends[0].until, together=appends[0].together)
            self.seconds += time.monotonic() - began
            self.published += 1
            for append in appends:
                append.answer.set_result(outcomes[: len(append.messages)])
                del outcomes[: len(append.messages)]

    def count_repeated(self, puts: int) -> None:
        """Count puts that were not published because the mirror already has them."""
        self.repeated += puts

    def close(self) -> None:
        """Fail the queued puts, which have not been sent."""
        while self._queue:
            self._queue.popleft().answer.set_exception(StoreFailed("the store is closed"))

    def _take(self) -> list[_Append]:
        """Take the next batch out of the queue."""
        taken, count, size = [self._queue.popleft()], 0, 0
        while self._queue and not (taken[-1].together or self._queue[0].together):
            count += len(taken[-1].messages)
            size += sum([len(message.body) for message in taken[-1].messages])
            if count + len(self._queue[0].messages) > BATCH_MESSAGES or size > BATCH_BYTES:
                break
            taken.append(self._queue.popleft())
        return taken

    async def _publish(self, messages: list[_Publish], until: float, *, together: bool) -> list[Outcome]:
        is_sent = False
        if len(messages) > 1:
            if together:
                return await self._publish_together(messages, until)
            ack = await self._ask_batch(messages)
            if ack is not None and ack.is_batch:
                return self._ids(messages, ack)
            # The engine refuses a batch that contains repeated puts, or for which there is no room.
            self.split += 1
            is_sent = ack is None
        return [await self._publish_one(message, until, is_sent=is_sent) for message in messages]

    async def _publish_together(self, messages: list[_Publish], until: float) -> list[Outcome]:
        """Publish a batch, retrying until its outcome is known: all messages are stored, or none."""
        is_sent = False
        while time.monotonic() < until:
            ack = await self._ask_batch(messages)
            if ack is not None and ack.is_batch:
                return self._ids(messages, ack)
            if is_sent and ack is not None and ack.code == _REPEATED:
                # An earlier attempt has stored it.
                return [await self._publish_one(message, until, is_sent=True) for message in messages]
            if ack is not None and ack.code not in (0, _IN_PROCESS) and not is_sent:
                return [_refusal(ack)] * len(messages)
            is_sent = is_sent or ack is None
            self.retries += 1
            await asyncio.sleep(_PAUSE_SECONDS)
        return [_unsure() if is_sent else StoreFailed("the engine does not answer")] * len(messages)

    def _ids(self, messages: list[_Publish], ack: Ack) -> list[Outcome]:
        """Return the ids of a batch's messages; the engine reports only the last."""
        self.last_id = max(self.last_id, ack.id)
        return list(range(ack.id - len(messages) + 1, ack.id + 1))

    async def _ask_batch(self, messages: list[_Publish]) -> Ack | None:
        name = secrets.token_hex(8).encode()

        def encode(reply: bytes) -> bytes:
            encoded = []
            for number, message in enumerate(messages, 1):
                headers = [(b"Nats-Batch-Id", name), (b"Nats-Batch-Sequence", b"%d" % number)]
                if number < len(messages):
                    encoded.append(message.encode(b"", headers))
                else:
                    encoded.append(message.encode(reply, [*headers, (b"Nats-Batch-Commit", b"1")]))
            return b"".join(encoded)

        return await self._requests.ask(encode, ATTEMPT_SECONDS)

    async def _publish_one(self, message: _Publish, until: float, *, is_sent: bool) -> Outcome:
        """Publish a message, retrying until its outcome is known. `is_sent`: it may already be stored."""
        while time.monotonic() < until:
            ack = await self._requests.ask(message.encode, ATTEMPT_SECONDS)
            if ack is not None and ack.id:
                self.last_id = max(self.last_id, ack.id)
                self.repeated += ack.is_repeated
                return ack.id
            if ack is not None and ack.code in FULL and not is_sent:
                return _refusal(ack)
            if ack is not None and ack.code != _IN_PROCESS:
                _logger.debug("the engine refused a put: %s (%s)", ack.text, ack.code)
            is_sent = is_sent or ack is None or ack.code == _IN_PROCESS
            self.retries += 1
            await asyncio.sleep(_PAUSE_SECONDS)
        return _unsure() if is_sent else StoreFailed("the engine does not answer")


def _refusal(ack: Ack) -> ReplyError:
    if ack.code in FULL:
        return Full(f"the engine is full: {ack.text}")
    return StoreFailed(f"the engine refused it: {ack.text} ({ack.code})")


def _unsure() -> Unsure:
    return Unsure("the engine did not answer in time; the message may or may not be stored")
