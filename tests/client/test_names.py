"""The names of clients, pickled clients, and the names that the package exports."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import ssl
import sys
from collections.abc import Callable
from typing import Any

import pytest

import dsmq
from dsmq import aio
from dsmq.client import DSMQClientSideConnection, arguments, connect
from dsmq.errors import ClientClosed
from dsmq.server import Server
from helpers import SOON


def names(server: Server) -> set[str]:
    return {client["name"] for client in server.status.page()["clients"]}


def test_server_displays_the_name_of_a_client(server: Server) -> None:
    with connect(port=server.port, name="camera"), connect(port=server.port):
        assert names(server) == {"camera", arguments.default_client_name().decode()}


def test_asyncio_client_has_a_name_on_each_connection(server: Server) -> None:
    async def main() -> None:
        async with aio.connect(port=server.port, name="viewer") as mq:
            waiting = asyncio.create_task(mq.get_wait("t", timeout=SOON))
            await mq.put("t", "x")
            assert await waiting == "x"
            assert names(server) == {"viewer"}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("/home/me/reader.py", "reader.py"),
        ("/usr/lib/my tool/__main__.py", "my_tool"),
        ("-c", "python"),
        ("", "python"),
        ("é\x1b[31m\n.py", "__[31m_.py"),
        ("x" * 100, "x" * (62 - len(str(os.getpid())))),
    ],
)
def test_default_name_is_program_and_process(program: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    assert arguments.default_client_name() == f"{name}[{os.getpid()}]".encode()
    assert arguments.short_name("name", arguments.default_client_name().decode())


def test_asyncio_connect_may_be_awaited_entered_or_run_as_a_task(server: Server) -> None:
    async def main() -> None:
        async with aio.connect(port=server.port) as mq:
            await mq.put("t", "x")
        with pytest.raises(ClientClosed):
            await mq.ping()
        async with await aio.connect(port=server.port) as mq:
            await mq.ping()
        task = await asyncio.create_task(aio.connect(port=server.port))
        timed = await asyncio.wait_for(aio.connect(port=server.port), SOON)
        for mq in (task, timed, *await asyncio.gather(aio.connect(port=server.port))):
            await mq.ping()
            await mq.close()

    asyncio.run(main())


def test_failing_asyncio_connect_raises_on_entering_block() -> None:
    async def main() -> None:
        async with aio.connect(port=0):
            pytest.fail("connected")

    with pytest.raises(ValueError, match="port"):
        asyncio.run(main())


def echo(mq: DSMQClientSideConnection) -> None:
    mq.put("from", f"{mq.get('before')}{mq.get_wait('to', timeout=SOON)}")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_client_passed_to_another_process_connects_there(server: Server, method: str) -> None:
    with connect(port=server.port) as mq:
        mq.put("before", "seen by the parent only")
        process = multiprocessing.get_context(method).Process(target=echo, args=(mq,))
        process.start()
        try:
            while process.is_alive() and not (found := mq.get("from")):
                mq.put("to", "hello")
                process.join(0.05)
            assert (found or mq.get("from")) == "hello"
        finally:
            process.kill()
            process.join()
        assert mq.get("before") == "seen by the parent only"


def test_pickled_client_has_the_same_arguments_and_shows_no_token(server: Server) -> None:
    secret = "s3cret-token-of-this-test"
    with connect(port=server.port, name="camera", timeout=3.0, retry=False) as mq:
        with pickle.loads(pickle.dumps(mq)) as copy:
            assert copy._core.timeout == 3.0
            assert names(server) == {"camera"}
            copy.put("t", "x")
            assert mq.get("t") == "x"
        mq._options["token"] = secret
        assert secret not in repr(mq)
    with pytest.raises(ClientClosed):
        pickle.dumps(mq)


def test_clients_that_cannot_be_pickled_raise_type_error(server: Server) -> None:
    async def main() -> None:
        async with aio.connect(port=server.port) as mq:
            with pytest.raises(TypeError, match="connect in the other process"):
                pickle.dumps(mq)

    asyncio.run(main())
    with connect(port=server.port) as mq:
        mq._options["tls"] = ssl.create_default_context()
        with pytest.raises(TypeError, match="ca_file"):
            pickle.dumps(mq)


@pytest.mark.parametrize("call", [connect, aio.connect])
def test_help_lists_every_option(call: Callable[..., Any]) -> None:
    import inspect

    from dsmq.client.core import Options

    parameters = inspect.signature(call).parameters
    assert set(Options.__annotations__) <= set(parameters)
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def test_package_exports_documented_names() -> None:
    assert (dsmq.connect, dsmq.Message, dsmq.aio) == (connect, aio.Message, aio)
    assert dsmq.Server is Server
    assert set(dsmq.__all__) <= set(dir(dsmq))
    with pytest.raises(AttributeError, match="'dsmq' has no attribute 'conect'"):
        dsmq.conect  # type: ignore[attr-defined]  # noqa: B018
