"""Messages as returned to users."""

from __future__ import annotations

from typing import Any, NamedTuple

from dsmq.errors import MessageNotText


class Message(NamedTuple):
    """A message with its metadata. `str(message)` is its text; bytes that are not UTF-8 appear as `\\xff`."""

    topic: str
    id: int
    """Increases across all topics of a server and is never reused."""
    number: int
    """Counts the messages of the topic, starting at 1."""
    put_at: float
    """The time of the put: seconds since 1970, on this machine's clock."""
    body: bytes

    @property
    def text(self) -> str:
        """The body as text. Raises MessageNotText if it is not UTF-8."""
        try:
            return self.body.decode()
        except UnicodeDecodeError:
            raise not_text(self.topic) from None

    def json(self) -> Any:
        """Return the value of a JSON body. Raises ValueError if it is not JSON."""
        import json  # noqa: PLC0415 - most clients don't need it

        return json.loads(self.body)

    def __str__(self) -> str:
        return self.body.decode(errors="backslashreplace")

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def not_text(topic: str) -> MessageNotText:
    """Return the error for a message that is not UTF-8."""
    return MessageNotText(f"the next message of {topic!r} is not UTF-8; read it with raw=True")
