"""Several topics read together by a client, without a server: order, and missed messages of each topic."""

from __future__ import annotations

import random

import pytest

from conftest import ClientClock
from dsmq.client.arguments import Names
from dsmq.client.reader import Claim, TopicReader, take_back
from dsmq.client.stretch import Entry, Era

TOPICS = ("a", "b", "c")


class Peer:
    """Stores messages of several topics and answers a reader."""

    def __init__(self, clock: ClientClock, run: bytes = b"first") -> None:
        self.clock, self.stored = clock, list[tuple[int, str, int, float]]()
        self.last_id, self.numbers = 0, dict.fromkeys(TOPICS, 0)
        self.reader = TopicReader(Names(TOPICS), Era("one", run, 0, None))

    def put(self, topic: str, lifetime: float = 600.0) -> None:
        self.last_id += 1
        self.numbers[topic] += 1
        self.stored.append((self.last_id, topic, self.numbers[topic], self.clock.boot_time() + lifetime))

    def found(self, after: int, count: int) -> tuple[list[Entry], int]:
        """Return the reply to MREAD: messages and the position."""
        now = self.clock.boot_time()
        live = [one for one in self.stored if one[0] > after and one[3] > now]
        found = [Entry(i, 0, expires, b"", now, topic, number) for i, topic, number, expires in live[:count]]
        return found, found[-1].id if len(live) > count else self.last_id

    def fetch(self, count: int = 100) -> bool:
        asked = self.reader.asked()
        return self.reader.accept(asked, *self.found(asked[1], count))

    def take(self, n: int = 100, claim: Claim | None = None) -> list[tuple[str, int]]:
        return self.reader.take([] if claim is None else claim, n, lambda _, one: (one.topic, one.topic_number))

    def renumber(self, restored: dict[str, int]) -> list[tuple[str, int]]:
        """Answer what the reader asks after a kill: the last numbers before an id; return the questions."""
        asked = []
        while doubt := self.reader.doubt:
            asked.append(doubt[1:])
            self.reader.renumber(doubt, restored[doubt[1]])
        return asked

    def missed(self) -> tuple[int, list[int]]:
        return self.reader.missed, [self.reader.missed_in(topic) for topic in TOPICS]


@pytest.fixture
def peer(client_clock: ClientClock) -> Peer:
    return Peer(client_clock)


