"""What a client asks of a server, so that it can ask again: when a connection breaks, the call goes on with another.

Without any input or output. The blocking client and the asyncio client share it.
"""

from __future__ import annotations

import binascii
import itertools
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol, Self, TypeAlias, TypeVar

from dsmq.client.reader import LATEST, Asked, Claim, Entry, Era, Inbox, read_request
from dsmq.client.session import (
    MAX_READ_BYTES,
    MIN_READ_BYTES,
    Session,
    reason,
    restored_number,
    stats_request,
    stored_id,
    topic_name,
)
from dsmq.errors import AuthRequired, Closing, ConnectionLost, DSMQError, MessageNotText, ReplyError, TimedOut
from dsmq.system import boot_time, process
from dsmq.wire.resp import Reply

T = TypeVar("T")

NOT_RUN = (Closing, TimedOut, AuthRequired)
"""Errors behind which the server hangs up, having run no request that it has not answered."""

# Between two attempts to connect: nothing, then this, and twice as long each time, with a jitter, so that many clients
# do not come back all at once.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 1.0
# The longest wait asked of the server at once. A longer one is asked for again and again, so that both sides
# notice soon when the other has vanished.
MAX_WAIT_SECONDS = 15.0
# What `put_many` sends before it reads replies: little enough that both directions fit into the kernel's buffers, and,
# twice, no more than a server remembers of one producer.
PUTS_AT_ONCE = 500
BYTES_AT_ONCE = 262_144
# What a put takes beside topic and message.
_PUT_BYTES = 80
# What takes longer to make is sent as far as it is made.
_LONG_BATCH_SECONDS = 0.1
# For how long a put is sent again: well within the 600 seconds for which the server remembers it.
RESEND_SECONDS = 300.0
# A read that has waited for longer on a connection that then broke had a server.
_LONG_WAIT_SECONDS = 1.0


class Retries:
    """When to try again after a connection has broken."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Note that something was achieved: what breaks from now on is another matter."""
        self._until = math.inf
        self._pauses = _pauses()

    def pause(self) -> float | None:
        """Return for how many seconds to wait before the next attempt; None where it is time to give up."""
        now = time.monotonic()
        self._until = min(self._until, now + self._seconds)
        pause = next(self._pauses)
        return pause if now + pause < self._until else None


def _pauses() -> Iterator[float]:
    yield 0.0
    for attempt in itertools.count():
        longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 32))
        yield longest * random.uniform(0.5, 1.0)  # noqa: S311 - it is no secret


class Producer:
    """A connection as the server knows it by its puts, which are numbered from 1; and which server that is."""

    __slots__ = ("_name", "_process", "_seq", "era", "run")

    def __init__(self, run: bytes, era: Era | None = None) -> None:
        self.run, self.era = run, era
        """Which run of the server it is a producer for: see PROTOCOL.md."""
        # Not by the module `secrets`, which takes longer to import than the rest of this package.
        self._name = binascii.b2a_base64(os.urandom(9), newline=False)
        self._seq = 0
        self._process = process()

    def check_process(self) -> None:
        """Raise ConnectionResetError in a child process: connection and numbers are the parent's."""
        if process() is not self._process:
            raise ConnectionResetError("this process is a child of the one that made the connection")

    def put(self, name: bytes, body: bytes) -> bytes:
        """Return the request, but for its count, that puts a message under the next number."""
        self._seq += 1
        seq = b"%d" % self._seq
        parts = len(name), name, len(body), body, self._name, len(seq), seq
        return b"\r\n$3\r\nPUT\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$3\r\nKEY\r\n$12\r\n%b\r\n$%d\r\n%b\r\n" % parts


class Call(Protocol):
    """What is asked of the server, and can be asked again."""

    def lost(self, error: Exception) -> bool:
        """Note that a connection broke, and why; return whether something was achieved on it.

        Raises ConnectionLost where it must not be asked again.
        """

    def given_up(self, error: Exception) -> ConnectionLost:
        """Return what to raise where there are to be no more attempts."""


class Request(Call, Protocol):
    """A call that is one request."""

    seconds: float
    """How long the server may wait before it replies."""

    def request(self, producer: Producer) -> bytes:
        """Return the request for a connection, the first or another. Raises where it must not be sent there."""


class Plain:
    """A request that is the same each time, and changes nothing."""

    __slots__ = ("_request", "reply", "seconds")

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.seconds = 0.0
        self.reply: Reply = None
        """To be set by whoever asks on behalf of a `Reading`."""

    @property
    def waits(self) -> bool:
        """Whether the server may be asked to wait."""
        return False

    def request(self, _: Producer) -> bytes:
        return self._request

    def lost(self, _: Exception) -> bool:
        return False

    def given_up(self, error: Exception) -> ConnectionLost:
        return ConnectionLost(reason(error))


class Once(Plain):
    """A request that is sent again only where it has surely not been run."""

    __slots__ = ("_is_sent",)

    def __init__(self, request: bytes) -> None:
        super().__init__(request)
        self._is_sent = False

    def request(self, producer: Producer) -> bytes:
        self._is_sent = True
        return super().request(producer)

    def lost(self, error: Exception) -> bool:
        if self._is_sent and not isinstance(error, NOT_RUN):
            raise self.given_up(error) from error
        self._is_sent = False
        return False


