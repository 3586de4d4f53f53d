"""The codec for PROTOCOL.md: it turns bytes into requests or replies, and back.

Nothing here touches a socket. The server parses requests and encodes replies; the client does the reverse.
Both parsers are incremental and strict. The request parser, which faces untrusted input, checks each length when it
reads it, before it buffers any of the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, NoReturn, TypeAlias

from dsmq.errors import ProtocolError, ReplyError, TooBig, from_reply

MAX_ARGUMENTS = 64
MAX_LINE_BYTES = 65_536
# Max size of a request apart from its message: names, options, topic and framing.
REQUEST_OVERHEAD_BYTES = 65_536
MAX_INTEGER = 2**63 - 1

# A type byte, up to 19 digits, and CR LF.
_MAX_LENGTH_LINE = 22
# The depth of COMMAND DOCS, plus one for EXEC around it.
_MAX_DEPTH = 9
_MAX_REPLY_ELEMENTS = 1_048_576

_ARRAY, _BULK, _INTEGER, _SIMPLE, _ERROR, _NULL = b"*$:+-_"
_ZERO = ord("0")
_RETURN = ord("\r")
_CRLF = b"\r\n"
# Max bytes split at once, so that splitting in vain costs little. No limit on the size of a request is lower than this,
# so it need not be checked for requests that were split.
_MAX_SPLIT_BYTES = 4096
_MAX_SPLIT_TOKENS = 448
# Requests that can't be split are slower to parse: this many take about 0.1 ms.
_MAX_ONE_BY_ONE = 16
# Smaller chunks of input are gathered.
_MIN_CHUNK_BYTES = 4096

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

# Above this, a reply is made in the kind of buffer that a connection sends from, so that it is not copied once more.
_LONG_REPLY_BYTES = 65_536

Encoded: TypeAlias = bytes | bytearray
Reply: TypeAlias = "str | int | bytes | ReplyError | list[Reply] | None"


class _Input:
    """A buffer of input that is joined only when there is enough of it to try parsing again.

    Joining on every arrival would copy a message of n bytes n / 65,536 times, or n times if it arrives byte by byte.
    """

    __slots__ = ("_at", "_chunk_bytes", "_chunks", "_data", "_line_room", "incomplete", "missing")

    # Ends the wait for the rest of a line.
    _line_end: ClassVar[re.Pattern[bytes]]

    def __init__(self) -> None:
        self._data = b""
        self._at = 0
        self._chunks: list[bytes | bytearray] = []
        self._chunk_bytes = 0
        # While a line is incomplete: how many more bytes it may have.
        self._line_room = 0
        self.missing = 1
        """Min bytes to feed before the next item can be complete; 0 if it may be complete already."""
        self.incomplete = False
        """Whether the buffer ends within an item."""

    def feed(self, data: bytes) -> None:
        size = len(data)
        if size < self.missing:
            self.missing -= size
            self._keep(data)
            return
        if size < self._line_room and not self._line_end.search(data):
            self._line_room -= size
            self._keep(data)
            return
        if self._data or self._chunks:
            data = self._join(data)
            self._chunks = []
            self._chunk_bytes = 0
        self.incomplete = False
        self._data = data
        self._at = self.missing = self._line_room = 0

    def _join(self, data: bytes) -> bytes:
        return b"".join((self._data[self._at :], *self._chunks, data))

    def _keep(self, data: bytes) -> None:
        """Buffer a chunk. Small ones are gathered: as separate objects they would take many times their size."""
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
        """Note that the next item lacks at least `size` bytes."""
        self.missing = size
        self.incomplete = True
        if self._at:
            # Don't keep consumed bytes in memory until the rest arrives.
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


class RequestParser(_Input):
    """Parses requests. After an error it can't go on: close the connection.

    max_message_bytes limits each argument, max_request_bytes the whole request (default: 64 KiB more). Both may be
    changed between requests.
    """

    __slots__ = ("_arguments", "_body", "_count", "_size", "max_message_bytes", "max_request_bytes")

    _line_end = _CONTROL

    def __init__(self, max_message_bytes: int, max_request_bytes: int | None = None) -> None:
        super().__init__()
        self.max_message_bytes = max_message_bytes
        self.max_request_bytes = max_request_bytes or max_message_bytes + REQUEST_OVERHEAD_BYTES
        # For an incomplete request: its complete arguments, which are not parsed again, the count of all its arguments,
        # and the bytes consumed.
        self._arguments: list[bytes] | None = None
        self._count = self._size = 0
        # Where in the data the incomplete argument begins.
        self._body = 0

    def __len__(self) -> int:
        return len(self._data) - self._at + self._chunk_bytes + self._size

    @property
    def buffered(self) -> int:
        """The bytes in memory, including consumed ones not freed yet."""
        return len(self._data) + self._chunk_bytes + self._size

    def next(self) -> list[bytes] | None:
        """Return the next complete request, name first, or None if there is none. Raises ProtocolError or TooBig."""
        if self.missing:
            return None
        data, at = self._data, self._at
        arguments, count, size = self._arguments, self._count, self._size
        if arguments is None:
            if data[at] != _ARRAY:
                return self._next_line()
            end = data.find(_CRLF, at, at + _MAX_LENGTH_LINE)
            if end < 0:
                self._await_length(at)
                return None
            count = _COUNTS.get(data[at:end]) or _bad_count(data[at + 1 : end])
            arguments, size, at = [], end + 2 - at, end + 2
        while len(arguments) < count:
            end = data.find(_CRLF, at, at + _MAX_LENGTH_LINE)
            if end < 0:
                self._arguments, self._count, self._size = arguments, count, size
                self._await_length(at)
                return None
            length = _BULK_LENGTHS.get(data[at:end])
            if length is None:
                length = self._long_bulk_length(data[at:end])
            start = end + 2
            end = start + length + 2
            if size + end - at > self.max_request_bytes:
                raise TooBig("the arguments of a request are too long together")
            if end > len(data):
                self._arguments, self._count, self._size = arguments, count, size
                self._at, self._body = at, start - at
                self._await(end - len(data))
                return None
            if data[end - 2 : end] != _CRLF:
                raise ProtocolError("a bulk string does not end where its length says")
            arguments.append(data[start : end - 2])
            size, at = size + end - at, end
        self._arguments, self._size = None, 0
        self._advance(at)
        return arguments

    def _join(self, data: bytes) -> bytes:
        """Join the incomplete argument by itself, so that a long one is copied only once; return the bytes after it."""
        arguments, body = self._arguments, self._body
        self._body = 0
        if not body or arguments is None:
            return super()._join(data)
        end = len(data)
        length = len(self._data) - body + self._chunk_bytes
        needed = int(self._data[1 : body - 2]) - length
        if not (0 <= needed <= end - 2 and data[needed : needed + 2] == _CRLF):
            return super()._join(data)
        arguments.append(b"".join((memoryview(self._data)[body:], *self._chunks, memoryview(data)[:needed])))
        self._size += body + length + needed + 2
        return data[needed + 2 :]

    def batch(self) -> list[list[bytes]]:
        """Return some complete requests, in order; empty if there are none yet. Raises as `next`."""
        requests: list[list[bytes]] = []
        if self.missing:
            return requests
        if self._arguments is None and self._data[self._at] == _ARRAY:
            self._split(requests)
        if not requests:
            self._one_by_one(requests)
        return requests

    def _one_by_one(self, requests: list[list[bytes]]) -> None:
        """Append several requests that can't be split, so that splitting is not tried for each of them."""
        end = self._at + _MAX_SPLIT_BYTES
        try:
            while self._at < end and len(requests) < _MAX_ONE_BY_ONE and (request := self.next()) is not None:
                requests.append(request)
        except ReplyError:
            # The requests before the error come first; the next call finds it again.
            if not requests:
                raise

    def _split(self, requests: list[list[bytes]]) -> None:
        """Append the leading requests that are short and have no line ends within arguments.

        Several times as fast as `next`, which parses all others.
        """
        data = self._data[self._at : self._at + _MAX_SPLIT_BYTES]
        tokens = data.split(_CRLF, _MAX_SPLIT_TOKENS)
        # The last token is incomplete, or was not split.
        last = len(tokens) - 1
        at, count = 0, _COUNTS.get(tokens[0])
        while count and (end := at + 1 + 2 * count) <= last:
            for length in range(at + 1, end, 2):
                if _BULK_LENGTHS.get(tokens[length]) != len(tokens[length + 1]):
                    count = None
                    break
            else:
                requests.append(tokens[at + 2 : end : 2])
                at, count = end, _COUNTS.get(tokens[end])
        left = len(tokens[last]) if at == last else sum(map(len, tokens[at:])) + 2 * (last - at)
        self._advance(self._at + len(data) - left)

    def _long_bulk_length(self, line: bytes) -> int:
        if line[:1] != b"$":
            raise ProtocolError(f"expected '$', got {_shown(line)}")
        length = _length(line[1:])
        if length > self.max_message_bytes:
            raise TooBig(f"a message has at most {self.max_message_bytes} bytes, not {length}")
        return length

    def _await_length(self, at: int) -> None:
        if len(self._data) - at >= _MAX_LENGTH_LINE:
            raise ProtocolError(f"no length in {_shown(self._data[at : at + _MAX_LENGTH_LINE])}")
        self._at = at
        self._await(1)

    def _next_line(self) -> list[bytes] | None:
        if (blank := _BLANK_LINES.match(self._data, self._at)) is not None:
            self._advance(blank.end())
            return self.next()
        data, start = self._data, self._at
        longest = min(MAX_LINE_BYTES, self.max_request_bytes)
        end = data.find(b"\n", start, start + longest)
        stop = end if end >= 0 else min(len(data), start + longest)
        # A carriage return is allowed at the end of the line, which may be the end of the data so far.
        control = _CONTROL.search(data, start, stop - (data[stop - 1 : stop] == b"\r"))
        if control is not None:
            raise ProtocolError(f"control character {_shown(control[0])} in a line")
        if end < 0:
            if stop - start >= longest:
                raise ProtocolError(f"no end of line within {longest} bytes")
            self._await(1)
            # After a carriage return, the next byte has to be checked.
            self._line_room = longest - (stop - start) if data[stop - 1] != _RETURN else 0
            return None
        line = data[start:end]
        try:
            line.decode()
        except UnicodeDecodeError:
            raise ProtocolError("a line is not UTF-8") from None
        words = split_line(line)
        # Only now, so that another call finds an error again.
        self._advance(end + 1)
        return words or self.next()


