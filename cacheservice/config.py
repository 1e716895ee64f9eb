"""The configuration: one TOML file, overridden by the environment, checked as a whole, then frozen.

`load` tells every problem at once, each under the name its value was given by: the file and its key, or the
environment variable. No problem ever holds a value, so none can hold a secret.

Reading is plain pydantic: pydantic-settings would merge the two sources for us, but it splits a variable at each
``__`` (which a dataset's name may hold), forgets which source a value came from, passes over most unknown variables,
and logs values when PYDANTIC_SETTINGS_DEBUG is set.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cacheservice import query_text, session_rules
from cacheservice.errors import ConfigError
from cacheservice.toml_errors import explained

DEFAULT_FILE = "cacheservice.toml"
CLIENT_SECRETS = ("resp.password", "http.token", "http.admin_token")
"""The secrets that clients send."""
_PREFIX = "CACHESERVICE_"
OWN_CHANNEL = "cacheservice"
"""On which the triggers of watch notify, and the service proves that it listens."""

# Where a value stands: ("datasets", "products", "interval_s"); () is the file itself.
_Place = tuple[str, ...]


# What single values may be. A ValueError's text is the problem's, word for word.


def _held_by_a_timer(seconds: float) -> float:
    if seconds > 2_000_000:
        raise ValueError("must be at most 2000000 (23 days): the reactor's timers hold at most 24 days")
    return seconds


def _without_lookup(host: str) -> str:
    if host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(
                'must be an IP address or "localhost": another name would need a blocking look-up'
            ) from None
    return host


def _columns(value: object) -> tuple[object, ...]:
    columns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not columns or not all(isinstance(column, str) and column for column in columns):
        raise ValueError("must be the name of a column, or a list of such names")
    return columns


def _channel(name: str) -> str:
    if "\0" in name:
        raise ValueError("must not hold a NUL")
    if len(name.encode()) > 63:
        raise ValueError("must be at most 63 bytes long, as PostgreSQL's names are")
    if name == OWN_CHANNEL:
        raise ValueError(f'must not be "{OWN_CHANNEL}", which is the channel of the triggers of watch')
    return name


def _statsd_prefix(prefix: str) -> str:
    if prefix and not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", prefix):
        raise ValueError("must be words of letters, digits, _ and -, with dots between them")
    return prefix


def _relation(name: str) -> str:
    if not re.fullmatch(rf"{session_rules.IDENTIFIER}(?:\.{session_rules.IDENTIFIER})?", name):
        raise ValueError("must be the name of a table as SQL writes it, such as public.products")
    return name


def _tables(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError('must be a list of tables, such as [{table = "public.products", key = "id"}]')
    return tuple(value)


_Sql = Annotated[str, AfterValidator(query_text.closed)]
_SearchPath = Annotated[str, AfterValidator(session_rules.search_path)]
_SessionSettings = Annotated[Mapping[str, str], BeforeValidator(session_rules.session_settings)]
# A duration that becomes a timer of the reactor.
_TimerSeconds = Annotated[float, Field(gt=0), AfterValidator(_held_by_a_timer)]


class _Table(BaseModel):
    """A TOML table. Strict, because TOML has types: a number in quotes is a slip, and true is no number."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, hide_input_in_errors=True
    )


_AnyTable = TypeVar("_AnyTable", bound=_Table)


class PostgresSettings(_Table):
    dsn: SecretStr = Field(min_length=1, description="the database to read, as a libpq URI or key=value string")
    connect_timeout_s: _TimerSeconds = Field(default=5.0, description="seconds that a connection may take to open")
    max_connections: int = Field(
        default=2, ge=1, description="refreshes that may hold a connection at once; others queue, stalest first"
    )
    max_load: float = Field(
        default=0.0,
        ge=0,
        description="share of one connection's time that refreshes may use over a minute, 0.1 = 6 s; 0 = no limit",
    )
    search_path: _SearchPath = Field(
        default=session_rules.DEFAULT_SEARCH_PATH,
        min_length=1,
        description="schemas in which names without one are found, as SQL writes them",
    )
    settings: _SessionSettings = Field(
        default={}, description='settings of PostgreSQL for all queries, such as {TimeZone = "Europe/Berlin"}'
    )


