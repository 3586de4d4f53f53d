"""The server: puts the parts together, watches over them, and takes them apart again.

    from dsmq.server import serve
    serve(host="127.0.0.1", port=30008)     # blocks until it is stopped

As a script: python server.py [host [port]]
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

from dsmq import __version__, environment, logs, system
from dsmq import settings as config
from dsmq.broker import auth
from dsmq.broker import listener as listening
from dsmq.broker.auth import Gate, HTTPGate
from dsmq.broker.commands import Services
from dsmq.broker.connection import Peer, Stream
from dsmq.broker.counters import Counters
from dsmq.broker.event_loop import Worker
from dsmq.broker.listener import Listener
from dsmq.broker.usage import Usage
from dsmq.errors import Busy, CannotStart, ConfigError, DSMQError, ReplyError, ServerFailed
from dsmq.ops import metrics
from dsmq.ops.status import Status
from dsmq.ops.systemd import Systemd
from dsmq.settings import EmbeddedSettings, Settings
from dsmq.store.api import Limits, Store, Totals
from dsmq.store.expiry import Expiry
from dsmq.store.snapshots import LAST_SNAPSHOT_SECONDS, Keeper
from dsmq.store.sqlite import SQLiteStore
from dsmq.system import expect_long_messages, has_terminal
from dsmq.threads import join, wait_until
from dsmq.wire.addresses import host_names
from dsmq.wire.resp import encode_error

# File descriptors left for other things than connections.
RESERVED_FILES = 64
# What is asked for at most where the limit on open files is unlimited.
MAX_FILES = 1_048_576
# How often the main thread looks whether the others live.
WATCH_SECONDS = 1.0
# Settings that are read once, at the start.
FIXED = (
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
    CannotStart, or ServerFailed.
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
        with _signals(server, reload=load is not None), server:
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

        Raises CannotStart if the system lacks what a server needs, ConfigError if a file of tokens or certificates
        can't be used.
        """
        if missing := system.lacking():
            raise CannotStart(f"the server does not run here: this system has no {', no '.join(missing)}")
        self._load = load
        self._systemd = systemd or Systemd()
        self.settings = settings
        self._store = store or SQLiteStore(0)
        # Reasons to stop; None: read the configuration anew.
        self._orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._services = Services(settings, self._store, Gate(), Usage(), self.request_stop, self.info)
        self._tls: Any = None
        self._listeners: list[Listener] = []
        self._configure(settings)
        self._workers: list[Worker] = []
        self._expiry = Expiry(self._store, settings.expiry_interval_seconds)
        self._http_endpoints: list[Any] = []
        self._keeper = self._new_keeper(settings)
        self._numbers = itertools.count(1)
        self._max_connections = _affordable(settings.max_connections)
        self.status = Status(self._services, self._workers, self._expiry, self._keeper, self._max_connections)
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

    def _configure(self, settings: Settings) -> None:
        """Make these settings those in force, but for FIXED ones. Raises ConfigError, with nothing changed."""
        tokens = auth.tokens_of(settings.auth_token.get_secret_value(), settings.auth_token_file)
        gate, http_gate = Gate(tokens), _http_gate(settings)
        tls, files = None, (settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
        # Before they are read: what changes meanwhile is read the next time.
        written = [os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files]
        if settings.tls_cert_file:
            from dsmq.wire.tls import server_context  # noqa: PLC0415 - a server without TLS needs none of it

            tls = server_context(*files)
        _check_exposure([listener.socket for listener in self._listeners], settings, gate)
        self._tls, self._certificates_written, self._services.gate = tls, written, gate
        self._http_gate = http_gate
        self.settings = self._services.settings = settings
        self._services.usage.set_limits(settings)
        self._store.max_age_ms = round(settings.max_age_seconds * 1000)
        self._store.limits = Limits(
            settings.max_topics,
            settings.max_stored_messages,
            settings.max_stored_bytes,
            settings.max_stored_messages_per_topic,
            settings.max_stored_bytes_per_topic,
        )

    def _new_keeper(self, settings: Settings) -> Keeper | None:
        if not settings.snapshot_file:
            return None
        if not isinstance(self._store, SQLiteStore):
            raise ConfigError("snapshot_file: this store keeps what it holds by itself")
        return Keeper(self._store, settings.snapshot_file, settings.snapshot_interval_seconds)

    # Start

    def start(self) -> None:
        """Listen and serve, in threads of its own.

        Raises CannotStart, or ConfigError if it would serve anyone on a network, with nothing left behind.
        """
        expect_long_messages()
        with ExitStack() as undo:
            undo.callback(self.stop)
            settings = self.settings
            passed = self._systemd.queue
            _servers.add(self)
            sockets = passed or listening.listen(settings.host, settings.port, settings.listen_backlog)
            self._listeners = [Listener(sock, self._place) for sock in sockets]
            _check_exposure(sockets, settings, self._services.gate)
            # Where the sockets are passed, the process may have no network to make one in.
            for sock in self._systemd.metrics if passed else self._http_sockets():
                self._http_endpoints.append(self._open_http_endpoint(sock))
            if self._keeper:
                # Clients that connect meanwhile wait in the kernel's queue.
                self._keeper.open()
            for number in range(settings.io_workers):
                self._workers.append(Worker(f"dsmq-io-{number}", self._services, self._workers))
            self._workers[0].listen(self._listeners)
            try:
                for part in self._parts():
                    part.start()
            except RuntimeError as error:
                raise CannotStart(str(error)) from error
            undo.pop_all()
        names = [listener.socket.getsockname() for listener in self._listeners]
        self.status.port = next((name[1] for name in names if isinstance(name, tuple)), None)
        self._started = self.status.serving = True
        started = logs.event("started", version=__version__, addresses=self.addresses, process=os.getpid())
        _logger.info(
            "dsmq %s serves on %s (process %d)", __version__, ", ".join(self.addresses), os.getpid(), extra=started
        )
        environment.log_links()
        self._tell_security()
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

        return HTTPEndpoint(sock, metrics.registry(self.status), self.status, lambda: self._http_gate)

    def _tell_security(self) -> None:
        settings, tokens = self.settings, len(self._services.gate.tokens)
        tls = "off" if not self._tls else "on, with certificates of clients" if settings.tls_client_ca_file else "on"
        limits = {
            "connections": self._max_connections,
            "messages": settings.max_stored_messages,
            "bytes": settings.max_stored_bytes,
            "topics": settings.max_topics,
        }
        most = ", ".join(f"{value} {name}" for name, value in limits.items())
        about = logs.event("configured", tokens=tokens, tls=tls, limits=limits)
        _logger.info("tokens: %s; TLS: %s; at most %s", tokens or "none", tls, most, extra=about)
        if exposed := _exposed([listener.socket for listener in self._listeners], settings, self._services.gate):
            _logger.warning(
                "no authentication: any client that can reach %s is an admin (protected_mode = false)",
                ", ".join(exposed),
                extra=logs.event("exposed", addresses=exposed),
            )

    def _place(self, sock: socket.socket, host: str, name: str) -> None:
        """Give an accepted connection to the worker that has the fewest, or refuse it."""
        network = auth.network(host)
        if objection := self._objection(network):
            self._refuse(sock, name, *objection)
            return
        try:
            stream = self._stream(sock)
        except OSError as error:
            _logger.debug("%s was gone when it was accepted: %s", name, error)
            sock.close()
            return
        self._services.usage.connections.add(network, 1)
        worker = min(self._workers, key=lambda worker: len(worker.connections))
        adopt = partial(worker.adopt, stream, Peer(next(self._numbers), host, network, name, bool(self._tls)))
        if worker.thread is threading.current_thread():
            adopt()
        else:
            worker.post(adopt)

    def _stream(self, sock: socket.socket) -> Stream:
        if not self._tls:
            return sock
        from dsmq.wire import tls  # noqa: PLC0415 - see _configure

        return tls.accept(self._tls, sock)

    def _objection(self, network: str) -> tuple[str, ReplyError] | None:
        """Return why a connection is not taken, in a word and as the client is told; nothing where it is."""
        most = self.settings.max_connections_per_address
        connections = self._services.usage.connections
        if connections.total >= self._max_connections:
            return "connections", Busy(f"{self._max_connections} connections are open, no more are taken")
        if connections.of(network) >= most:
            return "address", Busy(f"{most} connections of this address are open, no more are taken")
        return None

    def _refuse(self, sock: socket.socket, name: str, reason: str, error: ReplyError) -> None:
        self.status.refused.refused[reason] += 1
        self.status.refused.errors[error.code] += 1
        about = logs.event("refused", client=name, reason=reason, code=error.code)
        _logger.warning("%s is refused: %s", name, error, extra=about)
        try:
            if not self._tls:
                sock.send(encode_error(error))
            sock.shutdown(socket.SHUT_WR)
        except OSError as gone:
            _logger.debug("%s was gone when it was refused: %s", name, gone)
        sock.close()

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
                    if self._keeper and not self._keeper.is_kept:
                        raise ServerFailed("the last snapshot could not be written")
                    return
                with self._systemd.reloading():
                    self.reload()
            self._watch()

    def _watch(self) -> None:
        logs.summarise()
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
        """Take over new settings, tokens and certificates; where something is wrong with them, change nothing."""
        before, gate, written = self.settings, self._services.gate, self._certificates_written
        try:
            new = self._load() if self._load else before
            self._configure(new.model_copy(update={name: getattr(before, name) for name in FIXED}))
        except ConfigError as error:
            _logger.error("nothing is changed: %s", error, extra=logs.event("reload_failed", error=str(error)))
            return
        except Exception as error:
            _logger.exception("nothing is changed", extra=logs.event("reload_failed", error=str(error)))
            return
        logging.getLogger("dsmq").setLevel(new.log_level.upper())
        # All connections were admitted by these.
        stricter = new.tls_client_ca_file != before.tls_client_ca_file
        stricter = stricter or bool(new.tls_cert_file) != bool(before.tls_cert_file)
        for worker in self._workers:
            worker.post(worker.apply_settings)
            worker.post(worker.dismiss_all if stricter else worker.check_tokens)
        self._await_workers()
        changed = [name for name in Settings.model_fields if getattr(new, name) != getattr(before, name)]
        live, fixed = ([name for name in changed if (name in FIXED) == kept] for kept in (False, True))
        tokens, renewed = self._services.gate.changes(gate), self._certificates_written != written
        names = [*live, *(f"{what} ({', '.join(which)})" for what, which in tokens.items() if which)]
        names += ["certificates"] * renewed
        about = logs.event("reloaded", changed=live, certificates=renewed, **tokens)
        _logger.info("configuration read again; changed: %s", ", ".join(names) or "nothing", extra=about)
        if fixed:
            about = logs.event("restart_needed", settings=fixed)
            _logger.warning("these change only with a new start: %s", ", ".join(fixed), extra=about)
        self._tell_security()

    def _await_workers(self) -> None:
        """Wait until what was posted is done: what the log calls changed is in force. Not for one that hangs."""
        done = [threading.Event() for _ in self._workers]
        deadline = time.monotonic() + WATCH_SECONDS
        for worker, event in zip(self._workers, done, strict=True):
            worker.post(event.set)
        wait_until(lambda: all(event.is_set() for event in done), deadline)

    def _threads(self) -> list[threading.Thread]:
        return [part.thread for part in self._parts()]

    def _parts(self) -> list[Any]:
        """What runs in a thread of its own."""
        keeper = [self._keeper] if self._keeper and self._keeper.interval else []
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
                if self._keeper:
                    self._keeper.give_up()

    def _stop_within(self, seconds: float) -> list[str]:
        """Go through the stages; those that are done already take no time."""
        deadline = time.monotonic() + seconds
        self.status.stopping = True
        self._systemd.stopping(seconds + (LAST_SNAPSHOT_SECONDS if self._keeper else 0))
        self._stop_accepting(deadline)
        survivors = self._end_threads(deadline)
        if self._keeper:
            # Where others survive that may still use the store, it is not its last word.
            survivors += self._keeper.finish(deadline, is_last=not survivors)
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
        if self._keeper:
            self._keeper.stop()
        for thread in (*(worker.thread for worker in self._workers), self._expiry.thread):
            join(thread, deadline)
        for worker in self._workers:
            if worker.thread.ident is None:
                worker.close()
        for endpoint in self._http_endpoints:
            endpoint.stop(self._close)
            join(endpoint.thread, deadline)
        return [part.thread.name for part in self._parts() if part is not self._keeper and part.thread.is_alive()]

    def abandon(self) -> None:
        """Close the copies of what a forked process has of this server: it is the parent's to stop."""
        self._stopping, self._stopped = threading.Lock(), True
        for listener in self._listeners:
            listener.socket.close()
        for part in (*self._workers, *self._http_endpoints, *([self._keeper] if self._keeper else [])):
            part.abandon()

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


def _http_gate(settings: Settings) -> HTTPGate:
    token = settings.http_token.get_secret_value()
    if settings.http_token_file:
        token = auth.read_tokens(settings.http_token_file)[0][2]
    return HTTPGate(token.encode(), host_names(settings.http_allowed_hosts))


def _exposed(sockets: Sequence[socket.socket], settings: Settings, gate: Gate) -> list[str]:
    """Return the addresses other than loopback and Unix sockets at which clients need neither token nor certificate."""
    if gate.tokens or settings.tls_client_ca_file:
        return []
    return [listening.address(sock) for sock in sockets if listening.is_exposed(sock)]


def _check_exposure(sockets: Sequence[socket.socket], settings: Settings, gate: Gate) -> None:
    """Raise ConfigError if the server would serve anyone on a network and protected_mode is on."""
    if settings.protected_mode and (exposed := _exposed(sockets, settings, gate)):
        raise ConfigError(
            f"listening on {', '.join(exposed)} without authentication: set auth_token (DSMQ_AUTH_TOKEN), "
            "auth_token_file or tls_client_ca_file, or protected_mode = false (DSMQ_PROTECTED_MODE) to serve anyone"
        )


# Those that have been started, for processes that are forked.
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _abandon_all() -> None:
    for server in list(_servers):
        server.abandon()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)


