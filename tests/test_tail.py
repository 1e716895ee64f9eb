"""Laws of `cacheservice tail`: what happens is reported, each thing once, across restarts of the service."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.kit.command_line import GOOD, ITEMS, CommandLine
from tests.kit.ports import free_port
from tests.kit.postgres import query
from tests.kit.waiting import GIVE_UP_S, wait_until

# Each NOTIFY makes a generation.
TOLD = """
[datasets.told]
query = "SELECT 1 AS id, clock_timestamp()"
key = "id"
interval_s = 600
notify = "told"
"""
PUBLISHES = 30


class Tail(CommandLine):
    def setUp(self) -> None:
        super().setUp()
        self.resp_port = free_port()

    def configuration(self, *tables: str, **options: Any) -> str:
        return super().configuration(*tables, **options).replace("[resp]\nport = 0", f"[resp]\nport = {self.resp_port}")

    @contextmanager
    def tail(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A `tail --json` of the service; it has to end with 130 at Ctrl-C."""
        tail = subprocess.Popen(
            [sys.executable, "-m", "cacheservice", "tail", "--json", *arguments],
            cwd=self.directory, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        give_up = threading.Timer(2 * GIVE_UP_S, tail.kill)  # and a reader of it finds its end
        give_up.start()
        try:
            yield tail
            tail.send_signal(signal.SIGINT)
            _, errors = tail.communicate(timeout=GIVE_UP_S)
            self.assertEqual(tail.returncode, 130, errors)
            self.assertNotIn("Traceback", errors)
        finally:
            give_up.cancel()
            give_up.join()
            tail.kill()
            tail.communicate()

    def next_event(self, tail: subprocess.Popen[str], wanted: str) -> dict[str, Any]:
        """The next event of that name; the others are passed over."""
        assert tail.stdout is not None
        while True:
            line = tail.stdout.readline()
            self.assertTrue(line, f"it ended before {wanted}")
            event: dict[str, Any] = json.loads(line)
            if event["event"] == wanted:
                return event

    def publish_until_told(self, tail: subprocess.Popen[str]) -> int:
        """It follows once it reports a publish; return its generation."""
        notifying = subprocess.Popen(
            [sys.executable, "-c", _NOTIFY_ON_AND_ON, self.server.dsn(database=self.database)], stdin=subprocess.PIPE
        )
        try:
            generation: int = self.next_event(tail, "refresh_published")["generation"]
        finally:
            notifying.communicate(timeout=GIVE_UP_S)
        return generation

    def test_each_publish(self) -> None:
        """Each publish is reported once and in order, however fast they come: by the message of the RESP port."""
        daemon = self.service(TOLD)
        daemon.wait_until_ready()
        with self.tail("told") as tail:
            seen = [self.publish_until_told(tail)]
            for _ in range(PUBLISHES):
                generation = daemon.json()["datasets"]["told"]["generation"]
                query(self.server, self.database, "NOTIFY told")
                wait_until(
                    lambda before=generation: daemon.json()["datasets"]["told"]["generation"] > before, "a publish"
                )
            last = daemon.json()["datasets"]["told"]["generation"]
            self.assertGreater(last, PUBLISHES)
            while seen[-1] < last:
                event = self.next_event(tail, "refresh_published")
                self.assertEqual((event["dataset"], event.get("generations_before_it")), ("told", None))
                seen.append(event["generation"])
        self.assertEqual(seen, list(range(seen[0], last + 1)))

    def test_without_the_resp_port(self) -> None:
        """Where it cannot subscribe it reports that once, and counts the publishes that it missed by their numbers."""
        daemon = self.service(TOLD)
        daemon.wait_until_ready()
        with self.tail("--resp-port", str(free_port())) as tail:
            first = last = self.publish_until_told(tail)
            told = 1
            for _ in range(PUBLISHES):
                query(self.server, self.database, "NOTIFY told")
            time.sleep(1)
            wait_until(lambda: not daemon.json()["datasets"]["told"]["refreshing"], "the last refresh")
            newest = daemon.json()["datasets"]["told"]["generation"]
            while last < newest:
                event = self.next_event(tail, "refresh_published")
                last = event["generation"]
                told += 1 + event.get("generations_before_it", 0)
            tail.send_signal(signal.SIGINT)
            _, errors = tail.communicate(timeout=GIVE_UP_S)
        self.assertEqual(told, last - first + 1)
        self.assertRegex(errors, r"^cacheservice: publishes are detected by polling, .*see --resp-port\n$")

    def test_a_restart(self) -> None:
        """It reports when the service goes, when it is back as another process, and goes on."""
        daemon = self.service(GOOD, TOLD)
        daemon.wait_until_ready()
        with self.tail() as tail:
            self.publish_until_told(tail)
            daemon.kill()
            self.assertIn("no answer", self.next_event(tail, "service_lost")["error"])
            again = self.service(GOOD, TOLD)
            again.wait_until_ready()
            self.next_event(tail, "service_found")
            self.assertEqual(self.next_event(tail, "service_restarted")["pid"], again.json()["service"]["pid"])
            # What was published while nobody was connected follows from the numbers: all of them are accounted for.
            query(self.server, self.database, "NOTIFY told")
            wait_until(lambda: again.json()["datasets"]["told"]["generation"] > 1, "a publish")
            last = again.json()["datasets"]["told"]["generation"]
            told = []
            while not told or told[-1] < last:
                event = self.next_event(tail, "refresh_published")
                if event["dataset"] == "told":
                    told += range(event["generation"] - event.get("generations_before_it", 0), event["generation"] + 1)
            self.assertEqual(told, list(range(told[0], told[-1] + 1)))
            self.assertLessEqual(told[0], 2)

    def test_failures_and_states(self) -> None:
        """A failure is reported with its error, what expires and what recovers as well."""
        # Each refresh is a publish, so that it shows when it has begun to follow.
        daemon = self.service(ITEMS.replace("SELECT id, name", "SELECT id, name, clock_timestamp()"))
        daemon.wait_until_ready()
        with self.tail("items") as tail:
            self.next_event(tail, "refresh_published")
            self.lose_items(daemon)
            failed = self.next_event(tail, "refresh_failed")
            self.assertIn('relation "items" does not exist', failed["error"])
            self.assertGreaterEqual(failed["consecutive_failures"], 1)
            self.next_event(tail, "dataset_expired")
            query(self.server, self.database, "ALTER TABLE gone RENAME TO items")
            self.next_event(tail, "dataset_recovered")

    def test_a_slip_is_one_line(self) -> None:
        """An unknown dataset, or nobody there, is reported in one line."""
        self.service(GOOD).wait_until_ready()
        told = self.command("tail", "goof")
        self.assertEqual((told.returncode, told.stdout), (1, ""))
        self.assertEqual(told.stderr, "cacheservice: unknown dataset 'goof'; 'cacheservice status' lists them\n")
        told = self.command("tail", "--port", str(free_port()))
        self.assertRegex(told.stderr, r"^cacheservice: no answer from \S+: .*\n$")


# Until its standard input is closed.
_NOTIFY_ON_AND_ON = """
import select, sys, psycopg2
connection = psycopg2.connect(sys.argv[1])
connection.autocommit = True
while not select.select([sys.stdin], [], [], 0.3)[0]:
    connection.cursor().execute("NOTIFY told")
"""
