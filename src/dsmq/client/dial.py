"""How a client reaches a server: the addresses of a name, one after another, and what else may answer there."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from contextlib import suppress
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

if TYPE_CHECKING:
    from ssl import SSLContext

    from dsmq.wire.tls import TLSSocket

Address: TypeAlias = "tuple[int, int, int, Any]"
"""Family, type, protocol and address, as `socket` takes them."""

STAGGER_SECONDS = 0.25
"""How long an address has before the next one is tried beside it (RFC 8305, section 5)."""
# As soon as one address has refused, so that a server may be starting there, the others have no longer than this.
REST_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 86_400.0
"""What a selector can be told to wait at once, and more."""
# OpenSSL's codes for a certificate that is not for this host, by name or by address.
_OTHER_NAME = 62, 64
_UNDER_WAY = {errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", errno.EWOULDBLOCK)}
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


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


def dial(target: Target, timeout: float) -> socket.socket | TLSSocket:
    """Return a non-blocking connection. Raises OSError."""
    sock = _open_unix(target, timeout) if target.is_unix else _open_tcp(target, timeout)
    if target.tls:
        from dsmq.wire import tls  # noqa: PLC0415 - most clients need none of it

        sock.settimeout(timeout)
        try:
            return tls.connect(target.tls, sock, target.name)
        except OSError as error:
            sock.close()
            raise tls_failure(target, error) from None
    return sock


def tls_failure(target: Target, error: Exception) -> Exception:
    """Return what to raise when TLS failed. It may connect again, to find out whom the server's certificate is for."""
    import ssl  # noqa: PLC0415 - most clients need none of it

    from dsmq.wire import tls  # noqa: PLC0415

    if not isinstance(error, ssl.SSLError):
        return error
    about = tls.advice(error)
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in _OTHER_NAME:
        with suppress(OSError, ValueError, KeyError), dial(target._replace(tls=None), _PROBE_SECONDS) as sock:  # type: ignore[union-attr]
            sock.settimeout(_PROBE_SECONDS)
            about += f"; it is for {', '.join(tls.certificate_names(target.tls, sock, target.name))}"  # type: ignore[arg-type]
    return ConnectionAbortedError(f"{target}: TLS: {about}")


def unix_address(target: Target) -> Address:
    """Return the address of a Unix socket. Raises OSError where there are none."""
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, f"{target}: this system has no Unix sockets")
    return socket.AF_UNIX, socket.SOCK_STREAM, 0, target.path


def addresses(target: Target) -> list[Address]:
    """Return the addresses of a host, families in turn (RFC 8305, section 4). Raises OSError."""
    try:
        found = socket.getaddrinfo(target.name, target.port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, f"cannot resolve {target.host!r}: it is no host name") from None
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"cannot resolve {target.host!r}: {error.strerror}") from None
    families: dict[int, list[Address]] = {}
    for family, kind, protocol, _, address in found:
        families.setdefault(family, []).append((family, kind, protocol, address))
    return [one for one in chain.from_iterable(zip_longest(*families.values())) if one]


def failure(target: Target, errors: list[tuple[Address, OSError]]) -> OSError:
    """Return what to raise when no address of a host could be reached."""
    refused = [error for _, error in errors if isinstance(error, ConnectionRefusedError)]
    about = "; ".join(f"{address[3][0]}: {error.strerror or error or 'timed out'}" for address, error in errors)
    if len(errors) == len(refused):
        return ConnectionRefusedError(errno.ECONNREFUSED, f"no server answers at {target}")
    if refused:
        # One may be starting there.
        return ConnectionRefusedError(errno.ECONNREFUSED, f"no server answers at {target} ({about})")
    if len(errors) == 1:
        error = errors[0][1]
        about = f"{target} can't be reached: {error.strerror or error or 'timed out'}"
        return alike(error, about)
    if all(isinstance(error, TimeoutError) for _, error in errors):
        return TimeoutError(errno.ETIMEDOUT, f"{target} can't be reached ({about})")
    return OSError(errno.EHOSTUNREACH, f"{target} can't be reached ({about})")


