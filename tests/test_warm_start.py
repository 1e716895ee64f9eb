"""Laws of a warm start and of rollbacks, of the real service with real files."""

from __future__ import annotations

import json
import shutil
import socket
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacheservice.sources.disk.format import SnapshotWriter, read
from tests.kit.daemon import Daemon, DaemonTestCase
from tests.kit.postgres import fresh_database, query
from tests.kit.waiting import GIVE_UP_S, wait_until

NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"
THINGS = '[datasets.things]\nquery = "TABLE things"\nkey = "id"\ninterval_s = 3600\nmax_age_s = 7200\nretry_max_s = 1\n'


class WarmStartTestCase(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.sql("CREATE TABLE things AS SELECT i AS id, 1 AS n FROM generate_series(1, 100) AS i")
        self.saved = self.directory / "saved"

    def sql(self, statement: str) -> None:
        query(self.server, self.database, statement)

    def service(self, things: str = THINGS, dsn: str | None = None, directory: Path | None = None) -> Daemon:
        """Saves at once, and keeps three generations."""
        return self.started(
            self.configuration(
                f'[admin]\nsocket = "{self.directory / "admin"}"\n'
                f'[persistence]\ndirectory = "{directory or self.saved}"\nmin_save_interval_s = 0\n',
                things,
                dsn=dsn,
            )
        )

    def things(self, daemon: Daemon) -> dict[str, Any]:
        described: dict[str, Any] = daemon.json()["datasets"]["things"]
        return described

    def refreshed(self, daemon: Daemon, n: int) -> None:
        """A generation whose rows all have that `n`, published and saved."""
        before = self.things(daemon)["generation"]
        self.sql(f"UPDATE things SET n = {n}")
        self.admin("refresh things")
        wait_until(lambda: self.things(daemon)["generation"] > before, "a publish")
        self.until_saved(daemon, before + 1)

    def until_saved(self, daemon: Daemon, generation: int) -> None:
        wait_until(
            lambda: [
                line for line in daemon.lines if line["event"] == "snapshot_saved" and line["generation"] >= generation
            ],
            f"generation {generation} on disk",
        )

    def n(self, daemon: Daemon) -> int:
        """What all rows have as `n`, read as an application would."""
        host, _, port = daemon.event("service_started")["resp"].rpartition(":")
        with socket.create_connection((host, int(port)), timeout=GIVE_UP_S) as client:
            client.sendall(b"GET things:1\r\n")
            with client.makefile("rb") as replies:
                size = int(replies.readline()[1:])
                number: int = json.loads(replies.read(size))["n"]
                return number


class WarmStart(WarmStartTestCase):
    def test_beside_a_dead_database(self) -> None:
        """After a restart without a database the last snapshot is served, with its true age, as one from disk."""
        first = self.service()
        first.wait_until_ready()
        self.until_saved(first, 1)
        before = self.things(first)
        self.assertEqual(first.end(), -15)
        self.assertEqual(stat.S_IMODE(self.saved.stat().st_mode), 0o700)
        self.assertEqual({stat.S_IMODE(file.stat().st_mode) for file in self.saved.iterdir()}, {0o600})
        second = self.service(dsn=NOWHERE)
        second.wait_until_ready()
        after = self.things(second)
        self.assertEqual((after["source"], after["generation"], after["as_of"]), ("disk", 1, before["as_of"]))
        self.assertGreaterEqual(after["age_s"], before["age_s"])
        self.assertEqual((after["rows"], self.n(second)), (100, 1))
        self.assertEqual(second.event("snapshot_restored")["rows"], 100)
        self.assertEqual(second.end(), -15)

    def test_on_another_machine(self) -> None:
        """The age counts from the read by the wall clocks, not from the start of this machine.

        `status`, `why` and `json` report it as uncertain, until the first refresh.
        """
        first = self.service()
        first.wait_until_ready()
        self.until_saved(first, 1)
        first.end()
        for path in self.saved.glob("*.renewal"):
            path.unlink()
        (path,) = self.saved.glob("*.snapshot")
        header, blocks = read(path)
        assert header.read_on is not None
        rows = list(blocks)
        moved = replace(header, read_on=header.read_on._replace(boot="there", boot_us=0, machine="another"))
        with path.open("wb") as file:
            writer = SnapshotWriter(file, moved)
            for block in rows:
                writer.write(block)
            writer.finish()
        second = self.service(dsn=NOWHERE)
        second.wait_until_ready()
        things = self.things(second)
        passed_s = time.time() - header.read_on.wall_us / 1e6
        self.assertEqual(things["source"], "disk")
        self.assertLessEqual(things["age_s"], passed_s + 0.001)
        self.assertRegex(things["age_uncertain"], "^it (was|may have been) saved on another machine$")
        self.assertIn(f"age uncertain: {things['age_uncertain']}", second.ask("status"))
        sentence = f"Its age is uncertain until the next refresh: {things['age_uncertain']}."
        self.assertIn(sentence, second.ask("why things"))
        second.end()
        third = self.service()
        wait_until(lambda: self.things(third)["source"] == "postgres", "the refresh")
        self.assertIsNone(self.things(third)["age_uncertain"])
        self.assertNotIn("uncertain", third.ask("status") + third.ask("why things"))
        third.end()

    def test_two_services_on_one_directory(self) -> None:
        """The second service reads another database, serves its own rows and reports that it saves nothing.

        The files of the first stay as they are, and it can roll back to them.
        """
        first = self.service()
        first.wait_until_ready()
        self.until_saved(first, 1)
        self.refreshed(first, 2)
        before = {path.name: path.read_bytes() for path in self.saved.iterdir()}
        other = fresh_database(self.server, self.addCleanup)
        query(self.server, other, "CREATE TABLE things AS SELECT i AS id, 50 AS n FROM generate_series(1, 100) AS i")
        elsewhere = self.directory / "second"
        elsewhere.mkdir()
        second = Daemon(
            elsewhere,
            self.configuration(
                f'[admin]\nsocket = "{elsewhere / "admin"}"\n[persistence]\ndirectory = "{self.saved}"\n',
                THINGS,
                dsn=self.server.dsn(database=other),
            ),
        )
        self.addCleanup(second.kill)
        second.wait_until_ready()
        self.assertIn("another process saves there", second.event("persistence_locked")["error"])
        self.assertEqual((self.n(second), self.n(first)), (50, 2))
        self.assertIn("another process saves there", second.ask("status"))
        self.assertIn("another process saves there", self.things(second)["save_problem"])
        self.assertEqual({path.name: path.read_bytes() for path in self.saved.iterdir()}, before)
        self.assertTrue(self.admin("rollback things").startswith("OK"))
        wait_until(lambda: self.things(first)["pinned"], "the rollback")
        self.assertEqual(self.n(first), 1)

    def test_generations_go_on(self) -> None:
        """The first refresh after a warm start gets the next number, counts its changes, and is saved in its turn."""
        first = self.service()
        first.wait_until_ready()
        self.until_saved(first, 1)
        self.refreshed(first, 2)
        first.end()
        self.sql("UPDATE things SET n = 3 WHERE id <= 5")
        second = self.service()
        wait_until(lambda: self.things(second)["generation"] == 3, "the refresh")
        things = self.things(second)
        self.assertEqual(things["source"], "postgres")
        self.assertEqual(things["last_change"], {"added": 0, "changed": 5, "removed": 0})
        self.until_saved(second, 3)
        second.end()

    def test_expired_not_hidden(self) -> None:
        """What is older than max_age_s is served as expired; the service is ready, unless it must not be served."""
        first = self.service()
        first.wait_until_ready()
        self.until_saved(first, 1)
        first.end()
        second = self.service(THINGS.replace("7200", "0.5").replace("3600", "0.2"), dsn=NOWHERE)
        wait_until(lambda: self.things(second)["state"] == "expired", "the expired snapshot")
        self.assertEqual((second.ask("ready"), self.n(second)), ("ready", 1))
        second.end()
        old = THINGS.replace("7200", '0.5\non_expired = "refuse"').replace("3600", "0.2")
        third = self.service(old, dsn=NOWHERE)
        wait_until(lambda: self.things(third)["state"] == "expired", "the expired snapshot")
        self.assertEqual(third.ask("ready"), "notready things:expired")
        third.end()

    def test_files_that_are_refused(self) -> None:
        """A damaged file, and one of another query, are named in the log, moved aside, and the start goes on."""
        first = self.service()
        first.wait_until_ready()
        self.refreshed(first, 2)
        first.end()
        newest, *_ = sorted(self.saved.iterdir(), reverse=True)
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        second = self.service(dsn=NOWHERE)
        second.wait_until_ready()
        self.assertEqual((self.things(second)["generation"], self.n(second)), (1, 1))
        self.assertEqual(second.event("snapshot_rejected")["file"], newest.name)
        second.end()
        third = self.service(THINGS.replace("TABLE things", "SELECT * FROM things"), dsn=NOWHERE)
        self.assertIn("query", third.event("snapshot_rejected")["error"])
        self.assertEqual(self.things(third)["state"], "never_loaded")
        self.assertEqual(len(list(self.saved.glob("*.rejected"))), 2)
        third.end()

    def test_a_folder_that_cannot_be_written(self) -> None:
        """It is an alarm in log, status and why, disturbs nothing else, and clears when the folder is there."""
        blocked = self.directory / "blocked"
        blocked.write_text("a file where the folder should be")
        daemon = self.service(directory=blocked)
        daemon.wait_until_ready()
        problem = daemon.event("snapshot_save_failed")["error"]
        self.assertIn("not saved", daemon.ask("status"))
        self.assertIn(f"It could not be saved: {problem}.", daemon.ask("why things"))
        blocked.unlink()
        self.assertTrue(daemon.event("snapshot_save_recovered"))
        self.assertNotIn("not saved", daemon.ask("status"))
        self.assertEqual(daemon.end(), -15)

    def test_nothing_configured(self) -> None:
        """Without a directory nothing is written anywhere."""
        daemon = self.started(self.configuration(THINGS))
        daemon.wait_until_ready()
        daemon.end()
        self.assertEqual({path.name for path in self.directory.iterdir()}, {"cacheservice.toml", "stdout", "stderr"})


class Rollback(WarmStartTestCase):
    def test_back_and_forth(self) -> None:
        """rollback serves the saved generation before, pinned and under a new number; again, the one before that; unpin
        serves the newest."""
        daemon = self.service()
        daemon.wait_until_ready()
        self.until_saved(daemon, 1)
        self.refreshed(daemon, 2)
        self.refreshed(daemon, 3)
        said = self.admin("rollback things")
        self.assertIn("OK things: going back to saved generation 2", said)
        wait_until(lambda: self.things(daemon)["generation"] == 4, "the rollback")
        things = self.things(daemon)
        self.assertEqual((self.n(daemon), things["pinned"], things["source"]), (2, True, "disk"))
        self.assertIn("rolled back to the saved generation 2", daemon.ask("why things"))
        self.admin("rollback things")
        wait_until(lambda: self.things(daemon)["generation"] == 5, "the second rollback")
        self.assertEqual(self.n(daemon), 1)
        self.assertEqual(self.admin("rollback things"), "ERROR no generation of things before 1 is saved")
        self.assertEqual(self.admin("unpin things"), "OK things: not pinned, generation 6 is served")
        self.assertEqual((self.n(daemon), self.things(daemon)["pinned"]), (3, False))
        self.assertEqual(daemon.end(), -15)

    def test_a_candidate_meanwhile(self) -> None:
        """A rolled back dataset refreshes into a candidate, which unpin publishes."""
        daemon = self.service()
        daemon.wait_until_ready()
        self.until_saved(daemon, 1)
        self.refreshed(daemon, 2)
        self.admin("rollback things")
        wait_until(lambda: self.things(daemon)["pinned"], "the rollback")
        self.sql("UPDATE things SET n = 7")
        self.admin("refresh things")
        wait_until(lambda: self.things(daemon)["last_attempt"]["outcome"] == "held", "the candidate")
        self.assertEqual(self.n(daemon), 1)
        self.admin("unpin things")
        self.assertEqual(self.n(daemon), 7)
        daemon.end()

    def test_a_group(self) -> None:
        """A group goes back together, to what is saved of one moment, and unpin serves the newest of all of it."""
        group = 'group = "g"\n'
        daemon = self.service(f"{THINGS}{group}" + THINGS.replace("datasets.things", "datasets.others") + group)
        daemon.wait_until_ready()
        self.until_saved(daemon, 1)
        self.refreshed(daemon, 2)
        said = self.admin("rollback others")
        self.assertIn("OK things: going back to saved generation 1", said)
        self.assertIn("OK others: going back to saved generation 1", said)
        wait_until(lambda: self.things(daemon)["generation"] == 3, "the rollback")
        both = daemon.json()["datasets"].values()
        self.assertEqual(
            [(each["generation"], each["pinned"], each["source"]) for each in both], [(3, True, "disk")] * 2
        )
        self.assertEqual(len({each["as_of"] for each in both}), 1)
        self.assertEqual(self.n(daemon), 1)
        self.assertIn("its group (things, others)", self.admin("rollback things"))
        self.admin("unpin things")
        self.assertEqual([each["pinned"] for each in daemon.json()["datasets"].values()], [False, False])
        self.assertEqual(self.n(daemon), 2)
        daemon.end()

    def test_nothing_to_go_back_to(self) -> None:
        """Without saved generations a rollback reports that and changes nothing."""
        daemon = self.service()
        daemon.wait_until_ready()
        self.until_saved(daemon, 1)
        self.assertEqual(self.admin("rollback things"), "ERROR no generation of things before 1 is saved")
        self.assertFalse(self.things(daemon)["pinned"])
        shutil.rmtree(self.saved)
        daemon.end()