class StatusSettings(_Table):
    host: Annotated[str, AfterValidator(_without_lookup)] = Field(
        default="127.0.0.1",
        description='address that the status port listens on: an IP address, "localhost", or "::" for all',
    )
    port: int = Field(
        default=8000, ge=0, le=65535, description="TCP port that answers status questions; 0 = any free one"
    )


class AdminSettings(_Table):
    socket: str = Field(
        default="", description="path of the unix socket that takes commands, made with mode 600; empty = off"
    )


class RespSettings(_Table):
    enabled: bool = Field(default=True, description="whether the Redis protocol is served")
    host: Annotated[str, AfterValidator(_without_lookup)] = Field(
        default="127.0.0.1",
        description='address that the RESP port listens on: an IP address, "localhost", or "::" for all',
    )
    port: int = Field(default=6380, ge=0, le=65535, description="TCP port of the Redis protocol; 0 = any free one")
    password: SecretStr = Field(default=SecretStr(""), description="when set, clients must AUTH with it")
    idle_timeout_s: Annotated[float, Field(ge=0), AfterValidator(_held_by_a_timer)] = Field(
        default=0.0, description="seconds after which a client that asks nothing is dropped; 0 = never, as in Redis"
    )


class HttpSettings(_Table):
    enabled: bool = Field(default=True, description="whether HTTP is served")
    host: Annotated[str, AfterValidator(_without_lookup)] = Field(
        default="127.0.0.1",
        description='address that the HTTP port listens on: an IP address, "localhost", or "::" for all',
    )
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port of HTTP; 0 = any free one")
    token: SecretStr = Field(
        default=SecretStr(""),
        description='when set, /v1, / and /events want "Authorization: Bearer" with it; probes and metrics never do',
    )
    admin_token: SecretStr = Field(
        default=SecretStr(""),
        description="when set, whoever sends it may also refresh, accept, pin and roll back; else HTTP only reads",
    )


class LimitsSettings(_Table):
    max_connections: int = Field(
        default=10_000,
        ge=1,
        description="clients that each port serves at once, as far as the limit of open files allows",
    )
    idle_timeout_s: _TimerSeconds = Field(
        default=300.0,
        description="seconds of silence after which a client is dropped; on RESP, one within a request or an answer",
    )
    max_old_generations: int = Field(
        default=4, ge=1, description="generations of a dataset, besides the served one, that slow readers may keep"
    )
    max_answer_s: _TimerSeconds = Field(
        default=600.0, description="seconds that one answer may take once newer data are served"
    )
    allow_anonymous: bool = Field(
        default=False, description="whether other machines may read data without a password or a token"
    )


class LogSettings(_Table):
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severity that is logged"
    )
    format: Literal["json", "console"] = Field(
        default="json", description='"json" for machines, "console" for a person'
    )


class PersistenceSettings(_Table):
    directory: str = Field(
        default="", description="folder in which snapshots are saved for a warm start, made with mode 700; empty = off"
    )
    min_save_interval_s: float = Field(
        default=60.0, ge=0, description="seconds that pass at least from one save of a dataset to its next"
    )
    keep_generations: int = Field(
        default=3, ge=1, description="saved generations of a dataset that are kept, for `rollback`"
    )


class StatsdSettings(_Table):
    host: str = Field(default="", description="name or address of the StatsD server that metrics go to; empty = off")
    port: int = Field(default=8125, ge=1, le=65535, description="its UDP port")
    prefix: Annotated[str, AfterValidator(_statsd_prefix)] = Field(
        default="cacheservice", description="what the names of its metrics begin with, before a dot"
    )


class WatchSettings(_Table):
    """A table with the triggers of `cacheservice watch`, and its columns whose values name a row of the dataset."""

    table: Annotated[str, AfterValidator(_relation)] = Field(
        description="a table that the query reads, with its schema"
    )
    key: Annotated[tuple[str, ...], BeforeValidator(_columns)] = Field(description="its columns that hold the key")


