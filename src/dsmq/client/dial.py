"""How a client reaches a server: endpoints, addresses, connection attempts, and other programs that may answer."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias, TypedDict

from dsmq.client import arguments
from dsmq.errors import ConfigError, ProtocolError
from dsmq.wire.addresses import UNIX

if TYPE_CHECKING:
    from ssl import SSLContext

    from dsmq.wire.tls import TLSSocket

Address: TypeAlias = "tuple[int, int, int, Any]"
"""Family, type, protocol and address, as `socket` takes them."""

STAGGER_SECONDS = 0.25
"""How long an address has before the next one is tried in parallel (RFC 8305, section 5)."""
# Once one address has refused, so that a server may be starting there, the others get no longer than this.
REST_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 86_400.0
"""The longest wait that a selector accepts is longer than this."""
# OpenSSL's codes for a certificate that is for another host, by name or by address.
_OTHER_NAME = 62, 64
# A Unix socket whose queue is full says EWOULDBLOCK, and does not go on connecting.
_IN_PROGRESS = {errno.EINPROGRESS, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)}
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Security(TypedDict, total=False):
    """The arguments of `connect` for authentication and encryption."""

    token: str | None
    tls: bool | SSLContext
    ca_file: str | None
    cert_file: str | None
    key_file: str | None


class Endpoint(NamedTuple):
    """Where a client connects to, and how it authenticates there."""

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
        return self.host.startswith(UNIX)

    @property
    def name(self) -> str:
        """The name that the certificate must be valid for."""
        return "localhost" if self.is_unix else self.host.strip("[]")


def parse_endpoint(host: str, port: int, security: Security) -> Endpoint:
    """Return the endpoint that the arguments of `connect` describe. Raises ConfigError, TypeError or ValueError."""
    host, port = arguments.address(host, port)
    token, tls = security.get("token"), security.get("tls") or False
    token = "" if token is None else arguments.text("token", token)
    names: tuple[Literal["ca_file", "cert_file", "key_file"], ...] = ("ca_file", "cert_file", "key_file")
    ca_file, cert_file, key_file = files = tuple(arguments.path(name, security.get(name)) for name in names)
    if key_file and not cert_file:
        raise ConfigError("key_file without cert_file")
    if not isinstance(tls, bool):
        if not hasattr(tls, "wrap_socket"):
            raise TypeError(f"tls is a bool or an SSLContext, not {tls!r}")
        if any(files):
            raise TypeError("with an SSLContext, load the files into the context")
        return Endpoint(host, port, tls, token)
    if not (tls or any(files)):
        return Endpoint(host, port, None, token)
    from dsmq.wire.tls import client_context  # noqa: PLC0415 - most clients don't need it

    return Endpoint(host, port, client_context(ca_file, cert_file, key_file), token)


def dial(endpoint: Endpoint, timeout: float) -> socket.socket | TLSSocket:
    """Return a non-blocking connection. Raises OSError."""
    with Race(endpoint, addresses(endpoint)) as race:
        for seconds in race.run(timeout):
            race.selector.select(seconds)
    if endpoint.tls:
        from dsmq.wire import tls  # noqa: PLC0415 - most clients don't need it

        race.winner.settimeout(timeout)
        try:
            return tls.connect(endpoint.tls, race.winner, endpoint.name)
        except OSError as error:
            race.winner.close()
            raise tls_failure(endpoint, error) from None
    return race.winner


def tls_failure(endpoint: Endpoint, error: Exception) -> Exception:
    """Return what to raise if TLS failed. May connect again, to find out which host the certificate is for."""
    import ssl  # noqa: PLC0415 - most clients don't need it

    from dsmq.wire import tls  # noqa: PLC0415

    if not isinstance(error, ssl.SSLError):
        return error
    about = tls.advice(error)
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in _OTHER_NAME:
        with (
            suppress(OSError, ValueError, KeyError),
            dial(endpoint._replace(tls=None), _PROBE_SECONDS) as sock,  # type: ignore[union-attr]
        ):
            sock.settimeout(_PROBE_SECONDS)
            about += f"; it is for {', '.join(tls.certificate_names(endpoint.tls, sock, endpoint.name))}"  # type: ignore[arg-type]
    return ConnectionAbortedError(f"{endpoint}: TLS: {about}")


def addresses(endpoint: Endpoint) -> list[Address]:
    """Return the addresses of a host, alternating between families (RFC 8305, section 4). Raises OSError."""
    if endpoint.is_unix:
        if not hasattr(socket, "AF_UNIX"):
            raise OSError(errno.EAFNOSUPPORT, f"{endpoint}: this system has no Unix sockets")
        return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, endpoint.host.removeprefix(UNIX))]
    try:
        found = socket.getaddrinfo(endpoint.name, endpoint.port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, f"cannot resolve {endpoint.host!r}: invalid host name") from None
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"cannot resolve {endpoint.host!r}: {error.strerror}") from None
    families: dict[int, list[Address]] = {}
    for family, kind, protocol, _, address in found:
        families.setdefault(family, []).append((family, kind, protocol, address))
    return [one for one in chain.from_iterable(zip_longest(*families.values())) if one]


class Race:
    """Connection attempts to the addresses of a host; the first to succeed wins (RFC 8305)."""

    def __init__(self, endpoint: Endpoint, left: list[Address]) -> None:
        self.selector = Selector()
        self.winner: socket.socket
        self._endpoint = endpoint
        self._left = left
        self._pending: dict[socket.socket, Address] = {}
        self._errors: list[tuple[Address, OSError]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._pending:
            sock.close()
        self.selector.close()

    def run(self, timeout: float) -> Iterator[float]:
        """Iterate until there is a winner; wait on the selector for up to the seconds yielded each time.

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
            if self._pending:
                pause = min(STAGGER_SECONDS, until - now) if self._left else until - now
                yield max(0.0, min(pause, LONGEST_WAIT_SECONDS))
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
        if code and code not in _IN_PROGRESS:
            self._fail(sock, OSError(code, os.strerror(code)))
        else:
            self.selector.register(sock, selectors.EVENT_WRITE)

    def _finish(self, sock: Any) -> bool:
        """Return whether an attempt has succeeded."""
        self.selector.unregister(sock)
        if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._fail(sock, OSError(code, os.strerror(code)))
            return False
        if not self._endpoint.is_unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.winner = sock
        del self._pending[sock]
        return True

    def _fail(self, sock: socket.socket, error: OSError) -> None:
        self._errors.append((self._pending.pop(sock), error))
        sock.close()

    def _failure(self) -> OSError:
        """Return the error to raise when no address could be reached."""
        endpoint = self._endpoint
        errors = [*self._errors]
        errors += [(address, TimeoutError(errno.ETIMEDOUT, "timed out")) for address in self._pending.values()]
        refused = [error for _, error in errors if isinstance(error, ConnectionRefusedError)]
        reasons = "; ".join(f"{address[3][0]}: {error.strerror or error}" for address, error in errors)
        if refused:
            # Whatever happened to the others: a server may be starting there.
            about = f" ({reasons})" if len(refused) < len(errors) else ""
            return ConnectionRefusedError(errno.ECONNREFUSED, f"no server answers at {endpoint}{about}")
        if len(errors) == 1:
            error = errors[0][1]
            return alike(error, f"{endpoint} can't be reached: {error.strerror or error}")
        about = f"{endpoint} can't be reached ({reasons})"
        if all(isinstance(error, TimeoutError) for _, error in errors):
            return TimeoutError(errno.ETIMEDOUT, about)
        return OSError(errno.EHOSTUNREACH, about)


