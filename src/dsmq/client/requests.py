"""Calls, which can be repeated on another connection when one breaks. Used by both clients; does no I/O."""

from __future__ import annotations

import binascii
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar

from dsmq.client import arguments
from dsmq.client.reader import MIN_READ_BYTES, Asked, Claim, TopicReader
from dsmq.client.replies import reason, restored_number, stored_id, topics
from dsmq.client.stretch import Entry, Era
from dsmq.errors import AuthRequired, ConnectionLost, DSMQError, MessageNotText, ReplyError, ShuttingDown, TimedOut
from dsmq.system import boot_time, process
from dsmq.wire.limits import MAX_COUNT, MAX_READ_BYTES
from dsmq.wire.resp import Reply, encode_bulk, encode_option, encode_read, encode_read_many, encode_request

if TYPE_CHECKING:
    from dsmq.client.session import Session

T = TypeVar("T")
Convert: TypeAlias = Callable[[TopicReader, Entry], T]
"""Converts a message to the caller's type."""

FORKED = "this process is a child of the one that opened the connection"
NOT_RUN = (ShuttingDown, TimedOut, AuthRequired)
"""Errors after which the server closes the connection without having run the unanswered requests."""

# A longer wait is split into several requests, so that both sides soon notice if the other has vanished.
MAX_WAIT_SECONDS = 15.0
# Max size of a batch of `put_many`. Its requests and replies fit into the kernel's buffers, and a server remembers the
# puts of a producer's last two batches.
PUTS_AT_ONCE = 500
BYTES_AT_ONCE = 262_144
# The size of a put in addition to its topic and message.
_PUT_BYTES = 80
_AGAIN = b"*7%b$5\r\nAGAIN\r\n"
# If its messages take longer than this to arrive, a batch is sent incomplete.
_LONG_BATCH_SECONDS = 0.1
# How long a put is retried: well within the 600 seconds for which the server remembers it.
RESEND_SECONDS = 300.0
# A read that waited longer than this before its connection broke had reached a server.
_LONG_WAIT_SECONDS = 1.0

# The server counts back from when it receives the request. Request more, so that nothing put after a `seek` is skipped.
_SINCE_MARGIN_SECONDS = 1.0

_LATEST = encode_bulk(b"LATEST")
# When reading several topics, request as many messages as the server returns at once.
_ALL_LATEST = _LATEST + encode_option(b"COUNT", MAX_COUNT)


class Producer:
    """Numbers the puts of one connection, so that a server recognises those that are sent again."""

    __slots__ = ("_name", "_seq", "era", "process", "run")

    def __init__(self, run: bytes, era: Era | None = None) -> None:
        self.run, self.era = run, era
        # Importing `secrets` would take longer than importing the rest of this package.
        self._name = binascii.b2a_base64(os.urandom(9), newline=False)
        self._seq = 0
        self.process = process()

    def put(self, name: bytes, body: bytes) -> bytes:
        """Return a PUT with the next number."""
        self._seq += 1
        seq = b"%d" % self._seq
        parts = len(name), name, len(body), body, self._name, len(seq), seq
        return b"*6\r\n$3\r\nPUT\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$3\r\nKEY\r\n$12\r\n%b\r\n$%d\r\n%b\r\n" % parts


class Retryable:
    """Something that may be sent again on another connection when the current one breaks."""

    __slots__ = ()

    def on_connection_lost(self, _: Exception) -> bool:
        """Record that the connection broke after this was sent; return whether there had been progress.

        Raises ConnectionLost if it must not be sent again.
        """
        return False

    def to_error(self, error: Exception) -> ConnectionLost:
        """Return the error to raise after the last attempt."""
        return ConnectionLost(reason(error))


class Call(Retryable):
    """A request that is the same each time and changes nothing."""

    __slots__ = ("_request", "reply", "seconds")

    def __init__(self, request: bytes = b"") -> None:
        self._request = request
        self.seconds = 0.0
        """The time, in seconds, that the server may wait before it replies."""
        self.reply: Reply

    @property
    def replies(self) -> int:
        """The number of its replies, at least 1."""
        return 1

    @property
    def waits(self) -> bool:
        """Whether the request may make the server wait."""
        return False

    def request(self, _: Producer) -> bytes:
        """Return the request for a producer's connection. Raises if it must not be sent there."""
        return self._request

    def take_reply(self, reply: Reply) -> None:
        self.reply = reply


