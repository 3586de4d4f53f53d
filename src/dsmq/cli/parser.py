"""Parses the command line. Options may appear anywhere, messages may begin with a dash, and errors fit on one line."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from dsmq import __version__
from dsmq.cli import formats
from dsmq.cli.arguments import (
    addresses,
    count,
    delay,
    duration,
    file,
    group,
    interval,
    lease,
    port,
    position,
    seconds,
    timeout,
    topic,
)
from dsmq.terminal import printable, quoted
from dsmq.wire.resp import BUILD

# The commands and their options

_PUT = "Put a message into a topic; without MESSAGE, or with -, put each line of stdin."
_GET = (
    "Print messages of topics, one per line. In a TOPIC, * matches any characters, including none. On a terminal, "
    "control characters are escaped."
)
_WORK = (
    "Run COMMAND for each message of TOPIC, sharing the messages with the other workers of the group. COMMAND gets the "
    "message on stdin, and DSMQ_TOPIC_NAME, DSMQ_JOB_ID and DSMQ_ATTEMPT in its environment. If its exit status is not "
    "0 or the worker dies, the message is given to a worker again. In TOPIC, * matches any characters, including none."
)
# The description and arguments of each command. A last argument followed by ... may be repeated.
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("Run the server until SIGTERM, Ctrl-C or a client's SHUTDOWN.", ""),
    "config": ("Print the effective configuration as TOML, with secrets masked.", ""),
    "put": (_PUT, "TOPIC [MESSAGE] "),
    "get": (_GET, "TOPIC ... "),
    "work": (_WORK, "TOPIC "),
    "topics": ("List topics with stored messages: message count, bytes, topic.", ""),
    "watch": ("Show topics and rates until q or Ctrl-C, or once if the output is not a terminal.", ""),
    "stats": ("Print statistics of a topic or of the server.", "[TOPIC] "),
    "ping": ("Check that the server answers; for scripts and health checks.", ""),
    "bench": ("Measure how long typical operations take on a running server.", ""),
    "purge": ("Expire all messages of TOPIC, in which * matches any characters, including none.", "TOPIC "),
    "stop": ("Stop the server gracefully.", ""),
    "completion": ("Print a script that completes commands, options and topics in SHELL: bash, zsh or fish.", "SHELL "),
    "demo": ("Run a server, a writer and two readers for a few seconds.", ""),
}


SHELLS = ("bash", "zsh", "fish")
# Commands that don't accept patterns.
ONE_TOPIC = ("put", "stats")
_EXAMPLES = """examples:
  dsmq serve                             run a server
  dsmq put greetings hello               put a message into a topic
  dsmq get greetings --follow            print messages as they arrive
  dsmq get 'sensors/*' --since 5m -v     print what all sensors sent in the last five minutes
  dsmq topics                            list topics
