"""The asyncio client: many tasks on one connection, and connections for waits."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self, TypeAlias

import pytest
from scenarios import run

import dsmq.client
from conftest import SOON, UNIT, blocked, serving, wait_for_stored, wait_until
from dsmq.aio import AsyncClient, connect
from dsmq.client import async_connection
from dsmq.errors import ClientClosed, Full, InternalError, WrongToken
from dsmq.server import Server

# One connection


Treat: TypeAlias = "Callable[[Proxy, bytes], Awaitable[bytes]]"


class Proxy:
    """A proxy in front of a server that counts connections; tests may change replies and requests."""

    def __init__(self, server: Server, replies: Treat | None = None, requests: Treat | None = None) -> None:
        self.port = 0
        self.accepted = 0
        self._server, self._replies, self._requests = server, replies, requests
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0))
        # A small buffer, so that the proxy holds little of what clients send.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
        self._listener = await asyncio.start_server(self._accept, sock=listener)
        self.port = listener.getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()
        await asyncio.gather(*self._tasks)

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        behind, towards = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writers += [writer, towards]
        pumps = self._pump(reader, towards, self._requests), self._pump(behind, writer, self._replies)
        self._tasks += map(asyncio.create_task, pumps)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, treat: Treat | None) -> None:
        with suppress(OSError):
            while data := await reader.read(100_000):
                writer.write(await treat(self, data) if treat else data)
                await writer.drain()
        writer.transport.abort()


def test_thousand_concurrent_puts_use_one_connection_in_order(server: Server) -> None:
    async def main() -> None:
        async with Proxy(server) as proxy, await connect(port=proxy.port) as mq:
            ids = await asyncio.gather(*(mq.put("t", str(number)) for number in range(1000)))
            assert ids == list(range(1, 1001))
            mq.seek("t", 0)
            assert await mq.get_many("t", 1000) == [str(number) for number in range(1000)]
            assert proxy.accepted == 1

    asyncio.run(main())


def test_thousand_concurrent_puts_work_with_few_files(server: Server) -> None:
    program = f"""
import asyncio, resource
from dsmq.aio import connect
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

async def main():
    async with await connect(port={server.port}) as mq:
        print(await asyncio.gather(*(mq.put("t", "x") for _ in range(1000))) == list(range(1, 1001)))

asyncio.run(main())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SOON, check=False)
    assert (found.stdout, found.stderr) == ("True\n", "")


