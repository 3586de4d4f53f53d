"""The file of a snapshot: an SQLite database, and behind it a trailer that vouches for every byte of it.

    database | size | digest | restores | check | dsmq-snapshot-01

The digest is over the database and its size. `restores` counts how often the file has been restored from since it was
written; it is changed in place, which the check vouches for. SQLite does not look at what stands behind its pages.

The file is written under another name, and takes the place of the one before by a rename once it is on the disk:
whenever the process is killed, or the power fails, one of the two is there, whole.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from dsmq.store import image
from dsmq.store.sqlite import INDEX, SCHEMA

VERSION = 1
# "dsmq", by which file(1) could tell it.
_APPLICATION_ID = 0x64736D71
_NAME = b"dsmq-snapshot-"
_MAGIC = _NAME + b"%02d" % VERSION
_DIGEST_BYTES = 32
# Size, digest, restores, check, magic. It never lies across two sectors of a disk: pages of 4,096 bytes stand before.
_TRAILER = struct.Struct(">Q32sQ8s16s")
_RESTORES_AT = 40
_RESTORES = struct.Struct(">Q8s")
_PIECE = 1_048_576
# For writing, in KiB.
_CACHE = 16_384


class Unusable(Exception):
    """The file is damaged, of another version, or no snapshot at all."""


class Abandoned(Exception):
    """The snapshot is not wanted any more."""


class Snapshot(NamedTuple):
    """A snapshot that has been found whole."""

    size: int
    """Bytes of the database."""
    digest: bytes
    restores: int


def temporary(path: Path) -> Path:
    """Return the name under which a snapshot is written."""
    return path.with_name(path.name + ".new")


def write(path: Path, fill: Callable[[sqlite3.Connection], None], alive: Callable[[], None]) -> int:
    """Have a database filled, and put it in the place of the snapshot before; return the size of the file.

    alive is called every now and then; what it raises ends it. The snapshot before stays where anything fails: an
    OSError or an sqlite3.Error is raised then.
    """
    new = temporary(path)
    create(new)
    try:
        with closing(sqlite3.connect(new, isolation_level=None)) as database:
            # What fails is thrown away, and what is written is made durable in the end. To make an index of many rows,
            # SQLite would use a folder for temporary files, where only this one may be writable.
            for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = MEMORY", f"cache_size = -{_CACHE}"):
                database.execute(f"PRAGMA {pragma}")
            fill(database)
            database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {VERSION}")
        size = _seal(new, alive)
        new.replace(path)
        _make_durable(path.parent)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    return size


def rehearse(path: Path) -> None:
    """Write an empty snapshot beside the real one and remove it, to find out now what would fail at the stop.

    Raises OSError or sqlite3.Error.
    """
    trial = temporary(path)
    try:
        write(trial, create_tables, lambda: None)
    finally:
        trial.unlink(missing_ok=True)


def create(path: Path) -> None:
    """Make an empty file that nobody else can read, in the place of what there may be. Raises OSError."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def create_tables(database: sqlite3.Connection) -> None:
    """Make those of the store, without the index: it is quicker to make in the end."""
    database.executescript(SCHEMA)


def create_index(database: sqlite3.Connection) -> None:
    database.execute(INDEX)


def create_extra_tables(database: sqlite3.Connection) -> None:
    database.executescript(image.TABLES)


def _seal(path: Path, alive: Callable[[], None]) -> int:
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        digest = _digest(file, size, alive)
        file.seek(size)
        file.write(_TRAILER.pack(size, digest, 0, _check(digest, 0), _MAGIC))
        file.flush()
        os.fsync(file.fileno())
    return size + _TRAILER.size


def _digest(file: BinaryIO, size: int, alive: Callable[[], None] = lambda: None) -> bytes:
    digest = hashlib.blake2b(struct.pack(">Q", size), digest_size=_DIGEST_BYTES)
    file.seek(0)
    left = size
    while left and (piece := file.read(min(left, _PIECE))):
        digest.update(piece)
        left -= len(piece)
        alive()
    return digest.digest()


def _check(digest: bytes, restores: int) -> bytes:
    return hashlib.blake2b(digest + struct.pack(">Q", restores), digest_size=8).digest()


def _make_durable(folder: Path) -> None:
    """Have the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def examine(path: Path) -> Snapshot:
    """Look at every byte of a snapshot. Raises OSError where it can't be read, Unusable where it is not whole."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        if end < _TRAILER.size:
            raise Unusable("it is cut off, or no snapshot" if end else "it is empty")
        file.seek(end - _TRAILER.size)
        size, digest, restores, check, magic = _TRAILER.unpack(file.read(_TRAILER.size))
        if magic != _MAGIC:
            raise Unusable(_told(magic))
        if size != end - _TRAILER.size or check != _check(digest, restores) or digest != _digest(file, size):
            raise Unusable("it is damaged: its digest is another one")
    return Snapshot(size, digest, restores)


def _told(magic: bytes) -> str:
    version = magic.removeprefix(_NAME)
    if version != magic and version.isdigit():
        return f"it is of version {int(version)}, and version {VERSION} is what this dsmq reads"
    return "it is cut off, or no snapshot"


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database of a snapshot that has been examined, for reading."""
    uri = f"file:{quote(str(path))}?mode=ro&immutable=1"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as database:
        yield database


def mark(path: Path, snapshot: Snapshot) -> None:
    """Note that it has been restored from once more, and have that survive a power cut. Raises OSError."""
    restores = snapshot.restores + 1
    with path.open("r+b", buffering=0) as file:
        file.seek(snapshot.size + _RESTORES_AT)
        # One write within one sector: it is there or not.
        file.write(_RESTORES.pack(restores, _check(snapshot.digest, restores)))
        os.fsync(file.fileno())


def put_aside(path: Path, now: str) -> Path:
    """Give a file that is not used another name, and return that. Raises OSError."""
    aside = path.with_name(f"{path.name}.damaged-{now}")
    path.rename(aside)
    _make_durable(path.parent)
    return aside
