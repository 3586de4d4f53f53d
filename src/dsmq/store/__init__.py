"""The store: messages in an in-memory SQLite database, with snapshots on disk."""
