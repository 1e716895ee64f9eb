"""Decides how much of a dataset an attempt reads, before its transaction begins. Pure: values in, a value out.

What only the database knows is decided in the transaction: whether a probe's value, the definitions or the recorded
changes allow less than a full read.
"""

from __future__ import annotations

from typing import NamedTuple

from cacheservice.cache.dataset import Snapshot, Trigger
from cacheservice.config import DatasetSettings
from cacheservice.refresh.notified import Keys

_LEAST_DELTA_KEYS = 100
"""A delta of this many keys is cheap however small the dataset is."""


class Plan(NamedTuple):
    """How to read a dataset.

    :param since: the snapshot that a delta may start from; None to read everything.
    :param check: read everything, and compare it with what a delta or a probe would have found.
    :param most_keys: of a delta; if more have changed, everything is read.
    :param use_keys: read only the rows that notifications named.
    :param trust_probe: whether an equal value of the probe means that nothing has changed.
    """

    since: Snapshot | None
    check: bool = False
    most_keys: int = 0
    use_keys: bool = False
    trust_probe: bool = True


def plan(
    settings: DatasetSettings, base: Snapshot | None, keys: Keys, trigger: Trigger, *, whole: bool, check_is_due: bool
) -> Plan:
    """Return how an attempt reads a dataset.

    :param base: the newest result, None if there is none of this definition.
    :param keys: named by notifications since the last attempt.
    :param whole: whether an operator asked for a full read.
    :param check_is_due: whether the last full read is longer ago than full_interval_s.
    """
    was_notified = keys is None or bool(keys)
    # An operator wants it read (with watch that is a check as well), or an application changed what no trigger saw.
    if (whole and not settings.watch) or (settings.watch and was_notified):
        return Plan(None)
    can_follow = bool(settings.watch or settings.probe or settings.notify)
    # A check takes as long as a full read, so none while somebody waits for a change.
    may_check = whole or (check_is_due and trigger in ("interval", "retry"))
    return Plan(
        base if can_follow else None,
        check=bool(settings.watch or settings.probe) and may_check,
        most_keys=int(max(_LEAST_DELTA_KEYS, settings.max_delta * base.rows.count)) if base else 0,
        use_keys=bool(settings.notify) and trigger == "notify",
        # A notification knows more than the probe.
        trust_probe=not was_notified,
    )
