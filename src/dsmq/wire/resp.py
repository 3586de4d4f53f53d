"""The codec of PROTOCOL.md: bytes in, requests or replies out, and the other way round.

Nothing here touches a socket. The server parses requests and encodes replies, the client does the reverse.
Both parsers are incremental and strict. That of requests, which come from strangers, knows its limits before it
buffers: a length is checked when it is read, not when its bytes have come.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, TypeAlias

from dsmq.errors import ProtocolError, ReplyError, TooBig, from_reply

MAX_ARGUMENTS = 64
MAX_LINE_BYTES = 65_536
# What one request may take beside its message: names, options, topic and framing.
REQUEST_OVERHEAD_BYTES = 65_536
MAX_INTEGER = 2**63 - 1

# A length line has a type byte, at most 19 digits and CR LF.
_MAX_LENGTH_LINE = 22
# That of COMMAND DOCS, and one for EXEC around it.
_MAX_DEPTH = 9
_MAX_REPLY_ELEMENTS = 1_048_576

_ARRAY, _BULK, _INTEGER, _SIMPLE, _ERROR, _NULL = b"*$:+-_"
_ZERO = ord("0")
_RETURN = ord("\r")
_CRLF = b"\r\n"
# So much is split at once: little enough that it costs nothing to speak of where it is in vain. What is split is not
# held to the limit on requests, which is at least that.
_MAX_SPLIT_BYTES = 4096
_MAX_SPLIT_TOKENS = 448
# Lines are slower to parse: as many at once take about 0.1 ms.
_MAX_ONE_BY_ONE = 16
# Pieces that arrive are kept as they are from this size on.
_MIN_CHUNK_BYTES = 4096

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

# Above this, a reply is made in the kind of buffer that a connection sends from, so that it is not copied once more.
_LONG_REPLY_BYTES = 65_536

Encoded: TypeAlias = bytes | bytearray
Reply: TypeAlias = "str | int | bytes | ReplyError | list[Reply] | None"


class _Input:
    """Bytes as they arrive, joined only when there are enough of them to try again.

    Joining at every arrival would copy a message of n bytes n / 65,536 times, and n times if it comes byte by byte.
    """

    __slots__ = ("_at", "_chunk_bytes", "_chunks", "_data", "_line_room", "incomplete", "missing")

    # What ends the wait for the rest of a line.
    _line_end: ClassVar[re.Pattern[bytes]]

    def __init__(self) -> None:
        self._data = b""
        self._at = 0
        self._chunks: list[bytes | bytearray] = []
        self._chunk_bytes = 0
        # While the end of a line is missing: how many bytes may come without it.
        self._line_room = 0
        self.missing = 1
        """How many bytes must come, at least, before there is something more; 0 where there may be something now."""
        self.incomplete = False
        """Whether the beginning of something has come, but not its end."""

    def feed(self, data: bytes) -> None:
        """Take bytes from the other side, as they came."""
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
        """Put bytes aside. Small pieces are gathered: as objects of their own they would take many times their size."""
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
        """Note that what stands next lacks so many bytes, at least."""
        self.missing = size
        self.incomplete = True
        if self._at:
            # What has been used is not kept in memory until the rest comes.
            self._data = self._data[self._at :]
            self._at = 0

    def _advance(self, end: int) -> None:
        """Note that all up to here has been used."""
        if end < len(self._data):
            self._at = end
        else:
            self._data = b""
            self._at, self.missing = 0, 1

    def __len__(self) -> int:
        """The bytes that no request or value has used yet."""
        return len(self._data) - self._at + self._chunk_bytes


class RequestParser(_Input):
    """Requests from bytes. After an error it is of no more use: close the connection.

    max_message_bytes bounds a single argument, max_request_bytes all of a request (64 KiB more, unless given). Both may
    be changed between requests.
    """

    __slots__ = ("_arguments", "_body", "_count", "_size", "max_message_bytes", "max_request_bytes")

    _line_end = _CONTROL

    def __init__(self, max_message_bytes: int, max_request_bytes: int | None = None) -> None:
        super().__init__()
        self.max_message_bytes = max_message_bytes
        self.max_request_bytes = max_request_bytes or max_message_bytes + REQUEST_OVERHEAD_BYTES
        # Of a request that has come in part: the arguments that are whole, how many there will be, and the bytes that
        # they took. They are not parsed again when more comes.
        self._arguments: list[bytes] | None = None
        self._count = self._size = 0
        # Where in the data the argument begins of which the rest is missing.
        self._body = 0

    def __len__(self) -> int:
        return len(self._data) - self._at + self._chunk_bytes + self._size

    @property
    def buffered(self) -> int:
        """The bytes in memory, those that have been used and not been freed yet among them."""
        return len(self._data) + self._chunk_bytes + self._size

    def next(self) -> list[bytes] | None:
        """Return the next whole request, name first, or None until more bytes come.

        Raises ProtocolError where the bytes are no request, TooBig where a length is over its limit.
        """
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
            count = _length(data[at + 1 : end])
            if not 0 < count <= MAX_ARGUMENTS:
                raise ProtocolError(f"a request has 1 to {MAX_ARGUMENTS} arguments, not {count}")
            arguments, size, at = [], end + 2 - at, end + 2
        while len(arguments) < count:
            end = data.find(_CRLF, at, at + _MAX_LENGTH_LINE)
            if end < 0:
                self._suspend(arguments, count, size, at)
                self._await_length(at)
                return None
            length = _BULK_LENGTHS.get(data[at:end])
            if length is None:
                length = self._long_bulk_length(data[at:end])
            start = end + 2
            end = start + length
            size += end + 2 - at
            if size > self.max_request_bytes:
                raise TooBig("the arguments of a request are too long together")
            if end + 2 > len(data):
                self._suspend(arguments, count, size - (end + 2 - at), at)
                self._await(end + 2 - len(data))
                self._body = start - at
                return None
            if data[end : end + 2] != _CRLF:
                raise ProtocolError("a bulk string does not end where its length says")
            arguments.append(data[start:end])
            at = end + 2
        self._arguments, self._size = None, 0
        self._advance(at)
        return arguments

    def _join(self, data: bytes) -> bytes:
        """Join the argument that was missing, alone: so a long one is copied once. What stands behind it is left."""
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

    def _suspend(self, arguments: list[bytes], count: int, size: int, at: int) -> None:
        """Remember how far a request has come that is not whole yet."""
        self._arguments, self._count, self._size = arguments, count, size
        self._at = at

    def batch(self) -> list[list[bytes]]:
        """Return whole requests, in order: many at once if they are short, none if none has come. Raises as `next`."""
        requests: list[list[bytes]] = []
        if self.missing:
            return requests
        if self._arguments is None and self._data[self._at] == _ARRAY:
            self._split(requests)
        if not requests:
            self._one_by_one(requests)
        return requests

    def _one_by_one(self, requests: list[list[bytes]]) -> None:
        """Append the requests that stand where splitting is in vain, so that it is not tried for each of them."""
        end = self._at + _MAX_SPLIT_BYTES
        try:
            while self._at < end and len(requests) < _MAX_ONE_BY_ONE and (request := self.next()) is not None:
                requests.append(request)
        except ReplyError:
            # What stands before the error comes first; then it is found again.
            if not requests:
                raise

    def _split(self, requests: list[list[bytes]]) -> None:
        """Append the short requests that stand in front: those whose parts the line ends alone tell apart.

        Several times as fast as `next`, which takes all the others.
        """
        data = self._data[self._at : self._at + _MAX_SPLIT_BYTES]
        tokens = data.split(_CRLF, _MAX_SPLIT_TOKENS)
        # Behind the last line end stands what has not been split, or not come.
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
        # A carriage return is allowed at the end, which may not have come yet.
        control = _CONTROL.search(data, start, stop - (data[stop - 1 : stop] == b"\r"))
        if control is not None:
            raise ProtocolError(f"control character {_shown(control[0])} in a line")
        if end < 0:
            if stop - start >= longest:
                raise ProtocolError(f"no end of line within {longest} bytes")
            self._await(1)
            # Not behind a carriage return: the next byte has to be looked at.
            self._line_room = longest - (stop - start) if data[stop - 1] != _RETURN else 0
            return None
        line = data[start:end]
        try:
            line.decode()
        except UnicodeDecodeError:
            raise ProtocolError("a line is not UTF-8") from None
        words = split_line(line)
        # Only now: an error is found again, whenever it is asked for.
        self._advance(end + 1)
        return words or self.next()


def split_line(line: bytes) -> list[bytes]:
    """Split an inline request into its words, quotes and escapes undone. Raises ProtocolError."""
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
    """Replies from bytes, as Python values: see `next`."""

    __slots__ = ("_open",)

    _line_end = re.compile(rb"\n")

    def __init__(self) -> None:
        super().__init__()
        # The arrays that have come in part, the outermost first, and how many values each will have. What they hold
        # already is not parsed again when more comes.
        self._open: list[tuple[list[Reply], int]] = []

    def next(self) -> tuple[Reply] | None:
        """Return the next whole reply in a tuple of one, or None until more bytes come.

        Simple strings are str, integers int, bulk strings bytes, arrays lists, null None, and errors
        instances of ReplyError, not raised. Raises ProtocolError where the bytes are no reply.
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
        """Return the value that stands next. Of an array it takes only the beginning, which is open then."""
        data, at = self._data, self._at
        end = data.find(_CRLF, at)
        if end < 0:
            if len(data) - at > MAX_LINE_BYTES:
                raise ProtocolError("no end of line in a reply")
            # One more than the line may have, so that what is too long is parsed, and refused.
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
        raise ProtocolError(f"{_shown(data[at:end])} is the start of no reply")

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
        """Append the integers and short bulk strings that stand next; return where they end.

        Several times as fast as `_value`, which takes all the others.
        """
        tokens = self._data[at : at + _MAX_SPLIT_BYTES].split(_CRLF)
        # Behind the last line end stands what has not been split, or not come.
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
    """Return a length or an integer, canonical: digits alone, without leading zeros."""
    if not digits.isdigit() or len(digits) > 19 or (digits[0] == _ZERO and digits != b"0"):
        raise ProtocolError(f"{_shown(digits)} is not a length")
    return int(digits)


