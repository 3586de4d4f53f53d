"""A client's state: its positions, the messages read ahead, and the server's epochs and runs. Does no I/O."""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dsmq.client.arguments import Names, default_client_name, names, topic_name
from dsmq.client.message import Message, not_text
from dsmq.client.reader import MIN_READ_BYTES, Returned, TopicReader, take_back
from dsmq.client.replies import as_map, as_number, as_ranges, as_text, check
from dsmq.client.stretch import Back, Entry, Era
from dsmq.errors import AuthRequired, ProtocolError
from dsmq.system import boot_time
from dsmq.wire.limits import MAX_INTEGER, MAX_READ_BYTES
from dsmq.wire.resp import Reply, encode_request

if TYPE_CHECKING:
    from dsmq.client.jobs import Jobs

SHUTDOWN = encode_request(b"SHUTDOWN")
PING = encode_request(b"PING")

_logger = logging.getLogger(__name__)

State: TypeAlias = Literal["lost", "resumed", "restarted", "replaced", "given up"]
"""A change in a client's connection to its server.

`lost`: the connection broke; one of the others follows. `resumed`: no message is lost. `restarted`: the server was
restarted, and the last messages put may be lost (they do not count as missed). `replaced`: the server has lost its
messages, and its new ones are read from the oldest. `given up`: the call that noticed raises an error, but later calls
may connect. `replaced` alone follows a `seek` to a position of another epoch.
"""
LOST: dict[State, str] = {"replaced": "its messages are lost", "restarted": "the last messages put may be lost"}

_MAX_EPOCHS = 8
# A tuple, because a union would be created for each read.
_KEYS = (str, Names)
# Makes an Entry several times faster than calling the class.
_new = tuple.__new__
_MIN_READERS, _MAX_RECENT_READERS = 1000, 100
# Readers are kept a little longer than messages, because the server may delete messages late.
_SILENCE_FACTOR, _SILENCE_SECONDS = 1.25, 1.0


