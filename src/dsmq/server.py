"""The server: puts the parts together, watches over them, and takes them apart again.

    from dsmq.server import serve
    serve(host="127.0.0.1", port=30008)     # blocks until it is stopped

As a script: python server.py [host [port]]
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

from dsmq import __version__, config, listening, metrics
from dsmq.commands import Services
from dsmq.config import EmbeddedSettings, Settings
from dsmq.errors import Busy, CannotStart, DSMQError, ServerFailed
from dsmq.expiry import Expiry
from dsmq.listening import Listener
from dsmq.metrics import Counters
from dsmq.protocol import encode_error
from dsmq.store import SQLiteStore, Store, Totals
from dsmq.system import expect_long_messages
from dsmq.worker import Worker

# File descriptors left for other things than connections.
RESERVED_FILES = 64
# How often the main thread looks whether the others live.
WATCH_SECONDS = 1.0
# What each stage of stopping gets, even if the stages before have used up all the time.
LEAST_STAGE_SECONDS = 0.2

# By its name, also where this module runs as a script.
_logger = logging.getLogger("dsmq.server")


def serve(
    host: str = "127.0.0.1",
    port: int = 30008,
    name: str = "mqdb",  # noqa: ARG001 - the database's name in dsmq 1.4
    verbose: bool = False,  # noqa: FBT001, FBT002 - positional in dsmq 1.4
    **settings: Any,
) -> None:
    """Serve until SIGTERM, SIGINT or a client's SHUTDOWN, then stop gracefully.

    host is an IPv4 or IPv6 address, a name, or `unix:/path`. verbose logs to stderr. name is accepted
    for the sake of dsmq 1.4 and means nothing. Other settings (see dsmq.toml.example) come from keyword
    arguments, `DSMQ_*`, and the file that `DSMQ_CONFIG` names. There is no metrics port unless one of them asks for it.

    It may run in any thread or process; signals are handled in a main thread only. Raises ConfigError,
    CannotStart, or ServerFailed.
    """
    effective = config.load(kind=EmbeddedSettings, host=host, port=port, **settings)
    if verbose:
        log_to_stderr(effective.log_level)
    run(effective)


def run(settings: Settings) -> None:
    """Serve until a signal or a client's SHUTDOWN, then stop gracefully. Raises as `serve` does."""
    server = Server(settings)
    # Before it says that it serves: whoever reads that may send a signal at once.
    with _signals(server.request_stop), server:
        server.run()