def _shown(data: bytes) -> str:
    return repr(data[:32])[1:]


# Looking a short length line up is both the check and the conversion.
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
    """Encode an error as one line, whatever its sentence holds."""
    sentence = "".join(c if c.isprintable() else "?" for c in str(error))
    return b"-%b %b\r\n" % (error.code.encode(), sentence.encode(errors="replace"))


def encode_integer(number: int) -> bytes:
    return b":%d\r\n" % number


def encode_bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def encode_null(version: int) -> bytes:
    return b"_\r\n" if version == 3 else b"$-1\r\n"


def encode_array(items: Sequence[bytes]) -> bytes:
    """Encode an array of items that are encoded already."""
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def encode_map(version: int, pairs: Iterable[tuple[str, bytes]]) -> bytes:
    """Encode a map from names to encoded values; in RESP 2 it is a flat array."""
    items = [item for name, value in pairs for item in (encode_bulk(name.encode()), value)]
    if version == 3:
        return b"%%%d\r\n%b" % (len(items) // 2, b"".join(items))
    return encode_array(items)


def encode_messages(messages: Sequence[tuple[int, int, int, bytes, int]]) -> Encoded:
    """Encode the reply to READ from tuples of id, number, age, body, and time left; times are in milliseconds."""
    if not messages:
        return b"*0\r\n"
    # Joined once: a long body is copied once. What stands between two bodies is formatted in one go.
    message_id, number, age, body, left = messages[0]
    head = b"*%d\r\n:%d\r\n:%d\r\n:%d\r\n$%d\r\n" % (5 * len(messages), message_id, number, age, len(body))
    parts = [head, body]
    for message_id, number, age, body, next_left in messages[1:]:
        parts += (b"\r\n:%d\r\n:%d\r\n:%d\r\n:%d\r\n$%d\r\n" % (left, message_id, number, age, len(body)), body)
        left = next_left
    parts.append(b"\r\n:%d\r\n" % left)
    return (bytearray() if len(parts[1]) > _LONG_REPLY_BYTES else b"").join(parts)
