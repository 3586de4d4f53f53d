"""Unmodified third-party programs and libraries: redis-cli, redis-benchmark, redis-py, nc."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from pathlib import Path

import pytest
import redis
import redis.asyncio

from conftest import SOON, Wire, daemon, serving, tool, wait_for_stored, wire_to
from dsmq.broker.commands import COMMANDS
from dsmq.server import Server
from dsmq.wire.resp import encode_request


def run(*words: str, stdin: str = "") -> str:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=SOON * 3, check=True)
    return done.stdout


@pytest.fixture
def cli(server: Server) -> tuple[str, ...]:
    return (tool("redis-cli", "redis-tools"), "-p", str(server.port))


def test_redis_cli_runs_one_command(cli: tuple[str, ...]) -> None:
    assert run(*cli, "PUT", "t", "hello you") == "1\n"
    assert run(*cli, "--raw", "READ", "t", "0").splitlines()[:4:3] == ["1", "hello you"]
    assert run(*cli, "GET", "t") == "\n"
    assert "UNKNOWN unknown command 'SET'" in run(*cli, "SET", "a", "b")


@pytest.mark.parametrize("version", ["-2", "-3"])
def test_redis_cli_runs_a_session(cli: tuple[str, ...], version: str) -> None:
    session = "PUT t hello\nGET t\nGET t\nSTATS t\nHELLO\nINFO server\nCONFIG GET max_age_seconds\nCOMMAND DOCS\nquit\n"
    output = run(*cli, version, stdin=session)
    assert "hello" in output
    assert "dsmq_version" in output
    assert "ERR" not in output
    assert "Error" not in output


def test_redis_cli_pipe_mode_works(cli: tuple[str, ...]) -> None:
    output = run(*cli, "--pipe", stdin="PUT t hello\r\n" * 1000)
    assert "errors: 0, replies: 1000" in output


@pytest.mark.parametrize(
    "options", [["-c", "1"], ["-c", "50"], ["-c", "50", "-P", "16"], ["-c", "20", "--threads", "2"]]
)
def test_redis_benchmark_runs(server: Server, options: list[str]) -> None:
    benchmark = tool("redis-benchmark", "redis-tools")
    output = run(benchmark, "-p", str(server.port), "-n", "2000", "-q", *options, "PUT", "t", "m")
    assert "requests per second" in output
    assert "WARNING" not in output
    wait_for_stored(server, 2000)
    assert server.status.counters().errors == {}


def test_redis_cli_stat_mode_works(server: Server, cli: tuple[str, ...]) -> None:
    run(*cli, "PUT", "t", "hello")
    wait_for_stored(server, 1)
    with subprocess.Popen([*cli, "--stat", "-i", "0.01"], stdout=subprocess.PIPE, text=True) as stat:
        assert stat.stdout is not None
        shown = [stat.stdout.readline() for _ in range(4)]
        stat.terminate()
    assert shown[1].split()[:3] == ["keys", "mem", "clients"]
    assert shown[2].split()[0] == shown[3].split()[0] == "1"
    assert server.status.counters().errors == {}


def test_redis_cli_explains_commands(server: Server, cli: tuple[str, ...]) -> None:
    output = run(*cli, stdin="help put\nhelp hello\n")
    for name in ("PUT", "HELLO"):
        command = COMMANDS[name.encode()]
        assert command.syntax in output
        assert command.summary in output
    assert server.status.counters().errors == {}


def test_command_docs_have_redis_7_form(cli: tuple[str, ...]) -> None:
    put, nothing = json.loads(run(*cli, "--json", "COMMAND", "INFO", "put", "nosuch"))
    assert put == ["put", -3, ["write"], 0, 0, 0, [], [], [], []]
    assert nothing is None


@pytest.mark.parametrize("words", ["READONLY", "CLIENT NO-EVICT on", "CLIENT NO-TOUCH off"])
def test_redis_specific_setup_commands_are_harmless(cli: tuple[str, ...], words: str) -> None:
    assert run(*cli, *words.split()) == "OK\n"


def test_reset_restores_connection_but_keeps_token() -> None:
    with serving(auth_token="x" * 20) as server, wire_to(server) as wire:
        assert isinstance(wire.call("HELLO", 2, "AUTH", "default", "x" * 20, "SETNAME", "me", "NOTICES"), list)
        assert wire.call("MULTI") == "OK"
        assert wire.call("RESET") == "RESET"
        assert wire.error("EXEC") == "BADREQUEST"
        assert wire.call("CLIENT", "GETNAME") is None
        assert wire.call("PUT", "t", "x") == 1
        wire.send(encode_request(b"SHUTDOWN"))
        assert wire.ended()


@pytest.mark.parametrize("option", ["NOSAVE", "save"])
def test_shutdown_accepts_redis_options(server: Server, wire: Wire, option: str) -> None:
    stops: list[str] = []
    server.context.request_stop = stops.append
    assert wire.error("SHUTDOWN", "ABORT") == "BADREQUEST"
    assert stops == []
    wire.send(encode_request(b"SHUTDOWN", option.encode()))
    assert wire.ended()
    assert len(stops) == 1


def test_role_reports_a_writable_server(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("one read reader-0123456789\n")
    with serving(auth_token_file=str(file)) as server, wire_to(server) as wire:
        assert wire.call("AUTH", "reader-0123456789") == "OK"
        # valkey-glide requires this line.
        assert b"\r\nrole:master\r\n" in wire.call("INFO", "REPLICATION")  # type: ignore[operator]


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_connects_without_an_error(server: Server, protocol: int) -> None:
    client = redis.Redis(port=server.port, protocol=protocol)
    assert client.ping()
    assert client.command()["put"]["arity"] == -3
    assert len(client.execute_command("COMMAND DOCS")) in (len(COMMANDS), 2 * len(COMMANDS))
    assert list(server.status.counters().recent) == []
    client.close()


def test_redis_py_default_pipeline_stores_all_or_nothing(server: Server) -> None:
    client = redis.Redis(port=server.port)
    pipeline = client.pipeline()
    for number in range(100):
        pipeline.execute_command("PUT", "t", number)
    assert pipeline.execute() == list(range(1, 101))
    pipeline.execute_command("PUT", "t", "x")
    pipeline.execute_command("PUT", "t")
    with pytest.raises(redis.RedisError):
        pipeline.execute()
    assert server.status.totals().stored == 100
    client.close()


def test_redis_py_shuts_server_down() -> None:
    with daemon() as process:
        client = redis.Redis(port=process.port)
        client.shutdown(nosave=True)
        process.wait_for_line("stopping: SHUTDOWN")
        client.close()


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_puts_and_gets(server: Server, protocol: int) -> None:
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
def test_redis_py_pipeline_and_pool_work(server: Server, protocol: int) -> None:
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


def test_redis_asyncio_puts_and_gets(server: Server) -> None:
    async def talk() -> None:
        client = redis.asyncio.Redis(port=server.port, protocol=3)
        assert await client.execute_command("PUT", "t", "hello") == 1
        assert (await client.execute_command("READ", "t", 0))[3] == b"hello"
        await client.aclose()

    asyncio.run(talk())


def test_nc_puts_and_gets(server: Server) -> None:
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


def test_nc_gets_all_replies_after_half_close(server: Server) -> None:
    nc = tool("nc", "netcat-openbsd")
    done = subprocess.run(
        [nc, "-N", "127.0.0.1", str(server.port)],
        input=b"PUT t x\n" * 3000,
        capture_output=True,
        timeout=SOON,
        check=True,
    )
    assert done.stdout == b"".join(b":%d\r\n" % number for number in range(1, 3001))


def test_several_servers_share_a_process() -> None:
    with serving() as one, serving() as two:
        for server in (one, two):
            client = redis.Redis(port=server.port)
            assert client.execute_command("PUT", "t", "x") == 1
            client.close()
