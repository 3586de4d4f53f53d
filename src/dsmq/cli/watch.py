"""`dsmq watch`: shows a server's activity, refreshed like `top`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from dsmq.terminal import printable

if TYPE_CHECKING:
    from dsmq.client import DSMQClientSideConnection

# Max topics whose rates are measured; those with the most messages are chosen.
_MAX_TOPICS = 200


class Sample(NamedTuple):
    """A server's figures at one moment."""

    at: float
    server: dict[str, Any]
    topics: list[tuple[str, int, int]]
    """Name, messages and bytes, largest first."""
    numbers: dict[str, int]
    """The number of messages put into each topic so far."""


def watch(options: argparse.Namespace, connect: Callable[[], DSMQClientSideConnection]) -> None:
    with connect() as mq:
        where = ", ".join(options.servers)
        if _has_screen():
            import curses  # noqa: PLC0415 - some systems lack it

            # Otherwise, curses would not restore the terminal.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            curses.wrapper(_show, mq, where, options.interval)
            return
        before = _sample(mq)
        time.sleep(options.interval)
        sys.stdout.writelines(f"{line}\n" for line in lines(where, before, _sample(mq)))


def _has_screen() -> bool:
    """Return whether stdin and stdout are a terminal whose cursor can be moved."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        import curses  # noqa: PLC0415 - some systems lack it
    except ImportError:
        return False
    try:
        curses.setupterm()
    except curses.error:
        return False
    return curses.tigetstr("cup") is not None


def _show(screen: Any, mq: DSMQClientSideConnection, where: str, interval: float) -> None:
    """Redraw at the interval and when the terminal is resized, until q is pressed."""
    import curses  # noqa: PLC0415 - some systems lack it

    with suppress(curses.error):
        # Keep the terminal's own colours.
        curses.use_default_colors()
    screen.timeout(round(interval * 1000))
    before = sample = _sample(mq)
    key = -1
    while key not in (ord("q"), ord("Q")):
        rows, _ = screen.getmaxyx()
        screen.erase()
        for row, line in enumerate(lines(where, before, sample)[:rows]):
            # `insstr` truncates a line that is too long.
            screen.insstr(row, 0, line.encode(screen.encoding, "backslashreplace").decode(screen.encoding))
        screen.refresh()
        key = screen.getch()
        if key == -1:
            before, sample = sample, _sample(mq)


def _sample(mq: DSMQClientSideConnection) -> Sample:
    topics = sorted(mq.topics(), key=lambda topic: -topic[1])
    numbers = {name: int(mq.stats(name)["last_number"]) for name, _, _ in topics[:_MAX_TOPICS]}
    return Sample(time.monotonic(), mq.stats(), topics, numbers)


def lines(where: str, before: Sample, sample: Sample) -> list[str]:
    seconds, server = max(sample.at - before.at, 1e-3), sample.server

    def rate(name: str) -> float:
        return float(server[name] - before.server[name]) / seconds

    messages, size = sum(topic[1] for topic in sample.topics), sum(topic[2] for topic in sample.topics)
    head = [f"dsmq {server['dsmq_version']} at {where}, up {timedelta(seconds=server['uptime_in_seconds'])}"]
    head.append(f"{_counted(len(sample.topics), 'topic')}, {_counted(messages, 'message')}, {_megabytes(size)}")
    if "puts" in server:
        # The server sends these only to an admin.
        head[0] += f", {_counted(server['connected_clients'], 'client')}, {server['blocked_clients']:,} of them waiting"
        head.append(
            f"{rate('puts'):,.1f} puts/s, {rate('deliveries'):,.1f} deliveries/s, {rate('expired'):,.1f} expired/s, "
            f"{rate('errors'):,.1f} errors/s"
        )
    known = before.numbers if len(before.topics) <= _MAX_TOPICS else sample.numbers | before.numbers
    rates = {name: max(0.0, (number - known.get(name, 0)) / seconds) for name, number in sample.numbers.items()}
    body = [
        f"{rates[name]:>10,.1f} {messages:>12,} {_megabytes(size):>14}  {name}"
        for name, messages, size in sorted(sample.topics[:_MAX_TOPICS], key=lambda topic: -rates[topic[0]])
    ]
    return [printable(line) for line in (*head, "", f"{'PUTS/S':>10} {'MESSAGES':>12} {'SIZE':>14}  TOPIC", *body)]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
