"""Reads that may have to wait, as data."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dsmq.errors import ReplyError, StoreFailed
from dsmq.store.api import Answer, Message, Store
from dsmq.wire.resp import Encoded

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class PendingRead:
    """A request for messages, until it is answered."""

    topic: bytes
    after: int
    count: int
    """Max messages; 0 stands for the newest one only."""
    max_bytes: int
    wait_ms: int
    """How long to wait for a message if there is none."""
    encode: Callable[[Connection, PendingRead, list[Message]], Encoded]
    epoch: bytes | None = None
    """The epoch that `after` belongs to."""
    below: int = 0
    """If not 0, only messages with lower ids are returned: later ones of the same transaction are stored already."""
    deadline: float = math.inf
    registered: bool = False
    """Whether a put into the topic wakes the connection."""

    def fetch(self, store: Store) -> Answer[list[Message]]:
        if self.count:
            return store.read(self.topic, self.after, self.count, self.max_bytes)
        if self.below:
            return store.latest(self.topic, self.after, self.below)
        return store.latest(self.topic, self.after)


def outcome(answer: Future[T]) -> T | ReplyError:
    """Return what a store has answered later, or the error to reply with."""
    try:
        return answer.result()
    except ReplyError as error:
        return error
    except Exception as error:  # noqa: BLE001 - whatever went wrong in the store
        return StoreFailed(str(error))
