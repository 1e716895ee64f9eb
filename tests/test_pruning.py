"""Laws of pruning and of deltas that are off: both go on, and both can be seen."""

from __future__ import annotations

from dataclasses import replace

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.describe import describe
from cacheservice.cache.identity import ServerIdentity
from cacheservice.cache.lag import NO_LAG
from cacheservice.config import OWN_CHANNEL
from cacheservice.errors import QueryFailed
from cacheservice.ports.report import why
from cacheservice.postgres.database import Pruned, Reading
from tests.test_refresher import AS_OF, World

WATCH = [{"table": "products", "key": "id"}]
OFF = "products or a partition of it lacks a trigger of ours"


class Pruning(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = World(watch=WATCH)
        self.answers: list[Pruned | Exception] = []
        self.asked_at: list[float] = []

        def prune(keep_s: float) -> Deferred[Pruned]:
            self.assertEqual(keep_s, 3600.0)
            self.asked_at.append(self.world.now_s)
            answer = self.answers.pop(0)
            return fail(answer) if isinstance(answer, Exception) else succeed(answer)

        self.world.database.pruning = prune
        self.world.service.startService()
        self.addCleanup(self.world.service.stopService)

    def why(self) -> str:
        return why(self.world.dataset, self.world.cache)

    def test_until_it_is_done(self) -> None:
        """While a call deletes as many as it may, another follows, and then the next minute's."""
        self.answers = [Pruned(10_000, 25_000), Pruned(10_000, 15_000), Pruned(4_000, 1_000), Pruned(0, 1_000)]
        self.world.clock.advance(60)
        self.assertEqual(self.asked_at, [60, 60, 60])
        self.assertEqual(describe(self.world.cache)["postgres"]["recorded_changes"], 1_000)
        self.world.clock.advance(60)
        self.assertEqual(self.asked_at, [60, 60, 60, 120])

    def test_a_failure(self) -> None:
        """It is logged once as a warning, `why` and the facts say so, and the next success ends it."""
        self.answers = [QueryFailed("permission denied for function prune")] * 2 + [Pruned(0, 7)]
        self.world.clock.advance(60)
        self.world.clock.advance(60)
        told = [level for level, event, _ in self.world.log.lines if event == "changes_not_pruned"]
        self.assertEqual(told, ["warning", "debug"])
        self.assertIn("are not deleted, so that the database fills with them: permission denied", self.why())
        self.assertIn("permission denied", describe(self.world.cache)["postgres"]["prune_problem"])
        self.world.clock.advance(60)
        self.assertNotIn("not deleted", self.why())
        self.assertIsNone(describe(self.world.cache)["postgres"]["prune_problem"])

    def test_a_standby(self) -> None:
        """It is not asked, and the statement for cron on the primary is named."""
        self.world.cache.database.seen(ServerIdentity("shop", 5, "reader", in_recovery=True, started_us=1), NO_LAG)
        self.world.clock.advance(60)
        self.assertEqual(self.asked_at, [])
        self.assertIn("cron on the primary say SELECT cacheservice.prune('1 hour')", self.why())


class DeltasOff(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = World(watch=WATCH, interval_s=1000.0)
        self.world.service.startService()
        self.addCleanup(self.world.service.stopService)
        self.complete()

    def complete(self, no_delta: str | None = None) -> None:
        """The read that runs ends after two seconds, with all rows."""
        self.world.clock.advance(2)
        read = self.world.database.last
        read.into.add([(b"1", b"{}")])
        reading = Reading(AS_OF, read.began_at, "1:1:", rows=read.into, watch_state='{"kept": "", "tables": {}}')
        read.result.callback(replace(reading, no_delta=no_delta, because=no_delta))

    def notify(self) -> None:
        self.world.service.heard(OWN_CHANNEL, "changed 7")
        self.world.clock.advance(0)

    def test_since_when(self) -> None:
        """The time counts from the first read that could not be a delta, whatever the reason, until one could."""
        dataset = self.world.dataset
        self.assertEqual(dataset.whole_for_s(), 0.0)
        self.assertIsNone(World().dataset.whole_for_s())
        for reason in (OFF, "another"):
            self.world.service.refresh_now("products")
            self.complete(reason)
        self.world.clock.advance(5)
        self.assertEqual(dataset.whole_for_s(), 7.0)
        self.assertIn(
            "It wants deltas, and has read all rows for 7.00 s, because another.", why(dataset, self.world.cache)
        )
        self.world.cache.database.listening_wanted = self.world.cache.database.listening = True
        self.world.cache.database.listening_proven_at = self.world.clock.seconds()
        self.assertNotIn("at once", why(dataset, self.world.cache))
        self.world.service.refresh_now("products")
        self.complete()
        self.assertEqual(dataset.whole_for_s(), 0.0)
        self.assertIn("at once", why(dataset, self.world.cache))

    def test_notifications_start_refreshes(self) -> None:
        """Also of a watch that the state does not describe; each after a pause of four times the last read."""
        self.world.service.refresh_now("products")
        self.complete(OFF)
        self.world.clock.advance(1)
        self.notify()
        self.complete(OFF)
        self.notify()
        reads = len(self.world.database.reads)
        self.world.clock.advance(7.9)
        self.notify()
        self.assertEqual(len(self.world.database.reads), reads)
        self.world.clock.advance(0.2)
        self.assertEqual(len(self.world.database.reads), reads + 1)
        self.complete(OFF)
