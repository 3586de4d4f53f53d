"""The requests to a NATS store that its mirror, which may lag, can answer."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from dsmq.errors import Unsure
from dsmq.store.api import Answer, Found, ManyTopics, Message, Outcome
from dsmq.store.nats_connection import encode_token

if TYPE_CHECKING:
    from dsmq.store.nats_index import ReadIndex
    from dsmq.store.nats_mirror import Mirror
    from dsmq.store.nats_puts import Publisher
    from dsmq.store.nats_stream import Stream
    from dsmq.store.selection import Selection
    from dsmq.store.sqlite import MirrorStore

T = TypeVar("T")


class FreshReads:
    """Reads that first wait for the mirror, if they find nothing or read the latest message. Thread-safe."""

    mirror: Mirror
    stream: Stream
    _index: ReadIndex
    publisher: Publisher

    @abstractmethod
    def post(self, call: Callable[[], None]) -> None:
        """Run a function in the store's thread."""

    @property
    def in_memory(self) -> MirrorStore:
        return self.mirror.store

    @property
    def epoch(self) -> str:
        return self.mirror.epoch

    @property
    def run(self) -> str:
        return self.mirror.epoch

    @property
    def lost_ids(self) -> list[int]:
        return []

    def full(self) -> set[str]:
        return self.mirror.store.full() | ({"max_stored_bytes"} if self.stream.room.is_full else set())

    def flush(self) -> None:
        self.mirror.store.flush()

    def read(self, topic: bytes, after: int, count: int, max_bytes: int, wait_ms: int = 0) -> Answer[list[Message]]:
        store = self.mirror.store
        if after <= store.last_id() and ((found := store.read(topic, after, count, max_bytes)) or wait_ms):
            return found
        return self._when_fresh(after, lambda store: store.read(topic, after, count, max_bytes))

    def latest(self, topic: bytes, after: int, below: int = sys.maxsize) -> Answer[list[Message]]:
        return self._when_fresh(after, lambda store: store.latest(topic, after, below))

    def read_many(self, wanted: ManyTopics, wait_ms: int = 0) -> Answer[Found]:
        store = self.mirror.store
        if not wanted.latest and wanted.after <= store.last_id():
            found = store.read_many(wanted)
            if found.messages or wait_ms or not found.is_complete:
                return found
        return self._when_fresh(wanted.after, lambda store: store.read_many(wanted))

    def go_back(self, selection: Selection, count: int, below: int = sys.maxsize) -> Answer[tuple[int, int]]:
        if below < sys.maxsize:
            return self.mirror.store.go_back(selection, count, below)
        return self._when_fresh(0, lambda store: store.go_back(selection, count))

    def last_id(self) -> int:
        # The mirror may still lack a put that has been answered.
        return max(self.mirror.store.last_id(), self.publisher.last_id)

    def check_id(self, after: int) -> None:
        """Do nothing: an id from another server may be above the mirror's last one, so reads check it."""

    def _when_fresh(self, after: int, read: Callable[[MirrorStore], T]) -> Future[T]:
        """Read once the mirror has everything that the engine has now."""
        answer: Future[T] = Future()

        def finish(error: Exception | None) -> None:
            try:
                if error is not None:
                    raise error
                self.mirror.store.check_id(after)
                answer.set_result(read(self.mirror.store))
            except Exception as failed:  # noqa: BLE001 - the reader gets it
                answer.set_exception(failed)

        self.when_fresh(finish)
        return answer

    def when_fresh(self, call: Callable[[Exception | None], None]) -> None:
        """Call a function in the store's thread with None once the mirror has all that the engine has now, or an error.

        Raises StoreFailed.
        """
        self.post(partial(self._index.add, call))

    def purge(self, selection: Selection) -> Iterator[Answer[int]]:
        """Make all servers purge their mirrors and wait for this server's."""
        done: Future[int] = Future()
        counts: list[int] = []

        def on_stored(stored: Future[list[Outcome]]) -> None:
            outcome = stored.exception() or stored.result()[0]
            if isinstance(outcome, int):
                self._index.add(partial(finish, outcome), outcome)
            else:
                done.set_exception(outcome)

        def finish(message_id: int, error: Exception | None) -> None:
            if error is None:
                counts.append(self.mirror.purged.get(message_id, 0))
                # Not the count, because the caller may get this answer twice.
                done.set_result(0)
            else:
                done.set_exception(Unsure(f"{error}; messages may or may not have been purged"))

        stored: Future[list[Outcome]] = Future()
        stored.add_done_callback(on_stored)
        fact = b" ".join(map(encode_token, selection.words))
        self.post(partial(self.publisher.put_fact, self.mirror.purge_subject, fact, stored))
        while not counts:
            yield done
        yield counts[0]
