"""Connecting to a server: TLS options, addresses, connection attempts, and other programs that may answer."""

from __future__ import annotations

import errno
import os
import re
import selectors
import socket
import time
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypedDict

from dsmq.client import arguments
from dsmq.client.replies import reason
from dsmq.errors import ConfigError, ProtocolError, ReplyError
from dsmq.wire.addresses import Endpoint

if TYPE_CHECKING:
    from ssl import SSLContext

    from dsmq.wire.tls import TLSSocket

Address: TypeAlias = "tuple[int, int, int, Any]"
"""Family, type, protocol and address, as in the module `socket`."""

STAGGER_SECONDS = 0.25
"""How long an address has before the next one is tried in parallel (RFC 8305, section 5)."""
# If an address refuses the connection, a server may be starting there. Then the other addresses get only this long
# before all of them are tried again.
REST_SECONDS = 2.0
# A selector does not accept an infinite wait.
_LONGEST_WAIT_SECONDS = 86_400.0
# How often to try a Unix socket whose listen queue is full.
_FULL_SECONDS = 0.02
# EWOULDBLOCK is missing because a Unix socket with a full queue reports it and then does not continue connecting.
_IN_PROGRESS = {errno.EINPROGRESS, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)}
_TLS_ALERT = b"\x15\x03"
# The first bytes from programs that users mistake for a dsmq server.
_PROGRAMS = {
    b"HTTP/": "an HTTP server",
    b"<": "an HTTP server",
    b"SSH-": "an SSH server",
    b"220 ": "a mail or FTP server",
    b"INFO {": "a NATS server",
    b"AMQP": "an AMQP server, such as RabbitMQ",
    b" \x02": "an MQTT broker, such as mosquitto",
    b"ERROR\r\n": "a memcached server",
    b"UNKNOWN_COMMAND": "a beanstalkd server",
    b"-ERR ": "Redis or a compatible server",
    b"-NOAUTH HELLO": "Redis or a compatible server",
}
# CONNECT of MQTT 3.1.1, without a client id. A broker closes a connection that begins with anything else.
_MQTT_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x05\x00\x00"
_PROBE_SECONDS = 1.0
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Security(TypedDict, total=False):
    """The arguments of `connect` for authentication and encryption."""

    token: str | None
    tls: bool | SSLContext
    ca_file: str | None
    cert_file: str | None
    key_file: str | None


def tls_context(security: Security) -> SSLContext | None:
    """Return the context for TLS, or None without TLS. Raises ConfigError, TypeError or ValueError."""
    names: tuple[Literal["ca_file", "cert_file", "key_file"], ...] = ("ca_file", "cert_file", "key_file")
    ca_file, cert_file, key_file = files = tuple(arguments.path(name, security.get(name)) for name in names)
    tls = security.get("tls") or False
    if key_file and not cert_file:
        raise ConfigError("key_file without cert_file")
    if not isinstance(tls, bool):
        if not hasattr(tls, "wrap_socket"):
            raise TypeError(f"tls should be a bool or an SSLContext, not {tls!r}")
        if any(files):
            raise TypeError("with an SSLContext, load the files into the context")
        if tls.protocol.name == "PROTOCOL_TLS_SERVER":
            raise ValueError("tls should be an SSLContext for clients, not for servers")
        return tls
    if not (tls or any(files)):
        return None
    from dsmq.wire.tls import client_context  # noqa: PLC0415 - most clients don't need it

    return client_context(ca_file, cert_file, key_file)


def certified_name(endpoint: Endpoint) -> str:
    """Return the name that the server's certificate must be valid for."""
    return endpoint.host or "localhost"


def dial(endpoint: Endpoint, tls: SSLContext | None, timeout: float, skip: int) -> socket.socket | TLSSocket:
    """Return a non-blocking connection. `skip` is as for `addresses`. Raises OSError."""
    sock = _connect(endpoint, timeout, skip)
    if tls is None:
        return sock
    from dsmq.wire.tls import connect  # noqa: PLC0415 - most clients don't need it

    sock.settimeout(timeout)
    try:
        return connect(tls, sock, certified_name(endpoint))
    except OSError as error:
        sock.close()
        raise explain_handshake(endpoint, error, timeout) from None