def test_messages_come_in_order_of_ids_with_numbers_of_their_topics(peer: Peer) -> None:
    for topic in "abba":
        peer.put(topic)
    peer.fetch()
    assert peer.take() == [("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert peer.missed() == (0, [0, 0, 0])


def test_gap_counts_as_missed_only_in_its_topic(peer: Peer, client_clock: ClientClock) -> None:
    for topic in "abc":
        peer.put(topic)
    peer.fetch()
    peer.take()
    for topic in "aab":
        peer.put(topic, 1.0)
    client_clock.passed += 2.0
    for topic in "cab":
        peer.put(topic)
    peer.fetch()
    assert peer.missed()[0] == 0
    assert peer.take(2) == [("c", 2), ("a", 4)]
    assert peer.missed() == (2, [2, 0, 0])
    assert peer.take() == [("b", 3)]
    assert peer.missed() == (3, [2, 1, 0])


def test_new_topic_counts_from_its_first_message(peer: Peer, client_clock: ClientClock) -> None:
    peer.put("b", 1.0)
    client_clock.passed += 2.0
    peer.put("a")
    peer.put("b")
    peer.fetch()
    assert peer.take() == [("a", 1), ("b", 2)]
    assert peer.missed() == (0, [0, 0, 0])


def test_empty_reply_advances_position(peer: Peer) -> None:
    peer.last_id = 1000
    assert not peer.fetch()
    assert peer.reader.asked()[1] == 1000
    assert peer.reader.position == ("one", 1000)
    peer.put("a")
    assert peer.fetch(1)
    assert peer.reader.position == ("one", 1000)
    assert peer.take() == [("a", 1)]
    assert peer.reader.position == ("one", 1001)


def test_expired_read_ahead_without_successors_is_missed(peer: Peer, client_clock: ClientClock) -> None:
    for topic in "ab":
        peer.put(topic)
    for topic in "abbc":
        peer.put(topic, 5.0)
    peer.fetch()
    peer.take(2)
    client_clock.passed += 10.0
    assert peer.take() == []
    assert not peer.fetch()
    # Nothing was read from c before.
    assert peer.missed() == (3, [1, 2, 0])
    for topic in "cab":
        peer.put(topic)
    peer.fetch()
    assert peer.take() == [("c", 2), ("a", 3), ("b", 4)]
    assert peer.missed() == (3, [1, 2, 0])


def test_seek_goes_back_without_missing_anything(peer: Peer) -> None:
    for topic in "abcab":
        peer.put(topic)
    peer.fetch()
    peer.take()
    peer.reader.seek(1)
    peer.fetch()
    assert peer.take() == [("b", 1), ("c", 1), ("a", 2), ("b", 2)]
    assert peer.missed() == (0, [0, 0, 0])


def test_seek_back_begins_at_position_from_server(peer: Peer, client_clock: ClientClock) -> None:
    for topic in "abcab":
        peer.put(topic)
    peer.reader.seek(0, back=(b"LAST", 2))
    asked = peer.reader.asked()
    assert asked[0].back == (b"LAST", 2)
    peer.reader.accept(asked, *peer.found(3, 100))
    # After a while, the read-ahead is fetched again, starting with the same message.
    client_clock.passed += 10.0
    assert peer.take() == []
    assert peer.reader.asked()[1] == 3
    peer.fetch()
    assert peer.take() == [("a", 2), ("b", 2)]
    assert peer.missed() == (0, [0, 0, 0])


def test_seek_back_in_empty_topic_starts_now(peer: Peer) -> None:
    peer.last_id = 7
    peer.reader.seek(0, back=(b"SINCE", 3.0))
    assert not peer.reader.accept(peer.reader.asked(), [], 7)
    peer.put("a")
    peer.put("b")
    assert peer.reader.asked()[1] == 7
    peer.fetch()
    assert peer.take() == [("a", 1), ("b", 1)]


def test_since_omits_only_messages_put_before_the_time(peer: Peer, client_clock: ClientClock) -> None:
    peer.put("a")
    client_clock.passed += 0.5
    peer.reader.seek(0, back=(b"SINCE", client_clock.boot_time()))
    asked = peer.reader.asked()
    # The request has a margin, so it returns all messages.
    older = peer.found(0, 100)[0][0]._replace(put_at=client_clock.boot_time() - 0.5)
    assert peer.reader.accept(asked, [older], 1)
    assert peer.take() == []
    peer.put("b")
    assert peer.fetch()
    assert peer.take() == [("b", 1)]

    peer.reader.seek(0, back=(b"SINCE", client_clock.boot_time()))
    peer.put("c")
    newer = peer.found(2, 100)[0][0]
    peer.reader.accept(peer.reader.asked(), [older, newer], 3)
    assert peer.take() == [("c", 1)]


def test_since_omits_all_earlier_messages(peer: Peer, client_clock: ClientClock) -> None:
    for _ in range(5):
        peer.put("a")
    client_clock.passed += 0.5
    peer.reader.seek(0, back=(b"SINCE", client_clock.boot_time()))
    peer.put("b")
    for _ in range(3):
        asked = peer.reader.asked()
        found, scanned = peer.found(asked[1], 2)
        found = [one._replace(put_at=one.put_at - 0.5 * (one.topic == "a")) for one in found]
        assert peer.reader.accept(asked, found, scanned)
    assert peer.take() == [("b", 1)]
    assert peer.missed() == (0, [0, 0, 0])


def test_latest_takes_newest_of_each_topic_and_skips_older_ones(peer: Peer, client_clock: ClientClock) -> None:
    for topic in "aabbc":
        peer.put(topic)
    peer.fetch()
    peer.take(1)
    asked = peer.reader.asked_for_latest()
    newest = [one for one in peer.found(asked[1], 100)[0] if one.id in (2, 4, 5)]
    claim: Claim = []
    taken = peer.reader.take_latest(claim, asked, newest, lambda _, one: (one.topic, one.topic_number))
    assert taken == [("a", 2), ("b", 2), ("c", 1)]
    peer.put("b")
    peer.fetch()
    assert peer.take() == [("b", 3)]
    assert peer.missed() == (0, [0, 0, 0])
    take_back([(claim, [])])


def test_kill_keeps_counts_and_restarts_numbers(peer: Peer, client_clock: ClientClock) -> None:
    for topic in "ab":
        peer.put(topic)
    peer.put("a", 1.0)
    client_clock.passed += 2.0
    peer.put("a")
    peer.fetch()
    peer.take()
    assert peer.missed() == (1, [1, 0, 0])
    era = peer.reader.asked()[0].era
    era.next[0] = Era("one", b"second", 0, None, [(2, 2**32)])
    assert peer.renumber({"a": 1}) == [("a", 4)]
    peer.last_id, peer.stored, peer.numbers = 2**32, peer.stored[:2], {"a": 1, "b": 1, "c": 0}
    for topic in "aab":
        peer.put(topic)
    peer.fetch()
    assert peer.take() == [("a", 2), ("a", 3), ("b", 2)]
    assert peer.missed() == (1, [1, 0, 0])


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "read ahead"])
def test_messages_that_replace_lost_ones_and_expire_are_missed(
    peer: Peer, client_clock: ClientClock, *, is_read: bool
) -> None:
    for topic in "abcab":
        peer.put(topic)
    peer.fetch()
    peer.take(100 if is_read else 3)
    # The snapshot has only the first three messages.
    era = peer.reader.asked()[0].era
    era.next[0] = Era("one", b"second", 0, None, [(3, 2**32)])
    if not is_read:
        assert peer.take() == [("a", 2), ("b", 2)]
    assert peer.renumber({"a": 1, "b": 1}) == [("a", 4), ("b", 5)]
    peer.last_id, peer.stored, peer.numbers = 2**32, peer.stored[:3], dict.fromkeys("abc", 1)
    for topic in "aaabc":
        peer.put(topic, 1.0)
    client_clock.passed += 2.0
    for topic in "abc":
        peer.put(topic)
    peer.fetch()
    assert peer.take() == [("a", 5), ("b", 3), ("c", 3)]
    assert peer.missed() == (5, [3, 1, 1])


