"""Laws of cacheservice tail: following a service, and its passwords."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import NoAnswer
from cacheservice.cli import tail
from cacheservice.cli.client import Address, Answer
from cacheservice.cli.follow import Event, Follower
from cacheservice.cli.tail_words import in_words
from cacheservice.views.facts import Attempt, Change, Database, Dataset, Facts, Service

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def status(generation: int, pid: int = 1, **fields: Any) -> Facts:
    """Return the facts about a service with one dataset, `a`."""
    dataset = Dataset(
        name="a",
        state="fresh",
        interval_s=1.0,
        timeout_s=1.0,
        max_age_s=3.0,
        generation=generation,
        as_of=MOMENT,
        age_s=1.0,
        last_change=Change(0, generation, 0),
        next_refresh_in_s=1.0,
    )
    service = Service("1.0", ready=True, pid=pid)
    return Facts(MOMENT, service, Database(), {"a": replace(dataset, **fields)})


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

        self.patch(tail, "Subscription", subscription)
        self.patch(tail, "print_error", sent.append)
        answer = Answer(0.0, "", status(1))
        for password in ("first", "second"):
            secret.write_text(f"{password}\n")
            ports = tail.Ports(Address("127.0.0.1", 1), Address("127.0.0.1", 2), 1.0)
            self.assertFalse(ports.subscribe(answer, ["items"]))
        self.assertEqual([each for each in sent if "publishes" not in each], ["first", "second"])


class Following(SynchronousTestCase):
    """Which events two sources make together, whatever comes first."""

    def setUp(self) -> None:
        self.follower = Follower()
        self.assertEqual(self.poll(5), [])

    def poll(self, generation: int, *, subscribed: bool = True, **fields: Any) -> list[Mapping[str, Any]]:
        polled = status(generation, **fields)
        events = [*self.follower.restart(polled), *self.follower.poll(polled, subscribed=subscribed)]
        return [{"event": event.name, **event.fields} for event in events]

    def messages(self, *generations: int) -> list[int]:
        return [event.fields["generation"] for each in generations for event in self.follower.message(message(each))]

    def test_a_message_before_the_poll(self) -> None:
        """What a message has reported, no poll reports again."""
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
        """What no message has reported by the next poll, the poll reports, with its number; no message repeats it."""
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
        """Without a subscription a poll reports at once."""
        (event,) = self.poll(6, subscribed=False)
        self.assertEqual((event["generation"], event["changed"]), (6, 6))

    def test_another_process(self) -> None:
        """After a restart generations begin again, and are reported from the first."""
        (event,) = self.poll(1, pid=2)
        self.assertEqual(event["event"], "service_restarted")
        self.assertEqual([each["generation"] for each in self.poll(1, pid=2)], [1])
        (event,) = self.poll(0, pid=3)
        self.assertEqual(event["event"], "service_restarted")
        self.assertEqual(self.poll(0, pid=3), [])
        self.assertEqual(self.messages(1), [1])
        self.assertEqual(self.messages(2), [2])

    def test_an_attempt_is_told_once(self) -> None:
        """A failure that several polls see is one event, in words that include when it is tried again."""
        failing = {
            "last_attempt": Attempt("failed", "retry", MOMENT, 0.5, error="no table"),
            "consecutive_failures": 2,
        }
        (event,) = self.poll(5, **failing)
        self.assertEqual(self.poll(5, **failing), [])
        self.assertEqual(event["event"], "refresh_failed")
        words = in_words(Event(MOMENT, "refresh_failed", "a", event)).plain
        self.assertEqual(words, "03:04:05.000Z  a  failed  no table (after 0.50 s, 2 in a row, next try in 1.00 s)")

    def test_a_held_result(self) -> None:
        """A held result is one event, however many polls see it."""
        held = {"last_attempt": Attempt("held", "interval", MOMENT, 0.5, error="would drop rows")}
        (event,) = self.poll(5, **held)
        self.assertEqual((event["event"], event["error"]), ("refresh_held", "would drop rows"))
        self.assertEqual(self.poll(5, **held), [])

    def test_an_attempt_without_a_failure(self) -> None:
        """Attempts that publish or find nothing new are no events of their own."""
        for outcome in ("published", "unchanged"):
            self.assertEqual(self.poll(5, last_attempt=Attempt(outcome, "interval", MOMENT, 0.5)), [])

    def test_expired_and_recovered(self) -> None:
        """Both are reported once; a dataset that becomes stale is not."""
        self.assertEqual(self.poll(5, state="stale"), [])
        (event,) = self.poll(5, state="expired", age_s=4.0)
        self.assertEqual((event["event"], event["age_s"], event["max_age_s"]), ("dataset_expired", 4.0, 3.0))
        self.assertEqual(self.poll(5, state="expired", age_s=5.0), [])
        (event,) = self.poll(5, age_s=0.5)
        self.assertEqual((event["event"], event["age_s"]), ("dataset_recovered", 0.5))
        self.assertEqual(self.poll(5), [])

    def test_the_first_poll(self) -> None:
        """What was so before tail began is no event."""
        follower = Follower()
        seen = status(5, state="expired", last_attempt=Attempt("failed", "retry", MOMENT, 0.5, error="no table"))
        self.assertEqual([*follower.restart(seen), *follower.poll(seen, subscribed=True)], [])
        self.assertTrue(follower.knows("a"))

    def test_other_datasets(self) -> None:
        """With names, only these are followed."""
        follower = Follower(["b"])
        for generation in (5, 6):
            self.assertEqual(list(follower.poll(status(generation), subscribed=False)), [])
        self.assertEqual((follower.follows("a"), follower.follows("b"), follower.knows("a")), (False, True, False))

    def test_a_publish_without_a_row(self) -> None:
        """The first load of an empty table has no rows; later, no row differs."""
        for generation, expected in ((1, "generation 1, no rows"), (2, "generation 2, no row differs")):
            fields = {"generation": generation, "added": 0, "changed": 0, "removed": 0}
            event = Event(MOMENT, "refresh_published", "a", fields)
            self.assertEqual(in_words(event).plain, f"03:04:05.000Z  a  published  {expected}")
