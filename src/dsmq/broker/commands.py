"""What clients can ask for: a table from a command's name to its handler.

A handler gets the connection and the request, and returns the encoded reply, or None where the reply comes later.
It raises a ReplyError where there is no such reply. PROTOCOL.md says what each command means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from dsmq import __version__
from dsmq import settings as config
from dsmq.broker.auth import DEFAULT_USER, Role
from dsmq.broker.counters import Counters
from dsmq.broker.reads import PendingRead
from dsmq.broker.syntax import arguments, bounds
from dsmq.broker.usage import Usage, request_memory
from dsmq.errors import (
    Aborted,
    AuthRequired,
    BadRequest,
    NotPermitted,
    ReplyError,
    TooBig,
    UnknownCommand,
    UnknownVersion,
    WrongEpoch,
)
from dsmq.settings import Settings
from dsmq.store.api import Message, Put, Store, TopicStats
from dsmq.wire.resp import (
    MAX_INTEGER,
    Encoded,
    encode_array,
    encode_bulk,
    encode_integer,
    encode_map,
    encode_messages,
    encode_null,
    encode_simple,
)

if TYPE_CHECKING:
    from dsmq.broker.access import Access

DEFAULT_COUNT = 100
MAX_COUNT = 1_000
MAX_READ_BYTES = 262_144
# Of one READ while there are clients who do not take their replies: most of what is read then is never sent.
SHORT_READ_BYTES = 65_536
MAX_WAIT_MS = 86_400_000
MAX_NAME_BYTES = 64
# Between MULTI and EXEC: requests, and bytes of their arguments.
MAX_QUEUED_REQUESTS = 500
MAX_QUEUED_BYTES = 524_288

_OK = encode_simple("OK")
_QUEUED = encode_simple("QUEUED")
_NULL_ARRAY = {2: b"*-1\r\n", 3: encode_null(3)}
# How Redis would call what a role may do, for those who ask what kind of command it is.
_FLAGS = {Role.NOBODY: "no_auth", Role.READ: "readonly", Role.WRITE: "write", Role.ADMIN: "admin"}
# Above all ids.
_UNBOUNDED = MAX_INTEGER + 1
_PONG = encode_simple("PONG")


@dataclass
class ServerContext:
    """What commands need of the server. settings and access may be replaced while it runs."""

    settings: Settings
    store: Store
    access: Access
    usage: Usage
    request_stop: Callable[[str], None]
    """Stop the server; takes the reason."""
    info: Callable[[], Mapping[str, Mapping[str, object]]]
    """What INFO shows: sections of names and values."""


@dataclass(slots=True)
class Transaction:
    """The requests since MULTI."""

    requests: list[tuple[Command, list[bytes]]] = field(default_factory=list)
    size: int = 0
    """Bytes of their arguments."""
    memory: int = 0
    """About how many bytes are held for them."""
    aborted: bool = False

    def add(self, command: Command, request: list[bytes]) -> None:
        """Queue a request. Raises TooBig if there are too many."""
        if self.aborted:
            return
        self.size += sum(map(len, request))
        if len(self.requests) == MAX_QUEUED_REQUESTS or self.size > MAX_QUEUED_BYTES:
            raise TooBig(f"MULTI takes {MAX_QUEUED_REQUESTS} requests and {MAX_QUEUED_BYTES} bytes of arguments")
        self.memory += request_memory(request)
        self.requests.append((command, request))

    def abort(self) -> None:
        """Let EXEC fail: a request was refused."""
        self.aborted = True
        self.requests, self.memory = [], 0


class Step(NamedTuple):
    """One request of a transaction, when EXEC runs it."""

    request: list[bytes]
    run: Callable[[], Encoded | None]
    below: int
    """It reads only messages with ids below this one: what was put after it in the transaction is stored already."""


class Client(Protocol):
    """What commands may do to the connection they came from."""

    context: ServerContext
    counters: Counters
    id: int
    role: Role
    name: bytes
    version: int
    """The version of RESP it speaks, 2 or 3."""
    notices: bool
    """Whether it has asked to be told what it did not ask for: that the server stops, for one."""
    start_id: int
    """The last id when it connected."""
    positions: dict[bytes, int]
    """Where GET goes on, by topic; `start_id` for those not in it."""
    last_read: tuple[bytes, int] | None
    """The topic it was sent messages of last, and the number of the last of them."""
    steps: deque[Step]
    """What EXEC has still to run."""
    below: int
    """While a step is run: what it says."""

    @property
    def transaction(self) -> Transaction | None:
        """The transaction between MULTI and EXEC."""

    @property
    def max_read_bytes(self) -> int:
        """How many bytes of messages it is sent at once."""

    def put(self, put: Put) -> None:
        """Store it with all that arrived at the same time; the reply follows then."""

    def begin(self, transaction: Transaction | None) -> None:
        """Queue requests in a transaction from now on, or run them again."""

    def put_together(self, puts: list[Put], encode: Callable[[list[int] | ReplyError], bytes]) -> bytes | None:
        """Store all or nothing, and return the encoded ids or error, or None where the store answers later."""

    def run_next(self, steps: deque[Step]) -> None:
        """Run these before any other request: each is replied to like a request of its own."""

    def read(self, read: PendingRead) -> Encoded | None:
        """Fetch now and after each put into the topic, until there are messages or the time is up."""

    def authenticate(self, user: bytes, token: bytes, welcome: Callable[[], bytes]) -> bytes:
        """Take on the role of a token and return the reply that welcomes.

        Raises WrongToken if there is no such token; then no request is run any more, and the connection ends soon.
        """

    def set_position(self, topic: bytes, message_id: int) -> None:
        """Let GET go on behind this message. Raises BadRequest if the positions take up too much memory."""

    def finish(self) -> None:
        """Close the connection once what is to be sent has been."""


Handler = Callable[[Client, list[bytes]], Encoded | None]


@dataclass(frozen=True, slots=True)
class Command:
    """A row of the table; the bounds count the arguments behind the name, the role is the lowest that may call it."""

    name: str
    handler: Handler
    syntax: str = ""
    """The arguments as PROTOCOL.md writes them: see `syntax.bounds`."""
    summary: str = ""
    role: Role = Role.READ
    parse: Callable[[Client, list[bytes]], object] = lambda _client, _request: None
    """Raises the error for wrong arguments, before a transaction queues them."""
    min_args: int = field(init=False)
    max_args: int = field(init=False)

    def __post_init__(self) -> None:
        for name, value in zip(("min_args", "max_args"), bounds(self.syntax), strict=True):
            object.__setattr__(self, name, value)

    def forbid(self, role: Role) -> NoReturn:
        """Raise the error for a client whose role is too low."""
        if role is Role.NOBODY:
            raise AuthRequired("this server wants a token first: AUTH token")
        raise NotPermitted(f"{self.name} takes the role {self.role.name.lower()}; this token has {role.name.lower()}")

    def check(self, request: list[bytes]) -> None:
        """Raise BadRequest where the number of arguments is wrong."""
        if not self.min_args <= len(request) - 1 <= self.max_args:
            wanted = str(self.min_args) if self.min_args == self.max_args else f"{self.min_args} to {self.max_args}"
            usage = f"{self.name} {self.syntax}".strip()
            raise BadRequest(f"{self.name} takes {wanted} arguments, not {len(request) - 1}: {usage}")


def find(name: bytes) -> Command:
    """Return the command of this name, in capitals or not. Raises UnknownCommand."""
    command = COMMANDS.get(name) or COMMANDS.get(name.upper())
    if command is None:
        raise UnknownCommand(f"unknown command {_shown(name)}")
    return command


# Messages


def _put(client: Client, request: list[bytes]) -> None:
    client.put(_parse_put(client, request))


def _parse_put(client: Client, request: list[bytes]) -> Put:
    topic, body = request[1], request[2]
    settings = client.context.settings
    if len(body) > settings.max_message_bytes:
        # The parser stops longer ones before they have arrived, but looks at no length below 1,024.
        raise TooBig(f"a message has at most {settings.max_message_bytes} bytes, not {len(body)}")
    if not (0 < len(topic) <= settings.max_topic_bytes and topic.isascii()):
        # A call costs as much as all this; nearly all topics need none.
        _topic(client, topic)
    return topic, body, _key(client, request) if len(request) > 3 else None


def _key(client: Client, request: list[bytes]) -> tuple[bytes, int] | None:
    if len(request) == 6 and request[3] == b"KEY":
        # As dsmq's own client puts: there is no faster way.
        producer, seq = request[4], request[5]
        if 0 < len(producer) <= MAX_NAME_BYTES and len(seq) < 19 and seq.isdigit():
            return producer, int(seq)
    options = _options(request[3:], {b"KEY": 2, b"AGAIN": 0, b"RUN": 1})
    store = client.context.store
    if b"RUN" in options and options[b"RUN"][0] != store.run.encode():
        raise _wrong_epoch(store, "this is another run")
    if b"KEY" not in options:
        if b"AGAIN" in options:
            raise BadRequest("AGAIN is for a put with a KEY")
        return None
    producer, seq = options[b"KEY"]
    if not 0 < len(producer) <= MAX_NAME_BYTES:
        raise BadRequest(f"a producer has 1 to {MAX_NAME_BYTES} bytes")
    if b"AGAIN" in options:
        store.check_producer(producer)
    return producer, _integer(seq, "seq")


def _read(client: Client, request: list[bytes]) -> Encoded | None:
    topic = _topic(client, request[1])
    after = _integer(request[2], "after")
    wait, count, size, latest, epoch = _read_options(*request[3:])
    store = client.context.store
    if epoch is not None:
        _check_epoch(store, epoch)
    if after > store.last_id():
        raise BadRequest(f"no message has an id above {store.last_id()} yet; was the server restarted since?")
    size = min(size, client.max_read_bytes)
    return client.read(PendingRead(topic, after, 0 if latest else count, size, wait, _delivered, epoch))


def _check_epoch(store: Store, epoch: bytes) -> None:
    if epoch != store.epoch.encode():
        raise _wrong_epoch(store, "this is another epoch")


def _wrong_epoch(store: Store, about: str) -> WrongEpoch:
    return WrongEpoch(f"{store.epoch} {store.run} {about}")


def _parse_read(client: Client, request: list[bytes]) -> None:
    _topic(client, request[1])
    _integer(request[2], "after")
    _read_options(*request[3:])


@lru_cache
def _read_options(*words: bytes) -> tuple[int, int, int, bool, bytes | None]:
    options = _options(words, {b"COUNT": 1, b"BYTES": 1, b"WAIT": 1, b"LATEST": 0, b"EPOCH": 1})
    wait = _number(options, b"WAIT", 0, 0, MAX_WAIT_MS)
    count = _number(options, b"COUNT", DEFAULT_COUNT, 1, MAX_COUNT)
    size = _number(options, b"BYTES", MAX_READ_BYTES, 1, MAX_READ_BYTES)
    return wait, count, size, b"LATEST" in options, options[b"EPOCH"][0] if b"EPOCH" in options else None


def _delivered(client: Client, read: PendingRead, messages: list[Message]) -> Encoded:
    counters = client.counters
    if read.wait_ms and read.epoch is not None:
        # A store elsewhere may have begun another epoch meanwhile.
        _check_epoch(client.context.store, read.epoch)
    if messages:
        counters.gets_message += 1
        counters.delivered += len(messages)
        client.last_read = read.topic, messages[-1].number
        if messages[0].age_ms == messages[-1].age_ms:
            counters.delivery_seconds.add(messages[0].age_ms / 1000, len(messages))
        else:
            for message in messages:
                counters.delivery_seconds.add(message.age_ms / 1000)
    else:
        counters.gets_empty += 1
    return encode_messages(messages)


def _get(client: Client, request: list[bytes]) -> Encoded | None:
    return _next(client, _topic(client, request[1]), 0, 1)


def _getwait(client: Client, request: list[bytes]) -> Encoded | None:
    return _next(client, *_parse_getwait(client, request), 1)


def _parse_getwait(client: Client, request: list[bytes]) -> tuple[bytes, int]:
    return _topic(client, request[1]), _integer(request[2], "milliseconds", most=MAX_WAIT_MS)


def _parse_topic(client: Client, request: list[bytes]) -> bytes:
    return _topic(client, request[1])


def _getlatest(client: Client, request: list[bytes]) -> Encoded | None:
    return _next(client, _topic(client, request[1]), 0, 0)


def _next(client: Client, topic: bytes, wait: int, count: int) -> Encoded | None:
    """Reply the message behind the connection's position, or with a count of 0 the newest."""
    position = client.positions.get(topic, client.start_id)
    return client.read(PendingRead(topic, position, count, 1, wait, _moved))


