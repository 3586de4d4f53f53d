"""Snapshots that are damaged, can't be written, or can't be restored."""

from __future__ import annotations

import errno
import logging
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from snapshotting import MAX_AGE, Disk, bodies, disk, file, hello, restored, save, snapshotting, store
from stores import ClockedStore, put

from conftest import SOON, daemon, no_new_threads, run_dsmq, serving, wire_to, without_privileges
from dsmq.errors import StartupError
from dsmq.store import snapshot_file
from dsmq.store.schema import INDEX, SCHEMA, SNAPSHOT_SCHEMA
from dsmq.store.sqlite import SQLiteStore

# Fixtures.
__all__ = ["disk", "file", "store"]

# Damaged files


def flip(at: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        place = at % len(data)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return damage


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "empty"),
    "text": (lambda data: b"messages = 3\n" * 100, "not a snapshot"),
    "short text": (lambda data: b"hello", "not a snapshot"),
    "a database": (lambda data: data[:-80], "not a snapshot"),
    "the trailer alone": (lambda data: data[-80:], "damaged"),
    "one byte less": (lambda data: data[:-1], "truncated"),
    "half": (lambda data: data[: len(data) // 2], "truncated"),
    "a byte more in the middle": (lambda data: data[:5000] + b"x" + data[5000:], "damaged"),
    "of a later version": (lambda data: data[:-2] + b"02", "version 2"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_incomplete_snapshot_is_refused_and_kept(
    store: ClockedStore, file: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGES[kind]
    put(store, b"t", *[b"x" * 1000] * 10)
    save(store, file)
    file.write_bytes(damage(file.read_bytes()))
    check_refused(file, store.epoch, caplog, reason)


@pytest.mark.parametrize("at", [0, 20, 97, 4096, 9000, *range(-80, 0)])
def test_changed_byte_is_detected(store: ClockedStore, file: Path, at: int, caplog: pytest.LogCaptureFixture) -> None:
    put(store, b"t", *[b"x" * 1000] * 10)
    save(store, file)
    file.write_bytes(flip(at)(file.read_bytes()))
    check_refused(file, store.epoch, caplog, "")


def check_refused(file: Path, epoch: str, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    damaged = file.read_bytes()
    caplog.clear()
    with restored(file) as other:
        assert other.epoch != epoch
        assert (other.last_id(), other.totals().messages) == (0, 0)
        assert put(other, b"t", b"x") == [1]
    [aside] = file.parent.glob(f"{file.name}.damaged-*")
    assert aside.read_bytes() == damaged
    assert not file.exists()
    [line] = [record for record in caplog.records if record.name == "dsmq.store.snapshots"]
    assert line.levelno == logging.ERROR
    assert str(aside) in line.getMessage()
    assert reason in line.getMessage()


def test_schema_change_requires_new_version() -> None:
    """A change of the file's format requires another digest here, and, unless old files still load, another VERSION."""
    import hashlib

    text = SCHEMA + INDEX + SNAPSHOT_SCHEMA
    assert (snapshot_file.VERSION, hashlib.sha256(text.encode()).hexdigest()[:8]) == (1, "aa1acfff")


# Failures to write


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limit the size of files, to simulate a full disk; only the error code differs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Writing fails in the middle of the database and in the trailer.
@pytest.mark.parametrize("missing", [100_000, 10])
def test_full_disk_keeps_previous_snapshot(file: Path, missing: int, caplog: pytest.LogCaptureFixture) -> None:
    store = SQLiteStore(MAX_AGE)
    with closing(store), snapshotting(store, file) as snapshotter:
        put(store, b"t", b"x" * 200_000)
        assert snapshotter.save()
        before = file.read_bytes()
        for at_once in (False, True):
            caplog.clear()
            with files_of_at_most(len(before) - missing):
                assert not snapshotter.save(at_once=at_once)
            [line] = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert f"can't write a snapshot to {file}" in line.getMessage()
            assert "the previous one is kept" in line.getMessage()
            assert file.read_bytes() == before
            assert not snapshot_file.temporary(file).exists()
        assert put(store, b"t", b"y") == [2]
        assert (snapshotter.stats.written, snapshotter.stats.failed) == (1, 2)
        assert snapshotter.save()


def test_full_disk_is_named_in_log(store: ClockedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "dsmq-test", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    file = tmp_path / "it"
    try:
        with snapshotting(store, file) as snapshotter:
            put(store, b"t", b"x" * 300_000)
            assert snapshotter.save(at_once=True)
            before = file.read_bytes()
            put(store, b"t", b"x" * 900_000)
            for at_once in (True, False):
                caplog.clear()
                assert not snapshotter.save(at_once=at_once)
                assert "disk is full" in caplog.text
                assert file.read_bytes() == before
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_final_snapshot_is_written_if_no_thread_can_start(file: Path) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        with no_new_threads():
            assert server.stop() == []
    with restored(file, time.time()) as other:
        assert bodies(other, b"t") == [b"x"]


def test_failed_final_snapshot_sets_exit_status(file: Path) -> None:
    with daemon("--snapshot-file", str(file)) as server, wire_to(server) as wire:  # type: ignore[arg-type]
        wire.call("PUT", "t", "x")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        assert server.stop() == 1
        assert "can't write a snapshot" in server.log()
        assert "there is no previous one" in server.log()
        assert "Traceback" not in server.log()
    assert not file.exists()


def test_unusable_snapshot_path_is_reported_at_start(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    for name, told in (("missing/it", "missing: No such"), ("a file/it", "Not a dir"), ("a folder", "Is a dir")):
        with pytest.raises(StartupError, match=f"snapshot_file: .*{told}"), serving(snapshot_file=str(tmp_path / name)):
            pass


def test_device_is_refused_as_snapshot_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with (
        pytest.raises(StartupError, match="pipe: not a regular file"),
        serving(snapshot_file=str(pipe)),
    ):
        pass
    assert list(tmp_path.iterdir()) == [pipe]
    assert pipe.is_fifo()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["folder", "file"])
def test_missing_permission_is_reported_at_start(tmp_path: Path, mode: str) -> None:
    folder, file = tmp_path / "state", tmp_path / "state" / "it"
    folder.mkdir()
    prefix = without_privileges()
    with daemon("--snapshot-file", str(file), prefix=prefix) as server:
        assert server.stop() == 0
    kept = file.read_bytes()
    (folder if mode == "folder" else file).chmod(0o500 if mode == "folder" else 0)
    done = run_dsmq("serve", "--port", "0", "--http-port", "off", "--snapshot-file", str(file), prefix=prefix)
    assert done.returncode == 1
    assert b"snapshot_file" in done.stderr
    assert b"Permission denied" in done.stderr
    assert b"Traceback" not in done.stderr
    folder.chmod(0o700)
    file.chmod(0o600)
    assert file.read_bytes() == kept


def test_start_checks_that_snapshot_can_be_written(file: Path, disk: Disk) -> None:
    disk.error = OSError(errno.EINVAL, "Invalid argument")
    with pytest.raises(StartupError, match=r"snapshot_file: .*Invalid argument"), serving(snapshot_file=str(file)):
        pass
    assert {path.name for path in file.parent.iterdir()} == {f"{file.name}.lock"}


def test_sqlite_failure_at_start_is_one_line(file: Path) -> None:
    with (
        files_of_at_most(1000),
        pytest.raises(StartupError, match=r"^snapshot_file: .*disk I/O error$"),
        serving(snapshot_file=str(file)),
    ):
        pass


# Writes snapshots whose index is too large for the page cache.
READ_ONLY = """
import sys
from pathlib import Path
from dsmq.store import snapshot_file
from dsmq.store.schema import INSERT_ROW
from dsmq.store.snapshots import Snapshotter
from dsmq.store.sqlite import SQLiteStore

for folder in map(Path, ("/tmp", "/var/tmp", ".")):
    try:
        (folder / "x").touch()
        sys.exit(f"{folder} can be written to")
    except OSError:
        pass
snapshot_file._PRAGMAS = (*snapshot_file._PRAGMAS, "cache_size = -100")
store = SQLiteStore(600_000)
store.append([(b"t", b"x", None)])
rows = ((number, 1, 1, 1, 1, bytes(8), b"x") for number in range(2, 200_000))
store._database.connection.executemany(INSERT_ROW, rows)
store._last_id = 200_000
store._buffer.clear(200_000, 1)
snapshotter = Snapshotter(store, sys.argv[1] + "/snapshot")
snapshotter.open()
sys.exit(not snapshotter.save() or not snapshotter.save_last())
"""


@pytest.mark.slow
def test_nothing_is_written_outside_snapshot_folder(tmp_path: Path) -> None:
    script = (
        "set -e; mount --make-rprivate /; mount --bind $0 /mnt; cd /proc; "
        "for folder in /tmp /var/tmp; do mount --bind $folder $folder; mount -o remount,bind,ro $folder; done; "
    )
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*unshare, script, str(tmp_path)], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    command = [*unshare, script + 'exec "$@"', str(tmp_path), sys.executable, "-c", READ_ONLY, "/mnt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3 * SOON)
    assert (done.returncode, done.stderr) == (0, "")


def test_two_servers_cannot_share_snapshot_file(file: Path) -> None:
    with (
        serving(snapshot_file=str(file)),
        pytest.raises(StartupError, match="another server uses"),
        serving(snapshot_file=str(file)),
    ):
        pass
    with serving(snapshot_file=str(file)):
        pass


def test_child_process_does_not_keep_snapshot_file_locked(store: ClockedStore, file: Path) -> None:
    with snapshotting(store, file):
        # A child inherits copies of all descriptors, as a forked process does.
        descriptors = descriptors_of(f"{file}.lock")
        assert descriptors
        child = subprocess.Popen(["sleep", str(SOON)], pass_fds=descriptors)
    try:
        with serving(snapshot_file=str(file)):
            pass
    finally:
        child.kill()
        child.wait()


def descriptors_of(path: str) -> list[int]:
    found = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
    return [number for number in found if os.readlink(f"/proc/self/fd/{number}") == path]


def test_failed_start_leaves_snapshot_unchanged(file: Path) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
    before = file.read_bytes()
    with (
        serving() as other,
        pytest.raises(StartupError),
        serving(port=other.port, snapshot_file=str(file)),
    ):
        pass
    assert file.read_bytes() == before


def test_failed_start_after_restore_loses_nothing(file: Path) -> None:
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        run = hello(wire)[b"run"]
    with no_new_threads(), pytest.raises(StartupError, match="new thread"), serving(snapshot_file=str(file)):
        pass
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        assert (hello(wire)[b"run"], wire.call("READ", "t", 0)[3]) == (run, b"x")


def test_complete_snapshot_that_does_not_load_is_refused(
    store: ClockedStore, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, b"t", b"x")
    save(store, file)

    def fill(database: sqlite3.Connection) -> None:
        database.execute("CREATE TABLE another (thing)")

    snapshot_file.write(file, fill, lambda: None)
    check_refused(file, store.epoch, caplog, "no such table")
