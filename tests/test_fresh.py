"""Laws of freshness between intervals: NOTIFY, probes and deltas, of the real service on the real server.

Nearly every dataset here has an interval of an hour: what is served sooner was notified.
"""

from __future__ import annotations

import http.client
import json
import random
import secrets
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import hiredis
import psycopg2

from cacheservice.base.shipped import folder
from cacheservice.sources.postgres.migrate import migrate
from cacheservice.sources.postgres.reader import create_reader
from cacheservice.sources.postgres.watch import unwatch, watch
from tests.kit.daemon import Daemon, DaemonTestCase
from tests.kit.postgres import connect, query
from tests.kit.resp import encode
from tests.kit.waiting import GIVE_UP_S, wait_until

WATCH = 'watch = [{table = "public.things", key = "id"}]'
NOTIFY = 'notify = "told"'


class FreshTestCase(DaemonTestCase):
    """`things` has ten rows, id 1 to 10, all with n = 0; the service reads them as a role that may do little else."""

    tables: Sequence[str] = ("public.things",)
    """What the reader may read."""

    def setUp(self) -> None:
        self.reader = f"reader_{secrets.token_hex(4)}"
        self.addCleanup(query, self.server, "postgres", f"DROP ROLE IF EXISTS {self.reader}")
        super().setUp()
        self.owner = self.server.dsn(database=self.database)
        self.sql("CREATE TABLE things AS SELECT i AS id, 0 AS n FROM generate_series(1, 10) AS i")
        self.sql("ALTER TABLE things ADD PRIMARY KEY (id)")

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.server, self.database, statement)

    def migrated(self) -> None:
        """As an operator does it: the schema, and a reader with few rights."""
        migrate(self.owner, folder("migrations"))
        create_reader(self.owner, self.reader, self.tables, "secret")

    def watched(self, table: str = "public.things", key: Sequence[str] = ("id",), *, notify: bool = True) -> None:
        watch(self.owner, table, key, notify, False, lambda _: None)

    def dataset(self, *settings: str, name: str = "things", query: str = "TABLE things", key: str = '"id"') -> str:
        return "\n".join(
            (
                f"[datasets.{name}]\nquery = '''{query}'''\nkey = {key}\ninterval_s = 3600\nmax_age_s = 36000",
                "retry_initial_s = 0.1\nretry_max_s = 0.5",
                *settings,
                "",
            )
        )

    def text(self, *datasets: str, superuser: bool = False) -> str:
        dsn = self.owner if superuser else self.server.dsn(self.reader, "secret", self.database)
        return self.configuration(
            f'[admin]\nsocket = "{self.directory / "admin"}"\n'
            f'[persistence]\ndirectory = "{self.directory / "saved"}"\nmin_save_interval_s = 0\n',
            *datasets,
            dsn=dsn,
        )

    def service(self, *datasets: str, superuser: bool = False, listening: bool = True, quiet: bool = True) -> Daemon:
        daemon = self.started(self.text(*datasets, superuser=superuser))
        daemon.wait_until_ready()
        if listening:
            self.until_listening(daemon)
        if quiet:
            self.until_quiet(daemon)
        return daemon

    def until_listening(self, daemon: Daemon) -> None:
        wait_until(lambda: daemon.json()["postgres"]["listening"], "listening")

    def until_quiet(self, daemon: Daemon) -> None:
        """Until what was missed before it listened has been looked for."""
        quiet_since = time.monotonic()
        count = -1

        def quiet() -> bool:
            nonlocal quiet_since, count
            before, count = count, len(self.attempts(daemon))
            refreshing = any(dataset["refreshing"] for dataset in daemon.json()["datasets"].values())
            if refreshing or before != count:
                quiet_since = time.monotonic()
            return time.monotonic() - quiet_since > 0.3

        wait_until(quiet, "quiet")

    def attempts(self, daemon: Daemon, name: str = "") -> list[dict[str, Any]]:
        """The canonical lines of refreshes, of all datasets or of one."""
        events = ("refresh_published", "refresh_unchanged", "refresh_held", "refresh_failed")
        return [line for line in daemon.lines if line["event"] in events and name in ("", line["dataset"])]

    def reads(self, daemon: Daemon) -> list[str]:
        return [line.get("read", "") for line in self.attempts(daemon)]

    def until_read(self, daemon: Daemon, words: str) -> None:
        wait_until(lambda: any(words in read for read in self.reads(daemon)), f"{words!r} in {self.reads(daemon)}")

    def resp(self, daemon: Daemon, *words: str) -> Any:
        return self.resp_all(daemon, words)[0]

    def resp_client(self, daemon: Daemon) -> socket.socket:
        host, _, port = daemon.event("service_started")["resp"].rpartition(":")
        return socket.create_connection((host, int(port)), timeout=GIVE_UP_S)

    def resp_all(self, daemon: Daemon, *commands: Sequence[str]) -> list[Any]:
        with self.resp_client(daemon) as client:
            client.sendall(b"".join(encode(*words) for words in commands))
            return [self.reply(client, reader) for reader in [hiredis.Reader()] for _ in commands]

    def reply(self, client: socket.socket, reader: hiredis.Reader) -> Any:
        while (reply := reader.gets()) is False:
            received = client.recv(1 << 16)
            assert received, "the connection ended"
            reader.feed(received)
        return reply

    def n(self, daemon: Daemon, key: object, name: str = "things") -> Any:
        """What the row has as `n`, None if there is none."""
        document = self.resp(daemon, "GET", f"{name}:{key}")
        return None if document is None else json.loads(document)["n"]

    def rows(self, daemon: Daemon, name: str = "things") -> dict[str, Any]:
        flat = self.resp(daemon, "HGETALL", name)
        return {key.decode(): json.loads(value) for key, value in zip(flat[::2], flat[1::2], strict=True)}

    def until_n(self, daemon: Daemon, key: object, n: Any, name: str = "things") -> None:
        wait_until(lambda: self.n(daemon, key, name) == n, f"n = {n} of {key}")

    def described(self, daemon: Daemon, name: str = "things") -> dict[str, Any]:
        fields: dict[str, Any] = daemon.json()["datasets"][name]
        return fields

    def http(self, daemon: Daemon, path: str, **headers: str) -> tuple[int, dict[str, str]]:
        host, _, port = daemon.event("service_started")["http"].rpartition(":")
        with closing(http.client.HTTPConnection(host, int(port), timeout=GIVE_UP_S)) as connection:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            response.read()
            return response.status, {name.lower(): value for name, value in response.getheaders()}


