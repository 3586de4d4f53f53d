"""Who may do what: tokens, the roles they give, and access to the HTTP endpoint."""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from dsmq.environment import read_text
from dsmq.errors import ConfigError
from dsmq.tokens import MIN_TOKEN_CHARACTERS, TOO_SHORT

DEFAULT_USER = b"default"
"""The user of clients that name none: the token alone decides."""
_HOST = re.compile(r"(?P<name>\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]*)?")
# As /etc/hosts of common systems has them; nobody can register one of these.
_LOOPBACK_NAMES = frozenset(
    ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
)
# Addresses whose network is cached.
_MAX_ADDRESSES = 10_000


class Role(enum.IntEnum):
    """What a client may do. Each may do all that those before it may."""

    NOBODY = 0
    READ = 1
    WRITE = 2
    ADMIN = 3


ROLES = {role.name.lower(): role for role in Role if role is not Role.NOBODY}


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is kept: not itself, but its digest."""

    name: str
    role: Role
    digest: bytes


def parse_tokens(text: str, source: str) -> list[tuple[str, Role, str]]:
    """Return the tokens in a file's text: name, role and token of each line.

    A line is `name role token`, or a token alone, which is that of an admin; blank lines and those that begin with #
    are passed over. source is named in the ConfigError, which never shows what stands in a line.
    """
    tokens: list[tuple[str, Role, str]] = []
    seen = set()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) == 1:
            words = [DEFAULT_USER.decode(), "admin", *words]
        if len(words) != 3 or words[1] not in ROLES:
            raise ConfigError(f"{source}, line {number}: not `token`, nor `name role token` with one of {_roles()}")
        if not words[2].isascii() or words[2] in seen:
            raise ConfigError(f"{source}, line {number}: the token is not ASCII, or stands there already")
        if len(words[2]) < MIN_TOKEN_CHARACTERS:
            raise ConfigError(f"{source}, line {number}: a token should have {TOO_SHORT}")
        seen.add(words[2])
        tokens.append((words[0], ROLES[words[1]], words[2]))
    if not tokens:
        raise ConfigError(f"{source}: there is no token in it")
    return tokens


def tokens_of(token: str, file: str) -> list[tuple[str, Role, str]]:
    """Return the tokens of two settings, `auth_token` and `auth_token_file`. Raises ConfigError."""
    return ([(DEFAULT_USER.decode(), Role.ADMIN, token)] if token else []) + (read_tokens(file) if file else [])


def read_tokens(file: str) -> list[tuple[str, Role, str]]:
    """Return the tokens in a file, as `parse_tokens` does. Raises ConfigError."""
    return parse_tokens(read_text(file), file)


def _roles() -> str:
    return ", ".join(ROLES)


class Authenticator:
    """The tokens that are valid. Never changes, so it is safe to use from several threads."""

    def __init__(self, tokens: Iterable[tuple[str, Role, str]] = ()) -> None:
        self.tokens = tuple(Token(name, role, _digest(token.encode())) for name, role, token in tokens)

    def admit(self, user: bytes, token: bytes) -> Token | None:
        """Return what a client has shown to have, if it is one of the tokens."""
        digest = _digest(token)
        found = None
        # All are compared, and in constant time, so that the time it takes says nothing.
        for known in self.tokens:
            if hmac.compare_digest(known.digest, digest) and user in (DEFAULT_USER, known.name.encode()):
                found = known
        return found

    def changes(self, before: Authenticator) -> dict[str, list[str]]:
        """Return the names of the tokens that the gate before did not know, and of those that this one does not."""
        return {
            "tokens_new": [token.name for token in self.tokens if token not in before.tokens],
            "tokens_gone": [token.name for token in before.tokens if token not in self.tokens],
        }


@dataclass(frozen=True, slots=True)
class HTTPAuthenticator:
    """Who may use the HTTP endpoint: its bearer token, and the host names by which it may be addressed."""

    token: bytes = b""
    names: frozenset[str] = frozenset()

    def admits(self, authorization: str) -> bool:
        """Return whether an Authorization header has the token, or none is needed."""
        scheme, _, token = authorization.partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        return not self.token or hmac.compare_digest(given, self.token)

    def answers_to(self, host: str) -> bool:
        """Return whether a Host header has an IP address, a loopback name, or one of the names; any port.

        A web page that makes its own name resolve to this machine (DNS rebinding) can send only that name.
        """
        match = _HOST.fullmatch(host.strip().lower())
        if match is None:
            return False
        name = match["name"].removesuffix(".")
        return name in self.names or name in _LOOPBACK_NAMES or name.endswith(".localhost") or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


@lru_cache(_MAX_ADDRESSES)
def client_key(host: str) -> str:
    """Return what stands for one client: an IPv4 address, but all IPv6 addresses with the same first 64 bits."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address)
