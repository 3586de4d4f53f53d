"""A server's log messages about its start, its configuration, and limits that have been reached."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Container, Iterable, Sequence

from dsmq import __version__, environment, logs
from dsmq.broker.access import Access
from dsmq.settings import Settings

_logger = logging.getLogger("dsmq.server")


def log_started(addresses: Sequence[str]) -> None:
    about = logs.event("started", version=__version__, addresses=addresses, process=os.getpid())
    _logger.info("dsmq %s listening on %s (process %d)", __version__, ", ".join(addresses), os.getpid(), extra=about)
    if links := environment.service_links():
        _logger.debug("environment variables ignored as service links: %s", ", ".join(links))


def log_http_endpoint(address: str) -> None:
    url = f"http://{address}/"
    _logger.info("metrics on %smetrics, status page on %s", url, url, extra=logs.event("http_endpoint", url=url))


def log_configuration(
    settings: Settings, access: Access, max_connections: int, sockets: Iterable[socket.socket]
) -> None:
    """Log the tokens, TLS and main limits in effect, and a warning if no authentication is required on `sockets`."""
    tokens = len(access.authenticator.tokens)
    tls = "off" if not access.tls else "on, with client certificates" if access.client_ca_file else "on"
    limits = {
        "connections": max_connections,
        "messages": settings.max_stored_messages,
        "bytes": settings.max_stored_bytes,
        "topics": settings.max_topics,
    }
    text = ", ".join(f"{value} {name}" for name, value in limits.items())
    about = logs.event("configured", tokens=tokens, tls=tls, limits=limits)
    _logger.info("tokens: %s; TLS: %s; limits: %s", tokens or "none", tls, text, extra=about)
    if exposed := access.exposed(sockets):
        about = logs.event("exposed", addresses=exposed)
        warning = "no authentication: any client that can reach %s is an admin (protected_mode = false)"
        _logger.warning(warning, ", ".join(exposed), extra=about)


def log_reload(
    before: Settings, after: Settings, restart_required: Container[str], access_before: Access, access: Access
) -> None:
    """Log the settings, tokens and certificates that a reload has changed."""
    changed = [name for name in Settings.model_fields if getattr(after, name) != getattr(before, name)]
    applied = [name for name in changed if name not in restart_required]
    tokens = access.authenticator.changes(access_before.authenticator)
    renewed = access.certificates_modified_ns != access_before.certificates_modified_ns
    changes = [*applied, *(f"{change} ({', '.join(names)})" for change, names in tokens.items() if names)]
    changes += ["certificates"] * renewed
    about = logs.event("reloaded", changed=applied, certificates=renewed, **tokens)
    _logger.info("configuration reloaded; changed: %s", ", ".join(changes) or "nothing", extra=about)
    if pending := [name for name in changed if name in restart_required]:
        about = logs.event("restart_needed", settings=pending)
        _logger.warning("restart required to apply: %s", ", ".join(pending), extra=about)


def log_full(before: set[str], now: set[str], settings: Settings) -> None:
    """Log which limits have begun to refuse puts and which no longer do."""
    for name in sorted(now - before):
        value = getattr(settings, name, None)
        limit = name if value is None else f"{name} = {value} reached"
        about = logs.event("full", limit=name)
        _logger.warning("full: %s; puts are refused until messages expire", limit, extra=about)
    for name in sorted(before - now):
        _logger.info("no longer full: %s", name, extra=logs.event("no_longer_full", limit=name))
