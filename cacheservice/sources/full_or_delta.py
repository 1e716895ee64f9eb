"""Decides how much of a dataset an attempt reads. Pure: values in, a value out.

`plan` decides before the transaction. Only the database knows whether a probe's value, the definitions or the recorded
changes allow less than a full read: `next_step` decides that within the transaction, and asks for one fact at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cacheservice.cache.history import Trigger
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.sources.base import ReadPlan

_LEAST_DELTA_KEYS = 100
"""A delta of this many keys is cheap however small the dataset is."""


class Plan(NamedTuple):
    """How to read a dataset: the part of a `ReadPlan` that is decided here.

    :param use_keys: read only the rows that notifications named.
    """

    since: Snapshot | None
    check: bool = False
    most_keys: int = 0
    use_keys: bool = False
    trust_probe: bool = True


def plan(
    settings: DatasetSettings,
    base: Snapshot | None,
    keys: frozenset[str] | None,
    trigger: Trigger,
    *,
    whole: bool,
    check_is_due: bool,
) -> Plan:
    """Return how an attempt reads a dataset.

    :param base: the newest result, None if there is none of this definition.
    :param keys: named by notifications since the last attempt; None for any row.
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


Key = tuple[str | None, ...]
"""The key of a row of a watched table, one text for each column; None for NULL."""


class Changes(NamedTuple):
    """The recorded changes since a snapshot.

    It has the state of the watched tables, the reason if a delta is not possible, and the changed keys.
    """

    state: str
    problem: str | None
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """The facts that a transaction has found; None for a fact that was not asked for yet.

    :param altered: why the documents may have another form than in the snapshot, or are of another server; None if they
        have the same form.
    :param can_capture: whether captured changes can be asked for.
    """

    altered: str | None
    can_capture: bool
    probe: str | None = None
    changes: Changes | None = None
    notified: NotifiedRows | None = None


class NotifiedRows(NamedTuple):
    """The rows that notifications named; None for any row."""

    keys: frozenset[str] | None


class AskProbe(NamedTuple):
    """Ask for the probe's value."""


class AskChanges(NamedTuple):
    """Ask for the changes recorded since a snapshot."""


class AskNotified(NamedTuple):
    """Wait for the notifications that were sent before the transaction began."""


class ReadNothing(NamedTuple):
    """End: nothing has changed."""


class ReadKeys(NamedTuple):
    """End with a delta: read the rows of these recorded keys."""

    keys: Sequence[Key]


class ReadNotified(NamedTuple):
    """End with a delta: read the rows that notifications named."""

    keys: frozenset[str]


class ReadAll(NamedTuple):
    """End with a full read.

    :param because: the reason, if there is a snapshot to start from.
    :param may_differ: the recorded keys, beside which no row may differ from the snapshot; None if that is not known.
    :param no_delta: why the recorded changes could not be used.
    """

    because: str | None
    may_differ: Sequence[Key] | None = None
    no_delta: str | None = None


Step = AskProbe | AskChanges | AskNotified | ReadNothing | ReadKeys | ReadNotified | ReadAll


def next_step(read: ReadPlan, known: Known) -> Step:
    """Return what a transaction does next, given what it has found out.

    :param read: its `since` must be None if the snapshot is of another server.
    """
    settings, since, can_follow = read.dataset, read.since, read.since is not None and known.altered is None
    if settings.probe and known.probe is None:
        return AskProbe()
    same_probe = bool(settings.probe) and can_follow and since is not None and since.probe == known.probe
    # If changes are recorded, an unchanged probe does not hide them.
    if same_probe and read.trust_probe and not read.check and not (settings.watch and known.can_capture):
        return ReadNothing()
    if settings.watch:
        return AskChanges() if known.changes is None else _by_changes(read, known, known.changes)
    if can_follow and read.notified is not None:
        if known.notified is None:
            return AskNotified()
        if (keys := known.notified.keys) is not None and len(keys) <= read.most_keys:
            return ReadNotified(keys)
    if read.check and known.altered is None:
        return ReadAll("it is a check of the probe", may_differ=() if same_probe else None)
    return ReadAll(known.altered or read.because)


def _by_changes(read: ReadPlan, known: Known, changes: Changes) -> Step:
    no_delta = changes.problem
    if len(changes.keys) > read.most_keys:
        no_delta = f"more than {read.most_keys:,} keys changed, see max_delta"
    because = no_delta or known.altered or read.because
    if because is not None or read.since is None:
        return ReadAll(because, no_delta=no_delta)
    if read.check:
        return ReadAll("it is a check of the deltas", may_differ=changes.keys)
    return ReadKeys(changes.keys) if changes.keys else ReadNothing()
