"""Reads tokens from settings and files."""

from __future__ import annotations

from dsmq.broker.auth import DEFAULT_USER, Role
from dsmq.environment import read_text
from dsmq.errors import ConfigError
from dsmq.tokens import check_token

_ROLES = {"read": Role.READ, "write": Role.WRITE, "admin": Role.ADMIN}


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
