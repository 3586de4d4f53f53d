"""The state of a server, for /metrics, /healthz, /readyz, INFO, systemd and the status page."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from dsmq import __version__
from dsmq import settings as config
from dsmq.broker.counters import Counters, total
from dsmq.errors import ReplyError
from dsmq.ops.inspector import SEARCH_SHARE, Inspector
from dsmq.store.api import EngineStats, Totals
from dsmq.system import resident_bytes
from dsmq.terminal import printable
from dsmq.wire.resp import BUILD

if TYPE_CHECKING:
    from dsmq.broker.context import ServerContext
    from dsmq.broker.event_loop import EventLoop
    from dsmq.store.expiry import Expiry
    from dsmq.store.group_figures import GroupStats
    from dsmq.store.groups import Groups
    from dsmq.store.snapshots import SnapshotStats, Snapshotter


class Fact(NamedTuple):
    """A figure reported to operators, named like its metric; with a label, one figure per value of the label."""

    name: str
    about: str
    value: float | Mapping[Any, float]
    label: str | tuple[str, ...] = ""

    @property
    def total(self) -> float:
        return sum(self.value.values()) if isinstance(self.value, Mapping) else self.value


class Status:
    """A read-only view of all parts of a server. Safe to use from any thread."""

    def __init__(
        self,
        context: ServerContext,
        workers: Sequence[EventLoop],
        expiry: Expiry,
        snapshotter: Snapshotter | None,
        snapshots: SnapshotStats,
    ) -> None:
        self.context = context
        self.started_at = time.time()
        self.port = 0
        """The TCP port for clients; 0 before the start or if there is none."""
        self.addresses: list[str] = []
        """The addresses for clients, `host:port` or `unix:/path`; empty before the start."""
        self.inspector = Inspector(context, workers)
        self.own_counters = Counters()
        """Counts what happens outside the event loops: refused connections and failed HTTP requests."""
        self.serving = False
        self.stopping = False
        self._began = time.monotonic()
        self._workers = workers
        self._expiry = expiry
        self._snapshotter = snapshotter
        self._snapshots = snapshots
        # The result of `groups` and when to count again.
        self._groups: list[tuple[GroupStats, int]] = []
        self._groups_due = 0.0

    def counters(self) -> Counters:
        return total([*(worker.counters for worker in self._workers), self.own_counters])

    def totals(self) -> Totals:
        return self.context.store.in_memory.totals()

    def connections(self) -> int:
        return sum(len(worker.connections) for worker in self._workers)

    def waiting(self) -> int:
        """Return the number of readers waiting for a message."""
        return self.context.usage.waiting.total

    def groups(self) -> list[tuple[GroupStats, int]]:
        """Return the groups of workers, each with the number of workers waiting for a job.

        At most a twentieth of the time is spent on this, so with many groups, the figures may be a few seconds old.
        """
        if (began := time.monotonic()) >= self._groups_due:
            found = []
            with suppress(ReplyError):
                for group in self.context.store.groups.stats():
                    found.append((group, self.context.take_queues.count((group.key, group.name))))
                    # Let other threads run.
                    time.sleep(0)
            now = time.monotonic()
            self._groups, self._groups_due = found, now + (now - began) / SEARCH_SHARE
        return self._groups

    # Health

    def stuck_threads(self) -> list[str]:
        """Return the names of threads that are dead or have been unresponsive for health_timeout_seconds."""
        latest = time.monotonic() - self.context.settings.health_timeout_seconds
        parts = [(part.thread, part.due_at) for part in (*self._workers, self._expiry, self._snapshotter) if part]
        store = self.context.store
        return [
            thread.name
            for thread, due_at in (*parts, (store.thread, store.due_at))
            # While the server is stopping, its threads end one by one.
            if thread and thread.ident and (due_at < latest if thread.is_alive() else not self.stopping)
        ]

    def not_ready_reasons(self) -> list[str]:
        """Return why the server does not accept clients or puts; empty if it does."""
        totals, limits = self.totals(), self.context.store.limits
        reasons = {
            "stopping": self.stopping,
            "starting": not (self.serving or self.stopping),
            # Less than 100 %, because a message that does not fit is refused even if some bytes are free.
            "full": totals.messages >= limits.max_stored_messages
            or totals.accounted_bytes >= limits.max_stored_bytes * 0.99,
            "too many connections": self.connections() >= self.context.usage.connections.limit,
        }
        store_reason = self.context.store.unready_reason
        return [*(reason for reason, applies in reasons.items() if applies), *([store_reason] if store_reason else [])]

    # Facts

    def counted(self, counters: Counters, totals: Totals) -> Iterator[Fact]:
        """Return the numbers that only increase, from the results of `counters` and `totals`."""
        yield Fact("puts", "Messages stored since the server started.", totals.stored)
        # Labels that are likely to be queried start at 0, because rate() misses the first event of a series that starts
        # at 1.
        puts_refused = {"full": 0, "store": 0} | {code.lower(): n for code, n in counters.puts_refused.items()}
        yield Fact("puts_refused", "Puts refused, by error code.", puts_refused, "reason")
        gets = {"message": counters.gets_message, "empty": counters.gets_empty}
        yield Fact("gets", "Reads answered, by result.", gets, "result")
        yield Fact("deliveries", "Messages sent to readers.", counters.delivered)
        yield Fact("messages_expired", "Messages deleted because of their age.", totals.expired)
        yield Fact("messages_expired_unread", "Expired messages that no client had read.", totals.expired_unread)
        yield Fact("messages_dropped", "Messages deleted to make room for newer ones.", totals.dropped)
        yield Fact("connections_opened", "Connections accepted.", counters.opened)
        refused = {"connections": 0, "address": 0} | counters.refused
        yield Fact("connections_refused", "Connections refused, by reason.", refused, "reason")
        yield Fact("requests", "Requests, by command.", counters.commands, "command")
        yield Fact("received_bytes", "Bytes received from clients.", counters.bytes_in)
        yield Fact("sent_bytes", "Bytes sent to clients.", counters.bytes_out)
        yield Fact("errors", "Error replies, by code.", counters.errors, "code")
        yield Fact("failures", "Connections closed and HTTP requests failed because of a bug.", counters.failures)
        yield Fact("auth_failures", "Authentication attempts with an invalid token.", counters.wrong_tokens)

    def background(self) -> Iterator[Fact]:
        """Return the numbers of the store and the background threads that only increase."""
        store, expiry, snapshots = self.context.store.timings(), self._expiry.timing, self._snapshots
        counts = {operation: timing.times for operation, timing in store.items()}
        yield Fact("store_operations", "Database operations, by kind.", counts, "operation")
        seconds = {operation: timing.seconds for operation, timing in store.items()}
        yield Fact("store_seconds", "Time spent in database operations, by kind.", seconds, "operation")
        yield Fact("expiry_runs", "Runs of the expiry thread.", expiry.times)
        yield Fact("expiry_seconds", "Time spent in runs of the expiry thread, including pauses.", expiry.seconds)
        results = {"written": snapshots.written, "failed": snapshots.failed}
        yield Fact("snapshots", "Snapshots, by result.", results, "result")
        yield Fact("snapshot_seconds", "Time spent on snapshots that were written.", snapshots.seconds)
        jobs = asdict(self.context.store.groups.counts())
        yield Fact("job_events", "Job events of all groups, by event.", jobs, "event")
        if engine := self.context.store.engine():
            yield from _engine_counted(engine)

    def usage(self, totals: Totals) -> Iterator[Fact]:
        """Return the numbers that go up and down, some from the result of `totals`."""
        snapshots, usage = self._snapshots, self.context.usage
        yield Fact("ready", "Whether the server accepts clients and puts: 1 or 0.", not self.not_ready_reasons())
        yield Fact("healthy", "Whether all threads are responsive: 1 or 0.", not self.stuck_threads())
        yield Fact("messages", "Messages stored now.", totals.messages)
        yield Fact("message_bytes", "Bytes of the message bodies stored now.", totals.bytes)
        yield Fact("stored_bytes", "Bytes stored now, as counted against the limit.", totals.accounted_bytes)
        yield Fact("topics", "Topics that have messages.", totals.topics)
        yield Fact("oldest_message_age_seconds", "Age of the oldest message.", totals.oldest_age_ms / 1000)
        lag = totals.overdue_ms / 1000
        yield Fact("expiry_lag_seconds", "Time since the oldest stored message expired.", lag)
        yield Fact("connections", "Open connections.", self.connections())
        unauthenticated = usage.unauthenticated.total
        yield Fact("unauthenticated_connections", "Open connections not authenticated yet.", unauthenticated)
        yield Fact("waiting_readers", "Readers waiting for a message.", usage.waiting.total)
        yield Fact("waiting_patterns", "Patterns that readers wait for.", usage.waiting_patterns.total)
        groups = self.context.store.groups
        yield Fact("groups", "Groups of workers.", groups.count)
        yield Fact("groups_bytes", "Memory for the state of all groups, approximately.", groups.memory)
        yield Fact("snapshot_time_seconds", "Unix time of the last snapshot written or restored.", snapshots.last_at)
        yield Fact("snapshot_size_bytes", "Size of the last snapshot written.", snapshots.last_bytes)
        yield Fact("restored_messages", "Messages restored from a snapshot at the start.", snapshots.restored)
        if engine := self.context.store.engine():
            yield from _engine_usage(engine)

    def limits(self) -> Iterator[Fact]:
        """Return the settings that bound the numbers above."""
        limits, settings = self.context.store.limits, self.context.settings
        yield Fact("messages_limit", "Max messages stored.", limits.max_stored_messages)
        yield Fact("messages_per_topic_limit", "Max messages stored per topic.", limits.max_stored_messages_per_topic)
        yield Fact("stored_bytes_limit", "Max bytes stored.", limits.max_stored_bytes)
        yield Fact("stored_bytes_per_topic_limit", "Max bytes stored per topic.", limits.max_stored_bytes_per_topic)
        yield Fact("topics_limit", "Max topics that have messages.", limits.max_topics)
        yield Fact("message_size_limit_bytes", "Max size of a message.", settings.max_message_bytes)
        yield Fact("max_age_seconds", "Age at which messages expire.", settings.max_age_seconds)
        yield Fact("connections_limit", "Max open connections.", self.context.usage.connections.limit)
        limit = settings.max_connections_per_address
        yield Fact("connections_per_address_limit", "Max open connections per client address.", limit)
        limit = settings.max_unauthenticated_connections
        yield Fact("unauthenticated_connections_limit", "Max unauthenticated connections.", limit)
        yield Fact("waiting_readers_limit", "Max waiting readers.", settings.max_waiting_readers)
        yield Fact("waiting_patterns_limit", "Max patterns that readers wait for.", settings.max_waiting_patterns)
        groups = self.context.store.groups.limits
        yield Fact("groups_limit", "Max groups of workers.", groups.max_groups)
        yield Fact("groups_bytes_limit", "Max memory for the state of all groups.", groups.max_group_bytes)
        yield Fact("jobs_in_flight_limit", "Max unfinished jobs of a group.", groups.max_jobs_in_flight)
        interval = self._snapshotter.interval if self._snapshotter else 0
        yield Fact("snapshot_interval_seconds", "Time between snapshots; 0: no periodic snapshots.", interval)

    def info(self) -> Mapping[str, Mapping[str, object]]:
        """Return the contents of INFO: sections of names and values, some with Redis's names."""
        counters, totals, store = self.counters(), self.totals(), self.context.store
        engine = store.engine()
        counted = {fact.name: fact.total for fact in self.counted(counters, totals)}
        return {
            "server": {
                "dsmq_version": __version__,
                "dsmq_build": BUILD,
                "python_version": platform.python_version(),
                "process_id": os.getpid(),
                "epoch": store.epoch,
                "run": store.run,
                "uptime_in_seconds": int(time.monotonic() - self._began),
            },
            # valkey-glide uses this to find a server that accepts writes.
            "replication": {"role": "master", "connected_slaves": 0},
            "clients": {"connected_clients": self.connections(), "blocked_clients": self.waiting()},
            "stats": {
                "total_connections_received": counted["connections_opened"],
                "rejected_connections": counted["connections_refused"],
                "total_commands_processed": counters.requests,
                **{name: counted[name] for name in ("puts", "deliveries", "errors")},
            },
            "store": {**totals._asdict(), "last_id": store.last_id()},
            "groups": _groups_info(store.groups),
            **({"engine": _engine_info(engine)} if engine else {}),
            # redis-cli --stat displays these two.
            "memory": {"used_memory": totals.accounted_bytes},
            "keyspace": {"db0": f"keys={totals.topics},expires=0,avg_ttl=0"},
        }

    # The status page

    def page(self) -> dict[str, Any]:
        """Return the data of the status page as plain values, without messages and tokens."""
        settings, access = self.context.settings, self.context.access
        stuck, not_ready = self.stuck_threads(), self.not_ready_reasons()
        counters, totals = self.counters(), self.totals()
        engine = self.context.store.engine()
        return {
            "version": __version__,
            "epoch": self.context.store.epoch,
            "now": time.time(),
            "uptime_seconds": time.monotonic() - self._began,
            "host": settings.host,
            "port": self.port,
            "addresses": self.addresses,
            "memory_bytes": resident_bytes(),
            "settings": config.changed(settings),
            "tokens": bool(access.authenticator.tokens),
            "tls": bool(settings.tls_cert_file),
            "ready": not not_ready,
            "healthy": not stuck,
            "reasons": [*not_ready, *(f"{name} is stuck" for name in stuck)],
            "stopping": self.stopping,
            "counters": {fact.name: fact.total for fact in self.counted(counters, totals)},
            "gauges": {fact.name: fact.total for fact in (*self.usage(totals), *self.limits())},
            "engine": engine and engine._asdict(),
            "topics": self.inspector.largest_topics(),
            "clients": self.inspector.slowest_clients(),
            "errors": [
                {"at": at, "code": code, "client": client, "message": message}
                for at, code, client, message in sorted(counters.recent, reverse=True)
            ],
        }


