"""Final snapshots that are interrupted or have to wait."""

from __future__ import annotations

import itertools
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
from snapshotting import Disk, bodies, disk, file, hello, restored
from stores import put

from conftest import SOON, UNIT, Daemon, daemon, serving, wait_until, wire_to
from dsmq import server as server_module
from dsmq import settings as config
from dsmq import threads
from dsmq.__main__ import INTERRUPTED
from dsmq.errors import ReplyError
from dsmq.server import Server
from dsmq.store import snapshot_file, snapshots
from dsmq.store.sqlite import SQLiteStore
from dsmq.wire.resp import encode_request

# Fixtures.
__all__ = ["disk", "file"]

# A server whose final snapshot waits in one of its steps, as if for a disk, until a file exists. The rehearsal at the
# start does not wait.
SLOW = """
import os, sys, time
from dsmq import __main__
from dsmq.store import snapshot_file
step, released = sys.argv[1:3]
real = getattr(snapshot_file, step)
def slow(*arguments):
    setattr(snapshot_file, step, slower)
    return real(*arguments)
def slower(*arguments):
    print("writing", file=sys.stderr, flush=True)
    while not os.path.exists(released):
        arguments[-1]() if step == "_seal" else None
        time.sleep(0.01)
    return real(*arguments)
setattr(snapshot_file, step, slow)
sys.argv = sys.argv[5:]
sys.exit(__main__.main())
"""


def slow(step: str, released: Path) -> list[str]:
    return [sys.executable, "-c", SLOW, step, str(released)]


def ended(server: Daemon) -> str:
    """The log of an interrupted server."""
    assert server.process.wait(SOON) == INTERRUPTED
    assert "Traceback" not in server.log()
    return server.log()


@pytest.mark.usefixtures("interruptible")
def test_second_ctrl_c_stops_without_waiting_for_clients(file: Path) -> None:
    with (
        daemon("--snapshot-file", str(file), "--stop-timeout-seconds", "600") as server,
        wire_to(server) as wire,  # type: ignore[arg-type]
        wire_to(server) as slow,  # type: ignore[arg-type]
    ):
        wire.call("PUT", "t", b"x" * 4_000_000)
        # More than the kernel buffers for a client that does not read.
        slow.send(encode_request(b"READ", b"t", b"0") * 10)
        wait_until(lambda: bool(slow.socket.recv(1, socket.MSG_PEEK)))
        server.process.send_signal(signal.SIGINT)
        assert wire.ended()
        server.process.send_signal(signal.SIGINT)
        assert "messages put since the previous one are lost" in ended(server)
        assert not file.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("step", ["_seal", "create_tables"])
def test_second_ctrl_c_abandons_final_snapshot_with_a_message(file: Path, tmp_path: Path, step: str) -> None:
    options = ("--snapshot-file", str(file))
    with daemon(*options) as first, wire_to(first) as wire:  # type: ignore[arg-type]
        wire.call("PUT", "t", "kept")
        assert first.stop() == 0
    with (
        daemon(*options, prefix=slow(step, tmp_path / "never")) as second,
        wire_to(second) as wire,  # type: ignore[arg-type]
    ):
        run = hello(wire)[b"run"]
        wire.call("PUT", "t", "lost")
        before = file.read_bytes()
        second.process.send_signal(signal.SIGINT)
        second.wait_for_line("^writing")
        second.process.send_signal(signal.SIGINT)
        [error] = [line for line in ended(second).splitlines() if "ERROR" in line]
        assert "messages put since the previous one are lost" in error
        assert file.read_bytes() == before
        # A snapshot that hangs in a system call leaves its file, which the next start removes.
        assert snapshot_file.temporary(file).exists() == (step != "_seal")
    with daemon(*options) as third, wire_to(third) as wire:  # type: ignore[arg-type]
        assert not snapshot_file.temporary(file).exists()
        assert hello(wire)[b"run"] != run
        assert wire.call("READ", "t", 0)[3] == b"kept"
        assert wire.call("READ", "t", 1) == []


def test_ctrl_c_between_request_and_stop_abandons_snapshot_and_reports_loss(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with suppress(KeyboardInterrupt), serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        server.request_stop("the first Ctrl-C")
        raise KeyboardInterrupt
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "final snapshot abandoned: messages put since the previous one are lost"
    ]
    assert not file.exists()
    # Another server can use the file immediately.
    with serving(snapshot_file=str(file)):
        pass


def test_first_ctrl_c_of_embedding_program_writes_final_snapshot(file: Path) -> None:
    with suppress(KeyboardInterrupt), serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        raise KeyboardInterrupt
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire:
        assert wire.call("READ", "t", 0)[3] == b"x"


SERVER_THREADS = ("dsmq-io-0", "dsmq-expiry", "dsmq-snapshot", "dsmq-http")


def interrupted_at(point: int, call: Callable[[], object]) -> bool:
    """Interrupt the call at a point where Python checks for signals; return False if there are fewer points."""
    files = {server_module.__file__, snapshots.__file__, threads.__file__}
    left = point

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename in files:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.slow
def test_interrupted_stop_ends_all_threads_from_any_line(tmp_path: Path) -> None:
    effective = config.load(kind=config.EmbeddedSettings, port=0, http_port=0, snapshot_file=str(tmp_path / "s"))
    for point in itertools.count():
        store = SQLiteStore(0)
        server = Server(effective, store)
        server.start()
        put(store, b"t", b"%d" % point)
        was_interrupted = interrupted_at(point, server.stop)
        # The enclosing `with` statement does the same.
        server.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name in SERVER_THREADS])
        with pytest.raises(ReplyError):
            put(store, b"t", b"more")
        # The snapshot is complete or missing, and another server can use the file immediately.
        saved = (tmp_path / "s").exists()
        assert saved or was_interrupted
        with restored(tmp_path / "s", time.time()) as other:
            assert bodies(other, b"t") == [b"%d" % point] * saved
        (tmp_path / "s").unlink(missing_ok=True)
        if not was_interrupted:
            break
    assert point > 20


def test_concurrent_stop_waits_for_first(file: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsmq")
    with serving(snapshot_file=str(file)) as server, wire_to(server) as wire, ThreadPoolExecutor(2) as pool:
        wire.call("PUT", "t", "x")
        disk.hangs = True
        first = pool.submit(server.stop)
        assert disk.waiting.wait(SOON)
        second = pool.submit(server.stop)
        with pytest.raises(TimeoutError):
            second.result(UNIT)
        disk.released.set()
        assert (first.result(SOON), second.result(SOON)) == ([], [])
    assert [record.message for record in caplog.records].count("stopped") == 1
