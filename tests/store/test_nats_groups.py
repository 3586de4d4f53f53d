"""Groups of workers over NATS: several stores on one engine, as several servers would use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import pytest

from dsmq.errors import Full, JobLost
from dsmq.store import groups
from dsmq.store.api import DROP_OLDEST, Limits, TopicRule
from dsmq.store.group import GroupCounts, Receipt
from dsmq.store.groups import GroupLimits, Job, Take
from dsmq.store.nats import NATSStore
from dsmq.store.nats_group_plan import Refused, SharedGroup, apply_plan
from dsmq.store.nats_group_state import read_state, write_state
from dsmq.store.nats_room import FACTS_LEAVE
from dsmq.store.selection import JobSelection, Selection
from dsmq.store.sqlite import MirrorStore
from helpers import SOON, reached, wait_until
from store.test_nats import MAX_AGE_MS, Stores, bodies, in_engine, put, read, stores, value

__all__ = ["stores"]

W = b"workers"
LONG, SHORT = 60_000, 100


def take(store: NATSStore, key: bytes = b"t", count: int = 1, **options: Any) -> list[Job]:
    defaults = {"group": W, "lease_ms": LONG, "token": b"", "worker": "w", "max_bytes": 100_000}
    request = Take(key=key, selection=JobSelection(key), max_jobs=count, **{**defaults, **options})
    if count > 1:
        # All at once, however busy the machine is.
        store.groups.slice_seconds = SOON
        wait_until(lambda: store.mirror.store.last_id() >= store.publisher.last_id)
    while True:
        if (found := value(store.groups.take(request))) is not None:
            return found


def take_all(store: NATSStore, key: bytes) -> list[Job]:
    """Take until there are no more jobs, because a mirror that has some messages may lack the last ones."""
    return [job for jobs in iter(lambda: take(store, key, 9), []) for job in jobs]


def receipts(jobs: Sequence[Job]) -> list[Receipt]:
    return [Receipt(job.id, job.attempt) for job in jobs]


def done(store: NATSStore, jobs: Sequence[Job], key: bytes = b"t") -> None:
    value(store.groups.done(key, W, receipts(jobs)))


def view(store: NATSStore) -> list[Any]:
    """What a server knows about all groups, except times."""
    return [
        (
            *(group.key, group.name, group.position, group.changed_by, group.counts, group.done, group.numbers),
            sorted(
                (job.id, job.topic, job.attempt, job.is_held, job.token, job.version) for job in group.jobs.values()
            ),
        )
        for group in store.groups._groups.values()
    ]


def await_same(*stores: NATSStore) -> None:
    wait_until(lambda: all(view(store) == view(stores[0]) for store in stores))


def test_each_job_is_given_once_by_two_servers(stores: Stores) -> None:
    one, other = stores(), stores()
    ids = put(one, b"t", *[b"%d" % number for number in range(20)])
    taken = []
    for store in (one, other) * 10:
        taken += take(store)
    assert [job.id for job in taken] == ids
    assert [(job.topic, job.number, job.body, job.attempt) for job in taken[:2]] == [
        (b"t", 1, b"0", 1),
        (b"t", 2, b"1", 1),
    ]
    assert take(one) == take(other) == []
    done(other, taken)
    await_same(one, other)
    assert view(one)[0][-1] == []


def test_concurrent_takes_of_two_servers_share_the_jobs(stores: Stores) -> None:
    servers = one, other = stores(), stores()
    ids = put(one, b"t", *[b"x"] * 200)
    request = Take(b"t", W, Selection([b"t"]), 1, 100, LONG, b"", "w")
    answers = [server.groups.take(request) for _ in range(100) for server in servers]
    jobs = [job for answer in answers for job in value(answer) or []]
    assert sorted(job.id for job in jobs) == ids
    await_same(one, other)


def test_one_job_is_given_to_only_one_of_many(stores: Stores) -> None:
    servers = stores(), stores()
    put(servers[0], b"t", b"x")
    request = Take(b"t", W, Selection([b"t"]), 1, 100, LONG, b"", "w")
    answers = [server.groups.take(request) for _ in range(10) for server in servers]
    assert sum(len(value(answer) or []) for answer in answers) == 1


def test_take_sees_what_another_server_has_stored(stores: Stores) -> None:
    one, other = stores(), stores()
    for number in range(50):
        [message_id] = put(one, b"t", b"x")
        jobs = take((one, other)[number % 2])
        assert [job.id for job in jobs] == [message_id]
        # The first server may not know yet that the other one's group is no longer full.
        done((other, one)[number % 2], jobs)


def test_repeated_token_gets_the_same_jobs_at_another_server(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1", b"2", b"3")
    first = take(one, count=2, token=b"\xff1")
    again = take(other, count=2, token=b"\xff1")
    assert [job[:2] + job[-1:] for job in again] == [job[:2] + job[-1:] for job in first]
    assert take(other, token=b"2")[0].id > first[-1].id
    done(one, first)
    assert take(other, token=b"\xff1") == []


def test_same_token_at_once_at_two_servers_gets_jobs_once(stores: Stores) -> None:
    servers = stores(), stores()
    put(servers[0], b"t", b"1", b"2")
    request = Take(b"t", W, Selection([b"t"]), 1, 100, LONG, b"x", "w")
    answers = [value(server.groups.take(request)) for _ in range(5) for server in servers]
    assert len({job.id for answer in answers for job in answer or []}) == 1


def test_repeated_take_extends_the_lease(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1")
    take(one, token=b"x", lease_ms=SHORT)
    take(other, token=b"x")
    await_same(one, other)
    for store in (one, other):
        [(_, job, _)] = store.groups.held(b"t", 9)
        assert job.until > store.groups._source.now() + LONG / 2


def test_job_is_given_again_by_another_server_once_its_lease_ends(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1", b"2")
    [late] = take(one, lease_ms=SHORT)
    [second] = take(other)
    again: list[Job] = []
    wait_until(lambda: bool(again.extend(take(other)) or again))
    assert [(job.id, job.attempt) for job in again] == [(late.id, 2)]
    for store in (one, other):
        for settle in (
            lambda store: store.groups.done(b"t", W, receipts([late])),
            lambda store: store.groups.give_back(b"t", W, *receipts([late]), 0),
            lambda store: store.groups.extend(b"t", W, *receipts([late]), LONG),
            # All or none.
            lambda store: store.groups.done(b"t", W, receipts([second, late])),
        ):
            with pytest.raises(JobLost):
                value(settle(store))
    done(one, [second, *again])
    await_same(one, other)
    assert view(one)[0][4].repeated == 1


def test_done_may_be_repeated_at_another_server(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1", b"2")
    jobs = take(one, count=2)
    done(one, jobs[:1])
    done(other, jobs[:1])
    done(other, jobs)
    await_same(one, other)
    assert view(one)[0][4].done == 2
    with pytest.raises(JobLost):
        value(one.groups.done(b"t", W, [Receipt(jobs[0].id, 2)]))


def test_returned_job_is_given_again_after_its_delay(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1", b"2")
    first, second = take(one, count=2)
    value(other.groups.give_back(b"t", W, *receipts([second]), 0))
    value(other.groups.give_back(b"t", W, *receipts([first]), SHORT))
    assert [(job.id, job.attempt) for job in take(one)] == [(second.id, 2)]
    again: list[Job] = []
    wait_until(lambda: bool(again.extend(take(one)) or again))
    assert [(job.id, job.attempt) for job in again] == [(first.id, 2)]


def test_extended_lease_holds_at_another_server(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1")
    jobs = take(one, lease_ms=SHORT)
    value(one.groups.extend(b"t", W, *receipts(jobs), LONG))
    await_same(one, other)
    time.sleep(2 * SHORT / 1000)
    assert take(other) == []
    done(other, jobs)


def test_failed_job_is_moved_once_by_two_servers(stores: Stores) -> None:
    servers = one, other = stores(), stores()
    for server in servers:
        server.groups.limits = GroupLimits(max_attempts=1)
    put(one, b"t", b"1", b"2")
    late, _ = take(one, count=2, lease_ms=SHORT)

    def is_moved() -> bool:
        for server in servers:
            server.groups.expire()
        return view(one)[0][4].failed == 2

    wait_until(is_moved)
    await_same(one, other)
    assert sorted(bodies(read(other, b"t/failed"))) == [b"1", b"2"]
    with pytest.raises(JobLost):
        done(other, [late])
    assert take(one) == []


def test_failed_job_stays_if_its_topic_is_full(stores: Stores) -> None:
    store = stores()
    store.groups.limits = GroupLimits(max_attempts=1, max_topic_bytes=3)
    put(store, b"t", b"1")
    take(store, lease_ms=1)

    def moves() -> GroupCounts:
        store.groups.expire()
        return store.groups.counts()

    wait_until(lambda: moves().unmoved == 1)
    assert take(store) == []
    store.groups.limits = GroupLimits(max_attempts=1)
    wait_until(lambda: moves().failed == 1)


def test_pattern_gives_messages_in_order_but_no_failed_jobs(stores: Stores) -> None:
    one, other = stores(), stores()
    ids = [*put(one, "ä/1".encode(), b"x"), *put(other, b"b", b"x"), *put(one, "ä/2".encode(), b"x")]
    put(one, "ä/1/failed".encode(), b"x")
    assert [job.id for job in take_all(other, "ä/*".encode())] == [ids[0], ids[2]]
    ids += put(one, "ä/1".encode(), b"x")
    assert [job.id for job in take_all(one, "ä/*".encode())] == ids[-1:]


def test_messages_that_expire_untaken_are_counted_alike(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1")
    done(one, take(one))
    put(one, b"t", b"2", b"3")
    lost = take(one, lease_ms=1)
    list(map(value, one.purge(Selection([b"t"]))))
    for store in (one, other):
        wait_until(lambda store=store: not store.groups.expire() and view(store)[0][4].expired == 1)
    put(one, b"t", b"4")
    assert [job.body for job in take(other, count=2)] == [b"4"]
    # That server may have learned of the lease only in the same millisecond.
    wait_until(lambda: not take(other) and view(other)[0][4].expired == 2)
    await_same(one, other)
    with pytest.raises(JobLost):
        done(one, lost)


def test_messages_dropped_untaken_are_counted_alike(stores: Stores) -> None:
    rules = Limits(topic=(TopicRule(b"t", max_messages=2, when_full=DROP_OLDEST),))
    servers = [stores(limits=rules), stores()]
    put(servers[0], b"t", b"x")
    for count in range(1, 4):
        # Servers take in turn, including one that has started since.
        done(servers[-1], take(servers[-1]))
        put(servers[0], b"t", *[b"x"] * 5)
        # Otherwise, it might take a message before it is dropped.
        wait_until(lambda expected=5 * count + 1: servers[0].in_memory.last_number(b"t") == expected)
        done(servers[0], take(servers[0]))
        servers.append(stores())
        await_same(*servers)
        assert (view(servers[-1])[0][4].dropped, view(servers[-1])[0][4].expired) == (3 * count, 0)


def test_messages_that_had_expired_before_the_first_take_do_not_count_on_a_later_server(stores: Stores) -> None:
    one = stores()
    put(one, b"t", *[b"x"] * 5)
    list(map(value, one.purge(Selection([b"t"]))))
    ended = one.mirror.store.last_id()

    async def delete(jetstream: Any) -> None:
        await jetstream.purge_stream(stores.stream, seq=ended)

    in_engine(stores.servers, delete)
    assert take(one) == []
    # The later server learns the topic's last number after it has applied that TAKE.
    work = one.stream.write_facts(*one.mirror.store.all_numbers())
    asyncio.run_coroutine_threadsafe(work, one._loop).result(SOON)
    other = stores()
    assert not other.groups.expire()
    await_same(one, other)
    assert other.groups.counts() == GroupCounts()


def expire_early(store: NATSStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete all messages of one mirror, because its clock is ahead."""
    wait_until(lambda: store.mirror.store.last_id() >= store.publisher.last_id)
    mirror, clock = store.mirror.store, store.mirror.store._clock
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_clock", lambda: clock() + mirror.max_age_ms + 1)
        while mirror.expire():
            pass


