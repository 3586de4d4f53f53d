"""The JetStream stream that stores the messages: its configuration, epoch, facts, and consumers.

Subjects, if the stream is called `dsmq`:

    dsmq.t.<topic>      a message; the topic is percent-encoded
    dsmq.genesis        the epoch
    dsmq.facts.epoch-<epoch>-<...>
                        a server's mark of an epoch: puts that may be stored are repeated only with it
    dsmq.facts.<part>   the numbers of the topics' last messages as of an id, for servers that start later
    dsmq.facts.purge    names and patterns of topics: mirrors delete all messages before this one
    dsmq.facts.jobs     changes to groups of workers, which mirrors make only if they still apply
    dsmq.facts.groups   the state of all groups: as of which id, and the ids of its parts (dsmq.facts.state)
    dsmq.facts.rules    the rules for topics from here on

This module uses the official client; see `nats_connection` for the requests that must be fast.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import random
import sys
import time
import zlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from nats.aio.client import Client
from nats.errors import Error as NATSError
from nats.errors import NoRespondersError

from dsmq.errors import StartupError
from dsmq.store.api import Limits
from dsmq.store.nats_api import (
    EXPECTED_LAST_ID,
    FULL,
    MESSAGE_NOT_FOUND,
    NEVER_EXPIRES,
    NO_RESPONDERS,
    NOT_CLUSTERED,
    NOT_ENABLED,
    STREAM_NOT_FOUND,
    EngineError,
)
from dsmq.store.nats_client import API_SECONDS, close_client, new_client
from dsmq.store.nats_connection import decode_token, encode_token
from dsmq.store.nats_epochs import Epochs
from dsmq.store.nats_room import Room
from dsmq.store.rules import NO_RULES, Rules, decode_rules
from dsmq.system import boot_time

if TYPE_CHECKING:
    from ssl import SSLContext

    from dsmq.store.nats_connection import Credentials, Server

# The first version with atomic batches.
MIN_VERSION = "2.12.1"
# How long the engine recognises a repeated message id. Each id takes 300 bytes of its memory, so later repetitions are
# left to the mirrors, which remember puts for longer.
DEDUPLICATION_SECONDS = 120
# Messages stay in the stream for longer than max_age, because the servers decide when a message expires.
_MARGIN, _MIN_MARGIN_SECONDS = 0.1, 60
# Nodes delete messages by their own clocks, so clocks that differ by less than the margin lose none.
CLOCK_TOLERANCE_SECONDS = _MIN_MARGIN_SECONDS
_HEARTBEAT_SECONDS = 1
# A node tries to become the leader only after 4 s without one; less here, because clocks differ.
SOLE_LEADER_SECONDS = 3.5
# Numbers are spread over this many messages, because the size of a message is limited.
FACT_PARTS = 16
# The max size of a message without its body and topic.
HEADER_BYTES = 1024

_logger = logging.getLogger(__name__)


class StreamState(NamedTuple):
    last_id: int
    epoch: str
    now_ms: int
    """The engine's clock: milliseconds since 1970."""
    kept_ms: float = math.inf
    """How long the stream keeps messages; infinite if none has expired yet."""


class StoredMessage(NamedTuple):
    id: int
    put_ms: int
    """By the engine's clock."""
    body: bytes


