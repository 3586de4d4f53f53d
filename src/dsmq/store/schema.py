"""The tables of the database and of a snapshot, and how messages are packed into rows.

Messages of one topic that were put in the same millisecond share a row of `chunks`, because they expire together, and
most costs are per row. The key of a row is the id of its last message.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

# Reading one message unpacks a whole row, so rows are kept short. Only a row with a single message may be longer.
MAX_ROW_MESSAGES, MAX_ROW_BYTES = 128, 16_384
# A power of 2. A row's ids are between two multiples of it, unless they are consecutive, so only a few rows have
# interleaved ids, and only these have to be sorted.
BLOCK_IDS = 512
# Bodies of at least this size are kept outside SQLite, because copying them into its pages takes up to 1 ms per MiB.
# Their rows have sizes but no bodies, except in a snapshot.
LONG_BYTES = 65_536

SCHEMA = """
CREATE TABLE IF NOT EXISTS topics (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS chunks (
    last_id INTEGER PRIMARY KEY,
    topic INTEGER NOT NULL,
    put_at INTEGER NOT NULL,
    last_number INTEGER NOT NULL,
    messages INTEGER NOT NULL,
    ids_and_sizes BLOB NOT NULL,
    bodies BLOB NOT NULL
);
"""
INDEX = "CREATE INDEX IF NOT EXISTS chunks_by_topic ON chunks (topic)"
# Additional tables of a snapshot. In `lost`, each range has two rows without a name (the id before it, and its last
# id), followed by its numbers. In `empty_topics`, a topic with messages has its last dropped id; rows may still contain
# messages up to that id.
SNAPSHOT_SCHEMA = """
CREATE TABLE state (
    epoch TEXT NOT NULL,
    run TEXT NOT NULL,
    clock INTEGER NOT NULL,
    last_id INTEGER NOT NULL,
    last_row INTEGER NOT NULL,
    forgot_at INTEGER,
    written_at REAL NOT NULL,
    is_last INTEGER NOT NULL
);
CREATE TABLE empty_topics (name BLOB NOT NULL, last_number INTEGER NOT NULL, last_id INTEGER NOT NULL);
CREATE TABLE producers (
    id INTEGER PRIMARY KEY,
    name BLOB NOT NULL,
    forgotten INTEGER NOT NULL,
    last_at INTEGER NOT NULL
);
CREATE TABLE puts (producer INTEGER NOT NULL, seq INTEGER NOT NULL, message INTEGER NOT NULL);
CREATE TABLE lost (name BLOB, number INTEGER NOT NULL);
CREATE TABLE worker_groups (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL,
    name BLOB NOT NULL,
    used_at INTEGER NOT NULL,
    position INTEGER NOT NULL,
    taken INTEGER NOT NULL,
    repeated INTEGER NOT NULL,
    done INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    unmoved INTEGER NOT NULL,
    expired INTEGER NOT NULL,
    dropped INTEGER NOT NULL
);
CREATE TABLE jobs (
    worker_group INTEGER NOT NULL,
    id INTEGER NOT NULL,
    topic BLOB,
    attempt INTEGER NOT NULL,
    until INTEGER NOT NULL,
    is_held INTEGER NOT NULL,
    token BLOB NOT NULL
);
CREATE TABLE job_numbers (
    worker_group INTEGER NOT NULL,
    topic BLOB NOT NULL,
    number INTEGER NOT NULL,
    dropped INTEGER NOT NULL
);
"""
INSERT_TOPIC = "INSERT INTO topics (id, name) VALUES (?, ?)"
UPDATE_BODIES = "UPDATE chunks SET bodies = ? WHERE last_id = ?"
INSERT_ROW = "INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?)"

StoredMessage: TypeAlias = tuple[int, int, int, bytes]
"""Id, number in the topic, put time in milliseconds, body."""
Header: TypeAlias = tuple[int, int, int, int, int, bytes]
"""A row without its bodies: last id, topic id, put time, last number, number of messages, ids and sizes."""
Row: TypeAlias = tuple[int, int, int, int, int, bytes, bytes]
"""The columns of `chunks`."""
ExpiredRow: TypeAlias = tuple[int, int, int, int, int, int]
"""Last id, topic id, put time, last number, number of messages, bytes of their bodies."""
Batch: TypeAlias = tuple[str, Sequence[tuple[Any, ...]]]
"""An INSERT statement and rows for it."""


def pack(messages_by_topic: Iterable[tuple[int, list[StoredMessage]]]) -> list[Row]:
    """Return the rows for messages grouped by topic id, in the order of their keys."""
    return sorted(
        [_pack_row(topic, part) for topic, messages in messages_by_topic for part in split_into_rows(messages)]
    )


def split_into_rows(messages: list[StoredMessage]) -> Iterator[list[StoredMessage]]:
    """Split one topic's messages at each change of millisecond, between blocks, and before a row gets too long."""
    start = size = 0
    for at, (message_id, _, put_at, body) in enumerate(messages):
        size += len(body)
        if at > start and (
            put_at != messages[start][2]
            or at - start == MAX_ROW_MESSAGES
            or size > MAX_ROW_BYTES
            or (message_id ^ messages[start][0] >= BLOCK_IDS and message_id - messages[start][0] > at - start)
        ):
            yield messages[start:at]
            start, size = at, len(body)
    yield messages[start:]


def _pack_row(topic: int, messages: list[StoredMessage]) -> Row:
    last_id, last_number, put_at, body = messages[-1]
    count = len(messages)
    if count == 1:
        return last_id, topic, put_at, last_number, 1, array("q", [len(body)]).tobytes(), body
    bodies = [message[3] for message in messages]
    packed = _pack_ids_and_sizes([message[0] for message in messages], list(map(len, bodies)))
    return last_id, topic, put_at, last_number, count, packed, b"".join(bodies)


def _pack_ids_and_sizes(ids: list[int], sizes: list[int]) -> bytes:
    """Return an id and a size for each message, or only the sizes if the ids are consecutive: one if all are equal."""
    if ids[-1] - ids[0] >= len(ids):
        sizes = [value for pair in zip(ids, sizes, strict=True) for value in pair]
    elif sizes.count(sizes[0]) == len(sizes):
        sizes = sizes[:1]
    return array("q", sizes).tobytes()


def unpack_ids_and_sizes(last_id: int, count: int, packed: bytes) -> tuple[Sequence[int], array[int]]:
    """Return the ids and sizes of a row's messages."""
    values = array("q", packed)
    if len(values) == 2 * count:
        return values[::2], values[1::2]
    return range(last_id - count + 1, last_id + 1), values * (count // len(values))


def unpack(row: Row, after: int = 0) -> Iterator[StoredMessage]:
    """Iterate over the messages with ids above `after`."""
    last_id, _, put_at, last_number, count, packed, bodies = row
    if count == 1:
        # Don't slice the body, because mypyc's slices copy even a whole one.
        if last_id > after:
            yield last_id, last_number, put_at, bodies
        return
    ids, sizes = unpack_ids_and_sizes(last_id, count, packed)
    first = bisect_right(ids, after)
    number, end = last_number - count + first, sum(sizes[:first])
    for message_id, size in zip(ids[first:], sizes[first:], strict=True):
        number += 1
        start, end = end, end + size
        yield message_id, number, put_at, bodies[start:end]
