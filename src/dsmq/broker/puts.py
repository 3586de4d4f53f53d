"""Puts, from request to reply. Those of one turn of an event loop are stored together."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from dsmq import logs
from dsmq.broker.arguments import ASTERISK, MAX_NAME_BYTES, parse_integer, parse_options, parse_topic
from dsmq.errors import BadRequest, ReplyError, StoreFailed, TooBig, Unsure, WrongEpoch
from dsmq.store.api import Answer, Outcome, Put, RetriedKey, Store, Watched
from dsmq.wire.resp import encode_integer

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.event_loop import EventLoop

# Max bytes in a batch, so that not all messages of a turn have to fit into memory twice.
MAX_BATCH_BYTES = 1_048_576
# Bytes counted for each put in addition to its message, so that a batch has no more than 500 puts.
PUT_BYTES = MAX_BATCH_BYTES // 500

_Left: TypeAlias = "deque[tuple[Connection, Answer[list[Outcome]] | ReplyError]]"
"""Puts without a reply yet and the store's answers to them."""

_logger = logging.getLogger(__name__)


def put(client: Connection, request: list[bytes]) -> None:
    """Add a message to the batch. The reply follows when the batch is stored, at the end of the turn."""
    if client.start_id is None:
        # Otherwise, `start_id` might include this put, and GET would miss it.
        client.await_start(request)
        return
    batch = client.loop.batch
    batch.puts.append(parse_put(client, request))
    batch.connections.append(client)
    batch.bytes += len(request[2]) + PUT_BYTES
    client.pending_puts += 1
    client.last_put = request[1]
    if batch.bytes >= MAX_BATCH_BYTES:
        batch.commit()


def parse_put(client: Connection, request: list[bytes]) -> Put:
    topic, body = request[1], request[2]
    settings = client.context.settings
    if len(body) > settings.max_message_bytes:
        # The parser has already checked lengths of 1,024 or more, before the message arrived.
        raise TooBig(f"a message may have at most {settings.max_message_bytes} bytes, not {len(body)}")
    if not (0 < len(topic) <= settings.max_topic_bytes and topic.isascii()) or ASTERISK in topic:
        # Most topics skip this call, which takes as long as all other checks together.
        parse_topic(client, request)
    return topic, body, _parse_key(client.context.store, request) if len(request) > 3 else None


def _parse_key(store: Store, request: list[bytes]) -> tuple[bytes, int] | None:
    if len(request) == 6 and request[3] == b"KEY":
        # Fast path for requests of dsmq's own clients.
        producer, seq = request[4], request[5]
        if 0 < len(producer) <= MAX_NAME_BYTES and len(seq) < 19 and seq.isdigit():
            return producer, int(seq)
    options = parse_options(request[3:], {b"KEY": 2, b"AGAIN": 0, b"RUN": 1})
    # The store may begin another run at any time.
    run = store.run
    if b"RUN" in options and options[b"RUN"][0] != run.encode():
        raise WrongEpoch(f"{store.epoch} {store.run} this is another run")
    if b"KEY" not in options:
        if b"AGAIN" in options:
            raise BadRequest("AGAIN requires KEY")
        return None
    producer, seq = options[b"KEY"]
    if not 0 < len(producer) <= MAX_NAME_BYTES:
        raise BadRequest(f"a producer should have 1 to {MAX_NAME_BYTES} bytes")
    number = parse_integer(seq, "seq")
    if b"AGAIN" not in options:
        return producer, number
    store.in_memory.check_producer(producer)
    return RetriedKey(producer, number, run if b"RUN" in options else "")


