"""The commands that use a server: put, get, topics, ping and bench. Each returns its exit status, or None for 0."""

from __future__ import annotations

import argparse
import base64
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

from dsmq import cli_parser, environment
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.client.message import Message
from dsmq.client.replies import reason
from dsmq.errors import AuthRequired, ConfigError, DSMQError, TooBig
from dsmq.terminal import LineFormatter, printable
from dsmq.tokens import check_token
from dsmq.wire.addresses import parse_endpoint

if TYPE_CHECKING:
    from dsmq.position_file import PositionFile

# Max length of a line of stdin, unless the server has announced a larger limit on messages.
_MAX_LINE_BYTES = 67_108_864

# The exit status if no message was printed.
NOTHING = 3


def _connect(options: argparse.Namespace, timeout: float = 10.0) -> DSMQClientSideConnection:
    # Never send the configured server's token to another server, named by --host or DSMQ_SERVER.
    others = options.host or _servers()
    known = _ServerSettings(use_file=not others)
    hosts = others or [(known.get("host", cli_parser.host, "127.0.0.1"), 0)]
    if len(hosts) == 1 and hosts[0][1] and options.port not in (hosts[0][1], None):
        raise ConfigError(f"--host names port {hosts[0][1]}, but --port is {options.port}")
    default_port = options.port or known.get("port", cli_parser.port, "30008")
    options.servers = [str(parse_endpoint(host, port or default_port)) for host, port in hosts]
    security: dict[str, Any] = {name: getattr(options, name) for name in ("tls", "ca_file", "cert_file", "key_file")}
    if (cert := known.get("tls_cert_file")) and not any(security.values()):
        from dsmq.wire.tls import pinned_context  # noqa: PLC0415 - rarely needed

        security["tls"] = pinned_context(cert, known.sources["tls_cert_file"])
    security["token"] = _token(options.token_file, known)
    reconnect = getattr(options, "reconnect", 0.0)
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
        raise ConnectionError(about if where in about else f"cannot connect to {where}: {about}") from error


def _servers() -> list[tuple[str, int]]:
    """Return the servers that DSMQ_SERVER names."""
    try:
        return cli_parser.addresses(os.environ["DSMQ_SERVER"]) if os.environ.get("DSMQ_SERVER") else []
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"DSMQ_SERVER: {error}") from None


def _where(options: argparse.Namespace) -> str:
    return ", ".join(options.servers)


