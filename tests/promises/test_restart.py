"""What clients read, and count as missed, when real servers are killed, restarted and reloaded."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import SOON, UNIT, Daemon, daemon, serving, wait_until
from dsmq import client
from dsmq.client import DSMQClientSideConnection
from dsmq.errors import BadRequest, TooBig

PUTS = 200


def connect(*arguments: Any, **options: Any) -> DSMQClientSideConnection:
    """Connect with a timeout for a busy machine."""
    return client.connect(*arguments, timeout=SOON, **options)


class Restarted:
    """A server that is killed and restarted on the same port, with or without a snapshot."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "snapshot"
        self.options = ["--host", f"unix:{folder / 'socket'}", "--max-age-seconds", "600"]
        self.host = f"unix:{folder / 'socket'}"
        self._daemon: Daemon | None = None

    def start(self, *options: str) -> None:
        self._daemon = Daemon(*self.options, *options)

    def end(self, *, kill: bool) -> None:
        assert self._daemon
        if kill:
            self._daemon.process.kill()
        self._daemon.stop()
        self._daemon = None

    def close(self) -> None:
        if self._daemon:
            self.end(kill=True)


@pytest.fixture
def restarted(tmp_path: Path) -> Iterator[Restarted]:
    server = Restarted(tmp_path)
    try:
        yield server
    finally:
        server.close()


def put(mq: DSMQClientSideConnection, *bodies: str) -> None:
    mq.put_many("t", list(bodies))


def drain(mq: DSMQClientSideConnection) -> list[str]:
    return mq.get_many("t", 1000)


