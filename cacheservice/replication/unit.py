"""One unit of a fleet in this process: a dataset, or a group of datasets, which is refreshed and published as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from twisted.internet.defer import CancelledError
from twisted.python.failure import Failure

from cacheservice.base.backoff import full_jitter
from cacheservice.base.errors import CacheServiceError
from cacheservice.base.internal_errors import log_internal_error
from cacheservice.base.tasks import Tasks
from cacheservice.base.wakeup import Wakeup
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.fleet_status import FleetStatus
from cacheservice.replication.leading import Fleet, Leading
from cacheservice.replication.roles import Facts, Role, role_of
from cacheservice.replication.valkey.publisher import Here
from cacheservice.replication.valkey.replica import Replica
from cacheservice.replication.valkey.store import Store

POLL_S = 1.0
"""Between two looks at the Valkey without a message from it."""
STRETCH = 3.0
"""A process that is alone refreshes at this multiple of the interval."""
_LEAST_RETRY_S, _MOST_RETRY_S = 0.2, 5.0


class Unit:
    """A unit: this process follows its leader, leads it, or refreshes it alone; see `Role`.

    One loop looks at the Valkey, at an interval and when a message arrives, and then acts on what it has found. With
    the lead it first begins a new epoch there, catches up, and then publishes. While the Valkey fails, it refreshes
    nevertheless, and begins the epoch when that is possible.

    `problem` is why the Valkey cannot be read, None if it can. `has_lead` is whether this process has the lead, even
    if it has not begun it in the Valkey yet.
    """

    def __init__(self, names: Sequence[str], store: Store, replica: Replica, here: Here, fleet: Fleet) -> None:
        self.names = tuple(names)
        self.role = Role.FOLLOWING
        self.problem: str | None = None
        self._store = store
        self._replica = replica
        self._here = here
        self._fleet = fleet
        self._log = here.log.bind(unit=store.names.unit)
        self._tasks = Tasks(here.log)
        self._heard_at = here.clock.seconds()
        self.has_lead = False
        self.leading = Leading(self.names, store, replica, here, fleet)
        self._wakeup = Wakeup(here.clock)
        self._lead_changes = 0
        self._has_looked = False
        replica.notify(self._report)

    @property
    def is_deserted(self) -> bool:
        """Whether no leader helps.

        There is none, as for a new dataset; or it is silent for long; or nothing is served yet and the Valkey cannot be
        read.
        """
        if self.problem is None and self._has_looked and self._store.leader is None:
            return True
        datasets = self._here.cache.datasets
        is_empty = any(name in datasets and datasets[name].snapshot is None for name in self.names)
        return (self.problem is not None and is_empty) or self._silent_s() >= self._fleet.fallback_after_s

    def _silent_s(self) -> float:
        return self._here.clock.seconds() - self._heard_at

    def start(self) -> None:
        """Follow the leader, if there is one."""
        self._report()
        self._tasks.run(self._keep())

    def stop(self) -> None:
        """Look no more, and publish no more."""
        self._tasks.cancel()
        self.leading.end()

    def retire(self) -> None:
        """Stop, because the datasets are not declared together any more; refresh them no longer."""
        self.stop()
        if self.has_lead:
            self._store.leave(self.leading.epoch)
        if self.names[0] in self._here.cache.datasets:
            self._play(Role.FOLLOWING)

    def redeclared(self) -> None:
        """Continue in the same role after a reload, which may have replaced the refreshes of the datasets."""
        if self.role is not Role.FOLLOWING:
            self._take_over(delay_s=0.0)
        self.wake()

    def wake(self) -> None:
        """Look at the Valkey now."""
        self._wakeup.wake()

    def gained(self) -> None:
        """Note that this process has the lead; it may have had it before."""
        if not self.has_lead:
            self.has_lead = True
            self._lead_changes += 1
        self.wake()

    def lost(self) -> None:
        """Note that this process has the lead no longer. It stops publishing at once."""
        self.has_lead = False
        self._lead_changes += 1
        self.leading.end()
        self._heard_at = self._here.clock.seconds()
        self._play(Role.FOLLOWING)
        self._report()
        self.wake()

    def ask(self) -> None:
        """Ask the leader for a refresh."""
        self._tasks.run(self._ask({}))

    async def _ask(self, least: Mapping[str, int]) -> None:
        try:
            await self._store.ask(least)
        except CacheServiceError as error:
            self._note(error)

    async def _keep(self) -> None:
        delay_s = full_jitter(_LEAST_RETRY_S, _MOST_RETRY_S, self._here.random)
        failures = 0
        while True:
            had_lead = self.has_lead
            try:
                await self._look()
                self.problem, self._has_looked, failures = None, True, 0
                if self.has_lead and not had_lead:
                    continue  # the epoch begins before the refreshes
            except CancelledError:
                raise
            except CacheServiceError as error:
                self._note(error)
                failures += 1
            except Exception:
                log_internal_error(self._log, Failure())  # a bug; the unit goes on, because nothing else looks
                failures += 1
            self._decide()
            await self._wakeup.wait(POLL_S if not failures else max(POLL_S / 4, delay_s(failures - 1)))

    async def _look(self) -> None:
        """Look at the Valkey, and act on what is there.

        :raises CacheServiceError: if that fails.
        """
        if self.has_lead:
            await self.leading.look(lambda: self.has_lead)
        else:
            ahead = await self._replica.load()
            if ahead and not self.has_lead:
                await self._store.ask(ahead)
            elif not ahead and self._is_fresh():
                self._heard_at = self._here.clock.seconds()

    def _is_fresh(self) -> bool:
        """Return whether the leader has published lately: all datasets serve its results, which are not stale."""
        datasets = [self._here.cache.datasets.get(name) for name in self.names]
        return all(dataset is not None and _is_fresh_of_leader(dataset) for dataset in datasets)

    def _decide(self) -> None:
        facts = Facts(self.has_lead, self._silent_s(), self._fleet.may_refresh())
        self._play(role_of(facts, self.role, self._fleet.fallback_after_s))
        self._report()

    def _report(self) -> None:
        """Note in the datasets what operators see."""
        leads = self.role is Role.LEADING
        leader = self.leading.present if leads else self._store.leader
        status = FleetStatus(
            self.role.value,
            self._here.name,
            epoch=None if leader is None else leader.epoch,
            leader=None if leader is None else leader.name,
            heard_at=None if leads else self._heard_at,
            valkey_problem=self.problem,
            publish_problem=self.leading.problem,
            lead_problem=self._fleet.lead_problem(),
            lead_changes=self._lead_changes,
        )
        newest = None if leads else self._replica.newest
        for name in self.names:
            dataset = self._here.cache.datasets.get(name)
            if dataset is not None:
                member = None if newest is None else newest.members.get(name)
                lag = None if member is None else max(0, member.generation - dataset.last_generation)
                dataset.note_fleet(replace(status, lag=lag))

    def _play(self, role: Role) -> None:
        if role is self.role:
            return
        before, self.role = self.role, role
        self._log.info("role_changed", role=role.value, before=before.value)
        if before is not Role.FOLLOWING:
            self._fleet.refreshing.stand_by(self.names[0])
        if role is Role.LEADING:
            self._take_over(delay_s=0.0)
        elif role is Role.ALONE:
            dataset = self._here.cache.datasets.get(self.names[0])
            interval_s = dataset.settings.interval_s if dataset is not None else 0.0
            # All replicas become alone at about the same time; their refreshes are spread over an interval.
            self._take_over(delay_s=interval_s * self._here.random())

    def _take_over(self, *, delay_s: float) -> None:
        stretch = STRETCH if self.role is Role.ALONE else 1.0
        self._fleet.refreshing.take_over(self.names[0], stretch=stretch, delay_s=delay_s)

    def _note(self, error: CacheServiceError) -> None:
        """Note why the Valkey cannot be read; the log has a line for each change, not for each try."""
        if self.problem != str(error):
            self.problem = str(error)
            self._log.warning("cluster_unreadable", error=str(error))


def _is_fresh_of_leader(dataset: Dataset) -> bool:
    snapshot, age_s, settings = dataset.snapshot, dataset.age_s(), dataset.settings
    if snapshot is None or age_s is None or snapshot.source != "valkey":
        return False  # rows that this process has read by itself prove no leader
    return age_s <= settings.interval_s + settings.timeout_s