class DefaultsSettings(_Table):
    """The keys that every dataset takes from ``[defaults]`` unless it sets them itself."""

    interval_s: _TimerSeconds = Field(
        default=600.0, description="seconds from the start of one refresh to that of the next"
    )
    timeout_s: _TimerSeconds = Field(
        default=30.0, description="deadline of a whole refresh in seconds, connecting included"
    )
    max_age_s: float = Field(
        # interval_s is absent when it was refused; the refusal is what gets reported then.
        default_factory=lambda earlier: 3 * earlier.get("interval_s", 1.0),
        gt=0,
        description="age in seconds past which a snapshot is expired; 3 x interval_s unless set",
    )
    on_expired: Literal["serve", "refuse"] = Field(
        default="serve", description='"refuse" makes reads fail, and the service unready, once the snapshot is expired'
    )
    required: bool = Field(default=True, description="whether the service is ready only when this dataset can be read")
    retry_initial_s: _TimerSeconds = Field(
        default=1.0, description="seconds within which the first retry starts; doubled with each failure"
    )
    retry_max_s: _TimerSeconds = Field(default=60.0, description="seconds within which any later retry starts")
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
        default="hold", description="what becomes of a result that lacks a column which the one before had"
    )
    max_rows: int = Field(default=0, ge=0, description="rows past which a refresh fails; 0 = no limit")
    max_bytes: int = Field(default=0, ge=0, description="bytes of result past which a refresh fails; 0 = no limit")
    notify: Annotated[str, AfterValidator(_channel)] = Field(
        default="",
        description="LISTEN channel: a NOTIFY starts a refresh at once; a JSON list of keys limits it to them",
    )
    probe: _Sql = Field(
        default="", description="SQL that gives one value; while it is unchanged, there is nothing to fetch"
    )
    group: str = Field(
        default="",
        max_length=63,
        description="datasets of one group are read in one transaction and published together, or none of them",
    )
    watch: Annotated[tuple[WatchSettings, ...], BeforeValidator(_tables)] = Field(
        default=(), description="tables, each with its key, whose changed rows are read alone; see Deltas"
    )
    max_delta: float = Field(
        default=0.1, ge=0, le=1, description="share of the rows past which a refresh reads all instead of what changed"
    )
    full_interval_s: _TimerSeconds = Field(
        default=3600.0,
        description="with watch, probe or notify: seconds after which everything is read again, as a check",
    )
    search_path: _SearchPath = Field(default="", description="as postgres.search_path, for this query; empty = that")
    settings: _SessionSettings = Field(
        default={}, description="as postgres.settings, for this query, beside and over those"
    )
    key_separator: str = Field(
        default=":",
        min_length=1,
        max_length=8,
        description="what stands between the values of a key of several columns",
    )
    key_escape: bool = Field(
        default=False, description="whether a separator or a backslash within such a value gets a backslash before it"
    )


class DatasetSettings(DefaultsSettings):
    """One declared query. `key` is the columns whose values, joined with ``:``, name a row."""

    name: str
    query: _Sql = Field(min_length=1, description="the SQL whose result is kept")
    key: Annotated[tuple[str, ...], BeforeValidator(_columns)] = Field(
        description='the column that names a row, or a list of columns to join with ":"'
    )

    @property
    def definition(self) -> tuple[object, ...]:
        """What decides which rows there are and what they are called."""
        return self.query, self.key, *((self.key_separator, self.key_escape) if len(self.key) > 1 else ())

    @property
    def reading(self) -> tuple[object, ...]:
        """What decides how it is read."""
        return *self.definition, self.probe, self.watch, self.notify, self.search_path, self.settings

    @field_validator("key_escape")
    @classmethod
    def _of_one_character(cls, key_escape: bool, earlier: ValidationInfo) -> bool:
        separator = earlier.data.get("key_separator", ":")
        if key_escape and (len(separator) != 1 or separator == "\\"):
            raise ValueError("needs a key_separator of one character, other than a backslash")
        return key_escape

    @field_validator("retry_max_s")
    @classmethod
    def _not_below_the_first(cls, retry_max_s: float, earlier: ValidationInfo) -> float:
        if retry_max_s < (retry_initial_s := earlier.data.get("retry_initial_s", 0.0)):
            raise ValueError(f"must be at least retry_initial_s, which is {retry_initial_s:g}")
        return retry_max_s


