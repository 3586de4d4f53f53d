"""The long run: repeats all scenarios with new seeds until the time is up, then prints a table."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from pathlib import Path

from attacks.rig import progress
from chaos import figures
from chaos.checker import summary
from chaos.cluster_scenarios import SHARED_SCENARIOS
from chaos.job_scenarios import JOB_SCENARIOS
from chaos.mutants import MUTANTS, SHARED_MUTANTS, Mutant
from chaos.scenarios import SCENARIOS
from chaos.shared_job_scenarios import SHARED_JOB_SCENARIOS
from chaos.stage import NotHere, Outcome, Stage

SHARED = SHARED_SCENARIOS | SHARED_JOB_SCENARIOS
ALL = SCENARIOS | JOB_SCENARIOS | SHARED
# Violations shown per round; the history has all of them.
SHOWN = 3


def play(name: str, seed: int, *, quick: bool = False, keep: Path | None = None, mutant: str = "") -> Outcome:
    """Run one round of a scenario. Raises NotHere."""
    with Stage(name, seed, quick, mutant=mutant) as stage:
        ALL[name](stage)
    return stage.outcome(keep)


def hunt(mutants: dict[Mutant, tuple[str, str]], seed: int, keep: Path | None) -> bool:
    """Run servers with defects; return whether each was found by the kind of violation that it causes."""
    missed = 0
    for mutant, (name, kind) in mutants.items():
        violations = play(name, seed, keep=keep, mutant=mutant.__name__).violations
        is_found = any(violation.kind == kind for violation in violations)
        missed += not is_found
        print(f"{mutant.__name__}, by {name}: {'' if is_found else 'NOT FOUND: '}{summary(violations)}", flush=True)
    return not missed


def show(outcome: Outcome) -> str:
    """Return the violations and where the history is kept."""
    lines = [f"{outcome.scenario}, seed {outcome.seed}: {summary(outcome.violations)}; kept in {outcome.kept}"]
    lines += map(str, outcome.violations[:SHOWN])
    return "\n".join(lines)


def table(outcomes: list[Outcome]) -> list[str]:
    """Return the lines of a Markdown table, one per scenario."""
    head = "scenario", "rounds", "faults", "puts returned", "raised: maybe / not stored", "read", "pause", "violations"
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in dict.fromkeys(one.scenario for one in outcomes):
        rounds = [one for one in outcomes if one.scenario == name]
        cells = (
            f"`{name}`",
            f"{len(rounds)}",
            f"{sum(one.faults for one in rounds):,}",
            f"{sum(one.returned for one in rounds):,}",
            f"{sum(one.maybe_stored for one in rounds):,} / {sum(one.not_stored for one in rounds):,}",
            f"{sum(one.read for one in rounds):,}",
            f"{max(one.pause for one in rounds):.2f} s",
            f"{sum(len(one.violations) for one in rounds):,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run(names: list[str], seed: int, until: float, keep: Path | None) -> list[Outcome]:
    """Run the scenarios in turn, each at least once."""
    outcomes: list[Outcome] = []
    for at in itertools.count():
        name = names[at % len(names)]
        if at >= len(names) and time.monotonic() >= until:
            return outcomes
        outcomes += _play(name, seed + at // len(names), keep)
    return outcomes


def _play(name: str, seed: int, keep: Path | None) -> list[Outcome]:
    progress(f"{name}, seed {seed}")
    try:
        outcome = play(name, seed, keep=keep)
    except NotHere as reason:
        progress(f"{name}: skipped: {reason}")
        return []
    if outcome.violations:
        print(show(outcome), flush=True)
    return [outcome]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="duration; each scenario runs at least once")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first round; each further round adds one")
    parser.add_argument("--store", choices=["sqlite", "nats"], default="sqlite", help="nats: servers that share one")
    names = [*ALL]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"scenarios: {' '.join(names)}")
    parser.add_argument("--figures", action="store_true", help="first measure restarts, resets, the pause and speed")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to store histories with violations")
    parser.add_argument("--mutants", action="store_true", help="only check that servers with defects are detected")
    options = parser.parse_args()
    # Clients would log each fault.
    logging.getLogger("dsmq").addHandler(logging.NullHandler())
    if options.mutants:
        return int(not hunt(SHARED_MUTANTS if options.store == "nats" else MUTANTS, options.seed, options.keep))
    measured = figures.measure(options.seed) if options.figures else []
    until = time.monotonic() + 60 * options.minutes
    scenarios = SHARED if options.store == "nats" else SCENARIOS | JOB_SCENARIOS
    outcomes = run(options.only or [*scenarios], options.seed, until, options.keep)
    progress("")
    print("\n".join([*table(outcomes), *(["", *figures.table(measured)] if measured else [])]))
    return int(any(outcome.violations for outcome in outcomes) or not all(one.ok for one in measured))


if __name__ == "__main__":
    sys.exit(main())
