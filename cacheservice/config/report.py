"""Reports what the models refuse, in plain words, without the value: it may be a secret."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cacheservice.config.keys import Place, dotted, keys_at, keys_of
from cacheservice.config.merge import as_table, defaults_in
from cacheservice.config.models import Settings

_DATASET_NAME = "a dataset's name must begin with a letter and have at most 63 lower-case letters, digits and _"


def refusals(refused: ValidationError, declared: Mapping[str, object]) -> dict[Place, str]:
    """Return the problems that the models reported, by the places of the refused values."""
    inherited = defaults_in(declared)
    problems: dict[Place, str] = {}
    for error in refused.errors(include_url=False):
        place = tuple(map(str, error["loc"]))
        if error["type"] == "default_factory_not_called":  # it follows from another error, which is reported
            continue
        if place[-1] == "[key]" and error["type"] != "extra_forbidden":  # pydantic's place for the name of a dataset
            problems[place[:-1]] = _DATASET_NAME
            continue
        message = problem_of(error, place)
        match place:
            case ("datasets", name, key) if key in inherited and key not in as_table(
                as_table(declared["datasets"]).get(name)
            ):
                place, message = ("defaults", key), f"{message}, in {dotted(place[:2])}"
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


def problem_of(error: ErrorDetails, place: Place) -> str:
    """Return the problem in a few plain words, with its fix and without the value, which may be a secret."""
    if error["type"] == "missing":
        return f"required; {keys_at(place)[place[-1]].description}"
    if error["type"] == "extra_forbidden":
        if len(place) > 1:
            return unknown_name("key", place[-1], keys_at(place))
        return unknown_name("table" if isinstance(error["input"], dict) else "key", place[0], Settings.model_fields)
    if error["type"] in _MESSAGES:
        return _MESSAGES[error["type"]].format(**error.get("ctx", {}))
    return error["msg"]


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return the problem of an unknown name, with the most similar known one, or all."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {what}; " + (f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}")


def order_of(datasets: Sequence[str]) -> Callable[[Place], tuple[int, ...]]:
    """Return a sort key for places.

    Tables and keys are in the order of the documentation, datasets in that of declaration; unknown ones are last.
    """

    def index(name: str, names: Sequence[str]) -> int:
        return names.index(name) if name in names else len(names)

    def position(place: Place) -> tuple[int, ...]:
        if not place:
            return ()
        levels = [list(Settings.model_fields), list(keys_of(place[0]))]
        if place[0] == "datasets":
            levels.insert(1, list(datasets))
        return tuple(map(index, place, levels))

    return position
