"""Attackers with many connections."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from attacks.rig import LEAST_MEMORY_LEFT, NotHere, memory_left
from helpers import HOST

# Source addresses of attackers; each has a limited number of ports.
SOURCES = [f"127.0.0.{number}" for number in range(2, 102)]
# SO_LINGER with time 0: closing resets the connection.
RESET = struct.pack("ii", 1, 0)
# How much longer than necessary an attacker waits, to allow for slow machines.
GRACE_SECONDS = 5.0
_sources = itertools.cycle(SOURCES)


def dial(port: int, *, receive_buffer: int = 0, timeout: float | None = 5.0) -> socket.socket:
    """Connect from one of many source addresses."""
    sock = socket.socket()
    try:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((next(_sources), 0))
        sock.settimeout(timeout)
        sock.connect((HOST, port))
    except BaseException:
        sock.close()
        raise
    return sock


def reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


@dataclass(eq=False, slots=True)
class Member:
    """One connection of a crowd."""

    socket: socket.socket
    opened_at: float
    words: Iterator[bytes]


@dataclass
class Crowd:
    """Connections opened and fed at an even pace by one thread, until the server has closed them all."""

    port: int
    count: int
    """Number of connections to open."""
    opening_seconds: float
    """Time in which to open them."""
    words: Callable[[], Iterator[bytes]]
    """The data that each connection sends: the first item at once, then one every `every` seconds."""
    every: float = 1.0
    reads: bool = True
    receive_buffer: int = 0
    lived: list[float] = field(default_factory=list)
    """Lifetimes of dropped connections, in seconds."""
    replies: dict[bytes, int] = field(default_factory=dict)
    """First words of the last replies, counted."""

    def __post_init__(self) -> None:
        self._members: dict[int, Member] = {}
        self._due: list[tuple[float, int, Member]] = []
        self._epoll = select.epoll()
        self._opened = 0
        self.began = self.opened_last = 0.0

    def run(self, seconds: float, look: Callable[[], bool] = lambda: False) -> None:
        """Attack until the time is up, all connections are closed, or the condition holds."""
        began = self.began = time.monotonic()
        try:
            while (now := time.monotonic()) < began + seconds and not look():
                self._open(now)
                self._feed(now)
                self._watch()
                if self._opened == self.count and not self._members:
                    break
        finally:
            self.close()

    @property
    def alive(self) -> int:
        return len(self._members)

    @property
    def opened(self) -> int:
        return self._opened

    def close(self) -> None:
        for member in self._members.values():
            reset(member.socket)
        self._members.clear()
        self._epoll.close()

    def _open(self, now: float) -> None:
        wanted = min(self.count, 1 + int(self.count * (now - self.began) / self.opening_seconds))
        # Open only a few at a time, so that open connections are fed in between.
        for _ in range(min(20, wanted - self._opened)):
            if self._opened % 100 == 0 and memory_left() < LEAST_MEMORY_LEFT:
                raise NotHere("the machine runs out of memory")
            sock = dial(self.port, receive_buffer=self.receive_buffer)
            sock.setblocking(False)
            member = Member(sock, time.monotonic(), self.words())
            self._opened += 1
            self.opened_last = member.opened_at
            self._members[sock.fileno()] = member
            self._epoll.register(sock, (select.EPOLLIN if self.reads else 0) | select.EPOLLRDHUP)
            heapq.heappush(self._due, (now, self._opened, member))

    def _feed(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            when, number, member = heapq.heappop(self._due)
            data = next(member.words, b"")
            if not data or member.socket.fileno() < 0:
                continue
            # Polling also detects dropped connections.
            with contextlib.suppress(OSError):
                member.socket.send(data)
            heapq.heappush(self._due, (when + self.every, number, member))

    def _watch(self) -> None:
        for number, events in self._epoll.poll(0.002):
            member = self._members[number]
            if not self._has_ended(member, events):
                continue
            self.lived.append(time.monotonic() - member.opened_at)
            self._epoll.unregister(number)
            del self._members[number]
            reset(member.socket)

    def _has_ended(self, member: Member, events: int) -> bool:
        if not self.reads:
            return True
        try:
            while data := member.socket.recv(4096):
                word = data.split(b" ", 1)[0]
                self.replies[word] = self.replies.get(word, 0) + 1
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True
