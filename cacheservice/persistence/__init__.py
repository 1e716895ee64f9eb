"""Snapshots on disk, to answer before PostgreSQL does after a start, and to roll back."""
