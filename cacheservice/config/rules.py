"""Rules that hold between values of different keys."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from cacheservice.config.keys import Place
from cacheservice.config.merge import as_table
from cacheservice.config.models import DatasetSettings, Settings

_OF_A_TRANSACTION = ("search_path", "settings")
"""Keys of the transaction in which a group is read."""
_OF_A_GROUP = ("interval_s", "timeout_s", "retry_initial_s", "retry_max_s", "jitter")
"""The keys that decide when a refresh happens. All datasets of a group have the same values."""


def timing(dataset: DatasetSettings) -> tuple[float, ...]:
    """Return the values that decide when a dataset is refreshed."""
    return tuple(getattr(dataset, key) for key in _OF_A_GROUP)


def problems(settings: Settings) -> dict[Place, str]:
    """Return the problems between values that are each valid alone, by place."""
    return (
        _group_problems(settings) | _watch_problems(settings) | _token_problems(settings) | _worker_problems(settings)
    )


def _group_problems(settings: Settings) -> dict[Place, str]:
    """Return where datasets of one group differ in a value that they must share."""
    found: dict[Place, str] = {}
    for first, *others in groups(settings.datasets.values()):
        for other in others:
            for key in _OF_A_GROUP:
                if getattr(other, key) != (common := getattr(first, key)):
                    found["datasets", other.name, key] = (
                        f"must be {common:g}, as in {first.name}, which is in the same group"
                    )
            for key in _OF_A_TRANSACTION:
                if getattr(other, key) != getattr(first, key):
                    found["datasets", other.name, key] = (
                        f"must be as in {first.name}, which is in the same group and is read in the same transaction"
                    )
    return found


def _watch_problems(settings: Settings) -> dict[Place, str]:
    """Return where the keys of a watched table and of its dataset differ in their number of columns."""
    return {
        ("datasets", dataset.name, "watch", str(number), "key"): (
            f"must have {len(dataset.key)} column{'s' if len(dataset.key) > 1 else ''}, as the key of {dataset.name}"
        )
        for dataset in settings.datasets.values()
        for number, watch in enumerate(dataset.watch)
        if len(watch.key) != len(dataset.key)
    }


def _token_problems(settings: Settings) -> dict[Place, str]:
    """Return where a token for reading would also allow changes."""
    token, admin_token = settings.http.token, settings.http.admin_token
    if not token.get_secret_value() or token != admin_token:
        return {}
    return {("http", "admin_token"): "must differ from http.token, which may only read"}


def _worker_problems(settings: Settings) -> dict[Place, str]:
    """Return where there are workers that would serve nothing."""
    if settings.workers.processes and not settings.resp.enabled and not settings.http.enabled:
        return {("workers", "processes"): "must be 0 unless resp.enabled or http.enabled is true: workers serve those"}
    return {}


def groups(datasets: Iterable[DatasetSettings]) -> list[list[DatasetSettings]]:
    """Return the datasets that are refreshed together, in the order of declaration; most are alone."""
    found: dict[tuple[str, str], list[DatasetSettings]] = {}
    for dataset in datasets:
        found.setdefault((dataset.group, "" if dataset.group else dataset.name), []).append(dataset)
    return list(found.values())


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a port that listens on `host`, an IP address or "localhost"."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_open_to_all(declared: Mapping[str, object]) -> bool:
    """Return whether the RESP port would serve data to other machines without a password."""
    resp, limits = as_table(declared.get("resp")), as_table(declared.get("limits"))
    served = resp.get("enabled", True) is not False
    allowed = resp.get("password") or limits.get("allow_anonymous") is True
    host = resp.get("host", "127.0.0.1")
    return served and not allowed and isinstance(host, str) and not is_loopback(host)
