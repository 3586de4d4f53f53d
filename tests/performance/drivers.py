"""One client of one broker, driven by `compare.py` line by line: `python drivers.py SYSTEM PORT`.

It reads lines `operation count` and answers each with a line of JSON. Every broker is used through its usual Python
client, as its users would do, in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

# What a client calls when it has a job, before it finishes it.
OnJob = Callable[[], object]
SHORT = "hello world!"
LARGE = "x" * 100_000
NEVER = 3600
TASKS = 100


async def put_in_tasks(put: Callable[[], Awaitable[object]], count: int) -> float:
    """Return microseconds per put, with several tasks that each await one put after another."""

    async def task() -> None:
        for _ in range(count // TASKS):
            await put()

    # Connections are opened before timing.
    await asyncio.gather(*(put() for _ in range(TASKS)))
    before = time.perf_counter()
    await asyncio.gather(*(task() for _ in range(TASKS)))
    return since(before, count)


class Dsmq:
    """This project."""

    def __init__(self, port: int) -> None:
        from dsmq.client import connect

        self.port = port
        self.mq = connect(port=port)
        if hasattr(self.mq, "take"):
            # An earlier commit has no workers.
            self.work, self.jobs, self.hold = self._work, self._jobs, self._hold

    def put(self, topic: str, message: str) -> None:
        self.mq.put(topic, message)

    def put_many(self, topic: str, messages: list[str]) -> None:
        self.mq.put_many(topic, messages)

    def task_puts(self, topic: str, count: int) -> float:
        async def run() -> float:
            from dsmq import aio

            async with await aio.connect(port=self.port) as mq:
                return await put_in_tasks(lambda: mq.put(topic, SHORT), count)

        return asyncio.run(run())

    def get(self, topic: str) -> Any:
        return self.mq.get(topic)

    def wait(self, topic: str) -> Any:
        return self.mq.get_wait(topic, timeout=NEVER)

    def _work(self, topic: str, timeout: float = 0.0, on_job: OnJob = int) -> Any:
        """Take a job and finish it."""
        job = self.mq.take(topic, timeout=timeout)
        if job is not None:
            on_job()
            self.mq.done(job)
            return job.text
        return None

    def _jobs(self, topic: str) -> Iterator[Any]:
        """Iterate over jobs, finishing each, until there are none."""
        for job in self.mq.work(topic, timeout=0):
            yield job.text

    def _hold(self, topic: str, count: int) -> None:
        """Take jobs without finishing them."""
        for _ in range(count):
            self.mq.take(topic, timeout=0, lease=3600)

    def close(self) -> None:
        self.mq.close()


class Dsmq14:
    """dsmq 1.4: puts are not acknowledged, and readers wait by polling."""

    def __init__(self, port: int) -> None:
        from dsmq.client import connect

        self.mq = connect(port=port)

    def put(self, topic: str, message: str) -> None:
        self.mq.put(topic, message)

    def get(self, topic: str) -> Any:
        return self.mq.get(topic)

    def close(self) -> None:
        self.mq.close()


class Redis:
    """Redis streams, through redis-py with hiredis."""

    def __init__(self, port: int) -> None:
        import redis

        self.port = port
        self.redis = redis.Redis(port=port, decode_responses=True, socket_timeout=None)
        self.positions: dict[str, str] = {}
        self.groups: set[str] = set()

    def put(self, topic: str, message: str) -> None:
        self.redis.xadd(topic, {"m": message})

    def put_many(self, topic: str, messages: list[str]) -> None:
        pipeline = self.redis.pipeline(transaction=False)
        for message in messages:
            pipeline.xadd(topic, {"m": message})
        pipeline.execute()

    def task_puts(self, topic: str, count: int) -> float:
        async def run() -> float:
            import redis.asyncio

            async with redis.asyncio.Redis(port=self.port) as client:
                return await put_in_tasks(lambda: client.xadd(topic, {"m": SHORT}), count)

        return asyncio.run(run())

    def get(self, topic: str) -> Any:
        found: Any = self.redis.xrange(topic, "(" + self.positions.get(topic, "0-0"), "+", count=1)
        if not found:
            return None
        self.positions[topic], fields = found[0]
        return fields["m"]

    def wait(self, topic: str) -> Any:
        found: Any = self.redis.xread({topic: self.positions.get(topic, "0-0")}, count=1, block=NEVER * 1000)
        self.positions[topic], fields = next(iter(found.values()))[0][0] if isinstance(found, dict) else found[0][1][0]
        return fields["m"]

    def create_group(self, topic: str) -> None:
        import redis

        if topic not in self.groups:
            with suppress(redis.ResponseError):
                # Another worker may have created it.
                self.redis.xgroup_create(topic, "workers", "0", mkstream=True)
            self.groups.add(topic)

    def hold(self, topic: str, count: int) -> None:
        self.create_group(topic)
        for _ in range(0, count, 1000):
            self.redis.xreadgroup("workers", "me", {topic: ">"}, count=1000)

    def work(self, topic: str, timeout: float = 0.0, on_job: OnJob = int) -> Any:
        """Take an entry as a consumer of a group and acknowledge it."""
        self.create_group(topic)
        block = round(timeout * 1000) or None
        found: Any = self.redis.xreadgroup("workers", "me", {topic: ">"}, count=1, block=block)
        if not found:
            return None
        entry, fields = next(iter(found.values()))[0][0] if isinstance(found, dict) else found[0][1][0]
        on_job()
        self.redis.xack(topic, "workers", entry)
        return fields["m"]

    def close(self) -> None:
        self.redis.close()


class RedisList:
    """Redis lists, through redis-py with hiredis: an element is lost if the worker that popped it dies."""

    def __init__(self, port: int) -> None:
        import redis

        self.redis = redis.Redis(port=port, decode_responses=True, socket_timeout=None)

    def put(self, topic: str, message: str) -> None:
        self.redis.rpush(topic, message)

    def put_many(self, topic: str, messages: list[str]) -> None:
        self.redis.rpush(topic, *messages)

    def work(self, topic: str, timeout: float = 0.0, on_job: OnJob = int) -> Any:
        found: Any = self.redis.blpop([topic], timeout) if timeout else self.redis.lpop(topic)
        on_job()
        return found[1] if timeout and found else found

    def close(self) -> None:
        self.redis.close()


class Beanstalk:
    """beanstalkd, through greenstalk: a work queue, each message goes to one reader."""

    def __init__(self, port: int) -> None:
        import greenstalk

        self.client = greenstalk.Client(("127.0.0.1", port))
        self.timed_out = greenstalk.TimedOutError
        self.used = self.watched = "default"

    def put(self, topic: str, message: str) -> None:
        self.use(topic)
        self.client.put(message)

    def use(self, topic: str) -> None:
        if topic != self.used:
            self.client.use(topic)
            self.used = topic

    def watch(self, topic: str) -> None:
        if topic != self.watched:
            self.client.watch(topic)
            self.client.ignore(self.watched)
            self.watched = topic

    def get(self, topic: str) -> Any:
        return self.work(topic)

    def wait(self, topic: str) -> Any:
        return self.work(topic, NEVER)

    def hold(self, topic: str, count: int) -> None:
        self.watch(topic)
        for _ in range(count):
            self.client.reserve(timeout=0)

    def work(self, topic: str, timeout: float = 0.0, on_job: OnJob = int) -> Any:
        self.watch(topic)
        try:
            job = self.client.reserve(timeout=round(timeout))
        except self.timed_out:
            return None
        on_job()
        self.client.delete(job)
        return job.body

    def close(self) -> None:
        self.client.close()


class Rabbit:
    """RabbitMQ, through pika, with confirmed puts and acknowledged jobs."""

    def __init__(self, port: int) -> None:
        import pika

        self.connection = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port, heartbeat=0))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        self.queues: set[str] = set()

    def declare(self, topic: str) -> None:
        if topic not in self.queues:
            self.channel.queue_declare(topic)
            self.queues.add(topic)

    def put(self, topic: str, message: str) -> None:
        self.declare(topic)
        self.channel.basic_publish("", topic, message.encode())

    def hold(self, topic: str, count: int) -> None:
        for _ in range(count):
            self.channel.basic_get(topic)

    def work(self, topic: str, timeout: float = 0.0, on_job: OnJob = int) -> Any:
        self.declare(topic)
        if timeout:
            self.channel.basic_qos(prefetch_count=1)
            method, _, body = next(self.channel.consume(topic, inactivity_timeout=timeout))
        else:
            method, _, body = self.channel.basic_get(topic)
        if method is None:
            return None
        on_job()
        self.channel.basic_ack(method.delivery_tag)
        return body.decode()

    def jobs(self, topic: str) -> Iterator[Any]:
        """Let the server send jobs, one after another."""
        self.declare(topic)
        self.channel.basic_qos(prefetch_count=1)
        try:
            for method, _, body in self.channel.consume(topic, inactivity_timeout=0.2):
                if method is None:
                    # Nothing has arrived for a while, perhaps because the machine is busy.
                    if self.channel.queue_declare(topic, passive=True).method.message_count:
                        continue
                    break
                yield body.decode()
                self.channel.basic_ack(method.delivery_tag)
        finally:
            self.channel.cancel()

    def close(self) -> None:
        self.connection.close()


class Nats:
    """NATS with JetStream in memory, through nats-py, which is asynchronous."""

    def __init__(self, port: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.run(self.connect(port))
        self.positions: dict[str, int] = {}

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    async def connect(self, port: int) -> None:
        import nats
        from nats.js.api import StorageType, StreamConfig

        self.client = await nats.connect(f"nats://127.0.0.1:{port}")
        self.stream = self.client.jetstream()
        await self.stream.add_stream(StreamConfig(name="S", subjects=["q.*"], storage=StorageType.MEMORY))

    def put(self, topic: str, message: str) -> None:
        self.run(self.stream.publish(f"q.{topic}", message.encode()))

    def put_many(self, topic: str, messages: list[str]) -> None:
        async def publish() -> None:
            for at in range(0, len(messages), 500):
                await asyncio.gather(*(self.stream.publish(f"q.{topic}", m.encode()) for m in messages[at : at + 500]))

        self.run(publish())

    def task_puts(self, topic: str, count: int) -> float:
        message = SHORT.encode()
        return self.run(put_in_tasks(lambda: self.stream.publish(f"q.{topic}", message), count))

    def get(self, topic: str) -> Any:
        from nats.js.errors import NotFoundError

        try:
            after = self.positions.get(topic, 0)
            found = self.run(self.stream.get_msg("S", seq=after + 1, subject=f"q.{topic}", next=True))
        except NotFoundError:
            return None
        self.positions[topic] = found.seq
        return found.data.decode()

    def close(self) -> None:
        self.run(self.client.close())
        self.loop.close()


# The requests that put a message and that wait for one after a position.
FAN_OUT = {
    "dsmq": ([b"PUT", b"<topic>", SHORT.encode()], [b"READ", b"<topic>", b"<id>", b"WAIT", b"60000"]),
    "redis": (
        [b"XADD", b"<topic>", b"*", b"m", SHORT.encode()],
        [b"XREAD", b"BLOCK", b"60000", b"STREAMS", b"<topic>", b"<id>"],
    ),
}


def id_in(reply: bytes) -> bytes:
    """Return the id in the reply to a put: an integer or a bulk string."""
    return reply.strip().split(b"\r\n")[-1].lstrip(b":")


SYSTEMS = {
    "dsmq": Dsmq,
    "dsmq14": Dsmq14,
    "redis": Redis,
    "redis-lists": RedisList,
    "beanstalkd": Beanstalk,
    "rabbitmq": Rabbit,
    "nats": Nats,
}


# What an operation needs of a client, if not `get`.
NEEDS = {
    **dict.fromkeys(("put", "large_put", "fan_out"), "put"),
    **dict.fromkeys(("put_many", "fill"), "put_many"),
    "task_puts": "task_puts",
    "fill_to_hold": "hold",
    "ping_pong": "wait",
    **dict.fromkeys(("work", "work_loop", "empty_work", "hand_over", "drain"), "work"),
    "hold": "hold",
}


class Measure:
    """The operations. Each returns microseconds per operation or several figures."""

    def __init__(self, system: str, port: int) -> None:
        self.system, self.port = system, port
        self.client: Any = SYSTEMS[system](port)
        self.round = 0

    def topic(self, operation: str) -> str:
        """Return a new topic, so that no backlog of an earlier round interferes."""
        self.round += 1
        return f"{operation}{self.round}"

    def put(self, count: int) -> float:
        topic, put = self.topic("put"), self.client.put
        before = time.perf_counter()
        for _ in range(count):
            put(topic, SHORT)
        return since(before, count)

    def get(self, count: int) -> float:
        topic = self.topic("get")
        for _ in range(count):
            self.client.put(topic, SHORT)
        return self.timed_gets(topic, count, SHORT)

    def timed_gets(self, topic: str, count: int, message: str) -> float:
        got = 0
        get = self.client.get
        before = time.perf_counter()
        for _ in range(count):
            got += get(topic) == message
        taken = since(before, count)
        # dsmq 1.4 deletes all but ten messages, so most of these reads would find nothing.
        if got != count and self.system != "dsmq14":
            raise AssertionError(f"{got} of {count} messages")
        return taken

    def empty_get(self, count: int) -> float:
        topic, get = self.topic("empty"), self.client.get
        before = time.perf_counter()
        for _ in range(count):
            if get(topic):
                raise AssertionError("a message from nowhere")
        return since(before, count)

    def work(self, count: int) -> float:
        """Take jobs with a backlog and finish each."""
        topic, work = self.topic("work"), self.client.work
        for _ in range(count):
            self.client.put(topic, SHORT)
        got = 0
        before = time.perf_counter()
        for _ in range(count):
            got += work(topic) == SHORT
        taken = since(before, count)
        if got != count:
            raise AssertionError(f"{got} of {count} jobs")
        return taken

    def jobs(self, topic: str) -> Iterator[Any]:
        """Iterate over jobs as a worker usually does, finishing each, until there are none."""
        if hasattr(self.client, "jobs"):
            return self.client.jobs(topic)
        return iter(lambda: self.client.work(topic), None)

    def work_loop(self, count: int) -> float:
        """Take jobs with a backlog in a loop and finish each."""
        topic = self.topic("loop")
        for _ in range(count + 1):
            self.client.put(topic, SHORT)
        jobs = self.jobs(topic)
        next(jobs)
        before = time.perf_counter()
        for _ in range(count):
            if next(jobs) != SHORT:
                raise AssertionError("not the job")
        return since(before, count)

    def fill_jobs(self, count: int) -> str:
        """Put jobs and return their topic."""
        topic, messages = self.topic("many-jobs"), ["x" * 100] * 1_000
        for _ in range(0, count, len(messages)):
            if hasattr(self.client, "put_many"):
                self.client.put_many(topic, messages)
            else:
                for message in messages:
                    self.client.put(topic, message)
        return topic

    def drain(self, count: int, workers: int) -> float:
        """Return jobs a second that this many workers do, each a process."""
        topic = self.fill_jobs(count)
        words = [sys.executable, __file__, self.system, str(self.port), "worker", topic, "", "0"]
        with ExitStack() as stack:
            others = [
                stack.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
                for _ in range(workers)
            ]
            for other in others:
                assert other.stdout is not None
                other.stdout.readline()
            before = time.monotonic()
            for other in others:
                assert other.stdin is not None
                other.stdin.write("go\n")
                other.stdin.flush()
            results = [other.stdout.readline().split() for other in others if other.stdout]
        if sum(int(done) for done, _ in results) != count:
            raise AssertionError(f"{results} of {count} jobs")
        return count / (max(float(ended) for _, ended in results) - before)

    def worker(self, topic: str, _: str, __: int) -> None:
        """Do jobs in another process; print their number and when the last one was done."""
        print("ready", flush=True)
        sys.stdin.readline()
        done, ended = 0, 0.0
        for _job in self.jobs(topic):
            done, ended = done + 1, time.monotonic()
        print(done, ended, flush=True)

    def hold(self, count: int) -> None:
        """Take all jobs without finishing them."""
        self.client.hold(self.held, count)

    def fill_to_hold(self, count: int) -> None:
        self.held = self.fill_jobs(count)

    def empty_work(self, count: int) -> float:
        topic, work = self.topic("idle"), self.client.work
        before = time.perf_counter()
        for _ in range(count):
            if work(topic) is not None:
                raise AssertionError("a job from nowhere")
        return since(before, count)

    def hand_over(self, count: int) -> dict[str, float]:
        """Return the time from a put until a waiting worker in another process has the job."""
        topic = self.topic("hand")
        words = [sys.executable, __file__, self.system, str(self.port), "answer", topic, "", str(count)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            taken = []
            for _ in range(count):
                # The worker waits, or is about to: it has read the clock, and is requesting the next job.
                other.stdout.readline()
                time.sleep(0.001)
                before = time.monotonic()
                self.client.put(topic, SHORT)
                taken.append((float(other.stdout.readline()) - before) * 1e6)
        taken.sort()
        return {"p50": statistics.median(taken), "p99": taken[round(len(taken) * 0.99) - 1]}

    def answer(self, topic: str, _: str, count: int) -> None:
        """Take jobs in the other process and print the time of each."""
        taken: list[float] = []
        for _number in range(count):
            print("ready", flush=True)
            if self.client.work(topic, NEVER, lambda: taken.append(time.monotonic())) != SHORT:
                raise AssertionError("not the job")
            print(taken.pop(), flush=True)

    def large_put(self, count: int) -> float:
        topic, put = self.topic("large"), self.client.put
        before = time.perf_counter()
        for _ in range(count):
            put(topic, LARGE)
        return since(before, count)

    def large_get(self, count: int) -> float:
        topic = self.topic("large")
        for _ in range(count):
            self.client.put(topic, LARGE)
        return self.timed_gets(topic, count, LARGE)

    def put_many(self, count: int) -> float:
        topic, messages = self.topic("many"), [SHORT] * count
        before = time.perf_counter()
        self.client.put_many(topic, messages)
        return since(before, count)

    def task_puts(self, count: int) -> float:
        return self.client.task_puts(self.topic("tasks"), count)

    def fill(self, count: int) -> None:
        """Put `count` messages of 100 bytes."""
        for _ in range(0, count, 10_000):
            self.client.put_many("held", ["x" * 100] * 10_000)

    def fan_out(self, count: int) -> float:
        """Return deliveries per second to 100 waiting readers, over plain sockets, because so many clients would
        dominate.
        """

        def send(sock: socket.socket, words: list[bytes]) -> None:
            words = [{b"<topic>": topic, b"<id>": last_id}.get(word, word) for word in words]
            sock.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))

        topic, last_id = self.topic("fan").encode(), b""
        put, wait = FAN_OUT[self.system]
        with ExitStack() as stack:
            writer, *readers = [
                stack.enter_context(socket.create_connection(("127.0.0.1", self.port))) for _ in range(101)
            ]
            for one in (writer, *readers):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            send(writer, put)
            last_id = id_in(writer.recv(65536))
            for reader in readers:
                send(reader, wait)
            before = time.perf_counter()
            for _ in range(count):
                send(writer, put)
                last_id = id_in(writer.recv(65536))
                for reader in readers:
                    if SHORT.encode() not in reader.recv(65536):
                        raise AssertionError("not the message")
                    send(reader, wait)
            return count * len(readers) / (time.perf_counter() - before)

    def ping_pong(self, count: int) -> dict[str, float]:
        here, there = self.topic("here"), self.topic("there")
        # Read once before timing, so that only the exchange is timed.
        words = [sys.executable, __file__, self.system, str(self.port), "echo", there, here, str(count)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            other.stdout.readline()
            taken = []
            for _ in range(count):
                before = time.perf_counter()
                self.client.put(there, SHORT)
                self.client.wait(here)
                taken.append(since(before, 1))
        taken.sort()
        return {"p50": statistics.median(taken), "p99": taken[round(len(taken) * 0.99) - 1]}

    def echo(self, there: str, here: str, count: int) -> None:
        """Answer ping_pong in the other process."""
        print("ready", flush=True)
        for _ in range(count):
            self.client.put(here, self.client.wait(there))


def since(before: float, count: int) -> float:
    """Return microseconds per operation."""
    return (time.perf_counter() - before) / count * 1e6


def main() -> None:
    system, port, *echo = sys.argv[1:]
    measure = Measure(system, int(port))
    if echo:
        getattr(measure, echo[0])(echo[1], echo[2], int(echo[3]))
        return
    print("ready", flush=True)
    for line in sys.stdin:
        operation, *numbers = line.split()
        if not hasattr(measure.client, NEEDS.get(operation, "get")):
            print("null", flush=True)
        else:
            print(json.dumps(getattr(measure, operation)(*map(int, numbers))), flush=True)


if __name__ == "__main__":
    main()
