"""Reloads of tokens, certificates and access rules."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from conftest import SOON, Wire, daemon, loop_of, wait_until, wire_to
from dsmq import settings as config
from dsmq.broker.reads import Reads
from dsmq.client import connect
from dsmq.server import Server
from dsmq.wire.resp import encode_request
from security import ADMIN, READER, WRITER, WRONG, Files, wire_as


def test_reload_disconnects_clients_with_revoked_tokens(token_file: Path) -> None:
    with daemon("--auth-token-file", str(token_file)) as process:
        address = ("127.0.0.1", process.port)
        admin, writer, other = Wire(address), Wire(address), Wire(address)
        assert admin.call("AUTH", ADMIN) == writer.call("AUTH", WRITER) == "OK"
        writer.ask_for_notices()
        token_file.write_text(f"{ADMIN}\nsensors write new-token-0123456789\n")
        process.process.send_signal(signal.SIGHUP)
        assert writer.receive().code == "NOAUTH"  # type: ignore[union-attr]
        assert writer.ended()
        assert other.call("AUTH", "new-token-0123456789") == "OK"
        assert isinstance(admin.call("PUT", "t", "x"), int)
        # An invalid file changes nothing.
        token_file.write_text("sensors scribble new-token-0123456789\n")
        process.process.send_signal(signal.SIGHUP)
        line = process.wait_for_line("reload failed: .*")[0]
        assert "line 1" in line
        assert "new-token" not in line
        assert isinstance(other.call("PUT", "t", "x"), int)
        for wire in (admin, writer, other):
            wire.close()


def test_reload_logs_added_and_removed_tokens_and_certificates(
    token_file: Path, files: Files, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    settings = {"port": 0, "auth_token_file": str(token_file), "tls_cert_file": files.server}
    load = lambda: config.load(kind=config.EmbeddedSettings, **settings)  # noqa: E731

    def reloaded() -> tuple[str, dict[str, object]]:
        caplog.clear()
        server.reload()
        (found,) = [record for record in caplog.records if getattr(record, "event", "") == "reloaded"]
        return found.getMessage().partition("changed: ")[2], found.fields  # type: ignore[attr-defined]

    with Server(load(), load=load) as server:
        nothing = {"changed": [], "tokens_new": [], "tokens_gone": [], "certificates": False}
        assert reloaded() == ("nothing", nothing)
        token_file.write_text(f"another-token-0123456789\nsensors write new-token-0123456789\nscreen read {READER}\n")
        message, fields = reloaded()
        assert message == "tokens_new (default, sensors), tokens_gone (default, sensors)"
        assert fields == {**nothing, "tokens_new": ["default", "sensors"], "tokens_gone": ["default", "sensors"]}
        files.issue(authority, "server", "127.0.0.1")
        os.utime(files.server, (1, 1))
        settings["max_age_seconds"] = 60
        assert reloaded() == (
            "max_age_seconds, certificates",
            {**nothing, "changed": ["max_age_seconds"], "certificates": True},
        )
        assert not any(token in caplog.text for token in (ADMIN, WRITER, READER, "new-token"))


def test_reload_closes_all_connections_no_longer_admitted(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, object] = {}

    def load() -> config.EmbeddedSettings:
        if "defect" in settings:
            raise ZeroDivisionError
        return config.load(kind=config.EmbeddedSettings, port=0, **settings)

    with Server(load(), load=load) as server, wire_to(server) as wire:
        wire.send(b"GETWAIT t 60000\r\n")
        wait_until(lambda: server.status.waiting() == 1)
        settings["tls_cert_file"] = files.server
        server.reload()
        assert wire.receive() is None
        assert wire.ended()
        connect(port=server.port, ca_file=files.ca).close()
        # An unexpected exception changes nothing, either.
        settings["defect"] = True
        server.reload()
        assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("has_tls", [False, True])
def test_connection_accepted_during_reload_is_closed_by_the_new_rules(
    files: Files, monkeypatch: pytest.MonkeyPatch, has_tls: bool
) -> None:
    settings: dict[str, object] = {"io_threads": 2, "auth_timeout_seconds": 600}
    settings |= {"tls_cert_file": files.server} if has_tls else {}
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, **settings)  # noqa: E731
    accepted, go = threading.Event(), threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        accepted.set()
        go.wait()
        yield 2

    with Server(load(), load=load) as server:
        monkeypatch.setattr(server._admission, "_numbers", numbers())
        with wire_to(server), wire_to(server) as second:
            try:
                assert accepted.wait(SOON)
                settings |= {"tls_cert_file": files.server, "tls_client_ca_file": files.ca}
                # The first event loop has accepted the connection, and the second does not know about it yet.
                server.reload()
            finally:
                go.set()
            assert second.ended()
            wait_until(lambda: server.status.connections() == 0)
            assert server.status.counters().failures == 0


def test_reload_during_tls_handshake_does_not_spin(files: Files) -> None:
    settings: dict[str, object] = {"tls_cert_file": files.server}
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, **settings)  # noqa: E731
    with Server(load(), load=load) as server, wire_to(server) as silent:
        wait_until(lambda: server.status.connections() == 1)
        settings["auth_token"] = ADMIN
        server.reload()
        assert silent.ended()
        assert server.status.connections() == 0


def test_failing_connection_does_not_affect_others_on_reload(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, auth_token_file=str(token_file))  # noqa: E731
    with Server(load(), load=load) as server, wire_as(server, READER) as first, wire_as(server, READER) as second:
        first.ask_for_notices()
        second.ask_for_notices()
        broken, stop = next(iter(loop_of(server).connections)).reads, Reads.stop_waiting
        monkeypatch.setattr(Reads, "stop_waiting", lambda one, **how: 1 / 0 if one is broken else stop(one, **how))
        token_file.write_text(ADMIN)
        server.reload()
        assert second.receive().code == "NOAUTH"  # type: ignore[union-attr]
        assert first.receive().code == "INTERNAL"  # type: ignore[union-attr]


def test_revoked_token_ends_waiting_read_with_error(token_file: Path) -> None:
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, auth_token_file=str(token_file))  # noqa: E731
    with Server(load(), load=load) as server, wire_as(server, READER) as reader:
        reader.ask_for_notices()
        reader.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.status.waiting() == 1)
        token_file.write_text(ADMIN)
        server.reload()
        assert reader.receive() is None
        assert reader.receive().code == "NOAUTH"  # type: ignore[union-attr]
        assert reader.ended()


def test_reload_applies_settings_and_logs_those_that_require_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "dsmq.toml"
    file.write_text("max_age_seconds = 60\nport = 0")
    with daemon("--config", str(file)) as process:
        wire = Wire(("127.0.0.1", process.port))
        file.write_text("max_age_seconds = 30\nlog_level = 'debug'\nio_threads = 2\nport = 0")
        process.process.send_signal(signal.SIGHUP)
        changed = process.wait_for_line("configuration reloaded; changed: (.*)")[1]
        assert set(changed.split(", ")) == {"max_age_seconds", "log_level"}
        assert process.wait_for_line("restart required to apply: (.*)")[1] == "io_threads"
        hello = wire.call("HELLO", 2)
        assert isinstance(hello, list)
        assert dict(zip(hello[::2], hello[1::2], strict=True))[b"max_age_ms"] == 30_000
        wire.close()


def test_reload_with_first_token_closes_unauthenticated_connections() -> None:
    settings: dict[str, object] = {}
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, **settings)  # noqa: E731
    with Server(load(), load=load) as server, wire_to(server) as wire:
        wire.ask_for_notices()
        assert wire.call("PUT", "t", "x") == 1
        settings["auth_token"] = ADMIN
        server.reload()
        assert wire.receive().code == "NOAUTH"  # type: ignore[union-attr]
        assert wire.ended()


@pytest.mark.usefixtures("replies_after_wrong_token")
def test_reload_may_remove_all_tokens_on_loopback() -> None:
    settings: dict[str, object] = {"auth_token": ADMIN}
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, **settings)  # noqa: E731
    with Server(load(), load=load) as server, wire_as(server, ADMIN) as admin, wire_to(server) as guesser:
        admin.ask_for_notices()
        assert guesser.error("AUTH", WRONG) == "WRONGPASS"
        settings.clear()
        server.reload()
        assert admin.receive().code == "NOAUTH"  # type: ignore[union-attr]
        with wire_to(server) as wire:
            assert wire.call("PUT", "t", "x") == 1
        assert guesser.error("PUT", "t", "x") == "NOAUTH"


def test_reload_renews_certificate(files: Files, authority: trustme.CA) -> None:
    with daemon("--tls-cert-file", files.server) as process:
        where = {"port": process.port, "ca_file": files.ca, "retry": False}
        with connect(**where) as before:  # type: ignore[arg-type]
            new = trustme.CA()
            new.cert_pem.write_to_path(files.ca)
            files.issue(new, "server", "127.0.0.1")
            with pytest.raises(ConnectionError):
                connect(**where)  # type: ignore[arg-type]
            process.process.send_signal(signal.SIGHUP)
            process.wait_for_line("configuration reloaded")
            with connect(**where) as after:  # type: ignore[arg-type]
                after.put("t", "x")
            before.ping()
            Path(files.server).write_text("no certificate")
            process.process.send_signal(signal.SIGHUP)
            process.wait_for_line("reload failed: .*: no private key in PEM format found")
            connect(**where).close()  # type: ignore[arg-type]
