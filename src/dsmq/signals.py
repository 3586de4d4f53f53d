"""Handlers of SIGTERM, SIGINT and SIGHUP for a running server."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dsmq.system import has_terminal


@contextmanager
def handled(stop: Callable[[str], None], reload: Callable[[], None] | None) -> Iterator[None]:
    """Call `stop` on SIGTERM or SIGINT; raise KeyboardInterrupt on SIGINT if it has been called.

    SIGHUP calls `reload`, or `stop` if the process had a terminal that has been closed, unless nohup started it.
    Without `reload`, SIGHUP is left alone. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = False
    had_terminal = bool(reload) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and has_terminal()

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal stopping
        if number == signal.SIGHUP and reload and not (had_terminal and not has_terminal()):
            reload()
            return
        if stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping = True
        stop(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if reload else ()))
    # A wake-up descriptor inherited from an asyncio loop in the parent process would call the parent's handlers.
    wakeup = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number, handler in before.items():
            signal.signal(number, handler)