def test_server_begins_while_tasks_are_still_calling(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        async def call_last() -> None:
            # Nothing else can run in this event loop meanwhile.
            wait_until(lambda: server.status.totals().stored >= 16)
            await mq.put("t", "last")

        await asyncio.gather(*(mq.put("t", "x") for _ in range(30)), call_last())

    run(server, scenario)


@pytest.mark.parametrize("batch", [1, 50])
def test_puts_with_lost_replies_are_stored_once_in_order(server: Server, batch: int) -> None:
    async def lose(proxy: Proxy, data: bytes) -> bytes:
        seen.append(data)
        if len(seen) % 3 == 0 and len(seen) < 30:
            proxy.cut()
        return data

    async def main() -> None:
        async with Proxy(server, lose) as proxy, await connect(port=proxy.port) as mq:
            if batch == 1:
                ids = await asyncio.gather(*(mq.put("t", number) for number in numbers))
            else:
                calls = (mq.put_many("t", numbers[at : at + batch]) for at in range(0, 3000, batch))
                ids = [one for batch in await asyncio.gather(*calls) for one in batch]
            assert ids == list(range(1, 3001))
            mq.seek("t", 0)
            assert await mq.get_many("t", 3000) == numbers
            assert proxy.accepted > 3

    seen: list[bytes] = []
    # More than may be unanswered.
    numbers = [str(number) for number in range(3000)]
    asyncio.run(main())
    assert server.status.totals().stored == 3000


@pytest.mark.slow
def test_flaky_connection_is_replaced_while_calls_make_progress(
    server: Server,
) -> None:
    async def one_by_one(proxy: Proxy, data: bytes) -> bytes:
        if not data.startswith(b":"):
            return data
        await asyncio.sleep(UNIT)
        asyncio.get_running_loop().call_later(UNIT / 10, proxy.cut)
        return data[: data.index(b"\n") + 1]

    async def main() -> None:
        async with (
            Proxy(server, one_by_one) as proxy,
            await connect(port=proxy.port, reconnect_timeout=20 * UNIT) as mq,
        ):
            ids = await asyncio.gather(*(mq.put("t", str(number)) for number in range(25)))
            assert ids == list(range(1, 26))

    asyncio.run(main())


def test_calls_of_broken_connection_are_resent_before_later_calls(server: Server) -> None:
    async def cut_once(proxy: Proxy, data: bytes) -> bytes:
        if b"PUT" in data and not cuts:
            cuts.append(1)
            proxy.cut()
            return b""
        return data

    async def put_late(mq: AsyncClient) -> None:
        """Put as soon as the connection has ended, before the calls that were using it run again."""
        connection = mq._here().shared._connection
        assert connection
        while connection.error is None:
            await asyncio.sleep(0)
        await mq.put("t", "late")

    async def main() -> None:
        async with Proxy(server, requests=cut_once) as proxy, await connect(port=proxy.port) as mq:
            await asyncio.gather(put_late(mq), *(mq.put("t", str(number)) for number in range(3)))
            mq.seek("t", 0)
            assert await mq.get_many("t") == ["0", "1", "2", "late"]

    cuts: list[int] = []
    asyncio.run(asyncio.wait_for(main(), SOON))


def test_cancelled_call_keeps_connection(server: Server, states: list[str]) -> None:
    async def main() -> None:
        async with Proxy(server) as proxy, await connect(port=proxy.port, on_state_change=states.append) as mq:
            with blocked(server):
                calls = [asyncio.create_task(mq.put("t", str(number))) for number in range(10)]
                # If the connection has been idle for some time, it is checked first.
                while len(mq._here().shared._connection.due) < 10:
                    await asyncio.sleep(0)
                calls[3].cancel()
                calls[9].cancel()
            ids = await asyncio.gather(*calls, return_exceptions=True)
            assert [one for one in ids if isinstance(one, int)] == [1, 2, 3, 5, 6, 7, 8, 9]
            assert await mq.put("t", "x") == 11
            assert proxy.accepted == 1

    asyncio.run(main())
    assert states == []


def test_call_cancelled_before_sending_is_not_sent(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        calls = [asyncio.create_task(mq.put("t", str(number))) for number in range(3)]
        # The first is sent immediately, the others at the end of the event loop's iteration.
        asyncio.get_running_loop().call_soon(calls[1].cancel)
        await asyncio.wait(calls)
        assert [calls[0].result(), calls[1].cancelled(), calls[2].result()] == [1, True, 2]

    run(server, scenario)


def test_late_reply_to_cancelled_call_affects_no_other_call(server: Server, states: list[str]) -> None:
    async def main() -> None:
        options: Any = {"timeout": 10 * UNIT, "on_state_change": states.append}
        async with await connect(port=server.port, **options) as mq:
            with blocked(server):
                late = asyncio.create_task(mq.put("t", "1"))
                await asyncio.sleep(UNIT / 2)
                late.cancel()
                others = [asyncio.create_task(mq.put("t", str(number))) for number in (2, 3)]
                while not states:
                    await asyncio.sleep(UNIT / 20)
            await asyncio.gather(*others)
            mq.seek("t", 0)
            assert await mq.get_many("t") == ["1", "2", "3"]

    asyncio.run(main())
    assert states == ["lost", "resumed"]


@pytest.mark.parametrize(("count", "size"), [(20, 500_000), (900, 10_000)])
def test_client_buffer_is_bounded_if_server_does_not_read(tmp_path: Path, count: int, size: int) -> None:
    async def main(server: Server, host: str) -> None:
        async with asyncio.timeout(SOON), await connect(host) as mq:
            with blocked(server):
                calls = [asyncio.create_task(mq.put("t", "x" * size)) for _ in range(count)]
                transport = mq._here().shared._connection._transport
                while not transport.get_write_buffer_size():
                    await asyncio.sleep(UNIT / 20)
                await asyncio.sleep(UNIT)
                assert transport.get_write_buffer_size() < 1_000_000
            assert await asyncio.gather(*calls) == list(range(1, count + 1))

    # The kernel buffers less for a Unix socket.
    host = f"unix:{tmp_path / 'socket'}"
    with serving(host=host) as server:
        asyncio.run(main(server, host))


def test_unanswered_puts_are_bounded_by_server_memory(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        with blocked(server):
            calls = [mq.put("t", str(number)) for number in range(3000)]
            calls += [mq.put_many("t", ["x"] * 400) for _ in range(5)]
            tasks = [asyncio.create_task(call) for call in calls]
            await asyncio.sleep(UNIT)
            assert len(mq._here().shared._connection.due) <= 1000
        await asyncio.gather(*tasks)

    run(server, scenario)
    wait_until(lambda: server.status.totals().stored == 5000)


def test_put_many_keeps_order_of_calls(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        first, many, last = await asyncio.gather(mq.put("t", "x"), mq.put_many("t", ["x"] * 400), mq.put("t", "x"))
        assert (first, many, last) == (1, list(range(2, 402)), 402)

    run(server, scenario)


def test_error_in_put_many_does_not_shift_other_replies() -> None:
    async def scenario(mq: AsyncClient) -> None:
        many = mq.put_many("t", ["x"] * 10 + ["x" * 5000] + ["x"] * 9)
        calls = many, mq.ping(), mq.get("t"), mq.get("none"), mq.put_many("t", iter(["y" * 5000]))
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in found] == [Full, type(None), str, str, Full]
        assert found[2:4] == ["x", ""]

    with serving(max_stored_bytes_per_topic=4000) as server:
        run(server, scenario)


@pytest.mark.parametrize("refused", [0, 2, 450, 700])
def test_put_many_error_counts_stored_messages_as_in_blocking_client(refused: int) -> None:
    messages = ["x"] * 1400
    messages[refused] = "x" * 200_000

    async def scenario(mq: AsyncClient) -> None:
        with pytest.raises(Full) as told:
            await mq.put_many("one", messages)
        with dsmq.client.connect(port=server.port) as other, pytest.raises(Full) as same:
            other.put_many("two", messages)
        errors = told.value, same.value
        wait_for_stored(server, sum(error.stored_before + error.stored_after for error in errors))
        for error, topic in zip(errors, ("one", "two"), strict=True):
            assert error.stored_before == refused
            held = next(count for name, count, _ in await mq.topics() if name == topic)
            assert error.stored_before + error.stored_after == held
        # The batch after the refused message was on its way; but if it is the third one, the asyncio client may have
        # received the error together with the replies to the first, and not have sent it.
        sent = 1000 if refused < 500 else 1400
        assert same.value.stored_after == sent - refused - 1
        assert told.value.stored_after in (same.value.stored_after, 1000 - refused - 1)

    with serving(max_stored_bytes_per_topic=150_000) as server:
        run(server, scenario)


def test_put_many_ended_by_close_counts_stored_messages(server: Server) -> None:
    async def main() -> None:
        mq = await connect(port=server.port, timeout=SOON)

        def closing() -> Iterator[str]:
            yield from ["x"] * 1000
            # The first batch is stored by now, and the third will not be answered.
            release.enter_context(blocked(server))
            is_blocked.set()
            yield "y"

        is_blocked = asyncio.Event()
        with ExitStack() as release:
            first = asyncio.create_task(mq.put_many("t", closing()))
            await is_blocked.wait()
            second = asyncio.create_task(mq.put_many("u", ["z"]))
            await asyncio.sleep(0)
            await mq.close()
            errors = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(error) for error in errors] == [ClientClosed, ClientClosed]
        assert [error.stored_before // 500 > 0 for error in errors if isinstance(error, ClientClosed)] == [True, False]

    asyncio.run(main())


def test_put_many_calls_that_cannot_reconnect_have_separate_errors() -> None:
    async def main() -> None:
        with serving(auth_token="old" * 8) as server:
            port = server.port
            mq = await connect(port=port, token="old" * 8)
        with serving(port=port, auth_token="new" * 8):
            errors = await asyncio.gather(mq.put_many("t", ["x"]), mq.put_many("u", ["y"]), return_exceptions=True)
        await mq.close()
        assert [type(error) for error in errors] == [WrongToken, WrongToken]
        assert errors[0] is not errors[1]

    asyncio.run(main())


def test_messages_before_generator_error_are_stored(server: Server) -> None:
    def failing() -> Iterator[str]:
        yield "1"
        yield "2"
        raise LookupError("of the caller's")

    async def scenario(mq: AsyncClient) -> None:
        with pytest.raises(LookupError):
            await mq.put_many("t", failing())
        assert await mq.put("t", "3") == 3

    run(server, scenario)


def test_server_defect_fails_one_call_only(server: Server, states: list[str]) -> None:
    async def break_one(proxy: Proxy, data: bytes) -> bytes:
        if data.startswith(b":") and b":2\r\n" in data and not states:
            asyncio.get_running_loop().call_later(UNIT, proxy.cut)
            return data.replace(b":2\r\n", b"-INTERNAL a defect\r\n")
        return data

    async def main() -> None:
        async with (
            Proxy(server, break_one) as proxy,
            await connect(port=proxy.port, on_state_change=states.append) as mq,
        ):
            with blocked(server):
                calls = asyncio.gather(*(mq.put("t", str(number)) for number in range(5)), return_exceptions=True)
                await asyncio.sleep(UNIT)
            found = await calls
            assert [type(one) for one in found] == [int, InternalError, int, int, int]
            assert [found[0], *found[2:]] == [1, 3, 4, 5]

    asyncio.run(main())
    assert states == ["lost", "resumed"]


@pytest.mark.parametrize("error", [ValueError("raised by a signal handler"), ConnectionError("the same")])
def test_lost_reply_does_not_shift_other_replies(
    server: Server, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A signal handler may raise anywhere."""

    def answer(place: async_connection.Place, reply: object) -> None:
        if reply == 2 and errors:
            raise errors.pop()
        original(place, reply)

    async def scenario(mq: AsyncClient) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        assert await asyncio.gather(*(mq.put("t", str(number)) for number in range(5))) == [1, 2, 3, 4, 5]
        mq.seek("t", 0)
        assert await mq.get_many("t") == ["0", "1", "2", "3", "4"]

    errors, original = [error], async_connection.Place.answer
    monkeypatch.setattr(async_connection.Place, "answer", answer)
    run(server, scenario)
    assert not errors


@pytest.mark.parametrize("failing", ["lost", "resumed"])
def test_raising_callback_fails_its_call(server: Server, failing: str) -> None:
    def refuse(state: str) -> None:
        if state == failing:
            raise LookupError(state)

    async def main() -> None:
        async with Proxy(server) as proxy, await connect(port=proxy.port, on_state_change=refuse) as mq:
            proxy.cut()
            await asyncio.sleep(UNIT)
            with pytest.raises(LookupError):
                await asyncio.wait_for(mq.ping(), SOON)

    asyncio.run(main())


def test_raising_callback_does_not_hang_other_calls(server: Server) -> None:
    def refuse(state: str) -> None:
        raise LookupError(state)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with Proxy(server) as proxy, await connect(port=proxy.port, on_state_change=refuse) as mq:
            with blocked(server):
                calls = asyncio.gather(mq.put("t", "1"), mq.put("t", "2"), return_exceptions=True)
                await asyncio.sleep(UNIT)
                proxy.cut()
                await asyncio.sleep(UNIT)
            await asyncio.wait_for(calls, SOON)

    asyncio.run(main())


def test_slow_reply_timeout_restarts_with_progress(server: Server) -> None:
    async def trickle(_: Proxy, data: bytes) -> bytes:
        if len(data) > 1000:
            writer = proxies[0]._writers[0]
            for at in range(0, len(data) - 1000, 1 + len(data) // 6):
                writer.write(data[at : at + 1 + len(data) // 6])
                await asyncio.sleep(4 * UNIT)
            return data[at + 1 + len(data) // 6 :]
        return data

    async def main() -> None:
        async with Proxy(server, trickle) as proxy, await connect(port=proxy.port, timeout=20 * UNIT) as mq:
            proxies.append(proxy)
            await mq.put("t", "x" * 50_000)
            assert len(await mq.get("t")) == 50_000
            assert proxy.accepted == 1

    proxies: list[Proxy] = []
    asyncio.run(main())


@pytest.mark.slow
def test_long_message_timeout_restarts_with_progress(server: Server) -> None:
    async def slowly(_: Proxy, data: bytes) -> bytes:
        if len(data) > 1000:
            await asyncio.sleep(UNIT)
        return data

    async def main() -> None:
        async with Proxy(server, requests=slowly) as proxy, await connect(port=proxy.port, timeout=15 * UNIT) as mq:
            before = time.monotonic()
            assert await mq.put("t", "x" * 2_000_000) == 1
            assert time.monotonic() - before > 15 * UNIT
            assert proxy.accepted == 1

    asyncio.run(main())


def test_idle_connection_outlives_reply_timeout(server: Server, states: list[str]) -> None:
    async def main() -> None:
        options: Any = {"timeout": 15 * UNIT, "on_state_change": states.append}
        async with Proxy(server) as proxy, await connect(port=proxy.port, **options) as mq:
            await mq.ping()
            await asyncio.sleep(20 * UNIT)
            await mq.ping()
            assert proxy.accepted == 1

    asyncio.run(main())
    assert states == []


def test_reconnecting_stops_if_no_call_waits() -> None:
    async def main() -> None:
        with serving() as server:
            mq = await connect(port=server.port)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(mq.ping(), UNIT)
        while mq._here().shared._connecting:
            await asyncio.sleep(UNIT / 20)
        await mq.close()

    asyncio.run(asyncio.wait_for(main(), SOON))


# Waits


def test_waiting_connections_are_reused_and_closed_when_idle(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Proxy(server) as proxy, await connect(port=proxy.port) as mq:
            await asyncio.gather(*(mq.get_wait("t", timeout=UNIT) for _ in range(3)))
            assert proxy.accepted == 4
            await asyncio.gather(*(mq.get_wait("t", timeout=UNIT) for _ in range(3)))
            assert proxy.accepted == 4
            monkeypatch.setattr("dsmq.client.async_pool.IDLE_SECONDS", UNIT)
            mq._here()._sweep()
            await mq.get_wait("t", timeout=UNIT)
            while server.status.connections() > 1:
                await asyncio.sleep(UNIT / 20)
            await mq.ping()
            await mq.get_wait("t", timeout=UNIT)
            assert proxy.accepted == 5

    monkeypatch.setattr("dsmq.client.async_pool.IDLE_SECONDS", SOON)
    asyncio.run(main())


def test_wait_does_not_block_other_calls(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        waiting = asyncio.create_task(mq.get_wait("t", timeout=math.inf))
        while not server.status.waiting():
            await mq.ping()
        await mq.put("t", "x")
        assert await waiting == "x"

    run(server, scenario)


def test_cancelled_wait_does_not_block_next_one(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(mq.get_wait("none", timeout=math.inf), UNIT)
        await mq.put("t", "x")
        before = time.monotonic()
        assert await mq.get_wait("t", timeout=SOON) == "x"
        assert time.monotonic() - before < SOON / 2

    run(server, scenario)


def test_unreferenced_client_is_closed(server: Server) -> None:
    async def main() -> None:
        mq = await connect(port=server.port)
        await mq.get_wait("t", timeout=UNIT / 10)
        assert server.status.connections() == 2
        mq._here()._sweeper.cancel()
        del mq
        gc.collect()
        while server.status.connections():
            await asyncio.sleep(UNIT / 20)

    asyncio.run(main())
