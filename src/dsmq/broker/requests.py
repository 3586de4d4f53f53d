"""Receives, parses and runs a client's requests, and accounts for their memory."""

from __future__ import annotations

from math import inf
from selectors import EVENT_READ
from time import monotonic
from typing import TYPE_CHECKING

from dsmq.broker import usage
from dsmq.broker.auth import Role
from dsmq.broker.states import BEHIND, CLOSED, FINISHING, HANDSHAKE, OPEN, WAITING
from dsmq.broker.transport import Transport
from dsmq.broker.usage import FREE_BYTES, RECEIVE_BYTES, SLOW_BYTES_PER_SECOND, Budget, request_memory
from dsmq.errors import ReplyError
from dsmq.wire.request_parser import RequestParser

if TYPE_CHECKING:
    from dsmq.broker.commands import Command
    from dsmq.broker.connection import Connection
    from dsmq.broker.event_loop import EventLoop
    from dsmq.broker.transactions import Step, Transaction
    from dsmq.store.api import Watched

# Commands with long replies, and the bytes to reserve for each. READ and GET know the length of their replies.
LONG_REPLIES = frozenset({b"TOPICS", b"ECHO", b"PING", b"COMMAND", b"CONFIG", b"INFO"})
LONG_REPLY_BYTES = 65_536
# Max bytes received at once from each of many connections, so that one does not delay the others.
CROWD_RECEIVE_BYTES = 16_384
# Max bytes to receive and discard while the connection of an unauthenticated client closes.
MAX_DISCARDED_BYTES = 65_536


