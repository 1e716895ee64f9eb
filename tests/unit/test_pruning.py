"""Laws of when recorded changes are pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import QueryFailed
from cacheservice.cache.fleet_status import FleetStatus
from cacheservice.cache.identity import ServerIdentity
from cacheservice.cache.lag import NO_LAG, Lag
from cacheservice.config import OWN_CHANNEL
from cacheservice.sources.base import AllRows
from cacheservice.sources.postgres.pruning import Pruning
from cacheservice.sources.postgres.recorded import Pruned, Recorded
from tests.kit.refreshes import World
from tests.kit.views import database_object, why

WATCH = [{"table": "products", "key": "id"}]
OFF = "products or a partition of it lacks a trigger of ours"


class FakeChanges:
    """The recorded changes of a database."""

    def __init__(self, prune: Callable[[float], Deferred[Pruned]]) -> None:
        self._prune = prune
        self.kept = Recorded(in_recovery=False, kept=None, may_ask=False)

    def prune(self, keep_s: float, timeout_s: float) -> Deferred[Pruned]:
        return self._prune(keep_s)

    def recorded(self, timeout_s: float) -> Deferred[Recorded]:
        return succeed(self.kept)


class Prunes(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = World(watch=WATCH)
        self.answers: list[int | Exception] = []
        self.asked_at: list[float] = []

        def prune(keep_s: float) -> Deferred[Pruned]:
            self.assertEqual(keep_s, 3600.0)
            self.asked_at.append(self.world.now_s)
            answer = self.answers.pop(0) if self.answers else 0
            return fail(answer) if isinstance(answer, Exception) else succeed(Pruned(answer, answer < 10_000))

        self.changes = FakeChanges(prune)
        pruning = Pruning(self.world.cache, self.changes, self.world.clock, self.world.log)
        pruning.startService()
        self.addCleanup(pruning.stopService)

    def keep(self, oldest_s: float | None, in_the_way: str | None = None, *, in_recovery: bool = False) -> None:
        """The database keeps 1,000 recorded changes, the oldest of that age, and a minute passes."""
        self.changes.kept = Recorded(in_recovery, 1_000, True, oldest_s, in_the_way)
        self.world.clock.advance(60)

    def why(self) -> str:
        return why(self.world.dataset, self.world.cache)

    def facts(self) -> dict[str, Any]:
        return database_object(self.world.cache)

    def logged(self) -> list[str]:
        """The levels of the log's lines about changes that are not deleted."""
        return [level for level, event, _ in self.world.log.lines if event == "changes_not_pruned"]

    def test_of_another_process(self) -> None:
        """In a fleet only the process that refreshes a watched dataset deletes its changes."""
        self.world.dataset.note_fleet(FleetStatus("replica", "second"))
        self.keep(None)
        self.assertEqual(self.asked_at, [])
        self.world.dataset.note_fleet(FleetStatus("leader", "second"))
        self.keep(None)
        self.assertEqual(self.asked_at, [120])

    def test_until_it_is_done(self) -> None:
        """While a call deletes as many as it may, another follows, and then the next minute's."""
        self.answers = [10_000, 10_000, 4_000]
        self.keep(None)
        self.assertEqual(self.asked_at, [60, 60, 60])
        self.assertEqual(self.facts()["recorded_changes"], 1_000)
        self.assertEqual(self.facts()["oldest_recorded_change_s"], 0.0)
        self.world.clock.advance(60)
        self.assertEqual(self.asked_at, [60, 60, 60, 120])

    def test_a_failure(self) -> None:
        """It is logged once as a warning, `why` and the facts have it, and the next success ends it."""
        self.keep(10.0)
        self.answers = [QueryFailed("permission denied for function prune")] * 2
        self.keep(10.0)
        self.assertIsNone(self.facts()["oldest_recorded_change_s"])
        self.keep(10.0)
        self.assertEqual(self.logged(), ["warning", "debug"])
        self.assertIn("are not deleted and pile up in the database: permission denied", self.why())
        self.assertIn("permission denied", self.facts()["prune_problem"])
        self.keep(10.0)
        self.assertNotIn("not deleted", self.why())
        self.assertIsNone(self.facts()["prune_problem"])
        self.assertEqual(self.facts()["oldest_recorded_change_s"], 10.0)

    def test_a_transaction_in_the_way(self) -> None:
        """It is reported once changes are kept for ten minutes longer than an hour, until they are not."""
        self.keep(4_200.0, "session 7 of shop")
        self.assertEqual((self.logged(), self.facts()["prune_problem"]), ([], None))
        self.keep(4_201.0, "session 7 of shop")
        self.keep(4_261.0, "session 7 of shop")
        self.assertEqual(self.logged(), ["warning", "debug"])
        self.assertIn("pile up in the database: session 7 of shop.", self.why())
        self.keep(4_321.0)
        self.assertIn("has not caught up", self.why())
        self.keep(3_600.0)
        self.assertIsNone(self.facts()["prune_problem"])

    def test_a_standby(self) -> None:
        """Nothing is deleted there; while the primary deletes, nothing is reported, however late the standby is.

        Otherwise the statement for cron on the primary is named.
        """
        standby = ServerIdentity("shop", 5, "reader", in_recovery=True, started_us=1)
        self.world.cache.database.seen(standby, NO_LAG)
        self.keep(3_660.0, in_recovery=True)
        self.assertEqual(self.facts()["prune_problem"], None)
        self.assertEqual(self.facts()["recorded_changes"], 1_000)
        self.keep(4_300.0, in_recovery=True)
        self.assertIn("cron on the primary run SELECT cacheservice.prune('1 hour')", self.why())
        self.world.cache.database.seen(standby, Lag(600.0))
        self.keep(4_300.0, in_recovery=True)
        self.assertIsNone(self.facts()["prune_problem"])
        self.changes.kept = Recorded(in_recovery=True, kept=None, may_ask=False)
        self.world.clock.advance(60)
        self.assertIn("cacheservice migrate --reader", self.why())
        self.assertIsNone(self.facts()["oldest_recorded_change_s"])
        self.assertEqual(self.asked_at, [])


