"""One client connection, from its first byte to its last."""

from __future__ import annotations

import logging
import math
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from selectors import EVENT_READ
from typing import TYPE_CHECKING

from dsmq import logs
from dsmq.broker.auth import Role
from dsmq.broker.deadlines import deadlines
from dsmq.broker.login import Login, Peer
from dsmq.broker.reads import Reads
from dsmq.broker.requests import Requests
from dsmq.broker.states import CLOSED, FINISHING, HANDSHAKE, LINGERING, NO_ROOM, OPEN, WAITING
from dsmq.broker.transport import LINGER_SECONDS_AT_STOP, Stream, Transport
from dsmq.broker.usage import RECEIVE_BYTES, Budget
from dsmq.errors import AuthRequired, Full, InternalError, ReplyError, ShuttingDown
from dsmq.wire.limits import MAX_ARGUMENTS, MAX_NAMES, REQUEST_OVERHEAD_BYTES
from dsmq.wire.resp import encode_error

if TYPE_CHECKING:
    from dsmq.broker.event_loop import EventLoop
    from dsmq.store.selection import Selection

_DEFECT = InternalError("see the server's log")
_NO_MEMORY = Full("the server is full: out of memory")

_logger = logging.getLogger(__name__)


class Connection:
    """A client's connection and its state. Used only by the thread of its event loop."""

    # With so many attributes, slots are faster than a dict.
    __slots__ = (
        *("awaits_start", "context", "counters", "id", "last_put", "last_read", "last_selection", "login", "loop"),
        *("name", "notices", "opened_at", "peer", "pending_puts", "reads", "requests", "scheduled", "start_id"),
        *("state", "transport", "version"),
    )

    def __init__(self, loop: EventLoop, sock: Stream, peer: Peer) -> None:
        self.loop = loop
        self.context = context = loop.context
        self.counters = loop.counters
        self.peer = peer
        self.id = peer.number
        self.state = HANDSHAKE if peer.encrypted else OPEN
        self.login = Login(self, Role.NOBODY if context.access.authenticator.tokens else Role.ADMIN)
        self.transport = Transport(self, sock)
        self.requests = Requests(self)
        self.reads = Reads(self)
        self.pending_puts = 0
        self.scheduled = math.inf
        self.name = b""
        self.version = 2
        self.notices = False
        self.last_read: tuple[bytes, int] | None = None
        self.last_selection: tuple[Selection, int] | None = None
        """The selection that the client last read, if that takes little memory, and the position in it."""
        self.last_put = b""
        """The topic of the last put."""
        self.start_id: int | None = None
        """The last id when the client connected; GET starts after it. None until the store replies."""
        self.awaits_start = False
        self.opened_at = 0.0

    def __repr__(self) -> str:
        called = f" {self.name.decode()!r}" if self.name else ""
        return f"client {self.id}{called} ({self.peer.name})"

    def event(self, name: str, **fields: object) -> dict[str, object]:
        if self.name:
            fields["client_name"] = self.name.decode()
        return logs.event(name, client=self.id, peer=self.peer.name, **fields)

    @property
    def closed(self) -> bool:
        return self.state is CLOSED

    @property
    def role(self) -> Role:
        return self.login.role

    @property
    def unauthenticated(self) -> bool:
        """Whether the client still has to send a token or finish the TLS handshake."""
        return self.login.role is Role.NOBODY or self.state is HANDSHAKE

    @property
    def waiting(self) -> bool:
        return self.reads.pending is not None and self.reads.pending.registered

    # Settings

    def open(self) -> None:
        """Start reading requests."""
        self.opened_at = self.transport.active_at = self.loop.now
        self.loop.watch(self, EVENT_READ)
        start_id = self.context.store.start_id()
        if isinstance(start_id, Future):
            self.loop.when_done(start_id, self._start_after)
        else:
            self.start_id = start_id
        self.apply_settings()

    def apply_settings(self) -> None:
        """Apply the current settings and access rules, at first and after a reload."""
        if self.state < FINISHING:
            self.set_bounds()
            self.login.apply_settings()
            self._reschedule()

    def set_bounds(self) -> None:
        """Set the limits on buffered bytes, which are lower before authentication."""
        settings, parser = self.context.settings, self.requests.parser
        most = settings.max_unauthenticated_bytes if self.role is Role.NOBODY else 0
        self.requests.max_receive = most or RECEIVE_BYTES
        self.transport.max_unread = most or settings.max_unread_reply_bytes
        parser.max_message_bytes = most or settings.max_message_bytes
        parser.max_request_bytes = most or settings.max_message_bytes + REQUEST_OVERHEAD_BYTES
        parser.max_arguments = MAX_ARGUMENTS + (0 if self.role is Role.NOBODY else MAX_NAMES)
        self.requests.permit()

    # Replies

    def commit_puts(self) -> bool:
        """Commit pending puts, so that replies go out in order; return False if the store replies later."""
        if self.pending_puts:
            self.loop.batch.commit()
        return not self.pending_puts

    def fail(self, error: ReplyError) -> None:
        self._note(error)
        self.transport.send(encode_error(error))

    def _note(self, error: ReplyError) -> None:
        self.counters.errors[error.code] += 1
        self.counters.recent.append((time.time(), error.code, repr(self), str(error)))

    # The start

    def await_start(self, request: list[bytes]) -> None:
        """Run this request again when `start_id` is known."""
        self.requests.run_again(request)
        self.awaits_start = True
        self.requests.park()

    def _start_after(self, start_id: int | ReplyError) -> None:
        if isinstance(start_id, ReplyError):
            # Send no error reply, so that the client tries another server.
            self.close(str(start_id))
        elif not self.closed:
            self.start_id = start_id
            if self.awaits_start:
                self.awaits_start = False
                self.requests.resume()

    # Memory

    def wait_for_room(self) -> None:
        self.state = NO_ROOM
        self.loop.memory.add(self)

    def on_room(self, budget: Budget) -> None:
        """Continue with the reply or request that had to wait for memory."""
        if self.state is not NO_ROOM:
            return
        self.transport.active_at = self.loop.now
        if self.reads.pending is not None:
            self.state = WAITING
            self.schedule(self.reads.pending.deadline)
            self.reads.wake()
        else:
            self.state = OPEN
            if budget is self.requests.budget:
                # The request's time limit starts only now.
                self.requests.incomplete_since = math.inf
            self.requests.run()

    # Deadlines

    def schedule(self, when: float) -> None:
        """Check the deadlines at this time or earlier."""
        if when < self.scheduled:
            self.loop.schedule(self, when)

    def on_timer(self, now: float) -> None:
        """Run the first action that is due."""
        for when, action in deadlines(self):
            if when <= now:
                action()
                break
        self._reschedule()

    def _reschedule(self) -> None:
        if not self.closed:
            self.schedule(min(when for when, _ in deadlines(self)))

    # The end

    def on_eof(self) -> None:
        """Reply to the requests that the client sent before it shut down its sending side, and close."""
        if self.state is LINGERING:
            self.close("end of input")
            return
        pending = self.reads.pending
        if pending is not None and pending.wait_ms and self.state is WAITING:
            self.reads.end()
            self.finish()
        self.requests.run()

    def finish(self) -> None:
        """Run no more requests and close when everything has been sent."""
        if self.state is NO_ROOM:
            self.loop.memory.remove(self)
        self.state = max(self.state, FINISHING)
        if not self.transport.data:
            self.loop.to_flush.append(self.transport)

    def drain(self) -> None:
        """Reply to a waiting read and pending puts, and finish, because the server is stopping.

        A client that requested notices gets one after its last reply: puts without a reply by then are not stored.
        """
        self.transport.linger_seconds = LINGER_SECONDS_AT_STOP
        self._stop(ShuttingDown("the server is stopping"))

    def disconnect(self, reason: str) -> None:
        """Finish, because the rules under which the client was admitted have changed."""
        self.login.role = Role.NOBODY
        error = AuthRequired(reason)
        self.log_rejected(error)
        self._stop(error)

    def _stop(self, error: ReplyError) -> None:
        if self.state is HANDSHAKE:
            self.close(str(error))
        elif not self.commit_puts():
            self.finish()
        elif self.state < FINISHING:
            self.reads.stop_waiting(at_once=True)
            self.end(error)

    def on_failed_handshake(self, error: OSError) -> None:
        """Close, but let the client receive the TLS alert, although it may already have sent its first request."""
        _logger.debug("%r: %s", self, error.strerror or error)
        self.login.role = Role.NOBODY
        self.finish()

    def reject(self, error: ReplyError) -> None:
        """Reply with an error that ends the connection, and close."""
        self.log_rejected(error)
        self.fail(error)
        self.finish()

    def end(self, error: ReplyError) -> None:
        """Close for a reason that is unrelated to a request.

        Redis clients crash on unsolicited errors or mistake them for the reply to their next request. So the error is
        sent only if the client requested notices, or as the reply to a request that has not run.
        """
        if self.notices or self.reads.pending is not None or not self.requests.is_empty:
            self.reads.end()
            self.fail(error)
        self.finish()

    def log_rejected(self, error: ReplyError) -> None:
        _logger.info("%r: %s %s", self, error.code, error, extra=self.event("rejected", code=error.code))

    def on_failure(self, *, in_request: bool = False) -> None:
        """Close only this connection because of the exception being handled; if it is from a request, reply first."""
        error: ReplyError = _DEFECT
        if sys.exc_info()[0] is MemoryError:
            error = _NO_MEMORY
            _logger.error("%r: dropped: out of memory", self, extra=self.event("dropped"))
        else:
            _logger.exception("%r: dropped because of a bug", self, extra=self.event("defect"))
            self.counters.failures += 1
        self.reads.end()
        if in_request and self.commit_puts():
            self.fail(error)
            self.finish()
        else:
            self.close_with_error(error)

    def close_with_error(self, error: ReplyError) -> None:
        """Close immediately. A client that requested notices gets the error, unless another reply is due first."""
        if self.notices and not (self.transport.data or self.pending_puts):
            self._note(error)
            with suppress(OSError):
                self.transport.socket.send(encode_error(error))
        self.close(f"{error.code} {error}")

    def close(self, reason: str) -> None:
        """Close immediately. Idempotent."""
        if self.closed:
            return
        self.state = CLOSED
        self.reads.close()
        self.requests.clear()
        self.transport.close()
        self.loop.remove_connection(self)
        _logger.debug("%r: closed: %s", self, reason)
