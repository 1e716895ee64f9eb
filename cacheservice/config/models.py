"""The tables of the configuration and their keys, as frozen models with defaults and descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from cacheservice.config import session_rules
from cacheservice.config.values import (
    DEFAULT_PUBLICATION,
    SearchPath,
    SessionSettings,
    Sql,
    TimerSeconds,
    channel,
    columns,
    held_by_a_timer,
    relation,
    statsd_prefix,
    tables_of_watch,
    valkey,
    without_lookup,
)


class Table(BaseModel):
    """A TOML table. Strict, because TOML has types: a number in quotes is a mistake, and true is not a number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, hide_input_in_errors=True
    )


AnyTable = TypeVar("AnyTable", bound=Table)


class PostgresSettings(Table):
    dsn: SecretStr = Field(min_length=1, description="the database to read, as a libpq URI or key=value string")
    connect_timeout_s: TimerSeconds = Field(default=5.0, description="seconds that a connection may take to open")
    max_connections: int = Field(
        default=2, ge=1, description="refreshes that may hold a connection at once; others queue, stalest first"
    )
    max_load: float = Field(
        default=0.0,
        ge=0,
        description="share of one connection's time that refreshes may use over a minute, 0.1 = 6 s; 0 = no limit",
    )
    capture: Literal["auto", "triggers", "logical"] = Field(
        default="auto",
        description='how changes of watched tables are found: by "logical" decoding, by "triggers", or "auto": by '
        "logical decoding if that can work, else by triggers",
    )
    publication: str = Field(
        default=DEFAULT_PUBLICATION,
        min_length=1,
        max_length=63,
        description="the publication that logical decoding reads; `cacheservice watch --logical` creates it",
    )
    search_path: SearchPath = Field(
        default=session_rules.DEFAULT_SEARCH_PATH,
        min_length=1,
        description="schemas that are searched for unqualified names, as SQL writes them",
    )
    settings: SessionSettings = Field(
        default={}, description='settings of PostgreSQL for all queries, such as {TimeZone = "Europe/Berlin"}'
    )


class StatusSettings(Table):
    host: Annotated[str, AfterValidator(without_lookup)] = Field(
        default="127.0.0.1",
        description='address that the status port listens on: an IP address, "localhost", or "::" for all',
    )
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port of the status port; 0 = any free one")


class AdminSettings(Table):
    socket: str = Field(
        default="", description="path of the unix socket for commands, created with mode 600; empty = off"
    )


class RespSettings(Table):
    enabled: bool = Field(default=True, description="whether the Redis protocol is served")
    host: Annotated[str, AfterValidator(without_lookup)] = Field(
        default="127.0.0.1",
        description='address that the RESP port listens on: an IP address, "localhost", or "::" for all',
    )
    port: int = Field(default=6380, ge=0, le=65535, description="TCP port of the Redis protocol; 0 = any free one")
    password: SecretStr = Field(default=SecretStr(""), description="when set, clients must AUTH with it")
    idle_timeout_s: Annotated[float, Field(ge=0), AfterValidator(held_by_a_timer)] = Field(
        default=0.0, description="seconds after which an idle client is disconnected; 0 = never, as in Redis"
    )


class HttpSettings(Table):
    enabled: bool = Field(default=True, description="whether HTTP is served")
    host: Annotated[str, AfterValidator(without_lookup)] = Field(
        default="127.0.0.1",
        description='address that the HTTP port listens on: an IP address, "localhost", or "::" for all',
    )
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port of HTTP; 0 = any free one")
    token: SecretStr = Field(
        default=SecretStr(""),
        description='when set, /v1, / and /events require "Authorization: Bearer" with it; probes and metrics never do',
    )
    admin_token: SecretStr = Field(
        default=SecretStr(""),
        description="when set, clients that send it may refresh, accept, pin and roll back; else HTTP is read-only",
    )


class LimitsSettings(Table):
    max_connections: int = Field(
        default=10_000,
        ge=1,
        description="clients that each port serves at once, as far as the limit of open files allows",
    )
    idle_timeout_s: TimerSeconds = Field(
        default=300.0,
        description="seconds of silence after which a client is disconnected; on RESP, only during a request or reply",
    )
    max_old_generations: int = Field(
        default=4, ge=1, description="generations of a dataset, besides the served one, that slow readers may keep"
    )
    max_answer_s: TimerSeconds = Field(
        default=600.0, description="seconds that a reply may still take once newer data are served"
    )
    allow_anonymous: bool = Field(
        default=False, description="whether other machines may read data without a password or a token"
    )