class Stop(SynchronousTestCase):
    """The loop of the pruning, and its end."""

    def setUp(self) -> None:
        self.world = World(watch=WATCH)
        self.calls: list[Deferred[Pruned]] = []
        changes = FakeChanges(self.prune)
        self.pruning = Pruning(self.world.cache, changes, self.world.clock, self.world.log)

    def prune(self, keep_s: float) -> Deferred[Pruned]:
        self.calls.append(self.answer())
        return self.calls[-1]

    def answer(self) -> Deferred[Pruned]:
        return Deferred()

    def assert_stopped(self) -> None:
        """Nothing is left, and nothing follows."""
        calls = len(self.calls)
        self.assertEqual(self.world.clock.getDelayedCalls(), [])
        self.world.clock.advance(600)
        self.assertEqual(len(self.calls), calls)

    def test_never_started(self) -> None:
        """Stop before start is done at once."""
        self.successResultOf(self.pruning.stopService())

    def test_between_two_calls(self) -> None:
        """Stop between two calls is done at once; the service can be started again."""
        for _ in range(2):
            self.pruning.startService()
            self.world.clock.advance(1)
            self.successResultOf(self.pruning.stopService())
            self.assert_stopped()

    def test_while_a_call_runs(self) -> None:
        """Stop cancels a running call, fires once the call has ended, and logs nothing."""
        ended: Deferred[Pruned] = Deferred()
        self.answer = lambda: Deferred(lambda _: None).addErrback(lambda _: ended)  # type: ignore[method-assign]
        self.pruning.startService()
        self.world.clock.advance(60)
        stopped = self.pruning.stopService()
        self.assertNoResult(stopped)
        ended.errback(QueryFailed("the session was closed"))
        self.successResultOf(stopped)
        self.assert_stopped()
        self.assertEqual(self.world.log.names("internal_error"), [])

    def test_a_bug(self) -> None:
        """A bug is logged with its traceback, and the loop continues."""
        self.answer = lambda: fail(ZeroDivisionError("a bug"))  # type: ignore[method-assign]
        self.pruning.startService()
        self.world.clock.advance(60)
        self.world.clock.advance(60)
        self.assertEqual(len(self.calls), 2)
        errors = [fields for _, event, fields in self.world.log.lines if event == "internal_error"]
        self.assertEqual([fields["error"] for fields in errors], ["a bug", "a bug"])
        self.assertIn("ZeroDivisionError", errors[0]["traceback"])
        self.successResultOf(self.pruning.stopService())
        self.assert_stopped()


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
        state = '{"kept": "", "tables": {}}'
        result = AllRows(moment=read.moment, rows=read.into, watch_state=state, no_delta=no_delta, because=no_delta)
        read.result.callback(result)

    def notify(self) -> None:
        self.world.heard(OWN_CHANNEL, "changed 7")
        self.world.clock.advance(0)

    def test_since_when(self) -> None:
        """The time counts from the first read that could not be a delta, whatever the reason, until one could."""
        dataset = self.world.dataset
        self.assertEqual(dataset.without_deltas_s(), 0.0)
        self.assertIsNone(World().dataset.without_deltas_s())
        for reason in (OFF, "another"):
            self.world.service.refresh_now("products")
            self.complete(reason)
        self.world.clock.advance(5)
        self.assertEqual(dataset.without_deltas_s(), 7.0)
        self.assertIn(
            "Deltas do not work: all rows have been read for 7.00 s, because another.", why(dataset, self.world.cache)
        )
        self.world.cache.database.listening_wanted = self.world.cache.database.listening = True
        self.world.cache.database.listening_proven_at = self.world.clock.seconds()
        self.assertNotIn("arrive as notifications", why(dataset, self.world.cache))
        self.world.service.refresh_now("products")
        self.complete()
        self.assertEqual(dataset.without_deltas_s(), 0.0)
        self.assertIn("arrive as notifications", why(dataset, self.world.cache))

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
