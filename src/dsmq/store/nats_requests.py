"""Requests to NATS over `NATSConnection`, each with its own reply subject."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import Callable
from typing import NamedTuple

from dsmq.store.nats_connection import NATSConnection, Received

_NO_LISTENER = 503
"""The status for a subject without a listener: the stream has no leader at the moment."""


class Ack(NamedTuple):
    """The engine's answer to a message published to a stream."""

    id: int = 0
    """The number of the message in the stream; 0 if it was refused."""
    is_batch: bool = False
    is_repeated: bool = False
    """Whether the message was already stored."""
    code: int = 0
    """JetStream's error code, if it was refused."""
    text: str = ""


NOT_SENT = Ack(text="nobody has received it")


class Requests:
    """Sends requests, and passes the replies on. Used in one asyncio event loop."""

    def __init__(self, connection: NATSConnection) -> None:
        self._connection = connection
        self._inbox = f"_INBOX.{secrets.token_hex(11)}.".encode()
        self._numbers = itertools.count(1)
        self._pending: dict[bytes, asyncio.Future[Received | None]] = {}
        connection.subscribe(self._inbox + b"*", self._on_reply)

    async def ask(self, encode: Callable[[bytes], bytes], seconds: float) -> Ack | None:
        """Send a request, encoded with its reply subject, and return the answer; None if there is none in time.

        Returns NOT_SENT if there is no connection, or no listener for the request.
        """
        subject = b"%b%d" % (self._inbox, next(self._numbers))
        future = self._pending[subject] = asyncio.get_running_loop().create_future()
        try:
            if not self._connection.send(encode(subject)):
                return NOT_SENT
            async with asyncio.timeout(seconds):
                reply = await future
        except TimeoutError:
            return None
        finally:
            del self._pending[subject]
        if reply is None:
            return None
        return NOT_SENT if reply.status == _NO_LISTENER else _parse_ack(reply.body)

    def _on_reply(self, reply: Received) -> None:
        future = self._pending.get(reply.subject)
        if future is not None and not future.done():
            future.set_result(reply)

    def on_lost(self) -> None:
        """End the pending requests, because the connection broke."""
        for future in self._pending.values():
            if not future.done():
                future.set_result(None)


def _parse_ack(body: bytes) -> Ack | None:
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    error = answer.get("error")
    if error:
        return Ack(code=int(error.get("err_code", 0)), text=str(error.get("description", "")))
    return Ack(int(answer.get("seq", 0)), "batch" in answer, bool(answer.get("duplicate")))
