"""A client's socket and its unsent replies."""

from __future__ import annotations

import socket
from contextlib import suppress
from math import inf
from selectors import EVENT_READ, EVENT_WRITE
from typing import TYPE_CHECKING, TypeAlias

from dsmq.broker import usage
from dsmq.broker.states import BEHIND, CLOSED, FINISHING, HANDSHAKE, LINGERING, NO_ROOM, OPEN, WAITING
from dsmq.broker.usage import FREE_BYTES, Budget
from dsmq.wire.resp import Encoded

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.event_loop import EventLoop
    from dsmq.wire.tls import TLSSocket

Stream: TypeAlias = "socket.socket | TLSSocket"
"""A non-blocking socket."""

# Max bytes sent at once, so that one connection does not delay the others.
SEND_BYTES = 524_288
# Max unparsed bytes buffered while a client is waiting.
MAX_HELD_BYTES = 65_536
# When the server closes a connection: how long the client may take to read the last reply and disconnect.
LINGER_SECONDS = 1.0
LINGER_SECONDS_AT_STOP = 0.05


class Transport:
    """Sends replies. Long replies, and replies still unsent at the end of a turn, count towards a total."""

    # Not a dataclass, which mypyc can't compile if its annotations are imported for type checkers only.
    __slots__ = (
        *("active_at", "budget", "connection", "counted", "data", "eof_received", "events", "linger_seconds", "loop"),
        *("max_unread", "slow_from", "socket", "unread_since"),
    )

    def __init__(self, connection: Connection, sock: Stream) -> None:
        self.connection = connection
        self.loop: EventLoop = connection.loop
        self.socket = sock
        self.budget: Budget = connection.context.usage.replies
        self.data = bytearray()
        """Unsent replies."""
        self.counted = 0
        """The bytes counted in the total."""
        self.max_unread = 0
        """If more bytes than this are unsent, no further requests run."""
        self.unread_since = inf
        """When the client last accepted data; infinite if nothing is unsent."""
        self.slow_from = inf
        """When the client's average reading speed will have fallen below SLOW_BYTES_PER_SECOND."""
        self.active_at = 0.0
        """When data was last received, or the last reply was sent completely."""
        self.linger_seconds = LINGER_SECONDS
        self.eof_received = False
        self.events = 0
        """The socket events that the event loop watches for."""

    def fileno(self) -> int:
        return self.socket.fileno()

    def shake_hands(self) -> None:
        try:
            events = self.socket.handshake()  # type: ignore[union-attr]
        except OSError as error:
            self.connection.on_failed_handshake(error)
            return
        if events:
            self.loop.watch(self.connection, events)
        else:
            self.connection.state = OPEN
            self.connection.login.admit()
            self.update_events()
            # Requests may already have been received and decrypted with the end of the handshake.
            self.connection.requests.on_ready(EVENT_READ)

    # Out

    def send(self, reply: Encoded) -> None:
        """Send this at the end of the turn."""
        data = self.data
        if not data:
            self.loop.to_flush.append(self)
            if type(reply) is bytearray:
                # It is long, so avoid another copy.
                self.data = data = reply
                reply = b""
        data += reply
        if self.counted or len(data) > SEND_BYTES:
            # It may stay buffered for a long time.
            self.count()

    def flush(self) -> None:
        """Send as much as the socket accepts."""
        connection = self.connection
        state, data = connection.state, self.data
        if state >= LINGERING:
            # The sending side is shut down: sending would fail and close the connection before the client reads the
            # last reply.
            return
        size = len(data)
        try:
            sent = self.socket.send(data if size <= SEND_BYTES else memoryview(data)[:SEND_BYTES])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            connection.close(error.strerror or str(error))
            return
        self.loop.counters.bytes_out += sent
        if sent < size:
            del data[:sent]
            self._note_unread(sent)
        else:
            data.clear()
            self.active_at = self.loop.now
            if state is OPEN and self.unread_since == inf and self.events == EVENT_READ and not self.counted:
                return
            self.unread_since = self.slow_from = inf
        if len(data) != self.counted:
            self.count()
        if state is BEHIND:
            if len(data) < self.max_unread:
                self.loop.run_soon(connection)
        elif state is FINISHING and not (data or connection.pending_puts):
            self._linger()
        self.update_events()

    def _note_unread(self, sent: int) -> None:
        now = self.loop.now
        if self.unread_since == inf:
            self.slow_from = now + usage.SLOW_SECONDS
        if sent or self.unread_since == inf:
            self.unread_since = now
            self.slow_from = usage.slow_after(self.slow_from, sent, now)
            self.connection.schedule(now + self.connection.context.settings.reply_timeout_seconds)

    def _linger(self) -> None:
        """End the stream and give the client time to read the replies and disconnect.

        If the server closed while the client is still sending, the kernel would reset the connection, and the last
        reply might be lost.
        """
        if self.eof_received:
            self.connection.close("end of input")
            return
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.connection.close(error.strerror or str(error))
            return
        self.connection.state = LINGERING
        self.connection.schedule(self.active_at + self.linger_seconds)

    # Memory

    def count(self) -> None:
        """Update the total, but only in steps of FREE_BYTES, because there may be many short replies."""
        size = len(self.data)
        more = size - self.counted
        if more < 0 or more > FREE_BYTES or size <= FREE_BYTES:
            self.budget.add(self.connection, more)
            self.counted = size

    def reserve(self, size: int) -> bool:
        """Count a reply in advance if memory is short. If there is no room, make the connection wait; return False."""
        if not self.budget.is_tight or size + len(self.data) <= FREE_BYTES:
            return True
        if not self.budget.claim_in_turn(self.connection, size, self.loop.now):
            self.connection.wait_for_room()
            return False
        self.counted += size
        return True

    # Events

    def update_events(self) -> None:
        """Watch the socket for what the connection can handle now."""
        connection, events = self.connection, EVENT_READ
        if connection.state is not OPEN or self.eof_received or self.unread_since != inf:
            if connection.state in (HANDSHAKE, CLOSED):
                return
            events = EVENT_READ if self._can_receive() else 0
            if self.unread_since != inf:
                events |= EVENT_WRITE
        if events != self.events:
            self.loop.watch(self.connection, events)

    def _can_receive(self) -> bool:
        connection = self.connection
        if self.eof_received or connection.state is BEHIND:
            return False
        if connection.state is WAITING or connection.reads.pending:
            # To detect when the client disconnects.
            return len(connection.requests.parser) < MAX_HELD_BYTES
        return connection.state is not NO_ROOM

    def close(self) -> None:
        """Release the socket and the buffer."""
        # A timer may keep a reference to the connection for hours.
        self.data, self.counted = bytearray(), 0
        self.loop.watch(self.connection, 0)
        # A forked process may have a copy of the socket, and without this, the client would not notice the end.
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
