"""Measures typical operations, for `dsmq bench` and for the performance tests."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dsmq.errors import DSMQError

SHORT = "hello world!"
LONG = "x" * 100_000
# Short messages per long message.
_SHORT_TO_LONG = 20


class Figure(NamedTuple):
    """The average duration of an operation."""

    name: str
    microseconds: float
    characters: int
    """The length of the message."""

    def __str__(self) -> str:
        line = f"{self.name:<34}{self.microseconds:>12,.1f} µs"
        if self.characters >= 1000:
            line += f"{self.microseconds / self.characters * 1000:>12,.2f} µs per 1,000 characters"
        return line


def measure(client: Any, count: int, progress: Callable[[str], None]) -> Iterator[Figure]:
    """Time `count` calls of `put` and `get`, fewer with long messages; call `progress` with the name of each test.

    Uses topics of its own, whose messages stay on the server until they expire. Raises DSMQError if a message does not
    come back, and any error of the client.
    """
    topic = f"dsmq-bench-{secrets.token_hex(4)}"
    few = max(1, count // _SHORT_TO_LONG)

    def timed(name: str, times: int, call: Callable[[], object], characters: int = 0) -> Figure:
        progress(name)
        before = time.perf_counter()
        for _ in range(times):
            call()
        return Figure(name, (time.perf_counter() - before) / times * 1e6, characters)

    def read(suffix: str, expected: str) -> Callable[[], None]:
        def call() -> None:
            if (client.get(topic + suffix) or "") != expected:
                raise DSMQError(f"a message put into {topic + suffix} was not returned; has it expired?")

        return call

    def write(suffix: str, message: str) -> Callable[[], object]:
        return lambda: client.put(topic + suffix, message)

    yield timed("first short write", 1, write("-short", SHORT))
    yield timed(f"short write ({len(SHORT)} characters)", count, write("-short", SHORT), len(SHORT))
    yield timed(f"long write ({len(LONG):,} characters)", few, write("-long", LONG), len(LONG))
    yield timed("empty read", count, read("-empty", ""))
    yield timed("short read", count, read("-short", SHORT), len(SHORT))
    yield timed("long read", few, read("-long", LONG), len(LONG))
