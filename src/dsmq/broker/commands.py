"""The commands: a table from names to handlers.

A handler gets the connection and the request, and returns the encoded reply, or None if the reply is sent later. It
raises a ReplyError to reply with an error. PROTOCOL.md explains each command.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from dsmq.broker import handshake, jobs, mread, puts, reads, topics, transactions
from dsmq.broker.arguments import parse_topic
from dsmq.broker.auth import Role
from dsmq.errors import AuthRequired, BadRequest, NotPermitted, UnknownCommand
from dsmq.wire.limits import MANY_NAMES, MAX_ARGUMENTS, MAX_NAMES
from dsmq.wire.resp import Encoded, encode_array, encode_integer, encode_null_array, encode_value, quoted

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection

# Redis's categories for the commands of each role.
_FLAGS = {Role.NOBODY: "no_auth", Role.READ: "readonly", Role.WRITE: "write", Role.ADMIN: "admin"}

# An argument, or brackets and their contents, including nested brackets.
_ARGUMENT = re.compile(r"(?:\[(?:[^\[\]]|\[[^\[\]]*\])*\]|\S+)(?: \.\.\.)?")

Handler: TypeAlias = "Callable[[Connection, list[bytes]], Encoded | None]"


@dataclass(slots=True)
class Command:
    name: str
    handler: Handler
    syntax: str = ""
    """The arguments, as in PROTOCOL.md: words in brackets are optional, and `...` repeats the previous word."""
    summary: str = ""
    role: Role = Role.READ
    """The lowest role that may run the command."""
    parse: Callable[[Connection, list[bytes]], Any] = lambda _client, _request: None
    """Raises if the arguments are invalid. Between MULTI and EXEC, checks each request before it is queued."""
    min_args: int = field(init=False)
    max_args: int = field(init=False)

    def __post_init__(self) -> None:
        words = self.syntax.replace("[", "").replace("]", "").split()
        required = [word for word in _ARGUMENT.findall(self.syntax) if word[0] != "["]
        self.min_args = len(required)
        self.max_args = len(words)
        if "..." in words:
            self.max_args = MAX_ARGUMENTS - 1 + (MAX_NAMES if self.name.encode() == MANY_NAMES else 0)

    def forbid(self, role: Role) -> NoReturn:
        if role is Role.NOBODY:
            raise AuthRequired("authentication required: send AUTH token")
        raise NotPermitted(
            f"{self.name} requires the role {self.role.name.lower()}; this token has {role.name.lower()}"
        )

    def wrong_count(self) -> BadRequest:
        return BadRequest(f"wrong number of arguments; usage: {self.name} {self.syntax}".rstrip())


@dataclass(frozen=True, slots=True)
class CommandTable:
    """The commands by their names in upper case."""

    all: dict[bytes, Command]
    by_role: dict[Role, dict[bytes, Command]]
    """The commands that a role may run without further checks; none for unauthenticated clients."""
    queued: dict[Role, dict[bytes, Command]]
    """The same, between MULTI and EXEC."""

    def find(self, name: bytes) -> Command:
        """Return a command by its name, case-insensitive. Raises UnknownCommand."""
        command = self.all.get(name) or self.all.get(name.upper())
        if command is None:
            raise UnknownCommand(f"unknown command {quoted(name)}")
        return command


def _describe_commands(client: Connection, request: list[bytes]) -> bytes:
    match [word.upper() for word in request[1:]]:
        case [] | [b"INFO"]:
            return encode_array([_info(command) for command in COMMANDS.values()])
        case [b"INFO", *names]:
            null = encode_null_array(client.version)
            return encode_array([_info(COMMANDS[name]) if name in COMMANDS else null for name in names])
        case [b"COUNT"]:
            return encode_integer(len(COMMANDS))
        case [b"DOCS", *names]:
            wanted = [command for name, command in COMMANDS.items() if not names or name in names]
            return encode_value(client.version, {command.name.lower(): _docs(command) for command in wanted})
    raise BadRequest("COMMAND has the subcommands COUNT, DOCS [name ...] and INFO [name ...]")


def _info(command: Command) -> bytes:
    """Describe a command as Redis 7 does.

    Name, arity (including the name; negative for a minimum), flags, first key, last key, step, and lists of categories,
    tips, key specifications and subcommands. No argument is declared as a key, because cluster clients hash keys.
    """
    arity = command.min_args + 1 if command.min_args == command.max_args else -(command.min_args + 1)
    return encode_value(2, [command.name.lower().encode(), arity, [_FLAGS[command.role]], 0, 0, 0, [], [], [], []])


def _docs(command: Command) -> dict[str, Any]:
    arguments: list[Any] = []
    for word in _ARGUMENT.findall(command.syntax):
        name, flags = (word[1:-1], ["optional"]) if word[0] == "[" else (word, [])
        arguments.append({"name": name, "type": "string", "flags": flags})
    return {"summary": command.summary, "since": "2.0.0", "group": "dsmq", "arguments": arguments}


PUT = Command(
    "PUT",
    puts.put,
    "topic message [KEY producer seq [AGAIN]] [RUN run]",
    "Store a message and return its id. With KEY, a repeated put is not stored again.",
    Role.WRITE,
    puts.parse_put,
)
COMMANDS: dict[bytes, Command] = {
    command.name.encode(): command
    for command in (
        PUT,
        Command(
            "READ",
            reads.read,
            "topic [LAST|SINCE] after [COUNT n] [BYTES n] [WAIT ms] [LATEST] [EPOCH epoch]",
            "Return the messages with ids above `after`, each as id, number, age in ms, body and ms to expiry.",
            parse=reads.parse_read,
        ),
        Command(
            "MREAD",
            mread.mread,
            "[LAST|SINCE] after [COUNT n] [BYTES n] [WAIT ms] [LATEST] [EPOCH epoch] TOPICS name [name ...]",
            "Read topics and patterns; return a position, then each message's topic and the same values as READ.",
            parse=mread.parse_mread,
        ),
        Command("GET", reads.get, "topic", "Return the next message.", parse=parse_topic),
        Command("GETLATEST", reads.get_latest, "topic", "Return the newest message.", parse=parse_topic),
        Command("GETWAIT", reads.get_wait, "topic milliseconds", "Wait for a message.", parse=reads.parse_get_wait),
        Command("MULTI", transactions.multi, "", "Queue the following requests until EXEC."),
        Command("EXEC", transactions.execute, "", "Run the requests since MULTI; return an array of replies."),
        Command("DISCARD", transactions.discard, "", "Drop the requests since MULTI."),
        Command("WATCH", transactions.watch, "topic [topic ...]", "Make EXEC run nothing if a topic gets a message."),
        Command("UNWATCH", transactions.unwatch, "", "Watch no topics."),
        Command(
            "TAKE",
            jobs.take,
            "topic|pattern group lease-ms [WAIT ms] [COUNT n] [TOKEN token]",
            "Take the next jobs, each as topic, id, number, age in ms, body, ms to expiry and attempt.",
            Role.WRITE,
        ),
        Command(
            "DONE",
            jobs.done,
            "topic|pattern group id attempt [id attempt ...] [EPOCH epoch]",
            "Finish all of the jobs, or none.",
            Role.WRITE,
            jobs.parse_done,
        ),
        Command(
            "RETURN",
            jobs.return_,
            "topic|pattern group id attempt [delay-ms] [EPOCH epoch]",
            "Return a job to its group.",
            Role.WRITE,
            jobs.parse_return,
        ),
        Command(
            "EXTEND",
            jobs.extend,
            "topic|pattern group id attempt ms [EPOCH epoch]",
            "Make a job's lease end in `ms` milliseconds.",
            Role.WRITE,
            jobs.parse_extend,
        ),
        Command("TOPICS", topics.topics, "[AFTER topic] [COUNT n]", "List topics, their messages and bytes."),
        Command("STATS", topics.stats, "topic [AFTER id]", "Describe a topic.", parse=topics.parse_stats),
        Command("PURGE", topics.purge, "topic|pattern", "Expire all messages that are stored now.", Role.ADMIN),
        Command("SHUTDOWN", handshake.shutdown, "[NOSAVE|SAVE]", "Stop the server gracefully.", Role.ADMIN),
        Command(
            "HELLO",
            handshake.hello,
            "[2|3 [AUTH user token] [SETNAME name] [NOTICES]]",
            "Choose the RESP version, authenticate, and describe the server.",
            Role.NOBODY,
        ),
        Command("AUTH", handshake.auth, "[user] token", "Authenticate.", Role.NOBODY),
        Command("PING", handshake.ping, "[message]", "Return PONG, or the message.", Role.NOBODY),
        Command("ECHO", handshake.echo, "message", "Return the message."),
        Command("QUIT", handshake.quit_, "", "Close the connection.", Role.NOBODY),
        Command("RESET", handshake.reset, "", "Reset MULTI, WATCH, name, NOTICES and RESP version; keep the token."),
        Command("SELECT", handshake.select, "0", "Do nothing: there is one database."),
        Command("READONLY", handshake.readonly, "", "Do nothing: the connection stays writable."),
        Command("CLIENT", handshake.client_, "subcommand [argument ...]", "Name the connection, or describe it."),
        Command("COMMAND", _describe_commands, "[COUNT|DOCS|INFO [name ...]]", "Describe the commands."),
        Command("CONFIG", handshake.config, "GET pattern ...", "Return settings, secrets masked.", Role.ADMIN),
        Command("INFO", handshake.info, "[section ...]", "Describe the state of the server."),
    )
}

COMMANDS_BY_ROLE: dict[Role, dict[bytes, Command]] = {
    role: {name: command for name, command in COMMANDS.items() if role >= command.role}
    | {b"": Command("EXEC", transactions.run_step, "[...]")}
    for role in Role
}
COMMANDS_BY_ROLE[Role.NOBODY] = {}


def _queued(command: Command) -> Command:
    if command.name in ("EXEC", "DISCARD", "RESET"):
        return command
    is_refused = command.name in ("MULTI", "HELLO", "AUTH", "QUIT", "SHUTDOWN", "PURGE", "TAKE", "WATCH")
    return replace(command, handler=partial(transactions.refuse if is_refused else transactions.queue, command))


QUEUED = {role: {name: _queued(command) for name, command in COMMANDS_BY_ROLE[role].items() if name} for role in Role}
TABLE = CommandTable(COMMANDS, COMMANDS_BY_ROLE, QUEUED)
