"""The connections of the blocking client. Each call has a connection to itself; idle ones are reused."""

from __future__ import annotations

import _thread
import os
import time
import weakref
from contextlib import suppress

from dsmq.client import connection as one
from dsmq.client.connection import Connection
from dsmq.client.core import IDLE_SECONDS, Core, pop_failure
from dsmq.client.dial import explain_greeting
from dsmq.client.replies import is_lost
from dsmq.client.requests import Call, Producer
from dsmq.errors import ReplyError
from dsmq.system import process
from dsmq.wire.addresses import Endpoint


class Pool:
    """The connections of a client. Threads and signal handlers may use it at the same time."""

    def __init__(self, core: Core) -> None:
        self._core = core
        # Released on closing, to wake calls that wait before a retry. An Event has a lock, which could hang a signal
        # handler that closes the client.
        self._closing = _thread.allocate_lock()
        self._closing.acquire()
        self._process = process()
        self.idle: list[Connection] = []
        self._refs: set[weakref.ref[Connection]] = set()
        self._is_tidying = False
        _pools.add(self)

    def _all(self) -> list[Connection]:
        return [connection for ref in list(self._refs) if (connection := ref())]

    def borrow(self) -> Connection:
        """Return a connection for one call. Raises OSError or the server's error."""
        if process() is not self._process:
            self.after_fork()
        try:
            connection = self.idle.pop()
        except IndexError:
            connection = None
        if connection is None:
            # Connect outside of the exception handler, or the traceback of an interrupt would include the error.
            return self.connect()
        if time.monotonic() - connection.used_at < one.LONG_PAUSE_SECONDS:
            return connection
        why = connection.closed_reason
        if why is None:
            return connection
        connection.close()
        self.close_idle()
        self._core.announce("lost", ConnectionResetError(why))
        return self.connect()

    def give_back(self, connection: Connection) -> None:
        self.idle.append(connection)
        if self._core.is_closed:
            self.close()
        elif len(self.idle) > 1 and not self._is_tidying:
            try:
                _thread.start_new_thread(_tidy, (weakref.ref(self),))
                self._is_tidying = True
            except RuntimeError:
                # There are too many threads, or the program is exiting. Ignore that, because the call has succeeded.
                with suppress(IndexError):
                    self.idle.pop(0).close()

    def discard(self, connection: Connection | None, error: BaseException) -> None:
        """Close a connection on which a call failed: the next call must not receive the failed call's replies."""
        if connection is not None:
            connection.close()
        if is_lost(error, connecting=connection is None):
            # The idle ones have most likely broken as well.
            self.close_idle()
            if connection is not None:
                self._core.move_on(connection.endpoint)

    def connect(self) -> Connection:
        """Return a new connection to one of the servers. Raises OSError or a server's error."""
        core = self._core
        failures: list[Exception] = []
        for endpoint, is_last in core.attempts():
            try:
                connection = self._connect(endpoint)
            except Exception as error:
                if not is_lost(error, connecting=True):
                    raise
                core.move_on(endpoint)
                failures.append(error)
                if is_last:
                    raise pop_failure(failures) from None
            else:
                break
        if core.choose():
            connection.close()
            return self.connect()
        return connection

    def _connect(self, endpoint: Endpoint) -> Connection:
        core = self._core
        core.raise_if_closed("the client is closed")
        connection = None
        try:
            connection = Connection(endpoint, core.tls, core.timeout, core.silent_addresses)
            connection.ask(hello := Call(core.session.hello))
            core.raise_if_closed()
            state, era = core.session.handle_hello(hello.reply)
            connection.producer = Producer(era.run, era)
            # An interrupted call may drop the connection at any point.
            self._refs.add(weakref.ref(connection, self._refs.discard))
            core.raise_if_closed()
        except BaseException as error:
            core.count_silence(error, b"" if connection is None else connection.received)
            if connection is not None:
                connection.close()
                if isinstance(error, ReplyError | OSError):
                    facts = {"is_first": not core.session.epoch, "with_tls": core.tls is not None}
                    raise explain_greeting(endpoint, connection.received, error, **facts) from None
            raise
        core.announce(state)
        return connection

    def wait(self, seconds: float) -> None:
        """Wait before a retry. Raises ClientClosed if the client is closed."""
        if self._closing.acquire(timeout=seconds):
            # Wake the next call that waits.
            self._closing.release()
        self._core.raise_if_closed()

    def close(self) -> None:
        """Close all connections and wake calls that wait before a retry. Idempotent."""
        with suppress(RuntimeError):
            self._closing.release()
        # Connections in use are closed by their calls.
        for connection in self._all():
            connection.interrupt()
        self.close_idle()

    def close_idle(self) -> None:
        # One by one, because other threads may borrow and return connections at the same time.
        with suppress(IndexError):
            while True:
                self.idle.pop().close()

    def tidy(self) -> bool:
        """Close all but one of the connections that have been idle for too long; return whether there are more."""
        before = time.monotonic() - IDLE_SECONDS
        with suppress(IndexError):
            # The first has been idle the longest.
            while len(self.idle) > 1 and self.idle[0].used_at < before:
                self.idle.pop(0).close()
        if len(self.idle) <= 1 or self._core.is_closed:
            self._is_tidying = False
        # Check again, because another thread may have returned a connection while the flag was still set.
        if len(self.idle) > 1 and not self._core.is_closed:
            self._is_tidying = True
        return self._is_tidying

    def after_fork(self) -> None:
        """Start again in a child process."""
        # Closing the sockets here does not close the parent's.
        connections, self._refs, self.idle = self._all(), set(), []
        self._closing, self._is_tidying = _thread.allocate_lock(), False
        self._closing.acquire()
        for connection in connections:
            connection.close()
        self._process = process()


def _tidy(ref: weakref.ref[Pool]) -> None:
    """Close the connections that a burst of threads has left behind. Runs in its own thread until none are left."""
    more = True
    while more:
        time.sleep(IDLE_SECONDS / 5)
        pool = ref()
        more = pool is not None and pool.tidy()
        del pool


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool.after_fork()


# The next call would notice the fork anyway. This closes the parent's sockets immediately.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