def split_line(line: bytes) -> list[bytes]:
    """Split an inline request into words, and resolve quotes and escapes. Raises ProtocolError."""
    words = []
    at = 0
    line = line.strip(b" \t\r")
    while at < len(line):
        word = _WORD.match(line, at)
        if word is None:
            raise ProtocolError("unbalanced quotes")
        if word["double"] is not None:
            words.append(_ESCAPE.sub(_unescape, word["double"]))
        elif word["single"] is not None:
            words.append(word["single"].replace(b"\\'", b"'"))
        else:
            words.append(word["plain"])
        at = word.end()
    if len(words) > MAX_ARGUMENTS:
        raise ProtocolError(f"a request has 1 to {MAX_ARGUMENTS} arguments, not {len(words)}")
    if words and words[-1] in (b"HTTP/1.0", b"HTTP/1.1"):
        raise ProtocolError("this is not an HTTP server")
    return words


class ReplyParser(_Input):
    """Parses replies into Python values; see `next`."""

    __slots__ = ("_open",)

    _line_end = re.compile(rb"\n")

    def __init__(self) -> None:
        super().__init__()
        # The incomplete arrays, outermost first, with the count of values that each will have. Their values so far are
        # not parsed again when more bytes arrive.
        self._open: list[tuple[list[Reply], int]] = []

    def next(self) -> tuple[Reply] | None:
        """Return the next complete reply, in a tuple of one, or None if there is none yet.

        Simple strings become str, integers int, bulk strings bytes, arrays list, null None, and errors instances of
        ReplyError, which are not raised. Raises ProtocolError if the reply is malformed.
        """
        if self.missing:
            return None
        try:
            value = self._fill() if self._open else self._value()
            if self._open:
                value = self._fill()
        except _Incomplete as incomplete:
            self._await(incomplete.missing)
            self._line_room = incomplete.line_room
            return None
        self._advance(self._at)
        return (value,)

    def _fill(self) -> Reply:
        """Fill the open arrays; return the outermost."""
        while True:
            values, count = self._open[-1]
            while len(values) < count:
                self._at = self._split(self._at, count, values)
                if len(values) < count:
                    value = self._value()
                    if self._open[-1][0] is not values:
                        values, count = self._open[-1]
                    else:
                        values.append(value)
            self._open.pop()
            if not self._open:
                return values
            self._open[-1][0].append(values)

    def _value(self) -> Reply:
        """Return the next value. For an array, only parse its header, and add it to the open arrays."""
        data, at = self._data, self._at
        end = data.find(_CRLF, at)
        if end < 0:
            if len(data) - at > MAX_LINE_BYTES:
                raise ProtocolError("no end of line in a reply")
            # One more than the line may have, so that a line that is too long is parsed, and rejected.
            raise _Incomplete(1, MAX_LINE_BYTES - (len(data) - at) + 1)
        kind = data[at]
        line = data[at + 1 : end]
        end += 2
        if kind == _BULK and line != b"-1":
            return self._bulk(end, _length(line))
        self._at = end
        if kind == _INTEGER:
            return _length(line)
        if kind in (_ARRAY, _BULK):
            if line != b"-1":
                self._begin_array(_length(line))
            return None
        if kind == _SIMPLE:
            return line.decode(errors="replace")
        if kind == _ERROR:
            return from_reply(line.decode(errors="replace"))
        if kind == _NULL and not line:
            return None
        raise ProtocolError(f"not a reply: {_shown(data[at:end])}")

    def _bulk(self, at: int, length: int) -> bytes:
        end = at + length
        if end + 2 > len(self._data):
            raise _Incomplete(end + 2 - len(self._data))
        if self._data[end : end + 2] != _CRLF:
            raise ProtocolError("a bulk string does not end where its length says")
        self._at = end + 2
        return self._data[at:end]

    def _begin_array(self, count: int) -> None:
        if count > _MAX_REPLY_ELEMENTS or len(self._open) >= _MAX_DEPTH:
            raise ProtocolError(f"an array of {count} at depth {len(self._open)}")
        self._open.append(([], count))

    def _split(self, at: int, count: int, values: list[Reply]) -> int:
        """Append the integers and short bulk strings that come next; return where they end.

        Several times as fast as `_value`, which parses all others.
        """
        tokens = self._data[at : at + _MAX_SPLIT_BYTES].split(_CRLF)
        # The last token is incomplete, or was not split.
        last = len(tokens) - 1
        token = 0
        while token < last and len(values) < count:
            line = tokens[token]
            if line[:1] == b":":
                digits = line[1:]
                if not digits.isdigit() or len(digits) > 19 or (digits[0] == _ZERO and len(digits) > 1):
                    break
                values.append(int(digits))
                token += 1
            elif _BULK_LENGTHS.get(line) == len(tokens[token + 1]) and token + 1 < last:
                values.append(tokens[token + 1])
                token += 2
            else:
                break
        return at + sum(map(len, tokens[:token])) + 2 * token