def _moved(client: Client, read: PendingRead, messages: list[Message]) -> bytes:
    _delivered(client, read, messages)
    if not messages:
        return encode_null(client.version)
    client.set_position(read.topic, messages[0].id)
    return encode_bulk(messages[0].body)


def _topics(client: Client, request: list[bytes]) -> bytes:
    options = _options(request[1:], {b"AFTER": 1, b"COUNT": 1})
    after = options.get(b"AFTER", [b""])[0]
    count = _number(options, b"COUNT", MAX_COUNT, 1, MAX_COUNT)
    return _encode_topics(client.context.store.topics(after, count))


def _encode_topics(topics: list[TopicStats]) -> bytes:
    return encode_array(
        [
            item
            for topic in topics
            for item in (encode_bulk(topic.name), encode_integer(topic.messages), encode_integer(topic.bytes))
        ]
    )


def _stats(client: Client, request: list[bytes]) -> bytes:
    return _encode_stats(client.version, client.context.store.stats(*_parse_stats(client, request)))


def _parse_stats(client: Client, request: list[bytes]) -> tuple[bytes, int]:
    after = _number(_options(request[2:], {b"AFTER": 1}), b"AFTER", 0, 0, MAX_INTEGER)
    return _topic(client, request[1]), after


def _encode_stats(version: int, stats: TopicStats) -> bytes:
    values = stats._asdict()
    del values["name"]
    return encode_map(version, [(name, encode_integer(value)) for name, value in values.items()])


