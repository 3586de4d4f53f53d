"""TAKE, DONE, RETURN and EXTEND: jobs shared among workers."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from dsmq.broker.arguments import MAX_NAME_BYTES, check_topic, parse_integer, parse_name, parse_number, parse_options
from dsmq.broker.reads import MAX_WAIT_MS, PendingRead, PendingSlices, check_epoch, count_delivery
from dsmq.errors import BadRequest, Busy, Full, ReplyError
from dsmq.store.api import MESSAGE_OVERHEAD_BYTES, Answer, Store
from dsmq.store.group import Receipt
from dsmq.store.groups import Groups, Job, Take
from dsmq.store.selection import JobSelection, Pattern, Selection
from dsmq.wire.limits import MAX_COUNT, MAX_READ_BYTES
from dsmq.wire.resp import OK, Encoded, encode_jobs

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection
    from dsmq.broker.waiters import Waiters

MAX_LEASE_MS = 86_400_000
# How long a waiting TAKE pauses after reaching a limit on jobs.
_FULL_RETRY_SECONDS = 1.0
_NO_REQUEST = Take(b"", b"", Selection(()), 0, 0, 0, b"", "")


class TakeQueues:
    """The waiting TAKEs of all event loops, in order of arrival. Thread-safe.

    Only the first of each group waits for messages, so that a put wakes only one worker. The others wait for their
    turn.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[tuple[bytes, bytes], OrderedDict[PendingTake, Connection]] = {}

    def is_empty(self, key: tuple[bytes, bytes]) -> bool:
        return key not in self._queues

    def count(self, key: tuple[bytes, bytes]) -> int:
        """Return how many workers of a group are waiting for a job."""
        return len(self._queues.get(key, ()))

    def add(self, pending: PendingTake, connection: Connection) -> bool:
        """Add a TAKE; return whether it is the first of its group."""
        with self._lock:
            queue = self._queues.setdefault(pending.key, OrderedDict())
            queue[pending] = connection
            return len(queue) == 1

    def remove(self, pending: PendingTake) -> None:
        """Remove a TAKE. If it was the first, the next one's turn has come."""
        with self._lock:
            queue = self._queues[pending.key]
            # Its own `is_first` may not have been set yet.
            was_first = next(iter(queue)) is pending
            del queue[pending]
            if not queue:
                del self._queues[pending.key]
                return
            first, connection = next(iter(queue.items()))
        if was_first:
            connection.loop.post(partial(first.come_first, connection))

    def wake(self, key: tuple[bytes, bytes]) -> None:
        """Make the first one try again, because a job was returned."""
        with self._lock:
            queue = self._queues.get(key)
            connection = next(iter(queue.values())) if queue else None
        if connection is not None:
            connection.loop.post(connection.reads.wake)


