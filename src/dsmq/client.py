"""The client: put and get messages, from any thread.

    from dsmq.client import connect

    mq = connect(host="127.0.0.1", port=30008)
    mq.put("greetings", "hello")
    mq.get("greetings")

Importing it loads the standard library alone.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self, TypeGuard, TypeVar, Unpack, overload

from dsmq import session as wire
from dsmq.calls import Call, Once, Plain, Producer, Put, PutMany, Read, Request, Retries
from dsmq.errors import ClientClosed, DSMQError, ReplyError
from dsmq.link import Link, Security, target
from dsmq.protocol import Reply
from dsmq.session import Entry, Inbox, Message, Session, State

__all__ = ["DSMQClientSideConnection", "Message", "connect"]

# The schedule on which `connect` tries again, and which says how long `get_wait` waits: so many tries, the first
# of them after so many seconds, each pause twice the one before. Both may be adjusted.
_n_tries = 10
_initial_retry = 0.01


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

    timeout is how long a reply may take, in seconds, beyond the time that was asked to be waited; after it the
    connection counts as lost. While nothing answers there, it is tried again for about ten seconds, so that the
    server may still be starting; retry=False does without. verbose tells of that on stderr.

    A connection that breaks later is replaced behind the caller's back, and the call that noticed goes on: nothing is
    read twice or skipped, and no put is stored twice. A call that finds no server for reconnect_timeout seconds (0:
    at once) raises ConnectionLost. on_state_change is told of all that, in the thread of that call: see
    `dsmq.session.State`. It must not raise.

    token is what the server may ask for. tls=True encrypts, and verifies the server's certificate and that it is for
    this host; ca_file names authorities to trust in place of the system's, cert_file and key_file what to show of one's
    own (all in PEM format; each of them implies tls). An ssl.SSLContext does as it is told.

    Raises ConnectionRefusedError where there is no server, Busy where it has too many clients, AuthRequired or
    WrongToken without the right token, ConfigError where a file can't be used, another OSError where the address can't
    be reached or the certificate is not right.
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

    Threads may share it; each call has a connection for itself while it lasts. After `fork` the child goes on
    from where the parent was, as a client of its own.

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
        self.host = host
        self.port = port
        self._timeout = timeout
        self._reconnect_timeout = reconnect_timeout
        self._on_state_change = on_state_change
        # Whether it has no connection, as far as is known, and whether a call still tries.
        self._down: Literal["", "lost", "given up"] = ""
        self._say = _to_stderr if verbose else _to_nobody
        self._target = target(host, port, **security)
        self._session = Session(self._target.token)
        self._closed = False
        # Set when it is closed, for those who wait to try again.
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()
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
        puts = PutMany(self._session, topic, messages)
        try:
            self._run(puts, self._put_all)
            puts.check()
        except DSMQError as error:
            puts.count(error)
            raise
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

    @overload
    def get(self, topic: str, default: str = "", *, raw: Literal[False] = False) -> str: ...
    @overload
    def get(self, topic: str, default: D, *, raw: Literal[False] = False) -> str | D: ...
    @overload
    def get(self, topic: str, *, raw: Literal[True]) -> bytes: ...
    @overload
    def get(self, topic: str, default: D, *, raw: Literal[True]) -> bytes | D: ...
    def get(self, topic: str, default: object = "", *, raw: bool = False) -> object:
        """Return the oldest message of a topic that this client has not read, or `default` if there is none.

        It is a str; with raw=True it is bytes, and so is the default that is not given. Raises MessageNotText where the
        message is not UTF-8; it stays unread then.
        """
        return self._one(topic, 0.0, default, raw=raw)

    @overload
    def get_wait(
        self, topic: str, default: str = "", *, timeout: float | None = None, raw: Literal[False] = False
    ) -> str: ...
    @overload
    def get_wait(
        self, topic: str, default: D, *, timeout: float | None = None, raw: Literal[False] = False
    ) -> str | D: ...
    @overload
    def get_wait(self, topic: str, *, timeout: float | None = None, raw: Literal[True]) -> bytes: ...
    @overload
    def get_wait(self, topic: str, default: D, *, timeout: float | None = None, raw: Literal[True]) -> bytes | D: ...
    def get_wait(self, topic: str, default: object = "", *, timeout: float | None = None, raw: bool = False) -> object:
        """Like `get`, but wait for a message to come, for `timeout` seconds (math.inf is one of them).

        Without a timeout it waits about ten seconds: the sum of `_n_tries` pauses, the first of
        `_initial_retry` seconds and each twice the one before. That there was none is only said by a server: where that
        can't be reached at the end, this takes up to `reconnect_timeout` longer, and raises ConnectionLost.
        """
        return self._one(topic, patience() if timeout is None else timeout, default, raw=raw)

    @overload
    def get_latest(self, topic: str, default: str = "", *, raw: Literal[False] = False) -> str: ...
    @overload
    def get_latest(self, topic: str, default: D, *, raw: Literal[False] = False) -> str | D: ...
    @overload
    def get_latest(self, topic: str, *, raw: Literal[True]) -> bytes: ...
    @overload
    def get_latest(self, topic: str, default: D, *, raw: Literal[True]) -> bytes | D: ...
    def get_latest(self, topic: str, default: object = "", *, raw: bool = False) -> object:
        """Return the newest message of a topic that this client has not read, or `default` if there is none.

        The older ones are passed over: this client will not read them any more.
        """
        return first(self._latest(topic, wire.converter(raw=raw)), default, raw=raw)

    @overload
    def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[False] = False) -> list[str]: ...
    @overload
    def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[True]) -> list[bytes]: ...
    def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: bool = False) -> list[str] | list[bytes]:
        """Return up to `n` messages of a topic, oldest first: those that are there, or else wait for one.

        It stops short of a message that is not UTF-8; where that is the first, it raises MessageNotText.
        """
        if raw:
            return self._some(topic, n, timeout, wire.body)
        return self._some(topic, n, timeout, wire.text)

    def read(self, topic: str, n: int = 1, *, timeout: float = 0.0, latest: bool = False) -> list[Message]:
        """Return up to `n` messages with their ids, numbers and put times; otherwise like `get_many`.

        latest=True returns the newest only, and passes over the older ones, like `get_latest`.
        """
        if latest:
            return self._latest(topic, self._session.message)
        return self._some(topic, n, timeout, self._session.message)

    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[False] = False) -> Iterator[str]: ...
    @overload
    def messages(self, topic: str, *, timeout: float = ..., raw: Literal[True]) -> Iterator[bytes]: ...
    def messages(self, topic: str, *, timeout: float = math.inf, raw: bool = False) -> Iterator[str | bytes]:
        """Iterate over the messages of a topic as they come; end when none has come for `timeout` seconds."""
        while taken := self._some(topic, 1, timeout, wire.converter(raw=raw)):
            yield taken[0]

    def seek(self, topic: str, after: int) -> None:
        """Read a topic on behind the message with this id; 0 is before all that the server still holds.

        Raises ValueError where it is negative.
        """
        inbox = self._inbox(topic)
        with self._lock:
            inbox.seek(after, None, drop=True)

    @property
    def max_message_bytes(self) -> int:
        """The longest message the server takes."""
        return self._session.max_message_bytes

    @property
    def missed(self) -> int:
        """How many messages expired before this client came to them, over all topics it reads.

        In each they are counted from the first one that it got.
        """
        return self._session.missed

    def _inbox(self, topic: str) -> Inbox:
        inbox = self._session.inboxes.get(topic)
        if inbox is None:
            with self._lock:
                inbox = self._session.inbox(topic)
        return inbox

    def _one(self, topic: str, seconds: float, default: object, *, raw: bool) -> object:
        return first(self._some(topic, 1, seconds, wire.converter(raw=raw)), default, raw=raw)

    def _some(self, topic: str, n: int, seconds: float, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        """Take up to `n` messages; where there is none, wait for the first."""
        inbox = self._inbox(topic)
        until = time.monotonic() + seconds
        if n < 1:
            return []
        # All at once or, when no more come, what is here: a call that fails meanwhile must not have taken some.
        least, more = n, True
        while not (taken := self._take(inbox, n, convert, least)) and (more or time.monotonic() < until):
            more = bool(self._fetch(inbox, 0.0 if len(inbox) else until))
            least = n if more else 1
        return taken

    def _latest(self, topic: str, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        inbox = self._inbox(topic)
        self._fetch(inbox, latest=True)
        with self._lock:
            inbox.skip_to_latest()
        return self._take(inbox, 1, convert)

    def _take(self, inbox: Inbox, n: int, convert: Callable[[Inbox, Entry], T], least: int = 1) -> list[T]:
        with self._lock:
            return inbox.take(n, convert, least)

    def _fetch(self, inbox: Inbox, until: float = 0.0, *, latest: bool = False) -> list[Entry]:
        """Ask for what there is, or wait for it until a time on the monotonic clock."""
        read, reply = Read(inbox, until, latest=latest), None
        # Asked again where the position has been changed meanwhile: by `seek`, or by a new epoch.
        while read.generation != inbox.generation:
            reply = self._exchange(read)
        if reply == []:
            return []
        found = self._session.entries(reply)
        with self._lock:
            inbox.accept(found, generation=read.generation, latest=latest)
        return found

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
        self._drop(None, others=True)

    def _shut_down(self, link: Link, call: Once) -> None:
        if (why := link.look()) is not None:
            raise ConnectionResetError(why)
        wire.check(self._ask(link, call))
        link.await_end()

    def close(self) -> None:
        """Close the client. A call that another thread is waiting in raises ClientClosed. Idempotent."""
        self._closing.set()
        with self._lock:
            self._closed = True
            # Those in use are closed by the calls that use them.
            for link in self._links:
                link.interrupt()
            for link in self._idle:
                link.close()
            self._idle.clear()
            self._links.clear()

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
                    if self._down and isinstance(error, ReplyError):
                        self._announce("resumed" if link else "given up", error)
                    raise
                retries = retries or Retries(self._reconnect_timeout)
                if link is not None and call.lost(error):
                    retries.reset()
                self._pause(call, retries, error)
            else:
                self._give_back(link)
                if self._down:
                    # It had a connection that another thread has made.
                    self._announce("resumed")
                return result

    def _is_lost(self, error: BaseException, link: Link | None) -> TypeGuard[Exception]:
        """Give a connection up after an error; return whether that means that it has broken, or could not be made.

        Replies may be outstanding on it, and nobody else is to read them.
        """
        lost = wire.is_lost(error, connecting=link is None)
        self._drop(link, others=lost)
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
        if self._closing.wait(pause):
            raise ClientClosed("the client was closed during the call") from error

    def _announce(self, state: State, error: Exception | None = None) -> None:
        """Tell of a new state: of each loss once, and of each end of it."""
        with self._lock:
            if not wire.is_news(state, self._down):
                return
            self._down = state if state in ("lost", "given up") else ""
        if state != "lost" or self._reconnect_timeout:
            wire.log_state(state, self._target, error)
        if self._on_state_change is not None:
            self._on_state_change(state)

    def _borrow(self) -> Link:
        # Lists are safe to use from several threads.
        try:
            link = self._idle.pop()
        except IndexError:
            return self._link()
        why = link.ended()
        if why is None:
            return link
        self._drop(link, others=True)
        self._announce("lost", ConnectionResetError(why))
        return self._link()

    def _give_back(self, link: Link) -> None:
        self._idle.append(link)
        if self._closed:
            self.close()

    def _drop(self, link: Link | None, *, others: bool) -> None:
        """Close a connection, and the idle ones with it: where one has broken, they have most likely broken too."""
        with self._lock:
            useless = [link] if link else []
            # Taken one by one until there is none, because other threads take and give back meanwhile.
            with suppress(IndexError):
                while others:
                    useless.append(self._idle.pop())
            self._links.difference_update(useless)
        for one in useless:
            one.close()

    def _link(self) -> Link:
        if self._closed:
            raise ClientClosed("the client is closed")
        link = Link(self._target, self._timeout)
        try:
            reply = self._greeted(link)
            with self._lock:
                if self._closed:
                    raise ClientClosed("the client was closed during the call")
                state = self._session.greet(reply)
                link.producer = Producer(self._session.run)
                self._links.add(link)
        except BaseException:
            link.close()
            raise
        self._announce(state)
        return link

    def _greeted(self, link: Link) -> Reply:
        try:
            link.send(self._session.hello, self._timeout)
            return link.receive()
        except ConnectionResetError:
            if self._target.tls or self._session.epoch:
                raise
            raise ConnectionResetError("the server has closed the connection; does it want TLS?") from None

    def _first_link(self) -> Link:
        for pause in pauses():
            try:
                return self._link()
            except (ConnectionRefusedError, FileNotFoundError):
                time.sleep(pause)
                self._say("    ...trying again")
        return self._link()

    def _after_fork(self) -> None:
        # In the child, where other threads, which may have held the lock, do not exist. The sockets are the
        # parent's: closed here they stay open there.
        self._lock, self._closing = threading.Lock(), threading.Event()
        for link in self._links:
            link.close()
        self._links, self._idle = weakref.WeakSet(), []


def first(taken: Sequence[object], default: object, *, raw: bool) -> object:
    """Return the only message of a list, or the default; one that was not given fits what is read."""
    if taken:
        return taken[0]
    return b"" if raw and default == "" else default


def pauses() -> list[float]:
    """Return the pauses of the documented schedule, in seconds."""
    return [_initial_retry * 2**attempt for attempt in range(_n_tries)]


def patience() -> float:
    """Return how long `get_wait` waits, in seconds, unless it is told."""
    return sum(pauses())


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _to_nobody(line: str) -> None:
    """Say nothing."""


_clients: weakref.WeakSet[DSMQClientSideConnection] = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_clients):
        client._after_fork()  # noqa: SLF001 - one module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
