"""Laws of the dashboard's feed and configuration, and of the hour that it charts."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from cacheservice import config
from cacheservice.base.errors import ConfigError
from cacheservice.cache.cache import Cache
from cacheservice.cache.history import MOST_POINTS, SLOT_S, Attempt, LastHour, Point
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ports.http.events import HEARTBEAT_S, PERIOD_S, Feed
from tests.kit.capture_states import STREAMING
from tests.kit.clocks import started_clock
from tests.kit.datasets import MANY, MOMENT_WITH_MS, declared
from tests.kit.http_port import encoded

WORST_LAST = ("unchanged", "published", "held", "failed")
attempts = st.tuples(
    st.floats(0, 2000), st.floats(0, 100), st.none() | st.floats(0, 10_000), st.sampled_from(WORST_LAST)
)


class Hour(SynchronousTestCase):
    @given(st.lists(attempts, max_size=60), st.floats(0, 5000))
    def test_each_attempt_of_the_hour_counts(self, told: list[Any], later_s: float) -> None:
        """A point is all attempts of its 10 s: the longest time, the greatest age, the worst outcome, the last end; no
        attempt of the hour is missing, none before it is there."""
        hour, now, expected = LastHour(), 0.0, dict[int, Point]()
        for gap_s, took_s, age_s, outcome in told:
            now += gap_s
            hour.add(now, took_s, age_s, outcome)
            slot = math.floor(now / SLOT_S)
            before = expected.get(slot, Point(slot, now, took_s, age_s, outcome))
            ages = [age for age in (before.age_s, age_s) if age is not None]
            expected[slot] = Point(
                slot,
                now,
                max(before.took_s, took_s),
                max(ages) if ages else None,
                max(before.outcome, outcome, key=WORST_LAST.index),
            )
        last = list(expected.values())[-1:]
        self.assertEqual([hour.newest()], last or [None])
        now += later_s
        first = math.floor(now / SLOT_S) - MOST_POINTS
        self.assertEqual(hour.points(now), [point for slot, point in expected.items() if slot > first])

    def test_it_is_bounded(self) -> None:
        """However often something is refreshed, an hour is at most 360 points."""
        hour = LastHour()
        for number in range(40_000):
            hour.add(number / 3, 0.1, 1.0, "published")
        self.assertEqual(len(hour.points(40_000 / 3)), MOST_POINTS)
        self.assertLessEqual(max(len(column) for column in vars(hour).values()), MOST_POINTS)

    def test_the_age_is_the_greatest_that_was_served(self) -> None:
        """With each attempt goes the greatest age since the one before: that of what was replaced, or of what stays."""
        clock = started_clock()
        dataset = Cache([declared("products")], clock.seconds).dataset("products")

        def attempt(outcome: Any, generation: int = 0) -> float | None:
            if generation:
                dataset.publish(Snapshot(generation, encoded({}), MOMENT_WITH_MS, clock.seconds(), "1:1:"))
            dataset.attempted(Attempt(outcome, "interval", MOMENT_WITH_MS, 0.1))
            newest = dataset.last_hour.newest()
            assert newest is not None
            return newest.age_s

        self.assertIsNone(attempt("failed"))
        clock.advance(10)
        self.assertEqual(attempt("published", 1), 0.0)
        clock.advance(60)
        self.assertEqual(attempt("published", 2), 60.0)
        clock.advance(90)
        self.assertEqual(attempt("failed"), 90.0)
        clock.advance(30)
        self.assertEqual(attempt("published", 3), 120.0)
        clock.advance(20)
        self.assertEqual(attempt("held"), 20.0)


class FeedRules(SynchronousTestCase):
    """The feed alone, on a clock that a test turns."""

    turn_s = 60.0

    def setUp(self) -> None:
        self.clock = started_clock()
        self.cache = Cache([declared("products"), declared("prices")], self.clock.seconds)
        self.feed = Feed(self.cache, self.clock, self.turn_s)

    def publish(self, name: str, generation: int) -> None:
        self.cache.dataset(name).publish(
            Snapshot(generation, encoded({}), MOMENT_WITH_MS, self.clock.seconds(), "1:1:")
        )

    def advance(self, seconds: float) -> None:
        self.clock.pump([0.25] * round(seconds / 0.25))

    def taken(self, stream: Iterator[Any]) -> list[bytes]:
        """What a listener that reads all gets now: the events, until it has to wait."""
        told = bytearray()
        while not isinstance(piece := next(stream), Deferred):
            told += piece
        return [block for block in bytes(told).split(b"\n\n") if b"event: state" in block]

    def test_at_most_one_event_a_second(self) -> None:
        """What changes ten times a second is sent once a second, in one event, as it is then."""
        stream = self.feed.follow("read", False)
        self.taken(stream)
        self.advance(0.25)
        self.assertEqual(len(self.taken(stream)), 1)
        events = []
        for generation in range(1, 41):
            self.publish("products", generation)
            self.advance(0.25)
            events += self.taken(stream)
        self.assertLessEqual(len(events), 40 * 0.25 / PERIOD_S + 1)
        self.assertIn(b'"generation":40', events[-1])
        stream.close()

    def test_an_event_at_least_every_15_s(self) -> None:
        """While nothing changes there is a sign of life, with the service's clock and no dataset."""
        stream = self.feed.follow("read", False)
        self.taken(stream)
        self.advance(0.25)
        self.taken(stream)
        self.assertLess(HEARTBEAT_S, 15)
        for _ in range(4):
            self.advance(15)
            event = self.taken(stream)[-1]
            self.assertTrue(event.startswith(b": "))
            self.assertIn(b'"datasets":{}', event)
            uptime_s = self.clock.seconds() - self.cache.started_at
            told_s = json.loads(event.partition(b"data: ")[2])["service"]["uptime_s"]
            self.assertLess(abs(told_s - uptime_s), HEARTBEAT_S)
        stream.close()

    def test_the_figures_of_the_capture(self) -> None:
        """They change with each transaction, which is no reason for an event; the state is, and it has the figures."""
        status = STREAMING
        self.cache.database.see_capture_by(lambda: status)
        stream = self.feed.follow("read", False)
        self.taken(stream)
        self.advance(0.25)
        self.taken(stream)
        status = replace(status, keys=1000, lag_s=0.5)
        self.advance(HEARTBEAT_S / 2)
        self.assertEqual(self.taken(stream), [])
        status = replace(status, state="lost", problem="the server ended it")
        self.advance(PERIOD_S)
        (event,) = self.taken(stream)
        capture = json.loads(event.partition(b"data: ")[2])["postgres"]["capture"]
        self.assertEqual((capture["state"], capture["keys"], capture["lag_s"]), ("lost", 1000, 0.5))
        stream.close()

    def test_all_get_the_same_bytes(self) -> None:
        """However many listen, an event is made once; and one dataset is described once a change."""
        made = []
        make = self.feed._make_event

        def counted(seen: int) -> bytes:
            made.append(seen)
            return make(seen)

        self.feed._make_event = counted  # type: ignore[method-assign]
        streams = [self.feed.follow("read", False) for _ in range(50)]
        for stream in streams:
            self.taken(stream)
        told: list[list[bytes]] = [[] for _ in streams]
        for generation in range(1, 6):
            self.publish("products", generation)
            self.advance(1)
            for events, stream in zip(told, streams, strict=True):
                events.extend(self.taken(stream))
        self.assertGreaterEqual(len(told[0]), 5)
        self.assertTrue(all(events == told[0] for events in told))
        self.assertEqual(len(made), len(told[0]))
        for stream in streams:
            stream.close()

    def test_who_is_slow_misses_nothing(self) -> None:
        """A client that does not read for a while gets what has changed meanwhile, once, in one event."""
        slow = self.feed.follow("read", False)
        quick = self.feed.follow("read", False)
        for stream in (slow, quick):
            self.taken(stream)
        self.advance(0.25)
        for stream in (slow, quick):
            self.taken(stream)
        for generation in range(1, 6):
            self.publish("products", generation)
            self.advance(1)
            self.taken(quick)
        self.publish("prices", 1)
        self.advance(1)
        self.assertIn(b'"prices"', self.taken(quick)[-1])
        (event,) = self.taken(slow)
        datasets = json.loads(event.partition(b"data: ")[2])["datasets"]
        self.assertEqual({name: told["generation"] for name, told in datasets.items()}, {"products": 5, "prices": 1})
        for stream in (slow, quick):
            stream.close()

    def test_the_state_goes_by_the_clock(self) -> None:
        """It is sent that a dataset becomes stale and expires although nothing else has changed."""
        self.publish("products", 1)
        stream = self.feed.follow("read", False)
        self.taken(stream)
        states = []
        for _ in range(200):
            self.advance(1)
            for event in self.taken(stream):
                datasets = json.loads(event.partition(b"data: ")[2])["datasets"]
                states += [datasets["products"]["state"]] if "products" in datasets else []
        self.assertEqual(states, ["fresh", "stale", "expired"])
        stream.close()

    def test_nothing_runs_while_nobody_listens(self) -> None:
        """No timer before the first listener and after the last; a later client gets what is true then."""
        self.assertEqual(self.clock.getDelayedCalls(), [])
        stream = self.feed.follow("read", False)
        self.taken(stream)
        self.advance(1)
        stream.close()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.publish("products", 7)
        stream = self.feed.follow("read", False)
        self.assertEqual(self.taken(stream), [])
        self.advance(0.25)
        (event,) = self.taken(stream)
        self.assertIn(b'"generation":7', event)
        stream.close()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class FeedInTurns(FeedRules):
    """The same laws when each dataset takes a turn of the reactor."""

    turn_s = 0.0

    def test_a_look_gives_way(self) -> None:
        """When its time is up, a look at the datasets goes on in the next turn, and sends nothing before its end."""
        self.cache.declare([declared(f"dataset_{number}") for number in range(MANY)])
        stream = self.feed.follow("read", False)
        self.taken(stream)
        turns = 0
        while not (events := self.taken(stream)):
            (call,) = self.clock.getDelayedCalls()
            self.assertEqual(call.getTime(), self.clock.seconds())
            self.clock.calls.remove(call)
            call.called = True
            call.func(*call.args, **call.kw)
            turns += 1
        self.assertGreaterEqual(turns, MANY)
        self.assertEqual(len(json.loads(events[0].partition(b"data: ")[2])["datasets"]), MANY)
        stream.close()


