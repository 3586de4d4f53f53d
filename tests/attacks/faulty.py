"""Run `dsmq serve` with a fault that SIGUSR1 turns on and SIGUSR2 off: `faulty.py FAULT`.

FAULT is `files`, `threads`, `clock`, or a fault of SQLite: `error`, `memory`, `rollback`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from typing import Any

from dsmq.__main__ import main

DAY_SECONDS = 86_400
NOBODY = 65_534


def on_signals(begin: Callable[[], None], end: Callable[[], None]) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: begin())
    signal.signal(signal.SIGUSR2, lambda *_: end())


def files() -> None:
    """Use up all file descriptors of the process."""
    taken: list[int] = []

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))

    def give_back() -> None:
        while taken:
            os.close(taken.pop())

    on_signals(take, give_back)


def threads() -> None:
    """Switch to a user that can't start further threads."""
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]

    def forbid() -> None:
        if not os.geteuid():
            # Root is exempt from the limit.
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))

    on_signals(forbid, lambda: resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard)))


def clock() -> None:
    """Set the wall clock forward by a day and back."""
    now, now_ns = time.time, time.time_ns
    shift = 0

    def step(days: int) -> None:
        nonlocal shift
        shift += days * DAY_SECONDS

    time.time = lambda: now() + shift
    time.time_ns = lambda: now_ns() + shift * 1_000_000_000
    on_signals(lambda: step(1), lambda: step(-1))


class Database:
    """A connection to SQLite whose statements can fail."""

    def __init__(self, database: sqlite3.Connection, fault: str) -> None:
        self._database = database
        self._fault = fault
        self.fails = False

    def _run(self, name: str, *arguments: Any) -> Any:
        # With "rollback", a transaction begins and stays open.
        if self.fails and self._fault == "rollback" and name == "executemany":
            self._database.executemany(*arguments)
        if self.fails and not (self._fault == "rollback" and arguments and arguments[0].startswith("SELECT")):
            raise MemoryError if self._fault == "memory" else sqlite3.OperationalError("disk I/O error")
        return getattr(self._database, name)(*arguments)

    def execute(self, *arguments: Any) -> Any:
        return self._run("execute", *arguments)

    def executemany(self, *arguments: Any) -> Any:
        return self._run("executemany", *arguments)

    def rollback(self) -> None:
        self._run("rollback")

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._run("rollback" if kind else "commit")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)


def sql(fault: str) -> None:
    """Let the store's statements fail."""
    connect = sqlite3.connect
    databases: list[Database] = []

    def connect_faulty(*arguments: Any, **options: Any) -> Any:
        databases.append(Database(connect(*arguments, **options), fault))
        return databases[-1]

    def have_fail(fails: bool) -> None:
        for database in databases:
            database.fails = fails

    sqlite3.connect = connect_faulty  # type: ignore[assignment]
    on_signals(lambda: have_fail(True), lambda: have_fail(False))


if __name__ == "__main__":
    {"files": files, "threads": threads, "clock": clock}.get(sys.argv[1], lambda: sql(sys.argv[1]))()
    sys.argv[1:] = ["serve"]
    sys.exit(main())
