"""The limits and age for each topic, from the first rule that matches its name or else the general ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsmq.store.api import DROP_OLDEST, Limits, TopicRule
from dsmq.store.selection import Selection

if TYPE_CHECKING:
    from dsmq.store.topics import Topic


@dataclass(frozen=True, slots=True, eq=False)
class TopicLimits:
    """The limits of a topic."""

    rules: Rules
    """The rules that these limits come from."""
    max_messages: int
    max_bytes: int
    max_age_ms: int | None
    """None: the store's max age applies."""
    drops: bool
    """Whether the topic drops its oldest messages when it is full."""
    pattern: str
    """The matching rule's pattern; empty if no rule matches."""

    def limit_name(self, what: str) -> str:
        """Return the name of the limit on `messages` or `bytes`."""
        return f"max_{what} of topics {self.pattern}" if self.pattern else f"max_stored_{what}_per_topic"


class Rules:
    """The rules for all topics. Immutable; a topic remembers the limits that apply to it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._rules = [(Selection([rule.pattern]), self._limits_of(rule)) for rule in limits.topic]
        self._others = self._limits_of(TopicRule(b""))
        every = [self._others, *(one for _, one in self._rules)]
        self.drop = any(one.drops for one in every)
        """Whether any topic drops messages."""
        self.ages = [one.max_age_ms for one in every if one.max_age_ms is not None]
        """The ages set in rules."""
        # If all topics together are below these, no limit is exceeded.
        self.safe_messages = min(limits.max_stored_messages, *(one.max_messages for one in every))
        self.safe_bytes = min(limits.max_stored_bytes, *(one.max_bytes for one in every))

    def _limits_of(self, rule: TopicRule) -> TopicLimits:
        limits = self.limits
        return TopicLimits(
            self,
            limits.max_stored_messages_per_topic if rule.max_messages is None else rule.max_messages,
            limits.max_stored_bytes_per_topic if rule.max_bytes is None else rule.max_bytes,
            rule.max_age_ms,
            (rule.when_full or limits.when_full) == DROP_OLDEST,
            rule.pattern.decode(errors="replace"),
        )

    def of(self, topic: Topic) -> TopicLimits:
        limits = topic.limits
        if limits is None or limits.rules is not self:
            matching = (one for selection, one in self._rules if selection.matches(topic.name))
            topic.limits = limits = next(matching, self._others)
        return limits


# What a server writes if its settings contain no rules.
NO_RULES = b"{}"


def encode_rules(limits: Limits) -> bytes:
    """Return the limits on single topics, encoded for the servers that share the store."""
    if not limits.topic and limits.when_full != DROP_OLDEST:
        return NO_RULES
    fields = limits._asdict()
    for name in ("max_topics", "max_stored_messages", "max_stored_bytes"):
        del fields[name]
    fields["topic"] = [(rule.pattern.decode("latin-1"), *rule[1:]) for rule in limits.topic]
    return json.dumps(fields).encode()


def decode_rules(fact: bytes, limits: Limits) -> Limits:
    """Return limits with their rules replaced by encoded ones. Raises ValueError."""
    try:
        fields: dict[str, Any] = {"when_full": Limits().when_full, "topic": (), **json.loads(fact)}
        rules = [TopicRule(pattern.encode("latin-1"), *others) for pattern, *others in fields["topic"]]
        return limits._replace(**fields | {"topic": tuple(rules)})
    except (AttributeError, TypeError) as error:
        raise ValueError(str(error)) from error
