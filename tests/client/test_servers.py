"""Clients of several servers: with a shared store, and with one server replacing another."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conftest import run_dsmq, serving
from dsmq import aio
from dsmq.client import connect
from dsmq.errors import ConnectionLost
from engine import Engine
from helpers import HOST, SOON, UNIT, Daemon, daemon, wait_until


@pytest.fixture
def pair(shared_node: Engine, request: pytest.FixtureRequest) -> Iterator[list[Daemon]]:
    """Two servers that share a store."""
    store = ",".join(f"{host}:{port}" for host, port in shared_node.servers)
    settings = {"store": f"nats://{store}", "store_stream": f"s{abs(hash(request.node.nodeid))}", "store_replicas": 1}
    # A stream reserves this many bytes in the engine.
    settings |= {"max_stored_bytes": 10_000_000}
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        # Both start at the same time.
        yield list(pool.map(lambda _: stack.enter_context(daemon(**settings)), range(2)))


def address(server: Any) -> str:
    return f"{HOST}:{server.port}"


def addresses(servers: list[Daemon]) -> list[str]:
    return [address(server) for server in servers]


class Both:
    """A blocking or asyncio client with one interface for the tests."""

    def __init__(self, *arguments: Any, is_async: bool, **options: Any) -> None:
        self._runner = asyncio.Runner() if is_async else None
        try:
            self._mq: Any = self._wait((aio.connect if is_async else connect)(*arguments, **options))
        except BaseException:
            if self._runner is not None:
                self._runner.close()
            raise

    def _wait(self, result: Any) -> Any:
        return result if self._runner is None else self._runner.run(result)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        found = getattr(self._mq, name)
        return (lambda *a, **o: self._wait(found(*a, **o))) if callable(found) else found

    def close(self) -> None:
        self._wait(self._mq.close())
        if self._runner is not None:
            self._runner.close()


@pytest.fixture
def clients() -> Iterator[Callable[..., list[Both]]]:
    """A function that makes a client of each kind."""
    made: list[Both] = []

    def make(*arguments: Any, **options: Any) -> list[Both]:
        made.extend(Both(*arguments, is_async=is_async, **options) for is_async in (False, True))
        return made[-2:]

    yield make
    for one in made:
        one.close()


@pytest.fixture(params=[False, True], ids=["blocking", "asyncio"])
def client(request: pytest.FixtureRequest) -> Iterator[Callable[..., Both]]:
    made: list[Both] = []

    def make(*arguments: Any, **options: Any) -> Both:
        made.append(Both(*arguments, is_async=request.param, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# A shared store, and a pair of servers for clients of both kinds, each with a topic of its own


def test_client_continues_at_other_server(pair: list[Daemon], clients: Callable[..., list[Both]]) -> None:
    states: list[str] = []
    mqs = clients(addresses(pair), on_state_change=states.append)
    others = clients(list(reversed(addresses(pair))))
    used = list(zip(("t", "u"), mqs, others, strict=True))
    ids = {topic: [mq.put(topic, str(number)) for number in range(10)] for topic, mq, _ in used}
    for topic, mq, other in used:
        assert [mq.get(topic) for _ in range(5)] == ["0", "1", "2", "3", "4"]
        assert [other.get(topic) for _ in range(5)] == ["0", "1", "2", "3", "4"]
    pair[0].process.kill()
    for topic, mq, other in used:
        ids[topic] += [*mq.put_many(topic, ["10", "11"]), other.put(topic, "12")]
        assert [mq.get(topic) for _ in range(9)] == [*map(str, range(5, 13)), ""]
        assert [other.get(topic) for _ in range(9)] == [*map(str, range(5, 13)), ""]
        assert ids[topic] == sorted(set(ids[topic]))
        assert (mq.missed, other.missed) == (0, 0)
    assert not {"replaced", "restarted", "given up"} & set(states)


def test_clients_spread_over_the_servers(pair: list[Daemon]) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(addresses(pair)))
        # The chance that all choose the same server is one in half a million.
        assert all(server.metric("dsmq_connections") >= 1 for server in pair)


def test_waiting_reader_continues_at_other_server(pair: list[Daemon]) -> None:
    def get(*, is_async: bool) -> object:
        mq = Both(addresses(pair), is_async=is_async)
        try:
            return mq.get_wait("t", timeout=SOON)
        finally:
            mq.close()

    with connect(address(pair[1])) as writer, ThreadPoolExecutor(2) as pool:
        found = [pool.submit(get, is_async=is_async) for is_async in (False, True)]
        wait_until(lambda: sum(server.metric("dsmq_waiting_readers") for server in pair) == 2)
        pair[0].process.kill()
        writer.put("t", "x")
        assert [one.result(SOON) for one in found] == ["x", "x"]


def test_client_leaves_frozen_server(pair: list[Daemon], clients: Callable[..., list[Both]]) -> None:
    mqs = clients(address(pair[0]) + "," + address(pair[1]), timeout=10 * UNIT)
    pair[0].signal(signal.SIGSTOP)
    for topic, mq in zip(("t", "u"), mqs, strict=True):
        for number in range(3):
            mq.put(topic, str(number))
        assert [mq.get(topic) for _ in range(4)] == ["0", "1", "2", ""]


def test_client_leaves_stopped_server(pair: list[Daemon], clients: Callable[..., list[Both]]) -> None:
    mqs = clients(addresses(pair))
    pair[0].stop()
    for topic, mq in zip(("t", "u"), mqs, strict=True):
        mq.put(topic, "x")
        assert mq.get(topic) == "x"


@pytest.mark.embedded("a server that is not shared")
def test_hello_reports_whether_store_is_shared(pair: list[Daemon]) -> None:
    with connect(address(pair[0])) as mq:
        assert mq._session.is_shared
    with serving() as server, connect(port=server.port) as mq:
        assert not mq._session.is_shared


# Servers with stores of their own


@pytest.mark.embedded("a server that is not shared")
def test_servers_are_tried_in_order(client: Callable[..., Both], caplog: pytest.LogCaptureFixture) -> None:
    with serving() as one, serving() as two, caplog.at_level(logging.WARNING, "dsmq.client"):
        mq = client([f"{HOST}:1", address(one), address(two)], retry=False)
        mq.put("t", "x")
        assert (one.status.totals().messages, two.status.totals().messages) == (1, 0)
    assert caplog.text.count("no shared store") == 1


def test_all_servers_unreachable_raises(client: Callable[..., Both]) -> None:
    with pytest.raises(ConnectionRefusedError):
        client([f"{HOST}:1", f"{HOST}:2"], retry=False)


@pytest.mark.embedded("snapshots")
def test_server_that_comes_back_is_resumed_at_its_position(client: Callable[..., Both], tmp_path: Path) -> None:
    states: list[str] = []
    with ExitStack() as stack:
        second = stack.enter_context(serving())
        with serving(snapshot_file=str(tmp_path / "first")) as first:
            port = first.port
            mq = client([f"{HOST}:{port}", address(second)], on_state_change=states.append)
            for number in range(4):
                mq.put("t", f"first {number}")
            mq.get("t")
            mq.get("t")
        # The read-ahead is still returned, followed by the second server's messages.
        mq.put("t", "second")
        found = [mq.get("t") for _ in range(4)]
        assert found == ["first 2", "first 3", "second", ""]
        again = stack.enter_context(serving(port=port, snapshot_file=str(tmp_path / "first")))
        with connect(port=again.port) as writer:
            writer.put("t", "first 4")
        second.stop()
        wait_until(lambda: mq.get("t") == "first 4")
        assert mq.get("t") == ""
    assert states.count("replaced") == 1
    assert mq.missed == 0


@pytest.mark.embedded("snapshots")
def test_read_ahead_of_a_server_is_not_read_again_when_it_comes_back(
    client: Callable[..., Both], tmp_path: Path
) -> None:
    snapshot = str(tmp_path / "first")
    with ExitStack() as stack:
        second = stack.enter_context(serving())
        with serving(snapshot_file=snapshot) as first:
            port = first.port
            mq = client([f"{HOST}:{port}", address(second)])
            for number in range(6):
                mq.put("t", str(number))
            assert mq.get("t") == "0"
        # The second server answers, and the read-ahead from the first is still there.
        assert mq.get("other") == ""
        stack.enter_context(serving(port=port, snapshot_file=snapshot))
        second.stop()
        assert mq.get("other") == ""
        assert [mq.get("t") for _ in range(6)] == ["1", "2", "3", "4", "5", ""]
    assert mq.missed == 0


@pytest.mark.embedded("snapshots")
def test_return_to_restarted_server_is_reported(client: Callable[..., Both], tmp_path: Path) -> None:
    states: list[str] = []
    settings = {"snapshot_file": str(tmp_path / "it"), "snapshot_interval_seconds": 1}
    with serving() as second, daemon(**settings) as first:
        mq = client([address(first), address(second)], on_state_change=states.append)
        mq.put("t", "x")
        wait_until((tmp_path / "it").exists)
        first.process.kill()
        first.process.wait()
        mq.put("t", "y")
        with daemon(**settings | {"port": first.port}):
            second.stop()
            mq.put("t", "z")
    assert [state for state in states if state != "lost"] == ["replaced", "restarted"]


@pytest.mark.embedded("a server that is not shared")
def test_put_that_may_be_stored_at_another_server_is_not_repeated(client: Callable[..., Both]) -> None:
    with serving() as second, daemon() as first:
        mq = client([address(first), address(second)], timeout=10 * UNIT)
        first.signal(signal.SIGSTOP)
        wait_until(lambda: first.state == "T")
        with pytest.raises(ConnectionLost, match="may have been stored") as error:
            mq.put("t", "x")
        assert error.value.may_be_stored
        first.signal(signal.SIGCONT)


# Arguments


@pytest.mark.parametrize(
    ("host", "error"),
    [
        ([], ValueError),
        ("", ValueError),
        ("a,", ValueError),
        (["a", 5], TypeError),
        ("a:0", ValueError),
        ("a:b", ValueError),
        ("a:70000", ValueError),
        ({"a"}, TypeError),
    ],
)
def test_invalid_host_raises(host: Any, error: type[Exception], client: Callable[..., Both]) -> None:
    with pytest.raises(error):
        client(host)


@pytest.mark.parametrize("form", ["{0},{1}", "{1}", f"{HOST}:1,{{0}}"])
def test_command_line_accepts_several_hosts(form: str) -> None:
    with serving() as one, serving() as two:
        hosts = form.format(address(one), address(two))
        assert run_dsmq("put", "t", "x", "--host", hosts).returncode == 0
        assert run_dsmq("put", "t", "x", env={"DSMQ_SERVER": hosts}).returncode == 0
        wait_until(lambda: one.status.totals().messages + two.status.totals().messages == 2)


def test_hosts_come_from_environment_by_default(client: Callable[..., Both], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        monkeypatch.setenv("DSMQ_HOST", "nowhere.invalid")
        monkeypatch.setenv("DSMQ_SERVER", f"{HOST}:1,{address(server)}")
        client().put("t", "x")
        client(address(server)).put("t", "x")
        monkeypatch.setenv("DSMQ_SERVER", "")
        monkeypatch.setenv("DSMQ_HOST", HOST)
        client(port=server.port).put("t", "x")
        wait_until(lambda: server.status.totals().messages == 3)
    monkeypatch.setenv("DSMQ_SERVER", "a:0")
    with pytest.raises(ValueError, match="DSMQ_SERVER: port should be 1 to 65535, not 0"):
        client()


def test_server_refuses_several_hosts() -> None:
    done = run_dsmq("serve", "--host", "a,b")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"address" in done.stderr
