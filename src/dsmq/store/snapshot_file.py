"""The snapshot file: an SQLite database, followed by a trailer with its digest.

    database | size | digest | restores | check | dsmq-snapshot-01

The digest covers the database and its size. `restores` counts how often the file has been restored; it is updated in
place and covered by the check. SQLite ignores bytes after its pages.

A new file is written under another name, flushed to disk, and renamed over the previous one. So if the process is
killed or the power fails, one of the two exists and is complete.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from dsmq.store.schema import SCHEMA, SNAPSHOT_SCHEMA

VERSION = 1
_NAME = b"dsmq-snapshot-"
_MAGIC = _NAME + b"%02d" % VERSION
_DIGEST_BYTES = 32
# Size, digest, restores, check, magic. Because it follows pages of 4,096 bytes, it never spans two sectors of a disk.
_TRAILER = struct.Struct(">Q32sQ8s16s")
_RESTORES_AT = 40
_RESTORES = struct.Struct(">Q8s")
_READ_BYTES = 1_048_576
# No journal is needed: an incomplete file is deleted, and a complete one is synced at the end. temp_store: otherwise,
# SQLite would sort large indexes in a temporary folder, which may not be writable.
_PRAGMAS = "journal_mode = OFF", "synchronous = OFF", "temp_store = MEMORY", "cache_size = -16384"


class Unusable(Exception):
    """The file is damaged, has another version, or is not a snapshot."""


class Abandoned(Exception):
    """The server is stopping and does not wait for the snapshot."""


class Snapshot(NamedTuple):
    """A verified snapshot."""

    size: int
    """The size of the database in bytes."""
    digest: bytes
    restores: int


def temporary(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def write(path: Path, fill: Callable[[sqlite3.Connection], object], on_progress: Callable[[], None]) -> int:
    """Write a new snapshot with `fill` and replace the previous one; return the size of the file.

    If anything fails, including on_progress, which is called periodically, the previous snapshot stays. Raises OSError
    or sqlite3.Error.
    """
    new = temporary(path)
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with closing(sqlite3.connect(new, isolation_level=None)) as database:
            for pragma in _PRAGMAS:
                database.execute(f"PRAGMA {pragma}")
            fill(database)
        size = _seal(new, on_progress)
        new.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    return size


def rehearse(path: Path) -> None:
    """Write an empty snapshot next to the real one and delete it, to find problems at start rather than at stop.

    Raises OSError or sqlite3.Error.
    """
    trial = temporary(path)
    try:
        write(trial, create_tables, lambda: None)
    finally:
        trial.unlink(missing_ok=True)


def create_tables(database: sqlite3.Connection) -> None:
    """Create missing tables. The index is created at the end, which is faster."""
    database.executescript(SCHEMA + SNAPSHOT_SCHEMA)


def _seal(path: Path, on_progress: Callable[[], None]) -> int:
    """Append the trailer and sync the file; return its size."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        digest = _digest(file, size, on_progress)
        file.seek(size)
        file.write(_TRAILER.pack(size, digest, 0, _check(digest, 0), _MAGIC))
        file.flush()
        os.fsync(file.fileno())
    return size + _TRAILER.size


def _digest(file: BinaryIO, size: int, on_progress: Callable[[], None] = lambda: None) -> bytes:
    digest = hashlib.blake2b(struct.pack(">Q", size), digest_size=_DIGEST_BYTES)
    file.seek(0)
    left = size
    while left and (piece := file.read(min(left, _READ_BYTES))):
        digest.update(piece)
        left -= len(piece)
        on_progress()
    return digest.digest()


def _check(digest: bytes, restores: int) -> bytes:
    return hashlib.blake2b(digest + struct.pack(">Q", restores), digest_size=8).digest()


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> Snapshot:
    """Check every byte of a snapshot. Raises OSError if it can't be read, Unusable if it is damaged."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        if end < _TRAILER.size:
            raise Unusable("it is truncated, or not a snapshot" if end else "it is empty")
        file.seek(end - _TRAILER.size)
        size, digest, restores, check, magic = _TRAILER.unpack(file.read(_TRAILER.size))
        version = magic.removeprefix(_NAME)
        if magic not in (_MAGIC, version) and version.isdigit():
            raise Unusable(f"it has version {int(version)}, but this dsmq reads version {VERSION}")
        if magic != _MAGIC:
            raise Unusable("it is truncated, or not a snapshot")
        if size != end - _TRAILER.size or check != _check(digest, restores) or digest != _digest(file, size):
            raise Unusable("it is damaged: wrong digest")
    return Snapshot(size, digest, restores)


def opened(path: Path) -> closing[sqlite3.Connection]:
    """Open the database of a verified snapshot for reading."""
    uri = f"file:{quote(str(path))}?mode=ro&immutable=1"
    return closing(sqlite3.connect(uri, uri=True, isolation_level=None))


def record_restore(path: Path, snapshot: Snapshot) -> None:
    """Increment the number of restores in the file and sync it. Raises OSError."""
    restores = snapshot.restores + 1
    with path.open("r+b", buffering=0) as file:
        file.seek(snapshot.size + _RESTORES_AT)
        # One write within one sector is atomic.
        file.write(_RESTORES.pack(restores, _check(snapshot.digest, restores)))
        os.fsync(file.fileno())


def quarantine(path: Path) -> Path:
    """Rename an unusable file; return its new name. Raises OSError."""
    aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    path.rename(aside)
    _sync_folder(path.parent)
    return aside