@dataclass(slots=True, eq=False)
class PendingTake(PendingRead):
    """A TAKE, which waits like a read, but takes turns with others of its group."""

    request: Take = _NO_REQUEST
    queues: TakeQueues = field(default_factory=TakeQueues)
    is_first: bool = False
    """Whether its turn has come."""
    groups: Groups | None = None
    is_asked: bool = False
    """Whether the store will answer later."""
    is_woken: bool = False
    """Whether it was woken before the answer, which may therefore lack the newest message."""
    is_refused: bool = False
    """Whether a limit on jobs was reached."""
    jobs: list[Job] = field(default_factory=list)
    """The jobs assigned to it, if its reply has to wait for memory."""
    leased_until: float = 0.0

    @property
    def key(self) -> tuple[bytes, bytes]:
        return self.topic, self.request.group

    def fetch(self, store: Store) -> Any:
        if self.is_asked:
            # It was woken. Another request would get other jobs, so wait for the answer.
            self.is_woken = True
            return Future()
        if self.jobs and time.monotonic() < self.leased_until:
            return self.jobs
        request, self.jobs = self.request, []
        if not (self.is_first or self.queues.is_empty(self.key)):
            if not request.token:
                return []
            # Before its turn, it gets only jobs that an earlier request with its token was given.
            request = request._replace(max_jobs=0)
        if self.wait_ms and (self.registered or not request.token):
            # Not on the first try with a token: the mirror may lack the jobs of an earlier request with the same token.
            request = request._replace(is_waiting=True)
        self.leased_until = time.monotonic() + request.lease_ms / 1000
        self.groups = store.groups
        try:
            found = store.groups.take(request)
        except Full as error:
            return self.refuse(error)
        self.is_asked = isinstance(found, Future)
        # An empty tuple means that the search continues.
        return () if found is None else found

    def refuse(self, error: ReplyError) -> Any:
        self.is_asked = False
        if not (isinstance(error, Full) and self.wait_ms):
            raise error
        # DONE wakes it. It also tries again after a while, because the limits may have been changed.
        self.is_refused = True
        return []

    def take(self, found: Any) -> list[Any] | None:
        was_woken, self.is_asked, self.is_woken = self.is_woken, False, False
        if type(found) is tuple or (was_woken and self.wait_ms and not found):
            return None
        self.jobs = found
        self.retry_in = self._retry_in() if self.wait_ms and not found else math.inf
        return found  # type: ignore[no-any-return]

    def _retry_in(self) -> float:
        if self.is_refused:
            self.is_refused = False
            return _FULL_RETRY_SECONDS
        is_turn = self.is_first or self.queues.is_empty(self.key)
        return self.groups.due_in(*self.key) / 1000 if self.groups and is_turn else math.inf

    def wait(self, waiters: Waiters, connection: Connection) -> None:
        self.is_first = self.queues.add(self, connection)
        try:
            waiters.add(*self._awaited, connection)
        except Busy:
            self.queues.remove(self)
            raise

    @property
    def _awaited(self) -> tuple[Collection[bytes], Sequence[Pattern]]:
        """The topics and patterns that it waits for: none before its turn."""
        selection = self.request.selection
        return (selection.names, selection.patterns) if self.is_first else ((), ())

    def come_first(self, connection: Connection) -> None:
        """Begin to wait for messages, because its turn has come."""
        if connection.reads.pending is not self or self.is_first:
            return
        selection = self.request.selection
        try:
            connection.loop.waiters.extend(selection.names, selection.patterns, connection)
        except Busy as error:
            connection.reads.fail(error)
        else:
            self.is_first = True
            # There may already be messages.
            connection.reads.wake()

    def end_wait(self, waiters: Waiters, connection: Connection) -> None:
        waiters.remove(*self._awaited, connection)
        self.queues.remove(self)

    def covers(self, topic: bytes) -> bool:
        return self.request.selection.matches(topic)

    def memory(self, messages: Sequence[Any]) -> int:
        return sum([len(job.topic) + len(job.body) + 2 * MESSAGE_OVERHEAD_BYTES for job in messages])


def take(client: Connection, request: list[bytes]) -> Encoded | None:
    return client.reads.start(parse_take(client, request))


def parse_take(client: Connection, request: list[bytes]) -> PendingTake:
    topic, group = _parse_key(client, request)
    words, token = request[3:], b""
    if len(words) > 2 and words[-2] == b"TOKEN":
        # TOKEN is usually last and new each time; the other words repeat, so parsing them is cached.
        words, token = words[:-2], _check_token(words[-1])
    lease_ms, count, wait_ms, other_token = _parse_options(*words)
    if token and other_token:
        raise BadRequest("TOKEN is given twice")
    if not (count or token or other_token):
        raise BadRequest("COUNT 0 requires a TOKEN")
    wanted = Take(topic, group, _select(topic), count, MAX_READ_BYTES, lease_ms, token or other_token, repr(client))
    queues = client.context.take_queues
    return PendingTake(topic, 0, count, MAX_READ_BYTES, wait_ms, _encode, request=wanted, queues=queues)


def _check_token(token: bytes) -> bytes:
    if not 0 < len(token) <= MAX_NAME_BYTES:
        raise BadRequest(f"a token should have 1 to {MAX_NAME_BYTES} bytes")
    return token


@lru_cache
def _parse_options(lease: bytes, *words: bytes) -> tuple[int, int, int, bytes]:
    """Parse lease-ms, COUNT, WAIT and TOKEN."""
    lease_ms = parse_integer(lease, "lease-ms", 1, MAX_LEASE_MS)
    options = parse_options(words, {b"WAIT": 1, b"COUNT": 1, b"TOKEN": 1})
    count = parse_number(options, b"COUNT", 1, 0, MAX_COUNT)
    wait_ms = parse_number(options, b"WAIT", 0, 0, MAX_WAIT_MS)
    return lease_ms, count, wait_ms, _check_token(options[b"TOKEN"][0]) if b"TOKEN" in options else b""