_OF_A_TRANSACTION = ("search_path", "settings")
"""Keys of the transaction in which a group is read."""
_OF_A_GROUP = ("interval_s", "timeout_s", "retry_initial_s", "retry_max_s", "jitter")
"""Keys that say when a refresh happens, which a group has in common."""


def timing(dataset: DatasetSettings) -> tuple[float, ...]:
    """What says when a dataset is refreshed."""
    return tuple(getattr(dataset, key) for key in _OF_A_GROUP)


_DatasetName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]


class Settings(_Table):
    """The whole configuration, frozen. `datasets` is read-only and in the order of declaration.

    Each dataset already holds what `defaults` and `postgres` give it.
    """

    postgres: PostgresSettings
    status: StatusSettings = StatusSettings()
    admin: AdminSettings = AdminSettings()
    resp: RespSettings = RespSettings()
    http: HttpSettings = HttpSettings()
    limits: LimitsSettings = LimitsSettings()
    log: LogSettings = LogSettings()
    persistence: PersistenceSettings = PersistenceSettings()
    statsd: StatsdSettings = StatsdSettings()
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
        if postgres is None:  # it was refused, which is what gets reported
            return MappingProxyType(dict(datasets))
        return MappingProxyType({name: _of_session(dataset, postgres) for name, dataset in datasets.items()})


def _of_session(dataset: DatasetSettings, postgres: PostgresSettings) -> DatasetSettings:
    """`dataset` with what holds for all sessions where it chooses nothing itself."""
    return dataset.model_copy(
        update={
            "search_path": dataset.search_path or postgres.search_path,
            "settings": session_rules.merged(postgres.settings, dataset.settings),
        }
    )


def load(environ: Mapping[str, str], dsn_problem: Callable[[str], str | None]) -> Settings:
    """Read the file that CACHESERVICE_CONFIG names, else cacheservice.toml here, and the environment over it.

    `dsn_problem` says in one line, without the DSN in it, what is wrong with a DSN, or None.
    Raises ConfigError with every problem, in the order of the file's tables.
    """
    named = environ.get("CACHESERVICE_CONFIG")
    file = named or DEFAULT_FILE
    absent = not named and not os.path.exists(file)
    in_file, file_problem = ({}, None) if absent else _read_file(file)
    in_file_datasets = frozenset(_table(in_file.get("datasets")))
    variables, values, problems = _read_environment(environ)
    declared = _overlay(in_file, values)

    settings = None
    try:
        settings = Settings.model_validate(_with_defaults(declared))
    except ValidationError as refused:
        problems = _refusals(refused, declared) | problems
    for name, dataset in _table(declared["datasets"]).items():
        if "name" in _table(dataset):  # a field of ours, which the table's header sets
            problems["datasets", name, "name"] = _unknown("key", "name", _keys("datasets"))
    if settings is not None:
        problems = _group_problems(settings) | _watch_problems(settings) | _token_problems(settings) | problems
    dsn = _table(declared["postgres"]).get("dsn")
    if isinstance(dsn, str) and dsn and (wrong := dsn_problem(dsn)) is not None:
        problems.setdefault(("postgres", "dsn"), wrong)
    # A service may do without a file. One that declares a dataset in the environment is meant to.
    file_is_missed = file_problem is not None or (absent and not declared["datasets"])
    if _is_open_to_all(declared) and not file_is_missed:
        problems.setdefault(
            ("resp", "host"), "other machines could read without a password; set resp.password, or a loopback address"
        )

    if file_is_missed:
        # What the file would have held is not known, so nothing that seems to be missing is reported.
        problems = {place: problem for place, problem in problems.items() if place in variables}
    if file_problem is not None:
        problems[()] = file_problem
    elif absent and (problems or settings is None):
        problems[()] = f"not found in the working directory; write one or name it in {_PREFIX}CONFIG"

    def label(place: _Place) -> str:
        if place in variables:
            return variables[place]
        if place[:1] == ("datasets",) and len(place) > 1 and place[1] not in in_file_datasets:
            return _PREFIX + "__".join(place).upper()  # a dataset that only the environment declares
        return ": ".join((file, _dotted(place))) if place else file

    if settings is None or problems:
        order = _order(list(_table(declared["datasets"])))
        raise ConfigError([f"{label(place)}: {problems[place]}" for place in sorted(problems, key=order)])
    return settings


