"""Headers and error codes of JetStream that several modules use."""

from __future__ import annotations

from dsmq.errors import DSMQError

# The header of a message to which max_age does not apply.
NEVER_EXPIRES = {"Nats-TTL": "never"}

# The header that makes the engine refuse a message (WRONG_SEQUENCE) unless the last one with its subject, or with the
# subject in <header>-Subject, has this id; 0: unless there is none.
EXPECTED_LAST_ID = "Nats-Expected-Last-Subject-Sequence"
# How many times per max_age servers publish again what a stream always needs: see `nats_epochs`.
RENEWALS_PER_MAX_AGE = 4

STREAM_NOT_FOUND, MESSAGE_NOT_FOUND, WRONG_SEQUENCE = 10059, 10037, 10071
NO_RESPONDERS = 503
NOT_ENABLED, NOT_CLUSTERED = (10039, 10035), 10074
FULL = frozenset((10002, 10023, 10028, 10047, 10077))


class EngineError(DSMQError):
    """The engine refuses a request or does not answer."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code
