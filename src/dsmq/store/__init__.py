"""The store: keeps messages in memory, in SQLite, with snapshots on disk."""
