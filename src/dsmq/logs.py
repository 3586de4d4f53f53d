"""What `dsmq serve` logs, and how much of it: a flood of one cause is summarised."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from dsmq.terminal import LineFormatter, as_json

if TYPE_CHECKING:
    from dsmq.config import Settings

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
    last: logging.LogRecord | None = None


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
        if getattr(record, "event", "") == "flood":
            return True
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
            cause.last = record
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
        _logger.log(
            flood.level,
            "%d more lines like: %s",
            flood.held,
            flood.last and flood.last.getMessage(),
            extra=event("flood", lines=flood.held),
        )


def event(name: str, **fields: object) -> dict[str, object]:
    """Return what `extra` takes, for whoever reads logs by program: the event's name, and what belongs to it."""
    return {"event": name, "fields": fields}


class JSONFormatter(logging.Formatter):
    """A line of JSON for each event: time (RFC 3339), level, event, message, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        shown: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            shown["exception"] = self.formatException(record.exc_info)
        return as_json(shown)


class JournalFormatter(LineFormatter):
    """Lines for systemd's journal, which has the time itself: each begins with its priority (sd-daemon(3))."""

    _PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or lines."""
        priority = next((number for level, number in self._PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def _formatter(form: str, stream: TextIO) -> logging.Formatter:
    if form == "json":
        return JSONFormatter()
    if form == "journal" or (form == "auto" and _is_journal(stream)):
        return JournalFormatter("%(message)s")
    return LineFormatter("%(asctime)s %(levelname)s %(message)s")


def _is_journal(stream: TextIO) -> bool:
    """Return whether a stream goes to systemd's journal: JOURNAL_STREAM names its device and inode."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def start(settings: Settings) -> None:
    """Log what dsmq has to say to stderr or stdout; other loggers are left alone."""
    stream = sys.stdout if settings.log_to == "stdout" else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(settings.log_format, stream))
    handler.addFilter(FloodFilter(settings.max_log_lines_per_second))
    logger = logging.getLogger("dsmq")
    logger.addHandler(handler)
    logger.setLevel(settings.log_level.upper())
