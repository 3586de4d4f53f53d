"""The codec: bytes split in any way give the same requests and replies, or an error."""

from __future__ import annotations

import itertools
import string
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dsmq.errors import BY_CODE, ProtocolError, ReplyError, TooBig
from dsmq.wire.limits import MAX_ARGUMENTS, MAX_DEPTH, MAX_INTEGER, MAX_LINE_BYTES, REQUEST_OVERHEAD_BYTES
from dsmq.wire.request_parser import RequestParser, split_line
from dsmq.wire.resp import (
    Reply,
    ReplyParser,
    encode_array,
    encode_bulk,
    encode_error,
    encode_integer,
    encode_messages,
    encode_null,
    encode_option,
    encode_read,
    encode_request,
    encode_simple,
    encode_value,
)

LIMIT = 4096
HTTP_VERSIONS = (b"HTTP/1.0", b"HTTP/1.1")

Parser = RequestParser | ReplyParser


def drain(parser: Parser) -> list[object]:
    """Return all complete items; each consumes some bytes."""
    taken: list[object] = []
    held = len(parser)
    while (item := parser.next()) is not None:
        assert len(parser) < held
        held = len(parser)
        taken.append(item[0] if isinstance(item, tuple) else item)
    return taken


def parse(parser: Parser, pieces: Iterable[bytes]) -> list[object]:
    taken: list[object] = []
    for piece in pieces:
        parser.feed(piece)
        taken += drain(parser)
    return taken


def outcome(parser: Parser, pieces: Iterable[bytes]) -> tuple[str, type | None]:
    """The items and the error after them. Requests are parsed both one by one and in batches, as in the server."""
    pieces = list(pieces)
    result = _outcome(parser, pieces, lambda: [] if (item := parser.next()) is None else [item])
    if isinstance(parser, RequestParser):
        batching = RequestParser(parser.max_message_bytes)
        assert _outcome(batching, pieces, batching.batch) == result
    return result


def _outcome(parser: Parser, pieces: list[bytes], take: Callable[[], Sequence[object]]) -> tuple[str, type | None]:
    taken: list[object] = []
    try:
        for piece in pieces:
            parser.feed(piece)
            while items := take():
                taken += items
    except (ProtocolError, TooBig) as error:
        return repr(taken), type(error)
    return repr(taken), None


def requests(*pieces: bytes) -> list[object]:
    return parse(RequestParser(LIMIT), pieces)


def replies(*pieces: bytes) -> list[object]:
    return parse(ReplyParser(), pieces)


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def every_split(data: bytes) -> Iterable[tuple[bytes, bytes]]:
    return ((data[:at], data[at:]) for at in range(len(data) + 1))


def cut(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def in_pieces_of(size: int, data: bytes) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


# Lengths below 1,024 are looked up in a table, longer ones are not.
arguments = st.binary(max_size=12) | st.integers(1020, 1030).map(
    lambda size: b"\r\n$3*" * (size // 5) + b"x" * (size % 5)
)
whole_requests = st.lists(arguments, min_size=1, max_size=5)
cuts = st.lists(st.integers(0, 20_000), max_size=12)


# Requests


@given(request=whole_requests)
@settings(max_examples=50, deadline=None)
def test_request_round_trips_at_every_split(request: list[bytes]) -> None:
    data = encode_request(*request)
    for pieces in every_split(data):
        assert requests(*pieces) == [request]


@given(batch=st.lists(whole_requests, max_size=5))
@settings(max_examples=25, deadline=None)
def test_pipelined_requests_parse_in_order_byte_by_byte(batch: list[list[bytes]]) -> None:
    data = b"".join(encode_request(*request) for request in batch)
    assert requests(*bytewise(data)) == batch


@given(batch=st.lists(whole_requests, max_size=6), cuts=cuts)
@settings(deadline=None)
def test_pipelined_requests_parse_in_order_at_any_split(batch: list[list[bytes]], cuts: list[int]) -> None:
    data = b"".join(encode_request(*request) for request in batch)
    assert outcome(RequestParser(LIMIT), cut(data, cuts)) == (repr(batch), None)


@pytest.mark.parametrize("body", [b"", b"short", b"a\r\n*1\r\n$4\r\nPING\r\n", b"x" * 1023, b"x" * 1024, b"\r\n" * 600])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 300])
def test_many_requests_at_once_parse_in_order(body: bytes, count: int) -> None:
    batch = [[b"PUT", b"t%d" % number, body] for number in range(count)]
    data = b"".join(encode_request(*request) for request in batch)
    assert outcome(RequestParser(LIMIT), [data + b"*2\r\n$4\r\nPI", b"NG\r\n$0\r\n\r\n"]) == (
        repr([*batch, [b"PING", b""]]),
        None,
    )


