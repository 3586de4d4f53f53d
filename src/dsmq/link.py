"""One connection of the blocking client: requests out, replies in, and how long a reply may take."""

from __future__ import annotations

import math
import socket
import time

from dsmq import session as wire
from dsmq.errors import ReplyError
from dsmq.protocol import Reply, ReplyParser

# More would be slower: an object of 128 KiB gets memory of its own from the system, and gives it back each time.
_RECEIVE_BYTES = 65_536
_LONGEST_TIMEOUT = 1e8


class Link:
    """One connection to the server."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self._parser = ReplyParser()
        self._timeout = self._deadline = 0.0
        self._socket = _open(host, port, timeout)

    def send(self, data: bytes, timeout: float) -> None:
        """Send requests; the replies may take `timeout` seconds."""
        # In tenths of a second, rounded up, so that it seldom has to be set anew.
        timeout = math.ceil(min(max(timeout, 0.1), _LONGEST_TIMEOUT) * 10) / 10
        if timeout != self._timeout:
            self._timeout = timeout
            self._socket.settimeout(timeout)
        self._deadline = time.monotonic() + timeout
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            # The server has hung up; it may have said why.
            if isinstance(reply := self.receive(), ReplyError):
                raise reply from None
            raise

    def receive(self) -> Reply:
        """Return the next reply. Raises OSError when the connection breaks, or the reply takes too long."""
        while (reply := self._parser.next()) is None:
            # A reply that comes in many pieces has no more time than one that comes at once.
            if self._parser.incomplete and time.monotonic() > self._deadline:
                raise TimeoutError(f"no whole reply within {self._timeout:g} s")
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except TimeoutError:
                raise TimeoutError(f"no reply within {self._timeout:g} s") from None
            if not data:
                raise ConnectionResetError("the server has closed the connection")
            self._parser.feed(data)
        return wire.unless_last(reply[0])

    def await_end(self) -> None:
        """Wait until the server closes the connection."""
        while self._socket.recv(_RECEIVE_BYTES):
            pass

    def interrupt(self) -> None:
        """Have a call in another thread fail at once."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # It is closed already, by either side.

    def close(self) -> None:
        """Close it. Idempotent."""
        self._socket.close()


def _open(host: str, port: int, timeout: float) -> socket.socket:
    timeout = min(timeout, _LONGEST_TIMEOUT)
    try:
        if host.startswith("unix:"):
            return _open_unix(host.removeprefix("unix:"), timeout)
        sock = socket.create_connection((host.strip("[]"), port), timeout)
    except ConnectionRefusedError as error:
        where = host if host.startswith("unix:") else f"{host} port {port}"
        raise ConnectionRefusedError(error.errno, f"no server answers at {where}") from None
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, f"{host!r} is no host name") from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _open_unix(path: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock
