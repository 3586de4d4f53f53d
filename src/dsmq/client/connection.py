"""One connection of the blocking client: sends requests and receives replies, with timeouts."""

from __future__ import annotations

import math
import socket
import time
import weakref
from selectors import EVENT_READ, EVENT_WRITE
from typing import TYPE_CHECKING

from dsmq.client.dial import Selector, dial
from dsmq.client.replies import raise_if_fatal, reason
from dsmq.client.requests import FORKED, Call, Producer, PutMany
from dsmq.errors import DSMQError, ReplyError
from dsmq.system import (
    LONG_YIELD_PAUSE_SECONDS,
    LONG_YIELD_SECONDS,
    process,
    raise_malloc_threshold,
    unsent_bytes,
    yield_processor,
)
from dsmq.wire.addresses import Endpoint
from dsmq.wire.resp import Reply, ReplyParser

if TYPE_CHECKING:
    from ssl import SSLContext

# Receive more at once if replies are long. For short replies that is slower, because each object of more than 128 KiB
# is allocated by the system and returned to it.
_RECEIVE_BYTES, _RECEIVE_MORE_BYTES = 65_536, 262_144
# A socket's timeout in milliseconds must fit into 32 bits.
_LONGEST_TIMEOUT = 1e6
# After a longer pause, check that a connection is still open before sending.
LONG_PAUSE_SECONDS = 0.1
CLOSED_BY_SERVER = "the server has closed the connection"
# Sending more than this at once may take longer than the reply timeout.
LONG_BYTES = 16_384
# If the system does not tell how much the server has received, a slower link times out, as it does on the server.
_SLOWEST_SECONDS_PER_BYTE = 1 / 16_384
# How long to poll for a reply before sleeping.
BUSY_POLL_SECONDS = 150e-6
# A signal handler may fork without running Python's hooks. In the child, the interrupted call would wait for a reply
# that the parent receives, so it wakes up now and then to check.
_LONGEST_SLEEP_SECONDS = 1.0


