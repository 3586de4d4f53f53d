"""The reads of a store in a stream: from its mirror, which may lag."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from dsmq.errors import BadRequest
from dsmq.store.api import Answer, Found, ManyTopics, Message
from dsmq.store.nats_mirror import MirroredStore

if TYPE_CHECKING:
    from dsmq.store.nats_index import ReadIndex
    from dsmq.store.nats_puts import Publisher
    from dsmq.store.selection import Selection
    from dsmq.store.sqlite import MirrorStore

T = TypeVar("T")


class FreshReads(MirroredStore):
    """Reads that first wait for the mirror, if they find nothing or read the latest message."""

    publisher: Publisher
    _index: ReadIndex

    @abstractmethod
    def _post(self, call: Callable[[], None]) -> None:
        """Run this in the thread of the store."""

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
        """Do nothing: an id from another server may be later than the mirror's last one, so reads check it."""

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

        self._post(lambda: self._index.add(finish))
        return answer

    @staticmethod
    def purge(_selection: Selection) -> Iterator[int]:
        raise BadRequest("PURGE is not possible with a store that several servers share")
