"""Check the promises under faults: `python tests/chaos --minutes 10 --seed 1`.

Four writers and four readers, and two more with redis-py, work while faults are injected. Connections are reset at any
byte, or go dead. The server is stopped, killed or suspended, or its disk is full. Clients fork, are interrupted at any
line, or are cancelled. Afterwards, a checker examines everything that was put and read. `--store nats` does the same
with two servers in front of a NATS cluster of three nodes: nodes and servers are killed, suspended, restarted and cut
off, and the stream is deleted. In the end, both servers must have the same messages. `--figures` measures restarts and
costs; `--mutants` checks that servers with deliberate defects are detected.
"""
