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
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

from dsmq import __version__, auth, config, environment, listening, logs, metrics
from dsmq.auth import Gate
from dsmq.commands import Services
from dsmq.config import EmbeddedSettings, Settings
from dsmq.errors import Busy, CannotStart, ConfigError, Denied, DSMQError, ReplyError, ServerFailed
from dsmq.expiry import Expiry
from dsmq.keeper import LAST_SNAPSHOT_SECONDS, Keeper
from dsmq.listening import Census, Listener
from dsmq.loop import Peer, Stream
from dsmq.metrics import Counters
from dsmq.protocol import encode_error
from dsmq.sqlite_store import SQLiteStore
from dsmq.status import Status
from dsmq.store import Limits, Store, Totals
from dsmq.system import expect_long_messages
from dsmq.systemd import Systemd
from dsmq.threads import join, wait_until
from dsmq.worker import Worker

# File descriptors left for other things than connections.
RESERVED_FILES = 64
# How often the main thread looks whether the others live.
WATCH_SECONDS = 1.0
# Settings that are read once, at the start.
FIXED = (
    *("host", "port", "listen_backlog", "metrics_host", "metrics_port", "metrics_token", "metrics_token_file"),
    *("io_threads", "busy_poll_microseconds", "expiry_interval_seconds", "max_connections", "max_log_lines_per_second"),
    *("log_format", "log_to", "snapshot_file", "snapshot_interval_seconds"),
)
# Settings by which all connections were admitted; those that are open end when one of these changes.
ADMISSION = ("protected_mode", "tls_client_ca_file")

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

    host is an IPv4 or IPv6 address, a name, or `unix:/path`. verbose logs (see log_to). name is accepted
    for the sake of dsmq 1.4 and means nothing. Other settings (see dsmq.toml.example) come from keyword
    arguments, `DSMQ_*`, and the file that `DSMQ_CONFIG` names. There is no metrics port unless one of them asks for it.

    It may run in any thread or process; signals are handled in a main thread only. Raises ConfigError,
    CannotStart, or ServerFailed.
    """
    effective = config.load(kind=EmbeddedSettings, host=host, port=port, **settings)
    if verbose:
        logs.start(effective)
    run(effective)


def run(settings: Settings, load: Callable[[], Settings] | None = None, systemd: Systemd | None = None) -> None:
    """Serve until a signal or a client's SHUTDOWN, then stop gracefully. Raises as `serve` does.

    On SIGHUP `load` returns the settings anew; without it, that signal is left alone. What `systemd` holds is used in
    place of sockets of its own, and it is told how the server is.
    """
    server = Server(settings, load=load, systemd=systemd)
    # Before it says that it serves: whoever reads that may send a signal at once.
    with _signals(server, reload=load is not None), server:
        server.run()


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
        """`load` returns the settings anew. Raises ConfigError where a file of tokens or certificates can't be used."""
        self._load = load
        self._systemd = systemd or Systemd()
        self.settings = settings
        self._store = store or SQLiteStore(0)
        # Reasons to stop; None: read the configuration anew.
        self._orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._services = Services(settings, self._store, Gate(), Census(), self.request_stop, self.info)
        self._tls: Any = None
        self._configure(settings)
        self._workers: list[Worker] = []
        self._listeners: list[Listener] = []
        self._expiry = Expiry(self._store, settings.expiry_interval_seconds)
        self._side_port: Any = None
        self._keeper = self._new_keeper(settings)
        self._numbers = itertools.count(1)
        self._max_connections = _affordable(settings.max_connections)
        self.status = Status(self._services, self._workers, self._expiry, self._keeper, self._max_connections)
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
        auth.warn_of_short(tokens, "auth_token" if settings.auth_token else "", settings.auth_token_file)
        # A wait for one's turn ends well within the time for showing a token.
        gate = Gate(tokens, settings.auth_delay_seconds, settings.auth_timeout_seconds / 2)
        tls, files = None, (settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
        # Before they are read: what changes meanwhile is read the next time.
        written = [os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files]
        if settings.tls_cert_file:
            from dsmq.tls import server_context  # noqa: PLC0415 - a server without TLS needs none of it

            tls = server_context(*files)
        self._tls, self._certificates_written, self._services.gate = tls, written, gate
        self.settings = self._services.settings = settings
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
        """Listen and serve, in threads of its own. Raises CannotStart, with nothing left behind."""
        expect_long_messages()
        with ExitStack() as undo:
            undo.callback(self.stop)
            settings = self.settings
            passed = self._systemd.queue
            sockets = passed or listening.listen(settings.host, settings.port, settings.listen_backlog)
            self._listeners = [Listener(sock, self._place) for sock in sockets]
            # Where the sockets are passed, the process may have no network to make one in.
            if side := self._systemd.metrics if passed else self._side_socket():
                self._side_port = self._open_side_port(side)
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
        if self._side_port:
            where = self._side_port.url
            _logger.info("metrics on %smetrics, for people %s", where, where, extra=logs.event("side_port", url=where))
        self._systemd.notify("READY=1")

    def _side_socket(self) -> socket.socket | None:
        if self.settings.metrics_port == "off":
            return None
        sock, *others = listening.listen(self.settings.metrics_host, self.settings.metrics_port, 16)
        for other in others:
            other.close()
        return sock

    def _open_side_port(self, sock: socket.socket) -> Any:
        # Imported here, because a server without a side port needs none of it.
        from dsmq.sideport import SidePort  # noqa: PLC0415

        settings = self.settings
        token = settings.metrics_token.get_secret_value()
        if settings.metrics_token_file:
            token = auth.read_tokens(settings.metrics_token_file)[0][2]
        return SidePort(sock, metrics.registry(self.status), self.status, token)

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
        if self._is_open and any(listening.is_exposed(listener.socket) for listener in self._listeners):
            _logger.warning(
                "this server has no token, and listens to more than this machine: %s",
                "it refuses clients elsewhere (protected_mode); set auth_token or auth_token_file"
                if settings.protected_mode
                else "whoever reaches it may read and put all there is (protected_mode is off)",
                extra=logs.event("exposed", protected_mode=settings.protected_mode),
            )

    @property
    def _is_open(self) -> bool:
        """Whether clients have to show nothing."""
        return not (self._services.gate.tokens or self.settings.tls_client_ca_file)

    def _place(self, sock: socket.socket, host: str, name: str) -> None:
        """Give an accepted connection to the worker that has the fewest, or refuse it."""
        network = auth.network(host)
        if objection := self._objection(sock, host, network):
            self._refuse(sock, name, *objection)
            return
        try:
            stream = self._stream(sock)
        except OSError as error:
            _logger.debug("%s was gone when it was accepted: %s", name, error)
            sock.close()
            return
        self._services.census.enter(network)
        worker = min(self._workers, key=lambda worker: len(worker.connections))
        adopt = partial(worker.adopt, stream, Peer(next(self._numbers), host, network, name, bool(self._tls)))
        if worker.thread is threading.current_thread():
            adopt()
        else:
            worker.post(adopt)

    def _stream(self, sock: socket.socket) -> Stream:
        if not self._tls:
            return sock
        from dsmq import tls  # noqa: PLC0415 - see _configure

        return tls.accept(self._tls, sock)

    def _objection(self, sock: socket.socket, host: str, network: str) -> tuple[str, ReplyError] | None:
        """Return why a connection is not taken, in a word and as the client is told; nothing where it is."""
        most = self.settings.max_connections_per_address
        census = self._services.census
        if census.total >= self._max_connections:
            return "connections", Busy(f"{self._max_connections} connections are open, no more are taken")
        if census.of(network) >= most:
            return "address", Busy(f"{most} connections of this address are open, no more are taken")
        if self.settings.protected_mode and self._is_open and not listening.is_local(sock, host):
            about = "this server has no token, and so serves only clients on its own machine: set auth_token"
            return "protected", Denied(about)
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
                if reason := self._orders.get(timeout=min(WATCH_SECONDS, self._systemd.most_seconds)):
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
        self._systemd.tick(self.status)

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
        stricter = any(getattr(new, name) != getattr(before, name) for name in ADMISSION)
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
        return [*self._workers, self._expiry, *keeper, *([self._side_port] if self._side_port else [])]

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
            # The file of a socket that was passed is not its own to remove.
            (socket.socket.close if self._systemd.queue else listening.close)(listener.socket)

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
        if self._side_port:
            self._side_port.stop()
            join(self._side_port.thread, deadline)
        return [part.thread.name for part in self._parts() if part is not self._keeper and part.thread.is_alive()]

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
    def metrics_port(self) -> int | None:
        """The TCP port of the side port, if there is one."""
        return self._side_port.port if self._side_port else None

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


@contextmanager
def _signals(server: Server, *, reload: bool) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into a request to stop; a further Ctrl-C does not wait. Only in a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal seen
        if number == signal.SIGHUP:
            server.request_reload()
            return
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen = True
        server.request_stop(signal.Signals(number).name)

    handled = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if reload else ()))
    before = {number: signal.signal(number, handle) for number in handled}
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


def main(arguments: Sequence[str]) -> None:
    """Serve on the host and port of a command line; both may be left out."""
    host, port, *others = [*arguments, *("127.0.0.1", "30008")[len(arguments) :]]
    if others or not (port.isascii() and port.isdigit() and len(port) < 10):
        sys.exit("usage: server.py [host [port]]")
    try:
        serve(host, int(port), verbose=True)
    except DSMQError as error:
        sys.exit(f"server.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
