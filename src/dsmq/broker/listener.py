"""Listens on sockets (IPv4, IPv6 and Unix) and accepts connections."""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import os
import socket
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from dsmq import logs
from dsmq.errors import StartupError
from dsmq.wire.addresses import UNIX, Endpoint, parse_endpoint

if TYPE_CHECKING:
    from dsmq.broker.event_loop import EventLoop

# Max connections accepted in one turn of the loop, so that a flood of new connections does not starve open ones.
MAX_ACCEPTS = 4
# Max unsent reply bytes buffered in the kernel. Any more stay in this process, where they are counted.
MAX_NOT_SENT_BYTES = 32_768
# Max attempts to find a port that is free on all addresses of a name.
MAX_ATTEMPTS = 20
# How long to pause accepting if the process has no file descriptors left.
ACCEPT_PAUSE_SECONDS = 0.1

_logger = logging.getLogger(__name__)


def listen(host: str, port: int, backlog: int, settings: str = "") -> list[socket.socket]:
    """Return sockets that listen on an address, on all usable addresses of a host name, or on `unix:/path`.

    Port 0 selects a port that is free on all of them. `settings` is the prefix of the settings' names in error
    messages. Raises StartupError.
    """
    endpoint = parse_endpoint(host, port)
    try:
        if endpoint.path:
            return [_listen_unix(endpoint.path, backlog)]
        return _listen_everywhere(_resolve(endpoint), backlog)
    except OSError as error:
        taken = not endpoint.path and error.errno in (errno.EADDRINUSE, errno.EACCES)
        hint = f" (--{settings}port sets another one)" if taken else ""
        raise StartupError(f"cannot listen on {endpoint}: {_reason(error)}{hint}") from error


def _resolve(endpoint: Endpoint) -> list[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, "invalid host name") from None
    return list(dict.fromkeys((int(family), address[:2]) for family, _, _, _, address in found))  # type: ignore[misc]


def _listen_everywhere(
    addresses: list[tuple[int, tuple[str, int]]], backlog: int, attempts: int = MAX_ATTEMPTS
) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    with ExitStack() as undo:
        for family, (host, port) in addresses:
            # If port is 0, the other addresses use the port that was chosen for the first.
            same = port or (sockets[0].getsockname()[1] if sockets else 0)
            both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
            try:
                sock = socket.create_server((host, same), family=family, backlog=backlog, dualstack_ipv6=both)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and same != port and attempts:
                    return _listen_everywhere(addresses, backlog, attempts - 1)
                # On a machine without IPv6, a name may still resolve to ::1.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                refused = error
            else:
                sockets.append(undo.enter_context(sock))
        if not sockets:
            raise refused
        undo.pop_all()
    return sockets


def _listen_unix(path: str, backlog: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that was killed, but never another file or the socket of a running server."""
    if not os.path.exists(path):
        return
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise OSError(0, "the file exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # If the listen queue is full, connecting would block.
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return
        except ConnectionRefusedError:
            os.unlink(path)


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the address is in use; is another server running there?"
    # Without the prefix that Python adds.
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


def address(sock: socket.socket) -> str:
    """Return the address of a listening socket as `host:port` or `unix:/path`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        # An abstract address begins with a zero byte.
        return UNIX + (name if isinstance(name, str) else "@" + os.fsdecode(name[1:]))
    return str(Endpoint(*name[:2]))


def is_exposed(sock: socket.socket) -> bool:
    """Return whether other machines may be able to connect: whether this is neither a Unix socket nor on loopback."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return sock.family != socket.AF_UNIX
    host = ipaddress.ip_address(sock.getsockname()[0].partition("%")[0])
    return not (getattr(host, "ipv4_mapped", None) or host).is_loopback


def close(sock: socket.socket) -> None:
    """Stop listening, including in forked processes, and remove a Unix socket's file. Idempotent."""
    if sock.fileno() < 0:
        return
    if sock.family == socket.AF_UNIX:
        # Remove the file before closing: afterwards, another server may have created its own socket there.
        with suppress(FileNotFoundError):
            os.unlink(sock.getsockname())
    # Otherwise, if a child process has a copy, the port would stay in use, and clients would wait there forever.
    # Systems other than Linux refuse this call.
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


class Listener:
    """A listening socket; gives accepted connections to the event loops."""

    def __init__(
        self,
        sock: socket.socket,
        assign: Callable[[socket.socket, str, str], None],
        close: Callable[[socket.socket], None] = close,
    ) -> None:
        """`assign` takes an accepted socket, the client's host, and its host and port as text."""
        _set_options(sock)
        self.socket = sock
        self.loop: EventLoop
        """Set by `EventLoop.listen`."""
        self.closed = False
        self.scheduled = math.inf
        self._assign = assign
        self._close = close

    def fileno(self) -> int:
        return self.socket.fileno()

    def on_ready(self, _: int) -> None:
        for _attempt in range(MAX_ACCEPTS):
            try:
                sock, address = self.socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._pause(error)
                return
            sock.setblocking(False)
            host, name = (address[0], str(Endpoint(*address[:2]))) if isinstance(address, tuple) else ("unix", "unix")
            self._assign(sock, host, name)

    def _pause(self, error: OSError) -> None:
        # The connection stays in the listen queue, so without a pause the poller would keep reporting it.
        about = logs.event("accepting_paused", error=str(error))
        _logger.warning("accepting paused for %s s: %s", ACCEPT_PAUSE_SECONDS, error, extra=about)
        self.loop.unlisten(self)
        self.loop.schedule(self, self.loop.now + ACCEPT_PAUSE_SECONDS)

    def on_timer(self, _: float) -> None:
        """Accept again."""
        self.loop.listen([self])

    def on_failure(self) -> None:
        """Log the exception and continue with the next connection."""
        _logger.exception("accepting failed")

    def stop_accepting(self) -> None:
        """Called in the loop's thread."""
        if not self.closed:
            self.loop.unlisten(self)

    def close(self) -> None:
        """Close the socket. The loop must have stopped accepting from it."""
        self.closed = True
        self._close(self.socket)


def _set_options(sock: socket.socket) -> None:
    """Set options that accepted connections inherit; setting them on each would take six system calls."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_NODELAY", 1),
        ("TCP_NOTSENT_LOWAT", MAX_NOT_SENT_BYTES),
        # Detects within two minutes that a client has vanished.
        *(("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
