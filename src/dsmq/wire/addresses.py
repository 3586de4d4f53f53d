"""Parses addresses of servers in settings and arguments."""

from __future__ import annotations

import re
from typing import NamedTuple

NATS_PORT = 4222
UNIX = "unix:"
"""The prefix of a Unix socket's path."""
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
# Matches text that can't be an address or a host name, such as a URL: it has invalid characters, or a label that is
# empty or too long.
_NOT_IN_HOST = re.compile(r"[\s\x00-\x1f\x7f\ud800-\udfff,/@]|\.\.|[^.]{64}")


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
    brackets = host.startswith("["), host.endswith("]")
    is_host = any(brackets) == all(brackets) and name.count(":") != 1 and not _NOT_IN_HOST.search(name)
    if not name or not (is_unix or is_host):
        raise ValueError("should be an address or a host name, without a port, or unix:/path")
    return Endpoint("", port, name) if is_unix else Endpoint(name, port)


def split_port(address: str) -> tuple[str, str]:
    """Split `host:port` or `[::1]:port`; the port is empty if there is none."""
    with_port = None if address.startswith(UNIX) else re.fullmatch(r"(\[.*\]|[^:]+):([^:]+)", address)
    return (with_port[1], with_port[2]) if with_port else (address, "")


def host_names(text: str) -> frozenset[str]:
    """Parse a list of host names separated by commas. Raises ValueError."""
    names = frozenset(name.strip().lower().removesuffix(".") for name in text.split(",") if name.strip())
    if not all(_NAME.fullmatch(name) for name in names):
        raise ValueError("should be host names separated by commas, without ports")
    return names


def parse_store(text: str) -> tuple[list[Endpoint], bool]:
    """Parse `nats://host:port,host:port`, with default port 4222; return the servers and whether to use TLS.

    Empty text means no servers. Raises ValueError.
    """
    scheme, separator, servers = text.partition("://")
    if not text:
        return [], False
    if not separator or scheme not in ("nats", "tls") or not servers:
        raise ValueError("should be empty, nats://HOST:PORT,… or tls://HOST:PORT,…")
    return [_parse_server(server) for server in servers.rstrip("/").split(",")], scheme == "tls"


def _parse_server(address: str) -> Endpoint:
    host, port = split_port(address)
    if "@" in host:
        raise ValueError("should contain no credentials: see store_user, store_password_file and store_token_file")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ValueError(f"should have ports from 1 to 65535, not {port}")
    return parse_endpoint(host, int(port or NATS_PORT))
