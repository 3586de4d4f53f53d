"""Redis client libraries in six languages, against a real server: see harness.py."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import GLIDE, LIBRARIES, Library, Program

from conftest import SOON, Daemon, daemon, serving, wait_until
from dsmq.client import connect

# The first test of a library may have to install it.
pytestmark = [
    pytest.mark.clients,
    pytest.mark.timeout(300),
]

TOKEN = "a-token-of-more-than-16-characters"
PIPELINED = 100_000
MANY = 1000
# Some libraries convert OK.
WATCHED = ("= OK", "= True", "= 1")


@pytest.fixture(params=LIBRARIES, ids=str)
def library(request: pytest.FixtureRequest) -> Library:
    library: Library = request.param
    return library


def check_in_step(program: Program) -> None:
    """Check that each request gets its own reply, even after connections have broken."""
    for number in itertools.count():
        answer = program.call("ECHO", number)
        if answer == f"= {number}":
            break
        # Each library has its own errors for a broken connection; no error may come from the server.
        assert answer[0] == "!"
        assert "CLOSING" not in answer
    assert [program.call("ECHO", word) for word in "abc"] == ["= a", "= b", "= c"]


def test_stop_leaves_no_reply_for_next_command(library: Library) -> None:
    with ExitStack() as stack:
        with serving() as server:
            port = server.port
            program = stack.enter_context(library.running(port))
            check_in_step(program)
        with serving(port=port):
            check_in_step(program)


def test_stop_answers_waiting_reader_once(library: Library) -> None:
    with ExitStack() as stack:
        with serving() as server:
            port = server.port
            program = stack.enter_context(library.running(port))
            program.tell("call", "READ", "t", 0, "WAIT", 60_000)
            wait_until(lambda: server.status.waiting() == 1)
        assert program.answer() == "="
        with serving(port=port):
            check_in_step(program)


def test_pipeline_is_stored_once_in_order(library: Library) -> None:
    with serving() as server, library.running(server.port) as program, connect(port=server.port) as mq:
        program.tell("pipeline", "t", PIPELINED)
        assert program.answer(SOON * 6) == f"= {PIPELINED}"
        assert mq.get_many("t", PIPELINED + 1) == [f"{number:050}" for number in range(PIPELINED)]


def test_transaction_stores_all_or_nothing(library: Library) -> None:
    with serving() as server, library.running(server.port) as program:
        assert program.ask("transaction", "PUT", "t", "a", "PUT", "t", "b") == "= 1 2"
        read = program.ask("transaction", "PUT", "t", "c", "READ", "t", "1").split()
        assert (read[:2], read[5], read[10]) == (["=", "3"], "b", "c")
        for bad in ("FROBNICATE", "t", "x"), ("PUT", "t" * 600, "x"), ("READ", "t", "zero"):
            program.ask("transaction", "PUT", "t", "d", *bad, "PUT", "t", "e")
        check_in_step(program)
        assert server.status.totals().messages == 3


# redigo's pool ends a watch when the connection is returned to it.
@pytest.mark.parametrize("library", [library for library in LIBRARIES if library.name != "redigo"], ids=str)
def test_put_into_watched_topic_cancels_transaction(library: Library) -> None:
    with serving() as server, library.running(server.port) as program, connect(port=server.port) as mq:
        assert program.call("WATCH", "t", "u") in WATCHED
        mq.put("u", "x")
        program.ask("transaction", "PUT", "t", "a", "PUT", "t", "b")
        assert server.status.totals().stored == 1
        check_in_step(program)
        assert program.call("WATCH", "t", "u") in WATCHED
        assert program.ask("transaction", "PUT", "t", "a", "PUT", "t", "b") == "= 2 3"


def test_token_works_with_both_resp_versions(library: Library) -> None:
    with serving(auth_token=TOKEN) as server:
        for protocol in library.protocols:
            with library.running(server.port, protocol, TOKEN) as program:
                assert program.call("PUT", "t", "x")[:2] == "= "
                assert program.call("GET", "nothing-here").rstrip() in ("=", "= None", "= null", "= <nil>")
                check_in_step(program)
        with library.running(server.port, token="a-wrong-token-of-16-characters") as program:
            program.tell("call", "PUT", "t", "x")
            wait_until(lambda: any("invalid token" in error for error in program.errors))
            assert program.said == []
        assert server.status.totals().messages == len(library.protocols)


def test_valkey_glide_connects() -> None:
    with serving() as server, GLIDE.running(server.port) as program:
        assert program.call("PUT", "t", "x") == "= 1"
        check_in_step(program)


def test_library_shutdown_method_works(library: Library) -> None:
    with daemon() as server, library.running(server.port) as program:
        # ioredis waits until the server is back and repeats the request.
        program.tell("shutdown")
        assert server.process.wait(SOON) == 0


def kill(server: Daemon) -> None:
    server.process.kill()
    server.stop()


def test_exactly_once_across_restarts(library: Library, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"

    def kill_and_forget(server: Daemon) -> None:
        kill(server)
        snapshot.unlink()

    server = Daemon("--snapshot-file", str(snapshot))
    try:
        with library.running(server.port) as reader, library.running(server.port) as writer:
            reader.tell("read", "t")
            # The server restarts in the same run, in another run, and in another epoch. More is put after each restart,
            # because a slow reader may find all earlier messages lost.
            ends = Daemon.stop, kill, kill_and_forget
            for first, end in zip(itertools.count(1, MANY), ends, strict=False):
                writer.tell("write", "t", first, first + MANY - 1)
                wait_until(lambda first=first: len(writer.said) >= first - 1 + MANY // 10)
                end(server)
                server = Daemon("--port", str(server.port), "--snapshot-file", str(snapshot))
                assert writer.answer() == "= done"
            writer.tell("write", "t", 1 + len(ends) * MANY, (1 + len(ends)) * MANY)
            assert writer.answer() == "= done"
            assert writer.call("PUT", "t", "end")[:2] == "= "
            assert reader.answer() == "= done"
    finally:
        kill(server)
    check_history(writer.said, [line.split()[2] for line in reader.said][:-1])


def check_history(written: list[str], read: list[str]) -> None:
    """Check that everything was read once and in order, except the last puts before a kill."""
    assert sorted(set(read), key=int) == read
    lives: list[list[str]] = []
    before, doubtful = -1, 0
    for line in written:
        *stored, number = line.split()[1:]
        if not stored:
            doubtful += 1
            continue
        # There is no other writer.
        if int(stored[0]) != before + 1:
            lives.append([])
        lives[-1].append(number)
        before = int(stored[0])
    found = [[number for number in life if number in set(read)] for life in lives]
    assert found == [life[: len(here)] for life, here in zip(lives, found, strict=True)]
    assert found[-1] == lives[-1]
    assert doubtful < len(lives)
    assert sum(map(len, found)) + doubtful >= len(read)
