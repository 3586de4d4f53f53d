"""Shared by the tests of limits."""

from __future__ import annotations

import pytest

from conftest import SOON, loop_of, wait_until
from dsmq.broker import usage
from dsmq.broker.connection import Connection
from dsmq.server import Server


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count no client as slow, however busy the machine is."""
    monkeypatch.setattr(usage, "SLOW_SECONDS", 10 * SOON)


def wait_for_connections(server: Server, count: int) -> list[Connection]:
    wait_until(lambda: server.status.connections() == count)
    return list(loop_of(server).connections)