def test_messages_given_back_before_a_kill_do_not_make_later_ones_missed(peer: Peer) -> None:
    for topic in "aabaa":
        peer.put(topic)
    peer.fetch()
    claim: Claim = []
    peer.take(1, claim)
    assert peer.take() == [("a", 2), ("b", 1), ("a", 3), ("a", 4)]
    take_back([(claim, [])])
    era = peer.reader.asked()[0].era
    era.next[0] = Era("one", b"second", 0, None, [(5, 2**32)])
    peer.last_id = 2**32
    for topic in "ab":
        peer.put(topic)
    returned = []
    while peer.fetch():
        returned += peer.take()
    assert returned == [("a", 1), ("a", 5), ("b", 2)]
    assert peer.missed() == (0, [0, 0, 0])


def test_messages_that_expired_around_a_kill_are_missed(peer: Peer, client_clock: ClientClock) -> None:
    for topic in "abaab":
        peer.put(topic, 1.0)
    peer.fetch(2)
    assert peer.take() == [("a", 1), ("b", 1)]
    # The snapshot has all of these messages, and no others are lost.
    era = peer.reader.asked()[0].era
    era.next[0] = Era("one", b"second", 0, None, [(5, 2**32)])
    peer.last_id = 2**32
    for topic in "ac":
        peer.put(topic, 1.0)
    client_clock.passed += 2.0
    for topic in "bac":
        peer.put(topic)
    peer.fetch()
    assert peer.take() == [("b", 3), ("a", 5), ("c", 2)]
    assert peer.missed() == (4, [3, 1, 0])


@pytest.mark.parametrize("seed", range(60))
def test_each_message_is_returned_once_or_counted_as_missed(peer: Peer, client_clock: ClientClock, seed: int) -> None:
    """Calls are interrupted at random; messages expire in the read-ahead and at the server."""
    chance = random.Random(seed)
    returned: list[tuple[str, int]] = []
    first: dict[str, int] = {}
    for _ in range(60):
        action = chance.randrange(6)
        if action < 2:
            for _ in range(chance.randrange(8)):
                peer.put(chance.choice(TOPICS), chance.choice((0.5, 3.0, 600.0)))
        elif action == 2:
            client_clock.passed += chance.choice((0.1, 0.4, 2.0))
        elif action == 3:
            peer.fetch(chance.choice((1, 3, 100)))
        else:
            claim: Claim = []
            taken = peer.take(chance.randrange(1, 6), claim)
            for topic, number in taken:
                first.setdefault(topic, number)
            if chance.random() < 0.3:
                take_back([(claim, [])])
            else:
                returned += taken
    for topic in TOPICS:
        peer.put(topic)
    while peer.fetch() or peer.reader.asked()[1] < peer.last_id:
        returned += peer.take()
    ids = {(topic, number): message_id for message_id, topic, number, _ in peer.stored}
    assert [ids[one] for one in returned] == sorted({ids[one] for one in returned})
    expected = []
    for topic in TOPICS:
        numbers = [number for name, number in returned if name == topic]
        assert numbers[-1] == peer.numbers[topic]
        # Counting starts with the first message taken, even if it was given back and has expired.
        expected.append(numbers[-1] - first.get(topic, numbers[0]) + 1 - len(numbers))
    assert peer.missed() == (sum(expected), expected)
