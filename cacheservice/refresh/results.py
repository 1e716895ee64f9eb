"""An attempt to refresh, and what it read."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from cacheservice.base.errors import Blocker
from cacheservice.base.interfaces import Clock
from cacheservice.base.timers import pause
from cacheservice.cache.changes import Change
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.delta import Delta
from cacheservice.cache.history import Attempt, Outcome, Trigger
from cacheservice.cache.identity import why_elsewhere
from cacheservice.cache.patch import RowsPatch
from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot
from cacheservice.refresh.gates import refusal
from cacheservice.sources.base import AllRows, ReadResult, Unchanged

_PATCHED_A_TURN = 500
"""Keys, in half a millisecond."""


class Try(NamedTuple):
    """An attempt that is under way: its id, what started it, and when it began by this machine's wall clock."""

    id: str
    trigger: Trigger
    began_on: datetime

    @classmethod
    def new(cls, trigger: Trigger) -> Try:
        return cls(secrets.token_hex(4), trigger, datetime.now(UTC))

    def begins_now(self) -> Try:
        return self._replace(began_on=datetime.now(UTC))

    def ended(
        self,
        outcome: Outcome,
        took_s: float,
        rows: int | None,
        error: str | None = None,
        *,
        advice: str | None = None,
        blockers: tuple[Blocker, ...] = (),
        how: str = "",
    ) -> Attempt:
        """Return the record of its end."""
        return Attempt(
            outcome, self.trigger, self.began_on, took_s, rows, error, advice, tuple(blockers), id=self.id, how=how
        )

    def fields(self) -> dict[str, str]:
        """Return the fields that its log lines have in common."""
        return {"trigger": self.trigger, "attempt": self.id}


class Result(NamedTuple):
    """The rows of one dataset, before it is known whether they are published.

    :param refused: why a gate holds them; None if they may be published.
    :param base: the snapshot they follow.
    :param change: how many rows of a delta differ from `base`; None for a full read.
    :param delta: which ones; None if that is not known, or they are many.
    :param differing: the keys of the added and changed rows of a full read, in relation to the rows of `base`; None if
        they are not known.
    """

    dataset: Dataset
    read: ReadResult
    rows: Rows
    refused: str | None
    base: Snapshot | None = None
    change: Change | None = None
    delta: Delta | None = None
    differing: Sequence[bytes] | None = None

    @classmethod
    async def of(cls, clock: Clock, dataset: Dataset, read: ReadResult, base: Snapshot | None) -> Result:
        """Return the rows of a read; those of a delta are put into those of `base`, slice by slice.

        :param clock: `IReactorTime`.
        """
        if isinstance(read, AllRows):
            for _ in read.rows.settling:
                await pause(clock)
            rows = read.rows.finish()
            dataset.counts.count_read(rows.count)
            return cls._judged(dataset, read, rows, base)._replace(differing=read.rows.differing)
        assert base is not None, "a delta follows something"
        settings, changed = dataset.settings, {} if isinstance(read, Unchanged) else read.changed
        dataset.counts.count_read(len(changed))
        patch = RowsPatch(base.rows, max_rows=settings.max_rows, max_bytes=settings.max_bytes)
        for number, (key, document) in enumerate(changed.items(), 1):
            if document is None:
                patch.remove(key)
            else:
                patch.put(key, document)
            if number % _PATCHED_A_TURN == 0:
                await pause(clock)
        change = Change(patch.added, patch.changed, patch.removed)
        rows = patch.finish() if any(change) else base.rows
        return cls._judged(dataset, read, rows, base)._replace(change=change, delta=patch.delta)

    @classmethod
    def _judged(cls, dataset: Dataset, read: ReadResult, rows: Rows, base: Snapshot | None) -> Result:
        """Return a result with what the gates of its dataset hold against it."""
        served = dataset.snapshot
        elsewhere = served is not None and served.source == "disk" and why_elsewhere(served.server, read.moment.server)
        comparable = None if dataset.redefined or elsewhere else served
        refused = refusal(comparable, rows.count, read.columns, dataset.settings)
        return cls(dataset, read, rows, refused, base)

    @property
    def is_held(self) -> bool:
        """Whether a gate keeps it from being published, and no operator lets it through."""
        return self.refused is not None and not self.dataset.accepts_next

    @property
    def how(self) -> str:
        """How the rows were read, in words."""
        read = self.read
        if isinstance(read, AllRows):
            return f"all rows, because {read.because}" if read.because else "all rows"
        if isinstance(read, Unchanged):
            return "nothing, because nothing has changed"
        return f"a delta of {len(read.changed):,} key{'s' if len(read.changed) != 1 else ''}"
