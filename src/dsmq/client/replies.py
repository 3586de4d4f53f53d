"""The meaning of replies and the errors that end a connection."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from dsmq.errors import (
    AuthRequired,
    Busy,
    DSMQError,
    InternalError,
    ProtocolError,
    ReplyError,
    ShuttingDown,
    TimedOut,
    Unsure,
)
from dsmq.wire.resp import Reply

T = TypeVar("T")


def stored_id(reply: Reply) -> int:
    """Return the id in the reply to PUT. Raises the server's error or ProtocolError."""
    if isinstance(reply, int):
        return reply
    check(reply)
    raise ProtocolError(f"the reply to PUT is {reply!r}")


def raise_if_fatal(reply: Reply) -> Reply:
    """Return a reply, even if it is an error, but raise it if the connection can no longer be used.

    After most of these errors, the server closes the connection. After Unsure, another server may know the outcome.
    """
    if isinstance(reply, (ProtocolError, AuthRequired, Busy, ShuttingDown, TimedOut, InternalError, Unsure)):
        raise reply
    return reply


def is_lost(error: BaseException, *, connecting: bool) -> TypeGuard[Exception]:
    """Return whether an error means that the connection is lost and a new one is needed."""
    if isinstance(error, DSMQError):
        # A busy server may have room soon, and a server whose tokens have changed may accept this client's token.
        return isinstance(error, ShuttingDown | TimedOut | Unsure | (Busy if connecting else AuthRequired))
    return isinstance(error, OSError)


def reason(error: BaseException) -> str:
    """Return the text of an error, without its number; asyncio's timeouts have none."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no reply in time"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def check(reply: Reply) -> Reply:
    """Return the reply, or raise it if it is an error."""
    if isinstance(reply, ReplyError):
        raise reply
    return reply


def restored_number(reply: Reply) -> int:
    """Return a topic's last number before an id was lost, from the reply to STATS topic AFTER id."""
    return as_number(as_map(reply).get("restored_number", 0))


def topics(reply: Reply) -> list[tuple[str, int, int]]:
    """Return the topics in the reply to TOPICS. Raises the server's error or ProtocolError."""
    check(reply)
    if not isinstance(reply, list) or len(reply) % 3:
        raise ProtocolError("the reply to TOPICS is not an array of triples")
    values = iter(reply)
    return [
        (as_text(name), as_number(messages), as_number(size))
        for name, messages, size in zip(values, values, values, strict=True)
    ]


def stats(reply: Reply) -> dict[str, int | str]:
    """Return the values in the reply to STATS or INFO. Raises the server's error or ProtocolError."""
    if not isinstance(check(reply), bytes):
        return {name: as_number(value) for name, value in as_map(reply).items()}
    pairs = [line.partition(":")[::2] for line in as_text(reply).splitlines() if line and line[0] != "#"]
    # These two are in hex.
    return {name: int(value) if value.isdecimal() and name not in ("epoch", "run") else value for name, value in pairs}


def as_map(reply: Reply) -> dict[str, Reply]:
    """Return the map in a reply. Raises the server's error or ProtocolError."""
    values = check(reply)
    if not isinstance(values, list) or len(values) % 2:
        raise ProtocolError("the reply is not a map")
    return {as_text(name): value for name, value in zip(values[::2], values[1::2], strict=True)}


def as_text(value: Reply) -> str:
    try:
        return _checked(value, bytes).decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"{value!r} in a reply is not UTF-8") from None


def as_number(value: Reply) -> int:
    return _checked(value, int)


def as_ranges(value: Reply) -> list[tuple[int, int]]:
    ends = [as_number(end) for end in _checked(value, list)]
    return list(zip(ends[::2], ends[1::2], strict=False))


def _checked(value: Reply, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ProtocolError(f"{value!r} in a reply should be {kind.__name__}")
    return value