class Watching(FreshTestCase):
    def test_changes_of_rows(self) -> None:
        """What is inserted, updated, deleted, or gets another key is served at once, by deltas of no other rows."""
        self.migrated()
        self.watched()
        daemon = self.service(self.dataset(WATCH))
        self.sql("UPDATE things SET n = 1 WHERE id = 3")
        self.until_n(daemon, 3, 1)
        self.sql("INSERT INTO things VALUES (11, 11)")
        self.until_n(daemon, 11, 11)
        self.sql("DELETE FROM things WHERE id = 1")
        self.until_n(daemon, 1, None)
        self.sql("UPDATE things SET id = 20, n = 20 WHERE id = 2")
        self.until_n(daemon, 20, 20)
        self.assertIsNone(self.n(daemon, 2))
        self.assertEqual(self.reads(daemon)[-4:], ["a delta of 1 key"] * 3 + ["a delta of 2 keys"])
        served = {key: row["n"] for key, row in self.rows(daemon).items()}
        self.assertEqual(served, {str(i): n for i, n in self.sql("TABLE things")})
        self.assertIn(", listening", daemon.ask("status").splitlines()[0])
        self.assertIn("the service is listening, tested", daemon.ask("why things"))

    def test_no_change(self) -> None:
        """A delta after which all is as it was is `unchanged`: the generation stays, the age is new."""
        self.migrated()
        self.watched()
        daemon = self.service(self.dataset(WATCH))
        before = self.described(daemon)
        count = len(self.attempts(daemon))
        self.sql("UPDATE things SET n = n")
        wait_until(lambda: len(self.attempts(daemon)) > count, "an attempt")
        line = self.attempts(daemon)[count]
        self.assertEqual((line["event"], line["read"]), ("refresh_unchanged", "a delta of 10 keys"))
        after = self.described(daemon)
        self.assertEqual(after["generation"], before["generation"])
        self.assertGreater(after["as_of"], before["as_of"])

    def test_without_notify(self) -> None:
        """With --no-notify writers are spared: a change is seen with the next interval, by a delta."""
        self.migrated()
        self.watched(notify=False)
        daemon = self.service(self.dataset(WATCH).replace("interval_s = 3600", "interval_s = 0.3"), quiet=False)
        daemon.wait_until_ready()
        self.sql("UPDATE things SET n = 1 WHERE id = 3")
        self.until_n(daemon, 3, 1)
        published = [line for line in self.attempts(daemon) if line["event"] == "refresh_published"]
        self.assertEqual((published[-1]["trigger"], published[-1]["read"]), ("interval", "a delta of 1 key"))

    def test_join_and_composite_keys(self) -> None:
        """Of a query over two watched tables, a change in either is served; keys may have several columns."""
        self.tables = ("public.things", "public.prices")
        self.sql("CREATE TABLE prices (id int, currency text, price int, PRIMARY KEY (id, currency))")
        self.sql(
            "INSERT INTO prices SELECT i, c, 5 FROM generate_series(1, 10) AS i, unnest('{EUR,\"U:S\"}'::text[]) c"
        )
        self.migrated()
        self.watched()
        self.watched("public.prices")
        self.watched("public.prices", ("id", "currency"))
        joined = self.dataset(
            'watch = [{table = "public.things", key = "id"}, {table = "public.prices", key = "id"}]',
            query="SELECT t.id, t.n + p.price AS n FROM things t JOIN prices p ON p.id = t.id AND currency = 'EUR'",
        )
        prices = self.dataset(
            'watch = [{table = "public.prices", key = ["id", "currency"]}]',
            name="prices",
            query="SELECT id, currency, price AS n FROM prices",
            key='["id", "currency"]',
        )
        daemon = self.service(joined, prices)
        self.sql("UPDATE things SET n = 1 WHERE id = 4")
        self.until_n(daemon, 4, 6)
        self.sql("UPDATE prices SET price = 7 WHERE id = 4")
        self.until_n(daemon, 4, 8)
        self.until_n(daemon, "4:EUR", 7, "prices")
        self.until_n(daemon, "4:U:S", 7, "prices")
        self.sql("DELETE FROM prices WHERE id = 5 AND currency = 'EUR'")
        self.until_n(daemon, "5:EUR", None, "prices")
        self.until_n(daemon, 5, None)
        self.assertEqual(self.n(daemon, "5:U:S", "prices"), 5)
        self.assertIn("a delta of 2 keys", self.reads(daemon))

    def test_group(self) -> None:
        """Of a group, a transaction's changes in two tables are served in one turn: no reader sees half of it."""
        self.tables = ("public.checking", "public.savings")
        for table in ("checking", "savings"):
            self.sql(f"CREATE TABLE {table} AS SELECT i AS id, 100 AS n FROM generate_series(1, 10) AS i")
        self.migrated()
        members = []
        for table in ("checking", "savings"):
            self.watched(f"public.{table}")
            members.append(
                self.dataset(
                    f'watch = [{{table = "public.{table}", key = "id"}}]\ngroup = "bank"',
                    name=table,
                    query=f"TABLE {table}",
                )
            )
        daemon = self.service(*members)
        count = len(self.attempts(daemon))
        done = threading.Event()
        sums = []

        def move() -> None:
            with closing(connect(self.server, self.database)) as connection, connection.cursor() as cursor:
                for number in range(200):
                    amount, key = number % 7 + 1, number % 10 + 1
                    cursor.execute(
                        f"BEGIN; UPDATE checking SET n = n - {amount} WHERE id = {key};"
                        f"UPDATE savings SET n = n + {amount} WHERE id = {key}; COMMIT"
                    )
            done.set()

        mover = threading.Thread(target=move)
        mover.start()
        while not done.is_set():
            flat = self.resp_all(daemon, ("MULTI",), ("HVALS", "checking"), ("HVALS", "savings"), ("EXEC",))[-1]
            sums.append(sum(json.loads(row)["n"] for rows in flat for row in rows))
        mover.join()
        self.assertEqual(set(sums), {2000})
        want = dict(self.sql("TABLE savings"))
        wait_until(lambda: {int(k): row["n"] for k, row in self.rows(daemon, "savings").items()} == want, "the last")
        self.assertTrue(all("delta" in read or "nothing" in read for read in self.reads(daemon)[count:]))


