"""The states of a connection."""

from __future__ import annotations

import enum


class State(enum.IntEnum):
    """The state of a connection. Once it is FINISHING, it only moves down this list."""

    HANDSHAKE = 0
    """In the TLS handshake. Nothing can be sent to the client yet."""
    OPEN = 1
    """Runs requests as they arrive."""
    BEHIND = 2
    """Has requests to run in the next turn or once the client has read replies. Until then, receives nothing."""
    WAITING = 3
    """Waits for a message or the store's answer before it can reply. Further requests are buffered."""
    NO_ROOM = 4
    """Waits for memory for a reply or for the rest of an incomplete request."""
    FINISHING = 5
    """Runs no more requests. Starts lingering when all replies have been sent."""
    LINGERING = 6
    """Has shut down its sending side after the last reply and waits for the client to disconnect."""
    CLOSED = 7


# Reading an attribute of an enum takes several times as long as reading a module's variable.
HANDSHAKE, OPEN, BEHIND, WAITING, NO_ROOM, FINISHING, LINGERING, CLOSED = State
