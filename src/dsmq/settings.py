"""The settings: each is defined once, in `Settings`, with its unit, default, bounds and reason.

Later ones win: defaults, the TOML file, the environment (`DSMQ_` and the name in capitals), the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from dsmq import environment
from dsmq.errors import ConfigError
from dsmq.terminal import quoted
from dsmq.tokens import MIN_TOKEN_CHARACTERS, TOO_SHORT
from dsmq.wire.addresses import UNIX, host_names, parse_endpoint

Port = Annotated[int, Field(ge=0, le=65535)]


def _host(value: str) -> str:
    parse_endpoint(value)
    return value


def _tcp_host(value: str) -> str:
    if value.startswith(UNIX) or not value:
        raise ValueError("should be an address or a name")
    return _host(value)


def _token(value: SecretStr) -> SecretStr:
    token = value.get_secret_value()
    if token and (token.split() != [token] or not token.isascii()):
        raise ValueError("should be a token: ASCII, without blanks")
    if token and not token.strip("*"):
        raise ValueError("should be the token itself, not the mask it is shown by")
    if token and len(token) < MIN_TOKEN_CHARACTERS:
        raise ValueError(f"should have {TOO_SHORT}")
    return value


def _host_names(value: str) -> str:
    host_names(value)
    return value


Seconds = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Limit = Annotated[int, Field(ge=1, le=1_000_000)]
Timeout = Annotated[float, Field(gt=0, le=600, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=1, le=1_099_511_627_776)]
Secret = Annotated[SecretStr, AfterValidator(_token)]


def _interval(value: float) -> float:
    if 0 < value < 1:
        raise ValueError("input should be 0, or at least 1")
    return value


class Settings(BaseSettings):
    """All settings. The descriptions also appear in `--help` and `dsmq.toml.example`."""

    from_file: ClassVar[dict[str, Any]] = {}
    """The contents of the TOML file."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    host: Annotated[str, AfterValidator(_host)] = Field(
        "127.0.0.1",
        description="Where to listen: an IPv4 or IPv6 address, a host name, or unix:/path/of/socket. The default "
        "serves this machine only.",
    )
    port: Port = Field(30008, description="TCP port to listen on; 0 takes a free one. Not used with unix:.")
    protected_mode: bool = Field(
        default=True,
        description="Refuse to start if clients need neither a token nor a certificate and the server listens on "
        "anything but loopback or a Unix socket.",
    )
    auth_token: Secret = Field(
        SecretStr(""),
        description="Admin token that clients must present. Empty: see auth_token_file. It has no command-line "
        "option, because other users on the machine can read command lines.",
    )
    auth_token_file: str = Field(
        "",
        description="File of tokens, reloaded on SIGHUP. One per line: `name role token`, with role read, write (put "
        "and read) or admin; or a token alone, which is an admin's.",
    )
    auth_timeout_seconds: Timeout = Field(
        10.0, description="Time for a new connection to finish the TLS handshake and authenticate."
    )
    tls_cert_file: str = Field(
        "",
        description="The server's certificate chain, as PEM; reloaded on SIGHUP. If set, the server accepts TLS "
        "connections only.",
    )
    tls_key_file: str = Field("", description="The certificate's private key, as PEM. Empty: it is in tls_cert_file.")
    tls_client_ca_file: str = Field(
        "", description="CA certificates, as PEM. If set, clients must present a certificate signed by one of them."
    )
    http_host: Annotated[str, AfterValidator(_tcp_host)] = Field(
        "127.0.0.1",
        description="Where the HTTP endpoint listens. It serves a status page, /metrics, /healthz and /readyz.",
    )
    http_token: Secret = Field(
        SecretStr(""), description="Bearer token required for /metrics and for /status.json, the status page's data."
    )
    http_token_file: str = Field("", description="File that contains the bearer token, instead of http_token.")
    http_allowed_hosts: Annotated[str, AfterValidator(_host_names)] = Field(
        "",
        description="Comma-separated host names at which the HTTP endpoint answers, besides IP addresses and "
        "localhost. Other names get 421, which protects against DNS rebinding; /healthz and /readyz answer to any "
        "name.",
    )
    http_port: Port | Literal["off"] = Field(30009, description='TCP port of the HTTP endpoint; "off" disables it.')
    metrics_topics: int = Field(
        0,
        ge=0,
        le=1000,
        description="How many topics get their own metrics: those with the most puts. The rest are counted as `other`.",
    )
    health_timeout_seconds: Timeout = Field(
        10.0, description="How long a thread may be unresponsive before /healthz fails."
    )
    max_age_seconds: Seconds = Field(
        600.0,
        gt=0,
        le=31_536_000,
        description="Messages older than this are never delivered, and are deleted soon after.",
    )
    expiry_interval_seconds: Seconds = Field(
        1.0,
        ge=0.01,
        le=3600,
        description="How often expired messages are deleted. A shorter interval frees their memory sooner.",
    )
    snapshot_file: str = Field(
        "",
        description="Snapshot file: written on a graceful stop, loaded at start. Empty: no snapshots. Its directory "
        "must not be writable by other users; temporary files with similar names are created there.",
    )
    snapshot_interval_seconds: Annotated[Seconds, AfterValidator(_interval)] = Field(
        0.0,
        ge=0,
        le=3600,
        description="How often a snapshot is also written while the server runs, which limits what a crash or a power"
        " failure can lose. 0: only on a graceful stop; otherwise at least 1.",
    )
    max_message_bytes: int = Field(
        8_388_608,
        ge=1,
        le=536_870_912,
        description="Max size of a message. Each connection may make the server buffer one message of this size in "
        "memory.",
    )
    max_topic_bytes: int = Field(
        512,
        ge=1,
        le=4096,
        description="Max length of a topic name in UTF-8. Topic names are remembered after their messages are gone.",
    )
    max_topics: Count = Field(
        1_000_000, description="Max topics with stored messages. Each takes about 600 bytes plus its name."
    )
    max_stored_messages: Count = Field(
        10_000_000, description="Max stored messages. When it is reached, puts are refused until messages expire."
    )
    max_stored_bytes: Bytes = Field(
        1_073_741_824,
        description="Max bytes of stored messages and topic names, plus 100 bytes of overhead per message and 500 per"
        " topic. Messages of 1 to 7 KB may count up to 60 % more, because they leave part of their memory pages unused."
        " Allow for 1.3 times as much memory.",
    )
    max_stored_messages_per_topic: Count = Field(10_000_000, description="Max stored messages in one topic.")
    max_stored_bytes_per_topic: Bytes = Field(
        1_073_741_824, description="Max stored bytes in one topic, counted as for max_stored_bytes."
    )
    max_connections: Limit = Field(
        10_000,
        description="Max open connections; further ones are refused with an error. A lower limit on open files "
        "(ulimit -n) lowers it.",
    )
    max_connections_per_address: Limit = Field(
        10_000, description="Max open connections from one client address; IPv6 addresses count by their first 64 bits."
    )
    max_unauthenticated_connections: Limit = Field(
        1_000,
        description="Max connections that have not authenticated or finished the TLS handshake. When it is exceeded, "
        "the oldest is closed.",
    )
    max_unauthenticated_bytes: int = Field(
        16_384, ge=4096, le=1_048_576, description="Max size of a request from a client that has not authenticated."
    )
    max_waiting_readers: Limit = Field(
        10_000, description="Max clients waiting for a message; further ones get an error."
    )
    max_unread_reply_bytes: int = Field(
        16_777_216,
        ge=1024,
        le=1_073_741_824,
        description="Max unread reply bytes buffered for one client; above it, the server stops reading the client's "
        "requests. The default lets a client send 1,000,000 short requests before it reads a reply.",
    )
    max_total_unread_reply_bytes: Bytes = Field(
        268_435_456,
        description="Max unread reply bytes buffered for all clients together. Above it, requests that would add to "
        "it wait; after 1 s, the clients that hold the most and read slower than 16 KiB/s are disconnected. One "
        "message of the maximum size always fits.",
    )
    max_total_request_bytes: Bytes = Field(
        268_435_456,
        description="Max bytes buffered for the requests of all clients together. A request reserves its declared "
        "length when it begins; the positions of GET count too. Above it, input stays unread and the oldest request "
        "is read first; after 1 s, the clients that hold the most and send slower than 16 KiB/s are disconnected. One"
        " message of the maximum size always fits.",
    )
    request_timeout_seconds: Seconds = Field(
        30.0,
        gt=0,
        le=3600,
        description="Time from the first byte of a request to its last, plus the time its length takes at 16 KiB/s.",
    )
    reply_timeout_seconds: Seconds = Field(
        30.0, gt=0, le=3600, description="A client that does not read its replies for this long is disconnected."
    )
    idle_timeout_seconds: Seconds = Field(
        0.0,
        ge=0,
        le=31_536_000,
        description="A connection that sends no request for this long, and is not waiting for a message, is closed. "
        "0: never. TCP keepalive detects clients that vanished.",
    )
    stop_timeout_seconds: Timeout = Field(
        10.0, description="Time limit for a graceful stop; whatever is still running after it is logged and abandoned."
    )
    io_threads: int = Field(
        0,
        ge=0,
        le=64,
        description="Threads that serve connections. 0: one if Python has a GIL (more would be slower), otherwise one"
        " per core.",
    )
    busy_poll_microseconds: int = Field(
        100,
        ge=0,
        le=100_000,
        description="How long a thread polls for the next request before it sleeps, since waking a processor takes "
        "longer than most requests. Uses that much CPU time whenever clients pause. 0: no polling.",
    )
    listen_backlog: int = Field(
        1024, ge=1, le=65535, description="Max connections that the kernel queues until they are accepted."
    )
    allow_shutdown: bool = Field(
        default=True, description="Whether clients may stop the server (SHUTDOWN, mq.shutdown_server())."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level that is logged: debug, info, warning or error."
    )
    log_format: Literal["auto", "text", "json", "journal"] = Field(
        "auto",
        description="Log format: text; json, one object per line; journal, with priorities and without times; auto is"
        " journal under systemd, otherwise text.",
    )
    log_stream: Literal["stderr", "stdout"] = Field(
        "stderr",
        description="Where to log: stderr or stdout. Some container log collectors treat all of stderr as errors.",
    )
    max_log_lines_per_second: Limit = Field(
        10, description="Max lines logged per second for the same cause; the rest are counted and summarised later."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - it would read service links as settings
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        variables = {name: os.environ[given] for name, given in environment.variables().items() if name != "config"}
        return (init_settings, *(InitSettingsSource(settings_cls, values) for values in (variables, cls.from_file)))

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("should be text without NUL characters")
        # Python treats True as 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("should be something else than true or false")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        for name, needs in (
            ("tls_key_file", "tls_cert_file"),
            ("tls_client_ca_file", "tls_cert_file"),
            ("snapshot_interval_seconds", "snapshot_file"),
        ):
            if getattr(self, name) and not getattr(self, needs):
                raise ValueError(f"{name} is set without {needs}")
        if self.http_token.get_secret_value() and self.http_token_file:
            raise ValueError("http_token and http_token_file are both set")
        return self

    @property
    def logging(self) -> tuple[str, str, str, int]:
        """The arguments of `logs.start`."""
        return self.log_level, self.log_format, self.log_stream, self.max_log_lines_per_second

    @property
    def io_workers(self) -> int:
        """The number of I/O threads, with io_threads = 0 resolved."""
        if self.io_threads:
            return self.io_threads
        has_gil = not sysconfig.get_config_var("Py_GIL_DISABLED") or getattr(sys, "_is_gil_enabled", lambda: True)()
        return 1 if has_gil else os.cpu_count() or 1


