"""Deletes messages on request, before they expire, in slices too short to delay clients."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from dsmq.errors import StoreFailed
from dsmq.store.database import SLICE_SECONDS, Database
from dsmq.store.schema import ExpiredRow
from dsmq.store.selection import Selection
from dsmq.store.topics import TopicTable


class Purges:
    """The part of a store that purges topics."""

    _database: Database
    _topics: TopicTable
    _last_id: int

    def _flush(self) -> None:
        raise NotImplementedError

    def _delete_first(self, rows: list[ExpiredRow]) -> int:
        raise NotImplementedError

    def purge(self, selection: Selection) -> Iterator[int]:
        with self._database:
            # Flush the buffer, so that no row contains messages that are put later.
            self._flush()
            last_id, topics = self._last_id, list(self._topics.by_row)
        while topics:
            with self._database:
                count = self._purge_some(selection, topics, last_id)
            yield count

    def _purge_some(self, selection: Selection, topics: list[int], last_id: int) -> int:
        """Delete some messages and remove finished topics from the list; return the number of messages deleted."""
        if self._database.is_being_copied:
            raise StoreFailed("a snapshot is being written; purge again when it is done")
        count, until = 0, time.monotonic() + SLICE_SECONDS
        while topics and time.monotonic() < until:
            topic = self._topics.by_row.get(topics[-1])
            is_wanted = topic is not None and selection.matches(topic.name)
            rows = self._database.expired(sys.maxsize, topics[-1], last_id) if is_wanted else []
            if rows:
                count += self._delete_first(rows)
            else:
                topics.pop()
        return count
