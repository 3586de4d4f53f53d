"""Tokens, the files that contain them, the roles they grant, and access to the HTTP endpoint."""

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
from dsmq.tokens import check_token

DEFAULT_USER = b"default"
"""The user that matches any token."""
_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::[0-9]*)?")
# Names for loopback in /etc/hosts of common systems. Nobody can register them as domains.
_LOOPBACK_NAMES = frozenset(
    ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
)
_MAX_CACHED_ADDRESSES = 10_000


class Role(enum.IntEnum):
    """The permissions of a client. Each role includes those before it."""

    NOBODY = 0
    READ = 1
    WRITE = 2
    ADMIN = 3


_ROLES = {"read": Role.READ, "write": Role.WRITE, "admin": Role.ADMIN}


@dataclass(frozen=True, slots=True)
class Token:
    name: str
    role: Role
    digest: bytes


class Authenticator:
    """The valid tokens, as digests. Immutable, so that threads can share it."""

    def __init__(self, tokens: Iterable[tuple[str, Role, str]] = ()) -> None:
        """A token is a tuple of its name, role and text."""
        self.tokens = tuple(Token(name, role, _digest(text.encode())) for name, role, text in tokens)

    def authenticate(self, user: bytes, token: bytes) -> Token | None:
        """Return the token that a client sent, if it is valid."""
        digest = _digest(token)
        found = None
        # Compare with all tokens, each in constant time, so that the timing reveals nothing.
        for known in self.tokens:
            if hmac.compare_digest(known.digest, digest) and user in (DEFAULT_USER, known.name.encode()):
                found = known
        return found

    def changes(self, before: Authenticator) -> dict[str, list[str]]:
        """Return the names of the tokens added and removed since an earlier authenticator."""
        return {
            "tokens_new": [token.name for token in self.tokens if token not in before.tokens],
            "tokens_gone": [token.name for token in before.tokens if token not in self.tokens],
        }


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def load_tokens(token: str, file: str) -> list[tuple[str, Role, str]]:
    """Return the tokens in the settings `auth_token` and `auth_token_file`, as `read_tokens` does."""
    tokens = read_tokens(file) if file else []
    return [(DEFAULT_USER.decode(), Role.ADMIN, token), *tokens] if token else tokens


def read_tokens(file: str) -> list[tuple[str, Role, str]]:
    """Return the name, role and text of each token in a file. Raises ConfigError, whose text never contains a token.

    A line is `name role token`, or just the token of an admin. Empty lines and lines that begin with # are skipped.
    """
    tokens: dict[str, tuple[str, Role, str]] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, role, token = words if len(words) == 3 else (DEFAULT_USER.decode(), "admin", words[-1])
        if len(words) not in (1, 3) or role not in _ROLES:
            raise ConfigError(
                f"{file}, line {number}: should be `token`, or `name role token` where role is read, write or admin"
            )
        try:
            check_token(token)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from None
        if token in tokens:
            raise ConfigError(f"{file}, line {number}: this token is a duplicate")
        tokens[token] = name, _ROLES[role], token
    if not tokens:
        raise ConfigError(f"{file}: contains no tokens")
    return list(tokens.values())


@dataclass(frozen=True, slots=True)
class HTTPAuthenticator:
    """Controls access to the HTTP endpoint by a bearer token (empty: not required) and by host names."""

    token: bytes = b""
    names: frozenset[str] = frozenset()

    def is_authorized(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        return not self.token or hmac.compare_digest(given, self.token)

    def accepts_host(self, host: str) -> bool:
        """Check a Host header: an IP address, a loopback name, or one of the names, with any port.

        A web page whose host name resolves to this machine (DNS rebinding) can only send that name.
        """
        host = host.strip().lower()
        match = _HOST.fullmatch(host)
        name = match[1].removesuffix(".") if match else ""
        is_loopback = name in _LOOPBACK_NAMES or name.endswith(".localhost")
        # An IPv6 address without brackets is not valid, but it is not a name either.
        return name in self.names or is_loopback or _is_address(name.strip("[]")) or _is_address(host)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@lru_cache(_MAX_CACHED_ADDRESSES)
def client_key(host: str) -> str:
    """Return an IPv4 address, or the /64 network of an IPv6 address, because one client may own the whole network."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and not address.ipv4_mapped:
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)
