"""The identity and role of a client, and its limits before authentication."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsmq.broker.auth import Role, Token
from dsmq.errors import AuthRequired, BadRequest, WrongToken

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection

# Max requests of a client that is not authenticated.
MAX_UNAUTHENTICATED_REQUESTS = 16
# How long requests still get replies after a wrong token. Some libraries report the error only once their whole
# handshake has been answered.
WRONG_TOKEN_SECONDS = 0.1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection."""

    number: int
    client_key: str
    """Identifies the client even if it has many addresses: see `auth.client_key`."""
    name: str
    """Host and port, for logs and the status page."""
    admitted_by: tuple[bool, str]
    """See `Access.connection_rules`."""

    @property
    def encrypted(self) -> bool:
        return self.admitted_by[0]


@dataclass(slots=True, eq=False)
class Login:
    """A client's role. It is NOBODY until a valid token arrives, within a limited time and number of requests."""

    connection: Connection
    role: Role = Role.NOBODY
    token: Token | None = None
    deadline: float = math.inf
    """When to disconnect the client, because it has not authenticated or has sent a wrong token."""
    gave_wrong_token: bool = False
    requests: int = field(default=0, init=False)

    def authenticate(self, user: bytes, token: bytes) -> None:
        """Take on the role of a token. Raises WrongToken or BadRequest."""
        connection = self.connection
        authenticator = connection.context.access.authenticator
        if not authenticator.tokens:
            raise BadRequest("this server requires no token")
        found = authenticator.authenticate(user, token)
        if found is None:
            _logger.warning("%r: invalid token", connection, extra=connection.event("wrong_token"))
            connection.counters.wrong_tokens += 1
            # Only one guess per connection.
            self.role, self.gave_wrong_token = Role.NOBODY, True
            self.deadline = connection.loop.now + WRONG_TOKEN_SECONDS
            connection.schedule(self.deadline)
            connection.set_bounds()
            raise WrongToken("invalid token")
        self.token, self.role = found, found.role
        connection.set_bounds()
        self.admit()

    def admit(self) -> None:
        """Stop counting the client as unauthenticated once it has a role and the TLS handshake is done."""
        if not self.connection.unauthenticated:
            self.deadline = math.inf
            self.connection.context.usage.unauthenticated.drop(self.connection)

    def count_request(self) -> None:
        """Count a request before authentication. Raises AuthRequired if there are too many, or after a wrong token."""
        self.requests += 1
        if self.requests > MAX_UNAUTHENTICATED_REQUESTS:
            self.connection.finish()
            raise AuthRequired(f"too many requests before authentication (limit: {MAX_UNAUTHENTICATED_REQUESTS})")
        if self.gave_wrong_token:
            raise AuthRequired("an invalid token was sent on this connection")

    def apply_settings(self) -> None:
        """Disconnect the client if its rules have changed; admit it if tokens are no longer required."""
        connection, access = self.connection, self.connection.context.access
        tokens = access.authenticator.tokens
        if connection.unauthenticated and not self.gave_wrong_token:
            self.deadline = connection.opened_at + connection.context.settings.auth_timeout_seconds
        if connection.peer.admitted_by != access.connection_rules:
            connection.disconnect("the server's access rules have changed")
        elif self.role is Role.NOBODY and not (tokens or self.gave_wrong_token):
            self.role = Role.ADMIN
            connection.set_bounds()
            self.admit()
        elif self.role is not Role.NOBODY and self.token not in tokens and (self.token or tokens):
            connection.disconnect("the token is no longer valid, or has another role")
