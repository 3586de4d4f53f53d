"""Checks arguments for both clients: invalid ones raise TypeError or ValueError before anything is sent."""

from __future__ import annotations

import math
import os
import reprlib
import sys
from collections.abc import Iterable

from dsmq.system import LONG_MESSAGE_BYTES, raise_malloc_threshold
from dsmq.wire.addresses import UNIX, Endpoint, parse_endpoint, split_port
from dsmq.wire.limits import MAX_NAMES


class _Default(str):
    """A string that differs from an equal one given by the caller."""

    __slots__ = ()


DEFAULT_HOST = _Default("127.0.0.1")
MAX_PORT = 65_535
MAX_NAME_LENGTH = 64
# Shorter times need no further checks.
COMMON_SECONDS = 1e9


def seconds(name: str, value: object, *, zero: bool = True) -> float:
    """Return a time in seconds, possibly infinite."""
    if isinstance(value, int | float) and 0 < value < COMMON_SECONDS and value is not True:
        return value
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} should be a number of seconds, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} should be a number of seconds, not one with hundreds of digits") from None
    if math.isnan(number) or number < 0 or not (number or zero):
        raise ValueError(f"{name} should be {'0 or more' if zero else 'more than 0'} seconds, not {value!r}")
    return number


def count(name: str, value: object, least: int = 0) -> int:
    """Return a number of messages."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} should be an int, not {value!r}")
    number: int = value.__index__()
    if number < least:
        raise ValueError(f"{name} should be {least} or more, not {number}")
    return number


def flag(name: str, value: object) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be a bool, not {value!r}")
    return value


def form(*, text: bool, raw: bool) -> bool | None:
    """Return the form that messages should have: bytes (True), str (False), or Message (None)."""
    if text and raw:
        raise ValueError("text=True and raw=True are mutually exclusive")
    return raw if text or raw else None


def endpoints(host: object, port: object) -> tuple[Endpoint, ...]:
    """Return the endpoints of hosts, separated by commas or in a list, each with its own port or this one.

    A host may also be `unix:` and a path, which may contain commas if it is the only one.
    """
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"port should be an int, not {port!r}")
    variable, value = default_host() if host is DEFAULT_HOST else ("", host)
    try:
        return tuple(dict.fromkeys(_endpoint(one, port) for one in _hosts(value)))
    except ValueError as error:
        raise ValueError(f"{variable}: {error}" if variable else str(error)) from None


def default_host() -> tuple[str, str]:
    """Return the first environment variable for clients that is set, or "", and its value, or this machine."""
    found = ((name, os.environ.get(name)) for name in ("DSMQ_SERVER", "DSMQ_HOST"))
    return next(((name, value) for name, value in found if value), ("", str(DEFAULT_HOST)))


def _hosts(host: object) -> list[str]:
    if isinstance(host, list | tuple):
        hosts = [text("host", one) for one in host]
    else:
        name = text("host", host)
        hosts = [name] if name.startswith(UNIX) else [one.strip() for one in name.split(",")]
    if not hosts:
        raise ValueError("host should not be empty")
    return hosts


def _endpoint(address: str, default_port: int) -> Endpoint:
    host, digits = split_port(address)
    port = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else default_port
    try:
        if digits and str(port) != digits:
            raise ValueError("should be an address or a host name, with or without a port, or unix:/path")
        found = parse_endpoint(host, port)
    except ValueError as error:
        raise ValueError(f"host {error}, not {address!r}") from None
    if not found.path and not 0 < port <= MAX_PORT:
        raise ValueError(f"port should be 1 to {MAX_PORT}, not {port}")
    return found


def topic_name(topic: object) -> bytes:
    """Return a topic as sent on the wire."""
    if not isinstance(topic, str):
        raise TypeError(f"a topic should be a str, not {type(topic).__name__}")
    if not topic:
        raise ValueError("the name of the topic is empty")
    if "*" in topic:
        raise ValueError(f"{topic[:100]!r} is a pattern, which this call does not accept")
    return topic.encode()


def topic_or_pattern(topic: object) -> bytes:
    """Return a topic or a pattern (which contains `*`) as sent on the wire."""
    return topic.encode() if isinstance(topic, str) and "*" in topic else topic_name(topic)


_LISTS = (list, tuple, set, frozenset)


class Names(tuple[str, ...]):
    """Topics and patterns that are read together, in a fixed order."""

    __slots__ = ()


def names(*arguments: object) -> str | Names:
    """Return a topic, or several topics and patterns: each an argument, or all in one list.

    A name with `*`, which matches any characters, is a pattern.
    """
    topics = arguments[0] if len(arguments) == 1 else arguments
    if isinstance(topics, str) and "*" not in topics:
        topic_name(topics)
        return topics
    several = [topics] if isinstance(topics, str) else list(topics) if isinstance(topics, _LISTS) else []
    if not several or not all(isinstance(name, str) for name in several):
        raise TypeError(f"topics should be a str, or a list of them, not {reprlib.repr(topics)}")
    if "" in several:
        raise ValueError("the name of a topic is empty")
    found = Names(sorted(set(several)))
    if len(found) > MAX_NAMES:
        raise ValueError(f"at most {MAX_NAMES} topics and patterns can be read together, not {len(found)}")
    return found if len(found) > 1 or "*" in found[0] else found[0]


def text(name: str, value: object) -> str:
    """Return a str without NUL characters, which the operating system would reject."""
    if not isinstance(value, str):
        # The value may be a token, so the error does not contain it.
        raise TypeError(f"{name} should be a str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{name} contains a NUL character")
    return value


def short_name(what: str, value: object) -> bytes:
    """Return the name of a client or a group as sent on the wire."""
    name = text(what, value)
    if len(name) > MAX_NAME_LENGTH or not all("!" <= character <= "~" for character in name):
        about = f"should have at most {MAX_NAME_LENGTH} printable ASCII characters, no spaces"
        raise ValueError(f"{what} {about}: {name!r}")
    return name.encode()


def default_client_name() -> bytes:
    """Return the name of the program and the id of this process, such as `reader.py[4711]`."""
    folder, program = os.path.split((getattr(sys, "argv", None) or [""])[0])
    if program == "__main__.py":
        program = os.path.basename(folder)
    elif program in ("", "-c", "-m"):
        program = "python"
    process = f"[{os.getpid()}]"
    shown = "".join(character if "!" <= character <= "~" else "_" for character in program)
    return f"{shown[: MAX_NAME_LENGTH - len(process)]}{process}".encode()


def path(name: str, value: object) -> str | None:
    """Return a path, or None if there is none."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} should be a path, not {type(value).__name__}")
    name_of_file = text(name, os.fspath(value))
    if not name_of_file:
        # An empty path must not turn off TLS.
        raise ValueError(f"{name} should be a path or None, not empty")
    return name_of_file


def message(value: object) -> bytes:
    """Return a message as sent on the wire."""
    if isinstance(value, str):
        body = value.encode()
    elif isinstance(value, bytes | bytearray | memoryview):
        body = bytes(value)
    else:
        raise TypeError(f"a message should be a str or bytes, not {type(value).__name__}")
    if len(body) > LONG_MESSAGE_BYTES:
        raise_malloc_threshold()
    return body


def messages(values: Iterable[str | bytes]) -> Iterable[str | bytes]:
    """Check the messages for put_many. A single message is an error."""
    if isinstance(values, str | bytes | bytearray | memoryview) or not isinstance(values, Iterable):
        raise TypeError(f"put_many takes several messages, such as a list, not {type(values).__name__}; see put")
    return values
