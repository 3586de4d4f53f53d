"""`dsmq work` as a worker. Its command is this file, which records the job: `commands.py NAME KEY GROUP LOG`."""

import json
import os
import random
import sys
import time

# How often the command fails, and how long it takes at most, in seconds.
FAILED_RATIO, WORK_SECONDS = 0.1, 0.1


def main() -> int:
    # Few imports, because it runs for each job.
    name, key, group, log = sys.argv[1:]
    about = {"worker": name, "key": key, "group": group, "body": sys.stdin.read()}
    about |= {"id": int(os.environ["DSMQ_JOB_ID"]), "attempt": int(os.environ["DSMQ_ATTEMPT"])}
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def record(**event: object) -> None:
        os.write(file, (json.dumps(about | event) + "\n").encode())

    now = time.monotonic()
    # Its lease began earlier, and is extended, so it is unknown until when the job is held.
    times = {"began": now, "sent": now, "ended": now, "lease": 0.0}
    record(kind="Taken", token=f"{name} {now}", topic=os.environ["DSMQ_TOPIC_NAME"], **times)
    time.sleep(random.uniform(0, WORK_SECONDS))
    has_failed = random.random() < FAILED_RATIO
    record(kind="Settled", verb="return" if has_failed else "done", began=time.monotonic())
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
