"""Reloads: settings that the log reports as changed apply immediately, also to existing connections."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import SOON, UNIT, Wire, as_map, blocked, loop_of, wait_until, wire_to
from dsmq import settings as config
from dsmq.client import connect
from dsmq.errors import ReplyError
from dsmq.ops.metrics import Collector
from dsmq.options import RESTART_REQUIRED
from dsmq.server import Server
from dsmq.setting_types import TopicSettings
from dsmq.settings import Settings
from dsmq.wire.resp import encode_request

TOKEN = "0123456789abcdef"
MESSAGE = encode_request(b"PUT", b"t", b"x" * 2000)


class Reloading:
    """A server and its configuration."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.server = Server(self._load(), load=self._load)

    def _load(self) -> Settings:
        return config.load(kind=config.EmbeddedSettings, **{"port": 0, **self.settings})

    def change(self, **settings: Any) -> None:
        self.settings.update(settings)
        self.server.reload()


@contextmanager
def reloading(**settings: Any) -> Iterator[tuple[Reloading, Wire]]:
    """A server and a connection made before the reload."""
    one = Reloading(**settings)
    with one.server, wire_to(one.server) as wire:
        if "auth_token" not in settings:
            assert wire.call("PING") == "PONG"
        else:
            wait_until(lambda: one.server.status.connections() == 1)
        yield one, wire


def max_message_bytes(server: Server, wire: Wire, value: int) -> bool:
    wire.send(MESSAGE)
    return isinstance(wire.receive(), int)


def max_topic_bytes(server: Server, wire: Wire, value: int) -> bool:
    return wire.call("PUT", "t" * 100, "x") == 1


def max_unauthenticated_bytes(server: Server, wire: Wire, value: int) -> bool:
    wire.send(encode_request(b"AUTH", b"default", b"x" * 5000)[:5000])
    wire.send(encode_request(b"AUTH", b"default", b"x" * 5000)[5000:])
    return wire.receive().code == "WRONGPASS"  # type: ignore[union-attr]


def max_stored_messages(server: Server, wire: Wire, value: int) -> bool:
    return wire.call("PUT", "t", "x") == 1 and wire.call("PUT", "t", "x") == 2


def max_topics(server: Server, wire: Wire, value: int) -> bool:
    return wire.call("PUT", "t", "x") == 1 and wire.call("PUT", "u", "x") == 2


def max_stored_bytes(server: Server, wire: Wire, value: int) -> bool:
    return wire.call("PUT", "t", "x" * 2000) == 1


def max_waiting_readers(server: Server, wire: Wire, value: int) -> bool:
    with wire_to(server) as other:
        wire.send(encode_request(b"GETWAIT", b"t", b"60000"))
        wait_until(lambda: server.status.waiting() == 1)
        return other.call("GETWAIT", "t", 1) is None


def max_waiting_patterns(server: Server, wire: Wire, value: int) -> bool:
    with wire_to(server) as other:
        wire.send(encode_request(*b"MREAD 0 WAIT 60000 TOPICS t*".split()))
        wait_until(lambda: server.status.waiting() == 1)
        return other.call("MREAD", 0, "WAIT", 1, "TOPICS", "t*") == [0]


def max_groups(server: Server, wire: Wire, value: int) -> bool:
    return wire.call("TAKE", "t", "a", 1000) == [] and wire.call("TAKE", "t", "b", 1000) == []


def max_jobs_in_flight(server: Server, wire: Wire, value: int) -> bool:
    for _ in range(2):
        wire.call("PUT", "t", "x")
    return len(wire.call("TAKE", "t", "a", 1000, "COUNT", 2)) == 2 * JOB_VALUES


def max_group_bytes(server: Server, wire: Wire, value: int) -> bool:
    for _ in range(2):
        wire.call("PUT", "t", "x")
    wire.call("TAKE", "t", "a", 1000)
    return not isinstance(wire.call("TAKE", "t", "a", 1000), ReplyError)


def max_attempts(server: Server, wire: Wire, value: int) -> bool:
    wire.call("PUT", "t", "x")
    wire.call("TAKE", "t", "a", 60_000)
    assert wire.call("RETURN", "t", "a", 1, 1) == "OK"
    return wire.call("TAKE", "t", "a", 60_000) != []


def max_connections_per_address(server: Server, wire: Wire, value: int) -> bool:
    with wire_to(server) as other:
        other.send(encode_request(b"PING"))
        return other.receive() == "PONG"


def max_unauthenticated_connections(server: Server, wire: Wire, value: int) -> bool:
    with wire_to(server) as other:
        assert other.call("PING") == "PONG"
        try:
            return wire.call("PING") == "PONG"
        except (EOFError, OSError):
            return False


