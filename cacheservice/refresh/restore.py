"""A warm start: publishes saved snapshots before the database is asked."""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.base.errors import Stopped
from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.text import seconds
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.config import groups
from cacheservice.refresh.history import History


async def restore(history: History, cache: Cache, clock: Clock, log: Log) -> None:
    """Publish the newest saved snapshot of each dataset that has none yet.

    Snapshots that cannot be loaded are logged. If the service stops, the rest is not restored.
    """
    try:
        if not await history.find():
            return
        datasets = cache.datasets  # those of now; datasets that are removed meanwhile are not wanted any more
        for group in groups(dataset.settings for dataset in datasets.values()):
            await _restore_together([datasets[settings.name] for settings in group], history, clock, log)
    except Stopped:
        return


async def _restore_together(datasets: Sequence[Dataset], history: History, clock: Clock, log: Log) -> None:
    """Publish the newest acceptable snapshot of one dataset, or of all of a group."""
    names = [dataset.name for dataset in datasets]
    began_at = clock.seconds()
    settings = [dataset.settings for dataset in datasets]

    def wanted() -> bool:
        """Return whether nothing newer was read meanwhile, and the configuration has not changed."""
        unserved = not any(dataset.snapshot is not None or dataset.removed for dataset in datasets)
        return unserved and settings == [dataset.settings for dataset in datasets]

    found = await history.newest(settings, wanted)
    if not wanted():
        return
    if not found:
        if len(datasets) > 1 and any(history.saved([name]) for name in names):
            error = f"no saved snapshots of {', '.join(names)} are of one moment"
            log.warning("group_not_restored", error=error)
        return
    for dataset, snapshot in zip(datasets, found, strict=True):
        dataset.restore(snapshot)
        log.info(
            "snapshot_restored",
            dataset=dataset.name,
            generation=dataset.last_generation,
            rows=snapshot.rows.count,
            age_s=seconds(dataset.age_s() or 0.0),
            age_uncertain=snapshot.age_uncertain,
            took_s=seconds(clock.seconds() - began_at),
        )