def alike(error: OSError, about: str) -> OSError:
    """Return an error of the same kind that says something else."""
    # Python finds some errors itself, such as a path that is too long, and gives them no number.
    return type(error)(error.errno, about) if error.errno else type(error)(about)


def _open_tcp(target: Target, timeout: float) -> socket.socket:
    with _Race(target) as race:
        sock = race.run(timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class _Race:
    """Attempts to reach a host, each by another of its addresses; the first that succeeds counts."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._left = addresses(target)
        self._under_way: dict[socket.socket, Address] = {}
        self._errors: list[tuple[Address, OSError]] = []
        self._selector = Selector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._under_way:
            sock.close()
        self._selector.close()

    def run(self, timeout: float) -> socket.socket:
        """Return the first connection that stands. Raises OSError when none does in time."""
        until = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            if self._left and now < until:
                self._begin(self._left.pop(0))
            if (not self._under_way and not self._left) or now >= until:
                raise self._failure()
            if any(isinstance(error, ConnectionRefusedError) for _, error in self._errors) and not self._left:
                until = min(until, now + REST_SECONDS)
            pause = min(STAGGER_SECONDS, until - now) if self._left else until - now
            for key, _ in self._selector.select(max(0.0, min(pause, LONGEST_WAIT_SECONDS))) if self._under_way else ():
                if (sock := self._end(key.fileobj)) is not None:
                    return sock

    def _begin(self, address: Address) -> None:
        try:
            sock = socket.socket(*address[:3])
        except OSError as error:
            self._errors.append((address, error))
            return
        self._under_way[sock] = address
        sock.setblocking(False)
        try:
            code = sock.connect_ex(address[3])
        except OSError as error:
            self._fail(sock, error)
            return
        if code and code not in _UNDER_WAY:
            self._fail(sock, OSError(code, os.strerror(code)))
        else:
            self._selector.register(sock, selectors.EVENT_WRITE)

    def _end(self, sock: Any) -> socket.socket | None:
        """Return a connection if it stands."""
        self._selector.unregister(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(sock, OSError(code, os.strerror(code)))
            return None
        self._under_way.pop(sock)
        return sock  # type: ignore[no-any-return]

    def _fail(self, sock: socket.socket, error: OSError) -> None:
        self._errors.append((self._under_way.pop(sock), error))
        sock.close()

    def _failure(self) -> OSError:
        late = [(address, TimeoutError(errno.ETIMEDOUT, "timed out")) for address in self._under_way.values()]
        return failure(self._target, [*self._errors, *late])


def _open_unix(target: Target, timeout: float) -> socket.socket:
    address = unix_address(target)
    sock = socket.socket(*address[:3])
    sock.settimeout(timeout)
    try:
        sock.connect(target.path)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise failure(target, [(address, error)]) from None
    except BaseException:
        sock.close()
        raise
    return sock


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
# MQTT 3.1.1, of a client without a name.
_MQTT_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x05\x00\x00"
_PROBE_SECONDS = 1.0


def program(data: bytes) -> str:
    """Return which program answers so, as far as that is known; empty if it is not."""
    if data.startswith(b"HTTP/") and b"dsmq" in data[:1000]:
        return "dsmq's HTTP endpoint; clients connect to the other port"
    return next((name for start, name in _GREETINGS.items() if data.startswith(start)), "")


def silent_program(target: Target) -> str:
    """Return which program it is that closes connections without a word. It is asked in another protocol."""
    try:
        with dial(target._replace(tls=None), _PROBE_SECONDS) as sock:  # type: ignore[union-attr]
            sock.settimeout(_PROBE_SECONDS)
            sock.sendall(_MQTT_CONNECT)
            return program(sock.recv(100))
    except OSError:
        return ""