class Session:
    """A client's session with its server, over many connections."""

    def __init__(self, token: str = "", name: bytes | None = None, start: str | int | None = None) -> None:
        """Topics are read from the position `start`, or by default from the first message put after connecting."""
        self._token, self._name = token, name
        self.max_message_bytes = 0
        self.read_bytes = MAX_READ_BYTES
        """The number of bytes to request at once; lower after a reply timed out."""
        self.is_restarted = False
        """Whether the server has ever been restarted, so that readers may have lost count of message numbers."""
        self.returned: Returned = []
        self.jobs: dict[object, Jobs] = {}
        """The jobs in each process that uses the client, by the result of `process`."""
        self.is_shared = False
        """Whether the server shares its store with others."""
        self._era = Era("", b"", 0, None)
        self._epochs: dict[str, tuple[int, int | None, bytes]] = {}
        """For each of the last few epochs: where topics start, as in the epoch's first era, and the last run."""
        self._start = None if start is None else parse_position(0 if start == "oldest" else start)
        self._readers: dict[str | Names, TopicReader] = {}
        # If there are more readers than this, those of silent topics are forgotten.
        self._max_readers = _MIN_READERS
        # How many messages forgotten readers had missed.
        self._missed_before = 0
        # The last readers used, which may still contain messages that have been returned.
        self._recent: deque[TopicReader] = deque()

    @property
    def era(self) -> Era:
        """The latest run of the server that this client knows."""
        while self._era.next:
            self._era = self._era.next[0]
        return self._era

    @property
    def epoch(self) -> str:
        return self.era.epoch

    @property
    def hello(self) -> bytes:
        """The first request on a connection. The default name is computed here, because the process may have forked."""
        auth = (b"AUTH", b"default", self._token.encode()) if self._token else ()
        name = default_client_name() if self._name is None else self._name
        return encode_request(b"HELLO", b"2", *auth, b"NOTICES", b"SETNAME", name)

    def handle_hello(self, reply: Reply) -> tuple[State, Era]:
        """Process the reply to HELLO on a new connection; return the new state, and the era.

        A new epoch means that the server has lost its messages: those that it has now were put after this client
        connected, and are read from the oldest on. A new run means that it may have lost the last messages put.
        """
        facts = as_map(reply)
        if facts.get("server", b"dsmq") != b"dsmq":
            raise ProtocolError("not a dsmq server")
        if facts.get("access") == b"nobody":
            raise AuthRequired("authentication required: connect(..., token=...)")
        epoch, run = as_text(facts.get("epoch")), as_text(facts.get("run")).encode()
        last_id, lost = as_number(facts.get("last_id")), as_ranges(facts.get("lost_ids", []))
        self.max_message_bytes = as_number(facts.get("max_message_bytes"))
        self.is_shared = facts.get("store") == b"shared"
        state: State = "resumed"
        while (era := self.era).epoch != epoch or era.run != run:
            if not era.epoch:
                start, state = self._start_after(epoch, last_id)
                # The number of the message with the id `start` is unknown.
                self._era = Era(epoch, run, start, None)
                self._epochs[epoch] = start, None, run
                return state, self._era
            self.is_restarted = True
            # A client with several servers may return to an epoch that it knows.
            start, number, known_run = self._epochs.get(epoch, (0, 0, b""))
            new = Era(epoch, run, start, number, lost if known_run else ())
            if era.next.setdefault(0, new) is new:
                self._epochs[epoch] = start, number, run
                for forgotten in list(self._epochs)[:-_MAX_EPOCHS]:
                    self._epochs.pop(forgotten, None)
                state = "resumed" if known_run == run else "restarted" if known_run else "replaced"
                if state in LOST:
                    _logger.warning("the server was restarted: %s", LOST[state])
        return state, era

    def _start_after(self, epoch: str, last_id: int) -> tuple[int, State]:
        """Return the id after which topics are read, and `replaced` if the requested position is from another epoch."""
        if self._start is None or self._start[0] in ("", epoch):
            return last_id if self._start is None else self._start[1], "resumed"
        _logger.warning("the start position is from another epoch, whose messages are lost")
        return 0, "replaced"

    def reader(self, topic: str | Names) -> TopicReader:
        """Return the reader of one or more topics. Raises TypeError or ValueError if a topic is invalid."""
        if self.returned:
            take_back(self.returned)
        reader = self._readers.get(topic) if isinstance(topic, _KEYS) else None
        return self._new_reader(topic) if reader is None else reader

    def _new_reader(self, topic: str | Names) -> TopicReader:
        if not isinstance(topic, Names):
            topic_name(topic)
        if len(self._readers) >= self._max_readers:
            # Only readers that never had a message are forgotten here.
            self._forget_silent(math.inf)
        return self._readers.setdefault(topic, TopicReader(topic, self.era))

    def keep(self, reader: TopicReader) -> TopicReader:
        """Keep a reader whose topic has messages; return the one to use."""
        reader = self._readers.setdefault(reader.key, reader)
        reader.used_at = boot_time()
        if not self._recent or self._recent[-1] is not reader:
            self._recent.append(reader)
            if len(self._recent) > _MAX_RECENT_READERS:
                self._recent.popleft().shrink()
        return reader

    def forget(self, topic: str | Sequence[str]) -> None:
        key = names(topic)
        take_back(self.returned)
        if reader := self._readers.pop(key, None):
            self._missed_before += reader.missed

    def _forget_silent(self, max_age: float) -> None:
        """Forget readers of topics that have had no messages for longer than `max_age`.

        All messages that they have read have expired, so reading such a topic from the start returns only newer
        messages.
        """
        since = boot_time() - _SILENCE_FACTOR * max_age - _SILENCE_SECONDS
        for topic in [topic for topic, reader in list(self._readers.items()) if reader.used_at <= since]:
            self.forget(topic)
        self._max_readers = max(_MIN_READERS, 2 * len(self._readers))

    def position(self, topic: str | Sequence[str]) -> str:
        """Return the epoch and the id of the last message returned."""
        epoch, after = self.reader(names(topic)).position
        return f"{epoch}:{after}"

    def seek(self, topic: str | Sequence[str], position: str | int, back: Back | None = None) -> bool:
        """Continue reading at a position or after an id; return False if the position is of another epoch.

        In that case, the oldest message is next. Raises TypeError or ValueError if `position` is invalid.
        """
        epoch, after = parse_position(position)
        known = self.keep(self.reader(names(topic))).seek(after, epoch, back)
        if not known:
            about = topic if isinstance(topic, str) else ", ".join(topic)
            _logger.warning("topic %r: the position is from another epoch, whose messages are lost", about)
        return known

    @property
    def missed(self) -> int:
        """The number of messages that expired unread; in each topic, from the first one that this client read."""
        take_back(self.returned)
        return self._missed_before + sum(reader.missed for reader in list(self._readers.values()))

    def missed_in(self, topic: str | Sequence[str]) -> int:
        """The share of `missed` of one topic or of several read together."""
        take_back(self.returned)
        key, readers = names(topic), list(self._readers.values())
        missed = sum(reader.missed for reader in readers if reader.key == key)
        return missed + sum(reader.missed_in(key) for reader in readers if isinstance(key, str))

    def selected(self, reply: Reply) -> tuple[list[Entry], int]:
        """Return the messages in the reply to MREAD, and its position. Raises the server's error or ProtocolError."""
        if not isinstance(reply, list) or len(reply) % 6 != 1 or not isinstance(reply[0], int):
            check(reply)
            raise ProtocolError("the reply to MREAD does not consist of messages")
        values = reply[1:]
        topics = values[::6]
        del values[::6]
        found = [
            entry._replace(topic=as_text(topic), topic_number=entry.number)
            for topic, entry in zip(topics, self.entries(values), strict=True)
        ]
        return found, reply[0]

    def entries(self, reply: Reply) -> list[Entry]:
        """Return the messages in the reply to READ. Raises the server's error or ProtocolError."""
        if reply == []:
            return []
        if not isinstance(reply, list) or len(reply) % 5:
            check(reply)
            raise ProtocolError("the reply to READ does not consist of messages")
        now, entries = boot_time(), []
        values = iter(reply)
        for message_id, number, age, body, left in zip(values, values, values, values, values, strict=True):
            if not (
                isinstance(message_id, int)
                and isinstance(number, int)
                and isinstance(age, int)
                and isinstance(body, bytes)
                and isinstance(left, int)
            ):
                raise ProtocolError("the reply to READ does not consist of messages")
            fields = message_id, number, now + left / 1000, body, now - age / 1000, "", 0
            entries.append(_new(Entry, fields))
        if len(self._readers) >= self._max_readers:
            self._forget_silent(entries[-1].expires - entries[-1].put_at)
        if self.read_bytes < MAX_READ_BYTES:
            self.read_bytes = min(MAX_READ_BYTES, self.read_bytes + MIN_READ_BYTES)
        return entries

    def converter(self, raw: bool | None) -> Callable[[TopicReader, Entry], Any]:  # noqa: FBT001
        """Return the function that converts messages: to bytes if `raw`, to text if not, to Message if it is None."""
        return self.message if raw is None else body if raw else text

    def message(self, reader: TopicReader, entry: Entry) -> Message:
        """Return a message as users get it."""
        age = boot_time() - entry.put_at
        topic, number = (entry.topic, entry.topic_number) if entry.topic else (reader.topic, entry.number)
        return Message(topic, entry.id, number, time.time() - age, entry.body)


def parse_position(position: str | int) -> tuple[str, int]:
    """Return the epoch, empty if none is given, and the id in a position. Raises TypeError or ValueError."""
    if isinstance(position, int) and not isinstance(position, bool):
        epoch, after = "", position
    elif isinstance(position, str):
        epoch, _, digits = position.rpartition(":")
        if not epoch or not re.fullmatch("[0-9]{1,19}", digits):
            raise ValueError(f"{position[:100]!r} is not a position: see position()")
        after = int(digits)
    else:
        raise TypeError(f"a position should be what position() returns, or an id, not {type(position).__name__}")
    if not 0 <= after <= MAX_INTEGER:
        raise ValueError(f"an id should be 0 to {MAX_INTEGER}, not {after}")
    return epoch, after


def text(reader: TopicReader, entry: Entry) -> str:
    """Return a message's text. Raises MessageNotText."""
    try:
        return entry.body.decode()
    except UnicodeDecodeError:
        raise not_text(entry.topic or reader.topic) from None


def body(_: TopicReader, entry: Entry) -> bytes:
    """Return a message's bytes."""
    return entry.body
