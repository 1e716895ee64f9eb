"""What the pages advise about dumps, JavaScript and databases by number, tried on real programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import closing
from http.client import HTTPConnection

import pytest
import redis
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base import shipped
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.watch import watch
from tests.kit.daemon import DaemonTestCase
from tests.kit.postgres import fresh_database, query
from tests.kit.waiting import GIVE_UP_S

LARGE = 2**53 + 1


@pytest.mark.usefixtures("server")
class DumpBySchema(SynchronousTestCase):
    server: EmbeddedPostgres

    def run_program(self, name: str, database: str, *arguments: str, told: str | None = None) -> str:
        dsn = self.server.dsn(password="", database=database, host=str(self.server.socket_directory))
        command = [self.server.psql_path.with_name(name), "-d", dsn, *arguments]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        run = subprocess.run(command, input=told, capture_output=True, text=True, check=True, env=clean)
        self.errors = run.stderr
        return run.stdout

    def test_without_ours(self) -> None:
        """A dump of the schemas of an application restores its rows, and only our triggers fail; `migrate` and `watch`
        bring them back."""
        source = fresh_database(self.server, self.addCleanup)
        migrate(self.server.dsn(database=source), shipped.folder("migrations"))
        query(self.server, source, "CREATE TABLE items AS SELECT i AS id FROM generate_series(1, 5) AS i")
        query(self.server, source, "ALTER TABLE items ADD PRIMARY KEY (id)")
        watched = {"notify": True, "dry_run": False, "show": lambda _: None}
        watch(self.server.dsn(database=source), "public.items", ["id"], **watched)
        dump = self.run_program("pg_dump", source, "--schema=public")
        self.assertIn("CREATE TRIGGER", dump)

        target = fresh_database(self.server, self.addCleanup)
        self.run_program("psql", target, "-X", "-q", told=dump)
        errors = [line for line in self.errors.splitlines() if "ERROR" in line and 'schema "public"' not in line]
        self.assertTrue(errors)
        for error in errors:
            self.assertRegex(error, 'schema "cacheservice" does not exist|trigger "cacheservice_.*" for table')
        query(self.server, target, "INSERT INTO items VALUES (6)")
        self.assertEqual(query(self.server, target, "SELECT count(*) FROM items"), [(6,)])

        migrate(self.server.dsn(database=target), shipped.folder("migrations"))
        watch(self.server.dsn(database=target), "public.items", ["id"], **watched)
        query(self.server, target, "INSERT INTO items VALUES (7)")
        self.assertEqual(query(self.server, target, "SELECT count(*) FROM cacheservice.changes"), [(1,)])


class Reading(DaemonTestCase):
    def test_large_integers_in_javascript(self) -> None:
        """JSON.parse rounds an int8 beyond 2^53; the same as text is exact."""
        node = shutil.which("node")
        assert node is not None, "node is not here: install Node, on Debian by apt-get install nodejs"
        table = (
            f'query = "SELECT 1 AS id, {LARGE}::int8 AS n, {LARGE}::int8::text AS exact"\nkey = "id"\ninterval_s = 60\n'
        )
        daemon = self.started(self.configuration(f"[datasets.large]\n{table}"))
        daemon.wait_until_ready()
        port = int(daemon.event("service_started")["http"].rpartition(":")[2])
        with closing(HTTPConnection("127.0.0.1", port, timeout=GIVE_UP_S)) as client:
            client.request("GET", "/v1/datasets/large/rows/1")
            body = client.getresponse().read()
        self.assertEqual(json.loads(body)["n"], LARGE)
        program = "const row = JSON.parse(require('fs').readFileSync(0, 'utf8')); console.log(`${row.n} ${row.exact}`)"
        run = subprocess.run([node, "-e", program], input=body, capture_output=True, check=True)
        self.assertEqual(run.stdout.decode().split(), [str(LARGE - 1), str(LARGE)])

    def test_databases_by_number(self) -> None:
        """There is one, 0: a URL that ends with another number is refused when the client connects."""
        daemon = self.started()
        daemon.wait_until_ready()
        port = int(daemon.event("service_started")["resp"].rpartition(":")[2])
        with redis.Redis.from_url(f"redis://127.0.0.1:{port}/0") as client:
            self.assertEqual(client.hlen("products"), 3)
        with (
            redis.Redis.from_url(f"redis://127.0.0.1:{port}/1") as client,
            self.assertRaisesRegex(redis.exceptions.RedisError, "DB index is out of range|Invalid Database"),
        ):
            client.hlen("products")
