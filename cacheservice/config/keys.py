"""The keys that the tables of the configuration may contain, and the places of values."""

from __future__ import annotations

import json
import re

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from cacheservice.config.models import DatasetSettings, DefaultsSettings, Settings, WatchSettings

Place = tuple[str, ...]
"""The place of a value: ("datasets", "products", "interval_s"); () is the file itself."""


def keys_of(table: str) -> dict[str, FieldInfo]:
    """Return the keys that a table may contain, in the order of the file; none for an unknown table."""
    if table == "datasets":
        fields = DatasetSettings.model_fields
        return {key: fields[key] for key in ("query", "key", *DefaultsSettings.model_fields)}
    model = Settings.model_fields[table].annotation if table in Settings.model_fields else None
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}


def keys_at(place: Place) -> dict[str, FieldInfo]:
    """Return the keys of the table that contains `place`."""
    # …, "watch", its number, the key; a dataset may be called "watch" as well.
    in_watch = len(place) > 3 and place[-3] == "watch"
    return WatchSettings.model_fields if in_watch else keys_of(place[0])


def dotted(place: Place) -> str:
    """Return the place as TOML writes it, on one line whatever characters a name contains."""
    return ".".join(name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name) for name in place)


def reference() -> list[tuple[str, str, str]]:
    """Return each key once, in the order of the file, as (path, default as TOML, description).

    The default is ``required`` for a key without one, and empty if the description states it. The keys of
    ``[defaults]`` are those of ``datasets.NAME`` without query and key, and are not listed again.
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
        for key, field in keys_of(table).items()
    ]
