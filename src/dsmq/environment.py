"""Reads environment variables and the configuration file, for the server and the command line.

Imports the standard library alone, so that the client commands start fast.
"""

from __future__ import annotations

import codecs
import difflib
import logging
import os
import re
import tomllib
from collections.abc import Callable
from typing import Any

from dsmq.errors import ConfigError

# Files of settings or tokens are shorter; this guards against files such as /dev/zero.
_MAX_TEXT_BYTES = 1_048_576
PREFIX = "DSMQ_"
CONFIG = "DSMQ_CONFIG"

# The names of `settings.Settings`, which takes longer to import than a client command runs.
SETTINGS = """
    host port protected_mode auth_token auth_token_file auth_timeout_seconds tls_cert_file tls_key_file
    tls_client_ca_file http_host http_token http_token_file http_allowed_hosts http_port metrics_topics
    health_timeout_seconds max_age_seconds expiry_interval_seconds snapshot_file snapshot_interval_seconds
    max_message_bytes max_topic_bytes max_topics max_stored_messages max_stored_bytes max_stored_messages_per_topic
    max_stored_bytes_per_topic max_connections max_connections_per_address max_unauthenticated_connections
    max_unauthenticated_bytes max_waiting_readers max_unread_reply_bytes max_total_unread_reply_bytes
    max_total_request_bytes request_timeout_seconds reply_timeout_seconds idle_timeout_seconds stop_timeout_seconds
    io_threads busy_poll_microseconds listen_backlog allow_shutdown log_level log_format log_stream
    max_log_lines_per_second
""".split()  # noqa: SIM905 - a literal would take 49 lines

# NAME=value, as Kubernetes sets it in every container for a Service called dsmq or dsmq-…, and `docker --link` and
# Compose's `links` for a container of such a name.
_LINKS = re.compile(
    r"""(?:[^=]*_)?(?:SERVICE_HOST|SERVICE_PORT[^=]*|PORT_\d+_[^=]*|ENV_[^=]*)=.*
      | [^=]*PORT=(?:tcp|udp|sctp)://.*
      | NAME=.*
      | [^=]*_NAME=/[^/]+/[^/]+""",
    re.DOTALL | re.VERBOSE,
)

_logger = logging.getLogger(__name__)


def variables() -> dict[str, str]:
    """Return dsmq's environment variables by setting name, ignoring case.

    Skips empty variables and service links. Raises ConfigError if one is unknown or two contradict each other.
    """
    found: dict[str, str] = {}
    for variable in sorted(_ours()):
        name = variable[len(PREFIX) :].lower()
        if _is_link(variable):
            continue
        if name not in (*SETTINGS, "config"):
            raise ConfigError(f"{variable}: {unknown(name, lambda known: PREFIX + known.upper())}")
        other = found.setdefault(name, variable)
        if os.environ[other] != os.environ[variable]:
            raise ConfigError(f"{other} and {variable} are both set, to different values")
    return found


def unknown(name: str, name_of: Callable[[str], str] = str, about: str = "") -> str:
    """Return the error for an unknown setting, with `about` or the closest known name as a hint."""
    if not about and (nearest := difflib.get_close_matches(name, SETTINGS, n=1)):
        about = f"the nearest known one is '{name_of(nearest[0])}'"
    return f"unknown setting '{name_of(name)}'" + (f"; {about}" if about else "")


def log_links() -> None:
    """Log which environment variables are ignored as service links."""
    if links := sorted(filter(_is_link, _ours())):
        _logger.debug("environment variables passed over as service links: %s", ", ".join(links))


def _ours() -> list[str]:
    return [variable for variable, value in os.environ.items() if value and variable.upper().startswith(PREFIX)]


def _is_link(variable: str) -> bool:
    return bool(_LINKS.fullmatch(f"{variable[len(PREFIX) :].upper()}={os.environ[variable]}"))


def read_toml(file: str) -> dict[str, Any]:
    """Return the contents of a TOML file. Raises ConfigError."""
    text = read_text(file)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except ValueError as error:
        about = str(error)
        raise ConfigError(f"{file}: {'a number has too many digits' if 'int_max_str' in about else about}") from None


def read_text(file: str) -> str:
    """Return the text of a short file in UTF-8. Raises ConfigError."""
    try:
        with open(file, "rb") as stream:
            data = stream.read(_MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        # The name contains a NUL.
        raise ConfigError(f"{file!r}: {error}") from None
    if len(data) > _MAX_TEXT_BYTES:
        raise ConfigError(f"{file}: longer than {_MAX_TEXT_BYTES} bytes")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ConfigError(f"{file}: should be UTF-8; this looks like UTF-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: should be UTF-8") from None
