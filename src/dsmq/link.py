"""One connection of the blocking client: requests out, replies in, and how long a reply may take."""

from __future__ import annotations

import math
import selectors
import socket
import time
import weakref
from selectors import EVENT_READ, EVENT_WRITE
from typing import TYPE_CHECKING, NamedTuple, TypedDict, Unpack

from dsmq import session as wire
from dsmq.calls import Producer
from dsmq.errors import ConfigError, DSMQError
from dsmq.protocol import Reply, ReplyParser
from dsmq.system import LONG_YIELD_PAUSE_SECONDS, LONG_YIELD_SECONDS, expect_long_messages, yield_processor

if TYPE_CHECKING:
    from ssl import SSLContext

    from dsmq.tls import TLSSocket

# Where replies are long, more is received at once; at first it would be slower, for the system gives memory of its own
# to an object of 128 KiB, and takes it back, each time.
_RECEIVE_BYTES, _RECEIVE_MORE_BYTES = 65_536, 262_144
_LONGEST_TIMEOUT = 1e8
# What a selector can be told to wait at once, and more.
_LONGEST_WAIT_SECONDS = 86_400.0
# Behind a longer pause it is looked whether a connection still stands before something is sent on it.
LONG_PAUSE_SECONDS = 0.1
ENDED = "the server has closed the connection"
# How long a reply is looked for before the client goes to sleep.
BUSY_POLL_SECONDS = 150e-6

_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Target(NamedTuple):
    """Where a client connects to, and what it shows there."""

    host: str
    port: int
    tls: SSLContext | None = None
    token: str = ""

    def __str__(self) -> str:
        return self.host if self.is_unix else f"{self.host} port {self.port}"

    def __repr__(self) -> str:
        # Without the token.
        return str(self)

    @property
    def is_unix(self) -> bool:
        return self.host.startswith("unix:")

    @property
    def path(self) -> str:
        """The path of a Unix socket."""
        return self.host.removeprefix("unix:")

    @property
    def name(self) -> str:
        """The name that a certificate has to be for."""
        return "localhost" if self.is_unix else self.host.strip("[]")


class Security(TypedDict, total=False):
    """The arguments of `connect` that say who one is and whom one trusts."""

    token: str | None
    tls: bool | SSLContext
    ca_file: str | None
    cert_file: str | None
    key_file: str | None


def target(host: str, port: int, **security: Unpack[Security]) -> Target:
    """Return what the arguments of `connect` describe. Raises ConfigError, or TypeError where they make no sense."""
    if unknown := sorted(security.keys() - Security.__annotations__.keys()):
        raise TypeError(f"unexpected arguments: {', '.join(unknown)}")
    token, tls = security.get("token") or "", security.get("tls") or False
    files = security.get("ca_file"), security.get("cert_file"), security.get("key_file")
    if files[2] and not files[1]:
        raise ConfigError("key_file without cert_file")
    if not isinstance(tls, bool):
        if not hasattr(tls, "wrap_socket"):
            raise TypeError(f"tls is a bool or an SSLContext, not {tls!r}")
        if any(files):
            raise TypeError("an SSLContext has its files already")
        return Target(host, port, tls, token)
    if not (tls or any(files)):
        return Target(host, port, None, token)
    from dsmq.tls import client_context  # noqa: PLC0415 - most clients need none of it

    return Target(host, port, client_context(*files), token)


