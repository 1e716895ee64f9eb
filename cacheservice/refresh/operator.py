"""What an operator may do with the datasets of a group: pin, unpin, roll back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cacheservice.base.errors import NothingToPin
from cacheservice.cache.dataset import Dataset, Snapshot
from cacheservice.refresh.expiry import ExpiryWatch


class Operator:
    """Acts on all datasets of a group in one turn of the reactor.

    :param logs: by dataset.
    """

    def __init__(self, datasets: Sequence[Dataset], expiries: Sequence[ExpiryWatch], logs: dict[str, Any]) -> None:
        self._datasets = datasets
        self._expiries = expiries
        self._logs = logs

    def pin(self) -> list[str]:
        """Keep serving what is served; results that arrive become candidates. Return the names.

        :raises NothingToPin: if a dataset serves nothing yet.
        """
        for dataset in self._datasets:
            if dataset.snapshot is None:
                raise NothingToPin(f"{dataset.name} has not been loaded yet")
        for dataset in self._datasets:
            dataset.pinned = True
            self._logs[dataset.name].info("dataset_pinned")
        return [dataset.name for dataset in self._datasets]

    def unpin(self) -> list[str]:
        """Serve the newest results, and those that follow. Return the names."""
        for dataset, expiry in zip(self._datasets, self._expiries, strict=True):
            served = dataset.snapshot
            dataset.unpin()
            self._logs[dataset.name].info("dataset_unpinned", published=dataset.snapshot is not served)
            if dataset.snapshot is not served:
                expiry.published()
        return [dataset.name for dataset in self._datasets]

    def roll_back(self, saved: Sequence[Snapshot]) -> None:
        """Serve saved snapshots, one of each dataset, and pin them."""
        for dataset, snapshot, expiry in zip(self._datasets, saved, self._expiries, strict=True):
            dataset.roll_back(snapshot)
            self._logs[dataset.name].info(
                "dataset_rolled_back",
                to=snapshot.generation,
                generation=dataset.snapshot.generation if dataset.snapshot else None,
                rows=snapshot.rows.count,
            )
            expiry.published()
