"""Ages of messages if a server's wall clock is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import tool
from engine import Engine, engine
from helpers import HOST, Daemon, Wire, wait_until

pytestmark = pytest.mark.slow

# Long enough for a busy machine, and much less than the clocks' error.
MAX_AGE, MARGIN = 30, 10
SETTINGS = {"store_replicas": 1, "max_age_seconds": MAX_AGE, "expiry_interval_seconds": 0.1}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with engine(tmp_path_factory.mktemp("nats"), 1) as running:
        yield running


@pytest.mark.parametrize("shift", ["+1h", "-1h"])
def test_wrong_clock_of_a_server_changes_no_age(node: Engine, shift: str) -> None:
    # Not run through the program, because that would be stopped instead of the server.
    tool("faketime", "faketime")
    [library] = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    env = {"LD_PRELOAD": str(library), "FAKETIME": shift}
    stream = "ahead" if shift[0] == "+" else "behind"
    settings = {**SETTINGS, "store": f"nats://{HOST}:{node.nodes[0].port}", "store_stream": stream}
    with ExitStack() as stack:
        right, wrong = Daemon(**settings), Daemon(env=env, **settings)
        stack.callback(right.close)
        stack.callback(wrong.close)
        assert clock(wrong) != clock(right)
        for server in (right, wrong):
            wire(stack, server).call("PUT", "t", "x")
        late = Daemon(env=env, **settings)
        stack.callback(late.close)
        readers = [wire(stack, server) for server in (right, wrong, late)]
        # Both messages were just put, on a server that followed the stream, and on one that copied it.
        for reader in readers:
            assert [age < MARGIN * 1000 for age in ages(reader)] == [True, True]
        for reader in readers:
            wait_until(lambda reader=reader: not ages(reader), MAX_AGE + MARGIN)  # type: ignore[misc]


def wire(stack: ExitStack, server: Daemon) -> Wire:
    made = Wire((server.host, server.port))
    stack.callback(made.close)
    return made


def ages(reader: Wire) -> list[int]:
    """Return the ages of all messages, in milliseconds."""
    reply = reader.call("READ", "t", 0)
    assert isinstance(reply, list), reply
    return [int(age) for age in reply[2::5]]  # type: ignore[call-overload]


def clock(server: Daemon) -> str:
    """Return the hour at which a server logged its start."""
    return server.log()[:13]
