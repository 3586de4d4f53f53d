"""Attack dsmq: `python tests/attacks [NAME ...] [--quick]`.

Each attack starts its own servers on free ports, measures its effect on other clients, and cleans up. Prints a table;
the exit status is 1 if a check failed. Only a full run checks latencies, because that needs an otherwise idle machine.
README.md has the results.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable

from attacks import connections, malformed, trouble
from attacks.rig import NotHere, Row, Trial, progress, table

ATTACKS: dict[str, Callable[[Trial], None]] = {
    "before_auth": connections.before_auth,
    "unauthenticated_requests": connections.unauthenticated_requests,
    "guessing": connections.guessing,
    "slow_loris": connections.slow_loris,
    "never_read": connections.never_read,
    "flood": connections.flood,
    "no_files": connections.no_files,
    "malformed": malformed.malformed,
    "full": trouble.full,
    "stopped": trouble.stopped,
    "out_of_threads": trouble.out_of_threads,
    "clock": trouble.clock,
    "sqlite": trouble.sqlite,
    "churn": connections.churn,
    "greedy": connections.greedy,
    "tls": connections.tls,
}


def run(name: str, *, quick: bool = False) -> Trial:
    """Run an attack. Raises NotHere."""
    trial = Trial(name, quick)
    died: list[str] = []
    before, threading.excepthook = threading.excepthook, lambda died_of: died.append(repr(died_of.exc_value))
    try:
        ATTACKS[name](trial)
    finally:
        threading.excepthook = before
    # Otherwise, an attack might pass although half of it never happened.
    trial.must("the attackers did not fail", "; ".join(died) or "none did", not died)
    return trial


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"attacks, by default all: {' '.join(ATTACKS)}")
    parser.add_argument("--quick", action="store_true", help="a few seconds each, without checking latencies")
    options = parser.parse_args()
    if unknown := set(options.names).difference(ATTACKS):
        parser.error(f"unknown attack: {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    for name in options.names or ATTACKS:
        try:
            rows += run(name, quick=options.quick).rows
        except NotHere as reason:
            rows.append(Row(name, "to be run here", f"skipped: {reason}", None))
        except Exception as error:  # noqa: BLE001 - the other attacks still run
            rows.append(Row(name, "to end", f"{type(error).__name__}: {error}", False))
    progress("")
    print("\n".join(table(rows)))
    return int(any(row.ok is False for row in rows))
