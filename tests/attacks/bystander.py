"""A client that puts and gets continuously: `bystander.py HOST PORT SECURITY`, where SECURITY is JSON.

For each line on stdin, it prints its results since the previous one, as JSON.
"""

from __future__ import annotations

import json
import select
import statistics
import sys
import time

from dsmq.client import connect
from dsmq.errors import DSMQError

# Pause between rounds, so that the bystander itself does not keep the machine busy.
PAUSE_SECONDS = 0.001
TOPIC = "b"


def main(host: str, port: str, security: str) -> None:
    taken: list[float] = []
    errors = 0
    with connect(host, int(port), **json.loads(security)) as mq:
        print("{}", flush=True)
        while True:
            if select.select([sys.stdin], [], [], PAUSE_SECONDS)[0]:
                if not sys.stdin.readline():
                    return
                print(json.dumps({**summary(taken), "errors": errors}), flush=True)
                taken, errors = [], 0
            began = time.perf_counter()
            try:
                mq.put(TOPIC, "hello world!")
                if mq.get(TOPIC) != "hello world!":
                    errors += 1
            except (OSError, DSMQError):
                errors += 1
            taken.append(time.perf_counter() - began)


def summary(taken: list[float]) -> dict[str, float]:
    if len(taken) < 2:
        return {"count": len(taken)}
    return {
        "count": len(taken),
        "median": statistics.median(taken),
        "p99": statistics.quantiles(taken, n=100)[98],
        "longest": max(taken),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
