"""Who gets in, and what for: tokens, roles, TLS, protected mode; on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme

from conftest import CONNECTS, SOON, UNIT, Connect, Wire, blocked, daemon, run_dsmq, serving, tool, wait_until, wire_to
from dsmq import aio
from dsmq import settings as config
from dsmq.broker import auth, connection, token_files
from dsmq.broker import listener as listening
from dsmq.broker.auth import Authenticator, Role
from dsmq.broker.commands import COMMANDS
from dsmq.broker.connection import Connection
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import AuthRequired, BadRequest, ClientClosed, ConfigError, NotPermitted, WrongToken
from dsmq.ops.systemd import Systemd
from dsmq.server import Server, serve
from dsmq.wire import tls
from dsmq.wire.addresses import parse_endpoint
from dsmq.wire.resp import encode_request

ADMIN, WRITER, READER = "admin-token-0123456789", "write-token-0123456789", "read-token-0123456789"
TOKENS = f"# who may do what\n\n{ADMIN}\nsensors write {WRITER}\nscreen\tread\t{READER}\n"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(TOKENS)
    return file


@pytest.fixture
def server(token_file: Path) -> Iterator[Server]:
    """One with tokens."""
    with serving(auth_token_file=str(token_file), http_port=0) as server:
        yield server


@contextlib.contextmanager
def wire_as(server: Server, token: str, source: str | None = None) -> Iterator[Wire]:
    wire = Wire(("127.0.0.1", server.port), source)
    try:
        assert wire.call("AUTH", token) == "OK"
        yield wire
    finally:
        wire.close()


# What a stranger may do


@pytest.mark.slow
@pytest.mark.parametrize("name", [name.decode() for name in COMMANDS])
def test_unauthenticated_client_may_only_hello_auth_ping_and_quit(server: Server, wire: Wire, name: str) -> None:
    arguments = ["x"] * COMMANDS[name.encode()].min_args
    if name in ("HELLO", "PING", "QUIT"):
        assert wire.call(name) is not None
    elif name == "AUTH":
        assert wire.error(name, *arguments) == "WRONGPASS"
    else:
        assert wire.error(name, *arguments) == "NOAUTH"
    assert server.status.totals().stored == 0


def test_unknown_command_before_auth_replies_noauth(wire: Wire) -> None:
    assert wire.error("FROBNICATE") == "UNKNOWN"


@pytest.mark.parametrize(
    "words", [["AUTH", ADMIN], ["AUTH", "default", ADMIN], ["HELLO", "2", "AUTH", "default", ADMIN]]
)
def test_valid_token_authenticates(wire: Wire, words: list[str]) -> None:
    assert wire.call(*words)
    assert wire.call("PUT", "t", "x") == 1


@pytest.mark.parametrize("user", ["default", "sensors"])
def test_named_token_accepts_its_name_or_none(wire: Wire, user: str) -> None:
    assert wire.call("AUTH", user, WRITER) == "OK"
    assert wire.call("PUT", "t", "x") == 1
    assert wire.error("AUTH", "screen", WRITER) == "WRONGPASS"


@pytest.mark.parametrize("token", ["", ADMIN[:-1], ADMIN + "x", ADMIN.upper(), "sensors", "write"])
def test_invalid_token_is_refused(wire: Wire, token: str) -> None:
    assert wire.error("AUTH", token) == "WRONGPASS"
    assert wire.ended()


def test_hello_reports_role_of_token(wire: Wire) -> None:
    hello = wire.call("HELLO", 2, "AUTH", "default", WRITER)
    assert isinstance(hello, list)
    assert dict(zip(hello[::2], hello[1::2], strict=True))[b"access"] == b"write"


def test_requests_in_same_packet_as_auth_run_authenticated(wire: Wire) -> None:
    long = b"x" * 100_000
    wire.send(encode_request(b"AUTH", WRITER.encode()) + encode_request(b"PUT", b"t", long) + b"PING\r\n")
    assert [wire.receive() for _ in range(3)] == ["OK", 1, "PONG"]


def test_auth_without_configured_tokens_is_an_error(tmp_path: Path) -> None:
    with serving() as server, wire_to(server) as wire:
        assert wire.error("AUTH", "x") == "BADREQUEST"
        assert wire.error("HELLO", 2, "AUTH", "default", "x") == "BADREQUEST"
        assert wire.call("PUT", "t", "x") == 1


# Roles


@pytest.mark.parametrize(
    ("token", "allowed"),
    [
        (READER, {"READ", "GET", "GETLATEST", "GETWAIT", "TOPICS", "STATS", "ECHO", "INFO"}),
        (WRITER, {"READ", "GET", "GETLATEST", "GETWAIT", "TOPICS", "STATS", "ECHO", "INFO", "PUT"}),
        (ADMIN, {"READ", "GET", "GETLATEST", "GETWAIT", "TOPICS", "STATS", "ECHO", "INFO", "PUT", "CONFIG"}),
    ],
    ids=["read", "write", "admin"],
)
def test_role_permits_only_its_commands(server: Server, token: str, allowed: set[str]) -> None:
    requests = {
        "PUT": ("t", "x"), "READ": ("t", 0), "GET": ("t",), "GETLATEST": ("t",), "GETWAIT": ("t", 0), "TOPICS": (),
        "STATS": ("t",), "ECHO": ("x",), "INFO": (), "CONFIG": ("GET", "port"),
    }  # fmt: skip
    with wire_as(server, token) as wire:
        for name, arguments in requests.items():
            if name in allowed:
                wire.call(name, *arguments)
                assert server.status.counters().errors["NOPERM"] == 0
        for name in requests.keys() - allowed:
            assert wire.error(name, *requests[name]) == "NOPERM"


def test_only_admin_may_shut_down(server: Server) -> None:
    for token in (READER, WRITER):
        with wire_as(server, token) as wire:
            assert wire.error("SHUTDOWN") == "NOPERM"
    assert not server.status.stopping
    with wire_as(server, ADMIN) as wire:
        wire.send(encode_request(b"SHUTDOWN"))
        assert wire.ended()
    assert server.status.stopping


def test_only_admin_sees_other_clients(server: Server) -> None:
    with wire_as(server, WRITER) as wire, wire_as(server, ADMIN) as admin:
        for section in ("clients", "stats", "store"):
            assert section.capitalize().encode() not in wire.call("INFO")  # type: ignore[operator]
            assert wire.call("INFO", section) == b""
            assert section.capitalize().encode() in admin.call("INFO")  # type: ignore[operator]
        assert b"# Server" in wire.call("INFO")  # type: ignore[operator]


# Guessing


WRONG = "wrong-token-0123456789"


@pytest.mark.parametrize("words", [["AUTH", WRONG], ["HELLO", "3", "AUTH", "default", WRONG, "SETNAME", "me"]])
def test_wrong_token_closes_connection_and_drops_pipelined_requests(server: Server, words: list[str]) -> None:
    with wire_to(server) as wire:
        wire.send(encode_request(*map(str.encode, words)) + encode_request(b"AUTH", ADMIN.encode()) + b"PUT t x\r\n")
        assert [wire.receive().code for _ in range(3)] == ["WRONGPASS", "NOAUTH", "NOAUTH"]  # type: ignore[union-attr]
        assert wire.ended()
    assert server.status.counters().wrong_tokens == server.status.counters().errors["WRONGPASS"] == 1
    assert server.status.totals().stored == 0


def test_wrong_token_closes_authenticated_connection(server: Server) -> None:
    with wire_as(server, READER) as wire:
        wire.send(b"".join(encode_request(*words) for words in ((b"AUTH", WRONG.encode()), (b"GET", b"t"), (b"PING",))))
        assert [wire.receive().code for _ in range(3)] == ["WRONGPASS", "NOAUTH", "NOAUTH"]  # type: ignore[union-attr]
        assert wire.ended()


def test_requests_that_arrive_behind_a_wrong_token_get_replies(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRONG_TOKEN_SECONDS", 10 * SOON)
    with wire_to(server) as wire:
        assert wire.error("AUTH", WRONG) == "WRONGPASS"
        assert [wire.error("AUTH", ADMIN), wire.error("PING")] == ["NOAUTH", "NOAUTH"]
        wire.send(b"PING\r\n" * 100)
        # Two have been answered; the last reply says why it is the last.
        replies = [wire.receive() for _ in range(connection.MAX_REQUESTS_OF_STRANGERS - 2)]
        assert "no more than" in str(replies[-1])
        with pytest.raises(EOFError):
            wire.receive()


def test_wrong_tokens_do_not_delay_valid_ones_from_same_address(server: Server) -> None:
    for _ in range(30):
        with wire_to(server) as wire:
            assert wire.error("AUTH", WRONG) == "WRONGPASS"
        connect(port=server.port, token=ADMIN, retry=False, timeout=SOON).close()
    assert server.status.counters().wrong_tokens == 30
    assert server.status.counters().errors["BUSY"] == 0


@pytest.mark.parametrize(("token", "reply"), [(ADMIN, "OK"), (WRONG, "WRONGPASS")])
def test_half_close_after_auth_is_answered(server: Server, token: str, reply: str) -> None:
    for _ in range(3):
        with wire_to(server) as wire:
            wire.send(encode_request(b"AUTH", token.encode()))
            wire.socket.shutdown(socket.SHUT_WR)
            answer = wire.receive()
            assert getattr(answer, "code", answer) == reply
            assert wire.ended()


def test_second_auth_takes_effect(wire: Wire) -> None:
    assert wire.call("AUTH", READER) == "OK"
    assert wire.error("PUT", "t", "x") == "NOPERM"
    assert wire.call("AUTH", WRITER) == "OK"
    assert wire.call("PUT", "t", "x") == 1


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix", "unix"),
    ],
)
def test_client_key_groups_addresses_by_network(host: str, network: str) -> None:
    assert auth.client_key(host) == network


def test_all_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Authenticator([(name, Role.READ, name) for name in "abc"])
    compared = []
    compare = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    assert gate.authenticate(b"default", b"a") == gate.tokens[0]
    assert len(compared) == 3


# Strangers are bounded


def test_unauthenticated_connection_times_out(token_file: Path) -> None:
    with (
        serving(auth_token_file=str(token_file), auth_timeout_seconds=2 * UNIT) as server,
        wire_to(server) as silent,
        wire_to(server) as half,
        wire_to(server) as told,
        wire_as(server, READER) as known,
    ):
        half.send(b"*1\r\n")
        told.ask_for_notices()
        for stranger in (half, told):
            assert stranger.receive().code == "TIMEOUT"  # type: ignore[union-attr]
        for stranger in (silent, half, told):
            assert stranger.ended()
        assert known.call("PING") == "PONG"


def test_oldest_unauthenticated_connection_is_evicted(token_file: Path) -> None:
    with (
        serving(auth_token_file=str(token_file), max_unauthenticated_connections=2) as server,
        wire_as(server, READER) as known,
        wire_to(server) as first,
        wire_to(server) as second,
    ):
        assert first.call("PING") == "PONG"
        second.ask_for_notices()
        with wire_to(server) as third, wire_to(server):
            assert first.ended()
            assert second.receive().code == "BUSY"  # type: ignore[union-attr]
            assert second.ended()
            assert third.call("AUTH", READER) == "OK"
        assert known.call("PING") == "PONG"


def test_unauthenticated_request_size_is_limited(token_file: Path) -> None:
    with serving(auth_token_file=str(token_file), max_unauthenticated_bytes=4096) as server:
        for size, code in ((4073, "WRONGPASS"), (4074, "TOOBIG")):
            request = encode_request(b"AUTH", b"x" * size)
            with wire_to(server) as wire:
                wire.send(request)
                assert (len(request), wire.receive().code) == (size + 23, code)  # type: ignore[union-attr]
        with wire_to(server) as wire:
            wire.send(b"AUTH " + b"x" * 5000)
            assert wire.receive().code == "PROTOCOL"  # type: ignore[union-attr]


# Tokens change


def test_reload_disconnects_withdrawn_tokens(token_file: Path) -> None:
    with daemon("--auth-token-file", str(token_file)) as process:
        address = ("127.0.0.1", process.port)
        admin, writer, stranger = Wire(address), Wire(address), Wire(address)
        assert admin.call("AUTH", ADMIN) == writer.call("AUTH", WRITER) == "OK"
        writer.ask_for_notices()
        token_file.write_text(f"{ADMIN}\nsensors write new-token-0123456789\n")
        process.process.send_signal(signal.SIGHUP)
        assert writer.receive().code == "NOAUTH"  # type: ignore[union-attr]
        assert writer.ended()
        assert stranger.call("AUTH", "new-token-0123456789") == "OK"
        assert admin.call("PUT", "t", "x") == 1
        # A file that is no good changes nothing.
        token_file.write_text("sensors scribble new-token-0123456789\n")
        process.process.send_signal(signal.SIGHUP)
        line = process.wait_for_line("nothing is changed: .*")[0]
        assert "line 1" in line
        assert "new-token" not in line
        assert stranger.call("PUT", "t", "x") == 2
        for wire in (admin, writer, stranger):
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
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, **settings)  # noqa: E731
    with Server(load(), load=load) as server, wire_to(server) as wire:
        wire.send(b"GETWAIT t 60000\r\n")
        wait_until(lambda: server.status.waiting() == 1)
        settings["tls_cert_file"] = files.server
        server.reload()
        assert wire.receive() is None
        assert wire.ended()
        connect(port=server.port, ca_file=files.ca).close()
        # Whatever goes wrong, it goes on with what it had.
        server._load = lambda: 1 / 0  # type: ignore[assignment]
        server.reload()
        assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("has_tls", [False, True])
def test_a_connection_that_is_handed_over_during_a_reload_is_let_go_of_too(
    files: Files, monkeypatch: pytest.MonkeyPatch, has_tls: bool
) -> None:
    settings: dict[str, object] = {"io_threads": 2, "auth_timeout_seconds": 600}
    settings |= {"tls_cert_file": files.server} if has_tls else {}
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, **settings)  # noqa: E731
    monkeypatch.setattr("dsmq.server.WATCH_SECONDS", UNIT)
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
                # By now the first worker has accepted it, and the second does not know of it.
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
        broken, settled = next(iter(server._workers[0].connections)), Connection._commit_pending_puts
        monkeypatch.setattr(Connection, "_commit_pending_puts", lambda one: 1 / 0 if one is broken else settled(one))
        token_file.write_text(ADMIN)
        server.reload()
        assert second.receive().code == "NOAUTH"  # type: ignore[union-attr]
        assert first.receive().code == "INTERNAL"  # type: ignore[union-attr]


def test_withdrawn_token_ends_waiting_read_with_error(token_file: Path) -> None:
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


def test_reload_applies_settings_and_names_those_that_need_a_restart(
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "name read", "name root token", "name read token more"],
    ids=["empty", "comment", "two words", "no role", "four words"],
)
def test_invalid_token_file_is_reported_without_its_content(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    done = run_dsmq("serve", "--port", "0", "--auth-token-file", str(file))
    assert done.returncode == 2
    assert str(file).encode() in done.stderr
    assert b"token more" not in done.stderr


def test_token_file_accepts_trailing_newline_and_crlf(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(f"\ufeff{ADMIN}\r\nname read {READER}\r\n".encode())
    assert token_files.read_tokens(str(file)) == [("default", Role.ADMIN, ADMIN), ("name", Role.READ, READER)]
    for text in (f"{ADMIN}\nname read {ADMIN}", "tök"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is a duplicate"):
            token_files.read_tokens(str(file))


def test_missing_token_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        token_files.read_tokens(str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="should be UTF-8"):
        token_files.read_tokens(str(tmp_path / "binary"))
    with pytest.raises(ConfigError, match="null"):
        token_files.read_tokens("a\0b")


LONG, SHORT = "x" * 16, "y" * 15
TO_MAKE_ONE = "16 characters or more; to make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'\n"


@pytest.mark.parametrize("file", ["tokens", "token"], ids=["auth_token_file", "http_token_file"])
@pytest.mark.parametrize("text", [SHORT, f"{LONG}\nsensors write {SHORT}\n"], ids=["alone", "in a later line"])
def test_short_token_in_file_prevents_start(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    option = {"tokens": "--auth-token-file", "token": "--http-token-file"}[file]
    done = run_dsmq("serve", "--port", "0", "--http-port", "0", option, str(tmp_path / file))
    line = len(text.splitlines())
    assert (done.returncode, done.stderr.decode()) == (
        2,
        f"dsmq: {tmp_path / file}, line {line}: a token should have {TO_MAKE_ONE}",
    )


@pytest.mark.parametrize("name", ["DSMQ_AUTH_TOKEN", "DSMQ_HTTP_TOKEN"])
def test_short_token_in_setting_prevents_start(name: str) -> None:
    done = run_dsmq("serve", "--port", "0", "--http-port", "0", env={name: SHORT})
    assert (done.returncode, done.stderr.decode()) == (2, f"dsmq: {name}: should have {TO_MAKE_ONE}")


def test_sixteen_character_token_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"sensors write {LONG}")
    with serving(auth_token_file=str(file), http_port=0, http_token=LONG) as server, wire_to(server) as wire:
        assert wire.call("AUTH", LONG) == "OK"


@pytest.mark.parametrize("name", ["auth_token_file", "auth_token", "http_token_file", "http_token"])
def test_reload_with_short_token_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    tokens, http_token = tmp_path / "tokens", tmp_path / "http-token"
    tokens.write_text(TOKENS)
    http_token.write_text(LONG)
    settings = {"auth_token_file": str(tokens), "http_token_file": str(http_token), "max_topics": 1000}
    load = lambda: config.load(kind=config.EmbeddedSettings, port=0, http_port=0, **settings)  # noqa: E731
    with Server(load(), load=load) as server, wire_as(server, READER) as reader:
        before = server.context.settings, server.context.access
        if name.endswith("_file"):
            Path(str(settings[name])).write_text(f"sensors write {SHORT}\n")
        else:
            settings.pop("http_token_file")
            settings[name] = SHORT
        settings["max_topics"] = 7
        server.reload()
        assert "nothing is changed" in caplog.text
        assert TO_MAKE_ONE.strip() in caplog.text
        assert SHORT not in caplog.text
        assert (server.context.settings, server.context.access) == before
        assert reader.call("PING") == "PONG"


# Tokens are shown nowhere


def test_tokens_never_appear_in_output(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dsmq")
    with serving(auth_token=ADMIN, http_token=READER, http_port=0) as server, wire_as(server, ADMIN) as wire:
        settings = wire.call("CONFIG", "GET", "*")
        with wire_to(server) as wrong:
            refusal = wrong.call("AUTH", WRITER)
        told = [repr(settings), repr(refusal), str(wire.call("INFO")), repr(server.context.settings), caplog.text]
        client = connect(port=server.port, token=ADMIN)
        told += [repr(client), repr(client._core.endpoint)]
        client.close()
    told.append(config.to_toml(server.context.settings))
    assert "auth_token" in told[-1]
    for text in told:
        assert not any(token in text for token in (ADMIN, WRITER, READER))


def test_secrets_have_no_command_line_option() -> None:
    done = run_dsmq("serve", "--auth-token", ADMIN)
    assert done.returncode == 2
    assert ADMIN.encode() not in done.stderr
    assert b"--auth-token " not in run_dsmq("serve", "--help").stdout


@pytest.mark.parametrize("value", ["two words", " before", "**********", "\n", "tök"])
def test_invalid_secret_is_reported_without_its_value(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DSMQ_AUTH_TOKEN", value)
    with pytest.raises(ConfigError, match=r"^DSMQ_AUTH_TOKEN: should be") as caught:
        config.load()
    assert value not in str(caught.value)


# The clients


def test_client_sends_its_token(server: Server) -> None:
    with connect(port=server.port, token=WRITER) as mq:
        assert mq.put("t", "x") == 1
        with pytest.raises(NotPermitted):
            mq.shutdown_server()
        assert mq.get("t") == "x"


def test_client_raises_at_once_on_bad_token(server: Server) -> None:
    with pytest.raises(AuthRequired, match="token="):
        connect(port=server.port, retry=False)
    with pytest.raises(WrongToken):
        connect(port=server.port, retry=False, token=WRONG)
    with serving() as other, pytest.raises(BadRequest, match="this server has none"):
        connect(port=other.port, retry=False, token=ADMIN)


def test_cli_reads_token_from_file_or_environment(server: Server, token_file: Path) -> None:
    address = ("--port", str(server.port))
    assert run_dsmq("put", "t", "x", *address).returncode == 1
    assert run_dsmq("put", "t", "x", *address, "--token-file", str(token_file)).returncode == 0
    assert run_dsmq("put", "t", "x", *address, env={"DSMQ_AUTH_TOKEN": WRITER}).returncode == 0
    assert run_dsmq("ping", *address, env={"DSMQ_AUTH_TOKEN_FILE": str(token_file)}).returncode == 0
    done = run_dsmq("ping", *address, "--token-file", "/nowhere")
    assert (done.returncode, done.stderr) == (2, b"dsmq: /nowhere: No such file or directory\n")


def test_cli_error_names_missing_option(tls_server: Server, tmp_path: Path) -> None:
    with serving(auth_token=ADMIN) as server:
        done = run_dsmq("ping", "--port", str(server.port))
        assert done.stderr == b"dsmq: authentication required: --token-file FILE, or DSMQ_AUTH_TOKEN\n"
    port = ("--port", str(tls_server.port))
    assert b"does it require TLS (--tls)?" in run_dsmq("ping", *port).stderr
    assert b"(--ca-file FILE names others to trust)" in run_dsmq("ping", *port, "--tls").stderr
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    tool("openssl", "openssl")
    # As the README does it.
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost -addext"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run([*words.split(), names, "-keyout", key, "-out", cert], capture_output=True, check=True)
    with serving(tls_cert_file=cert, tls_key_file=key) as server:
        port = ("--port", str(server.port))
        done = run_dsmq("ping", *port, "--tls")
        assert b"self-signed certificate (--ca-file FILE to trust it)" in done.stderr
        assert run_dsmq("ping", *port, "--ca-file", cert).returncode == 0


def test_ping_uses_server_configuration(tmp_path: Path, token_file: Path, files: Files) -> None:
    file = tmp_path / "dsmq.toml"
    # A certificate for another name than that by which a health check reaches it.
    named = files.issue(trustme.CA(), "named", "dsmq.example.org")
    file.write_text(f'auth_token_file = "{token_file}"\ntls_cert_file = "{named}"\nhost = "0.0.0.0"')
    with daemon("--config", str(file)) as process:
        env = {"DSMQ_CONFIG": str(file), "DSMQ_PORT": str(process.port)}
        done = run_dsmq("ping", env=env)
        assert (done.returncode, done.stderr) == (0, b"")
        # It trusts no other than that.
        other = files.issue(trustme.CA(), "other", "dsmq.example.org")
        assert run_dsmq("ping", env={**env, "DSMQ_TLS_CERT_FILE": other}).returncode == 1
        assert run_dsmq("ping", env={**env, "DSMQ_AUTH_TOKEN": WRONG}).returncode == 1
        assert run_dsmq("ping", env={**env, "DSMQ_CONFIG": "/nowhere"}).returncode == 2
        # Another server is not shown this one's token.
        with serving(auth_token="another-token-0123456789") as other_server:
            options = ("--host", "127.0.0.1", "--port", str(other_server.port))
            done = run_dsmq("ping", *options, env={"DSMQ_CONFIG": str(file)})
            assert b"authentication required" in done.stderr
            assert other_server.status.counters().wrong_tokens == 0


# Where it listens


PROTECTED = "without authentication: set auth_token (DSMQ_AUTH_TOKEN), auth_token_file or tls_client_ca_file, or "


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
    with pytest.raises(ConfigError, match="without authentication"):
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
    with pytest.raises(ConfigError, match="without authentication"), Server(settings):
        pass


@pytest.mark.parametrize("exposed", ["", "127.0.0.1", "127.0.0.2"])
def test_one_public_address_of_a_name_counts_as_exposed(monkeypatch: pytest.MonkeyPatch, exposed: str) -> None:
    # Port 0 in what the name resolves to: one that is free on both.
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(listening, "is_exposed", lambda sock: sock.getsockname()[0] == exposed)
    server = Server(config.load(kind=config.EmbeddedSettings, host="some-name", port=30008))
    if exposed:
        with pytest.raises(ConfigError, match=rf"listening on {exposed}:\d+ without"), server:
            pass
    else:
        with server:
            assert len(server.addresses) == 2


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        *[("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("::ffff:127.0.0.1", False)],
        *[("0.0.0.0", True), ("::", True), ("\0dsmq-test-abstract", False), ("::ffff:0.0.0.0", True)],
    ],
)
def test_exposed_sockets_are_recognized(address: str, exposed: bool) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET if "." in address else socket.AF_UNIX
    with socket.socket(family) as sock:
        sock.bind(address if family == socket.AF_UNIX else (address, 0))
        assert listening.is_exposed(sock) == exposed


def test_unknown_socket_family_counts_as_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        monkeypatch.setattr(socket, "AF_UNIX", -1)
        assert listening.is_exposed(sock)


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "\0dsmq-{}"])
def test_passed_sockets_are_checked_for_exposure(address: str) -> None:
    unix = address.startswith("\0")
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as sock, contextlib.ExitStack() as stack:
        sock.bind(address.format(os.getpid()) if unix else (address, 0))
        sock.listen()
        settings = config.load(kind=config.EmbeddedSettings)
        if address == "0.0.0.0":
            stack.enter_context(pytest.raises(ConfigError, match=r"listening on 0\.0\.0\.0:\d+ without"))
        stack.enter_context(Server(settings, systemd=Systemd(queue=[sock])))
        wire = Wire(sock.getsockname().decode() if unix else sock.getsockname())
        assert wire.call("PUT", "t", "x") == 1
        wire.close()


def test_local_clients_are_admin_if_no_tokens_are_set(tmp_path: Path) -> None:
    for host in ("127.0.0.1", f"unix:{tmp_path}/socket"):
        with serving(host=host) as server:
            wire = Wire(f"{tmp_path}/socket" if host.startswith("unix:") else (host, server.port))
            assert wire.call("PUT", "t", "x") == 1
            wire.send(b"SHUTDOWN\r\n")
            wait_until(lambda: server.status.stopping)
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
        assert "nothing is changed: listening on 0.0.0.0:" in caplog.text
        assert (server.context.settings, server.context.access) == before


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


def test_reload_may_remove_all_tokens_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRONG_TOKEN_SECONDS", 10 * SOON)
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


@pytest.mark.parametrize(
    ("host", "settings", "says"),
    [
        ("0.0.0.0", {"protected_mode": False}, "no authentication: any client that can reach 0.0.0.0:"),
        ("0.0.0.0", {"auth_token": ADMIN}, None),
        ("127.0.0.1", {}, None),
        ("127.0.0.1", {"protected_mode": False}, None),
    ],
)
def test_unprotected_server_logs_a_warning(
    caplog: pytest.LogCaptureFixture, host: str, settings: dict[str, object], says: str | None
) -> None:
    with serving(host=host, **settings):
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert bool(warnings) == bool(says)
    assert says is None or says in warnings[0]


@pytest.fixture
def two_machines() -> Iterator[tuple[list[str], list[str]]]:
    """Two network namespaces with a cable between; the commands that run something in each."""
    ip = tool("ip", "iproute2")
    names = [f"dsmq-{os.getpid()}-{end}" for end in "ab"]
    commands = [
        *[["netns", "add", name] for name in names],
        ["link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1]],
        *[["-n", name, "addr", "add", f"192.0.2.{at}/30", "dev", "veth0"] for at, name in enumerate(names, 1)],
        *[["-n", name, "link", "set", device, "up"] for name in names for device in ("lo", "veth0")],
    ]
    try:
        for command in commands:
            done = subprocess.run([ip, *command], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"not allowed here: ip {' '.join(command)}: {done.stderr.strip()}")
        yield [ip, "netns", "exec", names[0]], [ip, "netns", "exec", names[1]]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)


@pytest.mark.parametrize("setting", ["auth_token_file", "protected_mode"])
def test_network_listener_serves_other_machines(
    two_machines: tuple[list[str], list[str]], token_file: Path, setting: str
) -> None:
    here, there = two_machines
    value = {"auth_token_file": str(token_file), "protected_mode": "off"}[setting]
    with daemon("--host", "0.0.0.0", config.option(setting), value, prefix=here) as process:
        shown = ["--token-file", str(token_file)] if setting == "auth_token_file" else []
        address = ["--host", "192.0.2.1", "--port", str(process.port), *shown]
        # It takes a moment until the cable is up.
        wait_until(lambda: run_dsmq("ping", *address, prefix=there).returncode == 0)


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


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Files:
    """Certificates on disk."""

    def __init__(self, folder: Path, authority: trustme.CA) -> None:
        self.folder, self.authority = folder, authority
        self.ca = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        self.server = self.issue(authority, "server", "127.0.0.1", "localhost")
        self.client = self.issue(authority, "client", "someone@example.org")

    def issue(self, authority: trustme.CA, name: str, *subjects: str) -> str:
        file = self.folder / f"{name}.pem"
        authority.issue_cert(*subjects).private_key_and_cert_chain_pem.write_to_path(file)
        return str(file)


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> Files:
    return Files(tmp_path, authority)


@pytest.fixture
def tls_server(files: Files) -> Iterator[Server]:
    with serving(tls_cert_file=files.server, auth_token=ADMIN) as server:
        yield server


@CONNECTS
def test_an_error_of_tls_names_the_address_and_says_what_to_do(connect: Connect, files: Files, server: Server) -> None:
    trustme.CA().cert_pem.write_to_path(files.folder / "other.pem")
    named = files.issue(files.authority, "named", "a.example", "*.b.example", "10.0.0.1")

    def told(port: int, **options: Any) -> str:
        with pytest.raises(ConnectionError) as error:
            connect(port=port, retry=False, **options)
        assert f"127.0.0.1:{port}: " in str(error.value)
        return str(error.value)

    with serving(tls_cert_file=files.server) as one:
        for options in ({"tls": True}, {"ca_file": str(files.folder / "other.pem")}):
            assert "the certificate is not from a trusted authority (ca_file=" in told(one.port, **options)
    with serving(tls_cert_file=named) as one:
        assert "not valid for '127.0.0.1'" in told(one.port, ca_file=files.ca)
    with serving(tls_cert_file=files.server, tls_client_ca_file=files.ca) as one:
        # The asyncio client may be refused before it has read why.
        assert re.search("requires a certificate|Broken pipe", told(one.port, ca_file=files.ca))
    assert "does the server speak TLS?" in told(server.port, tls=True)


def test_put_and_get_over_tls(tls_server: Server, files: Files) -> None:
    with connect(port=tls_server.port, ca_file=files.ca, token=ADMIN) as mq:
        assert mq.put("t", "x") == 1
        assert mq.get("t") == "x"
        long = [bytes([number]) * 300_000 for number in range(30)]
        assert mq.put_many("t", long) == list(range(2, 32))
        assert mq.get_many("t", 30, raw=True) == long
        assert mq.get_wait("t", timeout=UNIT) == ""
    with connect("localhost", tls_server.port, tls=ssl.create_default_context(cafile=files.ca), token=ADMIN) as mq:
        mq.ping()


def test_asyncio_put_and_get_over_tls(tls_server: Server, files: Files) -> None:
    async def main() -> None:
        async with await aio.connect(port=tls_server.port, ca_file=files.ca, token=ADMIN) as mq:
            await mq.put("t", "x" * 300_000)
            assert await mq.get("t") == "x" * 300_000

    asyncio.run(main())


def test_client_verifies_certificate_and_hostname(tls_server: Server, tmp_path: Path, authority: trustme.CA) -> None:
    (tmp_path / "other").mkdir()
    strange = Files(tmp_path / "other", trustme.CA())
    with pytest.raises(ConnectionError, match="not from a trusted authority"):
        connect(port=tls_server.port, ca_file=strange.ca, token=ADMIN, retry=False)
    with pytest.raises(ConnectionError, match="not from a trusted authority"):
        connect(port=tls_server.port, tls=True, token=ADMIN, retry=False)
    files = Files(tmp_path, authority)
    named = files.issue(authority, "named", "dsmq.example.org")
    with serving(tls_cert_file=named) as server, pytest.raises(ConnectionError, match="IP address mismatch"):
        connect(port=server.port, ca_file=files.ca, retry=False)


def test_client_sends_certificate_if_required(files: Files, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    strange = Files(tmp_path / "other", trustme.CA())
    with serving(tls_cert_file=files.server, tls_client_ca_file=files.ca, host="0.0.0.0") as server:
        for cert_file in (None, strange.client):
            with pytest.raises(ConnectionError):
                connect(port=server.port, ca_file=files.ca, cert_file=cert_file, retry=False)
        with connect(port=server.port, ca_file=files.ca, cert_file=files.client) as mq:
            assert mq.put("t", "x") == 1


def test_tls_and_plain_text_mismatch_is_an_error(tls_server: Server) -> None:
    with pytest.raises(ConnectionError, match="does it require TLS"):
        connect(port=tls_server.port, token=ADMIN, retry=False)
    with serving() as plain, pytest.raises(ConnectionError, match="does the server speak TLS"):
        connect(port=plain.port, tls=True, retry=False)


def test_old_versions_of_tls_are_refused(tls_server: Server, files: Files) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=files.ca)
        context.minimum_version = context.maximum_version = version
        connect(port=tls_server.port, tls=context, token=ADMIN).close()
    old = ssl.create_default_context(cafile=files.ca)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ConnectionError):
        connect(port=tls_server.port, tls=old, token=ADMIN, retry=False)


def test_stalled_handshake_times_out_and_affects_no_one(files: Files) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tls_cert_file=files.server, auth_timeout_seconds=20 * UNIT))
        silent, half = (stack.enter_context(wire_to(server)) for _ in range(2))
        half.send(bytes.fromhex("16030100c8010000c40303"))
        mq = stack.enter_context(connect(port=server.port, ca_file=files.ca))
        garbage = stack.enter_context(wire_to(server))
        garbage.send(b"GET / HTTP/1.1\r\n\r\n")
        for sock in (garbage, silent, half):
            with contextlib.suppress(ConnectionResetError):
                while sock.socket.recv(4096):
                    pass
        mq.ping()
        # Who has come in may stay.
        assert server.status.connections() == 1


def tls_to(server: Server, files: Files) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", server.port), SOON)
    return ssl.create_default_context(cafile=files.ca).wrap_socket(raw, server_hostname="127.0.0.1")


def test_idle_client_after_handshake_is_not_evicted(files: Files) -> None:
    limits = {"auth_timeout_seconds": UNIT, "max_unauthenticated_connections": 1}
    with serving(tls_cert_file=files.server, **limits) as server, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(tls_to(server, files)) for _ in range(3)]
        wait_until(lambda: server.context.usage.unauthenticated.total == 0)
        time.sleep(3 * UNIT)
        for sock in idle:
            sock.sendall(b"PING\r\n")
            assert sock.recv(100) == b"+PONG\r\n"


def test_handshake_alone_does_not_replace_token(tls_server: Server, files: Files) -> None:
    with tls_to(tls_server, files) as sock:
        sock.sendall(b"PING\r\n")
        assert sock.recv(100) == b"+PONG\r\n"
        assert tls_server.context.usage.unauthenticated.total == 1


def test_all_decrypted_requests_run_at_once(files: Files) -> None:
    # One record is four times as long as what is received at once of a client without its token.
    settings = {"tls_cert_file": files.server, "auth_token": ADMIN, "max_unauthenticated_bytes": 4096}
    with serving(**settings) as server, tls_to(server, files) as sock:
        ping = encode_request(b"PING", b"x" * 3900)
        sock.sendall(ping * 4)
        got = b""
        while len(got) < 4 * 3908:
            got += sock.recv(65_536)
        assert got == b"$3900\r\n%b\r\n" % (b"x" * 3900) * 4


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
            process.wait_for_line("nothing is changed: .*: no private key in PEM format found")
            connect(**where).close()  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tls_cert_file", "tls_key_file", "tls_client_ca_file"])
def test_invalid_tls_file_is_reported(files: Files, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    for file in (str(bad), "/nowhere"):
        settings = {"tls_cert_file": files.server, name: file}
        options = [word for key, value in settings.items() for word in (config.option(key), value)]
        done = run_dsmq("serve", "--port", "0", *options)
        assert done.returncode == 2
        assert file.encode() in done.stderr


def test_encrypted_key_is_refused_without_prompt(files: Files, tmp_path: Path) -> None:
    tool("openssl", "openssl")
    key = tmp_path / "encrypted.pem"
    done = subprocess.run(
        ["openssl", "pkey", "-in", files.server, "-aes256", "-passout", "pass:x", "-out", str(key)], check=False
    )
    assert done.returncode == 0
    assert run_dsmq("serve", "--port", "0", "--tls-cert-file", files.server, "--tls-key-file", str(key)).returncode == 2


def test_inconsistent_tls_settings_are_refused(files: Files) -> None:
    with pytest.raises(ConfigError, match="tls_key_file is set without tls_cert_file"):
        config.load(tls_key_file=files.server)
    with pytest.raises(TypeError):
        connect(tls=ssl.create_default_context(), ca_file=files.ca)


def test_redis_cli_works_with_tls_and_token(tls_server: Server, files: Files) -> None:
    redis_cli = tool("redis-cli", "redis-tools")
    command = [redis_cli, "--tls", "--cacert", files.ca, "-p", str(tls_server.port), "-a", ADMIN, "--no-auth-warning"]
    done = subprocess.run([*command, "PUT", "t", "x"], capture_output=True, text=True, timeout=SOON, check=False)
    assert done.stdout.strip() == "1"


def test_redis_py_works_with_tls_and_token(tls_server: Server, files: Files) -> None:
    redis = pytest.importorskip("redis")
    for protocol in (2, 3):
        with redis.Redis(port=tls_server.port, ssl=True, ssl_ca_certs=files.ca, password=ADMIN, protocol=protocol) as r:
            assert r.execute_command("PUT", "t", "x") > 0


def test_client_without_tls_does_not_import_ssl() -> None:
    code = "import sys, dsmq.client, dsmq.broker.auth; sys.exit('ssl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_closed_tls_connection_is_detected(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmq.client.connection.LONG_PAUSE_SECONDS", 0.0)
    with contextlib.ExitStack() as stack, serving(tls_cert_file=files.server) as first:
        mq = stack.enter_context(connect(port=first.port, ca_file=files.ca))
        # It still stands.
        assert [mq.put("t", "x"), mq.put("t", "x")] == [1, 2]
        first.stop()
        stack.enter_context(serving(port=mq.port, tls_cert_file=files.server))
        # What is put into another run may be stored already, if it was sent before.
        assert mq.put("t", "x" * 6_000_000) == 1


def test_slow_tls_reader_is_not_dropped(files: Files) -> None:
    with serving(tls_cert_file=files.server, reply_timeout_seconds=15 * UNIT) as server:
        with connect(port=server.port, ca_file=files.ca) as mq:
            mq.put("t", "x" * 6_000_000)
        context = ssl.create_default_context(cafile=files.ca)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as sock:
                sock.sendall(encode_request(b"READ", b"t", b"0"))
                got, began = 0, time.monotonic()
                while got < 6_000_000:
                    data = sock.recv(16_384)
                    assert data, f"dropped after {got} bytes"
                    got += len(data)
                    # In all for longer than it may read nothing.
                    time.sleep(max(0.0, began + 25 * UNIT * got / 6_000_000 - time.monotonic()))


def test_closing_tls_client_in_use_by_threads_is_safe(files: Files) -> None:
    def use(mq: DSMQClientSideConnection) -> None:
        while True:
            mq.put_many("t", ["x" * 20_000] * 20)
            mq.get_many("t", timeout=0.001)

    with serving(tls_cert_file=files.server) as server, ThreadPoolExecutor(3) as threads:
        for number in range(15):
            mq = connect(port=server.port, ca_file=files.ca)
            users = [threads.submit(use, mq) for _ in range(3)]
            wait_until(lambda: server.status.totals().stored > 0)
            time.sleep(number * UNIT / 100)
            mq.close()
            for user in users:
                with pytest.raises(ClientClosed):
                    user.result()


def test_connection_closed_before_accept_is_not_an_error(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tls_cert_file=files.server) as server:
        with blocked(server):
            for data in (b"", b"x"):
                with wire_to(server) as gone:
                    gone.send(data)
                    gone.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connect(port=server.port, ca_file=files.ca).close()
        assert "failed" not in caplog.text
        wait_until(lambda: server.context.usage.connections.total == 0)


class WithoutFix(ssl.SSLSocket):
    """What Python before 3.11.5 makes of a connection whose client has gone by then (CVE-2023-40217)."""

    def getpeername(self) -> object:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        if size == 1:
            # The fix looks for data that came before.
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return super().recv(size, flags)


@pytest.mark.parametrize("accepts", [True, False], ids=["server", "client"])
def test_plain_text_before_handshake_is_never_run(files: Files, accepts: bool) -> None:
    context = tls.server_context(files.server, "", "") if accepts else tls.client_context(None, None, None)
    context.sslsocket_class = WithoutFix
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
        with client, ours:
            client.sendall(encode_request(b"SHUTDOWN"))
            with pytest.raises(ConnectionAbortedError, match="before the handshake"):
                tls.accept(context, ours) if accepts else tls.connect(context, ours, "localhost")


def test_tls_works_on_any_python_version(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 2, "final", 0))
    with serving(tls_cert_file=files.server) as server, connect(port=server.port, ca_file=files.ca) as mq:
        assert mq.put("t", "x") == 1


@pytest.mark.parametrize(
    "arguments",
    [{"tsl": True}, {"tls": 1}, {"tls": "yes"}, {"ca_fle": "x"}, {"key_file": "x"}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_invalid_tls_argument_raises(server: Server, arguments: dict[str, object]) -> None:
    with pytest.raises((TypeError, ConfigError)):
        connect(port=server.port, retry=False, token=ADMIN, **arguments)  # type: ignore[arg-type]
    assert server.status.counters().opened == 0


# A client that closes behind the server's back


def test_forked_client_opens_its_own_tls_connection(tls_server: Server, files: Files) -> None:
    mq: DSMQClientSideConnection
    with connect(port=tls_server.port, ca_file=files.ca, token=ADMIN) as mq:
        mq.put("t", "x")
        child = os.fork()
        if not child:
            os._exit(0 if mq.get("t") == "x" and mq.put("t", "y") else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [mq.get("t"), mq.get("t")] == ["x", "y"]