@given(batch=st.lists(whole_requests, max_size=6), cuts=cuts)
@settings(deadline=None)
def test_data_fed_without_reading_is_parsed_later(batch: list[list[bytes]], cuts: list[int]) -> None:
    parser = RequestParser(LIMIT)
    for piece in cut(b"".join(encode_request(*request) for request in batch), cuts):
        parser.feed(piece)
    assert drain(parser) == batch


def test_request_encodes_as_array_of_bulk_strings() -> None:
    assert encode_request(b"PUT", b"greetings", b"") == b"*3\r\n$3\r\nPUT\r\n$9\r\ngreetings\r\n$0\r\n\r\n"


def test_read_encodes_as_any_request() -> None:
    assert encode_read("café", 12) == encode_request(b"READ", "café".encode(), b"12")
    options = encode_option(b"COUNT", 10) + encode_bulk(b"LATEST")
    assert encode_read("t", 0, options, 3) == encode_request(b"READ", b"t", b"0", b"COUNT", b"10", b"LATEST")


@given(batch=st.lists(whole_requests, min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_incomplete_and_len_report_buffered_data(batch: list[list[bytes]]) -> None:
    frames = [encode_request(*request) for request in batch]
    parser = RequestParser(LIMIT)
    for frame in frames:
        for at, byte in enumerate(bytewise(frame), 1):
            parser.feed(byte)
            assert len(parser) == at
            assert len(drain(parser)) == (at == len(frame))
            assert len(parser) == at % len(frame)
            assert parser.incomplete == (at < len(frame))


@pytest.mark.parametrize("parser", [RequestParser(LIMIT), ReplyParser()], ids=["requests", "replies"])
def test_empty_input_gives_no_request(parser: Parser) -> None:
    for _ in range(2):
        assert parser.next() is None
        assert (len(parser), parser.incomplete) == (0, False)
        parser.feed(b"")


def test_len_counts_untaken_requests() -> None:
    ping = encode_request(b"PING")
    parser = RequestParser(LIMIT)
    parser.feed(ping * 3 + ping[:5])
    assert (len(parser), parser.incomplete) == (3 * len(ping) + 5, False)
    parser.next()
    assert (len(parser), parser.incomplete) == (2 * len(ping) + 5, False)
    assert len(drain(parser)) == 2
    assert (len(parser), parser.incomplete) == (5, True)


@pytest.mark.parametrize("piece", [b"P", b"PING", b"PING\r", b" ", b"\r", b"*", b"*1\r\n", b"*1\r\n$4\r\nPI"])
def test_any_prefix_is_incomplete(piece: bytes) -> None:
    parser = RequestParser(LIMIT)
    parser.feed(piece)
    assert parser.next() is None
    assert (parser.incomplete, len(parser)) == (True, len(piece))


def joined(parser: Parser) -> bytes:
    """The buffered bytes that were joined: a new object if they were copied since."""
    return parser._data


def joins(parser: Parser, pieces: list[bytes]) -> int:
    """Feed the pieces of one item; return how often the parser joined what it had buffered."""
    count = 0
    for number, piece in enumerate(pieces, 1):
        before = joined(parser)
        parser.feed(piece)
        count += joined(parser) is not before
        assert (parser.next() is not None) == (number == len(pieces))
    return count


def test_large_request_in_pieces_is_copied_once() -> None:
    data = encode_request(b"PUT", b"t", b"x" * 1_000_000)
    # Once for the first piece, which is only kept, and once for the last.
    assert joins(RequestParser(1_000_000), in_pieces_of(1000, data)) == 2


def test_large_reply_in_pieces_is_copied_once() -> None:
    data = encode_array([encode_integer(1), encode_bulk(b"x" * 1_000_000)])
    assert joins(ReplyParser(), in_pieces_of(1000, data)) == 2


def test_message_byte_by_byte_is_joined_twice() -> None:
    data = encode_request(b"x" * 5000)
    assert joins(RequestParser(5000), bytewise(data)) == len(b"*1\r\n$5000\r\n") + 1


# Inline requests


def double_quoted(word: bytes) -> bytes:
    named = {ord("\n"): b"\\n", ord("\r"): b"\\r", ord("\t"): b"\\t", ord('"'): b'\\"', ord("\\"): b"\\\\"}
    plain = string.ascii_letters.encode() + b" '*$"
    return b'"%b"' % b"".join(named.get(c) or (bytes((c,)) if c in plain else b"\\x%02X" % c) for c in word)


def single_quoted(word: bytes) -> bytes:
    return b"'%b'" % word.replace(b"'", b"\\'")


texts = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="\\"), max_size=8).map(str.encode)
# An encoded word and the word itself.
words = st.one_of(
    texts.filter(lambda word: word and word[:1] not in b"'\"").map(lambda word: (word, word)),
    st.binary(max_size=8).map(lambda word: (double_quoted(word), word)),
    texts.filter(lambda word: b'"' not in word).map(lambda word: (b'"%b \t"' % word, word + b" \t")),
    texts.map(lambda word: (single_quoted(word + b" "), word + b" ")),
)
blanks = st.sampled_from([b" ", b"\t", b"  ", b" \t "])


