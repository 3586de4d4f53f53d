"""The wire protocol, described in PROTOCOL.md, and TLS."""
