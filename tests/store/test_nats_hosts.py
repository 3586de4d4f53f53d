"""A cluster on six hosts, whose cables are pulled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from nats.aio.client import Client

from conftest import SOON, Daemon, wait_until
from dsmq.store.nats_api import EngineError
from dsmq.store.nats_connection import Server
from engine import Engine, Node, configuration
from helpers import black_hole
from hosts import Host, hosts
from store.test_nats import Stores, stores
from traffic import Traffic

__all__ = ["stores"]

PORTS = (4222, 8222, 6222)


def new_node(folder: Path, host: Host, at: int, routes: list[tuple[str, int]]) -> Node:
    name = f"n{at}"
    file = folder / f"{name}.conf"
    storage = f'jetstream {{ store_dir: "{folder / name}", max_file: 2GB }}'
    file.write_text(f"{configuration(name, host.address, PORTS, routes)}{storage}\n")
    return Node(name, file, PORTS, host=host.address, prefix=host.prefix)


def start_server(host: Host, store: str) -> Daemon:
    settings = {"store": store, "host": "0.0.0.0", "port": 30008, "protected_mode": False}
    return Daemon(prefix=host.prefix, **settings)


@pytest.mark.slow
def test_clients_continue_when_cables_are_pulled(tmp_path: Path) -> None:
    with ExitStack() as stack:
        *machines, here = stack.enter_context(hosts(6))
        stack.enter_context(here.inside())
        routes = [(host.address, PORTS[2]) for host in machines[:3]]
        engine = Engine([new_node(tmp_path, host, at, routes) for at, host in enumerate(machines[:3])])
        stack.callback(engine.kill)
        for one in engine.nodes:
            one.start()
        wait_until(engine.is_ready)
        store = "nats://" + ",".join(f"{host.address}:{PORTS[0]}" for host in machines[:3])
        for host in machines[3:]:
            stack.callback(start_server(host, store).close)
        traffic = Traffic([host.address for host in machines[3:]])
        with traffic.running():
            traffic.await_progress()
            for host in machines[3:]:
                with host.cut_off():
                    traffic.await_progress()
            # Each client was connected to one of them.
            assert traffic.states.count("lost") >= 2
            leader = engine.leader()
            with machines[engine.nodes.index(leader)].cut_off():
                traffic.await_progress()
                others = Engine([one for one in engine.nodes if one is not leader])
                assert others.leader() is not leader
            wait_until(engine.is_ready)
            traffic.await_progress()


def test_node_that_does_not_answer_is_skipped(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stores()
    stream = store.stream
    tried: list[Server] = []
    new_client = stream._new_client

    async def connect(servers: Sequence[Server]) -> Client:
        tried.append(servers[0])
        return await new_client(servers)

    monkeypatch.setattr(stream, "_new_client", connect)

    def answers() -> bool:
        try:
            asyncio.run_coroutine_threadsafe(stream.last_id(), store._loop).result(SOON)
        except EngineError:
            return False
        return True

    with black_hole() as hole:
        stream._servers = [hole, *stores.servers]
        asyncio.run_coroutine_threadsafe(stream.leave_node(), store._loop).result(SOON)
        wait_until(answers)
    assert tried[0] == hole
