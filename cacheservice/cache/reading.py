"""Decides whether a dataset may be served now, for all ports alike.

A dataset is refused in three cases: it has no snapshot (`NotLoaded`), its snapshot is too old for this read (`TooOld`),
or it is of an earlier generation than this read asks for (`NotReached`). A port renders the refusal in the form of its
protocol.
"""

from __future__ import annotations

from typing import Literal

from cacheservice.base.errors import CacheServiceError
from cacheservice.cache.counts import Reads
from cacheservice.cache.dataset import Dataset, State
from cacheservice.cache.snapshot import Snapshot


class NotLoaded(CacheServiceError):
    """A reader asked for a dataset that has no snapshot. Wait for its first load."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(f"{dataset.name} has not been loaded yet")


class TooOld(CacheServiceError):
    """A dataset is older than its limit, or than the age that a reader accepts. Wait for its next refresh.

    `age_s` is its age in seconds, and `limit_s` the age that was exceeded.
    """

    def __init__(self, message: str, age_s: float, limit_s: float) -> None:
        super().__init__(message)
        self.age_s = age_s
        self.limit_s = limit_s


class NotReached(CacheServiceError):
    """A dataset serves an earlier generation than a reader asks for. Wait for its next publish.

    `generation` is the one that it serves, and `wanted` the one that it did not reach.
    """

    def __init__(self, dataset: Dataset, generation: int, wanted: int) -> None:
        super().__init__(f"{dataset.name} is at generation {generation}; min_generation={wanted} was requested")
        self.generation = generation
        self.wanted = wanted


Refused = NotLoaded | TooOld | NotReached


def is_readable(state: State, on_expired: Literal["serve", "refuse"]) -> bool:
    """Return whether a dataset in `state` can be read. With `on_expired = "serve"` the age does not matter."""
    return state is not State.NEVER_LOADED and not (state is State.EXPIRED and on_expired == "refuse")


def served(dataset: Dataset, reads: Reads | None = None) -> Snapshot:
    """Return the snapshot to serve now.

    :param reads: counts a refusal; None for a request that is not a read of rows.
    :raises NotLoaded: without a snapshot.
    :raises TooOld: if it is expired and `on_expired` is "refuse".
    """
    snapshot = dataset.snapshot
    if snapshot is None:
        raise _not_loaded(dataset, reads)
    # The age is computed only where it matters: most reads are of datasets that are served at any age.
    if dataset.settings.on_expired == "refuse" and not is_readable(dataset.state(), "refuse"):
        age_s, limit_s = dataset.age_s() or 0.0, dataset.settings.max_age_s
        if reads is not None:
            reads.refuse_stale()
        raise TooOld(f"{dataset.name} is {age_s:.0f} s old, limit {limit_s:g} s", age_s, limit_s)
    return snapshot


def not_fresh(dataset: Dataset, max_age_s: float, reads: Reads) -> Refused:
    """Return the refusal for a reader that waited in vain for a dataset of at most `max_age_s`.

    :param reads: counts it.
    """
    age_s = dataset.age_s()
    if age_s is None:
        return _not_loaded(dataset, reads)
    reads.refuse_stale()
    message = f"{dataset.name} is {age_s:.1f} s old; max_age={max_age_s:g} was requested"
    return TooOld(message, age_s, max_age_s)


def not_reached(dataset: Dataset, generation: int, reads: Reads) -> Refused:
    """Return the refusal for a reader that waited in vain for a dataset of at least `generation`.

    :param reads: counts it.
    """
    if dataset.snapshot is None:
        return _not_loaded(dataset, reads)
    reads.refuse_stale()
    return NotReached(dataset, dataset.snapshot.generation, generation)


def _not_loaded(dataset: Dataset, reads: Reads | None) -> NotLoaded:
    if reads is not None:
        reads.refuse_loading()
    return NotLoaded(dataset)
