"""Malformed requests: mutations of valid ones and patterns known to have broken servers.

`python -m attacks.malformed RUNS`, in tests/, searches for more with atheris, guided by coverage.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import util

from attacks.crowd import dial, reset
from attacks.rig import HERE, Trial, Victim, compare_latency, megabytes, victim
from dsmq.errors import ProtocolError, ReplyError
from dsmq.wire.request_parser import RequestParser
from dsmq.wire.resp import ReplyParser, encode_request
from helpers import Process

LARGEST = 10_000
"""Max message size in these tests; it is small, so that limits are reached."""
LATE_SECONDS = 5.0
"""A connection that is not closed within this many seconds counts as hanging."""
VERBS = (b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"CONNECT", b"get", b"Put", b"READ")
NUMBERS = (
    *(b"-1", b"-0", b"+1", b"00", b"01", b"1.0", b"1e3", b"0x10", b" 1", b"1 ", b"", b"a", b"\xb2", b"1_000"),
    *(b"63", b"64", b"65", b"1023", b"1024", b"16383", b"65536", b"8388608", b"8388609", b"1048577"),
    *(b"2147483647", b"2147483648", b"4294967296", b"9223372036854775807", b"9223372036854775808", b"9" * 30),
)
ENDS = (b"\r\n", b"\n", b"\r", b"\n\r", b"\r\r\n", b"\0", b"")
PREFIXES = b"*$:+-_%~,#!=>(|"

Random = random.Random


def requests(rng: Random) -> Iterator[bytes]:
    """Yield malformed requests endlessly."""
    while True:
        yield rng.choice(SHAPES)(rng) if rng.random() < 0.4 else mutated(rng)


# Mutations


def good(rng: Random) -> bytes:
    """Return one or a few valid requests."""
    body = rng.randbytes(rng.choice((0, 1, 20, 1500)))
    frames = (
        encode_request(b"PUT", b"t", body),
        encode_request(b"PUT", b"t", body, b"KEY", b"producer", b"%d" % rng.randrange(10)),
        encode_request(b"READ", b"t", b"%d" % rng.randrange(100), b"COUNT", b"2", b"WAIT", b"10"),
        encode_request(rng.choice((b"GET", b"GETLATEST", b"STATS", b"ECHO")), b"t"),
        encode_request(b"GETWAIT", b"t", b"10"),
        encode_request(b"HELLO", b"3", b"AUTH", b"default", b"token", b"SETNAME", b"n"),
        encode_request(b"CONFIG", b"GET", b"*a*b*"),
        encode_request(b"COMMAND", b"DOCS", b"get"),
        encode_request(b"CLIENT", b"SETINFO", b"LIB-NAME", b"x"),
        b'PUT t "a \\x41 \\" b"\r\n',
        b"put t 'it\\'s'\n",
        b"\r\n\r\nPING\r\n",
    )
    return b"".join(rng.choices(frames, k=rng.choice((1, 1, 1, 2, 4))))


def mutated(rng: Random) -> bytes:
    data = good(rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(MUTATIONS)(rng, data)
    return data


def _flip(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes((rng.randrange(256),)) + data[at + 1 :]


def _insert(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(rng.randrange(1, 5)), rng.choice(ENDS), b'"', b"'")) + data[at:]


def _delete(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randrange(1, 8) :]


def _repeat(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    end = at + rng.randrange(1, 30)
    return data[:end] + data[at:]


def _cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _renumber(rng: Random, data: bytes) -> bytes:
    """Replace a count or a length."""
    lines = data.split(b"\r\n")
    marked = [at for at, line in enumerate(lines) if line[:1] in (b"*", b"$")]
    if marked:
        at = rng.choice(marked)
        lines[at] = lines[at][:1] + rng.choice(NUMBERS)
    return b"\r\n".join(lines)


def _retype(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\r\n")
    at = rng.randrange(len(lines))
    lines[at] = bytes((rng.choice(PREFIXES),)) + lines[at][1:]
    return b"\r\n".join(lines)


def _reline(rng: Random, data: bytes) -> bytes:
    return data.replace(b"\r\n", rng.choice(ENDS), rng.choice((1, 2, -1)))


def _splice(rng: Random, data: bytes) -> bytes:
    other = good(rng)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


MUTATIONS = (_flip, _insert, _delete, _repeat, _cut, _renumber, _retype, _reline, _splice)

# Shapes


def _wrong_count(rng: Random) -> bytes:
    return b"*%b\r\n$4\r\nPING\r\n" % rng.choice(NUMBERS)


def _wrong_length(rng: Random) -> bytes:
    return b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$%b\r\n%b" % (rng.choice(NUMBERS), b"x" * rng.choice((0, 5, 2000)))


def _endless_count(rng: Random) -> bytes:
    return rng.choice((b"*", b"$", b"*1\r\n$")) + rng.choice((b"1", b"0", b" ", b"-")) * rng.choice((21, 22, 23, 5000))


def _wrong_prefix(rng: Random) -> bytes:
    return b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n%bfoo\r\n" % bytes((rng.randrange(256),))


def _nested(rng: Random) -> bytes:
    return b"*1\r\n" * rng.choice((2, 100, 2000)) + b"$4\r\nPING\r\n"


def _unbalanced(rng: Random) -> bytes:
    words = (b'"', b"'", b'""', b"''", b'"a"b', b"'a'b", b'"\\', b'"\\x4', b"'\\", b'\\"', b'a"b', b"\t", b"\\x41")
    return b"PUT t " + b" ".join(rng.choices(words, k=3)) + b"\r\n"


def _many_words(rng: Random) -> bytes:
    return b"PUT" + b" t" * rng.choice((62, 63, 64, 65, 5000)) + b"\r\n"


def _long_line(rng: Random) -> bytes:
    return b"PUT t " + rng.choice((b"x", b'"', b"\\", b"' ")) * rng.choice((9_000, 33_000, 70_000)) + rng.choice(ENDS)


def _desynced(rng: Random) -> bytes:
    """Return a body that looks like requests, in a frame that is slightly too short or too long."""
    body = encode_request(b"PUT", b"t", encode_request(b"GET", b"t"))
    return b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$%d\r\n%b\r\n" % (len(body) + rng.choice((-2, -1, 1, 2, 3)), body) + good(
        rng
    )


def _web(rng: Random) -> bytes:
    version = rng.choice((b" HTTP/1.1", b" HTTP/1.0", b" HTTP/2.0", b" http/1.1", b""))
    return rng.choice(VERBS) + b" /" + version + b"\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nPUT t x\r\n"


def _other_protocol(rng: Random) -> bytes:
    """Return the first bytes of clients of MQTT, memcached, TLS, SSH, SMTP and X11, valid or not."""
    name = b"MQTT" * rng.choice((1, 200))
    packet = b"\0" + bytes((len(name) % 256,)) + name + bytes((rng.randrange(7), rng.randrange(256), 0, 10, 255, 255))
    return rng.choice(
        (
            bytes((rng.choice((0x10, 0x1F, 0x30, 0xC0, 0xE0)), rng.choice((len(packet) % 128, 0, 127)))) + packet,
            b"\x10\xff\xff\xff\xff\xff",
            b"set k 0 0 %b\r\nvalue\r\n" % rng.choice(NUMBERS),
            b"get " + b"k " * 300 + b"\r\n",
            b"\x80\x01" + rng.randbytes(22),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(40),
            b"SSH-2.0-x\r\n",
            b"EHLO x\r\n",
            b"l\0\x0b\0\0\0\0\0\0\0",
            b"\xff\xfb\x01\xff\xfd\x03",
            b"\xef\xbb\xbfPING\r\n",
        )
    )


def _noise(rng: Random) -> bytes:
    return rng.randbytes(rng.choice((1, 10, 300, 5000)))


def _wrong_words(rng: Random) -> bytes:
    """Return a valid frame with an invalid command."""
    names = (b"", b"PUT", b"READ", b"GETWAIT", b"TOPICS", b"HELLO", b"CLIENT", b"CONFIG", b"COMMAND", b"INFO", b"\xff")
    words = (b"", b"t", b"\xff", b"-1", b"WAIT", b"COUNT", b"KEY", b"AFTER", b"9" * 19, b"GET", b"*" * 60, b"\0")
    return encode_request(rng.choice(names), *rng.choices(words, k=rng.randrange(12)))


SHAPES: tuple[Callable[[Random], bytes], ...] = (
    *(_wrong_count, _wrong_length, _endless_count, _wrong_prefix, _nested, _unbalanced, _many_words, _long_line),
    *(_desynced, _web, _other_protocol, _noise, _wrong_words),
)

# To the parser


def whole(data: bytes) -> tuple[list[list[bytes]], str]:
    """Parse the bytes at once; return the requests and the code of the error after them."""
    parser = RequestParser(LARGEST)
    found: list[list[bytes]] = []
    try:
        parser.feed(data)
        while batch := parser.batch():
            found += batch
    except ReplyError as error:
        return found, error.code
    return found, ""


def in_pieces(data: bytes, rng: Random) -> tuple[list[list[bytes]], str]:
    """Do the same, with the bytes arriving in pieces."""
    parser = RequestParser(LARGEST)
    found: list[list[bytes]] = []
    at = 0
    try:
        while at < len(data):
            end = at + rng.choice((1, 2, 3, 10, 100, 5000))
            parser.feed(data[at:end])
            while (request := parser.next()) is not None:
                found.append(request)
            at = end
    except ReplyError as error:
        return found, error.code
    return found, ""


def to_parser(count: int, seed: int) -> tuple[Counter[str], list[bytes], int]:
    """Parse `count` requests; return the outcomes, the requests whose outcome differs in pieces, and memory growth."""
    rng = Random(seed)
    outcomes: Counter[str] = Counter()
    differ: list[bytes] = []
    process, warm = Process(os.getpid()), 0
    for number, data in zip(range(count), requests(rng), strict=False):
        if number == count // 10:
            warm = process.memory
        result = whole(data)
        outcomes[result[1]] += 1
        if result != in_pieces(data, rng):
            differ.append(data)
    return outcomes, differ, process.memory - warm


# To the server


def to_server(port: int, count: int, seed: int) -> tuple[Counter[str], list[bytes]]:
    """Send `count` requests, each on its own connection; return the replies and the requests that hang."""
    rng = Random(seed)
    outcomes: Counter[str] = Counter()
    hung: list[bytes] = []
    for _, data in zip(range(count), requests(rng), strict=False):
        sock = dial(port, timeout=LATE_SECONDS)
        try:
            outcomes[_exchange(sock, data, rng)] += 1
        except ProtocolError:
            # dsmq's parser handles only replies to its own client, which uses neither RESP 3 nor COMMAND.
            outcomes["not for this parser" if re.search(b"HELLO|COMMAND", data, re.I) else "no reply"] += 1
        except TimeoutError:
            hung.append(data)
        except OSError:
            # The connection was reset: the server closed it with unread bytes, which is allowed.
            outcomes["reset"] += 1
        reset(sock)
    return outcomes, hung


def _exchange(sock: socket.socket, data: bytes, rng: Random) -> str:
    cut = rng.randrange(len(data) + 1)
    sock.sendall(data[:cut])
    sock.sendall(data[cut:])
    sock.shutdown(socket.SHUT_WR)
    parser, last = ReplyParser(), "no error"
    while data := sock.recv(65_536):
        parser.feed(data)
        while (reply := parser.next()) is not None:
            if isinstance(reply[0], ReplyError):
                last = reply[0].code
    return last


def to_server_by_many(port: int, count: int, seed: int) -> tuple[Counter[str], list[bytes]]:
    outcomes: Counter[str] = Counter()
    hung: list[bytes] = []

    def send(number: int) -> None:
        found, without_end = to_server(port, count // 4, seed + number)
        outcomes.update(found)
        hung.extend(without_end)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, hung


def malformed(trial: Trial) -> None:
    seed = int(time.time())
    count = trial.size(1_000_000, 5_000)
    # Use topics of one byte: there are few of them, and the server remembers topics.
    settings = {"max_age_seconds": 1, "max_topic_bytes": 1, "max_message_bytes": LARGEST, "request_timeout_seconds": 1}
    with victim(trial, allow_shutdown=False, **settings) as on:
        began = time.monotonic()
        outcomes, differ, grown = to_parser(count, seed)
        rate = count / (time.monotonic() - began)
        trial.must(
            f"{count:,} to the parser (seed {seed}): only PROTOCOL and TOOBIG raised",
            f"{_shown(outcomes)}; {rate:,.0f}/s",
            set(outcomes) <= {"", "PROTOCOL", "TOOBIG"} and min(outcomes.values()) > 0,
        )
        trial.must("the same in pieces of any size", _examples(differ), not differ)
        trial.must("parser: memory grows by less than 5 MB", megabytes(grown), grown < 5e6)
        _attack_server(trial, on, trial.size(200_000, 2_000), seed)
    guided(trial, trial.size(1_000_000, 20_000))


def _attack_server(trial: Trial, on: Victim, count: int, seed: int) -> None:
    daemon = on.daemon
    to_server_by_many(daemon.port, count // 10, seed - 1000)
    before = daemon.memory
    began = time.monotonic()
    outcomes, hung = to_server_by_many(daemon.port, count, seed)
    rate = count / (time.monotonic() - began)
    ended = not hung and not outcomes["no reply"] and outcomes.total() == count
    trial.must(
        f"{count:,} to the server: each gets replies, and the connection ends",
        f"{_shown(outcomes)}; {rate:,.0f}/s",
        ended,
    )
    trial.must("no defect", f"failures {daemon.metric('dsmq_failures_total'):.0f}", "INTERNAL" not in outcomes)
    grown = daemon.memory - before
    trial.must("server: memory grows by less than 5 MB", megabytes(grown), grown < 5e6)
    few = count // 20
    compare_latency(trial, daemon, lambda port: to_server(port, few, seed), most=2)


def _shown(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count:,} {code or 'no error'}" for code, count in outcomes.most_common(6))


def _examples(found: list[bytes]) -> str:
    return f"{len(found)} differ" + "".join(f": {data[:80]!r}".replace("|", "¦") for data in found[:1])


# Guided by coverage of the parser


def guided(trial: Trial, runs: int) -> None:
    if util.find_spec("atheris") is None:
        trial.state("guided by coverage", "skipped: Python's atheris is not installed")
        return
    command = [sys.executable, "-m", "attacks.malformed", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=HERE.parent)
    told = [line for line in done.stderr.splitlines() if line.startswith("Done") or "Exception" in line]
    trial.must(f"{runs:,} guided by coverage (atheris)", "; ".join(told), done.returncode == 0)


def fuzz(runs: int) -> None:
    """Use atheris to search for bytes on which the parser fails or that it parses differently in pieces."""
    import atheris

    def check(data: bytes) -> None:
        if whole(data) != in_pieces(data, Random(len(data))):
            raise AssertionError(f"read differently in pieces: {data!r}")

    with atheris.instrument_imports(include=["dsmq.wire.request_parser", "dsmq.wire.resp"]):
        pass
    for function in (RequestParser.next, RequestParser.batch, RequestParser._split, RequestParser._next_line):
        function.__code__ = atheris.instrument_func(function).__code__
    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=4096", "-artifact_prefix=/dev/null"], check)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(int(sys.argv[1]))
