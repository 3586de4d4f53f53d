"""The status page's data about topics, their messages, and clients."""

from __future__ import annotations

import codecs
import heapq
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from dsmq.broker.auth import Role
from dsmq.errors import ReplyError
from dsmq.store.api import Message, Store, TopicStats
from dsmq.store.selection import Pattern

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.context import ServerContext
    from dsmq.broker.event_loop import EventLoop

# Max topics or clients in one list.
MAX_ROWS = 100
# Max messages shown per topic and max bytes of each.
MAX_MESSAGES, MAX_SHOWN_BYTES = 20, 4096
# Max bytes of topic names shown for a client, which may read many topics at once.
MAX_NAMES_BYTES = 512
# Topics filtered at a time, in less than 1 ms, so that event loops can run in between.
FILTER_SLICE = 2_000
# Max share of time spent on searches for a page; searching 1,000,000 topics takes a second.
SEARCH_SHARE = 0.05


class Inspector:
    """A view of a server's topics and clients. Safe to use from any thread. Does not mark messages as read."""

    def __init__(self, context: ServerContext, workers: Sequence[EventLoop]) -> None:
        self._store: Store = context.store
        self._take_queues = context.take_queues
        self._workers = workers
        # The text and position of the last search, when to search again, and the result.
        self._last_search: tuple[tuple[bytes, bytes], float, list[bytes], int] = ((b"", b""), 0.0, [], 0)

    # Topics

    def largest_topics(self) -> list[dict[str, Any]]:
        return self._topics(self._store.in_memory.largest_topics(MAX_ROWS))

    def find_topics(self, text: bytes, after: bytes) -> dict[str, Any]:
        """Return how many topic names contain a text or match it as a pattern, and the first of them above `after`."""
        search, search_again_at, first, matches = self._last_search
        began = time.monotonic()
        if search != (text, after) or began >= search_again_at:
            found = self._find(text)
            # Find one more than fits, to know whether there are others.
            first, matches = heapq.nsmallest(MAX_ROWS + 1, [name for name in found if name > after]), len(found)
            now = time.monotonic()
            self._last_search = (text, after), now + (now - began) / SEARCH_SHARE, first, matches
        return {"topics": self._topics(first[:MAX_ROWS]), "matches": matches, "is_last": len(first) <= MAX_ROWS}

    def _find(self, text: bytes) -> list[bytes]:
        names, found = self._store.in_memory.topic_names(), list[bytes]()
        is_wanted = Pattern(text).matches if b"*" in text else lambda name: text in name
        for start in range(0, len(names), FILTER_SLICE):
            found += filter(is_wanted, names[start : start + FILTER_SLICE])
            # Let other threads run.
            time.sleep(0)
        return found

    def _topics(self, names: list[bytes]) -> list[dict[str, Any]]:
        return [_topic(stats) for name in names if (stats := topic_stats(self._store, name)) and stats.messages]

    def topic(self, name: bytes, *, with_messages: bool) -> dict[str, Any]:
        """Return the state of a topic, the clients that use it, and its last messages if permitted."""
        stats = topic_stats(self._store, name) or TopicStats(name, 0, 0, 0, 0)
        clients = self._connections()
        readers = [(self._lag_in(client, stats), client) for client in clients if _reads(client, name)]
        writers = [(None, client) for client in clients if client.last_put == name]
        return {
            **_topic(stats),
            "readers": self._clients(readers),
            "reader_count": len(readers),
            "writers": self._clients(writers),
            "writer_count": len(writers),
            **self._groups(name),
            "last": [_message(message) for message in self._newest(name)] if with_messages else None,
        }

    def _groups(self, topic: bytes) -> dict[str, Any]:
        """Return the first groups of workers that share a topic's messages, and the jobs that their workers hold."""
        groups, queues = self._store.groups, self._take_queues
        found = groups.stats(lambda group: group.selection.matches(topic))
        return {
            "groups": [
                {
                    "topic": group.key.decode(),
                    "name": group.name.decode(),
                    **group.figures,
                    "waiting_workers": queues.count((group.key, group.name)),
                }
                for group in islice(found, MAX_ROWS)
            ],
            "jobs": [
                {
                    "topic": group.key.decode(),
                    "group": group.name.decode(),
                    "worker": job.worker,
                    "id": job.id,
                    "attempt": job.attempt,
                    "seconds": held_ms / 1000,
                }
                for group, job, held_ms in groups.held(topic, MAX_ROWS)
            ],
        }

    def _newest(self, name: bytes) -> Iterator[Message]:
        """Iterate over the last messages, newest first. Takes the store's lock separately for each one."""
        below = sys.maxsize
        for _ in range(MAX_MESSAGES):
            try:
                message = self._store.in_memory.peek(name, below)
            except ReplyError:
                return
            if message is None:
                return
            yield message
            below = message.id

    # Clients

    def slowest_clients(self) -> list[dict[str, Any]]:
        """Return the clients that are furthest behind, furthest first."""
        return self._clients([(self._lag(client), client) for client in self._connections()])

    def _connections(self) -> list[Connection]:
        return [client for worker in self._workers for client in list(worker.connections)]

    def _clients(self, clients: Sequence[tuple[int | None, Connection]]) -> list[dict[str, Any]]:
        slowest = heapq.nlargest(MAX_ROWS, clients, key=lambda pair: (pair[0] or 0, -pair[1].id))
        now = time.monotonic()
        return [_client(client, lag, now) for lag, client in slowest]

    def _lag(self, client: Connection) -> int | None:
        """Return how many messages a client has yet to receive from the topic that it last read."""
        if client.last_read is None:
            return None
        topic, number = client.last_read
        return max(0, self._store.in_memory.last_number(topic) - number)

    def _lag_in(self, client: Connection, stats: TopicStats) -> int | None:
        """Return how many messages a reader has yet to receive from a topic, or None if unknown."""
        if client.last_read is not None and client.last_read[0] == stats.name:
            return self._lag(client)
        selection = client.last_selection
        return 0 if client.waiting or (selection is not None and selection[1] >= stats.last_id) else None


