"""Accept connections, read and discard, and never reply. Prints its port."""

from __future__ import annotations

import selectors
import socket

RECEIVE_BYTES = 131_072


def main() -> None:
    selector = selectors.DefaultSelector()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ)
    print(listener.getsockname()[1], flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ)
            elif not _read(key.fileobj):  # type: ignore[arg-type]
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]


def _read(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(RECEIVE_BYTES))
    except BlockingIOError:
        return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
