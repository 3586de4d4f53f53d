"""The context that all connections of a server share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsmq.broker.access import Access
    from dsmq.broker.commands import CommandTable
    from dsmq.broker.jobs import TakeQueues
    from dsmq.broker.usage import Usage
    from dsmq.settings import Settings
    from dsmq.store.api import Store


@dataclass
class ServerContext:
    """A reload replaces `settings` and `access`."""

    commands: CommandTable
    settings: Settings
    store: Store
    access: Access
    usage: Usage
    take_queues: TakeQueues
    request_stop: Callable[[str], None]
    """Stops the server; takes the reason."""
    info: Callable[[], Mapping[str, Mapping[str, object]]] = field(init=False)
    """Returns the sections of INFO, with names and values."""
