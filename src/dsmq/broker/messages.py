"""The commands that put messages, read them, and describe topics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dsmq.broker.arguments import MAX_NAME_BYTES, parse_integer, parse_number, parse_options
from dsmq.errors import BadRequest, TooBig, WrongEpoch
from dsmq.store.api import Answer, Message, Put, Store, TopicStats
from dsmq.wire.limits import DEFAULT_COUNT, MAX_INTEGER, MAX_READ_BYTES
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

MAX_COUNT = 1_000
# Max size of one reply to READ while others are unread: most of a longer one would never reach a client that doesn't
# read.
SHORT_READ_BYTES = 65_536
MAX_WAIT_MS = 86_400_000


def put(client: Connection, request: list[bytes]) -> None:
    client.loop.batch.add(client, parse_put(client, request))


def parse_put(client: Connection, request: list[bytes]) -> Put:
    topic, body = request[1], request[2]
    settings = client.context.settings
    if len(body) > settings.max_message_bytes:
        # The parser itself rejects lengths of 1,024 or more, before the message has arrived.
        raise TooBig(f"a message has at most {settings.max_message_bytes} bytes, not {len(body)}")
    if not (0 < len(topic) <= settings.max_topic_bytes and topic.isascii()):
        # For most topics this saves the call, which takes as long as the other checks together.
        parse_topic(client, request)
    return topic, body, _parse_key(client.context.store, request) if len(request) > 3 else None


def parse_topic(client: Connection, request: list[bytes]) -> bytes:
    topic, max_bytes = request[1], client.context.settings.max_topic_bytes
    if not topic:
        raise BadRequest("the name of the topic is empty")
    if len(topic) > max_bytes:
        raise TooBig(f"a topic has at most {max_bytes} bytes, not {len(topic)}")
    if not topic.isascii():
        try:
            topic.decode()
        except UnicodeDecodeError:
            raise BadRequest("the topic is not UTF-8") from None
    return topic


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


def read(client: Connection, request: list[bytes]) -> Encoded | None:
    pending = parse_read(client, request)
    store = client.context.store
    if pending.epoch is not None:
        _check_epoch(store, pending.epoch)
    if pending.after > store.last_id():
        raise BadRequest(f"no message has an id above {store.last_id()} yet; was the server restarted since?")
    return client.reads.start(pending)


def parse_read(client: Connection, request: list[bytes]) -> PendingRead:
    topic = parse_topic(client, request)
    after = parse_integer(request[2], "after")
    count, max_bytes, wait_ms, epoch = _read_options(*request[3:])
    if client.transport.budget.total:
        max_bytes = min(max_bytes, SHORT_READ_BYTES)
    return PendingRead(topic, after, count, max_bytes, wait_ms, _encode_read, epoch)


@lru_cache
def _read_options(*words: bytes) -> tuple[int, int, int, bytes | None]:
    options = parse_options(words, {b"COUNT": 1, b"BYTES": 1, b"WAIT": 1, b"LATEST": 0, b"EPOCH": 1})
    count = parse_number(options, b"COUNT", DEFAULT_COUNT, 1, MAX_COUNT)
    max_bytes = parse_number(options, b"BYTES", MAX_READ_BYTES, 1, MAX_READ_BYTES)
    wait_ms = parse_number(options, b"WAIT", 0, 0, MAX_WAIT_MS)
    return 0 if b"LATEST" in options else count, max_bytes, wait_ms, options.get(b"EPOCH", [None])[0]


def _encode_read(client: Connection, read: PendingRead, messages: list[Message]) -> Encoded:
    if read.epoch is not None:
        # Checked again, because a store on another machine may have begun another epoch during the wait.
        _check_epoch(client.context.store, read.epoch)
    _count_delivery(client, read.topic, messages)
    return encode_messages(messages)


def _check_epoch(store: Store, epoch: bytes) -> None:
    if epoch != store.epoch.encode():
        raise WrongEpoch(f"{store.epoch} {store.run} this is another epoch")


def _count_delivery(client: Connection, topic: bytes, messages: list[Message]) -> None:
    counters = client.counters
    if not messages:
        counters.gets_empty += 1
        return
    counters.gets_message += 1
    counters.delivered += len(messages)
    client.last_read = topic, messages[-1].number
    if messages[0].age_ms == messages[-1].age_ms:
        counters.delivery_seconds.add(messages[0].age_ms / 1000, len(messages))
        return
    for message in messages:
        counters.delivery_seconds.add(message.age_ms / 1000)


def get(client: Connection, request: list[bytes]) -> Encoded | None:
    return _get_at_position(client, parse_topic(client, request), 1, 0)


def get_latest(client: Connection, request: list[bytes]) -> Encoded | None:
    return _get_at_position(client, parse_topic(client, request), 0, 0)


def get_wait(client: Connection, request: list[bytes]) -> Encoded | None:
    topic, wait_ms = parse_get_wait(client, request)
    return _get_at_position(client, topic, 1, wait_ms)


def parse_get_wait(client: Connection, request: list[bytes]) -> tuple[bytes, int]:
    return parse_topic(client, request), parse_integer(request[2], "milliseconds", most=MAX_WAIT_MS)


def _get_at_position(client: Connection, topic: bytes, count: int, wait_ms: int) -> Encoded | None:
    position = client.reads.positions.get(topic, client.start_id)
    return client.reads.start(PendingRead(topic, position, count, 1, wait_ms, _advance_position))


def _advance_position(client: Connection, read: PendingRead, messages: list[Message]) -> Encoded:
    _count_delivery(client, read.topic, messages)
    if not messages:
        return encode_null(client.version)
    client.reads.set_position(read.topic, messages[0].id)
    return encode_bulk(messages[0].body)


def topics(client: Connection, request: list[bytes]) -> bytes:
    options = parse_options(request[1:], {b"AFTER": 1, b"COUNT": 1})
    after = options.get(b"AFTER", [b""])[0]
    count = parse_number(options, b"COUNT", MAX_COUNT, 1, MAX_COUNT)
    return _encode_topics(client.context.store.topics(after, count))


def _encode_topics(topics: list[TopicStats]) -> bytes:
    items: list[bytes] = []
    for topic in topics:
        items += encode_bulk(topic.name), encode_integer(topic.messages), encode_integer(topic.bytes)
    return encode_array(items)


def stats(client: Connection, request: list[bytes]) -> bytes:
    return _encode_stats(client.version, client.context.store.stats(*parse_stats(client, request)))


def parse_stats(client: Connection, request: list[bytes]) -> tuple[bytes, int]:
    options = parse_options(request[2:], {b"AFTER": 1})
    return parse_topic(client, request), parse_number(options, b"AFTER", 0, 0, MAX_INTEGER)


def _encode_stats(version: int, stats: TopicStats) -> bytes:
    values = stats._asdict()
    del values["name"]
    return encode_value(version, values)