def max_unread_reply_bytes(server: Server, wire: Wire, value: int) -> bool:
    (connection,) = loop_of(server).connections
    return connection.transport.max_unread > 2000


def ends(server: Server, wire: Wire, value: float) -> bool:
    wire.socket.settimeout(12 * UNIT)
    try:
        return not wire.ended()
    except TimeoutError:
        return True


def allow_shutdown(server: Server, wire: Wire, value: bool) -> bool:
    return getattr(wire.call("HELLO", 2, "NOTICES") and wire.call("SHUTDOWN"), "code", "") != "NOPERM"


def metrics_topics(server: Server, wire: Wire, value: int) -> bool:
    wire.call("PUT", "t", "x")
    return any(metric.name == "dsmq_topic_messages" for metric in Collector(server.status).collect())


# The values of a job in the reply to TAKE.
JOB_VALUES = 7

# By setting: a value that allows something, one that does not, and a function that finds out which is in effect.
LIMITS: dict[str, tuple[Any, Any, Callable[[Server, Wire, Any], bool]]] = {
    "max_message_bytes": (8_388_608, 1000, max_message_bytes),
    "max_topic_bytes": (512, 99, max_topic_bytes),
    "max_unauthenticated_bytes": (16_384, 4096, max_unauthenticated_bytes),
    "max_stored_messages": (10, 1, max_stored_messages),
    "max_stored_messages_per_topic": (10, 1, max_stored_messages),
    "max_topics": (10, 1, max_topics),
    "max_stored_bytes": (100_000, 2000, max_stored_bytes),
    "max_stored_bytes_per_topic": (100_000, 2000, max_stored_bytes),
    "max_waiting_readers": (10, 1, max_waiting_readers),
    "max_waiting_patterns": (10, 1, max_waiting_patterns),
    "max_groups": (10, 1, max_groups),
    "max_jobs_in_flight": (10, 1, max_jobs_in_flight),
    "max_group_bytes": (100_000, 100, max_group_bytes),
    "max_attempts": (2, 1, max_attempts),
    "max_connections_per_address": (10, 1, max_connections_per_address),
    "max_unauthenticated_connections": (10, 1, max_unauthenticated_connections),
    "max_unread_reply_bytes": (65_536, 1024, max_unread_reply_bytes),
    "idle_timeout_seconds": (3600, UNIT, ends),
    "auth_timeout_seconds": (600, UNIT, ends),
    "allow_shutdown": (True, False, allow_shutdown),
    "metrics_topics": (10, 0, metrics_topics),
    "topic": ((), (TopicSettings(pattern="t", max_messages=1),), max_stored_messages),
}
NEEDS_TOKEN = ("max_unauthenticated_bytes", "max_unauthenticated_connections", "auth_timeout_seconds")
ELSEWHERE = {
    *("max_age_seconds", "when_full", "request_timeout_seconds", "reply_timeout_seconds", "log_level"),
    *("health_timeout_seconds", "stop_timeout_seconds"),
    # These are read each time they are used; tests/broker/test_memory_limits.py tests them.
    *("max_total_unread_reply_bytes", "max_total_request_bytes"),
    # tests/broker/test_auth.py
    *("protected_mode", "auth_token", "auth_token_file"),
    # tests/ops/test_http.py
    *("http_allowed_hosts", "http_token", "http_token_file"),
    *("tls_cert_file", "tls_key_file", "tls_client_ca_file"),
}


