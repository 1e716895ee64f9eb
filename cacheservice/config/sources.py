"""Reads the sources of the configuration: the file, the environment, and files that hold secrets."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from pydantic import SecretStr, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from cacheservice.config.keys import Place, keys_of
from cacheservice.config.models import Settings
from cacheservice.config.report import unknown_name
from cacheservice.config.toml_errors import explained

DEFAULT_FILE = "cacheservice.toml"
CLIENT_SECRETS = ("resp.password", "http.token", "http.admin_token")
"""The secrets that clients send."""
PREFIX = "CACHESERVICE_"


class ConfigFile(NamedTuple):
    """The configuration file, and when it was modified; None if there is no file.

    :param is_replaced: whether it has no name any more: a file that is mounted by itself keeps its old content after
        it was replaced where it is mounted from.
    """

    path: str
    modified_at: datetime | None
    is_replaced: bool

    def __str__(self) -> str:
        if self.modified_at is None:
            return f"{self.path}, which does not exist"
        words = f"{self.path}, modified {self.modified_at.isoformat(timespec='seconds')}"
        if self.is_replaced:
            words += ", which has been replaced where it is mounted from; mount its folder to get the new file"
        return words


def config_file(environ: Mapping[str, str]) -> ConfigFile:
    """Return the file that `load` would read now. It accesses the disk."""
    path = Path(environ.get("CACHESERVICE_CONFIG") or DEFAULT_FILE).absolute()
    try:
        seen = path.stat()
    except (OSError, ValueError):
        return ConfigFile(str(path), None, False)
    return ConfigFile(str(path), datetime.fromtimestamp(seen.st_mtime, UTC), seen.st_nlink == 0)


def dsn_in_file(environ: Mapping[str, str]) -> SecretStr | None:
    """Return the DSN in its file; None if no file is named, or if it cannot be read. It accesses the disk."""
    path = environ.get(f"{PREFIX}POSTGRES__DSN_FILE")
    try:
        return SecretStr(Path(path).read_text(encoding="utf-8").removesuffix("\n")) if path else None
    except (OSError, ValueError):
        return None


def dsn_source(environ: Mapping[str, str]) -> str:
    """Return the name of the variable that sets postgres.dsn, or of the key itself."""
    variables, _, _ = read_environment(environ)
    return variables.get(("postgres", "dsn"), "postgres.dsn")


def client_secrets_in_files(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets of the ports in their files, by key, except unreadable ones. It accesses the disk."""
    found = {}
    for key, path in client_secret_files(environ).items():
        with suppress(OSError, ValueError):
            found[key] = Path(path).read_text(encoding="utf-8").removesuffix("\n")
    return found


def client_secret_files(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the paths of the files that hold secrets of the ports, by their keys."""
    variables = {key: f"{PREFIX}{key.replace('.', '__').upper()}_FILE" for key in CLIENT_SECRETS}
    return {key: environ[variable] for key, variable in variables.items() if environ.get(variable)}


def read_file(file: str) -> tuple[dict[str, object], str | None]:
    """Return the file's tables and None, or no tables and the problem."""
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
            return "it is not a path"


def read_environment(environ: Mapping[str, str]) -> tuple[dict[Place, str], dict[Place, object], dict[Place, str]]:
    """Return the variables, their values and their problems, each by the place of the key.

    A name without "__" is ignored: Kubernetes sets CACHESERVICE_PORT and CACHESERVICE_SERVICE_HOST for its own use.
    """
    variables: dict[Place, str] = {}
    values: dict[Place, object] = {}
    problems: dict[Place, str] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(PREFIX) or "__" not in variable:
            continue
        *tables, key = _place_of_variable(variable)
        keys = keys_of(tables[0])
        in_secret_file = key not in keys and key.removesuffix("_file") in keys
        place = (*tables, key.removesuffix("_file") if in_secret_file else key)
        if place in variables:
            problems[place] = f"also set as {variable}; keep one of the two"
            continue
        variables[place] = variable
        if tables[0] not in Settings.model_fields:
            problems[place] = unknown_name("table", tables[0], Settings.model_fields)
        elif tables == ["datasets"]:
            problems[place] = f"names a dataset but not a key of it; for its query, set {variable}__QUERY"
        elif re.search("[\ud800-\udfff]", text):  # os.environ represents bytes that are not UTF-8 in this way
            problems[place] = "must be text in UTF-8"
            values[place] = _REFUSED
        elif not in_secret_file:
            values[place] = _as_toml(text, keys.get(key))
        else:
            try:
                secret = Path(text).read_text(encoding="utf-8").removesuffix("\n")
            except (OSError, ValueError) as error:
                # Without the path: the variable may contain the secret itself by mistake.
                problems[place] = f"the file that it names cannot be read: {why_unreadable(error)}"
                values[place] = _REFUSED
            else:
                values[place] = _as_toml(secret, keys[place[-1]])
    return variables, values, problems


def _place_of_variable(variable: str) -> Place:
    table, _, rest = variable.removeprefix(PREFIX).lower().partition("__")
    if table != "datasets":
        return table, rest
    name, separator, key = rest.rpartition("__")  # a dataset's name may contain "__" or end in "_"; a key does neither
    return (table, name, key) if separator else (table, key)


# No key accepts an empty table, so the models refuse it with the same words as a value in the file.
_REFUSED: Mapping[str, object] = MappingProxyType({})


def _as_toml(text: str, field: FieldInfo | None) -> object:
    """Return `text` as a TOML value for `field`: "30" is a number only if the key is a number."""
    try:
        if field is not None and field.annotation in (bool, int, float):
            return TypeAdapter(field.annotation).validate_strings(text)
        if field is not None and field.annotation == tuple[str, ...] and text.startswith("["):
            return TypeAdapter(list[str]).validate_json(text)
    except ValidationError:
        return _REFUSED
    return text
