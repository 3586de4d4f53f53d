"""Rules for topics in a NATS stream, which apply on all servers from that point on."""

from __future__ import annotations

import json
import logging
import random
import time
from typing import Any

import pytest

from dsmq.errors import Full, StartupError
from dsmq.store.api import DROP_OLDEST, Limits, Message, TopicRule
from dsmq.store.nats import NATSStore
from dsmq.store.rules import NO_RULES, decode_rules, encode_rules
from helpers import UNIT, reached, wait_until
from store.test_nats import Stores, bodies, in_engine, put, read, stores, value
from store.test_nats_facts import purge

__all__ = ["stores"]

TOPICS = [b"camera/1", b"camera/2", b"sensor", b"other"]


def keep(*rules: TopicRule, **limits: Any) -> Limits:
    return Limits(topic=rules)._replace(**limits)


def newest(count: int, pattern: bytes = b"*") -> Limits:
    return keep(TopicRule(pattern, max_messages=count, when_full=DROP_OLDEST))


def held(store: NATSStore, topic: bytes) -> list[Message]:
    """Return the messages of a topic, once the mirror is up to date."""
    value(store.latest(topic, 0))
    return read(store, topic)


def contents(store: NATSStore) -> dict[bytes, list[tuple[int, int, bytes]]]:
    """Return all messages: ids, numbers and bodies."""
    return {topic: [(one.id, one.number, one.body) for one in held(store, topic)] for topic in TOPICS}


def configuration(stores: Stores) -> Any:
    return in_engine(stores.servers, lambda stream: stream.stream_info(stores.stream)).config


def publish(stores: Stores, subject: str, body: bytes) -> None:
    in_engine(stores.servers, lambda stream: stream.publish(f"{stores.stream}.facts.{subject}", body))


# The same everywhere


@pytest.mark.parametrize("seed", range(6))
def test_servers_have_the_same_messages_even_if_started_later(stores: Stores, seed: int) -> None:
    draw = random.Random(seed)

    def rules() -> Limits:
        camera = TopicRule(
            b"camera/*",
            draw.choice([None, 3, 20]),
            draw.choice([None, 900, 3_000]),
            None,
            draw.choice([None, DROP_OLDEST]),
        )
        return keep(camera, TopicRule(b"sensor", draw.choice([2, 30]), when_full=DROP_OLDEST))._replace(
            max_stored_messages_per_topic=draw.choice([10, 100_000]),
            when_full=draw.choice(["refuse", DROP_OLDEST]),
        )

    servers = [stores(limits=rules()), stores()]
    for _ in range(60):
        one = draw.choice(servers)
        try:
            put(one, draw.choice(TOPICS), *[bytes(draw.choice([1, 100, 250]))] * draw.choice([1, 1, 5, 40]))
        except Full:
            continue
        if draw.random() < 0.1:
            one.limits = rules()
        if draw.random() < 0.05:
            purge(one, draw.choice(TOPICS))
        if draw.random() < 0.05:
            servers.append(stores())
        if draw.random() < 0.2:
            one.in_memory.expire()
    servers.append(stores())
    first, *others = [contents(store) for store in servers]
    assert any(first.values())
    assert others == [first] * len(others)
    assert servers[0].in_memory.totals().dropped > 0


def test_dropped_messages_are_counted_and_missed(stores: Stores) -> None:
    one, other = stores(limits=newest(2)), stores()
    put(one, b"t", *[b"%d" % number for number in range(700)])
    put(other, b"t", b"last")
    for store in one, other, stores():
        assert [(message.number, message.body) for message in held(store, b"t")] == [(700, b"699"), (701, b"last")]
        assert store.in_memory.stats(b"t").dropped == store.in_memory.totals().dropped == 699
        assert store.in_memory.totals().expired == 0


def test_only_the_server_that_gets_a_put_refuses_it(stores: Stores) -> None:
    rules = [
        TopicRule(b"a", max_messages=1),
        TopicRule(b"b", max_bytes=300, when_full=DROP_OLDEST),
        TopicRule(b"c", when_full=DROP_OLDEST),
    ]
    one, other = stores(limits=keep(*rules)), stores(limits=Limits(max_stored_messages=4))
    put(one, b"a", b"x")
    value(other.latest(b"a", 0))
    with pytest.raises(Full, match="max_messages of topics a = 1"):
        put(other, b"a", b"x")
    with pytest.raises(Full, match="exceeds the limit of its topic"):
        put(other, b"b", bytes(201))
    put(one, b"b", b"1", b"2", b"3")
    assert bodies(held(other, b"b")) == [b"2", b"3"]
    # Servers may not have expired the same messages, so no topic drops messages for this put.
    put(one, b"c", b"x")
    value(other.latest(b"c", 0))
    with pytest.raises(Full, match="max_stored_messages = 4"):
        put(other, b"c", b"y")
    put(other, b"b", b"4")
    assert bodies(held(other, b"b")) == [b"3", b"4"]


def test_raised_age_restores_no_expired_message(stores: Stores) -> None:
    one = stores(limits=keep(TopicRule(b"t", max_age_ms=round(UNIT * 1000))))
    [message_id] = put(one, b"t", b"old")
    wait_until(lambda: read(one, b"t", message_id - 1) == [])
    one.limits = keep(TopicRule(b"t", max_age_ms=3_600_000))
    put(one, b"t", b"new")
    for store in one, stores():
        [message] = held(store, b"t")
        assert message.body == b"new"
        assert message.left_ms > 600_000
    # The stream keeps messages for as long as any topic does.
    wait_until(lambda: configuration(stores).max_age > 3_600)


