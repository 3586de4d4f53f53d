"""`dsmq serve` with sockets passed as systemd does: `passed.py QUEUE HTTP`, two file descriptors."""

from __future__ import annotations

import fcntl
import os
import sys

from dsmq.__main__ import main

FIRST_DESCRIPTOR = 3
# Above the descriptors that they will be moved to.
SPARE_DESCRIPTOR = 10

if __name__ == "__main__":
    spare = [fcntl.fcntl(int(word), fcntl.F_DUPFD, SPARE_DESCRIPTOR) for word in sys.argv[1:]]
    for number, descriptor in enumerate(spare):
        os.dup2(descriptor, FIRST_DESCRIPTOR + number)
        os.close(descriptor)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "dsmq:metrics"}
    sys.argv[1:] = ["serve"]
    sys.exit(main())