class PutBatch:
    """Puts that are stored together at the end of the turn and then answered in order."""

    def __init__(self, loop: EventLoop, workers: Sequence[EventLoop]) -> None:
        """`workers` are all event loops, whose readers are woken."""
        self.puts: list[Put] = []
        self.connections: list[Connection] = []
        self.bytes = 0
        self._loop = loop
        self._workers = workers

    def commit(self) -> None:
        puts, connections = self.puts, self.connections
        self.puts, self.connections, self.bytes = [], [], 0
        if puts:
            self._store(puts, connections)

    def _store(self, puts: list[Put], connections: list[Connection]) -> None:
        stored = self.append(puts)
        if isinstance(stored, Future):
            for connection in connections:
                connection.requests.park()
            self._loop.when_done(stored, partial(_answer_later, connections))
        elif isinstance(stored, ReplyError) and len(puts) > 1:
            self._store_one_by_one(puts, connections)
        else:
            _answer(connections, stored)

    def _store_one_by_one(self, puts: list[Put], connections: list[Connection]) -> None:
        """Store puts one by one, so that only those that can't be stored fail."""
        answers = [self.append([put]) for put in puts]
        if any(isinstance(answer, Future) for answer in answers):
            for connection in connections:
                connection.requests.park()
        self._answer_in_order(deque(zip(connections, answers, strict=True)))

    def _answer_in_order(self, left: _Left) -> None:
        """Reply to these puts, up to the first that the store answers later; continue when it does."""
        # A refusal is known immediately, but must not overtake the reply to an earlier put.
        while left:
            connection, answer = left.popleft()
            if isinstance(answer, Future):
                self._loop.when_done(answer, partial(self._go_on, connection, left))
                return
            _answer_later([connection], answer)

    def _go_on(self, connection: Connection, left: _Left, stored: list[Outcome] | ReplyError) -> None:
        _answer_later([connection], stored)
        self._answer_in_order(left)

    def append(
        self, puts: list[Put], watched: Watched | None = None, *, together: bool = False
    ) -> Answer[list[Outcome]] | ReplyError:
        """Store these puts and wake readers waiting for them; return the outcomes or the error for all."""
        store = self._loop.context.store
        try:
            stored = store.append_together(puts, watched) if together else store.append(puts)
        except ReplyError as error:
            return error
        except Exception:
            _logger.exception("storing failed because of a bug", extra=logs.event("defect"))
            self._loop.counters.failures += 1
            return StoreFailed("a bug in the server; see its log")
        if not isinstance(stored, Future):
            # Wake the readers now, so that they don't wait for the replies to the puts. A store that answers later
            # reports new messages itself.
            for worker in self._workers:
                if worker.waiters.by_topic or worker.waiters.patterns.waiting:
                    worker.waiters.wake([put[0] for put in puts])
        return stored


def _answer(connections: list[Connection], stored: Sequence[Outcome] | ReplyError) -> None:
    outcomes = [stored] * len(connections) if isinstance(stored, ReplyError) else stored
    for connection, outcome in zip(connections, outcomes, strict=True):
        connection.pending_puts -= 1
        if isinstance(outcome, int):
            connection.transport.send(encode_integer(outcome))
        else:
            connection.counters.puts_refused[outcome.code] += 1
            connection.fail(outcome)
            if isinstance(outcome, Unsure):
                # The client will put the message again, and later requests must not run before that.
                connection.finish()


def _answer_later(connections: list[Connection], stored: Sequence[Outcome] | ReplyError) -> None:
    _answer(connections, stored)
    for connection in dict.fromkeys(connections):
        if not connection.pending_puts:
            connection.requests.resume()


def put_together(
    client: Connection, puts: list[Put], encode: Callable[[list[int] | ReplyError], bytes], watched: Watched
) -> bytes | None:
    """Store all of the puts or none; return the encoded ids or error, or None if the store answers later."""
    stored = client.loop.batch.append(puts, watched, together=True)
    if not isinstance(stored, Future):
        return encode(_as_one(stored))
    client.pending_puts += 1
    client.requests.park()
    client.loop.when_done(stored, partial(_reply_later, client, encode))
    return None


def _reply_later(
    client: Connection, encode: Callable[[list[int] | ReplyError], bytes], stored: list[Outcome] | ReplyError
) -> None:
    if not client.closed:
        client.pending_puts -= 1
        client.transport.send(encode(_as_one(stored)))
        client.requests.resume()


def _as_one(stored: list[Outcome] | ReplyError) -> list[int] | ReplyError:
    """Return the ids of puts that were stored together or their common error."""
    if isinstance(stored, ReplyError):
        return stored
    errors = [outcome for outcome in stored if isinstance(outcome, ReplyError)]
    return errors[0] if errors else [outcome for outcome in stored if isinstance(outcome, int)]
