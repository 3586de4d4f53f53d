"""What is asked of the operating system: the time, what makes for speed, and the terminal."""

from __future__ import annotations

import codecs
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from dsmq.errors import ConfigError

# A file of tokens or settings is shorter; /dev/zero has no end.
_MAX_TEXT_BYTES = 1_048_576
# File descriptors that are not for connections, and the limit to ask for if the hard limit is unlimited.
_RESERVED_FILES = 64
_MAX_FILES = 1_048_576
# The file that stands for the controlling terminal of whichever process opens it.
_TERMINAL = "/dev/tty"

_logger = logging.getLogger(__name__)

yield_processor: Callable[[], None] = getattr(os, "sched_yield", partial(time.sleep, 0))
"""Let another thread run that waits for this processor; without one, go on at once."""


BOOT_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
"""The clock of `boot_time`, if it has a number."""
boot_time: Callable[[], float] = time.monotonic if BOOT_CLOCK is None else partial(time.clock_gettime, BOOT_CLOCK)
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


def lacking() -> list[str]:
    """Return what a server needs and this system does not have, as Windows does not."""
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


def read_text(file: str) -> str:
    """Return the text of a short file in UTF-8. Raises ConfigError."""
    try:
        with open(file, "rb") as stream:
            data = stream.read(_MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        # The name has a NUL in it.
        raise ConfigError(f"{file!r}: {error}") from None
    if len(data) > _MAX_TEXT_BYTES:
        raise ConfigError(f"{file}: longer than {_MAX_TEXT_BYTES} bytes")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ConfigError(f"{file}: should be UTF-8; this looks like UTF-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: should be UTF-8") from None


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


def allow_more_files() -> None:
    """Raise this process's limit on open files as far as the system allows; each connection takes one."""
    if lacking():
        return
    import resource  # noqa: PLC0415 - Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The kernel may allow less than the hard limit says: macOS calls it unlimited, and takes some 10,000.
    most = _MAX_FILES if hard == resource.RLIM_INFINITY else hard
    while soft == resource.RLIM_INFINITY or soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (ValueError, OSError) as error:
            _logger.debug("%d open files are not allowed: %s", most, error)
            most //= 2
        else:
            return


def affordable_connections(connections: int) -> int:
    """Return how many connections the limit on open files allows, at most this many."""
    import resource  # noqa: PLC0415 - Windows has none

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or connections <= files - _RESERVED_FILES:
        return connections
    affordable = max(1, files - _RESERVED_FILES)
    _logger.warning("only %d open files are allowed: %d connections at a time, not %d", files, affordable, connections)
    return affordable
