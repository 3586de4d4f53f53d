"""The command line. Data goes to stdout, everything else to stderr (but see log_to).

Exit statuses: 0 done, 1 failed (no server, an error from it, the server can't start), 2 wrong usage or configuration,
3 `get` found no message, 130 interrupted.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import json
import logging
import math
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar

from dsmq import __version__
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import AuthRequired, ConfigError, DSMQError, TooBig
from dsmq.session import Message
from dsmq.system import has_terminal

if TYPE_CHECKING:
    from ssl import SSLContext

N = TypeVar("N", int, float)

OK, FAILED, USAGE, NOTHING, INTERRUPTED = 0, 1, 2, 3, 130

_EPILOG = "Exit statuses: 0 done, 1 failed, 2 wrong usage or configuration, 3 no message to get, 130 interrupted."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_files()
    try:
        try:
            if words[:1] == ["serve"]:
                _await_settings()
            options = _parse(words)
            command: Callable[[argparse.Namespace], int] = options.run
            return command(options)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone, and knows why.
        _drop_output()
        return FAILED
    except ConfigError as error:
        return _complain(error, USAGE)
    except (DSMQError, OSError) as error:
        _drop_output()
        return _complain(error, FAILED)


def _await_settings() -> None:
    """Handle the signals to a server while it loads what it needs."""
    # The first process of a container is ended by no signal that it has not asked for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(OK))
    # Windows has no such signal; nohup has it ignored, which the server has to find as it was.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        had_terminal = has_terminal()
        # Until it is ready to read its configuration again, there is nothing to be done about another reason for it.
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(OK) if had_terminal and not has_terminal() else None)


def _drop_output() -> None:
    # What is still buffered must not make Python complain when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_files() -> None:
    # A shell's `>&-` leaves none; else the next socket would become standard output.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process runs


def _complain(error: Exception, status: int) -> int:
    sys.stderr.write(f"dsmq: {_reason(error)}\n")
    return status


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def unknown(self, word: str) -> NoReturn:
        """Complain about an argument that is none, and name the nearest option."""
        nearest = difflib.get_close_matches(word, self._option_string_actions, n=1) if word[:1] == "-" else []
        self.error(f"unknown argument {word!r}" + (f"; the nearest known one is {nearest[0]}" if nearest else ""))

    def error(self, message: str) -> NoReturn:
        """Complain in one line, like everything else here."""
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parse(words: list[str]) -> argparse.Namespace:
    options, unknown = _parser(words).parse_known_args(words)
    if unknown:
        parser: _Parser = options.parser
        parser.unknown(unknown[0].partition("=")[0])
    return options


def _parser(words: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="dsmq", description="The dead simple message queue.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"dsmq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about, epilog=_EPILOG)
        command.set_defaults(run=run, parser=command)
        return command

    serve = add("serve", _serve, "Run the server, until SIGTERM, Ctrl-C or a client's SHUTDOWN.")
    config = add("config", _config, "Print the effective configuration as TOML, secrets masked.")
    config.add_argument("--example", action="store_true", help="print a commented dsmq.toml with all defaults instead")
    if {"serve", "config"}.intersection(words):
        # Only then, because the settings take longer to load than the client to run.
        from dsmq.config import add_options  # noqa: PLC0415

        add_options(serve)
        add_options(config)
    put = add("put", _put, "Put a message into a topic, or each line of stdin as one.")
    put.add_argument("topic", metavar="TOPIC", type=_topic)
    put.add_argument(
        "message", metavar="MESSAGE", nargs="?", default="-", help="the message; - or none: lines of stdin"
    )
    _add_get_options(add("get", _get, "Print messages of a topic, one a line."))
    topics = add("topics", _topics, "List the topics that hold messages: messages, bytes, topic.")
    topics.add_argument("--json", action="store_true", help="print JSON lines")
    ping = add("ping", _ping, "Make a round trip to the server; for scripts and health checks.")
    ping.add_argument("--timeout", type=_timeout, default=3.0, metavar="S", help="seconds to wait for it; default: 3")
    bench = add("bench", _bench, "Measure how long typical operations take on a running server.")
    bench.add_argument(
        "-n", type=_count, default=1000, metavar="N", help="how often each is done; default: 1000, which puts some 5 MB"
    )
    add("demo", _demo, "Show a server, a writer and two readers at work, for a few seconds.")
    for command in (put, commands.choices["get"], topics, ping, bench):
        _add_address(command)
    for command in (put, commands.choices["get"]):
        command.add_argument(
            "--reconnect",
            type=_seconds,
            default=30.0,
            metavar="S",
            help="for how many seconds to make a broken connection anew; default: 30",
        )
    return parser


def _add_get_options(get: argparse.ArgumentParser) -> None:
    get.add_argument("topic", metavar="TOPIC", type=_topic)
    get.add_argument("--wait", type=_seconds, metavar="S", help="wait for messages, up to S seconds in all")
    get.add_argument("--latest", action="store_true", help="start with the newest message; pass over the older ones")
    get.add_argument("-n", type=_count, metavar="N", help="print up to N messages; default: 1, with --follow all")
    get.add_argument("--follow", action="store_true", help="go on as messages come")
    get.add_argument("--json", action="store_true", help="print JSON lines with topic, id, number, put_at and message")
    get.add_argument(
        "--after",
        type=_position,
        metavar="ID",
        help="read on behind this id; 0: from the oldest message held. Default: what is put from now on",
    )


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", type=_host, help="address, name, or unix:/path; default: DSMQ_HOST, or 127.0.0.1")
    command.add_argument("--port", type=_port, help="default: DSMQ_PORT, or 30008")
    security = command.add_argument_group(
        "security",
        "The token itself can be given as DSMQ_AUTH_TOKEN. Where DSMQ_CONFIG is set, the server is looked up there.",
    )
    security.add_argument(
        "--token-file", metavar="FILE", help="its first token is shown; default: DSMQ_AUTH_TOKEN_FILE"
    )
    security.add_argument("--tls", action="store_true", help="encrypt, and verify the server's certificate")
    security.add_argument(
        "--ca-file", metavar="FILE", help="authorities to trust in place of the system's, as PEM; implies --tls"
    )
    security.add_argument("--cert-file", metavar="FILE", help="a certificate to show, as PEM; implies --tls")
    security.add_argument("--key-file", metavar="FILE", help="its key, where it does not stand in that file")


def _topic(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the topic is empty")
    # Python carries bytes of the command line that are not UTF-8 as surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"the topic {text!r} is not UTF-8")
    return text


def _host(text: str) -> str:
    if not text.startswith("unix:") and text.startswith("[") != text.endswith("]"):
        raise argparse.ArgumentTypeError(f"{text!r} is no address")
    return text


def _seconds(text: str) -> float:
    return _number(float, text, 0, math.inf, "a number of seconds")


def _timeout(text: str) -> float:
    return _number(float, text, 1e-3, math.inf, "a number of seconds above 0")


def _count(text: str) -> int:
    return _number(int, text, 1, math.inf, "a number from 1 up")


def _position(text: str) -> int:
    return _number(int, text, 0, 2**63 - 1, "an id, or 0")


def _port(text: str) -> int:
    return _number(int, text, 1, 65535, "a port, 1 to 65535")


def _number(kind: Callable[[str], N], text: str, least: float, most: float, what: str) -> N:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def _connect(options: argparse.Namespace, timeout: float = 10.0) -> DSMQClientSideConnection:
    # Who names another server does not show it the token of the one that is configured here.
    known = _known(None if options.host else os.environ.get("DSMQ_CONFIG"))
    options.host = options.host or known["host"]
    try:
        options.port = options.port or _port(known["port"])
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"DSMQ_PORT: {error}") from None
    files = {name: getattr(options, name) for name in ("ca_file", "cert_file", "key_file")}
    tls: bool | SSLContext = options.tls
    if known["tls_cert_file"] and not tls and not any(files.values()):
        from dsmq.tls import neighbour_context  # noqa: PLC0415 - most need none of it

        tls = neighbour_context(known["tls_cert_file"])
    token = _token(options.token_file, known)
    patience: dict[str, Any] = {"timeout": timeout, "reconnect_timeout": getattr(options, "reconnect", 0.0)}
    _tell_what_happens()
    try:
        return connect(options.host, options.port, retry=False, token=token, tls=tls, **patience, **files)
    except ConnectionRefusedError:
        raise
    except AuthRequired as error:
        raise AuthRequired(_for_shells(str(error))) from None
    except OSError as error:
        where = options.host if options.host.startswith("unix:") else f"{options.host} port {options.port}"
        raise ConnectionError(f"cannot connect to {where}: {_for_shells(_reason(error))}") from error


def _tell_what_happens() -> None:
    """Have what the client logs look like all else that is said here: lost connections, messages that were missed."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dsmq: %(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger("dsmq").addHandler(handler)


