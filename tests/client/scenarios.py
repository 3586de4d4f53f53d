"""Shared by the tests of the asyncio client: scenarios that run in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from conftest import SOON
from dsmq.aio import AsyncClient, connect
from dsmq.server import Server


def run(server: Server, scenario: Callable[[AsyncClient], Awaitable[None]]) -> None:
    """Run a scenario with a connected client."""

    async def main() -> None:
        async with asyncio.timeout(SOON), await connect(port=server.port, retry=False) as mq:
            await scenario(mq)

    asyncio.run(main())
