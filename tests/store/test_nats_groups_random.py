"""Servers that share groups of workers over a log, without an engine: random requests, delays, losses and restarts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dsmq.errors import JobLost, ReplyError, StoreFailed, Unsure
from dsmq.store.api import Mirrored, Outcome, Put
from dsmq.store.group import Receipt
from dsmq.store.groups import GroupLimits, Job, Take
from dsmq.store.nats_connection import Received
from dsmq.store.nats_fold import Delivery, Fold
from dsmq.store.nats_group_state import copy_state, load_state
from dsmq.store.nats_groups import NATSGroups
from dsmq.store.selection import Selection
from dsmq.store.sqlite import MirrorStore
from dsmq.system import boot_time

KEY, GROUP = b"t/*", b"w"
TOPICS = (b"t/1", b"t/2")
MAX_AGE_MS = 1_000_000
SERVERS, STEPS, MAX_ATTEMPTS = 3, 400, 4
LEASES = (50, 300, 2_000)

Entry = bytes | Put
"""A fact about groups or a message."""


@dataclass
class Log:
    """The stream, which all servers agree on."""

    entries: list[tuple[Entry, int]] = field(default_factory=list)
    """The entries, each with the time at which it was stored."""
    keys: dict[tuple[bytes, int], int] = field(default_factory=dict)
    now: int = 10_000
    mirrors: list[MirrorStore] = field(default_factory=list)

    def add(self, entry: Entry) -> int:
        """Store an entry; return its id."""
        key = entry[2] if isinstance(entry, tuple) else None
        if key in self.keys:
            return self.keys[key]
        self.entries.append((entry, self.now))
        if key is not None:
            self.keys[key] = len(self.entries)
        return len(self.entries)


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    yield log
    for mirror in log.mirrors:
        mirror.close()


class FakeServer:
    """A server and its connection to the log."""

    max_message_bytes = 100_000
    mirror = SimpleNamespace(ready=True)

    def __init__(self, log: Log, chance: random.Random) -> None:
        self.log, self.chance = log, chance
        self.clock_ahead = chance.randrange(10**6)
        self.store = self._new_store()
        self.groups = NATSGroups(self)  # type: ignore[arg-type]
        self.groups.begin(self.store)
        self.groups.limits = GroupLimits(max_attempts=MAX_ATTEMPTS, max_jobs_in_flight=8)
        self.position = 0
        self.posted: list[Callable[[], object]] = []
        self.sent: list[tuple[Entry, Future[list[Outcome]]]] = []
        self.fresh: list[tuple[int, Callable[[Exception | None], None]]] = []

    def _new_store(self) -> MirrorStore:
        store = MirrorStore(MAX_AGE_MS)
        store._clock = lambda: self.log.now + self.clock_ahead
        self.log.mirrors.append(store)
        return store

    # What groups need from a store

    def publish_job_fact(self, fact: bytes, answer: Future[list[Outcome]], _leaves: float) -> None:
        self.sent.append((fact, answer))

    def append(self, puts: Sequence[Put]) -> Future[list[Outcome]]:
        answer: Future[list[Outcome]] = Future()
        self.sent.append((puts[0], answer))
        return answer

    def when_fresh(self, call: Callable[[Exception | None], None]) -> None:
        self.fresh.append((len(self.log.entries), call))

    def post(self, call: Callable[[], object]) -> None:
        self.posted.append(call)

    # Steps

    def deliver(self, *, safely: bool = False) -> None:
        """Store a fact that was sent, or lose it or its acknowledgement."""
        if not self.sent:
            return
        # Batches are in order, but an attempt without an outcome may be stored later.
        entry, answer = self.sent.pop(0)
        fate = 1.0 if safely else self.chance.random()
        if fate < 0.03:
            answer.set_exception(StoreFailed("lost"))
        elif fate < 0.06:
            answer.set_exception(Unsure("lost"))
            if self.chance.random() < 0.5:
                self.late.append(entry)
        elif fate < 0.09:
            # A new leader repeats what the last one began.
            answer.set_result([self.log.add(entry)])
            self.log.add(entry)
        else:
            answer.set_result([self.log.add(entry)])

    @property
    def late(self) -> list[Entry]:
        return self.__dict__.setdefault("_late", [])

    def fold(self, count: int) -> None:
        """Apply the next entries of the log."""
        for entry, stored_at in self.log.entries[self.position : self.position + count]:
            self.position += 1
            # A live entry is as old as it is here; the age of others is by the engine's clock.
            age_ms = self.log.now - stored_at if self.is_late else 0
            if isinstance(entry, bytes):
                self.groups.apply(entry, self.position, age_ms)
                self.store.apply([], self.position)
            else:
                self.store.apply([Mirrored(self.position, entry, age_ms)], self.position)
        ready = [call for at, call in self.fresh if at <= self.position]
        self.fresh = [one for one in self.fresh if one[0] > self.position]
        for call in ready:
            call(None)

    is_late = False

    def run_posted(self) -> None:
        posted, self.posted = self.posted, []
        for call in posted:
            call()

    def restart(self, source: FakeServer) -> None:
        """Start again with the state that another server has written."""
        for _, answer in self.sent:
            answer.set_exception(Unsure("killed"))
        self.sent, self.posted, self.fresh = [], [], []
        self.store = self._new_store()
        self.clock_ahead = self.chance.randrange(10**6)
        self.groups = NATSGroups(self)  # type: ignore[arg-type]
        self.groups.begin(self.store)
        self.groups.limits = source.groups.limits
        rows = [*copy_state(source.groups.copy_groups(), source.groups.now)]
        self.groups.load_groups(load_state([b"\n".join(rows)] if rows else [], self.groups.now(), 0), source.position)
        self.position, self.is_late = 0, True
        self.fold(len(self.log.entries))
        self.is_late = False

    def view(self) -> list[Any]:
        return [
            (
                *(group.key, group.name, group.position, group.changed_by, list(group.done.items()), group.numbers),
                group.counts.taken,
                sorted(
                    (job.id, job.topic, job.attempt, job.is_held, job.token, job.version) for job in group.jobs.values()
                ),
            )
            for group in self.groups._groups.values()
        ]


@dataclass
class Held:
    job: Job
    sent: int
    lease_ms: int
    until: int
    """A job, as far as the worker knows."""


class World:
    """Servers and their workers, and the true state of the jobs."""

    def __init__(self, seed: int, log: Log) -> None:
        self.chance = random.Random(seed)
        self.log = log
        self.servers = [FakeServer(self.log, self.chance) for _ in range(SERVERS)]
        self.held: list[Held] = []
        self.given: dict[tuple[int, int], bytes] = {}
        self.ends: dict[int, int] = {}
        """Until when the last worker of a job holds it."""
        self.put_ids: set[int] = set()
        self.done: dict[int, int] = {}
        self.tokens = 0
        self.answers = Counter[str]()
        self.violations: list[AssertionError] = []
        self.counts: dict[bytes, int] = {}
        """How many jobs were requested, by token."""

    def step(self) -> None:
        chance, server = self.chance, self.chance.choice(self.servers)
        self.log.now += chance.choice((0, 1, 5, 40))
        steps: list[Callable[[], object]] = [
            *[self._put] * 2,
            *[lambda: self.take(server)] * 5,
            *[lambda: self.settle(server)] * 4,
            *[server.deliver] * 8,
            *[lambda: server.fold(chance.randint(1, 5))] * 8,
            *[server.run_posted] * 6,
            server.groups.expire,
            lambda: [self.log.add(server.late.pop()) for _ in server.late[:1]],
        ]
        if chance.random() < 0.01:
            server.restart(chance.choice([one for one in self.servers if one is not server]))
        chance.choice(steps)()
        for group in server.groups._groups.values():
            for token, receipts in group._tokens.items():
                assert len(receipts) <= self.counts[token], "a repeated request gets other jobs"

    def _put(self) -> None:
        self.put_ids.add(self.log.add((self.chance.choice(TOPICS), b"x", None)))

    def take(self, server: FakeServer, token: bytes = b"") -> None:
        if not token:
            self.tokens += 1
            token = b"%d" % self.tokens
        lease, sent = self.chance.choice(LEASES), self.log.now
        count = self.counts.setdefault(token, self.chance.choice((1, 1, 3)))
        if self.chance.random() < 0.1:
            # The client has moved to another server, and the first one is still at work.
            self.chance.choice(self.servers).post(lambda: self.take(self.chance.choice(self.servers), token))
        request = Take(KEY, GROUP, Selection([KEY]), count, 1000, lease, token, "w")
        self._when_answered(lambda: server.groups.take(request), partial(self._on_taken, server, token, sent, lease))

    def _when_answered(self, ask: Callable[[], Any], check: Callable[[Any], None]) -> None:
        def call(result: Any) -> None:
            try:
                check(result)
            except AssertionError as error:
                # A future ignores a second result.
                self.violations.append(error)

        try:
            answer = ask()
        except ReplyError as error:
            call(error)
            return
        if isinstance(answer, Future):
            answer.add_done_callback(lambda done: call(done.exception() or done.result()))
        else:
            call(answer)

    def _on_taken(self, server: FakeServer, token: bytes, sent: int, lease: int, found: Any) -> None:
        if isinstance(found, Unsure) and self.chance.random() < 0.7:
            # Send it again, perhaps to another server.
            self.chance.choice(self.servers).post(lambda: self.take(self.chance.choice(self.servers), token))
        for job in [] if isinstance(found, Exception) else found or []:
            self.answers["taken"] += 1
            receipt = job.id, job.attempt
            assert self.given.setdefault(receipt, token) == token, "two workers have the same attempt"
            # The answer may arrive late.
            assert self.done.get(job.id, job.attempt) >= job.attempt, "given although done"
            assert job.attempt <= MAX_ATTEMPTS
            others = [one for one in self.held if one.job.id == job.id]
            for other in others:
                if other.job.attempt < job.attempt:
                    assert other.until <= self.log.now, "given within the lease of another worker"
                    self.held.remove(other)
                elif other.job.attempt == job.attempt:
                    self.held.remove(other)
            self.held.append(Held(job, sent, lease, sent + lease))

    def settle(self, server: FakeServer) -> None:
        if not self.held:
            return
        held = self.chance.choice(self.held)
        receipt = Receipt(held.job.id, held.job.attempt)
        verb = self.chance.choice(("done", "done", "done", "return", "extend"))
        groups, began = server.groups, self.log.now
        if verb == "done":
            self._when_answered(lambda: groups.done(KEY, GROUP, [receipt]), partial(self._on_done, held, began))
        elif verb == "return":
            held.until = 0
            delay = self.chance.choice((0, 100))
            self._when_answered(lambda: groups.give_back(KEY, GROUP, receipt, delay), partial(self._on_returned, held))
        else:
            lease = self.chance.choice(LEASES)
            held.until = min(held.until, began + lease)
            self._when_answered(
                lambda: groups.extend(KEY, GROUP, receipt, lease), partial(self._on_extended, held, began + lease)
            )

    def _on_done(self, held: Held, began: int, error: Any) -> None:
        if error is None:
            self.answers["done"] += 1
            assert self.done.setdefault(held.job.id, held.job.attempt) == held.job.attempt, "done twice"
        elif isinstance(error, JobLost) and not any(one is held and held.until > self.log.now for one in self.held):
            self.answers["lost"] += 1
        if error is None or isinstance(error, JobLost):
            self._forget(held)
        else:
            # It may be done.
            held.until = 0

    def _on_returned(self, held: Held, error: Any) -> None:
        if error is None or isinstance(error, JobLost):
            self._forget(held)

    def _on_extended(self, held: Held, until: int, error: Any) -> None:
        if error is None and held.until:
            held.until = max(held.until, 0) and until
        elif isinstance(error, JobLost):
            self._forget(held)

    def _forget(self, held: Held) -> None:
        self.held = [one for one in self.held if one is not held]

    def settle_all(self) -> None:
        """Bring all servers up to date."""
        for _ in range(50):
            for server in self.servers:
                while server.sent:
                    server.deliver(safely=True)
                server.fold(len(self.log.entries))
                server.run_posted()

    def drain(self) -> None:
        for _ in range(300):
            self.settle_all()
            self.log.now += 1000
            for server in self.servers:
                server.groups.expire()
            self.take(self.servers[0])
            self.settle_all()
            for held in [*self.held]:
                receipt = Receipt(held.job.id, held.job.attempt)
                done = partial(self.servers[1].groups.done, KEY, GROUP, [receipt])
                self._when_answered(done, partial(self._on_done, held, self.log.now))
            self.settle_all()
            if not self.servers[0].view() or not (self.servers[0].view()[0][-1] or self._is_behind()):
                return

    def _is_behind(self) -> bool:
        return bool(self.put_ids) and self.servers[0].view()[0][2] < max(self.put_ids)


@pytest.mark.parametrize("seed", range(20))
def test_servers_agree_and_no_job_is_held_twice_or_lost(log: Log, seed: int) -> None:
    world = World(seed, log)
    for _ in range(STEPS):
        world.step()
    world.settle_all()
    assert world.servers[0].view() == world.servers[1].view() == world.servers[2].view()
    world.drain()
    world.settle_all()
    assert not world.violations
    assert world.servers[0].view() == world.servers[1].view() == world.servers[2].view()
    assert world.answers["taken"] > 10
    assert world.answers["done"] > 10
    failed = [entry for entry, _ in world.log.entries if isinstance(entry, tuple) and entry[0].endswith(b"/failed")]
    [group] = world.servers[0].groups._groups.values()
    # DONE without a reply counts too.
    assert group.counts.done + len(failed) == group.counts.taken == len(world.put_ids)
    assert len(world.done) <= group.counts.done
    assert group.counts.failed == len(failed)


@pytest.mark.parametrize("is_loaded", [True, False])
def test_request_in_progress_when_the_mirror_starts_over_is_unsure(log: Log, is_loaded: bool) -> None:
    server = FakeServer(log, random.Random(1))
    log.add((TOPICS[0], b"x", None))
    server.fold(1)
    answer = server.groups.take(Take(KEY, GROUP, Selection([KEY]), 1, 1000, 1000, b"", "w"))
    assert isinstance(answer, Future)
    server.deliver(safely=True)
    if is_loaded:
        server.groups.load_groups([], len(log.entries))
        server.fold(1)
    else:
        server.groups.begin(server.store)
    with pytest.raises(Unsure):
        answer.result(0)


def test_facts_may_be_applied_between_groups_that_are_copied(log: Log) -> None:
    server, late = FakeServer(log, random.Random(1)), FakeServer(log, random.Random(2))

    def fold() -> None:
        server.deliver(safely=True)
        server.fold(len(log.entries))

    def take(group: bytes) -> list[Receipt]:
        answer = server.groups.take(Take(KEY, group, Selection([KEY]), 1, 1000, 1000, b"", "w"))
        assert isinstance(answer, Future)
        fold()
        return [Receipt(job.id, job.attempt) for job in answer.result(0)]

    for _ in range(3):
        log.add((TOPICS[0], b"x", None))
    server.fold(3)
    taken = [take(b"first"), take(b"second")]
    take(b"forgotten")
    began_at, rows = server.position, copy_state(server.groups.copy_groups(), server.groups.now)
    copied = [next(rows)]
    for name, receipts in zip((b"first", b"second"), taken, strict=True):
        server.groups.done(KEY, name, receipts)
        fold()
        take(name)
    take(b"new")
    server.groups._end((KEY, b"forgotten"), 0, "forget", server.groups._groups[KEY, b"forgotten"].changed_by)
    fold()
    copied += rows
    late.groups.load_groups(load_state([b"\n".join(copied)], late.groups.now(), 0), began_at)
    late.fold(len(log.entries))
    assert sorted(late.view()) == sorted(server.view())
    assert [group[1] for group in sorted(late.view())] == [b"first", b"new", b"second"]


def test_all_requests_with_one_token_are_answered_if_there_are_no_jobs(log: Log) -> None:
    """A client may have sent its request again while the first was not answered yet."""
    server = FakeServer(log, random.Random(1))

    def take(token: bytes) -> Any:
        return server.groups.take(Take(KEY, GROUP, Selection([KEY]), 1, 1000, 1000, token, "w", is_waiting=True))

    answers = [take(token) for token in (b"1", b"2", b"2", b"2")]
    server.deliver(safely=True)
    server.fold(1)
    for _ in answers:
        server.run_posted()
    assert [answer.result(0) for answer in answers] == [[], [], [], []]


def test_many_requests_are_planned_in_slices(log: Log) -> None:
    server = FakeServer(log, random.Random(1))
    server.max_message_bytes = 1_000_000
    server.groups.limits = GroupLimits(max_topic_bytes=512)
    for _ in range(300):
        server.log.add((TOPICS[0], b"x", None))
    server.fold(300)
    tokens = [b"%d" % number for number in range(300)]
    answers = [server.groups.take(Take(KEY, GROUP, Selection([KEY]), 1, 1000, 1000, token, "w")) for token in tokens]
    done = []
    while len(answers) > sum(done):
        server.deliver(safely=True)
        server.fold(1)
        server.run_posted()
        done.append(sum(answer.done() for answer in answers if isinstance(answer, Future)) - sum(done))
    assert max(done) <= 100


def test_job_whose_message_is_not_mirrored_yet_is_not_expired(log: Log) -> None:
    servers = [FakeServer(log, random.Random(seed)) for seed in range(2)]
    request = Take(KEY, GROUP, Selection([KEY]), 1, 1000, 50, b"", "w")
    log.add((TOPICS[0], b"x", None))
    servers[0].fold(1)
    servers[0].groups.take(request)
    servers[0].deliver(safely=True)
    # Groups begin with a state that is newer than the mirror.
    servers[1].groups.apply(cast("bytes", log.entries[1][0]), 2, 0)
    log.now += 100
    for is_waiting in (True, False):
        assert isinstance(servers[1].groups.take(request._replace(is_waiting=is_waiting)), Future)
    assert not servers[1].sent
    servers[1].groups.limits = GroupLimits(max_attempts=1)
    [group] = servers[1].groups.copy_groups()
    group.put_back(group.jobs[1], 0)
    servers[1].groups.expire()
    assert not servers[1].sent
    servers[1].fold(1)
    servers[1].groups.expire()
    assert servers[1].sent


def test_mirror_has_a_job_message_before_the_group_has_the_job() -> None:
    store = MirrorStore(MAX_AGE_MS)
    seen: list[int] = []

    class Groups:
        def begin(self, _: MirrorStore) -> None:
            pass

        def apply(self, *_: object) -> None:
            seen.append(store.last_id())

    class AFold(Fold):
        def apply(self) -> None:
            pass

    stream = SimpleNamespace(facts_prefix=b"s.facts.", topic_prefix=b"s.topic.")
    fold = AFold(cast("Any", stream), store, cast("Any", None), cast("Any", Groups()))
    subjects = [b"s.topic.t", b"s.facts.jobs", b"s.topic.t", b"s.topic.t", b"s.facts.jobs", b"s.facts.jobs"]
    messages = [Received(subject, b"", b"", b"x") for subject in subjects]
    fold._apply([Delivery(number, boot_time() * 1000, message, b"0") for number, message in enumerate(messages, 1)])
    assert seen == [1, 4, 4]
    assert store.last_id() == 6
    assert [message.id for message in store.read(b"t", 0, 10, 1000)] == [1, 3, 4]
    store.close()
