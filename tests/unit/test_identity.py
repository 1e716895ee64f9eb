"""Laws of when two servers are the same one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.identity import ServerIdentity, is_visible, why_another
from tests.kit.postgres import PRIMARY

STANDBY = replace(PRIMARY, in_recovery=True)


class Compared(SynchronousTestCase):
    def test_the_same(self) -> None:
        """One life of one server, even where a part could be read only once."""
        self.assertIsNone(why_another(PRIMARY, PRIMARY))
        for part in ("system_identifier", "timeline", "counted_since_us"):
            self.assertIsNone(why_another(replace(PRIMARY, **{part: None}), PRIMARY))
            self.assertIsNone(why_another(PRIMARY, replace(PRIMARY, **{part: None})))

    def test_another(self) -> None:
        """Each part that differs is a reason of its own."""
        others: list[tuple[ServerIdentity, ServerIdentity | None]] = [
            (PRIMARY, replace(PRIMARY, system_identifier="1")),
            (PRIMARY, replace(PRIMARY, database_oid=16385)),
            (PRIMARY, replace(PRIMARY, database="staging")),
            (PRIMARY, replace(PRIMARY, role="other")),
            (STANDBY, PRIMARY),
            (PRIMARY, STANDBY),
            (PRIMARY, replace(PRIMARY, timeline=2)),
            (PRIMARY, replace(PRIMARY, started_us=3)),
            (PRIMARY, replace(PRIMARY, counted_since_us=3)),
            (PRIMARY, None),
        ]
        reasons = {why_another(before, now) for before, now in others}
        self.assertNotIn(None, reasons)
        self.assertGreaterEqual(len(reasons), 8)

    def test_unknown(self) -> None:
        """What is not known is never the same."""
        unknown = replace(PRIMARY, started_us=None)
        for before, now in ((None, None), (None, PRIMARY), (PRIMARY, None), (unknown, unknown), (unknown, PRIMARY)):
            self.assertIsNotNone(why_another(before, now))

    @given(st.integers(0, 300))
    def test_visible(self, xid: int) -> None:
        """In recovery only what is before xmin, because what is in progress is not listed."""
        self.assertEqual(is_visible(xid, "100:200:150,160"), xid < 200 and xid not in (150, 160))
        self.assertEqual(is_visible(xid, "100:200:", in_recovery=True), xid < 100)
