"""The store alone, with a clock that the test controls."""

from __future__ import annotations

import itertools
import re
import sqlite3
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest
from stores import (
    BIG,
    MAX_AGE,
    Clock,
    ClockedStore,
    a_message,
    a_put,
    clock,
    expire_all,
    put,
    put_as,
    read,
    refuse_inserts,
    stop_growing,
    store_fixture,
)

from dsmq.errors import Aborted, Forgotten, Full, StartupError, StoreFailed
from dsmq.store import database
from dsmq.store import dedup as producers
from dsmq.store import sqlite as store_module
from dsmq.store import topics as topics_module
from dsmq.store.api import Limits, Message, Put, TopicStats
from dsmq.store.schema import LONG_BYTES
from dsmq.store.sqlite import MAX_BUFFERED_BYTES, MAX_BUFFERED_MESSAGES, SQLiteStore
from dsmq.store.topics import FREE_PAGE_BYTES

store = store_fixture(MAX_AGE)
# Fixtures.
__all__ = ["clock", "store"]


def bodies(messages: list[Message]) -> list[bytes]:
    return [message.body for message in messages]


def everything(store: ClockedStore) -> object:
    """Everything that the store reports."""
    names = [topic.name for topic in store.topics(b"", 1000)]
    held = [(store.stats(name), read(store, name)) for name in names]
    return store.last_id(), store.totals(), store.stats(b"new"), held


def watch(store: ClockedStore) -> list[str]:
    """The statements that the store executes from now on."""
    statements: list[str] = []
    store.connection.set_trace_callback(statements.append)
    return statements


# Ids and numbers


def test_ids_increase_across_all_topics_and_numbers_per_topic(store: ClockedStore) -> None:
    assert store.last_id() == 0
    assert store.append([a_put(b"a", b"1"), a_put(b"b", b"2"), a_put(b"a", b"3")]) == [1, 2, 3]
    assert put(store, b"b", b"4") == [4]
    assert read(store, b"a") == [a_message(1, 1, 0, b"1"), a_message(3, 2, 0, b"3")]
    assert read(store, b"b") == [a_message(2, 1, 0, b"2"), a_message(4, 2, 0, b"4")]
    assert store.last_id() == 4


