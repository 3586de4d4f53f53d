"""Jobs: messages that each go to one of several workers. Used by both clients; does no I/O."""

from __future__ import annotations

import binascii
import itertools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

from dsmq.client import arguments
from dsmq.client.message import Message
from dsmq.client.replies import as_text, check
from dsmq.client.requests import MAX_WAIT_SECONDS, Call, Read
from dsmq.errors import Full, JobLost, ProtocolError, ReplyError, WrongEpoch
from dsmq.system import boot_time, process
from dsmq.wire.limits import MAX_COUNT
from dsmq.wire.resp import Reply, encode_bulk, encode_option, encode_settlement, encode_take

if TYPE_CHECKING:
    from dsmq.client.requests import Producer
    from dsmq.client.session import Session

# A job taken in advance gets a new lease if less than this share of its lease is left when its turn comes.
_FRESH = 0.9
# The lease of jobs that are requested only to give them back.
_LEAVE_SECONDS = 1.0
# If there are more jobs than this, those whose lease has ended are forgotten. Also how many tokens are kept.
_MANY_JOBS = 1000

_FIELDS = bytes, int, int, int, bytes, int, int
# Makes a Job faster than calling the class.
_new = tuple.__new__
_logger = logging.getLogger(__name__)

Receipt: TypeAlias = tuple[str, str, int, int, str]
"""The topic or pattern, the group, the id, the attempt and the epoch."""


class Job(Message):
    """A message to work on until it is done or given back, or its lease ends.

    `with job:` (`async with` in asyncio) finishes it at the end of the block, or gives it back if the block raises,
    unless the block has done either itself. A pickled job can be passed to `done`, `give_back` and `extend` in another
    process.
    """

    attempt: int
    """How many times it has been given to a worker, including this time."""
    key: tuple[str, str]
    """The topic or pattern that it was taken from, and the group."""
    _epoch: str = ""
    _mq: Any = None

    @property
    def receipt(self) -> Receipt:
        return *self.key, self.id, self.attempt, self._epoch

    @property
    def _is_held(self) -> bool:
        return self.receipt in jobs_of(self._mq._session).leases  # noqa: SLF001 - made for this

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mq": None}

    def __enter__(self) -> Self:
        if not hasattr(self._mq, "__enter__"):
            raise TypeError("use `async with` for an asyncio client's job, done() or give_back() for an unpickled one")
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self._mq._leave(leave(self._mq, [self.receipt]))  # noqa: SLF001
        elif self._is_held:
            self._mq.done(self)

    async def __aenter__(self) -> Self:
        if not hasattr(self._mq, "__aenter__"):
            raise TypeError("use `with` for a blocking client's job, done() or give_back() for an unpickled one")
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            await self._mq._leave(leave(self._mq, [self.receipt]))  # noqa: SLF001
        elif self._is_held:
            await self._mq.done(self)


class Jobs:
    """The jobs that a client holds in this process and the tokens of its interrupted takes."""

    def __init__(self) -> None:
        self.leases: dict[Receipt, float] = {}
        """When the lease of each job ends, by `boot_time`."""
        self.tokens: dict[tuple[str, str], list[bytes]] = {}
        """By topic and group."""
        self._max_leases = _MANY_JOBS
        self._name, self._numbers = binascii.b2a_base64(os.urandom(9), newline=False), itertools.count(1)

    def new_token(self) -> bytes:
        return b"%b%d" % (self._name, next(self._numbers))

    def add(self, jobs: list[Job], lease: float) -> None:
        until = (now := boot_time()) + lease
        for job in jobs:
            self.leases[job.receipt] = until
        if len(self.leases) > self._max_leases:
            for receipt in [receipt for receipt, until in list(self.leases.items()) if until < now]:
                self.leases.pop(receipt, None)
            self._max_leases = max(_MANY_JOBS, 2 * len(self.leases))


def jobs_of(session: Session) -> Jobs:
    """Return the jobs of a client in this process: a forked child has none of its parent's."""
    here = process()
    return session.jobs.get(here) or session.jobs.setdefault(here, Jobs())


