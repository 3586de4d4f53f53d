"""The commands that describe topics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsmq.broker.arguments import parse_number, parse_options, parse_topic
from dsmq.wire.limits import MAX_INTEGER
from dsmq.wire.resp import encode_array, encode_bulk, encode_integer, encode_value

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection

# Max topics in one reply.
MAX_COUNT = 1_000


def topics(client: Connection, request: list[bytes]) -> bytes:
    options = parse_options(request[1:], {b"AFTER": 1, b"COUNT": 1})
    after = options.get(b"AFTER", [b""])[0]
    count = parse_number(options, b"COUNT", MAX_COUNT, 1, MAX_COUNT)
    items: list[bytes] = []
    for topic in client.context.store.topics(after, count):
        items += encode_bulk(topic.name), encode_integer(topic.messages), encode_integer(topic.bytes)
    return encode_array(items)


def stats(client: Connection, request: list[bytes]) -> bytes:
    values = client.context.store.stats(*parse_stats(client, request))._asdict()
    del values["name"]
    return encode_value(client.version, values)


def parse_stats(client: Connection, request: list[bytes]) -> tuple[bytes, int]:
    options = parse_options(request[2:], {b"AFTER": 1})
    return parse_topic(client, request), parse_number(options, b"AFTER", 0, 0, MAX_INTEGER)
