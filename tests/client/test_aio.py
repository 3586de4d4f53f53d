"""The asyncio client: the same verbs, tasks side by side, and cancellation."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import math
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeAlias

import pytest

import dsmq.client
from conftest import SOON, UNIT, Resolve, blocked, serving, wait_until
from dsmq.aio import AsyncClient, connect
from dsmq.client import async_connection
from dsmq.client.requests import PUTS_AT_ONCE
from dsmq.errors import BadRequest, ClientClosed, ConnectionLost, Full, InternalError, MessageNotText, WrongToken
from dsmq.server import Server


@pytest.fixture
def states() -> list[str]:
    """The states that `on_state_change` was called with."""
    return []


def run(server: Server, scenario: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(SOON), await connect(port=server.port, retry=False) as mq:
            await scenario(mq)

    asyncio.run(main())


def test_asyncio_client_matches_blocking_signatures(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        with dsmq.client.connect(port=server.port) as other:
            assert public(mq) == public(other)

    def public(mq: object) -> dict[str, object]:
        found = {name: getattr(mq, name) for name in dir(mq) if not name.startswith("_")}
        return {name: signature(value) if callable(value) else value for name, value in found.items()}

    def signature(call: Callable[..., object]) -> list[inspect.Parameter]:
        return list(inspect.signature(call).parameters.values())

    run(server, scenario)


def test_asyncio_connect_accepts_blocking_options() -> None:
    parameters, others = (
        {name: str(one) for name, one in inspect.signature(call).parameters.items()}
        for call in (connect, dsmq.client.connect)
    )
    # An argument of dsmq 1.4, which had no asyncio.
    del others["verbose"]
    assert parameters == others


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (TypeError, lambda mq: mq.put("t", 5)),
        (TypeError, lambda mq: mq.put(5, "x")),
        (ValueError, lambda mq: mq.put("", "x")),
        (TypeError, lambda mq: mq.put_many("t", "hello")),
        (TypeError, lambda mq: mq.put_many("t", 5)),
        (TypeError, lambda mq: mq.get_wait("t", 5)),
        (ValueError, lambda mq: mq.get_wait("t", timeout=math.nan)),
        (ValueError, lambda mq: mq.get_wait("t", timeout=-1)),
        (TypeError, lambda mq: mq.get_wait("t", timeout="1")),
        (TypeError, lambda mq: mq.get("t", None)),
        (TypeError, lambda mq: mq.get_latest("t", None)),
        (TypeError, lambda mq: mq.get_many("t", "5")),
        (ValueError, lambda mq: mq.get_many("t", -5)),
        (ValueError, lambda mq: mq.read("t", timeout=math.nan)),
        (ValueError, lambda mq: mq.messages("t", timeout=math.nan)),
        (ValueError, lambda mq: mq.messages("")),
        (ValueError, lambda mq: mq.seek("t", "nowhere")),
        (ValueError, lambda mq: mq.seek("t", -1)),
        (TypeError, lambda mq: mq.seek("t", 1.5)),
        (TypeError, lambda mq: mq.forget(5)),
    ],
)
def test_invalid_argument_raises_as_in_blocking_client(
    server: Server, error: type[Exception], call: Callable[[Any], Any]
) -> None:
    async def scenario(mq: AsyncClient) -> None:
        with pytest.raises(error) as found:
            await call(mq)
        with dsmq.client.connect(port=server.port) as other, pytest.raises(error) as same:
            call(other)
        assert str(found.value).replace("AsyncClient", type(other).__name__) == str(same.value)

    run(server, scenario)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": math.nan},
        {"timeout": None},
        {"port": 0},
        {"port": 65_536},
        {"port": "1"},
        {"token": 5},
        {"host": "unix:"},
        {"host": "a\0b"},
        {"reconnect_timeout": -1},
        {"on_state_change": 5},
        {"ca_file": "a\0b"},
        {"unknown": 5},
    ],
)
def test_invalid_option_raises_as_in_blocking_client(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as found:
        asyncio.run(connect(**{"retry": False, **options}))
    with pytest.raises((TypeError, ValueError)) as same:
        dsmq.client.connect(**{"retry": False, **options})
    assert (found.type, str(found.value)) == (same.type, str(same.value))


def test_timeout_of_0_does_not_wait(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        assert await mq.get_wait("t", timeout=0) == ""
        assert await mq.read("t", timeout=0) == []
        assert [one async for one in mq.messages("t", timeout=0)] == []
        assert server.status.connections() == 1

    run(server, scenario)


def test_positions_are_the_same_for_both_clients(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        await mq.put_many("t", ["a", "b", "c"])
        with dsmq.client.connect(port=server.port) as other:
            assert await mq.get("t") == "a"
            other.seek("t", mq.position("t"))
            assert other.get("t") == "b"
            mq.seek("t", other.position("t"))
            assert await mq.get("t") == "c"
            mq.seek("t", "other-epoch:5")
            assert await mq.get("t") == "a"
            mq.seek("t", 2**40)
            with pytest.raises(BadRequest):
                await mq.get("t")
            mq.forget("t")
            assert await mq.get("t") == "a"

    run(server, scenario)


def test_each_method_of_asyncio_client_works(server: Server) -> None:
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
        assert await mq.topics() == [("t", 1202, server.status.totals().bytes)]
        assert mq.missed == 0
        await mq.ping()

    run(server, scenario)


def test_concurrent_tasks_share_a_client(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        async def read(count: int) -> list[str]:
            return [await mq.get_wait("t", timeout=SOON) for _ in range(count)]

        readers = [asyncio.create_task(read(100)) for _ in range(5)]
        await asyncio.gather(*(mq.put("t", str(number)) for number in range(500)))
        got = [message for reader in readers for message in await reader]
        assert sorted(map(int, got)) == list(range(500))

    run(server, scenario)


def test_cancelled_call_leaves_no_reply_for_next_call(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(mq.get_wait("t", timeout=math.inf), UNIT)
        assert await mq.put("t", "x") == 1
        assert await mq.get("t") == "x"
        assert await mq.put("t", "y") == 2

    run(server, scenario)


def test_closing_ends_a_call_of_another_task(server: Server, states: list[str]) -> None:
    async def main() -> None:
        mq = await connect(port=server.port, on_state_change=states.append)
        waiting = asyncio.create_task(mq.get_wait("t", timeout=math.inf))
        while not server.status.waiting():
            await asyncio.sleep(UNIT / 20)
        with blocked(server):
            putting = [asyncio.create_task(mq.put("t", "x")) for _ in range(2)]
            await asyncio.sleep(UNIT)
            await mq.close()
            await mq.close()
            for call in (waiting, *putting):
                with pytest.raises(ClientClosed):
                    await call
        with pytest.raises(ClientClosed):
            await mq.put("t", "x")

    asyncio.run(asyncio.wait_for(main(), SOON))
    assert states == []


def test_unreachable_server_raises() -> None:
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


def test_each_put_many_batch_has_its_own_timeout(server: Server) -> None:
    async def main() -> None:
        async with await connect(port=server.port, timeout=5 * UNIT) as mq:
            # Ten batches, of which each takes a fifth of the time that all together may not take.
            def slow() -> Iterator[str]:
                for _ in range(10):
                    server._workers[0].post(lambda: time.sleep(UNIT))
                    yield from ["x"] * PUTS_AT_ONCE

            assert len(await mq.put_many("t", slow())) == 10 * PUTS_AT_ONCE

    asyncio.run(main())


def test_unanswered_connect_times_out() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
            await connect(port=silent.getsockname()[1], timeout=2 * UNIT, retry=False)

    asyncio.run(main())


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
        # What a client has sent is not to lie here.
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
                await asyncio.sleep(0)
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
        # The first is sent at once, the others wait for the end of the round.
        asyncio.get_running_loop().call_soon(calls[1].cancel)
        await asyncio.wait(calls)
        assert [calls[0].result(), calls[1].cancelled(), calls[2].result()] == [1, True, 2]

    run(server, scenario)


def test_late_reply_to_cancelled_call_affects_no_other_call(server: Server, states: list[str]) -> None:
    async def main() -> None:
        options: Any = {"timeout": 3 * UNIT, "on_state_change": states.append}
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

    # The kernel buffers less of a Unix socket.
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
    assert server.status.totals().stored == 5000


def test_put_many_keeps_order_of_calls(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        first, many, last = await asyncio.gather(mq.put("t", "x"), mq.put_many("t", ["x"] * 400), mq.put("t", "x"))
        assert (first, many, last) == (1, list(range(2, 402)), 402)

    run(server, scenario)


def test_error_in_put_many_does_not_shift_other_replies() -> None:
    async def scenario(mq: AsyncClient) -> None:
        calls = mq.put_many("t", ["x"] * 20), mq.ping(), mq.get("t"), mq.get("none"), mq.put_many("t", iter(["y"]))
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in found] == [Full, type(None), str, str, Full]
        assert found[2:4] == ["x", ""]

    with serving(max_stored_messages=10) as server:
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
        for error, topic in ((told.value, "one"), (same.value, "two")):
            assert error.stored_before == refused
            held = next(count for name, count, _ in await mq.topics() if name == topic)
            assert error.stored_before + error.stored_behind == held
        # The batch behind the one with the refused message was on its way; if that is the third, the asyncio client may
        # have received the error together with the replies to the first, and not sent it.
        sent = 1000 if refused < 500 else 1400
        assert same.value.stored_behind == sent - refused - 1
        assert told.value.stored_behind in (same.value.stored_behind, 1000 - refused - 1)

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
            await mq.get_wait("t", timeout=UNIT)
            while server.status.connections() > 1:
                await asyncio.sleep(UNIT / 20)
            await mq.ping()
            await mq.get_wait("t", timeout=UNIT)
            assert proxy.accepted == 5

    monkeypatch.setattr("dsmq.client.async_pool.IDLE_SECONDS", 3 * UNIT)
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


# Event loops and processes


def test_second_event_loop_resumes_positions(server: Server) -> None:
    async def first() -> AsyncClient:
        mq = await connect(port=server.port)
        assert await mq.put("t", "1") == 1
        await mq.get_wait("none", timeout=UNIT / 10)
        return mq

    async def second(mq: AsyncClient) -> None:
        assert await asyncio.gather(mq.get("t"), mq.put("t", "2")) == ["1", 2]
        assert await mq.get_wait("t") == "2"
        assert server.status.connections() == 2
        await mq.close()

    mq = asyncio.run(first())
    wait_until(lambda: not server.status.connections())
    asyncio.run(asyncio.wait_for(second(mq), SOON))
    # Whatever has not been closed warns of it.
    gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")
@pytest.mark.parametrize("is_closed", [True, False])
def test_next_call_closes_connections_of_stopped_loop(server: Server, is_closed: bool) -> None:
    first = asyncio.new_event_loop()
    mq = first.run_until_complete(connect(port=server.port))
    late = first.create_task(mq.get_wait("t", timeout=math.inf))
    while not server.status.waiting():
        first.run_until_complete(asyncio.sleep(UNIT / 20))
    if is_closed:
        late.cancel()
        late._log_destroy_pending = False
        first.close()

    async def second() -> None:
        assert await mq.put("t", "x") == 1
        wait_until(lambda: server.status.connections() == 1)
        await mq.close()

    asyncio.run(second())
    if not is_closed:
        with pytest.raises(RuntimeError, match="continued in another event loop"):
            first.run_until_complete(late)
        first.close()
    # It refers to transports whose event loop is closed: they warn when they go, which is ignored in this test alone.
    del late
    gc.collect()


def test_loop_in_another_thread_raises_at_once(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        for call in (mq.put, mq.get_wait):
            arguments = ("t", "x")[: 1 + (call == mq.put)]
            with pytest.raises(RuntimeError, match="in use in another event loop"):
                await asyncio.to_thread(asyncio.run, call(*arguments))
        assert await mq.put("t", "y") == 1
        waiting = asyncio.create_task(mq.get_wait("none", timeout=math.inf))
        await asyncio.to_thread(asyncio.run, mq.close())
        with pytest.raises(ClientClosed):
            await waiting

    run(server, scenario)


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.CDLL(None).fork"])
def test_after_fork_parent_and_child_are_separate_clients(server: Server, fork: str) -> None:
    program = f"""
