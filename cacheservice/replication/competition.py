"""Decides when this process competes for leads, so that the database has few sessions that wait for them.

A fleet has one leader of a unit and, for all units, one deputy, which competes for the leads of the others and gets
them as soon as they are free. A process that is neither has no session for leads. It competes nevertheless once no
leader helps it: if there is none, if results have not come for long, or if it cannot read the Valkey and serves nothing
yet. As that happens to all processes at about the same time, each begins at a random moment of some seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from twisted.internet.defer import CancelledError
from twisted.python.failure import Failure

from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.internal_errors import log_internal_error
from cacheservice.base.tasks import Tasks
from cacheservice.base.timers import pause
from cacheservice.base.wakeup import Wakeup
from cacheservice.replication.valkey.deputy import Deputy

POLL_S = 1.0
"""Between two renewals of the deputy, or attempts to become it."""
PATIENCE_S = 5.0
"""A deputy that cannot win leads for so long lets another process try."""
SPREAD_S = 5.0
"""Within which processes that no leader helps begin to compete."""
_LEAST_AWAY_S, _MOST_AWAY_S = 5.0, 15.0


class Leads(Protocol):
    """The competition for leads in the database: ``cacheservice.sources.postgres.leads.Leads``."""

    @property
    def problem(self) -> str | None:
        """Why no lead can be won now; None if one can, or if this process does not compete."""

    def compete_for(self, units: Iterable[str]) -> None:
        """Compete for these units only, from now on."""


class Candidate(Protocol):
    """A unit, as the competition sees it."""

    @property
    def has_lead(self) -> bool:
        """Whether this process leads it, or is about to."""

    @property
    def is_deserted(self) -> bool:
        """Whether no leader helps."""


class Competition:
    """Competes for the leads of all units, or of none.

    It looks each second, and when `look` is called.

    :param units: returns the units by name.
    :param random: returns a number from 0 to 1.
    """

    def __init__(
        self,
        units: Callable[[], Mapping[str, Candidate]],
        deputy: Deputy,
        leads: Leads,
        clock: Clock,
        log: Log,
        random: Callable[[], float],
    ) -> None:
        self._units = units
        self._deputy = deputy
        self._leads = leads
        self._clock = clock
        self._random = random
        self._log = log
        self._tasks = Tasks(log)
        self._wakeup = Wakeup(clock)
        self._is_deputy = False
        self._able_at = clock.seconds()
        self._away_until = 0.0
        self._joins_at: float | None = None

    def start(self) -> None:
        """Compete from now on, when that is needed."""
        self._tasks.run(self._keep())

    def stop(self) -> None:
        """Decide nothing any more."""
        self._tasks.cancel()

    def look(self) -> None:
        """Look again soon, because the leads or the units have changed."""
        self._wakeup.wake()

    async def _keep(self) -> None:
        competes = False
        while True:
            try:
                await self._renew()
                competes = self._is_deputy
            except CancelledError:
                raise
            except CacheServiceError:
                pass  # the units report it; a process that competes goes on, because it may be the only one that can
            except Exception:
                log_internal_error(self._log, Failure())  # a bug; the loop goes on, because nothing else decides
            units = self._units()
            joins = self._joins(any(unit.is_deserted for unit in units.values()))
            competes = competes or joins or any(unit.has_lead for unit in units.values())
            self._leads.compete_for(units if competes else ())
            await self._wakeup.wait(POLL_S)
            await pause(self._clock)  # `look` may have been called by the leads, which are not to be changed meanwhile

    def _joins(self, is_deserted: bool) -> bool:
        """Return whether this process competes because no leader helps it."""
        now = self._clock.seconds()
        if not is_deserted:
            self._joins_at = None
        elif self._joins_at is None:
            self._joins_at = now + SPREAD_S * self._random()
        return self._joins_at is not None and now >= self._joins_at

    async def _renew(self) -> None:
        """Become the deputy or stay it, unless this process leads or is away.

        :raises CacheServiceError: if the Valkey fails.
        """
        now = self._clock.seconds()
        if not self._is_deputy or self._leads.problem is None:
            self._able_at = now
        elif now - self._able_at > PATIENCE_S:
            self._away_until = now + away_s(self._random)
        if now >= self._away_until and not any(unit.has_lead for unit in self._units().values()):
            self._is_deputy = await self._deputy.renew()
        elif self._is_deputy:
            self._is_deputy = False
            await self._deputy.leave()


def away_s(random: Callable[[], float]) -> float:
    """Return for how long a process that could not win leads does not try to be the deputy."""
    return _LEAST_AWAY_S + (_MOST_AWAY_S - _LEAST_AWAY_S) * random()
