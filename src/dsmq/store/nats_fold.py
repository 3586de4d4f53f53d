"""Applies the stream's messages to a `MirrorStore`, one after another, in the same way on all servers."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from dsmq.logs import event
from dsmq.store.api import Mirrored
from dsmq.store.nats_connection import Received, decode_token
from dsmq.store.selection import Selection
from dsmq.system import boot_time

if TYPE_CHECKING:
    from dsmq.store.nats_groups import NATSGroups
    from dsmq.store.nats_rules import StreamRules
    from dsmq.store.nats_stream import Stream
    from dsmq.store.sqlite import MirrorStore

# Max purges whose counts are remembered, for the clients that requested them.
MAX_PURGES = 1_000

_logger = logging.getLogger(__name__)


class Delivery(NamedTuple):
    id: int
    put_at: float
    """By `boot_time`, in milliseconds."""
    message: Received
    later: bytes
    """How many messages followed it in the stream."""


class Fold:
    """The part of a mirror that applies messages."""

    def __init__(self, stream: Stream, store: MirrorStore, rules: StreamRules, groups: NATSGroups) -> None:
        self._stream, self.store, self._rules, self.groups = stream, store, rules, groups
        groups.begin(store)
        self.ready = False
        """Whether the store has ever been complete."""
        self.skipped = 0
        """The number of messages that could not be mirrored."""
        self.applied = asyncio.Event()
        self._deliveries: list[Delivery] = []
        # The task that applies a message that takes a while. Later messages wait for it.
        self._change: asyncio.Task[None] | None = None
        self.purge_subject = stream.facts_prefix + b"purge"
        self._rules_subject = stream.facts_prefix + b"rules"
        self.jobs_subject = stream.facts_prefix + b"jobs"
        self.purged: dict[int, int] = {}
        """The number of messages that the last purges deleted, by the purges' ids."""
        # The topics' last numbers, each as of an id, for a mirror that is not complete yet.
        self._facts: list[tuple[int, dict[bytes, int]]] = []
        self._facts_at = time.monotonic()

    @abstractmethod
    def apply(self) -> None:
        """Apply the messages delivered so far."""

    async def wait_for(self, message_id: int) -> None:
        """Wait until the mirror is complete and has this message."""
        while not (self.ready and self.store.last_id() >= message_id):
            self.applied.clear()
            await self.applied.wait()

    def _apply(self, deliveries: list[Delivery]) -> set[bytes]:
        """Apply messages; return the topics of the new ones."""
        now = boot_time() * 1000
        messages, topics = list[Mirrored](), set[bytes]()
        last_id = self.store.last_id()
        for at, (message_id, put_at, message, _) in enumerate(deliveries, 1):
            if message_id <= last_id:
                continue
            if message.subject == self.jobs_subject:
                if messages:
                    # Jobs whose messages are not in the store would count as expired.
                    self._store(messages, last_id)
                    messages = []
                self._apply_to_groups(message.body, message_id, max(0, int(now - put_at)))
                last_id = message_id
                continue
            if not message.subject.startswith(self._stream.topic_prefix):
                if slices := self._slices(message, max(0, int(now - put_at))):
                    self._store(messages, last_id)
                    self._deliveries = deliveries[at:]
                    self._change = asyncio.create_task(self._apply_change(self.store, message_id, slices))
                    return topics
                last_id = message_id
                continue
            last_id = message_id
            topic = decode_token(message.subject[len(self._stream.topic_prefix) :])
            try:
                messages.append(Mirrored(message_id, (topic, message.body, _key(message)), max(0, int(now - put_at))))
            except ValueError as error:
                about = event("skipped", id=message_id)
                _logger.error("message %s can't be mirrored: %s", message_id, error, extra=about)
                self.skipped += 1
            topics.add(topic)
        self._store(messages, last_id)
        return topics

    def _apply_to_groups(self, fact: bytes, message_id: int, age_ms: int) -> None:
        try:
            self.groups.apply(fact, message_id, age_ms)
        except Exception:  # noqa: BLE001
            self._skip_fact(message_id)

    def _skip_fact(self, message_id: int) -> None:
        """Log the exception being handled. The fact must not stop the mirror."""
        _logger.exception("fact %s can't be applied", message_id, extra=event("skipped", id=message_id))
        self.skipped += 1

    def _slices(self, message: Received, age_ms: int) -> Iterator[int] | None:
        """Return an iterator that applies a message that changes others, in slices; None for other messages."""
        if message.subject == self.purge_subject:
            return self.store.purge(Selection(map(decode_token, message.body.split())))
        if message.subject == self._rules_subject:
            return self._apply_rules(message.body, age_ms)
        if message.subject.removeprefix(self._stream.facts_prefix).isdigit():
            self._facts_at = time.monotonic()
        return None

    def _apply_rules(self, fact: bytes, age_ms: int) -> Iterator[int]:
        if fact == self._rules.fact:
            return
        yield from self._rules.apply(self.store, fact, age_ms)
        if self.ready:
            self._stream.adopt(fact)
            self._rules.report()

    async def _apply_change(self, store: MirrorStore, message_id: int, slices: Iterator[int]) -> None:
        """Apply the slices and let other tasks run in between. Later messages have to wait."""
        count = 0
        try:
            for changed in slices:
                count += changed
                await asyncio.sleep(0)
        except Exception:  # noqa: BLE001
            self._skip_fact(message_id)
        self._change = None
        if store is self.store:
            self.purged[message_id] = count
            if len(self.purged) > MAX_PURGES:
                del self.purged[next(iter(self.purged))]
            self._store([], message_id)
            self.applied.set()
        self.apply()

    def _store(self, messages: list[Mirrored], last_id: int) -> None:
        while self._facts and self._facts[0][0] <= last_id:
            at = self._facts[0][0]
            before = [message for message in messages if message.id <= at]
            self._apply_safely(before, at)
            self._apply_facts(at)
            messages = messages[len(before) :]
        self._apply_safely(messages, last_id)

    def _apply_facts(self, last_id: int) -> None:
        while self._facts and self._facts[0][0] <= last_id:
            self.store.renumber(self._facts.pop(0)[1])

    def _apply_safely(self, messages: list[Mirrored], last_id: int) -> None:
        """Apply messages. Messages that fail are skipped, because they must not stop the mirror."""
        try:
            self.store.apply(messages, last_id)
        except Exception:
            if len(messages) > 1:
                for message in messages:
                    self._apply_safely([message], message.id)
                return
            _logger.exception("message %s can't be mirrored", last_id, extra=event("skipped", id=last_id))
            self.skipped += 1
            with suppress(Exception):
                self.store.apply([], last_id)


def _key(message: Received) -> tuple[bytes, int] | None:
    """Return a put's producer and number, set by the client or else by the server."""
    name, _, number = message.header(b"Nats-Msg-Id").rpartition(b":")
    if not number.isdigit():
        return None
    if name.startswith(b"p."):
        return decode_token(name[2:]), int(number)
    # A node that hangs for minutes may store a put that has meanwhile been sent again to another node.
    return (name, int(number)) if name.startswith(b"s.") else None
