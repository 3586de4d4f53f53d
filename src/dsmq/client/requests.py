"""Calls, which can be made again on another connection when one breaks. Without I/O, for both clients."""

from __future__ import annotations

import binascii
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar

from dsmq.client import arguments
from dsmq.client.reader import MAX_READ_BYTES, MIN_READ_BYTES, Asked, Claim, TopicReader
from dsmq.client.replies import reason, restored_number, stored_id, topics, topics_request
from dsmq.client.stretch import Entry, Era
from dsmq.errors import AuthRequired, ConnectionLost, DSMQError, MessageNotText, ReplyError, ShuttingDown, TimedOut
from dsmq.system import boot_time, process
from dsmq.wire.resp import Reply, encode_bulk, encode_option, encode_read, encode_request

if TYPE_CHECKING:
    from dsmq.client.session import Session

T = TypeVar("T")
Convert: TypeAlias = Callable[[TopicReader, Entry], T]
"""Makes of a message what the user gets."""

FORKED = "this process is a child of the one that made the connection"
NOT_RUN = (ShuttingDown, TimedOut, AuthRequired)
"""Errors after which the server hangs up, having run no request that it has not answered."""

# The longest wait to request at once. A longer one is requested in parts, so that both sides soon notice when the other
# has vanished.
MAX_WAIT_SECONDS = 15.0
# How much `put_many` sends before it reads replies: little enough that both directions fit into the kernel's buffers,
# and twice as many puts are no more than a server remembers of one producer.
PUTS_AT_ONCE = 500
BYTES_AT_ONCE = 262_144
# The bytes of a put besides topic and message.
_PUT_BYTES = 80
# A batch that takes longer to make is sent as far as it has been made.
_LONG_BATCH_SECONDS = 0.1
# How long a put is sent again: well within the 600 seconds for which the server remembers it.
RESEND_SECONDS = 300.0
# If a read waited longer than this before its connection broke, a server was there.
_LONG_WAIT_SECONDS = 1.0

_LATEST = encode_bulk(b"LATEST")


class Producer:
    """A source of numbered puts, by which the server recognises those that are sent again; one for each connection."""

    __slots__ = ("_name", "_process", "_seq", "era", "run")

    def __init__(self, run: bytes, era: Era | None = None) -> None:
        self.run, self.era = run, era
        """The run of the server that it is for: see PROTOCOL.md."""
        # Not from the module `secrets`, which takes longer to import than the rest of this package.
        self._name = binascii.b2a_base64(os.urandom(9), newline=False)
        self._seq = 0
        self._process = process()

    def check_process(self) -> None:
        """Raise ConnectionResetError in a child process: connection and numbers are the parent's."""
        if process() is not self._process:
            raise ConnectionResetError(FORKED)

    def put(self, name: bytes, body: bytes) -> bytes:
        """Return the request that puts a message under the next number, without its argument count."""
        self._seq += 1
        seq = b"%d" % self._seq
        parts = len(name), name, len(body), body, self._name, len(seq), seq
        return b"\r\n$3\r\nPUT\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$3\r\nKEY\r\n$12\r\n%b\r\n$%d\r\n%b\r\n" % parts


class Call:
    """A request that is the same each time and changes nothing, so that it can be made again."""

    __slots__ = ("_request", "reply", "seconds", "ticket")

    def __init__(self, request: bytes = b"") -> None:
        self._request = request
        self.seconds = 0.0
        """How long the server may wait before it replies."""
        self.reply: Reply = None
        """To be set by whoever makes the calls of a `Reading`."""
        self.ticket = 0
        """Its place among the calls of an asyncio client."""

    @property
    def waits(self) -> bool:
        """Whether the server may be asked to wait."""
        return False

    def request(self, _: Producer) -> bytes:
        """Return the request for a connection, the first or another. Raises if it must not be sent there."""
        return self._request

    def on_connection_lost(self, _: Exception) -> bool:
        """Note that a connection broke after the call got it; return whether there was progress on it.

        Raises ConnectionLost if the call must not be made again.
        """
        return False

    def to_error(self, error: Exception) -> ConnectionLost:
        """Return what to raise if there are to be no more attempts."""
        return ConnectionLost(reason(error))


class NonIdempotent(Call):
    """A request that is sent again only if it has certainly not been run."""

    __slots__ = ("_is_sent",)

    def __init__(self, request: bytes) -> None:
        super().__init__(request)
        self._is_sent = False

    def request(self, _: Producer) -> bytes:
        self._is_sent = True
        return self._request

    def on_connection_lost(self, error: Exception) -> bool:
        if self._is_sent and not isinstance(error, NOT_RUN):
            raise self.to_error(error) from error
        self._is_sent = False
        return False


