"""Attacks with too many connections, or slow, greedy or unauthenticated ones."""

from __future__ import annotations

import contextlib
import itertools
import math
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from attacks.crowd import GRACE_SECONDS, Crowd, dial, reset
from attacks.rig import (
    HERE,
    MIB,
    Bystander,
    NotHere,
    Trial,
    compare_latency,
    megabytes,
    milliseconds,
    serve_time,
    victim,
)
from dsmq.wire.resp import encode_request
from helpers import SOON, Daemon, reached

TOKEN = "a-token-of-the-attacks"
CROWD = 5000
LOOK_EVERY_SECONDS = 0.1
ZEROS = bytes(MIB)


def needs_files(count: int) -> None:
    """Raise the limit on open files for the attacker and its servers. Raises NotHere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        raise NotHere(f"{count} open files are needed, {hard} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


# Before AUTH


def _endless(head: bytes, chunk: bytes) -> Iterator[bytes]:
    yield head
    yield from itertools.repeat(chunk)


# The data of 14 unauthenticated clients: a header, then the same bytes repeatedly.
ENDLESS = {
    "announced bulk": (b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$100000000\r\n", ZEROS),
    "bulk that others may send": (b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$8000000\r\n", ZEROS),
    "inline line": (b"PUT t ", b"x" * MIB),
    "array": (b"*64\r\n", (b"$1000\r\n%b\r\n" % (b"x" * 1000)) * 1000),
}


def before_auth(trial: Trial) -> None:
    with victim(trial, auth_token=TOKEN, auth_timeout_seconds=trial.size(10, 2)) as on:
        daemon = on.daemon
        each = int(trial.size(100e6, 20e6))
        # Measured before the first attack, because memory that one attack frees may be reused by the next.
        serve_time(daemon)
        before = daemon.memory
        daemon.forget_peak()
        sent = pour(daemon.port, each)
        grown = daemon.peak_memory - before
        trial.must("14 unauthenticated clients: memory grows by less than 20 MB", f"{megabytes(grown)}", grown < 20e6)
        trial.must(f"each has sent {each / 1e6:.0f} MB", f"{megabytes(min(sent))} at least", min(sent) >= each)
        compare_latency(trial, daemon, lambda port: pour(port, each), in_quick=True)


def pour(port: int, size: int) -> list[int]:
    """Let 14 unauthenticated clients send this many bytes each, over many connections; return the bytes sent."""
    kinds = itertools.cycle(ENDLESS.values())
    sent = [0] * 14
    threads = [threading.Thread(target=_pour, args=(port, size, next(kinds), sent, at)) for at in range(14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sent


def _pour(port: int, size: int, kind: tuple[bytes, bytes], sent: list[int], at: int) -> None:
    until = time.monotonic() + 60
    head, chunk = kind
    while sent[at] < size and time.monotonic() < until:
        sock = dial(port)
        with contextlib.suppress(OSError):
            for data in _endless(head, chunk):
                sock.sendall(data)
                sent[at] += len(data)
                if sent[at] >= size:
                    break
        reset(sock)


def unauthenticated_requests(trial: Trial) -> None:
    """Unauthenticated clients send PING or unknown commands and read no replies."""
    count, timeout = trial.size(500, 50), trial.size(4, 1)
    needs_files(count + 500)
    with victim(trial, auth_token=TOKEN, auth_timeout_seconds=timeout) as on:
        daemon = on.daemon
        before = daemon.memory
        daemon.forget_peak()

        ends: list[float] = []

        def attack(port: int) -> None:
            kinds = itertools.cycle((b"PING\r\n" * 10_000, b"FROBNICATE\r\n" * 6_000))
            crowd = Crowd(port, count, timeout / 2, lambda: itertools.repeat(next(kinds)), 0.05, reads=False)
            gone = Gone(daemon, crowd)
            crowd.run(timeout * 1.5 + (GRACE_SECONDS if port == daemon.port else 0), gone)
            ends.append(gone.after())

        attack(daemon.port)
        grown = (daemon.peak_memory - before) / count
        trial.must(
            f"{count} unauthenticated clients that send PING and don't read are dropped after {timeout} s",
            f"all {ends[0]:.1f} s after the last was opened",
            ends[0] <= timeout + 1,
        )
        trial.state("memory of each", f"{megabytes(grown)}")
        compare_latency(trial, daemon, attack, in_quick=True)


def guessing(trial: Trial) -> None:
    """Send invalid tokens as fast as possible, from the address of clients with a valid one."""
    with victim(trial, auth_token=TOKEN) as on:
        daemon = on.daemon
        until = threading.Event()
        guesses = [0] * 4
        threads = [threading.Thread(target=_guess, args=(daemon.port, until, guesses, at)) for at in range(4)]
        for thread in threads:
            thread.start()
        try:
            reached(lambda: all(guesses))
            answers = [_show(daemon.port, TOKEN) for _ in range(60)]
        finally:
            until.set()
            for thread in threads:
                thread.join()
        trial.must(
            "60 clients with the right token are let in meanwhile",
            f"{answers.count(b'+OK')} of them, beside {sum(guesses):,} guesses",
            answers == [b"+OK"] * 60,
        )


def _guess(port: int, until: threading.Event, guesses: list[int], at: int) -> None:
    while not until.is_set():
        _show(port, f"{guesses[at]:024}")
        guesses[at] += 1


def _show(port: int, token: str) -> bytes:
    """Authenticate; return the first word of the reply."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(encode_request(b"AUTH", token.encode()))
        return sock.recv(100).split()[0]