class Falling(FreshTestCase):
    """A delta is not possible: all is read, the log has the reason, and what is served is right."""

    def test_reasons(self) -> None:
        """TRUNCATE, triggers off and on again, many keys, pruned changes, a new column, watched again, unwatched."""
        self.migrated()
        self.watched()
        daemon = self.service(self.dataset(f"{WATCH}\nmax_delta = 0.0"))

        def read_because(words: str, *statements: str) -> None:
            for statement in statements:
                self.sql(statement)
            self.admin("refresh things")
            self.until_read(daemon, words)
            self.until_quiet(daemon)
            served = {key: row["n"] for key, row in self.rows(daemon).items()}
            self.assertEqual(served, {str(i): n for i, n in self.sql("SELECT id, n FROM things")}, words)

        read_because("it is a check of the deltas")
        read_because(
            "things was truncated", "TRUNCATE things; INSERT INTO things SELECT i FROM generate_series(1, 9) i"
        )
        self.sql("INSERT INTO things SELECT i, 1 FROM generate_series(1000, 1200) AS i")
        self.until_n(daemon, 1200, 1)
        self.until_read(daemon, "more than 100 keys changed, see max_delta")
        self.until_quiet(daemon)
        read_because(
            "lacks a trigger of ours; say again: cacheservice watch public.things --key id",
            "ALTER TABLE things DISABLE TRIGGER ALL; UPDATE things SET n = 2 WHERE id = 2",
        )
        before = len(self.attempts(daemon))
        read_because("lacks a trigger of ours", "ALTER TABLE things ENABLE TRIGGER ALL")
        self.assertTrue(all("lacks a trigger" in read for read in self.reads(daemon)[before:]), self.reads(daemon))
        self.watched()
        read_because("things has been watched only since the last refresh")
        read_because(
            "the definition, the storage or the partitions of public.things changed", "ALTER TABLE things ADD x int"
        )
        self.assertIn(b'"x":', self.resp(daemon, "GET", "things:2"))
        unwatch(self.owner, "public.things", (), False, lambda _: None)
        read_because("is not watched; say: cacheservice watch public.things --key id", "UPDATE things SET n = 9")

    def test_retention(self) -> None:
        """Changes that were deleted before they were read are not missed: all is read."""
        self.migrated()
        self.watched(notify=False)
        daemon = self.service(self.dataset(WATCH))

        def told() -> bool:
            # A read may come between the two; then there was nothing to miss.
            ((n,),) = self.sql("UPDATE things SET n = n + 1 WHERE id = 3 RETURNING n")
            self.sql("SELECT cacheservice.prune('0')")
            ((xid,),) = self.sql("SELECT pg_current_xact_id()::text")
            self.assertEqual(self.resp(daemon, "CACHE.WAIT", "things", xid, "60000"), 1)
            self.assertEqual(self.n(daemon, 3), n)
            return any(
                "because the changes since the last refresh are not kept any more" in r for r in self.reads(daemon)
            )

        wait_until(told, "the words")

    def test_without_migrations(self) -> None:
        """Without the migrations, all is read each time, and the log has what to do."""
        daemon = self.service(self.dataset(WATCH), superuser=True, listening=False)
        self.until_read(daemon, "the database does not know cacheservice.changes")
        self.assertIn("run cacheservice migrate --reader NAME", self.reads(daemon)[0])

    def test_without_rights(self) -> None:
        """So it does for a reader that may not call the function."""
        self.migrated()
        self.watched()
        self.sql(f"REVOKE EXECUTE ON FUNCTION cacheservice.changes FROM {self.reader}")
        daemon = self.service(self.dataset(WATCH), listening=False)
        self.until_read(daemon, "or this role may not call it")
        self.sql("UPDATE things SET n = 1 WHERE id = 3")
        self.until_n(daemon, 3, 1)

    def test_unfit_keys(self) -> None:
        """Where equal keys may look different, changes are read with all rows."""
        for kind, one in (("numeric", "1.0"), ("timestamptz", "2026-01-01")):
            self.sql(f"CREATE TABLE of_{kind} (id {kind} PRIMARY KEY, n int)")
            self.sql(f"INSERT INTO of_{kind} VALUES ('{one}', 0)")
        self.tables = ("public.of_numeric", "public.of_timestamptz")
        self.migrated()
        declared = []
        for name in ("of_numeric", "of_timestamptz"):
            self.watched(f"public.{name}")
            declared.append(
                self.dataset(f'watch = [{{table = "public.{name}", key = "id"}}]', name=name, query=f"TABLE {name}")
            )
        daemon = self.service(*declared)
        for name in ("of_numeric", "of_timestamptz"):
            self.sql(f"UPDATE {name} SET n = 1")
            wait_until(lambda name=name: [row["n"] for row in self.rows(daemon, name).values()] == [1], f"n of {name}")
        self.assertTrue(all("is not fit for deltas" in read for read in self.reads(daemon)), self.reads(daemon))

    def test_check_finds_what_was_missed(self) -> None:
        """A check finds no difference where there is none; otherwise it names the keys, and corrects them."""
        self.tables = ("public.things", "public.names")
        self.sql("CREATE TABLE names AS SELECT i AS id, 0 AS n FROM generate_series(1, 10) AS i")
        self.migrated()
        self.watched()
        joined = "SELECT t.id, t.n + o.n AS n FROM things t JOIN names o USING (id)"
        daemon = self.service(
            self.dataset(f"{WATCH}\nfull_interval_s = 0.5", query=joined).replace(
                "interval_s = 3600", "interval_s = 0.3"
            ),
            quiet=False,
        )
        self.sql("UPDATE things SET n = 1 WHERE id = 3")
        self.until_n(daemon, 3, 1)
        checks = len([read for read in self.reads(daemon) if "check of the deltas" in read])
        wait_until(
            lambda: len([read for read in self.reads(daemon) if "check of the deltas" in read]) > checks + 1, "checks"
        )
        self.assertNotIn("delta_differences", daemon.output)
        self.sql("UPDATE names SET n = 10 WHERE id IN (4, 5)")
        line = daemon.event("delta_differences")
        self.assertEqual((line["count"], sorted(line["keys"]), line["dataset"]), (2, ["4", "5"], "things"))
        self.until_n(daemon, 4, 10)
        self.assertEqual((self.n(daemon, 5), self.n(daemon, 3)), (10, 1))
        self.assertIn("full reads have found and corrected 2 rows that differ", daemon.ask("why things"))


