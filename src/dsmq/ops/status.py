"""How the server is: what /metrics, /healthz, /readyz, INFO and the status page show of it."""

from __future__ import annotations

import heapq
import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dsmq import __version__
from dsmq.broker.auth import Role
from dsmq.broker.commands import Services
from dsmq.broker.connection import Connection
from dsmq.broker.counters import Counters, total
from dsmq.broker.event_loop import PULSE_SECONDS, Worker
from dsmq.errors import ReplyError
from dsmq.ops.metrics import Rates
from dsmq.store.api import Limits, Timing, TopicStats, Totals
from dsmq.store.expiry import Expiry
from dsmq.store.snapshots import SnapshotStats, Snapshotter

# By what name the metrics sum up the topics that are not shown one by one.
OTHER = b"other"
# What the status page shows of each kind.
MAX_SHOWN = 100


class Status:
    """Sees all parts of a server, and changes none. To be used from any thread."""

    def __init__(
        self,
        services: Services,
        workers: Sequence[Worker],
        expiry: Expiry,
        keeper: Snapshotter | None,
        max_connections: int,
    ) -> None:
        self.started_at = time.time()
        self.port: int | None = None
        """The TCP port that clients connect to."""
        self._began = time.monotonic()
        self.refused = Counters()
        """What was counted of connections that no worker has seen."""
        self.serving = False
        self.stopping = False
        self._services = services
        self._workers = workers
        self._expiry = expiry
        self._keeper = keeper
        self._max_connections = max_connections
        self._rates = Rates(self._began)

    # What Prometheus asks for

    def counters(self) -> Counters:
        return total([*(worker.counters for worker in self._workers), self.refused])

    def totals(self) -> Totals:
        return self._services.store.totals()

    def limits(self) -> Limits:
        return self._services.store.limits

    def timings(self) -> Mapping[str, Timing]:
        return self._services.store.timings()

    def expiry(self) -> Timing:
        return self._expiry.timing

    def snapshots(self) -> SnapshotStats:
        return self._keeper.stats if self._keeper else SnapshotStats()

    def gauges(self) -> Mapping[str, tuple[str, float]]:
        settings = self._services.settings
        late = self.totals().oldest_age_ms / 1000 - settings.max_age_seconds
        return {
            "connections": ("Open connections.", self.connections()),
            "connections_limit": ("Most open connections.", self._max_connections),
            "connections_per_address_limit": ("Most of one address.", settings.max_connections_per_address),
            "unauthenticated_connections": ("Those of them without a token yet.", self._strangers()),
            "unauthenticated_connections_limit": ("Most of those.", settings.max_unauthenticated_connections),
            "waiting_readers": ("Readers waiting for a message.", self.waiting()),
            "waiting_readers_limit": ("Most waiting readers.", settings.max_waiting_readers),
            "message_size_limit_bytes": ("Longest message.", settings.max_message_bytes),
            "max_age_seconds": ("Age at which messages expire.", settings.max_age_seconds),
            "expiry_lag_seconds": ("How much older than that the oldest message held is.", max(0.0, late)),
            "snapshot_interval_seconds": ("How often a snapshot is written; 0: not while it runs.", self._interval()),
            "ready": ("Whether it accepts clients and puts: 1 or 0.", not self.unready()),
            "healthy": ("Whether all of its threads do their work: 1 or 0.", not self.stuck()),
        }

    def top_topics(self) -> list[tuple[TopicStats, float]]:
        count, store = self._services.settings.metrics_topics, self._services.store
        if not count:
            return []
        top, rest = self._rates.top(count, store.last_numbers(), time.monotonic())
        shown: list[tuple[TopicStats, float]] = []
        for name, rate in top:
            if name == OTHER:
                rest += rate
            elif stats := self._stats(name):
                shown.append((stats, rate))
        held = self.totals()
        other = TopicStats(
            OTHER,
            max(0, held.messages - sum(stats.messages for stats, _ in shown)),
            max(0, held.bytes - sum(stats.bytes for stats, _ in shown)),
            0,
            0,
        )
        return [*shown, (other, max(0.0, rest))]

    # Numbers of connections

    def connections(self) -> int:
        return sum(len(worker.connections) for worker in self._workers)

    def waiting(self) -> int:
        return self._services.usage.waiting.total

    def _interval(self) -> float:
        return self._keeper.interval if self._keeper else 0

    def _strangers(self) -> int:
        return self._services.usage.unauthenticated.total

    # Health

    def stuck(self) -> list[str]:
        """Return the names of threads that are dead, or have shown no sign of life for too long."""
        patience, now = self._services.settings.health_timeout_seconds, time.monotonic()
        seen = [(worker.thread, worker.now + PULSE_SECONDS) for worker in self._workers]
        seen.append((self._expiry.thread, self._expiry.due_at))
        if self._keeper:
            seen.append((self._keeper.thread, self._keeper.due_at))
        return [
            thread.name
            for thread, due in seen
            # While the server stops, one after the other ends.
            if thread.ident and (now - due > patience if thread.is_alive() else not self.stopping)
        ]

    def unready(self) -> list[str]:
        """Return why no clients or puts are taken; nothing where they are."""
        reasons = []
        if self.stopping:
            reasons.append("stopping")
        elif not self.serving:
            reasons.append("starting")
        held, limits = self.totals(), self._services.store.limits
        # What does not fit has been refused before the last byte is taken.
        if held.messages >= limits.messages or held.accounted_bytes >= limits.bytes * 0.99:
            reasons.append("full")
        if self.connections() >= self._max_connections:
            reasons.append("as many connections as may be")
        return reasons

    def health(self) -> tuple[bool, dict[str, object]]:
        """Return whether every thread does its work, and what /healthz says."""
        stuck = self.stuck()
        return not stuck, {"status": "failing" if stuck else "ok", "stuck_threads": stuck}

    def readiness(self) -> tuple[bool, dict[str, object]]:
        """Return whether clients and puts are taken, and what /readyz says."""
        reasons = self.unready()
        return not reasons, {"status": "not ready" if reasons else "ready", "reasons": reasons}

    # What INFO shows

    def info(self) -> Mapping[str, Mapping[str, object]]:
        """Return sections of names and values."""
        counted, held, store = self.counters(), self.totals(), self._services.store
        return {
            "server": {
                "dsmq_version": __version__,
                "python_version": platform.python_version(),
                "process_id": os.getpid(),
                "epoch": store.epoch,
                "run": store.run,
                "uptime_in_seconds": int(time.monotonic() - self._began),
            },
            # valkey-glide wants to know which server takes puts.
            "replication": {"role": "master", "connected_slaves": 0},
            "clients": {"connected_clients": self.connections(), "blocked_clients": self.waiting()},
            "stats": {
                "total_connections_received": counted.opened,
                "rejected_connections": sum(counted.refused.values()),
                "total_commands_processed": counted.requests,
                "puts": held.stored,
                "deliveries": counted.delivered,
                "errors": sum(counted.errors.values()),
            },
            "store": {**held._asdict(), "last_id": store.last_id()},
            # redis-cli --stat shows these two.
            "memory": {"used_memory": held.accounted_bytes},
            "keyspace": {"db0": f"keys={held.topics},expires=0,avg_ttl=0"},
        }

    # What the status page shows

    def page(self) -> dict[str, Any]:
        """Return what the status page shows, as plain values: never a message, nor a token."""
        counted, held, limits = self.counters(), self.totals(), self.limits()
        stuck, now = self.stuck(), time.time()
        return {
            "version": __version__,
            "epoch": self._services.store.epoch,
            "now": now,
            "uptime_seconds": time.monotonic() - self._began,
            "host": self._services.settings.host,
            "port": self.port,
            "tokens": bool(self._services.access.gate.tokens),
            "tls": bool(self._services.settings.tls_cert_file),
            "ready": not self.unready(),
            "healthy": not stuck,
            "reasons": [*self.unready(), *(f"{name} is stuck" for name in stuck)],
            "stopping": self.stopping,
            "counters": {
                "puts": held.stored,
                "deliveries": counted.delivered,
                "received_bytes": counted.bytes_in,
                "sent_bytes": counted.bytes_out,
                "expired": held.expired,
                "expired_unread": held.expired_unread,
                "puts_refused": sum(counted.puts_refused.values()),
                "errors": sum(counted.errors.values()),
                "connections_opened": counted.opened,
                "connections_refused": sum(counted.refused.values()),
                "auth_failures": counted.wrong_tokens,
            },
            "held": {
                "messages": held.messages,
                "messages_limit": limits.messages,
                "bytes": held.accounted_bytes,
                "bytes_limit": limits.bytes,
                "topics": held.topics,
                "topics_limit": limits.topics,
                "oldest_age_seconds": held.oldest_age_ms / 1000,
                "max_age_seconds": self._services.settings.max_age_seconds,
            },
            "connections": {
                "open": self.connections(),
                "limit": self._max_connections,
                "waiting_readers": self.waiting(),
                "unauthenticated": self._strangers(),
            },
            "topics": self._deepest(),
            "topics_shown_of": held.topics,
            "clients": self._clients(),
            "errors": [
                {"at": at, "code": code, "client": client, "message": message}
                for at, code, client, message in sorted(counted.recent, reverse=True)
            ],
        }

    def _deepest(self) -> list[dict[str, Any]]:
        found = [self._stats(name) for name in self._services.store.largest_topics(MAX_SHOWN)]
        return [
            {
                "name": stats.name.decode(errors="replace"),
                "messages": stats.messages,
                "bytes": stats.accounted_bytes,
                "last_number": stats.last_number,
                "oldest_age_seconds": stats.oldest_age_ms / 1000,
            }
            for stats in found
            if stats
        ]

    def _stats(self, topic: bytes) -> TopicStats | None:
        """Return what a topic holds; nothing where the store can't tell, or not at once."""
        try:
            stats = self._services.store.stats(topic)
        except ReplyError:
            return None
        return stats if isinstance(stats, TopicStats) else None

    def _clients(self) -> list[dict[str, Any]]:
        """Return the clients that are furthest behind, those first."""
        seen = [(self._lag(client), client) for worker in self._workers for client in list(worker.connections)]
        shown = heapq.nlargest(MAX_SHOWN, seen, key=lambda pair: (pair[0] or 0, -pair[1].id))
        now = time.monotonic()
        return [
            {
                "id": client.id,
                "name": client.name.decode(errors="replace"),
                "peer": client.peer.name,
                "connected_seconds": max(0.0, now - client.opened_at),
                "waiting": client.waiting,
                "topic": client.reading[0].decode(errors="replace") if client.reading else None,
                "lag": lag,
                "role": "" if client.role is Role.NOBODY else client.role.name.lower(),
            }
            for lag, client in shown
        ]

    def _lag(self, client: Connection) -> int | None:
        """Return how many messages of the topic it reads a client has not been sent yet."""
        if client.reading is None:
            return None
        topic, number = client.reading
        return max(0, self._services.store.last_number(topic) - number)