class Gone:
    """Return whether the server has closed all connections of a crowd."""

    def __init__(self, daemon: Daemon, crowd: Crowd) -> None:
        self._daemon, self._crowd = daemon, crowd
        self._look_at = 0.0
        self.at = math.inf

    def __call__(self) -> bool:
        now = time.monotonic()
        # Polling without pauses would be an attack in itself, and the sink does not drop connections.
        if self._crowd.opened == self._crowd.count and self._crowd.port == self._daemon.port and now >= self._look_at:
            self._look_at = now + LOOK_EVERY_SECONDS
            if self._daemon.metric("dsmq_connections") <= 2:
                self.at = now
        return self.at < math.inf

    def after(self) -> float:
        """Return the seconds since the last one connected; infinite while any is open."""
        if self._crowd.port == self._daemon.port:
            reached(self, 2 * LOOK_EVERY_SECONDS)
        return self.at - self._crowd.opened_last


# Slow connections


def slow_loris(trial: Trial) -> None:
    count, timeout = trial.size(CROWD, 300), trial.size(4, 0.4)
    needs_files(count + 500)
    settings = {"request_timeout_seconds": timeout, "auth_timeout_seconds": timeout}
    _loris(trial, "request_timeout_seconds", count, timeout, **settings)
    _loris(
        trial,
        "auth_timeout_seconds",
        count,
        timeout,
        auth_token=TOKEN,
        max_unauthenticated_connections=count + 10,
        **{**settings, "request_timeout_seconds": 600},
    )


def _loris(trial: Trial, deadline: str, count: int, timeout: float, **settings: object) -> None:
    with victim(trial, **settings) as on:
        daemon = on.daemon
        before = daemon.memory

        def attack(port: int) -> Crowd:
            crowd = Crowd(port, count, trial.size(3, 0.3), _letters, trial.size(1, 0.1))
            crowd.run(trial.size(3, 0.3) + timeout + (GRACE_SECONDS if port == daemon.port else 0.5))
            return crowd

        daemon.forget_peak()
        crowd = attack(daemon.port)
        peak = daemon.peak_memory
        soonest, latest = min(crowd.lived, default=0), max(crowd.lived, default=0)
        each = (peak - before) / count
        trial.must(
            f"{count} connections that send a byte a second are dropped at {deadline}, {timeout:g} s",
            f"{len(crowd.lived)} were, after {soonest:.2f} to {latest:.2f} s; {each / 1024:.1f} KiB each",
            len(crowd.lived) == count and timeout - 0.2 <= soonest and latest <= timeout + 1,
        )
        told = crowd.replies.get(b"-TIMEOUT", 0)
        trial.must("and get the reason", f"-TIMEOUT to {told}", told == count)
        compare_latency(trial, daemon, attack)


