"""Listening sockets: IPv4, IPv6 and Unix; and accepting from them."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import math
import os
import socket
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

from dsmq import logs
from dsmq.errors import StartupError
from dsmq.wire.addresses import UNIX, Endpoint, parse_endpoint

# Accepted in one turn of the loop, so that a flood of connections does not starve those that are open.
MAX_ACCEPTS = 4
# Of replies, the kernel takes so much more than it can send: little, for most of what goes to a client that does not
# read is made in vain.
MAX_NOT_SENT_BYTES = 32_768
# To find a port that is free on all addresses of a name.
MAX_ATTEMPTS = 20
# How long not to accept when the process has no file descriptor left.
ACCEPT_PAUSE_SECONDS = 0.1

_logger = logging.getLogger(__name__)


def listen(host: str, port: int, backlog: int, settings: str = "") -> list[socket.socket]:
    """Return sockets listening on an address, a name (all its addresses that work), or `unix:/path`.

    Port 0 takes one that is free on all of them. `settings` is what the settings' names begin with, for the error.
    Raises StartupError.
    """
    endpoint = parse_endpoint(host, port)
    if endpoint.path:
        return [_listen_unix(endpoint.path, backlog)]
    try:
        return _listen_everywhere(_resolve(endpoint), backlog)
    except OSError as error:
        hint = f" (--{settings}port sets another one)" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        raise StartupError(f"cannot listen on {endpoint}: {_reason(error)}{hint}") from error


def _listen_everywhere(
    addresses: list[tuple[int, tuple[str, int]]], backlog: int, attempts: int = MAX_ATTEMPTS
) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    with ExitStack() as undo:
        for family, (host, port) in addresses:
            # After the first address, port 0 means the port that was free there.
            same = port or (sockets[0].getsockname()[1] if sockets else 0)
            try:
                sockets.append(undo.enter_context(_listen_tcp(family, (host, same), backlog)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE and same != port and attempts:
                    return _listen_everywhere(addresses, backlog, attempts - 1)
                # A name may stand for ::1 as well on a machine without IPv6.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                refused = error
        if not sockets:
            raise refused
        undo.pop_all()
    return sockets


def address(sock: socket.socket) -> str:
    """Return where a socket listens, for people."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        # An abstract one begins with a zero byte.
        return UNIX + (name if isinstance(name, str) else "@" + os.fsdecode(name[1:]))
    return str(Endpoint(*name[:2]))


def is_exposed(sock: socket.socket) -> bool:
    """Return whether a listening socket is anything but a Unix socket or one on a loopback address."""
    if sock.family == socket.AF_UNIX:
        return False
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = ipaddress.ip_address(sock.getsockname()[0].partition("%")[0])
    return not (getattr(host, "ipv4_mapped", None) or host).is_loopback


def close(sock: socket.socket) -> None:
    """End listening, in processes that have been forked too; a Unix socket's file goes with it."""
    if sock.fileno() < 0:
        return
    if sock.family == socket.AF_UNIX:
        # Before it is closed: behind that, another server may have put its own socket there.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sock.getsockname())
    # Without this, the port would stay taken while a child process has a copy, and clients would wait there for ever.
    # Other systems than Linux refuse it.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _resolve(endpoint: Endpoint) -> list[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, "that is no host name") from None
    return list(dict.fromkeys((int(family), address[:2]) for family, _, _, _, address in found))  # type: ignore[misc]


def _listen_tcp(family: int, address: tuple[str, int], backlog: int) -> socket.socket:
    both = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=backlog, dualstack_ipv6=both)


def _listen_unix(path: str, backlog: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise StartupError(f"cannot listen on {UNIX}{path}: {_reason(error)}") from error
    return sock


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that was killed; nothing else, and not that of one that lives."""
    if not os.path.exists(path):
        return
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise OSError(0, "that is something else than a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Where somebody listens but does not accept, it would wait.
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return
        except ConnectionRefusedError:
            os.unlink(path)


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the address is in use; does another server run there?"
    if error.errno == errno.EACCES:
        return "permission denied"
    # Without what Python adds to it.
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


class Accepting(Protocol):
    """What a listener asks of the event loop that serves it."""

    now: float

    def listen(self, listeners: Sequence[Listener]) -> None:
        """Accept from these listeners."""

    def unlisten(self, listener: Listener) -> None:
        """Do so no more."""

    def schedule(self, subject: Listener, when: float) -> None:
        """Call `on_timer` at about this time."""


class Listener:
    """A listening socket, which hands what it accepts to the workers."""

    def __init__(self, sock: socket.socket, place: Callable[[socket.socket, str, str], None]) -> None:
        """`place` takes what is accepted: the socket, the client's host, and both host and port for people."""
        _prepare(sock)
        self.socket = sock
        self.loop: Accepting | None = None
        self.closed = False
        self.scheduled = math.inf
        self._place = place

    def fileno(self) -> int:
        return self.socket.fileno()

    def on_ready(self, _: int) -> None:
        """Accept what has come."""
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
            self._place(sock, *_peer(sock, address))

    def _pause(self, error: OSError) -> None:
        # The connection stays in the backlog, so the selector would report it again at once, for ever.
        about = logs.event("accepting_paused", error=str(error))
        _logger.warning("accepting pauses for %s s: %s", ACCEPT_PAUSE_SECONDS, error, extra=about)
        if self.loop is not None:
            self.loop.unlisten(self)
            self.loop.schedule(self, self.loop.now + ACCEPT_PAUSE_SECONDS)

    def on_timer(self) -> None:
        """Accept again."""
        if self.loop is not None:
            self.loop.listen([self])

    def on_failure(self) -> None:
        """Go on with the next connection."""
        _logger.exception("accepting failed")


def _peer(sock: socket.socket, address: object) -> tuple[str, str]:
    if sock.family == socket.AF_UNIX or not isinstance(address, tuple):
        return "unix", "unix"
    host, port = address[:2]
    return host, str(Endpoint(host, port))


def _prepare(sock: socket.socket) -> None:
    """Set what the connections that are accepted inherit; for each of them it would cost six system calls."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        # What a client does not read is to stay here, where it is counted, and not to fill the kernel.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_NOT_SENT_BYTES)
    keep_alive(sock)


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel find out within two minutes that the other side has vanished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
