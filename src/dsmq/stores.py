"""Creates the store and the snapshotter that the settings call for."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from dsmq import logs
from dsmq.environment import read_text
from dsmq.errors import ConfigError, StartupError
from dsmq.settings import Settings
from dsmq.store.api import Limits, Store, TopicRule
from dsmq.store.groups import GroupLimits
from dsmq.store.snapshots import Snapshotter
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.addresses import parse_store

# How often to check whether the store is ready and whether to stop, and how often to log why it is not ready.
CHECK_SECONDS, PROGRESS_SECONDS = 0.1, 5.0

_logger = logging.getLogger("dsmq.server")


def new_store(settings: Settings) -> Store:
    """Return a store. Raises StartupError if it needs a package that is not installed, or ConfigError."""
    if not settings.store:
        return SQLiteStore(0)
    try:
        from dsmq.store.nats import NATSStore  # noqa: PLC0415 - an optional dependency
        from dsmq.store.nats_connection import Credentials  # noqa: PLC0415
    except ImportError as error:
        raise StartupError(f"store = {settings.store} needs another package: pip install 'dsmq[nats]'") from error
    endpoints, is_tls = parse_store(settings.store)
    tls = None
    if is_tls:
        from dsmq.wire.tls import client_context  # noqa: PLC0415 - rarely needed

        tls = client_context(settings.store_ca_file, ca_name="store_ca_file")
    files = (settings.store_password_file, settings.store_token_file)
    password, token = [read_text(file).strip() if file else "" for file in files]
    servers = [(endpoint.host, endpoint.port) for endpoint in endpoints]
    credentials = Credentials(settings.store_user, password, token)
    return NATSStore(servers, settings.store_stream, settings.store_replicas, credentials, tls)


def limits_of(settings: Settings) -> Limits:
    """Return the storage limits and topic rules in the settings."""
    return Limits(
        *(settings.max_topics, settings.max_stored_messages, settings.max_stored_bytes),
        *(settings.max_stored_messages_per_topic, settings.max_stored_bytes_per_topic, settings.when_full),
        tuple(
            TopicRule(
                rule.pattern.encode(),
                *(rule.max_messages, rule.max_bytes),
                None if rule.max_age_seconds is None else round(rule.max_age_seconds * 1000),
                rule.when_full,
            )
            for rule in settings.topic
        ),
    )


def apply_settings(store: Store, settings: Settings) -> None:
    """Set the limits of a store."""
    store.max_age_ms = round(settings.max_age_seconds * 1000)
    store.limits = limits_of(settings)
    store.groups.limits = GroupLimits(
        *(settings.max_groups, settings.max_jobs_in_flight, settings.max_group_bytes),
        *(settings.max_attempts, settings.max_topic_bytes),
    )


def new_snapshotter(settings: Settings, store: Store) -> Snapshotter | None:
    """Return a snapshotter for the store, or None without snapshot_file. Raises ConfigError."""
    if not settings.snapshot_file:
        return None
    if not isinstance(store, SQLiteStore):
        raise ConfigError("snapshot_file: this store is already persistent")
    return Snapshotter(store, settings.snapshot_file, settings.snapshot_interval_seconds)


def await_store(store: Store, is_stopping: Callable[[], bool], notify: Callable[[str], None]) -> bool:
    """Wait until a store is ready; return False if asked to stop first. Raises StartupError if it can't be used."""
    logged_at = -math.inf
    while not (is_stopping() or store.wait(CHECK_SECONDS)):
        if time.monotonic() - logged_at >= PROGRESS_SECONDS:
            reason = store.unready_reason
            _logger.info("waiting for the store: %s", reason, extra=logs.event("waiting", reason=reason))
            notify(f"STATUS=waiting for the store: {reason}")
            logged_at = time.monotonic()
    return not is_stopping()
