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
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from dsmq.errors import Full, ReplyError, StoreFailed, Unsure
from dsmq.store.api import Outcome, Put, RetriedKey
from dsmq.store.nats_api import FULL, WRONG_SEQUENCE
from dsmq.store.nats_connection import encode_publish, encode_token
from dsmq.store.nats_requests import Ack, Requests
from dsmq.store.nats_room import FACTS_LEAVE, MESSAGE_BYTES, PUTS_LEAVE

if TYPE_CHECKING:
    from dsmq.store.nats_index import ReadIndex
    from dsmq.store.nats_stream import Stream

# A batch is stored atomically, with one acknowledgement. Puts that arrive in the meantime form the next one.
BATCH_MESSAGES, BATCH_BYTES = 500, 524_288
# How long to wait for an answer before the puts are sent again, under the same ids, and how long to keep trying.
ATTEMPT_SECONDS, PUT_SECONDS = 1.0, 20.0
_PAUSE_SECONDS = 0.1
# "The message id is in process": the outcome of an earlier attempt is not known yet.
_IN_PROCESS = 10158
# "Wrong last sequence", without a number: the engine is checking the epoch for another server's put.
_CHECKING = 10164
# Answers after which a batch is sent again as it is; 0: the stream has no leader.
_TRANSIENT = 0, _IN_PROCESS, _CHECKING
# "The batch contains a message id that is known."
_REPEATED = 10201

_logger = logging.getLogger(__name__)


class _Publish(NamedTuple):
    subject: bytes
    message_id: bytes
    put: Put
    """The put; if it had no key, it has one of the publisher's own."""
    only_in_epoch: list[tuple[bytes, bytes]]
    """Headers with which the engine stores it only if the stream still has the epoch of the first attempt.

    The first attempt has none, because the engine checks them for one server at a time.
    """

    @property
    def is_retry(self) -> bool:
        """Whether an earlier attempt, perhaps by another server, may have stored it."""
        return isinstance(self.put[2], RetriedKey)

    def encode(self, reply: bytes, batch: Sequence[tuple[bytes, bytes]] = (), *, is_sent: bool) -> bytes:
        headers = [(b"Nats-Msg-Id", self.message_id), *batch]
        if is_sent or self.is_retry:
            headers += self.only_in_epoch
        return encode_publish(self.subject, self.put[1], reply, headers)


class _Append(NamedTuple):
    """The puts of one call of `Store.append`."""

    messages: list[_Publish]
    answer: Future[list[Outcome]]
    together: bool
    """Whether to store all or none."""
    until: float
    """When to give up, by the monotonic clock."""
    leaves: float
    """The share of the room for facts that must remain."""

    @property
    def bytes(self) -> int:
        return _size(self.messages)


class _Batch(NamedTuple):
    """Messages that are published together."""

    messages: list[_Publish]
    together: bool
    until: float

    @property
    def is_retry(self) -> bool:
        return any(message.is_retry for message in self.messages)

    def encode(self, reply: bytes, *, is_sent: bool) -> bytes:
        """`is_sent`: an earlier attempt may have stored it."""
        if len(self.messages) == 1:
            return self.messages[0].encode(reply, is_sent=is_sent)
        name, last = secrets.token_hex(8).encode(), len(self.messages)
        encoded = []
        for number, message in enumerate(self.messages, 1):
            headers = [(b"Nats-Batch-Id", name), (b"Nats-Batch-Sequence", b"%d" % number)]
            if number < last:
                encoded.append(message.encode(b"", headers, is_sent=is_sent))
            else:
                headers.append((b"Nats-Batch-Commit", b"1"))
                encoded.append(message.encode(reply, headers, is_sent=is_sent))
        return b"".join(encoded)


