"""Starts and ends refreshers: after saved snapshots were restored, after those before them, and in turns of a fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from twisted.internet.defer import DeferredList

from cacheservice.base.errors import FollowsLeader
from cacheservice.base.tasks import Tasks
from cacheservice.base.timers import pause
from cacheservice.cache.cache import Cache
from cacheservice.refresh.history import History
from cacheservice.refresh.process import Process
from cacheservice.refresh.refresher import Refresher
from cacheservice.refresh.registry import Registry
from cacheservice.refresh.restore import restore
from cacheservice.refresh.turns import Turns


class Lives:
    """Starts and ends the refreshers of a registry.

    A refresher waits until the saved snapshots were restored, or until the refresher before it has ended. Then it
    starts, if it is its turn. `ending` are those that were stopped and may still have an attempt.

    :param tasks: runs what takes more than one turn of the reactor; its owner ends it.
    """

    def __init__(
        self, refreshers: Registry, cache: Cache, history: History | None, process: Process, tasks: Tasks
    ) -> None:
        self.ending: set[Refresher] = set()
        self._refreshers = refreshers
        self._cache = cache
        self._history = history
        self._process = process
        self._tasks = tasks
        self._waiting: set[Refresher] = set()
        self._turns = Turns()

    def follow_leaders(self, ask: Callable[[str], object]) -> None:
        """Refresh nothing until `take_over`, because processes of a fleet take turns. Call it before the start.

        :param ask: asks the leader of a dataset for a refresh.
        """
        self._turns = Turns(ask)

    def take_over(self, name: str, *, stretch: float, delay_s: float) -> None:
        """Refresh a dataset, with its group, from now on.

        :param stretch: multiplies the interval.
        :param delay_s: until the first refresh.
        """
        refresher = self._refreshers.find(name)
        if self._turns.has(refresher):
            return
        self._turns.begin(refresher, stretch)
        if refresher not in self._waiting:
            self._waiting.add(refresher)
            self._tasks.run(self._take_over(refresher, delay_s))

    async def _take_over(self, refresher: Refresher, delay_s: float) -> None:
        await pause(self._process.clock, delay_s)
        self._waiting.discard(refresher)
        self._run(self._refreshers.still_there([refresher]))

    def stand_by(self, name: str) -> None:
        """Refresh a dataset and its group no longer; an attempt that runs is ended."""
        refresher = self._refreshers.find(name)
        if self._turns.end(refresher):
            begun = self._refreshers.renew(refresher)
            self._waiting.discard(refresher)
            self._waiting.add(begun)
            self._tasks.run(self._replace([refresher], [begun]))

    def _run(self, refreshers: Iterable[Refresher]) -> None:
        """Start the refreshers whose turn it is; the others wait for it."""
        for refresher in refreshers:
            self._waiting.discard(refresher)
            if self._turns.has(refresher):
                refresher.start(self._turns.stretch(refresher))

    def start(self, refreshers: Iterable[Refresher]) -> None:
        """Start refreshers; those that serve nothing yet start after the saved snapshots have been restored."""
        cold, warm = [], []
        for refresher in refreshers:
            if self._history is None or all(dataset.snapshot for dataset in refresher.datasets):
                warm.append(refresher)
            else:
                cold.append(refresher)
        self._run(warm)
        self._waiting.update(cold)
        if self._history is not None and cold:
            self._tasks.run(self._start_warm(self._history, cold))

    async def _start_warm(self, history: History, refreshers: Sequence[Refresher]) -> None:
        # Saved snapshots come first, so that readers have them before the database is asked.
        await restore(history, self._cache, self._process.clock, self._process.log)
        self._run(self._refreshers.still_there(refreshers))

    def replace(self, ended: Sequence[Refresher], begun: Sequence[Refresher]) -> None:
        """Start new refreshers once no attempt of the old ones runs, because refreshes never overlap."""
        self._turns.keep(self._refreshers.each())
        self._waiting.update(begun)
        self._tasks.run(self._replace(ended, begun))

    async def _replace(self, ended: Sequence[Refresher], begun: Sequence[Refresher]) -> None:
        self.ending.update(ended)
        await DeferredList([refresher.stop() for refresher in list(self.ending)])
        self.ending.difference_update(ended)
        self.start(self._refreshers.still_there(begun))

    def leading(self, name: str) -> Refresher:
        """Return the refresher of a dataset that this process refreshes.

        :raises FollowsLeader: if another process does.
        """
        refresher = self._refreshers.find(name)
        if not self._turns.has(refresher):
            raise FollowsLeader(f"another process refreshes {name}; send the command to its leader, which `why` names")
        return refresher

    def ask_leader(self, name: str) -> bool:
        """Ask the leader of a dataset for a refresh; return False if this process refreshes it itself."""
        if self._turns.ask is None or self._turns.has(self._refreshers.find(name)):
            return False
        self._turns.ask(name)
        return True