"""


def _add_options(command: str, parser: Parser) -> None:
    add = parser.add_argument
    if command == "config":
        add("--example", action="store_true", help="print a commented dsmq.toml with all defaults instead")
    if add_options_of := {"put": _add_put_options, "get": _add_get_options, "work": _add_work_options}.get(command):
        add_options_of(parser)
        about = "seconds to try to restore a broken connection; default: 30"
        add("--reconnect", type=seconds, metavar="S", default=30.0, help=about)
    if command in ("topics", "stats"):
        add("--json", action="store_true", help="print JSON")
    if command == "watch":
        add("--interval", type=interval, metavar="S", default=2.0, help="seconds between updates; default: 2")
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
        # Import this here, because loading the settings takes longer than running a client command.
        from dsmq.settings import add_options  # noqa: PLC0415

        add_options(parser)
    elif command not in ("completion", "demo"):
        _add_server_options(parser)


def _add_put_options(parser: Parser) -> None:
    add = parser.add_argument
    about = "put FILE, or with - all of stdin, as one message"
    add("--file", type=file, metavar="FILE", help=about)
    add("--print-id", action="store_true", help="print the id of each message")


def _add_get_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--wait", type=seconds, metavar="S", help="wait for messages, up to S seconds in total")
    add("--latest", action="store_true", help="start with the newest message of each topic, skipping older ones")
    add(
        "-n",
        "--count",
        dest="n",
        type=count,
        metavar="N",
        help="print up to N messages; default: 1, those of --last or --since, or all with --follow",
    )
    add("--follow", action="store_true", help="keep printing messages as they arrive")
    add = parser.add_mutually_exclusive_group().add_argument
    about = "start after this id or position (0: with the oldest stored message); default: after the newest"
    add("--after", type=position, metavar="POSITION", help=about)
    add("--last", type=count, metavar="N", help="start with the last N messages")
    about = "start with the messages put in the last TIME, such as 30s, 5m or 2h"
    add("--since", type=duration, metavar="TIME", help=about)
    add = parser.add_mutually_exclusive_group().add_argument
    add("-v", "--verbose", action="store_true", help="print the topic before each message")
    add("--format", type=formats.parse_format, metavar="FORMAT", help=formats.HELP)
    about = "print JSON lines with topic, id, number, put_at, position and message"
    add("--json", action="store_true", help=about)
    about = "write one message, unchanged, to FILE, which is replaced atomically; -: to stdout"
    add("--output", type=file, metavar="FILE", help=about)
    add = parser.add_argument
    about = (
        "start after the position in FILE, if FILE exists, and keep FILE up to date. No message is skipped, but the "
        "last ones may be printed again if the command is killed"
    )
    add("--position-file", type=file, metavar="FILE", help=about)


def _add_work_options(parser: Parser) -> None:
    add = parser.add_argument
    about = "group of workers that share the messages; default: workers"
    add("--group", type=group, metavar="NAME", default="workers", help=about)
    about = "how long a worker may be silent before another gets its message; default: 60s"
    add("--lease", type=lease, metavar="TIME", default=60.0, help=about)
    about = "delay before the message of a failed command is given to a worker again; default: 1s"
    add("--delay", type=delay, metavar="TIME", default=1.0, help=about)
    about = "exit after this long without a message; default: never"
    add("--timeout", dest="wait", type=duration, metavar="TIME", default=math.inf, help=about)


def _add_server_options(parser: Parser) -> None:
    about = (
        "Defaults: DSMQ_SERVER, which may list several servers, or the server settings in DSMQ_HOST, DSMQ_PORT, "
        "DSMQ_AUTH_TOKEN or DSMQ_AUTH_TOKEN_FILE, and DSMQ_TLS_CERT_FILE; without --host and DSMQ_SERVER, also those "
        "in the TOML file given by DSMQ_CONFIG."
    )
    add = parser.add_argument_group("server", about).add_argument
    hosts = "address or name, optionally with :PORT, or unix:/path; separate several by commas; default: 127.0.0.1"
    add("-H", "--host", type=addresses, help=hosts)
    add("-p", "--port", type=port, help="default: 30008")
    add("--token-file", type=file, metavar="FILE", help="authenticate with the first token in FILE")
    add("--tls", action="store_true", help="use TLS and verify the server's certificate")
    about = "CA certificates to trust instead of the system's, as PEM; implies --tls"
    add("--ca-file", type=file, metavar="FILE", help=about)
    add("--cert-file", type=file, metavar="FILE", help="client certificate, as PEM; implies --tls")
    about = "private key of the client certificate, if not in the same file"
    add("--key-file", type=file, metavar="FILE", help=about)


_EPILOG = "Exit status: 0 success, 1 failure, 2 usage or configuration error, 3 no message printed, 130 interrupted."


class Parser(argparse.ArgumentParser):
    """Reports each error on one line and suggests the closest option."""

    takes_message = False

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, epilog=_EPILOG, **options)

    def _parse_optional(self, arg_string: str) -> Any:
        """Keep argparse from taking -hello for -h: a word with a single dash is either a known option or a message."""
        option = self._option_string_actions.get(arg_string[:2])
        has_value = option and option.nargs != 0 and not self.takes_message
        is_known = arg_string in self._option_string_actions or has_value
        return super()._parse_optional(arg_string) if arg_string.startswith("--") or is_known else None

    def unknown(self, word: str, about: str = "", *, what: str = "argument", known: Iterable[str] = ()) -> NoReturn:
        """Reject a word, suggesting the closest option or known word."""
        nearest = difflib.get_close_matches(word, [*self._option_string_actions, *known], n=1)
        hint = "".join(f"; did you mean {name}?" for name in nearest)
        self.error(f"unknown {what} {quoted(word)}{hint}{about}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Keep argparse from ignoring that help can't be printed."""
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Print the error on one line and exit."""
        self.exit(2, printable(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def parse(words: list[str]) -> argparse.Namespace:
    """Return the command with its options and arguments. Nothing after -- is an option."""
    name, words = (words[0], words[1:]) if words else ("", [])
    if name not in COMMANDS:
        _refuse(name, next(filter(COMMANDS.__contains__, words), ""))
    about, arguments = COMMANDS[name]
    takes = re.findall(r"\w+", arguments.lower())
    usage = f"dsmq {name} {arguments}[OPTION ...]" + (" -- COMMAND ..." if name == "work" else "")
    parser = Parser(prog=f"dsmq {name}", usage=usage, description=about)
    parser.takes_message = "message" in takes
    _add_options(name, parser)
    end = words.index("--") if "--" in words else len(words)
    options, others = parser.parse_known_args(words[:end], argparse.Namespace(command=name, **dict.fromkeys(takes)))
    for word in others:
        if word.startswith("--"):
            about = "; to begin a message with --, write -- before it" if parser.takes_message else ""
            parser.unknown(word.partition("=")[0], about)
    # Only the first of several topics may begin with a dash.
    extra = [word for word in others[1:] if word.startswith("-")] if "..." in arguments else others[len(takes) :]
    if extra and (not takes or extra[0].startswith("-")):
        parser.unknown(extra[0])
    rest = words[end + 1 :]
    if name == "work":
        options.program, rest = rest, []
        if not options.program:
            parser.error("a command is required: dsmq work TOPIC -- COMMAND")
    _assign(parser, options, arguments, others + rest)
    _check(parser, options)
    return options


def _refuse(word: str, command: str) -> NoReturn:
    """Print help or version, or report a word that is not a command; `command` is the first command after it."""
    parser = Parser(prog="dsmq", usage="dsmq COMMAND [OPTION ...]", description="The dead simple message queue.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{_EXAMPLES}\n{_EPILOG}"
    parser.add_argument("--version", action="version", version=f"dsmq {__version__} ({BUILD})")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (about, _) in COMMANDS.items():
        commands.add_parser(name, help=about.partition(".")[0])
    if not word:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if word.startswith("--") or word == "-h":
        parser.parse_known_args([word])
    if word.startswith("-") and command:
        parser.error(f"{quoted(word)} must follow the command: dsmq {command} {printable(word)} ...")
    parser.unknown(word, what="argument" if word.startswith("-") else "command", known=COMMANDS)


def all_commands(topics: Callable[..., Iterable[str]]) -> argparse.ArgumentParser:
    """Return a parser for all commands that completes topics with the given function."""
    parser = Parser(prog="dsmq")
    commands = parser.add_subparsers(dest="command")
    for name, (_, arguments) in COMMANDS.items():
        command = commands.add_parser(name)
        _add_options(name, command)
        for word in re.findall(r"\w+", arguments.lower()):
            nargs = "*" if "..." in arguments else None
            argument = command.add_argument(word, nargs=nargs, choices=SHELLS if word == "shell" else None)
            if word != "shell":
                argument.completer = topics if word == "topic" else lambda **_: ()  # type: ignore[attr-defined]
    return parser


def _assign(parser: Parser, options: argparse.Namespace, arguments: str, words: list[str]) -> None:
    """Assign the words that are not options to the command's arguments."""
    takes = re.findall(r"\w+", arguments.lower())
    if takes and not words and arguments[0] != "[":
        parser.error(f"the following arguments are required: {takes[0].upper()}")
    if len(words) > len(takes) and "..." not in arguments:
        if not takes or words[len(takes)].startswith("-"):
            parser.error(f"unknown argument {quoted(words[len(takes)])}; after --, there are no options")
        first, rest = words[: len(takes) - 1], words[len(takes) - 1 :]
        quotes = shlex.join([*first, " ".join(rest)])
        parser.error(f"too many arguments; quote a {takes[-1]} with spaces: {parser.prog} {quotes}")
    for name, word in zip(takes, words, strict=False):
        setattr(options, name, word)
    options.topics = words if "topic" in takes and "..." in arguments else words[: "topic" in takes]
    try:
        for word in options.topics:
            topic(word)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument TOPIC: {error}")


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """Reject options that contradict each other."""
    if options.command in ONE_TOPIC and any("*" in name for name in options.topics):
        parser.error(f"{quoted(options.topic)} is a pattern, because it contains *; {parser.prog} takes one topic")
    if options.command == "completion" and options.shell not in SHELLS:
        parser.error(f"SHELL must be one of {', '.join(SHELLS)}, not {quoted(options.shell)}")
    if options.command == "put" and options.file is not None and options.message is not None:
        parser.error("MESSAGE and --file are mutually exclusive")
    if options.command == "get" and options.output is not None and (options.follow or (options.n or 1) > 1):
        parser.error("--output writes one message; omit --follow and -n")