def test_lowered_limits_apply_to_stored_messages(stores: Stores) -> None:
    one, other = stores(), stores()
    stored = [one.append([(b"%d" % number, b"x", None)] * 3) for number in range(500)]
    assert all(map(value, stored))
    one.limits = newest(1)
    for store in one, other:
        value(store.latest(b"0", 0))
        assert (store.in_memory.totals().messages, store.in_memory.totals().dropped) == (500, 1_000)


# Whose rules apply


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged about rules."""
    return [record.getMessage() for record in caplog.records if record.name == "dsmq.store.nats_rules"]


def test_last_rules_apply_and_another_server_warns_once(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsmq.store.nats_rules")
    one = stores(limits=newest(1))
    assert not logged(caplog)
    other = stores(limits=newest(2))
    wait_until(lambda: len(logged(caplog)) == 1)
    assert logged(caplog)[0].startswith("another server's rules for topics apply now: {")
    put(one, b"t", b"1", b"2", b"3")
    for store in one, other:
        assert bodies(held(store, b"t")) == [b"2", b"3"]
    # The file of the first one has not changed.
    one.limits = newest(1)._replace(max_topics=100)
    put(one, b"t", b"4")
    assert bodies(held(one, b"t")) == [b"3", b"4"]
    one.limits = newest(3)
    wait_until(lambda: len(logged(caplog)) == 2)
    assert other.limits == newest(3)
    assert one.limits == newest(3)


def test_server_without_rules_adopts_those_of_the_stream(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsmq.store.nats_rules")
    one = stores(limits=newest(1, b"\xff*"))
    own = Limits(max_topics=9, max_stored_messages=99, max_stored_bytes=999, max_stored_messages_per_topic=5)
    other = stores(limits=own)
    assert other.limits == newest(1, b"\xff*")._replace(max_topics=9, max_stored_messages=99, max_stored_bytes=999)
    assert len(logged(caplog)) == 1
    assert logged(caplog)[0].startswith("the stream's rules for topics apply: {")
    one.close()
    # They stay when a server without them starts, and end when they are removed from the settings of a running one.
    last = stores(limits=newest(1, b"\xff*"))
    last.limits = Limits()
    wait_until(lambda: other.limits == own)
    assert stores().limits == Limits()


def test_new_stream_gets_the_rules_again(stores: Stores) -> None:
    store = stores(limits=newest(2))
    put(store, b"t", b"1")
    before = store.epoch
    in_engine(stores.servers, lambda stream: stream.delete_stream(stores.stream))
    wait_until(lambda: store.epoch != before and store.limits == newest(2))
    put(store, b"t", b"1", b"2", b"3")
    assert bodies(held(store, b"t")) == [b"2", b"3"]
    assert stores().limits == newest(2)


# The stream


def test_full_stream_accepts_rules_that_make_room(stores: Stores) -> None:
    limits = Limits(max_stored_bytes=20_000)
    one, other = stores(limits=limits), stores(limits=limits)

    async def fill(stream: Any) -> None:
        info = await stream.stream_info(stores.stream)
        info.config.max_bytes = info.state.bytes
        await stream.update_stream(info.config)

    in_engine(stores.servers, fill)
    assert isinstance(put(one, b"t", b"x")[0], Full)
    one.limits = newest(3)._replace(max_stored_bytes=20_000)
    for store in one, other:
        assert [isinstance(found, int) for found in put(store, b"t", *[bytes(1_000)] * 40)] == [True] * 40
        assert len(held(store, b"t")) == 3
    # A server whose settings have no rules does not make the stream smaller.
    stores(limits=limits)
    time.sleep(2)
    assert configuration(stores).max_bytes == -1


def test_server_with_a_lower_age_than_the_rules_loses_nothing(stores: Stores) -> None:
    one = stores(limits=keep(TopicRule(b"t", max_age_ms=3_600_000)))
    wait_until(lambda: configuration(stores).max_age > 3_600)
    put(one, b"t", b"x")
    stores(max_age_ms=1_000)
    assert not reached(lambda: configuration(stores).max_age < 3_600, 1.5)


def test_invalid_rules_are_skipped_and_refused_at_start(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    store = stores(limits=newest(1))
    publish(stores, "rules", b'{"max_shouting": 3}')
    put(store, b"t", b"1", b"2")
    assert bodies(held(store, b"t")) == [b"2"]
    assert "can't be applied" in caplog.text
    with pytest.raises(StartupError, match=r"rules for topics in the stream .* can't be read"):
        stores()


@pytest.mark.parametrize(
    "fact", [b"", b"[]", b"3", b'{"topic": 3}', b'{"topic": [[3]]}', b'{"topic": [["a", 1, 2]], "x": 1}']
)
def test_invalid_facts_raise_value_error(fact: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of several kinds
        decode_rules(fact, Limits())


def test_rules_survive_as_json() -> None:
    limits = Limits(1, 2, 3, 4, 5, DROP_OLDEST, (TopicRule(b"\xff*\n", 1, 2, 3, "refuse"), TopicRule(b"b")))
    assert decode_rules(encode_rules(limits), Limits(1, 2, 3)) == limits
    assert json.loads(encode_rules(Limits(max_topics=3))) == {}
    assert decode_rules(NO_RULES, Limits(1, 2, 3, 4, 5, DROP_OLDEST)) == Limits(1, 2, 3, 4, 5)
