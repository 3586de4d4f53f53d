"""The immutable states of a reader: ranges of ids to read, and the messages in them that were read ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

# Max earlier epochs whose positions a reader remembers.
_MAX_POSITIONS = 4


class Entry(NamedTuple):
    """A message read ahead; times are on the clock `boot_time`."""

    id: int
    number: int
    expires: float
    body: bytes
    put_at: float = 0.0
    topic: str = ""
    """The topic, if several are read together; then `number` counts the messages of all of them, even expired ones."""
    topic_number: int = 0
    """The number in the topic, if several are read together."""


class Count(NamedTuple):
    """If several topics are read: one topic's last number, if known, and the number that expired unread."""

    number: int
    missed: int
    expires: float
    id: int
    """The id of the message with that number, or a later one of the same run."""


Counts: TypeAlias = dict[str, Count]
# In place of a count's number: it is unknown, or the server has lost its message and must be asked where they continue.
_UNKNOWN, _LOST = -1, -2
# If there are more topics than this, those without readable messages are dropped.
_MAX_COUNTS = 1000


class Era:
    """One run of the server in one epoch, as far as the client knows. `next` is the era that followed."""

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
        *("era", "id", "number", "missed", "ahead", "gaps", "last_read", "fresh_until", "is_lost"),
        *("end", "known", "generation", "ask", "sought", "rest", "next", "positions"),
        *("back", "scanned", "counts", "known_counts"),
    )

    def __init__(  # noqa: PLR0913, PLR0917 - they make up the state
        self,
        era: Era,
        last_id: int,
        number: int | None,
        missed: int = 0,
        ahead: Sequence[Entry] = (),
        fresh_until: float = 0.0,
    ) -> None:
        # The range: ids above `id`, up to and including `end`. The number of the message with that `id`, if known.
        self.era, self.id, self.number = era, last_id, number
        self.end = math.inf
        # The number of messages that expired unread before this range.
        self.missed = missed
        # The messages read ahead, the number that expired unread before and between them, and the last id. Until
        # `fresh_until`, they may be returned without being read again; if the server has lost them, at any time.
        self.ahead, self.fresh_until = ahead, fresh_until
        self.gaps, self.last_read = (missing_numbers(number, ahead), ahead[-1].id) if ahead else (0, last_id)
        self.is_lost = fresh_until == math.inf
        # Id and number of the newest message known to exist in the range. If it expires unread, its number shows how
        # many were missed.
        self.known = 0, 0
        # The number of seeks, and how many times since the last seek messages were found to have expired. A reply to a
        # request of an earlier generation is outdated.
        self.generation = 0, 0
        # Whether the server may have lost a message whose number is known: it must be asked where numbers continue.
        self.ask = False
        # Epoch and id passed to `seek`, if the server is not known to have had that epoch. Discarded at the next read.
        self.sought: tuple[str, int] | None
        # The last positions in earlier epochs, to which a client with several servers may return: epoch, run, id and
        # number.
        self.positions: tuple[tuple[str, bytes, int, int | None], ...] = ()
        # The beginning of the range, if only the server knows it: the last `n` messages, or those put since a time.
        self.back: Back | None
        # If several topics are read: the id up to which the server found no messages besides those read ahead.
        self.scanned = 0
        # In the same case: each topic's count as of `id` and as of `known`.
        self.counts: Counts | None
        self.known_counts: Counts | None
        # The stretch after `end`, if `end` is finite.
        self.rest: Stretch | None
        self.sought = self.back = self.counts = self.known_counts = self.rest = None
        # The step to the next state, by the number of messages taken from the read-ahead before it.
        self.next: dict[int, Step] = {}

    def taken(self, at: int) -> tuple[int, int | None, int]:
        """Return the state after `at` messages of the read-ahead have been taken.

        It consists of the id and number of the last message returned, and the number that expired unread before it.
        """
        if not at:
            return self.id, self.number, self.missed
        last = self.ahead[at - 1]
        gaps = self.gaps if at == len(self.ahead) else missing_numbers(self.number, self.ahead[:at])
        return last.id, last.number, self.missed + gaps

    def rest_from(self, at: int, ahead: Sequence[Entry] = (), fresh_until: float = 0.0) -> Stretch:
        """Return the rest of this stretch, with another read-ahead."""
        last_id, number, missed = self.taken(at)
        if self.scanned and at == len(self.ahead):
            last_id = max(last_id, self.scanned)
        after = Stretch(self.era, last_id, number, missed, ahead, fresh_until)
        after.end, after.generation, after.rest = self.end, self.generation, self.rest
        after.known = self.known if at == len(self.ahead) else max(self.known, self.ahead[-1][:2])
        after.ask = self.ask and not at
        after.positions, after.back = self.positions, self.back
        if self.counts is not None:
            after.counts = self.counts_at(at)
            after.known_counts = self.known_counts if after.known == self.known else self.counts_at(len(self.ahead))
        return after

    def doubt(self, at: int) -> Doubt | None:
        """Return what to ask the server about numbers before more messages are taken."""
        if not self.ask:
            return None
        if self.counts is None:
            return self.era, "", self.taken(at)[0]
        lost = ((topic, count.id) for topic, count in (self.counts_at(at) or {}).items() if count.number == _LOST)
        return next(((self.era, *one) for one in lost), None)

    def renumbered(self, at: int, doubt: Doubt, restored: int) -> Stretch:
        """Return the rest of this stretch, with the number that was in doubt."""
        after = self.remaining(at)
        if after.counts is not None:
            after.ask = True
            after.counts = after.counts | {doubt[1]: after.counts[doubt[1]]._replace(number=restored)}
            return after
        after.ask = False
        if after.era.lost(after.id) or restored < (after.number or 0):
            after.number, after.known = restored, (0, 0)
        return after

    def counts_at(self, at: int) -> Counts | None:
        """Return the counts of topics after `at` messages of the read-ahead have been taken."""
        if self.counts is None or not at:
            return self.counts
        counts, last = self.counts.copy(), self.number
        for entry in self.ahead[:at]:
            missed = 0 if last is None else entry.number - last - 1
            before = counts.get(entry.topic)
            missed += before.missed if before else 0
            counts[entry.topic] = Count(entry.topic_number, missed, entry.expires, entry.id)
            last = entry.number
        if len(counts) > _MAX_COUNTS:
            now = self.ahead[at - 1].put_at
            counts = {topic: count for topic, count in counts.items() if count.expires > now}
        return counts

    def counts_before(self, at: int, ahead: Sequence[Entry], after: Counts | None, now: Counts | None) -> Counts | None:
        """Return the counts before messages that are given back, with none missed before the first.

        `after` has the counts after them, and `now` the current ones.
        """
        counts = self.counts_at(at)
        if counts is None or after is None or now is None:
            return None
        first = {entry.topic: entry for entry in reversed(ahead)}
        found = {topic: Count(one.topic_number - 1, 0, one.expires, one.id) for topic, one in first.items()} | counts
        for topic in found.keys() & after.keys() & now.keys():
            before = found[topic]
            found[topic] = before._replace(missed=now[topic].missed - after[topic].missed + before.missed)
        return found

    def unread(self, found: list[Entry]) -> list[Entry]:
        """Return the messages in a reply that belong to this stretch and follow the read-ahead."""
        if not self.last_read < found[0].id <= found[-1].id <= self.end:
            found = [entry for entry in found if self.last_read < entry.id <= self.end]
        return found if self.counts is None else self.numbered(found)

    def skipped(self, at: int, found: Sequence[Entry]) -> Counts | None:
        """Return the counts after the newest messages of several topics have been taken, skipping older ones."""
        counts = self.counts_at(at)
        if counts is None:
            return None
        new = {
            entry.topic: Count(
                entry.topic_number, counts[entry.topic].missed if entry.topic in counts else 0, entry.expires, entry.id
            )
            for entry in found
        }
        return counts | new

    def numbered(self, found: Sequence[Entry]) -> list[Entry]:
        """Return messages of several topics that follow the read-ahead, numbered as if they were in one topic."""
        counts = self.counts_at(len(self.ahead)) or {}
        numbers: dict[str, int] = {}
        number = (self.ahead[-1].number if self.ahead else self.number) or 0
        entries = []
        for entry in found:
            topic, this = entry.topic, entry.topic_number
            last = numbers.get(topic, counts[topic].number if topic in counts else _UNKNOWN)
            # If the server has forgotten the topic, its numbers restart at 1.
            number += 1 if last < 0 else this - last if last < this else this
            numbers[topic] = this
            entries.append(entry._replace(number=number))
        return entries

    def remaining(self, at: int) -> Stretch:
        """Return the rest of this stretch, with the rest of its read-ahead."""
        return self.rest_from(at, self.ahead[at:], self.fresh_until)

    def next_stretch(self, at: int) -> Stretch:
        """Return the next stretch, which must exist, once this one has been read."""
        assert self.rest is not None  # noqa: S101 - for type checkers
        after = self.rest.remaining(0)
        after.missed = self.taken(at)[2]
        if self.counts is not None:
            counts = self._counts_if_lost(at)
            if self.is_lost:
                counts = _doubted(counts, self.era) if after.ask else _in_epoch_of(after, counts)
            after.counts = _add_missed(after.counts or {}, counts)
            after.missed += self.lost(at)
        return after

    def continues(self, before: Stretch, behind: int) -> bool:
        """Return whether the reply to a request made in an earlier state, for messages after an id, is still useful."""
        if self.era is not before.era or self.generation != before.generation or self.is_lost:
            return False
        return behind <= self.last_read

    def lost(self, at: int) -> int:
        """Return the number of messages that have expired unread if the server has none left in this stretch."""
        last_id, number, _ = self.taken(at)
        if self.counts is not None:
            known = sum(count.missed for count in self._counts_if_lost(at).values())
            return known - sum(count.missed for count in (self.counts_at(at) or {}).values())
        if number is None or self.known[0] <= last_id:
            return 0
        return max(0, self.known[1] - number)

    def _counts_if_lost(self, at: int) -> Counts:
        """Return the counts if the messages up to the known ones have expired unread."""
        counts = self.counts_at(at) or {}
        found = counts.copy()
        for topic, count in (self.known_counts or {}).items():
            before = counts.get(topic)
            # Messages before the first one taken don't count as missed.
            if before and 0 <= before.number < count.number:
                found[topic] = count._replace(missed=before.missed + count.number - before.number)
        return found

    def exhausted(self, at: int) -> Stretch | None:
        """Return the next state if the server has no messages left in this stretch; None if that changes nothing."""
        if self.rest:
            after = self.next_stretch(at)
            if after.counts is not None:
                return after
        elif self.known[0] > self.last_read:
            after = self.rest_from(at)
            after.number = self.known[1]
            after.generation = self.generation[0], self.generation[1] + 1
            if after.counts is not None:
                after.counts = self._counts_if_lost(at)
        else:
            return None
        after.missed += self.lost(at)
        return after


