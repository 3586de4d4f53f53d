"""Faults in two servers that share a store, and in its three NATS nodes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chaos.clients import Job
from chaos.cluster import Cluster, frozen
from chaos.proxy import Fault, Proxy
from chaos.stage import Stage

# Clients that wait long enough for the engine to answer that it has no leader.
PATIENT = Job("", 0, pause=0.005)
# After waiting this long for a reply, a client tries the next server.
HASTY = Job("", 0, pause=0.005, options={"timeout": 2.0})
ENGINE_SILENT = "StoreFailed: the engine does not answer"
MAX_AGE_SECONDS = 4
FORGETFUL = (sys.executable, str(Path(__file__).with_name("mutants.py")), "forgets_soon")


@contextmanager
def crowd(stage: Stage, cluster: Cluster, job: Job = PATIENT, *, redis: bool = True) -> Iterator[None]:
    with stage.crowd(0, ports=cluster.ports, job=job, redis=redis):
        yield
        cluster.await_engine()
        cluster.await_servers()
        stage.pause(1, 0.3)
    cluster.audit()


def shared_calm(stage: Stage) -> None:
    """No faults, for comparison."""
    cluster = stage.cluster()
    with crowd(stage, cluster):
        stage.pause(3, 1)


# Nodes


def leader_killed(stage: Stage) -> None:
    """The stream's leader is killed and started again."""
    cluster = stage.cluster()
    with crowd(stage, cluster):
        for _ in range(stage.size(3, 1)):
            stage.pause(2, 1)
            kill_node(stage, cluster, leader=True)


def follower_killed(stage: Stage) -> None:
    """A node that does not lead the stream is killed and started again."""
    cluster = stage.cluster()
    with crowd(stage, cluster):
        for _ in range(stage.size(3, 1)):
            stage.pause(1, 1)
            kill_node(stage, cluster, leader=False)


def kill_node(stage: Stage, cluster: Cluster, *, leader: bool) -> None:
    node = cluster.engine.leader() if leader else stage.random.choice(cluster.followers)
    stage.fault("node killed")
    node.kill()
    time.sleep(stage.random.uniform(0, stage.size(8, 3)))
    node.start()
    cluster.await_engine()


def nodes_frozen(stage: Stage) -> None:
    """First the leader, then a follower, is suspended, for less and for more time than an election takes."""
    cluster = stage.cluster()
    with crowd(stage, cluster):
        for seconds in stage.size((4, 16), (3,)):
            for leader in stage.size((True, False), (True,)):
                stage.pause(1, 1)
                node = cluster.engine.leader() if leader else stage.random.choice(cluster.followers)
                stage.fault("node frozen")
                with frozen(node):
                    time.sleep(seconds)
                cluster.await_engine()


def nodes_restarted(stage: Stage) -> None:
    """One node after another is stopped and started, as for an upgrade."""
    cluster = stage.cluster()
    with crowd(stage, cluster):
        for node in cluster.engine.nodes[: stage.size(3, 2)]:
            stage.pause(1, 0.5)
            stage.fault("node restarted")
            node.stop()
            node.start()
            cluster.await_engine()


def quorum_lost(stage: Stage) -> None:
    """Two of three nodes are killed for longer than a read may wait, and started again."""
    cluster = stage.cluster()
    stage.read_may_raise = lambda error: ENGINE_SILENT in error
    with crowd(stage, cluster, redis=False):
        stage.pause(1, 0.5)
        nodes = stage.random.sample(cluster.engine.nodes, 2)
        stage.faults["node killed"] += 2
        for node in nodes:
            node.kill()
        stage.pause(12, 5)
        for node in nodes:
            node.start()
        cluster.await_engine()


def all_nodes_killed(stage: Stage) -> None:
    """All nodes are killed at once and started again: what was acknowledged is on their disks."""
    cluster = stage.cluster()
    stage.read_may_raise = lambda error: ENGINE_SILENT in error
    with crowd(stage, cluster, redis=False):
        for _ in range(stage.size(2, 1)):
            stage.pause(1.5, 1)
            stage.faults["node killed"] += 3
            for node in cluster.engine.nodes:
                node.kill()
            stage.pause(3, 1)
            for node in cluster.engine.nodes:
                node.start()
            cluster.await_engine()


def partitioned(stage: Stage) -> None:
    """A node is cut off from the others: a follower; the leader; the leader, with a server that can reach only it."""
    cluster = stage.cluster(behind_proxies=True, partitions=True)
    stage.read_may_raise = lambda error: ENGINE_SILENT in error
    with crowd(stage, cluster, redis=False):
        for leader, server in stage.size(((False, None), (True, None), (True, 0), (True, 1)), ((True, 0),)):
            stage.pause(1, 0.5)
            node = cluster.engine.leader() if leader else stage.random.choice(cluster.followers)
            stage.fault("node cut off")
            with cluster.partition(node, server):
                # The others elect a leader after 4 to 9 s, and the old one believes for 10 to 20 s that it leads.
                stage.pause(18, 14)
            cluster.await_engine()


