"""The server: puts the parts together, watches over them, and takes them apart again.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

from dsmq import __version__, logs, signals, system
from dsmq import settings as config
from dsmq.broker import listener as listening
from dsmq.broker.access import Access
from dsmq.broker.admission import Admission
from dsmq.broker.commands import ServerContext
from dsmq.broker.counters import Counters
from dsmq.broker.event_loop import EventLoop
from dsmq.broker.listener import Listener
from dsmq.broker.usage import Usage
from dsmq.errors import ConfigError, DSMQError, ServerFailed, StartupError
from dsmq.ops import metrics
from dsmq.ops.status import Status
from dsmq.ops.systemd import Systemd
from dsmq.settings import EmbeddedSettings, Settings
from dsmq.store.api import Limits, Store, Totals
from dsmq.store.expiry import Expiry
from dsmq.store.snapshots import LAST_SNAPSHOT_SECONDS, Snapshotter
from dsmq.store.sqlite import SQLiteStore
from dsmq.system import expect_long_messages
from dsmq.threads import join, wait_until

# How often the main thread checks that the others live.
WATCH_SECONDS = 1.0
# Settings that a reload does not change.
RESTART_REQUIRED = (
    *("host", "port", "listen_backlog", "http_host", "http_port"),
    *("io_threads", "busy_poll_microseconds", "expiry_interval_seconds", "max_connections", "max_log_lines_per_second"),
    *("log_format", "log_stream", "snapshot_file", "snapshot_interval_seconds"),
)

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

    host is an IPv4 or IPv6 address, a name, or `unix:/path`. verbose logs (see log_stream). name is accepted
    for the sake of dsmq 1.4 and means nothing. Other settings (see dsmq.toml.example) come from keyword
    arguments, `DSMQ_*`, and the file that `DSMQ_CONFIG` names. There is no metrics port unless one of them asks for it.

    It may run in any thread or process; signals are handled in a main thread only. Raises ConfigError,
    StartupError, or ServerFailed.
    """
    effective = config.load(kind=EmbeddedSettings, host=host, port=port, **settings)
    if verbose:
        logs.start(*effective.logging)
    run(effective)


def run(settings: Settings, load: Callable[[], Settings] | None = None, systemd: Systemd | None = None) -> None:
    """Serve until a signal or a client's SHUTDOWN, then stop gracefully. Raises as `serve` does.

    On SIGHUP `load` returns the settings anew; without it, that signal is left alone. What `systemd` holds is used in
    place of sockets of its own, and it is told how the server is.
    """
    server = Server(settings, load=load, systemd=systemd)
    try:
        # Before it says that it serves: whoever reads that may send a signal at once.
        with signals.handled(server.request_stop, server.request_reload if load else None), server:
            server.run()
    finally:
        # A process of multiprocessing ends without the handlers of atexit.
        logs.drain()


