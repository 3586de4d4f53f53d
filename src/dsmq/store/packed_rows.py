"""How messages stand in rows: those of one topic and millisecond together, as a chunk."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import TypeAlias

# No chunk is longer but one of a single message: to read one message is to read a chunk.
CHUNK_MESSAGES, CHUNK_BYTES = 128, 16_384

Stored: TypeAlias = tuple[int, int, int, bytes]
"""A message as it is held: id, number, when it was put in milliseconds, body."""
Row: TypeAlias = tuple[int, int, bytes, bytes]
"""What is read of a row: when it was put, the last number, ids and sizes, bodies."""


def portions(tail: list[Stored]) -> Iterator[list[Stored]]:
    """Divide a tail into chunks: of one millisecond, and neither too many messages nor too long."""
    start = size = 0
    for at, (_, _, put_at, body) in enumerate(tail):
        size += len(body)
        if at > start and (put_at != tail[start][2] or at - start == CHUNK_MESSAGES or size > CHUNK_BYTES):
            yield tail[start:at]
            start, size = at, len(body)
    yield tail[start:]


def pack(topic: int, messages: list[Stored]) -> tuple[int, int, int, int, bytes, bytes]:
    """Return the row that holds these messages."""
    message_id, number, put_at, _ = messages[-1]
    ids_and_sizes = array("q", [value for message in messages for value in (message[0], len(message[3]))])
    bodies = b"".join([message[3] for message in messages])
    return message_id, topic, put_at, number, ids_and_sizes.tobytes(), bodies


def unpack(chunk: Row, after: int = 0) -> Iterator[Stored]:
    """Iterate over the messages of a row, those with ids above `after`."""
    put_at, last_number, packed, bodies = chunk
    ids_and_sizes = array("q", packed)
    ids, sizes = ids_and_sizes[::2], ids_and_sizes[1::2]
    first = bisect_right(ids, after)
    number, end = last_number - len(ids) + first, sum(sizes[:first])
    for message_id, size in zip(ids[first:], sizes[first:], strict=True):
        number += 1
        start, end = end, end + size
        yield message_id, number, put_at, bodies[start:end]