def _encode(client: Connection, pending: PendingRead, jobs: Sequence[Any]) -> Encoded:
    count_delivery(client, jobs[-1].topic if jobs else pending.topic, jobs)
    return encode_jobs(jobs)


@lru_cache(256)
def _select(key: bytes) -> JobSelection:
    return JobSelection(key)


def _parse_key(client: Connection, request: list[bytes]) -> tuple[bytes, bytes]:
    """Return the topic or pattern, and the group."""
    return _check_key(request[1], request[2], client.context.settings.max_topic_bytes)


@lru_cache(256)
def _check_key(topic: bytes, group: bytes, max_topic_bytes: int) -> tuple[bytes, bytes]:
    check_topic(topic, max_topic_bytes)
    if not group:
        raise BadRequest("the name of the group is empty")
    return topic, parse_name(group)


def _parse_receipt(words: Sequence[bytes]) -> Receipt:
    return Receipt(parse_integer(words[0], "id", 1), parse_integer(words[1], "attempt", 1))


def _without_epoch(request: list[bytes], least: int) -> list[bytes]:
    """Return a request of at least this many words without the option EPOCH."""
    if request[-2].upper() != b"EPOCH":
        return request
    if len(request) < least + 2:
        raise BadRequest("EPOCH should follow id, attempt and ms")
    if len(request[-1]) > MAX_NAME_BYTES:
        raise BadRequest(f"EPOCH: an epoch may have at most {MAX_NAME_BYTES} bytes")
    return request[:-2]


def _check_epoch(client: Connection, request: list[bytes]) -> None:
    """Raise WrongEpoch if the ids in a request belong to another epoch."""
    if request[-2].upper() == b"EPOCH":
        check_epoch(client.context.store, request[-1])


def _settle(client: Connection, answer: Answer[None]) -> Encoded | None:
    if answer is None:
        return OK
    return client.reads.start(PendingSlices(b"", 0, 1, 1, 0, lambda *_: OK, slices=_until_done(answer)))


def _until_done(answer: Future[Any]) -> Iterator[Future[Any]]:
    while not answer.done():
        yield answer
    answer.result()


def done(client: Connection, request: list[bytes]) -> Encoded | None:
    key, receipts = parse_done(client, request)
    _check_epoch(client, request)
    return _settle(client, client.context.store.groups.done(*key, receipts))


def parse_done(client: Connection, request: list[bytes]) -> tuple[tuple[bytes, bytes], list[Receipt]]:
    request = _without_epoch(request, 5)
    if len(request) % 2 == 0:
        raise BadRequest("each id needs an attempt")
    return _parse_key(client, request), [_parse_receipt(request[at : at + 2]) for at in range(3, len(request), 2)]


def return_(client: Connection, request: list[bytes]) -> Encoded | None:
    key, receipt, delay_ms = parse_return(client, request)
    _check_epoch(client, request)
    return _settle(client, client.context.store.groups.give_back(*key, receipt, delay_ms))


def parse_return(client: Connection, request: list[bytes]) -> tuple[tuple[bytes, bytes], Receipt, int]:
    request = _without_epoch(request, 5)
    delay_ms = parse_integer(request[5], "delay-ms", 0, MAX_LEASE_MS) if len(request) > 5 else 0
    return _parse_key(client, request), _parse_receipt(request[3:5]), delay_ms


def extend(client: Connection, request: list[bytes]) -> Encoded | None:
    key, receipt, lease_ms = parse_extend(client, request)
    _check_epoch(client, request)
    return _settle(client, client.context.store.groups.extend(*key, receipt, lease_ms))


def parse_extend(client: Connection, request: list[bytes]) -> tuple[tuple[bytes, bytes], Receipt, int]:
    request = _without_epoch(request, 6)
    return _parse_key(client, request), _parse_receipt(request[3:5]), parse_integer(request[5], "ms", 1, MAX_LEASE_MS)