class Settle(Call):
    """A DONE, RETURN or EXTEND."""

    __slots__ = ("_is_repeated", "_once", "_verb", "_words", "receipt")

    def __init__(self, verb: bytes, receipt: Receipt, *words: bytes, once: bool = False) -> None:
        """`once`: don't send it again when the connection breaks."""
        self._verb, self.receipt, self._words = verb, receipt, words
        self._once, self._is_repeated, self.seconds = once, False, 0.0

    def request(self, producer: Producer) -> bytes:
        topic, group, message_id, attempt, epoch = self.receipt
        words = self._words
        if producer.era and producer.era.epoch != epoch:
            # The server has lost its messages and may have assigned the id to another one.
            words = *words, b"EPOCH", epoch.encode()
        return encode_settlement(self._verb, _encode_key(topic, group), message_id, attempt, words)

    def on_connection_lost(self, error: Exception) -> bool:
        if self._once:
            raise self.to_error(error) from error
        self._is_repeated = True
        return False

    def accept(self, leases: dict[Receipt, float]) -> None:
        """Process the reply. Raises JobLost or another error of the server."""
        if not isinstance(error := self.reply, ReplyError):
            if self._verb != b"EXTEND":
                leases.pop(self.receipt, None)
            elif self.receipt in leases:
                leases[self.receipt] = boot_time() + int(self._words[0]) / 1000
            return
        if isinstance(error, WrongEpoch):
            error = JobLost("the server has lost the job's message")
        if isinstance(error, JobLost):
            leases.pop(self.receipt, None)
            if self._verb == b"RETURN" and self._is_repeated:
                return
        raise error


@lru_cache
def _encode_key(topic: str, group: str) -> bytes:
    return encode_bulk(topic.encode()) + encode_bulk(group.encode())


def done(job: Job) -> Settle:
    return Settle(b"DONE", _receipt(job))


def give_back(job: Job, delay: float) -> Settle:
    return Settle(b"RETURN", _receipt(job), _milliseconds("delay", delay, zero=True))


def extend(job: Job, seconds: float) -> Settle:
    return Settle(b"EXTEND", _receipt(job), _milliseconds("seconds", seconds))


def leave(mq: Any, receipts: list[Receipt], finished: Job | None = None) -> Iterator[Settle]:
    """Yield calls that give back those jobs that are still held, and finish one.

    A job is held until its call has been made. If that is interrupted, closing the client gives the job back.
    """
    leases = jobs_of(mq._session).leases  # noqa: SLF001 - made for this
    for receipt in receipts:
        if receipt in leases:
            is_done = finished and finished.receipt == receipt
            yield Settle(b"DONE" if is_done else b"RETURN", receipt, once=True)
            leases.pop(receipt, None)


def leave_all(mq: Any) -> Iterator[Call]:
    """Yield calls that give back all jobs, including those of interrupted takes. Each must be made before the next."""
    held = jobs_of(mq._session)  # noqa: SLF001 - made for this
    yield from leave(mq, [*held.leases])
    for (topic, group), tokens in [*held.tokens.items()]:
        order = _order(topic, group, _LEAVE_SECONDS, 1)._replace(options=(encode_option(b"COUNT", 0),))
        while tokens:
            yield (take := Take(mq._session, held, order, tokens[-1:], 0.0, None))  # noqa: SLF001
            held.add(found := take.jobs(mq), order.lease)
            tokens.pop()
            yield from leave(mq, [job.receipt for job in found])


def _receipt(job: Job) -> Receipt:
    if not isinstance(job, Job):
        raise TypeError(f"a job should be what take() returns, not {type(job).__name__}")
    return job.receipt


def _milliseconds(name: str, value: object, *, zero: bool = False) -> bytes:
    if (seconds := arguments.seconds(name, value, zero=zero)) > 86_400:
        raise ValueError(f"{name} should be at most 86400 seconds, not {value!r}")
    return b"%d" % max(not zero, round(seconds * 1000))


class _Order(NamedTuple):
    """The arguments of a take, checked and encoded."""

    topic: str
    group: str
    max_jobs: int
    lease: float
    words: bytes
    """The encoded words: topic, group and lease."""
    options: tuple[bytes, ...]
    """The encoded option COUNT, if it is needed."""

    @property
    def token_key(self) -> tuple[str, str]:
        return self[:2]


