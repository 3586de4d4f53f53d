"""Addresses of servers, as in settings and arguments."""

from __future__ import annotations

import re
from typing import NamedTuple

UNIX = "unix:"
"""The prefix of a Unix socket's path."""
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


class Endpoint(NamedTuple):
    """A TCP host and port, or the path of a Unix socket."""

    host: str
    """An IPv4 or IPv6 address, without brackets, or a host name; empty for a Unix socket."""
    port: int
    path: str = ""

    def __str__(self) -> str:
        """Return `127.0.0.1:30008`, `[::1]:30008`, or `unix:/path`."""
        if self.path:
            return UNIX + self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(host: str, port: int = 0) -> Endpoint:
    """Parse an address or a host name, without a port, or `unix:/path`. Raises ValueError.

    An IPv6 address may have brackets.
    """
    is_unix = host.startswith(UNIX)
    name = host.removeprefix(UNIX) if is_unix else host.removeprefix("[").removesuffix("]")
    if not name or (not is_unix and (host.startswith("[") != host.endswith("]") or name.count(":") == 1)):
        raise ValueError("should be an address or a name, without a port, or unix:/path")
    return Endpoint("", port, name) if is_unix else Endpoint(name, port)


def host_names(text: str) -> frozenset[str]:
    """Parse a list of host names separated by commas. Raises ValueError."""
    names = frozenset(name.strip().lower().removesuffix(".") for name in text.split(",") if name.strip())
    if not all(_NAME.fullmatch(name) for name in names):
        raise ValueError("should be host names separated by commas, without ports")
    return names
