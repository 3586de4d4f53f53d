"""Addresses of servers, as settings and arguments write them."""

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
    """Parse an address, a host name, or `unix:/path`; an IPv6 address may have brackets. Raises ValueError."""
    if host.startswith(UNIX):
        path, host = host.removeprefix(UNIX), ""
    else:
        path = ""
        if host.startswith("[") != host.endswith("]"):
            host = ""
        host = host.removeprefix("[").removesuffix("]")
    if not (host or path):
        raise ValueError("should be an address, a name, or unix:/path")
    return Endpoint(host, port, path)


def host_names(text: str) -> frozenset[str]:
    """Parse a list of host names separated by commas. Raises ValueError."""
    names = frozenset(name.strip().lower().removesuffix(".") for name in text.split(",") if name.strip())
    if not all(_NAME.fullmatch(name) for name in names):
        raise ValueError("should be host names separated by commas, without ports")
    return names