def _connect(endpoint: Endpoint, timeout: float, skip: int = 0) -> socket.socket:
    with Race(endpoint, addresses(endpoint, skip)) as race:
        for seconds in race.run(timeout):
            race.selector.select(seconds)
    return race.winner


def explain_handshake(endpoint: Endpoint, error: OSError, timeout: float) -> OSError:
    """Return an error to raise instead of the one that ended the TLS handshake."""
    import ssl  # noqa: PLC0415 - most clients don't need it

    if isinstance(error, ConnectionError | ssl.SSLEOFError):
        return _closed_silently(endpoint, with_tls=True)
    if isinstance(error, TimeoutError):
        return TimeoutError(f"{endpoint}: no reply within {timeout:g} s")
    return explain_failure(endpoint, error)


def explain_failure(endpoint: Endpoint, error: OSError) -> OSError:
    """Return an error to raise instead of a TLS error, with the endpoint and advice."""
    import ssl  # noqa: PLC0415 - most clients don't need it

    from dsmq.wire.tls import advice  # noqa: PLC0415

    if isinstance(error, ssl.SSLError):
        return ConnectionAbortedError(f"{endpoint}: TLS: {advice(error)}")
    if type(error) in (ConnectionAbortedError, BrokenPipeError):
        return with_text(error, f"{endpoint}: {reason(error)}")
    return error


def addresses(endpoint: Endpoint, skip: int = 0) -> list[Address]:
    """Return the addresses of a host, alternating between families (RFC 8305, section 4). Raises OSError.

    The first `skip` come last.
    """
    if endpoint.path:
        if not hasattr(socket, "AF_UNIX"):
            raise OSError(errno.EAFNOSUPPORT, f"{endpoint}: this system has no Unix sockets")
        return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, endpoint.path)]
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, f"cannot resolve {endpoint.host!r}: invalid host name") from None
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"cannot resolve {endpoint.host!r}: {error.strerror}") from None
    families: dict[int, list[Address]] = {}
    for family, kind, protocol, _, address in found:
        families.setdefault(family, []).append((family, kind, protocol, address))
    ordered = [one for one in chain.from_iterable(zip_longest(*families.values())) if one]
    skip %= len(ordered)
    return ordered[skip:] + ordered[:skip]


class Race:
    """Connection attempts to the addresses of a host; the first to succeed wins (RFC 8305)."""

    def __init__(self, endpoint: Endpoint, left: list[Address]) -> None:
        self.selector = Selector()
        self.winner: socket.socket
        self._endpoint = endpoint
        self._left = left
        self._pending: dict[socket.socket, Address] = {}
        self._errors: list[tuple[Address, OSError]] = []
        self._is_full = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._pending:
            sock.close()
        self.selector.close()

    def run(self, timeout: float) -> Iterator[float]:
        """Iterate until an attempt succeeds; each time, the caller waits on the selector for up to the seconds yielded.

        Raises OSError if no address can be reached in time.
        """
        until = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            if self._left and now < until:
                self._start(self._left.pop(0))
            if now >= until or not (self._pending or self._left):
                raise self._failure()
            if not self._left and any(isinstance(error, ConnectionRefusedError) for _, error in self._errors):
                until = min(until, now + REST_SECONDS)
            if self._pending or self._is_full:
                pause = _FULL_SECONDS if self._is_full else STAGGER_SECONDS if self._left else _LONGEST_WAIT_SECONDS
                yield max(0.0, min(pause, until - now))
            for key, _ in self.selector.select(0) if self._pending else ():
                if self._finish(key.fileobj):
                    return

    def _start(self, address: Address) -> None:
        try:
            sock = socket.socket(*address[:3])
        except OSError as error:
            self._errors.append((address, error))
            return
        self._pending[sock] = address
        sock.setblocking(False)
        try:
            code = sock.connect_ex(address[3])
        except OSError as error:
            self._fail(sock, error)
            return
        if code == errno.EAGAIN and self._endpoint.path:
            # The listen queue is full, and a Unix socket does not wait for room by itself.
            self._left.append(self._pending.pop(sock))
            self._is_full = True
            sock.close()
        elif code and code not in _IN_PROGRESS:
            self._fail(sock, OSError(code, os.strerror(code)))
        else:
            self.selector.register(sock, selectors.EVENT_WRITE)

    def _finish(self, sock: Any) -> bool:
        """Return whether an attempt has succeeded."""
        self.selector.unregister(sock)
        if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._fail(sock, OSError(code, os.strerror(code)))
            return False
        if not self._endpoint.path:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.winner = sock
        del self._pending[sock]
        return True

    def _fail(self, sock: socket.socket, error: OSError) -> None:
        self._errors.append((self._pending.pop(sock), error))
        sock.close()

    def _failure(self) -> OSError:
        """Return the error to raise because no address could be reached."""
        timed_out = TimeoutError(errno.ETIMEDOUT, "timed out")
        errors = [*self._errors, *((address, timed_out) for address in (*self._pending.values(), *self._left))]
        reasons = "; ".join(f"{address[3][0]}: {reason(error)}" for address, error in errors)
        refused = [error for _, error in errors if isinstance(error, ConnectionRefusedError)]
        if refused:
            # Whatever the other errors are, a server may be starting at the address that refused the connection.
            about = f" ({reasons})" if len(refused) < len(errors) else ""
            return ConnectionRefusedError(errno.ECONNREFUSED, f"no server answers at {self._endpoint}{about}")
        first = errors[0][1]
        if len(errors) == 1:
            return with_text(first, f"{self._endpoint} can't be reached: {reason(first)}")
        if not all(isinstance(error, TimeoutError) for _, error in errors):
            first = OSError(errno.EHOSTUNREACH, "")
        return with_text(first, f"{self._endpoint} can't be reached ({reasons})")