class ConfigFile(NamedTuple):
    """The file that was read, and when it was modified; None if there is none.

    One that `is_replaced` has no name any more: a file that is mounted by itself, and was replaced where it comes from.
    """

    path: str
    modified_at: datetime | None
    is_replaced: bool

    def __str__(self) -> str:
        if self.modified_at is None:
            return f"{self.path}, which does not exist"
        words = f"{self.path}, modified {self.modified_at.isoformat(timespec='seconds')}"
        if self.is_replaced:
            words += ", which is an old one: it was replaced where it is mounted from; mount its folder"
        return words


def config_file(environ: Mapping[str, str]) -> ConfigFile:
    """Return which file `load` reads, as it is now. Blocks for a look at the disk."""
    path = Path(environ.get("CACHESERVICE_CONFIG") or DEFAULT_FILE).absolute()
    try:
        seen = path.stat()
    except (OSError, ValueError):
        return ConfigFile(str(path), None, False)
    return ConfigFile(str(path), datetime.fromtimestamp(seen.st_mtime, UTC), seen.st_nlink == 0)


def dsn_in_file(environ: Mapping[str, str]) -> SecretStr | None:
    """Return the DSN that its file holds now; None if no file is named, or it cannot be read. Blocks."""
    path = environ.get(f"{_PREFIX}POSTGRES__DSN_FILE")
    try:
        return SecretStr(Path(path).read_text(encoding="utf-8").removesuffix("\n")) if path else None
    except (OSError, ValueError):
        return None


def dsn_source(environ: Mapping[str, str]) -> str:
    """Return the name of the variable that sets postgres.dsn, or of the key itself."""
    variables, _, _ = _read_environment(environ)
    return variables.get(("postgres", "dsn"), "postgres.dsn")


