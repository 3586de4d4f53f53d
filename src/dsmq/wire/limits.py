"""Limits of the protocol; PROTOCOL.md lists them all."""

MAX_ARGUMENTS = 64
# Max names in an MREAD and max bytes of all names together. Only MREAD may exceed MAX_ARGUMENTS.
MAX_NAMES, MAX_NAMES_BYTES = 1_000, 65_536
MANY_NAMES = b"MREAD"
MAX_LINE_BYTES = 65_536
# Max size of a request without its message: names, options, topic and framing.
REQUEST_OVERHEAD_BYTES = 65_536
# The number of messages in the reply to a READ, by default and at most, and the bytes of bodies after which it ends.
DEFAULT_COUNT, MAX_COUNT = 100, 1_000
MAX_READ_BYTES = 262_144
MAX_INTEGER = 2**63 - 1
# Max nesting of arrays in replies; COMMAND DOCS in EXEC nests deepest.
MAX_DEPTH = 6
