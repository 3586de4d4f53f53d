"""PURGE, on the wire and in the clients."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from conftest import Wire
from dsmq import aio
from dsmq.client import connect
from dsmq.errors import BadRequest, NotPermitted
from dsmq.server import Server


def test_purge_returns_the_number_of_messages(wire: Wire) -> None:
    for topic in ("a/1", "a/2", "b"):
        wire.call("PUT", topic, "x")
    assert wire.call("PURGE", "a/*") == 2
    assert wire.call("PURGE", "a/*") == 0
    assert wire.call("PURGE", "b") == 1
    assert isinstance(wire.call("PURGE", ""), BadRequest)
    assert wire.call("MULTI") == "OK"
    assert isinstance(wire.call("PURGE", "b"), BadRequest)


def test_pipelined_requests_follow_a_purge_in_order(server: Server, wire: Wire) -> None:
    with connect(port=server.port) as mq:
        mq.put_many("t", ["x"] * 5_000)
    wire.send(b"PURGE t\r\nPUT t y\r\nREAD t 0\r\n")
    assert wire.receive() == 5_000
    last = wire.receive()
    assert wire.receive()[0] == last  # type: ignore[index]


def test_readers_count_purged_messages_as_missed(server: Server) -> None:
    with connect(port=server.port) as mq, connect(port=server.port) as reader, connect(port=server.port) as several:
        mq.put("t", "1")
        assert reader.get("t") == "1"
        assert [message.text for message in several.read("*")] == ["1"]
        mq.put_many("t", ["2", "3"])
        assert mq.purge("t") == 3
        assert mq.purge("*") == 0
        mq.put("t", "4")
        assert reader.get("t") == "4"
        assert reader.missed == 2
        assert [message.text for message in several.read("*")] == ["4"]
        assert several.missed_in("t") == 2
        with pytest.raises(ValueError, match="empty"):
            mq.purge("")


def test_asyncio_client_purges(server: Server) -> None:
    async def main() -> None:
        async with aio.connect(port=server.port) as mq:
            await mq.put("t", "1")
            assert await mq.purge("t*") == 1

    asyncio.run(main())


def test_purge_requires_admin_role(tmp_path: Path) -> None:
    token = "a-token-that-may-only-write"
    (tmp_path / "tokens").write_text(f"me write {token}\n")
    (tmp_path / "tokens").chmod(0o600)
    with (
        Server(port=0, auth_token_file=str(tmp_path / "tokens")) as server,
        connect(port=server.port, token=token) as mq,
        pytest.raises(NotPermitted, match="PURGE requires the role admin"),
    ):
        mq.purge("t")