def _letters() -> Iterator[bytes]:
    """Yield the bytes of an endless request."""
    yield from (b"%c" % byte for byte in b"*3\r\n$3\r\nPUT\r\n$1\r\nt\r\n$5000\r\n")
    yield from itertools.repeat(b"x")


def never_read(trial: Trial) -> None:
    count, timeout = trial.size(CROWD, 50), trial.size(4, 0.5)
    needs_files(count + 500)
    with victim(trial, reply_timeout_seconds=timeout, max_age_seconds=3600) as on:
        daemon = on.daemon
        with daemon.client() as mq:
            mq.put_many("long", ["x" * 65_536] * 4)
        request = encode_request(b"READ", b"long", b"0") * 20
        before = daemon.memory
        ends: list[float] = []
        opening = trial.size(5, 0.2)

        def attack(port: int) -> None:
            crowd = Crowd(port, count, opening, lambda: iter([request]), reads=False, receive_buffer=4096)
            gone = Gone(daemon, crowd)
            crowd.run(opening + timeout + (GRACE_SECONDS * 4 if port == daemon.port else 0), gone)
            ends.append(gone.after())

        daemon.forget_peak()
        attack(daemon.port)
        peak = daemon.peak_memory
        # Not all of their replies fit into the total; clients that wait for room get it once others have been dropped.
        trial.must(
            f"{count} connections that never read are dropped at reply_timeout_seconds, {timeout:g} s, in turn",
            f"all {ends[0]:.1f} s after the last was opened",
            ends[0] <= 3 * timeout,
        )
        trial.state("memory of them", f"{megabytes(peak - before)}, {megabytes((peak - before) / count)} each")
        compare_latency(trial, daemon, attack)


# Too many connections


def flood(trial: Trial) -> None:
    most, count = trial.size(1000, 100), trial.size(5000, 300)
    needs_files(count + 500)
    with victim(trial, max_connections=most) as on, on.daemon.client() as mq:
        daemon = on.daemon
        mq.ping()

        # The connection of `mq` counts, too; those of the HTTP endpoint don't.
        room = most - 1

        def attack(port: int) -> Crowd:
            crowd = Crowd(port, count, trial.size(3, 0.3), lambda: iter(()))
            # A busy machine takes longer, which is acceptable if latencies are not measured.
            crowd.run(trial.size(4, SOON), lambda: trial.quick and crowd.replies.get(b"-BUSY", 0) >= count - room)
            return crowd

        crowd = attack(daemon.port)
        busy = crowd.replies.get(b"-BUSY", 0)
        trial.must(
            f"of {count} connections {room} are taken, {count - room} refused with -BUSY",
            f"{busy} refused",
            busy == count - room,
        )
        served = serve_until(daemon)
        trial.at_once("served again at once", milliseconds(served), served)
        mq.ping()
        compare_latency(trial, daemon, attack, in_quick=True)


def serve_until(daemon: Daemon) -> float:
    """Return the seconds until a new client is served."""
    began = time.monotonic()
    reached(lambda: serve_time(daemon) < SOON)
    return time.monotonic() - began


FILES = 256


def no_files(trial: Trial) -> None:
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))}
    with victim(trial, popen=few) as on:
        _exhaust(trial, on.daemon, "ulimit -n 256")
    # By default, the server accepts fewer connections than its limit on files, so the fault uses up the remaining ones.
    # Scraping is paused, because it fails without file descriptors.
    with victim(trial, *faulty("files"), popen=few) as on, on.scraper.paused():
        on.daemon.signal(signal.SIGUSR1)
        reached(lambda: on.daemon.files == FILES)
        _exhaust(trial, on.daemon, "all files taken", pending_scrape=True)
        on.daemon.signal(signal.SIGUSR2)
        reached(lambda: on.daemon.files < FILES)
        served = serve_until(on.daemon)
        trial.at_once("all files taken: served again at once", milliseconds(served), served)


