"""Operators' commands on the datasets of a group: pin, unpin, roll back."""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.base.errors import NothingToPin
from cacheservice.cache.snapshot import Snapshot
from cacheservice.refresh.members import Member


class Operator:
    """Acts on all datasets of a group in one turn of the reactor."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members

    def pin(self) -> list[str]:
        """Keep serving what is served; results that arrive become candidates. Return the names.

        :raises NothingToPin: if a dataset serves nothing yet.
        """
        for dataset, _ in self._members:
            if dataset.snapshot is None:
                raise NothingToPin(f"{dataset.name} has not been loaded yet")
        for dataset, log in self._members:
            dataset.pin()
            log.info("dataset_pinned")
        return [member.dataset.name for member in self._members]

    def unpin(self) -> list[str]:
        """Serve the newest results, and those that follow. Return the names."""
        for dataset, log in self._members:
            served = dataset.snapshot
            dataset.unpin()
            log.info("dataset_unpinned", published=dataset.snapshot is not served)
        return [member.dataset.name for member in self._members]

    def roll_back(self, saved: Sequence[Snapshot]) -> None:
        """Serve saved snapshots, one of each dataset, and pin them."""
        for (dataset, log), snapshot in zip(self._members, saved, strict=True):
            dataset.roll_back(snapshot)
            log.info(
                "dataset_rolled_back",
                to=snapshot.generation,
                generation=dataset.snapshot.generation if dataset.snapshot else None,
                rows=snapshot.rows.count,
            )
