"""The client: put and get messages, from any thread.

    from dsmq.client import connect

    mq = connect(host="127.0.0.1", port=30008)
    mq.put("greetings", "hello")
    mq.get("greetings")

Importing it loads the standard library alone.
"""

from __future__ import annotations

import _thread
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Generic, Literal, Self, TypeGuard, TypeVar, Unpack, overload

from dsmq.client import arguments
from dsmq.client import requests as calls
from dsmq.client import session as wire
from dsmq.client.connection import ClosedSilently, Link, Security, closed_silently, target
from dsmq.client.reader import Claim, Entry, Inbox
from dsmq.client.requests import Call, Once, Plain, Producer, Put, PutMany, Reading, Request, Retries
from dsmq.client.session import Message, Session, State
from dsmq.errors import ClientClosed, ReplyError
from dsmq.system import process
from dsmq.wire.resp import Reply

__all__ = ["DSMQClientSideConnection", "Message", "connect"]

# The schedule on which `connect` tries again, and which says how long `get_wait` waits: so many tries, the first
# of them after so many seconds, each pause twice the one before. Both may be adjusted.
_n_tries = 10
_initial_retry = 0.01
# The name of the first in the code of dsmq 1.4; the one above is that in its documentation.
_n_retries = _N_RETRIES = _n_tries

# Of several connections that nobody has used for so long all but one are closed.
IDLE_SECONDS = 5.0


C = TypeVar("C", bound=Call)
D = TypeVar("D")
T = TypeVar("T")


def connect(  # noqa: PLR0913 - each may be wanted
    host: str = "127.0.0.1",
    port: int = 30008,
    verbose: bool = False,  # noqa: FBT001, FBT002 - positional in dsmq 1.4
    *,
    timeout: float = 10.0,
    retry: bool = True,
    reconnect_timeout: float = 30.0,
    on_state_change: Callable[[State], None] | None = None,
    **security: Unpack[Security],
) -> DSMQClientSideConnection:
    """Connect to a server at an IPv4 or IPv6 address, a name, or `unix:/path`.

    timeout is how long a reply may take to begin, in seconds, beyond the time that was asked to be waited, and how long
    it may pause; after it the connection counts as lost. All addresses of a name are tried, a new one every 0.25 s.
    While nothing answers, or connections are closed at once, it is tried again for about ten seconds, so that the
    server may still be starting; retry=False does without. verbose tells of that on stderr.

    A connection that breaks later is replaced behind the caller's back, and the call that noticed goes on: nothing is
    read twice or skipped, and no put is stored twice. A call that finds no server for reconnect_timeout seconds (0:
    at once) raises ConnectionLost. on_state_change is told of all that, in the thread of that call: see
    `dsmq.client.session.State`. It must not raise.

    token is what the server may ask for. tls=True encrypts, and verifies the server's certificate and that it is for
    this host; ca_file names authorities to trust in place of the system's, cert_file and key_file what to show of one's
    own (all in PEM format; each of them implies tls). An ssl.SSLContext does as it is told.

    Raises ConnectionRefusedError if there is no server, ProtocolError if another program answers, Busy if the server
    has too many clients, AuthRequired or WrongToken without the right token, ConfigError if a file can't be used,
    another OSError if the address can't be reached or the certificate is not right; TypeError or ValueError at once if
    an argument makes no sense.
    """
    return DSMQClientSideConnection(
        host,
        port,
        verbose,
        timeout=timeout,
        retry=retry,
        reconnect_timeout=reconnect_timeout,
        on_state_change=on_state_change,
        **security,
    )


