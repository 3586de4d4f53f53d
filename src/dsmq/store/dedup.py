"""What is remembered of puts, to recognise one that is sent again: ids, by producer and sequence number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from dsmq.errors import Forgotten
from dsmq.store.api import Put
from dsmq.store.image import Producer

MAX_PRODUCERS = 10_000
MAX_PUTS_OF_PRODUCER = 1_000
MAX_REMEMBERED_PUTS = 1_000_000
REMEMBER_MS = 600_000


class Puts:
    """What is remembered of one producer."""

    __slots__ = ("forgotten", "highest", "last_at", "newer", "older")

    def __init__(self) -> None:
        self.newer: dict[int, int] = {}
        # To forget many at once costs less than to forget one with each put.
        self.older: dict[int, int] = {}
        # The highest sequence numbers: of all, and of those that have been forgotten.
        self.highest = self.forgotten = -1
        self.last_at = 0

    def __len__(self) -> int:
        return len(self.newer) + len(self.older)

    def find(self, seq: int) -> int | None:
        """Return the id of a put that is remembered."""
        return self.newer.get(seq) or self.older.get(seq)

    def forget(self) -> int:
        """Forget the older half; return how many that were."""
        count = len(self.older)
        self.forgotten = max(self.forgotten, max(self.older, default=-1))
        self.older, self.newer = self.newer, {}
        return count


class Producers:
    """All producers that are remembered. All its methods need the store's lock."""

    def __init__(self) -> None:
        # The one heard last stands last.
        self._known: OrderedDict[bytes, Puts] = OrderedDict()
        self._count = 0
        self.forgot_at: int | None = None
        """When the last one was forgotten that might still send a put again."""

    def __len__(self) -> int:
        """How many puts are remembered."""
        return self._count

    def names(self) -> list[bytes]:
        """Return their names; the one heard last stands last."""
        return list(self._known)

    def check(self, batch: Iterable[Put]) -> None:
        """Raise Forgotten where it can't be told whether one of these has been stored."""
        known = self._known
        for _, _, key in batch:
            if key is None or (puts := known.get(key[0])) is None or key[1] > puts.forgotten:
                continue
            if not puts.find(key[1]):
                raise Forgotten(f"number {key[1]} of this producer is too old to tell whether it has been stored")

    def check_unknown(self, name: bytes, now: int) -> None:
        """Raise Forgotten where a producer is not known, and may have been forgotten before its time."""
        if self.forgot_at is not None and name not in self._known and now - self.forgot_at < REMEMBER_MS:
            raise Forgotten("too many others have put since to tell whether this has been stored")

    def find(self, key: tuple[bytes, int]) -> int | None:
        """Return the id of a put that is remembered."""
        puts = self._known.get(key[0])
        return puts.find(key[1]) if puts is not None and key[1] <= puts.highest else None

    def note(self, key: tuple[bytes, int], message_id: int, now: int, heard: dict[bytes, Puts]) -> int | None:
        """Note the id of a put; or return that of the same put before. `heard` is for `forget`, behind the batch."""
        name, seq = key
        puts = self._known.get(name)
        if puts is None:
            puts = self._known[name] = Puts()
        if puts.last_at != now or len(puts.newer) >= MAX_PUTS_OF_PRODUCER:
            heard[name] = puts
        if seq > puts.highest:
            puts.highest = seq
        elif first_id := puts.find(seq):
            return first_id
        puts.newer[seq] = message_id
        self._count += 1
        return None

    def forget(self, heard: dict[bytes, Puts], now: int) -> None:
        """Forget the oldest puts where there are too many: behind a batch, so that all of it is judged alike.

        Once a millisecond for each producer, and whenever one has enough to be halved.
        """
        for name, puts in heard.items():
            self._known.move_to_end(name)
            puts.last_at = now
            if len(puts.newer) >= MAX_PUTS_OF_PRODUCER:
                self._count -= puts.forget()
        while self._too_much(now - REMEMBER_MS):
            _, puts = self._known.popitem(last=False)
            self._count -= len(puts)
            if now - puts.last_at < REMEMBER_MS:
                self.forgot_at = now

    def _too_much(self, since: int) -> bool:
        if len(self._known) > MAX_PRODUCERS or self._count > MAX_REMEMBERED_PUTS:
            return True
        oldest = next(iter(self._known.values()), None)
        return oldest is not None and oldest.last_at < since

    # Over a restart

    def copy(self, names: Sequence[bytes]) -> list[Producer]:
        """Return what is remembered of these."""
        held = [(name, self._known[name]) for name in names if name in self._known]
        return [Producer(name, {**puts.older, **puts.newer}, puts.forgotten, puts.last_at) for name, puts in held]

    def restore(self, kept: Iterable[Producer], forgot_at: int | None) -> None:
        """Take over what was remembered before."""
        self.forgot_at = forgot_at
        for producer in kept:
            puts = self._known[producer.name] = Puts()
            puts.newer, puts.forgotten, puts.last_at = producer.puts, producer.forgotten, producer.last_at
            puts.highest = max(puts.newer, default=puts.forgotten)
            self._count += len(puts.newer)
