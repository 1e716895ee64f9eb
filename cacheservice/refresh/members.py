"""The datasets that are refreshed together, each with its log and its watch for expiry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cacheservice.base.interfaces import Clock, Log
from cacheservice.cache.dataset import Dataset
from cacheservice.refresh.expiry import ExpiryWatch


class Member(NamedTuple):
    """A dataset of a group.

    :param log: adds the name of the dataset to each event.
    """

    dataset: Dataset
    log: Log
    expiry: ExpiryWatch


def members_of(datasets: Sequence[Dataset], clock: Clock, log: Log) -> tuple[Member, ...]:
    """Return the members of a group.

    :param clock: `IReactorTime`, monotonic.
    """
    logs = [log.bind(dataset=dataset.name) for dataset in datasets]
    pairs = zip(datasets, logs, strict=True)
    return tuple(Member(dataset, log, ExpiryWatch(dataset, clock, log)) for dataset, log in pairs)
