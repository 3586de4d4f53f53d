"""Time typical operations on one system: `python tests/performance/suite.py [SYSTEM]`.

SYSTEM is dsmq, redis, beanstalkd or nats; its server is started. `dsmq bench` measures the same on a running dsmq.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

import brokers
import drivers

from dsmq import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("system", nargs="?", default="dsmq", choices=[name for name, *_ in brokers.KNOWN])
    parser.add_argument("--count", type=int, default=1000, help="how many times to run each operation; default: 1000")
    options = parser.parse_args()
    with ExitStack() as stack:
        found = brokers.find(stack, [options.system])
        if not found:
            sys.exit(1)
        client = drivers.SYSTEMS[options.system](found[0].port)
        print(f"{options.system} {brokers.versions([options.system])[options.system]}")
        for figure in bench.measure(client, options.count, brokers.progress):
            brokers.progress("")
            print(figure, flush=True)
        client.close()


if __name__ == "__main__":
    main()
