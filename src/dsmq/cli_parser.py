"""The parser of the command line. Options may appear anywhere, messages may begin with a dash, errors fit on a line."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

from dsmq import __version__
from dsmq.terminal import printable, quoted
from dsmq.wire.addresses import parse_endpoint

_MAX_ID = 2**63 - 1

N = TypeVar("N", int, float)

# Types of arguments. Each raises ArgumentTypeError.


def topic(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of the topic is empty")
    # Python represents bytes of the command line that are not UTF-8 as surrogates.
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


def position(text: str) -> int | str:
    """Parse an id, or a position as printed by `dsmq get --json`."""
    if re.fullmatch(r"[^\s:]+:[0-9]{1,19}", text):
        return text
    return _number(int, text, 0, _MAX_ID, "an id, 0, or a position")


def seconds(text: str) -> float:
    return _number(float, text, 0, math.inf, "a number of seconds")


def timeout(text: str) -> float:
    return _number(float, text, 1e-3, math.inf, "a number of seconds above 0")


def count(text: str) -> int:
    return _number(int, text, 1, math.inf, "a whole number of at least 1")


def port(text: str) -> int:
    return _number(int, text, 1, 65535, "a port number from 1 to 65535")


def _number(kind: Callable[[str], N], text: str, least: float, most: float, what: str) -> N:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not {what}")
    return number


# The commands and their options


class Option(NamedTuple):
    """An option; without a type, it takes no value."""

    name: str
    about: str
    type: Callable[[str], object] | None = None
    metavar: str | None = None
    default: object = None


JSON = Option("--json", "print JSON lines")
ADDRESS = [
    Option("--host", "address, name, or unix:/path; default: DSMQ_HOST, or 127.0.0.1", host),
    Option("--port", "default: DSMQ_PORT, or 30008", port),
    Option(
        "--token-file",
        "authenticate with the first token in FILE; default: the token in DSMQ_AUTH_TOKEN, or the file that "
        "DSMQ_AUTH_TOKEN_FILE names. Without --host, these four also come from the file that DSMQ_CONFIG names",
        file,
        "FILE",
    ),
    Option("--tls", "use TLS and verify the server's certificate"),
    Option("--ca-file", "CA certificates to trust instead of the system's, as PEM; implies --tls", file, "FILE"),
    Option("--cert-file", "client certificate, as PEM; implies --tls", file, "FILE"),
    Option("--key-file", "private key of the client certificate, if not in the same file", file, "FILE"),
]
RECONNECT = Option("--reconnect", "seconds to try to restore a broken connection; default: 30", seconds, "S", 30.0)
GET = [
    Option("--wait", "wait for messages, up to S seconds in total", seconds, "S"),
    Option("--latest", "start with the newest message, skipping older ones"),
    Option("-n", "print up to N messages; default: 1, or all with --follow", count, "N"),
    Option("--follow", "keep printing messages as they arrive"),
    Option("--json", "print JSON lines with topic, id, number, put_at, position and message"),
    Option(
        "--after",
        "start after this id or position; 0: at the oldest stored message. Default: messages put from now on",
        position,
        "POSITION",
    ),
    Option(
        "--position-file",
        "start after the position in FILE, if it exists, and keep it up to date. No message is skipped; the last ones "
        "may be printed again if the command is killed",
        file,
        "FILE",
    ),
]
_PUT = "Put a message into a topic; without MESSAGE, or with -, put each line of stdin."
_GET = "Print messages of a topic, one per line. On a terminal, control characters are shown as escapes."
_BENCH_N = "repetitions of each operation; default: 1000, which stores about 5 MB"
# Description, arguments and options of each command. serve and config also have an option for each setting.
COMMANDS: dict[str, tuple[str, str, list[Option]]] = {
    "serve": ("Run the server, until SIGTERM, Ctrl-C or a client's SHUTDOWN.", "", []),
    "config": (
        "Print the effective configuration as TOML, secrets masked.",
        "",
        [Option("--example", "print a commented dsmq.toml with all defaults instead")],
    ),
    "put": (_PUT, "TOPIC [MESSAGE] ", [*ADDRESS, RECONNECT]),
    "get": (_GET, "TOPIC ", [*GET, *ADDRESS, RECONNECT]),
    "topics": ("List topics with stored messages: message count, bytes, topic.", "", [JSON, *ADDRESS]),
    "ping": (
        "Check that the server answers; for scripts and health checks.",
        "",
        [Option("--timeout", "seconds to wait for the reply; default: 3", timeout, "S", 3.0), *ADDRESS],
    ),
    "bench": (
        "Measure how long typical operations take on a running server.",
        "",
        [Option("-n", _BENCH_N, count, "N", 1000), *ADDRESS],
    ),
    "demo": ("Run a server, a writer and two readers for a few seconds.", "", []),
}
_EPILOG = "Exit statuses: 0 done, 1 failed, 2 wrong usage or configuration, 3 no message printed, 130 interrupted."


class Parser(argparse.ArgumentParser):
    """Parses options; `place` assigns the other words."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, epilog=_EPILOG, **options)

    def add_option(self, option: Option) -> None:
        name, about, kind, metavar, default = option
        if kind:
            self.add_argument(name, help=about, type=kind, metavar=metavar, default=default)
        else:
            self.add_argument(name, help=about, action="store_true")

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
            if not takes or words[len(takes)].startswith("-"):
                self.unknown(words[len(takes)])
            first, rest = words[: len(takes) - 1], words[len(takes) - 1 :]
            quotes = shlex.join([*first, " ".join(rest)])
            self.error(f"too many arguments; quote a {takes[-1]} with blanks: {self.prog} {quotes}")
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
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        self.error(f"unknown argument {quoted(word)}{hint}{about}")

    def error(self, message: str) -> NoReturn:
        """Print the error on one line and exit."""
        self.exit(2, printable(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def parse(words: list[str]) -> argparse.Namespace:
    """Return the command with its options and arguments. After -- there are no options."""
    end = words.index("--") if "--" in words else len(words)
    options, others = _parser(words).parse_known_args(words[:end])
    command: Parser = options.parser
    for word in others:
        if word.startswith("--"):
            about = "; to begin a message with --, write -- before it" if "message" in options.takes else ""
            command.unknown(word.partition("=")[0], about)
    command.place(options, others + words[end + 1 :])
    return options


def _parser(words: list[str]) -> Parser:
    parser = Parser(prog="dsmq", description="The dead simple message queue.")
    parser.add_argument("--version", action="version", version=f"dsmq {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (about, takes, options) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, usage=f"dsmq {name} {takes}[OPTION ...]")
        command.set_defaults(parser=command, takes=re.findall(r"\w+", takes.lower()), message="-")
        for option in options:
            command.add_option(option)
        if name in ("serve", "config") and name in words:
            # Only here, because loading the settings takes longer than running a client command.
            from dsmq.settings import add_options  # noqa: PLC0415

            add_options(command)
    return parser
