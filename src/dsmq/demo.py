"""Runs a server, a writer, and two readers that each get every message."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory

from dsmq import environment
from dsmq.client import connect
from dsmq.errors import ServerFailed

READERS = ("reader 1", "reader 2")
SERVER = ("-m", "dsmq", "serve", "--http-port", "off", "--log-level", "error")


def main(messages: int = 5, pause: float = 0.5) -> None:
    """Run the demo. Raises ServerFailed if its server dies."""
    # A private Unix socket, so that the demo occupies no port.
    with TemporaryDirectory(prefix="dsmq-demo-") as folder, ExitStack() as stack:
        host = f"unix:{folder}/socket"
        print("starting a server, a writer and two readers", flush=True)
        stack.enter_context(_server(host))
        # Don't reconnect: there is no other server.
        writer, *readers = (stack.enter_context(connect(host, reconnect_timeout=0)) for _ in range(3))
        received = dict.fromkeys(READERS, 0)
        for number in range(messages):
            time.sleep(pause)
            message = f"{number}. Hello, world"
            writer.put("greetings", message)
            print(f"writer sent {message}", flush=True)
            for name, reader in zip(READERS, readers, strict=True):
                got = reader.get_wait("greetings")
                print(f"    {name} received {got}", flush=True)
                received[name] += got == message
        for name, count in received.items():
            print(f"{name} received {count} of {messages} messages", flush=True)


@contextmanager
def _server(host: str) -> Iterator[None]:
    # Settings for another server must not apply to the demo's server.
    env = environment.without_settings()
    # A process group of its own, so that Ctrl-C interrupts only this process.
    command = [sys.executable, *SERVER, "--host", host]
    with subprocess.Popen(command, env=env, process_group=0) as process:  # noqa: S603 - no shell
        try:
            yield
        except OSError:
            if process.poll():
                raise ServerFailed(f"the demo's server died with exit status {process.returncode}") from None
            raise
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
