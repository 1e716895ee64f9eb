"""Laws of how far a standby is behind."""

from __future__ import annotations

from dataclasses import replace

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.lag import NO_LAG, Receiver, Seen, StandbyFacts, lag_of

QUIET = Receiver("streaming", 990.0, 0.0, 500)
IDLE = StandbyFacts("reader", 100_000_000, 1000.0, 500, 500, 400.0, False, 60.0, 0.0, QUIET)


class Decided(SynchronousTestCase):
    def test_up_to_date(self) -> None:
        """An idle primary is not a lag, however long ago it committed."""
        self.assertEqual(lag_of(IDLE), NO_LAG)
        self.assertEqual(lag_of(replace(IDLE, replayed_at=501)), NO_LAG)

    def test_not_replayed(self) -> None:
        """What was received and not replayed is as old as the time since all had been, or since the last commit."""
        for behind in (
            replace(IDLE, received_at=600),
            replace(IDLE, receiver=replace(QUIET, sender_at=600)),
            replace(IDLE, received_at=600, paused=True),
            replace(IDLE, received_at=600, delay_s=3600.0),
        ):
            lag = lag_of(behind)
            self.assertEqual((lag.seconds, lag.known), (600.0, True))
            self.assertTrue(lag.problem)
            self.assertEqual(lag_of(behind, Seen(7.0, 20.0)).seconds, 7.0)
        self.assertIn("paused", lag_of(replace(IDLE, received_at=600, paused=True)).problem)
        self.assertIn("recovery_min_apply_delay", lag_of(replace(IDLE, received_at=600, delay_s=1.0)).problem)
        self.assertEqual(lag_of(replace(IDLE, received_at=600, replayed_s=999.9)).problem, "")

    def test_a_clock_that_is_ahead(self) -> None:
        """A primary whose clock is ahead does not shorten the lag."""
        behind = replace(IDLE, received_at=600, receiver=replace(QUIET, clock_ahead_s=600.0), replayed_s=1000.0)
        self.assertEqual(lag_of(behind).seconds, 600.0)

    def test_silence(self) -> None:
        """A receiver that is not answered either is not idle; the lag is the silence."""
        for silent_s, expected in ((35.0, 0.0), (36.0, 36.0), (300.0, 300.0)):
            silent = replace(IDLE, receiver=replace(QUIET, heard_s=1000.0 - silent_s))
            self.assertEqual(lag_of(silent).seconds, expected)
            self.assertEqual(lag_of(silent, Seen(1.0, 1.0)).seconds, expected)
        self.assertFalse(lag_of(replace(IDLE, receiver_timeout_s=0.0)).known)

    def test_no_receiver(self) -> None:
        """Without one, the last proof counts: the last message, or the last commit that was replayed."""
        alone = replace(IDLE, receiver=None)
        self.assertEqual((lag_of(alone).seconds, lag_of(alone).known), (600.0, False))
        self.assertEqual(lag_of(alone, Seen(7.0, 20.0)).seconds, 20.0)
        self.assertEqual(lag_of(replace(alone, replayed_s=None)).seconds, 900.0)
        for status in ("starting", "waiting"):
            self.assertEqual(lag_of(replace(IDLE, receiver=replace(QUIET, status=status))).seconds, 600.0)

    def test_hidden(self) -> None:
        """A role that may not see the receiver cannot distinguish idleness from silence; the GRANT is named."""
        lag = lag_of(replace(IDLE, receiver=Receiver(None, None, 0.0, None)))
        self.assertEqual((lag.seconds, lag.known), (600.0, False))
        self.assertIn("GRANT pg_read_all_stats TO reader", lag.problem)