class Read(Plain):
    """A READ from a client's position, until a time on the monotonic clock."""

    __slots__ = ("_asked_at", "_inbox", "_latest", "_session", "_until", "asked")

    def __init__(self, session: Session, inbox: Inbox, until: float = 0.0, *, latest: bool = False) -> None:
        self._session, self._inbox, self._until, self._latest = session, inbox, until, latest
        self.seconds = 0.0
        self._asked_at: float
        self.asked: Asked
        """What it went by when it was asked last."""

    @property
    def waits(self) -> bool:
        return time.monotonic() < self._until

    def request(self, producer: Producer) -> bytes:
        self.seconds = 0.0
        inbox, size = self._inbox, self._session.read_bytes
        self.asked = inbox.asked_for_latest() if self._latest else inbox.asked()
        stretch, after, may_wait = self.asked
        if producer.era and producer.era is not stretch.era:
            raise ConnectionResetError("another connection has found that the server was started anew")
        if self._latest:
            return read_request(inbox.topic, after, LATEST, 1)
        options, count = b"", 0
        if inbox.count:
            options, count = _option(b"COUNT", inbox.count), 2
        if size < MAX_READ_BYTES:
            options, count = options + _option(b"BYTES", size), count + 2
        if self._until and may_wait:
            # What is left of its time: it may have been interrupted.
            self._asked_at = time.monotonic()
            left = self._until - self._asked_at
            self.seconds = min(left, MAX_WAIT_SECONDS) if left > 0 else 0.0
            if milliseconds := round(self.seconds * 1000):
                options, count = options + _option(b"WAIT", milliseconds), count + 2
        return read_request(inbox.topic, after, options, count)

    def lost(self, error: Exception) -> bool:
        if isinstance(error, TimeoutError):
            # The link may be slow.
            self._session.read_bytes = max(MIN_READ_BYTES, self._session.read_bytes // 4)
            return False
        # Something may cut connections on which nothing moves for a while; one that only takes them is no server.
        return bool(self.seconds) and time.monotonic() - self._asked_at > _LONG_WAIT_SECONDS

    def take_in(self, found: list[Entry]) -> bool:
        """Take the reply in; return whether there may be more now."""
        inbox, session = self._inbox, self._session
        if found:
            inbox = session.keep(inbox)
            if session.read_bytes < MAX_READ_BYTES:
                session.read_bytes = min(MAX_READ_BYTES, session.read_bytes + MIN_READ_BYTES)
        return inbox.accept(self.asked, found)


def _option(name: bytes, value: int) -> bytes:
    digits = b"%d" % value
    return b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(digits), digits)


Reading: TypeAlias = "Iterator[Plain]"
"""Calls to be made one after another; the reply to each is to be set before the next is taken."""


def some(  # noqa: PLR0913, PLR0917 - of both clients
    session: Session,
    inbox: Inbox,
    claim: Claim,
    taken: list[T],
    n: int,
    seconds: float,
    convert: Callable[[Inbox, Entry], T],
) -> Reading:
    """Add to the messages taken up to `n`; if there is none, wait for the first.

    All that was taken is noted in `claim`.
    """
    until = time.monotonic() + seconds if seconds else 0.0
    more = n > 0
    while (more and len(taken) < n) or (until and not taken and n > 0 and time.monotonic() < until):
        yield (read := Read(session, inbox, 0.0 if taken else until))
        # Now, because this READ may have been the first call to find that the server was restarted.
        if session.is_restarted and (doubt := inbox.doubt):
            yield (stats := Plain(stats_request(inbox.topic, doubt[1])))
            inbox.renumber(doubt, restored_number(stats.reply))
        more = read.take_in(session.entries(read.reply))
        inbox = session.inbox(inbox.topic)
        if more:
            try:
                taken += inbox.take(claim, n - len(taken), convert)
            except MessageNotText:
                if not taken:
                    raise
                return


def latest(session: Session, claim: Claim, taken: list[T], topic: str, convert: Callable[[Inbox, Entry], T]) -> Reading:
    """Take the newest message, and pass over the older ones."""
    found: list[T] | None = None
    while found is None:
        inbox = session.inbox(topic)
        yield (read := Read(session, inbox, latest=True))
        entries = session.entries(read.reply)
        if entries:
            inbox = session.keep(inbox)
        elif read.asked[0].rest is None:
            return
        found = inbox.take_latest(claim, read.asked, entries, convert)
    taken += found


