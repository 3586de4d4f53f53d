"""What clients can ask for: a table from a command's name to its handler.

A handler gets the connection and the request, and returns the encoded reply, or None where the reply comes later.
It raises a ReplyError where there is no such reply. PROTOCOL.md says what each command means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NoReturn, Protocol

from dsmq import __version__, config
from dsmq.auth import DEFAULT_USER, Gate, Role
from dsmq.config import Settings
from dsmq.errors import AuthRequired, BadRequest, NotPermitted, TooBig, UnknownCommand, UnknownVersion, WrongEpoch
from dsmq.listening import Census
from dsmq.metrics import Counters
from dsmq.protocol import (
    MAX_INTEGER,
    encode_array,
    encode_bulk,
    encode_integer,
    encode_map,
    encode_messages,
    encode_null,
    encode_simple,
)
from dsmq.store import Answer, Message, Put, Store, T, TopicStats

DEFAULT_COUNT = 100
MAX_COUNT = 1_000
MAX_READ_BYTES = 262_144
# Of one READ while there are clients who do not take their replies: most of what is read then is never sent.
SHORT_READ_BYTES = 65_536
MAX_WAIT_MS = 86_400_000
MAX_NAME_BYTES = 64
# Topics of which one connection's positions are held.
MAX_POSITIONS = 10_000

_OK = encode_simple("OK")
_PONG = encode_simple("PONG")


@dataclass
class Services:
    """What commands need of the server. settings and gate may be replaced while it runs."""

    settings: Settings
    store: Store
    gate: Gate
    census: Census
    request_stop: Callable[[str], None]
    """Stop the server; takes the reason."""
    info: Callable[[], Mapping[str, Mapping[str, object]]]
    """What INFO shows: sections of names and values."""


class Client(Protocol):
    """What commands may do to the connection they came from."""

    services: Services
    counters: Counters
    id: int
    role: Role
    name: bytes
    version: int
    """The version of RESP it speaks, 2 or 3."""
    notices: bool
    """Whether it has asked to be told what it did not ask for: that the server stops, for one."""
    watermark: int
    """The last id when it connected."""
    positions: dict[bytes, int]
    """Where GET goes on, by topic; the watermark for those not in it."""
    reading: tuple[bytes, int] | None
    """The topic it was sent messages of last, and the number of the last of them."""

    @property
    def max_read_bytes(self) -> int:
        """How many bytes of messages it is sent at once."""

    def put(self, put: Put) -> None:
        """Store it with all that arrived at the same time; the reply follows then."""

    def reply_to(self, answer: Answer[T], encode: Callable[[T], bytes]) -> bytes | None:
        """Return the encoded answer, or None where the store answers later."""

    def wait_for(
        self, topic: bytes, milliseconds: int, fetch: Fetch, encode: Callable[[list[Message]], bytes]
    ) -> bytes | None:
        """Fetch now and after each put into the topic, until there are messages or the time is up."""

    def authenticate(self, user: bytes, token: bytes, welcome: Callable[[], bytes]) -> bytes | None:
        """Take on the role of a token and return the reply that welcomes; or reply later that there is none such."""

    def finish(self) -> None:
        """Close the connection once what is to be sent has been."""


Fetch = Callable[[], Answer[list[Message]]]
Handler = Callable[[Client, list[bytes]], bytes | None]


@dataclass(frozen=True, slots=True)
class Command:
    """A row of the table; the bounds count the arguments behind the name, the role is the least that may call it."""

    name: str
    handler: Handler
    least: int
    most: int
    role: Role = Role.READ

    def forbid(self, role: Role) -> NoReturn:
        """Raise the error for a client whose role is too low."""
        if role is Role.NOBODY:
            raise AuthRequired("this server wants a token first: AUTH token")
        raise NotPermitted(f"{self.name} takes the role {self.role.name.lower()}; this token has {role.name.lower()}")

    def check(self, request: list[bytes]) -> None:
        """Raise BadRequest where the number of arguments is wrong."""
        if not self.least <= len(request) - 1 <= self.most:
            wanted = str(self.least) if self.least == self.most else f"{self.least} to {self.most}"
            raise BadRequest(f"{self.name} takes {wanted} arguments, not {len(request) - 1}")


def find(name: bytes) -> Command:
    """Return the command of this name, in capitals or not. Raises UnknownCommand."""
    command = COMMANDS.get(name) or COMMANDS.get(name.upper())
    if command is None:
        raise UnknownCommand(f"unknown command {_shown(name)}")
    return command


# Messages


def _put(client: Client, request: list[bytes]) -> None:
    body = request[2]
    most = client.services.settings.max_message_bytes
    if len(body) > most:
        # The parser stops longer ones before they have arrived, but looks at no length below 1,024.
        raise TooBig(f"a message has at most {most} bytes, not {len(body)}")
    client.put((_topic(client, request[1]), body, _key(client, request) if len(request) > 3 else None))


def _key(client: Client, request: list[bytes]) -> tuple[bytes, int] | None:
    if len(request) == 6 and request[3] == b"KEY":
        # As dsmq's own client puts: there is no faster way.
        producer, seq = request[4], request[5]
        if 0 < len(producer) <= MAX_NAME_BYTES and len(seq) < 19 and seq.isdigit():
            return producer, int(seq)
    options = _options(request[3:], {b"KEY": 2, b"AGAIN": 0, b"RUN": 1})
    store = client.services.store
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


def _read(client: Client, request: list[bytes]) -> bytes | None:
    topic = _topic(client, request[1])
    after = _integer(request[2], "after")
    wait, count, size, latest, epoch = _read_options(*request[3:])
    store = client.services.store
    if epoch is not None:
        _check_epoch(store, epoch)
    if after > store.last_id():
        raise BadRequest(f"after is above the last id, {store.last_id()}: it is of another epoch, or none")
    fetch: Fetch
    if latest:
        fetch = partial(store.latest, topic, after)
    else:
        fetch = partial(store.read, topic, after, count, min(size, client.max_read_bytes))
    encode = partial(_delivered, client, topic)
    if epoch is not None and wait:
        encode = partial(_delivered_in, epoch, client, topic)
    return client.wait_for(topic, wait, fetch, encode)


def _check_epoch(store: Store, epoch: bytes) -> None:
    if epoch != store.epoch.encode():
        raise _wrong_epoch(store, "this is another epoch")


def _wrong_epoch(store: Store, about: str) -> WrongEpoch:
    return WrongEpoch(f"{store.epoch} {store.run} {about}")


@lru_cache
def _read_options(*words: bytes) -> tuple[int, int, int, bool, bytes | None]:
    options = _options(words, {b"COUNT": 1, b"BYTES": 1, b"WAIT": 1, b"LATEST": 0, b"EPOCH": 1})
    wait = _number(options, b"WAIT", 0, 0, MAX_WAIT_MS)
    count = _number(options, b"COUNT", DEFAULT_COUNT, 1, MAX_COUNT)
    size = _number(options, b"BYTES", MAX_READ_BYTES, 1, MAX_READ_BYTES)
    return wait, count, size, b"LATEST" in options, options[b"EPOCH"][0] if b"EPOCH" in options else None


def _delivered_in(epoch: bytes, client: Client, topic: bytes, messages: list[Message]) -> bytes:
    """The same at the end of a wait, during which a store elsewhere may have begun another epoch."""
    _check_epoch(client.services.store, epoch)
    return _delivered(client, topic, messages)


def _delivered(client: Client, topic: bytes, messages: list[Message]) -> bytes:
    counters = client.counters
    if messages:
        counters.gets_message += 1
        counters.delivered += len(messages)
        client.reading = topic, messages[-1].number
        if messages[0].age_ms == messages[-1].age_ms:
            counters.delivery_seconds.add(messages[0].age_ms / 1000, len(messages))
        else:
            for message in messages:
                counters.delivery_seconds.add(message.age_ms / 1000)
    else:
        counters.gets_empty += 1
    return encode_messages(messages)


def _get(client: Client, request: list[bytes]) -> bytes | None:
    return _next(client, request[1], 0, 1)


def _getwait(client: Client, request: list[bytes]) -> bytes | None:
    return _next(client, request[1], _integer(request[2], "milliseconds", most=MAX_WAIT_MS), 1)


def _getlatest(client: Client, request: list[bytes]) -> bytes | None:
    return _next(client, request[1], 0, 0)


def _next(client: Client, name: bytes, wait: int, count: int) -> bytes | None:
    """Reply the message behind the connection's position, or with a count of 0 the newest."""
    topic = _topic(client, name)
    store = client.services.store
    position = client.positions.get(topic, client.watermark)
    fetch: Fetch
    fetch = partial(store.read, topic, position, count, 1) if count else partial(store.latest, topic, position)
    return client.wait_for(topic, wait, fetch, partial(_moved, client, topic))


