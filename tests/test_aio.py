"""The asyncio client: the same verbs, tasks side by side, and cancellation."""

from __future__ import annotations

import asyncio
import inspect
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

import dsmq.client
from conftest import SOON, UNIT, serving
from dsmq.aio import AsyncClient, connect
from dsmq.errors import ClientClosed, ConnectionLost, MessageNotText
from dsmq.server import Server


def run(server: Server, scenario: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(SOON), await connect(port=server.port, retry=False) as mq:
            await scenario(mq)

    asyncio.run(main())


def test_it_has_the_verbs_of_the_blocking_client() -> None:
    def verbs(kind: type) -> dict[str, list[str]]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(call).parameters) for name, call in members if not name.startswith("_")}

    assert verbs(AsyncClient) == verbs(dsmq.client.DSMQClientSideConnection)


def test_each_verb(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        assert await mq.get("t") == ""
        assert await mq.get("t", default=None) is None
        assert await mq.put("t", "1") == 1
        assert await mq.put_many("t", (str(number) for number in range(2, 1202))) == list(range(2, 1202))
        assert await mq.get("t") == "1"
        assert await mq.get("t", raw=True) == b"2"
        assert await mq.get_many("t", 3) == ["3", "4", "5"]
        assert await mq.get_wait("t") == "6"
        assert [message.id for message in await mq.read("t", 2)] == [7, 8]
        assert await mq.get_latest("t") == "1201"
        assert await mq.get_many("t", raw=True) == []
        await mq.put("t", b"\xff")
        with pytest.raises(MessageNotText):
            await mq.get("t")
        assert await mq.get("t", raw=True) == b"\xff"
        mq.seek("t", 1199)
        assert [message async for message in mq.messages("t", timeout=UNIT, raw=True)] == [b"1200", b"1201", b"\xff"]
        assert await mq.topics() == [("t", 1202, server.totals().bytes)]
        assert mq.missed == 0
        await mq.ping()

    run(server, scenario)


def test_tasks_side_by_side(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        async def read(count: int) -> list[str]:
            return [await mq.get_wait("t", timeout=SOON) for _ in range(count)]

        readers = [asyncio.create_task(read(100)) for _ in range(5)]
        await asyncio.gather(*(mq.put("t", str(number)) for number in range(500)))
        got = [message for reader in readers for message in await reader]
        assert sorted(map(int, got)) == list(range(500))

    run(server, scenario)


def test_a_cancelled_call_leaves_no_reply_for_the_next(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(mq.get_wait("t", timeout=math.inf), UNIT)
        assert await mq.put("t", "x") == 1
        assert await mq.get("t") == "x"
        assert await mq.put("t", "y") == 2

    run(server, scenario)


def test_closing_ends_a_call_of_another_task(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        waiting = asyncio.create_task(mq.get_wait("t", timeout=math.inf))
        while not server.waiting():
            await asyncio.sleep(UNIT / 20)
        await mq.close()
        await mq.close()
        with pytest.raises(ClientClosed):
            await waiting
        with pytest.raises(ClientClosed):
            await mq.put("t", "x")

    run(server, scenario)


def test_a_server_that_is_gone_is_an_error() -> None:
    async def main() -> None:
        with serving() as server:
            mq = await connect(port=server.port, reconnect_timeout=0)
            await mq.put("t", "x")
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await mq.get("t")
        with pytest.raises(ConnectionRefusedError):
            await connect(port=mq.port, retry=False)
        await mq.close()

    asyncio.run(main())


def test_shutdown_server(server: Server) -> None:
    async def main() -> None:
        async with await connect(port=server.port) as mq:
            stopping = asyncio.to_thread(server.run)
            await asyncio.gather(stopping, mq.shutdown_server())

    asyncio.run(main())


def test_each_batch_of_put_many_has_the_time_of_a_call(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmq.calls.PUTS_AT_ONCE", 1)

    async def main() -> None:
        async with await connect(port=server.port, timeout=5 * UNIT) as mq:
            # Ten batches, of which each takes a fifth of the time that all together may not take.
            def slow() -> Iterator[str]:
                for _ in range(10):
                    server._workers[0].post(lambda: time.sleep(UNIT))
                    yield "x"

            assert len(await mq.put_many("t", slow())) == 10

    asyncio.run(main())


def test_a_connect_that_is_not_answered_is_given_up() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
            await connect(port=silent.getsockname()[1], timeout=2 * UNIT, retry=False)

    asyncio.run(main())


def test_what_a_cancelled_call_has_not_sent_is_not_sent() -> None:
    async def main() -> None:
        with serving() as server:
            async with await connect(port=server.port) as mq:
                release = threading.Event()
                server._workers[0].post(lambda: release.wait(SOON))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(mq.put("t", "x" * 8_000_000), UNIT)
                release.set()
                await mq.ping()
                assert server.totals().messages == 0

    asyncio.run(main())
