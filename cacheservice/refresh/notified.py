"""The keys that notifications named since the last attempt took them."""

from __future__ import annotations

from collections.abc import Iterable

Keys = frozenset[str] | None
"""None stands for any row."""


class NotifiedKeys:
    """Remembers by dataset which rows notifications named.

    An attempt takes them as it begins. If it fails or its result is held, `forget` makes the next one read everything,
    because the keys are as lost as the attempt.
    """

    def __init__(self) -> None:
        self._named: dict[str, set[str] | None] = {}

    def add(self, name: str, keys: Iterable[str] | None) -> None:
        """Note a notification of a dataset: of these rows, or with None of any row."""
        named = self._named.setdefault(name, set())
        if keys is None or named is None:
            self._named[name] = None
        else:
            named.update(keys)

    def take(self, name: str) -> Keys:
        """Return the keys that were named, empty if no notification named any, and forget them."""
        named = self._named.pop(name, set())
        return None if named is None else frozenset(named)

    def since(self, name: str) -> Keys:
        """Return the keys that were named since the last `take`."""
        named = self._named.get(name, set())
        return None if named is None else frozenset(named)

    def forget(self, names: Iterable[str]) -> None:
        """Take any row of these datasets for changed."""
        self._named.update(dict.fromkeys(names))