def _shutdown(client: Client, request: list[bytes]) -> bytes | None:
    # Whether a snapshot is written is a setting, and not for clients to decide.
    if len(request) > 1 and request[1].upper() not in (b"NOSAVE", b"SAVE"):
        raise BadRequest("SHUTDOWN takes NOSAVE or SAVE, which change nothing")
    if not client.context.settings.allow_shutdown:
        raise NotPermitted("SHUTDOWN is off: allow_shutdown is false")
    client.context.request_stop(f"SHUTDOWN from client {client.id}")
    if client.notices:
        return _OK
    # As Redis does it. Clients take any reply for that to their next command.
    client.finish()
    return None


# Transactions


def _multi(client: Client, _: list[bytes]) -> bytes:
    client.begin(Transaction())
    return _OK


def _queue(client: Client, request: list[bytes]) -> bytes:
    command = find(request[0])
    command.parse(client, request)
    if client.transaction is not None:
        client.transaction.add(command, request)
    return _QUEUED


def _not_queued(_: Client, request: list[bytes]) -> NoReturn:
    raise BadRequest(f"{find(request[0]).name} can't be part of a transaction")


def _discard(client: Client, _: list[bytes]) -> bytes:
    _end_transaction(client, "DISCARD")
    return _OK


def _end_transaction(client: Client, name: str) -> Transaction:
    transaction = client.transaction
    if transaction is None:
        raise BadRequest(f"{name} without MULTI")
    client.begin(None)
    return transaction


