"""Addresses as settings and arguments write them."""

from __future__ import annotations

import re

UNIX = "unix:"
"""What the address of a Unix socket begins with."""
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def host_names(text: str) -> frozenset[str]:
    """Return the host names in a list separated by commas. Raises ValueError."""
    names = frozenset(name.strip().lower().removesuffix(".") for name in text.split(",") if name.strip())
    if not all(_NAME.fullmatch(name) for name in names):
        raise ValueError("should be host names separated by commas, without ports")
    return names
