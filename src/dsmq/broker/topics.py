"""The commands that describe topics, and PURGE, which empties them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsmq.broker.arguments import check_topic, parse_number, parse_options, parse_topic
from dsmq.broker.reads import PendingSlices
from dsmq.store.selection import Selection
from dsmq.wire.limits import MAX_COUNT, MAX_INTEGER, MAX_NAMES_BYTES
from dsmq.wire.resp import Encoded, encode_array, encode_bulk, encode_integer, encode_value

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection


def topics(client: Connection, request: list[bytes]) -> bytes:
    options = parse_options(request[1:], {b"AFTER": 1, b"COUNT": 1})
    after = options.get(b"AFTER", [b""])[0]
    count = parse_number(options, b"COUNT", MAX_COUNT, 1, MAX_COUNT)
    items: list[bytes] = []
    for topic in client.context.store.in_memory.topics(after, count):
        items += encode_bulk(topic.name), encode_integer(topic.messages), encode_integer(topic.bytes)
    return encode_array(items)


def stats(client: Connection, request: list[bytes]) -> bytes:
    store, (topic, after) = client.context.store, parse_stats(client, request)
    values = store.in_memory.stats(topic, after)._asdict()
    del values["name"]
    for group in store.groups.first_stats(lambda group: group.key == topic):
        workers = client.context.take_queues.count((topic, group.name))
        figures = {**group.figures, "waiting_workers": workers}
        values |= {f"{group.name.decode()}:{name}": value for name, value in figures.items()}
    return encode_value(client.version, values)


def parse_stats(client: Connection, request: list[bytes]) -> tuple[bytes, int]:
    options = parse_options(request[2:], {b"AFTER": 1})
    return parse_topic(client, request), parse_number(options, b"AFTER", 0, 0, MAX_INTEGER)


def purge(client: Connection, request: list[bytes]) -> Encoded | None:
    name = request[1]
    check_topic(name, MAX_NAMES_BYTES if b"*" in name else client.context.settings.max_topic_bytes)
    encode = lambda _client, pending, _messages: encode_integer(pending.total)  # noqa: E731 - it is short
    slices = client.context.store.purge(Selection([name]))
    return client.reads.start(PendingSlices(b"", 0, 1, 1, 0, encode, slices=slices))
