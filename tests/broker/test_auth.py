"""Authentication and roles."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from conftest import SOON, UNIT, Wire, daemon, reload, run_dsmq, serving, tool, wire_to
from dsmq.broker import auth, login
from dsmq.broker.auth import Authenticator, Role
from dsmq.broker.commands import COMMANDS
from dsmq.client import connect
from dsmq.errors import AuthRequired, BadRequest, NotPermitted, WrongToken
from dsmq.server import Server
from dsmq.wire.resp import encode_request
from security import ADMIN, READER, WRITER, WRONG, Files, wire_as


@pytest.fixture
def server(token_file: Path) -> Iterator[Server]:
    """A server with tokens."""
    with serving(auth_token_file=str(token_file), http_port=0) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("name", [name.decode() for name in COMMANDS])
def test_unauthenticated_client_may_only_use_hello_auth_ping_and_quit(server: Server, wire: Wire, name: str) -> None:
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
    stops: list[str] = []
    server.context.request_stop = stops.append
    for token in (READER, WRITER):
        with wire_as(server, token) as wire:
            assert wire.error("SHUTDOWN") == "NOPERM"
    assert stops == []
    with wire_as(server, ADMIN) as wire:
        wire.send(encode_request(b"SHUTDOWN"))
        assert wire.ended()
    assert len(stops) == 1


def test_only_admin_sees_other_clients(server: Server) -> None:
    with wire_as(server, WRITER) as wire, wire_as(server, ADMIN) as admin:
        for section in ("clients", "stats", "store"):
            assert section.capitalize().encode() not in wire.call("INFO")  # type: ignore[operator]
            assert wire.call("INFO", section) == b""
            assert section.capitalize().encode() in admin.call("INFO")  # type: ignore[operator]
        assert b"# Server" in wire.call("INFO")  # type: ignore[operator]


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


@pytest.mark.usefixtures("replies_after_wrong_token")
def test_requests_after_wrong_token_get_replies(server: Server) -> None:
    with wire_to(server) as wire:
        assert wire.error("AUTH", WRONG) == "WRONGPASS"
        assert [wire.error("AUTH", ADMIN), wire.error("PING")] == ["NOAUTH", "NOAUTH"]
        wire.send(b"PING\r\n" * 100)
        # Two have been answered.
        replies = [wire.receive() for _ in range(login.MAX_UNAUTHENTICATED_REQUESTS - 2)]
        assert "too many requests" in str(replies[-1])
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
    authenticator = Authenticator([(name, Role.READ, name) for name in "abc"])
    compared = []
    compare = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    assert authenticator.authenticate(b"default", b"a") == authenticator.tokens[0]
    assert len(compared) == 3


def test_unauthenticated_connection_times_out(token_file: Path) -> None:
    with (
        serving(auth_token_file=str(token_file), auth_timeout_seconds=600) as server,
        wire_to(server) as silent,
        wire_to(server) as half,
        wire_to(server) as told,
        wire_as(server, READER) as known,
    ):
        half.send(b"*1\r\n")
        told.ask_for_notices()
        reload(server, auth_timeout_seconds=UNIT)
        for wire in (half, told):
            assert wire.receive().code == "TIMEOUT"  # type: ignore[union-attr]
        for wire in (silent, half, told):
            assert wire.ended()
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
    with serving() as other, pytest.raises(BadRequest, match="this server requires no token"):
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
    assert b"(--ca-file FILE to trust another)" in run_dsmq("ping", *port, "--tls").stderr
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    tool("openssl", "openssl")
    # As in the README.
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
    # The certificate is for a different name from the one that a health check uses.
    named = files.issue(trustme.CA(), "named", "dsmq.example.org")
    file.write_text(f'auth_token_file = "{token_file}"\ntls_cert_file = "{named}"\nhost = "0.0.0.0"')
    with daemon("--config", str(file)) as process:
        env = {"DSMQ_CONFIG": str(file), "DSMQ_PORT": str(process.port)}
        done = run_dsmq("ping", env=env)
        assert (done.returncode, done.stderr) == (0, b"")
        # It trusts no other certificate.
        other = files.issue(trustme.CA(), "other", "dsmq.example.org")
        assert run_dsmq("ping", env={**env, "DSMQ_TLS_CERT_FILE": other}).returncode == 1
        assert run_dsmq("ping", env={**env, "DSMQ_AUTH_TOKEN": WRONG}).returncode == 1
        assert run_dsmq("ping", env={**env, "DSMQ_CONFIG": "/nowhere"}).returncode == 2
        # The token is not sent to another server.
        with serving(auth_token="another-token-0123456789") as other_server:
            options = ("--host", "127.0.0.1", "--port", str(other_server.port))
            done = run_dsmq("ping", *options, env={"DSMQ_CONFIG": str(file)})
            assert b"authentication required" in done.stderr
            assert other_server.status.counters().wrong_tokens == 0