class Read(Call):
    """A READ from a client's position, until a time on the monotonic clock."""

    __slots__ = ("_asked_at", "_latest", "_reader", "_session", "_until", "asked")

    def __init__(self, session: Session, reader: TopicReader, until: float = 0.0, *, latest: bool = False) -> None:
        self._session, self._reader, self._until, self._latest = session, reader, until, latest
        self.seconds = 0.0
        self.ticket = 0
        self._asked_at: float
        self.asked: Asked
        """The state in which it was asked last."""

    @property
    def waits(self) -> bool:
        return time.monotonic() < self._until

    def request(self, producer: Producer) -> bytes:
        self.seconds = 0.0
        reader, size = self._reader, self._session.read_bytes
        self.asked = reader.asked_for_latest() if self._latest else reader.asked()
        stretch, after, may_wait = self.asked
        if producer.era and producer.era is not stretch.era:
            raise ConnectionResetError("another connection has found that the server was restarted")
        if self._latest:
            return encode_read(reader.topic, after, _LATEST, 1)
        options, count = b"", 0
        if reader.count:
            options, count = encode_option(b"COUNT", reader.count), 2
        if size < MAX_READ_BYTES:
            options, count = options + encode_option(b"BYTES", size), count + 2
        if self._until and may_wait:
            # The time that is left: it may have been interrupted.
            self._asked_at = time.monotonic()
            left = self._until - self._asked_at
            self.seconds = min(left, MAX_WAIT_SECONDS) if left > 0 else 0.0
            if milliseconds := round(self.seconds * 1000):
                options, count = options + encode_option(b"WAIT", milliseconds), count + 2
        return encode_read(reader.topic, after, options, count)

    def on_connection_lost(self, error: Exception) -> bool:
        if isinstance(error, TimeoutError):
            # The link may be slow.
            self._session.read_bytes = max(MIN_READ_BYTES, self._session.read_bytes // 4)
            return False
        # Something may cut connections that are idle for a while; what only accepts connections is not a server.
        return bool(self.seconds) and time.monotonic() - self._asked_at > _LONG_WAIT_SECONDS

    def take_in(self, found: list[Entry]) -> bool:
        """Take in the messages of the reply; return whether there may be more now."""
        reader, session = self._reader, self._session
        if found:
            reader = session.keep(reader)
            if session.read_bytes < MAX_READ_BYTES:
                session.read_bytes = min(MAX_READ_BYTES, session.read_bytes + MIN_READ_BYTES)
        return reader.accept(self.asked, found)


Reading: TypeAlias = "Iterator[Call]"
"""Calls to be made one after another; the reply to each is to be set before the next is taken."""
_NO_CALLS: Reading = iter(())


def take(  # noqa: PLR0913, PLR0917 - what a read consists of
    session: Session, claim: Claim, topic: str, n: int, seconds: float, convert: Convert[T], *, latest: bool
) -> tuple[list[T], Reading]:
    """Take up to `n` messages of a topic, noted in `claim`; return the list, and the calls that add to it."""
    taken: list[T]
    if latest and n:
        taken = []
        return taken, _take_latest(session, claim, taken, topic, convert)
    taken = session.reader(topic).take(claim, n, convert) if n else []
    if len(taken) == n:
        # All was read ahead.
        return taken, _NO_CALLS
    return taken, _take(session, claim, taken, topic, n, seconds, convert)


def _take(  # noqa: PLR0913, PLR0917 - what a read consists of
    session: Session,
    claim: Claim,
    taken: list[T],
    topic: str,
    n: int,
    seconds: float,
    convert: Convert[T],
) -> Reading:
    """Add to the messages taken up to `n`; if there is none, wait for the first."""
    reader = session.reader(topic)
    until = time.monotonic() + seconds if seconds else 0.0
    more = n > 0
    while (more and len(taken) < n) or (until and not taken and n > 0 and time.monotonic() < until):
        yield (read := Read(session, reader, 0.0 if taken else until))
        # Now, because this READ may have been the first call to find that the server was restarted.
        if session.is_restarted and (doubt := reader.doubt):
            yield (stats := Call(encode_request(b"STATS", reader.topic.encode(), b"AFTER", b"%d" % doubt[1])))
            reader.renumber(doubt, restored_number(stats.reply))
        more = read.take_in(session.entries(read.reply))
        reader = session.reader(topic)
        if more:
            try:
                taken += reader.take(claim, n - len(taken), convert)
            except MessageNotText:
                if not taken:
                    raise
                return


def _take_latest(session: Session, claim: Claim, taken: list[T], topic: str, convert: Convert[T]) -> Reading:
    """Take the newest message, and skip the older ones."""
    found: list[T] | None = None
    while found is None:
        reader = session.reader(topic)
        yield (read := Read(session, reader, latest=True))
        entries = session.entries(read.reply)
        if entries:
            reader = session.keep(reader)
        elif read.asked[0].rest is None:
            return
        found = reader.take_latest(claim, read.asked, entries, convert)
    taken += found


def list_topics(found: list[tuple[str, int, int]]) -> Reading:
    """Add the topics that hold messages to a list."""
    page = None
    while page is None or page:
        yield (call := Call(topics_request(found)))
        page = topics(call.reply)
        found += page


class Put(Call):
    """A put, which is sent again under its key, so that it is stored once."""

    __slots__ = ("_is_sent", "_keyed", "_parts", "_run", "_sent_at", "_unsure")

    def __init__(self, session: Session, topic: str, message: str | bytes) -> None:
        """Raises TypeError, ValueError or TooBig if it can't be put."""
        self._parts = session.put(topic, message)
        self._keyed = self._run = b""
        self._sent_at = 0.0
        # Whether it may be stored: it was sent, and no reply says that it was not.
        self._unsure = False
        self._is_sent = False
        self.seconds = 0.0

    def request(self, producer: Producer) -> bytes:
        self._is_sent = True
        if self._unsure:
            return _again(self._keyed, self._sent_at, self._run, producer)
        self._keyed = producer.put(*self._parts)
        self._run = producer.run
        self._sent_at = boot_time()
        return b"*6" + self._keyed

    def on_connection_lost(self, error: Exception) -> bool:
        self._unsure = self._unsure or (self._is_sent and not isinstance(error, NOT_RUN))
        self._is_sent = False
        return False

    def to_error(self, error: Exception) -> ConnectionLost:
        return ConnectionLost(reason(error), may_be_stored=self._unsure)


class PutMany(Call):
    """Several puts, in order. On the next connection, those without a reply are sent again before the others."""

    def __init__(self, session: Session, topic: str, messages: Iterable[str | bytes]) -> None:
        """Raises TypeError or ValueError if it can't be a topic, or these can't be messages."""
        super().__init__()
        messages = arguments.messages(messages)
        arguments.topic_name(topic)
        self._parts = (session.put(topic, message) for message in messages)
        self.is_sent = True
        """Whether the last batch has been sent. An asyncio client makes it before there is room to send it."""
        self._error: Exception | None = None
        # Whether the server sent it, and how many had been stored before.
        self._is_refused, self._stored_before = False, 0
        self._run = b""
        # Puts that were sent, in that order, each with the time when it was first sent; and what is to be sent next.
        self._unanswered: deque[tuple[bytes, float]] = deque()
        self._made: list[tuple[bytes, bytes]] = []
        # How many of them, the first ones, may be stored.
        self._unsure = 0
        # How many had a reply when a connection last broke.
        self._answered = 0
        self.ids: list[int] = []
        """The ids of those that are stored."""

    def batches(self, producer: Producer) -> Iterator[tuple[int, bytes]]:
        """Iterate over what to send at once on a connection: how many requests, and the requests.

        If messages took long to make, there is a count of 0 first: read all replies, and check that the connection is
        still open.
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
            # The process may have forked while the messages were made.
            producer.check_process()
            batch = [producer.put(name, body) for name, body in self._made]
            self._made = []
            self._unanswered.extend([(keyed, now) for keyed in batch])
            yield len(batch), b"*6" + b"*6".join(batch)

    def _make(self) -> float:
        """Take the next messages from the iterator; return how many seconds that took."""
        size, began = 0, time.monotonic()
        now = began
        try:
            for parts in self._parts:
                now = time.monotonic()
                self._made.append(parts)
                size += len(parts[0]) + len(parts[1]) + _PUT_BYTES
                if len(self._made) == PUTS_AT_ONCE or size >= BYTES_AT_ONCE or now - began > _LONG_BATCH_SECONDS:
                    break
        except Exception as error:  # noqa: BLE001 - `raise_if_failed` raises it
            self._error = error
        return now - began

    def take_reply(self, reply: Reply) -> None:
        """Take the next reply. After an error nothing more is sent, and `raise_if_failed` raises it.

        The replies to what was sent already are still taken, to know what has been stored.
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

    def on_connection_lost(self, error: Exception) -> bool:
        if self.is_sent and not isinstance(error, NOT_RUN):
            self._unsure = len(self._unanswered)
        before, self._answered = self._answered, len(self.ids)
        return self._answered > before

    def to_error(self, error: Exception) -> ConnectionLost:
        return ConnectionLost(reason(error), may_be_stored=self._unsure > 0)

    def raise_if_failed(self) -> None:
        """Raise the error at which the messages ended, if it was one: those before it are stored."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Set the numbers of stored messages in an error."""
        if isinstance(error, DSMQError):
            error.stored_before = self._stored_before if self._is_refused else len(self.ids)
            error.stored_behind = len(self.ids) - error.stored_before


def _again(keyed: bytes, sent_at: float, run: bytes, producer: Producer) -> bytes:
    """Return the request that sends a put again. Raises ConnectionLost if the server may have forgotten it."""
    about = ""
    if producer.run != run:
        about = "the server was restarted, and does not know what it had stored last"
    elif boot_time() - sent_at > RESEND_SECONDS:
        about = f"no reply for {RESEND_SECONDS:g} s, and the server may have forgotten whether it is stored"
    if about:
        raise ConnectionLost(about, may_be_stored=True)
    return b"*7%b$5\r\nAGAIN\r\n" % keyed
