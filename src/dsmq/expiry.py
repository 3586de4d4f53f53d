"""The thread that deletes what is too old, in slices so short that no client notices."""

from __future__ import annotations

import logging
import threading
import time

from dsmq.store import Store

# Between two slices the lock is free for this long, and for less where so much expires that this would be too slow.
_PAUSE_SECONDS = 0.002
_SHORT_PAUSE_SECONDS = 0.0002

_logger = logging.getLogger(__name__)


class Expiry:
    """Deletes expired messages at every interval, until it is stopped."""

    def __init__(self, store: Store, interval_seconds: float) -> None:
        self.thread = threading.Thread(target=self._run, name="dsmq-expiry", daemon=True)
        self._store = store
        self._interval = interval_seconds
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def stop(self) -> None:
        """End soon. Idempotent."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self.run_once()
            except Exception:
                # Readers pass over what is too old by themselves, so only memory is at stake. It tries again.
                _logger.exception("expiry failed")

    def run_once(self) -> None:
        """Delete all that is too old by now."""
        hurry_at = time.monotonic() + self._interval
        while self._store.expire():
            if self._stop.wait(_PAUSE_SECONDS if time.monotonic() < hurry_at else _SHORT_PAUSE_SECONDS):
                break
