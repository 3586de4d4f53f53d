"""MREAD: a read of several topics at once."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from dsmq.broker.arguments import check_topic, parse_integer
from dsmq.broker.reads import (
    SHORT_READ_BYTES,
    PendingRead,
    check_epoch,
    check_position,
    count_delivery,
    parse_start,
    read_options,
)
from dsmq.errors import BadRequest, TooBig
from dsmq.store.api import MESSAGE_OVERHEAD_BYTES, Answer, ManyTopics, Store, TopicMessage
from dsmq.store.selection import Selection
from dsmq.wire.limits import MAX_NAMES, MAX_NAMES_BYTES
from dsmq.wire.resp import Encoded, encode_found

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.waiters import Waiters

# Max words before the names.
MAX_OPTIONS = 16


@dataclass(slots=True, eq=False)
class PendingMany(PendingRead):
    """A pending read of several topics. `after` advances with each step."""

    selection: Selection = field(default_factory=lambda: Selection(()))
    is_latest: bool = False
    newest: list[TopicMessage] = field(default_factory=list)
    """If `is_latest`, the newest messages found up to `after`."""
    position: int = 0

    def fetch(self, store: Store) -> Answer[Any]:
        if self.start is not None:
            return self.start.find(store, self.below)
        count, max_bytes = self.count - len(self.newest), self.max_bytes - _size(self.newest)
        wanted = ManyTopics(*(self.selection, self.after, count, max_bytes, self.is_latest, self.below or sys.maxsize))
        return store.read_many(wanted, self.wait_ms)

    def take(self, found: Any) -> list[Any] | None:
        if type(found) is tuple:
            return PendingRead.take(self, found)
        messages: list[Any] = found.messages
        self.position = max(self.after, found.position)
        if self.newest:
            newest = {message.topic: message for message in (*self.newest, *messages)}
            messages = sorted(newest.values(), key=attrgetter("id"))
        if messages and (found.is_complete or not self.is_latest):
            # `after` does not advance: if the reply has to wait for memory, the messages are fetched again.
            return messages
        self.after, self.newest = self.position, messages
        return messages if found.is_complete else None

    def wait(self, waiters: Waiters, connection: Connection) -> None:
        waiters.add(self.selection.names, self.selection.patterns, connection)
        connection.reads.count_waiting(self.selection.size)

    def end_wait(self, waiters: Waiters, connection: Connection) -> None:
        waiters.remove(self.selection.names, self.selection.patterns, connection)
        connection.reads.count_waiting(0)

    def covers(self, topic: bytes) -> bool:
        return self.selection.matches(topic)

    @property
    def about(self) -> bytes:
        return self.selection.about

    def memory(self, messages: list[Any]) -> int:
        return _size(messages) + MESSAGE_OVERHEAD_BYTES * len(messages)


def _size(messages: list[TopicMessage]) -> int:
    return sum([len(message.topic) + len(message.body) for message in messages])


def mread(client: Connection, request: list[bytes]) -> Encoded | None:
    pending = parse_mread(client, request)
    check_position(client, pending)
    return client.reads.start(pending)


def parse_mread(client: Connection, request: list[bytes]) -> PendingMany:
    at = 2 if request[1].isdigit() else 3
    end = next((end for end, word in enumerate(request[:MAX_OPTIONS]) if end >= at and word.upper() == b"TOPICS"), 0)
    if not end or len(request) == end + 1:
        raise BadRequest("expected TOPICS and one or more names")
    selection = _select(client.context.settings.max_topic_bytes, *request[end + 1 :])
    start = None if at == 2 else parse_start(selection, request[1:3])
    after = 0 if start else parse_integer(request[1], "after")
    count, max_bytes, wait_ms, epoch, is_latest = read_options(*request[at:end])
    if client.transport.budget.total:
        max_bytes = min(max_bytes, SHORT_READ_BYTES)
    return PendingMany(
        *(b"", after, count, max_bytes, wait_ms, _encode, epoch),
        start=start,
        selection=selection,
        is_latest=is_latest,
    )


@lru_cache(32)
def _select(max_topic_bytes: int, *words: bytes) -> Selection:
    if len(words) > MAX_NAMES or sum(map(len, words)) > MAX_NAMES_BYTES:
        raise TooBig(f"a request may read at most {MAX_NAMES} topics and patterns, of {MAX_NAMES_BYTES} bytes in total")
    for word in words:
        check_topic(word, MAX_NAMES_BYTES if b"*" in word else max_topic_bytes)
    return Selection(words)


def _encode(client: Connection, read: PendingMany, messages: list[Any]) -> Encoded:
    if read.epoch is not None:
        # Checked again, because a store on another machine may have begun another epoch during the wait.
        check_epoch(client.context.store, read.epoch)
    count_delivery(client, messages[-1].topic if messages else b"", messages)
    client.last_selection = (read.selection, read.position) if read.selection.is_short else None
    return encode_found(read.position, messages)
