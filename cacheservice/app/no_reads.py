"""A process that does not read: a worker, or the half of the service that serves."""

from __future__ import annotations

from collections.abc import Iterator

from twisted.application.service import Service

from cacheservice.base.errors import Stopped
from cacheservice.cache.cache import Refreshes


class NoReads:
    """The parts of a process that does not read: none. What clients request of the refreshes is refused."""

    def __init__(self) -> None:
        self.requests: Refreshes = RefusedRefreshes()

    def services(self) -> Iterator[Service]:
        """Return no service."""
        return iter(())


class RefusedRefreshes:
    """Refuses what clients request of the refreshes; a `Refreshes`."""

    def refresh_now(self, name: str) -> bool:
        raise _does_not_read()

    def accept_next(self, name: str) -> None:
        raise _does_not_read()

    def pin(self, name: str) -> list[str]:
        raise _does_not_read()

    def unpin(self, name: str) -> list[str]:
        raise _does_not_read()

    def roll_back(self, name: str) -> dict[str, int]:
        raise _does_not_read()

    def refresh_since(self, name: str, moment: float) -> None:
        raise _does_not_read()


def _does_not_read() -> Stopped:
    return Stopped("this process does not refresh its datasets; ask the one that does")
