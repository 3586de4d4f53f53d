"""Who may do what: tokens, the roles they give, and how guessing is slowed down."""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from dsmq import logs
from dsmq.errors import Busy, ConfigError

DEFAULT_USER = b"default"
"""The user of clients that name none: the token alone decides."""
# Failures are forgotten after so many seconds without a further one; so many addresses are remembered.
MEMORY_SECONDS = 60.0
MAX_ADDRESSES = 10_000
# How far apart the looks at tokens of one address come to be; and how long one may have to wait for its own: less than
# `dsmq ping` waits for the answer.
LONGEST_DELAY_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 2.0
# A shorter token can be guessed.
SAFE_TOKEN_BYTES = 16

_logger = logging.getLogger(__name__)


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
        seen.add(words[2])
        tokens.append((words[0], ROLES[words[1]], words[2]))
    if not tokens:
        raise ConfigError(f"{source}: there is no token in it")
    return tokens


def tokens_of(token: str, file: str) -> list[tuple[str, Role, str]]:
    """Return the tokens of two settings, `auth_token` and `auth_token_file`. Raises ConfigError."""
    return ([(DEFAULT_USER.decode(), Role.ADMIN, token)] if token else []) + (read_tokens(file) if file else [])


def warn_of_short(tokens: Iterable[tuple[str, Role, str]], *sources: str) -> None:
    """Log which tokens are too short, and where they may stand."""
    if short := [name for name, _, token in tokens if len(token) < SAFE_TOKEN_BYTES]:
        _logger.warning(
            "a token of less than %d characters can be guessed: %s (of %s)",
            SAFE_TOKEN_BYTES,
            ", ".join(short),
            ", ".join(filter(None, sources)),
            extra=logs.event("short_token", tokens=short),
        )


def read_tokens(file: str) -> list[tuple[str, Role, str]]:
    """Return the tokens in a file, as `parse_tokens` does. Raises ConfigError."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            text = stream.read()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"{file!r}: {error}") from None
    return parse_tokens(text, file)


def _roles() -> str:
    return ", ".join(ROLES)


@dataclass(slots=True)
class _Guesser:
    """A network that has shown wrong tokens lately."""

    failures: int = 0
    last: float = -math.inf
    next_look: float = -math.inf
    """From when on the next of its tokens may be looked at."""


class Gate:
    """Knows the tokens, and who has guessed wrong lately. Safe to use from several threads."""

    def __init__(
        self,
        tokens: Iterable[tuple[str, Role, str]] = (),
        delay_seconds: float = 0.1,
        wait_seconds: float = LONGEST_WAIT_SECONDS,
    ) -> None:
        """wait_seconds: see `turn`."""
        self.tokens = tuple(Token(name, role, _digest(token.encode())) for name, role, token in tokens)
        self._delay = delay_seconds
        self._wait = min(wait_seconds, LONGEST_WAIT_SECONDS)
        # In the order of their last failures.
        self._guessers: OrderedDict[str, _Guesser] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, user: bytes, token: bytes) -> Token | None:
        """Return what a client has shown to have, if it is one of the tokens."""
        digest = _digest(token)
        found = None
        # All are compared, and in constant time, so that the time it takes says nothing.
        for known in self.tokens:
            if hmac.compare_digest(known.digest, digest) and user in (DEFAULT_USER, known.name.encode()):
                found = known
        return found

    def changes(self, before: Gate) -> dict[str, list[str]]:
        """Return the names of the tokens that the gate before did not know, and of those that this one does not."""
        return {
            "tokens_new": [token.name for token in self.tokens if token not in before.tokens],
            "tokens_gone": [token.name for token in before.tokens if token not in self.tokens],
        }

    def turn(self, network: str) -> float:
        """Return in how many seconds a token of this network may be looked at, right or wrong.

        At once without a failure within the last minute. Else they take turns, however many come together: the first
        some time after the failure, each further one as much later. That time doubles with each failure, up to
        LONGEST_DELAY_SECONDS. Raises Busy where the wait would be longer than that for which a client has patience.
        """
        with self._lock:
            now = time.monotonic()
            guesser = self._recent(network, now)
            if not guesser.failures:
                return 0.0
            look_at = max(now, guesser.next_look)
            if look_at - now > self._wait:
                raise Busy("wrong tokens have come from this address, and others wait to be looked at: try again later")
            guesser.next_look = look_at + self._spacing(guesser)
            return look_at - now

    def fail(self, network: str) -> None:
        """Note that a client of this network has shown a wrong token."""
        with self._lock:
            now = time.monotonic()
            guesser = self._recent(network, now)
            guesser.failures += 1
            guesser.last = now
            # Behind those that have their turn already, too.
            guesser.next_look = max(guesser.next_look, now + self._spacing(guesser))
            self._guessers[network] = guesser
            self._guessers.move_to_end(network)
            if len(self._guessers) > MAX_ADDRESSES:
                self._guessers.popitem(last=False)

    def _recent(self, network: str, now: float) -> _Guesser:
        guesser = self._guessers.get(network)
        return guesser if guesser and now - guesser.last < MEMORY_SECONDS else _Guesser()

    def _spacing(self, guesser: _Guesser) -> float:
        # No more than the wait: whoever comes alone has a turn.
        return min(self._delay * 2.0 ** min(guesser.failures - 1, 32), LONGEST_DELAY_SECONDS, self._wait)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


@lru_cache(MAX_ADDRESSES)
def network(host: str) -> str:
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