def _log_to_stderr() -> None:
    """Print the client's warnings, such as lost connections and missed messages, in the style of this command."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("dsmq: %(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger("dsmq").addHandler(handler)


# Advice for programs in the client's errors, and the same advice for the command line.
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
    """The settings of a server, as far as clients need them. Raises ConfigError."""

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
    from dsmq.broker.token_files import read_tokens  # noqa: PLC0415 - rarely needed

    return read_tokens(file)[0][2]


# Commands


def _put(options: argparse.Namespace) -> None:
    with _connect(options) as mq:
        if options.message == "-":
            _put_lines(mq, options.topic)
        else:
            mq.put(options.topic, os.fsencode(options.message))


def _put_lines(mq: DSMQClientSideConnection, topic: str) -> None:
    stored = 0
    try:
        for lines in _lines(sys.stdin.buffer, max(mq.max_message_bytes, _MAX_LINE_BYTES)):
            stored += len(mq.put_many(topic, lines))
    except (DSMQError, OSError) as error:
        stored += getattr(error, "stored_before", 0)
        after = getattr(error, "stored_after", 0)
        about = f"lines stored: {stored} before it" + (f", {after} after it" if after else "")
        raise DSMQError(f"line {stored + 1} of stdin: {reason(error)} ({about})") from error


def _lines(stream: IO[bytes], max_bytes: int) -> Iterator[list[bytes]]:
    """Yield lines of a stream as they arrive, without line ends. Raises TooBig."""
    rest: list[bytes] = []
    size = 0
    while chunk := stream.read1(65_536):  # type: ignore[attr-defined]
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield [b"".join(rest), *others[:-1]]
            rest, size = [others[-1]], 0
        size += len(rest[-1])
        if size > max_bytes:
            raise TooBig(f"longer than {max_bytes} bytes")
    if size:
        yield [b"".join(rest)]


def _get(options: argparse.Namespace) -> int | None:
    left = options.n or (math.inf if options.follow else 1)
    seconds = options.wait if options.wait is not None else math.inf if options.follow else 0.0
    until = time.monotonic() + seconds
    file = _position_file(options)
    found = False
    with _connect(options) as mq:
        _seek(mq, options)
        if file:
            file.save(mq.position(options.topic))
        while left > 0:
            timeout = max(0.0, until - time.monotonic())
            count = _print_messages(mq, options, int(min(left, 100)), timeout, latest=options.latest and not found)
            if not count:
                break
            found = True
            sys.stdout.flush()
            if file:
                file.save(mq.position(options.topic))
            left -= count
    if found:
        return None
    if options.wait is None and options.after is None and not file:
        sys.stderr.write(
            "dsmq: no message. Only messages put after connecting are read by default: "
            "use --wait, --follow, or --after 0\n"
        )
    return NOTHING


def _position_file(options: argparse.Namespace) -> PositionFile | None:
    """Open the position file, if any, and start reading at its position. Raises ConfigError."""
    if not options.position_file:
        return None
    from dsmq.position_file import PositionFile  # noqa: PLC0415 - rarely needed

    file = PositionFile(options.position_file)
    saved = file.load()
    options.after = options.after if saved is None else saved
    return file


def _seek(mq: DSMQClientSideConnection, options: argparse.Namespace) -> None:
    try:
        if options.after is not None:
            mq.seek(options.topic, options.after)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _print_messages(
    mq: DSMQClientSideConnection, options: argparse.Namespace, n: int, timeout: float, *, latest: bool
) -> int:
    """Print up to `n` messages and return their number; with `latest`, start with the newest."""
    # JSON needs the position after each message, so these are read one at a time.
    messages = mq.read(options.topic, latest=True) if latest else []
    messages = messages or mq.read(options.topic, 1 if options.json else n, timeout=timeout)
    if not options.json:
        _print_bodies(messages)
        return len(messages)
    count = 0
    while messages:
        _print_json(_message_fields(messages[0], mq.position(options.topic)))
        # The next read may block until the server is reachable again.
        sys.stdout.flush()
        count += 1
        messages = mq.read(options.topic) if count < n else []
    return count


def _print_bodies(messages: list[Message]) -> None:
    if sys.stdout.isatty():
        for message in messages:
            sys.stdout.write(printable(message.body.decode(errors="backslashreplace")) + "\n")
    else:
        sys.stdout.buffer.writelines(message.body + b"\n" for message in messages)


def _message_fields(message: Message, position: str) -> dict[str, object]:
    fields: dict[str, object] = {
        "topic": message.topic,
        "id": message.id,
        "number": message.number,
        "put_at": datetime.fromtimestamp(message.put_at, UTC).isoformat(timespec="milliseconds"),
        "position": position,
    }
    try:
        fields["message"] = message.body.decode()
    except UnicodeDecodeError:
        fields["message_base64"] = base64.b64encode(message.body).decode()
    return fields


def _print_json(fields: dict[str, object]) -> None:
    # In ASCII, which is valid in every locale and leaves no control characters unescaped.
    sys.stdout.write(json.dumps(fields) + "\n")


def _topics(options: argparse.Namespace) -> None:
    with _connect(options) as mq:
        for name, messages, size in mq.topics():
            if options.json:
                _print_json({"topic": name, "messages": messages, "bytes": size})
            else:
                sys.stdout.write(f"{messages}\t{size}\t{printable(name)}\n")


def _ping(options: argparse.Namespace) -> None:
    before = time.monotonic()
    with _connect(options, timeout=options.timeout) as mq:
        mq.ping()
    took = (time.monotonic() - before) * 1000
    sys.stdout.write(printable(f"PONG from {_where(options)} in {took:.1f} ms") + "\n")


def _bench(options: argparse.Namespace) -> None:
    from dsmq import bench  # noqa: PLC0415 - only here

    def progress(name: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{name and name + ' ...'}")
            sys.stderr.flush()

    with _connect(options) as mq:
        for figure in bench.measure(mq, options.n, progress):
            progress("")
            sys.stdout.write(f"{figure}\n")
            sys.stdout.flush()


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "put": _put,
    "get": _get,
    "topics": _topics,
    "ping": _ping,
    "bench": _bench,
}
