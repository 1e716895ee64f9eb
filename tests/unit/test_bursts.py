"""Laws of bursts of notifications: when an attempt may begin."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.refresh.bursts import Bursts
from tests.kit.clocks import started_clock

BURST = 100
"""So many notifications in a row are a burst."""


class Ends(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = started_clock()
        self.began_at = self.clock.seconds()
        self.ended_at: list[float] = []
        self.bursts = Bursts(self.clock, lambda: self.ended_at.append(self.clock.seconds() - self.began_at))
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))

    def hear(self, count: int) -> None:
        """So many notifications arrive in one turn."""
        for _ in range(count):
            self.bursts.heard()

    def assert_ended(self, *at_s: float) -> None:
        self.assertEqual([round(each, 6) for each in self.ended_at], list(at_s))

    def test_a_few(self) -> None:
        """Those of one turn end with it, together; the next turn's are on their own."""
        for count, ended in ((1, 1), (BURST - 1, 2)):
            self.hear(count)
            self.assertEqual(len(self.ended_at), ended - 1)
            self.clock.advance(0)
            self.assertEqual(len(self.ended_at), ended)
        self.clock.advance(1)
        self.assertEqual(len(self.ended_at), 2)

    def test_a_burst(self) -> None:
        """A burst ends with the first pause of 5 ms in which nothing arrives."""
        self.hear(BURST)
        self.clock.advance(0)
        self.assert_ended()
        for _ in range(3):
            self.hear(1)
            self.clock.advance(0.005)
        self.assert_ended()
        self.clock.advance(0.005)
        self.assert_ended(0.02)

    def test_without_end(self) -> None:
        """A burst that has no pause ends after a tenth of a second all the same, and the next one begins."""
        for _ in range(21):
            self.hear(BURST)
            self.clock.advance(0.005)
        self.assertEqual(len(self.ended_at), 1)
        self.assertAlmostEqual(self.ended_at[0], 0.105)
        self.hear(1)
        self.clock.advance(0)
        self.assertEqual(len(self.ended_at), 2)

    def test_stop(self) -> None:
        """Nothing follows a stop, wherever it comes; a stop before the first notification does no harm."""
        self.bursts.stop()
        for count in (1, BURST):
            self.hear(count)
            if count == BURST:
                self.clock.advance(0)
            self.bursts.stop()
            self.clock.advance(1)
            self.assert_ended()
