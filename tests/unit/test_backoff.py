"""Laws of the wait before another try."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.backoff import full_jitter

first_waits = st.floats(0.001, 100)
shares = st.floats(0, 1)


class FullJitter(SynchronousTestCase):
    @settings(deadline=None)
    @given(first_waits, st.floats(0, 1000), st.integers(0, 10_000), shares)
    def test_bounds(self, initial_s: float, more_s: float, failures: int, share: float) -> None:
        """A wait lies anywhere between 0 and initial_s x 2^failures, and never past the maximum."""
        most_s = initial_s + more_s
        wait_s = full_jitter(initial_s, most_s, lambda: share)(failures)
        bound_s = min(most_s, initial_s * 2 ** min(failures, 100))
        self.assertGreaterEqual(wait_s, 0)
        self.assertLessEqual(wait_s, bound_s)
        self.assertAlmostEqual(wait_s, bound_s * share)

    def test_the_whole_range_is_used(self) -> None:
        """No jitter is added to the bound: the largest draw yields the bound itself and the smallest 0."""
        self.assertEqual([full_jitter(1, 60, lambda: 1.0)(n) for n in range(8)], [1, 2, 4, 8, 16, 32, 60, 60])
        self.assertEqual([full_jitter(1, 60, lambda: 0.0)(n) for n in range(8)], [0] * 8)

    def test_every_wait_is_drawn_anew(self) -> None:
        """Each wait takes a draw of its own, so that clients that failed together do not return together."""
        draws = iter([0.25, 0.75])
        wait_s = full_jitter(1, 60, lambda: next(draws))
        self.assertEqual([wait_s(3), wait_s(3)], [2.0, 6.0])
