"""The state of a server, as /metrics, /healthz, /readyz, INFO and the status page report it."""

from __future__ import annotations

import heapq
import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dsmq import __version__
from dsmq.broker.auth import Role
from dsmq.broker.connection import Connection
from dsmq.broker.context import ServerContext
from dsmq.broker.counters import Counters, total
from dsmq.broker.event_loop import PULSE_SECONDS, EventLoop
from dsmq.errors import ReplyError
from dsmq.settings import Settings
from dsmq.store.api import Store, Timing, TopicStats, Totals
from dsmq.store.expiry import Expiry
from dsmq.store.snapshots import SnapshotStats, Snapshotter

# Max topics, and max clients, on the status page.
MAX_ROWS = 100


class Status:
    """A read-only view of all parts of a server. Safe to use from any thread."""

    def __init__(
        self,
        context: ServerContext,
        workers: Sequence[EventLoop],
        expiry: Expiry,
        keeper: Snapshotter | None,
        max_connections: int,
    ) -> None:
        self.started_at = time.time()
        self.port: int | None = None
        """The TCP port for clients."""
        self.refused = Counters()
        """Counts connections that were refused before a worker got them."""
        self.serving = False
        self.stopping = False
        self.store: Store = context.store
        self.max_connections = max_connections
        self._began = time.monotonic()
        self._context = context
        self._workers = workers
        self._expiry = expiry
        self._snapshotter = keeper

    @property
    def settings(self) -> Settings:
        """The settings in force, which a reload may change."""
        return self._context.settings

    def counters(self) -> Counters:
        return total([*(worker.counters for worker in self._workers), self.refused])

    def totals(self) -> Totals:
        return self.store.totals()

    def expiry_timing(self) -> Timing:
        return self._expiry.timing

    def snapshots(self) -> SnapshotStats:
        return self._snapshotter.stats if self._snapshotter else SnapshotStats()

    def snapshot_interval(self) -> float:
        return self._snapshotter.interval if self._snapshotter else 0

    def connections(self) -> int:
        return sum(len(worker.connections) for worker in self._workers)

    def waiting(self) -> int:
        return self._context.usage.waiting.total

    def unauthenticated(self) -> int:
        return self._context.usage.unauthenticated.total

    def topic_stats(self, topic: bytes) -> TopicStats | None:
        """Return the stats of a topic, or None if the store fails."""
        try:
            return self.store.stats(topic)
        except ReplyError:
            return None

    # Health

    def stuck_threads(self) -> list[str]:
        """Return the names of threads that are dead, or have been unresponsive for health_timeout_seconds."""
        timeout, now = self.settings.health_timeout_seconds, time.monotonic()
        due = [(worker.thread, worker.now + PULSE_SECONDS) for worker in self._workers]
        due.append((self._expiry.thread, self._expiry.due_at))
        if self._snapshotter:
            due.append((self._snapshotter.thread, self._snapshotter.due_at))
        return [
            thread.name
            for thread, due_at in due
            # While the server stops, its threads end one by one.
            if thread.ident and (now - due_at > timeout if thread.is_alive() else not self.stopping)
        ]

    def not_ready_reasons(self) -> list[str]:
        """Return why the server does not accept clients or puts; empty if it does."""
        reasons = []
        if self.stopping:
            reasons.append("stopping")
        elif not self.serving:
            reasons.append("starting")
        totals, limits = self.totals(), self.store.limits
        # Not 100 %: a message that does not fit is refused although some bytes are left.
        if totals.messages >= limits.messages or totals.accounted_bytes >= limits.bytes * 0.99:
            reasons.append("full")
        if self.connections() >= self.max_connections:
            reasons.append("too many connections")
        return reasons

    # INFO

    def info(self) -> Mapping[str, Mapping[str, object]]:
        """Return sections of names and values."""
        counters, totals, store = self.counters(), self.totals(), self.store
        return {
            "server": {
                "dsmq_version": __version__,
                "python_version": platform.python_version(),
                "process_id": os.getpid(),
                "epoch": store.epoch,
                "run": store.run,
                "uptime_in_seconds": int(time.monotonic() - self._began),
            },
            # valkey-glide looks for the server that accepts puts.
            "replication": {"role": "master", "connected_slaves": 0},
            "clients": {"connected_clients": self.connections(), "blocked_clients": self.waiting()},
            "stats": {
                "total_connections_received": counters.opened,
                "rejected_connections": sum(counters.refused.values()),
                "total_commands_processed": counters.requests,
                "puts": totals.stored,
                "deliveries": counters.delivered,
                "errors": sum(counters.errors.values()),
            },
            "store": {**totals._asdict(), "last_id": store.last_id()},
            # redis-cli --stat shows these two.
            "memory": {"used_memory": totals.accounted_bytes},
            "keyspace": {"db0": f"keys={totals.topics},expires=0,avg_ttl=0"},
        }

    # The status page

    def page(self) -> dict[str, Any]:
        """Return what the status page shows, as plain values, without messages and tokens."""
        counters, totals = self.counters(), self.totals()
        stuck, not_ready = self.stuck_threads(), self.not_ready_reasons()
        return {
            "version": __version__,
            "epoch": self.store.epoch,
            "now": time.time(),
            "uptime_seconds": time.monotonic() - self._began,
            "host": self.settings.host,
            "port": self.port,
            "tokens": bool(self._context.access.authenticator.tokens),
            "tls": bool(self.settings.tls_cert_file),
            "ready": not not_ready,
            "healthy": not stuck,
            "reasons": [*not_ready, *(f"{name} is stuck" for name in stuck)],
            "stopping": self.stopping,
            "counters": _counters(counters, totals),
            "held": self._held(totals),
            "connections": {
                "open": self.connections(),
                "limit": self.max_connections,
                "waiting_readers": self.waiting(),
                "unauthenticated": self.unauthenticated(),
            },
            "topics": self._largest_topics(),
            "topics_shown_of": totals.topics,
            "clients": self._slowest_clients(),
            "errors": [
                {"at": at, "code": code, "client": client, "message": message}
                for at, code, client, message in sorted(counters.recent, reverse=True)
            ],
        }

    def _held(self, totals: Totals) -> dict[str, float]:
        limits = self.store.limits
        return {
            "messages": totals.messages,
            "messages_limit": limits.messages,
            "bytes": totals.accounted_bytes,
            "bytes_limit": limits.bytes,
            "topics": totals.topics,
            "topics_limit": limits.topics,
            "oldest_age_seconds": totals.oldest_age_ms / 1000,
            "max_age_seconds": self.settings.max_age_seconds,
        }

    def _largest_topics(self) -> list[dict[str, Any]]:
        return [
            {
                "name": stats.name.decode(errors="replace"),
                "messages": stats.messages,
                "bytes": stats.accounted_bytes,
                "last_number": stats.last_number,
                "oldest_age_seconds": stats.oldest_age_ms / 1000,
            }
            for stats in map(self.topic_stats, self.store.largest_topics(MAX_ROWS))
            if stats
        ]

    def _slowest_clients(self) -> list[dict[str, Any]]:
        """Return the clients that are furthest behind, in descending order."""
        clients = [(self._lag(client), client) for worker in self._workers for client in list(worker.connections)]
        slowest = heapq.nlargest(MAX_ROWS, clients, key=lambda pair: (pair[0] or 0, -pair[1].id))
        now = time.monotonic()
        return [
            {
                "id": client.id,
                "name": client.name.decode(errors="replace"),
                "peer": client.peer.name,
                "connected_seconds": max(0.0, now - client.opened_at),
                "waiting": client.waiting,
                "topic": client.last_read[0].decode(errors="replace") if client.last_read else None,
                "lag": lag,
                "role": "" if client.role is Role.NOBODY else client.role.name.lower(),
            }
            for lag, client in slowest
        ]

    def _lag(self, client: Connection) -> int | None:
        """Return how many messages of the topic it last read a client has not received yet."""
        if client.last_read is None:
            return None
        topic, number = client.last_read
        return max(0, self.store.last_number(topic) - number)


def _counters(counters: Counters, totals: Totals) -> dict[str, int]:
    return {
        "puts": totals.stored,
        "deliveries": counters.delivered,
        "received_bytes": counters.bytes_in,
        "sent_bytes": counters.bytes_out,
        "expired": totals.expired,
        "expired_unread": totals.expired_unread,
        "puts_refused": sum(counters.puts_refused.values()),
        "errors": sum(counters.errors.values()),
        "connections_opened": counters.opened,
        "connections_refused": sum(counters.refused.values()),
        "auth_failures": counters.wrong_tokens,
    }
