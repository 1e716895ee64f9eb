"""Merges the tables of the file, the values of the environment, and the defaults."""

from __future__ import annotations

from collections.abc import Mapping

from cacheservice.config.keys import Place
from cacheservice.config.models import DefaultsSettings


def as_table(value: object) -> dict[str, object]:
    """Return `value` if it is a table, else an empty one; the models report the other values."""
    return value if isinstance(value, dict) else {}


def overlay(in_file: Mapping[str, object], values: Mapping[Place, object]) -> dict[str, object]:
    """Return the file's tables with the values of the environment in them."""
    declared: dict[str, object] = {"postgres": {}, "datasets": {}, **in_file}
    for (*tables, key), value in values.items():
        table = declared
        for name in tables:
            table = as_table(table.setdefault(name, {}))
        table[key] = value
    return declared


def defaults_in(declared: Mapping[str, object]) -> dict[str, object]:
    defaults = as_table(declared.get("defaults"))
    return {key: value for key, value in defaults.items() if key in DefaultsSettings.model_fields}


def with_defaults(declared: Mapping[str, object]) -> dict[str, object]:
    """Return `declared` with the name and the inherited values in each dataset."""
    if not isinstance(declared["datasets"], dict):
        return dict(declared)
    inherited = defaults_in(declared)
    datasets = {
        name: {**inherited, **dataset, "name": name} if isinstance(dataset, dict) else dataset
        for name, dataset in declared["datasets"].items()
    }
    return {**declared, "datasets": datasets}