class Publisher:
    """Publishes puts. Used in one asyncio event loop."""

    def __init__(self, requests: Requests, stream: Stream, index: ReadIndex) -> None:
        self._requests, self._stream, self._index = requests, stream, index
        self._queue: deque[_Append] = deque()
        self._is_running = False
        # What is being published now.
        self._appends: list[_Append] = []
        self._began = 0.0
        # Batches whose first attempt had no outcome, each with the engine's answer; or an unexpected exception.
        self._failed: asyncio.Queue[tuple[_Batch, Ack | None] | Exception] = asyncio.Queue()
        # The ids of puts without a key.
        self._own = f"s.{secrets.token_hex(8)}".encode()
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
        only_here = self._stream.epochs.only_in(self._index.epoch)
        for topic, body, key in puts:
            name = key or (self._own, next(self._numbers))
            message_id = b"p.%b:%d" % (encode_token(key[0]), key[1]) if key else b"%b:%d" % name
            subject = self._stream.topic_prefix + encode_token(topic)
            only = self._stream.epochs.only_in(key.run) if isinstance(key, RetriedKey) and key.run else only_here
            messages.append(_Publish(subject, message_id, (topic, body, name), only))
        self._queue.append(_Append(messages, answer, together, time.monotonic() + PUT_SECONDS, PUTS_LEAVE))
        self._begin()

    def put_fact(self, subject: bytes, body: bytes, answer: Future[list[Outcome]], leaves: float = FACTS_LEAVE) -> None:
        """Queue a message for the servers, in order with puts, that leaves this share of the room for facts."""
        key = self._own, next(self._numbers)
        fact = _Publish(subject, b"%b:%d" % key, (b"", body, key), self._stream.epochs.only_in(self._index.epoch))
        self._queue.append(_Append([fact], answer, together=False, until=time.monotonic() + PUT_SECONDS, leaves=leaves))
        self._begin()

    async def run(self) -> None:
        """Publish queued puts until cancelled."""
        # First attempts are made without a task, which would take two more iterations of the event loop per put.
        self._is_running = True
        try:
            self._begin()
            while True:
                failed = await self._failed.get()
                if isinstance(failed, Exception):
                    raise failed
                self._finish(await self._go_on(*failed), is_sure=False)
        finally:
            self._is_running = False

    def count_repeated(self, puts: int) -> None:
        """Count puts that were not published because the mirror already has them."""
        self.repeated += puts

    def close(self) -> None:
        """Fail the queued puts, which have not been sent."""
        while self._queue:
            self._queue.popleft().answer.set_exception(StoreFailed("the store is closed"))

    def _begin(self) -> None:
        """Send the next batch if none is in flight."""
        if self._appends or not self._is_running:
            return
        self._appends = appends = self._take()
        if not appends:
            return
        messages = [message for append in appends for message in append.messages]
        self._began = time.monotonic()
        batch = _Batch(messages, appends[0].together, appends[0].until)
        encode = partial(batch.encode, is_sent=False)
        self._requests.send(encode, ATTEMPT_SECONDS, partial(self._on_first_answer, batch))

    def _on_first_answer(self, batch: _Batch, ack: Ack | None) -> None:
        try:
            if outcomes := self._outcomes(batch, ack, is_sent=False):
                is_repeated = batch.is_retry or (ack is not None and ack.is_repeated)
                self._finish(outcomes, is_sure=not (batch.together or is_repeated))
            else:
                self._failed.put_nowait((batch, ack))
        except Exception as error:  # noqa: BLE001 - `run` raises it, so that puts do not wait forever
            self._failed.put_nowait(error)

    def _finish(self, outcomes: list[Outcome], *, is_sure: bool) -> None:
        """Send the next batch and answer this one.

        If reads of the same transaction follow or if the engine may have stored it twice, it is answered once the
        mirror has it. The engine may store a put twice, because it forgets ids sooner than the mirrors do, and because
        a new leader repeats what the previous one began.
        """
        self.seconds += time.monotonic() - self._began
        self.published += 1
        appends, self._appends = self._appends, []
        self._begin()
        if is_sure:
            _answer(appends, outcomes)
            return

        def finish(_: Exception | None) -> None:
            first_ids = self._index.mirrored([message.put for append in appends for message in append.messages])
            _answer(appends, [first or outcome for first, outcome in zip(first_ids, outcomes, strict=True)])

        if ids := [outcome for outcome in outcomes if isinstance(outcome, int)]:
            self._index.add(finish, max(ids))
        else:
            finish(None)

    def _take(self) -> list[_Append]:
        """Take the next batch out of the queue, and refuse what the stream has no room for."""
        taken, count, size = list[_Append](), 0, 0
        while self._queue:
            following = self._queue[0]
            is_alone = following.together or (taken and taken[-1].together)
            if taken and (is_alone or count + len(following.messages) > BATCH_MESSAGES or size > BATCH_BYTES):
                break
            self._queue.popleft()
            if self._stream.room.is_short(size + following.bytes, following.leaves):
                self._refuse(following)
                continue
            count, size = count + len(following.messages), size + following.bytes
            taken.append(following)
        return taken

    def _refuse(self, append: _Append) -> None:
        self._stream.room.refused = append.bytes
        full = Full("the stream has no room for more; the rest of max_stored_bytes is reserved for workers")
        unsure = Unsure(f"{full}; an earlier attempt may be stored")
        append.answer.set_result([unsure if message.is_retry else full for message in append.messages])

    def _outcomes(self, batch: _Batch, ack: Ack | None, *, is_sent: bool) -> list[Outcome]:
        """Return the outcomes of a batch; none if they are unknown or if it has to be split or retried.

        `is_sent`: an earlier attempt may have stored it.
        """
        count = len(batch.messages)
        if ack is None:
            return []
        if ack.id and (ack.is_batch or count == 1):
            # The engine reports only the last id of a batch.
            self.last_id = max(self.last_id, ack.id)
            self._stream.room.publish(ack.id, _size(batch.messages))
            self.repeated += ack.is_repeated
            return list(range(ack.id - count + 1, ack.id + 1))
        if ack.code == WRONG_SEQUENCE and (count == 1 or batch.together):
            return [Unsure("the stream has lost its messages; this one may or may not have been among them")] * count
        is_final = ack.code in FULL if count == 1 else batch.together and ack.code not in (*_TRANSIENT, _REPEATED)
        if is_final and ack.code in FULL and batch.is_retry:
            return [Unsure(f"the engine is full, but an earlier attempt may be stored: {ack.text}")] * count
        return [_refusal(ack)] * count if is_final and not is_sent and not batch.is_retry else []

    async def _go_on(self, batch: _Batch, ack: Ack | None) -> list[Outcome]:
        """Publish a batch whose first attempt had no outcome."""
        is_sent = _may_be_stored(ack)
        return await self._publish_parts(batch, ack, is_sent=is_sent) or await self._publish(batch, is_sent=is_sent)

    async def _publish_parts(self, batch: _Batch, ack: Ack | None, *, is_sent: bool) -> list[Outcome]:
        """Publish a batch in another way if the engine has refused it; otherwise wait and return no outcomes."""
        if len(batch.messages) > 1 and ack is not None and (ack.id or ack.code not in _TRANSIENT):
            if not batch.together:
                # The batch contains repeated puts, or the stream has no room for all of it.
                self.split += 1
                outcomes: list[Outcome] = []
                for message in batch.messages:
                    outcomes += await self._publish(batch._replace(messages=[message]), is_sent=is_sent)
                return outcomes
            if ack.code == _REPEATED:
                return await self._publish_rest(batch, ack, is_sent=is_sent)
        if ack is not None and ack.code != _IN_PROCESS:
            _logger.debug("the engine refused a put: %s (%s)", ack.text, ack.code)
        self.retries += 1
        await asyncio.sleep(_PAUSE_SECONDS)
        return []

    async def _publish_rest(self, batch: _Batch, refusal: Ack, *, is_sent: bool) -> list[Outcome]:
        """Publish the messages of a refused batch that are not stored yet, each once."""
        try:
            stored = await self._index.stored([message.put for message in batch.messages])
        except StoreFailed as error:
            return [_unsure() if is_sent else error] * len(batch.messages)
        rest: dict[bytes, _Publish] = {}
        for message, message_id in zip(batch.messages, stored, strict=True):
            if message_id is None:
                rest.setdefault(message.message_id, message)
        if len(rest) == len(stored):
            return [_unsure() if is_sent else _refusal(refusal)] * len(rest)
        new = await self._publish(batch._replace(messages=list(rest.values())), is_sent=is_sent) if rest else []
        self.repeated += len(stored) - len(rest)
        outcomes = dict(zip(rest, new, strict=True))
        return [
            message_id or outcomes[message.message_id]
            for message, message_id in zip(batch.messages, stored, strict=True)
        ]

    async def _publish(self, batch: _Batch, *, is_sent: bool) -> list[Outcome]:
        """Publish a batch as a whole, retrying until its outcome is known. `is_sent`: it may already be stored."""
        is_sent = is_sent or batch.is_retry
        while time.monotonic() < batch.until:
            ack = await self._requests.ask(partial(batch.encode, is_sent=is_sent), ATTEMPT_SECONDS)
            if outcomes := self._outcomes(batch, ack, is_sent=is_sent):
                return outcomes
            is_sent = is_sent or _may_be_stored(ack)
            if outcomes := await self._publish_parts(batch, ack, is_sent=is_sent):
                return outcomes
        return [_unsure() if is_sent else StoreFailed("the engine does not answer")] * len(batch.messages)


def _size(messages: Sequence[_Publish]) -> int:
    """Return the bytes of messages in the stream."""
    return sum(
        [MESSAGE_BYTES + len(message.subject) + len(message.message_id) + len(message.put[1]) for message in messages]
    )


def _answer(appends: list[_Append], outcomes: list[Outcome]) -> None:
    for append in appends:
        append.answer.set_result(outcomes[: len(append.messages)])
        del outcomes[: len(append.messages)]


def _may_be_stored(ack: Ack | None) -> bool:
    return ack is None or ack.code == _IN_PROCESS


def _refusal(ack: Ack) -> ReplyError:
    if ack.code in FULL:
        return Full(f"the engine is full: {ack.text}")
    return StoreFailed(f"the engine refused the message: {ack.text} ({ack.code})")


def _unsure() -> Unsure:
    return Unsure("the engine did not answer in time; the message may or may not be stored")
