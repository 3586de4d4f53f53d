"""A fast connection to a NATS server, for publishing and for the messages of a push consumer.

The official client needs two to three times the processor time for these and closes permanently after some errors. It
is used for everything else: see `nats_stream`. The protocol:
https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import random
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote_from_bytes, unquote_to_bytes

from dsmq.logs import event
from dsmq.system import boot_time

CONNECT_SECONDS = 2.0
PING_SECONDS, SILENCE_SECONDS = 1.0, 3.0
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.01, 0.25
# NATS's default, for servers that do not send theirs.
_MAX_PAYLOAD_BYTES = 1_048_576

_logger = logging.getLogger(__name__)


@lru_cache(10_000)
def encode_token(name: bytes) -> bytes:
    """Encode any bytes as one token of a subject."""
    return quote_from_bytes(name, safe="-_").replace(".", "%2E").encode()


@lru_cache(10_000)
def decode_token(token: bytes) -> bytes:
    return unquote_to_bytes(token)


class Received(NamedTuple):
    """A message from the server."""

    subject: bytes
    reply: bytes
    """The subject for the reply; empty if none is expected."""
    headers: bytes
    body: bytes

    @property
    def status(self) -> int:
        """The status in the headers, such as 503 if there are no responders; 0 if there is none."""
        code = self.headers[9:12]
        return int(code) if self.headers[8:9] == b" " and code.isdigit() else 0

    def header(self, name: bytes) -> bytes:
        """Return the value of a header; empty if it is missing."""
        _, found, rest = self.headers.partition(b"\r\n" + name + b":")
        return rest.partition(b"\r\n")[0].strip() if found else b""


Listener: TypeAlias = Callable[[Received], None]
Server: TypeAlias = tuple[str, int]
"""Host and port."""


@dataclass
class Credentials:
    """Credentials that a server may require; empty if unused."""

    user: str = ""
    password: str = ""
    token: str = ""

    def options(self) -> dict[str, str]:
        """Return the fields for CONNECT."""
        given = {"user": self.user, "pass": self.password, "auth_token": self.token}
        return {name: value for name, value in given.items() if value}


class Refused(ConnectionError):
    """The server rejects the credentials, or the two sides can't agree on TLS. Retrying does not help."""


def encode_publish(
    subject: bytes, body: bytes, reply: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = ()
) -> bytes:
    """Return the request to publish a message. Only the body may contain spaces or line breaks."""
    if not headers:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(body), body)
    head = b"NATS/1.0\r\n%b\r\n" % b"".join([b"%b:%b\r\n" % header for header in headers])
    return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject, reply, len(head), len(head) + len(body), head, body)


