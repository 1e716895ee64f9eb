"""Laws of freeing what nobody reads any more."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.rows import RowsBuilder, Shards
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

    def shards(self, count: int, rows: int = 1) -> Shards:
        return [{b"%d" % number: b"{}" for number in range(rows)} for _ in range(count)]

    def freed_by_turn(self, *dropped: Shards) -> list[int]:
        """How many rows each turn freed, until none was left."""
        freed, left = [], sum(map(rows_in, dropped))
        while not self.reactor.idle:
            self.reactor.turn()
            freed.append(left - sum(map(rows_in, dropped)))
            left -= freed[-1]
        self.assertEqual(left, 0)
        return freed

    def test_little_a_turn(self) -> None:
        """No turn of the reactor frees more than one shard of ordinary size, and in the end none is left."""
        shards = self.shards(256, 4000)
        self.drain.add(shards)
        self.assertLessEqual(max(self.freed_by_turn(shards)), 4000)
        self.assertEqual(shards, [])

    def test_the_last_ones_row_by_row(self) -> None:
        """The last shards are freed some rows a turn, all of them alike: they give the memory back little by little."""
        shards = self.shards(16, 1000)
        self.drain.add(shards)
        self.reactor.turn()
        self.assertEqual({len(shard) for shard in shards}, {1000 - 16})
        self.assertLessEqual(max(self.freed_by_turn(shards)), 256)

    def test_large_shards(self) -> None:
        """A shard of many rows is not freed at once."""
        shards = self.shards(18, 20_000)
        self.drain.add(shards)
        self.assertLessEqual(max(self.freed_by_turn(shards)), 5000)

    def test_several_generations_share_the_turns(self) -> None:
        """Dropped generations are freed together, and no turn frees more for it."""
        one, other = self.shards(20, 10), self.shards(20, 10)
        self.drain.add(one)
        self.drain.add(other)
        self.assertLessEqual(max(self.freed_by_turn(one, other)), 256)
        self.assertEqual((one, other), ([], []))

    def test_a_dropped_snapshot_is_drained(self) -> None:
        """Rows whose last reference goes are freed over many turns."""
        builder = RowsBuilder(self.drain.add)
        builder.add([(b"%d" % number, b"{}") for number in range(100_000)])
        rows = builder.finish()
        self.assertTrue(self.reactor.idle)
        del rows
        turns = 0
        while not self.reactor.idle:
            self.reactor.turn()
            turns += 1
        self.assertGreater(turns, 20)

    def test_what_is_shared_stays(self) -> None:
        """Of shards that somebody else holds nothing is freed, whether they are many or few."""
        for shared in (256, 128, 3, 0):
            shards = self.shards(256, 100)
            kept = shards[:shared]
            self.drain.add(shards)
            while not self.reactor.idle:
                self.reactor.turn()
            self.assertEqual((shards, rows_in(kept)), ([], shared * 100))

    def test_stop(self) -> None:
        """After stop nothing is scheduled, whether rows are still being freed or come only now."""
        shards = self.shards(16, 100)
        self.drain.add(shards)
        self.reactor.turn()
        self.drain.stop()
        self.assertEqual((self.reactor.idle, rows_in(shards)), (True, 16 * 100 - 256))
        self.drain.add(self.shards(5))
        self.assertTrue(self.reactor.idle)


def rows_in(shards: Shards) -> int:
    return sum(map(len, shards))
