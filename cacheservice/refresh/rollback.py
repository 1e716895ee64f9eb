"""Chooses and loads the saved generation that an operator rolls back to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cacheservice.base.errors import CacheServiceError, NothingToRollBackTo
from cacheservice.base.interfaces import Log
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.snapshot import Snapshot
from cacheservice.refresh.history import History


def earlier_generations(name: str, datasets: Sequence[Dataset], history: History) -> tuple[int, ...]:
    """Return the newest saved generations of one moment before the served ones, one for each dataset.

    :param name: the dataset that the operator named.
    :raises NothingToRollBackTo: if there are none.
    """
    names = [dataset.name for dataset in datasets]
    current = []
    for dataset in datasets:
        if (served := dataset.snapshot) is None:
            raise NothingToRollBackTo(f"{dataset.name} has not been loaded yet")
        current.append(served.rolled_back_to or served.generation)
    for saved in history.saved(names):
        # A dataset whose content did not change has the same generation at both moments.
        if list(saved) != current and all(was <= now for was, now in zip(saved, current, strict=True)):
            return saved
    group = f" together with its group ({', '.join(names)})" if len(names) > 1 else ""
    raise NothingToRollBackTo(f"no generation of {name} before {current[names.index(name)]} is saved{group}")


async def load_generations(
    datasets: Sequence[Dataset],
    generations: Sequence[int],
    history: History,
    still_declared: Callable[[], bool],
    log: Log,
) -> list[Snapshot] | None:
    """Return the saved snapshots; None if one cannot be loaded, which is logged.

    :param still_declared: returns whether the datasets are still declared as they were when the operator asked.
    """
    saved = []
    for dataset, generation in zip(datasets, generations, strict=True):
        try:
            saved.append(await history.load(dataset.name, generation))
            if not still_declared():
                raise NothingToRollBackTo(f"{dataset.name} is not declared any more as it was then")
        except CacheServiceError as error:
            log.warning("rollback_failed", dataset=dataset.name, to=generation, error=str(error))
            return None
    return saved
