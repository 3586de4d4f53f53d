"""A client's position in one topic, or in several that it reads together, and the messages it has read ahead.

A reader is shared by threads and by signal handlers. A handler may call the client between any two steps of the call
that it interrupts, and a lock would hang it. So states are immutable: the next state is linked to the current one with
`dict.setdefault`, which is atomic. A call that loses the race starts again from the new state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias, TypeVar

from dsmq.client.arguments import Names
from dsmq.client.stretch import Back, Doubt, Entry, Era, Step, Stretch, in_next_era, insert, without_numbers
from dsmq.errors import MessageNotText
from dsmq.system import boot_time
from dsmq.wire.limits import DEFAULT_COUNT
from dsmq.wire.resp import encode_bulk

# Messages that have been in the read-ahead for longer than this are read again, because max_age may have changed.
FRESH_SECONDS = 1.0
MIN_READ_BYTES = 4096

_logger = logging.getLogger(__name__)

T = TypeVar("T")

Claim: TypeAlias = "list[tuple[TopicReader, Stretch, int, Step]]"
"""The messages that a call takes, recorded in advance, so that they can be given back wherever the call is
interrupted."""
Tried: TypeAlias = "list[tuple[Step, Stretch, int, Stretch]]"
"""Attempts to give back a claim: the step taken, the state and the position in it at that time, and the next state."""
Returned: TypeAlias = "list[tuple[Claim, Tried]]"
"""Claims of interrupted calls. Such a call only appends its claim, which is atomic; the next call gives them back."""
Asked: TypeAlias = "tuple[Stretch, int, bool]"
"""The state when a READ was sent, the id after which to read, and whether it may wait."""


def take_back(returned: Returned) -> None:
    """Mark the messages that interrupted calls took as unread. If this is interrupted, the next call continues."""
    with suppress(IndexError, ValueError):
        while True:
            claim, tried = first = returned[0]
            for reader, stretch, at, step in reversed(claim):
                if stretch.next.get(at) is step:
                    reader.give_back(stretch, at, step, tried)
            returned.remove(first)


class TopicReader:
    """The messages of one topic or of several topics and patterns."""

    __slots__ = ("_seen", "count", "key", "names", "topic", "used_at")

    def __init__(self, key: str | Names, era: Era) -> None:
        self.key = key
        self.topic = key if isinstance(key, str) else ", ".join(key)
        self.names = [] if isinstance(key, str) else [encode_bulk(name.encode()) for name in key]
        """The encoded topics and patterns; empty for a single topic."""
        stretch = Stretch(era, era.start, era.number)
        if self.names:
            stretch.counts = {}
        # The last known state; there may be later ones.
        self._seen = stretch, 0
        self.count = 0
        """How many messages to request; 0 leaves that to the server."""
        self.used_at = -math.inf
        """When messages last arrived, by `boot_time`."""

    def _current(self) -> tuple[Stretch, int]:
        """Return the current state and the number of messages already taken from its read-ahead."""
        stretch, at = self._seen
        while True:
            step = stretch.next.get(at)
            if step is None:
                if stretch.era.next:
                    step = stretch.next.setdefault(at, in_next_era(stretch, at))
                elif stretch.rest and at == len(stretch.ahead) and stretch.last_read >= stretch.end:
                    step = stretch.next.setdefault(at, stretch.next_stretch(at))
                else:
                    return stretch, at
            if isinstance(step, tuple):
                (at,) = step
            else:
                stretch, at = step, 0

    def _move(self, stretch: Stretch, at: int, step: Step) -> bool:
        """Move from a state to the next; return False if another call was faster."""
        if stretch.next.setdefault(at, step) is not step:
            return False
        self._seen = (stretch, step[0]) if isinstance(step, tuple) else (step, 0)
        return True

    @property
    def position(self) -> tuple[str, int]:
        """The epoch and id of the last message returned; if messages were given back, of the message before them."""
        stretch, at = self._current()
        if stretch.is_lost and stretch.rest:
            # These ids belong to an earlier run of the server.
            return stretch.era.epoch, stretch.rest.id
        return stretch.era.epoch, max(stretch.taken(at)[0], stretch.scanned if at == len(stretch.ahead) else 0)

    @property
    def missed(self) -> int:
        """The number of messages that expired unread before the last one returned."""
        stretch, at = self._current()
        return stretch.taken(at)[2]

    def missed_in(self, topic: str) -> int:
        """The share of `missed` of one topic, if several are read together."""
        stretch, at = self._current()
        counts = stretch.counts_at(at)
        return counts[topic].missed if counts and topic in counts else 0

    @property
    def doubt(self) -> Doubt | None:
        """What `restored_number` is needed for before messages are taken, if anything."""
        stretch, at = self._current()
        return stretch.doubt(at)

    def renumber(self, doubt: Doubt, restored: int) -> None:
        """Continue counting from the topic's last number before the id was lost."""
        while True:
            stretch, at = self._current()
            if stretch.doubt(at) != doubt or self._move(stretch, at, stretch.renumbered(at, doubt, restored)):
                return

    def shrink(self) -> None:
        """Free the messages that have been returned."""
        stretch, at = self._current()
        if at and at == len(stretch.ahead):
            self._move(stretch, at, stretch.rest_from(at))

    def asked(self) -> Asked:
        """Return what to request next."""
        stretch, at = self._current()
        # The server may refuse an id of another epoch, and the reply is not used.
        after = 0 if stretch.is_lost else stretch.scanned or stretch.last_read
        # Don't wait if another call has just read ahead.
        return stretch, after, at == len(stretch.ahead)

    def asked_for_latest(self) -> Asked:
        """Return what to request for the latest message, which skips the read-ahead."""
        stretch, at = self._current()
        last = stretch
        while last.rest:
            last, at = last.rest, 0
        return stretch, last.taken(at)[0], False

    def accept(self, asked: Asked, found: list[Entry], scanned: int = 0) -> bool:
        """Process the reply to a READ; return whether there may be more messages now.

        Messages that another thread has since fetched are recognised by their ids. A reply to a request from before
        a `seek`, or from another era, is ignored. `scanned` is the id up to which the server found no other messages.
        """
        before, behind, _ = asked
        while True:
            stretch, at = self._current()
            if stretch.doubt(at) or (stretch is not before and not stretch.continues(before, behind)):
                return True
            if stretch.back is not None:
                before = self._begin(stretch, at, stretch.back, found, scanned)
                if before.back is not None:
                    return True
                continue
            new, is_taken = found and stretch.unread(found), at == len(stretch.ahead)
            if new and is_taken:
                after: Stretch | None = stretch.rest_from(at, new, boot_time() + FRESH_SECONDS)
            elif new:
                after = stretch.rest_from(at, [*stretch.ahead[at:], *new], stretch.fresh_until)
            else:
                # If the reply is older, messages seen since then may still exist.
                after = stretch.exhausted(at) if stretch is before and is_taken else None
            if scanned and stretch.end == math.inf and (new or after is None):
                # All messages up to this id are in the read-ahead.
                (after or stretch).scanned = max((after or stretch).scanned, scanned)
            if after is None:
                return bool(found) or not is_taken
            if self._move(stretch, at, after):
                if self.count and at and is_taken:
                    # The last batch was read in time.
                    self.count = 0 if self.count > DEFAULT_COUNT / 2 else self.count * 2
                missed = after.missed + after.gaps - stretch.missed - stretch.gaps if new else stretch.lost(at)
                if missed > 0:
                    _logger.warning("topic %r: %d messages expired before they were read", self.topic, missed)
                return bool(found) or stretch.rest is not None

    def _begin(self, stretch: Stretch, at: int, back: Back, found: Sequence[Entry], scanned: int) -> Stretch:
        """Begin the range where the server's reply begins; return the new state, even if another call was faster.

        When reading since a time, messages are requested with a margin; their estimated put times are never too early.
        """
        first = next((entry for entry in found if back[0] == b"LAST" or entry.put_at >= back[1]), None)
        after = first.id - 1 if first else found[-1].id if found else scanned
        step = Stretch(stretch.era, after, None, stretch.taken(at)[2])
        if found and not first:
            # All of these messages are older.
            step.back = b"AFTER", back[1]
        step.generation, step.positions, step.counts = stretch.generation, stretch.positions, stretch.counts
        self._move(stretch, at, step)
        return step

    def take(self, claim: Claim, n: int, convert: Callable[[TopicReader, Entry], T]) -> list[T]:
        """Take up to `n` messages from the read-ahead and record them in `claim`.

        Stops before one that can't be converted; raises MessageNotText if it is the first.
        """
        while True:
            stretch, at = self._seen
            if at in stretch.next or stretch.era.next or stretch.rest:
                stretch, at = self._current()
            if at == len(stretch.ahead):
                return []
            now, entry = boot_time(), stretch.ahead[at]
            if now > stretch.fresh_until or entry.expires <= now:
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
                    # This stretch consisted of messages that had been given back.
                    with suppress(MessageNotText):
                        taken += self.take(claim, n - len(taken), convert)
                return taken

    def _refresh(self, stretch: Stretch, at: int, now: float) -> None:
        """Drop a read-ahead that is no longer fresh; messages that have not expired will be fetched again."""
        left: Sequence[Entry] = ()
        if stretch.is_lost:
            left = [entry for entry in stretch.ahead[at:] if entry.expires > now]
        else:
            self.count = max(1, at)
        after = stretch.rest_from(at, left, stretch.fresh_until if left else 0.0)
        if not left and stretch.is_lost:
            after = stretch.exhausted(at) or after
        self._move(stretch, at, after)

    def take_latest(
        self, claim: Claim, asked: Asked, found: list[Entry], convert: Callable[[TopicReader, Entry], T]
    ) -> list[T] | None:
        """Take the message that READ … LATEST found and skip all older ones; None if the request is outdated."""
        while True:
            stretch, at = self._current()
            if stretch.era is not asked[0].era or stretch.generation != asked[0].generation:
                return None
            if not found or found[-1].id <= self.asked_for_latest()[1]:
                # There may be messages that were given back or that the server has lost.
                return self.take(claim, 1, convert) if stretch.rest else []
            last_id, number, missed = stretch.taken(at)
            if stretch.counts is not None:
                found = [entry for entry in found if entry.id > last_id]
            entry = found[-1]
            taken = [convert(self, one) for one in found] if stretch.counts is not None else [convert(self, entry)]
            after = Stretch(stretch.era, entry.id, entry.number or number, missed)
            after.counts = stretch.skipped(at, found)
            after.positions = stretch.positions
            after.generation = stretch.generation
            claim.append((self, stretch, at, after))
            if self._move(stretch, at, after):
                return taken

    def give_back(self, stretch: Stretch, at: int, step: Step, tried: Tried) -> None:
        """Mark messages taken from a state as unread, unless an earlier attempt has done so."""
        ahead = stretch.ahead[at : step[0]] if isinstance(step, tuple) else ()
        last = ahead[-1] if isinstance(step, tuple) else step
        last_id, number, missed = stretch.taken(at)
        counted = stretch.taken(step[0])[2] - missed if isinstance(step, tuple) else 0
        if number is None and ahead:
            number = ahead[0].number - 1
        while True:
            now, now_at = self._current()
            is_here = now.era is stretch.era
            if now.generation[0] != stretch.generation[0] or not (ahead or is_here):
                return
            if any(one is step and state.next.get(state_at) is after for one, state, state_at, after in tried):
                return
            back = Stretch(now.era, last_id, number, 0, ahead, stretch.fresh_until if is_here else math.inf)
            back.positions = now.positions
            back.known_counts = stretch.counts_at(step[0]) if isinstance(step, tuple) else step.counts
            back.counts = stretch.counts_before(at, ahead, back.known_counts, now.counts_at(now_at))
            back.end, back.known, back.generation = last.id, (last.id, last.number or 0), now.generation
            after = insert(now.remaining(now_at), back)
            after.missed = now.taken(now_at)[2] - counted
            tried.append((step, now, now_at, after))
            if self._move(now, now_at, after):
                return

    def seek(self, after: int, epoch: str = "", back: Back | None = None) -> bool:
        """Continue after an id of an epoch, by default the current one, and drop the read-ahead.

        With `back`, the server determines the position. Returns False for a different epoch: then the oldest message is
        next, unless the server turns out to have been restarted and to be in that epoch now.
        """
        while True:
            stretch, at = self._current()
            missed, is_known = stretch.taken(at)[2], epoch in ("", stretch.era.epoch)
            step = Stretch(stretch.era, after if is_known else 0, None if is_known else 0, missed)
            step.positions, step.back, step.counts = stretch.positions, back, without_numbers(stretch.counts_at(at))
            step.sought = None if is_known else (epoch, after)
            step.generation = stretch.generation[0] + 1, 0
            if self._move(stretch, at, step):
                return is_known


def _converted(
    reader: TopicReader, entries: Sequence[Entry], now: float, convert: Callable[[TopicReader, Entry], T]
) -> list[T]:
    """Convert messages, up to one that can't be converted or has expired."""
    taken = []
    for entry in entries:
        if entry.expires <= now:
            break
        try:
            taken.append(convert(reader, entry))
        except MessageNotText:
            break
    return taken
