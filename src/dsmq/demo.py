"""Runs a server, a writer and two readers, each of which gets every message."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from tempfile import TemporaryDirectory

from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import ServerFailed

READERS = ("reader 1", "reader 2")
SERVER = ("-m", "dsmq", "serve", "--http-port", "off", "--log-level", "error")
READER = ("-m", "dsmq.demo")
# How often to check whether a started process is ready or has died.
POLL_SECONDS = 0.05

Processes = Mapping[str, subprocess.Popen[bytes]]


def main(messages: int = 5, pause: float = 0.5) -> None:
    """Run the demo. Raises ServerFailed if one of its processes dies."""
    # A private Unix socket, so that the demo occupies no port.
    with TemporaryDirectory(prefix="dsmq-demo-") as folder, ExitStack() as stack:
        host = f"unix:{folder}/socket"
        print("starting a server, a client that puts, and two that get", flush=True)
        server = {"server": stack.enter_context(_running(*SERVER, "--host", host))}
        mq = stack.enter_context(_connect(host, server))
        readers = {name: stack.enter_context(_running(*READER, host, name, str(messages))) for name in READERS}
        # Clients get messages put after they connected, so wait for the readers.
        for _ in readers:
            _receive(mq, "ready", readers)
        for number in range(messages):
            time.sleep(pause)
            message = f"{number}. Hello, world"
            mq.put("greetings", message)
            print(f"client sent {message}", flush=True)
        for _ in readers:
            print(_receive(mq, "done", readers), flush=True)


def read(host: str, name: str, messages: int) -> None:
    """Put "ready", print messages as they arrive, and put their number."""
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


@contextmanager
def _running(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    # Settings meant for another server don't apply to the demo's.
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith("DSMQ_")}
    # A process group of its own, so that Ctrl-C interrupts only this process.
    with subprocess.Popen([sys.executable, *words], env=env, process_group=0) as process:  # noqa: S603 - no shell
        try:
            yield process
        finally:
            process.terminate()


def _connect(host: str, server: Processes) -> DSMQClientSideConnection:
    while True:
        try:
            return connect(host, retry=False)
        except (ConnectionRefusedError, FileNotFoundError):
            _check(server)
            time.sleep(POLL_SECONDS)


def _receive(mq: DSMQClientSideConnection, topic: str, readers: Processes) -> str:
    while not (message := mq.get_wait(topic, timeout=POLL_SECONDS)):
        _check(readers)
    return message


def _check(processes: Processes) -> None:
    for name, process in processes.items():
        if process.poll():
            raise ServerFailed(f"the demo's {name} died with exit status {process.returncode}")


if __name__ == "__main__":
    if sys.argv[1:]:
        read(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
