"""Both ways of waiting for sockets report the same events."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any

import pytest

from conftest import loop_of, serving, watch_waits, wire_to
from dsmq.broker import event_loop
from dsmq.broker.poller import Poller, SelectorPoller
from dsmq.wire.resp import encode_request
from helpers import reached

pytestmark = pytest.mark.parametrize("kind", sorted({Poller, SelectorPoller}, key=lambda kind: kind.__name__))


def test_poller_reports_only_watched_events(kind: type[SelectorPoller]) -> None:
    poller = kind()
    ours, theirs = socket.socketpair()
    file = ours.fileno()
    poller.watch(file, "target", EVENT_READ)
    assert poller.wait(0) == []
    theirs.send(b"x")
    assert poller.wait(1) == [("target", EVENT_READ)]
    poller.watch(file, "target", EVENT_WRITE)
    assert poller.wait(1) == [("target", EVENT_WRITE)]
    poller.watch(file, "other", EVENT_READ | EVENT_WRITE)
    assert poller.wait(1) == [("other", EVENT_READ | EVENT_WRITE)]
    ours.recv(1)
    assert poller.wait(1) == [("other", EVENT_WRITE)]
    poller.watch(file, "other", 0)
    poller.watch(file, "other", 0)
    assert poller.wait(-1) == []
    ours.close()
    theirs.close()
    poller.close()


@pytest.mark.parametrize("events", [EVENT_READ, EVENT_WRITE])
def test_poller_reports_hangup_as_watched_event(kind: type[SelectorPoller], events: int) -> None:
    poller = kind()
    ours, theirs = socket.socketpair()
    poller.watch(ours.fileno(), "target", events)
    theirs.close()
    assert poller.wait(1) == [("target", events)]
    poller.watch(ours.fileno(), "target", 0)
    assert poller.wait(0) == []
    ours.close()
    poller.close()


def test_server_works_with_either_poller(kind: type[SelectorPoller], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "Poller", kind)
    with serving() as server, wire_to(server) as reader, wire_to(server) as writer:
        reader.send(encode_request(b"GETWAIT", b"t", b"60000"))
        body = "x" * 5_000_000
        assert writer.call("PUT", "t", body) == 1
        assert reader.receive() == body.encode()


def test_request_completed_while_server_is_stopped_is_not_late(
    kind: type[SelectorPoller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process stops after its sockets were polled; until it continues, the request is completed, and times out."""
    stops: list[Callable[[], None]] = []
    stopped_for = 0.0

    def stop_if_ready(ready: list[Any]) -> None:
        if ready and stops:
            stops.pop()()

    def stop() -> None:
        nonlocal stopped_for
        slow.send(request[10:])
        stopped_for += 1000

    monkeypatch.setattr(event_loop, "Poller", kind)
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + stopped_for)
    request = encode_request(b"PUT", b"t", b"in two halves")
    with serving(request_timeout_seconds=60) as server, wire_to(server) as slow, wire_to(server) as other:
        watch_waits(loop_of(server), after=stop_if_ready)
        slow.send(request[:10])
        assert reached(lambda: server.status.counters().bytes_in == 10)
        stops.append(stop)
        assert other.call("PING") == "PONG"
        # Not an error.
        assert isinstance(slow.receive(), int)
