"""The wire protocol, as PROTOCOL.md describes it, and TLS: bytes in, values out."""
