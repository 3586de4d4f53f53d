"""A server's log. The rate of repeated lines is limited, and logging never blocks a thread."""

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
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

from dsmq.system import process
from dsmq.terminal import LineFormatter, as_json

# Lines beyond this are dropped and counted.
MAX_QUEUED_LINES = 10_000
# How long an ending server or process waits for its log to be written.
DRAIN_SECONDS = 1.0
# The file, line and level of a logging call.
_Call = tuple[str, int, int]

_logger = logging.getLogger(__name__)


def event(name: str, **fields: object) -> dict[str, object]:
    """Return `extra` for a logging call: the event's name and fields, for programs that read the log."""
    return {"event": name, "fields": fields}


class JSONFormatter(logging.Formatter):
    """Formats records as lines of JSON: time (RFC 3339), level, event, message, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return as_json(fields)


class JournalFormatter(LineFormatter):
    """Formats records for systemd's journal: lines with a priority (sd-daemon(3)) and without a time."""

    _PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self._PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def formatter(form: str, stream: io.TextIOBase) -> logging.Formatter:
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

    Otherwise, a pipe that nobody reads would block every thread that logs. The daemon thread writes to the file
    descriptor, because Python locks a standard stream at exit, and a blocked write would hold that lock. The standard
    library's QueueListener does not help, because its stop() waits for a blocked write without a timeout.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # If a standard stream was replaced, for example by a notebook, it may not write to its file descriptor.
        self._descriptor = stream.fileno() if stream in (sys.__stdout__, sys.__stderr__) else None
        self._dropped = 0
        self._is_broken = False
        """Whether the last line could not be written."""
        self._drain_seconds = DRAIN_SECONDS
        self._start()
        atexit.register(self.drain)

    def _start(self) -> None:
        self._process = process()
        self._queue: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(self._queue,), name="dsmq-log", daemon=True).start()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Queue a line or drop it if the queue is full. Safe in signal handlers."""
        if self._process is not process():
            # Threads don't survive a fork.
            self._start()
        if self._queue.qsize() < MAX_QUEUED_LINES:
            self._queue.put(text)
        else:
            self._dropped += 1
        return len(text)

    def take_dropped(self) -> int:
        """Return the number of lines dropped since the last call; 0 while a report of them would be dropped, too."""
        if self._is_broken or self._queue.qsize() >= MAX_QUEUED_LINES:
            return 0
        dropped, self._dropped = self._dropped, 0
        return dropped

    def drain(self) -> None:
        """Wait up to DRAIN_SECONDS until everything has been written; if that is not enough, don't wait again."""
        if self._process is process():
            written = threading.Event()
            self._queue.put(written)
            if not written.wait(self._drain_seconds):
                self._drain_seconds = 0.0

    def _run(self, texts: queue.SimpleQueue[str | threading.Event]) -> None:
        while True:
            text = texts.get()
            if isinstance(text, threading.Event):
                text.set()
                continue
            try:
                self._write(text)
                self._is_broken = False
            except (OSError, ValueError):
                # The reader is gone, the disk is full, or the stream is closed.
                self._dropped += 1
                self._is_broken = True

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


class Handler(logging.StreamHandler[BackgroundStream]):
    """Writes up to `rate` lines per second for each logging call and counts the rest."""

    def __init__(self, stream: BackgroundStream, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._rate = rate
        self._clock = clock
        self._began = clock()
        # Lines per call in the current second.
        self._lines: Counter[_Call] = Counter()
        # For each call, the number of lines suppressed since the last summary, and the last such line.
        self._suppressed: dict[_Call, tuple[int, logging.LogRecord]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if (now := self._clock()) - self._began >= 1:
            self._began = now
            self._lines.clear()
        call = record.pathname, record.lineno, record.levelno
        self._lines[call] += 1
        if self._lines[call] <= self._rate:
            super().emit(record)
        else:
            self._suppressed[call] = self._suppressed.get(call, (0,))[0] + 1, record

    def summarise(self) -> None:
        """Write how many lines were suppressed or dropped since the last summary."""
        with self.lock:  # type: ignore[union-attr]  # made by the base class
            suppressed, self._suppressed = self._suppressed, {}
            for count, record in suppressed.values():
                self._write("flood", count, f"{count} more lines like: {record.getMessage()}", record.levelno)
            if dropped := self.stream.take_dropped():
                self._write("lines_dropped", dropped, f"{dropped} log lines dropped", logging.WARNING)

    def _write(self, name: str, lines: int, message: str, level: int) -> None:
        extra = event(name, lines=lines)
        super().emit(_logger.makeRecord(_logger.name, level, __file__, 0, message, (), None, extra=extra))


def _handlers() -> list[Handler]:
    return [handler for handler in logging.getLogger("dsmq").handlers if isinstance(handler, Handler)]


def summarise() -> None:
    """Log how many lines were suppressed. Should be called about once a second."""
    for handler in _handlers():
        handler.summarise()


@functools.cache
def _in_background(stream: TextIO | BackgroundStream) -> BackgroundStream:
    # Cached, so that all servers of this process write to a stream through the same thread.
    return stream if isinstance(stream, BackgroundStream) else BackgroundStream(stream)


def drain() -> None:
    """Wait up to DRAIN_SECONDS until the log has been written."""
    for handler in _handlers():
        handler.stream.drain()


def never_block() -> None:
    """Write stdout and stderr in the background, so that neither the log nor a traceback blocks.

    Only for a process that is a server and nothing else.
    """
    sys.stdout, sys.stderr = _in_background(sys.stdout), _in_background(sys.stderr)


def start(level: str = "info", format: str = "auto", stream: str = "stderr", rate: int = 10) -> None:  # noqa: A002
    """Log dsmq's messages to stderr or stdout, replacing an earlier configuration; leave other loggers alone.

    level, format and stream are values of log_level, log_format and log_stream; rate is max_log_lines_per_second.
    """
    output = _in_background(sys.stdout if stream == "stdout" else sys.stderr)
    handler = Handler(output, rate)
    handler.setFormatter(formatter(format, output))
    logger = logging.getLogger("dsmq")
    for before in _handlers():
        logger.removeHandler(before)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