Doubt: TypeAlias = tuple[Era, str, int]
"""An era, a topic if several are read, and the id of a message that the server may have lost."""
Back: TypeAlias = tuple[bytes, float]
"""LAST and a number of messages, or SINCE and a time on the clock `boot_time`; AFTER and that time once the messages up
to the stretch's id are known to be older.
"""
Step: TypeAlias = "tuple[int] | Stretch"
"""The step from a state to the next: the number of messages taken from its read-ahead, or another state."""


def _add_missed(later: Counts, counts: Counts) -> Counts:
    """Return later counts, with the numbers of missed messages known now."""
    found = later | counts
    for topic in later.keys() & counts.keys():
        found[topic] = later[topic]._replace(missed=counts[topic].missed)
    return found


def without_numbers(counts: Counts | None) -> Counts | None:
    """Return counts that continue from the next message of each topic, whatever its number."""
    return counts and {topic: count._replace(number=_UNKNOWN) for topic, count in counts.items()}


def _in_epoch_of(part: Stretch, counts: Counts) -> Counts:
    """Return counts as of a stretch in another epoch. If it begins with the epoch, numbers start at 1."""
    number = 0 if part.number == 0 == part.id and not part.is_lost else _UNKNOWN
    return {topic: count._replace(number=number, id=part.id) for topic, count in counts.items()}