class EmbeddedSettings(Settings):
    """The settings of `serve()` called as a function; no HTTP port, so that several servers can share a machine."""

    http_port: Port | Literal["off"] = "off"


def load(
    file: str | None = None, kind: type[Settings] = Settings, *, name_of: Callable[[str], str] = str, **given: Any
) -> Settings:
    """Return the effective settings; name_of maps the names of those `given` to what the caller calls them.

    file is the path of a TOML file; default: the one that DSMQ_CONFIG names, if any. Raises ConfigError.
    """
    file = file or os.environ.get(environment.variables().get("config", ""))
    if file:
        # pydantic-settings builds its sources from the class, so the file needs a subclass.
        kind = type(kind.__name__, (kind,), {"from_file": environment.read_toml(file), "__module__": __name__})
    try:
        return kind(**given)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(error, {name: name_of(name) for name in given}, file))) from None


# Replacements for pydantic's messages, which are written for programmers.
_MESSAGES = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
    "string_type": "should be text",
}


def _explain(error: ValidationError, given: dict[str, str], file: str | None) -> list[str]:
    unknown = []
    wrong: dict[str, list[str]] = {}
    values = {}
    for problem in error.errors(include_url=False):
        if not problem["loc"]:
            # Settings that contradict each other have no location.
            unknown.append(problem["msg"].removeprefix("Value error, "))
            continue
        name = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            sections = isinstance(problem["input"], dict)
            about = "there are no sections, all settings stand above them" if sections else ""
            unknown.append(f"{file or 'settings'}: {environment.unknown(name, str, about)}")
        else:
            message = _MESSAGES.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
            wrong.setdefault(name, []).append(message.removeprefix("Input "))
            values[name] = "" if is_secret(name) else f", not {quoted(problem['input'])}"
    sources = environment.variables() | given
    return unknown + [
        f"{sources.get(name, f'{file}: {name}')}: "
        f"{' or '.join(messages).replace(' or should be ', ' or ')}{values[name]}"
        for name, messages in wrong.items()
    ]


