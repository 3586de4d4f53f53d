"""Every error dsmq raises or sends.

    DSMQError
     ├─ ConfigError         a setting is wrong (also a ValueError)
     ├─ CannotStart         the server could not start
     ├─ ServerFailed        one of the server's threads died, or what it held could not be kept
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
         ├─ Denied            DENIED
         ├─ UnknownVersion    NOPROTO
         ├─ Full              FULL
         ├─ Forgotten         FORGOTTEN
         ├─ WrongEpoch        EPOCH
         ├─ Aborted           EXECABORT
         ├─ StoreFailed       STORE
         ├─ Busy              BUSY
         ├─ Closing           CLOSING
         ├─ TimedOut          TIMEOUT
         └─ InternalError     INTERNAL

The codes are those of PROTOCOL.md. A server that is not there raises the built-in ConnectionRefusedError.
"""

from __future__ import annotations

from typing import ClassVar


class DSMQError(Exception):
    """The base of all errors of dsmq.

    An error of `put_many` says how many messages were stored before the one that failed, and how many behind it.
    """

    stored_before = 0
    stored_behind = 0


class ConfigError(DSMQError, ValueError):
    """A setting is unknown or out of bounds, or the configuration file can't be read."""


class CannotStart(DSMQError):
    """The server could not start: its address is taken or not allowed, or its snapshot can't be read or written."""


class ServerFailed(DSMQError):
    """The server had to stop, because one of its threads died; or its last snapshot could not be written."""


class ConnectionLost(DSMQError, ConnectionError):
    """The connection broke, and could not be made anew in time, or not to the same server.

    may_be_stored tells of a put whether it may have been stored nevertheless.
    """

    def __init__(self, about: str, *, may_be_stored: bool = False) -> None:
        super().__init__(f"{about}; the message may have been stored" if may_be_stored else about)
        self.may_be_stored = may_be_stored


class ClientClosed(DSMQError, ConnectionError):
    """The client was used after `close()`, or closed by another thread during the call."""


class MessageNotText(DSMQError, ValueError):
    """The next message of the topic is not UTF-8. It stays unread: `raw=True` reads it as bytes."""


class ReplyError(DSMQError):
    """The server's answer was an error. `code` is the code on the wire."""

    code: ClassVar[str] = "ERROR"


class ProtocolError(ReplyError):
    """What came is not RESP; sent by a server, or raised by a client that can't read the reply."""

    code = "PROTOCOL"


class TooBig(ReplyError, ValueError):
    """A message, a topic or a request is over its limit."""

    code = "TOOBIG"


class UnknownCommand(ReplyError):
    """There is no such command."""

    code = "UNKNOWN"


class BadRequest(ReplyError, ValueError):
    """A command has the wrong number of arguments, or one that is not what it must be."""

    code = "BADREQUEST"


class NotPermitted(ReplyError):
    """The server's configuration does not allow it, or not to the role of this client's token."""

    code = "NOPERM"


class AuthRequired(ReplyError):
    """The server wants a token first; or the one shown has been withdrawn."""

    code = "NOAUTH"


class WrongToken(ReplyError):
    """The token is none that the server knows."""

    code = "WRONGPASS"


class Denied(ReplyError):
    """The server has no tokens, and so serves only clients on its own machine."""

    code = "DENIED"


class UnknownVersion(ReplyError):
    """HELLO asked for a version of RESP other than 2 and 3."""

    code = "NOPROTO"


class Full(ReplyError):
    """The store has no room, or a limit is reached; the message was not stored."""

    code = "FULL"


class Forgotten(ReplyError):
    """A put was sent again, and whether it has been stored is not remembered any more; now it was not."""

    code = "FORGOTTEN"


class WrongEpoch(ReplyError):
    """READ named another epoch than the server's, or PUT another run. The sentence begins with the right ones."""

    code = "EPOCH"


class Aborted(ReplyError):
    """EXEC ran nothing, because a request since MULTI was refused."""

    code = "EXECABORT"


class StoreFailed(ReplyError):
    """The store failed; a put answered so was not stored."""

    code = "STORE"


class Busy(ReplyError):
    """The server has as many connections, waiting readers, or tokens of one address to look at, as it takes."""

    code = "BUSY"


class Closing(ReplyError):
    """The server is stopping; a put answered so was not stored."""

    code = "CLOSING"


class TimedOut(ReplyError):
    """A request did not arrive in time, or the connection was idle for too long."""

    code = "TIMEOUT"


class InternalError(ReplyError):
    """A defect in the server."""

    code = "INTERNAL"


BY_CODE: dict[str, type[ReplyError]] = {error.code: error for error in ReplyError.__subclasses__()}


def from_reply(line: str) -> ReplyError:
    """Make the exception for an error reply, given without its leading `-`."""
    code, _, sentence = line.partition(" ")
    error = BY_CODE.get(code)
    return error(sentence) if error else ReplyError(line)
