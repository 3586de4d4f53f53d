"""The checker of workers accepts correct histories and finds every kind of violation, in hand-made histories."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from chaos.checker import RESTORE_GAP
from chaos.history import Event, History, JobFailed, NoJob, Put, Sent, Server, Settled, Taken
from chaos.job_checker import check_jobs, unfinished

LEASE, MAX_ATTEMPTS = 1.0, 3
SERVER = Server("e1", "r1", 0, 0.0)
# It is killed at 50; its last snapshot is of 30.
KILLED = [
    replace(SERVER, ended=50.0, kept_until=30.0),
    Server("e1", "r2", 100 + RESTORE_GAP, 51.0),
]


def put(number: int, at: float = 1.0, **more: object) -> Put:
    return replace(Put("p", "t", f"p {number}", at, at + 0.1, number), **more)  # type: ignore[arg-type]


def sent(at: float, token: str = "", **more: object) -> Sent:
    return replace(Sent("w", "t", "g", token or f"at {at}", at, LEASE), **more)  # type: ignore[arg-type]


def take(number: int, at: float, attempt: int = 1, worker: str = "w", token: str = "") -> list[Event]:
    token = token or f"at {at}"
    taken = Taken(worker, "t", "g", token, "t", number, attempt, f"p {number}", at, at, at + 0.1, LEASE)
    return [sent(at, token, worker=worker), taken]


def end(
    number: int,
    at: float,
    attempt: int = 1,
    worker: str = "w",
    *,
    verb: str = "done",
    reply: str = "OK",
    **more: object,
) -> Settled:
    ended = at + 0.1 if reply else math.inf
    event = Settled(worker, "t", "g", verb, number, attempt, f"p {number}", at, ended, reply, int(bool(reply)))
    return replace(event, **more)  # type: ignore[arg-type]


def empty(at: float, wait: float = 0.0) -> list[Event]:
    return [sent(at, wait=wait), NoJob("w", "t", "g", f"at {at}", at, at, at + wait + 0.1, wait)]


def done(number: int, at: float, attempt: int = 1, worker: str = "w") -> list[Event]:
    return [*take(number, at, attempt, worker), end(number, at + 0.2, attempt, worker)]


def kinds(*events: Event, max_age: float = 600.0) -> list[str]:
    return sorted(
        {violation.kind for violation in check_jobs(History(max_age, max_attempts=MAX_ATTEMPTS, events=list(events)))}
    )


CLEAN: dict[str, list[Event]] = {
    "nothing": [],
    "done": [SERVER, put(1), *done(1, 2.0)],
    "done, but the worker was killed before the reply": [SERVER, put(1), *take(1, 2.0), end(1, 2.2, reply="")],
    "given again after its lease": [SERVER, put(1), *take(1, 2.0), *done(1, 3.0, 2, "v")],
    "late, but nobody else had it": [SERVER, put(1), *take(1, 2.0), end(1, 9.0)],
    "late, and lost": [SERVER, put(1), *take(1, 2.0), *done(1, 4.0, 2, "v"), end(1, 5.0, reply="JOBLOST")],
    "returned, and given at once": [SERVER, put(1), *take(1, 2.0), end(1, 2.2, verb="return"), *done(1, 2.4, 2, "v")],
    "a shorter lease": [
        *(SERVER, put(1), *take(1, 2.0), end(1, 2.2, verb="extend", seconds=0.1)),
        *done(1, 2.4, 2, "v"),
    ],
    "a shorter lease, whose reply was lost": [
        *(SERVER, put(1), *take(1, 2.0), *done(1, 2.4, 2, "v")),
        end(1, 2.2, verb="extend", seconds=0.1, reply="JOBLOST", ended=2.6),
    ],
    "a put that raised": [SERVER, put(1, id=None, error="ConnectionLost")],
    "too old": [SERVER, put(1), *empty(9.0)],
    "nobody knows the first attempt": [SERVER, put(1), sent(2.0), *done(1, 4.0, 2)],
    "nobody knows the first attempt, of a client that sent its request again later": [
        *(SERVER, put(1), put(2), sent(2.0, "x"), replace(empty(2.0)[1], token="x", ended=5.0), *done(1, 4.0, 2)),  # type: ignore[type-var]
        *done(2, 6.0),
    ],
    "failed": [SERVER, put(1), *take(1, 2.0), *take(1, 4.0, 2), JobFailed("t", "p 1")],
    "lost in a kill": [*KILLED, put(101, 40.0), *empty(60.0)],
    "done again after a kill": [*KILLED, put(1), *done(1, 40.0), *done(1, 60.0, 1, "v")],
    "given before a kill, at the same time again": [*KILLED, put(1), *take(1, 49.7), *done(1, 50.2, 1, "v")],
    "done twice with the same receipt": [*KILLED, put(1), *take(1, 49.0), *done(1, 60.0, 1, "v"), end(1, 61.0)],
    "waited for a later job": [SERVER, *empty(1.0, 3.0), put(1, 6.0), *done(1, 7.0)],
}
WRONG: dict[str, tuple[list[str], list[Event]]] = {
    "never done": (["not done"], [SERVER, put(1), *take(1, 2.0), *empty(9.0)]),
    "lost in a kill, although the snapshot has it": (["not done"], [*KILLED, put(1, 20.0), *empty(60.0)]),
    "one of nobody": (["strange job"], [SERVER, *done(1, 2.0)]),
    "one that was not stored": (
        ["strange job"],
        [SERVER, put(1, id=None, error="Full", may_be_stored=False), *done(1, 2.0)],
    ),
    "given within the lease": (["two at once"], [SERVER, put(1), *take(1, 2.0), *done(1, 2.5, 2, "v")]),
    "given within the longer lease": (
        ["two at once"],
        [SERVER, put(1), *take(1, 2.0), end(1, 2.5, verb="extend", seconds=5.0), *done(1, 4.0, 2, "v")],
    ),
    "the same attempt": (["two at once"], [SERVER, put(1), *take(1, 2.0), *done(1, 9.0, 1, "v")]),
    "given before a snapshot, within the lease": (
        ["two at once"],
        [*KILLED, put(1), *take(1, 29.5), *done(1, 29.8, 2, "v")],
    ),
    "given after it was done": (["given after done"], [SERVER, put(1), *done(1, 2.0), *take(1, 4.0, 2, "v")]),
    "done before the snapshot": (["given after done"], [*KILLED, put(1), *done(1, 20.0), *take(1, 60.0, 2, "v")]),
    "done twice": (
        ["done late", "done twice"],
        [SERVER, put(1), *take(1, 2.0), *done(1, 4.0, 2, "v"), end(1, 5.0)],
    ),
    "lost within the lease": (
        ["lost early"],
        [SERVER, put(1), *take(1, 2.0), end(1, 2.2, reply="JOBLOST"), *done(1, 4.0, 2)],
    ),
    "lost within the shorter lease": (
        ["lost early"],
        [SERVER, put(1), *take(1, 2.0), end(1, 2.2, verb="extend", seconds=0.4, reply="JOBLOST"), *done(1, 4.0, 2)],
    ),
    "done, and lost when it is done again": (
        ["lost early"],
        [SERVER, put(1), *done(1, 2.0), end(1, 2.4, reply="JOBLOST")],
    ),
    "an attempt is missing": (["attempt"], [SERVER, put(1), *take(1, 2.0), *done(1, 4.0, 3, "v")]),
    "more are missing than anybody may have got": (
        ["attempt"],
        [SERVER, put(1), put(2), sent(2.0), *done(1, 4.0, 2), *done(2, 5.0, 2)],
    ),
    "a token gets nothing, then the job is given again": (
        ["attempt"],
        [SERVER, put(1), sent(2.0, "x"), sent(2.1, "x"), replace(empty(2.1)[1], token="x"), *done(1, 4.0, 2)],  # type: ignore[type-var]
    ),
    "out of order": (["order of jobs"], [SERVER, put(1), put(2), *done(2, 2.0), *done(1, 3.0)]),
    "a worker waits in vain": (["left lying"], [SERVER, put(1), *empty(2.0, 3.0), *done(1, 7.0)]),
    "failed and done": (["failed although done"], [SERVER, put(1), *done(1, 2.0), JobFailed("t", "p 1")]),
    "failed twice": (["failed twice"], [SERVER, put(1), *take(1, 2.0), *[JobFailed("t", "p 1")] * 2]),
    "failed late": (
        ["failed late"],
        [SERVER, put(1), *(sent(1.0, f"x{one}") for one in range(3)), *take(1, 2.0, 3), *done(1, 4.0, 4)],
    ),
}


@pytest.mark.parametrize("name", CLEAN)
def test_checker_accepts_correct_history(name: str) -> None:
    assert kinds(*CLEAN[name], max_age=5.0 if name == "too old" else 600.0) == []


@pytest.mark.parametrize("name", WRONG)
def test_checker_finds_each_violation(name: str) -> None:
    wanted, events = WRONG[name]
    assert kinds(*events) == sorted(wanted)


def test_each_group_must_do_all_jobs() -> None:
    history = History(events=[SERVER, put(1), put(2, topic="other"), *done(1, 2.0)])
    assert unfinished(history, ("t", "g")) == []
    assert [one.body for one in unfinished(history, ("t", "h"))] == ["p 1"]
    assert [one.body for one in unfinished(history, ("*", "g"))] == ["p 1", "p 2"]


def test_history_of_workers_round_trips_through_file(tmp_path: Path) -> None:
    history = History(events=[*done(1, 2.0), *empty(3.0), end(1, 4.0, reply=""), JobFailed("t", "p 1")])
    history.save(tmp_path / "history.jsonl")
    again = History()
    again.load(tmp_path / "history.jsonl")
    assert again == history