class Server:
    """A server that can be started and stopped; a context manager does both."""

    def __init__(self, settings: Settings, store: Store | None = None) -> None:
        self.settings = settings
        self._store = store or SQLiteStore(round(settings.max_age_seconds * 1000))
        self._started_at = time.time()
        self._orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._services = Services(settings, self._store, self.request_stop, self.info)
        self._workers: list[Worker] = []
        self._listeners: list[Listener] = []
        self._expiry = Expiry(self._store, settings.expiry_interval_seconds)
        self._side_port: Any = None
        self._numbers = itertools.count(1)
        self._max_connections = _affordable(settings.max_connections)
        self._refused = Counters()
        self._refusing = False
        self._started = self._stopped = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whoever interrupts it twice does not want to wait for it.
        self.stop(0 if isinstance(error, KeyboardInterrupt) else None)

    # Start

    def start(self) -> None:
        """Listen and serve, in threads of its own. Raises CannotStart, with nothing left behind."""
        expect_long_messages()
        with ExitStack() as undo:
            undo.callback(self.stop)
            settings = self.settings
            sockets = listening.listen(settings.host, settings.port, settings.listen_backlog)
            self._listeners = [Listener(sock, self._place) for sock in sockets]
            if settings.metrics_port != "off":
                self._side_port = self._open_side_port(settings.metrics_host, settings.metrics_port)
            for number in range(settings.io_workers):
                self._workers.append(Worker(f"dsmq-io-{number}", self._services, self._workers))
            self._workers[0].listen(self._listeners)
            try:
                for part in self._parts():
                    part.start()
            except RuntimeError as error:
                raise CannotStart(str(error)) from error
            undo.pop_all()
        self._started = True
        _logger.info("dsmq %s serves on %s (process %d)", __version__, ", ".join(self.addresses), os.getpid())
        if self._side_port:
            _logger.info("metrics on http://%s/metrics", listening.shown(settings.metrics_host, self.metrics_port or 0))

    def _open_side_port(self, host: str, port: int) -> Any:
        # Imported here, because a server without a side port needs none of it.
        from dsmq.sideport import SidePort  # noqa: PLC0415

        sock, *others = listening.listen(host, port, 16)
        for other in others:
            other.close()
        return SidePort(sock, metrics.registry(self), self.health)

    def _place(self, sock: socket.socket, peer: str) -> None:
        """Give an accepted connection to the worker that has the fewest, or refuse it."""
        if self.connections() >= self._max_connections:
            self._refuse(sock, peer)
            return
        self._refusing = False
        worker = min(self._workers, key=lambda worker: len(worker.connections))
        adopt = partial(worker.adopt, sock, peer, next(self._numbers))
        if worker.thread is threading.current_thread():
            adopt()
        else:
            worker.post(adopt)

    def _refuse(self, sock: socket.socket, peer: str) -> None:
        self._refused.refused += 1
        self._refused.errors[Busy.code] += 1
        if not self._refusing:
            _logger.warning("connections are refused from now on, there are %d", self._max_connections)
        self._refusing = True
        try:
            sock.send(encode_error(Busy(f"{self._max_connections} connections are open, no more are taken")))
            sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            _logger.debug("%s was gone when it was refused: %s", peer, error)
        sock.close()

    # Watch

    def run(self) -> None:
        """Wait until the server is asked to stop. Raises ServerFailed if one of its threads dies."""
        while True:
            try:
                reason = self._orders.get(timeout=WATCH_SECONDS)
            except queue.Empty:
                if dead := [thread.name for thread in self._threads() if not thread.is_alive()]:
                    raise ServerFailed(f"threads died: {', '.join(dead)}") from None
            else:
                _logger.info("stopping: %s", reason)
                self.stop()
                return

    def request_stop(self, reason: str) -> None:
        """Have `run` stop the server. Safe in signal handlers and threads."""
        self._orders.put(reason)

    def _threads(self) -> list[threading.Thread]:
        return [part.thread for part in self._parts()]

    def _parts(self) -> list[Any]:
        """What runs in a thread of its own."""
        return [*self._workers, self._expiry, *([self._side_port] if self._side_port else [])]

    # Stop

    def stop(self, seconds: float | None = None) -> list[str]:
        """Stop in stages, within stop_timeout_seconds unless told; return the names of threads that survived.

        Idempotent.
        """
        if self._stopped:
            return []
        self._stopped = True
        seconds = self.settings.stop_timeout_seconds if seconds is None else seconds
        deadline = time.monotonic() + seconds
        self._stop_accepting(deadline)
        for worker in self._workers:
            worker.stop(max(0.0, deadline - time.monotonic()))
        self._expiry.stop()
        for thread in (*(worker.thread for worker in self._workers), self._expiry.thread):
            _join(thread, deadline)
        for worker in self._workers:
            if worker.thread.ident is None:
                worker.close()
        if self._side_port:
            self._side_port.stop()
            _join(self._side_port.thread, deadline)
        survivors = [thread.name for thread in self._threads() if thread.is_alive()]
        if survivors:
            _logger.error("still running after %s s: %s", seconds, ", ".join(survivors))
            return survivors
        self._store.close()
        if self._started:
            _logger.info("stopped")
        return []

    def _stop_accepting(self, deadline: float) -> None:
        done = threading.Event()

        def unlisten() -> None:
            for listener in self._listeners:
                self._workers[0].unlisten(listener)
            done.set()

        if self._workers and self._workers[0].thread.is_alive():
            self._workers[0].post(unlisten)
            done.wait(max(LEAST_STAGE_SECONDS, deadline - time.monotonic()))
        for listener in self._listeners:
            listener.closed = True
            listening.close(listener.socket)

    # What can be asked of it

    @property
    def addresses(self) -> list[str]:
        """Where it listens: `host:port` or `unix:/path`."""
        return [
            listening.UNIX + name
            if isinstance(name := listener.socket.getsockname(), str)
            else listening.shown(*name[:2])
            for listener in self._listeners
        ]

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return int(self._listeners[0].socket.getsockname()[1])

    @property
    def metrics_port(self) -> int | None:
        """The TCP port of the side port, if there is one."""
        return self._side_port.port if self._side_port else None

    def counters(self) -> Counters:
        return metrics.total([*(worker.counters for worker in self._workers), self._refused])

    def totals(self) -> Totals:
        return self._store.totals()

    def connections(self) -> int:
        return sum(len(worker.connections) for worker in self._workers)

    def waiting(self) -> int:
        return sum(worker.waiting for worker in self._workers)

    def health(self) -> tuple[bool, dict[str, object]]:
        """Return whether every thread lives, and the reasons for /healthz."""
        dead = [thread.name for thread in self._threads() if not thread.is_alive()]
        return not dead, {"status": "failing" if dead else "ok", "dead_threads": dead}

    def info(self) -> Mapping[str, Mapping[str, object]]:
        """Return what INFO shows."""
        counted, held = self.counters(), self.totals()
        return {
            "server": {
                "dsmq_version": __version__,
                "python_version": platform.python_version(),
                "process_id": os.getpid(),
                "epoch": self._store.epoch,
                "uptime_in_seconds": int(time.time() - self._started_at),
            },
            "clients": {"connected_clients": self.connections(), "blocked_clients": self.waiting()},
            "stats": {
                "total_connections_received": counted.opened,
                "rejected_connections": counted.refused,
                "total_commands_processed": counted.requests,
                "puts": held.stored,
                "deliveries": counted.delivered,
                "errors": sum(counted.errors.values()),
            },
            "store": {**held._asdict(), "last_id": self._store.last_id()},
        }


def log_to_stderr(level: str) -> None:
    """Log what dsmq has to say to stderr; other loggers are left alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("dsmq")
    logger.addHandler(handler)
    logger.setLevel(level.upper())


@contextmanager
def _signals(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into a request to stop; a further Ctrl-C does not wait. Only in a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal seen
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen = True
        request_stop(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def allow_more_files() -> None:
    """Raise this process's limit on open files as far as it may; each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _affordable(connections: int) -> int:
    """Return how many connections the limit on open files allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or connections <= files - RESERVED_FILES:
        return connections
    affordable = max(1, files - RESERVED_FILES)
    _logger.warning("only %d open files are allowed: %d connections at a time, not %d", files, affordable, connections)
    return affordable


def _join(thread: threading.Thread, deadline: float) -> None:
    # One that uses the time up, as a worker may whose clients don't read, must not look as if it survived, nor
    # leave nothing for the next.
    if thread.is_alive():
        thread.join(max(0.0, deadline - time.monotonic()) + LEAST_STAGE_SECONDS)


def main(arguments: Sequence[str]) -> None:
    """Serve on the host and port of a command line; both may be left out."""
    host, port, *others = [*arguments, *("127.0.0.1", "30008")[len(arguments) :]]
    if others or not (port.isascii() and port.isdigit()):
        sys.exit("usage: server.py [host [port]]")
    try:
        serve(host, int(port), verbose=True)
    except DSMQError as error:
        sys.exit(f"server.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
