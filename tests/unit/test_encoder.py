"""How often the publishes of a cache are encoded."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.clock import Host
from cacheservice.cache.delta import NO_CHANGE, Delta
from cacheservice.replication.codec import Decoder, Head
from cacheservice.replication.encoder import Encoder
from cacheservice.replication.outbox import Update
from cacheservice.sources.frames.clocks import Clocks
from tests.kit.datasets import declared, numbered_rows, snapshot_of

SETTINGS = declared("products")


def delta_of(rows: int) -> Delta:
    return Delta({b"%d" % key: b"$1\r\n1\r\n" for key in range(rows)}, frozenset())


class Encoding(SynchronousTestCase):
    def setUp(self) -> None:
        clock = Clock()
        self.encoder = Encoder(Clocks(clock, clock.seconds, Host("boot", "machine"), clock.seconds))
        self.snapshot = snapshot_of(numbered_rows(5), 2)

    def head(self, update: Update) -> Head:
        (head, *_) = Decoder("a test").feed(b"".join(self.encoder.frames(SETTINGS, self.snapshot, update)))
        assert isinstance(head, Head)
        return head

    def test_once_for_all(self) -> None:
        """All receivers of a small delta are sent the same bytes; a large one is encoded piece by piece."""
        for rows, is_shared in ((512, True), (513, False)):
            update = Update(1, delta_of(rows), 2)
            first, second = (self.encoder.frames(SETTINGS, self.snapshot, update) for _ in range(2))
            self.assertEqual(first is second, is_shared)
            self.assertEqual(b"".join(first), b"".join(second))

    def test_no_other_update(self) -> None:
        """Another generation, base, delta or renewal has frames of its own."""
        update = Update(1, delta_of(3), 2)
        self.assertEqual((self.head(update).base, self.head(update).put), (1, 3))
        self.assertEqual(self.head(replace(update, base=0)).base, 0)
        self.assertEqual(self.head(replace(update, delta=delta_of(2))).put, 2)
        self.assertEqual(self.head(Update(0, None, 2)).put, 5)
        renewal = Update(2, NO_CHANGE, 2)
        self.assertEqual(self.head(renewal).header.database_snapshot, "1:1:")
        self.snapshot = replace(self.snapshot, database_snapshot="2:2:")
        self.assertEqual(self.head(renewal).header.database_snapshot, "2:2:")

    def test_a_snapshot_is_not_kept(self) -> None:
        """What is not served any more is freed."""
        self.encoder.frames(SETTINGS, self.snapshot, Update(1, delta_of(3), 2))
        served = weakref.ref(self.snapshot)
        self.snapshot = snapshot_of(numbered_rows(1), 3)
        gc.collect()
        self.assertIsNone(served())
