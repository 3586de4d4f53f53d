"""Compare readers of many topics and of patterns: `python tests/performance/patterns.py`.

Measures the time from a put to the message at a waiting reader of 100 topics, and how many messages a second arrive at
1, 10 and 100 readers of a pattern, in interleaved rounds. Every broker is used through its usual Python client, each
reader in a process of its own. Servers that are not installed are skipped, by name. README.md has the results.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import brokers
from brokers import median_ratio, progress, say

TOPICS = [f"s/{number}" for number in range(100)]
# Messages put, in a round: for the readers of a pattern together, and for the reader of 100 topics.
MOST_MESSAGES, MESSAGES = 10_000, 200


class Dsmq:
    """This project: the topics by their names or a pattern."""

    server = "dsmq"
    package = "dsmq.client"

    def __init__(self, port: int) -> None:
        from dsmq.client import connect

        self.mq = connect(port=port)

    def close(self) -> None:
        self.mq.close()

    def put(self, topic: str, message: str) -> None:
        self.mq.put(topic, message)

    def messages(self, *, is_pattern: bool) -> Iterator[Any]:
        return self.mq.messages("s/*") if is_pattern else self.mq.messages(TOPICS)


class Redis:
    """A connection to Redis."""

    server = "redis"
    package = "redis"

    def __init__(self, port: int) -> None:
        import redis

        self.redis = redis.Redis(port=port, decode_responses=True, socket_timeout=None)

    def close(self) -> None:
        self.redis.close()


class Streams(Redis):
    """Redis streams, which have no patterns: the topics by their names in both cases."""

    def put(self, topic: str, message: str) -> None:
        self.redis.xadd(topic, {"m": message})

    def messages(self, *, is_pattern: bool) -> Iterator[Any]:
        last: dict[Any, Any] = {}
        for topic in TOPICS:
            found: Any = self.redis.xrevrange(topic, count=1)
            last[topic] = found[0][0] if found else "0-0"
        return self._read(last)

    def _read(self, last: dict[Any, Any]) -> Iterator[Any]:
        while True:
            found: Any = self.redis.xread(last, block=3_600_000)
            for topic, entries in found.items() if isinstance(found, dict) else found:
                for entry, fields in entries[0] if isinstance(found, dict) else entries:
                    last[topic] = entry
                    yield fields["m"]


class PubSub(Redis):
    """Redis's publish and subscribe: not stored; a put ends once the server has it."""

    def put(self, topic: str, message: str) -> None:
        self.redis.publish(topic, message)

    def messages(self, *, is_pattern: bool) -> Iterator[Any]:
        listener = self.redis.pubsub()
        names = ["s/*"] if is_pattern else TOPICS
        (listener.psubscribe if is_pattern else listener.subscribe)(*names)
        found, confirmed = listener.listen(), set[str]()
        # What is published before the server confirms a subscription is lost.
        while len(confirmed) < len(names):
            confirmed.add(next(found)["channel"])
        return self._texts(found)

    def _texts(self, found: Iterator[Any]) -> Iterator[Any]:
        # A method, because the client disconnects its listeners when it is garbage-collected.
        for message in found:
            yield message["data"]


class Mosquitto:
    """MQTT with QoS 1, through paho-mqtt."""

    server = "mosquitto"
    package = "paho.mqtt.client"

    def __init__(self, port: int) -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        self.arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.client.on_message = lambda _client, _data, message: self.arrived.put(message.payload)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def put(self, topic: str, message: str) -> None:
        self.client.publish(topic, message, qos=1).wait_for_publish()

    def messages(self, *, is_pattern: bool) -> Iterator[Any]:
        subscribed: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.client.on_subscribe = lambda *_: subscribed.put(True)
        self.client.subscribe("s/#" if is_pattern else [(topic, 1) for topic in TOPICS], qos=1)
        subscribed.get(timeout=60)
        return iter(self.arrived.get, None)


class Nats:
    """Core NATS, through nats-py: not stored; a put ends once the server has it."""

    server = "nats"
    package = "nats"

    def __init__(self, port: int) -> None:
        import nats

        self.loop = asyncio.new_event_loop()
        self.client = self.loop.run_until_complete(nats.connect(f"nats://127.0.0.1:{port}"))

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()

    def put(self, topic: str, message: str) -> None:
        async def publish() -> None:
            await self.client.publish(topic.replace("/", "."), message.encode())
            await self.client.flush()

        self.loop.run_until_complete(publish())

    def messages(self, *, is_pattern: bool) -> Iterator[Any]:
        arrived: asyncio.Queue[Any] = asyncio.Queue()

        async def subscribe() -> None:
            for subject in ["s.*"] if is_pattern else [topic.replace("/", ".") for topic in TOPICS]:
                await self.client.subscribe(subject, cb=arrived.put)
            await self.client.flush()

        self.loop.run_until_complete(subscribe())
        return iter(lambda: self.loop.run_until_complete(arrived.get()), None)


