"""The configuration: one TOML file, overridden by the environment, checked as a whole, then frozen.

`load` reports every problem at once, each under the name its value was given by: the file and its key, or the
environment variable. No problem ever holds a value, so none can hold a secret.

Reading is plain pydantic: pydantic-settings would merge the two sources for us, but it splits a variable at each
``__`` (which a dataset's name may hold), forgets which source a value came from, passes over most unknown variables,
and logs values when PYDANTIC_SETTINGS_DEBUG is set.
"""

from cacheservice.config.keys import reference
from cacheservice.config.load import Glance, glance, load
from cacheservice.config.models import (
    AdminSettings,
    ClusterSettings,
    DatasetSettings,
    DefaultsSettings,
    HttpSettings,
    LimitsSettings,
    LogSettings,
    PersistenceSettings,
    PostgresSettings,
    RespSettings,
    Settings,
    StatsdSettings,
    StatusSettings,
    WatchSettings,
    WorkersSettings,
)
from cacheservice.config.rules import groups, is_loopback, timing
from cacheservice.config.sources import (
    CLIENT_SECRETS,
    DEFAULT_FILE,
    ConfigFile,
    client_secret_files,
    client_secrets_in_files,
    config_file,
    dsn_in_file,
    dsn_source,
    why_unreadable,
)
from cacheservice.config.transfer import for_workers, from_main
from cacheservice.config.values import DEFAULT_PUBLICATION, OWN_CHANNEL

__all__ = [
    "CLIENT_SECRETS",
    "DEFAULT_FILE",
    "DEFAULT_PUBLICATION",
    "OWN_CHANNEL",
    "AdminSettings",
    "ClusterSettings",
    "ConfigFile",
    "DatasetSettings",
    "DefaultsSettings",
    "Glance",
    "HttpSettings",
    "LimitsSettings",
    "LogSettings",
    "PersistenceSettings",
    "PostgresSettings",
    "RespSettings",
    "Settings",
    "StatsdSettings",
    "StatusSettings",
    "WatchSettings",
    "WorkersSettings",
    "client_secret_files",
    "client_secrets_in_files",
    "config_file",
    "dsn_in_file",
    "dsn_source",
    "for_workers",
    "from_main",
    "glance",
    "groups",
    "is_loopback",
    "load",
    "reference",
    "timing",
    "why_unreadable",
]
