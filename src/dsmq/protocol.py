"""The codec of PROTOCOL.md: bytes in, requests or replies out, and the other way round.

Nothing here touches a socket. The server parses requests and encodes replies, the client does the reverse.
Both parsers are incremental and strict. That of requests, which come from strangers, knows its limits before it
buffers: a length is checked when it is read, not when its bytes have come.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from dsmq.errors import ProtocolError, ReplyError, TooBig, from_reply

MAX_ARGUMENTS = 64
MAX_LINE_BYTES = 65_536
# What one request may take beside its message: names, options, topic and framing.
REQUEST_OVERHEAD_BYTES = 65_536
MAX_INTEGER = 2**63 - 1

# A length line has a type byte, at most 19 digits and CR LF.
_MAX_LENGTH_LINE = 22
_MAX_DEPTH = 4
_MAX_REPLY_ELEMENTS = 1_048_576

_ARRAY, _BULK, _INTEGER, _SIMPLE, _ERROR, _NULL = b"*$:+-_"
_ZERO = ord("0")
_CRLF = b"\r\n"
# So much is split at once: little enough that it costs nothing to speak of where it is in vain. What is split is not
# held to the limit on requests, which is at least that.
_MAX_SPLIT_BYTES = 4096
_MAX_SPLIT_TOKENS = 448

Reply: TypeAlias = "str | int | bytes | ReplyError | list[Reply] | None"


class _Input:
    """Bytes as they arrive, joined only when there are enough of them to try again.

    Joining at every arrival would copy a message of n bytes n / 65,536 times.
    """

    __slots__ = ("_at", "_chunks", "_data", "incomplete", "missing")

    def __init__(self) -> None:
        self._data = b""
        self._at = 0
        self._chunks: list[bytes] = []
        self.missing = 1
        """How many bytes must come, at least, before there is something more; 0 where there may be something now."""
        self.incomplete = False
        """Whether the beginning of something has come, but not its end."""

    def feed(self, data: bytes) -> None:
        """Take bytes from the other side, as they came."""
        if len(data) < self.missing:
            self._chunks.append(data)
            self.missing -= len(data)
            return
        if self._data:
            data = b"".join((self._data[self._at :], *self._chunks, data))
            self._chunks = []
            self.incomplete = False
        self._data = data
        self._at = self.missing = 0

    def _await(self, size: int) -> None:
        """Note that what stands next lacks so many bytes, at least."""
        self.missing = size
        self.incomplete = True

    def _advance(self, end: int) -> None:
        """Note that all up to here has been used."""
        if end < len(self._data):
            self._at = end
        else:
            self._data = b""
            self._at, self.missing = 0, 1

    def __len__(self) -> int:
        """The bytes held that no request or reply has used yet."""
        return len(self._data) - self._at + sum(map(len, self._chunks))


class RequestParser(_Input):
    """Requests from bytes. After an error it is of no more use: close the connection.

    max_message_bytes bounds a single argument, max_request_bytes all of a request (64 KiB more, unless given). Both may
    be changed between requests.
    """

    __slots__ = ("_searched", "max_message_bytes", "max_request_bytes")

    def __init__(self, max_message_bytes: int, max_request_bytes: int | None = None) -> None:
        super().__init__()
        self.max_message_bytes = max_message_bytes
        self.max_request_bytes = max_request_bytes or max_message_bytes + REQUEST_OVERHEAD_BYTES
        # How much of an inline line that has not ended yet is known to hold no end and nothing forbidden.
        self._searched = 0

    def next(self) -> list[bytes] | None:
        """Return the next whole request, name first, or None until more bytes come.

        Raises ProtocolError where the bytes are no request, TooBig where a length is over its limit.
        """
        data, start = self._data, self._at
        if self.missing:
            return None
        if data[start] != _ARRAY:
            return self._next_line()
        end = data.find(_CRLF, start, start + _MAX_LENGTH_LINE)
        if end < 0:
            self._await_length(start)
            return None
        count = _length(data[start + 1 : end])
        if not 0 < count <= MAX_ARGUMENTS:
            raise ProtocolError(f"a request has 1 to {MAX_ARGUMENTS} arguments, not {count}")
        arguments = []
        longest = self.max_request_bytes
        for _ in range(count):
            at = end + 2
            end = data.find(_CRLF, at, at + _MAX_LENGTH_LINE)
            if end < 0:
                self._await_length(at)
                return None
            length = _BULK_LENGTHS.get(data[at:end])
            if length is None:
                length = self._long_bulk_length(data[at:end])
            at = end + 2
            end = at + length
            if end + 2 - start > longest:
                raise TooBig("the arguments of a request are too long together")
            if end + 2 > len(data):
                self._await(end + 2 - len(data))
                return None
            if data[end : end + 2] != _CRLF:
                raise ProtocolError("a bulk string does not end where its length says")
            arguments.append(data[at:end])
        self._advance(end + 2)
        return arguments

    def batch(self) -> list[list[bytes]]:
        """Return whole requests, in order: many at once if they are short, none if none has come. Raises as `next`."""
        requests: list[list[bytes]] = []
        if self.missing:
            return requests
        if self._data[self._at] == _ARRAY:
            self._split(requests)
        if not requests:
            self._one_by_one(requests)
        return requests

    def _one_by_one(self, requests: list[list[bytes]]) -> None:
        """Append the requests that stand where splitting is in vain, so that it is not tried for each of them."""
        end = self._at + _MAX_SPLIT_BYTES
        try:
            while self._at < end and (request := self.next()) is not None:
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
            raise TooBig(f"{length} bytes, at most {self.max_message_bytes} are taken")
        return length

    def _await_length(self, at: int) -> None:
        if len(self._data) - at >= _MAX_LENGTH_LINE:
            raise ProtocolError(f"no length in {_shown(self._data[at : at + _MAX_LENGTH_LINE])}")
        self._await(1)

    def _next_line(self) -> list[bytes] | None:
        if not self._searched and (blank := _BLANK_LINES.match(self._data, self._at)) is not None:
            self._advance(blank.end())
            return self.next()
        data, start = self._data, self._at
        longest = min(MAX_LINE_BYTES, self.max_request_bytes)
        end = data.find(b"\n", start + self._searched, start + longest)
        stop = end if end >= 0 else min(len(data), start + longest)
        # A carriage return is allowed at the end, which may not have come yet.
        control = _CONTROL.search(data, start + self._searched, stop - (data[stop - 1 : stop] == b"\r"))
        if control is not None:
            raise ProtocolError(f"control character {_shown(control[0])} in a line")
        if end < 0:
            self._await_line(stop - start, longest)
            return None
        line = data[start:end]
        try:
            line.decode()
        except UnicodeDecodeError:
            raise ProtocolError("a line is not UTF-8") from None
        words = split_line(line)
        # Only now: an error is found again, whenever it is asked for.
        self._advance(end + 1)
        self._searched = 0
        return words or self.next()

    def _await_line(self, size: int, longest: int) -> None:
        if size >= longest:
            raise ProtocolError(f"no end of line within {longest} bytes")
        # What has been searched once is not searched again, when the next byte comes.
        self._searched = max(0, size - 1)
        self._await(1)


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

    __slots__ = ()

    def next(self) -> tuple[Reply] | None:
        """Return the next whole reply in a tuple of one, or None until more bytes come.

        Simple strings are str, integers int, bulk strings bytes, arrays lists, null None, and errors
        instances of ReplyError, not raised. Raises ProtocolError where the bytes are no reply.
        """
        if self.missing:
            return None
        try:
            value, end = self._value(self._at, 0)
        except _Incomplete as incomplete:
            self._await(incomplete.missing)
            return None
        self._advance(end)
        return (value,)

    def _value(self, at: int, depth: int) -> tuple[Reply, int]:
        data = self._data
        end = data.find(_CRLF, at)
        if end < 0:
            if len(data) - at > MAX_LINE_BYTES:
                raise ProtocolError("no end of line in a reply")
            raise _Incomplete(1)
        kind = data[at]
        line = data[at + 1 : end]
        at = end + 2
        if kind == _INTEGER:
            return _length(line), at
        if kind == _BULK:
            return (None, at) if line == b"-1" else self._bulk(at, _length(line))
        if kind == _ARRAY:
            return (None, at) if line == b"-1" else self._array(at, _length(line), depth)
        if kind == _SIMPLE:
            return line.decode(errors="replace"), at
        if kind == _ERROR:
            return from_reply(line.decode(errors="replace")), at
        if kind == _NULL and not line:
            return None, at
        raise ProtocolError(f"{_shown(data[at - len(line) - 3 : at])} is the start of no reply")

    def _bulk(self, at: int, length: int) -> tuple[bytes, int]:
        end = at + length
        if end + 2 > len(self._data):
            raise _Incomplete(end + 2 - len(self._data))
        if self._data[end : end + 2] != _CRLF:
            raise ProtocolError("a bulk string does not end where its length says")
        return self._data[at:end], end + 2

    def _array(self, at: int, count: int, depth: int) -> tuple[list[Reply], int]:
        if count > _MAX_REPLY_ELEMENTS or depth >= _MAX_DEPTH:
            raise ProtocolError(f"an array of {count} at depth {depth}")
        values: list[Reply] = []
        while len(values) < count:
            at = self._split(at, count, values)
            if len(values) < count:
                value, at = self._value(at, depth + 1)
                values.append(value)
        return values, at

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
            digits = line[1:]
            if line[:1] == b":" and digits.isdigit() and len(digits) < 20 and (digits[0] != _ZERO or digits == b"0"):
                values.append(int(digits))
                token += 1
            elif _BULK_LENGTHS.get(line) == len(tokens[token + 1]) and token + 1 < last:
                values.append(tokens[token + 1])
                token += 2
            else:
                break
        return at + sum(map(len, tokens[:token])) + 2 * token


class _Incomplete(Exception):
    def __init__(self, missing: int) -> None:
        super().__init__()
        self.missing = missing


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

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
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


def encode_messages(messages: Sequence[tuple[int, int, int, bytes, int]]) -> bytes:
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
    return b"".join(parts)
