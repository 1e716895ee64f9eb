"""Laws of pruning and of deltas that are off: both go on, and both can be seen."""

from __future__ import annotations

from contextlib import closing

from twisted.internet import reactor

from cacheservice.base import shipped
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.watch import watch
from tests.kit.database import TIMEOUT_S, DatabaseTestCase
from tests.kit.postgres import connect, drop_role
from tests.kit.standby import running_standby


class OnServers(DatabaseTestCase):
    """What the database is asked for, by a reader without further rights."""

    def setUp(self) -> None:
        super().setUp()
        dsn = self.server.dsn(database=self.name)
        migrate(dsn, shipped.folder("migrations"))
        self.reader = f"reader_{self.name}"
        create_reader(dsn, self.reader, password="secret")
        self.addCleanup(drop_role, self.server, self.name, self.reader)
        self.sql("CREATE TABLE items (id int)")
        watch(dsn, "items", ["id"], False, False, self.fail)
        self.database = self.make_database(user=self.reader, password="secret")

    def record(self) -> None:
        """A change of three hours ago."""
        self.sql("INSERT INTO items VALUES (1)")
        self.sql("UPDATE cacheservice.changes SET changed_at = changed_at - interval '3 h'")

    async def test_nothing_in_the_way(self) -> None:
        """The oldest is found until it is deleted."""
        self.record()
        recorded = await self.database.recorded(TIMEOUT_S)
        self.assertGreater(recorded.oldest_s or 0.0, 10_000)
        self.assertIsNone(recorded.in_the_way)
        self.assertEqual(await self.database.prune(3600.0, TIMEOUT_S), (1, True))
        recorded = await self.database.recorded(TIMEOUT_S)
        self.assertTrue(recorded.may_ask)
        self.assertIsNone(recorded.oldest_s)

    async def test_an_open_transaction(self) -> None:
        """The session that keeps changes from being deleted is named, whatever its database; its idle ones are not."""
        for database in (self.name, "postgres"):
            with closing(connect(self.server, database)) as session, session.cursor() as cursor:
                cursor.execute("BEGIN; SELECT pg_current_xact_id()")
                self.record()
                await self.database.prune(3600.0, TIMEOUT_S)
                recorded = await self.database.recorded(TIMEOUT_S)
                self.assertGreater(recorded.oldest_s or 0.0, 10_000)
                words = recorded.in_the_way or ""
                self.assertIn(f"session {session.info.backend_pid} of postgres (cacheservice tests", words)
                self.assertIn(f"pg_terminate_backend({session.info.backend_pid})", words)
                self.assertEqual("database postgres" in words, database == "postgres")
                cursor.execute("COMMIT; BEGIN; SELECT 1")
                await self.database.prune(3600.0, TIMEOUT_S)
                self.assertIsNone((await self.database.recorded(TIMEOUT_S)).oldest_s)

    async def test_a_prepared_transaction(self) -> None:
        """It is named, with how to end it."""
        with closing(connect(self.server, self.name)) as session, session.cursor() as cursor:
            cursor.execute(f"BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION '{self.name}'")
        self.record()
        recorded = await self.database.recorded(TIMEOUT_S)
        self.assertIn(f"ROLLBACK PREPARED '{self.name}'", recorded.in_the_way or "")
        self.sql(f"ROLLBACK PREPARED '{self.name}'")

    async def test_before_the_migration(self) -> None:
        """Without the function, or the right to call it, changes are deleted and their age is not known."""
        self.record()
        for statement in (
            f"REVOKE EXECUTE ON FUNCTION cacheservice.oldest_change() FROM {self.reader}",
            "DROP FUNCTION cacheservice.oldest_change()",
        ):
            self.sql(statement)
            recorded = await self.database.recorded(TIMEOUT_S)
            self.assertEqual((recorded.may_ask, recorded.oldest_s), (False, None))
        self.assertEqual(await self.database.prune(3600.0, TIMEOUT_S), (1, True))

    async def test_a_standby(self) -> None:
        """It answers, too."""
        self.record()
        with running_standby(self.server) as standby:
            database = Database(
                reactor, parse(standby(user=self.reader, password="secret", database=self.name)), TIMEOUT_S, self.status
            )
            self.addCleanup(database.stop)
            recorded = await database.recorded(TIMEOUT_S)
            database.end_kept()
        self.assertTrue(recorded.in_recovery)
        self.assertGreater(recorded.oldest_s or 0.0, 10_000)

    async def test_readers_of_an_older_migration(self) -> None:
        """The migration lets a reader that may delete changes ask for the oldest."""
        self.sql((shipped.folder("migrations") / "0004_merge.rollback.sql").read_text(encoding="utf-8"))
        self.assertFalse((await self.database.recorded(TIMEOUT_S)).may_ask)
        migrate(self.server.dsn(database=self.name), shipped.folder("migrations"))
        self.assertTrue((await self.database.recorded(TIMEOUT_S)).may_ask)