class _Socket(asyncio.Protocol):
    """Buffers the data that arrives on a socket."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.on_data: Callable[[], None] = lambda: None
        self.arrived = asyncio.Event()
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.arrived.set()
        self.on_data()

    def connection_lost(self, error: Exception | None) -> None:
        self.arrived.set()
        if not self.closed.done():
            self.closed.set_result(error)

    async def line(self) -> bytes:
        """Return the next line. Raises OSError if the connection closes first."""
        while (end := self.buffer.find(b"\r\n")) < 0:
            if self.closed.done():
                raise self.closed.result() or ConnectionResetError("it closed the connection")
            self.arrived.clear()
            await self.arrived.wait()
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 2]
        return line


class NATSConnection:
    """A connection to one of several servers, restored when it breaks. Used in one asyncio event loop."""

    def __init__(
        self, servers: Sequence[Server], credentials: Credentials, tls: ssl.SSLContext | None, name: str
    ) -> None:
        self._all = servers
        self._servers = itertools.cycle(random.sample(servers, len(servers)))
        self._next: Server | None = None
        self._credentials, self._tls, self._name = credentials, tls, name
        self._listeners: dict[bytes, tuple[bytes, Listener]] = {}
        self._numbers = itertools.count(1)
        self._transport: asyncio.Transport | None = None
        # Failed attempts since the last connection, at most one for each server.
        self._failures: deque[tuple[Server, Exception]] = deque(maxlen=len(servers))
        self.max_payload = _MAX_PAYLOAD_BYTES
        self.has_jetstream = False
        """Whether the server itself has JetStream; others in its cluster may."""
        self.server = ""
        """The name of the current or last server."""
        self.heard_at = -math.inf
        """When the server last sent something, by `boot_time`."""
        self.opened_at = -math.inf
        """When the last connection was made."""
        self.error: Exception | None = None
        """Why there is no connection."""
        self._is_reported = False
        self.on_connected: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_received: Callable[[], None] = lambda: None
        """Called after the messages that arrived together have been passed to their listeners."""

    @property
    def connected(self) -> bool:
        return self._transport is not None

    @property
    def silent_seconds(self) -> float:
        """The time since the server last sent something."""
        return boot_time() - self.heard_at

    @property
    def responds(self) -> bool:
        """Whether the server has answered the last pings."""
        return self.connected and self.silent_seconds < 1.5 * PING_SECONDS

    @property
    def refusal(self) -> str:
        """Why retrying is pointless: all servers failed, and one of them refused; empty if it is not."""
        if len(self._failures) < (self._failures.maxlen or 1):
            return ""
        refusals = (f"{host}:{port}: {error}" for (host, port), error in self._failures if isinstance(error, Refused))
        return next(refusals, "")

    def send(self, requests: bytes) -> bool:
        """Send requests; return False if there is no connection."""
        if self._transport is None:
            return False
        self._transport.write(requests)
        return True

    def leave(self) -> None:
        """Switch to the next server."""
        if self._transport is not None:
            self._transport.abort()

    def move(self, server: Server) -> None:
        """Switch to this server. Pending requests get no answer, as if the connection had broken."""
        self._next = server
        self.leave()

    async def find(self, name: str) -> Server | None:
        """Return the server with this name, if it responds."""
        for server in self._all:
            with suppress(OSError, TimeoutError, ValueError):
                async with asyncio.timeout(CONNECT_SECONDS):
                    transport, _, info = await self._open(server)
                transport.abort()
                if info.get("server_name") == name:
                    return server
        return None

    def subscribe(self, subject: bytes, listener: Listener) -> bytes:
        """Pass messages for a subject to the listener; return the subscription's number."""
        number = b"%d" % next(self._numbers)
        self._listeners[number] = subject, listener
        self.send(b"SUB %b %b\r\n" % (subject, number))
        return number

    def unsubscribe(self, number: bytes) -> None:
        if self._listeners.pop(number, None):
            self.send(b"UNSUB %b\r\n" % number)

    async def run(self) -> None:
        """Stay connected until cancelled."""
        delay = _FIRST_DELAY_SECONDS
        while True:
            transport: asyncio.Transport | None = None
            server, self._next = self._next or next(self._servers), None
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    transport, sock = await self._connect(server)
                self._failures.clear()
                delay = _FIRST_DELAY_SECONDS
                await self._serve(transport, sock)
            except (OSError, TimeoutError, ValueError) as error:
                self._fail(error)
            finally:
                self._transport = None
                if transport is not None:
                    transport.abort()
            if transport is None:
                self._failures.append((server, self.error or ConnectionError()))
                await asyncio.sleep(delay)
                delay = min(_LONGEST_DELAY_SECONDS, delay * 2)
            else:
                self.on_lost()

    def _fail(self, error: Exception) -> None:
        """Record why there is no connection and log it once, not at each attempt."""
        is_refused = isinstance(error, Refused)
        is_reported = self._is_reported and (isinstance(self.error, Refused) or not is_refused)
        # asyncio's timeouts have no message.
        self.error = error if str(error) else TimeoutError("it does not answer")
        about = event("engine_lost", node=self.server, error=str(self.error))
        if is_reported or self._next is not None:
            _logger.debug("no connection to a NATS server: %s", self.error)
        elif self.server:
            _logger.warning("lost the connection to NATS server %s: %s", self.server, self.error, extra=about)
        elif not is_refused:
            _logger.warning("waiting for a NATS server: %s", self.error, extra=about)
        self._is_reported = is_reported or self._next is None

    async def _open(self, server: Server) -> tuple[asyncio.Transport, _Socket, dict[str, Any]]:
        """Return a connection, encrypted if TLS is used, and the server's INFO."""
        transport, sock = await asyncio.get_running_loop().create_connection(_Socket, *server)
        try:
            info = _parse_info(await sock.line())
            _check_tls(info, self._tls)
            if self._tls is not None:
                transport = await _start_tls(transport, sock, self._tls, server[0])
        except BaseException:
            transport.abort()
            raise
        return transport, sock, info

    async def _connect(self, server: Server) -> tuple[asyncio.Transport, _Socket]:
        transport, sock, info = await self._open(server)
        try:
            options: dict[str, object] = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True}
            options |= {"protocol": 1, "lang": "python", "version": "2", "name": self._name}
            transport.write(b"CONNECT %b\r\nPING\r\n" % json.dumps(options | self._credentials.options()).encode())
            while (line := await sock.line()) != b"PONG":
                if line.startswith(b"-ERR"):
                    raise _to_error(line[4:].decode(errors="replace").strip(" '"))
        except BaseException:
            transport.abort()
            raise
        self.has_jetstream = bool(info.get("jetstream"))
        self.max_payload = int(info.get("max_payload", _MAX_PAYLOAD_BYTES))
        self.server = str(info.get("server_name") or server)
        return transport, sock

    async def _serve(self, transport: asyncio.Transport, sock: _Socket) -> None:
        """Pass messages to listeners until the connection breaks or the server stops responding. Raises OSError."""
        self._transport, self.error = transport, None
        sock.on_data = lambda: self._receive(sock)
        self.opened_at = self.heard_at = boot_time()
        for number, (subject, _) in self._listeners.items():
            transport.write(b"SUB %b %b\r\n" % (subject, number))
        self._is_reported = False
        _logger.info("connected to NATS server %s", self.server, extra=event("engine_connected", node=self.server))
        self.on_connected()
        self._receive(sock)
        while not sock.closed.done():
            await asyncio.wait([sock.closed], timeout=PING_SECONDS)
            transport.write(b"PING\r\n")
            if boot_time() - self.heard_at > SILENCE_SECONDS:
                raise TimeoutError("it does not answer")
        raise sock.closed.result() or ConnectionResetError("it closed the connection")

    def _receive(self, sock: _Socket) -> None:
        self.heard_at = boot_time()
        del sock.buffer[: self._parse(sock.buffer)]
        self.on_received()

    def _parse(self, buffer: bytearray) -> int:
        """Handle all complete messages; return their total size."""
        at = 0
        while (end := buffer.find(b"\r\n", at)) >= 0:
            line = bytes(buffer[at:end])
            if line[:4] == b"MSG " or line[:5] == b"HMSG ":
                words = line.split(b" ")
                has_headers = line[:1] == b"H"
                start, size = end + 2, int(words[-1])
                if len(buffer) < start + size + 2:
                    break
                at = start + size + 2
                if listener := self._listeners.get(words[2]):
                    body_at = start + (int(words[-2]) if has_headers else 0)
                    reply = words[3] if len(words) == (6 if has_headers else 5) else b""
                    headers, body = bytes(buffer[start:body_at]), bytes(buffer[body_at : start + size])
                    listener[1](Received(words[1], reply, headers, body))
                continue
            at = end + 2
            if line == b"PING":
                self.send(b"PONG\r\n")
            elif line.startswith(b"-ERR"):
                _logger.warning("NATS server %s: %s", self.server, line[5:].decode(errors="replace"))
        return at


