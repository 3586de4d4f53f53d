"""Where messages are kept: in memory, in SQLite, with snapshots on disk."""
