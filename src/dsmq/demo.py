"""Runs a server, a writer and two readers, each of which gets every message."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from dsmq import example_put_client
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import ServerFailed
from dsmq.server import serve

READERS = ("reader 1", "reader 2")
# How often to check whether a started process is ready or has died.
POLL_SECONDS = 0.05


def read(host: str, name: str, messages: int) -> None:
    """Put "ready", print messages as they arrive, and put how many there were."""
    # If the demo's server is gone, there is no point in reconnecting.
    with suppress(ConnectionError), connect(host, reconnect_timeout=0) as mq:
        mq.put("ready", name)
        received = 0
        while received < messages and (message := mq.get_wait("greetings")):
            # A single write, because the other reader writes to the same file.
            sys.stdout.write(f"    {name} received {message}\n")
            sys.stdout.flush()
            received += 1
        mq.put("done", f"{name} received {received} of {messages} messages")


def main(messages: int = 5, pause: float = 0.5) -> None:
    """Run the demo. Raises ServerFailed if one of its processes dies."""
    _clear_settings()
    # Spawned processes share no state, like processes on different machines.
    spawn = multiprocessing.get_context("spawn")
    # A private Unix socket, so that the demo occupies no port.
    with TemporaryDirectory(prefix="dsmq-demo-") as folder:
        host = f"unix:{Path(folder) / 'socket'}"
        print("starting a server, a client that puts, and two that get", flush=True)
        server = spawn.Process(target=serve, args=(host,), name="server", daemon=True)
        _start(server)
        with _connect(host, server) as mq:
            readers = [
                spawn.Process(target=read, args=(host, name, messages), name=name, daemon=True) for name in READERS
            ]
            for reader in readers:
                _start(reader)
            # Clients get messages put after they connected, so wait for the readers.
            for _ in readers:
                _receive(mq, "ready", readers)
            example_put_client.run(host, n_iter=messages, pause=pause)
            for _ in readers:
                print(_receive(mq, "done", readers), flush=True)
            mq.shutdown_server()
        for process in (*readers, server):
            process.join()


def _clear_settings() -> None:
    # Settings meant for another server don't apply to the demo's.
    for name in list(os.environ):
        if name.upper().startswith("DSMQ_"):
            del os.environ[name]


def _start(process: BaseProcess) -> None:
    # Only the main process handles Ctrl-C; the others inherit that it is ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)


def _connect(host: str, server: BaseProcess) -> DSMQClientSideConnection:
    while True:
        try:
            return connect(host, retry=False)
        except (ConnectionRefusedError, FileNotFoundError):
            _check([server])
            time.sleep(POLL_SECONDS)


def _receive(mq: DSMQClientSideConnection, topic: str, readers: Sequence[BaseProcess]) -> str:
    while not (message := mq.get_wait(topic, timeout=POLL_SECONDS)):
        _check(readers)
    return message


def _check(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.exitcode:
            raise ServerFailed(f"the demo's {process.name} has died, with the exit status {process.exitcode}")


if __name__ == "__main__":
    main()
