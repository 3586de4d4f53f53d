"""Event loops, connections and commands."""
