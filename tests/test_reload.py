"""Laws of reloading: what has changed takes effect, what has not notices nothing, and what is wrong changes nothing."""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import redis

from tests.kit.daemon import Daemon, DaemonTestCase
from tests.kit.postgres import fresh_database, query, sessions
from tests.kit.waiting import GIVE_UP_S, wait_until


def table(name: str, rows: str = "generate_series(1, 3) AS id", **keys: Any) -> str:
    """A dataset's table, whose rows have an `n`."""
    every = {
        "query": f"SELECT id, 'row of {name}' AS text{', at' if ' AS at' in rows else ''} FROM {rows}",
        "key": "id",
        "interval_s": 3600,
        "retry_initial_s": 0.1,
        "retry_max_s": 0.3,
    } | keys
    return f"\n[datasets.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in every.items())


class UnderTwistd(DaemonTestCase):
    """The whole service, its configuration rewritten and reloaded while clients are connected."""

    def configured(self, *tables: str, more: str = "", **options: Any) -> str:
        return self.configuration(*tables, f'\n[admin]\nsocket = "{self.directory}/admin"\n{more}', **options)

    def begun(self, *tables: str, **options: Any) -> Daemon:
        daemon = self.started(self.configured(*tables, **options))
        daemon.wait_until_ready()
        return daemon

    def write(self, *tables: str, **options: Any) -> None:
        (self.directory / "cacheservice.toml").write_text(self.configured(*tables, **options))

    def reload(self, *tables: str, **options: Any) -> str:
        self.write(*tables, **options)
        return self.admin("reload")

    def connected(self, daemon: Daemon) -> redis.Redis:
        host, _, port = daemon.event("service_started")["resp"].rpartition(":")
        client = redis.Redis(host=host, port=int(port), socket_timeout=GIVE_UP_S, single_connection_client=True)
        self.addCleanup(client.close)
        return client

    def fetch(self, daemon: Daemon, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(f"http://{daemon.event('service_started')['http']}{path}") as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def reading(self, read: Callable[[], object]) -> Callable[[], int]:
        """Repeat `read` all the time; return a function that ends it and returns the count. A raise fails the test."""
        over = threading.Event()
        counts = itertools.count()
        raised: list[Exception] = []

        def go_on() -> None:
            while not over.wait(0.002) and not raised:
                try:
                    read()
                    next(counts)
                except Exception as error:
                    raised.append(error)

        thread = threading.Thread(target=go_on)
        thread.start()

        def end() -> int:
            over.set()
            thread.join(GIVE_UP_S)
            self.assertEqual(raised, [])
            return next(counts)

        self.addCleanup(end)
        return end

    def dataset(self, daemon: Daemon, name: str) -> dict[str, Any]:
        described: dict[str, Any] = daemon.json()["datasets"][name]
        return described

    def test_add_change_remove(self) -> None:
        """One dataset comes, one changes, one goes, while clients of both ports read the one that stays."""
        daemon = self.begun(table("stays"), table("changes"), table("goes"))
        client, other = self.connected(daemon), self.connected(daemon)
        subscriber = self.connected(daemon).pubsub()
        subscriber.subscribe("cache:goes", "cache:changes")
        opened = {each.client_id() for each in (client, other)}
        end_resp = self.reading(lambda: self.assertIn(b"row of stays", client.get("stays:2")))
        end_http = self.reading(
            lambda: self.assertEqual(self.fetch(daemon, "/v1/datasets/stays/rows/2")[1]["text"], "row of stays")
        )
        before = self.dataset(daemon, "stays")
        changing = "generate_series(1, {}) AS id, clock_timestamp() AS at"
        reply = self.reload(table("stays"), table("changes", changing.format(30)), table("comes", changing.format(3)))
        self.assertRegex(reply, "^OK reloaded: 1 added, 1 changed, 1 removed, 1 unchanged; from .*, modified ")
        with self.assertRaisesRegex(redis.ResponseError, "unknown dataset 'goes'"):
            other.get("goes:1")
        self.assertEqual(self.fetch(daemon, "/v1/datasets/goes/rows/1")[0], 404)
        wait_until(lambda: self.dataset(daemon, "changes")["rows"] == 30, "the new query's rows")
        wait_until(lambda: self.dataset(daemon, "comes")["rows"] == 3, "the new dataset")
        self.assertEqual(other.hlen("comes"), 3)
        self.assertEqual(other.execute_command("CACHE.LIST"), [b"stays", b"changes", b"comes"])
        subscriber.subscribe("cache:comes")
        self.admin("refresh comes")
        self.admin("refresh changes")
        messages = iter(lambda: subscriber.get_message(timeout=GIVE_UP_S), None)
        told = [
            json.loads(each["data"])["dataset"] for each in itertools.islice(messages, 6) if each["type"] == "message"
        ]
        self.assertEqual(set(told), {"changes", "comes"})
        after = self.dataset(daemon, "stays")
        self.assertEqual((after["generation"], after["as_of"]), (before["generation"], before["as_of"]))
        self.assertLess(after["next_refresh_in_s"], before["next_refresh_in_s"])
        self.assertGreater(min(end_resp(), end_http()), 0)
        self.assertEqual({each.client_id() for each in (client, other)}, opened)
        event = daemon.event("config_reloaded")
        fields = {name: event[name] for name in ("added", "changed", "removed", "needs_restart")}
        self.assertEqual(fields, {"added": ["comes"], "changed": ["changes"], "removed": ["goes"], "needs_restart": []})
        # And the log's level.
        everything = table("stays"), table("changes"), table("comes")
        self.reload(*everything, log='level = "error"')
        wait_until(lambda: self.dataset(daemon, "changes")["rows"] == 3, "the query's rows")
        self.reload(*everything)

        def reloads() -> int:
            return [line["event"] for line in daemon.lines].count("config_reloaded")

        # The second reload, and the publish that it caused, have no line.
        wait_until(lambda: reloads() == 2, "the line of the third reload")
        published = [line for line in daemon.lines if line["event"] == "refresh_published"]
        self.assertNotIn(("changes", 3), [(line["dataset"], line["rows"]) for line in published[3:]])
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_other_limits_of_what_is_served(self) -> None:
        """Another interval is in the next answer over HTTP, with how long it may be kept."""
        daemon = self.begun(table("products"))
        for interval_s in (3600, 60):
            self.reload(table("products", interval_s=interval_s))
            with urllib.request.urlopen(
                f"http://{daemon.event('service_started')['http']}/v1/datasets/products"
            ) as answer:
                self.assertIn(f"max-age={interval_s},", answer.headers["Cache-Control"])
        self.assertEqual(self.dataset(daemon, "products")["generation"], 1)

    def test_whoever_reads_what_changes(self) -> None:
        """While a query is replaced again and again, readers find the old or the new result, never none."""
        daemon = self.begun(table("products"))
        client = self.connected(daemon)
        end = self.reading(lambda: self.assertIn(client.hlen("products"), range(3, 10)))
        for count in range(4, 9):
            rows = f"generate_series(1, {count}) AS id, LATERAL pg_sleep(0.02)"
            self.assertIn("1 changed", self.reload(table("products", rows)))
            wait_until(lambda: self.dataset(daemon, "products")["rows"] == count, "the new rows")  # noqa: B023  # called before it changes
        self.assertEqual(self.dataset(daemon, "products")["generation"], 6)
        self.assertGreater(end(), 0)

    def test_regroup(self) -> None:
        """Datasets that come to a group are read together; one that leaves it is alone; the others notice nothing."""
        daemon = self.begun(table("a", group="g"), table("b", group="g"), table("c"), table("d"))
        wait_until(lambda: self.dataset(daemon, "d")["rows"], "the load")
        before = self.dataset(daemon, "d")
        as_of = {name: self.dataset(daemon, name)["as_of"] for name in "abc"}
        self.assertEqual(as_of["a"], as_of["b"])
        reply = self.reload(table("a"), table("b", group="g"), table("c", group="g"), table("d"))
        self.assertRegex(reply, "^OK reloaded: 0 added, 2 changed, 0 removed, 2 unchanged; from ")
        wait_until(lambda: all(self.dataset(daemon, name)["as_of"] > as_of[name] for name in "abc"), "the refreshes")
        self.assertEqual(self.dataset(daemon, "b")["as_of"], self.dataset(daemon, "c")["as_of"])
        self.assertNotEqual(self.dataset(daemon, "a")["as_of"], self.dataset(daemon, "c")["as_of"])
        self.assertEqual(self.dataset(daemon, "d")["as_of"], before["as_of"])

    def test_a_bad_file(self) -> None:
        """Whatever is wrong, nothing changes, the log and the status report it, and a good file clears it."""
        daemon = self.begun(table("products"), table("other"))
        before = {name: self.dataset(daemon, name)["as_of"] for name in ("products", "other")}
        good = self.configured(table("products"), table("other"))
        path = self.directory / "cacheservice.toml"
        for number, (text, words) in enumerate(
            [
                (good + "\n[datasets.x\n", "cacheservice.toml: line "),
                (good + table("third", intervall_s=1), "unknown key"),
                (good + table("third", interval_s=0, timeout_s=-1), "must be greater than 0 (and 1 more)"),
                (None, "not found in the working directory"),
                (good.replace("[postgres]", "[postgres]\nmax_connections = 0"), "must be at least 1"),
            ],
            1,
        ):
            path.unlink() if text is None else path.write_text(text)
            reply = self.admin("reload")
            self.assertTrue(reply.startswith("ERROR "), reply)
            self.assertIn(words, reply)
            reply, *problems = reply.splitlines()
            more = re.search(r" \(and (\d+) more\)$", reply)
            self.assertEqual(len(problems), int(more[1]) + 1 if more else 0)
            head = daemon.ask("status").splitlines()[0]
            self.assertIn(f"ago: {reply.removeprefix('ERROR ')}", head)
            self.assertIn("configuration rejected ", head)
            self.assertIn("is not in effect", daemon.ask("why products"))
            self.assertEqual({name: self.dataset(daemon, name)["as_of"] for name in before}, before)
            self.assertEqual(len(daemon.json()["datasets"]), 2)
            self.until_told(daemon, "config_rejected", number)
        path.write_text(good)
        self.assertRegex(self.admin("reload"), "^OK reloaded: 0 added, 0 changed, 0 removed, 2 unchanged; from ")
        self.assertNotIn("rejected", daemon.ask("status"))

    def until_told(self, daemon: Daemon, event: str, times: int) -> None:
        """Lines are written off the reactor, and so may come after a reply."""
        wait_until(lambda: [line["event"] for line in daemon.lines].count(event) >= times, f"{event}, {times} times")
        self.assertEqual([line["event"] for line in daemon.lines].count(event), times)

    def test_what_needs_a_restart(self) -> None:
        """Ports, secrets and folders are named and stay as they are; the datasets take effect nevertheless."""
        daemon = self.begun(table("products"))
        for _ in range(2):
            reply = self.reload(
                table("products"),
                table("new"),
                more="[limits]\nidle_timeout_s = 30\n[persistence]\nkeep_generations = 9\n",
            )
            self.assertIn("; at the next start: persistence.keep_generations; from ", reply)
        self.assertEqual(daemon.event("config_reloaded")["needs_restart"], ["persistence.keep_generations"])
        wait_until(lambda: daemon.ask("ready") == "ready" and "new" in daemon.json()["datasets"], "the new dataset")

    def test_amid_other_commands(self) -> None:
        """What follows `reload` is answered after it, on the same line, at a prompt, and without a line's end."""
        daemon = self.begun(table("products"))
        reloaded, version = self.admin("reload"), daemon.ask("version")
        self.assertRegex(reloaded, "^OK reloaded: 0 added, 0 changed, 0 removed, 1 unchanged; from ")
        for sent, received in (
            ("version;reload;version\n", [version, reloaded, version]),
            ("reload;reload", [reloaded, reloaded]),
            (
                "prompt\nreload\nversion\nreload;version\nquit\n",
                ["", reloaded, "", version, "", reloaded, "", version, ""],
            ),
            ("prompt\nreload", ["", reloaded, ""]),
            ("reload;quit;version\n", [reloaded]),
        ):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(GIVE_UP_S)
                client.connect(f"{self.directory}/admin")
                client.sendall(sent.encode())
                client.shutdown(socket.SHUT_WR)
                with client.makefile("r", encoding="utf-8") as reply:
                    self.assertEqual(reply.read().splitlines(), received)
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{self.directory}/admin")
                client.sendall(b"reload\n")  # and is gone before the reply
        self.assertEqual(self.admin("reload"), reloaded)
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_many_hang_ups(self) -> None:
        """Fifty SIGHUPs, each after another change of the file: in the end the last one is in effect."""
        daemon = self.begun(table("products"))
        for number in range(1, 51):
            self.write(table("products"), table(f"d{number}"))
            daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: list(daemon.json()["datasets"]) == ["products", "d50"], "the last configuration")
        wait_until(lambda: daemon.ask("ready") == "ready", "readiness")
        self.assertEqual(self.dataset(daemon, "products")["generation"], 1)
        daemon.end()
        self.assert_ended(daemon, -signal.SIGTERM)

    def test_while_a_refresh_runs(self) -> None:
        """A refresh in flight of an unchanged dataset goes on; that of a removed or changed one is ended."""
        slow = "generate_series(1, 3) AS id, LATERAL pg_sleep({})"
        daemon = self.started(
            self.configured(
                table("kept", slow.format(1)),
                table("changed", slow.format(500), timeout_s=600),
                table("removed", slow.format(600), timeout_s=600),
                more="[defaults]\nrequired = false\n",
            ).replace("[postgres]", "[postgres]\nmax_connections = 4")
        )
        wait_until(
            lambda: len([s for s in sessions(self.server, self.database) if s.state == "active"]) == 3, "the reads"
        )
        [kept] = [s.pid for s in sessions(self.server, self.database) if "kept" in s.application_name]
        self.reload(table("kept", slow.format(1)), table("changed"), more="[defaults]\nrequired = false\n")
        wait_until(lambda: self.dataset(daemon, "changed")["rows"] == 3, "the new query's rows")
        wait_until(
            lambda: not [s for s in sessions(self.server, self.database) if s.pid != kept], "the end of the others"
        )
        wait_until(lambda: self.dataset(daemon, "kept")["generation"] == 1, "the load of what was kept")
        self.assertEqual(self.dataset(daemon, "kept")["last_attempt"]["outcome"], "published")
        self.assertEqual([line for line in daemon.lines if line["event"] == "refresh_failed"], [])

    def test_another_database(self) -> None:
        """With another dsn what is served stays, and is then read from there."""
        other = fresh_database(self.server, self.addCleanup)
        for database, count in ((self.database, 3), (other, 4)):
            query(self.server, database, f"CREATE TABLE things AS SELECT id FROM generate_series(1, {count}) AS id")
        daemon = self.begun(table("products", "things"))
        self.assertIn("1 changed", self.reload(table("products", "things"), dsn=self.server.dsn(database=other)))
        wait_until(lambda: self.dataset(daemon, "products")["rows"] == 4, "the other database's rows")
        self.assertEqual(self.dataset(daemon, "products")["generation"], 2)

    def test_waiting_readers_of_what_is_removed(self) -> None:
        """CACHE.WAIT and ?max_age= end with an error that states this, on the connection that they were asked on."""
        slow = "generate_series(1, 2) AS id, LATERAL pg_sleep(1)"
        daemon = self.begun(table("stays"), table("goes", slow, timeout_s=100))
        client = self.connected(daemon)
        answers: list[Any] = []

        def wait() -> None:
            try:
                client.execute_command("CACHE.WAIT", "goes", 2**40, 60_000)
            except redis.ResponseError as error:
                answers.append(str(error))

        def fetch() -> None:
            answers.append(self.fetch(daemon, "/v1/datasets/goes?max_age=0")[0])

        threads = [threading.Thread(target=each) for each in (wait, fetch)]
        for thread in threads:
            thread.start()
        other = self.connected(daemon)
        wait_until(lambda: other.info("clients")["blocked_clients"] == 1, "the wait")
        wait_until(lambda: self.dataset(daemon, "goes")["refreshing"], "the refresh")
        self.reload(table("stays"))
        for thread in threads:
            thread.join(GIVE_UP_S)
        self.assertEqual(sorted(map(str, answers)), ["404", "unknown dataset 'goes'"])
        self.assertIn(b"row of stays", client.get("stays:1"))

    def test_saved_files(self) -> None:
        """A dataset that comes back has its saved rows before the database answers; another query's are never used."""
        more = f'[persistence]\ndirectory = "{self.directory}/saved"\nmin_save_interval_s = 0\n'
        daemon = self.begun(table("stays"), table("products"), more=more)
        wait_until(lambda: len([line for line in daemon.lines if line["event"] == "snapshot_saved"]) == 2, "the saves")
        self.reload(table("stays"), more=more)
        self.assertEqual(len(list((self.directory / "saved").glob("products.*"))), 1)
        self.reload(table("stays"), table("products"), more=more)
        restored = daemon.event("snapshot_restored")
        self.assertEqual((restored["dataset"], restored["generation"], restored["rows"]), ("products", 2, 3))
        wait_until(lambda: self.dataset(daemon, "products")["source"] == "postgres", "the refresh after it")
        self.assertEqual(self.dataset(daemon, "products")["generation"], 2)  # with the same rows
        wait_until(lambda: len([line for line in daemon.lines if line["event"] == "snapshot_saved"]) == 3, "the save")
        # Of another query: it is not restored, nor rolled back to.
        self.reload(table("stays"), table("products", "generate_series(1, 7) AS id"), more=more)
        wait_until(lambda: self.dataset(daemon, "products")["rows"] == 7, "the new query's rows")
        self.admin("rollback products")
        self.assertIn("has changed since it was saved", daemon.event("rollback_failed")["error"])
        self.assertEqual(self.dataset(daemon, "products")["rows"], 7)