class Notified(FreshTestCase):
    tables = ("public.things", "public.gate")

    def setUp(self) -> None:
        super().setUp()
        self.sql("CREATE TABLE gate AS SELECT 1 AS one")

    def test_any_row(self) -> None:
        """A NOTIFY without a list of keys has all rows read at once."""
        self.migrated()
        daemon = self.service(self.dataset(NOTIFY))
        self.sql("UPDATE things SET n = 1; NOTIFY told")
        self.until_n(daemon, 3, 1)
        self.assertEqual(self.attempts(daemon)[-1]["trigger"], "notify")

    def test_only_those_rows(self) -> None:
        """A JSON list of keys, as numbers or strings, has those rows read and no other; a key may be gone."""
        self.migrated()
        daemon = self.service(self.dataset(NOTIFY))
        self.sql(
            "UPDATE things SET n = 1 WHERE id IN (3, 4, 5); DELETE FROM things WHERE id = 6;"
            """NOTIFY told, '[3, "4"]'"""
        )
        self.until_n(daemon, 3, 1)
        self.assertEqual([self.n(daemon, key) for key in (4, 5, 6)], [1, 0, 0])
        self.assertEqual(self.reads(daemon)[-1], "a delta of 2 keys")
        self.sql("NOTIFY told, '[6, 999]'")
        self.until_n(daemon, 6, None)
        self.assertEqual(self.n(daemon, 5), 0)
        self.sql("NOTIFY told")
        self.until_n(daemon, 5, 1)

    def test_composite_keys(self) -> None:
        """A key of several columns is named as it is served."""
        self.tables = ("public.prices",)
        self.sql(
            "CREATE TABLE prices AS SELECT i AS id, c AS currency, 0 AS n FROM generate_series(1, 50) AS i, "
            "unnest('{EUR,USD}'::text[]) AS c"
        )
        self.migrated()
        daemon = self.service(self.dataset(NOTIFY, name="prices", query="TABLE prices", key='["id", "currency"]'))
        self.sql("""UPDATE prices SET n = 1 WHERE id = 42; NOTIFY told, '["42:EUR"]'""")
        self.until_n(daemon, "42:EUR", 1, "prices")
        self.assertEqual(self.n(daemon, "42:USD", "prices"), 0)

    def test_odd_payloads(self) -> None:
        """A payload that is not a list of keys, or has an invalid key, has everything read; nothing fails for long."""
        self.migrated()
        daemon = self.service(self.dataset(NOTIFY))
        odd = (
            "nonsense",
            "{}",
            "3",
            "[null]",
            "[[3]]",
            "[1.5]",
            '["x"]',
            "[true]",
            '["99999999999999999999"]',
            "[" * 5000,
            '["3\\u0000"]',
            '["\\ud800"]',
            '["\'"]',
        )
        for number, payload in enumerate(odd, 1):
            with self.subTest(payload=payload[:20]):
                self.sql(f"UPDATE things SET n = {number}")
                query(self.server, self.database, "SELECT pg_notify('told', %s)", (payload,))
                self.until_n(daemon, 7, number)
        wait_until(lambda: self.described(daemon)["consecutive_failures"] == 0, "no failure")

    def test_bursts(self) -> None:
        """However many notifications come while a refresh waits, of one transaction or of many, one refresh follows."""
        self.migrated()
        daemon = self.service(
            self.dataset(NOTIFY, f"timeout_s = {GIVE_UP_S}", query="SELECT id, n FROM things, gate"),
            self.dataset('notify = "last"', name="last"),
        )
        for n, end_transaction in enumerate(("", "COMMIT;"), 1):
            with self.subTest(end_transaction=end_transaction):
                count = len(self.attempts(daemon, "things"))
                seen = len(self.attempts(daemon, "last"))
                with closing(connect(self.server, self.database)) as connection, connection.cursor() as cursor:
                    cursor.execute("BEGIN; LOCK TABLE gate IN ACCESS EXCLUSIVE MODE")
                    self.sql(
                        f"DO $$ BEGIN FOR i IN 1..10000 LOOP PERFORM pg_notify('told', 'any ' || i); {end_transaction} "
                        f"END LOOP; UPDATE things SET n = {n}; NOTIFY told; NOTIFY last; END $$"
                    )
                    # Notifications arrive in the order of their commits, so all of the burst have.
                    wait_until(lambda seen=seen: len(self.attempts(daemon, "last")) > seen, "the last notification")
                self.until_n(daemon, 3, n)
                self.until_quiet(daemon)
                self.assertIn(len(self.attempts(daemon, "things")) - count, (1, 2))


