"""A client's requests: parsing, running, and the memory they take."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from selectors import EVENT_READ
from time import monotonic
from typing import TYPE_CHECKING

from dsmq.broker import usage
from dsmq.broker.auth import Role
from dsmq.broker.states import BEHIND, CLOSED, FINISHING, OPEN, WAITING
from dsmq.broker.transport import Transport
from dsmq.broker.usage import FREE_BYTES, SLOW_BYTES_PER_SECOND, Budget, request_memory
from dsmq.errors import ReplyError
from dsmq.store.api import Put
from dsmq.wire.request_parser import RequestParser

if TYPE_CHECKING:
    from dsmq.broker.commands import Command
    from dsmq.broker.connection import Connection
    from dsmq.broker.event_loop import EventLoop
    from dsmq.broker.transactions import Step, Transaction

# Commands whose replies may be long, and how long. The replies to READ and GET are as long as their messages.
LONG_REPLIES = frozenset({b"TOPICS", b"ECHO", b"PING", b"COMMAND", b"CONFIG", b"INFO"})
LONG_REPLY_BYTES = 65_536


@dataclass(slots=True, eq=False)
class Requests:
    """Runs requests in order, with one reply to each. Buffered ones count towards a total."""

    connection: Connection
    loop: EventLoop
    transport: Transport
    budget: Budget
    counts: dict[str, int]
    parser: RequestParser = field(default_factory=lambda: RequestParser(0))
    queue: deque[list[bytes]] = field(default_factory=deque)
    """Parsed, but not run yet."""
    transaction: Transaction | None = None
    steps: deque[Step] = field(default_factory=deque)
    """The steps that EXEC still has to run. For each, the queue has a request with an empty name."""
    permitted: dict[bytes, Command] = field(default_factory=dict)
    reserved: int = 0
    """How many bytes of the total they take. An incomplete request counts with its declared length."""
    incomplete_since: float = math.inf
    slow_from: float = math.inf
    """When the average speed of an incomplete request falls below SLOW_BYTES_PER_SECOND."""

    @property
    def is_empty(self) -> bool:
        return not (self.queue or len(self.parser))

    @property
    def missing(self) -> int:
        """The number of bytes still missing from an incomplete request."""
        waiting = self.connection.state is WAITING
        return self.parser.missing if self.parser.incomplete and not waiting else 0

    def permit(self, role: Role) -> None:
        table = self.loop.context.commands
        self.permitted = (table.queued if self.transaction else table.by_role)[role]

    def begin(self, transaction: Transaction | None) -> None:
        """Queue requests in a transaction from now on; None: run them again."""
        self.transaction = transaction
        self.permit(self.connection.role)

    def put_together(self, puts: list[Put], encode: Callable[[list[int] | ReplyError], bytes]) -> bytes | None:
        """Store all or none; return the encoded ids or error, or None if the store answers later."""
        stored = self.loop.batch.append(puts)
        if not isinstance(stored, Future):
            return encode(stored)
        self.connection.pending_puts += 1
        self.connection.park()
        self.loop.when_done(stored, partial(self._reply_later, encode))
        return None

    def _reply_later(self, encode: Callable[[list[int] | ReplyError], bytes], stored: list[int] | ReplyError) -> None:
        if not self.connection.closed:
            self.connection.pending_puts -= 1
            self.transport.send(encode(stored))
            self.connection.resume()

    def run_next(self, steps: deque[Step]) -> None:
        """Run these steps of a transaction before any other request."""
        self.steps = steps
        self.queue.extendleft([[b""]] * len(steps))

    def note_progress(self, size: int) -> None:
        """Note that more of an incomplete request has arrived."""
        self.slow_from = usage.slow_after(self.slow_from, size, self.loop.now)

    def run(self) -> None:
        """Run buffered requests until one blocks, the output buffer is full, or the time slice is over."""
        connection, parser = self.connection, self.parser
        if connection.state is BEHIND:
            connection.state = OPEN
        if connection.state is OPEN:
            self._run()
        if (
            connection.state is not OPEN
            or parser.missing != 1
            or parser.incomplete
            or self.reserved
            or self.transaction
            or self.transport.eof_received
        ):
            self._after_run()
            self.transport.update_events()
        elif self.transport.events != EVENT_READ:
            self.transport.update_events()

    def _run(self) -> None:
        connection, transport, queue, parser = self.connection, self.transport, self.queue, self.parser
        is_tight = transport.budget.is_tight
        most = FREE_BYTES if is_tight and transport.budget.is_full else transport.max_unread
        until, slice_seconds = 0.0, self.loop.slice_seconds
        while connection.state is OPEN and len(transport.data) < most:
            if not queue and (parser.missing or not self._parse()):
                break
            request = queue.popleft()
            if is_tight and not self._has_room(request):
                queue.appendleft(request)
                break
            try:
                self._execute(request)
            except ReplyError as error:
                self._refuse(request, error)
            except Exception:  # noqa: BLE001
                connection.on_failure(in_request=True)
            if queue and connection.pending_puts and slice_seconds:
                # Puts are so fast that the clock is read once for a batch of them.
                continue
            if parser.missing and not queue:
                break
            now = monotonic()
            until = until or now + slice_seconds
            if now >= until:
                break
        transport.count_if_long()
        is_full = len(transport.data) >= most
        if connection.state is OPEN and (is_full or queue or not parser.missing):
            connection.state = BEHIND
            if not is_full:
                self.loop.run_soon(connection)

    def _parse(self) -> bool:
        """Take requests out of the parser, just one if no more may run; return whether there were any."""
        try:
            if self.permitted and self.loop.slice_seconds:
                requests = self.parser.batch()
            else:
                request = self.parser.next()
                requests = [] if request is None else [request]
        except ReplyError as error:
            if self.connection.commit_puts():
                self.connection.reject(error)
            return False
        if requests:
            self.queue += requests
            self.loop.counters.requests += len(requests)
            self.incomplete_since = self.slow_from = math.inf
        return bool(requests)

    def _execute(self, request: list[bytes]) -> None:
        command = self.permitted.get(request[0]) or self._authorize(request[0])
        self.counts[command.name] += 1
        if command.name != "PUT" and self.connection.pending_puts and not self.connection.commit_puts():
            self.queue.appendleft(request)
            return
        if not command.min_args < len(request) <= command.max_args + 1:
            raise command.wrong_count()
        reply = command.handler(self.connection, request)
        if reply is not None:
            self.transport.send(reply)

    def _authorize(self, name: bytes) -> Command:
        """Return a command that `permitted` lacks. Raises the error if the client may not call it."""
        role = self.connection.role
        if role is Role.NOBODY:
            # Before the lookup, because unknown commands count too.
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
            self.queue.appendleft(request)
            return
        self.connection.fail(error)
        if self.transaction is not None:
            self.transaction.abort()
        if request[0].upper() == b"PUT":
            self.loop.counters.puts_refused[error.code] += 1

    def _has_room(self, request: list[bytes]) -> bool:
        """Return whether there is room for the reply to a request; if not, the connection has to wait."""
        if not request[0] and self.steps:
            request = self.steps[0].request
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
            if self.incomplete_since == math.inf:
                self.incomplete_since = self.loop.now
                self.slow_from = self.loop.now + usage.SLOW_SECONDS
            connection.schedule(self.deadline())
        if self.transport.eof_received and connection.state in (OPEN, FINISHING):
            connection.finish()

    def deadline(self) -> float:
        """Return when an incomplete request must be complete. Longer ones have more time."""
        timeout = self.connection.context.settings.request_timeout_seconds
        return self.incomplete_since + timeout + (len(self.parser) + self.parser.missing) / SLOW_BYTES_PER_SECOND

    def count(self) -> None:
        """Update the total. If there is no room for the rest of an incomplete request, the connection has to wait."""
        parser, connection, transaction = self.parser, self.connection, self.transaction
        held = parser.buffered + connection.reads.position_bytes + (transaction.memory if transaction else 0)
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
        self.reserved = 0
        self.incomplete_since = self.slow_from = math.inf


def _counted(size: int) -> int:
    return size if size > FREE_BYTES else 0
