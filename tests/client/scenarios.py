"""Shared by the tests of clients: connected clients, and scenarios of the asyncio client that run in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from conftest import SOON
from dsmq import client
from dsmq.aio import AsyncClient, connect
from dsmq.client import DSMQClientSideConnection
from dsmq.server import Server


@pytest.fixture
def mq(server: Server) -> Iterator[DSMQClientSideConnection]:
    with client.connect(port=server.port, retry=False) as mq:
        yield mq


@pytest.fixture
def writer(server: Server) -> Iterator[DSMQClientSideConnection]:
    with client.connect(port=server.port, retry=False) as writer:
        yield writer


def run(server: Server, scenario: Callable[[AsyncClient], Awaitable[None]]) -> None:
    """Run a scenario with a connected client."""

    async def main() -> None:
        async with asyncio.timeout(SOON), await connect(port=server.port, retry=False) as mq:
            await scenario(mq)

    asyncio.run(main())
