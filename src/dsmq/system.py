"""Operating-system services: clocks, process identity, memory, files and the terminal."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial

# File descriptors reserved for purposes other than connections, and the limit to request if the hard limit is infinite.
_RESERVED_FILES = 64
_MAX_FILES = 1_048_576
# Opens the process's controlling terminal.
_TERMINAL = "/dev/tty"
# Linux 4.14 or later; Python does not define it.
_MADV_WIPEONFORK = 18

_logger = logging.getLogger(__name__)

yield_processor: Callable[[], None] = getattr(os, "sched_yield", partial(time.sleep, 0))
"""Let another runnable thread use this processor; return at once if there is none."""

BOOT_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
"""The id of the clock behind `boot_time`, if it has one."""
boot_time: Callable[[], float] = time.monotonic if BOOT_CLOCK is None else partial(time.clock_gettime, BOOT_CLOCK)
"""Return the seconds of a monotonic clock that includes time asleep.

CLOCK_BOOTTIME on Linux; the monotonic clocks of macOS and Windows include it anyway.
"""


def _process_token() -> Callable[[], object]:
    """Return the function `process`, which works even if a fork runs none of Python's hooks."""
    try:
        import mmap  # noqa: PLC0415 - not everywhere

        # Reading memory is faster than getpid().
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_MADV_WIPEONFORK)
    except (ImportError, AttributeError, TypeError, ValueError, OSError):
        tokens: defaultdict[int, object] = defaultdict(object)
        return lambda: tokens[os.getpid()]
    current = None

    def token() -> object:
        nonlocal current
        # The memory is 0 at first and again in a forked child.
        if not page[0]:
            current = object()
            page[0] = 1
        return current

    return token


process = _process_token()
"""Return an object that identifies this process; a forked child gets a different one."""
LONG_YIELD_SECONDS = 0.001
"""If a yield takes longer than this, CPU-bound programs share the processor, and sleeping is better."""
LONG_YIELD_PAUSE_SECONDS = 0.1
"""How long to sleep instead of yielding: the kernel favours threads that slept."""
LONG_MESSAGE_BYTES = 65_536
"""Messages of this size or more justify `raise_malloc_threshold`."""


def missing_features() -> list[str]:
    """Return the features that a server needs but this system, such as Windows, lacks."""
    from importlib.util import find_spec  # noqa: PLC0415 - the client, which loads this module too, does not need it

    modules = [name for name in ("fcntl", "resource") if find_spec(name) is None]
    return modules + ([] if hasattr(socket, "AF_UNIX") else ["Unix sockets"])


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal that has not been closed."""
    try:
        os.close(os.open(_TERMINAL, os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@cache
def raise_malloc_threshold() -> None:
    """Make the C library keep freed memory for the next long message instead of returning it to the kernel.

    glibc's malloc raises its threshold when a large block is freed (mallopt(3), M_MMAP_THRESHOLD), to at most 32 MiB.
    Fresh memory costs a page fault for every 4 KiB.
    """
    with suppress(MemoryError):
        bytes(16 << 20)


def resident_bytes() -> int:
    """Return the resident memory of this process; 0 if unknown."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def unsent_bytes(descriptor: int) -> int:
    """Return the number of bytes sent to a socket that the peer has not acknowledged; 0 if unknown."""
    try:
        from fcntl import ioctl  # noqa: PLC0415 - not everywhere
        from termios import TIOCOUTQ  # noqa: PLC0415

        return int.from_bytes(ioctl(descriptor, TIOCOUTQ, bytes(4)), sys.byteorder)
    except (ImportError, OSError, ValueError):
        return 0


def allow_more_files() -> None:
    """Raise the limit on open files as far as possible; each connection needs one."""
    if missing_features():
        return
    import resource  # noqa: PLC0415 - Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The kernel may allow less than the hard limit: macOS reports no limit, but allows about 10,000.
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else hard
    while soft == resource.RLIM_INFINITY or soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            wanted //= 2
        else:
            return


def affordable_connections(connections: int) -> int:
    """Return the number of connections, up to the given one, that the limit on open files allows."""
    import resource  # noqa: PLC0415 - Windows has none

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or connections <= files - _RESERVED_FILES:
        return connections
    affordable = max(1, files - _RESERVED_FILES)
    _logger.warning("the limit on open files, %d, allows only %d connections, not %d", files, affordable, connections)
    return affordable