class Stream:
    """A server's access to the stream. Its methods raise EngineError."""

    def __init__(self, name: str, replicas: int) -> None:
        self.name = name
        self.topic_prefix = f"{name}.t.".encode()
        self.facts_prefix = f"{name}.facts.".encode()
        self._client = Client()
        self.sole_leader_until = self.majority_at = -math.inf
        """Until when no other node can become the leader, and when a majority last followed one, by `boot_time`."""
        self.heard_at = -math.inf
        """When the leader last had contact with a majority, as of its last answer."""
        self.leader = ""
        """The node that led the stream then; empty if the nodes are not a cluster."""
        self._clock_offset = 0.0
        """That node's clock, in seconds since 1970, minus `boot_time`."""
        self._clock_reported_of: str | None = None
        self._servers: list[Server] = []
        self._new_client: Callable[[Sequence[Server]], Coroutine[None, None, Client]]
        self._connecting = asyncio.Lock()
        self._replicas, self.max_age_ms, self._max_bytes = replicas, 0, 0
        self.rules: bytes | None = None
        """The last known rules for topics; None if the stream may have others."""
        self.is_configured = False
        """Whether the stream has the current configuration."""
        self.epochs, self.room = Epochs(self), Room()

    def configure(self, max_age_ms: int, max_bytes: int) -> None:
        """Set the values with which `open` configures the stream. Thread-safe."""
        self.max_age_ms, self._max_bytes = max_age_ms, max_bytes if max_bytes < sys.maxsize else -1
        self.is_configured = False

    async def connect(self, servers: Sequence[Server], credentials: Credentials, tls: SSLContext | None) -> None:
        """Connect, and reconnect whenever the connection breaks. Returns once connected."""
        self._servers = random.sample(servers, len(servers))
        self._new_client = partial(new_client, credentials, tls)
        await self._connect()

    async def _connect(self) -> None:
        servers = self._servers
        # An attempt may spend all its time on a node that does not answer, so the next one begins with another.
        self._servers = [*servers[1:], servers[0]]
        self._client = await self._new_client(servers)

    async def close(self) -> None:
        if self._client.is_connected or self._client.is_reconnecting:
            with suppress(NATSError, OSError):
                await self._client.close()

    async def leave_node(self) -> None:
        """Use another node for the next request."""
        if (url := self._client.connected_url) is not None:
            left = str(url.hostname), int(url.port or 0)
            self._servers.sort(key=lambda server: server == left)
            await close_client(self._client)

    async def open(self) -> None:
        """Create the stream if it does not exist. Raises StartupError if it is not dsmq's or can't be used."""
        # Set this first, so that a concurrent change is not lost.
        self.is_configured = True
        try:
            found = (await self._request(f"STREAM.INFO.{self.name}"))["config"]
        except EngineError as error:
            if error.code in NOT_ENABLED:
                raise StartupError(f"the NATS server has JetStream disabled: {error}") from error
            if error.code != STREAM_NOT_FOUND:
                raise
            found = await self._create(self._configuration())
        if self.rules is None:
            # Read them before configuring the stream, which would delete messages beyond its new limits.
            self.rules = await self.last_of(f"{self.name}.facts.rules") or b""
        wanted = self._configuration()
        if not found.get("allow_atomic"):
            version = self._client.connected_server_version
            raise StartupError(f"NATS server {version} is too old: {MIN_VERSION} is required")
        for name in ("subjects", "storage", "retention", "discard"):
            if found.get(name) != wanted[name]:
                raise StartupError(
                    f"stream {self.name} was not created by dsmq: its {name} is {found.get(name)}, not {wanted[name]}"
                )
        if any(found.get(name) != wanted[name] for name in ("max_age", "max_bytes", "num_replicas")):
            await self._update(found | wanted)

    async def _update(self, wanted: dict[str, Any]) -> None:
        try:
            await self._request(f"STREAM.UPDATE.{self.name}", wanted)
        except EngineError as error:
            # The stream is usable with its old configuration.
            _logger.error("can't update the configuration of stream %s: %s", self.name, error)
        else:
            _logger.warning("stream %s has been reconfigured with this server's settings", self.name)

    async def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        try:
            config: dict[str, Any] = (await self._request(f"STREAM.CREATE.{self.name}", wanted, 10.0))["config"]
        except EngineError as error:
            if error.code == NOT_CLUSTERED:
                about = f"the NATS server is not in a cluster, so store_replicas = {self._replicas} is too many"
            elif error.code in FULL:
                about = f"the NATS servers have no room for max_stored_bytes = {self._max_bytes}: {error}"
            else:
                raise
            raise StartupError(about) from error
        return config

    def _configuration(self) -> dict[str, Any]:
        try:
            rules = Rules(decode_rules(self.rules or NO_RULES, Limits()))
        except ValueError as error:
            raise StartupError(f"the rules for topics in the stream {self.name} can't be read: {error}") from error
        max_age_ms = max(self.max_age_ms, *rules.ages, 0)
        margin = max(_MIN_MARGIN_SECONDS * 1000, round(max_age_ms * _MARGIN))
        return {
            "name": self.name,
            "subjects": [f"{self.name}.t.*", f"{self.name}.genesis", f"{self.name}.facts.*"],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "num_replicas": self._replicas,
            "max_age": (max_age_ms + margin) * 1_000_000,
            # The stream keeps dropped messages until they expire.
            "max_bytes": -1 if rules.drop else self._max_bytes,
            "duplicate_window": min(DEDUPLICATION_SECONDS * 1000, self.max_age_ms) * 1_000_000,
            "allow_atomic": True,
            "allow_msg_ttl": True,
            "allow_rollup_hdrs": True,
            "allow_direct": True,
        }

    async def state(self) -> StreamState:
        """Return the state of the stream. Gives it an epoch if it has none."""
        info = await self._info()
        now, kept_ms = _milliseconds(info["ts"]), info["config"]["max_age"] / 1_000_000
        epoch = await self.epochs.current(now)
        is_whole = now - _milliseconds(info["created"]) < kept_ms
        return StreamState(info["state"]["last_seq"], epoch, now, math.inf if is_whole else kept_ms)

    async def last_id(self) -> int:
        """Return the id of the last message that is stored."""
        return int((await self._info())["state"]["last_seq"])

    async def _info(self) -> dict[str, Any]:
        """Return the stream's state and configuration.

        An isolated leader believes for up to 20 s that it still leads, so its answer alone proves nothing. But the
        answer includes the time since its last contact with each of the others, and none of them can have become the
        leader within 4 s after that.
        """
        asked = boot_time()
        info = await self._request(f"STREAM.INFO.{self.name}")
        replicas = (info.get("cluster") or {}).get("replicas", [])
        others = info["config"]["num_replicas"] - 1
        silent = sorted(replica.get("active", 0) / 1e9 or math.inf for replica in replicas)
        needed = (others + 1) // 2
        if len(silent) >= others:
            self.sole_leader_until = max(self.sole_leader_until, asked + SOLE_LEADER_SECONDS - max(silent, default=0.0))
        if sum(seconds < SOLE_LEADER_SECONDS for seconds in silent) < needed:
            # Its answer may be outdated.
            raise EngineError("the node can't reach a majority of the others")
        self.heard_at = asked - silent[needed - 1] if needed else asked
        self.majority_at, self.leader = asked, (info.get("cluster") or {}).get("leader", "")
        self.room.report(info["config"]["max_bytes"], info["state"]["bytes"], info["state"]["last_seq"])
        self._check_clock(_milliseconds(info["ts"]) / 1000)
        return info

    def _check_clock(self, now: float) -> None:
        self._clock_offset = now - boot_time()
        ahead = now - time.time()
        if abs(ahead) <= CLOCK_TOLERANCE_SECONDS:
            self._clock_reported_of = None
        elif self._clock_reported_of != self.leader:
            self._clock_reported_of = self.leader
            _logger.warning("the clock of NATS server %s is %s this machine's", self.leader, _difference(ahead))

    async def create_consumer(self, name: str, deliver_to: str, after: int, seconds: float) -> int:
        """Create a consumer that sends all messages after an id to a subject; return how many of them already exist."""
        config = {
            "name": name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": after + 1,
            "deliver_subject": deliver_to,
            "ack_policy": "none",
            "flow_control": True,
            "idle_heartbeat": _HEARTBEAT_SECONDS * 1_000_000_000,
            "inactive_threshold": 10_000_000_000,
            "max_deliver": 1,
            "mem_storage": True,
            "num_replicas": 1,
        }
        body = {"stream_name": self.name, "config": config}
        created = await self._request(f"CONSUMER.CREATE.{self.name}.{name}", body, seconds)
        ahead = _milliseconds(created["ts"]) / 1000 - boot_time() - self._clock_offset
        if abs(ahead) > CLOCK_TOLERANCE_SECONDS:
            # It may have deleted messages too early. Another consumer may be placed on another node.
            node = (created.get("cluster") or {}).get("leader", "")
            raise EngineError(f"the clock of NATS server {node} is {_difference(ahead)} that of the stream's leader")
        return int(created.get("num_pending", 0))

    async def delete_consumer(self, name: str) -> None:
        with suppress(EngineError):
            await self._request(f"CONSUMER.DELETE.{self.name}.{name}")

    # Facts

    async def read_facts(self) -> list[tuple[int, dict[bytes, int]]]:
        """Return the topics' last numbers, in parts: an id and the numbers as of that id."""
        parts = []
        for part in range(FACT_PARTS):
            if found := await self.last_of(f"{self.name}.facts.{part}"):
                facts = json.loads(found)
                numbers = {decode_token(name.encode()): int(number) for name, number in facts["numbers"].items()}
                parts.append((int(facts["at"]), numbers))
        return parts

    async def write_facts(self, at: int, numbers: Mapping[bytes, int]) -> None:
        parts: list[dict[str, int]] = [{} for _ in range(FACT_PARTS)]
        for name, number in numbers.items():
            parts[zlib.crc32(name) % FACT_PARTS][encode_token(name).decode()] = number
        for number, part in enumerate(parts):
            if part or not number:
                body = json.dumps({"at": at, "numbers": part}).encode()
                await self.publish(f"{self.name}.facts.{number}", body, {"Nats-Rollup": "sub", **NEVER_EXPIRES})

    async def renew_rules(self) -> None:
        """Write the last rules again, which changes nothing."""
        # Another server may have written others.
        with suppress(EngineError):
            await self.renew(f"{self.name}.facts.rules", {})

    async def write_rules(self, fact: bytes) -> int:
        """Add rules for topics to the stream; return their id. Earlier rules stay, for the messages in between."""
        # Configure the stream first: it may be full, and these rules may make room.
        self.rules = fact
        await self.open()
        return await self.publish(f"{self.name}.facts.rules", fact, NEVER_EXPIRES)

    def adopt(self, rules: bytes) -> None:
        """Configure the stream for these rules, which another server may have done already."""
        self.rules, self.is_configured = rules, False
        self.room.set_limit(self._configuration()["max_bytes"])

    # Requests

    @property
    def max_body_bytes(self) -> int:
        return self._client.max_payload - HEADER_BYTES

    async def publish(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        """Publish a message and wait until it is stored; return its id."""
        if len(body) > self.max_body_bytes:
            raise EngineError(f"a message of {len(body)} bytes is longer than the engine accepts (max_payload)")
        return int(_parse(await self._ask(subject, body, API_SECONDS, headers))["seq"])

    async def renew(self, subject: str, headers: dict[str, str]) -> None:
        """Publish the last message with a subject again, unless another server does: see `nats_epochs`."""
        if (last := await self.find(last_by_subj=subject)) is not None:
            await self.publish(subject, last.body, {EXPECTED_LAST_ID: str(last.id), **headers})

    async def last_of(self, subject: str) -> bytes | None:
        found = await self.find(last_by_subj=subject)
        return found and found.body

    async def find(self, **which: object) -> StoredMessage | None:
        """Return the message with an id (`seq`) or the last one with a subject (`last_by_subj`), if there is one."""
        try:
            found = (await self._request(f"STREAM.MSG.GET.{self.name}", which))["message"]
        except EngineError as error:
            if error.code == MESSAGE_NOT_FOUND:
                return None
            raise
        return StoredMessage(found["seq"], _milliseconds(found["time"]), base64.b64decode(found.get("data", "")))

    async def subjects(self, pattern: str) -> list[str]:
        """Return the subjects of messages that match a pattern."""
        body = {"subjects_filter": f"{self.name}.{pattern}"}
        return list((await self._request(f"STREAM.INFO.{self.name}", body))["state"].get("subjects") or ())

    async def purge(self, subject: str, below: int = 0) -> None:
        """Delete the messages with a subject: all, or those with ids below one."""
        await self._request(f"STREAM.PURGE.{self.name}", {"filter": subject} | ({"seq": below} if below else {}))

    async def _request(self, what: str, body: object = None, seconds: float = API_SECONDS) -> dict[str, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        return _parse(await self._ask(f"$JS.API.{what}", data, seconds))

    async def _ask(self, subject: str, data: bytes, seconds: float, headers: dict[str, str] | None = None) -> bytes:
        try:
            if self._client.is_closed:
                await self._replace_client(seconds)
            return (await self._client.request(subject, data, timeout=seconds, headers=headers)).data
        except NoRespondersError as error:
            raise EngineError("the stream has no leader at the moment", NO_RESPONDERS) from error
        except (NATSError, OSError, TimeoutError) as error:
            raise EngineError(f"the engine does not answer: {error or type(error).__name__}") from error

    async def _replace_client(self, seconds: float) -> None:
        """Connect with a new client, because the official one closes permanently after some errors."""
        async with self._connecting, asyncio.timeout(seconds):
            if self._client.is_closed:
                await self._connect()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(data)
    except ValueError:
        raise EngineError(f"the engine's answer is not JSON: {data[:100]!r}") from None
    if error := answer.get("error"):
        raise EngineError(str(error.get("description")), int(error.get("err_code", 0)))
    return answer


def _difference(seconds: float) -> str:
    return f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'}"


def _milliseconds(text: str) -> int:
    """Return a time of the engine (RFC 3339, nanoseconds) as milliseconds since 1970."""
    return int(datetime.fromisoformat(text).timestamp() * 1000)
