"""Assigns accepted connections to event loops or refuses them."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from dsmq import logs
from dsmq.broker import auth
from dsmq.broker.login import Peer
from dsmq.broker.transport import LINGER_SECONDS, Stream
from dsmq.errors import Busy, ReplyError
from dsmq.wire.resp import encode_error

if TYPE_CHECKING:
    from ssl import SSLContext

    from dsmq.broker.context import ServerContext
    from dsmq.broker.counters import Counters
    from dsmq.broker.event_loop import EventLoop

# Max refused connections kept open for LINGER_SECONDS.
MAX_REFUSED = 16

_logger = logging.getLogger(__name__)


class Admission:
    """Assigns accepted connections to the event loops, within the limits."""

    def __init__(self, context: ServerContext, workers: Sequence[EventLoop], counters: Counters) -> None:
        self._context = context
        self._workers = workers
        # Counts refused connections.
        self._counters = counters
        self._numbers = itertools.count(1)
        self._refused: deque[tuple[float, socket.socket]] = deque()

    def assign(self, sock: socket.socket, host: str, name: str) -> None:
        """Give a connection to the event loop with the fewest connections, or refuse it."""
        client_key, access = auth.client_key(host), self._context.access
        if refusal := self._refusal(client_key):
            self._refuse(sock, name, *refusal, speaks_tls=access.tls is not None)
            return
        try:
            stream = _stream(sock, access.tls)
        except OSError as error:
            _logger.debug("%s disconnected before it was accepted: %s", name, error)
            sock.close()
            return
        self._context.usage.connections.add(client_key, 1)
        worker = min(self._workers, key=lambda worker: len(worker.connections))
        peer = Peer(next(self._numbers), client_key, name, access.connection_rules)
        if worker.thread is threading.current_thread():
            worker.add_connection(stream, peer)
        else:
            worker.post(partial(worker.add_connection, stream, peer))

    def _refusal(self, client_key: str) -> tuple[str, ReplyError] | None:
        """Return why a connection is refused, as a metrics label and an error reply, or None if it is accepted."""
        per_address, connections = self._context.settings.max_connections_per_address, self._context.usage.connections
        if connections.total >= connections.limit:
            return "connections", Busy(f"too many connections (max_connections = {connections.limit})")
        if connections.of(client_key) >= per_address:
            return "address", Busy(f"too many connections from this address (limit: {per_address})")
        return None

    def _refuse(self, sock: socket.socket, name: str, reason: str, error: ReplyError, *, speaks_tls: bool) -> None:
        self._counters.refused[reason] += 1
        self._counters.errors[error.code] += 1
        about = logs.event("refused", client=name, reason=reason, code=error.code)
        _logger.warning("%s refused: %s", name, error, extra=about)
        try:
            if not speaks_tls:
                sock.send(encode_error(error))
            sock.shutdown(socket.SHUT_WR)
        except OSError as gone:
            _logger.debug("%s disconnected before it was refused: %s", name, gone)
        # Closing now would reset the connection while the client is sending its handshake, and the reply would be lost.
        self._refused.append((time.monotonic() + LINGER_SECONDS, sock))
        self.close_refused()

    def close_refused(self, keep: int = MAX_REFUSED) -> None:
        """Close refused connections after LINGER_SECONDS; beyond `keep`, close the oldest. Thread-safe."""
        now = time.monotonic()
        with suppress(IndexError):
            while len(self._refused) > keep or self._refused[0][0] <= now:
                self._refused.popleft()[1].close()


def _stream(sock: socket.socket, context: SSLContext | None) -> Stream:
    if context is None:
        return sock
    from dsmq.wire import tls  # noqa: PLC0415 - not needed without TLS

    return tls.accept(context, sock)
