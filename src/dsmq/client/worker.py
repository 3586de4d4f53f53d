"""The jobs of the blocking client."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from dsmq.client import jobs
from dsmq.client.connection import Connection
from dsmq.client.core import Client, Retries
from dsmq.client.jobs import Job, Settle, jobs_of
from dsmq.client.requests import Call
from dsmq.errors import DSMQError


class Worker(Client):
    """The methods of a client that is a worker."""

    _run: Callable[..., None]
    _default_wait: Callable[[], float]

    def take(
        self, topic: str, group: str = "workers", *, timeout: float | None = None, lease: float = 60.0
    ) -> Job | None:
        """Take the oldest job of a topic or of all topics that match a pattern; None if there is none in time.

        Each message goes to one worker of a group and to another one if it is not `done` within `lease` seconds (up to
        a day). A group begins with the oldest stored message. `timeout` is as in `get_wait`. If a call is interrupted,
        the next one for the same topic and group gets the same job.

        Raises Full if the server has too many groups or jobs in flight. See `Job`.
        """
        work = jobs.Work(self, topic, group, self._default_wait() if timeout is None else timeout, lease)
        try:
            for call in work.calls():
                self._run(call)
            return work.hand_out()
        except BaseException:
            work.interrupted(is_over=True)
            raise

    def work(
        self, topic: str, group: str = "workers", *, timeout: float = math.inf, lease: float = 60.0, prefetch: int = 1
    ) -> Iterator[Job]:
        """Iterate over jobs as `take` returns them; end when there is none for `timeout` seconds.

        Requesting the next job finishes the current one. If its lease has ended and another worker has it, the loop
        logs a warning and continues with the next job, because a slow job must not stop one worker after another. To
        handle that differently, finish the job yourself with `done` or `with job:`, which raise JobLost.

        If the loop is left by `break` or an exception, the job is given back once Python deletes the iterator; if a
        variable refers to it, call its `close()` or the client's. Up to `prefetch` jobs are taken at once. The leases
        of waiting jobs are extended when their turn comes, and lost jobs are skipped.
        """
        return _Work(self, topic, group, timeout, lease, prefetch)

    def done(self, job: Job) -> None:
        """Finish a job: no worker of its group gets it again. Raises JobLost if its lease has ended."""
        self._settle(jobs.done(job))

    def give_back(self, job: Job, *, delay: float = 0.0) -> None:
        """Return a job to its group: another worker gets it after `delay` seconds (up to a day), before newer ones.

        Raises JobLost if its lease has ended.
        """
        self._settle(jobs.give_back(job, delay))

    def extend(self, job: Job, seconds: float) -> None:
        """Make a job's lease end in `seconds`, up to a day. Raises JobLost if it has already ended."""
        self._settle(jobs.extend(job, seconds))

    def _settle(self, call: Settle) -> None:
        self._run(call)
        call.accept(jobs_of(self._session).leases)

    def _leave(self, calls: Iterator[Call]) -> None:
        """Give back jobs, if the server answers now. Otherwise, their leases will end."""
        with suppress(DSMQError, OSError):
            for call in calls:
                self._run(call, retries=Retries(0.0))


class _Work(jobs.Work, Iterator[Job]):
    """Iterates over jobs. Not a generator, because an interrupt would end it."""

    _mq: Any = None

    def __next__(self) -> Job:
        self.begin()
        try:
            for call in self.calls():
                self._mq._run(call, Connection.ask_several)  # noqa: SLF001 - one module
            if job := self.hand_out():
                return job
        except BaseException:
            self.interrupted()
            raise
        raise StopIteration

    def close(self) -> None:
        """Give back the caller's job and those taken in advance."""
        self._mq._leave(self.left())  # noqa: SLF001

    def __del__(self) -> None:
        # None if an argument was invalid.
        if self._mq is not None:
            self.close()
