"""The event loops, their connections, and the commands."""
