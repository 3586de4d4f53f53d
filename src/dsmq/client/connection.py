"""One connection of the blocking client: requests out, replies in, and how long a reply may take."""

from __future__ import annotations

import math
import socket
import time
import weakref
from selectors import EVENT_READ, EVENT_WRITE
from typing import TYPE_CHECKING, TypedDict, Unpack

from dsmq.client import arguments
from dsmq.client import session as wire
from dsmq.client.dial import Selector, Target, dial, program, silent_program
from dsmq.client.requests import Producer
from dsmq.errors import AuthRequired, ConfigError, DSMQError, ProtocolError
from dsmq.system import (
    LONG_YIELD_PAUSE_SECONDS,
    LONG_YIELD_SECONDS,
    expect_long_messages,
    process,
    yield_processor,
)
from dsmq.wire.resp import Reply, ReplyParser

if TYPE_CHECKING:
    from ssl import SSLContext

# Where replies are long, more is received at once; at first it would be slower, for the system gives memory of its own
# to an object of 128 KiB, and takes it back, each time.
_RECEIVE_BYTES, _RECEIVE_MORE_BYTES = 65_536, 262_144
_TLS_ALERT = b"\x15\x03"
# What a selector takes, in milliseconds, fits into 32 bits.
_LONGEST_TIMEOUT = 1e6
# Behind a longer pause it is looked whether a connection still stands before something is sent on it.
LONG_PAUSE_SECONDS = 0.1
FORKED = "this process is a child of the one that made the connection"
ENDED = "the server has closed the connection"
# As slow as a link may be that takes what is sent: the server waits no longer either.
_SLOWEST_SECONDS_PER_BYTE = 1 / 16_384
# How long a reply is looked for before the client goes to sleep.
BUSY_POLL_SECONDS = 150e-6
# A signal handler may fork without Python's hooks. The call that it interrupts goes on waiting in the child for what
# goes to the parent, and on a descriptor that may belong to another connection by then. So it looks up now and then.
_LONGEST_SLEEP_SECONDS = 1.0


class Security(TypedDict, total=False):
    """The arguments of `connect` that say who one is and whom one trusts."""

    token: str | None
    tls: bool | SSLContext
    ca_file: str | None
    cert_file: str | None
    key_file: str | None


def target(host: str, port: int, **security: Unpack[Security]) -> Target:
    """Return what the arguments of `connect` describe. Raises ConfigError, TypeError or ValueError."""
    if unknown := sorted(security.keys() - Security.__annotations__.keys()):
        raise TypeError(f"unexpected arguments: {', '.join(unknown)}")
    host, port = arguments.address(host, port)
    token, tls = security.get("token"), security.get("tls") or False
    token = "" if token is None else arguments.text("token", token)
    ca_file, cert_file, key_file = (
        arguments.path(name, security.get(name)) for name in ("ca_file", "cert_file", "key_file")
    )
    files = ca_file, cert_file, key_file
    if key_file and not cert_file:
        raise ConfigError("key_file without cert_file")
    if not isinstance(tls, bool):
        if not hasattr(tls, "wrap_socket"):
            raise TypeError(f"tls is a bool or an SSLContext, not {tls!r}")
        if any(files):
            raise TypeError("an SSLContext has its files already")
        return Target(host, port, tls, token)
    if not (tls or any(files)):
        return Target(host, port, None, token)
    from dsmq.wire.tls import client_context  # noqa: PLC0415 - most clients need none of it

    return Target(host, port, client_context(*files), token)


class ClosedSilently(ConnectionResetError):
    """What listens there closes connections without a word, as a forwarder does before the server has started."""