def stale_leader(stage: Stage) -> None:
    """Readers can reach only a server that can reach only the leader, which is cut off and lacks later messages.

    At first, no puts are in flight, because the leader would count puts that it can't store, and reads would wait for
    them.
    """
    cluster = stage.cluster(behind_proxies=True, partitions=True)
    stage.read_may_raise = lambda error: ENGINE_SILENT in error
    reading, writing = cluster.ports
    with stage.crowd(0, ports=[reading], job=PATIENT, writers=0, redis=False):
        stage.fault("node cut off")
        with cluster.partition(cluster.engine.leader(), 0):
            # Until the other nodes have a leader.
            cluster.await_server(1)
            with stage.crowd(0, ports=[writing], job=PATIENT, readers=0, redis=False):
                stage.pause(14, 14)
        cluster.await_engine()
        cluster.await_servers()
    cluster.audit()


def stream_deleted(stage: Stage) -> None:
    """The stream is deleted: all messages are lost, and clients continue with a new one."""
    cluster = stage.cluster()
    # A new stream does not know what the old one stored last.
    stage.may_raise = lambda put: put.may_be_stored
    with crowd(stage, cluster, redis=False):
        for _ in range(stage.size(3, 1)):
            stage.pause(1.5, 1)
            stage.fault("stream deleted")
            cluster.delete_stream()


# Servers


def server_killed(stage: Stage) -> None:
    """A server is killed and started again."""
    cluster = stage.cluster()
    with crowd(stage, cluster):
        kill_servers(stage, cluster, stage.size(3, 1))


def kill_servers(stage: Stage, cluster: Cluster, times: int) -> None:
    for _ in range(times):
        stage.pause(1.5, 1)
        server = stage.random.choice(cluster.servers)
        stage.fault("server killed")
        server.kill()
        stage.pause(2, 0.5)
        server.start()


def servers_restarted(stage: Stage) -> None:
    """Servers are stopped and started, one after another, and both at once."""
    cluster = stage.cluster()
    with crowd(stage, cluster):
        restart_servers(stage, cluster)


def restart_servers(stage: Stage, cluster: Cluster) -> None:
    for servers in (cluster.servers[:1], cluster.servers[1:], cluster.servers)[:: stage.size(1, 2)]:
        stage.pause(1.5, 0.7)
        for server in servers:
            stage.fault("server restarted")
            server.stop()
        for server in servers:
            server.start()


def server_frozen(stage: Stage) -> None:
    """A server is suspended for longer than clients wait for a reply."""
    cluster = stage.cluster()
    with crowd(stage, cluster, HASTY):
        freeze_servers(stage, cluster)


def freeze_servers(stage: Stage, cluster: Cluster) -> None:
    for server in cluster.servers[: stage.size(2, 1)]:
        stage.pause(1, 0.7)
        freeze(stage, server.daemon.signal, 5)


def freeze(stage: Stage, send: Callable[[int], None], seconds: float) -> None:
    stage.fault("server frozen")
    send(signal.SIGSTOP)
    time.sleep(seconds)
    send(signal.SIGCONT)


def server_cut_off(stage: Stage) -> None:
    """A server silently loses its connections to all nodes, while the other one works."""
    cluster = stage.cluster(behind_proxies=True)
    with crowd(stage, cluster):
        cut_off_servers(stage, cluster)


def cut_off_servers(stage: Stage, cluster: Cluster) -> None:
    for number in range(stage.size(2, 1)):
        stage.pause(1, 0.7)
        cluster.cut_off(number, on=True)
        stage.pause(8, 5)
        cluster.cut_off(number, on=False)


def engine_resets(stage: Stage) -> None:
    """The connections between servers and nodes are reset, at random bytes."""
    cluster = stage.cluster(behind_proxies=True)
    proxies = [proxy for proxies in cluster.proxies for proxy in proxies]
    with crowd(stage, cluster):
        for proxy in proxies:
            proxy.plan = lambda _: [
                Fault(
                    stage.random.choice(("reset", "close")),
                    stage.random.choice(("request", "reply")),
                    int(stage.random.expovariate(1 / 50_000)),
                )
            ]
            proxy.reset_all()
        stage.pause(8, 3)
        for proxy in proxies:
            proxy.disarm()