class Connection:
    """One connection to the server."""

    def __init__(self, endpoint: Endpoint, tls: SSLContext | None, timeout: float, skip: int = 0) -> None:
        self.endpoint = endpoint
        self.producer = Producer(b"")
        self.used_at = math.inf
        self._process = process()
        self._parser = ReplyParser()
        # The timeout for the next reply, and the timeout for requests that do not wait.
        self._timeout, self._base_timeout = timeout, timeout
        self._deadline = math.inf
        self._poll_not_before = 0.0
        # The number of sent bytes that the server had not yet received when the timeout last started.
        self._unsent = 0
        self._receive_bytes = _RECEIVE_BYTES
        self.received = b""
        """The data received last."""
        self._socket = dial(endpoint, tls, min(timeout, _LONGEST_TIMEOUT), skip)
        # An interrupted call may drop the connection at any point.
        weakref.finalize(self, self._socket.close)
        self._selector = Selector()
        self._selector.register(self._socket, EVENT_READ)
        self._awaited = EVENT_READ

    def ask(self, call: Call) -> None:
        """Make a call that gets one reply."""
        self.send(call.request(self.producer), call.seconds)
        call.reply = self.receive()

    def ask_several(self, call: Call) -> None:
        """Make a call that gets one reply or more."""
        self.send(call.request(self.producer), call.seconds)
        for _ in range(call.replies):
            call.take_reply(self.receive())

    def ask_all(self, puts: PutMany) -> None:
        """Send puts in batches; each is sent before the replies to the previous one are read."""
        for sent in puts.unanswered:
            self.send(sent.request(self.producer))
        for batch in puts.batches:
            if batch:
                puts.unanswered.append(batch)
                self.send(batch.request(self.producer))
                self._receive_all(puts, but=1)
            else:
                # Producing the messages may have taken longer than the timeout for replies.
                self.reset_deadline()
                self._receive_all(puts)
                self.probe()
        self._receive_all(puts)

    def _receive_all(self, puts: PutMany, but: int = 0) -> None:
        """Receive the replies to all batches except the newest `but`."""
        while len(puts.unanswered) > but:
            batch = puts.unanswered[0]
            while batch.replies:
                batch.take_reply(self.receive())
            puts.unanswered.popleft()

    def send(self, data: bytes, seconds: float = 0.0) -> None:
        """Send requests; the server may wait for `seconds` before it replies."""
        self._timeout = seconds + self._base_timeout
        now = self.used_at = time.monotonic()
        self._deadline = now + self._timeout
        try:
            sent = self._send(data)
            while sent < len(data):
                self.reset_deadline()
                sent += self._send(memoryview(data)[sent:])
            # The kernel may have buffered more than it has sent.
            self._deadline += sent * _SLOWEST_SECONDS_PER_BYTE
            self._unsent = unsent_bytes(self._socket.fileno()) if sent > LONG_BYTES else 0
        except ConnectionError:
            # The server has closed the connection. `receive` may still return its reason.
            return

    def _send(self, data: bytes | memoryview) -> int:
        """Send as much as the socket accepts, at least one byte."""
        while True:
            # A signal handler may have forked: a child must not write to the parent's connection.
            if process() is not self._process:
                raise ConnectionResetError(FORKED)
            try:
                return self._socket.send(data)
            except BlockingIOError:
                self._wait(EVENT_WRITE)

    def reset_deadline(self) -> None:
        """Restart the timeout for a reply."""
        self.used_at = time.monotonic()
        self._deadline = self.used_at + self._timeout
        self._unsent = unsent_bytes(self._socket.fileno())

    def receive(self) -> Reply:
        """Return the next reply. Raises OSError if the connection breaks or the reply is overdue."""
        parser = self._parser
        found = None if parser.missing else parser.next()
        while found is None:
            data = self._receive()
            if not data:
                raise ConnectionResetError(CLOSED_BY_SERVER)
            self.received = data
            parser.feed(data)
            found = parser.next()
        reply = found[0]
        return raise_if_fatal(reply) if isinstance(reply, ReplyError) else reply

    def _receive(self) -> bytes:
        """Wait for data and return it; empty at the end of the connection.

        Polls briefly before sleeping, unless polling did not help the last time: waking a sleeping processor takes
        longer than most requests, especially in a virtual machine.
        """
        began = now = time.monotonic()
        while True:
            # A signal handler may have forked while this waited.
            if process() is not self._process:
                raise ConnectionResetError(FORKED)
            try:
                data = self._socket.recv(self._receive_bytes)
            except BlockingIOError:
                now = time.monotonic()
            else:
                self._adapt_polling(began)
                if len(data) == _RECEIVE_BYTES:
                    raise_malloc_threshold()
                    self._receive_bytes = _RECEIVE_MORE_BYTES
                return data
            if self._poll_not_before <= now < began + BUSY_POLL_SECONDS:
                # The server may be waiting for this processor.
                yield_processor()
            else:
                self._wait(EVENT_READ)

    def _adapt_polling(self, began: float) -> None:
        """Poll for the next reply only if this one was quick."""
        now = self.used_at = time.monotonic()
        # On a slow link, anything that arrives is progress.
        if self._deadline < now + self._base_timeout:  # noqa: PLR1730 - faster
            self._deadline = now + self._base_timeout
        if now - began > LONG_YIELD_SECONDS:
            self._poll_not_before = now + LONG_YIELD_PAUSE_SECONDS
        else:
            self._poll_not_before = 0.0 if now - began < 2 * BUSY_POLL_SECONDS else math.inf

    def _wait(self, event: int) -> None:
        """Wait until the socket can be read or written. Raises TimeoutError if the reply is overdue."""
        if event != self._awaited:
            self._selector.modify(self._socket, event)
            self._awaited = event
        left = self._deadline - time.monotonic()
        if not self._selector.select(max(0.0, min(left, _LONGEST_SLEEP_SECONDS))) and left < _LONGEST_SLEEP_SECONDS:
            before = self._unsent
            # On a slow link, the server may have received more of a long request.
            self.reset_deadline()
            if self._unsent >= before:
                raise TimeoutError(f"no reply within {self._timeout:g} s")

    @property
    def closed_reason(self) -> str | None:
        """Why the connection has ended, or None if it has not. No reply may be outstanding."""
        try:
            if data := self._socket.recv(self._receive_bytes):
                # If no request is outstanding, the server sends nothing but its reason for closing the connection.
                self._parser.feed(data)
                return f"unexpected: {self.receive()!r}"
        except BlockingIOError:
            return None
        except (OSError, DSMQError) as error:
            return reason(error)
        return CLOSED_BY_SERVER

    def probe(self) -> None:
        """Raise ConnectionResetError if the connection has ended. No reply may be outstanding."""
        if (why := self.closed_reason) is not None:
            raise ConnectionResetError(why)

    def await_end(self) -> None:
        """Wait until the server closes the connection."""
        while self._receive():
            pass

    def interrupt(self) -> None:
        """Make a call in another thread fail immediately."""
        if process() is not self._process:
            return
        try:
            if isinstance(self._socket, socket.socket):
                self._socket.shutdown(socket.SHUT_RDWR)
            else:
                self._socket.interrupt()
        except OSError:
            return  # It is closed already.

    def close(self) -> None:
        self._socket.close()