def _exec(client: Client, _: list[bytes]) -> bytes | None:
    """Store all puts of the transaction together, then run its requests one after another.

    The length of the reply is known, so it is sent in parts: each request is run like one that has just come, with the
    same bounds on replies and on the time that others wait.
    """
    transaction = _end_transaction(client, "EXEC")
    if transaction.aborted:
        raise Aborted("nothing was run, because a request since MULTI was refused")
    requests = transaction.requests
    encode = partial(_run_transaction, client, requests, client.context.store.last_id())
    try:
        puts = [_parse_put(client, request) for command, request in requests if command is PUT]
    except ReplyError as error:
        # A limit has changed since.
        return encode(error)
    return client.put_together(puts, encode) if puts else encode([])


def _run_transaction(
    client: Client, requests: list[tuple[Command, list[bytes]]], last_id: int, stored: list[int] | ReplyError
) -> bytes:
    """Have the requests run, whose puts are stored or refused; return the head of the reply."""
    ids = [] if isinstance(stored, ReplyError) else stored
    # With the highest id before each: one that is not above it belongs to an earlier put with the same KEY.
    puts = zip(reversed(ids), [*accumulate(ids, max, initial=last_id)][-2::-1], strict=True)
    below: dict[bytes, int] = {}
    steps: deque[Step] = deque()
    for command, request in reversed(requests):
        first = below.get(request[1], _UNBOUNDED) if len(request) > 1 else _UNBOUNDED
        run: Callable[[], Encoded | None] = partial(command.handler, client, request)
        if command is PUT and isinstance(stored, ReplyError):
            client.counters.puts_refused[stored.code] += 1
            run = partial(_raise, stored)
        elif command is PUT:
            message_id, highest = next(puts)
            if message_id > highest:
                below[request[1]] = message_id
            run = partial(encode_integer, message_id)
        steps.appendleft(Step(request, run, first))
    client.run_next(steps)
    return b"*%d\r\n" % len(requests)