SYSTEMS: dict[str, Any] = {
    "dsmq": Dsmq,
    "redis streams": Streams,
    "redis pub/sub": PubSub,
    "mosquitto": Mosquitto,
    "nats": Nats,
}


class Readers:
    """Processes that read. They are forked after the imports, so that many start soon."""

    def __init__(  # noqa: PLR0917 - what readers are started with
        self, system: str, port: int, kind: str, count: int, stack: ExitStack, readers: int = 1
    ) -> None:
        words = [sys.executable, __file__, "--read", system, str(port), kind, str(count), str(readers)]
        self.process = stack.enter_context(
            subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        stack.callback(self.stop)
        for _ in range(readers):
            self.line()

    def stop(self) -> None:
        """Kill them. Idempotent."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a reader has ended")
        return line


def read_one(messages: Iterator[Any], kind: str, count: int) -> None:
    # Use a single write each, because all share the pipe.
    os.write(1, b"ready\n")
    for number in range(count):
        next(messages)
        if kind == "topics" or number == count - 1:
            os.write(1, b"%f\n" % time.monotonic())


def read(system: str, port: str, kind: str, count: str, readers: str) -> None:
    """Run the readers; each prints the time of each message, or of the last."""
    importlib.import_module(SYSTEMS[system].package)
    children = []
    for _ in range(int(readers)):
        if child := os.fork():
            children.append(child)
            continue
        try:
            read_one(SYSTEMS[system](int(port)).messages(is_pattern=kind == "pattern"), kind, int(count))
            os._exit(0)
        except BaseException:  # noqa: BLE001 - it must not go on as its parent
            traceback.print_exc()
            os._exit(1)
    for _ in children:
        _, status = os.wait()
        if status:
            # No other process may keep the pipe open.
            os.killpg(0, signal.SIGKILL)


def latency(system: str, port: int, count: int) -> dict[str, float]:
    """Return microseconds from a put to the message at a reader of 100 topics."""
    with ExitStack() as stack:
        reader = Readers(system, port, "topics", count, stack)
        client = stack.enter_context(closing(SYSTEMS[system](port)))
        taken = []
        for number in range(count):
            # The reader waits again.
            time.sleep(0.002)
            before = time.monotonic()
            client.put(TOPICS[number % len(TOPICS)], "hello world!")
            taken.append((float(reader.line()) - before) * 1e6)
    taken.sort()
    return {"p50": statistics.median(taken), "p99": taken[round(len(taken) * 0.99) - 1]}


def rate(system: str, port: int, readers: int, count: int) -> float:
    """Return how many messages a second arrive, at all readers together."""
    with ExitStack() as stack:
        found = Readers(system, port, "pattern", count, stack, readers)
        client = stack.enter_context(closing(SYSTEMS[system](port)))
        before = time.monotonic()
        for number in range(count):
            client.put(TOPICS[number % len(TOPICS)], "hello world!")
        return readers * count / (max(float(found.line()) for _ in range(readers)) - before)


def measure(ports: dict[str, int], rounds: int, scale: float, levels: list[int]) -> dict[str, dict[str, list[float]]]:
    figures: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for system, port in ports.items():
            progress(f"round {number + 1} of {rounds}: a reader of 100 topics, {system}")
            for name, value in latency(system, port, max(1, round(MESSAGES * scale))).items():
                figures.setdefault(f"put to message, {name}, µs", {}).setdefault(system, []).append(value)
            for readers in levels:
                progress(f"round {number + 1} of {rounds}: {readers} readers of a pattern, {system}")
                row = f"messages a second to {readers} readers of a pattern"
                value = rate(system, port, readers, max(1, round(MOST_MESSAGES / (readers + 4) * scale)))
                figures.setdefault(row, {}).setdefault(system, []).append(value)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--readers", nargs="*", type=int, default=[1, 10, 100], help="default: 1 10 100")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the usual number of messages")
    parser.add_argument("--json", action="store_true", help="print all figures instead of the table")
    options = parser.parse_args()
    with ExitStack() as stack:
        wanted = {name: SYSTEMS[name].server for name in options.systems}
        found = {broker.name: broker for broker in brokers.find(stack, [*wanted.values()])}
        ports = {name: found[server].port for name, server in wanted.items() if server in found}
        figures = measure(ports, options.rounds, options.scale, options.readers)
    progress("")
    if options.json:
        print(json.dumps(figures))
        return
    peers = [name for name in ports if name != "dsmq"]
    say(f"medians of {options.rounds} rounds; a ratio is dsmq's figure divided by the peer's")
    print(f"| | dsmq | {' | '.join(peers)} |\n| --- |" + " ---: |" * (len(peers) + 1))
    for row, by_system in figures.items():
        cells = [f"{median_ratio(by_system['dsmq'], by_system[peer]):.2f}" for peer in peers]
        print(f"| {row} | {statistics.median(by_system['dsmq']):,.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(*sys.argv[2:])
    else:
        main()