class Probed(FreshTestCase):
    tables = ("public.things", "public.version")

    def probed(self, probe: str = "SELECT v FROM version", *more: str) -> Daemon:
        self.sql("CREATE TABLE version AS SELECT 1 AS v")
        self.migrated()
        text = self.dataset(f"probe = '''{probe}'''", *more)
        return self.service(text, listening="notify" in text)

    def until_attempted(self, daemon: Daemon, count: int) -> dict[str, Any]:
        wait_until(lambda: len(self.attempts(daemon)) > count, "an attempt")
        return self.attempts(daemon)[count]

    def refresh(self, daemon: Daemon) -> dict[str, Any]:
        """Requests fresh data as a reader does, which does not override the probe."""
        count = len(self.attempts(daemon))
        time.sleep(1.1)  # Age is in whole seconds
        self.http(daemon, "/v1/datasets/things?max_age=0")
        return self.until_attempted(daemon, count)

    def test_unchanged(self) -> None:
        """An unchanged probe: nothing is fetched or published, as_of and age are new, the generation and tags stay."""
        daemon = self.probed()
        _, headers = self.http(daemon, "/v1/datasets/things")
        before = self.described(daemon)
        with self.resp_client(daemon) as subscriber:
            reader = hiredis.Reader()
            subscriber.sendall(encode("SUBSCRIBE", "cache:things"))
            self.reply(subscriber, reader)
            self.sql("UPDATE things SET n = 1")
            line = self.refresh(daemon)
            self.assertEqual((line["event"], line["generation"]), ("refresh_unchanged", before["generation"]))
            after = self.described(daemon)
            self.assertEqual(after["generation"], before["generation"])
            self.assertGreater(after["as_of"], before["as_of"])
            _, renewed = self.http(daemon, "/v1/datasets/things")
            self.assertEqual(renewed["etag"], headers["etag"])
            self.assertEqual(renewed["last-modified"], headers["last-modified"])
            self.assertEqual(self.http(daemon, "/v1/datasets/things", **{"If-None-Match": headers["etag"]})[0], 304)
            self.assertEqual(self.n(daemon, 3), 0)
            ((xid,),) = self.sql("SELECT pg_current_xact_id()::text")
            self.assertEqual(self.resp(daemon, "CACHE.WAIT", "things", xid, "30000"), 1)
            self.assertEqual(self.n(daemon, 3), 0)
            self.sql("UPDATE version SET v = 2")
            line = self.refresh(daemon)
            self.assertEqual(line["event"], "refresh_published")
            self.assertEqual(self.n(daemon, 3), 1)
            kind, _, message = self.reply(subscriber, reader)
            self.assertEqual((kind, json.loads(message)["generation"]), (b"message", before["generation"] + 1))

    def test_null(self) -> None:
        """NULL is a value: it stays what it is, and is another than any that follows, the empty text too."""
        daemon = self.probed("SELECT nullif(v, 1)::text FROM version")
        self.assertEqual(self.refresh(daemon)["event"], "refresh_unchanged")
        self.sql("UPDATE version SET v = 2")
        self.assertIn("all rows", self.refresh(daemon)["read"])

    def test_two_rows(self) -> None:
        """A probe with more than one value fails the attempt, with an error that states this; what is served stays."""
        daemon = self.probed()
        self.sql("INSERT INTO version VALUES (5)")
        count = len(self.attempts(daemon))
        ((xid,),) = self.sql("SELECT pg_current_xact_id()::text")
        self.resp(daemon, "CACHE.WAIT", "things", xid, "1")
        line = self.until_attempted(daemon, count)
        self.assertEqual(line["event"], "refresh_failed")
        self.assertIn("more than one row", line["error"])
        self.assertEqual(self.n(daemon, 3), 0)

    def test_notified(self) -> None:
        """A notification overrides the probe."""
        daemon = self.probed("SELECT v FROM version", NOTIFY)
        self.sql("UPDATE things SET n = 1; NOTIFY told")
        self.until_n(daemon, 3, 1)

    def test_notified_of_some_rows(self) -> None:
        """What the probe has shown is not forgotten because only the notified rows have been read."""
        daemon = self.probed("SELECT v FROM version", NOTIFY)
        self.sql("UPDATE things SET n = 1 WHERE id IN (3, 5); UPDATE version SET v = 2; NOTIFY told, '[3]'")
        self.until_n(daemon, 3, 1)
        self.assertEqual(self.n(daemon, 5), 0)
        self.assertEqual(self.refresh(daemon)["read"], "all rows")
        self.assertEqual(self.n(daemon, 5), 1)
        self.assertEqual(self.refresh(daemon)["event"], "refresh_unchanged")


