"""All at once: a server, a client that puts, and two that get. Each of the two gets every message."""

import multiprocessing
import signal
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from dsmq import example_put_client
from dsmq.client import connect
from dsmq.server import serve

READERS = ("reader 1", "reader 2")


def read(host: str, name: str, messages: int) -> None:
    """Say "ready", print the messages that come, and say how many they were."""
    # Ctrl-C is for the demo as a whole.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nor is there another server to wait for, when that of the demo has gone.
    with suppress(ConnectionError), connect(host, reconnect_timeout=0) as mq:
        mq.put("ready", name)
        received = 0
        while received < messages and (message := mq.get_wait("greetings")):
            print(f"    {name} received {message}", flush=True)
            received += 1
        mq.put("done", f"{name} received {received} of {messages} messages")


def main(messages: int = 5, pause: float = 0.5) -> None:
    """Run the demo, and end by itself."""
    # Spawned processes inherit nothing, as processes on different machines would not.
    spawn = multiprocessing.get_context("spawn")
    # A Unix socket of its own: the demo takes no port from anybody.
    with TemporaryDirectory(prefix="dsmq-demo-") as folder:
        host = f"unix:{Path(folder) / 'socket'}"
        print("starting a server, a client that puts, and two that get", flush=True)
        server = spawn.Process(target=serve, args=(host,), daemon=True)
        server.start()
        with connect(host) as mq:
            readers = [spawn.Process(target=read, args=(host, name, messages), daemon=True) for name in READERS]
            for reader in readers:
                reader.start()
            # A client gets what is put after it connected, so the readers have to be there first.
            for _ in readers:
                mq.get_wait("ready")
            example_put_client.run(host, n_iter=messages, pause=pause)
            for _ in readers:
                print(mq.get_wait("done"), flush=True)
            mq.shutdown_server()
        for process in (*readers, server):
            process.join()


if __name__ == "__main__":
    main()
