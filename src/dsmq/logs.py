"""What `dsmq serve` logs, and how much of it: a flood of one cause is summarised."""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from dataclasses import dataclass

PERIOD_SECONDS = 1.0

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Cause:
    """One logging call: a place in the code, and its level."""

    level: int
    began: float
    """When its period began."""
    passed: int = 0
    held: int = 0
    last: str = ""


class FloodFilter(logging.Filter):
    """Lets so many lines of one cause pass in a second, and counts the others for `summarise`."""

    def __init__(self, lines_per_second: int) -> None:
        super().__init__()
        self.lines_per_second = lines_per_second
        self._causes: dict[tuple[str, int, int], _Cause] = {}
        self._lock = threading.Lock()
        _filters.add(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line passes."""
        now = time.monotonic()
        key = record.pathname, record.lineno, record.levelno
        with self._lock:
            cause = self._causes.setdefault(key, _Cause(record.levelno, now))
            if now - cause.began >= PERIOD_SECONDS:
                cause.began, cause.passed = now, 0
            cause.passed += 1
            if cause.passed <= self.lines_per_second:
                return True
            cause.held += 1
            cause.last = record.getMessage()
            return False

    def take_held(self) -> list[_Cause]:
        """Return what has been held back since the last time."""
        with self._lock:
            floods = [
                _Cause(cause.level, 0, 0, cause.held, cause.last) for cause in self._causes.values() if cause.held
            ]
            for cause in self._causes.values():
                cause.held = 0
        return floods


_filters: weakref.WeakSet[FloodFilter] = weakref.WeakSet()


def summarise() -> None:
    """Log how many lines have been held back, and the last of each kind. To be called once a second or so."""
    for flood in [flood for one in list(_filters) for flood in one.take_held()]:
        _logger.log(flood.level, "%d more lines like: %s", flood.held, flood.last)


def to_stderr(level: str, lines_per_second: int) -> None:
    """Log what dsmq has to say to stderr; other loggers are left alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(FloodFilter(lines_per_second))
    logger = logging.getLogger("dsmq")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
