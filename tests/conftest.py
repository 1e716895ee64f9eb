"""Fixtures: one real PostgreSQL for the whole run, started by the first test that needs it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheservice.cli.embedded import EmbeddedPostgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[EmbeddedPostgres]:
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
    server = EmbeddedPostgres(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(directory)


@pytest.fixture(scope="class")
def server(request: pytest.FixtureRequest, postgres_server: EmbeddedPostgres) -> Iterator[EmbeddedPostgres]:
    """For a trial TestCase: ``@pytest.mark.usefixtures("server")`` on the class gives its tests `self.server`.

    A server that a test froze or killed is mended before the next class.
    """
    request.cls.server = postgres_server
    yield postgres_server
    postgres_server.thaw()
    postgres_server.start()
