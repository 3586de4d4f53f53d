"""Measure how dsmq's costs grow: `python tests/performance/scale.py`. README.md has the results.

They may grow with stored messages, topics, idle connections, waiting readers and message size. Each is measured
alternately on a loaded and on an empty server; a ratio is the median over all rounds of loaded / empty. Further
figures: latencies while a million messages expire and while a snapshot is written, and one-off costs (start, import,
metrics, restart).
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import plots
from brokers import Broker, median_ratio, progress, say

from dsmq.client import DSMQClientSideConnection, connect
from dsmq.demo_cluster import free_ports
from dsmq.system import allow_more_files
from dsmq.wire.resp import encode_request

LEVELS = {
    "messages": [1_000, 10_000, 100_000, 1_000_000],
    "topics": [1, 10, 100, 1_000, 10_000, 100_000],
    "idle": [10, 100, 1_000, 10_000],
    "waiting": [1, 10, 100, 1_000],
    "size": [10, 100, 1_000, 10_000, 100_000, 1_000_000, 8_388_608],
}
COUNT = 500
BODY = "x" * 100

# Figures by level or kind.
Result = dict[str, float]


class Probe:
    """A client that measures the costs of operations on one server."""

    def __init__(self, broker: Broker, stack: ExitStack) -> None:
        self.broker = broker
        self.mq = stack.enter_context(connect(port=broker.port))
        self.round = 0

    def costs(self) -> Result:
        """Return microseconds per operation, in new topics."""
        self.round += 1
        topic = f"probe {self.round}"
        self.mq.get(topic)
        return {
            "put": timed(lambda: self.mq.put(topic, "hello world!")),
            "get": timed(lambda: self.mq.get(topic)),
            "empty get": timed(lambda: self.mq.get(topic)),
        }


def timed(call: Callable[[], object], count: int = COUNT) -> float:
    """Return microseconds per call."""
    before = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - before) / count * 1e6


def compare(loaded: Probe, empty: Probe, rounds: int) -> Result:
    """Return the ratios of the costs, loaded / empty, and the costs when loaded."""
    pairs = []
    for number in range(rounds + 1):
        pair = (loaded.costs(), empty.costs()) if number % 2 else (empty.costs(), loaded.costs())[::-1]
        # The first round warms up.
        if number:
            pairs.append(pair)
    result = {}
    for name in pairs[0][0]:
        result[name] = statistics.median(ours[name] for ours, _ in pairs)
        result[f"{name}, ratio"] = median_ratio(
            (ours[name] for ours, _ in pairs), (theirs[name] for _, theirs in pairs)
        )
    return result


def messages(level: int, rounds: int) -> Result:
    with servers() as (loaded, empty):
        before = loaded.broker.memory
        for _ in range(0, level, 1000):
            loaded.mq.put_many("held", [BODY] * 1000)
        used = (loaded.broker.memory - before) / level
        return compare(loaded, empty, rounds) | {"bytes a message": used}


def topics(level: int, rounds: int) -> Result:
    with servers() as (loaded, empty):
        before = loaded.broker.memory
        for number in range(level):
            loaded.mq.put(f"topic {number}", BODY)
        used = (loaded.broker.memory - before) / level
        return compare(loaded, empty, rounds) | {"bytes a topic": used}


def idle(level: int, rounds: int) -> Result:
    with servers() as (loaded, empty), ExitStack() as stack:
        before = loaded.broker.memory
        for one in connections(loaded.broker.port, level, encode_request(b"PING"), stack):
            one.recv(64)
        used = (loaded.broker.memory - before) / level
        return compare(loaded, empty, rounds) | {"bytes a connection": used}


def connections(port: int, count: int, request: bytes, stack: ExitStack) -> list[socket.socket]:
    """Open connections and send a request on each."""
    opened = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)) for _ in range(count)]
    for one in opened:
        one.sendall(request)
    return opened


def waiting(level: int, rounds: int) -> Result:
    """Measure others' costs and the time until all waiting readers have a message."""
    request = encode_request(b"GETWAIT", b"waited for", b"60000")
    with servers() as (loaded, empty), ExitStack() as stack:
        readers = connections(loaded.broker.port, level, request, stack)
        result = compare(loaded, empty, rounds)
        taken = []
        for _ in range(rounds):
            # One loop serves all connections: after this reply it has read the readers' requests.
            loaded.mq.ping()
            before = time.perf_counter()
            loaded.mq.put("waited for", "hello world!")
            for reader in readers:
                reader.recv(4096)
            taken.append((time.perf_counter() - before) * 1e6)
            for reader in readers:
                reader.sendall(request)
        return result | {"put until all have it": statistics.median(taken)}