def _moved(client: Client, topic: bytes, messages: list[Message]) -> bytes:
    _delivered(client, topic, messages)
    if not messages:
        return encode_null(client.version)
    if len(client.positions) >= MAX_POSITIONS and topic not in client.positions:
        raise BadRequest(f"one connection GETs from at most {MAX_POSITIONS} topics; READ has no such limit")
    client.positions[topic] = messages[0].id
    return encode_bulk(messages[0].body)


def _topics(client: Client, request: list[bytes]) -> bytes | None:
    options = _options(request[1:], {b"AFTER": 1, b"COUNT": 1})
    after = options.get(b"AFTER", [b""])[0]
    count = _number(options, b"COUNT", MAX_COUNT, 1, MAX_COUNT)
    return client.reply_to(client.services.store.topics(after, count), _encode_topics)


def _encode_topics(topics: list[TopicStats]) -> bytes:
    return encode_array(
        [
            item
            for topic in topics
            for item in (encode_bulk(topic.name), encode_integer(topic.messages), encode_integer(topic.bytes))
        ]
    )


def _stats(client: Client, request: list[bytes]) -> bytes | None:
    topic = _topic(client, request[1])
    return client.reply_to(client.services.store.stats(topic), partial(_encode_stats, client.version))


def _encode_stats(version: int, stats: TopicStats) -> bytes:
    values = stats._asdict()
    del values["name"]
    return encode_map(version, [(name, encode_integer(value)) for name, value in values.items()])