class _Incomplete(Exception):
    def __init__(self, missing: int, line_room: int = 0) -> None:
        super().__init__()
        self.missing = missing
        self.line_room = line_room


def _length(digits: bytes) -> int:
    """Parse a length or an integer: only digits, without leading zeros."""
    if not digits.isdigit() or len(digits) > 19 or (digits[0] == _ZERO and digits != b"0"):
        raise ProtocolError(f"invalid length {_shown(digits)}")
    return int(digits)


def _bad_count(digits: bytes) -> NoReturn:
    raise ProtocolError(f"a request has 1 to {MAX_ARGUMENTS} arguments, not {_length(digits)}")


def _shown(data: bytes) -> str:
    return repr(data[:32])[1:]


# Looking up a short length line both checks and converts it.
_BULK_LENGTHS = {b"$%d" % n: n for n in range(1024)}
_COUNTS = {b"*%d" % n: n for n in range(1, MAX_ARGUMENTS + 1)}

_BLANK_LINES = re.compile(rb"(?:[ \t]*\r?\n)+")
_WORD = re.compile(
    rb"""[ \t]*(?: "(?P<double> (?:[^"\\]|\\.)* )" | '(?P<single> (?:[^'\\]|\\.)* )' | (?P<plain> [^ \t"'][^ \t]*) )
         (?=[ \t]|$)""",
    re.VERBOSE,
)
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)")
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def _unescape(escape: re.Match[bytes]) -> bytes:
    what = escape[1]
    return bytes((int(what[1:], 16),)) if len(what) == 3 else _ESCAPED.get(what, what)