class Put:
    """A put, which is sent again under its key, so that it is stored once."""

    __slots__ = ("_keyed", "_parts", "_run", "_sent_at", "_unsure", "seconds")

    def __init__(self, session: Session, topic: str, message: str | bytes) -> None:
        """Raises TypeError, ValueError or TooBig where it can't be put."""
        self._parts = session.put(topic, message)
        self._keyed = self._run = b""
        # Whether it has been sent, and no answer came that says that it is not stored.
        self._unsure = False
        self._sent_at = 0.0
        self.seconds = 0.0

    def request(self, producer: Producer) -> bytes:
        if self._unsure:
            return _again(self._keyed, self._sent_at, self._run, producer)
        self._keyed, self._run = producer.put(*self._parts), producer.run
        self._sent_at = boot_time()
        return b"*6" + self._keyed

    def lost(self, error: Exception) -> bool:
        self._unsure = self._unsure or not isinstance(error, NOT_RUN)
        return False

    def given_up(self, error: Exception) -> ConnectionLost:
        return ConnectionLost(reason(error), may_be_stored=self._unsure)


class PutMany:
    """Several puts, in order. What has no answer yet is sent again on the next connection, then come the others."""

    def __init__(self, session: Session, topic: str, messages: Iterable[str | bytes]) -> None:
        """Raises TypeError or ValueError if it can't be a topic."""
        topic_name(topic)
        self._parts = (session.put(topic, message) for message in messages)
        self._error: Exception | None = None
        # Whether that is the server's, and how many had been stored before it.
        self._is_refused, self._stored_before = False, 0
        self._run = b""
        # Those that were sent, with their keys, and when they were first, in that order; and what is to be sent next.
        self._unanswered: deque[tuple[bytes, float]] = deque()
        self._made: list[tuple[bytes, bytes]] = []
        # How many of them, the first ones, may be stored.
        self._unsure = 0
        # How many had an answer when a connection broke last.
        self._answered = 0
        self.ids: list[int] = []
        """The ids of those that are stored."""

    def batches(self, producer: Producer) -> Iterator[tuple[int, bytes]]:
        """Iterate over what to send at once on a connection: counts, and requests.

        Where messages took long to make, there is first a count of 0: all replies are to be read, and it is to be
        looked whether the connection still stands.
        """
        unsure = [_again(*put, self._run, producer) for put in islice(self._unanswered, self._unsure)]
        old = unsure + [b"*6" + keyed for keyed, _ in islice(self._unanswered, self._unsure, None)]
        self._run = producer.run
        for first in range(0, len(old), PUTS_AT_ONCE):
            batch = old[first : first + PUTS_AT_ONCE]
            yield len(batch), b"".join(batch)
        while not self._is_refused:
            if not self._made and self._make() > _LONG_BATCH_SECONDS:
                yield 0, b""
            if not self._made:
                return
            now = boot_time()
            # To make messages may have taken a fork.
            producer.check_process()
            batch = [producer.put(name, body) for name, body in self._made]
            self._made = []
            self._unanswered.extend([(keyed, now) for keyed in batch])
            yield len(batch), b"*6" + b"*6".join(batch)

    def _make(self) -> float:
        """Take the next messages; return how many seconds that took."""
        size, began = 0, time.monotonic()
        now = began
        try:
            for parts in self._parts:
                now = time.monotonic()
                self._made.append(parts)
                size += len(parts[0]) + len(parts[1]) + _PUT_BYTES
                if len(self._made) == PUTS_AT_ONCE or size >= BYTES_AT_ONCE or now - began > _LONG_BATCH_SECONDS:
                    break
        except Exception as error:  # noqa: BLE001 - `check` raises it
            self._error = error
        return now - began

    def answered(self, reply: Reply) -> None:
        """Take the next reply. After an error nothing more is sent, and `check` raises it.

        The replies to what was sent already are still taken, so that it is known what has been stored.
        """
        try:
            self.ids.append(stored_id(reply))
        except ReplyError as error:
            if error is not reply:
                raise
            if not self._is_refused:
                self._error, self._is_refused, self._stored_before = error, True, len(self.ids)
        self._unanswered.popleft()
        if self._unsure:
            self._unsure -= 1

    def lost(self, error: Exception) -> bool:
        if not isinstance(error, NOT_RUN):
            self._unsure = len(self._unanswered)
        before, self._answered = self._answered, len(self.ids)
        return self._answered > before

    def given_up(self, error: Exception) -> ConnectionLost:
        return ConnectionLost(reason(error), may_be_stored=self._unsure > 0)

    def check(self) -> None:
        """Raise the error at which the messages ended, if it was one: those before it are stored."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Have an error say how many messages are stored."""
        if isinstance(error, DSMQError):
            error.stored_before = self._stored_before if self._is_refused else len(self.ids)
            error.stored_behind = len(self.ids) - error.stored_before


def _again(keyed: bytes, sent_at: float, run: bytes, producer: Producer) -> bytes:
    """Return the request that sends a put again. Raises ConnectionLost where the server may not know it any more."""
    about = ""
    if producer.run != run:
        about = "the server was started anew, and does not know what it had stored last"
    elif boot_time() - sent_at > RESEND_SECONDS:
        about = f"no answer for {RESEND_SECONDS:g} s, and the server does not know for ever what it has stored"
    if about:
        raise ConnectionLost(about, may_be_stored=True)
    return b"*7%b$5\r\nAGAIN\r\n" % keyed
