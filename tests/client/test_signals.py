"""Signal handlers that raise, or call the client, between any two steps of a call."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
from scenarios import mq, writer

from conftest import SOON, UNIT, serving
from dsmq import aio
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.client.connection import Connection
from dsmq.client.reader import TopicReader
from dsmq.errors import ClientClosed
from dsmq.server import Server

# Fixtures.
__all__ = ["mq", "writer"]

Client = DSMQClientSideConnection
# The modules that make up a call.
CLIENT = ("arguments", "connection", "core", "pool", "reader", "replies", "requests", "session", "stretch")
MODULES = {"dsmq.client", "dsmq.wire.resp", *(f"dsmq.client.{name}" for name in CLIENT)}


class Interrupted(BaseException):
    """Raised by a handler."""


class Steps:
    """Calls a function once, before a certain traced step: a line or a bytecode of the client."""

    def __init__(self, handle: Callable[[], None], *, opcodes: bool) -> None:
        self._handle, self._event = handle, "opcode" if opcodes else "line"
        self._left = 0

    def run(self, call: Callable[[], Any], step: int) -> Any:
        self._left = step
        sys.settrace(self._trace)
        try:
            return call()
        finally:
            sys.settrace(None)

    @property
    def ended_before(self) -> bool:
        return self._left > 0

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_globals.get("__name__") not in MODULES:
            return None
        frame.f_trace_opcodes = self._event == "opcode"
        if event == self._event and not _is_returning(frame):
            self._left -= 1
            if not self._left:
                self._handle()
        return self._trace


def _is_returning(frame: FrameType) -> bool:
    """Return whether a function is about to return: right before that, Python never runs a handler."""
    return frame.f_trace_opcodes and frame.f_code.co_code[frame.f_lasti] == RETURN_VALUE


RETURN_VALUE = sys.modules["opcode"].opmap["RETURN_VALUE"]


def interrupt() -> None:
    raise Interrupted


VERBS: dict[str, Callable[[Client], list[str]]] = {
    "get": lambda mq: [mq.get("t")],
    "get_wait": lambda mq: [mq.get_wait("t", timeout=SOON)],
    "get_many": lambda mq: mq.get_many("t", 2),
    "read": lambda mq: [message.body.decode() for message in mq.read("t", 3)],
    "get_latest": lambda mq: [mq.get_latest("t")],
    "messages": lambda mq: [next(mq.messages("t", text=True))],
}


@pytest.mark.slow
@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("ahead", [False, True], ids=["fetched", "read ahead"])
def test_read_interrupted_at_any_line_loses_nothing(
    mq: Client, writer: Client, verb: str, opcodes: bool, ahead: bool
) -> None:
    steps, step, interrupted = Steps(interrupt, opcodes=opcodes), 0, 0
    # Only some of the bytecodes, because there are many; the steps in between vary.
    stride = 7 if opcodes else 1
    while not step or not steps.ended_before:
        step += stride
        sent = writer.put_many("t", [f"{step} {number}" for number in range(4)])
        got = [mq.get("t")] if ahead else []
        try:
            got += steps.run(lambda: VERBS[verb](mq), step)
            passed = 3 if verb == "get_latest" else len(got) - 1
        except Interrupted:
            interrupted += 1
            passed = len(got) - 1
        got += mq.get_many("t", 100)
        expected = [f"{step} {number}" for number in range(4)]
        if verb == "get_latest" and passed == 3:
            expected = [*(expected[:1] if ahead else []), expected[3]]
        assert got == expected, (step, sent)
        assert mq.get("t", default=None) is None
    assert interrupted > 10
    assert mq.missed == 0


@pytest.mark.parametrize("verb", ["get", "get_many", "get_latest"])
def test_second_interrupt_anywhere_in_next_call_loses_nothing(mq: Client, writer: Client, verb: str) -> None:
    """The next call gives back the messages that the first one took."""
    steps, interrupted = Steps(interrupt, opcodes=False), 0
    sent = [str(number) for number in range(4)]
    for first in itertools.count(1):
        for second in itertools.count(first % 13 + 1, 13):
            writer.put_many("t", sent)
            got = [mq.get("t")]
            with suppress(Interrupted):
                got += steps.run(lambda: VERBS[verb](mq), first)
            if steps.ended_before:
                assert interrupted > 100
                assert mq.missed == 0
                return
            with suppress(Interrupted):
                got += steps.run(lambda: VERBS["get"](mq), second)
            is_last = steps.ended_before
            got += mq.get_many("t", 100)
            assert got == sent, (first, second)
            if is_last:
                break
            interrupted += 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_interrupt_while_giving_back_loses_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    left = {"take": [Interrupted()], "give_back": [Interrupted()]}
    take, give_back = TopicReader.take, TopicReader.give_back

    def interrupt_once(where: str) -> None:
        if left[where]:
            raise left[where].pop()

    def taken(*arguments: Any) -> Any:
        found = take(*arguments)
        if found:
            interrupt_once("take")
        return found

    def given_back(*arguments: Any) -> None:
        interrupt_once("give_back")
        give_back(*arguments)

    async def main() -> None:
        mq = await aio.connect(port=server.port) if asynchronous else connect(port=server.port)
        with connect(port=server.port) as writer:
            writer.put_many("t", ["1", "2"])
        got: list[Any] = []
        while len(got) < 2:
            with suppress(Interrupted):
                message = mq.get("t")
                got.append(await message if isinstance(message, Awaitable) else message)
        assert got == ["1", "2"]
        if (closed := mq.close()) is not None:
            await closed

    monkeypatch.setattr(TopicReader, "take", taken)
    monkeypatch.setattr(TopicReader, "give_back", given_back)
    asyncio.run(main())
    assert left == {"take": [], "give_back": []}


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
def test_put_interrupted_at_any_line_stores_at_most_its_messages(
    mq: Client, writer: Client, many: bool, opcodes: bool
) -> None:
    steps, step, interrupted = Steps(interrupt, opcodes=opcodes), 0, 0
    while not step or not steps.ended_before:
        step += 11 if opcodes else 1
        bodies = [f"{step} {number}" for number in range(3 if many else 1)]
        try:
            steps.run(lambda bodies=bodies: mq.put_many("t", bodies) if many else mq.put("t", bodies[0]), step)
            stored = [bodies]
        except Interrupted:
            interrupted += 1
            stored = [bodies[:count] for count in range(len(bodies) + 1)]
        # The next call succeeds.
        mq.put("t", "end")
        got = []
        while (message := writer.get_wait("t", timeout=SOON)) != "end":
            got.append(message)
        assert got in stored
    assert interrupted > 10


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*VERBS, "put", "put_many", "topics"])
def test_signal_handler_may_call_client_at_any_line(mq: Client, writer: Client, verb: str) -> None:
    handled: list[str] = []

    def handle() -> None:
        handled.extend(mq.get_many("t", 2))
        mq.put("u", "from the handler")
        handled.extend(mq.get_many("t", 1))

    calls = {**VERBS, "put": lambda mq: mq.put("u", "x") and [], "put_many": lambda mq: mq.put_many("u", "xy") and []}
    calls["put_many"] = lambda mq: mq.put_many("u", ["x", "y"]) and []
    calls["topics"] = lambda mq: mq.topics() and []
    steps, step = Steps(handle, opcodes=False), 0
    while not step or not steps.ended_before:
        step += 1
        handled.clear()
        sent = [f"{step} {number}" for number in range(6)]
        writer.put_many("t", sent)
        got = steps.run(lambda: calls[verb](mq), step)
        got += mq.get_many("t", 100)
        assert len({*got, *handled}) == len(got) + len(handled)
        if verb != "get_latest":
            assert sorted(got + handled) == sent, step
        assert handled == sorted(handled)
    assert step > 10


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*VERBS, "put", "put_many", "close"])
def test_signal_handler_may_close_client_at_any_line(server: Server, writer: Client, verb: str) -> None:
    calls: dict[str, Callable[[Client], object]] = {**VERBS, "put": lambda mq: mq.put("u", "x")}
    calls |= {"put_many": lambda mq: mq.put_many("u", ["x", "y"]), "close": lambda mq: mq.close()}
    ended, step = False, 0
    while not ended:
        step += 1
        with connect(port=server.port, retry=False) as mq:
            writer.put_many("t", ["1", "2"])
            steps = Steps(mq.close, opcodes=False)
            with suppress(ClientClosed):
                steps.run(lambda mq=mq: calls[verb](mq), step)
            ended = steps.ended_before
    assert step > 10


# A signal may arrive after a socket has been created and before anything refers to it.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("calls", [False, True], ids=["raises", "calls"])
def test_real_signals_lose_nothing(server: Server, writer: Client, calls: bool) -> None:
    """At random times, as the operating system sends them."""
    handled: list[str] = []

    def handler(*_: object) -> None:
        if is_armed and not calls:
            raise Interrupted
        if is_armed:
            handled.extend(mq.get_many("t", 1))
            mq.ping()
        # Send the next one only now, so that the call progresses even on a slow machine.
        if not is_over:
            signal.setitimer(signal.ITIMER_REAL, UNIT / 50)

    is_armed = is_over = False
    before = signal.signal(signal.SIGALRM, handler)
    got: list[str] = []
    interrupted = 0
    sent = [str(number) for number in range(1500)]
    try:
        with connect(port=server.port, retry=False) as mq:
            writer.put_many("t", sent)
            signal.setitimer(signal.ITIMER_REAL, UNIT / 50)
            while len(got) + len(handled) + interrupted < len(sent):
                try:
                    is_armed = True
                    # Only this line is between the return and the list.
                    message = mq.get("t")
                    is_armed = False
                except Interrupted:
                    interrupted += 1
                    is_armed = False
                    signal.setitimer(signal.ITIMER_REAL, UNIT / 50)
                    continue
                if message:
                    got.append(message)
    finally:
        # A handler that runs now must not send another signal.
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # Each signal may lose one message on its way from the client to its caller.
    assert len({*got, *handled}) == len(got) + len(handled)
    if calls:
        assert sorted(got + handled, key=int) == sent
    else:
        assert len(sent) - len(got) <= interrupted


def test_error_of_interrupted_call_is_freed_at_once(mq: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a later garbage collection would close its connection, and a handler may raise again during it."""

    def send(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(Connection, "send", send)
    gc.disable()
    try:
        try:
            mq.ping()
        except Interrupted as error:
            ref = weakref.ref(error)
        assert ref() is None
    finally:
        gc.enable()


def test_signal_handler_may_close_client_during_retry_pause() -> None:
    with serving() as server:
        mq = connect(port=server.port, reconnect_timeout=SOON * 10)
    before = signal.signal(signal.SIGALRM, lambda *_: mq.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, UNIT)
        with pytest.raises(ClientClosed):
            mq.ping()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_interrupt_while_connecting_has_no_other_error_as_context(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with connect(port=server.port) as mq:
        mq._pool.close_idle()
        monkeypatch.setattr(mq._pool, "_connect", interrupted)
        # The caller may be handling one.
        handled = sys.exc_info()[1]
        with pytest.raises(KeyboardInterrupt) as told:
            mq.ping()
        assert told.value.__context__ is handled


WAITING = {
    "for a message": "mq = connect(port={port}); started(); mq.get_wait('nothing', timeout=60)",
    "for a server": "started(); connect(port={unused})",
    "to reconnect": "mq = connect(port={port}); mq._core.endpoint = parse_endpoint('127.0.0.1', {unused}); "
    "mq._pool.close_idle(); started(); mq.ping()",
}


@pytest.mark.parametrize("waiting", WAITING)
def test_ctrl_c_while_waiting_has_plain_traceback(server: Server, waiting: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        code = f"""
import signal, time
from dsmq.client import connect
from dsmq.wire.addresses import parse_endpoint
signal.signal(signal.SIGALRM, signal.default_int_handler)
def started():
    signal.setitimer(signal.ITIMER_REAL, {UNIT})
{WAITING[waiting].format(port=server.port, unused=unused.getsockname()[1])}
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SOON, check=False)
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.endswith("KeyboardInterrupt\n")
