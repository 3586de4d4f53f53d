"""Tokens and certificates for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trustme

from dsmq.server import Server
from helpers import Wire

ADMIN, WRITER, READER = "admin-token-0123456789", "write-token-0123456789", "read-token-0123456789"
WRONG = "wrong-token-0123456789"
TOKENS = f"# a comment\n\n{ADMIN}\nsensors write {WRITER}\nscreen\tread\t{READER}\n"


@contextmanager
def wire_as(server: Server, token: str) -> Iterator[Wire]:
    """An authenticated connection."""
    wire = Wire(("127.0.0.1", server.port))
    try:
        assert wire.call("AUTH", token) == "OK"
        yield wire
    finally:
        wire.close()


class Files:
    """Certificates on disk."""

    def __init__(self, folder: Path, authority: trustme.CA) -> None:
        self.folder, self.authority = folder, authority
        self.ca = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        self.server = self.issue(authority, "server", "127.0.0.1", "localhost")
        self.client = self.issue(authority, "client", "someone@example.org")

    def issue(self, authority: trustme.CA, name: str, *subjects: str) -> str:
        file = self.folder / f"{name}.pem"
        authority.issue_cert(*subjects).private_key_and_cert_chain_pem.write_to_path(file)
        return str(file)
