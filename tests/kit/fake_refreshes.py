"""Refreshes that ports may ask for, and that never come."""

from __future__ import annotations


class FakeRefreshes:
    """Remembers what was asked for: `asked` since a moment, and `at_once`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []
        self.at_once: list[str] = []

    def refresh_now(self, name: str) -> bool:
        self.at_once.append(name)
        return True

    def refresh_since(self, name: str, moment: float) -> None:
        self.asked.append((name, moment))
