"""Snapshots on disk, for a fast start without PostgreSQL, and for rollbacks."""
