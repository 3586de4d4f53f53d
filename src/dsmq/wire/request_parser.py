"""Parses requests. Input is untrusted, so each length is checked before any of its bytes are buffered."""

from __future__ import annotations

import re
from typing import NoReturn

from dsmq.errors import ProtocolError, ReplyError, TooBig
from dsmq.wire.limits import MANY_NAMES, MAX_ARGUMENTS, MAX_LINE_BYTES, REQUEST_OVERHEAD_BYTES
from dsmq.wire.resp import ARRAY, CRLF, MAX_SPLIT_BYTES, Input, parse_length, quoted, short_length

# A type byte, up to 19 digits, and CR LF.
_MAX_LENGTH_LINE = 22
_MAX_SPLIT_TOKENS = 448
_RETURN = ord("\r")
# Requests that can't be split are parsed more slowly; this many take about 0.1 ms.
_MAX_ONE_BY_ONE = 16
_short_count = {b"*%d" % n: n for n in range(1, MAX_ARGUMENTS + 1)}.get

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_BLANK_LINES = re.compile(rb"(?:[ \t]*\r?\n)+")
_WORD = re.compile(
    rb"""[ \t]*(?: "(?P<double> [^"\\]*+(?:\\.[^"\\]*+)*+ )" | '(?P<single> [^'\\]*+(?:\\.[^'\\]*+)*+ )' |
         (?P<plain> [^ \t"'][^ \t]*+) ) (?=[ \t]|$)""",
    re.VERBOSE,
)
# A backslash before a character that means itself. Escaped backslashes must have been replaced before.
_NO_ESCAPE = re.compile(rb'\\(?!["nrt]|x[0-9a-fA-F]{2})')


