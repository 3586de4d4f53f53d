"""Tokens in files and settings, which must appear nowhere else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from conftest import run_dsmq, serving, wire_to
from dsmq import settings as config
from dsmq.broker.auth import Role, read_tokens
from dsmq.client import connect
from dsmq.errors import ConfigError
from dsmq.server import Server
from security import ADMIN, READER, TOKENS, WRITER, wire_as


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
    assert read_tokens(str(file)) == [("default", Role.ADMIN, ADMIN), ("name", Role.READ, READER)]
    for text, message in ((f"{ADMIN}\nname read {ADMIN}", "line 2: .* duplicate"), ("tök" * 9, "line 1: .* ASCII")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_tokens(str(file))


def test_missing_token_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_tokens(str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="should be UTF-8"):
        read_tokens(str(tmp_path / "binary"))
    with pytest.raises(ConfigError, match="null"):
        read_tokens("a\0b")


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
        f"dsmq: {tmp_path / file}, line {line}: should have {TO_MAKE_ONE}",
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
        assert "reload failed" in caplog.text
        assert TO_MAKE_ONE.strip() in caplog.text
        assert SHORT not in caplog.text
        assert (server.context.settings, server.context.access) == before
        assert reader.call("PING") == "PONG"


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
def test_invalid_secret_is_reported_without_its_value(value: str) -> None:
    done = run_dsmq("serve", "--port", "0", env={"DSMQ_AUTH_TOKEN": value})
    assert done.returncode == 2
    assert done.stderr.startswith(b"dsmq: DSMQ_AUTH_TOKEN: should be ")
    assert value.strip() == "" or value.strip().encode() not in done.stderr