def _doubted(counts: Counts, era: Era) -> Counts:
    """Return counts as of an era of the same epoch. Numbers continue unless the server has lost the message."""
    lost = {topic: count for topic, count in counts.items() if count.number != _UNKNOWN and era.lost(count.id)}
    return counts | {topic: count._replace(number=_LOST) for topic, count in lost.items()}


def insert(stretch: Stretch, other: Stretch) -> Stretch:
    """Insert a stretch into a chain that is not in use yet, in the order of ids; return the chain."""
    if other.id < stretch.id or stretch.rest is None:
        other.rest = stretch
        return other
    stretch.rest = insert(stretch.rest.remaining(0), other)
    return stretch


def missing_numbers(last: int | None, entries: Sequence[Entry]) -> int:
    """Return how many numbers are missing between successive messages, and before them if the last number is known.

    If the server forgets a topic, its numbers restart at 1, but not within these messages, because the topic was empty.
    """
    first = entries[0].number
    before = first - 1 if last is None else last if last < first else 0
    return entries[-1].number - before - len(entries)


def in_next_era(stretch: Stretch, at: int) -> Stretch:
    """Return the state in the era that followed.

    Messages that were read ahead and then lost by the server are still returned until they expire.
    """
    era = stretch.era.next[0]
    parts: list[Stretch] = []
    first = stretch.remaining(at)
    here = _position_behind(first)
    part: Stretch | None = first
    while part:
        if era.epoch == stretch.era.epoch:
            pieces = _restarted(part, era)
            if part.counts is not None:
                for piece in pieces:
                    # Each one continues from the counts at the end of the previous one.
                    piece.counts = {} if piece is not pieces[0] else _doubted(part.counts, era)
            parts += pieces
        elif part.ahead:
            parts.append(_lost_by_server(part.ahead, part.number, era))
        part = part.rest
    if stretch.sought and stretch.sought[0] == era.epoch:
        parts = [Stretch(era, stretch.sought[1], None)]
    elif era.epoch != stretch.era.epoch:
        parts.append(_in_epoch(era, stretch.positions))
    positions = stretch.positions
    if era.epoch != stretch.era.epoch:
        others = [position for position in positions if position[0] != stretch.era.epoch]
        positions = (*others, (stretch.era.epoch, stretch.era.run, *here))[-_MAX_POSITIONS:]
    counts = stretch.counts_at(at)
    for one, rest in zip(parts, [*parts[1:], None], strict=True):
        one.rest, one.generation, one.positions = rest, stretch.generation, positions
        if counts is not None and era.epoch != stretch.era.epoch:
            one.counts, one.ask = _in_epoch_of(one, counts), False
    parts[-1].back = stretch.back
    parts[0].missed = stretch.taken(at)[2]
    return parts[0]


