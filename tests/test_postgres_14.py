"""The tests of the database layer on PostgreSQL 14, the oldest that is supported."""

from __future__ import annotations

from tests.kit.versions import run_database_layer


def test_database_layer() -> None:
    run_database_layer("14")
