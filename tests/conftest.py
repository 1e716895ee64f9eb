"""Fixtures: one real PostgreSQL for the whole run, started by the first test that needs it.

Every run has the same inputs: hypothesis derives its examples from the tests, the module `random` is seeded with the
name of the test, and other seeds are constants. TESTS_RANDOM=1 has hypothesis draw new examples, and print how to
repeat those that fail; `benchmarks.soak` sets it.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import settings

from cacheservice.base import shipped
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.migrate import migrate
from tests.kit.postgres import fresh_database, query
from tests.kit.versions import DEFAULT_VERSION, VERSIONS, MakeServer, OlderPostgres, running_server

# No deadline: how long an example takes is up to the machine.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("random" if os.environ.get("TESTS_RANDOM") else "fixed")


# A shell starts what runs in its background with SIGINT and SIGQUIT ignored, and children inherit that. The tests of
# each process of pytest, xdist's too, start services and clients that these signals have to end. SIGHUP stays as it is,
# because nohup is there to outlive it.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)


def pytest_runtest_setup(item: pytest.Item) -> None:
    random.seed(item.nodeid)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres",
        choices=[DEFAULT_VERSION, *VERSIONS],
        default=DEFAULT_VERSION,
        help="the major version of the PostgreSQL that the tests use",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest, so that no worker waits for them in the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_postgres_"))


@pytest.fixture(scope="session")
def make_server(request: pytest.FixtureRequest) -> MakeServer:
    """Makes servers of the version that the tests use; the caller starts and stops it."""
    version = request.config.getoption("--postgres")
    if version == DEFAULT_VERSION:
        return EmbeddedPostgres
    return partial(OlderPostgres, version=version)


@pytest.fixture(scope="class")
def server_maker(request: pytest.FixtureRequest, make_server: MakeServer) -> None:
    """The same for a trial TestCase, as `self.make_server`."""
    request.cls.make_server = staticmethod(make_server)


@pytest.fixture(scope="session")
def postgres_server(make_server: MakeServer) -> Iterator[EmbeddedPostgres]:
    with running_server(make_server) as server:
        yield server


@pytest.fixture(scope="class")
def server(request: pytest.FixtureRequest, postgres_server: EmbeddedPostgres) -> Iterator[EmbeddedPostgres]:
    """For a trial TestCase: ``@pytest.mark.usefixtures("server")`` on the class gives its tests `self.server`.

    A server that a test froze or killed is repaired before the next class.
    """
    request.cls.server = postgres_server
    yield postgres_server
    postgres_server.thaw()
    postgres_server.start()


@pytest.fixture(scope="module")
def template(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """A migrated database that others are copied from."""
    name = fresh_database(postgres_server)
    migrate(postgres_server.dsn(database=name), shipped.folder("migrations"))
    yield name
    query(postgres_server, "postgres", f"DROP DATABASE {name} WITH (FORCE)")
