"""Rules for topics: dropping the oldest messages for newer ones, and maximum ages."""

from __future__ import annotations

import logging
import sys

import pytest
from stores import Clock, ClockedStore, a_put, clock, expire_all, put, read, store_fixture

from dsmq.errors import Full
from dsmq.store.api import DROP_OLDEST, Limits, TopicRule
from dsmq.store.schema import LONG_BYTES

AGE = 1_000


store = store_fixture(AGE)
# Fixtures.
__all__ = ["clock", "store"]


def keep(store: ClockedStore, *rules: TopicRule, **limits: object) -> None:
    store.limits = Limits(topic=rules)._replace(**limits)


def bodies(store: ClockedStore, topic: bytes) -> list[bytes]:
    return [message.body for message in read(store, topic)]


@pytest.mark.parametrize("written", [False, True])
def test_topic_drops_its_own_oldest_messages(store: ClockedStore, written: bool) -> None:
    keep(store, TopicRule(b"camera/*", max_messages=3, when_full=DROP_OLDEST))
    put(store, b"camera/1", b"1", b"2")
    put(store, b"other", b"o")
    if written:
        store.write()
    put(store, b"camera/1", b"3", b"4")
    assert bodies(store, b"camera/1") == [b"2", b"3", b"4"]
    assert bodies(store, b"other") == [b"o"]
    assert [message.number for message in read(store, b"camera/1")] == [2, 3, 4]
    assert store.stats(b"camera/1").dropped == store.totals().dropped == 1
    assert store.totals().expired == 0


def test_dropped_long_body_is_freed_at_once(store: ClockedStore) -> None:
    body = b"x" * LONG_BYTES
    keep(store, TopicRule(b"t", max_messages=1, when_full=DROP_OLDEST))
    put(store, b"t", body)
    store.flush()
    assert sys.getrefcount(body) > 2
    put(store, b"t", b"y")
    assert sys.getrefcount(body) == 2


def test_batch_larger_than_the_topic_leaves_its_newest(store: ClockedStore) -> None:
    keep(store, TopicRule(b"t", max_messages=2, when_full=DROP_OLDEST))
    assert put(store, b"t", b"1", b"2", b"3", b"4", b"5") == [1, 2, 3, 4, 5]
    assert bodies(store, b"t") == [b"4", b"5"]


def test_first_matching_rule_applies(store: ClockedStore) -> None:
    keep(
        store,
        TopicRule(b"a", max_messages=1, when_full="refuse"),
        TopicRule(b"*", max_messages=2, when_full=DROP_OLDEST),
        TopicRule(b"b", max_messages=1),
    )
    put(store, b"a", b"1")
    with pytest.raises(Full, match="max_messages of topics a = 1 reached"):
        put(store, b"a", b"2")
    put(store, b"b", b"1", b"2", b"3")
    assert bodies(store, b"b") == [b"2", b"3"]


def test_message_larger_than_the_topic_is_refused_and_drops_nothing(store: ClockedStore) -> None:
    keep(store, TopicRule(b"t", max_bytes=300, when_full=DROP_OLDEST))
    put(store, b"t", b"1", b"2")
    with pytest.raises(Full, match="exceeds the limit of its topic: max_bytes of topics t = 300"):
        put(store, b"t", bytes(201))
    assert bodies(store, b"t") == [b"1", b"2"]
    put(store, b"t", bytes(200))
    assert bodies(store, b"t") == [bytes(200)]


def test_full_server_makes_topic_drop_only_its_own_messages(store: ClockedStore) -> None:
    keep(store, TopicRule(b"t", when_full=DROP_OLDEST), max_stored_messages=4)
    put(store, b"other", b"1", b"2")
    put(store, b"t", b"1", b"2")
    put(store, b"t", b"3", b"4")
    assert bodies(store, b"t") == [b"3", b"4"]
    with pytest.raises(Full, match="max_stored_messages = 4"):
        put(store, b"other", b"3")
    with pytest.raises(Full, match="max_stored_messages = 4"):
        store.append([a_put(b"t", b"5"), a_put(b"other", b"3"), a_put(b"other", b"4"), a_put(b"other", b"5")])
    assert bodies(store, b"t") == [b"3", b"4"]
    assert len(bodies(store, b"other")) == 2


def test_full_server_without_messages_of_the_topic_refuses(store: ClockedStore) -> None:
    keep(store, TopicRule(b"t", when_full=DROP_OLDEST), max_stored_messages=1)
    put(store, b"other", b"1")
    with pytest.raises(Full):
        put(store, b"t", b"1")