@given(words=st.lists(words, max_size=5), blank=blanks, end=st.sampled_from([b"\n", b"\r\n", b" \r\n"]))
@settings(deadline=None)
def test_inline_request_parses_at_every_split(words: list[tuple[bytes, bytes]], blank: bytes, end: bytes) -> None:
    meant = [b"PUT", *(word for _, word in words)]
    assume(meant[-1] not in HTTP_VERSIONS)
    data = blank.join((b"PUT", *(written for written, _ in words))) + end
    for pieces in every_split(data):
        assert requests(*pieces) == [meant]
    assert requests(*bytewise(blank + data + data)) == [meant, meant]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        (b"", []),
        (b" \t\r", []),
        (b"PING", [b"PING"]),
        (b'""', [b""]),
        (b"''", [b""]),
        (b'PUT t "a b"', [b"PUT", b"t", b"a b"]),
        (b'"\\n\\r\\t\\"\\\\\\x41\\xff\\xfF"', [b'\n\r\t"\\A\xff\xff']),
        (b'"\\q\\x4g"', [b"qx4g"]),
        (b'"\\\\n\\a\\101\\N{DIGIT ONE}\\u0041\\x4\\x31\\x5cn\xc3\xa9"', [b"\\na101N{DIGIT ONE}u0041x41\\n\xc3\xa9"]),
        (b"'it\\'s'", [b"it's"]),
        (b"'\\n\\x41\"'", [b'\\n\\x41"']),
        (b"it's 5\"", [b"it's", b'5"']),
        (b"\\n", [b"\\n"]),
    ],
)
def test_inline_words_quotes_and_escapes_are_parsed(line: bytes, meant: list[bytes]) -> None:
    assert split_line(line) == meant


