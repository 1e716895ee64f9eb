"""The refreshes over a fake database and a fake clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import Blocker, QueryFailed
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.drain import Drain
from cacheservice.config import DatasetSettings
from cacheservice.refresh.process import Process
from cacheservice.refresh.service import CacheService, Limits
from cacheservice.sources.base import AllRows, Moment, ReadPlan, ReadResult, Unchanged
from cacheservice.sources.postgres.notifications import Notifications
from tests.kit.clocks import started_clock
from tests.kit.datasets import MOMENT, declared
from tests.kit.logs import Log

START_S = 5000.0
BLOCKER = Blocker(42, "app", "psql", "AccessExclusiveLock", "public.products", MOMENT, "idle in transaction", None)


def without_jitter(*names: str, **keys: Any) -> list[DatasetSettings]:
    """Declare datasets whose starts are exactly an interval apart, as in `World`."""
    return [declared(name, **({"jitter": 0.0} | keys)) for name in names]


class Read:
    """One read that the fake was asked for."""

    def __init__(self, wanted: ReadPlan, began_at: float, number: int = 1) -> None:
        self.name = wanted.dataset.name
        self.number = number
        self.into = wanted.build()
        self.expect = wanted.expect
        self.notified = wanted.notified
        self.since = wanted.since
        self.trust_probe = wanted.trust_probe
        self.began_at = began_at
        self.moment = Moment(MOMENT, began_at, "1:1:")
        self.result: Deferred[ReadResult] = Deferred()

    def complete(self, rows: int = 1, columns: int = 0) -> None:
        """Return that many rows.

        Unless a number of columns is given there is one more than in each read before: another content, whatever the
        rows are.
        """
        self.into.add([(b"%d" % number, b"{}") for number in range(rows)])
        names = tuple(f"column{number}" for number in range(columns or self.number))
        self.result.callback(AllRows(moment=self.moment, columns=names, rows=self.into))

    def complete_nothing(self) -> None:
        """Nothing has changed."""
        self.result.callback(Unchanged(moment=self.moment))

    def fail(self, error: Exception | None = None) -> None:
        self.result.errback(error or QueryFailed("column absent does not exist", "42703"))


class FakeDatabase:
    """Keeps every read, and sees to it that no two of one dataset are under way."""

    def __init__(self, clock: Clock) -> None:
        self.reads: list[Read] = []
        self.raising: Exception | None = None
        self.after_failure: Callable[[Failure], object] = lambda failure: failure
        self._clock = clock

    def read(self, wanted: Sequence[ReadPlan]) -> Deferred[list[ReadResult]]:
        (one,) = wanted
        assert one.dataset.name not in [read.name for read in self.running], "a refresh never overlaps itself"
        read = Read(one, self._clock.seconds(), len(self.reads) + 1)
        self.reads.append(read)
        if self.raising is not None:
            read.result.addErrback(lambda _: None)
            read.fail(self.raising)
            raise self.raising
        return read.result.addErrback(self.after_failure).addCallback(lambda reading: [reading])

    def end_kept(self) -> None:
        """Nothing is kept."""

    @property
    def running(self) -> list[Read]:
        return [read for read in self.reads if not read.result.called]

    @property
    def last(self) -> Read:
        return self.reads[-1]


class World:
    """A CacheService over the fakes."""

    def __init__(
        self,
        *names: str,
        max_connections: int = 2,
        max_load: float = 0.0,
        random: Callable[[], float] = lambda: 1.0,
        heard_all: Callable[[], Deferred[bool]] | None = None,
        **keys: Any,
    ) -> None:
        self.clock = started_clock(START_S)
        self.cache = Cache(without_jitter(*names or ("products",), **keys), self.clock.seconds)
        self.database = FakeDatabase(self.clock)
        self.log = Log()
        process = Process(self.clock, random, self.log, Drain(self.clock))
        self.service = CacheService(
            self.cache, self.database, Limits(max_connections, max_load), process, heard_all=heard_all
        )
        self.notifications = Notifications(self.cache)
        self.notifications.deliver_to(self.service)

    def heard(self, channel: str, payload: str) -> None:
        """A notification arrives."""
        self.notifications.heard(channel, payload)

    @property
    def dataset(self) -> Dataset:
        return self.cache.dataset("products")

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return self.clock.seconds() - START_S

    @property
    def starts(self) -> list[tuple[str, float]]:
        """Each read and when it began, in seconds since the start."""
        return [(read.name, read.began_at - START_S) for read in self.database.reads]

    @property
    def triggers(self) -> list[str]:
        return [attempt.trigger for attempt in self.dataset.attempts]

    def advance(self, seconds: float) -> None:
        """Time passes, and what is due happens at its time."""
        until = self.clock.seconds() + seconds
        while due := [call.getTime() for call in self.clock.getDelayedCalls() if call.getTime() <= until]:
            self.clock.advance(max(0.0, min(due) - self.clock.seconds()))
        self.clock.advance(until - self.clock.seconds())

    def advance_to(self, moment_s: float) -> None:
        self.advance(moment_s - self.now_s)

    def hold(self, seconds: float) -> None:
        """Something holds the reactor: what is due meanwhile happens late, all of it at the end."""
        self.clock.advance(seconds)


class RefreshTestCase(SynchronousTestCase):
    def started(self, *names: str, **options: Any) -> World:
        world = World(*names, **options)
        world.service.startService()
        self.addCleanup(self.stop, world)
        return world

    def stop(self, world: World) -> None:
        if world.service.running:
            self.successResultOf(world.service.stopService())
        self.assertEqual(world.clock.getDelayedCalls(), [])
        self.assertEqual(world.database.running, [])

    def assert_last_line(self, world: World, level: str, event: str, fields: dict[str, Any]) -> None:
        last_level, last_event, last_fields = world.log.lines[-1]
        if "attempt" in last_fields:
            self.assertRegex(last_fields["attempt"], "^[0-9a-f]{8}$")
        without_id = {name: value for name, value in last_fields.items() if name != "attempt"}
        self.assertEqual((last_level, last_event, without_id), (level, event, fields))
