"""Recognises puts that are sent again: remembers message ids by producer and sequence number, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dsmq.errors import Forgotten
from dsmq.store.api import Put

MAX_PRODUCERS = 10_000
MAX_PUTS_OF_PRODUCER = 1_000
MAX_REMEMBERED_PUTS = 1_000_000
REMEMBER_MS = 600_000


class Producer(NamedTuple):
    """What a snapshot keeps of a producer."""

    name: bytes
    puts: dict[int, int]
    """Message ids by sequence number, in the order of the puts."""
    forgotten: int = -1
    last_at: int = 0


class ProducerState:
    """The puts of one producer."""

    __slots__ = ("forgotten", "highest", "last_at", "newer", "older")

    def __init__(self) -> None:
        # Message ids by sequence number. Forgetting many at once is cheaper than forgetting one at each put.
        self.newer: dict[int, int] = {}
        self.older: dict[int, int] = {}
        # The highest sequence numbers: of all puts, and of the forgotten ones.
        self.highest = self.forgotten = -1
        # When it put last, in milliseconds.
        self.last_at = 0

    def __len__(self) -> int:
        return len(self.newer) + len(self.older)

    def find(self, seq: int) -> int | None:
        return self.newer.get(seq) or self.older.get(seq)

    def forget_older_half(self) -> int:
        """Return how many puts were forgotten."""
        count = len(self.older)
        self.forgotten = max(self.forgotten, max(self.older, default=-1))
        self.older, self.newer = self.newer, {}
        return count


class Deduplicator:
    """The puts of all producers. Every method requires the store's lock."""

    def __init__(self) -> None:
        # Ordered by last put, the most recent at the end.
        self._producers: OrderedDict[bytes, ProducerState] = OrderedDict()
        self._count = 0
        self.forgot_at: int | None = None
        """When a producer was last forgotten that might still resend a put."""

    def __len__(self) -> int:
        """Return the number of remembered puts."""
        return self._count

    def names(self) -> list[bytes]:
        """Return the producers' names, by last put, the most recent at the end."""
        return list(self._producers)

    def check(self, puts: Iterable[Put]) -> None:
        """Raise Forgotten if one of these is too old to know whether it was stored."""
        producers = self._producers
        for _, _, key in puts:
            if key is None or (producer := producers.get(key[0])) is None or key[1] > producer.forgotten:
                continue
            if not producer.find(key[1]):
                raise Forgotten(f"number {key[1]} of this producer is too old to tell whether it has been stored")

    def check_unknown(self, name: bytes, now: int) -> None:
        """Raise Forgotten if a producer is unknown, and may have been forgotten within REMEMBER_MS."""
        if self.forgot_at is not None and name not in self._producers and now - self.forgot_at < REMEMBER_MS:
            raise Forgotten("too many others have put since to tell whether this has been stored")

    def find(self, key: tuple[bytes, int]) -> int | None:
        """Return the message id of a remembered put."""
        producer = self._producers.get(key[0])
        return producer.find(key[1]) if producer is not None and key[1] <= producer.highest else None

    def remember(
        self, key: tuple[bytes, int], message_id: int, now: int, touched: dict[bytes, ProducerState]
    ) -> int | None:
        """Remember a put, or return the message id of the same put before.

        Adds the producer to `touched` if `forget` needs to see it after the batch.
        """
        name, seq = key
        producer = self._producers.get(name)
        if producer is None:
            producer = self._producers[name] = ProducerState()
        if producer.last_at != now or len(producer.newer) >= MAX_PUTS_OF_PRODUCER:
            touched[name] = producer
        if seq > producer.highest:
            producer.highest = seq
        elif first_id := producer.find(seq):
            return first_id
        producer.newer[seq] = message_id
        self._count += 1
        return None

    def forget(self, touched: dict[bytes, ProducerState], now: int) -> None:
        """Forget the oldest puts beyond the bounds: after a batch, so that all its puts are treated alike."""
        for name, producer in touched.items():
            self._producers.move_to_end(name)
            producer.last_at = now
            if len(producer.newer) >= MAX_PUTS_OF_PRODUCER:
                self._count -= producer.forget_older_half()
        while self._exceeds_bounds(now - REMEMBER_MS):
            _, producer = self._producers.popitem(last=False)
            self._count -= len(producer)
            if now - producer.last_at < REMEMBER_MS:
                self.forgot_at = now

    def _exceeds_bounds(self, since: int) -> bool:
        if len(self._producers) > MAX_PRODUCERS or self._count > MAX_REMEMBERED_PUTS:
            return True
        oldest = next(iter(self._producers.values()), None)
        return oldest is not None and oldest.last_at < since

    def copy(self, names: Sequence[bytes], last_id: int) -> list[Producer]:
        """Return these producers for a snapshot, without puts of messages with ids above `last_id`."""
        copies = []
        for name in names:
            if (state := self._producers.get(name)) is None:
                continue
            puts = {seq: at for half in (state.older, state.newer) for seq, at in half.items() if at <= last_id}
            if puts or state.forgotten >= 0:
                copies.append(Producer(name, puts, state.forgotten, state.last_at))
        return copies

    def restore(self, producers: Iterable[Producer], forgot_at: int | None) -> None:
        self.forgot_at = forgot_at
        for name, puts, forgotten, last_at in producers:
            state = self._producers[name] = ProducerState()
            state.newer, state.forgotten, state.last_at = puts, forgotten, last_at
            state.highest = max(puts, default=forgotten)
            self._count += len(puts)
