"""The keys that the tables of the configuration may hold, and where a value stands."""

from __future__ import annotations

import json
import re

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from cacheservice.config.models import DatasetSettings, DefaultsSettings, Settings, WatchSettings

# Where a value stands: ("datasets", "products", "interval_s"); () is the file itself.
Place = tuple[str, ...]


def keys_of(table: str) -> dict[str, FieldInfo]:
    """The keys that a table may hold, in the order of the file; none for an unknown table."""
    if table == "datasets":
        fields = DatasetSettings.model_fields
        return {key: fields[key] for key in ("query", "key", *DefaultsSettings.model_fields)}
    model = Settings.model_fields[table].annotation if table in Settings.model_fields else None
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}


def keys_at(place: Place) -> dict[str, FieldInfo]:
    """The keys that stand beside the one at `place`."""
    # …, "watch", its number, the key; a dataset may be called "watch" as well.
    in_watch = len(place) > 3 and place[-3] == "watch"
    return WatchSettings.model_fields if in_watch else keys_of(place[0])


def dotted(place: Place) -> str:
    """The place as TOML writes it, on one line whatever is in a name."""
    return ".".join(name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name) for name in place)


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
        for key, field in keys_of(table).items()
    ]
