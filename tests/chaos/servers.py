"""Starts, stops and kills a server on one port, and records each of its lives."""

from __future__ import annotations

import math
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chaos.history import History, Server
from dsmq.wire.resp import Reply, ReplyParser, encode_request
from helpers import HOST, SOON, Daemon

PASSED = str(Path(__file__).with_name("passed.py"))
FAULTY = str(Path(__file__).parent.parent / "attacks" / "faulty.py")
LOOK_SECONDS = 0.003


def free_port() -> int:
    """Return a port that no outgoing connection can take while the server is down."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(min(10_000, lowest // 2), lowest)
        with socket.socket() as attempt:
            try:
                attempt.bind((HOST, port))
            except OSError:
                continue
        return port


def hello(port: int) -> dict[str, Any]:
    """Return the reply to HELLO."""
    with socket.create_connection((HOST, port), SOON) as connection:
        connection.sendall(encode_request(b"HELLO"))
        parser = ReplyParser()
        reply: tuple[Reply] | None = None
        while reply is None:
            data = connection.recv(65536)
            if not data:
                raise EOFError
            parser.feed(data)
            reply = parser.next()  # type: ignore[assignment]
    values = iter(reply[0])  # type: ignore[arg-type]
    facts = {name.decode(): value for name, value in zip(values, values, strict=True)}  # type: ignore[union-attr]
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in facts.items()}


class Snapshots:
    """Watches for new snapshots."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(path.name + ".new")
        self._ended = threading.Event()
        self.written = 0
        self.kept_until = -math.inf
        """A time before which the last complete snapshot was started."""
        self._thread = threading.Thread(target=self._run, name="snapshots")
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        known = self._stamp()
        looked, begun = time.monotonic(), None
        while not self._ended.wait(LOOK_SECONDS):
            now = time.monotonic()
            # A new snapshot is written to a file next to the old one and replaces it when complete.
            begun = (begun or looked) if self._new.exists() else begun
            if (stamp := self._stamp()) != known:
                self.kept_until, known, begun = begun or looked, stamp, None
                self.written += 1
            looked = now

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns


class Lives:
    """A server that is restarted on one port.

    passed: listening sockets for clients and for HTTP, which the server gets as from systemd.
    """

    def __init__(
        self,
        history: History,
        folder: Path,
        *,
        snapshot: bool = False,
        interval: float = 0.0,
        words: tuple[str, ...] = (),
        passed: Sequence[socket.socket] = (),
        **settings: object,
    ) -> None:
        self.port: int = passed[0].getsockname()[1] if passed else free_port()
        self.history = history
        self.has_snapshot = snapshot
        self.path = folder / "state" / "dsmq.snapshot"
        self.path.parent.mkdir(exist_ok=True)
        self.settings = dict(settings)
        if snapshot:
            self.settings |= {"snapshot_file": self.path, "snapshot_interval_seconds": interval}
        descriptors = [sock.fileno() for sock in passed]
        words = (sys.executable, PASSED, *map(str, descriptors)) if passed else words
        self._command: dict[str, Any] = {"command": words} if words else {}
        self._popen: dict[str, Any] = {"pass_fds": descriptors}
        self.snapshots: Snapshots | None = None
        self.logs: list[str] = []
        self.start_seconds: list[float] = []
        self.start()

    def start(self) -> None:
        began = time.monotonic()
        self.daemon = Daemon(**self._command, popen=self._popen, port=self.port, **self.settings)
        self.start_seconds.append(time.monotonic() - began)
        if self.has_snapshot:
            self.snapshots = Snapshots(self.path)
        facts = hello(self.port)
        self.server = Server(facts["epoch"], facts.get("run", facts["epoch"]), facts["last_id"], began)

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self, *, keeps: bool = True) -> int:
        """Stop it as systemd would. keeps: whether the snapshot can be written."""
        status = self.daemon.stop()
        ended = time.monotonic()
        until = self._end_snapshots()
        self._note(ended, math.inf if self.has_snapshot and keeps else until)
        return status

    def kill(self) -> None:
        self.daemon.signal(signal.SIGKILL)
        self.daemon.process.wait()
        ended = time.monotonic()
        self._note(ended, self._end_snapshots())

    def _end_snapshots(self) -> float:
        if self.snapshots is None:
            return -math.inf
        self.snapshots.end()
        return self.snapshots.kept_until

    def _note(self, ended: float, kept_until: float) -> None:
        self.history.add(replace(self.server, ended=ended, kept_until=kept_until))
        self.logs.append(self.daemon.log())
        self.daemon.close()

    def close(self) -> None:
        """Stop it; its messages need not be kept."""
        if self.daemon.process.poll() is None:
            self.daemon.signal(signal.SIGCONT)
            self.stop(keeps=False)


def faulty(fault: str) -> tuple[str, ...]:
    """Return the command of a server with a fault that can be turned on."""
    return (sys.executable, FAULTY, fault)