class DSMQClientSideConnection:
    """A client: a reader with a position of its own in each topic, and a writer. Made by `connect`.

    Threads may share it, and signal handlers may call it; each call has a connection for itself while it lasts. A call
    that a handler interrupts by raising leaves what it has not returned unread. After a fork, by whatever means, the
    child goes on from where the parent was, as a client of its own.

    Every method may raise ConnectionLost when the server can't be reached any more, ClientClosed after `close`, and a
    ReplyError where the server answers with one. See dsmq.errors.
    """

    def __init__(  # noqa: PLR0913 - as `connect`
        self,
        host: str,
        port: int,
        verbose: bool = False,  # noqa: FBT001, FBT002 - as in `connect`
        *,
        timeout: float = 10.0,
        retry: bool = True,
        reconnect_timeout: float = 30.0,
        on_state_change: Callable[[State], None] | None = None,
        **security: Unpack[Security],
    ) -> None:
        self._timeout, self._reconnect_timeout = arguments.options(timeout, reconnect_timeout, on_state_change)
        self._target = target(host, port, **security)
        self.host = host
        self.port = port
        self._on_state_change = on_state_change
        self._states = _States()
        self._say = _to_stderr if verbose else _to_nobody
        self._session = Session(self._target.token)
        self._closed = False
        # Released when it is closed, for calls that wait to try again. No Event: its lock would hang a signal handler
        # that closes the client.
        self._closing = _thread.allocate_lock()
        self._closing.acquire()
        self._process = process()
        self._idle: list[Link] = []
        self._refs: set[weakref.ref[Link]] = set()
        self._is_tidying = False
        self._say(f"connecting to the dsmq server at {host} port {port}")
        self._idle.append(self._first_link() if retry else self._link())
        _clients.add(self)

    def __repr__(self) -> str:
        return f"<dsmq client of {self._target}{', closed' if self._closed else ''}>"

    # Messages in

    def put(self, topic: str, msg: str | bytes) -> int:
        """Put a message into a topic; when this returns it is stored. Returns its id.

        Raises TooBig, or Full where the server has no room; ConnectionLost, whose may_be_stored says whether it may
        have been stored nevertheless; Forgotten where that can't be told.
        """
        return wire.stored_id(self._exchange(Put(self._session, topic, msg)))

    def put_many(self, topic: str, messages: Iterable[str | bytes]) -> list[int]:
        """Put several messages in order, much faster than one by one; returns their ids.

        They are sent in batches, of some hundred or of what an iterator has given in 0.1 seconds: one may wait for the
        next.

        When it raises, those before the one that failed have been stored, and some behind it may have been: the error's
        stored_before and stored_behind say how many. It raises as `put` does.
        """
        with PutMany(self._session, topic, arguments.messages(messages)) as puts:
            self._run(puts, self._put_all)
            puts.check()
        return puts.ids

    def _put_all(self, link: Link, puts: PutMany) -> None:
        outstanding = 0
        for count, requests in puts.batches(link.producer):
            if count:
                link.send(requests, self._timeout)
            else:
                link.renew()
            # One batch is on its way while the replies to the one before are read.
            for _ in range(outstanding):
                puts.answered(link.receive())
            outstanding = count
            if not count and (why := link.look()) is not None:
                raise ConnectionResetError(why)
        # Making the messages may have taken longer than the server may.
        link.renew()
        for _ in range(outstanding):
            puts.answered(link.receive())

    # Messages out

    # Each of these gives back what it has taken, wherever it is interrupted before it returns: it appends to a list,
    # which is one step from where it was interrupted, so that no second interrupt comes between.

    @overload
    def get(self, topic: str, *, default: str = "", raw: Literal[False] = False) -> str: ...
    @overload
    def get(self, topic: str, *, default: D, raw: Literal[False] = False) -> str | D: ...
    @overload
    def get(self, topic: str, *, raw: Literal[True]) -> bytes: ...
    @overload
    def get(self, topic: str, *, default: D, raw: Literal[True]) -> bytes | D: ...
    def get(self, topic: str, *, default: object = "", raw: bool = False) -> object:
        """Return the oldest message of a topic that this client has not read, or `default` if there is none.

        It is a str; with raw=True it is bytes, and so is the default that is not given. Raises MessageNotText where the
        message is not UTF-8; it stays unread then.
        """
        claim: Claim = []
        try:
            return first(self._some(claim, topic, 1, 0.0, wire.converter(raw=raw)), default, raw=raw)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    @overload
    def get_wait(
        self, topic: str, *, default: str = "", timeout: float | None = None, raw: Literal[False] = False
    ) -> str: ...
    @overload
    def get_wait(
        self, topic: str, *, default: D, timeout: float | None = None, raw: Literal[False] = False
    ) -> str | D: ...
    @overload
    def get_wait(self, topic: str, *, timeout: float | None = None, raw: Literal[True]) -> bytes: ...
    @overload
    def get_wait(self, topic: str, *, default: D, timeout: float | None = None, raw: Literal[True]) -> bytes | D: ...
    def get_wait(self, topic: str, *, default: object = "", timeout: float | None = None, raw: bool = False) -> object:
        """Like `get`, but wait for a message to come, for `timeout` seconds (0: not at all; math.inf: for ever).

        Without a timeout it waits about ten seconds: the sum of `_n_tries` pauses, the first of
        `_initial_retry` seconds and each twice the one before. That there was none is only said by a server: where that
        can't be reached at the end, this takes up to `reconnect_timeout` longer, and raises ConnectionLost.
        """
        claim: Claim = []
        try:
            seconds = patience() if timeout is None else arguments.seconds("timeout", timeout)
            return first(self._some(claim, topic, 1, seconds, wire.converter(raw=raw)), default, raw=raw)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    @overload
    def get_latest(self, topic: str, *, default: str = "", raw: Literal[False] = False) -> str: ...
    @overload
    def get_latest(self, topic: str, *, default: D, raw: Literal[False] = False) -> str | D: ...
    @overload
    def get_latest(self, topic: str, *, raw: Literal[True]) -> bytes: ...
    @overload
    def get_latest(self, topic: str, *, default: D, raw: Literal[True]) -> bytes | D: ...
    def get_latest(self, topic: str, *, default: object = "", raw: bool = False) -> object:
        """Return the newest message of a topic that this client has not read, or `default` if there is none.

        The older ones are passed over: this client will not read them any more.
        """
        claim: Claim = []
        try:
            convert = wire.converter(raw=raw)
            return first(self._latest(claim, topic, convert), default, raw=raw)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    @overload
    def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[False] = False) -> list[str]: ...
    @overload
    def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[True]) -> list[bytes]: ...
    def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: bool = False) -> list[str] | list[bytes]:
        """Return up to `n` messages of a topic, oldest first: those that are there, or else wait for one.

        It stops short of a message that is not UTF-8; where that is the first, it raises MessageNotText.
        """
        claim: Claim = []
        try:
            if raw:
                return self._many(claim, topic, n, timeout, wire.body)
            return self._many(claim, topic, n, timeout, wire.text)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    def read(self, topic: str, n: int = 1, *, timeout: float = 0.0, latest: bool = False) -> list[Message]:
        """Return up to `n` messages with their ids, numbers and put times; otherwise like `get_many`.

        latest=True returns the newest only, and passes over the older ones, like `get_latest`.
        """
        claim: Claim = []
        try:
            if latest and arguments.count("n", n):
                arguments.seconds("timeout", timeout)
                return self._latest(claim, topic, self._session.message)
            return self._many(claim, topic, n, timeout, self._session.message)
        except BaseException:
            self._session.returned.append((claim, []))
            raise

    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[False] = False) -> Iterator[str]: ...
    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[True]) -> Iterator[bytes]: ...
    def messages(self, topic: str, *, timeout: float = math.inf, raw: bool = False) -> Iterator[str] | Iterator[bytes]:
        """Iterate over the messages of a topic as they come; end when none has come for `timeout` seconds."""
        seconds = arguments.seconds("timeout", timeout)
        self._session.inbox(topic)
        if raw:
            return _Messages(self, topic, seconds, wire.body)
        return _Messages(self, topic, seconds, wire.text)

    def position(self, topic: str) -> str:
        """Return where this client has read a topic to: behind the last message that was handed out.

        It can be stored, and given to `seek` of any client, for this topic or another.
        """
        return self._session.position(topic)

    def seek(self, topic: str, position: str | int) -> None:
        """Read a topic on from a position, or behind the message with an id; 0 is before all that the server has.

        A position of another epoch, before the server lost its messages, is of no use: the topic is read from its
        oldest message then, and on_state_change is told `replaced`. An id above all that the server has ever given is
        an error of the next read, BadRequest. Raises ValueError if it is neither a position nor an id.
        """
        if not self._session.seek(topic, position) and self._on_state_change is not None:
            self._on_state_change("replaced")

    def forget(self, topic: str) -> None:
        """Forget how far a topic was read, to save memory. If it is read again, all is new that was when it connected.

        Topics in which nothing comes any more are forgotten anyway, when all that was read there has expired.
        """
        self._session.forget(topic)

    @property
    def max_message_bytes(self) -> int:
        """The longest message that the server took when this client connected."""
        return self._session.max_message_bytes

    @property
    def missed(self) -> int:
        """How many messages expired before this client came to them, over all topics it reads.

        In each they are counted from the first one that it got.
        """
        return self._session.missed

    def _many(self, claim: Claim, topic: str, n: int, timeout: float, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        return self._some(claim, topic, arguments.count("n", n), arguments.seconds("timeout", timeout), convert)

    def _some(self, claim: Claim, topic: str, n: int, seconds: float, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        """Take up to `n` messages; where there is none, wait for the first."""
        inbox = self._session.inbox(topic)
        taken = inbox.take(claim, n, convert) if n else []
        if len(taken) < n:
            self._read(calls.some(self._session, inbox, claim, taken, n, seconds, convert))
        return taken

    def _latest(self, claim: Claim, topic: str, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        taken: list[T] = []
        self._read(calls.latest(self._session, claim, taken, topic, convert))
        return taken

    def _read(self, reading: Reading) -> None:
        """Make the calls that reading takes."""
        while (call := next(reading, None)) is not None:
            call.reply = self._exchange(call)

    # The server, and the end

    def ping(self) -> None:
        """Ask the server for a sign of life; raises where there is none."""
        wire.check(self._exchange(Plain(wire.PING)))

    def topics(self) -> list[tuple[str, int, int]]:
        """Return the topics that hold messages: name, messages and bytes held."""
        found: list[tuple[str, int, int]] = []
        while page := wire.topics(self._exchange(Plain(wire.topics_request(found)))):
            found += page
        return found

    def shutdown_server(self) -> None:
        """Stop the server gracefully; return when it has closed the connection.

        Raises NotPermitted where the server's configuration forbids it.
        """
        self._run(Once(wire.SHUTDOWN), self._shut_down)
        # None is worth to be looked at again.
        self._close_idle()

    def _shut_down(self, link: Link, call: Once) -> None:
        if (why := link.look()) is not None:
            raise ConnectionResetError(why)
        wire.check(self._ask(link, call))
        link.await_end()

    def close(self) -> None:
        """Close the client. A call that another thread is waiting in raises ClientClosed. Idempotent."""
        self._closed = True
        with suppress(RuntimeError):
            self._closing.release()
        # Those in use are closed by the calls that use them.
        for link in self._links:
            link.interrupt()
        self._close_idle()

    @property
    def _links(self) -> list[Link]:
        """All connections, those in use and idle ones."""
        return [link for ref in list(self._refs) if (link := ref()) and link.is_open]

    def _close_idle(self) -> None:
        # Taken one by one until there is none, because other threads take and give back meanwhile.
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Connections

    def _exchange(self, call: Request) -> Reply:
        """Make a request and return its reply."""
        return self._run(call, self._ask)

    def _ask(self, link: Link, call: Request) -> Reply:
        link.send(call.request(link.producer), call.seconds + self._timeout)
        return link.receive()

    def _run(self, call: C, attempt: Callable[[Link, C], T]) -> T:
        """Do something on a connection, and while they break on the next."""
        retries = None
        while True:
            link = None
            try:
                link = self._borrow()
                result = attempt(link, call)
            except BaseException as error:
                if not self._is_lost(error, link):
                    if self._states.last[0] and isinstance(error, ReplyError):
                        self._announce("resumed" if link else "given up", error)
                    raise
                retries = retries or Retries(self._reconnect_timeout)
                if link is not None and call.lost(error):
                    retries.reset()
                self._pause(call, retries, error)
            else:
                self._give_back(link)
                if self._states.last[0]:
                    # It had a connection that another thread has made.
                    self._announce("resumed")
                return result

    def _is_lost(self, error: BaseException, link: Link | None) -> TypeGuard[Exception]:
        """Give a connection up after an error; return whether that means that it has broken, or could not be made.

        Replies may be outstanding on it, and nobody else is to read them.
        """
        lost = wire.is_lost(error, connecting=link is None)
        if link:
            link.close()
        if lost:
            # They have most likely broken too.
            self._close_idle()
        if lost and self._closed:
            raise ClientClosed("the client was closed during the call") from error
        return lost

    def _pause(self, call: Call, retries: Retries, error: Exception) -> None:
        """Wait until it is time for the next attempt. Raises ConnectionLost where there is to be none."""
        self._announce("lost", error)
        pause = retries.pause()
        if pause is None:
            self._announce("given up", error)
            raise call.given_up(error) from error
        if self._closing.acquire(timeout=pause):
            # For the next that waits.
            self._closing.release()
        if self._closed:
            raise ClientClosed("the client was closed during the call") from error

    def _announce(self, state: State, error: Exception | None = None) -> None:
        """Tell of a new state: of each loss once, and of each end of it."""
        if not self._states.enter(state):
            return
        if state != "lost" or self._reconnect_timeout:
            wire.log_state(state, self._target, error)
        if self._on_state_change is not None:
            self._on_state_change(state)

    def _borrow(self) -> Link:
        if process() is not self._process:
            self._after_fork()
        # Lists are safe to use from several threads.
        try:
            link = self._idle.pop()
        except IndexError:
            return self._link()
        why = link.ended()
        if why is None:
            return link
        link.close()
        self._close_idle()
        self._announce("lost", ConnectionResetError(why))
        return self._link()

    def _give_back(self, link: Link) -> None:
        self._idle.append(link)
        if self._closed:
            self.close()
        elif len(self._idle) > 1 and not self._is_tidying:
            try:
                _thread.start_new_thread(_tidy, (weakref.ref(self),))
                self._is_tidying = True
            except RuntimeError:
                # There are too many threads, or the program ends: what was achieved must not seem to have failed.
                with suppress(IndexError):
                    self._idle.pop(0).close()

    def _close_unused(self) -> bool:
        """Close connections that nobody has used for a while, but one; return whether there are more."""
        before = time.monotonic() - IDLE_SECONDS
        with suppress(IndexError):
            # The first was used the longest ago.
            while len(self._idle) > 1 and self._idle[0].used_at < before:
                self._idle.pop(0).close()
        return len(self._idle) > 1 and not self._closed

    def _link(self) -> Link:
        if self._closed:
            raise ClientClosed("the client is closed")
        link = self._open()
        try:
            reply = link.greet(self._session.hello)
            if self._closed:
                raise ClientClosed("the client was closed during the call")
            state, era = self._session.meet(reply)
            link.producer = Producer(era.run, era)
            # A call that is interrupted may let go of it anywhere.
            self._refs.add(weakref.ref(link, self._refs.discard))
            if self._closed:
                raise ClientClosed("the client was closed during the call")
        except BaseException as error:
            link.close()
            if isinstance(error, ConnectionResetError) and not self._session.epoch:
                raise closed_silently(self._target) from None
            raise
        self._announce(state)
        return link

    def _open(self) -> Link:
        try:
            return Link(self._target, self._timeout)
        except ConnectionResetError:
            if self._session.epoch:
                raise
            raise closed_silently(self._target) from None

    def _first_link(self) -> Link:
        until = time.monotonic() + patience()
        for pause in pauses():
            try:
                return self._link()
            except (ConnectionRefusedError, FileNotFoundError, ClosedSilently):
                if time.monotonic() > until:
                    raise
                time.sleep(pause)
                self._say("    ...trying again")
        return self._link()

    def _after_fork(self) -> None:
        # The sockets are the parent's: closed here they stay open there.
        links, self._refs, self._idle = self._links, set(), []
        self._closing, self._is_tidying = _thread.allocate_lock(), False
        self._closing.acquire()
        for link in links:
            link.close()
        self._process = process()


class _Messages(Generic[T]):
    """Iterates over the messages of a topic. Not a generator, which an interrupt would end."""

    def __init__(
        self,
        client: DSMQClientSideConnection,
        topic: str,
        seconds: float,
        convert: Callable[[Inbox, Entry], T],
    ) -> None:
        self._client, self._topic, self._seconds, self._convert = client, topic, seconds, convert
        self._is_over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        claim: Claim = []
        try:
            return self._next(claim)
        except BaseException:
            self._client._session.returned.append((claim, []))  # noqa: SLF001
            raise

    def _next(self, claim: Claim) -> T:
        if not self._is_over:
            for message in self._client._some(claim, self._topic, 1, self._seconds, self._convert):  # noqa: SLF001
                return message
        self._is_over = True
        raise StopIteration


class _States:
    """What was told last of the connection. It is superseded as a whole: see `dsmq.client.reader`."""

    def __init__(self) -> None:
        self.last: tuple[Literal["", "lost", "given up"], dict[int, object]] = "", {}
        """Whether there is no connection, as far as is known, and whether a call still tries; and what came next."""

    def enter(self, state: State) -> bool:
        """Enter a state; return whether it is to be told."""
        while True:
            last = self.last
            if not wire.is_news(state, last[0]):
                return False
            new: tuple[Literal["", "lost", "given up"], dict[int, object]]
            new = (state if state in ("lost", "given up") else "", {})
            if last[1].setdefault(0, new) is new:
                self.last = new
                return True
            self.last = last[1][0]  # type: ignore[assignment]


def _tidy(ref: weakref.ref[DSMQClientSideConnection]) -> None:
    """Close the connections that a burst of threads has left, in a thread of its own as long as there are some."""
    more = True
    while more:
        time.sleep(IDLE_SECONDS / 5)
        client = ref()
        more = client is not None and client._close_unused()  # noqa: SLF001 - one module
        if client and not more:
            client._is_tidying = False  # noqa: SLF001
            if len(client._idle) > 1 and not client._closed:  # noqa: SLF001
                # Given back in between.
                more = client._is_tidying = True  # noqa: SLF001
        del client


def first(taken: Sequence[object], default: object, *, raw: bool) -> object:
    """Return the only message of a list, or the default; one that was not given fits what is read."""
    if taken:
        return taken[0]
    return b"" if raw and default == "" else default


def pauses() -> list[float]:
    """Return the pauses of the documented schedule, in seconds."""
    return [_initial_retry * 2**attempt for attempt in range(_tries())]


def patience() -> float:
    """Return how long `get_wait` waits by default: the sum of the pauses, in seconds."""
    return _initial_retry * ((1 << _tries()) - 1)


def _tries() -> int:
    return _n_tries if _n_retries == _N_RETRIES else _n_retries


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _to_nobody(line: str) -> None:
    """Say nothing."""


_clients: weakref.WeakSet[DSMQClientSideConnection] = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_clients):
        client._after_fork()  # noqa: SLF001 - one module


# A call notices by itself that it is in another process. This lets go of the parent's sockets earlier.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
