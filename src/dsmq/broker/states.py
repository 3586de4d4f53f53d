"""The states of a connection."""

from __future__ import annotations

import enum


class State(enum.IntEnum):
    """What a connection does next. From FINISHING on, it only moves down this list."""

    HANDSHAKE = 0
    """Begins TLS. Nothing can be sent to the client yet."""
    OPEN = 1
    """Runs requests as they arrive."""
    BEHIND = 2
    """Has requests left for the next turn, or until the client reads replies. Receives nothing meanwhile."""
    WAITING = 3
    """Owes a reply until there is a message, or the store answers. The requests behind it have to wait."""
    NO_ROOM = 4
    """Waits in the queue of a budget: for a reply, or for the rest of an incomplete request."""
    FINISHING = 5
    """Runs no more requests, and lingers when all replies have been sent."""
    LINGERING = 6
    """Has sent all replies and the end of the stream. The client is to hang up."""
    CLOSED = 7


# An attribute of an enum takes several times as long to read as a name of the module.
HANDSHAKE, OPEN, BEHIND, WAITING, NO_ROOM, FINISHING, LINGERING, CLOSED = State
