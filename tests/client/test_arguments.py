"""Both clients refuse invalid arguments with the same clear errors, before anything is sent."""

from __future__ import annotations

import asyncio
import math
import ssl
import subprocess
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import dsmq.client
from conftest import CONNECTS, UNIT, Connect, serving
from dsmq import aio
from dsmq.client import connect
from dsmq.server import Server

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    *[({"timeout": value}, ValueError, "timeout should be more than 0") for value in (0, 0.0, -1, math.nan, -math.inf)],
    ({"timeout": 10**400}, ValueError, "timeout should be a number of seconds"),
    *[({"timeout": value}, TypeError, "timeout should be a number") for value in (None, "5", True, [], b"5")],
    *[({"reconnect_timeout": value}, ValueError, "reconnect_timeout should be 0 or more") for value in (-1, math.nan)],
    *[({"reconnect_timeout": value}, TypeError, "reconnect_timeout should") for value in (None, "5", False)],
    *[({"port": value}, ValueError, "port should be 1 to 65535") for value in (0, -1, 65_536)],
    *[({"port": value}, TypeError, "port should be an int") for value in ("30008", True, 30008.0, None)],
    *[({"host": value}, TypeError, "host should be a str") for value in (None, 5, b"127.0.0.1")],
    *[({"host": value}, ValueError, "host should be an address") for value in ("", "unix:", "a b", "redis://a")],
    *[({"host": value}, ValueError, "NUL") for value in ("unix:/tmp/\0x", "local\0host")],
    *[({"token": value}, TypeError, "token should be a str") for value in (5, b"secret", True)],
    *[({"on_state_change": value}, TypeError, "on_state_change") for value in (5, "print", [])],
    *[({name: 5}, TypeError, f"{name} should be a path") for name in ("ca_file", "cert_file", "key_file")],
    *[({name: "a\0b"}, ValueError, "NUL") for name in ("ca_file", "cert_file", "key_file")],
    *[({name: ""}, ValueError, f"{name} should be a path") for name in ("ca_file", "cert_file", "key_file")],
    ({"tls": "yes"}, TypeError, "tls"),
    *[({"retry": value}, TypeError, "retry should be a bool") for value in (3, None, "no")],
    *[({"name": value}, TypeError, "name should be a str") for value in (5, b"me")],
    *[({"name": value}, ValueError, "name should have") for value in ("a b", "a\n", "é", "\x1b[31m", "x" * 65)],
]


@CONNECTS
@pytest.mark.parametrize(("options", "error", "about"), WRONG, ids=[str(wrong[0]) for wrong in WRONG])
def test_connect_with_invalid_option_raises(
    connect: Connect, options: dict[str, Any], error: type[Exception], about: str
) -> None:
    before = time.monotonic()
    with pytest.raises(error, match=about) as told:
        connect(**options)
    assert "embedded" not in str(told.value)
    assert time.monotonic() - before < 50 * UNIT


