"""The metrics of each dataset about the fleet; a service without a fleet has none of them."""

from __future__ import annotations

from collections.abc import Iterator

from cacheservice.cache.dataset import Dataset
from cacheservice.cache.fleet_status import FleetStatus
from cacheservice.ops.dataset_metrics import Family, Kind, Values, group

_ROLES = ("leader", "replica", "alone")


def _family(name: str, documentation: str, kind: Kind = "gauge") -> Family:
    return Family(name, kind, documentation)


_FAMILIES = (
    Family(
        "cacheservice_cluster_role",
        "gauge",
        "1 for the role that the process has for the dataset, 0 for the others; not there without a fleet.",
        [("", {"role": role}) for role in _ROLES],
    ),
    _family("cacheservice_cluster_epoch", "Epoch of the newest lead that is known."),
    _family(
        "cacheservice_cluster_lag_generations", "Generations that the leader has published and that this process lacks."
    ),
    _family("cacheservice_cluster_valkey_up", "1 if the Valkey could be used the last time."),
    _family("cacheservice_cluster_publish_failing", "1 while the results of a leader cannot be published."),
    _family(
        "cacheservice_cluster_can_lead",
        "0 while the process competes for leads, and cannot win them.",
    ),
    _family("cacheservice_cluster_lead_changes_total", "How often the process has gained or lost the lead.", "counter"),
)
_SILENT = Family(
    "cacheservice_cluster_leader_silent_seconds",
    "gauge",
    "Seconds for which no new results of a leader have come; 0 for the leader.",
    form="%.3f",
    unit="seconds",
)


def _stamp(dataset: Dataset) -> tuple[object, ...] | None:
    status = dataset.fleet
    return None if status is None else tuple(_values(status))


def _values(status: FleetStatus) -> Iterator[Values]:
    yield tuple(int(role == status.role) for role in _ROLES)
    yield () if status.epoch is None else (status.epoch,)
    # A leader has what it publishes. While nothing is known of the leader's generations, none is known to be missing.
    yield (status.lag or 0,)
    yield (int(status.valkey_problem is None),)
    yield (int(status.publish_problem is not None),)
    yield (int(status.lead_problem is None),)
    yield (status.lead_changes,)


def _silent_s(dataset: Dataset) -> float | None:
    silent_s = dataset.silent_s()
    return None if silent_s is None else round(silent_s, 3)


FLEET_GROUPS = (
    group((_SILENT,), _silent_s, lambda _, silent_s: ((() if silent_s is None else (silent_s,)),))._replace(
        optional=True
    ),
    group(
        _FAMILIES,
        _stamp,
        lambda dataset, _: ((),) * len(_FAMILIES) if dataset.fleet is None else _values(dataset.fleet),
    )._replace(optional=True),
)
