"""Deliberate defects of a server that shares jobs among workers."""

from __future__ import annotations

from typing import Any

from dsmq.broker import jobs
from dsmq.store import groups
from dsmq.store.group import Group
from dsmq.store.groups import Groups


def leases_end_soon() -> None:
    """Not a defect: a lease lasts only a second after a restart, so that the jobs of lost workers are given again."""
    groups.LEASE_AFTER_RESTART_MS = 1_000


JOB_MUTANTS: dict[Any, str] = {}
