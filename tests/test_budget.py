"""Laws of postgres.max_load: how much of a connection's time refreshes use, and who waits for it."""

from __future__ import annotations

from twisted.internet import reactor
from twisted.internet.task import deferLater

from cacheservice.refresh.budget import WINDOW_S
from cacheservice.refresh.service import Limits
from tests.kit import views
from tests.kit.service import ServiceTestCase, declare
from tests.kit.waiting import until


class OnTheServer(ServiceTestCase):
    timeout = 120

    async def test_the_share_on_the_server(self) -> None:
        """On the real server the time in sessions stays under its share, both are refreshed, and it is reported."""
        slowly = "SELECT i AS id, pg_sleep(0.02) IS NULL AS n FROM generate_series(1, 25) AS i"
        service, cache = self.make_service(
            declare("first", slowly, interval_s=0.6, max_age_s=30.0),
            declare("second", slowly, interval_s=0.6, max_age_s=30.0),
        )
        share = 0.1
        service.set_limits(Limits(2, share))
        service.startService()
        await until(lambda: all(dataset.snapshot for dataset in cache.datasets.values()))
        seen: set[str] = set()
        ends_at = reactor.seconds() + 20
        while reactor.seconds() < ends_at:
            await deferLater(reactor, 0.1)
            seen.update(line for line in views.status_table(cache).splitlines() if "behind its interval" in line)
        first, second = cache.datasets.values()
        taken_s = [
            fields["took_s"]
            for event, fields in self.log.events
            if event in ("refresh_published", "refresh_unchanged", "refresh_failed")
        ]
        # One refresh may take longer than it was expected to.
        self.assertLessEqual(sum(taken_s), share * WINDOW_S + max(taken_s) + 1)
        self.assertGreater(len(taken_s), 3)
        self.assertLess(len(taken_s), 30)
        # The first read of each is published, and those that follow return the same.
        self.assertEqual((first.counts.outcomes["published"], second.counts.outcomes["published"]), (1, 1))
        self.assertLessEqual(abs(first.counts.outcomes["unchanged"] - second.counts.outcomes["unchanged"]), 2)
        self.assertTrue(seen)
