"""Jobs: messages that each go to one of several workers. Without I/O, for both clients."""

from __future__ import annotations

import binascii
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from dsmq.client import arguments
from dsmq.client.message import Message
from dsmq.client.replies import as_number, as_text, check
from dsmq.client.requests import MAX_WAIT_SECONDS, Call, Read
from dsmq.errors import JobLost, ProtocolError, ReplyError
from dsmq.system import boot_time, process
from dsmq.wire.limits import MAX_COUNT
from dsmq.wire.resp import encode_request

if TYPE_CHECKING:
    from dsmq.client.requests import Producer
    from dsmq.client.session import Session

# A job taken in advance gets a new lease if less than this share of its lease is left when its turn comes.
_FRESH = 0.9
# Beyond this number of jobs, those whose lease has ended are forgotten.
_MANY_JOBS = 1000

# No job is given so often.
_NO_ATTEMPT = 2**63 - 1

Receipt: TypeAlias = tuple[str, str, int, int, str]
"""The topic or pattern, the group, the id, the attempt and the epoch."""


class Job(Message):
    """A message to work on, until it is done, given back, or its lease ends.

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
            raise TypeError("an asyncio client's job needs `async with`, and an unpickled one done() or give_back()")
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self._mq._leave([self.receipt])  # noqa: SLF001
        elif self._is_held:
            self._mq.done(self)

    async def __aenter__(self) -> Self:
        if not hasattr(self._mq, "__aenter__"):
            raise TypeError("a blocking client's job needs `with`, and an unpickled one done() or give_back()")
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            await self._mq._leave([self.receipt])  # noqa: SLF001
        elif self._is_held:
            await self._mq.done(self)


class Jobs:
    """The jobs that a client holds in this process, and the tokens of its interrupted takes."""

    def __init__(self) -> None:
        self.leases: dict[Receipt, float] = {}
        """When the lease of each job ends, unless it was extended, by `boot_time`."""
        self.tokens: dict[tuple[bytes, ...], list[bytes]] = {}
        """By topic, group and number of jobs."""
        self._max_leases = _MANY_JOBS

    def add(self, jobs: list[Job], lease: float) -> None:
        now = boot_time()
        self.leases.update({job.receipt: now + lease for job in jobs})
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

    __slots__ = ("_epoch", "_is_repeated", "_key", "_once", "_verb", "_words")

    def __init__(self, verb: bytes, receipt: Receipt, *words: bytes, once: bool = False) -> None:
        """`once`: don't send it again when the connection breaks."""
        topic, group, message_id, attempt, self._epoch = receipt
        self._key, self._words = (topic.encode(), group.encode(), b"%d" % message_id), words
        super().__init__(encode_request(verb, *self._key, b"%d" % attempt, *words))
        self._verb, self._once, self._is_repeated = verb, once, False

    def request(self, producer: Producer) -> bytes:
        if producer.era and producer.era.epoch != self._epoch:
            # The server has lost its messages, and may have given the id to another one.
            return encode_request(self._verb, *self._key, b"%d" % _NO_ATTEMPT, *self._words)
        return self._request

    def on_connection_lost(self, error: Exception) -> bool:
        if self._once:
            raise self.to_error(error) from error
        self._is_repeated = True
        return False

    def accept(self, leases: dict[Receipt, float], job: Job) -> None:
        """Process the reply. Raises JobLost, or another error of the server."""
        error = self.reply if isinstance(self.reply, ReplyError) else None
        if isinstance(error, JobLost) or not (error or self._verb == b"EXTEND"):
            leases.pop(job.receipt, None)
        if error and not (isinstance(error, JobLost) and self._verb == b"RETURN" and self._is_repeated):
            raise error


def done(job: Job) -> Settle:
    return Settle(b"DONE", _receipt(job))


def give_back(job: Job, delay: float) -> Settle:
    return Settle(b"RETURN", _receipt(job), _milliseconds("delay", delay, zero=True))


def extend(job: Job, seconds: float) -> Settle:
    return Settle(b"EXTEND", _receipt(job), _milliseconds("seconds", seconds))


def leave(leases: dict[Receipt, float], receipts: list[Receipt], finished: Job | None = None) -> Iterator[Settle]:
    """Yield calls that give back those jobs that are still held, and finish one."""
    for receipt in receipts:
        if leases.pop(receipt, None) is not None:
            is_done = finished and finished.receipt == receipt
            yield Settle(b"DONE" if is_done else b"RETURN", receipt, once=True)


def _receipt(job: Job) -> Receipt:
    if not isinstance(job, Job):
        raise TypeError(f"a job should be what take() returns, not {type(job).__name__}")
    return job.receipt


def _milliseconds(name: str, value: object, *, zero: bool = False) -> bytes:
    if (seconds := arguments.seconds(name, value, zero=zero)) > 86_400:
        raise ValueError(f"{name} should be at most 86400 seconds, not {value!r}")
    return b"%d" % max(not zero, round(seconds * 1000))


