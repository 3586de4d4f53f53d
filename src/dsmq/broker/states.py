"""The states of a connection."""

from __future__ import annotations

import enum


class State(enum.IntEnum):
    """The state of a connection. From FINISHING on, it only moves down this list."""

    HANDSHAKE = 0
    """Begins TLS. Nothing can be sent to the client yet."""
    OPEN = 1
    """Runs requests as they arrive."""
    BEHIND = 2
    """Has requests to run in the next turn, or when the client has read replies. Receives nothing until then."""
    WAITING = 3
    """Owes a reply until there is a message, or the store answers. Further requests are buffered."""
    NO_ROOM = 4
    """Waits for memory, for a reply or the rest of an incomplete request."""
    FINISHING = 5
    """Runs no more requests. Lingers when all replies have been sent."""
    LINGERING = 6
    """Has ended the stream after the last reply, and waits for the client to disconnect."""
    CLOSED = 7


# An attribute of an enum takes several times as long to read as a name of the module.
HANDSHAKE, OPEN, BEHIND, WAITING, NO_ROOM, FINISHING, LINGERING, CLOSED = State
