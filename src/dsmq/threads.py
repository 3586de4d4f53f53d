"""Waits for threads, such as a stop makes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# What each stage of stopping gets, even if the stages before have used up all the time.
LEAST_STAGE_SECONDS = 0.2
_LOOK_SECONDS = 0.005


def wait_until(is_so: Callable[[], bool], deadline: float) -> None:
    """Wait until something is so. Whoever is interrupted may wait again.

    Not with a lock: a signal that comes just before that is waited for interrupts it only when it is over.
    """
    # One that uses the time up, as a worker may whose clients don't read, must not look as if it survived, nor
    # leave nothing for the next.
    until = max(deadline, time.monotonic()) + LEAST_STAGE_SECONDS
    while not is_so() and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)


def join(thread: threading.Thread, deadline: float) -> None:
    """Wait until a thread has ended, if it was started.

    Not with Thread.join: where that is interrupted, Python before 3.13 takes the thread for dead while it runs on.
    """
    wait_until(lambda: not thread.is_alive(), deadline)
