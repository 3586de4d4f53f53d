"""The handshake, and other commands about the connection or the server, many of which Redis libraries send."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsmq import __version__
from dsmq.broker.arguments import MAX_NAME_BYTES, parse_name, parse_options
from dsmq.broker.auth import DEFAULT_USER, Role
from dsmq.errors import BadRequest, NotPermitted, UnknownVersion
from dsmq.store.selection import Selection
from dsmq.wire.resp import OK, encode_bulk, encode_integer, encode_null, encode_simple, encode_value, quoted

if TYPE_CHECKING:
    from dsmq.broker.connection import Connection

_PONG = encode_simple("PONG")


def hello(client: Connection, request: list[bytes]) -> bytes | None:
    if client.start_id is None:
        client.await_start(request)
        return None
    version = client.version
    if len(request) > 1:
        if request[1] not in (b"2", b"3"):
            raise UnknownVersion(f"the server speaks RESP versions 2 and 3, not {quoted(request[1])}")
        version = int(request[1])
    options = parse_options(request[2:], {b"AUTH": 2, b"SETNAME": 1, b"NOTICES": 0})
    name = parse_name(options[b"SETNAME"][0]) if b"SETNAME" in options else client.name
    if b"AUTH" in options:
        client.login.authenticate(*options[b"AUTH"])
    client.name, client.version, client.notices = name, version, client.notices or b"NOTICES" in options
    return _describe(client, client.start_id)


def _describe(client: Connection, start_id: int) -> bytes:
    settings, store = client.context.settings, client.context.store
    values: dict[str, str | int | list[int]] = {
        "server": "dsmq",
        "version": __version__,
        "proto": client.version,
        "id": client.id,
        "mode": "standalone",
        "role": "master",
        "modules": [],
        "store": "shared" if store.is_shared else "own",
        "epoch": store.epoch,
        "run": store.run,
        "last_id": max(start_id, store.last_id()),
        "lost_ids": store.lost_ids,
        "max_age_ms": round(settings.max_age_seconds * 1000),
        "max_message_bytes": min(settings.max_message_bytes, store.max_message_bytes),
        "max_topic_bytes": settings.max_topic_bytes,
        "access": client.role.name.lower(),
    }
    return encode_value(client.version, values)


def auth(client: Connection, request: list[bytes]) -> bytes:
    user = request[1] if len(request) == 3 else DEFAULT_USER
    client.login.authenticate(user, request[-1])
    return OK


def ping(_: Connection, request: list[bytes]) -> bytes:
    return encode_bulk(request[1]) if len(request) == 2 else _PONG


def echo(_: Connection, request: list[bytes]) -> bytes:
    return encode_bulk(request[1])


def quit_(client: Connection, _: list[bytes]) -> bytes:
    client.finish()
    return OK


def reset(client: Connection, _: list[bytes]) -> bytes:
    client.requests.begin(None)
    client.name, client.version, client.notices = b"", 2, False
    return encode_simple("RESET")


def select(_: Connection, request: list[bytes]) -> bytes:
    if request[1] != b"0":
        raise BadRequest("the only database is 0")
    return OK


def readonly(_client: Connection, _request: list[bytes]) -> bytes:
    return OK


def client_(client: Connection, request: list[bytes]) -> bytes:
    match [request[1].upper(), *request[2:]]:
        case [b"SETNAME", name]:
            client.name = parse_name(name)
            return OK
        case [b"GETNAME"]:
            return encode_bulk(client.name) if client.name else encode_null(client.version)
        case [b"ID"]:
            return encode_integer(client.id)
        case [b"SETINFO", _, _] | [b"NO-EVICT" | b"NO-TOUCH", _] | [b"MAINT_NOTIFICATIONS", *_]:
            # dsmq neither evicts nor announces maintenance. redis-py 8 sends the last one on every connection.
            return OK
    raise BadRequest(
        "CLIENT has the subcommands SETNAME name, GETNAME, ID, SETINFO name value, NO-EVICT, NO-TOUCH and "
        "MAINT_NOTIFICATIONS"
    )


def shutdown(client: Connection, request: list[bytes]) -> bytes | None:
    # Only the configuration decides whether a snapshot is written.
    if len(request) > 1 and request[1].upper() not in (b"NOSAVE", b"SAVE"):
        raise BadRequest("SHUTDOWN has only the options NOSAVE and SAVE, which have no effect")
    if not client.context.settings.allow_shutdown:
        raise NotPermitted("SHUTDOWN is not allowed (allow_shutdown = false)")
    client.context.request_stop(f"SHUTDOWN from client {client.id}")
    if client.notices:
        return OK
    # As in Redis: its clients would take a reply to SHUTDOWN for the reply to their next command.
    client.finish()
    return None


def config(client: Connection, request: list[bytes]) -> bytes:
    if request[1].upper() != b"GET":
        raise BadRequest("CONFIG has only the subcommand GET pattern ...")
    if any(len(pattern) > MAX_NAME_BYTES for pattern in request[2:]):
        raise BadRequest(f"a pattern may have at most {MAX_NAME_BYTES} bytes")
    wanted = Selection(pattern.lower() for pattern in request[2:])
    settings = client.context.settings.model_dump(mode="json")
    # redis-benchmark requests the first two, to report how Redis persists data; redis-cli --stat requests the last.
    settings |= {"save": "", "appendonly": "no", "databases": "1"}
    found = {name: _text(value) for name, value in settings.items() if wanted.matches(name.encode())}
    return encode_value(client.version, found)


def info(client: Connection, request: list[bytes]) -> bytes:
    wanted = {section.decode(errors="replace").lower() for section in request[1:]}
    everything = not wanted or wanted & {"all", "default", "everything"}
    lines = []
    for section, values in client.context.info().items():
        # Only an admin may know about other clients.
        if (everything or section in wanted) and (client.role is Role.ADMIN or section in ("server", "replication")):
            lines += [f"# {section.capitalize()}", *(f"{name}:{_text(value)}" for name, value in values.items()), ""]
    return encode_bulk("\r\n".join(lines).encode())


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