def _order(topic: str, group: str, lease: float, prefetch: int) -> _Order:
    """Raises TypeError or ValueError if an argument is invalid."""
    with suppress(TypeError):
        return _known_order(topic, group, lease, prefetch)
    # An argument is invalid, or just not hashable. Not in the handler, so that the error does not show the TypeError.
    return _check_order(topic, group, lease, prefetch)


def _check_order(topic: str, group: str, lease: float, prefetch: int) -> _Order:
    name, group_name = arguments.topic_or_pattern(topic), arguments.short_name("group", group)
    n = min(arguments.count("prefetch", prefetch), MAX_COUNT)
    if not group_name:
        raise ValueError("the name of the group is empty")
    if not n:
        raise ValueError("prefetch should be 1 or more, not 0")
    words = b"".join(map(encode_bulk, (name, group_name, _milliseconds("lease", lease))))
    return _Order(
        topic, group, n, arguments.seconds("lease", lease), words, (encode_option(b"COUNT", n),) if n > 1 else ()
    )


_known_order = lru_cache(typed=True)(_check_order)


class Take(Read):
    """A TAKE, which gets the same jobs if it is repeated with the same token. It waits like a READ.

    It may include the DONE of another job, sent first, in the same packet.
    """

    __slots__ = ("_done", "_epoch", "_jobs", "_order", "_tokens")

    def __init__(  # noqa: PLR0913, PLR0917 - what a take consists of
        self, session: Session, jobs: Jobs, order: _Order, tokens: list[bytes], until: float, done: Settle | None
    ) -> None:
        self._session, self._jobs, self._order, self._tokens, self._until = session, jobs, order, tokens, until
        self._done, self._epoch, self.seconds = done, "", 0.0

    @property
    def replies(self) -> int:
        return 1 if self._done is None else 2

    def request(self, producer: Producer) -> bytes:
        self._epoch = producer.era.epoch if producer.era else ""
        if not self._tokens or self._jobs is not jobs_of(self._session):
            # A forked child must not get its parent's jobs.
            self._jobs = jobs_of(self._session)
            self._tokens[:] = [self._jobs.new_token()]
        options = self._order.options
        self.seconds = 0.0
        if self._until:
            self._asked_at = time.monotonic()
            self.seconds = max(0.0, min(self._until - self._asked_at, MAX_WAIT_SECONDS))
            if milliseconds := round(self.seconds * 1000):
                options = *options, encode_option(b"WAIT", milliseconds)
        request = encode_take(self._order.words, options, self._tokens[0])
        return request if self._done is None else self._done.request(producer) + request

    def take_reply(self, reply: Reply) -> None:
        if self._done is None:
            self.reply = reply
        else:
            # If the connection breaks before the next reply, only the rest is sent again.
            self._done.reply, self._done = reply, None

    def jobs(self, mq: Any) -> list[Job]:
        """Return the jobs in the reply. Raises the server's error or ProtocolError."""
        reply, now, found = check(self.reply), time.time(), []
        if not isinstance(reply, list) or len(reply) % 7:
            raise ProtocolError("the reply to TAKE does not consist of jobs")
        key = self._order[:2]
        for fields in zip(*[iter(reply)] * 7, strict=True):
            if tuple(map(type, fields)) != _FIELDS:
                raise ProtocolError("the reply to TAKE does not consist of jobs")
            topic, message_id, number, age, body, _, attempt = fields
            job: Job = _new(Job, (as_text(topic), message_id, number, now - age / 1000, body))
            job.attempt, job.key, job._epoch, job._mq = attempt, key, self._epoch, mq  # noqa: SLF001 - made here
            found.append(job)
        return found


