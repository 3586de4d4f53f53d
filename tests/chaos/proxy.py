"""A TCP proxy that breaks connections at given bytes."""

from __future__ import annotations

import contextlib
import errno
import random
import selectors
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Self

HOST = "127.0.0.1"
RECEIVE_BYTES = 65_536
# Max bytes buffered per direction.
MAX_HELD_BYTES = 262_144
# With this option, closing a socket resets its connection.
LINGER = struct.pack("ii", 1, 0)
# The proxy reacts within this many seconds.
SOON = 20.0

Kind = Literal["reset", "close", "end", "hole"]
Side = Literal["request", "reply"]


@dataclass(frozen=True)
class Fault:
    """A fault in a connection after a number of forwarded bytes in one direction; 0: at the first byte.

    `reset` and `close` affect both sides; `end` closes only one direction; in a `hole`, nothing more is forwarded,
    and nothing is closed.
    """

    kind: Kind
    side: Side
    after: int


class _Stream:
    """One direction of a connection: buffered bytes, and when to forward them."""

    def __init__(self, side: Side, source: socket.socket, sink: socket.socket) -> None:
        self.side = side
        self.source = source
        self.sink = sink
        self.held: deque[tuple[float, bytes]] = deque()
        self.passed = 0
        self.fault: Fault | None = None
        self.fault_at = 0
        self.ended = False
        self.told_end = False
        self.blocked = False

    def arm(self, fault: Fault) -> None:
        self.fault, self.fault_at = fault, self.passed + fault.after

    @property
    def size(self) -> int:
        return sum(len(data) for _, data in self.held)

    def move(self, now: float) -> bool:
        """Forward bytes that are due; return whether the fault has occurred."""
        while self.held and self.held[0][0] <= now:
            due, data = self.held.popleft()
            room = len(data) if self.fault is None else min(len(data), self.fault_at - self.passed)
            try:
                sent = self.sink.send(data[:room]) if room else 0
            except BlockingIOError:
                sent, self.blocked = 0, True
            self.passed += sent
            if sent < len(data):
                self.held.appendleft((due, data[sent:]))
            if self.fault is not None and self.passed >= self.fault_at:
                return True
            if self.blocked or sent < room:
                self.blocked = True
                break
        return False


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.streams = (_Stream("request", client, server), _Stream("reply", server, client))
        self.is_hole = False

    @property
    def sockets(self) -> tuple[socket.socket, socket.socket]:
        return self.streams[0].source, self.streams[0].sink

    def arm(self, fault: Fault) -> None:
        self.streams[fault.side == "reply"].arm(fault)

    def events(self, sock: socket.socket, hole: bool) -> int:
        """Return the events to wait for on a socket."""
        if self.is_hole or hole:
            return 0
        found = 0
        for stream in self.streams:
            if stream.source is sock and not stream.ended and stream.size < MAX_HELD_BYTES:
                found |= selectors.EVENT_READ
            if stream.sink is sock and stream.blocked:
                found |= selectors.EVENT_WRITE
        return found


