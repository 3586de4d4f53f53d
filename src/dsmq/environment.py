"""Reads environment variables and the configuration file, for the server and the command line.

Imports only the standard library, so that client commands start fast.
"""

from __future__ import annotations

import ast
import codecs
import difflib
import os
import pkgutil
import re
import tomllib
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

from dsmq.errors import ConfigError

# Configuration and token files are shorter; this guards against files such as /dev/zero.
_MAX_TEXT_BYTES = 1_048_576
PREFIX = "DSMQ_"
# Variables that are not settings: the path of the configuration file and the servers that clients connect to.
_NOT_SETTINGS = ("config", "server")
# Variables that `dsmq work` sets for its command, which may use this package, too.
_JOB_VARIABLES = ("topic_name", "job_id", "attempt")
# Settings that only the configuration file can contain.
FILE_ONLY = ("topic",)

# NAME=value, as Kubernetes sets it in every container for a Service called dsmq or dsmq-…, and `docker --link` and
# Compose's `links` for a container of such a name.
_LINKS = re.compile(
    r"""(?:[^=]*_)?(?:SERVICE_HOST|SERVICE_PORT[^=]*|PORT_\d+_[^=]*|ENV_[^=]*)=.*
      | [^=]*PORT=(?:tcp|udp|sctp)://.*
      | NAME=.*
      | [^=]*_NAME=/[^/]+/[^/]+""",
    re.DOTALL | re.VERBOSE,
)


@cache
def settings() -> dict[str, str]:
    """Return the names of all settings, with their docstrings.

    They are read from the source of `dsmq.settings`, because importing it takes longer than running a client command.
    """
    module = ast.parse(pkgutil.get_data("dsmq", "settings.py") or b"")
    (found,) = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Settings"]
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(docstring.value).split())
        for field, docstring in pairwise(found.body)
        if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr)
    }


def read(file: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings in a TOML file and the environment, and each one's source, for error messages.

    By default, the file is the one named by DSMQ_CONFIG, if any. Raises ConfigError.
    """
    variables = _variables()
    variables.pop("server", None)
    default_file = os.environ.get(variables.pop("config", ""), "")
    file = default_file if file is None else file
    values = read_toml(file) if file else {}
    section = "unknown section; settings are not divided into sections"
    if wrong := [name for name in values if name not in settings()]:
        about = [f"{file}: {name}: {section if isinstance(values[name], dict) else unknown(name)}" for name in wrong]
        raise ConfigError("; ".join(about))
    sources = {name: f"{file}: {name}" for name in values} | variables
    return values | {name: os.environ[variable] for name, variable in variables.items()}, sources


def _variables() -> dict[str, str]:
    """Return dsmq's environment variables by setting name; ignore case, empty variables and service links."""
    found: dict[str, str] = {}
    for variable, value in sorted(os.environ.items()):
        name = variable[len(PREFIX) :].lower()
        if not value or not variable.upper().startswith(PREFIX) or name in _JOB_VARIABLES or _is_link(variable, value):
            continue
        if name not in settings() and name not in _NOT_SETTINGS:
            raise ConfigError(f"{variable}: {unknown(name, lambda known: PREFIX + known.upper())}")
        if name in FILE_ONLY:
            raise ConfigError(
                f"{variable}: rules for topics are [[{name}]] tables in a file; see --config and DSMQ_CONFIG"
            )
        other = found.setdefault(name, variable)
        if os.environ[other] != value:
            raise ConfigError(f"{other} and {variable} are both set, to different values")
    return found


def without_settings() -> dict[str, str]:
    """Return the environment without dsmq's variables, for child processes that should not see them."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}


def service_links() -> list[str]:
    """Return the environment variables that are ignored because they describe a service or container named dsmq."""
    return [variable for variable, value in sorted(os.environ.items()) if _is_link(variable, value)]


def _is_link(variable: str, value: str) -> bool:
    name = variable.upper()
    return name.startswith(PREFIX) and bool(_LINKS.fullmatch(f"{name.removeprefix(PREFIX)}={value}"))


def unknown(name: str, spell: Callable[[str], str] = str) -> str:
    """Return the error for an unknown setting; `spell` formats the name of a known one."""
    nearest = difflib.get_close_matches(name, settings(), n=1)
    return "unknown setting" + "".join(f"; did you mean {spell(known)}?" for known in nearest)


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
    """Return the text of a short UTF-8 file. Raises ConfigError."""
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