def _position_behind(part: Stretch) -> tuple[int, int | None]:
    """Return the id and number of the last message read ahead, because all of those will still be returned."""
    while part.ahead and part.rest:
        part = part.rest
    return part.ahead[-1][:2] if part.ahead else (part.id, part.number)


def _in_epoch(era: Era, positions: Sequence[tuple[str, bytes, int, int | None]]) -> Stretch:
    """Return the stretch from the remembered position in an epoch or from the start of its first era."""
    for epoch, run, last_id, number in positions:
        if epoch == era.epoch:
            stretch = Stretch(era, last_id, number)
            stretch.ask = number is not None and run != era.run
            return stretch
    return Stretch(era, era.start, era.number)


def _restarted(part: Stretch, era: Era) -> list[Stretch]:
    """Split a stretch into messages that the server may still have, has lost, and has yet to receive."""
    ahead = [entry for entry in part.ahead if part.is_lost or era.lost(entry.id)]
    kept = part.ahead[: len(part.ahead) - len(ahead)]
    first = Stretch(era, part.id, part.number)
    first.ask = part.number is not None or bool(part.ahead)
    first.known = part.known
    first.known_counts = part.known_counts
    if era.lost(part.known[0]):
        first.known, first.known_counts = kept[-1][:2] if kept else (0, 0), part.counts_at(len(kept))
    if not ahead:
        first.end = part.end
        return [first]
    first.end = ahead[0].id - 1
    found = [first] if kept else []
    found.append(_lost_by_server(ahead, first.known[1] or part.number, era))
    if part.end == math.inf:
        last = Stretch(era, ahead[-1].id, ahead[-1].number)
        last.ask = True
        found.append(last)
    return found


def _lost_by_server(ahead: Sequence[Entry], number: int | None, era: Era) -> Stretch:
    """Return a stretch of messages that the server has lost."""
    if number is None or number >= ahead[0].number:
        number = ahead[0].number - 1
    stretch = Stretch(era, ahead[0].id - 1, number, 0, ahead, math.inf)
    stretch.end, stretch.known = ahead[-1].id, ahead[-1][:2]
    return stretch
