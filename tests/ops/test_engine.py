"""What operators see of a store in a NATS stream: metrics, readiness, INFO, the page's data, and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nats
import pytest
from http_clients import Answer
from prometheus_client.parser import text_string_to_metric_families

from conftest import ROOT, SOON, UNIT, Wire, reached, scrape, serving, wait_until, wire_to
from dsmq import settings as config
from dsmq.client import connect
from dsmq.server import Server
from dsmq.store import nats_mirror
from dsmq.store.nats import NATSStore
from dsmq.store.nats_api import EngineError
from dsmq.store.sqlite import SQLiteStore
from dsmq.system import boot_time
from engine import Engine, engine
from helpers import forked

PREFIXES = ("dsmq_engine_", "dsmq_mirror_")


def shown(server: Server) -> dict[str, float]:
    """Return the metrics of the engine and the mirror, without `dsmq_`."""
    return {name.removeprefix("dsmq_"): value for name, value in scrape(server).items() if name.startswith(PREFIXES)}


def metric(server: Server, name: str) -> float:
    return scrape(server)[f"dsmq_{name}"]


def new_server(nodes: Engine, **settings: object) -> Server:
    """Return a server in front of NATS servers."""
    servers = ",".join(f"{host}:{port}" for host, port in nodes.servers)
    given = {"port": 0, "http_port": 0, "store": f"nats://{servers}", "store_replicas": len(nodes.nodes), **settings}
    return Server(config.load(kind=config.EmbeddedSettings, **given))


@contextmanager
def serving_from(nodes: Engine, **settings: object) -> Iterator[Server]:
    with new_server(nodes, **settings) as server:
        yield server


def store_of(server: Server) -> NATSStore:
    store = server.context.store
    assert isinstance(store, NATSStore)
    return store


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> str:
    """A stream for one test."""
    return f"s{abs(hash(request.node.nodeid))}"


@pytest.fixture
def server(shared_node: Engine, stream: str) -> Iterator[Server]:
    # The engine reserves this much room.
    with serving_from(shared_node, store_stream=stream, max_stored_bytes=10_000_000) as server:
        yield server


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with wire_to(server) as wire:
        yield wire


def readyz(server: Server) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(Answer(server.http_port, "/readyz").text)
    return answer


def messages(caplog: pytest.LogCaptureFixture, level: int, pattern: str) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == level and re.search(pattern, record.getMessage())
    ]


# With and without


def test_server_in_memory_has_no_engine_metrics() -> None:
    with serving(http_port=0) as server, wire_to(server) as wire:
        assert shown(server) == {}
        assert b"engine" not in wire.call("INFO")  # type: ignore[operator]
        assert server.status.page()["engine"] is None
        assert readyz(server)["status"] == "ready"


def test_readme_lists_every_metric_of_the_engine(server: Server) -> None:
    rows = re.findall(
        r"^\| `(dsmq_(?:engine|mirror)_\w+)` \| (\w+) \|", (ROOT / "deploy/README.md").read_text(), re.MULTILINE
    )
    listed = {name.removesuffix("_total"): kind for name, kind in rows}
    families = text_string_to_metric_families(Answer(server.http_port, "/metrics").text)
    assert {family.name: family.type for family in families if family.name.startswith(PREFIXES)} == listed
    assert len(listed) > 5


# Numbers


def test_quiet_server_is_connected_and_up_to_date(server: Server, wire: Wire) -> None:
    for _ in range(10):
        wire.call("PUT", "t", "x")
    wait_until(lambda: metric(server, "mirror_lag_messages") == 0)
    assert shown(server) == {
        "engine_connected": 1,
        "engine_retries_total": 0,
        "engine_split_batches_total": 0,
        "engine_repeated_puts_total": 0,
        "mirror_ready": 1,
        "mirror_lag_messages": 0,
        "mirror_lag_seconds": 0,
        "mirror_consumers_total": 1,
        "mirror_skipped_messages_total": 0,
    }
    assert readyz(server) == {"status": "ready", "reasons": []}


def test_publishing_is_timed(server: Server, wire: Wire) -> None:
    for _ in range(3):
        wire.call("PUT", "t", "x")
    found = scrape(server)
    assert found["dsmq_store_operations_total{publish}"] == 3
    assert 0 < found["dsmq_store_seconds_total{publish}"] < SOON


def test_repeated_puts_are_counted(server: Server, wire: Wire) -> None:
    first = wire.call("PUT", "t", "x", "KEY", "p", 1)
    wait_until(lambda: store_of(server).last_id() == first)
    # The mirror recognises the first repetition; the engine recognises the two in one batch.
    assert wire.call("PUT", "t", "x", "KEY", "p", 1, "AGAIN") == first
    answer = store_of(server).append([(b"t", b"y", (b"p", 2)), (b"t", b"y", (b"p", 2))])
    assert isinstance(answer, Future)
    assert len(set(answer.result(SOON))) == 1
    assert metric(server, "engine_repeated_puts_total") == 2
    assert metric(server, "engine_split_batches_total") == 1


def test_message_that_cannot_be_mirrored_is_counted_and_skipped(server: Server, wire: Wire, stream: str) -> None:
    host, port = store_of(server)._servers[0]

    async def publish() -> None:
        client = await nats.connect(f"nats://{host}:{port}")
        # More digits than Python converts.
        headers = {"Nats-Msg-Id": f"p.x:{'9' * 5000}"}
        await client.jetstream().publish(f"{stream}.t.t", b"odd", headers=headers)
        await client.close()

    wire.call("PUT", "t", "before")
    asyncio.run(publish())
    wire.call("PUT", "t", "after")
    assert wire.call("GETLATEST", "t") == b"after"
    found = shown(server)
    assert (found["mirror_skipped_messages_total"], found["mirror_consumers_total"]) == (1, 1)


# Lag


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(nats_mirror, "boot_time", lambda: now[0])
    return now


def test_lag_is_the_time_since_the_mirror_had_everything(clock: list[float]) -> None:
    lag = nats_mirror.Lag()
    lag.update(10, 10)
    assert (lag.messages, lag.seconds(is_followed=True)) == (0, 0.0)
    clock[0] += 5
    # It was up to date five seconds ago; its state now is unknown.
    assert lag.seconds(is_followed=False) == 5
    lag.update(14, 11)
    clock[0] += 2
    assert (lag.messages, lag.seconds(is_followed=True)) == (3, 7)
    # Messages arrive all the time, but the mirror is never more than two seconds behind.
    lag.update(20, 15)
    assert (lag.messages, lag.seconds(is_followed=True)) == (5, 2)
    clock[0] += 1
    lag.update(20, 20)
    assert (lag.messages, lag.seconds(is_followed=True)) == (0, 0.0)


def test_lag_ends_if_stream_is_recreated(clock: list[float]) -> None:
    lag = nats_mirror.Lag()
    lag.update(1000, 900)
    clock[0] += 1
    lag.update(3, 3)
    assert (lag.messages, lag.seconds(is_followed=True)) == (0, 0.0)


# Loss


def test_loss_and_return_of_engine_are_reported_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    with engine(tmp_path, 1) as running, serving_from(running) as server:
        [node] = running.nodes
        with connect(port=server.port, retry=False) as mq:
            mq.put("t", "x")
        assert server.status.page()["engine"]["node"] == node.name
        caplog.clear()
        node.kill()
        wait_until(lambda: metric(server, "engine_connected") == 0)
        wait_until(lambda: metric(server, "ready") == 0)
        assert readyz(server)["reasons"][0].startswith("no connection to the engine: ")
        assert server.status.page()["engine"]["node"] == ""
        behind = metric(server, "mirror_lag_seconds")
        wait_until(lambda: metric(server, "mirror_lag_seconds") > behind > 0)
        assert metric(server, "mirror_consumers_total") == 1
        node.start()
        wait_until(lambda: metric(server, "mirror_consumers_total") == 2)
        wait_until(lambda: metric(server, "mirror_lag_seconds") == 0)
        assert (metric(server, "engine_connected"), metric(server, "ready")) == (1, 1)
        assert len(messages(caplog, logging.WARNING, "")) == 1
        assert len(messages(caplog, logging.WARNING, f"lost the connection to NATS server {node.name}: ")) == 1
        assert messages(caplog, logging.INFO, "NATS") == [f"connected to NATS server {node.name}"]
        assert not messages(caplog, logging.ERROR, "")


def test_switch_to_another_node_is_reported_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    with engine(tmp_path, 3) as running, serving_from(running) as server:
        node_of = lambda: server.status.page()["engine"]["node"]  # noqa: E731
        first = node_of()
        caplog.clear()
        next(node for node in running.nodes if node.name == first).kill()
        wait_until(lambda: node_of() not in ("", first))
        assert metric(server, "engine_connected") == 1
        assert len(messages(caplog, logging.WARNING, f"lost the connection to NATS server {first}: ")) == 1
        # It may move on to the leader.
        assert reached(lambda: messages(caplog, logging.INFO, "connected to")[-1].endswith(f" {node_of()}"))


def test_retried_put_to_engine_is_counted(tmp_path: Path) -> None:
    with engine(tmp_path, 1) as running, serving_from(running) as server, wire_to(server) as wire:
        [node] = running.nodes
        wire.call("PUT", "t", "x")
        node.signal(signal.SIGSTOP)
        assert node.process
        os.waitid(os.P_PID, node.process.pid, os.WSTOPPED)
        # Don't do this over the wire, because a server whose engine is silent closes connections.
        answer = store_of(server).append([(b"t", b"y", None)])
        assert isinstance(answer, Future)
        wait_until(lambda: metric(server, "engine_retries_total") > 0)
        node.signal(signal.SIGCONT)
        assert isinstance(answer.result(SOON)[0], int)


def test_lost_consumer_is_replaced_counted_and_logged_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    store = store_of(server)

    async def delete() -> None:
        await store.stream.delete_consumer(f"{store.mirror._name}-1")

    asyncio.run_coroutine_threadsafe(delete(), store._loop).result(SOON)
    wait_until(lambda: metric(server, "mirror_consumers_total") == 2)
    assert len(messages(caplog, logging.WARNING, "not following the stream: ")) == 1
    assert messages(caplog, logging.INFO, "following the stream again") == ["following the stream again"]
    assert metric(server, "ready") == 1


def test_waiting_for_engine_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    with engine(tmp_path, 3) as running:
        for node in running.nodes:
            node.kill()
        server = new_server(running)
        thread = threading.Thread(target=server.start)
        thread.start()
        try:
            # All three are tried repeatedly and fail with different errors.
            assert reached(lambda: bool(messages(caplog, logging.WARNING, "waiting for a NATS server: ")))
            assert reached(lambda: bool(messages(caplog, logging.INFO, "waiting for the store: ")))
            starting, reason = readyz(server)["reasons"]
            assert (starting, reason[:29]) == ("starting", "no connection to the engine: ")
            found = shown(server)
            assert (found["engine_connected"], found["mirror_ready"], metric(server, "ready")) == (0, 0, 0)
            behind = found["mirror_lag_seconds"]
            wait_until(lambda: metric(server, "mirror_lag_seconds") > behind + 1)
            assert len(messages(caplog, logging.WARNING, "")) == 1
            for node in running.nodes:
                node.start()
            thread.join(SOON)
            assert not thread.is_alive()
            # Once at first, and again for each reason to switch to another node: the leader, or no majority in time.
            assert reached(
                lambda: (
                    len(messages(caplog, logging.INFO, "connected to NATS server"))
                    == 1
                    + len(messages(caplog, logging.INFO, "moving to NATS server"))
                    + len(messages(caplog, logging.WARNING, "lost the connection to NATS server"))
                )
            )
            assert readyz(server)["reasons"] == []
        finally:
            server.stop()
            thread.join(SOON)


def test_reason_why_the_store_is_not_ready() -> None:
    store = NATSStore([("127.0.0.1", 1)])
    try:
        assert store.unready_reason == "no connection to the engine: not connected yet"
        store.connection.heard_at = boot_time()
        assert store.unready_reason == "opening the stream"
        store.mirror.lag.update(10, 3)
        assert store.unready_reason == "mirroring the stream: 7 messages to go"
        store.mirror.error = EngineError("no suitable peers for placement")
        assert store.unready_reason == "not following the stream: no suitable peers for placement"
        # It has all messages and is about to create a new consumer.
        store.mirror.ready = True
        assert store.unready_reason == ""
    finally:
        store.close()


def peer_ports() -> set[int]:
    """Return the ports that this process's TCP connections lead to."""
    ports = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor))) as connection:
            if connection.family == socket.AF_INET:
                ports.add(connection.getpeername()[1])
    return ports


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_holds_no_connections_to_engine(shared_node: Engine, server: Server, wire: Wire) -> None:
    first_id = wire.call("PUT", "t", "x")
    engine_ports = {port for _, port in shared_node.servers}
    assert engine_ports <= peer_ports()
    with forked(lambda: engine_ports & peer_ports()) as left:
        assert left == "set()"
    assert wire.call("PUT", "t", "x") == first_id + 1