class Link:
    """One connection to the server."""

    def __init__(self, target: Target, timeout: float) -> None:
        self.producer = Producer(b"")
        self._process = process()
        self._parser = ReplyParser()
        self._timeout, self._longest_pause = timeout, timeout
        self._deadline = math.inf
        self.used_at = math.inf
        # From when on a reply is worth looking for without going to sleep.
        self._look_from = 0.0
        self._receive_bytes = _RECEIVE_BYTES
        self._heard = b""
        self._target = target
        self._socket = dial(target, min(timeout, _LONGEST_TIMEOUT))
        # A call that is interrupted may let go of it anywhere.
        weakref.finalize(self, self._socket.close)
        self._selector = Selector()
        self._selector.register(self._socket, EVENT_READ)

    def send(self, data: bytes, timeout: float) -> None:
        """Send requests; the first reply may begin after `timeout` seconds, and the time in which they arrive."""
        self._timeout = timeout
        self.renew()
        try:
            sent = self._send(data)
            while sent < len(data):
                self.renew()
                sent += self._send(memoryview(data)[sent:])
            # The kernel may have taken more than the network has.
            self._deadline += sent * _SLOWEST_SECONDS_PER_BYTE
        except ConnectionError:
            # The server has hung up: the end stands behind the replies that are there, and it may say why.
            return

    def greet(self, hello: bytes) -> Reply:
        """Return the reply to HELLO. Raises ProtocolError that names another program, if it is known, or OSError."""
        try:
            self.send(hello, self._timeout)
            return self.receive()
        except AuthRequired as error:
            # Redis says this too; `meet` tells them apart.
            return error
        except (ProtocolError, ConnectionResetError):
            raise_if_known(self._target, self._heard)
            raise

    def ended(self) -> str | None:
        """Return why the connection has ended, if it has while nobody used it; not looked for after a short pause."""
        return self.look() if time.monotonic() - self.used_at > LONG_PAUSE_SECONDS else None

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
            # A signal handler may have forked a moment ago: the parent's connection is not the child's to write to.
            if process() is not self._process:
                raise ConnectionResetError(FORKED)
            try:
                return self._socket.send(data)
            except BlockingIOError:
                self._wait(EVENT_WRITE)

    def renew(self) -> None:
        """Give the replies that are outstanding their whole time again."""
        self.used_at = time.monotonic()
        self._deadline = self.used_at + self._timeout

    def receive(self) -> Reply:
        """Return the next reply. Raises OSError when the connection breaks, or nothing more comes for too long."""
        while (reply := self._parser.next()) is None:
            data = self._receive()
            if not data:
                raise ConnectionResetError(ENDED)
            self._heard = data
            self._parser.feed(data)
        return wire.unless_last(reply[0])

    def _receive(self) -> bytes:
        """Return what has come, or else what comes first; nothing at the end.

        For a moment it looks without going to sleep, as the server does: to wake a processor that sleeps takes
        longer, in virtual machines above all, than most requests. Not where that was in vain the last time.
        """
        began = now = time.monotonic()
        while True:
            # A signal handler may have forked while this waited.
            if process() is not self._process:
                raise ConnectionResetError(FORKED)
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
        now = self.used_at = time.monotonic()
        # The link may be slow: what comes shows that it is alive.
        if self._deadline < now + self._longest_pause:  # noqa: PLR1730 - faster
            self._deadline = now + self._longest_pause
        if now - began > LONG_YIELD_SECONDS:
            self._look_from = now + LONG_YIELD_PAUSE_SECONDS
        else:
            self._look_from = 0.0 if now - began < 2 * BUSY_POLL_SECONDS else math.inf

    def _wait(self, event: int) -> None:
        """Wait until the socket may take or have something. Raises TimeoutError when the reply is overdue."""
        self._selector.modify(self._socket, event)
        left = self._deadline - time.monotonic()
        if not self._selector.select(max(0.0, min(left, _LONGEST_SLEEP_SECONDS))) and left < _LONGEST_SLEEP_SECONDS:
            raise TimeoutError(f"no reply within {self._timeout:g} s")

    def await_end(self) -> None:
        """Wait until the server closes the connection."""
        while self._receive():
            pass

    def interrupt(self) -> None:
        """Have a call in another thread fail at once."""
        if process() is not self._process:
            return
        try:
            if isinstance(self._socket, socket.socket):
                self._socket.shutdown(socket.SHUT_RDWR)
            else:
                self._socket.interrupt()
        except OSError:
            return  # It is closed already, by either side.

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed on this side."""
        return self._socket.fileno() >= 0

    def close(self) -> None:
        """Close it. Idempotent."""
        self._socket.close()


def raise_if_known(target: Target, heard: bytes) -> None:
    """Raise an error that names the program that answers so, if it is known."""
    if name := program(heard):
        raise ProtocolError(f"{target} is {name}") from None
    if heard[:2] == _TLS_ALERT and not target.tls:
        raise ConnectionAbortedError(f"{target} answers with TLS; does it want TLS?") from None


def closed_silently(target: Target) -> Exception:
    """Return what to raise when the first connection was closed without a word."""
    if name := silent_program(target):
        return ProtocolError(f"{target} is {name}")
    about = "accepts connections and closes them at once; is the server behind it running"
    return ClosedSilently(f"{target} {about}" + ("?" if target.tls else "; does it want TLS?"))
