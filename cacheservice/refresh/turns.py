"""Which refreshers may run in a process of a fleet. Pure decisions; `CacheService` starts and stops the refreshers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cacheservice.refresh.refresher import Refresher


class Turns:
    """The refreshers whose turn it is, in this process.

    In a fleet other processes refresh, and a refresher waits for its turn. Alone it is always the turn of all.

    :param ask: asks the process that refreshes a dataset for a refresh; None without a fleet.
    """

    def __init__(self, ask: Callable[[str], object] | None = None) -> None:
        self.ask = ask
        self._stretches: dict[Refresher, float] = {}

    def begin(self, refresher: Refresher, stretch: float) -> None:
        """Note that it is its turn; `stretch` multiplies its interval."""
        self._stretches[refresher] = stretch

    def end(self, refresher: Refresher) -> bool:
        """Note that its turn is over; return False if it was not its turn."""
        return self._stretches.pop(refresher, None) is not None

    def has(self, refresher: Refresher) -> bool:
        """Return whether it may run."""
        return self.ask is None or refresher in self._stretches

    def stretch(self, refresher: Refresher) -> float:
        """Return what multiplies its interval."""
        return self._stretches.get(refresher, 1.0)

    def keep(self, refreshers: Iterable[Refresher]) -> None:
        """Forget all refreshers but these."""
        kept = set(refreshers)
        self._stretches = {each: stretch for each, stretch in self._stretches.items() if each in kept}
