"""Attacks on a server in its own process, and limits on what they cost others: `python tests/attacks`."""