KINDS = {
    "graceful with a snapshot": ("graceful", True, []),
    "killed with an older snapshot": ("killed", True, ["restarted"]),
    "killed without a snapshot": ("killed", False, ["replaced"]),
    "graceful without a snapshot": ("graceful", False, ["replaced"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("read_first", [2, 4], ids=["read what the snapshot has", "read what was lost"])
@pytest.mark.parametrize("kind", KINDS)
def test_missed_counts_expired_messages_across_every_restart(restarted: Restarted, kind: str, read_first: int) -> None:
    how, snapshot, told = KINDS[kind]
    options = ["--snapshot-file", str(restarted.file)] if snapshot else []
    states: list[str] = []
    restarted.start(*options)
    with connect(restarted.host) as writer, connect(restarted.host, on_state_change=states.append) as mq:
        put(writer, "1", "2")
        assert drain(mq) == ["1", "2"]
        if how == "killed" and snapshot:
            # A graceful stop writes the snapshot to which the kill returns.
            restarted.end(kill=False)
            restarted.start(*options)
            writer.ping()
        put(writer, "3", "4")
        if read_first == 4:
            assert drain(mq) == ["3", "4"]
        else:
            mq.ping()
        states.clear()
        restarted.end(kill=how == "killed")
        # Restored messages expire immediately and are deleted.
        restarted.start(*options, "--max-age-seconds", str(3 * UNIT), "--expiry-interval-seconds", str(UNIT))
        with connect(restarted.host) as other:
            put(other, "5", "6")
            time.sleep(6 * UNIT)
            got, late = [], -1
            while not got:
                # It may also expire before it is read.
                put(other, "7")
                got, late = drain(mq), late + 1
            assert got == ["7"]
        # 5 and 6 have expired; 3 and 4 count only if they were restored and not yet read.
        survived = how == "graceful" and snapshot and read_first == 2
        assert mq.missed == (4 if survived else 2) + late, states
        assert [state for state in states if state not in ("lost", "resumed")] == told


@pytest.mark.embedded("snapshots")
def test_messages_lost_by_kill_are_not_missed(restarted: Restarted) -> None:
    options = ["--snapshot-file", str(restarted.file)]
    restarted.start(*options)
    with connect(restarted.host) as writer, connect(restarted.host) as mq:
        put(writer, "1")
        restarted.end(kill=False)
        restarted.start(*options)
        put(writer, "2", "3", "4")
        assert mq.get("t") == "1"
        restarted.end(kill=True)
        restarted.start(*options)
        with connect(restarted.host) as other:
            put(other, "5")
            # Whether messages read ahead are delivered depends on the restart's duration; 5 reuses the number of 2.
            got = drain(mq)
            assert got in (["2", "3", "4", "5"], ["5"])
        assert mq.missed == 0


class History:
    """A server over several runs, and its remaining messages; others were lost with a run."""

    def __init__(self, server: Restarted) -> None:
        self._server = server
        self._options = ["--snapshot-file", str(server.file)]
        self.held: list[str] = []
        # The contents of the snapshot that the next start after a kill loads, and its file if it was overwritten.
        self._saved: list[str] = []
        self._file = b""

    def start(self, *options: str) -> None:
        self._server.start(*self._options, *options)

    def put(self, *bodies: str) -> None:
        with connect(self._server.host) as writer:
            put(writer, *bodies)
        self.held += bodies

    def save(self) -> None:
        """Wait for a snapshot begun after the last put."""
        for _ in range(2):
            before = self._server.file.stat() if self._server.file.exists() else None
            wait_until(lambda before=before: self._server.file.exists() and self._server.file.stat() != before)
        self._file, self._saved = self._server.file.read_bytes(), list(self.held)

    def end(self, how: str) -> None:
        self._server.end(kill=how != "graceful")
        if how == "graceful":
            self._saved, self._file = list(self.held), b""
        elif how == "all is lost":
            self._server.file.unlink(missing_ok=True)
            self._saved = []
        if self._file:
            # Discard later snapshots, as if the run had been killed before.
            self._server.file.write_bytes(self._file)
        self._file, self.held = b"", list(self._saved)


class Reader:
    """A client that reads in the first run; in the second, it is absent, reads once, or continues to read."""

    def __init__(self, host: str, topic: str | list[str], when: str, later: str) -> None:
        self._mq, self._topic = connect(host), topic
        self._when, self._later = when, later
        self.got: list[str] = []

    def _read(self, n: int) -> list[str]:
        return [message.text for message in self._mq.read(self._topic, n)]

    def begin(self) -> None:
        # Messages put before the first one it gets are not counted.
        self.got += self._read(1000)

    def act(self, when: str, run: int) -> None:
        is_time, later = when == self._when.split()[0], self._later if run else "reads"
        if later == "reads once":
            self._mq.ping()
        elif later == "reads" and is_time:
            # One message; the rest is fetched with it.
            self.got += self._read(1 if self._when.endswith("ahead") else 1000)

    def check(self, history: History) -> None:
        """Continue to read; stored messages that it does not get have expired."""
        while not (got := self._read(1000)) or got[-1] != history.held[-1]:
            self.got += got
            history.put(f"end {len(history.held)}")
        self.got += got
        about = self._topic, self._when, self._later, self.got
        assert self._mq.missed == self._mq.missed_in("t") == len(set(history.held) - {*self.got}), about
        self._mq.close()


ENDS = ("graceful", "killed", "killed after a snapshot", "all is lost")


@pytest.mark.embedded("snapshots")
@pytest.mark.parametrize(
    "ends",
    [
        pytest.param(ends, id=", ".join(ends), marks=[] if set(ends) == {ENDS[2]} else [pytest.mark.slow])
        for ends in itertools.product(ENDS, repeat=2)
    ],
)
def test_missed_is_exact_after_any_absence_of_client(restarted: Restarted, ends: tuple[str, ...]) -> None:
    history = History(restarted)
    history.start()
    readers = [
        Reader(restarted.host, topic, when, later)
        for topic in ("t", ["t", "*other"])
        for when in ("early", "early and ahead", "late", "late and ahead")
        for later in ("is absent", "reads once", "reads")
    ]
    history.put("first")
    for reader in readers:
        reader.begin()
    history.end("graceful")
    for run, end in enumerate(ends):
        saves = end == "killed after a snapshot"
        history.start(*(["--snapshot-interval-seconds", "1"] if saves else []))
        history.put(f"{run} a", f"{run} b", f"{run} c")
        for reader in readers:
            reader.act("early", run)
        if saves:
            history.save()
        history.put(f"{run} d", f"{run} e")
        for reader in readers:
            reader.act("late", run)
        history.end(end)
    history.start("--max-age-seconds", str(3 * UNIT), "--expiry-interval-seconds", str(UNIT))
    history.put("last")
    with connect(restarted.host) as mq:
        wait_until(lambda: not mq.topics())
    for reader in readers:
        reader.check(history)


# Positions


@pytest.mark.embedded("snapshots")
def test_position_resumes_in_another_process_and_after_restart(restarted: Restarted) -> None:
    options = ["--snapshot-file", str(restarted.file)]
    restarted.start(*options)
    with connect(restarted.host) as mq:
        put(mq, *map(str, range(10)))
        assert mq.get_many("t", 4) == ["0", "1", "2", "3"]
        position = mq.position("t")
    restarted.end(kill=False)
    restarted.start(*options)
    states: list[str] = []
    with connect(restarted.host, on_state_change=states.append) as mq:
        mq.seek("t", position)
        assert drain(mq) == ["4", "5", "6", "7", "8", "9"]
        assert states == []
        # Within an epoch, it is the same for all topics.
        mq.put("u", "x")
        mq.seek("u", position)
        assert mq.get("u") == "x"


@pytest.mark.embedded("ids of different epochs begin with the same number")
def test_position_of_another_epoch_reads_from_oldest_and_warns(
    restarted: Restarted, caplog: pytest.LogCaptureFixture
) -> None:
    restarted.start()
    with connect(restarted.host) as mq:
        put(mq, *map(str, range(1000)))
        assert len(drain(mq)) == 1000
        position = mq.position("t")
    restarted.end(kill=True)
    restarted.start()
    states: list[str] = []
    with connect(restarted.host, on_state_change=states.append) as mq:
        put(mq, "new 1", "new 2")
        mq.seek("t", position)
        assert states == ["replaced"]
        assert "another epoch" in caplog.text
        assert drain(mq) == ["new 1", "new 2"]
        assert mq.missed == 0
        mq.seek("t", 1000)
        with pytest.raises(BadRequest, match="no message has an id above"):
            mq.get("t")
        mq.seek("t", 1)
        assert drain(mq) == ["new 2"]


# Reloads


def test_position_is_valid_before_client_notices_new_epoch(restarted: Restarted) -> None:
    restarted.start()
    with connect(restarted.host) as idle:
        put(idle, "old")
        assert idle.get("t") == "old"
        restarted.end(kill=True)
        restarted.start()
        with connect(restarted.host) as other:
            put(other, "1", "2", "3")
            assert other.get("t") == "1"
            idle.seek("t", other.position("t"))
        assert drain(idle) == ["2", "3"]
        restarted.end(kill=True)


@pytest.fixture
def reloaded(tmp_path: Path) -> Iterator[tuple[Daemon, Path]]:
    file = tmp_path / "dsmq.toml"
    file.write_text("max_age_seconds = 600\n")
    with daemon("--config", str(file)) as process:
        yield process, file


def reload(server: tuple[Daemon, Path], settings: str) -> None:
    process, file = server
    file.write_text(settings + "\n")
    process.signal(signal.SIGHUP)
    process.wait_for_line("changed")


@pytest.mark.slow
def test_lowered_max_age_applies_to_read_ahead(reloaded: tuple[Daemon, Path]) -> None:
    with connect(port=reloaded[0].port) as mq:
        put(mq, *map(str, range(10)))
        assert mq.get("t") == "0"
        time.sleep(3 * UNIT)
        reload(reloaded, f"max_age_seconds = {2 * UNIT}")
        # From now on, nothing older than a second is delivered.
        time.sleep(1.1)
        assert drain(mq) == []
        assert mq.missed == 9


@pytest.mark.slow
def test_raised_max_age_applies_to_read_ahead(reloaded: tuple[Daemon, Path]) -> None:
    reload(reloaded, f"max_age_seconds = {50 * UNIT}\nexpiry_interval_seconds = {UNIT}")
    with connect(port=reloaded[0].port) as mq:
        put(mq, *map(str, range(10)))
        assert mq.get("t") == "0"
        reload(reloaded, "max_age_seconds = 600")
        time.sleep(55 * UNIT)
        assert drain(mq) == [str(number) for number in range(1, 10)]
        assert mq.missed == 0


def test_message_over_lowered_limit_raises_too_big_for_that_message_only(
    reloaded: tuple[Daemon, Path],
) -> None:
    states: list[str] = []
    with connect(port=reloaded[0].port, on_state_change=states.append) as mq:
        mq.put("t", "x" * 5000)
        reload(reloaded, "max_message_bytes = 1000")
        for size in (1001, 1_000_000, 20_000_000):
            with pytest.raises(TooBig):
                mq.put("t", "x" * size)
            assert mq.put("t", "y")
        reload(reloaded, "max_message_bytes = 10000000")
        mq.put("t", "x" * 9_000_000)
        assert [len(message) for message in drain(mq)] == [5000, 1, 1, 1, 9_000_000]
    assert "given up" not in states


@pytest.mark.parametrize("size", [1001, 300_000, 20_000_000])
def test_put_many_stores_messages_before_too_big_one(size: int) -> None:
    with serving(max_message_bytes=1000) as server, connect(port=server.port) as mq:
        before = [str(number) for number in range(PUTS)]
        with pytest.raises(TooBig):
            mq.put_many("t", [*before, "x" * size, "behind"])
        assert mq.get_many("t", 1000)[:PUTS] == before
        mq.put("t", "next")
        assert mq.get_wait("t", timeout=SOON)


def test_too_big_message_affects_no_other_call() -> None:
    with serving(max_message_bytes=100_000) as server, connect(port=server.port) as mq:
        ended = threading.Event()
        ids: list[int] = []

        def write() -> None:
            while not ended.is_set():
                ids.append(mq.put("t", "x" * 1000))

        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            with pytest.raises(TooBig):
                mq.put("t", "x" * 3_000_000)
        wait_until(lambda: len(ids) > 20)
        ended.set()
        for thread in threads:
            thread.join(SOON)
        assert len(set(ids)) == len(ids)
        # A server that copies them from other servers may have the last ones later.
        wait_until(lambda: server.status.totals().stored >= len(ids))
        assert server.status.totals().stored == len(ids)


def test_too_long_topic_raises_too_big() -> None:
    with serving(max_topic_bytes=10) as server, connect(port=server.port) as mq:
        for call in (lambda: mq.put("t" * 11, "x"), lambda: mq.get("t" * 11), lambda: mq.put_many("t" * 11, ["x"])):
            with pytest.raises(TooBig):
                call()
        assert mq.put("t" * 10, "x") == 1