# What the client says to programs, and what to a shell.
_HINTS = {
    "connect(..., token=...)": "--token-file FILE, or DSMQ_AUTH_TOKEN",
    "does it want TLS?": "does it want TLS (--tls)?",
    "self-signed certificate": "self-signed certificate (--ca-file FILE to trust it)",
    "unable to get local issuer certificate": "no authority that is known has issued its certificate (--ca-file FILE "
    "to trust another)",
}


def _for_shells(text: str) -> str:
    for words, instead in _HINTS.items():
        text = text.replace(words, instead)
    return text


def _known(file: str | None) -> dict[str, str]:
    """Return what the environment and a server's configuration file say of the server. Raises ConfigError."""
    known = {"host": "127.0.0.1", "port": "30008", "auth_token": "", "auth_token_file": "", "tls_cert_file": ""}
    said: dict[str, Any] = {}
    if file:
        try:
            with open(file, "rb") as stream:
                said = tomllib.load(stream)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: {_reason(error)}") from None
    return {name: os.environ.get(f"DSMQ_{name.upper()}") or str(said.get(name, value)) for name, value in known.items()}


def _token(file: str | None, known: dict[str, str]) -> str | None:
    if file is None and known["auth_token"]:
        return known["auth_token"]
    file = file or known["auth_token_file"]
    if not file:
        return None
    from dsmq.auth import read_tokens  # noqa: PLC0415 - most need none of it

    return read_tokens(file)[0][2]


