"""The commands that put and read messages, and those that describe topics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias

from dsmq.broker.arguments import MAX_NAME_BYTES, parse_integer, parse_number, parse_options, parse_topic
from dsmq.errors import BadRequest, TooBig, WrongEpoch
from dsmq.store.api import Answer, Message, Put, Store, TopicStats
from dsmq.wire.limits import MAX_INTEGER
from dsmq.wire.resp import (
    Encoded,
    encode_array,
    encode_bulk,
    encode_integer,
    encode_messages,
    encode_null,
    encode_value,
)

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection

DEFAULT_COUNT = 100
MAX_COUNT = 1_000
MAX_READ_BYTES = 262_144
# Max size of one READ while replies are unread: clients that don't read would never be sent most of a longer one.
SHORT_READ_BYTES = 65_536
MAX_WAIT_MS = 86_400_000
_UNBOUNDED = sys.maxsize

Fetch: TypeAlias = Callable[[], Answer[list[Message]]]


def put(client: Connection, request: list[bytes]) -> None:
    client.put(parse_put(client, request))


def parse_put(client: Connection, request: list[bytes]) -> Put:
    topic, body = request[1], request[2]
    settings = client.context.settings
    if len(body) > settings.max_message_bytes:
        # The parser rejects lengths from 1,024 up by itself, before the message has arrived.
        raise TooBig(f"a message has at most {settings.max_message_bytes} bytes, not {len(body)}")
    if not (0 < len(topic) <= settings.max_topic_bytes and topic.isascii()):
        # For most topics this saves the call, which takes as long as the other checks together.
        parse_topic(topic, settings.max_topic_bytes)
    return topic, body, _parse_key(client.context.store, request) if len(request) > 3 else None


def _parse_key(store: Store, request: list[bytes]) -> tuple[bytes, int] | None:
    if len(request) == 6 and request[3] == b"KEY":
        # A shortcut for what dsmq's own clients send.
        producer, seq = request[4], request[5]
        if 0 < len(producer) <= MAX_NAME_BYTES and len(seq) < 19 and seq.isdigit():
            return producer, int(seq)
    options = parse_options(request[3:], {b"KEY": 2, b"AGAIN": 0, b"RUN": 1})
    if b"RUN" in options and options[b"RUN"][0] != store.run.encode():
        raise WrongEpoch(f"{store.epoch} {store.run} this is another run")
    if b"KEY" not in options:
        if b"AGAIN" in options:
            raise BadRequest("AGAIN requires KEY")
        return None
    producer, seq = options[b"KEY"]
    if not 0 < len(producer) <= MAX_NAME_BYTES:
        raise BadRequest(f"a producer has 1 to {MAX_NAME_BYTES} bytes")
    if b"AGAIN" in options:
        store.check_producer(producer)
    return producer, parse_integer(seq, "seq")


@dataclass(slots=True)
class PendingRead:
    """A READ until it is answered, which may take as long as its wait."""

    client: Connection
    topic: bytes
    after: int
    count: int
    """Max messages; 0 for the newest one."""
    size: int
    """Max bytes of bodies, beyond the first one."""
    wait_ms: int
    epoch: bytes | None
    below: int
    """The id that ends what EXEC lets it read."""

    def start(self) -> Encoded | None:
        return self.client.wait_for(self.topic, self.wait_ms, self.fetch, self.encode)

    def fetch(self) -> Answer[list[Message]]:
        store = self.client.context.store
        if self.count:
            return store.read(self.topic, self.after, self.count, self.size)
        return store.latest(self.topic, self.after, self.below)

    def encode(self, messages: list[Message]) -> Encoded:
        # Checked again, because the epoch may have changed during the wait if the store is on another machine.
        self.check_epoch()
        self.record(messages)
        return encode_messages(messages)

    def check_epoch(self) -> None:
        store = self.client.context.store
        if self.epoch is not None and self.epoch != store.epoch.encode():
            raise WrongEpoch(f"{store.epoch} {store.run} this is another epoch")

    def record(self, messages: list[Message]) -> None:
        """Count a delivery."""
        counters = self.client.counters
        if not messages:
            counters.gets_empty += 1
            return
        counters.gets_message += 1
        counters.delivered += len(messages)
        self.client.last_read = self.topic, messages[-1].number
        if messages[0].age_ms == messages[-1].age_ms:
            counters.delivery_seconds.add(messages[0].age_ms / 1000, len(messages))
            return
        for message in messages:
            counters.delivery_seconds.add(message.age_ms / 1000)


class PendingGet(PendingRead):
    """A GET: it reads from the connection's position, and moves it."""

    __slots__ = ()

    def encode(self, messages: list[Message]) -> Encoded:
        self.record(messages)
        if not messages:
            return encode_null(self.client.version)
        self.client.set_position(self.topic, messages[0].id)
        return encode_bulk(messages[0].body)