def _raise(error: ReplyError) -> NoReturn:
    raise error.with_traceback(None)


def _step(client: Client, request: list[bytes]) -> Encoded | None:
    """Run what EXEC has still to run. Its request has an empty name, and so can't come before that from the client."""
    if not client.steps:
        find(request[0])
    client.counters.commands["EXEC"] -= 1
    step = client.steps.popleft()
    client.below = step.below
    try:
        return step.run()
    finally:
        client.below = 0


# Handshake and housekeeping: what clients of RESP send by themselves.


def _hello(client: Client, request: list[bytes]) -> bytes:
    version = client.version
    arguments = request[1:]
    if arguments:
        if arguments[0] not in (b"2", b"3"):
            raise UnknownVersion(f"RESP versions 2 and 3 are spoken, not {_shown(arguments[0])}")
        version = int(arguments[0])
    options = _options(arguments[1:], {b"AUTH": 2, b"SETNAME": 1, b"NOTICES": 0})
    name = _name(options[b"SETNAME"][0]) if b"SETNAME" in options else client.name
    greeting = partial(_greeting, client, version, name, client.notices or b"NOTICES" in options)
    if b"AUTH" not in options:
        return greeting()
    user, token = options[b"AUTH"]
    return client.authenticate(user, token, greeting)


def _greeting(client: Client, version: int, name: bytes, notices: bool) -> bytes:  # noqa: FBT001
    client.name, client.version, client.notices = name, version, notices
    settings, store = client.context.settings, client.context.store
    return encode_map(
        version,
        [
            ("server", encode_bulk(b"dsmq")),
            ("version", encode_bulk(__version__.encode())),
            ("proto", encode_integer(version)),
            ("id", encode_integer(client.id)),
            ("mode", encode_bulk(b"standalone")),
            ("role", encode_bulk(b"master")),
            ("modules", encode_array([])),
            ("epoch", encode_bulk(store.epoch.encode())),
            ("run", encode_bulk(store.run.encode())),
            ("last_id", encode_integer(store.last_id())),
            ("lost_ids", encode_array([encode_integer(end) for end in store.lost_ids])),
            ("max_age_ms", encode_integer(round(settings.max_age_seconds * 1000))),
            ("max_message_bytes", encode_integer(settings.max_message_bytes)),
            ("max_topic_bytes", encode_integer(settings.max_topic_bytes)),
            ("access", encode_bulk(client.role.name.lower().encode())),
        ],
    )


