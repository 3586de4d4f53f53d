"""One client: its socket, its buffers and their bounds, its deadlines, and what it is waiting for."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE

from dsmq import logs
from dsmq.auth import Role, Token
from dsmq.commands import (
    MAX_READ_BYTES,
    PERMITTED,
    PUT,
    QUEUED,
    SHORT_READ_BYTES,
    Command,
    Fetch,
    Step,
    Transaction,
    find,
)
from dsmq.errors import (
    AuthRequired,
    BadRequest,
    Busy,
    Closing,
    InternalError,
    ReplyError,
    StoreFailed,
    TimedOut,
    WrongToken,
)
from dsmq.loop import Loop, Peer, Stream
from dsmq.protocol import REQUEST_OVERHEAD_BYTES, RequestParser, encode_error, encode_integer
from dsmq.store import Answer, Message, Put, T

# What one connection may bring in one turn of the loop: so a greedy one lets the others have their turn.
RECEIVE_BYTES = 131_072
# Of a client that waits, so much is held that it has sent already.
MAX_HELD_BYTES = 65_536
# Wrong tokens that one connection may show before it is closed.
MAX_WRONG_TOKENS = 3
# Requests that a client may make without having shown its token.
MAX_REQUESTS_OF_STRANGERS = 16
# Of a client that is being let go of, so much is read at once, to be thrown away.
LAST_RECEIVE_BYTES = 4096
# How long a client may take to read the last reply and hang up, when the server closes.
LINGER_SECONDS = 1.0
LINGER_SECONDS_AT_STOP = 0.05

_DEFECT = InternalError("see the server's log")

_logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Wait:
    """What a waiting reader waits for."""

    topic: bytes
    """Empty where it waits for its time alone."""
    until: float
    fetch: Fetch
    encode: Callable[[list[Message]], bytes]


class Connection:
    """A connection, from the first byte to the last. Used by its loop's thread alone."""

    # Python reaches so many attributes sooner in slots than in a dict.
    __slots__ = (
        "_asked",
        "_backlog",
        "_behind",
        "_calls",
        "_deferred",
        "_ended",
        "_events",
        "_linger_seconds",
        "_linger_until",
        "_loop",
        "_max_held",
        "_max_requests",
        "_max_unread",
        "_out",
        "_parked",
        "_parser",
        "_permitted",
        "_receive_bytes",
        "_received_at",
        "_request_since",
        "_requests",
        "_socket",
        "_stranger_until",
        "_unread_since",
        "_wait",
        "_wrong_tokens",
        "below",
        "closed",
        "counters",
        "finishing",
        "id",
        "name",
        "notices",
        "opened_at",
        "peer",
        "positions",
        "reading",
        "role",
        "scheduled",
        "services",
        "steps",
        "stranger",
        "token",
        "transaction",
        "version",
        "watermark",
    )

    def __init__(self, loop: Loop, sock: Stream, peer: Peer) -> None:
        self._loop = loop
        self._socket = sock
        self.peer = peer
        self.id = peer.number
        self.services = loop.services
        self.counters = loop.counters
        self._calls = loop.counters.commands
        self.token: Token | None = None
        self.role = Role.NOBODY if loop.services.gate.tokens else Role.ADMIN
        self.stranger = peer.encrypted or self.role is Role.NOBODY
        """Whether it has still to show its token, or to finish the handshake of TLS."""
        self._wrong_tokens = self._asked = 0
        self._stranger_until = math.inf
        self.name = b""
        self.version = 2
        self.notices = False
        self.watermark = loop.services.store.last_id()
        self.positions: dict[bytes, int] = {}
        self.reading: tuple[bytes, int] | None = None
        self.transaction: Transaction | None = None
        self.steps: deque[Step] = deque()
        self.below = 0
        self.closed = False
        self.finishing = False
        self.scheduled = math.inf
        """When the loop will call `on_time` next: the loop's to keep."""
        self._parser = RequestParser(0)
        self._out = bytearray()
        # What of it is part of the loop's backlog.
        self._backlog = 0
        self._set_bounds()
        self._events = 0
        self._wait: _Wait | None = None
        # The reply to the request before is outstanding; those behind it have to wait.
        self._parked = False
        # Parsed, but not run yet; the rest stays in the parser.
        self._requests: deque[list[bytes]] = deque()
        # Puts given to the loop whose replies are outstanding.
        self._deferred = 0
        # Requests were left for later: until the client has read its replies, or the others have had their turn. It
        # goes on when what there is to send has been.
        self._behind = False
        # The client has ended its sending side.
        self._ended = False
        self._linger_seconds = LINGER_SECONDS
        self._received_at = self.opened_at = loop.now
        self._request_since = self._unread_since = self._linger_until = math.inf

    def __repr__(self) -> str:
        return f"client {self.id} ({self.peer.name})"

    def _event(self, name: str, **fields: object) -> dict[str, object]:
        return logs.event(name, client=self.id, peer=self.peer.name, **fields)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def waiting(self) -> bool:
        """Whether it waits for a message."""
        return self._wait is not None and bool(self._wait.topic)

    @property
    def max_read_bytes(self) -> int:
        return SHORT_READ_BYTES if self._loop.backlog else MAX_READ_BYTES

    def _set_bounds(self) -> None:
        """Say how much is held for it: little for a stranger."""
        settings = self.services.settings
        self._max_requests = settings.max_requests_per_turn
        self._permitted = (QUEUED if self.transaction else PERMITTED)[self.role]
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
        """Go by the settings in force from now on."""
        if self.finishing:
            return
        self._set_bounds()
        if self.stranger:
            self._stranger_until = self.opened_at + self.services.settings.auth_timeout_seconds
        self._schedule()

    # Bytes in

    def on_ready(self, events: int) -> None:
        """Read and write what the socket is ready for."""
        if events != EVENT_READ:
            self.flush()
            if self.closed or not events & EVENT_READ:
                return
        try:
            data = self._socket.recv(self._receive_bytes)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(error.strerror or str(error))
            return
        if not data:
            self._end_of_input()
        elif not self.finishing:
            if self.stranger and self.role is not Role.NOBODY:
                # With the first byte the handshake is done.
                self._admit()
            self.counters.bytes_in += len(data)
            self._received_at = self._loop.now
            self._parser.feed(data)
            self.run()

    def _end_of_input(self) -> None:
        self._ended = True
        if self._linger_until != math.inf:
            self.close("end of input")
            return
        if self._wait is not None:
            self._stop_waiting()
            self.finish()
        # Where it is finishing already, this only stops the reading; the replies before are still sent.
        self.run()

    def run(self) -> None:
        """Run the requests that have arrived, until one is parked or the client should read its replies first."""
        if self.closed:
            return
        requests, parser = self._requests, self._parser
        quota = self._max_requests
        # The client should read its replies first where there are so many bytes of them. The backlog is seldom there.
        most = 1 if self._loop.backlog and self._loop.crowded else self._max_unread
        while quota and not (self._parked or self.finishing) and len(self._out) < most:
            if not requests and (parser.missing or not self._parse()):
                break
            quota -= 1
            request = requests.popleft()
            try:
                self._execute(request)
            except ReplyError as error:
                self._stop_waiting()
                if self._settled():
                    self._fail(error)
                    if self.transaction is not None:
                        self.transaction.abort()
                    if request[0].upper() == b"PUT":
                        self.counters.puts_refused[error.code] += 1
                else:
                    requests.appendleft(request)
            except Exception:  # noqa: BLE001
                self._fail_by_defect()
        full = len(self._out) >= most
        if self._behind or not quota or full:
            left = not quota and not self._parked and bool(requests or not parser.missing)
            self._mind_replies(behind=full or left)
        if parser.incomplete:
            self._mind_request()
        if self._ended and parser.missing and not (requests or self._parked):
            self.finish()
        self._watch()

    def _mind_replies(self, *, behind: bool) -> None:
        was_behind, self._behind = self._behind, behind
        if was_behind:
            # Its time for being idle begins only now.
            self._schedule()

    def _parse(self) -> bool:
        """Take further requests out of the parser, if there are some."""
        try:
            requests = self._parser.batch()
        except ReplyError as error:
            if self._settled():
                self._reject(error)
            return False
        if requests:
            self._requests += requests
            self.counters.requests += len(requests)
            self._request_since = math.inf
        return bool(requests)

    def _execute(self, request: list[bytes]) -> None:
        command = self._permitted.get(request[0]) or self._restricted(request[0])
        self._calls[command.name] += 1
        if self._deferred and command is not PUT and not self._settled():
            self._requests.appendleft(request)
            return
        if not command.least < len(request) <= command.most + 1:
            command.check(request)
        reply = command.handler(self, request)
        if reply is not None:
            self._send(reply)

    def _restricted(self, name: bytes) -> Command:
        """Return a command that needs a further look. Raises the error for one that the client may not call."""
        command = find(name)
        if self.role is Role.NOBODY:
            self._asked += 1
            if self._asked > MAX_REQUESTS_OF_STRANGERS:
                self.finish()
                raise AuthRequired(f"no more than {MAX_REQUESTS_OF_STRANGERS} requests without a token")
        if self.role < command.role:
            self._calls[command.name] += 1
            command.forbid(self.role)
        # Between MULTI and EXEC another row of the table counts.
        return self._permitted.get(command.name.encode(), command)

    def _settled(self) -> bool:
        """Have the puts before a request answered, so that its reply does not overtake theirs.

        False where the store answers later: the connection is parked until then, and the request has to be held.
        """
        if self._deferred:
            self._loop.commit()
        return not self._deferred

    def _mind_request(self) -> None:
        """Give the client a deadline: a request of it has arrived in part."""
        if self._request_since == math.inf and not (self._parked or self.finishing):
            self._request_since = self._loop.now
            self._schedule()

    # Replies

    def _send(self, reply: bytes) -> None:
        if not self._out:
            self._loop.flush_soon(self)
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
        if self.notices or self._requests or len(self._parser):
            self._fail(error)
        self.finish()

    def _log_rejected(self, error: ReplyError) -> None:
        _logger.info("%r: %s %s", self, error.code, error, extra=self._event("rejected", code=error.code))

    def flush(self) -> None:
        """Send what the socket takes."""
        if self.closed:
            return
        try:
            sent = self._socket.send(self._out)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.close(error.strerror or str(error))
            return
        self.counters.bytes_out += sent
        left = len(self._out) - sent
        if left != self._backlog:
            self._count_backlog(left)
        if left:
            del self._out[:sent]
            if sent or self._unread_since == math.inf:
                self._unread_since = self._loop.now
            self._schedule()
        else:
            self._out.clear()
            self._unread_since = math.inf
            self._received_at = self._loop.now
            if self.finishing and not self._deferred:
                self._linger()
            elif self._behind:
                self._loop.run_soon(self)
            elif self.services.settings.idle_timeout_seconds:
                self._schedule()
        self._watch()

    def _count_backlog(self, size: int) -> None:
        self._loop.backlog += size - self._backlog
        self._backlog = size

    # Who it is

    def authenticate(self, user: bytes, token: bytes, welcome: Callable[[], bytes]) -> bytes | None:
        gate = self.services.gate
        if not gate.tokens:
            raise BadRequest("this server has no tokens")
        seconds = gate.turn(self.peer.network)
        if not seconds:
            return self._judge(user, token, welcome)
        self._wait = _Wait(b"", self._loop.now + seconds, list, lambda _: self._judge(user, token, welcome))
        self._parked = True
        self._schedule()
        return None

    def _judge(self, user: bytes, token: bytes, welcome: Callable[[], bytes]) -> bytes:
        found = self.services.gate.admit(user, token)
        if found is None:
            return self._wrong_token()
        self.token, self.role = found, found.role
        self._set_bounds()
        self._admit()
        return welcome()

    def _wrong_token(self) -> bytes:
        _logger.warning("%r: wrong token", self, extra=self._event("wrong_token"))
        self.services.gate.fail(self.peer.network)
        self._wrong_tokens += 1
        self.counters.wrong_tokens += 1
        if self._wrong_tokens >= MAX_WRONG_TOKENS:
            self.finish()
        error = WrongToken("this is no token of this server")
        self.note(error)
        return encode_error(error)

    def _admit(self) -> None:
        self.stranger = False
        self._stranger_until = math.inf
        self._loop.admit(self)

    def check_token(self) -> None:
        """End where the tokens have changed, and its own is none any more."""
        tokens = self.services.gate.tokens
        if self.role is Role.NOBODY or self.token in tokens or not (self.token or tokens):
            return
        self.dismiss("from now on this server wants another token")

    def dismiss(self, reason: str) -> None:
        """End, because what it was admitted by holds no longer."""
        if self.stranger:
            # Nothing can be said while the handshake of TLS lasts.
            self.close(reason)
            return
        self.role = Role.NOBODY
        self._permitted = PERMITTED[self.role]
        if self._settled():
            self.stop_waiting()
            error = AuthRequired(reason)
            self._log_rejected(error)
            self._end(error)
        else:
            self.finish()

    # Puts

    def put(self, put: Put) -> None:
        self._deferred += 1
        self._loop.put(self, put)

    def stored(self, message_id: int) -> None:
        """Reply to a put."""
        self._deferred -= 1
        self._send(encode_integer(message_id))

    def not_stored(self, error: ReplyError) -> None:
        """Reply to a put that failed."""
        self._deferred -= 1
        self.counters.puts_refused[error.code] += 1
        self._fail(error)

    # Transactions

    def begin(self, transaction: Transaction | None) -> None:
        self.transaction = transaction
        self._permitted = (QUEUED if transaction else PERMITTED)[self.role]

    def put_together(self, puts: list[Put], encode: Callable[[list[int] | ReplyError], bytes]) -> bytes | None:
        try:
            answer = self._loop.put_together(puts)
        except ReplyError as error:
            return encode(error)
        if not isinstance(answer, Future):
            return encode(answer)
        self._parked = True
        answer.add_done_callback(lambda done: self._loop.post(partial(self._put_together_later, done, encode)))
        return None

    def _put_together_later(self, answer: Future[list[int]], encode: Callable[[list[int] | ReplyError], bytes]) -> None:
        if self.closed:
            return
        try:
            self._send(encode(result_of(answer)))
        except ReplyError as error:
            self._send(encode(error))
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
        if self.services.settings.idle_timeout_seconds:
            self._schedule()
        # Not run here and now: that could store a put, which wakes another, which runs …, without end.
        if self._requests or self._ended or len(self._parser):
            self._loop.run_soon(self)

    # Answers that come later

    def reply_to(self, answer: Answer[T], encode: Callable[[T], bytes]) -> bytes | None:
        if not isinstance(answer, Future):
            return encode(answer)
        self._parked = True
        answer.add_done_callback(lambda done: self._loop.post(partial(self._answered, done, encode)))
        return None

    def _answered(self, answer: Future[T], encode: Callable[[T], bytes | None], wait: _Wait | None = None) -> None:
        if self.closed or self._wait is not wait:
            # With a store that answers later, the wait may have ended by an earlier answer, or its time.
            return
        try:
            reply = encode(result_of(answer))
        except ReplyError as error:
            self._stop_waiting()
            self._fail(error)
        else:
            if reply is None:
                return
            self._send(reply)
        self.resume()

    def wait_for(
        self, topic: bytes, milliseconds: int, fetch: Fetch, encode: Callable[[list[Message]], bytes]
    ) -> bytes | None:
        if self.below:
            # A step of a transaction does not wait.
            return self.reply_to(_only_below(self.below, fetch()), encode)
        if not milliseconds:
            return self.reply_to(fetch(), encode)
        try:
            # Joined before it looks: a put of another worker in between must not be missed.
            self._loop.join(topic, self)
        except Busy:
            found = fetch()
            if not found:
                raise
            return self.reply_to(found, encode)
        self._wait = wait = _Wait(topic, self._loop.now + milliseconds / 1000, fetch, encode)
        self._schedule()
        reply = self._look(wait)
        self._parked = reply is None
        return reply

    def _look(self, wait: _Wait) -> bytes | None:
        messages = wait.fetch()
        if isinstance(messages, Future):
            messages.add_done_callback(
                lambda done: self._loop.post(partial(self._answered, done, partial(self._found, wait), wait))
            )
            return None
        return self._found(wait, messages)

    def _found(self, wait: _Wait, messages: list[Message]) -> bytes | None:
        if not messages:
            return None
        self._stop_waiting()
        return wait.encode(messages)

    def wake(self) -> None:
        """Look whether there is a message now."""
        if self._wait is not None:
            try:
                reply = self._look(self._wait)
            except ReplyError as error:
                self._stop_waiting()
                self._fail(error)
                self.resume()
                return
            except Exception:  # noqa: BLE001
                self._fail_by_defect()
                return
            if reply is not None:
                self._send(reply)
                self.resume()

    def stop_waiting(self) -> None:
        """Reply to a wait that it found nothing."""
        if (wait := self._wait) is not None:
            self._stop_waiting()
            try:
                self._send(wait.encode([]))
            except ReplyError as error:
                self._fail(error)
            self.resume()

    def _stop_waiting(self) -> None:
        if self._wait is not None:
            if self._wait.topic:
                self._loop.leave(self._wait.topic, self)
            self._wait = None

    # Deadlines

    def _deadline(self) -> float:
        settings = self.services.settings
        deadline = min(self._linger_until, self._unread_since + settings.reply_timeout_seconds)
        if self.finishing:
            return deadline
        if self._wait is not None:
            return min(deadline, self._wait.until)
        deadline = min(deadline, self._stranger_until, self._request_since + settings.request_timeout_seconds)
        if settings.idle_timeout_seconds and not (self._parked or self._behind or self._out):
            deadline = min(deadline, self._received_at + settings.idle_timeout_seconds)
        return deadline

    def _schedule(self) -> None:
        deadline = self._deadline()
        if deadline < self.scheduled:
            self._loop.schedule(self, deadline)

    def on_time(self) -> None:
        """Do what a deadline asks for, if one has passed."""
        now = self._loop.now
        settings = self.services.settings
        if now < self._deadline():
            pass  # It was put off; nothing is due yet.
        elif now >= self._linger_until:
            self.close("closed by the server")
        elif now >= self._unread_since + settings.reply_timeout_seconds:
            _logger.info("%r: dropped, it does not read its replies", self, extra=self._event("dropped"))
            self.close("does not read its replies")
        elif self._wait is not None:
            self.stop_waiting()
        elif now >= self._stranger_until:
            error = TimedOut("no token, or no end of the handshake of TLS, has come in time")
            if len(self._parser):
                self._reject(error)
            else:
                self.send_away(error)
        elif now >= self._request_since + settings.request_timeout_seconds:
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
        if self.waiting:
            self.stop_waiting()
        elif self._wait is not None:
            # The turn of its token has not come.
            self._stop_waiting()
            self._parked = False
        if self._parked or not self._settled():
            self.finishing = True
        elif not self.finishing:
            self._end(Closing("the server is stopping"))

    def _linger(self) -> None:
        # Closing while the client still sends would make the kernel reset the connection, and the client
        # might lose the last reply. So it gets the end of the stream first, and a moment to hang up.
        if self._linger_until != math.inf:
            return
        if self._ended:
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
        self.send_away(_DEFECT)

    def _fail_by_defect(self) -> None:
        """Reply to a request that failed by an exception, and close."""
        self._log_defect()
        self._stop_waiting()
        if self._settled():
            self._fail(_DEFECT)
            self.finish()
        else:
            self.close("dropped after a defect")

    def _log_defect(self) -> None:
        _logger.exception("%r: dropped after a defect", self, extra=self._event("defect"))
        self.counters.failures += 1

    def send_away(self, error: ReplyError) -> None:
        """Close at once. A client that asked for notices is told why, if no reply stands before that."""
        if self.notices and not (self._out or self._deferred):
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
        self._stop_waiting()
        # A timer may know this connection for hours; what it holds must not last as long.
        self._parser, self._out = RequestParser(0), bytearray()
        self._count_backlog(0)
        self._requests.clear()
        self.steps.clear()
        self.transaction = None
        self.positions = {}
        self._loop.forget(self)
        self._socket.close()
        _logger.debug("%r: closed: %s", self, reason)

    def _watch(self) -> None:
        """Tell the loop what to look for, when it has changed."""
        events = EVENT_READ
        if self._unread_since != math.inf or self._parked or self._behind or self._ended:
            events = self._wanted()
        if events != self._events and not self.closed:
            self._events = events
            self._loop.watch(self, events)

    def _wanted(self) -> int:
        # A connection that waits is read from as well, to notice when the client goes.
        full = self._behind or (self._parked and len(self._parser) >= self._max_held)
        reading = 0 if full or self._ended else EVENT_READ
        return reading | (EVENT_WRITE if self._unread_since != math.inf else 0)


def _only_below(message_id: int, answer: Answer[list[Message]]) -> Answer[list[Message]]:
    if isinstance(answer, Future):
        return answer
    return [message for message in answer if message.id < message_id]


def result_of(answer: Future[T]) -> T:
    """Return what a store has answered. Raises a ReplyError, whatever went wrong."""
    try:
        return answer.result()
    except ReplyError:
        raise
    except Exception as error:
        raise StoreFailed(str(error)) from error
