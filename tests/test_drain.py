"""Laws of freeing what nobody reads any more."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.rows import SHARD_COUNT, RowsBuilder, Shards
from cacheservice.refresh.drain import Drain


class Turns:
    """A clock for which a turn is a second, so that callLater(0) is for the next one, as it is for a reactor.

    Clock alone runs in the same advance what was called later in it.
    """

    def __init__(self) -> None:
        self.clock = Clock()

    def callLater(self, delay_s: float, call: Callable[[], object]) -> IDelayedCall:
        return self.clock.callLater(delay_s + 1, call)

    def turn(self) -> None:
        self.clock.advance(1)

    @property
    def idle(self) -> bool:
        return not self.clock.getDelayedCalls()


class Draining(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor = Turns()
        self.drain = Drain(self.reactor)
        self.addCleanup(lambda: self.assertTrue(self.reactor.idle))

    def shards(self, count: int) -> Shards:
        return [{b"%d" % number: b"{}"} for number in range(count)]

    def test_one_shard_a_turn(self) -> None:
        """No turn of the reactor frees more than one shard, and in the end none is left."""
        shards = self.shards(5)
        self.drain.add(shards)
        for left in (4, 3, 2, 1, 0):
            self.reactor.turn()
            self.assertEqual(len(shards), left)
        self.reactor.turn()

    def test_several_generations_share_the_turns(self) -> None:
        """Dropped generations are freed together, still one shard a turn."""
        one, other = self.shards(3), self.shards(3)
        self.drain.add(one)
        self.drain.add(other)
        left = [6]
        while not self.reactor.idle:
            self.reactor.turn()
            left.append(len(one) + len(other))
        self.assertEqual(left[:7], [6, 5, 4, 3, 2, 1, 0])
        self.assertEqual((one, other), ([], []))

    def test_a_dropped_snapshot_is_drained(self) -> None:
        """Rows whose last reference goes are freed over as many turns as they have shards."""
        builder = RowsBuilder(self.drain.add)
        builder.add([(b"%d" % number, b"{}") for number in range(1000)])
        rows = builder.finish()
        self.assertTrue(self.reactor.idle)
        del rows
        turns = 0
        while not self.reactor.idle:
            self.reactor.turn()
            turns += 1
        self.assertGreaterEqual(turns, SHARD_COUNT)

    def test_stop(self) -> None:
        """After stop nothing is scheduled, whether rows are still being freed or come only now."""
        shards = self.shards(5)
        self.drain.add(shards)
        self.reactor.turn()
        self.drain.stop()
        self.assertEqual((self.reactor.idle, len(shards)), (True, 4))
        self.drain.add(self.shards(5))
        self.assertTrue(self.reactor.idle)