@pytest.mark.parametrize("line", [b'"', b"'", b'PUT "t', b"PUT 't", b'"t\\"', b"'t\\'", b'"a"b', b"'a'b", b'"a""b"'])
def test_unbalanced_quotes_are_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="quotes"):
        split_line(line)
    assert outcome(RequestParser(LIMIT), [line + b"\n"]) == ("[]", ProtocolError)


@pytest.mark.parametrize(
    "line", [b'"%b"' % (b"\\x41" * 16_000), b'"%b"' % (b"\\n" * 32_000), b'"%b"' % (b"\\q" * 32_000), b'"" ' * 20_000]
)
def test_work_for_a_line_does_not_grow_with_its_words_and_escapes(line: bytes) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        with suppress(ProtocolError):
            split_line(line)
    finally:
        sys.setprofile(None)
    # The calls for each of the words allowed.
    assert calls < MAX_ARGUMENTS * 50


def test_inline_requests_and_arrays_may_follow_each_other() -> None:
    assert requests(b"PING\r\n" + encode_request(b"ECHO", b"\n") + b"QUIT\n") == [
        [b"PING"],
        [b"ECHO", b"\n"],
        [b"QUIT"],
    ]


@pytest.mark.parametrize("empty", [b"\n", b"\r\n", b" \t\r\n", b"\n\r\n  \n"])
def test_many_empty_lines_are_skipped_without_recursion(empty: bytes) -> None:
    data = empty * 20_000 + encode_request(b"PING")
    assert requests(data) == [[b"PING"]]
    assert requests(*in_pieces_of(7, data)) == [[b"PING"]]


def test_empty_lines_are_not_buffered() -> None:
    parser = RequestParser(LIMIT)
    assert parse(parser, [b"\r\n \n\n"]) == []
    assert (len(parser), parser.incomplete) == (0, False)


# Invalid requests

INVALID_REQUESTS = {
    "huge count": b"*2147483647\r\n",
    "count of 20 digits": b"*10000000000000000000\r\n",
    "too many arguments": b"*%d\r\n" % (MAX_ARGUMENTS + 1),
    "no arguments": b"*0\r\n",
    "negative count": b"*-1\r\n",
    "count with a plus": b"*+1\r\n",
    "count with leading zeros": b"*01\r\n",
    "count with a blank": b"* 1\r\n",
    "no count": b"*\r\n",
    "count in other digits": "*\u0661\r\n".encode(),
    "negative length": b"*1\r\n$-1\r\n",
    "length of minus nothing": b"*1\r\n$-0\r\n",
    "length with a plus": b"*1\r\n$+4\r\nPING\r\n",
    "short length with leading zeros": b"*1\r\n$04\r\nPING\r\n",
    "length of zeros": b"*1\r\n$00\r\n\r\n",
    "long length with leading zeros": b"*1\r\n$01500\r\n",
    "length with an underscore": b"*1\r\n$1_0\r\n",
    "length in words": b"*1\r\n$four\r\n",
    "no length": b"*1\r\n$\r\n",
    "no length line": b"*1\r\n\r\n",
    "no dollar": b"*1\r\n4\r\nPING\r\n",
    "integer for a bulk string": b"*1\r\n:4\r\n",
    "array in an array": b"*1\r\n*1\r\n$4\r\nPING\r\n",
    "simple string for a bulk string": b"*1\r\n+PING\r\n",
    "count without CR": b"*1\n$4\nPING\n" + b"x" * 20,
    "bulk without CR LF": b"*1\r\n$4\r\nPINGPONG",
    "bulk ending in LF": b"*1\r\n$4\r\nPING\n\r",
    "overlong length line": b"*" + b"1" * 21,
    "overlong length line of a bulk": b"*1\r\n$" + b"1" * 21,
    "NUL": b"PING \x00",
    "escape": b"PING \x1b",
    "delete": b"PING \x7f",
    "vertical tab": b"PING \x0b",
    "CR within a line": b"PI\rNG",
    "CR twice": b"PING\r\r",
    "control character first": b"\x16",
    "no UTF-8": b"PING \xff\r\n",
    "half a character": b"PING \xc3\r\n",
    "a surrogate": b"PING \xed\xa0\x80\r\n",
    "too many words": b"x " * (MAX_ARGUMENTS + 1) + b"\n",
    "HTTP/1.1": b"GET / HTTP/1.1\r\n",
    "HTTP/1.0": b"POST /topic HTTP/1.0\n",
}


