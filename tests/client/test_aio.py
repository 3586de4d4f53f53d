"""The asyncio client: its methods, event loops and processes, cancellation, and addresses."""

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
from collections.abc import Callable, Coroutine, Generator, Iterator
from types import FrameType
from typing import Any

import pytest
from scenarios import run

import dsmq.client
from conftest import SOON, UNIT, Resolve, black_hole, blocked, refusing_address, serving, wait_until
from dsmq.aio import AsyncClient, connect
from dsmq.client.requests import PUTS_AT_ONCE
from dsmq.errors import BadRequest, ClientClosed, ConnectionLost, MessageNotText
from dsmq.server import Server


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
    # An argument of dsmq 1.4, which had no asyncio client.
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
            with pytest.raises(ConnectionRefusedError):
                await connect(port=server.port, retry=False)

    asyncio.run(main())


def test_cancelled_shutdown_does_not_end_another(server: Server) -> None:
    async def scenario(mq: AsyncClient) -> None:
        # Leave the connection open.
        server.context.request_stop = lambda _: None
        shared = mq._here().shared
        one, other = (asyncio.create_task(mq.shutdown_server()) for _ in range(2))
        while not shared._connection.has_answered or shared._connection.due:
            await asyncio.sleep(0)
        await shared.settle()
        one.cancel()
        await asyncio.wait([one])
        await shared.settle()
        assert not other.done()
        shared._connection.sock.shutdown(socket.SHUT_RDWR)
        await other

    run(server, scenario)


def test_raising_callback_leaves_no_connection(server: Server) -> None:
    def refuse(state: str) -> None:
        raise LookupError(state)

    async def main() -> None:
        with pytest.raises(LookupError, match="replaced") as kept:
            await connect(port=server.port, start="other-epoch:5", on_state_change=refuse)
        while server.status.connections():
            await asyncio.sleep(UNIT / 20)
        # The error refers to the client.
        assert kept.value

    asyncio.run(asyncio.wait_for(main(), SOON))


def test_each_put_many_batch_has_its_own_timeout(server: Server) -> None:
    async def main() -> None:
        async with await connect(port=server.port, timeout=20 * UNIT, reconnect_timeout=0) as mq:
            # Together they take longer than the timeout, but each takes only a twentieth of it.
            def slow() -> Iterator[str]:
                for _ in range(25):
                    server._workers[0].post(lambda: time.sleep(UNIT))
                    yield from ["x"] * PUTS_AT_ONCE

            assert len(await mq.put_many("t", slow())) == 25 * PUTS_AT_ONCE

    asyncio.run(main())


def test_unanswered_connect_times_out() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
            await connect(port=silent.getsockname()[1], timeout=2 * UNIT, retry=False)

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
    # Anything left unclosed emits a ResourceWarning.
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
    # It refers to transports of a closed event loop, which emit warnings when collected; only this test ignores them.
    del late
    gc.collect()


def test_use_in_loop_of_another_thread_raises_at_once(server: Server) -> None:
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
    assert "run another one in the child" in told
    assert (rest, found.stderr) == (["1"], "")


# Cancellation


class CancelledAt:
    """Cancels a coroutine at its n-th wait, before or after the result is available."""

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
        raise AssertionError("it continues although it was cancelled")


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("verb", ["get", "get_wait", "get_many", "read", "messages", "get_latest"])
def test_read_cancelled_anywhere_loses_nothing(server: Server, verb: str, behind: bool) -> None:
    async def scenario(mq: AsyncClient) -> None:
        async def next_message() -> str:
            return await anext(mq.messages("t", timeout=SOON, text=True))

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
    """Raises before the n-th line of dsmq in a coroutine that does not wait, like a signal handler."""

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
            "messages": mq.messages("t", timeout=SOON, text=True).__anext__,
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

    with black_hole() as address, refusing_address() as refusing:
        resolve("several.example", address, refusing, ("127.0.0.1", server.port))
        asyncio.run(main())
    gc.collect()


def test_all_addresses_refusing_raises_clear_error(resolve: Resolve) -> None:
    with refusing_address() as one:
        resolve("several.example", ("127.0.0.2", one[1]), one)
        with pytest.raises(ConnectionRefusedError, match=r"no server answers at several\.example:5"):
            asyncio.run(connect("several.example", 5, retry=False))


def test_silent_address_does_not_delay_starting_server_on_another(resolve: Resolve) -> None:
    before = time.monotonic()
    with black_hole() as address, refusing_address() as refusing:
        resolve("several.example", refusing, address)
        with pytest.raises(ConnectionRefusedError, match="no server answers"):
            asyncio.run(connect("several.example", 5, timeout=10 * SOON, retry=False))
    assert time.monotonic() - before < SOON


def test_slow_connect_raises_timeout() -> None:
    with black_hole() as (host, port), pytest.raises(TimeoutError, match="can't be reached: timed out"):
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
