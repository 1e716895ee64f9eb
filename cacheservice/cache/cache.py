"""All datasets, and the state of the database behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from cacheservice.base.errors import UnknownDataset
from cacheservice.cache.capture import CaptureStatus
from cacheservice.cache.counts import Counts
from cacheservice.cache.dataset import Dataset, State
from cacheservice.cache.events import Added, Changed, Events
from cacheservice.cache.identity import ServerIdentity
from cacheservice.cache.lag import NO_LAG, Lag
from cacheservice.cache.reading import is_readable
from cacheservice.cache.workers import WorkerStatus
from cacheservice.config import ConfigFile, DatasetSettings


class DatabaseStatus:
    """The state of PostgreSQL, as the last attempts found it.

    - `connections`: open sessions.
    - `listening_wanted`: whether any dataset needs notifications. `listening`: whether they arrive, last proven at
      `listening_proven_at` on the monotonic clock. `listening_problem`: why they do not.
    - `server`: the server that was read last, None before the first read. `lag`: how far it was behind its primary.
    - `recorded_changes`: the number of changes that triggers have recorded and that are not deleted yet.
      `oldest_change_s`: the age of the oldest, 0 if there is none. None if that is not known.
    - `prune_problem`: why old recorded changes are not deleted.
    - `capture`: the stream of changes from the write-ahead log.
    """

    def __init__(self) -> None:
        self._capture: Callable[[], CaptureStatus] = CaptureStatus
        self.state: Literal["up", "down", "unknown"] = "unknown"
        self.error: str | None = None
        self.server: ServerIdentity | None = None
        self.lag: Lag = NO_LAG
        self.connections = 0
        self.listening_wanted = False
        self.listening = False
        self.listening_proven_at: float | None = None
        self.listening_problem: str | None = None
        self._queued: Callable[[], int] = lambda: 0
        self._login_refused: Callable[[], None] | None = None
        self.recorded_changes: int | None = None
        self.oldest_change_s: float | None = None
        self.prune_problem: str | None = None

    def pruned(self, problem: str | None, kept: int | None, oldest_s: float | None) -> None:
        """Note that old recorded changes were deleted, or why not; None stands for an unknown count or age."""
        self.prune_problem, self.recorded_changes, self.oldest_change_s = problem, kept, oldest_s

    def count_queue_by(self, queued: Callable[[], int]) -> None:
        """Have `queued` return the number of refreshes that wait for a session."""
        self._queued = queued

    def queued(self) -> int:
        """Return the number of refreshes that wait for a session."""
        return self._queued()

    @property
    def capture(self) -> CaptureStatus:
        return self._capture()

    def see_capture_by(self, capture: Callable[[], CaptureStatus]) -> None:
        """Have `capture` return the state of the stream of changes."""
        self._capture = capture

    def session_opened(self) -> None:
        """Count an open session."""
        self.connections += 1

    def session_closed(self) -> None:
        """Count a session that is not open any more."""
        self.connections -= 1

    def want_listening(self, wanted: bool) -> None:
        """Note whether any dataset needs notifications."""
        self.listening_wanted = wanted

    def listens(self, proven_at: float) -> None:
        """Note that notifications arrive, as was proven at a moment on the monotonic clock."""
        self.listening, self.listening_proven_at, self.listening_problem = True, proven_at, None

    def hears_nothing(self, problem: str) -> None:
        """Note why notifications do not arrive."""
        self.listening, self.listening_problem = False, problem

    def stopped_listening(self) -> None:
        """Note that nothing listens, and that nothing is wrong with that."""
        self.listening, self.listening_proven_at, self.listening_problem = False, None, None

    def answered(self) -> None:
        self.state, self.error = "up", None

    def seen(self, server: ServerIdentity | None, lag: Lag) -> None:
        """Note the server on which a transaction runs, or whose result is about to be published."""
        self.server = server
        self.lag = lag

    def failed(self, error: str, *, login_refused: bool = False) -> None:
        self.state, self.error = "down", error
        if login_refused and self._login_refused is not None:
            self._login_refused()

    def watch_refused_logins(self, refused: Callable[[], None]) -> None:
        """Call `refused` each time the server refuses the role or its password. It must not raise."""
        self._login_refused = refused


class Rejection(NamedTuple):
    """The problems of a refused configuration, one a line, and when it was refused on the cache's clock."""

    problems: tuple[str, ...]
    at: float


class ConnectionCap(NamedTuple):
    """The limit of open files allows a port fewer clients than configured."""

    limit: int
    configured: int
    open_files: int