class Requests:
    """Receives requests and runs them in order, with one reply to each. Buffered requests count towards a total."""

    __slots__ = (
        *("_discarded", "budget", "connection", "counts", "incomplete_since", "loop", "max_receive", "parser"),
        *("permitted", "queue", "reserved", "slow_from", "steps", "transaction", "transport", "watched"),
    )

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.loop: EventLoop = connection.loop
        self.transport: Transport = connection.transport
        self.budget: Budget = connection.context.usage.requests
        self.counts: dict[str, int] = connection.counters.commands
        self.parser = RequestParser(0)
        self.queue: list[list[bytes]] = []
        """Requests parsed but not yet run; so few that a deque would not be faster, only larger when idle."""
        self.transaction: Transaction | None = None
        self.watched: Watched = {}
        self.steps: list[Step] = []
        """The remaining steps of EXEC, in reverse order. The queue contains a request with an empty name for each."""
        self.permitted: dict[bytes, Command] = {}
        self.max_receive = RECEIVE_BYTES
        self.reserved = 0
        """This connection's share of the total. An incomplete request counts with its declared length."""
        self.incomplete_since = inf
        self.slow_from = inf
        """When the average speed of an incomplete request will have fallen below SLOW_BYTES_PER_SECOND."""
        self._discarded = 0

    @property
    def is_empty(self) -> bool:
        """Whether everything received has run."""
        return self.parser.missing == 1 and not (self.parser.incomplete or self.queue)

    @property
    def missing(self) -> int:
        """The number of bytes still missing from an incomplete request."""
        waiting = self.connection.state is WAITING
        return self.parser.missing if self.parser.incomplete and not waiting else 0

    def permit(self) -> None:
        """Allow the commands of the client's role."""
        table = self.loop.context.commands
        self.permitted = (table.queued if self.transaction else table.by_role)[self.connection.role]

    def begin(self, transaction: Transaction | None) -> None:
        """Queue requests in a transaction from now on; None: run them directly again, and watch no topics."""
        self.transaction = transaction
        if transaction is None:
            self.watched = {}
        self.permit()

    def run_next(self, steps: list[Step]) -> None:
        """Run these steps of a transaction before any other request."""
        self.steps = steps
        self.queue[:0] = [[b""]] * len(steps)

    # Receiving

    def on_ready(self, events: int) -> None:
        """Receive or send, depending on the socket's events."""
        connection, transport, loop = self.connection, self.transport, self.loop
        if connection.state is HANDSHAKE:
            transport.shake_hands()
            return
        if events != EVENT_READ:
            transport.flush()
            if connection.state is CLOSED or not events & EVENT_READ:
                return
        try:
            is_scarce = self.budget.is_crowded or not loop.slice_seconds
            size = self._scarce_bytes() if is_scarce else self.max_receive
            try:
                data = transport.socket.recv(size)
            except MemoryError:
                data = transport.socket.recv(FREE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            connection.close(error.strerror or str(error))
            return
        if not data:
            transport.eof_received = True
            connection.on_eof()
        elif connection.state < FINISHING:
            loop.counters.bytes_in += len(data)
            transport.active_at = loop.now
            if self.incomplete_since != inf:
                self.slow_from = usage.slow_after(self.slow_from, len(data), loop.now)
            self.parser.feed(data)
            self.run()
        elif connection.unauthenticated:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED_BYTES:
                connection.close("kept sending after the last reply")

    def on_failure(self) -> None:
        self.connection.on_failure()

    def _scarce_bytes(self) -> int:
        """Return how many bytes to receive: fewer if many connections are ready or if memory is short."""
        most = self.max_receive if self.loop.slice_seconds else min(self.max_receive, CROWD_RECEIVE_BYTES)
        return min(most, FREE_BYTES + self.missing) if self.budget.is_crowded else most

    # Running

    def run(self) -> None:
        """Run buffered requests until one blocks, the output buffer is full, or the time slice is over."""
        connection, parser, transport = self.connection, self.parser, self.transport
        if connection.state is BEHIND:
            connection.state = OPEN
        if connection.state is OPEN:
            is_full = self._run()
            if (is_full or self.queue or not parser.missing) and connection.state is OPEN:
                connection.state = BEHIND
                if not is_full:
                    self.loop.run_soon(connection)
        if (
            parser.missing != 1
            or parser.incomplete
            or self.queue
            or self.reserved
            or self.transaction
            or transport.eof_received
            or (connection.state is not OPEN and connection.state is not WAITING)
        ):
            self._after_run()
            transport.update_events()
        elif transport.events != EVENT_READ:
            transport.update_events()

    def _run(self) -> bool:
        """Return whether the output buffer is full."""
        connection, transport, queue, parser = self.connection, self.transport, self.queue, self.parser
        is_tight = transport.budget.is_tight
        most = FREE_BYTES if is_tight and transport.budget.is_full else transport.max_unread
        until, slice_seconds = 0.0, self.loop.slice_seconds
        while connection.state is OPEN and len(transport.data) < most:
            if not queue and (parser.missing or not self._parse()):
                break
            request = queue.pop(0)
            if is_tight and not self._has_room(request):
                queue.insert(0, request)
                break
            try:
                command = self.permitted.get(request[0]) or self._authorize(request[0])
                if connection.pending_puts and command.name != "PUT" and not connection.commit_puts():
                    queue.insert(0, request)
                    break
                self.counts[command.name] += 1
                if not command.min_args < len(request) <= command.max_args + 1:
                    raise command.wrong_count()
                reply = command.handler(connection, request)
                if reply is not None:
                    transport.send(reply)
            except ReplyError as error:
                self._refuse(request, error)
            except Exception:  # noqa: BLE001
                connection.on_failure(in_request=True)
            if queue and connection.pending_puts and slice_seconds:
                # Puts are so fast that the clock is read only once per batch.
                continue
            if parser.missing and not queue:
                break
            now = monotonic()
            until = until or now + slice_seconds
            if now >= until:
                break
        return len(transport.data) >= most

    def park(self) -> None:
        """Run no more requests until `resume`, because the store answers later."""
        if self.connection.state < FINISHING:
            self.connection.state = WAITING

    def resume(self) -> None:
        connection = self.connection
        if connection.state is not WAITING:
            return
        self.transport.active_at = self.loop.now
        connection.state = OPEN
        if self.transport.eof_received or not self.is_empty:
            # Don't run them immediately: a put among them may wake another reader that has a put to run, and so on
            # without end.
            connection.state = BEHIND
            self.loop.run_soon(connection)

    def _parse(self) -> list[list[bytes]]:
        """Move requests from the parser to the queue, just one if no more may run; return the queue."""
        try:
            if self.permitted and self.loop.slice_seconds:
                self.queue += self.parser.batch()
            elif (request := self.parser.next()) is not None:
                self.queue.append(request)
        except ReplyError as error:
            if self.connection.commit_puts():
                self.connection.reject(error)
        if self.queue:
            self.loop.counters.requests += len(self.queue)
            self.incomplete_since = self.slow_from = inf
        return self.queue

    def _authorize(self, name: bytes) -> Command:
        """Return a command that is not in `permitted`. Raises an error if the client may not run it."""
        role = self.connection.role
        if role is Role.NOBODY:
            # Count before the lookup, because unknown commands count, too.
            self.connection.login.count_request()
        command = self.loop.context.commands.find(name)
        if role < command.role:
            self.counts[command.name] += 1
            command.forbid(role)
        # Between MULTI and EXEC it is queued.
        return self.permitted.get(command.name.encode(), command)

    def _refuse(self, request: list[bytes], error: ReplyError) -> None:
        self.connection.reads.end()
        if not self.connection.commit_puts():
            self.run_again(request)
            return
        self.connection.fail(error)
        if self.transaction is not None:
            self.transaction.abort()
        if request[0].upper() == b"PUT":
            self.loop.counters.puts_refused[error.code] += 1

    def run_again(self, request: list[bytes]) -> None:
        """Put a request back into the queue; it will be counted when it runs."""
        self.queue.insert(0, request)
        if command := self.loop.context.commands.all.get(request[0].upper()):
            self.counts[command.name] -= 1

    def _has_room(self, request: list[bytes]) -> bool:
        """Return whether there is room for the reply to a request; if not, make the connection wait."""
        if not request[0] and self.steps:
            request = self.steps[-1].request
        name = request[0].upper()
        if name not in LONG_REPLIES:
            return True
        size = sum(map(len, request))
        return self.transport.reserve(size if name in (b"PING", b"ECHO") else size + LONG_REPLY_BYTES)

    def _after_run(self) -> None:
        """Account for the requests that have not run."""
        connection = self.connection
        if connection.state is CLOSED:
            return
        self.count()
        if self.parser.incomplete and connection.state is OPEN:
            if self.incomplete_since == inf:
                self.incomplete_since = self.loop.now
                self.slow_from = self.loop.now + usage.SLOW_SECONDS
            connection.schedule(self.deadline())
        if self.transport.eof_received and connection.state in (OPEN, FINISHING):
            connection.finish()

    def deadline(self) -> float:
        """Return the deadline of an incomplete request. Longer requests have more time."""
        timeout = self.connection.context.settings.request_timeout_seconds
        return self.incomplete_since + timeout + (len(self.parser) + self.parser.missing) / SLOW_BYTES_PER_SECOND

    def count(self) -> None:
        """Update the total. If there is no room for the rest of an incomplete request, make the connection wait."""
        parser, connection, transaction = self.parser, self.connection, self.transaction
        held = parser.buffered + connection.reads.memory + (transaction.memory if transaction else 0)
        held += request_memory([*self.watched]) if self.watched else 0
        held += sum(map(request_memory, self.queue)) + sum([request_memory(step.request) for step in self.steps])
        if parser.incomplete and connection.state in (OPEN, BEHIND):
            more = _counted(held + parser.missing) - self.reserved
            if more <= 0:
                return
            if self.budget.claim_in_turn(connection, more, self.loop.now):
                self.reserved += more
                return
            connection.wait_for_room()
        more = _counted(held) - self.reserved
        if more:
            self.budget.add(connection, more)
            self.reserved += more
            if self.budget.is_full:
                self.loop.memory.is_short = True

    def clear(self) -> None:
        self.parser = RequestParser(0)
        self.queue.clear()
        self.steps.clear()
        self.transaction = None
        self.watched.clear()
        self.reserved = 0
        self.incomplete_since = self.slow_from = inf


def _counted(size: int) -> int:
    return size if size > FREE_BYTES else 0