async def _start_tls(
    transport: asyncio.Transport, sock: _Socket, context: ssl.SSLContext, host: str
) -> asyncio.Transport:
    """Return the encrypted transport. Raises OSError; Refused if the certificate is not trusted."""
    if sock.buffer:
        # A man in the middle could have injected it.
        raise ConnectionError("it sent more than its greeting before TLS")
    try:
        encrypted = await asyncio.get_running_loop().start_tls(transport, sock, context, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise Refused(f"its certificate is not trusted: {error.verify_message.rstrip('.')}") from error
    if encrypted is None:
        # asyncio returns None if the connection breaks during the handshake.
        raise ConnectionResetError("it closed the connection")
    return encrypted


def _check_tls(info: dict[str, Any], context: ssl.SSLContext | None) -> None:
    """Raise Refused if a server and this client can't agree on TLS."""
    if context is None:
        if info.get("tls_required"):
            raise Refused("it requires TLS: use tls:// instead of nats://")
    elif not (info.get("tls_required") or info.get("tls_available")):
        raise Refused("it has no TLS: use nats:// instead of tls://")
    elif info.get("tls_verify"):
        raise Refused("it requires client certificates, which dsmq does not support")


def _to_error(text: str) -> ConnectionError:
    """Return the exception for a server's error in reply to CONNECT."""
    about_credentials = text.lower().startswith(("authorization", "user authentication"))
    return Refused(f"{text} (user, password or token)") if about_credentials else ConnectionError(text)


def _parse_info(line: bytes) -> dict[str, Any]:
    if not line.startswith(b"INFO "):
        raise ValueError(f"not a NATS server (it answered {line[:50]!r})")
    info: dict[str, Any] = json.loads(line[5:])
    return info
