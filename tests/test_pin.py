"""Laws of pinning: what is served stays, and what is read meanwhile waits."""

from __future__ import annotations

from tests.kit.service import ServiceTestCase, declare
from tests.kit.waiting import until


class GroupPins(ServiceTestCase):
    async def test_all_of_a_group(self) -> None:
        """To pin one of a group is to pin all of it, so that what is served stays of one moment."""
        service, cache = self.make_service(
            declare("one", "TABLE things", group="g", interval_s=3600.0),
            declare("two", "TABLE things", group="g", interval_s=3600.0),
        )
        await self.start_and_load(service, cache)
        served = [dataset.snapshot for dataset in cache.datasets.values()]
        self.assertEqual(service.pin("two"), ["one", "two"])
        self.sql("UPDATE things SET n = 1")
        service.refresh_now("one")
        await until(lambda: all(dataset.candidate for dataset in cache.datasets.values()))
        self.assertEqual([dataset.snapshot for dataset in cache.datasets.values()], served)
        self.assertEqual(service.unpin("one"), ["one", "two"])
        self.assertEqual([self.n(dataset) for dataset in cache.datasets.values()], [1, 1])
        self.assertEqual(len({dataset.snapshot.as_of for dataset in cache.datasets.values() if dataset.snapshot}), 1)