def test_every_reloadable_setting_is_tested() -> None:
    assert set(Settings.model_fields) <= {*RESTART_REQUIRED, *LIMITS, *ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize("widens", [True, False], ids=["wider", "narrower"])
@pytest.mark.parametrize("name", LIMITS)
def test_reloaded_limit_applies_to_existing_connections(name: str, widens: bool) -> None:
    wide, narrow, allows = LIMITS[name]
    before, after = (narrow, wide) if widens else (wide, narrow)
    if widens and allows is ends:
        # Long enough that it does not end before the change.
        before = 10 * UNIT
    token = {"auth_token": TOKEN} if name in NEEDS_TOKEN else {}
    with reloading(**token, **{name: before}) as (one, wire):
        one.change(**{name: after})
        assert getattr(one.server.context.settings, name) == after
        assert allows(one.server, wire, after) is widens


def test_rules_apply_to_connected_clients_at_once() -> None:
    with reloading() as (one, wire), connect(port=one.server.port) as mq:
        mq.put("camera/1", "0")
        assert mq.get("camera/1") == "0"
        mq.put_many("camera/1", ["1", "2", "3"])
        one.change(topic=[{"pattern": "camera/*", "max_messages": 2, "max_age_seconds": 5}])
        assert wire.call("PUT", "camera/1", "4").code == "FULL"  # type: ignore[union-attr]
        assert 0 < wire.call("READ", "camera/1", 0)[4] <= 5_000  # type: ignore[index]
        one.change(when_full="drop_oldest")
        assert wire.call("PUT", "camera/1", "4") == 5
        assert [mq.get("camera/1"), mq.get("camera/1"), mq.missed] == ["3", "4", 2]
        assert as_map(wire.call("STATS", "camera/1"))[b"dropped"] == 3
        one.change(topic=[], when_full="refuse")
        assert wire.call("READ", "camera/1", 4)[4] > 500_000  # type: ignore[index]


def test_raising_max_age_loses_nothing_and_lowering_it_delivers_nothing_too_old() -> None:
    with reloading(max_age_seconds=600) as (one, wire), connect(port=one.server.port) as mq:
        mq.get("t")
        wire.call("PUT", "t", "first")
        time.sleep(2 * UNIT)
        one.change(max_age_seconds=UNIT)
        assert wire.call("READ", "t", 0) == []
        wire.call("PUT", "t", "second")
        one.change(max_age_seconds=1200)
        message_id, number, age, body, left = wire.call("READ", "t", 1)  # type: ignore[misc]
        assert (message_id, number, body, age + left) == (2, 2, b"second", 1_200_000)
        time.sleep(2 * UNIT)
        assert wire.call("READ", "t", 1)[3] == b"second"  # type: ignore[index]


def test_reloaded_request_timeout_applies_to_started_request() -> None:
    with reloading(request_timeout_seconds=600) as (one, wire):
        wire.send(b"*1\r\n")
        wait_until(lambda: one.server.status.counters().bytes_in > 14)
        one.change(request_timeout_seconds=UNIT)
        assert wire.receive().code == "TIMEOUT"  # type: ignore[union-attr]


def test_reloaded_reply_timeout_applies_to_nonreading_client(tmp_path: Path) -> None:
    one = Reloading(host=f"unix:{tmp_path}/socket", reply_timeout_seconds=600)
    with one.server:
        wire = Wire(f"{tmp_path}/socket")
        wire.send(encode_request(b"ECHO", b"x" * 5_000_000))
        wait_until(lambda: one.server.status.counters().bytes_out > 0)
        one.change(reply_timeout_seconds=UNIT)
        wait_until(lambda: one.server.status.connections() == 0)
        wire.close()


def test_reloaded_health_timeout_applies_at_once() -> None:
    with reloading(health_timeout_seconds=600) as (one, _), blocked(one.server):
        one.change(health_timeout_seconds=UNIT)
        wait_until(lambda: "dsmq-io-0" in one.server.status.stuck_threads())


def test_reloaded_stop_timeout_applies_at_once(tmp_path: Path) -> None:
    one = Reloading(host=f"unix:{tmp_path}/socket", stop_timeout_seconds=600)
    with one.server:
        wire = Wire(f"{tmp_path}/socket")
        wire.send(encode_request(b"ECHO", b"x" * 5_000_000))
        wait_until(lambda: one.server.status.counters().bytes_out > 0)
        one.change(stop_timeout_seconds=20 * UNIT)
        began = time.monotonic()
        assert one.server.stop() == []
        assert time.monotonic() - began < SOON
        wire.close()


def test_reloaded_log_level_applies_at_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("dsmq")
    before = logger.level
    try:
        with reloading(log_level="info") as (one, _):
            one.change(log_level="warning")
            assert logger.level == logging.WARNING
            one.change(log_level="debug")
            assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(before)


def test_reload_keeps_open_transaction() -> None:
    with reloading() as (one, wire):
        assert wire.call("MULTI") == "OK"
        assert wire.call("PUT", "t", "x") == "QUEUED"
        one.change(max_age_seconds=60)
        assert wire.call("PUT", "t", "x") == "QUEUED"
        assert wire.call("EXEC") == [1, 2]


def test_reload_without_tokens_admits_unauthenticated_connections() -> None:
    with reloading(auth_token=TOKEN) as (one, _), wire_to(one.server) as stranger:
        assert stranger.error("PUT", "t", "x") == "NOAUTH"
        one.change(auth_token="")
        assert stranger.call("PUT", "t", "x" * 20_000) == 1
        wait_until(lambda: one.server.context.usage.unauthenticated.total == 0)
