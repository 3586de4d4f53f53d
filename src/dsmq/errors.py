"""The errors that dsmq raises or sends; all derive from DSMQError.

Connecting to a server that is not running raises the built-in ConnectionRefusedError.
"""

from __future__ import annotations

from typing import ClassVar


class DSMQError(Exception):
    """Base class of dsmq's errors.

    If `put_many` raises it, stored_before and stored_after count the messages stored before and after the one that
    failed.
    """

    stored_before = 0
    stored_after = 0


class ConfigError(DSMQError, ValueError):
    """A setting is unknown or invalid, or a file of settings, tokens or certificates can't be used."""


class StartupError(DSMQError):
    """The server could not start: for example, its address is in use, or its snapshot can't be read or written."""


class ServerFailed(DSMQError):
    """The server stopped because one of its threads died, or could not write its final snapshot."""


class ConnectionLost(DSMQError, ConnectionError):
    """The connection broke and could not be restored in time, or only to a different server.

    may_be_stored: whether the message of a failed put may have been stored.
    """

    def __init__(self, about: str, *, may_be_stored: bool = False) -> None:
        super().__init__(f"{about}; the message may have been stored" if may_be_stored else about)
        self.may_be_stored = may_be_stored


class ClientClosed(DSMQError, ConnectionError):
    """The client was used after `close()`, or another thread closed it during the call."""


class MessageNotText(DSMQError, ValueError):
    """The next message is not UTF-8. It stays unread; read it as bytes with `raw=True`."""


class ReplyError(DSMQError):
    """The server replied with an error. PROTOCOL.md lists the codes."""

    code: ClassVar[str] = "ERROR"

    def __init_subclass__(cls, *, code: str) -> None:
        cls.code = code


class ProtocolError(ReplyError, code="PROTOCOL"):
    """Invalid RESP: the server could not parse the request, or the client could not parse the reply."""


class TooBig(ReplyError, ValueError, code="TOOBIG"):
    """A message, a topic or a request exceeds its size limit."""


class UnknownCommand(ReplyError, code="UNKNOWN"):
    """Unknown command."""


class BadRequest(ReplyError, ValueError, code="BADREQUEST"):
    """A command has the wrong number of arguments or an invalid one."""


class NotPermitted(ReplyError, code="NOPERM"):
    """The server's configuration, or the role of the client's token, does not allow the command."""


class AuthRequired(ReplyError, code="NOAUTH"):
    """Authentication is required, or the client's token has been revoked."""


class WrongToken(ReplyError, code="WRONGPASS"):
    """Invalid token."""


class UnknownVersion(ReplyError, code="NOPROTO"):
    """HELLO requested a RESP version other than 2 or 3."""


class Full(ReplyError, code="FULL"):
    """A limit on messages or on jobs is reached. A put was not stored; a worker got no job."""


class Forgotten(ReplyError, code="FORGOTTEN"):
    """The server no longer remembers whether a retried put was stored, and did not store it now."""


class WrongEpoch(ReplyError, code="EPOCH"):
    """The epoch in a request, or the run in PUT, is not the server's; the message begins with the server's."""


class Aborted(ReplyError, code="EXECABORT"):
    """EXEC ran no command, because one after MULTI was refused."""


class StoreFailed(ReplyError, code="STORE"):
    """The store failed. If a put gets this reply, its message was not stored."""


class Unsure(ReplyError, code="UNSURE"):
    """It is unknown whether the message was stored or the change was made. Clients repeat a put with AGAIN."""


class JobLost(ReplyError, code="JOBLOST"):
    """The client no longer holds the job: its lease has ended, or it was done or given back. Nothing has changed."""


class Busy(ReplyError, code="BUSY"):
    """A limit on connections, waiting readers or their patterns is reached."""


class ShuttingDown(ReplyError, code="CLOSING"):
    """The server is shutting down. If a put gets this reply, its message was not stored."""


class TimedOut(ReplyError, code="TIMEOUT"):
    """A request did not arrive in time, or the connection was idle too long."""


class InternalError(ReplyError, code="INTERNAL"):
    """A bug in the server."""


BY_CODE: dict[str, type[ReplyError]] = {error.code: error for error in ReplyError.__subclasses__()}


def from_reply(line: str) -> ReplyError:
    """Return the exception for an error reply, given without its leading `-`."""
    code, _, sentence = line.partition(" ")
    error = BY_CODE.get(code)
    return error(sentence) if error else ReplyError(line)