def test_bytes_of_the_full_server_are_freed_by_as_many_drops_as_needed(store: ClockedStore) -> None:
    keep(store, TopicRule(b"t", when_full=DROP_OLDEST), max_stored_bytes=2_000)
    put(store, b"t", *[bytes(100)] * 7)
    put(store, b"t", bytes(500))
    assert [len(body) for body in bodies(store, b"t")] == [100, 100, 100, 100, 500]
    assert store.totals().accounted_bytes <= 2_000


def test_retried_put_of_a_dropped_message_stores_and_drops_nothing(store: ClockedStore) -> None:
    keep(store, TopicRule(b"t", max_messages=1, when_full=DROP_OLDEST))
    key = b"me", 1
    assert store.append([(b"t", b"1", key)]) == [1]
    put(store, b"t", b"2")
    assert store.append([(b"t", b"1", key)]) == [1]
    assert bodies(store, b"t") == [b"2"]


@pytest.mark.parametrize("written", [False, True])
def test_short_lived_topic_does_not_wait_for_long_lived_one(store: ClockedStore, clock: Clock, written: bool) -> None:
    keep(store, TopicRule(b"long", max_age_ms=5 * AGE), TopicRule(b"short", max_age_ms=AGE // 10))
    put(store, b"long", b"l")
    put(store, b"short", b"s")
    put(store, b"other", b"o")
    if written:
        store.write()
    assert [read(store, topic)[0].left_ms for topic in (b"long", b"short", b"other")] == [5 * AGE, AGE // 10, AGE]
    clock.now += AGE // 10 + 1
    assert bodies(store, b"short") == []
    assert store.latest(b"short", 0) == []
    expire_all(store)
    assert [store.stats(topic).messages for topic in (b"long", b"short", b"other")] == [1, 0, 1]
    clock.now += AGE
    assert bodies(store, b"other") == []
    assert bodies(store, b"long") == [b"l"]
    expire_all(store)
    assert store.totals().messages == 1
    assert store.totals().overdue_ms == 0


def test_new_rules_apply_to_stored_messages_at_once(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2", b"3")
    store.write()
    clock.now += AGE // 2
    put(store, b"u", *[b"x"] * 1500)
    keep(store, TopicRule(b"t", max_age_ms=AGE // 4), TopicRule(b"u", max_messages=2, when_full=DROP_OLDEST))
    assert bodies(store, b"t") == []
    expire_all(store)
    assert (store.stats(b"t").messages, store.stats(b"u").messages) == (0, 2)
    keep(store)
    put(store, b"u", b"3")
    clock.now += AGE + 1
    expire_all(store)
    assert store.totals().messages == 0


def test_changed_general_age_applies_beside_rules(store: ClockedStore, clock: Clock) -> None:
    keep(store, TopicRule(b"long", max_age_ms=5 * AGE))
    put(store, b"t", b"1")
    expire_all(store)
    store.max_age_ms = AGE // 10
    clock.now += AGE // 10 + 1
    expire_all(store)
    assert store.stats(b"t").messages == 0


def test_many_topics_expire_in_slices(store: ClockedStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(store, TopicRule(b"*", max_age_ms=AGE // 10))
    store.append([a_put(b"%d" % number, b"x") for number in range(1000)])
    store.write()
    clock.now += AGE
    slices = []
    while count := store.expire():
        slices.append(count)
    assert sum(slices) == 1000
    assert len(slices) > 1


def test_topic_that_begins_to_drop_is_logged_once(store: ClockedStore, caplog: pytest.LogCaptureFixture) -> None:
    keep(store, TopicRule(b"*", max_messages=1, when_full=DROP_OLDEST))
    with caplog.at_level(logging.INFO):
        put(store, b"t", b"1", b"2", b"3")
        put(store, b"t", b"4")
    assert caplog.messages == ["topic 't' is full: dropping its oldest messages for newer ones"]


def test_camera_frames_stay_within_limit(store: ClockedStore, clock: Clock) -> None:
    """0.5 MB, 25 times a second, for two minutes."""
    keep(store, TopicRule(b"camera/*", max_bytes=16_000_000, max_age_ms=5_000, when_full=DROP_OLDEST))
    frame = bytes(500_000)
    for number in range(1, 3_001):
        put(store, b"camera/1", frame)
        store.flush()
        clock.now += 40
        if number % 25 == 0:
            expire_all(store)
            totals = store.totals()
            assert totals.bytes <= 16_000_000
            assert totals.accounted_bytes < 18_000_000
            [newest] = store.latest(b"camera/1", 0)
            assert newest.number == number
    assert store.stats(b"camera/1").dropped == 3_000 - 31
