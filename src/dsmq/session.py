"""What a client knows, without any input or output: its positions, the messages read ahead, and how to ask for more.

The blocking client and the asyncio client share it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Literal, NamedTuple, NoReturn, TypeAlias, TypeVar

from dsmq.errors import (
    AuthRequired,
    Busy,
    Closing,
    DSMQError,
    InternalError,
    MessageNotText,
    ProtocolError,
    ReplyError,
    TimedOut,
    TooBig,
)
from dsmq.protocol import Reply, encode_bulk, encode_request
from dsmq.system import LONG_MESSAGE_BYTES, expect_long_messages

SHUTDOWN = encode_request(b"SHUTDOWN")
PING = encode_request(b"PING")

_logger = logging.getLogger(__name__)

T = TypeVar("T")

State: TypeAlias = Literal["lost", "resumed", "restarted", "replaced", "given up"]
"""What can happen to a client's connection to its server.

`lost`: it broke. Then one of the others follows: `resumed`, no message is lost; `restarted`, the server was started
anew, and what was put last may be lost; `replaced`, it has none of the messages it had, and what it has now is read
from the start; `given up`, the call that noticed raises an error. Calls may find a connection also after that.
"""


class Message(NamedTuple):
    """A message with all that is known of it."""

    topic: str
    id: int
    """Increases over all topics of a server, and is never reused."""
    number: int
    """Counts the messages of the topic, from 1."""
    put_at: float
    """When it was put: seconds since 1970, on this machine's clock."""
    body: bytes

    @property
    def text(self) -> str:
        """The body as text. Raises MessageNotText where it is not UTF-8."""
        return _text(self.topic, self.body)


class Entry(NamedTuple):
    """A message read ahead; times are on this process's monotonic clock."""

    id: int
    number: int
    expires: float
    body: bytes
    put_at: float = 0.0


class _Place(NamedTuple):
    """Where the reading of a topic has got to."""

    position: int
    """The last id that has been fetched."""
    last_number: int | None
    """The number of that message, where it is known."""
    ahead: deque[Entry]
    """What has been fetched, and not been taken yet."""


class Inbox:
    """The messages of one topic: where to read on, and what has been read ahead.

    All its methods but `request` need the client's lock. A call may be interrupted anywhere, as by Ctrl-C, and must not
    leave a message twice or not at all. So the place is changed as a whole, by one assignment.
    """

    __slots__ = ("_place", "_prefix", "generation", "missed", "topic")

    def __init__(self, topic: str, name: bytes, position: int, last_number: int | None) -> None:
        self.topic = topic
        self._place = _Place(position, last_number, deque())
        self.generation = 0
        """How often it has been told to read on from elsewhere."""
        self.missed = 0
        self._prefix = b"$4\r\nREAD\r\n" + encode_bulk(name)

    @property
    def position(self) -> int:
        """The last id that has been fetched."""
        return self._place.position

    def request(self, wait_ms: int = 0, *, latest: bool = False) -> bytes:
        """Return the request for what comes behind the position."""
        position = b"%d" % self._place.position
        if latest:
            return b"*4\r\n%b$%d\r\n%b\r\n$6\r\nLATEST\r\n" % (self._prefix, len(position), position)
        if not wait_ms:
            return b"*3\r\n%b$%d\r\n%b\r\n" % (self._prefix, len(position), position)
        wait = encode_bulk(b"%d" % wait_ms)
        return b"*5\r\n%b$%d\r\n%b\r\n$4\r\nWAIT\r\n%b" % (self._prefix, len(position), position, wait)

    def accept(self, found: list[Entry], *, generation: int, latest: bool = False) -> None:
        """Take messages in. Those that another thread has fetched meanwhile are known by their ids.

        generation is what it was when they were asked for: what was asked for before a `seek` is not wanted now.
        """
        if generation != self.generation:
            return
        position, last_number, ahead = self._place
        new, missed = [], 0
        for entry in found:
            if entry.id > position:
                if not latest and last_number is not None and entry.number > last_number + 1:
                    missed += entry.number - last_number - 1
                new.append(entry)
                position, last_number = entry.id, entry.number
        # The latest passes over what was read ahead.
        self._place = _Place(position, last_number, deque(new if latest and new else (*ahead, *new)))
        if missed:
            self._miss(missed)

    def __len__(self) -> int:
        """How many messages are here, those that have become too old included."""
        return len(self._place.ahead)

    def take(self, n: int, convert: Callable[[Inbox, Entry], T], least: int = 1) -> list[T]:
        """Take up to `n` messages that are here already; where there are less than `least`, none.

        It stops short of one that can't be converted. Raises MessageNotText where that is the first.
        """
        self._pass_over()
        position, last_number, ahead = self._place
        if len(ahead) < least:
            return []
        if n == 1:
            taken = [convert(self, ahead[0])]
            ahead.popleft()
            return taken
        taken = []
        for entry in islice(ahead, n):
            try:
                taken.append(convert(self, entry))
            except MessageNotText:
                if not taken:
                    raise
                break
        self._place = _Place(position, last_number, deque(islice(ahead, len(taken), None)))
        return taken

    def _pass_over(self) -> None:
        """Drop what has become too old here."""
        ahead = self._place.ahead
        if ahead and ahead[0].expires <= (now := time.monotonic()):
            expired = 0
            while ahead and ahead[0].expires <= now:
                ahead.popleft()
                expired += 1
            self._miss(expired)

    def skip_to_latest(self) -> None:
        """Forget all that was read ahead but the newest."""
        ahead = self._place.ahead
        while len(ahead) > 1:
            ahead.popleft()

    def seek(self, position: int, last_number: int | None, *, drop: bool = False) -> None:
        """Read on behind this id; what was read ahead stays, or is dropped. Raises ValueError where it is none."""
        if position < 0:
            raise ValueError(f"an id is 0 or more, not {position}")
        self._place = _Place(position, last_number, deque() if drop else self._place.ahead)
        self.generation += 1

    def _miss(self, count: int) -> None:
        self.missed += count
        _logger.warning("topic %r: %d messages expired before they were read", self.topic, count)