class LogSettings(Table):
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severity that is logged"
    )
    format: Literal["json", "console"] = Field(default="json", description='"json" for machines, "console" for people')


class PersistenceSettings(Table):
    directory: str = Field(
        default="",
        description="folder in which snapshots are saved for a warm start, created with mode 700; empty = off",
    )
    min_save_interval_s: float = Field(default=60.0, ge=0, description="minimum seconds between two saves of a dataset")
    keep_generations: int = Field(
        default=3, ge=1, description="saved generations of a dataset that are kept, for `rollback`"
    )


class ClusterSettings(Table):
    enabled: bool = Field(
        default=False, description="whether one process of a fleet refreshes each dataset, and the others follow it"
    )
    valkey_url: Annotated[SecretStr, AfterValidator(valkey)] = Field(
        default=SecretStr("redis://127.0.0.1:6379"),
        description="the Valkey that carries the results: redis://[user:password@]host:port[,host:port][/database]; "
        "rediss:// for TLS, redis+sentinel://host:port/name for sentinels",
    )
    prefix: str = Field(
        default="cacheservice", min_length=1, description="prefix of all keys; fleets of other prefixes are independent"
    )
    name: str = Field(default="", description="name of this process, for people; its host and process id unless set")
    fallback_after_s: TimerSeconds = Field(
        default=60.0, description="seconds without results of a leader after which a process refreshes for itself"
    )


class StatsdSettings(Table):
    host: str = Field(default="", description="name or address of the StatsD server for metrics; empty = off")
    port: int = Field(default=8125, ge=1, le=65535, description="UDP port of the StatsD server")
    prefix: Annotated[str, AfterValidator(statsd_prefix)] = Field(
        default="cacheservice", description="prefix of the metric names, before a dot"
    )


class WorkersSettings(Table):
    processes: int = Field(
        default=0,
        ge=0,
        le=64,
        description="worker processes that serve the RESP port and the HTTP port; 0 = the service is one process",
    )


class WatchSettings(Table):
    """A table with the triggers of `cacheservice watch`, and its columns whose values identify a row of the dataset."""

    table: Annotated[str, AfterValidator(relation)] = Field(description="a table that the query reads, with its schema")
    key: Annotated[tuple[str, ...], BeforeValidator(columns)] = Field(
        description="the columns of the table that contain the key"
    )


class DefaultsSettings(Table):
    """The keys that a dataset inherits from ``[defaults]`` unless it sets them itself."""

    interval_s: TimerSeconds = Field(
        default=600.0, description="seconds from the start of one refresh to the start of the next"
    )
    timeout_s: TimerSeconds = Field(
        default=30.0, description="deadline of a whole refresh in seconds, connecting included"
    )
    max_age_s: float = Field(
        # interval_s is absent if it was refused; then its refusal is reported.
        default_factory=lambda earlier: 3 * earlier.get("interval_s", 1.0),
        gt=0,
        description="age in seconds past which a snapshot is expired; 3 x interval_s unless set",
    )
    on_expired: Literal["serve", "refuse"] = Field(
        default="serve", description='"refuse" makes reads fail, and the service unready, once the snapshot is expired'
    )
    required: bool = Field(default=True, description="whether the service is ready only when this dataset can be read")
    retry_initial_s: TimerSeconds = Field(
        default=1.0, description="seconds within which the first retry starts; doubled with each failure"
    )
    retry_max_s: TimerSeconds = Field(default=60.0, description="seconds within which any later retry starts")
    jitter: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="largest share of the interval by which each start is moved, fixed per process",
    )
    min_rows: int = Field(default=0, ge=0, description="a result with fewer rows is held, not published")
    max_shrink: float = Field(
        default=0.5, ge=0, le=1, description="a result that loses more than this share of the rows is held"
    )
    on_column_removed: Literal["hold", "publish"] = Field(
        default="hold", description="what to do with a result that lacks a column of the previous result"
    )
    max_rows: int = Field(default=0, ge=0, description="rows past which a refresh fails; 0 = no limit")
    max_bytes: int = Field(default=0, ge=0, description="bytes of result past which a refresh fails; 0 = no limit")
    notify: Annotated[str, AfterValidator(channel)] = Field(
        default="",
        description="LISTEN channel: a NOTIFY starts a refresh at once; a JSON list of keys limits it to them",
    )
    probe: Sql = Field(
        default="", description="SQL that returns one value; while the value is unchanged, nothing is fetched"
    )
    group: str = Field(
        default="",
        max_length=63,
        description="datasets of a group are read in one transaction, and published together or not at all",
    )
    watch: Annotated[tuple[WatchSettings, ...], BeforeValidator(tables_of_watch)] = Field(
        default=(), description="tables, each with its key, whose changed rows are read instead of all rows; see Deltas"
    )
    max_delta: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the rows past which a refresh reads all rows instead of the changed ones",
    )
    full_interval_s: TimerSeconds = Field(
        default=3600.0,
        description="with watch, probe or notify: seconds after which everything is read again, as a check",
    )
    search_path: SearchPath = Field(
        default="", description="like postgres.search_path, for this query; empty = that one"
    )
    settings: SessionSettings = Field(
        default={}, description="like postgres.settings, for this query; added to those, or overriding them"
    )
    key_separator: str = Field(
        default=":",
        min_length=1,
        max_length=8,
        description="separator between the values of a key of several columns",
    )
    key_escape: bool = Field(
        default=False, description="whether a separator or a backslash within such a value gets a backslash before it"
    )


