"""Laws of `cacheservice tail`: what happens is told, each thing once, across restarts of the service."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cli.asking import Address, Answer
from cacheservice.cli.tail import Event, Follower, in_words
from cacheservice.errors import NoAnswer
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
module = sys.modules[Follower.__module__]
"""The package has the command under that name."""


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
        give_up = threading.Timer(2 * GIVE_UP_S, tail.kill)  # and whoever reads from it finds its end
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
        """It follows once it tells of a publish; the generation of that."""
        notifying = subprocess.Popen(
            [sys.executable, "-c", _NOTIFY_ON_AND_ON, self.server.dsn(database=self.database)], stdin=subprocess.PIPE
        )
        try:
            generation: int = self.next_event(tail, "refresh_published")["generation"]
        finally:
            notifying.communicate(timeout=GIVE_UP_S)
        return generation

    def test_each_publish(self) -> None:
        """Each publish is told once and in order, however fast they come: by the message that the RESP port sends."""
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
        """Where it cannot subscribe it says so once, and tells by the numbers how many publishes it saw no more of."""
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
        self.assertRegex(errors, r"^cacheservice: publishes are seen by their numbers, .*see --resp-port\n$")

    def test_a_restart(self) -> None:
        """It tells when the service goes, when it is back as another process, and goes on."""
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
            # What was published while nobody was connected, the numbers tell: all of them are accounted for.
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
        """A failure is told with its error, what expires and what recovers as well."""
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
        """An unknown dataset, or nobody there, is told in one line."""
        self.service(GOOD).wait_until_ready()
        told = self.command("tail", "goof")
        self.assertEqual((told.returncode, told.stdout), (1, ""))
        self.assertEqual(told.stderr, "cacheservice: unknown dataset 'goof'; 'cacheservice status' shows them all\n")
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


def answer(generation: int, pid: int = 1, **fields: Any) -> Answer:
    dataset = {
        "generation": generation,
        "state": "fresh",
        "as_of": "2026-01-02T03:04:05Z",
        "age_s": 1.0,
        "max_age_s": 3.0,
        "last_change": {"added": 0, "changed": generation, "removed": 0},
        "last_attempt": None,
        "consecutive_failures": 0,
        "next_refresh_in_s": 1.0,
        **fields,
    }
    return Answer(0.0, "", {"service": {"pid": pid}, "datasets": {"a": dataset}}, ())


def message(generation: int) -> bytes:
    change = {"added": 0, "changed": generation, "removed": 0}
    return json.dumps({"dataset": "a", "generation": generation, "as_of": "2026-01-02T03:04:05Z", **change}).encode()


class Passwords(SynchronousTestCase):
    def test_rotated(self) -> None:
        """Each connection to the RESP port sends the password that its file holds by then."""
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        secret = folder / "password"
        self.patch(os, "environ", os.environ | {"CACHESERVICE_RESP__PASSWORD_FILE": str(secret)})
        sent: list[str] = []

        def subscription(_: Address, password: str) -> NoReturn:
            sent.append(password)
            raise NoAnswer("there is none")

        self.patch(module, "Subscription", subscription)
        self.patch(module, "tell", sent.append)
        answer: Any = None  # not asked before a subscription
        for password in ("first", "second"):
            secret.write_text(f"{password}\n")
            ports = module._Ports(Address("127.0.0.1", 1), Address("127.0.0.1", 2), 1.0)
            self.assertFalse(ports._subscribe(answer, ["items"]))
        self.assertEqual([each for each in sent if "publishes" not in each], ["first", "second"])


class Following(SynchronousTestCase):
    """Which events two sources make together, whatever comes first."""

    def setUp(self) -> None:
        self.follower = Follower()
        self.assertEqual(self.poll(5), [])

    def poll(self, generation: int, *, subscribed: bool = True, **fields: Any) -> list[Mapping[str, Any]]:
        polled = answer(generation, **fields)
        events = [*self.follower.restart(polled), *self.follower.poll(polled, subscribed=subscribed)]
        return [{"event": event.name, **event.fields} for event in events]

    def messages(self, *generations: int) -> list[int]:
        return [event.fields["generation"] for each in generations for event in self.follower.message(message(each))]

    def test_a_message_before_the_poll(self) -> None:
        """What a message has told of, no poll tells again."""
        self.assertEqual(self.messages(6, 7), [6, 7])
        self.assertEqual(self.poll(7) + self.poll(7), [])

    def test_a_message_after_the_poll(self) -> None:
        """A poll waits for the message of what it sees, until the next one."""
        self.assertEqual(self.poll(6), [])
        self.assertEqual(self.messages(6), [6])
        self.assertEqual(self.poll(7), [])
        self.assertEqual(self.messages(7), [7])
        self.assertEqual(self.poll(7) + self.poll(7), [])

    def test_a_message_that_never_came(self) -> None:
        """What no message told of by the next poll, that tells, with their number; a late message is no second."""
        self.assertEqual(self.poll(8), [])
        (event,) = self.poll(9)
        self.assertEqual((event["generation"], event["generations_before_it"]), (8, 2))
        self.assertNotIn("changed", event)  # what is known of it is of a later one
        self.assertEqual(self.messages(8, 9), [9])

    def test_a_message_tells_of_those_before_it(self) -> None:
        """Messages that were lost between two others are counted."""
        self.assertEqual(self.messages(6), [6])
        (event,) = self.follower.message(message(9))
        self.assertEqual(event.fields["generations_before_it"], 2)

    def test_without_messages(self) -> None:
        """Without a subscription a poll tells at once."""
        (event,) = self.poll(6, subscribed=False)
        self.assertEqual((event["generation"], event["changed"]), (6, 6))

    def test_another_process(self) -> None:
        """After a restart generations begin anew, and are told from the first."""
        (event,) = self.poll(1, pid=2)
        self.assertEqual(event["event"], "service_restarted")
        self.assertEqual([each["generation"] for each in self.poll(1, pid=2)], [1])
        (event,) = self.poll(0, pid=3)
        self.assertEqual(event["event"], "service_restarted")
        self.assertEqual(self.poll(0, pid=3), [])
        self.assertEqual(self.messages(1), [1])
        self.assertEqual(self.messages(2), [2])

    def test_an_attempt_is_told_once(self) -> None:
        """A failure that several polls see is one event, in words that say when it is tried again."""
        attempt = {"outcome": "failed", "trigger": "retry", "started_at": "2026-01-02T03:04:05Z", "took_s": 0.5}
        failing = {"last_attempt": attempt | {"rows": None, "error": "no table"}, "consecutive_failures": 2}
        (event,) = self.poll(5, **failing)
        self.assertEqual(self.poll(5, **failing), [])
        self.assertEqual(event["event"], "refresh_failed")
        words = in_words(Event(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "refresh_failed", "a", event)).plain
        self.assertEqual(words, "03:04:05.000Z  a  failed  no table (after 0.50 s, 2 in a row, next try in 1.00 s)")

    def test_a_publish_without_a_row(self) -> None:
        """The first load of an empty table has no rows; later, no row differs."""
        for generation, expected in ((1, "generation 1, no rows"), (2, "generation 2, no row differs")):
            fields = {"generation": generation, "added": 0, "changed": 0, "removed": 0}
            event = Event(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "refresh_published", "a", fields)
            self.assertEqual(in_words(event).plain, f"03:04:05.000Z  a  published  {expected}")
