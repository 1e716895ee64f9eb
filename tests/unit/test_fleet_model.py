"""Laws of the model of a fleet, with few processes."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from benchmarks.fleet_model import DATABASE_DOWN_S, VALKEY_DOWN_S, peak, run

PROCESSES = 20


class Model(SynchronousTestCase):
    def test_a_seed_decides_everything(self) -> None:
        """The same seed has the same result, another seed another."""
        first = run(PROCESSES, 1, has_jitter=True)
        self.assertEqual(run(PROCESSES, 1, has_jitter=True), first)
        self.assertNotEqual(run(PROCESSES, 2, has_jitter=True), first)

    def test_jitter_and_backoff_spread_the_load(self) -> None:
        """Once outages last, both servers get at most half of the attempts to connect, in each second."""
        real, plain = (run(PROCESSES, 1, has_jitter=has_jitter) for has_jitter in (True, False))
        for name, (begin, end) in {
            "PostgreSQL: connections": DATABASE_DOWN_S,
            "Valkey: connections": VALKEY_DOWN_S,
        }.items():
            self.assertLessEqual(peak(real[name], begin + 20, end), peak(plain[name], begin + 20, end) / 2, name)