def healthz(server: Server) -> list[str]:
    """Return the threads that /healthz names."""
    stuck: list[str] = json.loads(Answer(server.http_port, "/healthz").text)["stuck_threads"]
    return stuck


def test_healthz_fails_if_the_thread_of_the_store_is_stuck(shared_node: Engine, stream: str) -> None:
    limits = {"max_stored_bytes": 10_000_000, "health_timeout_seconds": UNIT}
    with serving_from(shared_node, store_stream=stream, **limits) as server:
        wait_until(lambda: healthz(server) == [])
        release = threading.Event()
        store_of(server)._loop.call_soon_threadsafe(release.wait, SOON)
        wait_until(lambda: "dsmq-nats" in healthz(server))
        release.set()
        wait_until(lambda: healthz(server) == [])


def test_healthz_fails_if_the_thread_of_the_store_has_died() -> None:
    store = SQLiteStore(600_000)
    store.thread = threading.Thread(target=bool, name="dsmq-dead")
    with serving(store, http_port=0) as server:
        assert healthz(server) == []
        store.thread.start()
        store.thread.join()
        assert healthz(server) == ["dsmq-dead"]


# INFO and the page


def test_info_describes_the_engine(server: Server, wire: Wire, stream: str) -> None:
    info = wire.call("INFO", "engine")
    assert isinstance(info, bytes)
    lines = dict(line.split(":", 1) for line in info.decode().splitlines()[1:])
    assert lines["store_engine"] == f"NATS stream {stream}"
    assert lines["engine_node"] == "n0"
    assert (lines["engine_connected"], lines["mirror_ready"], lines["mirror_lag_messages"]) == ("1", "1", "0")
    assert b"store_engine" in wire.call("INFO")  # type: ignore[operator]


def test_status_describes_the_engine(server: Server, stream: str) -> None:
    found = server.status.page()["engine"]
    assert (found["name"], found["node"], found["lag_messages"]) == (f"NATS stream {stream}", "n0", 0)
    # It is JSON.
    assert json.loads(json.dumps(found)) == found
