"""The datasets that are refreshed together, each with its log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cacheservice.base.interfaces import Log
from cacheservice.cache.dataset import Dataset


class Member(NamedTuple):
    """A dataset of a group.

    :param log: adds the name of the dataset to each event.
    """

    dataset: Dataset
    log: Log


def members_of(datasets: Sequence[Dataset], log: Log) -> tuple[Member, ...]:
    """Return the members of a group."""
    return tuple(Member(dataset, log.bind(dataset=dataset.name)) for dataset in datasets)
