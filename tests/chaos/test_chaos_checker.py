"""The checker of tests/chaos accepts correct histories and finds every kind of violation, in hand-made histories."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from chaos.checker import RESTORE_GAP, check
from chaos.history import INTERRUPTED, Broken, Died, Empty, Event, Got, Held, History, Put, Reader, Server

SERVER = Server("e1", "r1", 0, 0.0)
READER = Reader("r", ("t",), "e1", 0, 0.5, 100.0)


def put(number: int, at: float | None = None, **more: object) -> Put:
    """A completed put, one per second."""
    at = float(number) if at is None else at
    return replace(Put("w", "t", f"w {number}", at, at + 0.1, number), **more)  # type: ignore[arg-type]


def raised(number: int, at: float | None = None, *, may_be_stored: bool = True, error: str = "ConnectionLost") -> Put:
    return put(number, at, id=None, error=error, may_be_stored=may_be_stored)


def got(number: int, at: float | None = None, **more: object) -> Got:
    at = number + 0.5 if at is None else at
    return replace(Got("r", "t", f"w {number}", at, at + 0.1, number, number), **more)  # type: ignore[arg-type]


def empty(at: float, timeout: float = 0.0) -> Empty:
    return Empty("r", "t", at, at + timeout + 0.01, timeout)


def held(*numbers: int, server: str = "a", at: float = 50.0, **bodies: str) -> Held:
    """Messages whose ids are their numbers."""
    messages = [(number, number, bodies.get(f"body{number}", f"w {number}")) for number in numbers]
    return Held(server, "t", at, at + 0.1, tuple(messages))


def kinds(*events: Event, max_age: float = 600.0) -> list[str]:
    return [violation.kind for violation in check(History(max_age, events=list(events)))]


def read(*numbers: int, **more: object) -> list[Event]:
    return [event for number in numbers for event in (put(number), got(number, **more))]


OTHER_NUMBER = replace(got(1, 2.0, reader="s"), number=2)
SAME_NUMBER = replace(got(2), number=1)
CLEAN: dict[str, list[Event]] = {
    "held by both servers": [SERVER, put(1), put(2), held(1, 2), held(1, 2, server="b")],
    "held, then more": [SERVER, put(1), put(2, 60.0), held(1), held(1, server="b"), held(1, 2, at=70.0)],
    "held, although it raised": [SERVER, raised(1), held(1)],
    "nothing": [],
    "everything is read": [SERVER, READER, *read(1, 2, 3), empty(4)],
    "earlier messages are not read": [SERVER, replace(READER, start_id=1), put(1), *read(2)],
    "a put that raised is stored": [SERVER, READER, raised(1), got(1), *read(2)],
    "a put that raised is stored late": [SERVER, READER, raised(1), *read(2), got(1, 9.0, id=3), empty(1.9)],
    "a put that raised is not stored": [SERVER, READER, raised(1, may_be_stored=False), *read(2)],
    "an interrupted put is stored": [SERVER, READER, raised(1, error=INTERRUPTED), got(1)],
    "empty while a put is in flight": [SERVER, READER, put(1, 1.0), empty(1.05), got(1)],
    "concurrent puts in any order": [SERVER, put(1, 1.05), put(2, 1.0), READER, got(1, 3.0), got(2, 4.0)],
    "older messages skipped": [SERVER, READER, put(1), put(2), got(2, 3.0, latest=True), empty(4)],
    "an interrupted read takes one": [
        *(SERVER, READER, put(1), put(2), Broken("r", "t", 2.5, 2.6, INTERRUPTED, 1)),
        *(got(1, 2.2), empty(3), *read(4)),
    ],
    "an interrupted read among messages with unknown ids": [
        *(SERVER, READER, put(1), Broken("r", "t", 2.5, 2.6, INTERRUPTED, 1)),
        *(raised(2, error=INTERRUPTED), got(2, 3.0, id=None), *read(4)),
    ],
    "an interrupted read, and later all older messages skipped": [
        *(SERVER, READER, put(1), Broken("r", "t", 1.5, 1.6, INTERRUPTED, 1), empty(2)),
        *(put(3), got(3, 4.0, latest=True)),
    ],
    "a reader that did not finish": [SERVER, replace(READER, finished=None), put(1)],
    "expired messages are not read": [SERVER, replace(READER, finished=900.0), put(1), empty(800)],
    "threads that share a reader": [
        *(SERVER, READER, put(1), put(2)),
        *(got(2, 3.0, thread="b"), got(1, 3.0, thread="a")),
    ],
    "a graceful restart": [replace(SERVER, ended=1.5), Server("e1", "r1", 1, 1.7), READER, *read(1, 2)],
    "a kill without snapshot": [
        replace(SERVER, ended=2.5, kept_until=-math.inf),
        *(Server("e2", "r2", 0, 3.0), READER, *read(1), put(2), put(4, id=1), got(4, id=1)),
    ],
    "a kill without snapshot loses a message already read": [
        replace(SERVER, ended=2.5, kept_until=-math.inf),
        *(Server("e2", "r2", 0, 3.0), READER, *read(1, 2), put(4, id=1), got(4, id=1)),
    ],
    "a kill with a snapshot": [
        replace(SERVER, ended=3.5, kept_until=1.5),
        Server("e1", "r2", 1 + RESTORE_GAP, 4.0),
        *(READER, *read(1), put(2), *read(3), put(5, id=2 + RESTORE_GAP), got(5, id=2 + RESTORE_GAP), empty(3.9)),
    ],
}

WRONG: dict[str, tuple[list[str], list[Event]]] = {
    "held by one server alone": (["servers differ"], [SERVER, put(1), put(2), held(1, 2), held(1, server="b")]),
    "held by no server": (["lost"], [SERVER, put(1), put(2), held(1), held(1, server="b")]),
    "held twice": (["stored twice"], [SERVER, put(1), held(1, 2, body2="w 1")]),
    "held under another id": (["stored twice"], [SERVER, put(1, id=2), held(1)]),
    "held, but refused": (["not stored"], [SERVER, raised(1, may_be_stored=False), held(1)]),
    "held, but put by nobody": (["strange"], [SERVER, put(1), held(1, 2)]),
    "held with a hole": (["hole"], [SERVER, put(1), put(3), held(1, 3)]),
    "numbers that differ": (
        ["numbers"],
        [SERVER, READER, *read(1), replace(READER, name="s"), OTHER_NUMBER, held(1)],
    ),
    "numbers that do not increase": (["numbers"], [SERVER, READER, *read(1), put(2), SAME_NUMBER, held(1, 2)]),
    "a client that fails": (["died"], [SERVER, Died("r", "KeyError")]),
    "lost": (["unread"], [SERVER, READER, *read(1), put(2), *read(3)]),
    "lost at the end": (["unread"], [SERVER, READER, *read(1), put(2)]),
    "not read by one of two": (
        ["unread"],
        [SERVER, READER, *read(1), replace(READER, name="s")],
    ),
    "read twice": (["read twice", "order of reads"], [SERVER, READER, *read(1), got(1, 2.0)]),
    "read twice by two threads": (
        ["read twice"],
        [SERVER, READER, *read(1, thread="a"), got(1, 2.0, thread="b")],
    ),
    "stored twice": (["stored twice", "read twice", "order of reads"], [SERVER, READER, *read(1), got(1, 2.0, id=2)]),
    "a put that raised is stored twice": (
        ["stored twice"],
        [SERVER, READER, raised(1), got(1), replace(READER, name="s"), got(1, reader="s", id=2)],
    ),
    "an id other than the put returned": (["stored twice"], [SERVER, READER, put(1), got(1, id=2)]),
    "an id of two messages": (
        ["id reused", "order of reads"],
        [SERVER, READER, *read(1), put(2, id=1), got(2, id=1)],
    ),
    "an id of two unread messages": (["id reused"], [SERVER, put(1), put(2, id=1)]),
    "puts swap places": (["order of puts"], [SERVER, put(2, 1.0), put(1, 2.0)]),
    "puts of two writers swap places": (
        ["order of puts"],
        [SERVER, put(2, 1.0), put(3, 1.0), put(1, 2.0, writer="v")],
    ),
    "reads swap places": (
        ["order of reads"],
        [SERVER, READER, put(1), put(2), got(2, 3.0), got(1, 4.0)],
    ),
    "reads swap places, seen by a reader without ids": (
        ["order of reads"],
        [SERVER, READER, put(1), put(2), got(2, 3.0, id=None), got(1, 4.0, id=None)],
    ),
    "empty while there is a message": (["wrong empty"], [SERVER, READER, put(1), empty(2), got(1, 3.0)]),
    "a wait that misses a new message": (["wrong empty"], [SERVER, READER, put(1), empty(0.5, 2.0), got(1, 3.0)]),
    "read before it is put": (["strange"], [SERVER, READER, put(1), got(1, 0.6)]),
    "nobody put it": (["strange"], [SERVER, READER, got(1)]),
    "in another topic": (["strange"], [SERVER, READER, raised(1), got(1, topic="u")]),
    "stored though reported as not stored": (["not stored"], [SERVER, READER, raised(1, may_be_stored=False), got(1)]),
    "put before the reader connected": (["not eligible"], [SERVER, replace(READER, start_id=1), *read(1)]),
    "too old": (["expired"], [SERVER, replace(READER, finished=None), put(1), got(1, 700.0)]),
    "an interrupted read takes two": (
        ["unread"],
        [SERVER, READER, *read(1), put(2), put(3), Broken("r", "t", 3.5, 3.6, INTERRUPTED, 1), *read(4)],
    ),
    "an interrupted read takes from another position": (
        ["unread"],
        [SERVER, READER, put(1), *read(2), Broken("r", "t", 3.5, 3.6, INTERRUPTED, 1), *read(4)],
    ),
    "a read that raised takes one": (
        ["unread"],
        [SERVER, READER, put(1), Broken("r", "t", 1.5, 1.6, "ConnectionLost"), *read(2)],
    ),
    "a graceful restart loses all": (
        ["lost", "identity"],
        [
            *(replace(SERVER, ended=2.5), Server("e2", "r2", 0, 3.0), READER, put(1)),
            *(replace(READER, name="s", epoch="e2"), put(4, id=1), got(4, id=1), got(4, id=1, reader="s")),
        ],
    ),
    "a graceful restart forgets puts": (
        ["identity"],
        [replace(SERVER, ended=1.5), Server("e1", "r2", 1 + RESTORE_GAP, 1.7), READER, *read(1)],
    ),
    "a graceful restart loses one": (
        ["unread", "wrong empty"],
        [replace(SERVER, ended=2.5), Server("e1", "r1", 2, 3.0), READER, *read(1), put(2), empty(3)],
    ),
    "a kill loses what the snapshot holds": (
        ["lost"],
        [
            *(replace(SERVER, ended=3.5, kept_until=2.5), Server("e1", "r2", 1 + RESTORE_GAP, 4.0)),
            *(READER, *read(1), put(2), put(3)),
        ],
    ),
    "a kill loses one in the middle of the snapshot": (
        ["unread"],
        [
            *(replace(SERVER, ended=4.5, kept_until=2.5), Server("e1", "r2", 3 + RESTORE_GAP, 5.0)),
            *(READER, *read(1), put(2), *read(3), put(4)),
        ],
    ),
    "a kill, and ids start over": (
        ["id reused", "order of reads"],
        [
            *(replace(SERVER, ended=2.5, kept_until=1.5), Server("e1", "r2", 1 + RESTORE_GAP, 3.0)),
            *(READER, *read(1, 2), put(4, id=2), got(4, id=2)),
        ],
    ),
    "empty before the kill": (
        ["wrong empty"],
        [replace(SERVER, ended=9.0, kept_until=-math.inf), Server("e2", "r2", 0, 9.5), READER, put(1), empty(2)],
    ),
}


@pytest.mark.parametrize("name", CLEAN)
def test_checker_accepts_correct_history(name: str) -> None:
    assert kinds(*CLEAN[name]) == []


@pytest.mark.parametrize("name", WRONG)
def test_checker_finds_each_violation(name: str) -> None:
    wanted, events = WRONG[name]
    assert sorted(set(kinds(*events))) == sorted(wanted)


def test_violation_shows_evidence() -> None:
    first, second = check(History(600.0, events=[SERVER, READER, *read(1), put(2)]))[0].evidence
    assert (first, second) == (READER, put(2))


def test_history_round_trips_through_file(tmp_path: Path) -> None:
    history = History(
        600.0,
        events=[SERVER, READER, *read(1), raised(2), empty(3), Broken("r", "t", 4.0, 4.1, INTERRUPTED, 1), held(1)],
    )
    history.save(tmp_path / "history.jsonl")
    again = History(600.0)
    again.load(tmp_path / "history.jsonl")
    assert again == history
