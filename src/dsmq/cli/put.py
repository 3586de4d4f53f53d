"""`dsmq put`: puts a message, a file, or each line of stdin."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dsmq.client.replies import reason
from dsmq.errors import ConfigError, DSMQError, TooBig
from dsmq.terminal import show_progress

if TYPE_CHECKING:
    from dsmq.client import DSMQClientSideConnection

# Max length of a line or file, unless the server accepts longer messages.
_MAX_BYTES = 67_108_864
_READ_BYTES = 65_536
# The time before the first progress report and between reports.
_PROGRESS_SECONDS = 0.5


def put(options: argparse.Namespace, connect: Callable[[], DSMQClientSideConnection]) -> None:
    if options.file is not None:
        _put_file(options, connect)
        return
    with connect() as mq:
        if options.message not in (None, "-"):
            _print_ids([mq.put(options.topic, os.fsencode(options.message))], options)
            return
        progress = _Progress(options)
        try:
            for ids in _put_lines(mq, options.topic, progress):
                _print_ids(ids, options)
        finally:
            progress.end()


def _print_ids(ids: list[int], options: argparse.Namespace) -> None:
    if options.print_id:
        sys.stdout.writelines(f"{message_id}\n" for message_id in ids)
        sys.stdout.flush()


class _Progress:
    """Shows progress on the terminal, unless the terminal is used for input or output."""

    def __init__(self, options: argparse.Namespace) -> None:
        is_printing = options.print_id and sys.stdout.isatty()
        self._is_on = sys.stderr.isatty() and not sys.stdin.isatty() and not is_printing
        self._next_at = time.monotonic() + _PROGRESS_SECONDS
        self._lines = self._bytes = 0

    def add(self, lines: list[bytes]) -> None:
        self._lines += len(lines)
        self._bytes += sum(map(len, lines))
        if self._is_on and time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _PROGRESS_SECONDS
            show_progress(f"{self._lines:,} lines, {self._bytes / 1e6:,.1f} MB put")

    def end(self) -> None:
        if self._is_on:
            show_progress("")


def _put_lines(mq: DSMQClientSideConnection, topic: str, progress: _Progress) -> Iterator[list[int]]:
    """Put each line of stdin; yield ids in batches, as lines arrive."""
    stored = 0
    try:
        for lines in _lines(sys.stdin.buffer, max(mq.max_message_bytes, _MAX_BYTES)):
            ids = mq.put_many(topic, lines)
            stored += len(ids)
            progress.add(lines)
            yield ids
    except (DSMQError, OSError) as error:
        stored += getattr(error, "stored_before", 0)
        after = getattr(error, "stored_after", 0)
        about = f"lines stored: {stored} before it" + (f", {after} after it" if after else "")
        raise DSMQError(f"line {stored + 1} of stdin: {reason(error)} ({about})") from error


def _lines(stream: IO[bytes], max_bytes: int) -> Iterator[list[bytes]]:
    """Yield lines of a stream as they arrive, without line ends. Raises TooBig."""
    rest: list[bytes] = []
    size = 0
    while chunk := stream.read1(_READ_BYTES):  # type: ignore[attr-defined]
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


def _put_file(options: argparse.Namespace, connect: Callable[[], DSMQClientSideConnection]) -> None:
    """Put a whole file as one message. Raises ConfigError if it can't be read."""
    name = "stdin" if options.file == "-" else options.file
    try:
        stream = nullcontext(sys.stdin.buffer) if options.file == "-" else Path(options.file).open("rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {reason(error)}") from None
    with stream as source, connect() as mq:
        most = max(mq.max_message_bytes, _MAX_BYTES)
        try:
            # Limit the read, because a device may never end.
            body = source.read(most + 1)
        except OSError as error:
            raise ConfigError(f"{name}: {reason(error)}") from None
        if len(body) > most:
            raise TooBig(f"{name}: longer than {most} bytes")
        is_long = len(body) > _READ_BYTES and sys.stderr.isatty()
        try:
            if is_long:
                show_progress(f"{len(body) / 1e6:,.1f} MB ...")
            message_id = mq.put(options.topic, body)
        except TooBig as error:
            raise TooBig(f"{name}: {error}") from None
        finally:
            if is_long:
                show_progress("")
        _print_ids([message_id], options)
