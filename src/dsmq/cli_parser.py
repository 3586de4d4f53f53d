"""The parser of the command line. Options may appear anywhere, messages may begin with a dash, errors fit on a line."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import shlex
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

from dsmq import __version__
from dsmq.terminal import printable, quoted
from dsmq.wire.addresses import UNIX, parse_endpoint, split_port
from dsmq.wire.limits import MAX_INTEGER

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
        about = f"{quoted(text)} is not an address or a name (without a port), or unix:/path"
        raise argparse.ArgumentTypeError(about) from None
    return text


def addresses(text: str) -> list[tuple[str, int]]:
    """Parse hosts separated by commas, each perhaps with a port; the port is 0 if it is missing."""
    names = [text] if text.startswith(UNIX) else text.split(",")
    return [(host(name), port(digits) if digits else 0) for name, digits in map(split_port, names)]


def file(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    return text


def position(text: str) -> int | str:
    """Parse an id, or a position as printed by `dsmq get --json`."""
    if re.fullmatch(r"[^\s:]+:[0-9]{1,19}", text):
        return text
    return _number(int, text, 0, MAX_INTEGER, "an id, 0, or a position")


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

_PUT = "Put a message into a topic; without MESSAGE, or with -, put each line of stdin."
_GET = "Print messages of a topic, one per line. On a terminal, control characters are shown as escapes."
# Description and arguments of each command.
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("Run the server, until SIGTERM, Ctrl-C or a client's SHUTDOWN.", ""),
    "config": ("Print the effective configuration as TOML, secrets masked.", ""),
    "put": (_PUT, "TOPIC [MESSAGE] "),
    "get": (_GET, "TOPIC "),
    "topics": ("List topics with stored messages: message count, bytes, topic.", ""),
    "ping": ("Check that the server answers; for scripts and health checks.", ""),
    "bench": ("Measure how long typical operations take on a running server.", ""),
    "demo": ("Run a server, a writer and two readers for a few seconds.", ""),
}


def _add_options(command: str, parser: Parser) -> None:
    add = parser.add_argument
    if command == "config":
        add("--example", action="store_true", help="print a commented dsmq.toml with all defaults instead")
    if command == "get":
        _add_get_options(parser)
    if command in ("get", "put"):
        about = "seconds to try to restore a broken connection; default: 30"
        add("--reconnect", type=seconds, metavar="S", default=30.0, help=about)
    if command == "topics":
        add("--json", action="store_true", help="print JSON lines")
    if command == "ping":
        add("--timeout", type=timeout, metavar="S", default=3.0, help="seconds to wait for the reply; default: 3")
    if command == "bench":
        about = "repetitions of each operation; default: 1000, which stores about 5 MB"
        add("-n", type=count, metavar="N", default=1000, help=about)
    if command == "demo":
        about = (
            "run two servers in front of three NATS servers instead, kill one of each, and show that nothing is lost"
        )
        add("--cluster", action="store_true", help=about)
    if command in ("serve", "config"):
        # Only here, because loading the settings takes longer than running a client command.
        from dsmq.settings import add_options  # noqa: PLC0415

        add_options(parser)
    elif command != "demo":
        _add_server_options(parser)


def _add_get_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--wait", type=seconds, metavar="S", help="wait for messages, up to S seconds in total")
    add("--latest", action="store_true", help="start with the newest message, skipping older ones")
    add("-n", type=count, metavar="N", help="print up to N messages; default: 1, or all with --follow")
    add("--follow", action="store_true", help="keep printing messages as they arrive")
    about = "print JSON lines with topic, id, number, put_at, position and message"
    add("--json", action="store_true", help=about)
    about = "start after this id or position; 0: at the oldest stored message. Default: messages put from now on"
    add("--after", type=position, metavar="POSITION", help=about)
    about = (
        "start after the position in FILE, if it exists, and keep it up to date. No message is skipped; the last ones "
        "may be printed again if the command is killed"
    )
    add("--position-file", type=file, metavar="FILE", help=about)


def _add_server_options(parser: Parser) -> None:
    about = (
        "Defaults: the server settings in DSMQ_HOST, DSMQ_PORT, DSMQ_AUTH_TOKEN or DSMQ_AUTH_TOKEN_FILE, and "
        "DSMQ_TLS_CERT_FILE; without --host, also those in the TOML file that DSMQ_CONFIG names."
    )
    add = parser.add_argument_group("server", about).add_argument
    hosts = "address or name, also with :PORT, or unix:/path; several separated by commas; default: 127.0.0.1"
    add("--host", type=addresses, help=hosts)
    add("--port", type=port, help="default: 30008")
    add("--token-file", type=file, metavar="FILE", help="authenticate with the first token in FILE")
    add("--tls", action="store_true", help="use TLS and verify the server's certificate")
    about = "CA certificates to trust instead of the system's, as PEM; implies --tls"
    add("--ca-file", type=file, metavar="FILE", help=about)
    add("--cert-file", type=file, metavar="FILE", help="client certificate, as PEM; implies --tls")
    about = "private key of the client certificate, if not in the same file"
    add("--key-file", type=file, metavar="FILE", help=about)


_EPILOG = "Exit statuses: 0 done, 1 failed, 2 wrong usage or configuration, 3 no message printed, 130 interrupted."


class Parser(argparse.ArgumentParser):
    """Reports each error on one line, with the closest option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, epilog=_EPILOG, **options)

    def _parse_optional(self, arg_string: str) -> Any:
        """Keep argparse from reading -hello as -h: after a single dash comes a known option or a message."""
        option = self._option_string_actions.get(arg_string[:2])
        is_known = arg_string in self._option_string_actions or (option and option.nargs != 0)
        return super()._parse_optional(arg_string) if arg_string.startswith("--") or is_known else None

    def unknown(self, word: str, about: str = "", *, what: str = "argument", known: Iterable[str] = ()) -> NoReturn:
        """Reject a word, suggesting the closest option or known word."""
        nearest = difflib.get_close_matches(word, [*self._option_string_actions, *known], n=1)
        hint = "".join(f"; did you mean {name}?" for name in nearest)
        self.error(f"unknown {what} {quoted(word)}{hint}{about}")

    def error(self, message: str) -> NoReturn:
        """Print the error on one line and exit."""
        self.exit(2, printable(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def parse(words: list[str]) -> argparse.Namespace:
    """Return the command with its options and arguments. After -- there are no options."""
    name, words = (words[0], words[1:]) if words else ("", [])
    if name not in COMMANDS:
        _refuse(name, next(filter(COMMANDS.__contains__, words), ""))
    about, arguments = COMMANDS[name]
    takes = re.findall(r"\w+", arguments.lower())
    parser = Parser(prog=f"dsmq {name}", usage=f"dsmq {name} {arguments}[OPTION ...]", description=about)
    _add_options(name, parser)
    end = words.index("--") if "--" in words else len(words)
    options, others = parser.parse_known_args(words[:end], argparse.Namespace(command=name, message="-"))
    for word in others:
        if word.startswith("--"):
            about = "; to begin a message with --, write -- before it" if "message" in takes else ""
            parser.unknown(word.partition("=")[0], about)
    if len(others) > len(takes) and (not takes or others[len(takes)].startswith("-")):
        parser.unknown(others[len(takes)])
    _place(parser, options, takes, others + words[end + 1 :])
    return options


def _refuse(word: str, command: str) -> NoReturn:
    """Print the help or the version, or report that this is not a command; `command` is the first one after it."""
    parser = Parser(prog="dsmq", usage="dsmq COMMAND [OPTION ...]", description="The dead simple message queue.")
    parser.add_argument("--version", action="version", version=f"dsmq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (about, _) in COMMANDS.items():
        commands.add_parser(name, help=about)
    if not word:
        parser.error("the following arguments are required: COMMAND")
    if word.startswith("--") or word == "-h":
        parser.parse_known_args([word])
    if word.startswith("-") and command:
        parser.error(f"{quoted(word)} is before the command; options follow it: dsmq {command} {printable(word)} ...")
    parser.unknown(word, what="argument" if word.startswith("-") else "command", known=COMMANDS)


def _place(parser: Parser, options: argparse.Namespace, takes: list[str], words: list[str]) -> None:
    """Assign the words that are not options to the command's topic and message."""
    if takes and not words:
        parser.error(f"the following arguments are required: {takes[0].upper()}")
    if len(words) > len(takes):
        if not takes or words[len(takes)].startswith("-"):
            parser.error(f"unknown argument {quoted(words[len(takes)])}; after --, there are no options")
        first, rest = words[: len(takes) - 1], words[len(takes) - 1 :]
        quotes = shlex.join([*first, " ".join(rest)])
        parser.error(f"too many arguments; quote a {takes[-1]} with blanks: {parser.prog} {quotes}")
    for name, word in zip(takes, words, strict=False):
        setattr(options, name, word)
    if takes:
        try:
            topic(options.topic)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument TOPIC: {error}")