def is_secret(name: str) -> bool:
    """Return whether a setting's value must not be displayed."""
    return Settings.model_fields[name].annotation is SecretStr


def option(name: str) -> str:
    """Return the command-line option of a setting."""
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> Any:
    return default.get_secret_value() if isinstance(default, SecretStr) else default


def _as_option(default: Any) -> str:
    """Return a default as written on a command line."""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default) or "none"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --config and one option per setting to a command."""
    parser.add_argument("--config", metavar="FILE", help=f"TOML file; default: the one that {environment.CONFIG} names")
    for name, field in Settings.model_fields.items():
        if is_secret(name):
            # Other users on the machine can read command lines.
            continue
        about = f"{field.description} Default: {_as_option(field.default)}".replace("%", "%%")
        parser.add_argument(option(name), metavar="VALUE", dest=name, default=argparse.SUPPRESS, help=about)


def from_options(options: argparse.Namespace) -> Settings:
    """Return the effective settings for a command line. Raises ConfigError."""
    given = {name: value for name, value in vars(options).items() if name in Settings.model_fields}
    return load(options.config, name_of=option, **given)


def as_dict(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain values, secrets masked."""
    return settings.model_dump(mode="json")


def to_toml(settings: Settings) -> str:
    """Return the settings as TOML, secrets masked."""
    import tomli_w  # noqa: PLC0415 - servers never need it

    return tomli_w.dumps(as_dict(settings))


def example() -> str:
    """Return `dsmq.toml.example`: every setting, explained, with its default, commented out."""
    import tomli_w  # noqa: PLC0415 - servers never need it

    parts = [
        "# dsmq.toml: the settings of `dsmq serve`, all with their defaults. Use it with --config or DSMQ_CONFIG.\n"
        "# Each can also be given as DSMQ_NAME in the environment, or as --name on the command line; the last wins.\n"
    ]
    for name, field in Settings.model_fields.items():
        about = textwrap.fill(field.description or "", 110, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"{about}\n#{tomli_w.dumps({name: _shown(field.default)})}")
    return "\n".join(parts)
