"""The leader's side: publishes in a Valkey what this process serves of a unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from twisted.internet.defer import CancelledError, Deferred

from cacheservice.base.backoff import full_jitter
from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.tasks import Tasks, abandon
from cacheservice.base.timers import pause
from cacheservice.cache.cache import Cache
from cacheservice.cache.delta import NO_CHANGE
from cacheservice.cache.events import Ended, Event, Published, Renewed
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.replication.codec import encoded
from cacheservice.replication.heads import head_of
from cacheservice.replication.outbox import Outbox, Update
from cacheservice.replication.valkey.chains import must_begin_again
from cacheservice.replication.valkey.compactor import Compactor, Written
from cacheservice.replication.valkey.manifest import Manifest, Member
from cacheservice.replication.valkey.store import Fenced, Lead, Store
from cacheservice.sources.frames.clocks import Clocks

_SUPERSEDED_S = 60.0
"""Replicas that have begun to load a generation may finish."""


class _Taken(NamedTuple):
    """An update of a dataset, with the snapshot and the settings of the moment at which it was taken.

    A reload may change the settings while rows are written, and their frames have the fingerprint of the settings.
    """

    update: Update
    snapshot: Snapshot
    settings: DatasetSettings


class Here(NamedTuple):
    """The process that publishes.

    :param name: for people.
    :param random: returns a number from 0 to 1.
    """

    name: str
    cache: Cache
    clocks: Clocks
    clock: Clock
    log: Log
    random: Callable[[], float]


class Publisher:
    """Publishes a unit for as long as the lead lasts.

    It is idle, publishes, or waits to try again after a failure. What is served meanwhile is merged. `problem` is why
    the last try failed, None if it did not.

    :param names: of the unit's datasets.
    :param lead: the lead; its manifest is current until the first publish.
    :param loaded: the generation of each dataset that this process has loaded from that manifest, so that a delta may
        follow it.
    :param fenced: called once if another process has taken the lead; nothing is published any more.
    """

    def __init__(
        self,
        names: Sequence[str],
        store: Store,
        here: Here,
        lead: Lead,
        loaded: Mapping[str, int],
        fenced: Callable[[Fenced], object],
    ) -> None:
        self.problem: str | None = None
        self._names = names
        self._store = store
        self._here = here
        self._epoch = lead.epoch
        self._current = lead.manifest or Manifest(lead.epoch, 0)
        self._fenced = fenced
        self._outbox = Outbox()
        self._tasks = Tasks(here.log)
        self._compactor = Compactor(store, here.clock, here.log, self._compacted)
        self._is_publishing = False
        self._unsubscribe: Callable[[], None] | None = None
        for name, generation in loaded.items():
            self._outbox.has_been_sent(name, generation)

    def start(self) -> None:
        """Publish what is served, and from now on each change."""
        self._unsubscribe = self._here.cache.events.subscribe(self._happened, Published, Renewed, Ended)
        for name in self._names:
            dataset = self._here.cache.datasets.get(name)
            if dataset is None or dataset.snapshot is None or dataset.redefined:
                continue
            if self._outbox.generation(name) == dataset.snapshot.generation:
                self._outbox.renewed(name)
            else:
                self._outbox.resend(name, dataset.snapshot.generation)
        self._begin()

    def stop(self) -> None:
        """Publish nothing any more."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        self._compactor.cancel()
        self._tasks.cancel()

    def _happened(self, event: Event) -> None:
        if event.dataset not in self._names:
            return
        if isinstance(event, Published):
            self._outbox.published(event)
        elif isinstance(event, Renewed):
            self._outbox.renewed(event.dataset)
        else:
            self._outbox.forget(event.dataset)
            self._compactor.forget(event.dataset)
        self._begin()

    def _compacted(self, name: str) -> None:
        """Publish a shorter chain of the same generation."""
        self._outbox.renewed(name)
        self._begin()

    def _begin(self) -> None:
        if not self._is_publishing and self._unsubscribe is not None and not self._outbox.is_empty:
            self._is_publishing = True
            self._tasks.run(self._work())

    async def _work(self) -> None:
        delay_s, failures = full_jitter(0.1, 5.0, self._here.random), 0
        try:
            await pause(self._here.clock)  # all datasets of a group are published in one turn
            while not self._outbox.is_empty:
                try:
                    await self._publish()
                    self.problem, failures = None, 0
                except Fenced as error:
                    self._note("lead_fenced", error)
                    self.stop()
                    self._fenced(error)
                    return
                except CancelledError:
                    raise
                except CacheServiceError as error:
                    # What was written is not current, and expires. Everything is written again, because the server may
                    # have lost what it had.
                    self._note("publish_failed", error)
                    await pause(self._here.clock, delay_s(failures))
                    failures += 1
                    await self._catch_up()
        finally:
            self._is_publishing = False

    def _note(self, event: str, error: CacheServiceError) -> None:
        """Note a failure; the log has a line for each change, not for each try."""
        if self.problem != str(error):
            self.problem = str(error)
            self._here.log.warning(event, datasets=list(self._names), error=str(error))

    async def _catch_up(self) -> None:
        """Find out what is current, and plan to publish all rows after it."""
        self._compactor.cancel()
        for name in self._names:
            dataset = self._here.cache.datasets.get(name)
            if dataset is not None and dataset.snapshot is not None and not dataset.redefined:
                self._outbox.resend(name, dataset.snapshot.generation)
        try:
            self._current = await self._store.current() or Manifest(self._epoch, 0)
        except CacheServiceError as error:
            self._note("publish_failed", error)

    async def _publish(self) -> None:
        here, before = self._here, self._current
        taken = self._take()
        members = {
            name: self._compactor.compacted(name, member)
            for name, member in before.members.items()
            if name in here.cache.datasets
        }
        # Asked before anything is written, and compared when the reply comes, because the age grows meanwhile.
        asking = Deferred.fromCoroutine(self._read_us(taken))
        try:
            for name, each in taken.items():
                members[name] = await self._member(name, members.get(name), each)
            run, read_us = await asking
        finally:
            abandon(asking)
        for name, each in taken.items():
            members[name] = replace(members[name], renewal=self._renewal(each), read_us=read_us[name])
        manifest = Manifest(self._epoch, before.moment + 1, members, run)
        await self._store.publish(manifest, before.moment, here.name)
        self._current = manifest
        kept = set(manifest.pieces)
        await self._store.expire([piece for piece in before.pieces if piece not in kept], _SUPERSEDED_S)
        self._compactor.published(members, {name: partial(self._all_rows, each) for name, each in taken.items()})

    async def _read_us(self, taken: Mapping[str, _Taken]) -> tuple[str, dict[str, int]]:
        """Return the run of the server, and when the rows of each dataset were read, by its clock."""
        server = await self._store.clock()
        ages_us = {name: self._here.clocks.age_us(each.snapshot.read_at) for name, each in taken.items()}
        return server.run, {name: max(0, server.now_us - age_us) for name, age_us in ages_us.items()}

    def _take(self) -> dict[str, _Taken]:
        """Take what is to be published, with the snapshots of this moment, which belong together.

        Replicas show the Valkey as the source of their rows.
        """
        taken = {}
        for name, update in self._outbox.take().items():
            dataset = self._here.cache.datasets.get(name)
            # Rows of an earlier definition would get the fingerprint of the new one.
            if dataset is not None and dataset.snapshot is not None and not dataset.redefined:
                taken[name] = _Taken(update, replace(dataset.snapshot, source="valkey"), dataset.settings)
        return taken

    async def _member(self, name: str, before: Member | None, taken: _Taken) -> Member:
        """Write what is new of a dataset, and return it; nothing if it is only renewed."""
        update, snapshot, settings = taken
        delta = update.delta
        if before is not None and delta is not None and before.generation == update.base:
            if update.generation == update.base:
                return before
            head = head_of(settings, snapshot, self._here.clocks, base=update.base, delta=delta)
            piece = await self._store.write(snapshot.generation, update.base, encoded(head, delta, compress=True))
            if not must_begin_again(deltas := (*before.deltas, piece), before.snapshot):
                self._compactor.wrote(name, piece, Written(head, delta))
                return Member(before.snapshot, deltas)
            await self._store.expire([piece], 0)  # a snapshot takes its place
        self._compactor.forget(name)
        head, rows = self._all_rows(taken)
        return Member(await self._store.write(snapshot.generation, 0, encoded(head, rows, compress=True)))

    def _all_rows(self, taken: _Taken) -> Written:
        _, snapshot, settings = taken
        return Written(head_of(settings, snapshot, self._here.clocks), snapshot.rows)

    def _renewal(self, taken: _Taken) -> bytes:
        _, snapshot, settings = taken
        head = head_of(settings, snapshot, self._here.clocks, base=snapshot.generation, delta=NO_CHANGE)
        return b"".join(encoded(head, NO_CHANGE, compress=True))
