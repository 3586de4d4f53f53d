"""The table of commands agrees with PROTOCOL.md and with COMMAND."""

from __future__ import annotations

import logging
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from conftest import ROOT, Wire, as_map, wait_until, wire_to
from dsmq import errors
from dsmq.broker.commands import COMMANDS, Command
from dsmq.errors import BadRequest, ProtocolError
from dsmq.server import Server
from dsmq.wire import resp

PROTOCOL = (ROOT / "src/dsmq/wire/PROTOCOL.md").read_text()


@pytest.mark.parametrize(
    ("syntax", "least", "most"),
    [
        ("", 0, 0),
        ("topic", 1, 1),
        ("topic message [KEY producer seq [AGAIN]] [RUN run]", 2, 8),
        ("[2|3 [AUTH user token] [NOTICES]]", 0, 5),
        ("[COUNT|DOCS [name ...]]", 0, 63),
        ("GET pattern ...", 2, 63),
    ],
)
def test_argument_counts_match_syntax(syntax: str, least: int, most: int) -> None:
    command = Command("X", lambda *_: None, syntax)
    assert (command.min_args, command.max_args) == (least, most)


def test_command_docs_contain_all_arguments(wire: Wire) -> None:
    docs = as_map(wire.call("COMMAND", "DOCS"))
    for name, command in COMMANDS.items():
        arguments = [as_map(one) for one in as_map(docs[name.lower()])[b"arguments"]]  # type: ignore[attr-defined]
        words = [f"[{one[b'name'].decode()}]" if one[b"flags"] else one[b"name"].decode() for one in arguments]  # type: ignore[attr-defined]
        assert " ".join(words) == command.syntax


def test_each_command_has_its_own_summary() -> None:
    summaries = [command.summary for command in COMMANDS.values()]
    assert all(summary.endswith(".") for summary in summaries)
    assert len(set(summaries)) == len(summaries)


def test_command_docs_match_table(wire: Wire) -> None:
    about = as_map(as_map(wire.call("COMMAND", "DOCS", "getlatest"))[b"getlatest"])
    assert about[b"summary"] == COMMANDS[b"GETLATEST"].summary.encode()


def test_asterisk_in_config_pattern_matches_anything(wire: Wire) -> None:
    names = list(as_map(wire.call("CONFIG", "GET", "*")))
    assert b"max_age_seconds" in names
    for pattern in (
        "port",
        "PORT",
        "max*",
        "*bytes",
        "*_*_*_*",
        "m*x*s",
        "max_age_seconds*",
        "*o*o*t*t*",
        "p*ort*t",
        "**",
    ):
        matches = [name for name in names if fnmatchcase(name.decode(), pattern.lower())]
        assert list(as_map(wire.call("CONFIG", "GET", pattern))) == matches
    assert list(as_map(wire.call("CONFIG", "GET", "nosuch", "port", "*_age_*", "po*"))) == [b"port", b"max_age_seconds"]
    assert wire.error("CONFIG", "GET", "*" * 65) == wire.error("CONFIG", "SET", "port") == "BADREQUEST"


# PROTOCOL.md


def test_protocol_document_lists_each_command_with_syntax() -> None:
    text = PROTOCOL.replace("\\|", "|")
    known = {f"{name.decode()} {command.syntax}".strip() for name, command in COMMANDS.items()}
    for usage in known:
        assert f"`{usage}`" in text
    for heading in re.findall(r"^### (.*?)(?: → .*)?$", text, re.MULTILINE):
        assert set(re.findall("`([^`]+)`", heading)) <= known


def test_protocol_document_lists_every_error() -> None:
    _, _, table = PROTOCOL.partition("## Errors")
    assert set(re.findall(r"^\| `([A-Z]+)` \|", table, re.MULTILINE)) == set(errors.BY_CODE)


def test_protocol_document_is_packaged() -> None:
    assert Path(resp.__file__).with_name("PROTOCOL.md").exists()


def test_log_includes_name_of_named_client(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dsmq.broker")
    with wire_to(server) as wire, wire_to(server) as nameless:
        for client in wire, nameless:
            assert client.call("PING") == "PONG"
        wire.call("HELLO", "2", "SETNAME", "it's(me)")
        assert isinstance(wire.call("HELLO", "2", "SETNAME", "n\n"), BadRequest)
        assert isinstance(wire.call("HELLO", "2", "SETNAME", "n" * 65), BadRequest)
        for client in wire, nameless:
            client.send(b"*x\r\n")
            assert isinstance(client.receive(), ProtocolError)
            assert client.ended()
    first, second = (record for record in caplog.records if getattr(record, "event", "") == "rejected")
    assert re.match(r"""client \d+ "it's\(me\)" \(127\.0\.0\.1:\d+\): PROTOCOL """, first.getMessage())
    assert first.fields["client_name"] == "it's(me)"  # type: ignore[attr-defined]
    assert re.match(r"client \d+ \(127\.0\.0\.1:\d+\): PROTOCOL ", second.getMessage())
    wait_until(lambda: re.search(r"client \d+ \"it's.*: closed: ", caplog.text) is not None)