def alike(error: OSError, about: str) -> OSError:
    """Return an error of the same type with another message."""
    # Errors that Python itself finds, such as a path that is too long, have no number.
    return type(error)(error.errno, about) if error.errno else type(error)(about)


# What else answers


_GREETINGS = {
    b"HTTP/": "an HTTP server",
    b"<": "an HTTP server",
    b"SSH-": "an SSH server",
    b"220 ": "a mail or FTP server",
    b"INFO {": "a NATS server",
    b"AMQP": "an AMQP server, such as RabbitMQ",
    b" \x02": "an MQTT broker, such as mosquitto",
    b"ERROR\r\n": "a memcached server",
    b"UNKNOWN_COMMAND": "a beanstalkd server",
}
# MQTT 3.1.1, from a client without a name.
_MQTT_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x05\x00\x00"
_TLS_ALERT = b"\x15\x03"
_PROBE_SECONDS = 1.0


def program(data: bytes) -> str:
    """Return the name of the program that answers like this; empty if it is not known."""
    if data.startswith(b"HTTP/") and b"dsmq" in data[:1000]:
        return "dsmq's HTTP endpoint; clients connect to the other port"
    return next((name for start, name in _GREETINGS.items() if data.startswith(start)), "")


def explain_greeting(endpoint: Endpoint, received: bytes, error: Exception) -> Exception:
    """Return what to raise if the answer to HELLO was not a server's: it names the program, if that is known."""
    if name := program(received):
        return ProtocolError(f"{endpoint} is {name}")
    if received[:2] == _TLS_ALERT and not endpoint.tls:
        return ConnectionAbortedError(f"{endpoint} answers with TLS; does it want TLS?")
    return error


class ClosedSilently(ConnectionResetError):
    """The connection was closed without a word, as a forwarder does before the server behind it has started."""


def explain_silence(endpoint: Endpoint) -> Exception:
    """Return what to raise if the first connection was closed without a word. May connect once more to find out."""
    try:
        with dial(endpoint._replace(tls=None), _PROBE_SECONDS) as sock:  # type: ignore[union-attr]
            sock.settimeout(_PROBE_SECONDS)
            sock.sendall(_MQTT_CONNECT)
            name = program(sock.recv(100))
    except OSError:
        name = ""
    if name:
        return ProtocolError(f"{endpoint} is {name}")
    about = "accepts connections and closes them at once; is the server behind it running"
    return ClosedSilently(f"{endpoint} {about}" + ("?" if endpoint.tls else "; does it want TLS?"))
