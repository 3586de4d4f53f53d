"""The scenarios of tests/chaos on a small scale: no fault breaks a promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import run
from chaos.job_scenarios import JOB_SCENARIOS
from chaos.mutants import MUTANTS, Mutant, loses_puts, skips, swaps
from chaos.scenarios import SCENARIOS
from chaos.stage import NotHere

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are read from /proc"),
]
SEED = 8
# Scenarios with a shared store take long; the others are left to the long run.
SHARED = (
    *("leader_killed", "stream_deleted", "server_killed", "moves"),
    *("workers_and_servers_killed", "workers_and_leaders_killed", "workers_move"),
)


@pytest.mark.parametrize("name", [*SCENARIOS, *JOB_SCENARIOS, *SHARED])
def test_no_promise_breaks(name: str) -> None:
    try:
        outcome = run.play(name, SEED, quick=True)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert outcome.returned
    assert outcome.read
    assert not outcome.violations, run.show(outcome)


@pytest.mark.parametrize("mutant", [loses_puts, skips, swaps])
def test_defect_is_found(mutant: Mutant) -> None:
    """The others are left to `tests/chaos --mutants`."""
    scenario, kind = MUTANTS[mutant]
    outcome = run.play(scenario, SEED, mutant=mutant.__name__)
    assert kind in {violation.kind for violation in outcome.violations}