def shared_expiry(stage: Stage) -> None:
    """Messages expire after seconds, even while no server is running, and numbers continue across restarts."""
    stage.history.max_age = MAX_AGE_SECONDS
    cluster = stage.cluster(max_age_seconds=MAX_AGE_SECONDS)
    for servers in (cluster.servers[:1], cluster.servers):
        with stage.crowd(0, ports=cluster.ports, job=PATIENT, redis=False):
            stage.pause(2 * MAX_AGE_SECONDS, 1.5 * MAX_AGE_SECONDS)
            stage.fault("server restarted")
            servers[0].stop()
            servers[0].start()
            stage.pause(1, 0.3)
        cluster.audit()
        for server in servers:
            server.stop()
        # Until all topics are empty.
        time.sleep(MAX_AGE_SECONDS)
        for server in servers:
            server.start()
    with stage.crowd(0, ports=cluster.ports, job=PATIENT, redis=False):
        stage.pause(1, 0.5)
    cluster.audit()


# Clients


def moves(stage: Stage) -> None:
    """Clients' connections are reset at random bytes, and clients move to other servers and repeat puts there."""
    _move(stage, stage.cluster())


def forgetful_engine(stage: Stage) -> None:
    """The same with an engine that forgets puts immediately, so that the servers' mirrors have to recognise them."""
    _move(stage, stage.cluster(**({} if stage.mutant else {"words": FORGETFUL})), seconds=1.5)


def _move(stage: Stage, cluster: Cluster, seconds: float = 0.0) -> None:
    """`seconds`: how late some replies are and how long clients wait for them."""
    proxies = [stage.proxy(port) for port in cluster.ports]
    job = Job("", 0, pause=0.002, options={"timeout": seconds or 10.0})
    with ExitStack() as stack:
        stack.enter_context(stage.crowd(0, ports=[proxy.port for proxy in proxies], job=job))
        break_connections(stage, proxies, cluster.ports, (8, 3), seconds)
    cluster.audit()


def break_connections(
    stage: Stage, proxies: list[Proxy], ports: list[int], pause: tuple[float, float], seconds: float = 0.0
) -> None:
    """Break connections during this pause. Those that follow lead to random servers."""
    for proxy in proxies:
        _break_often(stage, proxy, ports, seconds)
        proxy.reset_all()
    stage.pause(*pause)
    for proxy in proxies:
        proxy.disarm()
    stage.pause(1, 0.3)


def _break_often(stage: Stage, proxy: Proxy, ports: list[int], seconds: float) -> None:
    def plan(_: int) -> list[Fault]:
        # For the next connection.
        proxy.target = stage.random.choice(ports)
        kind, after = ("hole", 20_000) if seconds else ("reset", 5_000)
        side = stage.random.choice(("request", "reply"))
        return [Fault(kind, side, 700 + int(stage.random.expovariate(1 / after)))]  # type: ignore[arg-type]

    proxy.plan = plan


# Everything at once


def shared_mixed(stage: Stage) -> None:
    """Random faults, determined by the seed; nothing may be lost."""
    cluster = stage.cluster(behind_proxies=True)
    faults: list[Callable[[], None]] = [
        lambda: kill_node(stage, cluster, leader=True),
        lambda: kill_node(stage, cluster, leader=False),
        lambda: _freeze_node(stage, cluster),
        lambda: _restart_server(stage, cluster, kill=True),
        lambda: _restart_server(stage, cluster, kill=False),
        lambda: freeze(stage, stage.random.choice(cluster.servers).daemon.signal, 3),
        lambda: _cut_off(stage, cluster),
    ]
    with crowd(stage, cluster, HASTY):
        for _ in range(stage.size(8, 2)):
            stage.random.choice(faults)()
            time.sleep(stage.random.uniform(0, 1))


def _freeze_node(stage: Stage, cluster: Cluster) -> None:
    stage.fault("node frozen")
    with frozen(stage.random.choice(cluster.engine.nodes)):
        time.sleep(stage.random.uniform(0, 6))
    cluster.await_engine()


def _restart_server(stage: Stage, cluster: Cluster, *, kill: bool) -> None:
    server = stage.random.choice(cluster.servers)
    stage.fault("server killed" if kill else "server restarted")
    if kill:
        server.kill()
    else:
        server.stop()
    server.start()


def _cut_off(stage: Stage, cluster: Cluster) -> None:
    number = stage.random.randrange(len(cluster.servers))
    cluster.cut_off(number, on=True)
    time.sleep(stage.random.uniform(0, 5))
    cluster.cut_off(number, on=False)


SHARED_SCENARIOS: dict[str, Callable[[Stage], None]] = {
    run.__name__: run
    for run in (
        *(
            shared_calm,
            leader_killed,
            follower_killed,
            nodes_frozen,
            nodes_restarted,
            quorum_lost,
            all_nodes_killed,
            partitioned,
            stale_leader,
        ),
        *(
            stream_deleted,
            shared_expiry,
            server_killed,
            servers_restarted,
            server_frozen,
            server_cut_off,
            engine_resets,
        ),
        *(moves, forgetful_engine, shared_mixed),
    )
}
