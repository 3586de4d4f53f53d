"""The settings as keyword arguments of `serve` and `Server`, for type checkers, editors and help().

`dsmq.settings` defines them; a test compares the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

from dsmq.settings import EmbeddedSettings, Settings, is_secret, load

# Settings that a reload does not change.
RESTART_REQUIRED = (
    *("host", "port", "listen_backlog", "http_host", "http_port"),
    *("io_threads", "busy_poll_microseconds", "expiry_interval_seconds", "max_connections", "max_log_lines_per_second"),
    *("log_format", "log_stream", "snapshot_file", "snapshot_interval_seconds", "store", "store_stream"),
    *("store_replicas", "store_user", "store_password_file", "store_token_file", "store_ca_file"),
)

F = TypeVar("F", bound=Callable[..., Any])


class ServeOptions(TypedDict, total=False):
    """The settings that `serve` takes besides host and port."""

    protected_mode: bool
    auth_token: str
    auth_token_file: str
    auth_timeout_seconds: float
    tls_cert_file: str
    tls_key_file: str
    tls_client_ca_file: str
    http_host: str
    http_token: str
    http_token_file: str
    http_allowed_hosts: str
    http_port: int | Literal["off"]
    metrics_topics: int
    health_timeout_seconds: float
    max_age_seconds: float
    expiry_interval_seconds: float
    store: str
    store_stream: str
    store_replicas: int
    store_user: str
    store_password_file: str
    store_token_file: str
    store_ca_file: str
    snapshot_file: str
    snapshot_interval_seconds: float
    max_message_bytes: int
    max_topic_bytes: int
    max_topics: int
    max_stored_messages: int
    max_stored_bytes: int
    max_stored_messages_per_topic: int
    max_stored_bytes_per_topic: int
    when_full: Literal["refuse", "drop_oldest"]
    max_connections: int
    max_connections_per_address: int
    max_unauthenticated_connections: int
    max_unauthenticated_bytes: int
    max_waiting_readers: int
    max_waiting_patterns: int
    max_groups: int
    max_jobs_in_flight: int
    max_group_bytes: int
    max_attempts: int
    max_unread_reply_bytes: int
    max_total_unread_reply_bytes: int
    max_total_request_bytes: int
    request_timeout_seconds: float
    reply_timeout_seconds: float
    idle_timeout_seconds: float
    stop_timeout_seconds: float
    io_threads: int
    busy_poll_microseconds: int
    listen_backlog: int
    allow_shutdown: bool
    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["auto", "text", "json", "journal"]
    log_stream: Literal["stderr", "stdout"]
    max_log_lines_per_second: int
    topic: Sequence[Mapping[str, str | float]]


class ServerOptions(ServeOptions, total=False):
    """The settings that `Server` takes."""

    host: str
    port: int


def list_options(function: F) -> F:
    """Replace **options with one parameter per setting in the signature that help() and editors show."""
    signature = inspect.signature(function)
    *parameters, _ = signature.parameters.values()
    taken = [parameter.name for parameter in parameters]
    for name, field in EmbeddedSettings.model_fields.items():
        if name not in taken:
            kind = ServerOptions.__annotations__[name].__forward_arg__
            default = "" if is_secret(name) else field.default
            one = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            parameters.append(one)
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def choose_settings(settings: Settings | None, options: ServerOptions) -> Settings:
    """Return `settings` or else load them from options. Raises TypeError or ConfigError."""
    if settings and options:
        raise TypeError("Server takes either settings or options, not both")
    return settings or load(kind=EmbeddedSettings, **options)
