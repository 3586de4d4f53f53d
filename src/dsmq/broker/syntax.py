"""The syntax of a command, as PROTOCOL.md writes it: how many arguments it takes, and how clients are told of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from dsmq.wire.limits import MAX_ARGUMENTS

_WORD = re.compile(r"[\[\]]|[^\s\[\]]+")

Argument: TypeAlias = dict[str, Any]
"""An argument as COMMAND DOCS describes it: name, type, and if need be token, flags and arguments of its own."""


def bounds(syntax: str) -> tuple[int, int]:
    """Return the least and the largest number of arguments.

    Words in brackets are optional, words in capitals stand for themselves, `|` separates alternatives, and `...` means
    any number of the word before it.
    """
    least = most = depth = 0
    for word in _WORD.findall(syntax):
        if word in "[]":
            depth += 1 if word == "[" else -1
        elif word == "...":
            most = MAX_ARGUMENTS - 1
        else:
            least += not depth
            most += 1
    return least, min(most, MAX_ARGUMENTS - 1)


def arguments(syntax: str) -> list[Argument]:
    """Return the arguments, in order."""
    return _sequence(iter(_WORD.findall(syntax)))


def _sequence(words: Iterator[str]) -> list[Argument]:
    found: list[Argument] = []
    for word in words:
        if word == "]":
            break
        if word == "[":
            found.append(_optional(_sequence(words)))
        elif word == "...":
            found[-1]["flags"] = ["multiple"]
        elif "|" in word:
            choices = [_pure_token(choice) for choice in word.split("|")]
            found.append({"name": word.lower(), "type": "oneof", "arguments": choices})
        elif word.isupper():
            found.append(_pure_token(word))
        elif found and found[-1]["type"] == "pure-token" and "flags" not in found[-1]:
            found[-1] = {"name": word, "type": "string", "token": found[-1]["token"]}
        else:
            found.append({"name": word, "type": "string"})
    return found


def _optional(group: list[Argument]) -> Argument:
    one = group[0] if len(group) == 1 else {"name": group[0]["name"], "type": "block", "arguments": group}
    return {**one, "flags": ["optional", *one.get("flags", [])]}


def _pure_token(word: str) -> Argument:
    return {"name": word.lower(), "type": "pure-token", "token": word}
