"""Faults while workers share jobs over two servers, and in the NATS nodes that keep them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from chaos.cluster import Cluster, frozen
from chaos.cluster_scenarios import (
    break_connections,
    cut_off_servers,
    freeze_servers,
    kill_node,
    kill_servers,
    restart_servers,
)
from chaos.job_scenarios import GROUPS, MAX_ATTEMPTS, working
from chaos.stage import Stage

# How long a worker waits for a reply: longer than an election takes.
PATIENCE_SECONDS = 20.0
# After waiting this long for a reply, it tries the next server.
HASTE_SECONDS = 2.0


@contextmanager
def sharing(
    stage: Stage,
    cluster: Cluster,
    *ports: int,
    timeout: float = PATIENCE_SECONDS,
    groups: Sequence[tuple[str, str]] = GROUPS,
    are_faulty: bool = True,
    **about: object,
) -> Iterator[None]:
    # A server may give a job for a request that its client has meanwhile sent to the other server.
    stage.history.has_holes = are_faulty
    with working(stage, *(ports or cluster.ports), groups=groups, timeout=timeout, **about):
        yield
        cluster.await_engine()
        cluster.await_servers()
        stage.pause(1, 0.3)


def shared_workers(stage: Stage) -> None:
    """The only faults are workers that return jobs, forget them, or take longer than their lease."""
    cluster = stage.cluster()
    with sharing(stage, cluster, are_faulty=False):
        stage.pause(3, 1)


def workers_and_servers_killed(stage: Stage) -> None:
    """A server is killed and started again."""
    cluster = stage.cluster()
    # A request that was sent to the dying server may be in flight.
    with sharing(stage, cluster):
        kill_servers(stage, cluster, stage.size(3, 2))


def workers_and_servers_restarted(stage: Stage) -> None:
    """Servers are stopped and started, one after another, and both at once."""
    cluster = stage.cluster()
    with sharing(stage, cluster):
        restart_servers(stage, cluster)


def workers_and_leaders_killed(stage: Stage) -> None:
    """The stream's leader is killed and started again."""
    cluster = stage.cluster()
    with sharing(stage, cluster):
        for _ in range(stage.size(2, 1)):
            stage.pause(1.5, 0.7)
            kill_node(stage, cluster, leader=True)


def workers_and_nodes_frozen(stage: Stage) -> None:
    """The leader is suspended, for less and for more time than an election takes."""
    cluster = stage.cluster()
    with sharing(stage, cluster):
        for seconds in stage.size((4, 12), (3,)):
            stage.pause(1, 0.7)
            stage.fault("node frozen")
            with frozen(cluster.engine.leader()):
                time.sleep(seconds)
            cluster.await_engine()


def workers_and_servers_frozen(stage: Stage) -> None:
    """A server is suspended for longer than leases last and than workers wait for a reply."""
    cluster = stage.cluster()
    with sharing(stage, cluster, timeout=HASTE_SECONDS):
        freeze_servers(stage, cluster)


def workers_and_servers_cut_off(stage: Stage) -> None:
    """A server silently loses its connections to all nodes, while the other one works."""
    cluster = stage.cluster(behind_proxies=True)
    with sharing(stage, cluster):
        cut_off_servers(stage, cluster)


def workers_and_partitions(stage: Stage) -> None:
    """The leader is cut off from the other nodes, with a server that can reach only it."""
    cluster = stage.cluster(behind_proxies=True, partitions=True)
    with sharing(stage, cluster, may_be_refused=True):
        for server in stage.size((None, 0, 1), (0,)):
            stage.pause(1, 0.5)
            stage.fault("node cut off")
            with cluster.partition(cluster.engine.leader(), server):
                # The others elect a leader after 4 to 9 s, and the old one believes for 10 to 20 s that it leads.
                stage.pause(18, 14)
            cluster.await_engine()


def workers_move(stage: Stage) -> None:
    """Workers' connections are reset at random bytes, and they repeat their requests at other servers."""
    cluster = stage.cluster()
    proxies = [stage.proxy(port) for port in cluster.ports]
    with sharing(stage, cluster, *(proxy.port for proxy in proxies)):
        break_connections(stage, proxies, cluster.ports, (6, 2))


def shared_workers_reset(stage: Stage) -> None:
    """Workers' connections are reset at random bytes, and they repeat their requests at the same server."""
    cluster = stage.cluster()
    proxy = stage.proxy(cluster.ports[0])
    with sharing(stage, cluster, proxy.port, are_faulty=False):
        break_connections(stage, [proxy], cluster.ports[:1], (6, 2))


def shared_workers_that_fail(stage: Stage) -> None:
    """Jobs that are given too often go to the topic for failed jobs, while servers are killed."""
    cluster = stage.cluster(max_attempts=MAX_ATTEMPTS)
    stage.history.max_attempts = MAX_ATTEMPTS
    ratios = {"return": 0.5, "late": 0.02, "forget": 0.01}
    with sharing(stage, cluster, groups=GROUPS[2:], ratios=ratios):
        for _ in range(stage.size(2, 1)):
            stage.pause(1.5, 0.7)
            server = stage.random.choice(cluster.servers)
            stage.fault("server killed")
            server.kill()
            server.start()


SHARED_JOB_SCENARIOS: dict[str, Callable[[Stage], None]] = {
    run.__name__: run
    for run in (
        *(shared_workers, workers_and_servers_killed, workers_and_servers_restarted, workers_and_leaders_killed),
        *(workers_and_nodes_frozen, workers_and_servers_frozen, workers_and_servers_cut_off),
        *(workers_and_partitions, workers_move, shared_workers_reset, shared_workers_that_fail),
    )
}
