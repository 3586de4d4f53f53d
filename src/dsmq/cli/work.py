"""`dsmq work`: runs a command for each job."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from dsmq.client.replies import reason
from dsmq.errors import ConfigError, DSMQError, JobLost
from dsmq.terminal import printable, quoted

if TYPE_CHECKING:
    from dsmq.client import DSMQClientSideConnection
    from dsmq.client.jobs import Job


# How long a command may take to end after SIGTERM.
_KILL_SECONDS = 5.0
# Windows has none.
_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def work(options: argparse.Namespace, connect: Callable[[], DSMQClientSideConnection]) -> None:
    program = options.program[0]
    if shutil.which(program) is None:
        raise ConfigError(f"{quoted(program)}: command not found")
    with connect() as mq:
        worker = _Worker(mq, options)
        with suppress(_Stopped):
            while job := worker.take():
                worker.run(job)
    if worker.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt


class _Stopped(Exception):
    """A signal has arrived."""


class _Worker:
    """Runs the command for each job. Forwards SIGINT and SIGTERM to the command and then takes no more jobs."""

    def __init__(self, mq: DSMQClientSideConnection, options: argparse.Namespace) -> None:
        self._mq, self._options = mq, options
        self._process: subprocess.Popen[bytes] | None = None
        self._is_taking = False
        self.stopped_by = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.stopped_by = number
        self._pass_on(number)
        if self._is_taking:
            raise _Stopped

    def _pass_on(self, number: int) -> None:
        """Send a signal to the command and to the processes that it has started."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, number)
                else:
                    self._process.terminate()

    def take(self) -> Job | None:
        options = self._options
        try:
            # Set this first, so that no signal is missed in between.
            self._is_taking = True
            if self.stopped_by:
                raise _Stopped
            return self._mq.take(options.topic, options.group, timeout=options.wait, lease=options.lease)
        finally:
            self._is_taking = False

    def run(self, job: Job) -> None:
        """Run the command for a job, then finish the job or give it back."""
        try:
            if not (status := self._status(job)):
                self._mq.done(job)
                return
            self._mq.give_back(job, delay=0 if self.stopped_by else self._options.delay)
            about = "given back: " + (f"exit status {status}" if status > 0 else f"killed by signal {-status}")
        except JobLost as error:
            about = f"lost: {error}"
        sys.stderr.write(printable(f"dsmq: job {job.id} of {quoted(job.topic)} {about}") + "\n")

    def _status(self, job: Job) -> int:
        """Return the exit status of the command; extend the lease while it runs. Raises JobLost."""
        variables = {"DSMQ_TOPIC_NAME": job.topic.replace("\0", "\\0"), "DSMQ_JOB_ID": str(job.id)}
        variables["DSMQ_ATTEMPT"] = str(job.attempt)
        # The command gets its own process group; otherwise, the terminal would send signals to it as well.
        group: dict[str, Any] = {"process_group": 0} if hasattr(os, "killpg") else {}
        try:
            with _file_of(job.body) as body:
                process = subprocess.Popen(  # noqa: S603 - the user's own command
                    self._options.program, stdin=body, env=os.environ | variables, **group
                )
        except OSError as error:
            raise DSMQError(f"{self._options.program[0]}: {reason(error)}") from None
        self._process = process
        try:
            if self.stopped_by:
                self._pass_on(self.stopped_by)
            return self._wait(process, job)
        finally:
            self._end(process)

    def _wait(self, process: subprocess.Popen[bytes], job: Job) -> int:
        while True:
            try:
                return process.wait(self._options.lease / 3)
            except subprocess.TimeoutExpired:
                self._mq.extend(job, self._options.lease)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Stop the command if it is still running, because another worker may get the job now."""
        self._pass_on(signal.SIGTERM)
        try:
            process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._pass_on(_SIGKILL)
            process.wait()


def _file_of(body: bytes) -> IO[bytes]:
    """Return a temporary file with a message.

    A pipe would have to be written while the command runs, and a process that keeps it open could block that.
    """
    # In memory if possible: there may be no folder for temporary files.
    has_memory = hasattr(os, "memfd_create")
    file = os.fdopen(os.memfd_create("message"), "w+b") if has_memory else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(body)
    file.seek(0)
    return file
