"""The store: keeps messages in an in-memory SQLite database, with snapshots on disk."""