def encode_request(*arguments: bytes) -> bytes:
    """Encode a request, name first, as an array of bulk strings."""
    return b"*%d\r\n%b" % (len(arguments), b"".join(map(encode_bulk, arguments)))


def encode_simple(text: str) -> bytes:
    return b"+%b\r\n" % text.encode()


def encode_error(error: ReplyError) -> bytes:
    """Encode an error as one line, whatever characters its sentence has."""
    sentence = "".join(c if c.isprintable() else "?" for c in str(error))
    return b"-%b %b\r\n" % (error.code.encode(), sentence.encode(errors="replace"))


def encode_integer(number: int) -> bytes:
    return b":%d\r\n" % number


def encode_bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def encode_null(version: int) -> bytes:
    return b"_\r\n" if version == 3 else b"$-1\r\n"


def encode_array(items: Sequence[bytes]) -> bytes:
    """Encode an array of encoded items."""
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def encode_map(version: int, pairs: Iterable[tuple[str, bytes]]) -> bytes:
    """Encode a map from names to encoded values; as a flat array in RESP 2."""
    items = [item for name, value in pairs for item in (encode_bulk(name.encode()), value)]
    if version == 3:
        return b"%%%d\r\n%b" % (len(items) // 2, b"".join(items))
    return encode_array(items)


def encode_messages(messages: Sequence[tuple[int, int, int, bytes, int]]) -> Encoded:
    """Encode a reply to READ from tuples of id, number, age, body, and time to expiry; times are in milliseconds."""
    if not messages:
        return b"*0\r\n"
    # Joined only once, so that a long body is copied once. The parts between two bodies are formatted together.
    message_id, number, age, body, left = messages[0]
    head = b"*%d\r\n:%d\r\n:%d\r\n:%d\r\n$%d\r\n" % (5 * len(messages), message_id, number, age, len(body))
    parts = [head, body]
    for message_id, number, age, body, next_left in messages[1:]:
        parts += (b"\r\n:%d\r\n:%d\r\n:%d\r\n:%d\r\n$%d\r\n" % (left, message_id, number, age, len(body)), body)
        left = next_left
    parts.append(b"\r\n:%d\r\n" % left)
    return (bytearray() if len(parts[1]) > _LONG_REPLY_BYTES else b"").join(parts)
