"""What environment variables and the configuration file say, for the server and for the command line.

Imports the standard library alone, so that the client commands start fast.
"""

from __future__ import annotations

import codecs
import logging
import os
import re
import tomllib
from typing import Any

from dsmq.errors import ConfigError

PREFIX = "DSMQ_"
CONFIG = "DSMQ_CONFIG"

# NAME=value, as Kubernetes sets it in every container for a Service called dsmq or dsmq-…, and `docker --link` and
# Compose's `links` for a container of such a name.
_LINKS = re.compile(
    r"""(?:[^=]*_)?(?:SERVICE_HOST|SERVICE_PORT[^=]*|PORT_\d+_[^=]*|ENV_[^=]*)=.*
      | [^=]*PORT=(?:tcp|udp|sctp)://.*
      | NAME=.*
      | [^=]*_NAME=/[^/]+/[^/]+""",
    re.DOTALL | re.VERBOSE,
)

# A longer one is no configuration file; /dev/zero has no end.
_MAX_FILE_BYTES = 1_048_576

_logger = logging.getLogger(__name__)


def variables() -> dict[str, str]:
    """Return dsmq's environment variables by the names of the settings, whose case does not matter.

    Leaves out empty ones, and those of service links. Raises ConfigError if two of them contradict each other.
    """
    found: dict[str, str] = {}
    for variable in sorted(_ours()):
        name = variable[len(PREFIX) :].lower()
        if _is_link(variable):
            continue
        other = found.setdefault(name, variable)
        if os.environ[other] != os.environ[variable]:
            raise ConfigError(f"{other} and {variable} are both set, to different values")
    return found


def log_links() -> None:
    """Log which environment variables are passed over."""
    if links := sorted(filter(_is_link, _ours())):
        _logger.debug("environment variables passed over as service links: %s", ", ".join(links))


def _ours() -> list[str]:
    return [variable for variable, value in os.environ.items() if value and variable.upper().startswith(PREFIX)]


def _is_link(variable: str) -> bool:
    return bool(_LINKS.fullmatch(f"{variable[len(PREFIX) :].upper()}={os.environ[variable]}"))


def read_toml(file: str) -> dict[str, Any]:
    """Return what a TOML file says. Raises ConfigError."""
    try:
        with open(file, "rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise ValueError(f"longer than {_MAX_FILE_BYTES} bytes")
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
            raise ValueError("should be UTF-8; this looks like UTF-16")
        return tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: should be UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except ValueError as error:
        about = str(error)
        raise ConfigError(f"{file}: {'a number has too many digits' if 'int_max_str' in about else about}") from None