@pytest.mark.parametrize("name", INVALID_REQUESTS)
def test_invalid_request_raises_at_its_last_byte(name: str) -> None:
    data = INVALID_REQUESTS[name]
    assert outcome(RequestParser(LIMIT), [data]) == ("[]", ProtocolError)
    assert outcome(RequestParser(LIMIT), bytewise(data)) == ("[]", ProtocolError)
    assert outcome(RequestParser(LIMIT), [encode_request(b"PING") + data]) == ("[[b'PING']]", ProtocolError)


def test_limits_match_documentation() -> None:
    assert (MAX_ARGUMENTS, MAX_LINE_BYTES, REQUEST_OVERHEAD_BYTES) == (64, 65_536, 65_536)
    assert MAX_INTEGER == 9_223_372_036_854_775_807


def test_maximum_argument_count_is_accepted() -> None:
    request = [b"x"] * MAX_ARGUMENTS
    assert requests(encode_request(*request)) == [request]
    assert requests(b" ".join(request) + b"\n") == [request]


def test_http_version_in_array_is_an_ordinary_message() -> None:
    request = [b"PUT", b"t", b"HTTP/1.1"]
    assert requests(encode_request(*request)) == [request]


@pytest.mark.parametrize("size", [MAX_LINE_BYTES, 1000, 500])
def test_line_over_limit_raises(size: int) -> None:
    longest = b"x" * (MAX_LINE_BYTES - 1)
    assert requests(*in_pieces_of(size, longest + b"\n")) == [[longest]]
    for too_long in (longest + b"x", longest + b"x\n"):
        assert outcome(RequestParser(LIMIT), in_pieces_of(size, too_long)) == ("[]", ProtocolError)
        assert outcome(RequestParser(LIMIT), [too_long]) == ("[]", ProtocolError)


def test_message_at_limit_is_accepted() -> None:
    assert requests(encode_request(b"x" * LIMIT)) == [[b"x" * LIMIT]]


