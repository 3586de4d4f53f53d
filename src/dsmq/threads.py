"""Starts threads and waits for them so that Ctrl-C can interrupt the wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from dsmq.errors import StartupError

# Each stage of a stop gets at least this long, even if earlier stages have used up the time.
MIN_STAGE_SECONDS = 0.2
_POLL_SECONDS = 0.005


def wait_until(condition: Callable[[], bool], deadline: float) -> None:
    """Poll until the condition holds or the deadline has passed, but for at least MIN_STAGE_SECONDS.

    It does not wait for a lock, because a signal that arrives just before would take effect only after the wait.
    """
    deadline = max(deadline, time.monotonic()) + MIN_STAGE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def join(thread: threading.Thread, deadline: float) -> None:
    """Wait until a thread has ended, if it was started.

    Does not use Thread.join: if that is interrupted, Python before 3.13 reports a running thread as dead.
    """
    wait_until(lambda: not thread.is_alive(), deadline)


def start(starts: Iterable[Callable[[], None]]) -> None:
    """Call functions that start threads. Raises StartupError if the system allows no more threads."""
    try:
        for call in starts:
            call()
    except RuntimeError as error:
        raise StartupError(str(error)) from error
