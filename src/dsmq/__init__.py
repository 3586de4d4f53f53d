"""dsmq, the dead simple message queue.

    from dsmq import connect, serve

    serve(host="127.0.0.1", port=30008)         # runs a server until it is stopped
    mq = connect(host="127.0.0.1", port=30008)  # a client; for asyncio, see dsmq.aio

Importing this package loads none of its modules; they are loaded on first use.
"""

# Type checkers recognise this name, and importing typing is slow. With a plain `False`, jedi would skip the imports
# below.
TYPE_CHECKING = bool()  # noqa: UP018
if TYPE_CHECKING:
    from dsmq import aio, client, errors, server
    from dsmq.client import connect
    from dsmq.client.jobs import Job
    from dsmq.client.message import Message
    from dsmq.server import Server, serve

__all__ = ["Job", "Message", "Server", "aio", "client", "connect", "errors", "serve", "server"]

__version__ = "2.0.0"

_MODULES = {"Job": "client", "Message": "client", "Server": "server", "connect": "client", "serve": "server"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    module = import_module(f"{__name__}.{_MODULES.get(name, name)}")
    return getattr(module, name) if name in _MODULES else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
