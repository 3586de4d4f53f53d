"""Two servers in front of a NATS cluster of three nodes."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import nats

from chaos.history import Held, History, Server
from chaos.proxy import Proxy
from chaos.servers import free_port, hello
from engine import Node, engine
from helpers import HOST, Daemon, Wire, wait_until

STREAM = "dsmq"
NODES, SERVERS = 3, 2
READ_COUNT = 1_000
# How long a cluster may take to elect leaders and catch up, in seconds.
SOON = 60.0


class SharedServer:
    """One of several servers, which keeps its port when restarted."""

    def __init__(self, store: str, words: Sequence[str], settings: dict[str, object]) -> None:
        self.port = free_port()
        self._options: dict[str, Any] = {"command": words} if words else {}
        self._settings = {"store": store, "port": self.port, **settings}
        self.logs: list[str] = []
        self.start()

    @property
    def is_running(self) -> bool:
        return self.daemon.process.poll() is None

    def start(self) -> None:
        self.daemon = Daemon(**self._options, **self._settings)

    def kill(self) -> None:
        self.daemon.signal(signal.SIGKILL)
        self.daemon.process.wait()
        self.stop()

    def stop(self) -> None:
        if self.is_running:
            self.daemon.signal(signal.SIGCONT)
        self.daemon.stop()
        self.logs.append(self.daemon.log())


class Cluster:
    """Servers that share a store. For the checker, they are one server that lives as long as the stream."""

    def __init__(
        self,
        history: History,
        folder: Path,
        proxy: Callable[[int], Proxy] | None = None,
        words: Sequence[str] = (),
        *,
        partitions: bool = False,
        **settings: object,
    ) -> None:
        """`proxy`, if given, makes the proxies between each server and each node; for `partitions`, between nodes."""
        self.history = history
        self._folder, self._new_proxy, self._words, self._settings = folder, proxy, words, settings
        self._stack = ExitStack()
        self._between_nodes = proxy if partitions else None
        self.proxies: list[list[Proxy]] = []
        """By server."""
        self.servers: list[SharedServer] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.engine = stack.enter_context(engine(self._folder / "nodes", NODES, proxy=self._between_nodes))
            for _ in range(SERVERS):
                self.servers.append(server := SharedServer(self._store(), self._words, self._settings))
                stack.callback(server.stop)
            self._stack = stack.pop_all()
        self._begin(time.monotonic())
        return self

    def __exit__(self, *_: object) -> None:
        self.history.add(self._life)
        self._stack.close()

    def _store(self) -> str:
        ports = [node.port for node in self.engine.nodes]
        if self._new_proxy is not None:
            proxies = [self._new_proxy(port) for port in ports]
            self.proxies.append(proxies)
            ports = [proxy.port for proxy in proxies]
        return "nats://" + ",".join(f"{HOST}:{port}" for port in ports)

    def _begin(self, began: float) -> None:
        facts = hello(self.ports[0])
        self._life = Server(facts["epoch"], facts["run"], facts["last_id"], began)

    @property
    def server(self) -> Server:
        """What the checker knows about the servers."""
        return self._life

    @property
    def ports(self) -> list[int]:
        return [server.port for server in self.servers]

    @property
    def followers(self) -> list[Node]:
        leader = self.engine.leader()
        return [node for node in self.engine.nodes if node is not leader]

    def await_engine(self) -> None:
        """Wait until all nodes are up to date, so that any of them may fail next."""
        wait_until(lambda: self.engine.is_ready() and self._is_current(), SOON)

    def _is_current(self) -> bool:
        streams = self.engine.leader().streams()
        replicas = [replica for stream in streams for replica in stream.get("cluster", {}).get("replicas", [])]
        return len(replicas) == NODES - 1 and all(replica.get("current") for replica in replicas)

    def await_servers(self) -> None:
        """Wait until all servers serve clients."""
        wait_until(lambda: all(self._serves(port) for port in self.ports), SOON)

    def await_server(self, number: int) -> None:
        wait_until(lambda: self._serves(self.ports[number]), SOON)

    def _serves(self, port: int) -> bool:
        try:
            hello(port)
        except (OSError, EOFError):
            return False
        return True

    def delete_stream(self) -> None:
        """Delete the stream; the servers create a new one."""
        began = time.monotonic()
        asyncio.run(self._delete_stream())
        self.history.add(replace(self._life, ended=time.monotonic(), kept_until=-math.inf))
        known = self._life.epoch
        wait_until(lambda: all(self._epoch(port) not in {known, ""} for port in self.ports), SOON)
        self._begin(began)

    def _epoch(self, port: int) -> str:
        try:
            return str(hello(port)["epoch"])
        except (OSError, EOFError):
            return ""

    async def _delete_stream(self) -> None:
        client = await nats.connect([f"nats://{host}:{port}" for host, port in self.engine.servers])
        try:
            await client.jetstream().delete_stream(STREAM)
        finally:
            await client.close()

    def cut_off(self, number: int, *, on: bool) -> None:
        """Cut a server off from all nodes or reconnect it."""
        for proxy in self.proxies[number]:
            if on:
                proxy.hole(True)
            else:
                proxy.hole(False)
                proxy.reset_all()

    @contextmanager
    def partition(self, node: Node, server: int | None = None) -> Iterator[None]:
        """Cut a node off from the others; if a server is given, only that one stays connected to the node."""
        at = self.engine.nodes.index(node)
        links = [
            link
            for number, proxies in enumerate(self.proxies)
            for to, link in enumerate(proxies)
            if server is not None and (number == server) != (to == at)
        ]
        for link in links:
            link.refuse(True)
            link.reset_all()
        self.await_servers()
        self.engine.cut_off(node, on=True)
        try:
            yield
        finally:
            self.engine.cut_off(node, on=False)
            for link in links:
                link.refuse(False)

    def audit(self, topics: Sequence[str] = ("t0", "t1")) -> None:
        """Record the messages that each server has."""
        self.await_servers()
        for number, server in enumerate(self.servers):
            wire = Wire((HOST, server.port))
            for topic in topics:
                began, messages = time.monotonic(), tuple(_messages(wire, topic))
                self.history.add(Held(f"server {number}", topic, began, time.monotonic(), messages))
            wire.close()


def _messages(wire: Wire, topic: str) -> Iterator[tuple[int, int, str]]:
    after = 0
    while True:
        reply = wire.call("READ", topic, after, "COUNT", READ_COUNT)
        if not isinstance(reply, list):
            raise RuntimeError(f"{topic} can't be read: {reply!r}")
        if not reply:
            return
        values: Iterator[Any] = iter(reply)
        for message_id, number, _, body, _ in zip(*[values] * 5, strict=True):
            after = message_id
            yield message_id, number, body.decode()


@contextmanager
def frozen(node: Node) -> Iterator[None]:
    node.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.signal(signal.SIGCONT)