@CONNECTS
def test_tls_context_for_servers_raises(connect: Connect) -> None:
    with pytest.raises(ValueError, match="tls should be an SSLContext for clients"):
        connect(tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


@CONNECTS
@pytest.mark.parametrize(
    "options",
    [
        {"timeout": math.inf},
        {"timeout": Decimal(5)},
        {"timeout": 1},
        {"reconnect_timeout": 0},
        {"reconnect_timeout": math.inf},
        {"token": None},
        {"on_state_change": print},
    ],
    ids=str,
)
def test_connect_accepts_valid_options(server: Server, connect: Connect, options: dict[str, Any]) -> None:
    client = connect(port=server.port, **options)
    assert server.status.counters().opened == 1
    if client:
        client.close()


WRONG_CALLS: list[tuple[str, Callable[[Any], Any], type[Exception]]] = [
    *[
        (f"{name} timeout={value!r}", lambda mq, name=name, value=value: getattr(mq, name)("t", timeout=value), error)
        for name in ("get_wait", "get_many", "read", "messages")
        for value, error in ((math.nan, ValueError), (-1, ValueError), ("1", TypeError), (True, TypeError))
    ],
    *[
        (f"{name} n={value!r}", lambda mq, name=name, value=value: getattr(mq, name)("t", value), error)
        for name in ("get_many", "read")
        for value, error in ((2.0, TypeError), (True, TypeError), ("2", TypeError), (None, TypeError), (-1, ValueError))
    ],
    *[
        (f"{name} topic={topic!r}", lambda mq, name=name, topic=topic: getattr(mq, name)(topic), error)
        for name in ("get", "get_wait", "get_latest", "get_many", "read", "messages")
        for topic, error in ((b"t", TypeError), (None, TypeError), ([], TypeError), ("", ValueError))
    ],
    *[
        (f"put_many {value!r}", lambda mq, value=value: mq.put_many("t", value), TypeError)
        for value in ("hello", b"hello", bytearray(b"x"), 5, None)
    ],
    *[
        (f"read the latest, {options}", lambda mq, options=options: mq.read("t", latest=True, **options), error)
        for options, error in (
            ({"n": -1}, ValueError),
            ({"n": None}, TypeError),
            ({"timeout": math.nan}, ValueError),
            ({"timeout": "1"}, TypeError),
        )
    ],
    *[
        (f"put nothing into {topic!r}", lambda mq, topic=topic: mq.put_many(topic, []), error)
        for topic, error in (("", ValueError), (None, TypeError))
    ],
    ("messages as text and bytes", lambda mq: mq.messages("t", text=True, raw=True), ValueError),
    ("put a number", lambda mq: mq.put("t", 5), TypeError),
    ("put into bytes", lambda mq: mq.put(b"t", "x"), TypeError),
    ("put_many into bytes", lambda mq: mq.put_many(b"t", ["x"]), TypeError),
    *[
        (f"{name} by position", lambda mq, name=name: getattr(mq, name)("t", 5), TypeError)
        for name in ("get", "get_wait", "get_latest")
    ],
]


@pytest.mark.parametrize("call", [call[1:] for call in WRONG_CALLS], ids=[call[0] for call in WRONG_CALLS])
def test_call_with_invalid_argument_raises_and_sends_nothing(
    server: Server, call: tuple[Callable[[Any], Any], type[Exception]]
) -> None:
    async def awaited(mq: aio.AsyncClient) -> None:
        result = call[0](mq)
        await (anext(result) if hasattr(result, "__anext__") else result)

    async def scenario() -> None:
        async with await aio.connect(port=server.port) as mq:
            before = server.status.counters().requests
            with pytest.raises(call[1]):
                await awaited(mq)
            assert server.status.counters().requests == before

    with connect(port=server.port) as mq:
        before = server.status.counters().requests
        with pytest.raises(call[1]):
            call[0](mq)
        assert server.status.counters().requests == before
    asyncio.run(scenario())


def test_zero_timeout_does_not_wait(server: Server) -> None:
    async def scenario() -> None:
        async with await aio.connect(port=server.port) as mq:
            assert await mq.get_wait("t", timeout=0) == ""
            assert await mq.get_many("t", timeout=0) == []
            assert await mq.read("t", timeout=0) == []
            assert [message async for message in mq.messages("t", timeout=0)] == []

    with connect(port=server.port) as mq:
        assert mq.get_wait("t", timeout=0) == ""
        assert mq.get_many("t", timeout=0) == []
        assert mq.read("t", timeout=0) == []
        assert list(mq.messages("t", timeout=0)) == []
    asyncio.run(scenario())
    assert server.status.waiting() == 0


def test_get_latest_default_is_returned_if_there_is_none(server: Server) -> None:
    async def scenario() -> None:
        async with await aio.connect(port=server.port) as mq:
            await mq.put("t", "x")
            assert await mq.read("t", 0, latest=True) == []
            assert await mq.get("t") == "x"

    with connect(port=server.port) as mq:
        mq.put("t", "x")
        assert mq.read("t", 0, latest=True) == []
        assert mq.get("t") == "x"
    asyncio.run(scenario())


@CONNECTS
@pytest.mark.parametrize(
    ("path", "error", "about"),
    [
        ("/nowhere/socket", FileNotFoundError, "^.Errno 2. unix:/nowhere/socket can't be reached: No such file"),
        ("/" + "x" * 200, OSError, "^unix:/x+ can't be reached: AF_UNIX path too long$"),
    ],
)
def test_unreachable_unix_socket_is_named(connect: Connect, path: str, error: type[Exception], about: str) -> None:
    with pytest.raises(error, match=about):
        connect(f"unix:{path}", retry=False)


@pytest.mark.parametrize("name", ["_n_tries", "_n_retries"])
def test_both_retry_schedule_names_are_adjustable(retry_schedule: Callable[..., None], name: str) -> None:
    retry_schedule(3, name=name)
    assert dsmq.client.default_wait() == pytest.approx(0.01 + 0.02 + 0.04)


# Files of TLS


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 1 -subj /CN=localhost -nodes"
    subprocess.run(
        [*make.split(), "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder, check=True, capture_output=True
    )
    lock = "openssl pkcs8 -topk8 -in key.pem -out locked.pem -passout pass:secret"
    subprocess.run(lock.split(), cwd=folder, check=True, capture_output=True)
    (folder / "none.pem").write_text("nothing")
    return folder


@CONNECTS
@pytest.mark.parametrize(
    ("files", "about"),
    [
        ({"cert_file": "cert.pem", "key_file": "locked.pem"}, "^key_file: .*/locked.pem: the private key is encrypted"),
        ({"cert_file": "key.pem", "key_file": "cert.pem"}, "swapped"),
        ({"cert_file": "cert.pem", "key_file": "none.pem"}, "^key_file: .*/none.pem: no private key"),
        ({"cert_file": "cert.pem"}, "^cert_file: .*/cert.pem: no private key"),
        ({"cert_file": "none.pem", "key_file": "key.pem"}, "^cert_file: .*/none.pem: no certificate"),
        ({"ca_file": "none.pem"}, "^ca_file: .*/none.pem: no certificate"),
        ({"ca_file": "missing.pem"}, "^ca_file: .*/missing.pem: No such file"),
        ({"ca_file": "/dev/zero"}, "^ca_file: /dev/zero: not a regular file"),
        ({"key_file": "key.pem"}, "key_file without cert_file"),
    ],
)
def test_unusable_files_have_distinct_errors(connect: Connect, keys: Path, files: dict[str, str], about: str) -> None:
    with pytest.raises(ValueError, match=about):
        connect(port=1, **{name: str(keys / file) for name, file in files.items()})


def test_none_is_a_valid_default() -> None:
    with serving() as server, connect(port=server.port) as mq:
        assert mq.get_many("t", 0) == []
        assert mq.get("t", default=None) is None