@contextmanager
def _signals(server: Server, *, reload: bool) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into a request to stop; a further Ctrl-C does not wait. Only in a main thread.

    With `reload`, SIGHUP is one to read the configuration anew; or to stop, if the terminal that the process had has
    been closed, unless the signal was ignored, as nohup has it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False
    had_terminal = reload and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and has_terminal()

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal seen
        if number == signal.SIGHUP and not (had_terminal and not has_terminal()):
            server.request_reload()
            return
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen = True
        server.request_stop(signal.Signals(number).name)

    handled = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if reload else ()))
    # That of an asyncio loop, which a forked process has from its parent, would call the parent's handlers there.
    wakeup = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number, handler in before.items():
            signal.signal(number, handler)


def allow_more_files() -> None:
    """Raise this process's limit on open files as far as it may; each connection takes one."""
    if system.lacking():
        return
    import resource  # noqa: PLC0415 - Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The kernel may allow less than the hard limit says: macOS calls it unlimited, and takes some 10,000.
    most = MAX_FILES if hard == resource.RLIM_INFINITY else hard
    while soft == resource.RLIM_INFINITY or soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (ValueError, OSError) as error:
            _logger.debug("%d open files are not allowed: %s", most, error)
            most //= 2
        else:
            return


def _affordable(connections: int) -> int:
    """Return how many connections the limit on open files allows."""
    import resource  # noqa: PLC0415 - Windows has none

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY or connections <= files - RESERVED_FILES:
        return connections
    affordable = max(1, files - RESERVED_FILES)
    _logger.warning("only %d open files are allowed: %d connections at a time, not %d", files, affordable, connections)
    return affordable


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
