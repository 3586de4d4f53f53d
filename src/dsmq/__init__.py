"""dsmq, the dead simple message queue.

    from dsmq.server import serve      # serve(host="127.0.0.1", port=30008)
    from dsmq.client import connect    # mq = connect(host="127.0.0.1", port=30008)

Importing this package loads neither.
"""

__version__ = "2.0.0"
