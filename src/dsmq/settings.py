"""The settings. Each is defined once, in `Settings`, with its unit, default, bounds and description.

Sources, in ascending order of precedence: defaults, the TOML file, the environment (`DSMQ_` and the name in capitals),
the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dsmq import environment
from dsmq.errors import ConfigError
from dsmq.setting_types import (
    EXAMPLE_TOPIC,
    YEAR_SECONDS,
    Age,
    Bytes,
    ClientTimeout,
    Count,
    Host,
    HostNames,
    HTTPPort,
    Limit,
    Port,
    Seconds,
    Size,
    StoreServers,
    TCPHost,
    Timeout,
    Token,
    TopicSettings,
    WhenFull,
    check_interval,
    explain_topic,
)
from dsmq.terminal import quoted


class Settings(BaseSettings):
    """All settings. `environment.settings` reads their docstrings for `--help` and `dsmq.toml.example`."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    host: Host = "127.0.0.1"
    """Address to listen on: IPv4, IPv6, a host name, or unix:/path/of/socket. 127.0.0.1 is local only."""
    port: Port = 30008
    """TCP port to listen on. 0: any free port. Not used with unix:."""
    protected_mode: bool = True
    """Don't start without tokens or client certificates, unless listening on loopback or a Unix socket only."""
    auth_token: Token = SecretStr("")
    """Admin token. Set it in the environment or a file: other users on the machine can read command lines."""
    auth_token_file: str = ""
    """Token file. Each line: `token` (an admin) or `name role token`. Roles: read, write (reads too), admin."""
    auth_timeout_seconds: Timeout = 10.0
    """Time limit for a new connection to finish the TLS handshake and authenticate."""
    tls_cert_file: str = ""
    """The server's certificate chain, as PEM. If set, the server accepts TLS connections only."""
    tls_key_file: str = ""
    """The certificate's private key, as PEM. If empty, it is in tls_cert_file."""
    tls_client_ca_file: str = ""
    """CA certificates, as PEM. If set, clients must present a certificate signed by one of them."""
    http_host: TCPHost = "127.0.0.1"
    """Address of the HTTP endpoint, which serves the status page, /metrics, /healthz and /readyz."""
    http_token: Token = SecretStr("")
    """Bearer token required for /metrics and for the status page's data. Without it, the page shows messages only if
    clients need neither token nor certificate, the server listens on TCP, and the endpoint is on loopback.
    """
    http_token_file: str = ""
    """File that contains the bearer token, instead of http_token."""
    http_allowed_hosts: HostNames = ""
    """Comma-separated host names accepted by the HTTP endpoint, besides localhost; guards against DNS rebinding."""
    http_port: HTTPPort = 30009
    """TCP port of the HTTP endpoint. 0: any free port. "off": no HTTP endpoint."""
    metrics_topics: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of topics with their own metrics: those with the most puts. The rest are summed up as `other`. The same
    number of groups of workers have their own metrics, too."""
    health_timeout_seconds: Timeout = 10.0
    """How long a thread may be unresponsive before /healthz fails."""
    max_age_seconds: Age = 600.0
    """Messages older than this are never delivered and are soon deleted."""
    expiry_interval_seconds: Annotated[Seconds, Field(ge=0.01, le=3600)] = 1.0
    """How often expired messages are deleted. A shorter interval frees memory sooner."""
    store: StoreServers = ""
    """Servers of a NATS cluster in which this and other dsmq servers store their messages: nats://HOST:PORT,HOST:PORT,
    or tls:// instead. Empty: messages are in this server's memory only.
    """
    store_stream: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")] = "dsmq"
    """The stream that stores the messages, created if it does not exist. Up to 64 letters, digits, _ and -."""
    store_replicas: Annotated[int, Field(ge=1, le=5)] = 3
    """How many NATS servers store each message: 3 survive the failure of one, 5 of two."""
    store_user: str = ""
    """User name for the NATS servers."""
    store_password_file: str = ""
    """File that contains the user's password."""
    store_token_file: str = ""
    """File that contains a token for the NATS servers, instead of user and password."""
    store_ca_file: str = ""
    """CA certificates, as PEM, for verifying the NATS servers. Empty: the system's."""
    snapshot_file: str = ""
    """Snapshot of the messages, written on a graceful stop and loaded at start. Empty: no snapshots. The file's
    directory must not be writable by other users."""
    snapshot_interval_seconds: Annotated[Seconds, Field(ge=0, le=3600), AfterValidator(check_interval)] = 0.0
    """Interval of snapshots while the server runs, at least 1: limits what a crash or power failure can lose. 0: a
    snapshot only on a graceful stop."""
    max_message_bytes: Annotated[int, Field(ge=1, le=536_870_912), Size] = 8_388_608
    """Max size of a message. Each connection may buffer one message of this size."""
    max_topic_bytes: Annotated[int, Field(ge=1, le=4096), Size] = 512
    """Max length of a topic name, in bytes of UTF-8. Names are remembered after their topics' messages are gone."""
    max_topics: Count = 1_000_000
    """Max topics with stored messages. Each takes about 600 bytes plus its name."""
    max_stored_messages: Count = 10_000_000
    """Max stored messages. At the limit, puts are refused until messages expire (but see when_full)."""
    max_stored_bytes: Bytes = 1_073_741_824
    """Max bytes of stored messages and topic names, plus 100 per message and 500 per topic. Messages of 1 to 7 KB may
    count up to 60 % more, because they leave part of their memory pages unused. Allow 1.3 times as much memory."""
    max_stored_messages_per_topic: Count = 10_000_000
    """Max stored messages in one topic."""
    max_stored_bytes_per_topic: Bytes = 1_073_741_824
    """Max stored bytes in one topic, counted as for max_stored_bytes."""
    when_full: WhenFull = "refuse"
    """What happens to a put at a limit on stored messages or bytes. refuse: it gets an error. drop_oldest: the oldest
    messages of its own topic are deleted until it fits.
    """
    max_connections: Limit = 10_000
    """Max open connections; further ones are refused. Lowered to fit the limit on open files (ulimit -n)."""
    max_connections_per_address: Limit = 10_000
    """Max open connections from one client address. IPv6 addresses count by their first 64 bits."""
    max_unauthenticated_connections: Limit = 1_000
    """Max connections that have not authenticated. Beyond the limit, the oldest is closed."""
    max_unauthenticated_bytes: Annotated[int, Field(ge=4096, le=1_048_576), Size] = 16_384
    """Max size of a request from a client that has not authenticated."""
    max_waiting_readers: Limit = 10_000
    """Max clients waiting for a message; further ones get an error."""
    max_waiting_patterns: Limit = 10_000
    """Max patterns that clients wait for, in total; requests beyond that get an error."""
    max_groups: Limit = 1_000
    """Max groups of workers. A group is forgotten if it is not used for as long as messages are kept."""
    max_jobs_in_flight: Limit = 10_000
    """Max unfinished jobs of a group of workers; at the limit, no new ones are given."""
    max_group_bytes: Bytes = 16_777_216
    """Max memory for the state of all groups of workers: about 1,300 bytes per group, 600 per unfinished job, 90 per
    remembered finished job, and 160 per topic of each group, plus the topics' names."""
    max_attempts: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Max number of times a job is given to workers. A job that is still not done is moved to the topic with /failed
    added to the name. 0: unlimited, until the job expires.
    """
    max_unread_reply_bytes: Annotated[int, Field(ge=1024, le=1_073_741_824), Size] = 16_777_216
    """Max unread reply bytes buffered for a client; above it, its requests are not read. The default is enough for
    1,000,000 short requests sent at once."""
    max_total_unread_reply_bytes: Bytes = 268_435_456
    """Max unread reply bytes buffered for all clients. Above it, requests that would add to it wait; after 1 s, the
    clients that hold the most and read slower than 16 KiB/s are disconnected. Raised to fit max_message_bytes."""
    max_total_request_bytes: Bytes = 268_435_456
    """Max bytes buffered for the requests of all clients: their declared lengths, the positions of GET, and the topics
    that clients wait for. Above it, all but short requests wait; after 1 s, the clients that hold the most and send
    slower than 16 KiB/s are disconnected. Raised to fit max_message_bytes."""
    request_timeout_seconds: ClientTimeout = 30.0
    """Time limit from a request's first byte to its last, plus the time its length takes at 16 KiB/s."""
    reply_timeout_seconds: ClientTimeout = 30.0
    """A client that neither reads its replies nor sends requests for this long is disconnected."""
    idle_timeout_seconds: Annotated[Seconds, Field(ge=0, le=YEAR_SECONDS)] = 0.0
    """A connection without a request for this long is closed, unless it is waiting for a message. 0: never; TCP
    keepalive detects clients that have vanished."""
    stop_timeout_seconds: Timeout = 10.0
    """Time limit for a graceful stop; the final snapshot may take up to a minute more. Threads still running after it
    are logged and abandoned."""
    io_threads: Annotated[int, Field(ge=0, le=64)] = 0
    """Threads that serve connections. 0: one if Python has a GIL, because more are slower, else one per core."""
    busy_poll_microseconds: Annotated[int, Field(ge=0, le=100_000)] = 100
    """How long a thread polls for the next request before it sleeps: faster than being woken up, but uses CPU time
    whenever clients pause. 0: no polling."""
    listen_backlog: Annotated[int, Field(ge=1, le=65535)] = 1024
    """Max connections that the kernel queues until they are accepted."""
    allow_shutdown: bool = True
    """Whether clients may stop the server (SHUTDOWN, mq.shutdown_server())."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level to log: debug, info, warning or error."""
    log_format: Literal["auto", "text", "json", "journal"] = "auto"
    """Log format: text; json, one object per line; journal, with priorities and without times; auto is journal under
    systemd, otherwise text."""
    log_stream: Literal["stderr", "stdout"] = "stderr"
    """Log to stderr or stdout. Some container log collectors treat all of stderr as errors."""
    max_log_lines_per_second: Limit = 10
    """Max lines logged per second for the same cause. The rest are counted and summarised."""
    topic: tuple[TopicSettings, ...] = ()
    """Limits for some topics. The first table whose pattern matches (* matches any characters) applies; for settings
    that it omits, the general limits apply. Only in this file, below all other settings. With store, these limits apply
    on all servers, as do when_full and the limits per topic: see deploy/cluster/README.md.
    """

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load` reads the other sources, because pydantic-settings would mistake service links for settings.
        return (init_settings,)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("should be text without NUL characters")
        if isinstance(value, bytes):
            raise ValueError("should not be bytes")
        # Python treats True as 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("should not be true or false")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        for name, needs in (
            ("tls_key_file", "tls_cert_file"),
            ("tls_client_ca_file", "tls_cert_file"),
            ("snapshot_interval_seconds", "snapshot_file"),
            ("store_password_file", "store_user"),
        ):
            if getattr(self, name) and not getattr(self, needs):
                raise ValueError(f"{name} is set without {needs}")
        if self.store and self.snapshot_file:
            raise ValueError("snapshot_file can't be used with store, which is already persistent")
        if self.store_user and self.store_token_file:
            raise ValueError("store_user and store_token_file are both set")
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
        # Python before 3.13 always has a GIL.
        has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        return 1 if has_gil else os.cpu_count() or 1


class EmbeddedSettings(Settings):
    """The settings for `serve()` in a program: no HTTP port, so that several servers can share a machine."""

    http_port: HTTPPort = "off"


def load(
    file: str | None = None, kind: type[Settings] = Settings, *, name_of: Callable[[str], str] = str, **given: Any
) -> Settings:
    """Return the effective settings; name_of maps the name of a `given` setting to the caller's name for it, for
    errors.

    file is the path of a TOML file; default: the one named by DSMQ_CONFIG, if any. Raises ConfigError.
    """
    values, sources = environment.read(file)
    if (given.get("store") or values.get("store")) and sources.get("snapshot_file", "").startswith(environment.PREFIX):
        # The container image and the systemd unit set these, for a store in memory.
        for name in ("snapshot_file", "snapshot_interval_seconds"):
            values.pop(name, None)
    sources |= {name: name_of(name) for name in given}
    try:
        return kind(**(values | given))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(error, sources))) from None


# The heading above each group of settings, by the group's first setting.
SUBJECTS = {
    "host": "Listening",
    "protected_mode": "Authentication and TLS",
    "http_host": "HTTP endpoint",
    "max_age_seconds": "Messages",
    "max_connections": "Clients",
    "stop_timeout_seconds": "Server",
    "log_level": "Log",
    "topic": "Topics",
}


# Replacements for pydantic's messages, which are written for programmers.
_MESSAGES = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
    "string_type": "should be text",
    "missing": "is missing",
    **dict.fromkeys(("tuple_type", "model_type"), "should be written as tables: [[topic]]"),
}


def _explain(error: ValidationError, sources: dict[str, str]) -> Iterator[str]:
    """Yield one explanation per setting; `sources` maps a setting to its source."""
    messages: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        message = _MESSAGES.get(problem["type"]) or problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if len(problem["loc"]) > 2:
            yield explain_topic(sources[name], problem["loc"], problem["type"], message, problem["input"])
        elif not name:
            # Settings that contradict each other have no location.
            yield message
        elif problem["type"] != "extra_forbidden":
            value = "" if is_secret(name) else f", not {quoted(problem['input'])}"
            # Each member of a union reports its own reason.
            before = messages.get(name, "").removesuffix(value)
            messages[name] = (f"{before} or {message.removeprefix('should be ')}" if before else message) + value
        else:
            yield f"{sources[name]}: {environment.unknown(name)}"
    yield from (f"{sources[name]}: {message}" for name, message in messages.items())


def is_secret(name: str) -> bool:
    """Return whether a setting's value must not be displayed."""
    return Settings.model_fields[name].annotation is SecretStr


def changed(settings: Settings) -> dict[str, Any]:
    """Return the settings that differ from their defaults, secrets masked."""
    values, fields = settings.model_dump(mode="json"), type(settings).model_fields
    return {name: values[name] for name, field in fields.items() if getattr(settings, name) != field.default}


def option(name: str) -> str:
    """Return the command-line option of a setting."""
    return "--" + name.replace("_", "-")


def _as_option(default: Any) -> str:
    """Return a default as written on a command line."""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default) or "none"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --config and one option per setting to a command."""
    parser.add_argument("--config", metavar="FILE", help="TOML file; default: the one named by DSMQ_CONFIG")
    group: argparse._ArgumentGroup
    for name, field in Settings.model_fields.items():
        if name in SUBJECTS:
            group = parser.add_argument_group(SUBJECTS[name])
        if is_secret(name) or name in environment.FILE_ONLY:
            # Other users on the machine can read command lines.
            continue
        about = f"{environment.settings()[name]} Default: {_as_option(field.default)}".replace("%", "%%")
        added = group.add_argument(option(name), metavar="VALUE", dest=name, default=argparse.SUPPRESS, help=about)
        if (kind := field.annotation) is bool or get_origin(kind) is Literal:
            values = ("true", "false") if kind is bool else get_args(kind)
            # For shell completion.
            added.completer = lambda values=values, **_: values  # type: ignore[attr-defined]


def from_options(options: argparse.Namespace) -> Settings:
    """Return the effective settings for a command line. Raises ConfigError."""
    names = Settings.model_fields.keys() - environment.FILE_ONLY
    given = {name: value for name, value in vars(options).items() if name in names}
    return load(options.config, name_of=option, **given)


def to_toml(settings: Settings) -> str:
    """Return the settings as TOML, secrets masked."""
    import tomli_w  # noqa: PLC0415 - servers never need it

    values = settings.model_dump(mode="json", exclude_none=True)
    # Tables, unlike an array, can be added to.
    return "\n[[topic]]\n".join(map(tomli_w.dumps, (values, *values.pop("topic"))))


def example() -> str:
    """Return `dsmq.toml.example`: every setting with its description and default, commented out."""
    import tomli_w  # noqa: PLC0415 - servers never need it

    parts = [
        "# dsmq.toml: the settings of `dsmq serve`, all with their defaults. Use it with --config or DSMQ_CONFIG.\n"
        "# Each can also be given as DSMQ_NAME in the environment, or as --name on the command line; the last wins.\n"
    ]
    for name, field in Settings.model_fields.items():
        if name in SUBJECTS:
            parts.append(f"## {SUBJECTS[name]}\n")
        about = textwrap.fill(environment.settings()[name], 110, initial_indent="# ", subsequent_indent="# ")
        more = EXAMPLE_TOPIC if name == "topic" else ""
        parts.append(f"{about}\n{more}#{tomli_w.dumps({name: '' if is_secret(name) else field.default})}")
    return "\n".join(parts)
