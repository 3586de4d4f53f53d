"""What systemd passes to a service, and is told by it: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).

Where it was not systemd that started the process, there is nothing to take, and what is told goes nowhere.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dsmq.errors import CannotStart
from dsmq.ops.status import Status

# What FileDescriptorName= calls the sockets that clients connect to, and that of the side port.
QUEUE = "dsmq"
METRICS = "metrics"
FIRST_DESCRIPTOR = 3
# Where systemd itself hangs, the main thread is not to hang with it for longer than this.
NOTIFY_TIMEOUT_SECONDS = 2.0
# Beyond stop_timeout_seconds, for the last stages of a stop and for Python's own end.
STOP_MARGIN_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class Systemd:
    """Holds the passed sockets, and tells how the service is. Without arguments: nobody is there to be told."""

    def __init__(
        self,
        notify_socket: str = "",
        watchdog_seconds: float = math.inf,
        queue: list[socket.socket] | None = None,
        metrics: list[socket.socket] | None = None,
    ) -> None:
        self.queue = queue or []
        self.metrics = metrics or []
        self.watchdog_interval = watchdog_seconds / 3
        """The longest time from one `tick` to the next, with room for one that is late."""
        self._watchdog = watchdog_seconds < math.inf
        self._status = ""
        self._address = "\0" + notify_socket[1:] if notify_socket.startswith("@") else notify_socket
        # Opened now: the watchdog has to be fed also when there is no file descriptor left.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if notify_socket[:1] in ("@", "/") else None
        if self._socket:
            self._socket.settimeout(NOTIFY_TIMEOUT_SECONDS)

    def notify(self, *states: str) -> None:
        """Send states as sd_notify(3) describes them; where that fails, the service goes on without."""
        if not self._socket or not states:
            return
        try:
            self._socket.sendto("\n".join(states).encode(), self._address)
        except OSError as error:
            _logger.warning("systemd can't be told %s: %s", ", ".join(states), error)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Tell that the configuration is read anew, and when that is done, well or not."""
        # systemd compares it with its own clock, CLOCK_MONOTONIC, to know for which order this is.
        self.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self.notify("READY=1")

    def stopping(self, seconds: float) -> None:
        """Tell that the service stops, and how long that may take."""
        self.notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round((seconds + STOP_MARGIN_SECONDS) * 1e6)}")

    def notify_status(self, status: Status) -> None:
        """Tell how the service is, and that it lives: only while every thread does, besides the one that calls this."""
        if not self._socket:
            return
        states = ["WATCHDOG=1"] if self._watchdog and not status.stuck_threads() else []
        shown = f"STATUS={status.connections()} connections, {status.totals().messages} messages"
        if shown != self._status:
            states.append(shown)
            self._status = shown
        self.notify(*states)


def take() -> Systemd:
    """Take what systemd has passed, once; child processes find nothing of it. Raises CannotStart."""
    names = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    given = {name: os.environ.pop(name, "") for name in (*names, "LISTEN_PIDFDID")}
    me = str(os.getpid())
    watched = given["WATCHDOG_PID"] in ("", me) and given["WATCHDOG_USEC"].isdecimal()
    watchdog_seconds = int(given["WATCHDOG_USEC"]) / 1e6 if watched else math.inf
    count = int(given["LISTEN_FDS"]) if given["LISTEN_PID"] == me and given["LISTEN_FDS"].isdecimal() else 0
    sockets = _sockets(count, given["LISTEN_FDNAMES"])
    if sockets:
        _logger.info("systemd passes the sockets: the settings of hosts and ports are not used")
    queue = [sock for name, sock in sockets if name == QUEUE]
    metrics = [sock for name, sock in sockets if name == METRICS]
    if (metrics and not queue) or len(metrics) > 1:
        raise CannotStart(
            f"systemd passes {len(queue)} sockets named {QUEUE} and {len(metrics)} named {METRICS}: "
            "it takes some of the former, and at most one of the latter"
        )
    return Systemd(given["NOTIFY_SOCKET"], watchdog_seconds or math.inf, queue, metrics)


def _sockets(count: int, given: str) -> list[tuple[str, socket.socket]]:
    """Return the passed sockets with what each is for."""
    names = given.split(":")[:count] if given else []
    names += ["unknown"] * (count - len(names))
    unknown = [name for name in names if name not in (QUEUE, METRICS)]
    # Without FileDescriptorName= it bears the name of its unit.
    if len(unknown) > 1 or (unknown and QUEUE in names):
        about = f"systemd passes sockets named {', '.join(names)}"
        raise CannotStart(f"{about}: FileDescriptorName= has to be {QUEUE} or {METRICS}, for what each is")
    purposes = [name if name == METRICS else QUEUE for name in names]
    return [(name, _listening(FIRST_DESCRIPTOR + number, name)) for number, name in enumerate(purposes)]


def _listening(descriptor: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=descriptor)
        listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        sock.set_inheritable(False)
        # Whoever had it before may have left it otherwise.
        sock.setblocking(True)
    except OSError as error:
        raise CannotStart(f"what systemd passes as {name} can't be used: {error.strerror}") from error
    if not listens:
        raise CannotStart(f"what systemd passes as {name} does not listen: ListenStream= and Accept=no are wanted")
    return sock