class Work:
    """A loop over jobs. An interrupt may end a call at any step: then `interrupted` is called."""

    def __init__(  # noqa: PLR0913, PLR0917 - what a loop consists of
        self, mq: Any, topic: str, group: str, seconds: float, lease: float, prefetch: int = 1
    ) -> None:
        """Raises TypeError or ValueError if an argument is invalid."""
        self._order = _order(topic, group, lease, prefetch)
        self._seconds = arguments.seconds("timeout", seconds)
        # The token of the last take, until its first job has been handed out.
        self._tokens: list[bytes] = []
        # The first is the next to be handed out; while the caller works on it, it is `_given` and then `_finished`.
        self._ready: list[Job] = []
        self._given: Job | None = None
        self._finished: Job | None = None
        self._mq = mq

    @property
    def _jobs(self) -> Jobs:
        return jobs_of(self._mq._session)  # noqa: SLF001 - made for this

    def begin(self) -> None:
        """Record that the caller requests the next job, which finishes its current one."""
        if self._given is not None:
            self._finished = self._given
            self._given = None
        self._tokens = []

    def calls(self) -> Iterator[Call]:
        """Yield calls that finish the caller's job and prepare the next one, if there is one in time.

        Each call must be made before the next one is taken from the iterator.
        """
        until = time.monotonic() + self._seconds if self._seconds else 0.0
        leases, finished, done = self._jobs.leases, self._finished, None
        if finished is not None or self._ready:
            if finished is not None and finished.receipt in leases:
                done = Settle(b"DONE", finished.receipt)
            self._ready = [job for job in self._ready if job is not finished and job.receipt in leases]
            if self._ready:
                if done is not None:
                    yield done
                    self._end(done)
                    done = None
                yield from self._renew(leases)
        if not self._ready:
            yield from self._take(until, done)
        self._finished = None

    def _end(self, done: Settle) -> None:
        """Process the reply to DONE."""
        try:
            done.accept(self._jobs.leases)
        except JobLost as error:
            topic, _, message_id, *_ = done.receipt
            about = "job %d of %r was lost before it was finished; its lease was %g s: %s"
            _logger.warning(about, message_id, topic, self._order.lease, error)
        self._finished = None

    def _renew(self, leases: dict[Receipt, float]) -> Iterator[Call]:
        """Yield calls that extend the lease of the next job, if it was taken some time ago, and skip lost ones."""
        while self._ready:
            job = self._ready[0]
            if leases.get(job.receipt, 0.0) - boot_time() > _FRESH * self._order.lease:
                return
            yield (call := extend(job, self._order.lease))
            with suppress(JobLost):
                call.accept(leases)
                return
            self._ready = self._ready[1:]

    def _take(self, until: float, done: Settle | None) -> Iterator[Call]:
        jobs = self._jobs
        tokens: list[bytes] = []
        self._tokens = tokens
        if jobs.tokens and (kept := jobs.tokens.get(self._order.token_key)):
            with suppress(IndexError):
                # Atomic, so that neither threads nor interrupts can come in between.
                tokens.extend(map(list.pop, (kept,)))
            if not kept:
                jobs.tokens.pop(self._order.token_key, None)
        call = Take(self._mq._session, jobs, self._order, tokens, until, done)  # noqa: SLF001
        found: list[Job] = []
        was_full = False
        while not found:
            yield call
            if done is not None:
                self._end(done)
                done = None
            try:
                found = call.jobs(self._mq)
            except Full as error:
                if time.monotonic() >= until:
                    raise
                if not was_full:
                    _logger.warning("waiting for a job of %r: %s", self._order.topic, error)
                was_full = True
            if time.monotonic() >= until:
                break
        jobs.add(found, self._order.lease)
        self._ready = found[: self._order.max_jobs]
        # An interrupted take that had this token may have requested more.
        for job in found[self._order.max_jobs :]:
            yield (surplus := give_back(job, 0.0))
            with suppress(JobLost):
                surplus.accept(jobs.leases)

    def hand_out(self) -> Job | None:
        """Return the job that is ready, if any."""
        self._given = self._ready[0] if self._ready else None
        return self._given

    def interrupted(self, *, is_over: bool = False) -> None:
        """Pass the job that did not reach the caller to the next call, or to the next loop if this one is over."""
        self._given = None
        if self._tokens and (is_over or not self._ready):
            kept = self._jobs.tokens
            kept.setdefault(self._order.token_key, []).extend(self._tokens)
            for key in list(kept)[:-_MANY_JOBS]:
                # Its job is given again when its lease has ended.
                kept.pop(key, None)
        self._tokens = []

    def left(self) -> Iterator[Settle]:
        """Return calls that give back the jobs that the caller or this loop has, and finish one that is finished."""
        jobs = [self._finished, *self._ready] if self._finished else self._ready
        return leave(self._mq, [job.receipt for job in jobs], self._finished)
