"""Keeps the state of all groups of workers in the stream, for servers that start after facts have expired.

One of the servers writes it several times per max_age, in parts: messages that never expire. A last message with the
parts' ids makes them valid. If two servers write at the same time, the second one's last message is refused, so no
server deletes parts that are valid.

Groups are copied one by one, and facts may be applied in between. So the state has the id as of which copying began,
and each group has the id of its last fact.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from dsmq.store.group import GroupCounts, HeldJob
from dsmq.store.nats_api import EXPECTED_LAST_ID, NEVER_EXPIRES, WRONG_SEQUENCE, EngineError
from dsmq.store.nats_group_plan import SharedGroup, as_bytes, as_text
from dsmq.store.selection import JobSelection

if TYPE_CHECKING:
    from dsmq.store.nats_groups import NATSGroups
    from dsmq.store.nats_stream import Stream

# Max bytes of a part, unless the engine accepts less.
_PART_BYTES = 262_144
# Max finished jobs per row, and max attempts to read the parts, which may just have been replaced.
_ROW_JOBS, _READS = 200, 3

_logger = logging.getLogger(__name__)


async def write_state(stream: Stream, groups: NATSGroups, at: int) -> None:
    """Write the state as of this id, which is that of the last message applied, or later. Raises EngineError."""
    rows = copy_state(groups.copy_groups(), groups.now)
    before = await stream.find(last_by_subj=f"{stream.name}.facts.groups")
    if not (groups.count or before):
        return
    ids = [await stream.publish(f"{stream.name}.facts.state", part, NEVER_EXPIRES) for part in _parts(rows, stream)]
    expected = {EXPECTED_LAST_ID: str(before.id if before else 0)}
    body = json.dumps({"at": at, "parts": ids}).encode()
    try:
        valid = await stream.publish(
            f"{stream.name}.facts.groups", body, {"Nats-Rollup": "sub", **expected, **NEVER_EXPIRES}
        )
    except EngineError as error:
        if error.code != WRONG_SEQUENCE:
            raise
        # Another server was first. The next server that writes deletes these parts.
        return
    await stream.purge(f"{stream.name}.facts.state", min(ids, default=valid))


async def read_state(stream: Stream, groups: NATSGroups, now_ms: int, kept_ms: float) -> None:
    """Load the state, unless it is older than all messages. `now_ms`: by the engine's clock. Raises EngineError."""
    for _ in range(_READS):
        found = await stream.find(last_by_subj=f"{stream.name}.facts.groups")
        if found is None or now_ms - found.put_ms > kept_ms:
            return
        facts = json.loads(found.body)
        parts = [await stream.find(seq=part) for part in facts["parts"]]
        if None not in parts:
            age_ms = max(0, now_ms - found.put_ms)
            groups.load_groups(load_state([part.body for part in parts if part], groups.now(), age_ms), facts["at"])
            return
    _logger.error("the state of groups of workers in stream %s is incomplete, so jobs are given again", stream.name)


def _parts(rows: Iterable[bytes], stream: Stream) -> Iterator[bytes]:
    limit = min(_PART_BYTES, stream.max_body_bytes // 2)
    part: list[bytes] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row) + 1
        if size >= limit:
            yield b"\n".join(part)
            part, size = [], 0
    if part:
        yield b"\n".join(part)


def copy_state(groups: Iterable[SharedGroup], clock: Callable[[], int]) -> Iterator[bytes]:
    """Iterate over rows with the state of each group, copied when it is reached: together, they may be long."""
    for group in groups:
        now, names = clock(), (as_text(group.key), as_text(group.name))
        head = (*names, now - group.used_at, group.position, group.changed_by, astuple(group.counts))
        jobs = [(*_values(job, now), job.token, job.worker) for job in group.jobs.values()]
        numbers = [(topic, number) for topic, (number, _) in group.numbers.items()]
        yield from _encode(head, numbers, list(group.done.items()), jobs)


def _values(job: HeldJob, now: int) -> tuple[int, bytes, int, int, bool, int, int]:
    return job.id, job.topic, job.attempt, job.version, job.is_held, max(0, job.until - now), now - job.since


def _encode(
    head: tuple[Any, ...], numbers: list[tuple[bytes, int]], done: list[tuple[int, int]], jobs: list[tuple[Any, ...]]
) -> Iterator[bytes]:
    yield json.dumps(["group", head]).encode()
    for topic, number in numbers:
        yield json.dumps(["number", as_text(topic), number]).encode()
    for at in range(0, len(done), _ROW_JOBS):
        yield json.dumps(["done", done[at : at + _ROW_JOBS]]).encode()
    for message_id, topic, *values, token, worker in jobs:
        yield json.dumps(["job", message_id, as_text(topic), *values, as_text(token), worker]).encode()


def load_state(parts: Iterable[bytes], now: int, age_ms: int) -> Iterator[SharedGroup]:
    """Iterate over the groups in parts of a state that is this old."""
    group: SharedGroup | None = None
    for row in (json.loads(line) for part in parts for line in part.split(b"\n")):
        match row:
            case ["group", [key, name, unused_ms, position, changed_by, counts]]:
                if group is not None:
                    yield group
                names = as_bytes(key), as_bytes(name)
                selection = JobSelection(names[0])
                group = SharedGroup(*names, selection, now - age_ms - unused_ms, position, counts=GroupCounts(*counts))
                group.changed_by = changed_by
            case ["number", topic, number] if group:
                group.count_until(as_bytes(topic), number, 0)
            case ["done", done] if group:
                group.done.update(done)
            case ["job", message_id, topic, attempt, version, is_held, left_ms, held_ms, token, worker] if group:
                until, since = now + max(0, left_ms - age_ms), max(0, now - age_ms - held_ms)
                about = attempt, until, is_held, since, as_bytes(token), worker, version
                group.restore(HeldJob(message_id, as_bytes(topic), *about))
    if group is not None:
        yield group
