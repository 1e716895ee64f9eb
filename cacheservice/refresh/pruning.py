"""Decides whether recorded changes are kept for longer than they should be, and why."""

from __future__ import annotations

from cacheservice.sources.postgres.recorded import Recorded

CHANGES_KEPT_S = 3600.0
"""A dataset that was not refreshed for longer reads all rows."""
_MARGIN_S = 600.0
"""Changes are deleted each minute, by the service or by cron; a transaction of some minutes is no problem."""


def kept_because(recorded: Recorded, lag_s: float) -> str | None:
    """Return why changes older than `CHANGES_KEPT_S` are still there, or None if they are not.

    :param lag_s: of the standby that was asked, where the deletions arrive as late as everything else.
    """
    if not recorded.may_ask and recorded.in_recovery:
        return (
            "this is a standby, and its role may not ask how old they are; on the primary run cacheservice migrate "
            "--reader NAME"
        )
    if recorded.oldest_s is None or recorded.oldest_s - lag_s <= CHANGES_KEPT_S + _MARGIN_S:
        return None
    if recorded.in_recovery:
        return (
            "this is a standby, where nothing can be deleted; let cron on the primary run "
            "SELECT cacheservice.prune('1 hour') each minute"
        )
    return recorded.in_the_way or (
        "the service deletes for at most 30 s a minute and has not caught up; run SELECT cacheservice.prune('1 hour') "
        "until it returns less than 10000"
    )