class Link:
    """One connection to the server."""

    def __init__(self, target: Target, timeout: float) -> None:
        self.producer = Producer(b"")
        self._parser = ReplyParser()
        self._timeout, self._deadline = timeout, math.inf
        self._used_at = math.inf
        # From when on a reply is worth looking for without going to sleep.
        self._look_from = 0.0
        self._receive_bytes = _RECEIVE_BYTES
        self._socket = _open(target, min(timeout, _LONGEST_TIMEOUT))
        # A call that is interrupted may let go of it anywhere.
        weakref.finalize(self, self._socket.close)
        self._selector = _Selector()
        self._selector.register(self._socket, EVENT_READ)

    def send(self, data: bytes, timeout: float) -> None:
        """Send requests; the replies may take `timeout` seconds."""
        self._timeout = timeout
        self.renew()
        try:
            sent = self._send(data)
            while sent < len(data):
                sent += self._send(memoryview(data)[sent:])
        except ConnectionError:
            # The server has hung up: the end stands behind the replies that are there, and it may say why.
            return

    def ended(self) -> str | None:
        """Return why the connection has ended, if it has while nobody used it; not looked for after a short pause."""
        return self.look() if time.monotonic() - self._used_at > LONG_PAUSE_SECONDS else None

    def look(self) -> str | None:
        """The same, also after a short pause. No reply may be outstanding."""
        try:
            if data := self._socket.recv(self._receive_bytes):
                # Nobody has asked for it: it is what the server says when it hangs up.
                self._parser.feed(data)
                return f"unexpected: {self.receive()!r}"
        except BlockingIOError:
            return None
        except (OSError, DSMQError) as error:
            return wire.reason(error)
        return ENDED

    def _send(self, data: bytes | memoryview) -> int:
        """Send what the socket takes, when it takes something."""
        while True:
            try:
                return self._socket.send(data)
            except BlockingIOError:
                self._wait(EVENT_WRITE)

    def renew(self) -> None:
        """Give the replies that are outstanding their whole time again."""
        self._used_at = time.monotonic()
        self._deadline = self._used_at + self._timeout

    def receive(self) -> Reply:
        """Return the next reply. Raises OSError when the connection breaks, or the reply takes too long."""
        while (reply := self._parser.next()) is None:
            # A reply that comes in many pieces has no more time than one that comes at once.
            if self._parser.incomplete and time.monotonic() > self._deadline:
                raise TimeoutError(f"no whole reply within {self._timeout:g} s")
            data = self._receive()
            if not data:
                raise ConnectionResetError(ENDED)
            self._parser.feed(data)
        return wire.unless_last(reply[0])

    def _receive(self) -> bytes:
        """Return what has come, or else what comes first; nothing at the end.

        For a moment it looks without going to sleep, as the server does: to wake a processor that sleeps takes
        longer, in virtual machines above all, than most requests. Not where that was in vain the last time.
        """
        began = now = time.monotonic()
        while True:
            try:
                data = self._socket.recv(self._receive_bytes)
            except BlockingIOError:
                now = time.monotonic()
            else:
                self._learn(began)
                if len(data) == _RECEIVE_BYTES:
                    expect_long_messages()
                    self._receive_bytes = _RECEIVE_MORE_BYTES
                return data
            if self._look_from <= now < began + BUSY_POLL_SECONDS:
                # Where the server waits for this processor, it gets it.
                yield_processor()
            else:
                self._wait(EVENT_READ)

    def _learn(self, began: float) -> None:
        """Judge by how long the reply took whether to look for the next one."""
        now = time.monotonic()
        if now - began > LONG_YIELD_SECONDS:
            self._look_from = now + LONG_YIELD_PAUSE_SECONDS
        else:
            self._look_from = 0.0 if now - began < 2 * BUSY_POLL_SECONDS else math.inf

    def _wait(self, event: int) -> None:
        """Wait until the socket may take or have something. Raises TimeoutError when the reply is overdue."""
        self._selector.modify(self._socket, event)
        left = self._deadline - time.monotonic()
        if not self._selector.select(max(0.0, min(left, _LONGEST_WAIT_SECONDS))) and left < _LONGEST_WAIT_SECONDS:
            raise TimeoutError(f"no reply within {self._timeout:g} s")

    def await_end(self) -> None:
        """Wait until the server closes the connection."""
        while self._receive():
            pass

    def interrupt(self) -> None:
        """Have a call in another thread fail at once."""
        try:
            if isinstance(self._socket, socket.socket):
                self._socket.shutdown(socket.SHUT_RDWR)
            else:
                self._socket.interrupt()
        except OSError:
            return  # It is closed already, by either side.

    def close(self) -> None:
        """Close it. Idempotent."""
        self._socket.close()


def _open(target: Target, timeout: float) -> socket.socket | TLSSocket:
    try:
        sock = _open_unix(target.path, timeout) if target.is_unix else _open_tcp(target, timeout)
    except ConnectionRefusedError as error:
        raise ConnectionRefusedError(error.errno, f"no server answers at {target}") from None
    if target.tls:
        from dsmq import tls  # noqa: PLC0415 - see target()

        return tls.connect(target.tls, sock, target.name)
    sock.setblocking(False)
    return sock


def _open_tcp(target: Target, timeout: float) -> socket.socket:
    try:
        sock = socket.create_connection((target.host.strip("[]"), target.port), timeout)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, f"{target.host!r} is no host name") from None
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
