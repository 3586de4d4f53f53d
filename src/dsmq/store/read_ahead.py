"""Reads the next messages of groups of workers in advance: reading many takes little longer than reading one."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from dsmq.store.api import Found, TopicMessage
from dsmq.store.group import Group

# Messages read at first and at most, and max bytes kept. Each time all have been given, twice as many are read.
_MIN_MESSAGES, MAX_MESSAGES, MAX_BYTES = 2, 32, 8_192
# Max groups for which messages are kept; the groups that took messages last are chosen.
_MAX_GROUPS = 100


@dataclass(slots=True)
class _Ahead:
    after: int
    """The messages follow this id without gaps."""
    messages: deque[TopicMessage]
    wanted: int
    read_at: int
    state: object
    """Identifies what had been deleted when they were read."""


class ReadAhead:
    """The messages of a few groups, valid as long as the store deletes none."""

    def __init__(self, read: Callable[[Group, int, int], Found]) -> None:
        self._read = read
        self._ahead: OrderedDict[tuple[bytes, bytes], _Ahead] = OrderedDict()

    def next(self, group: Group, now: int, state: object) -> Found:
        """Return a group's next message. Until the group's position reaches it, it is returned again."""
        ahead = self._ahead.get((group.key, group.name))
        # With a shared store, a group may move back, if other servers did not accept what it gave.
        if ahead is not None and ahead.after <= group.position and ahead.state == state:
            messages, passed = ahead.messages, now - ahead.read_at
            while messages and messages[0].id <= group.position:
                ahead.after = messages.popleft().id
            if messages and messages[0].left_ms >= passed:
                topic, message_id, number, age_ms, body, left_ms = messages[0]
                message = TopicMessage(topic, message_id, number, age_ms + passed, body, left_ms - passed)
                return Found(message_id, [message], is_complete=True)
            if not messages:
                return self._read_more(group, now, state, min(2 * ahead.wanted, MAX_MESSAGES))
        return self._read_more(group, now, state, _MIN_MESSAGES)

    def _read_more(self, group: Group, now: int, state: object, count: int) -> Found:
        key = group.key, group.name
        self._ahead.pop(key, None)
        found = self._read(group, count, MAX_BYTES)
        if len(found.messages) < 2:
            return found
        first, *others = found.messages
        if sum([len(message.body) for message in others]) > MAX_BYTES:
            # The last message is long.
            others.pop()
        self._ahead[key] = _Ahead(first.id, deque(others), count, now, state)
        if len(self._ahead) > _MAX_GROUPS:
            self._ahead.popitem(last=False)
        return Found(first.id, [first], is_complete=True)

    def forget(self, group: Group) -> None:
        self._ahead.pop((group.key, group.name), None)
