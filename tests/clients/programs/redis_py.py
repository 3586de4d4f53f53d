"""A client of dsmq with redis-py: see harness.py for its commands."""

import os
import sys
import time

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

port, protocol, token = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
options = {"protocol": protocol} if protocol > 2 else {}
# If redis-py retried puts by itself, a retry would look like a new put.
client = redis.Redis(port=port, password=token or None, retry=Retry(NoBackoff(), 0), **options)


def flat(value):
    if isinstance(value, (list, tuple)):
        return " ".join(map(flat, value))
    return value.decode() if isinstance(value, bytes) else str(value)


def read(topic):
    """Print each message once; the last id and the epoch are the position."""
    after, epoch = 0, "unknown"
    while True:
        try:
            found = client.execute_command("READ", topic, after, "WAIT", 500, "EPOCH", epoch)
        except redis.ResponseError as error:
            code, *words = str(error).split()
            if code == "EPOCH":
                # Another server, or one that has lost its messages: all its messages are new.
                after, epoch = 0, words[0]
            elif code != "CLOSING":
                raise
        except (redis.ConnectionError, redis.TimeoutError):
            time.sleep(0.05)
        else:
            for message_id, _number, _age, body, _left in zip(*[iter(found)] * 5, strict=True):
                print("-", message_id, body.decode(), flush=True)
                after = message_id
                if body == b"end":
                    return "done"


def write(topic, first, last):
    """Store each message once; report one that may have been stored in an earlier run of the server."""
    producer, run = os.urandom(8).hex(), "unknown"
    for seq in range(int(first), int(last) + 1):
        again = []
        while True:
            try:
                stored = client.execute_command("PUT", topic, seq, "KEY", producer, seq, *again, "RUN", run)
                print("-", stored, seq, flush=True)
                break
            except redis.ResponseError as error:
                code, *words = str(error).split()
                if code == "EPOCH":
                    run = words[1]
                    if again:
                        print("?", seq, flush=True)
                        break
                elif code != "CLOSING":
                    raise
            except (redis.ConnectionError, redis.TimeoutError):
                again = ["AGAIN"]
                time.sleep(0.05)
    return "done"


def pipeline(topic, count):
    pipe = client.pipeline(transaction=False)
    for number in range(int(count)):
        pipe.execute_command("PUT", topic, f"{number:050}")
    return len(set(pipe.execute()))


def transaction(*words):
    """Run the words, three per command, in a transaction."""
    pipe = client.pipeline()
    for command in zip(*[iter(words)] * 3, strict=True):
        pipe.execute_command(*command)
    return pipe.execute(raise_on_error=False)


commands = {
    "call": client.execute_command,
    "read": read,
    "write": write,
    "pipeline": pipeline,
    "transaction": transaction,
    "shutdown": client.shutdown,
}
for line in sys.stdin:
    name, *words = line.split()
    try:
        print("=", flat(commands[name](*words)), flush=True)
    except redis.RedisError as error:
        print("!", error, flush=True)