def with_text(error: OSError, text: str) -> OSError:
    """Return an error of the same type with another text."""
    # Errors detected by Python itself, such as a path that is too long, have no number.
    return type(error)(error.errno, text) if error.errno else type(error)(text)


# Other programs that answer


class ClosedSilently(ConnectionResetError):
    """The connection was closed without an answer, for example by a proxy whose server has not started yet."""


def _closed_silently(endpoint: Endpoint, *, with_tls: bool) -> ClosedSilently:
    about = "accepts connections and closes them immediately; is the server behind it up?"
    return ClosedSilently(f"{endpoint} {about} does it {'speak' if with_tls else 'require'} TLS?")


def explain_greeting(
    endpoint: Endpoint, received: bytes, error: Exception, *, is_first: bool, with_tls: bool
) -> Exception:
    """Return the error to raise instead of this one, if `received` is not a dsmq server's reply to HELLO.

    If nothing was received on the first connection, this connects again to check for an MQTT broker, unless with TLS.
    """
    if is_first and isinstance(error, ConnectionResetError) and not received:
        received = b"" if with_tls else _ask_for_mqtt(endpoint)
        if not received:
            return _closed_silently(endpoint, with_tls=with_tls)
        error = ProtocolError(str(error))
    if isinstance(error, TimeoutError):
        return TimeoutError(f"{endpoint}: {error}")
    if received.startswith(_TLS_ALERT):
        return ConnectionAbortedError(f"{endpoint} answers with a TLS alert; does it require TLS?")
    # Redis replies to HELLO with one of these errors.
    if isinstance(error, ProtocolError) or type(error) is ReplyError or received.startswith(b"-NOAUTH HELLO"):
        return ProtocolError(f"{endpoint} is {_program(received)}")
    return explain_failure(endpoint, error) if isinstance(error, OSError) else error


def _ask_for_mqtt(endpoint: Endpoint) -> bytes:
    try:
        with _connect(endpoint, _PROBE_SECONDS) as sock:
            sock.settimeout(_PROBE_SECONDS)
            sock.sendall(_MQTT_CONNECT)
            answer = sock.recv(100)
    except OSError:
        return b""
    return answer if answer.startswith(b" \x02") else b""


def _program(received: bytes) -> str:
    answer = received.partition(b"\n")[0][:100].decode(errors="replace").rstrip()
    names = [name for start, name in _PROGRAMS.items() if received.startswith(start)]
    if received.startswith(b"HTTP/") and b"dsmq" in received:
        names = ["dsmq's HTTP endpoint; clients connect to the other port"]
    elif found := re.search(rb"\r\nserver\r\n\$\d+\r\n(\w+)", received):
        # The reply to HELLO of a Redis-compatible server, such as Valkey.
        names = [found[1].decode()]
    return f"not a dsmq server{' but ' + names[0] if names else ''} (it answered {answer!r})"
