"""What is asked of the operating system: the time, and what makes for speed."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

yield_processor: Callable[[], None] = getattr(os, "sched_yield", partial(time.sleep, 0))
"""Let another thread run that waits for this processor; without one, go on at once."""


def _boot_time() -> Callable[[], float]:
    clock = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
    return time.monotonic if clock is None else partial(time.clock_gettime, clock)


boot_time = _boot_time()
"""Return the seconds on a clock that only goes forward, and goes on while the machine sleeps.

Linux has CLOCK_BOOTTIME for that; CLOCK_MONOTONIC of macOS and the monotonic time of Windows go on anyway.
"""


class _Process:
    """Tells this process from its children, however they were forked."""

    __slots__ = ("_page", "_token")

    def __init__(self) -> None:
        self._page = _wiped_in_children()
        self._token = object()

    def token(self) -> object:
        """Return an object that stands for this process; in a child it is another one."""
        if not self._page[0]:
            self._token = object()
            self._page[0] = 1
        return self._token


def _wiped_in_children() -> Any:
    """Return memory that holds a 1, and in a child process a 0: to ask for the process id takes longer."""
    try:
        import mmap  # noqa: PLC0415 - where there is none

        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK)
    except (ImportError, AttributeError, TypeError, ValueError, OSError):
        return _ByProcessId()
    page[0] = 1
    return page


class _ByProcessId:
    """The same on systems without such memory."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def __getitem__(self, _: int) -> int:
        return os.getpid() == self._process

    def __setitem__(self, _: int, value: int) -> None:
        self._process = os.getpid()


# Of Linux, since 4.14; Python has no name for it.
_MADV_WIPEONFORK = 18
process = _Process().token
LONG_YIELD_SECONDS = 0.001
"""Who did not get the processor back for so long shares it with programs that compute: then it is better to sleep."""
LONG_YIELD_PAUSE_SECONDS = 0.1
"""For so long: the kernel wakes who has slept sooner than it returns to who has yielded."""
LONG_MESSAGE_BYTES = 65_536
"""From here on it is worth to `expect_long_messages`."""


@cache
def expect_long_messages() -> None:
    """Have the C library keep freed memory for the next long message, in place of fetching it anew each time.

    glibc's malloc learns from what it is given back: from then on it keeps up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD).
    Fresh memory costs a page fault for every 4 KiB.
    """
    bytes(16 << 20)


def unsent_bytes(sock: socket.socket) -> int:
    """Return how many bytes the other side has not received yet; 0 if the system does not tell."""
    try:
        from fcntl import ioctl  # noqa: PLC0415 - not everywhere
        from termios import TIOCOUTQ  # noqa: PLC0415

        return int.from_bytes(ioctl(sock, TIOCOUTQ, bytes(4)), sys.byteorder)
    except (ImportError, OSError):
        return 0