def client_secrets_in_files(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets of the ports that have files, by their keys; without those that cannot be read. Blocks."""
    found = {}
    for key, path in client_secret_files(environ).items():
        with suppress(OSError, ValueError):
            found[key] = Path(path).read_text(encoding="utf-8").removesuffix("\n")
    return found


def client_secret_files(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the paths of the files that hold secrets of the ports, by their keys."""
    variables = {key: f"{_PREFIX}{key.replace('.', '__').upper()}_FILE" for key in CLIENT_SECRETS}
    return {key: environ[variable] for key, variable in variables.items() if environ.get(variable)}


class Glance(NamedTuple):
    """The part of the configuration that a client of a running service needs: its ports, and the names of datasets.

    :param is_absent: whether no file is named and the working directory has none.
    :param unknown: lines of problems by place. () stands for the whole file, ("status",) for a whole table.
    :param known: places of accepted values.
    """

    status: StatusSettings
    resp: RespSettings
    datasets: tuple[str, ...]
    admin: AdminSettings
    is_absent: bool
    unknown: Mapping[tuple[str, ...], str]
    known: frozenset[tuple[str, ...]]

    def problem(self, table: str, key: str) -> str | None:
        """Return why the value of a key is not known, as a line that names its place; None if it is."""
        if (table, key) in self.known:
            return None
        places: tuple[tuple[str, ...], ...] = ((table, key), (table,), ())
        return next((self.unknown[place] for place in places if place in self.unknown), None)


def glance(environ: Mapping[str, str]) -> Glance:
    """Read as much as can be read, and return defaults for the rest. Unlike `load` it needs no DSN."""
    named = environ.get("CACHESERVICE_CONFIG")
    file = named or DEFAULT_FILE
    is_absent = not named and not os.path.exists(file)
    in_file, file_problem = ({}, None) if is_absent else _read_file(file)
    variables, values, problems = _read_environment(environ)
    declared = _overlay(in_file, values)
    unknown: dict[_Place, str] = {} if file_problem is None else {(): f"{file}: {file_problem}"}
    known: set[_Place] = set()

    def table(name: str, model: type[_AnyTable]) -> _AnyTable:
        if name in declared and not isinstance(declared[name], dict):
            unknown[name,] = f"{file}: {name}: must be a table"
        given = dict(_table(declared.get(name)))
        refused = {key: problems[name, key] for key in given if (name, key) in problems}
        try:
            model.model_validate(given)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                key = str(each["loc"][0])
                refused.setdefault(key, _message(each, (name, key)))
        for key, problem in refused.items():
            # An unknown key may be a misspelled one, so no key that is missing has its default for certain.
            place: _Place = (name, key) if key in model.model_fields else (name,)
            unknown[place] = f"{variables.get((name, key)) or f'{file}: {_dotted((name, key))}'}: {problem}"
            given.pop(key, None)
        known.update((name, key) for key in given)
        return model.model_validate(given)

    return Glance(
        table("status", StatusSettings),
        table("resp", RespSettings),
        tuple(_table(declared.get("datasets"))),
        table("admin", AdminSettings),
        is_absent,
        MappingProxyType(unknown),
        frozenset(known),
    )


def _group_problems(settings: Settings) -> dict[_Place, str]:
    """Where datasets of one group differ in what there is only one of for all of them."""
    problems: dict[_Place, str] = {}
    for first, *others in groups(settings.datasets.values()):
        for other in others:
            for key in _OF_A_GROUP:
                if getattr(other, key) != (common := getattr(first, key)):
                    problems["datasets", other.name, key] = (
                        f"must be {common:g} as that of {first.name}, which is in the same group"
                    )
            for key in _OF_A_TRANSACTION:
                if getattr(other, key) != getattr(first, key):
                    problems["datasets", other.name, key] = (
                        f"must be as that of {first.name}, which is in the same group, and is read with it"
                    )
    return problems


def _watch_problems(settings: Settings) -> dict[_Place, str]:
    """Where the key of a watched table has another number of columns than that of its dataset."""
    return {
        ("datasets", dataset.name, "watch", str(number), "key"): (
            f"must be {len(dataset.key)} column{'s' if len(dataset.key) > 1 else ''}, as the key of {dataset.name} is"
        )
        for dataset in settings.datasets.values()
        for number, watch in enumerate(dataset.watch)
        if len(watch.key) != len(dataset.key)
    }


def _token_problems(settings: Settings) -> dict[_Place, str]:
    """Where whoever may read could also change something."""
    token, admin_token = settings.http.token, settings.http.admin_token
    if not token.get_secret_value() or token != admin_token:
        return {}
    return {("http", "admin_token"): "must be another than http.token, which may only read"}


def groups(datasets: Iterable[DatasetSettings]) -> list[list[DatasetSettings]]:
    """The datasets that are refreshed together, in the order of declaration; most are alone."""
    found: dict[tuple[str, str], list[DatasetSettings]] = {}
    for dataset in datasets:
        found.setdefault((dataset.group, "" if dataset.group else dataset.name), []).append(dataset)
    return list(found.values())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a port that listens on `host`, an IP address or "localhost"."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_open_to_all(declared: Mapping[str, Any]) -> bool:
    """Whether the RESP port would serve data to other machines without asking who they are."""
    resp, limits = _table(declared.get("resp")), _table(declared.get("limits"))
    served = resp.get("enabled", True) is not False
    allowed = resp.get("password") or limits.get("allow_anonymous") is True
    host = resp.get("host", "127.0.0.1")
    return served and not allowed and isinstance(host, str) and not is_loopback(host)


def reference() -> list[tuple[str, str, str]]:
    """Each key once, in the order of the file, as (path, default as TOML, description).

    The default is ``required`` for a key that has none, and empty where the description tells it.
    A key of ``[defaults]`` is one of ``datasets.NAME`` but query and key, so it is not listed again.
    """

    def default(field: FieldInfo) -> str:
        if field.is_required():
            return "required"
        if field.default_factory is not None:
            return ""
        return json.dumps(field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default)

    return [
        (f"datasets.NAME.{key}" if table == "datasets" else f"{table}.{key}", default(field), field.description or "")
        for table in Settings.model_fields
        if table != "defaults"
        for key, field in _keys(table).items()
    ]


# Reading the two sources


def _read_file(file: str) -> tuple[dict[str, Any], str | None]:
    """The file's tables, or none and what is wrong with it."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a byte order mark
        return tomllib.loads(text), None
    except (OSError, UnicodeDecodeError) as error:
        return {}, f"cannot be read: {why_unreadable(error)}"
    except tomllib.TOMLDecodeError as error:
        return {}, explained(error, text)
    except (ValueError, RecursionError):  # thousands of digits; thousands of brackets
        return {}, "cannot be read: a number in it is too long, or its nesting too deep"


def why_unreadable(error: OSError | ValueError) -> str:
    """Return why a file cannot be read, without its path."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case PermissionError():
            return f"permission denied; let the user with ID {os.geteuid()} read it, and enter the folders above it"
        case IsADirectoryError():
            return "it is a folder; name the file in it"
        case OSError(strerror=str(reason)):
            return reason.lower()
        case UnicodeDecodeError(start=index):
            return f"byte {index + 1} is not UTF-8"
        case _:
            return "it is no path"


def _read_environment(environ: Mapping[str, str]) -> tuple[dict[_Place, str], dict[_Place, object], dict[_Place, str]]:
    """Three things by place: the variable that speaks of it, the value that it gives, and what is wrong with it.

    A name without "__" is not ours: Kubernetes sets CACHESERVICE_PORT and CACHESERVICE_SERVICE_HOST by itself.
    """
    variables: dict[_Place, str] = {}
    values: dict[_Place, object] = {}
    problems: dict[_Place, str] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(_PREFIX) or "__" not in variable:
            continue
        *tables, key = _place_of_variable(variable)
        keys = _keys(tables[0])
        in_secret_file = key not in keys and key.removesuffix("_file") in keys
        place = (*tables, key.removesuffix("_file") if in_secret_file else key)
        if place in variables:
            problems[place] = f"also set as {variable}; keep one of the two"
            continue
        variables[place] = variable
        if tables[0] not in Settings.model_fields:
            problems[place] = _unknown("table", tables[0], Settings.model_fields)
        elif tables == ["datasets"]:
            problems[place] = f"names a dataset but none of its keys; for its query write {variable}__QUERY"
        elif re.search("[\ud800-\udfff]", text):  # how os.environ holds bytes that are not UTF-8
            problems[place] = "must be text in UTF-8"
            values[place] = _REFUSED
        elif not in_secret_file:
            values[place] = _as_toml(text, keys.get(key))
        else:
            try:
                secret = Path(text).read_text(encoding="utf-8").removesuffix("\n")
            except (OSError, ValueError) as error:
                # Not its path: somebody may have put the secret itself there.
                problems[place] = f"the file that it names cannot be read: {why_unreadable(error)}"
                values[place] = _REFUSED
            else:
                values[place] = _as_toml(secret, keys[place[-1]])
    return variables, values, problems


def _place_of_variable(variable: str) -> _Place:
    table, _, rest = variable.removeprefix(_PREFIX).lower().partition("__")
    if table != "datasets":
        return table, rest
    name, separator, key = rest.rpartition("__")  # a dataset's name may hold "__" or end in "_"; a key does neither
    return (table, name, key) if separator else (table, key)


# No key takes an empty table, so the models refuse it in the words that they have for a value in the file.
_REFUSED: Mapping[str, object] = MappingProxyType({})


def _as_toml(text: str, field: FieldInfo | None) -> object:
    """`text` as TOML would hold it for `field`: "30" is a number only where a number is wanted."""
    try:
        if field is not None and field.annotation in (bool, int, float):
            return TypeAdapter(field.annotation).validate_strings(text)
        if field is not None and field.annotation == tuple[str, ...] and text.startswith("["):
            return TypeAdapter(list[str]).validate_json(text)
    except ValidationError:
        return _REFUSED
    return text


# Putting the two together


def _table(value: object) -> dict[str, Any]:
    """`value` if it is a table, else an empty one; the models report what should have been a table."""
    return value if isinstance(value, dict) else {}


def _overlay(in_file: Mapping[str, Any], values: Mapping[_Place, object]) -> dict[str, Any]:
    """The file's tables with the environment's values put into them."""
    declared: dict[str, Any] = {"postgres": {}, "datasets": {}, **in_file}
    for (*tables, key), value in values.items():
        table = declared
        for name in tables:
            table = _table(table.setdefault(name, {}))
        table[key] = value
    return declared


def _inherited(declared: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _table(declared.get("defaults"))
    return {key: value for key, value in defaults.items() if key in DefaultsSettings.model_fields}


def _with_defaults(declared: Mapping[str, Any]) -> dict[str, Any]:
    """`declared` with each dataset holding its name and what it inherits."""
    if not isinstance(declared["datasets"], dict):
        return dict(declared)
    inherited = _inherited(declared)
    datasets = {
        name: {**inherited, **dataset, "name": name} if isinstance(dataset, dict) else dataset
        for name, dataset in declared["datasets"].items()
    }
    return {**declared, "datasets": datasets}


# Telling what is wrong


def _keys(table: str) -> dict[str, FieldInfo]:
    """The keys that a table may hold, in the order of the file; none for an unknown table."""
    if table == "datasets":
        fields = DatasetSettings.model_fields
        return {key: fields[key] for key in ("query", "key", *DefaultsSettings.model_fields)}
    model = Settings.model_fields[table].annotation if table in Settings.model_fields else None
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}


def _keys_at(place: _Place) -> dict[str, FieldInfo]:
    """The keys that stand beside the one at `place`."""
    # …, "watch", its number, the key; a dataset may be called "watch" as well.
    in_watch = len(place) > 3 and place[-3] == "watch"
    return WatchSettings.model_fields if in_watch else _keys(place[0])


def _refusals(refused: ValidationError, declared: Mapping[str, Any]) -> dict[_Place, str]:
    """What the models refused, by the place where the refused value stands."""
    inherited = _inherited(declared)
    problems: dict[_Place, str] = {}
    for error in refused.errors(include_url=False):
        place = tuple(map(str, error["loc"]))
        if error["type"] == "default_factory_not_called":  # it follows from another error, which is reported
            continue
        if place[-1] == "[key]" and error["type"] != "extra_forbidden":  # how pydantic says: the dataset's name
            problems[place[:-1]] = "a dataset's name is a letter, then letters, digits or _, all lower case, at most 63"
            continue
        message = _message(error, place)
        match place:
            case ("datasets", name, key) if key in inherited and key not in _table(declared["datasets"].get(name)):
                place, message = ("defaults", key), f"{message}, in {_dotted(place[:2])}"
        problems.setdefault(place, message)  # the models read [defaults] first, so its own message stays
    return problems


_MESSAGES: Mapping[str, str] = MappingProxyType(
    {
        "bool_type": "must be true or false",
        "finite_number": "must be a finite number",
        "float_type": "must be a number",
        "greater_than": "must be greater than {gt:g}",
        "greater_than_equal": "must be at least {ge:g}",
        "int_type": "must be a whole number",
        "less_than": "must be less than {lt:g}",
        "less_than_equal": "must be at most {le:g}",
        "literal_error": "must be {expected}",
        "string_too_short": "must not be empty",
        "string_type": "must be text in quotes",
        "too_short": "must not be empty",
        "value_error": "{error}",
        "dict_type": "must be a table",
        "model_type": "must be a table",
    }
)


def _message(error: ErrorDetails, place: _Place) -> str:
    """The problem in a few plain words that say how to mend it. Never the value, which may be a secret."""
    if error["type"] == "missing":
        return f"required; {_keys_at(place)[place[-1]].description}"
    if error["type"] == "extra_forbidden":
        if len(place) > 1:
            return _unknown("key", place[-1], _keys_at(place))
        return _unknown("table" if isinstance(error["input"], dict) else "key", place[0], Settings.model_fields)
    if error["type"] in _MESSAGES:
        return _MESSAGES[error["type"]].format(**error.get("ctx", {}))
    return error["msg"]


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {what}; " + (f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}")


def _dotted(place: _Place) -> str:
    """The place as TOML writes it, on one line whatever is in a name."""
    return ".".join(name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name) for name in place)


def _order(datasets: Sequence[str]) -> Callable[[_Place], tuple[int, ...]]:
    """A sort key for places: tables as documented, `datasets` as declared, keys as documented; unknown ones last."""

    def index(name: str, names: Sequence[str]) -> int:
        return names.index(name) if name in names else len(names)

    def position(place: _Place) -> tuple[int, ...]:
        if not place:
            return ()
        levels = [list(Settings.model_fields), list(_keys(place[0]))]
        if place[0] == "datasets":
            levels.insert(1, list(datasets))
        return tuple(map(index, place, levels))

    return position
