"""The messages of one topic at a client: where to read on, and what was read ahead.

There are no locks. Other threads share an inbox, and so do signal handlers, which run between any two steps of the call
that they interrupt and may call the client themselves: a lock would not keep them out, only hang them. So a state is
never changed. It is superseded by the state that is first to be linked to it, by `dict.setdefault`, which nothing can
interrupt; a call that comes second looks again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeAlias, TypeVar

from dsmq.errors import MessageNotText
from dsmq.system import boot_time

# How long messages may wait in the read-ahead before the server is asked again: a new max_age is in force then.
FRESH_SECONDS = 1.0
# What the server sends at most unless it is told.
_DEFAULT_COUNT = 100

_logger = logging.getLogger(__name__)

T = TypeVar("T")


class Entry(NamedTuple):
    """A message read ahead; times are on the clock `boot_time`."""

    id: int
    number: int
    expires: float
    body: bytes
    put_at: float = 0.0


class Era:
    """One run of the server in one epoch, as a client knows it. `next` holds the one that followed."""

    __slots__ = ("_lost", "epoch", "next", "number", "run", "start")

    def __init__(
        self, epoch: str, run: bytes, start: int, number: int | None, lost: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.epoch, self.run, self._lost = epoch, run, lost
        self.start, self.number = start, number
        """Where a topic is read from, and the number of its message there, if known."""
        self.next: dict[int, Era] = {}

    def lost(self, message_id: int) -> tuple[int, int] | None:
        """Return the range of lost ids that an id is in: the id before it, and its last."""
        return next((lost for lost in self._lost if lost[0] < message_id <= lost[1]), None)


class _Stretch:
    """A range of ids to read, and the messages in it that were read ahead."""

    __slots__ = (
        "ahead",
        "ask",
        "end",
        "era",
        "fresh",
        "generation",
        "id",
        "known",
        "missed",
        "next",
        "number",
        "rest",
        "sought",
    )

    def __init__(  # noqa: PLR0913, PLR0917 - they make up the state
        self,
        era: Era,
        last_id: int,
        number: int | None,
        end: float = math.inf,
        known: tuple[int, int] = (0, 0),
        ahead: Sequence[Entry] = (),
        fresh: float = 0.0,
        missed: int = 0,
        generation: tuple[int, int] = (0, 0),
        *,
        ask: bool = False,
        sought: tuple[str, int] | None = None,
        rest: _Stretch | None = None,
    ) -> None:
        self.era = era
        self.id, self.number = last_id, number
        """The message behind which it begins: its id, and its number if known."""
        self.end = end
        """The last id of it; infinite for the last stretch."""
        self.known = known
        """Id and number of the newest message that it was seen to hold, to count what expires before it is read."""
        self.ahead = ahead
        self.fresh = fresh
        """Until when the read-ahead may be handed out unasked; infinite if the server can't have it any more."""
        self.missed, self.rest = missed, rest
        self.generation = generation
        """How often it was told to read elsewhere, and how often messages were found to have expired since: replies to
        what was asked before are of no use.
        """
        self.ask = ask
        """Whether the server may have lost messages up to `number`, and is to be asked where the numbers go on."""
        self.sought = sought
        """The position in an epoch that is not known yet, if `seek` asked for one and nothing has been read since."""
        self.next: dict[int, _Step] = {}
        """By how many of the read-ahead had been taken: what came then."""

    def handed(self, at: int) -> tuple[int, int | None]:
        """Return the id and number of the last message that was handed out."""
        return self.ahead[at - 1][:2] if at else (self.id, self.number)

    def missed_at(self, at: int) -> int:
        """Return how many messages had expired unread before the last that was handed out."""
        return self.missed + _holes(self.number, self.ahead[:at]) if at else self.missed

    def rest_from(self, at: int, ahead: Sequence[Entry] = (), fresh: float = 0.0) -> _Stretch:
        """Return what is left of it, with another read-ahead."""
        known, ask, missed = self.known, self.ask and not at, self.missed_at(at)
        if len(self.ahead) > at:
            known = max(known, self.ahead[-1][:2])
        last_id, number = self.handed(at)
        # By position, which is faster: each reply makes one.
        return _Stretch(
            self.era, last_id, number, self.end, known, ahead, fresh, missed, self.generation, ask=ask, rest=self.rest
        )

    def continues(self, before: _Stretch, behind: int) -> bool:
        """Return whether a reply is of use that was asked for in a state before, behind this id."""
        if self.era is not before.era or self.generation != before.generation or self.fresh == math.inf:
            return False
        return behind <= (self.ahead[-1].id if self.ahead else self.id)

    def lost(self, at: int) -> int:
        """Return how many messages have expired if no more of it comes."""
        last_id, number = self.handed(at)
        if number is None or self.known[0] <= last_id:
            return 0
        return max(0, self.known[1] - number)

    def over(self, at: int) -> _Stretch | None:
        """Return the state after the server had no more of it; None if it is the same."""
        if self.rest is None and self.known[0] <= (self.ahead[-1].id if self.ahead else self.id):
            return None
        lost = self.lost(at)
        missed = self.missed_at(at) + lost
        if self.rest:
            return _rest(self.rest, missed)
        after = self.rest_from(at)
        after.number, after.missed = self.known[1], missed
        after.generation = self.generation[0], self.generation[1] + 1
        return after


