"""Argument types for the parser. They raise ArgumentTypeError if the text is invalid."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import TypeVar

from dsmq.terminal import quoted
from dsmq.wire.addresses import UNIX, parse_endpoint, split_port
from dsmq.wire.limits import MAX_INTEGER

N = TypeVar("N", int, float)
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def topic(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of the topic is empty")
    # Python decodes bytes of the command line that are not UTF-8 as surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"the topic {quoted(text)} is not UTF-8")
    return text


def host(text: str) -> str:
    try:
        if "\0" in text:
            raise ValueError
        parse_endpoint(text)
    except ValueError:
        about = f"{quoted(text)} is not an address, a host name (without a port), or unix:/path"
        raise argparse.ArgumentTypeError(about) from None
    return text


def addresses(text: str) -> list[tuple[str, int]]:
    """Parse comma-separated hosts, each with an optional port (0 if missing)."""
    names = [text] if text.startswith(UNIX) else text.split(",")
    return [(host(name), port(digits) if digits else 0) for name, digits in map(split_port, names)]


def file(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    if text.endswith("/"):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is a directory")
    return text


def position(text: str) -> int | str:
    """Parse an id or a position as printed by `dsmq get --json`."""
    if re.fullmatch(r"[^\s:]+:[0-9]{1,19}", text):
        return text
    return _number(int, text, 0, MAX_INTEGER, "an id, 0, or a position")


def seconds(text: str) -> float:
    return _number(float, text, 0, math.inf, "a number of seconds")


def timeout(text: str) -> float:
    return _number(float, text, 1e-3, math.inf, "a number of seconds above 0")


def interval(text: str) -> float:
    return _number(float, text, 1e-3, 86_400, "a number of seconds from 0.001 to 86400")


def count(text: str) -> int:
    return _number(int, text, 1, math.inf, "a whole number of at least 1")


def port(text: str) -> int:
    return _number(int, text, 1, 65535, "a port number from 1 to 65535")


def duration(text: str) -> float:
    """Parse a duration such as 5m; the default unit is seconds."""
    if (found := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text)) is None:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a time such as 30s, 5m or 2h")
    return float(found[1]) * _UNITS[found[2]]


def lease(text: str) -> float:
    return _at_most_a_day(text, 1e-3)


def delay(text: str) -> float:
    return _at_most_a_day(text, 0)


def _at_most_a_day(text: str, least: float) -> float:
    if not least <= (time := duration(text)) <= 86_400:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a time from {least:g}s to 1d")
    return time


def group(text: str) -> str:
    if not re.fullmatch("[!-~]{1,64}", text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not 1 to 64 printable ASCII characters, no spaces")
    return text


def _number(kind: Callable[[str], N], text: str, least: float, most: float, what: str) -> N:
    try:
        # Python would accept more, such as 3_0 and digits of other scripts.
        number = kind(text) if re.fullmatch("[!-^`-~]+", text) else None
    except ValueError:
        number = None
    if number is None or not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not {what}")
    return number
