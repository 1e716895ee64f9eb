"""Laws of freeing what nobody reads any more."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.drain import Drain
from cacheservice.cache.rows import Groups
from tests.kit.datasets import rows_of


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


class Row(bytes):
    """A document that is counted as long as it lives."""

    alive = 0

    def __init__(self, _: bytes) -> None:
        type(self).alive += 1

    def __del__(self) -> None:
        type(self).alive -= 1


class Draining(SynchronousTestCase):
    def setUp(self) -> None:
        Row.alive = 0
        self.reactor = Turns()
        self.drain = Drain(self.reactor)
        self.addCleanup(lambda: self.assertTrue(self.reactor.idle))

    def groups(self, count: int, rows: int = 1, size: int = 1) -> Groups:
        """`count` shards of so many rows, in groups of `size`."""
        shards = [{b"%d" % number: Row(b"{}") for number in range(rows)} for _ in range(count)]
        return [shards[first : first + size] for first in range(0, count, size)]

    def freed_by_turn(self) -> list[int]:
        """How many rows each turn freed, until nothing was left to do."""
        freed, left = [], Row.alive
        while not self.reactor.idle:
            self.reactor.turn()
            freed.append(left - Row.alive)
            left -= freed[-1]
        return freed

    def test_little_a_turn(self) -> None:
        """No turn of the reactor frees more than one shard of ordinary size, and in the end none is left."""
        for size in (256, 32):
            self.drain.add(self.groups(256, 4000, size))
            self.assertLessEqual(max(self.freed_by_turn()), 4000)
            self.assertEqual(Row.alive, 0)

    def test_not_in_this_turn(self) -> None:
        """The code that drops rows does not wait, and may read its own references to the end of the turn."""
        groups = self.groups(1, 10)
        self.drain.add(groups)
        self.assertEqual(len(groups[0][0]), 10)
        del groups
        self.freed_by_turn()

    def test_the_last_ones(self) -> None:
        """The last shards are freed some rows a turn, all of them alike: they return the memory little by little."""
        self.drain.add(self.groups(16, 1000, 16))
        self.reactor.turn()
        self.assertEqual(Row.alive, 16_000)  # the first turn belongs to the replies
        self.reactor.turn()
        self.assertEqual(Row.alive, 16 * (1000 - 16))
        self.assertLessEqual(max(self.freed_by_turn()), 256)

    def test_small_shards(self) -> None:
        """A turn frees many small shards, and fewer rows than a large one may have."""
        self.drain.add(self.groups(4096, 30, 32))
        freed = self.freed_by_turn()
        self.assertLessEqual(max(freed), 2500)
        self.assertGreater(max(freed), 2000)

    def test_the_last_ones_of_many(self) -> None:
        """Of many shards the same share is freed some rows a turn, and each turn frees something."""
        for count, size in ((4096, 4096), (16_384, 32)):
            self.drain.add(self.groups(count, 10, size))
            freed = self.freed_by_turn()
            little_by_little = [rows for rows in freed if rows <= 256]
            self.assertGreaterEqual(sum(little_by_little), count // 16 * 10)
            self.assertLessEqual(len(freed), 2 * count)
            self.assertEqual(Row.alive, 0)

    def test_large_shards(self) -> None:
        """A shard of many rows is not freed at once."""
        self.drain.add(self.groups(18, 20_000, 18))
        self.assertLessEqual(max(self.freed_by_turn()), 5000)
        self.assertEqual(Row.alive, 0)

    def test_several_generations_share_the_turns(self) -> None:
        """Dropped generations are freed together, and no turn frees more for it."""
        self.drain.add(self.groups(20, 10))
        self.drain.add(self.groups(20, 10))
        self.assertLessEqual(max(self.freed_by_turn()), 256)
        self.assertEqual(Row.alive, 0)

    def test_a_dropped_snapshot_is_drained(self) -> None:
        """Rows whose last reference goes are freed over many turns."""
        rows = rows_of(((b"%d" % number, b"{}") for number in range(100_000)), self.drain.add)
        self.assertTrue(self.reactor.idle)
        del rows
        turns = 0
        while not self.reactor.idle:
            self.reactor.turn()
            turns += 1
        self.assertGreater(turns, 20)

    def test_what_is_shared_stays(self) -> None:
        """Of shards and groups that somebody else holds nothing is freed, whether they are many or few."""
        for shared in (256, 128, 3, 0):
            groups = self.groups(256, 100, 256)
            kept = groups[0][:shared]
            self.drain.add(groups)
            self.freed_by_turn()
            self.assertEqual((groups, sum(map(len, kept)), Row.alive), ([], shared * 100, shared * 100))
            del kept
        for shared in (8, 4, 1, 0):
            groups = self.groups(256, 100, 32)
            whole = groups[:shared]
            self.drain.add(groups)
            self.freed_by_turn()
            self.assertEqual((groups, Row.alive), ([], shared * 3200))
            del whole

    def test_stop(self) -> None:
        """After stop nothing is scheduled, whether rows are still being freed or come only now."""
        self.drain.add(self.groups(16, 100, 16))
        self.reactor.turn()
        self.drain.stop()
        self.assertTrue(self.reactor.idle)
        self.drain.add(self.groups(5))
        self.assertTrue(self.reactor.idle)