class RequestParser(Input):
    """Parses requests. It can't continue after an error: close the connection.

    max_message_bytes limits each argument, max_request_bytes the whole request (default: 64 KiB more), and
    max_arguments the arguments of an MREAD. All may be changed between requests.
    """

    __slots__ = (
        *("_arguments", "_body", "_count", "_size"),
        *("max_arguments", "max_message_bytes", "max_request_bytes"),
    )

    _line_end = _CONTROL

    def __init__(self, max_message_bytes: int, max_request_bytes: int | None = None) -> None:
        super().__init__()
        self.max_message_bytes, self.max_arguments = max_message_bytes, MAX_ARGUMENTS
        self.max_request_bytes = max_request_bytes or max_message_bytes + REQUEST_OVERHEAD_BYTES
        # An incomplete request: its arguments so far, their final number, and the bytes consumed.
        self._arguments: list[bytes] = []
        self._count = self._size = 0
        # If the data begins with an incomplete argument, the offset of its body; otherwise 0.
        self._body = 0

    def __len__(self) -> int:
        return super().__len__() + self._size

    @property
    def buffered(self) -> int:
        """The bytes in memory, including bytes that are consumed but not freed yet."""
        return len(self._data) + self._chunk_bytes + self._size

    def next(self) -> list[bytes] | None:
        """Return the next complete request, name first, or None if there is none. Raises ProtocolError or TooBig."""
        if self.missing:
            return None
        if not self._count:
            if self._data[self._at] != ARRAY:
                return self._next_line()
            if not self._parse_count():
                return None
        data, arguments, count = self._data, self._arguments, self._count
        while len(arguments) < count:
            at = self._at
            end = data.find(CRLF, at, at + _MAX_LENGTH_LINE)
            if end < 0:
                self._await_length()
                return None
            length = short_length(data[at:end])
            if length is None:
                length = self._long_length(data[at:end])
            start, end = end + 2, end + 2 + length + 2
            if self._size + end - at > self.max_request_bytes:
                raise TooBig("the total length of the request's arguments is too high")
            if end > len(data):
                self._body = start - at
                self._await(end - len(data))
                return None
            if data[end - 2 : end] != CRLF:
                raise ProtocolError("no CR LF after a bulk string")
            arguments.append(data[start : end - 2])
            if count > MAX_ARGUMENTS:
                self._check_count(arguments, count)
            self._at = end
            self._size += end - at
        self._arguments, self._count, self._size = [], 0, 0
        self._advance(self._at)
        return arguments

    def _parse_count(self) -> bool:
        """Begin an array; return whether its first line was complete."""
        at = self._at
        end = self._data.find(CRLF, at, at + _MAX_LENGTH_LINE)
        if end < 0:
            self._await_length()
            return False
        self._count = _short_count(self._data[at:end]) or parse_length(self._data[at + 1 : end])
        if not 0 < self._count <= self.max_arguments:
            _wrong_count(self._count)
        self._at, self._size = end + 2, end + 2 - at
        return True

    def _check_count(self, arguments: list[bytes], count: int) -> None:
        if count > MAX_ARGUMENTS and not (arguments[0].upper() == MANY_NAMES and count <= self.max_arguments):
            _wrong_count(count)

    def _await_length(self) -> None:
        start = self._data[self._at : self._at + _MAX_LENGTH_LINE]
        if len(start) == _MAX_LENGTH_LINE:
            raise ProtocolError(f"no length in {quoted(start)}")
        self._await(1)

    def _long_length(self, line: bytes) -> int:
        if line[:1] != b"$":
            raise ProtocolError(f"expected '$', got {quoted(line)}")
        length = parse_length(line[1:])
        if length > self.max_message_bytes:
            raise TooBig(f"a message may have at most {self.max_message_bytes} bytes, not {length}")
        return length

    def _join(self, data: bytes) -> bytes:
        """Join the incomplete argument separately, so that a long one is copied once; return the bytes after it."""
        body, self._body = self._body, 0
        held = len(self._data) + self._chunk_bytes
        needed = body + int(self._data[1 : body - 2]) - held if body else -1
        if not (0 <= needed <= len(data) - 2 and data[needed : needed + 2] == CRLF):
            return super()._join(data)
        self._arguments.append(b"".join((memoryview(self._data)[body:], *self._chunks, memoryview(data)[:needed])))
        self._size += held + needed + 2
        return data[needed + 2 :]

    def batch(self) -> list[list[bytes]]:
        """Return some complete requests, in order; empty if there are none yet. Raises as `next` does."""
        requests: list[list[bytes]] = []
        if self.missing:
            return requests
        if not self._count and self._data[self._at] == ARRAY:
            self._split(requests)
        if not requests:
            self._one_by_one(requests)
        return requests

    def _one_by_one(self, requests: list[list[bytes]]) -> None:
        """Append several requests that can't be split, without trying to split each of them."""
        end = self._at + MAX_SPLIT_BYTES
        try:
            while self._at < end and len(requests) < _MAX_ONE_BY_ONE and (request := self.next()) is not None:
                requests.append(request)
        except ReplyError:
            # Return the requests before the error first; the next call finds it again.
            if not requests:
                raise

    def _split(self, requests: list[list[bytes]]) -> None:
        """Append the leading requests that are short and have no line ends within arguments.

        Several times faster than `next`, which parses all others.
        """
        data = self._data[self._at : self._at + MAX_SPLIT_BYTES]
        tokens = data.split(CRLF, _MAX_SPLIT_TOKENS)
        # The last token is incomplete or was not split.
        last = len(tokens) - 1
        at, count = 0, _short_count(tokens[0])
        while count and (end := at + 1 + 2 * count) <= last:
            for length in range(at + 1, end, 2):
                if short_length(tokens[length]) != len(tokens[length + 1]):
                    count = None
                    break
            else:
                requests.append(tokens[at + 2 : end : 2])
                at, count = end, _short_count(tokens[end])
        left = len(tokens[last]) if at == last else sum(map(len, tokens[at:])) + 2 * (last - at)
        self._advance(self._at + len(data) - left)

    def _next_line(self) -> list[bytes] | None:
        if (blank := _BLANK_LINES.match(self._data, self._at)) is not None:
            self._advance(blank.end())
            return self.next()
        data, start = self._data, self._at
        longest = min(MAX_LINE_BYTES, self.max_request_bytes)
        end = data.find(b"\n", start, start + longest)
        stop = end if end >= 0 else min(len(data), start + longest)
        # A carriage return at the end of the data may be part of the line end.
        control = _CONTROL.search(data, start, stop - (data[stop - 1 : stop] == b"\r"))
        if control is not None:
            raise ProtocolError(f"control character {quoted(control[0])} in a line")
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
        words = split_line(line, self.max_arguments)
        self._check_count(words, len(words))
        # Consume the line only now, so that another call finds the same error.
        self._advance(end + 1)
        return words or self.next()


def split_line(line: bytes, most: int = MAX_ARGUMENTS) -> list[bytes]:
    """Split an inline request into words and resolve quotes and escapes.

    Raises ProtocolError if that is impossible or if there are more than `most` words.
    """
    words: list[bytes] = []
    at = 0
    line = line.strip(b" \t\r")
    while at < len(line):
        word = _WORD.match(line, at)
        if word is None:
            raise ProtocolError("unbalanced quotes")
        if len(words) == most:
            # Don't split the rest of the line first, which takes many milliseconds.
            _wrong_count()
        if word["double"] is not None:
            words.append(_unescape(word["double"]))
        elif word["single"] is not None:
            words.append(word["single"].replace(b"\\'", b"'"))
        else:
            words.append(word["plain"])
        at = word.end()
    if words and words[-1] in (b"HTTP/1.0", b"HTTP/1.1"):
        raise ProtocolError("this is not an HTTP server")
    return words


def _wrong_count(count: int | None = None) -> NoReturn:
    about = f"a request should have 1 to {MAX_ARGUMENTS} arguments"
    raise ProtocolError(about if count is None else f"{about}, not {count}")


def _unescape(text: bytes) -> bytes:
    """Resolve escapes without calling a function for each, because a line may have tens of thousands."""
    text = _NO_ESCAPE.sub(b"", text.replace(rb"\\", rb"\x5c"))
    return text.decode("unicode_escape").encode("latin-1")
