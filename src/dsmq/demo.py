"""All at once: a server, a client that puts, and two that get. Each of the two gets every message."""

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
# How often it looks whether a process that was started is there.
POLL_SECONDS = 0.05


def read(host: str, name: str, messages: int) -> None:
    """Say "ready", print the messages that come, and say how many they were."""
    # There is no other server to wait for, when that of the demo has gone.
    with suppress(ConnectionError), connect(host, reconnect_timeout=0) as mq:
        mq.put("ready", name)
        received = 0
        while received < messages and (message := mq.get_wait("greetings")):
            # In one piece, whatever Python is told about buffers: the other reader writes to the same file.
            sys.stdout.write(f"    {name} received {message}\n")
            sys.stdout.flush()
            received += 1
        mq.put("done", f"{name} received {received} of {messages} messages")


def main(messages: int = 5, pause: float = 0.5) -> None:
    """Run the demo, and end by itself. Raises ServerFailed where one of its processes has died."""
    _forget_settings()
    # Spawned processes inherit nothing, as processes on different machines would not.
    spawn = multiprocessing.get_context("spawn")
    # A Unix socket of its own: the demo takes no port from anybody.
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
            # A client gets what is put after it connected, so the readers have to be there first.
            for _ in readers:
                _hear(mq, "ready", readers)
            example_put_client.run(host, n_iter=messages, pause=pause)
            for _ in readers:
                print(_hear(mq, "done", readers), flush=True)
            mq.shutdown_server()
        for process in (*readers, server):
            process.join()


def _forget_settings() -> None:
    # What is set for another server would fit neither this one nor its clients.
    for name in list(os.environ):
        if name.upper().startswith("DSMQ_"):
            del os.environ[name]


def _start(process: BaseProcess) -> None:
    # Ctrl-C is for the demo as a whole: what is started inherits that it ignores it.
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


def _hear(mq: DSMQClientSideConnection, topic: str, readers: Sequence[BaseProcess]) -> str:
    while not (message := mq.get_wait(topic, timeout=POLL_SECONDS)):
        _check(readers)
    return message


def _check(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.exitcode:
            raise ServerFailed(f"the demo's {process.name} has died, with the exit status {process.exitcode}")


if __name__ == "__main__":
    main()
