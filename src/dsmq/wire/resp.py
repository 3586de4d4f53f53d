"""The codec for PROTOCOL.md: decodes replies, and encodes requests and replies.

Nothing here touches a socket. Parsers are incremental and strict; see also `request_parser`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

from dsmq.errors import ProtocolError, ReplyError, from_reply
from dsmq.wire.limits import MAX_DEPTH, MAX_LINE_BYTES

BUILD = "pure Python" if __file__.endswith(".py") else "compiled"
"""Whether this module and the others listed in pyproject.toml were compiled with mypyc.

If so, calls among them can't be patched, and trace functions don't see them.
"""

_MAX_REPLY_ELEMENTS = 1_048_576

_KINDS = b"*$:+-_"
ARRAY, _BULK, _INTEGER, _SIMPLE, _ERROR, _NULL = _KINDS
_ZERO = ord("0")
CRLF = b"\r\n"
OK = b"+OK\r\n"
# Max bytes split at once, so that a failed split costs little. All limits on the size of a request are higher, so
# requests that were split need no check.
MAX_SPLIT_BYTES = 4096
# Smaller chunks of input are merged.
_MIN_CHUNK_BYTES = 4096
# To save a copy, longer replies are built in the type of buffer that a connection sends from.
_LONG_REPLY_BYTES = 65_536
short_length = {b"$%d" % n: n for n in range(1024)}.get
"""Parse a short length line; None for other lines. The lookup both checks and converts it."""

Encoded: TypeAlias = bytes | bytearray
Reply: TypeAlias = "str | int | bytes | ReplyError | list[Reply] | None"


class Input:
    """A buffer of input. Its chunks are joined only when there is enough to try parsing again.

    Joining on every arrival would copy a message of n bytes n / 65,536 times, or n times if it arrives byte by byte.
    """

    __slots__ = ("_at", "_chunk_bytes", "_chunks", "_data", "_line_room", "incomplete", "missing")

    # Matches data that ends the wait for the rest of a line.
    _line_end: ClassVar[re.Pattern[bytes]]

    def __init__(self) -> None:
        self._data = b""
        self._at = 0
        self._chunks: list[bytes | bytearray] = []
        self._chunk_bytes = 0
        # How many more bytes an incomplete line may have.
        self._line_room = 0
        self.missing = 1
        """Min bytes to feed before the next item can be complete; 0 if it may be complete already."""
        self.incomplete = False
        """Whether the buffer ends within an item."""

    def feed(self, data: bytes) -> None:
        if self._data or self._chunks or not data:
            size = len(data)
            if size < self.missing:
                self.missing -= size
                self._keep(data)
                return
            if size < self._line_room and not self._line_end.search(data):
                self._line_room -= size
                self._keep(data)
                return
            data = self._join(data)
            self._chunks = []
            self._chunk_bytes = 0
        self.incomplete = False
        self._data = data
        self._at = self.missing = self._line_room = 0

    def _join(self, data: bytes) -> bytes:
        return b"".join((self._data[self._at :], *self._chunks, data))

    def _keep(self, data: bytes) -> None:
        """Buffer a chunk. Small chunks are merged, because separate objects would take many times their size."""
        chunks = self._chunks
        self._chunk_bytes += len(data)
        if not chunks or len(chunks[-1]) >= _MIN_CHUNK_BYTES:
            chunks.append(data)
            return
        last = chunks[-1]
        if not isinstance(last, bytearray):
            last = chunks[-1] = bytearray(last)
        last += data

    def _await(self, size: int) -> None:
        """Record that the next item lacks at least `size` bytes."""
        self.missing = size
        self.incomplete = True
        if self._at:
            # Free consumed bytes now rather than when the rest arrives.
            self._data = self._data[self._at :]
            self._at = 0

    def _advance(self, end: int) -> None:
        """Mark the bytes up to `end` as consumed."""
        if end < len(self._data):
            self._at = end
        else:
            self._data = b""
            self._at, self.missing = 0, 1

    def __len__(self) -> int:
        """The number of bytes not consumed yet."""
        return len(self._data) - self._at + self._chunk_bytes


class ReplyParser(Input):
    """Parses replies into Python values; see `next`."""

    __slots__ = ("_open",)

    _line_end = re.compile(rb"\n")

    def __init__(self) -> None:
        super().__init__()
        # The incomplete arrays, outermost first, each with its final length. Their values are not parsed again when
        # more bytes arrive.
        self._open: list[tuple[list[Reply], int]] = []

    def next(self) -> tuple[Reply] | None:
        """Return the next complete reply, in a tuple of one, or None if there is none yet.

        Simple strings become str, integers int, bulk strings bytes, arrays list, null None, and errors instances of
        ReplyError, which are not raised. Raises ProtocolError if the reply is malformed.
        """
        if self.missing:
            return None
        try:
            value = None if self._open else self._value()
            if self._open:
                value = self._fill()
        except _Incomplete as incomplete:
            missing, self._line_room = incomplete.args
            self._await(missing)
            return None
        self._advance(self._at)
        return (value,)

    def _fill(self) -> Reply:
        """Fill the open arrays; return the outermost."""
        while True:
            values, count = self._open[-1]
            if len(values) < count:
                self._split(count, values)
            if len(values) < count:
                value = self._value()
                if self._open[-1][0] is values:
                    values.append(value)
                continue
            self._open.pop()
            if not self._open:
                return values
            self._open[-1][0].append(values)

    def _value(self) -> Reply:
        """Return the next value. For an array, only parse its header and add it to the open arrays."""
        data, at = self._data, self._at
        end = data.find(CRLF, at)
        if end <= at:
            if end == at:
                # Reject it before it is sliced, because mypyc's slices fail if the start is after the end.
                raise ProtocolError(f"not a reply: {quoted(CRLF)}")
            if at < len(data) and data[at] not in _KINDS:
                # Don't wait for the end of a line that another program may never send.
                raise ProtocolError(f"not a reply: {quoted(data[at:])}")
            if len(data) - at > MAX_LINE_BYTES:
                raise ProtocolError("no end of line in a reply")
            # One more than allowed, so that a line that is too long is parsed and rejected.
            raise _Incomplete(1, MAX_LINE_BYTES - (len(data) - at) + 1)
        kind = data[at]
        line = data[at + 1 : end]
        end += 2
        if kind == _BULK and line != b"-1":
            return self._bulk(end, parse_length(line))
        self._at = end
        if kind == _INTEGER:
            return parse_length(line)
        if kind in (ARRAY, _BULK):
            return None if line == b"-1" else self._begin_array(parse_length(line))
        if kind == _SIMPLE:
            return line.decode(errors="replace")
        if kind == _ERROR:
            return from_reply(line.decode(errors="replace"))
        if kind == _NULL and not line:
            return None
        raise ProtocolError(f"not a reply: {quoted(data[at:end])}")

    def _bulk(self, at: int, length: int) -> bytes:
        end = at + length
        if end + 2 > len(self._data):
            raise _Incomplete(end + 2 - len(self._data), 0)
        if self._data[end : end + 2] != CRLF:
            raise ProtocolError("no CR LF after a bulk string")
        self._at = end + 2
        return self._data[at:end]

    def _begin_array(self, count: int) -> Reply:
        """Return an empty array or add one to the open arrays."""
        if count > _MAX_REPLY_ELEMENTS or len(self._open) >= MAX_DEPTH:
            raise ProtocolError(f"an array of {count} at depth {len(self._open)}")
        if not count:
            return []
        self._open.append(([], count))
        return None

    def _split(self, count: int, values: list[Reply]) -> None:
        """Append the integers and short bulk strings that come next.

        Several times faster than `_value`, which parses all others.
        """
        data = self._data[self._at : self._at + MAX_SPLIT_BYTES]
        tokens = data.split(CRLF)
        # The last token is incomplete or was not split.
        last = len(tokens) - 1
        token, left = 0, count - len(values)
        while token < last and left:
            line = tokens[token]
            # Matches integers that begin with 1 to 9; testing single bytes would be slower.
            if b":1" <= line < b"::":
                if not (digits := line[1:]).isdigit() or len(digits) > 19:
                    break
                values.append(int(digits))
            elif line == b":0":
                values.append(0)
            elif short_length(line) == len(tokens[token + 1]) and token + 1 < last:
                token += 1
                values.append(tokens[token])
            else:
                break
            token += 1
            left -= 1
        self._at += len(data) - len(CRLF.join(tokens[token:]))


class _Incomplete(Exception):
    """The arguments are the min number of missing bytes and the max number of bytes that the line may still have."""


def parse_length(digits: bytes) -> int:
    """Parse a length or an integer: only digits, without leading zeros."""
    if not digits.isdigit() or len(digits) > 19 or (digits[0] == _ZERO and digits != b"0"):
        raise ProtocolError(f"invalid length {quoted(digits)}")
    return int(digits)


def quoted(data: bytes) -> str:
    return repr(data[:32])[1:]


def encode_request(*arguments: bytes) -> bytes:
    """Encode a request, name first, as an array of bulk strings."""
    return encode_array([encode_bulk(argument) for argument in arguments])


def encode_read(topic: str, after: int, options: bytes = b"", words: int = 0) -> bytes:
    """Encode a READ as `encode_request` does, but faster; `words` is the number of words in the encoded options."""
    name, position = topic.encode(), b"%d" % after
    parts = 3 + words, len(name), name, len(position), position, options
    return b"*%d\r\n$4\r\nREAD\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n%b" % parts


def encode_read_many(names: Sequence[bytes], start: Sequence[bytes], options: bytes = b"", words: int = 0) -> bytes:
    """Encode an MREAD of encoded names; `start` is the id after which it reads, or LAST or SINCE and a number."""
    head = b"".join([encode_bulk(word) for word in (b"MREAD", *start)])
    count = 2 + len(start) + words + len(names)
    return b"*%d\r\n%b%b$6\r\nTOPICS\r\n%b" % (count, head, options, b"".join(names))


@lru_cache(64)
def encode_option(name: bytes, value: int) -> bytes:
    """Encode an option of READ: two words."""
    digits = b"%d" % value
    return b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(digits), digits)


def encode_take(words: bytes, options: Sequence[bytes], token: bytes) -> bytes:
    """Encode a TAKE of an encoded topic, group and lease, and encoded options of two words each."""
    parts = 6 + 2 * len(options), words, b"".join(options), len(token), token
    return b"*%d\r\n$4\r\nTAKE\r\n%b%b$5\r\nTOKEN\r\n$%d\r\n%b\r\n" % parts


def encode_settlement(verb: bytes, key: bytes, message_id: int, attempt: int, words: Sequence[bytes]) -> bytes:
    """Encode a DONE, RETURN or EXTEND; `key` is the encoded topic and group."""
    parts = encode_bulk(b"%d" % message_id), encode_bulk(b"%d" % attempt), b"".join(map(encode_bulk, words))
    return b"*%d\r\n$%d\r\n%b\r\n%b%b%b%b" % (5 + len(words), len(verb), verb, key, *parts)


def encode_simple(text: str) -> bytes:
    return b"+%b\r\n" % text.encode()


def encode_error(error: ReplyError) -> bytes:
    """Encode an error as one line; unprintable characters become `?`."""
    sentence = "".join(c if c.isprintable() else "?" for c in str(error))
    return b"-%b %b\r\n" % (error.code.encode(), sentence.encode(errors="replace"))


def encode_integer(number: int) -> bytes:
    return b":%d\r\n" % number


def encode_bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def encode_null(version: int) -> bytes:
    return b"_\r\n" if version == 3 else b"$-1\r\n"


def encode_null_array(version: int) -> bytes:
    return b"_\r\n" if version == 3 else b"*-1\r\n"


def encode_array(items: Sequence[bytes]) -> bytes:
    """Encode an array of encoded items."""
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def encode_value(version: int, value: Any) -> bytes:
    """Encode an int, text, bytes, or a list or dict of these.

    In RESP 2, a dict becomes a flat array. Text in a list becomes a simple string, like flags in Redis.
    """
    if isinstance(value, dict):
        items = [
            part for pair in value.items() for part in (encode_bulk(pair[0].encode()), encode_value(version, pair[1]))
        ]
        return encode_array(items) if version == 2 else b"%%%d\r\n%b" % (len(value), b"".join(items))
    if isinstance(value, list):
        return encode_array(
            [encode_simple(one) if isinstance(one, str) else encode_value(version, one) for one in value]
        )
    if isinstance(value, int):
        return encode_integer(value)
    return encode_bulk(value.encode() if isinstance(value, str) else value)


def encode_messages(messages: Sequence[tuple[int, int, int, bytes, int]]) -> Encoded:
    """Encode a reply to READ from tuples of id, number, age, body, and time to expiry; times are in milliseconds."""
    if not messages:
        return b"*0\r\n"
    # Join only once, so that a long body is copied once. The parts between two bodies are formatted together.
    message_id, number, age, body, left = messages[0]
    head = b"*%d\r\n:%d\r\n:%d\r\n:%d\r\n$%d\r\n" % (5 * len(messages), message_id, number, age, len(body))
    parts = [head, body]
    for message_id, number, age, body, next_left in messages[1:]:
        parts += (b"\r\n:%d\r\n:%d\r\n:%d\r\n:%d\r\n$%d\r\n" % (left, message_id, number, age, len(body)), body)
        left = next_left
    parts.append(b"\r\n:%d\r\n" % left)
    return (bytearray() if len(parts[1]) > _LONG_REPLY_BYTES else b"").join(parts)


def encode_jobs(jobs: Sequence[tuple[bytes, int, int, int, bytes, int, int]]) -> Encoded:
    """Encode a reply to TAKE: seven values per job."""
    parts = [b"*%d\r\n" % (7 * len(jobs))]
    for topic, message_id, number, age, body, left, attempt in jobs:
        head = len(topic), topic, message_id, number, age, len(body)
        parts += b"$%d\r\n%b\r\n:%d\r\n:%d\r\n:%d\r\n$%d\r\n" % head, body, b"\r\n:%d\r\n:%d\r\n" % (left, attempt)
    is_long = jobs and len(jobs[0][4]) > _LONG_REPLY_BYTES
    return (bytearray() if is_long else b"").join(parts)


def encode_found(position: int, messages: Sequence[tuple[bytes, int, int, int, bytes, int]]) -> Encoded:
    """Encode a reply to MREAD: a position and six values per message."""
    parts = [b"*%d\r\n:%d\r\n" % (1 + 6 * len(messages), position)]
    for topic, message_id, number, age, body, left in messages:
        head = len(topic), topic, message_id, number, age, len(body)
        parts += b"$%d\r\n%b\r\n:%d\r\n:%d\r\n:%d\r\n$%d\r\n" % head, body, b"\r\n:%d\r\n" % left
    is_long = messages and len(messages[0][4]) > _LONG_REPLY_BYTES
    return (bytearray() if is_long else b"").join(parts)