class Configuration(SynchronousTestCase):
    def load(self, **variables: str) -> Any:
        environ = {
            "CACHESERVICE_POSTGRES__DSN": "host=db",
            "CACHESERVICE_DATASETS__ONE__QUERY": "SELECT 1 AS id",
            "CACHESERVICE_DATASETS__ONE__KEY": "id",
        }
        return config.load(environ | variables, lambda _: None)

    def test_the_admin_token_is_a_secret(self) -> None:
        """It comes from the environment or from a file, and shows itself nowhere."""
        with tempfile.TemporaryDirectory() as folder:
            secret = Path(folder) / "token"
            secret.write_text("operate\n")
            for variables in (
                {"CACHESERVICE_HTTP__ADMIN_TOKEN": "operate"},
                {"CACHESERVICE_HTTP__ADMIN_TOKEN_FILE": str(secret)},
            ):
                settings = self.load(**variables)
                self.assertEqual(settings.http.admin_token.get_secret_value(), "operate")
                self.assertNotIn("operate", repr(settings))

    def test_it_is_not_the_token_for_reading(self) -> None:
        """One token for both would let every reader change something."""
        with self.assertRaises(ConfigError) as caught:
            self.load(CACHESERVICE_HTTP__TOKEN="swordfish", CACHESERVICE_HTTP__ADMIN_TOKEN="swordfish")
        (problem,) = [line for line in caught.exception.problems if "ADMIN_TOKEN" in line]
        self.assertIn("must differ from http.token", problem)
        self.assertNotIn("swordfish", str(caught.exception))