def _shutdown(client: Client, _: list[bytes]) -> bytes | None:
    if not client.services.settings.remote_shutdown:
        raise NotPermitted("SHUTDOWN is off: remote_shutdown is false")
    client.services.request_stop(f"SHUTDOWN from client {client.id}")
    if client.notices:
        return _OK
    # As Redis does it. Clients take any reply for that to their next command.
    client.finish()
    return None


# Handshake and housekeeping: what clients of RESP send by themselves.


def _hello(client: Client, request: list[bytes]) -> bytes | None:
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
    settings, store = client.services.settings, client.services.store
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
            ("restored_id", encode_integer(store.restored_id)),
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


def _auth(client: Client, request: list[bytes]) -> bytes | None:
    user = request[1] if len(request) == 3 else DEFAULT_USER
    return client.authenticate(user, request[-1], lambda: _OK)


def _select(_: Client, request: list[bytes]) -> bytes:
    if request[1] != b"0":
        raise BadRequest("there is one database, 0")
    return _OK


def _client(client: Client, request: list[bytes]) -> bytes:
    match [request[1].upper(), *request[2:]]:
        case [b"SETNAME", name]:
            client.name = _name(name)
            return _OK
        case [b"GETNAME"]:
            return encode_bulk(client.name) if client.name else encode_null(client.version)
        case [b"ID"]:
            return encode_integer(client.id)
        case [b"SETINFO", _, _]:
            return _OK
    raise BadRequest("CLIENT knows SETNAME name, GETNAME, ID, and SETINFO name value")


def _command(client: Client, request: list[bytes]) -> bytes:
    match [word.upper() for word in request[1:]]:
        case []:
            return encode_array([_described(command) for command in COMMANDS.values()])
        case [b"COUNT"]:
            return encode_integer(len(COMMANDS))
        case [b"DOCS", *names]:
            wanted = [command for name, command in COMMANDS.items() if not names or name in names]
            return encode_map(client.version, [(command.name.lower(), _documented(client)) for command in wanted])
    raise BadRequest("COMMAND knows COUNT and DOCS [name ...]")


def _described(command: Command) -> bytes:
    # Redis's form: name, arity (the name counts; negative means at least), flags, first key, last key, step.
    arity = command.least + 1 if command.least == command.most else -(command.least + 1)
    # Redis's integers have a sign; those of dsmq never do.
    return encode_array(
        [encode_bulk(command.name.lower().encode()), b":%d\r\n" % arity, encode_array([]), *[encode_integer(0)] * 3]
    )


