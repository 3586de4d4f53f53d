"""Loads the store from a file at start and saves it at an interval and on a graceful stop.

Ids are never used twice in an epoch. Only a snapshot that was written on a clean shutdown and is being restored for
the first time is certain to cover every id that clients have seen. Otherwise, new ids start far above its last one.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsmq import logs
from dsmq.errors import ReplyError, StartupError
from dsmq.store import snapshot_file
from dsmq.store.schema import INDEX
from dsmq.store.snapshot_file import Abandoned, Unusable
from dsmq.store.sqlite import SQLiteStore
from dsmq.threads import join

# More ids than can be assigned between a snapshot and a kill.
RESTORE_GAP = 2**32
# Pause between two batches of rows, in which clients get the store's lock.
PAUSE_SECONDS = 0.0007
# How long a disk may take to flush the operating system's write cache.
_DISK_SECONDS = 300.0
# The final snapshot gets at least this long: keeping messages matters more than stopping on time.
LAST_SNAPSHOT_SECONDS = 60.0

_logger = logging.getLogger(__name__)


@dataclass
class SnapshotStats:
    """Statistics for metrics."""

    written: int = 0
    failed: int = 0
    seconds: float = 0.0
    """Seconds spent on written snapshots."""
    last_at: float = 0.0
    """Unix time of the last snapshot, written or restored."""
    last_bytes: int = 0
    restored: int = 0
    """The number of restored messages."""


class Snapshotter:
    """Writes snapshots of a store to a file and restores the store from it."""

    def __init__(
        self,
        store: SQLiteStore,
        file: str,
        interval_seconds: float = 0,
        *,
        clock: Callable[[], float] = time.time,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        """clock returns Unix time."""
        self.thread = threading.Thread(target=self._run, name="dsmq-snapshot", daemon=True)
        self.stats = SnapshotStats()
        self.interval = interval_seconds
        self.due_at = time.monotonic() + interval_seconds
        """If the thread makes no progress by then, it is stuck."""
        self._store = store
        # Resolve the path now: the process may change its working directory, and the file may be a symbolic link.
        self.path = Path(os.path.realpath(file))
        self._clock = clock
        self._stop = threading.Event()
        self._pause_seconds = pause_seconds
        self._lock: int | None = None
        # Whether the file is locked by this server and has been restored.
        self._is_open = False
        self.saved = False
        """Whether the final snapshot has been written."""
        self._last: threading.Thread | None = None

    # Start

    def open(self) -> None:
        """Restore the file, if it exists. Raises StartupError if snapshots can't be read or written.

        If the file is damaged, it is renamed, and the store stays empty.
        """
        if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
            # Snapshots are renamed over the previous one, which would remove a device.
            raise StartupError(f"snapshot_file: {self.path}: not a regular file")
        try:
            self._lock = _lock_file(self.path.with_name(self.path.name + ".lock"))
            snapshot_file.rehearse(self.path)
            if self.path.exists():
                self._restore()
        except sqlite3.Error as error:
            raise StartupError(f"snapshot_file: {self.path}: {error}") from error
        except OSError as error:
            what = self.path.parent if isinstance(error, FileNotFoundError) else error.filename or self.path
            raise StartupError(f"snapshot_file: {what}: {error.strerror}") from error
        self._is_open = True

    def _restore(self) -> None:
        began = time.monotonic()
        try:
            found = snapshot_file.verify(self.path)
            with snapshot_file.opened(self.path) as database:
                now = self._clock()
                state = self._store.load(database, now)
        except (Unusable, sqlite3.DatabaseError) as error:
            aside = snapshot_file.quarantine(self.path)
            about = logs.event("snapshot_refused", file=str(self.path), kept_as=str(aside), reason=str(error))
            _logger.error("no messages restored: the snapshot can't be used: %s; kept as %s", error, aside, extra=about)
            return
        gaps = found.restores + (not state.is_last)
        if gaps:
            self._store.begin_run(state.last_id + gaps * RESTORE_GAP)
        snapshot_file.record_restore(self.path, found)
        while self._store.expire():
            pass
        self.stats.last_at = state.written_at
        self._log_restored(max(0.0, now - state.written_at), time.monotonic() - began, is_complete=not gaps)

    def _log_restored(self, age: float, seconds: float, *, is_complete: bool) -> None:
        totals = self._store.totals()
        self.stats.restored = totals.messages
        about = logs.event(
            "restored",
            messages=totals.messages,
            topics=totals.topics,
            expired=totals.expired,
            seconds=seconds,
            age=age,
            complete=is_complete,
        )
        _logger.log(
            logging.INFO if is_complete else logging.WARNING,
            "restored %d messages of %d topics, up to %.1f s old, in %.2f s, from a snapshot written %.1f s ago%s%s",
            *(totals.messages, totals.topics, totals.oldest_age_ms / 1000, seconds, age),
            f"; {totals.expired} more had expired" if totals.expired else "",
            "" if is_complete else "; messages put after it are lost",
            extra=about,
        )

    # At an interval

    def start(self) -> None:
        self.due_at = time.monotonic() + self.interval
        self.thread.start()

    def stop(self) -> None:
        """Make the thread stop soon, even in the middle of a snapshot. Idempotent."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.save()
            self.due_at = time.monotonic() + self.interval

    def save(self, *, at_once: bool = False, is_last: bool = False) -> bool:
        """Write a snapshot; return whether that succeeded. Failures are logged.

        at_once is faster but blocks the store. is_last marks a clean shutdown: there will be no more puts.
        """
        began = time.monotonic()
        try:
            fill = partial(self._fill, at_once=at_once, is_last=is_last)
            size = snapshot_file.write(self.path, fill, self._allow_slow_disk)
        except Abandoned:
            return False
        except Exception as error:
            self.stats.failed += 1
            kept = "the previous one is kept" if os.path.exists(self.path) else "there is no previous one"
            is_expected = isinstance(error, OSError | sqlite3.Error | ReplyError | MemoryError)
            _logger.error(
                "can't write a snapshot to %s: %s; %s",
                *(self.path, error, kept),
                extra=logs.event("snapshot_failed", file=str(self.path), error=str(error)),
                exc_info=not is_expected,
            )
            return False
        seconds = time.monotonic() - began
        self.stats.written += 1
        self.stats.seconds += seconds
        self.stats.last_at, self.stats.last_bytes = self._clock(), size
        about = logs.event("snapshot", bytes=size, seconds=seconds, last=is_last)
        level = logging.INFO if is_last else logging.DEBUG
        _logger.log(level, "snapshot of %d bytes in %.2f s", size, seconds, extra=about)
        return True

    def _fill(self, target: sqlite3.Connection, *, at_once: bool, is_last: bool) -> None:
        pause = 0 if at_once else self._pause_seconds
        # Expired messages should not be in the file, but a snapshot with them is better than none.
        with suppress(ReplyError):
            while self._store.expire():
                self._checkpoint(pause)
        # RHEL 8 has SQLite 3.26, which has no VACUUM INTO.
        file = snapshot_file.temporary(self.path) if at_once and sqlite3.sqlite_version_info >= (3, 27) else None
        with self._store.snapshot(self._clock(), is_last=is_last, file=file, on_progress=self._checkpoint) as batches:
            snapshot_file.create_tables(target)
            target.execute("BEGIN")
            for insert, rows in batches:
                target.executemany(insert, rows)
                self._checkpoint(pause)
        self._allow_slow_disk()
        target.execute(INDEX)
        target.execute("COMMIT")

    def _checkpoint(self, seconds: float = 0) -> None:
        """Report progress and let clients use the store for this time. Raises Abandoned if the server is stopping."""
        self.due_at = time.monotonic()
        if self._stop.wait(seconds):
            raise Abandoned

    def _allow_slow_disk(self) -> None:
        """Like `_checkpoint`, before an operation that may take the disk a long time."""
        self._checkpoint()
        self.due_at += _DISK_SECONDS

    # Stop

    def finish(self, deadline: float, *, is_last: bool) -> None:
        """Write the final snapshot and release the file. If this is interrupted or takes too long, call `abandon`."""
        deadline = max(deadline, time.monotonic() + LAST_SNAPSHOT_SECONDS)
        join(self.thread, deadline)
        # If the server failed to start before it restored the file, the file is the only copy of the messages.
        if self._is_open and not self.thread.is_alive():
            self._stop.clear()
            save = partial(self.save_last, is_last=is_last)
            # Save in a thread, so that an interrupt ends only the wait.
            self._last = threading.Thread(target=save, name=self.thread.name, daemon=True)
            try:
                self._last.start()
            except RuntimeError:
                # No thread can be started, so save in this one: keeping messages matters more than being interruptible.
                save()
            join(self._last, deadline)
        self._close_unless_busy()

    def save_last(self, *, is_last: bool = True) -> bool:
        """Write the final snapshot when nothing uses the store any more; return whether that succeeded."""
        self.saved = self.save(at_once=True, is_last=is_last)
        return self.saved

    def abandon(self) -> list[str]:
        """Abort the final snapshot unless it has been written, and log that messages are lost. Idempotent.

        Return the name of the thread if it is stuck.
        """
        if not self._is_open:
            return []
        self._stop.set()
        try:
            if self._last:
                join(self._last, 0)
        finally:
            if not self.saved:
                about = logs.event("snapshot_given_up", file=str(self.path))
                _logger.error("final snapshot abandoned: messages put since the previous one are lost", extra=about)
        return self._close_unless_busy()

    def _close_unless_busy(self) -> list[str]:
        if self.thread.is_alive() or (self._last and self._last.is_alive()):
            return [self.thread.name]
        self.close()
        return []

    def close(self) -> None:
        """Release the file for other servers. Idempotent."""
        self._is_open = False
        if self._lock is not None:
            import fcntl  # noqa: PLC0415 - Windows has none

            # Unlock explicitly: a forked process may have a copy of the descriptor.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self.close_inherited()

    def close_inherited(self) -> None:
        """Close a forked process's copy of the lock's descriptor, without unlocking the file."""
        if self._lock is not None:
            # The order matters: an interrupt in between must not lead to closing the descriptor twice.
            descriptor, self._lock = self._lock, None
            os.close(descriptor)


def _lock_file(path: Path) -> int:
    """Lock a file and return its descriptor. The file is never removed, because another server may be opening it."""
    import fcntl  # noqa: PLC0415 - Windows has none

    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise StartupError(f"snapshot_file: another server uses {path}") from None
        raise
    return descriptor
