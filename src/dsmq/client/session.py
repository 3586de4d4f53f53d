"""What a client knows: its positions, the messages read ahead, and the server's epochs and runs. Without I/O."""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

from dsmq.client.arguments import topic_name
from dsmq.client.reader import MAX_READ_BYTES, Returned, TopicReader, take_back
from dsmq.client.replies import as_map, as_number, as_ranges, as_text, check
from dsmq.client.stretch import Entry, Era
from dsmq.errors import AuthRequired, MessageNotText, ProtocolError
from dsmq.system import LONG_MESSAGE_BYTES, boot_time, raise_malloc_threshold
from dsmq.wire.limits import MAX_INTEGER
from dsmq.wire.resp import Reply, encode_request

SHUTDOWN = encode_request(b"SHUTDOWN")
PING = encode_request(b"PING")

_logger = logging.getLogger(__name__)

State: TypeAlias = Literal["lost", "resumed", "restarted", "replaced", "given up"]
"""What can happen to a client's connection to its server.

`lost`: it broke. One of the others follows: `resumed`, no message is lost; `restarted`, the server was restarted, and
messages that were put last may be lost (they do not count as missed); `replaced`, the server has lost its messages, and
those that it has now are read from the oldest on; `given up`, the call that noticed raises an error. Later calls may
connect nevertheless. `replaced` alone follows a `seek` to a position of another epoch.
"""
LOST: dict[State, str] = {
    "replaced": "the messages it held are lost",
    "restarted": "messages that were put last may be lost",
}

_MAX_NEW_READERS, _MAX_RECENT_READERS = 1000, 100
# Readers are kept for longer than messages are: the server deletes those a little later.
_SILENCE_FACTOR, _SILENCE_SECONDS = 1.25, 1.0
# What READ returns of a message: id, number, age, body, and how long it has left.
_MESSAGE_TYPES = [int, int, int, bytes, int]


class Message(NamedTuple):
    """A message with its metadata."""

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
        """The body as text. Raises MessageNotText if it is not UTF-8."""
        return _text(self.topic, self.body)


class _Kept:
    """The readers of topics that had messages: `young` ones, used since `since`, and `older` ones, last used before.

    It is superseded as a whole: see `dsmq.client.reader`.
    """

    __slots__ = ("missed", "next", "older", "since", "young")

    def __init__(self, since: float, older: dict[str, TopicReader], missed: int) -> None:
        self.young: dict[str, TopicReader] = {}
        self.older, self.since = older, since
        self.missed = missed
        """How many messages were missed by readers that are not kept any more."""
        self.next: dict[int, _Kept] = {}


