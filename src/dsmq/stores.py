"""The store that the settings ask for."""

from __future__ import annotations

from dsmq.environment import read_text
from dsmq.errors import StartupError
from dsmq.settings import Settings
from dsmq.store.api import Store
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.addresses import parse_store


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