# Commands


def _serve(options: argparse.Namespace) -> int:
    from dsmq import config, logs, server, systemd  # noqa: PLC0415 - see _parser

    settings = config.from_options(options)
    logs.never_block()
    logs.start(settings)
    server.allow_more_files()
    server.run(settings, lambda: config.from_options(options), systemd.take())
    return OK


def _config(options: argparse.Namespace) -> int:
    from dsmq import config  # noqa: PLC0415 - see _parser

    sys.stdout.write(config.example() if options.example else config.to_toml(config.from_options(options)))
    return OK


def _put(options: argparse.Namespace) -> int:
    with _connect(options) as mq:
        if options.message != "-":
            mq.put(options.topic, os.fsencode(options.message))
            return OK
        for lines in _lines(sys.stdin.buffer, mq.max_message_bytes):
            mq.put_many(options.topic, lines)
    return OK


def _lines(stream: IO[bytes], longest: int) -> Iterator[list[bytes]]:
    """Give the lines of a stream as soon as they come, without their ends."""
    rest = b""
    while chunk := stream.read1(65_536):  # type: ignore[attr-defined]
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield lines
        if len(rest) > longest:
            raise TooBig(f"a line of stdin is longer than a message may be, {longest} bytes")
    if rest:
        yield [rest]


def _get(options: argparse.Namespace) -> int:
    left = options.n or (math.inf if options.follow else 1)
    seconds = options.wait if options.wait is not None else math.inf if options.follow else 0.0
    until = time.monotonic() + seconds
    found = False
    with _connect(options) as mq:
        if options.after is not None:
            mq.seek(options.topic, options.after)
        while left > 0:
            # The newest, if there is one, comes first; behind it they come in order.
            messages = mq.read(options.topic, latest=True) if options.latest and not found else []
            timeout = max(0.0, until - time.monotonic())
            messages = messages or mq.read(options.topic, int(min(left, 100)), timeout=timeout)
            if not messages:
                break
            found = True
            for message in messages:
                _print(message, as_json=options.json)
            sys.stdout.flush()
            left -= len(messages)
    if found or options.follow:
        return OK
    if options.wait is None and options.after is None:
        sys.stderr.write(
            "dsmq: no message. A client reads what is put after it connected: use --wait, --follow, or --after 0\n"
        )
    return NOTHING


def _print(message: Message, *, as_json: bool) -> None:
    if not as_json:
        sys.stdout.buffer.write(message.body + b"\n")
        return
    put_at = datetime.fromtimestamp(message.put_at, UTC).isoformat(timespec="milliseconds")
    shown: dict[str, object] = {"topic": message.topic, "id": message.id, "number": message.number, "put_at": put_at}
    try:
        shown["message"] = message.body.decode()
    except UnicodeDecodeError:
        shown["message_base64"] = base64.b64encode(message.body).decode()
    sys.stdout.buffer.write(json.dumps(shown, ensure_ascii=False).encode() + b"\n")


def _topics(options: argparse.Namespace) -> int:
    with _connect(options) as mq:
        for name, messages, size in mq.topics():
            if options.json:
                line = json.dumps({"topic": name, "messages": messages, "bytes": size}, ensure_ascii=False)
            else:
                # A topic may hold what would confuse a terminal.
                shown = name if name.isprintable() else name.encode("unicode_escape").decode()
                line = f"{messages}\t{size}\t{shown}"
            sys.stdout.write(line + "\n")
    return OK


def _ping(options: argparse.Namespace) -> int:
    before = time.monotonic()
    with _connect(options, timeout=options.timeout) as mq:
        mq.ping()
    sys.stdout.write(f"PONG from {options.host} port {options.port} in {(time.monotonic() - before) * 1000:.1f} ms\n")
    return OK


def _bench(options: argparse.Namespace) -> int:
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
    return OK


def _demo(_: argparse.Namespace) -> int:
    from dsmq import demo  # noqa: PLC0415 - see _parser

    demo.main()
    return OK
