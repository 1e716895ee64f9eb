"""The metrics of change capture by logical decoding; a service that does not need it has none of the first ones."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cacheservice.cache.capture import CaptureStatus, captured_by
from cacheservice.cache.dataset import Dataset
from cacheservice.ops.dataset_metrics import Family, Values, group

_REASONS = ("lost",)
"""Counted from 0, so that the first restart is an increase."""


def of_capture(status: CaptureStatus) -> Iterator[Metric]:
    """Yield the metrics of the stream of changes; nothing while it is off."""
    if status.state == "off":
        return
    is_streaming = status.state == "streaming"
    yield GaugeMetricFamily(
        "cacheservice_capture_up",
        "1 while changes are read from the write-ahead log; not there if no dataset needs it.",
        int(is_streaming),
    )
    if is_streaming:
        yield GaugeMetricFamily(
            "cacheservice_capture_lag_bytes",
            "Bytes of the log that are written and not decoded yet; not there while nothing is streamed.",
            status.lag_bytes,
        )
        yield GaugeMetricFamily(
            "cacheservice_capture_lag_seconds",
            "Seconds for which written log has not been decoded; not there while nothing is streamed.",
            round(status.lag_s, 3),
        )
    if status.retained_bytes is not None:
        yield GaugeMetricFamily(
            "cacheservice_capture_retained_bytes",
            "Bytes of the log that the server keeps for the slot; not there if unknown.",
            status.retained_bytes,
        )
    if status.limit_bytes is not None:
        yield GaugeMetricFamily(
            "cacheservice_capture_retained_limit_bytes",
            "Bytes of the log beyond which the server invalidates the slot; not there without a limit.",
            status.limit_bytes,
        )
    yield GaugeMetricFamily(
        "cacheservice_capture_kept_keys", "Changed keys in memory, until no dataset needs them.", status.kept_keys
    )
    yield GaugeMetricFamily("cacheservice_capture_kept_bytes", "Memory that these keys take.", status.kept_bytes)
    yield CounterMetricFamily(
        "cacheservice_capture_transactions", "Transactions that have changed published tables.", status.transactions
    )
    yield CounterMetricFamily("cacheservice_capture_keys", "Keys of the rows that they have changed.", status.keys)
    restarts = CounterMetricFamily("cacheservice_capture_restarts", "Streams that have ended.", labels=["reason"])
    for reason in dict.fromkeys((*_REASONS, *status.restarts)):
        restarts.add_metric([reason], status.restarts.get(reason, 0))
    yield restarts


def _values(_: Dataset, watch_state: str | None) -> Iterator[Values]:
    yield () if watch_state is None else (int(captured_by(watch_state).way == "logical"),)


CAPTURE_GROUPS = (
    group(
        (
            Family(
                "cacheservice_capture_logical",
                "gauge",
                "1 if changes of the watched tables are read from the log, 0 if by triggers or not at all.",
            ),
        ),
        Dataset.watch_state,
        _values,
    )._replace(optional=True),
)
