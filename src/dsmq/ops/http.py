"""The side port: a status page, /metrics for Prometheus, /healthz and /readyz. HTTP, GET and HEAD alone."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPMethod, HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from socketserver import BaseServer
from types import MappingProxyType
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from dsmq import __version__, logs
from dsmq.broker import listener as listening
from dsmq.broker.auth import HTTPGate
from dsmq.ops.status import Status

# A scrape takes milliseconds; what hangs on longer is cut off.
REQUEST_TIMEOUT_SECONDS = 5.0
MAX_REQUESTS_AT_A_TIME = 8
# With so many, one that has not come in this time is cut off for the next.
PATIENCE_SECONDS = 0.5
# How long a client may take to hang up after its reply, and what it may send meanwhile.
LINGER_SECONDS = 0.5
LINGER_BYTES = 1_048_576
# How often it looks whether it is to stop.
STOP_POLL_SECONDS = 0.1

_logger = logging.getLogger(__name__)


class SidePort:
    """Serves a registry and a health check on a listening socket, in threads of its own."""

    def __init__(
        self, sock: socket.socket, registry: CollectorRegistry, status: Status, gate: Callable[[], HTTPGate]
    ) -> None:
        """`gate` returns who may use it at the moment: for /metrics and /status.json, its bearer token (RFC 6750)."""
        self._server = _HTTPServer(sock, registry, status, gate)
        self.thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_SECONDS,), name="dsmq-metrics", daemon=True
        )

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return int(self._server.socket.getsockname()[1])

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{listening.address(self._server.socket)}/"

    def start(self) -> None:
        """Begin to serve."""
        self.thread.start()

    def stop(self, close: Callable[[socket.socket], None] = listening.close) -> None:
        """Stop serving, and close the socket."""
        self._server.stopping = True
        if self.thread.is_alive():
            self._server.shutdown()
        close(self._server.socket)

    def abandon(self) -> None:
        """Close the copies of the sockets that a forked process has."""
        self._server.abandon()


@dataclass(slots=True)
class _Request:
    """A connection, from when it is accepted."""

    socket: socket.socket
    since: float
    busy: bool = False
    """Whether the request has come and its reply has not been sent."""


class _Reply(NamedTuple):
    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, sock: socket.socket, registry: CollectorRegistry, status: Status, gate: Callable[[], HTTPGate]
    ) -> None:
        # Not that of TCPServer, which would make a socket of its own.
        BaseServer.__init__(self, sock.getsockname()[:2], _Handler)
        self.socket = sock
        self.gate = gate
        self.registry = registry
        self.status = status
        self.stopping = False
        # Changed by several threads, so it is copied before it is iterated. The oldest come first.
        self.requests: dict[socket.socket, _Request] = {}
        self._ended = threading.Event()

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection. Raises OSError where that fails, which the caller passes over."""
        try:
            return super().get_request()
        except OSError:
            # As when there are no file descriptors left: it would be asked again at once, for ever.
            time.sleep(listening.ACCEPT_PAUSE_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        self._make_room()
        self.requests[request] = _Request(request, time.monotonic())
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:
            _logger.warning("an HTTP request is refused: %s", error, extra=logs.event("refused", reason="threads"))
            with contextlib.suppress(OSError):
                request.send(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            self.requests.pop(request, None)

    def _make_room(self) -> None:
        """Wait until a request ends, or cut off the oldest that has had time enough to come and has not."""
        while True:
            self._ended.clear()
            requests = list(self.requests.values())
            if len(requests) < MAX_REQUESTS_AT_A_TIME or self.stopping:
                return
            due = time.monotonic() - PATIENCE_SECONDS
            if hanging := [request for request in requests if not request.busy and request.since <= due]:
                self.requests.pop(hanging[0].socket, None)
                _cut_off(hanging[0].socket)
            else:
                self._ended.wait(STOP_POLL_SECONDS)
                self.service_actions()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.requests.pop(request, None)
            self._ended.set()

    def service_actions(self) -> None:
        """Cut off what takes too long, however it does that; called at each look whether it is to stop."""
        due = time.monotonic() - REQUEST_TIMEOUT_SECONDS
        for request in list(self.requests.values()):
            if request.since <= due:
                _cut_off(request.socket)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, but give the client a moment to read the reply and hang up.

        To close while it still sends would reset the connection, and the reply might be lost.
        """
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(LINGER_SECONDS)
            left = LINGER_BYTES
            while left > 0 and (data := request.recv(65_536)):
                left -= len(data)
        self.close_request(request)

    def abandon(self) -> None:
        for sock in (self.socket, *(request.socket for request in self.requests.values())):
            sock.close()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        error = sys.exception()
        if isinstance(error, OSError):
            _logger.debug("side port: %s: %s", client_address, error)
        else:
            self.count_failure()

    def count_failure(self) -> None:
        """Log and count the exception that is being handled: a defect."""
        _logger.exception("an HTTP request failed", extra=logs.event("defect"))
        self.status.refused.failures += 1


def _cut_off(request: socket.socket) -> None:
    # The thread that serves it finds the stream at its end, and closes.
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _HTTPServer
    raw_requestline: bytes

    def version_string(self) -> str:
        return f"dsmq/{__version__}"

    def parse_request(self) -> bool:
        """Parse the request line and the headers, or reply why not: HTTP/0.9, too, which has no status line."""
        if len(str(self.raw_requestline, "iso-8859-1").split()) < 3:
            self.command = self.requestline = ""
            self.send_error(HTTPStatus.BAD_REQUEST)
            return False
        return super().parse_request()

    def do_GET(self) -> None:
        # None if it has been cut off meanwhile.
        request = self.server.requests.get(self.connection) or _Request(self.connection, 0.0)
        request.busy = True
        try:
            reply = self._answer()
        except Exception:  # noqa: BLE001 - whatever it is, the client gets a status
            self.server.count_failure()
            reply = _text(HTTPStatus.INTERNAL_SERVER_ERROR, "Failed; see the server's log.")
        self._send(reply)
        request.busy = False

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _answer(self) -> _Reply:
        path = self.path.partition("?")[0]
        if path in _OPEN:
            return _OPEN[path](self)
        if (refusal := self._check_host()) is not None:
            return refusal
        if path == "/":
            return _page()
        if path not in _GUARDED:
            return _text(HTTPStatus.NOT_FOUND, f"There are {', '.join(('/', *_OPEN, *_GUARDED))}.")
        if not self.server.gate().admits(self.headers.get("Authorization", "")):
            return _text(HTTPStatus.UNAUTHORIZED, "A bearer token is wanted.", {"WWW-Authenticate": "Bearer"})
        return _GUARDED[path](self)

    def _check_host(self) -> _Reply | None:
        """Return what to reply to a request that is not addressed to this server (RFC 9110, 7.4)."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1 or (not hosts and self.request_version != "HTTP/1.0"):
            return _text(HTTPStatus.BAD_REQUEST, "One Host header is required.")
        if hosts and not self.server.gate().answers_to(hosts[0]):
            return _text(HTTPStatus.MISDIRECTED_REQUEST, "Unknown host name: add it to http_allowed_hosts.")
        return None

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuse a request that http.server does not take. It would say why in HTML, and repeat the request."""
        if code == HTTPStatus.NOT_IMPLEMENTED and self.command in HTTPMethod.__members__:
            self._send(_text(HTTPStatus.METHOD_NOT_ALLOWED, "There are GET and HEAD.", {"Allow": "GET, HEAD"}))
        else:
            self._send(_text(HTTPStatus(code), f"{HTTPStatus(code).phrase}."))

    def metrics(self) -> _Reply:
        """Return the metrics, in the format that is asked for."""
        try:
            encode, content_type = choose_encoder(" ".join(self.headers.get("Accept", "").split()))
        except (TypeError, ValueError):
            # prometheus_client compares the version as numbers, whatever it is.
            encode, content_type = choose_encoder("")
        return _Reply(HTTPStatus.OK, content_type, encode(self.server.registry))

    def healthz(self) -> _Reply:
        """Return whether every thread does its work."""
        return _whether(*self.server.status.health())

    def readyz(self) -> _Reply:
        """Return whether clients and puts are taken."""
        return _whether(*self.server.status.readiness())

    def status(self) -> _Reply:
        """Return what the page shows."""
        body = json.dumps(self.server.status.page()).encode()
        return _Reply(HTTPStatus.OK, "application/json", body, {"Cache-Control": "no-store"})

    def _send(self, reply: _Reply) -> None:
        # A status line for every version: http.server would send none to HTTP/0.9.
        self.request_version = self.protocol_version
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def address_string(self) -> str:
        """Return who asks; those on a Unix socket have no address."""
        return super().address_string() if self.client_address else "unix"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:  # noqa: ARG002
        """Log a request, without its query: somebody may have put a secret there."""
        path = getattr(self, "path", "").partition("?")[0]
        _logger.debug("side port: %s: %s %r: %s", self.address_string(), self.command, path, code)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        _logger.debug("side port: %s: %r", self.address_string(), format % args)


# Health checks address it by whatever name they know.
_OPEN = {"/healthz": _Handler.healthz, "/readyz": _Handler.readyz}
_GUARDED = {"/metrics": _Handler.metrics, "/status.json": _Handler.status}


def _text(status: HTTPStatus, text: str, headers: Mapping[str, str] = MappingProxyType({})) -> _Reply:
    return _Reply(status, "text/plain; charset=utf-8", f"{text}\n".encode(), headers)


def _whether(yes: bool, reasons: dict[str, object]) -> _Reply:  # noqa: FBT001 - as it comes
    status = HTTPStatus.OK if yes else HTTPStatus.SERVICE_UNAVAILABLE
    return _Reply(status, "application/json", json.dumps(reasons).encode() + b"\n")


@functools.cache
def _page() -> _Reply:
    """Return the page, with a Content-Security-Policy that lets its own script and style run, and nothing else.

    What it shows comes by /status.json.
    """
    html = resources.files("dsmq.ops").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (
        base64.b64encode(
            hashlib.sha256(html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()).digest()
        ).decode()
        for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return _Reply(HTTPStatus.OK, "text/html; charset=utf-8", html.encode(), headers)
