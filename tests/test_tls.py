"""TLS to a real server with a certificate of an authority of our own: what works, and each error with its fix."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from cacheservice.base.errors import DatabaseUnavailable, InspectionFailed
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import PostgresSettings
from cacheservice.sources.postgres.connector import Connector
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.inspect import inspecting
from cacheservice.sources.postgres.resolve import Resolver
from cacheservice.sources.postgres.target import parse, problem
from tests.kit.certificates import make_certificates
from tests.kit.versions import OlderPostgres

TIMEOUT_S = 60.0
HBA = """\
local   all all                trust
hostssl all all 127.0.0.1/32   scram-sha-256
"""


@pytest.fixture(scope="module")
def tls_server() -> Iterator[EmbeddedPostgres]:
    """The embedded server of the wheel is built without TLS."""
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
    server = OlderPostgres(directory, "14")
    try:
        server.start()
        server.stop()
        data = server.socket_directory
        make_certificates(directory)
        owner = data.stat()
        for name in "server.crt", "server.key":
            shutil.copy(directory / name, data / name)
            os.chown(data / name, owner.st_uid, owner.st_gid)
            (data / name).chmod(0o600)
        server.settings |= {"ssl": "on"}
        server.start()
        (data / "pg_hba.conf").write_text(HBA)
        server.run_sql("SELECT pg_reload_conf()")
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(directory)


@pytest.fixture(scope="class")
def with_tls(request: pytest.FixtureRequest, tls_server: EmbeddedPostgres) -> None:
    request.cls.server = tls_server


@pytest.mark.usefixtures("with_tls")
class TlsTests(TestCase):
    server: EmbeddedPostgres
    timeout = 240

    def setUp(self) -> None:
        self.folder = self.server.directory
        self.resolver = Resolver(reactor)
        self.addCleanup(self.resolver.stop)

    async def encrypted(self, options: str, host: str = "localhost") -> bool:
        target = parse(self.dsn(options, host))
        guard = GuardedConnection(reactor, target, reactor.seconds() + TIMEOUT_S)
        try:
            await guard.connect(Connector(reactor, self.resolver.resolve), "test", TIMEOUT_S)
            cursor = await guard.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            return bool(cursor.fetchone()[0])
        finally:
            guard.close_and_passthrough(None)

    def dsn(self, options: str, host: str = "localhost") -> str:
        return f"{self.server.dsn(host=host)}?{options}"

    async def fails(self, options: str, host: str = "localhost") -> DatabaseUnavailable:
        d: Deferred[Any] = Deferred.fromCoroutine(self.encrypted(options, host))
        error = await self.assertFailure(d, DatabaseUnavailable)
        assert isinstance(error, DatabaseUnavailable)
        self.assertEqual(len(str(error).splitlines()), 1)
        return error

    async def test_verified(self) -> None:
        """Authority and name are proven, by a name that resolves to an address."""
        self.assertTrue(await self.encrypted(f"sslmode=verify-full&sslrootcert={self.folder}/ca.crt"))

    async def test_preferred(self) -> None:
        """libpq's default encrypts where the server offers it."""
        self.assertTrue(await self.encrypted(""))

    async def test_another_authority(self) -> None:
        error = await self.fails(f"sslmode=verify-full&sslrootcert={self.folder}/other.crt")
        self.assertIn("certificate verify failed", str(error))
        self.assertIn("sslrootcert must name the authority", error.advice)

    async def test_no_file_of_an_authority(self) -> None:
        error = await self.fails(f"sslmode=verify-full&sslrootcert={self.folder}/absent.crt")
        self.assertIn("absent.crt", str(error))
        self.assertIn("sslrootcert=FILE", error.advice)

    async def test_another_name(self) -> None:
        """The certificate holds localhost, not the address."""
        error = await self.fails(f"sslmode=verify-full&sslrootcert={self.folder}/ca.crt", host="127.0.0.1")
        self.assertIn("does not match host name", str(error))
        self.assertIn("name the host in postgres.dsn", error.advice)

    async def test_without_tls_where_it_is_wanted(self) -> None:
        """The server takes only encrypted sessions from the network."""
        error = await self.fails("sslmode=disable")
        self.assertIn("no encryption", str(error))
        self.assertIn("sslmode=require", error.advice)

    async def test_system(self) -> None:
        """sslrootcert=system finds the system's bundle, here the one that SSL_CERT_FILE names."""
        self.patch(os, "environ", os.environ | {"SSL_CERT_FILE": str(self.folder / "ca.crt")})
        self.assertTrue(await self.encrypted("sslrootcert=system"))
        self.patch(os, "environ", os.environ | {"SSL_CERT_FILE": str(self.folder / "other.crt")})
        error = await self.fails("sslrootcert=system")
        self.assertIn("certificate verify failed", str(error))
        self.assertIn("verify-full", problem(self.dsn("sslrootcert=system&sslmode=require")) or "")

    def test_check_of_the_database(self) -> None:
        """`check --db` has the same advice, and the same bundle."""
        wrong = f"sslmode=verify-full&sslrootcert={self.folder}/other.crt"
        with self.assertRaises(InspectionFailed) as caught, inspecting(self.settings(wrong), []):
            pass
        self.assertIn("sslrootcert must name the authority", str(caught.exception))
        self.patch(os, "environ", os.environ | {"SSL_CERT_FILE": str(self.folder / "ca.crt")})
        with inspecting(self.settings("sslrootcert=system"), []) as inspector:
            self.assertEqual(inspector.server.database, "postgres")

    def settings(self, options: str) -> PostgresSettings:
        return PostgresSettings.model_validate({"dsn": self.dsn(options)})


@pytest.mark.usefixtures("server")
class NoTlsTests(TestCase):
    """A server without TLS."""

    server: EmbeddedPostgres

    async def test_required(self) -> None:
        resolver = Resolver(reactor)
        self.addCleanup(resolver.stop)
        guard = GuardedConnection(reactor, parse(f"{self.server.dsn()}?sslmode=require"), reactor.seconds() + TIMEOUT_S)
        connecting = Deferred.fromCoroutine(guard.connect(Connector(reactor, resolver.resolve), "test", TIMEOUT_S))
        error = await self.assertFailure(connecting.addBoth(guard.close_and_passthrough), DatabaseUnavailable)
        self.assertIn("server does not support SSL", str(error))
        self.assertIn("ssl = on", error.advice)
