"""Runs the commands that use a server. Each returns its exit status, or None for 0."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from dsmq import environment
from dsmq.cli import arguments
from dsmq.cli.get import get, print_json
from dsmq.cli.put import put
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.client.replies import reason
from dsmq.errors import AuthRequired, ConfigError, DSMQError
from dsmq.terminal import LineFormatter, printable, show_progress
from dsmq.tokens import check_token
from dsmq.wire.addresses import parse_endpoint

Connect: TypeAlias = Callable[[], DSMQClientSideConnection]
"""Connects to the server given by the command's options."""


def connect_to(options: argparse.Namespace) -> DSMQClientSideConnection:
    # Never send the configured server's token to another server named by --host or DSMQ_SERVER.
    others = options.host or _servers()
    known = _ServerSettings(use_file=not others)
    hosts = others or [(known.get("host", arguments.host, "127.0.0.1"), 0)]
    if len(hosts) == 1 and hosts[0][1] and options.port not in (hosts[0][1], None):
        raise ConfigError(f"--host names port {hosts[0][1]}, but --port is {options.port}")
    default_port = options.port or known.get("port", arguments.port, "30008")
    options.servers = [str(parse_endpoint(host, port or default_port)) for host, port in hosts]
    security: dict[str, Any] = {name: getattr(options, name) for name in ("tls", "ca_file", "cert_file", "key_file")}
    if (cert := known.get("tls_cert_file")) and not any(security.values()):
        from dsmq.wire.tls import pinned_context  # noqa: PLC0415 - rarely needed

        security["tls"] = pinned_context(cert, known.sources["tls_cert_file"])
    security["token"] = _token(options.token_file, known)
    timeout, reconnect = getattr(options, "timeout", 10.0), getattr(options, "reconnect", 0.0)
    _log_to_stderr()
    try:
        return connect(options.servers, timeout=timeout, retry=False, reconnect_timeout=reconnect, **security)
    except (TypeError, ValueError) as error:
        if isinstance(error, DSMQError) and not isinstance(error, ConfigError):
            raise
        raise ConfigError(re.sub(r"(?<!\S)(ca|cert|key)_file(?![^:\s])", r"--\1-file", str(error))) from None
    except AuthRequired as error:
        raise AuthRequired(_cli_hint(str(error))) from None
    except OSError as error:
        about, where = _cli_hint(reason(error)), _where(options)
        if about.startswith("no server answers"):
            about += ": start one with `dsmq serve`"
        raise ConnectionError(about if where in about else f"cannot connect to {where}: {about}") from error


def _servers() -> list[tuple[str, int]]:
    """Return the servers listed in DSMQ_SERVER."""
    try:
        return arguments.addresses(os.environ["DSMQ_SERVER"]) if os.environ.get("DSMQ_SERVER") else []
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"DSMQ_SERVER: {error}") from None


def _where(options: argparse.Namespace) -> str:
    return ", ".join(options.servers)


def _log_to_stderr() -> None:
    """Print the client's warnings, such as lost connections and missed messages, in this command's style."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("dsmq: %(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger("dsmq").addHandler(handler)


# Maps advice in the client's errors, written for programs, to advice for users of the command line.
_HINTS = {
    "connect(..., token=...)": "--token-file FILE, or DSMQ_AUTH_TOKEN",
    "does it require TLS?": "does it require TLS (--tls)?",
    "ca_file=...": "--ca-file FILE",
    "cert_file=..., key_file=...": "--cert-file FILE, --key-file FILE",
}


def _cli_hint(text: str) -> str:
    for words, instead in _HINTS.items():
        text = text.replace(words, instead)
    return text


class _ServerSettings:
    """The server settings that clients need. Raises ConfigError."""

    def __init__(self, *, use_file: bool) -> None:
        self._values, self.sources = environment.read(None if use_file else "")

    def get(self, name: str, parse: Callable[[str], Any] = str, default: str = "") -> Any:
        try:
            return parse(str(self._values.get(name, default)))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ConfigError(f"{self.sources[name]}: {error}") from None


def _token(file: str | None, known: _ServerSettings) -> str | None:
    if file is None and known.get("auth_token"):
        return str(known.get("auth_token", check_token))
    file = file or known.get("auth_token_file")
    if not file:
        return None
    from dsmq.broker.auth import read_tokens  # noqa: PLC0415 - rarely needed

    return read_tokens(file)[0][2]


# Commands


def _topics(options: argparse.Namespace, connect: Connect) -> None:
    with connect() as mq:
        for name, messages, size in mq.topics():
            if options.json:
                print_json({"topic": name, "messages": messages, "bytes": size})
            else:
                sys.stdout.write(f"{messages}\t{size}\t{printable(name)}\n")


def _ping(options: argparse.Namespace, connect: Connect) -> None:
    before = time.monotonic()
    with connect() as mq:
        mq.ping()
    took = (time.monotonic() - before) * 1000
    sys.stdout.write(printable(f"PONG from {_where(options)} in {took:.1f} ms") + "\n")


def _watch(options: argparse.Namespace, connect: Connect) -> None:
    from dsmq.cli.watch import watch  # noqa: PLC0415 - only here

    watch(options, connect)


def _work(options: argparse.Namespace, connect: Connect) -> None:
    from dsmq.cli.work import work  # noqa: PLC0415 - only here

    work(options, connect)


def _stop(_: argparse.Namespace, connect: Connect) -> None:
    with connect() as mq:
        mq.shutdown_server()


def _purge(options: argparse.Namespace, connect: Connect) -> None:
    with connect() as mq:
        count = mq.purge(options.topic)
        sys.stdout.write(f"{count} message{'' if count == 1 else 's'} purged\n")


def _stats(options: argparse.Namespace, connect: Connect) -> None:
    with connect() as mq:
        values = mq.stats(options.topic)
    if options.json:
        print_json({**values})
        return
    width = max(map(len, values), default=0)
    sys.stdout.writelines(f"{name:<{width}}  {printable(str(value))}\n" for name, value in values.items())


def _bench(options: argparse.Namespace, connect: Connect) -> None:
    from dsmq import bench  # noqa: PLC0415 - only here

    def progress(name: str) -> None:
        if sys.stderr.isatty():
            show_progress(name and name + " ...")

    with connect() as mq:
        for figure in bench.measure(mq, options.n, progress):
            progress("")
            sys.stdout.write(f"{figure}\n")
            sys.stdout.flush()


_COMMANDS: dict[str, Callable[[argparse.Namespace, Connect], int | None]] = {
    "put": put,
    "get": get,
    "work": _work,
    "topics": _topics,
    "watch": _watch,
    "ping": _ping,
    "stats": _stats,
    "purge": _purge,
    "stop": _stop,
    "bench": _bench,
}


def run(options: argparse.Namespace) -> int:
    """Run a command that uses a server; return its exit status."""
    return _COMMANDS[options.command](options, partial(connect_to, options)) or 0
