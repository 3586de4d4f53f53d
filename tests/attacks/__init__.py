"""Attacks on a server in its own process, and limits on their cost to other clients: `python tests/attacks`."""
