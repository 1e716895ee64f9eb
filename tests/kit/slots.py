"""A user that wants a slot, for tests of the order in which slots are granted."""

from __future__ import annotations

from twisted.internet.defer import Deferred

from cacheservice.refresh.slots import Slots


class Job:
    """A user that wants a slot, and its outcome."""

    def __init__(self, name: str, need: float = 1.0, *, failing: bool = False) -> None:
        self.name = name
        self.need = need
        self.failing = failing
        self.cancelled = False
        self.work: Deferred[str] | None = None
        self.result: Deferred[str] | None = None

    def __repr__(self) -> str:
        return self.name

    def ask(self, slots: Slots) -> Job:
        self.result = slots.run(lambda: self.need, lambda: self.failing, self._use)
        return self

    @property
    def running(self) -> bool:
        return self.work is not None and not self.work.called

    def end(self) -> None:
        assert self.work is not None
        self.work.callback(f"{self.name} done")

    def _use(self) -> Deferred[str]:
        assert self.work is None, "one slot, one use"
        self.work = Deferred(self._note_cancel)
        return self.work

    def _note_cancel(self, _: object) -> None:
        self.cancelled = True