import asyncio, ctypes, os, sys
from dsmq.aio import connect

async def begin():
    mq = await connect(port={server.port}, on_state_change=lambda state: print(name, state))
    await mq.put_many("t", ["0"] * 3)
    assert await mq.get("t") == "0"
    return mq

name = "parent"

async def go_on():
    reads = []
    for number in range(200):
        await asyncio.gather(mq.put(name, f"{{name}} {{number}}"), mq.put("t", name))
        reads.append(await mq.get(name))
    assert reads == [f"{{name}} {{number}}" for number in range(200)], reads
    assert [await mq.get("t"), await mq.get_wait("t")] == ["0", "0"]
    await mq.close()

loop = asyncio.new_event_loop()
mq = loop.run_until_complete(begin())
child = {fork}()
if child:
    loop.run_until_complete(go_on())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    status = 1
    try:
        name = "child"
        asyncio.run(go_on())
        status = 0
    finally:
        os._exit(status)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=False)
    assert (found.stdout, found.stderr) == ("0\n", "")
    assert server.status.totals().stored == 3 + 2 * 2 * 200


def test_parent_event_loop_is_refused_in_child(server: Server) -> None:
    program = f"""
import asyncio, os
from dsmq.aio import connect

loop = asyncio.new_event_loop()
mq = loop.run_until_complete(connect(port={server.port}, on_state_change=print))
if not os.fork():
    try:
        loop.run_until_complete(mq.put("t", "x"))
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
print(loop.run_until_complete(mq.put("t", "y")))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=False)
    told, *rest = found.stdout.splitlines()
    assert "run another one in the child process" in told
    assert (rest, found.stderr) == (["1"], "")


# Cancellation


class CancelledAt:
    """Cancels a coroutine at its n-th wait: before the result is there, or after."""

    def __init__(self, call: Coroutine[Any, Any, Any], step: int, *, behind: bool) -> None:
        self.call, self.step, self.behind = call, step, behind
        self.was_cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        step = 0
        try:
            waited_for = self.call.send(None)
            while True:
                step += 1
                if step == self.step and not self.behind:
                    break
                yield waited_for
                if step == self.step:
                    break
                waited_for = self.call.send(None)
            self.was_cancelled = True
            if waited_for is not None:
                waited_for._asyncio_future_blocking = False
                waited_for.cancel()
            self.call.throw(asyncio.CancelledError())
        except StopIteration as stop:
            return stop.value
        except asyncio.CancelledError:
            return None
        raise AssertionError("it goes on though it was cancelled")


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("verb", ["get", "get_wait", "get_many", "read", "messages", "get_latest"])
def test_read_cancelled_anywhere_loses_nothing(server: Server, verb: str, behind: bool) -> None:
    async def scenario(mq: AsyncClient) -> None:
        async def next_message() -> str:
            return await anext(mq.messages("t", timeout=SOON))

        verbs: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "get": lambda: mq.get("t"),
            "get_wait": lambda: mq.get_wait("t", timeout=SOON),
            "get_many": lambda: mq.get_many("t", 3),
            "read": lambda: mq.read("t", 3),
            "messages": next_message,
            "get_latest": lambda: mq.get_latest("t"),
        }
        number = 0
        for step in itertools.count(1):
            sent = [str(number + more) for more in range(1 if verb == "get_latest" else 3)]
            number += 3
            await mq.put_many("t", sent)
            call = CancelledAt(verbs[verb](), step, behind=behind)
            got = await call
            got = [got] if isinstance(got, str) else [getattr(one, "text", one) for one in got or ()]
            assert got + await mq.get_many("t") == sent
            if not call.was_cancelled:
                break
        assert step > 1

    run(server, scenario)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_put_cancelled_anywhere_is_stored_at_most_once(server: Server, count: int, behind: bool) -> None:
    async def scenario(mq: AsyncClient) -> None:
        for step in itertools.count(1):
            sent = [f"{step} {number}" for number in range(count)]
            put = mq.put_many("t", iter(sent)) if count > 1 else mq.put("t", sent[0])
            call = CancelledAt(put, step, behind=behind)
            ids = await call
            got = await mq.get_many("t")
            assert got in ([], sent)
            if not call.was_cancelled:
                assert got == sent
                assert ids
                break
        assert step > 1

    run(server, scenario)


class Interrupt:
    """Raises before the n-th line of dsmq in a coroutine that does not wait, as a signal handler may."""

    def __init__(self, line: int) -> None:
        self.left = line

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        sys.settrace(self._trace)
        try:
            call.send(None)
        except StopIteration as end:
            return end.value
        except InterruptedError:
            return None
        finally:
            sys.settrace(None)
        raise AssertionError("it waits for something")

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line" and frame.f_globals.get("__name__", "").startswith("dsmq."):
            self.left -= 1
            if not self.left:
                raise InterruptedError
        return self._trace


@pytest.mark.parametrize("verb", ["get", "get_wait", "get_many", "read", "messages"])
def test_asyncio_read_interrupted_at_any_line_loses_nothing(server: Server, verb: str) -> None:
    async def scenario(mq: AsyncClient) -> None:
        verbs: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "get": lambda: mq.get("t"),
            "get_wait": lambda: mq.get_wait("t", timeout=SOON),
            "get_many": lambda: mq.get_many("t", 2),
            "read": lambda: mq.read("t", 2),
            "messages": mq.messages("t", timeout=SOON).__anext__,
        }
        for line in itertools.count(1):
            sent = [f"{line} {number}" for number in range(4)]
            await mq.put_many("t", sent)
            # The others are read ahead.
            assert await mq.get("t") == sent[0]
            interrupt = Interrupt(line)
            got = interrupt.run(verbs[verb]())
            got = [got] if isinstance(got, str) else [getattr(one, "text", one) for one in got or ()]
            while rest := await mq.get_many("t"):
                got += rest
            assert got == sent[1:]
            if interrupt.left > 0:
                break
        assert line > 10

    run(server, scenario)


# Addresses


def test_first_answering_address_is_used(server: Server, resolve: Resolve) -> None:
    async def main() -> None:
        async with asyncio.timeout(SOON), await connect("several.example", server.port, timeout=SOON * 10) as mq:
            await mq.ping()

    with black_hole() as address, nobody() as refusing:
        resolve("several.example", address, refusing, ("127.0.0.1", server.port))
        asyncio.run(main())
    gc.collect()


def test_all_addresses_refusing_raises_clear_error(resolve: Resolve) -> None:
    with nobody() as one:
        resolve("several.example", ("127.0.0.2", one[1]), one)
        with pytest.raises(ConnectionRefusedError, match=r"no server answers at several\.example:5"):
            asyncio.run(connect("several.example", 5, retry=False))


def test_silent_address_does_not_delay_starting_server_on_another(resolve: Resolve) -> None:
    before = time.monotonic()
    with black_hole() as address, nobody() as refusing:
        resolve("several.example", refusing, address)
        with pytest.raises(ConnectionRefusedError, match="no server answers"):
            asyncio.run(connect("several.example", 5, timeout=10 * SOON, retry=False))
    assert time.monotonic() - before < SOON


def test_slow_connect_raises_timeout() -> None:
    with black_hole() as (host, port), pytest.raises(TimeoutError, match="within"):
        asyncio.run(connect(host, port, timeout=UNIT, retry=False))


def test_proxy_that_accepts_and_closes_counts_as_starting() -> None:
    async def main() -> None:
        front = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = front.sockets[0].getsockname()[1]
        connecting = asyncio.create_task(connect(port=port))
        while len(seen) < 3:
            await asyncio.sleep(UNIT / 20)
        front.close()
        await front.wait_closed()
        with serving(port=port):
            mq = await asyncio.wait_for(connecting, SOON)
            assert await mq.put("t", "x") == 1
            await mq.close()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(1)
        writer.transport.abort()

    seen: list[int] = []
    asyncio.run(main())


@contextmanager
def black_hole() -> Iterator[tuple[str, int]]:
    """An address that neither answers nor refuses: its queue is full."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()


@contextmanager
def nobody() -> Iterator[tuple[str, int]]:
    """An address without a listener."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()