def _engine_counted(engine: EngineStats) -> Iterator[Fact]:
    yield Fact("engine_retries", "Publish attempts with an unknown result.", engine.retries)
    yield Fact("engine_split_batches", "Batches whose messages were published one by one.", engine.split_batches)
    yield Fact("engine_repeated_puts", "Puts that were already stored.", engine.repeated_puts)
    yield Fact("mirror_consumers", "Consumers created to fill the mirror, including the first.", engine.consumers)
    yield Fact("mirror_skipped_messages", "Messages that could not be mirrored.", engine.skipped_messages)


def _engine_usage(engine: EngineStats) -> Iterator[Fact]:
    yield Fact("engine_connected", "Whether there is a connection to the engine: 1 or 0.", int(engine.connected))
    yield Fact("mirror_ready", "Whether the mirror is complete: 1 or 0.", int(engine.ready))
    yield Fact("mirror_lag_messages", "Messages that the mirror does not have yet.", engine.lag_messages)
    about = "Time since the mirror last had all messages; 0 if it has all now."
    yield Fact("mirror_lag_seconds", about, engine.lag_seconds)


def _engine_info(engine: EngineStats) -> dict[str, object]:
    facts = (*_engine_usage(engine), *_engine_counted(engine))
    return {"store_engine": engine.name, "engine_node": engine.node, **{fact.name: fact.total for fact in facts}}


def _groups_info(groups: Groups) -> dict[str, object]:
    found = groups.first_stats()
    return {
        "groups": groups.count,
        **{f"jobs_{event}": count for event, count in asdict(groups.counts()).items()},
        **{f"group{row}": _group_info(group) for row, group in enumerate(found)},
    }


def _group_info(group: GroupStats) -> str:
    figures = ",".join(f"{name}={value}" for name, value in group.figures.items())
    # The topic comes last, because it may contain any character.
    return f"{figures},name={group.name.decode()},topic={printable(group.key.decode())}"
