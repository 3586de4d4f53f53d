"""The event loops, the connections that they serve, and the commands."""
