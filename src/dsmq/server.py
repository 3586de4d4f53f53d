"""The server: starts its parts, monitors them, and stops them.

    from dsmq.server import serve
    serve(host="127.0.0.1", port=30008)     # blocks until it is stopped

As a script: python server.py [host [port]]
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Self, Unpack

from dsmq import logs, signals, system
from dsmq import settings as config
from dsmq.broker import listener as listening
from dsmq.broker.access import Access
from dsmq.broker.admission import Admission
from dsmq.broker.commands import TABLE
from dsmq.broker.context import ServerContext
from dsmq.broker.event_loop import EventLoop, disconnect_clients, wake_readers
from dsmq.broker.jobs import TakeQueues
from dsmq.broker.listener import Listener
from dsmq.broker.usage import Usage
from dsmq.errors import ConfigError, DSMQError, ServerFailed, StartupError
from dsmq.ops import reports
from dsmq.ops.status import Status
from dsmq.ops.systemd import Systemd
from dsmq.options import RESTART_REQUIRED, ServeOptions, ServerOptions, choose_settings, list_options
from dsmq.settings import EmbeddedSettings, Settings
from dsmq.store.api import Store
from dsmq.store.expiry import Expiry
from dsmq.store.snapshots import LAST_SNAPSHOT_SECONDS, SnapshotStats, Snapshotter
from dsmq.stores import apply_settings, await_store, new_snapshotter, new_store
from dsmq.threads import join, start, wait_until

if TYPE_CHECKING:
    from dsmq.ops.http import HTTPEndpoint

# How often the main thread checks the other threads, and how long a reload waits for them.
WATCH_SECONDS = 1.0

# Not __name__, which is __main__ if this module runs as a script.
_logger = logging.getLogger("dsmq.server")


@list_options
def serve(
    host: str = "127.0.0.1",
    port: int = 30008,
    name: str = "mqdb",  # noqa: ARG001 - the database's name in dsmq 1.4
    verbose: bool = False,  # noqa: FBT001, FBT002 - positional in dsmq 1.4
    **settings: Unpack[ServeOptions],
) -> None:
    """Serve until SIGTERM, SIGINT or a client's SHUTDOWN, then stop gracefully.

    host is an IPv4 or IPv6 address, a name, or `unix:/path`. verbose logs (see log_stream). name is accepted for
    compatibility with dsmq 1.4 and ignored. Other settings (see dsmq.toml.example) come from keyword arguments,
    `DSMQ_*` variables, and the file named by `DSMQ_CONFIG`. The HTTP endpoint is off unless one of them sets http_port.

    May run in any thread or process; signals are handled in a main thread only. Raises ConfigError, StartupError, or
    ServerFailed.
    """
    effective = config.load(kind=EmbeddedSettings, host=host, port=port, **settings)
    if verbose:
        logs.start(*effective.logging)
    run(effective)


def run(settings: Settings, load: Callable[[], Settings] | None = None, systemd: Systemd | None = None) -> None:
    """Serve with these settings, like `serve`. Raises StartupError, ConfigError or ServerFailed.

    On SIGHUP, `load` is called for the new settings; without it, the signal is left alone. `systemd` has the sockets
    that systemd passed, if any, and is notified of the server's state.
    """
    server = Server(settings, load=load, systemd=systemd)
    try:
        # Install the handlers first: a signal may arrive as soon as the log says that the server is running.
        with signals.handled(server.request_stop, server.request_reload if load else None), server:
            server.run()
    finally:
        # multiprocessing ends its processes without calling atexit handlers.
        logs.drain()


class Server:
    """A server that runs in its own threads, for example in a test; a `with` block starts and stops it.

        with Server(port=0) as server, connect(port=server.port) as mq:  # 0: any free port

    Its threads are an EventLoop for each of io_threads, Expiry, a Snapshotter if there is a snapshot interval, and an
    HTTPEndpoint for each HTTP address. Each part has `thread`, `start` and `stop`; `_end_threads` stops them.
    """

    @list_options
    def __init__(
        self,
        settings: Settings | None = None,
        own_store: Store | None = None,
        *,
        load: Callable[[], Settings] | None = None,
        systemd: Systemd | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        """Take either `settings` or options. `load` returns new settings for a reload.

        Raises StartupError if the system lacks a feature that a server needs, and ConfigError if a setting is invalid,
        or if a file of tokens or certificates can't be used.
        """
        settings = choose_settings(settings, options)
        if missing := system.missing_features():
            raise StartupError(f"this system can't run a dsmq server: it has no {', no '.join(missing)}")
        self._load = load
        self._systemd = systemd or Systemd()
        self._store = own_store or new_store(settings)
        # Reasons to stop; None requests a reload.
        self._commands: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        shut_down = partial(self.request_stop, shutdown=True)
        self.context = ServerContext(
            TABLE, settings, self._store, Access.load(settings), Usage(), TakeQueues(), shut_down
        )
        self._apply(settings)
        self._listeners: list[Listener] = []
        self._workers: list[EventLoop] = []
        self._expiry = Expiry(self._store, settings.expiry_interval_seconds)
        self._snapshotter = new_snapshotter(settings, self._store)
        self._http_endpoints: list[HTTPEndpoint] = []
        snapshots = self._snapshotter.stats if self._snapshotter else SnapshotStats()
        self.context.usage.connections.limit = system.affordable_connections(settings.max_connections)
        self.status = Status(self.context, self._workers, self._expiry, self._snapshotter, snapshots)
        self.context.info = self.status.info
        self._admission = Admission(self.context, self._workers, self.status.own_counters)
        self._full: set[str] = set()
        self._runs = self._stopped = False
        self._stopping = threading.Lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # A second Ctrl-C may arrive before the server has begun to stop after the first.
        self.stop(abandon=self.status.stopping and isinstance(error, KeyboardInterrupt))

    @property
    def addresses(self) -> list[str]:
        """The addresses for clients: `host:port` or `unix:/path`."""
        return [listening.address(listener.socket) for listener in self._listeners]

    @property
    def port(self) -> int:
        """The TCP port for clients; 0 before the start or if there is none."""
        return self.status.port

    @property
    def http_port(self) -> int | None:
        """The TCP port of the HTTP endpoint, if there is one."""
        return int(self._http_endpoints[0].socket.getsockname()[1]) if self._http_endpoints else None

    # Start

    def start(self) -> None:
        """Listen and serve in the server's own threads.

        Raises StartupError, or ConfigError if other machines could connect without authentication. In that case,
        nothing is left behind. A server can be started only once.
        """
        if self._stopped or self in _servers:
            raise RuntimeError("a server can be started only once: make another Server")
        system.raise_malloc_threshold()
        with ExitStack() as undo:
            undo.callback(self.stop)
            _servers.add(self)
            if not self._open_store():
                undo.pop_all()
                return
            self._listen()
            self._http_endpoints = self._http_endpoints or _listen_for_http(self.status, self._systemd)
            if self._snapshotter:
                # Until then, new clients wait in the listen queue.
                self._snapshotter.open()
            self._start_threads()
            undo.pop_all()
        names = [listener.socket.getsockname() for listener in self._listeners]
        self.status.port = next((name[1] for name in names if isinstance(name, tuple)), 0)
        self.status.addresses = self.addresses
        self.status.serving = True
        reports.log_started(self.addresses)
        self._log_configuration()
        for endpoint in self._http_endpoints:
            reports.log_http_endpoint(listening.address(endpoint.socket))
        self._systemd.notify("READY=1")

    def _listen(self) -> None:
        settings, passed = self.context.settings, self._systemd.queue
        # Sockets that systemd passed, and their files, outlive the server.
        close = socket.socket.close if passed else listening.close
        sockets = passed or listening.listen(settings.host, settings.port, settings.listen_backlog)
        self._listeners = [Listener(sock, self._admission.assign, close) for sock in sockets]
        self.context.access.check_exposure(sockets)

    def _open_store(self) -> bool:
        """Wait until the store is ready, while /readyz reports why it is not; return False if asked to stop first."""
        self._store.groups.on_available = self.context.take_queues.wake
        self._store.start(partial(wake_readers, self._workers), partial(disconnect_clients, self._workers))
        if self._store.wait(0.0):
            return True
        self._http_endpoints = _listen_for_http(self.status, self._systemd)
        start(endpoint.start for endpoint in self._http_endpoints)
        return await_store(self._store, lambda: self.status.stopping, self._systemd.notify)

    def _start_threads(self) -> None:
        for number in range(self.context.settings.io_workers):
            self._workers.append(EventLoop(f"dsmq-io-{number}", self.context, self._workers))
        self._workers[0].listen(self._listeners)
        start(part.start for part in self._parts() if not part.thread.is_alive())

    def _log_configuration(self) -> None:
        limit, sockets = self.context.usage.connections.limit, [listener.socket for listener in self._listeners]
        reports.log_configuration(self.context.settings, self.context.access, limit, sockets)

    # Watch

    def run(self) -> None:
        """Wait until the server is asked to stop, then stop it.

        Raises ServerFailed if one of its threads dies, or the final snapshot can't be written.
        """
        self._runs = True
        while True:
            with suppress(queue.Empty):
                if reason := self._commands.get(timeout=min(WATCH_SECONDS, self._systemd.watchdog_interval)):
                    _logger.info("stopping: %s", reason, extra=logs.event("stopping", reason=reason))
                    self.stop()
                    if self._snapshotter and not self._snapshotter.saved:
                        raise ServerFailed("the final snapshot could not be written")
                    return
                with self._systemd.reloading():
                    self.reload()
            self._watch()

    def request_stop(self, reason: str, *, shutdown: bool = False) -> None:
        """Make `run` stop the server. Safe in signal handlers and threads.

        `shutdown`: a client has requested it, so stop even if nothing calls `run`.
        """
        self.status.stopping = True
        self._commands.put(reason)
        if shutdown and not self._runs:
            threading.Thread(target=self.stop, name="dsmq-stop").start()

    def request_reload(self) -> None:
        """Make `run` reload the configuration. Safe in signal handlers and threads."""
        self._commands.put(None)

    def _watch(self) -> None:
        logs.summarise()
        self._admission.close_refused()
        threads = [part.thread for part in (*self._parts(), self._store) if part.thread]
        if dead := [thread.name for thread in threads if not thread.is_alive()]:
            raise ServerFailed(f"threads died: {', '.join(dead)}")
        before, self._full = self._full, self._store.full()
        reports.log_full(before, self._full, self.context.settings)
        self._systemd.notify_status(self.status)

    def reload(self) -> None:
        """Apply new settings, tokens and certificates; if any of them is invalid, change nothing."""
        before, access_before = self.context.settings, self.context.access
        try:
            new = self._load() if self._load else before
            access = Access.load(new)
            access.check_exposure(listener.socket for listener in self._listeners)
        except Exception as error:
            expected, about = isinstance(error, ConfigError), logs.event("reload_failed", error=str(error))
            _logger.error("reload failed: %s", error, extra=about, exc_info=not expected)
            return
        self.context.access = access
        self._apply(new.model_copy(update={name: getattr(before, name) for name in RESTART_REQUIRED}))
        logging.getLogger("dsmq").setLevel(new.log_level.upper())
        calls = [(worker, worker.apply_settings) for worker in self._workers]
        # Wait, so that the settings are in effect when they are logged.
        _call_in_loops(calls, time.monotonic() + WATCH_SECONDS)
        reports.log_reload(before, new, RESTART_REQUIRED, access_before, access)
        self._log_configuration()

    def _apply(self, settings: Settings) -> None:
        self.context.settings = settings
        self.context.usage.set_limits(settings)
        apply_settings(self._store, settings)

    # Stop

    def stop(self, *, abandon: bool = False) -> list[str]:
        """Stop in stages, within stop_timeout_seconds; return the names of the threads that are still running.

        Idempotent. `abandon`, or a KeyboardInterrupt during the stop, skips the remaining stages, including the last
        snapshot.
        """
        with self._stopping:
            if self._stopped:
                return []
            try:
                return self._abandon() if abandon else self._stop_gracefully()
            except KeyboardInterrupt:
                self._abandon()
                raise
            finally:
                self._stopped = True

    def _stop_gracefully(self) -> list[str]:
        seconds = self.context.settings.stop_timeout_seconds
        deadline = time.monotonic() + seconds
        self.status.stopping = True
        self._systemd.stopping(seconds + (LAST_SNAPSHOT_SECONDS if self._snapshotter else 0))
        survivors = self._end_threads(deadline)
        if self._snapshotter:
            # A surviving thread may still use the store, so the snapshot must not be marked as a clean shutdown.
            self._snapshotter.finish(deadline, is_last=not survivors)
            survivors += self._snapshotter.abandon()
        if survivors:
            about = logs.event("stop_incomplete", threads=survivors)
            _logger.error("still running after %s s: %s", seconds, ", ".join(survivors), extra=about)
            return survivors
        self._store.close()
        if self.status.serving:
            logs.summarise()
            _logger.info("stopped", extra=logs.event("stopped"))
        return []

    def _abandon(self) -> list[str]:
        """Skip the remaining stages of a stop. Stages that are done may be repeated, which takes no time."""
        _logger.warning("interrupted: stopping immediately", extra=logs.event("stop_interrupted"))
        survivors = self._end_threads(time.monotonic())
        if self._snapshotter:
            survivors += self._snapshotter.abandon()
        if not survivors:
            self._store.close()
        return survivors

    def _end_threads(self, deadline: float) -> list[str]:
        """End all threads, without waiting for the snapshotter yet; return the names of those still running."""
        if self._workers and self._workers[0].thread.is_alive():
            calls = [(self._workers[0], listener.stop_accepting) for listener in self._listeners]
            _call_in_loops(calls, deadline)
        for listener in self._listeners:
            listener.close()
        for worker in self._workers:
            if worker.thread.ident:
                worker.stop(max(0.0, deadline - time.monotonic()))
            else:
                worker.close()
        self._expiry.stop()
        if self._snapshotter:
            self._snapshotter.stop()
        for thread in (*(worker.thread for worker in self._workers), self._expiry.thread):
            join(thread, deadline)
        # Until here, /readyz has reported that the server is stopping.
        for endpoint in self._http_endpoints:
            endpoint.stop()
            join(endpoint.thread, deadline)
        self._admission.close_refused(keep=0)
        return [part.thread.name for part in self._parts() if part is not self._snapshotter and part.thread.is_alive()]

    def _parts(self) -> list[EventLoop | Expiry | Snapshotter | HTTPEndpoint]:
        """Return all parts that have a thread."""
        snapshotter = [self._snapshotter] if self._snapshotter and self._snapshotter.interval else []
        return [*self._workers, self._expiry, *snapshotter, *self._http_endpoints]

    def close_inherited(self) -> None:
        """Close a forked process's copies of the sockets and files; the parent stops the server."""
        self._stopping, self._stopped = threading.Lock(), True
        for listener in self._listeners:
            listener.socket.close()
        for worker in self._workers:
            worker.abandon()
        for endpoint in self._http_endpoints:
            endpoint.close_inherited()
        self._store.close_inherited()
        if self._snapshotter:
            self._snapshotter.close_inherited()


