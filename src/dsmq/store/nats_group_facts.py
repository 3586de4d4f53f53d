"""Publishes facts about groups of workers and applies the facts of all servers in the order of the stream."""

from __future__ import annotations

import itertools
import json
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dsmq.errors import JobLost, StoreFailed, TooBig, Unsure
from dsmq.store.group import GroupCounts, Receipt
from dsmq.store.nats_group_plan import Refused, SharedGroup, apply_plan, as_bytes, as_text, encode_fact
from dsmq.store.nats_room import FACTS_LEAVE, JOBS_LEAVE
from dsmq.store.selection import JobSelection

if TYPE_CHECKING:
    from dsmq.store.api import Outcome
    from dsmq.store.nats import NATSStore
    from dsmq.store.sqlite import MirrorStore

Key = tuple[bytes, bytes]
"""A topic or pattern, and a group."""
Call = Callable[[Exception | None], None]


class GroupFacts:
    """Applies facts to the state of all groups; part of `NATSGroups`.

    Nothing else changes the state, but each server itself counts the jobs that expire.
    """

    lock: threading.Lock
    on_available: Callable[[Key], None]
    _source: MirrorStore
    _groups: dict[Key, SharedGroup]
    _memory: int
    _base: GroupCounts
    counts: Callable[[], GroupCounts]
    _forget: Callable[..., None]
    _count_memory: Callable[..., None]
    # The methods that change groups directly, without an engine.
    _done: Callable[..., object]
    _give_back: Callable[..., object]
    _extend: Callable[..., object]

    def __init__(self, engine: NATSStore) -> None:
        self._engine = engine
        # The function to call with the outcome of each pending fact.
        self._pending: dict[str, Call] = {}
        self._own, self._numbers = secrets.token_hex(6), itertools.count(1)
        self.as_of = 0
        """Facts up to this id about groups that the loaded state does not contain had been applied to it."""

    def begin(self, source: MirrorStore) -> None:
        """Forget all groups, because the stream is mirrored from its start."""
        with self.lock:
            self._base = self.counts()
            self._counted = replace(self._base)
            self._source, self._groups, self._memory, self.as_of = source, {}, 0, 0
        for name in list(self._pending):
            self._finish(name, _unsure())

    def now(self) -> int:
        return self._source.now()

    def copy_groups(self) -> Iterator[SharedGroup]:
        """Iterate over the groups that exist now, except those that are forgotten before they are reached."""
        return filter(None, map(self._groups.get, list(self._groups)))

    def load_groups(self, groups: Iterable[SharedGroup], as_of: int) -> None:
        """Begin with the state as of an id or later, instead of the state before the stream's first message."""
        with self.lock:
            self._groups = {(group.key, group.name): group for group in groups}
            self.as_of = as_of
            for group in self._groups.values():
                self._count_memory(group)

    def begin_counts(self) -> None:
        """Count jobs from here on, because the mirror is complete."""
        dropped = self._source.dropped
        with self.lock:
            # What groups forgotten since `begin` had counted is not new either.
            self._base = self._counted
            for group in self._groups.values():
                self._base.add(group.counts, -1)
                # Each server counts dropped messages from its start.
                group.numbers = {topic: (last, dropped(topic)) for topic, (last, _) in group.numbers.items()}

    def _publish(self, call: Call, what: str, key: Key, *values: object) -> None:
        """Publish a fact; `call` gets None once it is applied, or the reason why it is not."""
        name = f"{self._own}.{next(self._numbers)}"
        fact = encode_fact(name, what, *map(as_text, key), *values)
        self._pending[name] = call
        if len(fact) > self._engine.max_message_bytes:
            self._finish(name, TooBig("too many jobs at once"))
            return
        stored: Future[list[Outcome]] = Future()
        stored.add_done_callback(partial(self._on_stored, name))
        try:
            self._engine.publish_job_fact(fact, stored, JOBS_LEAVE if what == "take" else FACTS_LEAVE)
        except StoreFailed as error:
            self._finish(name, error)

    def _on_stored(self, name: str, stored: Future[list[Outcome]]) -> None:
        outcome = stored.exception() or stored.result()[0]
        if isinstance(outcome, Exception):
            self._finish(name, outcome)

    def _finish(self, name: str, error: Exception | None) -> None:
        if call := self._pending.pop(name, None):
            call(error)

    def apply(self, body: bytes, message_id: int, age_ms: int) -> None:
        """Apply a fact. Raises ValueError and others if it can't be read."""
        name, what, *names = json.loads(body)
        key, values = (as_bytes(names[0]), as_bytes(names[1])), names[2:]
        group = self._groups.get(key)
        if message_id <= (group.changed_by if group else self.as_of):
            # The fact is part of the loaded state, which does not contain its outcome.
            self._finish(name, _unsure())
            return
        error: Exception | None = None
        try:
            self._apply(what, key, values, message_id, age_ms)
        except (Refused, JobLost) as refused:
            error = refused
        except Exception:
            error = StoreFailed("a bug in the server; see its log")
            raise
        finally:
            self._finish(name, error)

    def _apply(self, what: str, key: Key, values: list[Any], message_id: int, age_ms: int) -> None:
        match what:
            case "take":
                self._apply_take(key, values, message_id, age_ms)
            case "done":
                self._done(*key, [Receipt(*one) for one in values[0]])
            case "return":
                self._give_back(*key, Receipt(*values[:2]), max(0, values[2] - age_ms))
            case "extend":
                self._extend(*key, Receipt(*values[:2]), max(0, values[2] - age_ms))
            case "end" | "remove" | "forget":
                self._apply_end(what, key, values)
        with self.lock:
            if group := self._groups.get(key):
                group.changed_by, group.used_at = message_id, self._source.now() - age_ms
                if what in ("return", "extend", "end") and (job := group.jobs.get(values[0])):
                    job.version = message_id
                self._count_memory(group)

    def _apply_take(self, key: Key, values: list[Any], message_id: int, age_ms: int) -> None:
        with self.lock:
            group = self._groups.get(key) or SharedGroup(*key, JobSelection(key[0]), self._source.now())
            due = group.next_due
            apply_plan(group, values, message_id, age_ms, self._source)
            self._groups[key] = group
        if due is None or (group.next_due or due) < due:
            # Other waiting workers have to try again when these leases end.
            self.on_available(key)

    def _apply_end(self, what: str, key: Key, values: list[Any]) -> None:
        with self.lock:
            group = self._groups.get(key)
            if group is None or (what == "forget" and group.changed_by != values[0]):
                raise Refused
            if what == "forget":
                self._forget(key, group)
                return
            if group.unfit([(values[0], values[1])]):
                raise Refused
            job = group.jobs[values[0]]
            if what == "end":
                group.put_back(job, self._source.now())
            else:
                group.remove(job)
                setattr(group.counts, values[2], getattr(group.counts, values[2]) + 1)
        if what == "remove":
            self.on_available(key)


def _unsure() -> Unsure:
    return Unsure("the mirror is being rebuilt; the change may or may not have been made")