def test_ids_and_numbers_continue_after_everything_expired(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2")
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert store.last_id() == 2
    assert put(store, b"t", b"3") == [3]
    assert read(store, b"t") == [a_message(3, 3, 0, b"3")]
    assert store.totals()[:5] == (1, 1, 1, 3, 2)


def test_each_store_has_its_own_epoch(store: ClockedStore) -> None:
    other = SQLiteStore(MAX_AGE)
    other.close()
    assert store.epoch
    assert store.epoch != other.epoch


def test_empty_batch_stores_nothing(store: ClockedStore) -> None:
    assert store.append([]) == []
    assert store.totals()[:5] == (0, 0, 0, 0, 0)


def test_bodies_may_be_any_bytes(store: ClockedStore) -> None:
    given = [b"", b"\0", bytes(range(256)), b"x" * 100_000]
    put(store, b"t", *given)
    assert bodies(read(store, b"t")) == given


# Reading


def test_reading_removes_nothing(store: ClockedStore) -> None:
    put(store, b"t", b"1", b"2")
    for _ in range(2):
        assert bodies(read(store, b"t")) == [b"1", b"2"]
        assert bodies(store.latest(b"t", 0)) == [b"2"]
    assert store.totals().messages == 2


def test_read_returns_messages_after_id_oldest_first(store: ClockedStore) -> None:
    put(store, b"t", b"1", b"2", b"3")
    assert bodies(read(store, b"t", 0)) == [b"1", b"2", b"3"]
    assert bodies(read(store, b"t", 1)) == [b"2", b"3"]
    assert read(store, b"t", 3) == []
    assert read(store, b"t", 2**63 - 1) == []
    assert read(store, b"other", 0) == []


def test_read_stops_at_the_count(store: ClockedStore) -> None:
    put(store, b"t", b"1", b"2", b"3")
    assert bodies(store.read(b"t", 0, 2, 100)) == [b"1", b"2"]


@pytest.mark.parametrize(("size", "messages"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (100, 3)])
def test_read_stops_at_size_but_returns_at_least_one_message(store: ClockedStore, size: int, messages: int) -> None:
    put(store, b"t", b"aaaa", b"bbbb", b"cccc")
    assert len(store.read(b"t", 0, 100, size)) == messages


def test_latest_is_newest_message_after_id(store: ClockedStore) -> None:
    put(store, b"t", b"1", b"2")
    put(store, b"other", b"3")
    assert store.latest(b"t", 0) == [a_message(2, 2, 0, b"2")]
    assert bodies(store.latest(b"t", 1)) == [b"2"]
    assert store.latest(b"t", 2) == []
    assert store.latest(b"nothing", 0) == []


def test_caught_up_reader_runs_no_statement(store: ClockedStore) -> None:
    put(store, b"t", b"1", b"2")
    put(store, b"other", b"3")
    statements = watch(store)
    for after in (2, 3, 2**63 - 1):
        assert read(store, b"t", after) == []
        assert store.latest(b"t", after) == []
    assert read(store, b"nothing") == []
    assert store.latest(b"nothing", 0) == []
    assert statements == []


def test_reader_with_backlog_runs_one_statement(store: ClockedStore) -> None:
    put(store, b"t", *[b"x"] * store_module.FLUSH_MESSAGES)
    store.flush()
    put(store, b"t", b"and one in the buffer")
    statements = watch(store)
    assert len(read(store, b"t")) == store_module.FLUSH_MESSAGES + 1
    assert len(statements) == 1


def test_put_to_known_topic_runs_no_statement(store: ClockedStore) -> None:
    put(store, b"t", b"1")
    statements = watch(store)
    put(store, b"t", b"2")
    assert bodies(read(store, b"t")) == [b"1", b"2"]
    assert bodies(store.latest(b"t", 0)) == [b"2"]
    assert statements == []


# Three times as many messages or bytes fill the buffer.
@pytest.mark.parametrize(("count", "size"), [(MAX_BUFFERED_MESSAGES // 3 + 1, 3), (20, MAX_BUFFERED_BYTES // 60 + 1)])
def test_write_buffer_is_flushed_by_topic_and_millisecond(
    store: ClockedStore, clock: Clock, count: int, size: int
) -> None:
    first, other, second = ([b"%0*d" % (size, number) for number in range(at, at + count)] for at in (0, 300, 600))
    put(store, b"a", *first)
    put(store, b"b", *other)
    clock.now += 1
    put(store, b"a", *second)
    statements = watch(store)
    put(store, b"a", b"last")
    names = [re.split(" [(V]", statement)[0].strip() for statement in statements]
    rows = names.index("COMMIT") - 3
    assert names[: rows + 3] == ["BEGIN", *["INSERT INTO topics"] * 2, *["INSERT INTO chunks"] * rows]
    assert 3 <= rows < 3 * count // 2
    messages = "SELECT topic, put_at, sum(messages) FROM chunks GROUP BY topic, put_at"
    found = store.connection.execute(messages).fetchall()
    assert found == [(1, clock.now - 1, count), (1, clock.now, count), (2, clock.now - 1, count)]
    assert bodies(read(store, b"a")) == [*first, *second, b"last"]
    assert bodies(read(store, b"a", count)) == [*second, b"last"]
    assert bodies(read(store, b"b", 2 * count - 1)) == bodies(store.latest(b"b", 0)) == [other[-1]]


@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_flush_writes_full_buffers(store: ClockedStore, size: int) -> None:
    for number in range(1, 40):
        put(store, b"t", b"x" * size)
        long = number >= store_module.FLUSH_MESSAGES or number * size >= store_module.FLUSH_BYTES
        statements = watch(store)
        store.flush()
        assert bool(statements) == long
        if long:
            assert len(read(store, b"t")) == number
            return


@pytest.mark.parametrize(("size", "messages"), [(1, 128), (100, 128), (200, 81), (4096, 4), (9000, 1), (20_000, 1)])
def test_rows_are_bounded_in_messages_and_bytes(store: ClockedStore, size: int, messages: int) -> None:
    put(store, b"t", *[b"x" * size] * 300)
    store.write()
    held = store.connection.execute("SELECT messages, length(bodies) FROM chunks").fetchall()
    assert held[0] == (messages, messages * size)
    assert sum(count for count, _ in held) == 300
    assert [message.id for message in store.read(b"t", 0, 1000, 10**8)] == list(range(1, 301))


@pytest.mark.parametrize(
    ("topics", "sizes", "values"), [([b"t"], [7], 1), ([b"t"], [7, 0], 10), ([b"t", b"u"], [7], 20)]
)
def test_ids_that_are_consecutive_and_equal_sizes_take_no_room(
    store: ClockedStore, topics: list[bytes], sizes: list[int], values: int
) -> None:
    bodies = [b"x" * size for size in sizes * 10][:10]
    ids = store.append([(topic, body, None) for body in bodies for topic in topics])
    store.write()
    held = store.connection.execute("SELECT length(ids_and_sizes) FROM chunks").fetchall()
    assert held == [(8 * values,)] * len(topics)
    for at, topic in enumerate(topics):
        found = store.read(topic, 0, 100, 1000)
        assert [(message.id, message.body) for message in found] == list(
            zip(ids[at :: len(topics)], bodies, strict=True)
        )


@pytest.mark.parametrize("size", [LONG_BYTES - 1, LONG_BYTES, 8 << 20])
def test_long_messages_among_short_ones_are_read_whole(store: ClockedStore, size: int) -> None:
    bodies = [b"x", (bytes(range(256)) * (size // 256 + 1))[:size], b"y"]
    put(store, b"t", *bodies)
    store.write()
    assert [message.body for message in store.read(b"t", 0, 1000, 10**8)] == bodies
    assert store.latest(b"t", 0, 3)[0].body == bodies[1]
    assert store.latest(b"t", 0)[0].body == b"y"


def test_long_body_is_never_copied(store: ClockedStore, clock: Clock) -> None:
    """Copying 8 MiB into the database's pages or out of them would hold the event loop for several milliseconds."""
    body, pages = b"x" * (8 << 20), page_bytes(store)
    put(store, b"t", b"short", body, b"y")
    store.flush()
    assert store.read(b"t", 1, 1, 1)[0].body is body
    assert store.latest(b"t", 0, 3)[0].body is body
    with store.snapshot(0, is_last=False, file=None, on_progress=bool) as batches:
        assert [row[-1] is body for insert, rows in batches for row in rows if row[-1] == body] == [True]
    assert page_bytes(store) == pages
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert sys.getrefcount(body) == 2


def test_deleted_data_is_not_overwritten(store: ClockedStore) -> None:
    assert store.connection.execute("PRAGMA secure_delete").fetchone() == (0,)


def test_stats_reads_no_bodies(store: ClockedStore) -> None:
    put(store, b"t", BIG)
    store.flush()
    statements = watch(store)
    assert store.stats(b"t").first_id == 1
    assert [statement for statement in statements if "bodies" in statement] == []


@pytest.fixture
def without_long_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep all bodies in SQLite, so that it has no memory for a long one."""
    monkeypatch.setattr(database, "LONG_BYTES", sys.maxsize)


@pytest.mark.usefixtures("without_long_bodies")
def test_flush_without_memory_raises_and_keeps_messages(store: ClockedStore) -> None:
    put(store, b"t", b"x")
    stop_growing(store)
    put(store, b"t", BIG)
    before = everything(store)
    with pytest.raises(Full):
        store.flush()
    assert everything(store) == before


PLANS = {
    "READ": "SEARCH chunks USING INDEX chunks_by_topic (topic=? AND rowid>?)",
    "LATEST": "SEARCH chunks USING INDEX chunks_by_topic (topic=? AND rowid<?)",
    "ROW_AT": "SEARCH chunks USING COVERING INDEX chunks_by_topic (topic=? AND rowid>?)",
    "OLDEST": "SEARCH chunks USING INDEX chunks_by_topic (topic=? AND rowid>?)",
    "TOPIC_EXPIRY": "SEARCH chunks USING INDEX chunks_by_topic (topic=? AND rowid<?)",
    "EXPIRY": "SEARCH chunks USING INTEGER PRIMARY KEY (rowid<?)",
    "DELETE_FIRST": "SEARCH chunks USING INTEGER PRIMARY KEY (rowid<?)",
    "TOPICS": "SEARCH topics USING COVERING INDEX sqlite_autoindex_topics_1 (name>?)",
}


@pytest.mark.parametrize("statement", PLANS)
def test_statements_use_the_index_and_sort_nothing(store: ClockedStore, statement: str) -> None:
    sql = getattr(database, statement)
    rows = store.connection.execute("EXPLAIN QUERY PLAN " + sql, [0] * sql.count("?"))
    # SQLite before 3.36 also prints TABLE.
    assert [row[3].replace(" TABLE ", " ") for row in rows] == [PLANS[statement]]


# Age


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("expire_runs", [False, True])
def test_message_is_readable_until_max_age(store: ClockedStore, clock: Clock, expire_runs: bool, written: bool) -> None:
    put(store, b"t", b"x")
    if written:
        store.write()
    clock.now += MAX_AGE
    if expire_runs:
        assert store.expire() == 0
    assert read(store, b"t") == store.latest(b"t", 0) == [a_message(1, 1, MAX_AGE, b"x")]
    clock.now += 1
    if expire_runs:
        assert store.expire() == 1
    assert read(store, b"t") == store.latest(b"t", 0) == []


@pytest.mark.parametrize("written", [False, True])
def test_expiry_keeps_message_at_max_age(store: ClockedStore, clock: Clock, written: bool) -> None:
    put(store, b"t", b"too old")
    clock.now += 1
    put(store, b"t", b"not yet")
    if written:
        store.write()
    clock.now += MAX_AGE
    assert [store.expire(), store.expire()] == [1, 0]
    assert read(store, b"t") == [Message(2, 2, MAX_AGE, b"not yet", 0)]


def test_expired_messages_count_as_stored_until_deleted(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"old")
    clock.now += MAX_AGE + 1
    put(store, b"t", b"newer")
    assert store.totals()[:5] == (2, 8, 1, 2, 0)
    assert store.stats(b"t") == TopicStats(b"t", 2, 8, 2, 2, 1, MAX_AGE + 1)
    assert store.expire() == 1
    assert store.totals()[:5] == (1, 5, 1, 2, 1)
    assert store.stats(b"t") == TopicStats(b"t", 1, 5, 2, 2, 2, 0)


def test_expire_deletes_in_slices(store: ClockedStore, clock: Clock) -> None:
    rows = database.EXPIRY_ROWS
    for number in range(5 * rows // 2):
        put(store, b"t", b"%d" % number, b"of the same millisecond")
        clock.now += 1
    store.flush()
    clock.now += MAX_AGE
    put(store, b"t", b"new")
    assert [store.expire() for _ in range(4)] == [2 * rows, 2 * rows, rows, 0]
    assert bodies(read(store, b"t")) == [b"new"]


def test_ages_do_not_depend_on_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monotonic = 5_000_999_999
    fake = SimpleNamespace(monotonic_ns=lambda: monotonic, clock_gettime_ns=lambda _: monotonic, monotonic=float)
    monkeypatch.setattr(store_module, "time", fake)
    assert store_module.monotonic_ms() == 5000
    store = SQLiteStore(MAX_AGE)
    put(store, b"t", b"x")
    monotonic += 100_000_000
    assert read(store, b"t") == [a_message(1, 1, 100, b"x")]
    monotonic += 1_000_000
    assert read(store, b"t") == []
    store.close()


def test_outdated_sqlite_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SCHEMA", "CREATE TABLE t (x) FROM THE FUTURE")
    with pytest.raises(StartupError, match=rf"^SQLite {sqlite3.sqlite_version} is too old.*FROM.*$"):
        SQLiteStore(MAX_AGE)


# Idempotent puts


def test_documented_dedup_bounds_hold() -> None:
    assert (producers.MAX_PRODUCERS, producers.MAX_PUTS_OF_PRODUCER) == (10_000, 1_000)
    assert topics_module.MAX_EMPTY_TOPICS == 100_000


def test_put_with_same_key_is_stored_once(store: ClockedStore) -> None:
    first = a_put(b"t", b"first", (b"me", 0))
    assert store.append([first]) == [1]
    assert store.append([first]) == [1]
    assert store.append([a_put(b"other", b"whatever else it says", (b"me", 0))]) == [1]
    assert store.append([a_put(b"t", b"second", (b"me", 1)), a_put(b"t", b"third", (b"you", 0))]) == [2, 3]
    assert bodies(read(store, b"t")) == [b"first", b"second", b"third"]
    assert store.stats(b"other").last_number == 0


def test_put_with_same_key_in_batch_is_stored_once(store: ClockedStore) -> None:
    once, twice, other = a_put(b"t", b"x", (b"me", 7)), a_put(b"new", b"y", (b"me", 7)), a_put(b"t", b"z", (b"me", 8))
    assert store.append([once, twice, a_put(b"t", b"no key"), other, once]) == [1, 1, 2, 3, 1]
    assert [message[:2] for message in read(store, b"t")] == [(1, 1), (2, 2), (3, 3)]
    assert store.totals().topics == 1


def test_key_is_remembered_after_message_expired(store: ClockedStore, clock: Clock) -> None:
    assert store.append([a_put(b"t", b"x", (b"me", 1))]) == [1]
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert store.append([a_put(b"t", b"x", (b"me", 1))]) == [1]
    assert read(store, b"t") == []


def test_last_puts_of_producer_are_remembered(store: ClockedStore) -> None:
    for seq in range(3 * producers.MAX_PUTS_OF_PRODUCER):
        assert put_as(store, b"me", seq) == [seq + 1]
        first = max(0, seq - producers.MAX_PUTS_OF_PRODUCER + 1)
        assert put_as(store, b"me", first, seq) == [first + 1, seq + 1]
    # Whether this one was stored is no longer known.
    with pytest.raises(Forgotten, match="number 1"):
        put_as(store, b"me", 1)
    assert store.last_id() == 3 * producers.MAX_PUTS_OF_PRODUCER


def put_as_many(store: SQLiteStore, clock: Clock, count: int) -> None:
    """Put once as each of many producers, each in its own millisecond."""
    for number in range(count):
        clock.now += 1
        put_as(store, b"producer %d" % number, 0)


def test_most_recent_producers_are_remembered(store: ClockedStore, clock: Clock) -> None:
    put_as(store, b"retrying", 0)
    put_as(store, b"active", 0)
    put_as_many(store, clock, producers.MAX_PRODUCERS - 2)
    # A retry refreshes a producer, as another put does.
    clock.now += 1
    assert put_as(store, b"retrying", 0) == [1]
    assert put_as(store, b"active", 1) == [producers.MAX_PRODUCERS + 1]
    clock.now += 1
    for name in (b"x", b"y", b"z"):
        put_as(store, name, 0)
    last_id = store.last_id()
    assert put_as(store, b"retrying", 0) == [1]
    assert put_as(store, b"active", 0) == [2]
    assert put_as(store, b"producer 3", 0) == [6]
    assert put_as(store, b"producer 2", 0) == [last_id + 1]


def test_idle_producers_are_forgotten(store: ClockedStore, clock: Clock) -> None:
    put_as(store, b"a", 0)
    clock.now += producers.REMEMBER_MS
    put_as(store, b"b", 0)
    assert put_as(store, b"b", 0) == [2]
    clock.now += 1
    put_as(store, b"b", 1)
    # Clients don't retry a put that late.
    store.check_producer(b"a")
    assert put_as(store, b"a", 0) == [4]


def test_producer_forgotten_too_early_is_detected(store: ClockedStore, clock: Clock) -> None:
    put_as(store, b"a", 0)
    store.check_producer(b"b")
    put_as_many(store, clock, producers.MAX_PRODUCERS)
    store.check_producer(b"producer 9")
    clock.now += producers.REMEMBER_MS - 1
    with pytest.raises(Forgotten, match="too many other producers"):
        store.check_producer(b"a")
    clock.now += 1
    store.check_producer(b"a")


# Topics


def test_topics_are_listed_in_byte_order_by_page(store: ClockedStore, clock: Clock) -> None:
    put(store, b"gone", b"x")
    clock.now += MAX_AGE + 1
    for name in (b"b", b"\xc3\xa9", b"a", b"aa", b"B"):
        put(store, name, b"xy")
    put(store, b"a", b"z")
    store.expire()
    in_order = [b"B", b"a", b"aa", b"b", b"\xc3\xa9"]
    assert [topic.name for topic in store.topics(b"", 100)] == in_order
    assert [topic.name for topic in store.topics(b"a", 2)] == in_order[2:4]
    assert [topic.name for topic in store.topics(b"ab", 100)] == in_order[3:]
    assert store.topics(b"\xc3\xa9", 100) == []
    assert [topic[:3] for topic in store.topics(b"B", 1)] == [(b"a", 2, 3)]


def test_stats_of_unknown_topic_are_zero(store: ClockedStore) -> None:
    put(store, b"t", b"x")
    assert store.stats(b"nothing") == TopicStats(b"nothing", 0, 0, 0, 0, 0, 0)
    assert store.totals().topics == 1


def test_stats_of_empty_topic_keep_last_id_and_number(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"x", b"y")
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert store.stats(b"t") == TopicStats(b"t", 0, 0, 2, 2, 0, 0)
    assert store.totals()[:5] == (0, 0, 0, 2, 2)


@pytest.fixture
def two_empty_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stores remember only two topics without messages."""
    monkeypatch.setattr(topics_module, "MAX_EMPTY_TOPICS", 2)


@pytest.mark.usefixtures("two_empty_topics")
def test_least_recent_empty_topic_is_forgotten(store: ClockedStore, clock: Clock) -> None:
    for topic in (b"a", b"b", b"c", b"a", b"held"):
        clock.now += 1
        put(store, topic, b"x")
    clock.now += MAX_AGE
    expire_all(store)
    assert [store.stats(topic).last_number for topic in (b"a", b"b", b"c", b"held")] == [2, 0, 1, 1]
    assert put(store, b"b", b"x") == [6]
    assert read(store, b"b") == [a_message(6, 1, 0, b"x")]
    assert [topic.name for topic in store.topics(b"", 10)] == [b"b", b"held"]


@pytest.mark.usefixtures("two_empty_topics")
def test_watched_topic_that_was_forgotten_counts_as_changed(store: ClockedStore, clock: Clock) -> None:
    def fill_and_expire(*topics: bytes) -> None:
        for topic in topics:
            put(store, topic, b"x")
        clock.now += MAX_AGE + 1
        expire_all(store)

    fill_and_expire(b"a")
    watched = {b"a": store.last_id()}
    new = [(b"a", b"y", None)]
    fill_and_expire(b"b")
    [stored] = store.append_together(new, watched)
    watched = {b"a": stored}
    fill_and_expire(b"a", b"b", b"c")
    with pytest.raises(Aborted):
        store.append_together(new, watched)
    assert store.append_together(new, {b"a": store.last_id()}) == [store.last_id()]


@pytest.mark.usefixtures("two_empty_topics")
def test_topics_with_messages_are_never_forgotten(store: ClockedStore, clock: Clock) -> None:
    for topic in (b"gone", b"held", b"empty", b"another"):
        put(store, topic, b"x")
    clock.now += MAX_AGE + 1
    put(store, b"held", b"y")
    expire_all(store)
    assert [store.stats(topic).last_number for topic in (b"gone", b"held", b"empty", b"another")] == [0, 2, 1, 1]
    assert read(store, b"held") == [a_message(5, 2, 0, b"y")]


# Failure

PUTS = {
    "one to a known topic": [a_put(b"t", b"y")],
    "one to a new topic": [a_put(b"new", b"y")],
    "several": [a_put(b"t", b"y"), a_put(b"new", b"y"), a_put(b"t", b"z")],
    "with a key": [a_put(b"t", b"y", (b"me", 1))],
}


@pytest.mark.parametrize("puts", PUTS.values(), ids=PUTS)
@pytest.mark.usefixtures("without_long_bodies")
def test_put_without_memory_stores_nothing(store: ClockedStore, clock: Clock, puts: list[Put]) -> None:
    put(store, b"t", b"x")
    stop_growing(store)
    # The write buffer takes this and must then be flushed before the next put.
    put(store, b"t", BIG)
    before = everything(store)
    for _ in range(2):
        with pytest.raises(Full):
            store.append(puts)
        assert everything(store) == before
    store.connection.execute("PRAGMA max_page_count = 1000000")
    clock.now += store_module.RETRY_MS
    assert store.append(puts) == list(range(3, len(puts) + 3))
    assert [message.number for message in read(store, b"new")] in ([], [1])
    assert bodies(read(store, b"t", 2)) in ([], [b"y"], [b"y", b"z"])
    assert bodies(store.read(b"t", 0, 2, 2_000_000)) == [b"x", BIG]


@pytest.mark.usefixtures("without_long_bodies")
def test_put_fails_fast_while_out_of_memory(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", BIG)
    stop_growing(store)
    with pytest.raises(Full):
        put(store, b"t", b"x")
    statements = watch(store)
    for use in (lambda: put(store, b"t", b"x"), lambda: put(store, b"new", b"x"), store.flush):
        with pytest.raises(Full):
            use()
    assert statements == []
    clock.now += store_module.RETRY_MS
    with pytest.raises(Full, match="memory"):
        put(store, b"t", b"x")
    assert statements
    assert [store.full(), store.full()] == [{"memory"}, set()]


@pytest.mark.usefixtures("without_long_bodies")
def test_retried_put_is_recognised_while_out_of_memory(store: ClockedStore) -> None:
    keyed = a_put(b"t", BIG, (b"me", 1))
    assert store.append([keyed]) == [1]
    stop_growing(store)
    with pytest.raises(Full):
        store.append([keyed, a_put(b"t", b"x")])
    assert store.append([keyed, keyed]) == [1, 1]


@pytest.mark.usefixtures("without_long_bodies")
def test_unwritten_messages_expire_while_out_of_memory(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", BIG)
    stop_growing(store)
    with pytest.raises(Full):
        put(store, b"t", b"x")
    clock.now += MAX_AGE + 1
    assert store.expire() == 1
    assert store.totals()[:5] == (0, 0, 0, 1, 1)
    assert put(store, b"t", b"x") == [2]
    assert read(store, b"t") == [a_message(2, 2, 0, b"x")]


def test_out_of_memory_raises_full(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", BIG)
    before = everything(store)
    # Then SQLite is out of memory for each new statement.
    limit = store.connection.setlimit(sqlite3.SQLITE_LIMIT_VDBE_OP, 1)
    with pytest.raises(Full):
        put(store, b"new", b"y")
    store.connection.setlimit(sqlite3.SQLITE_LIMIT_VDBE_OP, limit)
    assert everything(store) == before
    clock.now += store_module.RETRY_MS
    assert put(store, b"new", b"y") == [2]


@pytest.mark.usefixtures("without_long_bodies")
def test_expiry_frees_memory(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", BIG)
    put(store, b"t", BIG)
    stop_growing(store)
    with pytest.raises(Full):
        put(store, b"t", BIG)
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert put(store, b"t", BIG) == [3]
    assert read(store, b"t") == [a_message(3, 3, 0, BIG)]


def test_failed_put_stores_nothing(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", BIG)
    before = everything(store)
    puts = [a_put(b"t", b"1", (b"me", 1)), a_put(b"new", b"2", (b"me", 2))]
    refuse_inserts(store)
    with pytest.raises(StoreFailed):
        store.append(puts)
    assert everything(store) == before
    store.connection.set_authorizer(None)
    clock.now += store_module.RETRY_MS
    assert store.append(puts) == [2, 3]


def test_duplicate_put_creates_no_topic(store: ClockedStore) -> None:
    store.append([a_put(b"t", b"1", (b"me", 1))])
    puts = [a_put(b"new", b"1", (b"me", 1)), a_put(b"t", b"2", (b"me", 2)), a_put(b"newer", b"2", (b"me", 2))]
    assert store.append(puts) == [1, 2, 2]
    assert [topic.name for topic in store.topics(b"", 10)] == [b"t"]


def test_put_is_remembered_while_its_batch_evicts_others(store: ClockedStore) -> None:
    most = 2 * producers.MAX_PUTS_OF_PRODUCER
    put_as(store, b"me", *range(most))
    # The first put of this batch evicts put 0, but not before the second one is recognised as its retry.
    assert put_as(store, b"me", most, 0) == [most + 1, 1]
    with pytest.raises(Forgotten):
        put_as(store, b"me", 0)


def test_interrupt_in_transaction_stores_nothing_and_propagates(
    store: ClockedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting:
        """A connection that is interrupted in a transaction."""

        def rollback(self) -> None:
            connection.rollback()

        def executemany(self, sql: str, rows: Iterable[tuple[object, ...]]) -> None:
            connection.executemany(sql, rows)
            assert connection.in_transaction
            raise KeyboardInterrupt

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            connection.__exit__(*error)

    put(store, b"t", BIG)
    before = everything(store)
    connection = store.connection
    with monkeypatch.context() as patch:
        patch.setattr(store._database, "connection", Interrupting())
        with pytest.raises(KeyboardInterrupt):
            put(store, b"new", b"y", b"z")
    assert everything(store) == before
    assert put(store, b"new", b"y") == [2]


def test_close_is_idempotent(store: ClockedStore) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreFailed):
        put(store, b"t", b"x")


def test_use_after_close_raises(store: ClockedStore) -> None:
    put(store, b"t", b"x")
    store.close()
    for use in (
        lambda: put(store, b"t", b"y"),
        lambda: put(store, b"new", b"y"),
        lambda: read(store, b"t"),
        lambda: store.latest(b"t", 0),
        store.expire,
        lambda: store.topics(b"", 1),
        lambda: store.stats(b"t"),
    ):
        with pytest.raises(StoreFailed):
            use()


# Threads


def test_concurrent_puts_are_neither_lost_nor_duplicated_nor_reordered(store: ClockedStore) -> None:
    topics, writers, batches = (b"a", b"b"), 4, 60
    start = threading.Barrier(2 * writers)
    written = threading.Event()

    def write(writer: int) -> list[int]:
        start.wait()
        ids: list[int] = []
        for batch in range(batches):
            names = [b"%d %d %d" % (writer, batch, number) for number in range(batch % 4 + 1)]
            ids += store.append([a_put(topics[batch % 2], name, (name, 0)) for name in names])
        return ids

    def read_all(topic: bytes, count: int) -> list[Message]:
        start.wait()
        seen: list[Message] = []
        found = []
        end = False
        while found or not end:
            # In this order, so that the last read comes after the last put.
            end = written.is_set()
            found = store.read(topic, seen[-1].id if seen else 0, count, 1_000_000)
            seen += found
        return seen

    with ThreadPoolExecutor(2 * writers) as threads:
        reading = {(topic, count): threads.submit(read_all, topic, count) for topic in topics for count in (1, 1000)}
        writing = [threads.submit(write, writer) for writer in range(writers)]
        try:
            given = [future.result() for future in writing]
        finally:
            written.set()
        seen = {key: future.result() for key, future in reading.items()}
    ids = sorted(message_id for ids in given for message_id in ids)
    assert ids == list(range(1, len(ids) + 1))
    assert all(ids == sorted(ids) for ids in given)
    for topic in topics:
        messages = seen[topic, 1000]
        assert seen[topic, 1] == messages
        assert [message.number for message in messages] == list(range(1, len(messages) + 1))
        assert [message.id for message in messages] == sorted(message.id for message in messages)
        for writer, own_ids in enumerate(given):
            own = [message for message in messages if message.body.startswith(b"%d " % writer)]
            assert own == sorted(own, key=lambda message: tuple(map(int, message.body.split())))
            assert {message.id for message in own} <= set(own_ids)
    assert sorted(message.id for topic in topics for message in seen[topic, 1]) == ids


# Statistics


def test_peek_goes_back_without_marking_as_read(store: ClockedStore, clock: Clock) -> None:
    for body in (b"a", b"b", BIG):
        put(store, b"t", body)
        put(store, b"other", body)
    for write in (lambda: None, store.write):
        write()
        found, below = [], sys.maxsize
        while message := store.peek(b"t", below):
            found.append(message)
            below = message.id
        assert [(message.id, message.number, message.body) for message in found] == [
            (5, 3, BIG),
            (3, 2, b"b"),
            (1, 1, b"a"),
        ]
    assert store.peek(b"new") is None
    clock.now += MAX_AGE + 1
    assert store.peek(b"t") is None
    expire_all(store)
    assert store.totals().expired_unread == 6


def test_expired_unread_messages_are_counted(store: ClockedStore, clock: Clock) -> None:
    put(store, b"read", b"a", b"b", b"c", b"d")
    put(store, b"unread", b"x", b"y")
    put(store, b"skipped", b"x", b"y")
    store.read(b"read", 0, 2, 1000)
    store.latest(b"skipped", 0)
    clock.now += MAX_AGE + 1
    # After the new message is read, the expired ones still count as unread.
    put(store, b"unread", b"z")
    read(store, b"unread")
    expire_all(store)
    assert store.totals().expired_unread == 2 + 2
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert store.totals().expired_unread == 4


def test_unread_ranges_are_tracked(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2", b"3")
    store.read(b"t", 0, 1, 1000)
    clock.now += MAX_AGE + 1
    put(store, b"t", b"4", b"5")
    # The reader continues before 2 and 3 are deleted.
    assert bodies(read(store, b"t", 1)) == [b"4", b"5"]
    expire_all(store)
    assert store.totals().expired_unread == 2
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert store.totals()[4:6] == (5, 2)


def test_messages_skipped_by_a_reader_that_starts_later_count_as_read(store: ClockedStore, clock: Clock) -> None:
    put(store, b"t", b"1", b"2", b"3", b"4")
    assert bodies(store.read(b"t", 2, 1, 1000)) == [b"3"]
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert store.totals().expired_unread == 1


def test_message_expired_unread_is_counted_once(store: ClockedStore, clock: Clock) -> None:
    for _ in range(2):
        put(store, b"t", *[b"x"] * 10)
        clock.now += MAX_AGE + 1
        expire_all(store)
    put(store, b"t", b"x")
    read(store, b"t")
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert store.totals()[4:6] == (21, 20)


@pytest.mark.parametrize("written", [True, False])
def test_age_of_oldest_message_is_reported(store: ClockedStore, clock: Clock, written: bool) -> None:
    assert store.totals().oldest_age_ms == 0
    put(store, b"a", b"x")
    if written:
        store.write()
    clock.now += 30
    put(store, b"b", b"x")
    clock.now += 5
    assert store.totals().oldest_age_ms == 35
    clock.now += MAX_AGE - 34
    expire_all(store)
    assert store.totals().oldest_age_ms == MAX_AGE - 29


def test_database_time_is_measured(store: ClockedStore, clock: Clock) -> None:
    put(store, b"a", b"x")
    before = store.timings()
    read(store, b"a")
    assert store.timings() == before
    store.write()
    read(store, b"a")
    clock.now += MAX_AGE + 1
    expire_all(store)
    times = {name: store.timings()[name].times - before[name].times for name in before}
    assert times == {"write": 1, "read": 1, "expire": 1}
    assert all(timing.seconds > 0 for timing in store.timings().values())


def fill(store: ClockedStore, clock: Clock, size: int, topics: int) -> None:
    """Put messages in separate rows, one a millisecond, until the store is full."""
    for number in itertools.count():
        clock.now += 1
        put(store, b"%0200d" % (number % topics), b"x" * size)
        store.flush()


def page_bytes(store: ClockedStore) -> int:
    """The total size of the database's pages in use."""
    figures = ("page_count", "freelist_count", "page_size")
    pages, free, size = [store.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in figures]
    return int((pages - free) * size)


@pytest.mark.parametrize("topics", [1, 1000])
@pytest.mark.parametrize(
    "size", [0, 100, 500, 1000, 1300, 1400, 1700, 2000, 2100, 2500, 3000, 3500, 4100, 5000, 6200, 8300, 10_000, 20_000]
)
def test_database_stays_below_limit_on_bytes(clock: Clock, size: int, topics: int) -> None:
    limit = 5_000_000
    with closing(ClockedStore(10**9, clock, Limits(max_stored_bytes=limit))) as store:
        with pytest.raises(Full):
            fill(store, clock, size, topics)
        assert page_bytes(store) < 1.2 * limit + FREE_PAGE_BYTES + MAX_BUFFERED_BYTES


def test_expired_pages_are_released_in_slices_except_a_few(store: ClockedStore, clock: Clock) -> None:
    """Otherwise, long bodies would take additional memory."""

    def pages() -> int:
        return int(store.connection.execute("PRAGMA page_count").fetchone()[0])

    for _ in range(4000):
        clock.now += 1
        put(store, b"t", b"x" * 3000)
        store.flush()
    for _ in range(2):
        clock.now += MAX_AGE // 2
        before = pages()
        while store.expire():
            assert before - pages() in range(database.VACUUM_PAGES + 1)
            before = pages()
        used = page_bytes(store) // database.PAGE_BYTES
        assert pages() <= used + database.FREE_PAGES + used // (database.FREE_PAGES_PART - 1)
    assert pages() < 2 * database.FREE_PAGES


def test_long_bodies_count_once_towards_limit_on_bytes(clock: Clock) -> None:
    with closing(ClockedStore(MAX_AGE, clock, Limits(max_stored_bytes=10 * (len(BIG) + 100) + 501))) as store:
        for _ in range(2):
            for _ in range(10):
                put(store, b"t", BIG)
                store.flush()
            with pytest.raises(Full):
                put(store, b"t", BIG)
            clock.now += MAX_AGE + 1
            expire_all(store)
            assert store.totals().accounted_bytes == 0


def test_messages_that_leave_pages_half_empty_count_as_stored_until_expired(store: ClockedStore, clock: Clock) -> None:
    for _ in range(2000):
        clock.now += 1
        put(store, b"t", b"x" * 2100)
        store.flush()
    assert store.totals().accounted_bytes > 1.3 * 2000 * 2200
    clock.now += MAX_AGE + 1
    expire_all(store)
    assert store.totals().accounted_bytes == 0


def test_largest_topics_are_listed_with_last_numbers(store: ClockedStore) -> None:
    for topic, count in ((b"a", 2), (b"b", 5), (b"c", 1)):
        put(store, topic, *[b"x"] * count)
    assert store.largest_topics(2) == [b"b", b"a"]
    assert store.last_numbers() == {b"a": 2, b"b": 5, b"c": 1}
    assert [store.last_number(topic) for topic in (b"b", b"none")] == [5, 0]
