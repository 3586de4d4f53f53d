"""Parses the arguments of requests. Invalid ones raise BadRequest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsmq.errors import BadRequest, TooBig
from dsmq.wire.limits import MAX_INTEGER
from dsmq.wire.resp import quoted

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection

MAX_NAME_BYTES = 64
# An int, because searching bytes for one is several times faster than for b"*".
ASTERISK = ord("*")


def parse_name(name: bytes) -> bytes:
    if len(name) > MAX_NAME_BYTES or not all(0x21 <= byte <= 0x7E for byte in name):
        raise BadRequest(f"a name may have at most {MAX_NAME_BYTES} printable ASCII characters, no spaces")
    return name


def parse_topic(client: Connection, request: list[bytes]) -> bytes:
    topic, max_bytes = request[1], client.context.settings.max_topic_bytes
    if ASTERISK in topic:
        raise BadRequest("a topic can't contain `*`: use MREAD to read topics by a pattern")
    # Fast path for most topics.
    return topic if 0 < len(topic) <= max_bytes and topic.isascii() else check_topic(topic, max_bytes)


def check_topic(topic: bytes, max_bytes: int) -> bytes:
    """Check a topic or a pattern."""
    if not topic:
        raise BadRequest("the name of the topic is empty")
    if len(topic) > max_bytes:
        raise TooBig(f"a topic may have at most {max_bytes} bytes, not {len(topic)}")
    if not topic.isascii():
        try:
            topic.decode()
        except UnicodeDecodeError:
            raise BadRequest("the topic is not UTF-8") from None
    return topic


def parse_integer(text: bytes, what: str, least: int = 0, most: int = MAX_INTEGER) -> int:
    if text.isdigit() and len(text) <= 19 and least <= (value := int(text)) <= most:
        return value
    raise BadRequest(f"{what} should be an integer from {least} to {most}, not {quoted(text)}")


def parse_options(words: Sequence[bytes], known: dict[bytes, int]) -> dict[bytes, Sequence[bytes]]:
    """Return the arguments of each option in the words; `known` maps each option to its number of arguments."""
    found: dict[bytes, Sequence[bytes]] = {}
    at = 0
    while at < len(words):
        option = words[at].upper()
        end = at + 1 + known.get(option, 0)
        if option not in known or option in found or end > len(words):
            raise BadRequest(f"invalid, repeated or incomplete option {quoted(words[at])}; quote messages with spaces")
        found[option] = words[at + 1 : end]
        at = end
    return found


def parse_number(options: dict[bytes, Sequence[bytes]], option: bytes, default: int, least: int, most: int) -> int:
    return parse_integer(options[option][0], option.decode(), least, most) if option in options else default
