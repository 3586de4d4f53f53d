"""What a client knows, without any input or output: its positions, the messages read ahead, and how to ask for more.

The blocking client and the asyncio client share it.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

from dsmq.client.reader import Entry, Era, Inbox, Returned, take_back
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
)
from dsmq.system import LONG_MESSAGE_BYTES, boot_time, expect_long_messages
from dsmq.wire.resp import MAX_INTEGER, Reply, encode_request

SHUTDOWN = encode_request(b"SHUTDOWN")
PING = encode_request(b"PING")

_logger = logging.getLogger(__name__)

State: TypeAlias = Literal["lost", "resumed", "restarted", "replaced", "given up"]
"""What can happen to a client's connection to its server.

`lost`: it broke. Then one of the others follows: `resumed`, no message is lost; `restarted`, the server was started
anew, and what was put last may be lost (it is not counted as missed); `replaced`, it has none of the messages it had,
and what it has now is read from the oldest on; `given up`, the call that noticed raises an error. Calls may find a
connection also after that. `replaced` alone follows a `seek` to a position of another epoch.
"""
LOST: dict[State, str] = {
    "replaced": "the messages it held are lost",
    "restarted": "messages that were put last may be lost",
}

# What the server sends in reply to one READ, unless it is asked for less.
MAX_READ_BYTES = 262_144
MIN_READ_BYTES = 4096
_MAX_NEW_INBOXES, _MAX_RECENT_INBOXES = 1000, 100
# Inboxes are kept for longer than messages are: the server deletes those a little later.
_SILENCE_FACTOR, _SILENCE_SECONDS = 1.25, 1.0
# Of what READ says of a message: id, number, age, body, and how long it has left.
_MESSAGE_TYPES = [int, int, int, bytes, int]


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


class _Kept:
    """The inboxes of topics of which messages have come: those used since `since`, and those used last before it.

    It is superseded as a whole: see `dsmq.client.reader`.
    """

    __slots__ = ("missed", "next", "older", "since", "young")

    def __init__(self, since: float, older: dict[str, Inbox], missed: int) -> None:
        self.young: dict[str, Inbox] = {}
        self.older, self.since = older, since
        self.missed = missed
        """What those have missed that are not kept any more."""
        self.next: dict[int, _Kept] = {}


class Session:
    """The client's side of what HELLO has agreed on."""

    def __init__(self, token: str = "") -> None:
        auth = (b"AUTH", b"default", token.encode()) if token else ()
        self.hello = encode_request(b"HELLO", b"2", *auth, b"NOTICES")
        self.max_message_bytes = 0
        self.read_bytes = MAX_READ_BYTES
        """How much to ask for at once: less after a reply that did not come in time."""
        self.is_restarted = False
        """Whether the server has been another run at some time, so that inboxes may be unsure of their numbers."""
        self.returned: Returned = []
        self._era = Era("", b"", 0, None)
        self._kept = _Kept(boot_time(), {}, 0)
        # Those used last, which may hold messages that have been handed out.
        self._recent: deque[Inbox] = deque()
        # Those of which no message has come: to forget them is no loss.
        self._new: dict[str, Inbox] = {}

    @property
    def era(self) -> Era:
        """The latest of the server's epochs and runs that this client knows."""
        while self._era.next:
            self._era = self._era.next[0]
        return self._era

    @property
    def epoch(self) -> str:
        return self.era.epoch

    @property
    def run(self) -> bytes:
        """Which run of the server it is: one that remembers all puts since its start, or since the runs before."""
        return self.era.run

    def meet(self, reply: Reply) -> tuple[State, Era]:
        """Take the reply to HELLO, of the first connection or a later one; return what it means, and for which era.

        A new epoch means that the server has lost its messages: all it has now is newer than this client, and is
        read from the start. A new run means that it may have lost those that were put last.
        """
        if isinstance(reply, ReplyError) and (type(reply) is ReplyError or "HELLO" in str(reply)):
            raise ProtocolError(f"that is no dsmq server, but Redis or one like it; it says: {reply}")
        facts = _facts(reply)
        if facts.get("server", b"dsmq") != b"dsmq":
            raise ProtocolError(f"that is no dsmq server, but {facts['server']!r}")
        if facts.get("access") == b"nobody":
            raise AuthRequired("this server wants a token: connect(..., token=...)")
        epoch, run = _as_text(facts.get("epoch")), _as_text(facts.get("run")).encode()
        last_id, lost = _as_number(facts.get("last_id")), _as_ranges(facts.get("lost_ids", []))
        self.max_message_bytes = _as_number(facts.get("max_message_bytes"))
        state: State = "resumed"
        while (era := self.era).epoch != epoch or era.run != run:
            if not era.epoch:
                # No number is known to stand at the last id.
                self._era = Era(epoch, run, last_id, None)
                return state, self._era
            same = era.epoch == epoch
            self.is_restarted = True
            new = Era(epoch, run, era.start, era.number, lost) if same else Era(epoch, run, 0, 0)
            if era.next.setdefault(0, new) is new:
                state = "restarted" if same else "replaced"
                _logger.warning("the server has been started anew: %s", LOST[state])
        return state, era

    def inbox(self, topic: str) -> Inbox:
        """Return the inbox of a topic, old or new. Raises TypeError or ValueError if it can't be a topic."""
        if self.returned:
            take_back(self.returned)
        inbox = self._kept.young.get(topic) if isinstance(topic, str) else None
        return self._inbox(topic) if inbox is None else inbox

    def _inbox(self, topic: str) -> Inbox:
        kept = self._kept
        inbox = kept.older.get(topic) if isinstance(topic, str) else None
        if inbox is not None:
            return kept.young.setdefault(topic, inbox)
        topic_name(topic)
        if (inbox := self._new.get(topic)) is not None:
            return inbox
        if len(self._new) > _MAX_NEW_INBOXES:
            self._new = {}
        return self._new.setdefault(topic, Inbox(topic, self.era))

    def keep(self, inbox: Inbox) -> Inbox:
        """Return the inbox to go on with, after something has come for one of which nothing had come before."""
        inbox = self._kept.young.setdefault(inbox.topic, inbox)
        self._new.pop(inbox.topic, None)
        if not self._recent or self._recent[-1] is not inbox:
            self._recent.append(inbox)
            if len(self._recent) > _MAX_RECENT_INBOXES:
                self._recent.popleft().shrink()
        return inbox

    def forget(self, topic: str) -> None:
        """Forget where a topic was read."""
        topic_name(topic)
        take_back(self.returned)
        kept = self._kept
        found = (inboxes.pop(topic, None) for inboxes in (kept.young, kept.older, self._new))
        for inbox in {id(inbox): inbox for inbox in found if inbox}.values():
            kept.missed += inbox.missed

    def _forget_silent(self, max_age: float) -> None:
        """Forget inboxes in which nothing has come for longer than messages are kept, by the rule now in force.

        All that was read there has expired: to read such a topic from the start finds what was put since.
        """
        kept, now = self._kept, boot_time()
        if now - kept.since > _SILENCE_FACTOR * max_age + _SILENCE_SECONDS:
            missed = sum(inbox.missed for topic, inbox in kept.older.items() if topic not in kept.young)
            new = _Kept(now, kept.young, kept.missed + missed)
            if kept.next.setdefault(0, new) is new:
                self._kept = new

    def position(self, topic: str) -> str:
        """Return where a topic has been read to: the epoch, and the id of the last message handed out."""
        epoch, after = self.inbox(topic).position
        return f"{epoch}:{after}"

    def seek(self, topic: str, position: str | int) -> bool:
        """Read a topic on from a position, or behind an id; return False if the position is of another epoch.

        Then it is read from the oldest message. Raises TypeError or ValueError if it is neither.
        """
        epoch, after = parse_position(position)
        known = self.keep(self.inbox(topic)).seek(after, epoch)
        if not known:
            _logger.warning("topic %r: the position is of another epoch, and the messages it is for are lost", topic)
        return known

    @property
    def missed(self) -> int:
        """How many messages expired before this client came to them, in each topic from the first one that it got."""
        take_back(self.returned)
        kept = self._kept
        inboxes = {**kept.older, **kept.young}
        return kept.missed + sum(inbox.missed for inbox in inboxes.values())

    def put(self, topic: str, message: str | bytes) -> tuple[bytes, bytes]:
        """Return what a put consists of, topic and body, as bytes. Raises TypeError or ValueError."""
        name = topic_name(topic)
        if isinstance(message, str):
            body = message.encode()
        elif isinstance(message, bytes | bytearray | memoryview):
            body = bytes(message)
        else:
            raise TypeError(f"a message is a str or bytes, not {type(message).__name__}")
        if len(body) > LONG_MESSAGE_BYTES:
            expect_long_messages()
        return name, body

    def entries(self, reply: Reply) -> list[Entry]:
        """Return the messages in the reply to READ. Raises the error that it is, or ProtocolError."""
        if reply == []:
            return []
        if isinstance(reply, ReplyError):
            raise reply
        if not isinstance(reply, list) or list(map(type, reply)) != _MESSAGE_TYPES * (len(reply) // 5):
            raise ProtocolError("the reply to READ does not hold messages")
        now = boot_time()
        values: Iterator[Any] = iter(reply)
        entries = [
            Entry(message_id, number, now + left / 1000, body, now - age / 1000)
            for message_id, number, age, body, left in zip(values, values, values, values, values, strict=True)
        ]
        self._forget_silent(entries[-1].expires - entries[-1].put_at)
        return entries

    def message(self, inbox: Inbox, entry: Entry) -> Message:
        """Return a message as the user sees it."""
        age = boot_time() - entry.put_at
        return Message(inbox.topic, entry.id, entry.number, time.time() - age, entry.body)


def topic_name(topic: str) -> bytes:
    """Return a topic as it is sent. Raises TypeError or ValueError."""
    if not isinstance(topic, str):
        raise TypeError(f"a topic is a str, not {type(topic).__name__}")
    if not topic:
        raise ValueError("the name of the topic is empty")
    return topic.encode()


def parse_position(position: str | int) -> tuple[str, int]:
    """Return the epoch, empty if there is none, and the id of a position. Raises TypeError or ValueError."""
    if isinstance(position, int) and not isinstance(position, bool):
        epoch, after = "", position
    elif isinstance(position, str):
        epoch, _, digits = position.rpartition(":")
        if not epoch or not re.fullmatch("[0-9]{1,19}", digits):
            raise ValueError(f"{position[:100]!r} is not a position: see position()")
        after = int(digits)
    else:
        raise TypeError(f"a position is what position() returns, or an id, not {type(position).__name__}")
    if not 0 <= after <= MAX_INTEGER:
        raise ValueError(f"an id is 0 to {MAX_INTEGER}, not {after}")
    return epoch, after


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


def stats_request(topic: str, after: int) -> bytes:
    return encode_request(b"STATS", topic.encode(), b"AFTER", b"%d" % after)


def restored_number(reply: Reply) -> int:
    """Return the topic's last number in the snapshot before that id was lost, out of the reply to STATS."""
    return _as_number(_facts(reply).get("restored_number", 0))


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
    """Return the map in a reply. Raises the error that it is, or ProtocolError."""
    values = check(reply)
    if not isinstance(values, list) or len(values) % 2:
        raise ProtocolError("a reply is not a map; is that a dsmq server?")
    return {_as_text(name): value for name, value in zip(values[::2], values[1::2], strict=True)}


def _as_text(value: Reply) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else _is_no("text", value)
    except UnicodeDecodeError:
        return _is_no("text", value)


def _as_number(value: Reply) -> int:
    return value if isinstance(value, int) else _is_no("number", value)


def _as_ranges(value: Reply) -> list[tuple[int, int]]:
    ends = list(map(_as_number, value if isinstance(value, list) else _is_no("list", value)))
    return list(zip(ends[::2], ends[1::2], strict=False))


def _is_no(what: str, value: Reply) -> NoReturn:
    raise ProtocolError(f"no {what} in a reply, but {value!r}; is that a dsmq server?")
