"""How a bug is logged."""

from __future__ import annotations

from twisted.python.failure import Failure

from cacheservice.base.interfaces import Log


def log_internal_error(log: Log, failure: Failure) -> None:
    """Log a bug with its traceback."""
    log.error("internal_error", error=failure.getErrorMessage(), traceback=failure.getTraceback())
