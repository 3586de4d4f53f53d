"""Recognises retried puts: remembers message ids by producer and sequence number, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from dsmq.errors import Forgotten
from dsmq.store.api import Put

MAX_PRODUCERS = 10_000
# At least this many puts are remembered, and at most twice as many, because forgetting many at once is cheaper.
MAX_PUTS_OF_PRODUCER = 1_000
_FORGET_ABOVE = 2 * MAX_PUTS_OF_PRODUCER
MAX_REMEMBERED_PUTS = 1_000_000
REMEMBER_MS = 600_000


@dataclass(slots=True)
class Producer:
    puts: dict[int, int] = field(default_factory=dict)
    """Message ids by sequence number, in the order of the puts."""
    forgotten: int = -1
    """The highest forgotten sequence number."""
    last_at: int = 0
    """Time of its last put, in milliseconds."""

    def forget_oldest(self) -> int:
        """Forget all but the last MAX_PUTS_OF_PRODUCER puts; return the number of forgotten ones."""
        count = len(self.puts) - MAX_PUTS_OF_PRODUCER
        self.forgotten = max(self.forgotten, *islice(self.puts, count))
        self.puts = dict(islice(self.puts.items(), count, None))
        return count


class Deduplicator:
    """The puts of all producers. Every method requires the store's lock."""

    def __init__(self) -> None:
        # Ordered by last put, the most recent at the end.
        self._producers: OrderedDict[bytes, Producer] = OrderedDict()
        self._count = 0
        self.forgot_at: int | None = None
        """When a producer was last forgotten although it might still have retried a put."""

    def __len__(self) -> int:
        """Return the number of remembered puts."""
        return self._count

    def names(self) -> list[bytes]:
        """Return the producers' names, by last put, the most recent at the end."""
        return list(self._producers)

    def check(self, puts: Iterable[Put]) -> None:
        """Raise Forgotten if one of these puts may be a retry of a forgotten one."""
        producers = self._producers
        for _, _, key in puts:
            if key is None or (producer := producers.get(key[0])) is None or key[1] > producer.forgotten:
                continue
            if key[1] not in producer.puts:
                raise Forgotten(f"number {key[1]} of this producer is too old to tell whether it was stored")

    def is_forgotten(self, key: tuple[bytes, int] | None) -> bool:
        """Return whether a put may be a retry of a forgotten one."""
        producer = None if key is None else self._producers.get(key[0])
        return producer is not None and key is not None and key[1] <= producer.forgotten and key[1] not in producer.puts

    def check_unknown(self, name: bytes, now: int) -> None:
        """Raise Forgotten if a producer is unknown because it may have been forgotten within REMEMBER_MS."""
        if self.forgot_at is not None and name not in self._producers and now - self.forgot_at < REMEMBER_MS:
            raise Forgotten("too many other producers have put since to tell whether this was stored")

    def find(self, key: tuple[bytes, int]) -> int | None:
        """Return the message id of a remembered put."""
        producer = self._producers.get(key[0])
        return producer.puts.get(key[1]) if producer else None

    def remember(self, key: tuple[bytes, int], message_id: int, now: int, touched: dict[bytes, Producer]) -> int | None:
        """Remember a put, or return the message id if it is a retry.

        Adds the producer to `touched`, to be passed to `forget` after the batch.
        """
        name, seq = key
        producer = self._producers.get(name)
        if producer is None:
            producer = self._producers[name] = Producer()
        puts = producer.puts
        if producer.last_at != now or len(puts) >= _FORGET_ABOVE:
            touched[name] = producer
        if first_id := puts.get(seq):
            return first_id
        puts[seq] = message_id
        self._count += 1
        return None

    def forget(self, touched: dict[bytes, Producer], now: int) -> None:
        """Enforce the bounds. Called after a whole batch, so that all of its puts are treated alike."""
        for name, producer in touched.items():
            self._producers.move_to_end(name)
            producer.last_at = now
            if len(producer.puts) > _FORGET_ABOVE:
                self._count -= producer.forget_oldest()
        while self._exceeds_bounds(now - REMEMBER_MS):
            _, producer = self._producers.popitem(last=False)
            self._count -= len(producer.puts)
            if now - producer.last_at < REMEMBER_MS:
                self.forgot_at = now

    def _exceeds_bounds(self, since: int) -> bool:
        if len(self._producers) > MAX_PRODUCERS or self._count > MAX_REMEMBERED_PUTS:
            return True
        oldest = next(iter(self._producers.values()), None)
        return oldest is not None and oldest.last_at < since

    def copy(self, names: Sequence[bytes], last_id: int) -> dict[bytes, Producer]:
        """Return these producers for a snapshot, without puts of messages with ids above `last_id`."""
        copies = {}
        for name in names:
            if producer := self._producers.get(name):
                puts = {seq: message_id for seq, message_id in producer.puts.items() if message_id <= last_id}
                if puts or producer.forgotten >= 0:
                    copies[name] = Producer(puts, producer.forgotten, producer.last_at)
        return copies

    def restore(self, producers: dict[bytes, Producer], forgot_at: int | None) -> None:
        self._producers, self.forgot_at = OrderedDict(producers), forgot_at
        self._count = sum(len(producer.puts) for producer in producers.values())
