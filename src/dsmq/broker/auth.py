"""Tokens and the roles they grant, and access to the HTTP endpoint."""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

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