def _ping(_: Client, request: list[bytes]) -> bytes:
    return encode_bulk(request[1]) if len(request) == 2 else _PONG


def _echo(_: Client, request: list[bytes]) -> bytes:
    return encode_bulk(request[1])


def _quit(client: Client, _: list[bytes]) -> bytes:
    client.finish()
    return _OK


def _auth(client: Client, request: list[bytes]) -> bytes:
    user = request[1] if len(request) == 3 else DEFAULT_USER
    return client.authenticate(user, request[-1], lambda: _OK)


def _select(_: Client, request: list[bytes]) -> bytes:
    if request[1] != b"0":
        raise BadRequest("there is one database, 0")
    return _OK


def _readonly(_: Client, __: list[bytes]) -> bytes:
    return _OK


def _reset(client: Client, _: list[bytes]) -> bytes:
    client.begin(None)
    client.name, client.version, client.notices = b"", 2, False
    return encode_simple("RESET")


def _client(client: Client, request: list[bytes]) -> bytes:
    match [request[1].upper(), *request[2:]]:
        case [b"SETNAME", name]:
            client.name = _name(name)
            return _OK
        case [b"GETNAME"]:
            return encode_bulk(client.name) if client.name else encode_null(client.version)
        case [b"ID"]:
            return encode_integer(client.id)
        case [b"SETINFO", _, _] | [b"NO-EVICT" | b"NO-TOUCH", _] | [b"MAINT_NOTIFICATIONS", *_]:
            # There is nothing to evict or touch, and no maintenance to notify of. redis-py 8 asks at every connection.
            return _OK
    raise BadRequest(
        "CLIENT knows SETNAME name, GETNAME, ID, SETINFO name value, NO-EVICT, NO-TOUCH and MAINT_NOTIFICATIONS"
    )


def _command(client: Client, request: list[bytes]) -> bytes:
    match [word.upper() for word in request[1:]]:
        case [] | [b"INFO"]:
            return encode_array([_described(command) for command in COMMANDS.values()])
        case [b"INFO", *names]:
            known = [COMMANDS.get(name) for name in names]
            return encode_array([_described(one) if one else _NULL_ARRAY[client.version] for one in known])
        case [b"COUNT"]:
            return encode_integer(len(COMMANDS))
        case [b"DOCS", *names]:
            wanted = [command for name, command in COMMANDS.items() if not names or name in names]
            docs = [(command.name.lower(), _documented(client.version, command)) for command in wanted]
            return encode_map(client.version, docs)
    raise BadRequest("COMMAND knows COUNT, DOCS [name ...] and INFO [name ...]")


def _described(command: Command) -> bytes:
    """Describe a command as Redis 7 does.

    Name, arity (the name counts; negative means at least), flags, first key, last key, step, and lists of categories,
    tips, key specifications and subcommands. No argument is called a key: clients of a Redis cluster hash those.
    """
    arity = command.min_args + 1 if command.min_args == command.max_args else -(command.min_args + 1)
    name, flags = encode_bulk(command.name.lower().encode()), encode_array([encode_simple(_FLAGS[command.role])])
    # Redis's integers have a sign; those of dsmq never do.
    return encode_array([name, b":%d\r\n" % arity, flags, *[encode_integer(0)] * 3, *[encode_array([])] * 4])


def _documented(version: int, command: Command) -> bytes:
    about = {"summary": command.summary, "since": "2.0.0", "group": "dsmq", "arguments": arguments(command.syntax)}
    return _encoded(version, about)


