"""Replaces files atomically; `PositionFile` keeps the position from which the next run continues."""

from __future__ import annotations

import argparse
import os
import stat
from contextlib import suppress
from pathlib import Path

from dsmq.cli import arguments
from dsmq.errors import ConfigError

_MAX_BYTES = 1024


def replace_file(path: str, data: bytes) -> None:
    """Create or replace a file atomically. Raises OSError or ConfigError."""
    # If the path is a symbolic link, replace its target, not the link.
    target = Path(os.path.realpath(path))
    check_regular(target)
    name = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
    try:
        # The umask determines the mode of a new file.
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(descriptor)
            with suppress(FileNotFoundError):
                os.chmod(name, stat.S_IMODE(target.stat().st_mode))
            os.replace(name, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise OSError(error.errno, f"{target}: {error.strerror}") from None


def check_regular(path: Path | str) -> None:
    """Raise ConfigError if the path is something other than a file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{path}: not a regular file")


class PositionFile:
    """A file that contains one position."""

    def __init__(self, path: str) -> None:
        self._path = os.path.realpath(path)
        self._saved = ""

    def load(self) -> int | str | None:
        """Return the position, or None if the file does not exist. Raises ConfigError."""
        check_regular(Path(self._path))
        try:
            with open(self._path, "rb") as stream:
                return arguments.position(stream.read(_MAX_BYTES).decode().strip())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}") from None
        except (ValueError, argparse.ArgumentTypeError):
            raise ConfigError(f"{self._path}: does not contain a position") from None

    def save(self, position: str) -> None:
        """Replace the position. Raises OSError."""
        if position != self._saved:
            replace_file(self._path, position.encode() + b"\n")
            self._saved = position
