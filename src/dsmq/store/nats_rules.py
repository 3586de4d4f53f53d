"""The rules for topics over NATS: they are stored in the stream, and all mirrors apply them from that point on.

The latest rules apply. A server writes the rules in its settings when it starts and when they change, if the stream has
others; a server without rules in its settings adopts the stream's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING

from dsmq.logs import event
from dsmq.store.api import Limits
from dsmq.store.nats_api import FULL, EngineError
from dsmq.store.rules import NO_RULES, decode_rules, encode_rules

if TYPE_CHECKING:
    from dsmq.store.nats_mirror import Mirror
    from dsmq.store.nats_stream import Stream
    from dsmq.store.sqlite import MirrorStore

# How long to try to write rules and how long a reload waits for that.
WRITE_SECONDS, RELOAD_SECONDS = 20.0, 5.0
_RETRY_SECONDS = 0.25

_logger = logging.getLogger(__name__)


class StreamRules:
    """The limits in this server's settings and the stream's rules, which override some of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while either changes, until the mirror has the result."""
        self.own = Limits()
        self.fact = b""
        """The rules that the mirror applies; empty if it has not reached any."""
        self.is_unwritten = False
        """Whether the rules in the settings have changed since they were written."""

    def limits(self) -> Limits:
        """Return the limits to apply: those in the stream's rules, and this server's for the rest."""
        return decode_rules(self.fact or NO_RULES, self.own)

    def to_write(self) -> bytes | None:
        """Return the rules in the settings if they have to be written."""
        own = encode_rules(self.own)
        is_missing = not self.fact and own != NO_RULES
        return own if own != (self.fact or NO_RULES) and (self.is_unwritten or is_missing) else None

    def apply(self, store: MirrorStore, fact: bytes, milliseconds: int) -> Iterator[int]:
        """Apply the stream's rules, written this long ago, in slices. Raises ValueError."""
        decode_rules(fact, self.own)
        # Messages that had expired by then stay expired.
        yield from store.expire_as_of(milliseconds)
        with self.lock:
            self.fact = fact
            self.is_unwritten &= fact != encode_rules(self.own)
            store.limits = self.limits()
        yield from store.expire_as_of(milliseconds)

    def report(self) -> None:
        """Log which rules apply, if they differ from the settings."""
        own, rules = encode_rules(self.own), self.fact.decode(errors="replace")
        if self.fact in (b"", own):
            return
        if own == NO_RULES:
            _logger.info("the stream's rules for topics apply: %s", rules, extra=event("rules", rules=rules))
            return
        about = event("other_rules", rules=rules)
        _logger.warning("another server's rules for topics apply now: %s", rules, extra=about)


class SharedLimits:
    """The limits of a store in a stream."""

    mirror: Mirror
    rules: StreamRules
    stream: Stream
    thread: threading.Thread
    _loop: asyncio.AbstractEventLoop
    _max_age_ms: int

    @property
    def max_age_ms(self) -> int:
        return self._max_age_ms

    @max_age_ms.setter
    def max_age_ms(self, value: int) -> None:
        self._max_age_ms = self.mirror.store.max_age_ms = value
        self._configure()

    @property
    def limits(self) -> Limits:
        return self.mirror.store.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        rules = self.rules
        with rules.lock:
            if encode_rules(limits) != encode_rules(rules.own):
                rules.is_unwritten = True
            rules.own = limits
            self.mirror.store.limits = rules.limits()
        self._configure()
        if self.thread.is_alive() and self.mirror.ready and rules.to_write() is not None:
            # Wait, so that the rules apply by the time the server logs the reload.
            with suppress(TimeoutError, CancelledError):
                asyncio.run_coroutine_threadsafe(self._write_rules(), self._loop).result(RELOAD_SECONDS)

    def _configure(self) -> None:
        """Make the mirror update the stream's configuration at its next check."""
        self.stream.configure(self._max_age_ms, self.rules.own.max_stored_bytes)

    async def _write_rules(self) -> None:
        """Write the rules in the settings to the stream, if necessary, and wait until the mirror applies them."""
        until, error = time.monotonic() + WRITE_SECONDS, None
        while time.monotonic() < until and (fact := self.rules.to_write()) is not None:
            try:
                message_id = await self.stream.write_rules(fact)
            except EngineError as failed:
                error = failed
                if failed.code in FULL:
                    break
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self.rules.is_unwritten = False
            await self.mirror.wait_for(message_id)
            return
        if error is not None and self.rules.to_write() is not None:
            _logger.error("the rules for topics could not be written to the stream: %s", error)