class Operated(FreshTestCase):
    def test_gates(self) -> None:
        """A delta that removes too much is held, as a whole result would be, until it is accepted."""
        self.migrated()
        self.watched()
        daemon = self.service(self.dataset(WATCH))
        self.sql("DELETE FROM things WHERE id > 2")
        wait_until(lambda: self.described(daemon)["held"], "the hold")
        self.assertEqual((self.described(daemon)["rows"], self.n(daemon, 9)), (10, 0))
        self.admin("accept things")
        self.admin("refresh things")
        self.until_n(daemon, 9, None)
        self.assertEqual(self.described(daemon)["rows"], 2)

    def test_pin(self) -> None:
        """While it is pinned, deltas become candidates; unpin serves the newest, with all of them in it."""
        self.migrated()
        self.watched()
        daemon = self.service(self.dataset(WATCH))
        self.admin("pin things")
        for key in (3, 4):
            count = len(self.attempts(daemon))
            self.sql(f"UPDATE things SET n = 1 WHERE id = {key}")
            wait_until(lambda count=count: len(self.attempts(daemon)) > count, "a candidate")
        self.assertEqual({line["event"] for line in self.attempts(daemon)[-2:]}, {"refresh_held"})
        self.assertEqual((self.n(daemon, 3), self.n(daemon, 4)), (0, 0))
        self.admin("unpin things")
        self.assertEqual((self.n(daemon, 3), self.n(daemon, 4)), (1, 1))

    def test_reload(self) -> None:
        """A reload that adds `watch` to a dataset, or replaces it by `notify`, takes effect at once."""
        self.migrated()
        self.watched()
        daemon = self.service(self.dataset(), listening=False)
        self.assertNotIn("listening", daemon.ask("status").splitlines()[0])
        for number, setting in enumerate((WATCH, NOTIFY, 'notify = "another"', WATCH), 1):
            (self.directory / "cacheservice.toml").write_text(self.text(self.dataset(setting)))
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(lambda n=number: str(daemon.output).count('"config_reloaded"') == n, "the reload")
            self.until_listening(daemon)
            self.until_quiet(daemon)
            self.sql(f"UPDATE things SET n = {number}; NOTIFY told; NOTIFY another")
            self.until_n(daemon, 3, number)
        (self.directory / "cacheservice.toml").write_text(self.text(self.dataset()))
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not daemon.json()["postgres"]["listening"], "the end of listening")

    def test_warm_start(self) -> None:
        """After a restart, by SIGKILL too, the first refresh is a delta from what was saved, and right."""
        self.migrated()
        self.watched()
        daemon = self.service(self.dataset(WATCH))
        generation = self.described(daemon)["generation"]
        wait_until(lambda: "snapshot_saved" in daemon.output, "a save")
        daemon.kill()
        self.sql("UPDATE things SET n = 1 WHERE id = 3; DELETE FROM things WHERE id = 4")
        daemon = self.service(self.dataset(WATCH))
        self.assertEqual((self.n(daemon, 3), self.n(daemon, 4), self.n(daemon, 5)), (1, None, 0))
        self.assertEqual(self.reads(daemon)[0], "a delta of 2 keys")
        self.assertEqual(self.described(daemon)["generation"], generation + 1)


