"""The official NATS client, with which `nats_stream` makes the requests that need not be fast."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from nats.aio.client import Client
from nats.errors import Error as NATSError

if TYPE_CHECKING:
    from ssl import SSLContext

    from dsmq.store.nats_connection import Credentials, Server

API_SECONDS = 1.0
"""How long to wait for an answer."""


async def new_client(credentials: Credentials, tls: SSLContext | None, servers: Sequence[Server]) -> Client:
    """Return a client that is connected to one of these servers."""
    options = {"user": credentials.user, "password": credentials.password, "token": credentials.token}
    scheme = "tls" if tls else "nats"

    async def ignore(_: Exception) -> None:
        """Without this, the client prints errors, which the requests raise anyway."""

    logging.getLogger("asyncio").addFilter(_is_useful)
    client = Client()
    try:
        await client.connect(
            [f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}" for host, port in servers],
            **{name: value for name, value in options.items() if value},  # type: ignore[arg-type]
            tls=tls,
            error_cb=ignore,
            dont_randomize=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,  # type: ignore[arg-type]
            connect_timeout=2,
            ping_interval=1,
            max_outstanding_pings=3,
        )
    except BaseException:
        # A half-connected client would neither answer requests nor count as closed.
        await close_client(client)
        raise
    return client


async def close_client(client: Client) -> None:
    with suppress(NATSError, OSError, TimeoutError):
        await asyncio.wait_for(client.close(), API_SECONDS)


def _is_useful(record: logging.LogRecord) -> bool:
    """Return False for a warning that asyncio logs whenever a TLS connection of the official client ends."""
    return not str(record.msg).startswith("returning true from eof_received()")
