"""The wire protocol, which PROTOCOL.md describes, and TLS."""
