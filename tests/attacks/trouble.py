"""Faults in or around the server: no memory, no threads, a stopped process, a clock that jumps, SQLite errors."""

from __future__ import annotations

import re
import signal
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from attacks.connections import faulty, pipeline, serve_until
from attacks.crowd import dial
from attacks.rig import MIB, NotHere, Trial, Victim, megabytes, milliseconds, victim
from dsmq.client import DSMQClientSideConnection
from dsmq.errors import DSMQError, Full, StoreFailed
from dsmq.store.api import MESSAGE_OVERHEAD_BYTES
from dsmq.wire.resp import encode_request
from helpers import SOON, Daemon, reached

# Allowed memory of a full store beyond the bytes it counts: half-empty SQLite pages, and the write buffer.
OVERHEAD_RATIO, OVERHEAD_BYTES = 0.35, 12e6


@dataclass
class Writer:
    """Puts continuously and records the results."""

    daemon: Daemon
    topic: str
    sizes: tuple[int, ...]
    pause: float = 0.0
    stored: dict[int, bytes] = field(default_factory=dict)
    """Stored bodies by id."""
    refused: dict[str, int] = field(default_factory=dict)
    refused_at: float = 0.0
    stored_at: float = 0.0

    def run(self, ended: threading.Event) -> None:
        number = 0
        with self.daemon.client() as mq:
            while not ended.wait(self.pause):
                number += 1
                body = b"%b %d " % (self.topic.encode(), number)
                body += b"x" * (self.sizes[number % len(self.sizes)] - len(body))
                try:
                    self.stored[mq.put(self.topic, body)] = body
                    self.stored_at = time.monotonic()
                except DSMQError as error:
                    name = type(error).__name__
                    self.refused[name] = self.refused.get(name, 0) + 1
                    self.refused_at = time.monotonic()
                    # Leave some processor time to the server.
                    ended.wait(0.001)


@dataclass
class Reader:
    """Reads all topics from their first message."""

    daemon: Daemon
    topics: list[str]
    found: dict[int, bytes] = field(default_factory=dict)
    longest: float = 0.0
    errors: list[str] = field(default_factory=list)
    reads: int = 0
    missed: int = 0
    """Messages that expired before it could read them, because the machine is busy."""

    def run(self, ended: threading.Event) -> None:
        with self.daemon.client() as mq:
            for topic in self.topics:
                mq.seek(topic, 0)
            more, ending = True, False
            # An empty read ends this only after the last put.
            while more or not ending:
                ending = ended.is_set()
                more = bool(sum(self._read(mq, topic) for topic in self.topics))
                if not more:
                    time.sleep(0.002)
            self.missed = mq.missed

    def _read(self, mq: DSMQClientSideConnection, topic: str) -> int:
        began = time.monotonic()
        try:
            messages = mq.read(topic, 1000)
        except DSMQError as error:
            self.errors.append(repr(error))
            return 0
        self.reads += 1
        self.longest = max(self.longest, time.monotonic() - began)
        for message in messages:
            self.found[message.id] = message.body
        return len(messages)


@contextmanager
def clients(
    daemon: Daemon, count: int, sizes: tuple[int, ...], pause: float = 0.0
) -> Iterator[tuple[list[Writer], Reader]]:
    """Run writers, and a reader of all their messages, to completion."""
    writers = [Writer(daemon, f"topic {number}", sizes, pause) for number in range(count)]
    reader = Reader(daemon, [writer.topic for writer in writers])
    writing_ended, reading_ended = threading.Event(), threading.Event()
    threads = [threading.Thread(target=writer.run, args=(writing_ended,)) for writer in writers]
    last = threading.Thread(target=reader.run, args=(reading_ended,))
    for thread in (*threads, last):
        thread.start()
    try:
        yield writers, reader
    finally:
        writing_ended.set()
        for thread in threads:
            thread.join()
        reading_ended.set()
        last.join()


def judge(trial: Trial, writers: list[Writer], reader: Reader) -> None:
    """Check that exactly the accepted messages have been read or counted as missed."""
    stored = {number: body for writer in writers for number, body in writer.stored.items()}
    lost = len(stored.keys() - reader.found.keys())
    strange = len(reader.found.keys() - stored.keys())
    wrong = sum(reader.found[number] != body for number, body in stored.items() if number in reader.found)
    trial.must(
        "every put that returned is read, exactly; no other is",
        f"{len(stored):,} puts, {lost} lost, {reader.missed} missed, {strange} not accepted, {wrong} changed",
        bool(stored) and lost == reader.missed and not (strange or wrong),
    )


# Full store