class Take(Read):
    """A TAKE, which gets the same jobs if it is repeated with the same token. It waits like a READ."""

    __slots__ = ("_epoch", "_key", "_lease", "_process", "_tokens")

    def __init__(
        self, session: Session, key: tuple[bytes, ...], lease: bytes, tokens: list[bytes], until: float
    ) -> None:
        self._session, self._key, self._lease, self._tokens, self._until = session, key, lease, tokens, until
        self._process, self._epoch = process(), ""

    def request(self, producer: Producer) -> bytes:
        self._epoch = producer.era.epoch if producer.era else ""
        if not self._tokens or self._process is not process():
            # A forked child must not get its parent's jobs.
            self._process, self._tokens[:] = process(), [binascii.b2a_base64(os.urandom(12), newline=False)]
        self._asked_at = time.monotonic()
        self.seconds = max(0.0, min(self._until - self._asked_at, MAX_WAIT_SECONDS))
        wait = (b"WAIT", b"%d" % ms) if (ms := round(self.seconds * 1000)) else ()
        topic, group, count = self._key
        options = (*wait, b"COUNT", count, b"TOKEN", self._tokens[0])
        return encode_request(b"TAKE", topic, group, self._lease, *options)

    def jobs(self, mq: Any, key: tuple[str, str]) -> list[Job]:
        """Return the jobs in the reply. Raises the server's error, or ProtocolError."""
        reply, now, found = check(self.reply), time.time(), []
        if not isinstance(reply, list) or len(reply) % 7 or not all(isinstance(body, bytes) for body in reply[4::7]):
            raise ProtocolError("the reply to TAKE does not consist of jobs")
        for topic, message_id, number, age, body, _, attempt in zip(*[iter(reply)] * 7, strict=True):
            job = Job(as_text(topic), as_number(message_id), as_number(number), now - as_number(age) / 1000, body)
            job.attempt, job.key, job._mq = as_number(attempt), key, mq  # noqa: SLF001 - made here
            job._epoch = self._epoch  # noqa: SLF001
            found.append(job)
        return found


class Work:
    """A loop over jobs. An interrupt may end a call at any step: then `interrupted` is called."""

    def __init__(  # noqa: PLR0913, PLR0917 - what a loop consists of
        self, mq: Any, topic: str, group: str, seconds: float, lease: float, prefetch: int = 1
    ) -> None:
        """Raises TypeError or ValueError if an argument is invalid."""
        name, group_name = arguments.topic_or_pattern(topic), arguments.short_name("group", group)
        n = arguments.count("prefetch", prefetch)
        if not group_name:
            raise ValueError("the name of the group is empty")
        if not n:
            raise ValueError("prefetch should be 1 or more, not 0")
        self._seconds, self._lease = arguments.seconds("timeout", seconds), lease
        self._lease_ms = _milliseconds("lease", lease)
        self._key, self._request = (topic, group), (name, group_name, b"%d" % min(n, MAX_COUNT))
        # The token of the last take, until its first job has been handed out.
        self._tokens: list[bytes] = []
        # The first is the next to be handed out; while the caller works on it, it is `_given`, and then `_finished`.
        self._ready: list[Job] = []
        self._given: Job | None = None
        self._finished: Job | None = None
        self._mq = mq

    @property
    def _jobs(self) -> Jobs:
        return jobs_of(self._mq._session)  # noqa: SLF001 - made for this

    def begin(self) -> None:
        """Note that the caller requests the next job, so its current one is finished."""
        if self._given is not None:
            self._finished = self._given
            self._given = None
        self._tokens = []

    def calls(self) -> Iterator[Call]:
        """Yield calls that finish the caller's job, and prepare the next one, if there is one in time.

        Each call must be made before the next one is taken from the iterator. Raises JobLost.
        """
        until = time.monotonic() + self._seconds if self._seconds else 0.0
        leases = self._jobs.leases
        if self._finished is not None:
            if self._finished.receipt in leases:
                yield (call := done(self._finished))
                call.accept(leases, self._finished)
            self._finished = None
        while True:
            self._ready = [job for job in self._ready if job.receipt in leases]
            if not self._ready:
                yield from self._take(until)
                return
            job = self._ready[0]
            if leases.get(job.receipt, 0.0) - boot_time() > _FRESH * self._lease:
                return
            yield (call := extend(job, self._lease))
            with suppress(JobLost):
                call.accept(leases, job)
                return

    def _take(self, until: float) -> Iterator[Call]:
        tokens: list[bytes] = []
        self._tokens = tokens
        if kept := self._jobs.tokens.get(self._request):
            with suppress(IndexError):
                # Atomic, so that neither threads nor interrupts can come in between.
                tokens.extend(map(list.pop, (kept,)))
        call = Take(self._mq._session, self._request, self._lease_ms, tokens, until)  # noqa: SLF001
        found: list[Job] = []
        while not found:
            yield call
            found = call.jobs(self._mq, self._key)
            if time.monotonic() >= until:
                break
        self._jobs.add(found, self._lease)
        self._ready += found

    def hand_out(self) -> Job | None:
        """Return the job that is ready, if any."""
        self._given = self._ready[0] if self._ready else None
        return self._given

    def interrupted(self, *, is_over: bool = False) -> None:
        """Make the next call, or if this loop is over, the next loop, get the job that the caller did not get."""
        self._given = None
        if is_over or not self._ready:
            self._jobs.tokens.setdefault(self._request, []).extend(self._tokens)
        self._tokens = []

    def left(self) -> tuple[list[Receipt], Job | None]:
        """Return the jobs that the caller or this loop has, and the one of them that is finished."""
        jobs = [self._finished, *self._ready] if self._finished else self._ready
        return [job.receipt for job in jobs], self._finished
