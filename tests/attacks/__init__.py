"""Attacks on a server in a process of its own, and what they must not cost others: `python tests/attacks`."""
