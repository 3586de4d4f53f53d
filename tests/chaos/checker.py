"""Checks dsmq's promises against a history of what clients saw. Does no input or output."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest

from chaos.history import Broken, Died, Empty, Event, Got, Held, History, Put, Reader, Server

# After a snapshot that is not from a clean shutdown, ids continue this far beyond it.
RESTORE_GAP = 2**32
# How much too early a wait may end, because times are rounded to milliseconds.
WAIT_SLACK_SECONDS = 0.05
AGE_SLACK_SECONDS = 0.1


@dataclass(frozen=True)
class Violation:
    """A broken promise and the events that prove it."""

    kind: str
    what: str
    evidence: tuple[Event, ...] = ()

    def __str__(self) -> str:
        return "\n    ".join((f"{self.kind}: {self.what}", *map(str, self.evidence)))


@dataclass(frozen=True)
class Loss:
    """Ids lost with a server: all of its epoch or those after the restored snapshot."""

    server: Server
    first_id: int
    last_id: float

    def takes(self, message_id: int) -> bool:
        return self.first_id <= message_id <= self.last_id


def check(history: History) -> list[Violation]:
    """Return the violations in a history of writers and readers."""
    return list(Check(history).run())


class Check:
    def __init__(self, history: History) -> None:
        self.history = history
        self.servers = sorted(history.of(Server), key=lambda server: server.began)
        self.epochs = list(dict.fromkeys(server.epoch for server in self.servers))
        self.puts = {put.body: put for put in history.of(Put)}
        self.readers = {reader.name: reader for reader in history.of(Reader)}
        self.gots: dict[tuple[str, str], list[Got]] = defaultdict(list)
        for got in history.of(Got):
            self.gots[got.reader, got.topic].append(got)
        self.empties: dict[tuple[str, str], list[Empty]] = defaultdict(list)
        for empty in history.of(Empty):
            self.empties[empty.reader, empty.topic].append(empty)
        self.broken = list(history.of(Broken))
        self.ids = {got.body: got.id for got in history.of(Got) if got.id is not None}
        self.ids |= {put.body: put.id for put in self.puts.values() if put.id is not None}
        self.losses = [loss for pair in pairwise(self.servers) for loss in _loss(*pair)]
        self._found_epochs: dict[str, list[str]] = {}

    def run(self) -> Iterator[Violation]:
        for died in self.history.of(Died):
            yield Violation("died", "a client failed", (died,))
        yield from self._strange_reads()
        yield from self._stored_twice()
        yield from self._ids_reused()
        yield from self._order_of_puts()
        yield from self._losses()
        yield from self._held()
        for (name, _), gots in self.gots.items():
            yield from self._read_twice(gots)
            yield from self._order_of_reads(gots)
            if name in self.readers:
                yield from self._eligible(self.readers[name], gots)
        for reader in self.readers.values():
            for topic in reader.topics:
                yield from self._unread(reader, topic)
                yield from self._empty(reader, topic)

    # Contents of the store

    def _strange_reads(self) -> Iterator[Violation]:
        """Every message read was put into that topic, and its put did not report that it was not stored."""
        for got in self.history.of(Got):
            put = self.puts.get(got.body)
            if put is None or put.topic != got.topic or got.ended < put.began:
                yield Violation("strange", "a message that nobody put into this topic", _events(got, put))
            elif put.error and not put.may_be_stored:
                yield Violation("not stored", "a message is read although its put was not stored", (put, got))
            elif got.began - put.ended > self.history.max_age + AGE_SLACK_SECONDS:
                yield Violation("expired", "a message is read after it expired", (put, got))

    def _told_ids(self) -> Iterator[tuple[str, int, Event]]:
        """Yield bodies and their ids, as reported to any client."""
        for put in self.puts.values():
            if put.id is not None:
                yield put.body, put.id, put
        for got in self.history.of(Got):
            if got.id is not None:
                yield got.body, got.id, got

    def _stored_twice(self) -> Iterator[Violation]:
        first: dict[str, tuple[int, Event]] = {}
        for body, message_id, event in self._told_ids():
            known_id, known = first.setdefault(body, (message_id, event))
            if known_id != message_id:
                yield Violation("stored twice", f"one put has the ids {known_id} and {message_id}", (known, event))
                # Report each only once.
                first[body] = message_id, event

    def _ids_reused(self) -> Iterator[Violation]:
        first: dict[tuple[str, int], tuple[str, Event]] = {}
        for body, message_id, event in self._told_ids():
            epochs = self._epochs_of(body)
            if len(epochs) == 1:
                known_body, known = first.setdefault((epochs[0], message_id), (body, event))
                if known_body != body:
                    yield Violation("id reused", f"the id {message_id} belongs to two messages", (known, event))

    def _order_of_puts(self) -> Iterator[Violation]:
        """A put made after another has returned gets a higher id, so each writer's puts keep their order."""
        for epoch in self.epochs:
            puts = [put for put in self.puts.values() if put.id is not None and self._epochs_of(put.body) == [epoch]]
            returned: list[tuple[float, int, str]] = []
            last: Put | None = None
            for put in sorted(puts, key=lambda put: put.began):
                while returned and returned[0][0] < put.began:
                    earlier = self.puts[heapq.heappop(returned)[2]]
                    if last is None or _id(earlier) > _id(last):
                        last = earlier
                if last is not None and _id(put) < _id(last):
                    yield Violation("order of puts", "a later put has a lower id", (last, put))
                heapq.heappush(returned, (put.ended, _id(put), put.body))

    # Losses with a server

    def _epochs_of(self, body: str) -> list[str]:
        """Return the epochs in which a put may have been stored: two, if it was in flight between them."""
        if body not in self._found_epochs:
            self._found_epochs[body] = self._find_epochs(self.puts.get(body))
        return self._found_epochs[body]

    def _find_epochs(self, put: Put | None) -> list[str]:
        if put is None:
            return []
        # A put that raised may still have been in flight.
        ended = put.ended if put.id is not None else math.inf
        found = (one.epoch for one in self.servers if put.began < one.ended and ended > one.began)
        return list(dict.fromkeys(found))

    def loss_of(self, put: Put) -> Loss | None:
        """Return the losses that may include a put that has returned."""
        epochs = self._epochs_of(put.body)
        for loss in self.losses:
            # The client may have read the reply only after the server was killed.
            if put.began < loss.server.ended and loss.server.epoch in epochs and loss.takes(_id(put)):
                return loss
        return None

    def _losses(self) -> Iterator[Violation]:
        for put in self.puts.values():
            if put.id is not None and (loss := self.loss_of(put)) and put.ended < loss.server.kept_until:
                yield Violation("lost", "a put that the next life must keep is lost", (put, loss.server))
        for one, following in pairwise(self.servers):
            if one.kept_until == math.inf and (one.epoch, one.run) != (following.epoch, following.run):
                yield Violation("identity", "epoch or run changed across a graceful stop", (one, following))

    # Servers that share a store

    def _held(self) -> Iterator[Violation]:
        """All servers have the same messages: each put that returned, once, numbered without gaps."""
        views: dict[str, Held] = {}
        for held in self.history.of(Held):
            first = views.setdefault(held.topic, held)
            if first.server == held.server:
                # The same server again, so a new audit begins.
                views[held.topic] = held
                yield from _holes(held)
                yield from self._contents(held)
            elif difference := self._difference(first, held):
                yield Violation("servers differ", f"{first.server} and {held.server}, {held.topic}: {difference}")
        if views:
            yield from self._numbers()

    def _numbers(self) -> Iterator[Violation]:
        """All readers get the same numbers, which increase with the ids."""
        known: dict[tuple[str, str], dict[int, Got]] = defaultdict(dict)
        for got in self.history.of(Got):
            epochs = self._epochs_of(got.body)
            if got.id is not None and got.number is not None and len(epochs) == 1:
                first = known[got.topic, epochs[0]].setdefault(got.id, got)
                if first.number != got.number:
                    yield Violation(
                        "numbers", f"a message has the numbers {first.number} and {got.number}", (first, got)
                    )
        for by_id in known.values():
            for one, following in pairwise([by_id[message_id] for message_id in sorted(by_id)]):
                if (one.number or 0) >= (following.number or 0):
                    yield Violation("numbers", "a later message has no higher number", (one, following))

    def _contents(self, held: Held) -> Iterator[Violation]:
        about = replace(held, messages=())
        ids: dict[str, int] = {}
        for message_id, _, body in held.messages:
            put = self.puts.get(body)
            if ids.setdefault(body, message_id) != message_id:
                yield Violation("stored twice", f"a message has the ids {ids[body]} and {message_id}", _events(put))
            elif put is None or put.topic != held.topic:
                yield Violation("strange", f"{body!r} is held, but nobody put it into this topic", (about,))
            elif put.error and not put.may_be_stored:
                yield Violation("not stored", "a message is held although its put was not stored", (put, about))
            elif put.id not in (None, message_id):
                yield Violation("stored twice", f"a put has the ids {put.id} and {message_id}", (put, about))
        for put in self.puts.values():
            if put.topic == held.topic and put.body not in ids and self._must_be_held(put, held):
                yield Violation("lost", "a put that returned is not held", (put, about))

    def _must_be_held(self, put: Put, held: Held) -> bool:
        is_here = put.id is not None and put.ended < held.began and held.ended - put.began < self.history.max_age
        return is_here and self._epochs_of(put.body) == self.epochs[-1:]

    def _difference(self, one: Held, other: Held) -> str:
        views = [one.messages, other.messages]
        if all(views) and other.ended - min(put.began for put in self.puts.values()) > self.history.max_age:
            # The first ones may have expired in between.
            since = max(view[0][0] for view in views)
            views = [tuple(message for message in view if message[0] >= since) for view in views]
        pairs = enumerate(zip_longest(*views))
        at = next((at for at, (mine, theirs) in pairs if mine != theirs), None)
        return "" if at is None else f"from place {at}: {[view[at : at + 1] for view in views]}"

    # Reads

    def _read_twice(self, gots: list[Got]) -> Iterator[Violation]:
        first: dict[str, Got] = {}
        for got in gots:
            if first.setdefault(got.body, got) is not got:
                yield Violation("read twice", "a reader got a message twice", (first[got.body], got))

    def _order_of_reads(self, gots: list[Got]) -> Iterator[Violation]:
        """Ids increase within an epoch. Each id belongs to one message, so all readers see the same order."""
        last: dict[str, tuple[int, int, Got]] = {}
        for got in gots:
            message_id = self.ids.get(got.body)
            if message_id is None:
                continue
            epochs = [self.epochs.index(epoch) for epoch in self._epochs_of(got.body)] or [0]
            known = last.get(got.thread)
            at = next((at for at in epochs if known is None or (at, message_id) > known[:2]), None)
            if known is not None and at is None:
                yield Violation("order of reads", "a message follows a later one", (known[2], got))
                continue
            last[got.thread] = (at or 0, message_id, got)

    def _eligible(self, reader: Reader, gots: list[Got]) -> Iterator[Violation]:
        for got in gots:
            put, message_id = self.puts.get(got.body), self.ids.get(got.body)
            if put and message_id is not None and self._is_eligible(reader, put, message_id) is False:
                yield Violation("not eligible", "a reader got a message put before it connected", (reader, put, got))

    def _is_eligible(self, reader: Reader, put: Put, message_id: int) -> bool | None:
        """Return whether a reader must read a message; None if it is uncertain."""
        answers = {
            message_id > reader.start_id if epoch == reader.epoch else self._is_later(epoch, reader.epoch)
            for epoch in self._epochs_of(put.body)
        }
        return answers.pop() if len(answers) == 1 else None

    def _is_later(self, epoch: str, than: str) -> bool:
        return self.epochs.index(epoch) > self.epochs.index(than)

    def _due(self, reader: Reader, topic: str) -> list[tuple[Put, float]]:
        """Return the puts that a reader must see, each with the start of the call that returned it, or infinity."""
        gots = self.gots[reader.name, topic]
        taken = {got.body: got.began for got in gots}
        latest = [(got.began, self.ids.get(got.body, 0)) for got in gots if got.latest]
        due = []
        for put in self.puts.values():
            if put.topic == topic and put.id is not None and self._is_eligible(reader, put, put.id):
                passed_over = [began for began, message_id in latest if message_id > put.id]
                due.append((put, min([taken.get(put.body, math.inf), *passed_over])))
        return due

    def _unread(self, reader: Reader, topic: str) -> Iterator[Violation]:
        finished = reader.finished
        if finished is None:
            return
        missing = [
            put
            for put, taken in self._due(reader, topic)
            if taken == math.inf and put.ended < finished < put.began + self.history.max_age
            if self.loss_of(put) is None
        ]
        excused = self._excused(reader, topic, missing) if missing else set()
        for put in missing:
            if put.body not in excused:
                yield Violation("unread", "a reader never got a message", (reader, put))

    def _excused(self, reader: Reader, topic: str, missing: list[Put]) -> set[str]:
        """Return the messages that interrupted reads may have consumed: at their position, up to their count."""
        excused: set[str] = set()
        gots = [(got.began, self.ids[got.body]) for got in self.gots[reader.name, topic] if got.body in self.ids]
        for call in self.broken:
            if (call.reader, call.topic) == (reader.name, topic) and call.may_take:
                before = max((message_id for began, message_id in gots if began <= call.began), default=0)
                behind = min((message_id for began, message_id in gots if began >= call.ended), default=RESTORE_GAP**2)
                taken = [put.body for put in missing if before < _id(put) < behind and put.body not in excused]
                excused.update(taken[: call.may_take])
        return excused

    def _empty(self, reader: Reader, topic: str) -> Iterator[Violation]:
        """A read returned no message, although one had been put before its wait ended."""
        empties = self.empties[reader.name, topic]
        due = sorted(self._due(reader, topic), key=lambda one: one[0].ended) if empties else []
        ended = [put.ended for put, _ in due]
        latest_taken = list(_running_maximum(taken for _, taken in due))
        excused: set[str] | None = None
        for empty in empties:
            until = empty.began + max(0.0, empty.timeout - WAIT_SLACK_SECONDS)
            count = bisect_left(ended, until)
            if not count or latest_taken[count - 1] <= empty.ended:
                continue
            untaken = [put for put, taken in due[:count] if taken > empty.ended and self._is_there(put, empty)]
            if untaken and excused is None:
                got = {one.body for one in self.gots[reader.name, topic]}
                never = [put for put, _ in due if put.body not in got]
                excused = self._excused(reader, topic, never)
            if wrong := [put for put in untaken if put.body not in (excused or ())]:
                yield Violation("wrong empty", f"{len(wrong)} messages were there", (empty, wrong[0]))

    def _is_there(self, put: Put, empty: Empty) -> bool:
        """Return whether a completed put was stored throughout the call."""
        if empty.ended - put.began >= self.history.max_age:
            return False
        loss = self.loss_of(put)
        # A killed server died some time before its end was noticed.
        return loss is None or empty.ended < loss.server.ended - AGE_SLACK_SECONDS


def _holes(held: Held) -> Iterator[Violation]:
    for (earlier_id, earlier, _), (message_id, number, body) in pairwise(held.messages):
        if number != earlier + 1 or message_id <= earlier_id:
            about = f"{held.server}, {held.topic}: after {earlier} (id {earlier_id}) comes {number} (id {message_id})"
            yield Violation("hole", f"{about}: {body!r}")


def _loss(one: Server, following: Server) -> Iterator[Loss]:
    if one.epoch != following.epoch:
        yield Loss(one, 0, math.inf)
    elif one.run != following.run:
        yield Loss(one, following.last_id - RESTORE_GAP + 1, following.last_id)


def _running_maximum(values: Iterable[float]) -> Iterator[float]:
    highest = -math.inf
    for value in values:
        highest = max(highest, value)
        yield highest


def _id(put: Put) -> int:
    assert put.id is not None
    return put.id


def _events(*events: Event | None) -> tuple[Event, ...]:
    return tuple(event for event in events if event is not None)


def summary(violations: Iterable[Violation]) -> str:
    """Return the number of violations of each kind."""
    counts = Counter(violation.kind for violation in violations)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "none"