def full(trial: Trial) -> None:
    limit, age = int(trial.size(64 * MIB, 2 * MIB)), trial.size(4, 1.5)
    settings = {"max_stored_bytes": limit, "max_age_seconds": age, "expiry_interval_seconds": 0.1}
    with victim(trial, **settings) as on:
        daemon = on.daemon
        base = daemon.memory
        daemon.forget_peak()
        sizes = (100, 1000, 5000, 20_000)
        with clients(daemon, 8, sizes) as (writers, reader):
            was_full = reached(lambda: all(writer.refused for writer in writers))
            reads = reader.reads
            goes_on = reached(lambda: reader.reads > reads + 10)
            # Space is freed and reused twice.
            at = time.monotonic()
            again = reached(lambda: all(writer.stored_at > at + 2 * age for writer in writers))
        peak = daemon.peak_memory - base
        kinds = {name for writer in writers for name in writer.refused}
        refused = sum(count for writer in writers for count in writer.refused.values())
        trial.must("puts beyond max_stored_bytes are answered -FULL", f"{refused:,} {kinds}", kinds == {"Full"})
        trial.must("the limit is met by all 8 writers", f"{was_full}", was_full)
        judge(trial, writers, reader)
        trial.must(
            "reads continue while it is full",
            f"{reader.reads:,}, {len(reader.errors)} failed, longest {milliseconds(reader.longest)}",
            goes_on and not reader.errors,
        )
        trial.must("puts succeed again after messages have expired", f"{again}", again)
        most = limit * (1 + OVERHEAD_RATIO) + OVERHEAD_BYTES
        trial.must(
            f"memory grows by the limit, {OVERHEAD_RATIO:.0%} and {megabytes(OVERHEAD_BYTES)} at most",
            f"{megabytes(peak)} with a limit of {megabytes(limit)}: {peak / limit:.2f} of it",
            peak <= most,
        )
        # Other clients can put again only once there is room.
        reached(lambda: daemon.metric("dsmq_messages") == 0)
    shapes = ((1, "one topic"), (1000, "1,000 topics"), (0, "a topic each"))
    for topics, about in shapes[trial.size(0, 2) :]:
        _state_overhead(trial, int(trial.size(64 * MIB, 2 * MIB)), topics, about)


def _state_overhead(trial: Trial, limit: int, topics: int, about: str) -> None:
    """Fill a server with one-byte messages; record the memory per counted byte."""
    with closing(Daemon(max_stored_bytes=limit)) as daemon:
        before = daemon.memory
        count = limit // (MESSAGE_OVERHEAD_BYTES + 1) + 1000
        frames = [encode_request(b"PUT", b"t%d" % (number % (topics or count)), b"x") for number in range(count)]
        pipeline(daemon.port, b"".join(frames), SOON, most=count)
        held = daemon.metric("dsmq_messages")
        counted = held * (MESSAGE_OVERHEAD_BYTES + 1)
        grown = daemon.memory - before
        trial.must(
            f"messages of 1 byte in {about} are refused at the limit too",
            f"{held:,.0f} held, {daemon.metric('dsmq_errors_total'):.0f} refused",
            counted <= limit and daemon.metric("dsmq_errors_total") > 0,
        )
        trial.state(
            f"memory of messages of 1 byte in {about}",
            f"{megabytes(grown)}: {grown / held:.0f} bytes each, {grown / counted:.2f} for a counted byte",
        )


# A stopped process


def stopped(trial: Trial) -> None:
    seconds = trial.size(10, 3)
    with victim(trial, request_timeout_seconds=seconds / 2, max_age_seconds=600) as on:
        daemon = on.daemon
        outcomes: list[str] = []
        calls: list[Callable[[DSMQClientSideConnection], object]] = [
            lambda mq: mq.put("t", "x"),
            lambda mq: mq.get("t"),
            lambda mq: mq.get_wait("nothing", timeout=0.1),
            lambda mq: mq.put_many("t", ["x"] * 1000),
        ]

        def call(patience: float, reconnects: float, number: int) -> None:
            try:
                with daemon.client(timeout=patience, retry=False, reconnect_timeout=reconnects) as mq:
                    stop.wait()
                    calls[number](mq)
                    outcomes.append("done")
            except OSError as error:
                outcomes.append(type(error).__name__)

        stop = threading.Barrier(3 * len(calls) + 1)
        threads = [
            threading.Thread(target=call, args=(patience, reconnects, number))
            for patience, reconnects in ((seconds + 10, 0), (seconds / 3, seconds + 10), (seconds / 2, 0))
            for number in range(len(calls))
        ]
        for thread in threads:
            thread.start()
        request = encode_request(b"PUT", b"t", b"in two halves")
        with on.scraper.paused(), dial(daemon.port) as half:
            reached(lambda: daemon.metric("dsmq_connections") == 3 * len(calls) + 1)
            # This is sent last, because its time limit starts when the server has received this much.
            before = daemon.metric("dsmq_received_bytes_total")
            half.sendall(request[:10])
            reached(lambda: daemon.metric("dsmq_received_bytes_total") >= before + 10)
            daemon.signal(signal.SIGSTOP)
            reached(lambda: daemon.state == "T")
            stop.wait()
            time.sleep(seconds)
            # On a busy machine, the calls may begin late.
            reached(lambda: len(outcomes) >= len(calls))
            half.sendall(request[10:])
            daemon.signal(signal.SIGCONT)
            served = serve_until(daemon)
            reply = half.recv(100)
        for thread in threads:
            thread.join(SOON)
        trial.must(
            "a request completed while it is stopped is not late",
            reply.decode().strip(),
            reply.startswith(b":"),
        )
        trial.must(
            f"stopped for {seconds} s: calls that wait longer or may reconnect succeed, others raise",
            f"{outcomes.count('done')} succeeded, {outcomes.count('ConnectionLost')} raised ConnectionLost",
            outcomes.count("done") == 2 * outcomes.count("ConnectionLost") == 2 * len(calls),
        )
        trial.at_once("served at once when resumed", milliseconds(served), served)


