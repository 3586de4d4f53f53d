"""Clients that others wrote, as they are: redis-cli, redis-benchmark, redis-py, nc."""

from __future__ import annotations

import asyncio
import subprocess
import threading

import pytest
import redis
import redis.asyncio

from conftest import SOON, serving, tool
from dsmq.server import Server


def run(*words: str, stdin: str = "") -> str:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=SOON * 3, check=True)
    return done.stdout


@pytest.fixture
def cli(server: Server) -> tuple[str, ...]:
    return (tool("redis-cli", "redis-tools"), "-p", str(server.port))


def test_redis_cli_one_command(cli: tuple[str, ...]) -> None:
    assert run(*cli, "PUT", "t", "hello you") == "1\n"
    assert run(*cli, "--raw", "READ", "t", "0").splitlines()[:4:3] == ["1", "hello you"]
    assert run(*cli, "GET", "t") == "\n"
    assert "UNKNOWN unknown command 'SET'" in run(*cli, "SET", "a", "b")


@pytest.mark.parametrize("version", ["-2", "-3"])
def test_redis_cli_session(cli: tuple[str, ...], version: str) -> None:
    session = "PUT t hello\nGET t\nGET t\nSTATS t\nHELLO\nINFO server\nCONFIG GET max_age_seconds\nCOMMAND DOCS\nquit\n"
    output = run(*cli, version, stdin=session)
    assert "hello" in output
    assert "dsmq_version" in output
    assert "ERR" not in output
    assert "Error" not in output


def test_redis_cli_pipe(cli: tuple[str, ...]) -> None:
    output = run(*cli, "--pipe", stdin="PUT t hello\r\n" * 1000)
    assert "errors: 0, replies: 1000" in output


@pytest.mark.parametrize(
    "options", [["-c", "1"], ["-c", "50"], ["-c", "50", "-P", "16"], ["-c", "20", "--threads", "2"]]
)
def test_redis_benchmark(server: Server, options: list[str]) -> None:
    benchmark = tool("redis-benchmark", "redis-tools")
    output = run(benchmark, "-p", str(server.port), "-n", "2000", "-q", *options, "PUT", "t", "m")
    assert "requests per second" in output
    assert "WARNING" not in output
    assert server.totals().messages == 2000
    assert server.counters().errors == {}


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py(server: Server, protocol: int) -> None:
    client = redis.Redis(port=server.port, protocol=protocol, client_name="tester", single_connection_client=True)
    assert client.ping()
    assert client.execute_command("PUT", "t", "hello") == 1
    assert client.execute_command("PUT", "t", b"\x00\xff", "KEY", "me", 1) == 2
    assert client.execute_command("GET", "t") == b"hello"
    assert client.execute_command("READ", "t", 1)[:4:3] == [2, b"\x00\xff"]
    assert client.execute_command("GET", "nothing") is None
    assert client.execute_command("READ", "nothing", 0) == []
    with pytest.raises(redis.ResponseError, match="UNKNOWN"):
        client.set("a", "b")
    assert client.config_get("max_connections") == {"max_connections": "10000"}
    assert client.info("store")["messages"] == 2
    assert client.client_getname() in (b"tester", "tester")
    assert client.echo("x") == b"x"
    client.close()


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_pipeline_and_pool(server: Server, protocol: int) -> None:
    client = redis.Redis(port=server.port, protocol=protocol)
    pipeline = client.pipeline(transaction=False)
    for number in range(500):
        pipeline.execute_command("PUT", "t", number)
    assert pipeline.execute() == list(range(1, 501))
    waiting = threading.Thread(target=lambda: got.append(client.execute_command("READ", "u", 0, "WAIT", 60_000)))
    got: list[list[object]] = []
    waiting.start()
    client.execute_command("PUT", "u", "x")
    waiting.join(SOON)
    assert got[0][3] == b"x"
    client.close()


def test_redis_asyncio(server: Server) -> None:
    async def talk() -> None:
        client = redis.asyncio.Redis(port=server.port, protocol=3)
        assert await client.execute_command("PUT", "t", "hello") == 1
        assert (await client.execute_command("READ", "t", 0))[3] == b"hello"
        await client.aclose()

    asyncio.run(talk())


def test_nc(server: Server) -> None:
    nc = tool("nc", "netcat-openbsd")
    session = 'PUT greetings hello\r\nPUT greetings "hello again"\nGET greetings\nREAD greetings 2\nFROBNICATE\nQUIT\n'
    expected = ":1\r\n:2\r\n$5\r\nhello\r\n*0\r\n-UNKNOWN unknown command 'FROBNICATE'\r\n+OK\r\n"
    done = subprocess.run(
        [nc, "127.0.0.1", str(server.port)],
        input=session.encode(),
        capture_output=True,
        timeout=SOON,
        check=True,
    )
    assert done.stdout.decode() == expected


def test_nc_that_ends_its_input_gets_all_replies(server: Server) -> None:
    nc = tool("nc", "netcat-openbsd")
    done = subprocess.run(
        [nc, "-N", "127.0.0.1", str(server.port)],
        input=b"PUT t x\n" * 3000,
        capture_output=True,
        timeout=SOON,
        check=True,
    )
    assert done.stdout == b"".join(b":%d\r\n" % number for number in range(1, 3001))


def test_several_servers_in_one_process() -> None:
    with serving() as one, serving() as two:
        for server in (one, two):
            client = redis.Redis(port=server.port)
            assert client.execute_command("PUT", "t", "x") == 1
            client.close()