def test_messages_that_expire_before_another_server_gives_them_count_once(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = stores(), stores()
    put(one, b"t", *[b"x"] * 5)
    done(one, take(one))
    expire_early(one, monkeypatch)
    for count in range(2, 6):
        one.groups.expire()
        done(other, take(other))
        wait_until(lambda count=count: view(one)[0][4].done == count)
    one.groups.expire()
    assert view(one)[0][4].expired == 4


def test_mirror_that_catches_up_counts_no_untaken_messages(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stores()
    assert take(one) == []
    put(one, b"t", b"x")
    expire_early(one, monkeypatch)
    one.mirror.ready = False
    one.groups.expire()
    assert view(one)[0][4].expired == 0
    one.mirror.ready = True
    one.groups.expire()
    assert view(one)[0][4].expired == 1


def test_limits_are_checked_once_mirror_is_up_to_date(stores: Stores) -> None:
    one, other = stores(), stores()
    for server in (one, other):
        server.groups.limits = GroupLimits(max_groups=1, max_jobs_in_flight=2)
    put(one, b"t", b"1", b"2", b"3")
    for _ in range(5):
        jobs: list[Job] = []
        # Its mirror may lack the last message.
        while len(jobs) < 2:
            jobs += take(one, count=9)
        with pytest.raises(Full, match="max_jobs_in_flight = 2"):
            take(other)
        done(other, jobs)
        put(one, b"t", b"x", b"x")
    with pytest.raises(Full, match="max_groups = 1"):
        take(one, b"other")


def test_server_with_little_memory_forgets_no_finished_jobs(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, servers could disagree on whether a repeated DONE applies."""
    monkeypatch.setattr(groups, "LEAST_DONE", 1)
    store = stores()
    put(store, b"t", b"1", b"2", b"3")
    jobs = [job for _ in range(3) for job in take(store)]
    done(store, jobs)
    store.groups.limits = GroupLimits(max_group_bytes=1)
    put(store, b"t", b"4")
    with pytest.raises(Full, match="max_group_bytes"):
        take(store)
    [group] = store.groups.copy_groups()
    assert list(group.done) == [job.id for job in jobs]


def test_waiting_workers_of_other_servers_are_woken(stores: Stores) -> None:
    one, other = stores(), stores()
    woken: list[Any] = []
    other.groups.on_available = woken.append
    other.groups.limits = GroupLimits(max_jobs_in_flight=1)
    put(one, b"t", b"1")

    def is_woken_by(call: Callable[[], object]) -> bool:
        await_same(one, other)
        woken.clear()
        call()
        return reached(lambda: (b"t", W) in woken, SOON)

    jobs: list[Job] = []
    assert is_woken_by(lambda: jobs.extend(take(one)))
    assert is_woken_by(lambda: value(one.groups.extend(b"t", W, *receipts(jobs), SHORT)))
    assert is_woken_by(lambda: value(one.groups.give_back(b"t", W, *receipts(jobs), 0)))
    jobs = take(one)
    assert is_woken_by(lambda: done(one, jobs))


def test_unused_group_is_forgotten_by_all(stores: Stores) -> None:
    servers = one, other = stores(1000), stores(1000)
    assert take(one) == []
    assert one.groups.count == 1
    await_same(one, other)
    wait_until(lambda: [server.groups.expire() for server in servers] and not one.groups.count)
    await_same(one, other)
    put(one, b"t", b"1")
    assert len(take(other)) == 1


def test_group_in_use_is_not_forgotten(stores: Stores) -> None:
    servers = one, other = stores(1000), stores(1000)
    for _ in range(30):
        assert take(one) == []
        for server in servers:
            server.groups.expire()
        time.sleep(0.05)
    assert one.groups.count == other.groups.count == 1
    # It is kept once per part of max_age, not for each request.
    assert one.last_id() < 20


def test_facts_that_cannot_be_read_are_skipped(stores: Stores) -> None:
    one, other = stores(), stores()
    for fact in (
        b"",
        b"{}",
        b'["x","take","t","workers",0,1,[["","w",1,{"t":[[1]]},[],[]]],[],[]]',
        b'["x","?","t","w"]',
    ):
        one.publish_job_fact(fact, Future(), FACTS_LEAVE)
    put(one, b"t", b"1")
    assert len(take(one)) == 1
    await_same(one, other)
    assert one.mirror.skipped == 3


def test_group_continues_at_another_server_when_one_ends(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1", b"2")
    [first, second] = take(one, count=2, token=b"x")
    one.close()
    done(other, [first])
    assert [job.id for job in take(other, token=b"x")] == [second.id]


def test_full_stream_refuses_takes_and_ends_of_jobs_until_there_is_room(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1", b"2")
    jobs = take(one)

    async def limit(jetstream: Any, *, on: bool) -> None:
        info = await jetstream.stream_info(stores.stream)
        info.config.max_bytes = info.state.bytes if on else -1
        await jetstream.update_stream(info.config)

    in_engine(stores.servers, partial(limit, on=True))
    for server in (one, other):
        for request in (take, lambda server: done(server, jobs)):
            with pytest.raises(Full):
                request(server)
    # This needs no fact.
    with pytest.raises(JobLost):
        done(other, [jobs[0]._replace(attempt=9)])
    in_engine(stores.servers, partial(limit, on=False))
    done(one, jobs)
    assert [job.body for job in take(other)] == [b"2"]


def test_both_servers_get_jobs(stores: Stores) -> None:
    servers = stores(), stores()
    put(servers[0], b"t", *[b"x"] * 400)

    def work(store: NATSStore) -> int:
        count = 0
        while jobs := take(store):
            done(store, jobs)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(work, servers * 2))
    assert sum(counts) == 400
    assert min(counts[0] + counts[2], counts[1] + counts[3]) > 40


def test_repeated_request_planned_without_knowing_of_the_first_is_refused() -> None:
    group = SharedGroup(b"t", W, Selection([b"t"]), 0)
    with closing(MirrorStore(LONG)) as source:
        apply_plan(group, [0, 1, [["x", "w", LONG, {"t": [[1, 1]]}, [], []]], [], []], 5, 0, source)
        with pytest.raises(Refused):
            apply_plan(group, [1, 2, [["x", "w", LONG, {"t": [[2, 2]]}, [], []]], [], []], 6, 0, source)
        apply_plan(group, [1, 2, [["y", "w", LONG, {"t": [[2, 2]]}, [], []]], [], []], 7, 0, source)


# Servers that start later


def write_state_now(store: NATSStore) -> None:
    work = write_state(store.stream, store.groups, store.mirror.store.last_id())
    asyncio.run_coroutine_threadsafe(work, store._loop).result(SOON)


def expire_facts(stores: Stores) -> None:
    """Delete all facts about groups, as if they were older than max_age."""

    async def purge(jetstream: Any) -> None:
        await jetstream.purge_stream(stores.stream, subject=f"{stores.stream}.facts.jobs")

    in_engine(stores.servers, purge)


def test_new_server_continues_without_the_facts_that_have_expired(stores: Stores) -> None:
    one = stores()
    ids = put(one, b"t", *[b"%d" % number for number in range(20)])
    done(one, take(one, count=5))
    held = take(one, count=3, token=b"\xff", worker="w\xf6rker")
    value(one.groups.give_back(b"t", W, *receipts(held[:1]), LONG))
    value(one.groups.give_back(b"t", W, *receipts(held[1:2]), 0))
    take(one, b"t*", count=2)
    write_state_now(one)
    expire_facts(stores)
    # Facts after the state.
    taken = take(one, count=2)
    assert [job.id for job in taken] == [held[1].id, ids[8]]
    other = stores()
    await_same(one, other)
    [(_, job, held_ms)] = [found for found in other.groups.held(b"t", 99) if found[1].id == held[2].id]
    assert (job.worker, job.token) == ("w\xf6rker", b"\xff")
    assert LONG / 2 < job.until - other.groups.now() <= LONG
    assert held_ms < LONG / 2
    assert other.groups.counts() == GroupCounts()
    done(other, [held[2], *taken])
    done(other, held[2:])
    assert [job.id for job in take(other, count=20)] == ids[9:]
    await_same(one, other)


def test_new_server_does_not_count_what_a_forgotten_group_had_counted(stores: Stores) -> None:
    one = stores()
    put(one, b"t", b"1")
    done(one, take(one, lease_ms=1))
    one.groups._groups[b"t", W].used_at -= MAX_AGE_MS + 1
    wait_until(lambda: not one.groups.expire() and not one.groups.count)
    assert one.groups.counts().done == 1
    other = stores()
    assert other.groups.count == 0
    assert other.groups.counts() == GroupCounts()


def test_state_is_written_in_parts(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmq.store.nats_group_state._PART_BYTES", 300)
    one = stores()
    put(one, b"t", *[b"x"] * 50)
    taken = take(one, count=50)
    for _ in range(3):
        write_state_now(one)
    done(one, taken[:10])
    other = stores()
    await_same(one, other)
    done(other, taken[10:20])

    async def count(jetstream: Any) -> int:
        info = await jetstream.stream_info(stores.stream, subjects_filter=f"{stores.stream}.facts.state")
        return info.state.subjects[f"{stores.stream}.facts.state"]

    # Earlier states are deleted.
    assert 5 < in_engine(stores.servers, count) < 15


def test_servers_that_write_the_state_at_the_same_time_leave_one_that_is_complete(stores: Stores) -> None:
    servers = stores(), stores(), stores()
    put(servers[0], b"t", *[b"x"] * 50)
    for number in range(10):
        take(servers[number % 3])
        works = [write_state(one.stream, one.groups, one.mirror.store.last_id()) for one in servers]
        for work, one in zip(works, servers, strict=True):
            asyncio.run_coroutine_threadsafe(work, one._loop)
    late = stores()
    await_same(*servers, late)
    assert len(take(late, count=50)) == 40


def test_server_writes_the_state_soon_after_it_starts_and_then_several_times_per_max_age(stores: Stores) -> None:
    one = stores(1600)
    put(one, b"t", b"1")
    take(one)
    wait_until(lambda: state_of(one) is not None)
    first = state_of(one)
    wait_until(lambda: state_of(one) != first)


def state_of(store: NATSStore) -> Any:
    found = asyncio.run_coroutine_threadsafe(
        store.stream.find(last_by_subj=f"{store.stream.name}.facts.groups"), store._loop
    )
    return found.result(SOON)


def test_state_older_than_all_messages_is_ignored(stores: Stores) -> None:
    one = stores()
    put(one, b"t", b"1")
    take(one)
    write_state_now(one)
    expire_facts(stores)
    work = read_state(one.stream, one.groups, state_of(one).put_ms + 1000, 999)
    one.groups.begin(one.mirror.store)
    asyncio.run_coroutine_threadsafe(work, one._loop).result(SOON)
    assert not one.groups.count


def test_new_epoch_has_no_groups(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"1")
    [job] = take(one)
    epoch = one.epoch

    async def delete(jetstream: Any) -> None:
        await jetstream.delete_stream(stores.stream)

    in_engine(stores.servers, delete)
    wait_until(lambda: all(server.epoch != epoch and server.mirror.ready for server in (one, other)))
    assert one.groups.count == other.groups.count == 0
    with pytest.raises(JobLost):
        done(other, [job])
    put(other, b"t", b"2")
    assert [job.body for job in take(one)] == [b"2"]
    assert one.groups.counts().taken == 2
