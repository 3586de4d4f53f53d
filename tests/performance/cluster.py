"""Compare dsmq in front of three NATS nodes with NATS's own Python client: `python tests/performance/cluster.py`.

Starts three nodes, with their files in a temporary folder, two servers that share them and one with the store in
memory, and runs the same work on each in interleaved rounds. A figure is the median of the rounds' ratios. README.md
has the results. `--held 1000000` measures how long another server takes to start with that many messages stored.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nats
from brokers import Broker, median_ratio, progress
from nats.js.api import StorageType, StreamConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

from dsmq.client import DSMQClientSideConnection, connect
from engine import Engine, engine

MESSAGE = "x" * 100
PUTS, GETS, MANY, DELIVERIES, HELD = 300, 5000, 5000, 100, 10_000
# The number of publishes that nats-py pipelines for `put_many`.
PIPELINED = 500
# Name, target, description, and what it is compared with.
ROWS = (
    ("put", "at most 1.5", "put, µs; nats-py", "nats-py"),
    ("put_many", "at least 0.9", "messages per second of put_many; nats-py", "nats-py"),
    ("get", "at most 1.2", "get with a backlog, µs; store in memory", "in memory"),
    ("delivery", "at most 3", "put to a reader at the other server, µs; put", "put"),
)

Figures = dict[tuple[str, str], list[float]]


def median_of(call: Callable[[], object], count: int) -> float:
    """Return the median duration in microseconds."""
    taken = []
    for _ in range(count):
        before = time.perf_counter()
        call()
        taken.append((time.perf_counter() - before) * 1e6)
    return statistics.median(taken)


class NATSClient:
    """NATS's own client, connected to one of the nodes."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = self.run(nats.connect("nats://{}:{}".format(*address)))
        self.stream = self.client.jetstream()

    def run(self, awaitable: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(awaitable)

    def create_stream(self) -> None:
        config = StreamConfig(name="other", subjects=["other.*"], storage=StorageType.FILE, num_replicas=3)
        self.run(self.stream.add_stream(config))

    def put(self) -> float:
        async def publish() -> list[float]:
            taken = []
            for _ in range(PUTS):
                before = time.perf_counter()
                await self.stream.publish("other.t", MESSAGE.encode())
                taken.append((time.perf_counter() - before) * 1e6)
            return taken

        return statistics.median(self.run(publish()))

    def put_many(self) -> float:
        async def publish() -> None:
            for _ in range(0, MANY, PIPELINED):
                await asyncio.gather(*(self.stream.publish("other.t", MESSAGE.encode()) for _ in range(PIPELINED)))

        before = time.perf_counter()
        self.run(publish())
        return MANY / (time.perf_counter() - before)

    def close(self) -> None:
        self.run(self.client.close())
        self.loop.close()


def rate_of_put_many(client: DSMQClientSideConnection, topic: str) -> float:
    before = time.perf_counter()
    client.put_many(topic, [MESSAGE] * MANY)
    return MANY / (time.perf_counter() - before)


def gets(client: DSMQClientSideConnection, topic: str) -> float:
    """Return the mean duration in microseconds of reading a backlog."""
    before = time.perf_counter()
    for _ in range(GETS):
        assert client.get(topic) == MESSAGE
    return (time.perf_counter() - before) / GETS * 1e6


def deliveries(writer: DSMQClientSideConnection, reader: DSMQClientSideConnection, topic: str) -> float:
    """Return the median time in microseconds from a put to the delivery of its message to a waiting reader."""
    taken: list[float] = []
    waiting = threading.Event()

    def read() -> None:
        for _ in range(DELIVERIES):
            waiting.set()
            message = reader.get_wait(topic, timeout=60)
            taken.append((time.perf_counter() - float(str(message))) * 1e6)

    assert not reader.get(topic)
    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(DELIVERIES):
        waiting.wait()
        waiting.clear()
        # Until the server has parked the request.
        time.sleep(0.002)
        writer.put(topic, repr(time.perf_counter()))
    thread.join()
    return statistics.median(taken)


def url_of(nodes: Engine) -> str:
    return "nats://" + ",".join(f"{host}:{port}" for host, port in nodes.servers)


class Clients:
    """The clients that are compared. The other server starts last, so that puts are measured with one server."""

    def __init__(self, nodes: Engine, stack: ExitStack) -> None:
        self._stack, self._store = stack, url_of(nodes)
        self.nats = [NATSClient(address) for address in nodes.servers]
        for client in self.nats:
            stack.callback(client.close)
        self.nats[0].create_stream()
        self.dsmq = self.connect("--store", self._store)

    def connect(self, *options: str) -> DSMQClientSideConnection:
        """Connect to a new server."""
        return self._stack.enter_context(connect(port=Broker("dsmq", self._stack, *options).port))

    def connect_others(self) -> None:
        self.other, self.memory = self.connect("--store", self._store), self.connect()

    def measure_puts(self, number: int) -> Iterator[tuple[tuple[str, str], float]]:
        """Iterate over the figures of a round."""
        # Clients of NATS choose a node at random, so each round uses another one.
        native = self.nats[number % len(self.nats)]
        yield ("put", "dsmq"), median_of(lambda: self.dsmq.put("puts", MESSAGE), PUTS)
        yield ("put", "nats-py"), native.put()
        yield ("put_many", "dsmq"), rate_of_put_many(self.dsmq, f"many{number}")
        yield ("put_many", "nats-py"), native.put_many()

    def measure_reads(self, number: int) -> Iterator[tuple[tuple[str, str], float]]:
        """The same with the others."""
        topic = f"get{number}"
        for client in (self.dsmq, self.memory):
            client.put_many(topic, [MESSAGE] * GETS)
        # Until then, the nodes and the other server share the processors.
        assert self.other.get_latest(topic) == MESSAGE
        yield ("get", "dsmq"), gets(self.dsmq, topic)
        yield ("get", "in memory"), gets(self.memory, topic)
        yield ("delivery", "put"), median_of(lambda: self.dsmq.put("puts", MESSAGE), PUTS // 3)
        yield ("delivery", "dsmq"), deliveries(self.dsmq, self.other, f"wait{number}")


def compare(nodes: Engine, rounds: int) -> None:
    """Print the figures of dsmq, of what it is compared with, and their ratio."""
    figures: Figures = {}
    with ExitStack() as stack:
        clients = Clients(nodes, stack)
        for measure in (clients.measure_puts, clients.measure_reads):
            for number in range(rounds + 1):
                progress(f"round {number} of {rounds}")
                # The first round warms up.
                for key, value in measure(number):
                    if number:
                        figures.setdefault(key, []).append(value)
            if measure == clients.measure_puts:
                clients.connect_others()
        progress("")
    for row, target, label, peer in ROWS:
        ours, theirs = figures[row, "dsmq"], figures[row, peer]
        ratio = median_ratio(ours, theirs)
        print(
            f"| {label} | {statistics.median(ours):,.1f} | {statistics.median(theirs):,.1f} | {ratio:.2f} ({target}) |"
        )


def start_with_held(nodes: Engine, count: int) -> None:
    """Print the time a server takes to start with this many messages in the stream and its memory afterwards."""
    options = ("--store", url_of(nodes), "--max-age-seconds", "86400")
    with ExitStack() as stack:
        client = stack.enter_context(connect(port=Broker("dsmq", stack, *options).port))
        for at in range(0, count, HELD):
            progress(f"{at:,} of {count:,} messages put")
            client.put_many("held", [MESSAGE] * min(HELD, count - at))
        progress("")
        before = time.perf_counter()
        server = Broker("dsmq", stack, *options)
        seconds = time.perf_counter() - before
        print(f"started with {count:,} messages after {seconds:.1f} s, with {server.memory / 1e6:,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--held", type=int, default=0, help="measure only the start with this many messages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsmq-performance-") as folder, engine(Path(folder) / "nodes") as nodes:
        if options.held:
            start_with_held(nodes, options.held)
        else:
            compare(nodes, options.rounds)


if __name__ == "__main__":
    main()
