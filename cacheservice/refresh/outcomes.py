"""Acts on the end of an attempt: publishes its results, holds them, or records a failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from cacheservice.base.errors import DatabaseUnavailable, LockTimeout, LoginRefused, RefreshFailed
from cacheservice.base.interfaces import Clock
from cacheservice.base.text import seconds
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.identity import why_elsewhere
from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot
from cacheservice.refresh.comparison import Comparer, Comparison
from cacheservice.refresh.members import Member
from cacheservice.refresh.results import Result, Try
from cacheservice.refresh.statuses import Statuses
from cacheservice.sources.base import AllRows


class Outcomes:
    """Publishes what the attempts of a group read, from one turn of the reactor on, or records why not.

    :param status: is informed of what the database answered.
    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(self, members: Sequence[Member], statuses: Statuses, status: DatabaseStatus, clock: Clock) -> None:
        self._members = members
        self._statuses = statuses
        self._status = status
        self._clock = clock
        self._logs = {member.dataset.name: member.log for member in members}
        self._comparer = Comparer(clock, self._logs)

    async def publish(self, results: Sequence[Result], this: Try, queued_s: float) -> None:
        """Serve all results from one turn of the reactor on; keep those of pinned datasets as candidates."""
        comparisons = await self._comparer.compare(results)
        self._status.answered()
        # Again, so that a transaction that is waited for is looked for on this server, whatever was read meanwhile.
        moment = results[0].read.moment
        self._status.seen(moment.server, moment.lag)
        for result, comparison in zip(results, comparisons, strict=True):
            self._publish_one(result, comparison, this, queued_s)

    def _publish_one(self, result: Result, comparison: Comparison, this: Try, queued_s: float) -> None:
        dataset, rows = result.dataset, result.rows
        change, like, delta = comparison
        if like is not None and like.rows.is_laid_out_as(rows):
            rows = like.rows
        dataset.accept_next(False)
        took_s = self._clock.seconds() - result.read.moment.began_at
        snapshot = _snapshot(result, rows, comparison)
        if isinstance(result.read, AllRows):
            self._statuses.checked(dataset)
        if dataset.pinned:
            self._keep(result, snapshot, this, took_s)
            return
        log = self._logs[dataset.name]
        fields = {"rows": rows.count, "read": result.how, "took_s": seconds(took_s), "queued_s": seconds(queued_s)}
        served = dataset.snapshot
        if served is not None and like is served:
            dataset.renew(replace(snapshot, generation=served.generation, change=served.change))
            dataset.attempted(this.ended("unchanged", took_s, rows.count, how=result.how))
            log.info("refresh_unchanged", **this.fields(), generation=served.generation, **fields)
            return
        dataset.publish(snapshot, delta)
        dataset.attempted(this.ended("published", took_s, rows.count, how=result.how))
        log.info(
            "refresh_published",
            **this.fields(),
            generation=snapshot.generation,
            bytes=rows.size_bytes,
            **change._asdict(),
            accepted=result.refused,
            **fields,
        )

    def _keep(self, result: Result, snapshot: Snapshot, this: Try, took_s: float) -> None:
        dataset, count = result.dataset, snapshot.rows.count
        dataset.keep(snapshot)
        kept = f"waits as a candidate, because {dataset.name} is pinned"
        advice = f"send 'unpin {dataset.name}' to the admin socket to serve it"
        dataset.attempted(this.ended("held", took_s, count, kept, advice=advice, how=result.how))
        self._logs[dataset.name].info(
            "refresh_held", **this.fields(), error=f"the result {kept}", rows=count, took_s=seconds(took_s)
        )

    def hold(self, results: Sequence[Result], this: Try) -> None:
        """Go on with what is served; the next interval tries again."""
        self._status.answered()
        self.withdraw_what_is_elsewhere()
        (first, why_first), *_ = [(r.dataset.name, r.refused) for r in results if r.refused]
        for dataset, read, rows, refused, *_ in results:
            dataset.accept_next(False)
            reason = refused or f"is of one group with {first}, whose result {why_first}"
            took_s = self._clock.seconds() - read.moment.began_at
            dataset.hold(reason, rows.count, datetime.now(UTC))
            advice = (
                f"if the result is right, send 'accept {dataset.name if refused else first}' to the admin socket, "
                "which publishes the next one; if not, correct the data, and the next result ends the hold"
            )
            dataset.attempted(this.ended("held", took_s, rows.count, reason, advice=advice))
            self._logs[dataset.name].warning(
                "refresh_held",
                **this.fields(),
                error=f"the result {reason}",
                rows=rows.count,
                took_s=seconds(took_s),
            )

    def fail(self, error: RefreshFailed, this: Try, took_s: float, retry_in_s: float) -> None:
        """Record a failure; what is served stays."""
        blockers = error.blockers if isinstance(error, LockTimeout) else ()
        if isinstance(error, DatabaseUnavailable):
            self._status.failed(str(error), login_refused=isinstance(error, LoginRefused))
        else:
            self._status.answered()
        for dataset, log in self._members:
            dataset.attempted(this.ended("failed", took_s, None, str(error), advice=error.advice, blockers=blockers))
            log.warning(
                "refresh_failed",
                **this.fields(),
                error=str(error),
                blocked_by=[str(blocker) for blocker in blockers] or None,
                took_s=seconds(took_s),
                retry_in_s=seconds(retry_in_s),
                consecutive_failures=dataset.consecutive_failures,
            )

    def withdraw_what_is_elsewhere(self) -> None:
        """Stop serving what was saved from another database, once this one is reached."""
        for dataset, log in self._members:
            served = dataset.snapshot
            if served is None or served.source != "disk":
                continue
            reason = why_elsewhere(served.server, self._status.server)
            if reason is not None:
                dataset.withdraw()
                log.error("snapshot_withdrawn", error=f"the saved snapshot is not served any more: {reason}")


def _snapshot(result: Result, rows: Rows, comparison: Comparison) -> Snapshot:
    read, moment, (change, like, _) = result.read, result.read.moment, comparison
    return Snapshot(
        result.dataset.last_generation + 1,
        rows,
        moment.as_of,
        moment.read_at,
        moment.database_snapshot,
        read.columns,
        change=change,
        watch_state=read.watch_state,
        probe=read.probe,
        server=moment.server,
        lag=moment.lag,
        content_since=like.modified_as_of if like is not None else None,
        dependencies=read.dependencies,
    )
