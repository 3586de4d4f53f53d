"""What `dsmq serve` logs, and how much of it: a flood of one cause is summarised."""

from __future__ import annotations

import logging
import sys
import threading
import time

PERIOD_SECONDS = 1.0


class FloodFilter(logging.Filter):
    """Lets so many lines of one cause pass in a second; with the next that passes it says how many did not.

    One cause is one logging call: the same place in the code, and the same level.
    """

    def __init__(self, lines_per_second: int) -> None:
        super().__init__()
        self.lines_per_second = lines_per_second
        # When its period began, lines passed in it, lines held back.
        self._causes: dict[tuple[str, int, int], list[float]] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line passes."""
        now = time.monotonic()
        with self._lock:
            cause = self._causes.setdefault((record.pathname, record.lineno, record.levelno), [now, 0, 0])
            if now - cause[0] >= PERIOD_SECONDS:
                cause[0], cause[1] = now, 0
            cause[1] += 1
            if cause[1] > self.lines_per_second:
                cause[2] += 1
                return False
            held, cause[2] = int(cause[2]), 0
        if held:
            record.msg = f"{record.getMessage()} (and {held} lines like it since the one before)"
            record.args = None
        return True


def to_stderr(level: str, lines_per_second: int) -> None:
    """Log what dsmq has to say to stderr; other loggers are left alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(FloodFilter(lines_per_second))
    logger = logging.getLogger("dsmq")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