class Proxy:
    """Forwards connections to a server, in its own thread, with faults."""

    def __init__(self, port: int, seed: int = 0) -> None:
        self.target = port
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.connections = 0
        self.plan: Callable[[int], Iterable[Fault]] = lambda _: ()
        """Called for each new connection, with its number."""
        self.delay: Callable[[], float] = lambda: 0.0
        """Called for each chunk; returns the delay in seconds."""
        self._hole = False
        self._open: list[_Connection] = []
        self._ended = False
        # Everything except the counters is only used in the proxy's thread.
        self._orders: deque[tuple[Callable[[], object], threading.Event]] = deque()
        self._listener: socket.socket | None = _listener(0)
        self.port: int = self._listener.getsockname()[1]
        self._wakeup, self._waker = socket.socketpair()
        self._wakeup.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._wake()
        self._thread.join()
        for sock in (self._listener, self._wakeup, self._waker):
            if sock is not None:
                sock.close()
        for connection in self._open:
            for sock in connection.sockets:
                sock.close()

    # Commands for the tests; each has taken effect when it returns

    def strike(self, fault: Fault) -> None:
        """Schedule a fault for each open connection, counted from now."""
        self._do(lambda: [connection.arm(fault) for connection in self._open])

    def reset_all(self) -> None:
        self._do(lambda: [self._end(connection, "reset") for connection in list(self._open)])

    def disarm(self) -> None:
        """Cancel all faults and reset connections in a hole."""

        def change() -> None:
            self.plan = lambda _: ()
            self.delay = lambda: 0.0
            self._hole = False
            for connection in list(self._open):
                for stream in connection.streams:
                    stream.fault = None
                if connection.is_hole:
                    self._end(connection, "reset")

        self.refuse(False)
        self._do(change)

    def hole(self, on: bool) -> None:
        """Stop forwarding on all connections, including new ones; or resume."""

        def change() -> None:
            self.faults["hole"] += len(self._open) if on else 0
            self._hole = on

        self._do(change)

    def refuse(self, on: bool) -> None:
        """Refuse new connections or accept them again."""

        def change() -> None:
            if on and self._listener is not None:
                self.faults["refuse"] += 1
                # Closing the socket would reset connections in its queue.
                while self._accept(self._listener):
                    pass
                self._listener.close()
                self._listener = None
            elif not on and self._listener is None:
                self._listener = _listener(self.port)

        self._do(change)

    def passed(self) -> dict[Side, int]:
        """Number of bytes forwarded on open connections."""
        found: dict[Side, int] = {"request": 0, "reply": 0}

        def count() -> None:
            for connection in self._open:
                for stream in connection.streams:
                    found[stream.side] += stream.passed

        self._do(count)
        return found

    def _do(self, order: Callable[[], object]) -> None:
        done = threading.Event()
        self._orders.append((order, done))
        self._wake()
        if not done.wait(SOON):
            raise RuntimeError("the proxy does not answer")

    def _wake(self) -> None:
        self._waker.send(b"x")

    # The proxy's thread

    def _run(self) -> None:
        while not self._ended:
            ready = self._select()
            # Done before taking the orders, so that a later one wakes the selector again.
            with contextlib.suppress(BlockingIOError):
                while self._wakeup.recv(100):
                    pass
            while self._orders:
                order, done = self._orders.popleft()
                order()
                done.set()
            self._turn(ready)

    def _select(self) -> dict[socket.socket, int]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakeup, selectors.EVENT_READ)
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ)
            for connection in self._open:
                for sock in connection.sockets:
                    if events := connection.events(sock, self._hole):
                        selector.register(sock, events)
            found = selector.select(self._until_due())
        return {key.fileobj: events for key, events in found}  # type: ignore[misc]

    def _until_due(self) -> float | None:
        """Seconds until something has to be forwarded."""
        moving = [one for one in self._open if not (one.is_hole or self._hole)]
        dues = [one.held[0][0] for connection in moving for one in connection.streams if one.held and not one.blocked]
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _turn(self, ready: dict[socket.socket, int]) -> None:
        if self._listener is not None and self._listener in ready:
            self._accept(self._listener)
        for connection in list(self._open):
            if not (connection.is_hole or self._hole):
                self._move(connection, ready)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept the next connection and connect to the server; return whether there was one."""
        try:
            client, _ = listener.accept()
        except OSError:
            # The client has disconnected again.
            return False
        server = socket.socket()
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(client, server)
        self._open.append(connection)
        refused = server.connect_ex((HOST, self.target)) not in {0, errno.EINPROGRESS}
        self.connections += 1
        if refused:
            self._end(connection, None)
            return True
        for fault in self.plan(self.connections):
            connection.arm(fault)
        return True

    def _move(self, connection: _Connection, ready: dict[socket.socket, int]) -> None:
        try:
            for stream in connection.streams:
                if ready.get(stream.source, 0) & selectors.EVENT_READ:
                    self._receive(stream)
                if ready.get(stream.sink, 0) & selectors.EVENT_WRITE:
                    stream.blocked = False
                if stream.move(time.monotonic()):
                    self._befall(connection, stream)
                    return
                if stream.ended and not stream.held and not stream.told_end:
                    stream.told_end = True
                    stream.sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One side is gone, so close the other.
            self._end(connection, None)
            return
        if all(stream.told_end for stream in connection.streams):
            self._open.remove(connection)
            for sock in connection.sockets:
                sock.close()

    def _receive(self, stream: _Stream) -> None:
        try:
            data = stream.source.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if data:
            stream.held.append((time.monotonic() + self.delay(), data))
        else:
            stream.ended = True

    def _befall(self, connection: _Connection, stream: _Stream) -> None:
        fault, stream.fault = stream.fault, None
        assert fault is not None
        if fault.kind == "hole":
            self.faults["hole"] += 1
            connection.is_hole = True
        elif fault.kind == "end":
            self.faults["end"] += 1
            stream.held.clear()
            stream.ended = stream.told_end = True
            stream.sink.shutdown(socket.SHUT_WR)
        else:
            self._end(connection, fault.kind)

    def _end(self, connection: _Connection, kind: Kind | None) -> None:
        if kind is not None:
            self.faults[kind] += 1
        self._open.remove(connection)
        for sock in connection.sockets:
            if kind != "close":
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            sock.close()


def _listener(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    listener.listen(100)
    listener.setblocking(False)
    return listener
