"""The side port: /metrics for Prometheus and /healthz for whoever watches over the server. HTTP, GET and HEAD alone."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from dsmq import __version__

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
        health: Callable[[], tuple[bool, dict[str, object]]],
        token: str = "",
    ) -> None:
        """With a token, all but /healthz wants it as a bearer token (RFC 6750)."""
        self._server = _HTTPServer(sock, registry, health, token)
        self.thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_SECONDS,), name="dsmq-metrics", daemon=True
        )

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return int(self._server.socket.getsockname()[1])

    def start(self) -> None:
        """Begin to serve."""
        self.thread.start()

    def stop(self) -> None:
        """Stop serving, and close the socket."""
        if self.thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        sock: socket.socket,
        registry: CollectorRegistry,
        health: Callable[[], tuple[bool, dict[str, object]]],
        token: str,
    ) -> None:
        # Not that of TCPServer, which would make a socket of its own.
        BaseServer.__init__(self, sock.getsockname()[:2], _Handler)
        self.socket = sock
        self.token = token.encode()
        self.registry = registry
        self.health = health
        # Requests that are being served, with the time at which each is cut off.
        self._deadlines: dict[socket.socket, float] = {}

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

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        _logger.debug("side port: %s: %s", client_address, sys.exception())


def _cut_off(request: socket.socket) -> None:
    # The thread that serves it finds the stream at its end, and closes.
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _HTTPServer
    server_version = f"dsmq/{__version__}"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path != "/healthz" and not self._has_token():
            self._reply(HTTPStatus.UNAUTHORIZED, "text/plain; charset=utf-8", b"A bearer token is wanted.\n")
        elif path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._reply(HTTPStatus.OK, content_type, encode(self.server.registry))
        elif path == "/healthz":
            healthy, reasons = self.server.health()
            status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
            self._reply(status, "application/json", json.dumps(reasons).encode() + b"\n")
        else:
            self._reply(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"There are /metrics and /healthz.\n")

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _has_token(self) -> bool:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        return not self.server.token or hmac.compare_digest(given, self.server.token)

    def _reply(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        _logger.debug("side port: %s: %s", self.address_string(), format % args)
