"""Parses command lines. Options may appear anywhere, messages may begin with a dash, errors fit on one line."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias, TypeVar

from dsmq import __version__
from dsmq.terminal import printable, quoted
from dsmq.wire.addresses import parse_endpoint

USAGE = 2
_MAX_ID = 2**63 - 1

N = TypeVar("N", int, float)

Command: TypeAlias = Callable[[argparse.Namespace], int]
"""Runs a command and returns the exit status."""

_EPILOG = "Exit statuses: 0 done, 1 failed, 2 wrong usage or configuration, 3 no message printed, 130 interrupted."


class Parser(argparse.ArgumentParser):
    """Parses options; `place` assigns the other words."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def _parse_optional(self, arg_string: str) -> Any:
        """Keep argparse from reading -hello as -h: after a single dash comes a known option or a message."""
        option = self._option_string_actions.get(arg_string[:2])
        is_known = arg_string in self._option_string_actions or (option and option.nargs != 0)
        return super()._parse_optional(arg_string) if arg_string.startswith("--") or is_known else None

    def place(self, options: argparse.Namespace, words: list[str]) -> None:
        """Assign the words that are not options to the command's topic and message."""
        takes: list[str] = options.takes
        if takes and not words:
            self.error(f"the following arguments are required: {takes[0].upper()}")
        if len(words) > len(takes):
            if words[len(takes)] in self._option_string_actions:
                self.error(f"option {words[len(takes)]} has to come before --")
            if not takes or words[len(takes)].startswith("-"):
                self.unknown(words[len(takes)])
            first, rest = words[: len(takes) - 1], words[len(takes) - 1 :]
            quotes = shlex.join([*first, " ".join(rest)])
            self.error(f"too many arguments; quote a {takes[-1]} that has blanks: {self.prog} {quotes}")
        for name, word in zip(takes, words, strict=False):
            setattr(options, name, word)
        if takes:
            try:
                topic(options.topic)
            except argparse.ArgumentTypeError as error:
                self.error(f"argument TOPIC: {error}")

    def unknown(self, word: str, about: str = "") -> NoReturn:
        """Reject an argument, suggesting the closest option."""
        nearest = difflib.get_close_matches(word, self._option_string_actions, n=1) if word[:1] == "-" else []
        hint = f"; the nearest known one is {nearest[0]}" if nearest else ""
        self.error(f"unknown argument {quoted(word)}{hint}{about}")

    def error(self, message: str) -> NoReturn:
        """Print the error on one line and exit."""
        self.exit(USAGE, printable(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def parse(words: list[str], run: Mapping[str, Command]) -> argparse.Namespace:
    """Return a command's options and arguments, and the function that runs it. After -- there are no options."""
    end = words.index("--") if "--" in words else len(words)
    options, others = _parser(words, run).parse_known_args(words[:end])
    command: Parser = options.parser
    for word in others:
        if word.startswith("--"):
            about = "; to begin a message with --, write -- before it" if "message" in options.takes else ""
            command.unknown(word.partition("=")[0], about)
    command.place(options, others + words[end + 1 :])
    return options


def _parser(words: list[str], run: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = Parser(prog="dsmq", description="The dead simple message queue.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"dsmq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, about: str, words: str = "") -> argparse.ArgumentParser:
        usage = f"dsmq {name} {words}[OPTION ...]"
        command = commands.add_parser(name, help=about, description=about, epilog=_EPILOG, usage=usage)
        command.set_defaults(run=run[name], parser=command, takes=re.findall(r"\w+", words.lower()), message="-")
        return command

    serve = add("serve", "Run the server, until SIGTERM, Ctrl-C or a client's SHUTDOWN.")
    config = add("config", "Print the effective configuration as TOML, secrets masked.")
    config.add_argument("--example", action="store_true", help="print a commented dsmq.toml with all defaults instead")
    if {"serve", "config"}.intersection(words):
        # Only for these, because loading the settings takes longer than running a client command.
        from dsmq.settings import add_options  # noqa: PLC0415

        add_options(serve)
        add_options(config)
    put = add(
        "put", "Put a message into a topic; without MESSAGE, or with -, put each line of stdin.", "TOPIC [MESSAGE] "
    )
    about = "Print messages of a topic, one per line. On a terminal, control characters are shown as escapes."
    _add_get_options(add("get", about, "TOPIC "))
    topics = add("topics", "List topics with stored messages: message count, bytes, topic.")
    topics.add_argument("--json", action="store_true", help="print JSON lines")
    ping = add("ping", "Check that the server answers; for scripts and health checks.")
    ping.add_argument(
        "--timeout", type=timeout, default=3.0, metavar="S", help="seconds to wait for the reply; default: 3"
    )
    bench = add("bench", "Measure how long typical operations take on a running server.")
    bench.add_argument(
        "-n",
        type=count,
        default=1000,
        metavar="N",
        help="repetitions of each operation; default: 1000, which stores about 5 MB",
    )
    add("demo", "Run a server, a writer and two readers for a few seconds.")
    for command in (put, commands.choices["get"], topics, ping, bench):
        _add_address(command)
    for command in (put, commands.choices["get"]):
        command.add_argument(
            "--reconnect",
            type=seconds,
            default=30.0,
            metavar="S",
            help="seconds to try to restore a broken connection; default: 30",
        )
    return parser


def _add_get_options(get: argparse.ArgumentParser) -> None:
    get.add_argument("--wait", type=seconds, metavar="S", help="wait for messages, up to S seconds in total")
    get.add_argument("--latest", action="store_true", help="start with the newest message, skipping older ones")
    get.add_argument("-n", type=count, metavar="N", help="print up to N messages; default: 1, or all with --follow")
    get.add_argument("--follow", action="store_true", help="keep printing messages as they arrive")
    get.add_argument(
        "--json", action="store_true", help="print JSON lines with topic, id, number, put_at, position and message"
    )
    get.add_argument(
        "--after",
        type=position,
        metavar="POSITION",
        help="start after this id or position; 0: at the oldest stored message. Default: messages put from now on",
    )
    get.add_argument(
        "--position-file",
        type=file,
        metavar="FILE",
        help="start after the position in FILE, if it exists, and keep it up to date. No message is skipped; the "
        "last ones may be printed again if the command is killed",
    )


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", type=host, help="address, name, or unix:/path; default: DSMQ_HOST, or 127.0.0.1")
    command.add_argument("--port", type=port, help="default: DSMQ_PORT, or 30008")
    security = command.add_argument_group(
        "security",
        "The token itself can be set as DSMQ_AUTH_TOKEN. Without --host, address and token also "
        "come from the file that DSMQ_CONFIG names, if it is set.",
    )
    security.add_argument(
        "--token-file",
        type=file,
        metavar="FILE",
        help="authenticate with the first token in FILE; default: DSMQ_AUTH_TOKEN_FILE",
    )
    security.add_argument("--tls", action="store_true", help="use TLS and verify the server's certificate")
    security.add_argument(
        "--ca-file",
        type=file,
        metavar="FILE",
        help="CA certificates to trust instead of the system's, as PEM; implies --tls",
    )
    security.add_argument("--cert-file", type=file, metavar="FILE", help="client certificate, as PEM; implies --tls")
    security.add_argument(
        "--key-file", type=file, metavar="FILE", help="private key of the client certificate, if not in the same file"
    )


# Types of arguments. Each raises ArgumentTypeError.


def topic(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of the topic is empty")
    # Python carries bytes of the command line that are not UTF-8 as surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"the topic {quoted(text)} is not UTF-8")
    return text


def host(text: str) -> str:
    try:
        if "\0" in text:
            raise ValueError
        parse_endpoint(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not an address") from None
    return text


def file(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    return text


def token(text: str) -> str:
    if text.split() != [text] or not text.isascii():
        raise argparse.ArgumentTypeError("should be a token: ASCII, without blanks")
    return text


def position(text: str) -> int | str:
    """An id, or a position as `dsmq get --json` prints it."""
    if re.fullmatch(r"[^\s:]+:[0-9]{1,19}", text):
        return text
    return _number(int, text, 0, _MAX_ID, "an id, 0, or a position")


def seconds(text: str) -> float:
    return _number(float, text, 0, math.inf, "a number of seconds")


def timeout(text: str) -> float:
    return _number(float, text, 1e-3, math.inf, "a number of seconds above 0")


def count(text: str) -> int:
    return _number(int, text, 1, math.inf, "a number from 1 up")


def port(text: str) -> int:
    return _number(int, text, 1, 65535, "a port, 1 to 65535")


def _number(kind: Callable[[str], N], text: str, least: float, most: float, what: str) -> N:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not {what}")
    return number
