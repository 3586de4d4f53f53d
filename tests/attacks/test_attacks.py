"""Runs the attacks on a small scale. Latencies are not checked, because that requires a full run."""

from __future__ import annotations

from pathlib import Path

import pytest

from attacks import run
from attacks.rig import NotHere

pytestmark = [
    pytest.mark.attacks,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are read from /proc"),
]


@pytest.mark.parametrize("name", run.ATTACKS)
def test_attack_affects_only_the_attacker(name: str) -> None:
    try:
        trial = run.run(name, quick=True)
    except NotHere as reason:
        pytest.skip(str(reason))
    assert trial.rows
    assert trial.failed == []