class NothingLost(FreshTestCase):
    """Whatever ends, all that a writer committed is served soon, long before the interval."""

    def written(self, daemon: Daemon, disturb: Any, rounds: int) -> Daemon:
        """Write numbered rows while `disturb` does its worst; then what is served is what is there."""
        stop = threading.Event()

        def write() -> None:
            number = 100
            while not stop.is_set():
                try:
                    with closing(connect(self.server, self.database)) as connection, connection.cursor() as cursor:
                        while not stop.is_set():
                            cursor.execute(
                                f"INSERT INTO things VALUES ({number}, {number}) ON CONFLICT DO NOTHING; {self.tell}"
                            )
                            number += 1
                            time.sleep(0.002)
                except psycopg2.Error:
                    number += 1
                    time.sleep(0.02)

        writer = threading.Thread(target=write)
        writer.start()
        chance = random.Random(7)
        try:
            for _ in range(rounds):
                time.sleep(chance.uniform(0.1, 0.6))
                daemon = disturb(daemon) or daemon
            time.sleep(0.1)
        finally:
            stop.set()
            writer.join()
        want = {str(i): n for i, n in self.sql("TABLE things")}
        wait_until(lambda: {key: row["n"] for key, row in self.rows(daemon).items()} == want, "all that was written")
        self.assertGreater(len(want), 50)
        self.assertNotIn("delta_differences", daemon.output)
        return daemon

    tell = ""

    def end_sessions(self, which: str) -> Any:
        def end(_: Daemon) -> None:
            self.sql(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.reader}' AND {which}"
            )

        return end

    def begin(self, *settings: str) -> Daemon:
        self.migrated()
        self.watched()
        return self.service(self.dataset(*settings))

    def test_its_listening_session(self) -> None:
        """Its LISTEN session is terminated, again and again."""
        self.written(self.begin(WATCH), self.end_sessions("application_name ILIKE '%listen%'"), 4)

    def test_its_sessions(self) -> None:
        """All of its sessions are terminated, again and again, and it is only notified."""
        self.tell = "NOTIFY told"
        self.written(self.begin(NOTIFY), self.end_sessions("true"), 4)

    def test_the_service(self) -> None:
        """The service is killed and started again."""

        def again(daemon: Daemon) -> Daemon:
            daemon.kill()
            daemon = self.started(self.text(self.dataset(WATCH)))
            daemon.wait_until_ready()
            return daemon

        self.written(self.begin(WATCH), again, 2)

    def test_the_server(self) -> None:
        """The server is restarted without a clean stop; then all is read, because it could have lost what was seen."""
        daemon = self.written(self.begin(WATCH), lambda _: self.server.restart("immediate"), 2)
        self.until_read(daemon, "the server was restarted, and could have lost what had been read")
