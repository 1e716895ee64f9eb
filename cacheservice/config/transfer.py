"""The configuration as plain values, for the worker processes.

A worker gets its settings from the main process, so that it reads neither the file nor the environment, and so that no
secret is on its command line or in its environment.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, SecretStr

from cacheservice.base.interfaces import Json
from cacheservice.config.models import Settings

_NO_DSN = SecretStr("workers do not read the database")


def for_workers(settings: Settings) -> dict[str, Json]:
    """Return the settings as plain values, with the secrets of clients, and without the DSN."""
    postgres = settings.postgres.model_copy(update={"dsn": _NO_DSN})
    return {name: _plain(value) for name, value in settings.model_copy(update={"postgres": postgres})}


def from_main(plain: Mapping[str, Json]) -> Settings:
    """Return the settings that `for_workers` made plain."""
    return Settings.model_validate(plain)


def _plain(value: object) -> Json:
    if isinstance(value, BaseModel):
        return {name: _plain(each) for name, each in value}
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    assert value is None or isinstance(value, bool | int | float | str)
    return value
