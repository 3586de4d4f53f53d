"""The core of both clients: options, session, state, and recovery when a connection breaks."""

from __future__ import annotations

import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence

from dsmq.client import arguments
from dsmq.client.dial import ClosedSilently, Security, tls_context, with_text
from dsmq.client.replies import is_lost, reason
from dsmq.client.requests import Retryable
from dsmq.client.session import Session, State
from dsmq.client.stretch import Back
from dsmq.errors import ClientClosed, ReplyError
from dsmq.system import boot_time
from dsmq.wire.addresses import Endpoint
from dsmq.wire.limits import MAX_INTEGER

# Surplus connections that have been idle for this long are closed.
IDLE_SECONDS = 5.0
# The first retry is immediate. Later retries are delayed by this time, which doubles each time, with jitter, so that
# many clients do not all reconnect at once.
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.01, 1.0

NOT_STARTED = (ConnectionRefusedError, FileNotFoundError, ClosedSilently)
"""Errors of a first connection that may mean that the server is still starting."""

_logger = logging.getLogger(__name__)


def pop_failure(failures: list[Exception]) -> Exception:
    """Return why no server can be reached: the last error that may mean that one is starting, else the last.

    Removes all of them, or the error would refer to itself through the caller's frame.
    """
    found = next((error for error in reversed(failures) if isinstance(error, NOT_STARTED)), failures[-1])
    failures.clear()
    return found


class Options(Security, total=False):
    """The options of `connect`, in both clients. The times are in seconds."""

    timeout: float
    reconnect_timeout: float
    on_state_change: Callable[[State], None] | None
    name: str | None
    start: str | int | None