class NonIdempotent(Call):
    """A request that is sent again only if it is certain that it has not run."""

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
    """A READ from a client's position, which waits until a time on the monotonic clock."""

    __slots__ = ("_asked_at", "_is_selection", "_latest", "_reader", "_session", "_until", "asked")

    def __init__(self, session: Session, reader: TopicReader, until: float = 0.0, *, latest: bool = False) -> None:
        self._session, self._reader, self._until, self._latest = session, reader, until, latest
        self.seconds = 0.0
        self._asked_at: float
        self.asked: Asked
        """The last request."""

    @property
    def waits(self) -> bool:
        return time.monotonic() < self._until

    def request(self, producer: Producer) -> bytes:
        reader, size = self._reader, self._session.read_bytes
        self.asked = reader.asked_for_latest() if self._latest else reader.asked()
        stretch, after, may_wait = self.asked
        if producer.era and producer.era is not stretch.era:
            raise ConnectionResetError("another connection has found that the server was restarted")
        if self._latest:
            return self._encode(after, _ALL_LATEST, 3) if reader.names else self._encode(after, _LATEST, 1)
        options, count = b"", 0
        if reader.count:
            options, count = encode_option(b"COUNT", reader.count), 2
        if size < MAX_READ_BYTES:
            options, count = options + encode_option(b"BYTES", size), count + 2
        self.seconds = 0.0
        if self._until and may_wait:
            self._asked_at = time.monotonic()
            left = self._until - self._asked_at
            self.seconds = min(left, MAX_WAIT_SECONDS) if left > 0 else 0.0
            if milliseconds := round(self.seconds * 1000):
                options, count = options + encode_option(b"WAIT", milliseconds), count + 2
        return self._encode(after, options, count)

    def _encode(self, after: int, options: bytes, words: int) -> bytes:
        reader, back = self._reader, self.asked[0].back
        self._is_selection = back is not None or bool(reader.names)
        if not self._is_selection:
            return encode_read(reader.topic, after, options, words)
        start = [b"%d" % after]
        if back is not None and back[0] != b"AFTER" and not self._latest:
            seconds = boot_time() - back[1] + _SINCE_MARGIN_SECONDS
            start = [back[0], b"%d" % (back[1] if back[0] == b"LAST" else seconds * 1000)]
        return encode_read_many(reader.names or [encode_bulk(reader.topic.encode())], start, options, words)

    def found(self) -> tuple[list[Entry], int]:
        """Return the messages in the reply, and the id up to which there are no others, or 0 if unknown."""
        if not self._is_selection:
            return self._session.entries(self.reply), 0
        found, scanned = self._session.selected(self.reply)
        if not self._reader.names:
            found = [entry._replace(number=entry.topic_number, topic="") for entry in found]
        return found, scanned

    def on_connection_lost(self, error: Exception) -> bool:
        if isinstance(error, TimeoutError):
            # The link may be slow.
            self._session.read_bytes = max(MIN_READ_BYTES, self._session.read_bytes // 4)
            return False
        # Something on the network may cut idle connections. One that is closed sooner may not have reached a server.
        return bool(self.seconds) and time.monotonic() - self._asked_at > _LONG_WAIT_SECONDS


ALL = object()
"""Passed as the default: return the list of messages, not the first one."""


def read(  # noqa: PLR0913, PLR0917 - what a read consists of
    session: Session,
    reader: TopicReader,
    claim: Claim,
    taken: list[T],
    n: int,
    seconds: float,
    convert: Convert[T],
    latest: bool,  # noqa: FBT001 - as `n`
) -> Iterator[Call]:
    """Yield calls that append up to `n` messages, or the latest, to those taken; if there are none, wait for one.

    Each call must be made before the next one is taken from the iterator.
    """
    if latest:
        yield from _read_latest(session, reader, claim, taken, convert)
        return
    until = time.monotonic() + seconds if seconds else 0.0
    more = True
    while (more and len(taken) < n) or (until and not taken and time.monotonic() < until):
        yield (call := Read(session, reader, 0.0 if taken else until))
        # Check here, because this READ may have been the first call to find that the server was restarted.
        while session.is_restarted and (doubt := reader.doubt):
            topic = doubt[1] or reader.topic
            yield (stats := Call(encode_request(b"STATS", topic.encode(), b"AFTER", b"%d" % doubt[2])))
            reader.renumber(doubt, restored_number(stats.reply))
        found, scanned = call.found()
        if found:
            reader = session.keep(reader)
        more = reader.accept(call.asked, found, scanned)
        if more:
            try:
                taken += reader.take(claim, n - len(taken), convert)
            except MessageNotText:
                if not taken:
                    raise
                return


def _read_latest(
    session: Session, reader: TopicReader, claim: Claim, taken: list[T], convert: Convert[T]
) -> Iterator[Call]:
    latest: list[T] | None = None
    while latest is None:
        yield (call := Read(session, reader, latest=True))
        found, _ = call.found()
        if found:
            reader = session.keep(reader)
        elif call.asked[0].rest is None:
            return
        latest = reader.take_latest(claim, call.asked, found, convert)
    taken += latest


def list_topics(found: list[tuple[str, int, int]]) -> Iterator[Call]:
    """Yield calls that append the topics with messages to a list. Each must be made before the next is taken."""
    page = None
    while page is None or page:
        after = (b"AFTER", found[-1][0].encode()) if found else ()
        yield (call := Call(encode_request(b"TOPICS", *after)))
        page = topics(call.reply)
        found += page


def stats(topic: str | None) -> Call:
    """Return the call that describes a topic or the server."""
    if topic is None:
        return Call(encode_request(b"INFO", b"server", b"clients", b"stats", b"store", b"groups", b"engine"))
    return Call(encode_request(b"STATS", arguments.topic_name(topic)))


def purge(topic: str) -> Call:
    """Return the call that purges a topic or the topics that match a pattern."""
    return NonIdempotent(encode_request(b"PURGE", arguments.topic_or_pattern(topic)))


class Put(Call):
    """A put, which is repeated with the same key, so that it is stored once."""

    __slots__ = ("_body", "_is_sent", "_run", "_sent_at", "_topic", "is_unsure")

    def __init__(self, topic: bytes, body: bytes) -> None:
        self._topic, self._body = topic, body
        # Without AGAIN.
        self._request = b""
        self._is_sent = False
        self.is_unsure = False
        """Whether the message may be stored: it was sent, and no reply has reported the outcome."""
        self.seconds = 0.0

    def request(self, producer: Producer) -> bytes:
        self._is_sent = True
        if self.is_unsure:
            self._raise_if_forgotten(producer)
            return _AGAIN % self._request[2:]
        self._run, self._sent_at = producer.run, boot_time()
        self._request = producer.put(self._topic, self._body)
        return self._request

    def _raise_if_forgotten(self, producer: Producer) -> None:
        """Raise ConnectionLost if the server may have forgotten what it stored."""
        about = ""
        if producer.run != self._run:
            about = "the server was restarted, and may have lost the last messages it stored"
        elif boot_time() - self._sent_at > RESEND_SECONDS:
            about = f"no reply for {RESEND_SECONDS:g} s, and the server may have forgotten whether it is stored"
        if about:
            raise ConnectionLost(about, may_be_stored=True)

    def on_connection_lost(self, error: Exception) -> bool:
        self.is_unsure = self.is_unsure or (self._is_sent and not isinstance(error, NOT_RUN))
        self._is_sent = False
        return False

    def to_error(self, error: Exception) -> ConnectionLost:
        return ConnectionLost(reason(error), may_be_stored=self.is_unsure)


class Batch(Put):
    """Some of the puts of `put_many`. Puts that have been answered are not sent again."""

    __slots__ = ("_answered", "_bodies", "_many", "_requests")

    def __init__(self, many: PutMany, topic: bytes, bodies: list[bytes]) -> None:
        super().__init__(topic, b"")
        self._many, self._bodies = many, bodies
        self._requests: list[bytes] = []
        self._answered = 0

    @property
    def replies(self) -> int:
        return len(self._bodies) - self._answered

    def request(self, producer: Producer) -> bytes:
        if process() is not producer.process:
            # The process forked while the messages were being produced: the connection and numbers belong to the
            # parent.
            raise ConnectionResetError(FORKED)
        if self._many.lost is not None:
            raise self._many.lost
        self._is_sent = True
        done, self._answered = self._answered, 0
        self._bodies, self._requests = self._bodies[done:], self._requests[done:]
        if self.is_unsure:
            try:
                self._raise_if_forgotten(producer)
            except DSMQError as error:
                # If messages are lost, none after them may be stored.
                self._many.lost = error
                raise
            return b"".join([_AGAIN % request[2:] for request in self._requests])
        self._run, self._sent_at = producer.run, boot_time()
        self._requests = [producer.put(self._topic, body) for body in self._bodies]
        return b"".join(self._requests)

    def take_reply(self, reply: Reply) -> None:
        self._many.take_reply(reply)
        self._answered += 1


class PutMany(Retryable):
    """Several puts, in order."""

    def __init__(self, topic: bytes, messages: Iterable[str | bytes]) -> None:
        """Raises TypeError if `messages` is a single message."""
        self._topic = topic
        self.ids: list[int] = []
        """The ids of the messages that are stored."""
        self.lost: DSMQError | None = None
        """Why a batch can't be sent again; later batches are not sent either."""
        self.unanswered: deque[Batch] = deque()
        """The batches that are being sent on one connection."""
        self.batches = self._batches(map(arguments.message, arguments.messages(messages)))
        """New batches. None means that the next batch was slow to arrive: first read all replies, and check that the
        connection is still open.
        """
        self._error: Exception | None = None
        # The number of messages stored before the server refused one.
        self._stored_before: int | None = None
        # The number stored when a connection last broke.
        self._progress = 0

    def _batches(self, bodies: Iterator[bytes]) -> Generator[Batch | None, None, None]:
        while self._error is None:
            began = time.monotonic()
            batch = self._next_batch(bodies, began)
            if time.monotonic() - began > _LONG_BATCH_SECONDS:
                yield None
            if not batch:
                return
            yield Batch(self, self._topic, batch)

    def _next_batch(self, bodies: Iterator[bytes], began: float) -> list[bytes]:
        batch, size, put_bytes = [], 0, len(self._topic) + _PUT_BYTES
        try:
            for body in bodies:
                batch.append(body)
                size += len(body) + put_bytes
                is_late = time.monotonic() - began > _LONG_BATCH_SECONDS
                if is_late or len(batch) == PUTS_AT_ONCE or size >= BYTES_AT_ONCE:
                    break
        except Exception as error:  # noqa: BLE001 - raised once the messages before it are stored
            self._error = error
        return batch

    def take_reply(self, reply: Reply) -> None:
        """Process the next reply. After an error there are no new batches; it is raised once all replies are here."""
        try:
            self.ids.append(stored_id(reply))
        except ReplyError as error:
            if error is not reply:
                raise
            if self._stored_before is None:
                self._error, self._stored_before = error, len(self.ids)

    def on_connection_lost(self, error: Exception) -> bool:
        for batch in self.unanswered:
            batch.on_connection_lost(error)
        before, self._progress = self._progress, len(self.ids)
        return self._progress > before

    def to_error(self, error: Exception) -> ConnectionLost:
        return ConnectionLost(reason(error), may_be_stored=any(batch.is_unsure for batch in self.unanswered))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Raise a message's error, if any. Set the numbers of stored messages in any DSMQError."""
        # Close it now; otherwise, the garbage collector would do so later, in any thread.
        self.batches.close()
        raised = error or self._error
        if isinstance(raised, DSMQError):
            raised.stored_before = len(self.ids) if self._stored_before is None else self._stored_before
            raised.stored_after = len(self.ids) - raised.stored_before
        if raised is not None and raised is not error:
            raise raised
