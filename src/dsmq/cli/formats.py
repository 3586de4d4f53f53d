"""Format strings for `dsmq get`: %t, %p and others stand for parts of a message."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TypeAlias

from dsmq.client.message import Message
from dsmq.terminal import printable, quoted

HELP = (
    "print each message as FORMAT: %%t topic, %%i id, %%n number, %%s put time in seconds since 1970, %%d put time as "
    "date and time, %%l length in bytes, %%p message, %%x message in hex, %%%% percent sign; \\t tab, \\n newline, "
    "\\0 NUL"
)


def put_at(message: Message) -> str:
    return datetime.fromtimestamp(round(message.put_at, 3), UTC).isoformat(timespec="milliseconds")


_LETTERS: dict[str, Callable[[Message], str | bytes]] = {
    "t": lambda message: printable(message.topic),
    "i": lambda message: str(message.id),
    "n": lambda message: str(message.number),
    "s": lambda message: f"{message.put_at:.3f}",
    "d": put_at,
    "l": lambda message: str(len(message.body)),
    "p": lambda message: message.body,
    "x": lambda message: message.body.hex(),
    "%": lambda _: "%",
}
_ESCAPES = {"t": "\t", "n": "\n", "0": "\0", "\\": "\\"}

Format: TypeAlias = list[str | Callable[[Message], str | bytes]]
"""Literal text and functions that each return a part of a message."""


def parse_format(text: str) -> Format:
    """Parse a format. Raises ArgumentTypeError."""
    found: Format = []
    for literal, sign, letter in re.findall(r"([^%\\]+)|([%\\])(.?)", text, re.DOTALL):
        known: dict[str, str] | dict[str, Callable[[Message], str | bytes]] = _LETTERS if sign == "%" else _ESCAPES
        if sign and letter not in known:
            about = f"{quoted(text)} has an unknown sequence {sign}{printable(letter)}"
            raise argparse.ArgumentTypeError(f"{about}; use {' '.join(sign + each for each in known)}")
        found.append(known[letter] if sign else literal)
    return found


def print_messages(messages: Iterable[Message], parts: Format, end: str = "\n") -> None:
    """Print messages. On a terminal, escape their control characters."""
    if sys.stdout.isatty():
        for message in messages:
            values = (part if isinstance(part, str) else _shown(part(message)) for part in parts)
            sys.stdout.write("".join(values) + end)
        return
    encoded = [os.fsencode(part) if isinstance(part, str) else part for part in parts]
    for message in messages:
        line = [part if isinstance(part, bytes) else _sent(part(message)) for part in encoded]
        sys.stdout.buffer.writelines((*line, end.encode()))


def _shown(value: str | bytes) -> str:
    return printable(value.decode(errors="backslashreplace")) if isinstance(value, bytes) else value


def _sent(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
