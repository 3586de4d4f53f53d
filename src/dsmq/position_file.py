"""A file that holds the position from which the next run of a command continues."""

from __future__ import annotations

import argparse
import os
import stat
from contextlib import suppress
from pathlib import Path

from dsmq import cli_parser
from dsmq.errors import ConfigError

_MAX_BYTES = 1024


class PositionFile:
    """A file that contains one position and is replaced atomically."""

    def __init__(self, path: str) -> None:
        # If it is a symbolic link, replace the target, not the link.
        self._path = Path(os.path.realpath(path))
        self._saved = ""

    def load(self) -> int | str | None:
        """Return the position, or None if the file does not exist. Raises ConfigError."""
        if os.path.exists(self._path) and not os.path.isfile(self._path):
            raise ConfigError(f"{self._path}: not a regular file")
        try:
            with self._path.open("rb") as stream:
                return cli_parser.position(stream.read(_MAX_BYTES).decode().strip())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}") from None
        except (ValueError, argparse.ArgumentTypeError):
            raise ConfigError(f"{self._path}: contains no position") from None

    def save(self, position: str) -> None:
        """Replace the position atomically. Raises OSError."""
        if position == self._saved:
            return
        name = self._path.with_name(f".{self._path.name}.{os.urandom(8).hex()}")
        try:
            # The umask determines the mode of a new file.
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                with open(descriptor, "w") as stream:
                    stream.write(position + "\n")
                    stream.flush()
                    os.fsync(descriptor)
                with suppress(FileNotFoundError):
                    os.chmod(name, stat.S_IMODE(self._path.stat().st_mode))
                os.replace(name, self._path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            raise OSError(error.errno, f"{self._path}: {error.strerror}") from None
        self._saved = position
