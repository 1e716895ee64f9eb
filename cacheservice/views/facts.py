"""The facts that an operator may know about a service, as immutable values.

`collect` takes them from the cache of this process, and `json.read` from the JSON of another one. Renderers get these
values only, never the objects that they were taken from.

Ages and durations are in seconds, as of the moment of collection. States and outcomes are plain strings, because
another version of the service may use other ones. No fact contains a DSN, a password or a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from cacheservice.config import DatasetSettings


@dataclass(frozen=True, slots=True)
class ConnectionCap:
    """The limit of open files allows fewer clients than configured."""

    limit: int
    configured: int
    open_files: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """A newer configuration that was refused, and how long ago."""

    problem: str
    ago_s: float


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process: its state is `starting`, `serving` or `down`.

    :param number: from 1; it stays when the process is started again.
    :param pid: None while it is down.
    :param connections: its clients by port.
    :param restarts: how often it was started again since the start of the service.
    """

    number: int
    pid: int | None
    state: str
    connections: Mapping[str, int]
    restarts: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Service:
    """The process as a whole.

    :param workers: none in a service that serves its clients itself.
    :param not_ready: the states of the required datasets that cannot be read, by name.
    :param stopping: not in the JSON.
    :param configured_at: when the configuration file in effect was modified; not in the JSON.
    """

    version: str
    ready: bool
    pid: int = 0
    uptime_s: float = 0.0
    not_ready: Mapping[str, str] = field(default_factory=dict)
    connection_cap: ConnectionCap | None = None
    rejection: Rejection | None = None
    stopping: bool = False
    configured_at: datetime | None = None
    workers: tuple[Worker, ...] = ()


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a standby may be behind its primary.

    :param known: False if the primary may be idle, so that the bound may be too high.
    :param problem: the reason; empty if the standby is up to date.
    """

    seconds: float
    known: bool
    problem: str


@dataclass(frozen=True, slots=True)
class Capture:
    """The stream of changes from the write-ahead log; its states are those of `cacheservice.cache.capture`.

    :param problem: why nothing is streamed; for `waiting`, the sessions with the open transactions.
    :param slot: None while there is no session.
    :param lag_bytes: of the log that is not decoded yet, and `lag_s` for how long; 0 while nothing is streamed.
    :param retained_bytes: of the log that the server keeps for the slot; None if unknown.
    :param limit_bytes: beyond which the server invalidates the slot; None without a limit.
    :param kept_keys: changed keys in memory, which take `kept_bytes`.
    :param transactions: that have changed published tables since the start, as `keys` of their rows.
    :param restarts: how often a stream ended, by reason.
    """

    state: str
    problem: str | None = None
    slot: str | None = None
    lag_bytes: int = 0
    lag_s: float = 0.0
    retained_bytes: int | None = None
    limit_bytes: int | None = None
    kept_keys: int = 0
    kept_bytes: int = 0
    transactions: int = 0
    keys: int = 0
    restarts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Database:
    """PostgreSQL, as the last attempts saw it.

    :param listening_wanted: whether a dataset waits for notifications.
    :param listening_proven_s: the time since a test notification last arrived; not in the JSON.
    :param standby: None for a primary.
    :param recorded_changes: None if the number is unknown, as is `oldest_change_s`.
    :param prune_problem: why old recorded changes are not deleted.
    :param capture: None if no dataset needs it, or with `capture = "triggers"`.
    """

    state: str = "unknown"
    error: str | None = None
    connections: int = 0
    listening: bool = False
    listening_wanted: bool = False
    listening_problem: str | None = None
    listening_proven_s: float | None = None
    standby: Lag | None = None
    recorded_changes: int | None = None
    oldest_change_s: float | None = None
    prune_problem: str | None = None
    capture: Capture | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A result that a gate refused: the reason, the time of the first refusal, and its number of rows."""

    reason: str
    since: datetime
    rows: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A read in progress; `expected_rows` is None if the planner has no estimate."""

    rows: int
    expected_rows: int | None


@dataclass(frozen=True, slots=True)
class Change:
    """How many rows a publish added, changed and removed."""

    added: int
    changed: int
    removed: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt to refresh that has ended.

    :param advice: the next step for an operator.
    :param blocked_by: the sessions that held the lock, in words.
    :param id: its id in the log and in the session's application_name; not in the JSON.
    :param how: how the rows were read, in words; not in the JSON.
    """

    outcome: str
    trigger: str
    started_at: datetime
    took_s: float
    rows: int | None = None
    error: str | None = None
    advice: str | None = None
    blocked_by: tuple[str, ...] = ()
    id: str = ""
    how: str = ""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The part of this process in the fleet, for one dataset: its role is `leader`, `replica` or `alone`.

    :param process: the name of this process.
    :param leader: the name of the process with the newest lead, and `epoch` of that lead; None if none is known.
    :param lag_generations: how many generations the leader has published that this process lacks; None for a leader,
        and if that is not known.
    :param leader_silent_s: the time for which no new results of a leader have come; 0 for a leader.
    :param valkey_problem: why the Valkey cannot be used.
    :param publish_problem: why the results of this process cannot be published.
    :param lead_problem: why this process cannot win a lead.
    """

    role: str
    process: str
    epoch: int | None = None
    leader: str | None = None
    lag_generations: int | None = None
    leader_silent_s: float = 0.0
    valkey_problem: str | None = None
    publish_problem: str | None = None
    lead_problem: str | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """The state of one dataset.

    :param as_of: the database's clock when the served snapshot was read; None before the first load.
    :param standby: the standby of the served read, if that was behind its primary.
    :param without_deltas_s: for how long deltas have not worked; None without `watch`.
    :param capture: how changes of its tables are captured since the newest read: by `logical` decoding, by `triggers`,
        or `nothing`; None without `watch`, before the first load, and if another process reads the dataset.
    :param not_logical: why not by logical decoding, if that was tried and triggers record the changes.
    :param behind_s: for how long postgres.max_load has delayed a refresh; None if it delays none. Not in the JSON.
    :param fleet: None without a fleet.
    """

    name: str
    state: str
    interval_s: float
    timeout_s: float
    max_age_s: float
    refreshing: bool = False
    held: Held | None = None
    pinned: bool = False
    rows: int = 0
    bytes: int = 0
    generation: int = 0
    as_of: datetime | None = None
    age_s: float | None = None
    age_uncertain: str | None = None
    source: str | None = None
    progress: Progress | None = None
    consecutive_failures: int = 0
    next_refresh_in_s: float | None = None
    last_attempt: Attempt | None = None
    last_change: Change | None = None
    standby: Lag | None = None
    save_problem: str | None = None
    without_deltas_s: float | None = None
    capture: str | None = None
    not_logical: str | None = None
    behind_s: float | None = None
    fleet: Fleet | None = None

    @property
    def advice(self) -> str | None:
        """The next step for an operator; None if there is none, or no problem."""
        last = self.last_attempt
        if last is None or not (last.outcome == "failed" or (last.outcome == "held" and self.held is not None)):
            return None
        return last.advice

    @property
    def blocked_by(self) -> tuple[str, ...]:
        """The sessions that blocked the last attempt, if it failed."""
        last = self.last_attempt
        return last.blocked_by if last is not None and last.outcome == "failed" else ()


@dataclass(frozen=True, slots=True)
class Details:
    """More about one dataset, for `show`, `why` and the dashboard.

    :param attempts: the last attempts, oldest first.
    :param last_ended_s: the time since the last attempt ended.
    :param held_for_s: the time since a gate first refused a result.
    :param candidate_rows: the rows of the newest result of a pinned dataset; None if there is none.
    :param redefined: whether the served snapshot is the result of another query or key than configured now.
    :param last_put_off_s: by how much postgres.max_load delayed the last refresh.
    :param without_deltas_because: why the last read could not be a delta.
    :param differences: rows for which a full read disagreed with the deltas before it.
    """

    dataset: Dataset
    settings: DatasetSettings
    attempts: tuple[Attempt, ...] = ()
    last_ended_s: float | None = None
    held_for_s: float = 0.0
    candidate_rows: int | None = None
    rolled_back_to: int | None = None
    redefined: bool = False
    accepts_next: bool = False
    missed_ticks: int = 0
    last_put_off_s: float = 0.0
    without_deltas_because: str | None = None
    differences: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """The attempts that ended within one slot of 10 s, combined; see `cache.history.Point`."""

    slot: int
    ago_s: float
    took_s: float
    age_s: float | None
    outcome: str


@dataclass(frozen=True, slots=True)
class Facts:
    """A service, its database and its datasets.

    :param at: the moment of collection, by the wall clock of the process that renders the facts.
    :param datasets: by name, in the order of the configuration.
    """

    at: datetime
    service: Service
    database: Database
    datasets: Mapping[str, Dataset]

    def only(self, names: Collection[str]) -> Facts:
        """Return the facts with the named datasets only; with all of them without names."""
        if not names:
            return self
        return replace(self, datasets={name: each for name, each in self.datasets.items() if name in names})
