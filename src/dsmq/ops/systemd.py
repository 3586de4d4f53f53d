"""The interface to systemd: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).

If systemd did not start the process, no sockets are passed, and notifications go nowhere.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dsmq.errors import StartupError

if TYPE_CHECKING:
    from dsmq.ops.status import Status

# FileDescriptorName= of the sockets for clients and of the socket for the HTTP endpoint.
QUEUE = "dsmq"
METRICS = "metrics"
FIRST_DESCRIPTOR = 3
VARIABLES = (
    *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"),
    *("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"),
)
# If systemd itself hangs, it must not block the main thread for longer than this.
NOTIFY_TIMEOUT_SECONDS = 2.0
# Time requested in addition to stop_timeout_seconds, for the last stages of a stop and for Python's own exit.
STOP_MARGIN_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class Systemd:
    """The sockets passed by systemd and notifications to it. Without arguments: systemd did not start this process."""

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
        """Max seconds between calls of `notify_status`; short enough that one may be late."""
        self._watchdog = watchdog_seconds < math.inf
        self._status = ""
        self._address = "\0" + notify_socket[1:] if notify_socket.startswith("@") else notify_socket
        # Open the socket in advance: the watchdog must be notified even if no file descriptors are left.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if notify_socket[:1] in ("@", "/") else None
        if self._socket:
            self._socket.settimeout(NOTIFY_TIMEOUT_SECONDS)

    def notify(self, *states: str) -> None:
        """Send states as described in sd_notify(3). A failure is only logged."""
        if not self._socket or not states:
            return
        try:
            self._socket.sendto("\n".join(states).encode(), self._address)
        except OSError as error:
            _logger.warning("cannot notify systemd of %s: %s", ", ".join(states), error)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Notify systemd that a reload begins and that it has ended, successfully or not."""
        # systemd compares this CLOCK_MONOTONIC time with the time of its request.
        self.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self.notify("READY=1")

    def stopping(self, seconds: float) -> None:
        """Notify systemd that the service is stopping and how long that may take."""
        self.notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round((seconds + STOP_MARGIN_SECONDS) * 1e6)}")

    def notify_status(self, status: Status) -> None:
        """Send the status if it has changed and reset the watchdog unless a thread is stuck."""
        if not self._socket:
            return
        states = ["WATCHDOG=1"] if self._watchdog and not status.stuck_threads() else []
        text = f"STATUS={status.connections()} connections, {status.totals().messages} messages"
        if text != self._status:
            states.append(text)
            self._status = text
        self.notify(*states)


def take(environment: MutableMapping[str, str] = os.environ) -> Systemd:
    """Take the sockets that systemd passed and hide them from child processes. Raises StartupError."""
    given = {name: environment.pop(name, "") for name in VARIABLES}
    me = str(os.getpid())
    watched = given["WATCHDOG_PID"] in ("", me) and given["WATCHDOG_USEC"].isdecimal()
    watchdog_seconds = int(given["WATCHDOG_USEC"]) / 1e6 if watched else 0
    passed = given["LISTEN_PID"] == me and given["LISTEN_FDS"].isdecimal()
    names = _names(given["LISTEN_FDNAMES"], int(given["LISTEN_FDS"]) if passed else 0)
    sockets = [(name, _listening(FIRST_DESCRIPTOR + number, name)) for number, name in enumerate(names)]
    if sockets:
        _logger.info("using the sockets passed by systemd instead of the host and port settings")
    queue, metrics = ([sock for name, sock in sockets if name == wanted] for wanted in (QUEUE, METRICS))
    if (metrics and not queue) or len(metrics) > 1:
        raise StartupError(
            f"systemd passed {len(queue)} sockets named {QUEUE} and {len(metrics)} named {METRICS}: "
            f"at least one {QUEUE} socket and at most one {METRICS} socket are required"
        )
    return Systemd(given["NOTIFY_SOCKET"], watchdog_seconds or math.inf, queue, metrics)


def _names(given: str, count: int) -> list[str]:
    """Return QUEUE or METRICS for each passed socket."""
    names = [*(given.split(":") if given else []), *["unknown"] * count][:count]
    unknown = [name for name in names if name not in (QUEUE, METRICS)]
    # Without FileDescriptorName=, a socket has its unit's name; a single one is for clients.
    if len(unknown) > 1 or (unknown and QUEUE in names):
        raise StartupError(
            f"systemd passed sockets named {', '.join(names)}: set FileDescriptorName= of each to {QUEUE} or {METRICS}"
        )
    return [name if name == METRICS else QUEUE for name in names]


def _listening(descriptor: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=descriptor)
        listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        sock.set_inheritable(False)
        # A previous owner may have made it non-blocking.
        sock.setblocking(True)
    except OSError as error:
        raise StartupError(f"the {name} socket passed by systemd can't be used: {error.strerror}") from error
    if not listens:
        raise StartupError(f"the {name} socket passed by systemd does not listen: set ListenStream= and Accept=no")
    return sock
