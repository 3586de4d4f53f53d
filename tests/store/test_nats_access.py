"""TLS and credentials between a server and its NATS servers, and the errors if they can't agree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from engine import Engine, engine
from helpers import HOST, SOON, Daemon, daemon
from security import Files

USER, PASSWORD = "dsmq", "a-password-for-the-tests"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Certificates and the files given in settings."""
    folder = tmp_path_factory.mktemp("files")
    files = Files(folder, trustme.CA())
    trustme.CA().cert_pem.write_to_path(str(folder / "other-ca.pem"))
    (folder / "password").write_text(f"{PASSWORD}\n")
    (folder / "wrong").write_text("wrong-password\n")
    (folder / "empty").write_text("")
    return files


@pytest.fixture(scope="module")
def node(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A server that requires TLS and a password."""
    extra = (
        f"tls {{ cert_file: {files.server}, key_file: {files.server} }}\n"
        f"authorization {{ user: {USER}, password: {PASSWORD} }}"
    )
    with engine(tmp_path_factory.mktemp("node"), 1, extra) as running:
        yield running


def settings(node: Engine, files: Files, **others: object) -> dict[str, object]:
    """Return the correct settings, with some replaced."""
    found: dict[str, object] = {"store": f"tls://localhost:{node.nodes[0].port}", "store_replicas": 1}
    found |= {"store_user": USER, "store_password_file": files.folder / "password", "store_ca_file": files.ca}
    return {name: value for name, value in (found | others).items() if value is not None}


def failure(**settings: object) -> tuple[int, str]:
    """Run a server that does not start; return its exit status and the last line that it prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("DSMQ_")}
    env |= {"DSMQ_PORT": "0", "DSMQ_HTTP_PORT": "off"}
    env |= {f"DSMQ_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "dsmq", "serve"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SOON, check=False)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("dsmq: ")]
    assert len(lines) == 1, done.stderr
    return done.returncode, lines[0].removeprefix("dsmq: ")


def refusal(node: Engine, reason: str, host: str = "localhost") -> tuple[int, str]:
    """Return the exit status and error line of a server that this node refuses."""
    return 1, f"the NATS servers refuse the connection: {host}:{node.nodes[0].port}: {reason}"


def assert_serves(server: Daemon) -> None:
    with server.client() as mq:
        mq.put("greetings", "hello world!")
        assert mq.get("greetings") == "hello world!"


def test_server_uses_tls_and_password(node: Engine, files: Files) -> None:
    with daemon(**settings(node, files)) as server:
        assert_serves(server)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"store_password_file": "wrong"}, "Authorization Violation (user, password or token)"),
        ({"store_password_file": "empty"}, "Authorization Violation (user, password or token)"),
        ({"store_user": None, "store_password_file": None}, "Authorization Violation (user, password or token)"),
        ({"store_ca_file": "other-ca.pem"}, "its certificate is not trusted: unable to get local issuer certificate"),
        ({"store_ca_file": None}, "its certificate is not trusted: unable to get local issuer certificate"),
    ],
    ids=["wrong password", "empty password", "no password", "another authority", "unknown authority"],
)
def test_refused_connection_is_one_line(node: Engine, files: Files, wrong: dict[str, str | None], message: str) -> None:
    changed = {
        name: files.folder / value if value and name.endswith("_file") else value for name, value in wrong.items()
    }
    assert failure(**settings(node, files, **changed)) == refusal(node, message)


def test_certificate_of_another_host_is_refused(files: Files, tmp_path: Path) -> None:
    other = files.issue(files.authority, "other-host", "another.example.org")
    with engine(tmp_path, 1, f"tls {{ cert_file: {other}, key_file: {other} }}") as node:
        status, line = failure(**settings(node, files, store_user=None, store_password_file=None))
    assert status == 1
    assert "its certificate is not trusted: Hostname mismatch" in line


def test_node_with_tls_refuses_server_without(node: Engine, files: Files) -> None:
    changed = {"store": f"nats://localhost:{node.nodes[0].port}", "store_ca_file": None}
    expected = refusal(node, "it requires TLS: use tls:// instead of nats://")
    assert failure(**settings(node, files, **changed)) == expected


def test_node_that_requires_client_certificates_is_refused(files: Files, tmp_path: Path) -> None:
    extra = f"tls {{ cert_file: {files.server}, key_file: {files.server}, ca_file: {files.ca}, verify: true }}"
    with engine(tmp_path, 1, extra) as node:
        failed = failure(**settings(node, files, store_user=None, store_password_file=None))
        assert failed == refusal(node, "it requires client certificates, which dsmq does not support")


@pytest.mark.parametrize("scheme", ["tls", "nats"])
def test_token_and_node_without_tls(files: Files, tmp_path: Path, scheme: str) -> None:
    token = tmp_path / "token"
    token.write_text("a-token\n")
    with engine(tmp_path / "node", 1, "authorization { token: a-token }") as node:
        store = {"store": f"{scheme}://{HOST}:{node.nodes[0].port}", "store_replicas": 1, "store_token_file": token}
        if scheme == "nats":
            with daemon(**store) as server:
                assert_serves(server)
        else:
            expected = refusal(node, "it has no TLS: use nats:// instead of tls://", HOST)
            assert failure(**store, store_ca_file=files.ca) == expected


def test_missing_file_is_named(node: Engine, files: Files) -> None:
    missing = files.folder / "missing"
    for name, message in (
        ("store_password_file", f"{missing}: No such file or directory"),
        ("store_ca_file", f"store_ca_file: {missing}: No such file or directory"),
    ):
        assert failure(**settings(node, files, **{name: missing})) == (2, message)


def test_server_refused_by_one_node_uses_another(node: Engine, files: Files, tmp_path: Path) -> None:
    with engine(tmp_path, 1, "authorization { token: another }") as other:
        ports = [other.nodes[0].port, node.nodes[0].port]
        store = "tls://" + ",".join(f"localhost:{port}" for port in ports)
        with daemon(**settings(node, files, store=store)) as server:
            assert_serves(server)


def test_replicas_without_cluster_are_refused(node: Engine, files: Files) -> None:
    expected = "the NATS server is not in a cluster, so store_replicas = 3 is too many"
    assert failure(**settings(node, files, store_replicas=3, store_stream="other")) == (1, expected)
