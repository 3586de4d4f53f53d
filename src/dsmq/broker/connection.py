"""One client: its socket, its buffers and their bounds, its deadlines, and what it is waiting for."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from selectors import EVENT_READ, EVENT_WRITE
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from dsmq import logs
from dsmq.broker.auth import Role, Token
from dsmq.broker.commands import COMMANDS_BY_ROLE, PUT, QUEUED, Command, find
from dsmq.broker.messages import MAX_READ_BYTES, SHORT_READ_BYTES
from dsmq.broker.reads import PendingRead
from dsmq.broker.transactions import Step, Transaction
from dsmq.broker.usage import FREE_BYTES, Budget, request_memory
from dsmq.errors import (
    AuthRequired,
    BadRequest,
    InternalError,
    ReplyError,
    ShuttingDown,
    TimedOut,
    WrongToken,
)
from dsmq.store.api import MESSAGE_OVERHEAD_BYTES, Answer, Message, Put
from dsmq.wire.limits import REQUEST_OVERHEAD_BYTES
from dsmq.wire.request_parser import RequestParser
from dsmq.wire.resp import Encoded, encode_error, encode_integer

if TYPE_CHECKING:
    from dsmq.broker.event_loop import EventLoop

# Received, and sent, at once: so that one connection does not hold up the others. In a crowd, less is received.
RECEIVE_BYTES = 131_072
CROWD_RECEIVE_BYTES = 16_384
SEND_BYTES = 524_288
# Max bytes buffered of requests behind one that waits; above it the client is not read from.
MAX_HELD_BYTES = 65_536
# What GET remembers of one connection: the names of its topics, and what each takes beside.
MAX_POSITION_BYTES = 2_097_152
POSITION_OVERHEAD_BYTES = 200
# A client that is slower than this has more time for a long request, but is the first to go if memory is short and
# it has been slower for more than a moment.
SLOW_BYTES_PER_SECOND = 16_384
SLOW_SECONDS = 1.0
# Commands whose replies may be long, and what is allowed for them. Those of READ and GET are as long as their messages.
LONG_REPLIES = frozenset({b"TOPICS", b"ECHO", b"PING", b"COMMAND", b"CONFIG", b"INFO"})
LONG_REPLY_BYTES = 65_536
# Requests that a client may make before it is authenticated, of whatever kind.
MAX_REQUESTS_OF_STRANGERS = 16
# To read and discard what it sends behind them costs others time, so there is an end to that, too.
MAX_DISCARDED_BYTES_OF_STRANGERS = 65_536
# Of a client that is being let go of, so much is read at once, to be thrown away.
LAST_RECEIVE_BYTES = 4096
# How long a client may take to read the last reply and hang up, when the server closes.
LINGER_SECONDS = 1.0
LINGER_SECONDS_AT_STOP = 0.05
# How long the rest of a handshake with a wrong token is answered.
WRONG_TOKEN_SECONDS = 0.1

_DEFECT = InternalError("see the server's log")

_logger = logging.getLogger(__name__)


class Stream(Protocol):
    """What a connection asks of its socket, which may be one under TLS. None of it waits."""

    def fileno(self) -> int:
        """Return its file descriptor."""

    def recv(self, size: int, /) -> bytes:
        """Return what has come. Raises BlockingIOError when there is nothing."""

    def send(self, data: bytearray | bytes | memoryview, /) -> int:
        """Send some of it; return how much."""

    def shutdown(self, how: int, /) -> None:
        """Say that nothing more comes."""

    def close(self) -> None:
        """Close it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end."""

    number: int
    host: str
    client_key: str
    """What one client can have many addresses of: see `auth.client_key`."""
    name: str
    """Host and port, for people."""
    admitted_by: tuple[bool, str]
    """See `Access.connection_rules`."""

    @property
    def encrypted(self) -> bool:
        return self.admitted_by[0]


class Connection:
    """A connection, from the first byte to the last. Used by its loop's thread alone."""

    # Python reaches so many attributes sooner in slots than in a dict.
    __slots__ = (
        "_asked",
        "_backlog",
        "_budget",
        "_command_counts",
        "_discarded",
        "_eof_received",
        "_events",
        "_gave_wrong_token",
        "_handshaking",
        "_has_unparsed",
        "_linger_seconds",
        "_linger_until",
        "_loop",
        "_max_held",
        "_max_unread",
        "_no_room",
        "_out",
        "_parked",
        "_parser",
        "_pending_puts",
        "_permitted",
        "_position_bytes",
        "_read",
        "_receive_bytes",
        "_received_at",
        "_replies",
        "_request_since",
        "_requests",
        "_reserved",
        "_resuming",
        "_slow_from",
        "_socket",
        "_stalls_from",
        "_stranger_until",
        "_unread_since",
        "below",
        "closed",
        "context",
        "counters",
        "finishing",
        "id",
        "last_read",
        "name",
        "notices",
        "opened_at",
        "peer",
        "positions",
        "role",
        "scheduled",
        "start_id",
        "steps",
        "token",
        "transaction",
        "unauthenticated",
        "version",
    )

    def __init__(self, loop: EventLoop, sock: Stream, peer: Peer) -> None:
        self._loop = loop
        self._socket = sock
        self.peer = peer
        self.id = peer.number
        self.context = loop.context
        self.counters = loop.counters
        self._command_counts = loop.counters.commands
        self.token: Token | None = None
        self.role = Role.NOBODY if loop.context.access.authenticator.tokens else Role.ADMIN
        self.unauthenticated = peer.encrypted or self.role is Role.NOBODY
        """Whether it has still to show its token, or to finish the handshake of TLS."""
        self._handshaking = peer.encrypted
        self._gave_wrong_token = False
        self._asked = self._discarded = 0
        self._stranger_until = math.inf
        self.name = b""
        self.version = 2
        self.notices = False
        self.start_id = loop.context.store.last_id()
        self.positions: dict[bytes, int] = {}
        self._position_bytes = 0
        self._replies, self._budget = self.context.usage.replies, self.context.usage.requests
        self.last_read: tuple[bytes, int] | None = None
        self.transaction: Transaction | None = None
        self.steps: deque[Step] = deque()
        self.below = 0
        self.closed = False
        self.finishing = False
        self.scheduled = math.inf
        """When the loop will call `on_timer` next: the loop's to keep."""
        self._parser = RequestParser(0)
        self._out = bytearray()
        # What of it, and of what has come, is counted in the totals.
        self._backlog = self._reserved = 0
        # The total that has no room for what comes next. The loop calls `on_room` when it has.
        self._no_room: Budget | None = None
        self._set_bounds()
        self._events = 0
        self._read: PendingRead | None = None
        # The reply to the request before is outstanding; those behind it have to wait.
        self._parked = False
        # Parsed, but not run yet; the rest stays in the parser.
        self._requests: deque[list[bytes]] = deque()
        # Puts given to the loop whose replies are outstanding.
        self._pending_puts = 0
        # Requests were left for later: until the client has read some replies, or the others have had their turn.
        self._has_unparsed = False
        # The loop will call `run` in the next turn.
        self._resuming = False
        # The client has ended its sending side.
        self._eof_received = False
        self._linger_seconds = LINGER_SECONDS
        self._received_at = self.opened_at = loop.now
        self._request_since = self._unread_since = self._linger_until = math.inf
        # When the client will have read its replies, or sent its request, at less than SLOW_BYTES_PER_SECOND.
        self._slow_from = self._stalls_from = math.inf

    def __repr__(self) -> str:
        return f"client {self.id} ({self.peer.name})"

    def _event(self, name: str, **fields: object) -> dict[str, object]:
        return logs.event(name, client=self.id, peer=self.peer.name, **fields)

    def post(self, call: Callable[[], None]) -> None:
        """Run this in the thread of its loop. Safe to call from any thread."""
        self._loop.post(call)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def waiting(self) -> bool:
        """Whether it waits for a message."""
        return self._read is not None and self._read.registered

    @property
    def max_read_bytes(self) -> int:
        return SHORT_READ_BYTES if self._replies.total else MAX_READ_BYTES

    def _set_bounds(self) -> None:
        """Say how much is held for it: little for a stranger."""
        settings = self.context.settings
        self._set_permitted()
        if self.role is Role.NOBODY:
            most = settings.max_unauthenticated_bytes
            self._receive_bytes = self._max_held = self._max_unread = most
            self._parser.max_message_bytes = self._parser.max_request_bytes = most
        else:
            self._receive_bytes, self._max_held = RECEIVE_BYTES, MAX_HELD_BYTES
            self._max_unread = settings.max_unread_reply_bytes
            self._parser.max_message_bytes = settings.max_message_bytes
            self._parser.max_request_bytes = settings.max_message_bytes + REQUEST_OVERHEAD_BYTES

    def open(self) -> None:
        """Begin to read requests."""
        self.apply_settings()
        self._watch()

    def apply_settings(self) -> None:
        """Adopt the settings in force after a reload."""
        if not self.finishing:
            self._set_bounds()
            if self.unauthenticated and not self._gave_wrong_token:
                self._stranger_until = self.opened_at + self.context.settings.auth_timeout_seconds
            self._schedule()
        self.apply_access()

    # Bytes in

    def on_ready(self, events: int) -> None:
        """Read and write what the socket is ready for."""
        if self._handshaking:
            self._shake_hands()
            if self._handshaking or self.closed:
                return
        if events != EVENT_READ:
            self.flush()
            if self.closed or not events & EVENT_READ:
                return
        try:
            data = self._socket.recv(self._most_to_receive())
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(error.strerror or str(error))
            return
        if not data:
            self._end_of_input()
        elif not self.finishing:
            self.counters.bytes_in += len(data)
            self._received_at = now = self._loop.now
            if self._request_since != math.inf:
                self._stalls_from = min(self._stalls_from + len(data) / SLOW_BYTES_PER_SECOND, now + 2 * SLOW_SECONDS)
            self._parser.feed(data)
            self.run()
        elif self.role is Role.NOBODY:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED_BYTES_OF_STRANGERS:
                self.close("sends on after its last reply")

    def _most_to_receive(self) -> int:
        """Return how many bytes to read: few beyond what is reserved, where others wait for room or soon will."""
        most = self._receive_bytes if self._loop.slice_seconds else min(self._receive_bytes, CROWD_RECEIVE_BYTES)
        if not self._budget.is_crowded:
            return most
        reserved = self._parser.missing if self._parser.incomplete and not self._parked else 0
        return min(most, FREE_BYTES + reserved)

    def _shake_hands(self) -> None:
        try:
            waits_for = self._socket.handshake()  # type: ignore[attr-defined]
        except OSError as error:
            self.close(error.strerror or str(error))
            return
        if waits_for:
            self._events = waits_for
            self._loop.watch(self, waits_for)
            return
        self._handshaking = False
        if self.role is not Role.NOBODY:
            self._admit()
        self._watch()

    def _end_of_input(self) -> None:
        self._eof_received = True
        if self._linger_until != math.inf:
            self.close("end of input")
            return
        if self._read is not None and not self._no_room:
            self._end_read()
            self.finish()
        # Where it is finishing already, this only stops the reading; the replies before are still sent.
        self.run()

    def run(self) -> None:
        """Run the requests that have arrived, until one is parked, the client should read its replies first, or the
        others should have their turn."""
        if self.closed:
            return
        self._resuming = False
        requests, parser = self._requests, self._parser
        tight = self._replies.is_tight
        most = FREE_BYTES if tight and self._replies.is_full else self._max_unread
        until, slice_seconds = 0.0, self._loop.slice_seconds
        # What waits for room is tried again by on_room alone.
        halted = self._no_room
        while not (self._parked or self.finishing or halted) and len(self._out) < most:
            if not requests and (parser.missing or not self._parse()):
                break
            request = requests.popleft()
            if tight and not self._has_room(request):
                requests.appendleft(request)
                break
            try:
                self._execute(request)
            except ReplyError as error:
                self._refuse(request, error)
            except Exception:  # noqa: BLE001
                self._fail_by_defect()
            if requests and self._pending_puts and slice_seconds:
                # Puts take little time each: the clock is read once for a batch of them.
                continue
            if parser.missing and not requests:
                break
            now = monotonic()
            until = until or now + slice_seconds
            if now >= until:
                break
        size = len(self._out)
        if size > SEND_BYTES:
            # Others count if they are still there at the end of the turn.
            self._count_backlog(size)
        full = size >= most
        if (
            requests
            or parser.missing != 1
            or parser.incomplete
            or full
            or self._has_unparsed
            or self._reserved
            or self._eof_received
            or self.transaction
        ):
            self._after_run(full=full)
        self._watch()

    def _refuse(self, request: list[bytes], error: ReplyError) -> None:
        self._end_read()
        if not self._commit_pending_puts():
            self._requests.appendleft(request)
            return
        self._fail(error)
        if self.transaction is not None:
            self.transaction.abort()
        if request[0].upper() == b"PUT":
            self.counters.puts_refused[error.code] += 1

    def _after_run(self, *, full: bool) -> None:
        """Note what is left: of replies, of requests, and for the next turn."""
        requests, parser = self._requests, self._parser
        left = bool(requests) or not parser.missing
        behind = full or (left and not (self._parked or self.finishing or self._no_room))
        if behind or self._has_unparsed:
            self._update_backpressure(behind=behind)
            if behind and not full:
                self._run_soon()
        self._count_input()
        if parser.incomplete:
            self._start_request_timer()
        if self._eof_received and parser.missing and not (requests or self._parked or self._no_room):
            self.finish()

    def _run_soon(self) -> None:
        if not self._resuming:
            self._resuming = True
            self._loop.run_soon(self)

    def _update_backpressure(self, *, behind: bool) -> None:
        was_behind, self._has_unparsed = self._has_unparsed, behind
        if was_behind:
            # Its time for being idle begins only now.
            self._schedule()

    def _parse(self) -> bool:
        """Take further requests out of the parser, if there are some."""
        try:
            requests = self._parser.batch() if self._permitted and self._loop.slice_seconds else self._next_alone()
        except ReplyError as error:
            if self._commit_pending_puts():
                self._reject(error)
            return False
        if requests:
            self._requests += requests
            self.counters.requests += len(requests)
            self._request_since = math.inf
        return bool(requests)

    def _next_alone(self) -> list[list[bytes]]:
        """Parse one request, so that no work is done for those beyond MAX_REQUESTS_OF_STRANGERS, or beyond its time."""
        request = self._parser.next()
        return [] if request is None else [request]

    def _execute(self, request: list[bytes]) -> None:
        command = self._permitted.get(request[0]) or self._restricted(request[0])
        self._command_counts[command.name] += 1
        if self._pending_puts and command is not PUT and not self._commit_pending_puts():
            self._requests.appendleft(request)
            return
        if not command.min_args < len(request) <= command.max_args + 1:
            command.check(request)
        reply = command.handler(self, request)
        if reply is not None:
            self._send(reply)

    def _restricted(self, name: bytes) -> Command:
        """Return a command that needs a further look. Raises the error for one that the client may not call."""
        if self.role is Role.NOBODY:
            # Before anything is looked up: an unknown command counts, too.
            self._asked += 1
            if self._asked > MAX_REQUESTS_OF_STRANGERS:
                self.finish()
                raise AuthRequired(f"no more than {MAX_REQUESTS_OF_STRANGERS} requests without a token")
            if self._gave_wrong_token:
                raise AuthRequired("a wrong token was given on this connection")
        command = find(name)
        if self.role < command.role:
            self._command_counts[command.name] += 1
            command.forbid(self.role)
        # Between MULTI and EXEC another row of the table counts.
        return self._permitted.get(command.name.encode(), command)

    def _commit_pending_puts(self) -> bool:
        """Have the puts before a request answered, so that its reply does not overtake theirs.

        False where the store answers later: the connection is parked until then, and the request has to be held.
        """
        if self._pending_puts:
            self._loop.commit()
        return not self._pending_puts

    def _start_request_timer(self) -> None:
        """Give the client a deadline: a request of it has arrived in part."""
        if self._request_since == math.inf and not (self._parked or self.finishing):
            self._request_since = self._loop.now
            self._stalls_from = self._loop.now + SLOW_SECONDS
            self._schedule()

    # Memory

    def _count_input(self) -> None:
        """Count what is buffered of requests; and of one that has come in part, all of its length as declared.

        If there is no room for that, no more of it is read until there is.
        """
        parser, budget = self._parser, self._budget
        held = parser.buffered + self._position_bytes + (self.transaction.memory if self.transaction else 0)
        held += sum(map(request_memory, chain(self._requests, (step.request for step in self.steps))))
        if parser.incomplete and not (self._parked or self.finishing) and self._no_room in (None, budget):
            declared = _counted(held + parser.missing)
            if declared <= self._reserved or budget.claim_in_turn(self, declared - self._reserved, self._loop.now):
                self._reserved = max(declared, self._reserved)
                self._stop_waiting_for_room()
                return
            self._wait_for_room(budget)
        more = _counted(held) - self._reserved
        if more:
            budget.add(self, more)
            self._reserved += more
            if more > 0 and budget.is_full:
                self._loop.relieve()

    def _wait_for_room(self, budget: Budget) -> None:
        self._no_room = budget
        self._loop.await_room(self)

    def _stop_waiting_for_room(self) -> None:
        if self._no_room is not None:
            # Requests behind it were held up by that alone.
            self._no_room = None
            self._loop.leave_queue(self)
            self._run_soon()

    def on_room(self) -> None:
        """Try again what there was no room for."""
        budget, self._no_room = self._no_room, None
        self._received_at = self._loop.now
        if self._read is not None:
            self.wake()
            self._schedule()
            return
        if budget is self._budget:
            # Its time begins only now.
            self._request_since = math.inf
        self.run()

    def _has_room(self, request: list[bytes]) -> bool:
        """Return whether the reply to a request fits into the total; if not, wait for room."""
        if not request[0] and self.steps:
            request = self.steps[0].request
        name = request[0].upper()
        if name not in LONG_REPLIES:
            return True
        size = sum(map(len, request))
        return self._claim_reply(size if name in (b"PING", b"ECHO") else size + LONG_REPLY_BYTES)

    def _claim_reply(self, size: int) -> bool:
        replies = self._replies
        if not replies.is_tight or size + len(self._out) <= FREE_BYTES:
            return True
        if not replies.claim_in_turn(self, size, self._loop.now):
            self._wait_for_room(replies)
            return False
        self._backlog += size
        self._stop_waiting_for_room()
        return True

    def set_position(self, topic: bytes, message_id: int) -> None:
        if topic not in self.positions:
            size = self._position_bytes + POSITION_OVERHEAD_BYTES + len(topic)
            if size > MAX_POSITION_BYTES:
                raise BadRequest("too many topics are read with GET by one connection; READ has no such limit")
            self._position_bytes = size
            if size > FREE_BYTES:
                self._count_input()
        self.positions[topic] = message_id

    def may_go(self, budget: Budget, now: float) -> bool:
        """Return whether to close it when others need the memory: it makes no progress, or little. From any thread."""
        if budget is self._replies:
            return now > self._slow_from
        if self._no_room is budget:
            # It waits itself: for no fault of its own, unless it holds more than comes before its length is known, or a
            # transaction: if all hold some of theirs and wait for the rest, none gets on.
            return self._reserved > 2 * RECEIVE_BYTES or self.transaction is not None
        if self._request_since == math.inf:
            # Where it is full of replies that the client is reading, it gets on.
            return not self._resuming and (not self._has_unparsed or now > self._slow_from)
        return now > self._stalls_from

    def make_way(self, budget: Budget, *, waits: bool = False) -> None:
        """End, because others need the memory; `waits` if it waits itself, and holds what another one waits for."""
        # Another thread looked, perhaps in the middle of a turn; or it got on meanwhile.
        goes = self._no_room is budget if waits else self.may_go(budget, monotonic())
        if self.closed or not budget.of(self) or not goes:
            return
        about = "memory is short, and it is slow"
        _logger.info("%r: dropped, %s", self, about, extra=self._event("dropped"))
        if budget is self._replies or self._request_since == math.inf or self._parked:
            self.close(about)
            return
        self._forget_input()
        self._stop_waiting_for_room()
        self._reject(TimedOut("the request arrives too slowly while memory is short"))

    def _forget_input(self) -> None:
        self._parser = RequestParser(0)
        self._requests.clear()
        self.steps.clear()
        self.transaction = None
        self.positions = {}
        self._reserved = self._position_bytes = 0
        self._budget.drop(self)

    # Replies

    def _send(self, reply: Encoded) -> None:
        if not self._out:
            self._loop.flush_soon(self)
            if type(reply) is bytearray:
                # It is long, and so not copied again.
                self._out = reply
                reply = b""
        self._out += reply
        if self._backlog:
            # It is not flushed before the client reads.
            self._count_backlog(len(self._out))

    def _fail(self, error: ReplyError) -> None:
        self.note(error)
        self._send(encode_error(error))

    def note(self, error: ReplyError) -> None:
        """Count an error reply, and keep it for whoever looks at the server's state."""
        self.counters.errors[error.code] += 1
        self.counters.recent.append((time.time(), error.code, repr(self), str(error)))

    def _reject(self, error: ReplyError) -> None:
        """Reply an error behind which nothing makes sense any more, and close."""
        self._log_rejected(error)
        self._fail(error)
        self.finish()

    def _end(self, error: ReplyError) -> None:
        """Close for a reason that no request gave.

        Clients of Redis crash on a line that they did not ask for, or take it for the reply to their next request. So
        the error is sent only if the client asked for notices, or as the reply to a request that has not been run.
        """
        if self.notices or self._read is not None or self._requests or len(self._parser):
            self._end_read()
            self._fail(error)
        self.finish()

    def _log_rejected(self, error: ReplyError) -> None:
        _logger.info("%r: %s %s", self, error.code, error, extra=self._event("rejected", code=error.code))

    def flush(self) -> None:
        """Send what the socket takes."""
        if self.closed or self._linger_until != math.inf:
            # Its sending side is closed: another send would fail, and close the connection under the last reply.
            return
        out = self._out
        size = len(out)
        try:
            sent = self._socket.send(out if size <= SEND_BYTES else memoryview(out)[:SEND_BYTES])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.close(error.strerror or str(error))
            return
        self.counters.bytes_out += sent
        left = size - sent
        if left != self._backlog:
            self._count_backlog(left)
        if left:
            del out[:sent]
            now = self._loop.now
            if self._unread_since == math.inf:
                self._slow_from = now + SLOW_SECONDS
            if sent or self._unread_since == math.inf:
                self._unread_since = now
                self._slow_from = min(self._slow_from + sent / SLOW_BYTES_PER_SECOND, now + 2 * SLOW_SECONDS)
            if self._has_unparsed and left < self._max_unread:
                self._run_soon()
            self._schedule()
        else:
            out.clear()
            self._unread_since = self._slow_from = math.inf
            self._received_at = self._loop.now
            if self.finishing and not self._pending_puts:
                self._linger()
            elif self._has_unparsed:
                self._run_soon()
            elif self.context.settings.idle_timeout_seconds:
                self._schedule()
        self._watch()

    def _count_backlog(self, size: int) -> None:
        more = size - self._backlog
        if more < 0 or more > FREE_BYTES or size <= FREE_BYTES:
            # In steps: of short replies, many are added to one that is not taken.
            self._replies.add(self, more)
            self._backlog = size

    # Who it is

    def authenticate(self, user: bytes, token: bytes, welcome: Callable[[], bytes]) -> bytes:
        gate = self.context.access.authenticator
        if not gate.tokens:
            raise BadRequest("a token was given, but this server has none")
        found = gate.authenticate(user, token)
        if found is None:
            _logger.warning("%r: wrong token", self, extra=self._event("wrong_token"))
            self.counters.wrong_tokens += 1
            # One guess a connection: nothing behind it is run. But what was sent along with it gets replies before the
            # end: some libraries pass the error on only when they have those to their whole handshake.
            self._gave_wrong_token = True
            self.role = Role.NOBODY
            self._set_bounds()
            self._stranger_until = self._loop.now + WRONG_TOKEN_SECONDS
            self._schedule()
            raise WrongToken("invalid token")
        self.token, self.role = found, found.role
        self._set_bounds()
        self._admit()
        return welcome()

    def _admit(self) -> None:
        self.unauthenticated = False
        self._stranger_until = math.inf
        self._loop.admit(self)

    def apply_access(self) -> None:
        """Disconnect if the rules or the token that it was admitted by are gone; admit it if no token is needed."""
        access = self.context.access
        tokens = access.authenticator.tokens
        if self.peer.admitted_by != access.connection_rules:
            self.disconnect("the server's rules for connections have changed")
        elif self.role is Role.NOBODY and not (tokens or self.finishing or self._gave_wrong_token):
            # There is no token to wait for any more.
            self.role = Role.ADMIN
            self._set_bounds()
            if not self._handshaking:
                self._admit()
        elif self.role is not Role.NOBODY and self.token not in tokens and (self.token or tokens):
            self.disconnect("the token is no longer valid")

    def disconnect(self, reason: str) -> None:
        """End, because what it was admitted by holds no longer."""
        if self.unauthenticated:
            # Nothing can be said while the handshake of TLS lasts.
            self.close(reason)
            return
        self.role = Role.NOBODY
        self._permitted = COMMANDS_BY_ROLE[self.role]
        if self._commit_pending_puts():
            self.stop_waiting()
            error = AuthRequired(reason)
            self._log_rejected(error)
            self._end(error)
        else:
            self.finish()

    # Puts

    def put(self, put: Put) -> None:
        self._pending_puts += 1
        self._loop.put(self, put)

    def stored(self, message_id: int) -> None:
        """Reply to a put."""
        self._pending_puts -= 1
        self._send(encode_integer(message_id))

    def not_stored(self, error: ReplyError) -> None:
        """Reply to a put that failed."""
        self._pending_puts -= 1
        self.counters.puts_refused[error.code] += 1
        self._fail(error)

    # Transactions

    def begin(self, transaction: Transaction | None) -> None:
        self.transaction = transaction
        self._set_permitted()

    def _set_permitted(self) -> None:
        self._permitted = (QUEUED if self.transaction else COMMANDS_BY_ROLE)[self.role]

    def put_together(self, puts: list[Put], encode: Callable[[list[int] | ReplyError], bytes]) -> bytes | None:
        """Store all or nothing; return the encoded ids or error, or None if the store answers later."""
        stored = self._loop.append(puts)
        if not isinstance(stored, Future):
            return encode(stored)
        self._pending_puts += 1
        self.park()
        self._loop.when_done(stored, partial(self._stored_together, encode))
        return None

    def _stored_together(
        self, encode: Callable[[list[int] | ReplyError], bytes], stored: list[int] | ReplyError
    ) -> None:
        if not self.closed:
            self._pending_puts -= 1
            self._send(encode(stored))
            self.resume()

    def run_next(self, steps: deque[Step]) -> None:
        self.steps = steps
        self._requests.extendleft([[b""]] * len(steps))

    def park(self) -> None:
        """Run no further request until `resume`."""
        self._parked = True

    def resume(self) -> None:
        """Go on behind the request that was parked."""
        self._parked = False
        self._received_at = self._loop.now
        if self.context.settings.idle_timeout_seconds:
            self._schedule()
        # Not run here and now: that could store a put, which wakes another, which runs …, without end.
        if self._requests or self._eof_received or len(self._parser):
            self._run_soon()

    # Reads

    def read(self, read: PendingRead) -> Encoded | None:
        """Return the reply to a read; None if it comes later: with a message, or when there is room for it."""
        if self.below:
            # A step of a transaction does not wait for messages.
            read.below, read.wait_ms = self.below, 0
        self._read = read
        reply = self._reply_to(read, read.fetch(self.context.store))
        if reply is None:
            self._parked = True
            if read.wait_ms:
                read.deadline = self._loop.now + read.wait_ms / 1000
                self._schedule()
        return reply

    def _reply_to(self, read: PendingRead, messages: Answer[list[Message]]) -> Encoded | None:
        if isinstance(messages, Future):
            self._loop.when_done(messages, partial(self._try_read, read))
            return None
        if read.below:
            messages = [message for message in messages if message.id < read.below]
        if not messages and read.wait_ms:
            if read.registered:
                return None
            # Register first, then check again, so that a put in between is not missed.
            self._loop.add_waiter(read.topic, self)
            read.registered = True
            return self._reply_to(read, read.fetch(self.context.store))
        if self._replies.is_tight and not self._claim_reply(
            sum([len(message.body) + MESSAGE_OVERHEAD_BYTES for message in messages])
        ):
            return None
        self._end_read()
        return read.encode(self, read, messages)

    def wake(self) -> None:
        """Try the pending read again: there is a new message, or room for the reply."""
        if self._read is not None:
            self._try_read(self._read)

    def _try_read(self, read: PendingRead, found: list[Message] | ReplyError | None = None) -> None:
        """Reply to a read if that is possible now; `found` is what the store has answered, if it answered later."""
        if self._read is not read:
            # Its time was up, or another answer came first.
            return
        try:
            if isinstance(found, ReplyError):
                raise found
            reply = self._reply_to(read, read.fetch(self.context.store) if found is None else found)
        except ReplyError as error:
            self._end_read()
            self._fail(error)
        except Exception:  # noqa: BLE001
            self._fail_by_defect()
            return
        else:
            if reply is None:
                return
            self._send(reply)
            if len(reply) > SEND_BYTES:
                self._count_backlog(len(self._out))
        self.resume()

    def stop_waiting(self) -> None:
        """Reply to a waiting read that there are no messages."""
        read = self._read
        if read is not None and read.wait_ms and not self._no_room:
            self._end_read()
            try:
                self._send(read.encode(self, read, []))
            except ReplyError as error:
                self._fail(error)
            self.resume()

    def _end_read(self) -> None:
        read, self._read = self._read, None
        if read is not None and read.registered:
            self._loop.remove_waiter(read.topic, self)

    # Deadlines

    def _deadline(self) -> float:
        settings = self.context.settings
        deadline = min(self._linger_until, self._unread_since + settings.reply_timeout_seconds)
        if self.finishing:
            return deadline
        if self._read is not None:
            return deadline if self._no_room else min(deadline, self._read.deadline)
        deadline = min(deadline, self._stranger_until, self._request_deadline())
        if settings.idle_timeout_seconds and not (self._parked or self._has_unparsed or self._out or self._no_room):
            deadline = min(deadline, self._received_at + settings.idle_timeout_seconds)
        return deadline

    def _request_deadline(self) -> float:
        """Return until when the request that has come in part has to be whole: later, the longer it is."""
        if self._no_room or self._request_since == math.inf:
            return math.inf
        length = len(self._parser) + self._parser.missing
        timeout = self.context.settings.request_timeout_seconds
        return self._request_since + timeout + length / SLOW_BYTES_PER_SECOND

    def _schedule(self) -> None:
        deadline = self._deadline()
        if deadline < self.scheduled:
            self._loop.schedule(self, deadline)

    def on_timer(self) -> None:
        """Do what a deadline asks for, if one has passed."""
        now = self._loop.now
        settings = self.context.settings
        if now < self._deadline():
            pass  # It was put off; nothing is due yet.
        elif now >= self._linger_until:
            self.close("closed by the server")
        elif now >= self._unread_since + settings.reply_timeout_seconds:
            _logger.info("%r: dropped, it does not read its replies", self, extra=self._event("dropped"))
            self.close("does not read its replies")
        elif self._read is not None:
            self.stop_waiting()
        elif now >= self._stranger_until and self._gave_wrong_token:
            self.finish()
        elif now >= self._stranger_until:
            error = TimedOut("no token, or no end of the handshake of TLS, has come in time")
            if len(self._parser):
                self._reject(error)
            else:
                self.close_with_error(error)
        elif now >= self._request_deadline():
            self._reject(TimedOut("the request did not arrive in time"))
        else:
            error = TimedOut("idle for too long")
            self._log_rejected(error)
            self._end(error)
        if not self.closed:
            self._schedule()

    # The end

    def finish(self) -> None:
        """Take no more requests; close when everything has been sent."""
        self.finishing = True
        self._receive_bytes = LAST_RECEIVE_BYTES
        if not self._out:
            self._loop.flush_soon(self)

    def drain(self) -> None:
        """Answer what waits, and finish: the server is stopping.

        Behind the last reply a client that asked for notices is told: one that has sent a put meanwhile knows that it
        is not stored.
        """
        self._linger_seconds = LINGER_SECONDS_AT_STOP
        self.stop_waiting()
        if not self._commit_pending_puts():
            self.finishing = True
        elif not self.finishing:
            self._end(ShuttingDown("the server is stopping"))

    def _linger(self) -> None:
        # Closing while the client still sends would make the kernel reset the connection, and the client
        # might lose the last reply. So it gets the end of the stream first, and a moment to hang up.
        if self._linger_until != math.inf:
            return
        if self._eof_received:
            self.close("end of input")
            return
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.close(error.strerror or str(error))
            return
        self._linger_until = self._loop.now + self._linger_seconds
        self._schedule()

    def on_failure(self) -> None:
        """End after an exception, which costs this connection and no other."""
        self._log_defect()
        self.close_with_error(_DEFECT)

    def _fail_by_defect(self) -> None:
        """Reply to a request that failed by an exception, and close."""
        self._log_defect()
        self._end_read()
        if self._commit_pending_puts():
            self._fail(_DEFECT)
            self.finish()
        else:
            self.close("dropped after a defect")

    def _log_defect(self) -> None:
        _logger.exception("%r: dropped after a defect", self, extra=self._event("defect"))
        self.counters.failures += 1

    def close_with_error(self, error: ReplyError) -> None:
        """Close at once. A client that asked for notices is told why, if no reply stands before that."""
        if self.notices and not (self._out or self._pending_puts):
            self.note(error)
            try:
                self._socket.send(encode_error(error))
            except OSError:
                _logger.debug("%r: was gone already", self)
        self.close(f"{error.code} {error}")

    def close(self, reason: str) -> None:
        """Close at once. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._end_read()
        # A timer may know this connection for hours; what it holds must not last as long.
        self._out = bytearray()
        self._forget_input()
        self._backlog = 0
        self._loop.remove_connection(self)
        # A process that was forked may hold a copy of the socket; without this, the client would not see the end.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        _logger.debug("%r: closed: %s", self, reason)

    def abandon(self) -> None:
        """Close the copy of the socket that a forked process has."""
        self._socket.close()

    def _watch(self) -> None:
        """Tell the loop what to look for, when it has changed."""
        events = EVENT_READ
        if self._unread_since != math.inf or self._parked or self._has_unparsed or self._eof_received or self._no_room:
            events = self._wanted()
        if self._handshaking and self._events:
            # The handshake says what it waits for.
            return
        if events != self._events and not self.closed:
            self._events = events
            self._loop.watch(self, events)

    def _wanted(self) -> int:
        # A connection that waits is read from as well, to notice when the client goes.
        full = self._has_unparsed or (self._parked and len(self._parser) >= self._max_held)
        reading = 0 if full or self._eof_received or (self._no_room and not self._parked) else EVENT_READ
        return reading | (EVENT_WRITE if self._unread_since != math.inf else 0)


def _counted(size: int) -> int:
    return size if size > FREE_BYTES else 0