def _documented(client: Client) -> bytes:
    return encode_map(client.version, [("summary", encode_bulk(b"see PROTOCOL.md")), ("group", encode_bulk(b"dsmq"))])


def _config(client: Client, request: list[bytes]) -> bytes:
    if request[1].upper() != b"GET":
        raise BadRequest("CONFIG knows GET pattern ...")
    settings = {name: _as_text(value) for name, value in config.as_dict(client.services.settings).items()}
    # redis-benchmark asks for these two, to say how Redis persists.
    settings |= {"save": "", "appendonly": "no"}
    patterns = [pattern.decode(errors="replace").lower() for pattern in request[2:]]
    if any(len(pattern) > MAX_NAME_BYTES for pattern in patterns):
        raise BadRequest(f"a pattern has at most {MAX_NAME_BYTES} bytes")
    found = [name for name in settings if any(_matches(name, pattern) for pattern in patterns)]
    return encode_map(client.version, [(name, encode_bulk(settings[name].encode())) for name in found])


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a name matches a pattern, in which `*` stands for anything.

    Not by a regular expression: those of strangers can take any time to compile, and to match.
    """
    head, *parts = pattern.split("*")
    if not parts:
        return name == pattern
    at = len(head)
    for part in parts[:-1]:
        at = name.find(part, at) + len(part)
        if at < len(part):
            return False
    return name.startswith(head) and name.endswith(parts[-1]) and len(name) - len(parts[-1]) >= at


def _info(client: Client, request: list[bytes]) -> bytes:
    wanted = [section.decode(errors="replace").lower() for section in request[1:]]
    everything = {"all", "default", "everything"}.intersection(wanted) or not wanted
    lines = []
    for section, values in client.services.info().items():
        # What others do is an admin's to know.
        if (everything or section in wanted) and (client.role is Role.ADMIN or section == "server"):
            lines += [f"# {section.capitalize()}", *(f"{name}:{_as_text(value)}" for name, value in values.items()), ""]
    return encode_bulk("\r\n".join(lines).encode())


# Arguments


def _topic(client: Client, name: bytes) -> bytes:
    if not name:
        raise BadRequest("the topic is empty")
    most = client.services.settings.max_topic_bytes
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
            raise BadRequest(f"wrong option or arguments at {_shown(words[at])}")
        found[option] = words[at + 1 : end]
        at = end
    return found


def _number(options: dict[bytes, Sequence[bytes]], option: bytes, default: int, least: int, most: int) -> int:
    return _integer(options[option][0], option.decode(), least, most) if option in options else default


def _shown(data: bytes) -> str:
    return repr(data[:64])[1:]


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


PUT = Command("PUT", _put, 2, 8, Role.WRITE)

COMMANDS: dict[bytes, Command] = {
    command.name.encode(): command
    for command in (
        PUT,
        Command("READ", _read, 2, 11),
        Command("GET", _get, 1, 1),
        Command("GETLATEST", _getlatest, 1, 1),
        Command("GETWAIT", _getwait, 2, 2),
        Command("TOPICS", _topics, 0, 4),
        Command("STATS", _stats, 1, 1),
        Command("SHUTDOWN", _shutdown, 0, 0, Role.ADMIN),
        Command("HELLO", _hello, 0, 7, Role.NOBODY),
        Command("AUTH", _auth, 1, 2, Role.NOBODY),
        Command("PING", _ping, 0, 1, Role.NOBODY),
        Command("ECHO", _echo, 1, 1),
        Command("QUIT", _quit, 0, 0, Role.NOBODY),
        Command("SELECT", _select, 1, 1),
        Command("CLIENT", _client, 1, 3),
        Command("COMMAND", _command, 0, 63),
        Command("CONFIG", _config, 2, 63, Role.ADMIN),
        Command("INFO", _info, 0, 63),
    )
}

PERMITTED: dict[Role, dict[bytes, Command]] = {
    role: {name: command for name, command in COMMANDS.items() if role >= command.role} for role in Role
}
"""The commands that need no further look, by role; a stranger's all do."""
PERMITTED[Role.NOBODY] = {}