class Declared(NamedTuple):
    """The names of the datasets by what a changed configuration did to them."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    unchanged: list[str]


class Reloaded(NamedTuple):
    """The effect of a changed configuration: the datasets, the keys that need a restart, and its file."""

    datasets: Declared
    needs_restart: list[str]
    file: ConfigFile


class Cache:
    """The datasets by name, in the order of the configuration.

    `rejection` describes a newer configuration that was refused. `stopping` is set once the service begins to stop.

    :param now: the monotonic clock, in seconds.
    :param config_file: the configuration file that is in effect, for the status.
    """

    def __init__(
        self, datasets: Iterable[DatasetSettings], now: Callable[[], float], config_file: ConfigFile | None = None
    ) -> None:
        self.events = Events()
        self._datasets = {settings.name: Dataset(settings, now, events=self.events) for settings in datasets}
        self._last_generations: dict[str, int] = {}
        self._counts: dict[str, Counts] = {}
        self.database = DatabaseStatus()
        self.rejection: Rejection | None = None
        self.stopping = False
        self.now = now
        self.started_at = now()
        self.connection_cap: ConnectionCap | None = None
        self.config_file = config_file
        self._untried = set(self._datasets)
        self._workers: Callable[[], Sequence[WorkerStatus]] = tuple

    @property
    def datasets(self) -> Mapping[str, Dataset]:
        return MappingProxyType(self._datasets)

    def dataset(self, name: str) -> Dataset:
        """:raises UnknownDataset: if none has that name."""
        try:
            return self._datasets[name]
        except KeyError:
            raise UnknownDataset(f"unknown dataset '{name}'") from None

    def declare(self, declared: Iterable[DatasetSettings]) -> Declared:
        """Replace the declared datasets. Datasets that were declared before keep their state."""
        wanted = {settings.name: settings for settings in declared}
        before = self._datasets
        self._datasets = {
            name: before.get(name)
            or Dataset(
                settings, self.now, self._last_generations.get(name, 0), self._counts.pop(name, None), self.events
            )
            for name, settings in wanted.items()
        }
        fates = Declared([], [], [], [])
        for name, dataset in self._datasets.items():
            if name not in before:
                fates.added.append(name)
                self.events.notify(Added(name))
            elif dataset.settings != wanted[name]:
                fates.changed.append(name)
                dataset.change(wanted[name])
                self.events.notify(Changed(name))
            else:
                fates.unchanged.append(name)
        fates.removed.extend(name for name in before if name not in wanted)
        for name in fates.removed:
            # A generation that readers have seen is never used again, not even if the dataset is declared again.
            self._last_generations[name] = before[name].last_generation
            self._counts[name] = before[name].counts
            before[name].end()
        return fates

    def configured_by(self, file: ConfigFile) -> None:
        """Note the configuration file that is in effect, for the status; no newer one is refused."""
        self.config_file = file
        self.rejection = None

    def reject(self, problems: Sequence[str]) -> None:
        """Note that a newer configuration was refused, for the status."""
        self.rejection = Rejection(tuple(problems), self.now())

    def stop(self) -> None:
        """Note that the service begins to stop."""
        self.stopping = True

    def cap_connections(self, cap: ConnectionCap) -> None:
        """Note that clients are capped, for the status."""
        self.connection_cap = cap

    def see_workers_by(self, workers: Callable[[], Sequence[WorkerStatus]]) -> None:
        """Have `workers` return the workers of this process, for the status."""
        self._workers = workers

    def workers(self) -> Sequence[WorkerStatus]:
        """Return the workers of this process; none if it serves all clients itself."""
        return self._workers()

    @property
    def is_starting(self) -> bool:
        """Whether the first attempts after the start are still running.

        Only required datasets count, or all of them if none is required. A restored dataset counts as tried.
        """
        if self._untried:
            any_required = any(dataset.settings.required for dataset in self._datasets.values())
            self._untried = {
                name
                for name in self._untried & self._datasets.keys()
                if not _was_tried(self._datasets[name]) and (self._datasets[name].settings.required or not any_required)
            }
        return bool(self._untried)

    @property
    def is_ready(self) -> bool:
        """Whether clients should be sent here: every required dataset can be read, and the service is not stopping."""
        return not self.stopping and not self.not_ready()

    def not_ready(self) -> dict[str, State]:
        """Return the required datasets that cannot be read, with their states.

        An outage of the database expires the datasets of every replica in the same second. If expired replicas were
        unready, none would be left to serve data that may still be served.
        """
        required = {name: dataset for name, dataset in self._datasets.items() if dataset.settings.required}
        return {name: d.state() for name, d in required.items() if not is_readable(d.state(), d.settings.on_expired)}


def _was_tried(dataset: Dataset) -> bool:
    """Return whether an attempt has ended, or a saved snapshot is served."""
    return dataset.snapshot is not None or dataset.last_ended_at is not None


class Refreshes(Protocol):
    """The requests that a port may make to the refreshes.

    In a process that does not refresh, each of them raises `Stopped`.
    """

    def refresh_now(self, name: str) -> bool:
        """Start a refresh that begins after this call; return False if it follows a running one.

        :raises UnknownDataset: if none has that name.
        """

    def accept_next(self, name: str) -> None:
        """Let the next result pass the gates, once.

        :raises UnknownDataset: if none has that name.
        """

    def pin(self, name: str) -> list[str]:
        """Keep serving the same snapshots of the whole group until `unpin`; return the names.

        :raises UnknownDataset: if none has that name.
        :raises NothingToPin: if a dataset of the group has not been loaded.
        """

    def unpin(self, name: str) -> list[str]:
        """Serve the newest results of the whole group again; return the names.

        :raises UnknownDataset: if none has that name.
        """

    def roll_back(self, name: str) -> dict[str, int]:
        """Begin to serve the saved generation before the served one, pinned, of the whole group.

        Returns the saved generations by name.

        :raises UnknownDataset: if none has that name.
        :raises NothingToRollBackTo: if no such generation is saved.
        """

    def refresh_since(self, name: str, moment: float) -> None:
        """Ensure that a refresh begins at or after `moment`, unless such a refresh is already running.

        One refresh serves all callers.

        :param moment: on the monotonic clock, in seconds.
        :raises UnknownDataset: if none has that name.
        :raises Stopped: if the service is stopping.
        """
