"""The stores of messages: in memory (SQLite), with snapshots on disk, or shared by several servers (NATS)."""
