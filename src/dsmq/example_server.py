"""A server, until Ctrl-C. The examples for putting and getting talk to it."""

from dsmq.server import serve

if __name__ == "__main__":
    serve(host="127.0.0.1", port=30008, verbose=True)