class DatasetSettings(DefaultsSettings):
    """One declared query. `key` is the columns whose values, joined with ``:``, name a row."""

    name: str
    query: Sql = Field(min_length=1, description="the SQL whose result is kept")
    key: Annotated[tuple[str, ...], BeforeValidator(columns)] = Field(
        description='the column that names a row, or a list of columns to join with ":"'
    )

    @property
    def definition(self) -> tuple[object, ...]:
        """The values that decide which rows there are, and their keys."""
        return self.query, self.key, *((self.key_separator, self.key_escape) if len(self.key) > 1 else ())

    @property
    def reading(self) -> tuple[object, ...]:
        """The values that decide how the dataset is read."""
        return *self.definition, self.probe, self.watch, self.notify, self.search_path, self.settings

    @field_validator("key_escape")
    @classmethod
    def _of_one_character(cls, key_escape: bool, earlier: ValidationInfo) -> bool:
        separator = earlier.data.get("key_separator", ":")
        if key_escape and (len(separator) != 1 or separator == "\\"):
            raise ValueError("requires a key_separator of one character other than a backslash")
        return key_escape

    @field_validator("retry_max_s")
    @classmethod
    def _not_below_the_first(cls, retry_max_s: float, earlier: ValidationInfo) -> float:
        if retry_max_s < (retry_initial_s := earlier.data.get("retry_initial_s", 0.0)):
            raise ValueError(f"must be at least retry_initial_s, which is {retry_initial_s:g}")
        return retry_max_s


_DatasetName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]


class Settings(Table):
    """The whole configuration, frozen. `datasets` is read-only and in the order of declaration.

    Each dataset already contains the values that it inherits from `defaults` and `postgres`.
    """

    postgres: PostgresSettings
    status: StatusSettings = StatusSettings()
    admin: AdminSettings = AdminSettings()
    resp: RespSettings = RespSettings()
    http: HttpSettings = HttpSettings()
    limits: LimitsSettings = LimitsSettings()
    log: LogSettings = LogSettings()
    persistence: PersistenceSettings = PersistenceSettings()
    cluster: ClusterSettings = ClusterSettings()
    statsd: StatsdSettings = StatsdSettings()
    workers: WorkersSettings = WorkersSettings()
    defaults: DefaultsSettings = DefaultsSettings()
    datasets: Mapping[_DatasetName, DatasetSettings]

    @field_validator("datasets")
    @classmethod
    def _at_least_one(
        cls, datasets: Mapping[str, DatasetSettings], earlier: ValidationInfo
    ) -> Mapping[str, DatasetSettings]:
        if not datasets:
            raise ValueError("none declared; add a [datasets.NAME] table with query and key")
        postgres = earlier.data.get("postgres")
        if postgres is None:  # it was refused, and the refusal is reported
            return MappingProxyType(dict(datasets))
        return MappingProxyType({name: _of_session(dataset, postgres) for name, dataset in datasets.items()})


def _of_session(dataset: DatasetSettings, postgres: PostgresSettings) -> DatasetSettings:
    """Return `dataset` with the settings of all sessions, unless it has its own."""
    return dataset.model_copy(
        update={
            "search_path": dataset.search_path or postgres.search_path,
            "settings": session_rules.merged(postgres.settings, dataset.settings),
        }
    )
