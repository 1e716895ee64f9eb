"""The metrics of each dataset: their names, their meaning and their values.

All formats of the metrics are derived from `GROUPS`, and those of `capture_metrics` and `fleet_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, TypeVar, cast

from prometheus_client.core import Metric

from cacheservice.cache.counts import REFRESH_BOUNDS_S, Histogram
from cacheservice.cache.dataset import Dataset, State

_DATASET = "@"
"""A placeholder for the dataset's name in a template; no name contains it."""

Kind = Literal["gauge", "counter", "histogram"]
Labels = Mapping[str, str]
Values = tuple[float, ...]
"""One value for each series of a family; empty if no value exists yet."""


class Sample(NamedTuple):
    """One number: `name` is the name of its series, `labels` are all labels."""

    name: str
    labels: Labels
    value: float


class Family:
    """Series with one name that every dataset has.

    :param name: as in a query; that of a counter ends in `_total`.
    :param series: for each series, the suffix of the name (of a histogram) and the labels other than the dataset's.
    :param form: the `%` format of a value; the sum of a histogram is written in full precision.
    :param unit: seconds or bytes, if the name ends in it.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        documentation: str,
        series: Sequence[tuple[str, Labels]] = (("", {}),),
        form: str = "%d",
        unit: str = "",
    ) -> None:
        self.name, self.kind, self.documentation, self.unit = name, kind, documentation, unit
        self._series = series
        bare = name.removesuffix("_total") if kind == "counter" else name
        self.text_head = f"# HELP {name} {documentation}\n# TYPE {name} {kind}\n".encode()
        of_unit = f"# UNIT {bare} {unit}\n" if unit else ""
        self.openmetrics_head = f"# HELP {bare} {documentation}\n# TYPE {bare} {kind}\n{of_unit}".encode()
        self._template = "".join(
            f"{name}{suffix}{{{_in_braces(labels)}}} {form if suffix != '_sum' else '%.15g'}\n"
            for suffix, labels in series
        )

    def template(self, dataset: str) -> bytes:
        """Return a line for each series of a dataset: `template % values` fills it."""
        return self._template.replace(_DATASET, dataset).encode()

    def samples(self, dataset: str, values: Values) -> Iterator[Sample]:
        if values:
            for (suffix, labels), value in zip(self._series, values, strict=True):
                yield Sample(self.name + suffix, {"dataset": dataset, **labels}, value)

    def metric(self, samples: Iterable[Sample]) -> Metric:
        """Return the samples for prometheus-client, which names counters without `_total`."""
        metric = Metric(self.name.removesuffix("_total"), self.documentation, self.kind, self.unit)
        for name, labels, value in samples:
            metric.add_sample(name, dict(labels), value)
        return metric


def _in_braces(labels: Labels) -> str:
    # In the order of prometheus-client. No label value needs an escape.
    return ",".join(f'{label}="{value}"' for label, value in sorted({"dataset": _DATASET, **labels}.items()))


S = TypeVar("S")


class Group(NamedTuple):
    """Families whose values change together.

    `stamp` returns the inputs of the values: while they are equal, the values are too. `values` returns the values of
    each family, one for each of its series, from the dataset and its current stamp. `optional` families are left out as
    a whole while no dataset has a value.
    """

    families: tuple[Family, ...]
    stamp: Callable[[Dataset], object]
    values: Callable[[Dataset, object], Iterable[Values]]
    optional: bool = False


def group(
    families: tuple[Family, ...], stamp: Callable[[Dataset], S], values: Callable[[Dataset, S], Iterable[Values]]
) -> Group:
    """Return a group; `values` gets the stamp with its type."""
    return Group(families, stamp, cast("Callable[[Dataset, object], Iterable[Values]]", values))


_OUTCOMES = ("published", "unchanged", "held", "failed")
_READS = [(port, result) for port in ("resp", "http") for result in ("hit", "miss", "loading", "stale")]


def bucket_names(bounds: Sequence[float]) -> list[str]:
    return [*(str(float(bound)) for bound in bounds), "+Inf"]


def histogram_values(histogram: Histogram) -> Values:
    """Return the values of a histogram's series.

    They are the cumulative count of each bucket, the total count, and the sum.
    """
    *lower, count = accumulate(histogram.counts)
    return *lower, count, count, round(histogram.total, 6)


def _age_s(dataset: Dataset) -> float | None:
    age_s = dataset.age_s()
    return None if age_s is None else round(age_s, 3)


def _refreshes_stamp(dataset: Dataset) -> tuple[object, ...]:
    counts, snapshot = dataset.counts, dataset.snapshot
    return (
        counts.outcomes.total(),
        dataset.consecutive_failures,
        counts.rows_read,
        counts.added,
        counts.changed,
        counts.removed,
        counts.missed_ticks,
        counts.differences,
        counts.save_failures,
        dataset.held is None,
        dataset.pinned,
        dataset.settings.max_age_s,
        # Not the snapshot: the reference would keep it in memory.
        snapshot and (snapshot.generation, snapshot.read_at),
    )


def _refreshes_values(dataset: Dataset, _: object) -> Iterator[Values]:
    counts, snapshot = dataset.counts, dataset.snapshot
    yield (snapshot.rows.count if snapshot else 0,)
    yield (snapshot.rows.size_bytes if snapshot else 0,)
    yield (snapshot.generation if snapshot else 0,)
    yield (round(snapshot.as_of.timestamp(), 3),) if snapshot else ()
    yield (int(dataset.held is not None),)
    yield (int(dataset.pinned),)
    yield (dataset.settings.max_age_s,)
    yield tuple(counts.outcomes[outcome] for outcome in _OUTCOMES)
    yield histogram_values(counts.durations)
    yield (counts.rows_read,)
    yield counts.added, counts.changed, counts.removed
    yield (dataset.consecutive_failures,)
    yield (round(dataset.attempts[-1].started_at.timestamp(), 3),) if dataset.attempts else ()
    yield (counts.missed_ticks,)
    yield (counts.differences,)
    yield (counts.save_failures,)


def _reads_stamp(dataset: Dataset) -> tuple[int, ...]:
    resp, http = dataset.counts.resp, dataset.counts.http
    return resp.hits, resp.misses, resp.loading, resp.stale, http.hits, http.misses, http.loading, http.stale


AGE = Family(
    "cacheservice_dataset_age_seconds",
    "gauge",
    "Seconds since just before the transaction that read the served snapshot; none before the first load.",
    form="%.3f",
    unit="seconds",
)
"""A group of its own, because it changes all the time."""

_WITHOUT_DELTAS = Family(
    "cacheservice_dataset_without_deltas_seconds",
    "gauge",
    "Seconds for which all rows have been read although watch is configured; 0 while deltas work.",
    form="%.3f",
    unit="seconds",
)


def _whole_for_s(dataset: Dataset) -> float:
    return round(dataset.without_deltas_s() or 0.0, 3)


GROUPS = (
    group((AGE,), _age_s, lambda _, age_s: ((() if age_s is None else (age_s,)),)),
    group((_WITHOUT_DELTAS,), _whole_for_s, lambda _, value: ((value,),)),
    group(
        (
            Family(
                "cacheservice_dataset_state",
                "gauge",
                "1 for the state that the dataset is in, 0 for the others.",
                [("", {"state": str(state)}) for state in State],
            ),
        ),
        Dataset.state,
        lambda _, current: (tuple(state is current for state in State),),
    ),
    group(
        (
            Family("cacheservice_dataset_rows", "gauge", "Rows of the served snapshot."),
            Family(
                "cacheservice_dataset_bytes",
                "gauge",
                "Bytes of the keys and documents of the served snapshot.",
                unit="bytes",
            ),
            Family("cacheservice_dataset_generation", "gauge", "Number of the served snapshot; 0 before the first."),
            Family(
                "cacheservice_dataset_last_success_timestamp_seconds",
                "gauge",
                "The database's clock when the transaction that read the served snapshot began, since the epoch.",
                form="%.3f",
                unit="seconds",
            ),
            Family("cacheservice_dataset_held", "gauge", "1 while the newest result is held back by a gate."),
            Family("cacheservice_dataset_pinned", "gauge", "1 while an operator keeps newer results from readers."),
            Family(
                "cacheservice_dataset_max_age_seconds",
                "gauge",
                "The age past which the dataset is expired.",
                form="%.15g",
                unit="seconds",
            ),
            Family(
                "cacheservice_refresh_total",
                "counter",
                "Refreshes that have ended, by how.",
                [("", {"outcome": outcome}) for outcome in _OUTCOMES],
            ),
            Family(
                "cacheservice_refresh_duration_seconds",
                "histogram",
                "How long refreshes took, however they ended; waiting for a connection is not counted.",
                [
                    *(("_bucket", {"le": bound}) for bound in bucket_names(REFRESH_BOUNDS_S)),
                    ("_count", {}),
                    ("_sum", {}),
                ],
                unit="seconds",
            ),
            Family(
                "cacheservice_refresh_rows_total",
                "counter",
                "Rows that refreshes read from the database; of a delta, the keys that it looked up.",
            ),
            Family(
                "cacheservice_dataset_changed_rows_total",
                "counter",
                "Rows that publishes added, changed and removed.",
                [("", {"change": change}) for change in ("added", "changed", "removed")],
            ),
            Family("cacheservice_dataset_consecutive_failures", "gauge", "Refreshes in a row that have failed."),
            Family(
                "cacheservice_dataset_last_attempt_timestamp_seconds",
                "gauge",
                "This machine's clock when the last refresh that has ended began, since the epoch.",
                form="%.3f",
                unit="seconds",
            ),
            Family(
                "cacheservice_refresh_skipped_total",
                "counter",
                "Starts of an interval that were skipped, because a refresh was still running.",
            ),
            Family(
                "cacheservice_delta_differences_total",
                "counter",
                "Rows that a full read found to differ from what deltas had made of them; there must be none.",
            ),
            Family(
                "cacheservice_save_failures_total", "counter", "Snapshots that could not be saved for a warm start."
            ),
        ),
        _refreshes_stamp,
        _refreshes_values,
    ),
    group(
        (
            Family(
                "cacheservice_reads_total",
                "counter",
                "Rows, and datasets as a whole, that clients asked for, by the port and what they got.",
                [("", {"port": port, "result": result}) for port, result in _READS],
            ),
        ),
        _reads_stamp,
        lambda _, stamp: (stamp,),
    ),
)
