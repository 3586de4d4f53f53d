"""What the replies of a server mean, and which of them end a connection."""

from __future__ import annotations

from typing import NoReturn, TypeGuard

from dsmq.errors import AuthRequired, Busy, DSMQError, InternalError, ProtocolError, ReplyError, ShuttingDown, TimedOut
from dsmq.wire.resp import Reply, encode_request


def stored_id(reply: Reply) -> int:
    """Return the id in the reply to PUT. Raises the server's error, or ProtocolError."""
    if isinstance(reply, int):
        return reply
    check(reply)
    raise ProtocolError(f"the reply to PUT is {reply!r}")


def raise_if_fatal(reply: Reply) -> Reply:
    """Return a reply, even an error. Raises an error after which the server hangs up."""
    if isinstance(reply, (ProtocolError, AuthRequired, Busy, ShuttingDown, TimedOut, InternalError)):
        raise reply
    return reply


def is_lost(error: BaseException, *, connecting: bool) -> TypeGuard[Exception]:
    """Return whether an error means that a connection has broken, so that another is to be made."""
    if isinstance(error, DSMQError):
        # A server with too many clients may have room soon; one whose tokens have changed may accept this client's.
        return isinstance(error, ShuttingDown | TimedOut | (Busy if connecting else AuthRequired))
    return isinstance(error, OSError)


def reason(error: BaseException) -> str:
    """Return the text of an error, without its number; asyncio's timeouts have none."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no reply in time"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def check(reply: Reply) -> Reply:
    """Return a reply that is not an error. Raises the error."""
    if isinstance(reply, ReplyError):
        raise reply
    return reply


def restored_number(reply: Reply) -> int:
    """Return the topic's last number before an id was lost, out of the reply to STATS topic AFTER id."""
    return as_number(as_map(reply).get("restored_number", 0))


def topics_request(found: list[tuple[str, int, int]]) -> bytes:
    """Return the request for the page of topics behind those found already."""
    return encode_request(b"TOPICS", *((b"AFTER", found[-1][0].encode()) if found else ()))


def topics(reply: Reply) -> list[tuple[str, int, int]]:
    """Return the topics in the reply to TOPICS. Raises the server's error, or ProtocolError."""
    check(reply)
    if not isinstance(reply, list) or len(reply) % 3:
        raise ProtocolError("the reply to TOPICS is not an array of threes")
    values = iter(reply)
    return [
        (as_text(name), as_number(messages), as_number(size))
        for name, messages, size in zip(values, values, values, strict=True)
    ]


def as_map(reply: Reply) -> dict[str, Reply]:
    """Return the map in a reply. Raises the server's error, or ProtocolError."""
    values = check(reply)
    if not isinstance(values, list) or len(values) % 2:
        raise ProtocolError("a reply is not a map; is that a dsmq server?")
    return {as_text(name): value for name, value in zip(values[::2], values[1::2], strict=True)}


def as_text(value: Reply) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else _wrong_type("text", value)
    except UnicodeDecodeError:
        return _wrong_type("text", value)


def as_number(value: Reply) -> int:
    return value if isinstance(value, int) else _wrong_type("number", value)


def as_ranges(value: Reply) -> list[tuple[int, int]]:
    ends = [as_number(end) for end in (value if isinstance(value, list) else _wrong_type("list", value))]
    return list(zip(ends[::2], ends[1::2], strict=False))


def _wrong_type(what: str, value: Reply) -> NoReturn:
    raise ProtocolError(f"no {what} in a reply, but {value!r}; is that a dsmq server?")