def size(level: int, rounds: int) -> Result:
    """Measure the costs of messages of this size."""
    body, count = b"x" * level, max(3, min(COUNT, 20_000_000 // level))
    taken: dict[str, list[float]] = {"put": [], "get": []}
    with servers() as (_, empty):
        for number in range(rounds):
            topic = f"size {number}"
            empty.mq.get(topic)
            taken["put"].append(timed(lambda: empty.mq.put(topic, body), count))  # noqa: B023
            taken["get"].append(timed(lambda: empty.mq.get(topic, raw=True), count))  # noqa: B023
    return {name: statistics.median(values) for name, values in taken.items()}


@contextmanager
def servers() -> Iterator[tuple[Probe, Probe]]:
    """Start two servers with a probe each: one to be loaded, one to stay empty."""
    with ExitStack() as stack:
        yield Probe(Broker("dsmq", stack), stack), Probe(Broker("dsmq", stack), stack)


MEASURES = {"messages": messages, "topics": topics, "idle": idle, "waiting": waiting, "size": size}


def expiry(count: int = 1_000_000) -> Result:
    """Measure the 99th percentile of put and empty get, before and while messages expire."""
    with ExitStack() as stack:
        probe = Probe(Broker("dsmq", stack, "--max-age-seconds", "20"), stack)
        began = time.monotonic()
        for _ in range(0, count, 1000):
            probe.mq.put_many("held", [BODY] * 1000)
        filled = time.monotonic()
        if filled - began > 12:
            say(f"it took {filled - began:.0f} s to put {count} messages, so some may have expired too soon")
        calm = latencies(probe.mq, lambda: time.monotonic() < began + 18)
        while held(probe.mq) == count:
            time.sleep(0.01)
        expiring = latencies(probe.mq, lambda: held(probe.mq) > 0)
    return {
        "p99 before": percentile(calm, 99),
        "p99 meanwhile": percentile(expiring, 99),
        "ratio": percentile(expiring, 99) / percentile(calm, 99),
        "longest before": max(calm),
        "longest meanwhile": max(expiring),
        "operations meanwhile": len(expiring),
    }


def snapshot(size: int, snapshots: int = 3) -> Result:
    """Measure the 99th percentile of put and empty get, between and during snapshots of this many bytes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsmq-performance-")))
        options = ("--snapshot-file", str(folder / "it"), "--snapshot-interval-seconds", "5")
        options = (*options, "--max-stored-bytes", str(4 * size), "--max-stored-bytes-per-topic", str(4 * size))
        options = (*options, "--max-age-seconds", "3600")
        mq = Probe(Broker("dsmq", stack, *options), stack).mq
        for _ in range(0, size, 1_000_000):
            mq.put_many("held", ["x" * 1000] * 1000)
        being_written = (folder / "it.new").exists
        calm, busy, seconds = [], [], 0.0
        for _ in range(snapshots):
            calm += latencies(mq, lambda: not being_written())
            began = time.monotonic()
            busy += latencies(mq, being_written)
            seconds += time.monotonic() - began
    return {
        "p99 between": percentile(calm, 99),
        "p99 meanwhile": percentile(busy, 99),
        "ratio": percentile(busy, 99) / percentile(calm, 99),
        "longest between": max(calm),
        "longest meanwhile": max(busy),
        "operations meanwhile": len(busy),
        "seconds each": seconds / snapshots,
    }


def restart(count: int, rounds: int) -> Result:
    """Measure the milliseconds of a stop, and of a start until it accepts clients, with and without these messages."""
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for kind, messages in (("empty", 0), ("loaded", count)):
            with ExitStack() as stack:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dsmq-performance-"))
                options = ("--snapshot-file", f"{folder}/it", "--max-age-seconds", "3600")
                probe = Probe(Broker("dsmq", stack, *options), stack)
                for _ in range(0, messages, 1000):
                    probe.mq.put_many("held", [BODY] * 1000)
                probe.broker.process.terminate()
                taken.setdefault(f"stop {kind}", []).append(timed(probe.broker.process.wait, 1) / 1000)
                before = time.perf_counter()
                again = Broker("dsmq", stack, *options)
                with connect(port=again.port) as mq:
                    mq.ping()
                    taken.setdefault(f"start {kind}", []).append((time.perf_counter() - before) * 1000)
                    if messages and held(mq) != messages:
                        raise RuntimeError("not all has been restored")
    return {name: statistics.median(values) for name, values in taken.items()}


def held(mq: DSMQClientSideConnection) -> int:
    """Return how many of the messages put at the start are still stored."""
    return sum(messages for name, messages, _ in mq.topics() if name == "held")


def latencies(mq: DSMQClientSideConnection, going_on: Callable[[], bool]) -> list[float]:
    """Collect the microseconds of each put and get, until stopped."""
    taken = []
    while going_on():
        for _ in range(20):
            taken.append(timed(lambda: mq.put("probe", "hello world!"), 1))
            taken.append(timed(lambda: mq.get("probe"), 1))
    return taken


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def overheads(rounds: int) -> dict[str, Result]:
    """Measure the costs of import, start and metrics."""
    commands = {
        "import dsmq.client": [sys.executable, "-c", "import dsmq.client"],
        "python": [sys.executable, "-c", "pass"],
        "import of the server's packages": [
            sys.executable,
            "-c",
            "import pydantic_settings, prometheus_client, sqlite3",
        ],
    }
    taken: dict[str, list[float]] = {}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}: import and start")
        for name, command in commands.items():
            taken.setdefault(name, []).append(timed(lambda: subprocess.run(command, check=True), 1) / 1000)  # noqa: B023
        with ExitStack() as stack:
            before = time.perf_counter()
            Broker("dsmq", stack)
            taken.setdefault("dsmq serve until it accepts", []).append((time.perf_counter() - before) * 1000)
    result = {name: statistics.median(values) for name, values in taken.items()}
    result["import dsmq.client, without python"] = statistics.median(
        ours - theirs for ours, theirs in zip(taken["import dsmq.client"], taken["python"], strict=True)
    )
    result["start / import of its packages"] = median_ratio(
        taken["dsmq serve until it accepts"], taken["import of the server's packages"]
    )
    return {"milliseconds": result, "metrics on / off": metrics(rounds)}


def metrics(rounds: int) -> Result:
    """Return the ratios of costs with metrics, scraped four times a second, to those without an HTTP endpoint."""
    with ExitStack() as stack:
        off = Probe(Broker("dsmq", stack, "--http-port", "off"), stack)
        (port,) = free_ports(1)
        on = Probe(Broker("dsmq", stack, "--http-port", str(port)), stack)
        ended = threading.Event()

        def scrape() -> None:
            while not ended.wait(0.25):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                    page.read()

        scraper = threading.Thread(target=scrape)
        scraper.start()
        try:
            return compare(on, off, rounds * 5)
        finally:
            ended.set()
            scraper.join()


def plot(results: dict[str, dict[int, Result]], path: Path) -> None:
    """Draw one panel per measure."""
    titles = {
        "messages": "messages held",
        "topics": "topics",
        "idle": "idle connections",
        "waiting": "waiting readers",
        "size": "bytes of a message",
    }
    figure, panels = plots.pyplot().subplots(2, 3, figsize=(11, 6), layout="constrained")
    for panel, (name, by_level) in zip(panels.flat, results.items(), strict=False):
        for operation in ("put", "get", "empty get", "put until all have it"):
            points = [(level, result[operation]) for level, result in by_level.items() if operation in result]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=operation)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylim(bottom=1)
        panel.set_xlabel(titles[name])
        panel.set_ylabel("µs")
        panel.grid(visible=True, alpha=0.3)
        panel.legend(fontsize=7)
    for panel in list(panels.flat)[len(results) :]:
        panel.set_axis_off()
    plots.save(figure, path)


def show(title: str, result: Result) -> None:
    print(f"{title:>24}  " + "  ".join(f"{name} {value:,.2f}" for name, value in result.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[*MEASURES, "expiry", "snapshot", "overheads"])
    parser.add_argument("--most", type=int, default=10**9, help="skip larger levels")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="draw them to this SVG or PNG file; needs matplotlib")
    options = parser.parse_args()
    prepare_files()
    results: dict[str, dict[int, Result]] = {}
    for name, measure in MEASURES.items():
        if name not in options.only:
            continue
        for level in [level for level in LEVELS[name] if level <= options.most]:
            progress(f"{name}: {level}")
            results.setdefault(name, {})[level] = measure(level, options.rounds)
            show(f"{name} {level:,}", results[name][level])
    others: dict[str, Result] = {}
    if "expiry" in options.only:
        progress("a million messages expire")
        others["expiry"] = expiry()
    if "snapshot" in options.only:
        progress("snapshots of 1 GB")
        others["snapshot"] = snapshot(min(options.most, 1_000_000_000))
        progress("restarts")
        others["restart"] = restart(min(options.most, 100_000), options.rounds)
    if "overheads" in options.only:
        others |= overheads(options.rounds)
    for name, result in others.items():
        show(name, result)
    if options.json:
        options.json.write_text(json.dumps({"costs": results, **others}, indent=1))
    if options.plot and results:
        plot(results, options.plot)


def prepare_files() -> None:
    """Raise the limit on open files for the idle connections or reduce their number."""
    # The servers inherit it.
    allow_more_files()
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 < files < 10_100:
        LEVELS["idle"][-1] = files - 100
        say(f"only {files} open files are allowed, so there will be {files - 100} idle connections at most")


if __name__ == "__main__":
    main()
