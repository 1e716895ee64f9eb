"""All datasets, and what is known of the database behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, Protocol

from cacheservice.cache.dataset import Dataset, State
from cacheservice.config import DatasetSettings
from cacheservice.errors import UnknownDataset


class DatabaseStatus:
    """What the last attempts learned of PostgreSQL; `connections` are open now.

    `listening_wanted` says whether any dataset waits for notifications; `listening` whether they arrive, as it was
    last proven at `listening_proven_at` on the monotonic clock; `listening_problem` why they do not.
    """

    def __init__(self) -> None:
        self.state: Literal["up", "down", "unknown"] = "unknown"
        self.error: str | None = None
        self.connections = 0
        self.listening_wanted = False
        self.listening = False
        self.listening_proven_at: float | None = None
        self.listening_problem: str | None = None

    def answered(self) -> None:
        self.state, self.error = "up", None

    def failed(self, error: str) -> None:
        self.state, self.error = "down", error


class Cache:
    """The datasets by name, in the order of the configuration.

    :param now: the monotonic clock, in seconds.
    """

    def __init__(self, datasets: Iterable[DatasetSettings], now: Callable[[], float]) -> None:
        self._datasets = {settings.name: Dataset(settings, now) for settings in datasets}
        self.database = DatabaseStatus()
        self.now = now
        self.started_at = now()

    @property
    def datasets(self) -> Mapping[str, Dataset]:
        return MappingProxyType(self._datasets)

    def dataset(self, name: str) -> Dataset:
        """:raises UnknownDataset: if none has that name."""
        try:
            return self._datasets[name]
        except KeyError:
            raise UnknownDataset(f"unknown dataset '{name}'") from None

    def not_ready(self) -> dict[str, State]:
        """The required datasets that are not loaded or expired, with their state; empty when the service is ready."""
        states = {name: d.state() for name, d in self._datasets.items() if d.settings.required}
        return {name: state for name, state in states.items() if state in (State.NEVER_LOADED, State.EXPIRED)}


class Refreshes(Protocol):
    """All that a port may ask of what refreshes."""

    def refresh_now(self, name: str) -> bool:
        """Start a refresh that begins after this call; False if one is running, which it then follows.

        :raises UnknownDataset: if none has that name.
        """

    def accept_next(self, name: str) -> None:
        """Let the next result through although a gate would hold it, once.

        :raises UnknownDataset: if none has that name.
        """

    def pin(self, name: str) -> list[str]:
        """Serve what is served until `unpin`, of the whole group; gives the names of whose.

        :raises UnknownDataset: if none has that name.
        :raises NothingToPin: if one of them has not been loaded.
        """

    def unpin(self, name: str) -> list[str]:
        """Serve the newest results again, of the whole group; gives the names of whose.

        :raises UnknownDataset: if none has that name.
        """

    def roll_back(self, name: str) -> dict[str, int]:
        """Begin to serve the saved generation before the one that is served, pinned, of the whole group.

        Gives the saved generation of each by name.

        :raises UnknownDataset: if none has that name.
        :raises NothingToRollBackTo: if there is none.
        """

    def refresh_since(self, name: str, moment: float) -> None:
        """See to it that a refresh begins at or after `moment`, unless one that did is running already.

        However many ask, one refresh serves them all.

        :param moment: on the monotonic clock, in seconds.
        :raises UnknownDataset: if none has that name.
        """
