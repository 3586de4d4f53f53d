"""Get messages from the topic "greetings" as they arrive."""

from dsmq.client import connect


def run(host: str = "127.0.0.1", port: int = 30008, n_iter: int = 1000, name: str = "client") -> None:
    """Get `n_iter` messages, or fewer if none arrives for ten seconds."""
    with connect(host, port) as mq:
        for _ in range(n_iter):
            message = mq.get_wait("greetings")
            if not message:
                break
            print(f"{name} received {message}", flush=True)


if __name__ == "__main__":
    run()
