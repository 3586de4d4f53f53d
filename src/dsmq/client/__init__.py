"""The client: put and get messages, from any thread.

    from dsmq.client import connect

    mq = connect(host="127.0.0.1", port=30008)
    mq.put("greetings", "hello")
    mq.get("greetings")

Importing it loads only the standard library.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from dsmq.client import arguments, replies, requests
from dsmq.client.connection import Connection
from dsmq.client.core import NOT_STARTED, Options, Retries
from dsmq.client.jobs import Job, leave_all
from dsmq.client.message import Message
from dsmq.client.pool import Pool
from dsmq.client.reader import Claim
from dsmq.client.replies import check, stored_id
from dsmq.client.requests import ALL, Call, NonIdempotent, Put, PutMany, Retryable, list_topics, read
from dsmq.client.session import PING, SHUTDOWN, State
from dsmq.client.worker import Worker

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["DSMQClientSideConnection", "Job", "Message", "connect"]

# The retry schedule of dsmq 1.4: the number of delays and the first one in seconds; each delay is twice the previous
# one. Their sum is how long `connect` waits for a server to start, and the default timeout of `get_wait`. Both may be
# adjusted.
_n_tries = 10
_initial_retry = 0.01
# The name in the code of dsmq 1.4, whose documentation uses the name above.
_n_retries = _N_RETRIES = _n_tries

C = TypeVar("C", bound=Retryable)
D = TypeVar("D")
T = TypeVar("T")


def connect(  # noqa: PLR0913 - listed one by one for help() and editors
    host: str | Sequence[str] = arguments.DEFAULT_HOST,
    port: int = 30008,
    verbose: bool = False,  # noqa: FBT001, FBT002 - positional in dsmq 1.4
    *,
    retry: bool = True,
    timeout: float = 10.0,
    reconnect_timeout: float = 30.0,
    on_state_change: Callable[[State], None] | None = None,
    name: str | None = None,
    start: str | int | None = None,
    token: str | None = None,
    tls: bool | SSLContext = False,
    ca_file: str | None = None,
    cert_file: str | None = None,
    key_file: str | None = None,
) -> DSMQClientSideConnection:
    """Connect to a server at an IPv4 or IPv6 address, a host name, or `unix:/path`.

    host may name several servers, in a list or separated by commas, each optionally with its own port. Default: the
    environment variable DSMQ_SERVER, else DSMQ_HOST, else 127.0.0.1. If several servers share a store, the client uses
    any of them and switches to the next one when its server fails. If they don't, each connection is made to the first
    reachable one, and the client has a separate position at each.

    timeout: the connection counts as lost if no part of an expected reply arrives for this many seconds, plus the time
    that a call asks the server to wait. All addresses of a host name are tried, a new one every 0.25 s. If nothing is
    listening, or connections are closed immediately, the server may still be starting: unless retry=False, `connect`
    tries again for about ten seconds. verbose logs this to stderr.

    A connection that breaks later is replaced, and calls continue: nothing is read twice or skipped, and no put is
    stored twice. A call raises ConnectionLost if the server stays unreachable for reconnect_timeout seconds (0: don't
    reconnect). on_state_change is called with each new state, in the thread of the call that noticed it: see
    `dsmq.client.session.State`. It must not raise.

    name identifies this client on the server's status page and in its logs: up to 64 printable ASCII characters, no
    spaces. Default: the program's name and process id.

    start sets where reading of each topic begins: "oldest", or a position as returned by `position`. By default, it
    begins with the first message put after the client connected.

    token authenticates the client. tls=True encrypts and verifies the server's certificate for this host; ca_file
    replaces the system's authorities; cert_file and key_file are the client's own certificate. The files are in PEM
    format; each implies tls. tls may also be an ssl.SSLContext.

    Raises ConnectionRefusedError if there is no server, ProtocolError if another program answers, Busy if the server
    has too many clients, AuthRequired or WrongToken without the right token, ConfigError if a file can't be used,
    another OSError if the address can't be reached or the certificate is invalid, and TypeError or ValueError, before
    connecting, if an argument is invalid.
    """
    return DSMQClientSideConnection(**locals())


def wait_seconds(timeout: float | None) -> float:
    """Return how long to wait for a message. Raises TypeError or ValueError if the timeout is invalid."""
    return default_wait() if timeout is None else arguments.seconds("timeout", timeout)


class DSMQClientSideConnection(Worker):
    """A client, with its own position in each topic. Made by `connect`.

    Threads may share it, and signal handlers may call it: each call has its own connection. If a signal handler
    interrupts a call by raising, the messages that it would have returned stay unread. After a fork, the child is a
    separate client that continues at the parent's positions. A client that is pickled, for example to pass it to a
    spawned process, becomes a new client there, with the same arguments, that starts when it connects. The pickle
    contains the token.

    Every method may raise ConnectionLost if the server is unreachable, ClientClosed after `close`, and a ReplyError if
    the server replies with one. See dsmq.errors.
    """

    def __init__(
        self,
        host: str | Sequence[str],
        port: int,
        verbose: bool = False,  # noqa: FBT001, FBT002 - as in `connect`
        *,
        retry: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(host, port, options)
        self._pool = Pool(self._core)
        self._verbose, self._retry = verbose, arguments.flag("retry", retry)
        self._log(f"connecting to the dsmq server at {self._core.endpoint}")
        self._pool.give_back(self._connect_at_start(Retries(default_wait() if retry else 0.0)))

    def put(self, topic: str, msg: str | bytes) -> int:
        """Put a message into a topic; it is stored when this returns. Returns its id.

        Raises TooBig, or Full if the server has no room. ConnectionLost.may_be_stored says whether the message may have
        been stored; after Forgotten, it may have been stored, too.
        """
        self._run(put := Put(arguments.topic_name(topic), arguments.message(msg)))
        return stored_id(put.reply)

    def put_many(self, topic: str, messages: Iterable[str | bytes]) -> list[int]:
        """Put several messages in order, much faster than one by one; returns their ids.

        They are sent in batches of up to 500 messages or 256 KiB, or of what an iterator yields in 0.1 seconds.

        Raises what `put` raises. The messages before the one that failed have been stored, and some after it, up to the
        end of the next batch, may have been: the error's stored_before and stored_after count them.
        """
        with PutMany(arguments.topic_name(topic), messages) as puts:
            self._run(puts, Connection.ask_all)
        return puts.ids

    @overload
    def get(self, topic: str, *, default: D = ..., raw: Literal[False] = False) -> str | D: ...
    @overload
    def get(self, topic: str, *, default: D = ..., raw: Literal[True]) -> bytes | D: ...
    def get(self, topic: str, *, default: str | D = "", raw: bool = False) -> str | bytes | D:
        """Return the oldest message of a topic that this client has not read, or `default` if there is none.

        With raw=True, messages are bytes, and the default is b"". Raises MessageNotText if the message is not UTF-8; it
        stays unread.
        """
        return self._read(topic, 1, 0.0, raw, default)  # type: ignore[no-any-return]

    @overload
    def get_wait(
        self, topic: str, *, default: D = ..., timeout: float | None = None, raw: Literal[False] = False
    ) -> str | D: ...
    @overload
    def get_wait(
        self, topic: str, *, default: D = ..., timeout: float | None = None, raw: Literal[True]
    ) -> bytes | D: ...
    def get_wait(
        self, topic: str, *, default: str | D = "", timeout: float | None = None, raw: bool = False
    ) -> str | bytes | D:
        """Like `get`, but wait up to `timeout` seconds for a message (0: not at all; math.inf: forever).

        Without a timeout it waits about ten seconds: the sum of `_n_tries` delays, the first of `_initial_retry`
        seconds, each of the others twice the previous one. If the server is unreachable when that time is over, the
        call takes up to `reconnect_timeout` longer and then raises ConnectionLost.
        """
        # Inlines `wait_seconds`, because this path is hot.
        seconds = default_wait() if timeout is None else arguments.seconds("timeout", timeout)
        return self._read(topic, 1, seconds, raw, default)  # type: ignore[no-any-return]

    @overload
    def get_latest(self, topic: str, *, default: D = ..., raw: Literal[False] = False) -> str | D: ...
    @overload
    def get_latest(self, topic: str, *, default: D = ..., raw: Literal[True]) -> bytes | D: ...
    def get_latest(self, topic: str, *, default: str | D = "", raw: bool = False) -> str | bytes | D:
        """Return the newest message of a topic that this client has not read, or `default` if there is none.

        The older ones are skipped: this client will not return them later.
        """
        return self._read(topic, 1, 0.0, raw, default, True)  # type: ignore[no-any-return]

    @overload
    def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[False] = False) -> list[str]: ...
    @overload
    def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: Literal[True]) -> list[bytes]: ...
    def get_many(self, topic: str, n: int = 100, *, timeout: float = 0.0, raw: bool = False) -> list[str] | list[bytes]:
        """Return up to `n` messages of a topic, oldest first. If there are none, wait up to `timeout` seconds for one.

        Stops before a message that is not UTF-8; if that is the first, raises MessageNotText.
        """
        n, seconds = arguments.count("n", n), arguments.seconds("timeout", timeout)
        return self._read(topic, n, seconds, raw)  # type: ignore[no-any-return]

    def read(
        self, topic: str | Sequence[str], n: int = 1, *, timeout: float = 0.0, latest: bool = False
    ) -> list[Message]:
        """Return up to `n` messages with their topics, ids, numbers and put times; otherwise like `get_many`.

        `topic` may also be a pattern, in which `*` matches any characters, or a list of topics and patterns. These are
        read together, in the order of ids, with a position of their own.

        latest=True returns only the newest message of each topic and skips the older ones, like `get_latest`.
        """
        n, seconds = arguments.count("n", n), arguments.seconds("timeout", timeout)
        return self._read(arguments.names(topic), n, seconds, None, ALL, latest)  # type: ignore[no-any-return]

    @overload
    def messages(self, *topics: str | Sequence[str], timeout: float = ...) -> Iterator[Message]: ...
    @overload
    def messages(self, *topics: str | Sequence[str], timeout: float = ..., text: Literal[True]) -> Iterator[str]: ...
    @overload
    def messages(self, *topics: str | Sequence[str], timeout: float = ..., raw: Literal[True]) -> Iterator[bytes]: ...
    def messages(
        self, *topics: str | Sequence[str], timeout: float = math.inf, text: bool = False, raw: bool = False
    ) -> Iterator[Any]:
        """Iterate over the messages of one or more topics as they arrive; end when none arrives for `timeout` seconds.

        Topics are read as by `read`. With text=True, messages are str; with raw=True, bytes.
        """
        seconds, key = arguments.seconds("timeout", timeout), arguments.names(*topics)
        self._session.reader(key)
        end = object()
        # Not a generator, because an interrupt would end it.
        return iter(partial(self._read, key, 1, seconds, arguments.form(text=text, raw=raw), end), end)

    def ping(self) -> None:
        """Check that the server answers."""
        self._run(ping := Call(PING))
        check(ping.reply)

    def topics(self) -> list[tuple[str, int, int]]:
        """Return the topics with messages: name, number of messages, and bytes."""
        found: list[tuple[str, int, int]] = []
        for call in list_topics(found):
            self._run(call)
        return found

    def stats(self, topic: str | None = None) -> dict[str, int | str]:
        """Return statistics of a topic: messages, bytes, last_number, last_id, first_id, oldest_age_ms and others.

        Without a topic, return statistics of the server, named as in the command INFO; most require the role admin.
        """
        self._run(call := requests.stats(topic))
        return replies.stats(call.reply)

    def purge(self, topic: str) -> int:
        """Expire all stored messages of a topic or of all topics that match a pattern; return their number.

        Other clients count those that they have not read as missed. Requires the role admin. After ConnectionLost, some
        may have been purged.
        """
        self._run(call := requests.purge(topic))
        return replies.as_number(check(call.reply))

    def shutdown_server(self) -> None:
        """Stop the server gracefully; return when it has closed the connection.

        Raises NotPermitted if the server's configuration forbids it.
        """
        self._run(NonIdempotent(SHUTDOWN), _shut_down)
        # The server has closed these too.
        self._pool.close_idle()

    def close(self) -> None:
        """Close the client. Calls in progress in other threads raise ClientClosed. Idempotent.

        Its jobs are given back first, if the server answers within the client's timeout.
        """
        try:
            self._leave(leave_all(self))
        finally:
            self._core.is_closed = True
            self._pool.close()

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[()]]:
        self._core.raise_if_closed("the client is closed")
        if not isinstance(self._options.get("tls", False), bool):
            raise TypeError(
                "a client with an SSLContext can't be pickled: pass ca_file, cert_file and key_file instead"
            )
        again = partial(type(self), self.host, self.port, self._verbose, retry=self._retry, **self._options)
        return again, ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(  # noqa: PLR0913, PLR0917 - what a read consists of
        self,
        topic: str | arguments.Names,
        n: int,
        seconds: float,
        raw: bool | None,  # noqa: FBT001 - by position, which is faster
        default: object = ALL,
        latest: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        """Return up to `n` messages in a list, or the first, or the default; with metadata if `raw` is None."""
        claim: Claim = []
        try:
            session = self._session
            reader, convert = session.reader(topic), session.converter(raw)
            taken = reader.take(claim, n, convert) if n and not latest else []
            if len(taken) < n:
                for call in read(session, reader, claim, taken, n, seconds, convert, latest):
                    self._run(call)
            if default is ALL:
                return taken
            return taken[0] if taken else b"" if raw and default == "" else default
        except BaseException:
            # The caller will not get the messages taken so far. Appending is atomic, so a second interrupt can't lose
            # them.
            self._session.returned.append((claim, []))
            raise

    def _run(
        self,
        call: C,
        attempt: Callable[[Connection, C], None] = Connection.ask,  # type: ignore[assignment]
        retries: Retries | None = None,
    ) -> None:
        """Make a call on a connection; each time the connection breaks, repeat the call on another one."""
        while True:
            connection = None
            try:
                connection = self._pool.borrow()
                attempt(connection, call)
            except BaseException as error:
                self._pool.discard(connection, error)
                retries = retries or Retries(self._core.reconnect_timeout)
                connected = connection is not None
                delay = self._core.retry_delay(call, error, retries, connected=connected)
                if delay is None:
                    raise
            else:
                self._pool.give_back(connection)
                if self._core.down:
                    # Another thread has reconnected.
                    self._core.announce("resumed")
                return
            # Wait outside of the exception handler, or the traceback of an interrupt would include the error.
            self._pool.wait(delay)

    _default_wait = staticmethod(lambda: default_wait())  # noqa: PLW0108 - defined below

    def _connect_at_start(self, retries: Retries) -> Connection:
        while True:
            try:
                return self._pool.connect()
            except NOT_STARTED as error:
                delay = retries.delay_at_start(error)
            self._pool.wait(delay)
            self._log("    ...trying again")

    def _log(self, line: str) -> None:
        if self._verbose:
            sys.stderr.write(line + "\n")


def _shut_down(connection: Connection, call: NonIdempotent) -> None:
    connection.probe()
    connection.ask(call)
    check(call.reply)
    connection.await_end()


def default_wait() -> float:
    """Return the default time in seconds to wait for a message or a starting server."""
    tries = _n_tries if _n_retries == _N_RETRIES else _n_retries
    return _initial_retry * ((1 << tries) - 1)
