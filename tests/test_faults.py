"""The attacks of tests/faults, in small: what they must show holds but for times, which are judged in the full run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import attacks
from rig import NotHere

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are read from /proc")


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_an_attack_costs_the_attacker_alone(name: str) -> None:
    try:
        trial = attacks.run(name, quick=True)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert trial.rows
    assert trial.failed == []
