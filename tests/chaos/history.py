"""What has happened, for the checker: every put, every read, every life of a server. Kept as lines of JSON.

All times are of the monotonic clock, which the processes of a machine share.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Put:
    """A put, whatever has become of it. No two have the same body."""

    writer: str
    topic: str
    body: str
    began: float
    ended: float
    id: int | None = None
    """What it returned."""
    error: str = ""
    """What it raised in place of that."""
    may_be_stored: bool = True
    """What the error said of it."""


@dataclass(frozen=True, slots=True)
class Got:
    """A message that a reader got."""

    reader: str
    topic: str
    body: str
    began: float
    ended: float
    id: int | None = None
    number: int | None = None
    latest: bool = False
    """Whether the reader has passed over all older ones with it."""
    thread: str = ""
    """Which of those that share the reader; each of them sees an order of its own."""
    timeout: float = 0.0


@dataclass(frozen=True, slots=True)
class Empty:
    """The answer that there is no message."""

    reader: str
    topic: str
    began: float
    ended: float
    timeout: float = 0.0


@dataclass(frozen=True, slots=True)
class Broken:
    """A read that raised, or was interrupted: then so many messages may have gone with it."""

    reader: str
    topic: str
    began: float
    ended: float
    error: str
    may_take: int = 0


@dataclass(frozen=True, slots=True)
class Reader:
    """A client that reads, from a watermark of an epoch on."""

    name: str
    topics: tuple[str, ...]
    epoch: str
    watermark: int
    began: float
    finished: float | None = None
    """When it began to read all there was left, and did so; None where it did not come to that."""


@dataclass(frozen=True, slots=True)
class Server:
    """One life of a server. Of one address, they do not overlap."""

    epoch: str
    run: str
    last_id: int
    """What it told the first who asked, before anything was put."""
    began: float
    ended: float = math.inf
    """When it certainly was no more."""
    kept_until: float = math.inf
    """Puts that had returned by then have to be there in its next life: all, behind a graceful stop with a snapshot."""


@dataclass(frozen=True, slots=True)
class Died:
    """A client that came to an end of its own, by what should not have happened."""

    name: str
    error: str


Event: TypeAlias = Put | Got | Empty | Broken | Reader | Server | Died
KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Put, Got, Empty, Broken, Reader, Server, Died)}
E = TypeVar("E")


@dataclass
class History:
    """Events, in the order in which each thread has told them."""

    max_age: float = 600.0
    events: list[Event] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, *events: Event) -> None:
        with self._lock:
            self.events.extend(events)

    def of(self, kind: type[E]) -> Iterator[E]:
        return (event for event in self.events if isinstance(event, kind))

    def save(self, path: Path) -> None:
        path.write_text("".join(line + "\n" for line in _lines(self.events)))

    def load(self, path: Path) -> None:
        """Add what has been saved to a file."""
        self.add(*map(_event, path.read_text().splitlines()))


def _lines(events: Iterable[Event]) -> Iterator[str]:
    for event in events:
        yield json.dumps({"kind": type(event).__name__, **asdict(event)})


def _event(line: str) -> Event:
    values = json.loads(line)
    kind = KINDS[values.pop("kind")]
    if kind is Reader:
        values["topics"] = tuple(values["topics"])
    return kind(**values)
