"""The log of `dsmq serve`: repeated lines are rate-limited, and logging never blocks a thread."""

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
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from dsmq.system import process
from dsmq.terminal import LineFormatter, as_json

PERIOD_SECONDS = 1.0
# Max lines that wait to be written. Further ones are dropped and counted.
MAX_UNWRITTEN = 10_000
# How long a process, or a server, that ends waits for its log to be written.
DRAIN_SECONDS = 1.0

_logger = logging.getLogger(__name__)


def event(name: str, **fields: object) -> dict[str, object]:
    """Return `extra` for a logging call: the event's name and fields, for programs that read the log."""
    return {"event": name, "fields": fields}


@dataclass(slots=True)
class _Source:
    """The lines of one logging call in the code."""

    began: float
    passed: int = 0
    suppressed: int = 0
    last: logging.LogRecord | None = None


class FloodFilter(logging.Filter):
    """Passes so many lines a second of each logging call, and counts the others."""

    def __init__(self, lines_per_second: int) -> None:
        super().__init__()
        self._lines_per_second = lines_per_second
        self._sources: dict[tuple[str, int, int], _Source] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "event", "") == "flood":
            return True
        now = time.monotonic()
        with self._lock:
            source = self._sources.setdefault((record.pathname, record.lineno, record.levelno), _Source(now))
            if now - source.began >= PERIOD_SECONDS:
                source.began, source.passed = now, 0
            source.passed += 1
            if source.passed <= self._lines_per_second:
                return True
            source.suppressed += 1
            source.last = record
            return False

    def take_suppressed(self) -> list[tuple[int, logging.LogRecord]]:
        """Return how many lines each logging call has suppressed since the last call of this, with the last of them."""
        with self._lock:
            taken = [(source.suppressed, source.last) for source in self._sources.values() if source.last]
            for source in self._sources.values():
                source.suppressed, source.last = 0, None
        return taken


def summarise() -> None:
    """Log how many lines were suppressed. To be called about once a second."""
    filters = [one for handler in _handlers() for one in handler.filters if isinstance(one, FloodFilter)]
    for count, last in [suppressed for one in filters for suppressed in one.take_suppressed()]:
        extra = event("flood", lines=count)
        _logger.log(last.levelno, "%d more lines like: %s", count, last.getMessage(), extra=extra)


class JSONFormatter(logging.Formatter):
    """One line of JSON per event: time (RFC 3339), level, event, message, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
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
    """Lines for systemd's journal: each begins with its priority (sd-daemon(3)), and has no time."""

    _PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self._PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def _formatter(form: str, stream: io.TextIOBase) -> logging.Formatter:
    if form == "json":
        return JSONFormatter()
    if form == "journal" or (form == "auto" and _is_journal(stream)):
        return JournalFormatter("%(message)s")
    return LineFormatter("%(asctime)s %(levelname)s %(message)s")


def _is_journal(stream: io.TextIOBase) -> bool:
    # The device and inode of the journal's end of the stream.
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


class BackgroundStream(io.TextIOBase):
    """A text stream that never blocks its writers: a daemon thread writes to the stream below.

    Otherwise a pipe that nobody reads would block every thread that logs. The daemon thread writes to the file
    descriptor, because Python locks a standard stream at exit, and a blocked write holds that lock. QueueListener from
    the standard library does not help: its stop() waits for a blocked write without a timeout.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # A replacement for a standard stream, such as a notebook's, may not write to its file descriptor.
        self._descriptor = stream.fileno() if stream in (sys.__stdout__, sys.__stderr__) else None
        self._dropped, self._broken = 0, False
        self._drain_seconds = DRAIN_SECONDS
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
        """Queue a line, or drop it if the queue is full. Safe in signal handlers."""
        if self._process is not process():
            # Threads don't survive a fork.
            self._start()
        if self._queue.qsize() < MAX_UNWRITTEN:
            self._log_dropped()
            self._queue.put(text)
        else:
            self._dropped += 1
        return len(text)

    def _log_dropped(self) -> None:
        if self._dropped and not self._broken:
            dropped, self._dropped = self._dropped, 0
            _logger.warning("%d log lines dropped", dropped, extra=event("lines_dropped", lines=dropped))

    def drain(self) -> None:
        """Wait until everything has been written, for DRAIN_SECONDS in total while nobody reads."""
        if self._process is not process():
            return
        if self._queue.qsize() < MAX_UNWRITTEN:
            self._log_dropped()
        written, began = threading.Event(), time.monotonic()
        self._queue.put(written)
        if written.wait(self._drain_seconds):
            self._drain_seconds = DRAIN_SECONDS
        else:
            self._drain_seconds = max(0.0, self._drain_seconds - (time.monotonic() - began))

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
                # The reader is gone, the disk is full, or the stream is closed.
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
    # Cached, so that all servers of this process write to a stream through the same thread.
    return stream if isinstance(stream, BackgroundStream) else BackgroundStream(stream)


def drain() -> None:
    """Wait until the log has been written, for DRAIN_SECONDS at most."""
    for handler in _handlers():
        handler.stream.drain()


def never_block() -> None:
    """Write stdout and stderr in the background, so that neither the log nor a traceback blocks.

    Only for a process that is a server and nothing else.
    """
    sys.stdout, sys.stderr = _in_background(sys.stdout), _in_background(sys.stderr)


def start(level: str = "info", format: str = "auto", stream: str = "stderr", rate: int = 10) -> None:  # noqa: A002
    """Log dsmq's messages to stderr or stdout; other loggers are not touched.

    level, format and stream are values of log_level, log_format and log_stream; rate is max_log_lines_per_second.
    """
    output = _in_background(sys.stdout if stream == "stdout" else sys.stderr)
    handler = _Handler(output)
    handler.setFormatter(_formatter(format, output))
    handler.addFilter(FloodFilter(rate))
    logger = logging.getLogger("dsmq")
    # The handlers of earlier servers would log each line again.
    for before in _handlers():
        logger.removeHandler(before)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
