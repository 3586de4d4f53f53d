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
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Literal, Self, TypeVar, Unpack, overload

from dsmq import session as wire
from dsmq.errors import (
    ClientClosed,
    ConnectionLost,
    DSMQError,
    MessageNotText,
)
from dsmq.link import Link, Security, target
from dsmq.protocol import Reply
from dsmq.session import Entry, Inbox, Message, Session

__all__ = ["DSMQClientSideConnection", "Message", "connect"]

# The schedule on which `connect` tries again, and which says how long `get_wait` waits: so many tries, the first
# of them after so many seconds, each pause twice the one before. Both may be adjusted.
_n_tries = 10
_initial_retry = 0.01


D = TypeVar("D")
T = TypeVar("T")


def connect(
    host: str = "127.0.0.1",
    port: int = 30008,
    verbose: bool = False,  # noqa: FBT001, FBT002 - positional in dsmq 1.4
    *,
    timeout: float = 10.0,
    retry: bool = True,
    **security: Unpack[Security],
) -> DSMQClientSideConnection:
    """Connect to a server at an IPv4 or IPv6 address, a name, or `unix:/path`.

    timeout is how long a reply may take, in seconds, beyond the time that was asked to be waited; after it the
    connection counts as lost. While nothing answers there, it is tried again for about ten seconds, so that the
    server may still be starting; retry=False does without. verbose tells of that on stderr.

    token is what the server may ask for. tls=True encrypts, and verifies the server's certificate and that it is for
    this host; ca_file names authorities to trust in place of the system's, cert_file and key_file what to show of one's
    own (all in PEM format; each of them implies tls). An ssl.SSLContext does as it is told.

    Raises ConnectionRefusedError where there is no server, Busy where it has too many clients, AuthRequired or
    WrongToken without the right token, ConfigError where a file can't be used, another OSError where the address can't
    be reached or the certificate is not right.
    """
    return DSMQClientSideConnection(host, port, verbose, timeout=timeout, retry=retry, **security)


