"""Parses command lines: options stand anywhere, messages may begin with a dash, errors take one line."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import shlex
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from dsmq.terminal import printable, quoted

USAGE = 2
_MAX_ID = 2**63 - 1

N = TypeVar("N", int, float)


class Parser(argparse.ArgumentParser):
    """Parses options. All other words are for `place`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def _parse_optional(self, arg_string: str) -> Any:
        """Tell argparse not to take -hello for -h: behind a single dash there is a known option, or a message."""
        option = self._option_string_actions.get(arg_string[:2])
        is_known = arg_string in self._option_string_actions or (option and option.nargs != 0)
        return super()._parse_optional(arg_string) if arg_string.startswith("--") or is_known else None

    def place(self, options: argparse.Namespace, words: list[str]) -> None:
        """Set topic and message, as far as the command takes them, to the words that are not options."""
        takes: list[str] = options.takes
        if takes and not words:
            self.error(f"the following arguments are required: {takes[0].upper()}")
        if len(words) > len(takes):
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
        """Complain about an argument, and name the nearest option."""
        nearest = difflib.get_close_matches(word, self._option_string_actions, n=1) if word[:1] == "-" else []
        hint = f"; the nearest known one is {nearest[0]}" if nearest else ""
        self.error(f"unknown argument {quoted(word)}{hint}{about}")

    def error(self, message: str) -> NoReturn:
        """Complain in one line."""
        self.exit(USAGE, printable(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Return the options of a command, its topic and its message. What stands behind -- is no option."""
    end = words.index("--") if "--" in words else len(words)
    options, others = parser.parse_known_args(words[:end])
    command: Parser = options.parser
    for word in others:
        if word.startswith("--"):
            about = "; to begin a message with --, write -- before it" if "message" in options.takes else ""
            command.unknown(word.partition("=")[0], about)
    command.place(options, others + words[end + 1 :])
    return options


# What options take. Each raises ArgumentTypeError.


def topic(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the topic is empty")
    # Python carries bytes of the command line that are not UTF-8 as surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"the topic {quoted(text)} is not UTF-8")
    return text


def host(text: str) -> str:
    path = text.removeprefix("unix:")
    if not path or "\0" in text or (path == text and text.startswith("[") != text.endswith("]")):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not an address")
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