_Step: TypeAlias = "tuple[int] | _Stretch"
"""How many of the read-ahead have been taken, or another state."""
Claim: TypeAlias = "list[tuple[Inbox, _Stretch, int, _Step]]"
"""What a call has taken, noted before it is taken, so that all can be given back wherever it is interrupted."""
Returned: TypeAlias = "list[tuple[Claim, list[tuple[_Step, _Stretch, int, _Stretch]]]]"
"""Claims of calls that were interrupted, and for each what was tried to give it back: what was taken, and which state
was to follow which. Such a call appends its claim, which no handler can interrupt; the next call does the rest.
"""
Asked: TypeAlias = "tuple[_Stretch, int, bool]"
"""What a READ goes by: the state in which it is asked, the id behind which to read, and whether it may wait."""


def take_back(returned: Returned) -> None:
    """Have messages read again that calls took and could not hand out. If it is interrupted, the next one goes on."""
    with suppress(IndexError, ValueError):
        while True:
            claim, tried = first = returned[0]
            for inbox, stretch, at, step in reversed(claim):
                if stretch.next.get(at) is step:
                    inbox.give_back(stretch, at, step, tried)
            returned.remove(first)


class Inbox:
    """The messages of one topic."""

    __slots__ = ("_seen", "count", "topic")

    def __init__(self, topic: str, era: Era) -> None:
        self.topic = topic
        self._seen = _Stretch(era, era.start, era.number), 0
        self.count = 0
        """How many messages to ask for; 0 for as many as the server likes."""

    def _place(self) -> tuple[_Stretch, int]:
        """Return the present state, and how much of its read-ahead has been taken."""
        stretch, at = self._seen
        while True:
            step = stretch.next.get(at)
            if step is None:
                if stretch.era.next:
                    step = stretch.next.setdefault(at, _in_the_next_era(stretch, at))
                elif stretch.rest and at == len(stretch.ahead) and stretch.handed(at)[0] >= stretch.end:
                    step = stretch.next.setdefault(at, _rest(stretch.rest, stretch.missed_at(at)))
                else:
                    return stretch, at
            if isinstance(step, tuple):
                (at,) = step
            else:
                stretch, at = step, 0

    def _move(self, stretch: _Stretch, at: int, step: _Step) -> bool:
        """Go on from a state to the next; return False if another call was first."""
        if stretch.next.setdefault(at, step) is not step:
            return False
        self._seen = (stretch, step[0]) if isinstance(step, tuple) else (step, 0)
        return True

    @property
    def position(self) -> tuple[str, int]:
        """The epoch and id of the last message handed out; of several, one of which was given back, that before it."""
        stretch, at = self._place()
        if stretch.fresh == math.inf and stretch.rest:
            # The server has no ids like these.
            return stretch.era.epoch, stretch.rest.id
        return stretch.era.epoch, stretch.handed(at)[0]

    @property
    def missed(self) -> int:
        """How many messages expired unread before the last that was handed out."""
        stretch, at = self._place()
        return stretch.missed_at(at)

    @property
    def doubt(self) -> tuple[Era, int] | None:
        """The era and the id for which the server is to be asked for `restored_number`, before it is read from."""
        stretch, at = self._place()
        return (stretch.era, stretch.handed(at)[0]) if stretch.ask else None

    def renumber(self, doubt: tuple[Era, int], restored: int) -> None:
        """Take the topic's last number before the id was lost: numbers go on from there."""
        while self.doubt == doubt:
            stretch, at = self._place()
            after = stretch.rest_from(at, stretch.ahead[at:], stretch.fresh)
            after.ask = False
            if after.era.lost(after.id) or restored < (after.number or 0):
                after.number, after.known = restored, (0, 0)
            if self._move(stretch, at, after):
                return

    def shrink(self) -> None:
        """Let go of the messages that have been handed out."""
        stretch, at = self._place()
        if at and at == len(stretch.ahead):
            self._move(stretch, at, stretch.rest_from(at))

    # What is asked

    def asked(self) -> Asked:
        """Return what to ask by for more."""
        stretch, at = self._place()
        after = stretch.ahead[-1].id if stretch.ahead else stretch.id
        if stretch.fresh == math.inf:
            # The server may refuse an id of another epoch. What it replies is of no use.
            after = 0
        # Another call may have read ahead what this one wants.
        return stretch, after, at == len(stretch.ahead)

    def asked_for_latest(self) -> Asked:
        """Return what to ask by for the latest, which passes over the read-ahead."""
        stretch, at = self._place()
        last = stretch
        while last.rest:
            last, at = last.rest, 0
        return stretch, last.handed(at)[0], False

    # What comes

    def accept(self, asked: Asked, found: list[Entry]) -> bool:
        """Take in the reply to a READ; return whether there may be more now.

        What another thread has fetched meanwhile is known by its ids. What was asked for elsewhere, before a `seek` or
        in another epoch, is passed over.
        """
        before, behind, _ = asked
        while True:
            stretch, at = self._place()
            if stretch.ask or (stretch is not before and not stretch.continues(before, behind)):
                return True
            end = stretch.ahead[-1].id if stretch.ahead else stretch.id
            new = [entry for entry in found if end < entry.id <= stretch.end] if found else found
            if new:
                ahead = stretch.ahead[at:]
                fresh = stretch.fresh if ahead else boot_time() + FRESH_SECONDS
                after: _Stretch | None = stretch.rest_from(at, [*ahead, *new], fresh)
            else:
                # An older reply says nothing of what was known later.
                after = stretch.over(at) if stretch is before and at == len(stretch.ahead) else None
            if after is None:
                return bool(found) or at < len(stretch.ahead)
            if self._move(stretch, at, after):
                self._learn(stretch, at, new)
                return bool(found) or stretch.rest is not None

    def _learn(self, stretch: _Stretch, at: int, new: list[Entry]) -> None:
        """Ask for more where all that was fetched last has been read in time, and log what was missed."""
        if self.count and at and at == len(stretch.ahead):
            self.count = 0 if self.count > _DEFAULT_COUNT / 2 else self.count * 2
        last = stretch.ahead[-1].number if stretch.ahead else stretch.number
        missed = _holes(last, new) if new else stretch.lost(at)
        if missed:
            _logger.warning("topic %r: %d messages expired before they were read", self.topic, missed)

    def take(self, claim: Claim, n: int, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        """Take up to `n` of the messages that were read ahead, and note it in `claim`.

        It stops short of one that can't be converted. Raises MessageNotText if that is the first.
        """
        while True:
            stretch, at = self._seen
            if at in stretch.next or stretch.era.next or at == len(stretch.ahead):
                stretch, at = self._place()
                if at == len(stretch.ahead):
                    return []
            now, entry = boot_time(), stretch.ahead[at]
            if now > stretch.fresh or entry.expires <= now:
                self._refresh(stretch, at, now)
                continue
            taken = [convert(self, entry)]
            if n > 1:
                taken += _converted(self, stretch.ahead[at + 1 : at + n], now, convert)
            step = (at + len(taken),)
            claim.append((self, stretch, at, step))
            if stretch.next.setdefault(at, step) is step:
                self._seen = stretch, step[0]
                if stretch.rest and len(taken) < n:
                    # What was given back stands in front of the rest.
                    with suppress(MessageNotText):
                        taken += self.take(claim, n - len(taken), convert)
                return taken

    def _refresh(self, stretch: _Stretch, at: int, now: float) -> None:
        """Drop what is not fresh any more; what has not expired will be fetched again."""
        left: Sequence[Entry] = ()
        if stretch.fresh == math.inf:
            left = [entry for entry in stretch.ahead[at:] if entry.expires > now]
        else:
            self.count = max(1, at)
        after = stretch.rest_from(at, left, stretch.fresh if left else 0.0)
        if not left and stretch.fresh == math.inf:
            after = stretch.over(at) or after
        self._move(stretch, at, after)

    def take_latest(
        self, claim: Claim, asked: Asked, found: list[Entry], convert: Callable[[Inbox, Entry], T]
    ) -> list[T] | None:
        """Take what READ … LATEST found, and pass over all before it. None if it was asked for elsewhere."""
        while True:
            stretch, at = self._place()
            if stretch.era is not asked[0].era or stretch.generation != asked[0].generation:
                return None
            if not found or found[-1].id <= self.asked_for_latest()[1]:
                # What was given back, or comes from a server that is gone, may be there nevertheless.
                return self.take(claim, 1, convert) if stretch.rest else []
            entry = found[-1]
            taken = [convert(self, entry)]
            missed = stretch.missed_at(at)
            after = _Stretch(stretch.era, entry.id, entry.number, missed=missed, generation=stretch.generation)
            claim.append((self, stretch, at, after))
            if self._move(stretch, at, after):
                return taken

    def give_back(
        self, stretch: _Stretch, at: int, step: _Step, tried: list[tuple[_Step, _Stretch, int, _Stretch]]
    ) -> None:
        """Have messages read again that were taken from a state, unless that was tried before and done."""
        ahead = stretch.ahead[at : step[0]] if isinstance(step, tuple) else ()
        last = ahead[-1] if isinstance(step, tuple) else step
        known = last.id, last.number or 0
        last_id, number = stretch.handed(at)
        counted = stretch.missed_at(step[0]) - stretch.missed_at(at) if isinstance(step, tuple) else 0
        if number is None and ahead:
            number = ahead[0].number - 1
        while True:
            now, now_at = self._place()
            is_here = now.era is stretch.era
            if now.generation[0] != stretch.generation[0] or not (ahead or is_here):
                return
            if any(one is step and state.next.get(state_at) is after for one, state, state_at, after in tried):
                return
            back = _Stretch(
                now.era,
                last_id,
                number,
                end=last.id,
                known=known,
                ahead=ahead,
                fresh=stretch.fresh if is_here else math.inf,
                generation=now.generation,
            )
            after = _inserted(now.rest_from(now_at, now.ahead[now_at:], now.fresh), back)
            after.missed = now.missed_at(now_at) - counted
            tried.append((step, now, now_at, after))
            if self._move(now, now_at, after):
                return

    def seek(self, after: int, epoch: str = "") -> bool:
        """Continue after an id of an epoch, or of the present one, and drop what was read ahead.

        Returns False if the epoch is another one: then the oldest message is next, unless the client finds that the
        server was restarted and has that epoch now.
        """
        while True:
            stretch, at = self._place()
            sought = None if epoch in ("", stretch.era.epoch) else (epoch, after)
            start = (0, 0) if sought else (after, None)
            missed, generation = stretch.missed_at(at), (stretch.generation[0] + 1, 0)
            step = _Stretch(stretch.era, start[0], start[1], missed=missed, generation=generation, sought=sought)
            if self._move(stretch, at, step):
                return sought is None


def _inserted(stretch: _Stretch, back: _Stretch) -> _Stretch:
    """Return a chain of stretches, not in use yet, with another one at its place."""
    if back.id < stretch.id or stretch.rest is None:
        back.rest = stretch
        return back
    stretch.rest = _inserted(stretch.rest.rest_from(0, stretch.rest.ahead, stretch.rest.fresh), back)
    return stretch


def _rest(rest: _Stretch, missed: int) -> _Stretch:
    """Return the next stretch when the one before it has been read."""
    after = rest.rest_from(0, rest.ahead, rest.fresh)
    after.missed = missed
    return after


def _converted(inbox: Inbox, entries: Sequence[Entry], now: float, convert: Callable[[Inbox, Entry], T]) -> list[T]:
    """Convert messages, up to one that can't be converted or has expired."""
    taken = []
    for entry in entries:
        if entry.expires <= now:
            break
        try:
            taken.append(convert(inbox, entry))
        except MessageNotText:
            break
    return taken


def _holes(last: int | None, entries: Sequence[Entry]) -> int:
    """Return how many numbers are missing in messages that follow one another, behind the last number if it is known.

    Numbering that was forgotten begins again with 1; the topic was empty then, so that does not happen within them.
    """
    first = entries[0].number
    before = first - 1 if last is None else last if last < first else 0
    return entries[-1].number - before - len(entries)


def _in_the_next_era(stretch: _Stretch, at: int) -> _Stretch:
    """Return a state in the era that has followed.

    What was read ahead, and the server does not have any more, is still handed out, until it expires.
    """
    era = stretch.era.next[0]
    missed = stretch.missed_at(at)
    if stretch.sought and stretch.sought[0] == era.epoch:
        return _Stretch(era, stretch.sought[1], None, missed=missed, generation=stretch.generation)
    parts: list[_Stretch] = []
    part: _Stretch | None = stretch.rest_from(at, stretch.ahead[at:], stretch.fresh)
    while part:
        parts += _replaced(part, era) if era.epoch != stretch.era.epoch else _restarted(part, era)
        part = part.rest
    if era.epoch != stretch.era.epoch:
        parts.append(_Stretch(era, 0, 0))
    for one, rest in zip(parts, [*parts[1:], None], strict=True):
        one.rest, one.generation = rest, stretch.generation
    parts[0].missed = missed
    return parts[0]


def _replaced(part: _Stretch, era: Era) -> list[_Stretch]:
    return [_gone(part.ahead, part.number, era)] if part.ahead else []


def _restarted(part: _Stretch, era: Era) -> list[_Stretch]:
    """Divide a stretch: what the server may still have, what it has lost, and what it puts from now on."""
    is_gone = part.fresh == math.inf
    ahead = [entry for entry in part.ahead if is_gone or era.lost(entry.id)]
    kept = [entry[:2] for entry in part.ahead[: len(part.ahead) - len(ahead)]]
    ask = part.number is not None or bool(part.ahead)
    known = (kept[-1] if kept else (0, 0)) if era.lost(part.known[0]) else part.known
    if not ahead:
        return [_Stretch(era, part.id, part.number, end=part.end, known=known, ask=ask)]
    found = [_gone(ahead, known[1] or part.number, era)]
    if kept:
        found.insert(0, _Stretch(era, part.id, part.number, end=ahead[0].id - 1, known=known, ask=ask))
    if part.end == math.inf:
        found.append(_Stretch(era, ahead[-1].id, ahead[-1].number, ask=True))
    return found


def _gone(ahead: Sequence[Entry], number: int | None, era: Era) -> _Stretch:
    """Return a stretch of messages that the server does not have any more."""
    if number is None or number >= ahead[0].number:
        number = ahead[0].number - 1
    last = ahead[-1]
    return _Stretch(era, ahead[0].id - 1, number, end=last.id, known=last[:2], ahead=ahead, fresh=math.inf)


LATEST = b"$6\r\nLATEST\r\n"


def read_request(topic: str, after: int, options: bytes = b"", count: int = 0) -> bytes:
    """Return a READ, with so many words of options that are encoded already."""
    name, position = topic.encode(), b"%d" % after
    parts = 3 + count, len(name), name, len(position), position, options
    return b"*%d\r\n$4\r\nREAD\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n%b" % parts