# No threads


def out_of_threads(trial: Trial) -> None:
    with victim(trial, *faulty("threads")) as on:
        daemon = on.daemon
        before = daemon.threads, daemon.files
        with on.scraper.paused(), daemon.client() as mq:
            mq.ping()
            daemon.fetch()
            daemon.signal(signal.SIGUSR1)
            if not reached(lambda: limit_of(daemon) == 1, 2):
                raise NotHere("the limit on threads can't be set")
            failed, slowest = 0, 0.0
            for _ in range(20):
                try:
                    daemon.fetch(timeout=2.0)
                except urllib.error.HTTPError as error:
                    failed += error.code == 503
                slowest = max(slowest, _time(lambda: mq.put("t", "x")))
            trial.must("without threads, the HTTP endpoint answers 503", f"503 for {failed} of 20", failed == 20)
            trial.at_once("others are served", f"slowest put {milliseconds(slowest)}", slowest)
            served = serve_until(daemon)
            trial.at_once("new clients are served", milliseconds(served), served)
            daemon.signal(signal.SIGUSR2)
            reached(lambda: limit_of(daemon) != 1)
        page = daemon.fetch()
        trial.must("then the HTTP endpoint answers again", f"{len(page):,} bytes", "dsmq_puts_total" in page)
        left = reached(lambda: daemon.threads <= before[0] and daemon.files <= before[1])
        trial.must("those requests leak no files", f"{daemon.files - before[1]:+d} files", left)


def limit_of(daemon: Daemon) -> int:
    """Return the limit on threads for a server's user."""
    found = re.search(r"Max processes +(\d+)", Path(f"/proc/{daemon.pid}/limits").read_text())
    return int(found[1]) if found else 0


def _time(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


# Wall clock


def clock(trial: Trial) -> None:
    age = trial.size(3, 1.0)
    with victim(trial, *faulty("clock"), max_age_seconds=age, expiry_interval_seconds=0.1) as on:
        daemon = on.daemon
        with daemon.client() as mq:
            put_at = time.monotonic()
            first = mq.put("t", "before")
            held, took = [], []
            for step in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR2, signal.SIGUSR1):
                daemon.signal(step)
                # The reply shows that the server has handled the signal.
                mq.put("t", "x")
                mq.seek("t", first - 1)
                held.append(mq.get("t") == "before")
            in_time = time.monotonic() - put_at < age
            trial.must(
                "steps of a day, forward and back: no message is lost",
                f"{sum(held)} of 4 steps",
                all(held) and in_time,
            )
            for step in (signal.SIGUSR2, signal.SIGUSR1):
                at = time.monotonic()
                last = mq.put("t", "y")
                daemon.signal(step)
                gone = reached(lambda: daemon.metric("dsmq_messages") == 0, 5 * age + 5)
                took.append(time.monotonic() - at)
                mq.seek("t", last - 1)
                gone = gone and not mq.get("t")
                trial.must(
                    f"and messages still expire after {age:g} s",
                    f"{took[-1]:.2f} s",
                    gone and age <= took[-1] < age + 1,
                )


# SQLite


def sqlite(trial: Trial) -> None:
    for fault, wanted in (("error", StoreFailed), ("memory", Full), ("rollback", StoreFailed)):
        with victim(trial, *faulty(fault)) as on:
            _have_fail(trial, on, fault, wanted)


def _have_fail(trial: Trial, on: Victim, fault: str, wanted: type[DSMQError]) -> None:
    daemon = on.daemon
    with clients(daemon, 4, (1000,), 0.0005) as (writers, reader):
        reached(lambda: all(writer.stored for writer in writers))
        daemon.signal(signal.SIGUSR1)
        failed = reached(lambda: all(writer.refused for writer in writers))
        # Long enough for repeated failures in the expiry thread and in reads.
        time.sleep(trial.size(2, 0.2))
        daemon.signal(signal.SIGUSR2)
        at = time.monotonic()
        again = reached(lambda: all(writer.stored_at > at for writer in writers))
        took = time.monotonic() - at
    kinds = {name for writer in writers for name in writer.refused}
    trial.must(
        f"SQL fails ({fault}): puts are answered {wanted.code}",  # type: ignore[attr-defined]
        f"{sum(sum(writer.refused.values()) for writer in writers):,} {kinds}",
        failed and kinds == {wanted.__name__},
    )
    trial.must("then all writers are served", f"{again}", again)
    trial.at_once("then normal service", f"after {milliseconds(took)}", took)
    judge(trial, writers, reader)
