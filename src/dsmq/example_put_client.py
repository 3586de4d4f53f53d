"""Put a message into the topic "greetings" every second."""

import time

from dsmq.client import connect


def run(host: str = "127.0.0.1", port: int = 30008, n_iter: int = 1000, pause: float = 1.0) -> None:
    """Put `n_iter` messages, with a pause in seconds before each."""
    with connect(host, port) as mq:
        for i in range(n_iter):
            time.sleep(pause)
            message = f"{i}. Hello, world"
            mq.put("greetings", message)
            print(f"client sent {message}", flush=True)


if __name__ == "__main__":
    run()