def faulty(*words: str) -> list[str]:
    """Return the command of a server with a fault."""
    return [sys.executable, str(HERE / "faulty.py"), *words]


def _exhaust(trial: Trial, daemon: Daemon, when: str, *, pending_scrape: bool = False) -> None:
    # Connections that are not accepted immediately stay in the backlog.
    opened = [dial(daemon.port) for _ in range(400)]
    if pending_scrape:
        opened.append(dial(daemon.http_port))
        opened[-1].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    told = [_first_reply(sock) for sock in opened[-50:-1]]
    refused = sum(reply.startswith(b"-BUSY") for reply in told)
    silent = sum(not reply for reply in told)
    trial.must(
        f"{when}: connections are refused, or held in the backlog",
        f"of the last 49, {refused} refused, {silent} held, {len(told) - refused - silent} something else",
        refused + silent == len(told),
    )
    # The server may have to handle those connections first.
    used = [_used(daemon, trial.size(2, 0.5))]
    reached(lambda: used.append(_used(daemon, trial.size(2, 0.5))) or used[-1] < 0.2)
    trial.must(f"{when}: no busy loop", f"{used[-1]:.0%} of a processor", used[-1] < 0.2)
    for sock in opened:
        reset(sock)
    if not pending_scrape:
        served = serve_until(daemon)
        trial.at_once(f"{when}: served again at once", milliseconds(served), served)


def _used(daemon: Daemon, seconds: float) -> float:
    """Return the fraction of a processor that the process uses."""
    before, began = daemon.cpu_seconds, time.monotonic()
    time.sleep(seconds)
    return (daemon.cpu_seconds - before) / (time.monotonic() - began)


def _first_reply(sock: socket.socket) -> bytes:
    sock.settimeout(0.02)
    try:
        return sock.recv(100)
    except TimeoutError:
        return b""
    except OSError:
        return b"reset"


# At full speed


def churn(trial: Trial) -> None:
    seconds = trial.size(120, 2)
    with victim(trial, max_age_seconds=trial.size(2, 0.2), expiry_interval_seconds=0.1) as on:
        daemon = on.daemon
        began = time.monotonic()
        rounds = _churn(daemon.port, began + seconds / 5)
        reached(lambda: daemon.metric("dsmq_connections") == 0)
        before = daemon.memory, daemon.files, daemon.threads
        rounds += _churn(daemon.port, began + seconds)
        reached(lambda: daemon.metric("dsmq_connections") == 0)
        # The HTTP endpoint's threads come and go.
        reached(lambda: daemon.threads <= before[1] and daemon.files <= before[1], 2)
        grown = daemon.memory - before[0]
        trial.must(
            f"connect, put, read, drop for {seconds} s: memory grows by less than 5 MB after the first fifth",
            f"{megabytes(grown)} in {rounds:,} rounds",
            grown < 5e6,
        )
        trial.must(
            "no file and no thread more",
            f"{daemon.files - before[1]:+d} files, {daemon.threads - before[2]:+d} threads",
            reached(lambda: daemon.files <= before[1] + 1 and daemon.threads <= before[2] + 1, 5),
        )


def _churn(port: int, until: float) -> int:
    """Connect, put, read and disconnect: in turn by QUIT, by a reset, and by a reset in the middle of a request."""
    request = encode_request(b"PUT", b"t", b"x" * 100) + encode_request(b"READ", b"t", b"0", b"COUNT", b"1")
    rounds = 0
    while time.monotonic() < until:
        sock = dial(port)
        sock.sendall(request if rounds % 3 else request + request[:20])
        sock.recv(100)
        if rounds % 3 == 1:
            sock.close()
        else:
            reset(sock)
        rounds += 1
    return rounds