class Retries:
    """When to try again after a connection has broken."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Start from the beginning, after progress."""
        self._until = math.inf
        self._delays = _retry_delays()

    def next_delay(self) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up."""
        now = time.monotonic()
        self._until = min(self._until, now + self._seconds)
        return min(next(self._delays), self._until - now) if now < self._until else None

    def text(self, error: Exception) -> str:
        """Return the text of the last error, with the total duration of the attempts."""
        seconds = time.monotonic() - (self._until - self._seconds)
        return f"{reason(error)} (tried for {seconds:.1f} s)" if self._seconds else reason(error)

    def delay_at_start(self, error: OSError) -> float:
        """Return the seconds to wait for a server that may be starting. Raises the error to give up."""
        delay = self.next_delay()
        if delay is None:
            raise with_text(error, self.text(error)) from None
        return delay


def _retry_delays() -> Iterator[float]:
    yield 0.0
    for attempt in itertools.count():
        longest = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0 ** min(attempt, 32))
        yield longest * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret


class Core:
    """The state that the calls of a client share."""

    def __init__(self, host: str | Sequence[str], port: int, options: Options) -> None:
        """Raises TypeError or ValueError if an option is invalid."""
        if unknown := sorted(options.keys() - Options.__annotations__.keys()):
            raise TypeError(f"unexpected arguments: {', '.join(unknown)}")
        self.timeout = arguments.seconds("timeout", options.get("timeout", 10.0), zero=False)
        self.reconnect_timeout = arguments.seconds("reconnect_timeout", options.get("reconnect_timeout", 30.0))
        self._on_state_change = options.get("on_state_change")
        if self._on_state_change is not None and not callable(self._on_state_change):
            raise TypeError(f"on_state_change should be a function, not {self._on_state_change!r}")
        self.endpoints = arguments.endpoints(host, port)
        self.endpoint = self.endpoints[0]
        """The server to connect to now."""
        self.silent_addresses = 0
        """How many connections have failed without an answer: each time, another address of the host comes first."""
        self._failed = self.endpoint
        self._has_chosen = len(self.endpoints) == 1
        self.tls = tls_context(options)
        token, name = options.get("token"), options.get("name")
        self.session = Session(
            "" if token is None else arguments.text("token", token),
            None if name is None else arguments.short_name("name", name),
            options.get("start"),
        )
        self.is_closed = False
        self.down: dict[State, object] = {}
        """The keys are the states reported since the connection was lost: `lost`, and possibly `given up`."""

    # Connections

    def raise_if_closed(self, about: str = "the client was closed during the call") -> None:
        if self.is_closed:
            raise ClientClosed(about)

    def attempts(self) -> Iterator[tuple[Endpoint, bool]]:
        """Yield each server to connect to, and whether it is the last; `move_on` advances to the next.

        Servers without a shared store are always tried in order, so that all clients use the same one.
        """
        if len(self.endpoints) > 1 and not self.session.is_shared:
            self.endpoint = self.endpoints[0]
        for left in reversed(range(len(self.endpoints))):
            yield self.endpoint, not left

    def move_on(self, endpoint: Endpoint) -> None:
        """Switch to the next server, because this one has failed."""
        self._failed = endpoint
        if endpoint is self.endpoint and len(self.endpoints) > 1:
            self.endpoint = self.endpoints[(self.endpoints.index(endpoint) + 1) % len(self.endpoints)]

    def count_silence(self, error: BaseException, received: bytes) -> None:
        """Count a failed attempt to connect if nothing was received."""
        self.silent_addresses += isinstance(error, OSError) and not received

    def choose(self) -> bool:
        """If all servers share a store, choose a random one after the first connection; return whether it is different.

        This spreads clients over the servers. Without a shared store, others are used only if the first fails.
        """
        if self._has_chosen:
            return False
        self._has_chosen = True
        if not self.session.is_shared:
            _logger.warning("no shared store: other servers are used only while %s is unreachable", self.endpoints[0])
            return False
        before, self.endpoint = self.endpoint, random.choice(self.endpoints)  # noqa: S311 - not a secret
        return self.endpoint is not before

    def retry_delay(self, call: Retryable, error: BaseException, retries: Retries, *, connected: bool) -> float | None:
        """Return how long to wait before making a call again on another connection; None to raise the error.

        `connected`: whether the call had a connection. Raises a different error if the call must not be repeated.
        """
        if not is_lost(error, connecting=not connected):
            if self.down and isinstance(error, ReplyError):
                self.announce("resumed" if connected else "given up", error)
            # If it were raised here, the error would refer to itself through this frame and keep its connection alive
            # until the next garbage collection.
            return None
        if self.is_closed:
            raise ClientClosed("the client was closed during the call") from error
        if connected and call.on_connection_lost(error):
            retries.reset()
        self.announce("lost", error)
        delay = retries.next_delay()
        if delay is None:
            self.announce("given up", error)
            raise call.to_error(ConnectionError(retries.text(error))) from error
        return delay

    # States

    def announce(self, state: State, error: BaseException | None = None) -> None:
        """Log and report a new state. Each loss and each recovery is reported once."""
        if not self._enter(state):
            return
        if state not in ("lost", "given up"):
            self._failed = self.endpoint
        if state == "lost" and self.reconnect_timeout:
            _logger.warning("connection to %s lost, trying again: %s", self._failed, error and reason(error))
        elif state == "resumed":
            _logger.info("connection to %s resumed", self.endpoint)
        elif state == "given up":
            _logger.info("no connection to %s, giving up: %s", self.endpoint, error and reason(error))
        self.report(state)

    def report(self, state: State) -> None:
        if self._on_state_change is not None:
            self._on_state_change(state)

    def _enter(self, state: State) -> bool:
        """Enter a state; return whether it is new. Each step is atomic, because a lock would hang signal handlers."""
        down, this = self.down, object()
        if state == "lost":
            return down.setdefault("lost", this) is this
        if state == "given up":
            return "lost" in down and down.setdefault("given up", this) is this
        was_lost = down.pop("lost", None) is not None
        down.pop("given up", None)
        return was_lost or state != "resumed"


class Client:
    """The common base of both clients."""

    def __init__(self, host: str | Sequence[str], port: int, options: Options) -> None:
        self._core = Core(host, port, options)
        self._session = self._core.session
        self._options = options
        self.host = arguments.default_host()[1] if host is arguments.DEFAULT_HOST else host
        self.port = port

    def __repr__(self) -> str:
        return f"<dsmq client of {self._core.endpoint}{', closed' if self._core.is_closed else ''}>"

    def position(self, topic: str | Sequence[str]) -> str:
        """Return this client's position in a topic, or in topics read together: after the last message returned.

        It can be saved and passed to the `seek` method of any client, for any topic.
        """
        return self._session.position(topic)

    def seek(
        self,
        topic: str | Sequence[str],
        position: str | int | None = None,
        *,
        last: int | None = None,
        since: float | None = None,
    ) -> None:
        """Continue reading at a position or after the message with an id; 0 means before all messages.

        Alternatively, start with the last `last` messages, as of the next read, or with those put in the last `since`
        seconds; until that read, `position` is before all messages. `topic` may be a pattern or a list of topics, as in
        `read`; `last` counts the messages of all of them.

        If the position is from another epoch, before the server lost its messages, the topic is read from its oldest
        message, and on_state_change is called with `replaced`. If the server has not assigned the id yet, the next read
        raises BadRequest. Raises ValueError if the argument is neither a position nor an id.
        """
        if (position is not None) + (last is not None) + (since is not None) != 1:
            raise TypeError("seek takes a position, last= or since=")
        if not self._session.seek(topic, 0 if position is None else position, _back(last, since)):
            self._core.report("replaced")

    def forget(self, topic: str | Sequence[str]) -> None:
        """Forget the position in a topic, or in topics read together, to save memory.

        Reading them again starts from when this client connected.

        Beyond a thousand topics, silent ones are forgotten anyway once everything read from them has expired.
        """
        self._session.forget(topic)

    @property
    def max_message_bytes(self) -> int:
        """The max length of a message, as set on the server when this client connected."""
        return self._session.max_message_bytes

    @property
    def missed(self) -> int:
        """The number of messages that expired before this client read them, in all topics it reads.

        In each topic, counting starts with the first message that this client got.
        """
        return self._session.missed

    def missed_in(self, topic: str | Sequence[str]) -> int:
        """Return the share of `missed` of one topic, or of a pattern or several topics read together.

        A topic that is read together with others no longer counts once everything read from it has expired.
        """
        return self._session.missed_in(topic)


def _back(last: int | None, since: float | None) -> Back | None:
    if since is not None and (seconds := arguments.seconds("since", since)) < arguments.COMMON_SECONDS:
        return b"SINCE", boot_time() - seconds
    # A larger number means all messages.
    return None if last is None else (b"LAST", min(arguments.count("last", last, 1), MAX_INTEGER))
