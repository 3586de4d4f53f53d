"""`dsmq get`: prints messages of topics or writes one to a file."""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsmq.cli.formats import Format, parse_format, print_messages, put_at
from dsmq.errors import ConfigError

if TYPE_CHECKING:
    from dsmq.cli.files import PositionFile
    from dsmq.client import DSMQClientSideConnection
    from dsmq.client.message import Message

# The exit status if no message was printed.
NOTHING = 3
# Max messages per read.
_BATCH = 100


def get(options: argparse.Namespace, connect: Callable[[], DSMQClientSideConnection]) -> int | None:
    seconds = options.wait if options.wait is not None else math.inf if options.follow else 0.0
    began, until = time.time(), time.monotonic() + seconds
    start = options.after, options.last, options.since
    if options.output not in (None, "-"):
        from dsmq.cli.files import check_regular  # noqa: PLC0415 - rarely needed

        # Before waiting for a message.
        check_regular(options.output)
    file = _position_file(options)
    left, found = _count(options), False
    with connect() as mq:
        _seek(mq, options)
        # With --last or --since, the position is known only after the first read.
        if file and options.last is None and options.since is None:
            file.save(mq.position(options.topics))
        while left > 0:
            timeout = max(0.0, until - time.monotonic())
            messages = _read(mq, options, int(min(left, _BATCH)), timeout, latest=options.latest and not found)
            if not messages:
                break
            found = True
            left -= len(messages)
            if not options.json:
                _print(messages, options)
            sys.stdout.flush()
            if file:
                file.save(mq.position(options.topics))
            if _is_enough(options, messages, began):
                break
    if found:
        return None
    if options.wait is None and start == (None, None, None) and not file:
        sys.stderr.write(
            "dsmq: no message. Only messages put after connecting are read by default: "
            "use --wait, --follow, or --after 0\n"
        )
    return NOTHING


def _count(options: argparse.Namespace) -> float:
    """Return the max number of messages to print."""
    if options.n is not None:
        return float(options.n)
    if options.output is not None:
        return 1
    if options.follow or options.since is not None:
        return math.inf
    # --latest prints the newest message of each topic.
    is_latest_of_many = options.latest and (len(options.topics) > 1 or "*" in options.topics[0])
    return math.inf if is_latest_of_many else options.last or 1


def _is_enough(options: argparse.Namespace, messages: list[Message], began: float) -> bool:
    """Return whether all messages stored at the start have been printed, and no later ones were requested."""
    if options.follow or options.n is not None:
        return False
    return options.latest or (options.since is not None and options.wait is None and messages[-1].put_at > began)


def _position_file(options: argparse.Namespace) -> PositionFile | None:
    """Open the position file, if any, and start reading at its position. Raises ConfigError."""
    if not options.position_file:
        return None
    from dsmq.cli.files import PositionFile  # noqa: PLC0415 - rarely needed

    file = PositionFile(options.position_file)
    if (saved := file.load()) is not None:
        options.after, options.last, options.since = saved, None, None
    return file


def _seek(mq: DSMQClientSideConnection, options: argparse.Namespace) -> None:
    try:
        if (options.after, options.last, options.since) != (None, None, None):
            mq.seek(options.topics, options.after, last=options.last, since=options.since)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read(
    mq: DSMQClientSideConnection, options: argparse.Namespace, n: int, timeout: float, *, latest: bool
) -> list[Message]:
    """Return up to `n` messages, or, with `latest`, the newest of each topic. With --json, also print them."""
    # JSON contains the position after each message, so messages are read one at a time.
    messages = mq.read(options.topics, latest=True)[-n:] if latest else []
    messages = messages or mq.read(options.topics, 1 if options.json else n, timeout=timeout)
    if options.json:
        for message in messages:
            print_json(_fields(message, mq.position(options.topics)))
    return messages


def _print(messages: list[Message], options: argparse.Namespace) -> None:
    if options.output is None:
        print_messages(messages, options.format or _DEFAULT[options.verbose])
        return
    if options.output == "-":
        print_messages(messages, _DEFAULT[False], end="")
        return
    from dsmq.cli.files import replace_file  # noqa: PLC0415 - rarely needed

    replace_file(options.output, messages[0].body)


_DEFAULT: dict[bool, Format] = {False: parse_format("%p"), True: parse_format("%t %p")}


def _fields(message: Message, position: str) -> dict[str, object]:
    fields: dict[str, object] = {
        "topic": message.topic,
        "id": message.id,
        "number": message.number,
        "put_at": put_at(message),
        "position": position,
    }
    try:
        fields["message"] = message.body.decode()
    except UnicodeDecodeError:
        fields["message_base64"] = base64.b64encode(message.body).decode()
    return fields


def print_json(fields: dict[str, object]) -> None:
    # Use ASCII, which is valid in every locale and leaves no control characters unescaped.
    sys.stdout.write(json.dumps(fields) + "\n")