def _listen_for_http(status: Status, systemd: Systemd) -> list[HTTPEndpoint]:
    settings, passed = status.context.settings, systemd.queue
    close = socket.socket.close if passed else listening.close
    # If systemd passes the sockets, the process may have no network access, and can't open others.
    sockets = systemd.metrics
    if not passed and settings.http_port != "off":
        sockets = listening.listen(settings.http_host, settings.http_port, 16, "http-")
    if not sockets:
        return []
    from dsmq.ops.http import HTTPEndpoint  # noqa: PLC0415 - slow, and may not be needed

    return [HTTPEndpoint(sock, status, close) for sock in sockets]


def _call_in_loops(calls: Sequence[tuple[EventLoop, Callable[[], None]]], deadline: float) -> None:
    """Run each call in its event loop's thread; wait until all are done, or until the deadline."""
    pending = set(calls)
    for call in calls:
        call[0].post(call[1])
        call[0].post(partial(pending.discard, call))
    wait_until(lambda: not pending, deadline)


# Running servers; a forked process closes its copies of their sockets.
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _close_inherited() -> None:
    for server in list(_servers):
        server.close_inherited()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def main(arguments: Sequence[str]) -> None:
    """Serve on the host and port given as arguments; both are optional."""
    host, port, *others = [*arguments, *("127.0.0.1", "30008")[len(arguments) :]]
    if others or not (port.isascii() and port.isdigit() and len(port) < 10):
        sys.exit("usage: server.py [host [port]]")
    logs.never_block()
    try:
        serve(host, int(port), verbose=True)
    except DSMQError as error:
        sys.exit(f"server.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
