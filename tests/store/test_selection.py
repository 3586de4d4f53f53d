"""Selections of topics: patterns, and reads of several topics against a model in plain Python."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import MAX_AGE, ClockedStore, expire_all, put

from dsmq.store import database, scan, schema
from dsmq.store import sqlite as store_module
from dsmq.store.api import Found, ManyTopics, TopicMessage
from dsmq.store.database import Header
from dsmq.store.selection import Pattern, PatternIndex, Selection

TOPICS = (b"a", b"ab", b"b/a", b"b/b", b"c", "é".encode())
WORDS = (b"*", b"**", b"a*", b"*a", b"b/*", b"*b*", b"a*b", b"*\xc3\xa9", b"a", b"ab", b"c", b"none")
texts = st.text("ab*", max_size=12)


def is_matched(name: bytes, words: list[bytes]) -> bool:
    return any(fnmatchcase(name.decode(), word.decode()) for word in words)


@given(texts, texts.map(lambda text: text.replace("*", "")))
def test_pattern_matches_as_fnmatch_does(pattern: str, name: str) -> None:
    one = Pattern(f"{pattern}*".encode())
    matches = fnmatchcase(name, f"{pattern}*")
    assert one.matches(name.encode()) == matches
    assert not matches or one in list(PatternIndex([one]).candidates(name.encode()))


@pytest.mark.parametrize("pattern", [b"*a" * 32_768, b"a*" * 32_768, b"*a" * 200 + b"b*", b"*" * 65_536])
def test_many_asterisks_are_matched_in_linear_time(pattern: bytes) -> None:
    one = Pattern(pattern)
    began = time.process_time()
    for _ in range(100):
        one.matches(b"a" * 512)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("count", [1, 4, 5, 1000])
def test_selection_does_not_depend_on_order_or_repetition(count: int) -> None:
    words = [b"p%d*" % at for at in range(count)] + [b"t"]
    for selection in (Selection(words), Selection([*reversed(words), *words])):
        assert selection.matches(b"t")
        assert selection.matches(b"p%dx" % (count - 1))
        assert not selection.matches(b"tt")
        assert not selection.matches(b"q0")


class Checked:
    """A store and everything that was put into it."""

    def __init__(self) -> None:
        self.store = ClockedStore(MAX_AGE)
        self.puts: list[tuple[bytes, int, int, int, bytes]] = []
        self._numbers: dict[bytes, int] = {}

    def put(self, topic: bytes, body: bytes) -> None:
        [message_id] = put(self.store, topic, body)
        self._numbers[topic] = number = self._numbers.get(topic, 0) + 1
        self.puts.append((topic, message_id, number, self.store.clock.now, body))

    def held(self, words: list[bytes], after: int, below: int = sys.maxsize) -> list[TopicMessage]:
        now = self.store.clock.now
        return [
            TopicMessage(topic, message_id, number, now - put_at, body, MAX_AGE - (now - put_at))
            for topic, message_id, number, put_at, body in self.puts
            if after < message_id < below and now - put_at <= MAX_AGE and is_matched(topic, words)
        ]

    def check(self, data: st.DataObject) -> None:
        words = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
        last_id = self.store.last_id()
        after = data.draw(st.integers(0, last_id))
        below = data.draw(st.just(sys.maxsize) | st.integers(1, last_id + 2))
        self.check_read(words, after, below, data.draw(st.integers(1, 6)), latest=data.draw(st.booleans()))
        self.check_back(words, data.draw(st.integers(1, 8)), below)
        self.check_time(data.draw(st.sampled_from([0, 1, 20, 50, MAX_AGE])))

    def check_read(self, words: list[bytes], after: int, below: int, count: int, *, latest: bool) -> None:
        expected = self.held(words, after, below)
        if latest:
            newest = {message.topic: message for message in expected}
            expected = sorted(newest.values(), key=lambda message: message.id)
        wanted, found = ManyTopics(Selection(words), after, count, 1_000_000, latest, below), list[TopicMessage]()
        while True:
            part = self.store.read_many(wanted)
            assert part.position >= wanted.after
            assert len(part.messages) <= count
            found += part.messages
            if part.is_complete and not part.messages:
                break
            wanted = wanted._replace(after=part.position)
        assert found == expected
        assert part.position == max(after, min(self.store.last_id(), below - 1))

    def check_back(self, words: list[bytes], count: int, below: int) -> None:
        left, reached, selection = count, below, Selection(words)
        while left:
            left, reached = self.store.go_back(selection, left, reached)
        assert self.held(words, reached, below) == self.held(words, 0, below)[-count:]

    def check_time(self, milliseconds: int) -> None:
        after = self.store.id_before(milliseconds)
        recent = [message for message in self.held([b"*"], 0) if message.age_ms <= milliseconds]
        assert self.held([b"*"], after) == recent


@settings(deadline=None)
@given(
    data=st.data(),
    steps=st.lists(st.sampled_from(["put"] * 6 + ["wait", "flush", "write", "expire", "check"]), max_size=40),
    seconds=st.sampled_from([0.0, 1.0]),
    bounds=st.tuples(st.sampled_from([0, 1, 16]), st.sampled_from([0, 2, 1000]), st.sampled_from([1, 4, 512])),
)
def test_reads_of_several_topics_agree_with_model(
    data: st.DataObject, steps: list[str], seconds: float, bounds: tuple[int, int, int]
) -> None:
    checked = Checked()
    store = checked.store
    with closing(store), pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "MAX_BUFFERED_MESSAGES", 7)
        patch.setattr(store_module, "FLUSH_MESSAGES", 3)
        patch.setattr(scan, "SCAN_SECONDS", seconds)
        patch.setattr(scan, "MAX_MERGED_TOPICS", bounds[0])
        patch.setattr(scan, "MAX_MATCHES", bounds[1])
        patch.setattr(scan, "MATCH_STEP", 1)
        for module in (schema, database):
            patch.setattr(module, "BLOCK_IDS", bounds[2])
        for step in [*steps, "check"]:
            match step:
                case "put":
                    checked.put(data.draw(st.sampled_from(TOPICS)), data.draw(st.binary(max_size=5)))
                case "wait":
                    store.clock.now += data.draw(st.sampled_from([1, MAX_AGE // 2, MAX_AGE + 1]))
                case "flush":
                    store.flush()
                case "write":
                    store.write()
                case "expire":
                    expire_all(store)
                case "check":
                    checked.check(data)


def test_reads_of_several_topics_end_once_their_bytes_are_reached() -> None:
    store = ClockedStore(MAX_AGE)
    put(store, b"t1", b"x" * 10, b"y" * 10, b"z" * 10)
    found = store.read_many(ManyTopics(Selection([b"t*"]), 0, 10, 13))
    assert [message.id for message in found.messages] == [1, 2]
    assert found.position == 2
    store.close()


class Counting(ClockedStore):
    """Counts the rows that are scanned."""

    def __init__(self) -> None:
        super().__init__(MAX_AGE)
        self.rows = 0
        headers = self._database.headers

        def counted(*args: Any) -> Iterator[Header]:
            for header in headers(*args):
                self.rows += 1
                yield header

        self._database.headers = counted  # type: ignore[method-assign]

    def fill(self, messages: int, topics: int) -> None:
        """Put messages of one millisecond into topics, in turn."""
        for first in range(0, messages, 1000):
            self.append([(b"t%d" % (at % topics), b"x", None) for at in range(first, first + 1000)])
        self.write()


def read_all(store: ClockedStore, selection: Selection, after: int = 0) -> Iterator[Found]:
    """Iterate over what each call returns, until there is nothing more."""
    wanted = ManyTopics(selection, after, 1000, 1_000_000)
    while True:
        found = store.read_many(wanted)
        yield found
        if found.is_complete and not found.messages:
            return
        wanted = wanted._replace(after=found.position)


class CountingSelection(Selection):
    """Counts the topics that are matched."""

    count = 0

    def matches(self, topic: bytes) -> bool:
        self.count += 1
        return super().matches(topic)


@pytest.mark.parametrize(
    ("words", "messages", "matching"),
    [([b"t*"], 10_000, 10_000), ([b"t*7", b"t1"], 10_000, 1001), ([b"*7*"], 20_000, 6_878), ([b"x*"], 10_000, 0)],
)
def test_one_call_scans_few_rows_and_topics(
    monkeypatch: pytest.MonkeyPatch, words: list[bytes], messages: int, matching: int
) -> None:
    """Tests a long millisecond, and topics not matched yet; a call ends at the first check of the time."""
    monkeypatch.setattr(scan, "SCAN_SECONDS", 0)
    store, selection = Counting(), CountingSelection(words)
    store.fill(messages, 10_000)
    count = 0
    for found in read_all(store, selection):
        # A call ends with a block, after it has seen the first row of the next one.
        assert store.rows <= schema.BLOCK_IDS + 1
        assert selection.count <= scan.MATCH_STEP + schema.BLOCK_IDS + 1
        store.rows = selection.count = 0
        count += len(found.messages)
    assert count == matching
    store.close()


def test_reader_after_long_wait_scans_no_messages_of_other_topics() -> None:
    store = Counting()
    put(store, b"seldom", b"x")
    selection = Selection([b"sel*"])
    store.fill(100_000, 10)
    put(store, b"seldom", b"y")
    store.write()
    position = calls = 0
    while True:
        found = store.read_many(ManyTopics(selection, position, 10, 1_000_000))
        calls, position = calls + 1, found.position
        if found.messages:
            break
    assert [message.body for message in found.messages] == [b"x", b"y"]
    assert (store.rows, calls) == (2, 1)
    store.close()


@pytest.mark.parametrize(("others", "rows"), [(0, 1), (1, 2)])
def test_row_ends_with_a_block_only_if_its_ids_are_interleaved(others: int, rows: int) -> None:
    store = Counting()
    before = put(store, b"before", *[b"x"] * (schema.BLOCK_IDS - 6))
    store.write()
    ids = [*put(store, b"t", b"x", b"x"), *put(store, b"other", *[b"x"] * others), *put(store, b"t", *[b"x"] * 5)]
    store.write()
    store.rows = 0
    [found, _] = read_all(store, Selection([b"t*", b"other"]), before[-1])
    assert [message.id for message in found.messages] == ids
    assert store.rows == rows + others
    store.close()


def test_few_rows_are_scanned_rather_than_many_topics_matched() -> None:
    store = Counting()
    store.fill(10_000, 10_000)
    [last] = put(store, b"t7", b"y")
    store.write()
    [found, _] = read_all(store, Selection([b"t*"]), last - 100)
    assert [message.body for message in found.messages] == [b"x"] * 99 + [b"y"]
    assert store.rows == 100
    store.close()