def _encoded(version: int, value: Any) -> bytes:
    """Encode texts, dicts, and lists: of dicts, or of flags, which redis-cli wants as simple strings."""
    if isinstance(value, dict):
        return encode_map(version, [(name, _encoded(version, one)) for name, one in value.items()])
    if isinstance(value, list):
        return encode_array([encode_simple(one) if isinstance(one, str) else _encoded(version, one) for one in value])
    return encode_bulk(value.encode())


def _config(client: Client, request: list[bytes]) -> bytes:
    if request[1].upper() != b"GET":
        raise BadRequest("CONFIG knows GET pattern ...")
    settings = {name: _as_text(value) for name, value in config.as_dict(client.context.settings).items()}
    # redis-benchmark asks for the first two, to say how Redis persists; redis-cli --stat for the last.
    settings |= {"save": "", "appendonly": "no", "databases": "1"}
    if any(len(pattern) > MAX_NAME_BYTES for pattern in request[2:]):
        raise BadRequest(f"a pattern has at most {MAX_NAME_BYTES} bytes")
    patterns = {pattern.decode(errors="replace").lower() for pattern in request[2:]}
    names = set(settings)
    for pattern in patterns:
        if "*" in pattern:
            names.difference_update(_matching(names, pattern))
    found = [name for name in settings if name in patterns or name not in names]
    return encode_map(client.version, [(name, encode_bulk(settings[name].encode())) for name in found])


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    """Return the names that match a pattern, in which `*` stands for anything.

    Not by a regular expression: those of strangers can take any time to compile, and to match.
    """
    head, *middle, tail = pattern.split("*")
    parts = [part for part in middle if part]
    found = []
    for name in names:
        if not (name.startswith(head) and name.endswith(tail)):
            continue
        at = len(head)
        for part in parts:
            at = name.find(part, at)
            if at < 0:
                break
            at += len(part)
        else:
            if len(name) - len(tail) >= at:
                found.append(name)
    return found


def _info(client: Client, request: list[bytes]) -> bytes:
    wanted = [section.decode(errors="replace").lower() for section in request[1:]]
    everything = {"all", "default", "everything"}.intersection(wanted) or not wanted
    lines = []
    for section, values in client.context.info().items():
        # What others do is an admin's to know.
        if (everything or section in wanted) and (client.role is Role.ADMIN or section in ("server", "replication")):
            lines += [f"# {section.capitalize()}", *(f"{name}:{_as_text(value)}" for name, value in values.items()), ""]
    return encode_bulk("\r\n".join(lines).encode())


# Arguments


def _topic(client: Client, name: bytes) -> bytes:
    if not name:
        raise BadRequest("the name of the topic is empty")
    most = client.context.settings.max_topic_bytes
    if len(name) > most:
        raise TooBig(f"a topic has at most {most} bytes, not {len(name)}")
    if not name.isascii():
        try:
            name.decode()
        except UnicodeDecodeError:
            raise BadRequest("the topic is not UTF-8") from None
    return name


def _name(name: bytes) -> bytes:
    if len(name) > MAX_NAME_BYTES or not all(0x21 <= byte <= 0x7E for byte in name):
        raise BadRequest(f"a name has at most {MAX_NAME_BYTES} printable ASCII characters, no blanks")
    return name


def _integer(text: bytes, what: str, least: int = 0, most: int = MAX_INTEGER) -> int:
    if text.isdigit() and len(text) <= 19 and least <= (value := int(text)) <= most:
        return value
    raise BadRequest(f"{what} is an integer from {least} to {most}, not {_shown(text)}")


def _options(words: Sequence[bytes], known: dict[bytes, int]) -> dict[bytes, Sequence[bytes]]:
    """Return the options among these words, with their arguments; `known` says how many each has."""
    found: dict[bytes, Sequence[bytes]] = {}
    at = 0
    while at < len(words):
        option = words[at].upper()
        end = at + 1 + known.get(option, 0)
        if option not in known or option in found or end > len(words):
            raise BadRequest(f"wrong option or arguments at {_shown(words[at])}; quote a message that has blanks")
        found[option] = words[at + 1 : end]
        at = end
    return found


