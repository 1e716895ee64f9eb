"""Loads the whole configuration, or the part that a client of a running service needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from pydantic import ValidationError

from cacheservice.base.errors import ConfigError
from cacheservice.config import rules
from cacheservice.config.keys import Place, dotted, keys_of
from cacheservice.config.merge import as_table, overlay, with_defaults
from cacheservice.config.models import AdminSettings, AnyTable, RespSettings, Settings, StatusSettings
from cacheservice.config.report import order_of, problem_of, refusals, unknown_name
from cacheservice.config.sources import DEFAULT_FILE, PREFIX, read_environment, read_file


def load(environ: Mapping[str, str], dsn_problem: Callable[[str], str | None]) -> Settings:
    """Load the file and the environment, which overrides it.

    The file is the one that CACHESERVICE_CONFIG names, or cacheservice.toml in the working directory.

    :param dsn_problem: returns the problem of a DSN in one line without the DSN, or None.
    :raises ConfigError: with every problem, in the order of the file's tables.
    """
    named = environ.get("CACHESERVICE_CONFIG")
    file = named or DEFAULT_FILE
    absent = not named and not os.path.exists(file)
    in_file, file_problem = ({}, None) if absent else read_file(file)
    in_file_datasets = frozenset(as_table(in_file.get("datasets")))
    variables, values, problems = read_environment(environ)
    declared = overlay(in_file, values)

    settings = None
    try:
        settings = Settings.model_validate(with_defaults(declared))
    except ValidationError as refused:
        problems = refusals(refused, declared) | problems
    for name, dataset in as_table(declared["datasets"]).items():
        if "name" in as_table(dataset):  # an internal field, which the table's header sets
            problems["datasets", name, "name"] = unknown_name("key", "name", keys_of("datasets"))
    if settings is not None:
        problems = rules.problems(settings) | problems
    dsn = as_table(declared["postgres"]).get("dsn")
    if isinstance(dsn, str) and dsn and (wrong := dsn_problem(dsn)) is not None:
        problems.setdefault(("postgres", "dsn"), wrong)
    # A service may have no file. If the environment declares a dataset, that is intended.
    file_is_missed = file_problem is not None or (absent and not declared["datasets"])
    if rules.is_open_to_all(declared) and not file_is_missed:
        problems.setdefault(
            ("resp", "host"), "other machines could read without a password; set resp.password, or a loopback address"
        )

    if file_is_missed:
        # The content of the file is not known, so keys that seem to be missing are not reported.
        problems = {place: problem for place, problem in problems.items() if place in variables}
    if file_problem is not None:
        problems[()] = file_problem
    elif absent and (problems or settings is None):
        problems[()] = f"not found in the working directory; create it, or name another file in {PREFIX}CONFIG"

    def label(place: Place) -> str:
        if place in variables:
            return variables[place]
        if place[:1] == ("datasets",) and len(place) > 1 and place[1] not in in_file_datasets:
            return PREFIX + "__".join(place).upper()  # a dataset that only the environment declares
        return ": ".join((file, dotted(place))) if place else file

    if settings is None or problems:
        order = order_of(list(as_table(declared["datasets"])))
        raise ConfigError([f"{label(place)}: {problems[place]}" for place in sorted(problems, key=order)])
    return settings


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
    in_file, file_problem = ({}, None) if is_absent else read_file(file)
    variables, values, problems = read_environment(environ)
    declared = overlay(in_file, values)
    unknown: dict[Place, str] = {} if file_problem is None else {(): f"{file}: {file_problem}"}
    known: set[Place] = set()

    def table(name: str, model: type[AnyTable]) -> AnyTable:
        if name in declared and not isinstance(declared[name], dict):
            unknown[name,] = f"{file}: {name}: must be a table"
        given = dict(as_table(declared.get(name)))
        refused = {key: problems[name, key] for key in given if (name, key) in problems}
        try:
            model.model_validate(given)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                key = str(each["loc"][0])
                refused.setdefault(key, problem_of(each, (name, key)))
        for key, problem in refused.items():
            # An unknown key may be a misspelled one, so no key that is missing has its default for certain.
            place: Place = (name, key) if key in model.model_fields else (name,)
            unknown[place] = f"{variables.get((name, key)) or f'{file}: {dotted((name, key))}'}: {problem}"
            given.pop(key, None)
        known.update((name, key) for key in given)
        return model.model_validate(given)

    return Glance(
        table("status", StatusSettings),
        table("resp", RespSettings),
        tuple(as_table(declared.get("datasets"))),
        table("admin", AdminSettings),
        is_absent,
        MappingProxyType(unknown),
        frozenset(known),
    )
