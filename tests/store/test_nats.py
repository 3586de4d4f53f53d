"""The store in a NATS stream, without servers: several stores on one engine, as several servers would use it."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import nats
import pytest

from chaos.proxy import Fault, Proxy
from dsmq.errors import BadRequest, Forgotten, Full, ReplyError, StartupError, StoreFailed, TooBig, Unsure
from dsmq.store import nats_puts, nats_stream
from dsmq.store.api import Answer, Limits, Message, Mirrored, Put
from dsmq.store.nats import MAX_TOPIC_BYTES, NATSStore
from dsmq.store.nats_api import EngineError
from dsmq.store.nats_connection import Credentials, encode_token
from dsmq.store.nats_stream import MIN_VERSION
from dsmq.store.sqlite import MirrorStore
from engine import Engine, engine
from helpers import HOST, SOON, UNIT, reached, wait_until

T = TypeVar("T")
MAX_AGE_MS = 600_000


class Stores:
    """Creates stores on one engine and closes them."""

    def __init__(self, servers: list[tuple[str, int]], stack: ExitStack) -> None:
        self.servers, self.stack = servers, stack
        self.topics: list[set[bytes]] = []
        self.reasons: list[str] = []

    def __call__(self, max_age_ms: int = MAX_AGE_MS, limits: Limits | None = None, **options: Any) -> NATSStore:
        store = NATSStore(self.servers, **{"stream": self.stream, "replicas": 1, **options})
        store.max_age_ms, store.limits = max_age_ms, limits or Limits()
        store.start(self.topics.append, self.reasons.append)
        self.stack.callback(store.close)
        assert store.wait(SOON)
        return store

    stream = "dsmq"


@pytest.fixture
def stores(shared_node: Engine, request: pytest.FixtureRequest) -> Iterator[Stores]:
    """Stores on a stream for one test."""
    with ExitStack() as stack:
        made = Stores(shared_node.servers, stack)
        made.stream = f"s{abs(hash(request.node.nodeid))}"
        yield made


def value(answer: Answer[T]) -> T:
    return answer.result(SOON) if isinstance(answer, Future) else answer


def put(store: NATSStore, topic: bytes, *bodies: bytes) -> list[Any]:
    return value(store.append([(topic, body, None) for body in bodies]))


def keyed(topic: bytes, body: bytes, seq: int, producer: bytes = b"p") -> Put:
    return topic, body, (producer, seq)


def read(store: NATSStore, topic: bytes, after: int = 0) -> list[Message]:
    """Read until there are no more messages, because a mirror that has some may lack the last ones."""
    found: list[Message] = []
    while more := value(store.read(topic, found[-1].id if found else after, 1000, 1_000_000)):
        found += more
    return found


def bodies(messages: list[Message]) -> list[bytes]:
    return [message.body for message in messages]


def in_engine(servers: list[tuple[str, int]], call: Callable[[Any], Any]) -> Any:
    """Run a coroutine with a JetStream context of the official client."""

    async def run() -> Any:
        client = await nats.connect([f"nats://{host}:{port}" for host, port in servers])
        try:
            return await call(client.jetstream())
        finally:
            await client.close()

    return asyncio.run(run())


# Puts and reads


def test_put_is_read_by_another_server_at_once(stores: Stores) -> None:
    one, other = stores(), stores()
    for number in range(200):
        [message_id] = put(one, b"t", b"%d" % number)
        assert [message.id for message in read(other, b"t", message_id - 1)] == [message_id]


def test_ids_and_numbers_are_the_same_on_all_servers(stores: Stores) -> None:
    one, other = stores(), stores()
    for store in (one, other, one):
        put(store, b"t", b"x", b"y")
        put(store, b"u", b"z")
    views = [[message[:2] for message in read(store, b"t")] for store in (one, other)]
    assert views[0] == views[1]
    assert [number for _, number in views[0]] == [1, 2, 3, 4, 5, 6]
    assert one.epoch == other.epoch


def test_mirror_is_complete_although_its_consumer_knows_of_messages_late(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that lags says at first that it has no messages."""
    put(stores(), b"t", b"1", b"2")
    create, later = nats_stream.Stream.create_consumer, list[asyncio.Task[int]]()

    async def create_later(*arguments: Any) -> int:
        async def run() -> int:
            await asyncio.sleep(UNIT)
            return await create(*arguments)

        later.append(asyncio.create_task(run()))
        return 0

    monkeypatch.setattr(nats_stream.Stream, "create_consumer", create_later)
    assert bodies(read(stores(), b"t")) == [b"1", b"2"]
    # The messages may arrive before the reply.
    wait_until(lambda: all(task.done() for task in later))
    assert [task.result() >= 4 for task in later] == [True]


