"""Every error dsmq raises or sends.

    DSMQError
     ├─ ConfigError         a setting is wrong (also a ValueError)
     ├─ StartupError         the server could not start
     ├─ ServerFailed        a server thread died, or the last snapshot could not be written
     ├─ ConnectionLost      the connection broke (also a ConnectionError)
     ├─ ClientClosed        used after close() (also a ConnectionError)
     ├─ MessageNotText      the next message is not UTF-8 (also a ValueError)
     └─ ReplyError          the server answered with an error, by code:
         ├─ ProtocolError     PROTOCOL
         ├─ TooBig            TOOBIG (also a ValueError)
         ├─ UnknownCommand    UNKNOWN
         ├─ BadRequest        BADREQUEST (also a ValueError)
         ├─ NotPermitted      NOPERM
         ├─ AuthRequired      NOAUTH
         ├─ WrongToken        WRONGPASS
         ├─ UnknownVersion    NOPROTO
         ├─ Full              FULL
         ├─ Forgotten         FORGOTTEN
         ├─ WrongEpoch        EPOCH
         ├─ Aborted           EXECABORT
         ├─ StoreFailed       STORE
         ├─ Busy              BUSY
         ├─ ShuttingDown      CLOSING
         ├─ TimedOut          TIMEOUT
         └─ InternalError     INTERNAL

PROTOCOL.md lists the codes. Connecting to a server that is not running raises the built-in ConnectionRefusedError.
"""

from __future__ import annotations

from typing import ClassVar


class DSMQError(Exception):
    """Base class of dsmq's errors.

    If `put_many` raises it: how many messages were stored before the one that failed, and how many after it.
    """

    stored_before = 0
    stored_behind = 0


class ConfigError(DSMQError, ValueError):
    """A setting is unknown or out of bounds, or the configuration file can't be read."""


class StartupError(DSMQError):
    """The server could not start: its address is in use or not allowed, or its snapshot can't be read or written."""


class ServerFailed(DSMQError):
    """The server stopped because one of its threads died, or could not write its last snapshot."""


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
    """The server replied with an error. `code` is its code in the protocol."""

    code: ClassVar[str] = "ERROR"


class ProtocolError(ReplyError):
    """Invalid RESP: the server could not parse the request, or the client could not parse the reply."""

    code = "PROTOCOL"


class TooBig(ReplyError, ValueError):
    """A message, a topic or a request exceeds its size limit."""

    code = "TOOBIG"


class UnknownCommand(ReplyError):
    """Unknown command."""

    code = "UNKNOWN"


class BadRequest(ReplyError, ValueError):
    """A command has the wrong number of arguments, or an invalid one."""

    code = "BADREQUEST"


class NotPermitted(ReplyError):
    """The server's configuration, or the role of the client's token, does not allow the command."""

    code = "NOPERM"


class AuthRequired(ReplyError):
    """Authentication is required, or the client's token has been revoked."""

    code = "NOAUTH"


class WrongToken(ReplyError):
    """Invalid token."""

    code = "WRONGPASS"


class UnknownVersion(ReplyError):
    """HELLO requested a RESP version other than 2 or 3."""

    code = "NOPROTO"


class Full(ReplyError):
    """A storage limit is reached; the message was not stored."""

    code = "FULL"


class Forgotten(ReplyError):
    """The server no longer remembers whether a retried put was stored; it did not store it now."""

    code = "FORGOTTEN"


class WrongEpoch(ReplyError):
    """READ named another epoch, or PUT another run, than the server's; the message begins with the correct one."""

    code = "EPOCH"


class Aborted(ReplyError):
    """EXEC ran no command, because one queued since MULTI was refused."""

    code = "EXECABORT"


class StoreFailed(ReplyError):
    """The store failed. If a put gets this reply, its message was not stored."""

    code = "STORE"


class Busy(ReplyError):
    """The limit on connections or waiting readers is reached."""

    code = "BUSY"


class ShuttingDown(ReplyError):
    """The server is shutting down. If a put gets this reply, its message was not stored."""

    code = "CLOSING"


class TimedOut(ReplyError):
    """A request did not arrive in time, or the connection was idle too long."""

    code = "TIMEOUT"


class InternalError(ReplyError):
    """A bug in the server."""

    code = "INTERNAL"


BY_CODE: dict[str, type[ReplyError]] = {error.code: error for error in ReplyError.__subclasses__()}


def from_reply(line: str) -> ReplyError:
    """Return the exception for an error reply, given without its leading `-`."""
    code, _, sentence = line.partition(" ")
    error = BY_CODE.get(code)
    return error(sentence) if error else ReplyError(line)