class DSMQClientSideConnection:
    """A client: a reader with a position of its own in each topic, and a writer. Made by `connect`.

    Threads may share it; each call has a connection for itself while it lasts. After `fork` the child goes on
    from where the parent was, as a client of its own.

    Every method may raise ConnectionLost when the connection breaks, ClientClosed after `close`, and a ReplyError
    where the server answers with one. See dsmq.errors.
    """

    def __init__(
        self,
        host: str,
        port: int,
        verbose: bool = False,  # noqa: FBT001, FBT002 - as in `connect`
        *,
        timeout: float = 10.0,
        retry: bool = True,
        **security: Unpack[Security],
    ) -> None:
        self.host = host
        self.port = port
        self._timeout = timeout
        self._say = _to_stderr if verbose else _to_nobody
        self._target = target(host, port, **security)
        self._session = Session(self._target.token)
        self._closed = False
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._links: set[Link] = set()
        self._say(f"connecting to the dsmq server at {host} port {port}")
        self._idle.append(self._first_link() if retry else self._link())
        _clients.add(self)

    def __repr__(self) -> str:
        return f"<dsmq client of {self.host} port {self.port}{', closed' if self._closed else ''}>"

    # Messages in

    def put(self, topic: str, msg: str | bytes) -> int:
        """Put a message into a topic; when this returns it is stored. Returns its id.

        Raises TooBig, or Full where the server has no room. After ConnectionLost it may or may not have been stored.
        """
        return wire.stored_id(self._exchange(self._session.put(topic, msg)))

    def put_many(self, topic: str, messages: Iterable[str | bytes]) -> list[int]:
        """Put several messages in order, much faster than one by one; returns their ids.

        When it raises, those before the one that failed have been stored, and some behind it may have been.
        """
        ids: list[int] = []
        with self._borrowed() as link:
            outstanding = 0
            batches = wire.Batches(self._session, topic, messages)
            for count, requests in batches:
                link.send(requests, self._timeout)
                # One batch is on its way while the replies to the one before are read.
                ids += [wire.stored_id(link.receive()) for _ in range(outstanding)]
                outstanding = count
            # Making the messages may have taken longer than the server may.
            link.renew()
            ids += [wire.stored_id(link.receive()) for _ in range(outstanding)]
        batches.check()
        return ids

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
        `_initial_retry` seconds and each twice the one before.
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
        """Read a topic on behind the message with this id; 0 is before all that the server still holds."""
        inbox = self._session.inbox(topic)
        with self._lock:
            inbox.drop()
            inbox.seek(after, None)

    @property
    def max_message_bytes(self) -> int:
        """The longest message the server takes."""
        return self._session.max_message_bytes

    @property
    def missed(self) -> int:
        """How many messages expired before this client came to them, over all topics it reads."""
        return self._session.missed

    def _one(self, topic: str, seconds: float, default: object, *, raw: bool) -> object:
        return first(self._some(topic, 1, seconds, wire.converter(raw=raw)), default, raw=raw)

    def _some(self, topic: str, n: int, seconds: float, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        """Take up to `n` messages; where there is none, wait for the first."""
        inbox = self._session.inbox(topic)
        taken: list[T] = []
        until = time.monotonic() + seconds
        try:
            self._take(inbox, n, taken, convert)
            while len(taken) < n:
                left = 0.0 if taken else until - time.monotonic()
                found = self._fetch(inbox, min(max(left, 0.0), wire.MAX_WAIT_SECONDS))
                # Another thread may be faster to take what was fetched here; then there may be more to fetch.
                self._take(inbox, n, taken, convert)
                if not found and (taken or time.monotonic() >= until):
                    break
        except MessageNotText:
            if not taken:
                raise
        return taken

    def _latest(self, topic: str, convert: Callable[[Inbox, Entry], T]) -> list[T]:
        inbox = self._session.inbox(topic)
        self._fetch(inbox, latest=True)
        with self._lock:
            inbox.skip_to_latest()
        taken: list[T] = []
        self._take(inbox, 1, taken, convert)
        return taken

    def _take(self, inbox: Inbox, n: int, taken: list[T], convert: Callable[[Inbox, Entry], T]) -> None:
        """Take messages that are here already, until there are `n`."""
        with self._lock:
            inbox.take(n, taken, convert)

    def _fetch(self, inbox: Inbox, seconds: float = 0.0, *, latest: bool = False) -> list[Entry]:
        generation, reply = -1, None
        # Asked again where the position has been changed meanwhile: by `seek`, or by a new epoch.
        while generation != inbox.generation:
            generation = inbox.generation
            reply = self._exchange(inbox.request(round(seconds * 1000), latest=latest), seconds)
        if reply == []:
            return []
        found = self._session.entries(reply)
        with self._lock:
            inbox.accept(found, generation=generation, latest=latest)
        return found

    # The server, and the end

    def ping(self) -> None:
        """Ask the server for a sign of life; raises where there is none."""
        wire.check(self._exchange(wire.PING))

    def topics(self) -> list[tuple[str, int, int]]:
        """Return the topics that hold messages: name, messages and bytes held."""
        found: list[tuple[str, int, int]] = []
        while page := wire.topics(self._exchange(wire.topics_request(found))):
            found += page
        return found

    def shutdown_server(self) -> None:
        """Stop the server gracefully; return when it has closed the connection.

        Raises NotPermitted where the server's configuration forbids it.
        """
        with self._borrowed() as link:
            link.send(wire.SHUTDOWN, self._timeout)
            wire.check(link.receive())
            link.await_end()

    def close(self) -> None:
        """Close the client. A call that another thread is waiting in raises ClientClosed. Idempotent."""
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

    def _exchange(self, request: bytes, seconds: float = 0.0) -> Reply:
        """Send a request that the server may take so many seconds to answer; return its reply."""
        link = self._borrow()
        try:
            link.send(request, seconds + self._timeout)
            reply = link.receive()
        except BaseException as error:
            self._drop(link, error)
            raise
        self._give_back(link)
        return reply

    @contextmanager
    def _borrowed(self) -> Iterator[Link]:
        """A connection for a call; if that fails, replies may be outstanding, and nobody else is to read them."""
        link = self._borrow()
        try:
            yield link
        except BaseException as error:
            self._drop(link, error)
            raise
        self._give_back(link)

    def _borrow(self) -> Link:
        # Lists are safe to use from several threads.
        try:
            return self._idle.pop()
        except IndexError:
            return self._link()

    def _give_back(self, link: Link) -> None:
        self._idle.append(link)
        if self._closed:
            self.close()

    def _drop(self, link: Link, error: BaseException) -> None:
        """Give a connection up; what is wrong with it is told as ClientClosed or ConnectionLost."""
        lost = isinstance(error, OSError) and not isinstance(error, DSMQError)
        with self._lock:
            useless = [link]
            # Where one has broken, those that lie idle have most likely broken too. Taken one by one until there is
            # none, because other threads take and give back meanwhile.
            with suppress(IndexError):
                while lost:
                    useless.append(self._idle.pop())
            self._links.difference_update(useless)
        for one in useless:
            one.close()
        if lost:
            if self._closed:
                raise ClientClosed("the client was closed during the call") from error
            raise ConnectionLost(str(error)) from error

    def _link(self) -> Link:
        if self._closed:
            raise ClientClosed("the client is closed")
        link = Link(self._target, self._timeout)
        try:
            reply = self._greeted(link)
            with self._lock:
                if self._closed:
                    raise ClientClosed("the client was closed during the call")
                self._session.greet(reply)
                self._links.add(link)
        except BaseException:
            link.close()
            raise
        return link

    def _greeted(self, link: Link) -> Reply:
        try:
            link.send(self._session.hello, self._timeout)
            return link.receive()
        except ConnectionResetError:
            if self._target.tls:
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
        self._lock = threading.Lock()
        for link in self._links:
            link.close()
        self._links, self._idle = set(), []


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