class Session:
    """The client's side of what HELLO has agreed on."""

    def __init__(self, token: str = "") -> None:
        auth = (b"AUTH", b"default", token.encode()) if token else ()
        self.hello = encode_request(b"HELLO", b"2", *auth, b"NOTICES")
        self.epoch = ""
        self.run = b""
        """Which run of the server it is: one that remembers all puts since its start, or since the runs before."""
        self.max_message_bytes = 0
        self.max_topic_bytes = 0
        self._watermark = 0
        # No number is known to stand at the watermark, but in a new epoch all numbers are new.
        self._first_number: int | None = None
        self.inboxes: dict[str, Inbox] = {}
        """By topic. To add one needs the client's lock."""

    def greet(self, reply: Reply) -> State:
        """Take the reply to HELLO, of the first connection or a later one; return what it means for the client.

        A new epoch means that the server has lost its messages: all it has now is newer than this client, and is
        read from the start. A new run means that it may have lost those that were put last.
        """
        facts = _facts(reply)
        if facts.get("access") == b"nobody":
            raise AuthRequired("this server wants a token: connect(..., token=...)")
        epoch, run = _as_text(facts.get("epoch")), _as_text(facts.get("run")).encode()
        last_id = _as_number(facts.get("last_id"))
        self.max_message_bytes = _as_number(facts.get("max_message_bytes"))
        self.max_topic_bytes = _as_number(facts.get("max_topic_bytes"))
        state: State = "resumed"
        if not self.epoch:
            self._watermark = last_id
        elif epoch != self.epoch:
            _logger.warning("the server has been started anew: the messages it held are lost")
            self._watermark, self._first_number = 0, 0
            for inbox in self.inboxes.values():
                inbox.seek(0, 0)
            state = "replaced"
        elif run != self.run:
            _logger.warning("the server has been started anew: messages that were put last may be lost")
            state = "restarted"
        self.epoch, self.run = epoch, run
        return state

    def inbox(self, topic: str) -> Inbox:
        """Return the inbox of a topic, old or new. Raises TypeError, ValueError or TooBig where it is none."""
        inbox = self.inboxes.get(topic)
        if inbox is None:
            inbox = self.inboxes[topic] = Inbox(topic, self._name(topic), self._watermark, self._first_number)
        return inbox

    @property
    def missed(self) -> int:
        """How many messages expired before this client came to them, in each topic from the first one that it got."""
        return sum(inbox.missed for inbox in list(self.inboxes.values()))

    def _name(self, topic: str) -> bytes:
        if not isinstance(topic, str):
            raise TypeError(f"a topic is a str, not {type(topic).__name__}")
        name = topic.encode()
        if not name:
            raise ValueError("the topic is empty")
        if len(name) > self.max_topic_bytes:
            raise TooBig(f"a topic has at most {self.max_topic_bytes} bytes, not {len(name)}")
        return name

    def put(self, topic: str, message: str | bytes) -> tuple[bytes, bytes]:
        """Return what a put consists of, topic and body, as bytes. Raises TypeError, ValueError or TooBig."""
        name = self._name(topic)
        if isinstance(message, str):
            body = message.encode()
        elif isinstance(message, bytes | bytearray | memoryview):
            body = bytes(message)
        else:
            raise TypeError(f"a message is a str or bytes, not {type(message).__name__}")
        if len(body) > self.max_message_bytes:
            raise TooBig(f"a message has at most {self.max_message_bytes} bytes, not {len(body)}")
        if len(body) > LONG_MESSAGE_BYTES:
            expect_long_messages()
        return name, body

    def entries(self, reply: Reply) -> list[Entry]:
        """Return the messages in the reply to READ. Raises the error that it is, or ProtocolError."""
        if isinstance(reply, ReplyError):
            raise reply
        if not isinstance(reply, list) or len(reply) % 5:
            raise ProtocolError("the reply to READ is not an array of fives")
        now = time.monotonic()
        entries = []
        values = iter(reply)
        for message_id, number, age, body, left in zip(values, values, values, values, values, strict=True):
            if not (
                isinstance(message_id, int)
                and isinstance(number, int)
                and isinstance(age, int)
                and isinstance(body, bytes)
                and isinstance(left, int)
            ):
                raise ProtocolError("the reply to READ does not hold messages")
            entries.append(Entry(message_id, number, now + left / 1000, body, now - age / 1000))
        return entries

    def message(self, inbox: Inbox, entry: Entry) -> Message:
        """Return a message as the user sees it."""
        age = time.monotonic() - entry.put_at
        return Message(inbox.topic, entry.id, entry.number, time.time() - age, entry.body)