def read(client: Connection, request: list[bytes]) -> Encoded | None:
    pending = parse_read(client, request)
    pending.check_epoch()
    last_id = client.context.store.last_id()
    if pending.after > last_id:
        raise BadRequest(f"no message has an id above {last_id} yet; was the server restarted since?")
    return pending.start()


def parse_read(client: Connection, request: list[bytes]) -> PendingRead:
    topic = _parse_topic(client, request)
    after = parse_integer(request[2], "after")
    count, size, wait_ms, epoch = _read_options(*request[3:])
    below = client.below or _UNBOUNDED
    return PendingRead(client, topic, after, count, min(size, client.max_read_bytes), wait_ms, epoch, below)


@lru_cache
def _read_options(*words: bytes) -> tuple[int, int, int, bytes | None]:
    options = parse_options(words, {b"COUNT": 1, b"BYTES": 1, b"WAIT": 1, b"LATEST": 0, b"EPOCH": 1})
    count = parse_number(options, b"COUNT", DEFAULT_COUNT, 1, MAX_COUNT)
    size = parse_number(options, b"BYTES", MAX_READ_BYTES, 1, MAX_READ_BYTES)
    wait_ms = parse_number(options, b"WAIT", 0, 0, MAX_WAIT_MS)
    return 0 if b"LATEST" in options else count, size, wait_ms, options.get(b"EPOCH", [None])[0]


def get(client: Connection, request: list[bytes]) -> Encoded | None:
    return parse_get(client, request).start()


def get_latest(client: Connection, request: list[bytes]) -> Encoded | None:
    return parse_get(client, request, count=0).start()


def get_wait(client: Connection, request: list[bytes]) -> Encoded | None:
    return parse_get_wait(client, request).start()


def parse_get_wait(client: Connection, request: list[bytes]) -> PendingGet:
    return parse_get(client, request, wait_ms=parse_integer(request[2], "milliseconds", most=MAX_WAIT_MS))


def parse_get(client: Connection, request: list[bytes], count: int = 1, wait_ms: int = 0) -> PendingGet:
    topic = _parse_topic(client, request)
    position = client.positions.get(topic, client.start_id)
    return PendingGet(client, topic, position, count, 1, wait_ms, None, client.below or _UNBOUNDED)


def topics(client: Connection, request: list[bytes]) -> Encoded | None:
    options = parse_options(request[1:], {b"AFTER": 1, b"COUNT": 1})
    after = options.get(b"AFTER", [b""])[0]
    count = parse_number(options, b"COUNT", MAX_COUNT, 1, MAX_COUNT)
    return client.reply_to(client.context.store.topics(after, count), _encode_topics)


def _encode_topics(topics: list[TopicStats]) -> bytes:
    items: list[bytes] = []
    for topic in topics:
        items += encode_bulk(topic.name), encode_integer(topic.messages), encode_integer(topic.bytes)
    return encode_array(items)


def stats(client: Connection, request: list[bytes]) -> Encoded | None:
    answer = client.context.store.stats(*parse_stats(client, request))
    return client.reply_to(answer, partial(_encode_stats, client.version))


def parse_stats(client: Connection, request: list[bytes]) -> tuple[bytes, int]:
    options = parse_options(request[2:], {b"AFTER": 1})
    return _parse_topic(client, request), parse_number(options, b"AFTER", 0, 0, MAX_INTEGER)


def _encode_stats(version: int, stats: TopicStats) -> bytes:
    values = stats._asdict()
    del values["name"]
    return encode_value(version, values)


def _parse_topic(client: Connection, request: list[bytes]) -> bytes:
    return parse_topic(request[1], client.context.settings.max_topic_bytes)
