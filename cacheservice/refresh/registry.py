"""The refreshers of the declared datasets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cacheservice.base.errors import UnknownDataset
from cacheservice.cache.dataset import Dataset
from cacheservice.refresh.refresher import Refresher, Shared


class Replaced(NamedTuple):
    """The refreshers that a changed configuration ends and begins, and those that it keeps."""

    ended: list[Refresher]
    begun: list[Refresher]
    kept: list[Refresher]


class Registry:
    """The refreshers by the names of their datasets; one refresher may have several datasets."""

    def __init__(self, shared: Shared, groups: Iterable[Sequence[Dataset]]) -> None:
        self._shared = shared
        self._by_name: dict[str, Refresher] = {}
        for datasets in groups:
            self._add(datasets)

    def _add(self, datasets: Sequence[Dataset]) -> Refresher:
        refresher = Refresher(datasets, self._shared)
        if any(dataset.pinned for dataset in datasets):
            for dataset in datasets:  # one of them joined a group, and a pin is of the whole group
                if dataset.snapshot is not None:
                    dataset.pin()
                else:
                    dataset.unpin()
        self._by_name |= {dataset.name: refresher for dataset in datasets}
        return refresher

    def each(self) -> list[Refresher]:
        """Return all refreshers, each once."""
        return list(dict.fromkeys(self._by_name.values()))

    def find(self, name: str) -> Refresher:
        """:raises UnknownDataset: if none has a dataset of that name."""
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownDataset(f"unknown dataset '{name}'") from None

    def still_there(self, refreshers: Iterable[Refresher]) -> list[Refresher]:
        """Return the refreshers that have not been replaced since."""
        current = set(self._by_name.values())
        return [refresher for refresher in refreshers if refresher in current]

    def renew(self, refresher: Refresher) -> Refresher:
        """Return a new refresher in the place of one, for the same datasets."""
        return self._add(refresher.datasets)

    def replace(self, groups: Iterable[Sequence[Dataset]], keepable: Iterable[Refresher]) -> Replaced:
        """Have refreshers for these groups of datasets.

        :param keepable: refreshers that are kept if their datasets are still together.
        """
        before = self.each()
        known = {frozenset(dataset.name for dataset in each.datasets): each for each in keepable}
        self._by_name, begun, kept = {}, [], []
        for datasets in groups:
            refresher = known.get(frozenset(dataset.name for dataset in datasets))
            if refresher is None:
                begun.append(self._add(datasets))
                continue
            self._by_name |= {dataset.name: refresher for dataset in datasets}
            kept.append(refresher)
        current = set(self._by_name.values())
        return Replaced([each for each in before if each not in current], begun, kept)
