"""Requests to NATS over `NATSConnection`, each with its own reply subject."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import Callable
from typing import NamedTuple

from dsmq.store.nats_api import NO_RESPONDERS
from dsmq.store.nats_connection import NATSConnection, Received


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


NOT_SENT = Ack(text="no responders")


class Requests:
    """Sends requests and passes the replies on. Used in one asyncio event loop."""

    def __init__(self, connection: NATSConnection) -> None:
        self._connection = connection
        self._inbox = f"_INBOX.{secrets.token_hex(11)}.".encode()
        self._numbers = itertools.count(1)
        self._pending: dict[bytes, tuple[Callable[[Ack | None], None], asyncio.TimerHandle]] = {}
        connection.subscribe(self._inbox + b"*", self._on_reply)

    def send(self, encode: Callable[[bytes], bytes], seconds: float, call: Callable[[Ack | None], None]) -> None:
        """Send a request, encoded with its reply subject; pass the answer to `call`, or None if none arrives in time.

        The answer is NOT_SENT if there is no connection or no responder, for example because the stream has no leader.
        """
        subject = b"%b%d" % (self._inbox, next(self._numbers))
        self._pending[subject] = call, asyncio.get_running_loop().call_later(seconds, self._answer, subject, None)
        if not self._connection.send(encode(subject)):
            self._answer(subject, NOT_SENT)

    async def ask(self, encode: Callable[[bytes], bytes], seconds: float) -> Ack | None:
        """Send a request and return the answer."""
        future: asyncio.Future[Ack | None] = asyncio.get_running_loop().create_future()
        self.send(encode, seconds, lambda ack: None if future.done() else future.set_result(ack))
        return await future

    def _answer(self, subject: bytes, ack: Ack | None) -> None:
        call, timer = self._pending.pop(subject)
        timer.cancel()
        call(ack)

    def _on_reply(self, reply: Received) -> None:
        if reply.subject in self._pending:
            self._answer(reply.subject, NOT_SENT if reply.status == NO_RESPONDERS else _parse_ack(reply.body))

    def on_lost(self) -> None:
        """End the pending requests, because the connection broke."""
        for subject in list(self._pending):
            self._answer(subject, None)


def _parse_ack(body: bytes) -> Ack | None:
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    error = answer.get("error")
    if error:
        return Ack(code=int(error.get("err_code", 0)), text=str(error.get("description", "")))
    return Ack(int(answer.get("seq", 0)), "batch" in answer, bool(answer.get("duplicate")))
