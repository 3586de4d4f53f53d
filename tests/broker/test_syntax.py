"""The table of commands, what clients are told of it, and PROTOCOL.md say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import ROOT, Wire, as_map
from dsmq import errors
from dsmq.broker import commands
from dsmq.broker.syntax import Argument, arguments, bounds
from dsmq.wire import resp

PROTOCOL = (ROOT / "src/dsmq/wire/PROTOCOL.md").read_text()


def rendered(found: list[Argument]) -> str:
    """The syntax again, from its arguments."""
    return " ".join(map(one, found))


def one(argument: Argument) -> str:
    flags = argument.get("flags", [])
    if argument["type"] == "block":
        text = rendered(argument["arguments"])
    elif argument["type"] == "oneof":
        text = "|".join(choice["token"] for choice in argument["arguments"])
    elif argument["type"] == "pure-token":
        text = argument["token"]
    else:
        text = " ".join(filter(None, (argument.get("token"), argument["name"])))
    text += " ..." * ("multiple" in flags)
    return f"[{text}]" if "optional" in flags else text


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
    assert bounds(syntax) == (least, most)


@pytest.mark.parametrize("name", [name.decode() for name in commands.COMMANDS])
def test_command_info_matches_syntax(name: str) -> None:
    syntax = commands.COMMANDS[name.encode()].syntax
    assert rendered(arguments(syntax)) == syntax


def test_optional_argument_has_its_keyword_as_token() -> None:
    producer = {"name": "producer", "type": "string", "token": "KEY"}
    again = {"name": "again", "type": "pure-token", "token": "AGAIN", "flags": ["optional"]}
    assert arguments("[KEY producer seq [AGAIN]]") == [
        {
            "name": "producer",
            "type": "block",
            "arguments": [producer, {"name": "seq", "type": "string"}, again],
            "flags": ["optional"],
        }
    ]


def test_each_command_has_its_own_summary() -> None:
    summaries = [command.summary for command in commands.COMMANDS.values()]
    assert all(summary.endswith(".") for summary in summaries)
    assert len(set(summaries)) == len(summaries)


def test_command_docs_match_table(wire: Wire) -> None:
    about = as_map(as_map(wire.call("COMMAND", "DOCS", "getlatest"))[b"getlatest"])
    assert about[b"summary"] == commands.COMMANDS[b"GETLATEST"].summary.encode()
    [topic] = about[b"arguments"]  # type: ignore[misc]
    assert as_map(topic) == {b"name": b"topic", b"type": b"string"}


# PROTOCOL.md


def test_protocol_document_lists_each_command_with_syntax() -> None:
    text = PROTOCOL.replace("\\|", "|")
    known = {f"{name.decode()} {command.syntax}".strip() for name, command in commands.COMMANDS.items()}
    for usage in known:
        assert f"`{usage}`" in text
    for heading in re.findall(r"^### (.*?)(?: → .*)?$", text, re.MULTILINE):
        assert set(re.findall("`([^`]+)`", heading)) <= known


def test_protocol_document_lists_every_error() -> None:
    _, _, table = PROTOCOL.partition("## Errors")
    assert set(re.findall(r"^\| `([A-Z]+)` \|", table, re.MULTILINE)) == set(errors.BY_CODE)


def test_protocol_document_is_packaged() -> None:
    assert Path(resp.__file__).with_name("PROTOCOL.md").exists()
