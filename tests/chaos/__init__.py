"""Faults of all kinds under writers and readers, and a checker of what they have seen: `python -m tests.chaos`."""
