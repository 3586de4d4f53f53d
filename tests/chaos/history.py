"""The history for the checker: every put, every read, and every run of a server, stored as lines of JSON.

Times are those of the monotonic clock, which all processes of a machine share.
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
    """A put and its result. All bodies are unique."""

    writer: str
    topic: str
    body: str
    began: float
    ended: float
    id: int | None = None
    """The id it returned."""
    error: str = ""
    """The error it raised instead."""
    may_be_stored: bool = True
    """Whether the message may be stored, according to the error."""


@dataclass(frozen=True, slots=True)
class Got:
    """A message read."""

    reader: str
    topic: str
    body: str
    began: float
    ended: float
    id: int | None = None
    number: int | None = None
    latest: bool = False
    """Whether older messages were skipped."""
    thread: str = ""
    """The thread, if several share the reader; each sees its own order."""
    timeout: float = 0.0


@dataclass(frozen=True, slots=True)
class _Read:
    reader: str
    topic: str
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Empty(_Read):
    """A read that found no message."""

    timeout: float = 0.0


@dataclass(frozen=True, slots=True)
class Broken(_Read):
    """A read that raised or was interrupted and may have consumed some messages."""

    error: str
    may_take: int = 0


@dataclass(frozen=True, slots=True)
class Reader:
    """A reading client, with the last id and epoch when it connected."""

    name: str
    topics: tuple[str, ...]
    epoch: str
    start_id: int
    began: float
    finished: float | None = None
    """When it began to read everything left; None if it failed to."""


@dataclass(frozen=True, slots=True)
class Server:
    """One life of a server. Lives on one address don't overlap."""

    epoch: str
    run: str
    last_id: int
    """Its last id before the first put."""
    began: float
    ended: float = math.inf
    """When it had certainly ended."""
    kept_until: float = math.inf
    """Puts that returned before this must survive into the next life; inf after a graceful stop with a snapshot."""


@dataclass(frozen=True, slots=True)
class Died:
    """A client that died from an unexpected error."""

    name: str
    error: str


@dataclass(frozen=True, slots=True)
class Held:
    """All of a topic's messages on one server."""

    server: str
    topic: str
    began: float
    ended: float
    messages: tuple[tuple[int, int, str], ...]
    """Id, number and body of each, in the order in which the server returns them."""


@dataclass(frozen=True, slots=True)
class _Work:
    worker: str
    key: str
    """The topic or pattern."""
    group: str


@dataclass(frozen=True, slots=True)
class _Take(_Work):
    token: str


@dataclass(frozen=True, slots=True)
class Sent(_Take):
    """A TAKE, recorded before it is sent and each time it is sent again."""

    began: float
    lease: float
    wait: float = 0.0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Taken(_Take):
    """A job given to a worker."""

    topic: str
    id: int
    attempt: int
    body: str
    began: float
    sent: float
    """When the request was sent for the last time; the lease begins later."""
    ended: float
    lease: float


@dataclass(frozen=True, slots=True)
class NoJob(_Take):
    """A TAKE that got no job."""

    began: float
    sent: float
    ended: float
    wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Settled(_Work):
    """DONE, RETURN or EXTEND: recorded before it is sent and again with the reply."""

    verb: str
    id: int
    attempt: int
    body: str
    began: float
    ended: float = math.inf
    reply: str = ""
    """OK, JOBLOST, or empty if it is unknown."""
    sends: int = 0
    seconds: float = 0.0
    """The delay or the new lease."""


@dataclass(frozen=True, slots=True)
class JobFailed:
    """A message found in the topic for failed jobs."""

    topic: str
    """The topic of the job."""
    body: str


Event: TypeAlias = (
    Put | Got | Empty | Broken | Reader | Server | Died | Held | Sent | Taken | NoJob | Settled | JobFailed
)
KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (Put, Got, Empty, Broken, Reader, Server, Died, Held, Sent, Taken, NoJob, Settled, JobFailed)
}
E = TypeVar("E")


@dataclass
class History:
    """Events, in the order in which each thread recorded them."""

    max_age: float = 600.0
    has_holes: bool = False
    """Whether connections may go silent without the server noticing."""
    max_attempts: float = math.inf
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
        """Add events saved to a file."""
        self.add(*map(_event, path.read_text().splitlines()))


def _lines(events: Iterable[Event]) -> Iterator[str]:
    return map(as_line, events)


def as_line(event: Event) -> str:
    return json.dumps({"kind": type(event).__name__, **asdict(event)})


def _event(line: str) -> Event:
    values = json.loads(line)
    kind = KINDS[values.pop("kind")]
    if kind is Reader:
        values["topics"] = tuple(values["topics"])
    if kind is Held:
        values["messages"] = tuple(map(tuple, values["messages"]))
    return kind(**values)