@pytest.mark.parametrize("length", [LIMIT + 1, 2_147_483_647, 9_223_372_036_854_775_807])
def test_message_over_limit_raises_at_its_length_line(length: int) -> None:
    parser = RequestParser(LIMIT)
    assert parse(parser, [b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$%d\r" % length]) == []
    with pytest.raises(TooBig):
        parse(parser, [b"\n"])


def request_of(size: int) -> bytes:
    """A request of the given size, none of whose arguments exceeds its limit."""
    most = [b"x" * 4000] * 17
    data = encode_request(*most, b"x" * (1000 + size - len(encode_request(*most, b"x" * 1000))))
    assert len(data) == size
    return data


@pytest.mark.parametrize("size", [100_000, 1000, 77], ids="in pieces of {}".format)
def test_request_over_limit_raises(size: int) -> None:
    most = LIMIT + REQUEST_OVERHEAD_BYTES
    assert len(requests(*in_pieces_of(size, request_of(most)))) == 1
    with pytest.raises(TooBig):
        requests(*in_pieces_of(size, request_of(most + 1)))


def test_request_over_limit_raises_at_length_line() -> None:
    data = encode_request(*[b"x" * LIMIT] * 17)
    parser = RequestParser(LIMIT)
    assert parse(parser, [data[: -LIMIT - 3]]) == []
    with pytest.raises(TooBig):
        parse(parser, [b"\n"])


# Noise: random bytes or random pieces of framing

tokens = b"* $ : + - _ % 0 1 2 -1 2147483647 x PING *1\r\n$ \" ' \\ \x00 \xff \xc3\xa9".split(b" ")
blank_tokens = [b"\r\n", b"\r\n", b"\r", b"\n", b" ", b"\t", b"*2\r\n$1\r\nx\r\n$"]
fragments = st.lists(st.sampled_from([*tokens, *blank_tokens]), max_size=25).map(b"".join)
noise = st.binary(max_size=200) | fragments


@given(noise=noise, cuts=cuts)
@example(noise=b"\r\n" * 50, cuts=[])
@settings(max_examples=200, deadline=None)
def test_any_bytes_parse_the_same_as_requests_in_any_pieces(noise: bytes, cuts: list[int]) -> None:
    expected = outcome(RequestParser(LIMIT), [noise])
    assert outcome(RequestParser(LIMIT), bytewise(noise)) == expected
    assert outcome(RequestParser(LIMIT), cut(noise, cuts)) == expected


@given(noise=noise, cuts=cuts)
@settings(max_examples=200, deadline=None)
def test_any_bytes_parse_the_same_as_replies_in_any_pieces(noise: bytes, cuts: list[int]) -> None:
    expected = outcome(ReplyParser(), [noise])
    assert outcome(ReplyParser(), bytewise(noise)) == expected
    assert outcome(ReplyParser(), cut(noise, cuts)) == expected


@given(line=fragments | st.binary(max_size=50))
@settings(max_examples=150, deadline=None)
def test_any_inline_line_is_split_or_raises(line: bytes) -> None:
    try:
        words = split_line(line.replace(b"\n", b""))
    except ProtocolError:
        return
    assert len(words) <= MAX_ARGUMENTS


@given(request=whole_requests, at=st.integers(0, 5000), byte=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_request_with_one_wrong_byte_parses_the_same_in_any_pieces(request: list[bytes], at: int, byte: int) -> None:
    data = bytearray(encode_request(*request))
    data[at % len(data)] = byte
    expected = outcome(RequestParser(LIMIT), [bytes(data)])
    assert outcome(RequestParser(LIMIT), bytewise(bytes(data))) == expected


# Replies

printable = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=12)
errors = st.builds(lambda kind, sentence: kind(sentence), st.sampled_from(list(BY_CODE.values())), printable)
scalars = (
    printable
    | st.integers(0, 2**63 - 1)
    | st.binary(max_size=12)
    | st.integers(1020, 1030).map(lambda size: b"\n" * size)
    | errors
    | st.none()
)


def nested(depth: int) -> st.SearchStrategy[Reply]:
    return scalars | st.lists(nested(depth - 1), max_size=3) if depth else scalars


def encoded(reply: Reply, version: int) -> bytes:
    match reply:
        case str():
            return encode_simple(reply)
        case int():
            return encode_integer(reply)
        case bytes():
            return encode_bulk(reply)
        case ReplyError():
            return encode_error(reply)
        case list():
            return encode_array([encoded(item, version) for item in reply])
    return encode_null(version)


@given(batch=st.lists(nested(MAX_DEPTH), min_size=1, max_size=2), version=st.sampled_from([2, 3]))
@settings(max_examples=50, deadline=None)
def test_replies_round_trip_at_every_split(batch: list[Reply], version: int) -> None:
    data = b"".join(encoded(reply, version) for reply in batch)
    # Compared by repr, because equal errors are different objects.
    for pieces in every_split(data):
        assert repr(replies(*pieces)) == repr(batch)
    assert repr(replies(*bytewise(data))) == repr(batch)


@given(batch=st.lists(nested(2), max_size=6), cuts=cuts)
@settings(deadline=None)
def test_pipelined_replies_parse_in_order_at_any_split(batch: list[Reply], cuts: list[int]) -> None:
    data = b"".join(encoded(reply, 2) for reply in batch)
    assert repr(replies(*cut(data, cuts))) == repr(batch)


@given(messages=st.lists(st.tuples(*[st.integers(0, 2**63 - 1)] * 3, st.binary(max_size=9), st.integers(0, 2**63 - 1))))
@settings(deadline=None, max_examples=30)
def test_messages_encode_as_flat_array_of_five_fields(messages: list[tuple[int, int, int, bytes, int]]) -> None:
    data = encode_messages(messages)
    for pieces in every_split(data):
        assert replies(*pieces) == [[value for message in messages for value in message]]


def test_each_reply_type_is_encoded() -> None:
    assert encode_simple("OK") == b"+OK\r\n"
    assert encode_error(TooBig("too much")) == b"-TOOBIG too much\r\n"
    assert encode_integer(1) == b":1\r\n"
    assert encode_bulk(b"hello") == b"$5\r\nhello\r\n"
    assert encode_array([b":1\r\n", b"_\r\n"]) == b"*2\r\n:1\r\n_\r\n"
    assert (encode_null(2), encode_null(3)) == (b"$-1\r\n", b"_\r\n")


def test_map_is_flat_in_resp_2_only() -> None:
    value = {"server": "dsmq", "proto": 2, "modules": [], "flags": ["x"], "empty": {}}
    flat = encode_value(2, value)
    assert replies(flat) == [[b"server", b"dsmq", b"proto", 2, b"modules", [], b"flags", ["x"], b"empty", []]]
    assert encode_value(3, value) == flat.replace(b"*10", b"%5", 1).removesuffix(b"*0\r\n") + b"%0\r\n"


@pytest.mark.parametrize("version", [2, 3])
def test_nulls_of_both_resp_versions_parse_as_none(version: int) -> None:
    for pieces in every_split(encode_null(version)):
        assert replies(*pieces) == [None]
    assert replies(b"*-1\r\n") == [None]


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=BY_CODE)
def test_error_code_gives_its_own_class(kind: type[ReplyError]) -> None:
    [error] = replies(encode_error(kind("a sentence: with a colon")))
    assert type(error) is kind
    assert str(error) == "a sentence: with a colon"


def test_unknown_error_code_gives_reply_error_with_code() -> None:
    [error] = replies(b"-ERR unknown\r\n")
    assert type(error) is ReplyError
    assert str(error) == "ERR unknown"


@given(sentence=st.text(max_size=30))
@example(sentence="x\r\n+OK")
@example(sentence="\ud800 \x85 \u2028")
@settings(deadline=None)
def test_error_message_is_always_one_line(sentence: str) -> None:
    data = encode_error(ProtocolError(sentence))
    [error] = replies(data)
    assert type(error) is ProtocolError
    assert len(data.decode().splitlines()) == 1
    assert len(str(error)) == len(sentence)


INVALID_REPLIES = {
    "huge count": b"*2147483647\r\n",
    "count just over": b"*1048577\r\n",
    "negative count": b"*-2\r\n",
    "count with leading zeros": b"*01\r\n",
    "negative length": b"$-2\r\n",
    "length with a plus": b"$+1\r\n",
    "length with leading zeros": b"$01\r\n",
    "length of 20 digits": b"$10000000000000000000\r\n",
    "no length": b"$\r\n",
    "bulk longer than its length": b"$4\r\nPINGPONG",
    "negative integer": b":-1\r\n",
    "integer with a plus": b":+1\r\n",
    "integer with leading zeros": b":01\r\n",
    "no integer": b":\r\n",
    "null with something behind it": b"_x\r\n",
    "arrays in arrays in arrays": b"*1\r\n" * (MAX_DEPTH + 1),
    "wrong item": b"*2\r\n:1\r\n!\r\n",
    "map": b"%1\r\n+a\r\n:1\r\n",
    "request by hand": b"PING\r\n",
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n",
    "empty line": b"\r\n",
    "line without end": b"+" + b"x" * (MAX_LINE_BYTES + 1),
}


@pytest.mark.parametrize("name", INVALID_REPLIES)
def test_invalid_reply_raises(name: str) -> None:
    data = INVALID_REPLIES[name]
    assert outcome(ReplyParser(), [data]) == ("[]", ProtocolError)
    assert outcome(ReplyParser(), in_pieces_of(1 if len(data) < 100 else 1000, data)) == ("[]", ProtocolError)


def test_reply_over_depth_or_length_limit_raises() -> None:
    expected: Reply = 1
    for _ in range(MAX_DEPTH):
        expected = [expected]
    assert replies(b"*1\r\n" * MAX_DEPTH + b":1\r\n") == [expected]
    assert outcome(ReplyParser(), [b"*1048576\r\n"]) == ("[]", None)
    # Bytes before a line do not count towards its length.
    bulk, line = b"x" * MAX_LINE_BYTES, "x" * (MAX_LINE_BYTES - 2)
    data = encode_array([encode_bulk(bulk), encode_simple(line)])
    assert replies(data[:-2], data[-2:]) == [[bulk, line]]


def test_incomplete_and_len_count_unparsed_reply_bytes() -> None:
    parts = [b"*3\r\n", encode_integer(12), encode_bulk(b"hello"), encode_simple("OK")]
    data = b"".join(parts)
    ends = list(itertools.accumulate(map(len, parts)))
    parser = ReplyParser()
    for at, byte in enumerate(bytewise(data), 1):
        parser.feed(byte)
        assert len(parser) == at - max([0, *(end for end in ends if end < at)])
        assert (parser.next() is not None) == (at == len(data))
        assert parser.incomplete == (at < len(data))
    assert len(parser) == 0


# Parsed bytes are not copied again whenever a byte arrives

LONG = b"x" * 100_000
CUT_BYTEWISE = {
    "arguments behind a long one": (RequestParser(1 << 20), encode_request(b"PUT", LONG, *[b"y"] * 50)),
    "a long argument": (RequestParser(1 << 20), encode_request(b"PUT", b"t", LONG)),
    "a long line": (RequestParser(1 << 20), b"PUT t " + LONG[:60_000] + b"\n"),
    "a line of blanks": (RequestParser(1 << 20), b" " * 60_000 + b"PING\n"),
    "a long value and short ones behind it": (ReplyParser(), encode_array([encode_bulk(LONG), *[b":1\r\n"] * 500])),
    "many values": (ReplyParser(), encode_array([encode_integer(1234)] * 10_000)),
    "a long line in a reply": (ReplyParser(), encode_simple("x" * 60_000)),
    "long values in arrays": (ReplyParser(), encode_array([encode_array([encode_bulk(LONG)] * 2)] * 2)),
}


@pytest.mark.parametrize("name", CUT_BYTEWISE)
def test_bytes_one_by_one_are_copied_few_times(name: str) -> None:
    parser, data = CUT_BYTEWISE[name]
    copied, result = 0, None
    for byte in bytewise(data):
        before = joined(parser)
        parser.feed(byte)
        fed = joined(parser)
        result = parser.next()
        copied += len(fed) * (fed is not before) + len(joined(parser)) * (joined(parser) is not fed)
    assert result is not None
    # Each byte is copied once when it arrives, and once when its value is complete.
    assert copied < 4 * len(data)


@pytest.mark.parametrize("cut", [1, 2, 3, 100])
def test_small_pieces_of_long_message_are_gathered(cut: int) -> None:
    parser = RequestParser(1 << 20)
    data = encode_request(b"PUT", b"t", LONG)
    tracemalloc.start()
    for at in range(0, len(data) - cut, cut):
        parser.feed(data[at : at + cut])
        assert parser.next() is None
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory < 2 * len(data)


def test_parsed_bytes_before_incomplete_request_are_released() -> None:
    parser = RequestParser(1 << 20)
    parser.feed(encode_request(b"PUT", b"t", b"x" * 2000) * 50 + b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$5\r\nhe")
    while parser.batch():
        pass
    assert parser.incomplete
    assert parser.buffered == len(parser) < 50