def text(inbox: Inbox, entry: Entry) -> str:
    """Return a message's text. Raises MessageNotText."""
    return _text(inbox.topic, entry.body)


def body(_: Inbox, entry: Entry) -> bytes:
    """Return a message's bytes."""
    return entry.body


def _text(topic: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise MessageNotText(f"the next message of {topic!r} is not UTF-8; read it with raw=True") from None


def converter(*, raw: bool) -> Callable[[Inbox, Entry], str | bytes]:
    """Return what makes of a message what the user gets."""
    return body if raw else text


def stored_id(reply: Reply) -> int:
    """Return the id in the reply to PUT. Raises the error that it is, or ProtocolError."""
    if isinstance(reply, int):
        return reply
    if isinstance(reply, ReplyError):
        raise reply
    raise ProtocolError(f"the reply to PUT is {reply!r}")


def unless_last(reply: Reply) -> Reply:
    """Return a reply, even an error; one behind which the server hangs up is raised."""
    if isinstance(reply, (ProtocolError, AuthRequired, Busy, Closing, TimedOut, InternalError)):
        raise reply
    return reply


def is_lost(error: BaseException, *, connecting: bool) -> bool:
    """Return whether an error means that a connection has broken, or is to be made anew."""
    if isinstance(error, DSMQError):
        # A server that has too many clients now may have room soon; one that admits by other rules now may admit this.
        return isinstance(error, Closing | TimedOut | (Busy if connecting else AuthRequired))
    return isinstance(error, OSError)


def reason(error: Exception) -> str:
    """Return what an error says, without its number; asyncio's time-outs say nothing."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no reply in time"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def is_news(state: State, down: str) -> bool:
    """Return whether a state is to be told of: each loss once, and one end of it. `down` is the last, if it was one."""
    if state == "lost":
        return not down
    if state == "given up":
        return down == "lost"
    return state != "resumed" or bool(down)


def log_state(state: State, target: object, error: Exception | None) -> None:
    """Log what has happened to a connection, where `greet` has not done so, nor the call that notices raises it."""
    if state == "lost":
        _logger.warning("connection to %s lost, trying again: %s", target, error and reason(error))
    elif state == "resumed":
        _logger.info("connection to %s resumed", target)
    elif state == "given up":
        _logger.info("no connection to %s any more: %s", target, error and reason(error))


def check(reply: Reply) -> Reply:
    """Return a reply that is no error. Raises the error that it is."""
    if isinstance(reply, ReplyError):
        raise reply
    return reply


def topics_request(found: list[tuple[str, int, int]]) -> bytes:
    """Return the request for the page of topics behind those found already."""
    return encode_request(b"TOPICS", *((b"AFTER", found[-1][0].encode()) if found else ()))


def topics(reply: Reply) -> list[tuple[str, int, int]]:
    """Return the topics in the reply to TOPICS. Raises the error that it is, or ProtocolError."""
    check(reply)
    if not isinstance(reply, list) or len(reply) % 3:
        raise ProtocolError("the reply to TOPICS is not an array of threes")
    values = iter(reply)
    return [
        (_as_text(name), _as_number(messages), _as_number(size))
        for name, messages, size in zip(values, values, values, strict=True)
    ]


def _facts(reply: Reply) -> dict[str, Reply]:
    """Return the map in the reply to HELLO. Raises the error that it is, or ProtocolError."""
    values = check(reply)
    if not isinstance(values, list) or len(values) % 2:
        raise ProtocolError("the reply to HELLO is not a map; is that a dsmq server?")
    return {_as_text(name): value for name, value in zip(values[::2], values[1::2], strict=True)}


def _as_text(value: Reply) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else _is_no("text", value)
    except UnicodeDecodeError:
        return _is_no("text", value)


def _as_number(value: Reply) -> int:
    return value if isinstance(value, int) else _is_no("number", value)


def _is_no(what: str, value: Reply) -> NoReturn:
    raise ProtocolError(f"no {what} in a reply, but {value!r}; is that a dsmq server?")