class Server:
    """A server that can be started and stopped; a context manager does both."""

    def __init__(
        self,
        settings: Settings,
        store: Store | None = None,
        *,
        load: Callable[[], Settings] | None = None,
        systemd: Systemd | None = None,
    ) -> None:
        """`load` returns the settings anew.

        Raises StartupError if the system lacks what a server needs, ConfigError if a file of tokens or certificates
        can't be used.
        """
        if missing := system.lacking():
            raise StartupError(f"the server does not run here: this system has no {', no '.join(missing)}")
        self._load = load
        self._systemd = systemd or Systemd()
        self.settings = settings
        self._store = store or SQLiteStore(0)
        # Reasons to stop; None: read the configuration anew.
        self._orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.context = ServerContext(
            settings, self._store, Access.load(settings), Usage(), self.request_stop, self.info
        )
        self._listeners: list[Listener] = []
        self._apply(settings)
        self._workers: list[EventLoop] = []
        self._expiry = Expiry(self._store, settings.expiry_interval_seconds)
        self._http_endpoints: list[Any] = []
        self._snapshotter = self._new_snapshotter(settings)
        connections = system.affordable_connections(settings.max_connections)
        self.status = Status(self.context, self._workers, self._expiry, self._snapshotter, connections)
        self._admission = Admission(self.context, self._workers, connections, self.status.refused)
        self._full: set[str] = set()
        self._started = self._stopped = False
        self._stopping = threading.Lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whoever interrupts it twice does not want to wait for it.
        self.stop(0 if isinstance(error, KeyboardInterrupt) else None)

    def _apply(self, settings: Settings) -> None:
        self.settings = self.context.settings = settings
        self.context.usage.set_limits(settings)
        self._store.max_age_ms = round(settings.max_age_seconds * 1000)
        self._store.limits = Limits(
            settings.max_topics,
            settings.max_stored_messages,
            settings.max_stored_bytes,
            settings.max_stored_messages_per_topic,
            settings.max_stored_bytes_per_topic,
        )

    def _new_snapshotter(self, settings: Settings) -> Snapshotter | None:
        if not settings.snapshot_file:
            return None
        if not isinstance(self._store, SQLiteStore):
            raise ConfigError("snapshot_file: this store keeps what it holds by itself")
        return Snapshotter(self._store, settings.snapshot_file, settings.snapshot_interval_seconds)

    # Start

    def start(self) -> None:
        """Listen and serve, in threads of its own.

        Raises StartupError, or ConfigError if it would serve anyone on a network, with nothing left behind.
        """
        expect_long_messages()
        with ExitStack() as undo:
            undo.callback(self.stop)
            settings = self.settings
            passed = self._systemd.queue
            _servers.add(self)
            sockets = passed or listening.listen(settings.host, settings.port, settings.listen_backlog)
            self._listeners = [Listener(sock, self._admission.assign) for sock in sockets]
            self.context.access.check_exposure(sockets)
            # Where the sockets are passed, the process may have no network to make one in.
            for sock in self._systemd.metrics if passed else self._http_sockets():
                self._http_endpoints.append(self._open_http_endpoint(sock))
            if self._snapshotter:
                # Clients that connect meanwhile wait in the kernel's queue.
                self._snapshotter.open()
            for number in range(settings.io_workers):
                self._workers.append(EventLoop(f"dsmq-io-{number}", self.context, self._workers))
            self._workers[0].listen(self._listeners)
            try:
                for part in self._parts():
                    part.start()
            except RuntimeError as error:
                raise StartupError(str(error)) from error
            undo.pop_all()
        names = [listener.socket.getsockname() for listener in self._listeners]
        self.status.port = next((name[1] for name in names if isinstance(name, tuple)), None)
        self._started = self.status.serving = True
        started = logs.event("started", version=__version__, addresses=self.addresses, process=os.getpid())
        _logger.info(
            "dsmq %s serves on %s (process %d)", __version__, ", ".join(self.addresses), os.getpid(), extra=started
        )
        self._log_configuration()
        for where in (endpoint.url for endpoint in self._http_endpoints):
            _logger.info(
                "metrics on %smetrics, for people %s", where, where, extra=logs.event("http_endpoint", url=where)
            )
        self._systemd.notify("READY=1")

    def _http_sockets(self) -> list[socket.socket]:
        if self.settings.http_port == "off":
            return []
        return listening.listen(self.settings.http_host, self.settings.http_port, 16, "http-")

    def _open_http_endpoint(self, sock: socket.socket) -> Any:
        # Imported here, because a server without an HTTP endpoint does not need it.
        from dsmq.ops.http import HTTPEndpoint  # noqa: PLC0415

        registry, context = metrics.registry(self.status), self.context
        return HTTPEndpoint(sock, registry, self.status, lambda: context.access.http_authenticator)

    def _log_configuration(self) -> None:
        settings, access = self.settings, self.context.access
        tokens = len(access.authenticator.tokens)
        tls = "off" if not access.tls else "on, with client certificates" if access.client_ca_file else "on"
        limits = {
            "connections": self._admission.max_connections,
            "messages": settings.max_stored_messages,
            "bytes": settings.max_stored_bytes,
            "topics": settings.max_topics,
        }
        shown = ", ".join(f"{value} {name}" for name, value in limits.items())
        about = logs.event("configured", tokens=tokens, tls=tls, limits=limits)
        _logger.info("tokens: %s; TLS: %s; limits: %s", tokens or "none", tls, shown, extra=about)
        if exposed := access.exposed(listener.socket for listener in self._listeners):
            _logger.warning(
                "no authentication: any client that can reach %s is an admin (protected_mode = false)",
                ", ".join(exposed),
                extra=logs.event("exposed", addresses=exposed),
            )

    # Watch

    def run(self) -> None:
        """Wait until the server is asked to stop, and stop it.

        Raises ServerFailed if one of its threads dies, or what it holds can't be kept.
        """
        while True:
            with suppress(queue.Empty):
                if reason := self._orders.get(timeout=min(WATCH_SECONDS, self._systemd.watchdog_interval)):
                    _logger.info("stopping: %s", reason, extra=logs.event("stopping", reason=reason))
                    self.stop()
                    if self._snapshotter and not self._snapshotter.saved:
                        raise ServerFailed("the last snapshot could not be written")
                    return
                with self._systemd.reloading():
                    self.reload()
            self._watch()

    def _watch(self) -> None:
        logs.summarise()
        self._admission.close_refused()
        if dead := [thread.name for thread in self._threads() if not thread.is_alive()]:
            raise ServerFailed(f"threads died: {', '.join(dead)}")
        self._log_full()
        self._systemd.notify_status(self.status)

    def _log_full(self) -> None:
        """Log which limits refuse puts, once when that begins and once when it ends."""
        before, self._full = self._full, self._store.full()
        for name in sorted(self._full - before):
            limit = f"{name} = {getattr(self.settings, name)} reached" if name in Settings.model_fields else name
            about = logs.event("full", limit=name)
            _logger.warning("full: %s; puts are refused until messages expire", limit, extra=about)
        for name in sorted(before - self._full):
            _logger.info("no longer full: %s", name, extra=logs.event("no_longer_full", limit=name))

    def request_stop(self, reason: str) -> None:
        """Have `run` stop the server. Safe in signal handlers and threads."""
        self._orders.put(reason)

    def request_reload(self) -> None:
        """Have `run` read the configuration anew. Safe in signal handlers and threads."""
        self._orders.put(None)

    def reload(self) -> None:
        """Apply new settings, tokens and certificates; if any of them is invalid, change nothing."""
        before, access_before = self.settings, self.context.access
        try:
            new = self._load() if self._load else before
            kept = {name: getattr(before, name) for name in RESTART_REQUIRED}
            access = Access.load(new)
            access.check_exposure(listener.socket for listener in self._listeners)
        except ConfigError as error:
            _logger.error("nothing is changed: %s", error, extra=logs.event("reload_failed", error=str(error)))
            return
        except Exception as error:
            _logger.exception("nothing is changed", extra=logs.event("reload_failed", error=str(error)))
            return
        self.context.access = access
        self._apply(new.model_copy(update=kept))
        logging.getLogger("dsmq").setLevel(new.log_level.upper())
        for worker in self._workers:
            worker.post(worker.apply_settings)
        self._await_workers()
        _log_reload(before, new, access_before, access)
        self._log_configuration()

    def _await_workers(self) -> None:
        """Wait until the event loops have applied the settings, so that the log is right; not for one that hangs."""
        done = [threading.Event() for _ in self._workers]
        deadline = time.monotonic() + WATCH_SECONDS
        for worker, event in zip(self._workers, done, strict=True):
            worker.post(event.set)
        wait_until(lambda: all(event.is_set() for event in done), deadline)

    def _threads(self) -> list[threading.Thread]:
        return [part.thread for part in self._parts()]

    def _parts(self) -> list[Any]:
        """What runs in a thread of its own."""
        keeper = [self._snapshotter] if self._snapshotter and self._snapshotter.interval else []
        return [*self._workers, self._expiry, *keeper, *self._http_endpoints]

    # Stop

    def stop(self, seconds: float | None = None) -> list[str]:
        """Stop in stages, within stop_timeout_seconds unless told; return the names of threads that survived.

        Idempotent. Where Ctrl-C interrupts it, it waits for the last snapshot only; another one gives that up as well.
        """
        with self._stopping:
            if self._stopped:
                return []
            try:
                return self._stop_within(self.settings.stop_timeout_seconds if seconds is None else seconds)
            except KeyboardInterrupt:
                about = logs.event("stop_interrupted")
                _logger.warning("interrupted: nothing but the last snapshot is waited for any more", extra=about)
                self._stop_within(0)
                raise
            finally:
                self._stopped = True
                if self._snapshotter:
                    self._snapshotter.abandon()

    def _stop_within(self, seconds: float) -> list[str]:
        """Go through the stages; those that are done already take no time."""
        deadline = time.monotonic() + seconds
        self.status.stopping = True
        self._systemd.stopping(seconds + (LAST_SNAPSHOT_SECONDS if self._snapshotter else 0))
        self._stop_accepting(deadline)
        survivors = self._end_threads(deadline)
        self._admission.close_refused(keep=0)
        if self._snapshotter:
            # Where others survive that may still use the store, it is not its last word.
            survivors += self._snapshotter.finish(deadline, is_last=not survivors)
        if survivors:
            about = logs.event("stop_incomplete", threads=survivors)
            _logger.error("still running after %s s: %s", seconds, ", ".join(survivors), extra=about)
            return survivors
        self._store.close()
        if self._started:
            logs.summarise()
            _logger.info("stopped", extra=logs.event("stopped"))
        return []

    def _stop_accepting(self, deadline: float) -> None:
        done = threading.Event()

        def unlisten() -> None:
            for listener in self._listeners:
                if not listener.closed:
                    self._workers[0].unlisten(listener)
            done.set()

        if self._workers and self._workers[0].thread.is_alive():
            self._workers[0].post(unlisten)
            wait_until(done.is_set, deadline)
        for listener in self._listeners:
            listener.closed = True
            self._close(listener.socket)

    def _close(self, sock: socket.socket) -> None:
        """Close a listening socket; one that was passed outlives the server, and so does its file."""
        (socket.socket.close if self._systemd.queue else listening.close)(sock)

    def _end_threads(self, deadline: float) -> list[str]:
        """End all threads but the keeper's, which is only told to; return the names of those that survive."""
        for worker in self._workers:
            worker.stop(max(0.0, deadline - time.monotonic()))
        self._expiry.stop()
        if self._snapshotter:
            self._snapshotter.stop()
        for thread in (*(worker.thread for worker in self._workers), self._expiry.thread):
            join(thread, deadline)
        for worker in self._workers:
            if worker.thread.ident is None:
                worker.close()
        for endpoint in self._http_endpoints:
            endpoint.stop(self._close)
            join(endpoint.thread, deadline)
        return [part.thread.name for part in self._parts() if part is not self._snapshotter and part.thread.is_alive()]

    def abandon(self) -> None:
        """Close the copies of what a forked process has of this server: it is the parent's to stop."""
        self._stopping, self._stopped = threading.Lock(), True
        for listener in self._listeners:
            listener.socket.close()
        for part in (*self._workers, *self._http_endpoints):
            part.abandon()
        if self._snapshotter:
            self._snapshotter.close_inherited()

    # What can be asked of it

    @property
    def addresses(self) -> list[str]:
        """Where it listens: `host:port` or `unix:/path`."""
        return [listening.address(listener.socket) for listener in self._listeners]

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return int(self._listeners[0].socket.getsockname()[1])

    @property
    def http_port(self) -> int | None:
        """The TCP port of the HTTP endpoint, if there is one."""
        return self._http_endpoints[0].port if self._http_endpoints else None

    def counters(self) -> Counters:
        return self.status.counters()

    def totals(self) -> Totals:
        return self.status.totals()

    def info(self) -> Mapping[str, Mapping[str, object]]:
        return self.status.info()

    def connections(self) -> int:
        return self.status.connections()

    def waiting(self) -> int:
        return self.status.waiting()


def _log_reload(before: Settings, after: Settings, access_before: Access, access: Access) -> None:
    changed = [name for name in Settings.model_fields if getattr(after, name) != getattr(before, name)]
    live, fixed = ([name for name in changed if (name in RESTART_REQUIRED) == kept] for kept in (False, True))
    tokens = access.authenticator.changes(access_before.authenticator)
    renewed = access.certificates_modified_ns != access_before.certificates_modified_ns
    names = [*live, *(f"{what} ({', '.join(which)})" for what, which in tokens.items() if which)]
    names += ["certificates"] * renewed
    about = logs.event("reloaded", changed=live, certificates=renewed, **tokens)
    _logger.info("configuration reloaded; changed: %s", ", ".join(names) or "nothing", extra=about)
    if fixed:
        about = logs.event("restart_needed", settings=fixed)
        _logger.warning("restart required to apply: %s", ", ".join(fixed), extra=about)


# Those that have been started, for processes that are forked.
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _abandon_all() -> None:
    for server in list(_servers):
        server.abandon()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)


def main(arguments: Sequence[str]) -> None:
    """Serve on the host and port of a command line; both may be left out."""
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
