"""The types of settings: text, numbers with bounds, sizes in bytes, and [[topic]] tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator

from dsmq import environment
from dsmq.terminal import quoted
from dsmq.tokens import check_token
from dsmq.wire.addresses import UNIX, host_names, parse_endpoint, parse_store

# For the example file, because the default has no tables.
EXAMPLE_TOPIC = """#
#   [[topic]]
#   pattern = "camera/*"
#   max_messages = 30
#   max_bytes = "64MB"
#   max_age_seconds = 5
#   when_full = "drop_oldest"
"""


def _parses(parse: Callable[[str], object]) -> AfterValidator:
    """Check that text can be parsed, but keep it unchanged."""

    def check(text: str) -> str:
        parse(text)
        return text

    return AfterValidator(check)


def _not_unix(host: str) -> str:
    if host.startswith(UNIX) or not host:
        raise ValueError("should be an address or a host name")
    return host


def _check_secret(value: SecretStr) -> SecretStr:
    if token := value.get_secret_value():
        check_token(token)
    return value


def check_interval(value: float) -> float:
    if 0 < value < 1:
        raise ValueError("should be 0, or at least 1")
    return value


def _parse_size(value: object) -> object:
    """Convert text such as 2GB or 1.5 MiB to a number of bytes; return anything else unchanged."""
    found = _SIZE_TEXT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        if isinstance(value, str) and any(map(str.isalpha, value)):
            raise ValueError("should be a number of bytes, or a size such as 2GB or 512MiB")
        return value
    size = Fraction(found[1]) * _UNITS[found[2].lower()]
    if size.denominator > 1:
        raise ValueError("should be a whole number of bytes")
    return int(size)


def _check_pattern(pattern: str) -> str:
    if not 0 < len(pattern.encode()) <= 4096:
        raise ValueError("should have 1 to 4096 bytes")
    return pattern


_UNITS = {"b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for unit, base in (("b", 1000), ("ib", 1024))
}
_SIZE_TEXT = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*((?:[KMGT]i?)?B)\s*", re.IGNORECASE | re.ASCII)
Size = BeforeValidator(_parse_size)

Host = Annotated[str, _parses(parse_endpoint)]
TCPHost = Annotated[Host, AfterValidator(_not_unix)]
HostNames = Annotated[str, _parses(host_names)]
Port = Annotated[int, Field(ge=0, le=65535)]
StoreServers = Annotated[str, _parses(parse_store)]
HTTPPort = Port | Literal["off"]
Token = Annotated[SecretStr, AfterValidator(_check_secret)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
Timeout = Annotated[Seconds, Field(gt=0, le=600)]
ClientTimeout = Annotated[Seconds, Field(gt=0, le=3600)]
Limit = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Bytes = Annotated[int, Field(ge=1, le=1_099_511_627_776), Size]
YEAR_SECONDS = 31_536_000
Age = Annotated[Seconds, Field(gt=0, le=YEAR_SECONDS)]
WhenFull = Literal["refuse", "drop_oldest"]


class TopicSettings(BaseModel):
    """A [[topic]] table: limits for the topics that match a pattern. None: as for all topics."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: Annotated[str, AfterValidator(_check_pattern)]
    max_messages: Count | None = None
    max_bytes: Bytes | None = None
    max_age_seconds: Age | None = None
    when_full: WhenFull | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool(cls, value: object) -> object:
        if isinstance(value, bool):
            # Python treats True as 1.
            raise ValueError("should not be true or false")
        return value


def explain_topic(source: str, at: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    """Explain what is wrong in a [[topic]] table."""
    key = str(at[2])
    if kind == "extra_forbidden":
        if key in environment.settings():
            message = "this setting is for all topics; put it above the first [[topic]]"
        else:
            message = f"unknown; the settings in [[topic]] are {', '.join(TopicSettings.model_fields)}"
    elif kind != "missing":
        message += f", not {quoted(value)}"
    return f"{source} {int(at[1]) + 1}: {key}: {message}"
