"""The side port: a status page, /metrics for Prometheus, /healthz and /readyz. HTTP, GET and HEAD alone."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPMethod, HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from socketserver import BaseServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from dsmq import __version__, listening
from dsmq.status import Status

# A scrape takes milliseconds; what hangs on longer is cut off.
REQUEST_TIMEOUT_SECONDS = 5.0
MAX_REQUESTS_AT_A_TIME = 8
# How often it looks whether it is to stop.
STOP_POLL_SECONDS = 0.1

_logger = logging.getLogger(__name__)


class SidePort:
    """Serves a registry and a health check on a listening socket, in threads of its own."""

    def __init__(
        self,
        sock: socket.socket,
        registry: CollectorRegistry,
        status: Status,
        token: str = "",
    ) -> None:
        """With a token, /metrics and /status.json want it as a bearer token (RFC 6750)."""
        self._server = _HTTPServer(sock, registry, status, token)
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
        if self.thread.is_alive():
            self._server.shutdown()
        close(self._server.socket)

    def abandon(self) -> None:
        """Close the copies of the sockets that a forked process has."""
        self._server.abandon()


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        sock: socket.socket,
        registry: CollectorRegistry,
        status: Status,
        token: str,
    ) -> None:
        # Not that of TCPServer, which would make a socket of its own.
        BaseServer.__init__(self, sock.getsockname()[:2], _Handler)
        self.socket = sock
        self.token = token.encode()
        self.registry = registry
        self.status = status
        # Requests that are being served, with the time at which each is cut off.
        self._deadlines: dict[socket.socket, float] = {}

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection. Raises OSError where that fails, which the caller passes over."""
        try:
            return super().get_request()
        except OSError:
            # As when there are no file descriptors left: it would be asked again at once, for ever.
            time.sleep(listening.ACCEPT_PAUSE_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._deadlines) >= MAX_REQUESTS_AT_A_TIME:
            # The oldest goes: most likely it hangs, where a scrape takes milliseconds.
            oldest = next(iter(self._deadlines))
            del self._deadlines[oldest]
            _cut_off(oldest)
        self._deadlines[request] = time.monotonic() + REQUEST_TIMEOUT_SECONDS
        try:
            super().process_request(request, client_address)
        except BaseException:
            # No thread could be started.
            self._deadlines.pop(request, None)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines.pop(request, None)

    def service_actions(self) -> None:
        """Cut off what takes too long, however it does that; called at each look whether it is to stop."""
        now = time.monotonic()
        for request, deadline in list(self._deadlines.items()):
            if now >= deadline:
                _cut_off(request)

    def abandon(self) -> None:
        for sock in (self.socket, *self._deadlines):
            sock.close()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        _logger.debug("side port: %s: %s", client_address, sys.exception())


def _cut_off(request: socket.socket) -> None:
    # The thread that serves it finds the stream at its end, and closes.
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _HTTPServer

    def version_string(self) -> str:
        return f"dsmq/{__version__}"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in _OPEN:
            _OPEN[path](self)
        elif path not in _GUARDED:
            paths = ", ".join((*_OPEN, *_GUARDED))
            self._refuse(HTTPStatus.NOT_FOUND, f"There are {paths}.")
        elif self._has_token():
            _GUARDED[path](self)
        else:
            self._refuse(HTTPStatus.UNAUTHORIZED, "A bearer token is wanted.", {"WWW-Authenticate": "Bearer"})

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuse a request that http.server does not take. It would say why in HTML, and repeat the request."""
        # Of a line that it can't read it takes the version for 0.9, and would send no headers.
        self.request_version = self.protocol_version
        if code == HTTPStatus.NOT_IMPLEMENTED and self.command in HTTPMethod.__members__:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "There are GET and HEAD.", {"Allow": "GET, HEAD"})
        else:
            self._refuse(HTTPStatus(code), f"{HTTPStatus(code).phrase}.")

    def metrics(self) -> None:
        """Reply the metrics, in the format that is asked for."""
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        self._reply(HTTPStatus.OK, content_type, encode(self.server.registry))

    def healthz(self) -> None:
        """Reply whether every thread does its work."""
        self._reply_whether(*self.server.status.health())

    def readyz(self) -> None:
        """Reply whether clients and puts are taken."""
        self._reply_whether(*self.server.status.readiness())

    def status(self) -> None:
        """Reply what the page shows."""
        body = json.dumps(self.server.status.page()).encode()
        self._reply(HTTPStatus.OK, "application/json", body, {"Cache-Control": "no-store"})

    def page(self) -> None:
        """Reply the page; what it shows comes by /status.json."""
        html, policy = _page()
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        self._reply(HTTPStatus.OK, "text/html; charset=utf-8", html, headers)

    def _has_token(self) -> bool:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        return not self.server.token or hmac.compare_digest(given, self.server.token)

    def _reply_whether(self, yes: bool, reasons: dict[str, object]) -> None:  # noqa: FBT001 - as it comes
        status = HTTPStatus.OK if yes else HTTPStatus.SERVICE_UNAVAILABLE
        self._reply(status, "application/json", json.dumps(reasons).encode() + b"\n")

    def _refuse(self, status: HTTPStatus, why: str, headers: Mapping[str, str] | None = None) -> None:
        self._reply(status, "text/plain; charset=utf-8", f"{why}\n".encode(), headers)

    def _reply(
        self, status: HTTPStatus, content_type: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def address_string(self) -> str:
        """Return who asks; those on a Unix socket have no address."""
        return super().address_string() if self.client_address else "unix"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:  # noqa: ARG002
        """Log a request, without its query: somebody may have put a secret there."""
        path = getattr(self, "path", "").partition("?")[0]
        _logger.debug("side port: %s: %s %r: %s", self.address_string(), self.command, path, code)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        _logger.debug("side port: %s: %r", self.address_string(), format % args)


_OPEN = {"/": _Handler.page, "/healthz": _Handler.healthz, "/readyz": _Handler.readyz}
_GUARDED = {"/metrics": _Handler.metrics, "/status.json": _Handler.status}


@functools.cache
def _page() -> tuple[bytes, str]:
    """Return the page, and the Content-Security-Policy that lets its own script and style run, and nothing else."""
    html = resources.files("dsmq").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (
        base64.b64encode(
            hashlib.sha256(html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()).digest()
        ).decode()
        for tag in ("script", "style")
    )
    return html.encode(), (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
