"""How changes are captured, as values."""

from __future__ import annotations

from types import MappingProxyType

from cacheservice.cache.capture import CaptureStatus

STREAMING = CaptureStatus(
    "streaming", None, "cacheservice_1", 100, 0.25, 5000, 1 << 30, 7, 400, 20, 30, MappingProxyType({"lost": 2})
)
"""A stream with figures that all differ."""
BY_TRIGGERS = '{"tables":{"public.products":{"watched":1}},"not_logical":"wal_level is replica"}'
FROM_LOG = '{"logical":{"slot":"cacheservice_1"}}'
"""The states of snapshots whose changes are captured so."""
