"""A client of dsmq with valkey-glide: see harness.py for its commands."""

import sys

from glide_sync import GlideClient, GlideClientConfiguration, NodeAddress

# Its default timeout of 250 ms is too short for a busy machine.
address = NodeAddress("127.0.0.1", int(sys.argv[1]))
client = GlideClient.create(GlideClientConfiguration([address], request_timeout=9000))
for line in sys.stdin:
    reply = client.custom_command(line.split()[1:])
    print("=", reply.decode() if isinstance(reply, bytes) else reply, flush=True)