def greedy(trial: Trial, count: int = 200_000, bound: float = 0.02) -> None:
    seconds = trial.size(4, 0.5)
    blob = encode_request(b"PUT", b"greedy", b"x" * 20) * (count // trial.size(1, 20))
    with victim(trial, max_age_seconds=2) as on, ExitStack() as stack:
        daemon = on.daemon
        looker_on = Bystander(stack, daemon)
        before = daemon.memory
        daemon.forget_peak()
        calm, busy, puts = [], [], 0

        def attack() -> None:
            nonlocal puts
            puts += pipeline(daemon.port, blob, seconds)

        for _ in range(trial.size(3, 1)):
            calm.append(looker_on.during(lambda: time.sleep(seconds / 2)))
            busy.append(looker_on.during(attack))
        rate = puts / seconds / len(busy)
        trial.must("a client that pipelines 200,000 puts at a time is served", f"{rate:,.0f} puts/s", puts > 1000)
        errors = sum(one["errors"] for one in calm + busy)
        trial.must("others are served meanwhile", f"{errors} of their calls failed", not errors)
        if not trial.quick:
            p99 = sorted(one["p99"] for one in busy)[1]
            ratio = p99 / sorted(one["p99"] for one in calm)[1]
            trial.timing(
                f"p99 of others at most {milliseconds(bound)}",
                f"{milliseconds(p99)}, {ratio:.0f} times that without; median "
                f"{milliseconds(sorted(one['median'] for one in busy)[1])}",
                p99 <= bound,
            )
        trial.state("memory of it, with 2 s of messages", megabytes(daemon.peak_memory - before))


def pipeline(port: int, blob: bytes, seconds: float, most: int = 1 << 62) -> int:
    """Send requests continuously, without waiting for replies, but read the replies; return their number.

    It ends after this many seconds or replies.
    """
    until = time.monotonic() + seconds
    received = 0
    with dial(port) as sock:
        sock.setblocking(False)
        view, at = memoryview(blob), 0
        while received < most and time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                at = (at + sock.send(view[at : at + MIB])) % len(blob)
            try:
                received += sock.recv(MIB).count(b"\r\n")
            except BlockingIOError:
                time.sleep(0.0005)
        reset(sock)
    return received


# TLS


GARBAGE = (
    b"\x16\x03\x01\xff\xff" + bytes(1000),
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
    b"\xff" * 5000,
)


def tls(trial: Trial) -> None:
    try:
        import trustme
    except ImportError:
        raise NotHere("Python's trustme is not installed") from None
    count, timeout = trial.size(500, 50), trial.size(3, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        authority = trustme.CA()
        ca_file, cert_file = str(Path(folder, "ca.pem")), str(Path(folder, "cert.pem"))
        authority.cert_pem.write_to_path(ca_file)
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(cert_file)
        settings = {"host": "localhost", "tls_cert_file": cert_file, "auth_timeout_seconds": timeout}
        with victim(trial, ca_file=ca_file, **settings) as on:
            _attack_handshake(trial, on.daemon, count, timeout)


def _attack_handshake(trial: Trial, daemon: Daemon, count: int, timeout: float) -> None:
    def silent(port: int) -> Crowd:
        crowd = Crowd(port, count, trial.size(1, 0.1), lambda: iter([b"\x16\x03\x01"]))
        crowd.run(timeout + trial.size(1, 0.1) + (GRACE_SECONDS if port == daemon.port else 0))
        return crowd

    def garbage(port: int) -> Crowd:
        kinds = itertools.cycle(GARBAGE)
        crowd = Crowd(port, count, trial.size(1, 0.1), lambda: iter([next(kinds)]))
        crowd.run(timeout + trial.size(1, 0.1) + (GRACE_SECONDS if port == daemon.port else 0))
        return crowd

    crowd = silent(daemon.port)
    soonest, latest = min(crowd.lived, default=0), max(crowd.lived, default=0)
    trial.must(
        f"{count} unfinished handshakes are dropped at auth_timeout_seconds, {timeout:g} s",
        f"{len(crowd.lived)} were, after {soonest:.2f} to {latest:.2f} s",
        len(crowd.lived) == count and timeout - 0.2 <= soonest and latest <= timeout + 1,
    )
    crowd = garbage(daemon.port)
    trial.must(
        "garbage in the handshake: dropped by then",
        f"{len(crowd.lived)} of {count}, after {max(crowd.lived, default=0):.2f} s at most",
        len(crowd.lived) == count and max(crowd.lived) <= timeout + 1,
    )
    compare_latency(trial, daemon, silent)
