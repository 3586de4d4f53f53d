"""The HTTP endpoint: a status page, /metrics for Prometheus, /healthz and /readyz."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPMethod, HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib import resources
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from prometheus_client.exposition import choose_encoder

from dsmq import __version__, logs
from dsmq.broker import listener as listening
from dsmq.ops import metrics
from dsmq.ops.status import Status

# How long a client may take to send its request and to read the reply. A scrape takes milliseconds.
REQUEST_TIMEOUT_SECONDS = 5.0
MAX_CONCURRENT_REQUESTS = 8
# While MAX_CONCURRENT_REQUESTS are open, a client that takes longer to send its request is cut off for the next one.
GRACE_SECONDS = 0.5
# How long a client may take to disconnect after its reply and how many bytes it may send meanwhile.
LINGER_SECONDS = 0.5
LINGER_BYTES = 1_048_576
POLL_SECONDS = 0.1
_NO_STORE = ("Cache-Control", "no-store")
# A request target in absolute form: its host, then its path.
_ABSOLUTE = re.compile("https?://([^/?]*)(.*)", re.IGNORECASE)

_logger = logging.getLogger(__name__)


class HTTPEndpoint:
    """Serves the status page, the metrics and the health checks on a listening socket, each request in a thread."""

    def __init__(self, sock: socket.socket, status: Status, close: Callable[[socket.socket], None]) -> None:
        """`close` is called to close the listening socket."""
        sock.settimeout(POLL_SECONDS)
        self.socket = sock
        self.status = status
        self.registry = metrics.registry(status)
        self.is_exposed = listening.is_exposed(sock)
        self.thread = threading.Thread(target=self._run, name="dsmq-http", daemon=True)
        self.waiting_since: dict[socket.socket, float] = {}
        """The open connections, oldest first, each with the time at which the wait for its client began: for
        a request or for a disconnect. Infinity while a request is being answered. Connections that were cut off are
        removed.
        """
        self._close = close
        self._stop = threading.Event()
        self._one_closed = threading.Event()

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Close the listening socket, which ends the thread."""
        self._stop.set()
        self._close(self.socket)

    def close_inherited(self) -> None:
        """Close a forked process's copies of the sockets."""
        for sock in (self.socket, *self.waiting_since):
            sock.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                sock, address = self.socket.accept()
            except TimeoutError:
                pass  # No connection for a while: just cut off late clients and check whether to stop.
            except OSError:
                # `stop` has closed the socket, or no file descriptors are left, so an immediate retry would fail, too.
                self._stop.wait(listening.ACCEPT_PAUSE_SECONDS)
            else:
                self._make_room()
                self._serve_in_thread(sock, address)
            self._cut_off_after(REQUEST_TIMEOUT_SECONDS)
        self._cut_off_after(0.0)

    def _make_room(self) -> None:
        """While there are too many connections, wait for one to close, or cut off the oldest after its grace period."""
        while True:
            self._one_closed.clear()
            if len(self.waiting_since) < MAX_CONCURRENT_REQUESTS or self._stop.is_set():
                return
            if late := self._waiting_longer_than(GRACE_SECONDS):
                self._cut_off(late[0])
            else:
                self._one_closed.wait(POLL_SECONDS)
                self._cut_off_after(REQUEST_TIMEOUT_SECONDS)

    def _cut_off_after(self, seconds: float) -> None:
        for sock in self._waiting_longer_than(seconds):
            self._cut_off(sock)

    def _cut_off(self, sock: socket.socket) -> None:
        """Stop waiting for a client. The thread that serves it reads the end of the file and replies."""
        self.waiting_since.pop(sock, None)
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RD)

    def _waiting_longer_than(self, seconds: float) -> list[socket.socket]:
        latest = time.monotonic() - seconds
        # Copy the dict first, because other threads change it.
        return [sock for sock, since in list(self.waiting_since.items()) if since <= latest]

    def _serve_in_thread(self, sock: socket.socket, address: object) -> None:
        self.waiting_since[sock] = time.monotonic()
        try:
            threading.Thread(target=self._serve, args=(sock, address), daemon=True).start()
        except RuntimeError as error:
            _logger.warning("HTTP request refused: %s", error, extra=logs.event("refused", reason="threads"))
            with suppress(OSError):
                sock.send(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            self._hang_up(sock)

    def _serve(self, sock: socket.socket, address: object) -> None:
        try:
            _Handler(sock, address, self)  # type: ignore[arg-type]
        except OSError as error:
            _logger.debug("HTTP: %s: %s", address, error)
        except Exception:  # noqa: BLE001
            self.count_failure()
        finally:
            self._hang_up(sock)

    def _hang_up(self, sock: socket.socket) -> None:
        """Close a connection once the client has had a moment to read the reply and disconnect.

        Closing while the client is still sending would reset the connection, and the reply could be lost.
        """
        self.waiting_since[sock] = time.monotonic()
        with suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(LINGER_SECONDS)
            left = LINGER_BYTES
            while left > 0 and (data := sock.recv(65_536)):
                left -= len(data)
        sock.close()
        self.waiting_since.pop(sock, None)
        self._one_closed.set()

    def count_failure(self) -> None:
        """Log and count the exception being handled, which indicates a bug."""
        _logger.exception("HTTP request failed", extra=logs.event("defect"))
        self.status.own_counters.failures += 1


class _Reply(NamedTuple):
    status: HTTPStatus
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def _text(status: HTTPStatus, text: str, *headers: tuple[str, str]) -> _Reply:
    return _Reply(status, "text/plain; charset=utf-8", f"{text}\n".encode(), headers)


def _json(status: HTTPStatus, value: object, *headers: tuple[str, str]) -> _Reply:
    return _Reply(status, "application/json", json.dumps(value).encode() + b"\n", headers)


class _Handler(BaseHTTPRequestHandler):
    server: HTTPEndpoint  # type: ignore[assignment]
    raw_requestline: bytes

    def version_string(self) -> str:
        return f"dsmq/{__version__}"

    def parse_request(self) -> bool:
        """Also refuse HTTP/0.9, to which http.server would reply without a status line."""
        if len(str(self.raw_requestline, "iso-8859-1").split()) < 3:
            self.command = self.requestline = ""
            self.send_error(HTTPStatus.BAD_REQUEST)
            return False
        if not super().parse_request():
            return False
        if absolute := _ABSOLUTE.fullmatch(self.path):
            # Its host takes precedence over the header (RFC 9112, section 3.2.2).
            del self.headers["Host"]
            self.headers["Host"], self.path = absolute[1], "/" + absolute[2].removeprefix("/")
        return True

    def do_GET(self) -> None:
        if self.connection in self.server.waiting_since:
            self.server.waiting_since[self.connection] = math.inf
        try:
            reply = self._route()
        except Exception:  # noqa: BLE001 - the client gets a status in any case
            self.server.count_failure()
            reply = _text(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error; see the server's log.")
        self._send(reply)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _route(self) -> _Reply:
        path = self.path.partition("?")[0]
        if path in PUBLIC_ROUTES:
            return PUBLIC_ROUTES[path](self)
        if (refusal := self._check_host()) is not None:
            return refusal
        if path == "/":
            return _page()
        if path not in PROTECTED_ROUTES:
            return _text(HTTPStatus.NOT_FOUND, f"Not found. Try {', '.join(('/', *PUBLIC_ROUTES, *PROTECTED_ROUTES))}.")
        if not self.server.status.context.access.http_authenticator.is_authorized(
            self.headers.get("Authorization", "")
        ):
            return _text(HTTPStatus.UNAUTHORIZED, "Bearer token required.", ("WWW-Authenticate", "Bearer"))
        return PROTECTED_ROUTES[path](self)

    def _check_host(self) -> _Reply | None:
        """Return a refusal if the request is not addressed to this server (RFC 9110, section 7.4)."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1 or (not hosts and self.request_version != "HTTP/1.0"):
            return _text(HTTPStatus.BAD_REQUEST, "Exactly one Host header is required.")
        if hosts and not self.server.status.context.access.http_authenticator.accepts_host(hosts[0]):
            return _text(HTTPStatus.MISDIRECTED_REQUEST, "Unknown host name: add it to http_allowed_hosts.")
        return None

    def metrics(self) -> _Reply:
        try:
            encode, content_type = choose_encoder(" ".join(self.headers.get("Accept", "").split()))
        except (TypeError, ValueError):
            # prometheus_client fails if a version in the header is not a number.
            encode, content_type = choose_encoder("")
        return _Reply(HTTPStatus.OK, content_type, encode(self.server.registry))

    def healthz(self) -> _Reply:
        if stuck := self.server.status.stuck_threads():
            return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "failing", "stuck_threads": stuck})
        return _json(HTTPStatus.OK, {"status": "ok", "stuck_threads": []})

    def readyz(self) -> _Reply:
        if reasons := self.server.status.not_ready_reasons():
            return _json(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "not ready", "reasons": reasons})
        return _json(HTTPStatus.OK, {"status": "ready", "reasons": []})

    def status(self) -> _Reply:
        return _json(HTTPStatus.OK, self.server.status.page(), _NO_STORE)

    def topics(self) -> _Reply:
        query = self._query()
        found = self.server.status.inspector.find_topics(query.get("filter", b""), query.get("after", b""))
        return _json(HTTPStatus.OK, found, _NO_STORE)

    def topic(self) -> _Reply:
        name = self._query().get("name")
        if not name:
            return _text(HTTPStatus.BAD_REQUEST, "name is missing.")
        status = self.server.status
        # Without a TCP port, the permissions of a Unix socket may restrict who can read messages.
        is_open = not self.server.is_exposed and status.port > 0
        with_messages = status.context.access.may_show_messages(is_open=is_open)
        return _json(HTTPStatus.OK, status.inspector.topic(name, with_messages=with_messages), _NO_STORE)

    def _query(self) -> dict[str, bytes]:
        """Return the query's parameters; if one is repeated, its last value."""
        text = self.path.partition("?")[2]
        found = parse_qsl(text, keep_blank_values=True, errors="surrogateescape", separator="&")
        return {name: value.encode(errors="surrogateescape") for name, value in found}

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuse a malformed or unsupported request, in plain text; http.server's HTML would repeat the request."""
        if code == HTTPStatus.NOT_IMPLEMENTED and self.command in HTTPMethod.__members__:
            self._send(_text(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD are allowed.", ("Allow", "GET, HEAD")))
        else:
            self._send(_text(HTTPStatus(code), f"{HTTPStatus(code).phrase}."))

    def _send(self, reply: _Reply) -> None:
        if self.connection not in self.server.waiting_since:
            reply = _text(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive.")
        self.connection.settimeout(REQUEST_TIMEOUT_SECONDS)
        # If the request's version could not be parsed, http.server would omit the status line.
        self.request_version = self.protocol_version
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in reply.headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def address_string(self) -> str:
        # Clients on a Unix socket have no address.
        return super().address_string() if self.client_address else "unix"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:  # noqa: ARG002
        """Log a request without its query, which may contain a secret."""
        path = getattr(self, "path", "").partition("?")[0]
        _logger.debug("HTTP: %s: %s %r: %s", self.address_string(), self.command, path, code)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        _logger.debug("HTTP: %s: %r", self.address_string(), format % args)


# Allowed with any Host header, because health checks use arbitrary names.
PUBLIC_ROUTES = {"/healthz": _Handler.healthz, "/readyz": _Handler.readyz}
# Require the token, if one is configured.
PROTECTED_ROUTES = {
    "/metrics": _Handler.metrics,
    "/status.json": _Handler.status,
    "/topics.json": _Handler.topics,
    "/topic.json": _Handler.topic,
}


@functools.cache
def _page() -> _Reply:
    """Return the status page, with a Content-Security-Policy that allows only its own script and style."""
    html = resources.files("dsmq.ops").joinpath("page.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        content = html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = (("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"))
    return _Reply(HTTPStatus.OK, "text/html; charset=utf-8", html.encode(), headers)
