"""Keeps what the store holds over a restart: restores it, and writes snapshots, at an interval and at a graceful stop.

Ids are never used twice in an epoch. A snapshot that is not the store's last word, because the server was killed after
it was written or has gone on from it before, may lack ids that clients have seen: so they go on far above.
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
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from dsmq import logs
from dsmq.errors import CannotStart, ReplyError
from dsmq.store import image
from dsmq.store import snapshot_file as snapshot
from dsmq.store.image import Image, Instant, Place
from dsmq.store.snapshot_file import Abandoned, Unusable
from dsmq.store.sqlite import SQLiteStore
from dsmq.threads import join

# By how much more than the snapshot's last id there may have been, each time that the server went on from it.
RESTORE_GAP = 2**32
# Between two slices the lock is free for this long; for the rest, that clients add meanwhile, not at all.
PAUSE_SECONDS = 0.0007
# Producers whose puts are copied while the lock is held once.
_PRODUCERS = 20
# How long a disk may take to write what the system holds for it.
_DISK_SECONDS = 300.0
# What the last snapshot gets at least: what it holds is worth more than a stop in time.
LAST_SNAPSHOT_SECONDS = 60.0

_logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """What metrics show."""

    written: int = 0
    failed: int = 0
    seconds: float = 0.0
    """Time that those took which were written."""
    last_at: float = 0.0
    """When the last one was written, or the one that was restored: seconds since 1970."""
    last_bytes: int = 0
    restored: int = 0
    """Messages."""


class Keeper:
    """Writes snapshots of a store to a file, and restores it from there."""

    def __init__(
        self, store: SQLiteStore, file: str, interval_seconds: float = 0, clock: Callable[[], float] = time.time
    ) -> None:
        """clock tells the time of day: seconds since 1970."""
        self.thread = threading.Thread(target=self._run, name="dsmq-snapshot", daemon=True)
        self.tally = Tally()
        self.interval = interval_seconds
        self.due_at = time.monotonic() + interval_seconds
        """When it will have shown that it lives, at the latest."""
        self._store = store
        # Also where the process goes to another folder, or the name is a link.
        self.path = Path(os.path.realpath(file))
        self._clock = clock
        self._stop = threading.Event()
        self._pause_seconds = PAUSE_SECONDS
        self._lock: int | None = None
        self.is_open = False
        """Whether the file is this server's, and holds nothing that the store does not."""
        self.is_kept = False
        """Whether the last snapshot is written."""
        self._last: threading.Thread | None = None

    # Start

    def open(self) -> None:
        """Restore what the file holds, if there is one. Raises CannotStart where the file could not be written either.

        A file that can't be used is kept under another name, and the store stays as it is: new.
        """
        try:
            self._lock = _locked(self.path.with_name(self.path.name + ".lock"))
            snapshot.rehearse(self.path)
            if self.path.exists():
                self._restore()
        except sqlite3.Error as error:
            raise CannotStart(f"snapshot_file: {self.path}: {error}") from error
        except OSError as error:
            what = self.path.parent if isinstance(error, FileNotFoundError) else error.filename or self.path
            raise CannotStart(f"snapshot_file: {what}: {error.strerror}") from error
        self.is_open = True

    def _restore(self) -> None:
        began = time.monotonic()
        try:
            found = snapshot.examine(self.path)
            with snapshot.opened(self.path) as database:
                kept = image.read(database)
                passed = max(0.0, self._clock() - kept.written_at)
                self._store.load(database, kept, round(passed * 1000))
        except (Unusable, sqlite3.DatabaseError) as error:
            self._refuse(str(error))
            return
        # What is the store's last word is so only once.
        gaps = found.restores + (not kept.is_last)
        if gaps:
            self._store.begin_run(kept.state.last_id + gaps * RESTORE_GAP)
        snapshot.mark(self.path, found)
        while self._store.expire():
            pass
        self._tell_restored(kept, passed, time.monotonic() - began, may_lack=gaps > 0)

    def _refuse(self, reason: str) -> None:
        aside = snapshot.put_aside(self.path, datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ"))
        about = logs.event("snapshot_refused", file=str(self.path), kept_as=str(aside), reason=reason)
        _logger.error("the snapshot can't be used, so nothing is restored: %s; kept as %s", reason, aside, extra=about)

    def _tell_restored(self, kept: Image, passed: float, seconds: float, *, may_lack: bool) -> None:
        held = self._store.totals()
        lost = f"; {held.expired} more had expired" if held.expired else ""
        lost += ": what was put after it is lost" if may_lack else ""
        self.tally.restored, self.tally.last_at = held.messages, kept.written_at
        about = logs.event(
            "restored",
            messages=held.messages,
            topics=held.topics,
            expired=held.expired,
            seconds=seconds,
            age=passed,
            complete=not may_lack,
        )
        _logger.log(
            logging.WARNING if may_lack else logging.INFO,
            "restored %d messages of %d topics, up to %.1f s old, in %.2f s, from a snapshot written %.1f s ago%s",
            *(held.messages, held.topics, held.oldest_age_ms / 1000, seconds, passed),
            lost,
            extra=about,
        )

    # At an interval

    def start(self) -> None:
        """Begin to write at every interval."""
        self.due_at = time.monotonic() + self.interval
        self.thread.start()

    def stop(self) -> None:
        """End soon, in the middle of a snapshot too, but for the last one. Idempotent."""
        if self._last is None:
            self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.save(self._copy_slowly)
            self.due_at = time.monotonic() + self.interval

    def save(self, copy: Callable[[sqlite3.Connection], Instant], *, is_last: bool = False) -> bool:
        """Write a snapshot; return whether that went well. What goes wrong is logged."""
        began = time.monotonic()

        def fill(target: sqlite3.Connection) -> None:
            self._fill(target, copy, is_last=is_last)

        try:
            size = snapshot.write(self.path, fill, self._be_patient)
        except Abandoned:
            return False
        except (OSError, sqlite3.Error, ReplyError, MemoryError) as error:
            self._tell_failed(error)
            return False
        except Exception as error:
            _logger.exception("a defect while a snapshot is written")
            self._tell_failed(error)
            return False
        seconds = time.monotonic() - began
        self.tally.written += 1
        self.tally.seconds += seconds
        self.tally.last_at, self.tally.last_bytes = self._clock(), size
        about = logs.event("snapshot", bytes=size, seconds=seconds, last=is_last)
        _logger.log(
            logging.INFO if is_last else logging.DEBUG, "snapshot of %d bytes in %.2f s", size, seconds, extra=about
        )
        return True

    def _tell_failed(self, error: Exception) -> None:
        self.tally.failed += 1
        about = logs.event("snapshot_failed", file=str(self.path), error=str(error))
        _logger.error("no snapshot can be written to %s: %s; the one before stays", self.path, error, extra=about)

    def _fill(
        self, target: sqlite3.Connection, copy: Callable[[sqlite3.Connection], Instant], *, is_last: bool
    ) -> None:
        instant = copy(target)
        # Since the instant, an index has been made and written, which may have taken seconds.
        written_at = self._clock() - self._store.elapsed_ms(instant) / 1000
        snapshot.create_extra_tables(target)
        target.execute("BEGIN")
        image.finish(target, instant, written_at, is_last=is_last)
        if self._store.lost:
            image.add_lost(target, self._store.lost)
        for first in range(0, len(instant.producers), _PRODUCERS):
            names = instant.producers[first : first + _PRODUCERS]
            image.add_producers(target, self._store.remembered(names, instant.state.last_id))
            self._breathe(self._pause_seconds)
        target.execute("COMMIT")

    def _copy_slowly(self, target: sqlite3.Connection) -> Instant:
        """Copy the rows slice by slice, so that no client waits.

        Not with SQLite's backup: of a database in memory, each commit makes that start again.
        """
        snapshot.create_tables(target)
        target.execute("BEGIN")
        until, place, slices = self._store.last_id(), Place(), 1
        while True:
            part, instant = self._store.copy(place, slices)
            image.add(target, part)
            place = part.end(place)
            if instant:
                break
            if place.chunk >= until:
                # What clients have added meanwhile: in ever larger pieces, or those who put much could outrun it.
                until, slices = self._store.last_id(), 2 * slices
            self._breathe(self._pause_seconds if slices == 1 else 0)
        self._be_patient()
        snapshot.create_index(target)
        target.execute("COMMIT")
        return instant

    def _breathe(self, seconds: float = 0) -> None:
        """Show that it lives, and let others have the store."""
        self.due_at = time.monotonic()
        if self._stop.wait(seconds):
            raise Abandoned

    def _be_patient(self) -> None:
        """The same, ahead of what may take the disk long."""
        self._breathe()
        self.due_at += _DISK_SECONDS

    # Stop

    def finish(self, deadline: float, *, is_last: bool) -> list[str]:
        """Write the last snapshot, and let others have the file; return the name of the thread where it hangs.

        Where that is interrupted, it can be called again, and goes on.
        """
        deadline = max(deadline, time.monotonic() + LAST_SNAPSHOT_SECONDS)
        join(self.thread, deadline)
        # Where the start has failed before it was restored, the file holds more than the store.
        if self.is_open and not self.thread.is_alive():
            if self._last is None:
                self._stop.clear()
                save = partial(self.save_last, is_last=is_last)
                self._last = threading.Thread(target=save, name=self.thread.name, daemon=True)
            if self._last.ident is None:
                self._last.start()
            join(self._last, deadline)
        return self._close_unless_busy()

    def save_last(self, *, is_last: bool = True) -> bool:
        """Write what the store holds, once nobody uses it any more; return whether that went well.

        With is_last it is the store's last word: the next start goes on from it as if there had been none.
        """
        self._pause_seconds = 0
        self.is_kept = self.save(self._copy_at_once, is_last=is_last)
        return self.is_kept

    def _copy_at_once(self, target: sqlite3.Connection) -> Instant:
        return self._store.copy_all(target, self._breathe)

    def give_up(self) -> None:
        """End the last snapshot, if it is not written yet, and say what is lost by that. Idempotent."""
        if not self.is_open:
            return
        self._stop.set()
        try:
            if self._last:
                join(self._last, 0)
        finally:
            if not self.is_kept:
                about = logs.event("snapshot_given_up", file=str(self.path))
                _logger.error("the last snapshot is given up: what was put since the one before is lost", extra=about)
        self._close_unless_busy()

    def _close_unless_busy(self) -> list[str]:
        if self.thread.is_alive() or (self._last and self._last.is_alive()):
            return [self.thread.name]
        self.close()
        return []

    def close(self) -> None:
        """Let others have the file. Idempotent."""
        self.is_open = False
        if self._lock is not None:
            import fcntl  # noqa: PLC0415 - Windows has none

            # Said aloud, because a process that was forked may hold the same lock.
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
                os.close(self._lock)
            self._lock = None

    def abandon(self) -> None:
        """Close the copy of the lock that a forked process has, without unlocking it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(path: Path) -> int:
    """Return the descriptor of a file that no other server may have. It stays: to remove it would be a race."""
    import fcntl  # noqa: PLC0415 - Windows has none

    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CannotStart(f"snapshot_file: another server has {path}") from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
