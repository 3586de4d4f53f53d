"""The immutable states of a reader: ranges of ids to read, and the messages read ahead in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias


class Entry(NamedTuple):
    """A message read ahead; times are on the clock `boot_time`."""

    id: int
    number: int
    expires: float
    body: bytes
    put_at: float = 0.0


class Era:
    """One run of the server in one epoch, as far as the client knows. `next` holds the one that followed."""

    __slots__ = ("_lost", "epoch", "next", "number", "run", "start")

    def __init__(
        self, epoch: str, run: bytes, start: int, number: int | None, lost: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.epoch, self.run, self._lost = epoch, run, lost
        self.start, self.number = start, number
        """The id after which a topic is read, and the number of its message with that id, if known."""
        self.next: dict[int, Era] = {}

    def lost(self, message_id: int) -> tuple[int, int] | None:
        """Return the range of lost ids that contains an id: the id before the first, and the last."""
        return next((lost for lost in self._lost if lost[0] < message_id <= lost[1]), None)


class Stretch:
    """A range of ids to read, and the messages in it that were read ahead."""

    __slots__ = (
        *("id", "end", "number", "known", "missed", "ahead", "fresh_until", "is_lost"),
        *("era", "generation", "ask", "sought", "rest", "next"),
    )

    def __init__(  # noqa: PLR0913, PLR0917 - they make up the state
        self,
        era: Era,
        last_id: int,
        number: int | None,
        end: float = math.inf,
        known: tuple[int, int] = (0, 0),
        ahead: Sequence[Entry] = (),
        fresh_until: float = 0.0,
        missed: int = 0,
        generation: tuple[int, int] = (0, 0),
        *,
        ask: bool = False,
        sought: tuple[str, int] | None = None,
        rest: Stretch | None = None,
    ) -> None:
        self.era = era
        # The range: ids above `id`, up to and including `end`. The number of the message with that `id`, if known.
        self.id, self.number, self.end = last_id, number, end
        # Id and number of the newest message known to exist in the range. If it expires unread, its number shows how
        # many were missed.
        self.known = known
        # The messages read ahead. Until `fresh_until`, they may be returned without being read again; if the server has
        # lost them, at any time.
        self.ahead, self.fresh_until = ahead, fresh_until
        self.is_lost = fresh_until == math.inf
        # The number of messages that expired unread before this range.
        self.missed = missed
        # The number of seeks, and since the last one, of times that messages were found to have expired. A reply to a
        # request of an earlier generation is outdated.
        self.generation = generation
        # Whether the server may have lost the message with `number`. If so, ask it where its numbering continues.
        self.ask = ask
        # Epoch and id passed to `seek`, if the server is not known to have had that epoch. Dropped at the next read.
        self.sought = sought
        # The stretch after `end`, if `end` is finite.
        self.rest = rest
        # The step to the next state, by the number of messages that had been taken from the read-ahead.
        self.next: dict[int, Step] = {}

    def last_taken(self, at: int) -> tuple[int, int | None]:
        """Return id and number of the last message returned, after `at` of the read-ahead have been taken."""
        return self.ahead[at - 1][:2] if at else (self.id, self.number)

    def missed_at(self, at: int) -> int:
        """Return how many messages had expired unread before the last one returned."""
        return self.missed + missing_numbers(self.number, self.ahead[:at]) if at else self.missed

    def rest_from(self, at: int, ahead: Sequence[Entry] = (), fresh_until: float = 0.0) -> Stretch:
        """Return the rest of this stretch, with another read-ahead."""
        known, ask, missed = self.known, self.ask and not at, self.missed_at(at)
        if len(self.ahead) > at:
            known = max(known, self.ahead[-1][:2])
        last_id, number = self.last_taken(at)
        # Positional arguments are faster, and each reply makes a stretch.
        era, end, generation, rest = self.era, self.end, self.generation, self.rest
        return Stretch(era, last_id, number, end, known, ahead, fresh_until, missed, generation, ask=ask, rest=rest)

    def remaining(self, at: int) -> Stretch:
        """Return the rest of this stretch, with the rest of its read-ahead."""
        return self.rest_from(at, self.ahead[at:], self.fresh_until)

    def next_stretch(self, at: int) -> Stretch:
        """Return the next stretch, after this one has been read. There must be one."""
        assert self.rest is not None  # noqa: S101 - for type checkers
        after = self.rest.remaining(0)
        after.missed = self.missed_at(at)
        return after

    def continues(self, before: Stretch, behind: int) -> bool:
        """Return whether the reply to a request from an earlier state, for messages after an id, is still useful."""
        if self.era is not before.era or self.generation != before.generation or self.is_lost:
            return False
        return behind <= (self.ahead[-1].id if self.ahead else self.id)

    def lost(self, at: int) -> int:
        """Return how many messages have expired unread if the server has none left in this stretch."""
        last_id, number = self.last_taken(at)
        if number is None or self.known[0] <= last_id:
            return 0
        return max(0, self.known[1] - number)

    def exhausted(self, at: int) -> Stretch | None:
        """Return the next state if the server has no messages left in this stretch; None if that changes nothing."""
        if self.rest is None and self.known[0] <= (self.ahead[-1].id if self.ahead else self.id):
            return None
        if self.rest:
            after = self.next_stretch(at)
        else:
            after = self.rest_from(at)
            after.number = self.known[1]
            after.generation = self.generation[0], self.generation[1] + 1
        after.missed = self.missed_at(at) + self.lost(at)
        return after


Step: TypeAlias = "tuple[int] | Stretch"
"""The step from a state to the next: the number of messages taken from its read-ahead, or another state."""


def insert(stretch: Stretch, other: Stretch) -> Stretch:
    """Insert a stretch in a chain that is not in use yet, in the order of ids; return the chain."""
    if other.id < stretch.id or stretch.rest is None:
        other.rest = stretch
        return other
    stretch.rest = insert(stretch.rest.remaining(0), other)
    return stretch


def missing_numbers(last: int | None, entries: Sequence[Entry]) -> int:
    """Return how many numbers are missing among successive messages, and before them if the last number is known.

    If the server has forgotten a topic's numbering, it starts again with 1, but not among these messages: the topic was
    empty then.
    """
    first = entries[0].number
    before = first - 1 if last is None else last if last < first else 0
    return entries[-1].number - before - len(entries)


def in_next_era(stretch: Stretch, at: int) -> Stretch:
    """Return the state in the era that followed.

    Messages that were read ahead, and that the server has lost, are still returned until they expire.
    """
    era = stretch.era.next[0]
    missed = stretch.missed_at(at)
    if stretch.sought and stretch.sought[0] == era.epoch:
        return Stretch(era, stretch.sought[1], None, missed=missed, generation=stretch.generation)
    parts: list[Stretch] = []
    part: Stretch | None = stretch.remaining(at)
    while part:
        if era.epoch == stretch.era.epoch:
            parts += _restarted(part, era)
        elif part.ahead:
            parts.append(_lost_by_server(part.ahead, part.number, era))
        part = part.rest
    if era.epoch != stretch.era.epoch:
        parts.append(Stretch(era, 0, 0))
    for one, rest in zip(parts, [*parts[1:], None], strict=True):
        one.rest, one.generation = rest, stretch.generation
    parts[0].missed = missed
    return parts[0]


def _restarted(part: Stretch, era: Era) -> list[Stretch]:
    """Split a stretch into messages that the server may still have, those it has lost, and those not put yet."""
    ahead = [entry for entry in part.ahead if part.is_lost or era.lost(entry.id)]
    kept = [entry[:2] for entry in part.ahead[: len(part.ahead) - len(ahead)]]
    ask = part.number is not None or bool(part.ahead)
    known = (kept[-1] if kept else (0, 0)) if era.lost(part.known[0]) else part.known
    if not ahead:
        return [Stretch(era, part.id, part.number, end=part.end, known=known, ask=ask)]
    found = [_lost_by_server(ahead, known[1] or part.number, era)]
    if kept:
        found.insert(0, Stretch(era, part.id, part.number, end=ahead[0].id - 1, known=known, ask=ask))
    if part.end == math.inf:
        found.append(Stretch(era, ahead[-1].id, ahead[-1].number, ask=True))
    return found


def _lost_by_server(ahead: Sequence[Entry], number: int | None, era: Era) -> Stretch:
    """Return a stretch of messages that the server has lost."""
    if number is None or number >= ahead[0].number:
        number = ahead[0].number - 1
    last = ahead[-1]
    return Stretch(era, ahead[0].id - 1, number, end=last.id, known=last[:2], ahead=ahead, fresh_until=math.inf)
