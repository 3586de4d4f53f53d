"""What `dsmq serve` logs, and how much of it: a flood of one cause is summarised, and no thread waits for the log."""

from __future__ import annotations

import atexit
import functools
import io
import logging
import os
import queue
import select
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from dsmq.system import process
from dsmq.terminal import LineFormatter, as_json

if TYPE_CHECKING:
    from dsmq.settings import Settings

PERIOD_SECONDS = 1.0
# Writes that wait for whoever reads the log. What comes beyond them is dropped, counted, and told later.
MAX_UNWRITTEN = 10_000
# How long the end of the process, or of a server, waits for the log to be read.
DRAIN_SECONDS = 1.0

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


def _formatter(form: str, stream: io.TextIOBase) -> logging.Formatter:
    if form == "json":
        return JSONFormatter()
    if form == "journal" or (form == "auto" and _is_journal(stream)):
        return JournalFormatter("%(message)s")
    return LineFormatter("%(asctime)s %(levelname)s %(message)s")


def _is_journal(stream: io.TextIOBase) -> bool:
    """Return whether a stream goes to systemd's journal: JOURNAL_STREAM names its device and inode."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


class BackgroundStream(io.TextIOBase):
    """A text stream that never blocks its writers: a daemon thread writes to the stream below.

    A pipe that nobody reads would otherwise stop the first thread that logs, and the others behind it. The thread
    writes to the file descriptor, because at exit Python takes the lock of a standard stream, which a blocked write
    holds. The standard QueueListener is no help: its stop() waits for a blocked write without a time-out.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # A stream in place of the standard one, as in a notebook, may show its text elsewhere than its descriptor.
        self._descriptor = stream.fileno() if stream in (sys.__stdout__, sys.__stderr__) else None
        self._dropped, self._broken = 0, False
        self._patience = DRAIN_SECONDS
        self._start()
        atexit.register(self.drain)

    def _start(self) -> None:
        self._process = process()
        self._queue: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(self._queue,), name="dsmq-log", daemon=True).start()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Have this written soon, or drop it if too much waits already. Safe in signal handlers."""
        if self._process is not process():
            # A fork takes no threads along.
            self._start()
        if self._queue.qsize() < MAX_UNWRITTEN:
            self._tell_dropped()
            self._queue.put(text)
        else:
            self._dropped += 1
        return len(text)

    def _tell_dropped(self) -> None:
        if self._dropped and not self._broken:
            dropped, self._dropped = self._dropped, 0
            _logger.warning("%d log lines dropped", dropped, extra=event("lines_dropped", lines=dropped))

    def drain(self) -> None:
        """Wait until everything has been written, for DRAIN_SECONDS at most; not again while nobody reads."""
        if self._process is not process():
            return
        if self._queue.qsize() < MAX_UNWRITTEN:
            self._tell_dropped()
        written, began = threading.Event(), time.monotonic()
        self._queue.put(written)
        if written.wait(self._patience):
            self._patience = DRAIN_SECONDS
        else:
            self._patience = max(0.0, self._patience - (time.monotonic() - began))

    def _run(self, texts: queue.SimpleQueue[str | threading.Event]) -> None:
        while True:
            text = texts.get()
            if isinstance(text, threading.Event):
                text.set()
                continue
            try:
                self._write(text)
                self._broken = False
            except (OSError, ValueError):
                # The reader has gone, the disk is full, or the stream has been closed.
                self._broken = True
                self._dropped += 1

    def _write(self, text: str) -> None:
        if self._descriptor is None:
            self._stream.write(text)
            self._stream.flush()
            return
        data = text.encode(self._stream.encoding, "backslashreplace")
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])


class _Handler(logging.StreamHandler[BackgroundStream]):
    """The handler that `start` adds."""


def _handlers() -> list[_Handler]:
    return [handler for handler in logging.getLogger("dsmq").handlers if isinstance(handler, _Handler)]


@functools.cache
def _in_background(stream: TextIO | BackgroundStream) -> BackgroundStream:
    """Return the stream through which all servers of this process write to another one."""
    return stream if isinstance(stream, BackgroundStream) else BackgroundStream(stream)


def drain() -> None:
    """Wait for what has been logged to be written: DRAIN_SECONDS at most."""
    for handler in _handlers():
        handler.stream.drain()


def never_block() -> None:
    """Write to stdout and stderr in the background: for a process that is a server and nothing else.

    So neither the log nor a traceback can block it.
    """
    sys.stdout, sys.stderr = _in_background(sys.stdout), _in_background(sys.stderr)


def start(settings: Settings) -> None:
    """Log what dsmq has to say to stderr or stdout; other loggers are left alone."""
    stream = _in_background(sys.stdout if settings.log_stream == "stdout" else sys.stderr)
    handler = _Handler(stream)
    handler.setFormatter(_formatter(settings.log_format, stream))
    handler.addFilter(FloodFilter(settings.max_log_lines_per_second))
    logger = logging.getLogger("dsmq")
    # Those of servers before would log each line again.
    for before in _handlers():
        logger.removeHandler(before)
    logger.addHandler(handler)
    logger.setLevel(settings.log_level.upper())
