"""The access rules: tokens, TLS, access to the HTTP endpoint. A reload replaces all of them together."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsmq.broker import listener
from dsmq.broker.auth import Authenticator, HTTPAuthenticator, load_tokens, read_tokens
from dsmq.errors import ConfigError
from dsmq.settings import Settings
from dsmq.wire.addresses import host_names

if TYPE_CHECKING:
    from ssl import SSLContext


@dataclass(frozen=True, slots=True)
class Access:
    """The access rules in the settings and the files they refer to. Immutable."""

    authenticator: Authenticator
    http_authenticator: HTTPAuthenticator
    tls: SSLContext | None
    client_ca_file: str
    certificates_modified_ns: tuple[int, ...]
    protected_mode: bool

    @classmethod
    def load(cls, settings: Settings) -> Access:
        """Read the files given in the settings. Raises ConfigError."""
        authenticator = Authenticator(load_tokens(settings.auth_token.get_secret_value(), settings.auth_token_file))
        token = settings.http_token.get_secret_value()
        if settings.http_token_file:
            token = read_tokens(settings.http_token_file)[0][2]
        http_authenticator = HTTPAuthenticator(token.encode(), host_names(settings.http_allowed_hosts))
        tls, files = None, (settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
        # Taken before the files are read, so that the next reload detects a change made in between.
        modified = tuple(os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files)
        if settings.tls_cert_file:
            from dsmq.wire.tls import server_context  # noqa: PLC0415 - not needed without TLS

            tls = server_context(*files)
        return cls(
            authenticator, http_authenticator, tls, settings.tls_client_ca_file, modified, settings.protected_mode
        )

    @property
    def connection_rules(self) -> tuple[bool, str]:
        """The rules that open connections depend on: a reload that changes these disconnects them."""
        return self.tls is not None, self.client_ca_file

    def may_show_messages(self, *, is_open: bool) -> bool:
        """Return whether the HTTP endpoint may show messages to its authorized clients.

        `is_open`: the endpoint can be reached only from this machine, where any program can connect to the server
        anyway.
        """
        if self.http_authenticator.token:
            return True
        return is_open and not (self.authenticator.tokens or self.client_ca_file)

    def exposed(self, sockets: Iterable[socket.socket]) -> list[str]:
        """Return the addresses where other machines may connect without authentication."""
        if self.authenticator.tokens or self.client_ca_file:
            return []
        return [listener.address(sock) for sock in sockets if listener.is_exposed(sock)]

    def check_exposure(self, sockets: Iterable[socket.socket]) -> None:
        """Raise ConfigError if protected_mode is on and other machines may connect without authentication."""
        if self.protected_mode and (exposed := self.exposed(sockets)):
            raise ConfigError(
                f"listening on {', '.join(exposed)} requires authentication: set auth_token (DSMQ_AUTH_TOKEN), "
                "auth_token_file or tls_client_ca_file, or protected_mode = false (DSMQ_PROTECTED_MODE) to allow anyone"
            )
