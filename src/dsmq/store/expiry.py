"""The thread that deletes expired messages, in slices too short to delay clients."""

from __future__ import annotations

import logging
import threading
import time

from dsmq import logs
from dsmq.store.api import Store, Timing

# Pauses between slices, in which clients get the store's lock; the short one once a run takes longer than the interval.
_PAUSE_SECONDS = 0.002
_SHORT_PAUSE_SECONDS = 0.0002

_logger = logging.getLogger(__name__)


class Expiry:
    """Deletes expired messages at an interval, until it is stopped."""

    def __init__(self, store: Store, interval_seconds: float) -> None:
        self.thread = threading.Thread(target=self._run, name="dsmq-expiry", daemon=True)
        self._store = store
        self._interval = interval_seconds
        self._stop = threading.Event()
        self.timing = Timing()
        """Includes pauses."""
        self.due_at = time.monotonic() + interval_seconds
        """If the thread makes no progress by then, it is stuck."""

    def start(self) -> None:
        self.due_at = time.monotonic() + self._interval
        self.thread.start()

    def stop(self) -> None:
        """Make the thread stop soon. Idempotent."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            began = self.due_at = time.monotonic()
            try:
                self.run_once()
            except Exception:
                # Readers skip expired messages anyway, and the next attempt will free their memory.
                _logger.exception("expiry failed", extra=logs.event("expiry_failed"))
            now = time.monotonic()
            self.timing = Timing(self.timing.times + 1, self.timing.seconds + now - began)
            self.due_at = now + self._interval

    def run_once(self) -> None:
        """Delete everything that has expired by now."""
        hurry_at = time.monotonic() + self._interval
        while self._store.groups.expire():
            self.due_at = time.monotonic()
            if self._stop.wait(_PAUSE_SECONDS):
                return
        while self._store.in_memory.expire():
            self.due_at = time.monotonic()
            if self._stop.wait(_PAUSE_SECONDS if time.monotonic() < hurry_at else _SHORT_PAUSE_SECONDS):
                break