class Session:
    """A client's session with its server, over many connections."""

    def __init__(self, token: str = "") -> None:
        auth = (b"AUTH", b"default", token.encode()) if token else ()
        self.hello = encode_request(b"HELLO", b"2", *auth, b"NOTICES")
        self.max_message_bytes = 0
        self.read_bytes = MAX_READ_BYTES
        """How many bytes to request at once: less after a reply that did not come in time."""
        self.is_restarted = False
        """Whether the server was ever restarted, so that readers may be unsure of their numbers."""
        self.returned: Returned = []
        self._era = Era("", b"", 0, None)
        self._kept = _Kept(boot_time(), {}, 0)
        # Those used last, which may still hold messages that have been handed out.
        self._recent: deque[TopicReader] = deque()
        # Those of topics that had no messages: forgetting them loses nothing.
        self._new: dict[str, TopicReader] = {}

    @property
    def era(self) -> Era:
        """The latest of the server's epochs and runs that this client knows."""
        while self._era.next:
            self._era = self._era.next[0]
        return self._era

    @property
    def epoch(self) -> str:
        return self.era.epoch

    def handle_hello(self, reply: Reply) -> tuple[State, Era]:
        """Take in the reply to HELLO, on the first connection or a later one; return what it means, and the era.

        A new epoch means that the server has lost its messages: all those it has now were put after this client
        connected, and are read from the start. A new run means that it may have lost those that were put last.
        """
        facts = as_map(reply)
        if facts.get("server", b"dsmq") != b"dsmq":
            raise ProtocolError("not a dsmq server")
        if facts.get("access") == b"nobody":
            raise AuthRequired("authentication required: connect(..., token=...)")
        epoch, run = as_text(facts.get("epoch")), as_text(facts.get("run")).encode()
        last_id, lost = as_number(facts.get("last_id")), as_ranges(facts.get("lost_ids", []))
        self.max_message_bytes = as_number(facts.get("max_message_bytes"))
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
                _logger.warning("the server was restarted: %s", LOST[state])
        return state, era

    def reader(self, topic: str) -> TopicReader:
        """Return the reader of a topic, old or new. Raises TypeError or ValueError if it can't be a topic."""
        if self.returned:
            take_back(self.returned)
        reader = self._kept.young.get(topic) if isinstance(topic, str) else None
        return self._find_reader(topic) if reader is None else reader

    def _find_reader(self, topic: str) -> TopicReader:
        kept = self._kept
        reader = kept.older.get(topic) if isinstance(topic, str) else None
        if reader is not None:
            return kept.young.setdefault(topic, reader)
        topic_name(topic)
        if (reader := self._new.get(topic)) is not None:
            return reader
        if len(self._new) > _MAX_NEW_READERS:
            self._new = {}
        return self._new.setdefault(topic, TopicReader(topic, self.era))

    def keep(self, reader: TopicReader) -> TopicReader:
        """Keep a reader whose topic has messages; return the one to go on with."""
        reader = self._kept.young.setdefault(reader.topic, reader)
        self._new.pop(reader.topic, None)
        if not self._recent or self._recent[-1] is not reader:
            self._recent.append(reader)
            if len(self._recent) > _MAX_RECENT_READERS:
                self._recent.popleft().shrink()
        return reader

    def forget(self, topic: str) -> None:
        """Forget where a topic was read."""
        topic_name(topic)
        take_back(self.returned)
        kept = self._kept
        found = (readers.pop(topic, None) for readers in (kept.young, kept.older, self._new))
        for reader in {id(reader): reader for reader in found if reader}.values():
            kept.missed += reader.missed

    def _forget_silent(self, max_age: float) -> None:
        """Forget readers of topics that had no messages for longer than messages are kept now.

        All that was read there has expired: reading such a topic from the start finds what was put since.
        """
        kept, now = self._kept, boot_time()
        if now - kept.since > _SILENCE_FACTOR * max_age + _SILENCE_SECONDS:
            missed = sum(reader.missed for topic, reader in kept.older.items() if topic not in kept.young)
            new = _Kept(now, kept.young, kept.missed + missed)
            if kept.next.setdefault(0, new) is new:
                self._kept = new

    def position(self, topic: str) -> str:
        """Return where a topic has been read to: the epoch, and the id of the last message handed out."""
        epoch, after = self.reader(topic).position
        return f"{epoch}:{after}"

    def seek(self, topic: str, position: str | int) -> bool:
        """Read a topic on from a position, or behind an id; return False if the position is of another epoch.

        Then it is read from the oldest message. Raises TypeError or ValueError if it is neither.
        """
        epoch, after = parse_position(position)
        known = self.keep(self.reader(topic)).seek(after, epoch)
        if not known:
            _logger.warning("topic %r: the position is of another epoch, and the messages it is for are lost", topic)
        return known

    @property
    def missed(self) -> int:
        """How many messages expired before this client read them, in each topic from the first one that it got."""
        take_back(self.returned)
        kept = self._kept
        readers = {**kept.older, **kept.young}
        return kept.missed + sum(reader.missed for reader in readers.values())

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
            raise_malloc_threshold()
        return name, body

    def entries(self, reply: Reply) -> list[Entry]:
        """Return the messages in the reply to READ. Raises the server's error, or ProtocolError."""
        if reply == []:
            return []
        check(reply)
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

    def message(self, reader: TopicReader, entry: Entry) -> Message:
        """Return a message as the user sees it."""
        age = boot_time() - entry.put_at
        return Message(reader.topic, entry.id, entry.number, time.time() - age, entry.body)


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


def text(reader: TopicReader, entry: Entry) -> str:
    """Return a message's text. Raises MessageNotText."""
    return _text(reader.topic, entry.body)


def body(_: TopicReader, entry: Entry) -> bytes:
    """Return a message's bytes."""
    return entry.body


def _text(topic: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise MessageNotText(f"the next message of {topic!r} is not UTF-8; read it with raw=True") from None
