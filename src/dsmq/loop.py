"""What a connection asks of its surroundings: its socket, who is at the other end, and the loop that serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsmq.commands import Services
from dsmq.metrics import Counters
from dsmq.store import Answer, Put

if TYPE_CHECKING:
    from dsmq.connection import Connection


class Stream(Protocol):
    """What a connection asks of its socket, which may be one under TLS. None of it waits."""

    def fileno(self) -> int:
        """Return its file descriptor."""

    def recv(self, size: int, /) -> bytes:
        """Return what has come. Raises BlockingIOError when there is nothing."""

    def send(self, data: bytearray | bytes | memoryview, /) -> int:
        """Send some of it; return how much."""

    def shutdown(self, how: int, /) -> None:
        """Say that nothing more comes."""

    def close(self) -> None:
        """Close it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end."""

    number: int
    host: str
    network: str
    """What one client can have many addresses of: see `auth.network`."""
    name: str
    """Host and port, for people."""
    encrypted: bool


class Loop(Protocol):
    """What a connection asks of the event loop that serves it."""

    services: Services
    counters: Counters
    now: float
    """Seconds on the monotonic clock, at the start of this turn."""
    slice_seconds: float
    """How long one connection may run requests before others have their turn; 0 stands for one request."""

    def put(self, connection: Connection, put: Put) -> None:
        """Store it at the end of the turn, and call `stored` or `not_stored` then."""

    def put_together(self, puts: list[Put]) -> Answer[list[int]]:
        """Store all or nothing, now. Raises a ReplyError."""

    def commit(self) -> None:
        """Store what has been put so far in this turn."""

    def admit(self, connection: Connection) -> None:
        """The connection is no stranger any more."""

    def join(self, topic: bytes, connection: Connection) -> None:
        """Call `wake` after each put into the topic. Raises Busy where too many wait already."""

    def leave(self, topic: bytes, connection: Connection) -> None:
        """Do so no more."""

    def post(self, call: Callable[[], None]) -> None:
        """Run this in the loop's thread. Safe to call from any thread."""

    def await_room(self, connection: Connection) -> None:
        """Call `on_room` when there is room for what it has claimed of a budget."""

    def leave_queue(self, connection: Connection) -> None:
        """It waits for room no more."""

    def relieve(self) -> None:
        """Close the largest of the connections that make no progress, if more is held than a budget allows."""

    def watch(self, connection: Connection, events: int) -> None:
        """Call `on_ready` when its socket has these events."""

    def schedule(self, connection: Connection, when: float) -> None:
        """Call `on_time` at about this time."""

    def flush_soon(self, connection: Connection) -> None:
        """Call `flush` at the end of the turn."""

    def run_soon(self, connection: Connection) -> None:
        """Call `run` in the next turn."""

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""
