"""The interface of saved snapshots, for a warm start and for rollbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings


class History(Protocol):
    """The saved snapshots: ``cacheservice.sources.disk.store.SnapshotStore``."""

    async def find(self) -> bool:
        """Find out what is saved; return False if nothing can be restored.

        :raises Stopped: if the service stops meanwhile.
        """

    async def newest(self, members: Sequence[DatasetSettings], wanted: Callable[[], bool]) -> list[Snapshot]:
        """Return the newest saved snapshot of a dataset or, of one moment each, of all of a group; or an empty list.

        :param wanted: returns whether the snapshots are still needed.
        :raises Stopped: if the service stops meanwhile.
        """

    def saved(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the saved generations of a dataset or, of one moment each, of a group, newest first."""

    async def load(self, name: str, generation: int) -> Snapshot:
        """Load a saved generation.

        :raises CacheServiceError: if it cannot be loaded.
        """