def test_latest_returns_message_stored_by_another_server(stores: Stores) -> None:
    one, other = stores(), stores()
    for number in range(100):
        put(one, b"t", b"%d" % number)
        assert bodies(value(other.latest(b"t", 0))) == [b"%d" % number]


def test_waiting_readers_of_all_servers_are_woken(stores: Stores) -> None:
    one, _ = stores(), stores()
    put(one, b"t", b"x")
    wait_until(lambda: stores.topics.count({b"t"}) == 2)


def test_client_starts_after_all_stored_messages(stores: Stores) -> None:
    one, other = stores(), stores()
    for _ in range(50):
        [message_id] = put(one, b"t", b"x")
        assert value(other.start_id()) >= message_id


def test_client_waits_briefly_for_its_start_id(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stores()
    ids = put(store, b"t", b"x")
    index, failures = store._index, [EngineError("busy")] * 2

    async def last_stored_id() -> int:
        if failures:
            raise failures.pop()
        return ids[0]

    monkeypatch.setattr(index, "last_stored_id", last_stored_id)
    assert value(store.start_id()) == ids[0]
    failures += [EngineError("dead")] * 1000
    monkeypatch.setattr("dsmq.store.nats_index.START_SECONDS", UNIT)
    with pytest.raises(StoreFailed, match="dead"):
        value(store.start_id())


def test_id_not_assigned_yet_is_refused(stores: Stores) -> None:
    store = stores()
    [message_id] = put(store, b"t", b"x")
    assert read(store, b"t", message_id) == []
    with pytest.raises(BadRequest, match="no message has an id above"):
        read(store, b"t", message_id + 1)


@pytest.mark.parametrize("topic", [b"a.b", b"*", b">", b"a b", "ä/ö".encode(), b"%2E", b"-_~", b"x" * 512])
def test_put_accepts_any_topic(stores: Stores, topic: bytes) -> None:
    one, other = stores(), stores()
    put(one, topic, b"x")
    assert bodies(read(other, topic)) == [b"x"]
    assert [stats.name for stats in other.in_memory.topics(b"", 10)] == [topic]


def test_topics_and_producers_are_one_token_of_a_subject() -> None:
    token = encode_token(bytes(range(256)))
    assert not {*b" .*>\r\n\t"} & {*token}


def test_message_too_long_for_engine_is_refused_before_sending(stores: Stores) -> None:
    store = stores()
    longest = store.max_message_bytes
    with pytest.raises(TooBig, match="max_payload"):
        store.append([(b"t", b"x" * (longest + 1), None)])
    # The subject, which is three times as long as this topic, and the headers don't make it too long.
    topic = b"." * MAX_TOPIC_BYTES
    value(store.append([keyed(topic, b"x" * longest, 2**63 - 1, b"." * 64)]))
    assert store.connection.connected
    assert [len(message.body) for message in value(store.read(topic, 0, 1, 1))] == [longest]


# Repeated puts


def test_repeated_put_gets_the_first_id(stores: Stores) -> None:
    one, other = stores(), stores()
    first = value(one.append([keyed(b"t", b"x", 1)]))
    assert value(one.append([keyed(b"t", b"x", 1)])) == first
    assert value(other.append([keyed(b"t", b"x", 1)])) == first
    assert bodies(read(other, b"t")) == [b"x"]


def test_batch_with_repeated_puts_stores_only_the_new_ones(stores: Stores) -> None:
    one, other = stores(), stores()
    [first, second] = value(one.append([keyed(b"t", b"1", 1), keyed(b"t", b"2", 2)]))
    outcomes = value(other.append([keyed(b"t", b"%d" % number, number) for number in range(1, 5)]))
    assert outcomes[:2] == [first, second]
    assert bodies(read(one, b"t")) == [b"1", b"2", b"3", b"4"]


def test_put_repeated_within_one_batch_is_stored_once(stores: Stores) -> None:
    store = stores()
    outcomes = value(store.append([keyed(b"t", b"x", 1), keyed(b"t", b"x", 1), keyed(b"t", b"y", 2)]))
    assert outcomes[0] == outcomes[1] < outcomes[2]  # type: ignore[operator]
    assert bodies(read(store, b"t")) == [b"x", b"y"]


def test_put_repeated_after_the_engine_has_forgotten_it_is_stored_once(stores: Stores) -> None:
    one, other = stores(), stores()
    value(one.append([keyed(b"t", b"x", 1)]))
    assert bodies(read(other, b"t")) == [b"x"]
    # The engine does not know this id, but the mirrors do.
    headers = {"Nats-Msg-Id": "another"}
    subject = f"{stores.stream}.t.t"

    async def publish(stream: Any) -> None:
        await stream.publish(subject, b"x", headers=headers)

    in_engine(stores.servers, publish)
    assert value(other.append([keyed(b"t", b"x", 1)])) == value(one.append([keyed(b"t", b"x", 1)]))


@pytest.mark.parametrize("message_id", ["p.a:1", "s.a:1"])
def test_message_stored_twice_by_engine_is_mirrored_once(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, message_id: str
) -> None:
    monkeypatch.setattr(nats_stream, "DEDUPLICATION_SECONDS", 1)
    store = stores()

    async def publish_twice(stream: Any) -> None:
        for _ in range(2):
            while (await stream.publish(f"{stores.stream}.t.t", b"x", headers={"Nats-Msg-Id": message_id})).duplicate:
                pass

    in_engine(stores.servers, publish_twice)
    put(store, b"t", b"y")
    assert [message[1:2] + message[3:4] for message in read(store, b"t")] == [(1, b"x"), (2, b"y")]


def test_late_repetition_of_a_forgotten_put_is_not_mirrored() -> None:
    store = MirrorStore(MAX_AGE_MS)
    store.apply([Mirrored(number, keyed(b"t", b"x", number), 0) for number in range(1, 3_001)], 3_000)
    store.apply([Mirrored(3_001, keyed(b"t", b"x", 1), 0)], 3_001)
    assert (store.last_id(), store.in_memory.totals().messages) == (3_001, 3_000)
    store.close()


def test_forgotten_put_is_refused(stores: Stores) -> None:
    store = stores()
    for start in range(0, 2500, 500):
        value(store.append([keyed(b"t", b"x", number) for number in range(start, start + 500)]))
    wait_until(lambda: store.in_memory.totals().messages == 2500)
    with pytest.raises(Forgotten):
        store.append([keyed(b"t", b"x", 1)])


def test_puts_together_are_stored_with_consecutive_ids(stores: Stores) -> None:
    store = stores()
    ids = value(store.append_together([(b"t", b"x", None), (b"u", b"y", None), (b"t", b"z", None)]))
    assert ids == list(range(ids[0], ids[0] + 3))  # type: ignore[arg-type]


def test_put_repeated_together_gets_the_first_id(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = stores(), stores()
    [first] = value(one.append([keyed(b"t", b"1", 1)]))
    # Pretend that the mirror lags.
    monkeypatch.setattr(other.mirror.store, "check", lambda puts: [None] * len(puts))
    puts = [keyed(b"t", b"1", 1), keyed(b"t", b"2", 2), (b"u", b"x", None), keyed(b"t", b"2", 2)]
    known, *new, repeated = value(other.append_together(puts))
    assert (known, new, repeated) == (first, [new[0], new[0] + 1], new[0])  # type: ignore[operator]
    assert value(other.append_together(puts[:2])) == [first, new[0]]
    assert bodies(read(one, b"t")) == [b"1", b"2"]


def lag(store: NATSStore, seconds: float = 0.02) -> None:
    """Delay what the mirror receives."""
    store.connection.on_received = lambda: store._loop.call_later(seconds, store.mirror.apply) and None


def test_mirror_has_puts_together_when_they_are_answered(stores: Stores) -> None:
    store = stores()
    lag(store)
    ids = value(store.append_together([(b"t", b"x", None)] * 2))
    assert store.mirror.store.last_id() >= ids[1]  # type: ignore[operator]


def test_last_id_is_id_of_last_put_even_if_mirror_lags(stores: Stores) -> None:
    store = stores()
    lag(store)
    assert put(store, b"t", b"x") == [store.last_id()]


# Limits


def fill(store: NATSStore) -> None:
    """Put messages until one is refused; raise its error."""
    while True:
        for outcome in put(store, b"t", *[b"x" * 9_000] * 3):
            if isinstance(outcome, ReplyError):
                raise outcome


def test_full_engine_refuses_puts(stores: Stores) -> None:
    store = stores(limits=Limits(max_stored_bytes=200_000))
    # The mirror refuses puts beyond its limit; the stream, whose messages have headers, may refuse them earlier.
    with pytest.raises(Full):
        fill(store)
    assert len(read(store, b"t")) > 10


def test_limit_on_topics_holds(stores: Stores) -> None:
    store = stores(limits=Limits(max_topics=2))
    put(store, b"a", b"x")
    put(store, b"b", b"x")
    wait_until(lambda: store.in_memory.totals().topics == 2)
    with pytest.raises(Full, match="max_topics"):
        store.append([(b"c", b"x", None)])


# Later servers


def test_later_server_has_the_same_messages_numbers_and_ages(stores: Stores) -> None:
    one = stores()
    put(one, b"t", *[b"x"] * 700)
    put(one, b"u", b"y")
    before = read(one, b"t", 0)
    late = stores()
    assert [message[:2] for message in read(late, b"t")] == [message[:2] for message in before]
    assert late.in_memory.totals()[:3] == one.in_memory.totals()[:3]
    assert abs(read(late, b"u")[0].age_ms - read(one, b"u")[0].age_ms) < 10 * UNIT * 1000


def test_later_server_continues_numbers_after_messages_have_expired(stores: Stores) -> None:
    one = stores(max_age_ms=2_000)
    put(one, b"t", b"1", b"2", b"3")
    put(one, b"gone", b"1")
    facts = lambda: in_engine(stores.servers, lambda stream: stream.stream_info(stores.stream))  # noqa: E731
    wait_until(lambda: one.in_memory.totals().messages == 0 or one.in_memory.expire() == 4)
    # Written once per quarter of max_age.
    wait_until(lambda: facts().state.messages >= 2)
    one.close()
    late = stores(max_age_ms=2_000)
    put(late, b"t", b"4")
    put(late, b"gone", b"2")
    assert [message.number for message in read(late, b"t")] == [4]
    assert [message.number for message in read(late, b"gone")] == [2]


def test_expired_messages_are_not_read(stores: Stores) -> None:
    store = stores(max_age_ms=500)
    [message_id] = put(store, b"t", b"x")
    assert bodies(read(store, b"t", message_id - 1)) == [b"x"]
    wait_until(lambda: read(store, b"t", message_id - 1) == [])
    assert reached(lambda: store.in_memory.expire() == 1)


# Loss


def test_deleted_stream_begins_a_new_epoch(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", b"x")
    before = one.epoch
    in_engine(stores.servers, lambda stream: stream.delete_stream(stores.stream))
    wait_until(lambda: one.epoch == other.epoch != before and not one.unready_reason and not other.unready_reason)
    assert stores.reasons == ["the stream has lost its messages"] * 2
    [message_id] = put(one, b"t", b"y")
    assert value(one.start_id()) == message_id
    messages = read(other, b"t")
    assert (bodies(messages), messages[0].number) == ([b"y"], 1)


def test_put_to_new_stream_is_read_before_mirrors_notice_it(stores: Stores) -> None:
    one, other = stores(), stores()
    put(one, b"t", *[b"x"] * 100)
    in_engine(stores.servers, lambda stream: stream.delete_stream(stores.stream))
    put(one, b"u", b"y")
    assert bodies(read(other, b"u")) == [b"y"]


def test_lost_consumer_is_replaced_even_if_its_deletion_times_out(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores()

    async def never(_: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(store.stream, "delete_consumer", never)

    async def delete(stream: Any) -> None:
        for consumer in await stream.consumers_info(stores.stream):
            await stream.delete_consumer(stores.stream, consumer.name)

    for consumers in (2, 3):
        in_engine(stores.servers, delete)
        wait_until(lambda: store.mirror.consumers == consumers)  # noqa: B023
    [message_id] = put(store, b"t", b"x")
    assert [message.id for message in read(store, b"t")] == [message_id]
    store.close()
    assert not store.thread.is_alive()


def test_store_can_be_closed_as_soon_as_it_is_ready(stores: Stores) -> None:
    for _ in range(10):
        store = stores()
        store.close()
        assert not store.thread.is_alive()


def test_server_waits_for_an_engine_that_starts_later(tmp_path: Path) -> None:
    with engine(tmp_path, 1) as later:
        [node] = later.nodes
        node.kill()
        store = NATSStore(later.servers, replicas=1)
        store.start(lambda _: None, lambda _: None)
        try:
            assert not store.wait(UNIT)
            assert "no connection" in store.unready_reason
            node.start()
            assert store.wait(SOON)
        finally:
            store.close()
        with pytest.raises(StoreFailed):
            store.append([(b"t", b"x", None)])


def test_puts_and_reads_survive_a_restart_of_the_engine(tmp_path: Path) -> None:
    with engine(tmp_path, 1) as running, ExitStack() as stack:
        [node] = running.nodes
        stores = Stores(running.servers, stack)
        store = stores()
        put(store, b"t", b"1")
        node.kill()
        answer = store.append([keyed(b"t", b"2", 1)])
        node.start()
        put(store, b"t", b"3")
        assert isinstance(value(answer)[0], int)
        assert bodies(read(store, b"t")) == [b"1", b"2", b"3"]


@pytest.mark.slow
def test_read_at_an_isolated_leader_is_never_stale(tmp_path: Path) -> None:
    with ExitStack() as stack:
        # The proxies are between the nodes; the servers connect to some nodes directly.
        running = stack.enter_context(engine(tmp_path, proxy=lambda port: stack.enter_context(Proxy(port))))
        stores = Stores(running.servers, stack)
        stores(replicas=3)
        leader = running.leader()
        majority = [node.address for node in running.nodes if node is not leader]
        stores.servers = [leader.address]
        isolated = stores(replicas=3)
        stores.servers = majority
        other = stores(replicas=3)
        running.cut_off(leader, on=True)
        # It returns once another leader was elected.
        [message_id] = put(other, b"t", b"x")
        with pytest.raises(StoreFailed):
            # Until then, the isolated leader would answer that there is none.
            assert not value(isolated.read(b"t", 0, 1, 1))
        with pytest.raises(StoreFailed):
            value(isolated.start_id())
        running.cut_off(leader, on=False)
        wait_until(lambda: [message.id for message in read_if_possible(isolated, b"t")] == [message_id])
        # The isolated leader's answers do not count as a loss.
        assert (isolated.epoch, stores.reasons.count("the stream has lost its messages")) == (other.epoch, 0)


def read_if_possible(store: NATSStore, topic: bytes) -> list[Message]:
    try:
        return read(store, topic)
    except StoreFailed:
        return []


@pytest.mark.parametrize("together", [False, True])
def test_unanswered_put_to_engine_is_unsure_and_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    monkeypatch.setattr(nats_puts, "PUT_SECONDS", 1.5)
    with engine(tmp_path, 1) as running, ExitStack() as stack:
        store = Stores(running.servers, stack)()
        append = store.append_together if together else store.append
        puts = [keyed(b"t", b"1", 1), keyed(b"t", b"2", 2)]
        [node] = running.nodes
        node.signal(signal.SIGSTOP)
        outcomes = value(append(puts))
        node.signal(signal.SIGCONT)
        assert [type(outcome) for outcome in outcomes] == [Unsure] * 2
        monkeypatch.undo()
        value(append(puts))
        assert bodies(read(store, b"t")) == [b"1", b"2"]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_put_whose_answer_is_lost_is_stored_once(stores: Stores, together: bool, count: int) -> None:
    with Proxy(stores.servers[0][1]) as proxy:
        stores.servers = [(HOST, proxy.port)]
        store = stores()
        append = store.append_together if together else store.append
        expected = []
        for number in range(2):
            proxy.strike(Fault("reset", "reply", 0))
            puts: list[Put] = [(b"t", b"%d %d" % (number, one), None) for one in range(count)]
            ids = value(append(puts))
            assert ids == sorted(ids)  # type: ignore[type-var]
            expected += [body for _, body, _ in puts]
        assert bodies(read(store, b"t")) == expected
        store.close()


@pytest.mark.parametrize("together", [False, True])
def test_puts_made_without_an_engine_are_stored_when_it_is_back(tmp_path: Path, together: bool) -> None:
    with engine(tmp_path, 1) as running, ExitStack() as stack:
        [node] = running.nodes
        store = Stores(running.servers, stack)()
        node.kill()
        append = store.append_together if together else store.append
        answer = append([(b"t", b"1", None), (b"t", b"2", None)])
        node.start()
        first, second = value(answer)
        assert [message[:2] for message in read(store, b"t")] == [(first, 1), (second, 2)]
        # The batch was not split; one by one, many puts would take long.
        assert store.publisher.split == 0


# Start


def refused(servers: list[tuple[str, int]], **options: Any) -> str:
    """Return the error of a store that can't be used."""
    store = NATSStore(servers, replicas=1, **options)
    store.start(lambda _: None, lambda _: None)
    try:
        with pytest.raises(StartupError) as error:
            store.wait(SOON)
        return str(error.value)
    finally:
        store.close()


def test_stream_with_other_configuration_is_refused(stores: Stores) -> None:
    async def add(stream: Any) -> None:
        # Older versions of the client don't know allow_atomic.
        config = {"name": "others", "subjects": ["others.>"], "allow_atomic": True}
        await stream._api_request("$JS.API.STREAM.CREATE.others", json.dumps(config).encode())

    in_engine(stores.servers, add)
    assert "was not created by dsmq: its subjects" in refused(stores.servers, stream="others")


def test_engine_without_atomic_batches_is_refused(stores: Stores) -> None:
    async def add(stream: Any) -> None:
        await stream.add_stream(name="old", subjects=["old.t.*", "old.genesis", "old.facts.*"])

    in_engine(stores.servers, add)
    assert f"is too old: {MIN_VERSION} is required" in refused(stores.servers, stream="old")


def test_engine_without_jetstream_is_refused(tmp_path: Path) -> None:
    with engine(tmp_path, 1, jetstream=False) as running:
        assert "JetStream" in refused(running.servers)


def test_wrong_credentials_are_refused(tmp_path: Path) -> None:
    users = 'authorization { user: dsmq, password: "secret" }'
    with engine(tmp_path, 1, extra=users) as running:
        assert "Authorization Violation" in refused(running.servers)
        assert "Authorization Violation" in refused(running.servers, credentials=Credentials("dsmq", "wrong"))
        store = NATSStore(running.servers, replicas=1, credentials=Credentials("dsmq", "secret"))
        store.start(lambda _: None, lambda _: None)
        try:
            assert store.wait(SOON)
        finally:
            store.close()


def test_other_program_on_port_is_named(stores: Stores) -> None:
    import socket
    import threading

    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(b"+OK hello\r\n")
                sock.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        store = NATSStore([(HOST, port)], replicas=1)
        store.start(lambda _: None, lambda _: None)
        try:
            wait_until(lambda: "not a NATS server" in store.unready_reason)
        finally:
            store.close()


def test_facts_survive_as_json(stores: Stores) -> None:
    store = stores(max_age_ms=1_000)
    put(store, b"\xc3\xa4.b", b"x")

    async def facts(stream: Any) -> list[dict[str, Any]]:
        found = []
        for part in range(16):
            try:
                found.append(
                    json.loads((await stream.get_last_msg(stores.stream, f"{stores.stream}.facts.{part}")).data)
                )
            except nats.js.errors.NotFoundError:
                continue
        return found

    wait_until(lambda: any(part["numbers"] == {"%C3%A4%2Eb": 1} for part in in_engine(stores.servers, facts)))
