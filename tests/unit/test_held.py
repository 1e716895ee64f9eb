"""Laws of the snapshots that slow readers hold."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.cache import Cache
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.ports.held import HeldSnapshots
from tests.kit.datasets import MOMENT, rows_of
from tests.kit.logs import Log


class Reader:
    def __init__(self) -> None:
        self.dropped = False

    def drop_slow(self) -> str:
        self.dropped = True
        return "192.0.2.1:1"


class Rules(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.log = Clock(), Log()
        self.cache = Cache(
            [DatasetSettings(name=name, query="SELECT 1", key=("id",)) for name in ("a", "b")], self.clock.seconds
        )
        self.held = HeldSnapshots(self.cache, self.clock, self.log, 2, 60.0)

    def publish(self, name: str) -> None:
        dataset = self.cache.dataset(name)
        rows = rows_of({})
        dataset.publish(Snapshot(dataset.last_generation + 1, rows, MOMENT, self.clock.seconds(), "1:1:"))

    def reading(self, *names: str) -> Reader:
        reader = Reader()
        datasets = [self.cache.dataset(name) for name in names]
        self.held.begin(reader, {each.name: each.snapshot for each in datasets if each.snapshot})
        return reader

    def test_generations(self) -> None:
        """Of each dataset so many superseded generations are kept; all readers of an older one are ended."""
        self.publish("b")
        other = self.reading("b")
        readers = []
        for _ in range(5):
            self.publish("a")
            readers.append([self.reading("a"), self.reading("a")])
        self.assertEqual([reader.dropped for each in readers for reader in each], [True] * 4 + [False] * 6)
        self.assertEqual(sorted(self.held.superseded()), [("a", 3), ("a", 4)])
        self.assertFalse(other.dropped)
        self.assertEqual(set(self.log.names()), {"slow_reader_ended"})
        self.assertIn("2 newer generations of a are being read", self.log.events[0][1]["reason"])

    def test_time(self) -> None:
        """An answer has its time once its generation is superseded, from its own beginning; never before."""
        self.publish("a")
        first, whole = self.reading("a"), self.reading("a", "b")
        self.clock.advance(50)
        self.publish("a")
        self.clock.advance(9)
        self.assertFalse(first.dropped)
        self.clock.advance(2)
        self.assertTrue(first.dropped and whole.dropped)
        self.assertEqual(self.held.superseded(), {})
        served = self.reading("a")
        self.clock.advance(1000)
        self.assertFalse(served.dropped)

    def test_an_answer_that_ends(self) -> None:
        """It leaves nothing, no timer either."""
        self.publish("a")
        snapshot = self.cache.dataset("a").snapshot
        assert snapshot is not None
        hold = self.held.begin(Reader(), {"a": snapshot})
        self.publish("a")
        self.held.end(hold)
        self.held.end(hold)
        self.assertEqual((self.held.superseded(), self.clock.getDelayedCalls()), ({}, []))
