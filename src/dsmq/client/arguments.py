"""Checks of arguments, for both clients: invalid ones raise before anything is sent."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from dsmq.wire.addresses import UNIX

MAX_PORT = 65_535


def seconds(name: str, value: object, *, zero: bool = True) -> float:
    """Return a time in seconds, which may be infinite. Raises TypeError, or ValueError if it is out of range."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is a number of seconds, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} is a number of seconds, not one with hundreds of digits") from None
    if math.isnan(number) or number < 0 or not (number or zero):
        raise ValueError(f"{name} is {'0 or more' if zero else 'more than 0'} seconds, not {value!r}")
    return number


def count(name: str, value: object) -> int:
    """Return a number of messages. Raises TypeError, or ValueError if it is negative."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is an int, not {value!r}")
    number: int = value.__index__()
    if number < 0:
        raise ValueError(f"{name} is 0 or more, not {number}")
    return number


def address(host: object, port: object) -> tuple[str, int]:
    """Return a host, or `unix:` and a path, and a port (not used with a path). Raises TypeError or ValueError."""
    name = text("host", host)
    if not name.removeprefix(UNIX):
        raise ValueError(f"host is an address, a name, or unix:/path, not {name!r}")
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"port is an int, not {port!r}")
    if not name.startswith(UNIX) and not 0 < port <= MAX_PORT:
        raise ValueError(f"port is 1 to {MAX_PORT}, not {port}")
    return name, port


def topic_name(topic: str) -> bytes:
    """Return a topic as it is sent. Raises TypeError or ValueError."""
    if not isinstance(topic, str):
        raise TypeError(f"a topic is a str, not {type(topic).__name__}")
    if not topic:
        raise ValueError("the name of the topic is empty")
    return topic.encode()


def text(name: str, value: object) -> str:
    """Return a str that may go to the operating system. Raises TypeError, or ValueError if it contains NUL."""
    if not isinstance(value, str):
        # Without the value, which may be a token.
        raise TypeError(f"{name} is a str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{name} contains a NUL character")
    return value


def path(name: str, value: object) -> str | None:
    """Return a path, or None if there is none. Raises TypeError, or ValueError if it is empty or contains NUL."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is a path, not {type(value).__name__}")
    name_of_file = text(name, os.fspath(value))
    if not name_of_file:
        # An empty path must not disable TLS.
        raise ValueError(f"{name} is a path, or None, not empty")
    return name_of_file


def callback(name: str, value: object) -> None:
    """Raises TypeError unless it is None or can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} can't be called: {value!r}")


def messages(values: Iterable[str | bytes]) -> Iterable[str | bytes]:
    """Return messages to put. Raises TypeError if it is a single message, or not iterable."""
    if isinstance(values, str | bytes | bytearray | memoryview):
        raise TypeError(f"put_many takes several messages, such as a list, not one {type(values).__name__}: use put")
    if not isinstance(values, Iterable):
        raise TypeError(f"put_many takes several messages, such as a list, not {type(values).__name__}")
    return values
