"""SIGTERM, SIGINT and SIGHUP while a server runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dsmq.system import has_terminal


@contextmanager
def handled(stop: Callable[[str], None], reload: Callable[[], None] | None) -> Iterator[None]:
    """Call `stop` with the name of SIGTERM or SIGINT, and raise KeyboardInterrupt at a further Ctrl-C.

    SIGHUP calls `reload`; or `stop`, if the terminal that the process had has been closed, unless the signal was
    ignored, as nohup does. Without `reload`, SIGHUP is left alone. Does nothing outside the main thread.
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
    # The wake-up descriptor of an asyncio loop, inherited over a fork, would call the parent's handlers.
    wakeup = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number, handler in before.items():
            signal.signal(number, handler)
