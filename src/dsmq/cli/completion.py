"""Shell completion of commands, options and topics, using argcomplete."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from dsmq.cli import parser
from dsmq.errors import ConfigError, DSMQError
from dsmq.terminal import printable

if TYPE_CHECKING:
    from dsmq.client import DSMQClientSideConnection

Connect: TypeAlias = "Callable[[argparse.Namespace], DSMQClientSideConnection]"


def print_script(shell: str) -> None:
    """Print the completion script for a shell. Raises ConfigError if argcomplete is missing."""
    try:
        from argcomplete.shell_integration import shellcode  # noqa: PLC0415 - optional
    except ImportError:
        raise ConfigError("completion needs argcomplete: pip install 'dsmq[completion]'") from None
    sys.stdout.write(shellcode(["dsmq"], shell=shell) + "\n")


def complete(connect: Connect) -> None:
    """Print completions for the command line that the shell passes in the environment, and exit."""
    import argcomplete  # noqa: PLC0415 - optional

    argcomplete.autocomplete(parser.all_commands(partial(_topics, connect)), always_complete_options="long")


def _topics(connect: Connect, prefix: str, parsed_args: argparse.Namespace, **_: object) -> Iterable[str]:
    """Return the server's topics that a terminal can display; empty if the server can't be reached."""
    parsed_args.timeout = 1.0
    try:
        with connect(parsed_args) as mq:
            names = [name for name, _, _ in mq.topics()]
            return [name for name in names if name.startswith(prefix) and name == printable(name)]
    except (DSMQError, OSError):
        return []
