"""Listening on the network, which requires authentication."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from pathlib import Path

import pytest

from conftest import Wire, daemon, run_dsmq, serving, wait_until, wire_to
from dsmq import settings as config
from dsmq.broker import listener as listening
from dsmq.errors import ConfigError
from dsmq.ops.systemd import Systemd
from dsmq.server import Server, serve
from dsmq.wire.addresses import parse_endpoint
from hosts import hosts
from security import ADMIN, Files

PROTECTED = "requires authentication: set auth_token (DSMQ_AUTH_TOKEN), auth_token_file or tls_client_ca_file, or "


@pytest.mark.slow
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_network_listener_without_auth_does_not_start(host: str) -> None:
    done = run_dsmq("serve", "--host", host, "--port", "0")
    said = done.stderr.decode()
    assert (done.returncode, said.count("\n")) == (2, 1)
    assert re.match(rf"dsmq: listening on {re.escape(str(parse_endpoint(host))[:-1])}\d+ {re.escape(PROTECTED)}", said)
    assert "protected_mode = false (DSMQ_PROTECTED_MODE)" in said


def test_failed_start_leaves_nothing_behind(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    with pytest.raises(ConfigError, match="requires authentication"):
        serve("0.0.0.0", 0, http_port=0, snapshot_file=str(snapshot))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["token", "token file", "certificates", "off"])
def test_auth_or_protected_mode_off_allows_network_listener(token_file: Path, files: Files, way: str) -> None:
    settings: dict[str, object] = {
        "token": {"auth_token": ADMIN},
        "token file": {"auth_token_file": str(token_file)},
        "certificates": {"tls_cert_file": files.server, "tls_client_ca_file": files.ca},
        "off": {"protected_mode": False},
    }[way]
    with serving(host="0.0.0.0", **settings) as server:
        assert server.port


def test_tls_without_client_certificates_does_not_authenticate(files: Files) -> None:
    settings = config.load(kind=config.EmbeddedSettings, host="0.0.0.0", port=0, tls_cert_file=files.server)
    with pytest.raises(ConfigError, match="requires authentication"), Server(settings):
        pass


@pytest.mark.parametrize("hosts", [("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")])
def test_single_exposed_address_prevents_start(hosts: tuple[str, str]) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((host, 0))) for host in hosts]
        server = Server(config.load(kind=config.EmbeddedSettings), systemd=Systemd(queue=sockets))
        with pytest.raises(ConfigError, match=r"listening on 0\.0\.0\.0:\d+ requires"), server:
            pass


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        *[("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("::ffff:127.0.0.1", False)],
        *[("0.0.0.0", True), ("::", True), ("\0dsmq-test-abstract", False), ("::ffff:0.0.0.0", True)],
    ],
)
def test_exposed_sockets_are_recognised(address: str, exposed: bool) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET if "." in address else socket.AF_UNIX
    with socket.socket(family) as sock:
        sock.bind(address if family == socket.AF_UNIX else (address, 0))
        assert listening.is_exposed(sock) == exposed


def test_other_socket_families_count_as_exposed() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        assert listening.is_exposed(sock)


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "\0dsmq-{}"])
def test_passed_sockets_are_checked_for_exposure(address: str) -> None:
    unix = address.startswith("\0")
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as sock, contextlib.ExitStack() as stack:
        sock.bind(address.format(os.getpid()) if unix else (address, 0))
        sock.listen()
        settings = config.load(kind=config.EmbeddedSettings)
        if address == "0.0.0.0":
            stack.enter_context(pytest.raises(ConfigError, match=r"listening on 0\.0\.0\.0:\d+ requires"))
        stack.enter_context(Server(settings, systemd=Systemd(queue=[sock])))
        wire = Wire(sock.getsockname().decode() if unix else sock.getsockname())
        assert wire.call("PUT", "t", "x") == 1
        wire.close()


def test_local_clients_are_admin_if_no_tokens_are_set(tmp_path: Path) -> None:
    for host in ("127.0.0.1", f"unix:{tmp_path}/socket"):
        with serving(host=host) as server:
            stops: list[str] = []
            server.context.request_stop = stops.append
            wire = Wire(f"{tmp_path}/socket" if host.startswith("unix:") else (host, server.port))
            assert wire.call("PUT", "t", "x") == 1
            wire.send(b"SHUTDOWN\r\n")
            assert wire.ended()
            assert len(stops) == 1
            wire.close()


@pytest.mark.parametrize("given", ["auth_token", "protected_mode", "tls_client_ca_file"])
def test_reload_that_would_open_exposed_server_changes_nothing(
    files: Files, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    settings: dict[str, object] = {"tls_cert_file": files.server}
    settings[given] = {"auth_token": ADMIN, "protected_mode": False, "tls_client_ca_file": files.ca}[given]
    load = lambda: config.load(kind=config.EmbeddedSettings, host="0.0.0.0", port=0, **settings)  # noqa: E731
    with Server(load(), load=load) as server:
        before = server.context.settings, server.context.access
        del settings[given]
        settings["max_topics"] = 7
        server.reload()
        assert "reload failed: listening on 0.0.0.0:" in caplog.text
        assert (server.context.settings, server.context.access) == before


@pytest.mark.parametrize(
    ("host", "settings", "warning"),
    [
        ("0.0.0.0", {"protected_mode": False}, "no authentication: any client that can reach 0.0.0.0:"),
        ("0.0.0.0", {"auth_token": ADMIN}, None),
        ("127.0.0.1", {}, None),
        ("127.0.0.1", {"protected_mode": False}, None),
    ],
)
def test_unprotected_server_logs_a_warning(
    caplog: pytest.LogCaptureFixture, host: str, settings: dict[str, object], warning: str | None
) -> None:
    with serving(host=host, **settings):
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert bool(warnings) == bool(warning)
    assert warning is None or warning in warnings[0]


@pytest.mark.embedded("a network from which the engine can't be reached")
@pytest.mark.parametrize("setting", ["auth_token_file", "protected_mode"])
def test_network_listener_serves_other_machines(token_file: Path, setting: str) -> None:
    value = {"auth_token_file": str(token_file), "protected_mode": "off"}[setting]
    with (
        hosts(2) as (here, there),
        daemon("--host", "0.0.0.0", config.option(setting), value, prefix=here.prefix) as process,
    ):
        token = ["--token-file", str(token_file)] if setting == "auth_token_file" else []
        address = ["--host", here.address, "--port", str(process.port), *token]
        # The link takes a moment to come up.
        wait_until(lambda: run_dsmq("ping", *address, prefix=there.prefix).returncode == 0)


def test_connections_per_address_are_limited() -> None:
    with serving(max_connections_per_address=2) as server, wire_to(server) as first, wire_to(server) as second:
        assert first.call("PING") == second.call("PING") == "PONG"
        with wire_to(server) as third:
            assert third.receive().code == "BUSY"  # type: ignore[union-attr]
            assert third.ended()
        other = Wire(("127.0.0.1", server.port), source="127.0.0.2")
        assert other.call("PING") == "PONG"
        other.close()
        first.close()
        wait_until(lambda: server.status.connections() == 1)
        with wire_to(server) as fourth:
            assert fourth.call("PING") == "PONG"
