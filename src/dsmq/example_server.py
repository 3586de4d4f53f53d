"""Run a server until Ctrl-C, for the examples that put and get."""

from dsmq.server import serve

if __name__ == "__main__":
    serve(host="127.0.0.1", port=30008, verbose=True)
