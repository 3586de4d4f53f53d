"""The mirror: a consumer of the stream, whose messages go into a `MirrorStore`."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsmq.errors import StartupError
from dsmq.logs import event
from dsmq.store.nats_api import NO_RESPONDERS, RENEWALS_PER_MAX_AGE, STREAM_NOT_FOUND, EngineError
from dsmq.store.nats_connection import NATSConnection, Received, encode_publish
from dsmq.store.nats_fold import Delivery, Fold
from dsmq.store.nats_group_state import read_state, write_state
from dsmq.store.nats_stream import Stream, StreamState
from dsmq.system import boot_time

if TYPE_CHECKING:
    from dsmq.store.nats_groups import NATSGroups
    from dsmq.store.nats_rules import StreamRules
    from dsmq.store.sqlite import MirrorStore

# A consumer that is silent for this long is lost; it sends a heartbeat once a second.
LOST_SECONDS = 2.5
CHECK_SECONDS = 1.0
# Following the stream again after a lost connection takes less than this, unless something else is wrong.
RECOVERY_SECONDS = 5.0
RETRY_SECONDS = 0.25
CLOSE_SECONDS = 2.0
# How long to wait for a new consumer: in the first attempt after a consumer was lost, because the engine may place the
# new one on a node that has just died, and otherwise.
FIRST_CREATE_SECONDS, CREATE_SECONDS = 0.5, 1.0
# Messages count as lost once this many checks in a row find the stream behind the mirror; one answer may be stale.
MAX_BEHIND = 3
_FLOW_CONTROL = 100
# An unknown number of pending messages: higher than any real one.
_UNKNOWN = 1 << 62

_logger = logging.getLogger(__name__)


class Lag:
    """How far a mirror is behind its stream."""

    def __init__(self) -> None:
        self._stream_id = self._mirrored_id = 0
        # When the mirror was last complete. Once it has the id in `_next`, it is complete as of the time there.
        self._complete_at = boot_time()
        self._next: tuple[int, float] | None = None

    def update(self, stream_id: int, mirrored_id: int) -> None:
        """Record the last ids of the stream and of the mirror."""
        now = boot_time()
        self._stream_id, self._mirrored_id = stream_id, mirrored_id
        if self._next is not None and mirrored_id >= self._next[0]:
            self._complete_at, self._next = self._next[1], None
        if mirrored_id >= stream_id:
            self._complete_at, self._next = now, None
        elif self._next is None:
            self._next = stream_id, now

    @property
    def messages(self) -> int:
        return max(0, self._stream_id - self._mirrored_id)

    def seconds(self, *, is_followed: bool) -> float:
        """Return the time since the mirror was last complete; 0 if it is complete and follows the stream."""
        return boot_time() - self._complete_at if self.messages or not is_followed else 0.0


class Mirror(Fold):
    """Follows the stream. Used in one asyncio event loop, except for `store`, which is thread-safe."""

    def __init__(
        self,
        connection: NATSConnection,
        stream: Stream,
        rules: StreamRules,
        groups: NATSGroups,
        new_store: Callable[[], MirrorStore],
    ) -> None:
        super().__init__(stream, new_store(), rules, groups)
        self._connection, self._new_store = connection, new_store
        self.epoch = ""
        self.on_ready: Callable[[], None] = lambda: None
        self.on_messages: Callable[[set[bytes]], None] = lambda _: None
        self.on_replaced: Callable[[], None] = lambda: None
        self.error: Exception | None = None
        """Why the stream is not being followed."""
        self._is_reported = False
        self.consumers = 0
        """The number of consumers created."""
        self.lag = Lag()
        self._name = f"m-{secrets.token_hex(6)}"
        self._names = itertools.count(1)
        self._replaced: deque[MirrorStore] = deque()
        self._deletions: set[asyncio.Task[None]] = set()
        self._create_seconds = CREATE_SECONDS
        self._reset_consumer(StreamState(0, "", 0))
        connection.on_received = self.apply

    @property
    def is_following(self) -> bool:
        """Whether new messages of the stream arrive."""
        return self.error is None and self._connection.connected and self.silent_seconds < LOST_SECONDS

    @property
    def silent_seconds(self) -> float:
        """The time since the consumer last sent something."""
        return boot_time() - self._heard_at

    def _reset_consumer(self, state: StreamState) -> None:
        self._sequence, self._pending, self._state = 0, _UNKNOWN, state
        # The mirror is complete once it has this message.
        self._complete_at = _UNKNOWN
        self._heard_at = boot_time()
        self._lost: str | None = None
        self._is_accepted = False
        self.lag.update(state.last_id, self.store.last_id())
        # The engine's clock minus this machine's.
        self._clock_ahead_ms = state.now_ms - round(boot_time() * 1000)
        self._behind = 0

    async def run(self) -> None:
        """Follow the stream until cancelled. Raises StartupError if it can't be used."""
        try:
            while True:
                try:
                    await self._stream.open()
                    await self._follow()
                except EngineError as error:
                    if error.code == NO_RESPONDERS and not (self._connection.has_jetstream or self.consumers):
                        raise StartupError("the NATS server has JetStream disabled") from error
                    self._fail(error)
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            await asyncio.gather(*self._deletions, return_exceptions=True)

    def _fail(self, error: EngineError) -> None:
        """Record why the stream is not being followed and log it once, not at each attempt."""
        self.error = error
        if self._is_reported or self._is_explained():
            _logger.debug("not following the stream: %s", error)
        else:
            _logger.warning("not following the stream: %s", error, extra=event("mirror_lost", error=str(error)))
            self._is_reported = True

    def _is_explained(self) -> bool:
        """Return whether the cause is a lost connection, which is logged separately."""
        connection, now = self._connection, boot_time()
        was_lost = self._heard_at < connection.opened_at and now - connection.opened_at < RECOVERY_SECONDS
        return was_lost or not connection.responds

    def _on_followed(self) -> None:
        self.consumers += 1
        self.error = None
        self._create_seconds = FIRST_CREATE_SECONDS
        if self._is_reported:
            _logger.info("following the stream again", extra=event("mirror_followed"))
        self._is_reported = False

    async def _follow(self) -> None:
        """Mirror the stream through a new consumer, until the consumer is lost."""
        state = await self._stream.state()
        self._enter_epoch(state)
        if self.silent_seconds > self.store.max_age_ms / 1000 and self.ready:
            # Messages may have expired unseen, so the topics' numbers are unknown.
            self._restart()
        if not self.ready and not self.store.last_id():
            self._facts = sorted(await self._stream.read_facts(), key=lambda part: part[0])
            self.groups.begin(self.store)
            await read_state(self._stream, self.groups, state.now_ms, state.kept_ms)
            if state.kept_ms < math.inf:
                self.store.limit_memory(round(state.kept_ms))
        # A new name each time: a request that seems to have failed may have created its consumer.
        name = f"{self._name}-{next(self._names)}"
        deliver_to = f"_INBOX.{name}"
        self._deliveries.clear()
        self._reset_consumer(state)
        await self._find_last()
        subscription = self._connection.subscribe(deliver_to.encode(), self._on_delivery)
        try:
            seconds, self._create_seconds = self._create_seconds, CREATE_SECONDS
            pending = await self._stream.create_consumer(name, deliver_to, self.store.last_id(), seconds)
            self._pending, self._is_accepted = min(self._pending, pending), True
            self._on_followed()
            self.apply()
            await self._watch()
        finally:
            self._connection.unsubscribe(subscription)
            self.apply()
            # Delete it in the background, because that takes a second if its node has died.
            deletion = asyncio.create_task(self._stream.delete_consumer(name))
            self._deletions.add(deletion)
            deletion.add_done_callback(self._deletions.discard)

    async def _find_last(self) -> None:
        """Ask the leader for the last message. The consumer's node may lag and not know how many messages there are."""
        last = await self._stream.find(last_by_subj=">")
        # The last one may have expired since, or a newer one may have been put.
        self._complete_at = min(self._complete_at, last.id if last else 0)

    def _enter_epoch(self, state: StreamState) -> None:
        if self.epoch and self.epoch != state.epoch:
            _logger.error("the stream has lost its messages: a new epoch begins")
            self._restart()
            # Do this before the epoch changes, so that no client that is still connected gets a HELLO with the new one.
            self.on_replaced()
        self.epoch = state.epoch

    def _restart(self) -> None:
        """Start again with an empty mirror, from the stream's first message."""
        self.ready, self._facts = False, []
        self._replaced.append(self.store)
        with self._rules.lock:
            self._rules.fact = b""
            self.store = self._new_store()
        self.groups.begin(self.store)
        self._stream.rules, self._stream.is_configured = None, False
        # Close the old store later, because other threads may be reading it.
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, lambda: self._replaced.popleft().close())

    def close(self) -> None:
        """Close the stores. Called after the event loop has stopped."""
        for store in (*self._replaced, self.store):
            store.close()

    async def _watch(self) -> None:
        """Check the stream and the consumer once a second. Raises EngineError if either is lost."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            mirrored = self.store.last_id()
            self._raise_if_lost()
            if not self._stream.is_configured:
                await self._stream.open()
            try:
                state = await self._stream.state()
            except EngineError as error:
                if error.code == STREAM_NOT_FOUND:
                    raise
                # Messages may still arrive.
                continue
            self.lag.update(state.last_id, self.store.last_id())
            self._behind = self._behind + 1 if state.last_id < mirrored else 0
            if self._behind >= MAX_BEHIND:
                # The stream will assign the same ids to other messages.
                await self._stream.epochs.end(self.epoch)
            if state.epoch != self.epoch:
                raise EngineError("the stream has another epoch")
            if not self.ready:
                await self._find_last()
                self.apply()
            await self._write_facts()

    def _raise_if_lost(self) -> None:
        if self._lost is None and self.silent_seconds > LOST_SECONDS:
            self._lost = "its consumer is silent"
        if self._lost is not None:
            raise EngineError(self._lost)

    async def _write_facts(self) -> None:
        interval = self.store.max_age_ms / 1000 / RENEWALS_PER_MAX_AGE
        if self.ready and time.monotonic() - self._facts_at > interval:
            self._facts_at = time.monotonic()
            at, numbers = self.store.all_numbers()
            try:
                await self._stream.write_facts(at, numbers)
                await write_state(self._stream, self.groups, self.store.last_id())
                await self._stream.renew_rules()
            except EngineError as error:
                _logger.warning("the topics' numbers could not be written to the stream: %s", error)

    # Deliveries

    def _on_delivery(self, message: Received) -> None:
        self._heard_at = boot_time()
        if status := message.status:
            self._on_status(status, message)
            return
        # $JS.ACK.[domain.account hash.]stream.consumer.delivered.id.sequence.time.pending[.random]
        words = message.reply.split(b".")
        at = 5 if len(words) == 9 else 7
        message_id, sequence, nanoseconds = map(int, words[at : at + 3])
        if sequence != self._sequence + 1:
            self._lost = f"its consumer skipped from {self._sequence} to {sequence}"
            return
        self._stream.room.receive(message_id, len(message.subject) + len(message.headers) + len(message.body))
        self._sequence, later = sequence, words[at + 3]
        if later == b"0":
            # Some of the messages that were pending at first may have expired since.
            self._pending = min(self._pending, sequence)
        # A live message has just been put; the age of the others is computed from the engine's clock alone.
        is_live = sequence > self._pending
        put_at = self._heard_at * 1000 if is_live else nanoseconds / 1_000_000 - self._clock_ahead_ms
        self._deliveries.append(Delivery(message_id, put_at, message, later))

    def _on_status(self, status: int, message: Received) -> None:
        if status != _FLOW_CONTROL:
            self._lost = f"its consumer ended with status {status}"
            return
        if reply := message.reply or message.header(b"Nats-Consumer-Stalled"):
            # Flow control: the engine sends more messages once it has this reply.
            self._connection.send(encode_publish(reply, b""))
        last = message.header(b"Nats-Last-Consumer")
        if last and int(last) != self._sequence:
            self._lost = f"its consumer is at {int(last)}, not {self._sequence}"

    def apply(self) -> None:
        """Apply the messages delivered so far, up to one that takes a while, such as a purge; the rest wait for it."""
        # A consumer on a node that has deleted messages too early sends the rest before it is refused.
        if self._change is not None or not self._is_accepted:
            return
        deliveries, self._deliveries = self._deliveries, []
        if deliveries and self._lost is None:
            topics = self._apply(deliveries)
            last = deliveries[-1]
            self.lag.update(last.id + int(last.later), self.store.last_id())
            self.applied.set()
            if self.ready and topics:
                self.on_messages(topics)
        if not self.ready and self._change is None and self.store.last_id() >= self._complete_at:
            self.store.apply([], max(self.store.last_id(), self._state.last_id))
            self._apply_facts(self._state.last_id)
            self.lag.update(self._state.last_id, self.store.last_id())
            self.groups.begin_counts()
            self.ready = True
            if self.groups.count:
                # Write the state before facts that are not part of the last one expire.
                self._facts_at = -math.inf
            self.applied.set()
            self.on_ready()
