"""NATS servers for tests: one, or a cluster of three, on free ports of loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from chaos.proxy import Proxy
from dsmq.demo_cluster import find_nats_server, free_ports, streams
from dsmq.errors import StartupError
from helpers import HOST, SOON, reached, wait_until

# Another program may take a free port before it is used; in that case, all ports are chosen again.
PORTS_TRIED = 5


def binary() -> str:
    """Return the path of nats-server or skip the test."""
    try:
        return find_nats_server()
    except StartupError as error:
        pytest.skip(str(error))


class Node:
    """A server of a cluster, which can be stopped, killed, frozen, and started again."""

    def __init__(
        self,
        name: str,
        config: Path,
        ports: Sequence[int],
        *,
        host: str = HOST,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`ports`: for clients and for monitoring; `prefix`: a command that runs it."""
        self.name, self.config, self.host = name, config, host
        self.port, self.monitor_port = ports[:2]
        self.address = (host, self.port)
        self.log = config.with_name(f"{name}.log")
        self.program = binary()
        self._prefix, self._env = prefix, env or {}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*self._prefix, self.program, "-c", self.config, "--log", self.log],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | self._env,
        )

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Stop it as systemd does."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(SOON)
        self.process = None

    def ask(self, path: str) -> dict[str, Any]:
        """Return a reply of the monitoring endpoint; empty if it does not answer."""
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.monitor_port}/{path}", timeout=2) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (OSError, ValueError):
            return {}

    def streams(self) -> list[dict[str, Any]]:
        """Return its description of its streams; empty if it does not answer."""
        return streams(self.host, self.monitor_port, 2)


class Engine:
    """A cluster of NATS servers."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)

    @property
    def servers(self) -> list[tuple[str, int]]:
        return [node.address for node in self.nodes]

    def is_ready(self) -> bool:
        """Return whether all nodes have all messages."""
        if any(node.ask("healthz").get("status") != "ok" for node in self.nodes):
            return False
        if len(self.nodes) == 1:
            return True
        meta = self.nodes[0].ask("jsz?raft=1").get("meta_cluster", {})
        return bool(meta.get("leader") and meta.get("cluster_size") == len(self.nodes))

    def leader(self, stream: str = "dsmq") -> Node:
        """Return the leader of a stream."""
        found: list[Node] = []

        def has_leader() -> bool:
            names = [
                one.get("cluster", {}).get("leader")
                for node in self.nodes
                for one in node.streams()
                if one["name"] == stream
            ]
            found.extend(node for name in names for node in self.nodes if node.name == name)
            return bool(found)

        wait_until(has_leader)
        return found[0]

    def kill(self) -> None:
        for node in self.nodes:
            if node.process is not None:
                # A stopped process can't die of SIGTERM.
                node.signal(signal.SIGCONT)
            node.kill()


class LocalEngine(Engine):
    """One server, or a cluster, on free ports of loopback."""

    def __init__(
        self,
        folder: Path,
        count: int = 3,
        extra: str = "",
        *,
        jetstream: bool = True,
        proxy: Callable[[int], Proxy] | None = None,
        prefixes: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        """`proxy`, if given, makes a proxy for each node's connection to another one; `prefixes`: for commands."""
        super().__init__([])
        self._links: dict[tuple[int, int], Proxy] = {}
        for attempt in range(PORTS_TRIED):
            ports = free_ports(3 * count)
            routes = ports[2::3] if count > 1 else []
            if proxy is not None:
                # Nodes must not learn from others any address that bypasses the proxies.
                self._links = {(one, other): proxy(routes[other]) for one, other in permutations(range(count), 2)}
            place = folder / f"attempt{attempt}"
            place.mkdir(parents=True)
            self.nodes = []
            for at in range(count):
                storage = f'jetstream {{ store_dir: "{place / str(at)}", max_mem: 1GB, max_file: 1TB }}'
                config = f"{storage}\n{extra}" if jetstream else extra
                to = [link.port for (one, _), link in self._links.items() if one == at] or routes
                its_ports = ports[3 * at : 3 * at + 3]
                text = configuration(f"n{at}", HOST, its_ports, [(HOST, port) for port in to], direct=proxy is None)
                (file := place / f"n{at}.conf").write_text(f"{text}{config}\n")
                self.nodes.append(Node(f"n{at}", file, its_ports, prefix=(prefixes or {}).get(at, ())))
            for node in self.nodes:
                node.start()
            if reached(self.is_ready, SOON):
                return
            self.kill()
        raise RuntimeError(f"nats-server does not start: {self.nodes[0].log.read_text()[-2000:]}")

    def cut_off(self, node: Node, *, on: bool) -> None:
        """Cut a node off from all others or connect it again."""
        number = self.nodes.index(node)
        for pair, link in self._links.items():
            if number in pair:
                link.hole(on)


def configuration(
    name: str, host: str, ports: Sequence[int], routes: Sequence[tuple[str, int]], *, direct: bool = True
) -> str:
    """Return the configuration of a node; its ports are for clients, for monitoring, and for other nodes."""
    cluster = ""
    if routes:
        urls = ", ".join(f'"nats://{to}:{port}"' for to, port in routes)
        # Nodes advertise their addresses to each other. If there are proxies, advertise one that nobody listens on.
        advertise = "" if direct else f'advertise: "{host}:1", '
        cluster = (
            f"cluster {{ name: tests, listen: {host}:{ports[2]}, {advertise}routes: [{urls}], no_advertise: true }}\n"
        )
    return f"server_name: {name}\nlisten: {host}:{ports[0]}\nhttp: {host}:{ports[1]}\nmax_payload: 9MB\n{cluster}"


@contextmanager
def engine(folder: Path, count: int = 3, extra: str = "", **options: Any) -> Iterator[LocalEngine]:
    """A running LocalEngine, with these options."""
    running = LocalEngine(folder, count, extra, **options)
    try:
        yield running
    finally:
        running.kill()
