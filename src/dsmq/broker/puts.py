"""The puts of one turn of an event loop."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from dsmq import logs
from dsmq.errors import ReplyError, StoreFailed
from dsmq.store.api import Answer, Put
from dsmq.wire.resp import encode_integer

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.event_loop import EventLoop

# Max bytes put before they are stored, so that a turn's messages need not all fit in memory twice.
MAX_BATCH_BYTES = 1_048_576
# Bytes counted for each put in addition to its message, so that no more than 500 are stored at once.
PUT_BYTES = MAX_BATCH_BYTES // 500

_logger = logging.getLogger(__name__)


class PutBatch:
    """Puts that are stored together at the end of the turn, and then answered in order."""

    def __init__(self, loop: EventLoop) -> None:
        self.puts: list[Put] = []
        self._connections: list[Connection] = []
        self._bytes = 0
        self._loop = loop

    def add(self, connection: Connection, put: Put) -> None:
        """Store this at the end of the turn; the reply follows then."""
        connection.pending_puts += 1
        self.puts.append(put)
        self._connections.append(connection)
        self._bytes += len(put[1]) + PUT_BYTES
        if self._bytes >= MAX_BATCH_BYTES:
            self.commit()

    def commit(self) -> None:
        """Store the batch now."""
        puts, connections = self.puts, self._connections
        self.puts, self._connections, self._bytes = [], [], 0
        if puts:
            self._store(puts, connections)

    def _store(self, puts: list[Put], connections: list[Connection]) -> None:
        stored = self.append(puts)
        if isinstance(stored, Future):
            for connection in connections:
                connection.park()
            self._loop.when_done(stored, partial(_answer_later, connections))
        elif isinstance(stored, ReplyError) and len(puts) > 1:
            # One by one, so that a message that can't be stored fails alone.
            for put, connection in zip(puts, connections, strict=True):
                self._store([put], [connection])
        else:
            _answer(connections, stored)

    def append(self, puts: list[Put]) -> Answer[list[int]] | ReplyError:
        """Store all of these puts or none, and wake the readers that wait for them; return the ids or the error."""
        try:
            stored = self._loop.context.store.append(puts)
        except ReplyError as error:
            return error
        except Exception:
            _logger.exception("storing failed by a defect", extra=logs.event("defect"))
            self._loop.counters.failures += 1
            return StoreFailed("a defect; see the server's log")
        if isinstance(stored, Future):
            stored.add_done_callback(lambda done: None if done.exception() else self._loop.wake_all(puts))
        else:
            # Before the replies to the puts, so that readers do not wait for those.
            self._loop.wake_all(puts)
        return stored


def _answer(connections: list[Connection], stored: list[int] | ReplyError) -> None:
    if isinstance(stored, ReplyError):
        for connection in connections:
            connection.pending_puts -= 1
            connection.counters.puts_refused[stored.code] += 1
            connection.fail(stored)
        return
    for connection, message_id in zip(connections, stored, strict=True):
        connection.pending_puts -= 1
        connection.transport.send(encode_integer(message_id))


def _answer_later(connections: list[Connection], stored: list[int] | ReplyError) -> None:
    _answer(connections, stored)
    for connection in dict.fromkeys(connections):
        if not connection.pending_puts:
            connection.resume()
