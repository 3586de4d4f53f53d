"""Limits of the protocol; PROTOCOL.md lists them all."""

MAX_ARGUMENTS = 64
MAX_LINE_BYTES = 65_536
# Max size of a request apart from its message: names, options, topic and framing.
REQUEST_OVERHEAD_BYTES = 65_536
MAX_INTEGER = 2**63 - 1
# Of arrays in replies: the deepest is that of COMMAND DOCS in EXEC.
MAX_DEPTH = 6