def _number(options: dict[bytes, Sequence[bytes]], option: bytes, default: int, least: int, most: int) -> int:
    return _integer(options[option][0], option.decode(), least, most) if option in options else default


def _shown(data: bytes) -> str:
    return repr(data[:64])[1:]


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


PUT = Command(
    "PUT",
    _put,
    "topic message [KEY producer seq [AGAIN]] [RUN run]",
    "Store a message; reply its id. With KEY, storing it again changes nothing.",
    Role.WRITE,
    _parse_put,
)
COMMANDS: dict[bytes, Command] = {
    command.name.encode(): command
    for command in (
        PUT,
        Command(
            "READ",
            _read,
            "topic after [COUNT n] [BYTES n] [WAIT ms] [LATEST] [EPOCH epoch]",
            "Reply the messages with ids above `after`: id, number, age in ms, body, and ms left, of each.",
            parse=_parse_read,
        ),
        Command("GET", _get, "topic", "Reply the next message, by this connection's own position.", parse=_parse_topic),
        Command(
            "GETLATEST", _getlatest, "topic", "Reply the newest message and pass over the others.", parse=_parse_topic
        ),
        Command("GETWAIT", _getwait, "topic milliseconds", "Wait for the next message.", parse=_parse_getwait),
        Command("MULTI", _multi, "", "Queue the requests that follow, until EXEC."),
        Command("EXEC", _exec, "", "Store all puts since MULTI or none, run the requests, and reply an array."),
        Command("DISCARD", _discard, "", "Drop the requests since MULTI."),
        Command("TOPICS", _topics, "[AFTER topic] [COUNT n]", "List topics that hold messages: name, messages, bytes."),
        Command("STATS", _stats, "topic [AFTER id]", "Describe what a topic holds.", parse=_parse_stats),
        Command("SHUTDOWN", _shutdown, "[NOSAVE|SAVE]", "Stop the server gracefully.", Role.ADMIN),
        Command(
            "HELLO",
            _hello,
            "[2|3 [AUTH user token] [SETNAME name] [NOTICES]]",
            "Choose the version of RESP, authenticate, and describe the server.",
            Role.NOBODY,
        ),
        Command("AUTH", _auth, "[user] token", "Authenticate.", Role.NOBODY),
        Command("PING", _ping, "[message]", "Reply PONG, or the message.", Role.NOBODY),
        Command("ECHO", _echo, "message", "Reply the message."),
        Command("QUIT", _quit, "", "Close the connection.", Role.NOBODY),
        Command("RESET", _reset, "", "Forget MULTI, name, NOTICES and RESP 3; keep the token."),
        Command("SELECT", _select, "0", "Do nothing: there is one database."),
        Command("READONLY", _readonly, "", "Do nothing: all commands are always taken."),
        Command("CLIENT", _client, "subcommand [argument ...]", "Name the connection, or describe it."),
        Command("COMMAND", _command, "[COUNT|DOCS|INFO [name ...]]", "Describe the commands."),
        Command("CONFIG", _config, "GET pattern ...", "Reply settings, secrets masked.", Role.ADMIN),
        Command("INFO", _info, "[section ...]", "Describe the server's state, as lines."),
    )
}

COMMANDS_BY_ROLE: dict[Role, dict[bytes, Command]] = {
    role: {name: command for name, command in COMMANDS.items() if role >= command.role}
    | {b"": Command("EXEC", _step, "[...]")}
    for role in Role
}
"""The commands that need no further look, by role; a stranger's all do."""
COMMANDS_BY_ROLE[Role.NOBODY] = {}


def _queued(command: Command) -> Command:
    if command.name in ("EXEC", "DISCARD", "RESET"):
        return command
    alone = command.name in ("MULTI", "HELLO", "AUTH", "QUIT", "SHUTDOWN")
    return replace(command, handler=_not_queued if alone else _queue)


QUEUED = {role: {name: _queued(command) for name, command in COMMANDS_BY_ROLE[role].items() if name} for role in Role}
"""The same between MULTI and EXEC."""
