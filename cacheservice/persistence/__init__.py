"""Snapshots on disk: for a start that answers before PostgreSQL does, and for a way back."""