def _reads(client: Connection, topic: bytes) -> bool:
    """Return whether a client waits for messages of a topic or last read from it."""
    pending, selection = client.reads.pending, client.last_selection
    return (
        (client.last_read is not None and client.last_read[0] == topic)
        or (selection is not None and selection[0].matches(topic))
        or (pending is not None and pending.registered and pending.covers(topic))
    )


def topic_stats(store: Store, topic: bytes) -> TopicStats | None:
    """Return the stats of a topic, or None if the store fails."""
    try:
        return store.in_memory.stats(topic)
    except ReplyError:
        return None


def _topic(stats: TopicStats) -> dict[str, Any]:
    return {
        "name": stats.name.decode(errors="replace"),
        "messages": stats.messages,
        "bytes": stats.accounted_bytes,
        "last_number": stats.last_number,
        "last_id": stats.last_id,
        "oldest_age_seconds": stats.oldest_age_ms / 1000,
        "dropped": stats.dropped,
    }


def _message(message: Message) -> dict[str, Any]:
    shown = message.body[:MAX_SHOWN_BYTES]
    text = _text(shown, is_cut=len(message.body) > MAX_SHOWN_BYTES)
    return {
        "id": message.id,
        "number": message.number,
        "age_seconds": message.age_ms / 1000,
        "bytes": len(message.body),
        "shown_bytes": len(shown),
        **({"hex": shown.hex()} if text is None else {"text": text}),
    }


def _text(body: bytes, *, is_cut: bool) -> str | None:
    """Return a body as text, or None if it is binary. With `is_cut`, drop an incomplete last character."""
    try:
        return None if b"\0" in body else codecs.getincrementaldecoder("utf-8")().decode(body, final=not is_cut)
    except UnicodeDecodeError:
        return None


def _shorten(names: bytes) -> bytes:
    return names if len(names) <= MAX_NAMES_BYTES else names[:MAX_NAMES_BYTES] + "…".encode()


def _client(client: Connection, lag: int | None, now: float) -> dict[str, Any]:
    pending, last_read, selection = client.reads.pending, client.last_read, client.last_selection
    reads = pending.about if pending else selection[0].about if selection else last_read and last_read[0]
    return {
        "id": client.id,
        "name": client.name.decode(errors="replace"),
        "peer": client.peer.name,
        "role": "" if client.role is Role.NOBODY else client.role.name.lower(),
        "connected_seconds": max(0.0, now - client.opened_at),
        "waiting": client.waiting,
        "topic": last_read[0].decode(errors="replace") if last_read else None,
        "reads": _shorten(reads).decode(errors="replace") if reads else None,
        "writes": client.last_put.decode(errors="replace") if client.last_put else None,
        "lag": lag,
    }
