"""MULTI, EXEC, DISCARD, WATCH and UNWATCH."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from dsmq.broker.arguments import parse_topic
from dsmq.broker.puts import put_together
from dsmq.broker.usage import request_memory
from dsmq.errors import Aborted, BadRequest, ReplyError, TooBig, UnknownCommand
from dsmq.wire.limits import MAX_INTEGER, MAX_NAMES, MAX_NAMES_BYTES
from dsmq.wire.resp import OK, Encoded, encode_integer, encode_null_array, encode_simple

if TYPE_CHECKING:
    from dsmq.broker.commands import Command
    from dsmq.broker.connection import Connection

MAX_QUEUED_REQUESTS = 500
# Max bytes of arguments in a transaction.
MAX_QUEUED_BYTES = 524_288

_QUEUED = encode_simple("QUEUED")
_UNBOUNDED = MAX_INTEGER + 1


@dataclass(slots=True)
class Transaction:
    """The requests since MULTI."""

    requests: list[tuple[Command, list[bytes]]] = field(default_factory=list)
    size: int = 0
    """Bytes of their arguments."""
    memory: int = 0
    """The approximate memory that they take."""
    aborted: bool = False

    def add(self, command: Command, request: list[bytes]) -> None:
        """Queue a request. Raises TooBig if there are too many."""
        if self.aborted:
            return
        self.size += sum(map(len, request))
        if len(self.requests) == MAX_QUEUED_REQUESTS or self.size > MAX_QUEUED_BYTES:
            raise TooBig(
                f"a transaction may have at most {MAX_QUEUED_REQUESTS} requests and {MAX_QUEUED_BYTES} argument bytes"
            )
        self.memory += request_memory(request)
        self.requests.append((command, request))

    def abort(self) -> None:
        """Make EXEC fail, because a request was refused."""
        self.aborted = True
        self.requests, self.memory = [], 0


class Step(NamedTuple):
    """A request that EXEC still has to run."""

    command: Command
    request: list[bytes]
    reply: Encoded | ReplyError | None
    """The reply to a put. Puts are stored or refused before the first step."""
    below: int
    """The id of the transaction's next put into the same topic, which this step must not read. For a read of several
    topics: the id of its next put.
    """


def multi(client: Connection, _: list[bytes]) -> bytes:
    client.requests.begin(Transaction())
    return OK


def queue(command: Command, client: Connection, request: list[bytes]) -> bytes:
    command.parse(client, request)
    if client.requests.transaction is not None:
        client.requests.transaction.add(command, request)
    return _QUEUED


def refuse(command: Command, _client: Connection, _request: list[bytes]) -> NoReturn:
    raise BadRequest(f"{command.name} can't be part of a transaction")


def discard(client: Connection, _: list[bytes]) -> bytes:
    _end_transaction(client, "DISCARD")
    return OK


def watch(client: Connection, request: list[bytes]) -> bytes:
    store, requests = client.context.store, client.requests
    if store.is_shared:
        # Another server may store a message between the check and the puts.
        raise BadRequest("topics can't be watched in a store shared by several servers")
    watched = dict.fromkeys((parse_topic(client, [b"", topic]) for topic in request[1:]), store.last_id())
    # A topic that is watched already stays watched from then on.
    watched |= requests.watched
    if len(watched) > MAX_NAMES or sum(map(len, watched)) > MAX_NAMES_BYTES:
        raise TooBig(f"a client may watch at most {MAX_NAMES} topics, of {MAX_NAMES_BYTES} bytes in total")
    requests.watched = watched
    requests.count()
    return OK


def unwatch(client: Connection, _: list[bytes]) -> bytes:
    client.requests.watched = {}
    return OK


def _end_transaction(client: Connection, name: str) -> Transaction:
    transaction = client.requests.transaction
    if transaction is None:
        raise BadRequest(f"{name} without MULTI")
    client.requests.begin(None)
    return transaction


def execute(client: Connection, request: list[bytes]) -> bytes | None:
    """Store all puts of the transaction together, then run its requests one after another.

    The number of replies is known, so the array is sent in parts: each request runs as if it had just arrived, within
    the same limits on unread replies and on how long other clients wait.
    """
    if client.start_id is None:
        client.await_start(request)
        return None
    watched, transaction = client.requests.watched, _end_transaction(client, "EXEC")
    if transaction.aborted:
        raise Aborted("no request was run, because one after MULTI was refused")
    requests = transaction.requests
    encode = partial(_begin_steps, client, requests, client.context.store.last_id())
    try:
        puts = [command.parse(client, request) for command, request in requests if command.name == "PUT"]
    except ReplyError as error:
        # A limit was lowered after the put was queued.
        if watched:
            raise
        return encode(error)
    return put_together(client, puts, encode, watched) if puts or watched else encode([])


def _begin_steps(
    client: Connection, requests: list[tuple[Command, list[bytes]]], last_id: int, stored: list[int] | ReplyError
) -> bytes:
    """Schedule the requests once their puts are stored or refused; return the header of the reply."""
    if isinstance(stored, Aborted):
        return encode_null_array(client.version)
    ids = [] if isinstance(stored, ReplyError) else stored[:]
    # The highest id before each put: a put whose id is not higher repeats an earlier put with the same KEY.
    highest = list(accumulate(ids, max, initial=last_id))
    first_later: dict[bytes, int] = {}
    lowest_later = _UNBOUNDED
    # In reverse order.
    steps: list[Step] = []
    for command, request in reversed(requests):
        reply: Encoded | ReplyError | None = None
        topic = request[1] if len(request) > 1 else b""
        below = lowest_later if command.name == "MREAD" else first_later.get(topic, _UNBOUNDED)
        if command.name == "PUT" and isinstance(stored, ReplyError):
            client.counters.puts_refused[stored.code] += 1
            reply = stored
        elif command.name == "PUT":
            message_id = ids.pop()
            reply = encode_integer(message_id)
            if message_id > highest[len(ids)]:
                first_later[topic] = lowest_later = message_id
        steps.append(Step(command, request, reply, below))
    client.requests.run_next(steps)
    return b"*%d\r\n" % len(requests)


def run_step(client: Connection, _: list[bytes]) -> Encoded | None:
    """Run the next step of EXEC. Its request has an empty name, which a client can't send before the last step."""
    if not client.requests.steps:
        raise UnknownCommand("unknown command ''")
    # Otherwise, each step would be counted as an EXEC.
    client.counters.commands["EXEC"] -= 1
    command, request, reply, below = client.requests.steps.pop()
    if isinstance(reply, ReplyError):
        raise reply.with_traceback(None)
    if reply is not None:
        return reply
    client.reads.below = below
    try:
        return command.handler(client, request)
    finally:
        client.reads.below = 0
