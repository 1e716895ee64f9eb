"""The main process of a worker, as its RESP port asks it."""

from __future__ import annotations

from collections.abc import Mapping

from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Json
from cacheservice.ports.resp.whole import ServiceInfo


class FakeWhole:
    """Answers when a test fires the oldest of `asked`, which are kinds of questions with the Deferreds."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Deferred[object]]] = []

    def info(self) -> Deferred[ServiceInfo]:
        return self._ask("info")  # type: ignore[return-value]  # the test fires it with the right type

    def client_list(self) -> Deferred[bytes]:
        return self._ask("client_list")  # type: ignore[return-value]

    def dataset(self, name: str) -> Deferred[Mapping[str, Json]]:
        return self._ask(f"dataset {name}")  # type: ignore[return-value]

    def answer(self, value: object) -> str:
        """Answer the oldest question; return its kind."""
        kind, coming = self.asked.pop(0)
        (coming.errback if isinstance(value, BaseException) else coming.callback)(value)
        return kind

    def _ask(self, kind: str) -> Deferred[object]:
        coming: Deferred[object] = Deferred()
        self.asked.append((kind, coming))
        return coming
